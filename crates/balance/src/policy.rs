//! When another endpoint is tried, and how often.

use std::time::Duration;

use crate::hash_key::HashKey;
use crate::shape::Subset;
use crate::sticky::Sticky;
use http::{Method, StatusCode};
use portcullis_core::{Dialect, GrpcCode, Head, Layer, Rejection, Side};

/// How a request is balanced and attempted. The layer has one; a [`Route`](portcullis_core::Route) that carries another overrides it
/// as a whole.
///
/// | | default |
/// |---|---|
/// | [attempts](Self::attempts) in all | 2 |
/// | [timeout of one attempt](Self::attempt_timeout) | none |
/// | nothing was sent | always tried elsewhere |
/// | [the connection broke](Self::on_reset) | tried elsewhere if the method is idempotent |
/// | [statuses](Self::on_statuses), [gRPC codes](Self::on_grpc) | none |
/// | [back-off](Self::backoff) | 25 ms doubling to 250 ms, each time a random part of it |
/// | [what is kept of a request body](Self::replay) | 64 KiB |
/// | [hash key](Self::hash_key) | the policy's own |
/// | [subset](Self::subset), [stickiness](Self::sticky) | none |
///
/// What was not sent costs no more than trying it elsewhere; every other repetition is taken from the layer's
/// [`Budget`](crate::Budget).
#[derive(Clone, Debug)]
pub struct Policy {
    pub(crate) attempts: u8,
    pub(crate) attempt_timeout: Option<Duration>,
    reset: bool,
    any_method: bool,
    statuses: Vec<StatusCode>,
    codes: Vec<GrpcCode>,
    backoff: (Duration, Duration),
    pub(crate) replay: usize,
    pub(crate) hash_key: Option<HashKey>,
    pub(crate) subset: Option<Subset>,
    pub(crate) sticky: Option<Sticky>,
}

/// Why an attempt was not the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// Nothing reached the endpoint: no connection came about, or none was free, or a breaker refused.
    Unsent,
    /// The connection broke before the head of a response, or what came was no HTTP, or the inner service failed.
    Reset,
    /// The attempt took too long.
    TimedOut,
    /// The endpoint answered with this status.
    Status(StatusCode),
    /// The endpoint answered with this code, in headers.
    Grpc(GrpcCode),
}

/// Attempts in all.
const ATTEMPTS: u8 = 2;
/// Back-off before the first repetition, and the longest.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(25), Duration::from_millis(250));
/// How many bytes of a request body are kept.
const REPLAY: usize = 64 * 1024;

// === impl Policy ===

impl Policy {
    /// The defaults.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            attempts: ATTEMPTS,
            attempt_timeout: None,
            reset: true,
            any_method: false,
            statuses: Vec::new(),
            codes: Vec::new(),
            backoff: BACKOFF,
            replay: REPLAY,
            hash_key: None,
            subset: None,
            sticky: None,
        }
    }

    /// How often a request is attempted in all. Default 2; one, or zero, never tries another endpoint.
    #[must_use]
    pub const fn attempts(mut self, attempts: u8) -> Self {
        self.attempts = attempts;
        self
    }

    /// Gives an attempt up after so long without the head of a response, and tries another endpoint if the method is
    /// idempotent; the last attempt ends with 504. Default none. Inner layers see it as the attempt's
    /// [`HeadDeadline`](portcullis_core::HeadDeadline) and may answer 504 by then, so that a breaker below counts it. The
    /// inner service gets as long to be ready for another attempt, and then the answer is that of the attempt before.
    #[must_use]
    pub const fn attempt_timeout(mut self, timeout: Duration) -> Self {
        self.attempt_timeout = Some(timeout);
        self
    }

    /// Whether a connection that broke before the head of a response, or on which no HTTP came, is a reason. Default yes.
    #[must_use]
    pub const fn on_reset(mut self, yes: bool) -> Self {
        self.reset = yes;
        self
    }

    /// The statuses that are a reason. Default none; 502, 503 and 504 are usual.
    #[must_use]
    pub fn on_statuses(mut self, statuses: impl IntoIterator<Item = StatusCode>) -> Self {
        self.statuses = statuses.into_iter().collect();
        self
    }

    /// The gRPC codes that are a reason, when they come in headers: a stream that has begun is never repeated. Default
    /// none; [`UNAVAILABLE`](GrpcCode::UNAVAILABLE) is usual.
    ///
    /// gRPC calls are `POST`: [`repeat_any_method`](Self::repeat_any_method) must say that they may be repeated.
    #[must_use]
    pub fn on_grpc(mut self, codes: impl IntoIterator<Item = GrpcCode>) -> Self {
        self.codes = codes.into_iter().collect();
        self
    }

    /// Repeats requests of any method, though an endpoint may have acted on them already. By default only idempotent ones
    /// ([RFC 9110 §9.2.2](https://www.rfc-editor.org/rfc/rfc9110#section-9.2.2)) are: `GET`, `HEAD`, `OPTIONS`, `TRACE`,
    /// `PUT`, `DELETE`. A request of which nothing was sent is tried elsewhere whatever its method.
    #[must_use]
    pub const fn repeat_any_method(mut self, yes: bool) -> Self {
        self.any_method = yes;
        self
    }

    /// The longest wait before the second attempt, and before any; it doubles in between. Waits are drawn between zero and
    /// that. Nothing is waited for when nothing was sent and another endpoint admits.
    ///
    /// A gRPC server that answers with `grpc-retry-pushback-ms` is heeded: the wait is that long, and when that is negative,
    /// or longer than the longest wait, its answer goes to the caller.
    #[must_use]
    pub const fn backoff(mut self, first: Duration, longest: Duration) -> Self {
        self.backoff = (first, longest);
        self
    }

    /// How many bytes of a request body are kept, as a copy, until the response begins. A longer body is sent once and never again.
    #[must_use]
    pub const fn replay(mut self, bytes: usize) -> Self {
        self.replay = bytes;
        self
    }

    /// What decides where a request goes, for policies that hash. By default what the policy itself was made with.
    #[must_use]
    pub fn hash_key(mut self, key: HashKey) -> Self {
        self.hash_key = Some(key);
        self
    }

    /// Picks from this subset only. Default all endpoints.
    #[must_use]
    pub fn subset(mut self, subset: Subset) -> Self {
        self.subset = Some(subset);
        self
    }

    /// Keeps callers with the endpoint that served them. Default not.
    #[must_use]
    pub fn sticky(mut self, sticky: Sticky) -> Self {
        self.sticky = Some(sticky);
        self
    }

    pub(crate) fn repeats(&self, method: &Method) -> bool {
        self.any_method || method.is_idempotent()
    }

    /// Whether and why this response is not good enough. `repeats` says whether the request may be sent twice.
    pub(crate) fn judge(&self, head: Head<'_>, repeats: bool) -> Option<Reason> {
        if let Some(rejection) = head.extensions.get::<Rejection>() {
            let of_endpoint = rejection.side() == Side::Upstream
                || match (rejection.layer(), rejection.status()) {
                    (Layer::CircuitBreak, _) => true,
                    // All connections to it were in use, and still were after the time for that.
                    (Layer::Forward, StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT) => true,
                    _ => false,
                };
            return match rejection.status() {
                _ if !of_endpoint => None,
                _ if !rejection.sent() => Some(Reason::Unsent),
                StatusCode::GATEWAY_TIMEOUT => (repeats && self.statuses.contains(&rejection.status()))
                    .then_some(Reason::Status(StatusCode::GATEWAY_TIMEOUT)),
                status => (repeats && (self.reset || self.statuses.contains(&status))).then_some(Reason::Reset),
            };
        }
        if !repeats {
            return None;
        }
        if self.statuses.contains(&head.status) {
            return Some(Reason::Status(head.status));
        }
        if !self.codes.is_empty()
            && Dialect::of(head.headers) == Dialect::Grpc
            && let Some(code) = GrpcCode::of(head.headers)
            && self.codes.contains(&code)
        {
            return Some(Reason::Grpc(code));
        }
        None
    }

    /// No wait is longer.
    pub(crate) const fn longest_wait(&self) -> Duration {
        self.backoff.1
    }

    pub(crate) fn error(&self, repeats: bool) -> Option<Reason> {
        (repeats && self.reset).then_some(Reason::Reset)
    }

    /// How long to wait before the attempt after `failed` of them, given a random number.
    pub(crate) fn wait(&self, failed: usize, random: u64) -> Duration {
        let (first, longest) = self.backoff;
        let doublings = u32::try_from(failed.saturating_sub(1)).unwrap_or(u32::MAX).min(20);
        let limit = first.saturating_mul(1 << doublings).min(longest);
        limit.mul_f64((random >> 11) as f64 / ((1_u64 << 53) - 1) as f64)
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Response;

    fn rejected(layer: Layer, status: u16, sent: bool) -> Response<()> {
        let status = StatusCode::from_u16(status).unwrap();
        let mut response = Response::builder().status(status).body(()).unwrap();
        response.extensions_mut().insert(Rejection::new(layer, status, "test").with_sent(sent));
        response
    }

    #[test]
    fn what_was_not_sent_may_always_be_sent_elsewhere() {
        let policy = Policy::new();
        let judge = |layer, status, sent, repeats| policy.judge(Head::of(&rejected(layer, status, sent)), repeats);
        assert_eq!(judge(Layer::Forward, 502, false, false), Some(Reason::Unsent));
        assert_eq!(judge(Layer::CircuitBreak, 503, false, false), Some(Reason::Unsent));
        assert_eq!(judge(Layer::Forward, 502, true, false), None);
        assert_eq!(judge(Layer::Forward, 502, true, true), Some(Reason::Reset));
        assert_eq!(judge(Layer::Forward, 504, true, true), None);
        assert_eq!(judge(Layer::RateLimit, 429, false, true), None);
        assert_eq!(judge(Layer::Forward, 503, false, false), Some(Reason::Unsent), "no connection was free");
        assert_eq!(judge(Layer::Forward, 500, false, true), None, "the gateway's own fault");
    }

    /// Such as a response larger than allowed: it would be as large again.
    #[test]
    fn an_answer_that_the_gateway_does_not_pass_on_is_not_asked_for_again() {
        let policy = Policy::new().repeat_any_method(true).on_statuses([StatusCode::BAD_GATEWAY]);
        for (side, wanted) in [(Side::Upstream, Some(Reason::Reset)), (Side::Gateway, None)] {
            let mut response = Response::new(());
            let rejection = Rejection::new(Layer::Forward, StatusCode::BAD_GATEWAY, "test").with_sent(true);
            response.extensions_mut().insert(rejection.with_side(side));
            assert_eq!(policy.judge(Head::of(&response), true), wanted);
        }
    }

    #[test]
    fn answers_are_reasons_only_when_listed_and_repeatable() {
        let policy = Policy::new().on_statuses([StatusCode::SERVICE_UNAVAILABLE]).on_grpc([GrpcCode::UNAVAILABLE]);
        let unavailable = Response::builder().status(503).body(()).unwrap();
        let wanted = Some(Reason::Status(StatusCode::SERVICE_UNAVAILABLE));
        assert_eq!(policy.judge(Head::of(&unavailable), true), wanted);
        assert_eq!(policy.judge(Head::of(&unavailable), false), None);
        assert_eq!(Policy::new().judge(Head::of(&unavailable), true), None);
        let grpc = Response::builder().header("content-type", "application/grpc").header("grpc-status", "14");
        let grpc = grpc.body(()).unwrap();
        assert_eq!(policy.judge(Head::of(&grpc), true), Some(Reason::Grpc(GrpcCode::UNAVAILABLE)));
    }

    #[test]
    fn only_idempotent_methods_are_repeated_unless_told_otherwise() {
        let (policy, any) = (Policy::new(), Policy::new().repeat_any_method(true));
        for method in ["GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"] {
            assert!(policy.repeats(&method.parse().unwrap()), "{method}");
        }
        for method in ["POST", "PATCH", "CONNECT", "PROPFIND"] {
            assert!(!policy.repeats(&method.parse().unwrap()), "{method}");
            assert!(any.repeats(&method.parse().unwrap()), "{method}");
        }
    }

    #[test]
    fn each_listed_status_and_code_is_a_reason_and_no_other() {
        let statuses = [429, 500, 502, 503, 504].map(|status| StatusCode::from_u16(status).unwrap());
        let policy = Policy::new().on_statuses(statuses);
        for status in (200..600).map(|status| StatusCode::from_u16(status).unwrap()) {
            let response = Response::builder().status(status).body(()).unwrap();
            let wanted = statuses.contains(&status).then_some(Reason::Status(status));
            assert_eq!(policy.judge(Head::of(&response), true), wanted);
        }
        let codes = [GrpcCode::CANCELLED, GrpcCode::RESOURCE_EXHAUSTED, GrpcCode::UNAVAILABLE];
        let policy = Policy::new().on_grpc(codes);
        for number in 0..17 {
            let response = |content_type: &str| {
                let response = Response::builder().header("content-type", content_type);
                response.header("grpc-status", number.to_string()).body(()).unwrap()
            };
            let code = GrpcCode::from_number(number);
            let wanted = codes.contains(&code).then_some(Reason::Grpc(code));
            assert_eq!(policy.judge(Head::of(&response("application/grpc+proto")), true), wanted);
            assert_eq!(policy.judge(Head::of(&response("application/json")), true), None);
        }
    }

    #[test]
    fn waits_double_to_the_longest_and_are_drawn_from_zero() {
        let policy = Policy::new();
        let most = |failed| policy.wait(failed, u64::MAX).as_millis();
        assert_eq!([most(1), most(2), most(3), most(4), most(5), most(200)], [25, 50, 100, 200, 250, 250]);
        assert_eq!(policy.wait(3, 0), Duration::ZERO);
    }
}
