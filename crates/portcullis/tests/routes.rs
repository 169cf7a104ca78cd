//! Routes by more than their path, and what the gateway answers by itself.

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty};
use portcullis::core::Route as Matched;
use portcullis::discovery::{DiscoveryLayer, FixedRegistry};
use portcullis::forward::{Edit, Forward, Paths, Policy};
use portcullis::gateway::{Cors, Gateway, GatewayBody, Is, Redirect, Route, Upstream};
use portcullis_testing::Backend;
use tower::ServiceExt;

async fn call(gateway: &Gateway, request: http::request::Builder) -> Response<GatewayBody> {
    let request = request.body(Empty::<Bytes>::new()).unwrap_or_else(|error| panic!("{error}"));
    let Ok(response) = gateway.clone().oneshot(request).await;
    response
}

fn backend(response: &Response<GatewayBody>) -> &str {
    response.headers().get("x-backend").and_then(|name| name.to_str().ok()).unwrap_or("none")
}

#[tokio::test]
async fn each_service_has_a_way_of_its_own() {
    let (a, b) = (Backend::start("a").await, Backend::start("b").await);
    let gateway = Gateway::builder(FixedRegistry::new().service("a", [a.address().into()]))
        .service("b", Upstream::new(FixedRegistry::new().service("b", [b.address().into()])))
        .route("/{*rest}", Route::to("a"))
        .route("/{*rest}", Route::to("b").host("*.b.example").named("for b"))
        .route("/{*rest}", Route::to("b").header(header::DNT, Is::Present))
        .route("/split", Route::split([("a", 1), ("b", 1)]))
        .leaves_route(true)
        .build()
        .unwrap();
    gateway.ready().await;
    assert!(gateway.is_ready());
    assert_eq!(backend(&call(&gateway, Request::get("http://a.example/")).await), "a");
    let response = call(&gateway, Request::get("http://x.b.example/")).await;
    assert_eq!(backend(&response), "b");
    assert_eq!(&**response.extensions().get::<Matched>().unwrap().name(), "for b");
    assert_eq!(backend(&call(&gateway, Request::get("http://a.example/").header("dnt", "1")).await), "b");
    let mut seen = std::collections::HashSet::new();
    for _ in 0..200 {
        seen.insert(backend(&call(&gateway, Request::get("http://a.example/split")).await).to_owned());
    }
    assert_eq!(seen.len(), 2, "half of the requests go to each");
}

#[tokio::test]
async fn all_routes_that_do_not_fit_are_found_at_once_and_nothing_is_followed() {
    let discovery = DiscoveryLayer::new(FixedRegistry::new());
    let builder = || Gateway::builder(FixedRegistry::new()).with_discovery(discovery.clone());
    let routes = ["/{a}", "no slash", "/{b}", "/a", "/{*rest}/x", "/a", "/b"];
    let with = |routes: &[&str]| {
        routes.iter().fold(builder(), |builder, pattern| builder.route(pattern, Route::to("a").method(Method::GET)))
    };
    let nowhere = with(&routes).route("/nowhere", Route::split([])).route("/a", Route::to("a").method(Method::PUT));
    let misfits: Vec<_> = nowhere.misfits().into_iter().map(|(index, why)| (index, why.to_string())).collect();
    assert_eq!(misfits.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [1, 2, 4, 5, 7], "{misfits:?}");
    for (index, why) in &misfits[..4] {
        let built = with(&routes[..=*index]);
        let first = built.build().unwrap_err().to_string();
        assert!(*index != 1 || first == *why, "{first}");
        assert!(with(&[routes[0], routes[3], routes[*index]]).build().is_err(), "{why}");
    }
    assert!(with(&[]).misfits().is_empty() && with(&[]).build().is_err());
    assert!(with(&routes[..1]).misfits().is_empty());
    assert!(discovery.status().is_empty());
    builder().route("/a", Route::to("a")).build().unwrap();
    assert_eq!(discovery.status().len(), 1);
}

#[tokio::test]
async fn patterns_no_request_matches_are_refused() {
    let with = |pattern: &str, policy: Policy| {
        Gateway::builder(FixedRegistry::new()).route(pattern, Route::to("a").forward(policy)).build()
    };
    for pattern in ["/größe", "/%61dmin", "/a/../b", "/a b", "/a?b", "/a#b"] {
        assert!(with(pattern, Policy::new()).unwrap_err().is_unmatched(), "{pattern}");
        let passed = with(pattern, Policy::new().paths(Paths::Pass));
        assert_eq!(passed.is_err(), pattern.contains([' ', '?', '#']), "{pattern}");
    }
}

#[tokio::test]
async fn redirects_and_fixed_answers_need_no_service() {
    let robots = Route::respond(StatusCode::OK, HeaderValue::from_static("text/plain"), "Disallow: /");
    let gateway = Gateway::builder(FixedRegistry::new())
        .route("/robots.txt", robots)
        .route("/old/{*rest}", Route::redirect(Redirect::new(StatusCode::PERMANENT_REDIRECT).scheme("https")))
        .build()
        .unwrap();
    let response = call(&gateway, Request::get("/robots.txt")).await;
    assert_eq!(response.headers()[header::CONTENT_TYPE], "text/plain");
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "Disallow: /");
    let response = call(&gateway, Request::get("/old/a?b=c").header("host", "h:80")).await;
    assert_eq!(response.status(), StatusCode::PERMANENT_REDIRECT);
    assert_eq!(response.headers()[header::LOCATION], "https://h/old/a?b=c");
    assert_eq!(call(&gateway, Request::get("/old/a")).await.status(), StatusCode::BAD_REQUEST, "no host to go to");
    let odd = call(&gateway, Request::get("/old//evil.example").header("host", "h")).await;
    assert_eq!(odd.status(), StatusCode::BAD_REQUEST, "what is not in normal form is not sent back");
}

#[tokio::test]
async fn preflights_are_answered_without_a_token_and_answers_say_who_may_read_them() {
    let a = Backend::start("a").await;
    let cors = Cors::new(["https://app.example"]).unwrap().methods([Method::PUT]).credentials(true);
    let any = |name| Edit::Set(name, HeaderValue::from_static("*"));
    let careless = Policy::new()
        .edit_response(any(header::ACCESS_CONTROL_ALLOW_ORIGIN))
        .edit_response(any(header::ACCESS_CONTROL_ALLOW_CREDENTIALS));
    let gateway = Gateway::builder(FixedRegistry::new().service("a", [a.address().into()]))
        .route("/a", Route::to("a").method(Method::PUT).cors(cors))
        // A service that allows everybody everything.
        .with_forward(Forward::new().policy(careless))
        .build()
        .unwrap();
    let preflight = Request::options("http://h/a")
        .header("origin", "https://app.example")
        .header("access-control-request-method", "PUT");
    let response = call(&gateway, preflight).await;
    assert_eq!(response.status(), StatusCode::NO_CONTENT);
    assert_eq!(response.headers()[header::ACCESS_CONTROL_ALLOW_ORIGIN], "https://app.example");
    let put = |origin| Request::put("http://h/a").header("origin", origin);
    let response = call(&gateway, put("https://app.example")).await;
    assert_eq!(
        (backend(&response), &response.headers()[header::ACCESS_CONTROL_ALLOW_CREDENTIALS]),
        ("a", &HeaderValue::from_static("true"))
    );
    let response = call(&gateway, put("https://other.example")).await;
    assert!(!response.headers().contains_key(header::ACCESS_CONTROL_ALLOW_ORIGIN));
    assert!(!response.headers().contains_key(header::ACCESS_CONTROL_ALLOW_CREDENTIALS));
    assert_eq!(response.headers()[header::VARY], "origin");
    let plain = Request::options("http://h/a").header("origin", "https://app.example");
    assert_eq!(
        call(&gateway, plain).await.status(),
        StatusCode::METHOD_NOT_ALLOWED,
        "not every OPTIONS is a preflight"
    );
}

#[test]
fn routes_that_make_no_sense_are_refused() {
    let build = |route: Route| Gateway::builder(FixedRegistry::new()).route("/", route).build().map(drop);
    assert!(build(Route::split([("a", 0)])).is_err());
    assert!(build(Route::to("a").host("a:80")).is_err());
    assert!(build(Route::redirect(Redirect::new(StatusCode::OK))).is_err());
    assert!(build(Route::to("a").cors(Cors::new(["*"]).unwrap().credentials(true))).is_err());
    assert!(build(Route::to("a")).is_ok());
}
