//! TLS from clients, by rustls with ring.

use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;
use bytes::Bytes;
use portcullis_core::PeerTls;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{ServerConfig, WebPkiClientVerifier};
use tokio_rustls::rustls::{RootCertStore, crypto};
use tokio_rustls::server::TlsStream;

use super::Error;

/// Who a [`Server`](super::Server) is, and whom it lets prove to be who. HTTP/2 and HTTP/1.1 are offered. Clones are one.
#[derive(Clone)]
pub struct ServerTls {
    config: Arc<ArcSwap<ServerConfig>>,
}

/// What is asked of clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ClientCertificates {
    /// A certificate, or the connection fails.
    Required,
    /// A certificate if they have one; what they show must be valid.
    Optional,
}

impl ServerTls {
    /// Shows this certificate: the chain, its own first, and its key, both as PEM.
    ///
    /// # Errors
    ///
    /// When either cannot be read, or they do not belong together.
    pub fn new(chain: &[u8], key: &[u8]) -> Result<Self, Error> {
        Self::build(chain, key, None)
    }

    /// As [`new`](Self::new), and asks clients for a certificate by one of the `authorities`, as PEM. What they prove to
    /// hold is in each request's [`PeerTls`].
    ///
    /// # Errors
    ///
    /// When anything cannot be read, or does not belong together.
    pub fn with_client_authorities(
        chain: &[u8],
        key: &[u8],
        authorities: &[u8],
        certificates: ClientCertificates,
    ) -> Result<Self, Error> {
        Self::build(chain, key, Some((authorities, certificates)))
    }

    fn build(chain: &[u8], key: &[u8], clients: Option<(&[u8], ClientCertificates)>) -> Result<Self, Error> {
        let provider = Arc::new(crypto::ring::default_provider());
        let chain = certificates(chain)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| Error("the key is not PEM"))?;
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|_| Error("no TLS version can be used"))?;
        let builder = match clients {
            None => builder.with_no_client_auth(),
            Some((authorities, wanted)) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates(authorities)? {
                    roots.add(certificate).map_err(|_| Error("an authority's certificate cannot be used"))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                let verifier = match wanted {
                    ClientCertificates::Required => verifier,
                    ClientCertificates::Optional => verifier.allow_unauthenticated(),
                };
                builder.with_client_cert_verifier(verifier.build().map_err(|_| Error("there is no authority"))?)
            }
        };
        let mut config =
            builder.with_single_cert(chain, key).map_err(|_| Error("the certificate and its key do not fit"))?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Self { config: Arc::new(ArcSwap::from_pointee(config)) })
    }

    /// Shows and asks from now on what `other` does. Connections go on with what they began with; sessions of before are
    /// not resumed.
    pub fn replace(&self, other: &Self) {
        self.config.store(other.config.load_full());
    }

    pub(super) async fn accept(&self, stream: TcpStream) -> std::io::Result<TlsStream<TcpStream>> {
        TlsAcceptor::from(self.config.load_full()).accept(stream).await
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|_| Error("a certificate is not PEM"))
}

/// What the other end has proved.
pub(super) fn peer(stream: &TlsStream<TcpStream>) -> PeerTls {
    let shown = stream.get_ref().1.peer_certificates().unwrap_or_default();
    PeerTls::new(shown.iter().map(|certificate| Bytes::copy_from_slice(certificate)).collect::<Vec<_>>())
}

/// Keys are not shown.
impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTls").finish_non_exhaustive()
    }
}
