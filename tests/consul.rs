//! The whole way with a real Consul agent.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::net::SocketAddr;
use std::time::Duration;

use portcullis::discovery::{ConsulConfig, ConsulRegistry, HealthCheck, Registration, Registry, ServiceDefinition};
use portcullis::gateway::{Gateway, Route};
use portcullis::serve::Server;
use portcullis_testing::{Backend, Consul, client};

fn registry(consul: &Consul) -> ConsulRegistry {
    ConsulRegistry::new(ConsulConfig::new(&consul.url()).unwrap()).unwrap()
}

async fn register(registry: &impl Registry, backend: &Backend) -> Registration {
    let url = format!("http://{}/status/200", backend.address());
    let check = HealthCheck::http(url).interval(Duration::from_secs(1)).timeout(Duration::from_secs(1));
    let definition = ServiceDefinition::new("orders", backend.name(), backend.address()).check(check);
    registry.register(definition).await.unwrap()
}

async fn gateway(registry: ConsulRegistry) -> SocketAddr {
    let gateway = Gateway::builder(registry).route("/{*rest}", Route::to("orders")).build().unwrap();
    gateway.ready().await;
    support::listen(gateway).await
}

/// Asks until the answer is as expected; at most half a minute.
async fn until(gateway: SocketAddr, what: &str, expected: impl Fn(&client::Answer) -> bool) {
    let mut last = None;
    for _ in 0..1500 {
        let answer = client::get(gateway, "/orders", &[]).await.unwrap();
        if expected(&answer) {
            return;
        }
        last = Some(answer);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("not {what}: {last:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn registered_seen_failing_gone_back_deregistered_gone() {
    let consul = Consul::start().await;
    let registry = registry(&consul);
    let backend = Backend::start("a").await;
    let address = backend.address();
    let registration = register(&registry, &backend).await;
    let gateway = gateway(registry).await;
    let served = |answer: &client::Answer| answer.header("x-backend") == "a";
    let gone = |answer: &client::Answer| answer.json()["reason"] == "no-instances";

    until(gateway, "seen after it registered", served).await;
    backend.kill().await;
    until(gateway, "gone after its check failed", gone).await;
    let _back = Backend::start_at("a", address).await;
    until(gateway, "back after its check passed", served).await;
    registration.deregister().await.unwrap();
    until(gateway, "gone after it deregistered", gone).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_stands_still_for_ten_seconds_disturbs_nobody() {
    let consul = Consul::start().await;
    let registry = registry(&consul);
    let backends = support::backends(&["a", "b"]).await;
    let mut registrations = Vec::new();
    for backend in &backends {
        registrations.push(register(&registry, backend).await);
    }
    let gateway = gateway(registry).await;
    until(gateway, "seen", |answer| answer.status == 200).await;

    consul.pause();
    let (start, mut answers) = (tokio::time::Instant::now(), 0);
    while start.elapsed() < Duration::from_secs(10) {
        let answer = client::get(gateway, "/orders", &[]).await.unwrap();
        assert_eq!(answer.status, 200, "after {answers} good answers: {}", answer.text());
        answers += 1;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    consul.resume();
    assert!(answers > 100);
    until(gateway, "served as before", |answer| answer.status == 200).await;
    drop(registrations);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_that_deregisters_before_its_listener_stops_fails_nobody() {
    let consul = Consul::start().await;
    let registry = registry(&consul);
    let stays = Backend::start("stays").await;
    let _kept = register(&registry, &stays).await;
    let server = Server::bind(([127, 0, 0, 1], 0)).unwrap();
    let definition = ServiceDefinition::new("orders", "leaves", server.local_addr().unwrap());
    let registration = registry.register(definition).await.unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let signal = async move {
        let _ = stopped.await;
        registration.deregister().await.unwrap();
    };
    let answer = tower::service_fn(async |_: http::Request<portcullis::serve::Incoming>| {
        let response = http::Response::builder().header("x-backend", "leaves");
        Ok::<_, std::convert::Infallible>(response.body(http_body_util::Full::<bytes::Bytes>::from("x")).unwrap())
    });
    let leaving = tokio::spawn(server.graceful(signal, Duration::from_secs(10)).serve(answer));

    let gateway = gateway(registry).await;
    until(gateway, "served by both", |answer| answer.header("x-backend") == "leaves").await;
    until(gateway, "served by both", |answer| answer.header("x-backend") == "stays").await;
    let callers: Vec<_> = (0..4)
        .map(|_| {
            tokio::spawn(async move {
                let (mut served, mut in_a_row, begun) = (0, 0, tokio::time::Instant::now());
                while in_a_row < 100 {
                    let answer = client::get(gateway, "/orders", &[]).await.unwrap();
                    assert_eq!(answer.status, 200, "after {served}: {}", answer.text());
                    in_a_row = if answer.header("x-backend") == "stays" { in_a_row + 1 } else { 0 };
                    served += 1;
                    assert!(begun.elapsed() < Duration::from_secs(30), "it is still served by the one that left");
                }
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(50)).await;
    stop.send(()).unwrap();
    leaving.await.unwrap().unwrap();
    for caller in callers {
        caller.await.unwrap();
    }
}
