//! Where keys may come from: discovery, certificates, files, and what is no place at all.

use std::sync::{Arc, PoisonError};

use portcullis_auth::{Algorithm, KeySource};
use serde_json::json;
use tokio::net::TcpListener;

use crate::server::{Callers, Mode, Provider, keys, pass, source, stand_still};
use crate::support::{NOW, Signer};

#[tokio::test(start_paused = true)]
async fn discovery_is_exact_about_the_issuer_and_its_hosts() {
    let _still = stand_still();
    let signer = Signer::new(Algorithm::ES256);
    let provider = Provider::start(Mode::Keys(keys(&[(&signer, "1")]))).await;
    let issuer = format!("http://{}", provider.address);
    let start = |issuer: &str| Callers::new(KeySource::issuer(issuer).insecure_http().start().unwrap());
    let document = |issuer: &str, keys: &str| {
        *provider.discovery.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(json!({"issuer": issuer, "jwks_uri": keys}));
    };
    document(&issuer, &provider.url());
    assert!(start(&issuer).call(&signer, "1").await.is_ok());
    let asked = provider.asked();
    for (named, keys) in [
        (format!("{issuer}/"), provider.url()),
        ("https://evil.example".into(), provider.url()),
        (issuer.clone(), format!("http://localhost:{}/keys", provider.address.port())),
        (issuer.clone(), "file:///etc/passwd".into()),
        (issuer.clone(), "http://user@127.0.0.1/keys".into()),
        (issuer.clone(), String::new()),
    ] {
        document(&named, &keys);
        let callers = start(&issuer);
        callers.tried(1).await;
        assert_eq!(callers.keys.freshness().unwrap().failures, 1, "{named} {keys}");
        assert!(callers.keys.is_empty());
    }
    assert_eq!(provider.asked(), asked, "no keys were read");
    document(&issuer, &format!("http://localhost:{}/keys", provider.address.port()));
    let allowed = KeySource::issuer(&issuer).insecure_http().allow_host("localhost").start().unwrap();
    assert!(Callers::new(allowed).call(&signer, "1").await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn secrets_that_are_published_are_no_secrets() {
    let _still = stand_still();
    let (secret, public) = (Signer::new(Algorithm::HS256), Signer::new(Algorithm::ES256));
    let provider = Provider::start(Mode::Keys(keys(&[(&secret, "1"), (&public, "2")]))).await;
    let callers = Callers::new(source(&provider).start().unwrap());
    assert!(callers.call(&public, "2").await.is_ok());
    assert!(callers.call(&secret, "1").await.is_err());
    provider.set(Mode::Keys(keys(&[(&secret, "1")])));
    let callers = Callers::new(source(&provider).start().unwrap());
    callers.tried(1).await;
    assert!(callers.keys.is_empty());
}

#[tokio::test(start_paused = true)]
async fn only_a_certificate_of_the_given_roots_is_believed() {
    let _still = stand_still();
    let signer = Signer::new(Algorithm::ES256);
    let authority_key = rcgen::KeyPair::generate().unwrap();
    let mut authority = rcgen::CertificateParams::new(vec![]).unwrap();
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority_certificate = authority.self_signed(&authority_key).unwrap();
    let authority = rcgen::Issuer::new(authority, &authority_key);
    let serve = async |name: &str, expired: bool| {
        let provider = Provider::start(Mode::Keys(keys(&[(&signer, "1")]))).await;
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        if expired {
            params.not_after = rcgen::date_time_ymd(2001, 1, 1);
        }
        let certificate = params.signed_by(&key, &authority).unwrap();
        let provider_crypto = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider_crypto)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (acceptor, provider) = (acceptor.clone(), provider.clone());
                tokio::spawn(async move {
                    if let Ok(stream) = acceptor.accept(stream).await {
                        provider.serve(stream).await;
                    }
                });
            }
        });
        format!("https://localhost:{port}/keys")
    };
    let read = async |url: String, roots: &str| {
        let callers = Callers::new(KeySource::url(url).roots(roots).unwrap().start().unwrap());
        callers.tried(1).await;
        callers.keys.len()
    };
    let ours = authority_certificate.pem();
    let other_key = rcgen::KeyPair::generate().unwrap();
    let other = rcgen::CertificateParams::new(vec![]).unwrap().self_signed(&other_key).unwrap().pem();
    assert_eq!(read(serve("localhost", false).await, &ours).await, 1);
    assert_eq!(read(serve("localhost", false).await, &other).await, 0, "another root");
    assert_eq!(read(serve("elsewhere", false).await, &ours).await, 0, "another name");
    assert_eq!(read(serve("localhost", true).await, &ours).await, 0, "expired");
    assert!(KeySource::url("https://a/").roots("no PEM").unwrap_err().is_setting());
}

#[tokio::test(start_paused = true)]
async fn a_file_is_read_again_and_its_last_good_content_kept() {
    let _still = stand_still();
    let (old, new) = (Signer::new(Algorithm::HS256), Signer::new(Algorithm::HS256));
    let folder = tempfile();
    let path = folder.join("keys.json");
    std::fs::write(&path, keys(&[(&old, "1")]).to_string()).unwrap();
    let callers = Callers::new(KeySource::file(&path).start().unwrap());
    assert!(callers.call(&old, "1").await.is_ok(), "read at once");
    callers.tried(1).await;
    for (tried, broken) in [(2, "{"), (3, ""), (4, "{\"keys\":[{\"kty\":\"RSA\"}]}")] {
        std::fs::write(&path, broken).unwrap();
        pass(30).await;
        callers.tried(tried).await;
        assert!(callers.call(&old, "1").await.is_ok());
    }
    std::fs::write(&path, "{\"keys\":[]}").unwrap();
    assert!(KeySource::file(&path).start().unwrap_err().is_key_set(), "nobody means to begin with none");
    pass(30).await;
    callers.tried(5).await;
    assert!(callers.keys.is_empty() && callers.call(&old, "1").await.is_err(), "which asks once more");
    std::fs::write(&path, keys(&[(&new, "1")]).to_string()).unwrap();
    pass(30).await;
    callers.tried(7).await;
    assert!(callers.call(&new, "1").await.is_ok());
    assert!(callers.call(&old, "1").await.is_err());
    std::fs::remove_dir_all(&folder).unwrap();
    assert!(KeySource::file(&path).start().unwrap_err().is_io());
}

/// Put together, nobody would keep them fresh.
#[tokio::test(start_paused = true)]
async fn keys_that_are_kept_fresh_are_not_put_together_with_others() {
    let (one, other) = (Signer::new(Algorithm::ES256), Signer::new(Algorithm::ES256));
    let provider = Provider::start(Mode::Keys(keys(&[(&one, "1")]))).await;
    let fresh = source(&provider).start().unwrap();
    assert!(fresh.clone().with(&other.key_set("2")).unwrap_err().is_setting());
    assert!(other.key_set("2").with(&fresh).unwrap_err().is_setting());
    assert_eq!(one.key_set("1").with(&other.key_set("2")).unwrap().len(), 2);
    assert!(one.key_set("1").with(&one.key_set("1")).unwrap_err().is_key_set());
}

fn tempfile() -> std::path::PathBuf {
    let folder = std::env::temp_dir().join(format!("portcullis-auth-{}-{NOW}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

#[test]
fn wrong_places_are_refused_at_once() {
    assert!(KeySource::url("https://id.example/keys").start().unwrap_err().is_setting(), "no runtime");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _inside = runtime.enter();
    for url in ["http://id.example/keys", "id.example", "ftp://id.example/", "https://"] {
        assert!(KeySource::url(url).start().unwrap_err().is_setting(), "{url}");
        assert!(KeySource::issuer(url).start().unwrap_err().is_setting(), "{url}");
    }
}
