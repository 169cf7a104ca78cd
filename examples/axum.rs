//! Two layers on an axum router that was there before: who is calling, and how often.
//!
//! `cargo run --example axum` prints what to try.

use std::error::Error;
use std::net::SocketAddr;

use axum::extract::{ConnectInfo, Request};
use axum::routing::get;
use portcullis::auth::{Algorithm, AuthLayer, Jwt, KeySet};
use portcullis::core::{Carried, Identity, PeerAddressLayer};
use portcullis::rate_limit::{Rate, RateLimitLayer};
use portcullis_testing::token;
use serde_json::json;
use tower::ServiceBuilder;

const SECRET: &[u8] = b"a secret of an example, known to everybody who reads it";

async fn hello(request: Request) -> String {
    match Identity::of(request.extensions()) {
        Some(caller) => format!("hello, {}\n", caller.subject()),
        None => "hello, whoever you are\n".to_owned(),
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let jwt = Jwt::new(KeySet::hmac(Algorithm::HS256, SECRET)?).issuer("example").audience("greetings");
    let guarded = ServiceBuilder::new()
        .layer(PeerAddressLayer::new(|all| all.get::<ConnectInfo<SocketAddr>>().map(|info| info.0)))
        // First who, then how often: so each caller has a limit of their own.
        .layer(AuthLayer::new(jwt))
        .layer(RateLimitLayer::new(Rate::per_second(2_u32.try_into()?)));
    let app = axum::Router::new().route("/hello", get(hello)).layer(guarded).route("/open", get(hello));

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let claims = json!({ "iss": "example", "aud": "greetings", "sub": "ada", "exp": token::now() + 86_400 });
    let token = token::hs256(SECRET, &claims);
    println!(
        "# passes
curl -si -H 'authorization: Bearer {token}' http://{address}/hello
# 401
curl -si http://{address}/hello
# was added after the layers, so nobody is asked
curl -si http://{address}/open
# two a second and no more: the rest get 429
for i in 1 2 3 4; do curl -s -o /dev/null -w '%{{http_code}}\\n' -H 'authorization: Bearer {token}' http://{address}/hello; done"
    );
    axum::serve(listener, app.into_make_service_with_connect_info::<SocketAddr>()).await?;
    Ok(())
}
