//! Something for each thread by itself.

use std::array;
use std::cell::Cell;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};

/// One of something for each thread, as far as eight go round.
///
/// What every request writes, such as a counter, would otherwise be passed around among the processors, and that costs more
/// than the writing. Read them [all](Self::iter) for the sum.
///
/// ```
/// use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
/// use portcullis_core::PerThread;
///
/// let served = PerThread::<AtomicU64>::default();
/// served.here().fetch_add(1, Relaxed);
/// assert_eq!(served.iter().map(|one| one.load(Relaxed)).sum::<u64>(), 1);
/// ```
pub struct PerThread<T>([Line<T>; LINES]);

/// Two cache lines, since processors fetch them in pairs.
#[repr(align(128))]
struct Line<T>(T);

const LINES: usize = 8;

// === impl PerThread ===

impl<T> PerThread<T> {
    /// As many as there are, each made by `make`.
    #[must_use]
    pub fn new(mut make: impl FnMut() -> T) -> Self {
        Self(array::from_fn(|_| Line(make())))
    }

    /// This thread's.
    #[must_use]
    #[inline]
    pub fn here(&self) -> &T {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        thread_local!(static HERE: Cell<usize> = const { Cell::new(usize::MAX) });
        // A thread that ends has none of its own any more.
        let here = HERE.try_with(|here| {
            if here.get() == usize::MAX {
                here.set(NEXT.fetch_add(1, Ordering::Relaxed) % LINES);
            }
            here.get()
        });
        &self.0[here.unwrap_or(0) % LINES].0
    }

    /// Everybody's.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|line| &line.0)
    }
}

impl<T: Default> Default for PerThread<T> {
    fn default() -> Self {
        Self::new(T::default)
    }
}

impl<T: fmt::Debug> fmt::Debug for PerThread<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_follow_each_other_have_one_each_and_nothing_is_lost() {
        let counts = PerThread::<AtomicUsize>::default();
        std::thread::scope(|scope| {
            for _ in 0..LINES {
                scope.spawn(|| (0..1000).for_each(|_| _ = counts.here().fetch_add(1, Ordering::Relaxed)));
            }
        });
        let all: Vec<_> = counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        assert_eq!(all.iter().sum::<usize>(), 1000 * LINES);
        // Other tests' threads take numbers, too.
        assert!(all.iter().filter(|count| **count > 0).count() > 1, "{all:?}");
    }

    #[test]
    fn a_thread_comes_back_to_its_own() {
        let places = PerThread::<Cell<u8>>::default();
        places.here().set(7);
        assert_eq!(places.here().get(), 7);
        assert_eq!(size_of_val(&places), 128 * LINES);
    }
}
