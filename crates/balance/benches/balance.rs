//! What a pick costs, and a whole call, beside `tower`'s balancer behind its buffer.
//!
//! `cargo bench -p portcullis-balance`
//!
//! Except for the group `first pick`, a figure is the best of many short batches, which other work on the machine hardly
//! touches.

#![allow(clippy::unwrap_used, missing_docs, reason = "a bench that cannot go on panics")]

use std::convert::Infallible;
use std::future::{Future, Ready, ready};
use std::hint::black_box;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use criterion::{Bencher, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use http::{Request, Response};
use http_body_util::Empty;
use portcullis_balance::{
    Asked, BalanceLayer, Call, HashKey, LeastConnections, Maglev, PeakEwma, Pick, Policy, PowerOfTwo, Random,
    Rendezvous, Replay, RingHash, RoundRobin,
};
use portcullis_core::{Carried, Clock, Endpoint, Endpoints, Instance, Moment, Outcome};
use tower::balance::p2c::Balance;
use tower::discover::ServiceList;
use tower::load::{CompleteOnResponse, Constant, PeakEwmaDiscover};
use tower::{Layer, Service, ServiceExt};

/// Answers at once.
#[derive(Clone)]
struct Answer;

impl<B> Service<Request<Replay<B>>> for Answer {
    type Response = Response<Empty<Bytes>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Replay<B>>) -> Self::Future {
        black_box(&request);
        ready(Ok(Response::new(Empty::new())))
    }
}

/// The same, for `tower`.
#[derive(Clone)]
struct Plain;

impl Service<Request<Empty<Bytes>>> for Plain {
    type Response = Response<Empty<Bytes>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Empty<Bytes>>) -> Self::Future {
        black_box(&request);
        ready(Ok(Response::new(Empty::new())))
    }
}

fn endpoints(n: usize) -> Endpoints {
    let instance = |i: usize| {
        let port = 1 + (i % 60_000) as u16;
        Instance::new(format!("{i}"), SocketAddr::from(([10, 0, (i / 60_000) as u8, 1], port)))
    };
    Endpoints::none("bench").reconcile((0..n).map(instance), Moment::MIN)
}

fn request() -> Request<Empty<Bytes>> {
    Request::get("http://orders.internal/v1/orders/17?full=1")
        .header("host", "orders.internal")
        .header("user-agent", "bench/1")
        .header("accept", "application/json")
        .header("x-request-id", "0123456789abcdef")
        .header("authorization", "Bearer 0123456789abcdef0123456789abcdef")
        .body(Empty::new())
        .unwrap()
}

/// Measures the best of many short batches.
fn best(b: &mut Bencher<'_>, mut call: impl FnMut()) {
    const BATCH: u64 = 64;
    b.iter_custom(|rounds| {
        let batches = rounds.div_ceil(BATCH).max(50);
        let batch = |_| {
            let began = tokio::time::Instant::now();
            (0..BATCH).for_each(|_| call());
            began.elapsed()
        };
        (0..batches).map(batch).min().unwrap().mul_f64(rounds as f64 / BATCH as f64)
    });
}

fn picks(c: &mut Criterion) {
    fn one<P: Pick>(c: &mut Criterion, name: &str, policy: impl Fn() -> P, sets: &[Endpoints]) {
        with_clock(c, name, policy, sets, &Clock::system());
    }
    fn with_clock<P: Pick>(c: &mut Criterion, name: &str, policy: impl Fn() -> P, sets: &[Endpoints], clock: &Clock) {
        differing(c, name, policy, sets, clock, false);
    }
    /// As if servers differed: one is up to four times slower than another and has up to three requests in flight.
    fn differing<P: Pick>(
        c: &mut Criterion,
        name: &str,
        policy: impl Fn() -> P,
        sets: &[Endpoints],
        clock: &Clock,
        differ: bool,
    ) {
        let mut group = c.benchmark_group(format!("pick/{name}"));
        for set in sets {
            let (policy, request) = (Arc::new(policy()), request());
            let layer = BalanceLayer::new(policy.clone()).clock(clock.clone());
            layer.prepare(set);
            drop(layer.choose(set, Asked::of(&request)).unwrap());
            if policy.observes() {
                for (i, endpoint) in set.iter().enumerate() {
                    let latency = Duration::from_millis(if differ { 20 + i as u64 * 7919 % 61 } else { 20 });
                    let call = Call::new(latency, Outcome::Success, None, clock.now());
                    (0..9).for_each(|_| policy.observe(endpoint, &call));
                }
            }
            let busy = |(i, endpoint)| (0..i * 31 % 4).map(|_| Endpoint::begin(endpoint)).collect::<Vec<_>>();
            let _busy: Vec<_> = set.iter().enumerate().filter(|_| differ).flat_map(busy).collect();
            group.bench_function(BenchmarkId::from_parameter(set.len()), |b| {
                best(b, || {
                    let permit = layer.choose(set, Asked::of(&request)).unwrap();
                    drop(black_box(permit.begin()));
                });
            });
        }
    }
    // Once for all, the largest first: what comes and goes leaves holes in which handles are no longer side by side.
    let mut sets = [100_000, 1000, 100, 3].map(endpoints);
    sets.reverse();
    one(c, "round-robin", RoundRobin::new, &sets);
    one(c, "random", || Random, &sets);
    one(c, "least-connections", LeastConnections::new, &sets);
    one(c, "power-of-two", || PowerOfTwo, &sets);
    one(c, "peak-ewma", PeakEwma::new, &sets);
    with_clock(c, "peak-ewma, a clock that costs nothing", PeakEwma::new, &sets, &Clock::manual().0);
    differing(c, "power-of-two, servers that differ", || PowerOfTwo, &sets[2..3], &Clock::system(), true);
    differing(
        c,
        "peak-ewma, servers that differ, a clock that costs nothing",
        PeakEwma::new,
        &sets[2..3],
        &Clock::manual().0,
        true,
    );
    let by_path = HashKey::path;
    one(c, "maglev", || Maglev::by(by_path()), &sets[..3]);
    one(c, "ring-hash", || RingHash::by(by_path()), &sets[..3]);
    one(c, "rendezvous", || Rendezvous::by(by_path()), &sets[..2]);
    let endpoint = Endpoint::new("bench", Instance::new("1", SocketAddr::from(([10, 0, 0, 1], 1))));
    c.bench_function("the permit alone", |b| best(b, || drop(black_box(endpoint.permit_by_force()))));
    c.bench_function("clock", |b| best(b, || assert!(black_box(Clock::system().now()) > Moment::MIN)));
}

/// The time of one pick while so many threads pick at once: among the same endpoints, or, to see what the machine can, each
/// among its own.
fn threads(c: &mut Criterion) {
    fn one<P: Pick>(c: &mut Criterion, name: &str, policy: impl Fn() -> P) {
        for n in [100, 1000] {
            let mut group = c.benchmark_group(format!("threads/{name} of {n}"));
            let (sets, layer) = ([endpoints(n), endpoints(n)], BalanceLayer::new(policy()));
            for (kind, using) in [("1", &[0][..]), ("2", &[0, 0]), ("2 apart", &[0, 1])] {
                group.throughput(Throughput::Elements(using.len() as u64));
                group.bench_function(kind, |b| {
                    together(b, &layer, &using.iter().map(|i| &sets[*i]).collect::<Vec<_>>())
                });
            }
        }
    }
    one(c, "round-robin", RoundRobin::new);
    one(c, "random", || Random);
    one(c, "power-of-two", || PowerOfTwo);
    one(c, "peak-ewma", PeakEwma::new);
}

/// Lets a thread pick from each of `sets`, in batches that begin together, and measures the best from the first beginning
/// to the last end.
fn together<P: Pick>(b: &mut Bencher<'_>, layer: &BalanceLayer<P>, sets: &[&Endpoints]) {
    const BATCH: u64 = 4096;
    b.iter_custom(|rounds| {
        let batches = rounds.div_ceil(BATCH).max(20);
        let (arrived, start) = (AtomicU64::new(0), tokio::time::Instant::now());
        let pick = |set: &Endpoints| -> Vec<(Duration, Duration)> {
            let request = request();
            let batch = |number| {
                arrived.fetch_add(1, Ordering::AcqRel);
                while arrived.load(Ordering::Acquire) < number * sets.len() as u64 {
                    std::thread::yield_now();
                }
                let began = start.elapsed();
                for _ in 0..BATCH {
                    let permit = layer.choose(set, Asked::of(&request)).unwrap();
                    drop(black_box(permit.begin()));
                }
                (began, start.elapsed())
            };
            (1..=batches).map(batch).collect()
        };
        let spans: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = sets.iter().map(|set| scope.spawn(|| pick(set))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let took = |batch: usize| {
            let span = spans.iter().map(|spans| spans[batch]).reduce(|a, b| (a.0.min(b.0), a.1.max(b.1))).unwrap();
            span.1 - span.0
        };
        (0..batches as usize).map(took).min().unwrap().mul_f64(rounds as f64 / BATCH as f64)
    });
}

/// The first pick of a service, and what it need not wait for: a table.
fn tables(c: &mut Criterion) {
    fn one<P: Pick>(c: &mut Criterion, name: &str, layer: &BalanceLayer<P>) {
        let request = request();
        let timed = |call: &dyn Fn(&Endpoints)| {
            let set = endpoints(1000);
            let began = tokio::time::Instant::now();
            call(&set);
            let took = began.elapsed();
            // A table under way would disturb the next.
            layer.prepare(&set);
            took
        };
        let mut bench = |group: &str, call: &dyn Fn(&Endpoints)| {
            c.benchmark_group(group).bench_function(name, |b| {
                b.iter_custom(|rounds| (0..rounds).map(|_| timed(call)).sum());
            });
        };
        bench("first pick of 1000", &|set| assert!(layer.choose(set, Asked::of(&request)).is_ok()));
        bench("prepare for 1000", &|set| layer.prepare(set));
    }
    one(c, "random", &BalanceLayer::new(Random));
    one(c, "maglev, 65,537 slots", &BalanceLayer::new(Maglev::by(HashKey::path())));
    one(c, "ring-hash, 262,144 points", &BalanceLayer::new(RingHash::by(HashKey::path())));
}

fn calls(c: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _inside = runtime.enter();
    let mut group = c.benchmark_group("call");
    let set = endpoints(100);
    let carrying = || {
        let mut request = request();
        set.clone().attach(request.extensions_mut());
        request
    };
    let mut bench = |name: &str, call: &mut dyn FnMut()| {
        group.bench_function(name, |b| best(b, &mut *call));
    };
    bench("the request alone", &mut || drop(black_box(carrying())));
    fn drive<F: Future>(future: F) -> F::Output {
        let mut future = std::pin::pin!(future);
        match future.as_mut().poll(&mut Context::from_waker(std::task::Waker::noop())) {
            Poll::Ready(output) => output,
            Poll::Pending => unreachable!("the inner service answers at once"),
        }
    }
    bench("the runtime alone", &mut || runtime.block_on(async { drop(black_box(request())) }));
    let mut bare = Answer;
    bench("bare service", &mut || {
        black_box(drive(bare.call(carrying().map(Replay::new))).unwrap());
    });
    let layer = BalanceLayer::new(PowerOfTwo);
    for (name, layer) in [
        ("power-of-two", layer.clone()),
        ("power-of-two, served not told", layer.clone().leaves_served(false)),
        ("power-of-two, one attempt", layer.clone().policy(Policy::new().attempts(1)).leaves_served(false)),
    ] {
        let mut service = layer.layer(Answer);
        bench(name, &mut || {
            black_box(drive(service.call(carrying())).unwrap());
        });
    }
    let mut service = BalanceLayer::new(PeakEwma::new()).layer(Answer);
    bench("peak-ewma", &mut || {
        black_box(drive(service.call(carrying())).unwrap());
    });
    group.finish();

    let mut group = c.benchmark_group("tower");
    let constant = || Balance::new(ServiceList::new((0..100).map(|_| Constant::new(Plain, 0))));
    let mut balance = constant();
    group.bench_function("balance", |b| {
        best(b, || {
            runtime.block_on(async { drop(black_box(balance.ready().await.unwrap().call(request()).await.unwrap())) });
        });
    });
    let mut buffered = tower::buffer::Buffer::new(constant(), 1024);
    group.bench_function("buffer + balance", |b| {
        best(b, || {
            runtime.block_on(async { drop(black_box(buffered.ready().await.unwrap().call(request()).await.unwrap())) });
        });
    });
    let ewma = PeakEwmaDiscover::new(
        ServiceList::new((0..100).map(|_| Plain)),
        Duration::from_secs(1),
        Duration::from_secs(10),
        CompleteOnResponse::default(),
    );
    let mut buffered = tower::buffer::Buffer::new(Balance::new(ewma), 1024);
    group.bench_function("buffer + balance, peak-ewma", |b| {
        best(b, || {
            runtime.block_on(async { drop(black_box(buffered.ready().await.unwrap().call(request()).await.unwrap())) });
        });
    });
}

criterion_group!(benches, picks, threads, tables, calls);
criterion_main!(benches);
