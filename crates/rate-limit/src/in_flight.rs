//! Counts requests in flight by key, in bounded memory.
//!
//! Two rows of counters; a key has one in each, and has at most the lower of the two in flight. Two keys get in each
//! other's way only if they meet in both rows, and then towards fewer, never more.

use crate::sync::{AtomicU32, Ordering};
use crate::table::Mark;

#[derive(Debug)]
pub(crate) struct InFlight {
    rows: [Box<[AtomicU32]>; 2],
}

impl InFlight {
    pub(crate) fn new(capacity: usize) -> Self {
        let row = || (0..capacity.max(1)).map(|_| AtomicU32::new(0)).collect();
        Self { rows: [row(), row()] }
    }

    /// Enters one more, if fewer than `max` are in: how many are in now.
    ///
    /// # Errors
    ///
    /// How many are in, when that is `max` or more.
    pub(crate) fn enter(&self, mark: Mark, max: u32) -> Result<u32, u32> {
        loop {
            let before = self.counters(mark)[0].fetch_add(1, Ordering::AcqRel);
            let entered = self.enter_second(mark, max, before);
            // Of those who come at once, each may find the others in and leave; whoever leaves last finds the place free.
            if entered.is_ok() || self.count(mark) >= max {
                return entered;
            }
        }
    }

    /// As [`enter`](Self::enter), once the first row was. Of two who come at once each may be the first of one row, so what
    /// was in a row before does not tell; but whoever comes last to the second row finds everybody in both.
    fn enter_second(&self, mark: Mark, max: u32, before: u32) -> Result<u32, u32> {
        let before = before.max(self.counters(mark)[1].fetch_add(1, Ordering::AcqRel));
        let inside = self.count(mark);
        if before < max || inside <= max {
            return Ok(inside);
        }
        self.leave(mark);
        Err(inside.saturating_sub(1))
    }

    pub(crate) fn leave(&self, mark: Mark) {
        for counter in self.counters(mark) {
            counter.fetch_sub(1, Ordering::AcqRel);
        }
    }

    pub(crate) fn count(&self, mark: Mark) -> u32 {
        let [a, b] = self.counters(mark);
        a.load(Ordering::Acquire).min(b.load(Ordering::Acquire))
    }

    /// All that are in.
    pub(crate) fn total(&self) -> u64 {
        self.rows[0].iter().map(|counter| u64::from(counter.load(Ordering::Relaxed))).sum()
    }

    fn counters(&self, mark: Mark) -> [&AtomicU32; 2] {
        let [high, low] = mark.halves();
        let at = |row: usize, half: u64| &self.rows[row][((half * self.rows[row].len() as u64) >> 32) as usize];
        [at(0, high), at(1, low)]
    }
}

#[cfg(all(test, portcullis_loom))]
mod loom_tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn loom_of_two_who_come_at_once_one_gets_the_last_place() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound.get_or_insert(4);
        model.check(|| {
            let (in_flight, mark) = (Arc::new(InFlight::new(1)), Mark::of(1));
            let other = {
                let in_flight = in_flight.clone();
                loom::thread::spawn(move || in_flight.enter(mark, 1).is_ok())
            };
            let one = in_flight.enter(mark, 1).is_ok();
            assert!(one != other.join().unwrap());
        });
    }
}

#[cfg(all(test, not(portcullis_loom)))]
mod tests {
    use super::*;
    use crate::table::{Span, Table};

    #[test]
    fn never_more_than_the_limit_and_all_are_given_back() {
        let in_flight = InFlight::new(64);
        let mark = Mark::of(7 << 40 | 9);
        let most = AtomicU32::new(0);
        let inside = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..10_000 {
                        if in_flight.enter(mark, 2).is_ok() {
                            most.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                            inside.fetch_sub(1, Ordering::SeqCst);
                            in_flight.leave(mark);
                        }
                    }
                });
            }
        });
        assert!(most.load(Ordering::SeqCst) <= 2);
        assert_eq!((in_flight.count(mark), in_flight.total()), (0, 0));
        assert_eq!(
            (in_flight.enter(mark, 2), in_flight.enter(mark, 2), in_flight.enter(mark, 2)),
            (Ok(1), Ok(2), Err(2))
        );
    }

    #[test]
    fn of_two_who_come_at_once_one_gets_the_last_place() {
        let (in_flight, mark) = (InFlight::new(64), Mark::of(7 << 40 | 9));
        let before = in_flight.counters(mark)[0].fetch_add(1, Ordering::AcqRel);
        let other = in_flight.enter(mark, 1);
        let one = in_flight.enter_second(mark, 1, before);
        assert_eq!((one.is_ok(), other.is_ok()), (false, true));
        in_flight.leave(mark);
        assert_eq!(in_flight.total(), 0);
    }

    #[test]
    fn others_are_seldom_in_the_way() {
        let (table, in_flight) = (Table::new(65_536), InFlight::new(65_536));
        let refused = (0..16_000_u64).filter(|key| {
            let mark = table.mark(Span::default(), &key.to_le_bytes());
            in_flight.enter(mark, 1).is_err()
        });
        // Of the nth, one in (65,536 / n)^2: 318 at most on average.
        let refused = refused.count();
        assert!(refused < 450, "{refused}");
    }
}
