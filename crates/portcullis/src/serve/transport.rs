//! A client's connection, which can be ended from outside whoever holds it, and which does not wait for readers who do
//! not read.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_rustls::server::TlsStream;

pub(super) struct Transport {
    io: Io,
    line: Arc<Line>,
    stalled: Stall,
}

pub(super) enum Io {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// What is left of a connection for those who do not hold it.
#[derive(Default)]
pub(super) struct Line {
    cut: AtomicBool,
    gone: AtomicBool,
    heard: AtomicBool,
    reader: AtomicWaker,
    writer: AtomicWaker,
    owner: AtomicWaker,
}

/// How long the other end has not taken what we have for it.
struct Stall {
    patience: Duration,
    since: Option<Pin<Box<Sleep>>>,
    running: bool,
}

impl Transport {
    pub(super) fn new(io: Io, line: Arc<Line>, patience: Duration) -> Self {
        Self { io, line, stalled: Stall { patience, since: None, running: false } }
    }
}

// === impl Line ===

impl Line {
    /// Ends the connection, whoever holds it.
    pub(super) fn cut(&self) {
        self.cut.store(true, Ordering::Release);
        self.reader.wake();
        self.writer.wake();
    }

    /// Ready once nobody holds the connection any more.
    pub(super) fn poll_gone(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.owner.register(cx.waker());
        if self.gone.load(Ordering::Acquire) { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Whether the other end has said anything yet.
    pub(super) fn has_heard(&self) -> bool {
        self.heard.load(Ordering::Relaxed)
    }

    fn check(&self) -> io::Result<()> {
        if self.cut.load(Ordering::Acquire) { Err(io::ErrorKind::ConnectionAborted.into()) } else { Ok(()) }
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        self.line.gone.store(true, Ordering::Release);
        self.line.owner.wake();
    }
}

// === impl Stall ===

impl Stall {
    /// A write came through, or not; an error when not for too long.
    fn watch<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.running = false;
            return written;
        }
        if self.patience >= Duration::from_secs(365 * 24 * 3600) {
            return Poll::Pending;
        }
        let patience = self.patience;
        let sleep = self.since.get_or_insert_with(|| Box::pin(sleep_until(Instant::now() + patience)));
        if !self.running {
            self.running = true;
            sleep.as_mut().reset(Instant::now() + patience);
        }
        match sleep.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

// === impl Transport ===

macro_rules! each {
    ($io:expr, $name:ident, $($arg:expr),*) => {
        match $io {
            Io::Plain(io) => Pin::new(io).$name($($arg),*),
            Io::Tls(io) => Pin::new(io).$name($($arg),*),
        }
    };
}

impl AsyncRead for Transport {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let read = each!(&mut this.io, poll_read, cx, buf);
        if read.is_pending() {
            this.line.reader.register(cx.waker());
        } else if !this.line.has_heard() {
            this.line.heard.store(true, Ordering::Relaxed);
        }
        this.line.check()?;
        read
    }
}

impl AsyncWrite for Transport {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = each!(&mut this.io, poll_write, cx, bytes);
        if written.is_pending() {
            this.line.writer.register(cx.waker());
        }
        this.line.check()?;
        this.stalled.watch(cx, written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = each!(&mut this.io, poll_write_vectored, cx, slices);
        if written.is_pending() {
            this.line.writer.register(cx.waker());
        }
        this.line.check()?;
        this.stalled.watch(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Plain(io) => io.is_write_vectored(),
            Io::Tls(io) => io.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let flushed = each!(&mut this.io, poll_flush, cx);
        if flushed.is_ready() {
            return flushed;
        }
        this.line.writer.register(cx.waker());
        this.line.check()?;
        this.stalled.watch(cx, flushed)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(&mut self.get_mut().io, poll_shutdown, cx)
    }
}
