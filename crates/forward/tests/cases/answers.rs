//! Whatever an upstream answers, the client gets that answer, or 502, or one that is seen to break off; and nothing of it
//! becomes the answer to the next request.
//!
//! The gate runs few cases; many: `PORTCULLIS_FUZZ_CASES=10000000 cargo test --release -p portcullis-forward --test wire answers::`.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Empty};
use portcullis_forward::Forward;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tower::ServiceExt;

use super::fuzz::{mutate, number, pick, socket};
use super::reading::Reader;
use super::within;

const STATUS: [&str; 12] = [
    "1.1 200 OK",
    "1.1 200 OK",
    "1.1 200 OK",
    "1.0 200 OK",
    "1.1 404 Not Found",
    "1.1 204 No Content",
    "1.1 304 Not Modified",
    "1.1 100 Continue",
    "1.1 103 Early Hints",
    "1.1 101 Switching Protocols",
    "1.1 200",
    "2.0 200 OK",
];
const FIELDS: [&str; 22] = [
    "content-length: {}",
    "content-length: {}",
    "content-length: {}",
    "Content-Length: 5",
    "content-length: 0",
    "content-length: 5, 5",
    "content-length: -1",
    "content-length:",
    "transfer-encoding: chunked",
    "transfer-encoding: chunked",
    "Transfer-Encoding: Chunked",
    "transfer-encoding: gzip, chunked",
    "transfer-encoding: identity",
    "connection: close",
    "connection: keep-alive",
    "connection: x-a",
    "x-a: b",
    "x-a: b\r\n folded",
    "x a: b",
    "set-cookie: a=b",
    "trailer: x-t",
    "upgrade: websocket",
];
const BODIES: [&str; 9] = [
    "",
    "",
    "hello",
    "5\r\nhello\r\n0\r\n\r\n",
    "5;a=b\r\nhello\r\n0\r\nx-t: 1\r\n\r\n",
    "5\r\nhelloX\r\n0\r\n\r\n",
    "5\nhello\n0\n\n",
    "0\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil",
    "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil",
];
/// What the next request is answered with.
const NEXT: &str = "the next";

fn answer(random: &mut fastrand::Rng) -> Vec<u8> {
    let mut text = String::new();
    for _ in 0..random.usize(1..3) {
        let body = pick(random, &BODIES);
        text.push_str(&format!("HTTP/{}\r\n", pick(random, &STATUS)));
        for _ in 0..random.usize(..4) {
            text.push_str(&pick(random, &FIELDS).replace("{}", &body.len().to_string()));
            text.push_str("\r\n");
        }
        text.push_str("\r\n");
        text.push_str(body);
    }
    let mut bytes = text.into_bytes();
    if random.u8(..) < 100 {
        mutate(random, &mut bytes);
    }
    bytes
}

/// What the upstream is to answer next, and whether the connection ends with it.
type Told = Arc<Mutex<Option<(Vec<u8>, bool)>>>;

/// Answers the first request with what it is told, then each with [`NEXT`].
async fn say(mut io: UnixStream, told: Told) {
    let mut heard = Vec::new();
    while let Ok(1..) = io.read_buf(&mut heard).await {
        if !heard.ends_with(b"\r\n\r\n") {
            continue;
        }
        heard.clear();
        let told = told.lock().unwrap().take();
        let next = || format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{NEXT}", NEXT.len()).into_bytes();
        let (bytes, closes) = told.unwrap_or_else(|| (next(), false));
        if io.write_all(&bytes).await.is_err() || closes {
            return;
        }
    }
}

/// What the client got: the status and body, or `None` for a body that broke off.
async fn call(forward: &Forward, method: &str) -> (u16, Option<Bytes>) {
    let request = Request::builder().method(method).uri("/").header("host", "h").body(Empty::<Bytes>::new()).unwrap();
    let response = within(forward.clone().oneshot(request)).await.unwrap_or_else(|never: Infallible| match never {});
    let status = response.status().as_u16();
    (status, within(response.into_body().collect()).await.ok().map(http_body_util::Collected::to_bytes))
}

#[tokio::test]
async fn nothing_of_an_answer_becomes_another() {
    let cases = number("PORTCULLIS_FUZZ_CASES", 4000);
    let mut random = fastrand::Rng::with_seed(number("PORTCULLIS_FUZZ_SEED", 7) as u64);
    let socket = socket();
    let listener = UnixListener::bind(&socket).unwrap();
    let told: Told = Arc::default();
    let tells = told.clone();
    tokio::spawn(async move {
        while let Ok((io, _)) = listener.accept().await {
            tokio::spawn(say(io, tells.clone()));
        }
    });
    let forward = Forward::to(&format!("unix:{}", socket.display())).unwrap();
    let (mut as_said, mut broken) = (0, 0);
    for _ in 0..cases {
        // POST, so that nothing is repeated.
        let method = pick(&mut random, &["POST", "POST", "POST", "HEAD"]);
        let bytes = answer(&mut random);
        let open = Reader::Lenient.answer(method, &bytes, false);
        // Without an end in sight the connection has to end instead.
        let closes = open.is_err() || random.u8(..) < 64;
        let want = Reader::Lenient.answer(method, &bytes, closes);
        *told.lock().unwrap() = Some((bytes.clone(), closes));
        let got = call(&forward, method).await;
        let about = || format!("{method} {:?} {want:?}", String::from_utf8_lossy(&bytes));
        match (&want, &got) {
            // Changing the protocol was not asked for.
            (Ok((said, _)), (502, _)) if said.status == 101 => broken += 1,
            (Ok((said, _)), (status, Some(body))) if said.status == *status => {
                assert!(*body == said.body, "{body:?} {}", about());
                as_said += 1;
            }
            // Stricter than need be, never laxer.
            (_, (502, Some(_)) | (_, None)) => broken += 1,
            _ => panic!("{got:?} {}", about()),
        }
        told.lock().unwrap().take();
        let next = call(&forward, "POST").await;
        assert_eq!(next, (200, Some(Bytes::from(NEXT))), "after {}", about());
    }
    std::fs::remove_file(socket).unwrap();
    println!("{cases} cases, {as_said} answers as they were said, {broken} refused or broken off");
    assert!(as_said > cases / 8 && broken > cases / 8, "too few of either: {as_said} {broken}");
}
