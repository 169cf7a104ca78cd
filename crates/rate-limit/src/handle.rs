//! Reading and changing a layer's limits while they are in use.

use std::sync::Arc;

use http::Request;

use crate::key::RequestHead;
use crate::limit::Limit;
use crate::limiter::{Delay, Limiter};
use crate::rate::Rate;

/// Reads and changes what the services of one layer do, while they run.
#[derive(Clone, Debug)]
pub struct Handle {
    pub(crate) limiter: Arc<Limiter>,
}

/// What a layer did so far, and how full it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Charges made: one for each limit of a request.
    pub admitted: u64,
    /// Requests refused.
    pub refused: u64,
    /// Times a [shadow](Limit::shadow) would have refused.
    pub shadowed: u64,
    /// Requests that were made to wait instead.
    pub delayed: u64,
    /// Requests that wait now.
    pub waiting: usize,
    /// Places of concurrency limits that are taken now.
    pub in_flight: u64,
    /// Charges made on a bucket that newcomers share, since there was no place left.
    pub overflowed: u64,
    /// Keys that have a place and say something.
    pub live: usize,
    /// Places there are; between four and five for each key of the capacity, so that hashing does not get in the way.
    pub places: usize,
    /// Buckets shared by newcomers that are in use.
    pub overflowing: usize,
    /// Such buckets there are.
    pub buckets: usize,
    /// The memory of the table in bytes; it grows only when a limit of another span is asked for the first time.
    pub bytes: usize,
}

// === impl Handle ===

impl Handle {
    /// Gives the limit of that name another rate; its callers keep their debts, in time. `false` if there is none, or none
    /// that has a rate.
    pub fn set_rate(&self, name: &str, rate: Rate) -> bool {
        let found = self.limits().iter().any(|limit| limit.name() == name && limit.rate().is_some());
        self.limiter.limits.change(|limits| {
            let mut limits = limits.to_vec();
            limits.iter_mut().filter(|limit| limit.name() == name).for_each(|limit| _ = limit.set_rate(rate));
            limits
        });
        if found {
            tracing::info!(limit = name, ?rate, "a limit's rate was changed");
        }
        found
    }

    /// Gives back so many units of the limit of that name to the caller of `request`: for what should not have counted, such
    /// as a request that failed through no fault of theirs. The request need not be the one that was charged, only of the
    /// same caller and route.
    ///
    /// Nobody gets more than a whole burst. What a charge took comes back by itself as time passes, and this comes on top,
    /// so refund at once; a cost that is known when the response has ended is better [settled](Limit::settle), which counts
    /// that time. With a refund a window sees at most `burst + rate · time`, and what was refunded.
    ///
    /// `false` if nothing was given back: the request is exempt or has no such limit, that counts requests at the same time
    /// or in a store, or the caller has no place of their own.
    pub fn refund<B>(&self, name: &str, request: &Request<B>, units: u32) -> bool {
        let limiter = &self.limiter;
        let head = RequestHead::new(request, &limiter.proxies);
        #[cfg(feature = "redis")]
        if limiter.store.is_some() {
            return false;
        }
        !limiter.is_exempt(&head) && limiter.refund(name, &head, units)
    }

    /// Replaces all limits of the layer. Those that keep their name keep their counters.
    pub fn set_limits(&self, limits: impl IntoIterator<Item = Limit>) {
        let limits: Vec<Limit> = limits.into_iter().collect();
        tracing::debug!(limits = ?limits.iter().map(Limit::name).collect::<Vec<_>>(), "the limits were changed");
        self.limiter.limits.change(|before| {
            let counting = |limit: &Limit| match before.iter().find(|other| other.name() == limit.name()) {
                Some(other) => limit.clone().counting_as(other),
                None => limit.clone(),
            };
            limits.iter().map(counting).collect()
        });
    }

    /// The limits of the layer.
    #[must_use]
    pub fn limits(&self) -> Vec<Limit> {
        self.limiter.limits.to_vec()
    }

    /// What happened so far. It looks at every place: not for every request.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let (counters, table) = (&self.limiter.counters, &self.limiter.table);
        let fill = table.fill(self.limiter.clock.now().as_nanos());
        Stats {
            admitted: counters.sum(|counts| &counts.admitted),
            refused: counters.sum(|counts| &counts.refused),
            shadowed: counters.sum(|counts| &counts.shadowed),
            delayed: counters.sum(|counts| &counts.delayed),
            waiting: self.limiter.delay.as_ref().map_or(0, Delay::waiting),
            in_flight: self.limiter.places_held(),
            overflowed: counters.sum(|counts| &counts.overflowed),
            live: fill.live,
            places: fill.entries,
            overflowing: fill.overflowing,
            buckets: fill.sets,
            bytes: table.bytes(),
        }
    }
}
