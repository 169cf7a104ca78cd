//! Around the gateway: hands each request to the configuration that is in force, counts it, and writes it down.

mod access;
mod record;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version, header};
use pin_project_lite::pin_project;
use portcullis::gateway::{self, GatewayBody};
use portcullis::serve::Incoming;
use portcullis_core::{
    Body, Carried, Clock, Dialect, GrpcCode, Guard, Observer, PeerAddress, PeerTls, Rejection, Route,
};
use tower_service::Service;

use self::record::Upload;
pub(crate) use self::record::{Attempt, Record};
use crate::export::Exporter;
use crate::state::State;
use crate::telemetry::{Labels, is_failure};
use crate::trace::{Sampling, Trace};

/// The gateway as it is at the moment, observed.
#[derive(Clone)]
pub(crate) struct Observed {
    state: Arc<State>,
    clock: Clock,
}

pin_project! {
    /// An answer on its way.
    pub(crate) struct ResponseFuture {
        #[pin]
        inner: gateway::ResponseFuture<Body<Incoming, Upload>>,
        watch: Option<Watch>,
    }

    /// The caller may go away before there is one.
    impl PinnedDrop for ResponseFuture {
        fn drop(this: Pin<&mut Self>) {
            if let Some(watch) = this.project().watch.take() {
                watch.finish(Answer::default());
            }
        }
    }
}

/// One request, from its arrival on.
struct Watch {
    state: Arc<State>,
    record: Arc<Record>,
    exporter: Option<Arc<Exporter>>,
    asked: Asked,
}

/// One request whose answer has begun, to the end of that.
pub(crate) struct Watched {
    watch: Option<Watch>,
    answer: Answer,
    is_grpc: bool,
}

/// How an answer goes.
#[derive(Default)]
struct Answer {
    head: Option<Head>,
    grpc: Option<GrpcCode>,
    bytes: u64,
    whole: bool,
}

/// What was asked for, as far as anybody wants to know.
pub(crate) struct Asked {
    pub(crate) method: Method,
    /// For log and spans; without the query, in which there may be tokens.
    pub(crate) path: Option<String>,
    pub(crate) peer: Option<SocketAddr>,
    /// For spans.
    #[cfg_attr(not(feature = "otlp"), expect(dead_code, reason = "only spans tell it"))]
    pub(crate) more: Option<Box<More>>,
}

/// What only spans tell.
#[cfg_attr(not(feature = "otlp"), expect(dead_code, reason = "only spans tell it"))]
pub(crate) struct More {
    pub(crate) version: Version,
    pub(crate) encrypted: bool,
    pub(crate) host: Option<String>,
    pub(crate) agent: Option<String>,
}

/// What the head of the answer told.
pub(crate) struct Head {
    /// After the start.
    pub(crate) after: Duration,
    pub(crate) status: StatusCode,
    pub(crate) route: Option<Route>,
    /// The layer that refused, and why.
    pub(crate) refused: Option<(&'static str, &'static str)>,
}

/// A request that is over.
pub(crate) struct Finished {
    pub(crate) asked: Asked,
    pub(crate) record: Arc<Record>,
    pub(crate) attempts: Vec<Attempt>,
    /// Nothing if the caller went away before.
    pub(crate) head: Option<Head>,
    /// Of a gRPC call, as far as it came.
    pub(crate) grpc: Option<GrpcCode>,
    pub(crate) took: Duration,
    pub(crate) down: u64,
    /// Whether the answer arrived whole.
    pub(crate) whole: bool,
}

/// So much of what a caller said is kept for log and spans, of which many may wait.
const LONGEST: usize = 2 << 10;
/// So much of a method, of which longer ones are none.
const LONGEST_METHOD: usize = 64;

// === impl Observed ===

impl Observed {
    pub(crate) fn new(state: Arc<State>) -> Self {
        Self { state, clock: Clock::system() }
    }
}

impl Service<Request<Incoming>> for Observed {
    type Response = Response<Body<GatewayBody, Watched>>;
    type Error = Infallible;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // The gateway is always ready, whichever it is by then.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Incoming>) -> ResponseFuture {
        let running = self.state.running();
        let (traces, exporter) = (&running.config.traces, &running.exporter);
        let trace = traces.propagate.then(|| {
            let sampling = Sampling { accept: traces.accept, share: traces.sample.0, exports: exporter.is_some() };
            Trace::carry(request.headers_mut(), sampling, || fastrand::u64(..))
        });
        let is_exported = trace.is_some_and(|trace| trace.is_exported());
        let asked = Asked::of(&request, running.config.log.access || is_exported, is_exported);
        let record = Arc::new(Record::new(self.clock.clone(), trace));
        self.state.telemetry.active.fetch_add(1, Ordering::Relaxed);
        Observer::new(record.clone()).attach(request.extensions_mut());
        let request = request.map(|body| Body::guarded(body, Upload(record.clone())));
        let exporter = exporter.as_ref().filter(|_| is_exported).cloned();
        let watch = Watch { state: self.state.clone(), record, exporter, asked };
        ResponseFuture { inner: running.gateway.clone().call(request), watch: Some(watch) }
    }
}

// === impl Asked ===

impl Asked {
    fn of<B>(request: &Request<B>, path: bool, more: bool) -> Self {
        let field = |name| request.headers().get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let all = || More {
            version: request.version(),
            encrypted: PeerTls::of(request.extensions()).is_some(),
            host: request.uri().authority().map(http::uri::Authority::as_str).or(field(header::HOST)).map(kept),
            agent: field(header::USER_AGENT).map(kept),
        };
        Self {
            method: match request.method() {
                method if method.as_str().len() <= LONGEST_METHOD => method.clone(),
                method => Method::from_bytes(&method.as_str().as_bytes()[..LONGEST_METHOD]).unwrap_or_default(),
            },
            path: path.then(|| kept(request.uri().path())),
            peer: PeerAddress::of(request.extensions()).map(|PeerAddress(peer)| *peer),
            more: more.then(|| Box::new(all())),
        }
    }
}

/// As much of it as is kept.
fn kept(text: &str) -> String {
    let end = (0..=LONGEST.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
    text[..end.unwrap_or_default()].to_owned()
}

// === impl ResponseFuture ===

impl Future for ResponseFuture {
    type Output = Result<Response<Body<GatewayBody, Watched>>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let Ok(response) = ready!(this.inner.poll(cx));
        let Some(watch) = this.watch.take() else { return Poll::Pending };
        let answer = Answer {
            head: Some(Head::of(&response, watch.record.age())),
            // Of its body nothing is sent, and nobody asks for it.
            whole: watch.asked.method == Method::HEAD,
            ..Answer::default()
        };
        let is_grpc = Dialect::of(response.headers()) == Dialect::Grpc;
        let mut watch = Watched { watch: Some(watch), answer, is_grpc };
        watch.trailers(response.headers());
        Poll::Ready(Ok(response.map(|body| Body::guarded(body, watch))))
    }
}

// === impl Head ===

impl Head {
    fn of<B>(response: &Response<B>, after: Duration) -> Self {
        let extensions = response.extensions();
        Self {
            after,
            status: response.status(),
            route: extensions.get::<Route>().cloned(),
            refused: extensions.get::<Rejection>().map(|rejection| (rejection.layer().as_str(), rejection.reason())),
        }
    }
}

// === impl Watch ===

impl Watch {
    /// However it ended: at the end of the body, or because somebody went away.
    fn finish(self, Answer { head, grpc, bytes, whole }: Answer) {
        let Self { state, record, exporter, asked } = self;
        let (attempts, took) = (record.take_attempts(), record.age());
        let finished = Finished { asked, record, attempts, head, grpc, took, down: bytes, whole };
        let telemetry = &state.telemetry;
        telemetry.active.fetch_sub(1, Ordering::Relaxed);
        let up = finished.record.uploaded();
        telemetry.series(finished.labels()).record(finished.took, up, finished.down);
        if let Some(attempt) = finished.attempts.last() {
            let moved = telemetry.moved(attempt.endpoint.service());
            moved.up.fetch_add(up, Ordering::Relaxed);
            moved.down.fetch_add(finished.down, Ordering::Relaxed);
        }
        access::log(&finished, &state.running().config.log);
        if let Some(exporter) = exporter {
            exporter.export(finished);
        }
    }
}

// === impl Watched ===

impl Guard for Watched {
    fn data(&mut self, bytes: usize) {
        self.answer.bytes += bytes as u64;
    }

    fn trailers(&mut self, trailers: &HeaderMap) {
        if self.is_grpc {
            self.answer.grpc = GrpcCode::of(trailers);
        }
    }

    fn whole(&mut self) {
        self.answer.whole = !self.is_grpc;
    }

    fn end(&mut self) {
        self.answer.whole = true;
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if let Some(watch) = self.watch.take() {
            watch.finish(std::mem::take(&mut self.answer));
        }
    }
}

// === impl Finished ===

impl Finished {
    pub(crate) fn route(&self) -> Option<&Arc<str>> {
        self.head.as_ref().and_then(|head| head.route.as_ref()).map(Route::name)
    }

    /// Who went away before there was an answer is counted as nginx has it.
    pub(crate) fn status(&self) -> StatusCode {
        let gone = || StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST);
        self.head.as_ref().map_or_else(gone, |head| head.status)
    }

    pub(crate) fn is_failure(&self) -> bool {
        self.status().is_server_error() || self.grpc.is_some_and(is_failure)
    }

    fn labels(&self) -> Labels {
        let refused = self.head.as_ref().and_then(|head| head.refused).unwrap_or_default();
        Labels::new(self.route(), &self.asked.method, self.status(), self.grpc, refused)
    }
}
