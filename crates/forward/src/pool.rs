//! The connections to one endpoint.
//!
//! They live in a slot of the endpoint's handle and end with it. Each runtime has a shard of its own, since a connection
//! belongs to the runtime that opened it; the limit on open connections is shared.
//!
//! An HTTP/1.1 connection has no task: whoever uses it drives it, from the request's future and the response's body, so
//! that the socket's readiness wakes that very task and nothing is handed over. Idle ones are looked after by one task
//! per shard, which ends when there is nothing left to look after.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures::task::AtomicWaker;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use portcullis_core::{Endpoint, Instance, Protocol, Scheme};
use tokio::runtime::{Handle, Id};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout_at};
use tracing::debug;

use crate::alarm::{Alarm, after};
use crate::connect::{Dialed, dial};
use crate::failure::{Failure, Kind};
use crate::stream::{Relay, Stream};
use crate::upload::Outgoing;

/// How connections are kept. One for all endpoints of a [`Forward`](crate::Forward).
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    /// Open connections per endpoint, busy or idle.
    pub(crate) connections: usize,
    /// Requests that wait for one.
    pub(crate) waiting: usize,
    /// Idle ones per endpoint and runtime.
    pub(crate) idle: usize,
    pub(crate) idle_timeout: Duration,
    pub(crate) max_age: Duration,
    pub(crate) streams: usize,
    pub(crate) keep_alive: Option<(Duration, Duration)>,
    pub(crate) max_head: usize,
    #[cfg(feature = "tls")]
    pub(crate) tls: Option<crate::tls::ClientTls>,
}

/// What an endpoint's slot holds.
pub(crate) struct Pool {
    open: Arc<Semaphore>,
    limits: Arc<Limits>,
    shards: Shards,
}

/// A list that only grows, by one for each runtime that ever used the endpoint.
#[derive(Default)]
struct Shards(OnceLock<Box<Link>>);

struct Link {
    runtime: Id,
    shard: Arc<Shard>,
    next: Shards,
}

/// The connections of one runtime.
pub(crate) struct Shard {
    limits: Arc<Limits>,
    open: Arc<Semaphore>,
    kept: Mutex<Kept>,
    waiting: AtomicUsize,
    /// An HTTP/1.1 connection came back.
    returned: Notify,
    /// A stream ended, or an HTTP/2 connection came to be, failed to, or ended.
    room: Notify,
}

#[derive(Default)]
struct Kept {
    #[expect(clippy::vec_box, reason = "they go in and out for every request")]
    idle: Vec<Box<H1>>,
    h2: Vec<H2>,
    /// Somebody is making a connection that will have room for others.
    dialing: bool,
    /// What TLS agreed on the last time.
    agreed_h2: Option<bool>,
    /// Counts HTTP/2 connections that could not be made, and keeps the last reason, for those who waited for it.
    failures: u64,
    failure: Option<Failure>,
    keeper: Option<AbortHandle>,
}

/// One HTTP/1.1 connection, driven by whoever holds it.
pub(crate) struct H1 {
    pub(crate) sender: http1::SendRequest<Outgoing>,
    connection: Pin<Box<dyn Future<Output = hyper::Result<()>> + Send>>,
    pub(crate) relay: Arc<Relay>,
    waker: Waker,
    finished: bool,
    pub(crate) reused: bool,
    pub(crate) alarm: Alarm,
    retire: Option<Instant>,
    idle_since: Instant,
    _open: OwnedSemaphorePermit,
}

/// One HTTP/2 connection, which a task of its own drives.
struct H2 {
    sender: http2::SendRequest<Outgoing>,
    state: Arc<H2State>,
    retire: Option<Instant>,
    last_used: Instant,
}

struct H2State {
    streams: AtomicUsize,
    /// How many streams the endpoint allows; none but the first until it has said so.
    most: AtomicUsize,
    settled: AtomicBool,
    driver: AtomicWaker,
    shard: Weak<Shard>,
}

/// Spawns what hyper needs for an HTTP/2 connection. The first of it reads the socket: until the endpoint's settings have
/// arrived, it wakes the task that looks at them.
#[derive(Clone)]
struct Spawn {
    state: Arc<H2State>,
    reads: Arc<AtomicBool>,
}

/// The right to one stream; dropping it makes room for another.
pub(crate) struct StreamPlace(Arc<H2State>);

pub(crate) enum Lease {
    H1(Box<H1>),
    H2(http2::SendRequest<Outgoing>, StreamPlace, bool),
}

/// Which protocol a request is to be sent by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    H1,
    H2,
    /// Whatever TLS agrees on.
    Agreed,
}

// === impl Pool ===

impl Pool {
    pub(crate) fn new(limits: Arc<Limits>) -> Self {
        Self { open: Arc::new(Semaphore::new(limits.connections)), limits, shards: Shards::default() }
    }

    /// This runtime's connections.
    pub(crate) fn shard(&self) -> &Arc<Shard> {
        let runtime = Handle::current().id();
        let mut shards = &self.shards;
        loop {
            let link = shards.0.get_or_init(|| {
                Box::new(Link {
                    runtime,
                    shard: Arc::new(Shard {
                        limits: self.limits.clone(),
                        open: self.open.clone(),
                        kept: Mutex::default(),
                        waiting: AtomicUsize::new(0),
                        returned: Notify::new(),
                        room: Notify::new(),
                    }),
                    next: Shards::default(),
                })
            });
            if link.runtime == runtime {
                return &link.shard;
            }
            shards = &link.next;
        }
    }

    /// How many connections are open, busy or idle, in all runtimes.
    pub(crate) fn open(&self) -> usize {
        self.limits.connections.saturating_sub(self.open.available_permits())
    }

    /// How many connections are idle, and how many are HTTP/2, in all runtimes.
    pub(crate) fn count(&self) -> (usize, usize) {
        let (mut idle, mut h2) = (0, 0);
        let mut shards = &self.shards;
        while let Some(link) = shards.0.get() {
            let (more_idle, more_h2) = link.shard.count();
            (idle, h2) = (idle + more_idle, h2 + more_h2);
            shards = &link.next;
        }
        (idle, h2)
    }
}

impl Want {
    pub(crate) fn of(instance: &Instance, is_grpc: bool) -> Self {
        match (instance.protocol, instance.scheme) {
            (Protocol::Http1, _) => Self::H1,
            (Protocol::Http2, _) => Self::H2,
            (_, Scheme::Https) => Self::Agreed,
            _ if is_grpc => Self::H2,
            _ => Self::H1,
        }
    }
}

// === impl Shard ===

impl Shard {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection that is there and free.
    pub(crate) fn take(&self, want: Want, now: Instant) -> Option<Lease> {
        let mut kept = self.kept();
        if want != Want::H1
            && let Some(lease) = kept.stream(now, self.limits.streams)
        {
            return Some(lease);
        }
        if want == Want::H2 {
            return None;
        }
        while let Some(h1) = kept.idle.pop() {
            if !h1.is_over(now, self.limits.idle_timeout) {
                return Some(Lease::H1(h1));
            }
        }
        None
    }

    /// A connection, free or new, before `deadline`. A `fresh` one was not used before.
    pub(crate) async fn lease(
        self: &Arc<Self>,
        endpoint: &Endpoint,
        want: Want,
        fresh: bool,
        deadline: Option<Instant>,
    ) -> Result<Lease, Failure> {
        let lease = self.wait(endpoint, want, fresh);
        match deadline {
            Some(deadline) => {
                timeout_at(deadline, lease).await.unwrap_or_else(|_| Err(Failure::unsent(Kind::ConnectTimeout)))
            }
            None => lease.await,
        }
    }

    async fn wait(self: &Arc<Self>, endpoint: &Endpoint, want: Want, mut fresh: bool) -> Result<Lease, Failure> {
        let mut waiting = None;
        let mut failures = None;
        loop {
            let (mut returned, mut room) = (pin!(self.returned.notified()), pin!(self.room.notified()));
            if want != Want::H2 {
                returned.as_mut().enable();
            }
            if want != Want::H1 {
                room.as_mut().enable();
            }
            if !fresh && let Some(lease) = self.take(want, Instant::now()) {
                return Ok(lease);
            }
            let mut dialing = match self.turn(want, &mut failures)? {
                Turn::Alone => None,
                Turn::ForAll(dialing) => Some(dialing),
                Turn::Wait => {
                    fresh = false;
                    self.queue(&mut waiting)?;
                    tokio::select! {
                        () = returned, if want != Want::H2 => {}
                        () = room => {}
                    }
                    continue;
                }
            };
            let Ok(place) = self.open.clone().try_acquire_owned() else {
                drop(dialing.take());
                self.queue(&mut waiting)?;
                fresh = false;
                tokio::select! {
                    biased;
                    () = returned, if want != Want::H2 => {}
                    () = room, if want != Want::H1 => {}
                    // It is given back at once and taken again above, so that one place serves one of us.
                    _ = self.open.acquire() => {}
                }
                continue;
            };
            let made = self.connect(endpoint, want, place).await;
            if dialing.is_some() {
                let mut kept = self.kept();
                match &made {
                    Ok(lease) if want == Want::Agreed => kept.agreed_h2 = Some(matches!(lease, Lease::H2(..))),
                    Ok(_) => {}
                    Err(failure) => {
                        kept.failures += 1;
                        kept.failure = Some(failure.clone());
                    }
                }
            }
            return made;
        }
    }

    /// Who makes the next connection. One with room for many is made by one request while the others wait for it, and
    /// fails for all of them.
    fn turn<'a>(self: &'a Arc<Self>, want: Want, failures: &mut Option<u64>) -> Result<Turn<'a>, Failure> {
        let mut kept = self.kept();
        if want == Want::H1 || want == Want::Agreed && kept.agreed_h2 == Some(false) {
            return Ok(Turn::Alone);
        }
        if failures.is_some_and(|seen| seen != kept.failures)
            && let Some(failure) = &kept.failure
        {
            return Err(failure.clone());
        }
        *failures = Some(kept.failures);
        if kept.h2.iter().any(|h2| !h2.state.settled.load(Ordering::Acquire)) {
            return Ok(Turn::Wait);
        }
        Ok(if std::mem::replace(&mut kept.dialing, true) { Turn::Wait } else { Turn::ForAll(Dialing(self)) })
    }

    /// Counts the caller among those who wait, if there is room.
    fn queue<'a>(&'a self, waiting: &mut Option<Waiting<'a>>) -> Result<(), Failure> {
        if waiting.is_none() {
            let before = self.waiting.fetch_add(1, Ordering::AcqRel);
            let entry = Waiting(&self.waiting);
            if before >= self.limits.waiting {
                return Err(Failure::unsent(Kind::Exhausted));
            }
            *waiting = Some(entry);
        }
        Ok(())
    }

    /// A connection for a tunnel, which is nobody else's and is counted as long as its place is held.
    pub(crate) async fn open(
        &self,
        endpoint: &Endpoint,
        deadline: Option<Instant>,
    ) -> Result<(Stream, OwnedSemaphorePermit), Failure> {
        let opened = async {
            let place = match self.open.clone().try_acquire_owned() {
                Ok(place) => place,
                Err(_) => {
                    let mut waiting = None;
                    self.queue(&mut waiting)?;
                    self.open.clone().acquire_owned().await.map_err(|_| Failure::unsent(Kind::Exhausted))?
                }
            };
            Ok((self.dial(endpoint, Some(false)).await?.stream, place))
        };
        match deadline {
            Some(deadline) => {
                timeout_at(deadline, opened).await.unwrap_or_else(|_| Err(Failure::unsent(Kind::ConnectTimeout)))
            }
            None => opened.await,
        }
    }

    async fn dial(&self, endpoint: &Endpoint, h2: Option<bool>) -> Result<Dialed, Failure> {
        let instance = endpoint.instance();
        #[cfg(feature = "tls")]
        let dialed = dial(&instance, h2, self.limits.tls.as_ref()).await?;
        #[cfg(not(feature = "tls"))]
        let dialed = dial(&instance, h2).await?;
        debug!(endpoint = %endpoint.id(), h2 = dialed.h2, "connected");
        Ok(dialed)
    }

    async fn connect(
        self: &Arc<Self>,
        endpoint: &Endpoint,
        want: Want,
        place: OwnedSemaphorePermit,
    ) -> Result<Lease, Failure> {
        let h2 = match want {
            Want::H1 => Some(false),
            Want::H2 => Some(true),
            Want::Agreed => None,
        };
        let dialed = self.dial(endpoint, h2).await?;
        let now = Instant::now();
        // Not all at once: what was opened together would otherwise be reopened together.
        let jitter = 1.0 + (fastrand::f64() - 0.5) * 0.2;
        let retire = after(now, self.limits.max_age).map(|_| now + self.limits.max_age.mul_f64(jitter));
        if dialed.h2 {
            self.handshake_h2(dialed, place, now, retire).await
        } else {
            self.handshake_h1(dialed, place, now, retire).await.map(Lease::H1)
        }
    }

    async fn handshake_h1(
        &self,
        dialed: Dialed,
        place: OwnedSemaphorePermit,
        now: Instant,
        retire: Option<Instant>,
    ) -> Result<Box<H1>, Failure> {
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(self.limits.max_head)
            .handshake(TokioIo::new(dialed.stream))
            .await
            .map_err(|error| Failure::unsent(Kind::Connect).because(&error))?;
        Ok(Box::new(H1 {
            sender,
            connection: Box::pin(connection.with_upgrades()),
            waker: Waker::from(dialed.relay.clone()),
            relay: dialed.relay,
            finished: false,
            reused: false,
            alarm: Alarm::default(),
            retire,
            idle_since: now,
            _open: place,
        }))
    }

    async fn handshake_h2(
        self: &Arc<Self>,
        dialed: Dialed,
        place: OwnedSemaphorePermit,
        now: Instant,
        retire: Option<Instant>,
    ) -> Result<Lease, Failure> {
        let state = Arc::new(H2State {
            streams: AtomicUsize::new(0),
            most: AtomicUsize::new(1),
            settled: AtomicBool::new(false),
            driver: AtomicWaker::new(),
            shard: Arc::downgrade(self),
        });
        let spawn = Spawn { state: state.clone(), reads: Arc::default() };
        let mut builder = http2::Builder::new(spawn);
        builder
            .timer(TokioTimer::new())
            .adaptive_window(false)
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(1 << 24)
            .max_header_list_size(u32::try_from(self.limits.max_head).unwrap_or(u32::MAX))
            .initial_max_send_streams(self.limits.streams);
        if let Some((interval, timeout)) = self.limits.keep_alive {
            builder.keep_alive_interval(interval).keep_alive_timeout(timeout);
        }
        let relay = dialed.relay;
        let (sender, mut connection) = builder
            .handshake(TokioIo::new(dialed.stream))
            .await
            .map_err(|error| Failure::unsent(Kind::Connect).because(&error))?;
        let driven = state.clone();
        // Ends with the connection, which ends when the last sender and the last stream are gone.
        tokio::spawn(async move {
            let _place = place;
            let result = poll_fn(|cx| {
                driven.driver.register(cx.waker());
                let polled = Pin::new(&mut connection).poll(cx);
                // Settings are the first thing an endpoint says.
                if relay.read() > 0 {
                    driven.most.store(connection.current_max_send_streams(), Ordering::Relaxed);
                    driven.settle();
                }
                polled
            })
            .await;
            driven.most.store(0, Ordering::Relaxed);
            driven.settle();
            if let Err(error) = result {
                debug!(%error, "HTTP/2 connection ended");
            }
            if let Some(shard) = driven.shard.upgrade() {
                shard.forget(&driven);
            }
        });
        state.streams.fetch_add(1, Ordering::Relaxed);
        let lease = Lease::H2(sender.clone(), StreamPlace(state.clone()), false);
        self.kept().h2.push(H2 { sender, state, retire, last_used: now });
        self.look_after();
        Ok(lease)
    }

    fn forget(&self, state: &Arc<H2State>) {
        self.kept().h2.retain(|h2| !Arc::ptr_eq(&h2.state, state));
        self.room.notify_waiters();
    }

    /// Takes a connection back whose exchange is over; whatever is not fit for another is closed.
    pub(crate) fn put(self: &Arc<Self>, mut h1: Box<H1>, endpoint: &Endpoint) {
        if !h1.sender.is_ready() {
            // The end of the body may not have been seen yet.
            h1.relay.detach();
            h1.drive();
        }
        if h1.finished || !h1.sender.is_ready() || endpoint.is_removed() {
            return;
        }
        h1.relay.detach();
        h1.reused = true;
        h1.idle_since = Instant::now();
        let mut kept = self.kept();
        if kept.idle.len() >= self.limits.idle {
            return;
        }
        kept.idle.push(h1);
        if kept.keeper.is_none() {
            drop(kept);
            self.look_after();
        }
        if self.waiting.load(Ordering::Acquire) > 0 {
            self.returned.notify_one();
        }
    }

    /// Starts the task that closes what was idle for too long, unless it runs.
    fn look_after(self: &Arc<Self>) {
        let mut kept = self.kept();
        if kept.keeper.is_none() {
            let keeper = Keeper { shard: Arc::downgrade(self) };
            kept.keeper = Some(tokio::spawn(keeper.run(self.limits.idle_timeout)).abort_handle());
        }
    }

    /// Closes what is over; true while something is left.
    fn sweep(&self, now: Instant) -> bool {
        let timeout = self.limits.idle_timeout;
        let mut kept = self.kept();
        let idle = std::mem::take(&mut kept.idle);
        kept.h2.retain(|h2| !h2.is_over(now, timeout));
        let more = !kept.h2.is_empty();
        drop(kept);
        let alive: Vec<_> = idle
            .into_iter()
            .filter_map(|mut h1| {
                // Looks whether the upstream has closed it meanwhile.
                h1.drive();
                (!h1.finished && h1.sender.is_ready() && !h1.is_over(now, timeout)).then_some(h1)
            })
            .collect();
        let mut kept = self.kept();
        let newer = std::mem::replace(&mut kept.idle, alive);
        kept.idle.extend(newer);
        if kept.idle.is_empty() && !more && kept.h2.is_empty() {
            kept.keeper = None;
            return false;
        }
        true
    }

    /// How many connections are idle, and how many are HTTP/2.
    pub(crate) fn count(&self) -> (usize, usize) {
        let kept = self.kept();
        (kept.idle.len(), kept.h2.len())
    }
}

impl Drop for Shard {
    fn drop(&mut self) {
        if let Some(keeper) = &self.kept().keeper {
            keeper.abort();
        }
    }
}

struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Somebody makes an HTTP/2 connection; whether it came to be or not, those who wait must know.
struct Dialing<'a>(&'a Arc<Shard>);

impl Drop for Dialing<'_> {
    fn drop(&mut self) {
        self.0.kept().dialing = false;
        self.0.room.notify_waiters();
    }
}

enum Turn<'a> {
    /// Make one for yourself.
    Alone,
    /// Make one that others wait for.
    ForAll(Dialing<'a>),
    /// Another request is at it.
    Wait,
}

struct Keeper {
    shard: Weak<Shard>,
}

impl Keeper {
    async fn run(self, idle_timeout: Duration) {
        let every = (idle_timeout / 4).clamp(Duration::from_millis(100), Duration::from_secs(15));
        loop {
            sleep(every).await;
            match self.shard.upgrade() {
                Some(shard) if shard.sweep(Instant::now()) => {}
                _ => return,
            }
        }
    }
}

/// The runtime is going away, or the keeper was done: connections of a runtime that is gone are of no use.
impl Drop for Keeper {
    fn drop(&mut self) {
        if let Some(shard) = self.shard.upgrade() {
            let mut kept = shard.kept();
            if kept.keeper.take().is_some() {
                let (idle, h2) = (std::mem::take(&mut kept.idle), std::mem::take(&mut kept.h2));
                drop(kept);
                drop((idle, h2));
            }
        }
    }
}

// === impl Kept ===

impl Kept {
    fn stream(&mut self, now: Instant, limit: usize) -> Option<Lease> {
        let at = self.h2.iter().position(|h2| {
            let most = h2.state.most.load(Ordering::Relaxed).min(limit);
            !h2.sender.is_closed()
                && h2.retire.is_none_or(|retire| now < retire)
                && h2.state.streams.load(Ordering::Relaxed) < most
        })?;
        let h2 = &mut self.h2[at];
        h2.state.streams.fetch_add(1, Ordering::Relaxed);
        h2.last_used = now;
        Some(Lease::H2(h2.sender.clone(), StreamPlace(h2.state.clone()), true))
    }
}

// === impl H1 ===

impl H1 {
    /// Lets the connection do what it can, for the task whose waker the relay holds.
    pub(crate) fn drive(&mut self) {
        if !self.finished {
            self.finished = self.connection.as_mut().poll(&mut Context::from_waker(&self.waker)).is_ready();
        }
    }

    /// As [`drive`](Self::drive), waking the task of `cx` when there is more to do.
    pub(crate) fn drive_for(&mut self, cx: &Context<'_>) {
        self.relay.attach(cx.waker());
        self.drive();
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.finished
    }

    fn is_over(&self, now: Instant, idle_timeout: Duration) -> bool {
        self.retire.is_some_and(|retire| now >= retire) || now.saturating_duration_since(self.idle_since) > idle_timeout
    }

    /// Drives the connection to its end, on its own.
    pub(crate) async fn run(mut self: Box<Self>) {
        poll_fn(|cx| {
            self.drive_for(cx);
            if self.finished { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// As [`run`](Self::run), but nobody will ask anything of it again.
    pub(crate) fn abandon(self) -> impl Future<Output = ()> + Send {
        let Self { sender, mut connection, relay, waker, finished, _open, .. } = self;
        drop(sender);
        async move {
            let _open = _open;
            if !finished {
                poll_fn(|cx| {
                    relay.attach(cx.waker());
                    connection.as_mut().poll(&mut Context::from_waker(&waker)).map(|_| ())
                })
                .await;
            }
        }
    }
}

// === impl H2 ===

impl H2 {
    fn is_over(&self, now: Instant, idle_timeout: Duration) -> bool {
        let unused = self.state.streams.load(Ordering::Relaxed) == 0;
        self.sender.is_closed()
            || self.retire.is_some_and(|retire| now >= retire)
            || unused && now.saturating_duration_since(self.last_used) > idle_timeout
    }
}

impl H2State {
    fn settle(&self) {
        if !self.settled.swap(true, Ordering::AcqRel)
            && let Some(shard) = self.shard.upgrade()
        {
            shard.room.notify_waiters();
        }
    }
}

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

impl Drop for StreamPlace {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
        if let Some(shard) = self.0.shard.upgrade()
            && shard.waiting.load(Ordering::Acquire) > 0
        {
            shard.room.notify_one();
        }
    }
}
