//! Who is calling, and what listeners show and ask of them, as the file says.
#![expect(clippy::expect_used, reason = "what helps the tests fails with them")]

mod common;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use portcullis_testing::Backend;
use portcullis_testing::process::scratch_folder;
use portcullis_testing::token::hs256;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::json;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto};

use common::{ALL, Program, file};

const SECRET: &str = "a secret that is long enough for HS256, by far";

#[tokio::test]
async fn whoever_one_provider_accepts_is_accepted_and_services_are_told_who_it_is() {
    let backend = Backend::start("one").await;
    let more = format!(
        r#"
        auth.headers = {{ subject = "x-subject", scopes = "x-scopes", roles = "x-roles", claims = {{ x-tenant = "/tenant" }} }}
        auth.providers.tokens = {{ secret = "{SECRET}", issuer = "i", audiences = ["x"] }}
        auth.providers.keys.api_keys = [{{ key = "a key that nobody guesses", subject = "partner", scopes = ["read"] }}]
        auth.providers.people.users = [{{ name = "ada", password = {{ file = "password" }}, roles = ["staff"] }}]
        {ALL}
        [[routes]]
        path = "/staff"
        to = "a"
        auth = {{ roles = ["staff"], providers = ["people", "tokens"] }}
        "#
    );
    let folder = scratch_folder("callers");
    std::fs::write(folder.join("password"), "a long password\n").expect("a folder to write in");
    let program = Program::start_in(folder, &file(&[("a", &[backend.address()])], &more));
    let basic = |text: &str| format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(text));
    let (ada, eve) = (basic("ada:a long password"), basic("ada:a wrong password"));
    let claims = json!({ "iss": "i", "aud": "x", "sub": "bob", "exp": 4_000_000_000_u64, "tenant": "acme" });
    let token = format!("Bearer {}", hs256(SECRET.as_bytes(), &claims));

    for (header, value, subject) in [
        ("x-api-key", "a key that nobody guesses", "partner"),
        ("authorization", &ada, "ada"),
        ("authorization", &token, "bob"),
    ] {
        let answer = program.with(&[(header, value), ("x-subject", "somebody else"), ("x-roles", "king")]).await;
        assert_eq!(answer.status, 200, "{subject}");
        let seen = answer.json()["headers"].to_string();
        assert!(seen.contains(subject) && !seen.contains("somebody else") && !seen.contains("king"), "{seen}");
        assert!(!seen.contains(value), "credentials go no further: {seen}");
        assert_eq!(seen.contains("acme"), subject == "bob", "{seen}");
    }
    for (header, value) in [("x-api-key", "a key that somebody guesses"), ("authorization", &eve), ("x-nothing", "x")] {
        assert_eq!(program.with(&[(header, value)]).await.status, 401, "{header} {value}");
    }
    let staff = async |header: &str, value: &str| {
        let answer = portcullis_testing::client::get(program.gateway, "/staff", &[(header, value)]).await;
        answer.expect("an answer").status.as_u16()
    };
    assert_eq!(staff("authorization", &ada).await, 200);
    assert_eq!(staff("authorization", &token).await, 403, "known, and without the role");
    assert_eq!(staff("x-api-key", "a key that nobody guesses").await, 401, "not believed here");
    let config = program.ask("/config").await.text();
    assert!(!config.contains("nobody guesses") && !config.contains("a long password"), "{config}");
}

/// Somebody whose certificates are believed.
struct Authority {
    pem: String,
    der: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key.
struct Pair(rcgen::Certificate, KeyPair);

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).expect("a certificate");
        Self { pem: certificate.pem(), der: certificate.der().clone(), issuer: Issuer::new(params, key) }
    }

    fn signs(&self, name: &str) -> Pair {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        Pair(params.signed_by(&key, &self.issuer).expect("a certificate"), key)
    }
}

impl Pair {
    /// Writes both, the key first: whoever watches then sees a pair that fits, or none.
    fn write(&self, folder: &Path) {
        std::fs::write(folder.join("key.pem"), self.1.serialize_pem()).expect("a folder to write in");
        std::fs::write(folder.join("cert.pem"), self.0.pem()).expect("a folder to write in");
    }

    /// As `openssl x509 -fingerprint -sha256` prints it.
    fn fingerprint(&self) -> String {
        let digest = crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256
            .tls13()
            .expect("TLS 1.3")
            .common
            .hash_provider
            .hash(self.0.der());
        digest.as_ref().iter().map(|byte| format!("{byte:02X}")).collect::<Vec<_>>().join(":")
    }
}

/// A connection to whoever `authority` vouches for, showing `own`.
async fn connect(
    to: SocketAddr,
    authority: &Authority,
    own: Option<&Pair>,
) -> Result<SendRequest<String>, Box<dyn std::error::Error>> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.der.clone())?;
    let builder = ClientConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    let config = match own {
        Some(Pair(certificate, key)) => {
            let key = PrivateKeyDer::try_from(key.serialize_der())?;
            builder.with_client_auth_cert(vec![certificate.der().clone()], key)?
        }
        None => builder.with_no_client_auth(),
    };
    let stream = TlsConnector::from(Arc::new(config)).connect("localhost".try_into()?, TcpStream::connect(to).await?);
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream.await?)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

async fn status(sender: &mut SendRequest<String>) -> Result<u16, hyper::Error> {
    sender.ready().await?;
    let request = http::Request::get("/").header("host", "localhost").body(String::new()).expect("a request");
    Ok(sender.send_request(request).await?.status().as_u16())
}

fn encrypted(backend: &Backend, tls: &str, more: &str) -> String {
    file(&[("a", &[backend.address()])], &format!("{more}{ALL}")).replace(
        "{ address = \"127.0.0.1:0\" }\nserver",
        &format!("{{ address = \"127.0.0.1:0\", tls = {{ {tls} }} }}\nserver"),
    )
}

const PAIR: &str = "certificate = \"cert.pem\", key = \"key.pem\"";

#[tokio::test]
async fn client_certificates_are_asked_for_and_known_by_their_fingerprint() {
    let (backend, authority, folder) = (Backend::start("one").await, Authority::new(), scratch_folder("clients"));
    authority.signs("localhost").write(&folder);
    std::fs::write(folder.join("clients.pem"), &authority.pem).expect("a folder to write in");
    let (known, unknown, foreign) =
        (authority.signs("batch"), authority.signs("other"), Authority::new().signs("batch"));
    let machines = format!(
        "auth.providers.machines.certificates = [{{ fingerprint = \"{}\", subject = \"batch\" }}]\n",
        known.fingerprint()
    );
    let text = encrypted(&backend, &format!("{PAIR}, client_ca = \"clients.pem\""), &machines);
    let program = Program::start_in(folder, &text);
    let ask = async |own| status(&mut connect(program.gateway, &authority, own).await.expect("TLS")).await.ok();
    assert_eq!(ask(Some(&known)).await, Some(200));
    assert_eq!(ask(Some(&unknown)).await, Some(401));
    assert_eq!(ask(None).await, Some(401));
    assert_eq!(ask(Some(&foreign)).await, None, "nobody vouches for it");
    // From now on none gets in without.
    program.write(&text.replace("client_ca =", "require_client = true, client_ca ="));
    assert_eq!(program.order("/reload", &json!(null)).await.text(), "the file is in force\n");
    assert_eq!(ask(None).await, None);
    assert_eq!(ask(Some(&known)).await, Some(200));
}

#[tokio::test]
async fn certificates_are_renewed_with_the_file_while_connections_go_on() {
    let (backend, folder) = (Backend::start("one").await, scratch_folder("renewed"));
    let (before, after) = (Authority::new(), Authority::new());
    before.signs("localhost").write(&folder);
    let program = Program::start_in(folder.clone(), &encrypted(&backend, PAIR, ""));
    let mut old = connect(program.gateway, &before, None).await.expect("TLS");
    assert_eq!(status(&mut old).await.expect("an answer"), 200);

    let next = after.signs("localhost");
    std::fs::write(folder.join("cert.pem"), next.0.pem()).expect("a folder to write in");
    let refused = program.order("/reload", &json!(null)).await;
    assert_eq!(refused.status, 422);
    assert!(refused.text().contains("the certificate and its key do not fit"), "{}", refused.text());
    assert!(connect(program.gateway, &before, None).await.is_ok(), "it shows what it showed");

    next.write(&folder);
    assert_eq!(program.order("/reload", &json!(null)).await.text(), "the file is in force\n");
    assert_eq!(status(&mut old).await.expect("the connection goes on"), 200);
    assert!(connect(program.gateway, &before, None).await.is_err());
    assert_eq!(status(&mut connect(program.gateway, &after, None).await.expect("TLS")).await.expect("an answer"), 200);
}

#[tokio::test]
async fn a_certificate_that_changes_is_noticed_where_the_file_is_watched() {
    let (backend, folder) = (Backend::start("one").await, scratch_folder("watched"));
    let (before, after) = (Authority::new(), Authority::new());
    before.signs("localhost").write(&folder);
    let text = encrypted(&backend, PAIR, "").replace("threads = 2", "threads = 2, watch = true");
    let program = Program::start_in(folder.clone(), &text);
    after.signs("localhost").write(&folder);
    for _ in 0..500 {
        if connect(program.gateway, &after, None).await.is_ok() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("not noticed: {}", common::log(&program.folder));
}
