//! What the tests of the whole share.

#![allow(dead_code, unused_imports, reason = "each test file uses its own part")]

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{Request, Response};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use portcullis::auth::{Algorithm, Jwt, KeySet};
use portcullis::core::Instance;
use portcullis::discovery::{EmbeddedRegistry, Registration, Registry, ServiceDefinition};
use portcullis::gateway::{Builder, Gateway, Route};
use portcullis_testing::{Backend, token};
use serde_json::json;
use tower::{Layer, Service};

pub(crate) const SECRET: &[u8] = b"known to the tests and to nobody else";

/// The header of a caller who may pass.
pub(crate) fn bearer(subject: &str) -> String {
    bearer_with(subject, &json!({}))
}

/// The same with more claims.
pub(crate) fn bearer_with(subject: &str, more: &serde_json::Value) -> String {
    let mut claims = json!({ "iss": "tests", "aud": "orders", "sub": subject, "exp": token::now() + 600 });
    claims.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    format!("Bearer {}", token::hs256(SECRET, &claims))
}

/// The proof that [`bearer`] passes.
pub(crate) fn jwt() -> Jwt {
    Jwt::new(KeySet::hmac(Algorithm::HS256, SECRET).unwrap()).issuer("tests").audience("orders")
}

/// Registers backends as instances of one service.
pub(crate) async fn register(
    registry: &impl Registry,
    service: &str,
    at: impl IntoIterator<Item = (String, SocketAddr)>,
) -> Vec<Registration> {
    let mut registrations = Vec::new();
    for (id, address) in at {
        let definition = ServiceDefinition::of(service, Instance::new(id, address));
        registrations.push(registry.register(definition).await.unwrap());
    }
    registrations
}

/// Starts backends of these names.
pub(crate) async fn backends(names: &[&str]) -> Vec<Backend> {
    let mut backends = Vec::new();
    for name in names {
        backends.push(Backend::start(name).await);
    }
    backends
}

/// Where backends live.
pub(crate) fn places(backends: &[Backend]) -> Vec<(String, SocketAddr)> {
    backends.iter().map(|backend| (backend.name().to_owned(), backend.address())).collect()
}

/// A gateway with one open route, `/{*rest}`, to the service `orders`.
pub(crate) fn open_gateway(registry: EmbeddedRegistry) -> Builder {
    Gateway::builder(registry).route("/{*rest}", Route::to("orders"))
}

/// Serves on a free port until the runtime ends.
pub(crate) async fn listen<S, R>(service: S) -> SocketAddr
where
    S: Service<Request<hyper::body::Incoming>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    R: http_body::Body<Data = Bytes> + Send + 'static,
    R::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    portcullis_testing::backend::serve(SocketAddr::from(([127, 0, 0, 1], 0)), service).await.0
}

/// Runs a gateway as a program would, until the runtime ends.
pub(crate) fn serve(gateway: Gateway) -> SocketAddr {
    let server = portcullis::serve::Server::bind(([127, 0, 0, 1], 0)).unwrap();
    let address = server.local_addr().unwrap();
    tokio::spawn(server.serve(gateway));
    address
}

/// A client with a pool; over HTTP/2 if asked.
pub(crate) fn client<B>(http2: bool) -> Client<HttpConnector, B>
where
    B: http_body::Body + Send + 'static,
    B::Data: Send,
{
    Client::builder(TokioExecutor::new()).http2_only(http2).build_http()
}

/// Counts the requests that pass it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Count(Arc<AtomicUsize>);

/// Counts the requests that pass it.
#[derive(Clone, Debug)]
pub(crate) struct Counting<S>(S, Count);

impl Count {
    pub(crate) fn get(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl<S> Layer<S> for Count {
    type Service = Counting<S>;

    fn layer(&self, inner: S) -> Counting<S> {
        Counting(inner, self.clone())
    }
}

impl<S: Service<R>, R> Service<R> for Counting<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: R) -> S::Future {
        self.1.0.fetch_add(1, Ordering::SeqCst);
        self.0.call(request)
    }
}

/// A boxed future.
pub(crate) type Later<T> = Pin<Box<dyn Future<Output = T> + Send>>;
