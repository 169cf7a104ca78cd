//! A gateway for load generators: one runtime per core, three kinds of stack.
//!
//! `portcullis-bench --listen 127.0.0.1:8080 --upstreams 127.0.0.1:9001,127.0.0.1:9002 --threads 2 [--alg RS256 --jwks FILE] [--no-cache]`
//!
//! Without `--alg` the stack is discovery, balance (round robin) and forward; with it, all six layers: tokens are verified
//! (issuer `bench`, audience `gateway`), each subject has a limit that is never reached, the least busy of two is
//! picked, and each endpoint has a breaker. `--bare` is forward alone, to the first upstream. SIGTERM ends it.
//!
//! With the feature `mimalloc` memory comes from there instead of from the system's allocator.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a bench that cannot go on fails")]

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::time::Duration;

use http::Request;
use portcullis::auth::{AuthLayer, Jwt, KeySet};
use portcullis::balance::{BalanceLayer, PowerOfTwo, RoundRobin};
use portcullis::circuit_break::CircuitBreakLayer;
use portcullis::core::{Address, Carried, Destination};
use portcullis::discovery::{DiscoveryLayer, FixedRegistry};
use portcullis::forward::Forward;
use portcullis::rate_limit::{Rate, RateLimitLayer};
use portcullis::serve::{Incoming, Server};
use tokio::signal::unix::{SignalKind, signal};
use tower::ServiceBuilder;

#[cfg(feature = "mimalloc")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let argument = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1).map(String::as_str).filter(|value| !value.is_empty() && !value.starts_with("--"))
    };
    let listen: SocketAddr = argument("--listen").unwrap_or("127.0.0.1:8080").parse().expect("an address");
    let upstreams = argument("--upstreams").expect("--upstreams");
    let threads: usize = argument("--threads").unwrap_or("1").parse().expect("a number");
    let mut terminate = signal(SignalKind::terminate()).expect("signals");
    let told = async move { _ = terminate.recv().await };
    let threads = NonZeroUsize::new(threads).expect("threads");
    let server = Server::bind_per_core(listen, threads).expect("a free port").graceful(told, Duration::ZERO);
    let forward = Forward::new();
    if arguments.iter().any(|argument| argument == "--bare") {
        let first = upstreams.split(',').next().unwrap_or_default();
        return server.serve(Forward::to(first).expect("an address")).await.expect("served");
    }
    let addresses = upstreams.split(',').map(|upstream| upstream.parse::<Address>().expect("an address"));
    let discovery = DiscoveryLayer::new(FixedRegistry::new().service("bench", addresses));
    discovery.follow("bench");
    discovery.ready().await;
    let destination = Destination::new("bench");
    let to_bench = move |mut request: Request<Incoming>| {
        destination.clone().attach(request.extensions_mut());
        request
    };
    let Some(_) = argument("--alg") else {
        let stack = ServiceBuilder::new()
            .map_request(to_bench)
            .layer(discovery)
            .layer(BalanceLayer::new(RoundRobin::new()).leaves_served(false))
            .service(forward);
        return server.serve(stack).await.expect("served");
    };
    let keys = std::fs::read(argument("--jwks").expect("--jwks")).expect("the key set");
    let mut jwt = Jwt::new(KeySet::from_jwks(keys).expect("keys")).issuer("bench").audience("gateway");
    if arguments.iter().any(|argument| argument == "--no-cache") {
        jwt = jwt.cache_bytes(0);
    }
    let rate = Rate::per_second(1_000_000.try_into().expect("a rate"));
    let stack = ServiceBuilder::new()
        .map_request(to_bench)
        .layer(AuthLayer::new(jwt))
        .layer(RateLimitLayer::new(rate))
        .layer(discovery)
        .layer(BalanceLayer::new(PowerOfTwo).leaves_served(false))
        .layer(CircuitBreakLayer::new())
        .service(forward);
    server.serve(stack).await.expect("served");
}
