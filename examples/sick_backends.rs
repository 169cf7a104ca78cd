//! Three real backends under load through the gateway, of which one is sick, or each in its own way: what share each
//! balancing policy gives the sick ones, and what callers see.
//!
//! `cargo run --release --example sick_backends`

#![allow(clippy::unwrap_used, reason = "an example that cannot go on panics")]

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Empty, StreamBody};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use portcullis::balance::{BalanceLayer, LeastConnections, PeakEwma, Pick, Policy, PowerOfTwo, Random, RoundRobin};
use portcullis::circuit_break::CircuitBreakLayer;
use portcullis::core::Address;
use portcullis::discovery::FixedRegistry;
use portcullis::gateway::{Gateway, Route};
use portcullis::serve::Server;
use portcullis_testing::backend::serve;
use tower::service_fn;

#[derive(Clone, Copy, PartialEq)]
enum Health {
    /// Answers after 5 ms.
    Well,
    /// Answers after 100 ms.
    Slow,
    /// Answers 500 at once.
    Fails,
    /// Breaks its answers off in the middle, at once.
    Cuts,
}

/// A policy that has seen nothing yet.
type Make = fn() -> Arc<dyn Pick>;
type Error = Box<dyn std::error::Error + Send + Sync>;
type Frames = StreamBody<futures::stream::Iter<std::vec::IntoIter<Result<Frame<Bytes>, Error>>>>;

const CALLERS: usize = 16;
const TIME: Duration = Duration::from_millis(1500);

async fn answer(health: Health) -> Result<Response<Frames>, Infallible> {
    let wait = match health {
        Health::Well => 5,
        Health::Slow => 100,
        Health::Fails | Health::Cuts => 0,
    };
    tokio::time::sleep(Duration::from_millis(wait)).await;
    let mut frames = vec![Ok(Frame::data(Bytes::from_static(b"half")))];
    frames.push(match health {
        Health::Cuts => Err("cut".into()),
        _ => Ok(Frame::data(Bytes::from_static(b"half"))),
    });
    let mut response = Response::new(StreamBody::new(futures::stream::iter(frames)));
    if health == Health::Fails {
        *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
    }
    Ok(response)
}

/// What the gateway at `url` answers its callers: the part of calls that failed, and the rate of all.
async fn load(url: String) -> String {
    let client: Client<_, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let end = tokio::time::Instant::now() + TIME;
    let caller = |_| {
        let (client, url) = (client.clone(), url.clone());
        tokio::spawn(async move {
            let (mut calls, mut failed) = (0_u32, 0_u32);
            while tokio::time::Instant::now() < end {
                let response = client.request(Request::get(&url).body(Empty::new()).unwrap()).await.unwrap();
                let status = response.status();
                let whole = response.into_body().collect().await.is_ok();
                calls += 1;
                failed += u32::from(!whole || status.is_server_error());
            }
            (calls, failed)
        })
    };
    let (mut calls, mut failed) = (0, 0);
    for caller in futures::future::join_all((0..CALLERS).map(caller)).await {
        let (more, bad) = caller.unwrap();
        (calls, failed) = (calls + more, failed + bad);
    }
    let (calls, failed) = (f64::from(calls), f64::from(failed));
    format!("{:.2} %, {:.0}/s", failed * 100.0 / calls, calls / TIME.as_secs_f64())
}

/// Runs three backends behind a gateway, and says which part of the requests each sick one got.
async fn run(pick: Arc<dyn Pick>, guarded: bool, healths: [Health; 3]) -> String {
    let (mut addresses, mut servers, mut counts) = (Vec::new(), Vec::new(), Vec::new());
    for health in healths {
        let count = Arc::new(AtomicU64::new(0));
        counts.push(count.clone());
        let service = service_fn(move |_| {
            count.fetch_add(1, Ordering::Relaxed);
            answer(health)
        });
        let (address, server) = serve(([127, 0, 0, 1], 0).into(), service).await;
        addresses.push(Address::from(address));
        servers.push(server);
    }
    let (balance, breaker) = (BalanceLayer::new(pick), CircuitBreakLayer::new());
    let repeat = Policy::new().attempts(3).on_statuses([StatusCode::INTERNAL_SERVER_ERROR]);
    let (balance, breaker) = if guarded { (balance.policy(repeat), breaker) } else { (balance, breaker.failures(0)) };
    let gateway = Gateway::builder(FixedRegistry::new().service("orders", addresses))
        .route("/{*rest}", Route::to("orders"))
        .with_balance(balance)
        .with_circuit_break(breaker)
        .build()
        .unwrap();
    let server = Server::bind(([127, 0, 0, 1], 0)).unwrap();
    let url = format!("http://{}/", server.local_addr().unwrap());
    servers.push(tokio::spawn(async move { server.serve(gateway).await.unwrap() }));
    let seen = load(url).await;
    servers.iter().for_each(tokio::task::JoinHandle::abort);
    let counts: Vec<f64> = counts.iter().map(|count| count.load(Ordering::Relaxed) as f64).collect();
    let total: f64 = counts.iter().sum();
    let sick = counts.iter().zip(healths).filter(|(_, health)| *health != Health::Well);
    let shares: Vec<String> = sick.map(|(count, _)| format!("{:.1}", count * 100.0 / total)).collect();
    format!("{} %, {seen}", shares.join(" + "))
}

#[tokio::main]
async fn main() {
    use Health::{Cuts, Fails, Slow, Well};
    let policies: [(&str, Make); 5] = [
        ("round robin", || Arc::new(RoundRobin::new())),
        ("random", || Arc::new(Random)),
        ("least connections", || Arc::new(LeastConnections::new())),
        ("power of two", || Arc::new(PowerOfTwo)),
        ("peak EWMA", || Arc::new(PeakEwma::new())),
    ];
    for (guarded, title) in [(false, "The policy alone"), (true, "With a breaker below, and 500 tried elsewhere")] {
        println!("\n{title}. The share of the sick of three, calls that failed, and answers a second:\n");
        println!("| policy | one 20 times slower | one answers 500 at once | one cuts its bodies | one of each |");
        println!("|---|---|---|---|---|");
        for (name, pick) in policies {
            let mut cells = Vec::new();
            for healths in [[Slow, Well, Well], [Fails, Well, Well], [Cuts, Well, Well], [Slow, Fails, Cuts]] {
                cells.push(run(pick(), guarded, healths).await);
            }
            println!("| {name} | {} |", cells.join(" | "));
        }
    }
}
