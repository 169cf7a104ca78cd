//! What goes wrong between a registry and us.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

/// Why a registry could not answer, or would not do what was asked. Text in it never holds a secret.
#[derive(Clone)]
pub struct Error {
    kind: Kind,
    detail: Arc<str>,
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Unavailable,
    NoLeader,
    Denied,
    Reset,
    Unsupported,
    Invalid,
}

// === impl Error ===

impl Error {
    /// The registry cannot be reached, is too slow, or answers what cannot be read.
    pub fn unavailable(detail: impl Into<Arc<str>>) -> Self {
        Self::of(Kind::Unavailable, detail)
    }

    /// The registry answers, but has no leader: what it says of absence means nothing.
    pub fn no_leader(detail: impl Into<Arc<str>>) -> Self {
        Self::of(Kind::NoLeader, detail)
    }

    /// The registry does not let us read, or write.
    pub fn denied(detail: impl Into<Arc<str>>) -> Self {
        Self::of(Kind::Denied, detail)
    }

    /// The registry lost its memory: that it does not know the service any more proves nothing.
    pub fn reset(detail: impl Into<Arc<str>>) -> Self {
        Self::of(Kind::Reset, detail)
    }

    /// This source cannot do that at all.
    pub fn unsupported(detail: impl Into<Arc<str>>) -> Self {
        Self::of(Kind::Unsupported, detail)
    }

    /// What was configured or handed in is wrong.
    pub fn invalid(detail: impl Into<Arc<str>>) -> Self {
        Self::of(Kind::Invalid, detail)
    }

    fn of(kind: Kind, detail: impl Into<Arc<str>>) -> Self {
        Self { kind, detail: detail.into(), source: None }
    }

    /// Adds what it came from.
    #[must_use]
    pub fn with_source(mut self, source: impl StdError + Send + Sync + 'static) -> Self {
        self.source = Some(Arc::new(source));
        self
    }

    /// Whether the registry could not be reached or read.
    #[must_use]
    pub fn is_unavailable(&self) -> bool {
        self.kind == Kind::Unavailable
    }

    /// Whether the registry had no leader.
    #[must_use]
    pub fn is_no_leader(&self) -> bool {
        self.kind == Kind::NoLeader
    }

    /// Whether we may not do that.
    #[must_use]
    pub fn is_denied(&self) -> bool {
        self.kind == Kind::Denied
    }

    /// Whether the registry lost its memory.
    #[must_use]
    pub fn is_reset(&self) -> bool {
        self.kind == Kind::Reset
    }

    /// Whether the source cannot do that at all.
    #[must_use]
    pub fn is_unsupported(&self) -> bool {
        self.kind == Kind::Unsupported
    }

    /// Whether the configuration, or what was handed in, is wrong.
    #[must_use]
    pub fn is_invalid(&self) -> bool {
        self.kind == Kind::Invalid
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("kind", &self.kind)
            .field("detail", &self.detail)
            .field("source", &self.source)
            .finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}
