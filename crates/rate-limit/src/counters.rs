//! What happened so far.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::table::Mark;

/// What happened so far.
pub(crate) struct Counters([Stripe; STRIPES]);

/// Counters of different keys do not meet in one cache line.
#[derive(Default)]
#[repr(align(64))]
pub(crate) struct Stripe {
    pub(crate) admitted: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) overflowed: AtomicU64,
    pub(crate) shadowed: AtomicU64,
    pub(crate) delayed: AtomicU64,
}

const STRIPES: usize = 32;

// === impl Counters ===

impl Counters {
    pub(crate) fn new() -> Self {
        Self(std::array::from_fn(|_| Stripe::default()))
    }

    pub(crate) fn add(&self, mark: Mark, which: impl Fn(&Stripe) -> &AtomicU64) {
        which(&self.0[mark.low() % STRIPES]).fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn add_anywhere(&self, which: impl Fn(&Stripe) -> &AtomicU64) {
        which(&self.0[0]).fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn sum(&self, which: impl Fn(&Stripe) -> &AtomicU64) -> u64 {
        self.0.iter().map(|stripe| which(stripe).load(Ordering::Relaxed)).sum()
    }
}
