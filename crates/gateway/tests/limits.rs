//! What the file says of limits and of whom routes let in, through the running program.
#![expect(clippy::expect_used, reason = "what helps the tests fails with them")]

mod common;

use http::Method;
use portcullis_testing::Backend;
use portcullis_testing::client::{Answer, request};
use portcullis_testing::token::hs256;
use serde_json::{Value as Json, json};
use tokio::net::TcpListener;

use common::{ALL, Program, file, log};

const SECRET: &str = "a secret that is long enough for HS256, by far";

type Headers<'a> = &'a [(&'a str, &'a str)];

async fn send(program: &Program, line: &str, headers: Headers<'_>) -> Answer {
    let (method, target) = line.split_once(' ').unwrap_or(("GET", line));
    let method: Method = method.parse().expect("a method");
    let answer = request(program.gateway, method, target, headers, "").await;
    answer.unwrap_or_else(|error| panic!("{line}: {error}: {}", log(&program.folder)))
}

/// What becomes of each of these requests, one after the other.
async fn statuses(program: &Program, requests: &[(&str, Headers<'_>)]) -> Vec<u16> {
    let mut statuses = Vec::new();
    for (line, headers) in requests {
        statuses.push(send(program, line, headers).await.status.as_u16());
    }
    statuses
}

/// A gateway in front of one backend, with this besides.
async fn gateway(more: &str) -> (Backend, Program) {
    let backend = Backend::start("one").await;
    let program = Program::start(&file(&[("a", &[backend.address()])], more));
    (backend, program)
}

#[tokio::test]
async fn who_counts_together_is_as_the_file_says() {
    let (_backend, program) = gateway(&format!(
        r#"
        limiter.default = "each"
        limits.each = {{ rate = "1/h", key = ["header:x-tenant", ["header:x-user", "method"]] }}
        limits.service = {{ rate = "2/h", key = "service" }}
        limits.route = {{ rate = "1/h", key = "route" }}
        {ALL}
        [[routes]]
        path = "/service"
        to = "a"
        limits = "service"
        [[routes]]
        name = "r"
        path = "/route/{{id}}"
        to = "a"
        limits = ["route"]
        "#
    ))
    .await;
    let (acme, other, ada): (Headers<'_>, Headers<'_>, Headers<'_>) =
        (&[("x-tenant", "acme")], &[("x-tenant", "other")], &[("x-user", "ada")]);
    let asked =
        [("/", acme), ("/x", acme), ("/", other), ("/", ada), ("/", ada), ("PUT /", ada), ("/", &[]), ("/", &[])];
    assert_eq!(statuses(&program, &asked).await, [200, 429, 200, 200, 429, 200, 200, 429]);
    assert_eq!(
        statuses(&program, &[("/service", acme), ("/service", other), ("/service", ada)]).await,
        [200, 200, 429]
    );
    assert_eq!(statuses(&program, &[("/route/1", acme), ("/route/2", other)]).await, [200, 429]);
}

#[tokio::test]
async fn plans_priorities_and_costs_are_as_the_file_says() {
    let (_backend, program) = gateway(
        r#"
        auth.default = "optional"
        auth.providers.keys.api_keys = [{ key = "a key that nobody guesses", subject = "ada", roles = ["staff", "gold"] }]
        limits.planned = { rate = "1/h", plan = { by = "role", rates = { gold = { rate = "10/h", burst = 3 } } } }
        limits.ranked = { rate = "4/h", key = "everyone", priority = { by = "header:x-priority", leave = { batch = 50 }, otherwise = 0 } }
        limits.dear = { rate = "4/h", cost = 2 }
        limits.told = { rate = "4/h", settle = "header:x-cost" }
        limits.sized = { rate = "200/h", settle = "bytes" }
        limits.failing = { rate = "2/h", settle = "failures" }
        [[routes]]
        path = "/planned"
        to = "a"
        limits = "planned"
        [[routes]]
        path = "/ranked"
        to = "a"
        limits = "ranked"
        [[routes]]
        path = "/dear"
        to = "a"
        limits = "dear"
        [[routes]]
        path = "/told"
        to = "a"
        limits = "told"
        response_headers.set = { x-cost = "3.5" }
        [[routes]]
        path = "/call"
        to = "a"
        limits = "failing"
        response_headers.set = { grpc-status = "16" }
        [[routes]]
        path = "/sized"
        to = "a"
        limits = "sized"
        [[routes]]
        path = "/status/{code}"
        to = "a"
        limits = "failing"
        retry.attempts = 1
        "#,
    )
    .await;
    let ada: Headers<'_> = &[("x-api-key", "a key that nobody guesses")];
    let planned = [("/planned", ada), ("/planned", ada), ("/planned", ada), ("/planned", ada), ("/planned", &[][..])];
    assert_eq!(statuses(&program, &planned).await, [200, 200, 200, 429, 200]);
    assert_eq!(statuses(&program, &[("/planned", &[])]).await, [429]);
    let batch: Headers<'_> = &[("x-priority", "batch")];
    let ranked =
        [("/ranked", batch), ("/ranked", batch), ("/ranked", batch), ("/ranked", &[][..]), ("/ranked", &[][..])];
    assert_eq!(statuses(&program, &ranked).await, [200, 200, 429, 200, 200]);
    assert_eq!(statuses(&program, &[("/ranked", &[])]).await, [429]);
    for path in ["/dear", "/call", "/told", "/sized"] {
        let expected: &[u16] = if matches!(path, "/dear" | "/call") { &[200, 200, 429] } else { &[200, 429, 429] };
        assert_eq!(statuses(&program, &[(path, &[]), (path, &[]), (path, &[])]).await, expected, "{path}");
    }
    let [well, ill]: [(&str, Headers<'_>); 2] = [("/status/200", &[]), ("/status/404", &[])];
    assert_eq!(
        statuses(&program, &[well, well, well, ill, well, ill, well]).await,
        [200, 200, 200, 404, 200, 404, 429]
    );
}

#[tokio::test]
async fn who_comes_too_often_waits_or_is_let_in_or_told_as_the_file_says() {
    let gateways = |limiter: &str, limit: &str| {
        let more =
            format!("limiter = {{ default = \"each\", {limiter} }}\nlimits.each = {{ burst = 1, {limit} }}\n{ALL}");
        async move { gateway(&more).await }
    };
    let (_one, delays) = gateways("delay = \"1m\"", "rate = \"20/s\"").await;
    let begun = tokio::time::Instant::now();
    assert_eq!(statuses(&delays, &[("/", &[][..]); 5]).await, [200; 5]);
    assert!(begun.elapsed() >= std::time::Duration::from_millis(200), "one each 50 ms");
    let (_two, full) = gateways("delay = \"1m\", delay_places = 0", "rate = \"1/50s\"").await;
    let (_three, shadow) = gateways("fields = \"never\"", "rate = \"1/h\", shadow = true").await;
    assert_eq!(statuses(&shadow, &[("/", &[][..]); 5]).await, [200; 5]);
    let (_four, always) = gateways("fields = \"always\", legacy_fields = true", "rate = \"1/h\"").await;
    let (_five, never) = gateways("fields = \"never\"", "rate = \"1/h\"").await;
    for status in [200, 429] {
        let answer = send(&always, "/", &[]).await;
        assert_eq!((answer.status.as_u16(), answer.header("x-ratelimit-limit")), (status, "1"));
        assert!(answer.header("ratelimit").starts_with("\"each\""), "{:?}", answer.headers);
        let answer = send(&never, "/", &[]).await;
        let says = |name: &str| answer.headers.contains_key(name);
        assert_eq!((answer.status.as_u16(), says("ratelimit"), says("retry-after")), (status, false, status == 429));
        // On refusals, unless said otherwise; and nobody may wait.
        let answer = send(&full, "/", &[]).await;
        assert_eq!((answer.status.as_u16(), answer.headers.contains_key("ratelimit")), (status, status == 429));
    }
}

#[tokio::test]
async fn some_are_exempt_and_some_limits_stand_beside_others() {
    let (_backend, program) = gateway(&format!(
        r#"
        auth.default = "optional"
        auth.providers.keys.api_keys = [
            {{ key = "a key that nobody guesses", subject = "monitor" }},
            {{ key = "a key that nobody knows of", subject = "root", roles = ["admin"] }},
            {{ key = "a key of somebody else's", subject = "ada" }},
        ]
        limiter = {{ default = "each", exempt = {{ paths = "/health", subjects = "monitor", roles = "admin" }} }}
        limits = {{ each = {{ rate = "2/h" }}, more = {{ rate = "9/h" }} }}
        {ALL}
        [[routes]]
        path = "/beside"
        to = "a"
        limits = "more"
        default_limits = true
        [[routes]]
        path = "/instead"
        to = "a"
        limits = "more"
        "#
    ))
    .await;
    let key = |key: &'static str| [("x-api-key", key)];
    let (monitor, root, ada) =
        (key("a key that nobody guesses"), key("a key that nobody knows of"), key("a key of somebody else's"));
    for (line, headers) in [("/health", &[][..]), ("/", &monitor), ("/", &root)] {
        assert_eq!(statuses(&program, &[(line, headers); 4]).await, [200; 4], "{line} {headers:?}");
    }
    assert_eq!(statuses(&program, &[("/", &ada), ("/beside", &ada), ("/beside", &ada)]).await, [200, 200, 429]);
    assert_eq!(statuses(&program, &[("/instead", &ada[..]); 3]).await, [200; 3]);

    let (_backend, program) = gateway(&format!(
        "limiter = {{ default = \"each\", exempt.networks = \"127.0.0.0/8\" }}\nlimits.each.rate = \"1/h\"\n{ALL}"
    ))
    .await;
    assert_eq!(statuses(&program, &[("/", &[][..]); 3]).await, [200; 3]);
}

#[tokio::test]
async fn so_many_requests_are_under_way_to_a_service_and_no_more() {
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let at = silent.local_addr().expect("a bound socket");
    let more =
        format!("limiter.default = \"at_once\"\nlimits.at_once = {{ max_in_flight = 1, key = \"service\" }}\n{ALL}");
    let program = Program::start(&file(&[("a", &[at])], &more));
    let waiting = tokio::spawn(portcullis_testing::client::get(program.gateway, "/", &[]));
    let connection = silent.accept().await.expect("a request");
    assert_eq!(program.get("/").await.status, 429);
    waiting.abort();
    drop(connection);
}

/// What was further in was never found: all counted together with who has no such claim.
#[tokio::test]
async fn callers_are_told_apart_by_what_stands_further_in_in_their_claims() {
    let (_backend, program) = gateway(&format!(
        r#"
        auth.providers.tokens = {{ secret = "{SECRET}", insecure_without_expiry = true, require = "/org/id" }}
        limiter.default = "each"
        [limits.each]
        rate = "1/h"
        key = "claim:/org/id"
        plan = {{ by = "claim:/org/plan", rates = {{ gold = "2/h" }} }}
        {ALL}
        "#
    ))
    .await;
    for (subject, org, status) in [
        ("ada", json!({ "id": 7 }), 200),
        ("bob", json!({ "id": 7 }), 429),
        ("ada", json!({ "id": 8, "plan": "gold" }), 200),
        ("bob", json!({ "id": 8, "plan": "gold" }), 200),
        ("eve", json!({ "id": 8, "plan": "gold" }), 429),
        ("eve", json!({}), 401),
    ] {
        let token = format!("Bearer {}", hs256(SECRET.as_bytes(), &json!({ "sub": subject, "org": org })));
        assert_eq!(send(&program, "/", &[("authorization", &token)]).await.status, status, "{subject} of {org}");
    }
}

#[tokio::test]
async fn callers_are_let_in_by_their_claims_and_preflights_without_asking() {
    let (_backend, program) = gateway(&format!(
        r#"
        auth.preflight = true
        auth.providers.tokens = {{ secret = "{SECRET}", insecure_without_expiry = true, max_token = 400 }}
        {ALL}
        [[routes]]
        path = "/acme"
        to = "a"
        auth.claims = {{ tenant = "acme", "/org/id" = "7", "/groups" = "one", trusted = "true" }}
        "#
    ))
    .await;
    let acme = json!({ "sub": "ada", "tenant": "acme", "org": { "id": 7 }, "groups": ["two", "one"], "trusted": true });
    let ask = async |path: &str, claims: &Json| {
        let token = format!("Bearer {}", hs256(SECRET.as_bytes(), claims));
        send(&program, path, &[("authorization", &token)]).await.status.as_u16()
    };
    assert_eq!(ask("/acme", &acme).await, 200);
    for (claim, value) in [
        ("tenant", json!("other")),
        ("tenant", json!(null)),
        ("org", json!({ "id": 8 })),
        ("org", json!(7)),
        ("groups", json!(["two"])),
        ("trusted", json!(false)),
    ] {
        let mut claims = acme.clone();
        claims[claim] = value;
        assert_eq!((ask("/acme", &claims).await, ask("/", &claims).await), (403, 200), "{claims}");
    }
    assert_eq!(ask("/", &json!({ "sub": "x".repeat(400) })).await, 401, "too long");
    let preflight: Headers<'_> = &[("origin", "https://a.example"), ("access-control-request-method", "PUT")];
    let asked = [("OPTIONS /", preflight), ("OPTIONS /", &[][..])];
    assert_eq!(statuses(&program, &asked).await, [200, 401]);
}
