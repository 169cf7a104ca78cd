//! From a change in a real Consul to the first request that respects it, and what many watches take.
//!
//! Prints, for 128 and for 1,000 services of ten instances: the delays of isolated changes, the resident memory the watches
//! added, and the processor time they take while nothing changes. Takes about three minutes; `SERVICES=1000` for one of
//! the two, `CHANGES=20` for fewer.

#![allow(clippy::unwrap_used, missing_docs, reason = "a bench")]

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use portcullis_core::{Carried, Destination, Endpoints};
use portcullis_discovery::{ConsulConfig, ConsulRegistry, DiscoveryLayer};
use portcullis_testing::Consul;
use tower::ServiceExt;
use tower_layer::Layer;

#[tokio::main]
async fn main() {
    // Cargo asks every bench for its tests as well.
    if std::env::args().any(|argument| argument == "--test" || argument == "--list") {
        return;
    }
    let only: Option<usize> = std::env::var("SERVICES").ok().and_then(|services| services.parse().ok());
    let fewer: Option<usize> = std::env::var("CHANGES").ok().and_then(|changes| changes.parse().ok());
    for (services, changes, pause) in [(128, 200, 50), (1_000, 60, 1_200)] {
        if only.is_none_or(|only| only == services) {
            measure(services, fewer.unwrap_or(changes), Duration::from_millis(pause)).await;
        }
    }
}

async fn measure(services: usize, changes: usize, pause: Duration) {
    let consul = Consul::start().await;
    consul.fill(services, 10).await;

    let before = resident();
    let layer = DiscoveryLayer::new(ConsulRegistry::new(ConsulConfig::new(&consul.url()).unwrap()).unwrap());
    for service in 0..services {
        layer.follow(&format!("s-{service}"));
    }
    layer.ready().await;
    let known = || layer.status().iter().map(|status| status.endpoints.as_ref().map_or(0, |e| e.len())).sum::<usize>();
    assert_eq!(known(), services * 10);
    tokio::time::sleep(Duration::from_secs(5)).await;
    println!("{services} services x 10: {} KiB more resident", resident().saturating_sub(before));
    let cpu = processor();
    tokio::time::sleep(Duration::from_secs(10)).await;
    println!("{services} services x 10: {} ms of processor in 10 s without a change", (processor() - cpu) * 10);

    let service = layer.layer(tower::service_fn(async |request: Request<()>| {
        let mut response = Response::new(Empty::<Bytes>::new());
        response.extensions_mut().insert(Endpoints::of(request.extensions()).map_or(0, |endpoints| endpoints.len()));
        Ok::<_, Infallible>(response)
    }));
    let mut delays = Vec::new();
    for change in 0..changes {
        let name = (change * 7919) % services;
        let body = format!(r#"{{"Node":"n-3","ServiceID":"s-{name}-3"}}"#);
        let start = tokio::time::Instant::now();
        assert_eq!(consul.put("/v1/catalog/deregister", &body).await.status, 200);
        loop {
            let mut request = Request::new(());
            Destination::new(format!("s-{name}")).attach(request.extensions_mut());
            let response = service.clone().oneshot(request).await.unwrap();
            if response.extensions().get() == Some(&9_usize) {
                break;
            }
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        delays.push(start.elapsed());
        tokio::time::sleep(pause).await;
        let back = serde_json::Value::from(Vec::from(Consul::member(name, 3))).to_string();
        assert_eq!(consul.put("/v1/txn", &back).await.status, 200);
        tokio::time::sleep(pause).await;
    }
    delays.sort();
    let at = |share: usize| delays[(delays.len() * share / 100).min(delays.len() - 1)];
    println!(
        "{services} services x 10: a change is respected after p50 {:?}, p90 {:?}, p99 {:?}, at most {:?} ({changes} changes)",
        at(50),
        at(90),
        at(99),
        at(100)
    );
}

/// KiB.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// Hundredths of a second.
fn processor() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    stat.split_whitespace().skip(13).take(2).filter_map(|field| field.parse::<u64>().ok()).sum()
}
