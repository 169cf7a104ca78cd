//! Small HTTP backends that can be killed.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body::Body as _;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};
use tower_service::Service;

use crate::client::Error;
use crate::echo::echo_server::EchoServer;
use crate::echoing::Echoing;

/// The body of a [`Backend`]'s answer.
pub type BackendBody = UnsyncBoxBody<Bytes, hyper::Error>;

/// An HTTP/1.1 and HTTP/2 server on a free port; dropping it kills it with all its connections.
///
/// | path | answer |
/// |---|---|
/// | `/echo` | the request's body and trailers, streamed |
/// | `/status/503` | that status |
/// | any other | JSON: `backend`, `method`, `target`, `version`, `headers` |
///
/// Every answer has an `x-backend` field with its name.
#[derive(Debug)]
pub struct Backend {
    name: Arc<str>,
    address: SocketAddr,
    requests: Arc<AtomicU64>,
    server: JoinHandle<()>,
}

/// What a [`Backend`] runs.
#[derive(Clone, Debug)]
struct Answering {
    name: Arc<str>,
    requests: Arc<AtomicU64>,
}

impl Backend {
    /// Starts one.
    ///
    /// # Panics
    ///
    /// When there is no free port.
    pub async fn start(name: &str) -> Self {
        Self::start_at(name, SocketAddr::from(([127, 0, 0, 1], 0))).await
    }

    /// Starts one at a given address, such as that of one that was killed.
    ///
    /// # Panics
    ///
    /// When the address is taken.
    pub async fn start_at(name: &str, address: SocketAddr) -> Self {
        Self::run(name, address, |name, requests| Answering { name, requests }).await
    }

    /// Starts one that answers [`echo`](crate::echo) calls over gRPC instead.
    ///
    /// # Panics
    ///
    /// When there is no free port.
    pub async fn grpc(name: &str) -> Self {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        Self::run(name, any, |name, requests| EchoServer::new(Echoing { name, requests })).await
    }

    /// Runs what is made from the name and the counter.
    async fn run<S, R>(name: &str, address: SocketAddr, make: impl FnOnce(Arc<str>, Arc<AtomicU64>) -> S) -> Self
    where
        S: Service<Request<Incoming>, Response = Response<R>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Into<Error>,
        R: http_body::Body<Data = Bytes> + Send + 'static,
        R::Error: Into<Error>,
    {
        let (name, requests) = (Arc::<str>::from(name), Arc::<AtomicU64>::default());
        let (address, server) = serve(address, make(name.clone(), requests.clone())).await;
        Self { name, address, requests, server }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many requests reached it.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Closes the listener and cuts every connection, as a crash would, and waits until that is done.
    pub async fn kill(self) {
        self.server.abort();
        while !self.server.is_finished() {
            tokio::task::yield_now().await;
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// Serves a tower service at `address`, over HTTP/1.1 and HTTP/2, until the returned task is aborted.
///
/// # Panics
///
/// When the address is taken.
pub async fn serve<S, R>(address: SocketAddr, service: S) -> (SocketAddr, JoinHandle<()>)
where
    S: Service<Request<Incoming>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<Error>,
    R: http_body::Body<Data = Bytes> + Send + 'static,
    R::Error: Into<Error>,
{
    let listener = TcpListener::bind(address).await.expect("a free address");
    let address = listener.local_addr().expect("a bound socket");
    let server = tokio::spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            let _ = stream.set_nodelay(true);
            let service = TowerToHyperService::new(service.clone());
            connections.spawn(async move {
                let builder = auto::Builder::new(TokioExecutor::new());
                let _ = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await;
            });
            while connections.try_join_next().is_some() {}
        }
    });
    (address, server)
}

impl Service<Request<Incoming>> for Answering {
    type Response = Response<BackendBody>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Incoming>) -> Self::Future {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let mut response = answer(&self.name, request);
        if let Ok(name) = self.name.parse() {
            response.headers_mut().insert("x-backend", name);
        }
        Box::pin(async move { Ok(response) })
    }
}

fn answer(name: &str, request: Request<Incoming>) -> Response<BackendBody> {
    let path = request.uri().path();
    if path == "/echo" {
        // HTTP/1.1 sends only those trailers that were announced.
        let announced = request.headers().get(http::header::TRAILER).cloned();
        let mut response = Response::new(request.into_body().boxed_unsync());
        response.headers_mut().extend(announced.map(|names| (http::header::TRAILER, names)));
        return response;
    }
    let status = path.strip_prefix("/status/").and_then(|code| code.parse::<StatusCode>().ok()).unwrap_or_default();
    let fields: serde_json::Map<_, _> = request
        .headers()
        .iter()
        .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into()))
        .collect();
    let told = serde_json::json!({
        "backend": name,
        "method": request.method().as_str(),
        "target": request.uri().path_and_query().map(ToString::to_string),
        "version": format!("{:?}", request.version()),
        "headers": fields,
    });
    let body = Full::new(Bytes::from(format!("{told}\n"))).map_err(|never| match never {}).boxed_unsync();
    debug_assert!(!body.is_end_stream());
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
    response
}
