//! What another file does to what runs, and what it leaves as it is.
#![expect(clippy::expect_used, reason = "what helps the tests fails with them")]

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use portcullis_testing::client::get;
use portcullis_testing::process::Nobody;
use portcullis_testing::{Backend, Consul};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use common::{ALL, Program, file, log};

/// Reads the head of a request; `false` when the connection ended instead.
async fn head(stream: &mut TcpStream) -> bool {
    let mut read = Vec::new();
    while !read.ends_with(b"\r\n\r\n") {
        if stream.read_buf(&mut read).await.is_ok_and(|count| count > 0) {
            continue;
        }
        return false;
    }
    true
}

/// A backend that gives one answer to all, and counts connections.
async fn answering(answer: &'static [u8]) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let (address, accepted) = (listener.local_addr().expect("an address"), Arc::<AtomicUsize>::default());
    let count = accepted.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::Relaxed);
            tokio::spawn(async move { while head(&mut stream).await && stream.write_all(answer).await.is_ok() {} });
        }
    });
    (address, accepted)
}

const WELL: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
const BUSY: &[u8] = b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 300\r\ncontent-length: 0\r\n\r\n";

const MORE: &str = "[[routes]]\npath = \"/more\"\nrespond = { body = \"more\" }\n";

async fn reload(program: &Program, text: &str) {
    program.write(text);
    assert_eq!(program.order("/reload", &json!(null)).await.text(), "the file is in force\n");
}

#[tokio::test]
async fn breakers_of_what_did_not_change_stay_as_they_are() {
    let (one, two) = (Backend::start("one").await, Backend::start("two").await);
    let routes = "[[routes]]\npath = \"/a\"\nto = \"a\"\n[[routes]]\npath = \"/b\"\nto = \"b\"\n";
    let text = file(&[("a", &[one.address()]), ("b", &[two.address()])], routes);
    let program = Program::start(&text);
    two.kill().await;
    while program.get("/b").await.status != 503 {}
    assert_eq!(program.order("/breaker", &json!({ "service": "a", "state": "open" })).await.status, 200);
    let breakers = async || {
        let breaker = program.ask("/endpoints").await.json()["b"]["endpoints"][0]["breaker"].clone();
        (breaker["state"].clone(), breaker["refused"].clone(), program.get("/a").await.status.as_u16())
    };
    let before = breakers().await;
    assert_eq!((&before.0, before.2), (&json!("open"), 503));
    reload(&program, &format!("{text}{MORE}")).await;
    assert_eq!(program.get("/more").await.text(), "more");
    assert_eq!(breakers().await, before);
    // Those whose rules changed begin anew, but for what operators hold.
    reload(&program, &text.replace("failures = 3", "failures = 4")).await;
    let after = breakers().await;
    assert_eq!((after.0, after.2), (json!("closed"), 503));
    let single = |state: &str| json!({ "service": "a", "endpoint": one.address().to_string(), "state": state });
    assert_eq!(program.order("/breaker", &json!({ "service": "a", "state": "auto" })).await.status, 200);
    assert_eq!(program.get("/a").await.status, 200);
    assert_eq!(program.order("/breaker", &single("open")).await.status, 200);
    reload(&program, &text).await;
    assert_eq!(program.get("/a").await.status, 503);
    assert_eq!(program.order("/breaker", &single("auto")).await.status, 200);
    assert_eq!(program.get("/a").await.status, 200);
    let all = |state: &str| json!({ "service": "a", "state": state });
    for order in [all("open"), single("open")] {
        assert_eq!(program.order("/breaker", &order).await.status, 200);
    }
    reload(&program, &text.replace("failures = 3", "failures = 4")).await;
    assert_eq!(program.get("/a").await.status, 503);
    assert_eq!(program.order("/breaker", &all("auto")).await.status, 200);
    assert_eq!(program.get("/a").await.status, 200);
    // Let go where all are held, one is, and whoever comes later is held.
    for order in [all("open"), single("auto")] {
        assert_eq!(program.order("/breaker", &order).await.status, 200);
    }
    assert_eq!(program.get("/a").await.status, 200);
    let three = Backend::start("three").await;
    let others = format!("[\"{}\"]", three.address());
    reload(&program, &text.replacen(&format!("[\"{}\"]", one.address()), &others, 1)).await;
    program.until("/endpoints", |answer| answer.text().contains(&three.address().to_string())).await;
    assert_eq!(program.get("/a").await.status, 503);
}

#[tokio::test]
async fn what_is_known_of_latencies_stays_and_so_do_connections() {
    let (well, busy) = (answering(WELL).await, answering(BUSY).await);
    let text = file(&[("a", &[well.0, busy.0])], ALL)
        .replace("breaker = { failures = 3 }", "balance = { policy = \"peak-ewma\" }")
        .replace("threads = 2", "threads = 1");
    let program = Program::start(&text);
    let until_busy = async || while program.get("/").await.status != 429 {};
    until_busy().await;
    // Of whom nothing is known is taken to be as the other: let both be known.
    for _ in 0..30 {
        program.get("/").await;
    }
    reload(&program, &format!("{text}{MORE}")).await;
    for _ in 0..30 {
        assert_eq!(program.get("/").await.status, 200, "who said that it is busy is left alone");
    }
    let accepted = (well.1.load(Ordering::Relaxed), busy.1.load(Ordering::Relaxed));
    assert_eq!(accepted, (1, 1), "nobody connected again");
    // Picked otherwise, they are met anew, by the connections of before.
    reload(&program, &text.replace("\"peak-ewma\"", "\"peak-ewma\", panic_threshold = 10")).await;
    until_busy().await;
    assert_eq!(busy.1.load(Ordering::Relaxed), 1);
}

/// A new token or address began the service anew: nothing was known until the registry answered.
#[tokio::test]
async fn what_a_registry_said_stays_when_it_is_asked_in_another_way_and_does_not_answer() {
    let mut consul = Consul::start().await;
    let backend = Backend::start("one").await;
    let port = backend.address().port();
    let instance = json!({ "Name": "a", "ID": "a-1", "Address": "127.0.0.1", "Port": port });
    assert_eq!(consul.put("/v1/agent/service/register", &instance.to_string()).await.status, 200);
    let text = |url: &str, more: &str| {
        let registry = format!("registries.r = {{ kind = \"consul\", address = \"{url}\"{more} }}\n");
        file(&[], &format!("{registry}services.a = {{ registry = \"r\", breaker = {{ failures = 3 }} }}\n{ALL}"))
    };
    let program = Program::start(&text(&consul.url(), ""));
    program.until("/ready", |answer| answer.status == 200).await;
    assert_eq!(program.get("/").await.status, 200);
    consul.kill();
    let nobody = Nobody::new();
    let nowhere = format!("http://{}", nobody.address());
    for text in [
        text(&consul.url(), ", token = \"another\""),
        text(&consul.url(), ", token = \"another\"")
            .replace("registry = \"r\"", "registry = \"r\", protocol = \"http1\""),
        text(&nowhere, ", token = \"another\""),
        text(&nowhere, ", max_age = \"1h\""),
    ] {
        reload(&program, &text).await;
        assert_eq!(program.get("/").await.status, 200, "{}", log(&program.folder));
        assert_eq!(program.ask("/ready").await.status, 200);
    }
    let known = program.ask("/endpoints").await.json();
    assert_eq!(known["a"]["endpoints"][0]["requests"], 5, "it is the same endpoint: {known}");
    // What it says when it answers again counts.
    consul.restart().await;
    let instance = json!({ "Name": "a", "ID": "a-2", "Address": "127.0.0.1", "Port": port });
    assert_eq!(consul.put("/v1/agent/service/register", &instance.to_string()).await.status, 200);
    reload(&program, &text(&consul.url(), "")).await;
    let is_new = |id: &serde_json::Value| id.as_str().is_some_and(|id| id.ends_with("/a-2"));
    program.until("/endpoints", |answer| is_new(&answer.json()["a"]["endpoints"][0]["id"])).await;
}

#[tokio::test]
async fn who_is_registered_by_hand_stays_when_the_registry_is_believed_longer() {
    let one = Backend::start("one").await;
    let text = |more: &str| {
        file(&[], &format!("registries.r = {{ kind = \"embedded\"{more} }}\nservices.a.registry = \"r\"\n{ALL}"))
    };
    let program = Program::start(&text(""));
    let order = json!({ "service": "a", "id": "one", "address": one.address().to_string() });
    assert_eq!(program.order("/register", &order).await.status, 200);
    program.until("/endpoints", |answer| answer.json()["a"]["endpoints"][0]["id"] == "one").await;
    reload(&program, &text(", max_age = \"1h\", first_wait = \"2s\"")).await;
    assert_eq!(program.get("/").await.header("x-backend"), "one");
    let order = json!({ "service": "a", "id": "two", "address": one.address().to_string() });
    assert_eq!(program.order("/register", &order).await.status, 200);
    let known = program.until("/endpoints", |answer| answer.json()["a"]["endpoints"][1]["id"] == "two").await.json();
    assert_eq!(known["a"]["endpoints"][0]["id"], "one");
}

/// Every endpoint was taken for well again, until it had failed some checks.
#[tokio::test]
async fn what_is_sick_stays_so_when_it_is_asked_or_connected_to_otherwise() {
    let (one, sick) = (Backend::start("one").await, Nobody::new());
    let text = |more: &str| {
        file(&[("a", &[one.address(), sick.address()])], ALL)
            .replace("breaker = { failures = 3 }", &format!("breaker.enabled = false, {more}"))
    };
    let asked = |interval: &str| format!("health = {{ kind = \"tcp\", interval = \"{interval}\", unhealthy = 3 }}");
    let program = Program::start(&text(&asked("10ms")));
    let is_sick = |answer: &portcullis_testing::client::Answer| {
        answer.json()["a"]["endpoints"].as_array().is_some_and(|all| all.iter().any(|one| one["condition"] == "sick"))
    };
    program.until("/endpoints", is_sick).await;
    for more in [asked("1h"), format!("timeouts.connect = \"3s\", {}", asked("1h"))] {
        reload(&program, &text(&more)).await;
        assert!(is_sick(&program.ask("/endpoints").await), "{}", program.ask("/endpoints").await.text());
    }
    // Without checks nothing is said against it any more.
    reload(&program, &text("timeouts.connect = \"3s\"")).await;
    assert!(!is_sick(&program.ask("/endpoints").await));
    assert!(program.ask("/endpoints").await.json()["a"]["endpoints"][1]["admits"] == true);
}

#[tokio::test]
async fn a_request_under_way_ends_by_what_it_began_with() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let program = Program::start(&file(&[("a", &[address])], ALL));
    let waiting = tokio::spawn(get(program.gateway, "/", &[]));
    let (mut stream, _) = listener.accept().await.expect("a connection");
    assert!(head(&mut stream).await);
    reload(&program, &file(&[], MORE)).await;
    assert_eq!(program.get("/").await.status, 404);
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone").await.expect("it listens still");
    assert_eq!(waiting.await.expect("an end").expect("an answer").text(), "done");
}

#[tokio::test]
async fn what_counts_from_the_next_start_is_said_for_as_long_as_it_differs() {
    let backend = Backend::start("one").await;
    let text = file(&[("a", &[backend.address()])], ALL);
    let program = Program::start(&text);
    let other = text.replace("threads = 2, drain_timeout = \"5s\"", "threads = 1, drain_timeout = \"6s\"");
    for _ in 0..2 {
        program.write(&other);
        let said = program.order("/reload", &json!(null)).await.text();
        let later = "what it says of server.threads, server.drain_timeout counts from the next start";
        assert!(said.contains(later), "{said}");
    }
    reload(&program, &text).await;
}

#[tokio::test]
async fn a_reload_takes_effect_at_once_and_keeps_what_did_not_change() {
    let (one, two) = (Backend::start("one").await, Backend::start("two").await);
    let limits = "limits.each = { rate = \"5/h\" }\nlimiter.default = [\"each\"]\n";
    let first = file(&[("a", &[one.address()])], &format!("{limits}{ALL}"));
    let program = Program::start(&first);
    for _ in 0..3 {
        assert_eq!(program.get("/").await.header("x-backend"), "one");
    }
    program.write(&file(
        &[("a", &[one.address(), two.address()])],
        &format!("{limits}{ALL}[[routes]]\npath = \"/new\"\nrespond = {{ body = \"new\" }}\n"),
    ));
    let answer = program.order("/reload", &json!(null)).await;
    assert_eq!((answer.status.as_u16(), answer.text().as_str()), (200, "the file is in force\n"));
    assert_eq!(program.get("/new").await.text(), "new");
    // The list is followed as a registry is: a moment later.
    let mut endpoints = json!(null);
    for _ in 0..500 {
        endpoints = program.ask("/endpoints").await.json();
        if endpoints["a"]["endpoints"].as_array().is_some_and(|all| all.len() == 2) {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert_eq!(endpoints["a"]["endpoints"].as_array().map(Vec::len), Some(2));
    let kept = endpoints["a"]["endpoints"].as_array().and_then(|all| all.iter().find(|one_of| one_of["requests"] == 3));
    assert!(kept.is_some(), "the endpoint that stayed kept its counters: {endpoints}");
    // The limit goes on counting where it was: two are left of five.
    let mut statuses = Vec::new();
    for _ in 0..3 {
        statuses.push(program.get("/").await.status.as_u16());
    }
    assert_eq!(statuses, [200, 200, 429]);
}

#[tokio::test]
async fn a_wrong_file_changes_nothing_and_says_why() {
    let backend = Backend::start("one").await;
    let program = Program::start(&file(&[("a", &[backend.address()])], ALL));
    program.write("[[routes]]\npath = \"/\"\nto = \"b\"\n");
    let answer = program.order("/reload", &json!(null)).await;
    assert_eq!(answer.status, 422);
    assert!(answer.text().contains("gateway.toml:3:6: there is no service \"b\""), "{}", answer.text());
    program.write(&file(&[("a", &[backend.address()])], &format!("{ALL}{ALL}")));
    let answer = program.order("/reload", &json!(null)).await;
    assert!(answer.text().contains("two routes for"), "{}", answer.text());
    assert_eq!(program.get("/").await.header("x-backend"), "one");
    assert!(program.ask("/metrics").await.text().contains("portcullis_config_reloads_total{result=\"refused\"} 2"));
    std::fs::remove_file(program.folder.join("gateway.toml")).expect("a file");
    assert_eq!(program.order("/reload", &json!(null)).await.status, 422);
    assert_eq!(program.get("/").await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_when_files_change_under_load() {
    let (one, two) = (Backend::start("one").await, Backend::start("two").await);
    let files = [
        file(&[("a", &[one.address()])], ALL),
        file(&[("a", &[two.address()])], ALL),
        file(
            &[("a", &[one.address(), two.address()])],
            &format!("limits.each = {{ rate = \"100000/s\" }}\nlimiter.default = [\"each\"]\n{ALL}"),
        ),
    ];
    let program = Program::start(&files[0]);
    let (over, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let (over, sent, gateway) = (over.clone(), sent.clone(), program.gateway);
        clients.spawn(async move {
            let mut lost = Vec::new();
            while !over.load(Ordering::Relaxed) {
                sent.fetch_add(1, Ordering::Relaxed);
                match get(gateway, "/", &[]).await {
                    Ok(answer) if answer.status == 200 => {}
                    other => lost.push(format!("{other:?}")),
                }
            }
            lost
        });
    }
    for round in 0..30 {
        let before = sent.load(Ordering::Relaxed);
        program.write(&files[round % 3]);
        assert_eq!(program.order("/reload", &json!(null)).await.status, 200);
        // Each file has its share of them.
        while sent.load(Ordering::Relaxed) < before + 4 {
            tokio::task::yield_now().await;
        }
    }
    over.store(true, Ordering::Relaxed);
    let lost: Vec<String> = clients.join_all().await.concat();
    let sent = sent.load(Ordering::Relaxed);
    assert!(lost.is_empty(), "{} of {sent} lost: {}", lost.len(), lost[0]);
    println!("{sent} requests during 30 reloads, none of them lost");
}

#[tokio::test]
async fn a_hangup_and_a_change_of_the_file_reload_it() {
    let backend = Backend::start("one").await;
    let with = |word: &str, watch: bool| {
        let more = format!("{ALL}[[routes]]\npath = \"/word\"\nrespond = {{ body = \"{word}\" }}\n");
        file(&[("a", &[backend.address()])], &more).replace("threads = 2", &format!("threads = 2, watch = {watch}"))
    };
    let program = Program::start(&with("first", false));
    says(&program, "first").await;
    program.write(&with("second", true));
    program.signal("HUP");
    says(&program, "second").await;
    program.write(&with("the third", true));
    says(&program, "the third").await;
}

/// Waits until `/word` is answered so.
async fn says(program: &Program, word: &str) {
    for _ in 0..500 {
        if program.get("/word").await.text() == word {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    panic!("not {word}: {}", log(&program.folder));
}

#[tokio::test]
async fn a_file_that_names_what_comes_later_is_tried_again() {
    let backend = Backend::start("one").await;
    let with = |more: &str| {
        file(&[("a", &[backend.address()])], &format!("{ALL}{more}"))
            .replace("threads = 2", "threads = 2, watch = true")
    };
    let program = Program::start(&with(""));
    let secret =
        "[auth]\ndefault = \"none\"\n[auth.providers.p]\nsecret = { file = \"later\" }\nalgorithm = \"HS256\"\n";
    program.write(&with(&format!("[[routes]]\npath = \"/word\"\nrespond = {{ body = \"new\" }}\n{secret}")));
    let refused = "portcullis_config_reloads_total{result=\"refused\"} 1";
    program.until("/metrics", |answer| answer.text().contains(refused)).await;
    std::fs::write(program.folder.join("later"), "thirty-two bytes are enough for this").expect("a folder to write in");
    says(&program, "new").await;
}
