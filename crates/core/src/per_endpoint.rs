//! Something for each endpoint, kept by whoever needs it.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::Endpoint;

/// One of something for each living endpoint, all gone when this is dropped.
///
/// What a [slot](Endpoint::slot) holds lives as long as the endpoint, and so outlives a layer that is replaced while its
/// endpoints stay. This is for what must not: finding it takes no lock either, and what belonged to an endpoint that is
/// gone is cleared and used again, so that there are never more than there were endpoints at a time.
pub struct PerEndpoint<T> {
    /// Each twice as long as the one before.
    rows: [OnceLock<Box<[Place<T>]>>; ROWS],
    /// Held while a place gets a new owner.
    moving: Mutex<()>,
}

/// What can begin anew for another endpoint.
pub trait Clear {
    /// Becomes what it was when it was made. Nobody else uses it meanwhile.
    fn clear(&self);
}

struct Place<T> {
    /// The [serial number](Endpoint::serial) of whose it is; zero for nobody's.
    owner: AtomicU64,
    value: OnceLock<T>,
}

/// Names an endpoint by a small number, which is given to another one when it is gone.
pub(crate) struct Number {
    index: u32,
    serial: u64,
}

/// Enough for every number there is.
const ROWS: usize = 30;
/// The length of the first row.
const FIRST: u32 = 8;

// === impl PerEndpoint ===

impl<T: Clear> PerEndpoint<T> {
    /// Nobody's yet.
    #[must_use]
    pub fn new() -> Self {
        Self { rows: std::array::from_fn(|_| OnceLock::new()), moving: Mutex::default() }
    }

    /// This endpoint's, made when it is first asked for.
    #[inline]
    pub fn of<'a>(&'a self, endpoint: &'a Endpoint, make: impl FnOnce() -> T) -> &'a T {
        match self.existing(endpoint) {
            Some(value) => value,
            None => self.settle(endpoint, make),
        }
    }

    /// This endpoint's, if it was asked for.
    #[must_use]
    #[inline]
    pub fn existing<'a>(&'a self, endpoint: &'a Endpoint) -> Option<&'a T> {
        let number = endpoint.number();
        let (row, column) = position(number.index);
        let place = self.rows.get(row)?.get()?.get(column)?;
        if place.owner.load(Ordering::Acquire) == number.serial { place.value.get() } else { None }
    }

    #[cold]
    fn settle(&self, endpoint: &Endpoint, make: impl FnOnce() -> T) -> &T {
        let number = endpoint.number();
        let (row, column) = position(number.index);
        let moving = self.moving.lock().unwrap_or_else(PoisonError::into_inner);
        let empty = |_| Place { owner: AtomicU64::new(0), value: OnceLock::new() };
        let place = &self.rows[row].get_or_init(|| (0..(FIRST as usize) << row).map(empty).collect())[column];
        if place.owner.load(Ordering::Acquire) != number.serial {
            // Whose it was is gone: numbers are given away only then.
            if let Some(value) = place.value.get() {
                value.clear();
            }
        }
        let value = place.value.get_or_init(make);
        place.owner.store(number.serial, Ordering::Release);
        drop(moving);
        value
    }
}

impl<T: Clear> Default for PerEndpoint<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> fmt::Debug for PerEndpoint<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PerEndpoint").finish_non_exhaustive()
    }
}

/// Row and column of what has this number.
fn position(index: u32) -> (usize, usize) {
    let from_first = index.saturating_add(FIRST);
    let row = from_first.ilog2() - FIRST.ilog2();
    (row as usize, (from_first - (FIRST << row)) as usize)
}

// === impl Number ===

/// Numbers that were given back, and the least that was never given.
static FREE: Mutex<(Vec<u32>, u32)> = Mutex::new((Vec::new(), 0));

impl Number {
    pub(crate) fn new() -> Self {
        static SERIAL: AtomicU64 = AtomicU64::new(1);
        let (free, next) = &mut *FREE.lock().unwrap_or_else(PoisonError::into_inner);
        let index = free.pop().unwrap_or_else(|| {
            *next += 1;
            *next - 1
        });
        Self { index, serial: SERIAL.fetch_add(1, Ordering::Relaxed) }
    }
}

impl Drop for Number {
    fn drop(&mut self) {
        FREE.lock().unwrap_or_else(PoisonError::into_inner).0.push(self.index);
    }
}

#[cfg(all(test, not(portcullis_loom)))]
mod tests {
    use super::*;
    use crate::Instance;
    use std::net::SocketAddr;
    use std::sync::Arc;

    #[derive(Default)]
    struct Count {
        count: AtomicU64,
        _held: Arc<()>,
    }

    impl Clear for Count {
        fn clear(&self) {
            self.count.store(0, Ordering::Relaxed);
        }
    }

    fn endpoint() -> Endpoint {
        Endpoint::new("s", Instance::new("a", SocketAddr::from(([127, 0, 0, 1], 1))))
    }

    #[test]
    fn every_number_has_a_place_of_its_own() {
        let mut before = None;
        for index in 0..100_000 {
            let (row, column) = position(index);
            assert!(column < (FIRST as usize) << row);
            let expected = match before {
                Some((row, column)) if column + 1 < (FIRST as usize) << row => (row, column + 1),
                Some((row, _)) => (row + 1, 0),
                None => (0, 0),
            };
            assert_eq!((row, column), expected);
            before = Some((row, column));
        }
        assert!(position(u32::MAX).0 < ROWS);
    }

    #[test]
    fn an_endpoint_finds_its_own_and_the_next_one_begins_anew() {
        let counts = PerEndpoint::<Count>::new();
        // Others come and go beside this test, so the numbers are not known: many that follow each other.
        for _ in 0..1000 {
            let (one, two) = (endpoint(), endpoint());
            assert!(counts.existing(&one).is_none());
            assert_eq!(counts.of(&one, Count::default).count.fetch_add(1, Ordering::Relaxed), 0);
            assert_eq!(counts.of(&two, Count::default).count.fetch_add(5, Ordering::Relaxed), 0);
            assert_eq!(counts.existing(&one.clone()).unwrap().count.load(Ordering::Relaxed), 1);
            assert_eq!(counts.of(&two, Count::default).count.load(Ordering::Relaxed), 5);
        }
    }

    #[test]
    fn what_is_kept_goes_with_the_keeper_though_the_endpoint_stays() {
        let (endpoint, alive) = (endpoint(), Arc::new(()));
        let counts = PerEndpoint::new();
        counts.of(&endpoint, || Count { count: AtomicU64::new(1), _held: alive.clone() });
        assert_eq!(Arc::strong_count(&alive), 2);
        drop(counts);
        assert_eq!(Arc::strong_count(&alive), 1);
    }

    #[test]
    fn threads_that_race_for_a_place_see_one_value() {
        for _ in 0..100 {
            let (endpoint, counts) = (endpoint(), PerEndpoint::<Count>::new());
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| counts.of(&endpoint, Count::default).count.fetch_add(1, Ordering::Relaxed));
                }
            });
            assert_eq!(counts.existing(&endpoint).unwrap().count.load(Ordering::Relaxed), 4);
        }
    }
}
