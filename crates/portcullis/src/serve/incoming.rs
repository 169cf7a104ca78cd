//! The body of a request.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::RecvStream;
use http::HeaderMap;
use http::header::CONTENT_LENGTH;
use http_body::{Body, Frame, SizeHint};

use super::BoxError;
use super::h1::Reader;
use super::stream::GoAhead;

/// The body of a request, as it arrives. What is not asked for is not taken from the client, and one that waits with it
/// (`Expect: 100-continue`) hears when it is. Dropped before its end, it closes the connection of HTTP/1.1 after the answer,
/// and ends the stream of HTTP/2.
pub struct Incoming(Source);

enum Source {
    /// What there is, or was, of it.
    Whole(Bytes),
    Http1(Reader),
    Hyper(hyper::body::Incoming),
    Http2 {
        stream: RecvStream,
        /// What is still to come, if its length was announced.
        left: Option<u64>,
        /// Whether it was asked for.
        is_wanted: bool,
        /// Whether only trailers can follow.
        data_is_over: bool,
        /// Who waits to be told that it is wanted.
        expects: Option<GoAhead>,
    },
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

    pub(super) fn hyper(body: hyper::body::Incoming) -> Self {
        Self(Source::Hyper(body))
    }

    /// The body, and what is said in it if the client waits until it is asked for.
    pub(super) fn http2(stream: RecvStream, headers: &HeaderMap) -> (Self, Option<GoAhead>) {
        if stream.is_end_stream() {
            return (Self::whole(Bytes::new()), None);
        }
        let (left, expects) = (announced(headers), GoAhead::of(headers));
        let go_ahead = expects.clone();
        (Self(Source::Http2 { stream, left, is_wanted: false, data_is_over: false, expects }), go_ahead)
    }
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let (stream, left, data_is_over) = match &mut self.get_mut().0 {
            Source::Whole(bytes) => {
                let bytes = std::mem::take(bytes);
                return Poll::Ready((!bytes.is_empty()).then(|| Ok(Frame::data(bytes))));
            }
            Source::Http1(body) => {
                return Pin::new(body).poll_frame(cx).map(|frame| frame.map(|frame| frame.map_err(Into::into)));
            }
            Source::Hyper(body) => {
                return Pin::new(body).poll_frame(cx).map(|frame| frame.map(|frame| frame.map_err(Into::into)));
            }
            Source::Http2 { stream, left, is_wanted, data_is_over, expects } => {
                *is_wanted = true;
                if let Some(expects) = expects.take() {
                    expects.say();
                }
                (stream, left, data_is_over)
            }
        };
        let data = if *data_is_over { None } else { ready!(stream.poll_data(cx)) };
        let frame = match data {
            Some(data) => data.map(|data| {
                // The client may send as much again, now that this goes on.
                _ = stream.flow_control().release_capacity(data.len());
                *left = left.map(|left| left.saturating_sub(data.len() as u64));
                Some(Frame::data(data))
            }),
            None => {
                *data_is_over = true;
                ready!(stream.poll_trailers(cx)).map(|trailers| trailers.map(Frame::trailers))
            }
        };
        // Whatever a client says of its reset, the request is not whole.
        Poll::Ready(frame.map_err(Into::into).transpose())
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Source::Whole(bytes) => bytes.is_empty(),
            Source::Http1(body) => body.is_end_stream(),
            Source::Hyper(body) => body.is_end_stream(),
            // It was not when it came, and to ask takes a lock.
            Source::Http2 { stream, is_wanted, .. } => *is_wanted && stream.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Source::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Source::Http1(body) => body.size_hint(),
            Source::Hyper(body) => body.size_hint(),
            Source::Http2 { left, .. } => left.map_or_else(SizeHint::default, SizeHint::with_exact),
        }
    }
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming").field("over", &self.is_end_stream()).finish_non_exhaustive()
    }
}

/// The length a head says, if it says one.
fn announced(headers: &HeaderMap) -> Option<u64> {
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    let first = lengths.next()?;
    let agree = lengths.all(|other| other == first);
    first.to_str().ok().filter(|_| agree)?.parse().ok()
}
