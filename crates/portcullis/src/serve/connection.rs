//! One connection of a server.

use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{Method, Request, Response, StatusCode};
use hyper::server::conn::http1;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use pin_project_lite::pin_project;
use portcullis_core::{Carried, PeerAddress, PeerTls};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::task::unconstrained;
use tokio::time::{sleep, timeout};
use tower_service::Service;
use tracing::debug;

use super::crew::Crew;
use super::h1::H1;
use super::h2::H2;
use super::incoming::Incoming;
use super::phase::{Phase, Watch};
use super::stream::Call;
use super::transport::{HeadTimer, Io, Line, Socket, Transport};
use super::{BoxError, Limits, tls};

/// What serves a connection.
pub(super) trait Serve: Future<Output = Result<Self::End, Self::Error>> {
    /// What is left in the end.
    type End;
    type Error: fmt::Display;

    /// Ends it once what it is at is over.
    fn end(self: Pin<&mut Self>);
}

/// Adds what is known of the connection to each of its requests.
#[derive(Clone)]
pub(super) struct WithPeer<S> {
    service: S,
    peer: PeerAddress,
    tls: Option<PeerTls>,
}

/// The same for hyper, who can give the connection away.
struct Hyper<S> {
    service: WithPeer<S>,
    line: Arc<Line>,
}

pin_project! {
    #[project = Project]
    pub(super) enum Answer<S, F, B> {
        Waiting { service: S, request: Option<Request<B>> },
        Called { #[pin] future: F },
        Failed { error: Option<BoxError> },
    }
}

pin_project! {
    /// The answer to one who may have offered to go on with another protocol.
    struct Offered<F> {
        #[pin]
        answer: F,
        // Whether it was by `CONNECT`.
        offer: Option<(Arc<Line>, bool)>,
    }
}

/// How long a connection that was just made may take, once the drain has begun, to say what it is for: ended at once, it
/// would be closed with its first request unread.
const FIRST_WORD: Duration = Duration::from_millis(500);
/// What an HTTP/2 connection begins with.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// One connection, from the handshake until nobody holds it any more.
pub(super) async fn connection<S, B>(
    stream: TcpStream,
    peer: SocketAddr,
    limits: Limits,
    service: S,
    crew: Crew<Call<S>>,
    phase: Watch,
) where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let (io, tls, early) = tokio::select! {
        biased;
        begun = begin(stream, &limits, &phase) => match begun {
            Ok(begun) => begun,
            Err(error) => return debug!(%error, "a connection came to nothing"),
        },
        () = phase.clone().reaches(Phase::Over) => return,
    };
    let is_h2 = early.starts_with(PREFACE);
    let service = WithPeer { service, peer: PeerAddress(peer), tls };
    let line = Arc::new(Line::default());
    let ended = if is_h2 {
        let transport = Transport::new(Socket::new(io, early.freeze(), limits.write, false), line.clone());
        drive(H2::new(transport, line.clone(), &limits, service, crew), &phase).await
    } else {
        let socket = Socket::new(io, Bytes::new(), limits.write, true);
        let Some(Some(socket)) = drive(H1::new(socket, early, &limits, service.clone()), &phase).await else { return };
        let transport = TokioIo::new(Transport::new(socket, line.clone()));
        let served = http1::Builder::new()
            .timer(HeadTimer(line.clone()))
            .header_read_timeout(bounded(limits.header))
            .max_buf_size(limits.max_head)
            .serve_connection(transport, Hyper { service, line: line.clone() })
            .with_upgrades();
        drive(served, &phase).await
    };
    if ended.is_some() {
        // If it was upgraded, somebody else holds it now.
        tokio::select! {
            () = async {
                poll_fn(|cx| line.poll_gone(cx)).await;
                line.close_what_is_left().await;
            } => {}
            () = phase.reaches(Phase::Over) => {}
        }
        line.cut();
    }
}

/// `None` for so long that it is never.
pub(super) fn bounded(timeout: Duration) -> Option<Duration> {
    (timeout < Duration::from_secs(365 * 24 * 3600)).then_some(timeout)
}

/// The handshake, if there is one, and the first that the client says, which tells what it speaks.
async fn begin(stream: TcpStream, limits: &Limits, phase: &Watch) -> io::Result<(Io, Option<PeerTls>, BytesMut)> {
    if cfg!(not(target_os = "linux")) {
        // Elsewhere what is accepted need not inherit it from the listener.
        stream.set_nodelay(true)?;
    }
    let (mut io, tls) = match &limits.tls {
        None => (Io::Plain(stream), None),
        Some(tls) => {
            let stream = timeout(limits.handshake, tls.accept(stream)).await??;
            let peer = tls::peer(&stream);
            (Io::Tls(Box::new(stream)), Some(peer))
        }
    };
    let mut early = BytesMut::with_capacity(1024);
    let heard = async {
        while early.len() < PREFACE.len() && PREFACE.starts_with(&early) {
            if io.read_buf(&mut early).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok::<_, io::Error>(())
    };
    let too_late = async {
        phase.clone().reaches(Phase::Draining).await;
        sleep(FIRST_WORD).await;
    };
    tokio::select! {
        biased;
        heard = timeout(limits.header, heard) => heard??,
        () = too_late => return Err(io::ErrorKind::TimedOut.into()),
    }
    Ok((io, tls, early))
}

/// Serves until it is over, and ends it when the server drains; `None` if it was cut off, or broke.
async fn drive<T: Serve>(served: T, phase: &Watch) -> Option<T::End> {
    let mut served = pin!(served);
    let mut change = pin!(phase.clone().leaves(Phase::Running));
    // The channel is asked once, which leaves our waker there; after that, a look at the number does.
    let (mut seen, mut asked) = (Phase::Running, false);
    poll_fn(|cx| {
        let mut polled = served.as_mut().poll(cx);
        while polled.is_pending() {
            let now = phase.now();
            if now == Phase::Over {
                return Poll::Ready(None);
            }
            if now > seen {
                seen = now;
                served.as_mut().end();
                polled = served.as_mut().poll(cx);
                change.set(phase.clone().leaves(now));
                asked = false;
                continue;
            }
            // Whatever the task has done before, or it would leave no waker.
            if asked || pin!(unconstrained(change.as_mut())).poll(cx).is_pending() {
                asked = true;
                break;
            }
        }
        polled.map(|result| result.inspect_err(|error| debug!(%error, "a connection broke")).ok())
    })
    .await
}

// === impl Serve ===

impl<S, B> Serve for http1::UpgradeableConnection<TokioIo<Transport>, Hyper<S>>
where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone,
    S::Error: Into<BoxError>,
    B: http_body::Body<Data = Bytes> + 'static,
    B::Error: Into<BoxError>,
{
    type End = ();
    type Error = hyper::Error;

    fn end(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

// === impl WithPeer ===

impl<S> WithPeer<S>
where
    S: Service<Request<Incoming>> + Clone,
    S::Error: Into<BoxError>,
{
    pub(super) fn answer(&self, request: Request<Incoming>) -> Answer<S, S::Future, Incoming> {
        let (service, request) = self.with(request);
        Answer::new(service, request)
    }

    /// A service, and the request with what is known of the connection.
    pub(super) fn with(&self, mut request: Request<Incoming>) -> (S, Request<Incoming>) {
        self.peer.attach(request.extensions_mut());
        if let Some(tls) = &self.tls {
            tls.clone().attach(request.extensions_mut());
        }
        (self.service.clone(), request)
    }
}

// === impl Hyper ===

impl<S, B> hyper::service::Service<Request<hyper::body::Incoming>> for Hyper<S>
where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone,
    S::Error: Into<BoxError>,
{
    type Response = Response<B>;
    type Error = BoxError;
    type Future = Offered<Answer<S, S::Future, Incoming>>;

    fn call(&self, request: Request<hyper::body::Incoming>) -> Self::Future {
        let offers = request.extensions().get::<OnUpgrade>().is_some();
        let offer = offers.then(|| (self.line.clone(), request.method() == Method::CONNECT));
        let request = request.map(|body| Incoming::hyper(body, self.line.clone()));
        Offered { answer: self.service.answer(request), offer }
    }
}

// === impl Offered ===

impl<F, B, E> Future for Offered<F>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let answer = ready!(this.answer.poll(cx))?;
        if let Some((line, is_connect)) = this.offer {
            let status = answer.status();
            if status == StatusCode::SWITCHING_PROTOCOLS || *is_connect && status.is_success() {
                line.is_given_away();
            }
        }
        Poll::Ready(Ok(answer))
    }
}

// === impl Answer ===

impl<S, B> Answer<S, S::Future, B>
where
    S: Service<Request<B>>,
    S::Error: Into<BoxError>,
{
    pub(super) fn new(mut service: S, request: Request<B>) -> Self {
        // Nearly always it is ready, and the request need not be put aside.
        match service.poll_ready(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(())) => Self::Called { future: service.call(request) },
            Poll::Ready(Err(error)) => Self::Failed { error: Some(error.into()) },
            Poll::Pending => Self::Waiting { service, request: Some(request) },
        }
    }
}

impl<S, B> Future for Answer<S, S::Future, B>
where
    S: Service<Request<B>>,
    S::Error: Into<BoxError>,
{
    type Output = Result<S::Response, BoxError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        loop {
            let future = match self.as_mut().project() {
                Project::Called { future } => return future.poll(cx).map_err(Into::into),
                Project::Waiting { service, request } => {
                    ready!(service.poll_ready(cx)).map_err(Into::into)?;
                    match request.take() {
                        Some(request) => service.call(request),
                        None => return Poll::Pending,
                    }
                }
                Project::Failed { error } => match error.take() {
                    Some(error) => return Poll::Ready(Err(error)),
                    None => return Poll::Pending,
                },
            };
            self.set(Self::Called { future });
        }
    }
}
