//! What is elsewhere: registries that the gateway asks or is registered in, and a Redis that gateways share.

mod common;

use std::time::Duration;

use portcullis_testing::client::get;
use portcullis_testing::process::{Nobody, free_port, scratch_folder};
use portcullis_testing::{Backend, Consul, Redis};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::Instant;

use common::{ALL, Program, file, log};

fn embedded() -> String {
    file(&[], &format!("registries.r.kind = \"embedded\"\nservices.a.registry = \"r\"\n{ALL}"))
}

#[tokio::test]
async fn instances_are_registered_at_the_operators_side_and_get_requests_until_they_leave() {
    let (one, two) = (Backend::start("one").await, Backend::start("two").await);
    let program = Program::start(&embedded());
    assert_eq!(program.get("/").await.status, 503, "nobody is registered");
    let order =
        |backend: &Backend| json!({ "service": "a", "id": backend.name(), "address": backend.address().to_string() });
    let answer = program.order("/register", &order(&one)).await;
    assert_eq!((answer.status.as_u16(), answer.text().as_str()), (200, "registered as one\n"));
    let known = |count| {
        move |answer: &portcullis_testing::client::Answer| {
            answer.json()["a"]["endpoints"].as_array().is_some_and(|all| all.len() == count)
        }
    };
    program.until("/endpoints", known(1)).await;
    assert_eq!(program.get("/").await.header("x-backend"), "one");
    // For as long as it comes again; and a reload changes nothing in that.
    let mut short = order(&two);
    short["ttl"] = json!("5s");
    assert_eq!(program.order("/register", &short).await.status, 200);
    program.until("/endpoints", known(2)).await;
    assert_eq!(program.order("/reload", &json!(null)).await.status, 200);
    known(2)(&program.ask("/endpoints").await).then_some(()).expect("the reload kept them");
    program.until("/endpoints", known(1)).await;
    assert_eq!(program.order("/register", &short).await.status, 200, "it comes again");
    program.until("/endpoints", known(2)).await;
    assert_eq!(program.order("/deregister", &json!({ "service": "a", "id": "one" })).await.status, 200);
    let left = program.until("/endpoints", known(1)).await.json();
    assert_eq!(left["a"]["endpoints"][0]["id"], "two");

    for (order, status) in [
        (json!({ "service": "a" }), 400),
        (json!({ "service": "a", "address": "nowhere" }), 400),
        (json!({ "service": "a", "address": "127.0.0.1:1", "weight": "much" }), 400),
        (json!({ "service": "a", "address": "127.0.0.1:1", "ttl": "soon" }), 400),
        (json!({ "service": "a", "address": "127.0.0.1:1", "registry": "s" }), 404),
    ] {
        assert_eq!(program.order("/register", &order).await.status.as_u16(), status, "{order}");
    }
    assert_eq!(program.order("/deregister", &json!({ "service": "a", "id": "one" })).await.status, 404);
}

#[tokio::test]
async fn who_registers_cannot_write_lines_into_the_log() {
    let backend = Backend::start("one").await;
    let more = format!(
        "log.level = \"debug\"\nregistries.r.kind = \"embedded\"\nservices.a = {{ registry = \"r\", breaker = {{ failures = 1 }} }}\n{ALL}"
    );
    let program = Program::start(&file(&[], &more));
    let id = "one\nFORGED all is well";
    let order = json!({ "service": "a", "id": id, "address": backend.address().to_string() });
    assert_eq!(program.order("/register", &order).await.status, 200);
    program.until("/endpoints", |answer| answer.json()["a"]["endpoints"][0]["id"] == id).await;
    assert_eq!(program.get("/status/500").await.status, 500);
    program.until("/endpoints", |answer| answer.json()["a"]["endpoints"][0]["breaker"]["state"] == "open").await;
    // Lines are written beside the requests.
    for layer in ["portcullis_forward", "portcullis_circuit_break"] {
        let of_it = |line: &str| line.contains(layer) && line.contains(r#""one\nFORGED all is well""#);
        program.until("/live", |_| log(&program.folder).lines().any(of_it)).await;
    }
    let log = log(&program.folder);
    assert!(!log.lines().any(|line| line.starts_with("FORGED")), "{log}");
}

#[tokio::test]
async fn a_registry_that_was_absent_is_believed_when_it_comes() {
    let (mut consul, backend) = (Consul::start().await, Backend::start("one").await);
    consul.kill();
    let text = file(
        &[],
        &format!(
            "registries.r = {{ kind = \"consul\", address = \"{}\" }}\nservices.a.registry = \"r\"\n{ALL}",
            consul.url()
        ),
    );
    let program = Program::start(&text);
    assert_eq!(program.ask("/ready").await.text(), "not ready: nothing is known yet of a\n");
    assert_eq!((program.get("/").await.status.as_u16(), program.ask("/live").await.status.as_u16()), (503, 200));
    consul.restart().await;
    let instance = json!({ "Name": "a", "Address": "127.0.0.1", "Port": backend.address().port() });
    assert_eq!(consul.put("/v1/agent/service/register", &instance.to_string()).await.status, 200);
    // Asked again after a while, longer each time.
    let begun = Instant::now();
    while program.get("/").await.status != 200 {
        assert!(begun.elapsed() < Duration::from_secs(60), "{}", log(&program.folder));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(program.ask("/ready").await.text(), "ready\n");
}

#[tokio::test]
async fn a_listener_is_registered_until_it_is_told_to_stop_and_serves_on() {
    let (consul, backend) = (Consul::start().await, Backend::start("one").await);
    let text = file(
        &[("a", &[backend.address()])],
        &format!("registries.r = {{ kind = \"consul\", address = \"{}\" }}\n{ALL}", consul.url()),
    );
    let text = text.replace(
        "{ address = \"127.0.0.1:0\" }\nserver = { ",
        "{ address = \"127.0.0.1:0\", register = { registry = \"r\", service = \"gateway\", tags = [\"edge\"], check = \"1s\" } }\nserver = { drain_delay = \"3s\", ",
    );
    let mut program = Program::start(&text);
    let found = async || consul.get("/v1/health/service/gateway?passing").await.json();
    let mut instances = found().await;
    for _ in 0..500 {
        if !instances[0].is_null() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        instances = found().await;
    }
    assert_eq!(instances[0]["Service"]["Port"], program.gateway.port(), "{instances}");
    assert_eq!(instances[0]["Service"]["Tags"][0], "edge");
    program.signal("TERM");
    let told = Instant::now();
    while !found().await[0].is_null() {
        assert!(told.elapsed() < Duration::from_secs(3), "{}", log(&program.folder));
        assert_eq!(program.get("/").await.status, 200);
    }
    assert_eq!(program.get("/").await.status, 200, "whoever had the address may still come");
    assert_eq!(program.ended().await, Some(0));
}

/// The gateways that a registry knows.
async fn gateways(consul: &Consul) -> usize {
    consul.get("/v1/health/service/gateway?passing").await.json().as_array().map_or(0, Vec::len)
}

/// Waits until a registry knows so many gateways, for less time than a registration takes to come back by itself.
async fn until_known(consul: &Consul, program: &Program, count: usize) {
    let begun = Instant::now();
    while gateways(consul).await != count {
        assert!(begun.elapsed() < Duration::from_secs(5), "{}", log(&program.folder));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn registering(listener: &str, registry: &str) -> String {
    let text = file(&[("a", &[([127, 0, 0, 1], 1).into()])], &format!("{registry}{ALL}"));
    let register = "register = { registry = \"r\", service = \"gateway\" }";
    text.replace("{ address = \"127.0.0.1:0\" }\nserver", &format!("{{ {listener}, {register} }}\nserver"))
}

/// It stayed where it was, and gone there it was nowhere.
#[tokio::test]
async fn a_listener_is_registered_where_the_file_says_it_is() {
    let (one, other) = (Consul::start().await, Consul::start().await);
    let registry = |consul: &Consul, more: &str| {
        format!("registries.r = {{ kind = \"consul\", address = \"{}\"{more} }}\n", consul.url())
    };
    let at = |registry: &str| registering("address = \"127.0.0.1:0\"", registry);
    let program = Program::start(&at(&registry(&one, "")));
    let reload = async |text: &str| {
        program.write(text);
        assert_eq!(program.order("/reload", &json!(null)).await.status, 200);
    };
    until_known(&one, &program, 1).await;
    reload(&at(&registry(&other, ""))).await;
    until_known(&other, &program, 1).await;
    until_known(&one, &program, 0).await;
    // The same agent, whom the old registration tells to forget what the new one told it.
    reload(&at(&registry(&other, ", timeout = \"4s\""))).await;
    let begun = Instant::now();
    while log(&program.folder).matches("deregistered").count() < 2 {
        assert!(begun.elapsed() < Duration::from_secs(5), "{}", log(&program.folder));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    until_known(&other, &program, 1).await;
    let nowhere = "the file has no such registry any more";
    assert!(!log(&program.folder).contains(nowhere));
    reload(&file(&[("a", &[([127, 0, 0, 1], 1).into()])], ALL)).await;
    while !log(&program.folder).contains(nowhere) {
        assert!(begun.elapsed() < Duration::from_secs(10), "{}", log(&program.folder));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(gateways(&other).await, 1);
}

/// The one that goes took off the one that came.
#[tokio::test]
async fn who_takes_over_stays_registered_when_the_one_before_goes() {
    let consul = Consul::start().await;
    let listener = format!("address = \"127.0.0.1:{}\", reuse_port = true", free_port());
    let text =
        registering(&listener, &format!("registries.r = {{ kind = \"consul\", address = \"{}\" }}\n", consul.url()));
    let mut old = Program::start(&text);
    until_known(&consul, &old, 1).await;
    let new = Program::start(&text);
    until_known(&consul, &new, 2).await;
    old.signal("TERM");
    assert_eq!(old.ended().await, Some(0));
    assert_eq!(gateways(&consul).await, 1);
}

/// What registered it late left it there.
#[tokio::test]
async fn who_is_told_to_stop_while_it_registers_is_registered_no_more_at_its_end() {
    let agent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = agent.local_addr().expect("an address");
    let asked = async || {
        let (mut connection, _) = agent.accept().await.expect("a request");
        let mut head = [0; 256];
        let read = connection.read(&mut head).await.expect("a request");
        let line = String::from_utf8_lossy(&head[..read]).lines().next().unwrap_or_default().to_owned();
        (connection, line)
    };
    let answer = async |mut connection: tokio::net::TcpStream| {
        let ok = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        connection.write_all(ok).await.expect("somebody who waits for it");
    };
    let registry = format!("registries.r = {{ kind = \"consul\", address = \"http://{address}\" }}\n");
    let text = registering("address = \"127.0.0.1:0\"", &registry).replace("\"5s\"", "\"1m\"");
    let mut program = Program::start(&text);
    let (registering, line) = asked().await;
    assert!(line.starts_with("PUT /v1/agent/service/register"), "{line}");
    program.signal("TERM");
    program.until("/ready", |answer| answer.text().contains("draining")).await;
    assert_eq!(program.get("/").await.status, 502, "it serves on as long as it may be registered");
    answer(registering).await;
    let (leaving, line) = asked().await;
    assert!(line.starts_with("PUT /v1/agent/service/deregister/"), "{line}");
    answer(leaving).await;
    assert_eq!(program.ended().await, Some(0));
}

#[tokio::test]
async fn the_end_comes_in_time_whoever_does_not_answer() {
    // Takes connections, and answers nothing.
    let mute = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = mute.local_addr().expect("an address");
    let backend = Backend::start("one").await;
    let otlp =
        if cfg!(feature = "otlp") { format!("traces.otlp.endpoint = \"http://{address}\"\n") } else { String::new() };
    let text = file(
        &[("a", &[backend.address()])],
        &format!("registries.r = {{ kind = \"consul\", address = \"http://{address}\" }}\n{otlp}{ALL}"),
    );
    let text = text.replace("drain_timeout = \"5s\"", "drain_timeout = \"2s\"").replace(
        "\"127.0.0.1:0\" }\nserver",
        "\"127.0.0.1:0\", register = { registry = \"r\", service = \"g\" } }\nserver",
    );
    let mut program = Program::start(&text);
    assert_eq!(program.get("/").await.status, 200);
    // A request that does not end either.
    let waiting = tokio::spawn(get(program.gateway, "/", &[("content-length", "5"), ("expect", "100-continue")]));
    program.signal("TERM");
    let told = Instant::now();
    assert_eq!(program.ended().await, Some(0));
    let took = told.elapsed();
    assert!(took < Duration::from_millis(2500), "{took:?}");
    waiting.abort();
}

#[tokio::test]
async fn gateways_that_share_a_redis_share_limits_and_do_as_the_file_says_when_it_is_gone() {
    let (mut redis, backend) = (Redis::start().await, Backend::start("one").await);
    let text = |on_failure: &str| {
        let redis =
            format!("url = \"{}\", deadline = \"2s\", lease = \"0s\", on_failure = \"{on_failure}\"", redis.url());
        let limits = "limits.each = { rate = \"5/h\", key = \"header:x-tenant\" }\n";
        let limiter = format!("limiter = {{ default = [\"each\"], fields = \"always\", redis = {{ {redis} }} }}\n");
        file(&[("a", &[backend.address()])], &format!("{limits}{limiter}{ALL}"))
    };
    let (admits, refuses) = (Program::start(&text("admit")), Program::start(&text("refuse")));
    let mut statuses = Vec::new();
    for turn in 0..7 {
        let answer = if turn % 2 == 0 { &admits } else { &refuses }.with(&[("x-tenant", "acme")]).await;
        statuses.push(answer.status.as_u16());
        assert!(answer.headers.contains_key("ratelimit"), "{:?}", answer.headers);
    }
    assert_eq!(statuses, [200, 200, 200, 200, 200, 429, 429]);
    redis.kill();
    // Of one that is known to have used up its share nobody need be asked.
    assert_eq!(admits.with(&[("x-tenant", "acme")]).await.status, 429);
    assert_eq!(admits.with(&[("x-tenant", "other")]).await.status, 200);
    assert_eq!(refuses.with(&[("x-tenant", "other")]).await.status, 503);
    let metrics = refuses.ask("/metrics").await.text();
    for sample in [
        "questions_total{result=\"ok\"} 3",
        "questions_total{result=\"failed\"} 1",
        "decisions_total{by=\"on_failure\"} 1",
        "up 1",
    ] {
        assert!(metrics.contains(&format!("portcullis_rate_limit_store_{sample}\n")), "{sample}: {metrics}");
    }
}

#[tokio::test]
async fn what_a_registry_said_is_remembered_for_a_start_without_it() {
    let (consul, backend, folder) = (Consul::start().await, Backend::start("one").await, scratch_folder("remember"));
    let instance = json!({ "Name": "a", "Address": "127.0.0.1", "Port": backend.address().port() });
    assert_eq!(consul.put("/v1/agent/service/register", &instance.to_string()).await.status, 200);
    let text = |url: &str| {
        let registry =
            format!("registries.r = {{ kind = \"consul\", address = \"{url}\", remember = \"seen.json\" }}\n");
        file(&[], &format!("{registry}services.a.registry = \"r\"\n{ALL}"))
    };
    let mut program = Program::start_in(folder.clone(), &text(&consul.url()));
    program.until("/ready", |answer| answer.status == 200).await;
    for _ in 0..500 {
        if folder.join("seen.json").exists() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    program.signal("TERM");
    assert_eq!(program.ended().await, Some(0));
    let kept = std::fs::read(folder.join("seen.json")).expect("what was remembered");
    drop(program);
    let folder = scratch_folder("remembered");
    std::fs::write(folder.join("seen.json"), kept).expect("a folder to write in");
    let nobody = Nobody::new();
    let program = Program::start_in(folder, &text(&format!("http://{}", nobody.address())));
    program.until("/ready", |answer| answer.status == 200).await;
    assert_eq!(program.get("/").await.header("x-backend"), "one");
}
