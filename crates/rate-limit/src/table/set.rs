//! Where keys may lie: some entries, and the floor of those who have none.

use super::entry::{Entry, GUEST, Group, PENDING, Word};
use super::{Charged, Mark};
use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};

/// So many entries are in front: one cache line.
#[cfg(not(portcullis_loom))]
pub(super) const IN_FRONT: usize = 5;
#[cfg(portcullis_loom)]
pub(super) const IN_FRONT: usize = 1;

/// So many are behind: two more.
#[cfg(not(portcullis_loom))]
pub(super) const BEHIND: usize = 9;
#[cfg(portcullis_loom)]
pub(super) const BEHIND: usize = 1;

/// How often a newcomer looks again before it charges the floor because another one is being let in.
#[cfg(not(portcullis_loom))]
const PATIENCE: u32 = 64;
#[cfg(portcullis_loom)]
const PATIENCE: u32 = 0;

/// The sets of one span.
#[derive(Debug)]
pub(super) struct Sets {
    fronts: Box<[Front]>,
    backs: Box<[Back]>,
}

/// Where a key may lie.
#[derive(Clone, Copy, Debug)]
pub(super) struct Set<'a> {
    front: &'a Front,
    back: &'a Back,
}

#[derive(Debug)]
#[repr(align(64))]
pub(super) struct Front {
    /// The rest of the line is written to have it fetched, and never read.
    entries: Group<IN_FRONT>,
}

#[derive(Debug)]
#[repr(align(64))]
pub(super) struct Back {
    /// The rest is the *head*: not zero while somebody gives an entry to another key.
    entries: Group<BEHIND>,
    /// A [`Word`] whose version counts the raises.
    floor: AtomicU64,
}

struct Head<'a>(&'a AtomicU32);

// === impl Sets ===

impl Sets {
    pub(super) fn new(count: usize) -> Self {
        Self {
            fronts: (0..count).map(|_| Front { entries: Group::new() }).collect(),
            backs: (0..count).map(|_| Back { entries: Group::new(), floor: AtomicU64::new(0) }).collect(),
        }
    }

    pub(super) fn at(&self, index: usize) -> Set<'_> {
        Set { front: &self.fronts[index], back: &self.backs[index] }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Set<'_>> {
        self.fronts.iter().zip(&self.backs).map(|(front, back)| Set { front, back })
    }

    pub(super) fn len(&self) -> usize {
        self.fronts.len()
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val::<[Front]>(&self.fronts) + size_of_val::<[Back]>(&self.backs)
    }
}

// === impl Set ===

impl<'a> Set<'a> {
    /// Has the front fetched, and does not wait for it.
    pub(super) fn touch(self) {
        self.front.entries.rest.store(0, Ordering::Relaxed);
    }

    pub(super) fn entries(self) -> impl Iterator<Item = Entry<'a>> {
        self.front.entries.entries().chain(self.back.entries.entries())
    }

    /// The entry of that key. Its word was read before its tag: if the word can still be replaced, the tag was right.
    #[inline]
    pub(super) fn find(self, mark: Mark) -> Option<(Entry<'a>, Word)> {
        let in_front = self.front.entries.find(mark.tag());
        if in_front.is_some() { in_front } else { self.find_behind(mark.tag()) }
    }

    #[inline(never)]
    fn find_behind(self, tag: u32) -> Option<(Entry<'a>, Word)> {
        self.back.entries.find(tag)
    }

    /// Charges the key's entry. `None` when it has none, or somebody else was quicker.
    pub(super) fn charge(
        self,
        mark: Mark,
        now: u64,
        decide: &impl Fn(u64) -> Option<u64>,
    ) -> Option<Result<Charged, u64>> {
        let (entry, word) = self.find(mark)?;
        if word.state() == PENDING {
            return self.activate(entry, word, now, decide);
        }
        let Some(time) = decide(word.time()) else { return Some(Err(word.time())) };
        entry.replace(word, word.live().at(time)).then_some(Ok(Charged { time, overflow: false }))
    }

    /// The first charge of an entry, by whoever comes first.
    fn activate(
        self,
        entry: Entry<'a>,
        word: Word,
        now: u64,
        decide: &impl Fn(u64) -> Option<u64>,
    ) -> Option<Result<Charged, u64>> {
        fence(Ordering::SeqCst);
        let start = word.time().max(self.floor().time());
        let Some(time) = decide(start) else { return Some(Err(start)) };
        let started = if start > now { word.guest() } else { word.live() };
        entry.replace(word, started.at(time)).then_some(Ok(Charged { time, overflow: false }))
    }

    /// Charges a key that has no entry: gives it one, else charges the floor, up to `ceiling`.
    pub(super) fn admit(
        self,
        mark: Mark,
        now: u64,
        ceiling: u64,
        decide: &impl Fn(u64) -> Option<u64>,
    ) -> Option<Result<Charged, u64>> {
        let floor = self.floor();
        if decide(floor.time()).is_none() {
            return Some(Err(floor.time()));
        }
        if let Some(head) = self.take_head() {
            if self.find(mark).is_some() {
                return None;
            }
            if let Some((entry, word)) = self.victim(now) {
                if word.time() > 0 {
                    self.raise(word.time());
                }
                if !entry.replace(word, word.moving()) {
                    return None;
                }
                let pending = word.pending();
                entry.give(mark, pending);
                let done = self.activate(entry, pending, now, decide);
                drop(head);
                return done;
            }
        }
        if self.find(mark).is_some() { None } else { self.overflow(mark, ceiling, decide) }
    }

    /// Charges the floor, unless that cannot be told from a charge the key's entry does not know of.
    fn overflow(self, mark: Mark, ceiling: u64, decide: &impl Fn(u64) -> Option<u64>) -> Option<Result<Charged, u64>> {
        let floor = self.floor();
        let Some(time) = decide(floor.time()) else { return Some(Err(floor.time())) };
        let time = time.min(ceiling.max(floor.time()));
        let charged = floor.at(time);
        if !self.replace_floor(floor, charged) {
            return None;
        }
        fence(Ordering::SeqCst);
        let is_missing = self.find(mark).is_none();
        // Whoever took its entry away raised the floor before: who sees that it is gone sees that as well.
        fence(Ordering::Acquire);
        if is_missing && self.floor().version() == charged.version() {
            return Some(Ok(Charged { time, overflow: true }));
        }
        // If others charged on top of it, it stays: too much is safe.
        self.replace_floor(charged, floor);
        None
    }

    /// The entry to give away: of those in front, else of those behind, the one that was over first, or says no more than
    /// the floor.
    ///
    /// Only guests go for the second reason. Without it a set that overflowed once would stay full: newcomers start at the
    /// floor, and so live long. With it for all, strangers could displace a caller in debt.
    fn victim(self, now: u64) -> Option<(Entry<'a>, Word)> {
        let floor = self.floor().time();
        let over = |entry: Entry<'a>| {
            let word = entry.read();
            // Whoever gets the entry starts one later than it ends.
            let over = word.time() < now || word.state() == GUEST && word.time() <= floor;
            over.then_some((entry, word))
        };
        let in_front = self.front.entries.entries().filter_map(over).min_by_key(|(_, word)| word.time());
        in_front.or_else(|| self.back.entries.entries().filter_map(over).min_by_key(|(_, word)| word.time()))
    }

    fn take_head(self) -> Option<Head<'a>> {
        for _ in 0..=PATIENCE {
            if self.back.entries.rest.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                return Some(Head(&self.back.entries.rest));
            }
            std::hint::spin_loop();
        }
        None
    }

    pub(super) fn floor(self) -> Word {
        Word::read(&self.back.floor)
    }

    fn replace_floor(self, old: Word, new: Word) -> bool {
        Word::replace(&self.back.floor, old, new)
    }

    fn raise(self, time: u64) {
        loop {
            let floor = self.floor();
            if self.replace_floor(floor, floor.next_version().at(time.max(floor.time()))) {
                return;
            }
        }
    }
}

// === impl Head ===

impl Drop for Head<'_> {
    fn drop(&mut self) {
        self.0.store(0, Ordering::Release);
    }
}
