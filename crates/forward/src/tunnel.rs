//! Two connections that have become one, after an upgrade or a `CONNECT`.

use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::Response;
use http_body::Body as _;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use portcullis_core::{Body, Endpoint, Permit};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, DuplexStream, ReadBuf};
use tokio::time::Instant;
use tracing::debug;

use crate::download::ResponseBody;
use crate::exchange::Times;
use crate::failure::Failure;
use crate::pool::Shard;
use crate::upload::Outgoing;
use portcullis_wire::{Alarm, after, earlier};

const BUFFER: usize = 16 * 1024;

/// A tunnel that was asked for by `CONNECT`.
pub(crate) struct Opening {
    pub(crate) caller: Caller,
    pub(crate) endpoint: Endpoint,
    pub(crate) shard: Arc<Shard>,
    pub(crate) permit: Option<Permit>,
    pub(crate) times: Times,
}

/// What a tunnel is dug from.
pub(crate) enum Caller {
    /// A connection that the server lets go of.
    Connection(OnUpgrade),
    /// A stream of HTTP/2: its body is what is said, the answer's is what is heard.
    Stream(Outgoing),
}

/// The caller's end of a tunnel in a stream: what is read comes from a body, what is written goes to another.
struct Bodies {
    said: Outgoing,
    rest: Bytes,
    heard: DuplexStream,
    whole: Arc<AtomicBool>,
}

/// The body of an answer that is the end of a tunnel.
pub(crate) struct Heard {
    stream: DuplexStream,
    buffer: BytesMut,
    /// Whether the upstream has closed its half, and not broken off.
    whole: Arc<AtomicBool>,
}

impl Opening {
    /// Connects to the endpoint; from then on a task of the tunnel's own carries the bytes.
    pub(crate) async fn run(self) -> Result<Response<Body<ResponseBody>>, Failure> {
        let Self { caller, endpoint, shard, permit, times } = self;
        let deadline = earlier(after(times.start, times.connect), times.head);
        let (stream, place) = shard.open(&endpoint, deadline).await?;
        let held = (place, permit, endpoint.busy());
        let body = match caller {
            Caller::Connection(caller) => {
                tokio::spawn(async move {
                    run(caller, stream, &[], times.idle).await;
                    drop(held);
                });
                Body::default()
            }
            Caller::Stream(said) => {
                let (heard, ours) = tokio::io::duplex(BUFFER);
                let whole = Arc::new(AtomicBool::new(false));
                let caller = Bodies { said, rest: Bytes::new(), heard: ours, whole: whole.clone() };
                tokio::spawn(async move {
                    carry(caller, stream, &[], times.idle).await;
                    drop(held);
                });
                Body::new(ResponseBody::tunnel(Heard { stream: heard, buffer: BytesMut::new(), whole }))
            }
        };
        Ok(Response::new(body))
    }
}

/// Carries bytes both ways once the caller's connection is let go of. What the upstream said before is in `early`.
pub(crate) async fn run<U>(caller: OnUpgrade, upstream: U, early: &[u8], idle: Duration)
where
    U: AsyncRead + AsyncWrite + Unpin,
{
    let caller = match caller.await {
        Ok(caller) => caller,
        Err(error) => return debug!(%error, "a connection was not let go of"),
    };
    carry(TokioIo::new(caller), upstream, early, idle).await;
}

/// Carries bytes both ways until both ends have closed, one half at a time, or nothing moved for `idle`.
async fn carry<A, U>(caller: A, upstream: U, early: &[u8], idle: Duration)
where
    A: AsyncRead + AsyncWrite + Unpin,
    U: AsyncRead + AsyncWrite + Unpin,
{
    let mut tunnel = Tunnel {
        a: caller,
        b: upstream,
        up: Half::new(&[]),
        down: Half::new(early),
        alarm: Alarm::default(),
        moved: Instant::now(),
        idle,
    };
    if let Err(error) = std::future::poll_fn(|cx| tunnel.poll(cx)).await {
        debug!(%error, "an upgraded connection ended");
    }
}

struct Tunnel<A, U> {
    a: A,
    b: U,
    up: Half,
    down: Half,
    alarm: Alarm,
    moved: Instant,
    idle: Duration,
}

/// One direction.
struct Half {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    state: State,
    needs_flush: bool,
    moves: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    Closing,
    Closed,
}

impl<A, U> Tunnel<A, U>
where
    A: AsyncRead + AsyncWrite + Unpin,
    U: AsyncRead + AsyncWrite + Unpin,
{
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let before = self.up.moves + self.down.moves;
        let up = self.up.poll(cx, &mut self.a, &mut self.b)?;
        let down = self.down.poll(cx, &mut self.b, &mut self.a)?;
        if up.is_ready() && down.is_ready() {
            return Poll::Ready(Ok(()));
        }
        if before != self.up.moves + self.down.moves {
            self.moved = Instant::now();
        }
        match after(self.moved, self.idle) {
            Some(end) if self.alarm.poll(cx, end).is_ready() => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            _ => Poll::Pending,
        }
    }
}

impl Half {
    /// Begins with what is to be written before anything is read.
    fn new(early: &[u8]) -> Self {
        let mut buffer = early.to_vec();
        buffer.resize(early.len().max(BUFFER), 0);
        Self {
            buffer: buffer.into_boxed_slice(),
            start: 0,
            end: early.len(),
            state: State::Open,
            needs_flush: false,
            moves: 0,
        }
    }

    fn poll<R, W>(&mut self, cx: &mut Context<'_>, from: &mut R, to: &mut W) -> Poll<io::Result<()>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        loop {
            while self.start < self.end {
                let written = ready!(Pin::new(&mut *to).poll_write(cx, &self.buffer[self.start..self.end]))?;
                if written == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                self.start += written;
                self.moves += 1;
                self.needs_flush = true;
            }
            match self.state {
                State::Closed => return Poll::Ready(Ok(())),
                State::Closing => {
                    ready!(Pin::new(&mut *to).poll_shutdown(cx))?;
                    self.state = State::Closed;
                }
                State::Open => {
                    let mut buffer = ReadBuf::new(&mut self.buffer);
                    match Pin::new(&mut *from).poll_read(cx, &mut buffer) {
                        Poll::Ready(result) => result?,
                        Poll::Pending => {
                            if self.needs_flush {
                                ready!(Pin::new(&mut *to).poll_flush(cx))?;
                                self.needs_flush = false;
                            }
                            return Poll::Pending;
                        }
                    }
                    (self.start, self.end) = (0, buffer.filled().len());
                    self.moves += 1;
                    if self.end == 0 {
                        self.state = State::Closing;
                    }
                }
            }
        }
    }
}

// === impl Bodies ===

impl AsyncRead for Bodies {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.rest.is_empty() {
            match ready!(Pin::new(&mut this.said).poll_frame(cx)) {
                // Trailers say nothing to the other end.
                Some(Ok(frame)) => this.rest = frame.into_data().unwrap_or_default(),
                Some(Err(error)) => return Poll::Ready(Err(io::Error::other(error))),
                None => return Poll::Ready(Ok(())),
            }
        }
        let count = this.rest.len().min(buffer.remaining());
        buffer.put_slice(&this.rest.split_to(count));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Bodies {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.heard).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.heard).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.whole.store(true, Ordering::Release);
        Pin::new(&mut self.heard).poll_shutdown(cx)
    }
}

// === impl Heard ===

impl Heard {
    pub(crate) fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        if self.buffer.capacity() < BUFFER / 4 {
            self.buffer.reserve(BUFFER);
        }
        let read = ready!(pin!(self.stream.read_buf(&mut self.buffer)).poll(cx));
        Poll::Ready(match read {
            Ok(0) if self.whole.load(Ordering::Acquire) => None,
            Ok(0) => Some(Err(io::ErrorKind::ConnectionReset.into())),
            // A little of it is copied, or each byte that waits for its reader would hold a buffer.
            Ok(count) if count < BUFFER / 4 => {
                let some = Bytes::copy_from_slice(&self.buffer);
                self.buffer.clear();
                Some(Ok(some))
            }
            Ok(_) => Some(Ok(self.buffer.split().freeze())),
            Err(error) => Some(Err(error)),
        })
    }
}
