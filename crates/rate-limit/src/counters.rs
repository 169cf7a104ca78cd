//! What happened so far.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// What happened so far.
pub(crate) struct Counters([Stripe; STRIPES]);

/// Counters of different threads do not meet in one cache line.
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

thread_local! {
    static STRIPE: usize = {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        NEXT.fetch_add(1, Ordering::Relaxed) % STRIPES
    };
}

// === impl Counters ===

impl Counters {
    pub(crate) fn new() -> Self {
        Self(std::array::from_fn(|_| Stripe::default()))
    }

    pub(crate) fn add(&self, which: impl Fn(&Stripe) -> &AtomicU64) {
        // A thread that ends has no stripe of its own any more.
        let stripe = STRIPE.try_with(|stripe| *stripe).unwrap_or(0);
        which(&self.0[stripe]).fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn sum(&self, which: impl Fn(&Stripe) -> &AtomicU64) -> u64 {
        self.0.iter().map(|stripe| which(stripe).load(Ordering::Relaxed)).sum()
    }
}
