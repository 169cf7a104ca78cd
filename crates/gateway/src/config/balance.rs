//! How an endpoint is picked, and when another is tried.

use std::time::Duration;

use http::StatusCode;

use super::plain::Bytes;
use super::section::{section, words};

section! {
    /// How an endpoint is picked.
    pub struct Balance {
        /// By what.
        policy: BalancePolicy = BalancePolicy::PowerOfTwo,
        /// When fewer than so many percent of the endpoints admit, all are used. 0 never does that.
        panic_threshold: u8 = 50,
        /// How long to wait for an endpoint that admits before a request is refused.
        wait: Option<Duration>,
    }
}

words! {
    /// How an endpoint is picked.
    pub enum BalancePolicy {
        /// The less busy of two taken at random.
        PowerOfTwo = "power-of-two",
        /// The least busy of all.
        LeastConnections = "least-connections",
        /// One after the other, by weight.
        RoundRobin = "round-robin",
        /// Any, by weight.
        Random = "random",
        /// The faster of two, by a moving average that jumps up at once.
        PeakEwma = "peak-ewma",
    }
}

section! {
    /// When another endpoint is tried.
    pub struct Retry {
        /// Attempts in all; 1 never tries another.
        attempts: u8 = 2,
        /// Gives an attempt up after so long.
        attempt_timeout: Option<Duration>,
        /// Whether a connection that broke is a reason.
        on_reset: bool = true,
        /// Statuses that are a reason, such as 503.
        on_statuses: Vec<StatusCode>,
        /// gRPC codes that are a reason, as numbers, such as 14.
        on_grpc: Vec<u8>,
        /// Also repeats requests that are not idempotent, though an endpoint may have acted on them.
        any_method: bool = false,
        /// How much of a request's body is kept to send it again.
        max_body: Bytes = Bytes(64 << 10),
        /// The longest wait before the second attempt.
        backoff: Duration = Duration::from_millis(25),
        /// The longest wait before any attempt.
        max_backoff: Duration = Duration::from_millis(250),
    }
}
