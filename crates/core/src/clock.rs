//! Time as a value: one monotonic clock for a stack, and a wall clock beside it.

use std::fmt;
use std::ops::Add;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A point on a [`Clock`], in nanoseconds since an arbitrary origin; it fits an atomic.
///
/// Arithmetic saturates. Moments of different clocks must not be compared.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Moment(u64);

/// The monotonic clock of a stack.
///
/// The default follows tokio's clock, so that a paused runtime pauses every layer. All default clocks of a process share
/// one origin.
#[derive(Clone, Debug, Default)]
pub struct Clock(Source<AtomicU64>);

/// Moves the [`Clock`] it was made with, and nothing else.
#[derive(Clone, Debug)]
pub struct ManualClock(Arc<AtomicU64>);

/// The time of day, as tokens and certificates know it.
#[derive(Clone, Debug, Default)]
pub struct WallClock(Source<AtomicU64>);

#[derive(Debug, Default)]
enum Source<T> {
    #[default]
    System,
    Manual(Arc<T>),
}

/// Where the origin lies on the number line: far enough from zero that a paused runtime which started earlier fits below.
const ORIGIN: u64 = 1 << 52;

// === impl Moment ===

impl Moment {
    /// Before every other moment.
    pub const MIN: Self = Self(0);
    /// Never reached.
    pub const MAX: Self = Self(u64::MAX);

    /// The moment that many nanoseconds after the clock's origin.
    #[must_use]
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since the clock's origin.
    #[must_use]
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// How long after `earlier` this is; zero when it is not after it.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// This moment moved back; not before [`Moment::MIN`].
    #[must_use]
    pub fn back(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(nanos(duration)))
    }
}

impl Add<Duration> for Moment {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(nanos(duration)))
    }
}

impl fmt::Debug for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", Duration::from_nanos(self.0))
    }
}

// === impl Clock ===

impl Clock {
    /// The clock of the process and of tokio's paused tests.
    #[must_use]
    pub const fn system() -> Self {
        Self(Source::System)
    }

    /// A clock that stands still until the handle beside it moves it.
    #[must_use]
    pub fn manual() -> (Self, ManualClock) {
        let nanos = Arc::new(AtomicU64::new(ORIGIN));
        (Self(Source::Manual(nanos.clone())), ManualClock(nanos))
    }

    /// Reads the clock.
    #[must_use]
    pub fn now(&self) -> Moment {
        match &self.0 {
            Source::System => {
                // std's clock, not tokio's: the first caller may stand in a runtime whose time was moved.
                #[expect(clippy::disallowed_methods, reason = "the one origin every moment is counted from")]
                fn origin() -> tokio::time::Instant {
                    static FIRST: OnceLock<tokio::time::Instant> = OnceLock::new();
                    *FIRST.get_or_init(|| std::time::Instant::now().into())
                }
                let (origin, now) = (origin(), tokio::time::Instant::now());
                Moment(match now.checked_duration_since(origin) {
                    Some(after) => ORIGIN.saturating_add(nanos(after)),
                    None => ORIGIN.saturating_sub(nanos(origin.saturating_duration_since(now))),
                })
            }
            Source::Manual(nanos) => Moment(nanos.load(Ordering::Relaxed)),
        }
    }
}

impl ManualClock {
    /// Moves the clock forward.
    pub fn advance(&self, by: Duration) {
        self.0.fetch_add(nanos(by), Ordering::Relaxed);
    }
}

// === impl WallClock ===

impl WallClock {
    /// The machine's time of day.
    #[must_use]
    pub const fn system() -> Self {
        Self(Source::System)
    }

    /// A clock that shows what was last [`set`](Self::set), starting with `since_epoch`.
    #[must_use]
    pub fn manual(since_epoch: Duration) -> Self {
        Self(Source::Manual(Arc::new(AtomicU64::new(nanos(since_epoch)))))
    }

    /// Sets a manual clock and all its clones, in either direction. The machine's own time is not touched.
    pub fn set(&self, since_epoch: Duration) {
        if let Source::Manual(at) = &self.0 {
            at.store(nanos(since_epoch), Ordering::Relaxed);
        }
    }

    /// The time since the Unix epoch; zero before it.
    #[must_use]
    pub fn since_epoch(&self) -> Duration {
        match &self.0 {
            #[expect(clippy::disallowed_methods, reason = "this is the clock that is injected")]
            Source::System => SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            Source::Manual(at) => Duration::from_nanos(at.load(Ordering::Relaxed)),
        }
    }
}

impl<T> Clone for Source<T> {
    fn clone(&self) -> Self {
        match self {
            Self::System => Self::System,
            Self::Manual(at) => Self::Manual(at.clone()),
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    duration.as_secs().saturating_mul(1_000_000_000).saturating_add(duration.subsec_nanos().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_saturates() {
        assert_eq!(Moment::MAX + Duration::from_secs(1), Moment::MAX);
        assert_eq!(Moment::MIN.back(Duration::MAX), Moment::MIN);
        assert_eq!(Moment::MIN.since(Moment::MAX), Duration::ZERO);
    }

    #[test]
    fn a_manual_clock_moves_by_hand_only() {
        let (clock, hand) = Clock::manual();
        let start = clock.now();
        assert_eq!(clock.clone().now(), start);
        hand.advance(Duration::from_secs(3));
        assert_eq!(clock.now().since(start), Duration::from_secs(3));
    }

    #[tokio::test(start_paused = true)]
    async fn a_paused_runtime_pauses_the_default_clock() {
        let start = Clock::system().now();
        tokio::time::advance(Duration::from_secs(3600)).await;
        assert_eq!(Clock::system().now().since(start), Duration::from_secs(3600));
    }

    #[test]
    fn a_wall_clock_can_be_set_back() {
        let clock = WallClock::manual(Duration::from_secs(100));
        clock.clone().set(Duration::from_secs(50));
        assert_eq!(clock.since_epoch(), Duration::from_secs(50));
    }
}
