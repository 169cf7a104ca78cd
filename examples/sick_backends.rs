//! Three real backends, one of them sick, under load: what share each balancing policy gives the sick one, and what its
//! callers see.
//!
//! `cargo run --release --example sick_backends`

#![allow(clippy::unwrap_used, reason = "an example that cannot go on panics")]

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Empty, StreamBody};
use portcullis::balance::{BalanceLayer, LeastConnections, PeakEwma, Pick, Policy, PowerOfTwo, Random, RoundRobin};
use portcullis::circuit_break::CircuitBreakLayer;
use portcullis::core::{Carried, Clock, Endpoints, Instance};
use portcullis::forward::Forward;
use portcullis_testing::backend::serve;
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};

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

/// Sixteen callers for a second and a half: the share of the first backend, the part of calls that failed, and their rate.
async fn load<S, R>(service: S, set: Endpoints) -> String
where
    S: Service<Request<Empty<Bytes>>, Response = Response<R>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
    R: http_body::Body<Data = Bytes> + Send,
{
    let end = tokio::time::Instant::now() + Duration::from_millis(1500);
    let caller = |_| {
        let (service, set) = (service.clone(), set.clone());
        tokio::spawn(async move {
            let (mut calls, mut failed) = (0_u32, 0_u32);
            while tokio::time::Instant::now() < end {
                let mut request = Request::get("http://orders/").body(Empty::new()).unwrap();
                set.clone().attach(request.extensions_mut());
                let response = match service.clone().oneshot(request).await {
                    Ok(response) => response,
                    Err(never) => match never {},
                };
                let status = response.status();
                let whole = response.into_body().collect().await.is_ok();
                calls += 1;
                failed += u32::from(!whole || status.is_server_error());
            }
            (calls, failed)
        })
    };
    let (mut calls, mut failed) = (0, 0);
    for caller in futures::future::join_all((0..16).map(caller)).await {
        let (more, bad) = caller.unwrap();
        (calls, failed) = (calls + more, failed + bad);
    }
    let attempts: u64 = set.iter().map(|endpoint| endpoint.requests()).sum();
    let share = set[0].requests() as f64 * 100.0 / attempts as f64;
    format!("{share:.1} %, {:.2} %, {:.0}/s", f64::from(failed) * 100.0 / f64::from(calls), f64::from(calls) / 1.5)
}

fn run(pick: Arc<dyn Pick>, guarded: bool, set: Endpoints) -> BoxFuture<'static, String> {
    let balance = BalanceLayer::new(pick);
    let forward = Forward::new();
    if guarded {
        let repeat = Policy::new().attempts(3).on_statuses([StatusCode::INTERNAL_SERVER_ERROR]);
        let stack =
            ServiceBuilder::new().layer(balance.policy(repeat)).layer(CircuitBreakLayer::new()).service(forward);
        Box::pin(load(stack, set))
    } else {
        Box::pin(load(ServiceBuilder::new().layer(balance).service(forward), set))
    }
}

#[tokio::main]
async fn main() {
    let policies: [(&str, Make); 5] = [
        ("round robin", || Arc::new(RoundRobin::new())),
        ("random", || Arc::new(Random)),
        ("least connections", || Arc::new(LeastConnections::new())),
        ("power of two", || Arc::new(PowerOfTwo)),
        ("peak EWMA", || Arc::new(PeakEwma::new())),
    ];
    for (guarded, title) in [(false, "The policy alone"), (true, "With a breaker below, and 500 tried elsewhere")] {
        println!("\n{title}. The sick one's share of three, calls that failed, and answers a second:\n");
        println!("| policy | 20 times slower | answers 500 at once | cuts its bodies |\n|---|---|---|---|");
        for (name, pick) in policies {
            let mut cells = Vec::new();
            for health in [Health::Slow, Health::Fails, Health::Cuts] {
                let mut instances = Vec::new();
                let mut servers = Vec::new();
                for (id, health) in [("sick", health), ("a", Health::Well), ("b", Health::Well)] {
                    let service = service_fn(move |_| answer(health));
                    let (address, server) = serve(([127, 0, 0, 1], 0).into(), service).await;
                    instances.push(Instance::new(id, address));
                    servers.push(server);
                }
                let set = Endpoints::none("orders").reconcile(instances, Clock::system().now());
                cells.push(run(pick(), guarded, set).await);
                servers.iter().for_each(tokio::task::JoinHandle::abort);
            }
            println!("| {name} | {} |", cells.join(" | "));
        }
    }
}
