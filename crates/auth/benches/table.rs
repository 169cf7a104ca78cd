//! One table of what knowing the caller costs, in nanoseconds: the best of many short rounds, which a busy machine
//! disturbs least. `cargo bench -p portcullis-auth --bench table`.
#![allow(missing_docs, clippy::unwrap_used, reason = "a bench")]

use std::convert::Infallible;
use std::future::{Future, Ready, ready};
use std::hint::black_box;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use portcullis_auth::{Algorithm, AuthLayer, Jwt};
use portcullis_core::{Carried, Identity, Proof};
use serde_json::json;
use tower::{Layer, Service};

#[path = "../tests/support/mod.rs"]
mod support;

use support::{NOW, Signer, now, request, wall};

const ROUNDS: usize = 3000;
const CALLS: usize = 50;

/// Answers at once; attaches an identity first if it has one.
#[derive(Clone)]
struct Inner(Option<Identity>);

impl Service<Request<()>> for Inner {
    type Response = Response<Empty<Bytes>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<()>) -> Self::Future {
        if let Some(identity) = &self.0 {
            identity.clone().attach(request.extensions_mut());
        }
        black_box(&request);
        ready(Ok(Response::new(Empty::new())))
    }
}

#[expect(clippy::disallowed_methods, reason = "it is the machine's time that is measured")]
fn best<T, R>(name: &str, make: impl Fn() -> T, mut call: impl FnMut(T) -> R) {
    let mut best = f64::MAX;
    for _ in 0..ROUNDS {
        let inputs: Vec<T> = (0..CALLS).map(|_| make()).collect();
        let mut results = Vec::with_capacity(CALLS);
        let start = std::time::Instant::now();
        for input in inputs {
            results.push(call(input));
        }
        best = best.min(start.elapsed().as_secs_f64() * 1e9 / CALLS as f64);
    }
    println!("{name:44} {best:>10.0}");
}

fn run<S: Service<Request<()>>>(service: &mut S, request: Request<()>) -> Result<S::Response, S::Error> {
    match pin!(service.call(request)).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => unreachable!("nothing here takes time"),
    }
}

fn main() {
    let claims = json!({
        "iss": "https://id.example.com/", "sub": "5f1c4d7e-3b1a-4a57-9a0e-0d0f6a1c2b3d", "aud": "orders",
        "exp": NOW + 600, "iat": NOW, "jti": 0, "scope": "orders:read orders:write", "azp": "shop-web",
    });
    let jwt = |signer: &Signer| {
        Jwt::new(signer.key_set("a")).issuer("https://id.example.com/").audience("orders").wall_clock(wall())
    };
    for algorithm in [Algorithm::HS256, Algorithm::RS256, Algorithm::ES256, Algorithm::EdDSA] {
        let signer = Signer::new(algorithm);
        let token = signer.sign(&claims);
        let request = request(&format!("Bearer {token}"));
        let name = |what: &str| format!("{algorithm}, {} bytes, {what}", token.len());
        let (remembering, forgetting) = (jwt(&signer), jwt(&signer).cache_bytes(0));
        assert!(now(&remembering, &request).is_ok());
        best(&name("remembered"), || (), |()| now(&remembering, &request));
        best(&name("verified"), || (), |()| now(&forgetting, &request));
        let (message, _) = token.rsplit_once('.').unwrap();
        let (verify, signature) = (signer.verifier(), signer.signature(message.as_bytes()));
        best(&name("aws-lc alone"), || (), |()| verify(message.as_bytes(), black_box(&signature)));
    }

    let signer = Signer::new(Algorithm::RS256);
    let good = format!("Bearer {}", signer.sign(&claims));
    let unknown = format!("Bearer {}", signer.sign_with(&json!({"alg": "RS256", "kid": "nobody's"}), &claims));
    let dots = format!("Bearer {}", ".".repeat(8000));
    let remembering = jwt(&signer);
    for (name, authorization) in [("one word", "Bearer abc"), ("8000 dots", &dots), ("an unknown key", &unknown)] {
        let request = request(authorization);
        best(&format!("garbage, {name}"), || (), |()| now(&remembering, &request));
    }
    let mut bare = Inner(None);
    best("layer: none", || request(&good), |request| run(&mut bare, request));
    let mut attaching = Inner(Some(Identity::new("ada", Proof::Jwt)));
    best("layer: none, an identity attached", || request(&good), |request| run(&mut attaching, request));
    let mut layered = AuthLayer::new(jwt(&signer)).layer(Inner(None));
    best("layer: remembered", || request(&good), |request| run(&mut layered, request));
    best("layer: refused, nothing", || Request::new(()), |request| run(&mut layered, request));
    best("layer: refused, one word", || request("Bearer abc"), |request| run(&mut layered, request));
    best("layer: refused, an unknown key", || request(&unknown), |request| run(&mut layered, request));
}
