//! Limits in a Redis that does not answer, or not as it should.

#![cfg(feature = "redis")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod store;

use std::net::SocketAddr;
use std::time::Duration;

use http::StatusCode;
use http_body_util::BodyExt;
use portcullis_core::Rejection;
use portcullis_rate_limit::{Fields, Limit, OnFailure, Rate, RateLimitLayer, RedisStore};
use portcullis_testing::Redis;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::Instant;
use tower::{Layer, ServiceExt};

use self::store::{Ok200, PATIENT, admitted, call, from, n, status, store};

/// A way to a Redis. New connections may be led to another one, and those there are may get no further without being told.
struct Way {
    address: SocketAddr,
    leads: watch::Sender<SocketAddr>,
    cut: watch::Sender<()>,
}

impl Way {
    async fn to(redis: &Redis) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, leads) = (listener.local_addr().unwrap(), watch::Sender::new(redis.address()));
        let cut = watch::Sender::new(());
        let (led, all) = (leads.subscribe(), cut.clone());
        tokio::spawn(async move {
            while let Ok((mut from, _)) = listener.accept().await {
                let (to, mut cut) = (*led.borrow(), all.subscribe());
                tokio::spawn(async move {
                    let mut to = TcpStream::connect(to).await.unwrap();
                    tokio::select! {
                        _ = copy_bidirectional(&mut from, &mut to) => {}
                        _ = cut.changed() => std::future::pending().await,
                    }
                });
            }
        });
        Self { address, leads, cut }
    }
}

/// Calls until the store is heard of again.
async fn until_answered(service: &portcullis_rate_limit::RateLimit<Ok200>) {
    let start = Instant::now();
    while status(service, "192.0.2.1").await == 503 {
        assert!(start.elapsed() < Duration::from_secs(20), "it does not come back");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_connection_that_dies_without_a_word_is_replaced() {
    let redis = Redis::start().await;
    let way = Way::to(&redis).await;
    let store = RedisStore::new(&format!("redis://{}", way.address)).unwrap().on_failure(OnFailure::Refuse);
    let service = RateLimitLayer::new(Rate::per_hour(n(1_000_000))).store(store.lease(Duration::ZERO)).layer(Ok200);
    until_answered(&service).await;
    way.cut.send_replace(());
    assert_eq!(status(&service, "192.0.2.1").await, 503);
    until_answered(&service).await;
}

#[tokio::test]
async fn a_primary_that_is_none_any_more_is_left_for_the_one_that_has_its_name() {
    let (old, new) = (Redis::start().await, Redis::start().await);
    let way = Way::to(&old).await;
    let store = RedisStore::new(&format!("redis://{}", way.address)).unwrap().on_failure(OnFailure::Refuse);
    let store = store.deadline(Duration::from_secs(1)).lease(Duration::ZERO);
    let service = RateLimitLayer::new(Rate::per_hour(n(1_000_000))).store(store).layer(Ok200);
    until_answered(&service).await;
    way.leads.send_replace(new.address());
    let client = redis::Client::open(old.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let mut demote = redis::cmd("REPLICAOF");
    demote.arg(new.address().ip().to_string()).arg(new.address().port());
    demote.exec_async(&mut connection).await.unwrap();
    assert_eq!(status(&service, "192.0.2.1").await, 503, "it is read only");
    until_answered(&service).await;
}

#[tokio::test]
async fn without_an_answer_a_request_gets_what_was_decided() {
    let mut redis = Redis::start().await;
    let with = |on_failure| {
        let store = RedisStore::new(&redis.url()).unwrap().deadline(PATIENT).on_failure(on_failure);
        let layer = RateLimitLayer::new(Rate::per_hour(n(4))).store(store.clone().prefix(format!("{on_failure:?}")));
        (store, layer.layer(Ok200))
    };
    let services = [OnFailure::Admit, OnFailure::Refuse, OnFailure::Share(n(2))].map(with);
    for (_, service) in &services {
        assert_eq!(status(service, "192.0.2.1").await, 200);
    }
    redis.kill();
    let [(_, admit), (_, refuse), (_, share)] = &services;
    for _ in 0..8 {
        assert_eq!(status(admit, "192.0.2.1").await, 200);
    }
    let refused = call(refuse, "192.0.2.1").await;
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(refused.extensions().get::<Rejection>().unwrap().reason(), "limits-unavailable");
    assert_eq!(admitted(share, "192.0.2.1", 16).await, 2, "its share of the rate, not of the whole");
    // Three failures in a row, and it is left alone: nobody waits any more.
    let start = Instant::now();
    admitted(refuse, "192.0.2.1", 64).await;
    assert!(start.elapsed() < Duration::from_secs(2));

    redis.restart().await;
    let start = Instant::now();
    while status(refuse, "192.0.2.1").await == 503 {
        assert!(start.elapsed() < Duration::from_secs(20), "it does not come back");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn what_costs_more_than_the_burst_is_not_admitted_by_a_share_of_it() {
    let mut redis = Redis::start().await;
    redis.kill();
    let layer = RateLimitLayer::limits([
        Limit::new("cost", Rate::per_hour(n(10))).cost(|request| if request.method() == "PUT" { 50 } else { 1 })
    ]);
    let service = layer.store(store(&redis).on_failure(OnFailure::Share(n(20)))).layer(Ok200);
    let mut large = from("192.0.2.1");
    *large.method_mut() = http::Method::PUT;
    assert_eq!(service.clone().oneshot(large).await.unwrap().status(), 429);
    assert_eq!(status(&service, "192.0.2.1").await, 200, "one, however small the share");
    assert_eq!(status(&service, "192.0.2.1").await, 429);
}

#[tokio::test]
async fn a_store_that_hangs_holds_nobody_longer_than_the_deadline() {
    let redis = Redis::start().await;
    let store = RedisStore::new(&redis.url()).unwrap().deadline(Duration::from_millis(500));
    let service = RateLimitLayer::new(Rate::per_second(n(100))).store(store.clone()).layer(Ok200);
    assert_eq!(status(&service, "192.0.2.1").await, 200);
    redis.pause();
    let start = Instant::now();
    for _ in 0..50 {
        assert_eq!(status(&service, "192.0.2.1").await, 200);
    }
    assert!(start.elapsed() < Duration::from_secs(5), "fifty waits of half a second would be 25 s");
    assert!(store.stats().down && store.stats().undecided >= 50, "{:?}", store.stats());
    redis.resume();
    let start = Instant::now();
    while store.stats().down {
        assert!(start.elapsed() < Duration::from_secs(20), "it does not come back");
        status(&service, "192.0.2.1").await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn who_waits_for_a_lease_waits_no_longer_than_who_asks_for_it() {
    let redis = Redis::start().await;
    let deadline = Duration::from_millis(500);
    let store = RedisStore::new(&redis.url()).unwrap().deadline(deadline);
    let service = RateLimitLayer::new(Rate::per_second(n(100))).store(store.clone()).layer(Ok200);
    while store.stats().leased == 0 {
        status(&service, "192.0.2.1").await;
    }
    redis.pause();
    tokio::time::pause();
    let start = Instant::now();
    futures::future::join_all((0..20).map(|_| status(&service, "192.0.2.1"))).await;
    assert!((deadline..deadline * 3 / 2).contains(&start.elapsed()), "{:?}", start.elapsed());
}

#[tokio::test]
async fn what_could_not_be_told_with_one_question_is_told_with_the_next() {
    let redis = Redis::start().await;
    let layer = RateLimitLayer::limits([Limit::new("cost", Rate::per_hour(n(100))).settle(|_| 40)]);
    let service = layer.store(store(&redis)).fields(Fields::always()).layer(Ok200);
    let client = redis::Client::open(redis.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let mut left = Vec::new();
    for may in ["+get", "-get", "+get"] {
        let mut set = redis::cmd("ACL");
        set.arg("SETUSER").arg("default").arg(may).exec_async(&mut connection).await.unwrap();
        let response = service.clone().oneshot(from("192.0.2.1")).await.unwrap();
        let field = response.headers().get("ratelimit").map(|field| field.to_str().unwrap().to_owned());
        left.push(field.and_then(|field| Some(field.split(';').nth(1)?.to_owned())));
        response.into_body().collect().await.unwrap();
    }
    let left: Vec<_> = left.iter().map(Option::as_deref).collect();
    assert_eq!(left, [Some("r=99"), None, Some("r=20")], "39 more than was charged, each time");
}

#[tokio::test]
async fn a_caller_who_goes_away_while_the_store_thinks_gives_back_its_place() {
    let redis = Redis::start().await;
    let layer = RateLimitLayer::new(Rate::per_second(n(100))).and(Limit::concurrent("at once", n(1)));
    let layer = layer.store(store(&redis));
    let service = layer.layer(Ok200);
    redis.pause();
    let mut asked = Box::pin(service.clone().oneshot(from("192.0.2.1")));
    assert!(futures::poll!(&mut asked).is_pending());
    assert_eq!(layer.handle().stats().in_flight, 1);
    drop(asked);
    assert_eq!(layer.handle().stats().in_flight, 0);
    redis.resume();
}
