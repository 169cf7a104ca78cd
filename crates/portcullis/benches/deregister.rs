//! How long an instance is still called after it has deregistered from a real Consul agent.
//!
//! `cargo bench -p portcullis --all-features --bench deregister`
//!
//! Two instances stand behind a gateway and eight callers keep it busy. One instance deregisters; what counts is the time
//! from the agent's answer to the last request that reached it. Zero means that none came after the answer.

#![allow(clippy::expect_used, reason = "a bench that cannot go on fails")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use portcullis::core::{Clock, Moment};
use portcullis::discovery::{ConsulConfig, ConsulRegistry, Registry, ServiceDefinition};
use portcullis::gateway::{Gateway, Route};
use portcullis_testing::{Backend, Consul};
use tower::ServiceExt;

const ROUNDS: usize = 30;

async fn busy(gateway: Gateway, stop: Arc<AtomicBool>) -> usize {
    let mut bad = 0;
    while !stop.load(Ordering::Relaxed) {
        let request = Request::get("http://gateway/orders").body(Full::<Bytes>::default()).expect("a request");
        let answer = gateway.clone().oneshot(request).await.expect("an answer");
        bad += usize::from(answer.status() != 200);
        let _ = answer.into_body().collect().await;
    }
    bad
}

/// The time of the last request that reaches `backend` in the next half second.
async fn last_request(backend: &Backend, clock: &Clock) -> Option<Moment> {
    let (end, mut seen, mut last) = (clock.now() + Duration::from_millis(500), backend.requests(), None);
    while clock.now() < end {
        let now = backend.requests();
        if now != seen {
            (seen, last) = (now, Some(clock.now()));
        }
        tokio::task::yield_now().await;
    }
    last
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let (consul, clock) = (Consul::start().await, Clock::system());
    let config = ConsulConfig::new(&consul.url()).expect("a URL");
    let registry = ConsulRegistry::new(config).expect("a registry");
    let backends = [Backend::start("a").await, Backend::start("b").await];
    let register = async |name: &str, address: SocketAddr| {
        registry.register(ServiceDefinition::new("orders", name, address)).await.expect("a registration")
    };
    let _stays = register("a", backends[0].address()).await;
    let mut leaves = register("b", backends[1].address()).await;
    let gateway = Gateway::builder(registry.clone()).route("/orders", Route::to("orders")).build().expect("a gateway");
    gateway.ready().await;

    let stop = Arc::<AtomicBool>::default();
    let callers: Vec<_> = (0..8).map(|_| tokio::spawn(busy(gateway.clone(), stop.clone()))).collect();
    let mut lags = Vec::new();
    for _ in 0..ROUNDS {
        let before = backends[1].requests();
        while backends[1].requests() < before + 100 {
            tokio::task::yield_now().await;
        }
        leaves.deregister().await.expect("a deregistration");
        let answered = clock.now();
        let last = last_request(&backends[1], &clock).await;
        lags.push(last.map_or(Duration::ZERO, |last| last.since(answered)));
        leaves = register("b", backends[1].address()).await;
    }
    stop.store(true, Ordering::Relaxed);
    let mut bad = 0;
    for caller in callers {
        bad += caller.await.expect("a caller");
    }
    lags.sort();
    println!(
        "{ROUNDS} deregistrations: last request after {:?} (median), {:?} (worst); answers other than 200: {bad}",
        lags[ROUNDS / 2],
        lags[ROUNDS - 1]
    );
}
