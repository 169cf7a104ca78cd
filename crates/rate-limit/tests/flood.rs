//! A flood of keys, each of them new. `PORTCULLIS_KEYS=10000000 cargo test --release -p portcullis-rate-limit --test flood
//! -- --nocapture` for ten million.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use http::{Request, Response};
use http_body_util::Empty;
use portcullis_core::{Carried, Clock, PeerAddress, Route};
use portcullis_rate_limit::{DEFAULT_CAPACITY, Header, Policy, Rate, RateLimitLayer};
use tower::{Layer, Service, ServiceExt, service_fn};

/// What one flood takes is not the other's.
static ALONE: Mutex<()> = Mutex::new(());

fn n(count: u32) -> NonZeroU32 {
    NonZeroU32::new(count).unwrap()
}

fn status<S, B>(service: &mut S, address: u32) -> u16
where
    S: Service<Request<()>, Response = Response<B>>,
{
    let mut request = Request::new(());
    PeerAddress(SocketAddr::from((Ipv4Addr::from_bits(address), 1))).attach(request.extensions_mut());
    let mut future = std::pin::pin!(service.call(request));
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(Ok(response)) => response.status().as_u16(),
        _ => 0,
    }
}

/// The memory this process has, in MiB.
fn memory() -> f64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: f64 = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0.0);
    pages * 4096.0 / f64::from(1 << 20)
}

/// A million new keys a second; a hundred callers come at half of what they may.
#[test]
fn honest_callers_keep_their_share_while_strangers_flood() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let keys: u32 = std::env::var("PORTCULLIS_KEYS").map_or(200_000, |keys| keys.parse().unwrap());
    let (clock, hand) = Clock::manual();
    let layer = RateLimitLayer::new(Rate::per_second(n(10))).with_clock(clock);
    let mut service = layer.layer(service_fn(|_: Request<()>| {
        std::future::ready(Ok::<_, std::convert::Infallible>(Response::new(Empty::<bytes::Bytes>::new())))
    }));
    let before = memory();
    let (mut honest, mut refused) = (0, 0);
    for stranger in 0..keys {
        hand.advance(Duration::from_micros(1));
        status(&mut service, 0x0a00_0000 + stranger);
        // Each of the hundred once in 200 ms.
        if stranger % 2000 == 0 {
            honest += 1;
            refused += u32::from(status(&mut service, 0xc000_0200 + stranger / 2000 % 100) != 200);
        }
    }
    let (stats, after) = (layer.handle().stats(), memory());
    println!(
        "{keys} keys: {refused} of {honest} honest calls refused; {stats:?}; memory {before:.1} MiB, then {after:.1} MiB"
    );
    assert_eq!(refused, 0);
    assert_eq!(stats.bytes, DEFAULT_CAPACITY.div_ceil(3) * 192);
    assert!(stats.live <= stats.places);
    assert!(after - before < 8.0, "memory grew from {before} to {after} MiB");
}

/// When even that is too much, every place is taken for an hour: who is in debt keeps it, and strangers share buckets.
#[test]
fn a_flood_beyond_all_places_forgives_no_debt() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let keys: u32 = std::env::var("PORTCULLIS_KEYS").map_or(200_000, |keys| keys.parse().unwrap());
    let (clock, hand) = Clock::manual();
    let layer = RateLimitLayer::new(Rate::per_hour(n(10))).with_clock(clock);
    let mut service = layer.layer(service_fn(|_: Request<()>| {
        std::future::ready(Ok::<_, std::convert::Infallible>(Response::new(Empty::<bytes::Bytes>::new())))
    }));
    for caller in 0..100 {
        (0..5).for_each(|_| assert_eq!(status(&mut service, 0xc000_0200 + caller), 200));
    }
    let admitted = (0..keys).filter(|stranger| {
        hand.advance(Duration::from_nanos(100));
        status(&mut service, 0x0a00_0000 + stranger) == 200
    });
    let (admitted, stats) = (admitted.count(), layer.handle().stats());
    println!("{admitted} of {keys} strangers admitted; {stats:?}");
    assert!(admitted <= stats.places + 10 * stats.buckets);
    for caller in 0..100 {
        let admitted = (0..10).filter(|_| status(&mut service, 0xc000_0200 + caller) == 200).count();
        assert_eq!(admitted, 5, "what was left of its burst, no more and no less");
    }
}

/// Callers of a limit by the day flood the table; a limit by the second then is not stuck for a day.
#[tokio::test(start_paused = true)]
async fn a_flood_of_one_limit_does_not_refuse_another_for_long() {
    let (clock, hand) = Clock::manual();
    let key = || Header::new(http::HeaderName::from_static("x-key"));
    let layer = RateLimitLayer::new(Rate::per_second(n(10))).with_key(key()).capacity(4).with_clock(clock);
    let service = layer.layer(tower::service_fn(async |_: Request<()>| {
        Ok::<_, std::convert::Infallible>(Response::new(Empty::<bytes::Bytes>::new()))
    }));
    let reports = Route::new("/reports").with_policy(Policy::new(Rate::per_day(n(100))));
    let ask = async |key: String, route: Option<Route>| {
        let mut request = Request::builder().header("x-key", key).body(()).unwrap();
        if let Some(route) = route {
            route.attach(request.extensions_mut());
        }
        service.clone().oneshot(request).await.unwrap()
    };
    for key in 0..400 {
        hand.advance(Duration::from_millis(10));
        let _ = ask(format!("flood-{key}"), Some(reports.clone())).await;
    }
    let mut waits = Vec::new();
    for i in 0..4 {
        hand.advance(Duration::from_secs(600));
        let response = ask(format!("new-{i}"), None).await;
        waits.push((response.status(), response.headers().get("retry-after").cloned()));
    }
    assert!(waits.iter().all(|(status, _)| *status == 200), "{waits:?}");
}
