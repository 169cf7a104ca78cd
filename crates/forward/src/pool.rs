//! The connections to one endpoint.
//!
//! They live in a slot of the endpoint's handle and end with it. Each runtime has a shard of its own, since a connection
//! belongs to the runtime that opened it; the limit on open connections is shared. Idle ones are looked after by one task
//! per shard, which ends when there is nothing left to look after.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use portcullis_core::Endpoint;
use tokio::runtime::{Handle, Id};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};

use crate::connect::Lookup;
use crate::failure::Failure;
use crate::h1::H1;
use crate::h2::H2;
use crate::lease::{Lease, Want};

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
    lookup: Arc<Lookup>,
    shards: Arc<Shards>,
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
    pub(crate) limits: Arc<Limits>,
    pub(crate) open: Arc<Semaphore>,
    pub(crate) lookup: Arc<Lookup>,
    kept: Mutex<Kept>,
    pub(crate) waiting: AtomicUsize,
    /// A connection came to be unused: one of HTTP/1.1 that came back, or one of HTTP/2 whose last stream ended.
    pub(crate) returned: Notify,
    /// A stream ended, or an HTTP/2 connection came to be, failed to, or ended.
    pub(crate) room: Notify,
    /// Nobody makes the HTTP/2 connection any more that others wait for: there is no place for it.
    pub(crate) resigned: Notify,
    all: Weak<Shards>,
}

#[derive(Default)]
pub(crate) struct Kept {
    #[expect(clippy::vec_box, reason = "they go in and out for every request")]
    idle: Vec<Box<H1>>,
    pub(crate) h2: Vec<H2>,
    /// Somebody is making a connection that will have room for others.
    pub(crate) dialing: bool,
    /// What TLS agreed on the last time.
    pub(crate) agreed_h2: Option<bool>,
    /// Counts HTTP/2 connections that could not be made, and keeps the last reason, for those who waited for it.
    pub(crate) failures: u64,
    pub(crate) failure: Option<Failure>,
    is_looked_after: bool,
    keeper: Option<AbortHandle>,
}

/// A connection to be closed, where no lock is held.
#[expect(dead_code, reason = "to be dropped")]
enum Unused {
    H1(Box<H1>),
    H2(H2),
}

/// Closes what was idle for too long.
struct Keeper {
    shard: Weak<Shard>,
}

// === impl Pool ===

impl Pool {
    pub(crate) fn new(limits: Arc<Limits>) -> Self {
        Self {
            open: Arc::new(Semaphore::new(limits.connections)),
            limits,
            lookup: Arc::default(),
            shards: Arc::default(),
        }
    }

    /// This runtime's connections.
    pub(crate) fn shard(&self) -> &Arc<Shard> {
        let runtime = Handle::current().id();
        let mut shards = &*self.shards;
        loop {
            let link = shards.0.get_or_init(|| {
                let shard = Shard {
                    limits: self.limits.clone(),
                    open: self.open.clone(),
                    lookup: self.lookup.clone(),
                    kept: Mutex::default(),
                    waiting: AtomicUsize::new(0),
                    returned: Notify::new(),
                    room: Notify::new(),
                    resigned: Notify::new(),
                    all: Arc::downgrade(&self.shards),
                };
                Box::new(Link { runtime, shard: Arc::new(shard), next: Shards::default() })
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
        self.shards.iter().fold((0, 0), |(idle, h2), shard| {
            let kept = shard.kept();
            (idle + kept.idle.len(), h2 + kept.h2.len())
        })
    }
}

// === impl Shards ===

impl Shards {
    fn iter(&self) -> impl Iterator<Item = &Arc<Shard>> {
        std::iter::successors(self.0.get(), |link| link.next.0.get()).map(|link| &link.shard)
    }
}

// === impl Shard ===

impl Shard {
    pub(crate) fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection that is there and free.
    pub(crate) fn take(&self, want: Want, now: Instant) -> Option<Lease> {
        let mut kept = self.kept();
        if want != Want::H1
            && let Some(lease) = kept.stream(now, self.limits.streams, false)
        {
            return Some(lease);
        }
        if want == Want::H2 {
            return None;
        }
        while let Some(mut h1) = kept.idle.pop() {
            // The upstream may have closed it meanwhile.
            if !h1.is_over_age(now, self.limits.idle_timeout) && h1.is_quiet() {
                return Some(Lease::H1(h1));
            }
        }
        None
    }

    /// A stream of a connection that is to be given up: where no other may be opened, that has to wait.
    pub(crate) fn retired(&self, want: Want, now: Instant) -> Option<Lease> {
        if want == Want::H1 { None } else { self.kept().stream(now, self.limits.streams, true) }
    }

    /// The right to open a connection. If all that are allowed are open, an idle one of any runtime is closed for it; the
    /// place of one of HTTP/2 comes free when its task has ended.
    pub(crate) fn place(&self) -> Option<OwnedSemaphorePermit> {
        if let Ok(place) = self.open.clone().try_acquire_owned() {
            return Some(place);
        }
        let all = self.all.upgrade()?;
        let idle = all.iter().find_map(|shard| shard.kept().unused());
        drop(idle);
        self.open.clone().try_acquire_owned().ok()
    }

    /// Whether another runtime waits for a connection to end, and this one does not.
    pub(crate) fn is_missed_elsewhere(&self) -> bool {
        self.open.available_permits() == 0
            && !self.has_waiting()
            && self.all.upgrade().is_some_and(|all| all.iter().any(|shard| shard.has_waiting()))
    }

    pub(crate) fn has_waiting(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) > 0
    }

    /// Lets go of an HTTP/2 connection.
    pub(crate) fn forget(&self, ended: impl Fn(&H2) -> bool) {
        self.kept().h2.retain(|h2| !ended(h2));
        self.room.notify_waiters();
    }

    /// Takes a connection back whose exchange is over; whatever is not fit for another is closed.
    pub(crate) fn put(self: &Arc<Self>, mut h1: Box<H1>, endpoint: &Endpoint) {
        if endpoint.is_removed() || !h1.rests(Instant::now()) {
            return;
        }
        let mut kept = self.kept();
        if kept.idle.len() >= self.limits.idle {
            return;
        }
        kept.idle.push(h1);
        let is_looked_after = kept.is_looked_after;
        drop(kept);
        if !is_looked_after {
            self.look_after();
        }
        // After it can be found: whoever begins to wait now finds it, or is seen here.
        if self.has_waiting() {
            self.returned.notify_one();
        } else {
            self.yield_place();
        }
    }

    /// Closes a connection that nobody uses if another runtime waits for its place, and this one does not.
    pub(crate) fn yield_place(&self) {
        if self.is_missed_elsewhere() {
            let unused = self.kept().unused();
            drop(unused);
        }
    }

    /// Starts the task that closes what was idle for too long, unless it runs.
    pub(crate) fn look_after(self: &Arc<Self>) {
        if std::mem::replace(&mut self.kept().is_looked_after, true) {
            return;
        }
        let keeper = Keeper { shard: Arc::downgrade(self) };
        // Without the lock: a runtime that is going away drops the task at once, and with it the keeper.
        let keeper = tokio::spawn(keeper.run(self.limits.idle_timeout)).abort_handle();
        self.kept().keeper = Some(keeper);
    }

    /// Closes what is over; true while something is left.
    fn sweep(&self, now: Instant) -> bool {
        let timeout = self.limits.idle_timeout;
        let mut kept = self.kept();
        kept.h2.retain_mut(|h2| !h2.is_over(now, timeout));
        kept.idle.retain_mut(|h1| !h1.is_over_age(now, timeout) && h1.is_quiet());
        if kept.idle.is_empty() && kept.h2.is_empty() {
            kept.is_looked_after = false;
            return false;
        }
        true
    }
}

impl Drop for Shard {
    fn drop(&mut self) {
        if let Some(keeper) = &self.kept().keeper {
            keeper.abort();
        }
    }
}

// === impl Kept ===

impl Kept {
    /// Lets go of a connection that nobody uses.
    fn unused(&mut self) -> Option<Unused> {
        if let Some(h1) = self.idle.pop() {
            return Some(Unused::H1(h1));
        }
        let at = self.h2.iter().position(H2::is_unused)?;
        Some(Unused::H2(self.h2.swap_remove(at)))
    }

    pub(crate) fn stream(&mut self, now: Instant, limit: usize, to_retire: bool) -> Option<Lease> {
        self.h2.iter_mut().find_map(|h2| {
            let place = h2.stream(now, limit, to_retire)?;
            Some(Lease::H2(h2.sender(), place, true))
        })
    }
}

// === impl Keeper ===

impl Keeper {
    async fn run(mut self, idle_timeout: Duration) {
        let every = (idle_timeout / 4).clamp(Duration::from_millis(100), Duration::from_secs(15));
        loop {
            sleep(every).await;
            match self.shard.upgrade() {
                Some(shard) if shard.sweep(Instant::now()) => {}
                // Another may look after it by now.
                _ => return self.shard = Weak::new(),
            }
        }
    }
}

/// The runtime is going away, or the keeper was done: connections of a runtime that is gone are of no use.
impl Drop for Keeper {
    fn drop(&mut self) {
        if let Some(shard) = self.shard.upgrade() {
            let mut kept = shard.kept();
            if std::mem::take(&mut kept.is_looked_after) {
                let (idle, h2) = (std::mem::take(&mut kept.idle), std::mem::take(&mut kept.h2));
                drop(kept);
                drop((idle, h2));
            }
        }
    }
}
