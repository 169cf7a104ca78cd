//! Consistent hashing by a table.

use crate::hash_key::HashKey;
use crate::pick::{Asked, Candidates, Pick, mix};
use crate::table::{Placed, Table, Tables, hash_by};

/// The endpoint that a table has for the hash, so that requests with the same [`HashKey`] go to the same endpoint
/// (Eisenbud and others: Maglev, NSDI 2016).
///
/// Shares are more even than a [ring](crate::RingHash)'s and looking up is one step; when an endpoint comes or goes, a few
/// more keys move than must. One that does not admit is passed over without moving other keys. A request without a key
/// goes anywhere. Of an endpoint counts `hash_key` in its metadata or else its id, as with [`RingHash`](crate::RingHash).
#[derive(Clone, Debug)]
pub struct Maglev {
    key: HashKey,
    tables: Tables<Slots>,
}

#[derive(Debug)]
pub(crate) struct Slots(Box<[u32]>);

const SIZE: usize = 65_537;
const MOST: usize = 5_000_011;

// === impl Maglev ===

impl Maglev {
    /// By `key`, with a table of 65,537.
    #[must_use]
    pub fn by(key: HashKey) -> Self {
        Self { key, tables: Tables::new(SIZE) }
    }

    /// How many slots the table has at least, at most 5,000,011: the next prime. A hundred times as many as endpoints keep
    /// shares within one percent.
    #[must_use]
    pub fn size(mut self, slots: usize) -> Self {
        self.tables.change(|size| *size = next_prime(slots.clamp(2, MOST)));
        self
    }
}

impl Pick for Maglev {
    fn pick(&self, among: &Candidates<'_>) -> Option<usize> {
        let hash = hash_by(&self.key, among.asked()).unwrap_or_else(|| among.random());
        self.tables.find(among, hash, |i| among.usable(i))
    }

    fn wants_all(&self) -> bool {
        true
    }

    fn prepare(&self, among: &Candidates<'_>) {
        self.tables.prepare(among);
    }

    fn point(&self, asked: Asked<'_>) -> Option<u64> {
        hash_by(&self.key, asked).map(mix)
    }
}

// === impl Slots ===

impl Table for Slots {
    type Settings = usize;

    fn build(placed: &[Placed], size: &usize) -> Self {
        const EMPTY: u32 = u32::MAX;
        let size = *size as u64;
        let heaviest = placed.iter().map(|one| u64::from(one.weight)).max().unwrap_or(1);
        let mut slots = vec![EMPTY; size as usize];
        // Each endpoint's own order of the slots, where it stands in it, and how much of a turn it has saved up.
        let mut order: Vec<(u64, u64, u64)> =
            placed.iter().map(|one| (one.hash % size, mix(one.hash) % (size - 1) + 1, 0)).collect();
        let mut left = size;
        while left > 0 && !placed.is_empty() {
            for ((at, skip, saved), one) in order.iter_mut().zip(placed) {
                *saved += u64::from(one.weight);
                if *saved < heaviest {
                    continue;
                }
                *saved -= heaviest;
                while slots[*at as usize] != EMPTY {
                    *at += *skip;
                    if *at >= size {
                        *at -= size;
                    }
                }
                slots[*at as usize] = one.position;
                left -= 1;
                if left == 0 {
                    break;
                }
            }
        }
        Self(slots.into())
    }

    fn walk(&self, hash: u64) -> impl Iterator<Item = u32> {
        let size = self.0.len() as u64;
        std::iter::successors(Some(hash), |hash| Some(mix(*hash))).map(move |hash| self.0[(hash % size) as usize])
    }
}

fn next_prime(from: usize) -> usize {
    let is_prime = |n: usize| n >= 2 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d));
    (from..).find(|n| is_prime(*n)).unwrap_or(SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Set, asking, spread};

    fn placed(weights: &[u32]) -> Vec<Placed> {
        let place = |(position, weight): (u32, &u32)| Placed { hash: mix(position.into()), weight: *weight, position };
        (0..).zip(weights).map(place).collect()
    }

    fn maglev() -> Maglev {
        Maglev::by(HashKey::path())
    }

    #[test]
    fn shares_are_even_and_as_weights_say() {
        let slots = |weights: &[u32]| {
            let table = Slots::build(&placed(weights), &SIZE);
            let mut seen = vec![0_u32; weights.len()];
            table.0.iter().for_each(|position| seen[*position as usize] += 1);
            seen
        };
        assert!(slots(&[1; 100]).iter().all(|seen| (655..=656).contains(seen)));
        let weighted = slots(&[4, 2, 1, 1]);
        assert!((weighted[0] as f64 / weighted[2] as f64 - 4.0).abs() < 0.01, "{weighted:?}");
        assert!(spread(&maglev(), &[1; 10], 100_000) < 1.03);
    }

    #[test]
    fn an_endpoint_that_does_not_admit_moves_only_its_own_keys() {
        let (set, policy) = (Set::of(&[1; 10]), maglev());
        let before: Vec<_> = (0..1000).map(|key| set.pick_for(&policy, &asking(key))).collect();
        set.close(3);
        for (key, before) in before.iter().enumerate() {
            let after = set.pick_for(&policy, &asking(key));
            assert!(if *before == 3 { after != 3 } else { after == *before });
        }
    }

    #[test]
    fn few_keys_move_when_an_endpoint_goes() {
        let endpoints = placed(&[1; 100]);
        let (all, less) = (Slots::build(&endpoints, &SIZE), Slots::build(&endpoints[..99], &SIZE));
        let moved = all.0.iter().zip(&less.0).filter(|(before, after)| **before != 99 && before != after).count();
        assert!(moved * 100 < SIZE, "{moved} of {SIZE} moved needlessly");
    }

    #[test]
    fn sizes_are_primes() {
        assert_eq!([1, 2, 9, 65_536].map(next_prime), [2, 2, 11, 65_537]);
    }
}
