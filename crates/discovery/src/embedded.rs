//! A registry in memory, for one process and for tests.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::StreamExt;
use portcullis_core::Instance;
use tokio::sync::watch;

use crate::registry::Pending;
use crate::{Error, Health, Membership, Registration, Registry, ServiceDefinition, Watch};

/// A registry in memory. Clones share it; it needs nothing installed and fails never.
///
/// It runs no checks: an instance is well until it [reports](Registration::report) that it is not, and gone when its
/// [`Registration`] is dropped.
#[derive(Clone, Default)]
pub struct EmbeddedRegistry(Arc<Mutex<HashMap<Arc<str>, Members>>>);

struct Members {
    all: BTreeMap<Arc<str>, Member>,
    seen: watch::Sender<Vec<Instance>>,
}

struct Member {
    number: u64,
    instance: Instance,
    warning_weight: u32,
    health: Health,
    maintenance: bool,
}

struct Held {
    registry: EmbeddedRegistry,
    service: Arc<str>,
    id: Arc<str>,
    number: u64,
}

/// Counts registrations of whatever service, so that an old handle cannot take off a newer registration of the same id.
static NUMBER: AtomicU64 = AtomicU64::new(0);

// === impl EmbeddedRegistry ===

impl EmbeddedRegistry {
    /// A registry that knows nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// What is registered for `service` and well, ordered by id.
    #[must_use]
    pub fn instances(&self, service: &str) -> Vec<Instance> {
        self.lock().get(service).map(|members| members.seen.borrow().clone()).unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Arc<str>, Members>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes one member if it is still that registration.
    fn change(&self, held: &Held, change: impl FnOnce(&mut Member)) -> Result<(), Error> {
        let mut services = self.lock();
        let members = services.get_mut(&held.service);
        let Some(members) = members else { return Err(held.gone()) };
        match members.all.get_mut(&held.id) {
            Some(member) if member.number == held.number => change(member),
            _ => return Err(held.gone()),
        }
        members.publish();
        Ok(())
    }
}

impl Registry for EmbeddedRegistry {
    fn watch(&self, service: &Arc<str>) -> Watch {
        let mut services = self.lock();
        // What nobody is registered with or watches is not worth remembering.
        services.retain(|_, members| !members.all.is_empty() || members.seen.receiver_count() > 0);
        let seen = services.entry(service.clone()).or_default().seen.subscribe();
        Watch::new(
            futures::stream::unfold((seen, true), |(mut seen, first)| async move {
                if !first && seen.changed().await.is_err() {
                    return None;
                }
                let instances = seen.borrow_and_update().clone();
                Some((Ok(instances), (seen, false)))
            })
            .fuse(),
        )
    }

    /// Registers at once. A registration with an id that is there already replaces it.
    fn register(&self, definition: ServiceDefinition) -> Pending<Registration> {
        let ServiceDefinition { service, instance, warning_weight, .. } = definition;
        let id = instance.id.clone();
        let mut services = self.lock();
        let members = services.entry(service.clone()).or_default();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let member = Member { number, instance, warning_weight, health: Health::Passing, maintenance: false };
        members.all.insert(id.clone(), member);
        members.publish();
        drop(services);
        let held = Held { registry: self.clone(), service: service.clone(), id: id.clone(), number };
        Box::pin(async move { Ok(Registration::new(service, id, held)) })
    }
}

impl fmt::Debug for EmbeddedRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let services = self.lock();
        f.debug_map().entries(services.iter().map(|(service, members)| (service, members.all.len()))).finish()
    }
}

// === impl Members ===

impl Default for Members {
    fn default() -> Self {
        Self { all: BTreeMap::new(), seen: watch::Sender::new(Vec::new()) }
    }
}

impl Members {
    fn publish(&self) {
        let well = self.all.values().filter_map(Member::seen).collect();
        self.seen.send_replace(well);
    }
}

// === impl Member ===

impl Member {
    /// The instance as others see it.
    fn seen(&self) -> Option<Instance> {
        let mut instance = self.instance.clone();
        match self.health {
            _ if self.maintenance => return None,
            Health::Critical => return None,
            Health::Warning => instance.weight = self.warning_weight,
            Health::Passing => {}
        }
        Some(instance)
    }
}

// === impl Held ===

impl Held {
    fn gone(&self) -> Error {
        Error::unavailable(format!("{} of {} is not registered any more", self.id, self.service))
    }
}

impl Membership for Held {
    fn deregister(self: Box<Self>) -> Pending<()> {
        drop(self);
        Box::pin(async { Ok(()) })
    }

    fn maintenance(&self, reason: Option<String>) -> Pending<()> {
        let result = self.registry.change(self, |member| member.maintenance = reason.is_some());
        Box::pin(async { result })
    }

    fn report(&self, health: Health, _: String) -> Pending<()> {
        let result = self.registry.change(self, |member| member.health = health);
        Box::pin(async { result })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut services = self.registry.lock();
        let Some(members) = services.get_mut(&self.service) else { return };
        if members.all.get(&self.id).is_some_and(|member| member.number == self.number) {
            members.all.remove(&self.id);
            members.publish();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;

    fn definition(id: &str) -> ServiceDefinition {
        ServiceDefinition::new("orders", id, SocketAddr::from(([127, 0, 0, 1], 80)))
    }

    fn ids(instances: &[Instance]) -> Vec<&str> {
        instances.iter().map(|instance| &*instance.id).collect()
    }

    #[tokio::test]
    async fn clones_share_and_a_watch_sees_every_change() {
        let registry = EmbeddedRegistry::new();
        let mut watch = registry.clone().watch(&"orders".into());
        assert_eq!(watch.next().await.unwrap().unwrap(), []);
        let a = registry.register(definition("a")).await.unwrap();
        let b = registry.clone().register(definition("b").weight(7).warning_weight(2)).await.unwrap();
        assert_eq!(ids(&watch.next().await.unwrap().unwrap()), ["a", "b"]);
        a.deregister().await.unwrap();
        assert_eq!(ids(&watch.next().await.unwrap().unwrap()), ["b"]);
        b.report(Health::Warning, "slow").await.unwrap();
        assert_eq!(watch.next().await.unwrap().unwrap()[0].weight, 2);
        b.maintenance(Some("upgrade")).await.unwrap();
        assert_eq!(watch.next().await.unwrap().unwrap(), []);
        b.maintenance(None).await.unwrap();
        b.report(Health::Critical, "dead").await.unwrap();
        assert_eq!(registry.instances("orders"), []);
        b.report(Health::Passing, "").await.unwrap();
        assert_eq!(registry.instances("orders")[0].weight, 7);
        drop(b);
        assert_eq!(watch.next().await.unwrap().unwrap(), []);
    }

    #[tokio::test]
    async fn an_old_handle_does_not_take_off_a_newer_registration() {
        let registry = EmbeddedRegistry::new();
        let old = registry.register(definition("a")).await.unwrap();
        let _new = registry.register(definition("a").weight(2)).await.unwrap();
        assert!(old.report(Health::Critical, "").await.is_err());
        drop(old);
        assert_eq!(registry.instances("orders").len(), 1);
    }

    #[tokio::test]
    async fn watches_of_unknown_names_leave_nothing_behind() {
        let registry = EmbeddedRegistry::new();
        for i in 0..1000 {
            drop(registry.watch(&format!("nobody-{i}").into()));
        }
        assert!(registry.lock().len() <= 1);
    }
}
