//! What a request must be like, beside its path.

use http::{HeaderName, Method};

/// What a request must be like, beside its path. Nothing set takes everything.
#[derive(Clone, Debug, Default)]
pub(super) struct Matches {
    pub(super) hosts: Vec<String>,
    pub(super) methods: Vec<Method>,
    pub(super) headers: Vec<(HeaderName, Is)>,
    pub(super) query: Vec<(String, Is)>,
    pub(super) grpc: bool,
}

/// What must be so of the value of a header or of a query parameter. Of several of one name the first counts.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Is {
    /// There is one.
    Present,
    /// There is none.
    Absent,
    /// It is exactly this.
    Exactly(String),
    /// It begins like this.
    Prefixed(String),
}

// === impl Is ===

impl Is {
    pub(super) fn holds(&self, value: Option<&str>) -> bool {
        match self {
            Self::Present => value.is_some(),
            Self::Absent => value.is_none(),
            Self::Exactly(wanted) => value == Some(wanted),
            Self::Prefixed(prefix) => value.is_some_and(|value| value.starts_with(prefix.as_str())),
        }
    }
}
