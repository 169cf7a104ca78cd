//! Whom to believe about where a request came from: one policy for limits, keys, logs and the fields written upstream.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use http::{Extensions, HeaderMap, HeaderName, header};
use ipnet::{IpNet, Ipv4Net};

use crate::{Carried, PeerAddress};

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// The proxies whose word about the client's address is taken. The default is none: the client is the connection's other
/// end, and whatever a request says about itself is ignored.
///
/// The header is walked from the right, since every proxy appends on that side and a client can write whatever it likes
/// on the other. The walk ends at the first address that is no trusted proxy; at what is not an address it ends too, and
/// the last trusted proxy counts as the client.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustedProxies {
    trust: Trust,
    field: Field,
}

/// Text that is not a network, such as `10.0.0.0/8`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidNetwork(String);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Trust {
    #[default]
    Nobody,
    Networks(Vec<IpNet>),
    Hops(usize),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Field {
    #[default]
    XForwardedFor,
    Forwarded,
}

// === impl TrustedProxies ===

impl TrustedProxies {
    /// Believes nobody.
    #[must_use]
    pub const fn none() -> Self {
        Self { trust: Trust::Nobody, field: Field::XForwardedFor }
    }

    /// Believes proxies in these networks; a single address is a network of one.
    ///
    /// # Errors
    ///
    /// [`InvalidNetwork`] names the first that is none.
    pub fn networks<'a>(networks: impl IntoIterator<Item = &'a str>) -> Result<Self, InvalidNetwork> {
        let parse = |text: &str| -> Result<IpNet, InvalidNetwork> {
            let network = if text.contains('/') { text.parse().ok() } else { text.parse().ok().map(IpAddr::into) };
            network.map(canonical_network).ok_or_else(|| InvalidNetwork(text.to_owned()))
        };
        let networks = networks.into_iter().map(parse).collect::<Result<_, _>>()?;
        Ok(Self { trust: Trust::Networks(networks), field: Field::default() })
    }

    /// Believes that exactly so many proxies stand in front, whatever their addresses: the client is the entry that many
    /// from the right. Right only if no request can come in past them.
    #[must_use]
    pub const fn hops(count: usize) -> Self {
        Self { trust: Trust::Hops(count), field: Field::XForwardedFor }
    }

    /// Reads `Forwarded` ([RFC 7239](https://www.rfc-editor.org/rfc/rfc7239)) instead of `X-Forwarded-For`. It is one or
    /// the other: whoever could choose between two would choose the one the proxies do not write.
    #[must_use]
    pub const fn reading_forwarded(mut self) -> Self {
        self.field = Field::Forwarded;
        self
    }

    /// Whether [`reading_forwarded`](Self::reading_forwarded) was asked for.
    #[must_use]
    pub const fn reads_forwarded(&self) -> bool {
        matches!(self.field, Field::Forwarded)
    }

    /// Whether what `peer` says about a request's origin is believed.
    #[must_use]
    pub fn trusts(&self, peer: IpAddr) -> bool {
        match &self.trust {
            Trust::Nobody => false,
            Trust::Networks(networks) => {
                let peer = canonical(peer);
                networks.iter().any(|network| network.contains(&peer))
            }
            Trust::Hops(count) => *count > 0,
        }
    }

    /// The address of the client, [canonical](canonical_address), given the connection's other end.
    #[must_use]
    pub fn client(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        let mut client = canonical(peer);
        if !self.trusts(client) {
            return client;
        }
        let mut hops = match self.trust {
            Trust::Hops(count) => count,
            Trust::Nobody | Trust::Networks(_) => usize::MAX,
        };
        let name = match self.field {
            Field::XForwardedFor => X_FORWARDED_FOR,
            Field::Forwarded => header::FORWARDED,
        };
        for line in headers.get_all(name).iter().rev() {
            let mut rest = Some(line.as_bytes());
            while let Some(line) = rest {
                // As bytes, and text of one address only: what a client wrote on the left may be anything.
                let address;
                (rest, address) = match self.field {
                    Field::XForwardedFor => {
                        let (rest, entry) = split_at(line, line.iter().rposition(|&byte| byte == b','));
                        (rest, node(entry.trim_ascii()))
                    }
                    Field::Forwarded => {
                        let (rest, entry) = rsplit_unquoted(line, b',');
                        (rest, forwarded_for(entry).and_then(node))
                    }
                };
                let Some(address) = address.map(canonical) else { return client };
                client = address;
                hops -= 1;
                if hops == 0 || !self.trusts(client) {
                    return client;
                }
            }
        }
        client
    }

    /// As [`client`](Self::client), with the [`PeerAddress`] the server left; `None` without one.
    #[must_use]
    pub fn client_of(&self, extensions: &Extensions, headers: &HeaderMap) -> Option<IpAddr> {
        let PeerAddress(peer) = PeerAddress::of(extensions)?;
        Some(self.client(peer.ip(), headers))
    }
}

/// One form for each address: IPv4 for IPv4-mapped (`::ffff:0:0/96`) and NAT64 (`64:ff9b::/96`) addresses.
#[must_use]
pub fn canonical_address(address: IpAddr) -> IpAddr {
    canonical(address)
}

/// The address with all but its first `bits` cleared: one key for everybody within an IPv6 network. IPv4 addresses are
/// kept whole.
#[must_use]
pub fn ipv6_prefix(address: IpAddr, bits: u8) -> IpAddr {
    match canonical(address) {
        IpAddr::V6(v6) => {
            let host = 128 - u32::from(bits.min(128));
            IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits().checked_shr(host).unwrap_or(0).checked_shl(host).unwrap_or(0)))
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

fn canonical(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else { return address };
    match v6.segments() {
        [0, 0, 0, 0, 0, 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => {
            IpAddr::V4(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)))
        }
        _ => address,
    }
}

/// Networks are compared with canonical addresses: those within the IPv4-mapped or NAT64 range become IPv4.
fn canonical_network(network: IpNet) -> IpNet {
    let IpNet::V6(v6) = network else { return network };
    match (v6.prefix_len().checked_sub(96), canonical(IpAddr::V6(v6.network()))) {
        (Some(bits), IpAddr::V4(address)) => Ipv4Net::new(address, bits).map_or(network, IpNet::V4),
        _ => network,
    }
}

/// `192.0.2.1`, `192.0.2.1:80`, `2001:db8::1`, `[2001:db8::1]` or `[2001:db8::1]:80`; a port may also be hidden: `:_name`.
fn node(text: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(text).ok()?;
    let text = text.split_once(":_").map_or(text, |(address, _)| address);
    if let Ok(address) = text.parse() {
        return Some(address);
    }
    if let Some(inner) = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')) {
        return inner.parse().ok().map(IpAddr::V6);
    }
    text.parse::<SocketAddr>().ok().map(|address| address.ip())
}

/// The `for` parameter of one `Forwarded` element, without its quotes.
fn forwarded_for(element: &[u8]) -> Option<&[u8]> {
    let (mut rest, mut found) = (Some(element), None);
    while let Some(pairs) = rest {
        let pair;
        (rest, pair) = rsplit_unquoted(pairs, b';');
        let pair = pair.trim_ascii();
        if pair.is_empty() {
            continue;
        }
        let (name, value) = pair.split_at(pair.iter().position(|&byte| byte == b'=')?);
        if name.eq_ignore_ascii_case(b"for") && found.replace(&value[1..]).is_some() {
            return None;
        }
    }
    let value = found?;
    match value.strip_prefix(b"\"") {
        Some(open) => open.strip_suffix(b"\""),
        None => Some(value),
    }
}

/// Splits at the last separator outside quotes: what is before it, if there is one, and what is behind.
///
/// It counts quotes from the right, where the trusted proxy wrote: what a client left open on the left hides nothing, and
/// what a proxy quoted, such as the client's `Host`, ends no element.
fn rsplit_unquoted(text: &[u8], separator: u8) -> (Option<&[u8]>, &[u8]) {
    let mut quoted = false;
    let at = text.iter().enumerate().rposition(|(at, &byte)| {
        if byte == b'"' {
            let escapes = text[..at].iter().rev().take_while(|&&byte| byte == b'\\').count();
            quoted ^= escapes % 2 == 0;
        }
        byte == separator && !quoted
    });
    split_at(text, at)
}

/// What is before that byte, if there is one, and what is behind.
fn split_at(text: &[u8], at: Option<usize>) -> (Option<&[u8]>, &[u8]) {
    at.map_or((None, text), |at| (Some(&text[..at]), &text[at + 1..]))
}

impl fmt::Display for InvalidNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not a network: {:?}", self.0)
    }
}

impl std::error::Error for InvalidNetwork {}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn lines(name: &HeaderName, lines: &[&str]) -> HeaderMap {
        lines.iter().map(|line| (name.clone(), HeaderValue::from_str(line).unwrap())).collect()
    }

    #[track_caller]
    fn client(proxies: &TrustedProxies, lines_: &[&str], expected: &str) {
        assert_eq!(proxies.client(ip("10.0.0.1"), &lines(&X_FORWARDED_FOR, lines_)), ip(expected));
    }

    #[test]
    fn nobody_is_believed_by_default() {
        client(&TrustedProxies::none(), &["203.0.113.9"], "10.0.0.1");
        let elsewhere = TrustedProxies::networks(["192.168.0.0/16"]).unwrap();
        client(&elsewhere, &["203.0.113.9"], "10.0.0.1");
    }

    #[test]
    fn the_walk_goes_from_the_right_and_ends_at_the_first_stranger() {
        let proxies = TrustedProxies::networks(["10.0.0.0/8", "2001:db8::/32"]).unwrap();
        client(&proxies, &["198.51.100.1, 203.0.113.9, 10.1.1.1"], "203.0.113.9");
        client(&proxies, &["198.51.100.1", "203.0.113.9", "[2001:db8::1]:443, 10.1.1.1:80"], "203.0.113.9");
        client(&proxies, &["10.2.2.2, 10.3.3.3"], "10.2.2.2");
        client(&proxies, &[], "10.0.0.1");
    }

    #[test]
    fn what_is_no_address_ends_the_walk() {
        let proxies = TrustedProxies::networks(["10.0.0.0/8"]).unwrap();
        client(&proxies, &["203.0.113.9, garbage, 10.1.1.1"], "10.1.1.1");
        client(&proxies, &["203.0.113.9,"], "10.0.0.1");
        client(&proxies, &["203.0.113.9, 10.1.1.1,"], "10.0.0.1");
        client(&proxies, &["é"], "10.0.0.1");
        client(&proxies, &["é, 203.0.113.9"], "203.0.113.9");
    }

    #[test]
    fn hops_are_counted_from_the_right() {
        let lines = ["198.51.100.1, 203.0.113.9, 192.0.2.7"];
        client(&TrustedProxies::hops(0), &lines, "10.0.0.1");
        client(&TrustedProxies::hops(1), &lines, "192.0.2.7");
        client(&TrustedProxies::hops(2), &lines, "203.0.113.9");
        client(&TrustedProxies::hops(9), &lines, "198.51.100.1");
    }

    #[test]
    fn forwarded_is_read_instead_when_asked() {
        let proxies = TrustedProxies::networks(["10.0.0.1"]).unwrap().reading_forwarded();
        for (line, expected) in [
            ("for=192.0.2.60;proto=http;by=203.0.113.43", "192.0.2.60"),
            ("For=\"[2001:db8:cafe::17]:4711\"", "2001:db8:cafe::17"),
            ("for=198.51.100.1, for=192.0.2.60:8080", "192.0.2.60"),
            ("for=unknown", "10.0.0.1"),
            ("for=_hidden", "10.0.0.1"),
            ("for=1.1.1.1;for=2.2.2.2", "10.0.0.1"),
            ("proto=https", "10.0.0.1"),
            // What the proxy quoted of the client's words neither ends an element nor begins one.
            (r#"for=192.0.2.60;host="x, for=6.6.6.6;a=""#, "192.0.2.60"),
            (r#"for=192.0.2.60;host="x\", for=6.6.6.6;a=""#, "192.0.2.60"),
            (r#"host=";for=6.6.6.6;a=";for=192.0.2.60"#, "192.0.2.60"),
            // What the client left open hides nothing.
            (r#"for=6.6.6.6;host=", for=192.0.2.60"#, "192.0.2.60"),
            (r#"for="192.0.2.60"#, "10.0.0.1"),
            (",", "10.0.0.1"),
            // Bytes that are no text, an end that ends nothing, and a port that is hidden.
            ("é, for=192.0.2.60", "192.0.2.60"),
            ("host=\"é\";for=192.0.2.60", "192.0.2.60"),
            ("for=192.0.2.60;", "192.0.2.60"),
            (r#"for="192.0.2.60:_port""#, "192.0.2.60"),
            (r#"for="[2001:db8::1]:_port""#, "2001:db8::1"),
        ] {
            let headers = lines(&header::FORWARDED, &[line]);
            assert_eq!(proxies.client(ip("10.0.0.1"), &headers), ip(expected), "{line}");
        }
    }

    #[test]
    fn one_client_has_one_form() {
        assert_eq!(canonical_address(ip("::ffff:192.0.2.1")), ip("192.0.2.1"));
        assert_eq!(canonical_address(ip("64:ff9b::192.0.2.1")), ip("192.0.2.1"));
        assert_eq!(ipv6_prefix(ip("2001:db8:1:2:3:4:5:6"), 64), ip("2001:db8:1:2::"));
        assert_eq!(ipv6_prefix(ip("2001:db8::1"), 0), ip("::"));
        assert_eq!(ipv6_prefix(ip("2001:db8::1"), 128), ip("2001:db8::1"));
        assert_eq!(ipv6_prefix(ip("::ffff:192.0.2.1"), 64), ip("192.0.2.1"));
        let mapped = TrustedProxies::networks(["10.0.0.0/8"]).unwrap();
        assert!(mapped.trusts(ip("::ffff:10.1.2.3")));
        let mapped = TrustedProxies::networks(["::ffff:10.0.0.0/104", "64:ff9b::192.0.2.0/120", "::/0"]).unwrap();
        assert!(mapped.trusts(ip("10.1.2.3")) && mapped.trusts(ip("192.0.2.7")) && mapped.trusts(ip("2001:db8::1")));
        assert!(!mapped.trusts(ip("11.1.2.3")));
    }

    /// A line with whatever a client may send on the left.
    fn left_of(left: &[u8], right: &str) -> HeaderValue {
        HeaderValue::from_bytes(&[left, right.as_bytes()].concat()).unwrap()
    }

    proptest::proptest! {
        /// Whatever a client writes on the left changes nothing once a stranger stands to its right.
        #[test]
        fn what_stands_left_of_the_client_changes_nothing(left in left()) {
            let proxies = TrustedProxies::networks(["10.0.0.0/8"]).unwrap();
            let line = left_of(&left, ",203.0.113.9, 10.1.1.1");
            let headers = HeaderMap::from_iter([(X_FORWARDED_FOR, line)]);
            proptest::prop_assert_eq!(proxies.client(ip("10.0.0.1"), &headers), ip("203.0.113.9"));
        }

        #[test]
        fn nor_does_it_in_forwarded(left in left()) {
            let proxies = TrustedProxies::networks(["10.0.0.0/8"]).unwrap().reading_forwarded();
            let line = left_of(&left, ",for=203.0.113.9;host=\"a,b\", for=\"10.1.1.1:80\"");
            let headers = HeaderMap::from_iter([(header::FORWARDED, line)]);
            proptest::prop_assert_eq!(proxies.client(ip("10.0.0.1"), &headers), ip("203.0.113.9"));
        }
    }

    /// All bytes a header may hold.
    fn left() -> impl proptest::strategy::Strategy<Value = Vec<u8>> {
        let byte = proptest::strategy::Strategy::prop_filter(proptest::num::u8::ANY, "no header has it", |&byte| {
            byte == b'\t' || byte >= b' ' && byte != 127
        });
        proptest::collection::vec(byte, 0..60)
    }
}
