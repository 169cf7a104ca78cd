//! The layer through its public interface.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::num::NonZeroU32;
use std::time::Duration;

use http::{Request, Response, header};
use portcullis_core::{Carried, Identity, Proof, Rejection, Route, TrustedProxies};
use portcullis_rate_limit::{
    Everyone, Fields, Header, Limit, Policy, Priority, Rate, RateLimit, RateLimitLayer, RequestHead,
};
use portcullis_testing::contract;
use tower::{Layer, Service, ServiceExt};

mod limited;

use self::limited::{Ok200, from, n};

fn per_second(count: u32) -> Rate {
    Rate::per_second(n(count))
}

fn on(route: &Route, address: &str) -> Request<()> {
    let mut request = from(address);
    route.clone().attach(request.extensions_mut());
    request
}

async fn call(service: &RateLimit<Ok200>, request: Request<()>) -> Response<()> {
    service.clone().oneshot(request).await.unwrap().map(drop)
}

async fn status(service: &RateLimit<Ok200>, request: Request<()>) -> u16 {
    call(service, request).await.status().as_u16()
}

#[tokio::test(start_paused = true)]
async fn the_contract_holds() {
    let layer = RateLimitLayer::new(per_second(1000));
    contract::holds(layer, |body| from("192.0.2.1").map(|()| body)).await;
}

#[tokio::test(start_paused = true)]
async fn clones_and_services_share_one_budget() {
    let layer = RateLimitLayer::new(per_second(3));
    let (a, b) = (layer.layer(Ok200), layer.clone().layer(Ok200));
    assert_eq!(status(&a, from("192.0.2.1")).await, 200);
    assert_eq!(status(&b, from("192.0.2.1")).await, 200);
    assert_eq!(status(&a.clone(), from("192.0.2.1")).await, 200);
    assert_eq!(status(&b.clone(), from("192.0.2.1")).await, 429);
    let other = RateLimitLayer::new(per_second(3)).layer(Ok200);
    assert_eq!(status(&other, from("192.0.2.1")).await, 200);
}

#[tokio::test(start_paused = true)]
async fn each_caller_has_its_own_budget() {
    let service = RateLimitLayer::new(per_second(1)).layer(Ok200);
    let ada = |issuer: &'static str, address| {
        let mut request = from(address);
        Identity::new("ada", Proof::Jwt).with_issuer(issuer).attach(request.extensions_mut());
        request
    };
    assert_eq!(status(&service, from("192.0.2.1")).await, 200);
    assert_eq!(status(&service, from("192.0.2.2")).await, 200);
    assert_eq!(status(&service, ada("x", "192.0.2.1")).await, 200);
    assert_eq!(status(&service, ada("x", "192.0.2.3")).await, 429, "the same caller from elsewhere");
    assert_eq!(status(&service, ada("y", "192.0.2.1")).await, 200);
    assert_eq!(status(&service, from("2001:db8::1")).await, 200);
    assert_eq!(status(&service, from("2001:db8::2")).await, 429, "the same network");
    assert_eq!(status(&service, Request::new(())).await, 200);
    assert_eq!(status(&service, Request::new(())).await, 429, "nobody knows who: one budget");
}

#[tokio::test(start_paused = true)]
async fn forwarded_addresses_count_only_from_trusted_proxies() {
    let through = |proxy, client: &str| {
        let mut request = from(proxy);
        request.headers_mut().insert("x-forwarded-for", client.parse().unwrap());
        request
    };
    let proxies = TrustedProxies::networks(["10.0.0.0/8"]).unwrap();
    let service = RateLimitLayer::new(per_second(1)).trusted_proxies(proxies).layer(Ok200);
    assert_eq!(status(&service, through("10.0.0.1", "192.0.2.1")).await, 200);
    assert_eq!(status(&service, through("10.0.0.1", "192.0.2.2")).await, 200);
    assert_eq!(status(&service, through("10.0.0.1", "203.0.113.7, 192.0.2.2")).await, 429);
    assert_eq!(status(&service, through("198.51.100.1", "192.0.2.3")).await, 200);
    assert_eq!(status(&service, through("198.51.100.1", "192.0.2.4")).await, 429);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_says_when_to_come_back_and_that_is_true() {
    let service = RateLimitLayer::new(Rate::per_minute(n(40))).burst(n(1)).layer(Ok200);
    assert_eq!(status(&service, from("192.0.2.1")).await, 200);
    let refused = call(&service, from("192.0.2.1")).await;
    assert_eq!(refused.status(), 429);
    assert_eq!(refused.headers()[header::RETRY_AFTER], "2", "1.5 s rounded up");
    assert_eq!(refused.headers()["ratelimit-policy"], r#""default";q=1;w=2"#);
    assert_eq!(refused.headers()["ratelimit"], r#""default";r=0;t=2"#);
    let rejection = refused.extensions().get::<Rejection>().unwrap();
    assert_eq!(rejection.retry_after(), Some(Duration::from_millis(1500)));
    assert_eq!(rejection.reason(), "too-many-requests");
    tokio::time::advance(Duration::from_millis(1499)).await;
    assert_eq!(status(&service, from("192.0.2.1")).await, 429);
    tokio::time::advance(Duration::from_millis(1)).await;
    assert_eq!(status(&service, from("192.0.2.1")).await, 200);
}

#[tokio::test(start_paused = true)]
async fn grpc_callers_are_refused_in_their_words() {
    let service = RateLimitLayer::new(per_second(1)).layer(Ok200);
    let request = || {
        let mut request = from("192.0.2.1");
        request.headers_mut().insert(header::CONTENT_TYPE, "application/grpc".parse().unwrap());
        request
    };
    call(&service, request()).await;
    let refused = call(&service, request()).await;
    assert_eq!(refused.status(), 200);
    assert_eq!(refused.headers()["grpc-status"], "8");
    assert_eq!(refused.headers()["grpc-retry-pushback-ms"], "1000");
    assert!(refused.headers().contains_key("grpc-status-details-bin"));
}

#[tokio::test(start_paused = true)]
async fn a_route_has_its_own_limits_and_counters() {
    let service = RateLimitLayer::new(per_second(2)).layer(Ok200);
    let policy = Policy::new(per_second(1));
    let (a, b) = (Route::new("/a").with_policy(policy.clone()), Route::new("/b").with_policy(policy));
    let open = Route::new("/open").with_policy(Policy::unlimited());
    let both = Route::new("/both").with_policy(Policy::new(per_second(100)).beside_default());
    assert_eq!(status(&service, on(&a, "192.0.2.1")).await, 200);
    assert_eq!(status(&service, on(&a, "192.0.2.1")).await, 429);
    assert_eq!(status(&service, on(&b, "192.0.2.1")).await, 200);
    assert_eq!(status(&service, on(&b, "192.0.2.1")).await, 429);
    for _ in 0..10 {
        assert_eq!(status(&service, on(&open, "192.0.2.1")).await, 200);
    }
    assert_eq!(status(&service, on(&both, "192.0.2.1")).await, 200);
    assert_eq!(status(&service, on(&Route::new("/none"), "192.0.2.1")).await, 200);
    assert_eq!(status(&service, on(&both, "192.0.2.1")).await, 429, "the layer's own limit is used up");
}

#[tokio::test(start_paused = true)]
async fn several_limits_are_charged_all_or_none() {
    let global = Limit::new("all", per_second(3)).with_key(Everyone);
    let layer = RateLimitLayer::new(per_second(2)).and(global);
    let service = layer.layer(Ok200);
    assert_eq!(status(&service, from("192.0.2.1")).await, 200);
    assert_eq!(status(&service, from("192.0.2.1")).await, 200);
    for _ in 0..10 {
        assert_eq!(status(&service, from("192.0.2.1")).await, 429, "its own limit");
    }
    assert_eq!(status(&service, from("192.0.2.2")).await, 200, "the refusals cost the common limit nothing");
    for _ in 0..10 {
        assert_eq!(status(&service, from("192.0.2.2")).await, 429, "the common limit");
    }
    tokio::time::advance(Duration::from_millis(334)).await;
    assert_eq!(status(&service, from("192.0.2.2")).await, 200, "the refusals cost its own limit nothing");
    assert_eq!(layer.handle().stats().refused, 20);
}

#[tokio::test(start_paused = true)]
async fn requests_cost_what_they_cost_and_some_are_exempt() {
    let size = |request: &portcullis_rate_limit::RequestHead<'_>| {
        request.headers().get("x-size").and_then(|size| size.to_str().ok()?.parse().ok()).unwrap_or(1)
    };
    let sized = |size: u32| {
        let mut request = from("192.0.2.1");
        request.headers_mut().insert("x-size", size.into());
        request
    };
    let layer = RateLimitLayer::limits([Limit::new("size", per_second(10)).cost(size)]);
    let layer = layer.exempt(|request| request.uri().path() == "/health");
    let service = layer.layer(Ok200);
    assert_eq!(status(&service, sized(7)).await, 200);
    assert_eq!(status(&service, sized(4)).await, 429);
    assert_eq!(status(&service, sized(3)).await, 200);
    assert_eq!(status(&service, sized(0)).await, 200, "what costs nothing is not limited");
    let never = call(&service, sized(11)).await;
    assert_eq!(never.status(), 429);
    assert!(!never.headers().contains_key(header::RETRY_AFTER), "more than the burst is never admitted");
    let mut health = sized(11);
    *health.uri_mut() = "/health".parse().unwrap();
    assert_eq!(status(&service, health).await, 200);
}

#[tokio::test(start_paused = true)]
async fn plans_give_callers_different_rates() {
    let key = Header::new(http::HeaderName::from_static("x-key"));
    let limit = Limit::new("plan", per_second(1))
        .with_key(key)
        .plan(|request| (request.headers().get("x-key")? == "gold").then(|| per_second(3)));
    let layer = RateLimitLayer::limits([limit]);
    let service = layer.layer(Ok200);
    let keyed = |key: &str| {
        let mut request = from("192.0.2.1");
        request.headers_mut().insert("x-key", key.parse().unwrap());
        request
    };
    for _ in 0..3 {
        assert_eq!(status(&service, keyed("gold")).await, 200);
    }
    assert_eq!(status(&service, keyed("gold")).await, 429);
    assert_eq!(status(&service, keyed("tin")).await, 200);
    assert_eq!(status(&service, keyed("tin")).await, 429);
}

#[tokio::test(start_paused = true)]
async fn a_claim_says_how_often() {
    let quota = |request: &RequestHead<'_>| {
        let quota = request.identity()?.claim("quota")?.as_u64()?;
        Some(per_second(NonZeroU32::new(u32::try_from(quota).ok()?)?.get()))
    };
    let layer = RateLimitLayer::limits([Limit::new("quota", per_second(1)).plan(quota)]);
    let service = layer.layer(Ok200);
    let called = |subject: &str, claims: serde_json::Value| {
        let mut request = from("192.0.2.1");
        let serde_json::Value::Object(claims) = claims else { unreachable!() };
        Identity::new(subject, Proof::Jwt).with_claims(claims).attach(request.extensions_mut());
        request
    };
    for (subject, claims, allowed) in [
        ("ada", serde_json::json!({ "quota": 3 }), 3),
        ("bob", serde_json::json!({ "quota": "three" }), 1),
        ("eve", serde_json::json!({ "quota": 0 }), 1),
        ("kim", serde_json::json!({}), 1),
    ] {
        for _ in 0..allowed {
            assert_eq!(status(&service, called(subject, claims.clone())).await, 200, "{subject}");
        }
        assert_eq!(status(&service, called(subject, claims)).await, 429, "{subject}");
    }
}

#[tokio::test(start_paused = true)]
async fn rates_change_while_requests_flow_and_debts_stay() {
    let layer = RateLimitLayer::new(per_second(2));
    let (service, handle) = (layer.layer(Ok200), layer.handle());
    assert_eq!(status(&service, from("192.0.2.1")).await, 200);
    assert_eq!(status(&service, from("192.0.2.1")).await, 200);
    assert!(handle.set_rate("default", per_second(4)));
    assert!(!handle.set_rate("other", per_second(4)));
    assert_eq!(status(&service, from("192.0.2.1")).await, 429, "a second of debt stays a second of debt");
    tokio::time::advance(Duration::from_millis(250)).await;
    assert_eq!(status(&service, from("192.0.2.1")).await, 200);
    assert_eq!(handle.limits()[0].rate(), Some(per_second(4)));
}

#[tokio::test(start_paused = true)]
async fn fields_are_on_every_response_if_asked_for() {
    let layer = RateLimitLayer::new(per_second(10)).fields(Fields::always().with_legacy());
    let service = layer.clone().and(Limit::new("day", Rate::per_day(n(100)))).layer(Ok200);
    let response = call(&service, from("192.0.2.1")).await;
    assert_eq!(response.headers()["ratelimit-policy"], r#""default";q=10;w=1, "day";q=100;w=86400"#);
    assert_eq!(response.headers()["ratelimit"], r#""default";r=9;t=1, "day";r=99;t=864"#);
    assert_eq!(response.headers()["x-ratelimit-remaining"], "9");
    // Where the service has limits of its own, lists add up; of two numbers nobody knows which counts.
    let own = layer.layer(tower::service_fn(async |_: Request<()>| {
        let response =
            Response::builder().header("x-ratelimit-remaining", "4999").header("ratelimit", "\"own\";r=4999");
        Ok::<_, std::convert::Infallible>(response.body(http_body_util::Empty::<bytes::Bytes>::new()).unwrap())
    }));
    let response = own.oneshot(from("192.0.2.2")).await.unwrap();
    let all = |name: &str| response.headers().get_all(name).iter().count();
    assert_eq!((all("x-ratelimit-remaining"), all("ratelimit")), (1, 2));
    let quiet = RateLimitLayer::new(per_second(1)).fields(Fields::never()).layer(Ok200);
    call(&quiet, from("192.0.2.1")).await;
    let refused = call(&quiet, from("192.0.2.1")).await;
    assert!(refused.headers().contains_key(header::RETRY_AFTER) && !refused.headers().contains_key("ratelimit"));
}

#[tokio::test(start_paused = true)]
async fn a_setter_after_a_clone_leaves_the_clone_alone() {
    let layer = RateLimitLayer::new(per_second(1));
    let service = layer.layer(Ok200);
    let wide = layer.clone().burst(n(2)).layer(Ok200);
    assert_eq!(status(&service, from("192.0.2.1")).await, 200);
    assert_eq!(status(&service, from("192.0.2.1")).await, 429);
    assert_eq!(status(&wide, from("192.0.2.1")).await, 200);
    assert_eq!(status(&wide, from("192.0.2.1")).await, 200);
    assert_eq!(status(&wide, from("192.0.2.1")).await, 429);
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_strangers_do_not_displace_a_caller_in_debt() {
    let layer = RateLimitLayer::new(Rate::per_hour(n(10))).capacity(100);
    let service = layer.layer(Ok200);
    for _ in 0..10 {
        assert_eq!(status(&service, from("192.0.2.1")).await, 200);
    }
    for stranger in 0..10_000_u32 {
        status(&service, from(&std::net::Ipv4Addr::from_bits(0x0a00_0000 + stranger).to_string())).await;
    }
    assert_eq!(status(&service, from("192.0.2.1")).await, 429);
    let stats = layer.handle().stats();
    assert_eq!((stats.live, stats.places, stats.bytes), (34 * 14, 34 * 14, 34 * 192));
    assert!(stats.overflowed > 0 && stats.overflowing == stats.buckets, "{stats:?}");
}

#[tokio::test(start_paused = true)]
async fn the_contract_holds_with_everything_held() {
    let layer = RateLimitLayer::new(per_second(1000))
        .and(Limit::concurrent("at once", n(10)))
        .and(Limit::new("bytes", per_second(1000)).settle(|seen| seen.bytes as u32))
        .delay(Duration::from_secs(1), 10)
        .fields(Fields::always());
    contract::holds(layer.clone(), |body| from("192.0.2.1").map(|()| body)).await;
    assert_eq!(layer.handle().stats().in_flight, 0, "something was not given back");
}

#[tokio::test(start_paused = true)]
async fn a_concurrency_limit_counts_until_the_body_ends_or_is_dropped() {
    let layer = RateLimitLayer::new(per_second(1000)).and(Limit::concurrent("at once", n(2)));
    let (probe, mut calls) = contract::probe();
    let mut service = layer.layer(probe);
    let mut bodies = Vec::new();
    let mut feeds = Vec::new();
    for _ in 0..2 {
        let call = service.ready().await.unwrap().call(from("192.0.2.1"));
        let (feed, body) = contract::body();
        let serve = async { calls.next().await.answer(Response::new(body)) };
        let (response, _) = tokio::join!(call, serve);
        bodies.push(response.unwrap().into_body());
        feeds.push(feed);
    }
    let refused = service.ready().await.unwrap().call(from("192.0.2.1")).await.unwrap();
    assert_eq!(refused.status(), 429);
    assert!(!refused.headers().contains_key(header::RETRY_AFTER), "nobody knows when");
    assert_eq!(refused.headers()["ratelimit-policy"], r#""at once";q=2;qu="concurrent-requests""#);
    assert_eq!(refused.headers()["ratelimit"], r#""at once";r=0"#);
    assert_eq!(layer.handle().stats().in_flight, 2);
    let other = service.ready().await.unwrap().call(from("192.0.2.2"));
    assert_eq!(layer.handle().stats().in_flight, 3, "another caller has places of its own");
    drop(other);
    drop(feeds.pop());
    let whole = http_body_util::BodyExt::collect(bodies.pop().unwrap()).await.unwrap();
    drop(whole);
    assert_eq!(layer.handle().stats().in_flight, 1, "the body ended");
    drop(bodies);
    assert_eq!(layer.handle().stats().in_flight, 0, "the body was dropped");
    let call = service.ready().await.unwrap().call(from("192.0.2.1"));
    assert_eq!(layer.handle().stats().in_flight, 1);
    drop(call);
    assert_eq!(layer.handle().stats().in_flight, 0, "the call was dropped");
}

#[tokio::test(start_paused = true)]
async fn costs_are_settled_when_the_response_has_ended() {
    let layer = RateLimitLayer::new(per_second(1));
    let bytes = Limit::new("bytes", per_second(100)).cost(|_| 10).settle(|seen| {
        assert!(seen.whole);
        if seen.status == 500 { 0 } else { seen.bytes as u32 }
    });
    layer.handle().set_limits([bytes]);
    let (probe, mut calls) = contract::probe();
    let mut service = layer.clone().fields(Fields::always()).layer(probe);
    let mut answer = async |status: u16, body: &'static str| {
        let call = service.ready().await.unwrap().call(from("192.0.2.1"));
        let mut response = Response::new(contract::full(body));
        *response.status_mut() = http::StatusCode::from_u16(status).unwrap();
        let serve = async { calls.next().await.answer(response) };
        let (response, _) = tokio::join!(call, serve);
        let response = response.unwrap();
        let left = response.headers()["ratelimit"].to_str().unwrap().to_owned();
        http_body_util::BodyExt::collect(response.into_body()).await.unwrap();
        left
    };
    assert_eq!(answer(200, "abcd").await, r#""bytes";r=90;t=1"#);
    assert_eq!(answer(500, "a long story of failure").await, r#""bytes";r=86;t=1"#, "four, not ten");
    assert_eq!(answer(200, "twenty-five bytes of text").await, r#""bytes";r=86;t=1"#, "a failure costs nothing");
    assert_eq!(answer(200, "").await, r#""bytes";r=61;t=1"#, "twenty-five");
}

#[tokio::test(start_paused = true)]
async fn costs_are_found_in_trailers_and_in_what_the_service_left() {
    #[derive(Clone)]
    struct Tokens(u32);

    let layer = RateLimitLayer::new(per_second(1));
    let tokens = Limit::new("tokens", per_second(100)).settle(|seen| {
        let trailer = seen.trailers.and_then(|trailers| trailers.get("x-tokens")?.to_str().ok()?.parse().ok());
        trailer.or(seen.extensions.get().map(|Tokens(tokens)| *tokens)).unwrap_or(1)
    });
    layer.handle().set_limits([tokens]);
    let (probe, mut calls) = contract::probe();
    let mut service = layer.fields(Fields::always()).layer(probe);
    let mut left = Vec::new();
    for (trailer, extension) in [(Some("30"), None), (None, Some(Tokens(20))), (None, None), (None, None)] {
        let call = service.ready().await.unwrap().call(from("192.0.2.1"));
        let (mut feed, body) = contract::body();
        let mut response = Response::new(body);
        extension.map(|tokens| response.extensions_mut().insert(tokens));
        let serve = async { calls.next().await.answer(response) };
        let (response, _) = tokio::join!(call, serve);
        let response = response.unwrap();
        left.push(response.headers()["ratelimit"].to_str().unwrap().to_owned());
        if let Some(tokens) = trailer {
            let trailers = [(http::HeaderName::from_static("x-tokens"), tokens.parse().unwrap())];
            feed.send_trailers(trailers.into_iter().collect()).await.unwrap();
        }
        drop(feed);
        http_body_util::BodyExt::collect(response.into_body()).await.unwrap();
    }
    // Each shows what those before it have cost, and one of its own.
    assert_eq!(left, [99, 69, 49, 48].map(|left| format!(r#""tokens";r={left};t=1"#)));
}

#[tokio::test(start_paused = true)]
async fn other_limits_of_the_same_name_keep_the_counters() {
    let layer = RateLimitLayer::new(per_second(2));
    let (service, handle) = (layer.layer(Ok200), layer.handle());
    for _ in 0..2 {
        assert_eq!(status(&service, from("192.0.2.1")).await, 200);
    }
    handle
        .set_limits([Limit::new("default", Rate::per_day(n(1))), Limit::new("all", per_second(10)).with_key(Everyone)]);
    assert_eq!(status(&service, from("192.0.2.1")).await, 429, "its second of debt leaves less than the day");
    assert_eq!(status(&service, from("192.0.2.2")).await, 200);
    handle.set_limits([Limit::new("new", per_second(1))]);
    assert_eq!(status(&service, from("192.0.2.1")).await, 200, "another name begins anew");
}

#[tokio::test(start_paused = true)]
async fn a_refund_goes_to_one_caller_and_no_further_than_a_burst() {
    let layer = RateLimitLayer::new(per_second(3)).and(Limit::concurrent("at once", n(10)));
    let layer = layer.exempt(|request| request.uri().path() == "/health");
    let (service, handle) = (layer.layer(Ok200), layer.handle());
    let admitted = async |request: &dyn Fn() -> Request<()>| {
        let mut count = 0;
        while status(&service, request()).await == 200 {
            count += 1;
        }
        count
    };
    let one = || from("192.0.2.1");
    assert_eq!(admitted(&one).await, 3);
    assert_eq!(admitted(&|| from("192.0.2.2")).await, 3);
    assert!(handle.refund("default", &one(), 2));
    assert_eq!(admitted(&one).await, 2);
    assert_eq!(admitted(&|| from("192.0.2.2")).await, 0, "it was not theirs");
    assert!(handle.refund("default", &one(), 100));
    assert_eq!(admitted(&one).await, 3, "no more than a burst");
    let mut health = one();
    *health.uri_mut() = "/health".parse().unwrap();
    assert!(!handle.refund("default", &health, 1), "it cost nothing");
    assert!(!handle.refund("other", &one(), 1), "no such limit");
    assert!(!handle.refund("at once", &one(), 1), "it ends when the request does");
    assert!(!handle.refund("default", &from("192.0.2.3"), 1), "it never came");
    let orders = Route::new("/orders").with_policy(Policy::new(per_second(1)));
    assert_eq!(admitted(&|| on(&orders, "192.0.2.1")).await, 1);
    assert!(!handle.refund("default", &on(&orders, "192.0.2.1"), 1), "the route has limits of its own");
    assert!(handle.refund("route", &on(&orders, "192.0.2.1"), 1));
    assert_eq!((admitted(&|| on(&orders, "192.0.2.1")).await, admitted(&one).await), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn requests_wait_in_turn_and_give_back_when_they_go_away() {
    let layer = RateLimitLayer::new(per_second(10)).burst(n(1)).delay(Duration::from_millis(250), 2);
    let service = layer.layer(Ok200);
    let start = tokio::time::Instant::now();
    let call = || Box::pin(service.clone().oneshot(from("192.0.2.1")));
    assert_eq!(call().await.unwrap().status(), 200);
    let (mut second, mut third) = (call(), call());
    assert!(futures::poll!(&mut second).is_pending() && futures::poll!(&mut third).is_pending());
    assert_eq!(layer.handle().stats().waiting, 2);
    let refused = call().await.unwrap();
    assert_eq!((refused.status().as_u16(), &refused.headers()[header::RETRY_AFTER]), (429, &"1".parse().unwrap()));
    drop(third);
    assert_eq!(layer.handle().stats().waiting, 1);
    let fourth = call();
    assert_eq!(second.await.unwrap().status(), 200);
    assert_eq!(start.elapsed(), Duration::from_millis(100));
    assert_eq!(fourth.await.unwrap().status(), 200);
    assert_eq!(start.elapsed(), Duration::from_millis(200), "the third gave its turn back");
    let mut hurried = from("192.0.2.1");
    let soon = portcullis_core::Clock::system().now() + Duration::from_millis(50);
    portcullis_core::Deadline(soon).attach(hurried.extensions_mut());
    assert_eq!(status(&service, hurried).await, 429, "it would be too late");
    assert_eq!(layer.handle().stats().delayed, 3);
}

#[tokio::test(start_paused = true)]
async fn a_shadow_counts_and_refuses_nothing() {
    let layer = RateLimitLayer::new(per_second(3)).and(Limit::new("new", per_second(1)).shadow());
    let service = layer.layer(Ok200);
    for _ in 0..3 {
        assert_eq!(status(&service, from("192.0.2.1")).await, 200);
    }
    assert_eq!(status(&service, from("192.0.2.1")).await, 429);
    let stats = layer.handle().stats();
    assert_eq!((stats.shadowed, stats.refused), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn the_least_important_are_refused_first() {
    let layer =
        RateLimitLayer::limits([Limit::new("all", per_second(10)).with_key(Everyone).priority(
            |request| match request.headers().get("x-priority").map(|value| value.as_bytes()) {
                Some(b"critical") => Priority::CRITICAL,
                Some(b"low") => Priority::LOW,
                _ => Priority::NORMAL,
            },
        )]);
    let service = layer.layer(Ok200);
    let with = |priority: &str| {
        let mut request = from("192.0.2.1");
        request.headers_mut().insert("x-priority", priority.parse().unwrap());
        request
    };
    let mut admitted = Vec::new();
    for priority in ["low", "normal", "critical"] {
        let mut count = 0;
        while status(&service, with(priority)).await == 200 {
            count += 1;
        }
        admitted.push(count);
    }
    assert_eq!(admitted, [5, 3, 2]);
}

#[tokio::test(start_paused = true)]
async fn who_leaves_while_it_waits_is_given_back_what_its_turn_would_have_cost() {
    let layer = RateLimitLayer::new(per_second(1)).delay(Duration::from_secs(10), 8);
    let service = layer.layer(Ok200);
    assert_eq!(status(&service, from("192.0.2.1")).await, 200);
    let mut calls: Vec<_> = (0..2).map(|_| Box::pin(status(&service, from("192.0.2.1")))).collect();
    for call in &mut calls {
        assert!(futures::poll!(call).is_pending());
    }
    tokio::time::advance(Duration::from_millis(1500)).await;
    assert_eq!(calls.remove(0).await, 200, "its turn was a second after the first");
    drop(calls);
    let start = tokio::time::Instant::now();
    assert_eq!(status(&service, from("192.0.2.1")).await, 200);
    assert_eq!(start.elapsed(), Duration::from_millis(500), "the turn of the one who left");
}

#[tokio::test(start_paused = true)]
async fn newcomers_wait_no_longer_than_a_window_for_what_one_of_them_cost() {
    let limit = Limit::new("cost", Rate::per_minute(n(1))).settle(|_| 1_000_000_000);
    let layer = RateLimitLayer::limits([limit]).capacity(1);
    let service = layer.layer(Ok200);
    let caller = |number: usize| from(&format!("192.0.2.{number}"));
    let _responses = futures::future::join_all((0..14).map(|number| call(&service, caller(number)))).await;
    assert_eq!(status(&service, caller(14)).await, 200, "on the bucket that newcomers share");
    let refused = call(&service, caller(15)).await;
    assert_eq!(refused.headers()[header::RETRY_AFTER], "60");
}

#[tokio::test(start_paused = true)]
async fn a_concurrency_limit_is_given_no_rate() {
    let plan = Limit::concurrent("at once", n(1)).plan(|_| Some(per_second(5)));
    let layer = RateLimitLayer::limits([plan]);
    assert!(!layer.handle().set_rate("at once", per_second(5)));
    let service = layer.layer(Ok200);
    let held = service.clone().oneshot(from("192.0.2.1")).await.unwrap();
    assert_eq!(status(&service, from("192.0.2.1")).await, 429);
    drop(held);
    assert_eq!(status(&service, from("192.0.2.1")).await, 200);
}
