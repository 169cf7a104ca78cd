//! What is secret is not shown, what is to be encrypted is, and nobody gets in by what a file leaves out.

mod common;

use std::convert::Infallible;
use std::net::SocketAddr;

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::Full;
use portcullis::serve::{Incoming, Server, ServerTls};
use portcullis_testing::Backend;
use portcullis_testing::client::{get, request};
use portcullis_testing::process::scratch_folder;
use serde_json::json;

use common::{ALL, Program, file, log, program};

/// The new file's address was looked at, and the socket stayed where it was.
#[tokio::test]
async fn no_reload_lets_everybody_change_things_where_the_operators_side_is_bound() {
    let text = |admin: &str| file(&[], &format!("admin = {{ {admin} }}\n[[routes]]\npath = \"/\"\nrespond = {{}}\n"));
    let token = [("authorization", "Bearer sesame")];
    let program = Program::start(&text("address = \"0.0.0.0:0\", writable = true, token = \"sesame\""));
    let order = async |headers: &[(&str, &str)]| {
        request(program.admin, Method::POST, "/reload", headers, "").await.expect("an answer")
    };
    assert_eq!(order(&[]).await.status, 401);
    assert_eq!(order(&[("authorization", "Bearer ")]).await.status, 401);
    for admin in ["address = \"127.0.0.1:1\", writable = true", "enabled = false, writable = true"] {
        program.write(&text(admin));
        let refused = order(&token).await;
        assert_eq!(refused.status, 422, "{admin}");
        assert!(refused.text().contains("until the next start, where others reach it"), "{}", refused.text());
        assert_eq!(order(&[]).await.status, 401, "{admin}");
    }
    program.write(&text("address = \"127.0.0.1:1\", writable = false"));
    assert_eq!(order(&token).await.status, 200);
    assert_eq!(order(&token).await.status, 403);
}

/// Instances of a registry were talked to in plain text, whatever the file said.
#[tokio::test]
async fn https_holds_for_instances_that_a_registry_knows() {
    let pair = rcgen::generate_simple_self_signed([String::from("orders.internal")]).expect("a certificate");
    let tls = ServerTls::new(pair.cert.pem().as_bytes(), pair.signing_key.serialize_pem().as_bytes()).expect("a pair");
    let service = tower::service_fn(|request: Request<Incoming>| async move {
        Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(format!("{:?}", request.version())))))
    });
    let server = Server::bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a port").tls(tls);
    let address = server.local_addr().expect("an address");
    tokio::spawn(server.serve(service));
    let folder = scratch_folder("https");
    std::fs::write(folder.join("ca.pem"), pair.cert.pem()).expect("a folder to write in");
    let known = json!({ "services": { "a": [{ "address": address.to_string() }] } });
    std::fs::write(folder.join("instances.json"), known.to_string()).expect("a folder to write in");
    let text = |says: &str| {
        let registry = "registries.r = { kind = \"file\", path = \"instances.json\" }\n";
        let tls = "{ ca = \"ca.pem\", name = \"orders.internal\" }";
        file(&[], &format!("{registry}services.a = {{ registry = \"r\", tls = {tls}{says} }}\n{ALL}"))
    };
    let program = Program::start_in(folder, &text(", https = true, protocol = \"http2\""));
    assert_eq!(program.get("/").await.text(), "HTTP/2.0");
    // Also when the file says so later.
    for (says, expected) in [("", 502), (", https = true", 200)] {
        program.write(&text(says));
        assert_eq!(program.order("/reload", &json!(null)).await.status, 200);
        // What was known is talked to as before until the registry has answered.
        let told = async { while program.get("/").await.status != expected {} };
        tokio::time::timeout(std::time::Duration::from_secs(20), told).await.unwrap_or_else(|_| panic!("{says}"));
    }
}

/// What was no table was written out in whole, to the log and to whoever asks the operators' side.
#[tokio::test]
async fn secrets_that_stand_where_a_table_belongs_are_not_shown() {
    let sound = file(&[], "[[routes]]\npath = \"/\"\nrespond = {}\n");
    let program_at_work = Program::start(&sound);
    for wrong in [
        "auth.providers.p.api_keys = [\"sesame-is-secret\"]",
        "auth.providers.p.users = \"ada:sesame-is-secret\"",
        "auth.providers.p = \"sesame-is-secret\"",
        "limiter.redis = \"redis://:sesame-is-secret@127.0.0.1\"",
        "auth.providers.p.api_keys = { sesame-is-secret = \"ada\" }",
        "auth.providers.p.users = [{ name = \"ada\", sesame-is-secret = 1 }]",
        "auth.providers.p.users = [{ name = \"ada\", password = { sesame-is-secret = \"\" } }]",
        "auth.providers.p = { sesame-is-secret = 1 }",
    ] {
        program_at_work.write(&format!("{wrong}\n{sound}"));
        let answer = program_at_work.order("/reload", &json!(null)).await;
        assert_eq!(answer.status, 422);
        let path = program_at_work.folder.join("gateway.toml");
        let checked = program(&["check", "--config"]).arg(&path).output().expect("the program");
        let shown = [
            answer.text(),
            String::from_utf8_lossy(&checked.stderr).into_owned(),
            program_at_work.ask("/state").await.text(),
            log(&program_at_work.folder),
        ];
        assert!(shown[0].contains(":1:"), "{wrong}: {}", shown[0]);
        assert!(!shown.concat().contains("sesame"), "{wrong}: {shown:?}");
    }
    let events = program_at_work.ask("/state").await.json()["events"].to_string();
    assert!(events.contains("gateway.toml: wrong at 1:"), "{events}");
}

/// `failures` held for tokens alone.
#[tokio::test]
async fn an_address_may_not_guess_keys_and_passwords_more_often_than_the_file_says() {
    let backend = Backend::start("one").await;
    for (kind, header, wrong, right) in [
        (
            "api_keys = [{ key = \"a key that nobody guesses\", subject = \"x\" }]",
            "x-api-key",
            "wrong",
            "a key that nobody guesses",
        ),
        (
            "users = [{ name = \"ada\", password = \"a long password\" }]",
            "authorization",
            "Basic YTpi",
            "Basic YWRhOmEgbG9uZyBwYXNzd29yZA==",
        ),
    ] {
        let more = format!("auth.providers.p = {{ {kind}, failures = \"3/h\" }}\n{ALL}");
        let program = Program::start(&file(&[("a", &[backend.address()])], &more));
        assert_eq!(program.with(&[(header, right)]).await.status, 200);
        let mut statuses = Vec::new();
        for _ in 0..5 {
            statuses.push(program.with(&[(header, wrong)]).await.status.as_u16());
        }
        assert_eq!(statuses, [401, 401, 401, 429, 429], "{kind}");
    }
}

/// The file says that callers cannot set them; without a provider nobody saw to it.
#[tokio::test]
async fn callers_cannot_set_identity_headers_also_where_nobody_is_asked() {
    let backend = Backend::start("one").await;
    let more = format!("auth.headers = {{ subject = \"x-subject\" }}\n{ALL}");
    let program = Program::start(&file(&[("a", &[backend.address()])], &more));
    let seen = program.with(&[("x-subject", "king"), ("x-other", "stays")]).await.json()["headers"].to_string();
    assert!(!seen.contains("king") && seen.contains("stays"), "{seen}");
}

#[tokio::test]
async fn what_a_route_sets_may_be_a_secret_and_is_not_shown() {
    let backend = Backend::start("one").await;
    let more = "[[routes]]\npath = \"/{*rest}\"\nto = \"a\"\n\
         request_headers.set = { x-upstream = { file = \"secret\" }, authorization = \"Bearer sesame-2\", x-plain = \"plain\", x-empty = \"\" }\n\
         request_headers.add = { x-tenant-key = \"sesame-3\" }\n";
    let folder = scratch_folder("headers");
    std::fs::write(folder.join("secret"), "sesame-1\n").expect("a folder to write in");
    let program = Program::start_in(folder, &file(&[("a", &[backend.address()])], more));
    let seen = get(program.gateway, "/", &[]).await.expect("an answer").json()["headers"].to_string();
    for sent in ["sesame-1", "Bearer sesame-2", "sesame-3", "plain", "x-empty"] {
        assert!(seen.contains(sent), "{sent}: {seen}");
    }
    let shown = program.ask("/config").await.text();
    assert!(!shown.contains("sesame") && shown.contains("\"x-plain\": \"plain\""), "{shown}");
}
