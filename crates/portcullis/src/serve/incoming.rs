//! The body of a request.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::RecvStream;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use portcullis_wire::Received;

use super::BoxError;
use super::h1::Reader;
use super::stream::GoAhead;
use super::transport::Line;

/// The body of a request, as it arrives. What is not asked for is not taken from the client, and one that waits with it
/// (`Expect: 100-continue`) hears when it is. Dropped before its end, it closes the connection of HTTP/1.1 after the answer,
/// and ends the stream of HTTP/2.
pub struct Incoming(Source);

enum Source {
    /// What there is, or was, of it.
    Whole(Bytes),
    Http1(Reader),
    Hyper(Hyper),
    Http2 {
        body: Received,
        /// Whether it was asked for.
        is_wanted: bool,
        /// Who waits to be told that it is wanted.
        expects: Option<GoAhead>,
    },
}

/// What hyper reads of a connection, which is to know if nobody wants the rest.
struct Hyper {
    body: hyper::body::Incoming,
    line: Arc<Line>,
    /// Its end was seen, which of one in chunks it does not say itself.
    is_over: bool,
}

// === impl Incoming ===

impl Incoming {
    /// A body that has arrived.
    pub(super) fn whole(body: Bytes) -> Self {
        Self(Source::Whole(body))
    }

    pub(super) fn http1(body: Reader) -> Self {
        Self(Source::Http1(body))
    }

    pub(super) fn hyper(body: hyper::body::Incoming, line: Arc<Line>) -> Self {
        Self(Source::Hyper(Hyper { body, line, is_over: false }))
    }

    /// The body, and what is said in it if the client waits until it is asked for.
    pub(super) fn http2(stream: RecvStream, headers: &HeaderMap) -> (Self, Option<GoAhead>) {
        if stream.is_end_stream() {
            return (Self::whole(Bytes::new()), None);
        }
        let (body, expects) = (Received::new(stream, headers), GoAhead::of(headers));
        let go_ahead = expects.clone();
        (Self(Source::Http2 { body, is_wanted: false, expects }), go_ahead)
    }
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match &mut self.get_mut().0 {
            Source::Whole(bytes) => {
                let bytes = std::mem::take(bytes);
                Poll::Ready((!bytes.is_empty()).then(|| Ok(Frame::data(bytes))))
            }
            Source::Http1(body) => Pin::new(body).poll_frame(cx).map(told),
            Source::Hyper(Hyper { body, is_over, .. }) => {
                let frame = ready!(Pin::new(body).poll_frame(cx));
                *is_over |= !matches!(&frame, Some(Ok(frame)) if frame.is_data());
                Poll::Ready(told(frame))
            }
            Source::Http2 { body, is_wanted, expects } => {
                *is_wanted = true;
                if let Some(expects) = expects.take() {
                    expects.say();
                }
                body.poll_frame(cx).map(told)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Source::Whole(bytes) => bytes.is_empty(),
            Source::Http1(body) => body.is_end_stream(),
            Source::Hyper(Hyper { body, .. }) => body.is_end_stream(),
            // It was not when it came, and to ask takes a lock.
            Source::Http2 { body, is_wanted, .. } => *is_wanted && body.is_over(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Source::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Source::Http1(body) => body.size_hint(),
            Source::Hyper(Hyper { body, .. }) => body.size_hint(),
            Source::Http2 { body, .. } => body.size_hint(),
        }
    }
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming").field("over", &self.is_end_stream()).finish_non_exhaustive()
    }
}

impl Drop for Hyper {
    fn drop(&mut self) {
        if !self.is_over && !self.body.is_end_stream() {
            self.line.is_left_unread();
        }
    }
}

fn told<E: Into<BoxError>>(frame: Option<Result<Frame<Bytes>, E>>) -> Option<Result<Frame<Bytes>, BoxError>> {
    frame.map(|frame| frame.map_err(Into::into))
}
