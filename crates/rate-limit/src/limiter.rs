//! Several limits on one request: all of them are charged, or none.

use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use portcullis_core::{Carried, Clock, Deadline, Rejection, Route, TrustedProxies};

use crate::answer::{Fields, Refusal, Standing, Wait};
use crate::counters::Counters;
use crate::held::Holding;
use crate::in_flight::InFlight;
use crate::key::{Caller, Key, KeyBytes, RequestHead};
use crate::limit::{Limit, Policy, Quantity};
use crate::rate::{Cell, Rate};
use crate::table::{Mark, Table};

/// What all services of one layer share.
pub(crate) struct Limiter {
    pub(crate) limits: ArcSwap<Vec<Limit>>,
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

/// What a concurrency limit did.
#[cfg(feature = "redis")]
pub(crate) enum Entered {
    In(Mark),
    Full(Refusal),
    /// It is none, or a shadow.
    NotLimited,
}

/// Lets requests wait instead of refusing them.
#[derive(Debug)]
pub(crate) struct Delay {
    pub(crate) longest: Duration,
    pub(crate) places: usize,
    waiting: AtomicUsize,
}

/// A place among those that wait; dropping it gives it back.
pub(crate) struct WaitingPlace(Arc<Limiter>);

/// A request that may go on.
#[derive(Default)]
pub(crate) struct Admission {
    /// Not yet, but after this.
    pub(crate) wait: Duration,
    /// How its limits stand, if anybody wants to know.
    pub(crate) standings: Vec<Standing>,
    /// What it gives back.
    pub(crate) holdings: Vec<Holding>,
    /// The refusal, if it may not wait after all.
    pub(crate) late: Option<Refusal>,
}

pub(crate) type Exempt = Arc<dyn Fn(&RequestHead<'_>) -> bool + Send + Sync>;

/// The limits on one request, the route's own first.
#[derive(Clone, Copy)]
pub(crate) struct Limits<'a> {
    route: &'a str,
    own: &'a [Limit],
    base: &'a [Limit],
}

/// What one limit is asked.
struct Ask<'a> {
    limit: &'a Limit,
    mark: Mark,
    what: What,
}

enum What {
    Charge { rate: Rate, cell: Cell, units: u32, window: u64 },
    Place { max: u32 },
}

/// What was done for an [`Ask`].
enum Done {
    Charged {
        overflow: bool,
    },
    Entered,
    /// The limit would have refused, but is a shadow.
    Nothing,
}

// === impl Limiter ===

impl Limiter {
    pub(crate) fn new(rate: Rate) -> Self {
        Self {
            limits: ArcSwap::from_pointee(vec![Limit::new("default", rate)]),
            table: Table::new(crate::DEFAULT_CAPACITY),
            capacity: crate::DEFAULT_CAPACITY,
            key: Arc::new(Caller::new()),
            proxies: TrustedProxies::none(),
            exempt: None,
            fields: Fields::default(),
            clock: Clock::system(),
            delay: None,
            counters: Counters::new(),
            #[cfg(feature = "redis")]
            store: None,
            in_flight: OnceLock::new(),
        }
    }

    /// The same settings with counters of its own.
    pub(crate) fn fork(&self) -> Self {
        Self {
            limits: ArcSwap::new(self.limits.load_full()),
            table: Table::new(self.capacity),
            capacity: self.capacity,
            key: self.key.clone(),
            proxies: self.proxies.clone(),
            exempt: self.exempt.clone(),
            fields: self.fields,
            clock: self.clock.clone(),
            delay: self.delay.as_ref().map(|delay| Delay::new(delay.longest, delay.places)),
            counters: Counters::new(),
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
    pub(crate) fn begin(self: &Arc<Self>, head: &RequestHead<'_>) -> Begun {
        if self.exempt.as_ref().is_some_and(|exempt| exempt(head)) {
            return Begun::Decided(Ok(Admission::default()));
        }
        let route = Route::of(head.extensions());
        let policy = route.and_then(Route::policy::<Policy>);
        let default = policy.is_none_or(Policy::is_beside_default).then(|| self.limits.load());
        let limits = Limits {
            route: route.map_or("", |route| route.name()),
            own: policy.map_or(&[], Policy::own),
            base: default.as_ref().map_or(&[], |limits| limits.as_slice()),
        };
        #[cfg(feature = "redis")]
        if let Some(store) = &self.store {
            return store.begin(self, limits, head);
        }
        Begun::Decided(self.admit(limits, head).map_err(|refusal| self.refuse(refusal)))
    }

    pub(crate) fn refuse(&self, refusal: Refusal) -> Rejection {
        tracing::debug!(limit = &*refusal.standing.name, wait = ?refusal.wait, "refused: too many requests");
        refusal.into_rejection(self.fields)
    }

    fn admit(&self, limits: Limits<'_>, head: &RequestHead<'_>) -> Result<Admission, Refusal> {
        let mut admission = Admission::default();
        let count = limits.own.len() + limits.base.len();
        if count == 0 {
            return Ok(admission);
        }
        let moment = self.clock.now();
        let delay = self.delay.as_ref().map_or(0, |delay| {
            let deadline = Deadline::of(head.extensions()).map_or(Duration::MAX, |deadline| deadline.0.since(moment));
            nanos(delay.longest.min(deadline))
        });
        let now = moment.as_nanos();
        let done = if count == 1 {
            self.take(limits, head, now, delay, &mut admission)
        } else {
            // First a look, so that a limit which refuses costs the others nothing, not even for a moment.
            self.foresee(limits, head, now, delay).and_then(|()| self.take(limits, head, now, delay, &mut admission))
        };
        done.map(|()| admission).map_err(|(mark, refusal)| {
            self.counters.add(mark, |stripe| &stripe.refused);
            refusal
        })
    }

    /// Corrects a charge of so many units, made at that time, to `cost`.
    pub(crate) fn settle(&self, mark: Mark, interval: u64, units: u32, cost: u32, at: u64) {
        let now = self.clock.now().as_nanos();
        let difference = interval.saturating_mul(u64::from(units.abs_diff(cost)));
        if cost > units {
            let _ = self.table.charge(mark, now, |time| Some(time.max(now).saturating_add(difference)));
        } else if cost < units {
            // What would have come back since is back already.
            self.table.refund(mark, difference.saturating_sub(now.saturating_sub(at)));
        }
    }

    /// A place among those that wait, if there is one.
    pub(crate) fn wait(self: &Arc<Self>) -> Option<WaitingPlace> {
        let delay = self.delay.as_ref()?;
        let more = |waiting| (waiting < delay.places).then_some(waiting + 1);
        delay.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(WaitingPlace(self.clone()))
    }

    /// The refusal with the longest wait, if one of the limits refuses now.
    fn foresee(
        &self,
        mut limits: Limits<'_>,
        head: &RequestHead<'_>,
        now: u64,
        delay: u64,
    ) -> Result<(), (Mark, Refusal)> {
        let mut worst: Option<(Mark, Refusal)> = None;
        while let Some((limit, own)) = limits.next() {
            let Some(ask) = self.ask(limit, own.then_some(limits.route), head) else { continue };
            let refusal = match ask.what {
                _ if limit.is_shadow() => None,
                What::Place { max } => {
                    let inside = self.in_flight().count(ask.mark);
                    (inside >= max).then(|| ask.refusal(u64::from(inside), now))
                }
                What::Charge { cell, units, window, .. } => {
                    let time = self.table.peek(ask.mark);
                    let admitted = Cell::charge(time, now, cell.cost(units), window.saturating_add(delay));
                    admitted.is_none().then(|| ask.refusal(time, now))
                }
            };
            if let Some(refusal) = refusal
                && worst.as_ref().is_none_or(|(_, worst)| refusal.wait > worst.wait)
            {
                worst = Some((ask.mark, refusal));
            }
        }
        worst.map_or(Ok(()), Err)
    }

    /// Charges the first limit, then the others; gives back if one of them refuses.
    fn take(
        &self,
        mut limits: Limits<'_>,
        head: &RequestHead<'_>,
        now: u64,
        delay: u64,
        admission: &mut Admission,
    ) -> Result<(), (Mark, Refusal)> {
        let Some((limit, own)) = limits.next() else { return Ok(()) };
        let Some(ask) = self.ask(limit, own.then_some(limits.route), head) else {
            return self.take(limits, head, now, delay, admission);
        };
        let done = self.take_one(&ask, now, delay, admission)?;
        self.take(limits, head, now, delay, admission).inspect_err(|_| self.give_back(&ask, &done))?;
        // All of them admit: what this one has to remember.
        match (&ask.what, done) {
            (_, Done::Nothing) => self.counters.add(ask.mark, |stripe| &stripe.shadowed),
            (What::Charge { cell, units, .. }, Done::Charged { overflow }) => {
                let settle = limit.settlement().cloned();
                if settle.is_some() || !admission.wait.is_zero() {
                    let (mark, interval) = (ask.mark, cell.interval);
                    admission.holdings.push(Holding::Charge { mark, interval, units: *units, at: now, settle });
                }
                if overflow {
                    self.counters.add(ask.mark, |stripe| &stripe.overflowed);
                }
                self.counters.add(ask.mark, |stripe| &stripe.admitted);
            }
            _ => {
                admission.holdings.push(Holding::Place(ask.mark));
                self.counters.add(ask.mark, |stripe| &stripe.admitted);
            }
        }
        Ok(())
    }

    fn take_one(
        &self,
        ask: &Ask<'_>,
        now: u64,
        delay: u64,
        admission: &mut Admission,
    ) -> Result<Done, (Mark, Refusal)> {
        let tell = self.fields.are_on_every_response();
        let done = match ask.what {
            What::Place { max } => self
                .in_flight()
                .enter(ask.mark, max)
                .map(|inside| {
                    if tell {
                        admission.standings.push(ask.standing(u64::from(inside), now));
                    }
                    Done::Entered
                })
                .map_err(u64::from),
            What::Charge { cell, units, window, .. } => {
                let furthest = if ask.limit.is_shadow() { window } else { window.saturating_add(delay) };
                self.table.charge(ask.mark, now, |time| Cell::charge(time, now, cell.cost(units), furthest)).map(
                    |charged| {
                        let wait = Duration::from_nanos(charged.time.saturating_sub(now).saturating_sub(window));
                        if wait > admission.wait {
                            let before = charged.time.saturating_sub(cell.cost(units));
                            (admission.wait, admission.late) = (wait, Some(ask.refusal(before, now)));
                        }
                        if tell {
                            admission.standings.push(ask.standing(charged.time, now));
                        }
                        Done::Charged { overflow: charged.overflow }
                    },
                )
            }
        };
        match done {
            Err(_) if ask.limit.is_shadow() => Ok(Done::Nothing),
            done => done.map_err(|found| (ask.mark, ask.refusal(found, now))),
        }
    }

    fn give_back(&self, ask: &Ask<'_>, done: &Done) {
        match (&ask.what, done) {
            (What::Charge { cell, units, .. }, Done::Charged { .. }) => self.table.refund(ask.mark, cell.cost(*units)),
            (What::Place { .. }, Done::Entered) => self.in_flight().leave(ask.mark),
            _ => {}
        }
    }

    /// Enters a concurrency limit.
    #[cfg(feature = "redis")]
    pub(crate) fn enter(&self, limit: &Limit, route: Option<&str>, head: &RequestHead<'_>) -> Entered {
        if limit.charge(head).is_some() {
            return Entered::NotLimited;
        }
        let Some(ask) = self.ask(limit, route, head) else { return Entered::NotLimited };
        let What::Place { max } = ask.what else { return Entered::NotLimited };
        match self.in_flight().enter(ask.mark, max) {
            Ok(_) => {
                self.counters.add(ask.mark, |stripe| &stripe.admitted);
                Entered::In(ask.mark)
            }
            Err(_) if limit.is_shadow() => {
                self.counters.add(ask.mark, |stripe| &stripe.shadowed);
                Entered::NotLimited
            }
            Err(inside) => {
                self.counters.add(ask.mark, |stripe| &stripe.refused);
                Entered::Full(ask.refusal(u64::from(inside), 0))
            }
        }
    }

    /// What `limit` is asked for this request; nothing if it does not count.
    fn ask<'a>(&self, limit: &'a Limit, route: Option<&str>, head: &RequestHead<'_>) -> Option<Ask<'a>> {
        let what = match limit.quantity(head) {
            Quantity::Concurrent(max) => What::Place { max: max.get() },
            Quantity::Rate(rate, cell) => {
                let units = limit.units(head);
                What::Charge { rate, cell, units: (units > 0).then_some(units)?, window: limit.window(cell, head) }
            }
        };
        let mut key = KeyBytes::new();
        self.write_key(limit, route, head, &mut key);
        Some(Ask { limit, mark: self.table.mark(limit.span(), key.bytes()), what })
    }

    /// A limit's name, its route if it is the route's own, and the caller.
    pub(crate) fn write_key(&self, limit: &Limit, route: Option<&str>, head: &RequestHead<'_>, key: &mut KeyBytes) {
        key.push(limit.name().as_bytes());
        if let Some(route) = route {
            key.push(route.as_bytes());
        }
        limit.key().unwrap_or(&*self.key).write(head, key);
    }
}

impl fmt::Debug for Limiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limiter")
            .field("limits", &self.limits.load())
            .field("capacity", &self.capacity)
            .field("proxies", &self.proxies)
            .field("fields", &self.fields)
            .finish_non_exhaustive()
    }
}

// === impl Limits ===

impl<'a> Limits<'a> {
    #[cfg(feature = "redis")]
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

// === impl Ask ===

impl Ask<'_> {
    /// A refusal because of an arrival time, or of so many inside.
    fn refusal(&self, found: u64, now: u64) -> Refusal {
        let wait = match self.what {
            What::Place { .. } => Wait::ForAnother,
            What::Charge { cell, units, window, .. } => {
                Cell::wait(found, now, cell.cost(units), window).map_or(Wait::Never, Wait::For)
            }
        };
        let mut standing = self.standing(found, now);
        if let Wait::For(wait) = wait {
            standing.reset = Some(wait);
        }
        Refusal { standing, wait }
    }

    fn standing(&self, found: u64, now: u64) -> Standing {
        let name = self.limit.shared_name();
        match self.what {
            What::Place { max } => Standing::of_concurrency(name, max, u32::try_from(found).unwrap_or(u32::MAX)),
            What::Charge { rate, cell, .. } => {
                let reset = Duration::from_nanos(found.saturating_sub(now));
                Standing::of_rate(name, rate, cell.remaining(found, now), reset)
            }
        }
    }
}

// === impl Delay ===

impl Delay {
    pub(crate) fn new(longest: Duration, places: usize) -> Self {
        Self { longest, places, waiting: AtomicUsize::new(0) }
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

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
