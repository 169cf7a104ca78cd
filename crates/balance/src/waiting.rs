//! How many requests wait for somebody to admit.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Places to wait in, shared by all services of a layer.
#[derive(Clone, Debug)]
pub(crate) struct Waiting {
    most: usize,
    taken: Arc<AtomicUsize>,
}

/// One of them, until dropped.
#[derive(Debug)]
pub(crate) struct Place(Arc<AtomicUsize>);

// === impl Waiting ===

impl Waiting {
    pub(crate) fn new(most: usize) -> Self {
        Self { most, taken: Arc::default() }
    }

    /// A place, if there is one left.
    pub(crate) fn take(&self) -> Option<Place> {
        let more = |taken| (taken < self.most).then_some(taken + 1);
        self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Place(self.taken.clone()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_so_many_places_and_clones_share_them() {
        let waiting = Waiting::new(2);
        let places = [waiting.take(), waiting.clone().take()];
        assert!(places.iter().all(Option::is_some) && waiting.take().is_none());
        drop(places);
        assert!(waiting.take().is_some());
        assert!(Waiting::new(0).take().is_none());
    }
}
