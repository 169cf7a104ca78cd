//! One watch for each service, shared by all who ask, and the snapshots that come of it.
//!
//! Reading is two loads of pointers and a hash. A task for each service owns its watch; it ends with the last handle, when
//! nobody asks for the service any more, or when the runtime goes that it was started in (and is started anew by the next
//! request, with the endpoints it had).

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use arc_swap::ArcSwap;
use portcullis_core::{Clock, Endpoints, Instance, Moment};
use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use tokio::time::MissedTickBehavior;

use crate::backoff::Backoff;
use crate::known::{ENDED, Progress, State, UNUSED, USED};
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

/// A period no timer overflows with.
const A_YEAR: Duration = Duration::from_secs(365 * 86_400);

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

    /// Goes on with what `old` knows, as `tell` changes it; the old one follows nothing any more.
    pub(crate) fn take_over(self: &Arc<Self>, old: &Self, limits: &Limits, tell: &dyn Fn(&mut Instance)) {
        let Ok(runtime) = Handle::try_current() else { return };
        let _writing = self.lock();
        let mut table = Table::clone(&self.table.load());
        for watched in old.all() {
            let Some((known, progress)) = watched.hand_over() else { continue };
            let (name, now) = (watched.state.service.clone(), limits.clock.now());
            let told = known.iter().map(|endpoint| {
                let mut instance = (*endpoint.instance()).clone();
                tell(&mut instance);
                instance
            });
            let known = known.reconcile(told, now);
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
        let state = State::new(service, limits.clock.now());
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
