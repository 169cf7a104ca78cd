//! Fields of a head: read so that they share the memory they arrived in, and written.

use bytes::Bytes;
use http::header::{self, CONNECTION, CONTENT_LENGTH, InvalidHeaderName};
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
        // And one that is added on the way, as each intermediary does.
        headers.reserve(self.count + 1);
        for span in self.few.get(..self.count).unwrap_or(&self.many) {
            let name = name_of(&head[span.name.0 as usize..span.name.1 as usize]);
            let value = HeaderValue::from_maybe_shared(head.slice(span.value.0 as usize..span.value.1 as usize));
            let (Ok(name), Ok(value)) = (name, value) else { return Err(Malformed("a field that is none")) };
            headers.append(name, value);
        }
        Ok(())
    }
}

/// Reads a name; most are spelled in one of two ways, and found without going over all that there are.
fn name_of(text: &[u8]) -> Result<HeaderName, InvalidHeaderName> {
    Ok(match text {
        b"Host" | b"host" => header::HOST,
        b"User-Agent" | b"user-agent" => header::USER_AGENT,
        b"Accept" | b"accept" => header::ACCEPT,
        b"Accept-Encoding" | b"accept-encoding" => header::ACCEPT_ENCODING,
        b"Accept-Language" | b"accept-language" => header::ACCEPT_LANGUAGE,
        b"Authorization" | b"authorization" => header::AUTHORIZATION,
        b"Cookie" | b"cookie" => header::COOKIE,
        b"Connection" | b"connection" => CONNECTION,
        b"Content-Type" | b"content-type" => header::CONTENT_TYPE,
        b"Content-Length" | b"content-length" => CONTENT_LENGTH,
        b"Transfer-Encoding" | b"transfer-encoding" => header::TRANSFER_ENCODING,
        b"Date" | b"date" => header::DATE,
        b"Server" | b"server" => header::SERVER,
        b"Cache-Control" | b"cache-control" => header::CACHE_CONTROL,
        b"ETag" | b"etag" => header::ETAG,
        b"Last-Modified" | b"last-modified" => header::LAST_MODIFIED,
        b"Vary" | b"vary" => header::VARY,
        _ => return HeaderName::from_bytes(text),
    })
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
    write_line(out, name.as_str(), value.as_bytes());
}

/// Writes one line of a head, of a name and a value that are such.
#[inline]
pub fn write_line(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    for part in [name.as_bytes(), b": ", value, b"\r\n"] {
        out.extend_from_slice(part);
    }
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
    let digit = |number: u64, byte: &u8| {
        let digit = byte.is_ascii_digit().then(|| u64::from(byte - b'0'))?;
        number.checked_mul(10)?.checked_add(digit)
    };
    let number = if text.is_empty() { None } else { text.iter().try_fold(0, digit) };
    // All but the largest two are meant for those who count otherwise.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_http_reads_them() {
        for text in [
            "Host",
            "User-Agent",
            "Accept",
            "Accept-Encoding",
            "Accept-Language",
            "Authorization",
            "Cookie",
            "Connection",
            "Content-Type",
            "Content-Length",
            "Transfer-Encoding",
            "Date",
            "Server",
            "Cache-Control",
            "ETag",
            "Last-Modified",
            "Vary",
            "X-Own",
            "HOST",
            "Hos",
            "Hosts",
            "",
            "a b",
        ] {
            for text in [text, &text.to_lowercase()] {
                assert_eq!(name_of(text.as_bytes()).ok(), HeaderName::from_bytes(text.as_bytes()).ok(), "{text}");
            }
        }
    }

    #[test]
    fn a_length_is_digits_alone() {
        for (text, length) in [
            ("0", Some(0)),
            ("00042", Some(42)),
            ("18446744073709551613", Some(u64::MAX - 2)),
            ("18446744073709551614", None),
            ("18446744073709551616", None),
            ("99999999999999999999", None),
            ("", None),
            ("+1", None),
            ("1 ", None),
            ("1a", None),
        ] {
            assert_eq!(parse_length(text.as_bytes()), length, "{text}");
        }
    }
}
