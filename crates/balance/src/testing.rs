//! Candidates for tests of policies.

use std::net::SocketAddr;
use std::ops::Index;
use std::time::Duration;

use http::Request;
use portcullis_core::{Clock, Endpoint, Endpoints, Instance, ManualClock, Moment};

use crate::group::Group;
use crate::pick::{Asked, Candidates, Pick};

/// Endpoints of certain weights, on a clock that starts at a moment of its own.
pub(crate) struct Set {
    pub(crate) endpoints: Endpoints,
    group: Group,
    clock: Clock,
    hand: ManualClock,
    request: Request<()>,
}

impl Set {
    pub(crate) fn of(weights: &[u32]) -> Self {
        let instances = weights.iter().enumerate().map(|(i, weight)| {
            let mut instance = Instance::new(format!("{i}"), SocketAddr::from(([10, 0, 0, 1], 1000 + i as u16)));
            instance.weight = *weight;
            instance
        });
        let endpoints = Endpoints::none("s").reconcile(instances, Moment::MIN);
        let members: Vec<_> = weights.iter().enumerate().map(|(i, weight)| (i as u32, *weight)).collect();
        let (clock, hand) = Clock::manual();
        Self { endpoints, group: Group::new(&members, weights.len()), clock, hand, request: Request::default() }
    }

    pub(crate) fn advance(&self, by: Duration) {
        self.hand.advance(by);
    }

    pub(crate) fn now(&self) -> Moment {
        self.clock.now()
    }

    pub(crate) fn pick(&self, policy: &(impl Pick + ?Sized)) -> usize {
        self.candidates(&[]).ask(policy)
    }

    pub(crate) fn candidates<'a>(&'a self, tried: &'a [Endpoint]) -> Candidates<'a> {
        Candidates::new(&self.endpoints, &self.group, Asked::of(&self.request), tried, &self.clock)
    }
}

impl Candidates<'_> {
    fn ask(&self, policy: &(impl Pick + ?Sized)) -> usize {
        policy.pick(self).unwrap()
    }
}

impl Index<usize> for Set {
    type Output = Endpoint;

    fn index(&self, index: usize) -> &Endpoint {
        &self.endpoints[index]
    }
}
