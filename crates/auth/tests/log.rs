//! Credentials stay out of the log. Alone in its process, since what is written is decided for all threads.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use portcullis_auth::{Algorithm, ApiKey, AuthLayer, Authenticate, Jwt, Policy};
use portcullis_core::{Identity, Proof};
use serde_json::{Value, json};
use support::{Signer, wall};
use tower::{Layer, ServiceExt, service_fn};

async fn fine(_: Request<()>) -> Result<Response<Empty<Bytes>>, Infallible> {
    Ok(Response::new(Empty::new()))
}

fn bearer(signer: &Signer, more: &Value) -> Request<()> {
    let mut claims = support::claims();
    claims.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    support::request(&format!("Bearer {}", signer.sign(&claims)))
}

/// What a subscriber wrote.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn no_credentials_are_logged() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber =
        tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(move || writer.clone());
    let _guard = tracing::subscriber::set_default(subscriber.finish());
    let signer = Signer::new(Algorithm::HS256);
    let jwt = Jwt::new(signer.key_set("a")).wall_clock(wall());
    let keys = ApiKey::new().unwrap().accept("0123456789abcdef", Identity::new("cron", Proof::ApiKey)).unwrap();
    let layer = AuthLayer::new(jwt.or(keys)).forward_credentials(true).policy(Policy::required().scopes_all(["read"]));
    let tokens = [json!({"scope": "read"}), json!({}), json!({"exp": 1})].map(|more| bearer(&signer, &more));
    let forged = bearer(&Signer::new(Algorithm::HS256), &json!({}));
    let secrets: Vec<_> = tokens
        .iter()
        .chain([&forged])
        .map(|request| {
            request.headers()["authorization"].to_str().unwrap().rsplit(['.', ' ']).next().unwrap().to_owned()
        })
        .chain(["0123456789abcdeX".to_owned()])
        .collect();
    let key = Request::builder().header("x-api-key", "0123456789abcdeX").body(()).unwrap();
    let mut statuses = Vec::new();
    for request in tokens.into_iter().chain([forged, key]) {
        statuses.push(layer.layer(service_fn(fine)).oneshot(request).await.unwrap().status().as_u16());
    }
    assert_eq!(statuses, [200, 403, 401, 401, 401]);
    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert_eq!(log.matches("refused").count(), 4, "{log}");
    assert!(secrets.iter().all(|secret| !log.contains(secret)), "{log}");
}
