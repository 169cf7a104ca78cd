//! A bounded table of theoretical arrival times: one for each key that still carries information.
//!
//! ```text
//!            take the oldest that is over              publish                    first charge
//!   ┌──────┐ ───────────────────────────► ┌────────┐ ─────────► ┌─────────┐ ─────────────────► ┌──────┐
//!   │ live │   raise the floor first      │ moving │            │ pending │                    │ live │ ─┐ charge, refund
//!   └──────┘                              └────────┘            └─────────┘                    └──────┘ ◄┘
//! ```
//!
//! An entry is two words: the *mark* of its key, a keyed hash, and its *arrival time* with a state and a version. Charging
//! a key that has an entry is one compare-and-set on the second word. Only giving an entry to another key takes the set's
//! *head*, and nobody ever waits for it: who finds it taken charges the *floor*.
//!
//! The floor of a set is an upper bound on the debt of every key that has no entry in it. It is raised by what an entry
//! held before that entry is given away, and by every charge made without an entry. A key that gets an entry starts at the
//! floor. So whatever happens in whatever order, no key's debt is ever forgotten:
//!
//! * *A charge on an entry that changes hands* fails: the word changes before the mark does, and never repeats, because an
//!   arrival time only grows or changes its version.
//! * *A charge on the floor while the key gets an entry*: the one publishes, then reads the floor; the other charges the
//!   floor, then looks for an entry. Between the two stands a fence on both sides, so one of them sees the other.
//! * *A charge on the floor while the key loses its entry*: a raise changes the floor's version, and the charge is tried
//!   again.
//!
//! An entry whose time is over carries no information, and its floor raises nobody. While every entry of a set is in use,
//! newcomers to that set share its floor: that is the overflow bucket.

use std::hash::{BuildHasher, Hasher, RandomState};

use crate::sync::{AtomicU64, Ordering, fence};

/// Entries in a set: 256 bytes with the head and the floor.
#[cfg(not(portcullis_loom))]
const WAYS: usize = 15;
#[cfg(portcullis_loom)]
const WAYS: usize = 2;

/// How often a newcomer looks again before it charges the floor because another one is being let in.
#[cfg(not(portcullis_loom))]
const PATIENCE: u32 = 64;
#[cfg(portcullis_loom)]
const PATIENCE: u32 = 0;

/// As many keys as fill a set to a bit more than a quarter: then one set in 200,000 has more than fit.
const KEYS_PER_SET: usize = 4;

/// No arrival time lies beyond: nine years after the clock's origin.
pub(crate) const END: u64 = (1 << 58) - 1;

/// Arrival times by key; bounded, and exact under any interleaving.
#[derive(Debug)]
pub(crate) struct Table {
    sets: Box<[Set]>,
    seed: RandomState,
}

/// What tells a key from others, under this table's seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mark(u64);

/// A charge that was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Charged {
    /// The key's arrival time now.
    pub(crate) time: u64,
    /// There was no entry left, so it was made on the bucket that newcomers share.
    pub(crate) overflow: bool,
}

/// How full a table is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fill {
    /// Entries whose time is not over.
    pub(crate) live: usize,
    /// All entries there are.
    pub(crate) entries: usize,
    /// Sets whose newcomers share a bucket now.
    pub(crate) overflowing: usize,
    pub(crate) sets: usize,
}

#[derive(Debug)]
#[repr(align(64))]
struct Set {
    entries: [Entry; WAYS],
    /// Not zero while somebody gives an entry to another key.
    head: AtomicU64,
    /// A [`Word`] whose version counts the raises.
    floor: AtomicU64,
}

#[derive(Debug)]
struct Entry {
    word: AtomicU64,
    mark: AtomicU64,
}

/// State in the upper two bits, version in the next four, nanoseconds in the rest.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Word(u64);

struct Head<'a>(&'a AtomicU64);

const STATE: u64 = 3 << 62;
const LIVE: u64 = 0;
const MOVING: u64 = 1 << 62;
const PENDING: u64 = 2 << 62;
const VERSION: u64 = 15 << 58;
const ONE_VERSION: u64 = 1 << 58;

// === impl Table ===

impl Table {
    /// Room for `capacity` keys at once.
    pub(crate) fn new(capacity: usize) -> Self {
        let sets = capacity.div_ceil(KEYS_PER_SET).clamp(1, u32::MAX as usize);
        Self { sets: (0..sets).map(|_| Set::new()).collect(), seed: RandomState::new() }
    }

    pub(crate) fn mark(&self, key: &[u8]) -> Mark {
        let mut hasher = self.seed.build_hasher();
        hasher.write(key);
        Mark(hasher.finish().max(1))
    }

    /// Lets `decide` make of the key's arrival time a later one; an arrival time that is over may be any that is over.
    ///
    /// # Errors
    ///
    /// The arrival time for which `decide` had no later one.
    pub(crate) fn charge(&self, mark: Mark, now: u64, decide: impl Fn(u64) -> Option<u64>) -> Result<Charged, u64> {
        let set = self.set(mark);
        loop {
            if let Some(done) = set.charge(mark, &decide).or_else(|| set.admit(mark, now, &decide)) {
                return done;
            }
        }
    }

    /// The key's arrival time.
    pub(crate) fn peek(&self, mark: Mark) -> u64 {
        let set = self.set(mark);
        match set.find(mark) {
            Some((_, word)) if word.state() == LIVE => word.time(),
            Some((_, word)) => word.time().max(set.floor().time()),
            None => set.floor().time(),
        }
    }

    /// Makes the key's arrival time earlier, if it has one of its own.
    pub(crate) fn refund(&self, mark: Mark, nanos: u64) {
        let set = self.set(mark);
        while let Some((entry, word)) = set.find(mark) {
            if word.state() != LIVE || entry.replace(word, word.earlier(nanos)) {
                return;
            }
        }
    }

    /// Counts, entry by entry.
    pub(crate) fn fill(&self, now: u64) -> Fill {
        let mut fill = Fill { sets: self.sets.len(), entries: self.sets.len() * WAYS, ..Fill::default() };
        for set in &self.sets {
            fill.live += set.entries.iter().filter(|entry| entry.word().time() > now).count();
            fill.overflowing += usize::from(set.floor().time() > now);
        }
        fill
    }

    /// The bytes it keeps, whatever happens.
    pub(crate) fn bytes(&self) -> usize {
        size_of_val::<[Set]>(&self.sets)
    }

    fn set(&self, mark: Mark) -> &Set {
        let index = ((mark.0 >> 32) * self.sets.len() as u64) >> 32;
        &self.sets[index as usize]
    }
}

// === impl Mark ===

impl Mark {
    /// Bits to spread by.
    pub(crate) fn low(self) -> usize {
        self.0 as u32 as usize
    }

    /// Two halves that have nothing to do with each other.
    pub(crate) fn halves(self) -> [u64; 2] {
        [self.0 >> 32, self.0 & 0xffff_ffff]
    }

    #[cfg(feature = "redis")]
    pub(crate) fn bits(self) -> u64 {
        self.0
    }

    #[cfg(test)]
    pub(crate) fn of(bits: u64) -> Self {
        Self(bits)
    }
}

// === impl Set ===

impl Set {
    fn new() -> Self {
        Self {
            entries: std::array::from_fn(|_| Entry { word: AtomicU64::new(0), mark: AtomicU64::new(0) }),
            head: AtomicU64::new(0),
            floor: AtomicU64::new(0),
        }
    }

    /// The entry of that key. Its word was read before its mark: if the word can still be replaced, the mark was right.
    fn find(&self, mark: Mark) -> Option<(&Entry, Word)> {
        self.beginning_at(mark).map(|entry| (entry, entry.word())).find(|(entry, word)| {
            // The order matters: see above.
            entry.mark.load(Ordering::Acquire) == mark.0 && word.state() != MOVING
        })
    }

    /// All entries, the one the key prefers first.
    fn beginning_at(&self, mark: Mark) -> impl Iterator<Item = &Entry> {
        let (before, after) = self.entries.split_at(mark.low() % WAYS);
        after.iter().chain(before)
    }

    /// Charges the key's entry. `None` when it has none, or somebody else was quicker.
    fn charge(&self, mark: Mark, decide: &impl Fn(u64) -> Option<u64>) -> Option<Result<Charged, u64>> {
        let (entry, word) = self.find(mark)?;
        if word.state() == PENDING {
            return self.activate(entry, word, decide);
        }
        let Some(time) = decide(word.time()) else { return Some(Err(word.time())) };
        entry.replace(word, word.at(time)).then_some(Ok(Charged { time, overflow: false }))
    }

    /// The first charge of an entry, by whoever comes first.
    fn activate(
        &self,
        entry: &Entry,
        word: Word,
        decide: &impl Fn(u64) -> Option<u64>,
    ) -> Option<Result<Charged, u64>> {
        fence(Ordering::SeqCst);
        let start = word.time().max(self.floor().time());
        let Some(time) = decide(start) else { return Some(Err(start)) };
        entry.replace(word, Word(word.0 & !STATE).at(time)).then_some(Ok(Charged { time, overflow: false }))
    }

    /// Charges a key that has no entry: gives it one, else charges the floor.
    fn admit(&self, mark: Mark, now: u64, decide: &impl Fn(u64) -> Option<u64>) -> Option<Result<Charged, u64>> {
        let floor = self.floor();
        if decide(floor.time()).is_none() {
            return Some(Err(floor.time()));
        }
        if let Some(head) = self.take_head() {
            if self.find(mark).is_some() {
                return None;
            }
            if let Some((entry, word)) = self.victim(mark, now) {
                if word.time() > 0 {
                    self.raise(word.time());
                }
                if !entry.replace(word, word.moving()) {
                    return None;
                }
                entry.mark.store(mark.0, Ordering::Release);
                let pending = word.pending();
                entry.word.store(pending.0, Ordering::Release);
                let done = self.activate(entry, pending, decide);
                drop(head);
                return done;
            }
        }
        if self.find(mark).is_some() { None } else { self.overflow(mark, decide) }
    }

    /// Charges the floor, unless that cannot be told from a charge the key's entry does not know of.
    fn overflow(&self, mark: Mark, decide: &impl Fn(u64) -> Option<u64>) -> Option<Result<Charged, u64>> {
        let floor = self.floor();
        let Some(time) = decide(floor.time()) else { return Some(Err(floor.time())) };
        let charged = floor.at(time);
        if !self.replace_floor(floor, charged) {
            return None;
        }
        fence(Ordering::SeqCst);
        if self.find(mark).is_none() && self.floor().version() == charged.version() {
            return Some(Ok(Charged { time, overflow: true }));
        }
        // If others charged on top of it, it stays: too much is safe.
        self.replace_floor(charged, floor);
        None
    }

    /// The entry to give away: the one that was over first.
    fn victim(&self, mark: Mark, now: u64) -> Option<(&Entry, Word)> {
        let over = |entry| {
            let word = Entry::word(entry);
            (word.time() <= now).then_some((entry, word))
        };
        self.beginning_at(mark).filter_map(over).min_by_key(|(_, word)| word.time())
    }

    fn take_head(&self) -> Option<Head<'_>> {
        for _ in 0..=PATIENCE {
            if self.head.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                return Some(Head(&self.head));
            }
            std::hint::spin_loop();
        }
        None
    }

    fn floor(&self) -> Word {
        Word(self.floor.load(Ordering::Acquire))
    }

    fn replace_floor(&self, old: Word, new: Word) -> bool {
        self.floor.compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    fn raise(&self, time: u64) {
        loop {
            let floor = self.floor();
            if self.replace_floor(floor, floor.next_version().at(time.max(floor.time()))) {
                return;
            }
        }
    }
}

// === impl Entry ===

impl Entry {
    fn word(&self) -> Word {
        Word(self.word.load(Ordering::Acquire))
    }

    fn replace(&self, old: Word, new: Word) -> bool {
        self.word.compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }
}

// === impl Word ===

impl Word {
    fn state(self) -> u64 {
        self.0 & STATE
    }

    fn version(self) -> u64 {
        self.0 & VERSION
    }

    fn time(self) -> u64 {
        self.0 & END
    }

    fn at(self, time: u64) -> Self {
        Self(self.0 & !END | time.min(END))
    }

    fn next_version(self) -> Self {
        Self(self.0 & !VERSION | (self.0.wrapping_add(ONE_VERSION) & VERSION))
    }

    fn earlier(self, nanos: u64) -> Self {
        self.next_version().at(self.time().saturating_sub(nanos))
    }

    fn moving(self) -> Self {
        Self(self.0 & !STATE | MOVING)
    }

    /// One later than what it replaces, so that no two claims look the same.
    fn pending(self) -> Self {
        Self(self.0 & !STATE | PENDING).at(self.time() + 1)
    }
}

// === impl Head ===

impl Drop for Head<'_> {
    fn drop(&mut self) {
        self.0.store(0, Ordering::Release);
    }
}

#[cfg(all(test, not(portcullis_loom)))]
mod tests {
    use super::*;
    use crate::rate::Cell;
    use std::collections::HashMap;

    const INTERVAL: u64 = 10;
    const START: u64 = 1 << 52;

    fn one_set() -> Table {
        Table::new(1)
    }

    fn take(table: &Table, key: u64, now: u64, cost: u64, window: u64) -> Result<Charged, u64> {
        let mark = table.mark(&key.to_le_bytes());
        table.charge(mark, now, |time| Cell::charge(time, now, cost, window))
    }

    /// Cases for the property tests: `PORTCULLIS_CASES` or the usual few.
    fn cases(usual: u32) -> proptest::prelude::ProptestConfig {
        let cases = std::env::var("PORTCULLIS_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(usual);
        proptest::prelude::ProptestConfig { cases, failure_persistence: None, ..Default::default() }
    }

    #[test]
    fn sixteen_bytes_an_entry_and_sixty_four_a_key() {
        assert_eq!(size_of::<Set>(), 256);
        assert_eq!(Table::new(65_536).bytes(), 4 << 20);
    }

    #[test]
    fn a_key_keeps_its_debt_while_others_come_and_go() {
        let table = one_set();
        assert!(take(&table, 0, START, 50, 50).is_ok());
        for key in 1..1000 {
            let _ = take(&table, key, START + 49, 1, 1);
        }
        assert_eq!(take(&table, 0, START + 49, 50, 50), Err(START + 50));
        assert!(take(&table, 0, START + 50, 50, 50).is_ok());
    }

    #[test]
    fn newcomers_share_a_bucket_while_every_entry_is_in_use() {
        let table = one_set();
        for key in 0..WAYS as u64 {
            assert!(!take(&table, key, START, INTERVAL, 3 * INTERVAL).unwrap().overflow);
        }
        assert_eq!(table.fill(START), Fill { live: 15, entries: 15, overflowing: 0, sets: 1 });
        for key in 100..103 {
            assert!(take(&table, key, START, INTERVAL, 3 * INTERVAL).unwrap().overflow);
        }
        assert_eq!(take(&table, 103, START, INTERVAL, 3 * INTERVAL), Err(START + 3 * INTERVAL));
        assert!(take(&table, 0, START, INTERVAL, 3 * INTERVAL).is_ok(), "who has an entry keeps it");
        assert_eq!(table.fill(START).overflowing, 1);
        // An entry that is over goes to the next newcomer, who starts where the bucket stands.
        let later = START + INTERVAL;
        assert_eq!(
            take(&table, 104, later, INTERVAL, 3 * INTERVAL),
            Ok(Charged { time: START + 4 * INTERVAL, overflow: false })
        );
    }

    #[test]
    fn a_refund_gives_back_what_a_charge_took() {
        let table = one_set();
        assert!(take(&table, 1, START, 30, 30).is_ok());
        table.refund(table.mark(&1_u64.to_le_bytes()), 10);
        assert_eq!(table.peek(table.mark(&1_u64.to_le_bytes())), START + 20);
        assert!(take(&table, 1, START, 10, 30).is_ok());
        table.refund(table.mark(&2_u64.to_le_bytes()), 10);
    }

    #[derive(Clone, Copy, Debug)]
    struct Step {
        key: u64,
        wait: u64,
        /// How far this caller's clock is behind.
        late: u64,
        cost: u64,
        refund: bool,
    }

    fn steps(keys: u64) -> impl proptest::strategy::Strategy<Value = Vec<Step>> {
        use proptest::prelude::*;
        let step = (0..keys, 0_u64..8, 0_u64..20, 1_u64..4, proptest::bool::weighted(0.1));
        let step = step.prop_map(|(key, wait, late, cost, refund)| Step { key, wait, late, cost, refund });
        proptest::collection::vec(step, 1..120)
    }

    proptest::proptest! {
        #![proptest_config(cases(2000))]

        /// However few entries there are, and however late a clock, no key is admitted what it would not be alone.
        #[test]
        fn no_debt_is_forgotten(steps in steps(25)) {
            let (table, window) = (one_set(), 5 * INTERVAL);
            let (mut now, mut debts) = (START, HashMap::<u64, u64>::new());
            for Step { key, wait, late, cost, refund } in steps {
                now += wait;
                let (now, cost) = (now - late, cost * INTERVAL);
                let debt = debts.entry(key).or_default();
                if let Ok(charged) = take(&table, key, now, cost, window) {
                    let alone = Cell::charge(*debt, now, cost, window);
                    proptest::prop_assert!(alone.is_some(), "admitted with a debt of {} at {}", *debt, now);
                    if refund && !charged.overflow {
                        table.refund(table.mark(&key.to_le_bytes()), cost);
                    } else {
                        *debt = alone.unwrap();
                    }
                }
            }
        }

        /// As long as there are entries enough, each key is admitted exactly what it would be alone.
        #[test]
        fn each_key_is_as_if_alone(steps in steps(15)) {
            let (table, window) = (one_set(), 5 * INTERVAL);
            let (mut now, mut debts) = (START, HashMap::<u64, u64>::new());
            for Step { key, wait, cost, .. } in steps {
                now += wait;
                let debt = debts.entry(key).or_default();
                let alone = Cell::charge(*debt, now, cost * INTERVAL, window);
                proptest::prop_assert_eq!(take(&table, key, now, cost * INTERVAL, window).is_ok(), alone.is_some());
                *debt = alone.unwrap_or(*debt);
            }
        }

        /// Where governor has the same question, it has the same answer. Only divisors of a second: it rounds the interval
        /// down, we round it up.
        #[test]
        fn governor_agrees(waits in proptest::collection::vec(0_u64..300, 1..100), count in proptest::sample::select(vec![1_u32, 2, 4, 5, 8, 10, 16, 20, 25, 40, 50, 100]), burst in 1_u32..20) {
            use governor::clock::FakeRelativeClock;
            use governor::{Quota, RateLimiter};
            use std::num::NonZeroU32;
            let (count, burst) = (NonZeroU32::new(count).unwrap(), NonZeroU32::new(burst).unwrap());
            let clock = FakeRelativeClock::default();
            let theirs = RateLimiter::direct_with_clock(Quota::per_second(count).allow_burst(burst), clock.clone());
            let (table, cell) = (one_set(), crate::Rate::per_second(count).burst(burst).cell());
            let mut now = START;
            for wait in waits {
                now += wait * 1_000_000;
                clock.advance(std::time::Duration::from_millis(wait));
                let ours = take(&table, 1, now, cell.interval, cell.window).is_ok();
                proptest::prop_assert_eq!(ours, theirs.check().is_ok());
            }
        }
    }

    /// Threads on one set, with more keys than it has entries and a clock that moves: no key has more than its share.
    #[test]
    fn threads_never_exceed_any_share() {
        const KEYS: usize = 24;
        let rounds = std::env::var("PORTCULLIS_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(20_000);
        let (table, clock) = (one_set(), AtomicU64::new(START));
        let admitted: [AtomicU64; KEYS] = std::array::from_fn(|_| AtomicU64::new(0));
        let (interval, window) = (1000, 5000);
        std::thread::scope(|scope| {
            for seed in 0..4_u64 {
                let (table, clock, admitted) = (&table, &clock, &admitted);
                scope.spawn(move || {
                    let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
                    for _ in 0..rounds {
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        let key = random % KEYS as u64;
                        let now = clock.fetch_add(random >> 32 & 63, Ordering::Relaxed);
                        if take(table, key, now, interval, window).is_ok() {
                            admitted[key as usize].fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        let elapsed = clock.load(Ordering::Relaxed) - START;
        for admitted in admitted {
            assert!(admitted.load(Ordering::Relaxed) <= 5 + elapsed / interval);
        }
    }
}

/// Run by `RUSTFLAGS="--cfg portcullis_loom" cargo test -p portcullis-rate-limit --release --lib loom`.
#[cfg(all(test, portcullis_loom))]
mod loom_tests {
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
    fn take(set: &Set, key: u64, now: u64, burst: u64) -> bool {
        let decide = |time| Cell::charge(time, now, COST, burst * COST);
        loop {
            if let Some(done) = set.charge(Mark(key), &decide).or_else(|| set.admit(Mark(key), now, &decide)) {
                return done.is_ok();
            }
            loom::thread::yield_now();
        }
    }

    fn together(set: &Arc<Set>, tasks: Vec<Box<dyn FnOnce(&Set) -> bool + Send>>) -> usize {
        let threads: Vec<_> = tasks
            .into_iter()
            .map(|task| {
                let set = set.clone();
                loom::thread::spawn(move || task(&set))
            })
            .collect();
        threads.into_iter().map(|thread| usize::from(thread.join().unwrap())).sum()
    }

    #[test]
    fn loom_a_new_key_gets_one_entry() {
        model(3, || {
            let set = Arc::new(Set::new());
            let admitted =
                together(&set, vec![Box::new(|set| take(set, 1, 100, 1)), Box::new(|set| take(set, 1, 100, 1))]);
            // None, if one charges the floor and the other inherits that: a race may cost a newcomer, never gain.
            assert!(admitted + usize::from(take(&set, 1, 100, 1)) <= 1);
        });
    }

    #[test]
    fn loom_a_key_that_loses_its_entry_loses_no_debt() {
        model(3, || {
            let set = Arc::new(Set::new());
            // Both entries are over at 110; one of the two others takes the place of 1, and so does perhaps the other.
            assert!(take(&set, 1, 100, 1) && take(&set, 2, 100, 1));
            let admitted = together(
                &set,
                vec![
                    Box::new(|set| take(set, 1, 110, 1)),
                    Box::new(|set| {
                        take(set, 3, 110, 1);
                        take(set, 4, 110, 1);
                        false
                    }),
                ],
            );
            assert!(admitted + usize::from(take(&set, 1, 110, 1)) <= 1);
        });
    }

    #[test]
    fn loom_a_late_clock_does_not_bring_a_debt_to_be_forgotten() {
        model(3, || {
            let set = Arc::new(Set::new());
            assert!(take(&set, 1, 100, 1) && take(&set, 2, 90, 1));
            let admitted = together(
                &set,
                vec![
                    // Read its clock at 105, when the debt of 1 was not over.
                    Box::new(|set| take(set, 1, 105, 1)),
                    Box::new(|set| {
                        take(set, 3, 110, 1);
                        take(set, 4, 110, 1);
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
            let set = Arc::new(Set::new());
            // One entry is in use, the other one free: of three who come, some charge the floor.
            assert!(take(&set, 2, 100, 1));
            let admitted = together(
                &set,
                vec![
                    Box::new(|set| take(set, 1, 105, 2)),
                    Box::new(|set| {
                        take(set, 3, 105, 1);
                        false
                    }),
                    Box::new(|set| take(set, 1, 105, 2)),
                ],
            );
            assert!(admitted + usize::from(take(&set, 1, 105, 2)) <= 2);
        });
    }

    #[test]
    fn loom_a_refund_meets_no_other_key() {
        model(3, || {
            let set = Arc::new(Set::new());
            assert!(take(&set, 1, 100, 2) && take(&set, 2, 100, 1));
            let other = set.clone();
            let refund = loom::thread::spawn(move || {
                while let Some((entry, word)) = other.find(Mark(1)) {
                    if word.state() != LIVE || entry.replace(word, word.earlier(COST)) {
                        break;
                    }
                }
            });
            let newcomer = take(&set, 3, 110, 1);
            refund.join().unwrap();
            assert!(!(newcomer && take(&set, 3, 110, 1)), "the refund went to 3");
        });
    }
}
