//! Bodies and framing.

use portcullis_forward::{Forward, Policy};

use super::{OK, Upstream, client, lines, refused, relay, same};
use crate::Front;

#[tokio::test]
async fn bodies_keep_their_framing() {
    for (request, framing, body) in [
        ("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhello", "content-length: 5", "hello"),
        ("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n", "content-length: 0", ""),
        ("PUT / HTTP/1.1\r\nhost: a\r\n\r\n", "content-length: 0", ""),
        ("GET / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhello", "content-length: 5", "hello"),
        (
            "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            "transfer-encoding: chunked",
            "5\r\nhello\r\n0\r\n\r\n",
        ),
        (
            "GET / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            "transfer-encoding: chunked",
            "5\r\nhello\r\n0\r\n\r\n",
        ),
    ] {
        let ((head, sent), _) = relay(same, request, OK).await;
        assert!(lines(&head).contains(&framing), "{head}");
        assert_eq!(sent, body);
        let both = head.contains("content-length") && head.contains("transfer-encoding");
        assert!(!both, "{head}");
    }
}

/// hyper settles a request that says both in favour of the chunks; what reaches the upstream says it once.
#[tokio::test]
async fn a_request_with_a_length_and_chunks_is_refused_or_has_chunks() {
    for fields in
        ["content-length: 3\r\ntransfer-encoding: chunked\r\n", "transfer-encoding: chunked\r\ncontent-length: 3\r\n"]
    {
        let request = format!("POST / HTTP/1.1\r\nhost: a\r\n{fields}\r\n5\r\nhello\r\n0\r\n\r\n");
        if !Front::IS_HYPER {
            let (head, _) = refused(same, &request).await;
            assert!(head.starts_with("HTTP/1.1 400 "), "{head}");
            continue;
        }
        let ((head, body), _) = relay(same, &request, OK).await;
        assert!(!head.contains("content-length"), "{head}");
        assert_eq!(body, "5\r\nhello\r\n0\r\n\r\n");
    }
}

#[tokio::test]
async fn answers_keep_their_framing() {
    for (method, answer, framing, body) in [
        ("GET", OK, "content-length: 2", "ok"),
        (
            "GET",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
            "transfer-encoding: chunked",
            "2\r\nok\r\n0\r\n\r\n",
        ),
        ("GET", "HTTP/1.1 200 OK\r\n\r\nok", "transfer-encoding: chunked", "2\r\nok\r\n0\r\n\r\n"),
        (
            "GET",
            "HTTP/1.1 200 OK\r\ncontent-length: 9\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
            "transfer-encoding: chunked",
            "2\r\nok\r\n0\r\n\r\n",
        ),
        (
            "GET",
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
            "content-length: 2",
            "ok",
        ),
    ] {
        let (_, (head, got)) = relay(same, &format!("{method} / HTTP/1.1\r\nhost: a\r\n\r\n"), answer).await;
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(lines(&head).contains(&framing), "{answer:?} -> {head}");
        assert!(!(head.contains("content-length") && head.contains("transfer-encoding")), "{head}");
        assert_eq!(got, body);
    }
}

/// No body, and the connections on both sides can be used again.
#[tokio::test]
async fn answers_without_a_body_have_none() {
    let upstream = Upstream::bind().await;
    let mut client = client(&upstream.forward()).await;
    let mut server = None;
    for (method, answer, field) in [
        ("HEAD", "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n", Some("content-length: 100")),
        ("HEAD", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", None),
        ("GET", "HTTP/1.1 204 No Content\r\n\r\n", None),
        ("GET", "HTTP/1.1 304 Not Modified\r\ncontent-length: 100\r\netag: \"x\"\r\n\r\n", Some("etag: \"x\"")),
        ("GET", "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", Some("content-length: 0")),
    ] {
        client.send(format!("{method} / HTTP/1.1\r\nhost: a\r\n\r\n")).await;
        if server.is_none() {
            server = Some(upstream.accept().await);
        }
        let server = server.as_mut().unwrap();
        server.head().await;
        server.send(answer).await;
        let head = client.head().await;
        assert_eq!(head.split(' ').nth(1), answer.split(' ').nth(1), "{head}");
        assert!(field.is_none_or(|field| lines(&head).contains(&field)), "{head}");
        assert!(client.read.is_empty());
    }
}

#[tokio::test]
async fn trailers_pass_both_ways_and_forbidden_ones_do_not() {
    let request = "POST / HTTP/1.1\r\nhost: a\r\nte: trailers\r\ntransfer-encoding: chunked\r\n\
                   trailer: x-sum, content-length\r\n\r\n2\r\nhi\r\n0\r\nx-sum: 1\r\ncontent-length: 9\r\n\r\n";
    let answer = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-check, set-cookie\r\n\r\n\
                  2\r\nok\r\n0\r\nx-check: 2\r\nset-cookie: a\r\n\r\n";
    let ((head, sent), (got, body)) = relay(same, request, answer).await;
    assert!(head.contains("te: trailers\r\n"), "{head}");
    assert_eq!(sent, "2\r\nhi\r\n0\r\nx-sum: 1\r\n\r\n");
    assert!(got.contains("trailer: x-check, set-cookie\r\n"), "{got}");
    assert_eq!(body, "2\r\nok\r\n0\r\nx-check: 2\r\n\r\n");
}

/// hyper writes only what was announced. The body is whole all the same.
#[tokio::test]
async fn trailers_reach_a_client_of_http_1_that_asks() {
    for (te, trailer, arrive) in [
        ("te: trailers\r\n", "trailer: x-t\r\n", true),
        ("te: trailers\r\n", "", !Front::IS_HYPER),
        ("", "trailer: x-t\r\n", false),
    ] {
        let request = format!("GET / HTTP/1.1\r\nhost: a\r\n{te}\r\n");
        let answer =
            format!("HTTP/1.1 200 OK\r\n{trailer}transfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-t: 1\r\n\r\n");
        let (_, (_, body)) = relay(same, &request, &answer).await;
        let want = if arrive { "2\r\nok\r\n0\r\nx-t: 1\r\n\r\n" } else { "2\r\nok\r\n0\r\n\r\n" };
        assert_eq!(body, want, "{te:?} {trailer:?}");
    }
}

/// hyper reads trailers up to the first empty line, but goes on behind the first whole one: what lies in between is
/// neither sent on nor taken for a request. Others break off.
#[tokio::test]
async fn what_hides_among_trailers_is_no_request() {
    let upstream = Upstream::bind().await;
    let mut client = client(&upstream.forward()).await;
    client.send("POST /a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\nGET /b HTTP/1.1\r\nhost: a\r\n\r\n").await;
    client.send("GET /c HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let mut server = upstream.accept().await;
    if !Front::IS_HYPER {
        let (sent, answer) = (server.end().await, client.end().await);
        assert!(sent.starts_with("POST /a ") && sent.ends_with("\r\n\r\n") && !sent.ends_with("0\r\n\r\n"), "{sent}");
        assert!(answer.starts_with("HTTP/1.1 400 ") && !answer.contains("200"), "{answer}");
        return;
    }
    for (line, body) in [("POST /a ", "0\r\n\r\n"), ("GET /c ", "")] {
        let (head, sent) = server.message().await;
        assert!(head.starts_with(line) && sent == body, "{head}{sent}");
        server.send(OK).await;
        client.message().await;
    }
}

#[tokio::test]
async fn a_client_that_expects_100_gets_it_and_the_upstream_gets_the_body() {
    let upstream = Upstream::bind().await;
    let mut client = client(&upstream.forward()).await;
    client.send("POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n").await;
    let mut server = upstream.accept().await;
    assert_eq!(client.head().await, "HTTP/1.1 100 Continue\r\n\r\n");
    client.send("hello").await;
    let (head, body) = server.message().await;
    assert!(!head.contains("expect"), "{head}");
    assert_eq!(body, "hello");
    server.send(OK).await;
    assert_eq!(client.message().await.1, "ok");
}

#[tokio::test]
async fn the_first_chunk_arrives_before_the_last_is_written_both_ways() {
    let upstream = Upstream::bind().await;
    let mut client = client(&upstream.forward()).await;
    client.send("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n").await;
    let mut server = upstream.accept().await;
    server.head().await;
    server.until("one\r\n").await;
    client.send("3\r\ntwo\r\n0\r\n\r\n").await;
    server.until("0\r\n\r\n").await;
    server.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n").await;
    client.head().await;
    client.until("first\r\n").await;
    server.send("4\r\nlast\r\n0\r\n\r\n").await;
    client.until("last\r\n0\r\n\r\n").await;
}

#[tokio::test]
async fn an_answer_may_come_before_the_request_has_ended() {
    let upstream = Upstream::bind().await;
    let mut client = client(&upstream.forward()).await;
    client.send("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n").await;
    let mut server = upstream.accept().await;
    server.until("one\r\n").await;
    server.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n").await;
    client.until("hi\r\n").await;
    client.send("3\r\ntwo\r\n").await;
    server.until("two\r\n").await;
    client.send("0\r\n\r\n").await;
    server.until("0\r\n\r\n").await;
    server.send("0\r\n\r\n").await;
    client.until("0\r\n\r\n").await;
}

#[tokio::test]
async fn requests_that_are_too_large_are_refused() {
    let limit = |forward: Forward| forward.policy(Policy::new().request_limit(4));
    let (head, _) = refused(limit, "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhello").await;
    assert!(head.starts_with("HTTP/1.1 413 "), "{head}");
    let upstream = Upstream::bind().await;
    let mut client = client(&limit(upstream.forward())).await;
    client
        .send("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")
        .await;
    let mut server = upstream.accept().await;
    let (head, _) = client.message().await;
    assert!(head.starts_with("HTTP/1.1 413 "), "{head}");
    let seen = server.end().await;
    assert!(!seen.contains("0\r\n\r\n"), "the upstream must not take it for whole: {seen}");
    let ((_, body), (got, _)) = relay(limit, "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nfour", OK).await;
    assert_eq!(body, "four");
    assert!(got.starts_with("HTTP/1.1 200 "), "{got}");
}

#[tokio::test]
async fn answers_that_are_too_large_are_refused_or_broken_off() {
    let limit = |forward: Forward| forward.policy(Policy::new().response_limit(4));
    let get = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";
    let (_, (head, _)) = relay(limit, get, "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello").await;
    assert!(head.starts_with("HTTP/1.1 502 "), "{head}");
    let upstream = Upstream::bind().await;
    let mut client = client(&limit(upstream.forward())).await;
    client.send(get).await;
    let mut server = upstream.accept().await;
    server.head().await;
    server.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n").await;
    let got = client.end().await;
    assert!(!got.contains("HTTP/1.1 502") && !got.ends_with("0\r\n\r\n"), "{got}");
}
