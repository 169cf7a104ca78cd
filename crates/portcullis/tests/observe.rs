//! What an observer is told of a request.
#![expect(clippy::unwrap_used, reason = "what helps the tests fails with them")]

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request};
use http_body_util::{BodyExt, Empty};
use portcullis::balance::{BalanceLayer, Pick, RoundRobin};
use portcullis::core::{Carried, Endpoint, Head, Layer, Observe, Observer, Rejection};
use portcullis::discovery::FixedRegistry;
use portcullis::gateway::{Gateway, Route};
use portcullis_testing::Backend;
use portcullis_testing::process::Nobody;
use tower::ServiceExt;

#[derive(Default)]
struct Told(Mutex<Vec<String>>);

impl Told {
    fn note(&self, what: String) {
        self.0.lock().unwrap().push(what);
    }

    fn all(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Observe for Told {
    fn passed(&self, layer: Layer) {
        self.note(format!("passed {layer:?}"));
    }

    fn sending(&self, endpoint: &Endpoint, headers: &mut HeaderMap) {
        let address = HeaderValue::try_from(endpoint.address().to_string()).unwrap();
        self.note(format!("to {}", endpoint.address()));
        headers.insert("x-attempt", address);
    }

    fn answered(&self, head: Head<'_>) {
        self.note(format!("{} {:?}", head.status.as_u16(), head.extensions.get::<Rejection>().map(Rejection::reason)));
    }

    fn given_up(&self) {
        self.note(String::from("given up"));
    }
}

fn gateway(addresses: impl IntoIterator<Item = std::net::SocketAddr>) -> Gateway {
    let registry = FixedRegistry::new().service("a", addresses.into_iter().map(Into::into));
    let in_order = BalanceLayer::new(Arc::new(RoundRobin::new()) as Arc<dyn Pick>);
    let route = Route::to("a");
    Gateway::builder(registry).with_balance(in_order).route("/{*rest}", route).build().unwrap()
}

fn request(target: &str, told: &Arc<Told>) -> Request<Empty<Bytes>> {
    let mut request = Request::get(target).body(Empty::new()).unwrap();
    Observer::new(told.clone()).attach(request.extensions_mut());
    request
}

#[tokio::test]
async fn every_stage_and_every_attempt_is_told_in_order() {
    let (alive, nobody) = (Backend::start("alive").await, Nobody::new());
    let gateway = gateway([nobody.address(), alive.address()]);
    gateway.ready().await;
    let told = Arc::new(Told::default());
    let mut saw_two = false;
    for _ in 0..2 {
        let Ok(response) = gateway.clone().oneshot(request("http://a.example/x", &told)).await;
        let seen = response.into_body().collect().await.unwrap().to_bytes();
        let seen = String::from_utf8_lossy(&seen).into_owned();
        assert!(seen.contains("x-attempt") && seen.contains(&alive.address().to_string()), "{seen}");
        let mut all = told.all();
        assert_eq!(all[..3], ["passed Auth", "passed RateLimit", "passed Discovery"]);
        let attempts = all.split_off(3);
        let last = [format!("to {}", alive.address()), String::from("200 None")];
        assert!(attempts.ends_with(&last), "{attempts:?}");
        if attempts.len() == 4 {
            saw_two = true;
            assert_eq!(
                attempts[..2],
                [format!("to {}", nobody.address()), String::from("502 Some(\"connect-failed\")")]
            );
        }
    }
    assert!(saw_two, "one of two requests goes to the dead one first");
}

#[tokio::test]
async fn a_caller_that_goes_away_gives_the_attempt_up() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gateway = gateway([silent.local_addr().unwrap()]);
    gateway.ready().await;
    let told = Arc::new(Told::default());
    let call = tokio::spawn(gateway.oneshot(request("http://a.example/x", &told)));
    let _connection = silent.accept().await.unwrap();
    call.abort();
    assert!(call.await.unwrap_err().is_cancelled());
    assert_eq!(told.all().last().map(String::as_str), Some("given up"));
}
