//! A real agent: what it says is seen, what it loses is put back, and its failures empty no pool.
#![cfg(feature = "consul")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use portcullis_core::{Carried, Endpoints, Protocol, Scheme};
use portcullis_discovery::{
    ConsulConfig, ConsulRegistry, DiscoveryLayer, Health, HealthCheck, Registry, ServiceDefinition,
};
use portcullis_testing::{Backend, Consul};
use serde_json::{Value, json};
use tower::{Service, ServiceExt};
use tower_layer::Layer;

fn config(consul: &Consul) -> ConsulConfig {
    ConsulConfig::new(&consul.url()).unwrap()
}

fn registry(consul: &Consul) -> ConsulRegistry {
    ConsulRegistry::new(config(consul)).unwrap()
}

fn at(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// An instance that is well from the start, without a check.
fn definition(service: &str, id: &str, port: u16) -> ServiceDefinition {
    ServiceDefinition::new(service, id, at(port))
}

/// Waits until `what` holds, up to ten seconds.
async fn until(mut what: impl AsyncFnMut() -> bool) {
    let held = tokio::time::timeout(Duration::from_secs(10), async {
        while !what().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    held.await.expect("it to happen within ten seconds");
}

/// Sends a request through the layer and says which endpoints it was given; none if it was refused.
async fn seen(layer: &DiscoveryLayer<impl portcullis_discovery::Name<()> + Clone>) -> Vec<String> {
    let mut service = layer.layer(tower::service_fn(async |request: Request<()>| {
        let mut ids: Vec<_> = Endpoints::of(request.extensions()).unwrap().iter().map(|e| e.id().to_string()).collect();
        ids.sort();
        let mut response = Response::new(Full::<Bytes>::default());
        response.extensions_mut().insert(ids);
        Ok::<_, Infallible>(response)
    }));
    let response = service.ready().await.unwrap().call(Request::new(())).await.unwrap();
    response.extensions().get::<Vec<String>>().cloned().unwrap_or_default()
}

#[tokio::test]
async fn registered_seen_failing_gone_back_deregistered() {
    let (consul, backend) = (Consul::start().await, Backend::start("b").await);
    let (registry, address) = (registry(&consul), backend.address());
    let layer = DiscoveryLayer::new(registry.clone()).service("orders");
    assert_eq!(seen(&layer).await, [""; 0], "nobody yet");
    let check = HealthCheck::http(format!("http://{address}/status/200")).interval(Duration::from_millis(100));
    let definition = ServiceDefinition::new("orders", "o-1", address).check(check);
    let registration = registry.register(definition).await.unwrap();
    until(async || seen(&layer).await == ["o-1"]).await;
    backend.kill().await;
    until(async || seen(&layer).await.is_empty()).await;
    let _backend = Backend::start_at("b", address).await;
    until(async || seen(&layer).await == ["o-1"]).await;
    registration.maintenance(Some("an upgrade, 100 % planned")).await.unwrap();
    until(async || seen(&layer).await.is_empty()).await;
    registration.maintenance(None).await.unwrap();
    until(async || seen(&layer).await == ["o-1"]).await;
    registration.deregister().await.unwrap();
    until(async || seen(&layer).await.is_empty()).await;
    assert_eq!(consul.get("/v1/agent/services").await.body.trim_ascii(), b"{}");
}

#[tokio::test]
async fn everything_a_registration_says_comes_back() {
    let consul = Consul::start().await;
    let registry = registry(&consul);
    let definition = definition("orders", "o-1", 8081)
        .tag("v2")
        .metadata("team", "a b")
        .weight(7)
        .zone("z1")
        .scheme(Scheme::Https)
        .protocol(Protocol::Http2);
    let _kept = registry.register(definition.clone()).await.unwrap();
    let mut watch = registry.watch(&"orders".into());
    let mut said = watch.next().await.unwrap().unwrap().pop().unwrap();
    assert_eq!(said.metadata.remove("zone").as_deref(), Some("z1"));
    said.metadata.retain(|key, _| key == "team");
    assert_eq!(said, definition.instance);
}

#[tokio::test]
async fn parked_watches_see_changes_as_well() {
    let consul = Consul::start().await;
    let registry = ConsulRegistry::new(config(&consul).connections(2)).unwrap();
    let layer = DiscoveryLayer::new(registry);
    for i in 0..20 {
        consul.put("/v1/agent/service/register", &format!(r#"{{"Name":"s-{i}","ID":"{i}-a","Port":1}}"#)).await;
        layer.follow(&format!("s-{i}"));
    }
    layer.ready().await;
    let endpoints = |i: usize| {
        let status = layer.status();
        let service = status.iter().find(|status| *status.service == *format!("s-{i}")).unwrap();
        service.endpoints.as_ref().unwrap().len()
    };
    until(async || (0..20).all(|i| endpoints(i) == 1)).await;
    let mut slowest = Duration::ZERO;
    for i in (14..20).rev() {
        let start = tokio::time::Instant::now();
        consul.put("/v1/agent/service/register", &format!(r#"{{"Name":"s-{i}","ID":"{i}-b","Port":2}}"#)).await;
        until(async || endpoints(i) == 2).await;
        slowest = slowest.max(start.elapsed());
        // Isolated changes, not churn.
        tokio::time::sleep(Duration::from_millis(1100)).await;
    }
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
}

#[tokio::test]
async fn a_dropped_registration_goes_and_a_forgotten_one_comes_back() {
    let consul = Consul::start().await;
    let registry = ConsulRegistry::new(config(&consul).resync(Duration::from_millis(100))).unwrap();
    let layer = DiscoveryLayer::new(registry.clone()).service("orders");
    let registration = registry.register(definition("orders", "a/b ?", 1)).await.unwrap();
    until(async || seen(&layer).await == ["a/b ?"]).await;
    consul.put("/v1/agent/service/deregister/a%2Fb%20%3F", "").await;
    until(async || seen(&layer).await.is_empty()).await;
    until(async || seen(&layer).await == ["a/b ?"]).await;
    drop(registration);
    until(async || seen(&layer).await.is_empty()).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(consul.get("/v1/agent/services").await.body.trim_ascii(), b"{}", "it does not come back");
}

#[tokio::test]
async fn a_ttl_is_kept_alive_and_carries_what_is_reported() {
    let consul = Consul::start().await;
    let registry = registry(&consul);
    let layer = DiscoveryLayer::new(registry.clone()).service("orders");
    let check = HealthCheck::ttl(Duration::from_millis(600));
    let registration = registry.register(definition("orders", "a", 1).check(check)).await.unwrap();
    until(async || seen(&layer).await == ["a"]).await;
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(seen(&layer).await, ["a"], "the heart beats");
    }
    registration.report(Health::Critical, "no disk").await.unwrap();
    until(async || seen(&layer).await.is_empty()).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(seen(&layer).await, [""; 0], "what was reported holds");
    registration.report(Health::Passing, "").await.unwrap();
    until(async || seen(&layer).await == ["a"]).await;
    let unchecked = registry.register(definition("orders", "b", 2)).await.unwrap();
    assert!(unchecked.report(Health::Critical, "").await.unwrap_err().is_invalid());
}

#[tokio::test]
async fn a_paused_agent_empties_no_pool_and_is_noticed() {
    let consul = Consul::start().await;
    let quick = config(&consul).wait(Duration::from_secs(1)).timeout(Duration::from_millis(500));
    let layer = DiscoveryLayer::new(ConsulRegistry::new(quick).unwrap()).service("orders");
    consul.put("/v1/agent/service/register", r#"{"Name":"orders","ID":"a","Port":1}"#).await;
    until(async || seen(&layer).await == ["a"]).await;
    consul.pause();
    until(async || {
        assert_eq!(seen(&layer).await, ["a"]);
        layer.status()[0].failing.is_some()
    })
    .await;
    consul.resume();
    until(async || layer.status()[0].failing.is_none()).await;
    consul.put("/v1/agent/service/deregister/a", "").await;
    until(async || seen(&layer).await.is_empty()).await;
}

#[tokio::test]
async fn a_token_that_may_not_read_is_not_an_empty_service() {
    let settings = json!({"acl": {"enabled": true, "default_policy": "deny", "tokens": {"master": "root"}}});
    let mut consul = Consul::start_with(settings, &["-dev"]).await;
    consul.use_token("root");
    consul.put("/v1/agent/service/register", r#"{"Name":"orders","ID":"a","Port":1}"#).await;
    let policy = |rules: &str| json!({"Name": "reader", "Rules": rules}).to_string();
    let full = r#"service_prefix "" { policy = "read" } node_prefix "" { policy = "read" }"#;
    let made: Value = serde_json::from_slice(&consul.put("/v1/acl/policy", &policy(full)).await.body).unwrap();
    let token = consul.put("/v1/acl/token", r#"{"Policies":[{"Name":"reader"}]}"#).await;
    let token: Value = serde_json::from_slice(&token.body).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();

    let none = DiscoveryLayer::new(registry(&consul)).service("orders");
    assert_eq!(seen(&none).await, [""; 0]);
    assert!(none.status()[0].endpoints.is_none(), "not known, rather than none");
    assert!(none.status()[0].failing.as_ref().unwrap().1.is_denied());

    let reader = ConsulRegistry::new(config(&consul).token(&text(&token["SecretID"])).unwrap()).unwrap();
    let layer = DiscoveryLayer::new(reader).service("orders");
    until(async || seen(&layer).await == ["a"]).await;
    // The policy loses nodes, then everything; the token goes.
    for rules in [r#"service_prefix "" { policy = "read" }"#, ""] {
        consul.put(&format!("/v1/acl/policy/{}", text(&made["ID"])), &policy(rules)).await;
        consul.put("/v1/agent/service/register", r#"{"Name":"orders","ID":"a","Port":1,"Tags":["x"]}"#).await;
        until(async || layer.status()[0].failing.as_ref().is_some_and(|(_, error)| error.is_denied())).await;
        assert_eq!(seen(&layer).await, ["a"]);
    }
    consul.put(&format!("/v1/acl/policy/{}", text(&made["ID"])), &policy(full)).await;
    let patience = tokio::time::timeout(Duration::from_secs(45), async {
        while layer.status()[0].failing.is_some() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    patience.await.unwrap();
    consul.put("/v1/agent/service/deregister/a", "").await;
    until(async || seen(&layer).await.is_empty()).await;
}

#[tokio::test]
async fn a_killed_agent_that_comes_back_empty_empties_no_pool() {
    let mut consul = Consul::start().await;
    let registry = registry(&consul);
    let layer = DiscoveryLayer::new(registry.clone()).service("orders");
    // Registered by others: nobody puts it back.
    consul.put("/v1/agent/service/register", r#"{"Name":"orders","ID":"a","Address":"127.0.0.1","Port":1}"#).await;
    until(async || seen(&layer).await == ["a"]).await;
    let failures = layer.status()[0].failures;
    consul.kill();
    until(async || layer.status()[0].failures > failures).await;
    assert_eq!(seen(&layer).await, ["a"]);
    consul.restart().await;
    until(async || layer.status()[0].failing.as_ref().is_some_and(|(_, error)| error.is_reset())).await;
    assert_eq!(seen(&layer).await, ["a"]);
    consul.put("/v1/agent/service/register", r#"{"Name":"orders","ID":"b","Address":"127.0.0.1","Port":2}"#).await;
    until(async || seen(&layer).await == ["b"]).await;
    assert!(layer.status()[0].failing.is_none());
    consul.put("/v1/agent/service/deregister/b", "").await;
    until(async || seen(&layer).await.is_empty()).await;
}
