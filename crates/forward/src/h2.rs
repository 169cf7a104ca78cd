//! HTTP/2 connections to an endpoint: each is driven by a task of its own, and shared.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::task::AtomicWaker;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use tracing::debug;

use crate::failure::{Failure, Kind};
use crate::pool::{Limits, Shard};
use crate::stream::Stream;
use crate::upload::Outgoing;

/// A connection that streams can be had of.
pub(crate) struct H2 {
    pub(crate) sender: http2::SendRequest<Outgoing>,
    state: Arc<State>,
    retire: Option<Instant>,
    last_used: Instant,
}

/// The right to one stream; dropping it makes room for another.
pub(crate) struct StreamPlace(Arc<State>);

struct State {
    streams: AtomicUsize,
    /// How many streams the endpoint allows; none but the first until it has said so.
    most: AtomicUsize,
    settled: AtomicBool,
    /// Whether anything has arrived. Settings are the first thing an endpoint says.
    heard: AtomicBool,
    driver: AtomicWaker,
    shard: Weak<Shard>,
    /// Held until the last stream is gone, which may outlive the right to begin others.
    _place: OwnedSemaphorePermit,
}

/// Spawns what hyper needs for the connection. The first of it reads the socket: until the endpoint's settings have
/// arrived, it wakes the task that looks at them.
#[derive(Clone)]
struct Spawn {
    state: Arc<State>,
    reads: Arc<AtomicBool>,
}

/// A transport that tells when it has heard something.
struct Heard {
    stream: Stream,
    state: Arc<State>,
}

// === impl H2 ===

impl H2 {
    /// Begins the connection; its first stream is the caller's.
    pub(crate) async fn handshake(
        stream: Stream,
        limits: &Limits,
        shard: &Arc<Shard>,
        retire: Option<Instant>,
        now: Instant,
        place: OwnedSemaphorePermit,
    ) -> Result<(Self, StreamPlace), Failure> {
        let state = Arc::new(State {
            streams: AtomicUsize::new(1),
            most: AtomicUsize::new(1),
            settled: AtomicBool::new(false),
            heard: AtomicBool::new(false),
            driver: AtomicWaker::new(),
            shard: Arc::downgrade(shard),
            _place: place,
        });
        let mut builder = http2::Builder::new(Spawn { state: state.clone(), reads: Arc::default() });
        builder
            .timer(TokioTimer::new())
            .adaptive_window(false)
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(1 << 24)
            .max_header_list_size(u32::try_from(limits.max_head).unwrap_or(u32::MAX))
            .initial_max_send_streams(limits.streams);
        if let Some((interval, timeout)) = limits.keep_alive {
            builder.keep_alive_interval(interval).keep_alive_timeout(timeout);
        }
        let stream = Heard { stream, state: state.clone() };
        let (sender, connection) = builder
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| Failure::unsent(Kind::Connect).because(&error))?;
        tokio::spawn(state.clone().drive(connection));
        Ok((Self { sender, state: state.clone(), retire, last_used: now }, StreamPlace(state)))
    }

    /// A stream, if there is one left.
    pub(crate) fn stream(&mut self, now: Instant, limit: usize) -> Option<StreamPlace> {
        let most = self.state.most.load(Ordering::Relaxed).min(limit);
        let is_fit = !self.sender.is_closed()
            && self.retire.is_none_or(|retire| now < retire)
            && self.state.streams.load(Ordering::SeqCst) < most;
        is_fit.then(|| {
            self.state.streams.fetch_add(1, Ordering::Relaxed);
            self.last_used = now;
            StreamPlace(self.state.clone())
        })
    }

    /// Whether the endpoint has said how many streams it allows.
    pub(crate) fn is_settled(&self) -> bool {
        self.state.settled.load(Ordering::Acquire)
    }

    pub(crate) fn is_unused(&self) -> bool {
        self.state.streams.load(Ordering::Relaxed) == 0
    }

    pub(crate) fn is_over(&self, now: Instant, idle_timeout: Duration) -> bool {
        self.sender.is_closed()
            || self.retire.is_some_and(|retire| now >= retire)
            || self.is_unused() && now.saturating_duration_since(self.last_used) > idle_timeout
    }
}

// === impl State ===

impl State {
    /// Ends when no stream can begin any more: with the last sender, or with the connection.
    async fn drive(self: Arc<Self>, mut connection: http2::Connection<TokioIo<Heard>, Outgoing, Spawn>) {
        let result = poll_fn(|cx| {
            self.driver.register(cx.waker());
            let polled = Pin::new(&mut connection).poll(cx);
            if self.heard.load(Ordering::Relaxed) {
                self.most.store(connection.current_max_send_streams(), Ordering::Relaxed);
                self.settle();
            }
            polled
        })
        .await;
        self.most.store(0, Ordering::Relaxed);
        self.settle();
        if let Err(error) = result {
            debug!(%error, "HTTP/2 connection ended");
        }
        if let Some(shard) = self.shard.upgrade() {
            shard.forget(|h2| Arc::ptr_eq(&h2.state, &self));
        }
    }

    fn settle(&self) {
        if !self.settled.swap(true, Ordering::AcqRel)
            && let Some(shard) = self.shard.upgrade()
        {
            shard.room.notify_waiters();
        }
    }
}

// === impl StreamPlace ===

impl Drop for StreamPlace {
    fn drop(&mut self) {
        let before = self.0.streams.fetch_sub(1, Ordering::SeqCst);
        let Some(shard) = self.0.shard.upgrade() else { return };
        if shard.has_waiting() {
            shard.room.notify_one();
        } else if before == 1 && shard.is_missed_elsewhere() {
            shard.forget(|h2| Arc::ptr_eq(&h2.state, &self.0) && h2.is_unused());
        }
    }
}

// === impl Spawn ===

impl<F> hyper::rt::Executor<F> for Spawn
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, future: F) {
        if self.reads.swap(true, Ordering::Relaxed) {
            tokio::spawn(future);
            return;
        }
        let state = self.state.clone();
        tokio::spawn(async move {
            let mut future = pin!(future);
            poll_fn(|cx| {
                let polled = future.as_mut().poll(cx);
                if !state.settled.load(Ordering::Relaxed) {
                    state.driver.wake();
                }
                polled
            })
            .await;
        });
    }
}

// === impl Heard ===

impl AsyncRead for Heard {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
        if !buf.filled().is_empty() {
            this.state.heard.store(true, Ordering::Relaxed);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Heard {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
