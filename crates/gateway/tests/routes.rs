//! What routes of the file say, through the running program: each way to match and each thing to do.
#![expect(clippy::expect_used, reason = "what helps the tests fails with them")]

mod common;

use std::collections::BTreeMap;
use std::net::SocketAddr;

use http::Method;
use portcullis_testing::Backend;
use portcullis_testing::client::{Answer, request};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use common::{Program, file, log};

/// A request, and what must come of it: the status, who answers, and what the backend or the answer says.
struct Case(&'static str, &'static [(&'static str, &'static str)], u16, &'static str);

/// Sends `METHOD target`, GET where no method is named.
async fn send(program: &Program, line: &str, headers: &[(&str, &str)], body: &'static str) -> Answer {
    let (method, target) = line.split_once(' ').unwrap_or(("GET", line));
    let method: Method = method.parse().expect("a method");
    let answer = request(program.gateway, method, target, headers, body).await;
    answer.unwrap_or_else(|error| panic!("{line}: {error}: {}", log(&program.folder)))
}

/// Sends each request and says of all together which went elsewhere.
async fn all_go_where_they_should(program: &Program, cases: &[Case]) {
    let mut wrong = Vec::new();
    for Case(line, headers, status, who) in cases {
        let answer = send(program, line, headers, "").await;
        if (answer.status.as_u16(), answer.header("x-backend")) != (*status, *who) {
            let (came, from) = (answer.status, answer.header("x-backend").to_owned());
            wrong.push(format!("{line} {headers:?}: {came} from {from:?} instead of {status} from {who:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

async fn backends<const N: usize>(names: [&'static str; N]) -> (Vec<Backend>, Vec<(&'static str, SocketAddr)>) {
    let mut all = Vec::new();
    for name in names {
        all.push(Backend::start(name).await);
    }
    let addresses = names.into_iter().zip(all.iter().map(Backend::address)).collect();
    (all, addresses)
}

fn services(addresses: &[(&'static str, SocketAddr)], more: &str) -> String {
    let one: Vec<(&str, [SocketAddr; 1])> = addresses.iter().map(|(name, address)| (*name, [*address])).collect();
    let all: Vec<(&str, &[SocketAddr])> = one.iter().map(|(name, address)| (*name, &address[..])).collect();
    file(&all, more)
}

#[tokio::test]
async fn the_most_specific_route_takes_a_request() {
    let (_running, addresses) = backends(["a", "b", "c", "d"]).await;
    // The general ones first, so that the order cannot be what decides.
    let program = Program::start(&services(
        &addresses,
        r#"
        [[routes]]
        path = "/{*rest}"
        to = "a"
        [[routes]]
        path = "/items/{*rest}"
        to = "b"
        [[routes]]
        path = "/items/{id}"
        to = "c"
        [[routes]]
        path = "/items/special"
        to = "d"

        [[routes]]
        hosts = "*.example.com"
        path = "/{*rest}"
        to = "b"
        [[routes]]
        hosts = ["*.eu.example.com", "example.org"]
        path = "/{*rest}"
        to = "c"
        [[routes]]
        hosts = "api.example.com"
        path = "/v1/{*rest}"
        to = "d"

        [[routes]]
        path = "/method"
        methods = ["GET", "PUT"]
        to = "b"
        [[routes]]
        path = "/method"
        methods = "POST"
        to = "c"

        [[routes]]
        path = "/header"
        to = "a"
        [[routes]]
        path = "/header"
        headers = { x-canary = "yes" }
        to = "b"
        [[routes]]
        path = "/header"
        headers = { x-canary = "yes", user-agent = { prefix = "curl/" } }
        to = "c"
        [[routes]]
        path = "/header"
        headers = { x-canary = { present = true }, x-old = { present = false }, x-kind = { exact = "d" } }
        to = "d"

        [[routes]]
        path = "/query"
        to = "a"
        [[routes]]
        path = "/query"
        query = { version = "2" }
        to = "b"
        [[routes]]
        path = "/query"
        query = { version = { prefix = "3." }, debug = { present = true } }
        to = "c"

        [[routes]]
        grpc = { service = "shop.v1.Orders" }
        to = "b"
        [[routes]]
        grpc = { service = "shop.v1.Orders", method = "Get" }
        to = "c"
        "#,
    ));
    let grpc: &[(&str, &str)] = &[("content-type", "application/grpc")];
    all_go_where_they_should(
        &program,
        &[
            // Paths.
            Case("/", &[], 200, "a"),
            Case("/items", &[], 200, "b"),
            Case("/items/7", &[], 200, "c"),
            Case("/items/special", &[], 200, "d"),
            Case("/items/7/parts", &[], 200, "b"),
            Case("/itemsandmore", &[], 200, "a"),
            // Hosts: whatever their case and port, and one that has no route for the path leaves it to the next.
            Case("http://shop.example.com/items/7", &[], 200, "b"),
            Case("http://SHOP.Example.com:8080/", &[], 200, "b"),
            Case("http://de.eu.example.com/", &[], 200, "c"),
            Case("http://example.org/", &[], 200, "c"),
            Case("http://example.com/", &[], 200, "a"),
            Case("http://api.example.com/v1/x", &[], 200, "d"),
            Case("http://api.example.com/v2/x", &[], 200, "b"),
            // Methods: GET takes HEAD along, and what no route takes is said to be the method's fault, unless another
            // pattern takes it.
            Case("/method", &[], 200, "b"),
            Case("HEAD /method", &[], 200, "b"),
            Case("PUT /method", &[], 200, "b"),
            Case("POST /method", &[], 200, "c"),
            Case("DELETE /method", &[], 200, "a"),
            // Headers: most of them wins.
            Case("/header", &[], 200, "a"),
            Case("/header", &[("x-canary", "yes")], 200, "b"),
            Case("/header", &[("x-canary", "yes"), ("user-agent", "curl/8")], 200, "c"),
            Case("/header", &[("x-canary", "no"), ("user-agent", "curl/8")], 200, "a"),
            Case("/header", &[("x-canary", "no"), ("x-kind", "d")], 200, "d"),
            Case("/header", &[("x-canary", "no"), ("x-kind", "d"), ("x-old", "1")], 200, "a"),
            // Query: decoded.
            Case("/query?version=1", &[], 200, "a"),
            Case("/query?version=2", &[], 200, "b"),
            Case("/query?version=%32&x", &[], 200, "b"),
            Case("/query?debug&version=3.1", &[], 200, "c"),
            Case("/query?version=3.1", &[], 200, "a"),
            // gRPC: only what is gRPC.
            Case("POST /shop.v1.Orders/Get", grpc, 200, "c"),
            Case("POST /shop.v1.Orders/List", grpc, 200, "b"),
            Case("POST /shop.v1.Orders/Get", &[], 200, "a"),
            Case("POST /shop.v1.Users/Get", grpc, 200, "a"),
        ],
    )
    .await;
}

#[tokio::test]
async fn what_no_route_takes_is_said_as_the_caller_understands_it() {
    let (_running, addresses) = backends(["a"]).await;
    let program = Program::start(&services(
        &addresses,
        "[[routes]]\npath = \"/a\"\nmethods = [\"GET\", \"PUT\"]\nto = \"a\"\n\
         [[routes]]\nhosts = \"only.here\"\npath = \"/b\"\nto = \"a\"\n",
    ));
    let missing = send(&program, "/c", &[], "").await;
    assert_eq!((missing.status.as_u16(), missing.header("content-type")), (404, "application/problem+json"));
    assert_eq!(missing.json()["reason"], "no-route", "{}", missing.text());
    let wrong = send(&program, "POST /a", &[], "").await;
    assert_eq!(wrong.status.as_u16(), 405);
    let mut allowed: Vec<&str> = wrong.header("allow").split(", ").collect();
    allowed.sort_unstable();
    assert_eq!(allowed, ["GET", "HEAD", "PUT"]);
    assert_eq!(send(&program, "/b", &[], "").await.status.as_u16(), 404);
    let call = send(&program, "POST /shop.v1.Orders/Get", &[("content-type", "application/grpc")], "").await;
    assert_eq!((call.status.as_u16(), call.header("grpc-status")), (200, "12"), "UNIMPLEMENTED");
}

#[tokio::test]
async fn requests_are_split_by_weight() {
    let (_running, addresses) = backends(["a", "b", "c"]).await;
    let to =
        "[[routes]]\npath = \"/\"\nto = [{ service = \"a\", weight = 3 }, \"b\", { service = \"c\", weight = 0 }]\n";
    let program = Program::start(&services(&addresses, to));
    let mut served = BTreeMap::<String, usize>::new();
    for _ in 0..400 {
        *served.entry(send(&program, "/", &[], "").await.header("x-backend").to_owned()).or_default() += 1;
    }
    // Six standard deviations are 52.
    assert!(served["a"].abs_diff(300) <= 52 && served["a"] + served["b"] == 400, "{served:?}");
}

#[tokio::test]
async fn what_is_sent_on_and_sent_back_is_as_the_route_says() {
    let (_running, addresses) = backends(["a"]).await;
    let program = Program::start(&services(
        &addresses,
        r#"
        [[routes]]
        path = "/api/{*rest}"
        strip_prefix = "/api"
        add_prefix = "/v1"
        to = "a"
        [[routes]]
        path = "/edits"
        request_headers = { set = { x-set = "new" }, add = { x-more = "two" }, remove = ["x-secret"] }
        response_headers = { set = { content-type = "text/plain" }, add = { x-served-by = "portcullis" }, remove = "x-backend" }
        to = "a"
        [[routes]]
        path = "/host/kept"
        to = "a"
        [[routes]]
        path = "/host/endpoint"
        host = "endpoint"
        to = "a"
        [[routes]]
        path = "/host/named"
        host = "inner.example"
        to = "a"
        [[routes]]
        path = "/redirect/{*rest}"
        paths = "redirect"
        to = "a"
        [[routes]]
        path = "/pass/{*rest}"
        paths = "pass"
        to = "a"
        [[routes]]
        path = "/small"
        max_body = 4
        to = "a"
        [[routes]]
        path = "/short"
        max_response = "1B"
        to = "a"
        "#,
    ));
    let told = async |line: &str, headers: &[(&str, &str)]| send(&program, line, headers, "").await.json();
    for (asked, target) in [("/api/x?y=1", "/v1/x?y=1"), ("/api", "/v1"), ("/api/", "/v1/")] {
        let told = told(asked, &[]).await;
        assert_eq!(
            (told["target"].as_str(), told["headers"]["x-forwarded-prefix"].as_str()),
            (Some(target), Some("/api"))
        );
    }
    let answer = send(&program, "/edits", &[("x-set", "old"), ("x-more", "one"), ("x-secret", "1")], "").await;
    let sent = &answer.json()["headers"];
    assert_eq!((&sent["x-set"], &sent["x-more"], &sent["x-secret"]), (&"new".into(), &"two".into(), &().into()));
    assert_eq!((answer.header("content-type"), answer.header("x-served-by")), ("text/plain", "portcullis"));
    assert_eq!(answer.header("x-backend"), "");
    let own = program.gateway.to_string();
    let endpoint = addresses[0].1.to_string();
    for (path, host) in [("/host/kept", own.as_str()), ("/host/endpoint", &endpoint), ("/host/named", "inner.example")]
    {
        assert_eq!(told(path, &[]).await["headers"]["host"], host, "{path}");
    }
    let moved = send(&program, "/redirect/a//b?c", &[], "").await;
    assert_eq!((moved.status.as_u16(), moved.header("location")), (308, "/redirect/a/b?c"));
    assert_eq!(send(&program, "/api/a//b", &[], "").await.status.as_u16(), 400);
    assert_eq!(told("/pass/a//b", &[]).await["target"], "/pass/a//b");
    assert_eq!(send(&program, "POST /small", &[], "four").await.status.as_u16(), 200);
    assert_eq!(send(&program, "POST /small", &[], "fives").await.status.as_u16(), 413);
    assert_eq!(send(&program, "/short", &[], "").await.status.as_u16(), 502);
}

#[tokio::test]
async fn redirects_fixed_answers_and_preflights_need_nobody_behind() {
    let (_running, addresses) = backends(["a"]).await;
    let program = Program::start(&services(
        &addresses,
        r#"
        auth.providers.p = { secret = "a secret that is long enough for HS256, by far" }
        [[routes]]
        path = "/old/{*rest}"
        redirect = { status = 308, scheme = "https", host = "example.com:8443", path = "/new" }
        [[routes]]
        path = "/secure"
        redirect = { scheme = "https" }
        [[routes]]
        path = "/robots.txt"
        respond = { status = 203, body = "nobody\n", content_type = "text/x-robots" }
        [[routes]]
        path = "/shared"
        to = "a"
        cors = { origins = ["https://app.example.com"], methods = ["PUT"], headers = ["x-tenant"], expose = ["x-backend"], credentials = true, max_age = "10m" }
        [[routes]]
        path = "/public"
        auth = "none"
        to = "a"
        cors = { origins = "*", headers = "*" }
        "#,
    ));
    let old = send(&program, "/old/a?b=1", &[], "").await;
    assert_eq!((old.status.as_u16(), old.header("location")), (308, "https://example.com:8443/new?b=1"));
    let secure = send(&program, "http://a.example:80/secure", &[], "").await;
    assert_eq!((secure.status.as_u16(), secure.header("location")), (302, "https://a.example/secure"));
    let fixed = send(&program, "/robots.txt", &[], "").await;
    assert_eq!((fixed.status.as_u16(), fixed.header("content-type")), (203, "text/x-robots"));
    assert_eq!(fixed.text(), "nobody\n");

    let preflight = async |path: &str, origin: &str| {
        let headers = [
            ("origin", origin),
            ("access-control-request-method", "PUT"),
            ("access-control-request-headers", "x-tenant"),
        ];
        send(&program, &format!("OPTIONS {path}"), &headers, "").await
    };
    let given = preflight("/shared", "https://app.example.com").await;
    assert_eq!(given.status.as_u16(), 204);
    let field = |name: &str| given.header(&format!("access-control-{name}")).to_owned();
    assert_eq!(field("allow-origin"), "https://app.example.com");
    assert_eq!(field("allow-methods"), "GET, HEAD, POST, PUT");
    assert_eq!((field("allow-headers"), field("allow-credentials")), ("x-tenant".into(), "true".into()));
    assert_eq!(field("max-age"), "600");
    let refused = preflight("/shared", "https://evil.example").await;
    assert_eq!((refused.status.as_u16(), refused.header("access-control-allow-origin")), (204, ""));
    let public = preflight("/public", "https://anybody.example").await;
    assert_eq!(public.header("access-control-allow-origin"), "*");
    assert_eq!(public.header("access-control-allow-headers"), "x-tenant");
    let answer = send(&program, "/public", &[("origin", "https://anybody.example")], "").await;
    assert_eq!((answer.status.as_u16(), answer.header("access-control-allow-origin")), (200, "*"));
    // A page may read why it was refused.
    let refused = send(&program, "/shared", &[("origin", "https://app.example.com")], "").await;
    assert_eq!(
        (refused.status.as_u16(), refused.header("access-control-allow-origin")),
        (401, "https://app.example.com")
    );
}

#[tokio::test]
async fn a_route_has_its_own_times_its_own_subset_its_own_hash_and_tunnels() {
    let (running, _) = backends(["a", "b", "c"]).await;
    // Takes connections and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let echoing = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let echo_at = echoing.local_addr().expect("a bound socket");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = echoing.accept().await {
            let (mut read, mut write) = stream.split();
            let _ = tokio::io::copy(&mut read, &mut write).await;
        }
    });
    let list: Vec<String> = running.iter().map(|backend| backend.address().to_string()).collect();
    let program = Program::start(&file(
        &[("silent", &[silent.local_addr().expect("a bound socket")]), ("echo", &[echo_at])],
        &format!(
            r#"
            [services.some]
            endpoints = [{{ address = "{}", tags = ["v1"] }}, {{ address = "{}", tags = ["v2"], metadata = {{ by = "us" }} }}]
            [services.many]
            endpoints = ["{}", "{}", "{}"]
            balance = {{ policy = "ring-hash", hash = "header:x-user", points = 64 }}
            [[routes]]
            path = "/whole"
            timeout = "50ms"
            to = "silent"
            [[routes]]
            path = "/part"
            timeouts = {{ response = "50ms" }}
            to = "silent"
            [[routes]]
            path = "/tagged"
            subset = {{ tags = "v2" }}
            to = "some"
            [[routes]]
            path = "/described"
            subset = {{ metadata = {{ by = "them" }} }}
            to = "some"
            [[routes]]
            path = "/any"
            subset = {{ metadata = {{ by = "them" }}, or_any = true }}
            to = "some"
            [[routes]]
            path = "/user"
            to = "many"
            [[routes]]
            path = "/cart/{{id}}"
            hash = [["path", "query:part"], "path"]
            to = "many"
            [[routes]]
            path = "/{{*rest}}"
            methods = "CONNECT"
            hosts = "db.example.com"
            tunnels = true
            to = "echo"
            "#,
            list[0], list[1], list[0], list[1], list[2]
        ),
    ));
    for path in ["/whole", "/part"] {
        assert_eq!(send(&program, path, &[], "").await.status.as_u16(), 504, "{path}");
    }
    for _ in 0..4 {
        assert_eq!(send(&program, "/tagged", &[], "").await.header("x-backend"), "b");
    }
    assert_eq!(send(&program, "/described", &[], "").await.status.as_u16(), 503);
    assert_eq!(send(&program, "/any", &[], "").await.status.as_u16(), 200);

    // The same goes to the same, and not everything does.
    let served = async |line: &str, user: &str| {
        let answer = send(&program, line, &[("x-user", user)], "").await;
        answer.header("x-backend").to_owned()
    };
    let all = async |user: &str| {
        let (mut by_user, mut by_path, mut by_both) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..24 {
            by_user.push(served("/user", &number.to_string()).await);
            by_path.push(served(&format!("/cart/{number}"), user).await);
            by_both.push(served(&format!("/cart/1?part={number}"), user).await);
        }
        [by_user, by_path, by_both]
    };
    // The ring is built beside the first requests, which go elsewhere.
    let mut seen = all("one").await;
    for round in 0.. {
        let again = all("another").await;
        if seen == again {
            break;
        }
        assert!(round < 50, "{seen:?} and then {again:?}");
        seen = again;
    }
    for served in seen {
        assert!(served.iter().any(|who| *who != served[0]), "{served:?}");
    }

    let mut tunnel = TcpStream::connect(program.gateway).await.expect("the gateway");
    let connect = b"CONNECT db.example.com:5432 HTTP/1.1\r\nhost: db.example.com:5432\r\n\r\n";
    tunnel.write_all(connect).await.expect("a connection");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        assert!(tunnel.read_buf(&mut head).await.expect("a connection") > 0, "{}", String::from_utf8_lossy(&head));
    }
    assert!(head.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&head));
    tunnel.write_all(b"anything").await.expect("a tunnel");
    let mut back = [0; 8];
    tunnel.read_exact(&mut back).await.expect("a tunnel");
    assert_eq!(&back, b"anything");
}
