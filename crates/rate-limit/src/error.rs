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
        }
    }
}

impl std::error::Error for Error {}
