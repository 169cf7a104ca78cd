//! HTTP/2 on either side, and gRPC.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Request, Response, Version};
use http_body::Frame;
use http_body_util::{BodyExt, Empty, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use portcullis_core::{Address, Body, Carried, Endpoint, Instance, Permit, Protocol, Rejection};
use portcullis_forward::{Forward, ResponseBody};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tower::Service;

use super::{LONG, OK, Upstream, client, listen, pass, within};

type Out = UnsyncBoxBody<Bytes, Infallible>;

/// A server of HTTP/2 alone, and how many connections it has accepted.
struct H2 {
    endpoint: Endpoint,
    connections: Arc<AtomicUsize>,
}

async fn h2_upstream<F, A>(streams: u32, answer: F) -> H2
where
    F: Fn(Request<Incoming>) -> A + Clone + Send + 'static,
    A: Future<Output = Response<Out>> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut instance = Instance::new("1", Address::Socket(listener.local_addr().unwrap()));
    instance.protocol = Protocol::Http2;
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = connections.clone();
    tokio::spawn(async move {
        loop {
            let (io, _) = listener.accept().await.unwrap();
            counted.fetch_add(1, Ordering::Relaxed);
            let answer = answer.clone();
            let service = service_fn(move |request| {
                let answer = answer(request);
                async move { Ok::<_, Infallible>(answer.await) }
            });
            let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            builder.max_concurrent_streams(streams);
            tokio::spawn(builder.serve_connection(TokioIo::new(io), service));
        }
    });
    H2 { endpoint: Endpoint::new("s", instance), connections }
}

fn full(text: impl Into<Bytes>) -> Out {
    Full::from(text.into()).boxed_unsync()
}

fn frames(frames: Vec<Frame<Bytes>>) -> Out {
    StreamBody::new(futures::stream::iter(frames.into_iter().map(Ok))).boxed_unsync()
}

fn trailers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
    lines.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap())).collect()
}

fn to<B>(endpoint: &Endpoint, mut request: Request<B>) -> Request<B> {
    Permit::without_right(endpoint.clone()).attach(request.extensions_mut());
    request
}

fn get(path: &str) -> Request<Empty<Bytes>> {
    Request::get(format!("http://a.test{path}")).version(Version::HTTP_2).body(Empty::new()).unwrap()
}

async fn call<B>(forward: &Forward, request: Request<B>) -> Response<Body<ResponseBody>>
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<portcullis_forward::BoxError>,
{
    within(forward.clone().call(request)).await.unwrap()
}

/// A client that speaks HTTP/2 to a server that runs `forward`.
pub(crate) async fn h2_client<B>(forward: &Forward) -> hyper::client::conn::http2::SendRequest<B>
where
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<portcullis_forward::BoxError>,
{
    let address = listen(forward).await;
    let io = TokioIo::new(TcpStream::connect(address).await.unwrap());
    let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
    tokio::spawn(connection);
    sender
}

/// Says what arrived.
async fn describe(request: Request<Incoming>) -> Response<Out> {
    let (parts, body) = request.into_parts();
    let collected = body.collect().await.unwrap();
    let mut lines: Vec<_> =
        parts.headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
    lines.sort();
    let sent = collected.trailers().cloned().unwrap_or_default();
    let text = format!("{} {} {lines:?} {:?} {sent:?}", parts.method, parts.uri, collected.to_bytes());
    Response::new(full(text))
}

#[tokio::test]
async fn http_1_to_http_2() {
    let upstream = h2_upstream(100, describe).await;
    let mut instance = (*upstream.endpoint.instance()).clone();
    instance.protocol = Protocol::Http2;
    let mut client = client(&Forward::to_instance(instance)).await;
    client
        .send(
            "POST /x?y HTTP/1.1\r\nhost: a.test\r\nte: trailers\r\nconnection: x-hop\r\nx-hop: 1\r\nkeep-alive: 5\r\n\
             transfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n2\r\nhi\r\n0\r\nx-sum: 7\r\n\r\n",
        )
        .await;
    let (head, body) = client.message().await;
    assert!(head.contains("via: 2.0 portcullis\r\n"), "{head}");
    assert!(body.contains("POST http://a.test/x?y "), "{body}");
    assert!(body.contains("te: trailers") && body.contains("via: 1.1 portcullis") && body.contains("x-sum"), "{body}");
    for gone in ["x-hop", "keep-alive", "transfer-encoding", "host: ", "connection"] {
        let kept = body.replace("x-forwarded-host: ", "");
        assert!(!kept.contains(gone), "{gone}: {body}");
    }
}

#[tokio::test]
async fn http_2_to_http_1() {
    let upstream = Upstream::bind().await;
    let mut sender = h2_client::<Full<Bytes>>(&upstream.forward()).await;
    let request = Request::post("http://a.test/x?y").header("cookie", "a=1").header("cookie", "b=2");
    let request = request.header("te", "trailers");
    let (response, (head, body)) =
        tokio::join!(within(sender.send_request(request.body(Full::from("hello")).unwrap())), async {
            let mut server = upstream.accept().await;
            let seen = server.message().await;
            server
                .send("HTTP/1.1 200 OK\r\nconnection: x\r\nx: 1\r\nkeep-alive: 5\r\ncontent-length: 2\r\n\r\nok")
                .await;
            seen
        });
    assert!(head.starts_with("POST /x?y HTTP/1.1\r\n"), "{head}");
    assert!(head.contains("cookie: a=1; b=2\r\n"), "{head}");
    assert!(head.contains("host: a.test\r\n") && head.contains("via: 2.0 portcullis\r\n"), "{head}");
    assert!(head.contains("content-length: 5\r\n") && head.contains("te: trailers\r\n"), "{head}");
    assert_eq!(body, "hello");
    let response = response.unwrap();
    assert!(!response.headers().contains_key("x") && !response.headers().contains_key("keep-alive"));
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "ok");
}

#[tokio::test]
async fn http_2_to_http_2_with_trailers_and_a_host_that_must_agree() {
    let upstream = h2_upstream(100, |request: Request<Incoming>| async move {
        let said = request.headers().get("te").cloned();
        request.into_body().collect().await.unwrap();
        let told = Frame::trailers(trailers(&[("grpc-status", "0"), ("content-length", "9")]));
        let mut response = Response::new(frames(vec![Frame::data("ok".into()), told]));
        response.headers_mut().extend(said.map(|said| (HeaderName::from_static("x-te"), said)));
        response
    })
    .await;
    let forward = Forward::to_instance((*upstream.endpoint.instance()).clone());
    let mut sender = h2_client::<Empty<Bytes>>(&forward).await;
    let mut request = get("/");
    request.headers_mut().insert("te", "trailers".parse().unwrap());
    let response = within(sender.send_request(request)).await.unwrap();
    assert_eq!(response.headers()["x-te"], "trailers");
    let collected = response.into_body().collect().await.unwrap();
    assert_eq!(collected.trailers(), Some(&trailers(&[("grpc-status", "0")])));
    let mut request = get("/");
    request.headers_mut().insert("host", "other.test".parse().unwrap());
    assert_eq!(within(sender.send_request(request)).await.unwrap().status(), 400);
}

#[tokio::test]
async fn streams_share_a_connection_and_more_are_opened_when_they_run_out() {
    let (upstream, release, waiting) = holding(2).await;
    let forward = Forward::new();
    let warm = tokio::spawn({
        let (mut forward, request) = (forward.clone(), to(&upstream.endpoint, get("/")));
        async move { forward.call(request).await.unwrap() }
    });
    until(&waiting, 1).await;
    let calls: Vec<_> = (0..5)
        .map(|_| {
            let (mut forward, request) = (forward.clone(), to(&upstream.endpoint, get("/")));
            tokio::spawn(async move { forward.call(request).await.unwrap() })
        })
        .collect();
    until(&waiting, 6).await;
    assert_eq!(upstream.connections.load(Ordering::Relaxed), 3);
    release.notify_waiters();
    assert_eq!(within(warm).await.unwrap().status(), 200);
    for call in calls {
        assert_eq!(within(call).await.unwrap().status(), 200);
    }
}

#[tokio::test]
async fn requests_at_once_make_one_connection() {
    let upstream = h2_upstream(100, |_| async { Response::new(full("ok")) }).await;
    let forward = Forward::new();
    let calls = (0..50).map(|_| call(&forward, to(&upstream.endpoint, get("/"))));
    for response in futures::future::join_all(calls).await {
        assert_eq!(response.status(), 200);
    }
    assert_eq!(upstream.connections.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn an_endpoint_that_is_not_there_fails_for_all_who_wait() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut instance = Instance::new("1", Address::Socket(listener.local_addr().unwrap()));
    drop(listener);
    instance.protocol = Protocol::Http2;
    let forward = Forward::to_instance(instance);
    for response in futures::future::join_all((0..20).map(|_| call(&forward, get("/")))).await {
        let rejection = response.extensions().get::<Rejection>().unwrap();
        assert_eq!((rejection.reason(), rejection.sent()), ("connect-failed", false));
    }
}

/// A server that says one of `answers` after each request, the last one from then on, and nothing before but its settings.
async fn scripted(answers: Vec<&'static [u8]>) -> (Endpoint, tokio::task::JoinHandle<usize>) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut instance = Instance::new("1", Address::Socket(listener.local_addr().unwrap()));
    instance.protocol = Protocol::Http2;
    let task = tokio::spawn(async move {
        let mut requests = 0;
        loop {
            let Ok(Ok((mut io, _))) = tokio::time::timeout(Duration::from_millis(500), listener.accept()).await else {
                return requests;
            };
            io.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
            let mut preface = [0; 24];
            io.read_exact(&mut preface).await.unwrap();
            loop {
                let mut head = [0; 9];
                if io.read_exact(&mut head).await.is_err() {
                    break;
                }
                let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
                let mut payload = vec![0; length];
                io.read_exact(&mut payload).await.unwrap();
                if head[3] == 1 {
                    let answer = answers.get(requests).or(answers.last()).unwrap();
                    requests += 1;
                    io.write_all(answer).await.unwrap();
                }
            }
        }
    });
    (Endpoint::new("s", instance), task)
}

const REFUSED: [u8; 13] = [0, 0, 4, 3, 0, 0, 0, 0, 1, 0, 0, 0, 7];
const INTERNAL: [u8; 13] = [0, 0, 4, 3, 0, 0, 0, 0, 1, 0, 0, 0, 2];
/// No stream was processed.
const GOAWAY: [u8; 17] = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

#[tokio::test]
async fn what_the_endpoint_did_not_process_was_not_sent() {
    for (frames, sent) in [(&REFUSED[..], false), (&GOAWAY, false), (&INTERNAL, true)] {
        let (endpoint, requests) = scripted(vec![frames]).await;
        let request = Request::post("http://a/").body(Full::<Bytes>::from("x")).unwrap();
        let response = call(&Forward::new(), to(&endpoint, request)).await;
        let rejection = response.extensions().get::<Rejection>().unwrap();
        assert_eq!((rejection.status().as_u16(), rejection.sent()), (502, sent), "{frames:?}");
        drop((response, endpoint));
        assert!(within(requests).await.unwrap() >= 1);
    }
}

#[tokio::test]
async fn a_stream_that_is_reset_on_a_used_connection_is_not_repeated() {
    // An answer without a body, and INTERNAL_ERROR on the next stream.
    const OK: [u8; 10] = [0, 0, 1, 1, 5, 0, 0, 0, 1, 0x88];
    const RESET: [u8; 13] = [0, 0, 4, 3, 0, 0, 0, 0, 3, 0, 0, 0, 2];
    let (endpoint, requests) = scripted(vec![&OK, &RESET, &[]]).await;
    let forward = Forward::new();
    assert_eq!(call(&forward, to(&endpoint, get("/"))).await.status(), 200);
    let response = call(&forward, to(&endpoint, get("/"))).await;
    let rejection = response.extensions().get::<Rejection>().unwrap();
    assert_eq!((rejection.status().as_u16(), rejection.sent()), (502, true));
    drop((response, endpoint));
    assert_eq!(within(requests).await.unwrap(), 2);
}

/// Of an answer to `HEAD` the length is another's, also where an empty frame ends it.
#[tokio::test]
async fn an_answer_without_a_body_is_not_too_large() {
    // The status, a length of 1000, and the end.
    const ANSWER: &[u8] = b"\0\0\x08\x01\x04\0\0\0\x01\x88\x0f\x0d\x041000\0\0\0\0\x01\0\0\0\x01";
    let (endpoint, _requests) = scripted(vec![ANSWER]).await;
    let head = Request::head("http://a/").version(Version::HTTP_2).body(Empty::<Bytes>::new()).unwrap();
    let forward = Forward::new().policy(portcullis_forward::Policy::new().response_limit(10));
    let response = call(&forward, to(&endpoint, head)).await;
    assert_eq!((response.status().as_u16(), response.headers()["content-length"].as_bytes()), (200, &b"1000"[..]));
}

#[tokio::test]
async fn a_target_that_is_only_a_query_has_the_root_for_its_path() {
    let target = |request: Request<Incoming>| async move {
        Response::new(full(request.uri().path_and_query().unwrap().as_str().to_owned()))
    };
    let upstream = h2_upstream(100, target).await;
    let response = call(&Forward::new(), to(&upstream.endpoint, get("?a=1"))).await;
    assert_eq!(within(response.into_body().collect()).await.unwrap().to_bytes(), "/?a=1");
}

/// A server whose answers wait until they are released; how many wait.
async fn holding(streams: u32) -> (H2, Arc<Notify>, Arc<AtomicUsize>) {
    let (release, waiting) = (Arc::new(Notify::new()), Arc::new(AtomicUsize::new(0)));
    let kept = (release.clone(), waiting.clone());
    let answer = move |_| {
        let (release, waiting) = kept.clone();
        async move {
            let released = release.notified();
            waiting.fetch_add(1, Ordering::Relaxed);
            released.await;
            Response::new(full("ok"))
        }
    };
    (h2_upstream(streams, answer).await, release, waiting)
}

async fn until(waiting: &AtomicUsize, count: usize) {
    within(async {
        while waiting.load(Ordering::Relaxed) < count {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn requests_beyond_all_streams_of_all_connections_wait_for_one() {
    let (upstream, release, waiting) = holding(100).await;
    let forward = Forward::new().max_connections(1).max_streams(1).connect_timeout(Duration::from_secs(15));
    let calls: Vec<_> = (0..4)
        .map(|_| {
            let (mut forward, request) = (forward.clone(), to(&upstream.endpoint, get("/")));
            tokio::spawn(async move { forward.call(request).await.unwrap().into_body().collect().await.unwrap() })
        })
        .collect();
    for count in 1..=4 {
        until(&waiting, count).await;
        release.notify_waiters();
    }
    for call in calls {
        assert_eq!(within(call).await.unwrap().to_bytes(), "ok");
    }
    assert_eq!(upstream.connections.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn an_unused_connection_makes_room_for_one_of_the_other_protocol_and_for_another_runtime() {
    let upstream = h2_upstream(100, |_| async { Response::new(full("ok")) }).await;
    let forward = Forward::new().max_connections(1).connect_timeout(Duration::from_secs(15));
    let elsewhere = {
        let (forward, request) = (forward.clone(), to(&upstream.endpoint, get("/")));
        tokio::task::spawn_blocking(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
            let asked = async move { call(&forward, request).await.into_body().collect().await.unwrap() };
            assert_eq!(runtime.block_on(runtime.spawn(asked)).unwrap().to_bytes(), "ok");
            runtime
        })
    };
    let runtime = within(elsewhere).await.unwrap();
    assert_eq!(forward.connections(&upstream.endpoint), (0, 1));
    let response = call(&forward, to(&upstream.endpoint, get("/"))).await;
    assert_eq!(within(response.into_body().collect()).await.unwrap().to_bytes(), "ok");
    assert_eq!(forward.open_connections(&upstream.endpoint), 1);
    runtime.shutdown_background();
}

/// A stream that goes on for hours keeps the place of its connection, however old that is.
#[tokio::test]
async fn where_no_other_may_be_opened_an_old_connection_takes_another_stream() {
    let (upstream, release, waiting) = holding(100).await;
    let forward = Forward::new().max_age(Duration::ZERO).max_connections(1).connect_timeout(Duration::from_secs(10));
    let mut calls = Vec::new();
    for count in 1..=3 {
        let (mut forward, request) = (forward.clone(), to(&upstream.endpoint, get("/")));
        calls.push(tokio::spawn(async move { forward.call(request).await.unwrap().status() }));
        until(&waiting, count).await;
    }
    release.notify_waiters();
    for call in calls {
        assert_eq!(within(call).await.unwrap(), 200);
    }
    assert_eq!(upstream.connections.load(Ordering::Relaxed), 1);
}

/// One place, a connection of HTTP/2 in it, and a request that needs one of HTTP/1.1.
#[tokio::test]
async fn a_connection_without_streams_makes_room_for_one_of_the_other_protocol() {
    let (upstream, release, waiting) = holding(100).await;
    let endpoint = Endpoint::new("s", Instance::new("1", upstream.endpoint.address().clone()));
    let forward = Forward::new().max_connections(1).connect_timeout(Duration::from_secs(10));
    let first = tokio::spawn(forward.clone().call(to(&endpoint, grpc(None))));
    until(&waiting, 1).await;
    let mut second = tokio_test::task::spawn(forward.clone().call(to(&endpoint, get("/"))));
    assert!(second.poll().is_pending());
    release.notify_waiters();
    within(first).await.unwrap().unwrap().into_body().collect().await.unwrap();
    let second = within(second).await.unwrap();
    let why = second.extensions().get::<Rejection>().unwrap();
    assert_eq!((second.status().as_u16(), why.sent()), (502, true), "sent to who speaks HTTP/2 alone: {why:?}");
}

#[tokio::test]
async fn a_connection_counts_until_its_last_stream_ends() {
    let (upstream, release, waiting) = holding(100).await;
    let forward = Forward::new().max_age(Duration::ZERO).max_connections(2);
    let old = tokio::spawn({
        let (mut forward, request) = (forward.clone(), to(&upstream.endpoint, get("/")));
        async move { forward.call(request).await.unwrap().into_body().collect().await.unwrap() }
    });
    until(&waiting, 1).await;
    // It takes no more streams: the keeper lets go of it, or the next request finds it retired.
    let next = tokio::spawn({
        let (mut forward, request) = (forward.clone(), to(&upstream.endpoint, get("/")));
        async move { forward.call(request).await.unwrap().into_body().collect().await.unwrap() }
    });
    until(&waiting, 2).await;
    assert_eq!(forward.open_connections(&upstream.endpoint), 2);
    release.notify_waiters();
    assert_eq!(within(old).await.unwrap().to_bytes(), "ok");
    assert_eq!(within(next).await.unwrap().to_bytes(), "ok");
}

fn grpc(timeout: Option<&str>) -> Request<Full<Bytes>> {
    let mut request = Request::post("http://a/s/m").version(Version::HTTP_2).header("content-type", "application/grpc");
    if let Some(timeout) = timeout {
        request = request.header("grpc-timeout", timeout);
    }
    request.header("te", "trailers").body(Full::from("\0\0\0\0\0")).unwrap()
}

#[tokio::test]
async fn grpc_deadlines_go_on_less_what_was_spent_and_end_in_a_status() {
    let upstream = h2_upstream(100, |request: Request<Incoming>| async move {
        let mut response = Response::new(frames(vec![Frame::trailers(trailers(&[("grpc-status", "0")]))]));
        let timeout = request.headers().get("grpc-timeout").cloned();
        response.headers_mut().extend(timeout.map(|timeout| (HeaderName::from_static("x-timeout"), timeout)));
        response
    })
    .await;
    let response = call(&Forward::new(), to(&upstream.endpoint, grpc(Some("5S")))).await;
    let left: u64 = response.headers()["x-timeout"].to_str().unwrap().trim_end_matches('u').parse().unwrap();
    assert!((1..=5_000_000).contains(&left), "{left}");
    let response = call(&Forward::new(), to(&upstream.endpoint, grpc(None))).await;
    assert!(!response.headers().contains_key("x-timeout"));

    let silent = h2_upstream(100, |_| std::future::pending()).await;
    let response = call(&Forward::new(), to(&silent.endpoint, grpc(Some("50m")))).await;
    assert_eq!((response.status().as_u16(), &response.headers()["grpc-status"]), (200, &"4".parse().unwrap()));
    assert!(http_body::Body::is_end_stream(response.body()), "trailers only");

    let endless = h2_upstream(100, |_| async {
        let first = futures::stream::iter([Ok(Frame::data(Bytes::from("\0\0\0\0\0")))]);
        let body = futures::StreamExt::chain(first, futures::stream::pending());
        let mut response = Response::new(StreamBody::new(body).boxed_unsync());
        response.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
        response
    })
    .await;
    let response = call(&Forward::new(), to(&endless.endpoint, grpc(Some("10S")))).await;
    pass(LONG).await;
    let collected = within(response.into_body().collect()).await.unwrap();
    assert_eq!(collected.trailers().unwrap()["grpc-status"], "4");
}

#[tokio::test]
async fn a_grpc_call_finds_http_2_by_itself_and_others_http_1() {
    let upstream = Upstream::bind().await;
    let forward = upstream.forward();
    let mut client = client(&forward).await;
    client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let mut server = upstream.accept().await;
    assert!(server.head().await.starts_with("GET / HTTP/1.1\r\n"));
    server.send(OK).await;
    client.message().await;
    let _call = tokio::spawn(forward.clone().call(grpc(None)));
    let mut server = upstream.accept().await;
    assert_eq!(server.exactly(16).await, "PRI * HTTP/2.0\r\n");
}
