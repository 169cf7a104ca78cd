//! One breaker: counts how calls went, and moves the gate in front of what it guards.
//!
//! ```text
//!            too many failures                         the open time is over
//!            or slow calls                             and a probe went in
//!   ┌────────┐         ┌──────┐                              ┌───────────┐
//!   │ Closed │────────▶│ Open │─────────────────────────────▶│ Half-open │◀─┐ a probe was ignored, dropped or
//!   └────────┘         └──────┘                              └───────────┘──┘ lost: its place is free again
//!        ▲                 ▲            a probe failed          │     │
//!        │                 └────────────────────────────────────┘     │
//!        │                         enough probes succeeded            │
//!        └────────────────────────────────────────────────────────────┘
//! ```
//!
//! * Closed → Open: rations the gate. Nobody enters before the open time is over; a few at a time after it.
//! * Open → Half-open: made by the probe that goes in, not by a timer.
//! * Half-open → Open: rations the gate again, for longer if the open time grows.
//! * Half-open → Closed: the gate admits; windows and counts begin anew.
//!
//! Which calls may enter is the gate's business alone, and so is how long a probe may stay away. A result counts only if
//! its call entered in the present period, that is, at or after this breaker's last move.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use portcullis_core::{Gate, Generation, Moment, Mover, Outcome};

use crate::rules::{Rules, Span, Window};
use crate::sync::{AtomicU64, Mutex, Ordering, lock};
use crate::window::{CallWindow, Period, Sum, TimeWindow};

/// What a breaker does with requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum State {
    /// Lets them pass.
    Closed,
    /// Refuses them.
    Open,
    /// Lets a few pass, to see how they fare.
    HalfOpen,
}

/// Why a breaker changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// So many calls failed in a row.
    Failures,
    /// Too large a share of the calls in a window failed.
    FailureRate,
    /// Too large a share of the calls in a window was slow.
    SlowRate,
    /// It did worse than the other endpoints of its service.
    Outlier,
    /// The open time is over, and a probe went in.
    Probing,
    /// A probe failed.
    ProbeFailed,
    /// Enough probes succeeded.
    Recovered,
    /// Somebody said so.
    ByHand,
}

/// What a breaker goes by, and what it moves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Desk<'a> {
    pub(crate) rules: &'a Rules,
    pub(crate) gate: &'a Gate,
    pub(crate) mover: Mover,
    pub(crate) zeal: Zeal,
}

/// What a closed breaker does when it has seen enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Zeal {
    /// Opens.
    Acts,
    /// Says that it would have opened, begins anew, and says no more while it would be open.
    Speaks,
    /// Nothing.
    Counts,
}

/// A change of state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Turn {
    pub(crate) from: State,
    pub(crate) to: State,
    pub(crate) reason: Reason,
    /// When it is over, if it opened.
    pub(crate) until: Option<Moment>,
    /// Whether it did, and not only would have.
    pub(crate) enforced: bool,
}

/// How a call went, and when its right to enter was given.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) entered: Generation,
    pub(crate) outcome: Outcome,
    /// How long the head of the response took, if that matters.
    pub(crate) took: Option<Duration>,
    /// How long the server asked to be left alone.
    pub(crate) asked: Option<Duration>,
}

#[derive(Debug)]
pub(crate) struct Breaker {
    /// See [`Word`]. Counts are written by whoever has a result, everything else under `turning`.
    word: AtomicU64,
    /// When the open time is over, also one that was only spoken of; while closed, since when it is.
    edge: AtomicU64,
    turning: Mutex<()>,
    calls: Option<CallWindow>,
    time: Option<TimeWindow>,
    failed: std::sync::atomic::AtomicU64,
    ignored: std::sync::atomic::AtomicU64,
    refused: std::sync::atomic::AtomicU64,
}

/// `state: 2 | last move: 31 | times opened: 7 | period: 8 | count: 16`. The count is of failures in a row while closed, of
/// probes that succeeded otherwise.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Word(u64);

// === impl State ===

impl State {
    /// A word for logs and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half-open",
        }
    }
}

// === impl Reason ===

impl Reason {
    /// A word for logs and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Failures => "failures",
            Self::FailureRate => "failure-rate",
            Self::SlowRate => "slow-rate",
            Self::Outlier => "outlier",
            Self::Probing => "probing",
            Self::ProbeFailed => "probe-failed",
            Self::Recovered => "recovered",
            Self::ByHand => "by-hand",
        }
    }
}

// === impl Breaker ===

impl Breaker {
    pub(crate) fn new(rules: &Rules) -> Self {
        let slow = |window: &Window| window.slow.is_some();
        Self {
            word: AtomicU64::new(Word::new(State::Closed, Generation::FIRST, 0, Period(0)).0),
            edge: AtomicU64::new(0),
            turning: Mutex::new(()),
            calls: rules.calls.and_then(|window| match window.span {
                Span::Calls(size) => Some(CallWindow::new(size, slow(&window))),
                Span::Time(_) => None,
            }),
            time: rules.time.and_then(|window| match window.span {
                Span::Time(time) => Some(TimeWindow::new(time)),
                Span::Calls(_) => None,
            }),
            failed: 0.into(),
            ignored: 0.into(),
            refused: 0.into(),
        }
    }

    pub(crate) fn state(&self) -> State {
        self.word().state()
    }

    /// Failures in a row while closed, else probes that succeeded.
    pub(crate) fn count(&self) -> u16 {
        self.word().count()
    }

    /// When the open time is over.
    pub(crate) fn until(&self) -> Option<Moment> {
        // In this order, and written in the other: one that has opened has its own.
        let is_closed = self.state() == State::Closed;
        (!is_closed).then(|| Moment::from_nanos(self.edge.load(Ordering::Acquire)))
    }

    pub(crate) fn call_sum(&self) -> Option<Sum> {
        Some(self.calls.as_ref()?.sum(self.word().period()))
    }

    pub(crate) fn time_sum(&self, now: Moment) -> Option<Sum> {
        Some(self.time.as_ref()?.sum(self.word().period(), now))
    }

    pub(crate) fn failed(&self) -> u64 {
        self.failed.load(Relaxed)
    }

    pub(crate) fn ignored(&self) -> u64 {
        self.ignored.load(Relaxed)
    }

    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Relaxed)
    }

    pub(crate) fn refuse(&self) {
        self.refused.fetch_add(1, Relaxed);
    }

    /// A call went in while the gate was rationed.
    pub(crate) fn probe(&self, entered: Generation) -> Option<Turn> {
        if self.word().state() != State::Open {
            return None;
        }
        let _turning = lock(&self.turning);
        let word = self.word();
        if word.state() != State::Open || !entered.reached(word.last_move()) {
            return None;
        }
        self.set(word.with_state(State::HalfOpen));
        Some(Turn { from: State::Open, to: State::HalfOpen, reason: Reason::Probing, until: None, enforced: true })
    }

    /// Whether a call that entered then began after the last turn.
    pub(crate) fn is_of_this_period(&self, entered: Generation) -> bool {
        entered.reached(self.word().last_move())
    }

    /// Closed, and no failure since the last success.
    #[inline]
    pub(crate) fn is_calm(&self) -> bool {
        let word = self.word();
        word.state() == State::Closed && word.count() == 0
    }

    /// A call has ended. `random` is in 0..1.
    pub(crate) fn record(
        &self,
        desk: Desk<'_>,
        call: Call,
        now: impl Fn() -> Moment,
        random: impl FnOnce() -> f64,
    ) -> Option<Turn> {
        let seen = self.word();
        match call.outcome {
            Outcome::Success => {}
            Outcome::Failure => _ = self.failed.fetch_add(1, Relaxed),
            _ => {
                self.ignored.fetch_add(1, Relaxed);
                return None;
            }
        }
        if !call.entered.reached(seen.last_move()) {
            return None;
        }
        let failed = call.outcome == Outcome::Failure;
        if seen.state() != State::Closed {
            // What opens it by being slow does not close it either.
            return if failed || desk.rules.find_slow(call.took).contains(&true) {
                self.open(desk, seen, Reason::ProbeFailed, call.asked, now(), random())
            } else {
                self.probe_succeeded(desk, seen, now)
            };
        }
        let rules = desk.rules;
        let (slow, at) = self.note(rules, seen.period(), failed, call.took, &now);
        let in_a_row = self.count_closed(seen, failed)?;
        if !failed && !slow || desk.zeal == Zeal::Counts {
            // A success opens nothing, not even one that completes the least number of calls.
            return None;
        }
        let at = at.unwrap_or_else(now);
        let reason = match rules.failures {
            limit if failed && limit != 0 && in_a_row >= limit => Reason::Failures,
            _ => self.exceeded(rules, seen.period(), at)?,
        };
        self.open(desk, seen, reason, call.asked, at, random())
    }

    /// Writes a call of the closed state into the windows. Says whether it was slow for any of them, and the time if it was read.
    fn note(
        &self,
        rules: &Rules,
        period: Period,
        failed: bool,
        took: Option<Duration>,
        now: &impl Fn() -> Moment,
    ) -> (bool, Option<Moment>) {
        let [slow_call, slow_time] = rules.find_slow(took);
        if let Some(window) = &self.calls {
            window.record(period, failed, slow_call);
        }
        let at = self.time.as_ref().map(|window| {
            let at = now();
            window.record(period, at, failed, slow_time);
            at
        });
        (slow_call || slow_time, at)
    }

    /// Counts failures in a row; `None` when `seen` is past.
    fn count_closed(&self, seen: Word, failed: bool) -> Option<u16> {
        let mut word = seen;
        loop {
            let count = if failed { word.count().saturating_add(1) } else { 0 };
            if count == word.count() {
                return Some(count);
            }
            match self.word.compare_exchange_weak(word.0, word.with_count(count).0, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => return Some(count),
                Err(now) => word = Word(now),
            }
            if word.with_count(0) != seen.with_count(0) {
                return None;
            }
        }
    }

    fn exceeded(&self, rules: &Rules, period: Period, now: Moment) -> Option<Reason> {
        let check = |window: Option<Window>, sum: Option<Sum>| {
            let (window, sum) = (window?, sum?);
            if sum.calls < window.at_least || sum.calls == 0 {
                return None;
            }
            if window.failed.is_some_and(|share| share.reached(sum.failed, sum.calls)) {
                return Some(Reason::FailureRate);
            }
            let slow = window.slow.is_some_and(|(_, share)| share.reached(sum.slow, sum.calls));
            slow.then_some(Reason::SlowRate)
        };
        let calls = check(rules.calls, self.calls.as_ref().map(|window| window.sum(period)));
        calls.or_else(|| check(rules.time, self.time.as_ref().map(|window| window.sum(period, now))))
    }

    /// Opens if it is closed, because others do better.
    pub(crate) fn eject(&self, desk: Desk<'_>, now: Moment, random: f64) -> Option<Turn> {
        let seen = self.word();
        if seen.state() != State::Closed || desk.zeal == Zeal::Counts {
            return None;
        }
        self.open(desk, seen, Reason::Outlier, None, now, random)
    }

    /// Opens, if nobody has changed the state since `seen`.
    #[cold]
    fn open(
        &self,
        desk: Desk<'_>,
        seen: Word,
        reason: Reason,
        asked: Option<Duration>,
        now: Moment,
        random: f64,
    ) -> Option<Turn> {
        if desk.zeal == Zeal::Speaks && seen.state() == State::Closed && now < self.edge() {
            return None;
        }
        let _turning = lock(&self.turning);
        let word = self.word();
        if word.last_move() != seen.last_move() || word.period() != seen.period() {
            return None;
        }
        let times = match word.state() {
            State::Closed => desk.rules.open.forgive(word.times(), now.since(self.edge())),
            State::Open | State::HalfOpen => word.times(),
        };
        let times = desk.rules.open.next(times).min(Word::TIMES);
        let until = now + desk.rules.open.for_the(times, random, asked);
        let (from, period) = (word.state(), word.period().next());
        let enforced = from != State::Closed || desk.zeal == Zeal::Acts;
        if enforced {
            let moved = desk.gate.ration(desk.mover, word.last_move(), desk.rules.ration(until))?;
            self.turn(Word::new(State::Open, moved, times, period), until, now);
        } else {
            self.turn(Word::new(State::Closed, word.last_move(), times, period), until, now);
        }
        Some(Turn { from, to: State::Open, reason, until: Some(until), enforced })
    }

    #[cold]
    fn probe_succeeded(&self, desk: Desk<'_>, seen: Word, now: impl FnOnce() -> Moment) -> Option<Turn> {
        let _turning = lock(&self.turning);
        let word = self.word();
        if word.last_move() != seen.last_move() || word.state() == State::Closed {
            return None;
        }
        let count = word.count().saturating_add(1);
        if count < desk.rules.successes.get() {
            self.set(word.with_count(count));
            return None;
        }
        let (moved, now) = (desk.gate.admit(desk.mover, word.last_move())?, now());
        self.turn(Word::new(State::Closed, moved, word.times(), word.period().next()), now, now);
        Some(Turn { from: word.state(), to: State::Closed, reason: Reason::Recovered, until: None, enforced: true })
    }

    /// Closes, whatever the state is, and forgets everything.
    #[cold]
    pub(crate) fn reset(&self, gate: &Gate, mover: Mover, now: Moment) -> Option<Turn> {
        let _turning = lock(&self.turning);
        let word = self.word();
        // A move even where it admits already: what entered before does not count.
        let moved = gate.admit(mover, word.last_move())?;
        self.turn(Word::new(State::Closed, moved, 0, word.period().next()), now, now);
        let from = word.state();
        (from != State::Closed).then_some(Turn {
            from,
            to: State::Closed,
            reason: Reason::ByHand,
            until: None,
            enforced: true,
        })
    }

    /// Becomes what it was when it was made, for another gate.
    pub(crate) fn clear(&self) {
        let _turning = lock(&self.turning);
        // Of another period: a window's words say which one they belong to, and not when it was.
        let period = self.word().period().next();
        self.turn(Word::new(State::Closed, Generation::FIRST, 0, period), Moment::MIN, Moment::MIN);
        for count in [&self.failed, &self.ignored, &self.refused] {
            count.store(0, Relaxed);
        }
    }

    /// Called with `turning` held.
    fn turn(&self, word: Word, edge: Moment, now: Moment) {
        if let Some(window) = &self.calls {
            window.clear(word.period());
        }
        if let Some(window) = &self.time {
            window.clear(word.period(), now);
        }
        self.edge.store(edge.as_nanos(), Ordering::Release);
        self.set(word);
    }

    fn edge(&self) -> Moment {
        Moment::from_nanos(self.edge.load(Ordering::Acquire))
    }

    fn word(&self) -> Word {
        Word(self.word.load(Ordering::Acquire))
    }

    fn set(&self, word: Word) {
        self.word.store(word.0, Ordering::Release);
    }
}

// === impl Word ===

impl Word {
    const TIMES: u32 = (1 << 7) - 1;

    fn new(state: State, last_move: Generation, times: u32, period: Period) -> Self {
        let word = u64::from(last_move.to_bits()) << 31 | u64::from(times.min(Self::TIMES)) << 24;
        Self(word | u64::from(period.0) << 16).with_state(state)
    }

    fn state(self) -> State {
        match self.0 >> 62 {
            0 => State::Closed,
            1 => State::Open,
            _ => State::HalfOpen,
        }
    }

    fn last_move(self) -> Generation {
        Generation::from_bits((self.0 >> 31) as u32)
    }

    fn times(self) -> u32 {
        (self.0 >> 24) as u32 & Self::TIMES
    }

    fn period(self) -> Period {
        Period((self.0 >> 16) as u8)
    }

    fn count(self) -> u16 {
        self.0 as u16
    }

    fn with_count(self, count: u16) -> Self {
        Self(self.0 & !0xffff | u64::from(count))
    }

    fn with_state(self, state: State) -> Self {
        let state = match state {
            State::Closed => 0,
            State::Open => 1,
            State::HalfOpen => 2,
        };
        Self(self.0 & !(3 << 62) | state << 62)
    }
}

#[cfg(all(test, portcullis_loom))]
#[expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
mod loom_tests;
#[cfg(all(test, not(portcullis_loom)))]
#[expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
mod tests;
