//! Where requests go, and what is asked of them on the way.

use std::any::Any;
use std::time::Duration;

use http::Method;
use portcullis_core::{Destination, Route as Matched};

/// Where the requests of a pattern go, and the policies with which they override the layers' defaults.
///
/// ```
/// use http::Method;
/// use portcullis::auth;
/// use portcullis::gateway::Route;
///
/// let route = Route::to("orders").method(Method::GET).auth(auth::Policy::required().scopes_all(["orders:read"]));
/// ```
#[derive(Clone, Debug)]
pub struct Route {
    pub(super) methods: Vec<Method>,
    pub(super) service: Destination,
    pub(super) timeout: Option<Duration>,
    policies: Matched,
}

/// A route in the router.
#[derive(Clone)]
pub(super) struct Target {
    pub(super) route: Matched,
    pub(super) service: Destination,
    pub(super) timeout: Option<Duration>,
}

// === impl Route ===

impl Route {
    /// Sends requests to the service of that name, whatever their method.
    #[must_use]
    pub fn to(service: &str) -> Self {
        Self { methods: Vec::new(), service: Destination::new(service), timeout: None, policies: Matched::new("") }
    }

    /// Takes this method, and no other that is not named as well. `GET` takes `HEAD` along.
    #[must_use]
    pub fn method(mut self, method: Method) -> Self {
        if method == Method::GET {
            self.methods.push(Method::HEAD);
        }
        self.methods.push(method);
        self
    }

    /// Answers with 504 what takes longer, other attempts and the body included. By default nothing but the caller's own
    /// deadline ends a request.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// What is asked of callers.
    #[must_use]
    pub fn auth(self, policy: portcullis_auth::Policy) -> Self {
        self.with_policy(policy)
    }

    /// How often callers may come.
    #[must_use]
    pub fn rate_limit(self, policy: portcullis_rate_limit::Policy) -> Self {
        self.with_policy(policy)
    }

    /// How endpoints are tried.
    #[must_use]
    pub fn balance(self, policy: portcullis_balance::Policy) -> Self {
        self.with_policy(policy)
    }

    /// How requests are sent and shaped.
    #[must_use]
    pub fn forward(self, policy: portcullis_forward::Policy) -> Self {
        self.with_policy(policy)
    }

    /// A policy for a layer of one's own, which finds it with [`portcullis_core::Route::policy`].
    #[must_use]
    pub fn with_policy<P: Any + Send + Sync>(mut self, policy: P) -> Self {
        self.policies = self.policies.with_policy(policy);
        self
    }

    pub(super) fn target(&self, pattern: &str) -> Target {
        Target { route: self.policies.clone().named(pattern), service: self.service.clone(), timeout: self.timeout }
    }

    pub(super) fn policy<P: Any + Send + Sync>(&self) -> Option<&P> {
        self.policies.policy()
    }
}
