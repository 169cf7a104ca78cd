//! What is known of one service: what its watch writes and requests read.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use portcullis_core::{Endpoints, Instance, Moment};
use tokio::sync::Notify;

use crate::Error;

/// What the task writes and requests read.
pub(crate) struct State {
    pub(crate) service: Arc<str>,
    /// [`UNUSED`], [`USED`] or [`ENDED`].
    pub(crate) mark: AtomicU8,
    pub(crate) current: ArcSwapOption<Endpoints>,
    pub(crate) changed: Notify,
    pub(crate) started: Moment,
    progress: Mutex<Progress>,
}

/// Nobody has asked for the service since it was last looked.
pub(crate) const UNUSED: u8 = 0;
/// Somebody has.
pub(crate) const USED: u8 = 1;
/// Its task has ended.
pub(crate) const ENDED: u8 = 2;

/// How its source does.
#[derive(Clone, Debug, Default)]
pub(crate) struct Progress {
    pub(crate) answers: u64,
    pub(crate) failures: u64,
    /// Since when the registry has not answered, and what it says instead.
    pub(crate) failing: Option<(Moment, Error)>,
    /// Whether another layer goes on with the endpoints, so that nothing here may change them any more.
    pub(crate) handed_over: bool,
}

// === impl State ===

impl State {
    pub(crate) fn new(service: Arc<str>, now: Moment) -> Self {
        Self {
            service,
            mark: USED.into(),
            current: ArcSwapOption::empty(),
            changed: Notify::new(),
            started: now,
            progress: Mutex::default(),
        }
    }

    /// Marks it used, unless its task has ended.
    pub(crate) fn is_marked_used(&self) -> bool {
        match self.mark.load(Ordering::Relaxed) {
            USED => true,
            // `ENDED` may come in between, and must not be overwritten.
            UNUSED => self.mark.compare_exchange(UNUSED, USED, Ordering::AcqRel, Ordering::Relaxed).is_ok(),
            _ => false,
        }
    }

    pub(crate) fn current(&self) -> Option<Endpoints> {
        self.current.load().as_deref().cloned()
    }

    pub(crate) fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn accept(&self, instances: Vec<Instance>, now: Moment) {
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

    pub(crate) fn replace(&self, instances: Vec<Instance>, now: Moment) {
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
    pub(crate) fn hand_over(&self) -> Option<(Endpoints, Progress)> {
        let mut progress = self.progress();
        let known = self.current().filter(|_| !progress.handed_over)?;
        let told = progress.clone();
        progress.handed_over = true;
        Some((known, told))
    }

    /// Begins with what another layer knew. What is known here already counts, with the handles of those who stay.
    pub(crate) fn adopt(&self, known: &Endpoints, told: Progress, now: Moment) {
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
    pub(crate) fn leave(&self) {
        let progress = self.progress();
        if let Some(endpoints) = self.current().filter(|_| !progress.handed_over) {
            drop(endpoints.reconcile([], Moment::MIN));
        }
    }

    pub(crate) fn fail(&self, error: Error, now: Moment) {
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
    pub(crate) fn lifetime(&self, max_age: Option<Duration>, now: Moment) -> Option<Duration> {
        let since = self.progress().failing.as_ref()?.0;
        let known = self.current.load().as_deref().is_some_and(|endpoints| !endpoints.is_empty());
        known.then_some(max_age?.saturating_sub(now.since(since)))
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
            let state = State::new("s".into(), Moment::MIN);
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
