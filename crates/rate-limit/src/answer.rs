//! What callers are told: the refusal, and the fields that say how much is left.
//!
//! `RateLimit-Policy` and `RateLimit` are those of the
//! [IETF draft](https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/): `"name";q=…;w=…` and
//! `"name";r=…;t=…`.

use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use portcullis_core::{Layer, Rejection};

use crate::rate::Rate;

const POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
const LIMIT: HeaderName = HeaderName::from_static("ratelimit");
const LEGACY_LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
const LEGACY_REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
const LEGACY_RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");

/// Which responses say how much is left, and in which words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fields {
    always: bool,
    standard: bool,
    legacy: bool,
}

/// How one limit stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) name: Arc<str>,
    /// The most there can be.
    pub(crate) quota: u64,
    /// The time in which the quota comes back; none for one that counts requests at the same time.
    pub(crate) window: Option<Duration>,
    pub(crate) remaining: u64,
    /// Until there is more: for a refusal until it would be admitted, else until the quota is whole.
    pub(crate) reset: Option<Duration>,
}

/// Why not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) standing: Standing,
    pub(crate) wait: Wait,
}

/// When a refused request would be admitted, if nobody else came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Wait {
    /// When another one has ended.
    ForAnother,
    For(Duration),
    /// It costs more than the limit has.
    Never,
}

// === impl Fields ===

impl Fields {
    /// On refusals only; an admitted response is not touched. The default.
    #[must_use]
    pub const fn on_refusals() -> Self {
        Self { always: false, standard: true, legacy: false }
    }

    /// On every response.
    #[must_use]
    pub const fn always() -> Self {
        Self { always: true, standard: true, legacy: false }
    }

    /// On none; refusals still have their `retry-after`.
    #[must_use]
    pub const fn never() -> Self {
        Self { always: false, standard: false, legacy: false }
    }

    /// Adds `X-RateLimit-Limit`, `-Remaining` and `-Reset`, as most services have them: for the limit of which least is
    /// left, the reset in seconds from now.
    #[must_use]
    pub const fn with_legacy(mut self) -> Self {
        self.legacy = true;
        self
    }

    pub(crate) const fn are_on_every_response(self) -> bool {
        self.always
    }

    pub(crate) fn write(self, standings: &[Standing], headers: &mut HeaderMap) {
        if self.standard && !standings.is_empty() {
            let (mut policy, mut limit) = (String::new(), String::new());
            for standing in standings {
                let comma = if policy.is_empty() { "" } else { ", " };
                let name = quoted(&standing.name);
                let _ = write!(policy, "{comma}{name};q={}", standing.quota);
                let _ = match standing.window {
                    Some(window) => write!(policy, ";w={}", seconds(window).max(1)),
                    None => write!(policy, ";qu=\"concurrent-requests\""),
                };
                let _ = write!(limit, "{comma}{name};r={}", standing.remaining);
                if let Some(reset) = standing.reset {
                    let _ = write!(limit, ";t={}", seconds(reset));
                }
            }
            put(headers, POLICY, policy);
            put(headers, LIMIT, limit);
        }
        if self.legacy
            && let Some(least) = standings.iter().min_by_key(|standing| standing.remaining)
        {
            headers.insert(LEGACY_LIMIT, HeaderValue::from(least.quota));
            headers.insert(LEGACY_REMAINING, HeaderValue::from(least.remaining));
            if let Some(reset) = least.reset {
                headers.insert(LEGACY_RESET, HeaderValue::from(seconds(reset)));
            }
        }
    }
}

impl Default for Fields {
    fn default() -> Self {
        Self::on_refusals()
    }
}

// === impl Standing ===

impl Standing {
    pub(crate) fn of_rate(name: &Arc<str>, rate: Rate, remaining: u64, reset: Duration) -> Self {
        let quota = u64::from(rate.burst_size().get());
        let window = Some(Duration::from_nanos(rate.cell().window));
        Self { name: name.clone(), quota, window, remaining, reset: Some(reset) }
    }

    pub(crate) fn of_concurrency(name: &Arc<str>, max: u32, inside: u32) -> Self {
        let remaining = u64::from(max.saturating_sub(inside));
        Self { name: name.clone(), quota: u64::from(max), window: None, remaining, reset: None }
    }
}

// === impl Refusal ===

impl Refusal {
    pub(crate) fn into_rejection(self, fields: Fields) -> Rejection {
        let reason = match self.wait {
            Wait::ForAnother => "too-many-at-once",
            Wait::For(_) => "too-many-requests",
            Wait::Never => "more-than-the-limit",
        };
        let mut rejection = Rejection::new(Layer::RateLimit, StatusCode::TOO_MANY_REQUESTS, reason);
        if let Wait::For(wait) = self.wait {
            rejection = rejection.with_retry_after(wait);
        }
        let mut headers = HeaderMap::new();
        fields.write(std::slice::from_ref(&self.standing), &mut headers);
        for (name, value) in &headers {
            rejection = rejection.with_header(name.clone(), value.clone());
        }
        rejection
    }
}

/// Rounded up: nobody is told to come back too early.
fn seconds(duration: Duration) -> u64 {
    duration.as_secs() + u64::from(duration.subsec_nanos() > 0)
}

/// A structured field's string.
fn quoted(name: &str) -> String {
    let mut quoted = String::with_capacity(name.len() + 2);
    quoted.push('"');
    for c in name.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            ' '..='~' => quoted.push(c),
            _ => quoted.push('?'),
        }
    }
    quoted.push('"');
    quoted
}

fn put(headers: &mut HeaderMap, name: HeaderName, value: String) {
    if let Ok(value) = HeaderValue::try_from(value) {
        headers.append(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::num::NonZeroU32;

    fn standing(name: &str, remaining: u64) -> Standing {
        let rate = Rate::per_minute(NonZeroU32::new(100).unwrap());
        Standing::of_rate(&name.into(), rate, remaining, Duration::from_millis(2001))
    }

    #[test]
    fn fields_are_those_of_the_draft() {
        let mut headers = HeaderMap::new();
        Fields::always().with_legacy().write(&[standing("a", 5), standing("b\"é", 3)], &mut headers);
        assert_eq!(headers["ratelimit-policy"], r#""a";q=100;w=60, "b\"?";q=100;w=60"#);
        assert_eq!(headers["ratelimit"], r#""a";r=5;t=3, "b\"?";r=3;t=3"#);
        assert_eq!(headers["x-ratelimit-limit"], "100");
        assert_eq!(headers["x-ratelimit-remaining"], "3");
        assert_eq!(headers["x-ratelimit-reset"], "3");
        let mut none = HeaderMap::new();
        Fields::never().write(&[standing("a", 5)], &mut none);
        assert!(none.is_empty());
    }
}
