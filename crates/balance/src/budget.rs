//! How many requests may be repeated.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use portcullis_core::{Clock, Moment, PerThread};

/// How many requests may be repeated: a share of all, and a few beyond that, over a sliding window. All clones are one
/// budget, whatever the number of connections, routes or threads.
///
/// It keeps retries from multiplying the load on a service that is failing because of load. What was not sent costs
/// nothing: trying it elsewhere is no more load. By default one in five requests and ten a second, over ten seconds, as in
/// Finagle.
///
/// Counting a request is one atomic addition; only a repetition, and one request in 64, reads the clock and takes a lock.
#[derive(Clone)]
pub struct Budget(Arc<Inner>);

struct Inner {
    /// Out of a thousand.
    share: u64,
    /// Whole repetitions there are without any request in the window.
    reserve: u64,
    slice: Duration,
    /// Requests since the window last moved.
    begun: PerThread<AtomicU64>,
    window: Mutex<Window>,
}

/// The last slices of time, the current one first.
#[derive(Default)]
struct Window {
    current: u64,
    slices: [Slice; SLICES],
}

#[derive(Clone, Copy, Default)]
struct Slice {
    requests: u64,
    repeated: u64,
}

const SLICES: usize = 10;
/// After so many requests of a thread the window is moved: no more than that can be counted in a time later than their
/// own.
const MOVED: u64 = 64;
const SHARE: f64 = 0.2;
const PER_SECOND: u32 = 10;
const WINDOW: Duration = Duration::from_secs(10);

// === impl Budget ===

impl Budget {
    /// `share` of all requests and `per_second` beyond that, counted over `window`. The share is exact to a thousandth, and
    /// at most 10; the window is at least ten milliseconds.
    #[must_use]
    pub fn new(share: f64, per_second: u32, window: Duration) -> Self {
        let window = window.max(Duration::from_millis(10));
        let share = if share.is_finite() { (share.clamp(0.0, 10.0) * 1000.0).round() as u64 } else { 0 };
        let reserve = (f64::from(per_second) * window.as_secs_f64()) as u64;
        Self(Arc::new(Inner {
            share,
            reserve,
            slice: window / SLICES as u32,
            begun: PerThread::default(),
            window: Mutex::default(),
        }))
    }

    /// Counts a request.
    pub(crate) fn deposit(&self, clock: &Clock) {
        let begun = self.0.begun.here().fetch_add(1, Ordering::Relaxed);
        if begun >= MOVED - 1
            && let Ok(mut window) = self.0.window.try_lock()
        {
            self.0.advance(&mut window, clock.now());
        }
    }

    /// Whether a request may be repeated now; if so, that is counted.
    pub(crate) fn withdraw(&self, now: Moment) -> bool {
        let inner = &*self.0;
        let mut window = inner.window.lock().unwrap_or_else(PoisonError::into_inner);
        inner.advance(&mut window, now);
        if inner.left(&window) < 1000 {
            return false;
        }
        window.slices[0].repeated += 1;
        true
    }

    /// How many requests could be repeated now.
    #[must_use]
    pub fn left(&self, now: Moment) -> u64 {
        let mut window = self.0.window.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.advance(&mut window, now);
        self.0.left(&window) / 1000
    }
}

impl Default for Budget {
    fn default() -> Self {
        Self::new(SHARE, PER_SECOND, WINDOW)
    }
}

impl fmt::Debug for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Budget").field("share", &self.0.share).field("reserve", &self.0.reserve).finish_non_exhaustive()
    }
}

// === impl Inner ===

impl Inner {
    fn advance(&self, window: &mut Window, now: Moment) {
        let slice = now.as_nanos() / u64::try_from(self.slice.as_nanos()).unwrap_or(u64::MAX).max(1);
        let passed = usize::try_from(slice.saturating_sub(window.current)).unwrap_or(usize::MAX).min(SLICES);
        if passed > 0 {
            window.slices.rotate_right(passed);
            window.slices[..passed].fill(Slice::default());
            window.current = slice;
        }
        window.slices[0].requests += self.begun.iter().map(|begun| begun.swap(0, Ordering::Relaxed)).sum::<u64>();
    }

    /// In thousandths of a repetition.
    fn left(&self, window: &Window) -> u64 {
        let (requests, repeated) =
            window.slices.iter().fold((0, 0), |sum, slice| (sum.0 + slice.requests, sum.1 + slice.repeated));
        let allowed = requests.saturating_mul(self.share).saturating_add(self.reserve.saturating_mul(1000));
        allowed.saturating_sub(repeated.saturating_mul(1000))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Moment {
        Moment::from_nanos((1_000_000 + millis) * 1_000_000)
    }

    fn spend(budget: &Budget, now: Moment) -> usize {
        (0..10_000).take_while(|_| budget.withdraw(now)).count()
    }

    #[test]
    fn a_share_of_requests_may_be_repeated_exactly() {
        let (clock, _hand) = Clock::manual();
        for (share, requests, expected) in [(0.2, 1000, 200), (0.2, 9, 1), (0.001, 1999, 1), (0.333, 1000, 333)] {
            let budget = Budget::new(share, 0, WINDOW);
            (0..requests).for_each(|_| budget.deposit(&clock));
            assert_eq!(spend(&budget, clock.now()), expected, "{share} of {requests}");
        }
    }

    #[test]
    fn fractions_add_up() {
        let (clock, _hand) = Clock::manual();
        let budget = Budget::new(0.2, 0, WINDOW);
        let repeated = (0..1000).filter(|_| {
            budget.deposit(&clock);
            budget.withdraw(clock.now())
        });
        assert_eq!(repeated.count(), 200);
    }

    #[test]
    fn a_few_may_be_repeated_without_any_traffic_but_not_ever_more() {
        let budget = Budget::default();
        assert_eq!(spend(&budget, at(0)), 100);
        assert_eq!(spend(&budget, at(5000)), 0);
        assert_eq!(spend(&budget, at(11_000)), 100, "the window has moved on");
        assert_eq!(budget.left(at(11_000)), 0);
    }

    #[test]
    fn what_was_long_ago_counts_no_more() {
        let (clock, hand) = Clock::manual();
        let budget = Budget::new(0.5, 0, WINDOW);
        (0..640).for_each(|_| budget.deposit(&clock));
        hand.advance(Duration::from_secs(9));
        assert_eq!(budget.left(clock.now()), 320);
        hand.advance(Duration::from_secs(2));
        assert_eq!(budget.left(clock.now()), 0);
    }

    #[test]
    fn threads_share_one_budget() {
        let (clock, _hand) = Clock::manual();
        let budget = Budget::new(0.2, 0, WINDOW);
        let repeated: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    let (budget, clock) = (budget.clone(), clock.clone());
                    scope.spawn(move || {
                        (0..5000)
                            .filter(|_| {
                                budget.deposit(&clock);
                                budget.withdraw(clock.now())
                            })
                            .count()
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(repeated, 4000);
    }
}
