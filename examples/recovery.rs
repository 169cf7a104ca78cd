//! Three real backends under a steady load, one that hangs for a while, one that flaps, one that is fine: what callers see,
//! and how soon the breaker lets go of the one that hangs and takes it back.
//!
//! `cargo run --release --example recovery`

#![allow(clippy::unwrap_used, reason = "an example that cannot go on panics")]

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full};
use portcullis::balance::{BalanceLayer, Policy, RoundRobin};
use portcullis::circuit_break::{CircuitBreakLayer, Mode, OpenTime, Share, Window};
use portcullis::core::{Carried, Clock, Endpoints, Instance, Moment};
use portcullis::forward::Forward;
use portcullis_testing::backend::serve;
use tower::{ServiceBuilder, ServiceExt, service_fn};

/// One call every so often, whatever becomes of those before.
const EVERY: Duration = Duration::from_millis(5);
/// How long an endpoint may take to its head.
const PATIENCE: Duration = Duration::from_millis(250);
/// When the first backend hangs.
const HANGS: std::ops::Range<Duration> = Duration::from_secs(3)..Duration::from_secs(9);
const END: Duration = Duration::from_secs(15);

/// A call: when it was made, how long it took, and who answered if that was well.
struct Call {
    made: Duration,
    took: Duration,
    by: Option<HeaderValue>,
}

/// The first hangs for six seconds, the second answers 500 every other second, the third is fine.
async fn answer(backend: usize, since_start: Duration) -> Result<Response<Full<Bytes>>, Infallible> {
    let mut response = Response::new(Full::from("fine"));
    match backend {
        0 if HANGS.contains(&since_start) => std::future::pending().await,
        1 if since_start.as_secs() % 2 == 1 => *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR,
        _ => tokio::time::sleep(Duration::from_millis(2)).await,
    }
    response.headers_mut().insert("x-backend", HeaderValue::from(backend));
    Ok(response)
}

async fn load(mode: Mode, attempts: u8) -> Vec<Call> {
    let clock = Clock::system();
    let start = clock.now();
    let mut instances = Vec::new();
    let mut servers = Vec::new();
    for backend in 0..3_usize {
        let clock = clock.clone();
        let service = service_fn(move |_| answer(backend, clock.now().since(start)));
        let (address, server) = serve(([127, 0, 0, 1], 0).into(), service).await;
        instances.push(Instance::new(backend.to_string(), address));
        servers.push(server);
    }
    let set = Endpoints::none("orders").reconcile(instances, start);
    let window = Window::of_time(Duration::from_secs(2)).unwrap().failure_rate(Share::new(0.5).unwrap());
    let breaker = CircuitBreakLayer::new().window(window).open_for(OpenTime::growing(PATIENCE, Duration::from_secs(2)));
    breaker.handle().set_mode(mode);
    let repeat = [StatusCode::INTERNAL_SERVER_ERROR, StatusCode::GATEWAY_TIMEOUT];
    let policy = Policy::new().attempts(attempts).on_statuses(repeat);
    // One of three that is well is worth more than three of which two are not.
    let balance = BalanceLayer::new(Arc::new(RoundRobin::new())).panic_threshold(30).policy(policy);
    let service =
        ServiceBuilder::new().layer(balance).layer(breaker).service(Forward::new().response_timeout(PATIENCE));

    let mut ticks = tokio::time::interval(EVERY);
    let mut calls = Vec::new();
    while clock.now().since(start) < END {
        ticks.tick().await;
        let (service, set, clock) = (service.clone(), set.clone(), clock.clone());
        calls.push(tokio::spawn(async move { call(service, set, start, &clock).await }));
    }
    let calls = join_all(calls).await.into_iter().map(Result::unwrap).collect();
    servers.iter().for_each(tokio::task::JoinHandle::abort);
    calls
}

async fn call<S, R>(service: S, set: Endpoints, start: Moment, clock: &Clock) -> Call
where
    S: tower::Service<Request<Empty<Bytes>>, Response = Response<R>, Error = Infallible>,
    R: http_body::Body<Data = Bytes>,
{
    let began = clock.now();
    let mut request = Request::get("http://orders/").body(Empty::new()).unwrap();
    set.attach(request.extensions_mut());
    let Ok(response) = service.oneshot(request).await;
    let by = response.headers().get("x-backend").cloned().filter(|_| response.status().is_success());
    let whole = response.into_body().collect().await.is_ok();
    Call { made: began.since(start), took: clock.now().since(began), by: by.filter(|_| whole) }
}

/// From when the first backend was well again to the first call it answered with a quarter of the next twenty.
fn recovered(calls: &[Call]) -> Option<Duration> {
    let after: Vec<_> = calls.iter().filter(|call| call.made >= HANGS.end).collect();
    let answered = |call: &Call| call.by == Some(HeaderValue::from(0));
    let back = after.windows(20).find(|calls| {
        calls.first().is_some_and(|call| answered(call)) && calls.iter().filter(|call| answered(call)).count() >= 5
    })?;
    Some(back.first()?.made - HANGS.end)
}

/// From when it began to hang to the last call that failed before twenty in a row were well.
fn shut_out(calls: &[Call]) -> Option<Duration> {
    let hanging: Vec<_> = calls.iter().filter(|call| HANGS.contains(&call.made)).collect();
    let first = hanging.iter().position(|call| call.took >= PATIENCE)?;
    let quiet = hanging.get(first..)?.windows(20).find(|calls| calls.iter().all(|call| call.took < PATIENCE))?;
    Some(quiet.first()?.made - HANGS.start)
}

#[tokio::main]
async fn main() {
    println!("| stack | calls | client errors | longest decile | left alone after | traffic back after |");
    println!("|---|---|---|---|---|---|");
    for (name, mode, attempts) in [
        ("no breaker", Mode::Disabled, 1),
        ("breaker", Mode::Normal, 1),
        ("no breaker, a second attempt", Mode::Disabled, 2),
        ("breaker, a second attempt", Mode::Normal, 2),
    ] {
        let calls = load(mode, attempts).await;
        let failed = calls.iter().filter(|call| call.by.is_none()).count();
        let mut took: Vec<_> = calls.iter().map(|call| call.took).collect();
        took.sort_unstable();
        let decile = took.get(took.len() * 9 / 10).copied().unwrap_or_default();
        let seconds =
            |time: Option<Duration>| time.map_or("never".to_owned(), |time| format!("{:.2} s", time.as_secs_f64()));
        println!(
            "| {name} | {} | {:.2} % | {:.0} ms | {} | {} |",
            calls.len(),
            failed as f64 * 100.0 / calls.len() as f64,
            decile.as_secs_f64() * 1000.0,
            seconds(shut_out(&calls)),
            seconds(recovered(&calls)),
        );
    }
}
