//! Every interleaving of two and three threads at one breaker and its gate, under loom's memory model.
//!
//! Run by `RUSTFLAGS="--cfg portcullis_loom" cargo test -p portcullis-circuit-break --release --lib loom`.

use std::num::NonZeroU16;
use std::sync::Arc;

use loom::thread;
use portcullis_core::Pass;

use super::*;
use crate::rules::{OpenTime, Share};

struct Guarded {
    rules: Rules,
    gate: Arc<Gate>,
    mover: Mover,
    breaker: Breaker,
}

const S: Duration = Duration::from_secs(1);

fn at(seconds: u64) -> Moment {
    Moment::from_nanos(seconds * 1_000_000_000)
}

/// Opens for ten seconds.
fn guarded(set: impl FnOnce(&mut Rules)) -> Arc<Guarded> {
    let mut rules = Rules::new();
    rules.failures = 1;
    rules.open = OpenTime::fixed(10 * S);
    set(&mut rules);
    let breaker = Breaker::new(&rules);
    Arc::new(Guarded { rules, gate: Arc::new(Gate::new()), mover: Mover::new(), breaker })
}

impl Guarded {
    fn enter(&self, now: u64) -> Option<Pass> {
        self.gate.pass(|| at(now)).ok()
    }

    fn end(&self, pass: &Pass, outcome: Outcome, now: u64) -> Option<Turn> {
        let desk = Desk { rules: &self.rules, gate: &self.gate, mover: self.mover, zeal: Zeal::Acts };
        let call = Call { entered: pass.generation(), outcome, took: None, asked: None };
        self.breaker.record(desk, call, || at(now), || 0.0)
    }

    fn fail(&self, now: u64) -> Option<Turn> {
        let pass = self.enter(now)?;
        self.end(&pass, Outcome::Failure, now)
    }
}

fn spawn<T: 'static>(guarded: &Arc<Guarded>, run: impl FnOnce(&Guarded) -> T + 'static) -> thread::JoinHandle<T> {
    let guarded = guarded.clone();
    thread::spawn(move || run(&guarded))
}

#[test]
fn loom_failures_in_a_row_on_three_threads_open_it_once() {
    loom::model(|| {
        let guarded = guarded(|rules| rules.failures = 3);
        let others = [spawn(&guarded, |g| g.fail(0)), spawn(&guarded, |g| g.fail(0))];
        let mine = guarded.fail(0);
        let opened = others.into_iter().map(|other| other.join().unwrap()).chain([mine]).flatten().count();
        assert_eq!((opened, guarded.breaker.state()), (1, State::Open));
        assert!(guarded.enter(1).is_none());
    });
}

#[test]
fn loom_a_late_success_does_not_close_what_a_failure_opened() {
    loom::model(|| {
        let guarded = guarded(|_| ());
        let late = guarded.enter(0).unwrap();
        let late = spawn(&guarded, move |g| g.end(&late, Outcome::Success, 0));
        let probing = spawn(&guarded, |g| {
            g.fail(0);
            // The open time is over; a probe is under way.
            g.enter(10)
        });
        let (late, probe) = (late.join().unwrap(), probing.join().unwrap());
        assert_eq!(late, None);
        assert_eq!(guarded.breaker.state(), State::Open);
        assert!(probe.is_some() && guarded.enter(11).is_none(), "one probe");
    });
}

#[test]
fn loom_a_probe_that_succeeds_beside_one_that_fails_leaves_breaker_and_gate_of_one_mind() {
    loom::model(|| {
        let guarded = guarded(|rules| rules.probes = NonZeroU16::new(2).unwrap());
        guarded.fail(0);
        let (one, two) = (guarded.enter(10).unwrap(), guarded.enter(10).unwrap());
        let one = spawn(&guarded, move |g| g.end(&one, Outcome::Success, 11));
        let two = spawn(&guarded, move |g| g.end(&two, Outcome::Failure, 11));
        let turns = [one.join().unwrap(), two.join().unwrap()];
        assert_eq!(turns.iter().flatten().count(), 1, "the second was of an earlier period: {turns:?}");
        assert_eq!(guarded.breaker.state() == State::Closed, guarded.gate.admits());
    });
}

#[test]
fn loom_two_successes_on_two_threads_close_it_once() {
    loom::model(|| {
        let guarded = guarded(|rules| {
            rules.probes = NonZeroU16::new(2).unwrap();
            rules.successes = NonZeroU16::new(2).unwrap();
        });
        guarded.fail(0);
        let probe = |g: &Guarded| {
            let probe = g.enter(10)?;
            g.breaker.probe(probe.generation());
            g.end(&probe, Outcome::Success, 10)
        };
        let other = spawn(&guarded, probe);
        let turns = [probe(&guarded), other.join().unwrap()];
        assert_eq!(turns.iter().flatten().filter(|turn| turn.to == State::Closed).count(), 1);
        assert!(guarded.breaker.state() == State::Closed && guarded.gate.admits());
    });
}

#[test]
fn loom_a_reset_beside_a_failure_leaves_breaker_and_gate_of_one_mind() {
    loom::model(|| {
        let guarded = guarded(|_| ());
        let other = spawn(&guarded, |g| g.fail(0));
        guarded.breaker.reset(&guarded.gate, guarded.mover, at(0));
        other.join().unwrap();
        assert_eq!(guarded.breaker.state() == State::Closed, guarded.gate.admits());
    });
}

#[test]
fn loom_no_call_is_lost_from_a_window_of_calls() {
    loom::model(|| {
        let half = Share::new(0.5).unwrap();
        let guarded = guarded(|rules| {
            rules.failures = 0;
            rules.calls = Some(Window::of_calls(3).unwrap().failure_rate(half).at_least(3));
        });
        let end = |outcome| {
            move |g: &Guarded| {
                let pass = g.enter(0)?;
                g.end(&pass, outcome, 0)
            }
        };
        let others = [spawn(&guarded, end(Outcome::Success)), spawn(&guarded, end(Outcome::Failure))];
        others.into_iter().for_each(|other| assert_eq!(other.join().unwrap(), None));
        assert_eq!(guarded.breaker.call_sum().map(|sum| (sum.calls, sum.failed)), Some((2, 1)));
        assert!(guarded.fail(0).is_some_and(|turn| turn.reason == Reason::FailureRate));
    });
}

#[test]
fn loom_no_call_is_lost_from_a_window_of_time_when_a_lap_begins() {
    loom::model(|| {
        let guarded = guarded(|rules| {
            rules.failures = 0;
            rules.time = Some(Window::of_time(10 * S).unwrap());
        });
        let end = |now| {
            move |g: &Guarded| {
                let pass = g.enter(now)?;
                g.end(&pass, Outcome::Failure, now)
            }
        };
        end(0)(&guarded);
        let others = [spawn(&guarded, end(10)), spawn(&guarded, end(10))];
        others.into_iter().for_each(|other| assert_eq!(other.join().unwrap(), None));
        assert_eq!(guarded.breaker.time_sum(at(10)).map(|sum| (sum.calls, sum.failed)), Some((2, 2)));
    });
}
