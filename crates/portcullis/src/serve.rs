//! Runs a service on listeners: HTTP/1.1, and HTTP/2 in the clear (with prior knowledge) and over TLS, with limits and a
//! drain that ends.
//!
//! **Writes** [`PeerAddress`], and [`PeerTls`] when the connection is encrypted · **Refuses** 400 and 431, by hyper ·
//! **Cost** one task per connection
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::{convert::Infallible, time::Duration};
//! use portcullis::core::{Carried, PeerAddress};
//! use portcullis::serve::Server;
//!
//! let hello = tower::service_fn(|request: http::Request<hyper::body::Incoming>| async move {
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
//! | [`handshake_timeout`](Server::handshake_timeout) | 10 s |
//! | [`write_timeout`](Server::write_timeout) | 60 s |
//! | [`max_head`](Server::max_head) | 64 KiB |
//! | [`max_streams`](Server::max_streams) | 256 |
//!
//! # What it does not do
//!
//! hyper closes a connection whose head is late without an answer where RFC 9110 would allow 408. A `CONNECT` reaches
//! the service like any other request. There is no HTTP/3 and no PROXY protocol.
//!
//! The request body's type is hyper's `Incoming`: a decision to show it, rather than to wrap every frame once more.

mod tls;
mod transport;

use std::future::{Future, poll_fn};
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::num::NonZeroUsize;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use pin_project_lite::pin_project;
use portcullis_core::{Carried, PeerAddress, PeerTls};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tower_service::Service;
use tracing::{debug, info, warn};

pub use tls::{ClientCertificates, ServerTls};

use transport::{Io, Line, Transport};

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
    max_head: usize,
    max_streams: u32,
}

/// A setting that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error(&'static str);

/// How far the end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
enum Phase {
    Running,
    Draining,
    Over,
}

/// Says how far the end has come.
struct Tell {
    watch: watch::Sender<Phase>,
    now: Arc<AtomicU8>,
}

/// Hears it. The number says the same as the channel, for those who look often.
#[derive(Clone)]
struct Watch {
    watch: watch::Receiver<Phase>,
    now: Arc<AtomicU8>,
}

/// One listener's share of the server: all it takes to serve connections in some runtime.
struct Worker<S> {
    service: S,
    limits: Limits,
    phase: Watch,
    /// Open as long as a connection is.
    open: mpsc::Sender<()>,
}

/// Ends its task when it is dropped.
struct Abort(tokio::task::JoinHandle<io::Result<()>>);

/// Adds what is known of the connection to each of its requests.
#[derive(Clone)]
struct WithPeer<S> {
    service: S,
    peer: PeerAddress,
    tls: Option<PeerTls>,
}

pin_project! {
    #[project = Project]
    enum Answer<S, F, B> {
        Waiting { service: S, request: Option<Request<B>> },
        Called { #[pin] future: F },
    }
}

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
        Ok(Self::new(vec![listener], false))
    }

    fn new(listeners: Vec<StdListener>, per_core: bool) -> Self {
        let limits = Limits {
            tls: None,
            connections: Arc::new(Semaphore::new(16 * 1024)),
            header: Duration::from_secs(30),
            handshake: Duration::from_secs(10),
            write: Duration::from_secs(60),
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

    /// How long an HTTP/1.1 connection may take to send a request's head, from when it could have begun. Default 30 s.
    pub fn header_timeout(mut self, timeout: Duration) -> Self {
        self.limits.header = timeout;
        self
    }

    /// How long a TLS handshake may take. Default 10 s.
    pub fn handshake_timeout(mut self, timeout: Duration) -> Self {
        self.limits.handshake = timeout;
        self
    }

    /// How long a client may take none of what we have for it, before its connection is closed. Default 60 s.
    pub fn write_timeout(mut self, timeout: Duration) -> Self {
        self.limits.write = timeout;
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
    socket.bind(&address.into())?;
    socket.listen(1024)?;
    Ok(socket.into())
}

/// See [`connection`].
const FIRST_WORD: Duration = Duration::from_millis(500);

// === impl Worker ===

impl<S, B> Worker<S>
where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    fn own_runtime(self, listener: StdListener) -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let _open = self.open.clone();
        runtime.block_on(async move {
            // The runtime must outlive its connections, which each hold a sender.
            let (open, mut ended) = mpsc::channel(1);
            let accepted = Self { open, ..self }.accept(TcpListener::from_std(listener)?).await;
            _ = ended.recv().await;
            accepted
        })
    }

    async fn accept(self, listener: TcpListener) -> io::Result<()> {
        let places = self.limits.connections.clone();
        let mut draining = pin!(self.phase.clone().reaches(Phase::Draining));
        loop {
            let accepted = tokio::select! {
                accepted = next(&listener, &places) => accepted,
                () = &mut draining => {
                    // What was connected before the drain began is served.
                    while let Ok(Ok((stream, peer, place))) = timeout_at(Instant::now(), next(&listener, &places)).await {
                        self.spawn(stream, peer, place);
                    }
                    return Ok(());
                }
            };
            match accepted {
                Ok((stream, peer, place)) => self.spawn(stream, peer, place),
                Err(error) => {
                    // Too many open files, most likely: trying again at once would only burn a core.
                    warn!(%error, "cannot accept");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn spawn(&self, stream: TcpStream, peer: SocketAddr, place: OwnedSemaphorePermit) {
        let (limits, service) = (self.limits.clone(), self.service.clone());
        let (phase, open) = (self.phase.clone(), self.open.clone());
        tokio::spawn(async move {
            let _held = (place, open);
            connection(stream, peer, limits, service, phase).await;
        });
    }
}

/// The next connection, once there is a place for it.
async fn next(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => return Ok((stream, peer, place)),
            // The client has gone already.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
                ) => {}
            Err(error) => return Err(error),
        }
    }
}

/// One connection, from the handshake until nobody holds it any more.
async fn connection<S, B>(stream: TcpStream, peer: SocketAddr, limits: Limits, service: S, phase: Watch)
where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%error, "the connection is gone");
        return;
    }
    let (io, tls) = match &limits.tls {
        None => (Io::Plain(stream), None),
        Some(tls) => {
            let accepted = tokio::select! {
                accepted = timeout(limits.handshake, tls.accept(stream)) => accepted,
                () = phase.clone().reaches(Phase::Over) => return,
            };
            match accepted {
                Ok(Ok(stream)) => {
                    let peer = tls::peer(&stream);
                    (Io::Tls(Box::new(stream)), Some(peer))
                }
                Ok(Err(error)) => return debug!(%error, "no TLS came about"),
                Err(_) => return debug!("the TLS handshake took too long"),
            }
        }
    };
    let line = Arc::new(Line::default());
    let transport = TokioIo::new(Transport::new(io, line.clone(), limits.write));
    let service = WithPeer { service, peer: PeerAddress(peer), tls };
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header)
        .max_buf_size(limits.max_head)
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.max_streams)
        .max_header_list_size(u32::try_from(limits.max_head).unwrap_or(u32::MAX));
    let mut draining = pin!(phase.clone().reaches(Phase::Draining));
    let mut over = pin!(phase.clone().reaches(Phase::Over));
    // While it runs, the phase is asked for once, which leaves our waker there; after that, a look at the number does.
    let (mut asked, mut ending, mut told) = (false, false, false);
    // How long a connection that was just made may take to say what it is for: told to end before, it would be closed
    // with its first request unread.
    let mut patience = pin!(sleep(FIRST_WORD));
    // Boxed, since it must be gone before its end is waited for: done as it is, it still holds the connection.
    let mut served = Box::pin(builder.serve_connection_with_upgrades(transport, service));
    let ended = poll_fn(|cx| {
        let drains = phase.now() >= Phase::Draining as u8;
        if drains || !asked {
            asked = true;
            if over.as_mut().poll(cx).is_ready() {
                return Poll::Ready(false);
            }
            if !ending && (draining.as_mut().poll(cx).is_ready() || drains) {
                ending = true;
                patience.as_mut().reset(Instant::now() + FIRST_WORD);
            }
        }
        let mut polled = served.as_mut().poll(cx);
        if ending && !told && polled.is_pending() && (line.has_heard() || patience.as_mut().poll(cx).is_ready()) {
            told = true;
            served.as_mut().graceful_shutdown();
            polled = served.as_mut().poll(cx);
        }
        polled.map(|result| {
            if let Err(error) = result {
                debug!(error, "a connection ended");
            }
            true
        })
    })
    .await;
    drop(served);
    if ended {
        // If it was upgraded, somebody else holds it now.
        poll_fn(|cx| match line.poll_gone(cx) {
            Poll::Pending => over.as_mut().poll(cx),
            ready @ Poll::Ready(()) => ready,
        })
        .await;
        line.cut();
    }
}

// === impl Tell ===

impl Tell {
    fn new() -> (Self, Watch) {
        let (watch, watched) = watch::channel(Phase::Running);
        let now = Arc::new(AtomicU8::new(Phase::Running as u8));
        (Self { watch, now: now.clone() }, Watch { watch: watched, now })
    }

    fn enter(&self, phase: Phase) {
        self.now.store(phase as u8, Ordering::Release);
        _ = self.watch.send(phase);
    }
}

/// Who waited for the end of the server has gone.
impl Drop for Tell {
    fn drop(&mut self) {
        self.enter(Phase::Over);
    }
}

// === impl Watch ===

impl Watch {
    fn now(&self) -> u8 {
        self.now.load(Ordering::Acquire)
    }

    async fn reaches(mut self, phase: Phase) {
        _ = self.watch.wait_for(|now| *now >= phase).await;
    }
}

// === impl WithPeer ===

impl<S, B> hyper::service::Service<Request<Incoming>> for WithPeer<S>
where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone,
{
    type Response = Response<B>;
    type Error = S::Error;
    type Future = Answer<S, S::Future, Incoming>;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        self.peer.attach(request.extensions_mut());
        if let Some(tls) = &self.tls {
            tls.clone().attach(request.extensions_mut());
        }
        Answer::Waiting { service: self.service.clone(), request: Some(request) }
    }
}

impl<S, B> Future for Answer<S, S::Future, B>
where
    S: Service<Request<B>>,
{
    type Output = Result<S::Response, S::Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        loop {
            let future = match self.as_mut().project() {
                Project::Called { future } => return future.poll(cx),
                Project::Waiting { service, request } => {
                    ready!(service.poll_ready(cx))?;
                    match request.take() {
                        Some(request) => service.call(request),
                        None => return Poll::Pending,
                    }
                }
            };
            self.set(Self::Called { future });
        }
    }
}

// === impl Error ===

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Error {}
