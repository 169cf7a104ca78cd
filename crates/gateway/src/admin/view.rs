//! What there is to see, as JSON: for the page, and for whoever asks.

use std::sync::atomic::Ordering;

use portcullis::circuit_break::{Mode, State as Breaker};
use portcullis_core::Endpoint;
use serde_json::{Value as Json, json};

use crate::build::Service;
use crate::state::State;
use crate::telemetry::{Answered, BOUNDS, Times};

/// Everything the page shows.
pub(super) fn state(state: &State) -> Json {
    let running = state.running();
    let telemetry = &state.telemetry;
    let readings = telemetry.readings();
    let route = |name: &str| {
        let mut sum = Times::default();
        let (mut errors, mut refused, mut up, mut down) = (0, 0, 0, 0);
        for (labels, reading) in readings.iter().filter(|(labels, _)| &*labels.route == name) {
            sum.add(&reading.times);
            (up, down) = (up + reading.up, down + reading.down);
            errors += if labels.is_failure() { reading.times.count() } else { 0 };
            refused += if labels.refused.0.is_empty() { 0 } else { reading.times.count() };
        }
        json!({
            "requests": sum.count(), "errors": errors, "refused": refused, "seconds": sum.seconds, "buckets": sum.buckets,
            "bytes_up": up, "bytes_down": down,
        })
    };
    let mut routes: Vec<Json> = Vec::new();
    for one in &running.config.routes {
        let name = one.label();
        // Routes of one name are counted as one.
        if routes.iter().any(|have| have["name"] == *name) {
            continue;
        }
        let mut shown = route(&name);
        shown["name"] = json!(name);
        shown["hosts"] = one.hosts.iter().map(|host| host.as_str()).collect();
        shown["methods"] = one.methods.iter().map(http::Method::as_str).collect();
        shown["to"] = one.to.iter().map(|to| json!({ "service": *to.0.service, "weight": to.0.weight })).collect();
        shown["does"] = json!(if one.redirect.is_some() {
            "redirect"
        } else if one.respond.is_some() {
            "respond"
        } else {
            "send"
        });
        routes.push(shown);
    }
    let refusals: Vec<Json> = readings
        .iter()
        .filter(|(labels, _)| !labels.refused.0.is_empty())
        .map(|(labels, reading)| {
            json!({ "route": *labels.route, "layer": labels.refused.0, "reason": labels.refused.1, "count": reading.times.count() })
        })
        .collect();
    let stats = running.limiter.handle.stats();
    let events: Vec<Json> = telemetry
        .events()
        .iter()
        .map(|event| json!({ "at": event.at.as_millis() as u64, "kind": event.kind, "text": event.text }))
        .collect();
    let history = telemetry.history();
    let now = history.last().map_or_else(Default::default, |last| last.at);
    let history: Vec<Json> = history
        .iter()
        .map(|then| json!([now.saturating_sub(then.at).as_secs_f64(), then.requests, then.errors, then.refused]))
        .collect();
    let mut unmatched = route("");
    unmatched["name"] = json!("");
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_seconds": state.clock.now().since(state.started).as_secs(),
        "ready": state.not_ready().is_none(),
        "not_ready": state.not_ready(),
        "draining": state.is_stopping(),
        "file": state.file().map(|file| file.display().to_string()),
        "writable": running.config.admin.writable,
        "log_level": crate::log::level(),
        "active": telemetry.active.load(Ordering::Relaxed),
        "bounds": BOUNDS,
        "routes": routes,
        "unmatched": unmatched,
        "services": services(state),
        "refusals": refusals,
        "limits": {
            "admitted": stats.admitted, "refused": stats.refused, "callers": stats.live, "places": stats.places,
            "rates": running.config.limits.iter().map(|(name, limit)| (name.clone(), limit.masked_rate())).collect::<serde_json::Map<_, _>>(),
        },
        "events": events,
        // How long ago, and the requests, errors and refusals until then.
        "history": history,
    })
}

/// All services with their endpoints.
pub(super) fn services(state: &State) -> Json {
    Json::Object(state.running().services.iter().map(|(name, one)| (name.clone(), service(name, one, state))).collect())
}

fn service(name: &str, service: &Service, state: &State) -> Json {
    let moved = state.telemetry.moved(&service.name.as_str().into());
    let mut changes = [0, 0, 0];
    for ((of, to, reason), count) in state.telemetry.breaker_changes() {
        if *of == *name {
            let opened = u64::from(to == "open") * count;
            changes[0] += count;
            changes[1] += opened;
            changes[2] += if reason == "outlier" { opened } else { 0 };
        }
    }
    let [changed, opened, ejected] = changes;
    let status = service.status();
    let failing = status.as_ref().and_then(|status| status.failing.as_ref());
    let endpoints = status.as_ref().and_then(|status| status.endpoints.as_ref());
    json!({
        "known": endpoints.is_some(),
        "endpoints": endpoints.map(|all| all.iter().map(|one| endpoint(one, service)).collect::<Vec<_>>()).unwrap_or_default(),
        "bytes_up": moved.up.load(Ordering::Relaxed),
        "bytes_down": moved.down.load(Ordering::Relaxed),
        "retry_budget": service.budget.left(state.clock.now()),
        "breakers": { "changed": changed, "opened": opened, "ejected": ejected },
        "registry": status.as_ref().map(|status| json!({
            "answers": status.answers,
            "failures": status.failures,
            "failing_seconds": failing.map(|(time, _)| time.as_secs_f64()),
            "problem": failing.map(|(_, error)| error.to_string()),
        })),
    })
}

/// What an endpoint does with requests, the gravest first; every endpoint is in one of these.
pub(super) const CONDITIONS: [&str; 6] = ["held", "sick", "open", "half-open", "refusing", "admitting"];

pub(super) fn condition(endpoint: &Endpoint, service: &Service) -> &'static str {
    let breaker = service.circuit_break.handle().endpoint(endpoint);
    let health = service.health(endpoint);
    match (breaker.mode(), breaker.state()) {
        (Mode::ForcedOpen, _) => "held",
        _ if health.is_some_and(|health| !health.is_well) => "sick",
        (Mode::ForcedClosed, _) => "admitting",
        (_, Breaker::Open) => "open",
        (_, Breaker::HalfOpen) => "half-open",
        _ if endpoint.gate().admits() => "admitting",
        _ => "refusing",
    }
}

fn endpoint(endpoint: &Endpoint, service: &Service) -> Json {
    let answered = Answered::by(endpoint);
    let took = answered.took.read();
    let (idle, http2) = service.forward.connections(endpoint);
    let breaker = service.circuit_break.handle().endpoint(endpoint);
    let counts = breaker.counts();
    let health = service.health(endpoint);
    let instance = endpoint.instance();
    json!({
        "id": **endpoint.id(),
        "address": endpoint.address().to_string(),
        "weight": endpoint.weight(),
        "priority": instance.priority,
        "zone": instance.zone.as_deref(),
        "admits": endpoint.gate().admits(),
        "in_flight": endpoint.in_flight(),
        "picks": endpoint.requests(),
        "condition": condition(endpoint, service),
        "requests": took.count(),
        "errors": answered.errors.load(Ordering::Relaxed) + answered.failed.load(Ordering::Relaxed),
        "retried": answered.retried.load(Ordering::Relaxed),
        "seconds": took.seconds,
        "buckets": took.buckets,
        "connections": { "open": service.forward.open_connections(endpoint), "idle": idle, "http2": http2 },
        "breaker": {
            "state": breaker.state().as_str(),
            "forced": match breaker.mode() { Mode::ForcedOpen => Some("open"), Mode::ForcedClosed => Some("closed"), _ => None },
            "opens_in_seconds": breaker.open_for().map(|time| time.as_secs_f64()),
            "failures_in_a_row": breaker.failures_in_a_row(),
            "failed": counts.failed,
            "refused": counts.refused,
        },
        "health": health.map(|health| json!({
            "well": health.is_well, "checks": health.checks, "failures": health.failures, "problem": health.problem,
        })),
    })
}
