//! A connection's bytes, counted.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker, ready};

use futures::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
#[cfg(unix)]
use tokio::net::UnixStream;

/// The transport to an endpoint.
pub(crate) struct Stream {
    io: Io,
    relay: Arc<Relay>,
}

pub(crate) enum Io {
    Tcp(TcpStream),
    #[cfg(unix)]
    Unix(UnixStream),
    #[cfg(feature = "tls")]
    Tls(Box<tokio_rustls::client::TlsStream<Plain>>),
}

/// What TLS runs over.
#[cfg(feature = "tls")]
pub(crate) enum Plain {
    Tcp(TcpStream),
    #[cfg(unix)]
    Unix(UnixStream),
}

/// Stands between a connection and whoever drives it at the moment: passes wake-ups on to that task and to nobody once
/// it has let go. Counts the bytes, which tells for certain whether any of a request left.
#[derive(Default)]
pub(crate) struct Relay {
    target: AtomicWaker,
    read: AtomicU64,
    written: AtomicU64,
}

// === impl Relay ===

impl Relay {
    pub(crate) fn attach(&self, waker: &Waker) {
        self.target.register(waker);
    }

    pub(crate) fn detach(&self) {
        self.target.take();
    }

    /// Bytes read so far.
    pub(crate) fn read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// Bytes the transport took so far.
    pub(crate) fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }
}

impl Wake for Relay {
    fn wake(self: Arc<Self>) {
        self.target.wake();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.target.wake();
    }
}

/// There is one writer at a time, so a load and a store do.
fn add(counter: &AtomicU64, bytes: usize) {
    counter.store(counter.load(Ordering::Relaxed) + bytes as u64, Ordering::Relaxed);
}

// === impl Stream ===

impl Stream {
    pub(crate) fn new(io: Io, relay: Arc<Relay>) -> Self {
        Self { io, relay }
    }
}

macro_rules! each {
    ($io:expr, $name:ident, $($arg:expr),*) => {
        match $io {
            Io::Tcp(io) => Pin::new(io).$name($($arg),*),
            #[cfg(unix)]
            Io::Unix(io) => Pin::new(io).$name($($arg),*),
            #[cfg(feature = "tls")]
            Io::Tls(io) => Pin::new(io).$name($($arg),*),
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        ready!(each!(&mut this.io, poll_read, cx, buf))?;
        add(&this.relay.read, buf.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = ready!(each!(&mut this.io, poll_write, cx, bytes))?;
        add(&this.relay.written, written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = ready!(each!(&mut this.io, poll_write_vectored, cx, slices))?;
        add(&this.relay.written, written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Tcp(io) => io.is_write_vectored(),
            #[cfg(unix)]
            Io::Unix(io) => io.is_write_vectored(),
            #[cfg(feature = "tls")]
            Io::Tls(io) => io.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(&mut self.get_mut().io, poll_flush, cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(&mut self.get_mut().io, poll_shutdown, cx)
    }
}

// === impl Plain ===

#[cfg(feature = "tls")]
macro_rules! plain {
    ($io:expr, $name:ident, $($arg:expr),*) => {
        match $io.get_mut() {
            Plain::Tcp(io) => Pin::new(io).$name($($arg),*),
            #[cfg(unix)]
            Plain::Unix(io) => Pin::new(io).$name($($arg),*),
        }
    };
}

#[cfg(feature = "tls")]
impl AsyncRead for Plain {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        plain!(self, poll_read, cx, buf)
    }
}

#[cfg(feature = "tls")]
impl AsyncWrite for Plain {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        plain!(self, poll_write, cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        plain!(self, poll_write_vectored, cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        plain!(self, poll_flush, cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        plain!(self, poll_shutdown, cx)
    }
}
