//! Asks endpoints how they are, where their registry does not.
//!
//! A check goes the way requests go, through the same [`Forward`] with its TLS and its connections. What answers badly
//! several times in a row is sick: its gate closes, and the balancer passes it by, until it has answered well several
//! times. Breakers and administrators have their own say at the same gate.
//!
//! ```
//! use std::num::NonZeroU32;
//! use std::time::Duration;
//! use portcullis::discovery::{DiscoveryLayer, FixedRegistry};
//! use portcullis::forward::Forward;
//! use portcullis::health::HealthCheck;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let discovery = DiscoveryLayer::new(FixedRegistry::new().service("orders", ["10.0.0.1:8080".parse()?]));
//! let checker = HealthCheck::http("/health")
//!     .interval(Duration::from_secs(5))
//!     .unhealthy_after(NonZeroU32::MIN)
//!     .start(discovery.clone(), "orders", Forward::new());
//! // Checks go on while the handle lives; what it closed opens when it goes.
//! drop(checker);
//! # Ok(())
//! # }
//! ```
//!
//! | | default |
//! |---|---|
//! | [interval](HealthCheck::interval) | 10 s, a tenth more or less |
//! | [timeout](HealthCheck::timeout) | 2 s |
//! | sick after | 3 bad answers in a row |
//! | well again after | 2 good answers in a row |
//!
//! An endpoint that is new counts as well until it has shown otherwise. A check that the gateway's own limit on connections
//! keeps from being made says nothing of the endpoint. When so many are sick that a balancer panics, it
//! passes over what is said here, as over what breakers say.

use std::fmt;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use bytes::{Buf, Bytes};
use futures::StreamExt;
use http::{HeaderValue, Method, Request, header};
use http_body_util::{BodyExt, Full, Limited};
use portcullis_core::{
    Address, Body, Carried, Clock, Deadline, Endpoint, GRPC_STATUS, Mover, Permit, Rejection, Side, SlotKey,
};
use portcullis_discovery::DiscoveryLayer;
use portcullis_forward::{Forward, ResponseBody};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tower_service::Service;

/// How endpoints are asked, how often, and what their answers mean.
#[derive(Clone, Debug)]
pub struct HealthCheck {
    kind: Kind,
    interval: Duration,
    timeout: Duration,
    unhealthy: NonZeroU32,
    healthy: NonZeroU32,
}

#[derive(Clone, Debug)]
enum Kind {
    Http(String),
    Tcp,
    Grpc(String),
}

/// Why an endpoint is not known to be well.
#[derive(Debug)]
enum Unwell {
    Says(String),
    /// The gateway's own limits kept it from being asked.
    Unasked,
}

/// Endpoints of one service being asked. The checks end with the last clone, and what they found counts no more, unless
/// others [go on from it](HealthCheck::start_after).
#[derive(Clone)]
pub struct Checker(Arc<Shared>);

/// How an endpoint answered.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Health {
    /// Whether requests go to it, as far as checks have a say.
    pub is_well: bool,
    /// Checks so far.
    pub checks: u32,
    /// Those of them that went badly.
    pub failures: u32,
    /// What was bad about the last, if it was.
    pub problem: Option<String>,
}

struct Shared {
    findings: Arc<Findings>,
    task: Option<AbortHandle>,
}

/// What checks found.
struct Findings {
    slot: SlotKey<State>,
    mover: Mover,
    /// Endpoints whose gate is closed for them.
    closed: Mutex<Vec<Endpoint>>,
}

#[derive(Default)]
struct State {
    sick: AtomicBool,
    /// Answers in a row that speak against what it is held for.
    against: AtomicU32,
    checks: AtomicU32,
    failures: AtomicU32,
    problem: Mutex<Option<String>>,
}

/// One task's view.
struct Task {
    check: HealthCheck,
    findings: Weak<Findings>,
    discovery: DiscoveryLayer,
    service: Arc<str>,
    forward: Forward,
    clock: Clock,
}

/// Checks of one service at a time.
const AT_ONCE: usize = 32;
/// The most of an answer that is read.
const LARGEST: usize = 64 * 1024;

// === impl HealthCheck ===

impl HealthCheck {
    /// Gets `path`; any 2xx is well.
    #[must_use]
    pub fn http(path: &str) -> Self {
        Self::new(Kind::Http(path.to_owned()))
    }

    /// Connects.
    #[must_use]
    pub const fn tcp() -> Self {
        Self::new(Kind::Tcp)
    }

    /// Calls [`grpc.health.v1.Health/Check`](https://github.com/grpc/grpc/blob/master/doc/health-checking.md) for `service`,
    /// or for the server as a whole if that is empty; `SERVING` is well.
    #[must_use]
    pub fn grpc(service: &str) -> Self {
        Self::new(Kind::Grpc(service.to_owned()))
    }

    const fn new(kind: Kind) -> Self {
        let (three, two) = (NonZeroU32::MIN.saturating_add(2), NonZeroU32::MIN.saturating_add(1));
        let (interval, timeout) = (Duration::from_secs(10), Duration::from_secs(2));
        Self { kind, interval, timeout, unhealthy: three, healthy: two }
    }

    /// How often each endpoint is asked. Default 10 s; at least a millisecond.
    #[must_use]
    pub fn interval(mut self, interval: Duration) -> Self {
        self.interval = interval.max(Duration::from_millis(1));
        self
    }

    /// How long an answer may take. Default 2 s.
    #[must_use]
    pub const fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// How many bad answers in a row make an endpoint sick. Default 3.
    #[must_use]
    pub const fn unhealthy_after(mut self, answers: NonZeroU32) -> Self {
        self.unhealthy = answers;
        self
    }

    /// How many good answers in a row make it well again. Default 2.
    #[must_use]
    pub const fn healthy_after(mut self, answers: NonZeroU32) -> Self {
        self.healthy = answers;
        self
    }

    /// Begins to ask the endpoints that `discovery` finds for `service`, through `forward`. Outside a tokio runtime nothing
    /// is asked.
    #[must_use = "checks end with the handle"]
    pub fn start(self, discovery: DiscoveryLayer, service: &str, forward: Forward) -> Checker {
        let findings = Findings { slot: SlotKey::new(), mover: Mover::new(), closed: Mutex::default() };
        self.start_with(Arc::new(findings), discovery, service, forward)
    }

    /// Begins to ask as [`start`](Self::start) does, and goes on from what `old` found: what is sick stays so until it has
    /// answered well, also when `old` is gone.
    #[must_use = "checks end with the handle"]
    pub fn start_after(self, old: &Checker, discovery: DiscoveryLayer, service: &str, forward: Forward) -> Checker {
        self.start_with(old.0.findings.clone(), discovery, service, forward)
    }

    fn start_with(
        self,
        findings: Arc<Findings>,
        discovery: DiscoveryLayer,
        service: &str,
        forward: Forward,
    ) -> Checker {
        let task = Task {
            check: self,
            findings: Arc::downgrade(&findings),
            discovery,
            service: service.into(),
            forward,
            clock: Clock::system(),
        };
        let task = tokio::runtime::Handle::try_current().ok().map(|runtime| runtime.spawn(task.run()).abort_handle());
        Checker(Arc::new(Shared { findings, task }))
    }

    /// Asks once.
    async fn ask(&self, endpoint: &Endpoint, forward: &Forward, clock: &Clock) -> Result<(), Unwell> {
        match &self.kind {
            Kind::Tcp => match tokio::time::timeout(self.timeout, connect(endpoint.address())).await {
                Ok(connected) => connected.map_err(Unwell::Says),
                Err(_) => Err("no answer in time".into()),
            },
            Kind::Http(path) => {
                let request = Request::builder().method(Method::GET).body(Full::default());
                let (head, body) = self.send(request, path, endpoint, forward, clock).await?;
                // What it says besides is read for the connection's sake.
                _ = Limited::new(body, LARGEST).collect().await;
                let well = head.status.is_success();
                if well { Ok(()) } else { Err(format!("it answered {}", head.status.as_u16()).into()) }
            }
            Kind::Grpc(service) => self.ask_grpc(service, endpoint, forward, clock).await,
        }
    }

    async fn ask_grpc(
        &self,
        service: &str,
        endpoint: &Endpoint,
        forward: &Forward,
        clock: &Clock,
    ) -> Result<(), Unwell> {
        let request = Request::builder()
            .method(Method::POST)
            .header(header::CONTENT_TYPE, "application/grpc")
            .header(header::TE, "trailers")
            .body(Full::new(health_request(service)));
        let path = "/grpc.health.v1.Health/Check";
        let (head, body) = self.send(request, path, endpoint, forward, clock).await?;
        let body = Limited::new(body, LARGEST).collect().await.map_err(|error| error.to_string())?;
        let code = body.trailers().and_then(|trailers| trailers.get(GRPC_STATUS)).or(head.headers.get(GRPC_STATUS));
        let code = code.map(HeaderValue::as_bytes);
        if !head.status.is_success() || code != Some(b"0") {
            let code = code.map_or(head.status.as_str().into(), String::from_utf8_lossy);
            return Err(format!("it answered with status {code}").into());
        }
        if is_serving(body.to_bytes()) { Ok(()) } else { Err("it says that it is not serving".into()) }
    }

    async fn send(
        &self,
        request: Result<Request<Full<Bytes>>, http::Error>,
        path: &str,
        endpoint: &Endpoint,
        forward: &Forward,
        clock: &Clock,
    ) -> Result<(http::response::Parts, Body<ResponseBody>), Unwell> {
        let mut request = request.map_err(|error| error.to_string())?;
        let authority = match endpoint.address() {
            Address::Unix(_) => String::from("localhost"),
            address => address.to_string(),
        };
        let uri = format!("http://{authority}{path}").parse().map_err(|_| format!("{path:?} is no path"))?;
        *request.uri_mut() = uri;
        request.headers_mut().insert(header::USER_AGENT, HeaderValue::from_static("portcullis-health"));
        Permit::without_right(endpoint.clone()).attach(request.extensions_mut());
        Deadline(clock.now() + self.timeout).attach(request.extensions_mut());
        let Ok(response) = forward.clone().call(request).await;
        if let Some(rejection) = response.extensions().get::<Rejection>() {
            // With all connections in use, it is not the endpoint that does not answer.
            let is_ours = rejection.side() == Side::Gateway;
            return Err(if is_ours { Unwell::Unasked } else { rejection.to_string().into() });
        }
        Ok(response.into_parts())
    }
}

async fn connect(address: &Address) -> Result<(), String> {
    let connected = match address {
        Address::Socket(address) => tokio::net::TcpStream::connect(address).await.map(drop),
        Address::Name(name, port) => tokio::net::TcpStream::connect((&**name, *port)).await.map(drop),
        Address::Unix(path) => tokio::net::UnixStream::connect(path).await.map(drop),
        other => return Err(format!("{other} cannot be connected to")),
    };
    connected.map_err(|error| error.to_string())
}

/// A `HealthCheckRequest`, framed.
fn health_request(service: &str) -> Bytes {
    let mut message = Vec::new();
    if !service.is_empty() {
        message.push(0x0a);
        let mut length = service.len();
        while length > 0x7f {
            message.push(length as u8 | 0x80);
            length >>= 7;
        }
        message.push(length as u8);
        message.extend_from_slice(service.as_bytes());
    }
    let mut frame = vec![0];
    frame.extend((message.len() as u32).to_be_bytes());
    frame.extend(message);
    frame.into()
}

/// Whether a framed `HealthCheckResponse` says `SERVING`: field 1 is 1.
fn is_serving(mut frame: Bytes) -> bool {
    if frame.remaining() < 5 || frame.get_u8() != 0 {
        return false;
    }
    let length = frame.get_u32() as usize;
    frame.len() >= length && frame[..length] == [0x08, 0x01]
}

// === impl Unwell ===

impl<T: Into<String>> From<T> for Unwell {
    fn from(what: T) -> Self {
        Self::Says(what.into())
    }
}

// === impl Task ===

impl Task {
    async fn run(self) {
        loop {
            // Gateways that were started together do not ask together; who is slow to answer holds up no others for longer.
            let next = Instant::now() + self.check.interval.mul_f64(0.9 + 0.2 * fastrand::f64());
            let Some(endpoints) = self.discovery.follow(&self.service) else {
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let one = async |endpoint: Endpoint| match self.check.ask(&endpoint, &self.forward, &self.clock).await {
                Ok(()) => self.settle(&endpoint, Ok(())),
                Err(Unwell::Says(problem)) => self.settle(&endpoint, Err(problem)),
                Err(Unwell::Unasked) => {}
            };
            let all: Vec<Endpoint> = endpoints.iter().cloned().collect();
            futures::stream::iter(all).for_each_concurrent(AT_ONCE, one).await;
            if let Some(findings) = self.findings.upgrade() {
                lock(&findings.closed).retain(|endpoint| !endpoint.is_removed());
            }
            tokio::time::sleep_until(next).await;
        }
    }

    fn settle(&self, endpoint: &Endpoint, answer: Result<(), String>) {
        // Without them the checks are over, and this answer came a moment too late.
        let Some(findings) = self.findings.upgrade() else { return };
        let state = endpoint.slot(&findings.slot, State::default);
        let sick = state.sick.load(Ordering::Relaxed);
        state.checks.fetch_add(1, Ordering::Relaxed);
        state.failures.fetch_add(u32::from(answer.is_err()), Ordering::Relaxed);
        let is_against = sick == answer.is_ok();
        *lock(&state.problem) = answer.err();
        if !is_against {
            state.against.store(0, Ordering::Relaxed);
            return;
        }
        let against = state.against.fetch_add(1, Ordering::Relaxed) + 1;
        if against < if sick { self.check.healthy } else { self.check.unhealthy }.get() {
            return;
        }
        let mut closed = lock(&findings.closed);
        state.against.store(0, Ordering::Relaxed);
        state.sick.store(!sick, Ordering::Relaxed);
        let (service, id) = (&**endpoint.service(), &**endpoint.id());
        if sick {
            tracing::info!(service, endpoint = id, "the endpoint is well again");
            closed.retain(|other| other != endpoint);
            endpoint.gate().open_for(findings.mover);
        } else {
            let problem = lock(&state.problem).clone().unwrap_or_default();
            tracing::info!(service, endpoint = id, problem, "the endpoint is sick");
            closed.push(endpoint.clone());
            endpoint.gate().close_for(findings.mover);
        }
    }
}

// === impl Checker ===

impl Checker {
    /// How an endpoint answered; `None` before it was asked.
    #[must_use]
    pub fn health(&self, endpoint: &Endpoint) -> Option<Health> {
        let state = endpoint.existing_slot(&self.0.findings.slot)?;
        Some(Health {
            is_well: !state.sick.load(Ordering::Relaxed),
            checks: state.checks.load(Ordering::Relaxed),
            failures: state.failures.load(Ordering::Relaxed),
            problem: lock(&state.problem).clone(),
        })
    }
}

impl fmt::Debug for Checker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checker").finish_non_exhaustive()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl Drop for Findings {
    fn drop(&mut self) {
        for endpoint in lock(&self.closed).drain(..) {
            endpoint.gate().open_for(self.mover);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_serving_is_serving() {
        let frame = |message: &[u8]| Bytes::from([&[0, 0, 0, 0, message.len() as u8], message].concat());
        assert!(is_serving(frame(&[8, 1])));
        for message in [&[8, 2][..], &[], &[8], &[8, 1, 0]] {
            assert!(!is_serving(frame(message)), "{message:?}");
        }
        assert!(!is_serving(Bytes::new()) && !is_serving(Bytes::from_static(&[1, 0, 0, 0, 2, 8, 1])));
        assert!(!is_serving(Bytes::from_static(&[0, 0xff, 0xff, 0xff, 0xff, 8, 1])));
        assert_eq!(&health_request("a.B")[..], [0, 0, 0, 0, 5, 0x0a, 3, b'a', b'.', b'B']);
        assert_eq!(&health_request("")[..], [0, 0, 0, 0, 0]);
        assert_eq!(&health_request(&"s".repeat(300))[..9], [0, 0, 0, 1, 0x2f, 0x0a, 0xac, 2, b's']);
    }

    #[tokio::test]
    async fn an_endpoint_that_is_busy_with_all_its_connections_is_not_sick() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = Address::Socket(listener.local_addr().unwrap());
        let endpoint = Endpoint::new("s", portcullis_core::Instance::new("1", address));
        let forward = Forward::new().max_connections(1).connect_timeout(Duration::from_secs(60));
        let mut request = Request::get("http://a/").body(Full::<Bytes>::default()).unwrap();
        Permit::without_right(endpoint.clone()).attach(request.extensions_mut());
        let busy = tokio::spawn(forward.clone().call(request));
        let _connection = listener.accept().await.unwrap();
        for check in [HealthCheck::http("/"), HealthCheck::grpc("")] {
            let answer = check.timeout(Duration::from_millis(30)).ask(&endpoint, &forward, &Clock::system()).await;
            assert!(matches!(answer, Err(Unwell::Unasked)), "{answer:?}");
        }
        busy.abort();
    }
}
