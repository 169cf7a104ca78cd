//! What the layer allocates: nothing of its own.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::task::{Context, Poll, Waker};

use http::{Request, Response};
use http_body_util::Empty;
use portcullis_core::{Carried, Identity, PeerAddress, Proof, Route};
use portcullis_rate_limit::{Everyone, Limit, Policy, Rate, RateLimitLayer};
use tower::{Layer, Service, service_fn};

fn n(count: u32) -> NonZeroU32 {
    NonZeroU32::new(count).unwrap()
}

fn from(address: [u8; 4]) -> Request<()> {
    let mut request = Request::new(());
    PeerAddress(SocketAddr::from((address, 1))).attach(request.extensions_mut());
    request
}

#[test]
fn an_admitted_request_allocates_nothing() {
    let answer = service_fn(|_: Request<()>| {
        std::future::ready(Ok::<_, std::convert::Infallible>(Response::new(Empty::<bytes::Bytes>::new())))
    });
    let layer = RateLimitLayer::new(Rate::per_second(n(1000))).and(Limit::new("day", Rate::per_day(n(1_000_000))));
    let mut service = layer.and(Limit::new("all", Rate::per_second(n(1000))).with_key(Everyone)).layer(answer);
    let mut called = from([192, 0, 2, 2]);
    Identity::new("auth0|5f7c8ec7c33c6c004bbafe82", Proof::Jwt)
        .with_issuer("https://issuer.example.com/")
        .attach(called.extensions_mut());
    let mut long = from([192, 0, 2, 4]);
    let tenant = "https://login.microsoftonline.com/9188040d-6c67-4c5b-b112-36a304b66dad/v2.0";
    Identity::new("AAAAAAAAAAAAAAAAAAAAAIkzqFVrSaSaFHy782bbtaQ", Proof::Jwt)
        .with_issuer(tenant)
        .attach(long.extensions_mut());
    Route::new("/orders/{id}").with_policy(Policy::new(Rate::per_second(n(10)))).attach(long.extensions_mut());
    let mut routed = from([192, 0, 2, 3]);
    let policy = Policy::new(Rate::per_second(n(10))).beside_default();
    Route::new("/orders/{id}").with_policy(policy).attach(routed.extensions_mut());
    // What the first call of a thread sets up is not counted.
    assert!(matches!(poll(&mut service, from([192, 0, 2, 9])), 200));
    for request in [from([192, 0, 2, 1]), called, long, routed] {
        let mut request = Some(request);
        let mut status = 0;
        let made = allocation_counter::measure(|| status = poll(&mut service, request.take().unwrap()));
        assert_eq!((made.count_total, status), (0, 200));
    }
}

fn poll<S, B>(service: &mut S, request: Request<()>) -> u16
where
    S: Service<Request<()>, Response = Response<B>>,
{
    let mut future = std::pin::pin!(service.call(request));
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(Ok(response)) => response.status().as_u16(),
        _ => 0,
    }
}
