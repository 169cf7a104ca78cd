//! A breaker for each key, as many as there may be.
//!
//! Keys come from outside, so their number is bounded: a key has one of eight ways of one bucket, as in a processor's cache.
//! Looking one up takes no lock; a new one copies its bucket.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::{BuildHasher, Hash};
use std::marker::PhantomData;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use http::Request;
use portcullis_core::Moment;

use crate::rules::Rules;
use crate::shared::{Alone, Shared};

/// Scopes breakers by a key of the request: see
/// [`CircuitBreakLayer::with_key`](crate::CircuitBreakLayer::with_key).
pub struct Keyed<F, T> {
    key: Arc<F>,
    keys: Arc<Keys<T>>,
}

/// Which breaker a request belongs to: [`Keyed`] by its key, `()` by its position.
pub trait Scope<B>: sealed::Scope<B> {}

pub(crate) struct Keys<T> {
    buckets: Box<[ArcSwap<Vec<Arc<Alone>>>]>,
    hasher: RandomState,
    /// The bucket to look for idle ones in next; held while one changes.
    sweep: Mutex<usize>,
    count: AtomicUsize,
    holds: PhantomData<fn() -> T>,
}

#[expect(unnameable_types, reason = "which scopes there are is this crate's choice")]
pub(crate) mod sealed {
    use super::{Alone, Arc, Keyed, Keys, Request, Shared};

    /// Makes another of its kind that shares no breakers with it.
    pub trait Fresh: Clone {
        #[must_use]
        fn fresh(&self) -> Self;
    }

    impl Fresh for () {
        fn fresh(&self) -> Self {}
    }

    impl<F, T> Fresh for Keyed<F, T> {
        fn fresh(&self) -> Self {
            Self { key: self.key.clone(), keys: Arc::new(Keys::new(self.keys.buckets.len())) }
        }
    }

    pub trait Scope<B> {
        #[expect(private_interfaces, reason = "nobody else can call it")]
        fn alone(&self, shared: &Shared, request: &Request<B>) -> Option<Arc<Alone>>;
    }
}

const WAYS: usize = 8;
/// One that was not asked for so long, and is closed, knows nothing worth keeping.
const IDLE: Duration = Duration::from_secs(600);

// === impl Scope ===

impl<B> Scope<B> for () {}

impl<B> sealed::Scope<B> for () {
    #[expect(private_interfaces, reason = "nobody else can call it")]
    fn alone(&self, _: &Shared, _: &Request<B>) -> Option<Arc<Alone>> {
        None
    }
}

impl<B, F, T> Scope<B> for Keyed<F, T>
where
    F: Fn(&Request<B>) -> Option<T>,
    T: Hash + Eq + Send + Sync + 'static,
{
}

impl<B, F, T> sealed::Scope<B> for Keyed<F, T>
where
    F: Fn(&Request<B>) -> Option<T>,
    T: Hash + Eq + Send + Sync + 'static,
{
    #[expect(private_interfaces, reason = "nobody else can call it")]
    fn alone(&self, shared: &Shared, request: &Request<B>) -> Option<Arc<Alone>> {
        let key = (self.key)(request)?;
        Some(self.keys.of(key, &shared.parts.rules, shared.now()))
    }
}

// === impl Keyed ===

impl<F, T> Keyed<F, T> {
    pub(crate) fn new(key: F, limit: NonZeroU32) -> Self {
        let keys = Keys::new((limit.get() as usize).div_ceil(WAYS));
        Self { key: Arc::new(key), keys: Arc::new(keys) }
    }

    pub(crate) fn keys(&self) -> &Keys<T> {
        &self.keys
    }
}

impl<F, T> Clone for Keyed<F, T> {
    fn clone(&self) -> Self {
        Self { key: self.key.clone(), keys: self.keys.clone() }
    }
}

impl<F, T> fmt::Debug for Keyed<F, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keyed").field("keys", &self.keys.len()).finish_non_exhaustive()
    }
}

// === impl Keys ===

impl<T> Keys<T> {
    fn new(buckets: usize) -> Self {
        Self {
            buckets: (0..buckets).map(|_| ArcSwap::default()).collect(),
            hasher: RandomState::new(),
            sweep: Mutex::new(0),
            count: AtomicUsize::new(0),
            holds: PhantomData,
        }
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }
}

impl<T: Hash + Eq + Send + Sync + 'static> Keys<T> {
    /// The one with this key, if it is known.
    pub(crate) fn find(&self, key: &T) -> Option<Arc<Alone>> {
        find(&self.bucket(key).load(), key).cloned()
    }

    fn of(&self, key: T, rules: &Rules, now: Moment) -> Arc<Alone> {
        let bucket = self.bucket(&key);
        if let Some(known) = find(&bucket.load(), &key) {
            known.touch(now);
            return known.clone();
        }
        self.insert(bucket, key, rules, now)
    }

    #[cold]
    fn insert(&self, bucket: &ArcSwap<Vec<Arc<Alone>>>, key: T, rules: &Rules, now: Moment) -> Arc<Alone> {
        let mut sweep = self.sweep.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entries = (**bucket.load()).clone();
        if let Some(known) = find(&entries, &key) {
            known.touch(now);
            return known.clone();
        }
        let before = entries.len();
        entries.retain(|entry| !is_idle(entry, now));
        if entries.len() >= WAYS {
            // What refuses nobody knows less than what does, and what somebody said is not ours to forget.
            let order = |(_, entry): &(usize, &Arc<Alone>)| (entry.refuses(now), entry.used());
            let free = entries.iter().enumerate().filter(|(_, entry)| !entry.is_told());
            if let Some((least, _)) = free.min_by_key(order) {
                entries.swap_remove(least);
            }
        }
        let new = Arc::new(Alone::new(rules, Some(Box::new(key))));
        new.touch(now);
        entries.push(new.clone());
        let after = entries.len();
        bucket.store(Arc::new(entries));
        // Whoever comes new clears away behind him: another bucket for each.
        *sweep = (*sweep + 1) % self.buckets.len();
        let other = &self.buckets[*sweep];
        let swept = other.load_full();
        let kept: Vec<_> = swept.iter().filter(|entry| !is_idle(entry, now)).cloned().collect();
        let gone = swept.len() - kept.len();
        if gone > 0 {
            other.store(Arc::new(kept));
        }
        self.count.fetch_add(after, Ordering::Relaxed);
        self.count.fetch_sub(before + gone, Ordering::Relaxed);
        new
    }

    fn bucket(&self, key: &T) -> &ArcSwap<Vec<Arc<Alone>>> {
        let hash = self.hasher.hash_one(key) as usize;
        &self.buckets[hash % self.buckets.len()]
    }
}

fn find<'a, T: Eq + 'static>(entries: &'a [Arc<Alone>], key: &T) -> Option<&'a Arc<Alone>> {
    entries.iter().find(|entry| entry.key::<T>() == Some(key))
}

fn is_idle(entry: &Alone, now: Moment) -> bool {
    // One that is open, and that nobody has asked for since its time was over, refuses nobody either.
    !entry.refuses(now) && now.since(entry.used()) > IDLE && !entry.is_told()
}

#[cfg(all(test, not(portcullis_loom)))]
#[expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
mod tests {
    use super::*;
    use crate::breaker::{Call, Desk, Zeal};
    use portcullis_core::{Generation, Outcome};

    fn at(seconds: u64) -> Moment {
        Moment::from_nanos(seconds * 1_000_000_000)
    }

    fn keys(limit: u32) -> Arc<Keys<u32>> {
        Keyed::<(), u32>::new((), NonZeroU32::new(limit).unwrap()).keys
    }

    #[test]
    fn a_flood_of_keys_stays_within_its_bound() {
        let (keys, rules) = (keys(100), Rules::new());
        for key in 0..100_000 {
            keys.of(key, &rules, at(u64::from(key)));
            assert!(keys.len() <= 104);
        }
        let there: usize = keys.buckets.iter().map(|bucket| bucket.load().len()).sum();
        assert_eq!(there, keys.len());
    }

    #[test]
    fn idle_ones_go_when_others_come() {
        let (keys, rules) = (keys(800), Rules::new());
        (0..200).for_each(|key| _ = keys.of(key, &rules, at(0)));
        let before = keys.len();
        (1000..1100).for_each(|key| _ = keys.of(key, &rules, at(601)));
        assert!(before > 190 && keys.len() <= 100, "{before} {}", keys.len());
    }

    #[test]
    fn one_that_was_given_up_while_it_was_open_makes_room_when_its_time_is_over() {
        let (keys, rules) = (keys(8), Rules::new());
        let mover = portcullis_core::Mover::new();
        for key in 0..7 {
            let (alone, rules) = (keys.of(key, &rules, at(0)), Rules { failures: 1, ..rules });
            let desk = Desk { rules: &rules, gate: &alone.gate, mover, zeal: Zeal::Acts };
            let call = Call { entered: Generation::FIRST, outcome: Outcome::Failure, took: None, asked: None };
            assert!(alone.guarded.breaker.record(desk, call, || at(0), || 0.0).is_some());
        }
        let open = || (0..7).filter(|key| keys.find(key).is_some()).count();
        // While it is, what is closed makes room for what is new.
        (10..12).for_each(|key| _ = keys.of(key, &rules, at(50)));
        assert_eq!((open(), keys.find(&10).is_some()), (7, false));
        (12..14).for_each(|key| _ = keys.of(key, &rules, at(61)));
        assert_eq!((open(), keys.find(&12).is_some() && keys.find(&13).is_some()), (5, true));
        keys.of(14, &rules, at(601 + 61));
        assert_eq!(open(), 0);
    }

    #[test]
    fn the_least_used_makes_room() {
        let (keys, rules) = (keys(8), Rules::new());
        (0..8).for_each(|key| _ = keys.of(key, &rules, at(key.into())));
        keys.of(0, &rules, at(8));
        keys.of(99, &rules, at(9));
        assert!(keys.find(&0).is_some() && keys.find(&1).is_none() && keys.find(&99).is_some());
    }

    #[test]
    fn what_was_told_a_mode_stays() {
        use crate::handle::Mode;
        use crate::shared::{Parts, Target};
        let (keys, shared) = (keys(8), Shared::new(Parts::default()));
        let told: Vec<_> = (0..9).map(|key| keys.of(key, &shared.parts.rules, at(0))).skip(1).collect();
        let tell = |mode| told.iter().for_each(|key| shared.set_mode_of(&Target::Alone(key.clone()), mode));
        tell(Some(Mode::ForcedOpen));
        (9..100).for_each(|key| _ = keys.of(key, &shared.parts.rules, at(u64::from(key) * 1000)));
        assert!((1..9).all(|key| keys.find(&key).is_some()) && keys.find(&99).is_some());
        assert_eq!(keys.len(), 9, "no more than one besides");
        tell(None);
        keys.of(100, &shared.parts.rules, at(200_000));
        assert_eq!(keys.len(), 1);
    }

    #[test]
    fn threads_that_race_for_a_key_get_one_breaker() {
        for _ in 0..100 {
            let (keys, rules) = (keys(8), Rules::new());
            let seen: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| keys.of(7, &rules, at(0)))).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert!(seen.iter().all(|alone| Arc::ptr_eq(alone, &seen[0])));
            assert_eq!(keys.len(), 1);
        }
    }
}
