//! The client that reads keys from a provider: one request, one answer, everything bounded.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::error::{Error, Kind};
use crate::json;
use crate::key_source::MAX_DOCUMENT_BYTES;

/// How long a fetch may take, from looking up the name to the last byte.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);

/// How long one address of several may take to answer, so that a dead one does not hide the next.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Clone, Default)]
pub(crate) struct Client {
    pub(crate) hosts: Vec<String>,
    pub(crate) insecure_http: bool,
    roots: Option<Arc<RootCertStore>>,
    /// Made at the first use, as reading the system's roots takes a while.
    tls: Arc<std::sync::OnceLock<Arc<ClientConfig>>>,
}

/// Where a request goes.
pub(crate) struct Target {
    uri: Uri,
    host: String,
    port: u16,
    tls: bool,
}

fn io(what: &str) -> Error {
    Error::new(Kind::Io, what)
}

// === impl Client ===

impl Client {
    pub(crate) fn roots(&mut self, pem: &[u8]) -> Result<(), Error> {
        let wrong = || Error::new(Kind::Setting, "no certificates in PEM");
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(pem) {
            roots.add(certificate.map_err(|_| wrong())?).map_err(|_| wrong())?;
        }
        if roots.is_empty() {
            return Err(wrong());
        }
        self.roots = Some(Arc::new(roots));
        self.tls = Arc::default();
        Ok(())
    }

    /// Takes a URL apart, if it is one that may be fetched.
    pub(crate) fn target(&self, url: &str) -> Result<Target, Error> {
        // Before an @ may stand a password.
        let shown = url.rsplit_once('@').map_or(url, |(_, rest)| rest);
        let wrong = |what: &str| Error::new(Kind::Setting, format!("{what}: {shown}"));
        let uri: Uri = url.parse().map_err(|_| wrong("not a URL"))?;
        let tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") if self.insecure_http => false,
            Some("http") => return Err(wrong("keys are read over https only")),
            _ => return Err(wrong("not an https URL")),
        };
        let authority = uri.authority().ok_or_else(|| wrong("a URL without a host"))?;
        if authority.as_str().contains('@') {
            return Err(wrong("a URL with a user in it"));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        if host.is_empty() {
            return Err(wrong("a URL without a host"));
        }
        let port = authority.port_u16().unwrap_or(if tls { 443 } else { 80 });
        Ok(Target { uri, host, port, tls })
    }

    /// The keys of an issuer, by way of its discovery document.
    pub(crate) async fn discover(&self, issuer: &str) -> Result<(Vec<u8>, Option<Duration>), Error> {
        let issuers_host = self.target(issuer)?.host;
        let url = format!("{}/.well-known/openid-configuration", issuer.trim_end_matches('/'));
        let (document, _) = self.get(&url).await?;
        let document = json::object(&document).ok_or_else(|| io("the discovery document is no JSON object"))?;
        let text = |name: &str| document.get(name).and_then(|value| value.as_str());
        if text("issuer") != Some(issuer) {
            return Err(io("the discovery document is another issuer's"));
        }
        let keys = text("jwks_uri").ok_or_else(|| io("the discovery document names no keys"))?;
        let target = self.target(keys)?;
        let allowed = |host: &String| host.eq_ignore_ascii_case(&target.host);
        if !allowed(&issuers_host) && !self.hosts.iter().any(allowed) {
            return Err(io("the discovery document names keys on a host that is not allowed"));
        }
        self.get(keys).await
    }

    /// The document at `url`, and how long it is good for.
    pub(crate) async fn get(&self, url: &str) -> Result<(Vec<u8>, Option<Duration>), Error> {
        let target = self.target(url)?;
        tokio::time::timeout(FETCH_TIMEOUT, self.exchange(&target))
            .await
            .map_err(|_| io("the provider took too long"))?
    }

    async fn exchange(&self, target: &Target) -> Result<(Vec<u8>, Option<Duration>), Error> {
        let unreachable = |error| io("the provider cannot be reached").with_source(error);
        let addresses = tokio::net::lookup_host((&*target.host, target.port)).await.map_err(unreachable)?;
        let stream = connect(addresses).await.map_err(unreachable)?;
        if !target.tls {
            return request(TokioIo::new(stream), target).await;
        }
        let name = ServerName::try_from(target.host.clone()).map_err(|_| io("not a name for a certificate"))?;
        let stream = TlsConnector::from(self.config()?).connect(name, stream).await;
        let stream = stream.map_err(|error| io("the provider's certificate is not believed").with_source(error))?;
        request(TokioIo::new(stream), target).await
    }

    fn config(&self) -> Result<Arc<ClientConfig>, Error> {
        if let Some(config) = self.tls.get() {
            return Ok(config.clone());
        }
        let roots = self.roots.clone().unwrap_or_else(|| {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            Arc::new(roots)
        });
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = config.map_err(|error| io("TLS cannot be set up").with_source(error))?;
        let config = Arc::new(config.with_root_certificates(roots).with_no_client_auth());
        Ok(self.tls.get_or_init(|| config).clone())
    }
}

/// Connects to the first address that answers in time. The last has as long as the fetch.
async fn connect(addresses: impl IntoIterator<Item = SocketAddr>) -> std::io::Result<TcpStream> {
    let mut addresses = addresses.into_iter().peekable();
    let mut failed = std::io::ErrorKind::AddrNotAvailable.into();
    while let Some(address) = addresses.next() {
        let stream = TcpStream::connect(address);
        let connected = match addresses.peek() {
            Some(_) => tokio::time::timeout(CONNECT_TIMEOUT, stream).await,
            None => Ok(stream.await),
        };
        match connected {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => failed = error,
            Err(_) => failed = std::io::ErrorKind::TimedOut.into(),
        }
    }
    Err(failed)
}

async fn request<T>(io_stream: TokioIo<T>, target: &Target) -> Result<(Vec<u8>, Option<Duration>), Error>
where
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let failed = |error: hyper::Error| io("the provider broke off").with_source(error);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io_stream).await.map_err(failed)?;
    let path = target.uri.path_and_query().map_or("/", |path| path.as_str());
    let host = target.uri.authority().map_or("", |authority| authority.as_str());
    let request = Request::get(path).header(header::HOST, host).header(header::ACCEPT, "application/json");
    let request = request.body(Empty::<Bytes>::new()).map_err(|_| io("not a URL that can be asked for"))?;
    let exchange = async {
        let response = sender.send_request(request).await.map_err(failed)?;
        if response.status() != StatusCode::OK {
            return Err(io(&format!("the provider answered {}", response.status())));
        }
        let lifetime = lifetime(response.headers());
        let body = Limited::new(response.into_body(), MAX_DOCUMENT_BYTES).collect().await;
        let body = body.map_err(|_| io("the document broke off, or is too large"))?;
        Ok((body.to_bytes().to_vec(), lifetime))
    };
    // The connection is driven here, so that it ends with the fetch.
    tokio::pin!(exchange);
    tokio::select! {
        biased;
        result = &mut exchange => result,
        // What had come before the end is still there to be read.
        _ = connection => exchange.await,
    }
}

/// What `Cache-Control` says; nothing to keep counts as the shortest time.
fn lifetime(headers: &http::HeaderMap) -> Option<Duration> {
    let mut found = None;
    for line in headers.get_all(header::CACHE_CONTROL) {
        for directive in line.to_str().unwrap_or_default().split(',') {
            let (name, value) = directive.split_once('=').unwrap_or((directive, ""));
            let name = name.trim();
            if name.eq_ignore_ascii_case("no-store") || name.eq_ignore_ascii_case("no-cache") {
                return Some(Duration::ZERO);
            }
            if name.eq_ignore_ascii_case("max-age") {
                found = value.trim().trim_matches('"').parse().ok().map(Duration::from_secs).or(found);
            }
        }
    }
    found
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("hosts", &self.hosts).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_https_urls_without_users_are_fetched() {
        let client = Client::default();
        assert_eq!(client.target("https://id.example/keys").map(|target| target.port).ok(), Some(443));
        let v6 = client.target("https://[::1]:8443/").unwrap_or_else(|error| panic!("{error}"));
        assert_eq!((&*v6.host, v6.port), ("::1", 8443));
        for url in
            ["http://id.example/", "ftp://id.example/", "id.example", "/keys", "https://a@id.example/", "", "https://"]
        {
            assert!(client.target(url).is_err_and(|error| error.is_setting()), "{url}");
        }
        let insecure = Client { insecure_http: true, ..Client::default() };
        assert_eq!(insecure.target("http://id.example/keys").map(|target| target.port).ok(), Some(80));
    }

    #[test]
    fn a_password_in_a_refused_url_is_not_printed() {
        let client = Client::default();
        for url in
            ["https://a:s3cret@id.example/", "http://a:s3cret@id.example/", "ftp://a:s3cret@x", "https://a:s3cret@"]
        {
            let error = client.target(url).map(drop).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("s3cret"), "{error:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_does_not_answer_does_not_hide_the_next() {
        // One whose queue is full answers nothing.
        let full = tokio::net::TcpSocket::new_v4().unwrap();
        full.bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let full = full.listen(0).unwrap();
        let live = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (dead, live_at) = (full.local_addr().unwrap(), live.local_addr().unwrap());
        let mut waiting = Vec::new();
        loop {
            let stream = std::pin::pin!(TcpStream::connect(dead));
            // The clock runs ahead as soon as nothing else can happen.
            match tokio::time::timeout(Duration::from_millis(100), stream).await {
                Ok(stream) => waiting.push(stream.unwrap()),
                Err(_) => break,
            }
        }
        let started = tokio::time::Instant::now();
        let stream = connect([dead, live_at]).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), live_at);
        assert_eq!(started.elapsed(), CONNECT_TIMEOUT);
        assert!(connect([]).await.is_err());
    }

    #[test]
    fn a_lifetime_is_read_from_cache_control() {
        let of = |value: &'static str| {
            let mut headers = http::HeaderMap::new();
            headers.insert(header::CACHE_CONTROL, http::HeaderValue::from_static(value));
            lifetime(&headers).map(|lifetime| lifetime.as_secs())
        };
        assert_eq!(of("public, max-age=600"), Some(600));
        assert_eq!(of("Max-Age=\"60\""), Some(60));
        assert_eq!(of("max-age=600, no-store"), Some(0));
        assert_eq!(of("max-age=many"), None);
        assert_eq!(of("s-maxage=60"), None);
        assert_eq!(lifetime(&http::HeaderMap::new()), None);
    }
}
