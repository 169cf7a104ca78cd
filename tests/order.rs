//! Each refusal stops before the next layer.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use http::{Request, Response};
use http_body_util::Full;
use portcullis::auth::{self, AuthLayer};
use portcullis::balance::{BalanceLayer, RoundRobin};
use portcullis::circuit_break::CircuitBreakLayer;
use portcullis::core::{Carried, Destination, Mover, Rejection, Route};
use portcullis::discovery::{DiscoveryLayer, EmbeddedRegistry, Registry, ServiceDefinition};
use portcullis::forward::Forward;
use portcullis::rate_limit::{Rate, RateLimitLayer};
use portcullis_testing::process::Nobody;
use support::{Count, bearer};
use tower::{Service, ServiceBuilder, ServiceExt};

type Body = Full<bytes::Bytes>;

/// A request as the route layer leaves it.
fn request(service: &str, subject: Option<&str>) -> Request<Body> {
    let mut request = Request::get("http://gateway/orders/7").body(Body::default()).unwrap();
    if let Some(subject) = subject {
        request.headers_mut().insert("authorization", bearer(subject).parse().unwrap());
    }
    Destination::new(service).attach(request.extensions_mut());
    Route::new("/orders/{id}").attach(request.extensions_mut());
    request
}

async fn answer<S, R>(stack: &S, request: Request<Body>) -> (u16, &'static str)
where
    S: Service<Request<Body>, Response = Response<R>> + Clone,
    S::Error: std::fmt::Debug,
{
    let response = stack.clone().oneshot(request).await.unwrap();
    let layer = response.extensions().get::<Rejection>().map_or("", |rejection| rejection.layer().as_str());
    (response.status().as_u16(), layer)
}

#[tokio::test]
async fn each_refusal_stops_before_the_next_layer() {
    let registry = EmbeddedRegistry::new();
    let backends = support::backends(&["a"]).await;
    let _orders = support::register(&registry, "orders", support::places(&backends)).await;
    let nobody = Nobody::new();
    let _dead = registry.register(ServiceDefinition::new("dead", "d", nobody.address())).await.unwrap();

    let passed: [Count; 6] = Default::default();
    let [after_auth, after_limit, after_discovery, after_balance, after_breaker, _] = passed.clone();
    let discovery = DiscoveryLayer::new(registry);
    let stack = ServiceBuilder::new()
        .layer(AuthLayer::new(support::jwt()))
        .layer(after_auth)
        .layer(RateLimitLayer::new(Rate::per_minute(4_u32.try_into().unwrap())))
        .layer(after_limit)
        .layer(discovery.clone())
        .layer(after_discovery)
        .layer(BalanceLayer::new(RoundRobin::default()).panic_threshold(0))
        .layer(after_balance)
        .layer(CircuitBreakLayer::new())
        .layer(after_breaker)
        .service(Forward::new());
    let mut seen = [0; 5];
    let mut step = |more: [usize; 5]| {
        let now: [usize; 5] = std::array::from_fn(|layer| passed[layer].get());
        let rise: [usize; 5] = std::array::from_fn(|layer| now[layer] - seen[layer]);
        seen = now;
        assert_eq!(rise, more, "auth, limit, discovery, balance, breaker");
    };

    assert_eq!(answer(&stack, request("orders", Some("ada"))).await, (200, ""));
    step([1, 1, 1, 1, 1]);
    assert_eq!(answer(&stack, request("orders", None)).await, (401, "auth"));
    step([0, 0, 0, 0, 0]);
    for _ in 0..3 {
        assert_eq!(answer(&stack, request("orders", Some("ada"))).await.0, 200);
    }
    step([3, 3, 3, 3, 3]);
    assert_eq!(answer(&stack, request("orders", Some("ada"))).await, (429, "rate-limit"));
    step([1, 0, 0, 0, 0]);
    assert_eq!(answer(&stack, request("nowhere", Some("eve"))).await, (503, "discovery"));
    step([1, 1, 0, 0, 0]);

    let endpoints = discovery.follow("orders").unwrap();
    let admin = Mover::new();
    endpoints[0].gate().close_for(admin);
    assert_eq!(answer(&stack, request("orders", Some("bob"))).await, (503, "balance"));
    step([1, 1, 1, 0, 0]);
    endpoints[0].gate().open_for(admin);

    assert_eq!(answer(&stack, request("dead", Some("bob"))).await, (502, "forward"));
}

#[tokio::test]
async fn a_breaker_alone_refuses_before_forward() {
    let passed = Count::default();
    let nobody = Nobody::new();
    let stack = ServiceBuilder::new()
        .layer(CircuitBreakLayer::new())
        .layer(passed.clone())
        .service(Forward::to(&format!("http://{}", nobody.address())).unwrap());
    for _ in 0..5 {
        assert_eq!(answer(&stack, request("orders", None)).await, (502, "forward"));
    }
    assert_eq!(answer(&stack, request("orders", None)).await, (503, "circuit-break"));
    assert_eq!(passed.get(), 5);
}

#[tokio::test]
async fn a_route_decides_whether_callers_are_asked() {
    let stack = ServiceBuilder::new()
        .layer(AuthLayer::new(support::jwt()))
        .service_fn(async |_| Ok::<_, std::convert::Infallible>(Response::new(Body::default())));
    let mut open = request("orders", None);
    Route::new("/open").with_policy(auth::Policy::none()).attach(open.extensions_mut());
    assert_eq!(answer(&stack, open).await, (200, ""));
    assert_eq!(answer(&stack, request("orders", None)).await, (401, "auth"));
}
