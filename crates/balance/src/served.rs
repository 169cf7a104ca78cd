//! What is left in a response for logs and metrics.

use portcullis_core::Endpoint;

use crate::policy::Reason;

/// Which endpoint answered, or was last asked in vain, and what was tried before; in the extensions of the response. An
/// error of the inner service passes through as it is, without.
#[derive(Clone, Debug)]
pub struct Served {
    endpoint: Endpoint,
    failed: Vec<Failed>,
}

/// One attempt that was not the last.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Failed {
    /// Where it went.
    pub endpoint: Endpoint,
    /// Why another was made.
    pub reason: Reason,
}

// === impl Served ===

impl Served {
    pub(crate) const fn new(endpoint: Endpoint, failed: Vec<Failed>) -> Self {
        Self { endpoint, failed }
    }

    /// The endpoint whose response this is, or whose did not come.
    #[must_use]
    pub const fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// How many attempts there were, this one counted.
    #[must_use]
    pub fn attempts(&self) -> usize {
        self.failed.len() + 1
    }

    /// The attempts before this one, first to last.
    #[must_use]
    pub fn failed(&self) -> &[Failed] {
        &self.failed
    }
}
