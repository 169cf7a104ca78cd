//! What a guarded call costs over a bare one, beside other breakers.
//!
//! `cargo bench -p portcullis-circuit-break --bench call`. Compare within one run: `bare` is the same request, response and
//! reading of its body with nothing around it.

#![expect(clippy::unwrap_used, reason = "a bench that cannot go on is none")]

use std::convert::Infallible;
use std::hint::black_box;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use criterion::{Criterion, criterion_group, criterion_main};
use futures::FutureExt;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use portcullis_circuit_break::{CircuitBreakLayer, Mode, Share, Window};
use portcullis_core::{Carried, Clock, Endpoint, Instance, Permit};
use tower::{Layer, Service};

const S: Duration = Duration::from_secs(1);

#[derive(Clone)]
struct Fine;

impl<B> Service<Request<B>> for Fine {
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = std::future::Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Infallible>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        drop(request);
        std::future::ready(Ok(Response::new(Full::new(Bytes::from_static(b"fine")))))
    }
}

/// One call, and its body to the end. Whether it was answered.
fn call<S, B>(service: &mut S, request: Request<()>) -> bool
where
    S: Service<Request<()>, Response = Response<B>>,
    B: http_body::Body<Data = Bytes> + Unpin,
{
    let ready = futures::future::poll_fn(|cx| service.poll_ready(cx)).now_or_never();
    black_box(ready.is_some());
    let Some(Ok(response)) = service.call(request).now_or_never() else { return false };
    let mut body = response.into_body();
    while let Some(Some(frame)) = body.frame().now_or_never() {
        black_box(frame.is_ok());
    }
    true
}

/// The time for `count` calls on each of so many threads.
fn on_threads<S: Clone + Send>(
    threads: usize,
    count: u64,
    service: &S,
    run: impl Fn(&mut S) -> bool + Sync,
) -> Duration {
    let (run, start) = (&run, &std::sync::Barrier::new(threads));
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads)
            .map(|_| {
                let mut service = service.clone();
                scope.spawn(move || {
                    start.wait();
                    let clock = Clock::system();
                    let begun = clock.now();
                    (0..count).for_each(|_| _ = black_box(run(&mut service)));
                    clock.now().since(begun)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).max().unwrap_or_default()
    })
}

fn windows() -> (Window, Window) {
    let half = Share::new(0.5).unwrap();
    (Window::of_calls(100).unwrap().failure_rate(half), Window::of_time(10 * S).unwrap().failure_rate(half))
}

fn admitted(c: &mut Criterion) {
    let mut group = c.benchmark_group("admitted");
    let new = || Request::new(());
    group.bench_function("bare", |b| b.iter(|| call(&mut Fine, new())));
    group.bench_function("clock", |b| {
        let clock = Clock::system();
        b.iter(|| black_box(clock.now()));
    });
    let (of_calls, of_time) = windows();
    for (name, layer) in [
        ("consecutive", CircuitBreakLayer::new()),
        ("window of calls", CircuitBreakLayer::new().window(of_calls)),
        ("window of time", CircuitBreakLayer::new().window(of_time)),
    ] {
        let mut service = layer.layer(Fine);
        group.bench_function(name, |b| b.iter(|| call(&mut service, new())));
    }
    // The clock stands still here and costs next to nothing: what is left is the window itself.
    let mut service = CircuitBreakLayer::new().window(of_time).with_clock(Clock::manual().0).layer(Fine);
    group.bench_function("window of time, clock apart", |b| b.iter(|| call(&mut service, new())));

    let endpoint = Endpoint::new("s", Instance::new("a", SocketAddr::from(([127, 0, 0, 1], 1))));
    let permitted = || {
        let mut request = Request::new(());
        endpoint.permit(|| unreachable!()).unwrap().attach(request.extensions_mut());
        request
    };
    let mut bare = Fine;
    group.bench_function("endpoint: bare, with its permit", |b| b.iter(|| call(&mut bare, permitted())));
    let mut service = CircuitBreakLayer::new().layer(Fine);
    group.bench_function("endpoint: consecutive", |b| b.iter(|| call(&mut service, permitted())));

    use failsafe::{CircuitBreaker, Config, backoff, failure_policy};
    let consecutive = failure_policy::consecutive_failures(5, backoff::constant(5 * S));
    let breaker = Config::new().failure_policy(consecutive).build();
    group.bench_function("failsafe, consecutive", |b| {
        b.iter(|| breaker.call(|| Ok::<_, ()>(call(&mut Fine, new()))).is_ok());
    });
    let rate = failure_policy::success_rate_over_time_window(0.5, 20, 10 * S, backoff::constant(5 * S));
    let breaker = Config::new().failure_policy(rate).build();
    group.bench_function("failsafe, rate over time", |b| {
        b.iter(|| breaker.call(|| Ok::<_, ()>(call(&mut Fine, new()))).is_ok());
    });

    use tower_resilience_circuitbreaker::CircuitBreakerLayer;
    let mut service = CircuitBreakerLayer::builder().consecutive_failures(5).build().unwrap().layer(Fine);
    group.bench_function("tower-resilience, consecutive", |b| b.iter(|| call(&mut service, new())));
    let mut service = CircuitBreakerLayer::builder().sliding_window_size(100).build().unwrap().layer(Fine);
    group.bench_function("tower-resilience, window of calls", |b| b.iter(|| call(&mut service, new())));
}

fn refused(c: &mut Criterion) {
    let mut group = c.benchmark_group("refused");
    let layer = CircuitBreakLayer::new().failures(1);
    let mut service = layer.layer(Fine);
    layer.handle().set_mode(Mode::ForcedOpen);
    group.bench_function("forced open, with its response", |b| b.iter(|| call(&mut service, Request::new(()))));

    // As an outage leaves it, and without the response: only the decision, which `peek` shares with the layer.
    let layer = CircuitBreakLayer::new().failures(1).open_for(3600 * S);
    let broken = tower::service_fn(async |_: Request<()>| Err::<Response<Full<Bytes>>, _>("refused"));
    let mut broken = layer.layer(broken);
    call(&mut broken, Request::new(()));
    group.bench_function("open, with its response", |b| b.iter(|| call(&mut broken, Request::new(()))));
    let endpoint = Endpoint::new("s", Instance::new("a", SocketAddr::from(([127, 0, 0, 1], 1))));
    let mut request = Request::new(());
    Permit::without_right(endpoint.clone()).attach(request.extensions_mut());
    call(&mut broken, request);
    let clock = Clock::system();
    group.bench_function("open, the decision alone", |b| b.iter(|| endpoint.pass(|| clock.now()).is_err()));

    use failsafe::{CircuitBreaker, Config, backoff, failure_policy};
    let consecutive = failure_policy::consecutive_failures(1, backoff::constant(3600 * S));
    let breaker = Config::new().failure_policy(consecutive).build();
    black_box(breaker.call(|| Err::<(), _>(())).is_err());
    group.bench_function("failsafe, the decision alone", |b| b.iter(|| breaker.call(|| Ok::<_, ()>(())).is_err()));

    use tower_resilience_circuitbreaker::CircuitBreakerLayer;
    let layer = CircuitBreakerLayer::builder().consecutive_failures(1).wait_duration_in_open(3600 * S).build().unwrap();
    let broken = tower::service_fn(async |_: Request<()>| Err::<Response<Full<Bytes>>, _>("refused"));
    let mut service = layer.layer(broken);
    call(&mut service, Request::new(()));
    group.bench_function("tower-resilience, an error", |b| b.iter(|| call(&mut service, Request::new(()))));
}

fn two_threads(c: &mut Criterion) {
    let mut group = c.benchmark_group("one breaker");
    for threads in [1, 2] {
        let of = |name: &str| format!("{name}, {threads} threads");
        let ours = CircuitBreakLayer::new().layer(Fine);
        group.bench_function(of("consecutive"), |b| {
            b.iter_custom(|count| on_threads(threads, count, &ours, |service| call(service, Request::new(()))));
        });
        group.bench_function(of("bare"), |b| {
            b.iter_custom(|count| on_threads(threads, count, &Fine, |service| call(service, Request::new(()))));
        });
        let windowed = CircuitBreakLayer::new().window(windows().1).layer(Fine);
        group.bench_function(of("window of time"), |b| {
            b.iter_custom(|count| on_threads(threads, count, &windowed, |service| call(service, Request::new(()))));
        });
        use failsafe::{CircuitBreaker, Config, backoff, failure_policy};
        let consecutive = failure_policy::consecutive_failures(5, backoff::constant(5 * S));
        let breaker = Config::new().failure_policy(consecutive).build();
        group.bench_function(of("failsafe, consecutive"), |b| {
            b.iter_custom(|count| {
                on_threads(threads, count, &breaker, |breaker| {
                    breaker.call(|| Ok::<_, ()>(call(&mut Fine, Request::new(())))).is_ok()
                })
            });
        });
        use tower_resilience_circuitbreaker::CircuitBreakerLayer;
        let peer = CircuitBreakerLayer::builder().consecutive_failures(5).build().unwrap().layer(Fine);
        group.bench_function(of("tower-resilience, consecutive"), |b| {
            b.iter_custom(|count| on_threads(threads, count, &peer, |service| call(service, Request::new(()))));
        });
    }
}

criterion_group!(benches, admitted, refused, two_threads);
criterion_main!(benches);
