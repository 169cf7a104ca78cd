//! How often callers may come.

use std::num::{NonZeroU32, NonZeroUsize};
use std::ops::Range;
use std::time::Duration;

use http::HeaderName;
use serde_json::{Value as Json, json};

use super::mistake::Notes;
use super::plain::Rate;
use super::read::{At, Value};
use super::secret::Secret;
use super::section::{section, words};

section! {
    /// How often callers may come, or how many requests they may have under way. One of `rate` and `max_in_flight`.
    pub struct Limit {
        /// Such as "100/s", "20/m" or "5/10s".
        rate: Option<At<Rate>>,
        /// How many requests may be under way at a time.
        max_in_flight: Option<At<NonZeroU32>>,
        /// How many may come at once after a rest; by default as many as the rate says.
        burst: Option<At<NonZeroU32>>,
        /// Who counts together.
        key: LimitKey = LimitKey::Caller,
        /// The header that tells callers apart, with the key "header".
        header: Option<At<HeaderName>>,
        /// The claim that tells callers apart, with the key "claim".
        claim: Option<At<String>>,
        /// Counts and refuses nothing, to see what it would do.
        shadow: bool = false,
    }
}

words! {
    /// Who counts together.
    pub enum LimitKey {
        /// A caller: who they proved to be, else where they come from.
        Caller = "caller",
        /// Where they come from.
        Address = "address",
        /// Everybody.
        Everyone = "everyone",
        /// The value of a header.
        Header = "header",
        /// The value of a claim.
        Claim = "claim",
    }
}

section! {
    /// Where limits count.
    pub struct Limiter {
        /// Names of limits that hold where a route says nothing.
        default: Vec<At<String>>,
        /// How many callers have a count of their own, for each limit.
        capacity: NonZeroUsize = NonZeroUsize::new(65_536).unwrap_or(NonZeroUsize::MIN),
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
        match (self.key, &self.header, &self.claim) {
            (LimitKey::Header, None, _) => {
                notes.push(span, "a limit by header that names none", "add header = \"x-tenant\"");
            }
            (LimitKey::Claim, _, None) => {
                notes.push(span, "a limit by claim that names none", "add claim = \"tenant\"");
            }
            (key, Some(header), _) if key != LimitKey::Header => {
                notes.push(&header.span, "a header that is not looked at", "add key = \"header\"");
            }
            (key, _, Some(claim)) if key != LimitKey::Claim => {
                notes.push(&claim.span, "a claim that is not looked at", "add key = \"claim\"");
            }
            _ => {}
        }
    }
}

impl Limiter {
    pub(super) fn check(&self, notes: &mut Notes<'_>) {
        let Some(redis) = &self.redis else { return };
        if let Err(error) = crate::build::store(redis) {
            notes.push(&redis.url.span, error, "such as \"redis://127.0.0.1:6379\"");
        }
        if let Some(delay) = &self.delay {
            notes.push(&delay.span, "nothing waits where Redis counts", "remove delay or redis");
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
