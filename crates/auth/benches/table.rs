//! One table of what knowing the caller costs, in nanoseconds: the best of many short rounds, which a busy machine
//! disturbs least; beside aws-lc alone and jsonwebtoken. What has a bound says whether it keeps to it.
//! `cargo bench -p portcullis-auth`.
#![allow(missing_docs, clippy::unwrap_used, reason = "a bench")]

use std::convert::Infallible;
use std::future::{Future, Ready, ready};
use std::hint::black_box;
use std::pin::pin;
use std::str::FromStr;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use portcullis_auth::{Algorithm, ApiKey, AuthLayer, Jwt};
use portcullis_core::{Carried, Identity, PeerAddress, Proof};
use serde_json::{Map, Value, json};
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
fn best<T, R>(name: &str, bound: Option<f64>, make: impl Fn() -> T, mut call: impl FnMut(T) -> R) -> f64 {
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
    let kept =
        bound.map_or(String::new(), |bound| format!("{} {bound:.0}", if best <= bound { "within" } else { "BEYOND" }));
    println!("{name:44} {best:>10.0}  {kept}");
    best
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
        let (message, _) = token.rsplit_once('.').unwrap();
        let (verify, signature) = (signer.verifier(), signer.signature(message.as_bytes()));
        let raw = best(&name("aws-lc alone"), None, || (), |()| verify(message.as_bytes(), black_box(&signature)));
        best(&name("verified"), Some(raw * 1.15 + 3000.0), || (), |()| now(&forgetting, &request));
        best(&name("remembered"), Some(300.0), || (), |()| now(&remembering, &request));
        let theirs = jsonwebtoken::Algorithm::from_str(algorithm.as_str()).unwrap();
        let jwk: jsonwebtoken::jwk::Jwk = serde_json::from_value(signer.jwk("a")).unwrap();
        let key = jsonwebtoken::DecodingKey::from_jwk(&jwk).unwrap();
        let mut validation = jsonwebtoken::Validation::new(theirs);
        validation.set_audience(&["orders"]);
        validation.set_issuer(&["https://id.example.com/"]);
        // The tests' clock is not the machine's.
        validation.validate_exp = false;
        let decode = || jsonwebtoken::decode::<Map<String, Value>>(&token, &key, &validation).unwrap();
        best(&name("jsonwebtoken"), None, || (), |()| decode());
    }

    let signer = Signer::new(Algorithm::RS256);
    let good = format!("Bearer {}", signer.sign(&claims));
    let unknown = format!("Bearer {}", signer.sign_with(&json!({"alg": "RS256", "kid": "nobody's"}), &claims));
    let none = format!("Bearer {}", signer.sign_with(&json!({"alg": "none"}), &claims));
    let dots = format!("Bearer {}", ".".repeat(8000));
    let garbage = [("one word", "Bearer abc"), ("8000 dots", &dots), ("alg none", &none), ("an unknown key", &unknown)];
    for (name, authorization) in garbage {
        let (remembering, request) = (jwt(&signer), request(authorization));
        best(&format!("garbage, {name}"), Some(1000.0), || (), |()| now(&remembering, &request));
    }
    let from = |authorization: &str| {
        let mut request = request(authorization);
        PeerAddress(([192, 0, 2, 1], 1).into()).attach(request.extensions_mut());
        request
    };
    let limited = jwt(&signer).failures_per_address(1, Duration::from_secs(3600));
    let forged = from(&format!("Bearer {}", Signer::new(Algorithm::RS256).sign(&claims)));
    assert!(now(&limited, &forged).is_err());
    best("garbage, forged by an address that is spent", Some(1000.0), || (), |()| now(&limited, &forged));

    let mut bare = Inner(None);
    best("layer: none", None, || request(&good), |request| run(&mut bare, request));
    let mut attaching = Inner(Some(Identity::new("ada", Proof::Jwt)));
    best("layer: none, an identity attached", None, || request(&good), |request| run(&mut attaching, request));
    let mut layered = AuthLayer::new(jwt(&signer)).layer(Inner(None));
    best("layer: remembered", Some(400.0), || request(&good), |request| run(&mut layered, request));
    best("layer: refused, nothing", Some(1000.0), || Request::new(()), |request| run(&mut layered, request));
    for (name, authorization) in garbage {
        best(
            &format!("layer: refused, {name}"),
            Some(1000.0),
            || request(authorization),
            |request| run(&mut layered, request),
        );
    }
    let keys = ApiKey::new().unwrap().accept("0123456789abcdef", Identity::new("cron", Proof::ApiKey)).unwrap();
    let mut layered = AuthLayer::new(keys).layer(Inner(None));
    let request = || Request::builder().header("x-api-key", "0123456789abcdef").body(()).unwrap();
    best("layer: an API key", None, request, |request| run(&mut layered, request));
}
