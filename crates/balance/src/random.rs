//! Anyone.

use crate::pick::{Candidates, Pick};

/// Anyone, as often as its weight says. It keeps nothing and scales over cores; it does not see load.
#[derive(Clone, Copy, Debug, Default)]
pub struct Random;

// === impl Random ===

impl Random {
    /// Anyone.
    #[must_use]
    pub const fn new() -> Self {
        Self
    }
}

impl Pick for Random {
    fn pick(&self, among: &Candidates<'_>) -> Option<usize> {
        Some(among.sample())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Set;

    #[test]
    fn shares_are_as_weights_say() {
        fastrand::seed(1);
        let set = Set::of(&[1, 2, 5]);
        let mut seen = [0_f64; 3];
        for _ in 0..100_000 {
            seen[set.pick(&Random)] += 1.0;
        }
        for (seen, weight) in seen.iter().zip([1.0, 2.0, 5.0]) {
            assert!((seen / 12_500.0 / weight - 1.0).abs() < 0.03, "{seen} for {weight}");
        }
    }
}
