//! W3C trace context (<https://www.w3.org/TR/trace-context/>): taken over from the caller, or begun here.

use std::fmt;

use http::{HeaderMap, HeaderName, HeaderValue};

/// The trace a request belongs to, and our span in it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Trace {
    id: u128,
    span: u64,
    flags: u8,
}

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

// === impl Trace ===

impl Trace {
    /// A span in the caller's trace, or the first of a new one; left in `headers` for the upstream. `random` must not
    /// repeat.
    pub(crate) fn carry(headers: &mut HeaderMap, mut random: impl FnMut() -> u64) -> Self {
        let parent = single(headers).and_then(Self::parse);
        let mut fresh = || random().max(1);
        let trace = match parent {
            Some(parent) => Self { span: fresh(), ..parent },
            None => {
                // What belonged to a trace that cannot be read means nothing in another.
                headers.remove(TRACESTATE);
                Self { id: u128::from(fresh()) << 64 | u128::from(fresh()), span: fresh(), flags: 0 }
            }
        };
        let Self { id, span, flags } = trace;
        if let Ok(value) = HeaderValue::try_from(format!("00-{id:032x}-{span:016x}-{flags:02x}")) {
            headers.insert(TRACEPARENT, value);
        }
        trace
    }

    /// Versions after the first may say more; what they share is read.
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(5, '-');
        let (version, id, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let version = hex(version, 2)?;
        if version == 0xff || version == 0 && parts.next().is_some() {
            return None;
        }
        let (id, span) = (hex(id, 32)?, u64::try_from(hex(span, 16)?).ok()?);
        let flags = u8::try_from(hex(flags, 2)?).ok()?;
        (id != 0 && span != 0).then_some(Self { id, span, flags: flags & 1 })
    }
}

/// The one `traceparent`; several say nothing.
fn single(headers: &HeaderMap) -> Option<&str> {
    let mut values = headers.get_all(TRACEPARENT).iter();
    let only = values.next()?.to_str().ok()?;
    values.next().is_none().then_some(only)
}

fn hex(text: &str, length: usize) -> Option<u128> {
    let lower = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    (text.len() == length && text.bytes().all(lower)).then(|| u128::from_str_radix(text, 16).ok()).flatten()
}

/// The trace's id.
impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn carried(parent: &str) -> (String, HeaderMap) {
        let mut headers = HeaderMap::new();
        headers.insert(TRACEPARENT, parent.parse().unwrap());
        headers.insert(TRACESTATE, HeaderValue::from_static("a=b"));
        let trace = Trace::carry(&mut headers, || 0x11);
        (trace.to_string(), headers)
    }

    #[test]
    fn the_callers_trace_goes_on_with_our_span() {
        let (trace, headers) = carried(PARENT);
        assert_eq!(trace, "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(headers[TRACEPARENT], "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000011-01");
        assert_eq!(headers[TRACESTATE], "a=b");
        assert_eq!(carried(&PARENT.replacen("00", "cc", 1)).0, trace, "a later version");
        assert_eq!(carried(&format!("{}-more", PARENT.replacen("00", "cc", 1))).0, trace);
    }

    #[test]
    fn what_is_no_trace_begins_a_new_one() {
        for wrong in [
            "",
            "x",
            "00-0-0-0",
            &PARENT.to_uppercase(),
            &PARENT.replacen("00", "ff", 1),
            &format!("{PARENT}-more"),
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
        ] {
            let (trace, headers) = carried(wrong);
            assert_eq!(trace, "00000000000000110000000000000011", "{wrong}");
            assert!(!headers.contains_key(TRACESTATE));
        }
        let mut headers = HeaderMap::new();
        headers.append(TRACEPARENT, PARENT.parse().unwrap());
        headers.append(TRACEPARENT, PARENT.parse().unwrap());
        assert_ne!(Trace::carry(&mut headers, || 1).to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(headers.get_all(TRACEPARENT).iter().count(), 1);
    }
}
