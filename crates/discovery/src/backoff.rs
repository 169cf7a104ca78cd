//! How long to wait after a failure.

use std::time::Duration;

/// Doubles from a floor to a ceiling; each wait is drawn from the upper half of its step, so that many who failed
/// together do not return together.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    floor: Duration,
    ceiling: Duration,
    failures: u32,
}

// === impl Backoff ===

impl Backoff {
    pub(crate) const FLOOR: Duration = Duration::from_millis(250);
    pub(crate) const CEILING: Duration = Duration::from_secs(30);

    pub(crate) const fn new() -> Self {
        Self::between(Self::FLOOR, Self::CEILING)
    }

    pub(crate) const fn between(floor: Duration, ceiling: Duration) -> Self {
        Self { floor, ceiling, failures: 0 }
    }

    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }

    /// The wait after one more failure; `random` is drawn from 0..1.
    pub(crate) fn next(&mut self, random: f64) -> Duration {
        let step = self.floor.saturating_mul(1 << self.failures.min(20)).min(self.ceiling);
        self.failures = self.failures.saturating_add(1);
        // Not below the floor: the first step has no lower half.
        step.mul_f64(0.5 + 0.5 * random.clamp(0.0, 1.0)).max(self.floor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn it_doubles_to_the_ceiling_and_starts_anew() {
        let mut backoff = Backoff::new();
        let waits: Vec<_> = (0..9).map(|_| backoff.next(1.0).as_millis()).collect();
        assert_eq!(waits, [250, 500, 1000, 2000, 4000, 8000, 16000, 30000, 30000]);
        backoff.reset();
        assert_eq!(backoff.next(0.0), Backoff::FLOOR);
    }

    proptest! {
        #[test]
        fn a_wait_lies_between_floor_and_ceiling(failures in 0_u32..100, random in 0.0_f64..1.0) {
            let mut backoff = Backoff::new();
            for _ in 0..failures {
                backoff.next(random);
            }
            let wait = backoff.next(random);
            prop_assert!(wait >= Backoff::FLOOR && wait <= Backoff::CEILING);
        }
    }
}
