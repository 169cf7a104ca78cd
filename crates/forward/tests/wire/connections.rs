//! How connections are kept.

use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Empty};
use portcullis_core::{Address, Carried, Endpoint, Instance, Permit};
use portcullis_forward::Forward;
use tower::Service;

use crate::{OK, Upstream, within};

fn endpoint(upstream: &Upstream) -> Endpoint {
    Endpoint::new("s", Instance::new("1", Address::Socket(upstream.address())))
}

fn get(endpoint: &Endpoint) -> Request<Empty<Bytes>> {
    let mut request = Request::builder().uri("/").header("host", "a").body(Empty::new()).unwrap();
    Permit::without_right(endpoint.clone()).attach(request.extensions_mut());
    request
}

async fn ok(forward: &Forward, endpoint: &Endpoint) {
    let response = within(forward.clone().call(get(endpoint))).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "ok");
}

#[tokio::test]
async fn clones_share_connections_and_endpoints_do_not() {
    let upstream = Upstream::bind().await;
    let (a, b) = (endpoint(&upstream), endpoint(&upstream));
    let forward = Forward::new();
    let (_, mut first) = tokio::join!(ok(&forward, &a), async {
        let mut server = upstream.accept().await;
        server.head().await;
        server.send(OK).await;
        server
    });
    assert_eq!((forward.connections(&a), forward.connections(&b)), ((1, 0), (0, 0)));
    let clone = forward.clone();
    tokio::join!(ok(&clone, &a), async {
        first.head().await;
        first.send(OK).await;
    });
    tokio::join!(ok(&forward, &b), async {
        let mut server = upstream.accept().await;
        server.head().await;
        server.send(OK).await;
    });
}

#[tokio::test]
async fn idle_connections_end_with_their_endpoint() {
    let upstream = Upstream::bind().await;
    let endpoint = endpoint(&upstream);
    let forward = Forward::new();
    let (_, mut server) = tokio::join!(ok(&forward, &endpoint), async {
        let mut server = upstream.accept().await;
        server.head().await;
        server.send(OK).await;
        server
    });
    drop(endpoint);
    assert_eq!(server.end().await, "");
}

#[tokio::test]
async fn idle_connections_are_closed_in_time_and_no_more_are_kept_than_allowed() {
    let upstream = Upstream::bind().await;
    let endpoint = endpoint(&upstream);
    let forward = Forward::new().max_idle(1).pool_idle_timeout(Duration::from_millis(200));
    let (_, _, mut servers) = tokio::join!(ok(&forward, &endpoint), ok(&forward, &endpoint), async {
        let mut servers = vec![upstream.accept().await, upstream.accept().await];
        for server in &mut servers {
            server.head().await;
            server.send(OK).await;
        }
        servers
    });
    assert_eq!(forward.connections(&endpoint), (1, 0));
    assert_eq!(forward.open_connections(&endpoint), 1);
    for server in &mut servers {
        assert_eq!(server.end().await, "");
    }
    assert_eq!(forward.connections(&endpoint), (0, 0));
}

#[tokio::test]
async fn requests_beyond_the_limit_wait_and_beyond_that_are_refused() {
    let upstream = Upstream::bind().await;
    let endpoint = endpoint(&upstream);
    let forward = Forward::new().max_connections(1).max_waiting(1).connect_timeout(Duration::from_secs(10));
    let first = tokio::spawn({
        let (mut forward, request) = (forward.clone(), get(&endpoint));
        async move { forward.call(request).await.unwrap() }
    });
    let mut server = upstream.accept().await;
    server.head().await;
    let mut second = tokio_test::task::spawn(forward.clone().call(get(&endpoint)));
    assert!(second.poll().is_pending());
    let third = within(forward.clone().call(get(&endpoint))).await.unwrap();
    assert_eq!(third.status(), 503);
    let rejection = third.extensions().get::<portcullis_core::Rejection>().unwrap();
    assert_eq!((rejection.reason(), rejection.sent()), ("connections-exhausted", false));
    server.send(OK).await;
    let first = first.await.unwrap();
    first.into_body().collect().await.unwrap();
    let (second, ()) = tokio::join!(within(second), async {
        server.head().await;
        server.send(OK).await;
    });
    assert_eq!(second.unwrap().status(), 200, "over the same connection");
}

#[tokio::test]
async fn a_connection_takes_no_more_requests_after_its_time() {
    let upstream = Upstream::bind().await;
    let endpoint = endpoint(&upstream);
    let forward = Forward::new().max_age(Duration::ZERO);
    for _ in 0..2 {
        tokio::join!(ok(&forward, &endpoint), async {
            let mut server = upstream.accept().await;
            server.head().await;
            server.send(OK).await;
        });
    }
}

#[tokio::test]
async fn unix_sockets_are_endpoints() {
    let folder = std::env::temp_dir().join(format!("portcullis-{}-{}", std::process::id(), fastrand::u64(..)));
    let listener = tokio::net::UnixListener::bind(&folder).unwrap();
    let forward = Forward::to(&format!("unix:{}", folder.display())).unwrap();
    let request = Request::builder().uri("/x").header("host", "a").body(Empty::<Bytes>::new()).unwrap();
    let (response, head) = tokio::join!(within(forward.clone().call(request)), async {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (mut io, _) = listener.accept().await.unwrap();
        let mut buffer = vec![0; 4096];
        let count = io.read(&mut buffer).await.unwrap();
        io.write_all(OK.as_bytes()).await.unwrap();
        String::from_utf8(buffer[..count].to_vec()).unwrap()
    });
    std::fs::remove_file(folder).unwrap();
    assert!(head.starts_with("GET /x HTTP/1.1\r\n"), "{head}");
    assert_eq!(response.unwrap().status(), 200);
}
