//! How often to ask when everything changes.

use std::time::Duration;

use portcullis_core::Moment;

/// A token bucket: `burst` at once, then one for each `every`.
#[derive(Clone, Debug)]
pub(crate) struct Pace {
    burst: u32,
    every: Duration,
    /// When the bucket is full again.
    full: Moment,
}

// === impl Pace ===

impl Pace {
    pub(crate) const fn new(burst: u32, every: Duration) -> Self {
        Self { burst, every, full: Moment::MIN }
    }

    /// Takes a place, and says how long to wait before using it.
    pub(crate) fn take(&mut self, now: Moment) -> Duration {
        self.full = self.full.max(now) + self.every;
        self.full.since(now).saturating_sub(self.every.saturating_mul(self.burst))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_burst_is_free_and_then_it_is_one_at_a_time() {
        let (second, mut now) = (Duration::from_secs(1), Moment::from_nanos(1 << 50));
        let mut pace = Pace::new(2, second);
        assert_eq!([pace.take(now), pace.take(now), pace.take(now)], [Duration::ZERO, Duration::ZERO, second]);
        now = now + second * 10;
        assert_eq!([pace.take(now), pace.take(now), pace.take(now)], [Duration::ZERO, Duration::ZERO, second]);
    }

    proptest! {
        #[test]
        fn no_window_sees_more_than_burst_and_rate(gaps in proptest::collection::vec(0_u64..2000, 1..100)) {
            let mut pace = Pace::new(3, Duration::from_millis(500));
            let mut now = Moment::from_nanos(1 << 50);
            let start = now;
            let mut uses = Vec::new();
            for gap in gaps {
                now = now + Duration::from_millis(gap);
                now = now + pace.take(now);
                uses.push(now.since(start).as_millis());
            }
            for (i, from) in uses.iter().enumerate() {
                for (j, to) in uses.iter().enumerate().skip(i) {
                    prop_assert!(((j - i) as u128) < 3 + (to - from) / 500 + 1);
                }
            }
        }
    }
}
