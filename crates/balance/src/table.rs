//! Tables that hashing policies look endpoints up in, built beside the requests' way.

use std::collections::HashMap;
use std::fmt;
use std::iter::successors;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwapOption;
use portcullis_core::{Carried, Endpoint, Route, SlotKey};
use xxhash_rust::xxh3::xxh3_64;

use crate::hash_key::HashKey;
use crate::pick::{Asked, Candidates, mix, score};
use crate::policy::Policy;

/// Where the endpoints of a set stand for each hash.
pub(crate) trait Table: Send + Sync + 'static {
    /// How large, and the like.
    type Settings: Clone + Send + 'static;

    /// Lays out endpoints, in the order of their hashes: every balancer that knows the same gets the same table.
    fn build(placed: &[Placed], settings: &Self::Settings) -> Self;

    /// The endpoints for `hash`, by position, the best first. It may be endless, and name one several times.
    fn walk(&self, hash: u64) -> impl Iterator<Item = u32>;
}

/// An endpoint as a table sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Placed {
    /// Its own.
    pub(crate) hash: u64,
    pub(crate) weight: u32,
    /// Where it stands among the candidates.
    pub(crate) position: u32,
}

/// The tables of one policy.
pub(crate) struct Tables<T: Table> {
    settings: T::Settings,
    current: SlotKey<Current<T>>,
    last: SlotKey<Arc<ArcSwapOption<Laid<T>>>>,
}

/// The table of one group of endpoints.
struct Current<T> {
    laid: Arc<Laid<T>>,
    /// In use until the table is built.
    before: Option<Before<T>>,
}

/// The service's table before, and where its endpoints are now.
struct Before<T> {
    laid: Arc<Laid<T>>,
    now: Box<[u32]>,
}

struct Laid<T> {
    number: u64,
    endpoints: Vec<Endpoint>,
    placed: Vec<Placed>,
    table: OnceLock<T>,
}

const THREAD: &str = "portcullis-table";
const GONE: u32 = u32::MAX;
/// How many steps of a walk are looked at before it is asked who takes at all.
const STEPS: usize = 128;

// === impl Tables ===

impl<T: Table> Tables<T> {
    pub(crate) fn new(settings: T::Settings) -> Self {
        Self { settings, current: SlotKey::new(), last: SlotKey::new() }
    }

    /// Other settings, and so other tables.
    pub(crate) fn change(&mut self, change: impl FnOnce(&mut T::Settings)) {
        change(&mut self.settings);
        (self.current, self.last) = (SlotKey::new(), SlotKey::new());
    }

    /// The first endpoint for `hash` that `takes`.
    pub(crate) fn find(&self, among: &Candidates<'_>, hash: u64, takes: impl Fn(usize) -> bool) -> Option<usize> {
        let current = self.current(among);
        let takes = |position: &usize| takes(*position);
        let found = match (current.laid.table.get(), &current.before) {
            (Some(table), _) => table.walk(hash).take(STEPS).map(|position| position as usize).find(takes),
            (None, Some(Before { laid, now })) => {
                let walk = laid.table.get()?.walk(hash).take(STEPS).map(|position| now[position as usize]);
                walk.filter(|position| *position != GONE).map(|position| position as usize).find(takes)
            }
            (None, None) => {
                let walk = successors(Some(hash), |hash| Some(mix(*hash))).take(STEPS);
                walk.map(|hash| among.sample_at(hash)).find(takes)
            }
        };
        found.or_else(|| current.laid.find(hash, takes))
    }

    /// Waits for the table.
    pub(crate) fn prepare(&self, among: &Candidates<'_>) {
        let laid = &self.current(among).laid;
        laid.finish(&self.settings, self.last(among));
    }

    fn current<'a>(&self, among: &Candidates<'a>) -> &'a Current<T> {
        among.derived(&self.current, || self.lay(among))
    }

    /// The service's newest table that is built.
    fn last<'a>(&self, among: &Candidates<'a>) -> &'a Arc<ArcSwapOption<Laid<T>>> {
        among.kept(&self.last, Arc::default)
    }

    /// A table is built in a thread. Meanwhile the service's table before serves; before the first, a key goes to whoever
    /// stands where its hash points to in the list.
    fn lay(&self, among: &Candidates<'_>) -> Current<T> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let endpoints: Vec<Endpoint> = (0..among.len()).map(|i| among[i].clone()).collect();
        let place = |(position, endpoint)| Placed {
            hash: hash_of(endpoint),
            weight: among.weight(position as usize),
            position,
        };
        let mut placed: Vec<Placed> = (0..).zip(&endpoints).map(place).collect();
        placed.sort_unstable();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let laid = Arc::new(Laid { number, endpoints, placed, table: OnceLock::new() });
        let last = self.last(among);
        let before = last.load_full().map(|before| {
            let now: HashMap<usize, u32> =
                (0..).zip(&laid.endpoints).map(|(i, endpoint)| (endpoint.handle(), i)).collect();
            let now = |endpoint: &Endpoint| now.get(&endpoint.handle()).copied().unwrap_or(GONE);
            Before { now: before.endpoints.iter().map(now).collect(), laid: before }
        });
        let started = std::thread::Builder::new().name(THREAD.into()).spawn({
            let (laid, settings, last) = (laid.clone(), self.settings.clone(), last.clone());
            move || laid.finish(&settings, &last)
        });
        if started.is_err() {
            laid.finish(&self.settings, last);
        }
        Current { laid, before }
    }
}

impl<T: Table> Laid<T> {
    /// Without the table, and looking at everybody: the one of all that `takes` which scores best.
    #[cold]
    fn find(&self, hash: u64, takes: impl Fn(&usize) -> bool) -> Option<usize> {
        let taking = self.placed.iter().filter(|one| takes(&(one.position as usize)));
        let scored = taking.map(|one| (score(mix(hash ^ one.hash), one.weight), one.position));
        scored.max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, position)| position as usize)
    }

    /// Builds the table, if nobody has, and hands it to later ones.
    fn finish(self: &Arc<Self>, settings: &T::Settings, last: &ArcSwapOption<Self>) {
        self.table.get_or_init(|| T::build(&self.placed, settings));
        last.rcu(|last| match last {
            Some(last) if last.number > self.number => Some(last.clone()),
            _ => Some(self.clone()),
        });
    }
}

impl<T: Table> Clone for Tables<T> {
    fn clone(&self) -> Self {
        Self { settings: self.settings.clone(), current: self.current.clone(), last: self.last.clone() }
    }
}

impl<T: Table> fmt::Debug for Tables<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tables").finish_non_exhaustive()
    }
}

/// An endpoint's own place: its metadata's `hash_key`, as in gRPC (A76), else its id.
pub(crate) fn hash_of(endpoint: &Endpoint) -> u64 {
    let instance = endpoint.instance();
    xxh3_64(instance.metadata.get("hash_key").map_or(instance.id.as_bytes(), String::as_bytes))
}

/// The hash of a request: by its route's key, else by `key`.
pub(crate) fn hash_by(key: &HashKey, asked: Asked<'_>) -> Option<u64> {
    let of_route = || Route::of(asked.extensions)?.policy::<Policy>()?.hash_key.as_ref();
    of_route().unwrap_or(key).hash(asked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use crate::testing::Set;
    use http::Request;
    use std::collections::HashSet;
    use std::sync::Barrier;

    /// Sends everything to the seventh, and is not built before somebody else comes to the barrier.
    struct Seventh;

    impl Table for Seventh {
        type Settings = Arc<Barrier>;

        fn build(_: &[Placed], barrier: &Arc<Barrier>) -> Self {
            assert_eq!(std::thread::current().name(), Some(THREAD), "a request must not wait for it");
            barrier.wait();
            Self
        }

        fn walk(&self, _: u64) -> impl Iterator<Item = u32> {
            std::iter::repeat(7)
        }
    }

    #[test]
    fn no_request_waits_for_the_first_table() {
        let barrier = Arc::new(Barrier::new(2));
        let tables = Tables::<Seventh>::new(barrier.clone());
        Set::of(&[1; 10]).among(&Random, &Request::default(), |among| {
            let find = |key: u64| tables.find(among, mix(key), |_| true).unwrap();
            let found: Vec<_> = (1..100).map(find).collect();
            assert_eq!(found.iter().collect::<HashSet<_>>().len(), 10);
            assert_eq!((1..100).map(find).collect::<Vec<_>>(), found, "equal keys go to the same endpoint");
            let other = tables.find(among, mix(1), |i| i != found[0]).unwrap();
            assert_ne!(other, found[0]);
            assert_eq!(tables.find(among, mix(1), |_| false), None);
            barrier.wait();
            tables.prepare(among);
            assert!((1..100).all(|key| find(key) == 7));
        });
    }

    #[test]
    fn a_table_that_is_late_does_not_replace_a_later_one() {
        struct Empty;
        impl Table for Empty {
            type Settings = ();

            fn build(_: &[Placed], (): &()) -> Self {
                Self
            }

            fn walk(&self, _: u64) -> impl Iterator<Item = u32> {
                std::iter::empty()
            }
        }
        let laid = |number| {
            Arc::new(Laid { number, endpoints: Vec::new(), placed: Vec::new(), table: OnceLock::<Empty>::new() })
        };
        let (last, [one, two, three]) = (ArcSwapOption::empty(), [1, 2, 3].map(laid));
        for (laid, newest) in [(&two, 2), (&one, 2), (&three, 3)] {
            laid.finish(&(), &last);
            assert_eq!(last.load().as_ref().unwrap().number, newest);
        }
    }
}
