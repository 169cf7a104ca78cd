//! Several limits on one request: all of them are charged, or none.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use portcullis_core::{Carried, Clock, Route, TrustedProxies};

use crate::answer::{Fields, Refusal, Standing};
use crate::key::{Caller, Key, KeyBytes, RequestHead};
use crate::limit::{Limit, Policy};
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
    pub(crate) counters: Counters,
}

pub(crate) type Exempt = Arc<dyn Fn(&RequestHead<'_>) -> bool + Send + Sync>;

/// What happened so far.
pub(crate) struct Counters([Stripe; STRIPES]);

/// Counters of different keys do not meet in one cache line.
#[derive(Default)]
#[repr(align(64))]
struct Stripe {
    admitted: AtomicU64,
    refused: AtomicU64,
    overflowed: AtomicU64,
}

/// The limits on one request, the route's own first.
#[derive(Clone, Copy)]
struct Limits<'a> {
    route: &'a str,
    own: &'a [Limit],
    base: &'a [Limit],
}

/// What one limit is asked.
struct Ask {
    mark: Mark,
    cell: Cell,
    rate: Rate,
    cost: u64,
}

const STRIPES: usize = 32;

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
            counters: Counters::new(),
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
            counters: Counters::new(),
        }
    }

    /// Charges all limits of a request, and says how they stand if anybody wants to know.
    pub(crate) fn admit(&self, head: &RequestHead<'_>) -> Result<Vec<Standing>, Refusal> {
        let mut standings = Vec::new();
        if self.exempt.as_ref().is_some_and(|exempt| exempt(head)) {
            return Ok(standings);
        }
        let route = Route::of(head.extensions());
        let policy = route.and_then(Route::policy::<Policy>);
        let default = policy.is_none_or(Policy::is_beside_default).then(|| self.limits.load());
        let limits = Limits {
            route: route.map_or("", |route| route.name()),
            own: policy.map_or(&[], Policy::own),
            base: default.as_ref().map_or(&[], |limits| limits.as_slice()),
        };
        let count = limits.own.len() + limits.base.len();
        if count == 0 {
            return Ok(standings);
        }
        let now = self.clock.now().as_nanos();
        if count > 1 {
            // So that a limit which refuses costs the others nothing, not even for a moment.
            self.foresee(limits, head, now)?;
        }
        self.take(limits, head, now, &mut standings)?;
        Ok(standings)
    }

    /// The refusal with the longest wait, if one of the limits refuses now.
    fn foresee(&self, mut limits: Limits<'_>, head: &RequestHead<'_>, now: u64) -> Result<(), Refusal> {
        let mut worst: Option<(Mark, Refusal)> = None;
        while let Some((limit, own)) = limits.next() {
            let Some(ask) = self.ask(limit, own.then_some(limits.route), head) else { continue };
            let time = self.table.peek(ask.mark);
            if Cell::charge(time, now, ask.cost, ask.cell.window).is_none() {
                let refusal = ask.refusal(limit, time, now);
                if worst.as_ref().is_none_or(|(_, worst)| refusal.is_worse_than(worst)) {
                    worst = Some((ask.mark, refusal));
                }
            }
        }
        match worst {
            Some((mark, refusal)) => {
                self.counters.stripe(mark).refused.fetch_add(1, Ordering::Relaxed);
                Err(refusal)
            }
            None => Ok(()),
        }
    }

    /// Charges the first limit, then the others; gives back if one of them refuses.
    fn take(
        &self,
        mut limits: Limits<'_>,
        head: &RequestHead<'_>,
        now: u64,
        standings: &mut Vec<Standing>,
    ) -> Result<(), Refusal> {
        let Some((limit, own)) = limits.next() else { return Ok(()) };
        let Some(ask) = self.ask(limit, own.then_some(limits.route), head) else {
            return self.take(limits, head, now, standings);
        };
        let charged = self
            .table
            .charge(ask.mark, now, |time| Cell::charge(time, now, ask.cost, ask.cell.window))
            .map_err(|time| {
                self.counters.stripe(ask.mark).refused.fetch_add(1, Ordering::Relaxed);
                ask.refusal(limit, time, now)
            })?;
        if self.fields.are_on_every_response() {
            standings.push(ask.standing(limit, charged.time, now));
        }
        self.take(limits, head, now, standings).inspect_err(|_| self.table.refund(ask.mark, ask.cost))?;
        let stripe = self.counters.stripe(ask.mark);
        stripe.admitted.fetch_add(1, Ordering::Relaxed);
        if charged.overflow {
            stripe.overflowed.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// What `limit` is asked for this request; nothing if it does not count.
    fn ask(&self, limit: &Limit, route: Option<&str>, head: &RequestHead<'_>) -> Option<Ask> {
        let units = limit.units(head);
        if units == 0 {
            return None;
        }
        let mut key = KeyBytes::new();
        key.push(limit.name().as_bytes());
        if let Some(route) = route {
            key.push(route.as_bytes());
        }
        limit.key().unwrap_or(&*self.key).write(head, &mut key);
        let (cell, rate) = limit.cell(head);
        Some(Ask { mark: self.table.mark(key.bytes()), cell, rate, cost: cell.cost(units) })
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

// === impl Counters ===

impl Counters {
    fn new() -> Self {
        Self(std::array::from_fn(|_| Stripe::default()))
    }

    fn stripe(&self, mark: Mark) -> &Stripe {
        &self.0[mark.low() % STRIPES]
    }

    pub(crate) fn admitted(&self) -> u64 {
        self.0.iter().map(|stripe| stripe.admitted.load(Ordering::Relaxed)).sum()
    }

    pub(crate) fn refused(&self) -> u64 {
        self.0.iter().map(|stripe| stripe.refused.load(Ordering::Relaxed)).sum()
    }

    pub(crate) fn overflowed(&self) -> u64 {
        self.0.iter().map(|stripe| stripe.overflowed.load(Ordering::Relaxed)).sum()
    }
}

// === impl Limits ===

impl<'a> Limits<'a> {
    /// The next limit, and whether it is the route's own.
    fn next(&mut self) -> Option<(&'a Limit, bool)> {
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

impl Ask {
    fn refusal(&self, limit: &Limit, time: u64, now: u64) -> Refusal {
        let wait = Cell::wait(time, now, self.cost, self.cell.window);
        let remaining = self.cell.remaining(time, now);
        let reset = wait.unwrap_or(Duration::from_nanos(time.saturating_sub(now)));
        Refusal { standing: Standing::new(limit.shared_name(), self.rate, remaining, reset), wait }
    }

    fn standing(&self, limit: &Limit, time: u64, now: u64) -> Standing {
        let reset = Duration::from_nanos(time.saturating_sub(now));
        Standing::new(limit.shared_name(), self.rate, self.cell.remaining(time, now), reset)
    }
}
