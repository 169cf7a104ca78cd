//! Each in its turn.

use std::sync::atomic::{AtomicUsize, Ordering};

use portcullis_core::SlotKey;

use crate::pick::{Candidates, Pick, mix};

/// Each in its turn; with weights, turns are spread evenly over a cycle, as by earliest deadline first. The first turn is
/// anybody's, so that many balancers do not march in step.
///
/// All threads share one cursor: of the policies here it scales worst over cores. It does not see load.
#[derive(Clone, Debug)]
pub struct RoundRobin {
    key: SlotKey<Turns>,
}

#[derive(Debug)]
struct Turns {
    cursor: AtomicUsize,
    cycle: Cycle,
}

#[derive(Debug)]
enum Cycle {
    Even,
    /// Every turn of one cycle.
    Listed(Box<[u32]>),
    /// The cycle would be too long: the multiples of the golden ratio fall on the endpoints as weights say.
    Golden,
}

/// The longest cycle that is listed.
const LISTED: u64 = 1 << 16;

// === impl RoundRobin ===

impl RoundRobin {
    /// Each in its turn.
    #[must_use]
    pub fn new() -> Self {
        Self { key: SlotKey::new() }
    }
}

impl Default for RoundRobin {
    fn default() -> Self {
        Self::new()
    }
}

impl Pick for RoundRobin {
    fn pick(&self, among: &Candidates<'_>) -> Option<usize> {
        let turns = among.derived(&self.key, || Turns {
            cursor: AtomicUsize::new((among.random() >> 16) as usize),
            cycle: Cycle::of(among),
        });
        let turn = turns.cursor.fetch_add(1, Ordering::Relaxed);
        match &turns.cycle {
            Cycle::Even => Some(turn % among.len()),
            Cycle::Listed(list) => Some(list[turn % list.len()] as usize),
            Cycle::Golden => Some(among.sample_at((turn as u64).wrapping_mul(GOLDEN))),
        }
    }
}

/// 2⁶⁴ divided by the golden ratio.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

// === impl Cycle ===

impl Cycle {
    fn of(among: &Candidates<'_>) -> Self {
        if !among.is_weighted() {
            return Self::Even;
        }
        let weights: Vec<u64> = (0..among.len()).map(|i| u64::from(among.weight(i))).collect();
        Self::listed(&weights).unwrap_or(Self::Golden)
    }

    fn listed(weights: &[u64]) -> Option<Self> {
        let divisor = weights.iter().copied().fold(0, greatest_common_divisor).max(1);
        let length = weights.iter().map(|weight| weight / divisor).sum::<u64>();
        if length > LISTED {
            return None;
        }
        let mut turns = Vec::with_capacity(length as usize);
        for (i, weight) in weights.iter().enumerate() {
            let count = weight / divisor;
            let phase = mix(i as u64 + 1) >> 32;
            // The middle of the j-th of `count` equal parts, shifted by a part of a part.
            turns.extend((0..count).map(|j| (((j << 32) + phase) / count, i as u32)));
        }
        turns.sort_unstable();
        Some(Self::Listed(turns.into_iter().map(|turn| turn.1).collect()))
    }
}

fn greatest_common_divisor(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Set;

    #[test]
    fn each_has_its_turn_in_every_round() {
        let set = Set::of(&[1; 7]);
        let policy = RoundRobin::new();
        let turns: Vec<_> = (0..70).map(|_| set.pick(&policy)).collect();
        for round in turns.chunks(7) {
            let mut round = round.to_vec();
            round.sort_unstable();
            assert_eq!(round, [0, 1, 2, 3, 4, 5, 6]);
        }
    }

    #[test]
    fn weights_are_exact_in_every_cycle_and_turns_are_spread() {
        let set = Set::of(&[5, 1, 1]);
        let policy = RoundRobin::new();
        let turns: Vec<_> = (0..70).map(|_| set.pick(&policy)).collect();
        for cycle in turns.windows(7) {
            assert_eq!(cycle.iter().filter(|turn| **turn == 0).count(), 5);
        }
        let longest = turns.chunk_by(|a, b| a == b).map(<[usize]>::len).max();
        assert!(longest <= Some(4), "{longest:?}");
    }

    #[test]
    fn a_cycle_too_long_to_list_keeps_its_shares() {
        let set = Set::of(&[1_000_003, 500_009, 7]);
        let policy = RoundRobin::new();
        let mut seen = [0_f64; 3];
        for _ in 0..300_000 {
            seen[set.pick(&policy)] += 1.0;
        }
        assert!((seen[0] / seen[1] - 2.0).abs() < 0.001, "{seen:?}");
    }

    #[test]
    fn first_turns_differ() {
        let first: std::collections::HashSet<_> = (0..64).map(|_| Set::of(&[1; 16]).pick(&RoundRobin::new())).collect();
        assert!(first.len() > 4);
    }
}
