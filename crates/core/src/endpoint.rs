//! One instance of a service, as described and as lived with.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use arc_swap::ArcSwap;
use prefetch_index::prefetch_index;

use crate::gate::{Gate, Moves, Pass, Refused};
use crate::per_endpoint::Number;
use crate::slots::{SlotKey, Slots};
use crate::{Moment, Permit};

/// What a registry knows of one instance of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Instance {
    /// Unique among the instances of the service.
    pub id: Arc<str>,
    /// Where it listens.
    pub address: Address,
    /// Whether connections to it are encrypted.
    pub scheme: Scheme,
    /// What it speaks.
    pub protocol: Protocol,
    /// Its share of the traffic relative to the others; zero asks for none. Default 1.
    pub weight: u32,
    /// Lower goes first; higher ones serve when the lower are not well. Default 0.
    pub priority: u32,
    /// The zone it runs in.
    pub zone: Option<Arc<str>>,
    /// Words it is found by.
    pub tags: Vec<String>,
    /// Anything else.
    pub metadata: BTreeMap<String, String>,
}

/// Where an instance listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Address {
    /// An IP address and a port.
    Socket(SocketAddr),
    /// A host name, looked up when a connection is made, and a port.
    Name(Arc<str>, u16),
    /// A Unix domain socket.
    Unix(PathBuf),
}

/// Text that is not an [`Address`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidAddress(());

/// Whether connections to an instance are encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Scheme {
    /// In the clear.
    #[default]
    Http,
    /// Over TLS.
    Https,
}

/// The protocol an instance speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Protocol {
    /// Chosen for each request: what TLS agreed on; in the clear HTTP/2 for gRPC and HTTP/1.1 otherwise.
    #[default]
    Auto,
    /// HTTP/1.1.
    Http1,
    /// HTTP/2, with prior knowledge where there is no TLS.
    Http2,
}

/// A handle on one instance: what it is, how it does, and its gate. One pointer; clones are the same endpoint.
///
/// The handle survives updates: as long as the registry shows the same id at the same address, counters, gate,
/// connections and [slots](Self::slot) stay, whatever happens to weight, tags or neighbours. An endpoint that was removed
/// and comes back starts anew.
#[derive(Clone)]
pub struct Endpoint(Arc<Inner>);

/// An [`Endpoint`] that is not kept alive.
#[derive(Clone)]
pub struct WeakEndpoint(Weak<Inner>);

/// What an endpoint is busy with, mostly one request; dropping it ends the counting, and gives the
/// [right](Permit::begin) back that it came with.
#[must_use = "the request is counted until this is dropped"]
pub struct InFlight(Permit);

/// What every pick reads and every request writes: with the counts of handles it fills one line of a cache, and what the
/// endpoint is stands elsewhere. Of very many endpoints this is what a pick waits for.
struct Inner {
    load: Load,
    gate: Gate,
    about: Box<About>,
}

struct About {
    service: Arc<str>,
    id: Arc<str>,
    address: Address,
    instance: ArcSwap<Instance>,
    weight: AtomicU32,
    removed: std::sync::atomic::AtomicBool,
    joined: Moment,
    number: Number,
    slots: Slots,
    /// Of what was begun, what was no request.
    other: AtomicU64,
}

/// An endpoint without a handle yet. First all that join are described, then their handles are made, so that these lie side
/// by side.
pub(crate) struct Joining(Inner);

/// What began and what ended, so that a request costs two additions and not three.
#[derive(Default)]
struct Load {
    begun: AtomicU64,
    ended: AtomicU64,
}

// === impl Instance ===

impl Instance {
    /// An instance of weight 1 that speaks plain HTTP.
    #[must_use]
    pub fn new(id: impl Into<Arc<str>>, address: impl Into<Address>) -> Self {
        Self {
            id: id.into(),
            address: address.into(),
            scheme: Scheme::default(),
            protocol: Protocol::default(),
            weight: 1,
            priority: 0,
            zone: None,
            tags: Vec::new(),
            metadata: BTreeMap::new(),
        }
    }
}

// === impl Address ===

impl Address {
    /// The port, unless it is a Unix socket.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Socket(address) => Some(address.port()),
            Self::Name(_, port) => Some(*port),
            Self::Unix(_) => None,
        }
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self::Socket(address)
    }
}

/// `127.0.0.1:80`, `[::1]:80`, `orders.internal:80` or `unix:/run/orders.sock`.
impl FromStr for Address {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() || path.contains('\0') {
                Err(InvalidAddress(()))
            } else {
                Ok(Self::Unix(path.into()))
            };
        }
        if let Ok(address) = text.parse() {
            return Ok(Self::Socket(address));
        }
        let (host, port) = text.rsplit_once(':').ok_or(InvalidAddress(()))?;
        let is_name = !host.is_empty()
            && host.len() <= 253
            && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
        match port.parse() {
            Ok(port) if is_name => Ok(Self::Name(host.into(), port)),
            _ => Err(InvalidAddress(())),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(address) => address.fmt(f),
            Self::Name(host, port) => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl fmt::Display for InvalidAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not an address: want `ip:port`, `host:port` or `unix:/path`")
    }
}

impl std::error::Error for InvalidAddress {}

// === impl Endpoint ===

impl Endpoint {
    /// An endpoint that belongs to no snapshot, for tests and fixed upstreams.
    #[must_use]
    pub fn new(service: impl Into<Arc<str>>, instance: Instance) -> Self {
        Joining::new(service.into(), instance, Moment::MIN, Arc::default()).into_endpoint()
    }

    /// The service it is an instance of.
    #[must_use]
    pub fn service(&self) -> &Arc<str> {
        &self.0.about.service
    }

    /// Its id, unique within the service.
    #[must_use]
    pub fn id(&self) -> &Arc<str> {
        &self.0.about.id
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.0.about.address
    }

    /// What the registry last said of it.
    #[must_use]
    pub fn instance(&self) -> Arc<Instance> {
        self.0.about.instance.load_full()
    }

    /// Its current weight.
    #[must_use]
    pub fn weight(&self) -> u32 {
        self.0.about.weight.load(Ordering::Relaxed)
    }

    /// When it was first seen; a slow start counts from here.
    #[must_use]
    pub fn joined(&self) -> Moment {
        self.0.about.joined
    }

    /// Whether the registry no longer shows it. Requests under way may finish; pools close what is idle.
    #[must_use]
    pub fn is_removed(&self) -> bool {
        self.0.about.removed.load(Ordering::Acquire)
    }

    /// What tells it from others of its service.
    pub(crate) fn key(&self) -> (&str, &Address) {
        (&self.0.about.id, &self.0.about.address)
    }

    pub(crate) fn is_at(&self, instance: &Instance) -> bool {
        self.key() == (&*instance.id, &instance.address)
    }

    /// Takes in what the registry says of it now, and says whether that is anything new.
    pub(crate) fn update(&self, instance: Instance) -> bool {
        if **self.0.about.instance.load() == instance {
            return false;
        }
        self.0.about.weight.store(instance.weight, Ordering::Relaxed);
        self.0.about.instance.store(Arc::new(instance));
        true
    }

    pub(crate) fn remove(&self) {
        self.0.about.removed.store(true, Ordering::Release);
    }

    /// Its door.
    #[must_use]
    pub fn gate(&self) -> &Gate {
        &self.0.gate
    }

    /// Asks the gate for the right to call it once. The clock is read only while the gate is rationed.
    ///
    /// # Errors
    ///
    /// [`Refused`] when the gate does not admit.
    pub fn permit(&self, now: impl FnOnce() -> Moment) -> Result<Permit, Refused> {
        let entry = self.0.gate.enter(now)?;
        Ok(Permit::new(self.clone(), entry))
    }

    /// The right to call it once, without asking the gate: for a panic, when refusing everybody would be worse.
    #[must_use]
    pub fn permit_by_force(&self) -> Permit {
        Permit::new(self.clone(), self.0.gate.force())
    }

    /// As [`permit`](Self::permit), for one who guards the endpoint and passes no permit on.
    ///
    /// # Errors
    ///
    /// [`Refused`] when the gate does not admit.
    pub fn pass(&self, now: impl FnOnce() -> Moment) -> Result<Pass, Refused> {
        let entry = self.0.gate.enter(now)?;
        Ok(Pass::of_endpoint(self.clone(), entry))
    }

    /// How many requests it is busy with, counted to the end of their response bodies.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        // In this order, or one that ended meanwhile might be missing among those begun. Those ended are seen with their
        // beginnings: see `InFlight::drop`.
        let ended = self.0.load.ended.load(Ordering::Acquire);
        self.0.load.begun.load(Ordering::Relaxed).wrapping_sub(ended) as u32
    }

    /// How many requests were begun since it was first seen.
    #[must_use]
    pub fn requests(&self) -> u64 {
        let other = self.0.about.other.load(Ordering::Acquire);
        self.0.load.begun.load(Ordering::Relaxed).wrapping_sub(other)
    }

    /// Counts a request until the returned value is dropped.
    pub fn begin(&self) -> InFlight {
        InFlight::begin(Permit::without_right(self.clone()))
    }

    /// Counts it as busy until the returned value is dropped, with what a request has become, such as a tunnel.
    pub fn busy(&self) -> InFlight {
        let busy = self.begin();
        self.0.about.other.fetch_add(1, Ordering::Release);
        busy
    }

    /// What the layer with this key keeps here, made when it is first asked for. It lives as long as the endpoint.
    pub fn slot<T: Send + Sync + 'static>(&self, key: &SlotKey<T>, make: impl FnOnce() -> T) -> &T {
        self.0.about.slots.get_or_init(key, make)
    }

    /// What the layer with this key keeps here, if anything yet.
    #[must_use]
    pub fn existing_slot<T: Send + Sync + 'static>(&self, key: &SlotKey<T>) -> Option<&T> {
        self.0.about.slots.get(key)
    }

    /// Has the processor fetch what a pick reads and a request writes: for whoever will soon want it, of so many that they are
    /// not all at hand.
    #[inline]
    pub fn prefetch(&self) {
        let inner = std::slice::from_ref(&*self.0);
        prefetch_index(inner, 0);
        // An allocator that does not align may have put its end on the next line.
        prefetch_index(inner, 1);
    }

    pub(crate) fn number(&self) -> &Number {
        &self.0.about.number
    }

    /// The same endpoint, for one who does not want to keep it alive.
    #[must_use]
    pub fn downgrade(&self) -> WeakEndpoint {
        WeakEndpoint(Arc::downgrade(&self.0))
    }

    /// A number that tells it from every other living endpoint, for keys of maps.
    #[must_use]
    pub fn handle(&self) -> usize {
        Arc::as_ptr(&self.0).addr()
    }
}

/// The same handle, not merely an equal description.
impl PartialEq for Endpoint {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Endpoint {}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint")
            .field("service", &self.0.about.service)
            .field("id", &self.0.about.id)
            .field("address", &format_args!("{}", self.0.about.address))
            .field("in_flight", &self.in_flight())
            .field("gate", &self.0.gate)
            .finish_non_exhaustive()
    }
}

// === impl Joining ===

impl Joining {
    pub(crate) fn new(service: Arc<str>, instance: Instance, joined: Moment, moves: Arc<Moves>) -> Self {
        let about = About {
            service,
            id: instance.id.clone(),
            address: instance.address.clone(),
            weight: AtomicU32::new(instance.weight),
            instance: ArcSwap::from_pointee(instance),
            removed: false.into(),
            joined,
            number: Number::new(),
            slots: Slots::default(),
            other: AtomicU64::new(0),
        };
        Self(Inner { load: Load::default(), gate: Gate::counted(moves), about: Box::new(about) })
    }

    pub(crate) fn into_endpoint(self) -> Endpoint {
        Endpoint(Arc::new(self.0))
    }
}

// === impl WeakEndpoint ===

impl WeakEndpoint {
    /// The endpoint, if anybody still keeps it.
    #[must_use]
    pub fn upgrade(&self) -> Option<Endpoint> {
        self.0.upgrade().map(Endpoint)
    }

    /// Whether it is this one.
    #[must_use]
    pub fn is(&self, endpoint: &Endpoint) -> bool {
        self.0.as_ptr() == Arc::as_ptr(&endpoint.0)
    }
}

impl fmt::Debug for WeakEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("WeakEndpoint").field(&self.upgrade()).finish()
    }
}

// === impl InFlight ===

impl InFlight {
    /// The endpoint that is busy.
    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        self.0.endpoint()
    }

    #[inline]
    pub(crate) fn begin(permit: Permit) -> Self {
        permit.endpoint().0.load.begun.fetch_add(1, Ordering::Relaxed);
        Self(permit)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.endpoint().0.load.ended.fetch_add(1, Ordering::Release);
    }
}

impl fmt::Debug for InFlight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("InFlight").field(self.endpoint()).finish()
    }
}

#[cfg(all(test, not(portcullis_loom)))]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back_as_they_are_written() {
        for text in ["127.0.0.1:80", "[::1]:8080", "orders.internal:443", "unix:/run/orders.sock"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for text in ["", "orders", "orders:", ":80", "or ders:80", "orders:99999", "::1:80:", "unix:", "a/b:80"] {
            assert!(text.parse::<Address>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn what_a_pick_reads_fits_a_line() {
        assert!(size_of::<Inner>() + 2 * size_of::<usize>() <= 56, "{}", size_of::<Inner>());
    }

    #[test]
    fn a_request_is_counted_until_dropped() {
        let endpoint = Endpoint::new("s", Instance::new("1", SocketAddr::from(([127, 0, 0, 1], 1))));
        let (a, b) = (endpoint.begin(), endpoint.begin());
        assert_eq!(endpoint.in_flight(), 2);
        drop(a);
        let tunnel = endpoint.busy();
        assert_eq!((endpoint.in_flight(), endpoint.requests()), (2, 2));
        drop((b, tunnel));
        assert_eq!((endpoint.in_flight(), endpoint.requests()), (0, 2));
    }
}
