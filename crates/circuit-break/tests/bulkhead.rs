//! The bulkhead through its public interface.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::time::Duration;

use futures::FutureExt;
use http::{Request, Response};
use http_body_util::BodyExt;
use portcullis_circuit_break::{BulkheadLayer, CircuitBreakLayer, State};
use portcullis_core::{Carried, Endpoint, Generation, Instance, Moment, Mover, Permit, Ration, Rejection};
use portcullis_testing::contract::{self, Broken};
use tower::{Layer, Service, ServiceBuilder, ServiceExt};

fn layer(limit: u32) -> BulkheadLayer {
    BulkheadLayer::new(NonZeroU32::new(limit).unwrap())
}

fn permitted(permit: Permit) -> Request<()> {
    let mut request = Request::new(());
    permit.attach(request.extensions_mut());
    request
}

fn endpoint() -> Endpoint {
    Endpoint::new("s", Instance::new("a", SocketAddr::from(([127, 0, 0, 1], 1))))
}

#[tokio::test(start_paused = true)]
async fn it_keeps_the_contract() {
    contract::holds(layer(6), Request::new).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_one_too_many_is_refused_at_once_and_clones_share_the_limit() {
    let layer = layer(2);
    let (probe, mut calls) = contract::probe::<()>();
    let (mut a, mut b) = (layer.layer(probe.clone()), layer.layer(probe));
    let first = a.ready().await.unwrap().call(Request::new(()));
    let second = b.ready().await.unwrap().call(Request::new(()));
    let refused = a.ready().await.unwrap().call(Request::new(())).now_or_never().unwrap().unwrap();
    assert_eq!(refused.status().as_u16(), 503);
    assert_eq!(refused.extensions().get::<Rejection>().unwrap().reason(), "too-many-in-flight");
    assert_eq!((calls.count(), layer.in_flight(), layer.refused()), (2, 2, 1));
    drop(second);
    calls.next().await.answer(Response::new(contract::full("x")));
    let response = first.await.unwrap();
    assert_eq!(layer.in_flight(), 1, "the body is not over");
    response.into_body().collect().await.unwrap();
    assert_eq!(layer.in_flight(), 0);
}

/// Permits were not given back when a call was cancelled [resilience4j#332, failsafe-go's limiter].
#[tokio::test(start_paused = true)]
async fn a_call_dropped_at_any_await_is_in_flight_no_more() {
    let layer = layer(1);
    let (probe, mut calls) = contract::probe::<()>();
    let mut service = layer.layer(probe);
    drop(service.ready().await.unwrap().call(Request::new(())));
    assert_eq!(layer.in_flight(), 0, "never polled");
    drop(calls.next().await);
    let mut call = Box::pin(service.ready().await.unwrap().call(Request::new(())));
    assert!(futures::poll!(&mut call).is_pending());
    drop(call);
    assert_eq!(layer.in_flight(), 0, "polled");
    drop(calls.next().await);
    let call = service.ready().await.unwrap().call(Request::new(()));
    calls.next().await.fail();
    assert!(call.await.is_err());
    assert_eq!(layer.in_flight(), 0, "failed");
    for cut in [true, false] {
        let call = service.ready().await.unwrap().call(Request::new(()));
        let (sender, body) = contract::body();
        calls.next().await.answer(Response::new(body));
        let body = call.await.unwrap().into_body();
        assert_eq!(layer.in_flight(), 1);
        if cut {
            sender.abort(Broken("reset"));
            assert!(body.collect().await.is_err());
        } else {
            drop(body);
        }
        assert_eq!(layer.in_flight(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn below_a_balancer_each_endpoint_has_its_limit_and_a_refusal_gives_its_place_at_the_gate_back() {
    let (layer, a, b) = (layer(1), endpoint(), endpoint());
    let (probe, _calls) = contract::probe::<()>();
    let mut service = layer.layer(probe);
    let now = || Moment::from_nanos(1);
    let _busy = service.ready().await.unwrap().call(permitted(a.permit(now).unwrap()));
    let ration = Ration { until: Moment::MIN, places: 1, every: Duration::from_secs(9) };
    a.gate().ration(Mover::new(), Generation::FIRST, ration).unwrap();
    let refused = service.ready().await.unwrap().call(permitted(a.permit(now).unwrap()));
    assert_eq!(refused.await.unwrap().status().as_u16(), 503);
    assert!(a.permit(now).is_ok(), "the place is free again");
    let other = service.ready().await.unwrap().call(permitted(b.permit(now).unwrap()));
    assert!(other.now_or_never().is_none(), "the other one is not busy");
    assert_eq!((layer.in_flight_to(&a), layer.in_flight_to(&b), layer.in_flight()), (1, 0, 0));
}

/// A call that outlives its endpoint must not be counted down at the next.
#[tokio::test(start_paused = true)]
async fn an_endpoint_that_comes_when_another_is_gone_begins_anew_and_calls_that_are_left_take_nothing_from_it() {
    let layer = layer(1);
    let hanging =
        tower::service_fn(|_: Request<()>| std::future::pending::<Result<Response<contract::ProbeBody>, Broken>>());
    let mut service = layer.layer(hanging);
    let now = || Moment::from_nanos(1);
    // Others come and go beside this test, so which numbers are given again is not known: many that follow each other.
    for _ in 0..100 {
        let gone = endpoint();
        let left = service.ready().await.unwrap().call(permitted(Permit::without_right(gone.clone())));
        assert_eq!(layer.in_flight_to(&gone), 1);
        drop(gone);
        let next = endpoint();
        let call = service.ready().await.unwrap().call(permitted(next.permit(now).unwrap()));
        assert_eq!(layer.in_flight_to(&next), 1);
        drop(left);
        assert_eq!(layer.in_flight_to(&next), 1);
        drop(call);
        assert_eq!(layer.in_flight_to(&next), 0);
    }
}

/// Hundreds were in flight before the first result came [gobreaker#91]: a bulkhead holds until a timeout tells the breaker.
#[tokio::test(start_paused = true)]
async fn a_bulkhead_holds_the_crowd_until_the_breaker_knows() {
    let (bulkhead, breaker) = (layer(10), CircuitBreakLayer::new());
    let hanging =
        tower::service_fn(|_: Request<()>| std::future::pending::<Result<Response<contract::ProbeBody>, Broken>>());
    let service = ServiceBuilder::new()
        .layer(&bulkhead)
        .layer(&breaker)
        .layer(tower::timeout::TimeoutLayer::new(Duration::from_secs(1)))
        .service(hanging);
    let crowd = (0..300).map(|_| service.clone().oneshot(Request::new(())));
    let answers = futures::future::join_all(crowd).await;
    assert_eq!(answers.iter().filter(|answer| answer.is_err()).count(), 10);
    assert_eq!((breaker.handle().whole().state(), bulkhead.in_flight()), (State::Open, 0));
}
