//! Streams whose reader does not read.
//!
//! An HTTP/2 client says how much it takes of each stream. Where it takes nothing, the connection itself is well, and the
//! body is not asked for more: nothing in it can notice the time. What a stream is at is therefore noted whenever its task
//! is polled, and a stream that waits for its reader for too long ends, by `RST_STREAM`, and lets go of all it holds.

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_LENGTH;
use http::{Method, Response};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::transport::Stall;

thread_local! {
    /// What the stream that is polled was last seen at.
    static SEEN: Cell<Option<At>> = const { Cell::new(None) };
}

/// What a stream waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    /// The answer, or more of it.
    Service,
    /// A reader who takes what there is.
    Reader,
}

/// Spawns streams.
#[derive(Clone, Copy)]
pub(super) struct Streams {
    /// How long a reader may take nothing.
    pub(super) patience: Duration,
}

pin_project! {
    struct Stream<F> {
        #[pin]
        inner: F,
        at: At,
        stall: Stall,
    }
}

pin_project! {
    /// An answer, whose body notes when it is asked for more.
    pub(super) struct Answer<F> {
        #[pin]
        inner: F,
        // Asked with `HEAD`: the body stays here. Over HTTP/1.1 hyper sees to that.
        bare: bool,
    }
}

pin_project! {
    pub(super) struct Paced<B> {
        #[pin]
        inner: B,
        bare: bool,
    }
}

impl<F> hyper::rt::Executor<F> for Streams
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, inner: F) {
        tokio::spawn(Stream { inner, at: At::Service, stall: Stall::new(self.patience) });
    }
}

impl<F: Future<Output = ()>> Future for Stream<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        SEEN.set(None);
        if this.inner.poll(cx).is_ready() {
            return Poll::Ready(());
        }
        if let Some(at) = SEEN.take() {
            *this.at = at;
            // It has moved.
            _ = this.stall.watch(cx, Poll::Ready(Ok(())));
        }
        match *this.at {
            At::Service => Poll::Pending,
            At::Reader => this.stall.watch::<()>(cx, Poll::Pending).map(drop),
        }
    }
}

impl<F> Answer<F> {
    pub(super) fn new(method: &Method, inner: F) -> Self {
        Self { inner, bare: *method == Method::HEAD }
    }
}

impl<F, B, E> Future for Answer<F>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: Body,
{
    type Output = Result<Response<Paced<B>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let mut response = ready!(this.inner.poll(cx))?;
        let length = response.body().size_hint().exact().filter(|length| *this.bare && *length > 0);
        if let Some(length) = length {
            response.headers_mut().entry(CONTENT_LENGTH).or_insert(length.into());
        }
        SEEN.set(Some(At::Reader));
        Poll::Ready(Ok(response.map(|inner| Paced { inner, bare: *this.bare })))
    }
}

impl<B> Body for Paced<B>
where
    B: Body<Data = Bytes>,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = self.project();
        if *this.bare {
            return Poll::Ready(None);
        }
        let frame = this.inner.poll_frame(cx);
        SEEN.set(Some(if frame.is_pending() { At::Service } else { At::Reader }));
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.bare || self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
