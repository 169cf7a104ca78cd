//! Changing the protocol.

use std::time::Duration;

use tokio::io::AsyncWriteExt;

use crate::{Upstream, client, lines, relay, same};

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
