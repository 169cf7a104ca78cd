//! Limits shared through a real Redis over TLS, with a password.

#![cfg(feature = "redis-tls")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::num::NonZeroU32;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use portcullis_rate_limit::{OnFailure, Rate, RateLimitLayer, RedisStore};
use portcullis_testing::Redis;
use portcullis_testing::process::{free_port, scratch_folder};
use tower::{Layer, ServiceExt, service_fn};

/// What so many requests got.
async fn statuses(store: RedisStore, count: usize) -> Vec<u16> {
    let store = store.deadline(Duration::from_secs(5)).on_failure(OnFailure::Refuse);
    let answer =
        service_fn(async |_: Request<()>| Ok::<_, std::convert::Infallible>(Response::new(Empty::<Bytes>::new())));
    let service = RateLimitLayer::new(Rate::per_hour(NonZeroU32::new(2).unwrap())).store(store).layer(answer);
    let mut statuses = Vec::new();
    for _ in 0..count {
        statuses.push(service.clone().oneshot(Request::new(())).await.unwrap().status().as_u16());
    }
    statuses
}

#[tokio::test]
async fn a_store_over_tls_proves_who_it_is_and_takes_a_password() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let certify = || rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (own, other) = (certify(), certify());
    let (folder, port) = (scratch_folder("redis-tls"), free_port().to_string());
    let file = |name: &str, text: String| {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        path.into_os_string().into_string().unwrap()
    };
    let (certificate, key) = (file("certificate", own.cert.pem()), file("key", own.signing_key.serialize_pem()));
    let _redis = Redis::start_with(&[
        "--tls-port",
        &port,
        "--tls-cert-file",
        &certificate,
        "--tls-key-file",
        &key,
        "--tls-ca-cert-file",
        &certificate,
        "--tls-auth-clients",
        "no",
        "--requirepass",
        "open-sesame",
    ])
    .await;
    let url = format!("rediss://:open-sesame@localhost:{port}");
    let trusting = |url: &str, pem: String| RedisStore::trusting(url, pem.as_bytes()).unwrap();

    assert_eq!(statuses(trusting(&url, own.cert.pem()), 3).await, [200, 200, 429]);
    assert_eq!(statuses(trusting(&url, other.cert.pem()), 1).await, [503], "signed by nobody it trusts");
    assert_eq!(statuses(RedisStore::new(&url).unwrap(), 1).await, [503], "nor by anybody the system trusts");
    let wrong = format!("rediss://:open-barley@localhost:{port}");
    assert_eq!(statuses(trusting(&wrong, own.cert.pem()), 1).await, [503], "the wrong password");
    let plain = format!("redis://:open-sesame@localhost:{port}");
    assert_eq!(statuses(RedisStore::new(&plain).unwrap(), 1).await, [503], "not without TLS");
    assert!(RedisStore::trusting(&url, b"no certificate").unwrap_err().is_authorities());
    std::fs::remove_dir_all(folder).unwrap();
}
