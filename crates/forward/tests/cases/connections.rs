//! How connections are kept.

use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Empty};
use portcullis_core::{Address, Carried, Endpoint, Instance, Permit};
use portcullis_forward::Forward;
use tower::Service;

use super::{OK, Raw, Upstream, within};

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
async fn those_who_wait_for_a_place_get_one_after_another() {
    let upstream = Upstream::bind().await;
    let endpoint = endpoint(&upstream);
    let forward = Forward::new().max_connections(1).connect_timeout(Duration::from_secs(15));
    let asked = futures::future::join_all((0..5).map(|_| ok(&forward, &endpoint)));
    tokio::join!(asked, async {
        for _ in 0..5 {
            let mut server = upstream.accept().await;
            server.head().await;
            server.send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok").await;
        }
    });
}

/// The time to answer begins when there is a connection.
#[tokio::test]
async fn who_waited_for_a_connection_has_all_the_time_for_the_answer() {
    let upstream = Upstream::bind().await;
    let endpoint = endpoint(&upstream);
    let forward = Forward::new()
        .max_connections(1)
        .connect_timeout(Duration::from_secs(60))
        .response_timeout(Duration::from_secs(5));
    let (first, mut server) = tokio::join!(within(forward.clone().call(get(&endpoint))), async {
        let mut server = upstream.accept().await;
        server.head().await;
        server.send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n").await;
        server
    });
    let mut second = tokio_test::task::spawn(forward.clone().call(get(&endpoint)));
    assert!(second.poll().is_pending());
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(10)).await;
    tokio::time::resume();
    assert!(second.poll().is_pending());
    server.send("ok").await;
    within(first.unwrap().into_body().collect()).await.unwrap();
    let (second, ()) = tokio::join!(within(second), async {
        server.head().await;
        server.send(OK).await;
    });
    assert_eq!(second.unwrap().status(), 200);
}

/// In a runtime of its own.
fn elsewhere(forward: &Forward, endpoint: &Endpoint) -> std::thread::JoinHandle<tokio::runtime::Runtime> {
    let (forward, endpoint) = (forward.clone(), endpoint.clone());
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let asked = async move { ok(&forward, &endpoint).await };
        runtime.block_on(runtime.spawn(asked)).unwrap();
        runtime
    })
}

async fn answer_one(upstream: &Upstream) -> Raw {
    let mut server = upstream.accept().await;
    server.head().await;
    server.send(OK).await;
    server
}

/// The limit is for all runtimes together; what one of them keeps for later must not be missed by another.
#[tokio::test]
async fn an_idle_connection_of_another_runtime_makes_room() {
    let upstream = Upstream::bind().await;
    let endpoint = endpoint(&upstream);
    let forward = Forward::new().max_connections(1).connect_timeout(Duration::from_secs(10));
    let other = elsewhere(&forward, &endpoint);
    let mut first = answer_one(&upstream).await;
    let runtime = within(tokio::task::spawn_blocking(move || other.join().unwrap())).await.unwrap();
    assert_eq!(forward.connections(&endpoint), (1, 0));
    tokio::join!(ok(&forward, &endpoint), answer_one(&upstream));
    assert_eq!(first.end().await, "");
    assert_eq!(forward.open_connections(&endpoint), 1);
    // Also one that is busy when it is asked for.
    let other = elsewhere(&forward, &endpoint);
    let mut busy = upstream.accept().await;
    busy.head().await;
    let mut waits = tokio_test::task::spawn(forward.clone().call(get(&endpoint)));
    assert!(waits.poll().is_pending());
    busy.send(OK).await;
    let (response, _) = tokio::join!(within(waits), answer_one(&upstream));
    assert_eq!(response.unwrap().status(), 200);
    let again = within(tokio::task::spawn_blocking(move || other.join().unwrap())).await.unwrap();
    runtime.shutdown_background();
    again.shutdown_background();
}

/// Whoever refuses a body need not read it.
#[tokio::test]
async fn an_answer_is_heard_though_the_rest_of_the_request_is_not() {
    let upstream = Upstream::bind().await;
    let forward = upstream.forward();
    let request = Request::post("/")
        .header("host", "a")
        .body(http_body_util::Full::new(Bytes::from(vec![b'x'; 64 << 20])))
        .unwrap();
    let (response, ()) = tokio::join!(within(forward.clone().call(request)), async {
        let mut server = upstream.accept().await;
        server.head().await;
        server.send("HTTP/1.1 413 Content Too Large\r\ncontent-length: 2\r\n\r\nno").await;
        drop(server);
    });
    let response = response.unwrap();
    assert_eq!(response.status(), 413);
    assert!(response.extensions().get::<portcullis_core::Rejection>().is_none(), "it is the upstream's");
    assert_eq!(within(response.into_body().collect()).await.unwrap().to_bytes(), "no");
}

#[tokio::test]
async fn an_http_2_endpoint_that_does_not_answer_pings_is_let_go() {
    let upstream = Upstream::bind().await;
    let mut instance = Instance::new("1", Address::Socket(upstream.address()));
    instance.protocol = portcullis_core::Protocol::Http2;
    let endpoint = Endpoint::new("s", instance);
    let forward = Forward::new().keep_alive(Duration::from_millis(20), Duration::from_millis(50));
    let (response, ()) = tokio::join!(within(forward.clone().call(get(&endpoint))), async {
        let mut server = upstream.accept().await;
        // Empty settings, and then nothing more.
        server.send([0, 0, 0, 4, 0, 0, 0, 0, 0]).await;
        while server.more().await {}
    });
    let response = response.unwrap();
    let rejection = response.extensions().get::<portcullis_core::Rejection>().unwrap();
    assert_eq!((rejection.reason(), rejection.sent()), ("upstream-reset", true));
    assert_eq!(forward.open_connections(&endpoint), 0);
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

/// A task that does so much at once has to come back for the rest of it, and with that for its timers.
#[tokio::test]
async fn each_of_many_requests_in_one_task_hears_that_its_time_is_up() {
    let upstream = Upstream::bind().await;
    let (endpoint, forward) = (endpoint(&upstream), Forward::new().response_timeout(Duration::from_millis(300)));
    let calls = futures::future::join_all((0..200).map(|_| forward.clone().call(get(&endpoint))));
    let silent = async {
        let mut held = Vec::new();
        loop {
            held.push(upstream.accept().await);
        }
    };
    let answers = tokio::select! {
        answers = within(calls) => answers,
        () = silent => return,
    };
    assert!(answers.into_iter().all(|answer| answer.unwrap().status() == 504));
}

/// One place, a connection of HTTP/1.1 in it, and a call that needs one of HTTP/2.
#[tokio::test]
async fn a_connection_that_comes_back_makes_room_for_one_of_the_other_protocol() {
    let upstream = Upstream::bind().await;
    let endpoint = endpoint(&upstream);
    let forward = Forward::new().max_connections(1).connect_timeout(Duration::from_secs(10));
    let first = tokio::spawn(forward.clone().call(get(&endpoint)));
    let mut server = upstream.accept().await;
    server.head().await;
    let mut grpc = get(&endpoint);
    grpc.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
    let mut second = tokio_test::task::spawn(forward.clone().call(grpc));
    assert!(second.poll().is_pending());
    server.send(OK).await;
    first.await.unwrap().unwrap().into_body().collect().await.unwrap();
    tokio::select! {
        _ = within(second) => panic!("it got no connection"),
        preface = async { upstream.accept().await.until("PRI * HTTP/2.0").await } => assert_eq!(preface, "PRI * HTTP/2.0"),
    }
}
