//! The endpoints of one service at one time.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::endpoint::Joining;
use crate::gate::Moves;
use crate::slots::{SlotKey, Slots};
use crate::{Address, Endpoint, Instance, Moment};

/// The endpoints of one service at one time, behind one pointer. Membership never changes; a change is another snapshot.
///
/// ```
/// use portcullis_core::{Endpoints, Instance, Moment};
///
/// let a = Instance::new("a", "10.0.0.1:80".parse::<portcullis_core::Address>().unwrap());
/// let b = Instance::new("b", "10.0.0.2:80".parse::<portcullis_core::Address>().unwrap());
/// let one = Endpoints::none("orders").reconcile([a.clone()], Moment::MIN);
/// let two = one.reconcile([b, a], Moment::MIN);
/// assert_eq!(two.len(), 2);
/// assert_eq!(two[1], one[0], "an endpoint that stays keeps its handle");
/// ```
#[derive(Clone)]
pub struct Endpoints(Arc<Snapshot>);

struct Snapshot {
    service: Arc<str>,
    version: u64,
    list: Box<[Endpoint]>,
    moves: Arc<Moves>,
    slots: Slots,
    kept: Arc<Slots>,
}

enum Place {
    There(Endpoint),
    New(Joining),
}

// === impl Endpoints ===

impl Endpoints {
    /// A service without endpoints.
    #[must_use]
    pub fn none(service: impl Into<Arc<str>>) -> Self {
        Self(Arc::new(Snapshot {
            service: service.into(),
            version: 0,
            list: Box::default(),
            moves: Arc::default(),
            slots: Slots::default(),
            kept: Arc::default(),
        }))
    }

    /// The snapshot after this one, with exactly `instances`: what is still there keeps its handle, what is gone is marked
    /// [removed](Endpoint::is_removed), what is new [joins](Endpoint::joined) `now`. When nothing differs, this very
    /// snapshot. Of several instances with one id and address, the first counts.
    #[must_use]
    pub fn reconcile(&self, instances: impl IntoIterator<Item = Instance>, now: Moment) -> Self {
        let (mut list, mut updated) = (Vec::with_capacity(self.len()), false);
        let mut instances = instances.into_iter().peekable();
        // As long as everything is where it was, nothing is looked up.
        while let Some(endpoint) = self.get(list.len())
            && let Some(instance) = instances.next_if(|instance| endpoint.is_at(instance))
        {
            updated |= endpoint.update(instance);
            list.push(endpoint.clone());
        }
        if list.len() < self.len() || instances.peek().is_some() {
            updated |= self.place(instances, &mut list, now);
        }
        if !updated && *list == **self {
            return self.clone();
        }
        Self(Arc::new(Snapshot {
            service: self.0.service.clone(),
            version: self.0.version + 1,
            list: list.into(),
            moves: self.0.moves.clone(),
            slots: Slots::default(),
            kept: self.0.kept.clone(),
        }))
    }

    /// Adds `instances` to a list that begins as this one does, and says whether one that stays says anything new.
    fn place(&self, instances: impl Iterator<Item = Instance>, list: &mut Vec<Endpoint>, now: Moment) -> bool {
        let (listed, rest) = self.split_at(list.len());
        // `None` once it is in the list.
        let mut known: HashMap<(&str, &Address), Cell<Option<&Endpoint>>> = HashMap::with_capacity(self.len());
        known.extend(listed.iter().map(|endpoint| (endpoint.key(), Cell::new(None))));
        known.extend(rest.iter().map(|endpoint| (endpoint.key(), Cell::new(Some(endpoint)))));
        let (mut joined, mut updated) = (HashSet::new(), false);
        let mut places = Vec::new();
        for instance in instances {
            match known.get(&(&*instance.id, &instance.address)).map(Cell::take) {
                Some(None) => {}
                Some(Some(endpoint)) => {
                    updated |= endpoint.update(instance);
                    places.push(Place::There(endpoint.clone()));
                }
                None => {
                    if joined.insert((instance.id.clone(), instance.address.clone())) {
                        let (service, moves) = (self.0.service.clone(), self.0.moves.clone());
                        places.push(Place::New(Joining::new(service, instance, now, moves)));
                    }
                }
            }
        }
        for endpoint in known.into_values().filter_map(Cell::into_inner) {
            endpoint.remove();
        }
        list.extend(places.into_iter().map(|place| match place {
            Place::There(endpoint) => endpoint,
            Place::New(joining) => joining.into_endpoint(),
        }));
        updated
    }

    /// The service whose endpoints these are.
    #[must_use]
    pub fn service(&self) -> &Arc<str> {
        &self.0.service
    }

    /// Counts the snapshots of this service.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.0.version
    }

    /// Counts how often a gate of this service was moved: what was derived from gates is fresh while this stands still.
    #[must_use]
    pub fn moves(&self) -> u64 {
        self.0.moves.made.load(Ordering::Acquire)
    }

    /// Counts how often a place of a rationed gate of this service came back: who found every gate refusing need not look
    /// again, before the time they said, while this and [`moves`](Self::moves) stand still.
    #[must_use]
    pub fn freed(&self) -> u64 {
        self.0.moves.freed.load(Ordering::Acquire)
    }

    /// Whether this is the same snapshot as `other`, not merely an equal one.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// What the layer with this key derived from this snapshot, derived when it is first asked for.
    pub fn slot<T: Send + Sync + 'static>(&self, key: &SlotKey<T>, derive: impl FnOnce() -> T) -> &T {
        self.0.slots.get_or_init(key, derive)
    }

    /// What the layer with this key keeps for the service from one snapshot to the next, made when it is first asked for.
    pub fn kept<T: Send + Sync + 'static>(&self, key: &SlotKey<T>, make: impl FnOnce() -> T) -> &T {
        self.0.kept.get_or_init(key, make)
    }
}

impl Deref for Endpoints {
    type Target = [Endpoint];

    fn deref(&self) -> &[Endpoint] {
        &self.0.list
    }
}

impl fmt::Debug for Endpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoints")
            .field("service", &self.0.service)
            .field("version", &self.0.version)
            .field("list", &self.0.list)
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(portcullis_loom)))]
mod tests {
    use super::*;
    use std::net::SocketAddr;

    fn instance(id: &str, port: u16) -> Instance {
        Instance::new(id, SocketAddr::from(([127, 0, 0, 1], port)))
    }

    #[test]
    fn nothing_new_is_the_same_snapshot() {
        let one = Endpoints::none("s").reconcile([instance("a", 1), instance("b", 2)], Moment::MIN);
        assert!(one.reconcile([instance("a", 1), instance("b", 2)], Moment::MAX).is(&one));
    }

    #[test]
    fn a_new_weight_keeps_the_handle() {
        let one = Endpoints::none("s").reconcile([instance("a", 1)], Moment::MIN);
        let busy = one[0].begin();
        let mut heavier = instance("a", 1);
        heavier.weight = 7;
        let two = one.reconcile([heavier], Moment::MAX);
        assert!(!two.is(&one));
        assert_eq!(two[0], one[0]);
        assert_eq!((two[0].weight(), two[0].in_flight(), two[0].joined()), (7, 1, Moment::MIN));
        drop(busy);
    }

    #[test]
    fn another_port_is_another_endpoint_and_a_returning_one_starts_anew() {
        let one = Endpoints::none("s").reconcile([instance("a", 1)], Moment::MIN);
        let moved = one.reconcile([instance("a", 2)], Moment::MIN);
        assert_ne!(moved[0], one[0]);
        assert!(one[0].is_removed() && !moved[0].is_removed());
        let back = moved.reconcile([instance("a", 1)], Moment::MIN);
        assert_ne!(back[0], one[0]);
    }

    #[test]
    fn of_two_with_one_id_and_address_the_first_counts() {
        let mut second = instance("a", 1);
        second.weight = 9;
        let one = Endpoints::none("s").reconcile([instance("a", 1), second.clone()], Moment::MIN);
        assert_eq!((one.len(), one[0].weight()), (1, 1));
        assert!(one.reconcile([instance("a", 1), second], Moment::MIN).is(&one));
    }

    proptest::proptest! {
        /// Ids and weights, in order: the first of each id counts, who was there before keeps the handle, and only a
        /// difference makes another snapshot.
        #[test]
        fn whatever_comes_after_what_the_snapshot_is_what_was_said(
            all in proptest::collection::vec(proptest::collection::vec((0_u16..9, 1_u32..3), 0..9), 1..9),
        ) {
            let mut current = Endpoints::none("s");
            for (step, said) in all.into_iter().enumerate() {
                let mut model: Vec<(u16, u32)> = Vec::new();
                for (port, weight) in &said {
                    if model.iter().all(|(known, _)| known != port) {
                        model.push((*port, *weight));
                    }
                }
                let shown = |endpoints: &Endpoints| -> Vec<_> {
                    endpoints.iter().map(|endpoint| (endpoint.address().port().unwrap(), endpoint.weight())).collect()
                };
                let before = shown(&current);
                let instances = said.iter().map(|(port, weight)| {
                    let mut instance = instance("x", *port);
                    instance.weight = *weight;
                    instance
                });
                let next = current.reconcile(instances, Moment::from_nanos(step as u64));
                proptest::prop_assert_eq!(shown(&next), &*model);
                proptest::prop_assert_eq!(next.is(&current), before == model);
                for old in current.iter() {
                    let stays = model.iter().any(|(port, _)| old.address().port() == Some(*port));
                    proptest::prop_assert_eq!((old.is_removed(), next.contains(old)), (!stays, stays));
                }
                current = next;
            }
        }
    }

    #[test]
    fn what_is_kept_for_the_service_is_there_in_the_next_snapshot() {
        let (derived, kept) = (SlotKey::<u8>::new(), SlotKey::<u8>::new());
        let one = Endpoints::none("s").reconcile([instance("a", 1)], Moment::MIN);
        assert_eq!((one.slot(&derived, || 1), one.kept(&kept, || 1)), (&1, &1));
        let two = one.reconcile([instance("a", 2)], Moment::MIN);
        assert_eq!((two.slot(&derived, || 2), two.kept(&kept, || 2)), (&2, &1));
    }

    #[test]
    fn a_moved_gate_shows_in_the_count() {
        let one = Endpoints::none("s").reconcile([instance("a", 1)], Moment::MIN);
        let before = one.moves();
        one[0].gate().close_for(crate::Mover::new());
        assert_ne!(one.moves(), before);
    }

    #[test]
    fn a_place_that_comes_back_shows_in_another_count() {
        let one = Endpoints::none("s").reconcile([instance("a", 1)], Moment::MIN);
        let ration = crate::Ration { until: Moment::MIN, places: 1, every: std::time::Duration::MAX };
        one[0].gate().ration(crate::Mover::new(), crate::Generation::FIRST, ration).unwrap();
        let permit = one[0].permit(|| Moment::MIN).unwrap();
        let before = (one.moves(), one.freed());
        assert!(one[0].permit(|| Moment::MIN).is_err());
        assert_eq!((one.moves(), one.freed()), before);
        drop(permit);
        assert_eq!((one.moves(), one.freed()), (before.0, before.1 + 1));
    }
}
