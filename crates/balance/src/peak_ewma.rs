//! Whoever answers soonest, as far as is known.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use portcullis_core::{Endpoint, Moment, Outcome, SlotKey};

use crate::pick::{Call, Candidates, Pick};

/// Of three at random, the one with the lower cost: latency × (requests in flight / relative weight + 1).
///
/// Latency is an exponentially weighted moving average that jumps to each peak, measured to the end of the response body
/// (peak EWMA, as in Finagle). A call that is given up before its head counts as a latency of at least so long; one whose
/// caller stops reading its body, as that of an endless stream must, does not count. What is different here:
///
/// * **Failures cost.** The share of failed calls adds up to [`penalty`](Self::penalty) to the latency. An endpoint that
///   fails in a millisecond would otherwise be the fastest of all and draw twice its share. A `429` or
///   `RESOURCE_EXHAUSTED` with `retry-after` or pushback raises the latency to what it asks for, up to five minutes.
/// * **What is not known is taken to be as the other's.** A new endpoint gets a fair share at once: it neither starves nor
///   is flooded. An estimate counts the more the more calls it comes from, and fades when nothing confirms it: a few calls
///   say little of latency, so the shares of an idle service stay those of the weights.
/// * **Reading changes nothing**: no lock, no write.
#[derive(Clone, Debug)]
pub struct PeakEwma {
    /// Of each endpoint.
    key: SlotKey<Place>,
    /// The same by position in a snapshot.
    listed: SlotKey<Listed>,
    /// By how much an estimate fades in a millisecond.
    rate: f32,
    /// The same in halvings, of which 2²³ are a whole one.
    halving: u32,
    /// In seconds.
    penalty: f32,
    choices: usize,
}

/// How long [`PeakEwma`] remembers.
const DECAY: Duration = Duration::from_secs(10);
/// What an endpoint that always fails costs in [`PeakEwma`].
const PENALTY: Duration = Duration::from_secs(5);
/// How many [`PeakEwma`] looks at.
const CHOICES: usize = 3;
/// The longest rest an endpoint can ask for.
const MAX_REST: Duration = Duration::from_secs(300);

/// How much lower a cost must be to count: estimates differ by chance, and an endpoint that differs by less must be tried
/// now and then, or nothing would be learnt of it any more.
const CLEARLY: f32 = 0.8;

/// Of so many calls, an estimate is half of what counts.
const ENOUGH: f32 = 10.0;
/// So that the number of calls can be had back.
const MOST_TRUST: f32 = 0.999;

/// What is known of one endpoint. Each word is read and written on its own: a reader may see one call's latency without
/// its outcome.
#[derive(Debug, Default)]
struct Estimate {
    /// Milliseconds of the last call's end in the high half, seconds of latency as `f32` in the low; zero when nothing is
    /// known.
    latency: AtomicU64,
    /// The share of failed calls in the high half, how far the latency is to be trusted in the low, each out of 65,535.
    trust: AtomicU32,
}

/// Where the estimate of an endpoint stands. Those of endpoints that were first seen together stand side by side, or a pick
/// among very many would wait for memory several times for each.
#[derive(Debug)]
struct Place {
    block: Arc<[Estimate]>,
    index: u32,
}

/// Where the estimates of a snapshot stand, by position.
#[derive(Debug)]
enum Listed {
    /// In one block, in the same order: nothing came or went since the first snapshot.
    Straight(Arc<[Estimate]>),
    Scattered {
        blocks: Vec<Arc<[Estimate]>>,
        places: Vec<(u32, u32)>,
    },
}

/// What one pick sees of an endpoint.
#[derive(Clone, Copy)]
struct Looked {
    known: Known,
    load: f32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Known {
    /// How far the latency is to be trusted, 0 to 1.
    confidence: f32,
    /// The latency times that.
    worth: f32,
    /// What failures add.
    penalty: f32,
}

// === impl PeakEwma ===

impl PeakEwma {
    /// Remembers for ten seconds; five seconds of penalty; three choices.
    #[must_use]
    pub fn new() -> Self {
        let (key, listed) = (SlotKey::new(), SlotKey::new());
        Self { key, listed, rate: 0.0, halving: 0, penalty: 0.0, choices: CHOICES }.decay(DECAY).penalty(PENALTY)
    }

    /// After how long without a call an estimate is worth 1/e. Default 10 s; not below a millisecond.
    #[must_use]
    pub fn decay(mut self, decay: Duration) -> Self {
        self.rate = 1e-3 / decay.max(Duration::from_millis(1)).as_secs_f32();
        self.halving = (self.rate * std::f32::consts::LOG2_E * ONE_HALVING) as u32;
        self
    }

    /// The latency that an endpoint which always fails is taken to have on top of its own. Default 5 s; zero does not
    /// count failures.
    #[must_use]
    pub fn penalty(mut self, penalty: Duration) -> Self {
        self.penalty = penalty.as_secs_f32();
        self
    }

    /// How many are looked at, at least two. Default 3. Five are better where endpoints differ much; each costs a look.
    #[must_use]
    pub fn choices(mut self, choices: usize) -> Self {
        self.choices = choices.max(2);
        self
    }

    fn estimate<'a>(&self, endpoint: &'a Endpoint) -> &'a Estimate {
        let alone = || Place { block: [Estimate::default()].into(), index: 0 };
        let place = endpoint.slot(&self.key, alone);
        &place.block[place.index as usize]
    }

    fn list(&self, all: &[Endpoint]) -> Listed {
        let news = all.iter().filter(|endpoint| endpoint.existing_slot(&self.key).is_none());
        let (news, mut next): (Arc<[Estimate]>, _) = (news.map(|_| Estimate::default()).collect(), 0..);
        let (mut blocks, mut places, mut known) = (Vec::new(), Vec::new(), HashMap::new());
        for endpoint in all {
            // There is always a next: slots are filled, never emptied.
            let place =
                endpoint.slot(&self.key, || Place { block: news.clone(), index: next.next().unwrap_or_default() });
            let block = *known.entry(Arc::as_ptr(&place.block).addr()).or_insert_with(|| {
                blocks.push(place.block.clone());
                blocks.len() as u32 - 1
            });
            places.push((block, place.index));
        }
        Listed::new(blocks, places)
    }

    #[inline]
    fn known(&self, estimate: &Estimate, now: u32) -> Known {
        let word = estimate.latency.load(Ordering::Relaxed);
        if word == 0 {
            return Known::default();
        }
        let (failures, trust) = halves(estimate.trust.load(Ordering::Relaxed));
        let fresh = fade_roughly(age(word, now), self.halving);
        let confidence = fresh * trust;
        Known { confidence, worth: confidence * latency_of(word), penalty: fresh * failures * self.penalty }
    }
}

impl Default for PeakEwma {
    fn default() -> Self {
        Self::new()
    }
}

impl Pick for PeakEwma {
    fn pick(&self, among: &Candidates<'_>) -> Option<usize> {
        let now = stamp(among.now());
        let listed = among.of_all(&self.listed, |all| self.list(all));
        let weighted = among.is_weighted();
        let look = |i: usize| {
            let busy = among[i].in_flight() as f32;
            Looked {
                known: self.known(listed.at(among.position(i)), now),
                load: if weighted { busy / among.relative_weight(i) } else { busy } + 1.0,
            }
        };
        let one = among.sample();
        let mut best = None;
        for k in 0..self.choices.min(among.len()) {
            // Others than the first, not than the best so far: whom to look at next must not wait for what this one costs.
            let i = if k == 0 { one } else { among.sample_other(one).unwrap_or(one) };
            let looked = look(i);
            if best.is_none_or(|(_, best)| looked.is_better_than(best)) {
                best = Some((i, looked));
            }
        }
        best.map(|(i, _)| i)
    }

    fn observe(&self, endpoint: &Endpoint, call: &Call) {
        self.estimate(endpoint).learn(call, self.rate);
    }

    fn observes(&self) -> bool {
        true
    }
}

// === impl Listed ===

impl Listed {
    fn new(blocks: Vec<Arc<[Estimate]>>, places: Vec<(u32, u32)>) -> Self {
        match &*blocks {
            [only] if (0..).zip(&places).all(|(i, place)| *place == (0, i)) => Self::Straight(only.clone()),
            _ => Self::Scattered { blocks, places },
        }
    }

    #[inline]
    fn at(&self, position: usize) -> &Estimate {
        match self {
            Self::Straight(block) => &block[position],
            Self::Scattered { blocks, places } => {
                let (block, index) = places[position];
                &blocks[block as usize][index as usize]
            }
        }
    }
}

// === impl Looked ===

impl Looked {
    fn is_better_than(self, other: Self) -> bool {
        let (mine, others) = self.known.beside(other.known);
        mine * self.load < others * other.load * CLEARLY
    }
}

// === impl Known ===

impl Known {
    /// What both cost, to the same scale: as far as latencies are not to be trusted they are taken to be their mean, in
    /// which each counts as far as it is.
    #[inline]
    fn beside(self, other: Self) -> (f32, f32) {
        // Not divided by the sum of confidences: only the ratio matters.
        let scale = self.confidence + other.confidence;
        let mean = if scale == 0.0 { 1.0 } else { self.worth + other.worth };
        // What latency adds to the one and takes from the other: the product of confidences times the difference.
        let apart = self.worth * other.confidence - other.worth * self.confidence;
        (mean + apart + self.penalty * scale, mean - apart + other.penalty * scale)
    }
}

// === impl Estimate ===

impl Estimate {
    fn learn(&self, call: &Call, rate: f32) {
        let rest = call.retry_after.map(|rest| rest.min(MAX_REST));
        if call.outcome == Outcome::Ignored && call.latency.is_zero() && rest.is_none() {
            return;
        }
        let latency = call.latency.max(rest.unwrap_or_default()).as_secs_f32();
        let now = stamp(call.now);
        let mut word = self.latency.load(Ordering::Relaxed);
        loop {
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
            let next = u64::from(now) << 32 | u64::from(next.max(f32::MIN_POSITIVE).to_bits());
            match self.latency.compare_exchange_weak(word, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => break,
                Err(seen) => word = seen,
            }
        }
        let failed = match call.outcome {
            Outcome::Failure => Some(1.0),
            Outcome::Success => Some(0.0),
            _ => None,
        };
        // By time, but no call counts for less than one in 32: a burst must show before time has passed.
        let old = if word == 0 { 0.0 } else { fade(age(word, now), rate) };
        let weight = if word == 0 { 1.0 / 32.0 } else { (1.0 - old).max(1.0 / 32.0) };
        let learn = |bits: u32| {
            let (failures, trust) = halves(bits);
            let failures = failed.map_or(failures, |failed| failures + weight * (failed - failures));
            // So many calls it stands for.
            let calls = old * ENOUGH * trust / (1.0 - trust) + 1.0;
            // What it says itself needs no second call.
            let trust = if rest.is_some() { MOST_TRUST } else { (calls / (calls + ENOUGH)).min(MOST_TRUST) };
            Some(joined(failures, trust))
        };
        // Never fails: `learn` always has a value.
        let _ = self.trust.fetch_update(Ordering::Relaxed, Ordering::Relaxed, learn);
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
    // The clock of another thread may be a little behind.
    let age = now.wrapping_sub((word >> 32) as u32);
    if age > u32::MAX / 2 { 0 } else { age }
}

/// e^(-age × rate), within 1 % of one.
fn fade(age: u32, rate: f32) -> f32 {
    let x = age as f32 * rate;
    1.0 / (1.0 + x * (1.0 + x * (1.0 / 2.0 + x * (1.0 / 6.0 + x * (1.0 / 24.0)))))
}

/// The same within 6 % and as soon as a pick wants it: between two halvings it goes straight.
#[inline]
fn fade_roughly(age: u32, halving: u32) -> f32 {
    let halvings = (u64::from(age) * u64::from(halving)).min(NOTHING_LEFT);
    f32::from_bits(1.0_f32.to_bits() - halvings as u32)
}

/// The exponent of an `f32` begins there.
const ONE_HALVING: f32 = (1 << 23) as f32;
const NOTHING_LEFT: u64 = 100 << 23;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Set;

    fn call(latency: u64, outcome: Outcome, at: u64) -> Call {
        Call {
            latency: Duration::from_millis(latency),
            outcome,
            retry_after: None,
            now: Moment::from_nanos(at * 1_000_000),
        }
    }

    fn known(policy: &PeakEwma, set: &Set, index: usize, at: u64) -> Known {
        policy.known(policy.estimate(&set[index]), stamp(Moment::from_nanos(at * 1_000_000)))
    }

    /// To the tenth of a millisecond.
    fn latency(known: Known) -> f32 {
        (known.worth / known.confidence * 1e4).round() / 1e4
    }

    #[test]
    fn a_peak_counts_at_once_and_is_forgotten_slowly() {
        let (set, policy) = (Set::of(&[1, 1]), PeakEwma::new());
        policy.observe(&set[0], &call(10, Outcome::Success, 1000));
        policy.observe(&set[0], &call(500, Outcome::Success, 1000));
        assert_eq!(latency(known(&policy, &set, 0, 1000)), 0.5);
        policy.observe(&set[0], &call(10, Outcome::Success, 11_000));
        let cost = latency(known(&policy, &set, 0, 11_000));
        assert!((cost - (0.01 + 0.49 / std::f32::consts::E)).abs() < 0.005, "{cost}");
    }

    #[test]
    fn who_fails_fast_is_avoided() {
        let (set, policy) = (Set::of(&[1, 1]), PeakEwma::new());
        for _ in 0..10 {
            set.advance(Duration::from_millis(1));
            policy.observe(&set[0], &Call { now: set.now(), ..call(1, Outcome::Failure, 0) });
            policy.observe(&set[1], &Call { now: set.now(), ..call(20, Outcome::Success, 0) });
        }
        assert!((0..100).all(|_| set.pick(&policy) == 1));
    }

    #[test]
    fn what_is_not_known_gets_its_fair_share() {
        fastrand::seed(3);
        let (set, policy) = (Set::of(&[1, 1]), PeakEwma::new());
        policy.observe(&set[0], &call(20, Outcome::Success, 0));
        let first = (0..10_000).filter(|_| set.pick(&policy) == 0).count();
        assert!((4700..5300).contains(&first), "{first}");
    }

    #[test]
    fn an_estimate_that_nothing_confirms_fades() {
        let (set, policy) = (Set::of(&[1, 1]), PeakEwma::new());
        policy.observe(&set[0], &call(5000, Outcome::Success, 1));
        policy.observe(&set[1], &call(20, Outcome::Success, 1));
        let ratio = |at| {
            let (a, b) = (known(&policy, &set, 0, at), known(&policy, &set, 1, at));
            let (a, b) = a.beside(b);
            a / b
        };
        assert!((0.99..1.01).contains(&ratio(600_000)), "{}", ratio(600_000));
        (0..50).for_each(|_| policy.observe(&set[1], &call(20, Outcome::Success, 600_000)));
        assert!((0.99..1.01).contains(&ratio(600_000)), "the old one is taken to be as the new: {}", ratio(600_000));
    }

    #[test]
    fn a_few_calls_say_little_of_latency_but_much_of_failure() {
        let (set, policy) = (Set::of(&[1, 1]), PeakEwma::new());
        let better = |other: Outcome, calls| {
            (0..calls).for_each(|_| policy.observe(&set[0], &call(20, Outcome::Success, 1000)));
            (0..calls).for_each(|_| policy.observe(&set[1], &call(100, other, 1000)));
            let (a, b) = (known(&policy, &set, 0, 1000), known(&policy, &set, 1, 1000));
            let (a, b) = a.beside(b);
            a < b * CLEARLY
        };
        assert!(!better(Outcome::Success, 1));
        assert!(better(Outcome::Success, 3));
        assert!(better(Outcome::Failure, 1));
    }

    #[test]
    fn who_asks_for_rest_gets_it() {
        let (set, policy) = (Set::of(&[1, 1]), PeakEwma::new());
        let mut limited = call(1, Outcome::Ignored, 1000);
        limited.retry_after = Some(Duration::from_secs(7));
        policy.observe(&set[0], &limited);
        assert_eq!(latency(known(&policy, &set, 0, 1000)), 7.0);
        limited.retry_after = Some(Duration::MAX);
        policy.observe(&set[0], &limited);
        assert_eq!(latency(known(&policy, &set, 0, 1000)), 300.0);
    }

    #[test]
    fn a_call_given_up_is_a_lower_bound() {
        let (set, policy) = (Set::of(&[1, 1]), PeakEwma::new());
        policy.observe(&set[0], &call(100, Outcome::Success, 1000));
        policy.observe(&set[0], &call(3, Outcome::Ignored, 5000));
        assert_eq!(latency(known(&policy, &set, 0, 5000)), 0.1);
        policy.observe(&set[0], &call(900, Outcome::Ignored, 5000));
        assert_eq!(latency(known(&policy, &set, 0, 5000)), 0.9);
    }

    #[test]
    fn a_call_that_says_nothing_leaves_everything_as_it_was() {
        let (set, policy) = (Set::of(&[1, 1]), PeakEwma::new());
        let nothing = |at| call(0, Outcome::Ignored, at);
        policy.observe(&set[0], &nothing(1000));
        assert_eq!(known(&policy, &set, 0, 1000).confidence, 0.0);
        policy.observe(&set[0], &call(100, Outcome::Success, 2000));
        let before = known(&policy, &set, 0, 2000);
        policy.observe(&set[0], &nothing(2000));
        let after = known(&policy, &set, 0, 2000);
        assert_eq!((after.confidence, after.worth), (before.confidence, before.worth));
    }

    #[test]
    fn what_was_learnt_stays_when_others_come() {
        let policy = PeakEwma::new();
        let sets = [Set::of(&[1; 3]), Set::of(&[1; 2])];
        policy.observe(&sets[1][1], &call(20, Outcome::Success, 1000));
        let all: Vec<Endpoint> = sets.iter().flat_map(|set| set.endpoints.iter().cloned()).collect();
        for (some, straight) in [(&all[..2], true), (&all[..3], false), (&all[1..], false), (&all, false)] {
            let listed = policy.list(some);
            assert_eq!(matches!(listed, Listed::Straight(_)), straight);
            for (i, endpoint) in some.iter().enumerate() {
                assert!(std::ptr::eq(listed.at(i), policy.estimate(endpoint)));
            }
        }
        let confidence = |set: usize| known(&policy, &sets[set], 1, 1000).confidence;
        assert!(confidence(1) > 0.0 && confidence(0) == 0.0);
    }

    #[test]
    fn fading_is_near_the_exponential() {
        for tenths in 0..30_u64 {
            let x = tenths as f32 / 10.0;
            let near = fade(tenths as u32 * 1000, PeakEwma::new().rate);
            assert!((near - (-x).exp()).abs() < 0.012, "{x}");
            let rough = fade_roughly(tenths as u32 * 1000, PeakEwma::new().halving);
            assert!((rough / (-x).exp() - 1.0).abs() < 0.062, "{x}");
        }
        let longest = fade_roughly(u32::MAX, PeakEwma::new().decay(Duration::from_millis(1)).halving);
        assert!(longest > 0.0 && longest < 1e-29);
    }
}
