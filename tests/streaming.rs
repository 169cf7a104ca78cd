//! Bodies stream through the whole stack, both ways, with their trailers.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request};
use http_body::Frame;
use http_body_util::BodyExt;
use http_body_util::channel::Channel;
use portcullis::auth::{AuthLayer, Authenticate, IdentityHeaders};
use portcullis::discovery::EmbeddedRegistry;
use portcullis::gateway::Gateway;

type Body = Channel<Bytes, std::convert::Infallible>;

async fn through_the_gateway(http2: bool) {
    let registry = EmbeddedRegistry::new();
    let backends = support::backends(&["a"]).await;
    let _registrations = support::register(&registry, "orders", support::places(&backends)).await;
    let gateway = support::listen(support::open_gateway(registry).build().unwrap()).await;
    let client = support::client::<Body>(http2);

    // The backend echoes, so a chunk that comes back has gone both ways before the next was written.
    let (mut upload, body) = Body::new(1);
    let request = Request::post(format!("http://{gateway}/echo")).header("te", "trailers").header("trailer", "x-sum");
    let sending = tokio::spawn(client.request(request.body(body).unwrap()));
    upload.send_data(Bytes::from_static(b"one")).await.unwrap();
    let response = sending.await.unwrap().unwrap();
    assert_eq!(response.status(), 200);
    let mut download = response.into_body();
    let first = download.frame().await.unwrap().unwrap().into_data().unwrap();
    assert_eq!(first, "one");
    for number in 0..100 {
        let chunk = Bytes::from(format!("chunk {number}"));
        upload.send_data(chunk.clone()).await.unwrap();
        assert_eq!(download.frame().await.unwrap().unwrap().into_data().unwrap(), chunk);
    }
    let trailers = HeaderMap::from_iter([(http::HeaderName::from_static("x-sum"), HeaderValue::from_static("100"))]);
    upload.send(Frame::trailers(trailers.clone())).await.unwrap();
    drop(upload);
    let end = download.collect().await.unwrap();
    assert_eq!(end.trailers(), Some(&trailers), "HTTP/2: {http2}");
}

#[tokio::test]
async fn chunks_come_back_before_the_next_is_written_over_http1() {
    through_the_gateway(false).await;
}

#[tokio::test]
async fn chunks_come_back_before_the_next_is_written_over_http2() {
    through_the_gateway(true).await;
}

/// What arrives of a request's trailers.
async fn trailers_behind(gateway: Gateway, http2: bool) -> Vec<String> {
    let address = support::listen(gateway).await;
    let names = ["x-user", "x_user", "x.user", "x-sum"];
    let request = Request::post(format!("http://{address}/echo"))
        .header("te", "trailers")
        .header("authorization", support::bearer("ada"))
        .header("trailer", names.join(","));
    let (mut upload, body) = Body::new(1);
    let sending = tokio::spawn(support::client::<Body>(http2).request(request.body(body).unwrap()));
    upload.send_data(Bytes::from_static(b"one")).await.unwrap();
    let trailers = names.map(|name| (http::HeaderName::from_static(name), HeaderValue::from_static("root")));
    upload.send(Frame::trailers(trailers.into_iter().collect())).await.unwrap();
    drop(upload);
    let echoed = sending.await.unwrap().unwrap().into_body().collect().await.unwrap();
    let mut arrived: Vec<_> = echoed.trailers().unwrap().keys().map(ToString::to_string).collect();
    arrived.sort_unstable();
    arrived
}

#[tokio::test]
async fn who_is_calling_cannot_be_said_in_trailers() {
    let registry = EmbeddedRegistry::new();
    let backends = support::backends(&["a"]).await;
    let _registrations = support::register(&registry, "orders", support::places(&backends)).await;
    let says = IdentityHeaders::new().subject(http::HeaderName::from_static("x-user"));
    let auth = AuthLayer::new(support::jwt().shared());
    for http2 in [false, true] {
        let telling = auth.clone().identity_headers(says.clone());
        let gateway = support::open_gateway(registry.clone()).with_auth(telling).build().unwrap();
        assert_eq!(trailers_behind(gateway, http2).await, ["x-sum"], "HTTP/2: {http2}");
        let gateway = support::open_gateway(registry.clone()).with_auth(auth.clone()).build().unwrap();
        let all = ["x-sum", "x-user", "x.user", "x_user"];
        assert_eq!(trailers_behind(gateway, http2).await, all, "nobody says it, HTTP/2: {http2}");
    }
}

#[tokio::test]
async fn a_response_cut_short_is_not_presented_as_whole() {
    let registry = EmbeddedRegistry::new();
    let mut backends = support::backends(&["a"]).await;
    let _registrations = support::register(&registry, "orders", support::places(&backends)).await;
    let gateway = support::listen(support::open_gateway(registry).build().unwrap()).await;
    let client = support::client::<Body>(false);

    let (mut upload, body) = Body::new(1);
    let request = Request::post(format!("http://{gateway}/echo")).body(body).unwrap();
    let sending = tokio::spawn(client.request(request));
    upload.send_data(Bytes::from_static(b"one")).await.unwrap();
    let mut download = sending.await.unwrap().unwrap().into_body();
    download.frame().await.unwrap().unwrap();
    backends.remove(0).kill().await;
    assert!(download.collect().await.is_err(), "the end was made up");
}
