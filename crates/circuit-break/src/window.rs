//! Shares over the last calls, and over the last time, without a lock.
//!
//! Every word that is written carries the period it belongs to, so that a writer that was held up since an earlier period
//! writes nothing.

use std::time::Duration;

use portcullis_core::Moment;

use crate::sync::{AtomicU64, Ordering};

/// Counts the times a breaker opened, so far as a word has room; what is half of that apart is taken for earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Period(pub(crate) u8);

/// What a window saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sum {
    pub(crate) calls: u32,
    pub(crate) failed: u32,
    pub(crate) slow: u32,
}

/// The last so many calls, one bit each.
#[derive(Debug)]
pub(crate) struct CallWindow {
    /// `period: 8 | calls seen: 56`.
    head: AtomicU64,
    failed: Bits,
    slow: Option<Bits>,
    size: u16,
}

/// `period: 8 | bits: 56`.
#[derive(Debug)]
struct Bits(Box<[AtomicU64]>);

/// The calls of the last time, in buckets.
#[derive(Debug)]
pub(crate) struct TimeWindow {
    width: u64,
    buckets: [Bucket; BUCKETS as usize],
}

#[derive(Debug)]
struct Bucket {
    /// `period: 8 | lap: 20 | failed: 18 | calls: 18`.
    calls: AtomicU64,
    /// `period: 8 | lap: 20 | slow: 36`.
    slow: AtomicU64,
}

/// Period and lap of a bucket, at the top of its words.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Tag(u64);

const BUCKETS: u64 = 10;
const BITS: u64 = 56;
const FULL: u64 = (1 << 18) - 1;

// === impl Period ===

impl Period {
    pub(crate) fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }

    fn is_after(self, other: Self) -> bool {
        self.0.wrapping_sub(other.0).cast_signed() > 0
    }
}

// === impl CallWindow ===

impl CallWindow {
    pub(crate) fn new(size: u16, slow: bool) -> Self {
        Self { head: AtomicU64::new(0), failed: Bits::new(size), slow: slow.then(|| Bits::new(size)), size }
    }

    pub(crate) fn record(&self, period: Period, failed: bool, slow: bool) {
        let mut head = self.head.load(Ordering::Relaxed);
        let seen = loop {
            let (of, seen) = (Period((head >> BITS) as u8), head & MASK);
            let seen = match of {
                of if of == period => seen,
                of if of.is_after(period) => return,
                _ => 0,
            };
            let next = u64::from(period.0) << BITS | (seen + 1) & MASK;
            match self.head.compare_exchange_weak(head, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => break seen,
                Err(now) => head = now,
            }
        };
        let place = seen % u64::from(self.size);
        self.failed.set(period, place, failed);
        if let Some(bits) = &self.slow {
            bits.set(period, place, slow);
        }
    }

    /// Forgets everything; what belongs to an earlier period than `period` is not written any more.
    pub(crate) fn clear(&self, period: Period) {
        let empty = u64::from(period.0) << BITS;
        let slow = self.slow.iter().flat_map(|bits| &bits.0);
        for word in self.failed.0.iter().chain(slow).chain([&self.head]) {
            word.store(empty, Ordering::Release);
        }
    }

    pub(crate) fn sum(&self, period: Period) -> Sum {
        let head = self.head.load(Ordering::Acquire);
        if (head >> BITS) as u8 != period.0 {
            return Sum::default();
        }
        Sum {
            calls: (head & MASK).min(u64::from(self.size)) as u32,
            failed: self.failed.ones(period),
            slow: self.slow.as_ref().map_or(0, |bits| bits.ones(period)),
        }
    }
}

const MASK: u64 = (1 << BITS) - 1;

// === impl Bits ===

impl Bits {
    fn new(size: u16) -> Self {
        Self((0..u64::from(size).div_ceil(BITS)).map(|_| AtomicU64::new(0)).collect())
    }

    fn set(&self, period: Period, place: u64, to: bool) {
        let Some(word) = self.0.get((place / BITS) as usize) else { return };
        let mut was = word.load(Ordering::Relaxed);
        loop {
            let of = Period((was >> BITS) as u8);
            let kept = match of {
                of if of == period => was,
                of if of.is_after(period) => return,
                _ => u64::from(period.0) << BITS,
            };
            let bit = 1 << (place % BITS);
            let next = if to { kept | bit } else { kept & !bit };
            if next == was {
                return;
            }
            match word.compare_exchange_weak(was, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => was = now,
            }
        }
    }

    fn ones(&self, period: Period) -> u32 {
        let words = self.0.iter().map(|word| word.load(Ordering::Acquire));
        words.filter(|word| (word >> BITS) as u8 == period.0).map(|word| (word & MASK).count_ones()).sum()
    }
}

// === impl TimeWindow ===

impl TimeWindow {
    pub(crate) fn new(time: Duration) -> Self {
        let width = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX) / BUCKETS;
        let bucket = |_| Bucket { calls: AtomicU64::new(0), slow: AtomicU64::new(0) };
        Self { width: width.max(1), buckets: std::array::from_fn(bucket) }
    }

    pub(crate) fn record(&self, period: Period, now: Moment, failed: bool, slow: bool) {
        let tick = self.tick(now);
        let (tag, bucket) = (Tag::of(period, tick), &self.buckets[(tick % BUCKETS) as usize]);
        // A full bucket keeps the shares it has: two words cannot be halved as one, and a count must not wrap.
        let counted =
            tag.add(&bucket.calls, |counts| (counts & FULL < FULL).then(|| counts + (u64::from(failed) << 18) + 1));
        if counted && slow {
            tag.add(&bucket.slow, |slow| Some(slow + 1));
        }
    }

    /// As [`CallWindow::clear`].
    pub(crate) fn clear(&self, period: Period, now: Moment) {
        let empty = Tag::of(period, self.tick(now));
        for bucket in &self.buckets {
            bucket.calls.store(empty.0, Ordering::Release);
            bucket.slow.store(empty.0, Ordering::Release);
        }
    }

    pub(crate) fn sum(&self, period: Period, now: Moment) -> Sum {
        let last = self.tick(now);
        let mut sum = Sum::default();
        for tick in last.saturating_sub(BUCKETS - 1)..=last {
            let (tag, bucket) = (Tag::of(period, tick), &self.buckets[(tick % BUCKETS) as usize]);
            if let Some(counts) = tag.read(&bucket.calls) {
                sum.calls += (counts & FULL) as u32;
                sum.failed += (counts >> 18 & FULL) as u32;
                // Read after the calls, it may count one that they do not.
                sum.slow += tag.read(&bucket.slow).unwrap_or(0).min(counts & FULL) as u32;
            }
        }
        sum
    }

    fn tick(&self, now: Moment) -> u64 {
        now.as_nanos() / self.width
    }
}

// === impl Tag ===

impl Tag {
    const REST: u64 = (1 << 36) - 1;
    const LAPS: u64 = (1 << 20) - 1;

    fn of(period: Period, tick: u64) -> Self {
        Self(u64::from(period.0) << 56 | ((tick / BUCKETS) & Self::LAPS) << 36)
    }

    /// Whether what is in `word` is to be left alone by one who has this tag.
    fn is_before(self, word: u64) -> bool {
        let (mine, theirs) = (Period((self.0 >> 56) as u8), Period((word >> 56) as u8));
        if mine != theirs {
            return theirs.is_after(mine);
        }
        // One who read the clock a lap ago is late; a bucket that seems further ahead was idle while laps wrapped, and one
        // that has nothing is nobody's.
        word & Self::REST != 0 && matches!((word >> 36).wrapping_sub(self.0 >> 36) & Self::LAPS, 1 | 2)
    }

    /// Whether there was room for `one` more, in a bucket that is not past.
    fn add(self, word: &AtomicU64, one: impl Fn(u64) -> Option<u64>) -> bool {
        let mut was = word.load(Ordering::Relaxed);
        loop {
            let kept = match was & !Self::REST == self.0 {
                true => was & Self::REST,
                false if self.is_before(was) => return false,
                false => 0,
            };
            let Some(next) = one(kept) else { return false };
            match word.compare_exchange_weak(was, self.0 | next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => was = now,
            }
        }
    }

    fn read(self, word: &AtomicU64) -> Option<u64> {
        let word = word.load(Ordering::Acquire);
        (word & !Self::REST == self.0).then_some(word & Self::REST)
    }
}

#[cfg(all(test, not(portcullis_loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    const P: Period = Period(7);

    fn at(millis: u64) -> Moment {
        Moment::from_nanos((1 << 52) + millis * 1_000_000)
    }

    #[test]
    fn a_window_of_calls_forgets_the_oldest() {
        let window = CallWindow::new(100, false);
        (0..1000).for_each(|_| window.record(P, false, false));
        (0..50).for_each(|_| window.record(P, true, false));
        assert_eq!(window.sum(P), Sum { calls: 100, failed: 50, slow: 0 });
    }

    #[test]
    fn a_new_period_starts_empty_and_is_not_reached_from_the_old() {
        let (calls, time) = (CallWindow::new(10, true), TimeWindow::new(Duration::from_secs(10)));
        calls.record(P, true, true);
        time.record(P, at(0), true, true);
        calls.clear(P.next());
        time.clear(P.next(), at(0));
        assert_eq!(calls.sum(P.next()), Sum::default());
        assert_eq!(time.sum(P.next(), at(0)), Sum::default());
        calls.record(P.next(), false, false);
        time.record(P.next(), at(0), false, false);
        calls.record(P, true, true);
        time.record(P, at(0), true, true);
        assert_eq!(calls.sum(P.next()), Sum { calls: 1, failed: 0, slow: 0 });
        assert_eq!(time.sum(P.next(), at(0)), Sum { calls: 1, failed: 0, slow: 0 });
    }

    #[test]
    fn a_crowded_bucket_keeps_its_shares() {
        // An hour's, at 4000 calls a second.
        let window = TimeWindow::new(Duration::from_secs(3600));
        let share = |part: u32, sum: Sum| f64::from(part) / f64::from(sum.calls);
        // From the beginning of a bucket.
        let start = 360_000 - ((1 << 52) / 1_000_000) % 360_000;
        for n in 0..1_440_000 {
            window.record(P, at(start + n / 4), n % 4 == 0, n % 10 == 0);
            if n % 100_000 == 99_999 {
                let sum = window.sum(P, at(start + n / 4));
                assert!(sum.calls <= FULL as u32 && sum.calls > 90_000, "{sum:?}");
                assert!((0.249..0.251).contains(&share(sum.failed, sum)), "{sum:?}");
                assert!((0.099..0.101).contains(&share(sum.slow, sum)), "{sum:?}");
            }
        }
        window.record(P, at(start + 360_000), true, true);
        assert_eq!(window.sum(P, at(start + 360_000)).calls, FULL as u32 + 1, "the next one has room");
    }

    #[test]
    fn a_lap_of_long_ago_is_not_now() {
        let window = TimeWindow::new(Duration::from_secs(10));
        window.record(P, at(0), true, false);
        assert_eq!(window.sum(P, at(10_000)), Sum::default());
        window.record(P, at(10_000), false, false);
        assert_eq!(window.sum(P, at(10_000)), Sum { calls: 1, failed: 0, slow: 0 });
        window.record(P, at(0), true, false);
        assert_eq!(window.sum(P, at(10_000)).calls, 1, "one who read the clock a lap ago");
    }

    proptest! {
        #[test]
        fn a_window_of_calls_is_the_last_calls(
            size in 1_u16..200,
            calls in proptest::collection::vec((any::<bool>(), any::<bool>()), 0..600),
        ) {
            let window = CallWindow::new(size, true);
            let mut naive = VecDeque::new();
            for (failed, slow) in calls {
                window.record(P, failed, slow);
                naive.push_back((failed, slow));
                if naive.len() > usize::from(size) {
                    naive.pop_front();
                }
                let count = |f: fn(&&(bool, bool)) -> bool| naive.iter().filter(f).count() as u32;
                let expected = Sum { calls: naive.len() as u32, failed: count(|c| c.0), slow: count(|c| c.1) };
                prop_assert_eq!(window.sum(P), expected);
            }
        }

        #[test]
        fn a_window_of_time_is_its_bucket_and_the_nine_before(
            calls in proptest::collection::vec((0_u64..4_000, any::<bool>(), any::<bool>()), 0..300),
        ) {
            let window = TimeWindow::new(Duration::from_secs(10));
            let (mut now, mut naive) = (0, Vec::new());
            for (wait, failed, slow) in calls {
                now += wait;
                window.record(P, at(now), failed, slow);
                naive.push((at(now).as_nanos() / 1_000_000_000, failed, slow));
                let last = at(now).as_nanos() / 1_000_000_000;
                let live: Vec<_> = naive.iter().filter(|call| call.0 + 10 > last).collect();
                let expected = Sum {
                    calls: live.len() as u32,
                    failed: live.iter().filter(|call| call.1).count() as u32,
                    slow: live.iter().filter(|call| call.2).count() as u32,
                };
                prop_assert_eq!(window.sum(P, at(now)), expected);
            }
        }
    }
}
