//! Consistent hashing on a ring.

use crate::hash_key::HashKey;
use crate::pick::{Asked, Candidates, Pick, mix};
use crate::table::{Placed, Table, Tables, hash_by};

/// The endpoint that comes next on a ring, so that requests with the same [`HashKey`] go to the same endpoint and only
/// those of a lost endpoint move (Karger and others, 1997; laid out as ketama does).
///
/// Each endpoint stands on the ring in proportion to its weight. One that does not admit, or is
/// [too busy](Self::bounded_load), is passed over for the next. A request without a key goes anywhere.
///
/// An endpoint's own place comes from `hash_key` in its metadata
/// (gRPC A76), or else from its id: what comes back under another id without one takes other keys.
#[derive(Clone, Debug)]
pub struct RingHash {
    key: HashKey,
    tables: Tables<Ring>,
    bound: Option<f64>,
}

/// The points in their order, and an index as long: whoever is looked for stands a step or two from where it points, however
/// many there are.
#[derive(Debug)]
pub(crate) struct Ring {
    hashes: Box<[u64]>,
    positions: Box<[u32]>,
    /// Where the points begin whose hashes have these bits above.
    starts: Box<[u32]>,
    /// So many bits are below.
    below: u32,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    each: usize,
    most: usize,
}

const EACH: usize = 1024;
const MOST: usize = 1 << 18;

// === impl RingHash ===

impl RingHash {
    /// By `key`, with 1024 points for each endpoint and at most 262,144 in all.
    #[must_use]
    pub fn by(key: HashKey) -> Self {
        Self { key, tables: Tables::new(Size { each: EACH, most: MOST }), bound: None }
    }

    /// How many points an endpoint of average weight has, and how many there are at most. More are fairer and slower to
    /// build; each takes 16 bytes.
    #[must_use]
    pub fn points(mut self, each: usize, most: usize) -> Self {
        self.tables.change(|size| *size = Size { each: each.max(1), most: most.clamp(1, 1 << 23) });
        self
    }

    /// Passes over an endpoint that would have more than `factor` times its share of the requests in flight (Mirrokni,
    /// Thorup, Zadimoghaddam: Consistent hashing with bounded loads, 2016). At least 1; 1.25 to 2 are usual. By default
    /// there is no bound.
    ///
    /// Shares are those among the endpoints that admit. Of more than 32 endpoints the average is estimated from 32.
    #[must_use]
    pub fn bounded_load(mut self, factor: f64) -> Self {
        self.bound = factor.is_finite().then_some(factor.max(1.0));
        self
    }
}

impl Pick for RingHash {
    fn pick(&self, among: &Candidates<'_>) -> Option<usize> {
        let hash = hash_by(&self.key, among.asked()).unwrap_or_else(|| among.random());
        let usable = |i| among.usable(i);
        if let Some(factor) = self.bound {
            let load = among.load_by_weight();
            let room = |i: usize| {
                let most = (factor * load * f64::from(among.weight(i))).ceil();
                f64::from(among[i].in_flight()) < most.max(1.0)
            };
            if let Some(found) = self.tables.find(among, hash, |i| usable(i) && room(i)) {
                return Some(found);
            }
        }
        self.tables.find(among, hash, usable)
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

// === impl Ring ===

impl Table for Ring {
    type Settings = Size;

    fn build(placed: &[Placed], size: &Size) -> Self {
        let total: f64 = placed.iter().map(|one| f64::from(one.weight)).sum();
        let size = size.each.saturating_mul(placed.len()).min(size.most) as f64;
        let mut points = Vec::new();
        let mut due = 0.0;
        for Placed { hash, weight, position } in placed {
            due += size * f64::from(*weight) / total;
            let so_far = points.len();
            // Rounded along the way, so that the sum is right; nobody is left out.
            let count = (due.round() as usize).saturating_sub(so_far).max(1);
            points.extend((0..count as u64).map(|i| (mix(hash.wrapping_add(i.wrapping_mul(STEP))), *position)));
        }
        points.sort_unstable();
        let (hashes, positions): (Vec<u64>, Vec<u32>) = points.into_iter().unzip();
        let bits = hashes.len().max(2).ilog2();
        let (below, mut next) = (u64::BITS - bits, 0);
        let start = |above: u64| {
            next += hashes[next..].iter().take_while(|hash| *hash >> below < above).count();
            next as u32
        };
        let starts = (0..1 << bits).map(start).collect();
        Self { hashes: hashes.into(), positions: positions.into(), starts, below }
    }

    fn walk(&self, hash: u64) -> impl Iterator<Item = u32> {
        let near = self.starts[(hash >> self.below) as usize] as usize;
        let start = near + self.hashes[near..].iter().take_while(|point| **point < hash).count();
        self.positions[start..].iter().chain(&self.positions[..start]).copied()
    }
}

const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Set, asking, spread};

    fn ring() -> RingHash {
        RingHash::by(HashKey::path())
    }

    #[test]
    fn one_key_is_one_endpoint_and_a_lost_endpoint_moves_only_its_own() {
        let (set, policy) = (Set::of(&[1; 10]), ring());
        let before: Vec<_> = (0..1000).map(|key| set.pick_for(&policy, &asking(key))).collect();
        set.close(3);
        for (key, before) in before.iter().enumerate() {
            let after = set.pick_for(&policy, &asking(key));
            assert!(if *before == 3 { after != 3 } else { after == *before }, "key {key}: {before} → {after}");
        }
    }

    #[test]
    fn shares_are_even_and_as_weights_say() {
        assert!(spread(&ring(), &[1; 10], 100_000) < 1.09);
        assert!(spread(&ring(), &[4, 2, 1, 1], 100_000) < 1.12);
    }

    #[test]
    fn a_walk_begins_with_the_next_point_and_goes_round() {
        for each in [1, 2, 3, 1000] {
            let placed = |position: u32| Placed { hash: mix(position.into()), weight: 1 + position, position };
            let ring = Ring::build(&(0..3).map(placed).collect::<Vec<_>>(), &Size { each, most: MOST });
            let around = |hash: u64| [hash.wrapping_sub(1), hash, hash.wrapping_add(1)];
            let some = (0..1000).map(mix).chain(ring.hashes.iter().copied().flat_map(around)).chain([0, u64::MAX]);
            for hash in some {
                let next = ring.hashes.partition_point(|point| *point < hash);
                let (before, after) = ring.positions.split_at(next);
                assert!(ring.walk(hash).eq(after.iter().chain(before).copied()), "{hash} among {}", ring.hashes.len());
            }
        }
    }

    #[test]
    fn a_request_without_a_key_goes_anywhere() {
        let (set, policy) = (Set::of(&[1; 10]), RingHash::by(HashKey::cookie("none")));
        let seen: std::collections::HashSet<_> = (0..100).map(|_| set.pick(&policy)).collect();
        assert!(seen.len() > 5);
    }

    #[test]
    fn a_busy_endpoint_is_passed_over() {
        let (set, policy) = (Set::of(&[1; 4]), ring().bounded_load(1.25));
        let mut busy = Vec::new();
        for _ in 0..40 {
            busy.push(set[set.pick_for(&policy, &asking(1))].begin());
        }
        let most = (0..4).map(|i| set[i].in_flight()).max().unwrap();
        assert!(most <= 13, "one key, 40 requests, 4 endpoints: {most}");
        assert_eq!(
            (0..40).map(|_| set.pick_for(&ring(), &asking(1))).collect::<std::collections::HashSet<_>>().len(),
            1
        );
    }

    #[test]
    fn who_does_not_admit_takes_no_share_of_the_bound() {
        for closed in 0..6 {
            let (set, policy) = (Set::of(&[1; 10]), ring().bounded_load(1.25));
            (0..closed).for_each(|i| set.close(i));
            let busy: Vec<_> = (0..60).map(|_| set[set.pick_for(&policy, &asking(1))].begin()).collect();
            let most = (0..10).map(|i| set[i].in_flight()).max().unwrap();
            let bound = (1.25 * busy.len() as f64 / (10 - closed) as f64).ceil();
            assert!(f64::from(most) <= bound, "{closed} of 10 closed: {most}, bound {bound}");
        }
    }
}
