//! Consistent hashing by the highest score.

use crate::hash_key::HashKey;
use crate::pick::{Asked, Candidates, Pick, mix, score};
use crate::table::{hash_by, hash_of};
use portcullis_core::SlotKey;

/// The endpoint with the highest score for the request's [`HashKey`] (Thaler and Ravishankar, 1998): shares are exactly
/// those of the weights, no key moves that need not, and there is no table; but each pick looks at every endpoint. For up
/// to some dozens. Of an endpoint counts `hash_key` in its metadata or else its id, as with [`RingHash`](crate::RingHash).
#[derive(Clone, Debug)]
pub struct Rendezvous {
    key: HashKey,
    hashes: SlotKey<Box<[u64]>>,
}

// === impl Rendezvous ===

impl Rendezvous {
    /// By `key`.
    #[must_use]
    pub fn by(key: HashKey) -> Self {
        Self { key, hashes: SlotKey::new() }
    }
}

impl Pick for Rendezvous {
    fn pick(&self, among: &Candidates<'_>) -> Option<usize> {
        let hash = hash_by(&self.key, among.asked()).unwrap_or_else(|| among.random());
        let hashes = among.derived(&self.hashes, || (0..among.len()).map(|i| hash_of(&among[i])).collect());
        let score = |i: usize| {
            let own = mix(hash ^ hashes[i]);
            if among.is_weighted() { score(own, among.weight(i)) } else { own as f64 }
        };
        (0..among.len())
            .map(|i| (i, score(i)))
            .filter(|(i, _)| among.usable(*i))
            .max_by(|a, b| a.1.total_cmp(&b.1))
            .map(|(i, _)| i)
    }

    fn wants_all(&self) -> bool {
        true
    }

    fn point(&self, asked: Asked<'_>) -> Option<u64> {
        hash_by(&self.key, asked).map(mix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Set, asking, spread};

    #[test]
    fn only_the_keys_of_a_lost_endpoint_move() {
        let (set, policy) = (Set::of(&[1, 2, 3, 4]), Rendezvous::by(HashKey::path()));
        let before: Vec<_> = (0..1000).map(|key| set.pick_for(&policy, &asking(key))).collect();
        set.close(3);
        for (key, before) in before.iter().enumerate() {
            let after = set.pick_for(&policy, &asking(key));
            assert!(if *before == 3 { after != 3 } else { after == *before });
        }
    }

    #[test]
    fn shares_are_as_weights_say() {
        let policy = Rendezvous::by(HashKey::path());
        assert!(spread(&policy, &[1; 10], 100_000) < 1.04);
        assert!(spread(&policy, &[1, 2, 3, 4], 100_000) < 1.04);
    }
}
