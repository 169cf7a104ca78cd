//! The program itself: started, asked, reloaded, and told to stop.
#![expect(clippy::expect_used, reason = "what helps the tests fails with them")]

mod common;

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http::Method;
use portcullis_testing::Backend;
use portcullis_testing::client::{get, request};
use portcullis_testing::process::{Nobody, free_port, scratch_folder};
use serde_json::json;

use common::{ALL, Program, file, log, program};

#[tokio::test]
async fn it_serves_shows_itself_and_ends_with_zero() {
    let backend = Backend::start("one").await;
    let mut program = Program::start(&file(&[("a", &[backend.address()])], ALL));
    assert_eq!(program.get("/x").await.header("x-backend"), "one");
    assert_eq!(program.ask("/live").await.text(), "live\n");
    assert_eq!(program.ask("/ready").await.text(), "ready\n");
    let metrics = program.ask("/metrics").await.text();
    assert!(metrics.contains("http_server_request_duration_seconds_count{http_request_method=\"GET\",http_response_status_code=\"200\",http_route=\"/{*rest}\""), "{metrics}");
    assert!(metrics.contains("portcullis_service_endpoints{service=\"a\",state=\"admitting\"} 1"), "{metrics}");
    assert!(!metrics.contains("/x\""), "no path becomes a label");
    let endpoints = program.ask("/endpoints").await.json();
    assert_eq!(endpoints["a"]["endpoints"][0]["requests"], 1);
    assert_eq!(program.ask("/config").await.json()["services"]["a"]["retry"]["attempts"], 2);
    let page = program.ask("/").await;
    assert!(
        page.text().contains("<title>Portcullis</title>")
            && page.header("content-security-policy").contains("default-src 'none'")
    );
    assert_eq!(program.ask("/nothing").await.status, 404);
    program.signal("TERM");
    assert_eq!(program.ended().await, Some(0));
    assert!(log(&program.folder).contains("drained"));
}

#[tokio::test]
async fn the_access_log_says_what_happened_and_never_the_query() {
    let backend = Backend::start("one").await;
    let mut program = Program::start(&file(&[("a", &[backend.address()])], &format!("log.format = \"json\"\n{ALL}")));
    program.get("/x?token=secret").await;
    program.signal("TERM");
    assert_eq!(program.ended().await, Some(0));
    let log = log(&program.folder);
    let line = log.lines().find(|line| line.contains("\"path\":\"/x\"")).unwrap_or_else(|| panic!("{log}"));
    let line: serde_json::Value = serde_json::from_str(line).expect("a line of JSON");
    assert_eq!((&line["status"], &line["service"], &line["attempts"]), (&json!(200), &json!("a"), &json!(1)));
    assert!(line["trace"].as_str().is_some_and(|trace| trace.len() == 32), "{line}");
    assert!(!log.contains("secret"));
}

#[tokio::test]
async fn requests_under_way_are_finished_and_a_second_signal_ends_it_at_once() {
    // A backend that answers when it is told to.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let slow = listener.local_addr().unwrap();
    let mut program = Program::start(&file(&[("a", &[slow])], ALL));
    let waiting = tokio::spawn(get(program.gateway, "/", &[]));
    let (mut stream, _) = listener.accept().await.unwrap();
    // An answer before the request would be none.
    let mut asked = Vec::new();
    while !asked.ends_with(b"\r\n\r\n") {
        tokio::io::AsyncReadExt::read_buf(&mut stream, &mut asked).await.unwrap();
    }
    program.signal("TERM");
    for _ in 0..500 {
        if get(program.admin, "/ready", &[]).await.is_ok_and(|answer| answer.text() == "not ready: draining\n") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::io::AsyncWriteExt::write_all(&mut stream, b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone")
        .await
        .unwrap();
    let answer = waiting.await.unwrap().unwrap_or_else(|error| panic!("{error}: {}", log(&program.folder)));
    assert_eq!(answer.text(), "done");
    assert_eq!(program.ended().await, Some(0));

    let mut program = Program::start(&file(&[("a", &[slow])], ALL));
    let waiting = tokio::spawn(get(program.gateway, "/", &[]));
    let _stream = listener.accept().await.unwrap();
    program.signal("INT");
    while program.ask("/ready").await.status == 200 {}
    program.signal("INT");
    assert_eq!(program.ended().await, Some(1));
    assert!(waiting.await.unwrap().is_err());
}

/// The signal of whoever waits for the end after `POST /drain` counted as a second one, and cut requests off.
#[tokio::test]
async fn a_signal_after_an_order_to_drain_cuts_nothing_off() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut program = Program::start(&file(&[("a", &[listener.local_addr().unwrap()])], ALL));
    let waiting = tokio::spawn(get(program.gateway, "/", &[]));
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut asked = Vec::new();
    while !asked.ends_with(b"\r\n\r\n") {
        tokio::io::AsyncReadExt::read_buf(&mut stream, &mut asked).await.unwrap();
    }
    assert_eq!(program.order("/drain", &json!(null)).await.status, 202);
    program.signal("TERM");
    while !log(&program.folder).contains("told to stop") {
        tokio::task::yield_now().await;
    }
    tokio::io::AsyncWriteExt::write_all(&mut stream, b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone")
        .await
        .unwrap();
    assert_eq!(waiting.await.unwrap().unwrap_or_else(|error| panic!("{error}")).text(), "done");
    assert_eq!(program.ended().await, Some(0));
}

/// An endpoint was let go of and stayed held, since the service was; and the other way round.
#[tokio::test]
async fn what_is_let_go_of_is_not_held() {
    let (one, two) = (Backend::start("one").await, Backend::start("two").await);
    let program = Program::start(&file(&[("a", &[one.address(), two.address()])], ALL));
    let all = |state: &str| json!({ "service": "a", "state": state });
    let single = |state: &str| json!({ "service": "a", "endpoint": one.address().to_string(), "state": state });
    let statuses = async || {
        let mut served = std::collections::BTreeSet::new();
        for _ in 0..12 {
            let answer = program.get("/").await;
            served.insert(format!("{} {}", answer.status.as_u16(), answer.header("x-backend")));
        }
        served.into_iter().collect::<Vec<_>>()
    };
    for (order, expected) in [
        (all("open"), &["503 "][..]),
        (single("auto"), &["200 one"]),
        (all("auto"), &["200 one", "200 two"]),
        (single("open"), &["200 two"]),
        (all("auto"), &["200 one", "200 two"]),
    ] {
        assert_eq!(program.order("/breaker", &order).await.text(), "done\n");
        assert_eq!(statuses().await, expected, "{order}");
    }
}

#[tokio::test]
async fn a_restart_that_overlaps_loses_nothing() {
    let backend = Backend::start("one").await;
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let text = file(&[("a", &[backend.address()])], ALL).replace(
        "address = \"127.0.0.1:0\" }\nserver",
        &format!("address = \"{address}\", reuse_port = true }}\nserver"),
    );
    // The operators' side is at a place of its own, as by default, which the new process has when the old one has gone.
    let operators = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let text = text.replace("admin = { address = \"127.0.0.1:0\"", &format!("admin = {{ address = \"{operators}\""));
    let mut old = Program::start(&text);
    let over = Arc::new(AtomicBool::new(false));
    let client = tokio::spawn({
        let over = over.clone();
        async move {
            let mut sent = 0;
            while !over.load(Ordering::Relaxed) {
                let answer = get(address, "/", &[]).await.unwrap_or_else(|error| panic!("lost after {sent}: {error}"));
                assert_eq!(answer.status, 200);
                sent += 1;
            }
            sent
        }
    });
    let new = Program::start(&text);
    old.signal("TERM");
    assert_eq!(old.ended().await, Some(0));
    assert_eq!(new.get("/").await.status, 200);
    over.store(true, Ordering::Relaxed);
    assert!(client.await.unwrap() > 0);
    let waited = tokio::time::timeout(Duration::from_secs(20), async {
        while get(operators, "/ready", &[]).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    waited.await.unwrap();
}

#[tokio::test]
async fn operators_force_breakers_and_change_the_log_only_where_the_file_lets_them() {
    let (one, two) = (Backend::start("one").await, Backend::start("two").await);
    let program = Program::start(&file(&[("a", &[one.address(), two.address()])], ALL));
    let force = |state: &str| json!({ "service": "a", "endpoint": one.address().to_string(), "state": state });
    assert_eq!(program.order("/breaker", &force("open")).await.text(), "done\n");
    for _ in 0..10 {
        assert_eq!(program.get("/").await.header("x-backend"), "two");
    }
    assert_eq!(program.ask("/endpoints").await.json()["a"]["endpoints"][0]["breaker"]["forced"], "open");
    assert_eq!(program.order("/breaker", &force("auto")).await.text(), "done\n");
    assert_eq!(program.order("/breaker", &force("ajar")).await.status, 400);
    assert_eq!(
        program.order("/breaker", &json!({ "service": "b", "endpoint": "", "state": "open" })).await.status,
        404
    );
    assert_eq!(program.order("/log", &json!({ "level": "debug" })).await.status, 200);
    assert_eq!(program.order("/log", &json!({ "level": "lots" })).await.status, 400);
    let foreign =
        request(program.admin, Method::POST, "/drain", &[("origin", "http://evil.example")], "").await.unwrap();
    assert_eq!(foreign.status, 403, "a page from elsewhere");
    let rebound = get(program.admin, "http://evil.example/config", &[]).await.unwrap();
    assert_eq!(rebound.status, 403, "a name that points here");

    let more = format!("admin = {{ address = \"127.0.0.1:0\" }}\n{ALL}");
    let reading = Program::start(&file(&[("a", &[one.address()])], &more));
    assert_eq!(reading.order("/drain", &json!(null)).await.status, 403);
    assert_eq!(reading.ask("/ready").await.status, 200);

    let more = format!("admin = {{ address = \"127.0.0.1:0\", writable = true, token = \"xyzzy\" }}\n{ALL}");
    let mut guarded = Program::start(&file(&[("a", &[one.address()])], &more));
    assert_eq!(guarded.order("/drain", &json!(null)).await.status, 401);
    let admin = guarded.admin;
    let drain = async |token| request(admin, Method::POST, "/drain", &[("authorization", token)], "").await;
    assert_eq!(drain("Bearer plugh").await.unwrap().status, 401);
    assert_eq!(drain("Bearer xyzzy").await.unwrap().status, 202);
    assert_eq!(guarded.ended().await, Some(0));
}

#[tokio::test]
async fn checks_keep_requests_from_what_is_sick() {
    let (one, two) = (Backend::start("one").await, Backend::start("two").await);
    let text = file(&[("a", &[one.address(), two.address()])], ALL)
        .replace("breaker = { failures = 3 }", "health = { interval = \"10ms\", unhealthy = 1 }, breaker = { enabled = false }, balance = { panic_threshold = 0 }");
    let program = Program::start(&text);
    one.kill().await;
    for _ in 0..1000 {
        if program.ask("/endpoints").await.json()["a"]["endpoints"][0]["health"]["well"] == false {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for _ in 0..10 {
        assert_eq!(program.get("/").await.header("x-backend"), "two");
    }
    assert_eq!(program.ask("/endpoints").await.json()["a"]["endpoints"][0]["retried"], 0);
}

#[tokio::test]
async fn a_registry_that_is_not_there_is_waited_for() {
    let nobody = Nobody::new();
    let mut text = file(&[], "[[routes]]\npath = \"/{*rest}\"\nto = \"a\"\n[services.a]\nregistry = \"r\"\n");
    text.push_str(&format!("[registries.r]\nkind = \"consul\"\naddress = \"http://{}\"\n", nobody.address()));
    let mut program = Program::start(&text);
    let ready = program.ask("/ready").await;
    assert_eq!((ready.status.as_u16(), ready.text().as_str()), (503, "not ready: nothing is known yet of a\n"));
    assert_eq!(program.ask("/live").await.status, 200);
    assert_eq!(program.get("/").await.status, 503);
    program.signal("TERM");
    assert_eq!(program.ended().await, Some(0));
}

fn said(mut command: Command) -> (Option<i32>, String) {
    let output = command.output().expect("the program");
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&text).into_owned())
}

#[tokio::test]
async fn what_cannot_be_is_said_and_nothing_is_half_started() {
    let folder = scratch_folder("wrong");
    let write = |text: &str| {
        let path = folder.join("gateway.toml");
        std::fs::write(&path, text).expect("a folder to write in");
        path
    };
    let run = |text: &str| {
        let mut command = program(&["run", "--config"]);
        command.arg(write(text));
        said(command)
    };
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let sound = file(&[("a", &[address])], ALL);
    let (code, text) = run(&sound.replacen("127.0.0.1:0", &address.to_string(), 1));
    assert_eq!(code, Some(1));
    assert!(
        text.contains(&format!("cannot listen at {address}")) && text.contains("another program listens there"),
        "{text}"
    );
    let (code, text) =
        run(&sound.replace("admin = { address = \"127.0.0.1:0\"", &format!("admin = {{ address = \"{address}\"")));
    assert_eq!((code, text.contains("listening")), (Some(1), false), "{text}");
    assert_eq!(run("").0, Some(2));
    let (code, text) = run(&format!("# {}\n", "x".repeat(5 << 20)));
    assert_eq!(code, Some(2));
    assert!(text.contains("too many"), "{text}");
    let mut absent = program(&["run", "--config"]);
    absent.arg(folder.join("absent"));
    assert_eq!(said(absent).0, Some(2));

    let check = |text: &str| {
        let mut command = program(&["check", "--config"]);
        command.arg(write(text));
        said(command)
    };
    let (code, text) = check(&sound);
    assert!(code == Some(0) && text.contains("is right: 1 service, 1 route"), "{text}");
    let (code, text) = check(&format!("{sound}{ALL}"));
    assert!(code == Some(2) && text.contains("two routes for \"/{*rest}\""), "{text}");
    let (code, text) = check("colour = 1\n[[routes]]\nto = \"x\"\n");
    assert!(code == Some(2) && text.contains("gateway.toml:1:1: unknown key \"colour\""), "{text}");
    let (code, text) = said(program(&["schema"]));
    assert_eq!(code, Some(0));
    let schema: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(schema["properties"]["routes"]["anyOf"][0]["items"]["properties"]["path"]["type"], "string");
    let _ = std::fs::remove_dir_all(&folder);
}

#[tokio::test]
async fn tokens_it_makes_are_tokens_it_takes() {
    let backend = Backend::start("one").await;
    let more = format!(
        "auth.providers.p = {{ secret = \"a secret that is long enough for HS256, by far\", issuer = \"i\", audiences = [\"x\", \"y\"] }}\n{ALL}auth = {{ scopes = [\"read\"] }}\n"
    );
    let running = Program::start(&file(&[("a", &[backend.address()])], &more));
    let token = |arguments: &[&str]| {
        let mut command = program(&["token", "--config"]);
        command.arg(running.folder.join("gateway.toml")).args(arguments);
        let (code, text) = said(command);
        assert_eq!(code, Some(0), "{text}");
        format!("Bearer {}", text.trim())
    };
    let ask = async |token: &str| get(running.gateway, "/", &[("authorization", token)]).await.unwrap().status.as_u16();
    assert_eq!(running.get("/").await.status, 401);
    assert_eq!(ask(&token(&["--scope", "read"])).await, 200);
    assert_eq!(ask(&token(&[])).await, 403);
    assert_eq!(ask(&token(&["--scope", "read", "--issuer", "other"])).await, 401);
    assert_eq!(said(program(&["token"])).0, Some(2));
}

#[tokio::test]
async fn the_demo_runs_with_nothing_installed() {
    let mut child = program(&["demo"]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("the program");
    let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let mut shown = Vec::new();
    for line in lines.by_ref() {
        shown.push(line.expect("text"));
        if shown.last().is_some_and(|line| line.contains("drains and stops")) {
            break;
        }
    }
    let find =
        |what: &str| shown.iter().find_map(|line| line.split_once(what)).unwrap_or_else(|| panic!("{shown:?}")).1;
    let gateway: SocketAddr = find("listening at http://").split(' ').next().unwrap().parse().unwrap();
    let token = find("authorization: ").split('\'').next().unwrap();
    let answer = get(gateway, "/orders/7", &[("authorization", token)]).await.unwrap();
    assert!(answer.status == 200 && answer.text().contains("answers GET /orders/7"), "{answer:?}");
    assert_eq!(get(gateway, "/orders/7", &[]).await.unwrap().status, 401);
    let stopped = Command::new("kill").arg("-TERM").arg(child.id().to_string()).status();
    assert!(stopped.is_ok_and(|status| status.success()));
    assert_eq!(child.wait().expect("an end").code(), Some(0));
}
