//! What a request meets on its way, told while it happens: for logs and spans.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use http::{HeaderMap, Request, Response};
use pin_project_lite::pin_project;
use portcullis_core::{Carried, Endpoint, Head, Layer, Permit};
use tower_service::Service;

/// Is told what one request meets on its way. It is called in the request's own task: it must be quick.
pub trait Observe: Send + Sync + 'static {
    /// The request has passed this layer: auth, rate limit, or discovery.
    fn passed(&self, layer: Layer) {
        let _ = layer;
    }

    /// An attempt begins: the request goes to this endpoint, with these headers.
    fn sending(&self, endpoint: &Endpoint, headers: &mut HeaderMap) {
        let _ = (endpoint, headers);
    }

    /// The attempt that began last was answered. What went wrong on the way is an answer with a
    /// [`Rejection`](portcullis_core::Rejection), as everywhere.
    fn answered(&self, head: Head<'_>) {
        let _ = head;
    }

    /// The attempt that began last was given up before there was an answer.
    fn given_up(&self) {}
}

/// Left in a request's extensions, it has [`Observe`] told what becomes of that request in a
/// [`Gateway`](super::Gateway).
#[derive(Clone)]
pub struct Observer(Arc<dyn Observe>);

/// Tells that a request came so far.
#[derive(Clone)]
pub(super) struct Passed<S> {
    inner: S,
    layer: Layer,
}

/// Tells of each attempt.
#[derive(Clone)]
pub(super) struct Sent<S> {
    inner: S,
}

pin_project! {
    /// An attempt under way.
    pub(super) struct Sending<F> {
        #[pin]
        inner: F,
        unanswered: Unanswered,
    }
}

/// Whom to tell that there was no answer.
struct Unanswered(Option<Observer>);

// === impl Observer ===

impl Observer {
    /// Has this one told.
    #[must_use]
    pub fn new(observe: Arc<impl Observe>) -> Self {
        Self(observe)
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observer").finish_non_exhaustive()
    }
}

// === impl Passed ===

impl<S> Passed<S> {
    pub(super) const fn new(layer: Layer, inner: S) -> Self {
        Self { inner, layer }
    }
}

impl<S: Service<Request<B>>, B> Service<Request<B>> for Passed<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> S::Future {
        if let Some(Observer(observe)) = request.extensions().get() {
            observe.passed(self.layer);
        }
        self.inner.call(request)
    }
}

// === impl Sent ===

impl<S> Sent<S> {
    pub(super) const fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S, B, R> Service<Request<B>> for Sent<S>
where
    S: Service<Request<B>, Response = Response<R>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Sending<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Sending<S::Future> {
        let mut observer = request.extensions().get::<Observer>().cloned();
        if let Some(Observer(observe)) = &observer {
            match Permit::of(request.extensions()).map(|permit| permit.endpoint().clone()) {
                Some(endpoint) => observe.sending(&endpoint, request.headers_mut()),
                None => observer = None,
            }
        }
        Sending { inner: self.inner.call(request), unanswered: Unanswered(observer) }
    }
}

// === impl Sending ===

impl<F, R, E> Future for Sending<F>
where
    F: Future<Output = Result<Response<R>, E>>,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let answer = ready!(this.inner.poll(cx));
        if let Ok(response) = &answer
            && let Some(Observer(observe)) = this.unanswered.0.take()
        {
            observe.answered(Head::of(response));
        }
        Poll::Ready(answer)
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        if let Some(Observer(observe)) = self.0.take() {
            observe.given_up();
        }
    }
}
