//! Around the gateway: hands each request to the configuration that is in force, counts it, and writes it down.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use pin_project_lite::pin_project;
use portcullis::balance::Served;
use portcullis::gateway::{self, GatewayBody};
use portcullis_core::{Body, Carried, Clock, Guard, Moment, PeerAddress, Rejection, Route};
use tower_service::Service;

use crate::state::State;
use crate::telemetry::{Answered, Labels};
use crate::trace::Trace;

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
        inner: gateway::ResponseFuture<Incoming>,
        watch: Option<Watch>,
    }
}

/// One request, from its arrival to the end of its answer.
pub(crate) struct Watch {
    state: Arc<State>,
    clock: Clock,
    started: Moment,
    method: Method,
    /// For the log; without the query, in which there may be tokens.
    path: Option<String>,
    peer: Option<PeerAddress>,
    trace: Option<Trace>,
    head: Option<Head>,
    bytes: u64,
    whole: bool,
}

/// What the head of the answer told.
struct Head {
    after: Duration,
    status: StatusCode,
    route: Option<Route>,
    served: Option<Served>,
    refused: Option<(&'static str, &'static str)>,
}

// === impl Observed ===

impl Observed {
    pub(crate) fn new(state: Arc<State>) -> Self {
        Self { state, clock: Clock::system() }
    }
}

impl Service<Request<Incoming>> for Observed {
    type Response = Response<Body<GatewayBody, Watch>>;
    type Error = Infallible;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // The gateway is always ready, whichever it is by then.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Incoming>) -> ResponseFuture {
        let started = self.clock.now();
        let running = self.state.running();
        let trace = running.config.traces.propagate.then(|| Trace::carry(request.headers_mut(), || fastrand::u64(..)));
        let watch = Watch {
            state: self.state.clone(),
            clock: self.clock.clone(),
            started,
            method: request.method().clone(),
            path: running.config.log.access.then(|| request.uri().path().to_owned()),
            peer: PeerAddress::of(request.extensions()).copied(),
            trace,
            head: None,
            bytes: 0,
            whole: false,
        };
        self.state.telemetry.active.fetch_add(1, Ordering::Relaxed);
        let inner = running.gateway.clone().call(request);
        ResponseFuture { inner, watch: Some(watch) }
    }
}

// === impl ResponseFuture ===

impl Future for ResponseFuture {
    type Output = Result<Response<Body<GatewayBody, Watch>>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let Ok(response) = ready!(this.inner.poll(cx));
        let Some(mut watch) = this.watch.take() else { return Poll::Pending };
        watch.head(&response);
        Poll::Ready(Ok(response.map(|body| Body::guarded(body, watch))))
    }
}

// === impl Watch ===

impl Watch {
    fn head<B>(&mut self, response: &Response<B>) {
        let extensions = response.extensions();
        let after = self.clock.now().since(self.started);
        let served = extensions.get::<Served>().cloned();
        if let Some(served) = &served {
            let answered = Answered::by(served.endpoint());
            answered.requests.fetch_add(1, Ordering::Relaxed);
            answered.errors.fetch_add(u64::from(response.status().is_server_error()), Ordering::Relaxed);
            answered.nanos.fetch_add(u64::try_from(after.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
            for failed in served.failed() {
                Answered::by(&failed.endpoint).retried.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.head = Some(Head {
            after,
            status: response.status(),
            route: extensions.get::<Route>().cloned(),
            served,
            refused: extensions.get::<Rejection>().map(|rejection| (rejection.layer().as_str(), rejection.reason())),
        });
    }

    fn log(&self, head: Option<&Head>, took: Duration) {
        let Some(path) = &self.path else { return };
        let succeeded = self.whole && head.is_some_and(|head| !head.status.is_server_error() && head.refused.is_none());
        let share = self.state.running().config.log.sample.0;
        if succeeded && share < 1.0 && fastrand::f64() >= share {
            return;
        }
        let served = head.and_then(|head| head.served.as_ref());
        let refused = head.and_then(|head| head.refused);
        let trace = self.trace.map(|trace| trace.to_string());
        tracing::info!(
            target: "access",
            method = self.method.as_str(),
            path,
            route = head.and_then(|head| head.route.as_ref()).map(|route| &**route.name()),
            status = head.map(|head| head.status.as_u16()),
            service = served.map(|served| &**served.endpoint().service()),
            endpoint = served.map(|served| &**served.endpoint().id()),
            attempts = served.map(Served::attempts),
            refused_by = refused.map(|(layer, _)| layer),
            reason = refused.map(|(_, reason)| reason),
            head_ms = head.map(|head| millis(head.after)),
            total_ms = millis(took),
            bytes = self.bytes,
            complete = self.whole,
            peer = self.peer.map(|PeerAddress(peer)| tracing::field::display(peer)),
            trace = trace.as_deref(),
        );
    }
}

/// Three digits of a millisecond.
fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

impl Guard for Watch {
    fn data(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
    }

    fn end(&mut self) {
        self.whole = true;
    }
}

/// However it ended: at the end of the body, or because somebody went away.
impl Drop for Watch {
    fn drop(&mut self) {
        let telemetry = &self.state.telemetry;
        telemetry.active.fetch_sub(1, Ordering::Relaxed);
        let took = self.clock.now().since(self.started);
        let head = self.head.take();
        // Who went away before there was an answer is counted as nginx has it.
        let status =
            head.as_ref().map_or(StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST), |head| head.status);
        let route = head.as_ref().and_then(|head| head.route.as_ref()).map(Route::name);
        let refused = head.as_ref().and_then(|head| head.refused).unwrap_or_default();
        telemetry.series(Labels::new(route, &self.method, status, refused)).record(took, self.bytes);
        self.log(head.as_ref(), took);
    }
}
