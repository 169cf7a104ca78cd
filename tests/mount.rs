//! The same gateway on hyper, in an axum router and under a generated tonic client, without an adapter.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::pin::Pin;

use axum::body::Body as AxumBody;
use futures::Stream;
use http::Request;
use http_body_util::{BodyExt, Full};
use portcullis::auth::AuthLayer;
use portcullis::balance::{BalanceLayer, PowerOfTwo};
use portcullis::circuit_break::CircuitBreakLayer;
use portcullis::core::{Carried, Identity, Rejection};
use portcullis::discovery::{DiscoveryLayer, EmbeddedRegistry};
use portcullis::forward::Forward;
use portcullis::gateway::{Gateway, Route};
use portcullis::rate_limit::{Rate, RateLimitLayer};
use portcullis_testing::echo::echo_client::EchoClient;
use portcullis_testing::echo::echo_server::{Echo, EchoServer};
use portcullis_testing::echo::{Ping, Pong};
use portcullis_testing::{Backend, client};
use serde_json::json;
use tonic::{Code, Response, Status, Streaming};
use tower::{Layer, ServiceBuilder, ServiceExt};

async fn gateway() -> (Gateway, impl Sized) {
    let registry = EmbeddedRegistry::new();
    let (backends, echo) = (support::backends(&["a"]).await, Backend::grpc("a").await);
    let orders = support::register(&registry, "orders", support::places(&backends)).await;
    let echoes = support::register(&registry, "echo", [("a".to_owned(), echo.address())]).await;
    let gateway = Gateway::builder(registry)
        .route("/orders/{id}", Route::to("orders"))
        .route("/portcullis.testing.Echo/{method}", Route::to("echo"))
        .build()
        .unwrap();
    (gateway, (backends, echo, orders, echoes))
}

#[test]
fn a_gateway_is_send_sync_and_cheap_to_clone() {
    fn mounts<T: Clone + Send + Sync + 'static>() {}
    mounts::<Gateway>();
    assert!(size_of::<Gateway>() < 1024);
}

#[tokio::test]
async fn on_hyper() {
    let (gateway, _running) = gateway().await;
    let address = support::listen(gateway).await;
    let answer = client::get(address, "/orders/7?x=1", &[]).await.unwrap();
    assert_eq!((answer.status.as_u16(), answer.header("x-backend")), (200, "a"));
    assert_eq!(answer.json()["target"], "/orders/7?x=1");
    let refused = client::get(address, "/nowhere", &[]).await.unwrap();
    assert_eq!((refused.status.as_u16(), refused.header("content-type")), (404, "application/problem+json"));
}

#[tokio::test]
async fn in_an_axum_router() {
    let (gateway, _running) = gateway().await;
    let app = axum::Router::new().route("/health", axum::routing::get(async || "fine")).fallback_service(gateway);
    let call = async |path: &str| {
        let request = Request::get(format!("http://gateway{path}")).body(AxumBody::empty()).unwrap();
        app.clone().oneshot(request).await.unwrap()
    };
    assert_eq!(call("/health").await.status(), 200);
    let answer = call("/orders/7").await;
    assert_eq!((answer.status().as_u16(), &answer.headers()["x-backend"]), (200, &"a".parse().unwrap()));
    let refused = call("/nowhere").await;
    assert_eq!(refused.extensions().get::<Rejection>().unwrap().reason(), "no-route");
}

#[tokio::test]
async fn under_a_generated_tonic_client() {
    let (gateway, _running) = gateway().await;
    let mut client = EchoClient::new(gateway);
    let pong = client.unary(Ping { text: "x".to_owned(), ..Ping::default() }).await.unwrap().into_inner();
    assert_eq!((pong.text.as_str(), pong.server.as_str()), ("x", "a"));
}

#[tokio::test]
async fn three_layers_under_a_tonic_client() {
    let registry = EmbeddedRegistry::new();
    let (a, b) = (Backend::grpc("a").await, Backend::grpc("b").await);
    let places = [("a".to_owned(), a.address()), ("b".to_owned(), b.address())];
    let _registrations = support::register(&registry, "echo", places).await;
    let channel = ServiceBuilder::new()
        .layer(DiscoveryLayer::new(registry).service("echo"))
        .layer(BalanceLayer::new(PowerOfTwo))
        .layer(CircuitBreakLayer::new())
        .service(Forward::new());
    let mut client = EchoClient::new(channel);
    for _ in 0..50 {
        client.unary(Ping::default()).await.unwrap();
    }
    assert!(a.requests() > 0 && b.requests() > 0);
    a.kill().await;
    for _ in 0..50 {
        client.unary(Ping::default()).await.unwrap();
    }
}

#[tokio::test]
async fn clones_on_an_axum_router_share_one_budget() {
    let limit = RateLimitLayer::new(Rate::per_minute(3_u32.try_into().unwrap()));
    let app = axum::Router::new()
        .route("/a", axum::routing::get(async || "a"))
        .route("/b", axum::routing::get(async || "b"))
        .layer(limit);
    let mut passed = 0;
    for path in ["/a", "/b", "/a", "/b", "/a", "/b"] {
        let request = Request::get(format!("http://gateway{path}")).body(AxumBody::empty()).unwrap();
        passed += u32::from(app.clone().oneshot(request).await.unwrap().status() == 200);
    }
    assert_eq!(passed, 3, "one budget for all routes and clones");
}

#[tokio::test]
async fn bodies_of_any_kind_mount() {
    let (gateway, _running) = gateway().await;
    let request = Request::post("http://gateway/orders/7").body(Full::<bytes::Bytes>::from("x")).unwrap();
    let answer = gateway.oneshot(request).await.unwrap();
    assert_eq!(answer.status(), 200);
    assert!(!answer.into_body().collect().await.unwrap().to_bytes().is_empty());
}

#[derive(serde::Deserialize)]
struct Claims {
    tenant: String,
    level: u8,
}

/// Reads the caller's claims as a type of its own.
fn tenant(extensions: &http::Extensions) -> Option<String> {
    let Claims { tenant, level } = Identity::of(extensions)?.claims_as().ok()?;
    Some(format!("{tenant} {level}"))
}

#[tokio::test]
async fn claims_are_readable_in_axum_handlers() {
    let whoami = async |request: axum::extract::Request| tenant(request.extensions()).unwrap_or_default();
    let app = axum::Router::new().route("/", axum::routing::get(whoami)).layer(AuthLayer::new(support::jwt()));
    let ask = async |token: Option<String>| {
        let mut request = Request::get("http://app/");
        if let Some(token) = token {
            request = request.header("authorization", token);
        }
        let answer = app.clone().oneshot(request.body(AxumBody::empty()).unwrap()).await.unwrap();
        (answer.status().as_u16(), answer.into_body().collect().await.unwrap().to_bytes())
    };
    let claims = json!({ "tenant": "acme", "level": 3 });
    assert_eq!(ask(Some(support::bearer_with("ada", &claims))).await, (200, "acme 3".into()));
    assert_eq!(ask(Some(support::bearer_with("ada", &json!({ "level": 3 })))).await, (200, "".into()));
    assert_eq!(ask(None).await.0, 401);
}

/// Answers with whose claims it read.
struct Whoami;

type Nothing = Pin<Box<dyn Stream<Item = Result<Pong, Status>> + Send>>;

#[tonic::async_trait]
impl Echo for Whoami {
    type DownloadStream = Nothing;
    type TalkStream = Nothing;

    async fn unary(&self, request: tonic::Request<Ping>) -> Result<Response<Pong>, Status> {
        let text = tenant(request.extensions()).ok_or_else(|| Status::internal("no claims"))?;
        Ok(Response::new(Pong { text, server: String::new() }))
    }

    async fn download(&self, _: tonic::Request<Ping>) -> Result<Response<Nothing>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn upload(&self, _: tonic::Request<Streaming<Ping>>) -> Result<Response<Pong>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn talk(&self, _: tonic::Request<Streaming<Ping>>) -> Result<Response<Nothing>, Status> {
        Err(Status::unimplemented(""))
    }
}

#[tokio::test]
async fn claims_are_readable_in_tonic_services() {
    let service = AuthLayer::new(support::jwt()).layer(EchoServer::new(Whoami));
    let mut client = EchoClient::new(service);
    let mut call = tonic::Request::new(Ping::default());
    let token = support::bearer_with("ada", &json!({ "tenant": "acme", "level": 3 }));
    call.metadata_mut().insert("authorization", token.parse().unwrap());
    assert_eq!(client.unary(call).await.unwrap().into_inner().text, "acme 3");
    let refused = client.unary(Ping::default()).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::Unauthenticated, "no-credentials"));
    // Credentials in binary metadata are none.
    let mut call = tonic::Request::new(Ping::default());
    call.metadata_mut().insert_bin("authorization-bin", tonic::metadata::MetadataValue::from_bytes(b"Bearer x"));
    assert_eq!(client.unary(call).await.unwrap_err().code(), Code::Unauthenticated);
}
