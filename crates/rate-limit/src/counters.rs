//! What happened so far.

use std::sync::atomic::{AtomicU64, Ordering};

use portcullis_core::PerThread;

/// What happened so far.
#[derive(Default)]
pub(crate) struct Counters(PerThread<Counts>);

#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) admitted: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) overflowed: AtomicU64,
    pub(crate) shadowed: AtomicU64,
    pub(crate) delayed: AtomicU64,
}

// === impl Counters ===

impl Counters {
    pub(crate) fn add(&self, which: impl Fn(&Counts) -> &AtomicU64) {
        which(self.0.here()).fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn sum(&self, which: impl Fn(&Counts) -> &AtomicU64) -> u64 {
        self.0.iter().map(|counts| which(counts).load(Ordering::Relaxed)).sum()
    }
}
