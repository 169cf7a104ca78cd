//! The layer through its public interface.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![expect(clippy::needless_pass_by_value, reason = "a service is given its request")]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::num::{NonZeroU16, NonZeroU32};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use portcullis_circuit_break::{CircuitBreakLayer, Handle, Mode, OpenTime, Reason, Share, State, Window};
use portcullis_core::{
    Carried, Clock, Endpoint, GRPC_RETRY_PUSHBACK, GRPC_STATUS, Head, Instance, Layer as Name, Moment, Mover, Outcome,
    Permit, Ration, Rejection, Standard, Verdict,
};
use portcullis_testing::contract::{self, Broken, Calls, Probe, ProbeBody};
use tower::{Layer, Service, ServiceExt};

const S: Duration = Duration::from_secs(1);

/// Answers with the status the request's path names; `error` is an error.
fn by_path(request: Request<()>) -> std::future::Ready<Result<Response<Full<Bytes>>, &'static str>> {
    let path = request.uri().path().trim_start_matches('/');
    std::future::ready(match path {
        "error" => Err("refused"),
        status => Ok(Response::builder().status(status).body(Full::default()).unwrap()),
    })
}

fn to(path: &str) -> Request<()> {
    Request::builder().uri(format!("/{path}")).body(()).unwrap()
}

/// The status a request to `path` gets; 0 for an error.
async fn ask<S, B>(service: &S, path: &str) -> u16
where
    S: Service<Request<()>, Response = Response<B>> + Clone,
{
    service.clone().oneshot(to(path)).await.map_or(0, |response| response.status().as_u16())
}

async fn ask_times<S, B>(service: &S, path: &str, times: usize)
where
    S: Service<Request<()>, Response = Response<B>> + Clone,
{
    for _ in 0..times {
        ask(service, path).await;
    }
}

fn endpoint() -> Endpoint {
    Endpoint::new("orders", Instance::new("a", SocketAddr::from(([127, 0, 0, 1], 1))))
}

fn permitted(path: &str, permit: Permit) -> Request<()> {
    let mut request = to(path);
    permit.attach(request.extensions_mut());
    request
}

fn two() -> NonZeroU16 {
    NonZeroU16::new(2).unwrap()
}

fn probing<B>() -> (Probe<B>, Calls<B>) {
    contract::probe()
}

#[tokio::test(start_paused = true)]
async fn it_keeps_the_contract() {
    contract::holds(CircuitBreakLayer::new(), Request::new).await;
}

#[tokio::test(start_paused = true)]
async fn five_failures_in_a_row_open_it_for_a_minute_and_one_probe_closes_it() {
    let layer = CircuitBreakLayer::new();
    let (service, whole) = (layer.layer(tower::service_fn(by_path)), layer.handle().whole());
    ask_times(&service, "500", 4).await;
    ask(&service, "200").await;
    ask_times(&service, "500", 4).await;
    assert_eq!((whole.state(), whole.failures_in_a_row()), (State::Closed, Some(4)));
    assert_eq!(ask(&service, "error").await, 0);
    assert_eq!((whole.state(), whole.open_for()), (State::Open, Some(60 * S)));
    tokio::time::advance(59 * S).await;
    assert_eq!(ask(&service, "200").await, 503);
    tokio::time::advance(S).await;
    assert_eq!(ask(&service, "500").await, 500, "this was the probe");
    assert_eq!(whole.state(), State::Open);
    assert_eq!(ask(&service, "200").await, 503);
    tokio::time::advance(60 * S).await;
    assert_eq!(ask(&service, "200").await, 200);
    assert_eq!(whole.state(), State::Closed);
    assert_eq!(whole.counts().refused, 2);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_says_who_and_when() {
    let service = CircuitBreakLayer::new().failures(1).open_for(Duration::from_millis(2500));
    let service = service.layer(tower::service_fn(by_path));
    ask(&service, "500").await;
    let refused = service.clone().oneshot(to("200")).await.unwrap();
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(refused.headers()["retry-after"], "3");
    let rejection = refused.extensions().get::<Rejection>().unwrap();
    assert_eq!((rejection.layer(), rejection.reason()), (Name::CircuitBreak, "open"));
    let mut request = to("200");
    request.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    let refused = service.oneshot(request).await.unwrap();
    assert_eq!(refused.status(), StatusCode::OK);
    assert_eq!(refused.headers()[GRPC_STATUS], "14");
    assert_eq!(refused.headers()[GRPC_RETRY_PUSHBACK], "2500");
}

#[tokio::test(start_paused = true)]
async fn services_of_one_layer_share_one_breaker() {
    let layer = CircuitBreakLayer::new();
    let (a, b) = (layer.layer(tower::service_fn(by_path)), layer.clone().layer(tower::service_fn(by_path)));
    ask_times(&a, "500", 3).await;
    ask_times(&b.clone(), "500", 2).await;
    assert_eq!((ask(&a, "200").await, ask(&b, "200").await), (503, 503));
}

#[tokio::test(start_paused = true)]
async fn with_a_permit_each_endpoint_has_its_own_breaker_and_its_gate_is_moved() {
    let layer = CircuitBreakLayer::new().failures(2);
    let service = layer.layer(tower::service_fn(by_path));
    let (sick, well, now) = (endpoint(), endpoint(), || Clock::system().now());
    for _ in 0..2 {
        service.clone().oneshot(permitted("500", sick.permit(now).unwrap())).await.unwrap();
        service.clone().oneshot(permitted("200", well.permit(now).unwrap())).await.unwrap();
    }
    assert!(sick.permit(now).is_err(), "the balancer sees it at the gate");
    assert!(well.gate().admits());
    assert_eq!(layer.handle().endpoint(&sick).state(), State::Open);
    assert_eq!(layer.handle().whole().state(), State::Closed);
    tokio::time::advance(60 * S).await;
    let probe = sick.permit(now).unwrap();
    assert!(sick.permit(now).is_err(), "one at a time");
    service.clone().oneshot(permitted("200", probe)).await.unwrap();
    assert!(sick.gate().admits());
}

#[tokio::test(start_paused = true)]
async fn a_permit_without_a_right_has_the_gate_asked() {
    let layer = CircuitBreakLayer::new().failures(1);
    let service = layer.layer(tower::service_fn(by_path));
    let endpoint = endpoint();
    let ask = async |path| {
        let request = permitted(path, Permit::without_right(endpoint.clone()));
        service.clone().oneshot(request).await.unwrap().status().as_u16()
    };
    assert_eq!((ask("500").await, ask("200").await), (500, 503));
    assert_eq!(layer.handle().endpoint(&endpoint).counts().refused, 1);
    tokio::time::advance(60 * S).await;
    assert_eq!((ask("200").await, ask("200").await), (200, 200));
}

#[tokio::test(start_paused = true)]
async fn a_forced_pass_is_let_through_and_changes_nothing() {
    let layer = CircuitBreakLayer::new().failures(1);
    let service = layer.layer(tower::service_fn(by_path));
    let endpoint = endpoint();
    for _ in 0..3 {
        let response = service.clone().oneshot(permitted("500", endpoint.permit_by_force())).await.unwrap();
        assert_eq!(response.status().as_u16(), 500);
    }
    let breaker = layer.handle().endpoint(&endpoint);
    assert_eq!((breaker.state(), breaker.counts().failed), (State::Closed, 0));
}

#[tokio::test(start_paused = true)]
async fn a_grpc_failure_in_the_trailers_counts() {
    let layer = CircuitBreakLayer::new().failures(1);
    let (probe, mut calls) = probing::<()>();
    let mut service = layer.layer(probe);
    let call = service.ready().await.unwrap().call(to("grpc"));
    let (mut sender, body) = contract::body();
    let response = Response::builder().header("content-type", "application/grpc").body(body).unwrap();
    let answer = tokio::spawn(call);
    calls.next().await.answer(response);
    let body = answer.await.unwrap().unwrap().into_body();
    assert_eq!(layer.handle().whole().state(), State::Closed, "not over yet");
    let trailers = HeaderMap::from_iter([
        (GRPC_STATUS, HeaderValue::from_static("14")),
        (GRPC_RETRY_PUSHBACK, HeaderValue::from_static("90000")),
    ]);
    sender.send_trailers(trailers).await.unwrap();
    drop(sender);
    assert!(body.collect().await.unwrap().trailers().is_some(), "trailers pass through");
    let whole = layer.handle().whole();
    assert_eq!((whole.state(), whole.open_for()), (State::Open, Some(90 * S)), "the pushback was heard");
}

#[tokio::test(start_paused = true)]
async fn a_body_cut_short_is_a_failure_and_a_body_dropped_is_not() {
    for (cut, expected) in [(true, State::Open), (false, State::Closed)] {
        let layer = CircuitBreakLayer::new().failures(1);
        let (probe, mut calls) = probing::<()>();
        let mut service = layer.layer(probe);
        let answer = tokio::spawn(service.ready().await.unwrap().call(to("200")));
        let (sender, body) = contract::body();
        calls.next().await.answer(Response::new(body));
        let body = answer.await.unwrap().unwrap().into_body();
        if cut {
            sender.abort(Broken("reset"));
            assert!(body.collect().await.is_err());
        } else {
            drop(body);
            assert_eq!(layer.handle().whole().counts().ignored, 1);
        }
        assert_eq!(layer.handle().whole().state(), expected);
    }
}

#[tokio::test(start_paused = true)]
async fn what_counts_as_a_failure_can_be_replaced() {
    let teapots = |head: Head<'_>| match head.status.as_u16() {
        418 => Verdict::Decided(Outcome::Failure),
        _ => Verdict::AtEnd,
    };
    let service = CircuitBreakLayer::new().failures(1).with_classify(teapots).layer(tower::service_fn(by_path));
    assert_eq!((ask(&service, "500").await, ask(&service, "418").await, ask(&service, "200").await), (500, 418, 503));
}

#[tokio::test(start_paused = true)]
async fn too_many_requests_count_if_told_so() {
    let layer = CircuitBreakLayer::new().failures(1);
    let service = layer.layer(tower::service_fn(by_path));
    assert_eq!((ask(&service, "429").await, ask(&service, "200").await), (429, 200));
    let layer = layer.with_classify(Standard::default().exhausted(Outcome::Failure));
    let service = layer.layer(tower::service_fn(by_path));
    assert_eq!((ask(&service, "429").await, ask(&service, "200").await), (429, 503));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_asks_for_rest_gets_it() {
    let layer = CircuitBreakLayer::new().failures(1);
    let tired = tower::service_fn(|_: Request<()>| async {
        let response = Response::builder().status(503).header("retry-after", "120");
        Ok::<_, Infallible>(response.body(Full::<Bytes>::default()).unwrap())
    });
    layer.layer(tired).oneshot(to("")).await.unwrap();
    assert_eq!(layer.handle().whole().open_for(), Some(120 * S));
}

#[tokio::test(start_paused = true)]
async fn shares_in_windows_open_it() {
    let half = Share::new(0.5).unwrap();
    let calls = Window::of_calls(10).unwrap().failure_rate(half);
    let time = Window::of_time(10 * S).unwrap().failure_rate(half).at_least(4);
    for window in [calls, time] {
        let layer = CircuitBreakLayer::new().failures(0).window(window);
        let service = layer.layer(tower::service_fn(by_path));
        let mut changes = layer.handle().changes();
        ask_times(&service, "500", 3).await;
        ask_times(&service, "200", 4).await;
        assert_eq!(layer.handle().whole().state(), State::Closed);
        ask_times(&service, "500", 3).await;
        assert_eq!(layer.handle().whole().state(), State::Open);
        assert_eq!(changes.next().await.unwrap().reason, Reason::FailureRate);
    }
}

#[tokio::test(start_paused = true)]
async fn slow_calls_open_it_though_they_succeed() {
    let window = Window::of_calls(4).unwrap().slow_rate(2 * S, Share::new(0.75).unwrap());
    let layer = CircuitBreakLayer::new().window(window);
    let service = layer.layer(tower::service_fn(async |request: Request<()>| {
        tokio::time::sleep(request.uri().path().trim_start_matches('/').parse::<u32>().unwrap() * S).await;
        Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
    }));
    for path in ["1", "2", "3"] {
        ask(&service, path).await;
    }
    assert_eq!(layer.handle().whole().call_rates().map(|rates| (rates.calls, rates.slow)), Some((3, 2)));
    ask(&service, "2").await;
    for (probe, state) in [("2", State::Open), ("1", State::Closed)] {
        assert_eq!(layer.handle().whole().state(), State::Open);
        tokio::time::sleep(layer.handle().whole().open_for().unwrap() + S).await;
        ask(&service, probe).await;
        assert_eq!(layer.handle().whole().state(), state, "as slow as what opened it, or not");
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_ends_in_an_error_is_as_slow_as_that_was() {
    let window = Window::of_calls(4).unwrap().slow_rate(2 * S, Share::new(1.0).unwrap());
    let layer = CircuitBreakLayer::new().failures(0).window(window);
    let hangs = tower::service_fn(async |_: Request<()>| {
        tokio::time::sleep(5 * S).await;
        Err::<Response<Full<Bytes>>, _>("no answer")
    });
    ask_times(&layer.layer(hangs), "", 4).await;
    assert_eq!(layer.handle().whole().state(), State::Open);
}

/// Or the log would be of nothing else, and its first opening in earnest as long as its longest.
#[tokio::test(start_paused = true)]
async fn one_that_only_counts_speaks_as_often_as_it_would_open() {
    let layer = CircuitBreakLayer::new().failures(1).open_for(OpenTime::growing(10 * S, 40 * S).jitter(None));
    let (service, mut changes) = (layer.layer(tower::service_fn(by_path)), layer.handle().changes());
    layer.handle().set_mode(Mode::MetricsOnly);
    for _ in 0..90 {
        ask_times(&service, "500", 10).await;
        tokio::time::advance(S).await;
    }
    let said = || changes.next().now_or_never()?;
    let open_for: Vec<_> = std::iter::from_fn(said).map(|change| (change.enforced, change.open_for)).collect();
    assert_eq!(open_for, [10, 20, 40, 40].map(|seconds| (false, Some(seconds * S))));
}

#[tokio::test(start_paused = true)]
async fn it_takes_as_many_successes_as_were_asked_for_to_close() {
    let layer = CircuitBreakLayer::new().failures(1).probes(two()).successes(two());
    let (service, whole) = (layer.layer(tower::service_fn(by_path)), layer.handle().whole());
    ask(&service, "500").await;
    tokio::time::advance(60 * S).await;
    assert_eq!((ask(&service, "200").await, whole.state()), (200, State::HalfOpen));
    assert_eq!((ask(&service, "200").await, whole.state()), (200, State::Closed));
}

#[tokio::test(start_paused = true)]
async fn open_time_grows_while_it_keeps_failing() {
    let growing = OpenTime::growing(5 * S, 60 * S).jitter(None);
    let layer = CircuitBreakLayer::new().failures(1).open_for(growing);
    let (service, whole) = (layer.layer(tower::service_fn(by_path)), layer.handle().whole());
    for expected in [5, 10, 20, 40, 60, 60] {
        assert_eq!(ask(&service, "500").await, 500);
        assert_eq!(whole.open_for(), Some(expected * S));
        tokio::time::advance(expected * S).await;
    }
}

#[tokio::test(start_paused = true)]
async fn changes_are_told_in_order() {
    let layer = CircuitBreakLayer::new().failures(1);
    let service = layer.layer(tower::service_fn(by_path));
    let mut changes = layer.handle().changes();
    ask(&service, "500").await;
    tokio::time::advance(60 * S).await;
    ask(&service, "200").await;
    let mut told = Vec::new();
    for _ in 0..3 {
        let change = changes.next().await.unwrap();
        assert!(change.scope.is_whole());
        told.push((change.from, change.to, change.reason));
    }
    let expected = [
        (State::Closed, State::Open, Reason::Failures),
        (State::Open, State::HalfOpen, Reason::Probing),
        (State::HalfOpen, State::Closed, Reason::Recovered),
    ];
    assert_eq!(told, expected);
    drop((layer, service));
    assert!(changes.next().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_layer_that_goes_lets_its_endpoints_go() {
    let layer = CircuitBreakLayer::new().failures(1);
    let endpoint = endpoint();
    let request = permitted("500", endpoint.permit(|| Moment::MIN).unwrap());
    layer.layer(tower::service_fn(by_path)).oneshot(request).await.unwrap();
    assert!(!endpoint.gate().admits());
    drop(layer);
    assert!(endpoint.gate().admits());
}

#[tokio::test(start_paused = true)]
async fn a_layer_that_goes_is_forgotten_by_gates_it_moved_long_ago() {
    let (layer, endpoint) = (CircuitBreakLayer::new().failures(1), endpoint());
    let service = layer.layer(tower::service_fn(by_path));
    for path in ["500", "200"] {
        let permit = endpoint.permit(|| Clock::system().now()).unwrap();
        service.clone().oneshot(permitted(path, permit)).await.unwrap();
        tokio::time::advance(60 * S).await;
    }
    assert_eq!((layer.handle().endpoint(&endpoint).state(), endpoint.gate().movers()), (State::Closed, 1));
    drop((layer, service));
    assert_eq!(endpoint.gate().movers(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_that_comes_when_another_is_gone_begins_anew() {
    let layer = CircuitBreakLayer::new().failures(3);
    let service = layer.layer(tower::service_fn(by_path));
    for round in 0..300 {
        let endpoint = endpoint();
        let breaker = layer.handle().endpoint(&endpoint);
        assert_eq!((breaker.state(), breaker.failures_in_a_row()), (State::Closed, Some(0)));
        assert_eq!((breaker.counts(), breaker.mode()), (Default::default(), Mode::Normal));
        if round % 3 == 0 {
            breaker.set_mode(Some(Mode::ForcedClosed));
        }
        for _ in 0..1 + round % 4 {
            let permit = Permit::without_right(endpoint.clone());
            service.clone().oneshot(permitted("500", permit)).await.unwrap();
        }
        let expected = if round % 3 != 0 && round % 4 > 1 { State::Open } else { State::Closed };
        assert_eq!(breaker.state(), expected);
    }
}

#[tokio::test(start_paused = true)]
async fn another_movers_refusal_has_no_time() {
    let endpoint = endpoint();
    endpoint.gate().close_for(Mover::new());
    let service = CircuitBreakLayer::new().layer(tower::service_fn(by_path));
    let refused = service.oneshot(permitted("200", Permit::without_right(endpoint))).await.unwrap();
    assert_eq!(refused.status().as_u16(), 503);
    assert!(!refused.headers().contains_key("retry-after"));
}

#[tokio::test(start_paused = true)]
async fn a_ration_of_anothers_is_no_probe_of_ours() {
    let (endpoint, layer) = (endpoint(), CircuitBreakLayer::new().failures(2));
    let ration = Ration { until: Moment::MIN, places: 1, every: S };
    endpoint.gate().ration(Mover::new(), portcullis_core::Generation::FIRST, ration).unwrap();
    let service = layer.layer(tower::service_fn(by_path));
    service.clone().oneshot(permitted("500", endpoint.permit(|| Clock::system().now()).unwrap())).await.unwrap();
    let breaker = layer.handle().endpoint(&endpoint);
    assert_eq!((breaker.state(), breaker.failures_in_a_row()), (State::Closed, Some(1)));
}

#[tokio::test(start_paused = true)]
async fn forced_open_stays_open_until_told_otherwise() {
    let layer = CircuitBreakLayer::new();
    let (service, handle) = (layer.layer(tower::service_fn(by_path)), layer.handle());
    handle.set_mode(Mode::ForcedOpen);
    tokio::time::advance(3600 * S).await;
    assert_eq!(ask(&service, "200").await, 503);
    handle.set_mode(Mode::Normal);
    assert_eq!(ask(&service, "200").await, 200);
    handle.whole().set_mode(Some(Mode::ForcedOpen));
    assert_eq!(ask(&service, "200").await, 503);
    handle.whole().set_mode(None);
    assert_eq!(ask(&service, "200").await, 200);
    assert_eq!(handle.whole().counts().refused, 2);
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_that_is_forced_open_is_refused_at_its_gate_until_the_layer_goes() {
    let (layer, endpoint) = (CircuitBreakLayer::new(), endpoint());
    layer.handle().endpoint(&endpoint).set_mode(Some(Mode::ForcedOpen));
    assert!(endpoint.permit(|| Clock::system().now()).is_err());
    let request = permitted("200", endpoint.permit_by_force());
    let response = layer.layer(tower::service_fn(by_path)).oneshot(request).await.unwrap();
    assert_eq!(response.status().as_u16(), 503, "a panic does not undo it");
    drop(layer);
    assert!(endpoint.gate().admits());
}

#[tokio::test(start_paused = true)]
async fn forced_closed_counts_and_never_opens() {
    let layer = CircuitBreakLayer::new().failures(1);
    let (service, whole) = (layer.layer(tower::service_fn(by_path)), layer.handle().whole());
    ask(&service, "500").await;
    assert_eq!(ask(&service, "200").await, 503);
    layer.handle().set_mode(Mode::ForcedClosed);
    assert_eq!(whole.state(), State::Closed, "what was open closes");
    ask_times(&service, "500", 3).await;
    assert_eq!((ask(&service, "200").await, whole.counts().failed), (200, 4));
    layer.handle().set_mode(Mode::Normal);
    ask(&service, "500").await;
    assert_eq!(whole.state(), State::Open);
}

#[tokio::test(start_paused = true)]
async fn disabled_counts_nothing() {
    let layer = CircuitBreakLayer::new().failures(1);
    let service = layer.layer(tower::service_fn(by_path));
    layer.handle().set_mode(Mode::Disabled);
    ask_times(&service, "500", 3).await;
    assert_eq!((ask(&service, "200").await, layer.handle().whole().counts().failed), (200, 0));
    layer.handle().whole().set_mode(Some(Mode::Normal));
    ask(&service, "500").await;
    assert_eq!(layer.handle().whole().state(), State::Open, "its own mode goes first");
}

#[tokio::test(start_paused = true)]
async fn metrics_only_tells_when_it_would_open_and_refuses_nothing() {
    let layer = CircuitBreakLayer::new().failures(2);
    let service = layer.layer(tower::service_fn(by_path));
    let mut changes = layer.handle().changes();
    layer.handle().set_mode(Mode::MetricsOnly);
    for _ in 0..2 {
        ask_times(&service, "500", 4).await;
        let change = changes.next().await.unwrap();
        assert_eq!((change.to, change.enforced), (State::Open, false));
        tokio::time::advance(60 * S).await;
    }
    assert_eq!(ask(&service, "200").await, 200);
    assert_eq!(layer.handle().whole().state(), State::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_listener_may_use_the_handle() {
    let handle = std::sync::Arc::new(std::sync::OnceLock::<Handle>::new());
    let seen = handle.clone();
    let layer = CircuitBreakLayer::new().failures(1).on_change(move |change| {
        if change.to == State::Open {
            seen.get().unwrap().set_mode(Mode::ForcedClosed);
            seen.get().unwrap().whole().set_mode(Some(Mode::ForcedClosed));
        }
    });
    handle.set(layer.handle()).unwrap();
    let service = layer.layer(tower::service_fn(by_path));
    assert_eq!((ask(&service, "500").await, ask(&service, "200").await), (500, 200));
    assert_eq!(layer.handle().whole().state(), State::Closed);
}

#[tokio::test(start_paused = true)]
async fn each_key_has_its_own_breaker_and_none_is_by_position() {
    let limit = NonZeroU32::new(100).unwrap();
    let by_tenant = |request: &Request<()>| request.headers().get("tenant").cloned();
    let layer = CircuitBreakLayer::new().failures(1).with_key(limit, by_tenant);
    let service = layer.layer(tower::service_fn(by_path));
    let mut changes = layer.handle().changes();
    let ask = async |tenant: &'static str, path| {
        let mut request = to(path);
        request.headers_mut().insert("tenant", HeaderValue::from_static(tenant));
        service.clone().oneshot(request).await.unwrap().status().as_u16()
    };
    assert_eq!((ask("a", "500").await, ask("a", "200").await, ask("b", "200").await), (500, 503, 200));
    assert_eq!(service.clone().oneshot(to("200")).await.unwrap().status().as_u16(), 200);
    let (a, b) = (HeaderValue::from_static("a"), HeaderValue::from_static("b"));
    assert_eq!(layer.key(&a).unwrap().state(), State::Open);
    assert_eq!(layer.key(&b).unwrap().state(), State::Closed);
    assert_eq!((layer.keys(), layer.handle().whole().state()), (2, State::Closed));
    assert_eq!(changes.next().await.unwrap().scope.as_key(), Some(&a));
    layer.handle().set_mode(Mode::ForcedClosed);
    assert_eq!(ask("a", "200").await, 200, "what has a key obeys, too");
}

#[test]
fn everything_is_send_and_sync() {
    fn is<T: Send + Sync>() {}
    fn is_send<T: Send>() {}
    is::<CircuitBreakLayer>();
    is::<portcullis_circuit_break::CircuitBreak<()>>();
    is::<portcullis_circuit_break::Handle>();
    is_send::<portcullis_circuit_break::ResponseFuture<std::future::Ready<()>>>();
    is_send::<portcullis_circuit_break::ResponseBody<ProbeBody>>();
}
