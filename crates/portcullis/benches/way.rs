//! What one admitted request costs on its way through the layers, one added after the other: nanoseconds and allocations.
//!
//! `cargo bench -p portcullis --all-features --bench way`
//!
//! Each row is the stack up to that layer around a service that answers at once, so the difference to the row above is the
//! layer's own price. Rounds are interleaved and the best of them counts.

#![allow(clippy::expect_used, reason = "a bench that cannot go on fails")]

use std::convert::Infallible;
use std::hint::black_box;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use portcullis::auth::{Algorithm, AuthLayer, Jwt, KeySet};
use portcullis::balance::{BalanceLayer, PowerOfTwo};
use portcullis::circuit_break::CircuitBreakLayer;
use portcullis::core::{Address, Carried, Clock, Destination, PeerAddress, Route};
use portcullis::discovery::{DiscoveryLayer, FixedRegistry};
use portcullis::rate_limit::{Rate, RateLimitLayer};
use tower::util::BoxCloneSyncService;
use tower::{Layer, Service, ServiceBuilder, ServiceExt};

type Body = Full<Bytes>;
type Stack = BoxCloneSyncService<Request<Body>, (), Infallible>;

const SECRET: &[u8] = b"a secret that is known to whoever reads this bench";
const ROUNDS: usize = 15;
const CALLS: usize = 2_000;

fn answer<B>(_: Request<B>) -> std::future::Ready<Result<Response<Body>, Infallible>> {
    std::future::ready(Ok(Response::new(Body::default())))
}

/// Hides the service's type, and drops what it answers.
fn hide<S, R>(service: S) -> Stack
where
    S: Service<Request<Body>, Response = Response<R>, Error = Infallible> + Clone + Send + Sync + 'static,
    S::Future: Send,
    R: 'static,
{
    BoxCloneSyncService::new(service.map_response(drop))
}

fn request(token: &str) -> Request<Body> {
    let mut request = Request::get("http://gateway/orders/7").body(Body::default()).expect("a request");
    request.headers_mut().insert("authorization", token.parse().expect("a token"));
    Destination::new("orders").attach(request.extensions_mut());
    Route::new("/orders/{id}").attach(request.extensions_mut());
    PeerAddress(([192, 0, 2, 1], 4711).into()).attach(request.extensions_mut());
    request
}

fn call(stack: &mut Stack, request: Request<Body>) {
    let mut context = Context::from_waker(Waker::noop());
    let mut future = stack.call(request);
    match future.as_mut().poll(&mut context) {
        Poll::Ready(done) => drop(black_box(done)),
        Poll::Pending => unreachable!("nothing here waits"),
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let claims = serde_json::json!({
        "iss": "bench", "aud": "orders", "sub": "ada", "exp": portcullis_testing::token::now() + 86_400,
    });
    let token = format!("Bearer {}", portcullis_testing::token::hs256(SECRET, &claims));
    let keys = KeySet::hmac(Algorithm::HS256, SECRET).expect("a key");
    let auth = AuthLayer::new(Jwt::new(keys).issuer("bench").audience("orders"));
    let limit = RateLimitLayer::new(Rate::per_second(1_000_000_000_u32.try_into().expect("a rate")));
    let addresses = (1..=10).map(|last| Address::from(std::net::SocketAddr::from(([10, 0, 0, last], 80))));
    let discovery = DiscoveryLayer::new(FixedRegistry::new().service("orders", addresses));
    discovery.follow("orders");
    discovery.ready().await;
    let balance = BalanceLayer::new(PowerOfTwo);
    let breaker = CircuitBreakLayer::new();

    let mut stacks: [(&str, Stack); 6] = [
        ("nothing", hide(tower::service_fn(answer))),
        ("auth", hide(auth.layer(tower::service_fn(answer)))),
        ("+ rate-limit", hide(ServiceBuilder::new().layer(&auth).layer(&limit).service_fn(answer))),
        ("+ discovery", hide(ServiceBuilder::new().layer(&auth).layer(&limit).layer(&discovery).service_fn(answer))),
        (
            "+ balance",
            hide(ServiceBuilder::new().layer(&auth).layer(&limit).layer(&discovery).layer(&balance).service_fn(answer)),
        ),
        (
            "+ circuit-break",
            hide(
                ServiceBuilder::new()
                    .layer(&auth)
                    .layer(&limit)
                    .layer(&discovery)
                    .layer(&balance)
                    .layer(&breaker)
                    .service_fn(answer),
            ),
        ),
    ];
    let clock = Clock::system();
    let mut best = [f64::MAX; 6];
    for _ in 0..ROUNDS {
        for (best, (_, stack)) in best.iter_mut().zip(&mut stacks) {
            let requests: Vec<_> = (0..CALLS).map(|_| request(&token)).collect();
            let start = clock.now();
            for request in requests {
                call(stack, request);
            }
            *best = best.min(clock.now().since(start).as_nanos() as f64 / CALLS as f64);
        }
    }
    println!("{:<16} {:>8} {:>8} {:>8} {:>8}", "stack", "ns", "added", "allocs", "added");
    let mut above = (0.0, 0);
    for (best, (name, stack)) in best.iter().zip(&mut stacks) {
        let request = request(&token);
        let allocations = allocation_counter::measure(|| call(stack, request)).count_total;
        println!("{name:<16} {best:>8.0} {:>8.0} {allocations:>8} {:>8}", best - above.0, allocations as i64 - above.1);
        above = (*best, allocations as i64);
    }
}
