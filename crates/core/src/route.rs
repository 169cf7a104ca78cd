//! The matched route, and what it asks of the layers.

use std::any::{Any, TypeId};
use std::fmt;
use std::sync::Arc;

/// The route a request matched: its name for logs and metrics, and the policies with which it overrides layers' defaults.
///
/// A layer looks for its own policy type with [`policy`](Self::policy) and falls back to its default. The value is one
/// pointer; the same route serves all its requests.
#[derive(Clone)]
pub struct Route(Arc<Inner>);

#[derive(Clone)]
struct Inner {
    name: Arc<str>,
    policies: Vec<(TypeId, Arc<dyn Any + Send + Sync>)>,
}

// === impl Route ===

impl Route {
    /// A route without policies of its own. The name should be the pattern, never a path a caller chose.
    #[must_use]
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self(Arc::new(Inner { name: name.into(), policies: Vec::new() }))
    }

    /// The same route under another name.
    #[must_use]
    pub fn named(mut self, name: impl Into<Arc<str>>) -> Self {
        Arc::make_mut(&mut self.0).name = name.into();
        self
    }

    /// The pattern or name the route was given.
    #[must_use]
    pub fn name(&self) -> &Arc<str> {
        &self.0.name
    }

    /// Overrides the default of the layer that reads policies of type `P`; a second one of the same type replaces it.
    #[must_use]
    pub fn with_policy<P: Any + Send + Sync>(mut self, policy: P) -> Self {
        let inner = Arc::make_mut(&mut self.0);
        inner.policies.retain(|(id, _)| *id != TypeId::of::<P>());
        inner.policies.push((TypeId::of::<P>(), Arc::new(policy)));
        self
    }

    /// This route's policy of type `P`.
    #[must_use]
    pub fn policy<P: Any + Send + Sync>(&self) -> Option<&P> {
        let id = TypeId::of::<P>();
        self.0.policies.iter().find(|(have, _)| *have == id)?.1.downcast_ref()
    }
}

impl fmt::Debug for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Route").field("name", &self.0.name).field("policies", &self.0.policies.len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_policy_of_a_type_replaces_the_first() {
        let route = Route::new("/a").with_policy(1_u8).with_policy("x").with_policy(2_u8);
        assert_eq!(route.policy::<u8>(), Some(&2));
        assert_eq!(route.policy::<&str>(), Some(&"x"));
        assert_eq!(route.policy::<u16>(), None);
    }
}
