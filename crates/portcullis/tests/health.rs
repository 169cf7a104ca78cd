//! Checks of real endpoints, and what they do to requests.

use std::num::NonZeroU32;
use std::time::Duration;

use portcullis::core::{Address, Endpoint};
use portcullis::discovery::{DiscoveryLayer, FixedRegistry};
use portcullis::forward::Forward;
use portcullis::health::{Checker, HealthCheck};
use portcullis_testing::Backend;
use portcullis_testing::backend::serve;
use tonic_health::ServingStatus;

const OFTEN: Duration = Duration::from_millis(5);

/// Waits until the checks say so, ten seconds at most.
async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if is_so() {
            return;
        }
        tokio::time::sleep(OFTEN).await;
    }
    panic!("{what}: not after ten seconds");
}

async fn check(check: HealthCheck, address: Address) -> (Checker, Endpoint) {
    let discovery = DiscoveryLayer::new(FixedRegistry::new().service("s", [address]));
    discovery.follow("s");
    discovery.ready().await;
    let Some(endpoint) = discovery.follow("s").and_then(|endpoints| endpoints.first().cloned()) else {
        panic!("a fixed registry answers at once")
    };
    let two = NonZeroU32::MIN.saturating_add(1);
    let checker = check.interval(OFTEN).unhealthy_after(two).healthy_after(two).start(discovery, "s", Forward::new());
    (checker, endpoint)
}

#[tokio::test]
async fn an_endpoint_that_dies_is_sick_and_well_again_when_it_comes_back() {
    let backend = Backend::start("a").await;
    let address = backend.address();
    let (checker, endpoint) = check(HealthCheck::http("/"), address.into()).await;
    until("asked", || checker.health(&endpoint).is_some_and(|health| health.checks > 2)).await;
    assert!(checker.health(&endpoint).unwrap().is_well && endpoint.gate().admits());
    backend.kill().await;
    until("sick", || checker.health(&endpoint).is_some_and(|health| !health.is_well)).await;
    until("closed", || !endpoint.gate().admits()).await;
    let _back = Backend::start_at("a", address).await;
    until("well", || checker.health(&endpoint).is_some_and(|health| health.is_well)).await;
    until("open", || endpoint.gate().admits()).await;
}

#[tokio::test]
async fn a_bad_status_is_a_bad_answer_and_a_connection_is_a_good_one() {
    let backend = Backend::start("a").await;
    let (http, endpoint) = check(HealthCheck::http("/status/503"), backend.address().into()).await;
    until("sick", || http.health(&endpoint).is_some_and(|health| !health.is_well)).await;
    assert_eq!(http.health(&endpoint).unwrap().problem.as_deref(), Some("it answered 503"));
    drop(http);
    assert!(endpoint.gate().admits(), "what a checker closed opens when it goes");
    let (tcp, endpoint) = check(HealthCheck::tcp(), backend.address().into()).await;
    until("asked", || tcp.health(&endpoint).is_some_and(|health| health.checks > 3)).await;
    assert!(tcp.health(&endpoint).unwrap().is_well);
    assert_eq!(tcp.health(&endpoint).unwrap().failures, 0);
}

#[tokio::test]
async fn what_answers_no_grpc_is_not_serving() {
    let backend = Backend::start("a").await;
    let (grpc, endpoint) = check(HealthCheck::grpc(""), backend.address().into()).await;
    until("sick", || grpc.health(&endpoint).is_some_and(|health| !health.is_well)).await;
    // This path of the backend sends back what it gets, with HTTP/2: a frame, and no status.
    assert!(grpc.health(&endpoint).unwrap().problem.unwrap().contains("status"));
}

#[tokio::test]
async fn a_grpc_server_is_as_well_as_it_says_of_the_service_that_is_asked_for() {
    let (reporter, service) = tonic_health::server::health_reporter();
    let (address, server) = serve(([127, 0, 0, 1], 0).into(), service).await;
    reporter.set_service_status("shop.v1.Orders", ServingStatus::NotServing).await;
    let (whole, endpoint) = check(HealthCheck::grpc(""), address.into()).await;
    until("asked", || whole.health(&endpoint).is_some_and(|health| health.checks > 3)).await;
    let health = whole.health(&endpoint).unwrap();
    assert!(health.is_well && health.failures == 0, "{health:?}");

    let (orders, endpoint) = check(HealthCheck::grpc("shop.v1.Orders"), address.into()).await;
    until("sick", || orders.health(&endpoint).is_some_and(|health| !health.is_well)).await;
    assert_eq!(orders.health(&endpoint).unwrap().problem.as_deref(), Some("it says that it is not serving"));
    assert!(!endpoint.gate().admits());
    reporter.set_service_status("shop.v1.Orders", ServingStatus::Serving).await;
    until("well", || orders.health(&endpoint).is_some_and(|health| health.is_well)).await;
    until("open", || endpoint.gate().admits()).await;

    let (other, endpoint) = check(HealthCheck::grpc("shop.v1.Unknown"), address.into()).await;
    until("sick", || other.health(&endpoint).is_some_and(|health| !health.is_well)).await;
    let problem = other.health(&endpoint).unwrap().problem.unwrap();
    assert_eq!(problem, "it answered with status 5", "NOT_FOUND");
    server.abort();
}

#[tokio::test]
async fn what_takes_too_long_is_a_bad_answer() {
    // Connections are taken by the system, and nobody answers.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap();
    let (http, endpoint) = check(HealthCheck::http("/").timeout(OFTEN), address.into()).await;
    until("sick", || http.health(&endpoint).is_some_and(|health| !health.is_well)).await;
    let (tcp, endpoint) = check(HealthCheck::tcp(), address.into()).await;
    until("asked", || tcp.health(&endpoint).is_some_and(|health| health.checks > 2)).await;
    assert!(tcp.health(&endpoint).unwrap().is_well, "it can be connected to");
    drop(silent);
    until("sick", || tcp.health(&endpoint).is_some_and(|health| !health.is_well)).await;
}
