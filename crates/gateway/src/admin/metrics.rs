//! The Prometheus text format, by OpenTelemetry's names where it has them.
//!
//! Read from the layers' handles when it is asked for, so that nothing is kept of endpoints that are gone; a metrics façade
//! would keep their series for ever.

use std::fmt::{Display, Write as _};
use std::sync::atomic::{AtomicU64, Ordering};

use portcullis::circuit_break::{Breaker, State as Admits};
use portcullis::rate_limit::RedisStore;
use portcullis_core::Endpoint;

use super::view::{CONDITIONS, condition};
use crate::build::{Running, Service};
use crate::state::State;
use crate::telemetry::{Answered, BOUNDS, FINE, Times};

/// A page of metrics.
#[derive(Default)]
struct Page(String);

type Label<'a> = (&'a str, &'a dyn Display);

/// An endpoint, the service it belongs to, and its breaker.
struct Each<'a> {
    name: &'a str,
    service: &'a Service,
    endpoint: Endpoint,
    breaker: Breaker,
}

pub(super) fn text(state: &State) -> String {
    let mut page = Page::default();
    let running = state.running();
    process(state, &mut page);
    requests(state, &mut page);
    limits(&running, &mut page);
    proofs(&running, &mut page);
    services(state, &running, &mut page);
    if running.config.metrics.endpoints {
        endpoints(&running, &mut page);
    }
    page.0
}

fn process(state: &State, page: &mut Page) {
    page.family("portcullis_build_info", "gauge", "What runs.");
    page.sample("portcullis_build_info", &[("version", &env!("CARGO_PKG_VERSION"))], 1);
    page.single("portcullis_ready", "gauge", "Whether it is ready.", u8::from(state.not_ready().is_none()));
    let up = state.clock.now().since(state.started).as_secs_f64();
    page.single("portcullis_uptime_seconds", "gauge", "Time since the start.", up);
    let (good, bad) = (load(&state.telemetry.reloads), load(&state.telemetry.failed_reloads));
    let help = "Files put in force, and refused, after the first.";
    page.split("portcullis_config_reloads_total", "counter", help, "result", [("ok", good), ("refused", bad)]);
    let help = "Lines of the log there was no room for.";
    page.single("portcullis_log_dropped_total", "counter", help, crate::log::dropped());
    if let Some(exporter) = &state.running().exporter {
        let counts = exporter.counts();
        let each = [
            ("exported", load(&counts.exported)),
            ("failed", load(&counts.failed)),
            ("dropped", load(&counts.dropped)),
        ];
        page.split("portcullis_spans_total", "counter", "Spans for the collector.", "result", each);
    }
}

fn requests(state: &State, page: &mut Page) {
    let readings = state.telemetry.readings();
    let name = "http_server_request_duration_seconds";
    page.family(name, "histogram", "Time from the head of a request to the end of its answer.");
    for (labels, reading) in &readings {
        let (layer, reason) = labels.refused;
        let error = if !reason.is_empty() {
            reason.to_owned()
        } else if labels.status >= 500 || labels.status == 499 {
            labels.status.to_string()
        } else {
            labels.grpc.filter(|_| labels.is_failure()).map(|code| code.to_string()).unwrap_or_default()
        };
        let grpc = labels.grpc.map(|code| code.number().to_string()).unwrap_or_default();
        let base: [Label<'_>; 6] = [
            ("http_request_method", &labels.method),
            ("http_response_status_code", &labels.status),
            ("http_route", &labels.route),
            ("rpc_grpc_status_code", &grpc),
            ("error_type", &error),
            ("portcullis_layer", &layer),
        ];
        page.histogram(name, &base, &reading.times);
    }
    let mut routes = std::collections::BTreeMap::<_, (u64, u64)>::new();
    for (labels, reading) in &readings {
        let (up, down) = routes.entry(&labels.route).or_default();
        (*up, *down) = (*up + reading.up, *down + reading.down);
    }
    let name = "portcullis_route_bytes_total";
    page.family(name, "counter", "Bytes of bodies, of requests (up) and of answers (down).");
    for (route, (up, down)) in routes {
        page.sample(name, &[("http_route", route), ("direction", &"up")], up);
        page.sample(name, &[("http_route", route), ("direction", &"down")], down);
    }
    let active = state.telemetry.active.load(Ordering::Relaxed);
    page.single("http_server_active_requests", "gauge", "Requests under way.", active);
}

fn limits(running: &Running, page: &mut Page) {
    let stats = running.limiter.handle.stats();
    let each = [
        ("admitted", stats.admitted),
        ("refused", stats.refused),
        ("delayed", stats.delayed),
        ("shadowed", stats.shadowed),
        ("overflowed", stats.overflowed),
    ];
    let help = "What limits said: one for each limit of a request.";
    page.split("portcullis_rate_limit_decisions_total", "counter", help, "decision", each);
    page.single("portcullis_rate_limit_callers", "gauge", "Callers with a count of their own.", stats.live);
    page.single("portcullis_rate_limit_places", "gauge", "Counts there is room for.", stats.places);
    page.single("portcullis_rate_limit_in_flight", "gauge", "Places of concurrency limits taken.", stats.in_flight);
    let Some(store) = running.limiter.store.as_ref().map(RedisStore::stats) else { return };
    let good = store.round_trips.saturating_sub(store.failures);
    let help = "Questions to the Redis that gateways share.";
    let name = "portcullis_rate_limit_store_questions_total";
    page.split(name, "counter", help, "result", [("ok", good), ("failed", store.failures)]);
    let help = "What was decided without one: by a lease, by a refusal remembered, as on_failure says.";
    let each = [("lease", store.leased), ("memory", store.remembered), ("on_failure", store.undecided)];
    page.split("portcullis_rate_limit_store_decisions_total", "counter", help, "by", each);
    page.single("portcullis_rate_limit_store_up", "gauge", "0 while it is left alone.", u8::from(!store.down));
}

fn proofs(running: &Running, page: &mut Page) {
    let fresh: Vec<_> =
        running.providers.tokens().filter_map(|(name, jwt)| Some((name, jwt.keys().freshness()?))).collect();
    if !fresh.is_empty() {
        let name = "portcullis_key_set_age_seconds";
        page.family(name, "gauge", "How long ago a provider's keys were read; absent before the first time.");
        for (provider, freshness) in &fresh {
            if let Some(age) = freshness.age {
                page.sample(name, &[("provider", provider)], age.as_secs_f64());
            }
        }
        let name = "portcullis_key_set_fetches_total";
        page.family(name, "counter", "How often a provider's keys were asked for.");
        for (provider, freshness) in &fresh {
            let good = freshness.fetches.saturating_sub(freshness.failures);
            page.sample(name, &[("provider", provider), ("result", &"ok")], good);
            page.sample(name, &[("provider", provider), ("result", &"failed")], freshness.failures);
        }
    }
    let caches: Vec<_> =
        running.providers.tokens().filter_map(|(name, jwt)| Some((name, jwt.cache_stats()?))).collect();
    if !caches.is_empty() {
        let name = "portcullis_token_cache_lookups_total";
        page.family(name, "counter", "Tokens that were remembered (hit), and that had to be verified (miss).");
        for (provider, stats) in &caches {
            page.sample(name, &[("provider", provider), ("result", &"hit")], stats.hits);
            page.sample(name, &[("provider", provider), ("result", &"miss")], stats.misses);
        }
        page.family("portcullis_token_cache_bytes", "gauge", "Memory of remembered tokens.");
        for (provider, stats) in &caches {
            page.sample("portcullis_token_cache_bytes", &[("provider", provider)], stats.bytes);
        }
    }
}

fn services(state: &State, running: &Running, page: &mut Page) {
    let all: Vec<_> = running.services.iter().map(|(name, service)| (name, service, service.status())).collect();
    page.family("portcullis_service_endpoints", "gauge", "Endpoints by what they do with requests.");
    for (name, service, status) in &all {
        let endpoints = status.iter().filter_map(|status| status.endpoints.as_ref()).flat_map(|all| all.iter());
        let are: Vec<_> = endpoints.map(|endpoint| condition(endpoint, service)).collect();
        for one in CONDITIONS {
            let count = are.iter().filter(|is| **is == one).count();
            page.sample("portcullis_service_endpoints", &[("service", name), ("state", &one)], count);
        }
    }
    page.family("portcullis_service_bytes_total", "counter", "Bytes of bodies to (up) and from (down) endpoints.");
    for (name, service, _) in &all {
        let moved = state.telemetry.moved(&service.name.as_str().into());
        let name: Label<'_> = ("service", name);
        page.sample("portcullis_service_bytes_total", &[name, ("direction", &"up")], load(&moved.up));
        page.sample("portcullis_service_bytes_total", &[name, ("direction", &"down")], load(&moved.down));
    }
    page.family("portcullis_retry_budget", "gauge", "How many requests could be repeated now.");
    for (name, service, _) in &all {
        page.sample("portcullis_retry_budget", &[("service", name)], service.budget.left(state.clock.now()));
    }
    page.family("portcullis_breaker_changes_total", "counter", "How often breakers changed, to what and why.");
    for ((service, to, reason), count) in state.telemetry.breaker_changes() {
        let labels: [Label<'_>; 3] = [("service", &service), ("to", &to), ("reason", &reason)];
        page.sample("portcullis_breaker_changes_total", &labels, count);
    }
    page.family("portcullis_registry_answers_total", "counter", "Answers of a service's registry.");
    for (name, _, status) in &all {
        let (answers, failures) = status.as_ref().map_or((0, 0), |status| (status.answers, status.failures));
        page.sample("portcullis_registry_answers_total", &[("service", name), ("result", &"ok")], answers);
        page.sample("portcullis_registry_answers_total", &[("service", name), ("result", &"failed")], failures);
    }
    let name = "portcullis_registry_age_seconds";
    page.family(name, "gauge", "Age of what is known of a service: since when its registry fails, 0 while it answers.");
    for (service, _, status) in &all {
        let failing = status.as_ref().and_then(|status| status.failing.as_ref());
        page.sample(name, &[("service", service)], failing.map_or(0.0, |(time, _)| time.as_secs_f64()));
    }
}

fn endpoints(running: &Running, page: &mut Page) {
    let mut all = Vec::new();
    for (name, service) in &running.services {
        for endpoint in service.endpoints().iter().flat_map(|endpoints| endpoints.iter()) {
            let breaker = service.circuit_break.handle().endpoint(endpoint);
            all.push(Each { name, service, endpoint: endpoint.clone(), breaker });
        }
    }
    page.each(&all, "portcullis_endpoint_in_flight", "gauge", "Requests an endpoint is busy with.", |one| {
        one.endpoint.in_flight().into()
    });
    page.each(&all, "portcullis_endpoint_picks_total", "counter", "Times an endpoint was picked.", |one| {
        one.endpoint.requests()
    });
    let name = "portcullis_attempt_duration_seconds";
    page.family(name, "histogram", "Time until an endpoint's answer began, or was given up, for each attempt.");
    for one in &all {
        page.histogram(name, &one.labels(), &Answered::by(&one.endpoint).took.read());
    }
    page.each(&all, "portcullis_endpoint_errors_total", "counter", "Answers of 5xx by an endpoint.", |one| {
        load(&Answered::by(&one.endpoint).errors)
    });
    page.each(&all, "portcullis_endpoint_failures_total", "counter", "Attempts without an answer.", |one| {
        load(&Answered::by(&one.endpoint).failed)
    });
    page.each(&all, "portcullis_endpoint_retried_total", "counter", "Attempts after which another was made.", |one| {
        load(&Answered::by(&one.endpoint).retried)
    });
    page.each(&all, "portcullis_breaker_state", "gauge", "0 closed, 1 half-open, 2 open.", |one| {
        match one.breaker.state() {
            Admits::Closed => 0,
            Admits::Open => 2,
            _ => 1,
        }
    });
    page.each(&all, "portcullis_breaker_failures_total", "counter", "Failures a breaker counted.", |one| {
        one.breaker.counts().failed
    });
    page.each(&all, "portcullis_breaker_refused_total", "counter", "Requests a breaker refused.", |one| {
        one.breaker.counts().refused
    });
    let name = "portcullis_pool_connections";
    page.family(name, "gauge", "Connections to an endpoint: all that are open, idle ones, HTTP/2 ones.");
    for one in &all {
        let (idle, http2) = one.service.forward.connections(&one.endpoint);
        let open = one.service.forward.open_connections(&one.endpoint);
        for (state, count) in [("open", open), ("idle", idle), ("http2", http2)] {
            let [service, endpoint] = one.labels();
            page.sample(name, &[service, endpoint, ("state", &state)], count);
        }
    }
    page.each(&all, "portcullis_health_well", "gauge", "What checks say; 1 also where there are none.", |one| {
        let health = one.service.health(&one.endpoint);
        u64::from(health.is_none_or(|health| health.is_well))
    });
}

fn load(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

// === impl Each ===

impl Each<'_> {
    fn labels(&self) -> [Label<'_>; 2] {
        [("service", &self.name), ("endpoint", self.endpoint.id())]
    }
}

// === impl Page ===

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, name: &str, labels: &[Label<'_>], value: impl Display) {
        self.0.push_str(name);
        for (index, (label, text)) in labels.iter().enumerate() {
            let text = text.to_string().replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.0, "{}{label}=\"{text}\"", if index == 0 { '{' } else { ',' });
        }
        let end = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.0, "{end} {value}");
    }

    fn single(&mut self, name: &str, kind: &str, help: &str, value: impl Display) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }

    fn split<const N: usize>(&mut self, name: &str, kind: &str, help: &str, by: &str, values: [(&str, u64); N]) {
        self.family(name, kind, help);
        for (word, value) in values {
            self.sample(name, &[(by, &word)], value);
        }
    }

    fn each(&mut self, all: &[Each<'_>], name: &str, kind: &str, help: &str, value: impl Fn(&Each<'_>) -> u64) {
        self.family(name, kind, help);
        for one in all {
            self.sample(name, &one.labels(), value(one));
        }
    }

    fn histogram(&mut self, name: &str, labels: &[Label<'_>], times: &Times) {
        let mut sum = 0;
        for (index, count) in times.buckets.iter().enumerate() {
            sum += count;
            if index < FINE {
                continue;
            }
            let bound = BOUNDS.get(index).map_or_else(|| String::from("+Inf"), ToString::to_string);
            let with_bound: Vec<Label<'_>> = labels.iter().copied().chain([("le", &bound as &dyn Display)]).collect();
            self.sample(&format!("{name}_bucket"), &with_bound, sum);
        }
        self.sample(&format!("{name}_sum"), labels, times.seconds);
        self.sample(&format!("{name}_count"), labels, sum);
    }
}
