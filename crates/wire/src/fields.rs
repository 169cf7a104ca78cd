//! Fields of a head: read so that they share the memory they arrived in, and written.

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH};
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::Malformed;

/// The most fields of a head.
pub const MAX_FIELDS: usize = 100;
/// As many as most heads have.
const FEW: usize = 24;

/// Where the fields of a head stand in it.
#[derive(Debug)]
pub struct Fields {
    few: [Span; FEW],
    many: Vec<Span>,
    count: usize,
}

#[derive(Clone, Copy, Debug, Default)]
struct Span {
    name: (u32, u32),
    value: (u32, u32),
}

// === impl Fields ===

impl Fields {
    /// Notes where `fields` stand in `head`, which they were parsed from.
    #[must_use]
    pub fn of(head: &[u8], fields: &[httparse::Header<'_>]) -> Self {
        let (mut few, mut many, count) = ([Span::default(); FEW], Vec::new(), fields.len());
        let spans = match few.get_mut(..count) {
            Some(few) => few,
            None => {
                many.resize(count, Span::default());
                &mut many[..]
            }
        };
        for (span, field) in spans.iter_mut().zip(fields) {
            *span = Span { name: span_of(head, field.name.as_bytes()), value: span_of(head, field.value) };
        }
        Self { few, many, count }
    }

    /// Appends them to `headers`; `head` is what they were noted in.
    ///
    /// # Errors
    ///
    /// When one is no field.
    pub fn read(&self, head: &Bytes, headers: &mut HeaderMap) -> Result<(), Malformed> {
        headers.reserve(self.count);
        for span in self.few.get(..self.count).unwrap_or(&self.many) {
            let name = HeaderName::from_bytes(&head[span.name.0 as usize..span.name.1 as usize]);
            let value = HeaderValue::from_maybe_shared(head.slice(span.value.0 as usize..span.value.1 as usize));
            let (Ok(name), Ok(value)) = (name, value) else { return Err(Malformed("a field that is none")) };
            headers.append(name, value);
        }
        Ok(())
    }
}

/// Where `part` of `head` stands in it.
fn span_of(head: &[u8], part: &[u8]) -> (u32, u32) {
    // Heads are limited to far less than this holds.
    let at = |address: usize| u32::try_from(address - head.as_ptr().addr()).unwrap_or_default();
    let start = part.as_ptr().addr();
    (at(start), at(start + part.len()))
}

/// Writes one line of a head.
#[inline]
pub fn write_field(out: &mut Vec<u8>, name: &HeaderName, value: &HeaderValue) {
    out.extend_from_slice(name.as_str().as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value.as_bytes());
    out.extend_from_slice(b"\r\n");
}

/// The body's length, if the fields agree on one; then it is said once.
///
/// # Errors
///
/// When one is no length, or they differ.
pub fn length_of(headers: &mut HeaderMap) -> Result<Option<u64>, Malformed> {
    let mut lines = headers.get_all(CONTENT_LENGTH).iter();
    let Some(first) = lines.next() else { return Ok(None) };
    if let (Some(length), None) = (parse_length(first.as_bytes()), lines.next()) {
        return Ok(Some(length));
    }
    let mut said = None;
    for line in headers.get_all(CONTENT_LENGTH) {
        for number in line.as_bytes().split(|byte| *byte == b',') {
            let length = parse_length(number.trim_ascii());
            if length.is_none() || said.is_some_and(|said| Some(said) != length) {
                return Err(Malformed("lengths that are none, or differ"));
            }
            said = length;
        }
    }
    if let Some(said) = said {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(said));
    }
    Ok(said)
}

/// The length that one `Content-Length` says: digits and nothing else.
#[must_use]
pub fn parse_length(text: &[u8]) -> Option<u64> {
    let is_number = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    // All but the largest two are meant for those who count otherwise.
    let number = is_number.then(|| str::from_utf8(text).ok()?.parse().ok()).flatten();
    number.filter(|number| *number < u64::MAX - 1)
}

/// Whether another message may follow on the connection, as far as its sender is concerned. Any `close` counts, whatever
/// other lines say.
#[must_use]
pub fn keeps_alive(headers: &HeaderMap, is_10: bool) -> bool {
    let (mut close, mut keep) = (false, false);
    for line in headers.get_all(CONNECTION) {
        for option in line.as_bytes().split(|byte| *byte == b',') {
            let option = option.trim_ascii();
            close |= option.eq_ignore_ascii_case(b"close");
            keep |= option.eq_ignore_ascii_case(b"keep-alive");
        }
    }
    !close && (keep || !is_10)
}
