//! How often callers may come.

use std::num::{NonZeroU32, NonZeroUsize};
use std::ops::Range;
use std::time::Duration;

use serde_json::{Value as Json, json};

use super::by::{Alternatives, CountBy, LookUpBy, SettleBy, has_hole};
use super::mistake::Notes;
use super::model::check_network;
use super::plain::{Map, Rate};
use super::read::{At, Value};
use super::secret::{Blob, Secret, pem};
use super::section::{section, shorthand, words};

section! {
    /// How often callers may come, or how many requests they may have under way. One of `rate` and `max_in_flight`.
    pub struct Limit {
        /// Such as "100/s", "20/m" or "5/10s".
        rate: Option<At<Rate>>,
        /// How many requests may be under way at a time.
        max_in_flight: Option<At<NonZeroU32>>,
        /// How many may come at once after a rest; by default as many as the rate says.
        burst: Option<At<NonZeroU32>>,
        /// Who counts together: the first of these that a request has, and in the end where it comes from. A list in the
        /// list is several things together.
        key: Alternatives<CountBy> = vec![vec![At::of(CountBy::Caller)]],
        /// How many bits of an IPv6 address are one caller's.
        ipv6_prefix: At<u8> = At::of(64),
        /// What a request costs. What costs nothing is not limited.
        cost: Option<At<u32>>,
        /// What it turned out to have cost, once its response has ended; the difference is charged or given back. With
        /// `limiter.redis` only what a lease covered is given back, which is what comes often.
        settle: Option<At<SettleBy>>,
        /// Other rates for some callers.
        plan: Option<At<Plan>>,
        /// Which requests leave some of the burst to others.
        priority: Option<At<Priority>>,
        /// Counts and refuses nothing, to see what it would do.
        shadow: bool = false,
    }
}

section! {
    /// Other rates for some callers. Who is not among them has the limit's own.
    pub struct Plan {
        /// What is looked up.
        by: LookUpBy,
        /// The rate for each value.
        rates: Map<PlanRate>,
    }
}

shorthand! {
    /// A rate, or a table that says more.
    pub struct PlanRate(PlanRateTable);
    Rate, |rate| PlanRateTable { rate, burst: None }
}

section! {
    /// The rate of a plan.
    pub struct PlanRateTable {
        /// Such as "100/s".
        rate: Rate,
        /// How many may come at once after a rest; by default as many as the rate says.
        burst: Option<NonZeroU32>,
    }
}

section! {
    /// Which requests leave some of the burst to others. Under pressure those that leave most are refused first.
    pub struct Priority {
        /// What is looked up.
        by: LookUpBy,
        /// How many percent of the burst requests with each value leave.
        leave: Map<u8>,
        /// How many percent others leave.
        otherwise: u8 = 0,
    }
}

section! {
    /// Where limits count.
    pub struct Limiter {
        /// Names of limits that hold where a route says nothing.
        default: Vec<At<String>>,
        /// Requests that are neither counted nor refused: those of which one of these is so.
        exempt: Exempt,
        /// How many callers have a count of their own, for each limit.
        capacity: At<NonZeroUsize> = At::of(NonZeroUsize::new(65_536).unwrap_or(NonZeroUsize::MIN)),
        /// Which responses say how much is left.
        fields: LimitFields = LimitFields::Refusals,
        /// Says so in X-RateLimit-Limit, -Remaining and -Reset as well.
        legacy_fields: bool = false,
        /// Lets requests wait for so long instead of refusing them at once.
        delay: Option<At<Duration>>,
        /// How many may wait at a time.
        delay_places: usize = 1000,
        /// Counts in a Redis or Valkey that other gateways share, instead of in this process.
        redis: Option<At<Redis>>,
    }
}

section! {
    /// Requests that no limit counts.
    pub struct Exempt {
        /// They come from here, such as "10.0.0.0/8".
        networks: Vec<At<String>>,
        /// They are for one of these paths, such as "/health".
        paths: Vec<String>,
        /// The caller is one of these.
        subjects: Vec<String>,
        /// The caller has one of these roles.
        roles: Vec<String>,
    }
}

words! {
    /// Which responses say how much of a limit is left.
    pub enum LimitFields {
        /// Refusals.
        Refusals = "refusals",
        /// All.
        Always = "always",
        /// None.
        Never = "never",
    }
}

section! {
    /// A Redis or Valkey that gateways share.
    pub struct Redis {
        /// Such as "redis://:password@127.0.0.1:6379/0"; "rediss://" speaks TLS.
        url: At<Secret>,
        /// Authorities of a server that speaks TLS, as PEM, instead of the system's.
        ca: Option<At<Blob>>,
        /// What its keys begin with. Gateways share what has the same.
        prefix: String = String::from("{portcullis}"),
        /// How long a request waits for its answer.
        deadline: Duration = Duration::from_millis(20),
        /// How long a gateway decides by itself with what it took ahead; "0s" asks for every request.
        lease: Duration = Duration::from_secs(1),
        /// What a request gets while there is no answer.
        on_failure: OnFailure = OnFailure::Admit,
        /// How many gateways share the rate then, with on_failure = "share".
        gateways: Option<At<NonZeroU32>>,
    }
}

words! {
    /// What a request gets while Redis does not answer.
    pub enum OnFailure {
        /// It is admitted.
        Admit = "admit",
        /// 503.
        Refuse = "refuse",
        /// What this process's share of the rate allows.
        Share = "share",
    }
}

impl Limit {
    /// The rate as the file has it.
    pub(crate) fn masked_rate(&self) -> Json {
        match &self.max_in_flight {
            Some(most) => json!(format!("{} at a time", **most)),
            None => self.rate.show(),
        }
    }

    pub(super) fn check(&self, span: &Range<usize>, notes: &mut Notes<'_>) {
        match (&self.rate, &self.max_in_flight) {
            (None, None) => notes.push(span, "a limit of nothing", "add rate = \"100/s\" or max_in_flight = 10"),
            (Some(_), Some(most)) => notes.push(&most.span, "both rate and max_in_flight", "make two limits of them"),
            (Some(_), None) => {}
            (None, Some(_)) => {
                if let Some(burst) = &self.burst {
                    notes.push(&burst.span, "a burst of no rate", "remove it");
                }
            }
        }
        if let Some(cost) = self.cost.as_ref().filter(|cost| ***cost == 0 && self.settle.is_some()) {
            notes.push(&cost.span, "what costs nothing at first is not settled either", "at least 1");
        }
        if has_hole(&self.key) || self.key.is_empty() {
            notes.push(span, "an empty list in key", "name what tells callers apart, such as \"caller\"");
        }
        if self.key.iter().any(|together| together.len() > 4) {
            notes.push(span, "too many things together in key", "at most four");
        }
        if !(1..=128).contains(&*self.ipv6_prefix) {
            notes.push(&self.ipv6_prefix.span, "an IPv6 address has 128 bits", "1 to 128");
        }
        if self.max_in_flight.is_some() {
            let mut idle = |span: Option<&Range<usize>>, what: &str| {
                if let Some(span) = span {
                    notes.push(span, format!("{what} where requests under way are counted"), "remove it");
                }
            };
            idle(self.cost.as_ref().map(|at| &at.span), "a cost");
            idle(self.settle.as_ref().map(|at| &at.span), "a cost in the end");
            idle(self.plan.as_ref().map(|at| &at.span), "a plan");
            idle(self.priority.as_ref().map(|at| &at.span), "a priority");
        }
        if let Some(plan) = self.plan.as_ref().filter(|plan| plan.rates.is_empty()) {
            notes.push(&plan.span, "a plan without rates", "add rates = { gold = \"1000/s\" }");
        }
        if let Some(priority) = &self.priority {
            let percents = priority.leave.values().chain([&priority.otherwise]);
            if percents.into_iter().any(|percent| *percent > 100) {
                notes.push(&priority.span, "more than the whole burst", "0 to 100 percent");
            }
        }
    }
}

impl Limiter {
    pub(super) fn check(&self, notes: &mut Notes<'_>) {
        for network in &self.exempt.networks {
            check_network(network, notes);
        }
        if self.capacity.get() > 1 << 24 {
            notes.push(&self.capacity.span, "more callers than there is memory for", "at most 16777216, of 64 bytes");
        }
        let Some(redis) = &self.redis else { return };
        if redis.ca.as_ref().is_some_and(|ca| !pem(ca, "CERTIFICATE", notes)) {
            return;
        }
        if let Err(error) = crate::build::store(redis) {
            notes.push(&redis.url.span, error, "such as \"redis://127.0.0.1:6379\"");
        }
        match (redis.on_failure, &redis.gateways) {
            (OnFailure::Share, None) => notes.push(&redis.span, "not said among how many", "add gateways = 2"),
            (OnFailure::Admit | OnFailure::Refuse, Some(gateways)) => {
                notes.push(&gateways.span, "a number that is not looked at", "add on_failure = \"share\"");
            }
            _ => {}
        }
    }
}
