//! Tells a request's [`Observer`] what it meets on its way.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http::{Request, Response};
use pin_project_lite::pin_project;
use portcullis_core::{Carried, Head, Layer, Observer, Permit};
use tower_service::Service;

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
        if let Some(observer) = Observer::of(request.extensions()) {
            observer.passed(self.layer);
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
        let mut observer = Observer::of(request.extensions()).cloned();
        if let Some(told) = &observer {
            match Permit::of(request.extensions()).map(|permit| permit.endpoint().clone()) {
                Some(endpoint) => told.sending(&endpoint, request.headers_mut()),
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
            && let Some(observer) = this.unanswered.0.take()
        {
            observer.answered(Head::of(response));
        }
        Poll::Ready(answer)
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        if let Some(observer) = self.0.take() {
            observer.given_up();
        }
    }
}
