//! The Prometheus text format, by OpenTelemetry's names where it has them.
//!
//! Read from the layers' handles when it is asked for, so that nothing is kept of endpoints that are gone; a metrics façade
//! would keep their series for ever.

use std::fmt::{Display, Write as _};
use std::sync::atomic::Ordering;

use portcullis::circuit_break::State as Breaker;

use crate::state::State;
use crate::telemetry::{Answered, BOUNDS};

/// A page of metrics.
#[derive(Default)]
struct Page(String);

// === impl Page ===

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &dyn Display)], value: impl Display) {
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
}

pub(super) fn text(state: &State) -> String {
    let mut page = Page::default();
    let running = state.running();
    requests(state, &mut page);
    page.single("portcullis_ready", "gauge", "Whether it is ready.", u8::from(state.not_ready().is_none()));
    let up = state.clock.now().since(state.started).as_secs_f64();
    page.single("portcullis_uptime_seconds", "gauge", "Time since the start.", up);
    page.family("portcullis_config_reloads_total", "counter", "Files put in force, and refused, after the first.");
    let (good, bad) = (&state.telemetry.reloads, &state.telemetry.failed_reloads);
    page.sample("portcullis_config_reloads_total", &[("result", &"ok")], good.load(Ordering::Relaxed));
    page.sample("portcullis_config_reloads_total", &[("result", &"refused")], bad.load(Ordering::Relaxed));
    let stats = running.limits.stats();
    page.family("portcullis_rate_limit_decisions_total", "counter", "What limits said.");
    page.sample("portcullis_rate_limit_decisions_total", &[("decision", &"admitted")], stats.admitted);
    page.sample("portcullis_rate_limit_decisions_total", &[("decision", &"refused")], stats.refused);
    page.single("portcullis_rate_limit_callers", "gauge", "Callers with a count of their own.", stats.live);
    page.single("portcullis_rate_limit_places", "gauge", "Counts there is room for.", stats.places);
    services(state, &mut page);
    endpoints(state, &mut page);
    page.0
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
            String::new()
        };
        let base: [(&str, &dyn Display); 5] = [
            ("http_request_method", &labels.method),
            ("http_response_status_code", &labels.status),
            ("http_route", &labels.route),
            ("error_type", &error),
            ("portcullis_layer", &layer),
        ];
        let mut sum = 0;
        for (index, count) in reading.buckets.iter().enumerate() {
            sum += count;
            let bound = BOUNDS.get(index).map_or_else(|| String::from("+Inf"), ToString::to_string);
            let with_bound: Vec<(&str, &dyn Display)> =
                base.into_iter().chain([("le", &bound as &dyn Display)]).collect();
            page.sample(&format!("{name}_bucket"), &with_bound, sum);
        }
        page.sample(&format!("{name}_sum"), &base, reading.seconds);
        page.sample(&format!("{name}_count"), &base, sum);
    }
    let name = "http_server_response_body_bytes_total";
    page.family(name, "counter", "Bytes of answers' bodies.");
    let mut bytes = std::collections::BTreeMap::<_, u64>::new();
    for (labels, reading) in &readings {
        *bytes.entry(&labels.route).or_default() += reading.bytes;
    }
    for (route, bytes) in bytes {
        page.sample(name, &[("http_route", route)], bytes);
    }
    let active = state.telemetry.active.load(Ordering::Relaxed);
    page.single("http_server_active_requests", "gauge", "Requests under way.", active);
}

fn services(state: &State, page: &mut Page) {
    let running = state.running();
    let all: Vec<_> = running.services.iter().map(|(name, service)| (name, service, service.status())).collect();
    page.family("portcullis_service_endpoints", "gauge", "Endpoints by whether their gate admits everybody.");
    for (name, _, status) in &all {
        let endpoints = status.as_ref().and_then(|status| status.endpoints.as_ref());
        let total = endpoints.map_or(0, |endpoints| endpoints.len());
        let admits = endpoints.map_or(0, |endpoints| endpoints.iter().filter(|one| one.gate().admits()).count());
        page.sample("portcullis_service_endpoints", &[("service", name), ("state", &"admitting")], admits);
        page.sample("portcullis_service_endpoints", &[("service", name), ("state", &"refusing")], total - admits);
    }
    page.family("portcullis_registry_answers_total", "counter", "Answers of a service's registry.");
    for (name, _, status) in &all {
        let (answers, failures) = status.as_ref().map_or((0, 0), |status| (status.answers, status.failures));
        page.sample("portcullis_registry_answers_total", &[("service", name), ("result", &"ok")], answers);
        page.sample("portcullis_registry_answers_total", &[("service", name), ("result", &"failed")], failures);
    }
    page.family("portcullis_registry_stale_seconds", "gauge", "For how long a service's registry has not answered.");
    for (name, _, status) in &all {
        let failing = status.as_ref().and_then(|status| status.failing.as_ref());
        let stale = failing.map_or(0.0, |(time, _)| time.as_secs_f64());
        page.sample("portcullis_registry_stale_seconds", &[("service", name)], stale);
    }
}

fn endpoints(state: &State, page: &mut Page) {
    let running = state.running();
    let mut all = Vec::new();
    for (name, service) in &running.services {
        for endpoint in service.endpoints().iter().flat_map(|endpoints| endpoints.iter()) {
            let breaker = service.circuit_break.handle().endpoint(endpoint);
            all.push((name, service, endpoint.clone(), breaker));
        }
    }
    let mut each = |name: &str, kind: &str, help: &str, value: &dyn Fn(usize) -> f64| {
        page.family(name, kind, help);
        for (index, (service, _, endpoint, _)) in all.iter().enumerate() {
            page.sample(name, &[("service", service), ("endpoint", endpoint.id())], value(index));
        }
    };
    each("portcullis_endpoint_in_flight", "gauge", "Requests an endpoint is busy with.", &|i| {
        all[i].2.in_flight().into()
    });
    each("portcullis_endpoint_picks_total", "counter", "Requests begun at an endpoint.", &|i| {
        all[i].2.requests() as f64
    });
    let answered = |i: usize| Answered::by(&all[i].2);
    each("portcullis_endpoint_requests_total", "counter", "Answers by an endpoint.", &|i| {
        answered(i).requests.load(Ordering::Relaxed) as f64
    });
    each("portcullis_endpoint_errors_total", "counter", "Answers of 5xx by an endpoint.", &|i| {
        answered(i).errors.load(Ordering::Relaxed) as f64
    });
    each(
        "portcullis_endpoint_retried_total",
        "counter",
        "Attempts at an endpoint that were made again elsewhere.",
        &|i| answered(i).retried.load(Ordering::Relaxed) as f64,
    );
    each("portcullis_breaker_state", "gauge", "0 closed, 1 half-open, 2 open.", &|i| match all[i].3.state() {
        Breaker::Closed => 0.0,
        Breaker::Open => 2.0,
        _ => 1.0,
    });
    each("portcullis_breaker_failures_total", "counter", "Failures a breaker counted.", &|i| {
        all[i].3.counts().failed.into()
    });
    each("portcullis_breaker_refused_total", "counter", "Requests a breaker refused.", &|i| {
        all[i].3.counts().refused.into()
    });
    each("portcullis_pool_idle_connections", "gauge", "Idle HTTP/1.1 connections.", &|i| {
        all[i].1.forward.connections(&all[i].2).0 as f64
    });
    each("portcullis_health_well", "gauge", "What checks say; 1 also where there are none.", &|i| {
        let health = all[i].1.health.as_ref().and_then(|checker| checker.health(&all[i].2));
        f64::from(u8::from(health.is_none_or(|health| health.is_well)))
    });
}
