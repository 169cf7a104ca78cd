//! What tells callers apart.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use http::{Extensions, HeaderMap, HeaderName, Method, Uri};
use portcullis_core::{CarriedValues, Destination, Identity, PeerAddress, Route, TrustedProxies, ipv6_prefix};

/// The bits of an IPv6 address that one caller has, unless told otherwise: what one customer is given.
pub const DEFAULT_IPV6_PREFIX: u8 = 64;

/// Says which callers share one budget.
///
/// A closure is a key as well. Keys combine: a tuple of keys tells apart what any of them does, and
/// [`or`](Self::or) uses another where the first has nothing to go by. Requests for which the whole key has nothing share
/// one budget.
///
/// ```
/// use portcullis_rate_limit::{ByMethod, Claim, ClientAddress, Header, Key, KeyBytes, RequestHead};
///
/// let _tenant_or_address = Claim::new("tenant").or(ClientAddress::new());
/// let _by_header_and_method = (Header::new(http::header::HOST), ByMethod);
/// let _own = |request: &RequestHead<'_>, key: &mut KeyBytes| {
///     key.push(request.uri().path().as_bytes());
///     true
/// };
/// ```
pub trait Key: Send + Sync + 'static {
    /// Writes what tells this request's caller from others; `false` when there is nothing to go by.
    fn write(&self, request: &RequestHead<'_>, key: &mut KeyBytes) -> bool;

    /// Uses `other` where this has nothing to go by.
    fn or<K: Key>(self, other: K) -> Or<Self, K>
    where
        Self: Sized,
    {
        Or { first: self, second: other }
    }
}

/// What a limit may look at.
#[derive(Clone, Copy, Debug)]
pub struct RequestHead<'a> {
    method: &'a Method,
    uri: &'a Uri,
    headers: &'a HeaderMap,
    extensions: &'a Extensions,
    carried: CarriedValues<'a>,
    proxies: &'a TrustedProxies,
}

/// A key as it is written. Short ones need no allocation, and parts cannot run into each other.
pub struct KeyBytes {
    len: usize,
    short: [u8; SHORT],
    long: Vec<u8>,
}

/// The default: the [`Subject`], else the [`ClientAddress`].
///
/// Without a `PeerAddress` and an identity all callers share one budget, and a warning is logged once.
#[derive(Clone, Debug, Default)]
pub struct Caller {
    address: ClientAddress,
    warned: Arc<AtomicBool>,
}

/// The identity's subject within its issuer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Subject;

/// A claim of the identity: by its name, or as a JSON pointer such as `/org/id`.
#[derive(Clone, Debug)]
pub struct Claim(Arc<str>);

/// The client's address, as the [trusted proxies](crate::RateLimitLayer::trusted_proxies) have it. IPv6 addresses count by
/// their [prefix](Self::ipv6_prefix), IPv4-mapped ones as IPv4.
#[derive(Clone, Copy, Debug)]
pub struct ClientAddress {
    ipv6_prefix: u8,
}

/// A header's first value. A caller can write what it likes there: use it for what something trusted writes, or together
/// with another key.
#[derive(Clone, Debug)]
pub struct Header(HeaderName);

/// The name of the matched route.
#[derive(Clone, Copy, Debug, Default)]
pub struct RouteName;

/// The service the request is for.
#[derive(Clone, Copy, Debug, Default)]
pub struct ServiceName;

/// The request's method.
#[derive(Clone, Copy, Debug, Default)]
pub struct ByMethod;

/// Everyone shares one budget.
#[derive(Clone, Copy, Debug, Default)]
pub struct Everyone;

/// One key, or another where that has nothing to go by; made by [`Key::or`].
#[derive(Clone, Copy, Debug)]
pub struct Or<A, B> {
    first: A,
    second: B,
}

/// Enough for a subject, the longest of the usual issuers, and a short route.
const SHORT: usize = 160;

// === impl Key ===

impl<F> Key for F
where
    F: Fn(&RequestHead<'_>, &mut KeyBytes) -> bool + Send + Sync + 'static,
{
    fn write(&self, request: &RequestHead<'_>, key: &mut KeyBytes) -> bool {
        self(request, key)
    }
}

macro_rules! tuple {
    ($($part:ident)+) => {
        impl<$($part: Key),+> Key for ($($part,)+) {
            #[expect(non_snake_case, reason = "the names of the types serve as names of the parts")]
            fn write(&self, request: &RequestHead<'_>, key: &mut KeyBytes) -> bool {
                let ($($part,)+) = self;
                let mut any = false;
                $(
                    let found = $part.write(request, key);
                    key.tag(u8::from(found));
                    any |= found;
                )+
                any
            }
        }
    };
}

tuple!(A B);
tuple!(A B C);
tuple!(A B C D);

impl<A: Key, B: Key> Key for Or<A, B> {
    fn write(&self, request: &RequestHead<'_>, key: &mut KeyBytes) -> bool {
        let start = key.mark();
        if self.first.write(request, key) {
            key.tag(1);
            return true;
        }
        key.rewind(start);
        key.tag(2);
        self.second.write(request, key)
    }
}

impl Key for Caller {
    fn write(&self, request: &RequestHead<'_>, key: &mut KeyBytes) -> bool {
        if Subject.write(request, key) || self.address.write(request, key) {
            return true;
        }
        if !self.warned.load(Ordering::Relaxed) && !self.warned.swap(true, Ordering::Relaxed) {
            tracing::warn!("requests carry neither an identity nor a peer address: all of them share one budget");
        }
        false
    }
}

impl Key for Subject {
    #[inline]
    fn write(&self, request: &RequestHead<'_>, key: &mut KeyBytes) -> bool {
        let Some(identity) = request.identity() else { return false };
        key.tag(b's');
        key.push(identity.subject().as_bytes());
        match identity.issuer() {
            Some(issuer) => key.push(issuer.as_bytes()),
            None => key.tag(b'-'),
        }
        true
    }
}

impl Key for Claim {
    fn write(&self, request: &RequestHead<'_>, key: &mut KeyBytes) -> bool {
        let Some(claim) = request.identity().and_then(|identity| identity.claim(&self.0)) else { return false };
        match claim.as_str() {
            Some(text) => {
                key.tag(b'c');
                key.push(text.as_bytes());
            }
            None => {
                key.tag(b'j');
                key.push(claim.to_string().as_bytes());
            }
        }
        true
    }
}

impl Key for ClientAddress {
    #[inline]
    fn write(&self, request: &RequestHead<'_>, key: &mut KeyBytes) -> bool {
        let Some(PeerAddress(peer)) = request.carried.get() else { return false };
        let v4 = |address: Ipv4Addr, key: &mut KeyBytes| {
            let [a, b, c, d] = address.octets();
            key.fixed([b'4', a, b, c, d]);
        };
        // Most are what they seem. Written out for its speed: an address of either kind goes through memory, and whoever
        // reads at once what was written there in parts has to wait.
        if let IpAddr::V4(peer) = peer.ip()
            && *request.proxies == TrustedProxies::none()
        {
            v4(peer, key);
            return true;
        }
        match ipv6_prefix(request.proxies.client(peer.ip(), request.headers), self.ipv6_prefix) {
            IpAddr::V4(address) => v4(address, key),
            IpAddr::V6(v6) => {
                key.tag(b'6');
                key.fixed(v6.octets());
            }
        }
        true
    }
}

impl Key for Header {
    fn write(&self, request: &RequestHead<'_>, key: &mut KeyBytes) -> bool {
        request.headers.get(&self.0).is_some_and(|value| key.push_found(b'h', value.as_bytes()))
    }
}

impl Key for RouteName {
    fn write(&self, request: &RequestHead<'_>, key: &mut KeyBytes) -> bool {
        request.carried.get::<Route>().is_some_and(|route| key.push_found(b'r', route.name().as_bytes()))
    }
}

impl Key for ServiceName {
    fn write(&self, request: &RequestHead<'_>, key: &mut KeyBytes) -> bool {
        request.carried.get::<Destination>().is_some_and(|service| key.push_found(b'd', service.as_str().as_bytes()))
    }
}

impl Key for ByMethod {
    fn write(&self, request: &RequestHead<'_>, key: &mut KeyBytes) -> bool {
        key.push_found(b'm', request.method.as_str().as_bytes())
    }
}

impl Key for Everyone {
    fn write(&self, _: &RequestHead<'_>, key: &mut KeyBytes) -> bool {
        key.tag(b'e');
        true
    }
}

// === impl RequestHead ===

impl<'a> RequestHead<'a> {
    pub(crate) fn new<B>(request: &'a http::Request<B>, proxies: &'a TrustedProxies) -> Self {
        Self {
            method: request.method(),
            uri: request.uri(),
            headers: request.headers(),
            extensions: request.extensions(),
            carried: CarriedValues::of(request.extensions()),
            proxies,
        }
    }

    /// Its method.
    #[must_use]
    pub const fn method(&self) -> &'a Method {
        self.method
    }

    /// Its target.
    #[must_use]
    pub const fn uri(&self) -> &'a Uri {
        self.uri
    }

    /// Its headers.
    #[must_use]
    pub const fn headers(&self) -> &'a HeaderMap {
        self.headers
    }

    /// What other layers left.
    #[must_use]
    pub const fn extensions(&self) -> &'a Extensions {
        self.extensions
    }

    /// Who is calling, if they proved it.
    #[must_use]
    pub fn identity(&self) -> Option<&'a Identity> {
        self.carried.get()
    }

    /// The client's whole address, if the server left the peer's.
    #[must_use]
    #[inline]
    pub fn client_address(&self) -> Option<IpAddr> {
        let PeerAddress(peer) = self.carried.get()?;
        Some(self.proxies.client(peer.ip(), self.headers))
    }

    pub(crate) const fn carried(&self) -> CarriedValues<'a> {
        self.carried
    }
}

// === impl KeyBytes ===

impl KeyBytes {
    pub(crate) const fn new() -> Self {
        Self { len: 0, short: [0; SHORT], long: Vec::new() }
    }

    /// Adds one part. Its length goes with it.
    pub fn push(&mut self, part: &[u8]) {
        self.fixed((part.len() as u32).to_le_bytes());
        self.raw(part);
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        if self.long.is_empty() { &self.short[..self.len] } else { &self.long }
    }

    fn push_found(&mut self, tag: u8, part: &[u8]) -> bool {
        self.tag(tag);
        self.push(part);
        true
    }

    fn tag(&mut self, tag: u8) {
        self.fixed([tag]);
    }

    pub(crate) fn fixed<const N: usize>(&mut self, part: [u8; N]) {
        match self.short.get_mut(self.len..).and_then(<[u8]>::first_chunk_mut) {
            Some(room) if self.long.is_empty() => {
                *room = part;
                self.len += N;
            }
            _ => self.raw(&part),
        }
    }

    fn raw(&mut self, part: &[u8]) {
        let end = self.len + part.len();
        if let Some(room) = self.short.get_mut(self.len..end).filter(|_| self.long.is_empty()) {
            room.copy_from_slice(part);
            self.len = end;
        } else {
            if self.long.is_empty() {
                self.long.extend_from_slice(&self.short[..self.len]);
            }
            self.long.extend_from_slice(part);
        }
    }

    fn mark(&self) -> usize {
        self.bytes().len()
    }

    fn rewind(&mut self, to: usize) {
        if self.long.is_empty() {
            self.len = to;
        } else {
            self.long.truncate(to);
        }
    }
}

/// Keys may hold secrets.
impl fmt::Debug for KeyBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyBytes").field("len", &self.bytes().len()).finish_non_exhaustive()
    }
}

// === impl Caller ===

impl Caller {
    /// The subject, else the client's address with an IPv6 prefix of [`DEFAULT_IPV6_PREFIX`].
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How many bits of an IPv6 address one caller has; the rest is ignored.
    #[must_use]
    pub const fn ipv6_prefix(mut self, bits: u8) -> Self {
        self.address.ipv6_prefix = bits;
        self
    }
}

// === impl ClientAddress ===

impl ClientAddress {
    /// With an IPv6 prefix of [`DEFAULT_IPV6_PREFIX`].
    #[must_use]
    pub const fn new() -> Self {
        Self { ipv6_prefix: DEFAULT_IPV6_PREFIX }
    }

    /// How many bits of an IPv6 address one caller has; the rest is ignored.
    #[must_use]
    pub const fn ipv6_prefix(mut self, bits: u8) -> Self {
        self.ipv6_prefix = bits;
        self
    }
}

impl Default for ClientAddress {
    fn default() -> Self {
        Self::new()
    }
}

// === impl Claim ===

impl Claim {
    /// The claim of that name.
    #[must_use]
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self(name.into())
    }
}

// === impl Header ===

impl Header {
    /// The header of that name.
    #[must_use]
    pub const fn new(name: HeaderName) -> Self {
        Self(name)
    }
}

#[cfg(test)]
mod tests;
