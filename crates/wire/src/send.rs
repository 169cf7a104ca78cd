//! A message on its way out: its head, and its body as it comes.

use std::fmt;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use http::HeaderMap;
use http_body::Body;
use tokio::io::AsyncWrite;

use crate::fields::write_field;

/// What is still to be written of a message.
#[derive(Debug, Default)]
pub struct Sending {
    /// Head, chunk lines, and small frames.
    buffer: Vec<u8>,
    /// How much of the buffer has been written.
    at: usize,
    /// A frame that is too large to be copied, behind the buffer.
    data: Bytes,
    /// What follows it.
    tail: &'static [u8],
    /// What is still to come of the body.
    rest: Length,
    without_trailers: bool,
    written: u64,
    /// The transport may have kept some of what it took.
    unflushed: bool,
}

/// How the end of a body is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "RFC 9112 has no other that keeps the connection")]
pub enum Length {
    /// There is no body.
    #[default]
    None,
    /// By its length.
    Exact(u64),
    /// By the last chunk.
    Chunked,
}

/// Why a message did not get out.
#[derive(Debug)]
#[expect(clippy::exhaustive_enums, reason = "those who share it match on it")]
pub enum SendError<E> {
    /// The transport broke.
    Io(io::Error),
    /// The body failed.
    Body(E),
    /// The body is longer or shorter than it said.
    Length,
}

/// Frames up to this are copied together: one piece is cheaper to send than several.
const SMALL: usize = 2048;
/// A buffer that grew beyond this is not kept.
const KEPT: usize = 4096;

// === impl Sending ===

impl Sending {
    /// Begins a message whose body ends as `length` says; its head is to be written into what is returned.
    pub fn begin(&mut self, length: Length) -> &mut Vec<u8> {
        (self.written, self.rest, self.without_trailers) = (0, length, false);
        &mut self.buffer
    }

    /// Says to leave out what comes after the body, of the message that was begun: who reads it takes no trailers.
    pub fn leave_out_trailers(&mut self) {
        self.without_trailers = true;
    }

    /// Ready when all has been sent. The body is not asked once its end is [known](Self::has_whole_body).
    ///
    /// # Errors
    ///
    /// When the rest cannot be sent. What was begun must not be ended as if it were whole.
    pub fn poll<W, B>(
        &mut self,
        io: &mut W,
        cx: &mut Context<'_>,
        mut body: Pin<&mut B>,
    ) -> Poll<Result<(), SendError<B::Error>>>
    where
        W: AsyncWrite + Unpin,
        B: Body<Data = Bytes> + ?Sized,
    {
        loop {
            // A frame that is at hand goes out with what waits before it.
            let more = self.data.is_empty() && self.buffer.len() - self.at < SMALL;
            let waits = more && self.poll_body(cx, body.as_mut())?.is_pending();
            ready!(self.poll_write(io, cx)).map_err(SendError::Io)?;
            if self.has_whole_body() {
                return Poll::Ready(Ok(()));
            }
            if waits {
                return Poll::Pending;
            }
        }
    }

    /// Takes one frame of the body, or learns that there is none.
    fn poll_body<B>(&mut self, cx: &mut Context<'_>, body: Pin<&mut B>) -> Poll<Result<(), SendError<B::Error>>>
    where
        B: Body<Data = Bytes> + ?Sized,
    {
        if self.has_whole_body() {
            return Poll::Ready(Ok(()));
        }
        let frame = match ready!(body.poll_frame(cx)) {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => return Poll::Ready(Err(SendError::Body(error))),
            None => return Poll::Ready(self.finish(None)),
        };
        match (frame.into_data(), &mut self.rest) {
            (Ok(data), _) if data.is_empty() => {}
            (Ok(data), Length::Exact(left)) => match left.checked_sub(data.len() as u64) {
                Some(rest) => {
                    self.rest = if rest == 0 { Length::None } else { Length::Exact(rest) };
                    self.push(data, b"");
                }
                None => return Poll::Ready(Err(SendError::Length)),
            },
            (Ok(data), _) => {
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
    fn finish<E>(&mut self, trailers: Option<&HeaderMap>) -> Result<(), SendError<E>> {
        match std::mem::take(&mut self.rest) {
            Length::Exact(1..) => return Err(SendError::Length),
            Length::Exact(0) | Length::None => {}
            Length::Chunked => {
                self.buffer.extend_from_slice(b"0\r\n");
                for (name, value) in trailers.into_iter().flatten().filter(|_| !self.without_trailers) {
                    write_field(&mut self.buffer, name, value);
                }
                self.buffer.extend_from_slice(b"\r\n");
            }
        }
        Ok(())
    }

    fn poll_write<W: AsyncWrite + Unpin>(&mut self, io: &mut W, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.buffer.is_empty() && self.data.is_empty() {
            return self.poll_flush(io, cx);
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
            self.unflushed = true;
            let head = count.min(before.len());
            self.at += head;
            count -= head;
            let data = count.min(self.data.len());
            if data == self.data.len() {
                // Even an empty piece holds the memory it was cut from.
                self.data = Bytes::new();
            } else {
                self.data.advance(data);
            }
            self.tail = &self.tail[count - data..];
            if self.at == self.buffer.len() && self.data.is_empty() {
                // What follows a frame is short, and goes out with the next.
                self.buffer.clear();
                self.at = 0;
                self.buffer.extend_from_slice(std::mem::take(&mut self.tail));
                if self.buffer.is_empty() {
                    return self.poll_flush(io, cx);
                }
            }
        }
    }

    fn poll_flush<W: AsyncWrite + Unpin>(&mut self, io: &mut W, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(io).poll_flush(cx))?;
        self.unflushed = false;
        Poll::Ready(Ok(()))
    }

    /// Whether nothing more is expected of the body.
    #[must_use]
    pub fn has_whole_body(&self) -> bool {
        self.rest == Length::None
    }

    /// Whether nothing is left to be sent.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.has_whole_body() && self.buffer.is_empty() && self.data.is_empty() && !self.unflushed
    }

    /// How many bytes of the message the transport took.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Drops what is still to be sent.
    pub fn give_up(&mut self) {
        *self = Self { written: self.written, ..Self::default() };
    }

    /// Gives back what is not worth keeping between two messages.
    pub fn rest(&mut self) {
        if self.buffer.capacity() > KEPT {
            self.buffer = Vec::new();
        }
    }
}

// === impl SendError ===

impl<E: fmt::Display> fmt::Display for SendError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => error.fmt(f),
            Self::Body(error) => write!(f, "the body broke off: {error}"),
            Self::Length => f.write_str("the body is not as long as it said"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{HeaderMap, HeaderValue};
    use http_body::Frame;
    use http_body_util::StreamBody;
    use std::convert::Infallible;
    use std::pin::pin;
    use tokio_test::io::Builder;

    const HEAD: &str = "PUT / HTTP/1.1\r\n\r\n";

    fn body(frames: &[Frame<Bytes>]) -> impl Body<Data = Bytes, Error = Infallible> + use<> {
        let copies = frames.iter().map(|frame| match frame.data_ref() {
            Some(data) => Frame::data(data.clone()),
            None => Frame::trailers(frame.trailers_ref().cloned().unwrap_or_default()),
        });
        StreamBody::new(futures::stream::iter(copies.map(Ok).collect::<Vec<_>>()))
    }

    /// What is sent, however little the transport takes at once.
    async fn sent(length: Length, frames: &[Frame<Bytes>], wire: &[u8]) -> Result<(), SendError<Infallible>> {
        let wire = [HEAD.as_bytes(), wire].concat();
        for step in [1, 3, 1000, 1 << 20] {
            let mut io = Builder::new();
            for piece in wire.chunks(step) {
                io.write(piece);
            }
            let (mut io, mut body) = (io.build(), pin!(body(frames)));
            let mut sending = Sending::default();
            sending.begin(length).extend_from_slice(HEAD.as_bytes());
            std::future::poll_fn(|cx| sending.poll(&mut io, cx, body.as_mut())).await?;
            assert!(sending.is_done());
            assert_eq!(sending.written, wire.len() as u64);
        }
        Ok(())
    }

    fn data(text: &'static str) -> Frame<Bytes> {
        Frame::data(Bytes::from(text))
    }

    fn trailers() -> Frame<Bytes> {
        Frame::trailers(HeaderMap::from_iter([(http::header::ETAG, HeaderValue::from_static("x"))]))
    }

    #[tokio::test]
    async fn a_body_is_framed_as_its_head_says() {
        let large = Bytes::from(vec![b'x'; SMALL + 1]);
        sent(Length::Exact(5), &[data("he"), data(""), data("llo")], b"hello").await.unwrap();
        sent(Length::None, &[data("not asked for")], b"").await.unwrap();
        let wire = [b"2\r\nhe\r\n801\r\n", &*large, b"\r\n3\r\nllo\r\n0\r\netag: x\r\n\r\n"].concat();
        let frames = [data("he"), Frame::data(large), data("llo"), trailers()];
        sent(Length::Chunked, &frames, &wire).await.unwrap();
        sent(Length::Chunked, &[], b"0\r\n\r\n").await.unwrap();
    }

    #[tokio::test]
    async fn trailers_that_nobody_takes_are_left_out() {
        let (mut io, mut body) =
            (Builder::new().write(b"2\r\nhe\r\n0\r\n\r\n").build(), pin!(body(&[data("he"), trailers()])));
        let mut sending = Sending::default();
        sending.begin(Length::Chunked);
        sending.leave_out_trailers();
        std::future::poll_fn(|cx| sending.poll(&mut io, cx, body.as_mut())).await.unwrap();
    }

    #[tokio::test]
    async fn a_body_that_is_not_as_long_as_it_said_is_not_sent_as_if_it_were() {
        for (text, wire) in [("hell", format!("{HEAD}hell")), ("hello!", String::new())] {
            let mut io = Builder::new();
            if !wire.is_empty() {
                io.write(wire.as_bytes());
            }
            let (mut io, mut body) = (io.build(), pin!(body(&[data(text)])));
            let mut sending = Sending::default();
            sending.begin(Length::Exact(5)).extend_from_slice(HEAD.as_bytes());
            let result = std::future::poll_fn(|cx| sending.poll(&mut io, cx, body.as_mut())).await;
            assert!(matches!(result, Err(SendError::Length)), "{text}");
        }
    }

    /// As TLS, which takes what it has not got rid of yet.
    struct Hoarding(bool);

    impl AsyncWrite for Hoarding {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Ok(bytes.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            if self.0 { Poll::Pending } else { Poll::Ready(Ok(())) }
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn it_is_not_done_before_the_transport_has_let_go_of_it() {
        let (mut io, mut sending) = (Hoarding(true), Sending::default());
        sending.begin(Length::Exact(4)).extend_from_slice(HEAD.as_bytes());
        let mut body = pin!(body(&[Frame::data(Bytes::from("body"))]));
        let cx = &mut Context::from_waker(std::task::Waker::noop());
        assert!(sending.poll(&mut io, cx, body.as_mut()).is_pending());
        assert!(sending.has_whole_body() && !sending.is_done());
        io.0 = false;
        assert!(sending.poll(&mut io, cx, body.as_mut()).is_ready());
        assert!(sending.is_done());
    }
}
