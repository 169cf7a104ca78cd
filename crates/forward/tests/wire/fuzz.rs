//! Whatever a client sends, what reaches the upstream is one well-formed request after the other, each of them one that
//! the client sent as well.
//!
//! CI runs few cases; many: `PORTCULLIS_FUZZ_CASES=1000000 cargo test --release -p portcullis-forward --test wire fuzz`.

use portcullis_forward::Forward;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;

use crate::{OK, Raw, client};

/// What requests are made of, good and bad; `{}` becomes a number that tells one from another.
const LINES: [&str; 14] = [
    "GET /{} HTTP/1.1",
    "POST /{} HTTP/1.1",
    "HEAD /{} HTTP/1.1",
    "PUT /{}?a=b HTTP/1.1",
    "GET http://h.test/{} HTTP/1.1",
    "GET /{} HTTP/1.0",
    "POST /{} HTTP/1.0",
    "OPTIONS * HTTP/1.1",
    "GET /../{} HTTP/1.1",
    "GET //{} HTTP/1.1",
    "GET /{}%0d%0aX HTTP/1.1",
    "G\tT /{} HTTP/1.1",
    "GET /{} x HTTP/1.1",
    "GET /{} HTTP/1.2",
];
const FIELDS: [&str; 34] = [
    "host: h.test",
    "host: h.test",
    "host: h.test",
    "Host: other.test",
    "host: a b",
    "content-length: 5",
    "content-length: 5",
    "Content-Length: 0",
    "content-length: 5, 5",
    "content-length: +5",
    "content-length: 5 ",
    "content-length:",
    "transfer-encoding: chunked",
    "transfer-encoding: chunked",
    "Transfer-Encoding: Chunked",
    "transfer-encoding: gzip, chunked",
    "transfer-encoding: chunked, identity",
    "transfer-encoding:\x0bchunked",
    "transfer-encoding : chunked",
    "transfer-encoding: xchunked",
    "connection: keep-alive",
    "connection: close",
    "connection: content-length",
    "connection: transfer-encoding, host",
    "connection: upgrade",
    "upgrade: websocket",
    "upgrade: h2c",
    "te: trailers",
    "trailer: x-t",
    "x: y\r\n folded: z",
    "x: a\nb: c",
    "x: a\rb",
    "expect: 100-continue",
    "x y: z",
];
const BODIES: [&str; 12] = [
    "",
    "",
    "hello",
    "5\r\nhello\r\n0\r\n\r\n",
    "0\r\n\r\n",
    "5;x=y\r\nhello\r\n0\r\nx-t: 1\r\n\r\n",
    "5\nhello\n0\n\n",
    "05\r\nhello\r\n0\r\n\r\n",
    "0x5\r\nhello\r\n0\r\n\r\n",
    "5\r\nhelloX\r\n0\r\n\r\n",
    "-1\r\n\r\n",
    "ffffffffffffffff1\r\nhello\r\n0\r\n\r\n",
];

fn pick<T: Copy>(random: &mut fastrand::Rng, from: &[T]) -> T {
    from[random.usize(..from.len())]
}

fn request(random: &mut fastrand::Rng, number: usize) -> String {
    let mut text = pick(random, &LINES).replace("{}", &number.to_string());
    text.push_str("\r\n");
    if random.u8(..) < 230 {
        text.push_str("host: h.test\r\n");
    }
    for _ in 0..random.usize(..5) {
        text.push_str(pick(random, &FIELDS));
        text.push_str("\r\n");
    }
    text.push_str("\r\n");
    text.push_str(pick(random, &BODIES));
    text
}

/// Reads what arrives as strictly as can be, and answers each request; the paths that were asked for.
async fn strict(mut server: Raw) -> Result<Vec<String>, String> {
    let mut paths = Vec::new();
    loop {
        while !server.read.windows(4).any(|four| four == b"\r\n\r\n") {
            if !server.more().await {
                // A request that was broken off is never whole.
                return Ok(paths);
            }
        }
        let head = server.head().await;
        let bad = |what: &str| Err(format!("{what}: {head:?}"));
        let mut lines = head.trim_end_matches("\r\n").split("\r\n");
        let words: Vec<_> = lines.next().unwrap_or_default().split(' ').collect();
        let &[method, target, "HTTP/1.1"] = words.as_slice() else { return bad("request line") };
        // What is left of a body nobody announced may stand before the next method, and make one of its own.
        let is_method = !method.is_empty() && method.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        if !is_method || !(target.starts_with('/') || target == "*") {
            return bad("method or target");
        }
        let fields: Vec<(&str, &str)> = lines.filter_map(|line| line.split_once(": ")).collect();
        if fields.len() + 1 != head.matches("\r\n").count() - 1
            || head.replace("\r\n", "").contains(['\r', '\n', '\0', '\x0b'])
        {
            return bad("fields");
        }
        let all =
            |name: &str| fields.iter().filter(|(have, _)| *have == name).map(|(_, value)| *value).collect::<Vec<_>>();
        if all("host").len() != 1 || !all("connection").iter().all(|value| *value == "upgrade") {
            return bad("host or connection");
        }
        match (all("content-length").as_slice(), all("transfer-encoding").as_slice()) {
            ([], []) => {}
            ([length], []) if length.bytes().all(|byte| byte.is_ascii_digit()) => {
                let length: usize = length.parse().map_err(|_| head.clone())?;
                while server.read.len() < length {
                    if !server.more().await {
                        return Ok(paths);
                    }
                }
                server.exactly(length).await;
            }
            ([], ["chunked"]) => {
                while !server.read.windows(5).any(|five| five == b"0\r\n\r\n")
                    && !server.read.ends_with(b"x-t: 1\r\n\r\n")
                {
                    if !server.more().await {
                        return Ok(paths);
                    }
                }
                let body = String::from_utf8(std::mem::take(&mut server.read)).map_err(|_| head.clone())?;
                if !matches!(&*body, "0\r\n\r\n" | "5\r\nhello\r\n0\r\n\r\n" | "5\r\nhello\r\n0\r\nx-t: 1\r\n\r\n") {
                    return bad(&body);
                }
            }
            _ => return bad("framing"),
        }
        if !server.read.is_empty() {
            return bad("something behind the request");
        }
        paths.push(target.to_owned());
        let answer = if method == "HEAD" { "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n" } else { OK };
        server.send(answer).await;
    }
}

#[tokio::test]
async fn nothing_is_smuggled() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<usize>().ok());
    let cases = number("PORTCULLIS_FUZZ_CASES").unwrap_or(400);
    let mut random = fastrand::Rng::with_seed(number("PORTCULLIS_FUZZ_SEED").unwrap_or(7) as u64);
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = upstream.local_addr().unwrap();
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((io, _)) = upstream.accept().await {
            let tell = tell.clone();
            tokio::spawn(async move { tell.send(strict(Raw { io, read: Vec::new() }).await) });
        }
    });
    let mut through = 0;
    for case in 0..cases {
        let sent: Vec<_> = (0..random.usize(1..3)).map(|number| request(&mut random, case * 10 + number)).collect();
        // Its own connections, which end with it.
        let mut raw = client(&Forward::to(&address.to_string()).unwrap()).await;
        raw.send(sent.concat()).await;
        raw.io.shutdown().await.unwrap();
        raw.end().await;
        drop(raw);
        while let Ok(result) = told.try_recv() {
            let paths: Vec<String> = result.unwrap_or_else(|bad| panic!("about case {case}: {bad}\n{sent:#?}"));
            through += paths.len();
            for pair in paths.windows(2) {
                assert!(pair[0] != pair[1] || pair[0] == "*", "twice: {paths:?}");
            }
        }
    }
    assert!(through > cases / 20, "too few got through to prove anything: {through}");
}
