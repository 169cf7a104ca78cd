//! One entry: the tag of its key, and its word.

use super::Mark;
use crate::sync::{AtomicU32, AtomicU64, Ordering};

/// No arrival time lies beyond: nine years after the clock's origin.
pub(crate) const END: u64 = (1 << 58) - 1;

/// Some entries: the words, and the tags, so that nothing is lost between them.
#[derive(Debug)]
pub(super) struct Group<const N: usize> {
    words: [AtomicU64; N],
    tags: [AtomicU32; N],
    /// What fills the line; whose it is says how it is used.
    pub(super) rest: AtomicU32,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Entry<'a> {
    word: &'a AtomicU64,
    tag: &'a AtomicU32,
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

impl<const N: usize> Group<N> {
    pub(super) fn new() -> Self {
        Self {
            words: std::array::from_fn(|_| AtomicU64::new(0)),
            tags: std::array::from_fn(|_| AtomicU32::new(0)),
            rest: AtomicU32::new(0),
        }
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = Entry<'_>> {
        self.words.iter().zip(&self.tags).map(|(word, tag)| Entry { word, tag })
    }

    /// The entry that has that tag, with its word.
    #[inline]
    pub(super) fn find(&self, tag: u32) -> Option<(Entry<'_>, Word)> {
        self.entries().filter(|entry| entry.tag.load(Ordering::Relaxed) == tag).find_map(|entry| {
            let word = entry.read();
            // Again, and after the word: see above.
            (entry.tag.load(Ordering::Acquire) == tag && word.state() != MOVING).then_some((entry, word))
        })
    }
}

// === impl Entry ===

impl Entry<'_> {
    pub(super) fn read(self) -> Word {
        Word::read(self.word)
    }

    pub(super) fn replace(self, old: Word, new: Word) -> bool {
        Word::replace(self.word, old, new)
    }

    /// Publishes an entry that was moving as that key's.
    pub(super) fn give(self, mark: Mark, word: Word) {
        self.tag.store(mark.tag(), Ordering::Release);
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
