//! Whoever is least busy.

use portcullis_core::Endpoint;

use crate::pick::{Candidates, Pick};

/// Whoever has the fewest requests in flight for its weight, of all when they are few, else of some at random.
///
/// Requests are counted to the end of their response bodies. Among equals the weights decide, so an idle service is
/// shared out exactly.
#[derive(Clone, Copy, Debug)]
pub struct LeastConnections {
    choices: usize,
    scan: usize,
}

/// The less busy of two at random: nearly as even as asking everybody, at constant cost, and without everybody running to
/// the same one (Mitzenmacher: The power of two choices in randomized load balancing, 2001).
///
/// The two are distinct. The second is taken only if it is strictly less busy for its weight, so the shares of an idle
/// service are exactly those of the weights, whatever their number.
#[derive(Clone, Copy, Debug, Default)]
pub struct PowerOfTwo;

/// Of how many [`LeastConnections`] picks when they are too many to look at all.
const CHOICES: usize = 5;
/// Up to how many [`LeastConnections`] looks at all.
const SCAN: usize = 16;

// === impl LeastConnections ===

impl LeastConnections {
    /// The least busy of all up to 16 endpoints, else of five at random.
    #[must_use]
    pub const fn new() -> Self {
        Self { choices: CHOICES, scan: SCAN }
    }

    /// Of how many at random it picks when it does not look at all; at least two. Default 5.
    #[must_use]
    pub const fn choices(mut self, choices: usize) -> Self {
        self.choices = if choices < 2 { 2 } else { choices };
        self
    }

    /// Up to how many endpoints it looks at all of them. Default 16. Many balancers that look at all run to the same
    /// endpoint at once, and one that fails fast draws them.
    #[must_use]
    pub const fn scan_up_to(mut self, endpoints: usize) -> Self {
        self.scan = endpoints;
        self
    }
}

impl Default for LeastConnections {
    fn default() -> Self {
        Self::new()
    }
}

impl Pick for LeastConnections {
    fn pick(&self, among: &Candidates<'_>) -> Option<usize> {
        if among.len() <= self.scan {
            return least_of_all(among);
        }
        let mut best = among.sample();
        for _ in 1..self.choices {
            if let Some(other) = among.sample_other(best)
                && is_less_busy(among, other, best)
            {
                best = other;
            }
        }
        Some(best)
    }
}

// === impl PowerOfTwo ===

impl PowerOfTwo {
    /// The less busy of two at random.
    #[must_use]
    pub const fn new() -> Self {
        Self
    }
}

impl Pick for PowerOfTwo {
    fn pick(&self, among: &Candidates<'_>) -> Option<usize> {
        let [one, other] = among.sample_two();
        Some(if is_less_busy(among, other, one) { other } else { one })
    }
}

fn is_less_busy(among: &Candidates<'_>, a: usize, b: usize) -> bool {
    if among.is_weighted() {
        let load = |i: usize, other: usize| busy(&among[i]) * u64::from(among.weight(other));
        load(a, b) < load(b, a)
    } else {
        busy(&among[a]) < busy(&among[b])
    }
}

/// One of the least busy, by weight.
fn least_of_all(among: &Candidates<'_>) -> Option<usize> {
    let mut all = (0..among.len()).filter(|i| among.all_usable() || among.usable(*i));
    let mut best = all.next()?;
    let mut rivals = among.weight(best) as usize;
    for i in all {
        if is_less_busy(among, i, best) {
            (best, rivals) = (i, among.weight(i) as usize);
        } else if !is_less_busy(among, best, i) {
            rivals += among.weight(i) as usize;
            if among.random_below(rivals) < among.weight(i) as usize {
                best = i;
            }
        }
    }
    Some(best)
}

fn busy(endpoint: &Endpoint) -> u64 {
    u64::from(endpoint.in_flight())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Set;

    #[test]
    fn the_least_busy_of_all_is_picked() {
        let set = Set::of(&[1; 5]);
        let _busy: Vec<_> = [0, 0, 1, 2, 2, 4].map(|i: usize| set[i].begin()).into();
        for _ in 0..100 {
            assert_eq!(set.pick(&LeastConnections::new()), 3);
        }
    }

    #[test]
    fn requests_are_counted_against_weight() {
        let set = Set::of(&[4, 1]);
        let _busy: Vec<_> = [0, 0, 0, 1].map(|i: usize| set[i].begin()).into();
        for _ in 0..100 {
            assert_eq!(set.pick(&LeastConnections::new()), 0, "3 of 4 is less than 1 of 1");
            assert_eq!(set.pick(&PowerOfTwo), 0);
        }
    }

    /// Picking two by weight and the better of them drifts: a node of weight ½ among units gets a whole share of two,
    /// 0.61 of three, 0.56 of four.
    #[test]
    fn an_idle_service_is_shared_as_weights_say_at_any_number() {
        for n in [2_usize, 3, 4, 6, 10, 100] {
            // Small seeds begin alike.
            fastrand::seed(crate::pick::mix(n as u64));
            let mut weights = vec![2; n];
            weights[0] = 1;
            let set = Set::of(&weights);
            let policies: [(&str, &dyn Pick); 3] = [
                ("two", &PowerOfTwo),
                ("all", &LeastConnections::new().scan_up_to(1000)),
                ("five", &LeastConnections::new().scan_up_to(0)),
            ];
            let affordable = if n > 10 { 1 } else { 3 };
            for (name, policy) in &policies[..affordable] {
                let rounds = 20_000 * n;
                let seen = (0..rounds).filter(|_| set.pick(*policy) == 0).count() as f64;
                let fair = rounds as f64 / (2 * n - 1) as f64;
                assert!((seen / fair - 1.0).abs() < 0.03, "{name} of {n}: {}", seen / fair);
            }
        }
    }

    #[test]
    fn another_attempt_goes_to_the_least_busy_of_the_others() {
        let set = Set::of(&[1; 3]);
        let _busy: Vec<_> = [1; 5].into_iter().chain([2; 50]).map(|i: usize| set[i].begin()).collect();
        let (few, ewma) = (LeastConnections::new().scan_up_to(0), crate::PeakEwma::new());
        let policies: [&dyn Pick; 4] = [&PowerOfTwo, &LeastConnections::new(), &few, &ewma];
        for policy in policies {
            assert!((0..100).all(|_| set.pick_after(policy, &[0]) == 1));
            assert!((0..100).all(|_| set.pick_after(policy, &[0, 1]) == 2));
        }
    }

    #[test]
    fn other_attempts_go_by_weight_among_the_others() {
        fastrand::seed(8);
        let (set, mut seen) = (Set::of(&[1000, 10, 1, 4]), [0_u32; 4]);
        set.close(3);
        (0..11_000).for_each(|_| seen[set.pick_after(&crate::random::Random, &[0])] += 1);
        assert!(seen[0] == 0 && seen[3] == 0 && (850..1150).contains(&seen[2]), "{seen:?}");
    }

    /// So many that numbers are drawn ahead: each policy shares them out all the same.
    #[test]
    fn very_many_are_shared_out_evenly_and_the_less_busy_ones_preferred() {
        fastrand::seed(9);
        const MANY: usize = 5000;
        let set = Set::of(&[1; MANY]);
        let _busy: Vec<_> = (0..MANY / 2).map(|i| set[i].begin()).collect();
        let policies: [(&dyn Pick, f64); 3] =
            [(&crate::random::Random, 0.5), (&PowerOfTwo, 0.25), (&crate::PeakEwma::new(), 0.125)];
        for (policy, fair) in policies {
            let rounds = 20 * MANY;
            let (mut seen, mut busy) = (vec![0_u32; MANY], 0.0);
            for _ in 0..rounds {
                let i = set.pick(policy);
                seen[i] += 1;
                busy += f64::from(u8::from(i < MANY / 2)) / rounds as f64;
            }
            assert!((busy - fair).abs() < 0.01, "{busy} of busy ones for {fair}");
            // Poisson: how far the counts of equals are spread is how many there are.
            let mean = 2.0 * (1.0 - busy) * 20.0;
            let spread: f64 = seen[MANY / 2..].iter().map(|seen| (f64::from(*seen) - mean).powi(2)).sum();
            assert!((spread / mean / (MANY / 2) as f64 - 1.0).abs() < 0.1, "{spread}");
        }
    }

    #[test]
    fn the_busier_of_two_is_never_picked() {
        let set = Set::of(&[1, 1]);
        let _busy = set[1].begin();
        for _ in 0..100 {
            assert_eq!(set.pick(&PowerOfTwo), 0);
        }
    }
}
