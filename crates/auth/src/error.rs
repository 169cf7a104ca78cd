//! What can be wrong with a configuration.

use std::fmt;

/// A key, a key set or a setting that cannot be used.
pub struct Error(Box<Inner>);

struct Inner {
    kind: Kind,
    detail: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Key,
    KeySet,
    Setting,
    Io,
}

// === impl Error ===

impl Error {
    pub(crate) fn new(kind: Kind, detail: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, detail: detail.into(), source: None }))
    }

    pub(crate) fn key(detail: impl Into<String>) -> Self {
        Self::new(Kind::Key, detail)
    }

    #[must_use]
    pub(crate) fn with_source(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.0.source = Some(Box::new(source));
        self
    }

    /// A key is malformed, too weak, or of another kind than its algorithm wants.
    #[must_use]
    pub fn is_key(&self) -> bool {
        self.0.kind == Kind::Key
    }

    /// A key set is malformed, or has no key that can be used.
    #[must_use]
    pub fn is_key_set(&self) -> bool {
        self.0.kind == Kind::KeySet
    }

    /// Another setting is wrong, or two contradict each other.
    #[must_use]
    pub fn is_setting(&self) -> bool {
        self.0.kind == Kind::Setting
    }

    /// A file or a provider could not be read.
    #[must_use]
    pub fn is_io(&self) -> bool {
        self.0.kind == Kind::Io
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.detail)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("kind", &self.0.kind)
            .field("detail", &self.0.detail)
            .field("source", &self.0.source)
            .finish()
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}
