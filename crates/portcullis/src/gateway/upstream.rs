//! The way from a service's name to its endpoints, one for each service that has its own.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::Request;
use portcullis_balance::{Balance, BalanceLayer, Pick, PowerOfTwo};
use portcullis_circuit_break::{CircuitBreak, CircuitBreakLayer};
use portcullis_core::{Carried, Destination, Layer};
use portcullis_discovery::{Discovery, DiscoveryLayer, Registry};
use portcullis_forward::{BoxError, Forward};
use tower_layer::Layer as _;
use tower_service::Service;

use super::observe::{Passed, Sent};

/// How requests reach a service: where its endpoints are found, how one is picked, when it is kept away from, and how it is
/// talked to. Clones share all state: a gateway built anew with a clone goes on where the old one was.
#[derive(Clone)]
pub struct Upstream {
    pub(super) discovery: DiscoveryLayer,
    pub(super) balance: BalanceLayer<Arc<dyn Pick>>,
    pub(super) circuit_break: CircuitBreakLayer,
    pub(super) forward: Forward,
}

/// The layers below the rate limit, in the order a request travels.
pub(super) type Way = Discovery<Passed<Balance<CircuitBreak<Sent<Forward>>, Arc<dyn Pick>>>>;

/// Sends each request the way of the service it asks for.
#[derive(Clone)]
pub(super) struct Ways(Arc<All>);

struct All {
    others: Way,
    /// Seeded, and quick: no caller chooses the names.
    own: HashMap<Arc<str>, Way, foldhash::fast::RandomState>,
}

// === impl Upstream ===

impl Upstream {
    /// Finds endpoints in `registry`; the rest is as each layer has it.
    #[must_use]
    pub fn new(registry: impl Registry) -> Self {
        Self {
            discovery: DiscoveryLayer::new(registry),
            balance: BalanceLayer::new(Arc::new(PowerOfTwo) as Arc<dyn Pick>),
            circuit_break: CircuitBreakLayer::new(),
            forward: Forward::new(),
        }
    }

    /// Replaces the discovery layer, to set more than its registry.
    #[must_use]
    pub fn with_discovery(mut self, layer: DiscoveryLayer) -> Self {
        self.discovery = layer;
        self
    }

    /// Replaces the balance layer.
    #[must_use]
    pub fn with_balance(mut self, layer: BalanceLayer<Arc<dyn Pick>>) -> Self {
        self.balance = layer;
        self
    }

    /// Replaces the circuit-break layer. It guards each endpoint by itself.
    #[must_use]
    pub fn with_circuit_break(mut self, layer: CircuitBreakLayer) -> Self {
        self.circuit_break = layer;
        self
    }

    /// Replaces what sends requests on.
    #[must_use]
    pub fn with_forward(mut self, forward: Forward) -> Self {
        self.forward = forward;
        self
    }

    fn way(&self) -> Way {
        let send = self.circuit_break.layer(Sent::new(self.forward.clone()));
        self.discovery.layer(Passed::new(Layer::Discovery, self.balance.layer(send)))
    }
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream").field("discovery", &self.discovery).finish_non_exhaustive()
    }
}

// === impl Ways ===

impl Ways {
    pub(super) fn new(others: &Upstream, own: &HashMap<Arc<str>, Upstream>) -> Self {
        let own = own.iter().map(|(name, upstream)| (name.clone(), upstream.way())).collect();
        Self(Arc::new(All { others: others.way(), own }))
    }
}

impl<B> Service<Request<B>> for Ways
where
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    type Response = <Way as Service<Request<B>>>::Response;
    type Error = <Way as Service<Request<B>>>::Error;
    type Future = <Way as Service<Request<B>>>::Future;

    /// Every way ends in a service that is always ready.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let All { others, own } = &*self.0;
        let named = if own.is_empty() { None } else { Destination::of(request.extensions()) };
        let way = named.and_then(|destination| own.get(destination.name())).unwrap_or(others);
        way.clone().call(request)
    }
}
