//! Looks at the services and at what was counted every second, and notes what an operator would want to have seen.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::build::Running;
use crate::state::State;

/// How often is looked.
const LOOK: Duration = Duration::from_secs(1);
/// So many endpoints of a service are named at a time; more are counted.
const NAMED: usize = 3;

/// The services as they were seen, by name.
type Seen = BTreeMap<String, Service>;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Service {
    /// Why the registry cannot tell, if it cannot.
    failing: Option<String>,
    /// What is bad about each endpoint, if something is, by id.
    endpoints: BTreeMap<Arc<str>, Option<String>>,
}

/// Goes on until the process ends.
pub(crate) async fn watch(state: Arc<State>) {
    let mut before = Seen::new();
    loop {
        let now = see(&state.running());
        compare(&before, &now, |kind, text| state.telemetry.event(kind, text));
        before = now;
        state.telemetry.remember();
        tokio::time::sleep(LOOK).await;
    }
}

fn see(running: &Running) -> Seen {
    let one = |service: &crate::build::Service| {
        let Some(status) = service.status() else { return Service::default() };
        let health = |endpoint| service.health(endpoint);
        let sick = |endpoint| health(endpoint).filter(|health| !health.is_well);
        let endpoints = status.endpoints.iter().flat_map(|endpoints| endpoints.iter());
        Service {
            failing: status.failing.as_ref().map(|(_, error)| error.to_string()),
            endpoints: endpoints
                .map(|one| (one.id().clone(), sick(one).map(|health| health.problem.unwrap_or_default())))
                .collect(),
        }
    };
    running.services.iter().map(|(name, service)| (name.clone(), one(service))).collect()
}

/// Tells of everything that is otherwise now.
fn compare(before: &Seen, now: &Seen, mut tell: impl FnMut(&'static str, String)) {
    let nothing = Service::default();
    for (name, now) in now {
        let before = before.get(name).unwrap_or(&nothing);
        match (&before.failing, &now.failing) {
            (None, Some(why)) => tell("registry", format!("{name}: it does not answer: {why}")),
            (Some(_), None) => tell("registry", format!("{name}: it answers again")),
            _ => {}
        }
        let came: Vec<_> = now.endpoints.keys().filter(|id| !before.endpoints.contains_key(*id)).collect();
        let went: Vec<_> = before.endpoints.keys().filter(|id| !now.endpoints.contains_key(*id)).collect();
        for (ids, word) in [(came, "came"), (went, "went")] {
            if !ids.is_empty() {
                tell("endpoints", format!("{name}: {} {word}", listed(&ids)));
            }
        }
        for (id, problem) in &now.endpoints {
            match (before.endpoints.get(id).and_then(Option::as_ref), problem) {
                (None, Some(problem)) => tell("health", format!("{name} {id}: sick, {problem}")),
                (Some(_), None) => tell("health", format!("{name} {id}: well again")),
                _ => {}
            }
        }
    }
}

/// A few by name, many as a number.
fn listed(ids: &[&Arc<str>]) -> String {
    match ids.len() {
        many if many > NAMED => many.to_string(),
        _ => ids.iter().map(|id| &***id).collect::<Vec<_>>().join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(failing: Option<&str>, endpoints: &[(&str, Option<&str>)]) -> Seen {
        let endpoints = endpoints.iter().map(|(id, problem)| (Arc::from(*id), problem.map(str::to_owned))).collect();
        Seen::from([(String::from("s"), Service { failing: failing.map(str::to_owned), endpoints })])
    }

    fn told(before: &Seen, now: &Seen) -> Vec<String> {
        let mut told = Vec::new();
        compare(before, now, |kind, text| told.push(format!("{kind} {text}")));
        told
    }

    #[test]
    fn what_changed_is_told_once() {
        let one = seen(None, &[("a", None), ("b", None)]);
        assert_eq!(told(&Seen::new(), &one), ["endpoints s: a, b came"]);
        assert_eq!(told(&one, &one), [""; 0]);
        let two = seen(Some("gone"), &[("a", Some("it answered 503")), ("c", None)]);
        let all = [
            "registry s: it does not answer: gone",
            "endpoints s: c came",
            "endpoints s: b went",
            "health s a: sick, it answered 503",
        ];
        assert_eq!(told(&one, &two), all);
        assert_eq!(
            told(&two, &seen(None, &[("a", None), ("c", None)])),
            ["registry s: it answers again", "health s a: well again"]
        );
        let many = seen(None, &[("a", None), ("b", None), ("c", None), ("d", None)]);
        assert_eq!(told(&Seen::new(), &many), ["endpoints s: 4 came"]);
        assert_eq!(told(&many, &Seen::new()), [""; 0], "what the file has no more is its own event");
    }
}
