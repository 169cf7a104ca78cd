//! A request on its way out: its head, and its body as it comes.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use http::HeaderMap;
use http_body::Body as _;
use tokio::io::AsyncWrite;

use super::head::{Asked, Length, write_field};
use crate::upload::Outgoing;

/// What is still to be written.
#[derive(Default)]
pub(super) struct Sending {
    /// Head, chunk lines, and small frames.
    buffer: Vec<u8>,
    /// How much of the buffer has been written.
    at: usize,
    /// A frame that is too large to be copied, behind the buffer.
    data: Bytes,
    /// What follows it.
    tail: &'static [u8],
    body: Rest,
    /// Bytes that the transport took.
    pub(super) written: u64,
}

/// What is still to come from the caller.
#[derive(Default)]
enum Rest {
    #[default]
    Nothing,
    Exact(Outgoing, u64),
    Chunked(Outgoing),
}

/// Why a request did not get out.
#[derive(Debug)]
pub(crate) enum SendError {
    Io(io::Error),
    /// The caller's body failed.
    Body,
    /// The body is longer or shorter than it said.
    Length,
}

/// Frames up to this are copied together: one piece is cheaper to send than several.
const SMALL: usize = 2048;
/// A buffer that grew beyond this is not kept.
const KEPT: usize = 4096;

// === impl Sending ===

impl Sending {
    pub(super) fn start(&mut self, head: &Asked<'_>, body: Outgoing) {
        self.written = 0;
        self.body = match head.length {
            Length::None => Rest::Nothing,
            Length::Exact(length) => Rest::Exact(body, length),
            Length::Chunked => Rest::Chunked(body),
        };
        head.write(&mut self.buffer);
    }

    /// Ready when all has been sent.
    pub(super) fn poll<W>(&mut self, io: &mut W, cx: &mut Context<'_>) -> Poll<Result<(), SendError>>
    where
        W: AsyncWrite + Unpin,
    {
        loop {
            // A frame that is at hand goes out with what waits before it.
            let more = self.data.is_empty() && self.buffer.len() - self.at < SMALL;
            let waits = more && self.poll_body(cx)?.is_pending();
            ready!(self.poll_write(io, cx)).map_err(SendError::Io)?;
            if matches!(self.body, Rest::Nothing) {
                return Poll::Ready(Ok(()));
            }
            if waits {
                return Poll::Pending;
            }
        }
    }

    /// Takes one frame from the caller, or learns that there is none.
    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SendError>> {
        let (body, exact) = match &mut self.body {
            Rest::Nothing => return Poll::Ready(Ok(())),
            Rest::Exact(body, left) => (body, Some(left)),
            Rest::Chunked(body) => (body, None),
        };
        let frame = match ready!(Pin::new(body).poll_frame(cx)) {
            Some(Ok(frame)) => frame,
            Some(Err(_)) => return Poll::Ready(Err(SendError::Body)),
            None => return Poll::Ready(self.finish(None)),
        };
        match (frame.into_data(), exact) {
            (Ok(data), _) if data.is_empty() => {}
            (Ok(data), Some(left)) => match left.checked_sub(data.len() as u64) {
                Some(rest) => {
                    *left = rest;
                    self.push(data, b"");
                    if rest == 0 {
                        self.body = Rest::Nothing;
                    }
                }
                None => return Poll::Ready(Err(SendError::Length)),
            },
            (Ok(data), None) => {
                self.buffer.extend_from_slice(format!("{:x}\r\n", data.len()).as_bytes());
                self.push(data, b"\r\n");
            }
            (Err(frame), _) => return Poll::Ready(self.finish(frame.into_trailers().ok().as_ref())),
        }
        Poll::Ready(Ok(()))
    }

    fn push(&mut self, data: Bytes, tail: &'static [u8]) {
        if data.len() <= SMALL {
            self.buffer.extend_from_slice(&data);
            self.buffer.extend_from_slice(tail);
        } else {
            (self.data, self.tail) = (data, tail);
        }
    }

    /// The body is over.
    fn finish(&mut self, trailers: Option<&HeaderMap>) -> Result<(), SendError> {
        match std::mem::take(&mut self.body) {
            Rest::Exact(_, 1..) => return Err(SendError::Length),
            Rest::Exact(..) | Rest::Nothing => {}
            Rest::Chunked(_) => {
                self.buffer.extend_from_slice(b"0\r\n");
                for (name, value) in trailers.into_iter().flatten() {
                    write_field(&mut self.buffer, name, value);
                }
                self.buffer.extend_from_slice(b"\r\n");
            }
        }
        Ok(())
    }

    fn poll_write<W: AsyncWrite + Unpin>(&mut self, io: &mut W, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.buffer.is_empty() && self.data.is_empty() {
            return Pin::new(io).poll_flush(cx);
        }
        loop {
            let before = &self.buffer[self.at..];
            let mut count = if self.data.is_empty() {
                ready!(Pin::new(&mut *io).poll_write(cx, before))?
            } else {
                let slices = [IoSlice::new(before), IoSlice::new(&self.data), IoSlice::new(self.tail)];
                ready!(Pin::new(&mut *io).poll_write_vectored(cx, &slices))?
            };
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += count as u64;
            let head = count.min(before.len());
            self.at += head;
            count -= head;
            let data = count.min(self.data.len());
            self.data.advance(data);
            self.tail = &self.tail[count - data..];
            if self.at == self.buffer.len() && self.data.is_empty() {
                // What follows a frame is short, and goes out with the next.
                self.buffer.clear();
                self.at = 0;
                self.buffer.extend_from_slice(std::mem::take(&mut self.tail));
                if self.buffer.is_empty() {
                    return Pin::new(io).poll_flush(cx);
                }
            }
        }
    }

    /// Whether nothing is left to be sent.
    pub(super) fn is_done(&self) -> bool {
        matches!(self.body, Rest::Nothing) && self.buffer.is_empty() && self.data.is_empty()
    }

    /// Drops what is still to be sent.
    pub(super) fn give_up(&mut self) {
        let written = self.written;
        *self = Self { written, ..Self::default() };
    }

    /// Gives back what is not worth keeping between two requests.
    pub(super) fn rest(&mut self) {
        if self.buffer.capacity() > KEPT {
            self.buffer = Vec::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{HeaderValue, Method};
    use http_body::Frame;
    use http_body_util::{BodyExt, StreamBody};
    use tokio_test::io::Builder;

    fn asked(length: Length) -> Asked<'static> {
        static HOST: HeaderValue = HeaderValue::from_static("a");
        static NONE: std::sync::LazyLock<HeaderMap> = std::sync::LazyLock::new(HeaderMap::new);
        Asked { method: &Method::PUT, target: "/", host: &HOST, headers: &NONE, upgrade: None, length }
    }

    fn body(frames: Vec<Frame<Bytes>>) -> Outgoing {
        let frames = frames.into_iter().map(Ok::<_, std::convert::Infallible>);
        Outgoing::new(StreamBody::new(futures::stream::iter(frames)).boxed_unsync(), None, None).0
    }

    /// What is sent, however little the transport takes at once.
    async fn sent(length: Length, frames: &[Frame<Bytes>], wire: &[u8]) -> Result<(), SendError> {
        for step in [1, 3, 1000, 1 << 20] {
            let mut io = Builder::new();
            for piece in wire.chunks(step) {
                io.write(piece);
            }
            let mut io = io.build();
            let mut sending = Sending::default();
            let copies = frames.iter().map(|frame| match frame.data_ref() {
                Some(data) => Frame::data(data.clone()),
                None => Frame::trailers(frame.trailers_ref().cloned().unwrap_or_default()),
            });
            sending.start(&asked(length), body(copies.collect()));
            std::future::poll_fn(|cx| sending.poll(&mut io, cx)).await?;
            assert!(sending.is_done());
            assert_eq!(sending.written, wire.len() as u64);
        }
        Ok(())
    }

    #[tokio::test]
    async fn a_body_is_framed_as_its_head_says() {
        let data = |text: &'static str| Frame::data(Bytes::from(text));
        let large = Bytes::from(vec![b'x'; SMALL + 1]);
        let head = "PUT / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\n";
        sent(Length::Exact(5), &[data("he"), data(""), data("llo")], format!("{head}hello").as_bytes()).await.unwrap();
        let head = "PUT / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
        let trailers = HeaderMap::from_iter([(http::header::ETAG, HeaderValue::from_static("x"))]);
        let wire =
            [format!("{head}2\r\nhe\r\n801\r\n").as_bytes(), &large, b"\r\n3\r\nllo\r\n0\r\netag: x\r\n\r\n"].concat();
        let frames = [data("he"), Frame::data(large), data("llo"), Frame::trailers(trailers)];
        sent(Length::Chunked, &frames, &wire).await.unwrap();
        sent(Length::Chunked, &[], format!("{head}0\r\n\r\n").as_bytes()).await.unwrap();
    }

    #[tokio::test]
    async fn a_body_that_is_not_as_long_as_it_said_is_not_sent_as_if_it_were() {
        for (text, wire) in [("hell", "PUT / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhell"), ("hello!", "")] {
            let mut io = Builder::new();
            if !wire.is_empty() {
                io.write(wire.as_bytes());
            }
            let mut io = io.build();
            let mut sending = Sending::default();
            sending.start(&asked(Length::Exact(5)), body(vec![Frame::data(Bytes::from(text))]));
            let result = std::future::poll_fn(|cx| sending.poll(&mut io, cx)).await;
            assert!(matches!(result, Err(SendError::Length)), "{text}");
        }
    }
}
