//! Several limits on one request: all of them are charged, or none.

use std::cell::Cell as Remembered;
use std::time::Duration;

use crate::answer::{Refusal, Standing, Wait};
use crate::held::Holding;
use crate::key::{KeyBytes, RequestHead};
use crate::limit::{Limit, Quantity, What};
use crate::limiter::{Admission, Limiter, Limits};
use crate::rate::Cell;
use crate::table::Mark;

/// What a concurrency limit did.
#[cfg(feature = "redis")]
pub(crate) enum Entered {
    In(Mark),
    Full(Refusal),
    /// It is full, but only counts.
    InShadow,
}

/// What one limit is asked.
struct Ask<'a> {
    limit: &'a Limit,
    mark: Mark,
    what: What,
}

/// One limit of a request, and those before it: a list on the stack, whatever their number.
struct Link<'a> {
    ask: Ask<'a>,
    done: Remembered<Done>,
    before: Option<&'a Self>,
}

/// What was done for an [`Ask`].
#[derive(Clone, Copy, Default)]
enum Done {
    Charged {
        overflow: bool,
        /// In nanoseconds, until its turn.
        wait: u64,
    },
    Entered,
    /// The limit would have refused, but is a shadow.
    #[default]
    Nothing,
}

// === impl Limiter ===

impl Limiter {
    /// Charges all limits, or none.
    pub(crate) fn charge_all(&self, mut limits: Limits<'_>, head: &RequestHead<'_>) -> Result<Admission, Refusal> {
        let Some(first) = self.next(&mut limits, head) else { return Ok(Admission::default()) };
        match self.next(&mut limits, head) {
            None => self.charge_one(&first, head),
            Some(ask) => self.gather(ask, limits, head, Some(&Link::new(first, None))),
        }
    }

    /// Asks for the next limit that counts.
    #[inline]
    fn next<'a>(&self, limits: &mut Limits<'a>, head: &RequestHead<'_>) -> Option<Ask<'a>> {
        while let Some((limit, own)) = limits.next() {
            let ask = self.ask(limit, own.then_some(limits.route()), head);
            if ask.is_some() {
                return ask;
            }
        }
        None
    }

    /// Most requests have but one limit: nothing to look at before, nothing to give back.
    fn charge_one(&self, ask: &Ask<'_>, head: &RequestHead<'_>) -> Result<Admission, Refusal> {
        let now = self.clock.now();
        let (delay, now) = (self.delay_of(head, now), now.as_nanos());
        let mut admission = Admission::default();
        let done = self.take_one(ask, now, delay, &mut admission).map_err(|refusal| self.refused(refusal))?;
        self.remember(ask, done, now, &mut admission);
        Ok(admission)
    }

    /// Puts a limit on top of those before it, then the next one, and decides when there is none.
    fn gather(
        &self,
        ask: Ask<'_>,
        mut limits: Limits<'_>,
        head: &RequestHead<'_>,
        before: Option<&Link<'_>>,
    ) -> Result<Admission, Refusal> {
        let link = Link::new(ask, before);
        if let Some(ask) = self.next(&mut limits, head) {
            return self.gather(ask, limits, head, Some(&link));
        }
        let now = self.clock.now();
        let (delay, now) = (self.delay_of(head, now), now.as_nanos());
        // First a look, so that a limit which refuses costs the others nothing, not even for a moment.
        self.foresee(&link, now, delay)?;
        self.take(&link, now, delay)
    }

    /// The refusal with the longest wait, if one of the limits refuses now.
    fn foresee(&self, last: &Link<'_>, now: u64, delay: u64) -> Result<(), Refusal> {
        let mut worst: Option<Refusal> = None;
        for Link { ask, .. } in last.and_before() {
            let refusal = match ask.what {
                _ if ask.limit.is_shadow() => None,
                What::Place { max } => {
                    let inside = self.in_flight().count(ask.mark);
                    (inside >= max).then(|| ask.refusal(u64::from(inside), now))
                }
                What::Charge { cell, units, window, .. } => {
                    let time = self.table.peek(ask.mark);
                    let cost = cell.cost(units);
                    let admitted = Cell::charge(time, now, cost, with_delay(cost, window, delay));
                    admitted.is_none().then(|| ask.refusal(time, now))
                }
            };
            if let Some(refusal) = refusal
                && worst.as_ref().is_none_or(|worst| refusal.wait > worst.wait)
            {
                worst = Some(refusal);
            }
        }
        worst.map_or(Ok(()), |worst| Err(self.refused(worst)))
    }

    /// Charges each limit; gives back if one of them refuses.
    fn take(&self, last: &Link<'_>, now: u64, delay: u64) -> Result<Admission, Refusal> {
        let mut admission = Admission::default();
        for link in last.and_before() {
            match self.take_one(&link.ask, now, delay, &mut admission) {
                Ok(done) => link.done.set(done),
                Err(refusal) => {
                    last.and_before().take_while(|other| !std::ptr::eq(*other, link)).for_each(|other| {
                        self.give_back(other, now);
                    });
                    return Err(self.refused(refusal));
                }
            }
        }
        for link in last.and_before() {
            self.remember(&link.ask, link.done.get(), now, &mut admission);
        }
        if let Some(kept) = &mut admission.0 {
            kept.standings.reverse();
        }
        Ok(admission)
    }

    #[inline]
    fn take_one(&self, ask: &Ask<'_>, now: u64, delay: u64, admission: &mut Admission) -> Result<Done, Refusal> {
        let tell = self.fields.are_on_every_response();
        let done = match ask.what {
            What::Place { max } => self
                .in_flight()
                .enter(ask.mark, max)
                .map(|inside| {
                    if tell {
                        admission.kept().standings.push(ask.standing(u64::from(inside), now));
                    }
                    Done::Entered
                })
                .map_err(u64::from),
            What::Charge { cell, units, window, .. } => {
                let cost = cell.cost(units);
                let furthest = if ask.limit.is_shadow() { window } else { with_delay(cost, window, delay) };
                self.table.charge(ask.mark, now, |time| Cell::charge(time, now, cost, furthest)).map(|charged| {
                    let wait = charged.time.saturating_sub(now).saturating_sub(window);
                    if wait > 0 {
                        admission
                            .wait(Duration::from_nanos(wait), || ask.refusal(charged.time.saturating_sub(cost), now));
                    }
                    if tell {
                        admission.kept().standings.push(ask.standing(charged.time, now));
                    }
                    Done::Charged { overflow: charged.overflow, wait }
                })
            }
        };
        match done {
            Err(_) if ask.limit.is_shadow() => Ok(Done::Nothing),
            done => done.map_err(|found| ask.refusal(found, now)),
        }
    }

    /// All limits admit: what this one has to remember.
    #[inline]
    fn remember(&self, ask: &Ask<'_>, done: Done, now: u64, admission: &mut Admission) {
        match (ask.what, done) {
            (_, Done::Nothing) => return self.counters.add(|counts| &counts.shadowed),
            (What::Charge { cell, units, .. }, Done::Charged { overflow, wait }) => {
                let (mark, settle) = (ask.mark, ask.limit.settlement().cloned());
                if settle.is_some() || admission.waits() {
                    let at = now.saturating_add(wait);
                    admission.kept().holdings.push(Holding::Charge { mark, cell, units, at, settle });
                }
                if overflow {
                    self.counters.add(|counts| &counts.overflowed);
                }
            }
            _ => admission.kept().holdings.push(Holding::Place(ask.mark)),
        }
        self.counters.add(|counts| &counts.admitted);
    }

    /// What was charged `now`, as it was then: others may have used meanwhile what time has given back.
    fn give_back(&self, link: &Link<'_>, now: u64) {
        match (link.ask.what, link.done.get()) {
            (What::Charge { cell, units, .. }, Done::Charged { .. }) => {
                let passed = self.clock.now().as_nanos().saturating_sub(now);
                self.table.refund(link.ask.mark, cell.cost(units).saturating_sub(passed));
            }
            (What::Place { .. }, Done::Entered) => self.in_flight().leave(link.ask.mark),
            _ => {}
        }
    }

    fn refused(&self, refusal: Refusal) -> Refusal {
        self.counters.add(|counts| &counts.refused);
        refusal
    }

    /// Enters a concurrency limit.
    #[cfg(feature = "redis")]
    pub(crate) fn enter(&self, limit: &Limit, max: u32, route: Option<&str>, head: &RequestHead<'_>) -> Entered {
        let ask = Ask { limit, mark: self.mark(limit, route, head), what: What::Place { max } };
        match self.in_flight().enter(ask.mark, max) {
            Ok(_) => {
                self.counters.add(|counts| &counts.admitted);
                Entered::In(ask.mark)
            }
            Err(_) if limit.is_shadow() => {
                self.counters.add(|counts| &counts.shadowed);
                Entered::InShadow
            }
            Err(inside) => Entered::Full(self.refused(ask.refusal(u64::from(inside), 0))),
        }
    }

    /// What `limit` is asked for this request; nothing if it does not count.
    #[inline]
    fn ask<'a>(&self, limit: &'a Limit, route: Option<&str>, head: &RequestHead<'_>) -> Option<Ask<'a>> {
        let what = limit.what(head)?;
        let mark = self.mark(limit, route, head);
        if let What::Charge { .. } = what {
            self.table.touch(mark);
        }
        Some(Ask { limit, mark, what })
    }

    fn mark(&self, limit: &Limit, route: Option<&str>, head: &RequestHead<'_>) -> Mark {
        let mut key = KeyBytes::new();
        self.write_key(limit, route, head, &mut key);
        self.table.mark(limit.span(), key.bytes())
    }

    /// Gives so many units of the limits of that name back to a request's caller; whether there was one to be given them.
    pub(crate) fn refund(&self, name: &str, head: &RequestHead<'_>, units: u32) -> bool {
        let (base, mut refunded) = (self.limits.to_vec(), false);
        let mut limits = Limits::of(head, &base);
        while let Some((limit, own)) = limits.next() {
            if let (true, Quantity::Rate(_, cell)) = (limit.name() == name, limit.quantity(head)) {
                let mark = self.mark(limit, own.then_some(limits.route()), head);
                refunded |= self.table.refund(mark, cell.cost(units));
            }
        }
        refunded
    }
}

/// How far ahead a request may go that may wait: what would never be admitted has nothing to wait for.
fn with_delay(cost: u64, window: u64, delay: u64) -> u64 {
    if cost > window { window } else { window.saturating_add(delay) }
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

// === impl Link ===

impl<'a> Link<'a> {
    fn new(ask: Ask<'a>, before: Option<&'a Self>) -> Self {
        Self { ask, done: Remembered::default(), before }
    }

    fn and_before(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |link| link.before)
    }
}
