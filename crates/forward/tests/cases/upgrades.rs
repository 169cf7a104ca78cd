//! Changing the protocol.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, Version};
use http_body_util::{BodyExt, Channel, Empty};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use portcullis_core::{Address, Carried, Endpoint, Instance, Permit};
use portcullis_forward::{Forward, Policy};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tower::ServiceExt;

use super::{OK, Upstream, client, lines, relay, same, within};

const ASK: &str = "GET /chat HTTP/1.1\r\nhost: a\r\nconnection: keep-alive, Upgrade\r\nupgrade: websocket\r\nsec-websocket-key: k\r\n\r\n";
const SWITCH: &str =
    "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: WebSocket\r\nsec-websocket-accept: x\r\n\r\n";

#[tokio::test]
async fn after_101_bytes_go_both_ways_and_each_half_closes_by_itself() {
    let upstream = Upstream::bind().await;
    let mut client = client(&upstream.forward()).await;
    client.send(ASK).await;
    let mut server = upstream.accept().await;
    let head = server.head().await;
    assert!(lines(&head).contains(&"connection: upgrade"), "{head}");
    assert!(lines(&head).contains(&"upgrade: websocket"), "{head}");
    server.send(format!("{SWITCH}early")).await;
    let head = client.head().await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    assert!(lines(&head).contains(&"connection: upgrade"), "{head}");
    assert!(lines(&head).contains(&"sec-websocket-accept: x"), "{head}");
    assert_eq!(client.exactly(5).await, "early");
    client.send("ping").await;
    assert_eq!(server.exactly(4).await, "ping");
    client.io.shutdown().await.unwrap();
    assert_eq!(server.end().await, "");
    server.send("still talking").await;
    drop(server);
    assert_eq!(client.end().await, "still talking");
}

#[tokio::test]
async fn a_change_is_asked_for_again_where_a_kept_connection_closes_just_then() {
    let upstream = Upstream::bind().await;
    let mut client = client(&upstream.forward()).await;
    client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let mut kept = upstream.accept().await;
    kept.head().await;
    kept.send(OK).await;
    client.message().await;
    client.send(ASK).await;
    kept.head().await;
    drop(kept);
    let mut server = upstream.accept().await;
    assert!(lines(&server.head().await).contains(&"upgrade: websocket"));
    server.send(SWITCH).await;
    assert!(client.head().await.starts_with("HTTP/1.1 101 "));
    client.send("ping").await;
    assert_eq!(server.exactly(4).await, "ping");
}

/// Until it has ended, an endpoint of a tunnel is no better choice than one of a request.
#[tokio::test]
async fn an_endpoint_is_busy_as_long_as_the_tunnel_lasts() {
    let upstream = Upstream::bind().await;
    let endpoint = Endpoint::new("s", Instance::new("1", Address::Socket(upstream.address())));
    let forward = Forward::new().policy(Policy::new().tunnels(true));
    for ask in [ASK, "CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n\r\n"] {
        let (mut client, io) = tokio::io::duplex(1024);
        let (to, inner) = (endpoint.clone(), forward.clone());
        let service = service_fn(move |mut request: Request<Incoming>| {
            Permit::without_right(to.clone()).attach(request.extensions_mut());
            inner.clone().oneshot(request)
        });
        let serving = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(io), service);
        tokio::spawn(serving.with_upgrades());
        client.write_all(ask.as_bytes()).await.unwrap();
        let mut server = upstream.accept().await;
        if ask == ASK {
            server.head().await;
            server.send(SWITCH).await;
        }
        client.read_exact(&mut [0; 13]).await.unwrap();
        assert_eq!((endpoint.in_flight(), forward.open_connections(&endpoint)), (1, 1));
        drop(client);
        assert_eq!(server.end().await, "");
        drop(server);
        within(async {
            while endpoint.in_flight() > 0 || forward.open_connections(&endpoint) > 0 {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
}

#[tokio::test]
async fn bytes_sent_along_with_the_request_wait_for_101() {
    let upstream = Upstream::bind().await;
    let mut client = client(&upstream.forward()).await;
    client.send(format!("{ASK}GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n")).await;
    let mut server = upstream.accept().await;
    server.head().await;
    assert!(tokio::time::timeout(Duration::from_millis(50), server.more()).await.is_err(), "{:?}", server.read);
    server.send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nno").await;
    assert_eq!(client.message().await.1, "no");
    assert!(server.head().await.starts_with("GET /smuggled HTTP/1.1\r\n"), "a request of its own");
}

#[tokio::test]
async fn a_switch_nobody_asked_for_is_502() {
    let (_, (head, _)) = relay(same, "GET / HTTP/1.1\r\nhost: a\r\n\r\n", SWITCH).await;
    assert!(head.starts_with("HTTP/1.1 502 "), "{head}");
    let other = SWITCH.replace("WebSocket", "other");
    let (_, (head, _)) = relay(same, ASK, &other).await;
    assert!(head.starts_with("HTTP/1.1 502 "), "{head}");
}

#[tokio::test]
async fn a_refused_switch_is_an_ordinary_answer() {
    let (_, (head, body)) = relay(same, ASK, "HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n\r\nno").await;
    assert!(head.starts_with("HTTP/1.1 403 "), "{head}");
    assert_eq!(body, "no");
}

/// A body before a change of protocol has been the way past other proxies.
#[tokio::test]
async fn a_request_with_a_body_does_not_switch() {
    let request = ASK.replace("\r\n\r\n", "\r\ncontent-length: 3\r\n\r\nabc");
    let ((head, body), _) = relay(same, &request, "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
    assert!(!head.contains("upgrade"), "{head}");
    assert_eq!(body, "abc");
}

fn tunnels(forward: Forward) -> Forward {
    forward.policy(Policy::new().tunnels(true))
}

#[tokio::test]
async fn connect_opens_a_tunnel_to_the_endpoint_if_asked_for() {
    let upstream = Upstream::bind().await;
    let forward = tunnels(upstream.forward()).max_connections(1);
    let mut client = client(&forward).await;
    client.send("CONNECT elsewhere.test:443 HTTP/1.1\r\nhost: elsewhere.test:443\r\n\r\n").await;
    let mut server = upstream.accept().await;
    let head = client.head().await;
    assert!(head.starts_with("HTTP/1.1 200 ") && !head.contains("content-length"), "{head}");
    client.send("ping").await;
    assert_eq!(server.exactly(4).await, "ping", "no request came first");
    let waits = forward.clone().connect_timeout(Duration::from_millis(20));
    let second = Request::get("/").header("host", "a").body(Empty::<Bytes>::new()).unwrap();
    assert_eq!(waits.oneshot(second).await.unwrap().status(), 503, "the tunnel counts as a connection");
    client.io.shutdown().await.unwrap();
    assert_eq!(server.end().await, "");
    server.send("still talking").await;
    drop(server);
    assert_eq!(client.end().await, "still talking");
}

#[tokio::test]
async fn connect_opens_a_tunnel_from_a_stream_of_http_2() {
    let upstream = Upstream::bind().await;
    let mut sender = super::h2::h2_client::<Empty<Bytes>>(&tunnels(upstream.forward())).await;
    let request = Request::connect("elsewhere.test:443").body(Empty::new()).unwrap();
    let (response, mut server) = tokio::join!(sender.send_request(request), upstream.accept());
    let response = response.unwrap();
    assert_eq!(response.status(), 200);
    let mut io = TokioIo::new(hyper::upgrade::on(response).await.unwrap());
    io.write_all(b"ping").await.unwrap();
    assert_eq!(server.exactly(4).await, "ping");
    server.send("pong").await;
    let mut answer = [0; 4];
    io.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"pong");
}

/// A server that does not take streams apart leaves a tunnel's bytes in the bodies.
#[tokio::test]
async fn a_tunnel_in_a_stream_is_what_its_bodies_are() {
    let upstream = Upstream::bind().await;
    // One at most, so that one that is not given back is missed by the next.
    let forward = tunnels(upstream.forward()).max_connections(1).connect_timeout(Duration::from_secs(5));
    for is_cut in [true, false] {
        let (mut caller, body) = Channel::<Bytes, std::io::Error>::new(1);
        let request = Request::connect("elsewhere.test:443").version(Version::HTTP_2).body(body).unwrap();
        let (response, mut server) = tokio::join!(within(forward.clone().oneshot(request)), upstream.accept());
        let response = response.unwrap();
        assert_eq!(response.status(), 200);
        let mut heard = response.into_body();
        caller.send_data("ping".into()).await.unwrap();
        assert_eq!(server.exactly(4).await, "ping");
        server.send("pong").await;
        assert_eq!(within(heard.frame()).await.unwrap().unwrap().into_data().unwrap(), "pong");
        if is_cut {
            caller.abort(std::io::ErrorKind::ConnectionReset.into());
            assert!(within(heard.frame()).await.unwrap().is_err(), "it is no end");
        } else {
            drop(caller);
            assert_eq!(server.end().await, "");
            server.send("still talking").await;
            drop(server);
            assert_eq!(within(heard.collect()).await.unwrap().to_bytes(), "still talking");
        }
    }
}

#[tokio::test]
async fn a_tunnel_that_cannot_be_is_refused() {
    for (request, status) in [
        ("CONNECT a.test HTTP/1.1\r\nhost: a.test\r\n\r\n", 400),
        ("CONNECT u@a.test:1 HTTP/1.1\r\nhost: a.test\r\n\r\n", 400),
        ("CONNECT a.test:1 HTTP/1.1\r\nhost: a.test:1\r\ncontent-length: 1\r\n\r\nx", 400),
        ("CONNECT a.test:1 HTTP/1.1\r\nhost: a.test:1\r\nvia: 1.1 portcullis\r\n\r\n", 508),
    ] {
        let (head, _) = super::refused(tunnels, request).await;
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{request:?} -> {head}");
    }
    let closed = Upstream::bind().await.address();
    let mut client = client(&tunnels(Forward::to(&closed.to_string()).unwrap())).await;
    client.send("CONNECT a.test:1 HTTP/1.1\r\nhost: a.test:1\r\n\r\n").await;
    let (head, _) = client.message().await;
    assert!(head.starts_with("HTTP/1.1 502 "), "{head}");
}
