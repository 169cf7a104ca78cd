//! How long things took, in buckets.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Where histograms change bucket, in seconds: finely first, for the page, and from [`FINE`] on as OpenTelemetry has it for
/// `http.server.request.duration`.
pub(crate) const BOUNDS: [f64; 19] = [
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0,
];
/// So many bounds lie below those of OpenTelemetry.
pub(crate) const FINE: usize = 5;
/// How long things took.
#[derive(Default)]
pub(crate) struct Histogram {
    buckets: [AtomicU64; BOUNDS.len() + 1],
    nanos: AtomicU64,
}

/// A [`Histogram`] as it was at one time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Times {
    pub(crate) buckets: [u64; BOUNDS.len() + 1],
    pub(crate) seconds: f64,
}

// === impl Histogram ===

impl Histogram {
    pub(crate) fn record(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let bucket = BOUNDS.iter().position(|&bound| seconds <= bound).unwrap_or(BOUNDS.len());
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.nanos.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> Times {
        Times {
            buckets: std::array::from_fn(|index| self.buckets[index].load(Ordering::Relaxed)),
            seconds: self.nanos.load(Ordering::Relaxed) as f64 / 1e9,
        }
    }
}

// === impl Times ===

impl Times {
    pub(crate) fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (sum, add) in self.buckets.iter_mut().zip(other.buckets) {
            *sum += add;
        }
        self.seconds += other.seconds;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_falls_into_the_bucket_whose_bound_it_does_not_pass() {
        let histogram = Histogram::default();
        for micros in [100, 101, 5_000, 10_000_000, 10_000_001] {
            histogram.record(Duration::from_micros(micros));
        }
        let mut times = histogram.read();
        let full: Vec<usize> = (0..times.buckets.len()).filter(|&index| times.buckets[index] == 1).collect();
        assert_eq!(full, [0, 1, FINE, BOUNDS.len() - 1, BOUNDS.len()]);
        assert!((times.seconds - 20.005_202).abs() < 1e-6, "{}", times.seconds);
        times.add(&histogram.read());
        assert_eq!(times.count(), 10);
    }
}
