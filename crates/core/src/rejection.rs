//! A refusal as a response.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};

use crate::body::{Body, Guard};
use crate::grpc::{self, Dialect, GrpcCode};

/// Why a layer refused a request, or failed to have it answered.
///
/// It becomes a [response](Self::into_response) and travels in that response's extensions, so that outer layers, logs and
/// metrics can tell a refusal from an answer. Text in it goes to the caller: no secret, no address, no upstream's error.
#[derive(Clone, Debug)]
pub struct Rejection(Box<Inner>);

/// The layer that refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Layer {
    /// No route, or not this method.
    Route,
    /// Who is calling.
    Auth,
    /// How often.
    RateLimit,
    /// Where the service lives.
    Discovery,
    /// Which endpoint.
    Balance,
    /// Whether that one is well.
    CircuitBreak,
    /// The way to the upstream.
    Forward,
    /// The server that took the request in.
    Serve,
    /// A layer of the user's own.
    Other(&'static str),
}

/// Whose fault a refusal is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Side {
    /// The caller can avoid it.
    Caller,
    /// We chose not to pass the request on.
    Gateway,
    /// The upstream did not do its part.
    Upstream,
}

#[derive(Clone, Debug)]
struct Inner {
    layer: Layer,
    status: StatusCode,
    grpc: GrpcCode,
    reason: &'static str,
    side: Side,
    sent: bool,
    retry_after: Option<Duration>,
    detail: Cow<'static, str>,
    headers: HeaderMap,
}

// === impl Rejection ===

impl Rejection {
    /// A refusal by `layer`. `reason` is a short word for machines, such as `no-route`. The side follows from the status:
    /// 4xx is the caller's, 502 and 504 the upstream's, the rest the gateway's.
    #[must_use]
    pub fn new(layer: Layer, status: StatusCode, reason: &'static str) -> Self {
        let side = match status {
            StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT => Side::Upstream,
            status if status.is_client_error() => Side::Caller,
            _ => Side::Gateway,
        };
        Self(Box::new(Inner {
            layer,
            status,
            grpc: grpc_code(status),
            reason,
            side,
            sent: false,
            retry_after: None,
            detail: Cow::Borrowed(""),
            headers: HeaderMap::new(),
        }))
    }

    /// Says whose fault it is, where the status does not.
    #[must_use]
    pub fn with_side(mut self, side: Side) -> Self {
        self.0.side = side;
        self
    }

    /// Part of the request may have reached an upstream, so that repeating it is not harmless.
    #[must_use]
    pub fn with_sent(mut self, sent: bool) -> Self {
        self.0.sent = sent;
        self
    }

    /// When the caller may try again.
    #[must_use]
    pub fn with_retry_after(mut self, wait: Duration) -> Self {
        self.0.retry_after = Some(wait);
        self
    }

    /// A sentence for people.
    #[must_use]
    pub fn with_detail(mut self, detail: impl Into<Cow<'static, str>>) -> Self {
        self.0.detail = detail.into();
        self
    }

    /// A header of the response, beside those of its name already there.
    #[must_use]
    pub fn with_header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.0.headers.append(name, value);
        self
    }

    /// What gRPC callers get, where it does not follow from the status.
    #[must_use]
    pub fn with_grpc_code(mut self, code: GrpcCode) -> Self {
        self.0.grpc = code;
        self
    }

    /// The layer that refused.
    #[must_use]
    pub fn layer(&self) -> Layer {
        self.0.layer
    }

    /// The status for HTTP callers.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.0.status
    }

    /// The code for gRPC callers.
    #[must_use]
    pub fn grpc_code(&self) -> GrpcCode {
        self.0.grpc
    }

    /// A short word for machines.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        self.0.reason
    }

    /// A sentence for people; may be empty.
    #[must_use]
    pub fn detail(&self) -> &str {
        &self.0.detail
    }

    /// Whose fault it is.
    #[must_use]
    pub fn side(&self) -> Side {
        self.0.side
    }

    /// Whether part of the request may have reached an upstream.
    #[must_use]
    pub fn sent(&self) -> bool {
        self.0.sent
    }

    /// When the caller may try again.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        self.0.retry_after
    }

    /// The response: `application/problem+json` ([RFC 9457](https://www.rfc-editor.org/rfc/rfc9457)) for HTTP callers,
    /// headers with a `grpc-status` for gRPC callers. The rejection itself is in the extensions.
    ///
    /// `retry-after` is rounded up to whole seconds; gRPC callers also get `RetryInfo` and `grpc-retry-pushback-ms`.
    #[must_use]
    pub fn into_response<B, G: Guard>(self, dialect: Dialect) -> Response<Body<B, G>> {
        let inner = &*self.0;
        let mut response = match dialect {
            Dialect::Http => {
                let mut response = Response::new(Body::refusal(self.problem()));
                *response.status_mut() = inner.status;
                let json = HeaderValue::from_static("application/problem+json");
                response.headers_mut().insert(header::CONTENT_TYPE, json);
                response
            }
            Dialect::Grpc => {
                let mut response = Response::new(Body::default());
                let headers = response.headers_mut();
                headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
                headers.insert(grpc::GRPC_STATUS, HeaderValue::from(u16::from(inner.grpc.number())));
                headers.insert(grpc::GRPC_MESSAGE, grpc::message(self.text()));
                if let Some(wait) = inner.retry_after {
                    let details = grpc::retry_info(inner.grpc, self.text(), wait);
                    headers.insert(grpc::GRPC_STATUS_DETAILS, details);
                    let millis = u64::try_from(wait.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX);
                    headers.insert(grpc::GRPC_RETRY_PUSHBACK, HeaderValue::from(millis));
                }
                response
            }
        };
        let headers = response.headers_mut();
        if let Some(wait) = inner.retry_after {
            let seconds = wait.as_secs().saturating_add(u64::from(wait.subsec_nanos() > 0));
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        for (name, value) in &inner.headers {
            headers.append(name, value.clone());
        }
        response.extensions_mut().insert(self);
        response
    }

    fn text(&self) -> &str {
        if self.0.detail.is_empty() { self.0.reason } else { &self.0.detail }
    }

    fn problem(&self) -> Vec<u8> {
        let inner = &*self.0;
        let problem = Problem {
            title: inner.status.canonical_reason().unwrap_or("Error"),
            status: inner.status.as_u16(),
            layer: inner.layer.as_str(),
            reason: inner.reason,
            detail: &inner.detail,
        };
        // Text and a number can always be written.
        serde_json::to_vec(&problem).unwrap_or_default()
    }
}

/// Written as it stands: a refusal should cost less than what it refuses.
#[derive(serde::Serialize)]
struct Problem<'a> {
    title: &'a str,
    status: u16,
    layer: &'a str,
    reason: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    detail: &'a str,
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} refused: {}", self.0.layer.as_str(), self.text())
    }
}

fn grpc_code(status: StatusCode) -> GrpcCode {
    match status.as_u16() {
        400 => GrpcCode::INVALID_ARGUMENT,
        401 => GrpcCode::UNAUTHENTICATED,
        403 => GrpcCode::PERMISSION_DENIED,
        404 | 405 | 501 => GrpcCode::UNIMPLEMENTED,
        408 | 504 => GrpcCode::DEADLINE_EXCEEDED,
        413 | 429 | 431 => GrpcCode::RESOURCE_EXHAUSTED,
        502 | 503 => GrpcCode::UNAVAILABLE,
        500 | 508 => GrpcCode::INTERNAL,
        _ => GrpcCode::UNKNOWN,
    }
}

// === impl Layer ===

impl Layer {
    /// Its name, as crates and metrics have it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Route => "route",
            Self::Auth => "auth",
            Self::RateLimit => "rate-limit",
            Self::Discovery => "discovery",
            Self::Balance => "balance",
            Self::CircuitBreak => "circuit-break",
            Self::Forward => "forward",
            Self::Serve => "serve",
            Self::Other(name) => name,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::{BodyExt, Empty};

    type Answer = Response<Body<Empty<bytes::Bytes>>>;

    fn rejection() -> Rejection {
        Rejection::new(Layer::RateLimit, StatusCode::TOO_MANY_REQUESTS, "too-many-requests")
            .with_retry_after(Duration::from_millis(1200))
            .with_detail("100 % of the quota, é")
            .with_header(header::WWW_AUTHENTICATE, HeaderValue::from_static("a"))
            .with_header(header::WWW_AUTHENTICATE, HeaderValue::from_static("b"))
    }

    #[tokio::test]
    async fn http_callers_get_a_problem() {
        let response: Answer = rejection().into_response(Dialect::Http);
        assert_eq!(response.status(), 429);
        assert_eq!(response.headers()["retry-after"], "2");
        assert_eq!(response.headers().get_all("www-authenticate").iter().count(), 2);
        assert_eq!(response.extensions().get::<Rejection>().unwrap().side(), Side::Caller);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let problem: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(problem["layer"], "rate-limit");
        assert_eq!(problem["status"], 429);
    }

    #[test]
    fn grpc_callers_get_a_status_in_headers_only() {
        let response: Answer = rejection().into_response(Dialect::Grpc);
        assert_eq!(response.status(), 200);
        assert!(http_body::Body::is_end_stream(response.body()));
        assert_eq!(response.headers()["grpc-status"], "8");
        assert_eq!(response.headers()["grpc-message"], "100 %25 of the quota, %C3%A9");
        assert_eq!(response.headers()["grpc-retry-pushback-ms"], "1200");
        // google.rpc.Status { 8, "…", [Any { "type.googleapis.com/google.rpc.RetryInfo", { 1.2 s } }] }
        use base64::Engine;
        let details = &response.headers()["grpc-status-details-bin"];
        let details = base64::engine::general_purpose::STANDARD_NO_PAD.decode(details).unwrap();
        assert!(details.starts_with(&[0x08, 8, 0x12, 22]));
        assert!(details.ends_with(&[0x12, 9, 0x0a, 7, 0x08, 1, 0x10, 0x80, 0x84, 0xaf, 0x5f]));
    }

    #[test]
    fn the_longest_wait_is_said_as_such() {
        let rejection =
            Rejection::new(Layer::Forward, StatusCode::SERVICE_UNAVAILABLE, "x").with_retry_after(Duration::MAX);
        let response = rejection.into_response::<(), ()>(Dialect::Grpc);
        assert_eq!(response.headers()["retry-after"], u64::MAX.to_string());
    }
}
