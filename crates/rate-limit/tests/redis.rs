//! Limits shared through a real Redis.

#![cfg(feature = "redis")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod store;

use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use http::header;
use http_body_util::BodyExt;
use portcullis_core::Carried;
use portcullis_rate_limit::{
    Everyone, Fields, Limit, OnFailure, Priority, Rate, RateLimitLayer, RedisStore, RequestHead, Settlement,
};
use portcullis_testing::{Redis, contract};
use tokio::time::Instant;
use tower::{Layer, ServiceExt};

use self::store::{Ok200, PATIENT, admitted, call, from, n, status, store};

#[tokio::test]
async fn the_contract_holds() {
    let redis = Redis::start().await;
    let layer = RateLimitLayer::new(Rate::per_second(n(10_000)))
        .and(Limit::concurrent("at once", n(100)))
        .and(Limit::new("bytes", Rate::per_second(n(10_000))).settle(|seen| seen.bytes as u32))
        .store(store(&redis));
    contract::holds(layer.clone(), |body| from("192.0.2.1").map(|()| body)).await;
    assert_eq!(layer.handle().stats().in_flight, 0, "something was not given back");
}

#[tokio::test]
async fn processes_share_one_budget_and_all_limits_are_charged_or_none() {
    let redis = Redis::start().await;
    let layer = |life| {
        RateLimitLayer::new(Rate::per_hour(n(20)))
            .and(Limit::new("all", Rate::per_hour(n(30))).with_key(Everyone))
            .store(store(&redis).lease(life))
            .layer(Ok200)
    };
    let (a, b) = (layer(Duration::ZERO), layer(Duration::ZERO));
    let (first, second) = tokio::join!(admitted(&a, "192.0.2.1", 48), admitted(&b, "192.0.2.1", 48));
    assert_eq!(first + second, 20);
    assert_eq!(admitted(&b, "192.0.2.2", 48).await, 10, "refusals cost the common limit nothing");
    assert_eq!(admitted(&a, "192.0.2.3", 16).await, 0);
}

#[tokio::test]
async fn an_odd_rate_has_its_whole_burst() {
    let redis = Redis::start().await;
    for count in [3, 7, 11, 1000, 1023] {
        let layer = RateLimitLayer::new(Rate::per_hour(n(count)));
        let service = layer.store(store(&redis).prefix(format!("{{{count}}}"))).layer(Ok200);
        assert_eq!(admitted(&service, "192.0.2.1", 1100).await, count as usize);
    }
}

#[tokio::test]
async fn a_refusal_says_when_and_is_remembered_until_then() {
    let redis = Redis::start().await;
    let store = store(&redis);
    let service = RateLimitLayer::new(Rate::per_minute(n(60))).burst(n(1)).store(store.clone()).layer(Ok200);
    assert_eq!(status(&service, "192.0.2.1").await, 200);
    let start = Instant::now();
    let refused = call(&service, "192.0.2.1").await;
    assert_eq!(refused.headers()[header::RETRY_AFTER], "1");
    assert_eq!(refused.headers()["ratelimit-policy"], r#""default";q=1;w=1"#);
    while status(&service, "192.0.2.1").await == 429 {
        tokio::task::yield_now().await;
    }
    assert!(start.elapsed() < Duration::from_secs(5));
    let stats = store.stats();
    assert!(stats.remembered > 10 && stats.round_trips <= 3, "{stats:?}");
}

#[tokio::test]
async fn a_hot_key_is_decided_here_and_never_too_often() {
    let redis = Redis::start().await;
    let stores = [store(&redis), store(&redis)];
    let [a, b] = stores.clone().map(|store| RateLimitLayer::new(Rate::per_second(n(2000))).store(store).layer(Ok200));
    let start = Instant::now();
    let (first, second) = tokio::join!(admitted(&a, "192.0.2.1", 8000), admitted(&b, "192.0.2.1", 8000));
    let most = 2000.0 + 2000.0 * start.elapsed().as_secs_f64();
    assert!(((first + second) as f64) <= most, "{} of {most}", first + second);
    assert!(first + second >= 1900, "{first} and {second}");
    let round_trips: u64 = stores.iter().map(|store| store.stats().round_trips).sum();
    assert!(round_trips <= 1600, "{:?}", stores.map(|store| store.stats()));
}

#[tokio::test]
async fn a_lease_is_withheld_from_others_until_it_is_reported() {
    let redis = Redis::start().await;
    let (first, second) = (store(&redis).lease(Duration::from_secs(600)), store(&redis).lease(Duration::ZERO));
    let rate = Rate::per_hour(n(160));
    let layer = |store: &RedisStore| RateLimitLayer::new(rate).store(store.clone()).layer(Ok200);
    let (a, b) = (layer(&first), layer(&second));
    // A quarter of a second of this rate is nothing: no lease.
    assert_eq!(admitted(&a, "192.0.2.1", 16).await, 16);
    assert_eq!(first.stats().leased, 0);
    // Of this one it is.
    let rate = Rate::new(n(1600), Duration::from_secs(60)).unwrap().burst(n(160));
    let layer = |store: &RedisStore| RateLimitLayer::new(rate).store(store.clone()).layer(Ok200);
    let (a, b2) = (layer(&first), layer(&second));
    let start = Instant::now();
    for _ in 0..12 {
        assert_eq!(status(&a, "192.0.2.2").await, 200);
    }
    let leased = first.stats().leased;
    assert!(leased > 0, "{:?}", first.stats());
    let others = admitted(&b2, "192.0.2.2", 320).await;
    while status(&b2, "192.0.2.2").await == 200 {}
    assert_eq!(status(&a, "192.0.2.2").await, 200, "what was leased is withheld");
    let rest = admitted(&a, "192.0.2.2", 64).await;
    let refilled = start.elapsed().as_secs_f64() * 27.0 + 27.0;
    assert!((12 + others + rest) as f64 <= 160.0 + refilled, "{others} and {rest}");
    drop(b);
}

#[tokio::test]
async fn what_was_refused_or_leased_says_nothing_of_another_rate() {
    let redis = Redis::start().await;
    let layer = RateLimitLayer::new(Rate::per_day(n(1))).store(store(&redis));
    let service = layer.layer(Ok200);
    assert_eq!((status(&service, "192.0.2.1").await, status(&service, "192.0.2.1").await), (200, 429));
    assert!(layer.handle().set_rate("default", Rate::per_day(n(1)).burst(n(1000))));
    assert_eq!(status(&service, "192.0.2.1").await, 200);
    assert!(layer.handle().set_rate("default", Rate::per_day(n(1))));
    assert_eq!(status(&service, "192.0.2.1").await, 429);
}

#[tokio::test]
async fn less_important_requests_take_nothing_of_what_others_leased() {
    let redis = Redis::start().await;
    let store = store(&redis);
    let layer = RateLimitLayer::new(Rate::per_second(n(1))).store(store.clone());
    let low = |request: &RequestHead<'_>| {
        if request.headers().contains_key("x-low") { Priority::LOW } else { Priority::CRITICAL }
    };
    layer.handle().set_limits([Limit::new("calls", Rate::per_second(n(8)).burst(n(1600))).priority(low)]);
    let service = layer.layer(Ok200);
    for _ in 0..1200 {
        assert_eq!(status(&service, "192.0.2.1").await, 200);
    }
    for _ in 0..10 {
        assert_eq!(status(&service, "192.0.2.1").await, 200);
        let mut request = from("192.0.2.1");
        request.headers_mut().insert("x-low", "1".parse().unwrap());
        assert_eq!(service.clone().oneshot(request).await.unwrap().status(), 429, "half is left to others");
    }
    assert!(store.stats().leased > 100, "{:?}", store.stats());
}

#[tokio::test]
async fn what_a_response_cost_more_is_charged_with_the_next_question() {
    let redis = Redis::start().await;
    let layer = RateLimitLayer::new(Rate::per_second(n(1)));
    let cost = |seen: &Settlement<'_>| if seen.status == 200 { 40 } else { 1 };
    layer.handle().set_limits([Limit::new("cost", Rate::per_hour(n(100))).settle(cost)]);
    let service = layer.store(store(&redis)).fields(Fields::always()).layer(Ok200);
    let mut left = Vec::new();
    for _ in 0..4 {
        let response = service.clone().oneshot(from("192.0.2.1")).await.unwrap();
        left.push(response.headers().get("ratelimit").unwrap().to_str().unwrap().split(';').nth(1).unwrap().to_owned());
        response.into_body().collect().await.unwrap();
    }
    assert_eq!(left, ["r=99", "r=59", "r=19", "r=0"]);
}

#[tokio::test]
async fn what_a_response_cost_more_is_charged_to_the_lease_first() {
    let redis = Redis::start().await;
    let store = store(&redis);
    let layer = RateLimitLayer::new(Rate::per_second(n(1)));
    let rate = Rate::per_second(n(1000)).burst(n(10_000));
    layer.handle().set_limits([Limit::new("cost", rate).settle(|_| 100)]);
    let service = layer.store(store.clone()).layer(Ok200);
    let (start, mut admitted) = (Instant::now(), 0);
    for _ in 0..300 {
        let response = service.clone().oneshot(from("192.0.2.1")).await.unwrap();
        admitted += usize::from(response.status() == 200);
        response.into_body().collect().await.unwrap();
    }
    // One more may be admitted before the store is told of the last debt.
    let most = 101 + (start.elapsed().as_secs() as usize + 1) * 10;
    assert!(admitted >= 100 && admitted <= most, "{admitted} of {most}");
    assert!(store.stats().leased > 0, "{:?}", store.stats());
}

#[tokio::test]
async fn layers_on_one_store_charge_the_debts_of_a_key_before_they_ask_about_it() {
    let redis = Redis::start().await;
    let store = store(&redis).lease(Duration::ZERO);
    let layer = || {
        let layer = RateLimitLayer::limits([Limit::new("cost", Rate::per_hour(n(1000))).settle(|_| 2)]);
        layer.store(store.clone()).layer(Ok200)
    };
    let (one, other) = (layer(), layer());
    let mut admitted = 0;
    for _ in 0..600 {
        for service in [&one, &other] {
            let response = service.clone().oneshot(from("192.0.2.1")).await.unwrap();
            admitted += usize::from(response.status() == 200);
            response.into_body().collect().await.unwrap();
        }
    }
    assert!((500..=501).contains(&admitted), "{admitted}");
}

#[tokio::test]
async fn two_limits_of_one_name_are_one_key_as_they_are_without_a_store() {
    let redis = Redis::start().await;
    let limits = || RateLimitLayer::new(Rate::per_hour(n(10))).and(Limit::new("default", Rate::per_hour(n(20))));
    let alone = admitted(&limits().layer(Ok200), "192.0.2.1", 64).await;
    let started = Instant::now();
    assert_eq!(admitted(&limits().store(store(&redis)).layer(Ok200), "192.0.2.1", 64).await, alone);
    assert!(alone < 10 && started.elapsed() < PATIENT, "{alone}; neither waits for the other");
}

#[tokio::test]
async fn shadows_priorities_and_new_rates_hold_with_a_store() {
    let redis = Redis::start().await;
    let layer = RateLimitLayer::new(Rate::per_hour(n(1))).store(store(&redis));
    let low = |request: &RequestHead<'_>| {
        if request.headers().contains_key("x-low") { Priority::LOW } else { Priority::CRITICAL }
    };
    let handle = layer.handle();
    handle.set_limits([
        Limit::new("calls", Rate::per_hour(n(10))).priority(low),
        Limit::new("shadow", Rate::per_hour(n(1))).shadow(),
    ]);
    let service = layer.layer(Ok200);
    let low = async || {
        let mut request = from("192.0.2.1");
        request.headers_mut().insert("x-low", "1".parse().unwrap());
        service.clone().oneshot(request).await.unwrap().status().as_u16()
    };
    for _ in 0..5 {
        assert_eq!(low().await, 200);
    }
    assert_eq!(low().await, 429, "half is left to others");
    for _ in 0..5 {
        assert_eq!(status(&service, "192.0.2.1").await, 200);
    }
    assert_eq!(handle.stats().shadowed, 9, "all but the first that were admitted");
    assert_eq!(status(&service, "192.0.2.1").await, 429);
    let double = Rate::new(n(20), Duration::from_secs(3600)).unwrap();
    assert!(handle.set_rate("calls", double));
    assert_eq!(status(&service, "192.0.2.1").await, 429, "an hour of debt stays an hour");
    assert_eq!(status(&service, "192.0.2.2").await, 200);
    assert_eq!(admitted(&service, "192.0.2.2", 32).await, 19);
}

#[tokio::test]
async fn requests_wait_in_turn_for_a_store_too() {
    let redis = Redis::start().await;
    let layer = RateLimitLayer::new(Rate::per_second(n(2))).burst(n(1)).delay(Duration::from_millis(1100), 8);
    let layer = layer.store(store(&redis));
    let service = layer.layer(Ok200);
    let start = Instant::now();
    let call = async |_| (status(&service, "192.0.2.1").await, start.elapsed());
    let mut hurried = from("192.0.2.1");
    portcullis_core::Deadline(portcullis_core::Clock::system().now()).attach(hurried.extensions_mut());
    let all = futures::future::join_all((0..8).map(call));
    let (answers, hurried) = futures::future::join(all, service.clone().oneshot(hurried)).await;
    assert_eq!(hurried.unwrap().status(), 429, "it would be too late");
    let mut admitted: Vec<Duration> = answers.iter().filter(|(status, _)| *status == 200).map(|(_, at)| *at).collect();
    admitted.sort_unstable();
    assert!(admitted.len() >= 3 && admitted.len() < 8, "{answers:?}");
    for (turn, at) in (0..).zip(&admitted) {
        assert!(*at + Duration::from_millis(1) >= turn * Duration::from_millis(500), "{admitted:?}");
    }
    assert_eq!(layer.handle().stats().delayed, admitted.len() as u64 - 1);
}

#[tokio::test]
async fn who_has_no_place_to_wait_is_not_charged() {
    let redis = Redis::start().await;
    let limit = || RateLimitLayer::new(Rate::per_minute(n(1))).store(store(&redis));
    let service = limit().delay(Duration::from_secs(3600), 1).layer(Ok200);
    assert_eq!(status(&service, "192.0.2.1").await, 200);
    let mut at_once: FuturesUnordered<_> = (0..20).map(|_| status(&service, "192.0.2.1")).collect();
    for _ in 0..19 {
        assert_eq!(at_once.next().await, Some(429));
    }
    let refused = limit().layer(Ok200);
    let answer = call(&refused, "192.0.2.1").await;
    let after: u64 = answer.headers()[header::RETRY_AFTER].to_str().unwrap().parse().unwrap();
    assert!((61..=120).contains(&after), "one was admitted, and one waits: {after}");
}

#[tokio::test]
async fn what_costs_more_than_the_burst_is_never_admitted() {
    let redis = Redis::start().await;
    for store in [None, Some(store(&redis))] {
        let layer = RateLimitLayer::new(Rate::per_second(n(1)));
        let limit = Limit::new("cost", Rate::per_second(n(10))).cost(|_| 50);
        layer.handle().set_limits([limit]);
        let layer = layer.delay(Duration::from_secs(3600), 8);
        let layer = if let Some(store) = store { layer.store(store) } else { layer };
        let refused = call(&layer.layer(Ok200), "192.0.2.1").await;
        assert_eq!(refused.status(), 429);
        assert!(!refused.headers().contains_key(header::RETRY_AFTER), "there is no time to come back");
    }
}

#[tokio::test]
async fn keys_expire_and_tell_nothing_of_the_caller() {
    let redis = Redis::start().await;
    let service = |rate| RateLimitLayer::new(rate).store(store(&redis).prefix("{p}")).layer(Ok200);
    let client = redis::Client::open(redis.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    assert_eq!(status(&service(Rate::per_hour(n(1))), "192.0.2.77").await, 200);
    let keys: Vec<String> = redis::cmd("KEYS").arg("*").query_async(&mut connection).await.unwrap();
    let [key] = &keys[..] else { panic!("{keys:?}") };
    assert!(key.starts_with("{p}:") && key.len() == 4 + 32, "{key}");
    redis::cmd("FLUSHALL").exec_async(&mut connection).await.unwrap();
    assert_eq!(status(&service(Rate::per_second(n(100))), "192.0.2.77").await, 200);
    let start = Instant::now();
    loop {
        let left: u64 = redis::cmd("DBSIZE").query_async(&mut connection).await.unwrap();
        if left == 0 {
            break;
        }
        assert!(start.elapsed() < PATIENT);
    }
}

#[tokio::test]
async fn no_time_is_too_long() {
    let redis = Redis::start().await;
    let store = RedisStore::new(&redis.url()).unwrap().deadline(Duration::MAX).lease(Duration::MAX);
    let layer = RateLimitLayer::new(Rate::per_hour(n(8))).delay(Duration::MAX, 8).store(store);
    let service = layer.layer(Ok200);
    for _ in 0..8 {
        assert_eq!(status(&service, "192.0.2.1").await, 200);
    }
    let mut late = Box::pin(status(&service, "192.0.2.1"));
    while layer.handle().stats().waiting == 0 {
        assert!(futures::poll!(&mut late).is_pending());
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn passwords_are_used_and_not_shown() {
    let redis = Redis::start_with(&["--requirepass", "open-sesame"]).await;
    let url = format!("redis://:open-sesame@{}", redis.address());
    let store = RedisStore::new(&url).unwrap().deadline(PATIENT).on_failure(OnFailure::Refuse);
    let layer = RateLimitLayer::new(Rate::per_hour(n(1))).store(store.clone());
    assert!(!format!("{layer:?} {store:?}").contains("sesame"));
    let service = layer.layer(Ok200);
    assert_eq!(status(&service, "192.0.2.1").await, 200);
    assert_eq!(status(&service, "192.0.2.1").await, 429);
    let error = RedisStore::new("http://:open-sesame@localhost").unwrap_err();
    assert!(error.is_url() && !format!("{error} {error:?}").contains("sesame"));
}

#[cfg(feature = "redis-tls")]
#[tokio::test]
async fn tls_without_a_provider_is_an_error_and_no_panic() {
    for url in ["rediss://localhost", "REDISS://localhost", "valkeys://localhost"] {
        assert!(RedisStore::new(url).unwrap_err().is_provider(), "{url}");
    }
}

/// Two limits, both hot: who asks for a lease of the one waits for none of the other, or two would wait for each other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_of_two_limits_are_not_waited_for_crosswise() {
    let redis = Redis::start().await;
    let store =
        store(&redis).lease(Duration::from_millis(1)).deadline(Duration::from_secs(10)).on_failure(OnFailure::Refuse);
    let rate = Rate::per_second(n(100_000));
    let everyone = Limit::new("all", rate).with_key(Everyone);
    let service = RateLimitLayer::new(rate).and(everyone).store(store.clone()).layer(Ok200);
    let start = Instant::now();
    let callers = (0..32).map(|_| {
        let service = service.clone();
        tokio::spawn(async move {
            for _ in 0..200 {
                assert_eq!(status(&service, "192.0.2.1").await, 200);
            }
        })
    });
    for caller in callers.collect::<Vec<_>>() {
        caller.await.unwrap();
    }
    assert_eq!(store.stats().undecided, 0);
    assert!(start.elapsed() < Duration::from_secs(10), "somebody slept to the deadline");
}
