//! What the upstream is told about where a request came from.

use std::cell::RefCell;
use std::net::{IpAddr, Ipv4Addr};

use http::header::{FORWARDED, HeaderMap, HeaderName, HeaderValue, VIA};
use http::{Extensions, Version};
use portcullis_core::{Carried, PeerAddress, PeerTls, TrustedProxies, canonical_address};
use portcullis_wire::write_line;

use crate::headers::Found;

pub(crate) const FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
pub(crate) const PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
pub(crate) const HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
pub(crate) const PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
pub(crate) const PREFIX: HeaderName = HeaderName::from_static("x-forwarded-prefix");

/// Which fields tell the upstream where a request came from. Whatever the caller wrote in any of them is believed only
/// if it is a trusted proxy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Forwarded {
    /// `X-Forwarded-For`, `-Proto` and `-Host`.
    #[default]
    XForwarded,
    /// `Forwarded` ([RFC 7239](https://www.rfc-editor.org/rfc/rfc7239)).
    Standard,
    /// Both.
    Both,
    /// Neither, and none is passed on.
    Nothing,
}

/// Fields that are added to nearly every request. Beside the others they need not be sorted in among them, only to be
/// written out again.
#[derive(Debug, Default)]
pub(crate) struct Added {
    /// By which version the request came.
    pub(crate) via: Option<Version>,
    client: Option<IpAddr>,
    proto: Option<&'static str>,
    host: Option<HeaderValue>,
}

/// Says where a request came from: in `headers`, and in what is added to them. `host` is what the caller asked for.
pub(crate) fn write(
    fields: Forwarded,
    proxies: &TrustedProxies,
    found: Found,
    extensions: &Extensions,
    host: Option<&HeaderValue>,
    headers: &mut HeaderMap,
) -> Added {
    let mut added = Added::default();
    let peer = PeerAddress::of(extensions).map(|peer| canonical_address(peer.0.ip()));
    let trusted = peer.is_some_and(|peer| proxies.trusts(peer));
    if found.forwarded && (!trusted || fields == Forwarded::Nothing) {
        remove_all(headers);
    }
    let encrypted = PeerTls::of(extensions).is_some();
    let proto = if encrypted { "https" } else { "http" };
    let believed = trusted && found.forwarded;
    if matches!(fields, Forwarded::XForwarded | Forwarded::Both) {
        if let Some(peer) = peer {
            let chain = believed.then(|| joined(headers)).flatten();
            match chain.and_then(|chain| HeaderValue::try_from(format!("{chain}, {peer}")).ok()) {
                Some(chain) => _ = headers.insert(FOR, chain),
                None => {
                    headers.remove(FOR);
                    added.client = Some(peer);
                }
            }
        }
        if !believed || !headers.contains_key(PROTO) {
            added.proto = Some(proto);
        }
        if !believed || !headers.contains_key(HOST) {
            added.host = host.cloned();
        }
    } else if believed {
        for name in [FOR, PROTO, HOST, PORT, PREFIX] {
            headers.remove(name);
        }
    }
    match fields {
        Forwarded::Standard | Forwarded::Both => {
            let node = match peer {
                Some(IpAddr::V6(peer)) => format!("\"[{peer}]\""),
                Some(IpAddr::V4(peer)) => peer.to_string(),
                None => "unknown".to_owned(),
            };
            let mut element = format!("for={node};proto={proto}");
            if let Some(host) = host.and_then(|host| host.to_str().ok()).filter(|host| is_quotable(host)) {
                element.push_str(";host=\"");
                element.push_str(host);
                element.push('"');
            }
            if let Ok(value) = HeaderValue::try_from(element) {
                headers.append(FORWARDED, value);
            }
        }
        Forwarded::XForwarded => {
            if believed {
                headers.remove(FORWARDED);
            }
        }
        Forwarded::Nothing => {}
    }
    added
}

// === impl Added ===

impl Added {
    pub(crate) fn write(&self, via: &Via, out: &mut Vec<u8>) {
        if let Some(version) = self.via {
            write_line(out, "via", via.value(version).as_bytes());
        }
        if let Some(client) = self.client {
            with_address(client, |client| write_line(out, "x-forwarded-for", client.as_bytes()));
        }
        if let Some(proto) = self.proto {
            write_line(out, "x-forwarded-proto", proto.as_bytes());
        }
        if let Some(host) = &self.host {
            write_line(out, "x-forwarded-host", host.as_bytes());
        }
    }

    /// Puts them among the others.
    pub(crate) fn append_to(&mut self, via: &Via, headers: &mut HeaderMap) {
        let added = std::mem::take(self);
        headers.reserve(4);
        let via = added.via.map(|version| via.value(version).clone());
        let client = added.client.map(|client| with_address(client, HeaderValue::clone));
        let proto = added.proto.map(HeaderValue::from_static);
        for (name, value) in [(VIA, via), (FOR, client), (PROTO, proto), (HOST, added.host)] {
            if let Some(value) = value {
                headers.append(name, value);
            }
        }
    }
}

fn is_quotable(host: &str) -> bool {
    host.bytes().all(|b| b.is_ascii_graphic() && b != b'"' && b != b'\\')
}

fn remove_all(headers: &mut HeaderMap) {
    let theirs: Vec<HeaderName> = headers
        .keys()
        .filter(|name| name.as_str().starts_with("x-forwarded-") || *name == FORWARDED || *name == "x-real-ip")
        .cloned()
        .collect();
    for name in theirs {
        headers.remove(name);
    }
}

fn joined(headers: &HeaderMap) -> Option<String> {
    let mut lines = headers.get_all(FOR).iter();
    let mut chain = lines.next()?.to_str().ok()?.to_owned();
    for line in lines {
        chain.push_str(", ");
        chain.push_str(line.to_str().ok()?);
    }
    Some(chain)
}

/// An address as a field value. A few callers make most of the requests, so the last ones are kept.
fn with_address<T>(address: IpAddr, with: impl FnOnce(&HeaderValue) -> T) -> T {
    const KEPT: usize = 64;
    thread_local! {
        static LAST: RefCell<Vec<(IpAddr, HeaderValue)>> =
            RefCell::new(vec![(Ipv4Addr::UNSPECIFIED.into(), HeaderValue::from_static("0.0.0.0")); KEPT]);
    }
    let place = match address {
        IpAddr::V4(v4) => v4.to_bits() as usize,
        IpAddr::V6(v6) => (v6.to_bits() ^ (v6.to_bits() >> 64)) as usize,
    } % KEPT;
    LAST.with_borrow_mut(|last| {
        let (known, value) = &mut last[place];
        if *known != address {
            let text = HeaderValue::try_from(address.to_string());
            (*known, *value) = (address, text.unwrap_or_else(|_| HeaderValue::from_static("unknown")));
        }
        with(value)
    })
}

/// The `Via` of each version a message can have arrived by.
#[derive(Clone, Debug)]
pub(crate) struct Via {
    pub(crate) pseudonym: Box<str>,
    http10: HeaderValue,
    http11: HeaderValue,
    http2: HeaderValue,
}

impl Via {
    pub(crate) fn portcullis() -> Self {
        Self {
            pseudonym: "portcullis".into(),
            http10: HeaderValue::from_static("1.0 portcullis"),
            http11: HeaderValue::from_static("1.1 portcullis"),
            http2: HeaderValue::from_static("2.0 portcullis"),
        }
    }

    /// `None` if it is not a token.
    pub(crate) fn new(pseudonym: &str) -> Option<Self> {
        let is_token = !pseudonym.is_empty()
            && pseudonym.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~:".contains(&b));
        if !is_token {
            return None;
        }
        let value = |version| HeaderValue::try_from(format!("{version} {pseudonym}")).ok();
        Some(Self { pseudonym: pseudonym.into(), http10: value("1.0")?, http11: value("1.1")?, http2: value("2.0")? })
    }

    pub(crate) fn value(&self, version: Version) -> &HeaderValue {
        match version {
            Version::HTTP_2 => &self.http2,
            Version::HTTP_09 | Version::HTTP_10 => &self.http10,
            _ => &self.http11,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::headers::look;

    fn written(fields: Forwarded, proxies: &TrustedProxies, lines: &[(&'static str, &'static str)]) -> Vec<String> {
        let mut headers: HeaderMap = lines
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect();
        let mut extensions = Extensions::new();
        PeerAddress("10.0.0.9:5000".parse().unwrap()).attach(&mut extensions);
        let found = look(&headers);
        let host = HeaderValue::from_static("shop.test");
        let mut added = write(fields, proxies, found, &extensions, Some(&host), &mut headers);
        let mut out = Vec::new();
        added.write(&Via::portcullis(), &mut out);
        for line in String::from_utf8(out).unwrap().lines() {
            assert!(!headers.contains_key(line.split_once(": ").unwrap().0), "{line}, {headers:?}");
        }
        added.append_to(&Via::portcullis(), &mut headers);
        let mut all: Vec<_> =
            headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
        all.sort();
        all
    }

    const LIES: [(&str, &str); 6] = [
        ("x-forwarded-for", "1.1.1.1"),
        ("x-forwarded-host", "bank.test"),
        ("x-forwarded-proto", "https"),
        ("x-forwarded-prefix", "/admin"),
        ("x-real-ip", "1.1.1.1"),
        ("forwarded", "for=1.1.1.1"),
    ];

    #[test]
    fn a_stranger_is_not_believed() {
        let ours = ["x-forwarded-for: 10.0.0.9", "x-forwarded-host: shop.test", "x-forwarded-proto: http"];
        assert_eq!(written(Forwarded::XForwarded, &TrustedProxies::none(), &[]), ours);
        assert_eq!(written(Forwarded::XForwarded, &TrustedProxies::none(), &LIES), ours);
        assert_eq!(
            written(Forwarded::Standard, &TrustedProxies::none(), &LIES),
            ["forwarded: for=10.0.0.9;proto=http;host=\"shop.test\""]
        );
        assert_eq!(written(Forwarded::Nothing, &TrustedProxies::none(), &LIES), [""; 0]);
    }

    #[test]
    fn a_trusted_proxy_is_believed_and_added_to() {
        let proxies = TrustedProxies::networks(["10.0.0.0/8"]).unwrap();
        assert_eq!(
            written(Forwarded::XForwarded, &proxies, &LIES),
            [
                "x-forwarded-for: 1.1.1.1, 10.0.0.9",
                "x-forwarded-host: bank.test",
                "x-forwarded-prefix: /admin",
                "x-forwarded-proto: https",
                "x-real-ip: 1.1.1.1",
            ]
        );
        let standard = written(Forwarded::Standard, &proxies, &[("forwarded", "for=1.1.1.1")]);
        assert_eq!(standard, ["forwarded: for=1.1.1.1", "forwarded: for=10.0.0.9;proto=http;host=\"shop.test\""]);
    }

    #[test]
    fn a_chain_that_cannot_be_read_is_not_passed_on() {
        let mut headers = HeaderMap::new();
        headers.append(FOR, HeaderValue::from_static("1.1.1.1"));
        headers.append(FOR, HeaderValue::from_bytes(b"\xff").unwrap());
        let mut extensions = Extensions::new();
        PeerAddress("10.0.0.9:5000".parse().unwrap()).attach(&mut extensions);
        let (proxies, found) = (TrustedProxies::networks(["10.0.0.0/8"]).unwrap(), look(&headers));
        let mut added = write(Forwarded::XForwarded, &proxies, found, &extensions, None, &mut headers);
        added.append_to(&Via::portcullis(), &mut headers);
        assert_eq!(headers.get_all(FOR).iter().collect::<Vec<_>>(), ["10.0.0.9"]);
    }

    #[test]
    fn addresses_are_kept_apart() {
        for text in ["10.0.0.1", "10.0.0.65", "10.0.0.1", "::1", "2001:db8::1"] {
            with_address(text.parse().unwrap(), |address| assert_eq!(address, text));
        }
    }

    #[test]
    fn a_pseudonym_is_a_token() {
        assert!(Via::new("gate-1").is_some());
        assert!(Via::new("").is_none());
        assert!(Via::new("a b").is_none());
        assert!(Via::new("a,b").is_none());
    }
}
