//! What every layer owes the service it wraps and the service that wraps it.
//!
//! [`holds`] checks the list for one layer; what is particular to a layer (which clones share what) is the layer's own
//! test.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::channel::{mpsc, oneshot};
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::BodyExt;
use http_body_util::channel::{Channel, Sender};
use std::sync::{Mutex, PoisonError};
use tower_layer::Layer;
use tower_service::Service;

/// The error of a probe and of its bodies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken(pub &'static str);

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Broken {}

/// A body whose frames a test sends one by one.
pub type ProbeBody = Channel<Bytes, Broken>;

/// An inner service whose readiness and answers a test decides, and which insists on being ready when it is called.
#[derive(Debug)]
pub struct Probe<B> {
    shared: Arc<Shared>,
    calls: mpsc::UnboundedSender<Call<B>>,
    ready: bool,
}

/// One call that reached a [`Probe`].
#[derive(Debug)]
pub struct Call<B> {
    /// What it was called with.
    pub request: Request<B>,
    answer: oneshot::Sender<Result<Response<ProbeBody>, Broken>>,
}

/// The test's end of a [`Probe`].
#[derive(Debug)]
pub struct Calls<B> {
    shared: Arc<Shared>,
    calls: mpsc::UnboundedReceiver<Call<B>>,
}

#[derive(Debug, Default)]
struct Shared {
    readiness: Mutex<Readiness>,
    called: AtomicUsize,
}

#[derive(Debug, Default)]
enum Readiness {
    #[default]
    Ready,
    Pending(Vec<std::task::Waker>),
    Broken,
}

/// The probe's answer to come.
#[derive(Debug)]
pub struct Answering(oneshot::Receiver<Result<Response<ProbeBody>, Broken>>);

// === impl Probe ===

/// A probe and the test's end of it.
#[must_use]
pub fn probe<B>() -> (Probe<B>, Calls<B>) {
    let (sender, receiver) = mpsc::unbounded();
    let shared = Arc::<Shared>::default();
    (Probe { shared: shared.clone(), calls: sender, ready: false }, Calls { shared, calls: receiver })
}

/// A body and the end that feeds it.
#[must_use]
pub fn body() -> (Sender<Bytes, Broken>, ProbeBody) {
    Channel::new(16)
}

/// A body of one chunk.
#[must_use]
pub fn full(chunk: &'static str) -> ProbeBody {
    let (mut feed, body) = body();
    let _ = feed.try_send(http_body::Frame::data(Bytes::from_static(chunk.as_bytes())));
    body
}

impl<B> Clone for Probe<B> {
    /// Readiness does not carry over to a clone.
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone(), calls: self.calls.clone(), ready: false }
    }
}

impl<B> Service<Request<B>> for Probe<B> {
    type Response = Response<ProbeBody>;
    type Error = Broken;
    type Future = Answering;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        match &mut *self.shared.readiness.lock().unwrap_or_else(PoisonError::into_inner) {
            Readiness::Ready => {
                self.ready = true;
                Poll::Ready(Ok(()))
            }
            Readiness::Pending(wakers) => {
                wakers.push(cx.waker().clone());
                Poll::Pending
            }
            Readiness::Broken => Poll::Ready(Err(Broken("not ready, and never again"))),
        }
    }

    fn call(&mut self, request: Request<B>) -> Answering {
        assert!(std::mem::take(&mut self.ready), "an inner service was called that had not said it is ready");
        self.shared.called.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        let _ = self.calls.unbounded_send(Call { request, answer });
        Answering(answered)
    }
}

impl Future for Answering {
    type Output = Result<Response<ProbeBody>, Broken>;

    fn poll(mut self: std::pin::Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll_unpin(cx).map(|answer| answer.unwrap_or(Err(Broken("nobody answered"))))
    }
}

// === impl Calls ===

impl<B> Calls<B> {
    /// The next call that reaches the probe.
    ///
    /// # Panics
    ///
    /// When none does within a minute of (usually paused) time.
    pub async fn next(&mut self) -> Call<B> {
        use futures::StreamExt;
        let call = tokio::time::timeout(Duration::from_secs(60), self.calls.next()).await;
        call.ok().flatten().expect("a call that reaches the inner service")
    }

    /// How many calls reached the probe.
    #[must_use]
    pub fn count(&self) -> usize {
        self.shared.called.load(Ordering::Relaxed)
    }

    /// Makes the probe not ready until [`be_ready`](Self::be_ready).
    pub fn be_pending(&self) {
        *self.shared.readiness.lock().unwrap_or_else(PoisonError::into_inner) = Readiness::Pending(Vec::new());
    }

    /// Makes the probe ready and wakes who waits for that.
    pub fn be_ready(&self) {
        let mut readiness = self.shared.readiness.lock().unwrap_or_else(PoisonError::into_inner);
        if let Readiness::Pending(wakers) = std::mem::take(&mut *readiness) {
            wakers.into_iter().for_each(std::task::Waker::wake);
        }
    }

    /// Makes the probe fail its readiness for ever.
    pub fn break_readiness(&self) {
        *self.shared.readiness.lock().unwrap_or_else(PoisonError::into_inner) = Readiness::Broken;
    }
}

// === impl Call ===

impl<B> Call<B> {
    /// Answers.
    pub fn answer(self, response: Response<ProbeBody>) -> Request<B> {
        let _ = self.answer.send(Ok(response));
        self.request
    }

    /// Fails.
    pub fn fail(self) -> Request<B> {
        let _ = self.answer.send(Err(Broken("failed as told")));
        self.request
    }

    /// Whether the caller has gone away.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.answer.is_canceled()
    }
}

// === the list ===

/// Checks the list for `layer`, with requests that it admits, made by `request` around a body. `B` is the body the layer
/// gives the inner service.
///
/// Run it with paused time. It checks that readiness passes through, also when it is an error; that no service is called
/// that was not ready; that the service and its futures can be sent and the service shared; that clones work; that both
/// bodies stream, with their trailers; that a call dropped halfway is dropped below too.
///
/// # Panics
///
/// When the layer breaks the contract.
pub async fn holds<B, L, R>(layer: L, request: impl Fn(ProbeBody) -> Request<ProbeBody>)
where
    L: Layer<Probe<B>>,
    L::Service: Service<Request<ProbeBody>, Response = Response<R>> + Clone + Send + Sync + 'static,
    <L::Service as Service<Request<ProbeBody>>>::Future: Send,
    <L::Service as Service<Request<ProbeBody>>>::Error: Debug,
    B: http_body::Body<Data = Bytes> + Unpin,
    B::Error: Debug,
    R: http_body::Body<Data = Bytes> + Send + Unpin,
    R::Error: Debug,
{
    readiness_passes_through(&layer).await;
    a_clone_is_made_ready_before_it_is_called(&layer, &request).await;
    bodies_stream_with_their_trailers(&layer, &request).await;
    a_dropped_call_is_dropped_below(&layer, &request).await;
}

async fn ready<S: Service<Q>, Q>(service: &mut S) -> Result<(), S::Error> {
    std::future::poll_fn(|cx| service.poll_ready(cx)).await
}

async fn readiness_passes_through<B, L>(layer: &L)
where
    L: Layer<Probe<B>>,
    L::Service: Service<Request<ProbeBody>>,
    <L::Service as Service<Request<ProbeBody>>>::Error: Debug,
{
    let (probe, calls) = probe();
    let mut service = layer.layer(probe);
    calls.be_pending();
    assert!(ready(&mut service).now_or_never().is_none(), "ready although the inner service is not");
    calls.be_ready();
    ready(&mut service).await.expect("ready once the inner service is");
    calls.break_readiness();
    assert!(ready(&mut service).await.is_err(), "an error of readiness does not pass through");
}

async fn a_clone_is_made_ready_before_it_is_called<B, L, R>(
    layer: &L,
    request: &impl Fn(ProbeBody) -> Request<ProbeBody>,
) where
    L: Layer<Probe<B>>,
    L::Service: Service<Request<ProbeBody>, Response = Response<R>> + Clone,
    <L::Service as Service<Request<ProbeBody>>>::Error: Debug,
{
    let (probe, mut calls) = probe();
    let mut service = layer.layer(probe);
    for _ in 0..3 {
        let mut clone = service.clone();
        for service in [&mut service, &mut clone] {
            ready(service).await.expect("a ready service");
            let call = service.call(request(full("")));
            let serve = async { calls.next().await.answer(Response::new(full("ok"))) };
            let (response, _) = futures::join!(call, serve);
            assert_eq!(response.expect("an answer").status(), 200, "the request was refused");
        }
    }
}

async fn bodies_stream_with_their_trailers<B, L, R>(layer: &L, request: &impl Fn(ProbeBody) -> Request<ProbeBody>)
where
    L: Layer<Probe<B>>,
    L::Service: Service<Request<ProbeBody>, Response = Response<R>>,
    <L::Service as Service<Request<ProbeBody>>>::Error: Debug,
    B: http_body::Body<Data = Bytes> + Unpin,
    B::Error: Debug,
    R: http_body::Body<Data = Bytes> + Unpin,
    R::Error: Debug,
{
    let trailers = HeaderMap::from_iter([(http::HeaderName::from_static("x-sum"), HeaderValue::from_static("1"))]);
    let (probe, mut calls) = probe();
    let mut service = layer.layer(probe);
    ready(&mut service).await.expect("a ready service");
    let (mut upload, body) = self::body();
    let (mut download, answer) = self::body();
    let call = service.call(request(body));
    let serve = async {
        let call = calls.next().await;
        upload.send_data("one".into()).await.expect("somebody who reads");
        call.answer(Response::new(answer))
    };
    let (response, received) = futures::join!(call, serve);
    let mut received = received.into_body();
    let first = received.frame().await.expect("a frame").expect("a sound one").into_data();
    assert_eq!(first.ok().as_deref(), Some(&b"one"[..]), "the first chunk comes before the second is written");
    upload.send_trailers(trailers.clone()).await.expect("somebody who reads");
    drop(upload);
    let last = received.frame().await.expect("trailers").expect("sound ones").into_trailers();
    assert_eq!(last.ok().as_ref(), Some(&trailers), "the request's trailers are lost");

    let mut response = response.expect("an answer").into_body();
    download.send_data("two".into()).await.expect("somebody who reads");
    let first = response.frame().await.expect("a frame").expect("a sound one").into_data();
    assert_eq!(first.ok().as_deref(), Some(&b"two"[..]), "the first chunk comes before the second is written");
    download.send_trailers(trailers.clone()).await.expect("somebody who reads");
    drop(download);
    let last = response.frame().await.expect("trailers").expect("sound ones").into_trailers();
    assert_eq!(last.ok().as_ref(), Some(&trailers), "the response's trailers are lost");
}

async fn a_dropped_call_is_dropped_below<B, L, R>(layer: &L, request: &impl Fn(ProbeBody) -> Request<ProbeBody>)
where
    L: Layer<Probe<B>>,
    L::Service: Service<Request<ProbeBody>, Response = Response<R>>,
    <L::Service as Service<Request<ProbeBody>>>::Error: Debug,
{
    let (probe, mut calls) = probe();
    let mut service = layer.layer(probe);
    ready(&mut service).await.expect("a ready service");
    let mut call = Box::pin(service.call(request(full(""))));
    let inner = loop {
        assert!(futures::poll!(&mut call).is_pending(), "answered before anybody did");
        match calls.calls.try_recv() {
            Ok(inner) => break inner,
            Err(_) => tokio::task::yield_now().await,
        }
    };
    assert!(!inner.is_cancelled());
    drop(call);
    assert!(inner.is_cancelled(), "the inner call goes on although nobody waits for it");

    ready(&mut service).await.expect("a ready service");
    let (mut feed, body) = self::body();
    let call = service.call(request(full("")));
    let serve = async { calls.next().await.answer(Response::new(body)) };
    let (response, _) = futures::join!(call, serve);
    drop(response);
    assert!(feed.send_data("nobody".into()).await.is_err(), "the inner body lives on although nobody reads it");
}
