//! Every interleaving of two and three threads at one gate, under loom's memory model, without a bound on preemptions.
//!
//! Run by `RUSTFLAGS="--cfg portcullis_loom" cargo test -p portcullis-core --release loom`.

use super::*;
use loom::thread;

const EVERY: Duration = Duration::from_secs(5);

fn at(seconds: u64) -> Moment {
    Moment::from_nanos(seconds * 1_000_000_000)
}

/// A gate with so many places, for whoever comes at one second.
fn rationed(places: u16) -> (Arc<Gate>, Mover, Generation) {
    let (gate, mover) = (Arc::new(Gate::new()), Mover::new());
    let since = gate.ration(mover, Generation::FIRST, Ration { until: at(1), places, every: EVERY }).unwrap();
    (gate, mover, since)
}

fn enter(gate: &Arc<Gate>, seconds: u64) -> thread::JoinHandle<Result<Entry, Refused>> {
    let gate = gate.clone();
    thread::spawn(move || gate.enter(|| at(seconds)))
}

fn is_place(entry: &Result<Entry, Refused>) -> bool {
    entry.is_ok_and(|entry| entry.kind() == Kind::Place)
}

fn places(entries: &[Result<Entry, Refused>]) -> usize {
    entries.iter().filter(|entry| is_place(entry)).count()
}

#[test]
fn loom_three_who_come_share_one_place() {
    loom::model(|| {
        let (gate, ..) = rationed(1);
        let others = [enter(&gate, 2), enter(&gate, 2)];
        let mine = gate.enter(|| at(2));
        let entries = [mine].into_iter().chain(others.map(|other| other.join().unwrap())).collect::<Vec<_>>();
        assert_eq!(places(&entries), 1);
    });
}

#[test]
fn loom_nobody_is_refused_a_place_that_is_free() {
    loom::model(|| {
        let (gate, ..) = rationed(3);
        let others = [enter(&gate, 2), enter(&gate, 2)];
        let mine = gate.enter(|| at(2));
        let entries = [mine].into_iter().chain(others.map(|other| other.join().unwrap())).collect::<Vec<_>>();
        assert_eq!(places(&entries), 3);
    });
}

#[test]
fn loom_a_place_given_back_is_given_once() {
    loom::model(|| {
        let (gate, ..) = rationed(1);
        let out = gate.enter(|| at(1)).unwrap();
        let (one, two) = (enter(&gate, 2), enter(&gate, 2));
        gate.leave(out);
        let entries = [one.join().unwrap(), two.join().unwrap(), gate.enter(|| at(2))];
        assert_eq!(places(&entries), 1);
    });
}

#[test]
fn loom_a_lost_place_that_comes_back_late_makes_no_second() {
    loom::model(|| {
        let (gate, ..) = rationed(1);
        let lost = gate.enter(|| at(1)).unwrap();
        let fresh = enter(&gate, 6);
        let other = gate.clone();
        let back = thread::spawn(move || other.leave(lost));
        let mine = gate.enter(|| at(6));
        back.join().unwrap();
        assert_eq!(places(&[fresh.join().unwrap(), mine, gate.enter(|| at(6))]), 1);
    });
}

#[test]
fn loom_another_movers_move_makes_no_second_place() {
    loom::model(|| {
        let (gate, ..) = rationed(1);
        let (other, drain) = (gate.clone(), Mover::new());
        let moving = thread::spawn(move || {
            other.close_for(drain);
            other.open_for(drain);
        });
        let (one, mine) = (enter(&gate, 2), gate.enter(|| at(2)));
        moving.join().unwrap();
        assert_eq!(places(&[one.join().unwrap(), mine, gate.enter(|| at(2))]), 1);
    });
}

#[test]
fn loom_who_enters_after_admitting_was_told_enters_free() {
    loom::model(|| {
        let (gate, mover, since) = rationed(1);
        let (one, two) = (enter(&gate, 2), enter(&gate, 2));
        let moved = gate.admit(mover, since).unwrap();
        let mine = gate.enter(|| at(0)).unwrap();
        assert!(mine.kind() == Kind::Free && mine.generation().reached(moved));
        for entry in [one.join().unwrap(), two.join().unwrap()].into_iter().flatten() {
            assert_eq!(entry.generation().reached(moved), entry.kind() == Kind::Free);
        }
    });
}

#[test]
fn loom_two_moves_from_one_generation_are_one() {
    loom::model(|| {
        let (gate, mover, since) = rationed(1);
        let ration = Ration { until: at(9), places: 1, every: EVERY };
        let again = |gate: &Arc<Gate>| {
            let gate = gate.clone();
            thread::spawn(move || gate.ration(mover, since, ration).is_some())
        };
        let threads = [again(&gate), again(&gate)];
        let mine = gate.admit(mover, since).is_some();
        let moved = threads.into_iter().filter_map(|thread| thread.join().ok()).filter(|moved| *moved).count();
        assert_eq!(moved + usize::from(mine), 1);
    });
}

/// Two generations pass under a reader who has read the first word.
#[test]
fn loom_a_refusal_is_by_one_state_of_the_gate() {
    loom::model(|| {
        let (gate, mover, since) = rationed(1);
        let other = gate.clone();
        let moving = thread::spawn(move || {
            let since = other.admit(mover, since).unwrap();
            other.ration(mover, since, Ration { until: at(4), places: 1, every: EVERY }).unwrap();
        });
        // At three seconds the first ration has a place, and only the second refuses.
        if let Err(refused) = gate.enter(|| at(3)) {
            assert_eq!(refused.until, at(4));
        }
        moving.join().unwrap();
        assert!(gate.enter(|| at(3)).is_err());
    });
}
