//! Finds out where the service a request asks for lives, and leaves the endpoints with the request.
//!
//! * **Reads** [`Destination`] (or a fixed name, or what a closure makes of the request).
//! * **Writes** [`Endpoints`].
//! * **Refuses** with 503 what nobody serves: `no-instances`, `not-known-yet`, `too-many-services`, `no-runtime`.
//! * **Alone** a request without a name passes on untouched; the endpoints are for whoever reads them.
//! * **Cost** a hash and two pointer loads; no lock and no allocation but the value written. A request that comes before
//!   the first answer waits, and is boxed for that.
//!
//! ```
//! use portcullis_core::{Carried, Destination, Endpoints, Rejection};
//! use portcullis_discovery::{DiscoveryLayer, FixedRegistry};
//! use tower::{ServiceExt, service_fn};
//! use tower_layer::Layer;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let registry = FixedRegistry::new().service("orders", ["10.0.0.1:8080".parse()?]);
//! let service = DiscoveryLayer::new(registry).layer(service_fn(async |request: http::Request<()>| {
//!     let found = Endpoints::of(request.extensions()).map_or(0, |endpoints| endpoints.len());
//!     Ok::<_, std::convert::Infallible>(http::Response::new(http_body_util::Full::<bytes::Bytes>::from(found.to_string())))
//! }));
//!
//! let mut request = http::Request::new(());
//! Destination::new("orders").attach(request.extensions_mut());
//! assert_eq!(service.clone().oneshot(request).await?.status(), 200);
//!
//! let mut request = http::Request::new(());
//! Destination::new("no-such-thing").attach(request.extensions_mut());
//! let refused = service.oneshot(request).await?;
//! assert_eq!(refused.status(), 503);
//! assert_eq!(refused.extensions().get::<Rejection>().unwrap().reason(), "no-instances");
//! # Ok(())
//! # }
//! ```
//!
//! # The idea
//!
//! A [`Registry`] answers with everything it knows of a service, again and again; a difference is never sent, so none can
//! be missed. Each answer is reconciled with the snapshot before: an instance that stays keeps its handle, and with it its
//! counters, gate and connections. Requests read the newest snapshot through one pointer. There is one watch and one task
//! for each service, whoever asks; it ends when nobody asks any more, and with the last clone of the layer.
//!
//! A registry that cannot answer never empties a pool. Only what a source answers soundly counts; see
//! [`Watch`] for the contract, and each source for what it takes as sound.
//!
//! # Defaults
//!
//! | what | default | set by |
//! |---|---|---|
//! | wait for the first answer | [`DEFAULT_FIRST_WAIT`], 1 s from the start of the watch | [`first_wait`](DiscoveryLayer::first_wait) |
//! | a watch nobody uses ends after | [`DEFAULT_IDLE`], 10 to 20 min | [`idle`](DiscoveryLayer::idle) |
//! | age of what was known while the source fails | for ever | [`max_age`](DiscoveryLayer::max_age) |
//! | services at once | [`DEFAULT_SERVICES`], 2048 | [`services`](DiscoveryLayer::services) |
//!
//! # What it costs
//!
//! Two quiet cores, `cargo bench -p portcullis-discovery --all-features --bench discovery`; the same at 10, 1,000 and
//! 100,000 endpoints, and without an allocation but that of the value:
//!
//! | what | time |
//! |---|---|
//! | looking up a fixed name, beside writing the value | 37 ns |
//! | looking up the request's `Destination`, beside reading it and writing the value | 37 ns |
//! | the same, beside writing the value only | 47 ns |
//! | the same while another thread applies changes to the 10,000 endpoints | 5 ns more |
//! | applying one change to 10,000 endpoints: one comes or goes, one weighs more, nothing differs | 1.0, 0.44, 0.43 ms |
//!
//! How soon a change in Consul counts, and what its failures do to requests, is told in the module `consul`.
//!
//! # When something fails
//!
//! | what | the request |
//! |---|---|
//! | the source fails, something is known | goes to what was last known, for ever or up to `max_age` |
//! | the source fails, nothing is known | waits until the watch is a second old, then 503 `not-known-yet` with `retry-after` |
//! | the source says soundly that there is no instance | 503 `no-instances`, at once |
//! | more services than allowed, and all have endpoints | 503 `too-many-services` |
//! | no tokio runtime to watch in | 503 `no-runtime` |
//!
//! # Sources
//!
//! | source | what it is |
//! |---|---|
//! | [`EmbeddedRegistry`] | in memory, with registration |
//! | [`FixedRegistry`] | a list that never changes |
//! | `ConsulRegistry` (feature `consul`) | a Consul agent: watches, registration, checks; see its module |
//! | `FileRegistry` (feature `file`) | TOML or JSON, read again when it changes |
//! | `DnsRegistry` (feature `dns`) | A, AAAA and SRV records |
//! | [`ChangesRegistry`] | any stream of `tower::discover::Change` |
//! | [`Merged`], [`Fallback`] | several sources as one |
//! | [`Remembered`] | any of them, with a file for a warm start |
//!
//! # What it does not do
//!
//! It does not choose an endpoint, nor look whether one is well: the registry's checks, the balancer and the breaker do.
//!
//! # Decisions
//!
//! * **An empty service is refused here**, not passed on with an empty list: it is the earliest place that knows, and below
//!   nothing could be done.
//! * **Who asks after the first wait is over is refused at once**, so that requests do not pile up in front of a registry
//!   that is down.
//! * **Types of others in the interface**: [`Watch`] is a [`futures::Stream`], for whoever writes a registry, and
//!   [`ChangesRegistry`] takes streams of [`tower::discover::Change`].

mod backoff;
mod changes;
mod combine;
#[cfg(feature = "consul")]
pub mod consul;
mod definition;
mod described;
#[cfg(feature = "dns")]
mod dns;
mod embedded;
mod error;
#[cfg(feature = "file")]
mod file;
mod fixed;
mod known;
mod registry;
mod remembered;
mod watches;

use std::borrow::Cow;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use pin_project_lite::pin_project;
use portcullis_core::{Body, Carried, Clock, Destination, Dialect, Endpoints, Instance, Layer as Where, Rejection};
use tower_layer::Layer;
use tower_service::Service;

pub use self::changes::ChangesRegistry;
pub use self::combine::{Fallback, Merged};
#[cfg(feature = "consul")]
pub use self::consul::{ConsulConfig, ConsulRegistry};
pub use self::definition::{
    CheckKind, DEFAULT_CHECK_INTERVAL, Health, HealthCheck, Membership, Registration, ServiceDefinition,
};
#[cfg(feature = "dns")]
pub use self::dns::DnsRegistry;
pub use self::embedded::EmbeddedRegistry;
pub use self::error::Error;
#[cfg(feature = "file")]
pub use self::file::FileRegistry;
pub use self::fixed::FixedRegistry;
pub use self::registry::{Pending, Registry, Watch};
pub use self::remembered::Remembered;
pub use self::watches::Status;
use self::watches::{Limits, Lookup, Watches};

/// How long a request waits for the first answer unless told otherwise.
pub const DEFAULT_FIRST_WAIT: Duration = Duration::from_secs(1);
/// How long a watch must be unused to end, unless told otherwise.
pub const DEFAULT_IDLE: Duration = Duration::from_secs(600);
/// How many services are watched at once unless told otherwise.
pub const DEFAULT_SERVICES: usize = 2048;

/// Applies [`Discovery`]. All services made from one layer share its watches.
#[derive(Clone, Debug)]
pub struct DiscoveryLayer<N = FromDestination> {
    name: N,
    limits: Limits,
    watches: Arc<Watches>,
}

/// Leaves the endpoints of the service a request asks for.
#[derive(Clone, Debug)]
pub struct Discovery<S, N = FromDestination> {
    inner: S,
    name: N,
    limits: Limits,
    watches: Arc<Watches>,
}

/// Says which service a request asks for. Closures do as well.
pub trait Name<B> {
    /// The service's name; with `None` the request passes on as it is.
    fn name<'a>(&'a self, request: &'a Request<B>) -> Option<Cow<'a, str>>;
}

/// The service is the request's [`Destination`].
#[derive(Clone, Copy, Debug, Default)]
pub struct FromDestination;

/// The service is always the same.
#[derive(Clone, Debug)]
pub struct Always(Arc<str>);

pin_project! {
    /// The answer of [`Discovery`].
    pub struct ResponseFuture<S, B>
    where
        S: Service<Request<B>>,
    {
        #[pin]
        state: State<S, S::Future, B>,
    }
}

pin_project! {
    #[project = Project]
    enum State<S, F, B> {
        Called { #[pin] future: F },
        Waiting { waiting: Option<Box<Waiting<S, B>>> },
        Refused { rejection: Option<Rejection>, dialect: Dialect },
    }
}

/// A request that came before the first answer, and the ready service it goes to.
struct Waiting<S, B> {
    answer: Pin<Box<dyn Future<Output = Option<Endpoints>> + Send>>,
    service: S,
    request: Request<B>,
}

// === impl DiscoveryLayer ===

impl DiscoveryLayer {
    /// Finds services in `registry`, by the request's [`Destination`]. An `Arc<dyn Registry>` does as well.
    #[must_use]
    pub fn new(registry: impl Registry) -> Self {
        let limits = Limits {
            first_wait: DEFAULT_FIRST_WAIT,
            idle: DEFAULT_IDLE,
            max_age: None,
            services: DEFAULT_SERVICES,
            clock: Clock::system(),
        };
        Self { name: FromDestination, limits, watches: Watches::new(Arc::new(registry)) }
    }
}

impl<N> DiscoveryLayer<N> {
    /// Every request asks for this service.
    #[must_use]
    pub fn service(self, service: impl Into<Arc<str>>) -> DiscoveryLayer<Always> {
        self.with_name(Always(service.into()))
    }

    /// Has a closure say which service a request asks for. Names that callers choose are bounded by
    /// [`services`](Self::services).
    #[must_use]
    pub fn service_by<F, B>(self, name: F) -> DiscoveryLayer<F>
    where
        F: for<'a> Fn(&'a Request<B>) -> Option<Cow<'a, str>>,
    {
        self.with_name(name)
    }

    /// Has `name` say which service a request asks for.
    #[must_use]
    pub fn with_name<M>(self, name: M) -> DiscoveryLayer<M> {
        DiscoveryLayer { name, limits: self.limits, watches: self.watches }
    }

    /// How long a request waits for the first answer, counted from the start of the watch. Default 1 s.
    #[must_use]
    pub fn first_wait(mut self, wait: Duration) -> Self {
        self.limits.first_wait = wait;
        self
    }

    /// A watch that nobody used for this long, or up to twice as long, ends. Default 10 min.
    #[must_use]
    pub fn idle(mut self, idle: Duration) -> Self {
        self.limits.idle = idle;
        self
    }

    /// How long endpoints are used while their source fails. By default for ever.
    #[must_use]
    pub fn max_age(mut self, age: Duration) -> Self {
        self.limits.max_age = Some(age);
        self
    }

    /// How many services are watched at once; when they are too many, one without endpoints gives way. Default 2048.
    #[must_use]
    pub fn services(mut self, services: usize) -> Self {
        self.limits.services = services;
        self
    }

    /// The clock by which endpoints join and ages are told.
    #[must_use]
    pub fn clock(mut self, clock: Clock) -> Self {
        self.limits.clock = clock;
        self
    }

    /// The registry behind it.
    #[must_use]
    pub fn registry(&self) -> &Arc<dyn Registry> {
        self.watches.registry()
    }

    /// Follows a service from now on, before the first request asks for it, and returns what is known so far. Must be
    /// called in a tokio runtime, else it does nothing.
    pub fn follow(&self, service: &str) -> Option<Endpoints> {
        match self.watches.lookup(service, &self.limits) {
            Lookup::Known(endpoints) => Some(endpoints),
            Lookup::Waiting(_) | Lookup::Full | Lookup::NoRuntime => None,
        }
    }

    /// Goes on with what another layer knows, which this one is put in the place of: until its own registry answers, that is
    /// last known good, and whoever stays after that keeps handle, counters, gate and connections. The other follows nothing
    /// more. Must be called in a tokio runtime, else it does nothing.
    ///
    /// ```
    /// use portcullis_discovery::{DiscoveryLayer, FixedRegistry};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let old = DiscoveryLayer::new(FixedRegistry::new().service("orders", ["10.0.0.1:80".parse()?, "10.0.0.2:80".parse()?]));
    /// old.follow("orders");
    /// old.ready().await;
    ///
    /// let new = DiscoveryLayer::new(FixedRegistry::new().service("orders", ["10.0.0.1:80".parse()?]));
    /// new.take_over(&old);
    /// assert_eq!(new.follow("orders").unwrap().len(), 2, "it has not been answered yet");
    /// # Ok(())
    /// # }
    /// ```
    pub fn take_over<M>(&self, old: &DiscoveryLayer<M>) {
        self.take_over_telling(old, |_| {});
    }

    /// Goes on with what another layer knows, as [`take_over`](Self::take_over) does, and has `tell` change what is known of
    /// each instance before: that they speak another protocol, for instance. One whose id or address it changes is another.
    pub fn take_over_telling<M>(&self, old: &DiscoveryLayer<M>, tell: impl Fn(&mut Instance)) {
        if !Arc::ptr_eq(&self.watches, &old.watches) {
            self.watches.take_over(&old.watches, &self.limits, &tell);
        }
    }

    /// How each watched service is doing, ordered by name.
    #[must_use]
    pub fn status(&self) -> Vec<Status> {
        self.watches.status(self.limits.clock.now())
    }

    /// Whether there is an answer for every service watched so far.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.watches.all().iter().all(|watched| watched.current().is_some())
    }

    /// Waits until there is an answer for every service watched so far.
    pub async fn ready(&self) {
        for watched in self.watches.all() {
            watched.known().await;
        }
    }
}

impl<S, N: Clone> Layer<S> for DiscoveryLayer<N> {
    type Service = Discovery<S, N>;

    fn layer(&self, inner: S) -> Discovery<S, N> {
        Discovery { inner, name: self.name.clone(), limits: self.limits.clone(), watches: self.watches.clone() }
    }
}

// === impl Discovery ===

impl<S, N, B, R> Service<Request<B>> for Discovery<S, N>
where
    S: Service<Request<B>, Response = Response<R>> + Clone,
    N: Name<B>,
    R: http_body::Body<Data = Bytes>,
{
    type Response = Response<Body<R>>;
    type Error = S::Error;
    type Future = ResponseFuture<S, B>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> ResponseFuture<S, B> {
        let refuse = |request: &Request<B>, reason| {
            let rejection = Rejection::new(Where::Discovery, StatusCode::SERVICE_UNAVAILABLE, reason);
            ResponseFuture::refused(rejection, Dialect::of(request.headers()))
        };
        let lookup = match self.name.name(&request) {
            Some(service) => self.watches.lookup(&service, &self.limits),
            None => return ResponseFuture::called(self.inner.call(request)),
        };
        match lookup {
            Lookup::Known(endpoints) if endpoints.is_empty() => refuse(&request, NO_INSTANCES),
            Lookup::Known(endpoints) => {
                endpoints.attach(request.extensions_mut());
                ResponseFuture::called(self.inner.call(request))
            }
            Lookup::Waiting(watched) => {
                let not_ready = self.inner.clone();
                let service = std::mem::replace(&mut self.inner, not_ready);
                let (wait, clock) = (self.limits.first_wait, self.limits.clock.clone());
                let answer = Box::pin(async move { watched.first(wait, &clock).await });
                let waiting = Some(Box::new(Waiting { answer, service, request }));
                ResponseFuture { state: State::Waiting { waiting } }
            }
            Lookup::Full => refuse(&request, "too-many-services"),
            Lookup::NoRuntime => refuse(&request, "no-runtime"),
        }
    }
}

const NO_INSTANCES: &str = "no-instances";

// === impl Name ===

impl<B> Name<B> for FromDestination {
    fn name<'a>(&'a self, request: &'a Request<B>) -> Option<Cow<'a, str>> {
        Destination::of(request.extensions()).map(|destination| Cow::Borrowed(destination.as_str()))
    }
}

impl<B> Name<B> for Always {
    fn name<'a>(&'a self, _: &'a Request<B>) -> Option<Cow<'a, str>> {
        Some(Cow::Borrowed(&self.0))
    }
}

impl<F, B> Name<B> for F
where
    F: for<'a> Fn(&'a Request<B>) -> Option<Cow<'a, str>>,
{
    fn name<'a>(&'a self, request: &'a Request<B>) -> Option<Cow<'a, str>> {
        self(request)
    }
}

// === impl ResponseFuture ===

impl<S, B> ResponseFuture<S, B>
where
    S: Service<Request<B>>,
{
    fn called(future: S::Future) -> Self {
        Self { state: State::Called { future } }
    }

    fn refused(rejection: Rejection, dialect: Dialect) -> Self {
        tracing::debug!(reason = rejection.reason(), "refused");
        Self { state: State::Refused { rejection: Some(rejection), dialect } }
    }
}

impl<S, B, R> Future for ResponseFuture<S, B>
where
    S: Service<Request<B>, Response = Response<R>>,
    R: http_body::Body<Data = Bytes>,
{
    type Output = Result<Response<Body<R>>, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.project().state;
        loop {
            match state.as_mut().project() {
                Project::Called { future } => return future.poll(cx).map_ok(|response| response.map(Body::new)),
                Project::Waiting { waiting } => {
                    let Some(outstanding) = waiting else { return Poll::Pending };
                    let answer = ready!(outstanding.answer.as_mut().poll(cx));
                    let Some(done) = waiting.take() else { return Poll::Pending };
                    let Waiting { mut service, mut request, .. } = *done;
                    let reason = match answer {
                        Some(endpoints) if !endpoints.is_empty() => {
                            endpoints.attach(request.extensions_mut());
                            state.set(State::Called { future: service.call(request) });
                            continue;
                        }
                        Some(_) => NO_INSTANCES,
                        None => "not-known-yet",
                    };
                    let mut rejection = Rejection::new(Where::Discovery, StatusCode::SERVICE_UNAVAILABLE, reason);
                    if answer.is_none() {
                        rejection = rejection.with_retry_after(Duration::from_secs(1));
                    }
                    tracing::debug!(reason, "refused");
                    let dialect = Dialect::of(request.headers());
                    state.set(State::Refused { rejection: Some(rejection), dialect });
                }
                Project::Refused { rejection, dialect } => {
                    let Some(rejection) = rejection.take() else { return Poll::Pending };
                    return Poll::Ready(Ok(rejection.into_response(*dialect)));
                }
            }
        }
    }
}

impl<S, B> fmt::Debug for ResponseFuture<S, B>
where
    S: Service<Request<B>>,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}
