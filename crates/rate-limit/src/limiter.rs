//! What all services of one layer share, and how a request begins.

use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use portcullis_core::{Clock, Deadline, Moment, Rejection, Route, TrustedProxies};

use crate::answer::{Fields, Refusal, Standing};
use crate::counters::Counters;
use crate::current::{Current, Seen};
use crate::held::Holding;
use crate::in_flight::InFlight;
use crate::key::{Caller, Key, KeyBytes, RequestHead};
use crate::limit::{Limit, Policy};
use crate::rate::{Cell, nanos};
use crate::table::{Mark, Table};

/// What all services of one layer share.
pub(crate) struct Limiter {
    pub(crate) limits: Current,
    pub(crate) table: Table,
    pub(crate) capacity: usize,
    pub(crate) key: Arc<dyn Key>,
    pub(crate) proxies: TrustedProxies,
    pub(crate) exempt: Option<Exempt>,
    pub(crate) fields: Fields,
    pub(crate) clock: Clock,
    pub(crate) delay: Option<Delay>,
    pub(crate) counters: Counters,
    #[cfg(feature = "redis")]
    pub(crate) store: Option<crate::RedisStore>,
    in_flight: OnceLock<InFlight>,
}

/// How a request goes on.
pub(crate) enum Begun {
    Decided(Result<Admission, Rejection>),
    #[cfg_attr(not(feature = "redis"), expect(dead_code, reason = "only a store is asked"))]
    Asked(Asking),
}

pub(crate) type Asking = Pin<Box<dyn Future<Output = Result<Admission, Rejection>> + Send>>;

/// Lets requests wait instead of refusing them.
#[derive(Debug)]
pub(crate) struct Delay {
    pub(crate) longest: Duration,
    pub(crate) places: usize,
    waiting: AtomicUsize,
}

/// A place among those that wait; dropping it gives it back.
pub(crate) struct WaitingPlace(Arc<Limiter>);

/// A request that may go on; most have nothing to remember.
#[derive(Default)]
pub(crate) struct Admission(pub(crate) Option<Box<Kept>>);

/// What is remembered of an admission.
#[derive(Default)]
pub(crate) struct Kept {
    /// Not yet, but after this.
    pub(crate) wait: Duration,
    /// How its limits stand, if anybody wants to know.
    pub(crate) standings: Vec<Standing>,
    /// What it gives back.
    pub(crate) holdings: Vec<Holding>,
    /// The refusal, if it may not wait after all.
    pub(crate) late: Option<Refusal>,
    /// Where it waits, if it has that already.
    pub(crate) place: Option<WaitingPlace>,
}

pub(crate) type Exempt = Arc<dyn Fn(&RequestHead<'_>) -> bool + Send + Sync>;

/// The limits on one request, the route's own first.
#[derive(Clone, Copy)]
pub(crate) struct Limits<'a> {
    route: &'a str,
    own: &'a [Limit],
    base: &'a [Limit],
}

// === impl Limiter ===

impl Limiter {
    pub(crate) fn new(limits: Vec<Limit>) -> Self {
        Self {
            limits: Current::new(limits),
            table: Table::new(crate::DEFAULT_CAPACITY),
            capacity: crate::DEFAULT_CAPACITY,
            key: Arc::new(Caller::new()),
            proxies: TrustedProxies::none(),
            exempt: None,
            fields: Fields::default(),
            clock: Clock::system(),
            delay: None,
            counters: Counters::default(),
            #[cfg(feature = "redis")]
            store: None,
            in_flight: OnceLock::new(),
        }
    }

    /// The same settings with counters of its own.
    pub(crate) fn fork(&self) -> Self {
        Self {
            limits: Current::new(self.limits.to_vec()),
            table: Table::new(self.capacity),
            capacity: self.capacity,
            key: self.key.clone(),
            proxies: self.proxies.clone(),
            exempt: self.exempt.clone(),
            fields: self.fields,
            clock: self.clock.clone(),
            delay: self.delay.as_ref().map(|delay| Delay::new(delay.longest, delay.places)),
            counters: Counters::default(),
            #[cfg(feature = "redis")]
            store: self.store.clone(),
            in_flight: OnceLock::new(),
        }
    }

    pub(crate) fn in_flight(&self) -> &InFlight {
        self.in_flight.get_or_init(|| InFlight::new(self.capacity))
    }

    /// Requests that hold a place of a concurrency limit; one that holds two counts twice.
    pub(crate) fn places_held(&self) -> u64 {
        self.in_flight.get().map_or(0, InFlight::total)
    }

    /// Charges all limits of a request, or none; here, or in the store.
    pub(crate) fn begin(self: &Arc<Self>, seen: &Seen, head: &RequestHead<'_>) -> Begun {
        if self.is_exempt(head) {
            return Begun::Decided(Ok(Admission::default()));
        }
        let base = self.limits.now(seen);
        let limits = Limits::of(head, &base);
        #[cfg(feature = "redis")]
        if let Some(store) = &self.store {
            return store.begin(self, limits, head);
        }
        Begun::Decided(self.charge_all(limits, head).map_err(|refusal| self.refuse(refusal)))
    }

    pub(crate) fn is_exempt(&self, head: &RequestHead<'_>) -> bool {
        self.exempt.as_ref().is_some_and(|exempt| exempt(head))
    }

    pub(crate) fn refuse(&self, refusal: Refusal) -> Rejection {
        tracing::debug!(limit = &*refusal.standing.name, wait = ?refusal.wait, "refused: too many requests");
        refusal.into_rejection(self.fields)
    }

    /// Corrects a charge of so many units, whose turn was at that time, to `cost`. Those who share a bucket with the key wait
    /// no longer than a window for it.
    pub(crate) fn settle(&self, mark: Mark, cell: Cell, units: u32, cost: u32, at: u64) {
        let now = self.clock.now().as_nanos();
        let difference = cell.cost(units.abs_diff(cost));
        if cost > units {
            let more = |time: u64| Some(time.max(now).saturating_add(difference));
            let _ = self.table.charge_up_to(now.saturating_add(cell.window), mark, now, more);
        } else if cost < units {
            // What would have come back since is back already.
            self.table.refund(mark, difference.saturating_sub(now.saturating_sub(at)));
        }
    }

    /// How many nanoseconds a request may wait for its turn.
    pub(crate) fn delay_of(&self, head: &RequestHead<'_>, now: Moment) -> u64 {
        self.delay.as_ref().map_or(0, |delay| delay.longest_for(head, now))
    }

    /// How many nanoseconds any request may wait.
    #[cfg(feature = "redis")]
    pub(crate) fn longest_delay(&self) -> u64 {
        self.delay.as_ref().map_or(0, |delay| nanos(delay.longest))
    }

    /// A place among those that wait, if there is one.
    pub(crate) fn wait(self: &Arc<Self>) -> Option<WaitingPlace> {
        let delay = self.delay.as_ref()?;
        let more = |waiting| (waiting < delay.places).then_some(waiting + 1);
        delay.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(WaitingPlace(self.clone()))
    }

    /// A limit's name, its route if it is the route's own, and the caller.
    pub(crate) fn write_key(&self, limit: &Limit, route: Option<&str>, head: &RequestHead<'_>, key: &mut KeyBytes) {
        key.fixed((limit.prefix() | u64::from(route.is_some())).to_le_bytes());
        if let Some(route) = route {
            key.push(route.as_bytes());
        }
        limit.key().unwrap_or(&*self.key).write(head, key);
    }
}

impl fmt::Debug for Limiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limiter")
            .field("limits", &self.limits)
            .field("capacity", &self.capacity)
            .field("proxies", &self.proxies)
            .field("fields", &self.fields)
            .finish_non_exhaustive()
    }
}

// === impl Limits ===

impl<'a> Limits<'a> {
    /// The route's own, and those of the layer unless the route replaces them.
    #[inline]
    pub(crate) fn of(head: &RequestHead<'a>, base: &'a [Limit]) -> Self {
        let route = head.carried().get::<Route>();
        let policy = route.and_then(Route::policy::<Policy>);
        Self {
            route: route.map_or("", |route| route.name()),
            own: policy.map_or(&[], Policy::own),
            base: if policy.is_none_or(Policy::is_beside_default) { base } else { &[] },
        }
    }

    pub(crate) fn route(&self) -> &'a str {
        self.route
    }

    /// The next limit, and whether it is the route's own.
    pub(crate) fn next(&mut self) -> Option<(&'a Limit, bool)> {
        if let Some((limit, rest)) = self.own.split_first() {
            self.own = rest;
            return Some((limit, true));
        }
        let (limit, rest) = self.base.split_first()?;
        self.base = rest;
        Some((limit, false))
    }
}

// === impl Admission ===

impl Admission {
    pub(crate) fn kept(&mut self) -> &mut Kept {
        self.0.get_or_insert_default()
    }

    pub(crate) fn waits(&self) -> bool {
        self.0.as_ref().is_some_and(|kept| kept.late.is_some())
    }

    /// Not before this is over; else it is refused.
    pub(crate) fn wait(&mut self, wait: Duration, late: impl FnOnce() -> Refusal) {
        let kept = self.kept();
        if wait > kept.wait {
            (kept.wait, kept.late) = (wait, Some(late()));
        }
    }
}

// === impl Delay ===

impl Delay {
    pub(crate) fn new(longest: Duration, places: usize) -> Self {
        Self { longest, places, waiting: AtomicUsize::new(0) }
    }

    /// How many nanoseconds this request may wait.
    fn longest_for(&self, head: &RequestHead<'_>, now: Moment) -> u64 {
        if self.waiting() >= self.places {
            return 0;
        }
        let left = head.carried().get::<Deadline>().map_or(Duration::MAX, |deadline| deadline.0.since(now));
        nanos(self.longest.min(left))
    }

    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }
}

// === impl WaitingPlace ===

impl Drop for WaitingPlace {
    fn drop(&mut self) {
        if let Some(delay) = &self.0.delay {
            delay.waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
