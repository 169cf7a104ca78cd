//! Where callers come in.

use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::time::Duration;

use super::mistake::Notes;
use super::plain::Bytes;
use super::read::At;
use super::secret::{Blob, pem};
use super::section::section;

section! {
    /// Where callers come in.
    pub struct Listener {
        /// An address with a port; port 0 takes a free one and says which.
        address: At<SocketAddr>,
        /// Takes connections over TLS.
        tls: Option<ListenerTls>,
        /// Lets another process listen at the same address (SO_REUSEPORT), for a restart without a gap.
        reuse_port: bool = false,
        /// Connections at a time; others wait to be accepted.
        max_connections: NonZeroUsize = NonZeroUsize::new(10_000).unwrap_or(NonZeroUsize::MIN),
        /// How long a caller may take to send the head of a request.
        header_timeout: Duration = Duration::from_secs(10),
        /// How large the head of a request may be.
        max_header_size: Bytes = Bytes(64 << 10),
        /// Streams at a time on one HTTP/2 connection.
        max_streams: NonZeroU32 = NonZeroU32::new(128).unwrap_or(NonZeroU32::MIN),
    }
}

section! {
    /// A listener's side of TLS.
    pub struct ListenerTls {
        /// The certificate and those between it and the root, as PEM.
        certificate: At<Blob>,
        /// Its private key, as PEM.
        key: At<Blob>,
        /// Authorities whose client certificates are verified, as PEM. Without, none is asked for.
        client_ca: Option<At<Blob>>,
        /// Refuses connections without a client certificate.
        require_client: bool = false,
    }
}

impl Listener {
    /// A listener as it is when nothing else is said.
    pub(crate) fn at(address: SocketAddr) -> Self {
        let (max_connections, max_streams) =
            (NonZeroUsize::MIN.saturating_add(9_999), NonZeroU32::MIN.saturating_add(127));
        Self {
            address: At::of(address),
            tls: None,
            reuse_port: false,
            max_connections,
            header_timeout: Duration::from_secs(10),
            max_header_size: Bytes(64 << 10),
            max_streams,
        }
    }
}

impl ListenerTls {
    pub(super) fn check(&self, notes: &mut Notes<'_>) {
        pem(&self.certificate, "CERTIFICATE", notes);
        pem(&self.key, "PRIVATE KEY", notes);
        if let Some(ca) = &self.client_ca {
            pem(ca, "CERTIFICATE", notes);
        } else if self.require_client {
            notes.push(
                &self.certificate.span,
                "client certificates are required, and no authority is named",
                "set client_ca",
            );
        }
    }
}
