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
/// if it is a trusted proxy, and of such a one only the family that
/// [`TrustedProxies`](portcullis_core::TrustedProxies) reads: the other may be its caller's own, so it is removed. Where
/// that other family is to be written, it begins with the client's address as the believed one tells it.
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
    let believed = found.forwarded && trusted && fields != Forwarded::Nothing;
    let (standard, usual) = (believed && proxies.reads_forwarded(), believed && !proxies.reads_forwarded());
    let writes_standard = matches!(fields, Forwarded::Standard | Forwarded::Both);
    let writes_usual = matches!(fields, Forwarded::XForwarded | Forwarded::Both);
    // Whom the believed family names, for the other one.
    let client = peer.filter(|_| standard && writes_usual || usual && writes_standard);
    let client = client.map(|peer| proxies.client(peer, headers)).filter(|client| Some(*client) != peer);
    if found.forwarded && !usual {
        remove_usual(headers);
    }
    if found.forwarded && !(standard && writes_standard) {
        headers.remove(FORWARDED);
    }
    let encrypted = PeerTls::of(extensions).is_some();
    let proto = if encrypted { "https" } else { "http" };
    if writes_usual {
        if let Some(peer) = peer {
            let chain = if usual { joined(headers) } else { client.map(|client| client.to_string()) };
            match chain.and_then(|chain| HeaderValue::try_from(format!("{chain}, {peer}")).ok()) {
                Some(chain) => _ = headers.insert(FOR, chain),
                None => {
                    headers.remove(FOR);
                    added.client = Some(peer);
                }
            }
        }
        if !usual || !headers.contains_key(PROTO) {
            added.proto = Some(proto);
        }
        if !usual || !headers.contains_key(HOST) {
            added.host = host.cloned();
        }
    } else if usual {
        for name in [FOR, PROTO, HOST, PORT, PREFIX] {
            headers.remove(name);
        }
    }
    if writes_standard {
        let mut chain = String::new();
        if let Some(client) = client.filter(|_| usual) {
            chain = format!("for={}, ", node(client));
        }
        let peer = peer.map_or_else(|| "unknown".to_owned(), node);
        chain.push_str(&format!("for={peer};proto={proto}"));
        if let Some(host) = host.and_then(|host| host.to_str().ok()).filter(|host| is_quotable(host)) {
            chain.push_str(";host=\"");
            chain.push_str(host);
            chain.push('"');
        }
        if let Ok(value) = HeaderValue::try_from(chain) {
            headers.append(FORWARDED, value);
        }
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

/// An address as `Forwarded` has it.
fn node(address: IpAddr) -> String {
    match address {
        IpAddr::V6(address) => format!("\"[{address}]\""),
        IpAddr::V4(address) => address.to_string(),
    }
}

/// Removes all but `Forwarded`.
fn remove_usual(headers: &mut HeaderMap) {
    let theirs: Vec<HeaderName> = headers
        .keys()
        .filter(|name| name.as_str().starts_with("x-forwarded-") || *name == "x-real-ip")
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
        let proxies = proxies.reading_forwarded();
        let standard = written(Forwarded::Standard, &proxies, &[("forwarded", "for=1.1.1.1")]);
        assert_eq!(standard, ["forwarded: for=1.1.1.1", "forwarded: for=10.0.0.9;proto=http;host=\"shop.test\""]);
    }

    /// The other passed on whatever the proxy's caller had written in it.
    #[test]
    fn a_trusted_proxy_is_believed_in_the_family_it_writes_alone() {
        let proxies = TrustedProxies::networks(["10.0.0.0/8"]).unwrap();
        let told = [
            ("x-forwarded-for", "2001:db8::7, 10.1.1.1"),
            ("x-forwarded-proto", "https"),
            ("forwarded", "for=1.6.6.6;proto=https, for=10.1.1.1"),
        ];
        let ours = "for=10.0.0.9;proto=http;host=\"shop.test\"";
        let (usual, standard) = (proxies.clone(), proxies.reading_forwarded());
        for (fields, proxies, expected) in [
            (
                Forwarded::XForwarded,
                &usual,
                &[
                    "x-forwarded-for: 2001:db8::7, 10.1.1.1, 10.0.0.9",
                    "x-forwarded-host: shop.test",
                    "x-forwarded-proto: https",
                ][..],
            ),
            (Forwarded::Standard, &usual, &[&format!("forwarded: for=\"[2001:db8::7]\", {ours}")]),
            (
                Forwarded::Both,
                &usual,
                &[
                    &format!("forwarded: for=\"[2001:db8::7]\", {ours}"),
                    "x-forwarded-for: 2001:db8::7, 10.1.1.1, 10.0.0.9",
                    "x-forwarded-host: shop.test",
                    "x-forwarded-proto: https",
                ],
            ),
            (
                Forwarded::XForwarded,
                &standard,
                &["x-forwarded-for: 1.6.6.6, 10.0.0.9", "x-forwarded-host: shop.test", "x-forwarded-proto: http"],
            ),
            (
                Forwarded::Standard,
                &standard,
                &["forwarded: for=1.6.6.6;proto=https, for=10.1.1.1", &format!("forwarded: {ours}")],
            ),
            (
                Forwarded::Both,
                &standard,
                &[
                    "forwarded: for=1.6.6.6;proto=https, for=10.1.1.1",
                    &format!("forwarded: {ours}"),
                    "x-forwarded-for: 1.6.6.6, 10.0.0.9",
                    "x-forwarded-host: shop.test",
                    "x-forwarded-proto: http",
                ],
            ),
            (Forwarded::Nothing, &usual, &[]),
            (Forwarded::Nothing, &standard, &[]),
        ] {
            assert_eq!(written(fields, proxies, &told), expected, "{fields:?} {proxies:?}");
        }
        // A caller's lie in the other family alone.
        let lie = [("forwarded", "for=127.0.0.1")];
        assert_eq!(written(Forwarded::Standard, &usual, &lie), [format!("forwarded: {ours}")]);
        let lie = [("x-forwarded-for", "127.0.0.1"), ("x-real-ip", "127.0.0.1")];
        let written = written(Forwarded::XForwarded, &standard, &lie);
        assert_eq!(written, ["x-forwarded-for: 10.0.0.9", "x-forwarded-host: shop.test", "x-forwarded-proto: http"]);
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
