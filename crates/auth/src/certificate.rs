//! The connection's certificate as proof.

use std::collections::HashMap;
use std::fmt;
use std::future::Ready;
use std::sync::Arc;

use aws_lc_rs::digest;
use bytes::Bytes;
use portcullis_core::{Carried, Identity, PeerTls};

use crate::authenticate::{Attempt, Authenticate, Denied, Head, Scheme};
use crate::error::{Error, Kind};

/// Accepts callers by the certificate they showed when the connection was made.
///
/// The server verified it, down to a root it believes, and left it as [`PeerTls`]; here it only decides whom it stands for:
/// by its fingerprint, or by a function of the user's that reads its names. A certificate that a proxy claims to have seen,
/// in a header, is not looked at.
#[derive(Clone, Default)]
pub struct ClientCertificate {
    known: HashMap<[u8; 32], Identity>,
    read: Option<Arc<ReadCertificate>>,
}

type ReadCertificate = dyn Fn(&Bytes) -> Option<Identity> + Send + Sync;

// === impl ClientCertificate ===

impl ClientCertificate {
    /// No certificate is known yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes who showed the certificate with this SHA-256 fingerprint, in hexadecimal with or without colons, for
    /// `identity`.
    ///
    /// # Errors
    ///
    /// [`Error::is_setting`] when it is no such fingerprint.
    pub fn accept(mut self, fingerprint: &str, identity: Identity) -> Result<Self, Error> {
        let wrong = || Error::new(Kind::Setting, "not a SHA-256 fingerprint");
        let digits: Vec<u8> = fingerprint.bytes().filter(|byte| *byte != b':').collect();
        let digit = |byte: &u8| char::from(*byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        let bytes: Option<Vec<u8>> =
            digits.chunks(2).map(|pair| Some(digit(pair.first()?)? << 4 | digit(pair.get(1)?)?)).collect();
        let hash: [u8; 32] = bytes.ok_or_else(wrong)?.try_into().map_err(|_| wrong())?;
        self.known.insert(hash, identity);
        Ok(self)
    }

    /// Asks `read` whom a certificate, given as DER, stands for, where its fingerprint is not known.
    ///
    /// Compare names whole, and refuse those with control characters in them.
    #[must_use]
    pub fn read(mut self, read: impl Fn(&Bytes) -> Option<Identity> + Send + Sync + 'static) -> Self {
        self.read = Some(Arc::new(read));
        self
    }

    fn check(&self, head: &Head<'_>) -> Result<Identity, Denied> {
        let certificate = PeerTls::of(head.extensions()).and_then(|tls| tls.certificates().first());
        let certificate = certificate.ok_or_else(Denied::missing)?;
        let known = self.known.get(digest::digest(&digest::SHA256, certificate).as_ref()).cloned();
        let identity = known.or_else(|| self.read.as_ref().and_then(|read| read(certificate)));
        identity.ok_or_else(|| Denied::invalid("the certificate is not known"))
    }
}

impl Authenticate for ClientCertificate {
    type Future = Ready<Result<Identity, Denied>>;

    fn authenticate(&self, head: &Head<'_>) -> Attempt<Self::Future> {
        Attempt::Now(self.check(head))
    }

    fn schemes(&self) -> Vec<Scheme> {
        vec![Scheme::certificate()]
    }
}

impl fmt::Debug for ClientCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientCertificate").field("known", &self.known.len()).finish_non_exhaustive()
    }
}
