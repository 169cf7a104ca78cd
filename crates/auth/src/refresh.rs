//! When keys are fetched again: ahead of their time, on demand but rarely, and never so that a request waits long.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use portcullis_core::{Clock, Moment};
use tokio::sync::{Notify, watch};

/// How long a request waits for keys at most.
pub(crate) const PATIENCE: Duration = Duration::from_secs(1);

/// How many unknown identifiers are remembered.
const REMEMBERED: usize = 256;

/// How the keys of a set are kept fresh, as it stands now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Freshness {
    /// How often the source was asked.
    pub fetches: u64,
    /// How many of these failed.
    pub failures: u64,
    /// How long ago keys were last read; `None` if they never were.
    pub age: Option<Duration>,
}

pub(crate) struct Refresh {
    clock: Clock,
    cooldown: Duration,
    /// Before this moment nobody may ask for a fetch.
    closed_until: AtomicU64,
    /// Counts begun fetches.
    begun: AtomicU64,
    /// The fetch somebody waits for, counted likewise: whoever comes before it is done may wait with them.
    asked_for: AtomicU64,
    wake: Notify,
    /// Counts finished fetches.
    done: watch::Sender<u64>,
    failures: AtomicU64,
    failing: AtomicBool,
    /// When keys were last read; zero for never.
    read_at: AtomicU64,
    /// Hashes of identifiers that were asked for and not found, each with the moment until which that is believed.
    unknown: Box<[(AtomicU64, AtomicU64)]>,
    hash: RandomState,
}

// === impl Refresh ===

impl Refresh {
    pub(crate) fn new(clock: Clock, cooldown: Duration) -> Self {
        Self {
            clock,
            cooldown,
            closed_until: AtomicU64::new(0),
            begun: AtomicU64::new(0),
            asked_for: AtomicU64::new(1),
            wake: Notify::new(),
            done: watch::Sender::new(0),
            failures: AtomicU64::new(0),
            failing: AtomicBool::new(false),
            read_at: AtomicU64::new(0),
            unknown: (0..REMEMBERED).map(|_| Default::default()).collect(),
            hash: RandomState::new(),
        }
    }

    /// Asks for a fetch because of an unknown key. `None` when there is no use in waiting: one was asked for within the
    /// cooldown and is over, or this key was not found lately.
    ///
    /// The future says whether it was over in time.
    pub(crate) fn ask(&self, kid: Option<&str>) -> Option<impl Future<Output = bool> + Send + 'static> {
        let mut done = self.done.subscribe();
        let now = self.clock.now();
        // In this order, and written in the other: where the door is closed, it is known what is asked for.
        let closed_until = self.closed_until.load(Ordering::Acquire);
        let mut awaited = self.asked_for.load(Ordering::Acquire);
        if *done.borrow() >= awaited {
            if now.as_nanos() < closed_until || self.is_known_to_be_unknown(kid, now) {
                return None;
            }
            // One that is under way may have read before the key was there.
            awaited = self.begun.load(Ordering::Acquire) + 1;
            // Whoever comes late may ask for one more than the one who closed the door, and nobody else would say so.
            let is_news = self.asked_for.fetch_max(awaited, Ordering::AcqRel) < awaited;
            let next = (now + self.cooldown).as_nanos();
            let won = self.closed_until.compare_exchange(closed_until, next, Ordering::AcqRel, Ordering::Acquire);
            if won.is_ok() {
                self.remember(kid, now);
            }
            if won.is_ok() || is_news {
                self.wake.notify_one();
            }
        }
        Some(async move { tokio::time::timeout(PATIENCE, done.wait_for(|count| *count >= awaited)).await.is_ok() })
    }

    fn cell(&self, kid: Option<&str>) -> (u64, &(AtomicU64, AtomicU64)) {
        let hash = self.hash.hash_one(kid);
        (hash, &self.unknown[hash as usize % REMEMBERED])
    }

    fn is_known_to_be_unknown(&self, kid: Option<&str>, now: Moment) -> bool {
        let (hash, (have, until)) = self.cell(kid);
        have.load(Ordering::Relaxed) == hash && until.load(Ordering::Relaxed) > now.as_nanos()
    }

    fn remember(&self, kid: Option<&str>, now: Moment) {
        let (hash, (have, until)) = self.cell(kid);
        until.store((now + self.cooldown.saturating_mul(2)).as_nanos(), Ordering::Relaxed);
        have.store(hash, Ordering::Relaxed);
    }

    /// Until somebody asks for a fetch.
    pub(crate) async fn wanted(&self) {
        while self.begun.load(Ordering::Acquire) >= self.asked_for.load(Ordering::Acquire) {
            self.wake.notified().await;
        }
    }

    /// A fetch begins.
    pub(crate) fn begin(&self) {
        self.begun.fetch_add(1, Ordering::AcqRel);
    }

    /// A fetch was tried.
    pub(crate) fn done(&self, read: bool) {
        if read {
            self.read_at.store(self.clock.now().as_nanos(), Ordering::Release);
        } else {
            self.failures.fetch_add(1, Ordering::Relaxed);
        }
        self.failing.store(!read, Ordering::Release);
        self.done.send_modify(|count| *count += 1);
    }

    /// Forgets what was unknown: the keys changed.
    pub(crate) fn forget(&self) {
        self.unknown.iter().for_each(|(_, until)| until.store(0, Ordering::Relaxed));
    }

    pub(crate) fn age(&self) -> Option<Duration> {
        match self.read_at.load(Ordering::Acquire) {
            0 => None,
            at => Some(self.clock.now().since(Moment::from_nanos(at))),
        }
    }

    /// Whether the last try was in vain.
    pub(crate) fn is_failing(&self) -> bool {
        self.failing.load(Ordering::Acquire)
    }

    pub(crate) fn is_blind(&self) -> bool {
        self.is_failing() || self.age().is_none()
    }

    pub(crate) fn freshness(&self) -> Freshness {
        Freshness { fetches: *self.done.borrow(), failures: self.failures.load(Ordering::Relaxed), age: self.age() }
    }
}
