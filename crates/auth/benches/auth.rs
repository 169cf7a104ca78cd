//! What knowing the caller costs: the whole layer with a token that is remembered, one that is not, and garbage; beside
//! aws-lc alone and jsonwebtoken, in the same run. `cargo bench -p portcullis-auth`.
#![allow(missing_docs, clippy::unwrap_used, reason = "a bench")]

use std::convert::Infallible;
use std::future::{Future, Ready, ready};
use std::hint::black_box;
use std::pin::pin;
use std::str::FromStr;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use http::{Request, Response};
use http_body_util::Empty;
use portcullis_auth::{Algorithm, ApiKey, AuthLayer, Authenticate, Jwt, KeySet};
use portcullis_core::{Identity, Proof};
use serde_json::{Value, json};
use tower::{Layer, Service};

#[path = "../tests/support/mod.rs"]
mod support;

use support::{NOW, Signer, wall};

/// Answers at once.
#[derive(Clone)]
struct Inner;

impl Service<Request<()>> for Inner {
    type Response = Response<Empty<Bytes>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<()>) -> Self::Future {
        black_box(&request);
        ready(Ok(Response::new(Empty::new())))
    }
}

fn claims(n: u64) -> Value {
    json!({
        "iss": "https://id.example.com/", "sub": "5f1c4d7e-3b1a-4a57-9a0e-0d0f6a1c2b3d", "aud": "orders",
        "exp": 4_000_000_000_u64, "iat": NOW, "jti": n, "scope": "orders:read orders:write", "azp": "shop-web",
    })
}

fn jwt(signer: &Signer) -> Jwt {
    Jwt::new(signer.key_set("a")).issuer("https://id.example.com/").audience("orders").wall_clock(wall())
}

fn run<S: Service<Request<()>>>(service: &mut S, request: Request<()>) -> Result<S::Response, S::Error> {
    let future = pin!(service.call(request));
    match future.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => unreachable!("nothing here takes time"),
    }
}

fn whole<A: Authenticate>(criterion: &mut Criterion, name: &str, proof: A, request: impl Fn() -> Request<()>) {
    let mut service = AuthLayer::new(proof).layer(Inner);
    // What is measured is the layer, not the making of a request.
    criterion.bench_function(name, |bencher| {
        bencher.iter_batched(&request, |request| run(&mut service, request), BatchSize::SmallInput);
    });
}

fn layer(criterion: &mut Criterion) {
    criterion.bench_function("layer/none at all", |bencher| {
        bencher.iter_batched(
            || support::request("Bearer x"),
            |request| run(&mut Inner, request),
            BatchSize::SmallInput,
        );
    });
    criterion.bench_function("layer/none, an identity attached", |bencher| {
        let identity = Identity::new("ada", Proof::Jwt);
        let attach = |mut request: Request<()>| {
            portcullis_core::Carried::attach(identity.clone(), request.extensions_mut());
            run(&mut Inner, request)
        };
        bencher.iter_batched(|| support::request("Bearer x"), attach, BatchSize::SmallInput);
    });
    for algorithm in [Algorithm::HS256, Algorithm::RS256, Algorithm::ES256, Algorithm::EdDSA] {
        let signer = Signer::new(algorithm);
        let authorization = format!("Bearer {}", signer.sign(&claims(0)));
        let request = || support::request(&authorization);
        whole(criterion, &format!("layer/{algorithm}, remembered"), jwt(&signer), request);
        whole(criterion, &format!("layer/{algorithm}, verified"), jwt(&signer).cache_bytes(0), request);
    }
    let signer = Signer::new(Algorithm::RS256);
    let unnamed = signer.sign_with(&json!({"alg": "RS256", "kid": "nobody's"}), &claims(0));
    for (name, token) in [("no token", "abc"), ("too many dots", "a.b.c.d"), ("unknown key", &unnamed)] {
        let authorization = format!("Bearer {token}");
        whole(criterion, &format!("layer/refused, {name}"), jwt(&signer), || support::request(&authorization));
    }
    whole(criterion, "layer/refused, nothing", jwt(&signer), || Request::new(()));
    let keys = ApiKey::new().unwrap().accept("0123456789abcdef", Identity::new("cron", Proof::ApiKey)).unwrap();
    let request = || Request::builder().header("x-api-key", "0123456789abcdef").body(()).unwrap();
    whole(criterion, "layer/api key", keys, request);
}

fn proof(criterion: &mut Criterion) {
    for algorithm in [Algorithm::HS256, Algorithm::RS256, Algorithm::ES256, Algorithm::EdDSA] {
        let signer = Signer::new(algorithm);
        let token = signer.sign(&claims(0));
        let request = support::request(&format!("Bearer {token}"));
        let mut group = criterion.benchmark_group(format!("proof/{algorithm}"));
        group.throughput(Throughput::Bytes(token.len() as u64));
        let remembering = jwt(&signer);
        group.bench_function("remembered", |bencher| bencher.iter(|| support::now(&remembering, &request)));
        let forgetting = jwt(&signer).cache_bytes(0);
        group.bench_function("verified", |bencher| bencher.iter(|| support::now(&forgetting, &request)));
        let (message, _) = token.rsplit_once('.').unwrap();
        let raw = signer.signature(message.as_bytes());
        let verify = signer.verifier();
        assert!(verify(message.as_bytes(), &raw));
        group.bench_function("aws-lc alone", |bencher| bencher.iter(|| verify(message.as_bytes(), black_box(&raw))));
        let theirs = jsonwebtoken::Algorithm::from_str(algorithm.as_str()).unwrap();
        let jwk: jsonwebtoken::jwk::Jwk = serde_json::from_value(signer.jwk("a")).unwrap();
        let key = jsonwebtoken::DecodingKey::from_jwk(&jwk).unwrap();
        let mut validation = jsonwebtoken::Validation::new(theirs);
        validation.set_audience(&["orders"]);
        validation.set_issuer(&["https://id.example.com/"]);
        group.bench_function("jsonwebtoken", |bencher| {
            bencher.iter(|| jsonwebtoken::decode::<serde_json::Map<String, Value>>(&token, &key, &validation).unwrap());
        });
        group.finish();
    }
}

fn garbage(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("garbage");
    let signer = Signer::new(Algorithm::RS256);
    let jwt = jwt(&signer);
    let unnamed = signer.sign_with(&json!({"alg": "RS256", "kid": "nobody's"}), &claims(0));
    let other = signer.sign_with(&json!({"alg": "none"}), &claims(0));
    for (name, token) in
        [("one word", "abc"), ("8 KiB of dots", &".".repeat(8000)), ("unknown key", &unnamed), ("alg none", &other)]
    {
        let request = support::request(&format!("Bearer {token}"));
        group.bench_function(name, |bencher| bencher.iter(|| support::now(&jwt, &request)));
    }
    let limited = Jwt::new(KeySet::from_pem(Algorithm::RS256, signer.pem()).unwrap())
        .wall_clock(wall())
        .failures_per_address(1, std::time::Duration::from_secs(3600));
    let forged = Signer::new(Algorithm::RS256).sign(&claims(0));
    let mut request = support::request(&format!("Bearer {forged}"));
    let peer = portcullis_core::PeerAddress(([192, 0, 2, 1], 1).into());
    portcullis_core::Carried::attach(peer, request.extensions_mut());
    let _ = support::now(&limited, &request);
    group.bench_function("forged, address spent", |bencher| bencher.iter(|| support::now(&limited, &request)));
    group.finish();
}

criterion_group!(benches, layer, proof, garbage);
criterion_main!(benches);
