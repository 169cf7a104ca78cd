//! The layer through its public interface.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on panics")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use http::{Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use portcullis_balance::{
    Asked, Balance, BalanceLayer, Budget, Candidates, HashKey, LeastConnections, Maglev, PeakEwma, Pick, Policy,
    PowerOfTwo, Prefer, Random, Reason, Replay, RingHash, RoundRobin, Served, SlowStart, Sticky, Subset, Watch, Zone,
};
use portcullis_core::{
    Body, Carried, Clock, Deadline, Endpoint, Endpoints, Generation, HeadDeadline, Instance, Layer, Moment, Mover,
    Permit, Ration, Rejection, Route,
};
use portcullis_testing::contract::{self, Call, Calls, Probe, ProbeBody, full, probe};
use tower::{Layer as _, Service, ServiceExt};

type Inner = Probe<Replay<ProbeBody>>;

fn endpoints(n: u16) -> Endpoints {
    let instance = |i| Instance::new(format!("{i}"), SocketAddr::from(([10, 0, 0, 1], 1000 + i)));
    Endpoints::none("s").reconcile((0..n).map(instance), Moment::MIN)
}

fn request(endpoints: &Endpoints) -> Request<ProbeBody> {
    request_of(Method::GET, endpoints, "")
}

fn request_of(method: Method, endpoints: &Endpoints, body: &'static str) -> Request<ProbeBody> {
    let mut request = Request::builder().method(method).header("x-mine", "1").body(full(body)).unwrap();
    endpoints.clone().attach(request.extensions_mut());
    request
}

fn service<P: Pick>(layer: &BalanceLayer<P>) -> (Balance<Inner, P>, Calls<Replay<ProbeBody>>) {
    let (probe, calls) = probe();
    (layer.layer(probe), calls)
}

fn picked<B>(request: &Request<B>) -> Endpoint {
    Permit::of(request.extensions()).unwrap().endpoint().clone()
}

/// How forward says that the endpoint could not be used.
fn failed(status: StatusCode, sent: bool) -> Response<ProbeBody> {
    let mut response = Response::builder().status(status).body(full("")).unwrap();
    let rejection = Rejection::new(Layer::Forward, status, "test").with_sent(sent);
    response.extensions_mut().insert(rejection);
    response
}

fn unsent() -> Response<ProbeBody> {
    failed(StatusCode::BAD_GATEWAY, false)
}

fn ok() -> Response<ProbeBody> {
    Response::new(full("ok"))
}

fn close(endpoint: &Endpoint, until: Moment) {
    let ration = Ration { until, places: 1, every: Duration::from_secs(60) };
    endpoint.gate().ration(Mover::new(), Generation::FIRST, ration).unwrap();
}

/// Calls, and answers with what `answer` says until it says nothing more.
async fn serve<P: Pick>(
    service: &mut Balance<Inner, P>,
    calls: &mut Calls<Replay<ProbeBody>>,
    request: Request<ProbeBody>,
    mut answer: impl FnMut(&Call<Replay<ProbeBody>>) -> Response<ProbeBody>,
) -> (Response<Body<ProbeBody, Watch<P>>>, Vec<Endpoint>) {
    let mut seen = Vec::new();
    let mut future = Box::pin(service.ready().await.unwrap().call(request));
    loop {
        tokio::select! {
            biased;
            response = &mut future => return (response.unwrap(), seen),
            call = calls.next() => {
                seen.push(picked(&call.request));
                let response = answer(&call);
                call.answer(response);
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_contract_holds() {
    let set = endpoints(3);
    let with_endpoints = |body: ProbeBody| request(&set).map(|_| body);
    contract::holds(BalanceLayer::new(RoundRobin::new()), with_endpoints).await;
    contract::holds(BalanceLayer::new(PeakEwma::new()).attempts(1), with_endpoints).await;
    contract::holds(BalanceLayer::new(PowerOfTwo), Request::new).await;
}

#[tokio::test(start_paused = true)]
async fn a_policy_can_be_a_trait_object() {
    for pick in [Box::new(Random) as Box<dyn Pick>, Box::new(|among: &Candidates<'_>| among.len().checked_sub(1))] {
        let (mut service, mut calls) = service(&BalanceLayer::new(pick));
        let (response, _) = serve(&mut service, &mut calls, request(&endpoints(2)), |_| ok()).await;
        assert_eq!(response.status(), 200);
    }
}

#[tokio::test(start_paused = true)]
async fn without_endpoints_a_request_passes_untouched() {
    let (mut service, mut calls) = service(&BalanceLayer::new(Random));
    let call = service.ready().await.unwrap().call(Request::new(full("body")));
    let answer = async {
        let call = calls.next().await;
        assert!(Permit::of(call.request.extensions()).is_none());
        let request = call.answer(ok());
        assert_eq!(request.into_body().collect().now_or_never().unwrap().unwrap().to_bytes(), "body");
    };
    let (response, ()) = futures::join!(call, answer);
    assert!(response.unwrap().extensions().get::<Served>().is_none());
}

#[tokio::test(start_paused = true)]
async fn no_endpoints_are_a_503_that_says_so() {
    let (mut service, calls) = service(&BalanceLayer::new(Random));
    let response = service.ready().await.unwrap().call(request(&endpoints(0))).await.unwrap();
    assert_eq!(response.status(), 503);
    let rejection = response.extensions().get::<Rejection>().unwrap();
    assert_eq!((rejection.layer(), rejection.reason()), (Layer::Balance, "no-endpoints"));
    assert_eq!(calls.count(), 0);
}

#[tokio::test(start_paused = true)]
async fn services_of_one_layer_share_turns_and_counts() {
    let set = endpoints(4);
    let layer = BalanceLayer::new(RoundRobin::new());
    let ((mut one, mut of_one), (two, mut of_two)) = (service(&layer), service(&layer.clone()));
    let mut seen = Vec::new();
    for _ in 0..2 {
        seen.extend(serve(&mut one, &mut of_one, request(&set), |_| ok()).await.1);
        seen.extend(serve(&mut two.clone(), &mut of_two, request(&set), |_| ok()).await.1);
    }
    assert!(set.iter().all(|endpoint| seen.contains(endpoint)), "four turns, each another endpoint's");
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_is_busy_until_the_body_ends_or_is_dropped() {
    let set = endpoints(1);
    let (mut service, mut calls) = service(&BalanceLayer::new(LeastConnections::new()));
    let (response, _) = serve(&mut service, &mut calls, request(&set), |_| ok()).await;
    assert_eq!(set[0].in_flight(), 1);
    response.into_body().collect().await.unwrap();
    assert_eq!(set[0].in_flight(), 0);

    let (response, _) = serve(&mut service, &mut calls, request(&set), |_| ok()).await;
    drop(response);
    assert_eq!(set[0].in_flight(), 0, "the body was dropped");

    let mut call = Box::pin(service.ready().await.unwrap().call(request(&set)));
    assert!(futures::poll!(&mut call).is_pending());
    assert_eq!(set[0].in_flight(), 1);
    drop(call);
    assert_eq!(set[0].in_flight(), 0, "the call was dropped");
}

#[tokio::test(start_paused = true)]
async fn what_was_not_sent_goes_elsewhere_with_its_whole_body() {
    for method in [Method::GET, Method::POST] {
        let set = endpoints(3);
        let (mut service, mut calls) = service(&BalanceLayer::new(RoundRobin::new()));
        let call = service.ready().await.unwrap().call(request_of(method, &set, "all of it"));
        let answer = async {
            let first = calls.next().await;
            let tried = picked(&first.request);
            let mut body = first.answer(unsent()).into_body();
            let second = calls.next().await;
            assert_ne!(picked(&second.request), tried);
            assert_eq!(second.request.headers()["x-mine"], "1");
            assert!(body.frame().await.unwrap().is_err(), "the first attempt must not read on");
            let request = second.answer(ok());
            assert_eq!(request.into_body().collect().now_or_never().unwrap().unwrap().to_bytes(), "all of it");
            tried
        };
        let (response, tried) = futures::join!(call, answer);
        let response = response.unwrap();
        let served = response.extensions().get::<Served>().unwrap();
        assert_eq!((response.status(), served.attempts()), (StatusCode::OK, 2));
        assert_eq!((&served.failed()[0].endpoint, served.failed()[0].reason), (&tried, Reason::Unsent));
        assert_eq!(tried.in_flight(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn attempts_end_and_the_last_response_is_the_answer() {
    let set = endpoints(5);
    for (attempts, expected) in [(0, 1), (1, 1), (2, 2), (4, 4)] {
        let (mut service, mut calls) = service(&BalanceLayer::new(Random).attempts(attempts));
        let (response, seen) = serve(&mut service, &mut calls, request(&set), |_| unsent()).await;
        assert_eq!((response.status(), seen.len()), (StatusCode::BAD_GATEWAY, expected));
        let distinct: std::collections::HashSet<_> = seen.iter().map(Endpoint::handle).collect();
        assert_eq!(distinct.len(), expected, "no endpoint is tried twice while others admit");
        assert!(set.iter().all(|endpoint| endpoint.in_flight() <= 1));
    }
    assert!(set.iter().all(|endpoint| endpoint.in_flight() == 0));
}

#[tokio::test(start_paused = true)]
async fn what_was_sent_is_repeated_only_if_it_may_be() {
    let reset = |_: &Call<_>| failed(StatusCode::BAD_GATEWAY, true);
    let set = endpoints(3);
    let layer = BalanceLayer::new(RoundRobin::new());
    for (method, any, expected) in [
        (Method::GET, false, 2),
        (Method::PUT, false, 2),
        (Method::POST, false, 1),
        (Method::PATCH, false, 1),
        (Method::POST, true, 2),
    ] {
        let layer = layer.clone().policy(Policy::new().repeat_any_method(any));
        let (mut service, mut calls) = service(&layer);
        let request = request_of(method.clone(), &set, "");
        let (_, seen) = serve(&mut service, &mut calls, request, reset).await;
        assert_eq!(seen.len(), expected, "{method} {any}");
    }
}

#[tokio::test(start_paused = true)]
async fn listed_statuses_are_tried_elsewhere_after_a_wait() {
    let policy = Policy::new().attempts(3).on_statuses([StatusCode::SERVICE_UNAVAILABLE]);
    let (mut service, mut calls) = service(&BalanceLayer::new(RoundRobin::new()).policy(policy));
    let busy = |_: &Call<_>| Response::builder().status(503).body(full("busy")).unwrap();
    let (rounds, mut waited) = (40, Duration::ZERO);
    for _ in 0..rounds {
        let began = tokio::time::Instant::now();
        let (response, seen) = serve(&mut service, &mut calls, request(&endpoints(5)), busy).await;
        assert_eq!((response.status(), seen.len()), (StatusCode::SERVICE_UNAVAILABLE, 3));
        assert!(began.elapsed() < Duration::from_millis(78), "{:?}", began.elapsed());
        waited += began.elapsed();
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "busy");
    }
    // Half of 25 and half of 50 in the mean; the clock of tests goes in whole milliseconds.
    let mean = waited.as_secs_f64() * 1e3 / f64::from(rounds);
    assert!((24.0..51.0).contains(&mean), "{mean} ms");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_waited_for_only_when_another_endpoint_admits() {
    let waited = async |set: Endpoints, policy: Policy| {
        let (mut service, mut calls) = service(&BalanceLayer::new(RoundRobin::new()).policy(policy.attempts(2)));
        let began = tokio::time::Instant::now();
        for _ in 0..40 {
            assert_eq!(serve(&mut service, &mut calls, request(&set), |_| unsent()).await.1.len(), 2);
        }
        began.elapsed()
    };
    assert_eq!(waited(endpoints(2), Policy::new()).await, Duration::ZERO);
    let one_closed = endpoints(2);
    one_closed[0].gate().close_for(Mover::new());
    // Half of 25 ms in the mean.
    assert!(waited(one_closed, Policy::new()).await > Duration::from_millis(200));
    let one_tagged = described(|i, instance| instance.tags.extend((i == 0).then(|| "a".to_owned())), 2);
    let waited_in = async |subset| waited(one_tagged.clone(), Policy::new().subset(subset)).await;
    assert!(waited_in(Subset::tag("a")).await > Duration::from_millis(200));
    assert!(waited_in(Subset::tag("a").or_any()).await > Duration::from_millis(200));
    assert_eq!(waited_in(Subset::tag("b").or_any()).await, Duration::ZERO, "all stand for a subset of none");
}

#[tokio::test(start_paused = true)]
async fn an_error_of_the_inner_service_passes_through_when_attempts_are_used_up() {
    let set = endpoints(2);
    let (mut service, mut calls) = service(&BalanceLayer::new(RoundRobin::new()));
    let call = service.ready().await.unwrap().call(request(&set));
    let answer = async {
        calls.next().await.fail();
        calls.next().await.fail();
    };
    let (response, ()) = futures::join!(call, answer);
    assert!(response.is_err());
    assert_eq!((set[0].in_flight(), set[0].requests(), set[1].requests()), (0, 1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_body_longer_than_what_is_kept_is_sent_once() {
    let layer = BalanceLayer::new(RoundRobin::new()).policy(Policy::new().replay(4));
    let (mut service, mut calls) = service(&layer);
    let call = service.ready().await.unwrap().call(request_of(Method::PUT, &endpoints(2), "too long"));
    let answer = async {
        let mut call = calls.next().await;
        assert_eq!(call.request.body_mut().collect().await.unwrap().to_bytes(), "too long");
        call.answer(failed(StatusCode::BAD_GATEWAY, true));
    };
    let (response, ()) = futures::join!(call, answer);
    assert_eq!((response.unwrap().status(), calls.count()), (StatusCode::BAD_GATEWAY, 1));
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_takes_too_long_is_given_up() {
    let set = endpoints(2);
    let policy = Policy::new().attempt_timeout(Duration::from_secs(1));
    let (mut service, mut calls) = service(&BalanceLayer::new(RoundRobin::new()).policy(policy));
    let call = service.ready().await.unwrap().call(request(&set));
    let answer = async {
        let (first, second) = (calls.next().await, calls.next().await);
        assert!(first.is_cancelled() && !second.is_cancelled());
        let deadline = HeadDeadline::of(second.request.extensions()).unwrap().0;
        assert!(Deadline::of(second.request.extensions()).is_none(), "bodies may take longer");
        assert!(deadline.since(Clock::system().now()) <= Duration::from_secs(1));
        (first, second)
    };
    let began = tokio::time::Instant::now();
    let (response, _calls) = futures::join!(call, answer);
    let response = response.unwrap();
    assert_eq!(response.status(), StatusCode::GATEWAY_TIMEOUT);
    assert!(began.elapsed() >= Duration::from_secs(2) && began.elapsed() < Duration::from_millis(2100));
    assert!(set.iter().all(|endpoint| endpoint.in_flight() == 0 && endpoint.requests() == 1));
}

#[tokio::test(start_paused = true)]
async fn nothing_is_tried_after_the_deadline() {
    let policy = Policy::new().attempts(9).backoff(Duration::from_secs(10), Duration::from_secs(10));
    let (mut service, mut calls) = service(&BalanceLayer::new(RoundRobin::new()).policy(policy));
    let mut request = request(&endpoints(3));
    let began = tokio::time::Instant::now();
    Deadline(Clock::system().now() + Duration::from_millis(1)).attach(request.extensions_mut());
    let (response, seen) = serve(&mut service, &mut calls, request, |_| failed(StatusCode::BAD_GATEWAY, true)).await;
    assert_eq!((response.status(), seen.len()), (StatusCode::BAD_GATEWAY, 1));
    assert!(began.elapsed() < Duration::from_millis(2));
}

#[tokio::test(start_paused = true)]
async fn a_route_has_a_policy_of_its_own() {
    let (mut service, mut calls) = service(&BalanceLayer::new(RoundRobin::new()));
    let mut request = request(&endpoints(3));
    Route::new("/once").with_policy(Policy::new().attempts(1)).attach(request.extensions_mut());
    let (_, seen) = serve(&mut service, &mut calls, request, |_| unsent()).await;
    assert_eq!(seen.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn who_does_not_admit_is_passed_over_and_shares_stay_even() {
    let set = endpoints(4);
    close(&set[1], Moment::MAX);
    let (mut service, mut calls) = service(&BalanceLayer::new(RoundRobin::new()));
    let mut seen = [0; 4];
    for _ in 0..300 {
        let (_, picked) = serve(&mut service, &mut calls, request(&set), |_| ok()).await;
        seen[set.iter().position(|endpoint| *endpoint == picked[0]).unwrap()] += 1;
    }
    assert_eq!(seen, [100, 0, 100, 100]);
}

#[tokio::test(start_paused = true)]
async fn a_gate_that_moves_is_seen_at_once() {
    let set = endpoints(2);
    let (mut service, mut calls) = service(&BalanceLayer::new(RoundRobin::new()));
    for _ in 0..3 {
        let mover = Mover::new();
        set[0].gate().close_for(mover);
        for _ in 0..4 {
            let (_, seen) = serve(&mut service, &mut calls, request(&set), |_| ok()).await;
            assert_eq!(seen, [set[1].clone()]);
        }
        set[0].gate().open_for(mover);
        let mut both = Vec::new();
        for _ in 0..2 {
            both.extend(serve(&mut service, &mut calls, request(&set), |_| ok()).await.1);
        }
        assert_ne!(both[0], both[1]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_half_open_endpoint_gets_its_counted_probes_whatever_the_policy() {
    let set = endpoints(10);
    close(&set[0], Moment::MIN);
    let never_the_first = |among: &Candidates<'_>| (0..among.len()).find(|i| **among[*i].id() != *"0");
    let (mut service, mut calls) = service(&BalanceLayer::new(never_the_first));
    let (mut probes, mut held) = (0, Vec::new());
    for _ in 0..200 {
        held.push(service.ready().await.unwrap().call(request(&set)));
        let call = calls.next().await;
        probes += usize::from(picked(&call.request) == set[0]);
        held.push(service.ready().await.unwrap().call(request(&set)));
        drop(calls.next().await);
        std::mem::forget(call);
    }
    assert_eq!(probes, 1);
}

#[tokio::test(start_paused = true)]
async fn nobody_who_admits_is_a_503_with_the_time() {
    let set = endpoints(3);
    let now = Clock::system().now();
    set.iter().zip([9, 8, 10]).for_each(|(endpoint, seconds)| close(endpoint, now + Duration::from_secs(seconds)));
    let layer = BalanceLayer::new(PowerOfTwo);
    let (mut service, calls) = service(&layer);
    let response = service.ready().await.unwrap().call(request(&set)).await.unwrap();
    assert_eq!((response.status(), calls.count()), (StatusCode::SERVICE_UNAVAILABLE, 0));
    assert_eq!(response.headers()["retry-after"], "8");
    assert_eq!(response.extensions().get::<Rejection>().unwrap().reason(), "none-admits");
    let refused = layer.choose(&set, Asked::of(&Request::new(()))).err().unwrap();
    assert_eq!(
        (refused.reason(), refused.retry_after().map(|wait| wait.as_secs_f64().ceil())),
        ("none-admits", Some(8.0))
    );
    let refused = layer.choose(&endpoints(0), Asked::of(&Request::new(()))).err().unwrap();
    assert_eq!((refused.reason(), refused.retry_after()), ("no-endpoints", None));
}

#[tokio::test(start_paused = true)]
async fn a_request_may_wait_for_somebody_to_admit() {
    let set = endpoints(1);
    let opens = Clock::system().now() + Duration::from_millis(500);
    close(&set[0], opens);
    let (mut service, mut calls) = service(&BalanceLayer::new(RoundRobin::new()).wait(Duration::from_secs(1)));
    let (response, _) = serve(&mut service, &mut calls, request(&set), |_| ok()).await;
    assert_eq!(response.status(), 200);
    assert!(Clock::system().now() >= opens);

    let set = endpoints(1);
    set[0].gate().close_for(Mover::new());
    let began = tokio::time::Instant::now();
    let (response, _) = serve(&mut service, &mut calls, request(&set), |_| ok()).await;
    assert_eq!((response.status(), began.elapsed().as_secs()), (StatusCode::SERVICE_UNAVAILABLE, 1));
}

#[tokio::test(start_paused = true)]
async fn only_so_many_wait_and_who_gives_up_makes_room() {
    let set = endpoints(1);
    let opens = Clock::system().now() + Duration::from_millis(500);
    close(&set[0], opens);
    let layer = BalanceLayer::new(RoundRobin::new()).wait(Duration::from_secs(1)).waiting(2);
    let (service, mut calls) = service(&layer);
    let call = || {
        let set = set.clone();
        Box::pin(service.clone().oneshot(request(&set)))
    };
    let (mut first, mut second) = (call(), call());
    assert!(futures::poll!(&mut first).is_pending() && futures::poll!(&mut second).is_pending());
    let refused = call().await.unwrap();
    assert_eq!(refused.extensions().get::<Rejection>().unwrap().reason(), "none-admits");
    assert_eq!(refused.headers()["retry-after"], "1");
    drop(second);
    let mut third = call();
    assert!(futures::poll!(&mut third).is_pending(), "there is room again");
    let answers = async {
        calls.next().await.answer(ok());
        calls.next().await.answer(ok());
    };
    let (first, third, ()) = futures::join!(first, third, answers);
    assert_eq!([first, third].map(|response| response.unwrap().status()), [StatusCode::OK; 2]);
}

#[tokio::test(start_paused = true)]
async fn below_the_panic_threshold_gates_are_not_obeyed() {
    let set = endpoints(10);
    set[..5].iter().for_each(|endpoint| close(endpoint, Moment::MAX));
    let count = async |layer: &BalanceLayer<RoundRobin>| {
        let (mut service, mut calls) = service(layer);
        let mut refused = 0;
        for _ in 0..100 {
            let call = service.ready().await.unwrap().call(request(&set));
            let mut inner = calls.next().await;
            let mut permit = Permit::take(inner.request.extensions_mut()).unwrap();
            let closed = !permit.endpoint().gate().admits();
            refused += usize::from(closed);
            assert_eq!(permit.take_pass().unwrap().is_forced(), closed);
            drop(call);
        }
        refused
    };
    let layer = BalanceLayer::new(RoundRobin::new());
    assert_eq!(count(&layer).await, 0, "half of them admit");
    close(&set[5], Moment::MAX);
    assert_eq!(count(&layer).await, 60, "four of ten admit");
    assert_eq!(count(&layer.clone().panic_threshold(0)).await, 0, "never panics");
}

#[tokio::test(start_paused = true)]
async fn in_a_panic_keys_go_where_they_went_before() {
    let set = endpoints(10);
    let layer = BalanceLayer::new(RingHash::by(HashKey::path()));
    layer.prepare(&set);
    let requests: Vec<_> = (0..100).map(|key| Request::get(format!("/{key}")).body(()).unwrap()).collect();
    let all = || {
        let choose = |request| layer.choose(&set, Asked::of(request)).unwrap().endpoint().handle();
        requests.iter().map(choose).collect::<Vec<_>>()
    };
    let before = all();
    set[..6].iter().for_each(|endpoint| close(endpoint, Moment::MAX));
    assert_eq!(all(), before);
}

#[tokio::test(start_paused = true)]
async fn nobody_asks_an_endpoint_of_weight_zero() {
    let three = endpoints(3);
    let set = Endpoints::none("s").reconcile(
        (0..3).map(|i| {
            let mut instance = (*three[i].instance()).clone();
            instance.weight = u32::from(i != 1);
            instance
        }),
        Moment::MIN,
    );
    let (mut service, mut calls) = service(&BalanceLayer::new(Random));
    for _ in 0..50 {
        let (_, seen) = serve(&mut service, &mut calls, request(&set), |_| ok()).await;
        assert_ne!(seen[0], set[1]);
    }
}

#[tokio::test(start_paused = true)]
async fn peak_ewma_learns_from_bodies_and_failures() {
    let set = endpoints(2);
    let (mut service, mut calls) = service(&BalanceLayer::new(PeakEwma::new()));
    let bad = set[0].clone();
    let mut seen_bad = 0;
    for _ in 0..200 {
        tokio::time::advance(Duration::from_millis(1)).await;
        let mut future = Box::pin(service.ready().await.unwrap().call(request(&set)));
        let call = calls.next().await;
        let fails = picked(&call.request) == bad;
        if !fails {
            tokio::time::advance(Duration::from_millis(20)).await;
        }
        seen_bad += usize::from(fails);
        call.answer(if fails { Response::builder().status(500).body(full("")).unwrap() } else { ok() });
        let response = (&mut future).await.unwrap();
        response.into_body().collect().await.unwrap();
    }
    assert!(seen_bad < 10, "one that fails at once got {seen_bad} of 200");
}

#[test]
fn services_and_futures_can_be_sent() {
    fn is_send<T: Send>(_: &T) {}
    fn is_send_and_sync<T: Send + Sync>(_: &T) {}
    let (mut service, _calls) = service(&BalanceLayer::new(PeakEwma::new()));
    is_send_and_sync(&service);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async {
        is_send(&service.ready().await.unwrap().call(request(&endpoints(1))));
    });
}

#[tokio::test(start_paused = true)]
async fn repetitions_are_bounded_by_one_budget_for_all_clones_but_not_what_was_not_sent() {
    let set = endpoints(3);
    let budget = Budget::new(0.0, 1, Duration::from_secs(10));
    let layer = BalanceLayer::new(RoundRobin::new()).budget(budget.clone());
    let mut attempts = 0;
    for _ in 0..30 {
        let (mut service, mut calls) = service(&layer.clone());
        let reset = |_: &Call<_>| failed(StatusCode::BAD_GATEWAY, true);
        attempts += serve(&mut service, &mut calls, request(&set), reset).await.1.len();
    }
    assert_eq!((attempts, budget.left(Clock::system().now())), (40, 0), "one a second, over ten seconds");
    let (mut service, mut calls) = service(&layer);
    assert_eq!(serve(&mut service, &mut calls, request(&set), |_| unsent()).await.1.len(), 2);
}

fn described(describe: impl Fn(u16, &mut Instance), n: u16) -> Endpoints {
    let instance = |i| {
        let mut instance = Instance::new(format!("{i}"), SocketAddr::from(([10, 0, 0, 1], 1000 + i)));
        describe(i, &mut instance);
        instance
    };
    Endpoints::none("s").reconcile((0..n).map(instance), Clock::system().now())
}

/// How often each endpoint is picked.
fn shares<P: Pick>(layer: &BalanceLayer<P>, set: &Endpoints, picks: usize, request: &Request<()>) -> Vec<usize> {
    let mut seen = vec![0; set.len()];
    for _ in 0..picks {
        if let Ok(permit) = layer.choose(set, Asked::of(request)) {
            seen[set.iter().position(|endpoint| endpoint == permit.endpoint()).unwrap()] += 1;
        }
    }
    seen
}

#[tokio::test(start_paused = true)]
async fn the_next_priority_serves_what_the_first_cannot() {
    let set = described(|i, instance| instance.priority = u32::from(i >= 4), 8);
    let layer = BalanceLayer::new(RoundRobin::new());
    let first = |set: &Endpoints| {
        let seen = shares(&layer, set, 10_000, &Request::default());
        seen[..4].iter().sum::<usize>() as f64 / seen.iter().sum::<usize>() as f64
    };
    assert_eq!(first(&set), 1.0);
    close(&set[0], Moment::MAX);
    assert_eq!(first(&set), 1.0, "three of four, over-provisioned, are enough");
    close(&set[1], Moment::MAX);
    assert!((first(&set) - 0.7).abs() < 0.02, "{}", first(&set));
    close(&set[2], Moment::MAX);
    close(&set[3], Moment::MAX);
    assert_eq!(first(&set), 0.0);
}

#[tokio::test(start_paused = true)]
async fn requests_stay_in_the_zone_and_leave_it_when_its_endpoints_do() {
    let zones = ["a", "b", "c"];
    let set = described(|i, instance| instance.zone = Some(zones[usize::from(i % 3)].into()), 9);
    let layer = BalanceLayer::new(Random).zone(Zone::prefer("a"));
    let own = |seen: &[usize]| seen.iter().step_by(3).sum::<usize>();
    assert_eq!(own(&shares(&layer, &set, 900, &Request::default())), 900);
    close(&set[0], Moment::MAX);
    // Two of eight admit in the own zone, which has a third of the requests: three quarters stay.
    let stayed = own(&shares(&layer, &set, 10_000, &Request::default()));
    assert!((7300..7700).contains(&stayed), "{stayed}");
}

#[tokio::test(start_paused = true)]
async fn a_new_endpoint_starts_slowly() {
    let before = described(|_, _| {}, 1);
    tokio::time::advance(Duration::from_secs(100)).await;
    let instances = [0, 1].map(|i| Instance::new(format!("{i}"), SocketAddr::from(([10, 0, 0, 1], 1000 + i))));
    let set = before.reconcile(instances, Clock::system().now());
    let layer = BalanceLayer::new(Random).slow_start(SlowStart::over(Duration::from_secs(10)));
    for (after, share) in [(0, 0.1 / 1.1), (5, 0.5 / 1.5), (5, 0.5)] {
        tokio::time::advance(Duration::from_secs(after)).await;
        let seen = shares(&layer, &set, 20_000, &Request::default());
        let new = seen[1] as f64 / 20_000.0;
        assert!((new - share).abs() < 0.015, "{new} for {share}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_route_picks_from_its_subset() {
    let set = described(|i, instance| instance.tags.extend((i % 2 == 0).then(|| "even".to_owned())), 4);
    let (even, none) = (Subset::tag("even"), Subset::metadata("stage", "canary"));
    for (subset, expected) in [
        (even.clone(), [true, false, true, false]),
        (none.clone(), [false; 4]),
        (none.or_any(), [true; 4]),
        (even.and(&none), [false; 4]),
    ] {
        let layer = BalanceLayer::new(RoundRobin::new()).policy(Policy::new().subset(subset));
        let seen = shares(&layer, &set, 100, &Request::default());
        assert_eq!(seen.iter().map(|seen| *seen > 0).collect::<Vec<_>>(), expected);
    }
}

#[tokio::test(start_paused = true)]
async fn a_caller_stays_where_its_cookie_leads_while_it_can() {
    let set = endpoints(5);
    let sticky = Sticky::cookie("at", [7; 16]).unwrap();
    let layer = BalanceLayer::new(RoundRobin::new()).policy(Policy::new().sticky(sticky));
    let (mut service, mut calls) = service(&layer);
    let (response, seen) = serve(&mut service, &mut calls, request(&set), |_| ok()).await;
    let cookie = response.headers()["set-cookie"].to_str().unwrap().split(';').next().unwrap().to_owned();
    let back = |set: &Endpoints| {
        let mut request = request(set);
        request.headers_mut().insert("cookie", cookie.parse().unwrap());
        request
    };
    for _ in 0..5 {
        let (response, again) = serve(&mut service, &mut calls, back(&set), |_| ok()).await;
        assert_eq!(again, seen);
        assert!(!response.headers().contains_key("set-cookie"));
    }
    let less = set.iter().filter(|endpoint| **endpoint != seen[0]).map(|endpoint| (*endpoint.instance()).clone());
    let less = set.reconcile(less.collect::<Vec<_>>(), Moment::MIN);
    let (response, other) = serve(&mut service, &mut calls, back(&less), |_| ok()).await;
    assert_ne!(other, seen, "the endpoint is gone");
    assert!(!response.headers()["set-cookie"].to_str().unwrap().starts_with(&cookie));
    let (response, tried) = {
        let mut first = true;
        serve(&mut service, &mut calls, back(&set), |_| if std::mem::take(&mut first) { unsent() } else { ok() }).await
    };
    assert_eq!(tried[0], seen[0]);
    assert!(tried[1] != seen[0] && response.headers().contains_key("set-cookie"));
}

#[tokio::test(start_paused = true)]
async fn a_cookie_counts_also_where_an_empty_subset_lets_all_be_picked() {
    let set = described(|i, instance| instance.tags.extend((i == 4).then(|| "last".to_owned())), 5);
    let of = |tag: &str| {
        let sticky = Sticky::cookie("at", [7; 16]).unwrap();
        let policy = Policy::new().sticky(sticky).subset(Subset::tag(tag).or_any());
        service(&BalanceLayer::new(RoundRobin::new()).policy(policy))
    };
    let (mut nobody, mut calls) = of("none");
    let (response, seen) = serve(&mut nobody, &mut calls, request(&set), |_| ok()).await;
    let cookie = response.headers()["set-cookie"].to_str().unwrap().split(';').next().unwrap().to_owned();
    let back = || {
        let mut request = request(&set);
        request.headers_mut().insert("cookie", cookie.parse().unwrap());
        request
    };
    for _ in 0..5 {
        let (response, again) = serve(&mut nobody, &mut calls, back(), |_| ok()).await;
        assert!(again == seen && !response.headers().contains_key("set-cookie"));
    }
    let (mut last, mut calls) = of("last");
    let (_, seen) = serve(&mut last, &mut calls, back(), |_| ok()).await;
    assert_eq!(seen, [set[4].clone()], "no cookie leads out of a subset");
}

#[tokio::test(start_paused = true)]
async fn a_request_can_ask_for_its_endpoint() {
    let set = described(|i, instance| instance.weight = u32::from(i != 3), 5);
    let layer = BalanceLayer::new(RoundRobin::new());
    let (mut service, mut calls) = service(&layer);
    let asking = |prefer: Prefer| {
        let mut request = request(&set);
        request.extensions_mut().insert(prefer);
        request
    };
    for _ in 0..3 {
        let (_, seen) = serve(&mut service, &mut calls, asking(Prefer::endpoint("3").strict()), |_| ok()).await;
        assert_eq!(seen, [set[3].clone()]);
    }
    let (response, _) = serve(&mut service, &mut calls, asking(Prefer::endpoint("9")), |_| ok()).await;
    assert_eq!(response.status(), 200);
    let (response, seen) = serve(&mut service, &mut calls, asking(Prefer::endpoint("9").strict()), |_| ok()).await;
    assert_eq!((response.status(), seen.len()), (StatusCode::SERVICE_UNAVAILABLE, 0));
}

#[tokio::test(start_paused = true)]
async fn a_policy_of_requests_can_have_its_own_hash_key() {
    let set = endpoints(8);
    let layer = BalanceLayer::new(Maglev::by(HashKey::path()));
    let by_tenant = Policy::new().hash_key(HashKey::header("x-tenant".parse().unwrap()));
    let route = Route::new("/").with_policy(by_tenant.clone());
    for (layer, route, expected) in
        [(layer.clone(), None, 8), (layer.clone(), Some(&route), 1), (layer.policy(by_tenant), None, 1)]
    {
        layer.prepare(&set);
        let ((mut service, mut calls), mut seen) = (service(&layer), std::collections::HashSet::new());
        for key in 0..100 {
            let mut request = request(&set);
            *request.uri_mut() = format!("/{key}").parse().unwrap();
            request.headers_mut().insert("x-tenant", "acme".parse().unwrap());
            route.cloned().map(|route| route.attach(request.extensions_mut()));
            seen.extend(serve(&mut service, &mut calls, request, |_| ok()).await.1.iter().map(Endpoint::handle));
        }
        assert_eq!(seen.len(), expected);
    }
}

#[tokio::test]
async fn a_table_is_laid_beside_the_requests_and_keys_stay_meanwhile() {
    let set = endpoints(100);
    let layer = BalanceLayer::new(Maglev::by(HashKey::path()));
    layer.prepare(&set);
    let requests: Vec<_> = (0..500).map(|key| Request::get(format!("/{key}")).body(()).unwrap()).collect();
    let all = |set: &Endpoints| {
        let choose = |request| layer.choose(set, Asked::of(request)).unwrap().endpoint().handle();
        requests.iter().map(choose).collect::<Vec<_>>()
    };
    let before = all(&set);
    let less = set.iter().skip(1).map(|endpoint| (*endpoint.instance()).clone()).collect::<Vec<_>>();
    let less = set.reconcile(less, Moment::MIN);
    // At once, most likely by the table before; later by its own: neither moves keys that need not.
    for _ in 0..50 {
        let moved = before.iter().zip(all(&less)).filter(|(a, b)| **a != set[0].handle() && *a != b).count();
        assert!(moved <= 25, "{moved} of 500 keys moved needlessly");
    }
}

#[test]
fn balancers_that_were_told_in_another_order_agree() {
    let set = endpoints(20);
    let tell = |(weight, endpoint): (u32, &Endpoint)| {
        let mut instance = (*endpoint.instance()).clone();
        instance.weight = weight;
        instance
    };
    let told: Vec<_> = (1..).zip(set.iter()).map(tell).collect();
    let requests: Vec<_> = (0..500).map(|key| Request::get(format!("/{key}")).body(()).unwrap()).collect();
    let policies: [fn() -> Arc<dyn Pick>; 2] =
        [|| Arc::new(Maglev::by(HashKey::path())), || Arc::new(RingHash::by(HashKey::path()))];
    for policy in policies {
        let chosen = |told: Vec<Instance>| -> Vec<_> {
            let (set, layer) = (Endpoints::none("s").reconcile(told, Moment::MIN), BalanceLayer::new(policy()));
            layer.prepare(&set);
            let one = |request| layer.choose(&set, Asked::of(request)).unwrap().endpoint().id().clone();
            requests.iter().map(one).collect()
        };
        assert_eq!(chosen(told.clone()), chosen(told.iter().rev().cloned().collect()));
    }
}

/// Looking first and entering later would refuse hundreds.
#[test]
fn nobody_is_refused_while_somebody_admits_however_gates_move() {
    let set = endpoints(4);
    let layer = BalanceLayer::new(PowerOfTwo).clock(Clock::manual().0);
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mover = Mover::new();
            for round in 0..20_000 {
                let endpoint = &set[round % 3];
                endpoint.gate().close_for(mover);
                endpoint.gate().open_for(mover);
            }
            over.store(true, std::sync::atomic::Ordering::Release);
        });
        for _ in 0..3 {
            scope.spawn(|| {
                let request = Request::new(());
                while !over.load(std::sync::atomic::Ordering::Acquire) {
                    let permit = layer.choose(&set, Asked::of(&request));
                    let busy = permit.expect("the last always admits").endpoint().begin();
                    drop(busy);
                }
            });
        }
    });
    assert!(set.iter().all(|endpoint| endpoint.in_flight() == 0));
}
