//! What went wrong once, and must not again.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt;
use http::{HeaderName, Method, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::BodyExt;
use portcullis_balance::{
    Asked, BalanceLayer, Budget, Call, Candidates, Pick, Policy, Random, Reason, Replay, RoundRobin, Served, Sticky,
};
use portcullis_core::{
    Carried, Clock, Deadline, Endpoint, Endpoints, GrpcCode, HeadDeadline, Instance, Layer, Moment, Mover, Outcome,
    Permit, Rejection,
};
use portcullis_testing::contract::{ProbeBody, body, full, probe};
use tower::{Layer as _, Service, ServiceExt, service_fn};

fn endpoints(n: u16) -> Endpoints {
    let instance = |i| Instance::new(format!("{i}"), SocketAddr::from(([10, 0, 0, 1], 1000 + i)));
    Endpoints::none("s").reconcile((0..n).map(instance), Moment::MIN)
}

fn request_of(method: Method, endpoints: &Endpoints, body: &'static str) -> Request<ProbeBody> {
    let mut request = Request::builder().method(method).body(full(body)).unwrap();
    endpoints.clone().attach(request.extensions_mut());
    request
}

fn rejected(status: StatusCode, sent: bool) -> Response<ProbeBody> {
    let mut response = Response::builder().status(status).body(full("")).unwrap();
    response.extensions_mut().insert(Rejection::new(Layer::Forward, status, "test").with_sent(sent));
    response
}

#[tokio::test(start_paused = true)]
async fn when_very_few_of_many_admit_it_is_a_panic_and_not_a_stampede() {
    let set = endpoints(200);
    set.iter().skip(1).for_each(|endpoint| endpoint.gate().close_for(Mover::new()));
    let layer = BalanceLayer::new(Random);
    let mut seen = std::collections::HashSet::new();
    for _ in 0..1000 {
        let request = request_of(Method::GET, &set, "");
        let permit = layer.choose(&set, Asked::of(&request)).unwrap();
        seen.insert(permit.endpoint().id().clone());
    }
    assert!(seen.len() > 100, "{}", seen.len());
}

#[tokio::test(start_paused = true)]
async fn who_asks_for_rest_is_heard_by_the_policy_in_http_and_grpc() {
    struct Rests(Mutex<Vec<Option<Duration>>>);
    impl Pick for Rests {
        fn pick(&self, _: &Candidates<'_>) -> Option<usize> {
            Some(0)
        }

        fn observe(&self, _: &Endpoint, call: &Call) {
            self.0.lock().unwrap().push(call.retry_after);
        }

        fn observes(&self) -> bool {
            true
        }
    }
    let grpc = ("content-type", "application/grpc");
    let exhausted = [("grpc-status", "8"), ("grpc-retry-pushback-ms", "1500")];
    type Fields<'a> = &'a [(&'static str, &'a str)];
    let answers: [(u16, Fields<'_>, Fields<'_>); 6] = [
        (429, &[("retry-after", "7")], &[]),
        (200, &[grpc, exhausted[0], exhausted[1]], &[]),
        (200, &[("retry-after", "7")], &[]),
        (429, &[], &[]),
        (200, &[grpc], &exhausted),
        (200, &[grpc], &[("grpc-status", "0"), exhausted[1]]),
    ];
    let rests = Arc::new(Rests(Mutex::default()));
    let (inner, mut calls) = probe::<Replay<ProbeBody>>();
    let mut service = BalanceLayer::new(rests.clone()).attempts(1).layer(inner);
    for (status, headers, trailers) in answers {
        let call = service.ready().await.unwrap().call(request_of(Method::GET, &endpoints(1), ""));
        let answer = async {
            let mut response = Response::builder().status(status);
            for (name, value) in headers {
                response = response.header(*name, *value);
            }
            let (mut feed, body) = body();
            let field = |(name, value): &(&'static str, &str)| (HeaderName::from_static(name), value.parse().unwrap());
            feed.try_send(Frame::trailers(trailers.iter().map(field).collect())).unwrap();
            calls.next().await.answer(response.body(body).unwrap());
        };
        let (response, ()) = futures::join!(call, answer);
        response.unwrap().into_body().collect().await.unwrap();
    }
    let [seven, pushback] = [7_000, 1_500].map(Duration::from_millis);
    assert_eq!(*rests.0.lock().unwrap(), [Some(seven), Some(pushback), None, None, Some(pushback), None]);
}

#[tokio::test(start_paused = true)]
async fn a_head_is_the_same_at_every_attempt_whatever_was_done_to_it_below() {
    #[derive(Clone, Debug, PartialEq)]
    struct Mine(u8);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = seen.clone();
    let mut service = BalanceLayer::new(RoundRobin::new()).attempts(3).layer(service_fn(
        move |mut request: Request<Replay<ProbeBody>>| {
            let head = (request.uri().clone(), request.headers().clone(), request.extensions().get::<Mine>().cloned());
            log.lock().unwrap().push(head);
            request.headers_mut().clear();
            request.extensions_mut().clear();
            async { Ok::<_, std::convert::Infallible>(rejected(StatusCode::BAD_GATEWAY, false)) }
        },
    ));
    let mut request = request_of(Method::POST, &endpoints(5), "body");
    *request.uri_mut() = "http://orders/a?b=c".parse().unwrap();
    for value in ["1", "2"] {
        request.headers_mut().append("x-mine", value.parse().unwrap());
    }
    request.extensions_mut().insert(Mine(1));
    service.ready().await.unwrap().call(request).await.unwrap();
    let seen = seen.lock().unwrap();
    assert_eq!((seen.len(), seen[0].1.len()), (3, 2));
    assert!(seen.iter().all(|head| *head == seen[0]));
}

struct Observer(Mutex<Vec<(Arc<str>, Outcome)>>);

impl Pick for Observer {
    fn pick(&self, among: &Candidates<'_>) -> Option<usize> {
        (0..among.len()).find(|&i| among.usable(i))
    }

    fn observe(&self, endpoint: &Endpoint, call: &Call) {
        self.0.lock().unwrap().push((endpoint.id().clone(), call.outcome));
    }

    fn observes(&self) -> bool {
        true
    }
}

#[tokio::test(start_paused = true)]
async fn a_policy_is_told_of_the_failure_that_another_attempt_makes_up_for() {
    let set = endpoints(2);
    for (status, sent) in [(502, false), (502, true), (500, true)] {
        let observer = Arc::new(Observer(Mutex::default()));
        let layer =
            BalanceLayer::new(observer.clone()).policy(Policy::new().on_statuses([StatusCode::INTERNAL_SERVER_ERROR]));
        let status = StatusCode::from_u16(status).unwrap();
        let mut service = layer.layer(service_fn(move |request: Request<Replay<ProbeBody>>| async move {
            let bad = &**Permit::of(request.extensions()).unwrap().endpoint().id() == "0";
            Ok::<_, std::convert::Infallible>(match (bad, status.as_u16()) {
                (true, 500) => Response::builder().status(500).body(full("")).unwrap(),
                (true, _) => rejected(status, sent),
                (false, _) => Response::new(full("ok")),
            })
        }));
        let response = service.ready().await.unwrap().call(request_of(Method::GET, &set, "")).await.unwrap();
        assert_eq!(response.status(), 200);
        response.into_body().collect().await.unwrap();
        let seen = observer.0.lock().unwrap().clone();
        assert_eq!(seen, [("0".into(), Outcome::Failure), ("1".into(), Outcome::Success)], "{status} {sent}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_inner_layer_may_be_the_first_to_say_that_an_attempt_took_too_long() {
    let set = endpoints(2);
    let layer = BalanceLayer::new(RoundRobin::new()).policy(Policy::new().attempt_timeout(Duration::from_millis(100)));
    let tries = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let seen = tries.clone();
    let mut service = layer.layer(service_fn(move |request: Request<Replay<ProbeBody>>| {
        let first = seen.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 0;
        async move {
            if first {
                let HeadDeadline(at) = *HeadDeadline::of(request.extensions()).unwrap();
                tokio::time::sleep(at.since(Clock::system().now())).await;
                return Ok::<_, std::convert::Infallible>(rejected(StatusCode::GATEWAY_TIMEOUT, true));
            }
            Ok(Response::new(full("ok")))
        }
    }));
    let response = service.ready().await.unwrap().call(request_of(Method::GET, &set, "")).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.extensions().get::<Served>().unwrap().attempts(), 2);
}

#[tokio::test(start_paused = true)]
async fn an_upload_goes_on_when_the_budget_denies_another_attempt() {
    let set = endpoints(2);
    let layer = BalanceLayer::new(RoundRobin::new())
        .policy(Policy::new().on_statuses([StatusCode::SERVICE_UNAVAILABLE]))
        .budget(Budget::new(0.0, 0, Duration::from_secs(10)));
    let (inner, mut calls) = probe();
    let mut service = layer.layer(inner);
    let mut call = Box::pin(service.ready().await.unwrap().call(request_of(Method::PUT, &set, "body")));
    let answer = async {
        let call = calls.next().await;
        call.answer(Response::builder().status(503).body(full("")).unwrap())
    };
    let (response, request) = futures::join!(&mut call, answer);
    assert_eq!(response.unwrap().status(), 503);
    assert_eq!(request.into_body().collect().await.unwrap().to_bytes(), "body");
}

#[tokio::test(start_paused = true)]
async fn a_service_that_is_ready_only_after_the_deadline_is_not_called_again() {
    for (late, status) in [(false, StatusCode::OK), (true, StatusCode::BAD_GATEWAY)] {
        let (inner, mut calls) = probe::<Replay<ProbeBody>>();
        let mut request = request_of(Method::GET, &endpoints(2), "");
        Deadline(Clock::system().now() + Duration::from_secs(1)).attach(request.extensions_mut());
        let call = BalanceLayer::new(RoundRobin::new()).layer(inner).oneshot(request);
        let answers = async {
            let first = calls.next().await;
            calls.be_pending();
            first.answer(rejected(StatusCode::BAD_GATEWAY, false));
            // The other attempt is planned.
            tokio::task::yield_now().await;
            tokio::time::advance(Duration::from_millis(if late { 1000 } else { 999 })).await;
            calls.be_ready();
            calls.next().await.answer(Response::new(full("")));
            std::future::pending().await
        };
        let response = tokio::select! { biased; response = call => response.unwrap(), () = answers => unreachable!() };
        let attempts = response.extensions().get::<Served>().unwrap().attempts();
        assert_eq!((response.status(), attempts), (status, 2 - usize::from(late)));
    }
}

/// One that admits only so many calls may never be ready.
#[tokio::test(start_paused = true)]
async fn a_service_is_waited_for_no_longer_than_the_attempt_would_be() {
    for (deadline, limit) in
        [(Some(1000), None), (None, Some(1000)), (Some(1000), Some(3000)), (Some(3000), Some(1000))]
    {
        let (inner, mut calls) = probe::<Replay<ProbeBody>>();
        let mut request = request_of(Method::GET, &endpoints(2), "");
        if let Some(millis) = deadline {
            Deadline(Clock::system().now() + Duration::from_millis(millis)).attach(request.extensions_mut());
        }
        let mut policy = Policy::new();
        if let Some(millis) = limit {
            policy = policy.attempt_timeout(Duration::from_millis(millis));
        }
        let mut call = Box::pin(BalanceLayer::new(RoundRobin::new()).policy(policy).layer(inner).oneshot(request));
        assert!(futures::poll!(&mut call).is_pending());
        let first = calls.next().await;
        calls.be_pending();
        first.answer(rejected(StatusCode::BAD_GATEWAY, false));
        assert!(futures::poll!(&mut call).is_pending());
        tokio::time::advance(Duration::from_millis(999)).await;
        assert!(futures::poll!(&mut call).is_pending());
        tokio::time::advance(Duration::from_millis(2)).await;
        let response = call.now_or_never().unwrap_or_else(|| panic!("waits on: {deadline:?}, {limit:?}")).unwrap();
        let attempts = response.extensions().get::<Served>().unwrap().attempts();
        assert_eq!((response.status(), attempts), (StatusCode::BAD_GATEWAY, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_an_endpoint_waits_no_longer_for_the_service() {
    let set = endpoints(1);
    set[0].gate().close_for(Mover::new());
    let (inner, calls) = probe::<Replay<ProbeBody>>();
    let layer = BalanceLayer::new(RoundRobin::new()).wait(Duration::from_secs(1));
    let mut call = Box::pin(layer.layer(inner).oneshot(request_of(Method::GET, &set, "")));
    assert!(futures::poll!(&mut call).is_pending());
    calls.be_pending();
    for millis in [500, 499] {
        tokio::time::advance(Duration::from_millis(millis)).await;
        assert!(futures::poll!(&mut call).is_pending());
    }
    tokio::time::advance(Duration::from_millis(2)).await;
    let response = call.now_or_never().expect("in time").unwrap();
    assert_eq!(response.extensions().get::<Rejection>().unwrap().reason(), "none-admits");
}

/// More than is kept must not pass to the attempt that has failed: its answer would be the caller's, after the wait.
#[tokio::test(start_paused = true)]
async fn an_upload_waits_while_another_attempt_does() {
    let wait = Duration::from_secs(10);
    let policy = Policy::new().on_statuses([StatusCode::SERVICE_UNAVAILABLE]).replay(4).backoff(wait, wait);
    let layer = BalanceLayer::new(RoundRobin::new()).policy(policy);
    for goes_on in [true, false] {
        let (set, (inner, mut calls), (mut feed, upload)) = (endpoints(2), probe(), body());
        feed.try_send(Frame::data("body".into())).unwrap();
        let mut call = Box::pin(layer.layer(inner).oneshot(request_of(Method::PUT, &set, "").map(|_| upload)));
        assert!(futures::poll!(&mut call).is_pending());
        let first = calls.next().await.answer(Response::builder().status(503).body(full("")).unwrap());
        let mut first = first.into_body();
        first.frame().await.unwrap().unwrap();
        assert!(futures::poll!(&mut call).is_pending());
        feed.try_send(Frame::data("and more".into())).unwrap();
        drop(feed);
        let mut reading = first.frame();
        assert!(futures::poll!(&mut reading).is_pending());
        if goes_on {
            let answer = async { calls.next().await.answer(Response::new(full(""))) };
            let (response, second) = futures::join!(call, answer);
            assert_eq!(response.unwrap().status(), 200);
            assert_eq!(second.into_body().collect().await.unwrap().to_bytes(), "bodyand more");
            assert!(reading.await.unwrap().is_err());
        } else {
            drop(call);
            assert_eq!(reading.await.unwrap().unwrap().into_data().unwrap(), "and more");
        }
    }
}

/// An attempt that read the field itself would begin anew.
#[tokio::test(start_paused = true)]
async fn a_grpc_timeout_is_for_all_attempts_together() {
    let clock = Clock::system();
    for (attached, end) in [(None, 500), (Some(350), 350), (Some(900), 500)] {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        let mut service = BalanceLayer::new(RoundRobin::new()).attempts(9).layer(service_fn(
            move |request: Request<Replay<ProbeBody>>| {
                log.lock().unwrap().push(Deadline::of(request.extensions()).copied());
                async {
                    tokio::time::sleep(Duration::from_millis(300)).await;
                    Ok::<_, std::convert::Infallible>(rejected(StatusCode::GATEWAY_TIMEOUT, false))
                }
            },
        ));
        let mut request = request_of(Method::POST, &endpoints(9), "");
        request.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
        request.headers_mut().insert("grpc-timeout", "500m".parse().unwrap());
        let began = clock.now();
        if let Some(millis) = attached {
            Deadline(began + Duration::from_millis(millis)).attach(request.extensions_mut());
        }
        service.ready().await.unwrap().call(request).await.unwrap();
        assert_eq!(*seen.lock().unwrap(), [Some(Deadline(began + Duration::from_millis(end))); 2], "{attached:?}");
    }
}

/// One whose gate closes by the very failure, as a breaker's does.
#[tokio::test(start_paused = true)]
async fn without_another_endpoint_nothing_is_taken_from_the_attempt_before() {
    let set = endpoints(1);
    let budget = Budget::new(0.0, 1, Duration::from_secs(10));
    let layer = BalanceLayer::new(RoundRobin::new())
        .policy(Policy::new().on_statuses([StatusCode::SERVICE_UNAVAILABLE]))
        .budget(budget.clone());
    let (inner, mut calls) = probe();
    let mut service = layer.layer(inner);
    let mut call = Box::pin(service.ready().await.unwrap().call(request_of(Method::PUT, &set, "body")));
    let answer = async {
        let call = calls.next().await;
        set[0].gate().close_for(Mover::new());
        call.answer(Response::builder().status(503).body(full("")).unwrap())
    };
    let (response, request) = futures::join!(&mut call, answer);
    let response = response.unwrap();
    assert_eq!((response.status(), calls.count()), (StatusCode::SERVICE_UNAVAILABLE, 1));
    let served = response.extensions().get::<Served>().unwrap();
    assert_eq!((served.attempts(), served.endpoint()), (1, &set[0]));
    assert_eq!(request.into_body().collect().await.unwrap().to_bytes(), "body");
    assert_eq!(budget.left(Clock::system().now()), 10);
}

#[tokio::test(start_paused = true)]
async fn no_caller_is_led_back_to_who_did_not_serve_it() {
    let layer = BalanceLayer::new(RoundRobin::new())
        .policy(Policy::new().attempts(1).sticky(Sticky::cookie("at", [7; 16]).unwrap()));
    for serves in [false, true] {
        let inner = service_fn(move |_: Request<Replay<ProbeBody>>| async move {
            let refused = rejected(StatusCode::BAD_GATEWAY, false);
            Ok::<_, std::convert::Infallible>(if serves { Response::new(full("")) } else { refused })
        });
        let response = layer.layer(inner).oneshot(request_of(Method::GET, &endpoints(1), "")).await.unwrap();
        assert_eq!(response.headers().contains_key("set-cookie"), serves);
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_in_place_of_one_that_came_too_late_says_who_was_asked() {
    let set = endpoints(2);
    let layer = BalanceLayer::new(RoundRobin::new()).policy(Policy::new().attempt_timeout(Duration::from_secs(1)));
    let never = |_: Request<Replay<ProbeBody>>| std::future::pending::<Result<Response<ProbeBody>, std::io::Error>>();
    for (method, attempts) in [(Method::GET, 2), (Method::POST, 1)] {
        let response = layer.layer(service_fn(never)).oneshot(request_of(method, &set, "")).await.unwrap();
        let served = response.extensions().get::<Served>().unwrap();
        assert_eq!((response.status(), served.attempts()), (StatusCode::GATEWAY_TIMEOUT, attempts));
        assert!(served.failed().iter().all(|f| f.reason == Reason::TimedOut && f.endpoint != *served.endpoint()));
    }
    // The other is gone before it can be asked.
    let mut call = Box::pin(layer.layer(service_fn(never)).oneshot(request_of(Method::GET, &set, "")));
    assert!(futures::poll!(&mut call).is_pending());
    set.iter().for_each(|endpoint| endpoint.gate().close_for(Mover::new()));
    let response = call.await.unwrap();
    assert_eq!(response.extensions().get::<Served>().unwrap().attempts(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_grpc_server_says_whether_and_when_it_may_be_asked_again() {
    let policy = Policy::new().repeat_any_method(true).on_grpc([GrpcCode::UNAVAILABLE]);
    let layer = BalanceLayer::new(RoundRobin::new()).policy(policy);
    for (pushback, attempts, after) in [("-1", 1, 0), ("no", 1, 0), ("251", 1, 0), ("250", 2, 250), ("0", 2, 0)] {
        let (inner, mut calls) = probe::<Replay<ProbeBody>>();
        let began = tokio::time::Instant::now();
        let answer = async {
            loop {
                let answer = Response::builder().header("content-type", "application/grpc").header("grpc-status", "14");
                let answer = answer.header("grpc-retry-pushback-ms", pushback).body(full("")).unwrap();
                calls.next().await.answer(answer);
            }
        };
        let call = layer.layer(inner).oneshot(request_of(Method::POST, &endpoints(3), ""));
        let response = tokio::select! { response = call => response.unwrap(), () = answer => unreachable!() };
        let served = response.extensions().get::<Served>().unwrap();
        assert_eq!((served.attempts(), began.elapsed()), (attempts, Duration::from_millis(after)), "{pushback}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_stops_reading_says_nothing_of_the_time_it_took() {
    struct Times(Mutex<Vec<(Duration, Outcome)>>);
    impl Pick for Times {
        fn pick(&self, _: &Candidates<'_>) -> Option<usize> {
            Some(0)
        }

        fn observe(&self, _: &Endpoint, call: &Call) {
            self.0.lock().unwrap().push((call.latency, call.outcome));
        }

        fn observes(&self) -> bool {
            true
        }
    }
    let times = Arc::new(Times(Mutex::default()));
    let (inner, mut calls) = probe::<Replay<ProbeBody>>();
    let mut service = BalanceLayer::new(times.clone()).attempts(1).layer(inner);
    let call = service.ready().await.unwrap().call(request_of(Method::GET, &endpoints(1), ""));
    let answer = async { calls.next().await.answer(Response::new(full("a stream"))) };
    let (response, _) = futures::join!(call, answer);
    tokio::time::advance(Duration::from_secs(600)).await;
    drop(response);
    let mut call = Box::pin(service.ready().await.unwrap().call(request_of(Method::GET, &endpoints(1), "")));
    assert!(futures::poll!(&mut call).is_pending());
    tokio::time::advance(Duration::from_secs(3)).await;
    drop(call);
    let three = Duration::from_secs(3);
    assert_eq!(*times.0.lock().unwrap(), [(Duration::ZERO, Outcome::Ignored), (three, Outcome::Ignored)]);
}
