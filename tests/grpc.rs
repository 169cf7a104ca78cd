//! gRPC through the gateway: every kind of call, and refusals in its own words.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use futures::{StreamExt, stream};
use portcullis::discovery::EmbeddedRegistry;
use portcullis::gateway::{Gateway, Route};
use portcullis::rate_limit::Rate;
use portcullis_testing::Backend;
use portcullis_testing::echo::Ping;
use portcullis_testing::echo::echo_client::EchoClient;
use tonic::transport::Channel;
use tonic::{Code, Request};

fn ping(text: &str) -> Ping {
    Ping { text: text.to_owned(), times: 3, fail: 0 }
}

async fn behind_a_gateway(build: impl FnOnce(EmbeddedRegistry) -> Gateway) -> (EchoClient<Channel>, Backend) {
    let registry = EmbeddedRegistry::new();
    let backend = Backend::grpc("a").await;
    let registrations = support::register(&registry, "echo", [("a".to_owned(), backend.address())]).await;
    let gateway = support::listen(build(registry)).await;
    // They stay registered for as long as the test runs.
    std::mem::forget(registrations);
    (EchoClient::connect(format!("http://{gateway}")).await.unwrap(), backend)
}

fn open(registry: EmbeddedRegistry) -> Gateway {
    Gateway::builder(registry).route("/portcullis.testing.Echo/{method}", Route::to("echo")).build().unwrap()
}

#[tokio::test]
async fn every_kind_of_call_passes() {
    let (mut client, backend) = behind_a_gateway(open).await;
    assert_eq!(client.unary(ping("x")).await.unwrap().into_inner().text, "x");
    let answers: Vec<_> = client.download(ping("y")).await.unwrap().into_inner().collect().await;
    assert_eq!(answers.len(), 3);
    assert!(answers.into_iter().all(|answer| answer.unwrap().text == "y"));
    let whole = client.upload(stream::iter(["a", "b", "c"].map(ping))).await.unwrap().into_inner();
    assert_eq!(whole.text, "abc");

    let (questions, asked) = tokio::sync::mpsc::channel(1);
    let asked = stream::unfold(asked, async |mut asked| Some((asked.recv().await?, asked)));
    let mut talk = client.talk(asked).await.unwrap().into_inner();
    for text in ["one", "two", "three"] {
        questions.send(ping(text)).await.unwrap();
        assert_eq!(talk.next().await.unwrap().unwrap().text, text, "answered before the next question");
    }
    drop(questions);
    assert!(talk.next().await.is_none());
    assert_eq!(backend.requests(), 4);
}

#[tokio::test]
async fn a_servers_status_arrives_as_it_is() {
    let (mut client, _backend) = behind_a_gateway(open).await;
    let status = client.unary(Ping { fail: 9, ..ping("x") }).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, "failed as told"));
    let mut answers = client.download(Ping { fail: 10, ..ping("x") }).await.unwrap().into_inner();
    for _ in 0..3 {
        assert!(answers.next().await.unwrap().is_ok());
    }
    assert_eq!(answers.next().await.unwrap().unwrap_err().code(), Code::Aborted);
}

#[tokio::test]
async fn refusals_are_statuses() {
    let (mut client, backend) = behind_a_gateway(|registry| {
        Gateway::builder(registry)
            .authenticate(support::jwt())
            .rate_limit(Rate::per_minute(1_u32.try_into().unwrap()))
            .route("/portcullis.testing.Echo/Unary", Route::to("echo"))
            .route("/portcullis.testing.Echo/Download", Route::to("nowhere"))
            .build()
            .unwrap()
    })
    .await;
    let call = |token: Option<&str>| {
        let mut request = Request::new(ping("x"));
        if let Some(subject) = token {
            request.metadata_mut().insert("authorization", support::bearer(subject).parse().unwrap());
        }
        request
    };
    assert_eq!(client.unary(call(None)).await.unwrap_err().code(), Code::Unauthenticated);
    client.unary(call(Some("ada"))).await.unwrap();
    let limited = client.unary(call(Some("ada"))).await.unwrap_err();
    assert_eq!(limited.code(), Code::ResourceExhausted);
    assert!(!limited.details().is_empty(), "RetryInfo");
    assert_eq!(client.download(call(Some("bob"))).await.unwrap_err().code(), Code::Unavailable);
    let mut upload = Request::new(stream::iter([ping("x")]));
    upload.metadata_mut().insert("authorization", support::bearer("eve").parse().unwrap());
    assert_eq!(client.upload(upload).await.unwrap_err().code(), Code::Unimplemented, "no such route");
    assert_eq!(backend.requests(), 1);
}
