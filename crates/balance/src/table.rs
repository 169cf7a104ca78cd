//! Tables that hashing policies look endpoints up in, built beside the requests' way.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::iter::successors;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use arc_swap::ArcSwapOption;
use portcullis_core::{Endpoint, SlotKey, WeakEndpoint};
use xxhash_rust::xxh3::xxh3_64;

use crate::hash_key::HashKey;
use crate::pick::{Asked, Candidates, mix, score};
use crate::shape::Subset;

/// Where the endpoints of a set stand for each hash.
pub(crate) trait Table: Send + Sync + 'static {
    /// How large, and the like.
    type Settings: Clone + Send + Sync + 'static;

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
    current: SlotKey<Laid<T>>,
    shelf: Arc<Shelf<T>>,
}

/// What all the tables of a policy share, and go with.
struct Shelf<T: Table> {
    settings: T::Settings,
    work: Mutex<Work<T>>,
}

struct Work<T> {
    /// The newest table of each kind.
    built: HashMap<Kind, Arc<Layout<T>>>,
    /// To be built, if the endpoints are still picked from when it is their turn.
    wanted: VecDeque<Weak<Layout<T>>>,
    /// There is a thread that builds what is wanted.
    building: bool,
}

/// Groups of endpoints that follow each other.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Kind {
    service: Arc<str>,
    subset: Option<Subset>,
    priority: u32,
}

/// What a group of endpoints has of it.
struct Laid<T> {
    layout: Arc<Layout<T>>,
    /// Somebody has asked for the table.
    is_wanted: AtomicBool,
}

/// The table of one group of endpoints.
struct Layout<T> {
    number: u64,
    kind: Kind,
    endpoints: Box<[WeakEndpoint]>,
    placed: Box<[Placed]>,
    table: OnceLock<T>,
    /// In use until the table is built.
    before: ArcSwapOption<Before<T>>,
}

/// The table that the group before had, and where its endpoints are now.
struct Before<T> {
    layout: Arc<Layout<T>>,
    now: Box<[u32]>,
}

const THREAD: &str = "portcullis-table";
const GONE: u32 = u32::MAX;
/// How many steps of a walk are looked at before it is asked who takes at all.
const STEPS: usize = 128;

// === impl Tables ===

impl<T: Table> Tables<T> {
    pub(crate) fn new(settings: T::Settings) -> Self {
        let work = Work { built: HashMap::new(), wanted: VecDeque::new(), building: false };
        Self { current: SlotKey::new(), shelf: Arc::new(Shelf { settings, work: Mutex::new(work) }) }
    }

    /// Other settings, and so other tables.
    pub(crate) fn change(&mut self, change: impl FnOnce(&mut T::Settings)) {
        let mut settings = self.shelf.settings.clone();
        change(&mut settings);
        *self = Self::new(settings);
    }

    /// The first endpoint for `hash` that `takes`.
    pub(crate) fn find(&self, among: &Candidates<'_>, hash: u64, takes: impl Fn(usize) -> bool) -> Option<usize> {
        let laid = self.laid(among);
        let takes = |position: &usize| takes(*position);
        let Some(table) = laid.layout.table.get() else {
            let found = self.find_meanwhile(laid, among, hash, takes);
            return found.or_else(|| laid.layout.find(hash, takes));
        };
        for position in table.walk(hash).take(STEPS) {
            if takes(&(position as usize)) {
                return Some(position as usize);
            }
        }
        laid.layout.find(hash, takes)
    }

    /// A table is built in a thread. Meanwhile that of the group before serves; before the first, a key goes to whoever
    /// stands where its hash points to in the list.
    #[cold]
    fn find_meanwhile(
        &self,
        laid: &Laid<T>,
        among: &Candidates<'_>,
        hash: u64,
        takes: impl Fn(&usize) -> bool,
    ) -> Option<usize> {
        if !laid.is_wanted.swap(true, Ordering::Relaxed) {
            self.shelf.want(&laid.layout);
        }
        // Before it is looked whether the table is there by now, which takes its place.
        let before = laid.layout.before.load();
        match (laid.layout.table.get(), &*before) {
            (Some(table), _) => table.walk(hash).take(STEPS).map(|position| position as usize).find(takes),
            (None, Some(before)) => {
                let walk = before.layout.table.get()?.walk(hash).take(STEPS);
                let walk = walk.map(|position| before.now[position as usize]).filter(|position| *position != GONE);
                walk.map(|position| position as usize).find(takes)
            }
            (None, None) => {
                let walk = successors(Some(hash), |hash| Some(mix(*hash))).take(STEPS);
                walk.map(|hash| among.sample_at(hash)).find(takes)
            }
        }
    }

    /// Waits for the table.
    pub(crate) fn prepare(&self, among: &Candidates<'_>) {
        self.shelf.build(&self.laid(among).layout);
    }

    fn laid<'a>(&self, among: &Candidates<'a>) -> &'a Laid<T> {
        among.derived(&self.current, || Laid { layout: Arc::new(self.shelf.lay(among)), is_wanted: false.into() })
    }
}

// === impl Shelf ===

impl<T: Table> Shelf<T> {
    fn lay(&self, among: &Candidates<'_>) -> Layout<T> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let all = || (0..).zip((0..among.len()).map(|i| &among[i]));
        let place = |(position, endpoint)| Placed {
            hash: hash_of(endpoint),
            weight: among.weight(position as usize),
            position,
        };
        let mut placed: Box<[Placed]> = all().map(place).collect();
        placed.sort_unstable();
        let kind = Kind {
            service: among[0].service().clone(),
            subset: among.subset().cloned(),
            // All of a group have the same.
            priority: among[0].instance().priority,
        };
        let before = self.work().built.get(&kind).cloned();
        let before = before.and_then(|layout| {
            let now: HashMap<usize, u32> = all().map(|(i, endpoint)| (endpoint.handle(), i)).collect();
            let now = |endpoint: &WeakEndpoint| now.get(&endpoint.upgrade()?.handle()).copied();
            let now: Box<[u32]> = layout.endpoints.iter().map(|endpoint| now(endpoint).unwrap_or(GONE)).collect();
            // Where nobody has stayed there is nothing to find.
            now.iter().any(|now| *now != GONE).then(|| Arc::new(Before { layout, now }))
        });
        Layout {
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            kind,
            endpoints: all().map(|(_, endpoint)| endpoint.downgrade()).collect(),
            placed,
            table: OnceLock::new(),
            before: ArcSwapOption::new(before),
        }
    }

    /// Has the table built, by a thread that builds one after the other.
    fn want(self: &Arc<Self>, layout: &Arc<Layout<T>>) {
        {
            let work = &mut *self.work();
            work.wanted.retain(|wanted| wanted.strong_count() > 0);
            work.wanted.push_back(Arc::downgrade(layout));
            if std::mem::replace(&mut work.building, true) {
                return;
            }
        }
        let shelf = Arc::downgrade(self);
        let started = std::thread::Builder::new()
            .name(THREAD.into())
            .spawn(move || while shelf.upgrade().is_some_and(|shelf| shelf.build_next()) {});
        if started.is_err() {
            while self.build_next() {}
        }
    }

    /// Builds what is wanted next, if anything is. What cannot be built keeps nothing else from it.
    fn build_next(&self) -> bool {
        let Some(layout) = self.next() else { return false };
        if catch_unwind(AssertUnwindSafe(|| self.build(&layout))).is_err() {
            tracing::error!(service = &*layout.kind.service, "a table could not be built, requests do without");
        }
        true
    }

    fn next(&self) -> Option<Arc<Layout<T>>> {
        let work = &mut *self.work();
        let next = std::iter::from_fn(|| work.wanted.pop_front()).find_map(|wanted| wanted.upgrade());
        work.building = next.is_some();
        next
    }

    /// Builds the table, if nobody has, and keeps it for the next of its kind.
    fn build(&self, layout: &Arc<Layout<T>>) {
        layout.table.get_or_init(|| T::build(&layout.placed, &self.settings));
        layout.before.store(None);
        let built = &mut self.work().built;
        built.retain(|_, layout| layout.is_alive());
        let newest = built.entry(layout.kind.clone()).or_insert_with(|| layout.clone());
        if newest.number < layout.number {
            *newest = layout.clone();
        }
    }

    fn work(&self) -> MutexGuard<'_, Work<T>> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Layout ===

impl<T> Layout<T> {
    /// Without the table, and looking at everybody: the one of all that `takes` which scores best.
    #[cold]
    fn find(&self, hash: u64, takes: impl Fn(&usize) -> bool) -> Option<usize> {
        let taking = self.placed.iter().filter(|one| takes(&(one.position as usize)));
        let scored = taking.map(|one| (score(mix(hash ^ one.hash), one.weight), one.position));
        scored.max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, position)| position as usize)
    }

    /// Whether any of its endpoints is still there.
    fn is_alive(&self) -> bool {
        self.endpoints.iter().any(|endpoint| endpoint.upgrade().is_some_and(|endpoint| !endpoint.is_removed()))
    }
}

impl<T: Table> Clone for Tables<T> {
    fn clone(&self) -> Self {
        Self { current: self.current.clone(), shelf: self.shelf.clone() }
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

/// The hash of a request: by the key of its [`Policy`](crate::Policy), else by `key`.
pub(crate) fn hash_by(key: &HashKey, asked: Asked<'_>) -> Option<u64> {
    asked.hash_key.unwrap_or(key).hash(asked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Set;
    use http::Request;
    use std::collections::HashSet;
    use std::sync::{Barrier, mpsc};
    use std::time::Duration;

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
        Set::of(&[1; 10]).among(&Request::default(), |among| {
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

    /// Is not built before its turn in the line of those who wait for it.
    struct InTurn(usize);

    impl Table for InTurn {
        type Settings = Arc<(Barrier, Mutex<Vec<usize>>)>;

        fn build(placed: &[Placed], turns: &Self::Settings) -> Self {
            turns.1.lock().unwrap().push(placed.len());
            turns.0.wait();
            Self(placed.len())
        }

        fn walk(&self, _: u64) -> impl Iterator<Item = u32> {
            std::iter::repeat(self.0 as u32 - 1)
        }
    }

    #[test]
    fn each_table_is_built_once_one_after_the_other_and_none_that_nobody_wants_any_more() {
        let turns = Arc::new((Barrier::new(2), Mutex::default()));
        let tables = Tables::<InTurn>::new(turns.clone());
        let sets = [3, 4, 5].map(|n| Set::of(&vec![1; n]));
        let request = Request::default();
        for set in &sets {
            let find = || set.among(&request, |among| tables.find(among, 1, |_| true).unwrap());
            std::thread::scope(|scope| (0..8).for_each(|_| drop(scope.spawn(find))));
        }
        let [first, second, third] = sets;
        // The first is being built, or will be.
        while turns.1.lock().unwrap().is_empty() {
            std::thread::yield_now();
        }
        drop(second);
        turns.0.wait();
        turns.0.wait();
        third.among(&request, |among| tables.prepare(among));
        assert_eq!(*turns.1.lock().unwrap(), [3, 5]);
        assert_eq!(first.among(&request, |among| tables.find(among, 1, |_| true)), Some(2));
    }

    /// Fails for three, and says for how many it is asked.
    struct NoneForThree;

    impl Table for NoneForThree {
        type Settings = mpsc::Sender<usize>;

        fn build(placed: &[Placed], asked: &Self::Settings) -> Self {
            asked.send(placed.len()).unwrap();
            assert_ne!(placed.len(), 3);
            Self
        }

        fn walk(&self, _: u64) -> impl Iterator<Item = u32> {
            std::iter::repeat(0)
        }
    }

    #[test]
    fn a_table_that_cannot_be_built_keeps_no_other_from_being_built() {
        let (asking, asked) = mpsc::channel();
        let tables = Tables::<NoneForThree>::new(asking);
        let sets = [3, 4].map(|n| Set::of(&vec![1; n]));
        for set in &sets {
            let found = set.among(&Request::default(), |among| tables.find(among, 1, |_| true));
            assert!(found.is_some());
            assert_eq!(asked.recv_timeout(Duration::from_secs(10)), Ok(set.endpoints.len()));
        }
    }

    #[test]
    fn each_kind_keeps_its_newest_table_while_an_endpoint_of_it_is_there() {
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
        let (set, other) = (Set::of(&[1; 2]), Set::of(&[1; 2]));
        let tables = Tables::<Empty>::new(());
        let layout = |set: &Set, priority| {
            let mut layout = set.among(&Request::default(), |among| tables.shelf.lay(among));
            layout.kind.priority = priority;
            Arc::new(layout)
        };
        let (one, two, three) = (layout(&set, 0), layout(&set, 0), layout(&set, 0));
        let kept = |priority| {
            let work = tables.shelf.work();
            work.built.iter().find(|(kind, _)| kind.priority == priority).map(|(_, layout)| layout.number)
        };
        for (built, newest) in [(&two, &two), (&one, &two), (&three, &three)] {
            tables.shelf.build(built);
            assert_eq!(kept(0), Some(newest.number), "one that is late does not replace a later one");
        }
        tables.shelf.build(&layout(&other, 1));
        assert!(kept(0).is_some() && kept(1).is_some());
        drop(set.endpoints.reconcile([], portcullis_core::Moment::MIN));
        tables.shelf.build(&layout(&other, 1));
        assert!(kept(0).is_none() && kept(1).is_some());
    }
}
