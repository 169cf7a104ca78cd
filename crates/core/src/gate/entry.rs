//! What a request got at a gate, and the words that gates are.

use std::fmt;
use std::num::NonZeroU64;

/// Counts the moves of one gate. A result belongs to a period if it entered [at or after](Self::reached) the move that
/// began the period.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Generation(pub(super) u32);

/// What a request got at the gate. One who keeps it must give it [back](super::Gate::leave) himself; a
/// [`Pass`](super::Pass) does so.
///
/// One word, `kind: 2 | generation: 31 | place: 30 | 1`: every call carries it through several moves. Never zero, so that one
/// that may be missing is no longer.
#[derive(Clone, Copy, PartialEq, Eq)]
#[must_use = "a place that is not given back stays taken until it is lost"]
pub struct Entry(NonZeroU64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The gate admitted everybody.
    Free,
    /// One of the places of a ration.
    Place,
    /// One of the places of a ration, which another one gives back.
    Lent,
    /// In without asking.
    Forced,
}

/// The gate's state: `rationed: 1 | generation: 31 | places left: 32`. There are none left before `until` is over.
#[derive(Clone, Copy)]
pub(super) struct Word(pub(super) u64);

// === impl Generation ===

impl Generation {
    pub(super) const MASK: u32 = (1 << 31) - 1;

    /// Before a mover's first move.
    pub const FIRST: Self = Self(0);

    /// Whether this is `since` or later. Counting wraps after 2³¹ moves; what is more than half of that apart is taken
    /// for earlier.
    #[must_use]
    pub const fn reached(self, since: Self) -> bool {
        self.0.wrapping_sub(since.0) & Self::MASK < 1 << 30
    }

    /// As a number that fits an atomic beside others.
    #[must_use]
    pub const fn to_bits(self) -> u32 {
        self.0
    }

    /// The generation [`to_bits`](Self::to_bits) was asked of.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits & Self::MASK)
    }

    pub(super) const fn next(self) -> Self {
        Self(self.0.wrapping_add(1) & Self::MASK)
    }
}

// === impl Entry ===

impl Entry {
    pub(super) const PLACES: u32 = (1 << 30) - 1;

    #[inline]
    pub(super) fn new(generation: Generation, kind: Kind, place: u32) -> Self {
        let bits = (kind as u64) << 62 | u64::from(generation.0) << 31 | u64::from(place & Self::PLACES) << 1;
        Self(NonZeroU64::MIN | bits)
    }

    /// When the gate was entered; a result counts if this has [`reached`](Generation::reached) the move that began the
    /// period.
    #[must_use]
    #[inline]
    pub const fn generation(self) -> Generation {
        Generation((self.0.get() >> 31) as u32 & Generation::MASK)
    }

    /// Whether it holds one of the places of a rationed gate.
    #[must_use]
    #[inline]
    pub const fn is_rationed(self) -> bool {
        matches!(self.kind(), Kind::Place | Kind::Lent)
    }

    /// The same once more, for one who gives nothing back.
    pub(super) fn lent(self) -> Self {
        if self.is_rationed() { Self::new(self.generation(), Kind::Lent, self.place()) } else { self }
    }

    #[inline]
    pub(super) const fn kind(self) -> Kind {
        match self.0.get() >> 62 {
            0 => Kind::Free,
            1 => Kind::Place,
            2 => Kind::Lent,
            _ => Kind::Forced,
        }
    }

    pub(super) const fn place(self) -> u32 {
        (self.0.get() >> 1) as u32 & Self::PLACES
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("kind", &self.kind())
            .field("generation", &self.generation().0)
            .finish_non_exhaustive()
    }
}

// === impl Word ===

impl Word {
    const RATIONED: u64 = 1 << 63;

    pub(super) const fn admits(generation: Generation) -> Self {
        Self((generation.0 as u64) << 32)
    }

    pub(super) const fn rationed(generation: Generation, left: u32) -> Self {
        Self(Self::RATIONED | (generation.0 as u64) << 32 | left as u64)
    }

    #[inline]
    pub(super) const fn is_rationed(self) -> bool {
        self.0 & Self::RATIONED != 0
    }

    pub(super) const fn generation(self) -> Generation {
        Generation((self.0 >> 32) as u32 & Generation::MASK)
    }

    pub(super) const fn left(self) -> u32 {
        self.0 as u32
    }
}
