//! The whole way: three backends that register themselves, and a gateway in front of them.
//!
//! `cargo run --example gateway` needs nothing and prints what to try.

use std::collections::HashMap;
use std::error::Error;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::Path;
use axum::routing::delete;
use portcullis::auth::{self, Algorithm, AuthLayer, Authenticate, Jwt, KeySet};
use portcullis::balance::{BalanceLayer, LeastConnections};
use portcullis::circuit_break::CircuitBreakLayer;
use portcullis::discovery::{DiscoveryLayer, EmbeddedRegistry, Registry, ServiceDefinition};
use portcullis::forward::Forward;
use portcullis::gateway::{Gateway, Route};
use portcullis::rate_limit::{self, Rate, RateLimitLayer};
use portcullis::serve::Server;
use portcullis_testing::{Backend, token};
use serde_json::json;

const SECRET: &[u8] = b"a secret of an example, known to everybody who reads it";

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();

    // Each backend says where it lives; nobody configures addresses.
    let registry = EmbeddedRegistry::new();
    let backends = Arc::new(Mutex::new(HashMap::new()));
    let mut registrations = Vec::new();
    for name in ["a", "b", "c"] {
        let backend = Backend::start(name).await;
        registrations.push(registry.register(ServiceDefinition::new("orders", name, backend.address())).await?);
        if let Ok(mut backends) = backends.lock() {
            backends.insert(name.to_owned(), backend);
        }
    }

    let jwt = Jwt::new(KeySet::hmac(Algorithm::HS256, SECRET)?).issuer("example").audience("orders");
    let gateway = Gateway::builder(registry.clone())
        // What is it asking for? First, since the route decides what the others ask.
        .route("/orders/{*rest}", Route::to("orders"))
        .route("/public/{*rest}", Route::to("orders").auth(auth::Policy::none()))
        .route("/seldom", Route::to("orders").rate_limit(rate_limit::Policy::new(Rate::per_minute(3_u32.try_into()?))))
        // Who is calling? Before the limit, so that each caller has their own.
        .with_auth(AuthLayer::new(jwt.shared()))
        // May they, this often? Before anything is looked up or picked for them.
        .with_rate_limit(RateLimitLayer::new(Rate::per_second(100_u32.try_into()?)))
        // Where does that name live? Above balance, which chooses among the answers.
        .with_discovery(DiscoveryLayer::new(registry))
        // Which of those? Above the breaker, so that each endpoint has its own.
        .with_balance(BalanceLayer::new(Arc::new(LeastConnections::default())))
        // Is that one well? Next to the way out, where it sees what became of each attempt.
        .with_circuit_break(CircuitBreakLayer::new())
        // Send it, stream it back.
        .with_forward(Forward::new())
        .build()?;

    let at = |port| Server::bind(([127, 0, 0, 1], port));
    let server = at(8080).or_else(|_| at(0))?;
    let address = server.local_addr()?;
    let control = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let control_address = control.local_addr()?;
    let kill = move |Path(name): Path<String>| async move {
        let backend = backends.lock().ok().and_then(|mut backends| backends.remove(&name));
        match backend {
            Some(backend) => {
                backend.kill().await;
                format!("{name} is dead, and nobody has told the gateway\n")
            }
            None => format!("there is no {name}\n"),
        }
    };
    let killer = axum::Router::new().route("/{name}", delete(kill));
    tokio::spawn(async move { axum::serve(control, killer).await });

    let claims = json!({ "iss": "example", "aud": "orders", "sub": "ada", "exp": token::now() + 86_400 });
    let token = token::hs256(SECRET, &claims);
    println!(
        "A gateway listens on http://{address}, three backends are behind it. Try, one line at a time:

# passes, and shows which backend answered
curl -si -H 'authorization: Bearer {token}' http://{address}/orders/7
# 401: who is calling?
curl -si http://{address}/orders/7
# needs no token
curl -si http://{address}/public/hello
# 404: no such route
curl -si http://{address}/nowhere
# 429: three a minute are enough here
for i in 1 2 3 4 5; do curl -s -o /dev/null -w '%{{http_code}}\\n' -H 'authorization: Bearer {token}' http://{address}/seldom; done
# kills a backend; it says so
curl -s -X DELETE http://{control_address}/b
# and nobody notices: thirty answers, all 200, from the other two
for i in $(seq 30); do curl -si -H 'authorization: Bearer {token}' http://{address}/orders/$i; done | grep -E '^(HTTP|x-backend)' | sort | uniq -c

Ctrl-C drains and stops."
    );

    let stop = async { drop(tokio::signal::ctrl_c().await) };
    server.graceful(stop, Duration::from_secs(5)).serve(gateway).await?;
    for registration in registrations {
        registration.deregister().await?;
    }
    Ok(())
}
