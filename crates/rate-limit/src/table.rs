//! A bounded table of theoretical arrival times: one for each key that still carries information.
//!
//! ```text
//!            take the oldest that is over              publish                    first charge
//!   ┌──────┐ ───────────────────────────► ┌────────┐ ─────────► ┌─────────┐ ─────────────────► ┌──────┐
//!   │ live │   raise the floor first      │ moving │            │ pending │                    │ live │ ─┐ charge, refund
//!   └──────┘                              └────────┘            └─────────┘                    └──────┘ ◄┘
//! ```
//!
//! An entry is the *tag* of its key, 48 bits of a keyed hash, and a word: its *arrival time* with a state and a version.
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
//! together: most charges need one line of a quarter of the memory, whatever the number of keys. Whoever is about to charge
//! [touches](Table::touch) the front, so that the line is on its way while the clock is read.
//!
//! An entry whose time is over carries no information, and raising the floor to it costs nobody. While every entry of a set
//! is in use, newcomers to that set share its floor: that is the overflow bucket. One who starts while it is ahead is a
//! *guest*, and makes room again as soon as the floor has passed it.

use std::hash::{BuildHasher, RandomState};
use std::sync::OnceLock;

use siphasher::sip::SipHasher13;

use crate::sync::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

/// Entries that lie together: one such group is in front, so many are behind. 256 bytes a set.
#[cfg(not(portcullis_loom))]
const GROUP: usize = 4;
#[cfg(not(portcullis_loom))]
const BEHIND: usize = 3;
#[cfg(portcullis_loom)]
const GROUP: usize = 1;
#[cfg(portcullis_loom)]
const BEHIND: usize = 1;

/// How often a newcomer looks again before it charges the floor because another one is being let in.
#[cfg(not(portcullis_loom))]
const PATIENCE: u32 = 64;
#[cfg(portcullis_loom)]
const PATIENCE: u32 = 0;

/// As many keys as fill a set to a bit more than a quarter: then one set in 200,000 has more than fit.
const KEYS_PER_SET: usize = 4;

/// So many fronts, a MiB, stay in the caches next to a core.
const NEAR: usize = 1 << 14;

/// No arrival time lies beyond: nine years after the clock's origin.
pub(crate) const END: u64 = (1 << 58) - 1;

/// Arrival times by key; bounded, and exact under any interleaving.
#[derive(Debug)]
pub(crate) struct Table {
    /// By [`Span`], made when one is first used: a floor that is a day ahead must not hold up who is limited by the second.
    spans: [OnceLock<Sets>; SPANS],
    /// Sets of each span.
    count: usize,
    hasher: SipHasher13,
}

/// The sets of one span.
#[derive(Debug)]
struct Sets {
    fronts: Box<[Front]>,
    backs: Box<[Back]>,
}

/// Where a key may lie.
#[derive(Clone, Copy, Debug)]
struct Set<'a> {
    front: &'a Front,
    back: &'a Back,
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

#[derive(Debug)]
#[repr(align(64))]
struct Front {
    group: Group,
    /// Written to have the line fetched; never read.
    touched: AtomicU64,
}

#[derive(Debug)]
#[repr(align(64))]
struct Back {
    groups: [Group; BEHIND],
    /// Not zero while somebody gives an entry to another key.
    head: AtomicU64,
    /// A [`Word`] whose version counts the raises.
    floor: AtomicU64,
}

/// Some entries: the words, and the tags in two parts.
#[derive(Debug)]
struct Group {
    words: [AtomicU64; GROUP],
    low: [AtomicU32; GROUP],
    high: [AtomicU16; GROUP],
}

#[derive(Clone, Copy, Debug)]
struct Entry<'a> {
    word: &'a AtomicU64,
    low: &'a AtomicU32,
    high: &'a AtomicU16,
}

/// State in the upper two bits, version in the next four, nanoseconds in the rest.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Word(u64);

struct Head<'a>(&'a AtomicU64);

const STATE: u64 = 3 << 62;
const LIVE: u64 = 0;
const MOVING: u64 = 1 << 62;
const PENDING: u64 = 2 << 62;
/// Live, but started at a floor that was ahead, and was charged only once.
const GUEST: u64 = 3 << 62;
const VERSION: u64 = 15 << 58;
const ONE_VERSION: u64 = 1 << 58;

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
        Mark(self.hasher.hash(key) >> 2 | u64::from(span.0) << 62 | 1)
    }

    /// Has the memory of the key's front fetched, and does not wait for it; nothing if that is near anyway.
    pub(crate) fn touch(&self, mark: Mark) {
        if self.count > NEAR {
            self.set(mark).front.touched.store(0, Ordering::Relaxed);
        }
    }

    /// Lets `decide` make of the key's arrival time a later one; an arrival time that is over may be any that is over.
    ///
    /// # Errors
    ///
    /// The arrival time for which `decide` had no later one.
    pub(crate) fn charge(&self, mark: Mark, now: u64, decide: impl Fn(u64) -> Option<u64>) -> Result<Charged, u64> {
        let set = self.set(mark);
        loop {
            if let Some(done) = set.charge(mark, now, &decide).or_else(|| set.admit(mark, now, &decide)) {
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

    /// Makes the key's arrival time earlier, if it has one of its own.
    pub(crate) fn refund(&self, mark: Mark, nanos: u64) {
        let set = self.set(mark);
        while let Some((entry, word)) = set.find(mark) {
            if word.state() == PENDING || entry.replace(word, word.earlier(nanos)) {
                return;
            }
        }
    }

    /// Counts, entry by entry.
    pub(crate) fn fill(&self, now: u64) -> Fill {
        let mut fill = Fill::default();
        for sets in self.spans.iter().filter_map(OnceLock::get) {
            for set in (0..sets.fronts.len()).map(|index| sets.at(index)) {
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
        let of = |sets: &Sets| size_of_val::<[Front]>(&sets.fronts) + size_of_val::<[Back]>(&sets.backs);
        self.spans.iter().filter_map(OnceLock::get).map(of).sum()
    }

    fn set(&self, mark: Mark) -> Set<'_> {
        let sets = self.spans[(mark.0 >> 62) as usize].get_or_init(|| Sets::new(self.count));
        let index = ((mark.0 >> 32 & 0x3fff_ffff) * sets.fronts.len() as u64) >> 30;
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
    /// Bits to spread by.
    #[cfg(feature = "redis")]
    pub(crate) fn low(self) -> usize {
        self.0 as u32 as usize
    }

    /// What an entry keeps of it: never zero.
    fn tag(self) -> (u32, u16) {
        (self.0 as u32, (self.0 >> 32) as u16)
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

// === impl Sets ===

impl Sets {
    fn new(count: usize) -> Self {
        Self {
            fronts: (0..count).map(|_| Front { group: Group::new(), touched: AtomicU64::new(0) }).collect(),
            backs: (0..count).map(|_| Back::new()).collect(),
        }
    }

    fn at(&self, index: usize) -> Set<'_> {
        Set { front: &self.fronts[index], back: &self.backs[index] }
    }
}

// === impl Back ===

impl Back {
    fn new() -> Self {
        Self { groups: std::array::from_fn(|_| Group::new()), head: AtomicU64::new(0), floor: AtomicU64::new(0) }
    }
}

// === impl Set ===

impl<'a> Set<'a> {
    fn entries(self) -> impl Iterator<Item = Entry<'a>> {
        self.front.group.entries().chain(self.behind())
    }

    fn behind(self) -> impl Iterator<Item = Entry<'a>> {
        self.back.groups.iter().flat_map(Group::entries)
    }

    /// The entry of that key. Its word was read before its tag: if the word can still be replaced, the tag was right.
    #[inline]
    fn find(self, mark: Mark) -> Option<(Entry<'a>, Word)> {
        let tag = mark.tag();
        let in_front = self.front.group.entries().find_map(|entry| entry.if_of(tag));
        if in_front.is_some() { in_front } else { self.find_behind(tag) }
    }

    #[inline(never)]
    fn find_behind(self, tag: (u32, u16)) -> Option<(Entry<'a>, Word)> {
        self.behind().find_map(|entry| entry.if_of(tag))
    }

    /// Charges the key's entry. `None` when it has none, or somebody else was quicker.
    fn charge(self, mark: Mark, now: u64, decide: &impl Fn(u64) -> Option<u64>) -> Option<Result<Charged, u64>> {
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

    /// Charges a key that has no entry: gives it one, else charges the floor.
    fn admit(self, mark: Mark, now: u64, decide: &impl Fn(u64) -> Option<u64>) -> Option<Result<Charged, u64>> {
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
        if self.find(mark).is_some() { None } else { self.overflow(mark, decide) }
    }

    /// Charges the floor, unless that cannot be told from a charge the key's entry does not know of.
    fn overflow(self, mark: Mark, decide: &impl Fn(u64) -> Option<u64>) -> Option<Result<Charged, u64>> {
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
        let in_front = self.front.group.entries().filter_map(over).min_by_key(|(_, word)| word.time());
        in_front.or_else(|| self.behind().filter_map(over).min_by_key(|(_, word)| word.time()))
    }

    fn take_head(self) -> Option<Head<'a>> {
        for _ in 0..=PATIENCE {
            if self.back.head.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                return Some(Head(&self.back.head));
            }
            std::hint::spin_loop();
        }
        None
    }

    fn floor(self) -> Word {
        Word(self.back.floor.load(Ordering::Acquire))
    }

    fn replace_floor(self, old: Word, new: Word) -> bool {
        self.back.floor.compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
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

// === impl Group ===

impl Group {
    fn new() -> Self {
        Self {
            words: std::array::from_fn(|_| AtomicU64::new(0)),
            low: std::array::from_fn(|_| AtomicU32::new(0)),
            high: std::array::from_fn(|_| AtomicU16::new(0)),
        }
    }

    fn entries(&self) -> impl Iterator<Item = Entry<'_>> {
        (0..GROUP).map(|i| Entry { word: &self.words[i], low: &self.low[i], high: &self.high[i] })
    }
}

// === impl Entry ===

impl Entry<'_> {
    /// The entry with its word, if it has that tag.
    #[inline]
    fn if_of(self, tag: (u32, u16)) -> Option<(Self, Word)> {
        let word = self.read();
        // The order matters: see above.
        (self.tag() == tag && word.state() != MOVING).then_some((self, word))
    }

    fn read(self) -> Word {
        Word(self.word.load(Ordering::Acquire))
    }

    fn tag(self) -> (u32, u16) {
        (self.low.load(Ordering::Acquire), self.high.load(Ordering::Acquire))
    }

    fn replace(self, old: Word, new: Word) -> bool {
        self.word.compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Publishes an entry that was moving as that key's.
    fn give(self, mark: Mark, word: Word) {
        let (low, high) = mark.tag();
        self.low.store(low, Ordering::Release);
        self.high.store(high, Ordering::Release);
        self.word.store(word.0, Ordering::Release);
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

    fn live(self) -> Self {
        Self(self.0 & !STATE | LIVE)
    }

    fn guest(self) -> Self {
        Self(self.0 & !STATE | GUEST)
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

#[cfg(all(test, portcullis_loom))]
mod loom_tests;
#[cfg(all(test, not(portcullis_loom)))]
mod tests;
