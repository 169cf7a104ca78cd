//! Connections to an agent: TCP or a Unix socket, in the clear or over TLS.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tower_service::Service;

use super::Origin;
use super::client::Lanes;
use crate::Error;

/// Connects to one agent, whatever the URI says.
#[derive(Clone)]
pub(super) struct Connector {
    pub(super) origin: Arc<Origin>,
    pub(super) tls: Option<Arc<rustls::ClientConfig>>,
    pub(super) timeout: Duration,
    pub(super) lanes: Arc<Lanes>,
}

pub(super) struct Stream {
    io: TokioIo<Box<dyn Io>>,
    http2: bool,
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// How an agent is trusted over TLS.
#[derive(Clone, Debug, Default)]
pub(super) struct Tls {
    pub(super) authorities: Option<Vec<u8>>,
    /// Certificate chain and key, as PEM.
    pub(super) identity: Option<(Vec<u8>, Secret)>,
}

/// Bytes that are never printed.
#[derive(Clone)]
pub(super) struct Secret(pub(super) Vec<u8>);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

// === impl Tls ===

impl Tls {
    /// The authorities given, else those of the system; with the certificate given, if any.
    pub(super) fn client(&self) -> Result<Arc<rustls::ClientConfig>, Error> {
        let wrong = |what: &str| Error::invalid(format!("{what} cannot be read as PEM"));
        let mut roots = rustls::RootCertStore::empty();
        if let Some(pem) = &self.authorities {
            for certificate in CertificateDer::pem_slice_iter(pem) {
                let certificate = certificate.map_err(|error| wrong("the authority").with_source(error))?;
                roots.add(certificate).map_err(|error| wrong("the authority").with_source(error))?;
            }
        } else {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
        if roots.is_empty() {
            return Err(Error::invalid("there is no certificate authority to trust"));
        }
        let builder = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| Error::invalid("TLS cannot be set up").with_source(error))?
            .with_root_certificates(roots);
        let mut client = match &self.identity {
            None => builder.with_no_client_auth(),
            Some((chain, key)) => {
                let chain = CertificateDer::pem_slice_iter(chain).collect::<Result<Vec<_>, _>>();
                let chain = chain.map_err(|error| wrong("the client certificate").with_source(error))?;
                let key = PrivateKeyDer::from_pem_slice(&key.0).map_err(|_| wrong("the client key"))?;
                builder
                    .with_client_auth_cert(chain, key)
                    .map_err(|error| Error::invalid("the client certificate does not fit its key").with_source(error))?
            }
        };
        client.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(client))
    }
}

// === impl Connector ===

impl Connector {
    async fn connect(self) -> io::Result<Stream> {
        let io: Box<dyn Io> = match &*self.origin {
            Origin::Tcp { host, port, .. } => {
                let stream = TcpStream::connect((host.trim_matches(['[', ']']), *port)).await?;
                stream.set_nodelay(true)?;
                let keepalive = socket2::TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE);
                socket2::SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
                Box::new(stream)
            }
            #[cfg(unix)]
            Origin::Unix(path) => Box::new(tokio::net::UnixStream::connect(path).await?),
            #[cfg(not(unix))]
            Origin::Unix(_) => return Err(io::ErrorKind::Unsupported.into()),
        };
        let (Some(tls), Origin::Tcp { host, .. }) = (self.tls, &*self.origin) else {
            return Ok(Stream { io: TokioIo::new(io), http2: false });
        };
        let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned()).map_err(io::Error::other)?;
        let stream = tokio_rustls::TlsConnector::from(tls).connect(name, io).await?;
        let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        if http2 {
            self.lanes.multiplex();
        }
        Ok(Stream { io: TokioIo::new(Box::new(stream)), http2 })
    }
}

const KEEPALIVE: Duration = Duration::from_secs(15);

impl Service<Uri> for Connector {
    type Response = Stream;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Stream>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let (timeout, connecting) = (self.timeout, self.clone().connect());
        Box::pin(async move {
            tokio::time::timeout(timeout, connecting).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        })
    }
}

// === impl Stream ===

impl Connection for Stream {
    fn connected(&self) -> Connected {
        let connected = Connected::new();
        if self.http2 { connected.negotiated_h2() } else { connected }
    }
}

impl Read for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl Write for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
