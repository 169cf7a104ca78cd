//! What a gateway answers with.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{HeaderValue, Request, Response};
use http_body::{Frame, SizeHint};
use pin_project_lite::pin_project;
use portcullis_core::{Body, Route as Matched};
use portcullis_forward::BoxError;
use tower_service::Service;

use super::answer::Cors;
use super::{Stack, StackBody};

pin_project! {
    /// The body of a [`Gateway`]'s answer.
    pub struct GatewayBody {
        #[pin]
        inner: StackBody,
    }
}

pin_project! {
    /// The answer of a [`Gateway`].
    pub struct ResponseFuture<B>
    where
        Stack: Service<Request<B>>,
    {
        #[pin]
        pub(super) state: State<<Stack as Service<Request<B>>>::Future>,
    }
}

pin_project! {
    #[project = Project]
    pub(super) enum State<F> {
        Called { #[pin] future: F, after: Option<Box<After>> },
        Answered { response: Option<Response<GatewayBody>> },
    }
}

/// What is to be done to a response.
pub(super) struct After {
    pub(super) route: Option<Matched>,
    pub(super) cors: Option<(Cors, Option<HeaderValue>)>,
}

// === impl ResponseFuture ===

impl<B> Future for ResponseFuture<B>
where
    Stack: Service<Request<B>, Response = Response<StackBody>, Error = std::convert::Infallible>,
{
    type Output = Result<Response<GatewayBody>, std::convert::Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            Project::Called { future, after } => {
                let Ok(mut response) = ready!(future.poll(cx));
                if let Some(After { route, cors }) = after.take().map(|after| *after) {
                    if let Some((cors, origin)) = cors {
                        cors.leave(origin.as_ref(), response.headers_mut());
                    }
                    if let Some(route) = route {
                        response.extensions_mut().insert(route);
                    }
                }
                Poll::Ready(Ok(response.map(GatewayBody::new)))
            }
            Project::Answered { response } => {
                response.take().map_or(Poll::Pending, |response| Poll::Ready(Ok(response)))
            }
        }
    }
}

impl<B> fmt::Debug for ResponseFuture<B>
where
    Stack: Service<Request<B>>,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}

// === impl GatewayBody ===

impl GatewayBody {
    pub(super) const fn new(inner: StackBody) -> Self {
        Self { inner }
    }

    pub(super) fn empty() -> Self {
        Self::new(Body::refusal(Bytes::new()))
    }
}

impl http_body::Body for GatewayBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        self.project().inner.poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl fmt::Debug for GatewayBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("GatewayBody").finish()
    }
}
