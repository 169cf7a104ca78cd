//! The whole layer beside governor and tower_governor, in one run: differences to the bare service are what counts.
//!
//! ```text
//! cargo bench -p portcullis-rate-limit --bench limit
//! ```

#![allow(clippy::unwrap_used, missing_docs, reason = "a bench")]
#![allow(clippy::disallowed_methods, reason = "it measures real time")]

use std::cell::LazyCell;
use std::convert::Infallible;
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use axum::body::Body;
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, criterion_group, criterion_main};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use http::{Request, Response};
use portcullis_core::{Carried, Clock, Identity, PeerAddress, Proof};
use portcullis_rate_limit::{Everyone, Limit, Rate, RateLimitLayer};
use tower::{Layer, Service};
use tower_governor::GovernorLayer;
use tower_governor::governor::GovernorConfigBuilder;
use tower_governor::key_extractor::KeyExtractor;

#[derive(Clone, Copy)]
struct Bare;

/// A line of the caches.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(u32);

type Group<'a> = BenchmarkGroup<'a, WallTime>;

impl Service<Request<()>> for Bare {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = std::future::Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<()>) -> Self::Future {
        let mut response = Response::new(Body::empty());
        // The request comes back, so that making one is not measured.
        *response.extensions_mut() = request.into_parts().0.extensions;
        std::future::ready(Ok(response))
    }
}

/// The same key the others have: the peer's address.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ByPeer;

impl KeyExtractor for ByPeer {
    type Key = IpAddr;

    fn extract<T>(&self, request: &Request<T>) -> Result<IpAddr, tower_governor::GovernorError> {
        Ok(PeerAddress::of(request.extensions()).unwrap().0.ip())
    }
}

/// So often that nothing is ever refused.
const COUNT: NonZeroU32 = NonZeroU32::new(1_000_000_000).unwrap();

fn rate() -> Rate {
    Rate::per_second(COUNT)
}

fn address(key: u32) -> IpAddr {
    IpAddr::V4(Ipv4Addr::from_bits(key))
}

fn from(key: u32) -> http::Extensions {
    let mut extensions = http::Extensions::new();
    PeerAddress(SocketAddr::new(address(key), 1)).attach(&mut extensions);
    extensions
}

/// Calls, and returns the extensions to call with again.
fn call<S, R>(service: &mut S, extensions: http::Extensions) -> http::Extensions
where
    S: Service<Request<()>, Response = Response<R>, Error = Infallible>,
{
    let mut request = Request::new(());
    *request.extensions_mut() = extensions;
    let mut future = std::pin::pin!(service.call(request));
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(Ok(response)) => response.into_parts().0.extensions,
        Poll::Pending => unreachable!("nothing waits"),
    }
}

fn governor_layer() -> GovernorLayer<ByPeer, governor::middleware::NoOpMiddleware<governor::clock::QuantaInstant>, Body>
{
    let mut config = GovernorConfigBuilder::default().key_extractor(ByPeer);
    let config = config.per_nanosecond(1).burst_size(u32::MAX).finish().unwrap();
    GovernorLayer::new(Arc::new(config))
}

fn warm(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("warm key");
    let mut bench =
        |name: &str, service: &mut dyn FnMut(http::Extensions) -> http::Extensions, with: http::Extensions| {
            let mut extensions = Some(with);
            group.bench_function(name, |bencher| {
                bencher.iter(|| extensions = extensions.take().map(|with| black_box(service(with))));
            });
        };
    let mut bare = Bare;
    bench("bare service", &mut |with| call(&mut bare, with), from(1));
    let mut ours = RateLimitLayer::new(rate()).layer(Bare);
    bench("portcullis, address", &mut |with| call(&mut ours, with), from(1));
    let mut identity = http::Extensions::new();
    Identity::new("auth0|5f7c8ec7c33c6c004bbafe82", Proof::Jwt)
        .with_issuer("https://issuer.example.com/")
        .attach(&mut identity);
    bench("portcullis, identity", &mut |with| call(&mut ours, with), identity);
    let (standing, _hand) = Clock::manual();
    let mut standing = RateLimitLayer::new(rate()).with_clock(standing).layer(Bare);
    bench("portcullis, address, clock not read", &mut |with| call(&mut standing, with), from(1));
    let everyone = Limit::new("all", rate()).with_key(Everyone);
    let mut two = RateLimitLayer::new(rate()).and(everyone).layer(Bare);
    bench("portcullis, two limits", &mut |with| call(&mut two, with), from(1));
    let mut theirs = governor_layer().layer(Bare);
    bench("tower_governor, address", &mut |with| call(&mut theirs, with), from(1));
    let keyed: DefaultKeyedRateLimiter<IpAddr> = RateLimiter::keyed(Quota::per_second(COUNT));
    group.bench_function("governor alone, address", |bencher| {
        bencher.iter(|| keyed.check_key(black_box(&address(1))).is_ok());
    });
    let clock = Clock::system();
    group.bench_function("our clock", |bencher| bencher.iter(|| clock.now()));
}

fn many(criterion: &mut Criterion) {
    for keys in [100_000_u32, 1_000_000] {
        let mut group = criterion.benchmark_group(format!("{keys} keys"));
        // Slow enough that no key is forgotten: each keeps its entry.
        let slow = RateLimitLayer::new(Rate::per_day(COUNT)).capacity(keys as usize);
        many_keys(&mut group, "bare service", keys, || Bare);
        many_keys(&mut group, "portcullis", keys, || slow.layer(Bare));
        let (standing, _hand) = Clock::manual();
        let slow = slow.clone().with_clock(standing);
        many_keys(&mut group, "portcullis, clock not read", keys, || slow.layer(Bare));
        many_keys(&mut group, "tower_governor", keys, || governor_layer().layer(Bare));
        let keyed = LazyCell::new(|| {
            let keyed: DefaultKeyedRateLimiter<String> = RateLimiter::keyed(Quota::per_second(COUNT));
            let names: Vec<String> = (0..keys).map(|key| address(key).to_string()).collect();
            names.iter().for_each(|name| drop(keyed.check_key(name)));
            (keyed, names)
        });
        let mut random = fastrand::Rng::with_seed(7);
        group.bench_function("governor alone, text", |bencher| {
            let (keyed, names) = &*keyed;
            bencher.iter(|| keyed.check_key(&names[random.usize(..names.len())]).is_ok());
        });
        far(&mut group, keys);
    }
}

fn many_keys<S, R>(group: &mut Group<'_>, name: &str, keys: u32, make: impl Fn() -> S)
where
    S: Service<Request<()>, Response = Response<R>, Error = Infallible>,
{
    let warm = || {
        let mut service = make();
        let extensions = (0..keys).fold(from(0), |with, key| call(&mut service, at(with, key)));
        (service, Some(extensions))
    };
    let mut warmed = None;
    let mut random = fastrand::Rng::with_seed(7);
    group.bench_function(name, |bencher| {
        let (service, extensions) = warmed.get_or_insert_with(warm);
        bencher.iter(|| *extensions = extensions.take().map(|with| call(service, at(with, random.u32(..keys)))));
    });
}

/// What memory itself takes: reads of which each says where the next one is, all over as many bytes as the table has, and
/// as the fronts of its sets have, which is a third.
fn far(group: &mut Group<'_>, keys: u32) {
    for (name, lines) in [("one read of the table's memory", keys), ("one read of its fronts", keys / 3)] {
        let memory = LazyCell::new(|| {
            let mut order: Vec<u32> = (0..lines).collect();
            fastrand::Rng::with_seed(7).shuffle(&mut order);
            let mut memory = vec![Line(0); lines as usize];
            order.iter().zip(order.iter().cycle().skip(1)).for_each(|(at, next)| memory[*at as usize].0 = *next);
            memory
        });
        let mut at = 0;
        group.bench_function(name, |bencher| {
            let memory = &*memory;
            bencher.iter(|| at = memory[at as usize].0);
        });
    }
}

fn at(mut extensions: http::Extensions, key: u32) -> http::Extensions {
    if let Some(peer) = PeerAddress::of_mut(&mut extensions) {
        peer.0.set_ip(address(key));
    }
    extensions
}

/// Time for one call in each of so many threads.
fn threads(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("threads, distinct keys");
    for threads in [1, 2] {
        let ours = RateLimitLayer::new(rate()).layer(Bare);
        group.bench_function(format!("portcullis, {threads}"), |bencher| {
            bencher.iter_custom(|calls| together(threads, calls, &ours));
        });
        let theirs = governor_layer().layer(Bare);
        group.bench_function(format!("tower_governor, {threads}"), |bencher| {
            bencher.iter_custom(|calls| together(threads, calls, &theirs));
        });
    }
}

fn together<S, R>(threads: u32, calls: u64, service: &S) -> std::time::Duration
where
    S: Service<Request<()>, Response = Response<R>, Error = Infallible> + Clone + Send + Sync,
{
    let start = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                let mut service = service.clone();
                let mut extensions = from(thread << 16);
                for call_ in 0..calls {
                    extensions = call(&mut service, at(extensions, thread << 16 | call_ as u32 & 1023));
                }
            });
        }
    });
    start.elapsed()
}

criterion_group!(benches, warm, many, threads);
criterion_main!(benches);
