//! What a wrong configuration is answered with.

use std::fmt;

/// A limit that cannot be.
#[derive(Debug)]
pub struct Error(Kind);

#[derive(Debug)]
enum Kind {
    Period,
    #[cfg(feature = "redis")]
    Url,
    #[cfg(feature = "redis-tls")]
    Provider,
    #[cfg(feature = "redis-tls")]
    Authorities,
}

// === impl Error ===

impl Error {
    pub(crate) const fn period() -> Self {
        Self(Kind::Period)
    }

    #[cfg(feature = "redis")]
    pub(crate) const fn url() -> Self {
        Self(Kind::Url)
    }

    #[cfg(feature = "redis-tls")]
    pub(crate) const fn provider() -> Self {
        Self(Kind::Provider)
    }

    #[cfg(feature = "redis-tls")]
    pub(crate) const fn authorities() -> Self {
        Self(Kind::Authorities)
    }

    /// What should hold the certificates of authorities holds none.
    #[cfg(feature = "redis-tls")]
    #[must_use]
    pub const fn is_authorities(&self) -> bool {
        matches!(self.0, Kind::Authorities)
    }

    /// The store wants TLS, and the process has no default provider of rustls.
    #[cfg(feature = "redis-tls")]
    #[must_use]
    pub const fn is_provider(&self) -> bool {
        matches!(self.0, Kind::Provider)
    }

    /// The store's URL is none.
    #[cfg(feature = "redis")]
    #[must_use]
    pub const fn is_url(&self) -> bool {
        matches!(self.0, Kind::Url)
    }

    /// The period is zero, or longer than a year.
    #[must_use]
    pub const fn is_period(&self) -> bool {
        matches!(self.0, Kind::Period)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Kind::Period => f.write_str("a rate's period must be longer than zero and at most a year"),
            // The URL may hold a password.
            #[cfg(feature = "redis")]
            Kind::Url => f.write_str("the store's url is not one of redis"),
            #[cfg(feature = "redis-tls")]
            Kind::Authorities => f.write_str("the store's authorities are no certificates in pem"),
            #[cfg(feature = "redis-tls")]
            Kind::Provider => f.write_str("tls to the store needs a default crypto provider of rustls"),
        }
    }
}

impl std::error::Error for Error {}
