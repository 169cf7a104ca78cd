//! TLS to the upstream.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use portcullis_core::Rejection;
use portcullis_forward::{ClientTls, Forward};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::RootCertStore;
use rustls::pki_types::PrivateKeyDer;
use rustls::server::WebPkiClientVerifier;
use tokio::net::TcpListener;
use tower::Service;

use super::within;

struct Authority {
    pem: String,
    der: rustls::pki_types::CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        Self { pem: certificate.pem(), der: certificate.der().clone(), issuer: Issuer::new(params, key) }
    }

    /// A certificate and its key.
    fn signs(&self, name: &str) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        (params.signed_by(&key, &self.issuer).unwrap(), key)
    }
}

/// A server for `name` that offers `protocols`, and says by which version and with how many certificates it was called.
async fn upstream(authority: &Authority, name: &str, protocols: &[&str], asks: bool) -> SocketAddr {
    let (certificate, key) = authority.signs(name);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder =
        rustls::ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions().unwrap();
    let builder = if asks {
        let mut roots = RootCertStore::empty();
        roots.add(authority.der.clone()).unwrap();
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
        builder.with_client_cert_verifier(verifier)
    } else {
        builder.with_no_client_auth()
    };
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let mut config = builder.with_single_cert(vec![certificate.der().clone()], key).unwrap();
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (io, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(io) = acceptor.accept(io).await else { return };
                let (shown, name) = {
                    let session = io.get_ref().1;
                    (session.peer_certificates().map_or(0, <[_]>::len), session.server_name().map(str::to_owned))
                };
                let service = service_fn(move |request: Request<Incoming>| {
                    let text = format!("{:?} {shown} {name:?}", request.version());
                    async move {
                        if request.method() == http::Method::PUT {
                            // So slow that all on the way to it fills up.
                            tokio::time::sleep(std::time::Duration::from_millis(300)).await;
                            let body = request.into_body().collect().await.unwrap().to_bytes();
                            return Ok(Response::new(Full::from(body.len().to_string())));
                        }
                        Ok::<_, Infallible>(Response::new(Full::<Bytes>::from(text)))
                    }
                });
                let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                _ = builder.serve_connection(TokioIo::new(io), service).await;
            });
        }
    });
    address
}

async fn call(forward: &Forward) -> Result<String, (u16, &'static str, bool)> {
    let request = Request::get("/").header("host", "a").body(Empty::<Bytes>::new()).unwrap();
    let response = within(forward.clone().call(request)).await.unwrap();
    if let Some(rejection) = response.extensions().get::<Rejection>() {
        return Err((rejection.status().as_u16(), rejection.reason(), rejection.sent()));
    }
    Ok(String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap())
}

#[tokio::test]
async fn the_protocol_is_what_both_agree_on_and_connections_are_kept() {
    let authority = Authority::new();
    let tls = ClientTls::trusting(authority.pem.as_bytes()).unwrap();
    for (protocols, version) in [(&["h2", "http/1.1"][..], "HTTP/2.0"), (&["http/1.1"], "HTTP/1.1"), (&[], "HTTP/1.1")]
    {
        let address = upstream(&authority, "127.0.0.1", protocols, false).await;
        let forward = Forward::to(&format!("https://{address}")).unwrap().tls(tls.clone());
        for _ in 0..3 {
            assert_eq!(call(&forward).await, Ok(format!("{version} 0 None")));
        }
    }
}

/// TLS takes bytes that the connection has no room for; they must follow.
#[tokio::test]
async fn a_large_request_arrives_whole_at_a_slow_reader() {
    let authority = Authority::new();
    let tls = ClientTls::trusting(authority.pem.as_bytes()).unwrap();
    for protocol in ["http/1.1", "h2"] {
        let address = upstream(&authority, "127.0.0.1", &[protocol], false).await;
        let forward = Forward::to(&format!("https://{address}")).unwrap().tls(tls.clone());
        let body = Full::new(Bytes::from(vec![b'x'; 10_000_000]));
        let request = Request::put("/").header("host", "a").body(body).unwrap();
        let response = within(forward.clone().call(request)).await.unwrap();
        assert_eq!(response.status(), 200, "{protocol}");
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "10000000", "{protocol}");
    }
}

#[tokio::test]
async fn a_name_is_asked_for_and_checked() {
    let authority = Authority::new();
    let tls = ClientTls::trusting(authority.pem.as_bytes()).unwrap();
    let address = upstream(&authority, "shop.test", &[], false).await;
    let to = |tls| Forward::to(&format!("https://{address}")).unwrap().tls(tls);
    assert_eq!(call(&to(tls.clone())).await, Err((502, "tls-failed", false)));
    let named = to(tls.clone().server_name("shop.test").unwrap());
    assert_eq!(call(&named).await, Ok("HTTP/1.1 0 Some(\"shop.test\")".to_owned()));
    assert_eq!(call(&to(tls.server_name("other.test").unwrap())).await, Err((502, "tls-failed", false)));
}

#[tokio::test]
async fn an_authority_nobody_trusts_and_one_who_speaks_no_tls_are_refused() {
    let authority = Authority::new();
    let address = upstream(&authority, "127.0.0.1", &[], false).await;
    let other = ClientTls::trusting(Authority::new().pem.as_bytes()).unwrap();
    let forward = Forward::to(&format!("https://{address}")).unwrap();
    assert_eq!(call(&forward.clone().tls(other)).await, Err((502, "tls-failed", false)));
    assert_eq!(call(&forward).await, Err((502, "tls-failed", false)), "no TLS set up");
    let plain = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let forward = Forward::to(&format!("https://{}", plain.local_addr().unwrap())).unwrap();
    let tls = ClientTls::trusting(authority.pem.as_bytes()).unwrap();
    let forward = forward.tls(tls);
    let (answer, ()) = tokio::join!(call(&forward), async {
        use tokio::io::AsyncWriteExt;
        plain.accept().await.unwrap().0.write_all(b"SSH-2.0-OpenSSH_9.6\r\n").await.unwrap();
    });
    assert_eq!(answer, Err((502, "tls-failed", false)));
    assert!(ClientTls::trusting(b"").is_err());
}

#[tokio::test]
async fn a_client_certificate_is_shown_to_who_asks() {
    let authority = Authority::new();
    let address = upstream(&authority, "127.0.0.1", &["http/1.1"], true).await;
    let forward = Forward::to(&format!("https://{address}")).unwrap();
    let tls = ClientTls::trusting(authority.pem.as_bytes()).unwrap();
    let (certificate, key) = authority.signs("client");
    let shown = tls.clone().client_certificate(certificate.pem().as_bytes(), key.serialize_pem().as_bytes()).unwrap();
    assert_eq!(call(&forward.clone().tls(shown)).await, Ok("HTTP/1.1 1 None".to_owned()));
    assert!(call(&forward.tls(tls)).await.is_err());
}
