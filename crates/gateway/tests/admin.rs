//! What operators get: log, metrics, orders, and what is kept from them.
#![expect(clippy::unwrap_used, reason = "what helps the tests fails with them")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use bytes::Bytes;
use common::{ALL, Program, file, log};
use http::{Method, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use portcullis::serve::{Server, ServerTls};
use portcullis_testing::Backend;
use portcullis_testing::backend::serve;
use portcullis_testing::client::{get, request};
use portcullis_testing::process::{Nobody, scratch_folder};
use serde_json::{Value as Json, json};
use tonic_health::ServingStatus;

/// The lines of the access log, once the program has ended.
async fn access(program: &mut Program) -> Vec<Json> {
    program.signal("TERM");
    assert_eq!(program.ended().await, Some(0));
    let lines = log(&program.folder);
    let lines = lines.lines().filter_map(|line| serde_json::from_str::<Json>(line).ok());
    lines.filter(|line| line["target"] == "access").collect()
}

/// Asks until it is so, ten seconds at most.
async fn until(program: &Program, target: &str, what: &str) {
    for _ in 0..500 {
        if program.ask(target).await.text().contains(what) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{what} is not in {}", program.ask(target).await.text());
}

#[tokio::test]
async fn each_request_is_a_line_with_the_time_of_each_stage() {
    let (alive, nobody) = (Backend::start("one").await, Nobody::new());
    let dead = nobody.address();
    let more = format!("log.format = \"json\"\nlimits.few = {{ rate = \"4/h\" }}\nlimiter.default = [\"few\"]\n{ALL}");
    let text = file(&[("a", &[dead, alive.address()])], &more)
        .replace("breaker = { failures = 3 }", "balance = { policy = \"round-robin\" }");
    let mut program = Program::start(&text);
    for _ in 0..4 {
        let sent = request(program.gateway, Method::PUT, "/echo", &[], "five!").await.unwrap();
        assert_eq!(sent.text(), "five!");
    }
    assert_eq!(program.get("/x").await.status, 429);
    let lines = access(&mut program).await;
    assert_eq!(lines.len(), 5);
    let retried = lines.iter().find(|line| line["attempts"] == 2).expect("one that went to the dead one first");
    let stages = ["auth_ms", "limit_ms", "discovery_ms", "balance_ms", "upstream_ms", "body_ms"];
    let times = stages.map(|stage| retried[stage].as_f64().unwrap_or_else(|| panic!("no {stage} in {retried}")));
    let total = retried["total_ms"].as_f64().unwrap();
    assert!((times.iter().sum::<f64>() - total).abs() < 0.02, "stages make up the whole: {retried}");
    assert_eq!((&retried["bytes_in"], &retried["bytes_out"]), (&json!(5), &json!(5)));
    assert_eq!((&retried["service"], &retried["route"]), (&json!("a"), &json!("/{*rest}")));
    assert_eq!(retried["endpoint"], alive.address().to_string());
    assert_eq!((&retried["complete"], &retried["status"]), (&json!(true), &json!(200)));
    let refused = lines.last().unwrap();
    assert_eq!((&refused["refused_by"], &refused["reason"]), (&json!("rate-limit"), &json!("too-many-requests")));
    assert!(refused["auth_ms"].is_f64() && refused["limit_ms"].is_null() && refused["endpoint"].is_null(), "{refused}");
}

#[tokio::test]
async fn a_caller_that_goes_away_is_written_down_as_such() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap();
    let mut program = Program::start(&file(&[("a", &[address])], &format!("log.format = \"json\"\n{ALL}")));
    let call = tokio::spawn(get(program.gateway, "/x", &[]));
    let _asked = silent.accept().await.unwrap();
    call.abort();
    until(&program, "/metrics", "http_response_status_code=\"499\"").await;
    let lines = access(&mut program).await;
    assert_eq!((&lines[0]["complete"], &lines[0]["attempts"]), (&json!(false), &json!(1)));
    assert!(lines[0]["status"].is_null() && lines[0]["head_ms"].is_null(), "{}", lines[0]);
}

#[tokio::test]
async fn of_many_that_succeed_few_are_written_and_of_those_that_fail_all() {
    let backend = Backend::start("one").await;
    let text = file(&[("a", &[backend.address()])], &format!("log = {{ format = \"json\", sample = 0.05 }}\n{ALL}"));
    let mut program = Program::start(&text.replace("breaker = { failures = 3 }", "breaker = { enabled = false }"));
    for _ in 0..200 {
        program.get("/x").await;
    }
    for _ in 0..20 {
        program.get("/status/500").await;
    }
    let lines = access(&mut program).await;
    let failed = lines.iter().filter(|line| line["status"] == 500).count();
    assert_eq!(failed, 20);
    assert!((1..60).contains(&(lines.len() - failed)), "{} of 200", lines.len() - failed);
}

#[tokio::test]
async fn no_credential_is_ever_written_or_shown() {
    let backend = Backend::start("one").await;
    let secret = "sesame-is-a-secret-of-more-than-32-bytes";
    let more = format!(
        "log.level = \"trace\"\nadmin = {{ address = \"127.0.0.1:0\", writable = true, token = \"{secret}\" }}\n\
         auth = {{ default = \"optional\", providers = {{ p = {{ secret = \"{secret}\", issuer = \"i\", audiences = [\"x\"] }} }} }}\n{ALL}"
    );
    let mut program = Program::start(&file(&[("a", &[backend.address()])], &more));
    let target = format!("/x?access_token={secret}");
    let bearer = format!("Bearer {secret}");
    let headers = [
        ("authorization", bearer.as_str()),
        ("cookie", secret),
        ("proxy-authorization", secret),
        ("x-api-key", secret),
    ];
    get(program.gateway, &target, &headers).await.unwrap();
    get(program.gateway, &target, &headers[1..]).await.unwrap();
    get(program.gateway, &format!("/nowhere//{target}"), &headers[1..]).await.unwrap();
    // The same over HTTP/2, whose library writes down frames at this level.
    let stream = tokio::net::TcpStream::connect(program.gateway).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut asked = Request::get(format!("http://{}{target}", program.gateway));
    for (name, value) in &headers[1..] {
        asked = asked.header(*name, *value);
    }
    let answer = sender.send_request(asked.body(Full::<Bytes>::default()).unwrap()).await.unwrap();
    assert_eq!(answer.status(), 200);
    answer.into_body().collect().await.unwrap();
    connection.abort();
    // The operators' side: the right one, a wrong one.
    for given in [bearer.as_str(), "Bearer sesame-wrong"] {
        request(program.admin, Method::POST, "/log", &[("authorization", given)], "{\"level\": \"trace\"}")
            .await
            .unwrap();
    }
    for target in ["/config", "/state", "/endpoints", "/metrics"] {
        let shown = program.ask(target).await.text();
        assert!(!shown.contains("sesame"), "{target}: {shown}");
    }
    program.signal("TERM");
    assert_eq!(program.ended().await, Some(0));
    let log = log(&program.folder);
    assert!(log.contains("TRACE") && log.contains("path=\"/x\""), "all is written at this level");
    let told = log.lines().find(|line| line.contains("sesame"));
    assert!(told.is_none(), "{told:?}");
}

#[tokio::test]
async fn a_grpc_call_is_counted_by_what_its_trailers_say() {
    let (reporter, service) = tonic_health::server::health_reporter();
    let (address, server) = serve(([127, 0, 0, 1], 0).into(), service).await;
    reporter.set_service_status("a", ServingStatus::Serving).await;
    let mut program = Program::start(&file(&[("a", &[address])], &format!("log.format = \"json\"\n{ALL}")));
    let stream = tokio::net::TcpStream::connect(program.gateway).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    let connection = tokio::spawn(connection);
    for method in ["Check", "Nothing"] {
        let asked = Request::post(format!("http://{}/grpc.health.v1.Health/{method}", program.gateway))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Full::new(Bytes::from_static(&[0; 5])))
            .unwrap();
        sender.send_request(asked).await.unwrap().into_body().collect().await.unwrap();
    }
    drop(sender);
    connection.abort();
    server.abort();
    until(&program, "/metrics", "rpc_grpc_status_code=\"12\"").await;
    let lines = access(&mut program).await;
    let codes: Vec<_> = lines.iter().map(|line| (&line["status"], &line["grpc_status"])).collect();
    assert_eq!(codes, [(&json!(200), &json!(0)), (&json!(200), &json!(12))], "OK, UNIMPLEMENTED");
}

#[tokio::test]
async fn a_log_that_nobody_reads_keeps_no_request_waiting() {
    let backend = Backend::start("one").await;
    let text = file(&[("a", &[backend.address()])], ALL);
    // A pipe that nobody reads, with room for some 200 lines.
    let mut program = Program::start_logging_to(scratch_folder("unread"), &text, Stdio::piped());
    for _ in 0..600 {
        let answer = tokio::time::timeout(Duration::from_secs(20), program.get("/x")).await;
        assert_eq!(answer.expect("an answer").status, 200);
    }
    program.signal("TERM");
    assert_eq!(program.ended().await, Some(0));
}

/// The samples of a page of metrics by name and labels; fails where it is not what Prometheus reads.
fn samples(text: &str) -> BTreeMap<String, f64> {
    let (mut kinds, mut found) = (BTreeMap::new(), BTreeMap::new());
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(kinds.insert(name.to_owned(), kind.to_owned()).is_none(), "{name} twice");
        } else if !line.starts_with("# HELP ") {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let name = series.split('{').next().unwrap();
            let family = ["_bucket", "_sum", "_count"]
                .iter()
                .filter_map(|end| name.strip_suffix(end))
                .find(|name| kinds.get(*name).is_some_and(|kind| kind == "histogram"))
                .unwrap_or(name);
            let kind = kinds.get(family).unwrap_or_else(|| panic!("{name} before its type"));
            assert!(kind != "counter" || name.ends_with("_total"), "{name} is a counter");
            let value = value.parse().unwrap_or_else(|_| panic!("{line}"));
            assert!(found.insert(series.to_owned(), value).is_none(), "{series} twice");
        }
    }
    found
}

#[tokio::test]
async fn everything_is_counted_and_nothing_that_callers_make_up_becomes_a_label() {
    let two = Backend::start("two").await;
    // Nobody answers there, and nobody else can.
    let held = tokio::net::TcpSocket::new_v4().unwrap();
    held.bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let dead = held.local_addr().unwrap();
    let keys = format!("https://{dead}/keys");
    let more = format!(
        "limits.few = {{ rate = \"20/h\" }}\nlimiter.default = [\"few\"]\n\
         auth.providers.p = {{ jwks_url = \"{keys}\", issuer = \"i\", audiences = [\"x\"] }}\nauth.default = \"optional\"\n{ALL}"
    );
    let text = file(&[("a", &[dead, two.address()])], &more);
    let program =
        Program::start(&text.replace("failures = 3 }", "failures = 3 }, balance = { policy = \"round-robin\" }"));
    let gateway = program.gateway;
    for number in 0..30 {
        let method = Method::from_bytes(format!("BREW{number}").as_bytes()).unwrap();
        request(
            gateway,
            method,
            &format!("/path-{number}?query-{number}"),
            &[("x-made-up", &format!("h{number}"))],
            "",
        )
        .await
        .unwrap();
    }
    request(gateway, Method::POST, "/nowhere//x", &[], "12345").await.unwrap();
    let force = json!({ "service": "a", "endpoint": two.address().to_string(), "state": "open" });
    assert_eq!(program.order("/breaker", &force).await.status, 200);
    until(&program, "/metrics", "portcullis_breaker_changes_total{service=\"a\",to=\"open\",reason=\"failures\"} 1")
        .await;
    until(&program, "/metrics", "portcullis_key_set_fetches_total{provider=\"p\",result=\"failed\"} 1").await;
    let text = program.ask("/metrics").await.text();
    let samples = samples(&text);
    for made_up in ["BREW", "path-", "query-", "h1\""] {
        assert!(!text.contains(made_up), "{made_up} is a label");
    }
    let route = "http_request_method=\"_OTHER\",http_response_status_code=\"429\",http_route=\"/{*rest}\",rpc_grpc_status_code=\"\",error_type=\"too-many-requests\",portcullis_layer=\"rate-limit\"";
    // Of the 31, whatever their method.
    assert_eq!(samples[&format!("http_server_request_duration_seconds_count{{{route}}}")], 11.0);
    let bounds: Vec<_> = samples.keys().filter(|key| key.contains(&format!("_bucket{{{route}"))).collect();
    assert_eq!(bounds.len(), 15, "the buckets of the semantic conventions, and the rest");
    assert!(samples.contains_key(&format!("http_server_request_duration_seconds_bucket{{{route},le=\"0.005\"}}")));
    for (series, value) in [
        ("portcullis_rate_limit_decisions_total{decision=\"admitted\"}", 20.0),
        ("portcullis_service_endpoints{service=\"a\",state=\"held\"}", 1.0),
        ("portcullis_service_endpoints{service=\"a\",state=\"open\"}", 1.0),
        ("portcullis_service_endpoints{service=\"a\",state=\"admitting\"}", 0.0),
        ("portcullis_registry_age_seconds{service=\"a\"}", 0.0),
        ("portcullis_key_set_fetches_total{provider=\"p\",result=\"ok\"}", 0.0),
        ("portcullis_token_cache_lookups_total{provider=\"p\",result=\"hit\"}", 0.0),
        ("portcullis_service_bytes_total{service=\"a\",direction=\"up\"}", 0.0),
    ] {
        assert_eq!(samples.get(series), Some(&value), "{series}");
    }
    assert!(samples["portcullis_retry_budget{service=\"a\"}"] >= 100.0);
    let of_dead = format!("{{service=\"a\",endpoint=\"{dead}\"}}");
    for family in ["failures_total", "retried_total"] {
        assert_eq!(samples[&format!("portcullis_endpoint_{family}{of_dead}")], 3.0, "{family}");
    }
    assert_eq!(samples[&format!("portcullis_attempt_duration_seconds_count{of_dead}")], 3.0);
    assert_eq!(samples[&format!("portcullis_breaker_state{of_dead}")], 2.0);
    let families: BTreeSet<&str> = samples.keys().map(|series| series.split('{').next().unwrap()).collect();
    for family in [
        "http_server_active_requests",
        "portcullis_attempt_duration_seconds_bucket",
        "portcullis_breaker_state",
        "portcullis_build_info",
        "portcullis_config_reloads_total",
        "portcullis_endpoint_failures_total",
        "portcullis_endpoint_picks_total",
        "portcullis_endpoint_retried_total",
        "portcullis_health_well",
        "portcullis_key_set_fetches_total",
        "portcullis_pool_connections",
        "portcullis_rate_limit_callers",
        "portcullis_ready",
        "portcullis_registry_answers_total",
        "portcullis_route_bytes_total",
        "portcullis_token_cache_bytes",
        "portcullis_uptime_seconds",
    ] {
        assert!(families.contains(family), "{family} is not in {families:?}");
    }
    // An endpoint that is gone is not counted any more, and metrics can be less.
    let fewer = file(&[("a", &[two.address()])], &format!("metrics.endpoints = true\n{ALL}"));
    program.write(&fewer);
    assert_eq!(program.order("/reload", &json!(null)).await.status, 200);
    for _ in 0..500 {
        let text = program.ask("/metrics").await.text();
        if text.matches("portcullis_endpoint_picks_total{").count() == 1 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let text = program.ask("/metrics").await.text();
    assert_eq!(text.matches("portcullis_endpoint_picks_total{").count(), 1, "{text}");
    program.write(&fewer.replace("metrics.endpoints = true", "metrics.endpoints = false"));
    assert_eq!(program.order("/reload", &json!(null)).await.status, 200);
    assert!(!program.ask("/metrics").await.text().contains("portcullis_endpoint_"));
    program.write(&fewer.replace("metrics.endpoints = true", "metrics.enabled = false"));
    assert_eq!(program.order("/reload", &json!(null)).await.status, 200);
    assert_eq!(program.ask("/metrics").await.status, 404);
}

#[tokio::test]
async fn keys_that_are_fetched_have_an_age_and_tokens_that_come_again_are_hits() {
    let backend = Backend::start("one").await;
    let pair = rcgen::generate_simple_self_signed([String::from("127.0.0.1")]).unwrap();
    let tls = ServerTls::new(pair.cert.pem().as_bytes(), pair.signing_key.serialize_pem().as_bytes()).unwrap();
    // An Ed25519 key and its public half, as everybody may know them.
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let public = base64_url(key.public_key_raw());
    let jwks =
        json!({ "keys": [{ "kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "kid": "1", "use": "sig", "x": public }] });
    let service = tower::service_fn(move |_: Request<portcullis::serve::Incoming>| {
        let response = http::Response::new(Full::new(Bytes::from(jwks.to_string())));
        async { Ok::<_, std::convert::Infallible>(response) }
    });
    let server = Server::bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap().tls(tls);
    let issuer = server.local_addr().unwrap();
    let server = tokio::spawn(server.serve(service));
    let folder = scratch_folder("keys");
    std::fs::write(folder.join("ca.pem"), pair.cert.pem()).unwrap();
    let more = format!(
        "auth.providers.p = {{ jwks_url = \"https://{issuer}/keys\", ca = \"ca.pem\", issuer = \"i\", audiences = [\"x\"] }}\n{ALL}"
    );
    let text = file(&[("a", &[backend.address()])], &more);
    let program = Program::start_in(folder, &text);
    let claims = json!({ "iss": "i", "aud": "x", "sub": "ada", "exp": 4_000_000_000_u64 });
    let mut header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::EdDSA);
    header.kid = Some(String::from("1"));
    let signing = jsonwebtoken::EncodingKey::from_ed_pem(key.serialize_pem().as_bytes()).unwrap();
    let token = format!("Bearer {}", jsonwebtoken::encode(&header, &claims, &signing).unwrap());
    for _ in 0..5 {
        let answer = get(program.gateway, "/x", &[("authorization", &token)]).await.unwrap();
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    assert_eq!(program.get("/x").await.status, 401);
    let samples = samples(&program.ask("/metrics").await.text());
    let of = |name: &str| samples.get(&format!("portcullis_{name}")).copied().unwrap_or(-1.0);
    assert_eq!(of("token_cache_lookups_total{provider=\"p\",result=\"hit\"}"), 4.0);
    assert_eq!(of("token_cache_lookups_total{provider=\"p\",result=\"miss\"}"), 1.0);
    assert_eq!(of("key_set_fetches_total{provider=\"p\",result=\"ok\"}"), 1.0);
    assert!((0.0..60.0).contains(&of("key_set_age_seconds{provider=\"p\"}")), "{samples:?}");
    // They stay when something else of the provider changes, though nobody has them any more.
    server.abort();
    let realm = "auth.realm = \"other\"\ntrusted_proxies.hops = 1\n";
    program.write(&text.replace("[\"x\"]", "[\"x\", \"y\"]").replace("[[routes]]", &format!("{realm}[[routes]]")));
    assert_eq!(program.order("/reload", &json!(null)).await.text(), "the file is in force\n");
    assert_eq!(get(program.gateway, "/x", &[("authorization", &token)]).await.unwrap().status, 200);
}

fn base64_url(bytes: &[u8]) -> String {
    base64::Engine::encode(&base64::engine::general_purpose::URL_SAFE_NO_PAD, bytes)
}

#[tokio::test]
async fn pages_from_elsewhere_can_neither_read_nor_order() {
    let backend = Backend::start("one").await;
    let program = Program::start(&file(&[("a", &[backend.address()])], ALL));
    let (admin, own) = (program.admin, format!("http://{}", program.admin));
    let order = async |headers: &[(&str, &str)]| {
        request(admin, Method::POST, "/log", headers, "{\"level\": \"info\"}").await.unwrap().status.as_u16()
    };
    assert_eq!(order(&[]).await, 200, "no browser");
    assert_eq!(order(&[("origin", &own)]).await, 200, "its own page");
    for origin in ["null", "http://evil.example", "https://evil.example", "http://127.0.0.1", "http://localhost:1"] {
        assert_eq!(order(&[("origin", origin)]).await, 403, "{origin}");
    }
    for name in ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example"] {
        for target in ["/", "/state", "/config", "/metrics", "/live"] {
            let rebound = get(admin, &format!("http://{name}{target}"), &[]).await.unwrap();
            assert_eq!(rebound.status, 403, "a name of somebody else's that points here: {name}{target}");
        }
    }
    assert_eq!(get(admin, &format!("http://localhost:{}/live", admin.port()), &[]).await.unwrap().status, 200);
    let page = program.ask("/").await;
    assert!(page.header("content-security-policy").contains("frame-ancestors 'none'"));
    assert_eq!(page.header("x-content-type-options"), "nosniff");
    for method in [Method::PUT, Method::DELETE, Method::OPTIONS] {
        assert_eq!(request(admin, method, "/drain", &[], "").await.unwrap().status, 405);
    }
    let huge = "x".repeat(20_000);
    assert_eq!(request(admin, Method::POST, "/log", &[], huge).await.unwrap().status, 400);
    assert_eq!(program.order("/log", &json!({ "level": "info" })).await.status, 200);
}

#[tokio::test]
async fn a_service_can_be_held_open_as_a_whole() {
    let (one, two) = (Backend::start("one").await, Backend::start("two").await);
    let program = Program::start(&file(&[("a", &[one.address(), two.address()])], ALL));
    assert_eq!(program.order("/breaker", &json!({ "service": "a", "state": "open" })).await.text(), "done\n");
    assert_eq!(program.get("/").await.status, 503);
    let shown = program.ask("/endpoints").await.json();
    assert_eq!(shown["a"]["endpoints"][1]["condition"], "held");
    assert_eq!(program.order("/breaker", &json!({ "service": "a", "state": "auto" })).await.text(), "done\n");
    assert_eq!(program.get("/").await.status, 200);
    assert_eq!(program.order("/breaker", &json!({ "service": "b", "state": "auto" })).await.status, 404);
}

#[tokio::test]
async fn the_file_has_endpoints_asked_how_they_are_over_tcp_and_grpc() {
    let (reporter, service) = tonic_health::server::health_reporter();
    let (orders, server) = serve(([127, 0, 0, 1], 0).into(), service).await;
    reporter.set_service_status("shop.v1.Orders", ServingStatus::NotServing).await;
    let nobody = Nobody::new();
    let silent = nobody.address();
    let often = "interval = \"10ms\", unhealthy = 1, healthy = 1";
    let text = format!(
        "listeners.main = {{ address = \"127.0.0.1:0\" }}\nadmin = {{ address = \"127.0.0.1:0\" }}\n\
         services.tcp = {{ endpoints = [\"{orders}\", \"{silent}\"], health = {{ kind = \"tcp\", {often} }} }}\n\
         services.grpc = {{ endpoints = [\"{orders}\"], health = {{ kind = \"grpc\", path = \"shop.v1.Orders\", {often} }} }}\n\
         [[routes]]\npath = \"/tcp\"\nto = \"tcp\"\n[[routes]]\npath = \"/grpc\"\nto = \"grpc\"\n"
    );
    let program = Program::start(&text);
    let well = async |service: &str, index: usize, is_well: bool| {
        for _ in 0..1000 {
            let shown = program.ask("/endpoints").await.json();
            if shown[service]["endpoints"][index]["health"]["well"] == is_well {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{service} {index} is not {is_well}: {}", program.ask("/endpoints").await.text());
    };
    well("tcp", 0, true).await;
    well("tcp", 1, false).await;
    well("grpc", 0, false).await;
    reporter.set_service_status("shop.v1.Orders", ServingStatus::Serving).await;
    well("grpc", 0, true).await;
    until(&program, "/state", "sick").await;
    until(&program, "/metrics", "portcullis_service_endpoints{service=\"tcp\",state=\"sick\"} 1").await;
    server.abort();
}
