//! The layer through its public interface.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

mod support;

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use portcullis_auth::{
    Algorithm, ApiKey, Auth, AuthLayer, Authenticate, Basic, ClientCertificate, Denied, Head, IdentityHeaders, Jwt,
    Policy, SharedAuthenticate,
};
use portcullis_core::{Body, Carried, Identity, Layer as Refused, PeerAddress, PeerTls, Proof, Rejection, Route};
use portcullis_testing::contract;
use serde_json::json;
use support::{NOW, Signer, wall};
use tower::{Layer, ServiceExt, service_fn};

type ProbeBody = http_body_util::channel::Channel<Bytes, Infallible>;
type Answer = Response<Body<Full<Bytes>>>;

/// Answers with what it saw of the caller.
async fn echo<B>(request: Request<B>) -> Result<Response<Full<Bytes>>, Infallible> {
    let who = Identity::of(request.extensions()).map_or("nobody", Identity::subject).to_owned();
    let mut response = Response::new(Full::from(who));
    *response.headers_mut() = request.headers().clone();
    Ok(response)
}

fn signer() -> (Signer, Jwt) {
    let signer = Signer::new(Algorithm::HS256);
    let jwt = Jwt::new(signer.key_set("a")).wall_clock(wall());
    (signer, jwt)
}

fn bearer(signer: &Signer, more: &serde_json::Value) -> Request<()> {
    let mut claims = support::claims();
    claims.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    support::request(&format!("Bearer {}", signer.sign(&claims)))
}

async fn send<A>(layer: &AuthLayer<A>, request: Request<()>) -> Answer
where
    A: Authenticate + Send + Sync + 'static,
{
    layer.layer(service_fn(echo::<()>)).oneshot(request).await.unwrap()
}

async fn refuse_to_be_reached(_: Request<()>) -> Result<Response<Full<Bytes>>, Infallible> {
    panic!("reached")
}

async fn text(response: Answer) -> String {
    String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
}

fn challenge(response: &Answer) -> &str {
    response.headers()["www-authenticate"].to_str().unwrap()
}

#[tokio::test(start_paused = true)]
async fn the_contract_holds() {
    let (signer, jwt) = signer();
    let authorization = format!("Bearer {}", signer.sign(&support::claims()));
    let request = |body| Request::builder().header("authorization", &authorization).body(body).unwrap();
    contract::holds(AuthLayer::new(jwt.clone()), request).await;
    contract::holds(AuthLayer::new(jwt.clone().shared()), request).await;
    contract::holds(AuthLayer::new(jwt).policy(Policy::none()), Request::new).await;
    let later = |_: &Head<'_>| async {
        tokio::task::yield_now().await;
        Ok(Identity::new("ada", Proof::Custom("slow")))
    };
    contract::holds(AuthLayer::new(later), Request::new).await;
}

#[tokio::test]
async fn a_known_caller_passes_and_is_named() {
    let (signer, jwt) = signer();
    let response = send(&AuthLayer::new(jwt), bearer(&signer, &json!({}))).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(text(response).await, "ada");
}

#[tokio::test]
async fn without_credentials_the_challenge_is_bare() {
    let (_, jwt) = signer();
    let response = send(&AuthLayer::new(jwt.clone()), Request::new(())).await;
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(challenge(&response), "Bearer");
    let rejection = response.extensions().get::<Rejection>().unwrap();
    assert_eq!((rejection.layer(), rejection.reason()), (Refused::Auth, "no-credentials"));
    let layer = AuthLayer::new(jwt).realm("shop").resource_metadata("https://api.example/.well-known/x");
    let response = send(&layer, Request::new(())).await;
    assert_eq!(challenge(&response), "Bearer realm=\"shop\",resource_metadata=\"https://api.example/.well-known/x\"");
}

#[tokio::test]
async fn bad_credentials_are_401_and_unreadable_ones_400() {
    let (signer, jwt) = signer();
    let layer = AuthLayer::new(jwt);
    let response = send(&layer, bearer(&signer, &json!({"exp": NOW - 600}))).await;
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(challenge(&response), "Bearer error=\"invalid_token\",error_description=\"the token expired\"");
    let mut twice = bearer(&signer, &json!({}));
    twice.headers_mut().append("authorization", "Bearer x".parse().unwrap());
    let response = send(&layer, twice).await;
    assert_eq!(response.status(), StatusCode::BAD_REQUEST);
    assert!(challenge(&response).starts_with("Bearer error=\"invalid_request\""));
}

#[tokio::test]
async fn lacking_a_scope_is_403_and_says_which() {
    let (signer, jwt) = signer();
    let layer = AuthLayer::new(jwt).policy(Policy::required().scopes_all(["read", "write"]));
    assert_eq!(send(&layer, bearer(&signer, &json!({"scope": "write read"}))).await.status(), 200);
    let response = send(&layer, bearer(&signer, &json!({"scope": "read"}))).await;
    assert_eq!(response.status(), StatusCode::FORBIDDEN);
    assert_eq!(challenge(&response), "Bearer error=\"insufficient_scope\",scope=\"read write\"");
}

#[tokio::test]
async fn every_condition_must_hold() {
    #[derive(serde::Deserialize)]
    struct Claims {
        tenant: String,
    }
    let (signer, jwt) = signer();
    let status = async |policy: Policy, claims: serde_json::Value| {
        send(&AuthLayer::new(jwt.clone()).policy(policy), bearer(&signer, &claims)).await.status().as_u16()
    };
    let any = Policy::required().scopes_any(["a", "b"]);
    assert_eq!(status(any.clone(), json!({"scope": "b"})).await, 200);
    assert_eq!(status(any.clone(), json!({"scope": "c"})).await, 403);
    assert_eq!(status(any.roles_all(["r"]), json!({"scope": "b"})).await, 403);
    assert_eq!(status(Policy::required().roles_any(["r", "s"]), json!({"roles": ["s"]})).await, 200);
    assert_eq!(status(Policy::required().roles_all(["r", "s"]), json!({"roles": ["s"]})).await, 403);
    let tenant = Policy::required().claims(|claims: &Claims| claims.tenant == "acme");
    assert_eq!(status(tenant.clone(), json!({"tenant": "acme"})).await, 200);
    assert_eq!(status(tenant.clone(), json!({"tenant": "other"})).await, 403);
    assert_eq!(status(tenant, json!({"tenant": 1})).await, 403, "claims of another type");
    assert_eq!(status(Policy::required().when(|identity| identity.subject() == "eve"), json!({})).await, 403);
}

#[tokio::test]
async fn optional_lets_nobody_pass_as_nobody_and_bad_credentials_never() {
    let (signer, jwt) = signer();
    let layer = AuthLayer::new(jwt).policy(Policy::optional().scopes_all(["read"]));
    let response = send(&layer, Request::new(())).await;
    assert_eq!(text(response).await, "nobody");
    assert_eq!(send(&layer, bearer(&signer, &json!({"exp": 1}))).await.status(), 401);
    assert_eq!(send(&layer, bearer(&signer, &json!({}))).await.status(), 403);
    assert_eq!(text(send(&layer, bearer(&signer, &json!({"scope": "read"}))).await).await, "ada");
}

#[tokio::test]
async fn a_route_overrides_the_layers_policy() {
    let (signer, jwt) = signer();
    let layer = AuthLayer::new(jwt);
    let open = |mut request: Request<()>| {
        Route::new("/open").with_policy(Policy::none()).attach(request.extensions_mut());
        request
    };
    assert_eq!(text(send(&layer, open(Request::new(()))).await).await, "nobody");
    let response = send(&layer, open(bearer(&signer, &json!({"exp": 1})))).await;
    assert_eq!(response.status(), 200, "credentials are not looked at");
    assert!(response.headers().contains_key("authorization"), "nor taken out");
    let mut other = Request::new(());
    Route::new("/other").with_policy("a policy of another layer").attach(other.extensions_mut());
    assert_eq!(send(&layer, other).await.status(), 401);
}

#[tokio::test]
async fn accepted_credentials_go_no_further_unless_told() {
    let (signer, jwt) = signer();
    let layer = AuthLayer::new(jwt);
    let response = send(&layer, bearer(&signer, &json!({}))).await;
    assert!(!response.headers().contains_key("authorization"));
    let response = send(&layer.forward_credentials(true), bearer(&signer, &json!({}))).await;
    assert!(response.headers()["authorization"].is_sensitive(), "and not for logs");
}

#[tokio::test]
async fn a_preflight_passes_only_when_told() {
    let (_, jwt) = signer();
    let preflight = || {
        let request = Request::builder().method("OPTIONS").header("origin", "https://shop.example");
        request.header("access-control-request-method", "PUT").body(()).unwrap()
    };
    let layer = AuthLayer::new(jwt);
    assert_eq!(send(&layer, preflight()).await.status(), 401);
    let layer = layer.preflight(true);
    assert_eq!(send(&layer, preflight()).await.status(), 200);
    let mut options = preflight();
    options.headers_mut().remove("access-control-request-method");
    assert_eq!(send(&layer, options).await.status(), 401, "OPTIONS alone is no preflight");
    let mut put = preflight();
    *put.method_mut() = http::Method::PUT;
    assert_eq!(send(&layer, put).await.status(), 401);
}

#[tokio::test]
async fn grpc_callers_are_refused_in_trailers_only_responses() {
    let (signer, jwt) = signer();
    let layer = AuthLayer::new(jwt).policy(Policy::required().scopes_all(["read"]));
    let grpc = |mut request: Request<()>| {
        request.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
        request
    };
    for (request, code) in [
        (Request::new(()), "16"),
        (bearer(&signer, &json!({})), "7"),
        (support::request("Bearer x"), "16"),
        (support::request("Bearer"), "16"),
    ] {
        let response = send(&layer, grpc(request)).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["grpc-status"], code);
        assert!(http_body::Body::is_end_stream(response.body()));
    }
}

#[tokio::test]
async fn a_stream_outlives_its_token() {
    let signer = Signer::new(Algorithm::HS256);
    let wall = wall();
    let jwt = Jwt::new(signer.key_set("a")).wall_clock(wall.clone());
    let layer = AuthLayer::new(jwt);
    let echo = layer
        .layer(service_fn(async |request: Request<ProbeBody>| Ok::<_, Infallible>(Response::new(request.into_body()))));
    let (mut upload, body) = ProbeBody::new(1);
    let response = echo.oneshot(bearer(&signer, &json!({})).map(|()| body)).await.unwrap();
    wall.set(Duration::from_secs(NOW + 86_400));
    assert_eq!(send(&layer, bearer(&signer, &json!({}))).await.status(), 401, "it expired meanwhile");
    upload.send_data(Bytes::from_static(b"late")).await.unwrap();
    drop(upload);
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "late");
}

#[tokio::test]
async fn a_refused_request_does_not_reach_the_service() {
    let (_, jwt) = signer();
    let inner = service_fn(refuse_to_be_reached);
    let service: Auth<_, _> = AuthLayer::new(jwt).layer(inner);
    let response: Result<Answer, Infallible> = service.oneshot(Request::new(())).await;
    assert_eq!(response.unwrap().status(), 401);
}

// === proofs together ===

fn fixed(
    result: Result<&'static str, Denied>,
    wait: u64,
) -> impl Authenticate<Future: Send> + Clone + Send + Sync + 'static {
    move |_: &Head<'_>| {
        let result = result.clone().map(|name| Identity::new(name, Proof::Custom("fixed")));
        async move {
            tokio::time::sleep(Duration::from_secs(wait)).await;
            result
        }
    }
}

fn accepts(name: &'static str, wait: u64) -> impl Authenticate<Future: Send> + Clone + Send + Sync + 'static {
    fixed(Ok(name), wait)
}

fn refuses(denied: Denied, wait: u64) -> impl Authenticate<Future: Send> + Clone + Send + Sync + 'static {
    fixed(Err(denied), wait)
}

#[tokio::test(start_paused = true)]
async fn any_of_takes_the_first_that_accepts_and_the_most_telling_refusal() {
    let says = async |proof: SharedAuthenticate| {
        let response = send(&AuthLayer::new(proof), Request::new(())).await;
        (response.status().as_u16(), text(response).await)
    };
    for (first, second, sooner) in [(0, 0, "a"), (1, 1, "a"), (1, 2, "a"), (2, 1, "b")] {
        let who = says(accepts("a", first).or(accepts("b", second)).shared()).await;
        assert_eq!(who, (200, sooner.into()));
        let who = says(refuses(Denied::invalid("x"), first).or(accepts("b", second)).shared()).await;
        assert_eq!(who, (200, "b".into()));
        for (one, two) in [(Denied::missing(), Denied::invalid("x")), (Denied::invalid("x"), Denied::missing())] {
            let (status, text) = says(refuses(one, first).or(refuses(two, second)).shared()).await;
            assert!(status == 401 && text.contains("invalid-credentials"), "{text}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn all_of_wants_both_and_takes_the_first_ones_word() {
    let says = async |proof: SharedAuthenticate| {
        let response = send(&AuthLayer::new(proof), Request::new(())).await;
        (response.status().as_u16(), text(response).await)
    };
    for (first, second) in [(0, 0), (1, 2), (2, 1)] {
        assert_eq!(says(accepts("a", first).and(accepts("b", second)).shared()).await, (200, "a".into()));
        assert_eq!(says(refuses(Denied::forbidden("x"), first).and(accepts("b", second)).shared()).await.0, 403);
        assert_eq!(says(accepts("a", first).and(refuses(Denied::missing(), second)).shared()).await.0, 401);
    }
}

#[tokio::test(start_paused = true)]
async fn one_of_two_proofs_that_decides_does_not_wait_for_the_other() {
    let says = async |proof: SharedAuthenticate| {
        let started = tokio::time::Instant::now();
        let status = send(&AuthLayer::new(proof), Request::new(())).await.status().as_u16();
        (status, started.elapsed().as_secs())
    };
    let keys = || ApiKey::new().unwrap();
    let now = || Basic::new("shop").unwrap().accept("ada", "s3cret").unwrap();
    for (sooner, later) in [(1, 60), (60, 1)] {
        assert_eq!(says(accepts("a", sooner).or(accepts("b", later)).shared()).await, (200, 1));
        let (a, b) = (refuses(Denied::forbidden("x"), sooner), refuses(Denied::forbidden("x"), later));
        assert_eq!(says(a.and(b).shared()).await, (403, 1));
        let (a, b) = (refuses(Denied::missing(), sooner), refuses(Denied::missing(), later));
        assert_eq!(says(a.clone().and(b.clone()).shared()).await, (401, 60), "what else is shown may tell more");
        assert_eq!(says(a.or(b).shared()).await, (401, 60));
    }
    // One that says so at once.
    let shown = async |proof: SharedAuthenticate| {
        let mut request = support::request("Basic YWRhOnMzY3JldA==");
        request.headers_mut().insert("x-api-key", "unknown".parse().unwrap());
        let started = tokio::time::Instant::now();
        let status = send(&AuthLayer::new(proof), request).await.status().as_u16();
        (status, started.elapsed().as_secs())
    };
    assert_eq!(shown(refuses(Denied::invalid("x"), 60).or(now()).shared()).await, (200, 0));
    assert_eq!(shown(accepts("a", 60).and(keys()).shared()).await, (401, 0));
}

/// A forged token without the certificate that must come with it is not nobody's.
#[tokio::test]
async fn where_two_proofs_are_optional_together_one_alone_is_refused() {
    let (signer, jwt) = signer();
    let certificate = ClientCertificate::new().read(|_| Some(Identity::new("host", Proof::ClientCertificate)));
    let request = |signer: Option<&Signer>, certificate: bool| {
        let mut request = signer.map_or_else(|| Request::new(()), |signer| bearer(signer, &json!({})));
        if certificate {
            PeerTls::new(vec![Bytes::from_static(b"mine")]).attach(request.extensions_mut());
        }
        request
    };
    let forger = Signer::new(Algorithm::HS256);
    for proof in [certificate.clone().and(jwt.clone()).shared(), jwt.and(certificate).shared()] {
        let layer = AuthLayer::new(proof).policy(Policy::optional());
        for (signer, certificate, status) in [
            (None, false, 200),
            (Some(&forger), false, 401),
            (Some(&forger), true, 401),
            (Some(&signer), false, 401),
            (None, true, 401),
            (Some(&signer), true, 200),
        ] {
            let response = send(&layer, request(signer, certificate)).await;
            assert_eq!(response.status().as_u16(), status, "{} {certificate}", signer.is_some());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_closure_may_take_its_time_and_say_anything() {
    let status =
        async |denied: Denied| send(&AuthLayer::new(refuses(denied, 1)), Request::new(())).await.status().as_u16();
    assert_eq!(status(Denied::missing()).await, 401);
    assert_eq!(status(Denied::invalid("x")).await, 401);
    assert_eq!(status(Denied::malformed("x")).await, 400);
    assert_eq!(status(Denied::forbidden("x")).await, 403);
    assert_eq!(status(Denied::unavailable("x")).await, 503);
    let response =
        send(&AuthLayer::new(refuses(Denied::limited(Duration::from_millis(1500)), 1)), Request::new(())).await;
    assert_eq!((response.status().as_u16(), &response.headers()["retry-after"]), (429, &http::HeaderValue::from(2)));
}

// === the other proofs ===

#[tokio::test]
async fn an_api_key_is_one_known_header() {
    let cron = Identity::new("cron", Proof::ApiKey).with_roles(["machine"]);
    let keys = ApiKey::new().unwrap().accept("0123456789abcdef", cron.clone()).unwrap();
    let layer = AuthLayer::new(keys.clone()).forward_credentials(false);
    let request = |key: &str| Request::builder().header("x-api-key", key).body(()).unwrap();
    let response = send(&layer, request("0123456789abcdef")).await;
    assert!(!response.headers().contains_key("x-api-key"));
    assert_eq!(text(response).await, "cron");
    for wrong in ["0123456789abcdeg", "0123456789abcde", "", &"x".repeat(5000)] {
        let response = send(&layer, request(wrong)).await;
        assert_eq!(response.status(), 401);
        assert_eq!(challenge(&response), "ApiKey header=\"x-api-key\"");
    }
    assert_eq!(send(&layer, Request::new(())).await.status(), 401);
    let mut twice = request("0123456789abcdef");
    twice.headers_mut().append("x-api-key", "0123456789abcdef".parse().unwrap());
    assert_eq!(send(&layer, twice).await.status(), 400);
    assert!(keys.clone().accept("short", cron.clone()).unwrap_err().is_setting());
    assert!(keys.clone().accept("0123456789abcdef", cron).unwrap_err().is_setting(), "the same secret twice");
    assert!(!format!("{keys:?}").contains("0123456789abcdef"));
}

#[tokio::test]
async fn basic_is_a_known_pair() {
    let layer = AuthLayer::new(Basic::new("shop").unwrap().accept("ada", "s3cret").unwrap());
    let says = async |authorization: &str| {
        let response = send(&layer, support::request(authorization)).await;
        (response.status().as_u16(), response.headers().get("www-authenticate").cloned())
    };
    assert_eq!(says("Basic YWRhOnMzY3JldA==").await.0, 200);
    assert_eq!(says("basic YWRhOnMzY3JldA==").await.0, 200);
    for wrong in ["Basic YWRhOnMzY3JlVA==", "Basic YWRh", "Basic YWRhOg==", "Bearer x"] {
        let (status, challenge) = says(wrong).await;
        assert_eq!(status, 401, "{wrong}");
        assert_eq!(challenge.unwrap(), "Basic realm=\"shop\", charset=\"UTF-8\"");
    }
    assert_eq!(says("Basic !").await.0, 400);
    for (name, password) in [("", "x"), ("a", ""), ("a:b", "x"), ("a", "x\ny")] {
        assert!(Basic::new("shop").unwrap().accept(name, password).unwrap_err().is_setting());
    }
}

/// The right one is not looked at either, or guessing would go on.
#[tokio::test(start_paused = true)]
async fn secrets_are_guessed_a_few_times_and_then_no_faster_than_the_limit() {
    let every = Duration::from_secs(1);
    let keys = ApiKey::new().unwrap().accept("0123456789abcdef", Identity::new("cron", Proof::ApiKey)).unwrap();
    let basic = Basic::new("shop").unwrap().accept("ada", "s3cret").unwrap();
    let (keys, basic) = (keys.failures_per_address(3, every).shared(), basic.failures_per_address(3, every).shared());
    for (proof, header, wrong, right) in [
        (keys, "x-api-key", "0123456789abcdeg", "0123456789abcdef"),
        (basic, "authorization", "Basic YWRhOnMzY3JlVA==", "Basic YWRhOnMzY3JldA=="),
    ] {
        let layer = AuthLayer::new(proof);
        let ask = async |shown: &str, address: &str| {
            let mut request = Request::builder().header(header, shown).body(()).unwrap();
            PeerAddress(address.parse().unwrap()).attach(request.extensions_mut());
            send(&layer, request).await.status().as_u16()
        };
        let (attacker, other) = ("192.0.2.1:5000", "192.0.2.2:5000");
        for _ in 0..10 {
            assert_eq!(ask(right, attacker).await, 200, "what is right costs nothing");
        }
        for expected in [401, 401, 401, 429] {
            assert_eq!(ask(wrong, attacker).await, expected);
        }
        assert_eq!((ask(right, attacker).await, ask(right, other).await), (429, 200));
        tokio::time::advance(every).await;
        assert_eq!((ask(wrong, attacker).await, ask(right, attacker).await), (401, 429));
        tokio::time::advance(every).await;
        assert_eq!(ask(right, attacker).await, 200);
    }
}

/// Keys of two sources in one header: whoever shows a good one guesses at neither. What stands elsewhere is a guess.
#[tokio::test(start_paused = true)]
async fn what_is_good_for_another_is_no_guess() {
    let every = Duration::from_secs(1);
    let keys = |key: &str, header: &'static str| {
        let keys = ApiKey::new().unwrap().header(http::HeaderName::from_static(header));
        keys.accept(key, Identity::new(key, Proof::ApiKey)).unwrap().failures_per_address(3, every)
    };
    let (ours, theirs, else_where) = ("ours-0123456789abcdef", "theirs-0123456789abcdef", "elsewhere-0123456789abcdef");
    let all = keys(ours, "x-key").or(keys(else_where, "x-other")).or(keys(theirs, "x-key"));
    let layer = AuthLayer::new(all.shared());
    let ask = async |shown: &[(&str, &str)]| {
        let request = shown.iter().fold(Request::builder(), |request, (name, value)| request.header(*name, *value));
        let mut request = request.body(()).unwrap();
        PeerAddress("192.0.2.1:5000".parse().unwrap()).attach(request.extensions_mut());
        send(&layer, request).await.status().as_u16()
    };
    for _ in 0..10 {
        assert_eq!((ask(&[("x-key", theirs)]).await, ask(&[("x-key", ours)]).await), (200, 200));
    }
    let guess = [("x-key", "ours-0123456789abcdeg"), ("x-other", else_where)];
    for _ in 0..3 {
        assert_eq!(ask(&guess).await, 200);
    }
    assert_eq!(ask(&[("x-key", ours)]).await, 429, "three guesses, whatever else was shown");
}

#[tokio::test]
async fn a_certificate_stands_for_whom_it_was_given_to() {
    let known = Bytes::from_static(b"known");
    let fingerprint: String = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &known)
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02X}:"))
        .collect();
    let ada = Identity::new("ada", Proof::ClientCertificate);
    let proof = ClientCertificate::new().accept(&fingerprint, ada.clone()).unwrap();
    let proof = proof.read(|der| (&der[..] == b"read").then(|| Identity::new("read", Proof::ClientCertificate)));
    let layer = AuthLayer::new(proof);
    let request = |certificates: Vec<Bytes>| {
        let mut request = Request::builder().header("x-forwarded-client-cert", "Subject=\"CN=ada\"").body(()).unwrap();
        PeerTls::new(certificates).attach(request.extensions_mut());
        request
    };
    assert_eq!(text(send(&layer, request(vec![known.clone()])).await).await, "ada");
    assert_eq!(text(send(&layer, request(vec![Bytes::from_static(b"read")])).await).await, "read");
    assert_eq!(send(&layer, request(vec![Bytes::from_static(b"other"), known])).await.status(), 401, "a chain's first");
    assert_eq!(send(&layer, request(vec![])).await.status(), 401);
    assert_eq!(send(&layer, Request::new(())).await.status(), 401);
    for wrong in ["", "00", "zz", &"0".repeat(63), &"0".repeat(66)] {
        assert!(ClientCertificate::new().accept(wrong, ada.clone()).unwrap_err().is_setting(), "{wrong}");
    }
}

#[tokio::test]
async fn challenges_name_every_way_in() {
    let (_, jwt) = signer();
    let keys = ApiKey::new().unwrap();
    let response = send(&AuthLayer::new(jwt.or(keys)), Request::new(())).await;
    let challenges: Vec<_> = response.headers().get_all("www-authenticate").iter().collect();
    assert_eq!(challenges, ["Bearer", "ApiKey header=\"x-api-key\""]);
}

// === what goes upstream ===

#[tokio::test]
async fn the_upstream_hears_who_is_calling_from_us_alone() {
    let (signer, jwt) = signer();
    let headers = IdentityHeaders::new().subject(http::HeaderName::from_static("x-user"));
    let layer = AuthLayer::new(jwt).policy(Policy::optional()).identity_headers(headers).preflight(true);
    let spoof = |mut request: Request<()>| {
        for name in ["x-user", "x_user", "x.user", "X-USER"] {
            request.headers_mut().append(http::HeaderName::try_from(name).unwrap(), "root".parse().unwrap());
        }
        request.headers_mut().insert("connection", "x-user, close".parse().unwrap());
        request
    };
    let seen = |response: &Answer| {
        let names = response.headers().iter().filter(|(_, value)| *value != "close");
        names.map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect::<Vec<_>>()
    };
    let response = send(&layer, spoof(bearer(&signer, &json!({})))).await;
    assert_eq!(seen(&response), ["x-user: ada"]);
    assert_eq!(response.headers()["connection"], "close");
    let response = send(&layer, spoof(Request::new(()))).await;
    assert!(seen(&response).is_empty(), "nobody is nobody: {:?}", response.headers());
    let mut open = spoof(Request::new(()));
    Route::new("/open").with_policy(Policy::none()).attach(open.extensions_mut());
    assert!(seen(&send(&layer, open).await).is_empty(), "also where nobody is asked");
    let mut preflight = spoof(Request::new(()));
    *preflight.method_mut() = http::Method::OPTIONS;
    preflight.headers_mut().insert("origin", "close".parse().unwrap());
    preflight.headers_mut().insert("access-control-request-method", "close".parse().unwrap());
    assert!(seen(&send(&layer, preflight).await).is_empty(), "also for a preflight");
}

// === what is remembered ===

#[tokio::test]
async fn refusals_are_counted_for_all_services_of_a_layer() {
    let (signer, jwt) = signer();
    let layer = AuthLayer::new(jwt).policy(Policy::required().scopes_all(["read"]));
    for _ in 0..3 {
        send(&layer, Request::new(())).await;
    }
    send(&layer, bearer(&signer, &json!({}))).await;
    send(&layer, support::request("Bearer")).await;
    let refusals = layer.refusals();
    assert_eq!((refusals.unauthenticated(), refusals.forbidden(), refusals.malformed()), (3, 1, 1));
}

#[tokio::test(start_paused = true)]
async fn garbage_buys_a_bounded_number_of_signatures_and_known_tokens_pass_on() {
    let (signer, jwt) = signer();
    let layer = AuthLayer::new(jwt.failures_per_address(3, Duration::from_secs(1)));
    let from = |mut request: Request<()>, last: u8| {
        PeerAddress(([192, 0, 2, last], 1).into()).attach(request.extensions_mut());
        request
    };
    let good = |n: u64| bearer(&signer, &json!({"n": n}));
    let forged = || {
        let token = Signer::new(Algorithm::HS256).sign(&support::claims());
        support::request(&format!("Bearer {token}"))
    };
    let status = async |request| send(&layer, request).await.status().as_u16();
    for n in 0..20 {
        assert_eq!(status(from(good(n), 1)).await, 200, "what verifies costs nothing");
    }
    for _ in 0..3 {
        assert_eq!(status(from(forged(), 1)).await, 401);
    }
    let refused = send(&layer, from(forged(), 1)).await;
    assert_eq!((refused.status().as_u16(), &refused.headers()["retry-after"]), (429, &http::HeaderValue::from(1)));
    assert_eq!(status(from(good(0), 1)).await, 200, "a token that was verified before");
    assert_eq!(status(from(good(99), 1)).await, 429, "one that was not");
    assert_eq!(status(from(forged(), 2)).await, 401, "another address");
    tokio::time::advance(Duration::from_secs(1)).await;
    assert_eq!(status(from(good(99), 1)).await, 200);
    assert_eq!(layer.refusals().limited(), 2);
    for _ in 0..20 {
        assert_eq!(status(forged()).await, 401, "without an address nobody is limited");
    }
}

#[tokio::test]
async fn an_expired_token_is_garbage_too() {
    let (signer, jwt) = signer();
    let layer = AuthLayer::new(jwt.failures_per_address(3, Duration::from_secs(1)));
    let mut statuses = Vec::new();
    for _ in 0..4 {
        let mut request = bearer(&signer, &json!({"exp": NOW - 600}));
        PeerAddress(([192, 0, 2, 1], 1).into()).attach(request.extensions_mut());
        statuses.push(send(&layer, request).await.status().as_u16());
    }
    assert_eq!(statuses, [401, 401, 401, 429]);
}

#[tokio::test]
async fn a_token_that_is_bound_to_another_certificate_is_garbage_too() {
    let (signer, jwt) = signer();
    let layer = AuthLayer::new(jwt.cache_bytes(0).failures_per_address(2, Duration::from_secs(1)));
    let thumbprint = support::b64([7; 32]);
    let stolen = || {
        let mut request = bearer(&signer, &json!({"cnf": {"x5t#S256": thumbprint}}));
        PeerAddress("192.0.2.1:5000".parse().unwrap()).attach(request.extensions_mut());
        request
    };
    let mut statuses = Vec::new();
    for _ in 0..3 {
        statuses.push(send(&layer, stolen()).await.status().as_u16());
    }
    assert_eq!(statuses, [401, 401, 429]);
}

#[tokio::test]
async fn a_remembered_token_is_refused_once_it_expires_or_the_rules_change() {
    let signer = Signer::new(Algorithm::ES256);
    let wall = wall();
    let jwt = Jwt::new(signer.key_set("a")).wall_clock(wall.clone()).leeway(Duration::ZERO);
    let request = || bearer(&signer, &json!({"exp": NOW + 10}));
    let layer = AuthLayer::new(jwt.clone());
    for second in 0..10 {
        wall.set(Duration::from_secs(NOW + second));
        assert_eq!(send(&layer, request()).await.status(), 200);
    }
    wall.set(Duration::from_secs(NOW + 10));
    assert_eq!(send(&layer, request()).await.status(), 401);
    wall.set(Duration::from_secs(NOW));
    assert_eq!(send(&layer, request()).await.status(), 200);
    // The very handle whose memory holds the token, with one more rule.
    let stricter = AuthLayer::new(jwt.audience("orders"));
    assert_eq!(send(&stricter, request()).await.status(), 401);
}

#[tokio::test]
async fn a_remembered_identity_is_shared_and_its_certificate_still_asked_for() {
    let (signer, jwt) = signer();
    let certificate = Bytes::from_static(b"mine");
    let thumbprint = support::b64(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &certificate));
    let layer = AuthLayer::new(jwt);
    let request = |certificate: &'static [u8]| {
        let mut request = bearer(&signer, &json!({"cnf": {"x5t#S256": thumbprint}}));
        PeerTls::new(vec![Bytes::from_static(certificate)]).attach(request.extensions_mut());
        request
    };
    assert_eq!(send(&layer, request(b"theirs")).await.status(), 401);
    assert_eq!(send(&layer, request(b"mine")).await.status(), 200);
    assert_eq!(send(&layer, request(b"theirs")).await.status(), 401);
    assert_eq!(send(&layer, request(b"mine")).await.status(), 200);
}
