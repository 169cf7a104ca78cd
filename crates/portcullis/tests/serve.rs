//! The server: limits, and an end that comes.

#![cfg(feature = "serve")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Empty, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use portcullis::core::{Carried, PeerAddress, PeerTls};
use portcullis::serve::{Incoming, Server, ServerTls};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Notify, oneshot};
use tokio::task::{JoinHandle, JoinSet};

const PATIENCE: Duration = Duration::from_secs(20);

async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(PATIENCE, future).await.expect("in time")
}

/// Says who is calling; `/slow` waits for `release` first, `/read` then reads the body and returns it, `/upgrade` changes the
/// protocol and echoes.
async fn answer(mut request: Request<Incoming>, release: Arc<Notify>) -> Result<Response<Full<Bytes>>, Infallible> {
    let PeerAddress(peer) = *PeerAddress::of(request.extensions()).unwrap();
    let tls = PeerTls::of(request.extensions()).is_some();
    match request.uri().path() {
        "/slow" => release.notified().await,
        "/read" => {
            release.notified().await;
            let body = request.into_body().collect().await.unwrap();
            return Ok(Response::new(Full::from(body.to_bytes())));
        }
        "/upgrade" => {
            let upgraded = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let mut io = TokioIo::new(upgraded.await.unwrap());
                let mut buffer = [0; 64];
                while let Ok(count @ 1..) = io.read(&mut buffer).await {
                    io.write_all(&buffer[..count]).await.unwrap();
                }
            });
            let response = Response::builder().status(101).header("connection", "upgrade").header("upgrade", "echo");
            return Ok(response.body(Full::default()).unwrap());
        }
        _ => {}
    }
    Ok(Response::new(Full::from(format!("{} {:?} {tls}", peer.ip(), request.version()))))
}

struct Running {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    served: JoinHandle<std::io::Result<()>>,
    release: Arc<Notify>,
}

impl Running {
    fn start(server: Server, deadline: Duration) -> Self {
        let address = server.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let server = server.graceful(async { _ = stopped.await }, deadline);
        let release = Arc::new(Notify::new());
        let shared = release.clone();
        let service = tower::service_fn(move |request| answer(request, shared.clone()));
        Self { address, stop: Some(stop), served: tokio::spawn(server.serve(service)), release }
    }

    fn drain(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }

    async fn connect(&self) -> TcpStream {
        within(TcpStream::connect(self.address)).await.unwrap()
    }

    async fn ended(self) {
        within(self.served).await.unwrap().unwrap();
    }
}

fn local() -> Server {
    Server::bind(([127, 0, 0, 1], 0)).unwrap()
}

async fn send(io: &mut TcpStream, path: &str) {
    io.write_all(format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes()).await.unwrap();
}

async fn until(io: &mut TcpStream, end: &str) -> String {
    let mut read = String::new();
    while !read.ends_with(end) {
        let mut byte = [0];
        within(io.read_exact(&mut byte)).await.unwrap_or_else(|error| panic!("{error} after {read:?}"));
        read.push(byte[0].into());
    }
    read
}

async fn rest(io: &mut TcpStream) -> String {
    let mut read = Vec::new();
    _ = within(io.read_to_end(&mut read)).await;
    String::from_utf8(read).unwrap()
}

async fn h2(io: TcpStream) -> hyper::client::conn::http2::SendRequest<Empty<Bytes>> {
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(io)).await.unwrap();
    tokio::spawn(connection);
    sender
}

async fn upgraded(running: &Running) -> TcpStream {
    let mut echo = running.connect().await;
    echo.write_all(b"GET /upgrade HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n").await.unwrap();
    until(&mut echo, "\r\n\r\n").await;
    echo
}

fn get(path: &str) -> Request<Empty<Bytes>> {
    Request::get(format!("http://a{path}")).body(Empty::new()).unwrap()
}

#[tokio::test]
async fn requests_know_their_peer_over_both_protocols() {
    let mut running = Running::start(local(), PATIENCE);
    let mut io = running.connect().await;
    send(&mut io, "/").await;
    until(&mut io, "127.0.0.1 HTTP/1.1 false").await;
    let mut sender = h2(running.connect().await).await;
    let response = within(sender.send_request(get("/"))).await.unwrap();
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "127.0.0.1 HTTP/2.0 false");
    drop((sender, io));
    running.drain();
    running.ended().await;
}

#[tokio::test]
async fn a_drain_finishes_what_is_under_way_and_closes_what_is_idle() {
    let mut running = Running::start(local(), PATIENCE);
    let mut idle = running.connect().await;
    send(&mut idle, "/").await;
    until(&mut idle, "false").await;
    // Not a request that has begun.
    idle.write_all(b"\r\n").await.unwrap();
    let mut busy = running.connect().await;
    send(&mut busy, "/slow").await;
    let mut sender = h2(running.connect().await).await;
    let stream = sender.send_request(get("/slow"));
    // Both have arrived once a later request on another connection was answered.
    within(sender.clone().send_request(get("/"))).await.unwrap();
    let mut late = running.connect().await;
    send(&mut late, "/").await;
    until(&mut late, "false").await;
    running.drain();
    assert_eq!(rest(&mut idle).await, "");
    running.release.notify_waiters();
    let (answer, response) = tokio::join!(rest(&mut busy), within(stream));
    assert!(answer.contains("connection: close\r\n") && answer.ends_with("127.0.0.1 HTTP/1.1 false"), "{answer}");
    assert_eq!(response.unwrap().status(), 200);
    drop(sender);
    let address = running.address;
    running.ended().await;
    assert!(TcpStream::connect(address).await.is_err(), "nobody listens any more");
}

/// Callers who go on asking, over either protocol, until their connection ends: whatever reached the service was answered.
#[tokio::test]
async fn a_drain_under_load_loses_nothing_that_was_begun() {
    for _ in 0..10 {
        let (reached, answered) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (stop, stopped) = oneshot::channel::<()>();
        let server = local().graceful(async { _ = stopped.await }, PATIENCE);
        let address = server.local_addr().unwrap();
        let counted = reached.clone();
        let served = tokio::spawn(server.serve(tower::service_fn(move |_: Request<Incoming>| {
            counted.fetch_add(1, Ordering::Relaxed);
            async {
                tokio::task::yield_now().await;
                Ok::<_, Infallible>(Response::new(Full::from("all of it")))
            }
        })));
        let mut callers = JoinSet::new();
        for caller in 0..8 {
            let answered = answered.clone();
            callers.spawn(async move {
                let io = TcpStream::connect(address).await.unwrap();
                if caller % 2 == 0 {
                    let mut sender = h2(io).await;
                    while let Ok(response) = sender.send_request(get("/")).await {
                        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "all of it");
                        answered.fetch_add(1, Ordering::Relaxed);
                    }
                } else {
                    let mut io = tokio::io::BufReader::new(io);
                    let mut answer = Vec::new();
                    while io.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.is_ok() {
                        while !answer.ends_with(b"all of it") {
                            if !matches!(io.read_buf(&mut answer).await, Ok(1..)) {
                                assert!(answer.is_empty(), "half an answer");
                                return;
                            }
                        }
                        answer.clear();
                        answered.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        while answered.load(Ordering::Relaxed) < 200 {
            tokio::task::yield_now().await;
        }
        stop.send(()).unwrap();
        within(served).await.unwrap().unwrap();
        within(callers.join_all()).await;
        assert_eq!(answered.load(Ordering::Relaxed), reached.load(Ordering::Relaxed));
    }
}

#[tokio::test]
async fn a_connection_made_before_the_drain_is_served_its_first_request() {
    let mut running = Running::start(local(), PATIENCE);
    let mut early = running.connect().await;
    // It was accepted once a later one was answered.
    let mut later = running.connect().await;
    send(&mut later, "/").await;
    until(&mut later, "false").await;
    running.drain();
    assert_eq!(rest(&mut later).await, "");
    send(&mut early, "/").await;
    assert!(rest(&mut early).await.starts_with("HTTP/1.1 200 OK\r\n"));
    running.ended().await;
}

#[tokio::test]
async fn the_deadline_cuts_requests_streams_and_upgraded_connections() {
    let mut running = Running::start(local(), Duration::from_millis(100));
    let mut busy = running.connect().await;
    send(&mut busy, "/slow").await;
    let mut sender = h2(running.connect().await).await;
    let stream = sender.send_request(get("/slow"));
    let mut echo = upgraded(&running).await;
    echo.write_all(b"hello").await.unwrap();
    until(&mut echo, "hello").await;
    running.drain();
    running.ended().await;
    assert_eq!(rest(&mut busy).await, "");
    assert_eq!(rest(&mut echo).await, "");
    assert!(within(stream).await.is_err());
}

#[tokio::test]
async fn an_upgraded_connection_is_part_of_the_drain() {
    let mut running = Running::start(local(), PATIENCE * 10);
    let mut echo = upgraded(&running).await;
    running.drain();
    echo.write_all(b"still here").await.unwrap();
    until(&mut echo, "still here").await;
    assert!(!running.served.is_finished());
    drop(echo);
    running.ended().await;
}

#[tokio::test]
async fn dropping_the_server_ends_everything() {
    let running = Running::start(local(), PATIENCE);
    let mut io = running.connect().await;
    send(&mut io, "/slow").await;
    let mut echo = upgraded(&running).await;
    running.served.abort();
    assert_eq!(rest(&mut io).await, "");
    assert_eq!(rest(&mut echo).await, "");
}

#[tokio::test]
async fn each_core_has_a_runtime_and_all_share_one_address() {
    let server = Server::bind_per_core(([127, 0, 0, 1], 0), NonZeroUsize::new(3).unwrap()).unwrap();
    let mut running = Running::start(server, PATIENCE);
    for _ in 0..30 {
        let mut io = running.connect().await;
        send(&mut io, "/").await;
        until(&mut io, "false").await;
    }
    let mut idle = running.connect().await;
    send(&mut idle, "/").await;
    until(&mut idle, "false").await;
    running.drain();
    assert_eq!(rest(&mut idle).await, "");
    running.ended().await;
}

#[tokio::test]
async fn heads_are_limited_in_size_and_time() {
    let mut running = Running::start(local().max_head(8192).header_timeout(Duration::from_millis(200)), PATIENCE);
    for fields in [format!("x: {}\r\n", "x".repeat(20_000)), "x: y\r\n".repeat(200)] {
        let mut large = running.connect().await;
        large.write_all(format!("GET / HTTP/1.1\r\nhost: a\r\n{fields}\r\n").as_bytes()).await.unwrap();
        assert!(until(&mut large, "\r\n").await.starts_with("HTTP/1.1 431 "));
    }
    // One that has begun is answered; one that has not, only closed, also before the first word and after an answer.
    let mut slow = running.connect().await;
    slow.write_all(b"GET / HTTP/1.1\r\nhos").await.unwrap();
    assert_eq!(rest(&mut slow).await, LATE);
    let mut silent = running.connect().await;
    assert_eq!(rest(&mut silent).await, "");
    let mut half = running.connect().await;
    half.write_all(b"PRI * HT").await.unwrap();
    assert_eq!(rest(&mut half).await, "");
    let mut idle = running.connect().await;
    send(&mut idle, "/").await;
    until(&mut idle, "false").await;
    assert_eq!(rest(&mut idle).await, "");
    let mut second = running.connect().await;
    send(&mut second, "/").await;
    until(&mut second, "false").await;
    second.write_all(b"G").await.unwrap();
    assert_eq!(rest(&mut second).await, LATE);
    running.drain();
    running.ended().await;
}

const LATE: &str = "HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";

/// What a client has not read yet is not followed by an answer to something else.
#[tokio::test]
async fn an_answer_that_is_being_read_is_not_interrupted_by_a_late_head() {
    let server = local().header_timeout(Duration::from_millis(50));
    let address = server.local_addr().unwrap();
    let large = vec![b'x'; 16 << 20];
    let length = large.len();
    let service = tower::service_fn(move |_: Request<Incoming>| {
        let body = Full::new(Bytes::from(large.clone()));
        async move { Ok::<_, Infallible>(Response::new(body)) }
    });
    let _served = tokio::spawn(server.serve(service));
    let mut io = TcpStream::connect(address).await.unwrap();
    // The second head begins and never ends.
    io.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\nGET / HT").await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let got = rest(&mut io).await;
    let (head, body) = got.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(body.bytes().take(length).all(|byte| byte == b'x'));
    assert!(matches!(&body[body.len().min(length)..], "" | LATE), "{}", &body[length..]);
    assert!(body.len() >= length, "it was cut short");
}

#[tokio::test]
async fn connections_beyond_the_limit_wait() {
    let running = Running::start(local().max_connections(1), PATIENCE);
    let mut first = running.connect().await;
    send(&mut first, "/").await;
    until(&mut first, "false").await;
    let mut second = running.connect().await;
    send(&mut second, "/").await;
    let mut byte = [0];
    assert!(tokio::time::timeout(Duration::from_millis(50), second.read(&mut byte)).await.is_err());
    drop(first);
    until(&mut second, "false").await;
}

/// A listener that nobody comes to has no place that another one needs.
#[tokio::test]
async fn there_may_be_fewer_places_than_listeners() {
    let two = NonZeroUsize::new(2).unwrap();
    let server = Server::bind_per_core(([127, 0, 0, 1], 0), two).unwrap().max_connections(1);
    let mut running = Running::start(server, PATIENCE);
    for _ in 0..20 {
        let mut io = running.connect().await;
        send(&mut io, "/").await;
        until(&mut io, "false").await;
    }
    running.drain();
    running.ended().await;
}

/// What it still sends must not reset the connection before it has read its answer, whoever serves it.
#[tokio::test]
async fn a_client_that_is_answered_before_it_has_sent_its_request_can_go_on_sending() {
    let running = Running::start(local(), PATIENCE);
    for offer in ["", "connection: upgrade\r\nupgrade: h2c\r\n"] {
        let mut io = running.connect().await;
        let head = format!("POST / HTTP/1.1\r\nhost: a\r\n{offer}content-length: 1000000\r\n\r\n");
        io.write_all(head.as_bytes()).await.unwrap();
        until(&mut io, "false").await;
        for _ in 0..50 {
            io.write_all(&[b'x'; 20_000]).await.unwrap_or_else(|error| panic!("{error}, {offer:?}"));
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        io.shutdown().await.unwrap();
        assert_eq!(rest(&mut io).await, "", "{offer:?}");
    }
}

#[tokio::test]
async fn a_connection_that_has_ended_leaves_its_place() {
    let mut running = Running::start(local().max_connections(1), Duration::from_secs(3600));
    for _ in 0..5 {
        let mut io = running.connect().await;
        io.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        rest(&mut io).await;
        let h2 = h2(running.connect().await).await;
        drop(h2);
    }
    running.drain();
    running.ended().await;
}

/// Never ends, and says when it is let go.
struct Endless(Arc<Notify>);

impl http_body::Body for Endless {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Infallible>>> {
        Poll::Ready(Some(Ok(http_body::Frame::data(Bytes::from_static(&[0; 16384])))))
    }
}

impl Drop for Endless {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

/// A connection to a server whose answers have no end and whose readers have little time, and when an answer is dropped.
async fn endless() -> (TcpStream, Arc<Notify>) {
    let server = local().write_timeout(Duration::from_millis(100));
    let address = server.local_addr().unwrap();
    let dropped = Arc::new(Notify::new());
    let shared = dropped.clone();
    let service = tower::service_fn(move |_: Request<Incoming>| {
        let body = Endless(shared.clone());
        async move { Ok::<_, Infallible>(Response::new(body)) }
    });
    tokio::spawn(server.serve(service));
    (TcpStream::connect(address).await.unwrap(), dropped)
}

#[tokio::test]
async fn a_reader_who_does_not_read_is_let_go() {
    let (mut io, dropped) = endless().await;
    send(&mut io, "/").await;
    within(dropped.notified()).await;
}

#[cfg(feature = "forward")]
#[tokio::test]
async fn a_stream_of_http_2_can_be_a_tunnel() {
    let upstream = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let policy = portcullis::forward::Policy::new().tunnels(true);
    let forward = portcullis::forward::Forward::to(&upstream.local_addr().unwrap().to_string()).unwrap();
    let server = local();
    let address = server.local_addr().unwrap();
    let _served = tokio::spawn(server.serve(forward.policy(policy)));
    let mut sender = h2(TcpStream::connect(address).await.unwrap()).await;
    let request = Request::connect("elsewhere.test:443").body(Empty::new()).unwrap();
    let (response, accepted) = tokio::join!(within(sender.send_request(request)), within(upstream.accept()));
    let mut far = accepted.unwrap().0;
    let mut near = TokioIo::new(hyper::upgrade::on(response.unwrap()).await.unwrap());
    near.write_all(b"ping").await.unwrap();
    let mut read = [0; 4];
    within(far.read_exact(&mut read)).await.unwrap();
    assert_eq!(&read, b"ping");
    far.write_all(b"pong").await.unwrap();
    drop(far);
    let mut read = Vec::new();
    within(near.read_to_end(&mut read)).await.unwrap();
    assert_eq!(read, b"pong");
}

/// What an answer to HEAD would have said is not said; how long it would have been is.
#[tokio::test]
async fn an_answer_to_head_has_no_body_in_http_2() {
    let running = Running::start(local(), PATIENCE);
    let mut sender = h2(running.connect().await).await;
    let mut request = get("/");
    *request.method_mut() = http::Method::HEAD;
    let response = within(sender.send_request(request)).await.unwrap();
    assert_eq!(response.headers()["content-length"], "24");
    assert!(response.headers().contains_key("date"));
    assert!(http_body::Body::is_end_stream(response.body()));
}

/// The connection preface and empty settings.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// The connection is well then; the stream alone ends, and gives back what it held.
#[tokio::test]
async fn a_stream_whose_reader_takes_nothing_is_reset() {
    let (mut io, dropped) = endless().await;
    // A window of nothing for each stream, and GET http://a/.
    io.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x06\x04\0\0\0\0\0\0\x04\0\0\0\0").await.unwrap();
    io.write_all(b"\0\0\x06\x01\x05\0\0\0\x01\x82\x86\x84\x41\x01a").await.unwrap();
    within(dropped.notified()).await;
    let reset = async {
        loop {
            let mut head = [0; 9];
            io.read_exact(&mut head).await.unwrap();
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; usize::try_from(length).unwrap()];
            io.read_exact(&mut payload).await.unwrap();
            if head[3] == 3 {
                return head[8];
            }
        }
    };
    assert_eq!(within(reset).await, 1);
}

/// Or half an upload would be forwarded as a whole one.
#[tokio::test]
async fn a_request_that_its_client_resets_is_not_whole_whatever_the_reset_says() {
    let (told, mut bodies) = tokio::sync::mpsc::channel(1);
    let server = local();
    let address = server.local_addr().unwrap();
    tokio::spawn(server.serve(tower::service_fn(move |request: Request<Incoming>| {
        // In a task of its own, which goes on when the stream is over.
        let (mut body, told) = (request.into_body(), told.clone());
        tokio::spawn(async move {
            while let Some(frame) = body.frame().await {
                told.send(frame.map(|frame| frame.into_data().unwrap())).await.unwrap();
            }
        });
        std::future::pending::<Result<Response<Empty<Bytes>>, Infallible>>()
    })));
    let mut io = within(TcpStream::connect(address)).await.unwrap();
    io.write_all(PREFACE).await.unwrap();
    // POST http://a/, three bytes, and a reset for no reason.
    io.write_all(b"\0\0\x06\x01\x04\0\0\0\x01\x83\x86\x84\x41\x01a\0\0\x03\0\0\0\0\0\x01abc").await.unwrap();
    assert_eq!(within(bodies.recv()).await.unwrap().unwrap(), "abc");
    io.write_all(b"\0\0\x04\x03\0\0\0\0\x01\0\0\0\0").await.unwrap();
    assert!(within(bodies.recv()).await.unwrap().is_err());
}

#[tokio::test]
async fn a_client_that_is_still_sending_hears_why_it_is_refused() {
    let server = local();
    let address = server.local_addr().unwrap();
    let service = tower::service_fn(|_: Request<Incoming>| async {
        let mut response = Response::new(Full::<Bytes>::from("no"));
        *response.status_mut() = http::StatusCode::PAYLOAD_TOO_LARGE;
        Ok::<_, Infallible>(response)
    });
    let _served = tokio::spawn(server.serve(service));
    let (mut answers, mut asks) = TcpStream::connect(address).await.unwrap().into_split();
    let sending = tokio::spawn(async move {
        asks.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 8000000\r\n\r\n").await.unwrap();
        _ = asks.write_all(&vec![0; 8_000_000]).await;
    });
    let mut answer = Vec::new();
    within(answers.read_to_end(&mut answer)).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 413 "));
    sending.abort();
}

/// What the server said until it closed: whether it asked for calm (`GOAWAY`, `ENHANCE_YOUR_CALM`), unless the reset of
/// the connection overtook that.
async fn let_go(mut io: TcpStream) {
    let mut read = Vec::new();
    _ = within(io.read_to_end(&mut read)).await;
    assert!(read.len() < 64 * 1024, "it answers: {}", read.len());
}

#[tokio::test]
async fn a_client_that_resets_streams_without_end_is_let_go() {
    let running = Running::start(local(), PATIENCE);
    let mut io = running.connect().await;
    io.write_all(PREFACE).await.unwrap();
    // GET http://a/slow, then RST_STREAM, over and over.
    let head = [&[0x82, 0x86, 0x41, 1, b'a', 0x44, 5][..], b"/slow"].concat();
    let mut flood = Vec::new();
    for stream in (1_u32..40_000).step_by(2) {
        flood.extend([0, 0, u8::try_from(head.len()).unwrap(), 1, 5]);
        flood.extend(stream.to_be_bytes());
        flood.extend(&head);
        flood.extend([0, 0, 4, 3, 0]);
        flood.extend(stream.to_be_bytes());
        flood.extend(8_u32.to_be_bytes());
    }
    _ = io.write_all(&flood).await;
    let_go(io).await;
    let mut other = running.connect().await;
    send(&mut other, "/").await;
    until(&mut other, "false").await;
}

#[tokio::test]
async fn continuations_without_end_are_let_go() {
    let running = Running::start(local(), PATIENCE);
    let mut io = running.connect().await;
    io.write_all(PREFACE).await.unwrap();
    io.write_all(&[0, 0, 1, 1, 1, 0, 0, 0, 1, 0x82]).await.unwrap();
    // One literal field in one CONTINUATION after the other, none of them the last.
    let field = [&[0, 1, b'x', 126][..], &[b'y'; 126]].concat();
    let mut frame = vec![0, 0, u8::try_from(field.len()).unwrap(), 9, 0, 0, 0, 0, 1];
    frame.extend(&field);
    let mut sent = 0;
    while sent < 100_000 && io.write_all(&frame).await.is_ok() {
        sent += 1;
    }
    assert!(sent < 100_000, "{sent} frames were taken");
}

#[tokio::test]
async fn over_http2_a_client_that_waits_is_told_to_go_ahead_once_its_body_is_wanted() {
    let running = Running::start(local(), PATIENCE);
    let (mut sender, connection) = h2::client::handshake(running.connect().await).await.unwrap();
    tokio::spawn(connection);
    let post = |path: &str, expect: &str| Request::post(format!("http://a{path}")).header("expect", expect).body(());
    let (mut answer, mut body) = sender.send_request(post("/read", "100-Continue").unwrap(), false).unwrap();
    // Answered later than the first was begun.
    let (other, _) = sender.send_request(Request::get("http://a/").body(()).unwrap(), true).unwrap();
    assert_eq!(within(other).await.unwrap().status(), 200);
    let told = std::future::poll_fn(|cx| Poll::Ready(answer.poll_informational(cx).is_pending()));
    assert!(told.await, "nobody wants it yet");
    running.release.notify_one();
    let told = within(std::future::poll_fn(|cx| answer.poll_informational(cx))).await.unwrap().unwrap();
    assert_eq!(told.status(), 100);
    body.send_data("hello".into(), true).unwrap();
    let response = within(answer).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(within(response.into_body().data()).await.unwrap().unwrap(), "hello");
    // Whoever is answered without is not.
    let (mut answer, _body) = sender.send_request(post("/", "100-continue").unwrap(), false).unwrap();
    let told = within(std::future::poll_fn(|cx| answer.poll_informational(cx))).await;
    assert!(told.is_none(), "{told:?}");
    assert_eq!(within(answer).await.unwrap().status(), 200);
}

#[cfg(feature = "forward")]
#[tokio::test]
async fn a_tunnel_in_a_stream_says_that_its_other_end_broke() {
    let upstream = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let policy = portcullis::forward::Policy::new().tunnels(true);
    let forward = portcullis::forward::Forward::to(&upstream.local_addr().unwrap().to_string()).unwrap();
    let server = local();
    let address = server.local_addr().unwrap();
    tokio::spawn(server.serve(forward.policy(policy)));
    let (mut sender, connection) = h2::client::handshake(TcpStream::connect(address).await.unwrap()).await.unwrap();
    tokio::spawn(connection);
    let (answer, mut near) = sender.send_request(Request::connect("a.test:443").body(()).unwrap(), false).unwrap();
    let mut far = within(upstream.accept()).await.unwrap().0;
    let mut heard = within(answer).await.unwrap().into_body();
    near.send_data("ping".into(), false).unwrap();
    far.read_exact(&mut [0; 2]).await.unwrap();
    // With something unread it is no end, but a reset.
    drop(far);
    let error = within(heard.data()).await.unwrap().unwrap_err();
    assert_eq!(error.reason(), Some(h2::Reason::CONNECT_ERROR), "{error}");
}

#[tokio::test]
async fn a_client_that_does_not_answer_pings_is_let_go() {
    let (often, soon) = (Duration::from_millis(20), Duration::from_secs(2));
    let running = Running::start(local().keep_alive(often, soon), PATIENCE);
    let mut mute = running.connect().await;
    mute.write_all(PREFACE).await.unwrap();
    let mut answers = h2(running.connect().await).await;
    _ = within(mute.read_to_end(&mut Vec::new())).await;
    let response = within(answers.send_request(get("/"))).await.unwrap();
    assert_eq!(response.status(), 200, "who answers stays");
}

#[tokio::test]
async fn empty_frames_without_end_are_let_go_or_cost_nothing() {
    let running = Running::start(local(), PATIENCE);
    let mut io = running.connect().await;
    io.write_all(PREFACE).await.unwrap();
    // POST http://a/slow, and then DATA without data.
    let head = [&[0x83, 0x86, 0x41, 1, b'a', 0x44, 5][..], b"/slow"].concat();
    let mut flood = vec![0, 0, u8::try_from(head.len()).unwrap(), 1, 4, 0, 0, 0, 1];
    flood.extend(&head);
    flood.extend([0, 0, 0, 0, 0, 0, 0, 0, 1].repeat(200_000));
    _ = io.write_all(&flood).await;
    let mut other = running.connect().await;
    send(&mut other, "/").await;
    until(&mut other, "false").await;
    drop(io);
}

#[tokio::test]
async fn tls_offers_both_protocols_and_tells_the_service() {
    let certificate = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (chain, key) = (certificate.cert.pem(), certificate.signing_key.serialize_pem());
    let tls = ServerTls::new(chain.as_bytes(), key.as_bytes()).unwrap();
    assert!(ServerTls::new(b"", key.as_bytes()).is_err());
    assert!(ServerTls::new(chain.as_bytes(), b"nonsense").is_err());
    let running = Running::start(local().tls(tls), PATIENCE);
    let mut roots = tokio_rustls::rustls::RootCertStore::empty();
    roots.add(certificate.cert.der().clone()).unwrap();
    for (protocol, version) in [(&b"h2"[..], "HTTP/2.0"), (b"http/1.1", "HTTP/1.1")] {
        let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
        let mut config = tokio_rustls::rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots.clone())
            .with_no_client_auth();
        config.alpn_protocols = vec![protocol.to_vec()];
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let stream = connector.connect("localhost".try_into().unwrap(), running.connect().await).await.unwrap();
        let io = TokioIo::new(stream);
        let body = if protocol == b"h2" {
            let (mut sender, connection) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
            tokio::spawn(connection);
            within(sender.send_request(get("/"))).await.unwrap().into_body()
        } else {
            let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
            tokio::spawn(connection);
            within(sender.send_request(get("/"))).await.unwrap().into_body()
        };
        assert_eq!(body.collect().await.unwrap().to_bytes(), format!("127.0.0.1 {version} true"));
    }
}
