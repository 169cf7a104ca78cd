//! What happens to fields and targets.

use portcullis_forward::{Edit, Forward, Forwarded, Host, Paths, Policy};

use super::{OK, lines, refused, relay, same};

/// What the upstream sees besides what the client sent.
const OURS: [&str; 3] = ["via: 1.1 portcullis", "x-forwarded-for: 127.0.0.1", "x-forwarded-proto: http"];

/// Request fields in, request fields out, whatever we add taken away.
async fn passed(fields: &str) -> Vec<String> {
    let request = format!("GET / HTTP/1.1\r\nhost: a.test\r\n{fields}\r\n");
    let ((head, _), _) = relay(same, &request, OK).await;
    let seen = lines(&head);
    for line in OURS {
        assert!(seen.contains(&line), "{seen:?}");
    }
    let ours = |line: &&&str| OURS.contains(*line) || **line == "host: a.test" || **line == "x-forwarded-host: a.test";
    seen.iter().filter(|line| !ours(line)).map(|line| (*line).to_owned()).collect()
}

#[tokio::test]
async fn request_fields_pass_or_stay() {
    let none: &[&str] = &[];
    for (fields, left) in [
        ("", none),
        ("accept: x\r\nx-a: 1\r\nx-a: 2\r\n", &["accept: x", "x-a: 1", "x-a: 2"]),
        ("connection: keep-alive\r\nkeep-alive: timeout=5\r\n", none),
        ("connection: x-a\r\nconnection: x-b, x-c\r\nx-a: 1\r\nx-b: 2\r\nx-c: 3\r\nx-d: 4\r\n", &["x-d: 4"]),
        ("connection: authorization, x-forwarded-for, host\r\nauthorization: s\r\n", &["authorization: s"]),
        ("proxy-connection: keep-alive\r\nproxy-authorization: Basic x\r\nproxy-authenticate: y\r\n", none),
        ("te: gzip, trailers\r\nconnection: te\r\n", &["te: trailers"]),
        ("te: gzip\r\n", none),
        ("upgrade: h2c\r\nconnection: upgrade, http2-settings\r\nhttp2-settings: AAM\r\n", none),
        ("upgrade: websocket\r\n", none),
        ("expect: 100-continue\r\n", none),
        (
            "x-forwarded-for: 6.6.6.6\r\nforwarded: for=6.6.6.6\r\nx-real-ip: 6.6.6.6\r\nx-forwarded-prefix: /a\r\n",
            none,
        ),
        ("x-forwarded-proto: https\r\nx-forwarded-host: evil.test\r\nx-forwarded-port: 1\r\n", none),
        ("cookie: a=b\r\nrange: bytes=0-1\r\n", &["cookie: a=b", "range: bytes=0-1"]),
    ] {
        assert_eq!(passed(fields).await, left, "{fields:?}");
    }
}

#[tokio::test]
async fn via_is_added_to_and_tells_a_loop() {
    let request = "GET / HTTP/1.1\r\nhost: a\r\nvia: 1.0 fred\r\n\r\n";
    let ((head, _), (answer, _)) = relay(same, request, "HTTP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n").await;
    assert!(head.contains("via: 1.0 fred\r\nvia: 1.1 portcullis\r\n"), "{head}");
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.contains("via: 1.0 portcullis\r\n"), "{answer}");
    let request = "GET / HTTP/1.1\r\nhost: a\r\nvia: 1.1 x, 1.1 portcullis\r\n\r\n";
    assert!(refused(same, request).await.0.starts_with("HTTP/1.1 508 "));
    let named = |forward: Forward| forward.via("other").unwrap();
    let ((head, _), _) = relay(named, request, OK).await;
    assert!(head.contains("via: 1.1 other\r\n"), "{head}");
}

#[tokio::test]
async fn response_fields_pass_or_stay() {
    for (fields, left) in [
        ("x-a: 1\r\nset-cookie: a\r\nset-cookie: b\r\n", &["set-cookie: a", "set-cookie: b", "x-a: 1"][..]),
        ("connection: close, x-hop\r\nx-hop: 1\r\nkeep-alive: timeout=5\r\n", &[]),
        ("connection: set-cookie\r\nset-cookie: a\r\n", &["set-cookie: a"]),
        ("proxy-authenticate: Basic\r\nupgrade: h2c\r\nproxy-connection: close\r\n", &[]),
        ("te: trailers\r\n", &[]),
        ("server: nginx\r\n", &["server: nginx"]),
    ] {
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n{fields}\r\nok");
        let (_, (head, body)) = relay(same, "GET / HTTP/1.1\r\nhost: a\r\n\r\n", &answer).await;
        let mut want: Vec<_> = left.to_vec();
        want.extend(["content-length: 2", "via: 1.1 portcullis"]);
        want.sort_unstable();
        assert_eq!(lines(&head), want, "{fields:?}");
        assert_eq!(body, "ok");
    }
}

#[tokio::test]
async fn the_target_and_the_host_agree() {
    for (request, line, host) in [
        ("GET /a?b=c HTTP/1.1\r\nhost: h.test:81\r\n\r\n", "GET /a?b=c HTTP/1.1", "h.test:81"),
        ("GET http://x.test/a?b HTTP/1.1\r\nhost: h.test\r\n\r\n", "GET /a?b HTTP/1.1", "x.test"),
        ("GET http://x.test HTTP/1.1\r\nhost: x.test\r\n\r\n", "GET / HTTP/1.1", "x.test"),
        ("GET http://x.test?a HTTP/1.1\r\nhost: x.test\r\n\r\n", "GET /?a HTTP/1.1", "x.test"),
        ("OPTIONS * HTTP/1.1\r\nhost: h.test\r\n\r\n", "OPTIONS * HTTP/1.1", "h.test"),
        ("GET /%20%c3%A9;x=%3f?%zz=%2f HTTP/1.1\r\nhost: h\r\n\r\n", "GET /%20%c3%A9;x=%3f?%zz=%2f HTTP/1.1", "h"),
        ("GET / HTTP/1.1\r\nhost: [::1]:80\r\n\r\n", "GET / HTTP/1.1", "[::1]:80"),
        ("GET / HTTP/1.0\r\nhost: h\r\n\r\n", "GET / HTTP/1.1", "h"),
    ] {
        let ((head, _), _) = relay(same, request, OK).await;
        assert_eq!(head.lines().next(), Some(line));
        assert_eq!(lines(&head).iter().filter(|line| line.starts_with("host:")).count(), 1, "{head}");
        assert!(head.contains(&format!("\r\nhost: {host}\r\n")), "{head}");
    }
}

#[tokio::test]
async fn a_request_of_http_10_without_a_host_gets_the_endpoints() {
    let ((head, _), (answer, _)) = relay(same, "GET /old HTTP/1.0\r\n\r\n", OK).await;
    assert!(head.starts_with("GET /old HTTP/1.1\r\n"), "{head}");
    assert!(head.contains("\r\nhost: 127.0.0.1:"), "{head}");
    assert!(head.contains("via: 1.0 portcullis\r\n"), "{head}");
    assert!(answer.starts_with("HTTP/1.0 200 OK\r\n"), "{answer}");
}

#[tokio::test]
async fn what_two_could_read_differently_is_refused() {
    for (request, status) in [
        ("GET / HTTP/1.1\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nhost: a\r\nhost: a\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nhost: a b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nhost: u@a\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nhost: a/b\r\n\r\n", 400),
        ("GET http://u:p@a/ HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        ("GET /a/../b HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        ("GET /a/%2e%2E/b HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        ("GET //a HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        ("GET /%61dmin/x HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        ("GET /a/..;/admin HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        ("GET /a%2fb HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        ("GET /a%5Cb HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        ("GET /a%00 HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        ("CONNECT a.test:443 HTTP/1.1\r\nhost: a.test:443\r\n\r\n", 405),
        ("TRACE / HTTP/1.1\r\nhost: a\r\nmax-forwards: 0\r\n\r\n", 405),
        ("OPTIONS / HTTP/1.1\r\nhost: a\r\nmax-forwards: 0\r\n\r\n", 204),
        ("OPTIONS / HTTP/1.1\r\nhost: a\r\nmax-forwards: x\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nx", 400),
        ("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: +1\r\n\r\nx", 400),
        ("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, gzip\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        ("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 501),
        ("POST / HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nhost: a\r\nx y: 1\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nhost: a\r\nx : 1\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nhost: a\r\nx: 1\r\n folded\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nhost: a\r\nx: a\0b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nhost: a\r\nx: a\rb\r\n\r\n", 400),
    ] {
        let (head, _) = refused(same, request).await;
        assert!(
            head.starts_with(&format!("HTTP/1.1 {status} ")) || head.starts_with(&format!("HTTP/1.0 {status} ")),
            "{request:?} -> {head}"
        );
    }
}

#[tokio::test]
async fn max_forwards_counts_down() {
    let ((head, _), _) = relay(same, "OPTIONS / HTTP/1.1\r\nhost: a\r\nmax-forwards: 3\r\n\r\n", OK).await;
    assert!(head.contains("max-forwards: 2\r\n"), "{head}");
    let ((head, _), _) = relay(same, "GET / HTTP/1.1\r\nhost: a\r\nmax-forwards: 0\r\n\r\n", OK).await;
    assert!(head.contains("max-forwards: 0\r\n"), "it means nothing to GET: {head}");
}

#[tokio::test]
async fn a_route_may_redirect_or_pass_what_is_not_in_normal_form() {
    let paths = |paths: Paths| move |forward: Forward| forward.policy(Policy::new().paths(paths));
    let request = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n");
    let (head, _) = refused(paths(Paths::Redirect), &request("/a/../b//c?x=/../y")).await;
    assert!(head.starts_with("HTTP/1.1 308 "), "{head}");
    assert!(head.contains("location: /b/c?x=/../y\r\n"), "{head}");
    let (head, _) = refused(paths(Paths::Redirect), &request("/%61dmin/x")).await;
    assert!(head.contains("location: /admin/x\r\n"), "{head}");
    let (head, _) = refused(paths(Paths::Redirect), &request("/a%2fb")).await;
    assert!(head.starts_with("HTTP/1.1 400 "), "{head}");
    let ((head, _), _) = relay(paths(Paths::Pass), &request("//a/../b%2F"), OK).await;
    assert!(head.starts_with("GET //a/../b%2F HTTP/1.1\r\n"), "{head}");
}

#[tokio::test]
async fn prefixes_are_stripped_at_segments_and_added() {
    let policy = |strip: &str, add: &str| Policy::new().strip_prefix(strip).add_prefix(add);
    for (strip, add, path, sent) in [
        ("/api", "", "/api/x?q", "/x?q"),
        ("/api", "", "/api", "/"),
        ("/api", "", "/api?q", "/?q"),
        ("/api", "", "/api/", "/"),
        ("/api/", "", "/api/x", "/x"),
        ("/api", "", "/apiary", "/apiary"),
        ("", "/v2", "/x", "/v2/x"),
        ("/api", "/v2", "/api/x", "/v2/x"),
        ("/api", "/v2", "/api", "/v2"),
        ("/api", "/v2/", "/other", "/v2/other"),
    ] {
        let forward = |forward: Forward| forward.policy(policy(strip, add));
        let ((head, _), _) = relay(forward, &format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n"), OK).await;
        assert_eq!(head.lines().next(), Some(&*format!("GET {sent} HTTP/1.1")), "{strip} {add} {path}");
        let told = head.contains(&format!("x-forwarded-prefix: {}\r\n", strip.trim_end_matches('/')));
        assert_eq!(told, !strip.is_empty() && path.starts_with("/api") && path != "/apiary", "{head}");
    }
}

#[tokio::test]
async fn host_and_fields_are_rewritten() {
    let forward = |forward: Forward| {
        let policy = Policy::new()
            .host(Host::Fixed("fixed.test".parse().unwrap()))
            .edit_request(Edit::Set("x-set".parse().unwrap(), "1".parse().unwrap()))
            .edit_request(Edit::Add("x-add".parse().unwrap(), "2".parse().unwrap()))
            .edit_request(Edit::Remove("cookie".parse().unwrap()))
            .edit_response(Edit::Remove("server".parse().unwrap()))
            .edit_response(Edit::Set("x-frame-options".parse().unwrap(), "DENY".parse().unwrap()));
        forward.policy(policy).forwarded(Forwarded::Standard)
    };
    let request = "GET / HTTP/1.1\r\nhost: a.test\r\nx-set: 0\r\nx-add: 1\r\ncookie: c\r\n\r\n";
    let answer = "HTTP/1.1 200 OK\r\nserver: s\r\ncontent-length: 0\r\n\r\n";
    let ((head, _), (got, _)) = relay(forward, request, answer).await;
    assert_eq!(
        lines(&head),
        [
            "forwarded: for=127.0.0.1;proto=http;host=\"a.test\"",
            "host: fixed.test",
            "via: 1.1 portcullis",
            "x-add: 1",
            "x-add: 2",
            "x-set: 1",
        ]
    );
    assert_eq!(lines(&got), ["content-length: 0", "via: 1.1 portcullis", "x-frame-options: DENY"]);
    let endpoint = |forward: Forward| forward.policy(Policy::new().host(Host::Endpoint));
    let ((head, _), _) = relay(endpoint, request, answer).await;
    assert!(head.contains("host: 127.0.0.1:") && head.contains("x-forwarded-host: a.test\r\n"), "{head}");
}
