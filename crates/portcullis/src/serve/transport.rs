//! A client's connection, which does not wait for readers who do not read and is not closed over what a client still
//! says; and, for protocols that others drive, one that can be ended from outside whoever holds it.

use std::future::{Future, poll_fn};
use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures::task::AtomicWaker;
use hyper::rt::Timer;
use portcullis_wire::poll_once;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep, sleep_until};
use tokio_rustls::server::TlsStream;

/// A connection in the hands of its own task.
pub(super) struct Socket {
    io: Io,
    /// What was read before it was known who reads it.
    early: Bytes,
    stalled: Stall,
    /// Whether what comes in just at the end is read on for a while: where it is a request, not an attack on the framing.
    may_linger: bool,
    /// Whether more of a request is on its way that nobody wants.
    more: bool,
    /// Until when it is.
    lingers: Option<Pin<Box<Sleep>>>,
}

/// A connection in the hands of others, who may give it away.
pub(super) struct Transport {
    /// Until it is let go of.
    socket: Option<Socket>,
    line: Arc<Line>,
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
    /// Whether it goes on to be something else than HTTP, in other hands.
    given_away: AtomicBool,
    /// Whether a request's body was not read to its end.
    unread: AtomicBool,
    /// What was let go of unread, and not closed.
    left: Mutex<Option<Socket>>,
    /// Whether a head has begun to arrive since one was waited for.
    begun: AtomicBool,
    /// Whether it did not arrive in time.
    late: AtomicBool,
    /// For heads. It is set once in a while, not for each of them.
    alarm: Mutex<Option<Pin<Box<Sleep>>>>,
    reader: AtomicWaker,
    writer: AtomicWaker,
    owner: AtomicWaker,
}

/// Tells hyper when a head is late, and the transport that it was.
pub(super) struct HeadTimer(pub(super) Arc<Line>);

struct HeadSleep {
    line: Arc<Line>,
    deadline: Instant,
}

/// How long the other end has not taken what we have for it.
pub(super) struct Stall {
    patience: Duration,
    since: Option<Pin<Box<Sleep>>>,
    running: bool,
}

/// What a client gets whose head began and did not end in time. hyper would close without a word.
pub(super) const LATE: &[u8] = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
/// How long a client may go on sending what nobody wants, so that it hears the answer.
const LINGER: Duration = Duration::from_secs(2);
/// What is copied together, since one piece is cheaper to send than several.
const SMALL: usize = 1024;

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

    /// The protocol changes.
    pub(super) fn is_given_away(&self) {
        self.given_away.store(true, Ordering::Relaxed);
    }

    /// A request's body was not read to its end.
    pub(super) fn is_left_unread(&self) {
        self.unread.store(true, Ordering::Relaxed);
    }

    /// Whether anything has arrived since this was last asked. For connections without heads that could be late.
    pub(super) fn has_heard(&self) -> bool {
        self.begun.swap(false, Ordering::Relaxed)
    }

    /// Closes what was let go of unread, as who held it would have done.
    pub(super) async fn close_what_is_left(&self) {
        let left = self.left.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(mut socket) = left {
            _ = poll_fn(|cx| socket.poll_close(cx, false)).await;
        }
    }

    fn check(&self) -> io::Result<()> {
        if self.cut.load(Ordering::Acquire) { Err(io::ErrorKind::ConnectionAborted.into()) } else { Ok(()) }
    }
}

// === impl HeadTimer ===

impl Timer for HeadTimer {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn hyper::rt::Sleep>> {
        self.sleep_until(self.now() + duration)
    }

    fn sleep_until(&self, deadline: std::time::Instant) -> Pin<Box<dyn hyper::rt::Sleep>> {
        self.0.begun.store(false, Ordering::Relaxed);
        Box::pin(HeadSleep { line: self.0.clone(), deadline: deadline.into() })
    }

    fn now(&self) -> std::time::Instant {
        Instant::now().into_std()
    }
}

impl hyper::rt::Sleep for HeadSleep {}

impl Future for HeadSleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut alarm = self.line.alarm.lock().unwrap_or_else(PoisonError::into_inner);
        let alarm = alarm.get_or_insert_with(|| Box::pin(sleep_until(self.deadline)));
        while alarm.as_mut().poll(cx).is_ready() {
            if Instant::now() >= self.deadline {
                self.line.late.store(true, Ordering::Relaxed);
                return Poll::Ready(());
            }
            alarm.as_mut().reset(self.deadline);
        }
        Poll::Pending
    }
}

// === impl Stall ===

impl Stall {
    pub(super) const fn new(patience: Duration) -> Self {
        Self { patience, since: None, running: false }
    }

    /// Something came through.
    pub(super) const fn moved(&mut self) {
        self.running = false;
    }

    /// A write came through, or not; an error when not for too long.
    pub(super) fn watch<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.moved();
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

// === impl Socket ===

impl Socket {
    pub(super) fn new(io: Io, early: Bytes, patience: Duration, may_linger: bool) -> Self {
        Self { io, early, stalled: Stall::new(patience), may_linger, more: false, lingers: None }
    }

    /// Lets `unread` be read once more.
    pub(super) fn put_back(&mut self, unread: Bytes) {
        self.early = unread;
    }

    /// More of a request is on its way that nobody wants.
    pub(super) const fn expect_more(&mut self) {
        self.more = true;
    }

    /// The last word to a client, if it has all that was said before. What does not go out at once does not go out.
    pub(super) fn say(&mut self, last: &[u8]) {
        if !self.stalled.running && poll_once(|cx| Pin::new(&mut self.io).poll_write(cx, last)).is_ready() {
            _ = poll_once(|cx| Pin::new(&mut self.io).poll_flush(cx));
        }
    }

    /// Reads what nobody wants any more; whether there was something.
    fn discard(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        let mut waste = [MaybeUninit::uninit(); 4096];
        let mut waste = ReadBuf::uninit(&mut waste);
        let read = ready!(Pin::new(&mut self.io).poll_read(cx, &mut waste));
        Poll::Ready(read.is_ok() && !waste.filled().is_empty())
    }

    /// Says that nothing more follows. What TLS has to say may find no room.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let ended = Pin::new(&mut self.io).poll_shutdown(cx);
        self.stalled.watch(cx, ended)
    }

    fn poll_close(&mut self, cx: &mut Context<'_>, given_away: bool) -> Poll<io::Result<()>> {
        // Closed with something unread, or yet to come, the connection would be reset, and the client might never see its
        // answer (RFC 9112 §9.6): it goes on reading for a while.
        let begins = self.lingers.is_none() && !given_away;
        if begins && (self.more || self.may_linger && self.discard(cx) == Poll::Ready(true)) {
            self.lingers = Some(Box::pin(sleep(LINGER)));
        }
        let Some(over) = &mut self.lingers else {
            // It is let go of right after this, which says the same by one system call less.
            if matches!(self.io, Io::Plain(_)) && !given_away {
                return Poll::Ready(Ok(()));
            }
            return self.poll_end(cx);
        };
        let over = over.as_mut().poll(cx);
        ready!(self.poll_end(cx))?;
        while over.is_pending() && ready!(self.discard(cx)) {}
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.early.is_empty() {
            return Pin::new(&mut this.io).poll_read(cx, buf);
        }
        let count = this.early.len().min(buf.remaining());
        buf.put_slice(&this.early.split_to(count));
        if this.early.is_empty() {
            this.early = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.io).poll_write(cx, bytes);
        this.stalled.watch(cx, written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let mut small = [0; SMALL];
        let written = match together(slices, &mut small) {
            Some(bytes) => Pin::new(&mut this.io).poll_write(cx, bytes),
            None => Pin::new(&mut this.io).poll_write_vectored(cx, slices),
        };
        this.stalled.watch(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let flushed = Pin::new(&mut this.io).poll_flush(cx);
        // One that had nothing to do says nothing of the reader; with TLS it says that all is out.
        if flushed.is_ready() && matches!(this.io, Io::Plain(_)) { flushed } else { this.stalled.watch(cx, flushed) }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_close(cx, false)
    }
}

// === impl Transport ===

impl Transport {
    pub(super) fn new(socket: Socket, line: Arc<Line>) -> Self {
        Self { socket: Some(socket), line }
    }

    fn socket(&mut self) -> io::Result<Pin<&mut Socket>> {
        self.line.check()?;
        self.socket.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// What became of a write.
    fn wrote<T>(&self, cx: &Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_pending() {
            self.line.writer.register(cx.waker());
            // It may have been cut before it could be heard.
            self.line.check()?;
        }
        written
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        let (line, Some(mut socket)) = (&self.line, self.socket.take()) else { return };
        let is_whole = line.check().is_ok();
        if is_whole && line.late.load(Ordering::Relaxed) && line.begun.load(Ordering::Relaxed) {
            socket.say(LATE);
            _ = poll_once(|cx| Pin::new(&mut socket.io).poll_shutdown(cx));
        }
        // hyper closes none on which a change of the protocol was offered.
        if is_whole && line.unread.load(Ordering::Relaxed) && !line.given_away.load(Ordering::Relaxed) {
            socket.expect_more();
            *line.left.lock().unwrap_or_else(PoisonError::into_inner) = Some(socket);
        }
        line.gone.store(true, Ordering::Release);
        line.owner.wake();
    }
}

impl AsyncRead for Transport {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let read = this.socket()?.poll_read(cx, buf);
        if read.is_pending() {
            this.line.reader.register(cx.waker());
            this.line.check()?;
        } else if buf.filled().len() > before {
            this.line.begun.store(true, Ordering::Relaxed);
        }
        read
    }
}

impl AsyncWrite for Transport {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = this.socket()?.poll_write(cx, bytes);
        this.wrote(cx, written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = this.socket()?.poll_write_vectored(cx, slices);
        this.wrote(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let flushed = this.socket()?.poll_flush(cx);
        this.wrote(cx, flushed)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let (unread, given_away) = (&this.line.unread, &this.line.given_away);
        let (unread, given_away) = (unread.load(Ordering::Relaxed), given_away.load(Ordering::Relaxed));
        let mut socket = this.socket()?;
        socket.more |= unread;
        let closed = socket.poll_close(cx, given_away);
        if closed.is_ready() {
            // There is nothing left to be closed.
            this.line.unread.store(false, Ordering::Relaxed);
        }
        this.wrote(cx, closed)
    }
}

// === impl Io ===

macro_rules! each {
    ($io:expr, $name:ident, $($arg:expr),*) => {
        match $io.get_mut() {
            Io::Plain(io) => Pin::new(io).$name($($arg),*),
            Io::Tls(io) => Pin::new(io).$name($($arg),*),
        }
    };
}

impl AsyncRead for Io {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        each!(self, poll_read, cx, buf)
    }
}

impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        each!(self, poll_write, cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(self, poll_write_vectored, cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, poll_flush, cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, poll_shutdown, cx)
    }
}

/// All slices as one, if they are small.
fn together<'a>(slices: &[io::IoSlice<'_>], small: &'a mut [u8; SMALL]) -> Option<&'a [u8]> {
    let mut length = 0;
    for slice in slices {
        let end = length + slice.len();
        small.get_mut(length..end)?.copy_from_slice(slice);
        length = end;
    }
    small.get(..length)
}
