//! The table under every interleaving. Run by `RUSTFLAGS="--cfg portcullis_loom" cargo test -p portcullis-rate-limit
//! --release --lib loom`; `LOOM_MAX_PREEMPTIONS` sets another bound.

use super::*;
use crate::rate::Cell;
use std::sync::Arc;

const COST: u64 = 10;

/// `LOOM_MAX_PREEMPTIONS` sets another bound.
fn model(preemptions: usize, check: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound.get_or_insert(preemptions);
    model.check(check);
}

/// Charges one unit of a burst of `burst`; whether it was admitted.
fn take(set: Set<'_>, key: u64, now: u64, burst: u64) -> bool {
    let decide = |time| Cell::charge(time, now, COST, burst * COST);
    loop {
        if let Some(done) = set.charge(Mark(key), now, &decide).or_else(|| set.admit(Mark(key), now, END, &decide)) {
            return done.is_ok();
        }
        loom::thread::yield_now();
    }
}

fn together(sets: &Arc<Sets>, tasks: Vec<Box<dyn FnOnce(Set<'_>) -> bool + Send>>) -> usize {
    let threads: Vec<_> = tasks
        .into_iter()
        .map(|task| {
            let sets = sets.clone();
            loom::thread::spawn(move || task(sets.at(0)))
        })
        .collect();
    threads.into_iter().map(|thread| usize::from(thread.join().unwrap())).sum()
}

#[test]
fn loom_a_new_key_gets_one_entry() {
    model(3, || {
        let sets = Arc::new(Sets::new(1));
        let set = sets.at(0);
        let admitted =
            together(&sets, vec![Box::new(|set| take(set, 1, 100, 1)), Box::new(|set| take(set, 1, 100, 1))]);
        // None, if one charges the floor and the other inherits that: a race may cost a newcomer, never gain.
        assert!(admitted + usize::from(take(set, 1, 100, 1)) <= 1);
    });
}

#[test]
fn loom_a_key_that_loses_its_entry_loses_no_debt() {
    model(3, || {
        let sets = Arc::new(Sets::new(1));
        let set = sets.at(0);
        // Both entries are over at 111; one of the two others takes the place of 1, and so does perhaps the other.
        assert!(take(set, 1, 100, 1) && take(set, 2, 100, 1));
        let admitted = together(
            &sets,
            vec![
                Box::new(|set| take(set, 1, 111, 1)),
                Box::new(|set| {
                    take(set, 3, 111, 1);
                    take(set, 4, 111, 1);
                    false
                }),
            ],
        );
        assert!(admitted + usize::from(take(set, 1, 111, 1)) <= 1);
    });
}

#[test]
fn loom_a_late_clock_does_not_bring_a_debt_to_be_forgotten() {
    model(3, || {
        let sets = Arc::new(Sets::new(1));
        let set = sets.at(0);
        assert!(take(set, 1, 100, 1) && take(set, 2, 90, 1));
        let admitted = together(
            &sets,
            vec![
                // Read its clock at 105, when the debt of 1 was not over.
                Box::new(|set| take(set, 1, 105, 1)),
                Box::new(|set| {
                    take(set, 3, 111, 1);
                    take(set, 4, 111, 1);
                    false
                }),
            ],
        );
        assert_eq!(admitted, 0);
    });
}

#[test]
fn loom_the_shared_bucket_is_inherited() {
    model(2, || {
        let sets = Arc::new(Sets::new(1));
        let set = sets.at(0);
        // One entry is in use, the other one free: of three who come, some charge the floor.
        assert!(take(set, 2, 100, 1));
        let admitted = together(
            &sets,
            vec![
                Box::new(|set| take(set, 1, 105, 2)),
                Box::new(|set| {
                    take(set, 3, 105, 1);
                    false
                }),
                Box::new(|set| take(set, 1, 105, 2)),
            ],
        );
        assert!(admitted + usize::from(take(set, 1, 105, 2)) <= 2);
    });
}

#[test]
fn loom_a_refund_meets_no_other_key() {
    model(3, || {
        let sets = Arc::new(Sets::new(1));
        let set = sets.at(0);
        assert!(take(set, 1, 100, 2) && take(set, 2, 100, 1));
        let other = sets.clone();
        let refund = loom::thread::spawn(move || {
            while let Some((entry, word)) = other.at(0).find(Mark(1)) {
                if word.state() == PENDING || entry.replace(word, word.earlier(COST)) {
                    break;
                }
            }
        });
        let newcomer = take(set, 3, 111, 1);
        refund.join().unwrap();
        assert!(!(newcomer && take(set, 3, 111, 1)), "the refund went to 3");
    });
}
