//! What this process may decide by itself: units leased from the store, and refusals that stand until a moment.
//!
//! A key first goes to the store for every request. If it comes again soon, it is given a few units to decide on, and
//! twice as many each time they are used up before half of their life is over; fewer when they are not.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use portcullis_core::Moment;
use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;

use super::ticks;
use crate::rate::Cell;

/// Leases and refusals by key, bounded.
#[derive(Debug)]
pub(crate) struct Leases {
    shards: Box<[Mutex<Shard>]>,
    each: usize,
    next_asking: AtomicU64,
}

#[derive(Debug, Default)]
struct Shard {
    /// By the store's mark of a key.
    known: HashMap<u64, Known, BuildHasherDefault<Hashed>>,
    sweep_at: usize,
}

/// The mark is a keyed hash already.
#[derive(Debug, Default)]
struct Hashed(u64);

#[derive(Debug)]
struct Known {
    /// Units left of the lease.
    left: u32,
    leased: u32,
    /// What they were leased for: a request of another rate has no use for them.
    cell: Cell,
    /// The lease's number; zero for none.
    id: u64,
    since: Moment,
    until: Moment,
    refused_until: Moment,
    /// What was refused until then: a request of another rate may be admitted.
    refused: Cell,
    /// The store has to be told of a debt before anything more is decided here.
    owes: bool,
    seen: Moment,
    want: u32,
    /// Somebody asks for a lease: others wait for it. A number of its own for each, zero for nobody.
    asking: u64,
    asking_until: Moment,
    asked: Arc<Notify>,
}

/// What this process knows to do with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Local {
    /// It has been charged to the lease of that number.
    Charged {
        lease: u64,
        left: u32,
    },
    /// The store would refuse until then.
    Refused {
        until: Moment,
    },
    Ask(Question),
    /// Somebody is asking for a lease: see [`Leases::asking`].
    Wait,
}

/// What to ask the store for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Question {
    /// Units to lease on top of what is charged.
    pub(crate) want: u32,
    /// A lease that is over for us, and the ticks used of it.
    pub(crate) report: Option<(u64, u64)>,
    /// Others wait for the answer: to be ended with [`Leases::asked`].
    pub(crate) asking: u64,
}

/// A lease that was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Given {
    pub(crate) id: u64,
    pub(crate) units: u32,
    pub(crate) cell: Cell,
    /// When the question was sent: the lease is younger.
    pub(crate) since: Moment,
    pub(crate) until: Moment,
}

const SHARDS: usize = 16;
/// A key that comes again within this time is worth a lease.
const SOON: Duration = Duration::from_millis(200);

// === impl Leases ===

impl Leases {
    pub(crate) fn new(capacity: usize) -> Self {
        let each = capacity.div_ceil(SHARDS).max(8);
        Self { shards: (0..SHARDS).map(|_| Mutex::default()).collect(), each, next_asking: AtomicU64::new(1) }
    }

    /// Decides, if it can. `most` is the largest lease worth having; a request with zero neither takes from a lease nor says
    /// anything of how large the next should be. `patience` is how long somebody may take to ask for one.
    pub(crate) fn take(&self, mark: u64, units: u32, cell: Cell, most: u32, patience: Duration, now: Moment) -> Local {
        let mut shard = self.shard(mark);
        let Some(known) = shard.known.get_mut(&mark) else { return Local::Ask(Question::default()) };
        let soon = now.since(known.seen) < SOON;
        if most > 0 {
            known.seen = now;
            if known.id != 0 && !known.owes && known.cell == cell && now < known.until && known.left >= units {
                known.left -= units;
                return Local::Charged { lease: known.id, left: known.left };
            }
        }
        if now < known.refused_until && known.refused == cell {
            return Local::Refused { until: known.refused_until };
        }
        if most > 0 && known.asking != 0 && now < known.asking_until {
            return Local::Wait;
        }
        if most == 0 {
            return Local::Ask(Question::default());
        }
        known.owes = false;
        let report = known.close();
        if soon {
            let quick = known.leased == 0 || now.since(known.since) * 2 < known.until.since(known.since);
            let next = if quick { known.want.saturating_mul(2) } else { known.want / 2 };
            known.want = next.clamp(1, most);
        } else {
            known.want = 0;
        }
        known.leased = 0;
        let asking = if known.want > 0 { self.next_asking.fetch_add(1, Ordering::Relaxed) } else { 0 };
        (known.asking, known.asking_until) = (asking, now + patience);
        Local::Ask(Question { want: known.want, report, asking })
    }

    /// Ends when the lease that somebody is asking for is there, or is not to come; `None` if that is so already.
    pub(crate) fn asking(&self, mark: u64) -> Option<OwnedNotified> {
        let shard = self.shard(mark);
        let known = shard.known.get(&mark)?;
        (known.asking != 0).then(|| known.asked.clone().notified_owned())
    }

    /// A question is over, with an answer or without.
    pub(crate) fn asked(&self, mark: u64, asking: u64) {
        if asking != 0
            && let Some(known) = self.shard(mark).known.get_mut(&mark)
            && known.asking == asking
        {
            known.asking = 0;
            known.asked.notify_waiters();
        }
    }

    /// Gives back what was taken from a lease, if that is still the one.
    pub(crate) fn give_back(&self, mark: u64, lease: u64, units: u32) {
        if let Some(known) = self.shard(mark).known.get_mut(&mark)
            && known.id == lease
        {
            known.left = (known.left + units).min(known.leased);
        }
    }

    /// Charges more to a key's lease, as far as that goes: how many units the store has to be told of. Until it was, nothing
    /// is decided here. An interval in ticks.
    pub(crate) fn spend(&self, mark: u64, interval: u64, units: u32) -> u32 {
        let mut shard = self.shard(mark);
        let Some(known) = shard.known.get_mut(&mark) else { return units };
        let fits = known.id != 0 && ticks(known.cell.interval) == interval;
        let here = if fits { known.left.min(units) } else { 0 };
        known.left -= here;
        known.owes |= here < units;
        units - here
    }

    /// Remembers what the store said. Returns a lease that nobody will use, to be reported.
    pub(crate) fn learn(
        &self,
        mark: u64,
        given: Option<Given>,
        refused: Option<(Moment, Cell)>,
        now: Moment,
    ) -> Option<(u64, u64)> {
        let mut shard = self.shard(mark);
        if !shard.known.contains_key(&mark) && shard.known.len() >= self.each {
            shard.sweep(now);
            if shard.known.len() >= self.each {
                return given.map(|given| (given.id, 0));
            }
        }
        let known = shard.known.entry(mark).or_insert(Known::new(now));
        if let Some(refused) = refused {
            (known.refused_until, known.refused) = refused;
        }
        let given = given?;
        if known.id != 0 {
            if now < known.until && known.left > 0 {
                // Another request was given one meanwhile.
                return Some((given.id, 0));
            }
            let report = known.close();
            known.open(given);
            return report;
        }
        known.open(given);
        None
    }

    /// Keys that are known.
    pub(crate) fn len(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).known.len()).sum()
    }

    fn shard(&self, mark: u64) -> MutexGuard<'_, Shard> {
        lock(&self.shards[(mark >> 32) as usize % SHARDS])
    }
}

// === impl Shard ===

impl Shard {
    /// Forgets what says nothing any more; looks at everything, so it is not done again before much was added.
    fn sweep(&mut self, now: Moment) {
        if self.sweep_at > 0 {
            self.sweep_at -= 1;
            return;
        }
        self.known.retain(|_, known| {
            let is_asking = known.asking != 0 && now < known.asking_until;
            is_asking || now < known.until || now < known.refused_until || now.since(known.seen) < SOON
        });
        self.sweep_at = self.known.len() / 8;
    }
}

// === impl Known ===

impl Known {
    fn new(now: Moment) -> Self {
        Self {
            left: 0,
            leased: 0,
            cell: Cell::default(),
            id: 0,
            since: Moment::MIN,
            until: Moment::MIN,
            refused_until: Moment::MIN,
            refused: Cell::default(),
            owes: false,
            seen: now,
            want: 0,
            asking: 0,
            asking_until: Moment::MIN,
            asked: Arc::default(),
        }
    }

    /// Ends the lease: its number and the ticks used of it.
    fn close(&mut self) -> Option<(u64, u64)> {
        let id = std::mem::take(&mut self.id);
        let used = u64::from(self.leased - std::mem::take(&mut self.left));
        (id != 0).then(|| (id, used.saturating_mul(ticks(self.cell.interval))))
    }

    fn open(&mut self, given: Given) {
        (self.id, self.left, self.leased) = (given.id, given.units, given.units);
        (self.cell, self.since, self.until) = (given.cell, given.since, given.until);
    }
}

// === impl Hashed ===

impl Hasher for Hashed {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(byte);
        }
    }

    fn write_u64(&mut self, mark: u64) {
        self.0 = mark;
    }
}

fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 16 ticks a unit.
    const CELL: Cell = Cell { interval: 1000, window: 100_000 };

    fn at(millis: u64) -> Moment {
        Moment::from_nanos(1 << 52) + Duration::from_millis(millis)
    }

    fn given(id: u64, units: u32, since: u64) -> Option<Given> {
        Some(Given { id, units, cell: CELL, since: at(since), until: at(since + 1000) })
    }

    fn want(local: Local) -> u32 {
        match local {
            Local::Ask(question) => question.want,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_key_is_given_more_the_quicker_it_uses_them_up() {
        let (leases, mark) = (Leases::new(100), 1);
        assert_eq!(want(leases.take(mark, 1, CELL, 100, SOON, at(0))), 0, "a stranger");
        leases.learn(mark, None, None, at(0));
        assert_eq!(want(leases.take(mark, 1, CELL, 100, SOON, at(10))), 1, "again so soon");
        leases.learn(mark, given(1, 1, 10), None, at(10));
        leases.asked(mark, 1);
        assert_eq!(leases.take(mark, 1, CELL, 100, SOON, at(11)), Local::Charged { lease: 1, left: 0 });
        let Local::Ask(question) = leases.take(mark, 1, CELL, 100, SOON, at(12)) else { panic!() };
        assert_eq!(question, Question { want: 2, report: Some((1, 16)), asking: 2 });
        leases.learn(mark, given(2, 2, 12), None, at(12));
        leases.asked(mark, 2);
        assert_eq!(want(leases.take(mark, 1, CELL, 100, SOON, at(5000))), 0, "it was not used, and has expired");
    }

    #[test]
    fn a_lease_is_not_used_after_it_expired_and_its_rest_is_reported() {
        let (leases, mark) = (Leases::new(100), 1);
        leases.learn(mark, given(7, 5, 0), None, at(0));
        assert!(matches!(leases.take(mark, 3, CELL, 100, SOON, at(999)), Local::Charged { left: 2, .. }));
        let Local::Ask(question) = leases.take(mark, 1, CELL, 100, SOON, at(1000)) else { panic!() };
        assert_eq!(question.report, Some((7, 48)));
        leases.asked(mark, question.asking);
        assert!(
            matches!(leases.take(mark, 1, CELL, 100, SOON, at(1001)), Local::Ask(Question { report: None, .. })),
            "once"
        );
    }

    #[test]
    fn what_is_given_back_is_there_again_but_not_in_another_lease() {
        let (leases, mark) = (Leases::new(100), 1);
        leases.learn(mark, given(7, 2, 0), None, at(0));
        assert!(matches!(leases.take(mark, 2, CELL, 100, SOON, at(1)), Local::Charged { left: 0, .. }));
        leases.give_back(mark, 6, 2);
        let Local::Ask(question) = leases.take(mark, 1, CELL, 100, SOON, at(1)) else { panic!() };
        leases.asked(mark, question.asking);
        leases.learn(mark, given(8, 2, 0), None, at(1));
        assert!(matches!(leases.take(mark, 2, CELL, 100, SOON, at(1)), Local::Charged { lease: 8, left: 0 }));
        leases.give_back(mark, 8, 1);
        assert!(matches!(leases.take(mark, 1, CELL, 100, SOON, at(1)), Local::Charged { lease: 8, left: 0 }));
    }

    #[test]
    fn two_who_asked_at_once_use_one_lease_and_report_the_other() {
        let (leases, mark) = (Leases::new(100), 1);
        assert_eq!(leases.learn(mark, given(1, 5, 0), None, at(1)), None);
        assert_eq!(leases.learn(mark, given(2, 5, 0), None, at(2)), Some((2, 0)));
        assert!(matches!(leases.take(mark, 5, CELL, 100, SOON, at(3)), Local::Charged { lease: 1, .. }));
        assert_eq!(leases.learn(mark, given(3, 5, 0), None, at(4)), Some((1, 80)));
    }

    #[test]
    fn one_asks_for_a_lease_while_others_wait() {
        let (leases, mark) = (Leases::new(100), 1);
        leases.learn(mark, None, None, at(0));
        let Local::Ask(question) = leases.take(mark, 1, CELL, 100, SOON, at(1)) else { panic!() };
        assert_eq!(leases.take(mark, 1, CELL, 100, SOON, at(2)), Local::Wait);
        let mut waiting = Box::pin(leases.asking(mark).unwrap());
        assert!(futures::FutureExt::now_or_never(&mut waiting).is_none());
        leases.learn(mark, given(1, 1, 3), None, at(3));
        leases.asked(mark, question.asking);
        assert!(futures::FutureExt::now_or_never(&mut waiting).is_some());
        assert!(matches!(leases.take(mark, 1, CELL, 100, SOON, at(3)), Local::Charged { .. }));
        let Local::Ask(_lost) = leases.take(mark, 1, CELL, 100, SOON, at(100)) else { panic!() };
        assert_eq!(leases.take(mark, 1, CELL, 100, SOON, at(150)), Local::Wait);
        assert!(matches!(leases.take(mark, 1, CELL, 100, SOON, at(100) + SOON), Local::Ask(_)), "it never came back");
    }

    #[test]
    fn a_refusal_stands_until_its_moment() {
        let (leases, mark) = (Leases::new(100), 1);
        leases.learn(mark, None, Some((at(50), CELL)), at(0));
        assert_eq!(leases.take(mark, 1, CELL, 100, SOON, at(49)), Local::Refused { until: at(50) });
        assert!(matches!(leases.take(mark, 1, CELL, 100, SOON, at(50)), Local::Ask(_)));
    }

    #[test]
    fn neither_a_lease_nor_a_refusal_counts_for_another_rate() {
        let (leases, mark) = (Leases::new(100), 1);
        for other in [Cell { window: 200_000, ..CELL }, Cell { interval: 10, ..CELL }] {
            leases.learn(mark, given(7, 5, 0), Some((at(50), CELL)), at(0));
            leases.asked(mark, 0);
            let Local::Ask(question) = leases.take(mark, 1, other, 100, SOON, at(1)) else { panic!("{other:?}") };
            assert_eq!(question.report, Some((7, 0)), "it is of no use to those of the new rate");
            leases.asked(mark, question.asking);
            assert_eq!(leases.take(mark, 1, CELL, 100, SOON, at(2)), Local::Refused { until: at(50) });
        }
    }

    #[test]
    fn who_leaves_some_to_others_takes_nothing_of_what_they_leased() {
        let (leases, mark) = (Leases::new(100), 1);
        leases.learn(mark, given(1, 4, 0), None, at(0));
        let least = |now| leases.take(mark, 1, CELL, 0, SOON, at(now));
        assert_eq!(least(1), Local::Ask(Question::default()));
        for left in (0..4).rev() {
            assert_eq!(leases.take(mark, 1, CELL, 100, SOON, at(2)), Local::Charged { lease: 1, left });
        }
        assert_eq!(want(leases.take(mark, 1, CELL, 100, SOON, at(3))), 1);
        assert_eq!(least(4), Local::Ask(Question::default()), "nor does it wait for the next");
        leases.asked(mark, 1);
        assert_eq!(least(5), Local::Ask(Question::default()));
        assert_eq!(want(leases.take(mark, 1, CELL, 100, SOON, at(6))), 2, "as if only those that use it came");
    }

    #[test]
    fn more_is_charged_to_the_lease_first_and_ends_it_when_it_is_not_enough() {
        let (leases, mark) = (Leases::new(100), 1);
        assert_eq!(leases.spend(mark, 16, 3), 3, "nothing is known of it");
        leases.learn(mark, given(1, 9, 0), None, at(0));
        assert_eq!((leases.spend(mark, 17, 2), leases.spend(mark, 16, 3)), (2, 0), "of another rate; of this one");
        let Local::Ask(question) = leases.take(mark, 1, CELL, 100, SOON, at(1)) else { panic!("it owes two") };
        assert_eq!(question.report, Some((1, 48)));
        leases.asked(mark, question.asking);
        leases.learn(mark, given(2, 5, 1), None, at(1));
        assert_eq!(leases.take(mark, 1, CELL, 100, SOON, at(2)), Local::Charged { lease: 2, left: 4 });
        assert_eq!(leases.spend(mark, 16, 6), 2);
        assert!(matches!(leases.take(mark, 1, CELL, 100, SOON, at(3)), Local::Ask(_)));
    }

    #[test]
    fn a_flood_of_keys_stays_within_the_capacity() {
        let leases = Leases::new(160);
        for key in 0..100_000 {
            leases.learn(key << 28, given(key, 1, key / 10), None, at(key / 10));
        }
        assert!(leases.len() <= 160, "{}", leases.len());
    }
}
