//! Sends the request on to its endpoint and streams the answer back.
//!
//! **Reads** [`Permit`](portcullis_core::Permit), [`Route`](portcullis_core::Route),
//! [`Deadline`](portcullis_core::Deadline), [`PeerAddress`](portcullis_core::PeerAddress) · **Writes** nothing ·
//! **Refuses** 400 408 413 500 502 503 504 508 ·
//! **Alone** [`Forward::to`] a fixed origin · **Cost** one future, and a box for a request's body if it has one

mod alarm;
mod connect;
mod download;
mod exchange;
mod failure;
mod forwarded;
mod headers;
mod policy;
mod pool;
mod prepare;
mod stream;
#[cfg(feature = "tls")]
mod tls;
mod tunnel;
mod upload;

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use portcullis_core::{Body, Clock, Dialect, Endpoint, Instance, SlotKey, TrustedProxies};
use tower_service::Service;

pub use download::ResponseBody;
pub use forwarded::Forwarded;
pub use policy::{Edit, Host, Paths, Policy};
#[cfg(feature = "tls")]
pub use tls::ClientTls;

use forwarded::Via;
use pool::{Limits, Pool};

/// What bodies fail with.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The default [`connect_timeout`](Policy::connect_timeout).
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// The default [`response_timeout`](Policy::response_timeout).
pub const RESPONSE_TIMEOUT: Duration = Duration::from_secs(15);
/// The default [`idle_timeout`](Policy::idle_timeout).
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(300);
/// The default [`max_connections`](Forward::max_connections).
pub const MAX_CONNECTIONS: usize = 1024;
/// The default [`max_waiting`](Forward::max_waiting).
pub const MAX_WAITING: usize = 1024;
/// The default [`max_idle`](Forward::max_idle).
pub const MAX_IDLE: usize = 256;
/// The default [`pool_idle_timeout`](Forward::pool_idle_timeout).
pub const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// The default [`max_age`](Forward::max_age).
pub const MAX_AGE: Duration = Duration::from_secs(600);
/// The default [`max_streams`](Forward::max_streams).
pub const MAX_STREAMS: usize = 100;
/// The default [`max_head`](Forward::max_head).
pub const MAX_HEAD: usize = 64 * 1024;

/// Sends each request on to its endpoint and streams the answer back. Clones share the connections.
#[derive(Clone)]
pub struct Forward {
    shared: Arc<Shared>,
}

#[derive(Clone)]
struct Shared {
    upstream: Upstream,
    policy: Policy,
    proxies: TrustedProxies,
    forwarded: Forwarded,
    via: Via,
    limits: Arc<Limits>,
    slot: SlotKey<Pool>,
    clock: Clock,
}

/// Where requests without a permit go.
#[derive(Clone)]
enum Upstream {
    Nowhere,
    Origin(Endpoint),
    /// Wherever the request says; the endpoints that were met, newest last.
    Authority(Arc<Mutex<Vec<Endpoint>>>),
}

/// The answer, or the reason why there is none.
pub struct ResponseFuture(State);

enum State {
    Ready(Option<Box<Response<Body<ResponseBody>>>>),
    Sending(Pin<Box<dyn Future<Output = Response<Body<ResponseBody>>> + Send>>),
}

/// A setting that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error(&'static str);

// === impl Forward ===

impl Forward {
    /// Sends each request to the endpoint of its [`Permit`](portcullis_core::Permit); one without is answered with 500.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "it has no meaning without the layers above")]
    pub fn new() -> Self {
        Self::with(Upstream::Nowhere)
    }

    /// Sends requests without a [`Permit`](portcullis_core::Permit) to this origin: `http://host:port`,
    /// `https://host:port`, the port being optional, `unix:/path`, or an [`Address`](portcullis_core::Address) alone.
    ///
    /// # Errors
    ///
    /// When it is none of these.
    pub fn to(origin: &str) -> Result<Self, Error> {
        let instance =
            prepare::origin(origin).ok_or(Error("not an origin: want `http://host:port` or `unix:/path`"))?;
        Ok(Self::to_instance(instance))
    }

    /// Sends requests without a [`Permit`](portcullis_core::Permit) to this instance.
    #[must_use]
    pub fn to_instance(instance: Instance) -> Self {
        Self::with(Upstream::Origin(Endpoint::new("origin", instance)))
    }

    /// Sends requests without a [`Permit`](portcullis_core::Permit) wherever their own target says. Whoever can reach
    /// this can reach whatever this process can reach: it is an open proxy.
    #[must_use]
    pub fn insecure_follow_authority() -> Self {
        Self::with(Upstream::Authority(Arc::default()))
    }

    fn with(upstream: Upstream) -> Self {
        let limits = Limits {
            connections: MAX_CONNECTIONS,
            waiting: MAX_WAITING,
            idle: MAX_IDLE,
            idle_timeout: POOL_IDLE_TIMEOUT,
            max_age: MAX_AGE,
            streams: MAX_STREAMS,
            keep_alive: None,
            max_head: MAX_HEAD,
            #[cfg(feature = "tls")]
            tls: None,
        };
        let policy = Policy {
            connect_timeout: Some(CONNECT_TIMEOUT),
            response_timeout: Some(RESPONSE_TIMEOUT),
            idle_timeout: Some(IDLE_TIMEOUT),
            ..Policy::default()
        };
        Self {
            shared: Arc::new(Shared {
                upstream,
                policy,
                proxies: TrustedProxies::none(),
                forwarded: Forwarded::default(),
                via: Via::portcullis(),
                limits: Arc::new(limits),
                slot: SlotKey::new(),
                clock: Clock::system(),
            }),
        }
    }

    fn edit(mut self, edit: impl FnOnce(&mut Shared)) -> Self {
        edit(Arc::make_mut(&mut self.shared));
        self
    }

    /// As [`edit`](Self::edit), for what connections depend on: they are not shared with clones that have it otherwise.
    fn limit(self, edit: impl FnOnce(&mut Limits)) -> Self {
        self.edit(|shared| {
            edit(Arc::make_mut(&mut shared.limits));
            shared.slot = SlotKey::new();
            if let Upstream::Authority(known) = &mut shared.upstream {
                *known = Arc::default();
            }
        })
    }

    /// What holds for requests whose route says nothing else. What `policy` leaves open keeps its default.
    #[must_use]
    pub fn policy(self, policy: Policy) -> Self {
        self.edit(|shared| {
            shared.policy = Policy {
                connect_timeout: policy.connect_timeout.or(shared.policy.connect_timeout),
                response_timeout: policy.response_timeout.or(shared.policy.response_timeout),
                idle_timeout: policy.idle_timeout.or(shared.policy.idle_timeout),
                ..policy
            };
        })
    }

    /// See [`Policy::connect_timeout`]. Default 1 s.
    #[must_use]
    pub fn connect_timeout(self, timeout: Duration) -> Self {
        self.edit(|shared| shared.policy.connect_timeout = Some(timeout))
    }

    /// See [`Policy::response_timeout`]. Default 15 s.
    #[must_use]
    pub fn response_timeout(self, timeout: Duration) -> Self {
        self.edit(|shared| shared.policy.response_timeout = Some(timeout))
    }

    /// See [`Policy::attempt_timeout`]. Default off.
    #[must_use]
    pub fn attempt_timeout(self, timeout: Duration) -> Self {
        self.edit(|shared| shared.policy.attempt_timeout = Some(timeout))
    }

    /// See [`Policy::total_timeout`]. Default off.
    #[must_use]
    pub fn total_timeout(self, timeout: Duration) -> Self {
        self.edit(|shared| shared.policy.total_timeout = Some(timeout))
    }

    /// See [`Policy::idle_timeout`]. Default 5 min.
    #[must_use]
    pub fn idle_timeout(self, timeout: Duration) -> Self {
        self.edit(|shared| shared.policy.idle_timeout = Some(timeout))
    }

    /// Whose word about a request's origin is passed on. Default nobody's.
    #[must_use]
    pub fn trusted_proxies(self, proxies: TrustedProxies) -> Self {
        self.edit(|shared| shared.proxies = proxies)
    }

    /// Which fields tell the upstream where a request came from. Default `X-Forwarded-*`.
    #[must_use]
    pub fn forwarded(self, fields: Forwarded) -> Self {
        self.edit(|shared| shared.forwarded = fields)
    }

    /// The name under which this proxy writes itself into `Via`, and by which it knows a request that went round in a
    /// circle. Instances that may lawfully pass requests to each other need different ones. Default `portcullis`.
    ///
    /// # Errors
    ///
    /// When it is not a token, as RFC 9110 has it.
    pub fn via(self, pseudonym: &str) -> Result<Self, Error> {
        let via = Via::new(pseudonym).ok_or(Error("a name in `Via` must be a token"))?;
        Ok(self.edit(|shared| shared.via = via))
    }

    /// How many connections to one endpoint may be open, busy or idle, in all runtimes together. Default 1024.
    #[must_use]
    pub fn max_connections(self, connections: usize) -> Self {
        self.limit(|limits| limits.connections = connections.clamp(1, tokio::sync::Semaphore::MAX_PERMITS))
    }

    /// How many requests may wait for a connection to one endpoint, in each runtime; others are refused with 503.
    /// Default 1024.
    #[must_use]
    pub fn max_waiting(self, requests: usize) -> Self {
        self.limit(|limits| limits.waiting = requests)
    }

    /// How many idle HTTP/1.1 connections to one endpoint are kept, in each runtime. Default 256.
    #[must_use]
    pub fn max_idle(self, connections: usize) -> Self {
        self.limit(|limits| limits.idle = connections)
    }

    /// After how long an idle connection is closed. Default 60 s.
    #[must_use]
    pub fn pool_idle_timeout(self, timeout: Duration) -> Self {
        self.limit(|limits| limits.idle_timeout = timeout)
    }

    /// After how long, a tenth more or less, a connection takes no more requests. Default 10 min.
    #[must_use]
    pub fn max_age(self, age: Duration) -> Self {
        self.limit(|limits| limits.max_age = age)
    }

    /// How many requests share an HTTP/2 connection, unless the endpoint allows fewer; for more, another is opened.
    /// Default 100.
    #[must_use]
    pub fn max_streams(self, streams: usize) -> Self {
        self.limit(|limits| limits.streams = streams.max(1))
    }

    /// Pings HTTP/2 connections with open streams at this interval, and closes them if no answer comes in time. Servers
    /// may take offence at intervals below some minutes. Default off.
    #[must_use]
    pub fn keep_alive(self, interval: Duration, timeout: Duration) -> Self {
        self.limit(|limits| limits.keep_alive = Some((interval, timeout)))
    }

    /// The largest head of a response, in bytes. Default 64 KiB; not less than 8 KiB.
    #[must_use]
    pub fn max_head(self, bytes: usize) -> Self {
        self.limit(|limits| limits.max_head = bytes.max(8192))
    }

    /// How connections to endpoints with [`Scheme::Https`](portcullis_core::Scheme) are made. Without this, requests to
    /// them fail with 502.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn tls(self, tls: ClientTls) -> Self {
        self.limit(|limits| limits.tls = Some(tls))
    }

    /// The clock a [`Deadline`](portcullis_core::Deadline) is read by. Default the system's.
    #[must_use]
    pub fn with_clock(self, clock: Clock) -> Self {
        self.edit(|shared| shared.clock = clock)
    }

    /// The connections this runtime keeps to `endpoint`: idle HTTP/1.1 ones, and HTTP/2 ones.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    #[must_use]
    pub fn connections(&self, endpoint: &Endpoint) -> (usize, usize) {
        endpoint.existing_slot(&self.shared.slot).map_or((0, 0), |pool| pool.shard().count())
    }
}

impl<B> Service<Request<B>> for Forward
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<Body<ResponseBody>>;
    type Error = Infallible;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> ResponseFuture {
        let dialect = Dialect::of(request.headers());
        match self.shared.prepare(request, dialect) {
            Ok(prepared) => ResponseFuture(State::Sending(Box::pin(prepared.run()))),
            Err(refusal) => ResponseFuture(State::Ready(Some(match refusal {
                prepare::Refusal::Rejection(rejection) => {
                    tracing::debug!(%rejection, "refused");
                    Box::new(rejection.into_response(dialect))
                }
                prepare::Refusal::Answer(response) => response,
            }))),
        }
    }
}

impl fmt::Debug for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let upstream: &dyn fmt::Debug = match &self.shared.upstream {
            Upstream::Nowhere => &"the permit's endpoint",
            Upstream::Origin(endpoint) => endpoint,
            Upstream::Authority(_) => &"the request's authority",
        };
        f.debug_struct("Forward")
            .field("upstream", upstream)
            .field("policy", &self.shared.policy)
            .finish_non_exhaustive()
    }
}

// === impl ResponseFuture ===

impl Future for ResponseFuture {
    type Output = Result<Response<Body<ResponseBody>>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.get_mut().0 {
            State::Sending(future) => future.as_mut().poll(cx).map(Ok),
            State::Ready(response) => match response.take() {
                Some(response) => Poll::Ready(Ok(*response)),
                // Polled after it was ready.
                None => Poll::Pending,
            },
        }
    }
}

impl fmt::Debug for ResponseFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}

// === impl Error ===

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Error {}
