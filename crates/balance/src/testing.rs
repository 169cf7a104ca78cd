//! Candidates for tests of policies.

use std::net::SocketAddr;
use std::ops::Index;
use std::time::Duration;

use http::Request;
use portcullis_core::{Clock, Endpoint, Endpoints, Instance, ManualClock, Moment, Mover};

use crate::group::Group;
use crate::pick::{Asked, Candidates, Pick};
use crate::policy::Reason;
use crate::served::Failed;
use crate::shape::Shape;
use crate::view::Terms;

/// Endpoints of certain weights, on a clock of their own.
pub(crate) struct Set {
    pub(crate) endpoints: Endpoints,
    group: Group,
    clock: Clock,
    hand: ManualClock,
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
        Self { endpoints, group: Group::new(&members, weights.len()), clock, hand }
    }

    pub(crate) fn advance(&self, by: Duration) {
        self.hand.advance(by);
    }

    pub(crate) fn now(&self) -> Moment {
        self.clock.now()
    }

    pub(crate) fn close(&self, index: usize) {
        self[index].gate().close_for(Mover::new());
    }

    pub(crate) fn pick(&self, policy: &dyn Pick) -> usize {
        self.pick_for(policy, &Request::default())
    }

    pub(crate) fn pick_for(&self, pick: &dyn Pick, request: &Request<()>) -> usize {
        self.among(request, |among| {
            pick.prepare(among);
            pick.pick(among).unwrap()
        })
    }

    /// For a request that those at `failed` have failed already.
    pub(crate) fn pick_after(&self, pick: &dyn Pick, failed: &[usize]) -> usize {
        let failure = |i: &usize| Failed { endpoint: self[*i].clone(), reason: Reason::Unsent };
        let tried: Vec<_> = failed.iter().map(failure).collect();
        self.among_after(&Request::default(), &tried, |among| pick.pick(among).unwrap())
    }

    pub(crate) fn among<R>(&self, request: &Request<()>, look: impl FnOnce(&Candidates<'_>) -> R) -> R {
        self.among_after(request, &[], look)
    }

    fn among_after<R>(&self, request: &Request<()>, tried: &[Failed], look: impl FnOnce(&Candidates<'_>) -> R) -> R {
        let (shape, asked) = (Shape::default(), Asked::of(request));
        let terms = Terms { shape: &shape, subset: None, asked: &asked, tried, clock: &self.clock };
        look(&Candidates::new(&self.endpoints, &self.group, false, &terms))
    }
}

impl Index<usize> for Set {
    type Output = Endpoint;

    fn index(&self, index: usize) -> &Endpoint {
        &self.endpoints[index]
    }
}

/// A request whose path is this key.
pub(crate) fn asking(key: usize) -> Request<()> {
    Request::get(format!("/{key}")).body(()).unwrap()
}

/// How much more than its share the endpoint has that has most, over so many keys.
pub(crate) fn spread(policy: &dyn Pick, weights: &[u32], keys: usize) -> f64 {
    let set = Set::of(weights);
    let mut seen = vec![0_u32; weights.len()];
    (0..keys).for_each(|key| seen[set.pick_for(policy, &asking(key))] += 1);
    let total: u32 = weights.iter().sum();
    let share = |(seen, weight): (&u32, &u32)| f64::from(*seen) * f64::from(total) / f64::from(*weight) / keys as f64;
    seen.iter().zip(weights).map(share).fold(0.0, f64::max)
}
