//! The cases, whatever server they are behind.

mod aborts;
mod answers;
mod connections;
mod failures;
mod fields;
mod fuzz;
mod h2;
mod messages;
mod reading;
mod streams;
#[cfg(feature = "tls")]
mod tls;
mod upgrades;

use std::net::SocketAddr;
use std::time::Duration;

use portcullis_forward::Forward;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::Front;

/// Long enough for a loaded machine, short enough to notice what hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// A listener that plays the upstream by hand.
struct Upstream {
    listener: TcpListener,
}

/// One end of a connection, read and written by hand.
struct Raw {
    io: TcpStream,
    read: Vec<u8>,
}

impl Upstream {
    async fn bind() -> Self {
        Self { listener: TcpListener::bind("127.0.0.1:0").await.unwrap() }
    }

    fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    /// A forward whose only upstream this is.
    fn forward(&self) -> Forward {
        Forward::to(&format!("http://{}", self.address())).unwrap()
    }

    async fn accept(&self) -> Raw {
        let (io, _) = within(self.listener.accept()).await.unwrap();
        Raw { io, read: Vec::new() }
    }
}

impl Raw {
    async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.io.write_all(bytes.as_ref()).await.unwrap();
    }

    async fn more(&mut self) -> bool {
        let mut buffer = [0; 16 * 1024];
        // A reset is an end as well, for who only wants to know what came before.
        let count = within(self.io.read(&mut buffer)).await.unwrap_or(0);
        self.read.extend_from_slice(&buffer[..count]);
        count > 0
    }

    /// Reads up to and with `end`.
    async fn until(&mut self, end: &str) -> String {
        loop {
            if let Some(at) = self.read.windows(end.len()).position(|window| window == end.as_bytes()) {
                let rest = self.read.split_off(at + end.len());
                return String::from_utf8(std::mem::replace(&mut self.read, rest)).unwrap();
            }
            assert!(self.more().await, "ended before {end:?}: {:?}", String::from_utf8_lossy(&self.read));
        }
    }

    async fn exactly(&mut self, count: usize) -> String {
        while self.read.len() < count {
            assert!(self.more().await, "ended early: {:?}", String::from_utf8_lossy(&self.read));
        }
        let rest = self.read.split_off(count);
        String::from_utf8(std::mem::replace(&mut self.read, rest)).unwrap()
    }

    /// Reads a head.
    async fn head(&mut self) -> String {
        self.until("\r\n\r\n").await
    }

    /// Reads a message: its head, without `date`, and its body as it is on the wire.
    async fn message(&mut self) -> (String, String) {
        let head = self.head().await;
        let field = |name: &str| {
            head.lines().find_map(|line| {
                let (have, value) = line.split_once(": ")?;
                have.eq_ignore_ascii_case(name).then(|| value.to_owned())
            })
        };
        let status: u16 = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        let body = if matches!(status, 100..=199 | 204 | 304) {
            String::new()
        } else if field("transfer-encoding").is_some() {
            let mut body = String::new();
            loop {
                let size = self.until("\r\n").await;
                let count = usize::from_str_radix(size.trim(), 16).unwrap();
                body.push_str(&size);
                if count == 0 {
                    break;
                }
                body.push_str(&self.exactly(count + 2).await);
            }
            loop {
                let line = self.until("\r\n").await;
                body.push_str(&line);
                if line == "\r\n" {
                    break body;
                }
            }
        } else {
            match field("content-length") {
                Some(length) => self.exactly(length.parse().unwrap()).await,
                None => String::new(),
            }
        };
        let head = head.split_inclusive("\r\n").filter(|line| !line.starts_with("date: ")).collect();
        (head, body)
    }

    /// Reads to the end.
    async fn end(&mut self) -> String {
        while self.more().await {}
        String::from_utf8(std::mem::take(&mut self.read)).unwrap()
    }
}

/// What is to be done within this time is, and what waits for its end is over soon: see [`pass`].
const LONG: Duration = Duration::from_secs(10);

/// Lets a time pass at once.
async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(PATIENCE, future).await.expect("in time")
}

/// A client's connection to a server that runs `forward`.
async fn client(forward: &Forward) -> Raw {
    let address = listen(forward).await;
    Raw { io: TcpStream::connect(address).await.unwrap(), read: Vec::new() }
}

/// Where a server that runs `forward` listens, to the end of the test.
async fn listen(forward: &Forward) -> SocketAddr {
    let front = Front::start(forward);
    let address = front.listen().await;
    std::mem::forget(front);
    address
}

/// One request over a fresh pair of connections: what the upstream saw, and what the client got.
async fn relay(
    forward: impl FnOnce(Forward) -> Forward,
    request: &str,
    answer: &str,
) -> ((String, String), (String, String)) {
    let upstream = Upstream::bind().await;
    let mut client = client(&forward(upstream.forward())).await;
    client.send(request).await;
    let mut server = upstream.accept().await;
    let seen = server.message().await;
    server.send(answer).await;
    // An answer without a length ends with the connection.
    server.io.shutdown().await.unwrap();
    (seen, client.message().await)
}

/// What a request that is refused without reaching the upstream is answered with.
async fn refused(forward: impl FnOnce(Forward) -> Forward, request: &str) -> (String, String) {
    let upstream = Upstream::bind().await;
    let mut client = client(&forward(upstream.forward())).await;
    client.send(request).await;
    let answer = client.message().await;
    let untouched = tokio::time::timeout(Duration::ZERO, upstream.listener.accept()).await;
    assert!(untouched.is_err(), "the upstream was reached");
    answer
}

/// The lines of a head but the first, sorted.
fn lines(head: &str) -> Vec<&str> {
    let mut lines: Vec<_> = head.split("\r\n").skip(1).filter(|line| !line.is_empty()).collect();
    lines.sort_unstable();
    lines
}

fn same(forward: Forward) -> Forward {
    forward
}

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
