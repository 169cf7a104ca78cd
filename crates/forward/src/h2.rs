//! HTTP/2 connections to an endpoint: each is driven by a task of its own, and shared.
//!
//! That task reads and writes, and nothing more. A request begins its stream itself, sends its body and hears its answer
//! from there, so that nothing is handed from task to task.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Builder, Connection, SendRequest};
use h2::{Reason, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use tracing::debug;

use crate::failure::{Failure, Kind};
use crate::pool::{Limits, Shard};
use crate::stream::Stream;
use crate::upload::{Flow, Outgoing};
use portcullis_wire::{Alarm, Halt, Pings, Transmit, after, earlier, poll_once, reason};

/// Begins streams on a connection.
pub(crate) type Sender = SendRequest<Bytes>;

/// A connection that streams can be had of.
pub(crate) struct H2 {
    sender: Sender,
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
    /// Whether anything has arrived since it was last looked at. Settings are the first thing an endpoint says.
    heard: AtomicBool,
    /// Bytes that the transport took.
    written: AtomicU64,
    /// How often something arrived.
    arrived: AtomicU64,
    shard: Weak<Shard>,
    /// Held until the last stream is gone, which may outlive the right to begin others.
    _place: OwnedSemaphorePermit,
}

/// A transport that tells when it has heard something, and how much it has sent.
struct Heard {
    stream: Stream,
    state: Arc<State>,
}

/// A request's body on its way into its stream.
pub(crate) struct Upload {
    transmit: Transmit,
    body: Outgoing,
}

/// How much all streams of a connection may hold that nobody has read yet, and one of them: however many callers do not read,
/// there is room for the others.
const WINDOW: u32 = 1 << 24;
const LEAST_WINDOW: u32 = 64 << 10;
const MOST_WINDOW: u32 = 1 << 20;
/// The most there is ([RFC 9113](https://www.rfc-editor.org/rfc/rfc9113#section-6.9.1)).
const MAX_WINDOW: u32 = (1 << 31) - 1;
/// What h2 lets small frames cost that nobody has read, 256 bytes each less what is in them, before it gives the connection
/// up with all its streams.
const SMALL_FRAMES: usize = 64 << 20;
/// How many streams h2 remembers that we have reset, and for how long: what still comes of others ends the connection.
const RESETS: usize = 1000;
const CROSSING: Duration = Duration::from_secs(30);

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
            written: AtomicU64::new(0),
            arrived: AtomicU64::new(0),
            shard: Arc::downgrade(shard),
            _place: place,
        });
        let streams = u32::try_from(limits.streams).unwrap_or(u32::MAX).max(1);
        let stream_window = (WINDOW / streams).clamp(LEAST_WINDOW, MOST_WINDOW);
        let mut builder = Builder::new();
        builder
            .enable_push(false)
            .initial_window_size(stream_window)
            .initial_connection_window_size(stream_window.saturating_mul(streams).clamp(WINDOW, MAX_WINDOW))
            .data_frame_budget(SMALL_FRAMES)
            .max_concurrent_reset_streams(RESETS)
            .reset_stream_duration(CROSSING)
            .max_local_error_reset_streams(None)
            .max_send_buffer_size(1 << 20)
            .max_header_list_size(u32::try_from(limits.max_head).unwrap_or(u32::MAX))
            .initial_max_send_streams(limits.streams);
        let (sender, mut connection) = builder
            .handshake(Heard { stream, state: state.clone() })
            .await
            .map_err(|error| Failure::unsent(Kind::Connect).because(&error))?;
        let pings = limits.keep_alive.zip(connection.ping_pong());
        let pings = pings.map(|((interval, timeout), pings)| Pings::new(pings, interval, timeout));
        tokio::spawn(state.clone().drive(connection, pings));
        Ok((Self { sender, state: state.clone(), retire, last_used: now }, StreamPlace(state)))
    }

    /// For whoever has a place.
    pub(crate) fn sender(&self) -> Sender {
        self.sender.clone()
    }

    /// A stream, if there is one left, and the connection is not `to_retire`, or that does not count.
    pub(crate) fn stream(&mut self, now: Instant, limit: usize, to_retire: bool) -> Option<StreamPlace> {
        let most = self.state.most.load(Ordering::Relaxed).min(limit);
        let is_fit = (to_retire || !self.is_to_retire(now))
            && self.state.streams.load(Ordering::SeqCst) < most
            && is_open(&mut self.sender).is_ok();
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

    fn is_to_retire(&self, now: Instant) -> bool {
        self.retire.is_some_and(|retire| now >= retire)
    }

    pub(crate) fn is_over(&mut self, now: Instant, idle_timeout: Duration) -> bool {
        let is_old = self.is_to_retire(now) || now.saturating_duration_since(self.last_used) > idle_timeout;
        is_open(&mut self.sender).is_err() || is_old && self.is_unused()
    }
}

// === impl State ===

impl State {
    /// Ends when no stream can begin any more and those that did are over, or with the connection.
    async fn drive(self: Arc<Self>, mut connection: Connection<Heard, Bytes>, mut pings: Option<Pings>) {
        let result = poll_fn(|cx| {
            let polled = Pin::new(&mut connection).poll(cx);
            let heard = self.heard.swap(false, Ordering::Relaxed);
            if heard {
                self.most.store(connection.max_concurrent_send_streams(), Ordering::Relaxed);
                self.settle();
            }
            if polled.is_pending()
                && let Some(pings) = &mut pings
            {
                let is_used = self.streams.load(Ordering::Relaxed) > 0;
                return pings.poll(cx, heard, is_used).map(|()| Err(Reason::NO_ERROR.into()));
            }
            polled
        })
        .await;
        // Streams that are left end with it.
        drop(connection);
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

impl StreamPlace {
    /// A place for what goes on in the same stream when the rest of it is over.
    pub(crate) fn shared(&self) -> Self {
        self.0.streams.fetch_add(1, Ordering::Relaxed);
        Self(self.0.clone())
    }

    /// Counts what the connection sends, of whatever stream. What began when it had sent this much and ended before it
    /// sent more did not leave.
    pub(crate) fn written(&self) -> u64 {
        self.0.written.load(Ordering::Relaxed)
    }

    /// Counts how often anything arrived, of whatever stream.
    pub(crate) fn arrived(&self) -> u64 {
        self.0.arrived.load(Ordering::Relaxed)
    }

    /// Nothing arrived since then while an answer was due: no other stream begins until something does.
    pub(crate) fn doubt(&self, arrived: u64) {
        if self.arrived() == arrived {
            self.0.most.store(0, Ordering::Relaxed);
        }
    }
}

impl Drop for StreamPlace {
    fn drop(&mut self) {
        let before = self.0.streams.fetch_sub(1, Ordering::SeqCst);
        let Some(shard) = self.0.shard.upgrade() else { return };
        if shard.has_waiting() {
            shard.room.notify_one();
            if before == 1 {
                // Others may close it for one of theirs.
                shard.returned.notify_one();
            }
        } else if before == 1 && shard.is_missed_elsewhere() {
            shard.forget(|h2| Arc::ptr_eq(&h2.state, &self.0) && h2.is_unused());
        }
    }
}

/// Whether streams can begin. Nobody is woken when that changes: whoever has begun none with this sender need not wait.
pub(crate) fn is_open(sender: &mut Sender) -> Result<(), h2::Error> {
    match poll_once(|cx| sender.poll_ready(cx)) {
        Poll::Ready(ready) => ready,
        Poll::Pending => Ok(()),
    }
}

// === impl Upload ===

impl Upload {
    pub(crate) fn new(stream: SendStream<Bytes>, body: Outgoing) -> Self {
        Self { transmit: Transmit::request(stream), body }
    }

    /// Ready when all was handed over, or no more of it can be. `flow` hears when the endpoint takes some.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, flow: Option<&Flow>) -> Poll<()> {
        match self.transmit.poll(cx, Pin::new(&mut self.body), || flow.into_iter().for_each(Flow::touch)) {
            Ok(()) => Poll::Ready(()),
            Err(Halt::Broken(error)) => {
                self.transmit.reset(reason(&*error));
                Poll::Ready(())
            }
            // That the endpoint wants no more must be noticed while there is nothing to send.
            Err(Halt::Body | Halt::Room) => self.transmit.poll_reset(cx),
        }
    }

    /// Sends it to its end, unless the answer is given up, both stand still for `idle` or there is no time left.
    pub(crate) async fn run(mut self, flow: Arc<Flow>, idle: Duration, end: Option<Instant>, _place: StreamPlace) {
        let mut alarm = Alarm::default();
        poll_fn(|cx| {
            if self.poll(cx, Some(&flow)).is_ready() {
                return Poll::Ready(());
            }
            if flow.poll_given_up(cx).is_ready() {
                self.transmit.reset(Reason::CANCEL);
                return Poll::Ready(());
            }
            let Some(end) = earlier(after(flow.moved(), idle), end) else { return Poll::Pending };
            ready!(alarm.poll(cx, end));
            // The answer may hold on to the stream.
            self.transmit.reset(Reason::CANCEL);
            Poll::Ready(())
        })
        .await;
    }
}

// === impl Heard ===

impl AsyncRead for Heard {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
        if !buf.filled().is_empty() {
            this.state.heard.store(true, Ordering::Relaxed);
            this.state.arrived.fetch_add(1, Ordering::Relaxed);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Heard {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, bytes))?;
        self.state.written.fetch_add(written as u64, Ordering::Relaxed);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, slices))?;
        self.state.written.fetch_add(written as u64, Ordering::Relaxed);
        Poll::Ready(Ok(written))
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
