//! Requests of HTTP/1.1, plain and not, and what becomes of their bodies.

#![cfg(feature = "serve")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use portcullis::serve::{Incoming, Server};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};

type Out = UnsyncBoxBody<Bytes, BoxError>;
type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Says what it was told, once the request has been read.
#[derive(Clone)]
struct Tells(mpsc::UnboundedSender<String>, Arc<Notify>);

/// Says that it was dropped.
struct OnDrop(Tells);

struct Client {
    address: SocketAddr,
    io: TcpStream,
    told: mpsc::UnboundedReceiver<String>,
}

async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("in time")
}

impl Tells {
    async fn read(self, body: Incoming) {
        let said = match body.collect().await {
            Ok(body) => String::from_utf8(body.to_bytes().to_vec()).unwrap(),
            Err(error) => format!("error: {error}"),
        };
        _ = self.0.send(said);
    }
}

impl Drop for OnDrop {
    fn drop(&mut self) {
        _ = self.0.0.send("dropped".to_owned());
    }
}

async fn answer(request: Request<Incoming>, tells: Tells) -> Result<Response<Out>, Infallible> {
    let full = |text: &str| Full::from(text.to_owned()).map_err(Into::into).boxed_unsync();
    let path = request.uri().path().to_owned();
    let body = match &*path {
        "/read" => {
            tells.read(request.into_body()).await;
            full("read")
        }
        "/echo" => request.into_body().boxed_unsync(),
        // Somebody else reads on while, and after, this is answered.
        "/aside" => {
            tokio::spawn(tells.read(request.into_body()));
            full("aside")
        }
        // Somebody else waits for more of it, until told not to.
        "/leaves" => {
            let mut body = request.into_body();
            tokio::spawn(async move {
                let mut frame = body.frame();
                let waits = futures::poll!(&mut frame).is_pending();
                _ = tells.0.send(format!("waits: {waits}"));
                tells.1.notified().await;
                drop(frame);
            });
            full("leaves")
        }
        "/leave" => {
            tells.1.notify_one();
            full("left")
        }
        "/waits" => {
            let _dropped = OnDrop(tells);
            std::future::pending().await
        }
        // The same, without a use for the body.
        "/forgets" => {
            drop(request);
            let _dropped = OnDrop(tells);
            std::future::pending().await
        }
        "/long" | "/short" => {
            let text = if path == "/long" { "longer" } else { "sho" };
            let frames = [Ok(Frame::data(Bytes::from(text)))];
            let body = StreamBody::new(futures::stream::iter(frames)).boxed_unsync();
            return Ok(Response::builder().header("content-length", "4").body(body).unwrap());
        }
        "/switches" => {
            return Ok(Response::builder().status(101).body(Empty::new().map_err(Into::into).boxed_unsync()).unwrap());
        }
        _ => full(&path),
    };
    Ok(Response::new(body))
}

impl Client {
    async fn connect() -> Self {
        let (tell, told) = mpsc::unbounded_channel();
        let server = Server::bind(([127, 0, 0, 1], 0)).unwrap();
        let address: SocketAddr = server.local_addr().unwrap();
        let tells = Tells(tell, Arc::default());
        tokio::spawn(server.serve(tower::service_fn(move |request| answer(request, tells.clone()))));
        Self { address, io: TcpStream::connect(address).await.unwrap(), told }
    }

    async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.io.write_all(bytes.as_ref()).await.unwrap();
    }

    /// Reads up to and with `end`.
    async fn until(&mut self, end: &str) -> String {
        let mut read = String::new();
        while !read.ends_with(end) {
            let byte = within(self.io.read_u8()).await;
            read.push(byte.unwrap_or_else(|error| panic!("{error} after {read:?}")).into());
        }
        read
    }

    /// Reads an answer whose body ends in `body`, up to that; its head.
    async fn answer(&mut self, body: &str) -> String {
        let head = self.until("\r\n\r\n").await;
        assert!(self.until(body).await.len() == body.len(), "{head}");
        head
    }

    async fn rest(&mut self) -> String {
        let mut read = Vec::new();
        _ = within(self.io.read_to_end(&mut read)).await;
        String::from_utf8(read).unwrap()
    }

    async fn told(&mut self) -> String {
        within(self.told.recv()).await.unwrap()
    }
}

fn post(path: &str, length: usize) -> String {
    format!("POST {path} HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n")
}

const CHUNKED: &str = "POST /read HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";

#[tokio::test]
async fn requests_that_come_together_are_answered_in_order() {
    let mut client = Client::connect().await;
    let chunked = format!("{CHUNKED}2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n");
    client.send(format!("GET /a HTTP/1.1\r\n\r\n{}hello{chunked}\r\nGET /b HTTP/1.1\r\n\r\n", post("/read", 5))).await;
    for body in ["/a", "read", "read", "/b"] {
        let head = client.answer(body).await;
        assert!(
            head.contains(&format!("content-length: {}\r\n", body.len())) && !head.contains("connection"),
            "{head}"
        );
    }
    assert_eq!([client.told().await, client.told().await], ["hello", "hello"]);
}

#[tokio::test]
async fn a_body_is_read_however_it_arrives() {
    let whole = format!("{CHUNKED}5;a=b\r\nhello\r\n0\r\nx: y\r\n\r\n{}hello", post("/read", 5));
    for step in [1, 2, 7] {
        let mut client = Client::connect().await;
        client.io.set_nodelay(true).unwrap();
        for piece in whole.as_bytes().chunks(step) {
            client.send(piece).await;
            tokio::task::yield_now().await;
        }
        for _ in 0..2 {
            client.answer("read").await;
            assert_eq!(client.told().await, "hello");
        }
    }
}

#[tokio::test]
async fn a_body_may_be_read_by_another_task_when_the_answer_is_out() {
    let mut client = Client::connect().await;
    client.send(post("/aside", 10)).await;
    client.answer("aside").await;
    client.send("01234").await;
    client.send("56789GET /next HTTP/1.1\r\n\r\n").await;
    assert_eq!(client.told().await, "0123456789");
    client.answer("/next").await;
}

#[tokio::test]
async fn whoever_waits_for_a_body_in_vain_and_leaves_ends_the_connection() {
    let mut client = Client::connect().await;
    client.send(post("/leaves", 10)).await;
    client.answer("leaves").await;
    assert_eq!(client.told().await, "waits: true");
    let mut other = TcpStream::connect(client.address).await.unwrap();
    other.write_all(b"GET /leave HTTP/1.1\r\n\r\n").await.unwrap();
    assert_eq!(client.rest().await, "");
}

#[tokio::test]
async fn a_body_comes_back_while_it_arrives() {
    let mut client = Client::connect().await;
    client.send("POST /echo HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n").await;
    assert!(client.until("\r\n\r\n").await.contains("transfer-encoding: chunked\r\n"));
    for piece in ["2\r\nhe\r\n", "3\r\nllo\r\n", "0\r\n\r\n"] {
        client.send(piece).await;
        assert_eq!(client.until(piece).await, piece);
    }
}

#[tokio::test]
async fn what_nobody_reads_ends_the_connection_unless_it_is_all_there() {
    let mut client = Client::connect().await;
    client.send(format!("{}hello", post("/a", 5))).await;
    assert!(!client.answer("/a").await.contains("connection"));
    client.send(format!("{}hello", post("/a", 6))).await;
    assert!(client.answer("/a").await.contains("connection: close\r\n"));
    assert_eq!(client.rest().await, "");
}

/// As old clients write behind a body.
#[tokio::test]
async fn empty_lines_before_a_request_are_nothing() {
    let mut client = Client::connect().await;
    for _ in 0..3 {
        client.send("\r\n\n\r\n").await;
        client.send("\r\nGET /a HTTP/1.1\r\n\r\n\r\n").await;
        client.answer("/a").await;
    }
}

#[tokio::test]
async fn a_body_that_breaks_off_is_not_whole() {
    for (request, end) in [
        (format!("{}hell", post("/read", 5)), true),
        (format!("{CHUNKED}5\r\nhell"), true),
        (format!("{CHUNKED}5\r\nhello\r\n0\r\n"), true),
        (format!("{CHUNKED}5\r\nhello!\r\n0\r\n\r\n"), false),
        (format!("{CHUNKED}x\r\n"), false),
    ] {
        let mut client = Client::connect().await;
        client.send(&request).await;
        if end {
            client.io.shutdown().await.unwrap();
        }
        assert!(client.told().await.starts_with("error: "), "{request:?}");
        let rest = client.rest().await;
        assert!(rest.is_empty() || rest.contains("connection: close\r\n"), "{rest:?}");
    }
}

#[tokio::test]
async fn nobody_works_for_a_client_that_has_gone() {
    let requests = [
        "GET /waits HTTP/1.1\r\n\r\n".to_owned(),
        format!("{}hello", post("/waits", 5)),
        format!("{}hel", post("/forgets", 5)),
    ];
    for request in requests {
        let mut client = Client::connect().await;
        client.send(request).await;
        client.io.shutdown().await.unwrap();
        assert_eq!(client.told().await, "dropped");
    }
}

#[tokio::test]
async fn an_answer_that_is_not_as_long_as_it_says_is_never_whole() {
    for path in ["/long", "/short"] {
        let mut client = Client::connect().await;
        client.send(format!("GET {path} HTTP/1.1\r\n\r\nGET /a HTTP/1.1\r\n\r\n")).await;
        let rest = client.rest().await;
        let body = rest.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        assert!(body.len() < 4 && !rest.contains("/a"), "{rest:?}");
    }
}

#[tokio::test]
async fn another_protocol_that_nobody_asked_for_is_a_failure() {
    let mut client = Client::connect().await;
    client.send("GET /switches HTTP/1.1\r\n\r\n").await;
    let rest = client.rest().await;
    assert!(rest.starts_with("HTTP/1.1 500 ") && rest.contains("connection: close\r\n"), "{rest}");
}

#[tokio::test]
async fn plain_requests_and_others_share_a_connection() {
    let mut client = Client::connect().await;
    client
        .send("GET /a HTTP/1.1\r\n\r\nGET /b HTTP/1.0\r\nconnection: keep-alive\r\n\r\nGET /c HTTP/1.1\r\n\r\n")
        .await;
    for body in ["/a", "/b", "/c"] {
        client.answer(body).await;
    }
    let mut client = Client::connect().await;
    client
        .send(format!("GET /a HTTP/1.1\r\n\r\n{}", post("/read", 5).replace("host: a", "expect: 100-continue")))
        .await;
    client.answer("/a").await;
    assert_eq!(client.until("\r\n\r\n").await, "HTTP/1.1 100 Continue\r\n\r\n");
    client.send("hello").await;
    client.answer("read").await;
    assert_eq!(client.told().await, "hello");
}

#[tokio::test]
async fn a_large_body_goes_both_ways_at_once() {
    let mut client = Client::connect().await;
    let data: Arc<[u8]> = (0..3_000_000_u32).map(|i| ((i * 31) >> 7) as u8).collect();
    client.send(post("/echo", data.len())).await;
    assert!(client.until("\r\n\r\n").await.contains(" 200 "));
    let (mut read, mut write) = client.io.split();
    let mut back = vec![0; data.len()];
    let (sent, got) = within(async { tokio::join!(write.write_all(&data), read.read_exact(&mut back)) }).await;
    sent.unwrap();
    got.unwrap();
    assert!(back == *data);
}
