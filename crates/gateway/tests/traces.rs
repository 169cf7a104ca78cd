//! Spans of real requests, as a collector gets them.
#![expect(clippy::expect_used, reason = "what helps the tests fails with them")]

mod common;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use common::{ALL, Program, file};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use portcullis::serve::{Incoming, Server, ServerTls};
use portcullis_testing::Backend;
use portcullis_testing::client::get;
use portcullis_testing::process::Nobody;
use prost::Message;
use tokio::sync::mpsc;

const CALLER: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// Takes OTLP over HTTP.
struct Collector {
    address: SocketAddr,
    received: mpsc::UnboundedReceiver<(HeaderMap, ExportTraceServiceRequest)>,
    asked: Arc<AtomicUsize>,
}

impl Collector {
    async fn start(tls: Option<ServerTls>) -> Self {
        Self::answering(tls, |_| Some(StatusCode::OK)).await
    }

    /// One that answers the n-th request so, or not at all.
    async fn answering(tls: Option<ServerTls>, answer: fn(usize) -> Option<StatusCode>) -> Self {
        let (sender, received) = mpsc::unbounded_channel();
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let service = tower::service_fn(move |request: Request<Incoming>| {
            let (sender, count) = (sender.clone(), count.clone());
            async move {
                assert_eq!(request.uri().path(), "/v1/traces");
                let (head, body) = request.into_parts();
                let body = body.collect().await.expect("a body").to_bytes();
                let Some(status) = answer(count.fetch_add(1, Ordering::Relaxed)) else {
                    return std::future::pending().await;
                };
                if status.is_success() {
                    let spans = ExportTraceServiceRequest::decode(body).expect("what OTLP says");
                    let _ = sender.send((head.headers, spans));
                }
                let mut response = Response::new(Full::<Bytes>::default());
                *response.status_mut() = status;
                Ok::<_, Infallible>(response)
            }
        });
        let mut server = Server::bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a free port");
        if let Some(tls) = tls {
            server = server.tls(tls);
        }
        let address = server.local_addr().expect("an address");
        tokio::spawn(server.serve(service));
        Self { address, received, asked }
    }

    /// The spans of requests, until there are so many.
    async fn spans(&mut self, count: usize) -> Vec<Span> {
        let mut spans = Vec::new();
        while spans.len() < count {
            let (_, request) = self.next().await;
            spans.extend(request.resource_spans.into_iter().flat_map(|all| all.scope_spans).flat_map(|all| all.spans));
        }
        spans
    }

    async fn next(&mut self) -> (HeaderMap, ExportTraceServiceRequest) {
        let next = tokio::time::timeout(Duration::from_secs(20), self.received.recv()).await;
        next.expect("spans within twenty seconds").expect("a collector")
    }
}

fn attribute(span: &Span, key: &str) -> Option<String> {
    let value = span.attributes.iter().find(|one| one.key == key)?.value.clone()?.value?;
    Some(match value {
        Value::StringValue(text) => text,
        Value::IntValue(number) => number.to_string(),
        other => format!("{other:?}"),
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A file that exports to this collector.
fn exporting(services: &[(&str, &[SocketAddr])], collector: SocketAddr, more: &str) -> String {
    let otlp = format!("traces.otlp = {{ endpoint = \"http://{collector}\", interval = \"20ms\" {more} }}\n");
    file(services, &format!("{otlp}{ALL}"))
        .replace("breaker = { failures = 3 }", "balance = { policy = \"round-robin\" }")
}

#[tokio::test]
async fn a_request_is_a_span_and_each_attempt_a_span_below_it() {
    let mut collector = Collector::start(None).await;
    let (alive, nobody) = (Backend::start("alive").await, Nobody::new());
    let text = exporting(
        &[("a", &[nobody.address(), alive.address()])],
        collector.address,
        ", resource = { \"deployment.environment.name\" = \"test\" }",
    );
    let program = Program::start(&text);
    // One of two requests goes to the dead one first.
    let (mut spans, mut seen) = (Vec::new(), serde_json::Value::Null);
    while spans.len() < 3 {
        let headers = [("traceparent", CALLER), ("user-agent", "curl/8"), ("authorization", "Bearer sesame")];
        seen = get(program.gateway, "/x?token=sesame", &headers).await.unwrap().json();
        spans = collector.spans(2).await;
    }
    let of = |kind| spans.iter().filter(|span| span.kind == kind as i32).collect::<Vec<_>>();
    let (request, attempts) = (of(SpanKind::Server)[0], of(SpanKind::Client));
    assert_eq!(request.name, "GET /{*rest}");
    assert_eq!(hex(&request.trace_id), "4bf92f3577b34da6a3ce929d0e0e4736");
    assert_eq!(hex(&request.parent_span_id), "00f067aa0ba902b7");
    let expected = [
        ("http.request.method", "GET"),
        ("http.route", "/{*rest}"),
        ("http.response.status_code", "200"),
        ("url.path", "/x"),
        ("url.scheme", "http"),
        ("network.protocol.version", "1.1"),
        ("network.peer.address", "127.0.0.1"),
        ("server.address", "127.0.0.1"),
        ("user_agent.original", "curl/8"),
        ("portcullis.service", "a"),
        ("portcullis.attempts", "2"),
    ];
    for (key, value) in expected {
        assert_eq!(attribute(request, key).as_deref(), Some(value), "{key}");
    }
    assert_eq!(attribute(request, "server.port"), Some(program.gateway.port().to_string()));
    assert!(request.status.is_none() && attribute(request, "error.type").is_none());
    let events: Vec<&str> = request.events.iter().map(|event| event.name.as_str()).collect();
    assert_eq!(events, ["auth passed", "limits passed", "endpoints found"]);
    assert!(request.events.iter().all(|event| event.time_unix_nano >= request.start_time_unix_nano));

    let [first, second] = attempts[..] else { panic!("{attempts:?}") };
    assert_eq!(attribute(first, "server.port"), Some(nobody.address().port().to_string()));
    assert_eq!(attribute(first, "error.type").as_deref(), Some("connect-failed"));
    assert_eq!(first.status.as_ref().map(|status| status.code), Some(2));
    assert_eq!(attribute(second, "url.full"), Some(format!("http://{}/x", alive.address())));
    assert_eq!(attribute(second, "http.request.resend_count").as_deref(), Some("1"));
    assert_eq!(attribute(second, "http.response.status_code").as_deref(), Some("200"));
    for attempt in &attempts {
        assert_eq!((&attempt.trace_id, &attempt.parent_span_id), (&request.trace_id, &request.span_id));
        assert!(attempt.start_time_unix_nano >= request.start_time_unix_nano);
        assert!(attempt.end_time_unix_nano <= request.end_time_unix_nano);
    }
    assert!(first.end_time_unix_nano <= second.start_time_unix_nano);
    // The upstream goes on below the attempt that reached it.
    let child = format!("00-{}-{}-01", hex(&second.trace_id), hex(&second.span_id));
    assert_eq!(seen["headers"]["traceparent"], child);
    assert!(!format!("{spans:?}").contains("sesame"), "no query and no credential");
    let metrics = program.ask("/metrics").await.text();
    assert!(metrics.contains("portcullis_spans_total{result=\"exported\"}"), "{metrics}");
}

#[tokio::test]
async fn what_a_caller_did_not_sample_is_passed_on_and_not_exported() {
    let mut collector = Collector::start(None).await;
    let backend = Backend::start("one").await;
    let text = exporting(&[("a", &[backend.address()])], collector.address, "");
    let program = Program::start(&text);
    let unsampled = CALLER.replace("-01", "-00");
    let seen = get(program.gateway, "/quiet", &[("traceparent", &unsampled)]).await.unwrap().json();
    let passed_on = seen["headers"]["traceparent"].as_str().unwrap();
    assert!(passed_on.starts_with("00-4bf92f3577b34da6a3ce929d0e0e4736-") && passed_on.ends_with("-00"), "{passed_on}");
    program.get("/loud").await;
    let refused = program.order("/reload", &serde_json::json!(null)).await;
    assert_eq!(refused.status, 200, "the exporter goes on where nothing changed");
    program.get("/nowhere//odd").await;
    let spans = collector.spans(3).await;
    let paths: Vec<_> = spans.iter().filter_map(|span| attribute(span, "url.path")).collect();
    assert_eq!(paths, ["/loud", "/nowhere//odd"]);
    let odd = spans.iter().rfind(|span| span.kind == SpanKind::Server as i32).unwrap();
    assert_eq!(attribute(odd, "error.type").as_deref(), Some("path"));
    assert!(odd.status.is_none(), "a caller's mistake is not the server's");
    assert_eq!(odd.parent_span_id, Vec::<u8>::new());
}

#[tokio::test]
async fn a_collector_that_has_no_time_is_asked_again() {
    let answer = |n| Some(if n < 2 { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK });
    let mut collector = Collector::answering(None, answer).await;
    let backend = Backend::start("one").await;
    let program = Program::start(&exporting(&[("a", &[backend.address()])], collector.address, ""));
    program.get("/x").await;
    assert_eq!(collector.spans(2).await.len(), 2);
    assert!(collector.asked.load(Ordering::Relaxed) >= 3);
}

#[tokio::test]
async fn a_collector_that_hangs_costs_spans_and_no_requests() {
    let collector = Collector::answering(None, |_| None).await;
    let backend = Backend::start("one").await;
    let program = Program::start(&exporting(&[("a", &[backend.address()])], collector.address, ", queue = 1"));
    let dropped = async || {
        let metrics = program.ask("/metrics").await.text();
        let line = metrics.lines().find_map(|line| line.strip_prefix("portcullis_spans_total{result=\"dropped\"} "));
        line.unwrap().parse::<u64>().unwrap()
    };
    while dropped().await == 0 {
        assert_eq!(program.get("/x").await.status, 200);
    }
}

#[tokio::test]
async fn the_last_spans_are_sent_before_it_ends_over_tls_with_a_key() {
    let key = rcgen::generate_simple_self_signed([String::from("127.0.0.1")]).unwrap();
    let tls = ServerTls::new(key.cert.pem().as_bytes(), key.signing_key.serialize_pem().as_bytes()).unwrap();
    let mut collector = Collector::start(Some(tls)).await;
    let backend = Backend::start("one").await;
    let text = exporting(
        &[("a", &[backend.address()])],
        collector.address,
        ", ca = \"ca.pem\", headers = { x-key = \"sesame\" }",
    )
    .replace("http://", "https://")
    .replace("20ms", "1h");
    let folder = portcullis_testing::process::scratch_folder("traces");
    std::fs::write(folder.join("ca.pem"), key.cert.pem()).unwrap();
    let mut program = Program::start_in(folder, &text);
    program.get("/x").await;
    let shown = program.ask("/config").await.text();
    assert!(shown.contains("x-key") && !shown.contains("sesame"), "{shown}");
    program.signal("TERM");
    let (headers, request) = collector.next().await;
    assert_eq!(headers["x-key"], "sesame");
    assert_eq!(headers["content-type"], "application/x-protobuf");
    let resource = request.resource_spans[0].resource.clone().unwrap();
    let name = resource.attributes.iter().find(|one| one.key == "service.name").unwrap().value.clone().unwrap();
    assert_eq!(name.value, Some(Value::StringValue(String::from("portcullis"))));
    assert_eq!(request.resource_spans[0].scope_spans[0].spans.len(), 2);
    assert_eq!(program.ended().await, Some(0));
}
