//! One entry: the tag of its key, and its word.

use super::Mark;
use crate::sync::{AtomicU16, AtomicU32, AtomicU64, Ordering};

/// Entries that lie together; one such group is in front.
#[cfg(not(portcullis_loom))]
pub(super) const GROUP: usize = 4;
#[cfg(portcullis_loom)]
pub(super) const GROUP: usize = 1;

/// No arrival time lies beyond: nine years after the clock's origin.
pub(crate) const END: u64 = (1 << 58) - 1;

/// Some entries: the words, and the tags in two parts.
#[derive(Debug)]
pub(super) struct Group {
    words: [AtomicU64; GROUP],
    low: [AtomicU32; GROUP],
    high: [AtomicU16; GROUP],
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Entry<'a> {
    word: &'a AtomicU64,
    low: &'a AtomicU32,
    high: &'a AtomicU16,
}

/// State in the upper two bits, version in the next four, nanoseconds in the rest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Word(u64);

const STATE: u64 = 3 << 62;
pub(super) const LIVE: u64 = 0;
pub(super) const MOVING: u64 = 1 << 62;
pub(super) const PENDING: u64 = 2 << 62;
/// Live, but started at a floor that was ahead, and was charged only once.
pub(super) const GUEST: u64 = 3 << 62;
const VERSION: u64 = 15 << 58;
const ONE_VERSION: u64 = 1 << 58;

// === impl Group ===

impl Group {
    pub(super) fn new() -> Self {
        Self {
            words: std::array::from_fn(|_| AtomicU64::new(0)),
            low: std::array::from_fn(|_| AtomicU32::new(0)),
            high: std::array::from_fn(|_| AtomicU16::new(0)),
        }
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = Entry<'_>> {
        (0..GROUP).map(|i| Entry { word: &self.words[i], low: &self.low[i], high: &self.high[i] })
    }
}

// === impl Entry ===

impl Entry<'_> {
    /// The entry with its word, if it has that tag.
    #[inline]
    pub(super) fn if_of(self, tag: (u32, u16)) -> Option<(Self, Word)> {
        let word = self.read();
        // The order matters: see above.
        (self.tag() == tag && word.state() != MOVING).then_some((self, word))
    }

    pub(super) fn read(self) -> Word {
        Word::read(self.word)
    }

    pub(super) fn tag(self) -> (u32, u16) {
        (self.low.load(Ordering::Acquire), self.high.load(Ordering::Acquire))
    }

    pub(super) fn replace(self, old: Word, new: Word) -> bool {
        Word::replace(self.word, old, new)
    }

    /// Publishes an entry that was moving as that key's.
    pub(super) fn give(self, mark: Mark, word: Word) {
        let (low, high) = mark.tag();
        self.low.store(low, Ordering::Release);
        self.high.store(high, Ordering::Release);
        self.word.store(word.0, Ordering::Release);
    }
}

// === impl Word ===

impl Word {
    pub(super) fn read(from: &AtomicU64) -> Self {
        Self(from.load(Ordering::Acquire))
    }

    pub(super) fn replace(at: &AtomicU64, old: Self, new: Self) -> bool {
        at.compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    pub(super) fn state(self) -> u64 {
        self.0 & STATE
    }

    pub(super) fn version(self) -> u64 {
        self.0 & VERSION
    }

    pub(super) fn time(self) -> u64 {
        self.0 & END
    }

    pub(super) fn at(self, time: u64) -> Self {
        Self(self.0 & !END | time.min(END))
    }

    pub(super) fn next_version(self) -> Self {
        Self(self.0 & !VERSION | (self.0.wrapping_add(ONE_VERSION) & VERSION))
    }

    pub(super) fn earlier(self, nanos: u64) -> Self {
        self.next_version().at(self.time().saturating_sub(nanos))
    }

    pub(super) fn live(self) -> Self {
        Self(self.0 & !STATE | LIVE)
    }

    pub(super) fn guest(self) -> Self {
        Self(self.0 & !STATE | GUEST)
    }

    pub(super) fn moving(self) -> Self {
        Self(self.0 & !STATE | MOVING)
    }

    /// One later than what it replaces, so that no two claims look the same.
    pub(super) fn pending(self) -> Self {
        Self(self.0 & !STATE | PENDING).at(self.time() + 1)
    }
}
