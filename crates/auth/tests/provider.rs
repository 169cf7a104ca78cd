//! Keys that come from elsewhere: a provider that rotates, fails in every way, and dies, while requests flow.
//!
//! Sockets are real and time stands still unless a test moves it: a blocking task keeps the paused clock from running
//! ahead while nothing but a socket is waited for.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]
#![cfg(feature = "fetch")]

mod support;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use portcullis_auth::{Algorithm, Attempt, Authenticate, Denied, Head, Jwt, KeySet, KeySource};
use portcullis_core::Identity;
use serde_json::{Value, json};
use support::{NOW, Signer, request, wall};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::watch;

#[derive(Clone)]
enum Mode {
    Keys(Value),
    /// As they are, with this `Cache-Control`.
    KeysFor(Value, &'static str),
    Status(u16),
    Html,
    Huge,
    Redirect(String),
    Hang,
    CutOff,
    Hangup,
}

/// A provider whose every answer the test decides.
#[derive(Clone)]
struct Provider {
    mode: Arc<Mutex<Mode>>,
    asked: watch::Sender<usize>,
    address: std::net::SocketAddr,
    discovery: Arc<Mutex<Option<Value>>>,
}

impl Provider {
    async fn start(mode: Mode) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let provider = Self {
            mode: Arc::new(Mutex::new(mode)),
            asked: watch::Sender::new(0),
            address: listener.local_addr().unwrap(),
            discovery: Arc::default(),
        };
        let server = provider.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(server.clone().serve(stream));
            }
        });
        provider
    }

    async fn serve<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(self, mut stream: S) {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            match stream.read_u8().await {
                Ok(byte) => head.push(byte),
                Err(_) => return,
            }
        }
        let head = String::from_utf8(head).unwrap();
        let lock = || self.mode.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let discovery = self.discovery.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let ok = |body: String, more: &str| {
            format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n{more}\r\n{body}", body.len()).into_bytes()
        };
        if head.starts_with("GET /.well-known/openid-configuration ")
            && let Some(document) = discovery
        {
            stream.write_all(&ok(document.to_string(), "")).await.unwrap();
            return;
        }
        assert!(head.starts_with("GET /keys HTTP/1.1\r\n"), "{head}");
        let answer = match lock() {
            Mode::Keys(keys) => ok(keys.to_string(), ""),
            Mode::KeysFor(keys, control) => ok(keys.to_string(), &format!("cache-control: {control}\r\n")),
            Mode::Status(status) => format!("HTTP/1.1 {status} No\r\ncontent-length: 0\r\n\r\n").into_bytes(),
            Mode::Html => ok("<html>not found, but 200</html>".into(), ""),
            Mode::Huge => ok(" ".repeat(10 << 20), ""),
            Mode::Redirect(to) => {
                format!("HTTP/1.1 302 Found\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n").into_bytes()
            }
            Mode::CutOff => b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{\"keys\":".to_vec(),
            Mode::Hangup => Vec::new(),
            Mode::Hang => {
                self.asked.send_modify(|count| *count += 1);
                std::future::pending().await
            }
        };
        self.asked.send_modify(|count| *count += 1);
        let _ = stream.write_all(&answer).await;
    }

    fn set(&self, mode: Mode) {
        *self.mode.lock().unwrap_or_else(PoisonError::into_inner) = mode;
    }

    fn url(&self) -> String {
        format!("http://{}/keys", self.address)
    }

    fn asked(&self) -> usize {
        *self.asked.borrow()
    }
}

/// Keeps the clock from moving by itself as long as it lives.
struct StandStill {
    _until_dropped: std::sync::mpsc::Sender<()>,
}

fn stand_still() -> StandStill {
    let (sender, receiver) = std::sync::mpsc::channel::<()>();
    tokio::task::spawn_blocking(move || receiver.recv());
    StandStill { _until_dropped: sender }
}

/// The tests' view of the whole: tokens, of which none is remembered, and what became of them.
struct Callers {
    jwt: Jwt,
    keys: KeySet,
}

impl Callers {
    fn new(keys: KeySet) -> Self {
        let jwt = Jwt::new(keys.clone()).wall_clock(wall()).cache_bytes(0);
        Self { jwt, keys }
    }

    async fn call(&self, signer: &Signer, kid: &str) -> Result<Identity, Denied> {
        let token = signer.sign_with(&json!({"alg": signer.algorithm.as_str(), "kid": kid}), &support::claims());
        match self.jwt.authenticate(&Head::of(&request(&format!("Bearer {token}")))) {
            Attempt::Now(result) => result,
            Attempt::Later(later) => later.await,
        }
    }

    /// Waits until the source was tried so often.
    async fn tried(&self, times: u64) {
        while self.keys.freshness().unwrap().fetches < times {
            tokio::task::yield_now().await;
        }
    }
}

fn keys(signers: &[(&Signer, &str)]) -> Value {
    json!({"keys": signers.iter().map(|(signer, kid)| signer.jwk(kid)).collect::<Vec<_>>()})
}

fn source(provider: &Provider) -> KeySource {
    KeySource::url(provider.url()).insecure_http()
}

async fn pass(seconds: u64) {
    tokio::time::advance(Duration::from_secs(seconds)).await;
}

#[tokio::test(start_paused = true)]
async fn the_first_requests_wait_for_the_first_keys() {
    let _still = stand_still();
    let signer = Signer::new(Algorithm::ES256);
    let provider = Provider::start(Mode::Keys(keys(&[(&signer, "1")]))).await;
    let callers = Callers::new(source(&provider).start().unwrap());
    let (a, b) = tokio::join!(callers.call(&signer, "1"), callers.call(&signer, "1"));
    assert!(a.is_ok() && b.is_ok());
    assert_eq!(provider.asked(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_rotation_is_seen_with_the_first_token_it_signed() {
    let _still = stand_still();
    let (old, new) = (Signer::new(Algorithm::ES256), Signer::new(Algorithm::EdDSA));
    let provider = Provider::start(Mode::Keys(keys(&[(&old, "1")]))).await;
    let source = source(&provider).start().unwrap();
    let callers = Callers::new(source.clone());
    let remembering = Jwt::new(source).wall_clock(wall());
    assert!(callers.call(&old, "1").await.is_ok());
    assert!(
        support::ask(&remembering, &old.sign_with(&json!({"alg": "ES256", "kid": "1"}), &support::claims())).is_ok()
    );

    provider.set(Mode::Keys(keys(&[(&old, "1"), (&new, "2")])));
    assert!(callers.call(&new, "2").await.is_ok(), "the new key is fetched for the first who shows it");
    assert!(callers.call(&old, "1").await.is_ok(), "and the old one still there");
    assert_eq!(provider.asked(), 2);

    let token = old.sign_with(&json!({"alg": "ES256", "kid": "1"}), &support::claims());
    assert!(support::ask(&remembering, &token).is_ok());
    assert!(support::ask(&remembering, &token).is_ok(), "from memory");
    provider.set(Mode::Keys(keys(&[(&new, "2")])));
    pass(300).await;
    callers.tried(3).await;
    let after = match remembering.authenticate(&Head::of(&request(&format!("Bearer {token}")))) {
        Attempt::Now(result) => result,
        Attempt::Later(later) => later.await,
    };
    assert_eq!(after, Err(Denied::invalid("the token is signed with an unknown key")));
}

#[tokio::test(start_paused = true)]
async fn a_rotation_is_seen_although_a_fetch_that_began_before_it_is_under_way() {
    let _still = stand_still();
    let (old, new) = (Signer::new(Algorithm::ES256), Signer::new(Algorithm::ES256));
    let provider = Provider::start(Mode::Keys(keys(&[(&old, "1")]))).await;
    let callers = Callers::new(source(&provider).start().unwrap());
    callers.tried(1).await;
    // The regular fetch hangs, the provider rotates, and the first token of the new key comes in.
    provider.set(Mode::Hang);
    pass(300).await;
    provider.asked.subscribe().wait_for(|count| *count == 2).await.unwrap();
    provider.set(Mode::Keys(keys(&[(&new, "2")])));
    tokio::time::advance(Duration::from_millis(4500)).await;
    let end_of_the_hanging_one = async {
        tokio::task::yield_now().await;
        tokio::time::advance(Duration::from_millis(500)).await;
    };
    let (result, ()) = tokio::join!(callers.call(&new, "2"), end_of_the_hanging_one);
    assert!(result.is_ok(), "{result:?}");
    assert_eq!(provider.asked(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_unknown_keys_asks_once_per_cooldown() {
    let _still = stand_still();
    let signer = Signer::new(Algorithm::ES256);
    let provider = Provider::start(Mode::Keys(keys(&[(&signer, "1")]))).await;
    let callers = Callers::new(source(&provider).start().unwrap());
    assert!(callers.call(&signer, "1").await.is_ok());
    let mut refused = 0;
    for minute in 0..4_usize {
        for n in 0..250 {
            refused += usize::from(callers.call(&signer, &format!("{minute}-{n}")).await.is_err());
            assert!(callers.call(&signer, "1").await.is_ok());
        }
        assert_eq!(provider.asked(), 2 + minute, "one for the start, one for each cooldown");
        pass(30).await;
    }
    assert_eq!(refused, 1000);
    // What was not found is not asked for again although the cooldown is over.
    let before = provider.asked();
    assert!(callers.call(&signer, "3-0").await.is_err());
    assert_eq!(provider.asked(), before);
}

#[tokio::test(start_paused = true)]
async fn nobody_is_refused_while_the_provider_fails_in_every_way() {
    let _still = stand_still();
    let (signer, evil) = (Signer::new(Algorithm::RS256), Signer::new(Algorithm::RS256));
    let sound = Mode::Keys(keys(&[(&signer, "1")]));
    let other = Provider::start(Mode::Keys(keys(&[(&evil, "1")]))).await;
    let provider = Provider::start(sound.clone()).await;
    let callers = Callers::new(source(&provider).start().unwrap());
    assert!(callers.call(&signer, "1").await.is_ok());
    let (mut served, mut refused, mut tried) = (0, 0, 1);
    let failures = [
        Mode::Status(500),
        Mode::Status(404),
        Mode::Html,
        Mode::Huge,
        Mode::Redirect(other.url()),
        Mode::CutOff,
        Mode::Hangup,
        Mode::Hang,
        Mode::Keys(json!({"keys": []})),
        Mode::Keys(json!({"keys": [{"kty": "RSA"}]})),
        Mode::Keys(json!({"error": "x"})),
    ];
    for failure in failures {
        let hangs = matches!(failure, Mode::Hang);
        provider.set(failure);
        for _ in 0..3 {
            pass(300).await;
            tried += 1;
            if hangs {
                let mut asked = provider.asked.subscribe();
                let before = *asked.borrow_and_update();
                asked.wait_for(|count| *count > before).await.ok();
                pass(5).await;
            }
            callers.tried(tried).await;
            for _ in 0..10 {
                match callers.call(&signer, "1").await {
                    Ok(_) => served += 1,
                    Err(_) => refused += 1,
                }
            }
            assert!(callers.call(&evil, "1").await.is_err());
        }
        provider.set(sound.clone());
        pass(60).await;
        tried += 1;
        callers.tried(tried).await;
        assert!(callers.call(&signer, "1").await.is_ok());
    }
    assert_eq!((served, refused), (330, 0));
    assert_eq!(other.asked(), 0, "redirects are not followed");
    let freshness = callers.keys.freshness().unwrap();
    assert_eq!((freshness.fetches, freshness.failures), (1 + 4 * 11, 3 * 11));
    eprintln!("served {served}, wrongly refused {refused}, provider asked {} times", provider.asked());
}

#[tokio::test(start_paused = true)]
async fn a_request_waits_a_second_at_most_and_is_not_told_its_key_is_unknown() {
    let _still = stand_still();
    let (signer, new) = (Signer::new(Algorithm::ES256), Signer::new(Algorithm::ES256));
    let provider = Provider::start(Mode::Keys(keys(&[(&signer, "1")]))).await;
    let callers = Callers::new(source(&provider).start().unwrap());
    assert!(callers.call(&signer, "1").await.is_ok());
    provider.set(Mode::Hang);
    let started = tokio::time::Instant::now();
    let call = callers.call(&new, "2");
    let advance = async {
        provider.asked.subscribe().wait_for(|count| *count == 2).await.unwrap();
        pass(1).await;
    };
    let (result, ()) = tokio::join!(call, advance);
    assert!(result.is_err());
    assert_eq!(started.elapsed(), Duration::from_secs(1));
    pass(5).await;
    callers.tried(2).await;
    assert_eq!(callers.call(&new, "2").await, Err(Denied::unavailable("the issuer's keys are not available")));
    assert!(callers.call(&signer, "1").await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn keys_are_used_up_to_their_age_and_no_longer() {
    let _still = stand_still();
    let signer = Signer::new(Algorithm::ES256);
    let provider = Provider::start(Mode::Keys(keys(&[(&signer, "1")]))).await;
    let callers = Callers::new(source(&provider).max_stale(Duration::from_secs(3600)).start().unwrap());
    assert!(callers.call(&signer, "1").await.is_ok());
    provider.set(Mode::Status(503));
    let mut tried = 1;
    for _ in 0..11 {
        pass(300).await;
        tried += 1;
        callers.tried(tried).await;
        assert!(callers.call(&signer, "1").await.is_ok(), "{:?}", callers.keys.freshness());
    }
    pass(400).await;
    callers.tried(tried + 1).await;
    let unavailable = Err(Denied::unavailable("the issuer's keys are not available"));
    assert_eq!(callers.call(&signer, "1").await, unavailable);
    assert!(callers.keys.is_empty());
    provider.set(Mode::Keys(keys(&[(&signer, "1")])));
    pass(60).await;
    callers.tried(callers.keys.freshness().unwrap().fetches + 1).await;
    assert!(callers.call(&signer, "1").await.is_ok(), "and again once there are some");
}

#[tokio::test(start_paused = true)]
async fn the_providers_word_on_time_is_heard_within_bounds() {
    let _still = stand_still();
    let signer = Signer::new(Algorithm::ES256);
    for (control, early, late) in [
        ("max-age=600", 470, 540),
        ("max-age=1", 29, 30),
        ("no-store", 29, 30),
        ("max-age=999999", 2870, 3240),
        ("private", 239, 270),
    ] {
        let provider = Provider::start(Mode::KeysFor(keys(&[(&signer, "1")]), control)).await;
        let callers = Callers::new(source(&provider).start().unwrap());
        callers.tried(1).await;
        pass(early).await;
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(provider.asked(), 1, "{control}: too early");
        pass(late - early + 1).await;
        callers.tried(2).await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_task_ends_with_the_last_handle() {
    let _still = stand_still();
    let signer = Signer::new(Algorithm::ES256);
    let provider = Provider::start(Mode::Keys(keys(&[(&signer, "1")]))).await;
    let metrics = tokio::runtime::Handle::current().metrics();
    let before = metrics.num_alive_tasks();
    let callers = Callers::new(source(&provider).start().unwrap());
    callers.tried(1).await;
    let clone = callers.keys.clone();
    drop(callers);
    tokio::task::yield_now().await;
    assert_eq!(metrics.num_alive_tasks(), before + 1, "a clone keeps it");
    drop(clone);
    while metrics.num_alive_tasks() > before {
        tokio::task::yield_now().await;
    }
}

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
    for (tried, broken) in [(2, "{"), (3, ""), (4, "{\"keys\":[]}")] {
        std::fs::write(&path, broken).unwrap();
        pass(30).await;
        callers.tried(tried).await;
        assert!(callers.call(&old, "1").await.is_ok());
    }
    std::fs::write(&path, keys(&[(&new, "1")]).to_string()).unwrap();
    pass(30).await;
    callers.tried(5).await;
    assert!(callers.call(&new, "1").await.is_ok());
    assert!(callers.call(&old, "1").await.is_err());
    std::fs::remove_dir_all(&folder).unwrap();
    assert!(KeySource::file(&path).start().unwrap_err().is_io());
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
