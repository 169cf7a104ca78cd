//! What the file says of services, through the running program: where their instances come from, what they are told, and
//! what is done when none of them has time.

mod common;

use std::time::Duration;

use portcullis_testing::Backend;
use portcullis_testing::client::get;
use portcullis_testing::process::scratch_folder;
use serde_json::json;

use common::{ALL, Program, file};

#[tokio::test]
async fn instances_of_several_registries_are_one_service_and_a_fallback_is_asked_last() {
    let (one, two, three) = (Backend::start("one").await, Backend::start("two").await, Backend::start("three").await);
    let folder = scratch_folder("services");
    let list = |backend: &Backend| json!([{ "address": backend.address().to_string() }]);
    let write = |name: &str, text: serde_json::Value| {
        std::fs::write(folder.join(name), json!({ "services": text }).to_string()).expect("a folder to write in");
    };
    write("some.json", json!({ "a": list(&two) }));
    write("last.json", json!({ "a": list(&three), "b": list(&three) }));
    let text = format!(
        r#"
        registries = {{ here.kind = "embedded", some = {{ kind = "file", path = "some.json" }}, last = {{ kind = "file", path = "last.json" }} }}
        services.a = {{ registry = ["here", "some"], fallback = "last" }}
        services.b = {{ registry = ["here", "some"], fallback = "last" }}
        {ALL}
        [[routes]]
        path = "/b"
        to = "b"
        "#
    );
    let program = Program::start_in(folder.clone(), &file(&[], &text));
    let order = json!({ "service": "a", "id": "one", "registry": "here", "address": one.address().to_string() });
    assert_eq!(program.order("/register", &order).await.status, 200);
    let known = |count| {
        move |answer: &portcullis_testing::client::Answer| {
            answer.json()["a"]["endpoints"].as_array().is_some_and(|all| all.len() == count)
        }
    };
    program.until("/endpoints", known(2)).await;
    let mut served = std::collections::BTreeSet::new();
    for _ in 0..40 {
        served.insert(program.get("/").await.header("x-backend").to_owned());
    }
    assert_eq!(served.into_iter().collect::<Vec<_>>(), ["one", "two"]);
    assert_eq!(program.order("/reload", &json!(null)).await.status, 200);
    let kept = program.ask("/endpoints").await.json();
    let requests = |index: usize| kept["a"]["endpoints"][index]["requests"].as_u64().unwrap_or_default();
    assert_eq!(requests(0) + requests(1), 40, "the reload took them over: {kept}");
    program
        .until("/endpoints", |answer| answer.json()["b"]["endpoints"].as_array().is_some_and(|all| all.len() == 1))
        .await;
    assert_eq!(program.get("/b").await.header("x-backend"), "three");
}

#[tokio::test]
async fn endpoints_are_told_where_requests_came_from_as_the_file_says() {
    let backend = Backend::start("one").await;
    let mut text = file(&[], "");
    for (name, forwarded, via) in
        [("x", "x-forwarded", "edge"), ("s", "forwarded", "edge"), ("b", "both", "edge"), ("n", "none", "other")]
    {
        let address = backend.address();
        text.push_str(&format!(
            "services.{name} = {{ endpoints = \"{address}\", forwarded = \"{forwarded}\", via = \"{via}\" }}\n"
        ));
    }
    for name in ["x", "s", "b", "n"] {
        text.push_str(&format!("[[routes]]\npath = \"/{name}\"\nto = \"{name}\"\n"));
    }
    let program = Program::start(&text);
    for (path, old, new) in [("/x", true, false), ("/s", false, true), ("/b", true, true), ("/n", false, false)] {
        let told = get(program.gateway, path, &[("x-forwarded-for", "9.9.9.9")]).await.expect("an answer").json();
        let headers = &told["headers"];
        assert_eq!(headers["x-forwarded-for"] == "127.0.0.1", old, "{path}: {headers}");
        assert_eq!(headers["forwarded"].as_str().is_some_and(|text| text.contains("for=127.0.0.1")), new, "{headers}");
        assert!(!headers.to_string().contains("9.9.9.9"), "a stranger's word: {headers}");
        let name = if path == "/n" { "other" } else { "edge" };
        assert_eq!(headers["via"], format!("1.1 {name}"), "{path}");
    }
    // What went round in a circle.
    assert_eq!(get(program.gateway, "/x", &[("via", "1.1 edge")]).await.expect("an answer").status, 508);
    assert_eq!(get(program.gateway, "/n", &[("via", "1.1 edge")]).await.expect("an answer").status, 200);
}

#[tokio::test]
async fn some_requests_wait_for_an_endpoint_that_admits_and_no_more_than_may() {
    let backend = Backend::start("one").await;
    let address = backend.address();
    let service = |name: &str, open_for: &str, waiting: u32| {
        format!(
            "services.{name} = {{ endpoints = \"{address}\", breaker = {{ failures = 1, open_for = \"{open_for}\", jitter = 0.0 }}, \
             balance = {{ panic_threshold = 0, wait = \"10s\", waiting = {waiting} }}, retry.attempts = 1 }}\n"
        )
    };
    let routes = "[[routes]]\npath = \"/status/{code}\"\nto = \"some\"\n[[routes]]\npath = \"/none/{*rest}\"\n\
                  strip_prefix = \"/none\"\nto = \"none\"\n";
    let program = Program::start(&file(&[], &(service("some", "150ms", 8) + &service("none", "1h", 0) + routes)));
    let ask = async |path: &str| get(program.gateway, path, &[]).await.expect("an answer").status.as_u16();
    // It opens, and whoever comes then waits until it lets somebody try.
    assert_eq!((ask("/status/500").await, ask("/status/200").await), (500, 200));
    assert_eq!(ask("/none/status/500").await, 500);
    assert_eq!(ask("/none/status/200").await, 503, "nobody may wait");
}

#[tokio::test]
async fn what_having_no_time_counts_as_is_as_the_file_says() {
    let backend = Backend::start("one").await;
    let address = backend.address();
    let service = |counts: &str| {
        format!(
            "services.{counts} = {{ endpoints = \"{address}\", breaker = {{ failures = 2, exhausted = \"{counts}\" }}, \
             balance.panic_threshold = 0, retry.attempts = 1 }}\n[[routes]]\npath = \"/{counts}/{{*rest}}\"\n\
             strip_prefix = \"/{counts}\"\nto = \"{counts}\"\n"
        )
    };
    for (counts, last) in [("ignored", 429), ("failure", 503), ("success", 429)] {
        let program = Program::start(&file(&[], &service(counts)));
        let mut statuses = Vec::new();
        for _ in 0..3 {
            let target = format!("/{counts}/status/429");
            statuses.push(get(program.gateway, &target, &[]).await.expect("an answer").status.as_u16());
        }
        assert_eq!(statuses, [429, 429, last], "{counts}");
    }
}

#[tokio::test]
async fn what_hangs_holds_so_many_requests_and_no_more() {
    // Takes connections and never answers.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let at = silent.local_addr().expect("a bound socket");
    let text = format!(
        "services.a = {{ endpoints = \"{at}\", pool = {{ max_connections = 1, max_waiting = 0 }}, retry.attempts = 1, \
         timeouts.response = \"never\" }}\n{ALL}"
    );
    let program = Program::start(&file(&[], &text));
    let waiting = tokio::spawn(get(program.gateway, "/", &[]));
    let connection = silent.accept().await.expect("a request");
    assert_eq!(program.get("/").await.status, 503);
    assert!(!waiting.is_finished());
    waiting.abort();
    drop(connection);
}

#[tokio::test]
async fn the_total_time_is_for_all_attempts_together() {
    // Takes connections and never answers.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let at = silent.local_addr().expect("a bound socket");
    let service = format!(
        "services.a = {{ endpoints = \"{at}\", retry = {{ attempts = 5, on_statuses = [504], backoff = \"1ms\" }}, \
         timeouts.total = \"100ms\" }}\n{ALL}"
    );
    let route = service.replace(", timeouts.total = \"100ms\"", "") + "timeouts.total = \"100ms\"\n";
    for text in [service, route] {
        let program = Program::start(&file(&[], &text));
        assert_eq!(program.get("/").await.status, 504);
        drop(silent.accept().await.expect("an attempt"));
        let other = tokio::time::timeout(Duration::ZERO, silent.accept()).await;
        assert!(other.is_err(), "another attempt, in a time of its own");
    }
}

/// The longest counted for all, and none where one service had none.
#[tokio::test]
async fn the_total_time_of_a_service_is_its_own_in_a_split() {
    // Takes connections and never answers.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let (at, other) = (silent.local_addr().expect("a bound socket"), Backend::start("other").await);
    for time in ["", ", timeouts.total = \"1h\"", ", timeouts.total = \"never\""] {
        let program = Program::start(&file(
            &[],
            &format!(
                "services.a = {{ endpoints = \"{at}\", timeouts.total = \"100ms\", retry.attempts = 1 }}\n\
                 services.b = {{ endpoints = \"{}\"{time} }}\n\
                 [[routes]]\npath = \"/{{*rest}}\"\nto = [{{ service = \"a\", weight = 1 }}, {{ service = \"b\", weight = 1 }}]\n",
                other.address()
            ),
        ));
        // Whichever comes first; after several of the one its breaker may refuse.
        let mut wanted = std::collections::BTreeSet::from([200, 504]);
        while !wanted.is_empty() {
            let answer = tokio::time::timeout(Duration::from_secs(10), program.get("/")).await;
            wanted.remove(&answer.unwrap_or_else(|_| panic!("no answer, {time}")).status.as_u16());
        }
    }
}

#[tokio::test]
async fn who_does_worse_than_the_others_is_left_alone() {
    let well = [Backend::start("one").await, Backend::start("two").await];
    let failing = tower::service_fn(|_: http::Request<hyper::body::Incoming>| async {
        let mut response = http::Response::new(http_body_util::Empty::<bytes::Bytes>::new());
        *response.status_mut() = http::StatusCode::INTERNAL_SERVER_ERROR;
        Ok::<_, std::convert::Infallible>(response)
    });
    let (sick, server) = portcullis_testing::backend::serve(([127, 0, 0, 1], 0).into(), failing).await;
    let text = format!(
        "services.a = {{ endpoints = [\"{}\", \"{}\", \"{sick}\"], breaker = {{ failures = 0, outliers = {{ every = \"1s\", \
         deviations = 0, failure_rate = 0.5, calls = 5, endpoints = 3, at_most = 0.5, open_for = \"1h\", open_limit = \"1h\" }} }} }}\n{ALL}",
        well[0].address(),
        well[1].address()
    );
    let program = Program::start(&file(&[], &text));
    let begun = tokio::time::Instant::now();
    while !program.ask("/endpoints").await.text().contains("\"condition\": \"open\"") {
        program.get("/").await;
        assert!(begun.elapsed() < Duration::from_secs(30), "nobody is left alone");
    }
    for _ in 0..20 {
        assert_eq!(program.get("/").await.status, 200);
    }
    let metrics = program.ask("/metrics").await.text();
    assert!(metrics.contains("reason=\"outlier\""), "{metrics}");
    server.abort();
}

#[tokio::test]
async fn a_request_waits_as_long_as_the_file_says_for_a_registry_that_says_nothing() {
    // Takes connections and never answers.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let at = silent.local_addr().expect("a bound socket");
    let text = |wait: &str| {
        file(
            &[],
            &format!(
                "registries.r = {{ kind = \"consul\", address = \"http://{at}\", first_wait = \"{wait}\" }}\nservices.a.registry = \"r\"\n{ALL}"
            ),
        )
    };
    let (patient, hasty) = (Program::start(&text("1h")), Program::start(&text("10ms")));
    assert_eq!(hasty.get("/").await.status, 503);
    let waiting = tokio::time::timeout(Duration::from_millis(1500), patient.get("/")).await;
    assert!(waiting.is_err(), "it would have had its answer after a second");
}

/// Requests to all services of a route were sent as its first one has it, subset and stickiness included.
#[tokio::test]
async fn a_route_that_says_how_often_to_try_leaves_each_service_its_own_endpoints() {
    let (one, two) = (Backend::start("one").await, Backend::start("two").await);
    let text = format!(
        r#"
        services.v1 = {{ endpoints = [{{ address = "{one}", tags = ["v1"] }}], balance.subset = {{ tags = ["v1"] }} }}
        services.v2 = {{ endpoints = [{{ address = "{two}", tags = ["v2"] }}], balance.subset = {{ tags = ["v2"] }} }}
        [[routes]]
        path = "/{{*rest}}"
        to = ["v1", "v2"]
        retry = {{ attempts = 3 }}
        "#,
        one = one.address(),
        two = two.address()
    );
    let program = Program::start(&file(&[], &text));
    let mut served = std::collections::BTreeMap::<_, u32>::new();
    for _ in 0..60 {
        let answer = program.get("/").await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        *served.entry(answer.header("x-backend").to_owned()).or_default() += 1;
    }
    assert_eq!(served.keys().collect::<Vec<_>>(), ["one", "two"], "{served:?}");
}
