//! What a hot key costs with its counters in a Redis on this machine, with leases and without, beside a bare round trip.
//!
//! ```text
//! cargo bench -p portcullis-rate-limit --features redis --bench store
//! ```

#![allow(clippy::unwrap_used, reason = "a bench")]
#![allow(clippy::disallowed_methods, reason = "it measures real time")]

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use portcullis_rate_limit::{Everyone, OnFailure, Rate, RateLimitLayer, RedisStore};
use portcullis_testing::Redis;
use tower::{Layer, Service, service_fn};

const TIME: Duration = Duration::from_secs(3);

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let redis = Redis::start().await;
    let client = redis::Client::open(redis.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    println!("| | calls | admitted | mean | p50 | p99 | round trips |");
    println!("|---|---|---|---|---|---|---|");
    let ping = measure(async || redis::cmd("PING").exec_async(&mut connection).await.is_ok()).await;
    report("PING", &ping, ping.len() as u64);
    let mut bare =
        service_fn(async |_: Request<()>| Ok::<_, std::convert::Infallible>(Response::new(Empty::<Bytes>::new())));
    let alone = measure(async || bare.call(Request::new(())).await.is_ok()).await;
    report("no limit", &alone, 0);
    for (name, lease) in [("leases of a second", Duration::from_secs(1)), ("no leases", Duration::ZERO)] {
        let store = RedisStore::new(&redis.url()).unwrap().lease(lease).prefix(format!("{{{name}}}"));
        let store = store.deadline(Duration::from_secs(1)).on_failure(OnFailure::Refuse);
        // More than one caller can take, so that each call is admitted.
        let rate = Rate::per_second(NonZeroU32::new(10_000_000).unwrap());
        let mut service = RateLimitLayer::new(rate).with_key(Everyone).store(store.clone()).layer(bare);
        let calls = measure(async || service.call(Request::new(())).await.unwrap().status() == 200).await;
        report(name, &calls, store.stats().round_trips);
    }
}

/// One call after the other: how long each took, and whether it was admitted.
async fn measure(mut call: impl AsyncFnMut() -> bool) -> Vec<(u64, bool)> {
    let (start, mut calls) = (Instant::now(), Vec::new());
    while start.elapsed() < TIME {
        let before = Instant::now();
        let admitted = call().await;
        calls.push((before.elapsed().as_nanos() as u64, admitted));
        // The connection has a task of its own.
        if calls.len() % 64 == 0 {
            tokio::task::yield_now().await;
        }
    }
    calls
}

fn report(name: &str, calls: &[(u64, bool)], round_trips: u64) {
    let mut nanos: Vec<u64> = calls.iter().map(|call| call.0).collect();
    nanos.sort_unstable();
    let micros = |nanos: f64| nanos / 1000.0;
    let mean = micros(nanos.iter().sum::<u64>() as f64 / nanos.len() as f64);
    let (p50, p99) = (micros(nanos[nanos.len() / 2] as f64), micros(nanos[nanos.len() * 99 / 100] as f64));
    let admitted = calls.iter().filter(|call| call.1).count();
    println!("| {name} | {} | {admitted} | {mean:.2} µs | {p50:.2} µs | {p99:.2} µs | {round_trips} |", nanos.len());
}
