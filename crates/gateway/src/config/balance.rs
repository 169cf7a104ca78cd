//! How an endpoint is picked, and when another is tried.

use std::time::Duration;

use http::{HeaderName, StatusCode};
use serde_json::{Value as Json, json};

use super::mistake::Notes;
use super::plain::{Bytes, Map};
use super::read::{At, Node, Reader, Value};
use super::secret::Secret;
use super::section::{section, words};

/// What of a request decides where it goes: `"header:x-user"`, `"cookie:session"`, `"query:user"`, `"claim:tenant"`,
/// `"subject"`, `"address"` or `"path"`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HashBy {
    /// A header.
    Header(HeaderName),
    /// A cookie.
    Cookie(String),
    /// A parameter of the query.
    Query(String),
    /// A claim of the caller's.
    Claim(String),
    /// Who is calling.
    Subject,
    /// Where it comes from.
    Address,
    /// The path.
    Path,
}

section! {
    /// How an endpoint is picked.
    pub struct Balance {
        /// By what.
        policy: At<BalancePolicy> = At::of(BalancePolicy::PowerOfTwo),
        /// When fewer than so many percent of the endpoints admit, all are used. 0 never does that.
        panic_threshold: u8 = 50,
        /// How long to wait for an endpoint that admits before a request is refused.
        wait: Option<Duration>,
        /// How much more than its even share an endpoint can take, in percent, before the next priority gets some.
        overprovisioning: u16 = 140,
        /// The gateway's own zone, which is preferred. By default zones make no difference.
        zone: Option<String>,
        /// How long the share of a new endpoint grows. By default it has its whole share at once.
        slow_start: Option<Duration>,
        /// What of a request decides where it goes, for the policies that hash; the first that it has.
        hash: Vec<At<HashBy>>,
        /// How many times its even share an endpoint may have in flight, for "ring-hash".
        bounded_load: Option<At<f64>>,
        /// Keeps callers with the endpoint that served them.
        sticky: Option<Sticky>,
        /// Only these endpoints.
        subset: Option<At<Subset>>,
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
        /// The faster of two, by a moving average that jumps up at once.
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
        /// What share of all requests may be repeated.
        budget: f64 = 0.2,
        /// How many may be repeated in a second besides.
        budget_per_second: u32 = 10,
        /// How much of a request's body is kept to send it again.
        max_body: Bytes = Bytes(64 << 10),
        /// The longest wait before the second attempt.
        backoff: Duration = Duration::from_millis(25),
        /// The longest wait before any attempt.
        max_backoff: Duration = Duration::from_millis(250),
    }
}

impl Balance {
    pub(super) fn check(&self, notes: &mut Notes<'_>) {
        let hashes =
            matches!(*self.policy, BalancePolicy::RingHash | BalancePolicy::Maglev | BalancePolicy::Rendezvous);
        match (hashes, self.hash.first()) {
            (true, None) => notes.push(&self.policy.span, "not said by what to hash", "add hash = [\"header:x-user\"]"),
            (false, Some(hash)) => {
                notes.push(&hash.span, "this policy does not hash", "add policy = \"ring-hash\", or remove hash");
            }
            _ => {}
        }
        if let Some(factor) = &self.bounded_load {
            if *self.policy != BalancePolicy::RingHash {
                notes.push(&factor.span, "only \"ring-hash\" bounds the load", "remove it");
            } else if **factor < 1.0 {
                notes.push(&factor.span, "less than an even share is never enough", "such as 1.25");
            }
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

impl Subset {
    pub(super) fn check(&self, span: &std::ops::Range<usize>, notes: &mut Notes<'_>) {
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

impl Value for HashBy {
    fn read(node: &Node<'_>, reader: &mut Reader<'_>) -> Option<Self> {
        let wanted = "what decides, such as \"header:x-user\", \"cookie:session\", \"query:user\", \"claim:tenant\", \
                      \"subject\", \"address\" or \"path\"";
        reader.parsed(node, wanted, |text| match text.split_once(':').unwrap_or((text, "")) {
            ("header", name) => name.parse().ok().map(Self::Header),
            ("cookie", name) if !name.is_empty() => Some(Self::Cookie(name.to_owned())),
            ("query", name) if !name.is_empty() => Some(Self::Query(name.to_owned())),
            ("claim", name) if !name.is_empty() => Some(Self::Claim(name.to_owned())),
            ("subject", "") => Some(Self::Subject),
            ("address", "") => Some(Self::Address),
            ("path", "") => Some(Self::Path),
            _ => None,
        })
    }

    fn schema() -> Json {
        json!({ "type": "string", "pattern": "^((header|cookie|query|claim):.+|subject|address|path)$" })
    }

    fn show(&self) -> Json {
        json!(match self {
            Self::Header(name) => format!("header:{name}"),
            Self::Cookie(name) => format!("cookie:{name}"),
            Self::Query(name) => format!("query:{name}"),
            Self::Claim(name) => format!("claim:{name}"),
            Self::Subject => String::from("subject"),
            Self::Address => String::from("address"),
            Self::Path => String::from("path"),
        })
    }
}
