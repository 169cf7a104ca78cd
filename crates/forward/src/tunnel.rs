//! Two connections that have become one, after an upgrade or a `CONNECT`.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::Response;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use portcullis_core::{Body, Endpoint, Permit};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;
use tracing::debug;

use crate::alarm::{Alarm, after, earlier};
use crate::download::ResponseBody;
use crate::exchange::Times;
use crate::failure::Failure;
use crate::pool::Shard;

const BUFFER: usize = 16 * 1024;

/// A tunnel that was asked for by `CONNECT`.
pub(crate) struct Opening {
    pub(crate) caller: OnUpgrade,
    pub(crate) endpoint: Endpoint,
    pub(crate) shard: Arc<Shard>,
    pub(crate) permit: Option<Permit>,
    pub(crate) times: Times,
}

impl Opening {
    /// Connects to the endpoint; from then on a task of the tunnel's own carries the bytes.
    pub(crate) async fn run(self) -> Result<Response<Body<ResponseBody>>, Failure> {
        let Self { caller, endpoint, shard, permit, times } = self;
        let deadline = earlier(after(times.start, times.connect), times.head);
        let (stream, place) = shard.open(&endpoint, deadline).await?;
        let busy = endpoint.busy();
        tokio::spawn(async move {
            let _held = (place, permit, busy);
            run(caller, stream, &[], times.idle).await;
        });
        Ok(Response::new(Body::default()))
    }
}

/// Carries bytes both ways until both ends have closed, one half at a time, or nothing moved for `idle`. What the
/// upstream said before is in `early`.
pub(crate) async fn run<U>(caller: OnUpgrade, upstream: U, early: &[u8], idle: Duration)
where
    U: AsyncRead + AsyncWrite + Unpin,
{
    let caller = match caller.await {
        Ok(caller) => caller,
        Err(error) => return debug!(%error, "a connection was not let go of"),
    };
    let mut tunnel = Tunnel {
        a: TokioIo::new(caller),
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

struct Tunnel<U> {
    a: TokioIo<Upgraded>,
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

impl<U: AsyncRead + AsyncWrite + Unpin> Tunnel<U> {
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
