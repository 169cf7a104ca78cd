//! How often, and the arithmetic of the generic cell rate algorithm.

use std::num::NonZeroU32;
use std::time::Duration;

use crate::Error;
use crate::table::END;

/// So many in a period, evenly spaced, and so many of them at once.
///
/// ```
/// use std::num::NonZeroU32;
/// use portcullis_rate_limit::Rate;
///
/// let rate = Rate::per_second(NonZeroU32::new(50).unwrap()).burst(NonZeroU32::new(10).unwrap());
/// assert_eq!((rate.count().get(), rate.burst_size().get()), (50, 10));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rate {
    count: NonZeroU32,
    period: Duration,
    burst: NonZeroU32,
}

/// A [`Rate`] as the algorithm has it, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cell {
    /// What one unit costs.
    pub(crate) interval: u64,
    /// How far ahead of now the arrival time may be.
    pub(crate) window: u64,
}

// === impl Rate ===

impl Rate {
    /// `count` in each `period`; as many at once, unless [told otherwise](Self::burst).
    ///
    /// # Errors
    ///
    /// A period of zero, and one of more than a year.
    pub const fn new(count: NonZeroU32, period: Duration) -> Result<Self, Error> {
        if period.is_zero() || period.as_secs() > 366 * 86_400 {
            return Err(Error::period());
        }
        Ok(Self { count, period, burst: count })
    }

    /// `count` in each second.
    #[must_use]
    pub const fn per_second(count: NonZeroU32) -> Self {
        Self { count, period: Duration::from_secs(1), burst: count }
    }

    /// `count` in each minute.
    #[must_use]
    pub const fn per_minute(count: NonZeroU32) -> Self {
        Self { count, period: Duration::from_secs(60), burst: count }
    }

    /// `count` in each hour.
    #[must_use]
    pub const fn per_hour(count: NonZeroU32) -> Self {
        Self { count, period: Duration::from_secs(3600), burst: count }
    }

    /// `count` in each day.
    #[must_use]
    pub const fn per_day(count: NonZeroU32) -> Self {
        Self { count, period: Duration::from_secs(86_400), burst: count }
    }

    /// How many may come at once after a long rest.
    #[must_use]
    pub const fn burst(mut self, burst: NonZeroU32) -> Self {
        self.burst = burst;
        self
    }

    /// How many in each [period](Self::period).
    #[must_use]
    pub const fn count(&self) -> NonZeroU32 {
        self.count
    }

    /// The period.
    #[must_use]
    pub const fn period(&self) -> Duration {
        self.period
    }

    /// How many may come at once.
    #[must_use]
    pub const fn burst_size(&self) -> NonZeroU32 {
        self.burst
    }

    /// Never more generous than the rate: what one unit costs is rounded up to a nanosecond.
    pub(crate) const fn cell(&self) -> Cell {
        let interval = self.period.as_nanos().div_ceil(self.count.get() as u128) as u64;
        Cell { interval, window: interval.saturating_mul(self.burst.get() as u64) }
    }
}

// === impl Cell ===

impl Cell {
    pub(crate) const fn cost(self, units: u32) -> u64 {
        self.interval.saturating_mul(units as u64)
    }

    /// The arrival time after a charge of `cost`, if it is within `window` from now.
    pub(crate) fn charge(time: u64, now: u64, cost: u64, window: u64) -> Option<u64> {
        let later = time.max(now).saturating_add(cost);
        (later <= now.saturating_add(window) && later < END).then_some(later)
    }

    /// How long until a charge of `cost` is possible, if nobody else comes; `None` when it never is.
    pub(crate) fn wait(time: u64, now: u64, cost: u64, window: u64) -> Option<Duration> {
        let ahead = time.max(now).saturating_sub(now).saturating_add(cost);
        (cost <= window).then(|| Duration::from_nanos(ahead.saturating_sub(window)))
    }

    /// Whole units that could be had now.
    pub(crate) fn remaining(self, time: u64, now: u64) -> u64 {
        self.window.saturating_sub(time.saturating_sub(now)) / self.interval
    }
}

pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn n(count: u32) -> NonZeroU32 {
        NonZeroU32::new(count).unwrap()
    }

    #[test]
    fn what_one_unit_costs_is_rounded_up() {
        assert_eq!(Rate::per_second(n(3)).cell().interval, 333_333_334);
        assert_eq!(Rate::per_second(n(1_000_000)).cell().interval, 1000);
        assert_eq!(Rate::per_second(n(u32::MAX)).cell().interval, 1);
        assert_eq!(Rate::per_day(n(1)).burst(n(u32::MAX)).cell().window, u64::MAX);
    }

    #[test]
    fn a_period_is_neither_zero_nor_beyond_a_year() {
        assert!(Rate::new(n(1), Duration::ZERO).is_err());
        assert!(Rate::new(n(1), Duration::MAX).is_err());
        assert!(Rate::new(n(1), Duration::from_nanos(1)).is_ok());
    }

    #[test]
    fn a_burst_and_then_one_each_interval() {
        let cell = Rate::per_second(n(10)).burst(n(2)).cell();
        let take = |time, now| Cell::charge(time, now, cell.interval, cell.window);
        let first = take(0, 1000).unwrap();
        let second = take(first, 1000).unwrap();
        assert_eq!(take(second, 1000), None);
        let wait = Cell::wait(second, 1000, cell.interval, cell.window).unwrap();
        assert_eq!(wait, Duration::from_millis(100));
        assert_eq!(take(second, 1000 + 99_999_999), None);
        assert!(take(second, 1000 + 100_000_000).is_some());
        assert_eq!(cell.remaining(first, 1000), 1);
        assert_eq!(Cell::wait(0, 0, cell.window + 1, cell.window), None);
    }
}
