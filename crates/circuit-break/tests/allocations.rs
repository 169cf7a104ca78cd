//! An admitted call allocates nothing, whatever the breaker watches.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use portcullis_circuit_break::{CircuitBreakLayer, Share, Window};
use portcullis_core::{Carried, Endpoint, Instance, Moment, Permit};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tower::{Layer, Service};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<std::alloc::System> = &INSTRUMENTED_SYSTEM;

fn fine(_: Request<()>) -> Ready<Result<Response<Full<Bytes>>, Infallible>> {
    ready(Ok(Response::new(Full::new(Bytes::from_static(b"fine")))))
}

/// All in one test: another's allocations would be counted, too.
#[test]
fn an_admitted_call_allocates_nothing() {
    let half = Share::new(0.5).unwrap();
    let slow = Duration::from_secs(1);
    let calls = Window::of_calls(100).unwrap().failure_rate(half).slow_rate(slow, half);
    let time = Window::of_time(Duration::from_secs(10)).unwrap().failure_rate(half).slow_rate(slow, half);
    let endpoint = Endpoint::new("s", Instance::new("a", SocketAddr::from(([127, 0, 0, 1], 1))));
    for layer in [CircuitBreakLayer::new(), CircuitBreakLayer::new().window(calls).window(time)] {
        let mut service = layer.layer(tower::service_fn(fine));
        let mut call = |request| {
            let region = Region::new(ALLOCATOR);
            let response = service.call(request).now_or_never().unwrap().unwrap();
            assert!(response.into_body().collect().now_or_never().unwrap().is_ok());
            region.change().allocations
        };
        let permitted = || {
            let mut request = Request::new(());
            endpoint.permit(|| Moment::MIN).unwrap().attach(request.extensions_mut());
            request
        };
        // The first call to an endpoint makes its breaker; collecting a body may allocate by itself.
        let bare = {
            let region = Region::new(ALLOCATOR);
            let response = fine(Request::new(())).now_or_never().unwrap().unwrap();
            assert!(response.into_body().collect().now_or_never().unwrap().is_ok());
            region.change().allocations
        };
        call(permitted());
        assert_eq!((call(Request::new(())), call(permitted())), (bare, bare));
        let mut without = Request::new(());
        Permit::without_right(endpoint.clone()).attach(without.extensions_mut());
        assert_eq!(call(without), bare);
    }
}
