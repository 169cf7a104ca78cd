//! What is learnt of an endpoint, and what a pick sees of that.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use portcullis_core::{Moment, Outcome};

use crate::pick::Call;

/// What is known of one endpoint. Each word is read and written on its own: a reader may see one call's latency without
/// its outcome.
#[derive(Debug)]
pub(crate) struct Estimate {
    /// Milliseconds of the last call's end in the high half, seconds of latency as `f32` in the low; zero when nothing is
    /// known.
    latency: AtomicU64,
    /// The share of failed calls in the high half, how far the latency is to be trusted in the low, each out of 65,535.
    trust: AtomicU32,
    /// The same for picks.
    pub(crate) seen: Place,
}

/// Where stands what picks see of an endpoint. Those of endpoints that were first seen together stand side by side, or a
/// pick among very many would wait for memory several times for each.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) block: Arc<[Seen]>,
    pub(crate) index: u32,
}

/// What a pick sees of an endpoint, in one word that changes seldom: `ticks at the last call's end: 24 | latency: 16 | trust:
/// 12 | failures: 12`. The latency counts [`LATENCY_UNIT`]s of an `f32`'s bits from the [`LEAST_LATENCY`]; the parts of one
/// are out of 4095. Zero when nothing is known.
#[derive(Debug, Default)]
pub(crate) struct Seen(AtomicU64);

/// What an estimate is worth now.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Known {
    /// How far the latency is to be trusted, 0 to 1.
    pub(crate) confidence: f32,
    /// The latency times that.
    pub(crate) worth: f32,
    /// What failures add.
    pub(crate) penalty: f32,
}

/// The longest rest an endpoint can ask for.
const MAX_REST: Duration = Duration::from_secs(300);
/// Of so many calls, an estimate is half of what counts.
const ENOUGH: f32 = 10.0;
/// So that the number of calls can be had back.
const MOST_TRUST: f32 = 0.999;

// === impl Seen ===

impl Seen {
    /// `now` in ticks.
    #[inline(always)]
    pub(crate) fn read(&self, now: u64, penalty: f32) -> Known {
        let word = self.0.load(Ordering::Relaxed);
        // Since the tick before the call's, or more: the clock of another thread may be a little behind. Ones below, or they
        // would be borrowed from.
        let age = ((now + 1) << 40 | ONES).wrapping_sub(word) >> 40;
        let fresh = fade_roughly(age, 1.0 / PARTS);
        // Never none: of two that nothing is known of, the less busy one is better.
        let trust = ((word >> 12 & 0xfff) as u32 | 1) as f32;
        let failures = (word & 0xfff) as f32;
        let latency = f32::from_bits(((word >> 24 & 0xffff) as u32 * LATENCY_UNIT) + LEAST_LATENCY.to_bits());
        Known { confidence: fresh * trust, worth: fresh * (trust * latency), penalty: fresh * (failures * penalty) }
    }

    fn write(&self, at: u64, latency: f32, trust: f32, failures: f32) {
        let latency = latency.clamp(LEAST_LATENCY, MOST_LATENCY).to_bits() - LEAST_LATENCY.to_bits();
        let latency = u64::from((latency + LATENCY_UNIT / 2) / LATENCY_UNIT);
        let part = |part: f32| (part * PARTS) as u64;
        let word = at << 40 | latency << 24 | part(trust) << 12 | part(failures);
        // Most calls say nothing new; then the line stays with all who read it.
        if self.0.load(Ordering::Relaxed) != word {
            self.0.store(word, Ordering::Relaxed);
        }
    }
}

// === impl Known ===

impl Known {
    /// What both cost, to the same scale: as far as latencies are not to be trusted they are taken to be their mean, in
    /// which each counts as far as it is.
    #[inline(always)]
    pub(crate) fn beside(self, other: Self) -> (f32, f32) {
        // Not divided by the sum of confidences: only the ratio matters.
        let scale = self.confidence + other.confidence;
        let mean = self.worth + other.worth;
        // What latency adds to the one and takes from the other: the product of confidences times the difference.
        let apart = self.worth * other.confidence - other.worth * self.confidence;
        // In the order in which they are known.
        ((mean + self.penalty * scale) + apart, (mean + other.penalty * scale) - apart)
    }
}

// === impl Estimate ===

impl Estimate {
    pub(crate) const fn at(seen: Place) -> Self {
        Self { latency: AtomicU64::new(0), trust: AtomicU32::new(0), seen }
    }

    pub(crate) fn learn(&self, call: &Call, rate: f32, tick: u64) {
        let rest = call.retry_after.map(|rest| rest.min(MAX_REST));
        if call.outcome == Outcome::Ignored && call.latency.is_zero() && rest.is_none() {
            return;
        }
        let latency = call.latency.max(rest.unwrap_or_default()).as_secs_f32();
        let now = stamp(call.now);
        let mut word = self.latency.load(Ordering::Relaxed);
        let learnt = loop {
            let next = match word {
                // A call that was given up took at least so long.
                0 => latency,
                _ if latency >= latency_of(word) => latency,
                _ if call.outcome == Outcome::Ignored && rest.is_none() => return,
                _ => {
                    let old = fade(age(word, now), rate);
                    old * latency_of(word) + (1.0 - old) * latency
                }
            };
            let next = next.max(f32::MIN_POSITIVE);
            let new = u64::from(now) << 32 | u64::from(next.to_bits());
            if word == new {
                break next;
            }
            match self.latency.compare_exchange_weak(word, new, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => break next,
                Err(seen) => word = seen,
            }
        };
        let failed = match call.outcome {
            Outcome::Failure => Some(1.0),
            Outcome::Success => Some(0.0),
            _ => None,
        };
        // By time, but no call counts for less than one in 32: a burst must show before time has passed.
        let old = if word == 0 { 0.0 } else { fade(age(word, now), rate) };
        let weight = if word == 0 { 1.0 / 32.0 } else { (1.0 - old).max(1.0 / 32.0) };
        let mut bits = self.trust.load(Ordering::Relaxed);
        let new = loop {
            let (failures, trust) = halves(bits);
            let failures = failed.map_or(failures, |failed| failures + weight * (failed - failures));
            // So many calls it stands for.
            let calls = old * ENOUGH * trust / (1.0 - trust) + 1.0;
            // What it says itself needs no second call.
            let trust = if rest.is_some() { MOST_TRUST } else { (calls / (calls + ENOUGH)).min(MOST_TRUST) };
            let new = joined(failures, trust);
            if bits == new {
                break new;
            }
            match self.trust.compare_exchange_weak(bits, new, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => break new,
                Err(seen) => bits = seen,
            }
        };
        let (failures, trust) = halves(new);
        let Place { block, index } = &self.seen;
        block[*index as usize].write(tick, learnt, trust, failures);
    }
}

/// Two parts of one.
fn halves(bits: u32) -> (f32, f32) {
    ((bits >> 16) as f32 * (1.0 / 65_535.0), (bits & 0xffff) as f32 * (1.0 / 65_535.0))
}

/// Rounded down, or a small part would stay for ever.
fn joined(high: f32, low: f32) -> u32 {
    ((high * 65_535.0) as u32) << 16 | (low * 65_535.0) as u32
}

fn latency_of(word: u64) -> f32 {
    f32::from_bits(word as u32)
}

fn stamp(now: Moment) -> u32 {
    (now.as_nanos() / 1_000_000) as u32
}

/// In milliseconds.
fn age(word: u64, now: u32) -> u32 {
    let age = now.wrapping_sub((word >> 32) as u32);
    // The clock of another thread may be a little behind.
    if age > u32::MAX - A_LITTLE { 0 } else { age }
}

/// e^(-age × rate), within 1 % of one.
fn fade(age: u32, rate: f32) -> f32 {
    let x = age as f32 * rate;
    1.0 / (1.0 + x * (1.0 + x * (1.0 / 2.0 + x * (1.0 / 6.0 + x * (1.0 / 24.0)))))
}

/// `whole` × e^(-age / [`TICKS`]), within 8 % and as soon as a pick wants it: between two halvings it goes straight.
#[inline(always)]
fn fade_roughly(age: u64, whole: f32) -> f32 {
    // Halvings in a tick, in units of an `f32`'s exponent.
    const EACH: u64 = ((1 << 23) as f64 * std::f64::consts::LOG2_E) as u64 / TICKS;
    f32::from_bits(whole.to_bits() - (age * EACH).min(NOTHING_LEFT << 23) as u32)
}

/// How many ticks the decay has. 2²⁴ of them, then, are 262,144 times the decay: who was idle for so long is seen for a
/// moment as it was then.
pub(crate) const TICKS: u64 = 64;
/// The parts of one in a [`Seen`].
const PARTS: f32 = 4095.0;
/// The bits below the ticks in a [`Seen`].
const ONES: u64 = (1 << 40) - 1;
/// After so many halvings an estimate is worth nothing.
const NOTHING_LEFT: u64 = 30;
/// What latencies a [`Seen`] can say, in seconds: less than a nanosecond to 272 years, each 0.1 % more than the one before.
/// Both are powers of two, and between them are less than 2¹⁶ units of the bits of an `f32`.
const LEAST_LATENCY: f32 = 1.0 / (1_u64 << 31) as f32;
const MOST_LATENCY: f32 = (1_u64 << 32) as f32;
const LATENCY_UNIT: u32 = 1 << 13;
/// In milliseconds.
const A_LITTLE: u32 = 10_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fading_is_near_the_exponential() {
        for tenths in 0..30_u64 {
            let x = tenths as f32 / 10.0;
            let near = fade(tenths as u32 * 1000, 1e-4);
            assert!((near - (-x).exp()).abs() < 0.012, "{x}");
            let rough = fade_roughly(tenths * TICKS / 10, 0.5) / 0.5;
            let ticks = (tenths * TICKS / 10) as f32 / TICKS as f32;
            assert!((rough / (-ticks).exp() - 1.0).abs() < 0.08, "{x}: {rough}");
        }
        let longest = fade_roughly(u64::from(u32::MAX), 1.0);
        assert!(longest > 0.0 && longest < 1e-8);
    }

    #[test]
    fn what_is_seen_is_what_was_learnt_as_nearly_as_a_word_can_say() {
        let seen = Seen::default();
        for (latency, trust, failures) in [(0.02, 0.5, 0.0), (1.234_567, 0.999, 1.0), (1e-6, 1.0 / 11.0, 1.0 / 32.0)] {
            let at = 1 << 24 | 5;
            seen.write(at, latency, trust, failures);
            let known = seen.read(at, 2.0);
            let near = |seen: f32, learnt: f32| (seen / learnt - 1.0).abs() < 0.03;
            assert!(near(known.confidence, trust), "{known:?}");
            assert!(
                near(known.worth / known.confidence, latency)
                    && (near(known.penalty, failures * 2.0) || failures == 0.0)
            );
            // One who picks by a clock a little behind.
            assert!(seen.read(at - 1, 2.0).confidence >= known.confidence);
        }
    }
}
