//! A breaker and its gate against what they are meant to be.

use std::collections::VecDeque;
use std::num::NonZeroU16;
use std::sync::Arc;

use portcullis_core::Pass;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError};

use super::*;
use crate::rules::{OpenTime, Share};

const S: Duration = Duration::from_secs(1);

fn at(seconds: u64) -> Moment {
    Moment::from_nanos((1 << 52) / 1_000_000_000 * 1_000_000_000 + seconds * 1_000_000_000)
}

/// What a breaker is meant to be, with no thought for speed or threads.
struct Naive {
    rules: Rules,
    state: State,
    /// Counts the moves of the gate; a call belongs to the one it entered in.
    moves: u32,
    until: u64,
    closed_since: u64,
    times: u32,
    in_a_row: u16,
    succeeded: u16,
    calls: VecDeque<(bool, bool)>,
    time: Vec<(u64, bool, bool)>,
}

/// A call under way.
struct Inside {
    pass: Pass,
    moves: u32,
    entered: u64,
}

impl Naive {
    fn open(&mut self, now: u64, reason: Reason, zeal: Zeal) -> Option<(State, Reason)> {
        if self.state == State::Closed {
            if zeal == Zeal::Speaks && now < self.closed_since {
                return None;
            }
            let mut well = now.saturating_sub(self.closed_since);
            while self.times > 0 && well >= self.open_time(self.times) {
                well -= self.open_time(self.times);
                self.times -= 1;
            }
        }
        // As often as that makes it longer.
        self.times += u32::from(self.times == 0 || self.open_time(self.times + 1) > self.open_time(self.times));
        (self.in_a_row, self.succeeded) = (0, 0);
        self.calls.clear();
        self.time.clear();
        if self.state != State::Closed || zeal == Zeal::Acts {
            self.state = State::Open;
            self.until = now + self.open_time(self.times);
            self.moves += 1;
        } else {
            // When it would be closed again.
            self.closed_since = now + self.open_time(self.times);
        }
        Some((State::Open, reason))
    }

    fn open_time(&self, times: u32) -> u64 {
        self.rules.open.for_the(times, 0.0, None).as_secs()
    }

    fn exceeded(&self, now: u64) -> Option<Reason> {
        let live = self
            .time
            .iter()
            .filter(|(tick, ..)| at(*tick).as_nanos() / 1_000_000_000 + 10 > at(now).as_nanos() / 1_000_000_000);
        let live: Vec<_> = live.map(|(_, failed, slow)| (*failed, *slow)).collect();
        for (window, calls) in [(self.rules.calls, self.calls.iter().copied().collect()), (self.rules.time, live)] {
            let Some(window) = window.filter(|window| calls.len() >= window.at_least as usize) else { continue };
            let share =
                |part: fn(&&(bool, bool)) -> bool| calls.iter().filter(part).count() as f64 / calls.len() as f64;
            if window.failed.is_some_and(|limit| share(|call| call.0) >= limit.as_f64()) {
                return Some(Reason::FailureRate);
            }
            if window.slow.is_some_and(|(_, limit)| share(|call| call.1) >= limit.as_f64()) {
                return Some(Reason::SlowRate);
            }
        }
        None
    }

    fn record(&mut self, moves: u32, outcome: Outcome, took: u64, now: u64, zeal: Zeal) -> Option<(State, Reason)> {
        if moves != self.moves || outcome == Outcome::Ignored {
            return None;
        }
        let failed = outcome == Outcome::Failure;
        let slow = |window: Option<Window>| {
            window.and_then(|window| window.slow).is_some_and(|(after, _)| Duration::from_secs(took) >= after)
        };
        let (slow_call, slow_time) = (slow(self.rules.calls), slow(self.rules.time));
        if self.state != State::Closed {
            if failed || slow_call || slow_time {
                return self.open(now, Reason::ProbeFailed, zeal);
            }
            self.succeeded += 1;
            if self.succeeded < self.rules.successes.get() {
                return None;
            }
            (self.state, self.closed_since, self.succeeded) = (State::Closed, now, 0);
            self.moves += 1;
            return Some((State::Closed, Reason::Recovered));
        }
        if let Some(Window { span: Span::Calls(size), .. }) = self.rules.calls {
            self.calls.push_back((failed, slow_call));
            if self.calls.len() > usize::from(size) {
                self.calls.pop_front();
            }
        }
        if self.rules.time.is_some() {
            self.time.push((now, failed, slow_time));
        }
        self.in_a_row = if failed { self.in_a_row + 1 } else { 0 };
        if zeal == Zeal::Counts || !(failed || slow_call || slow_time) {
            return None;
        }
        if failed && self.rules.failures != 0 && self.in_a_row >= self.rules.failures {
            return self.open(now, Reason::Failures, zeal);
        }
        let reason = self.exceeded(now)?;
        self.open(now, reason, zeal)
    }
}

/// One history: whatever happens, the breaker and the naive one agree, and what must never be is not.
fn live(rules: Rules, steps: Vec<(u8, usize, u64)>) -> Result<(), TestCaseError> {
    let (gate, breaker, mover, other) = (Arc::new(Gate::new()), Breaker::new(&rules), Mover::new(), Mover::new());
    let mut naive = Naive {
        rules,
        state: State::Closed,
        moves: 0,
        until: 0,
        closed_since: 0,
        times: 0,
        in_a_row: 0,
        succeeded: 0,
        calls: VecDeque::new(),
        time: Vec::new(),
    };
    // The naive one counts time from its own zero, at which both are closed.
    breaker.edge.store(at(0).as_nanos(), Ordering::Release);
    let (mut inside, mut now, mut zeal, mut drained) = (Vec::<Inside>::new(), 0, Zeal::Acts, false);
    let timeout = rules.probe_timeout.as_secs();
    for (step, which, number) in steps {
        match step {
            0..=5 => {
                let got = gate.pass(|| at(now));
                let probes = inside.iter().filter(|one| one.pass.is_rationed());
                let young = probes.filter(|one| one.entered + timeout > now).count();
                let free = young < usize::from(rules.probes.get());
                match (&got, naive.state) {
                    _ if drained => prop_assert!(got.is_err()),
                    (Ok(pass), State::Closed) => prop_assert!(!pass.is_rationed()),
                    (Ok(pass), _) => prop_assert!(pass.is_rationed() && now >= naive.until && free),
                    (Err(refused), State::Closed) => prop_assert!(false, "refused while closed: {refused:?}"),
                    (Err(refused), _) => {
                        prop_assert!(now < naive.until || !free, "stuck");
                        prop_assert!(refused.until > at(now) && refused.until <= at(now.max(naive.until) + timeout));
                    }
                }
                if let Ok(pass) = got {
                    let turn = if pass.is_rationed() { breaker.probe(pass.generation()) } else { None };
                    let expected = pass.is_rationed() && naive.state == State::Open;
                    prop_assert_eq!(turn.is_some(), expected);
                    if expected {
                        naive.state = State::HalfOpen;
                    }
                    inside.push(Inside { pass, moves: naive.moves, entered: now });
                }
            }
            6..=11 if !inside.is_empty() => {
                // Any of those inside, also one that has been there since long ago.
                let one = inside.swap_remove(which % inside.len());
                let outcome = [Outcome::Success, Outcome::Failure, Outcome::Failure, Outcome::Ignored][which % 4];
                let call = Call { entered: one.pass.generation(), outcome, took: Some(number as u32 * S), asked: None };
                let desk = Desk { rules: &rules, gate: &gate, mover, zeal };
                let turn = breaker.record(desk, call, || at(now), || 0.0);
                let expected = naive.record(one.moves, outcome, number, now, zeal);
                prop_assert_eq!(turn.map(|turn| (turn.to, turn.reason)), expected);
            }
            12 => {
                zeal = [Zeal::Acts, Zeal::Acts, Zeal::Acts, Zeal::Speaks, Zeal::Counts][which % 5];
            }
            13 => {
                drained = !drained;
                if drained { gate.close_for(other) } else { gate.open_for(other) }
            }
            14 => now += number * 100,
            _ => now += number,
        }
        prop_assert_eq!(breaker.state(), naive.state);
        let count = if naive.state == State::Closed { naive.in_a_row } else { naive.succeeded };
        prop_assert_eq!(breaker.count(), count);
        if naive.state != State::Closed {
            prop_assert_eq!(breaker.until(), Some(at(naive.until)));
        }
    }
    // Never open for ever: with those inside still hanging, it lets probes in and closes.
    gate.open_for(other);
    now = now.max(naive.until) + timeout;
    for _ in 0..rules.successes.get() {
        if breaker.state() == State::Closed {
            break;
        }
        let pass = gate.pass(|| at(now)).map_err(|_| TestCaseError::fail("open for ever"))?;
        breaker.probe(pass.generation());
        let call = Call { entered: pass.generation(), outcome: Outcome::Success, took: None, asked: None };
        breaker.record(Desk { rules: &rules, gate: &gate, mover, zeal }, call, || at(now), || 0.0);
    }
    prop_assert!(breaker.state() == State::Closed && gate.admits());
    Ok(())
}

fn share() -> impl Strategy<Value = Share> {
    (1_u32..=10).prop_map(|tenths| Share::new(f64::from(tenths) / 10.0).unwrap())
}

fn window(size: Window) -> impl Strategy<Value = Option<Window>> {
    (any::<bool>(), 0_u32..6, proptest::option::of(share()), proptest::option::of((1_u64..4, share()))).prop_map(
        move |(present, at_least, failed, slow)| {
            let mut window = size.at_least(at_least);
            window.failed = failed;
            window.slow = slow.map(|(after, share)| (Duration::from_secs(after), share));
            present.then_some(window)
        },
    )
}

fn rules() -> impl Strategy<Value = Rules> {
    let small = || (1_u16..4).prop_map(|n| NonZeroU16::new(n).unwrap());
    let calls = (1_u16..8).prop_flat_map(|size| window(Window::of_calls(size).unwrap()));
    let time = window(Window::of_time(10 * S).unwrap());
    let open = (1_u64..8, 1_u64..60).prop_map(|(first, limit)| {
        OpenTime::growing(Duration::from_secs(first), Duration::from_secs(limit)).jitter(None)
    });
    (0_u16..5, calls, time, open, small(), small(), 1_u64..6).prop_map(
        |(failures, calls, time, open, probes, successes, timeout)| Rules {
            failures,
            calls,
            time,
            open,
            probes,
            successes,
            probe_timeout: Duration::from_secs(timeout),
            outliers: None,
        },
    )
}

proptest! {
    #![proptest_config(Config {
        // All of them: PORTCULLIS_HISTORIES=1000000 cargo test -p portcullis-circuit-break --release histories
        cases: std::env::var("PORTCULLIS_HISTORIES").ok().and_then(|n| n.parse().ok()).unwrap_or(1_000),
        ..Config::default()
    })]

    #[test]
    fn histories_go_as_they_are_meant_to(
        rules in rules(),
        steps in proptest::collection::vec((0_u8..18, 0_usize..24, 0_u64..4), 1..120),
    ) {
        live(rules, steps)?;
    }
}

#[test]
fn what_is_kept_of_an_endpoint_is_small() {
    // A window of time has its ten buckets in it; only one of calls has bits elsewhere, at most two times 144 bytes.
    let size = size_of::<crate::shared::Guarded>();
    println!("{size} bytes");
    assert!(size <= 512, "{size} bytes");
    let half = Share::new(0.5).unwrap();
    let mut rules = Rules::new();
    rules.time = Some(Window::of_time(10 * S).unwrap().failure_rate(half).slow_rate(S, half));
    assert!(Breaker::new(&rules).calls.is_none(), "nothing on the heap");
}

#[test]
fn a_window_that_lay_still_for_many_periods_is_written_again() {
    let mut rules = Rules::new();
    rules.calls = Some(Window::of_calls(1000).unwrap());
    rules.time = Some(Window::of_time(10 * S).unwrap());
    let (gate, breaker, mover) = (Arc::new(Gate::new()), Breaker::new(&rules), Mover::new());
    let fail = || {
        let pass = gate.pass(|| at(0)).unwrap();
        let call = Call { entered: pass.generation(), outcome: Outcome::Failure, took: None, asked: None };
        breaker.record(Desk { rules: &rules, gate: &gate, mover, zeal: Zeal::Counts }, call, || at(0), || 0.0);
    };
    (0..200).for_each(|_| fail());
    // More than half of what a period's eight bits can tell apart.
    (0..200).for_each(|_| _ = breaker.reset(&gate, mover, at(0)));
    (0..200).for_each(|_| fail());
    let expected = Sum { calls: 200, failed: 200, slow: 0 };
    assert_eq!((breaker.call_sum(), breaker.time_sum(at(0))), (Some(expected), Some(expected)));
}
