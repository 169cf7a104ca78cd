//! A request and its attempts as spans, by the semantic conventions for HTTP
//! (<https://opentelemetry.io/docs/specs/semconv/http/http-spans/>).

use std::time::Duration;

use http::Version;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::span::{Event, SpanKind};
use opentelemetry_proto::tonic::trace::v1::status::StatusCode as Code;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span, Status};
use portcullis_core::{Address, Layer, Scheme};

use crate::config::Map;
use crate::observe::{Attempt, Finished};
use crate::telemetry::method_label;
use crate::trace::Trace;

/// What all spans come from.
pub(super) struct Source {
    resource: Resource,
    scope: InstrumentationScope,
}

/// Attributes of a span, those left out that are not known.
#[derive(Default)]
struct Attributes(Vec<KeyValue>);

/// The flags of a span say whether its parent is in another process, from this bit on.
const KNOWS_PARENT: u32 = 0x100;
const PARENT_IS_REMOTE: u32 = 0x200;

/// How many spans a request becomes.
pub(super) fn count(finished: &Finished) -> u64 {
    1 + finished.attempts.len() as u64
}

// === impl Source ===

impl Source {
    pub(super) fn new(service: &str, more: &Map<String>) -> Self {
        let mut attributes = Attributes::default();
        attributes.text("service.name", service).text("service.version", env!("CARGO_PKG_VERSION"));
        for (name, value) in more {
            attributes.text(name, value);
        }
        Self {
            resource: Resource { attributes: attributes.0, ..Resource::default() },
            scope: InstrumentationScope {
                name: String::from("portcullis"),
                version: String::from(env!("CARGO_PKG_VERSION")),
                ..InstrumentationScope::default()
            },
        }
    }

    /// What is sent for requests and when they ended.
    pub(super) fn request(&self, batch: &[(Box<Finished>, Duration)]) -> ExportTraceServiceRequest {
        let spans = batch.iter().flat_map(|(finished, ended)| spans(finished, *ended)).collect();
        let scope = ScopeSpans { scope: Some(self.scope.clone()), spans, schema_url: String::new() };
        let resource = Some(self.resource.clone());
        let all = ResourceSpans { resource, scope_spans: vec![scope], schema_url: String::new() };
        ExportTraceServiceRequest { resource_spans: vec![all] }
    }
}

/// The request's span, and one for each attempt.
fn spans(finished: &Finished, ended: Duration) -> Vec<Span> {
    let Some(trace) = finished.record.trace else { return Vec::new() };
    let began = ended.saturating_sub(finished.took);
    let attempts = finished.attempts.iter().enumerate();
    let attempts = attempts.filter_map(|(index, attempt)| attempt_span(finished, trace, index, attempt, began));
    std::iter::once(request_span(finished, trace, began, ended)).chain(attempts).collect()
}

fn request_span(finished: &Finished, trace: Trace, began: Duration, ended: Duration) -> Span {
    let (asked, head) = (&finished.asked, finished.head.as_ref());
    let method = method_label(&asked.method);
    let refused = head.and_then(|head| head.refused);
    let status = head.map(|head| head.status);
    let mut attributes = Attributes::default();
    attributes.text("http.request.method", method);
    if method == "_OTHER" {
        attributes.text("http.request.method_original", asked.method.as_str());
    }
    attributes.maybe("http.route", finished.route().map(|route| &**route)).maybe("url.path", asked.path.as_deref());
    if let Some(more) = &asked.more {
        attributes.text("url.scheme", if more.encrypted { "https" } else { "http" });
        attributes
            .text("network.protocol.version", version(more.version))
            .maybe("user_agent.original", more.agent.as_deref());
        if let Some(host) = more.host.as_deref().and_then(|host| host.parse::<http::uri::Authority>().ok()) {
            attributes.text("server.address", host.host());
            attributes.number("server.port", host.port_u16().unwrap_or(if more.encrypted { 443 } else { 80 }));
        }
    }
    if let Some(peer) = asked.peer {
        attributes.text("network.peer.address", &peer.ip().to_string()).number("network.peer.port", peer.port());
    }
    if let Some(status) = status {
        attributes.number("http.response.status_code", status.as_u16());
    }
    attributes
        .size("http.request.body.size", finished.record.uploaded())
        .size("http.response.body.size", finished.down);
    let error = match (refused, status) {
        (Some((_, reason)), _) => Some(reason.to_owned()),
        (None, None) => Some(String::from("caller-gone")),
        (None, Some(status)) if status.is_server_error() => Some(status.as_u16().to_string()),
        (None, Some(_)) if finished.is_failure() => finished.grpc.map(|code| code.to_string()),
        (None, Some(_)) => (!finished.whole).then(|| String::from("broken-off")),
    };
    attributes.maybe("error.type", error.as_deref()).maybe("portcullis.refused_by", refused.map(|(layer, _)| layer));
    let service = finished.attempts.last().map(|attempt| &**attempt.endpoint.service());
    attributes.maybe("portcullis.service", service).size("portcullis.attempts", finished.attempts.len() as u64);
    // A caller's own mistake is no error of the server.
    let failed = error.is_some() && !status.is_some_and(|status| status.is_client_error());
    let stages =
        [(Layer::Auth, "auth passed"), (Layer::RateLimit, "limits passed"), (Layer::Discovery, "endpoints found")];
    let events = stages.into_iter().filter_map(|(layer, name)| {
        let time_unix_nano = nanos(began + finished.record.passed(layer)?);
        Some(Event { time_unix_nano, name: name.to_owned(), ..Event::default() })
    });
    Span {
        trace_id: trace.id.to_be_bytes().to_vec(),
        span_id: trace.span.to_be_bytes().to_vec(),
        parent_span_id: trace.parent.map_or_else(Vec::new, |parent| parent.to_be_bytes().to_vec()),
        flags: 1 | KNOWS_PARENT | if trace.parent.is_some() { PARENT_IS_REMOTE } else { 0 },
        name: finished.route().map_or_else(|| method.to_owned(), |route| format!("{method} {route}")),
        kind: SpanKind::Server as i32,
        start_time_unix_nano: nanos(began),
        end_time_unix_nano: nanos(ended),
        attributes: attributes.0,
        events: events.collect(),
        status: failed.then(error_status),
        ..Span::default()
    }
}

/// `index` counts from zero; the answer of the last lasts until its body's end.
fn attempt_span(finished: &Finished, trace: Trace, index: usize, attempt: &Attempt, began: Duration) -> Option<Span> {
    let is_last = index + 1 == finished.attempts.len();
    let ended =
        if is_last && attempt.status.is_some() { finished.took } else { attempt.ended.unwrap_or(finished.took) };
    let method = method_label(&finished.asked.method);
    let endpoint = &attempt.endpoint;
    let mut attributes = Attributes::default();
    attributes.text("http.request.method", method);
    let (host, port) = match endpoint.address() {
        Address::Socket(address) => (address.ip().to_string(), Some(address.port())),
        Address::Name(name, port) => (name.to_string(), Some(*port)),
        other => (other.to_string(), None),
    };
    attributes.text("server.address", &host);
    if let Some(port) = port {
        attributes.number("server.port", port);
        let path = finished.asked.path.as_deref().unwrap_or("/");
        // As it was asked for: a rewritten one is known only to the upstream, and the query is nobody's business.
        let scheme = if endpoint.instance().scheme == Scheme::Https { "https" } else { "http" };
        attributes.text("url.full", &format!("{scheme}://{}{path}", endpoint.address()));
    }
    if let Some(status) = attempt.status {
        attributes.number("http.response.status_code", status.as_u16());
    }
    if index > 0 {
        attributes.size("http.request.resend_count", index as u64);
    }
    let bad = attempt.status.filter(|status| status.is_client_error() || status.is_server_error());
    let error = attempt.failed.map(str::to_owned).or(bad.map(|status| status.as_u16().to_string()));
    attributes.maybe("error.type", error.as_deref());
    attributes.text("portcullis.service", endpoint.service()).text("portcullis.endpoint", endpoint.id());
    Some(Span {
        trace_id: trace.id.to_be_bytes().to_vec(),
        span_id: attempt.span?.to_be_bytes().to_vec(),
        parent_span_id: trace.span.to_be_bytes().to_vec(),
        flags: 1 | KNOWS_PARENT,
        name: method.to_owned(),
        kind: SpanKind::Client as i32,
        start_time_unix_nano: nanos(began + attempt.began),
        end_time_unix_nano: nanos(began + ended),
        attributes: attributes.0,
        status: error.is_some().then(error_status),
        ..Span::default()
    })
}

fn error_status() -> Status {
    Status { code: Code::Error as i32, message: String::new() }
}

const fn version(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "1.0",
        Version::HTTP_2 => "2",
        _ => "1.1",
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

// === impl Attributes ===

impl Attributes {
    fn push(&mut self, key: &str, value: Value) -> &mut Self {
        self.0.push(KeyValue {
            key: key.to_owned(),
            value: Some(AnyValue { value: Some(value) }),
            ..KeyValue::default()
        });
        self
    }

    fn text(&mut self, key: &str, value: &str) -> &mut Self {
        self.push(key, Value::StringValue(value.to_owned()))
    }

    fn maybe(&mut self, key: &str, value: Option<&str>) -> &mut Self {
        if let Some(value) = value {
            self.text(key, value);
        }
        self
    }

    fn number(&mut self, key: &str, value: u16) -> &mut Self {
        self.push(key, Value::IntValue(value.into()))
    }

    fn size(&mut self, key: &str, value: u64) -> &mut Self {
        self.push(key, Value::IntValue(i64::try_from(value).unwrap_or(i64::MAX)))
    }
}
