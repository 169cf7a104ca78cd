//! What a route asks of its callers.

use std::fmt;
use std::sync::Arc;

use portcullis_core::Identity;
use serde::de::DeserializeOwned;

/// Whether callers must prove who they are, and what they must be allowed to.
///
/// A layer has one for every request, and a route may have its own, as a policy of its
/// [`Route`](portcullis_core::Route). All conditions that are set must hold.
///
/// ```
/// use portcullis_auth::Policy;
///
/// let policy = Policy::required().scopes_all(["orders:read"]).roles_any(["clerk", "admin"]);
/// ```
#[derive(Clone, Debug)]
pub struct Policy {
    pub(crate) mode: Mode,
    conditions: Vec<Condition>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Required,
    Optional,
    None,
}

#[derive(Clone)]
enum Condition {
    ScopesAll(Vec<String>),
    ScopesAny(Vec<String>),
    RolesAll(Vec<String>),
    RolesAny(Vec<String>),
    When(Arc<dyn Fn(&Identity) -> bool + Send + Sync>),
}

// === impl Policy ===

impl Policy {
    /// Callers must prove who they are. The default.
    #[must_use]
    pub const fn required() -> Self {
        Self { mode: Mode::Required, conditions: Vec::new() }
    }

    /// Callers who show nothing pass as nobody. Who shows credentials must show good ones, and meet the conditions.
    #[must_use]
    pub const fn optional() -> Self {
        Self { mode: Mode::Optional, conditions: Vec::new() }
    }

    /// Nobody is asked, and credentials are not looked at. With a condition it is [`required`](Self::required) after all.
    #[must_use]
    pub const fn none() -> Self {
        Self { mode: Mode::None, conditions: Vec::new() }
    }

    /// Whether callers are asked who they are: they are not by [`none`](Self::none) alone.
    #[must_use]
    pub fn asks(&self) -> bool {
        self.mode != Mode::None
    }

    /// Wants all of these scopes.
    #[must_use]
    pub fn scopes_all<S: Into<String>>(self, scopes: impl IntoIterator<Item = S>) -> Self {
        self.condition(Condition::ScopesAll(collect(scopes)))
    }

    /// Wants at least one of these scopes.
    #[must_use]
    pub fn scopes_any<S: Into<String>>(self, scopes: impl IntoIterator<Item = S>) -> Self {
        self.condition(Condition::ScopesAny(collect(scopes)))
    }

    /// Wants all of these roles.
    #[must_use]
    pub fn roles_all<S: Into<String>>(self, roles: impl IntoIterator<Item = S>) -> Self {
        self.condition(Condition::RolesAll(collect(roles)))
    }

    /// Wants at least one of these roles.
    #[must_use]
    pub fn roles_any<S: Into<String>>(self, roles: impl IntoIterator<Item = S>) -> Self {
        self.condition(Condition::RolesAny(collect(roles)))
    }

    /// Wants this to be true of the caller.
    #[must_use]
    pub fn when(self, predicate: impl Fn(&Identity) -> bool + Send + Sync + 'static) -> Self {
        self.condition(Condition::When(Arc::new(predicate)))
    }

    /// Wants this to be true of the caller's claims, read as a type of the user's own. Claims that are no `T` do not meet
    /// it. They are read anew for each request: prefer [`when`](Self::when) where one claim will do.
    #[must_use]
    pub fn claims<T: DeserializeOwned>(self, predicate: impl Fn(&T) -> bool + Send + Sync + 'static) -> Self {
        self.when(move |identity| identity.claims_as::<T>().is_ok_and(|claims| predicate(&claims)))
    }

    fn condition(mut self, condition: Condition) -> Self {
        if self.mode == Mode::None {
            self.mode = Mode::Required;
        }
        self.conditions.push(condition);
        self
    }

    /// Whether the caller meets every condition; if not, the scopes it lacks, where that is why.
    pub(crate) fn admits(&self, identity: &Identity) -> Result<(), Option<String>> {
        for condition in &self.conditions {
            let (met, scopes) = match condition {
                Condition::ScopesAll(scopes) => (scopes.iter().all(|scope| identity.has_scope(scope)), Some(scopes)),
                Condition::ScopesAny(scopes) => (scopes.iter().any(|scope| identity.has_scope(scope)), Some(scopes)),
                Condition::RolesAll(roles) => (roles.iter().all(|role| identity.has_role(role)), None),
                Condition::RolesAny(roles) => (roles.iter().any(|role| identity.has_role(role)), None),
                Condition::When(predicate) => (predicate(identity), None),
            };
            if !met {
                return Err(scopes.map(|scopes| scopes.join(" ")));
            }
        }
        Ok(())
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self::required()
    }
}

fn collect<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Vec<String> {
    names.into_iter().map(Into::into).collect()
}

impl fmt::Debug for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ScopesAll(names) => f.debug_tuple("ScopesAll").field(names).finish(),
            Self::ScopesAny(names) => f.debug_tuple("ScopesAny").field(names).finish(),
            Self::RolesAll(names) => f.debug_tuple("RolesAll").field(names).finish(),
            Self::RolesAny(names) => f.debug_tuple("RolesAny").field(names).finish(),
            Self::When(_) => f.write_str("When"),
        }
    }
}
