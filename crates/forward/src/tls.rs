//! TLS to upstreams, by rustls with ring.

use std::fmt;
use std::sync::Arc;

use portcullis_core::Address;
use rustls::client::ClientConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ConfigBuilder, RootCertStore, WantsVerifier};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::Error;
use crate::failure::{Failure, Kind};
use crate::stream::Plain;

/// Whom to trust and who to be when a connection to an endpoint is encrypted. The endpoint's certificate must be valid
/// for its name, or its IP address if it has none.
#[derive(Clone)]
pub struct ClientTls {
    roots: Arc<RootCertStore>,
    identity: Option<Arc<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>>,
    name: Option<ServerName<'static>>,
    configs: Configs,
}

/// One for each set of protocols to offer.
#[derive(Clone)]
struct Configs {
    h1: Arc<ClientConfig>,
    h2: Arc<ClientConfig>,
    either: Arc<ClientConfig>,
}

// === impl ClientTls ===

impl ClientTls {
    /// Trusts whom the system trusts.
    ///
    /// # Errors
    ///
    /// When the system has no certificates that can be read.
    pub fn system() -> Result<Self, Error> {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if roots.is_empty() {
            return Err(Error("the system has no root certificates"));
        }
        Self::with_roots(roots)
    }

    /// Trusts exactly the authorities in `pem`.
    ///
    /// # Errors
    ///
    /// When there is none in it, or one cannot be read.
    pub fn trusting(pem: &[u8]) -> Result<Self, Error> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(pem) {
            let certificate = certificate.map_err(|_| Error("the authorities are not PEM"))?;
            roots.add(certificate).map_err(|_| Error("an authority's certificate cannot be used"))?;
        }
        if roots.is_empty() {
            return Err(Error("the PEM has no certificate"));
        }
        Self::with_roots(roots)
    }

    fn with_roots(roots: RootCertStore) -> Result<Self, Error> {
        let roots = Arc::new(roots);
        let configs = Configs::new(&roots, None)?;
        Ok(Self { roots, identity: None, name: None, configs })
    }

    /// Shows this certificate to endpoints that ask: the chain, its own first, and its key, both as PEM.
    ///
    /// # Errors
    ///
    /// When either cannot be read, or they do not belong together.
    pub fn client_certificate(mut self, chain: &[u8], key: &[u8]) -> Result<Self, Error> {
        let chain = CertificateDer::pem_slice_iter(chain)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| Error("the client certificate is not PEM"))?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| Error("the client key is not PEM"))?;
        let identity = Arc::new((chain, key));
        self.configs = Configs::new(&self.roots, Some(&identity))?;
        self.identity = Some(identity);
        Ok(self)
    }

    /// The name that every endpoint's certificate must be valid for, and that is asked for by SNI, whatever the endpoint's
    /// address.
    ///
    /// # Errors
    ///
    /// When it is no name.
    pub fn server_name(mut self, name: &str) -> Result<Self, Error> {
        let name = ServerName::try_from(name.to_owned()).map_err(|_| Error("the server name is not a name"))?;
        self.name = Some(name);
        Ok(self)
    }

    pub(crate) async fn connect(
        &self,
        address: &Address,
        plain: Plain,
        h2: Option<bool>,
    ) -> Result<TlsStream<Plain>, Failure> {
        let failed = |cause: &dyn fmt::Display| Failure::unsent(Kind::Tls).because(cause);
        let name = match (&self.name, address) {
            (Some(name), _) => name.clone(),
            (None, Address::Socket(address)) => ServerName::from(address.ip()),
            (None, Address::Name(host, _)) => ServerName::try_from(host.to_string()).map_err(|error| failed(&error))?,
            (None, _) => return Err(failed(&"a Unix socket needs a server name")),
        };
        let config = match h2 {
            Some(true) => &self.configs.h2,
            Some(false) => &self.configs.h1,
            None => &self.configs.either,
        };
        let stream = TlsConnector::from(config.clone()).connect(name, plain).await.map_err(|error| failed(&error))?;
        let agreed = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        match h2 {
            Some(true) if !agreed => Err(failed(&"the endpoint does not speak HTTP/2")),
            Some(false) if agreed => Err(failed(&"the endpoint chose what was not offered")),
            _ => Ok(stream),
        }
    }
}

/// Keys are not shown.
impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientTls")
            .field("roots", &self.roots.len())
            .field("has_identity", &self.identity.is_some())
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

// === impl Configs ===

impl Configs {
    fn new(
        roots: &Arc<RootCertStore>,
        identity: Option<&Arc<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>>,
    ) -> Result<Self, Error> {
        let builder = builder()?.with_root_certificates(roots.clone());
        let config = match identity {
            Some(identity) => builder
                .with_client_auth_cert(identity.0.clone(), identity.1.clone_key())
                .map_err(|_| Error("the client certificate and its key do not fit"))?,
            None => builder.with_no_client_auth(),
        };
        let offering = |protocols: &[&[u8]]| {
            let mut config = config.clone();
            config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
            Arc::new(config)
        };
        Ok(Self { h1: offering(&[b"http/1.1"]), h2: offering(&[b"h2"]), either: offering(&[b"h2", b"http/1.1"]) })
    }
}

fn builder() -> Result<ConfigBuilder<ClientConfig, WantsVerifier>, Error> {
    ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|_| Error("no TLS version can be used"))
}
