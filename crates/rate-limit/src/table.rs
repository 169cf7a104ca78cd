//! A bounded table of theoretical arrival times: one for each key that still carries information.
//!
//! ```text
//!            take the oldest that is over              publish                    first charge
//!   ┌──────┐ ───────────────────────────► ┌────────┐ ─────────► ┌─────────┐ ─────────────────► ┌──────┐
//!   │ live │   raise the floor first      │ moving │            │ pending │                    │ live │ ─┐ charge, refund
//!   └──────┘                              └────────┘            └─────────┘                    └──────┘ ◄┘
//! ```
//!
//! An entry is the *tag* of its key, 32 bits of a keyed hash, and a word: its *arrival time* with a state and a version.
//! Other bits of the hash say in which set it lies, so two keys are taken for one only if they are alike in all of them: of
//! a million keys in a table for as many, two are so in one of 3,000 processes.
//! Charging a key that has an entry is one compare-and-set on the word. Only giving an entry to another key takes the set's
//! *head*, and nobody ever waits for it: who finds it taken charges the *floor*.
//!
//! The floor of a set is an upper bound on the debt of every key that has no entry in it. It is raised by what an entry
//! held before that entry is given away, and by every charge made without an entry. A key that gets an entry starts at the
//! floor. So whatever happens in whatever order, no key's debt is ever forgotten:
//!
//! * *A charge on an entry that changes hands* fails: the word changes before the tag does, and never repeats, because an
//!   arrival time only grows or changes its version.
//! * *A charge on the floor while the key gets an entry*: the one publishes, then reads the floor; the other charges the
//!   floor, then looks for an entry. Between the two stands a fence on both sides, so one of them sees the other.
//! * *A charge on the floor while the key loses its entry*: a raise changes the floor's version, and the charge is tried
//!   again.
//!
//! Keys whose limits have windows of very different length lie in sets of their own: else strangers could raise a floor by
//! a day, and with it shut out whoever is limited by the second.
//!
//! The entries of a set that are given away first lie in one cache line, its *front*, and the fronts of all sets lie
//! together: most charges need one line of a third of the memory, whatever the number of keys. Whoever is about to charge
//! [touches](Table::touch) the front, so that the line is on its way while the clock is read.
//!
//! An entry whose time is over carries no information, and raising the floor to it costs nobody. While every entry of a set
//! is in use, newcomers to that set share its floor: that is the overflow bucket. One who starts while it is ahead is a
//! *guest*, and makes room again as soon as the floor has passed it.

mod entry;
mod set;

use std::hash::{BuildHasher, RandomState};
use std::sync::OnceLock;

use siphasher::sip::SipHasher13;

pub(crate) use self::entry::END;

use self::entry::PENDING;
use self::set::{Set, Sets};

/// So many keys a set has in the mean: then 19 of 20 lie in front, and one set in a million has more than fit.
const KEYS_PER_SET: usize = 3;

/// So many fronts, a MiB, stay in the caches next to a core.
const NEAR: usize = 1 << 14;

/// Arrival times by key; bounded, and exact under any interleaving.
#[derive(Debug)]
pub(crate) struct Table {
    /// By [`Span`], made when one is first used: a floor that is a day ahead must not hold up who is limited by the second.
    spans: [OnceLock<Sets>; SPANS],
    /// Sets of each span.
    count: usize,
    hasher: SipHasher13,
}

/// How far ahead of now a limit's arrival times may be, roughly. Keys of one span share sets with no other's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Span(u8);

const SPANS: usize = 4;

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

// === impl Table ===

impl Table {
    /// Room for `capacity` keys at once.
    pub(crate) fn new(capacity: usize) -> Self {
        let count = capacity.div_ceil(KEYS_PER_SET).clamp(1, 1 << 29);
        let seed = RandomState::new();
        let hasher = SipHasher13::new_with_keys(seed.hash_one(0), seed.hash_one(1));
        Self { spans: Default::default(), count, hasher }
    }

    /// The span is in the upper two bits.
    pub(crate) fn mark(&self, span: Span, key: &[u8]) -> Mark {
        Mark(self.hasher.hash(key) >> 2 | u64::from(span.0) << 62)
    }

    /// Has the memory of the key's front fetched, and does not wait for it; nothing if that is near anyway.
    pub(crate) fn touch(&self, mark: Mark) {
        if self.count > NEAR {
            self.set(mark).touch();
        }
    }

    /// Lets `decide` make of the key's arrival time a later one; an arrival time that is over may be any that is over.
    ///
    /// # Errors
    ///
    /// The arrival time for which `decide` had no later one.
    pub(crate) fn charge(&self, mark: Mark, now: u64, decide: impl Fn(u64) -> Option<u64>) -> Result<Charged, u64> {
        self.charge_up_to(END, mark, now, decide)
    }

    /// As [`charge`](Self::charge), but does not take the bucket that newcomers share further than `ceiling`: where a key that
    /// has no entry ran into much debt, others would pay for it.
    pub(crate) fn charge_up_to(
        &self,
        ceiling: u64,
        mark: Mark,
        now: u64,
        decide: impl Fn(u64) -> Option<u64>,
    ) -> Result<Charged, u64> {
        let set = self.set(mark);
        loop {
            if let Some(done) = set.charge(mark, now, &decide).or_else(|| set.admit(mark, now, ceiling, &decide)) {
                return done;
            }
        }
    }

    /// The key's arrival time.
    pub(crate) fn peek(&self, mark: Mark) -> u64 {
        let set = self.set(mark);
        match set.find(mark) {
            Some((_, word)) if word.state() != PENDING => word.time(),
            Some((_, word)) => word.time().max(set.floor().time()),
            None => set.floor().time(),
        }
    }

    /// Makes the key's arrival time earlier, if it has one of its own; whether it has.
    pub(crate) fn refund(&self, mark: Mark, nanos: u64) -> bool {
        let set = self.set(mark);
        while let Some((entry, word)) = set.find(mark) {
            if word.state() == PENDING {
                return false;
            }
            if entry.replace(word, word.earlier(nanos)) {
                return true;
            }
        }
        false
    }

    /// Counts, entry by entry.
    pub(crate) fn fill(&self, now: u64) -> Fill {
        let mut fill = Fill::default();
        for sets in self.spans.iter().filter_map(OnceLock::get) {
            for set in sets.iter() {
                fill.sets += 1;
                fill.entries += set.entries().count();
                fill.live += set.entries().filter(|entry| entry.read().time() > now).count();
                fill.overflowing += usize::from(set.floor().time() > now);
            }
        }
        fill
    }

    /// The bytes it keeps, for the spans that were used so far.
    pub(crate) fn bytes(&self) -> usize {
        self.spans.iter().filter_map(OnceLock::get).map(Sets::bytes).sum()
    }

    fn set(&self, mark: Mark) -> Set<'_> {
        let sets = self.spans[(mark.0 >> 62) as usize].get_or_init(|| Sets::new(self.count));
        let index = ((mark.0 >> 32 & 0x3fff_ffff) * sets.len() as u64) >> 30;
        sets.at(index as usize)
    }
}

// === impl Span ===

impl Span {
    /// The span of a window in nanoseconds: up to ten seconds, ten minutes, ten hours, or longer.
    pub(crate) fn of(window: u64) -> Self {
        const SECOND: u64 = 1_000_000_000;
        Self([10 * SECOND, 600 * SECOND, 36_000 * SECOND].iter().map(|limit| u8::from(window > *limit)).sum())
    }
}

// === impl Mark ===

impl Mark {
    /// What an entry keeps of it: never zero.
    fn tag(self) -> u32 {
        (self.0 as u32).max(1)
    }

    /// Two numbers of 32 bits of which the upper ones have nothing to do with each other; without the span.
    pub(crate) fn halves(self) -> [u64; 2] {
        [self.0 << 2 >> 32, self.0 & 0xffff_ffff]
    }

    #[cfg(test)]
    pub(crate) fn of(bits: u64) -> Self {
        Self(bits)
    }
}

#[cfg(all(test, portcullis_loom))]
mod loom_tests;
#[cfg(all(test, not(portcullis_loom)))]
mod tests;
