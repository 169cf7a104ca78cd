//! Which endpoints of a set do worse than the others.
//!
//! A breaker alone cannot tell a sick endpoint from a bad hour of all of them. Compared with its neighbours, one that fails
//! a tenth of its calls stands out where the others fail none, and does not where they fail as many.

use std::cmp::Ordering;
use std::time::Duration;

use portcullis_core::Moment;

use crate::rules::{OpenTime, Share};

/// Opens the breakers of endpoints that do worse than the others of their service.
///
/// Every ten seconds, whoever comes next compares the shares of calls that succeeded since the last time. The defaults are
/// Envoy's, save that the open time doubles.
///
/// | setting | default |
/// |---|---|
/// | [`every`](Self::every) | 10 s |
/// | [`deviations`](Self::deviations) | 1.9 below the mean |
/// | [`failure_rate`](Self::failure_rate) | not looked at |
/// | [`calls`](Self::calls) | 100 each |
/// | [`endpoints`](Self::endpoints) | 5 of them |
/// | [`at_most`](Self::at_most) | a tenth, but one |
/// | [`open_for`](Self::open_for) | 30 s, doubling up to 5 min |
#[derive(Clone, Copy, Debug, PartialEq)]
#[must_use]
pub struct Outliers {
    pub(crate) every: Duration,
    deviations: Option<f64>,
    failed: Option<Share>,
    calls: u32,
    endpoints: usize,
    most: Share,
    pub(crate) open: OpenTime,
}

/// What an endpoint did since the last time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) calls: u32,
    pub(crate) failed: u32,
}

/// One that does worse.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Outlier {
    pub(crate) index: usize,
    tally: Tally,
    rate: f64,
}

// === impl Outliers ===

impl Outliers {
    /// By the deviation from the mean.
    pub fn new() -> Self {
        Self {
            every: Duration::from_secs(10),
            deviations: Some(1.9),
            failed: None,
            calls: 100,
            endpoints: 5,
            most: Share::TENTH,
            open: OpenTime::growing(Duration::from_secs(30), Duration::from_secs(300)).jitter(None),
        }
    }

    /// Compares so often; at least every 100 ms.
    pub fn every(mut self, time: Duration) -> Self {
        self.every = time.max(Duration::from_millis(100));
        self
    }

    /// Opens where the share of calls that succeeded is more than so many standard deviations below the mean of all. `None`
    /// does not look at that; nor is a number looked at that is none, or negative.
    pub fn deviations(mut self, deviations: Option<f64>) -> Self {
        self.deviations = deviations.filter(|number| *number >= 0.0);
        self
    }

    /// Opens where this share of the calls failed, or more.
    pub fn failure_rate(mut self, share: Option<Share>) -> Self {
        self.failed = share;
        self
    }

    /// Looks only at endpoints with so many calls since the last time.
    pub fn calls(mut self, calls: u32) -> Self {
        self.calls = calls.max(1);
        self
    }

    /// Compares only when there are so many of those.
    pub fn endpoints(mut self, endpoints: usize) -> Self {
        self.endpoints = endpoints;
        self
    }

    /// Opens none while this share of all endpoints is open already, whyever, but one may always be.
    pub fn at_most(mut self, share: Share) -> Self {
        self.most = share;
        self
    }

    /// Stays open for so long.
    pub fn open_for(mut self, time: impl Into<OpenTime>) -> Self {
        self.open = time.into();
        self
    }

    /// How many of so many endpoints may be open.
    pub(crate) fn room(&self, endpoints: usize) -> usize {
        let about = (endpoints as f64 * self.most.as_f64()) as usize;
        // The product may fall short of a whole number that the share says.
        let whole = |n: usize| self.most.as_f64() >= n as f64 / endpoints as f64;
        if about < endpoints && whole(about + 1) { about + 1 } else { about.max(1) }
    }

    /// Those that do worse, the worst first.
    pub(crate) fn find(&self, tallies: &[Tally]) -> Vec<Outlier> {
        let rated = tallies.iter().enumerate().filter(|(_, tally)| tally.calls >= self.calls);
        let rate = |tally: &Tally| 1.0 - f64::from(tally.failed) / f64::from(tally.calls);
        let rated = rated.map(|(index, tally)| Outlier { index, tally: *tally, rate: rate(tally) });
        let mut rated: Vec<_> = rated.collect();
        if rated.is_empty() || rated.len() < self.endpoints {
            return Vec::new();
        }
        let count = rated.len() as f64;
        let mean = rated.iter().map(|one| one.rate).sum::<f64>() / count;
        let variance = rated.iter().map(|one| (one.rate - mean).powi(2)).sum::<f64>() / count;
        let least = self.deviations.map(|deviations| mean - deviations * variance.sqrt());
        rated.retain(|one| {
            let far_below = least.is_some_and(|least| one.rate < least);
            far_below || self.failed.is_some_and(|share| share.reached(one.tally.failed, one.tally.calls))
        });
        rated.sort_by(|a, b| a.rate.partial_cmp(&b.rate).unwrap_or(Ordering::Equal));
        rated
    }
}

impl Default for Outliers {
    fn default() -> Self {
        Self::new()
    }
}

impl Tally {
    pub(crate) const fn one(failed: bool) -> u64 {
        1 | (failed as u64) << 32
    }

    pub(crate) const fn of(bits: u64) -> Self {
        Self { calls: bits as u32, failed: (bits >> 32) as u32 }
    }
}

/// When to compare next, for the whole service; taken by whoever comes first.
#[derive(Debug, Default)]
pub(crate) struct Due(std::sync::atomic::AtomicU64);

impl Due {
    /// How late it is, if it is time.
    pub(crate) fn take(&self, now: Moment, every: Duration) -> Option<Duration> {
        use std::sync::atomic::Ordering::Relaxed;
        let due = self.0.load(Relaxed);
        if now.as_nanos() < due {
            return None;
        }
        let next = (now + every).as_nanos();
        // The very first only sets the time.
        let is_mine = self.0.compare_exchange(due, next, Relaxed, Relaxed).is_ok() && due != 0;
        is_mine.then(|| now.since(Moment::from_nanos(due)))
    }
}

#[cfg(all(test, not(portcullis_loom)))]
mod tests {
    use super::*;

    fn found(outliers: Outliers, failed_of_1000: &[u32]) -> Vec<usize> {
        let tallies: Vec<_> = failed_of_1000.iter().map(|failed| Tally { calls: 1000, failed: *failed }).collect();
        outliers.find(&tallies).iter().map(|one| one.index).collect()
    }

    #[test]
    fn one_that_fails_where_others_do_not_stands_out() {
        assert_eq!(found(Outliers::new(), &[0, 0, 0, 0, 100]), [4]);
        assert_eq!(found(Outliers::new(), &[10, 12, 300, 9, 11, 10, 8]), [2]);
    }

    #[test]
    fn a_bad_hour_of_all_is_nobodys_fault() {
        assert_eq!(found(Outliers::new(), &[500, 510, 490, 505, 495]), [0; 0]);
        assert_eq!(found(Outliers::new(), &[1000; 6]), [0; 0]);
    }

    #[test]
    fn too_few_endpoints_or_calls_are_not_compared() {
        assert_eq!(found(Outliers::new(), &[0, 0, 0, 900]), [0; 0]);
        assert_eq!(found(Outliers::new().calls(1001), &[0, 0, 0, 0, 900]), [0; 0]);
        assert_eq!(found(Outliers::new().endpoints(4).deviations(Some(1.5)), &[0, 0, 0, 900]), [3]);
    }

    #[test]
    fn a_failure_rate_needs_no_neighbours_to_differ() {
        let share = Share::new(0.85).ok();
        let outliers = Outliers::new().deviations(None).failure_rate(share);
        assert_eq!(found(outliers, &[850, 849, 900, 0, 1000]), [4, 2, 0], "the worst first");
        for failed in 1..=1000 {
            let share = Share::new(f64::from(failed) / 1000.0).ok();
            let outliers = Outliers::new().deviations(None).failure_rate(share).endpoints(1);
            assert_eq!((found(outliers, &[failed]), found(outliers, &[failed - 1])), (vec![0], vec![]), "{failed}");
        }
    }

    #[test]
    fn a_tenth_may_be_open_but_one() {
        let rooms = [1, 5, 10, 19, 20, 100].map(|endpoints| Outliers::new().room(endpoints));
        assert_eq!(rooms, [1, 1, 1, 1, 2, 10]);
        let exact = |share| Outliers::new().at_most(Share::new(share).unwrap()).room(100);
        assert_eq!([0.29, 0.57, 0.58, 0.999, 1.0].map(exact), [29, 57, 58, 99, 100]);
    }

    #[test]
    fn nonsense_is_not_looked_at() {
        for number in [f64::NAN, -1.0] {
            assert_eq!(Outliers::new().deviations(Some(number)).deviations, None);
        }
    }

    #[test]
    fn one_of_many_compares() {
        let (due, every, start) = (Due::default(), Duration::from_secs(10), Moment::from_nanos(1 << 52));
        assert_eq!(due.take(start, every), None, "nothing to compare yet");
        assert_eq!(due.take(start + every / 2, every), None);
        assert_eq!([(); 2].map(|()| due.take(start + every, every)), [Some(Duration::ZERO), None]);
        assert_eq!(due.take(start + every * 5, every), Some(every * 3));
    }
}
