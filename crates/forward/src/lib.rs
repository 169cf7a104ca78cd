//! Sends the request on to its endpoint and streams the answer back.
//!
//! **Reads** [`Permit`](portcullis_core::Permit), [`Route`](portcullis_core::Route),
//! [`Deadline`](portcullis_core::Deadline), [`HeadDeadline`](portcullis_core::HeadDeadline),
//! [`PeerAddress`](portcullis_core::PeerAddress), [`PeerTls`](portcullis_core::PeerTls) · **Writes** nothing ·
//! **Refuses** 400 405 408 413 500 501 502 503 504 508 ·
//! **Alone** [`Forward::to`] a fixed origin · **Cost** one boxed future, and a box for a request's body if it has one
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")] async fn main() {
//! use bytes::Bytes;
//! use http::Request;
//! use http_body_util::{BodyExt, Empty};
//! use portcullis_core::Rejection;
//! use portcullis_forward::Forward;
//! use tower::ServiceExt;
//! # use tokio::io::{AsyncReadExt, AsyncWriteExt};
//! # let origin = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
//! # let address = origin.local_addr().unwrap();
//! # tokio::spawn(async move {
//! #     let (mut io, _) = origin.accept().await.unwrap();
//! #     io.read(&mut [0; 1024]).await.unwrap();
//! #     io.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello").await.unwrap();
//! # });
//! let get = |path| Request::get(path).header("host", "shop.test").body(Empty::<Bytes>::new()).unwrap();
//!
//! let forward = Forward::to(&format!("http://{address}")).unwrap();
//! let admitted = forward.clone().oneshot(get("/orders/7")).await.unwrap();
//! assert_eq!(admitted.into_body().collect().await.unwrap().to_bytes(), "hello");
//!
//! let refused = forward.oneshot(get("/orders/%2e%2e/admin")).await.unwrap();
//! assert_eq!(refused.status(), 400);
//! assert!(!refused.extensions().get::<Rejection>().unwrap().sent());
//! # }
//! ```
//!
//! # What happens to a message
//!
//! * **Connections.** What belongs to one connection stays on it: the fixed set of fields, and whatever any `Connection`
//!   line nominates, except fields that guard or describe the request itself (`Authorization`, `Cookie`,
//!   `X-Forwarded-*`, ...), which cannot be nominated away. Of `TE` only `trailers` goes on. Trailers go both ways; those
//!   that would change framing, routing or credentials are dropped, and of a request's those under
//!   [names that only we may write](portcullis_core::ReservedHeaders).
//! * **Targets.** A path that is not in [normal form](portcullis_core::is_normal_path) gets 400, unless the route
//!   [says otherwise](Paths). Absolute form becomes origin form, and its authority replaces `Host`. Two `Host`s, a `Host`
//!   that is none, user information in it, and one that contradicts `:authority` get 400; `CONNECT`
//!   405, unless it is [asked for](Policy::tunnels).
//! * **Framing.** The body's own length counts; a `Content-Length` that disagrees is replaced. A request coded by more
//!   than chunks gets 501, an answer of that kind 502.
//! * **`Via`** is added to both ways; a request that names us in it gets 508. `Max-Forwards` is obeyed.
//! * **Where it came from** is said in `X-Forwarded-*` or [`Forwarded`]. What the caller says about it is dropped unless
//!   [a trusted proxy](Forward::trusted_proxies) said it, in the one of the two that it is believed in.
//! * **Upgrades** are passed on if they name one protocol, which is not HTTP itself, in a request without a body. Bytes
//!   are tunnelled only after a 101 that agrees, and each half closes by itself.
//! * **gRPC** finds HTTP/2 by its content type where the endpoint does not say what it speaks. `grpc-timeout` goes on less
//!   what was spent; when time is up the caller gets `DEADLINE_EXCEEDED`, in trailers if the answer had begun.
//!
//! # Connections
//!
//! They belong to the endpoint's handle and end with it, and are kept per runtime; the limit on open ones is shared, and an
//! idle one of another runtime is closed where it would keep a request waiting. Requests wait in turn for a place to open
//! one; one that is free goes to whoever asks first. With
//! HTTP/2 each runtime needs a connection of its own, so no fewer should be allowed than there are runtimes.
//!
//! HTTP/1.1 to endpoints is written and read here, on httparse, not by hyper: a connection has no task, and no channels to
//! one. The future and the body of whoever uses it drive it, so that what arrives from the upstream wakes the task that
//! waits for it and nobody else, nothing is handed over, and a request need not be copied to be made again. That was
//! worth 2 µs of 18 per request. Only the rest of a request whose answer came early gets a task, and so does an upgraded
//! connection.
//!
//! HTTP/2 is h2's, without hyper around it, which was worth 2.6 µs of 14. A connection has one task, which reads and writes,
//! and is shared; requests begin their streams, send and hear from where they are. Another connection is opened when
//! [their streams](Forward::max_streams) run out, by one request while the others wait for it.
//!
//! What an endpoint may say is read strictly: CRLF in chunks, lengths that are digits and agree, no coding but `chunked`,
//! no more than 100 fields. Whoever says both a length and chunks is not asked again over that connection, nor is one
//! who says anything unasked. An answer is heard even if the endpoint refuses the rest of the request.
//!
//! Timers are set once in a while, not for each request: one that is set for an earlier request stays until it goes off,
//! and is then set anew.
//!
//! # Nothing sent
//!
//! Bytes are counted where they leave. A [`Rejection`](portcullis_core::Rejection) whose
//! [`sent`](portcullis_core::Rejection::sent) is false means that no byte of the request was taken by the transport, or
//! that an HTTP/2 endpoint said it did not process the stream (`REFUSED_STREAM`, or a `GOAWAY` without error). Everything
//! else counts as sent.
//!
//! A kept connection may be closed by the upstream just as it is used. What shows before the request is sent makes it go
//! over another. If it is gone, has no body, and no byte of an answer came, it is made again and sent over a new connection
//! once, provided its method is idempotent or nothing had been sent.
//!
//! # Defaults
//!
//! | setting | default |
//! |---|---|
//! | [`connect_timeout`](Policy::connect_timeout) | 1 s |
//! | [`response_timeout`](Policy::response_timeout) | 15 s from the end of the request to the head of the response |
//! | [`idle_timeout`](Policy::idle_timeout) | 5 min, either direction |
//! | [`attempt_timeout`](Policy::attempt_timeout), [`total_timeout`](Policy::total_timeout) | off; a `Deadline` always counts |
//! | [`request_limit`](Policy::request_limit), [`response_limit`](Policy::response_limit) | off |
//! | [`tunnels`](Policy::tunnels) | none: `CONNECT` gets 405 |
//! | [`max_connections`](Forward::max_connections), [`max_waiting`](Forward::max_waiting) | 1024 per endpoint; waiting per runtime |
//! | [`max_idle`](Forward::max_idle) | 256 per endpoint and runtime |
//! | [`pool_idle_timeout`](Forward::pool_idle_timeout), [`max_age`](Forward::max_age) | 60 s; 10 min ± 10 % |
//! | [`max_streams`](Forward::max_streams) | 100 |
//! | [`max_head`](Forward::max_head) | 64 KiB |
//!
//! # When it fails
//!
//! | what | the caller gets | sent |
//! |---|---|---|
//! | no endpoint and no origin | 500 `no-endpoint` | no |
//! | refused, no address, no TLS | 502 `connect-failed`, `tls-failed` | no |
//! | no connection in time | 504 `connect-timeout` | no |
//! | too many wait for one of the connections that are allowed, or one waited too long | 503 `connections-exhausted`, of the gateway's own [side](portcullis_core::Side) | no |
//! | closed without an answer, or with half a head | 502 `upstream-reset` | as counted |
//! | an answer that is not HTTP | 502 `malformed-response` | yes |
//! | 101 nobody asked for, or to something else | 502 `unexpected-upgrade` | yes |
//! | no head in time; no time left | 504 `response-timeout`; `deadline-exceeded` | as counted |
//! | the request's body stops; breaks off; is too large | 408; 400; 413 | as counted |
//! | the response is announced too large | 502 `response-too-large`, of the gateway's own side | yes |
//! | the response's body stops, breaks off, turns out too large | the head it had, and a body that ends in an error | |
//! | it cannot be passed on | 400 `no-authority`, `connect`, `max-forwards`; 405 `connect`, `trace`; 500 `rewrite`, `unsendable`; 501 `transfer-coding`, `connect`; 508 `loop` | no |
//!
//! # What it does not do
//!
//! It does not repeat requests with a body, nor choose another endpoint: balance does. It does not buffer, compress, cache
//! or mirror. There is no HTTP/3, no extended `CONNECT`, no PROXY protocol. A reader who does not read is the server's
//! affair, since a body that is not polled cannot notice: the façade's server lets go of him.
//!
//! # What a server settles before it is seen here
//!
//! Shown by `tests/wire.rs` for hyper's server and by `tests/served.rs` for the façade's:
//!
//! | what | hyper | the façade | by |
//! |---|---|---|---|
//! | `Content-Length` and `Transfer-Encoding` in one request | the latter counts, the former never reaches the upstream | refused | `a_request_with_a_length_and_chunks_is_refused_or_has_chunks` |
//! | a lone LF among trailers | what lies behind it is lost, but never a request | breaks off | `what_hides_among_trailers_is_no_request` |
//! | a chunk's size may be followed by spaces and by extensions of any bytes, which go no further | so | so | `nothing_is_smuggled` |
//! | no 1xx can be sent but 100, when the body is asked for, and 101; others end here | so | so | `answers_keep_their_framing`, `a_client_that_expects_100_gets_it_and_the_upstream_gets_the_body` |
//! | trailers to an HTTP/1.1 caller need to be asked for by `TE` | and announced by `Trailer` | so | `trailers_reach_a_client_of_http_1_that_asks` |
//! | fields in lower case are all there is | so | so | every test |
//!
//! A missing `Host` beside a target that names one is overlooked, though RFC 9112 §3.2 would have it refused: requests
//! made in the same process look like that.

mod connect;
mod download;
mod exchange;
mod failure;
mod forwarded;
mod h1;
mod h2;
mod headers;
mod lease;
mod policy;
mod pool;
mod prepare;
mod stream;
mod target;
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
        let instance = target::origin(origin).ok_or(Error("not an origin: want `http://host:port` or `unix:/path`"))?;
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

    /// What holds for requests whose route says nothing else, instead of all that was said before: only connect, response and
    /// idle timeouts that `policy` leaves open stay as they are. Say it first.
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

    /// The largest head of a response, in bytes. Default 64 KiB; not less than 8 KiB nor more than 16 MiB.
    #[must_use]
    pub fn max_head(self, bytes: usize) -> Self {
        self.limit(|limits| limits.max_head = bytes.clamp(8 << 10, 16 << 20))
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

    /// How many connections to `endpoint` are idle, and how many are HTTP/2, in all runtimes.
    #[must_use]
    pub fn connections(&self, endpoint: &Endpoint) -> (usize, usize) {
        endpoint.existing_slot(&self.shared.slot).map_or((0, 0), pool::Pool::count)
    }

    /// How many connections to `endpoint` are open, busy or idle, in all runtimes.
    #[must_use]
    pub fn open_connections(&self, endpoint: &Endpoint) -> usize {
        endpoint.existing_slot(&self.shared.slot).map_or(0, pool::Pool::open)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_request_on_its_way_fits_the_memory_that_allocators_keep_at_hand() {
        let request = Request::get("http://a/").body(http_body_util::Empty::<Bytes>::new()).unwrap();
        let ResponseFuture(State::Sending(future)) = Forward::to("127.0.0.1:1").unwrap().call(request) else {
            panic!("refused");
        };
        // What glibc takes for small, the lowest of such limits.
        assert!(size_of_val(&*future) <= 1000, "{}", size_of_val(&*future));
    }
}
