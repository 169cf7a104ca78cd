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
