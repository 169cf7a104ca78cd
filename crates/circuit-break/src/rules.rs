//! When a breaker opens, for how long, and what closes it.

use std::fmt;
use std::num::NonZeroU16;
use std::time::Duration;

use portcullis_core::Moment;

use crate::outlier::Outliers;

/// Over which calls a share is measured, and which share opens the breaker.
///
/// A window alone opens nothing: say [`failure_rate`](Self::failure_rate), [`slow_rate`](Self::slow_rate) or both.
#[derive(Clone, Copy, Debug, PartialEq)]
#[must_use]
pub struct Window {
    pub(crate) span: Span,
    pub(crate) at_least: u32,
    pub(crate) failed: Option<Share>,
    pub(crate) slow: Option<(Duration, Share)>,
}

/// A part of a whole: more than nothing, at most everything.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Share(f64);

/// How long a breaker stays open.
///
/// Every time it opens again without having been well for as long as it was to be open before, jitter and `Retry-After` aside,
/// it stays open twice as long, up to a limit; for each such time it is well, one doubling is forgotten.
#[derive(Clone, Copy, Debug, PartialEq)]
#[must_use]
pub struct OpenTime {
    first: Duration,
    limit: Duration,
    jitter: f64,
    asked: Duration,
}

/// A setting that makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Error(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Share,
    Calls,
    Time,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Span {
    Calls(u16),
    Time(Duration),
}

/// Everything a breaker is told once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub(crate) failures: u16,
    pub(crate) calls: Option<Window>,
    pub(crate) time: Option<Window>,
    pub(crate) open: OpenTime,
    pub(crate) probes: NonZeroU16,
    pub(crate) successes: NonZeroU16,
    pub(crate) probe_timeout: Duration,
    pub(crate) outliers: Option<Outliers>,
}

pub(crate) const FAILURES: u16 = 5;
pub(crate) const OPEN_FOR: Duration = Duration::from_secs(60);
pub(crate) const PROBE_TIMEOUT: Duration = Duration::from_secs(10);
const ASKED: Duration = Duration::from_secs(300);
const AT_LEAST: u32 = 20;
const MOST_CALLS: u16 = 1000;
const SHORTEST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(3600);

// === impl Window ===

impl Window {
    /// The last `calls`, exactly.
    ///
    /// # Errors
    ///
    /// Unless it is 1 to 1000.
    pub const fn of_calls(calls: u16) -> Result<Self, Error> {
        if calls == 0 || calls > MOST_CALLS {
            return Err(Error(Kind::Calls));
        }
        let at_least = if AT_LEAST < calls as u32 { AT_LEAST } else { calls as u32 };
        Ok(Self { span: Span::Calls(calls), at_least, failed: None, slow: None })
    }

    /// The calls that ended within `time`, in ten buckets: the one that is filling and the nine before it. A bucket counts
    /// its first 262,143 calls, so that with more than that in a tenth of `time` a change may be seen a bucket later.
    ///
    /// # Errors
    ///
    /// Unless it is 100 ms to an hour.
    pub fn of_time(time: Duration) -> Result<Self, Error> {
        if time < SHORTEST || time > LONGEST {
            return Err(Error(Kind::Time));
        }
        Ok(Self { span: Span::Time(time), at_least: AT_LEAST, failed: None, slow: None })
    }

    /// Opens when this share of the calls failed, or more.
    pub const fn failure_rate(mut self, share: Share) -> Self {
        self.failed = Some(share);
        self
    }

    /// Opens when this share of the calls, or more, took `after` or longer until the head of their response, or until
    /// they broke off without one. A probe that takes so long has failed.
    pub const fn slow_rate(mut self, after: Duration, share: Share) -> Self {
        self.slow = Some((after, share));
        self
    }

    /// Does not look at shares of fewer calls than this. Default 20, or all the calls of a smaller window; more than all of
    /// them is taken for that.
    pub const fn at_least(mut self, calls: u32) -> Self {
        self.at_least = match self.span {
            Span::Calls(size) if calls > size as u32 => size as u32,
            Span::Calls(_) | Span::Time(_) => calls,
        };
        self
    }
}

// === impl Share ===

impl Share {
    pub(crate) const TENTH: Self = Self(0.1);

    /// `share` of everything, which is 1.
    ///
    /// # Errors
    ///
    /// Unless it is greater than 0 and at most 1.
    pub const fn new(share: f64) -> Result<Self, Error> {
        if share > 0.0 && share <= 1.0 { Ok(Self(share)) } else { Err(Error(Kind::Share)) }
    }

    /// As a number; everything is 1.
    #[must_use]
    pub const fn as_f64(self) -> f64 {
        self.0
    }

    /// Whether `part` of `whole`, which is not nothing, is this much. Divided, not multiplied: only then is 55 of 100 the
    /// share written 0.55.
    pub(crate) fn reached(self, part: u32, whole: u32) -> bool {
        f64::from(part) / f64::from(whole) >= self.0
    }
}

// === impl OpenTime ===

impl OpenTime {
    /// Always this long. No time is taken for a millisecond.
    pub fn fixed(time: Duration) -> Self {
        let time = time.max(Duration::from_millis(1));
        Self { first: time, limit: time, jitter: 0.0, asked: ASKED }
    }

    /// `first`, then twice as long each time, up to `limit`. With a jitter of a half: see [`jitter`](Self::jitter).
    pub fn growing(first: Duration, limit: Duration) -> Self {
        let fixed = Self::fixed(first);
        Self { limit: limit.max(fixed.first), jitter: 0.5, ..fixed }
    }

    /// Adds up to this part of the time at random, so that those who stopped together do not come back together. `None`
    /// adds nothing.
    pub fn jitter(mut self, share: Option<Share>) -> Self {
        self.jitter = share.map_or(0.0, Share::as_f64);
        self
    }

    /// When the response that opens the breaker asks for rest, by `retry-after` or `grpc-retry-pushback-ms`, it stays open
    /// that long at least, but not longer than this for it. Default five minutes; zero does not listen.
    pub const fn listen_up_to(mut self, limit: Duration) -> Self {
        self.asked = limit;
        self
    }

    /// How long to stay open for the `times`th time; `random` is in 0..1.
    pub(crate) fn for_the(&self, times: u32, random: f64, asked: Option<Duration>) -> Duration {
        let base = self.base(times);
        let jitter = base.as_secs_f64() * self.jitter * random.clamp(0.0, 1.0);
        let jittered = base.saturating_add(Duration::try_from_secs_f64(jitter).unwrap_or(Duration::MAX));
        // Jitter may exceed the limit, or all who reached it would come back together.
        jittered.max(asked.unwrap_or_default().min(self.asked))
    }

    /// One time more, unless that would be no longer.
    pub(crate) fn next(&self, times: u32) -> u32 {
        if times == 0 || self.base(times) < self.limit { times + 1 } else { times }
    }

    /// What is left of `times` after having been well for `well`.
    pub(crate) fn forgive(&self, mut times: u32, mut well: Duration) -> u32 {
        while times > 0 {
            let Some(rest) = well.checked_sub(self.base(times)) else { break };
            well = rest;
            times -= 1;
        }
        times
    }

    fn base(&self, times: u32) -> Duration {
        let doubled = 1_u32.checked_shl(times.saturating_sub(1)).unwrap_or(u32::MAX);
        self.first.saturating_mul(doubled).min(self.limit)
    }
}

impl From<Duration> for OpenTime {
    fn from(time: Duration) -> Self {
        Self::fixed(time)
    }
}

// === impl Rules ===

impl Rules {
    pub(crate) fn new() -> Self {
        Self {
            failures: FAILURES,
            calls: None,
            time: None,
            open: OpenTime::fixed(OPEN_FOR),
            probes: NonZeroU16::MIN,
            successes: NonZeroU16::MIN,
            probe_timeout: PROBE_TIMEOUT,
            outliers: None,
        }
    }

    /// Whether a success says nothing to a breaker that has seen no failure.
    pub(crate) fn are_brief(&self) -> bool {
        self.calls.is_none() && self.time.is_none() && self.outliers.is_none()
    }

    /// Whether how long a call took matters.
    pub(crate) fn time_calls(&self) -> bool {
        let slow = |window: &Option<Window>| window.is_some_and(|window| window.slow.is_some());
        slow(&self.calls) || slow(&self.time)
    }

    /// Whether a call took too long, for the window of calls and for that of time.
    pub(crate) fn find_slow(&self, took: Option<Duration>) -> [bool; 2] {
        [self.calls, self.time].map(|window| match (window.and_then(|window| window.slow), took) {
            (Some((after, _)), Some(took)) => took >= after,
            _ => false,
        })
    }

    pub(crate) fn ration(&self, until: Moment) -> portcullis_core::Ration {
        portcullis_core::Ration { until, places: self.probes.get(), every: self.probe_timeout }
    }
}

// === impl Error ===

impl Error {
    /// Whether a [`Share`] was out of range.
    #[must_use]
    pub fn is_share(&self) -> bool {
        self.0 == Kind::Share
    }

    /// Whether the size of a [`Window`] was out of range.
    #[must_use]
    pub fn is_window(&self) -> bool {
        matches!(self.0, Kind::Calls | Kind::Time)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Kind::Share => "a share must be greater than 0 and at most 1",
            Kind::Calls => "a window must hold 1 to 1000 calls",
            Kind::Time => "a window must last 100 ms to an hour",
        })
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn nonsense_is_refused() {
        for share in [0.0, -0.1, 1.1, f64::NAN, f64::INFINITY] {
            assert!(Share::new(share).unwrap_err().is_share(), "{share}");
        }
        assert!(Window::of_calls(0).unwrap_err().is_window());
        assert!(Window::of_calls(1001).is_err() && Window::of_calls(1000).is_ok());
        assert!(Window::of_time(Duration::ZERO).is_err() && Window::of_time(Duration::MAX).is_err());
    }

    #[test]
    fn a_share_is_reached_exactly() {
        for hundredths in 1..=100 {
            let share = Share::new(format!("{hundredths}e-2").parse().unwrap()).unwrap();
            assert!(share.reached(hundredths, 100) && !share.reached(hundredths - 1, 100), "{share:?}");
        }
    }

    #[test]
    fn more_calls_than_a_window_holds_are_never_waited_for() {
        assert_eq!(Window::of_calls(10).unwrap().at_least, 10);
        assert_eq!(Window::of_calls(10).unwrap().at_least(50).at_least, 10);
    }

    #[test]
    fn open_time_doubles_up_to_its_limit_and_never_overflows() {
        let open = OpenTime::growing(5 * S, 60 * S).jitter(None);
        let times: Vec<_> = [1, 2, 3, 4, 5, 40, u32::MAX].map(|n| open.for_the(n, 0.9, None).as_secs()).into();
        assert_eq!(times, [5, 10, 20, 40, 60, 60, 60]);
        let longest = OpenTime::growing(Duration::MAX, S).jitter(Share::new(1.0).ok());
        assert_eq!(longest.for_the(9, 1.0, None), Duration::MAX);
    }

    #[test]
    fn jitter_adds_at_most_its_share() {
        let open = OpenTime::growing(10 * S, 60 * S);
        assert_eq!(open.for_the(1, 0.0, None), 10 * S);
        assert_eq!(open.for_the(1, 1.0, None), 15 * S);
    }

    #[test]
    fn a_server_that_asks_for_rest_gets_it_up_to_a_limit() {
        let open = OpenTime::fixed(5 * S);
        assert_eq!(open.for_the(1, 0.0, Some(30 * S)), 30 * S);
        assert_eq!(open.for_the(1, 0.0, Some(S)), 5 * S);
        assert_eq!(open.for_the(1, 0.0, Some(Duration::MAX)), 300 * S);
        assert_eq!(open.listen_up_to(Duration::ZERO).for_the(1, 0.0, Some(30 * S)), 5 * S);
    }

    #[test]
    fn being_well_as_long_as_it_was_open_forgives_one_time() {
        let open = OpenTime::growing(5 * S, 60 * S);
        assert_eq!(open.forgive(3, 19 * S), 3);
        assert_eq!(open.forgive(3, 20 * S), 2);
        assert_eq!(open.forgive(3, 30 * S), 1);
        assert_eq!(open.forgive(3, 35 * S), 0);
        assert_eq!(open.forgive(3, Duration::MAX), 0);
    }
}
