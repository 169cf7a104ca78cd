//! Whoever answers soonest, as far as is known.

use std::collections::HashMap;
use std::hint::select_unpredictable;
use std::sync::Arc;
use std::time::Duration;

use portcullis_core::{Endpoint, Moment, SlotKey};
use prefetch_index::prefetch_index;

use crate::estimate::{Estimate, Known, Place, Seen, TICKS};
use crate::pick::{Call, Candidates, Pick};

/// Of three at random, the one with the lower cost: latency × (requests in flight / relative weight + 1).
///
/// Latency is an exponentially weighted moving average that jumps to each peak, measured to the end of the response body
/// (peak EWMA, as in Finagle). A call that is given up before its head counts as a latency of at least so long; one whose
/// caller stops reading its body, as that of an endless stream must, does not count. What is different here:
///
/// * **Failures cost.** The share of failed calls adds up to [`penalty`](Self::penalty) to the latency. An endpoint that
///   fails in a millisecond would otherwise be the fastest of all and draw twice its share. A `429`,
///   `503`, `RESOURCE_EXHAUSTED` or `UNAVAILABLE` with `retry-after` or pushback raises the latency to what it asks for, up
///   to five minutes.
/// * **What is not known is taken to be as the other's.** A new endpoint gets a fair share at once: it neither starves nor
///   is flooded. An estimate counts the more the more calls it comes from, and fades when nothing confirms it: a few calls
///   say little of latency, so the shares of an idle service stay those of the weights.
/// * **Reading changes nothing**: no lock, no write.
#[derive(Clone, Debug)]
pub struct PeakEwma {
    /// Of each endpoint.
    key: SlotKey<Estimate>,
    /// What is seen of it, by position in a snapshot.
    listed: SlotKey<Listed>,
    /// By how much an estimate fades in a millisecond.
    rate: f32,
    /// How many ticks, of which [`TICKS`] are the decay, there are in 2⁶⁴ nanoseconds.
    ticks: u64,
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

/// How much lower a cost must be to count: estimates differ by chance, and an endpoint that differs by less must be tried
/// now and then, or nothing would be learnt of it any more.
const CLEARLY: f32 = 0.8;

/// What picks see of a snapshot's endpoints, by position.
#[derive(Debug)]
enum Listed {
    /// In one block, in the same order: nothing came or went since the first snapshot.
    Straight(Arc<[Seen]>),
    Scattered {
        blocks: Vec<Arc<[Seen]>>,
        places: Vec<(u32, u32)>,
    },
}

/// Looks at the candidates of one pick.
struct Eye<'a> {
    among: &'a Candidates<'a>,
    listed: &'a Listed,
    /// In ticks.
    now: u64,
    penalty: f32,
}

/// What one pick makes of an endpoint.
#[derive(Clone, Copy)]
struct Looked {
    known: Known,
    load: f32,
}

// === impl PeakEwma ===

impl PeakEwma {
    /// Remembers for ten seconds; five seconds of penalty; three choices.
    #[must_use]
    pub fn new() -> Self {
        let (key, listed) = (SlotKey::new(), SlotKey::new());
        Self { key, listed, rate: 0.0, ticks: 0, penalty: 0.0, choices: CHOICES }.decay(DECAY).penalty(PENALTY)
    }

    /// After how long without a call an estimate is worth 1/e. Default 10 s; not below a millisecond.
    #[must_use]
    pub fn decay(mut self, decay: Duration) -> Self {
        let decay = decay.max(Duration::from_millis(1));
        self.rate = 1e-3 / decay.as_secs_f32();
        self.ticks = (TICKS as f64 / decay.as_secs_f64() * 1e-9 * 2_f64.powi(64)) as u64;
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
        endpoint.slot(&self.key, || Estimate::at(Place { block: [Seen::default()].into(), index: 0 }))
    }

    #[cold]
    fn list(&self, all: &[Endpoint]) -> Listed {
        let news = all.iter().filter(|endpoint| endpoint.existing_slot(&self.key).is_none());
        let (news, mut next): (Arc<[Seen]>, _) = (news.map(|_| Seen::default()).collect(), 0..);
        let (mut blocks, mut places, mut known) = (Vec::new(), Vec::new(), HashMap::new());
        for endpoint in all {
            // There is always a next: slots are filled, never emptied.
            let new = || Estimate::at(Place { block: news.clone(), index: next.next().unwrap_or_default() });
            let Estimate { seen: Place { block, index }, .. } = endpoint.slot(&self.key, new);
            let block = *known.entry(Arc::as_ptr(block).addr()).or_insert_with(|| {
                blocks.push(block.clone());
                blocks.len() as u32 - 1
            });
            places.push((block, *index));
        }
        Listed::new(blocks, places)
    }

    fn tick(&self, now: Moment) -> u64 {
        ((u128::from(now.as_nanos()) * u128::from(self.ticks)) >> 64) as u64
    }
}

impl Default for PeakEwma {
    fn default() -> Self {
        Self::new()
    }
}

impl Pick for PeakEwma {
    fn pick(&self, among: &Candidates<'_>) -> Option<usize> {
        let listed = among.of_all(&self.listed, |all| self.list(all));
        let eye = Eye { among, listed, now: self.tick(among.now()), penalty: self.penalty };
        let beside = |position| listed.prefetch(position);
        let [mut best, mut one, mut other] = among.sample_three(beside);
        let (mut cheapest, mut left) = (eye.look(best), self.choices.min(among.len()) - 1);
        while left > 0 {
            if left == 1 {
                other = one;
            }
            // Two at a time. All are looked at before any are compared, and no branch is taken by who is better: nobody can
            // guess that.
            let (first, second) = (eye.look(one), eye.look(other));
            let (a, b, c) =
                (first.is_better_than(cheapest), second.is_better_than(cheapest), second.is_better_than(first));
            let last = (a & c) | (!a & b);
            best = select_unpredictable(last, other, select_unpredictable(a, one, best));
            if left <= 2 {
                break;
            }
            left -= 2;
            cheapest = eye.look(best);
            [_, one, other] = among.sample_three(beside);
        }
        Some(best)
    }

    fn observe(&self, endpoint: &Endpoint, call: &Call) {
        self.estimate(endpoint).learn(call, self.rate, self.tick(call.now));
    }

    fn observes(&self) -> bool {
        true
    }
}

// === impl Listed ===

impl Listed {
    fn new(blocks: Vec<Arc<[Seen]>>, places: Vec<(u32, u32)>) -> Self {
        match &*blocks {
            [only] if (0..).zip(&places).all(|(i, place)| *place == (0, i)) => Self::Straight(only.clone()),
            _ => Self::Scattered { blocks, places },
        }
    }

    /// Has the processor fetch what is read first at this position.
    #[inline(always)]
    fn prefetch(&self, position: usize) {
        match self {
            Self::Straight(block) => prefetch_index(block, position),
            Self::Scattered { places, .. } => prefetch_index(places, position),
        }
    }

    #[inline(always)]
    fn at(&self, position: usize) -> &Seen {
        match self {
            Self::Straight(block) => &block[position],
            Self::Scattered { blocks, places } => {
                let (block, index) = places[position];
                &blocks[block as usize][index as usize]
            }
        }
    }
}

// === impl Eye ===

impl Eye<'_> {
    #[inline(always)]
    fn look(&self, i: usize) -> Looked {
        let position = self.among.position(i);
        let busy = self.among.at(position).in_flight() as f32;
        Looked {
            known: self.listed.at(position).read(self.now, self.penalty),
            load: if self.among.is_weighted() { busy / self.among.relative_weight(i) } else { busy } + 1.0,
        }
    }
}

// === impl Looked ===

impl Looked {
    #[inline(always)]
    fn is_better_than(self, other: Self) -> bool {
        let (mine, others) = self.known.beside(other.known);
        mine * self.load < others * (other.load * CLEARLY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Set;
    use portcullis_core::Outcome;

    fn call(latency: u64, outcome: Outcome, at: u64) -> Call {
        Call {
            latency: Duration::from_millis(latency),
            outcome,
            retry_after: None,
            now: Moment::from_nanos(at * 1_000_000),
        }
    }

    fn known(policy: &PeakEwma, set: &Set, index: usize, at: u64) -> Known {
        seen(policy, &set[index]).read(policy.tick(Moment::from_nanos(at * 1_000_000)), policy.penalty)
    }

    fn seen<'a>(policy: &PeakEwma, endpoint: &'a Endpoint) -> &'a Seen {
        let Place { block, index } = &policy.estimate(endpoint).seen;
        &block[*index as usize]
    }

    /// To the millisecond.
    fn latency(known: Known) -> f32 {
        (known.worth / known.confidence * 1e3).round() / 1e3
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
        assert_eq!(format!("{:?}", seen(&policy, &set[0])), "Seen(0)");
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
                assert!(std::ptr::eq(listed.at(i), seen(&policy, endpoint)));
            }
        }
        let confidence = |set: usize| known(&policy, &sets[set], 1, 1000).confidence;
        assert!(confidence(1) > 0.01 && confidence(0) < 0.001);
    }

    /// A count of milliseconds in 32 bits goes round in 49 days, and seems to go back after half of them.
    #[test]
    fn who_was_idle_for_weeks_is_not_taken_to_be_as_it_was() {
        let day = 24 * 3600 * 1000;
        for days in [25, 40] {
            let (set, policy) = (Set::of(&[1, 1]), PeakEwma::new());
            policy.observe(&set[0], &call(5000, Outcome::Failure, 1000));
            assert!(known(&policy, &set, 0, 1000 + days * day).penalty < 1e-6, "{days}");
            policy.observe(&set[0], &call(20, Outcome::Success, 1000 + days * day));
            assert_eq!(latency(known(&policy, &set, 0, 1000 + days * day)), 0.02, "{days}");
        }
    }
}
