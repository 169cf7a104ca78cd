//! What went wrong in breakers that people use, each told of this one. The names in brackets are public threads.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::num::NonZeroU16;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::join_all;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use portcullis_circuit_break::{CircuitBreak, CircuitBreakLayer, Handle, Mode, Reason, Share, State, Window};
use portcullis_core::{Carried, Clock, Endpoint, Instance, Layer as Name, Outcome, Permit, Rejection, Standard};
use portcullis_testing::contract::{self, Broken, Call, Calls, Probe, ProbeBody};
use tower::{Layer, Service, ServiceExt};

const S: Duration = Duration::from_secs(1);

type Answer = Pin<Box<dyn Future<Output = Result<StatusCode, Broken>> + Send>>;

/// A guarded service, and the test's end of what it guards.
struct World {
    service: CircuitBreak<Probe<()>>,
    calls: Calls<()>,
    handle: Handle,
}

impl World {
    /// Opens after one failure, for ten seconds, and takes probes for lost after five.
    fn new(set: impl FnOnce(CircuitBreakLayer) -> CircuitBreakLayer) -> Self {
        let layer = CircuitBreakLayer::new().failures(1).open_for(10 * S).probe_timeout(5 * S);
        let layer = set(layer);
        let (probe, calls) = contract::probe();
        Self { service: layer.layer(probe), calls, handle: layer.handle() }
    }

    /// A call, and its inner half if it was not refused.
    async fn call(&mut self) -> (Answer, Option<Call<()>>) {
        let mut service = self.service.clone();
        let before = self.calls.count();
        let call = service.ready().await.unwrap().call(Request::new(()));
        let inner = if self.calls.count() > before { Some(self.calls.next().await) } else { None };
        let answer = async move {
            let response = call.await?;
            let status = response.status();
            // The body is read to its end, or the call would count for nothing.
            response.into_body().collect().await?;
            Ok(status)
        };
        (answer.boxed(), inner)
    }

    async fn is_refused(&mut self) -> bool {
        self.call().await.1.is_none()
    }

    async fn end(&mut self, status: u16) {
        let (answer, inner) = self.call().await;
        end(answer, inner.unwrap(), status).await;
    }

    /// Open, with its time over.
    async fn ready_to_probe(set: impl FnOnce(CircuitBreakLayer) -> CircuitBreakLayer) -> Self {
        let mut world = Self::new(set);
        world.end(500).await;
        assert_eq!(world.state(), State::Open);
        tokio::time::advance(10 * S).await;
        world
    }

    fn state(&self) -> State {
        self.handle.whole().state()
    }
}

async fn end(answer: Answer, inner: Call<()>, status: u16) {
    inner.answer(answer_of(status));
    assert_eq!(answer.await.unwrap().as_u16(), status);
}

fn answer_of(status: u16) -> Response<ProbeBody> {
    let mut response = Response::new(contract::full("x"));
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response
}

fn n(n: u16) -> NonZeroU16 {
    NonZeroU16::new(n).unwrap()
}

/// Half-open for six days [OmniRoute#13836], for as long as nothing reports [resilience4j#935].
#[tokio::test(start_paused = true)]
async fn a_hung_probe_is_replaced() {
    let mut world = World::ready_to_probe(|layer| layer).await;
    let (_hung, inner) = world.call().await;
    assert!(inner.is_some() && world.is_refused().await);
    tokio::time::advance(5 * S).await;
    world.end(200).await;
    assert_eq!(world.state(), State::Closed);
}

/// An ignored exception kept its permit [resilience4j#544, #343].
#[tokio::test(start_paused = true)]
async fn an_ignored_probe_frees_its_place() {
    let mut world = World::ready_to_probe(|layer| layer).await;
    for _ in 0..3 {
        world.end(429).await;
        assert_eq!(world.state(), State::HalfOpen);
    }
    world.end(200).await;
    assert_eq!(world.state(), State::Closed);
}

/// More calls than permitted went in when it became half-open [resilience4j#1432], or one took two permits [#1003].
#[tokio::test(start_paused = true)]
async fn a_crowd_at_the_end_of_the_open_time_sends_as_many_probes_as_there_are_places() {
    let mut world = World::ready_to_probe(|layer| layer.probes(n(3)).successes(n(3))).await;
    let mut inside = Vec::new();
    for _ in 0..50 {
        let (answer, inner) = world.call().await;
        inside.extend(inner.map(|inner| (answer, inner)));
    }
    assert_eq!(inside.len(), 3);
    for (answer, inner) in inside {
        end(answer, inner, 200).await;
    }
    assert_eq!(world.state(), State::Closed);
}

/// A cancelled call was a failure [resilience4j#682, loki-vl-proxy#555], or a success [Polly].
#[tokio::test(start_paused = true)]
async fn calls_the_caller_breaks_off_say_nothing() {
    let mut world = World::new(|layer| layer);
    for _ in 0..80 {
        let (answer, inner) = world.call().await;
        assert!(inner.is_some());
        drop(answer);
    }
    assert_eq!((world.state(), world.handle.whole().counts().ignored), (State::Closed, 80));
}

/// A cancelled probe left the circuit stuck [monix#1080, linkerd2-proxy#4561, davenverse/circuit#258, vellum#22509], or
/// closed it.
#[tokio::test(start_paused = true)]
async fn a_probe_dropped_at_any_await_frees_its_place_and_closes_nothing() {
    let mut world = World::ready_to_probe(|layer| layer).await;
    // Never polled.
    drop(world.call().await);
    assert_eq!(world.state(), State::HalfOpen);
    // Polled, and not answered.
    let (mut answer, inner) = world.call().await;
    assert!(inner.is_some() && futures::poll!(&mut answer).is_pending());
    drop(answer);
    // Answered, with its body not read, or half read.
    for read in [false, true] {
        let call = world.service.clone().oneshot(Request::new(()));
        let call = tokio::spawn(call);
        let (mut sender, body) = contract::body();
        world.calls.next().await.answer(Response::new(body));
        let mut response = call.await.unwrap().unwrap();
        if read {
            sender.send_data("half".into()).await.unwrap();
            response.body_mut().frame().await.unwrap().unwrap();
        }
        assert!(world.is_refused().await, "the probe lasts as long as its body");
        drop(response);
    }
    assert_eq!(world.state(), State::HalfOpen);
    world.end(200).await;
    assert_eq!(world.state(), State::Closed);
}

/// Half-open for good, with a stream every ten seconds: probes were streams that nobody but their callers ended.
#[tokio::test(start_paused = true)]
async fn a_probe_that_streams_for_longer_than_a_probe_may_take_has_succeeded() {
    // Whether data comes after that, or the caller goes.
    for (data, wait, closes) in [(true, 5, true), (false, 5, true), (true, 4, false), (false, 4, false)] {
        let mut world = World::ready_to_probe(|layer| layer).await;
        let call = tokio::spawn(world.service.clone().oneshot(Request::new(())));
        let (mut sender, body) = contract::body();
        world.calls.next().await.answer(Response::new(body));
        let mut response = call.await.unwrap().unwrap();
        sender.send_data("first".into()).await.unwrap();
        response.body_mut().frame().await.unwrap().unwrap();
        tokio::time::advance(wait * S).await;
        if data {
            sender.send_data("more".into()).await.unwrap();
            response.body_mut().frame().await.unwrap().unwrap();
            assert_eq!(world.state() == State::Closed, closes, "{wait}");
        }
        drop(response);
        assert_eq!(world.state() == State::Closed, closes, "{data} {wait}");
    }
}

/// One that streams counts once, and only among probes.
#[tokio::test(start_paused = true)]
async fn a_stream_is_one_success_and_only_of_a_probe() {
    let mut world = World::ready_to_probe(|layer| layer.successes(n(2))).await;
    let stream = async |world: &mut World| {
        let call = tokio::spawn(world.service.clone().oneshot(Request::new(())));
        let (sender, body) = contract::body();
        world.calls.next().await.answer(Response::new(body));
        (sender, call.await.unwrap().unwrap())
    };
    let (mut sender, mut response) = stream(&mut world).await;
    tokio::time::advance(5 * S).await;
    for _ in 0..3 {
        sender.send_data("more".into()).await.unwrap();
        response.body_mut().frame().await.unwrap().unwrap();
    }
    drop(response);
    assert_eq!(world.state(), State::HalfOpen);
    world.end(200).await;
    assert_eq!(world.state(), State::Closed);
    // One of the closed state that its caller leaves says nothing, however long it was.
    let (_sender, response) = stream(&mut world).await;
    tokio::time::advance(50 * S).await;
    drop(response);
    assert_eq!(world.handle.whole().counts().ignored, 1);
    // One without a head neither.
    let mut world = World::ready_to_probe(|layer| layer).await;
    let (mut answer, inner) = world.call().await;
    assert!(inner.is_some() && futures::poll!(&mut answer).is_pending());
    tokio::time::advance(50 * S).await;
    drop(answer);
    assert_eq!(world.state(), State::HalfOpen);
    // Nor one with no more than a head, which an endpoint that hangs may have too.
    let (_sender, response) = stream(&mut world).await;
    tokio::time::advance(50 * S).await;
    drop(response);
    assert_eq!(world.state(), State::HalfOpen);
}

/// Timeouts above the breaker cancelled the calls, and nobody counted [resilience4j#1123]: put them below it.
#[tokio::test(start_paused = true)]
async fn a_timeout_below_it_counts() {
    let layer = CircuitBreakLayer::new().failures(2);
    let hanging = tower::service_fn(|_: Request<()>| std::future::pending::<Result<Response<Full<Bytes>>, Broken>>());
    let timed = tower::ServiceBuilder::new().layer(&layer).layer(tower::timeout::TimeoutLayer::new(S)).service(hanging);
    for _ in 0..2 {
        assert!(timed.clone().oneshot(Request::new(())).await.is_err());
    }
    assert_eq!(layer.handle().whole().state(), State::Open);
}

/// It moved by its timer although it was forced open [resilience4j#991], or recovered from being forced open by itself
/// [tower-resilience].
#[tokio::test(start_paused = true)]
async fn forced_open_is_not_left_by_time_or_by_results() {
    let mut world = World::new(|layer| layer);
    let (answer, inner) = world.call().await;
    world.end(500).await;
    world.handle.set_mode(Mode::ForcedOpen);
    for _ in 0..5 {
        tokio::time::advance(60 * S).await;
        assert!(world.is_refused().await);
    }
    end(answer, inner.unwrap(), 200).await;
    assert!(world.is_refused().await);
}

/// `try_acquire` called itself until the stack was gone [resilience4j#2038].
#[tokio::test(start_paused = true)]
async fn an_open_time_of_nothing_goes_in_no_circle() {
    let mut world = World::new(|layer| layer.open_for(Duration::ZERO).probe_timeout(Duration::ZERO));
    for _ in 0..1000 {
        let (answer, inner) = world.call().await;
        match inner {
            Some(inner) => end(answer, inner, 500).await,
            None => tokio::time::advance(Duration::from_millis(1)).await,
        }
    }
    tokio::time::advance(Duration::from_millis(1)).await;
    world.end(200).await;
    assert_eq!(world.state(), State::Closed);
}

/// What was made for each call was never let go [resilience4j#2243].
#[tokio::test(start_paused = true)]
async fn nothing_is_kept_of_a_call_that_is_over() {
    let endpoint = Endpoint::new("s", Instance::new("a", std::net::SocketAddr::from(([127, 0, 0, 1], 1))));
    let layer = CircuitBreakLayer::new().failures(1);
    let service =
        layer.layer(tower::service_fn(async |_: Request<()>| Err::<Response<Full<Bytes>>, _>(Broken("refused"))));
    let weak = std::sync::Arc::downgrade(endpoint.id());
    for _ in 0..3 {
        let mut request = Request::new(());
        Permit::without_right(endpoint.clone()).attach(request.extensions_mut());
        let _ = service.clone().oneshot(request).await;
        tokio::time::advance(60 * S).await;
    }
    drop((endpoint, service, layer));
    assert_eq!(weak.strong_count(), 0, "the endpoint lives on");
}

/// A call let in while closed, or in an earlier half-open time, decided a later one [denoland/std#7306,
/// k8s-breakglass#981, tower-resilience].
#[tokio::test(start_paused = true)]
async fn a_late_result_of_an_earlier_period_decides_nothing() {
    for late_status in [200, 500] {
        let mut world = World::new(|layer| layer);
        let (closed, of_closed) = world.call().await;
        world.end(500).await;
        tokio::time::advance(10 * S).await;
        let (hung, of_probe) = world.call().await;
        end(closed, of_closed.unwrap(), late_status).await;
        assert_eq!(world.state(), State::HalfOpen, "one that was let in while closed");
        tokio::time::advance(5 * S).await;
        let (second, of_second) = world.call().await;
        end(second, of_second.unwrap(), 500).await;
        assert_eq!(world.state(), State::Open);
        end(hung, of_probe.unwrap(), late_status).await;
        assert_eq!(world.state(), State::Open, "a probe of the earlier half-open time");
        assert_eq!(world.handle.whole().open_for(), Some(10 * S));
    }
}

/// A result that came after the half-open time was over vanished, and its place with it [gobreaker#122, #49, #30].
#[tokio::test(start_paused = true)]
async fn a_probe_that_comes_back_late_but_first_still_counts() {
    let mut world = World::ready_to_probe(|layer| layer).await;
    let (slow, inner) = world.call().await;
    tokio::time::advance(3600 * S).await;
    end(slow, inner.unwrap(), 200).await;
    assert_eq!(world.state(), State::Closed);
}

/// The window was empty while hundreds were in flight [gobreaker#91].
#[tokio::test(start_paused = true)]
async fn the_first_of_many_in_flight_to_fail_closes_the_door_and_the_rest_change_nothing() {
    let mut world = World::new(|layer| layer.failures(5));
    let mut inside = Vec::new();
    for _ in 0..300 {
        let (answer, inner) = world.call().await;
        inside.push((answer, inner.unwrap()));
    }
    let mut changes = world.handle.changes();
    join_all(inside.into_iter().map(|(answer, inner)| end(answer, inner, 503))).await;
    assert!(world.is_refused().await);
    assert_eq!(changes.next().await.unwrap().reason, Reason::Failures);
    assert!(changes.next().now_or_never().is_none(), "it opened once");
    assert_eq!(world.handle.whole().open_for(), Some(10 * S), "and not for longer");
}

/// Half-open let in everyone whose predecessor was still under way, and timeouts there did not count [opossum#119, #57,
/// #59].
#[tokio::test(start_paused = true)]
async fn one_probe_at_a_time_and_its_error_opens_again() {
    let mut world = World::ready_to_probe(|layer| layer).await;
    let (answer, inner) = world.call().await;
    for _ in 0..10 {
        assert!(world.is_refused().await);
    }
    inner.unwrap().fail();
    assert!(answer.await.is_err());
    assert_eq!(world.state(), State::Open);
}

/// The window only grew: after many successes nearly as many failures were needed [tower-resilience].
#[tokio::test(start_paused = true)]
async fn a_long_good_past_does_not_hide_a_bad_present() {
    let window = Window::of_calls(100).unwrap().failure_rate(Share::new(0.5).unwrap());
    let mut world = World::new(|layer| layer.failures(0).window(window));
    for _ in 0..1000 {
        world.end(200).await;
    }
    for _ in 0..49 {
        world.end(500).await;
    }
    assert_eq!(world.state(), State::Closed);
    world.end(500).await;
    assert_eq!(world.state(), State::Open);
}

/// Half-open, results grew too old for the window while their permits were out, and nothing moved any more
/// [tower-resilience].
#[tokio::test(start_paused = true)]
async fn probes_slower_than_the_window_still_close_it() {
    let window = Window::of_time(S).unwrap().failure_rate(Share::new(0.5).unwrap()).at_least(1);
    let mut world = World::ready_to_probe(|layer| layer.window(window).successes(n(3))).await;
    for _ in 0..3 {
        let (answer, inner) = world.call().await;
        tokio::time::advance(4 * S).await;
        end(answer, inner.unwrap(), 200).await;
    }
    assert_eq!(world.state(), State::Closed);
}

/// Two who raced for the last permit made it wrap to four billion [circuitbreaker-rs].
#[tokio::test(start_paused = true)]
async fn places_given_back_late_are_not_added_to_the_new_ones() {
    let mut world = World::ready_to_probe(|layer| layer).await;
    let mut lost = Vec::new();
    for _ in 0..5 {
        let (answer, inner) = world.call().await;
        lost.push((answer, inner.unwrap()));
        tokio::time::advance(5 * S).await;
    }
    let (_probe, inner) = world.call().await;
    assert!(inner.is_some());
    drop(lost);
    assert!(world.is_refused().await, "five lost probes came back");
}

/// It was pending, or spun, while open, or told the caller to throw the service away [tower-resilience#382, tower#855].
#[tokio::test(start_paused = true)]
async fn open_is_ready_and_refuses_in_the_call() {
    let mut world = World::ready_to_probe(|layer| layer.open_for(20 * S)).await;
    let mut service = world.service.clone();
    assert!(service.ready().now_or_never().unwrap().is_ok());
    assert!(world.is_refused().await);
}

/// Somebody behind the breaker refused the probe, and its place was gone [sentinel-golang].
#[tokio::test(start_paused = true)]
async fn a_probe_refused_by_a_layer_behind_gives_its_place_back() {
    let mut world = World::ready_to_probe(|layer| layer).await;
    let (answer, inner) = world.call().await;
    let mut response = answer_of(503);
    response.extensions_mut().insert(Rejection::new(Name::RateLimit, StatusCode::SERVICE_UNAVAILABLE, "busy"));
    inner.unwrap().answer(response);
    answer.await.unwrap();
    assert_eq!(world.state(), State::HalfOpen);
    world.end(200).await;
    assert_eq!(world.state(), State::Closed);
}

/// The breaker saw 200 and was content, while every gRPC call failed in its trailers [tower-resilience, failsafe,
/// tower#855].
#[tokio::test(start_paused = true)]
async fn a_head_of_200_is_no_success_yet() {
    let layer = CircuitBreakLayer::new().failures(1).with_classify(Standard::default().exhausted(Outcome::Failure));
    let (probe, mut calls) = contract::probe::<()>();
    let call = tokio::spawn(layer.layer(probe).oneshot(Request::new(())));
    let (mut sender, body) = contract::body();
    calls.next().await.answer(Response::builder().header("content-type", "application/grpc").body(body).unwrap());
    let response = call.await.unwrap().unwrap();
    sender
        .send_trailers([(http::HeaderName::from_static("grpc-status"), 8.into())].into_iter().collect())
        .await
        .unwrap();
    drop(sender);
    response.into_body().collect().await.unwrap();
    assert_eq!(layer.handle().whole().state(), State::Open);
}

/// A panic threshold that the breaker obeyed by opening again had no effect.
#[tokio::test(start_paused = true)]
async fn a_panicking_balancer_is_not_held_up() {
    let endpoint = Endpoint::new("s", Instance::new("a", std::net::SocketAddr::from(([127, 0, 0, 1], 1))));
    let layer = CircuitBreakLayer::new().failures(1);
    let service = layer.layer(tower::service_fn(async |_: Request<()>| {
        Ok::<_, Broken>(Response::builder().status(500).body(Full::<Bytes>::default()).unwrap())
    }));
    let send = async |permit: Permit| {
        let mut request = Request::new(());
        permit.attach(request.extensions_mut());
        service.clone().oneshot(request).await.unwrap().status().as_u16()
    };
    send(endpoint.permit(|| Clock::system().now()).unwrap()).await;
    let open_for = layer.handle().endpoint(&endpoint).open_for();
    tokio::time::advance(S).await;
    assert_eq!(send(endpoint.permit_by_force()).await, 500);
    assert_eq!(layer.handle().endpoint(&endpoint).open_for().unwrap() + S, open_for.unwrap());
}

/// Two breakers on the way to one endpoint share its gate: the probe that one let in was refused by the other, for ever.
#[tokio::test(start_paused = true)]
async fn two_breakers_on_one_way_let_one_probe_in() {
    let endpoint = Endpoint::new("s", Instance::new("1", std::net::SocketAddr::from(([127, 0, 0, 1], 1))));
    let layer = || CircuitBreakLayer::new().failures(1).open_for(10 * S);
    let (outer, inner, (probe, mut calls)) = (layer(), layer(), contract::probe());
    let mut service = outer.layer(inner.layer(probe));
    let mut call = async |permit: Permit, status: u16| {
        let mut request = Request::new(());
        permit.attach(request.extensions_mut());
        let before = calls.count();
        let answer = service.ready().await.unwrap().call(request);
        if calls.count() > before {
            calls.next().await.answer(answer_of(status));
        }
        let response = answer.await.unwrap();
        let status = response.status().as_u16();
        response.into_body().collect().await.unwrap();
        status
    };
    let now = || Clock::system().now();
    let states = || (outer.handle().endpoint(&endpoint).state(), inner.handle().endpoint(&endpoint).state());

    assert_eq!(call(endpoint.permit(now).unwrap(), 500).await, 500);
    assert_eq!(states(), (State::Open, State::Open));
    assert_eq!(call(endpoint.permit_by_force(), 200).await, 200, "a balancer that panics is believed by both");
    assert_eq!(states(), (State::Open, State::Open));
    tokio::time::advance(10 * S).await;
    let permit = endpoint.permit(now).unwrap();
    assert!(endpoint.permit(now).is_err(), "there is one place");
    assert_eq!(call(permit, 200).await, 200);
    assert_eq!(states(), (State::Closed, State::Closed));
    assert!(endpoint.gate().admits());
}
