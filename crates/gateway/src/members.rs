//! The instances that operators register in the embedded registry.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::StatusCode;
use portcullis::discovery::{Registration, Registry, ServiceDefinition};
use portcullis_core::{Address, Instance, Moment, Scheme};
use serde_json::Value as Json;

use crate::config::parse_duration;
use crate::state::State;
use crate::telemetry::lock;

/// Instances that are registered at a time.
const MOST: usize = 10_000;
/// How often those are looked for that did not come again.
const LOOK: Duration = Duration::from_millis(500);
/// What is wanted.
const WANT: &str = "want {\"service\": …, \"address\": \"host:port\"}, and perhaps \"id\", \"weight\", \"zone\", \"tags\", \
                    \"metadata\", \"https\", \"ttl\": \"30s\", \"registry\"";

/// Instances, by registry, service and id.
#[derive(Default)]
pub(crate) struct Members {
    all: Mutex<BTreeMap<Name, Member>>,
    /// Held from looking whether one is there until it is: of two registrations of one instance the registry must keep the
    /// one that is kept here.
    entering: tokio::sync::Mutex<()>,
}

/// Registry, service and id.
type Name = (String, String, String);

struct Member {
    instance: Instance,
    registry: Arc<dyn Registry>,
    /// Dropped, it is registered no more.
    _registration: Registration,
    until: Option<Moment>,
}

/// Why an order is refused.
type Refusal = (StatusCode, String);

/// Does as it is told.
pub(crate) async fn order(state: &State, what: &str, order: &Json) -> Result<String, Refusal> {
    let wrong = |why: String| (StatusCode::BAD_REQUEST, why);
    let running = state.running().clone();
    let mut embedded = running.registries.embedded();
    let found = match order["registry"].as_str() {
        Some(name) => embedded.find(|(have, _)| *have == name),
        None => embedded.next().filter(|_| embedded.next().is_none()),
    };
    let Some((registry, at)) = found else {
        let why = "say in \"registry\" in which of the file's registries of the kind \"embedded\"";
        return Err((StatusCode::NOT_FOUND, String::from(why)));
    };
    let text = |key: &str| order[key].as_str().filter(|text| !text.is_empty());
    let Some(service) = text("service") else { return Err(wrong(String::from(WANT))) };
    if what == "/deregister" {
        let Some(id) = text("id") else { return Err(wrong(String::from("want {\"service\": …, \"id\": …}"))) };
        let gone = lock(&state.members.all).remove(&(registry.to_owned(), service.to_owned(), id.to_owned()));
        return match gone {
            Some(_) => Ok(String::from("deregistered")),
            None => Err((StatusCode::NOT_FOUND, format!("{service} has no instance {id:?}"))),
        };
    }
    let instance = instance(order).ok_or_else(|| wrong(String::from(WANT)))?;
    let until = match &order["ttl"] {
        Json::Null => None,
        ttl => {
            let ttl = ttl.as_str().and_then(parse_duration).filter(|ttl| !ttl.is_zero());
            Some(state.clock.now() + ttl.ok_or_else(|| wrong(String::from("\"ttl\" is a time, such as \"30s\"")))?)
        }
    };
    let name = (registry.to_owned(), service.to_owned(), instance.id.to_string());
    let said = format!("registered as {}", instance.id);
    if state.members.enter(name, at, instance, until).await? {
        state.telemetry.event("by hand", format!("{service}: {said}"));
    }
    Ok(said)
}

impl Members {
    /// Registers an instance, and says whether it was not there.
    async fn enter(
        &self,
        name: Name,
        at: &Arc<dyn Registry>,
        instance: Instance,
        until: Option<Moment>,
    ) -> Result<bool, Refusal> {
        let _one_at_a_time = self.entering.lock().await;
        {
            let mut members = lock(&self.all);
            if let Some(same) =
                members.get_mut(&name).filter(|old| old.instance == instance && Arc::ptr_eq(&old.registry, at))
            {
                same.until = until;
                return Ok(false);
            }
            if members.len() >= MOST && !members.contains_key(&name) {
                return Err((StatusCode::INSUFFICIENT_STORAGE, format!("{MOST} instances are registered")));
            }
        }
        let definition = ServiceDefinition::of(name.1.as_str(), instance.clone());
        let registration = at.register(definition).await;
        let registration = registration.map_err(|error| (StatusCode::BAD_REQUEST, error.to_string()))?;
        let member = Member { instance, registry: at.clone(), _registration: registration, until };
        lock(&self.all).insert(name, member);
        Ok(true)
    }
}

/// The instance an order describes, if it describes one.
fn instance(order: &Json) -> Option<Instance> {
    let text = |key: &str| match &order[key] {
        Json::Null => Some(None),
        value => value.as_str().filter(|text| !text.is_empty()).map(Some),
    };
    let address: Address = order["address"].as_str()?.parse().ok()?;
    let id = text("id")?.map_or_else(|| address.to_string(), str::to_owned);
    let mut instance = Instance::new(id, address);
    instance.zone = text("zone")?.map(Into::into);
    if !order["weight"].is_null() {
        instance.weight = order["weight"].as_u64().and_then(|weight| weight.try_into().ok())?;
    }
    if !order["https"].is_null() {
        instance.scheme = if order["https"].as_bool()? { Scheme::Https } else { Scheme::Http };
    }
    if !order["tags"].is_null() {
        let tags = order["tags"].as_array()?.iter().map(|tag| tag.as_str().map(Into::into));
        instance.tags = tags.collect::<Option<_>>()?;
    }
    if !order["metadata"].is_null() {
        let pairs = order["metadata"].as_object()?.iter();
        instance.metadata =
            pairs.map(|(key, value)| Some((key.as_str().into(), value.as_str()?.into()))).collect::<Option<_>>()?;
    }
    Some(instance)
}

/// Takes off those that did not come again in time, and those of registries that are gone.
pub(crate) async fn expire(state: Arc<State>) {
    loop {
        tokio::time::sleep(LOOK).await;
        let (now, running) = (state.clock.now(), state.running().clone());
        let mut members = lock(&state.members.all);
        members.retain(|(registry, service, id), member| {
            let known = running.registries.named(registry).is_some_and(|known| Arc::ptr_eq(&known, &member.registry));
            let kept = known && member.until.is_none_or(|until| now < until);
            if !kept {
                state.telemetry.event("by hand", format!("{service}: {id} did not come again"));
            }
            kept
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use portcullis::discovery::{EmbeddedRegistry, Pending, Watch};
    use tokio::sync::Notify;

    /// Registers at once, and answers who has that weight when it is let.
    #[derive(Default)]
    struct Slow(EmbeddedRegistry, Arc<[Notify; 2]>);

    impl Registry for Slow {
        fn watch(&self, service: &Arc<str>) -> Watch {
            self.0.watch(service)
        }

        fn register(&self, definition: ServiceDefinition) -> Pending<Registration> {
            let (weight, let_answer) = (definition.instance.weight as usize, self.1.clone());
            let registered = self.0.register(definition);
            Box::pin(async move {
                let_answer[weight].notified().await;
                registered.await
            })
        }
    }

    /// The later registration replaced the earlier in the registry, and was then replaced by it here.
    #[tokio::test]
    async fn who_is_registered_twice_at_once_stays_registered() {
        let (slow, members) = (Slow::default(), Arc::new(Members::default()));
        let (known, let_answer) = (slow.0.clone(), slow.1.clone());
        let registry: Arc<dyn Registry> = Arc::new(slow);
        let registering = [0, 1].map(|weight| {
            let (members, registry) = (members.clone(), registry.clone());
            tokio::spawn(async move {
                let mut instance = Instance::new("one", std::net::SocketAddr::from(([127, 0, 0, 1], 80)));
                instance.weight = weight;
                members.enter(("r".into(), "a".into(), "one".into()), &registry, instance, None).await
            })
        });
        for weight in [1, 0] {
            for _ in 0..10 {
                tokio::task::yield_now().await;
            }
            let_answer[weight].notify_one();
        }
        for one in registering {
            assert_eq!(one.await.ok(), Some(Ok(true)));
        }
        assert_eq!((known.instances("a").len(), lock(&members.all).len()), (1, 1));
    }
}
