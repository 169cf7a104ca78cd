//! How often callers may come.

use std::num::{NonZeroU32, NonZeroUsize};
use std::ops::Range;

use http::HeaderName;
use serde_json::Value as Json;

use super::mistake::Notes;
use super::plain::Rate;
use super::read::{At, Value};
use super::section::{section, words};

section! {
    /// How often callers may come.
    pub struct Limit {
        /// Such as "100/s", "20/m" or "5/10s".
        rate: Rate,
        /// How many may come at once after a rest; by default as many as the rate says.
        burst: Option<NonZeroU32>,
        /// Who counts together.
        key: LimitKey = LimitKey::Caller,
        /// The header that tells callers apart, with the key "header".
        header: Option<At<HeaderName>>,
        /// The claim that tells callers apart, with the key "claim".
        claim: Option<At<String>>,
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
    }
}

impl Limit {
    /// The rate as the file has it.
    pub(crate) fn masked_rate(&self) -> Json {
        self.rate.show()
    }
}

impl Limit {
    pub(super) fn check(&self, span: &Range<usize>, notes: &mut Notes<'_>) {
        match (self.key, &self.header, &self.claim) {
            (LimitKey::Header, None, _) => {
                notes.push(span, "a limit by header that names none", "add header = \"x-tenant\"")
            }
            (LimitKey::Claim, _, None) => {
                notes.push(span, "a limit by claim that names none", "add claim = \"tenant\"")
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
