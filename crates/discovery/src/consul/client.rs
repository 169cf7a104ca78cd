//! Calls to an agent: one deadline for the whole, a cap on the body, percent-encoding, a token nobody sees.

use std::fmt::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit};

use super::connect::Connector;
use super::pulse::Pulse;
use super::{Consistency, ConsulConfig, Origin, index};
use crate::Error;

pub(super) struct Client {
    pub(super) config: ConsulConfig,
    /// One connection each over HTTP/2, a pool over HTTP/1.1, where there is but one of them.
    http: Vec<legacy::Client<Connector, Full<Bytes>>>,
    next: AtomicUsize,
    lanes: Arc<Lanes>,
    prompt: Semaphore,
    /// The same for registrations.
    keep: Semaphore,
    sweep: Semaphore,
    pub(super) pulse: Pulse,
}

/// Places for queries that block. A watch that gets one keeps it; the others are parked.
pub(super) struct Lanes {
    free: Arc<Semaphore>,
    http2: AtomicBool,
}

/// A place for queries that block.
pub(super) struct Lane {
    /// Which of the clients to use.
    shard: usize,
    _place: OwnedSemaphorePermit,
}

/// An agent's answer, read to the end.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    headers: HeaderMap,
    pub(super) body: Bytes,
}

/// The path and query of a call; names and values are encoded as they are added.
pub(super) struct Path(String);

/// What RFC 3986 leaves unreserved stays as it is.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
const TOKEN: HeaderName = HeaderName::from_static("x-consul-token");
/// Calls that do not block are short, so that few connections do for many.
const PROMPT: usize = 16;
/// As many for parked watches, of which all may ask at once.
const SWEEP: usize = 32;
/// Over HTTP/2 a few connections carry many queries each; an agent allows 250.
const SHARDS: usize = 8;
/// How often the other end of such a connection is asked whether it is there, and how long it has to answer.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(5));
const STREAMS: usize = 200;

// === impl Client ===

impl Client {
    pub(super) fn new(config: ConsulConfig) -> Result<Self, Error> {
        let tls = match &*config.origin {
            Origin::Tcp { https: true, .. } => Some(config.tls.client()?),
            Origin::Tcp { .. } | Origin::Unix(_) => None,
        };
        let shards = if tls.is_some() { SHARDS } else { 1 };
        let lanes = Arc::new(Lanes { free: Arc::new(Semaphore::new(config.connections)), http2: false.into() });
        let (origin, timeout) = (config.origin.clone(), config.connect_timeout);
        let connector = Connector { origin, tls, timeout, lanes: lanes.clone() };
        let mut builder = legacy::Client::builder(TokioExecutor::new());
        builder.pool_timer(TokioTimer::new()).pool_idle_timeout(Duration::from_secs(60));
        // Queries that nobody answers leave a connection of HTTP/2 open, whose other end may be gone.
        builder.timer(TokioTimer::new()).http2_keep_alive_interval(KEEP_ALIVE.0).http2_keep_alive_timeout(KEEP_ALIVE.1);
        let http = (0..shards).map(|_| builder.build(connector.clone())).collect();
        let (prompt, keep, sweep) = (Semaphore::new(PROMPT), Semaphore::new(PROMPT), Semaphore::new(SWEEP));
        Ok(Self { config, http, next: AtomicUsize::new(0), lanes, prompt, keep, sweep, pulse: Pulse::default() })
    }

    /// A place for queries that block, if one is free.
    pub(super) fn lane(&self) -> Option<Lane> {
        let place = self.lanes.free.clone().try_acquire_owned().ok()?;
        Some(self.of(place))
    }

    /// A place for queries that block, when one is free.
    pub(super) async fn next_lane(&self) -> Option<Lane> {
        let place = self.lanes.free.clone().acquire_owned().await.ok()?;
        Some(self.of(place))
    }

    fn of(&self, place: OwnedSemaphorePermit) -> Lane {
        Lane { shard: self.next.fetch_add(1, Ordering::Relaxed) % self.http.len(), _place: place }
    }

    /// What is known of a service: at once, or on a lane when it is no longer what it was at an index or the wait is over.
    pub(super) async fn health(&self, service: &str, after: Option<(u64, &Lane)>) -> Result<Answer, Error> {
        let path = self.health_path(service);
        match after {
            Some((index, lane)) => self.block(lane.shard, path, index).await,
            None => self.call(Method::GET, path, Bytes::new()).await,
        }
    }

    /// What is known of a service at once, for a parked watch.
    pub(super) async fn sweep(&self, service: &str) -> Result<Answer, Error> {
        let _place = place(&self.sweep).await?;
        self.run(0, self.config.timeout, Method::GET, self.health_path(service), Bytes::new()).await
    }

    /// A query whose index tells whether anything changed.
    pub(super) async fn signal(&self, path: Path, index: Option<u64>) -> Result<Answer, Error> {
        let path = self.consistent(self.scope(path).maybe("dc", self.config.datacenter.as_deref()));
        match index {
            Some(index) => self.block(0, path, index).await,
            None => self.call(Method::GET, path, Bytes::new()).await,
        }
    }

    /// What the servers know of a service, whatever the agent keeps of it.
    pub(super) async fn ask_servers(&self, service: &str) -> Result<Answer, Error> {
        let path = self.unqualified_health_path(service);
        let stale = matches!(self.config.consistency, Consistency::Stale | Consistency::Cached);
        self.call(Method::GET, if stale { path.query("stale", "") } else { path }, Bytes::new()).await
    }

    fn health_path(&self, service: &str) -> Path {
        self.consistent(self.unqualified_health_path(service))
    }

    fn unqualified_health_path(&self, service: &str) -> Path {
        let config = &self.config;
        let mut path = Path::new("/v1/health/service/").segment(service);
        if !config.selection.warning {
            path = path.query("passing", "1");
        }
        path = self.scope(path).maybe("dc", config.datacenter.as_deref()).maybe("near", config.near.as_deref());
        path = path.maybe("filter", config.filter.as_deref());
        for tag in &config.tags {
            path = path.query("tag", tag);
        }
        path
    }

    fn consistent(&self, path: Path) -> Path {
        match self.config.consistency {
            Consistency::Default => path,
            Consistency::Consistent => path.query("consistent", ""),
            Consistency::Stale => path.query("stale", ""),
            Consistency::Cached => path.query("cached", ""),
        }
    }

    async fn block(&self, shard: usize, path: Path, index: u64) -> Result<Answer, Error> {
        let wait = self.config.wait;
        let path = path.query("index", &index.to_string()).query("wait", &index::wait_parameter(wait));
        self.run(shard, index::deadline(wait, self.config.timeout), Method::GET, path, Bytes::new()).await
    }

    /// Whether the token may read the service and at least some node: an old agent answers who may not like one who asks
    /// for what does not exist.
    pub(super) async fn may_read(&self, service: &str) -> Result<bool, Error> {
        let path = self.scope(Path::new("/v1/agent/health/service/name/").segment(service));
        if self.call(Method::GET, path, Bytes::new()).await?.status == StatusCode::FORBIDDEN {
            return Ok(false);
        }
        let path = Path::new("/v1/catalog/nodes").maybe("dc", self.config.datacenter.as_deref()).query("stale", "");
        let nodes = self.call(Method::GET, path, Bytes::new()).await?.ok()?;
        Ok(nodes.body.iter().filter(|byte| !byte.is_ascii_whitespace()).nth(2).is_some())
    }

    /// The agent's node, if we may know it.
    pub(super) async fn identity(&self) -> Result<Option<String>, Error> {
        #[derive(serde::Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct About {
            config: Config,
        }
        #[derive(serde::Deserialize)]
        struct Config {
            #[serde(rename = "NodeID")]
            node_id: String,
        }
        let answer = self.call(Method::GET, Path::new("/v1/agent/self"), Bytes::new()).await?;
        if answer.status == StatusCode::FORBIDDEN {
            return Ok(None);
        }
        let about: Option<About> = serde_json::from_slice(&answer.ok()?.body).ok();
        Ok(about.map(|about| about.config.node_id))
    }

    /// A call that does not block.
    pub(super) async fn call(&self, method: Method, path: Path, body: Bytes) -> Result<Answer, Error> {
        let _place = place(&self.prompt).await?;
        self.run(0, self.config.timeout, method, path, body).await
    }

    /// A call that keeps a registration: it must not wait for those of watches.
    pub(super) async fn keep(&self, method: Method, path: Path, body: Bytes) -> Result<Answer, Error> {
        let _place = place(&self.keep).await?;
        self.run(0, self.config.timeout, method, self.scope(path), body).await
    }

    pub(super) fn scope(&self, path: Path) -> Path {
        path.maybe("ns", self.config.namespace.as_deref()).maybe("partition", self.config.partition.as_deref())
    }

    async fn run(
        &self,
        shard: usize,
        deadline: Duration,
        method: Method,
        path: Path,
        body: Bytes,
    ) -> Result<Answer, Error> {
        let request = self.request(method, &path, body)?;
        tokio::time::timeout(deadline, self.exchange(shard, request))
            .await
            .unwrap_or_else(|_| Err(Error::unavailable("the agent did not answer in time")))
    }

    fn request(&self, method: Method, path: &Path, body: Bytes) -> Result<Request<Full<Bytes>>, Error> {
        let mut request = Request::builder().method(method).uri(format!("{}{}", self.config.origin, path.0));
        if !body.is_empty() {
            request = request.header(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        if let Some(token) = &self.config.token {
            request = request.header(TOKEN, token);
        }
        request
            .body(Full::new(body))
            .map_err(|error| Error::invalid("the agent cannot be asked that").with_source(error))
    }

    async fn exchange(&self, shard: usize, request: Request<Full<Bytes>>) -> Result<Answer, Error> {
        let client = self.http.get(shard).ok_or_else(|| Error::unavailable("there is no such connection"))?;
        let answer = client.request(request).await.map_err(|error| {
            let what = if error.is_connect() { "the agent cannot be reached" } else { "the agent broke off" };
            Error::unavailable(what).with_source(error)
        })?;
        let (head, mut body) = answer.into_parts();
        let mut read = BytesMut::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| Error::unavailable("the agent broke off").with_source(error))?;
            if let Some(data) = frame.data_ref() {
                if read.len() + data.len() > self.config.max_body {
                    return Err(Error::unavailable(format!(
                        "the answer is larger than {} bytes",
                        self.config.max_body
                    )));
                }
                read.extend_from_slice(data);
            }
        }
        Ok(Answer { status: head.status, headers: head.headers, body: read.freeze() })
    }
}

async fn place(places: &Semaphore) -> Result<SemaphorePermit<'_>, Error> {
    places.acquire().await.map_err(|_| Error::unavailable("the client is closed"))
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Client").field(&self.config).finish()
    }
}

// === impl Lanes ===

impl Lanes {
    /// A connection speaks HTTP/2: there is room for many more.
    pub(super) fn multiplex(&self) {
        if !self.http2.swap(true, Ordering::Relaxed) {
            self.free.add_permits(SHARDS * STREAMS);
        }
    }
}

// === impl Answer ===

impl Answer {
    /// The answer if its status is 200, else what it says instead.
    pub(super) fn ok(self) -> Result<Self, Error> {
        if self.status == StatusCode::OK {
            return Ok(self);
        }
        // The agent's words, as far as they are words.
        let text = String::from_utf8_lossy(&self.body[..self.body.len().min(200)]);
        let text: String = text.chars().filter(|c| !c.is_control()).collect();
        let detail = format!("the agent answered {}: {text}", self.status.as_u16());
        Err(match self.status {
            StatusCode::FORBIDDEN | StatusCode::UNAUTHORIZED => Error::denied(detail),
            StatusCode::BAD_REQUEST => Error::invalid(detail),
            _ if text.contains("No cluster leader") || text.contains("No known Consul servers") => {
                Error::no_leader(detail)
            }
            _ => Error::unavailable(detail),
        })
    }

    pub(super) fn index(&self) -> Option<u64> {
        self.text("x-consul-index")?.parse().ok()
    }

    /// Whether a leader is known to whoever answered.
    pub(super) fn has_leader(&self) -> bool {
        self.text("x-consul-knownleader") == Some("true")
    }

    /// Whether it comes from what the servers stream to the agent. Then the leader is not known, whether there is one or not
    /// (hashicorp/consul#9776).
    pub(super) fn is_streamed(&self) -> bool {
        self.text("x-consul-query-backend") == Some("streaming")
    }

    /// Whether something was left out that the token may not read. Old agents do not say so.
    pub(super) fn is_filtered(&self) -> bool {
        self.text("x-consul-results-filtered-by-acls") == Some("true")
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

// === impl Path ===

impl Path {
    pub(super) fn new(fixed: &str) -> Self {
        Self(fixed.to_owned())
    }

    /// Adds the last segment.
    pub(super) fn segment(mut self, segment: &str) -> Self {
        // Writing to a string does not fail.
        let _ = write!(self.0, "{}", utf8_percent_encode(segment, ENCODED));
        self
    }

    pub(super) fn query(mut self, name: &str, value: &str) -> Self {
        let separator = if self.0.contains('?') { '&' } else { '?' };
        let _ = write!(self.0, "{separator}{name}");
        if !value.is_empty() {
            let _ = write!(self.0, "={}", utf8_percent_encode(value, ENCODED));
        }
        self
    }

    fn maybe(self, name: &str, value: Option<&str>) -> Self {
        match value {
            Some(value) => self.query(name, value),
            None => self,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_values_cannot_leave_their_place() {
        let path =
            Path::new("/v1/health/service/").segment("web?dc=x/../y").query("filter", "\"v1\" in Service.Tags & a=b");
        assert_eq!(
            path.0,
            "/v1/health/service/web%3Fdc%3Dx%2F..%2Fy?filter=%22v1%22%20in%20Service.Tags%20%26%20a%3Db"
        );
        assert_eq!(Path::new("/a").query("stale", "").query("dc", "d").0, "/a?stale&dc=d");
    }
}
