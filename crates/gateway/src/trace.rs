//! W3C trace context (<https://www.w3.org/TR/trace-context/>): taken over from the caller, or begun here.

use http::{HeaderMap, HeaderName, HeaderValue};

/// The trace a request belongs to, and our span in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trace {
    pub(crate) id: u128,
    pub(crate) span: u64,
    /// The caller's span.
    pub(crate) parent: Option<u64>,
    flags: u8,
    exported: bool,
}

/// Which traces are taken over, and which are exported.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sampling {
    /// Whether callers' traces go on.
    pub(crate) accept: bool,
    /// The share of traces begun here that are sampled: those behind record them, whether or not this gateway does.
    pub(crate) share: f64,
    /// Whether spans are exported from here.
    pub(crate) exports: bool,
}

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
const SAMPLED: u8 = 1;

// === impl Trace ===

impl Trace {
    /// A span in the caller's trace, or the first of a new one; left in `headers` for the upstream. `random` must not
    /// repeat.
    pub(crate) fn carry(headers: &mut HeaderMap, sampling: Sampling, mut random: impl FnMut() -> u64) -> Self {
        let parent = single(headers).filter(|_| sampling.accept).and_then(Self::parse);
        let mut fresh = || random().max(1);
        let mut trace = match parent {
            Some(parent) => Self { span: fresh(), parent: Some(parent.span), ..parent },
            None => {
                // What belonged to a trace that cannot be read means nothing in another.
                headers.remove(TRACESTATE);
                let id = u128::from(fresh()) << 64 | u128::from(fresh());
                let sampled = is_within(id, sampling.share);
                Self { id, span: fresh(), parent: None, flags: if sampled { SAMPLED } else { 0 }, exported: false }
            }
        };
        trace.exported = sampling.exports && trace.flags & SAMPLED != 0;
        trace.write(headers);
        trace
    }

    /// Whether its spans are exported from here.
    pub(crate) const fn is_exported(&self) -> bool {
        self.exported
    }

    /// A new span below this one.
    pub(crate) fn child(self) -> Self {
        Self { span: fastrand::u64(1..), parent: Some(self.span), ..self }
    }

    /// Its id in hexadecimal digits.
    pub(crate) fn id_digits(&self) -> [u8; 32] {
        digits(self.id.to_be_bytes())
    }

    /// Its span's id in hexadecimal digits.
    pub(crate) fn span_digits(&self) -> [u8; 16] {
        digits(self.span.to_be_bytes())
    }

    /// Leaves it in `headers`, as the parent of what comes next.
    pub(crate) fn write(&self, headers: &mut HeaderMap) {
        let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
        text[3..35].copy_from_slice(&self.id_digits());
        text[36..52].copy_from_slice(&self.span_digits());
        text[53..55].copy_from_slice(&digits::<1, 2>([self.flags]));
        if let Ok(mut value) = HeaderValue::from_bytes(&text) {
            // Said once and never again: HPACK need not keep it, in the place of what is.
            value.set_sensitive(true);
            headers.insert(TRACEPARENT, value);
        }
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
        let flags = u8::try_from(hex(flags, 2)?).ok()? & SAMPLED;
        (id != 0 && span != 0).then_some(Self { id, span, parent: None, flags, exported: false })
    }
}

/// Whether a trace belongs to the sampled share. By its id, so that gateways with the same share agree.
fn is_within(id: u128, share: f64) -> bool {
    let low = (id as u64) >> 1;
    share >= 1.0 || (low as f64) < share * (1_u64 << 63) as f64
}

/// The one `traceparent`; several say nothing.
fn single(headers: &HeaderMap) -> Option<&str> {
    let mut values = headers.get_all(TRACEPARENT).iter();
    let only = values.next()?.to_str().ok()?;
    values.next().is_none().then_some(only)
}

/// Two hexadecimal digits for each byte.
fn digits<const BYTES: usize, const DIGITS: usize>(bytes: [u8; BYTES]) -> [u8; DIGITS] {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let mut text = [b'0'; DIGITS];
    for (pair, byte) in text.as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
        *pair = [HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]];
    }
    text
}

fn hex(text: &str, length: usize) -> Option<u128> {
    let lower = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    (text.len() == length && text.bytes().all(lower)).then(|| u128::from_str_radix(text, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    const ALL: Sampling = Sampling { accept: true, share: 1.0, exports: true };
    const QUIET: Sampling = Sampling { exports: false, ..ALL };

    fn carried(parent: &str, sampling: Sampling) -> (Trace, HeaderMap) {
        let mut headers = HeaderMap::new();
        headers.insert(TRACEPARENT, parent.parse().unwrap());
        headers.insert(TRACESTATE, HeaderValue::from_static("a=b"));
        let trace = Trace::carry(&mut headers, sampling, || 0x11);
        (trace, headers)
    }

    #[test]
    fn the_callers_trace_goes_on_with_our_span() {
        let (trace, headers) = carried(PARENT, QUIET);
        let id = "4bf92f3577b34da6a3ce929d0e0e4736";
        assert_eq!((str::from_utf8(&trace.id_digits()).unwrap(), trace.parent), (id, Some(0x00f0_67aa_0ba9_02b7)));
        assert_eq!(headers[TRACEPARENT], "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000011-01");
        assert_eq!(headers[TRACESTATE], "a=b");
        assert_eq!(carried(&PARENT.replacen("00", "cc", 1), QUIET).0, trace, "a later version");
        assert_eq!(carried(&format!("{}-more", PARENT.replacen("00", "cc", 1)), QUIET).0, trace);
        let (child, mut headers) = (trace.child(), HeaderMap::new());
        child.write(&mut headers);
        assert_eq!((child.id, child.parent), (trace.id, Some(trace.span)));
        assert!(headers[TRACEPARENT].to_str().unwrap().starts_with(&format!("00-{id}-{:016x}-01", child.span)));
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
            let (trace, headers) = carried(wrong, QUIET);
            assert_eq!(trace.id, 0x11 << 64 | 0x11, "{wrong}");
            assert_eq!(trace.parent, None);
            assert!(!headers.contains_key(TRACESTATE));
        }
        let mut headers = HeaderMap::new();
        headers.append(TRACEPARENT, PARENT.parse().unwrap());
        headers.append(TRACEPARENT, PARENT.parse().unwrap());
        assert_ne!(Trace::carry(&mut headers, QUIET, || 1).id, 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736);
        assert_eq!(headers.get_all(TRACEPARENT).iter().count(), 1);
        let strangers = Sampling { accept: false, ..QUIET };
        assert_eq!(carried(PARENT, strangers).0.parent, None, "strangers' traces end at the edge");
    }

    #[test]
    fn a_callers_word_on_sampling_goes_before_ours() {
        assert!(carried(PARENT, ALL).0.is_exported());
        assert!(!carried(&PARENT.replace("-01", "-00"), ALL).0.is_exported(), "not sampled where it began");
        assert!(!carried(PARENT, QUIET).0.is_exported(), "nobody exports");
        let never = Sampling { share: 0.0, ..ALL };
        assert!(carried(PARENT, never).0.is_exported());
        let (begun, headers) = carried("", never);
        assert!(!begun.is_exported() && headers[TRACEPARENT].to_str().unwrap().ends_with("-00"));
        let (begun, headers) = carried("", ALL);
        assert!(begun.is_exported() && headers[TRACEPARENT].to_str().unwrap().ends_with("-01"));
        let (begun, headers) = carried("", QUIET);
        let sampled = headers[TRACEPARENT].to_str().unwrap().ends_with("-01");
        assert!(!begun.is_exported() && sampled, "those behind may record what is not exported from here");
    }

    #[test]
    fn about_the_share_is_sampled() {
        let mut random = fastrand::Rng::with_seed(7);
        let sampled = (0..10_000).filter(|_| is_within(random.u128(..), 0.1)).count();
        assert!((900..1100).contains(&sampled), "{sampled}");
        assert!(is_within(u128::MAX, 1.0) && !is_within(0, 0.0));
    }
}
