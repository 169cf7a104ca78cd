//! What layers need to know of gRPC: to tell a gRPC caller, to read a status, and to refuse in its words.

use std::fmt;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

/// `grpc-status`.
pub const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
/// `grpc-message`.
pub const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
/// `grpc-status-details-bin`, a base64 `google.rpc.Status`.
pub const GRPC_STATUS_DETAILS: HeaderName = HeaderName::from_static("grpc-status-details-bin");
/// `grpc-retry-pushback-ms`: when a client may try again; negative for never.
pub const GRPC_RETRY_PUSHBACK: HeaderName = HeaderName::from_static("grpc-retry-pushback-ms");
/// `grpc-timeout`: how long the caller waits.
pub const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// How a caller wants to be answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Dialect {
    /// By status code and body.
    #[default]
    Http,
    /// By `grpc-status`, in a response of headers only.
    Grpc,
}

/// A gRPC status code, as in the [list](https://grpc.github.io/grpc/core/md_doc_statuscodes.html) of its makers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GrpcCode(u8);

// === impl Dialect ===

impl Dialect {
    /// Told by the content type: `application/grpc`, alone or with a `+` or `;` behind it. gRPC-Web is HTTP here: its
    /// statuses travel in the body.
    #[must_use]
    pub fn of(headers: &HeaderMap) -> Self {
        let Some(content_type) = headers.get(header::CONTENT_TYPE) else { return Self::Http };
        match content_type.as_bytes().strip_prefix(b"application/grpc") {
            Some([] | [b'+' | b';' | b' ', ..]) => Self::Grpc,
            _ => Self::Http,
        }
    }
}

// === impl GrpcCode ===

#[expect(missing_docs, reason = "their makers describe them")]
impl GrpcCode {
    pub const OK: Self = Self(0);
    pub const CANCELLED: Self = Self(1);
    pub const UNKNOWN: Self = Self(2);
    pub const INVALID_ARGUMENT: Self = Self(3);
    pub const DEADLINE_EXCEEDED: Self = Self(4);
    pub const NOT_FOUND: Self = Self(5);
    pub const ALREADY_EXISTS: Self = Self(6);
    pub const PERMISSION_DENIED: Self = Self(7);
    pub const RESOURCE_EXHAUSTED: Self = Self(8);
    pub const FAILED_PRECONDITION: Self = Self(9);
    pub const ABORTED: Self = Self(10);
    pub const OUT_OF_RANGE: Self = Self(11);
    pub const UNIMPLEMENTED: Self = Self(12);
    pub const INTERNAL: Self = Self(13);
    pub const UNAVAILABLE: Self = Self(14);
    pub const DATA_LOSS: Self = Self(15);
    pub const UNAUTHENTICATED: Self = Self(16);
}

impl GrpcCode {
    /// The number on the wire.
    #[must_use]
    pub const fn number(self) -> u8 {
        self.0
    }

    /// The code of that number; [`UNKNOWN`](Self::UNKNOWN) for a number nobody defined.
    #[must_use]
    pub const fn from_number(number: u8) -> Self {
        if number <= 16 { Self(number) } else { Self::UNKNOWN }
    }

    /// The status in headers or trailers, if there is one; [`UNKNOWN`](Self::UNKNOWN) if it is not a code.
    #[must_use]
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let text = headers.get(GRPC_STATUS)?.to_str().unwrap_or_default();
        Some(text.parse().map_or(Self::UNKNOWN, Self::from_number))
    }
}

impl fmt::Display for GrpcCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How long a gRPC caller waits, from its `grpc-timeout`: at most eight digits and a unit. `None` when there is none, or
/// it is malformed.
#[must_use]
pub fn grpc_timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(GRPC_TIMEOUT)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

/// The value of a `grpc-timeout` that says `timeout`, rounded up to what eight digits can say.
#[must_use]
pub fn grpc_timeout_value(timeout: Duration) -> HeaderValue {
    let units = [(1, "n"), (1_000, "u"), (1_000_000, "m"), (1_000_000_000, "S"), (60_000_000_000, "M")];
    for (nanos, unit) in units {
        let number = timeout.as_nanos().div_ceil(nanos);
        if number <= 99_999_999
            && let Ok(value) = HeaderValue::try_from(format!("{number}{unit}"))
        {
            return value;
        }
    }
    HeaderValue::from_static("99999999H")
}

/// How long a server asks to be left alone: `grpc-retry-pushback-ms`, else `retry-after` in seconds. A negative pushback
/// forbids to repeat that call and says nothing of time; a `retry-after` that is a date is counted from `wall`, the time
/// since the epoch.
#[must_use]
pub fn retry_after(headers: &HeaderMap, wall: impl FnOnce() -> Duration) -> Option<Duration> {
    if let Some(pushback) = headers.get(GRPC_RETRY_PUSHBACK) {
        return pushback.to_str().ok()?.trim().parse().map(Duration::from_millis).ok();
    }
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(text).ok()?.duration_since(std::time::UNIX_EPOCH).ok()?;
    Some(date.saturating_sub(wall()))
}

/// What `grpc-message` must not contain as it is.
const MESSAGE: &AsciiSet = &CONTROLS.add(b'%');

pub(crate) fn message(text: &str) -> HeaderValue {
    let encoded = utf8_percent_encode(text, MESSAGE).to_string();
    HeaderValue::try_from(encoded).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// A `google.rpc.Status` that holds one `google.rpc.RetryInfo`, in base64.
pub(crate) fn retry_info(code: GrpcCode, text: &str, delay: Duration) -> HeaderValue {
    let mut wait = Vec::new();
    number(&mut wait, 1, delay.as_secs().min(i64::MAX as u64));
    number(&mut wait, 2, u64::from(delay.subsec_nanos()));
    let mut info = Vec::new();
    bytes(&mut info, 1, &wait);
    let mut any = Vec::new();
    bytes(&mut any, 1, b"type.googleapis.com/google.rpc.RetryInfo");
    bytes(&mut any, 2, &info);
    let mut status = Vec::new();
    number(&mut status, 1, u64::from(code.0));
    bytes(&mut status, 2, text.as_bytes());
    bytes(&mut status, 3, &any);
    HeaderValue::try_from(STANDARD_NO_PAD.encode(status)).unwrap_or_else(|_| HeaderValue::from_static(""))
}

fn number(out: &mut Vec<u8>, field: u8, value: u64) {
    if value != 0 {
        out.push(field << 3);
        varint(out, value);
    }
}

fn bytes(out: &mut Vec<u8>, field: u8, value: &[u8]) {
    out.push(field << 3 | 2);
    varint(out, value.len() as u64);
    out.extend_from_slice(value);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::try_from(value).unwrap())])
    }

    #[test]
    fn grpc_callers_are_told_by_their_content_type() {
        for (content_type, dialect) in [
            ("application/grpc", Dialect::Grpc),
            ("application/grpc+proto", Dialect::Grpc),
            ("application/grpc;charset=utf-8", Dialect::Grpc),
            ("application/grpc-web", Dialect::Http),
            ("application/grpcx", Dialect::Http),
            ("application/json", Dialect::Http),
        ] {
            assert_eq!(Dialect::of(&headers(header::CONTENT_TYPE, content_type)), dialect, "{content_type}");
        }
    }

    #[test]
    fn timeouts_read_back_no_shorter_than_they_were() {
        for timeout in [0, 1, 99_999_999, 100_000_000, 1_234_567_890, 86_400_000_000_000] {
            let timeout = Duration::from_nanos(timeout);
            let value = grpc_timeout_value(timeout);
            let read = grpc_timeout(&HeaderMap::from_iter([(GRPC_TIMEOUT, value)])).unwrap();
            assert!(read >= timeout && read <= timeout + timeout / 1000, "{timeout:?} {read:?}");
        }
        for text in ["", "S", "1", "1s", "-1S", "+1S", "123456789S", "1 S", "é"] {
            let value = HeaderValue::from_bytes(text.as_bytes()).unwrap();
            assert_eq!(grpc_timeout(&HeaderMap::from_iter([(GRPC_TIMEOUT, value)])), None, "{text:?}");
        }
    }

    #[test]
    fn servers_ask_for_rest_in_three_ways() {
        let wall = || Duration::from_secs(784_111_777 - 30);
        let asked = |name, value| retry_after(&headers(name, value), wall);
        assert_eq!(asked(header::RETRY_AFTER, "120"), Some(Duration::from_secs(120)));
        assert_eq!(asked(header::RETRY_AFTER, "Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::from_secs(30)));
        assert_eq!(asked(header::RETRY_AFTER, "soon"), None);
        assert_eq!(asked(GRPC_RETRY_PUSHBACK, "250"), Some(Duration::from_millis(250)));
        assert_eq!(asked(GRPC_RETRY_PUSHBACK, "-1"), None);
    }

    #[test]
    fn a_status_that_is_no_code_is_unknown() {
        assert_eq!(GrpcCode::of(&headers(GRPC_STATUS, "14")), Some(GrpcCode::UNAVAILABLE));
        for text in ["17", "-1", "x", "999"] {
            assert_eq!(GrpcCode::of(&headers(GRPC_STATUS, text)), Some(GrpcCode::UNKNOWN));
        }
        assert_eq!(GrpcCode::of(&HeaderMap::new()), None);
    }
}
