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
pub(crate) struct Members(Mutex<BTreeMap<Name, Member>>);

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
        let gone = lock(&state.members.0).remove(&(registry.to_owned(), service.to_owned(), id.to_owned()));
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
    {
        let mut members = lock(&state.members.0);
        if let Some(same) =
            members.get_mut(&name).filter(|old| old.instance == instance && Arc::ptr_eq(&old.registry, at))
        {
            same.until = until;
            return Ok(said);
        }
        if members.len() >= MOST && !members.contains_key(&name) {
            return Err((StatusCode::INSUFFICIENT_STORAGE, format!("{MOST} instances are registered")));
        }
    }
    let definition = ServiceDefinition::of(service, instance.clone());
    let registration = at.register(definition).await.map_err(|error| wrong(error.to_string()))?;
    let member = Member { instance, registry: at.clone(), _registration: registration, until };
    lock(&state.members.0).insert(name, member);
    state.telemetry.event("by hand", format!("{service}: {said}"));
    Ok(said)
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
        let mut members = lock(&state.members.0);
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
