//! The right to call, which gives its place back.

use std::fmt;
use std::sync::Arc;

use super::entry::Kind;
use super::{Entry, Gate, Generation, Refused};
use crate::{Endpoint, Moment};

/// The right to call one endpoint once. Dropping it gives a rationed place back.
#[must_use = "dropping a pass gives its place back"]
pub struct Pass {
    gate: Guarded,
    entry: Entry,
}

enum Guarded {
    Endpoint(Endpoint),
    Alone(Arc<Gate>),
}

// === impl Gate ===

impl Gate {
    /// Enters a gate of one's own, shared behind an `Arc`.
    ///
    /// # Errors
    ///
    /// [`Refused`] when every place is taken.
    pub fn pass(self: &Arc<Self>, now: impl FnOnce() -> Moment) -> Result<Pass, Refused> {
        let entry = self.enter(now)?;
        Ok(Pass { gate: Guarded::Alone(self.clone()), entry })
    }

    /// Gives a pass without asking. Its outcome must change nothing: see [`Pass::is_forced`].
    pub fn pass_by_force(self: &Arc<Self>) -> Pass {
        Pass { gate: Guarded::Alone(self.clone()), entry: self.force() }
    }
}

// === impl Pass ===

impl Pass {
    pub(crate) fn of_endpoint(endpoint: Endpoint, entry: Entry) -> Self {
        Self { gate: Guarded::Endpoint(endpoint), entry }
    }

    pub(crate) fn lent(endpoint: Endpoint, entry: Entry) -> Self {
        Self { gate: Guarded::Endpoint(endpoint), entry: entry.lent() }
    }

    /// When the gate was entered; a result counts if this has [`reached`](Generation::reached) the move that began the
    /// period.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.entry.generation()
    }

    /// Whether it holds one of the places of a rationed gate.
    #[must_use]
    pub fn is_rationed(&self) -> bool {
        self.entry.is_rationed()
    }

    /// Whether the gate was not asked. The request is let through and its outcome changes nothing; otherwise a panic
    /// threshold would be undone by the failures it brings.
    #[must_use]
    pub fn is_forced(&self) -> bool {
        self.entry.kind() == Kind::Forced
    }

    /// What the gate gave.
    pub fn entry(&self) -> Entry {
        self.entry
    }

    /// The gate that was entered.
    #[must_use]
    pub fn gate(&self) -> &Gate {
        match &self.gate {
            Guarded::Endpoint(endpoint) => endpoint.gate(),
            Guarded::Alone(gate) => gate,
        }
    }

    /// The endpoint behind the gate, if there is one.
    #[must_use]
    pub fn endpoint(&self) -> Option<&Endpoint> {
        match &self.gate {
            Guarded::Endpoint(endpoint) => Some(endpoint),
            Guarded::Alone(_) => None,
        }
    }
}

impl Drop for Pass {
    #[inline]
    fn drop(&mut self) {
        self.gate().leave(self.entry);
    }
}

impl fmt::Debug for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pass").field("entry", &self.entry).finish_non_exhaustive()
    }
}
