//! Tables that hashing policies look endpoints up in, built beside the requests' way.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwapOption;
use portcullis_core::{Carried, Endpoint, Route, SlotKey};
use xxhash_rust::xxh3::xxh3_64;

use crate::hash_key::HashKey;
use crate::pick::{Asked, Candidates};
use crate::policy::Policy;

/// Where the endpoints of a set stand for each hash.
pub(crate) trait Table: Send + Sync + 'static {
    /// How large, and the like.
    type Settings: Clone + Send + 'static;

    /// Lays out endpoints, given as their own hashes and weights.
    fn build(endpoints: &[(u64, u32)], settings: &Self::Settings) -> Self;

    /// The endpoints for `hash`, by position, the best first. It may be endless, and name one several times.
    fn walk(&self, hash: u64) -> impl Iterator<Item = u32>;
}

/// The tables of one policy.
pub(crate) struct Tables<T: Table> {
    settings: T::Settings,
    current: SlotKey<Current<T>>,
    last: SlotKey<ArcSwapOption<Laid<T>>>,
}

/// The table of one group of endpoints.
struct Current<T> {
    table: Arc<OnceLock<T>>,
    /// In use until the table is built.
    before: Option<Before<T>>,
}

/// The service's table before, and where its endpoints are now.
struct Before<T> {
    laid: Arc<Laid<T>>,
    now: Box<[u32]>,
}

struct Laid<T> {
    endpoints: Vec<Endpoint>,
    table: Arc<OnceLock<T>>,
}

const GONE: u32 = u32::MAX;
/// How many steps of a walk are looked at before any endpoint will do.
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
        let current = among.derived(&self.current, || self.lay(among));
        let takes = |position: &usize| takes(*position);
        let steps = STEPS.min(among.len() * 8);
        match (current.table.get(), &current.before) {
            (Some(table), _) => table.walk(hash).take(steps).map(|position| position as usize).find(takes),
            (None, Some(Before { laid, now })) => {
                let walk = laid.table.get()?.walk(hash).take(steps).map(|position| now[position as usize]);
                walk.filter(|position| *position != GONE).map(|position| position as usize).find(takes)
            }
            (None, None) => None,
        }
    }

    /// The first table of a service is built by the request that needs it; later ones in a thread, while the one before
    /// serves.
    fn lay(&self, among: &Candidates<'_>) -> Current<T> {
        let endpoints: Vec<Endpoint> = (0..among.len()).map(|i| among[i].clone()).collect();
        let hashes: Vec<(u64, u32)> =
            endpoints.iter().enumerate().map(|(i, endpoint)| (hash_of(endpoint), among.weight(i))).collect();
        let table = Arc::new(OnceLock::new());
        let laid = Arc::new(Laid { endpoints, table: table.clone() });
        let last = among.kept(&self.last, ArcSwapOption::empty);
        let before = last.load_full().filter(|before| before.table.get().is_some());
        let build = {
            let (table, settings) = (table.clone(), self.settings.clone());
            move || drop(table.set(T::build(&hashes, &settings)))
        };
        let Some(before) = before else {
            build();
            last.store(Some(laid));
            return Current { table, before: None };
        };
        let now: HashMap<usize, u32> = (0..).zip(&laid.endpoints).map(|(i, endpoint)| (endpoint.handle(), i)).collect();
        let now =
            before.endpoints.iter().map(|endpoint| now.get(&endpoint.handle()).copied().unwrap_or(GONE)).collect();
        let started = std::thread::Builder::new().name("portcullis-table".into()).spawn({
            let build = build.clone();
            move || build()
        });
        if started.is_err() {
            build();
        }
        last.store(Some(laid));
        Current { table, before: Some(Before { laid: before, now }) }
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
