//! The limits of a layer, which may change while requests flow.
//!
//! Services see the limits that there were when they were made, and look whether they are still those: that is one read
//! of a number that hardly ever changes, where taking a share of the present ones is two writes that others wait for.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::{ArcSwap, Guard};

use crate::limit::Limit;

/// The limits as they are.
pub(crate) struct Current {
    limits: ArcSwap<Vec<Limit>>,
    changes: AtomicU64,
}

/// The limits as they were after so many changes.
#[derive(Debug)]
pub(crate) struct Seen {
    limits: Arc<Vec<Limit>>,
    changes: u64,
}

/// The limits as they are, whoever has them.
pub(crate) enum Now<'a> {
    Seen(&'a [Limit]),
    Loaded(Guard<Arc<Vec<Limit>>>),
}

// === impl Current ===

impl Current {
    pub(crate) fn new(limits: Vec<Limit>) -> Self {
        Self { limits: ArcSwap::from_pointee(limits), changes: AtomicU64::new(0) }
    }

    /// What `seen` has, if that is still so.
    pub(crate) fn now<'a>(&self, seen: &'a Seen) -> Now<'a> {
        if self.changes.load(Ordering::Acquire) == seen.changes {
            Now::Seen(&seen.limits)
        } else {
            Now::Loaded(self.limits.load())
        }
    }

    pub(crate) fn see(&self) -> Seen {
        // In this order: what changes in between is taken for old, never for new.
        let changes = self.changes.load(Ordering::Acquire);
        Seen { limits: self.limits.load_full(), changes }
    }

    pub(crate) fn to_vec(&self) -> Vec<Limit> {
        self.limits.load().to_vec()
    }

    /// Makes others of them. Once this returns, every request meets those.
    pub(crate) fn change(&self, change: impl Fn(&[Limit]) -> Vec<Limit>) {
        self.limits.rcu(|limits| change(limits));
        self.changes.fetch_add(1, Ordering::Release);
    }
}

impl fmt::Debug for Current {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.limits.load().iter()).finish()
    }
}

// === impl Now ===

impl Deref for Now<'_> {
    type Target = [Limit];

    fn deref(&self) -> &[Limit] {
        match self {
            Self::Seen(limits) => limits,
            Self::Loaded(limits) => limits,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rate;
    use std::num::NonZeroU32;

    fn named(name: &str) -> Vec<Limit> {
        vec![Limit::new(name, Rate::per_second(NonZeroU32::MIN))]
    }

    #[test]
    fn what_was_seen_counts_until_it_changes() {
        let current = Current::new(named("a"));
        let seen = current.see();
        assert!(matches!(current.now(&seen), Now::Seen([limit]) if limit.name() == "a"));
        current.change(|_| named("b"));
        assert_eq!(current.now(&seen)[0].name(), "b");
        assert!(matches!(current.now(&current.see()), Now::Seen([limit]) if limit.name() == "b"));
    }

    #[test]
    fn changes_at_the_same_time_are_all_made() {
        let current = Current::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        current.change(|limits| [limits, &named("more")].concat());
                    }
                });
            }
        });
        assert_eq!((current.to_vec().len(), current.now(&current.see()).len()), (400, 400));
    }
}
