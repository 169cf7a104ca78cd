//! How an endpoint is picked, and when another is tried.

use std::num::{NonZeroU8, NonZeroUsize};
use std::ops::Range;
use std::time::Duration;

use http::StatusCode;

use super::by::{Alternatives, HashBy, has_hole};
use super::mistake::Notes;
use super::plain::{Bytes, Map, Share};
use super::read::{At, Value};
use super::secret::Secret;
use super::section::{section, shorthand, words};

section! {
    /// How an endpoint is picked.
    pub struct Balance {
        /// By what.
        policy: At<BalancePolicy> = At::of(BalancePolicy::PowerOfTwo),
        /// When fewer than so many percent of the endpoints admit, all are used. 0 never does that; above 71 is as 71, unless
        /// `overprovisioning` is less than 140.
        panic_threshold: At<u8> = At::of(50),
        /// How long to wait for an endpoint that admits before a request is refused. By default it is refused at once.
        wait: Option<Duration>,
        /// How many requests may wait for that at a time; others are refused at once.
        waiting: usize = 1024,
        /// How much more than its even share an endpoint can take, in percent, before the next priority gets some.
        overprovisioning: u16 = 140,
        /// The gateway's own zone, which is preferred. By default zones make no difference.
        zone: Option<Zone>,
        /// How long the share of a new endpoint grows. By default it has its whole share at once.
        slow_start: Option<SlowStart>,
        /// What of a request decides where it goes, for the policies that hash; the first that it has. A list in the list
        /// is several things together.
        hash: Alternatives<HashBy>,
        /// How many times its even share an endpoint may have in flight, for "ring-hash".
        bounded_load: Option<At<f64>>,
        /// Points of an endpoint on the ring, for "ring-hash"; 1024 by default.
        points: Option<At<NonZeroUsize>>,
        /// Slots of the table at least, for "maglev"; 65537 by default.
        slots: Option<At<NonZeroUsize>>,
        /// Of how many taken at random one is picked: 3 for "peak-ewma", 5 for "least-connections" where there are many.
        choices: Option<At<NonZeroUsize>>,
        /// Up to how many endpoints all are looked at, for "least-connections"; 16 by default.
        scan_up_to: Option<At<usize>>,
        /// After how long without a call what is known of an endpoint fades, for "peak-ewma"; "10s" by default.
        decay: Option<At<Duration>>,
        /// What an endpoint costs that always fails, for "peak-ewma"; "5s" by default.
        penalty: Option<At<Duration>>,
        /// Keeps callers with the endpoint that served them.
        sticky: Option<Sticky>,
        /// Only these endpoints.
        subset: Option<At<Subset>>,
    }
}

shorthand! {
    /// The gateway's own zone: its name, or a table that says more.
    pub struct Zone(ZoneTable);
    String, |name| ZoneTable { name, share: None, least: 6 }
}

section! {
    /// The gateway's own zone.
    pub struct ZoneTable {
        /// Its name.
        name: String,
        /// Which part of all requests comes from it; by default zones are alike.
        share: Option<Share>,
        /// Does not look at zones where there are fewer endpoints than this.
        least: usize = 6,
    }
}

shorthand! {
    /// How long the share of a new endpoint grows: a time, or a table that says more.
    pub struct SlowStart(SlowStartTable);
    Duration, |window| SlowStartTable { window, floor: Share(0.1), aggression: 1.0 }
}

section! {
    /// How the share of a new endpoint grows.
    pub struct SlowStartTable {
        /// How long.
        window: Duration,
        /// The part of its share it has from the beginning.
        floor: Share = Share(0.1),
        /// Above 1 it grows fast at first, below 1 at last.
        aggression: f64 = 1.0,
    }
}

section! {
    /// Keeps callers with the endpoint that served them, by a cookie.
    pub struct Sticky {
        /// The cookie's name.
        cookie: At<String>,
        /// 32 hexadecimal digits, as `openssl rand -hex 16` prints them; the same for gateways that serve the same callers.
        secret: At<Secret>,
        /// Sends the cookie over encrypted connections only.
        secure: bool = false,
        /// How long callers keep it; by default until their session ends.
        max_age: Option<Duration>,
    }
}

section! {
    /// Some of the endpoints.
    pub struct Subset {
        /// Tags they must all have.
        tags: Vec<String>,
        /// What their metadata must be.
        metadata: Map<String>,
        /// Takes all endpoints when there is none of those, instead of refusing.
        or_any: bool = false,
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
        /// The fastest of three, or as many as `choices` says, by a moving average that jumps up at once.
        PeakEwma = "peak-ewma",
        /// By what of the request `hash` names: the next on a ring.
        RingHash = "ring-hash",
        /// By what of the request `hash` names: from a table, faster and more even.
        Maglev = "maglev",
        /// By what of the request `hash` names: the highest bidder; for few endpoints.
        Rendezvous = "rendezvous",
    }
}

section! {
    /// When another endpoint is tried.
    pub struct Retry {
        /// Attempts in all; 1 never tries another.
        attempts: NonZeroU8 = NonZeroU8::MIN.saturating_add(1),
        /// Gives an attempt up after so long; by default only the timeouts do.
        attempt_timeout: Option<Duration>,
        /// Whether a connection that broke is a reason.
        on_reset: bool = true,
        /// Statuses that are a reason, such as 503; by default none.
        on_statuses: Vec<StatusCode>,
        /// gRPC codes that are a reason, as numbers, such as 14; by default none.
        on_grpc: Vec<At<u8>>,
        /// Also repeats requests that are not idempotent, though an endpoint may have acted on them.
        any_method: bool = false,
        /// What share of all requests may be repeated; 0.2 by default. A service's routes share its budget.
        budget: Option<At<f64>>,
        /// How many may be repeated in a second besides; 10 by default.
        budget_per_second: Option<At<u32>>,
        /// How much of a request's body is kept to send it again.
        max_body: Bytes = Bytes(64 << 10),
        /// The longest wait before the second attempt.
        backoff: Duration = Duration::from_millis(25),
        /// The longest wait before any attempt.
        max_backoff: Duration = Duration::from_millis(250),
    }
}

impl Balance {
    /// Whether its policy goes by what a request has.
    pub(super) fn hashes(&self) -> bool {
        matches!(*self.policy, BalancePolicy::RingHash | BalancePolicy::Maglev | BalancePolicy::Rendezvous)
    }

    pub(super) fn check(&self, notes: &mut Notes<'_>) {
        match (self.hashes(), self.hash.iter().flatten().next()) {
            (true, None) => notes.push(&self.policy.span, "not said by what to hash", "add hash = [\"header:x-user\"]"),
            (false, Some(hash)) => {
                notes.push(&hash.span, "this policy does not hash", "add policy = \"ring-hash\", or remove hash");
            }
            _ => {}
        }
        if self.hashes() && has_hole(&self.hash) {
            notes.push(&self.policy.span, "an empty list in hash", "name what to hash by, or remove it");
        }
        let mut only = |span: Option<&Range<usize>>, policies: &[BalancePolicy], key: &str| {
            if let Some(span) = span.filter(|_| !policies.contains(&*self.policy)) {
                let names: Vec<String> = policies.iter().map(|policy| policy.show().to_string()).collect();
                notes.push(span, format!("only {} has {key}", names.join(" or ")), "remove it");
            }
        };
        let [ring, maglev] = [BalancePolicy::RingHash, BalancePolicy::Maglev];
        let [ewma, least] = [BalancePolicy::PeakEwma, BalancePolicy::LeastConnections];
        only(self.bounded_load.as_ref().map(|at| &at.span), &[ring], "bounded_load");
        only(self.points.as_ref().map(|at| &at.span), &[ring], "points");
        only(self.slots.as_ref().map(|at| &at.span), &[maglev], "slots");
        only(self.choices.as_ref().map(|at| &at.span), &[least, ewma], "choices");
        only(self.scan_up_to.as_ref().map(|at| &at.span), &[least], "scan_up_to");
        only(self.decay.as_ref().map(|at| &at.span), &[ewma], "decay");
        only(self.penalty.as_ref().map(|at| &at.span), &[ewma], "penalty");
        if let Some(factor) = self.bounded_load.as_ref().filter(|factor| ***factor < 1.0) {
            notes.push(&factor.span, "less than an even share is never enough", "such as 1.25");
        }
        if *self.panic_threshold > 100 {
            notes.push(&self.panic_threshold.span, "more than all of the endpoints", "0 to 100 percent");
        }
        if let Some(sticky) = &self.sticky {
            if sticky.secret_bytes().is_none() {
                notes.push(&sticky.secret.span, "not 32 hexadecimal digits", "take what `openssl rand -hex 16` prints");
            } else if portcullis::balance::Sticky::cookie(&sticky.cookie, [0; 16]).is_none() {
                let what = format!("{:?} is no name of a cookie", *sticky.cookie);
                notes.push(&sticky.cookie.span, what, "letters, digits and dashes");
            }
        }
        if let Some(subset) = &self.subset {
            subset.check(&subset.span, notes);
        }
    }
}

impl Retry {
    pub(super) fn check(&self, notes: &mut Notes<'_>) {
        for code in self.on_grpc.iter().filter(|code| ***code > 16) {
            notes.push(&code.span, format!("{} is no code of gRPC", **code), "0 to 16, such as 14");
        }
    }
}

impl Subset {
    pub(super) fn check(&self, span: &Range<usize>, notes: &mut Notes<'_>) {
        if self.tags.is_empty() && self.metadata.is_empty() {
            notes.push(
                span,
                "a subset of nothing in particular",
                "add tags = [\"v2\"] or metadata = { version = \"2\" }",
            );
        }
    }
}

impl Sticky {
    /// The secret, if it is one.
    pub(crate) fn secret_bytes(&self) -> Option<[u8; 16]> {
        let digits = self.secret.reveal();
        (digits.len() == 32).then(|| u128::from_str_radix(digits, 16).ok()).flatten().map(u128::to_be_bytes)
    }
}
