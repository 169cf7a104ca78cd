//! Runs a service on listeners: HTTP/1.1, and HTTP/2 in the clear (with prior knowledge) and over TLS, with limits and a
//! drain that ends.
//!
//! **Writes** [`PeerAddress`](crate::core::PeerAddress), and [`PeerTls`](crate::core::PeerTls) when the connection is
//! encrypted · **Refuses** 400, 408 and 431 · **Cost** one task per connection
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::{convert::Infallible, time::Duration};
//! use portcullis::core::{Carried, PeerAddress};
//! use portcullis::serve::{Incoming, Server};
//!
//! let hello = tower::service_fn(|request: http::Request<Incoming>| async move {
//!     let PeerAddress(peer) = PeerAddress::of(request.extensions()).unwrap();
//!     Ok::<_, Infallible>(http::Response::new(format!("hello, {peer}")))
//! });
//! let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
//! let server = Server::bind(([127, 0, 0, 1], 0))?
//!     .graceful(async { _ = stopped.await }, Duration::from_secs(30));
//! stop.send(()).unwrap();
//! server.serve(hello).await?;
//! # Ok(()) }
//! ```
//!
//! # A runtime per core
//!
//! [`Server::bind_per_core`] binds one listener per thread with `SO_REUSEPORT` and runs each on a current-thread runtime of
//! its own, so that a connection and all that is done for it stay on one core. The service is cloned into each; what its
//! layers share is still shared, while `Forward` keeps its connections per runtime.
//!
//! # The end
//!
//! When the signal comes, what waits to be accepted is still accepted, then the listeners close. Connections finish the
//! requests they are at and close: HTTP/1.1 after the answer, HTTP/2 by `GOAWAY`. What is still open at the deadline is
//! cut off, upgraded connections included.
//!
//! # Defaults
//!
//! | setting | default |
//! |---|---|
//! | [`max_connections`](Server::max_connections) | 16384; more wait to be accepted |
//! | [`header_timeout`](Server::header_timeout) | 30 s, also how long an HTTP/1.1 connection may be idle |
//! | [`keep_alive`](Server::keep_alive) | 60 s, then 20 s for the answer |
//! | [`handshake_timeout`](Server::handshake_timeout) | 10 s |
//! | [`write_timeout`](Server::write_timeout) | 60 s |
//! | [`max_head`](Server::max_head) | 64 KiB |
//! | [`max_streams`](Server::max_streams) | 256 |
//! | unread of a request, unsent of an answer over HTTP/2 | 256 KiB a stream and 1 MiB a connection; 64 KiB a stream |
//!
//! # A refusal is heard
//!
//! An HTTP/1.1 client that has not sent all of its request when its connection is to be closed is read for two more seconds,
//! to no end but that it sees the answer (RFC 9112 §9.6).
//!
//! # What it does not do
//!
//! A `CONNECT` reaches the service like any other request; over HTTP/2 what goes through the tunnel is its body and the
//! answer's. An HTTP/2 connection without requests stays open as long as
//! its other end answers pings. There is no HTTP/3 and no PROXY protocol. How long a request's body may take is up to whoever
//! reads it; `Forward` has its idle timeout for that.
//!
//! # Who reads the bytes
//!
//! Plain requests of HTTP/1.1 are read, asked and answered by the connection's own task: of a request that is forwarded, that
//! saved 11 % of the instructions. Whatever is not plain is left to hyper, and the connection with it: an upgrade, a tunnel,
//! `Expect`, HTTP/1.0, and whatever is no sound head. HTTP/2 is h2's without hyper around it, which was worth 4 % of a gRPC
//! call; its requests are answered in tasks that go on to others, which saved 4 % of the instructions of one that is forwarded
//! by HTTP/1.1. So the request's body is [a type of our own](Incoming).
//!
//! * A request with both `Content-Length` and `Transfer-Encoding` gets 400, and its connection ends (RFC 9112 §6.1). Once the
//!   connection is hyper's it is served without the length, and the connection ends then.
//! * Trailers go to a client that says `TE: trailers`, and to no other of HTTP/1.1.
//! * A client that closes, or half closes, its connection before it has its answer is answered no more.
//! * An answer that is not as long as its `Content-Length` says breaks off.

mod connection;
mod crew;
mod h1;
mod h2;
mod incoming;
mod phase;
mod spare;
mod stream;
mod tls;
mod transport;
mod worker;

use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::num::NonZeroUsize;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tower_service::Service;
use tracing::{info, warn};

pub use incoming::Incoming;
pub use tls::{ClientCertificates, ServerTls};

use crew::Crew;
use phase::{Phase, Tell};
use worker::Worker;

type BoxError = Box<dyn std::error::Error + Send + Sync>;
type Signal = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Listeners, and how connections to them are treated.
#[must_use = "a server does nothing unless it serves"]
pub struct Server {
    listeners: Vec<StdListener>,
    per_core: bool,
    signal: Option<(Signal, Duration)>,
    limits: Limits,
}

#[derive(Clone)]
struct Limits {
    tls: Option<ServerTls>,
    connections: Arc<Semaphore>,
    header: Duration,
    handshake: Duration,
    write: Duration,
    keep_alive: (Duration, Duration),
    max_head: usize,
    max_streams: u32,
}

/// A setting that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error(&'static str);

/// Ends its task when it is dropped.
struct Abort(tokio::task::JoinHandle<io::Result<()>>);

// === impl Server ===

impl Server {
    /// Listens on `address`; port 0 is any.
    ///
    /// # Errors
    ///
    /// When the system does not let it.
    pub fn bind(address: impl Into<SocketAddr>) -> io::Result<Self> {
        Ok(Self::new(vec![listen(address.into(), false)?], false))
    }

    /// Listens on `address` with one listener, thread and runtime for each of `cores`; see [the module](self).
    ///
    /// # Errors
    ///
    /// When the system does not let it.
    pub fn bind_per_core(address: impl Into<SocketAddr>, cores: NonZeroUsize) -> io::Result<Self> {
        let first = listen(address.into(), true)?;
        let address = first.local_addr()?;
        let mut listeners = vec![first];
        for _ in 1..cores.get() {
            listeners.push(listen(address, true)?);
        }
        Ok(Self::new(listeners, true))
    }

    /// Listens on a socket that somebody else has bound.
    ///
    /// # Errors
    ///
    /// When it cannot be made non-blocking.
    pub fn from_listener(listener: StdListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        SockRef::from(&listener).set_tcp_nodelay(true)?;
        Ok(Self::new(vec![listener], false))
    }

    fn new(listeners: Vec<StdListener>, per_core: bool) -> Self {
        let limits = Limits {
            tls: None,
            connections: Arc::new(Semaphore::new(16 * 1024)),
            header: Duration::from_secs(30),
            handshake: Duration::from_secs(10),
            write: Duration::from_secs(60),
            keep_alive: (Duration::from_secs(60), Duration::from_secs(20)),
            max_head: 64 * 1024,
            max_streams: 256,
        };
        Self { listeners, per_core, signal: None, limits }
    }

    /// Where it listens.
    ///
    /// # Errors
    ///
    /// When the system does not say.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listeners.first().ok_or(io::ErrorKind::NotConnected)?.local_addr()
    }

    /// Encrypts connections.
    pub fn tls(mut self, tls: ServerTls) -> Self {
        self.limits.tls = Some(tls);
        self
    }

    /// Drains when `signal` is done, for no longer than `deadline`. Without this it serves until it is dropped.
    pub fn graceful(mut self, signal: impl Future<Output = ()> + Send + 'static, deadline: Duration) -> Self {
        self.signal = Some((Box::pin(signal), deadline));
        self
    }

    /// How many connections may be open; further ones wait to be accepted. Default 16384.
    pub fn max_connections(mut self, connections: usize) -> Self {
        self.limits.connections = Arc::new(Semaphore::new(connections.clamp(1, Semaphore::MAX_PERMITS)));
        self
    }

    /// How long a connection may take to say what it speaks, and an HTTP/1.1 connection to send a request's head, from
    /// when it could have begun, so that it is also how long one may be idle; a head that has begun by then is answered with 408. Default 30 s.
    pub fn header_timeout(mut self, timeout: Duration) -> Self {
        self.limits.header = timeout;
        self
    }

    /// How long a TLS handshake may take. Default 10 s.
    pub fn handshake_timeout(mut self, timeout: Duration) -> Self {
        self.limits.handshake = timeout;
        self
    }

    /// How long a client may take none of what we have for it, before its connection is closed; of one stream of HTTP/2,
    /// before that is reset. Default 60 s.
    pub fn write_timeout(mut self, timeout: Duration) -> Self {
        self.limits.write = timeout;
        self
    }

    /// How often an HTTP/2 client is pinged, and how long it may take to answer, before it is let go. Default 60 s and
    /// 20 s.
    pub fn keep_alive(mut self, interval: Duration, timeout: Duration) -> Self {
        self.limits.keep_alive = (interval, timeout);
        self
    }

    /// The largest head of a request in bytes; a larger one gets 431. Default 64 KiB; not less than 8 KiB.
    pub fn max_head(mut self, bytes: usize) -> Self {
        self.limits.max_head = bytes.max(8 * 1024);
        self
    }

    /// How many requests an HTTP/2 connection may have open. Default 256.
    pub fn max_streams(mut self, streams: u32) -> Self {
        self.limits.max_streams = streams;
        self
    }

    /// Serves until the [signal](Self::graceful) came and all connections have ended or were cut off.
    ///
    /// # Errors
    ///
    /// When a listener or a runtime cannot be set up.
    pub async fn serve<S, B>(self, service: S) -> io::Result<()>
    where
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Error: Into<BoxError>,
        S::Future: Send,
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let (tell, phase) = Tell::new();
        let (open, mut closed) = mpsc::channel(1);
        let mut threads = Vec::new();
        let mut local = Vec::new();
        info!(address = ?self.local_addr().ok(), listeners = self.listeners.len(), "serving");
        for listener in self.listeners {
            let worker = Worker {
                service: service.clone(),
                crew: Crew::new(),
                limits: self.limits.clone(),
                phase: phase.clone(),
                open: open.clone(),
            };
            if self.per_core {
                let thread = std::thread::Builder::new().name("portcullis-serve".into());
                threads.push(thread.spawn(move || worker.own_runtime(listener))?);
            } else {
                let listener = TcpListener::from_std(listener)?;
                local.push(Abort(tokio::spawn(worker.accept(listener))));
            }
        }
        drop((open, service, phase));
        let Some((signal, deadline)) = self.signal else {
            // Nobody will say when: this ends by being dropped, or if all workers fail.
            _ = closed.recv().await;
            return join(threads);
        };
        tokio::select! {
            () = signal => {}
            _ = closed.recv() => return join(threads),
        }
        info!("draining");
        tell.enter(Phase::Draining);
        if timeout(deadline, closed.recv()).await.is_err() {
            warn!("cutting off what has not ended in time");
            tell.enter(Phase::Over);
            _ = closed.recv().await;
        }
        info!("drained");
        join(threads)
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("listeners", &self.listeners).finish_non_exhaustive()
    }
}

impl Drop for Abort {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// All have said that they are done; what they return is at hand.
fn join(threads: Vec<std::thread::JoinHandle<io::Result<()>>>) -> io::Result<()> {
    for thread in threads {
        thread.join().map_err(|_| io::Error::other("a worker panicked"))??;
    }
    Ok(())
}

fn listen(address: SocketAddr, shared: bool) -> io::Result<StdListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    #[cfg(unix)]
    if shared {
        socket.set_reuse_port(true)?;
    }
    socket.set_nonblocking(true)?;
    // What is accepted inherits it.
    socket.set_tcp_nodelay(true)?;
    socket.bind(&address.into())?;
    socket.listen(1024)?;
    Ok(socket.into())
}

// === impl Error ===

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Error {}
