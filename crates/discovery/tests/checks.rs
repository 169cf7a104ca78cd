//! What a real agent makes of checks, weights, addresses and the ways of asking.
#![cfg(feature = "consul")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod support;

use std::net::SocketAddr;
use std::time::Duration;

use portcullis_discovery::consul::Consistency;
use portcullis_discovery::{ConsulConfig, ConsulRegistry, DiscoveryLayer, Health, HealthCheck, Registry};
use portcullis_testing::{Backend, Consul};
use serde_json::{Value, json};
use tonic_health::ServingStatus;

use self::support::{config, definition, own, registry, seen, until};

const OFTEN: Duration = Duration::from_millis(100);

/// The states of a service's checks, as the agent tells them.
async fn states(consul: &Consul) -> Vec<String> {
    let checks = consul.get("/v1/health/checks/orders").await.json();
    checks.as_array().unwrap().iter().map(|check| check["Status"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_check_over_http_passes_warns_and_fails() {
    let consul = Consul::start().await;
    let registry = registry(&consul);
    let strict = DiscoveryLayer::new(registry.clone()).service("orders");
    let lenient = ConsulRegistry::new(config(&consul).include_warning(true)).unwrap();
    let lenient = DiscoveryLayer::new(lenient).service("orders");
    let backend = Backend::start("b").await;
    // 429 warns.
    for (status, states_of, passing, warned) in
        [(200, "passing", true, true), (429, "warning", false, true), (500, "critical", false, false)]
    {
        let check = HealthCheck::http(format!("http://{}/status/{status}", backend.address())).interval(OFTEN);
        let check = check.timeout(Duration::from_secs(1)).in_a_row(1, 1);
        let registration = definition("orders", "a", 1).weight(7).warning_weight(3).check(check);
        let registration = registry.register(registration).await.unwrap();
        until(async || states(&consul).await == [states_of]).await;
        until(async || seen(&strict).await.len() == usize::from(passing)).await;
        until(async || seen(&lenient).await.len() == usize::from(warned)).await;
        if warned {
            let weight = if passing { 7 } else { 3 };
            until(async || lenient.follow("orders").unwrap().first().is_some_and(|e| e.weight() == weight)).await;
        }
        registration.deregister().await.unwrap();
        until(async || seen(&lenient).await.is_empty()).await;
    }
}

#[tokio::test]
async fn a_check_over_tcp_sees_a_listener_go() {
    let (consul, backend) = (Consul::start().await, Backend::start("b").await);
    let registry = registry(&consul);
    let layer = DiscoveryLayer::new(registry.clone()).service("orders");
    let check = HealthCheck::tcp(backend.address().to_string()).interval(OFTEN);
    let _kept = registry.register(definition("orders", "a", 1).check(check)).await.unwrap();
    until(async || seen(&layer).await == ["a"]).await;
    backend.kill().await;
    until(async || seen(&layer).await.is_empty()).await;
}

#[tokio::test]
async fn a_check_over_grpc_asks_for_the_service_it_names() {
    let consul = Consul::start().await;
    let registry = registry(&consul);
    let layer = DiscoveryLayer::new(registry.clone()).service("orders");
    let (reporter, health) = tonic_health::server::health_reporter();
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let (address, _server) = portcullis_testing::backend::serve(any, health).await;
    reporter.set_service_status("shop.Orders", ServingStatus::Serving).await;
    let check = HealthCheck::grpc(format!("{address}/shop.Orders")).interval(OFTEN);
    let _kept = registry.register(definition("orders", "a", 1).check(check)).await.unwrap();
    until(async || seen(&layer).await == ["a"]).await;
    reporter.set_service_status("shop.Orders", ServingStatus::NotServing).await;
    until(async || seen(&layer).await.is_empty()).await;
    reporter.set_service_status("shop.Orders", ServingStatus::Serving).await;
    until(async || seen(&layer).await == ["a"]).await;
}

#[tokio::test]
async fn a_check_begins_as_it_is_told() {
    let consul = Consul::start().await;
    let registry = registry(&consul);
    let never = |initial| HealthCheck::tcp("127.0.0.1:1").interval(Duration::from_secs(3600)).initial(initial);
    for (initial, state) in [(Health::Passing, "passing"), (Health::Warning, "warning"), (Health::Critical, "critical")]
    {
        // The first run comes at random within the interval of an hour.
        let registration = registry.register(definition("orders", "a", 1).check(never(initial))).await.unwrap();
        assert_eq!(states(&consul).await, [state]);
        registration.deregister().await.unwrap();
    }
}

/// Each report began the pause before the next comparison anew.
#[tokio::test]
async fn who_reports_all_the_time_is_registered_anew_as_well() {
    let consul = Consul::start().await;
    let registry = ConsulRegistry::new(config(&consul).resync(Duration::from_millis(200))).unwrap();
    let check = HealthCheck::ttl(Duration::from_secs(30)).initial(Health::Passing);
    let registration = registry.register(definition("orders", "a", 1).check(check)).await.unwrap();
    let is_known = async || consul.get("/v1/agent/service/a").await.status == 200;
    // The first comparison comes at once.
    let mut reported = 0;
    until(async || {
        registration.report(Health::Passing, "").await.unwrap();
        reported += 1;
        reported == 10
    })
    .await;
    assert!(is_known().await);
    consul.put("/v1/agent/service/deregister/a", "").await;
    until(async || {
        // It fails for as long as the agent knows nothing of the check.
        let _ = registration.report(Health::Passing, "").await;
        is_known().await
    })
    .await;
}

#[tokio::test]
async fn what_another_registration_of_the_id_took_off_is_back_when_it_is_confirmed() {
    let consul = Consul::start().await;
    let registry = ConsulRegistry::new(config(&consul).resync(Duration::from_secs(3600))).unwrap();
    let old = registry.register(definition("orders", "a", 1)).await.unwrap();
    let new = registry.register(definition("orders", "a", 1)).await.unwrap();
    old.deregister().await.unwrap();
    assert_eq!(consul.get("/v1/agent/service/a").await.status, 404);
    new.confirm().await.unwrap();
    assert_eq!(consul.get("/v1/agent/service/a").await.status, 200);
}

/// The agent's minimum is a minute, looked at every half: `LONG=1` waits for it.
#[tokio::test]
async fn an_instance_critical_for_long_is_forgotten_by_the_agent() {
    let consul = Consul::start().await;
    // Nobody puts it back: the registration is compared once in an hour.
    let config = config(&consul).resync(Duration::from_secs(3600));
    let registry = ConsulRegistry::new(config).unwrap();
    let check = HealthCheck::tcp("127.0.0.1:1").interval(OFTEN).deregister_critical_after(Duration::from_secs(60));
    let _kept = registry.register(definition("orders", "a", 1).check(check)).await.unwrap();
    until(async || states(&consul).await == ["critical"]).await;
    if std::env::var_os("LONG").is_some() {
        let gone = tokio::time::timeout(Duration::from_secs(150), async {
            while !states(&consul).await.is_empty() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        });
        let start = tokio::time::Instant::now();
        gone.await.expect("the agent to forget it");
        println!("forgotten after {:?}", start.elapsed());
        assert!(start.elapsed() > Duration::from_secs(30));
    }
}

#[tokio::test]
async fn tagged_addresses_filters_tags_and_nearness_choose() {
    let consul = Consul::start().await;
    let put = async |id: &str, tags: Value, tagged: Value| {
        let body = json!({"Name": "orders", "ID": id, "Port": 80, "Address": "10.0.0.1", "Tags": tags, "TaggedAddresses": tagged});
        assert_eq!(consul.put("/v1/agent/service/register", &body.to_string()).await.status, 200);
    };
    put("a", json!(["v1", "eu"]), json!({"wan": {"Address": "198.51.100.1", "Port": 8080}})).await;
    put("b", json!(["v2", "eu"]), json!({})).await;
    let first = async |config: ConsulConfig| {
        let mut watch = ConsulRegistry::new(config).unwrap().watch(&"orders".into());
        let found = watch.next().await.unwrap().unwrap();
        let mut found: Vec<_> = found.iter().map(|i| format!("{} {}", own(&i.id), i.address)).collect();
        found.sort();
        found
    };
    let config = || config(&consul);
    let (a, b) = ("a 10.0.0.1:80", "b 10.0.0.1:80");
    assert_eq!(first(config()).await, [a, b]);
    assert_eq!(first(config().tagged_address("wan")).await, ["a 198.51.100.1:8080", b]);
    assert_eq!(first(config().filter("\"v2\" in Service.Tags and Service.Port == 80")).await, [b]);
    assert_eq!(first(config().tag("eu").tag("v1")).await, [a]);
    assert_eq!(first(config().near("_agent").datacenter("dc1")).await, [a, b]);
    let wrong = ConsulRegistry::new(config().filter("no such (language")).unwrap().watch(&"orders".into()).next().await;
    assert!(wrong.unwrap().unwrap_err().is_unavailable());
    let elsewhere = ConsulRegistry::new(config().datacenter("nowhere")).unwrap().watch(&"orders".into()).next().await;
    assert!(elsewhere.unwrap().is_err(), "not none");
}

#[tokio::test]
async fn every_way_of_asking_sees_changes() {
    let consul = Consul::start().await;
    for consistency in [Consistency::Default, Consistency::Consistent, Consistency::Stale, Consistency::Cached] {
        let registry = ConsulRegistry::new(config(&consul).consistency(consistency)).unwrap();
        let layer = DiscoveryLayer::new(registry.clone()).service("orders");
        assert_eq!(seen(&layer).await, [""; 0], "{consistency:?}");
        let registration = registry.register(definition("orders", "a", 1)).await.unwrap();
        until(async || seen(&layer).await == ["a"]).await;
        registration.deregister().await.unwrap();
        until(async || seen(&layer).await.is_empty()).await;
    }
}
