//! What an intermediary must do to the fields of a message, in both directions.

use http::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, FORWARDED, HeaderMap, HeaderName, HeaderValue, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE, VIA,
};

use crate::policy::Edit;

pub(crate) const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
pub(crate) const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

/// What one look over the fields found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// Something that belongs to one connection only.
    pub(crate) hop_by_hop: bool,
    pub(crate) upgrade: bool,
    pub(crate) te: bool,
    pub(crate) via: bool,
    pub(crate) expect: bool,
    pub(crate) cookie: bool,
    /// `x-forwarded-*`, `x-real-ip` or `forwarded`.
    pub(crate) forwarded: bool,
}

/// Looks over the fields once; a request in ten has something to remove, the others pay for the look alone.
pub(crate) fn look(headers: &HeaderMap) -> Found {
    let mut found = Found::default();
    for name in headers.keys() {
        let text = name.as_str();
        match text.as_bytes() {
            [b'c', b'o', b'n', b'n', ..] => found.hop_by_hop |= name == CONNECTION,
            [b'c', b'o', b'o', ..] => found.cookie |= name == COOKIE,
            [b't', b'e'] => found.te = true,
            [b't', b'r', b'a', ..] => found.hop_by_hop |= name == TRANSFER_ENCODING,
            [b'u', b'p', ..] if name == UPGRADE => (found.hop_by_hop, found.upgrade) = (true, true),
            [b'k', ..] => found.hop_by_hop |= name == KEEP_ALIVE,
            [b'p', b'r', b'o', b'x', b'y', ..] => {
                found.hop_by_hop |=
                    name == PROXY_CONNECTION || name == PROXY_AUTHORIZATION || name == PROXY_AUTHENTICATE;
            }
            [b'h', b't', ..] => found.hop_by_hop |= name == HTTP2_SETTINGS,
            [b'v', b'i', b'a'] => found.via = true,
            [b'e', b'x', b'p', ..] => found.expect |= name == EXPECT,
            [b'x', b'-', ..] => found.forwarded |= text.starts_with("x-forwarded-") || text == "x-real-ip",
            [b'f', ..] => found.forwarded |= name == FORWARDED,
            _ => {}
        }
    }
    found
}

/// Removes what belongs to one connection: the fixed set, and what any `Connection` line nominates. Nominating fields of
/// the message itself, or ones that proxies wrote for the next to trust, has no effect.
pub(crate) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    // Kept aside: removing while reading is not possible, and most messages nominate nothing of interest.
    let mut nominated: Vec<HeaderName> = Vec::new();
    for line in headers.get_all(CONNECTION) {
        for option in line.as_bytes().split(|byte| *byte == b',') {
            let option = option.trim_ascii();
            if option.is_empty() || option.eq_ignore_ascii_case(b"close") || option.eq_ignore_ascii_case(b"keep-alive")
            {
                continue;
            }
            if let Ok(name) = HeaderName::from_bytes(option)
                && may_be_nominated(&name)
                && headers.contains_key(&name)
            {
                nominated.push(name);
            }
        }
    }
    for name in &nominated {
        headers.remove(name);
    }
    for name in [&CONNECTION, &KEEP_ALIVE, &PROXY_CONNECTION, &TRANSFER_ENCODING, &UPGRADE, &HTTP2_SETTINGS] {
        headers.remove(name);
    }
    headers.remove(PROXY_AUTHORIZATION);
    headers.remove(PROXY_AUTHENTICATE);
}

/// RFC 9110 §7.6.1 forbids senders to nominate what is meant for all recipients; one who does wants security to be lost
/// on the way.
fn may_be_nominated(name: &HeaderName) -> bool {
    let text = name.as_str();
    !(matches!(
        text,
        "host"
            | "authorization"
            | "cookie"
            | "set-cookie"
            | "content-length"
            | "content-type"
            | "content-encoding"
            | "content-range"
            | "cache-control"
            | "date"
            | "forwarded"
            | "via"
            | "trailer"
            | "te"
            | "max-forwards"
            | "x-real-ip"
            | "x-request-id"
            | "traceparent"
            | "tracestate"
            | "baggage"
            | "www-authenticate"
    ) || text.starts_with("x-forwarded-")
        || text.starts_with("grpc-"))
}

/// Whether the body is coded by more than chunks. What else was done to it for this connection would have to be undone
/// before it is sent over the next.
pub(crate) fn has_other_codings(headers: &HeaderMap) -> bool {
    let mut lines = headers.get_all(TRANSFER_ENCODING).iter();
    let Some(first) = lines.next() else { return false };
    !first.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked") || lines.next().is_some()
}

/// `TE` belongs to one connection, but that the caller takes trailers is true for us as well: `Some` if it said so.
pub(crate) fn takes_trailers(headers: &HeaderMap) -> bool {
    headers.get_all(TE).iter().any(|line| {
        line.as_bytes().split(|byte| *byte == b',').any(|coding| {
            let mut parts = coding.split(|byte| *byte == b';');
            parts.next().is_some_and(|name| name.trim_ascii().eq_ignore_ascii_case(b"trailers"))
        })
    })
}

/// In HTTP/2 cookies may come in several fields, which are one for everybody else
/// ([RFC 9113 §8.2.3](https://www.rfc-editor.org/rfc/rfc9113#section-8.2.3)).
pub(crate) fn join_cookies(headers: &mut HeaderMap) {
    let crumbs: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if crumbs.len() > 1
        && let Ok(mut whole) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..]))
    {
        whole.set_sensitive(true);
        headers.insert(COOKIE, whole);
    }
}

/// Leaves of `TE` what we can do.
pub(crate) fn rewrite_te(headers: &mut HeaderMap) {
    let mut lines = headers.get_all(TE).iter();
    if lines.next().is_none_or(|first| first == "trailers") && lines.next().is_none() {
        return;
    }
    let trailers = takes_trailers(headers);
    headers.remove(TE);
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
}

/// Drops trailers that would act on framing, routing or authentication (RFC 9110 §6.5.1) or belong to one connection.
pub(crate) fn clean_trailers(trailers: &mut HeaderMap) {
    let forbidden: Vec<HeaderName> = trailers.keys().filter(|name| !may_be_trailer(name)).cloned().collect();
    for name in forbidden {
        trailers.remove(name);
    }
}

fn may_be_trailer(name: &HeaderName) -> bool {
    !matches!(
        name.as_str(),
        "transfer-encoding"
            | "content-length"
            | "host"
            | "trailer"
            | "te"
            | "connection"
            | "keep-alive"
            | "proxy-connection"
            | "upgrade"
            | "http2-settings"
            | "cache-control"
            | "expect"
            | "max-forwards"
            | "pragma"
            | "range"
            | "authorization"
            | "proxy-authorization"
            | "proxy-authenticate"
            | "www-authenticate"
            | "cookie"
            | "set-cookie"
            | "age"
            | "expires"
            | "date"
            | "location"
            | "retry-after"
            | "vary"
            | "warning"
            | "content-encoding"
            | "content-type"
            | "content-range"
            | "forwarded"
            | "via"
            | "x-real-ip"
    ) && !name.as_str().starts_with("x-forwarded-")
}

/// The protocol a request asks to change to, if it may: said in both `Connection` and `Upgrade`, one protocol, and not
/// another HTTP version, which would carry requests past every layer.
pub(crate) fn upgrade_wanted(headers: &HeaderMap) -> Option<HeaderValue> {
    let named = headers.get_all(CONNECTION).iter().any(|line| {
        line.as_bytes().split(|byte| *byte == b',').any(|option| option.trim_ascii().eq_ignore_ascii_case(b"upgrade"))
    });
    let mut lines = headers.get_all(UPGRADE).iter();
    let protocol = lines.next()?;
    if !named
        || lines.next().is_some()
        || headers.contains_key(CONTENT_LENGTH)
        || headers.contains_key(TRANSFER_ENCODING)
    {
        return None;
    }
    let text = protocol.to_str().ok()?.trim();
    let is_token = !text.is_empty() && !text.contains([',', ' ', '\t']);
    let name = text.split('/').next().unwrap_or_default();
    let is_http = name.eq_ignore_ascii_case("h2c")
        || name.eq_ignore_ascii_case("h2")
        || name.eq_ignore_ascii_case("http")
        || name.eq_ignore_ascii_case("tls");
    (is_token && !is_http).then(|| protocol.clone())
}

/// Whether one of the `Via` lines says that a proxy of this name has seen the message.
pub(crate) fn seen_by(headers: &HeaderMap, pseudonym: &str) -> bool {
    headers.get_all(VIA).iter().any(|line| {
        line.as_bytes().split(|byte| *byte == b',').any(|hop| {
            let mut words = hop.split(|byte| matches!(byte, b' ' | b'\t')).filter(|word| !word.is_empty());
            words.next().is_some() && words.next().is_some_and(|by| by.eq_ignore_ascii_case(pseudonym.as_bytes()))
        })
    })
}

pub(crate) fn apply(edits: &[Edit], headers: &mut HeaderMap) {
    for edit in edits {
        match edit {
            Edit::Set(name, value) => {
                headers.insert(name, value.clone());
            }
            Edit::Add(name, value) => {
                headers.append(name, value.clone());
            }
            Edit::Remove(name) => {
                headers.remove(name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        lines.iter().map(|(n, v)| (HeaderName::from_static(n), HeaderValue::from_str(v).unwrap())).collect()
    }

    #[test]
    fn every_connection_line_counts() {
        let mut all = headers(&[
            ("connection", "close, X-One"),
            ("connection", " x-two ,, bad name"),
            ("x-one", "1"),
            ("x-two", "2"),
            ("x-two", "2"),
            ("x-three", "3"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("proxy-authorization", "Basic x"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "x"),
        ]);
        assert!(look(&all).hop_by_hop);
        strip_hop_by_hop(&mut all);
        assert_eq!(all, headers(&[("x-three", "3")]));
    }

    #[test]
    fn what_guards_a_request_cannot_be_nominated_away() {
        let kept = [("authorization", "Bearer x"), ("x-forwarded-for", "1.2.3.4"), ("host", "a"), ("cookie", "b")];
        let mut all = headers(&kept);
        all.insert("connection", HeaderValue::from_static("authorization, x-forwarded-for, host, Cookie"));
        strip_hop_by_hop(&mut all);
        assert_eq!(all, headers(&kept));
    }

    #[test]
    fn of_te_only_trailers_stay() {
        for (lines, kept) in [
            (&["trailers"][..], true),
            (&["gzip, Trailers"], true),
            (&["gzip", "trailers;q=1"], true),
            (&["gzip"], false),
            (&["xtrailers"], false),
        ] {
            let mut all: HeaderMap = lines.iter().map(|v| (TE, HeaderValue::from_static(v))).collect();
            rewrite_te(&mut all);
            assert_eq!(all.get(TE).map(HeaderValue::as_bytes), kept.then_some(&b"trailers"[..]), "{lines:?}");
        }
    }

    #[test]
    fn an_upgrade_is_one_protocol_named_twice_and_no_http() {
        let wanted = |lines: &[(&'static str, &str)]| upgrade_wanted(&headers(lines)).is_some();
        assert!(wanted(&[("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")]));
        assert!(wanted(&[("connection", "keep-alive"), ("connection", "upgrade"), ("upgrade", "x/1")]));
        assert!(!wanted(&[("upgrade", "websocket")]));
        assert!(!wanted(&[("connection", "upgrade")]));
        assert!(!wanted(&[("connection", "upgrade"), ("upgrade", "h2c")]));
        assert!(!wanted(&[("connection", "upgrade"), ("upgrade", "HTTP/2.0")]));
        assert!(!wanted(&[("connection", "upgrade"), ("upgrade", "websocket, h2c")]));
        assert!(!wanted(&[("connection", "upgrade"), ("upgrade", "websocket"), ("upgrade", "h2c")]));
        assert!(!wanted(&[("connection", "upgrade"), ("upgrade", "websocket"), ("content-length", "5")]));
    }

    #[test]
    fn our_own_name_in_any_via_line_is_a_loop() {
        assert!(seen_by(&headers(&[("via", "1.1 other"), ("via", "1.0 x (c), 1.1 Gate")]), "gate"));
        assert!(!seen_by(&headers(&[("via", "1.1 other, 1.1 gate2"), ("via", "gate")]), "gate"));
    }

    #[test]
    fn trailers_cannot_change_the_message() {
        let mut all =
            headers(&[("grpc-status", "0"), ("content-length", "5"), ("x-forwarded-for", "a"), ("x-sum", "1")]);
        clean_trailers(&mut all);
        assert_eq!(all, headers(&[("grpc-status", "0"), ("x-sum", "1")]));
    }
}
