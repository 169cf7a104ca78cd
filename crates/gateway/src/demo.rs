//! A gateway to look at, with nothing installed: three small backends, a token, and the page.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use jsonwebtoken::{EncodingKey, Header};
use portcullis::serve::{Incoming, Server};
use portcullis_core::WallClock;
use serde_json::json;

use crate::config::Config;
use crate::run::FAILED;

/// One run of the demo is as long as a token of it is good for.
const A_DAY: u64 = 86_400;

pub(crate) fn run() -> ExitCode {
    // Everybody may read it here: what it protects lives on this machine for the length of a demo, and is not worth having.
    let secret: String = std::iter::repeat_with(fastrand::alphanumeric).take(48).collect();
    let backends = match ["a", "b", "c"].map(start) {
        [Ok(a), Ok(b), Ok(c)] => [a, b, c],
        _ => {
            eprintln!("portcullis: there is no free port for a backend");
            return ExitCode::from(FAILED);
        }
    };
    let [a, b, c] = backends;
    let text = format!(
        r#"
        listeners.main.address = "127.0.0.1:{}"
        admin = {{ address = "127.0.0.1:{}", writable = true }}
        limits = {{ each = {{ rate = "100/s" }}, seldom = {{ rate = "3/m" }} }}
        limiter.default = ["each"]
        auth.providers.demo = {{ secret = "{secret}", issuer = "demo", audiences = ["demo"] }}
        [services.orders]
        endpoints = ["{a}", "{b}", "{c}"]
        breaker = {{ failures = 3, open_for = "10s" }}
        retry = {{ attempts = 3, on_statuses = [503] }}
        health = {{ path = "/health", interval = "2s" }}
        [[routes]]
        path = "/orders/{{*rest}}"
        to = "orders"
        [[routes]]
        path = "/seldom"
        limits = ["seldom"]
        to = "orders"
        [[routes]]
        path = "/public/{{*rest}}"
        auth = "none"
        to = "orders"
        "#,
        free(8080),
        free(9901),
    );
    let config = match Config::parse("the demo", &text, Path::new(""), &|_| None) {
        Ok(config) => config,
        Err(mistakes) => {
            eprintln!("{mistakes}");
            return ExitCode::from(FAILED);
        }
    };
    let expires = WallClock::system().since_epoch().as_secs() + A_DAY;
    let claims = json!({ "iss": "demo", "aud": "demo", "sub": "ada", "exp": expires });
    let token = jsonwebtoken::encode(&Header::default(), &claims, &EncodingKey::from_secret(secret.as_bytes()));
    crate::run::run(config, None, |addresses| {
        let (Ok(token), [gateway, admin, ..]) = (token, addresses) else { return };
        say!(
            "
Three backends are behind it. Try, one line at a time:

# passes, and shows which backend answered
curl -si -H 'authorization: Bearer {token}' http://{gateway}/orders/7
# 401: who is calling?
curl -si http://{gateway}/orders/7
# needs no token
curl -si http://{gateway}/public/hello
# 404: no such route
curl -si http://{gateway}/nowhere
# 429: three a minute are enough here
for i in 1 2 3 4 5; do curl -s -o /dev/null -w '%{{http_code}}\\n' -H 'authorization: Bearer {token}' http://{gateway}/seldom; done
# b breaks: every answer is 503 until you make it well again, and nobody notices
curl -s -X POST http://{b}/break
for i in $(seq 30); do curl -s -o /dev/null -w '%{{http_code}} ' http://{gateway}/public/$i; done; echo
curl -s -X POST http://{b}/mend

The page is at http://{admin}/. Ctrl-C drains and stops."
        );
    })
}

/// The port, if nobody has it, else any.
fn free(port: u16) -> u16 {
    std::net::TcpListener::bind(("127.0.0.1", port)).map_or(0, |_| port)
}

/// Starts a backend on a thread of its own, which ends with the process.
fn start(name: &'static str) -> std::io::Result<SocketAddr> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name(format!("backend {name}")).spawn(move || {
        runtime.block_on(async move {
            let broken: &AtomicU64 = Box::leak(Box::default());
            let service = tower::service_fn(move |request: Request<Incoming>| {
                let response = answer(name, broken, &request);
                async move { Ok::<_, Infallible>(response) }
            });
            match Server::from_listener(listener) {
                Ok(server) => server.serve(service).await,
                Err(error) => Err(error),
            }
        })
    })?;
    Ok(address)
}

fn answer(name: &str, broken: &AtomicU64, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let path = request.uri().path();
    let mut status = StatusCode::OK;
    match path {
        "/break" => broken.store(1, Ordering::Relaxed),
        "/mend" => broken.store(0, Ordering::Relaxed),
        _ if broken.load(Ordering::Relaxed) == 1 => status = StatusCode::SERVICE_UNAVAILABLE,
        _ => {}
    }
    let mut response = Response::new(Full::from(format!("{name} answers {} {path}\n", request.method())));
    *response.status_mut() = status;
    response
}
