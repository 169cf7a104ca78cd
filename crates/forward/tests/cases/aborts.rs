//! Either side goes away after every single byte: what was cut short is never whole for the other, and nothing is kept.

use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Empty};
use portcullis_forward::Forward;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tower::ServiceExt;

use super::reading::{Read, Reader};
use super::{LONG, OK, Raw, Upstream, pass, within};
use crate::Front;

const REQUESTS: [&str; 3] = [
    "GET /a HTTP/1.1\r\nhost: a\r\n\r\n",
    "POST /a HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhello",
    "POST /a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
];
const ANSWERS: [&str; 2] = [
    "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
    "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
];

/// One connection at most, so that one that is not given back is missed by the next request.
fn forward(upstream: &Upstream) -> Forward {
    upstream.forward().max_connections(1).connect_timeout(Duration::from_secs(5))
}

/// The next request is served as if nothing had happened.
async fn is_well(forward: &Forward) {
    let request = Request::get("/well").header("host", "a").body(Empty::<Bytes>::new()).unwrap();
    let response = within(forward.clone().oneshot(request)).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "ok");
}

/// Answers whole requests with [`OK`] until the other side ends; how many there were.
async fn listens(mut server: Raw) -> usize {
    let mut whole = 0;
    loop {
        match Reader::Strict.read(&server.read) {
            Read::Whole(_, used) => {
                server.read.drain(..used);
                whole += 1;
                if server.io.write_all(OK.as_bytes()).await.is_err() {
                    return whole;
                }
            }
            Read::More if server.more().await => {}
            Read::More => return whole,
            Read::Bad(bad) => panic!("{bad}: {:?}", String::from_utf8_lossy(&server.read)),
        }
    }
}

#[tokio::test]
async fn a_client_goes_away_after_every_byte() {
    for request in REQUESTS {
        for sent in 0..request.len() {
            let upstream = Upstream::bind().await;
            let forward = forward(&upstream);
            let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
            let listening = tokio::spawn(async move {
                loop {
                    let (io, _) = upstream.listener.accept().await.unwrap();
                    let tell = tell.clone();
                    tokio::spawn(async move { tell.send(listens(Raw { io, read: Vec::new() }).await) });
                }
            });
            let front = Front::start(&forward);
            let (mut client, serving) = front.connect().await;
            client.write_all(&request.as_bytes()[..sent]).await.unwrap();
            // Whatever of it can go on has gone on.
            for _ in 0..20 {
                tokio::task::yield_now().await;
            }
            drop(client);
            within(serving).await.unwrap();
            is_well(&forward).await;
            drop((front, forward));
            let mut whole = 0;
            listening.abort();
            while let Some(more) = within(told.recv()).await {
                whole += more;
            }
            assert_eq!(whole, 1, "{sent} bytes of {request:?}");
        }
    }
}

#[tokio::test]
async fn an_upstream_goes_away_after_every_byte() {
    for answer in ANSWERS {
        for sent in 0..=answer.len() {
            let upstream = Upstream::bind().await;
            let forward = forward(&upstream);
            let front = Front::start(&forward);
            let (mut client, serving) = front.connect().await;
            // What may not be repeated, so that there is one try.
            client
                .write_all(b"POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
                .await
                .unwrap();
            let mut server = upstream.accept().await;
            server.head().await;
            server.send(&answer[..sent]).await;
            drop(server);
            let mut got = String::new();
            // A body that breaks off resets the connection, which is what tells the client.
            _ = within(client.read_to_string(&mut got)).await;
            // hyper may not have written the head yet when it learns that the body breaks off.
            let (head, body) = got.split_once("\r\n\r\n").unwrap_or(("", ""));
            if got.is_empty() {
                assert!((answer.find("\r\n\r\n").unwrap() + 4..answer.len()).contains(&sent), "{sent} of {answer:?}");
            } else if head.starts_with("HTTP/1.1 200 ") {
                let whole = body == "hello" || body == "5\r\nhello\r\n0\r\n\r\n";
                assert_eq!(whole, sent == answer.len(), "{sent} bytes of {answer:?}: {got:?}");
            } else {
                assert!(head.starts_with("HTTP/1.1 502 ") && sent < answer.len(), "{sent} of {answer:?}: {got:?}");
            }
            within(serving).await.unwrap();
            tokio::join!(is_well(&forward), async {
                let mut server = upstream.accept().await;
                server.head().await;
                server.send(OK).await;
            });
        }
    }
}

/// What is left of a request has no more time than the request has.
#[tokio::test]
async fn what_goes_on_after_an_early_answer_ends_with_the_time_of_the_whole() {
    let upstream = Upstream::bind().await;
    let (mut frames, body) = http_body_util::Channel::<Bytes, std::io::Error>::new(1);
    let request = Request::post("/").header("host", "a").body(body).unwrap();
    let call = tokio::spawn(upstream.forward().total_timeout(LONG).oneshot(request));
    frames.send_data("some".into()).await.unwrap();
    let mut server = upstream.accept().await;
    server.until("some\r\n").await;
    server.send("HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n").await;
    assert_eq!(within(call).await.unwrap().unwrap().status(), 401);
    pass(LONG).await;
    // A byte now and then is no standstill.
    within(async { while frames.send_data("x".into()).await.is_ok() {} }).await;
    server.end().await;
}

/// What the answer is waiting for never comes, so the upstream must learn that.
#[tokio::test]
async fn an_upstream_that_answers_early_hears_that_the_request_breaks_off() {
    let upstream = Upstream::bind().await;
    let (mut frames, body) = http_body_util::Channel::<Bytes, std::io::Error>::new(1);
    let request = Request::post("/echo").header("host", "a").body(body).unwrap();
    let call = tokio::spawn(upstream.forward().oneshot(request));
    frames.send_data("some".into()).await.unwrap();
    let mut server = upstream.accept().await;
    server.until("some\r\n").await;
    server.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
    let response = within(call).await.unwrap().unwrap();
    frames.abort(std::io::Error::other("it breaks off"));
    assert_eq!(server.end().await, "", "no last chunk");
    drop(server);
    assert!(within(response.into_body().collect()).await.is_err());
}
