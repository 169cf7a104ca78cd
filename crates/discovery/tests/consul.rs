//! A real agent: what it says is seen, what it loses is put back, and its failures empty no pool.
#![cfg(feature = "consul")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod support;

use std::net::SocketAddr;
use std::time::Duration;

use portcullis_core::{Protocol, Scheme};
use portcullis_discovery::consul::RsConsul;
use portcullis_discovery::{
    ConsulConfig, ConsulRegistry, DiscoveryLayer, Health, HealthCheck, Registry, ServiceDefinition,
};
use portcullis_testing::{Backend, Consul};
use serde_json::{Value, json};

use self::support::{Flow, config, definition, own, registry, seen, until};

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
    said.id = own(&said.id).into();
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
    // Long before the wait of a parked watch is over, which is minutes.
    for i in (14..20).rev() {
        consul.put("/v1/agent/service/register", &format!(r#"{{"Name":"s-{i}","ID":"{i}-b","Port":2}}"#)).await;
        until(async || endpoints(i) == 2).await;
    }
}

/// How many connections are open to a port of the loopback interface.
#[cfg(target_os = "linux")]
fn connections(port: u16) -> usize {
    let (table, remote) = (std::fs::read_to_string("/proc/net/tcp").unwrap(), format!("0100007F:{port:04X}"));
    table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|f| f[2] == remote && f[3] == "01")
        .count()
}

#[tokio::test]
async fn more_services_than_an_agent_allows_connections_neither_break_it_nor_starve() {
    const SERVICES: usize = 400;
    let consul = Consul::start().await;
    consul.fill(SERVICES, 2).await;
    let layer = DiscoveryLayer::new(registry(&consul));
    for service in 0..SERVICES {
        layer.follow(&format!("s-{service}"));
    }
    layer.ready().await;
    let endpoints = |service: usize| layer.follow(&format!("s-{service}")).unwrap().len();
    // The agent allows 200; these are the last that came and the first.
    for service in (SERVICES - 5..SERVICES).chain(0..5) {
        assert_eq!(endpoints(service), 2);
        let body = format!(r#"{{"Node":"n-1","ServiceID":"s-{service}-1"}}"#);
        consul.put("/v1/catalog/deregister", &body).await;
        until(async || endpoints(service) == 1).await;
        #[cfg(target_os = "linux")]
        assert!((100..200).contains(&connections(consul.address().port())), "of the agent's 200");
    }
    let failures: u64 = layer.status().iter().map(|status| status.failures).sum();
    assert_eq!(failures, 0);
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
async fn who_gives_up_registering_leaves_nothing_registered() {
    let consul = Consul::start().await;
    let registry = registry(&consul);
    consul.pause();
    let given_up = registry.register(definition("orders", "a", 1));
    assert!(tokio::time::timeout(Duration::from_millis(200), given_up).await.is_err());
    consul.resume();
    // It arrives, and is taken off again.
    tokio::time::sleep(Duration::from_millis(500)).await;
    until(async || consul.get("/v1/agent/services").await.body.trim_ascii() == b"{}").await;
}

#[tokio::test]
async fn a_ttl_is_kept_alive_and_carries_what_is_reported() {
    let consul = Consul::start().await;
    let registry = registry(&consul);
    let layer = DiscoveryLayer::new(registry.clone()).service("orders");
    let check = HealthCheck::ttl(Duration::from_secs(3));
    let registration = registry.register(definition("orders", "a", 1).check(check)).await.unwrap();
    until(async || seen(&layer).await == ["a"]).await;
    for _ in 0..40 {
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
    let flow = Flow::start(&layer);
    consul.pause();
    until(async || layer.status()[0].failing.is_some()).await;
    // `PAUSE=20` for a long one.
    let more = std::env::var("PAUSE").ok().and_then(|pause| pause.parse().ok()).unwrap_or(1);
    tokio::time::sleep(Duration::from_secs(more)).await;
    consul.resume();
    let patience = tokio::time::timeout(Duration::from_secs(45), async {
        while layer.status()[0].failing.is_some() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    patience.await.expect("an answer again");
    flow.end("an agent paused");
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
    let flow = Flow::start(&layer);
    // The policy loses nodes, then everything.
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
    flow.end("a token that lost its rights");
    // The token goes, and the service with it: that is not heard of.
    let flow = Flow::start(&layer);
    let revoked = consul.delete(&format!("/v1/acl/token/{}", text(&token["AccessorID"]))).await;
    assert_eq!(revoked.status, 200, "{}", revoked.text());
    consul.put("/v1/agent/service/deregister/a", "").await;
    until(async || layer.status()[0].failing.as_ref().is_some_and(|(_, error)| error.is_denied())).await;
    assert_eq!(seen(&layer).await, ["a"]);
    flow.end("a token revoked");
}

#[tokio::test]
async fn the_catalog_holds_external_services_names_and_values() {
    let consul = Consul::start().await;
    let catalog = RsConsul::new(config(&consul)).unwrap();
    let layer = DiscoveryLayer::new(catalog.clone()).service("mail");
    let external = ServiceDefinition::new("mail", "m 1", "192.0.2.7:25".parse::<SocketAddr>().unwrap()).tag("old");
    let registration = catalog.register(external.clone()).await.unwrap();
    until(async || seen(&layer).await == ["m 1"]).await;
    let endpoint = layer.status()[0].endpoints.clone().unwrap()[0].clone();
    assert_eq!(
        (endpoint.address().to_string(), endpoint.instance().tags.clone()),
        ("192.0.2.7:25".into(), vec!["old".into()])
    );
    // The agent's own service comes when its server has found the time.
    until(async || catalog.services().await.unwrap() == ["consul", "mail"]).await;
    registration.report(Health::Critical, "gone").await.unwrap();
    until(async || seen(&layer).await.is_empty()).await;
    registration.report(Health::Passing, "").await.unwrap();
    until(async || seen(&layer).await == ["m 1"]).await;
    registration.deregister().await.unwrap();
    until(async || seen(&layer).await.is_empty()).await;
    drop(catalog.register(external).await.unwrap());
    until(async || catalog.services().await.unwrap() == ["consul"]).await;

    consul.put("/v1/kv/a/b%20c", "text").await;
    assert_eq!(catalog.value("a/b c").await.unwrap().as_deref(), Some("text"));
    assert_eq!(catalog.value("a").await.unwrap(), None);
    let shown = format!("{:?}", RsConsul::new(config(&consul).token("s3cret").unwrap()).unwrap());
    assert!(!shown.contains("s3cret"), "{shown}");
}

/// A certificate authority, and what it signed for the agent and for a client, as PEM: chain and key.
fn certificates() -> (String, [(String, String); 2]) {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut authority = rcgen::CertificateParams::new(vec![]).unwrap();
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let signed = authority.self_signed(&key).unwrap();
    let issuer = rcgen::Issuer::new(authority, key);
    let leaf = |name: &str| {
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate =
            rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    };
    (signed.pem(), [leaf("127.0.0.1"), leaf("client")])
}

#[tokio::test]
async fn over_tls_with_certificates_on_both_sides_few_connections_carry_many_watches() {
    let (authority, [server, client]) = certificates();
    let folder = portcullis_testing::process::scratch_folder("tls");
    let port = portcullis_testing::process::free_port();
    let file = |name: &str, text: &str| {
        std::fs::write(folder.join(name), text).unwrap();
        folder.join(name).display().to_string()
    };
    let settings = json!({
        "ports": {"https": port}, "verify_incoming_https": true,
        "ca_file": file("ca.pem", &authority), "cert_file": file("s.pem", &server.0), "key_file": file("s.key", &server.1),
    });
    let consul = Consul::start_with(settings, &["-dev"]).await;
    let tls = ConsulConfig::new(&format!("https://127.0.0.1:{port}")).unwrap();
    let trusting = tls.clone().certificate_authorities(authority.clone());

    let stranger = DiscoveryLayer::new(ConsulRegistry::new(trusting.clone()).unwrap()).service("s-0");
    assert_eq!(seen(&stranger).await, [""; 0]);
    assert!(stranger.status()[0].failing.as_ref().unwrap().1.is_unavailable(), "no certificate, no answer");

    // One connection before HTTP/2 is agreed on; none of a hundred watches is parked after that.
    let known = trusting.client_certificate(client.0, client.1).connections(1);
    let catalog = RsConsul::new(known.clone()).unwrap();
    until(async || catalog.services().await.unwrap() == ["consul"]).await;
    let layer = DiscoveryLayer::new(ConsulRegistry::new(known).unwrap());
    for i in 0..100 {
        consul.put("/v1/agent/service/register", &format!(r#"{{"Name":"s-{i}","ID":"{i}","Port":1}}"#)).await;
        layer.follow(&format!("s-{i}"));
    }
    let seen = || layer.status().iter().filter(|s| s.endpoints.as_ref().is_some_and(|e| e.len() == 1)).count();
    until(async || seen() == 100).await;
    // Parked ones share one; these are spread over eight, beside the catalog's.
    #[cfg(target_os = "linux")]
    assert!((8..=10).contains(&connections(port)), "{}", connections(port));
    consul.put("/v1/agent/service/deregister/99", "").await;
    until(async || seen() == 99).await;
    std::fs::remove_dir_all(folder).unwrap();
    assert!(ConsulRegistry::new(tls.certificate_authorities("nonsense")).unwrap_err().is_invalid());
}

#[tokio::test]
async fn a_cluster_without_a_leader_empties_no_pool() {
    // Started without waiting for a leader, which there cannot be before all three are there.
    let ports: Vec<_> = (0..3).map(|_| portcullis_testing::process::free_port()).collect();
    let join: Vec<_> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
    let settings = |port: u16| {
        json!({
            "server": true, "bootstrap_expect": 3, "retry_join": join.clone(), "retry_interval": "1s",
            "performance": {"raft_multiplier": 1}, "ports": {"serf_lan": port}, "advertise_addr": "127.0.0.1",
        })
    };
    let start = |port: u16| Consul::start_with(settings(port), &[]);
    let (first, mut second, mut third) = tokio::join!(start(ports[0]), start(ports[1]), start(ports[2]));
    first.put("/v1/agent/service/register", r#"{"Name":"orders","ID":"a","Port":1}"#).await;
    let quick = config(&first).wait(Duration::from_secs(2));
    let layer = DiscoveryLayer::new(ConsulRegistry::new(quick).unwrap()).service("orders");
    until(async || seen(&layer).await == ["a"]).await;
    let flow = Flow::start(&layer);
    second.kill();
    third.kill();
    let lost = tokio::time::timeout(Duration::from_secs(60), async {
        while layer.status()[0].failing.is_none() {
            assert_eq!(seen(&layer).await, ["a"]);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    lost.await.expect("the loss of the leader to be noticed");
    for _ in 0..50 {
        assert_eq!(seen(&layer).await, ["a"]);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    second.restart_without_waiting();
    third.restart_without_waiting();
    let healed = tokio::time::timeout(Duration::from_secs(60), async {
        while layer.status()[0].failing.is_some() {
            assert_eq!(seen(&layer).await, ["a"]);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    healed.await.expect("a leader again");
    flow.end("a leader lost and found");
    first.put("/v1/agent/service/deregister/a", "").await;
    until(async || seen(&layer).await.is_empty()).await;
}

#[tokio::test]
async fn a_storm_of_registrations_ends_exactly() {
    let consul = Consul::start().await;
    let layer = DiscoveryLayer::new(registry(&consul)).service("orders");
    consul.put("/v1/agent/service/register", r#"{"Name":"orders","ID":"0","Address":"127.0.0.1","Port":1000}"#).await;
    until(async || seen(&layer).await == ["0"]).await;
    let flow = Flow::start(&layer);
    let consul = &consul;
    let storm = (0..500).map(|i| async move {
        let body = format!(r#"{{"Name":"orders","ID":"{i}","Address":"127.0.0.1","Port":{}}}"#, 1000 + i);
        consul.put("/v1/agent/service/register", &body).await;
        if i % 2 == 1 {
            consul.put(&format!("/v1/agent/service/deregister/{i}"), "").await;
        }
    });
    use futures::StreamExt;
    futures::stream::iter(storm).buffer_unordered(20).collect::<()>().await;
    let mut even: Vec<_> = (0..500).step_by(2).map(|i| i.to_string()).collect();
    even.sort();
    until(async || seen(&layer).await == even).await;
    flow.end("a storm of 500 instances");
    let status = &layer.status()[0];
    assert!(status.answers < 200 && status.failures == 0, "{} answers, {} failures", status.answers, status.failures);
}

#[tokio::test]
async fn a_million_bytes_are_read_and_more_than_allowed_are_a_failure() {
    let consul = Consul::start().await;
    let small = config(&consul).max_body(1_500_000);
    let layer = DiscoveryLayer::new(ConsulRegistry::new(small).unwrap()).service("orders");
    let long = "x".repeat(500);
    let register = async |id: usize| {
        let meta: serde_json::Map<_, _> = (0..50).map(|i| (format!("k{i}"), long.as_str().into())).collect();
        let body = json!({"Name": "orders", "ID": id.to_string(), "Port": 1000 + id, "Meta": meta});
        assert_eq!(consul.put("/v1/agent/service/register", &body.to_string()).await.status, 200);
    };
    for id in 0..40 {
        register(id).await;
    }
    until(async || seen(&layer).await.len() == 40).await;
    let said = consul.get("/v1/health/service/orders?passing").await.body.len();
    assert!((1_000_000..1_500_000).contains(&said), "{said} bytes");
    let flow = Flow::start(&layer);
    for id in 40..70 {
        register(id).await;
    }
    until(async || layer.status()[0].failing.as_ref().is_some_and(|(_, error)| error.is_unavailable())).await;
    let kept = seen(&layer).await.len();
    assert!((40..70).contains(&kept), "{kept}");
    for id in 1..70 {
        consul.put(&format!("/v1/agent/service/deregister/{id}"), "").await;
    }
    until(async || seen(&layer).await == ["0"]).await;
    flow.end("an answer of more bytes than allowed");
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
    let flow = Flow::start(&layer);
    consul.kill();
    until(async || layer.status()[0].failures > failures).await;
    assert_eq!(seen(&layer).await, ["a"]);
    consul.restart().await;
    until(async || layer.status()[0].failing.as_ref().is_some_and(|(_, error)| error.is_reset())).await;
    assert_eq!(seen(&layer).await, ["a"]);
    consul.put("/v1/agent/service/register", r#"{"Name":"orders","ID":"b","Address":"127.0.0.1","Port":2}"#).await;
    until(async || seen(&layer).await == ["b"]).await;
    assert!(layer.status()[0].failing.is_none());
    flow.end("an agent killed and restarted empty");
    consul.put("/v1/agent/service/deregister/b", "").await;
    until(async || seen(&layer).await.is_empty()).await;
}
