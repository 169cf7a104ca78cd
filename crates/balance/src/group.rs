//! Endpoints that one policy picks from, and what can be derived from them once.

use std::sync::OnceLock;

use portcullis_core::{Endpoint, Slots};
use prefetch_index::prefetch_index;

use crate::pick::scale;

/// Some endpoints of a snapshot, with their weights. Immutable; what policies derive from it is kept beside.
#[derive(Debug, Default)]
pub(crate) struct Group {
    /// Positions in the snapshot; `None` for all of it.
    order: Option<Box<[u32]>>,
    /// `None` when they are all equal.
    weights: Option<Box<[u32]>>,
    /// The mean of the weights; 1 when they are all equal.
    mean: f32,
    alias: OnceLock<Alias>,
    slots: Slots,
}

/// Samples by weight in constant time (Walker 1974; built as by Vose 1991).
#[derive(Debug)]
struct Alias {
    /// The part of each column, out of 2³², that is its own; the rest belongs to the other.
    columns: Box<[(u32, u32)]>,
}

// === impl Group ===

impl Group {
    /// `members` are positions in a snapshot of `of` endpoints with their weights, in the snapshot's order.
    pub(crate) fn new(members: &[(u32, u32)], of: usize) -> Self {
        let first = members.first().map_or(0, |member| member.1);
        let total: f64 = members.iter().map(|member| f64::from(member.1)).sum();
        let even = members.iter().all(|member| member.1 == first);
        Self {
            order: (members.len() != of).then(|| members.iter().map(|member| member.0).collect()),
            weights: (!even).then(|| members.iter().map(|member| member.1).collect()),
            mean: if even { 1.0 } else { (total / members.len() as f64) as f32 },
            alias: OnceLock::new(),
            slots: Slots::default(),
        }
    }

    /// Whether it was made from the same.
    pub(crate) fn is_of(&self, members: &[(u32, u32)], of: usize) -> bool {
        let same_order = match &self.order {
            None => members.len() == of,
            Some(order) => order.iter().eq(members.iter().map(|member| &member.0)),
        };
        same_order
            && match &self.weights {
                None => members.windows(2).all(|pair| pair[0].1 == pair[1].1),
                Some(weights) => weights.iter().eq(members.iter().map(|member| &member.1)),
            }
    }

    #[inline]
    pub(crate) fn len(&self, endpoints: &[Endpoint]) -> usize {
        self.order.as_ref().map_or(endpoints.len(), |order| order.len())
    }

    #[inline]
    pub(crate) fn position(&self, index: usize) -> usize {
        self.order.as_ref().map_or(index, |order| order[index] as usize)
    }

    /// Has the processor fetch where this member is to be found.
    #[inline]
    pub(crate) fn prefetch(&self, endpoints: &[Endpoint], index: usize) {
        match &self.order {
            None => prefetch_index(endpoints, index),
            Some(order) => prefetch_index(order, index),
        }
    }

    pub(crate) fn weight(&self, index: usize) -> u32 {
        self.weights.as_ref().map_or(1, |weights| weights[index])
    }

    /// The weight over the mean weight.
    pub(crate) fn relative_weight(&self, index: usize) -> f32 {
        self.weight(index) as f32 / self.mean
    }

    pub(crate) fn is_weighted(&self) -> bool {
        self.weights.is_some()
    }

    pub(crate) fn slots(&self) -> &Slots {
        &self.slots
    }

    /// The member that `random` falls on.
    #[inline]
    pub(crate) fn sample(&self, endpoints: &[Endpoint], random: u64) -> usize {
        match &self.weights {
            None => scale(random, self.len(endpoints)),
            Some(weights) => self.alias.get_or_init(|| Alias::new(weights)).sample(random),
        }
    }
}

// === impl Alias ===

impl Alias {
    fn new(weights: &[u32]) -> Self {
        let total: u128 = weights.iter().map(|weight| u128::from(*weight)).sum();
        let n = weights.len();
        // Scaled so that a full column is `total`.
        let mut left: Vec<u128> = weights.iter().map(|weight| u128::from(*weight) * n as u128).collect();
        let mut columns: Vec<(u32, u32)> = (0..n).map(|i| (u32::MAX, i as u32)).collect();
        let (mut small, mut large): (Vec<usize>, Vec<usize>) = (0..n).partition(|i| left[*i] < total);
        while let (Some(poor), Some(rich)) = (small.pop(), large.last().copied()) {
            columns[poor] = ((left[poor] << 32).checked_div(total).unwrap_or_default() as u32, rich as u32);
            left[rich] -= total - left[poor];
            if left[rich] < total {
                large.pop();
                small.push(rich);
            }
        }
        Self { columns: columns.into() }
    }

    fn sample(&self, random: u64) -> usize {
        let product = u128::from(random) * self.columns.len() as u128;
        let column = (product >> 64) as usize;
        let (own, other) = self.columns[column];
        if ((product as u64) >> 32) as u32 <= own { column } else { other as usize }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(weights: &[u32]) -> Vec<f64> {
        let members: Vec<_> = weights.iter().enumerate().map(|(i, weight)| (i as u32, *weight)).collect();
        let group = Group::new(&members, weights.len());
        let alias = Alias::new(weights);
        let mut seen = vec![0_u32; weights.len()];
        let rounds = 1_000_000_u64;
        for k in 0..rounds {
            seen[alias.sample(k.wrapping_mul(0x9e37_79b9_7f4a_7c15))] += 1;
        }
        assert!(group.is_weighted());
        seen.into_iter().map(|seen| f64::from(seen) / rounds as f64).collect()
    }

    #[test]
    fn samples_fall_as_weights_say() {
        for weights in [&[1_u32, 2][..], &[5, 1, 1], &[1, 1000], &[3, 1, 4, 1, 5, 9, 2, 6], &[u32::MAX, 1, u32::MAX]] {
            let total: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
            for (share, weight) in shares(weights).iter().zip(weights) {
                let fair = f64::from(*weight) / total;
                assert!((share - fair).abs() < 1e-4, "{weights:?}: {share} for {fair}");
            }
        }
    }

    #[test]
    fn a_group_knows_what_it_was_made_of() {
        let members = [(0, 1), (2, 1)];
        let group = Group::new(&members, 3);
        assert!(group.is_of(&members, 3) && !group.is_of(&members[..1], 3) && !group.is_of(&[(0, 1), (2, 2)], 3));
        assert_eq!((group.position(1), group.weight(1)), (2, 1));
        let all = Group::new(&[(0, 3), (1, 3)], 2);
        assert!(!all.is_weighted() && all.is_of(&[(0, 7), (1, 7)], 2), "only ratios count");
    }
}
