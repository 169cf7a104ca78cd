//! One watch for each service, shared by all who ask, and the snapshots that come of it.
//!
//! Reading is two loads of pointers and a hash. A task for each service owns its watch; it ends with the last handle, when
//! nobody asks for the service any more, or when the runtime goes that it was started in (and is started anew by the next
//! request, with the endpoints it had).

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use portcullis_core::{Clock, Endpoints, Instance, Moment};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::MissedTickBehavior;

use crate::backoff::Backoff;
use crate::{Error, Registry};

/// The times and bounds of a layer.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub(crate) first_wait: Duration,
    pub(crate) idle: Duration,
    pub(crate) max_age: Option<Duration>,
    pub(crate) services: usize,
    pub(crate) clock: Clock,
}

pub(crate) struct Watches {
    registry: Arc<dyn Registry>,
    table: ArcSwap<Table>,
    /// Held while the table changes.
    writing: Mutex<()>,
}

/// Seeded, and small: what a caller who finds collisions can slow down is bounded by the number of services.
type Table = HashMap<Arc<str>, Arc<Watched>, foldhash::fast::RandomState>;

/// One service's watch.
pub(crate) struct Watched {
    state: Arc<State>,
    task: Mutex<Option<AbortHandle>>,
}

/// What the task writes and requests read.
struct State {
    service: Arc<str>,
    /// [`UNUSED`], [`USED`] or [`ENDED`].
    mark: AtomicU8,
    current: ArcSwapOption<Endpoints>,
    changed: Notify,
    started: Moment,
    progress: Mutex<Progress>,
}

/// A period no timer overflows with.
const A_YEAR: Duration = Duration::from_secs(365 * 86_400);

const UNUSED: u8 = 0;
const USED: u8 = 1;
const ENDED: u8 = 2;

#[derive(Clone, Debug, Default)]
struct Progress {
    answers: u64,
    failures: u64,
    /// Since when the registry has not answered, and what it says instead.
    failing: Option<(Moment, Error)>,
    /// Whether another layer goes on with the endpoints, so that nothing here may change them any more.
    handed_over: bool,
}

/// How a watched service is doing.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Status {
    /// The service.
    pub service: Arc<str>,
    /// What is known of it; `None` until the first answer.
    pub endpoints: Option<Endpoints>,
    /// How often its source has answered.
    pub answers: u64,
    /// How often its source has failed to.
    pub failures: u64,
    /// For how long its source has been failing, so that the endpoints are the last known good ones; and why.
    pub failing: Option<(Duration, Error)>,
}

/// What is known of a service that was asked for.
pub(crate) enum Lookup {
    Known(Endpoints),
    /// The first answer is outstanding.
    Waiting(Arc<Watched>),
    /// There are too many services.
    Full,
    /// There is no runtime to watch it in.
    NoRuntime,
}

/// Marks the end of a task, however it comes.
struct Ending(Arc<State>);

// === impl Watches ===

impl Watches {
    pub(crate) fn new(registry: Arc<dyn Registry>) -> Arc<Self> {
        Arc::new(Self { registry, table: ArcSwap::default(), writing: Mutex::new(()) })
    }

    pub(crate) fn registry(&self) -> &Arc<dyn Registry> {
        &self.registry
    }

    /// What is known of `service`. Follows it from now on.
    pub(crate) fn lookup(self: &Arc<Self>, service: &str, limits: &Limits) -> Lookup {
        if let Some(watched) = self.table.load().get(service)
            && watched.state.is_marked_used()
        {
            return match watched.state.current.load().as_deref() {
                Some(endpoints) => Lookup::Known(endpoints.clone()),
                None => Lookup::Waiting(watched.clone()),
            };
        }
        self.follow(Cow::Borrowed(service), limits)
    }

    #[cold]
    fn follow(self: &Arc<Self>, service: Cow<'_, str>, limits: &Limits) -> Lookup {
        let Ok(runtime) = Handle::try_current() else { return Lookup::NoRuntime };
        let _writing = self.lock();
        let table = self.table.load_full();
        if let Some(watched) = table.get(&*service) {
            // Keeps what was known when the task has ended.
            if watched.state.mark.swap(USED, Ordering::AcqRel) == ENDED {
                watched.start(self, limits, &runtime);
            }
            return match watched.state.current.load().as_deref() {
                Some(endpoints) => Lookup::Known(endpoints.clone()),
                None => Lookup::Waiting(watched.clone()),
            };
        }
        let mut table = Table::clone(&table);
        if table.len() >= limits.services {
            // The place of one that has no endpoints; its task ends with it.
            let Some(unknown) = table.values().find(|watched| watched.is_known_empty()) else { return Lookup::Full };
            let name = unknown.state.service.clone();
            table.remove(&name);
        }
        let watched = Watched::new(service.into(), limits);
        watched.start(self, limits, &runtime);
        table.insert(watched.state.service.clone(), watched.clone());
        self.table.store(Arc::new(table));
        Lookup::Waiting(watched)
    }

    /// Goes on with what `old` knows, which follows nothing any more.
    pub(crate) fn take_over(self: &Arc<Self>, old: &Self, limits: &Limits) {
        let Ok(runtime) = Handle::try_current() else { return };
        let _writing = self.lock();
        let mut table = Table::clone(&self.table.load());
        for watched in old.all() {
            let Some((known, progress)) = watched.hand_over() else { continue };
            let (name, now) = (watched.state.service.clone(), limits.clock.now());
            if let Some(begun) = table.get(&name) {
                begun.state.adopt(&known, progress, now);
                continue;
            }
            let watched = Watched::new(name.clone(), limits);
            watched.state.adopt(&known, progress, now);
            watched.start(self, limits, &runtime);
            table.insert(name, watched);
        }
        self.table.store(Arc::new(table));
    }

    /// Forgets a service that nobody asked for, unless somebody just did.
    fn forget(&self, state: &Arc<State>) -> bool {
        let _writing = self.lock();
        if state.mark.load(Ordering::Acquire) == USED {
            return false;
        }
        let mut table = Table::clone(&self.table.load());
        table.retain(|_, watched| !Arc::ptr_eq(&watched.state, state));
        self.table.store(Arc::new(table));
        true
    }

    pub(crate) fn status(&self, now: Moment) -> Vec<Status> {
        let mut all: Vec<_> = self.table.load().values().map(|watched| watched.status(now)).collect();
        all.sort_by(|a, b| a.service.cmp(&b.service));
        all
    }

    pub(crate) fn all(&self) -> Vec<Arc<Watched>> {
        self.table.load().values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Watches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watches").field("services", &self.table.load().len()).finish_non_exhaustive()
    }
}

// === impl Watched ===

impl Watched {
    fn new(service: Arc<str>, limits: &Limits) -> Arc<Self> {
        let state = State {
            service,
            mark: USED.into(),
            current: ArcSwapOption::empty(),
            changed: Notify::new(),
            started: limits.clock.now(),
            progress: Mutex::default(),
        };
        Arc::new(Self { state: Arc::new(state), task: Mutex::default() })
    }

    /// Ends the task and gives away what is known, if anything is.
    fn hand_over(&self) -> Option<(Endpoints, Progress)> {
        let known = self.state.hand_over()?;
        if let Some(task) = &*self.task.lock().unwrap_or_else(PoisonError::into_inner) {
            task.abort();
        }
        Some(known)
    }

    fn start(&self, watches: &Arc<Watches>, limits: &Limits, runtime: &Handle) {
        if self.state.progress().handed_over {
            return;
        }
        let task = run(watches.registry.clone(), Arc::downgrade(watches), Ending(self.state.clone()), limits.clone());
        let task = runtime.spawn(task).abort_handle();
        *self.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
    }

    fn is_known_empty(&self) -> bool {
        self.state.current.load().as_deref().is_some_and(|endpoints| endpoints.is_empty())
    }

    pub(crate) fn current(&self) -> Option<Endpoints> {
        self.state.current()
    }

    /// The first snapshot, if it comes before the watch is `wait` old: who asks later need not wait again.
    pub(crate) async fn first(&self, wait: Duration, clock: &Clock) -> Option<Endpoints> {
        let wait = wait.saturating_sub(clock.now().since(self.state.started));
        tokio::time::timeout(wait, self.known()).await.ok().or_else(|| self.current())
    }

    pub(crate) async fn known(&self) -> Endpoints {
        loop {
            let changed = self.state.changed.notified();
            if let Some(endpoints) = self.current() {
                return endpoints;
            }
            changed.await;
        }
    }

    fn status(&self, now: Moment) -> Status {
        let progress = self.state.progress().clone();
        Status {
            service: self.state.service.clone(),
            endpoints: self.current(),
            answers: progress.answers,
            failures: progress.failures,
            failing: progress.failing.map(|(since, error)| (now.since(since), error)),
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if let Some(task) = self.task.get_mut().unwrap_or_else(PoisonError::into_inner) {
            task.abort();
        }
        self.state.leave();
    }
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Watched").field(&self.state.service).finish()
    }
}

// === impl State ===

impl State {
    /// Marks it used, unless its task has ended.
    fn is_marked_used(&self) -> bool {
        match self.mark.load(Ordering::Relaxed) {
            USED => true,
            // `ENDED` may come in between, and must not be overwritten.
            UNUSED => self.mark.compare_exchange(UNUSED, USED, Ordering::AcqRel, Ordering::Relaxed).is_ok(),
            _ => false,
        }
    }

    fn current(&self) -> Option<Endpoints> {
        self.current.load().as_deref().cloned()
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(&self, instances: Vec<Instance>, now: Moment) {
        let recovered = {
            let mut progress = self.progress();
            progress.answers += 1;
            progress.failing.take()
        };
        if let Some((since, _)) = recovered {
            tracing::info!(service = &*self.service, after = ?now.since(since), "registry answers again");
        }
        self.replace(instances, now);
    }

    fn replace(&self, instances: Vec<Instance>, now: Moment) {
        let progress = self.progress();
        if progress.handed_over {
            return;
        }
        let before = self.current.load_full();
        let after = match before.as_deref() {
            Some(before) => {
                let after = before.reconcile(instances, now);
                if after.is(before) {
                    return;
                }
                after
            }
            None => Endpoints::none(self.service.clone()).reconcile(instances, now),
        };
        let was = before.map(|before| before.len());
        let endpoints = after.len();
        self.current.store(Some(Arc::new(after)));
        drop(progress);
        tracing::info!(service = &*self.service, endpoints, was, "endpoints changed");
        self.changed.notify_waiters();
    }

    /// Gives away what is known, once.
    fn hand_over(&self) -> Option<(Endpoints, Progress)> {
        let mut progress = self.progress();
        let known = self.current().filter(|_| !progress.handed_over)?;
        let told = progress.clone();
        progress.handed_over = true;
        Some((known, told))
    }

    /// Begins with what another layer knew. What is known here already counts, with the handles of those who stay.
    fn adopt(&self, known: &Endpoints, told: Progress, now: Moment) {
        let mut progress = self.progress();
        let after = match self.current() {
            Some(newer) => {
                let after = known.reconcile(newer.iter().map(|endpoint| (*endpoint.instance()).clone()), now);
                drop(newer.reconcile([], now));
                after
            }
            None => {
                *progress = told;
                known.clone()
            }
        };
        self.current.store(Some(Arc::new(after)));
        drop(progress);
        self.changed.notify_waiters();
    }

    /// Nobody follows the endpoints any more: breakers need not keep them, nor pools their connections.
    fn leave(&self) {
        let progress = self.progress();
        if let Some(endpoints) = self.current().filter(|_| !progress.handed_over) {
            drop(endpoints.reconcile([], Moment::MIN));
        }
    }

    fn fail(&self, error: Error, now: Moment) {
        let mut progress = self.progress();
        progress.failures += 1;
        let (failures, was_failing) = (progress.failures, progress.failing.is_some());
        let since = progress.failing.take().map_or(now, |(since, _)| since);
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        let text = error.to_string();
        progress.failing = Some((since, error));
        drop(progress);
        let kept = self.current.load().as_deref().map_or(0, |endpoints| endpoints.len());
        if was_failing {
            tracing::debug!(
                service = &*self.service,
                error = text,
                cause,
                kept,
                failures,
                "registry still does not answer"
            );
        } else {
            tracing::warn!(
                service = &*self.service,
                error = text,
                cause,
                kept,
                failures,
                "registry does not answer, endpoints are kept"
            );
        }
    }

    /// How long what is known may still be used.
    fn lifetime(&self, max_age: Option<Duration>, now: Moment) -> Option<Duration> {
        let since = self.progress().failing.as_ref()?.0;
        let known = self.current.load().as_deref().is_some_and(|endpoints| !endpoints.is_empty());
        known.then_some(max_age?.saturating_sub(now.since(since)))
    }
}

// === impl Ending ===

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.mark.store(ENDED, Ordering::Release);
    }
}

/// Follows one service: the task of its watch.
async fn run(registry: Arc<dyn Registry>, watches: Weak<Watches>, state: Ending, limits: Limits) {
    let (state, clock) = (&state.0, &limits.clock);
    let mut backoff = Backoff::new();
    let mut idle = tokio::time::interval(limits.idle.clamp(Duration::from_millis(1), A_YEAR));
    // Periods that were missed are not held against a service in use.
    idle.set_missed_tick_behavior(MissedTickBehavior::Delay);
    idle.reset();
    loop {
        let mut watch = registry.watch(&state.service);
        loop {
            let lifetime = state.lifetime(limits.max_age, clock.now());
            tokio::select! {
                answer = watch.next() => match answer {
                    Some(Ok(instances)) => {
                        backoff.reset();
                        state.accept(instances, clock.now());
                    }
                    Some(Err(error)) => state.fail(error, clock.now()),
                    None => break,
                },
                () = tokio::time::sleep(lifetime.unwrap_or_default()), if lifetime.is_some() => {
                    tracing::warn!(service = &*state.service, "what is known of the service is too old");
                    state.replace(Vec::new(), clock.now());
                }
                _ = idle.tick() => {
                    let used = state.mark.swap(UNUSED, Ordering::AcqRel) == USED;
                    let Some(watches) = watches.upgrade() else { return };
                    if !used && watches.forget(state) {
                        tracing::info!(service = &*state.service, "nobody asks for the service any more");
                        state.leave();
                        return;
                    }
                }
            }
        }
        state.fail(Error::unavailable("the watch ended"), clock.now());
        tokio::time::sleep(backoff.next(fastrand::f64())).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::net::SocketAddr;

    #[derive(Clone, Debug)]
    enum Said {
        /// Ids and weights.
        Known(Vec<(u8, u32)>),
        Failure,
    }

    /// Weight, when it joined, and its handle.
    type Modelled = (u32, u64, Option<portcullis_core::Endpoint>);

    fn said() -> impl Strategy<Value = Said> {
        let known = proptest::collection::vec((0_u8..6, 1_u32..3), 0..6);
        prop_oneof![3 => known.prop_map(Said::Known), 1 => Just(Said::Failure)]
    }

    proptest! {
        /// What is known is what was last said, of one id the first; who stayed in between keeps handle and joining time.
        #[test]
        fn any_sequence_of_answers_and_failures_leaves_what_a_model_has(history in proptest::collection::vec(said(), 0..30)) {
            let state = State {
                service: "s".into(),
                mark: USED.into(),
                current: ArcSwapOption::empty(),
                changed: Notify::new(),
                started: Moment::MIN,
                progress: Mutex::default(),
            };
            let mut model: Option<BTreeMap<u8, Modelled>> = None;
            let mut failures = 0;
            for (step, said) in history.into_iter().enumerate() {
                let step = step as u64;
                let now = Moment::from_nanos(step);
                match said {
                    Said::Failure => {
                        failures += 1;
                        state.fail(Error::unavailable("down"), now);
                        prop_assert!(state.progress().failing.is_some());
                    }
                    Said::Known(all) => {
                        let mut next = BTreeMap::new();
                        for (id, weight) in &all {
                            let old = model.as_ref().and_then(|model| model.get(id));
                            let (joined, handle) = old.map_or((step, None), |(_, joined, handle)| (*joined, handle.clone()));
                            next.entry(*id).or_insert((*weight, joined, handle));
                        }
                        let instances = all.into_iter().map(|(id, weight)| {
                            let mut instance = Instance::new(id.to_string(), SocketAddr::from(([127, 0, 0, 1], 80)));
                            instance.weight = weight;
                            instance
                        });
                        let before = state.current();
                        state.accept(instances.collect(), now);
                        for gone in before.iter().flat_map(|before| before.iter()) {
                            let stays = next.contains_key(&gone.id().parse::<u8>().unwrap());
                            prop_assert_eq!(gone.is_removed(), !stays);
                        }
                        for endpoint in state.current().unwrap().iter() {
                            let entry = next.get_mut(&endpoint.id().parse::<u8>().unwrap()).unwrap();
                            prop_assert!(entry.2.as_ref().is_none_or(|handle| handle == endpoint));
                            entry.2 = Some(endpoint.clone());
                        }
                        model = Some(next);
                        prop_assert!(state.progress().failing.is_none());
                    }
                }
                let known = state.current().map(|endpoints| {
                    endpoints
                        .iter()
                        .map(|e| (e.id().parse::<u8>().unwrap(), e.weight(), e.joined().as_nanos()))
                        .collect::<std::collections::BTreeSet<_>>()
                });
                let modelled = model.as_ref().map(|model| model.iter().map(|(id, (weight, joined, _))| (*id, *weight, *joined)).collect());
                prop_assert_eq!(known, modelled);
                prop_assert_eq!(state.progress().failures, failures);
            }
        }
    }
}
