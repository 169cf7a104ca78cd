//! What goes wrong, and what the caller is told.

use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full};
use portcullis_core::{Body, Carried, Classify, Clock, Deadline, Head, Outcome, Rejection, Side, Standard, Verdict};
use portcullis_forward::{Forward, Policy, ResponseBody};
use tokio::net::TcpListener;
use tower::{Service, ServiceExt};

use super::{LONG, OK, Raw, Upstream, client, pass, relay, same, within};

fn get(path: &str) -> Request<Empty<Bytes>> {
    Request::builder().uri(path).header("host", "a").body(Empty::new()).unwrap()
}

async fn call<B>(forward: &Forward, request: Request<B>) -> Response<Body<ResponseBody>>
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<portcullis_forward::BoxError>,
{
    let mut forward = forward.clone();
    within(forward.call(request)).await.unwrap()
}

fn rejection(response: &Response<Body<ResponseBody>>) -> (u16, &'static str, bool) {
    let rejection = response.extensions().get::<Rejection>().expect("a rejection");
    assert_eq!(rejection.status(), response.status());
    (rejection.status().as_u16(), rejection.reason(), rejection.sent())
}

async fn closed_port() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap().to_string()
}

#[tokio::test]
async fn without_an_endpoint_the_answer_names_the_missing_layer() {
    let response = call(&Forward::new(), get("/")).await;
    assert_eq!(rejection(&response), (500, "no-endpoint", false));
    assert!(response.extensions().get::<Rejection>().unwrap().detail().contains("balance"));
}

#[tokio::test]
async fn a_refused_connection_is_502_and_nothing_was_sent() {
    let forward = Forward::to(&closed_port().await).unwrap();
    assert_eq!(rejection(&call(&forward, get("/")).await), (502, "connect-failed", false));
    let response =
        forward.oneshot(Request::post("/").header("host", "a").body(Full::from("x")).unwrap()).await.unwrap();
    assert_eq!(rejection(&response), (502, "connect-failed", false));
}

#[tokio::test]
async fn a_request_that_was_sent_and_not_answered_is_502_and_sent() {
    for answer in ["", "HTTP/1.1 200", "HTTP/1.1 200 OK\r\ncontent-len"] {
        let upstream = Upstream::bind().await;
        let forward = upstream.forward();
        let (response, ()) = tokio::join!(call(&forward, get("/")), async {
            let mut server = upstream.accept().await;
            server.head().await;
            server.send(answer).await;
        });
        assert_eq!(rejection(&response), (502, "upstream-reset", true), "{answer:?}");
    }
}

#[tokio::test]
async fn what_is_no_http_is_502() {
    for answer in [
        "SSH-2.0-OpenSSH\r\n\r\n",
        "HTTP/1.1 20 OK\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nxx",
        "HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        "HTTP/1.1 200 OK\r\nx y: 1\r\n\r\n",
        "HTTP/2.0 200 OK\r\n\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    ] {
        let (_, (head, _)) = relay(same, "GET / HTTP/1.1\r\nhost: a\r\n\r\n", answer).await;
        assert!(head.starts_with("HTTP/1.1 502 "), "{answer:?} -> {head}");
    }
}

#[tokio::test]
async fn an_answer_cut_short_is_never_whole() {
    for answer in [
        "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n",
    ] {
        let upstream = Upstream::bind().await;
        let mut client = client(&upstream.forward()).await;
        client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        let mut server = upstream.accept().await;
        server.head().await;
        server.send(answer).await;
        drop(server);
        let got = client.end().await;
        assert!(!got.ends_with("0\r\n\r\n"), "{got}");
        let whole = got.contains("content-length: 10") && got.split("\r\n\r\n").nth(1).is_some_and(|b| b.len() == 10);
        assert!(!whole, "{got}");
        let upstream = Upstream::bind().await;
        let forward = upstream.forward();
        let (response, ()) = tokio::join!(call(&forward, get("/")), async {
            let mut server = upstream.accept().await;
            server.head().await;
            server.send(answer).await;
        });
        assert_eq!(response.status(), 200);
        assert!(within(response.into_body().collect()).await.is_err(), "{answer:?}");
    }
}

#[tokio::test]
async fn a_slow_head_is_504() {
    let upstream = Upstream::bind().await;
    let forward = upstream.forward().response_timeout(Duration::from_millis(50));
    let (response, _server) = tokio::join!(call(&forward, get("/")), async {
        let mut server = upstream.accept().await;
        server.head().await;
        server
    });
    assert_eq!(rejection(&response), (504, "response-timeout", true));
}

/// Callers of one large answer must not get its endpoint avoided.
#[tokio::test]
async fn an_answer_announced_too_large_says_nothing_of_the_endpoint() {
    let upstream = Upstream::bind().await;
    let forward = upstream.forward().policy(Policy::new().response_limit(4));
    let (response, _server) = tokio::join!(call(&forward, get("/")), async {
        let mut server = upstream.accept().await;
        server.head().await;
        server.send("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello").await;
        server
    });
    assert_eq!(rejection(&response), (502, "response-too-large", true));
    let said = Standard::default().head(Head::of(&response));
    assert_eq!(said, Verdict::Decided(Outcome::Ignored));
}

#[tokio::test]
async fn a_deadline_ends_the_wait_and_the_body() {
    let upstream = Upstream::bind().await;
    let forward = upstream.forward();
    let with = |millis| {
        let mut request = get("/");
        Deadline(Clock::system().now() + Duration::from_millis(millis)).attach(request.extensions_mut());
        request
    };
    let late = call(&forward, with(0)).await;
    assert_eq!(rejection(&late), (504, "deadline-exceeded", false));
    // Whoever has no time left must not get the endpoint avoided.
    assert_eq!(late.extensions().get::<Rejection>().unwrap().side(), Side::Gateway);
    let (response, server) = tokio::join!(call(&forward, with(50)), async {
        let mut server = upstream.accept().await;
        server.head().await;
        server
    });
    assert_eq!(rejection(&response), (504, "deadline-exceeded", true));
    drop(server);
    let (response, _server) = tokio::join!(call(&forward, with(10_000)), async {
        let mut server = upstream.accept().await;
        server.head().await;
        server.send("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello").await;
        server
    });
    assert_eq!(response.status(), 200);
    pass(LONG).await;
    let error = within(response.into_body().collect()).await.unwrap_err();
    assert!(error.to_string().contains("time for the request"), "{error}");
}

/// A reader who is slow finds more whenever he looks: the alarm is never asked.
#[tokio::test]
async fn a_deadline_also_ends_a_body_that_has_always_more() {
    let upstream = Upstream::bind().await;
    let forward = upstream.forward().total_timeout(Duration::from_secs(60));
    let (response, _server) = tokio::join!(call(&forward, get("/")), async {
        let mut server = upstream.accept().await;
        server.head().await;
        server.send("HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n").await;
        server.send(vec![b'x'; 64 * 1024]).await;
        server
    });
    let mut body = response.into_body();
    assert!(within(body.frame()).await.unwrap().is_ok());
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(61)).await;
    let error = loop {
        match tokio_test::task::spawn(body.frame()).poll() {
            Poll::Ready(Some(frame)) => match frame {
                Ok(_) => panic!("time was over"),
                Err(error) => break error,
            },
            Poll::Ready(None) => panic!("it was not whole"),
            Poll::Pending => tokio::task::yield_now().await,
        }
    };
    assert!(error.to_string().contains("time for the request"), "{error}");
}

#[tokio::test]
async fn a_body_that_stands_still_is_broken_off() {
    let upstream = Upstream::bind().await;
    let forward = upstream.forward().idle_timeout(Duration::from_millis(50));
    let (response, _server) = tokio::join!(call(&forward, get("/")), async {
        let mut server = upstream.accept().await;
        server.head().await;
        server.send("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello").await;
        server
    });
    let error = within(response.into_body().collect()).await.unwrap_err();
    assert!(error.to_string().contains("stood still"), "{error}");
}

#[tokio::test]
async fn a_caller_who_stops_sending_gets_408() {
    let upstream = Upstream::bind().await;
    let forward = upstream.forward().idle_timeout(Duration::from_millis(50));
    let mut client = client(&forward).await;
    client.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nhello").await;
    let mut server = upstream.accept().await;
    let (head, _) = client.message().await;
    assert!(head.starts_with("HTTP/1.1 408 "), "{head}");
    server.end().await;
}

#[tokio::test]
async fn a_caller_who_goes_away_takes_the_upstream_connection_along() {
    let upstream = Upstream::bind().await;
    let mut client = client(&upstream.forward()).await;
    client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let mut server = upstream.accept().await;
    server.head().await;
    drop(client);
    assert_eq!(server.end().await, "", "waiting for the head");
    let mut client = super::client(&upstream.forward()).await;
    client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let mut server = upstream.accept().await;
    server.head().await;
    server.send("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello").await;
    client.until("hello").await;
    drop(client);
    assert_eq!(server.end().await, "", "in the body");
}

#[tokio::test]
async fn a_caller_who_breaks_off_the_request_leaves_no_whole_request() {
    for framing in ["content-length: 10\r\n\r\nhello", "transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n"] {
        let upstream = Upstream::bind().await;
        let mut client = client(&upstream.forward()).await;
        client.send(format!("POST / HTTP/1.1\r\nhost: a\r\n{framing}")).await;
        let mut server = upstream.accept().await;
        server.until("hello").await;
        drop(client);
        let rest = server.end().await;
        assert!(!rest.contains("0\r\n\r\n"), "{rest}");
    }
}

/// Serves `answers` connections one after the other, one answer each, closing after the answer without saying so.
async fn closes_after_each(upstream: &Upstream, answers: usize) -> Vec<Raw> {
    let mut open = Vec::new();
    for _ in 0..answers {
        let mut server = upstream.accept().await;
        server.head().await;
        server.send(OK).await;
        open.push(server);
    }
    open
}

async fn ok(forward: &Forward) {
    let response = call(forward, get("/")).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "ok");
}

#[tokio::test]
async fn a_connection_the_upstream_closed_meanwhile_is_never_noticed() {
    let upstream = Upstream::bind().await;
    let forward = upstream.forward();
    let ((), mut open) = tokio::join!(ok(&forward), closes_after_each(&upstream, 1));
    drop(open.pop());
    let ((), _open) = tokio::join!(ok(&forward), closes_after_each(&upstream, 1));
}

/// The request has left before the upstream's end of the connection shows: only what may be repeated is.
#[tokio::test]
async fn a_connection_that_breaks_on_reuse_repeats_what_may_be_repeated() {
    for (method, repeated) in [("GET", true), ("PUT", true), ("DELETE", true), ("POST", false), ("PATCH", false)] {
        let upstream = Upstream::bind().await;
        let forward = upstream.forward();
        let ((), mut open) = tokio::join!(ok(&forward), closes_after_each(&upstream, 1));
        let mut server = open.pop().unwrap();
        let request =
            Request::builder().method(method).uri("/").header("host", "a").body(Empty::<Bytes>::new()).unwrap();
        let (response, again) = tokio::join!(call(&forward, request), async {
            server.head().await;
            drop(server);
            if repeated { closes_after_each(&upstream, 1).await } else { Vec::new() }
        });
        if repeated {
            assert_eq!(response.status(), 200, "{method}");
            assert_eq!(again.len(), 1);
        } else {
            assert_eq!(rejection(&response), (502, "upstream-reset", true), "{method}");
        }
    }
}

#[tokio::test]
async fn who_waits_too_long_for_a_place_was_not_sent_and_it_was_not_the_endpoint() {
    let upstream = Upstream::bind().await;
    let forward = upstream.forward().max_connections(1).connect_timeout(Duration::from_millis(30));
    let busy = tokio::spawn({
        let forward = forward.clone();
        async move { call(&forward, get("/")).await }
    });
    let mut server = upstream.accept().await;
    server.head().await;
    let hasty = forward.clone().connect_timeout(Duration::from_secs(15)).total_timeout(Duration::from_millis(30));
    for (forward, said) in
        [(&forward, (503, "connections-exhausted", false)), (&hasty, (504, "deadline-exceeded", false))]
    {
        let response = call(forward, get("/")).await;
        assert_eq!(rejection(&response), said);
        assert_eq!(response.extensions().get::<Rejection>().unwrap().side(), Side::Gateway);
    }
    server.send(OK).await;
    assert_eq!(busy.await.unwrap().status(), 200);
}

#[tokio::test]
async fn an_attempt_has_a_time_for_the_head_and_the_whole_one_for_the_body() {
    let upstream = Upstream::bind().await;
    let answer = async |server: &mut Raw| {
        server.head().await;
        server.send("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello").await;
    };
    let silent = async || {
        let mut server = upstream.accept().await;
        server.head().await;
        server
    };
    let attempt = upstream.forward().attempt_timeout(Duration::from_millis(50));
    let (response, _server) = tokio::join!(call(&attempt, get("/")), silent());
    assert_eq!(rejection(&response), (504, "deadline-exceeded", true));
    let attempt = upstream.forward().attempt_timeout(LONG);
    let (response, mut server) = tokio::join!(call(&attempt, get("/")), async {
        let mut server = upstream.accept().await;
        answer(&mut server).await;
        server
    });
    assert_eq!(response.status(), 200);
    pass(LONG).await;
    server.send("there").await;
    let body = within(response.into_body().collect()).await.unwrap().to_bytes();
    assert_eq!(body, "hellothere", "the body has its own time");

    let whole = upstream.forward().total_timeout(Duration::from_millis(50));
    let (response, _server) = tokio::join!(call(&whole, get("/")), silent());
    assert_eq!(rejection(&response), (504, "deadline-exceeded", true));
    let whole = upstream.forward().total_timeout(LONG);
    let (response, _server) = tokio::join!(call(&whole, get("/")), async {
        let mut server = upstream.accept().await;
        answer(&mut server).await;
        server
    });
    assert_eq!(response.status(), 200);
    pass(LONG).await;
    assert!(within(response.into_body().collect()).await.is_err(), "the body counts");
}

#[tokio::test]
async fn a_tunnel_where_nothing_moves_ends() {
    let upstream = Upstream::bind().await;
    let mut client = client(&upstream.forward().idle_timeout(Duration::from_millis(50))).await;
    client.send("GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n").await;
    let mut server = upstream.accept().await;
    server.head().await;
    server.send("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n").await;
    client.head().await;
    assert_eq!((client.end().await, server.end().await), (String::new(), String::new()));
}
