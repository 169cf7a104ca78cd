//! Three backends under load, one hanging, one flapping, one fine: what callers see, and how soon traffic is back.
//!
//! `cargo test -p portcullis-circuit-break --test recovery -- --nocapture` prints the figures. Time is paused and there is no
//! jitter, so they are the same every time. `cargo run --release --example recovery` does the like over sockets.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use portcullis_circuit_break::{CircuitBreakLayer, Mode, OpenTime, Share, Window};
use portcullis_core::{Carried, Clock, Endpoint, Instance, Permit};
use tower::{Layer, ServiceExt};

const S: Duration = Duration::from_secs(1);
const LOAD: u32 = 100;
const HANGS: std::ops::Range<u64> = 10..70;
const END: u64 = 120;

/// What callers saw.
#[derive(Debug, Default)]
struct Seen {
    calls: usize,
    failed: usize,
    /// From when the first backend was well again to when it had its share of the traffic.
    recovered_after: Option<Duration>,
}

/// The first hangs for a minute, the second fails five seconds out of ten, the third is fine.
async fn answer(backend: usize, since_start: Duration) -> Result<Response<Full<Bytes>>, &'static str> {
    match backend {
        0 if HANGS.contains(&since_start.as_secs()) => std::future::pending().await,
        1 if since_start.as_secs() / 5 % 2 == 1 => Ok(Response::builder().status(500).body(Full::default()).unwrap()),
        _ => {
            tokio::time::sleep(Duration::from_millis(5)).await;
            Ok(Response::new(Full::from("fine")))
        }
    }
}

async fn under_load(mode: Mode) -> Seen {
    let window = Window::of_time(10 * S).unwrap().failure_rate(Share::new(0.5).unwrap());
    let layer =
        CircuitBreakLayer::new().window(window).open_for(OpenTime::growing(S, 8 * S).jitter(None)).probe_timeout(2 * S);
    layer.handle().set_mode(mode);
    let clock = Clock::system();
    let start = clock.now();
    let endpoints: Vec<_> = (0..3_u16)
        .map(|n| Endpoint::new("s", Instance::new(n.to_string(), SocketAddr::from(([127, 0, 0, 1], n)))))
        .collect();
    let backends = {
        let clock = clock.clone();
        tower::service_fn(move |request: Request<()>| {
            let backend = Permit::of(request.extensions()).unwrap().endpoint().id().parse().unwrap();
            answer(backend, clock.now().since(start))
        })
    };
    let service = layer.layer(tower::timeout::Timeout::new(backends, S));
    let (next, failed) = (AtomicUsize::new(0), Arc::new(AtomicUsize::new(0)));
    let (mut seen, mut calls, mut well) = (Seen::default(), tokio::task::JoinSet::new(), [0_usize; 2]);
    while clock.now().since(start) < u32::try_from(END).unwrap() * S {
        tokio::time::sleep(S / LOAD).await;
        // A balancer in a line: in turn, whoever's gate admits; all refused, the next regardless.
        let turn = || &endpoints[next.fetch_add(1, Ordering::Relaxed) % 3];
        let permit = (0..3).find_map(|_| turn().permit(|| clock.now()).ok());
        let permit = permit.unwrap_or_else(|| turn().permit_by_force());
        let now = clock.now().since(start);
        if now.as_secs() >= HANGS.end && seen.recovered_after.is_none() {
            // Back in the turn when a hundred calls in a row brought it a quarter of them.
            well = [well[0] + 1, well[1] + usize::from(&**permit.endpoint().id() == "0")];
            if well[0] == 100 {
                let share = std::mem::take(&mut well)[1];
                seen.recovered_after = (share >= 25).then(|| now - Duration::from_secs(HANGS.end));
            }
        }
        let mut request = Request::new(());
        permit.attach(request.extensions_mut());
        seen.calls += 1;
        let (call, failed) = (service.clone().oneshot(request), failed.clone());
        calls.spawn(async move {
            let fine = match call.await {
                Ok(response) => {
                    let is_fine = response.status().is_success();
                    is_fine && response.into_body().collect().await.is_ok()
                }
                Err(_) => false,
            };
            failed.fetch_add(usize::from(!fine), Ordering::Relaxed);
        });
    }
    while calls.join_next().await.is_some() {}
    seen.failed = failed.load(Ordering::Relaxed);
    seen
}

#[tokio::test(start_paused = true)]
async fn callers_see_little_of_a_hanging_and_a_flapping_backend_and_both_come_back() {
    let (without, with) = (under_load(Mode::Disabled).await, under_load(Mode::Normal).await);
    let share = |seen: &Seen| seen.failed as f64 / seen.calls as f64;
    println!("without: {:.2} % of {} calls failed", share(&without) * 100.0, without.calls);
    println!("with:    {:.2} % of {} calls failed", share(&with) * 100.0, with.calls);
    println!("recovered after {:?}", with.recovered_after);
    assert!(share(&without) > 0.25, "{without:?}");
    assert!(share(&with) < 0.03, "{with:?}");
    // The open time has grown to its limit of 8 s while it hung.
    assert!(with.recovered_after.unwrap() <= 10 * S, "{with:?}");
}
