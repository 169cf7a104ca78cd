//! One request's limits on their way to the store, and what comes of them.

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use portcullis_core::{Moment, Rejection};
use tokio::time::Instant;

use super::leases::{Given, Local, Question};
use super::shared::Failure;
use super::{OnFailure, RedisStore, count, from_ticks, ticks};
use crate::answer::{Refusal, Standing, Wait};
use crate::held::Holding;
use crate::key::KeyBytes;
use crate::limit::Limit;
use crate::limiter::{Admission, Limiter, WaitingPlace};
use crate::rate::{Cell, Rate};
use crate::table::Mark;

/// One limit on its way to the store.
pub(super) struct Ask {
    pub(super) limit: Limit,
    pub(super) key: KeyBytes,
    /// The store's mark of the key.
    pub(super) mark: u64,
    /// Another limit of the request has the same key.
    pub(super) twin: bool,
    pub(super) rate: Rate,
    pub(super) cell: Cell,
    pub(super) units: u32,
    pub(super) window: u64,
    pub(super) local: Local,
}

/// What was taken for a request so far; it goes back unless it is kept.
pub(super) struct Taken {
    pub(super) store: RedisStore,
    pub(super) limiter: Arc<Limiter>,
    pub(super) asks: Vec<Ask>,
    pub(super) places: Vec<Mark>,
    /// How many nanoseconds the request may wait for its turn.
    pub(super) delay: u64,
    /// Where it would wait: had before the store charges what it would then have to refuse.
    waiting: Option<WaitingPlace>,
    pub(super) kept: bool,
    /// Whether the store may know of it.
    sent: bool,
}

/// What the script said of one key.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reply {
    pub(super) lease: u64,
    pub(super) leased: u32,
    pub(super) ahead: u64,
    pub(super) again: u64,
    pub(super) refuses: bool,
}

// === impl Taken ===

impl Taken {
    pub(super) fn new(store: &RedisStore, limiter: &Arc<Limiter>, delay: u64) -> Self {
        let (store, limiter) = (store.clone(), limiter.clone());
        Self { store, limiter, asks: Vec::new(), places: Vec::new(), delay, waiting: None, kept: false, sent: false }
    }

    /// Waits for leases that others are asking for; whether they came, or are not to come, in time.
    async fn wait(&mut self, until: Instant) -> Result<bool, Refusal> {
        let shared = &self.store.shared;
        // Who holds a question others wait for does not wait: they may wait for each other.
        let mut holds = self.asks.iter().any(Ask::is_awaited);
        for ask in &mut self.asks {
            while matches!(ask.local, Local::Wait) {
                if holds {
                    ask.local = Local::Ask(Question::default());
                    break;
                }
                if let Some(asked) = shared.leases.asking(ask.mark)
                    && tokio::time::timeout_at(until, asked).await.is_err()
                {
                    return Ok(false);
                }
                let now = self.limiter.clock.now();
                ask.local = self.store.take(ask, now);
                if let Local::Refused { until } = ask.local
                    && !ask.limit.is_shadow()
                {
                    count(&shared.counts.remembered);
                    self.limiter.counters.add(|counts| &counts.refused);
                    return Err(ask.refusal(until.since(now)));
                }
            }
            holds |= ask.is_awaited();
        }
        Ok(true)
    }

    pub(super) async fn ask(mut self) -> Result<Admission, Rejection> {
        let until = Instant::now() + self.store.settings.deadline;
        if self.asks.iter().any(|ask| matches!(ask.local, Local::Wait)) {
            let in_time = self.wait(until).await.map_err(|refusal| self.limiter.refuse(refusal))?;
            let now = self.limiter.clock.now();
            // Whoever asked for the lease may have found that the store does not answer.
            let down = || {
                let asks = self.asks.iter().any(Ask::is_asked);
                asks && !self.store.shared.may_ask(now, self.store.settings.deadline)
            };
            if !in_time || down() {
                return self.undecided(now);
            }
        }
        if self.delay > 0 {
            self.waiting = self.limiter.wait();
        }
        if self.waiting.is_none() {
            self.delay = 0;
        }
        let (shared, settings) = (&self.store.shared, self.store.settings);
        let sent = self.limiter.clock.now();
        if !self.asks.iter().any(Ask::is_asked) {
            return Ok(self.admit(&[], sent));
        }
        count(&shared.counts.round_trips);
        self.sent = true;
        let owed = shared.owed_now(&self.asks);
        let question = shared.invoke(settings, &self.asks, &owed, self.delay);
        let answer = tokio::time::timeout_at(until, question).await;
        let now = self.limiter.clock.now();
        let replies = match answer.unwrap_or(Err(Failure::Late)) {
            Ok(replies) => replies,
            Err(failure) => {
                count(&shared.counts.failures);
                shared.failed(sent, now, &failure);
                if matches!(failure, Failure::Said(_)) {
                    shared.owe_again(owed);
                }
                return self.undecided(now);
            }
        };
        shared.answered();
        let mut worst: Option<Refusal> = None;
        for (ask, reply) in self.asks.iter().filter(|ask| ask.is_asked()).zip(&replies) {
            let again = (reply.again > 0).then(|| from_ticks(reply.again));
            // Only what is true for every request of the key is worth remembering.
            let for_all = ask.window == ask.cell.window && (ask.units == 1 || !reply.refuses);
            let given = (reply.leased > 0).then(|| Given {
                id: reply.lease,
                units: reply.leased,
                cell: ask.cell,
                since: sent,
                // A tenth for clocks that run at different speeds.
                until: sent + settings.lease * 9 / 10,
            });
            // Others may perhaps wait longer than this one.
            let sooner = Duration::from_nanos(ask.delay(self.limiter.longest_delay()) - ask.delay(self.delay));
            let until = again.filter(|_| for_all).map(|again| ((now + again).back(sooner), ask.cell));
            if let Some(report) = shared.leases.learn(ask.mark, given, until, now) {
                shared.owe(ask.mark, &shared.key(&ask.key), 0, Some(report));
            }
            if !reply.refuses {
                continue;
            }
            if ask.limit.is_shadow() {
                self.limiter.counters.add(|counts| &counts.shadowed);
                continue;
            }
            self.limiter.counters.add(|counts| &counts.refused);
            let refusal = ask.refusal(again.unwrap_or_default());
            if worst.as_ref().is_none_or(|worst| refusal.wait > worst.wait) {
                worst = Some(refusal);
            }
        }
        match worst {
            Some(refusal) => Err(self.limiter.refuse(refusal)),
            None => Ok(self.admit(&replies, now)),
        }
    }

    /// Keeps what was taken.
    pub(super) fn admit(mut self, replies: &[Reply], now: Moment) -> Admission {
        self.kept = true;
        let limiter = &self.limiter;
        let mut admission = Admission::default();
        for place in std::mem::take(&mut self.places) {
            admission.kept().holdings.push(Holding::Place(place));
        }
        let mut replies = replies.iter();
        for ask in &self.asks {
            let (lease, ahead, wait) = match ask.local {
                Local::Charged { lease, left } => {
                    count(&self.store.shared.counts.leased);
                    // As far as this process knows.
                    let ahead = ask.cell.window.saturating_sub(ask.cell.cost(left));
                    (Some(lease), Some(Duration::from_nanos(ahead)), Duration::ZERO)
                }
                // A shadow that refused.
                Local::Refused { .. } => {
                    limiter.counters.add(|counts| &counts.shadowed);
                    continue;
                }
                Local::Ask(_) | Local::Wait => match replies.next() {
                    Some(reply) if reply.refuses => continue,
                    Some(reply) => {
                        let wait = reply.ahead.saturating_sub(ask.window_ticks());
                        (None, Some(from_ticks(reply.ahead)), from_ticks(wait))
                    }
                    // Nobody knows how it stands.
                    None => (None, None, Duration::ZERO),
                },
            };
            limiter.counters.add(|counts| &counts.admitted);
            if !wait.is_zero() && !ask.limit.is_shadow() {
                admission.wait(wait, || ask.refusal(wait));
            }
            if let (Some(ahead), true) = (ahead, limiter.fields.are_on_every_response()) {
                let remaining = ask.cell.remaining((now + ahead).as_nanos(), now.as_nanos());
                admission.kept().standings.push(Standing::of_rate(ask.limit.shared_name(), ask.rate, remaining, ahead));
            }
            if let Some(settle) = ask.limit.settlement() {
                let (store, key) = (self.store.clone(), self.store.shared.key(&ask.key));
                let (mark, interval, units, settle) = (ask.mark, ticks(ask.cell.interval), ask.units, settle.clone());
                admission.kept().holdings.push(Holding::Stored { store, mark, key, interval, units, lease, settle });
            }
        }
        if admission.waits() {
            admission.kept().place = self.waiting.take();
        }
        admission
    }

    /// Decides without the store.
    pub(super) fn undecided(self, now: Moment) -> Result<Admission, Rejection> {
        count(&self.store.shared.counts.undecided);
        // What a lease has paid for is paid.
        let asks = || self.asks.iter().filter(|ask| matches!(ask.local, Local::Ask(_) | Local::Wait));
        let processes = match self.store.settings.on_failure {
            OnFailure::Admit => return Ok(self.admit(&[], now)),
            OnFailure::Refuse if asks().all(|ask| ask.limit.is_shadow()) => return Ok(self.admit(&[], now)),
            OnFailure::Refuse => {
                let unavailable = StatusCode::SERVICE_UNAVAILABLE;
                return Err(Rejection::new(portcullis_core::Layer::RateLimit, unavailable, "limits-unavailable"));
            }
            OnFailure::Share(processes) => u64::from(processes.get()),
        };
        let table = &self.limiter.table;
        let mark = |ask: &Ask| table.mark(ask.limit.span(), ask.key.bytes());
        let cost = |ask: &Ask| ask.cell.cost(ask.units).saturating_mul(processes);
        let time = now.as_nanos();
        let mut charged = Vec::new();
        for ask in asks() {
            let (cost_here, window) = (cost(ask), ask.window.max(cost(ask)));
            let decide = |debt| Cell::charge(debt, time, cost_here, window).filter(|_| !ask.never());
            let Err(debt) = table.charge(mark(ask), time, decide) else {
                charged.push(ask);
                continue;
            };
            if ask.limit.is_shadow() {
                self.limiter.counters.add(|counts| &counts.shadowed);
                continue;
            }
            charged.into_iter().for_each(|before| _ = table.refund(mark(before), cost(before)));
            self.limiter.counters.add(|counts| &counts.refused);
            let wait = Cell::wait(debt, time, cost_here, window).unwrap_or_default();
            return Err(self.limiter.refuse(ask.refusal(wait)));
        }
        Ok(self.admit(&[], now))
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let shared = &self.store.shared;
        for ask in &self.asks {
            if let Local::Ask(question) = ask.local {
                // A lease that nobody reports counts as used.
                if let Some(report) = question.report.filter(|_| !self.sent) {
                    shared.owe(ask.mark, &shared.key(&ask.key), 0, Some(report));
                }
                shared.leases.asked(ask.mark, question.asking);
            }
        }
        if self.kept {
            return;
        }
        for ask in &self.asks {
            if let Local::Charged { lease, .. } = ask.local {
                self.store.shared.leases.give_back(ask.mark, lease, ask.units);
            }
        }
        self.places.iter().for_each(|mark| self.limiter.in_flight().leave(*mark));
    }
}

// === impl Ask ===

impl Ask {
    /// How much of a request's delay it may use: none if it only counts, and none if it would never have its turn.
    pub(super) fn delay(&self, delay: u64) -> u64 {
        if self.limit.is_shadow() || self.never() { 0 } else { delay }
    }

    /// It costs more than there ever is.
    fn never(&self) -> bool {
        self.cell.cost(self.units) > self.window
    }

    /// As many whole units as the window has.
    pub(super) fn window_ticks(&self) -> u64 {
        let (window, interval) = (u128::from(self.window), u128::from(self.cell.interval));
        u64::try_from(window * u128::from(ticks(self.cell.interval)) / interval).unwrap_or(u64::MAX).min(1 << 51)
    }

    /// Whether others wait for what comes of it.
    fn is_awaited(&self) -> bool {
        matches!(self.local, Local::Ask(question) if question.asking != 0)
    }

    pub(super) fn is_asked(&self) -> bool {
        matches!(self.local, Local::Ask(_))
    }

    pub(super) fn refusal(&self, wait: Duration) -> Refusal {
        let standing = Standing::of_rate(self.limit.shared_name(), self.rate, 0, wait);
        Refusal { standing, wait: if self.never() { Wait::Never } else { Wait::For(wait) } }
    }
}
