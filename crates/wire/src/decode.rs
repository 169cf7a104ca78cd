//! A message's body, taken out of the bytes that have arrived.

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};
use http_body::{Frame, SizeHint};

use crate::room::cut;
use crate::{MAX_FIELDS, Malformed};

/// What comes next of a body, and by which of the rules of
/// [RFC 9112](https://www.rfc-editor.org/rfc/rfc9112#section-6.3) it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::exhaustive_enums, reason = "those who share it match on it")]
pub enum Decoder {
    /// So many more bytes; none is the end.
    Length(u64),
    /// Everything up to the end of the connection.
    Close,
    /// The line before a chunk.
    Size,
    /// So many more bytes of a chunk.
    Data(u64),
    /// The line end after a chunk.
    DataEnd,
    /// What follows the last chunk; so many bytes of it were looked at, and more are needed.
    Trailers(usize),
}

/// The longest line before a chunk, its extensions included. Nobody uses them.
const LINE: usize = 4096;
/// All of a body's trailers together.
const TRAILERS: usize = 16 * 1024;

// === impl Decoder ===

impl Decoder {
    /// There is no body, or no more of it.
    pub const OVER: Self = Self::Length(0);
    /// Chunks, from the first on.
    pub const CHUNKED: Self = Self::Size;

    /// Whether nothing is left.
    #[must_use]
    pub fn is_over(self) -> bool {
        self == Self::OVER
    }

    /// The connection has ended; false if the body has not.
    pub fn end(&mut self) -> bool {
        if *self == Self::Close {
            *self = Self::OVER;
        }
        self.is_over()
    }

    /// How much is left, as far as it is known.
    #[must_use]
    pub fn size_hint(self) -> SizeHint {
        match self {
            Self::Length(left) => SizeHint::with_exact(left),
            _ => SizeHint::default(),
        }
    }

    /// How many bytes will certainly come before anything else.
    #[must_use]
    pub fn expected(self) -> u64 {
        match self {
            Self::Length(left) | Self::Data(left) => left,
            _ => 0,
        }
    }

    /// The next frame; `None` when it is over, or needs more than is there.
    ///
    /// # Errors
    ///
    /// When what is there is not framed as a body.
    pub fn next(&mut self, input: &mut BytesMut) -> Result<Option<Frame<Bytes>>, Malformed> {
        loop {
            match self {
                Self::Length(left) => return Ok(take(input, left).map(Frame::data)),
                Self::Close => {
                    let all = input.len();
                    return Ok((all > 0).then(|| Frame::data(cut(input, all))));
                }
                Self::Size => {
                    let Some(end) = input.iter().position(|byte| *byte == b'\n') else {
                        return if input.len() < LINE {
                            Ok(None)
                        } else {
                            Err(Malformed("a chunk's line is too long"))
                        };
                    };
                    let size = size(&input[..end])?;
                    skip(input, end + 1);
                    *self = if size == 0 { Self::Trailers(0) } else { Self::Data(size) };
                }
                Self::Data(left) => {
                    let data = take(input, left);
                    if *left == 0 {
                        *self = Self::DataEnd;
                    }
                    return Ok(data.map(Frame::data));
                }
                Self::DataEnd => match input.as_ref() {
                    [b'\r', b'\n', ..] => {
                        skip(input, 2);
                        *self = Self::Size;
                    }
                    [] | [b'\r'] => return Ok(None),
                    _ => return Err(Malformed("a chunk is longer than it says")),
                },
                Self::Trailers(seen) => {
                    // Read anew with each line and not with each byte: there are only so many lines.
                    let has_new_line = input.get(*seen..).is_some_and(|new| new.contains(&b'\n'));
                    let read = if has_new_line { trailers(input)? } else { None };
                    let Some((length, trailers)) = read else {
                        *seen = input.len();
                        return if *seen < TRAILERS { Ok(None) } else { Err(Malformed("the trailers are too large")) };
                    };
                    skip(input, length);
                    *self = Self::OVER;
                    return Ok((!trailers.is_empty()).then(|| Frame::trailers(trailers)));
                }
            }
        }
    }
}

fn skip(input: &mut BytesMut, count: usize) {
    let _ = input.split_to(count);
}

/// As much of what is `left` as is there.
fn take(input: &mut BytesMut, left: &mut u64) -> Option<Bytes> {
    let count = usize::try_from(*left).map_or(input.len(), |left| left.min(input.len()));
    *left -= count as u64;
    (count > 0).then(|| cut(input, count))
}

/// What the line before a chunk, without its LF, says of its size.
fn size(line: &[u8]) -> Result<u64, Malformed> {
    let Some((b'\r', line)) = line.split_last() else { return Err(Malformed("a chunk's line does not end in CRLF")) };
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let (number, rest) = line.split_at(digits);
    let extension = rest.iter().find(|byte| !b" \t".contains(byte));
    let is_sound = (1..=16).contains(&digits) && extension.is_none_or(|byte| *byte == b';') && !rest.contains(&b'\r');
    if !is_sound {
        return Err(Malformed("a chunk's size is not a number"));
    }
    let value = |digit: &u8| u64::from(char::from(*digit).to_digit(16).unwrap_or_default());
    Ok(number.iter().fold(0, |size, digit| size << 4 | value(digit)))
}

/// The trailers and how long they are, once all are there.
fn trailers(input: &[u8]) -> Result<Option<(usize, HeaderMap)>, Malformed> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    match httparse::parse_headers(input, &mut fields) {
        Ok(httparse::Status::Complete((length, fields))) => {
            // Where a lone LF ends a line for one and not for another, they differ on where the body ends.
            let mut lines = input[..length].split(|byte| *byte == b'\n');
            if lines.next_back().is_some() && lines.any(|line| line.last() != Some(&b'\r')) {
                return Err(Malformed("a trailer does not end in CRLF"));
            }
            let mut trailers = HeaderMap::with_capacity(fields.len());
            for field in fields {
                let (name, value) =
                    (HeaderName::from_bytes(field.name.as_bytes()), HeaderValue::from_bytes(field.value));
                let (Ok(name), Ok(value)) = (name, value) else { return Err(Malformed("a trailer is no field")) };
                trailers.append(name, value);
            }
            Ok(Some((length, trailers)))
        }
        Ok(httparse::Status::Partial) => Ok(None),
        Err(_) => Err(Malformed("the trailers are no fields")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a body comes to, given in pieces of `step` bytes, and what is left over behind it.
    fn decoded(mut decoder: Decoder, wire: &str, step: usize) -> Result<(String, Vec<String>, usize), &'static str> {
        let (mut input, mut data, mut fields) = (BytesMut::new(), Vec::new(), Vec::new());
        let mut pieces = wire.as_bytes().chunks(step);
        while !decoder.is_over() {
            match decoder.next(&mut input).map_err(|Malformed(what)| what)? {
                Some(frame) => match frame.into_data() {
                    Ok(bytes) => data.extend_from_slice(&bytes),
                    Err(frame) => {
                        let trailers = frame.into_trailers().unwrap();
                        fields.extend(
                            trailers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())),
                        );
                    }
                },
                None if decoder.is_over() => {}
                None => match pieces.next() {
                    Some(piece) => input.extend_from_slice(piece),
                    None if decoder.end() => {}
                    None => return Err("cut short"),
                },
            }
        }
        let rest = input.len() + pieces.map(<[u8]>::len).sum::<usize>();
        Ok((String::from_utf8(data).unwrap(), fields, rest))
    }

    #[test]
    fn a_body_is_the_same_however_it_arrives() {
        let ok = |data: &str, fields: &[&str], rest| {
            Ok((data.to_owned(), fields.iter().map(|field| (*field).to_owned()).collect(), rest))
        };
        for (decoder, wire, want) in [
            (Decoder::OVER, "next", ok("", &[], 4)),
            (Decoder::Length(5), "hello", ok("hello", &[], 0)),
            (Decoder::Length(5), "hellonext", ok("hello", &[], 4)),
            (Decoder::Length(6), "hello", Err("cut short")),
            (Decoder::Close, "hello", ok("hello", &[], 0)),
            (Decoder::CHUNKED, "0\r\n\r\n", ok("", &[], 0)),
            (Decoder::CHUNKED, "5\r\nhello\r\n0\r\n\r\n", ok("hello", &[], 0)),
            (Decoder::CHUNKED, "1\r\nh\r\n04;a=b\r\nello\r\n000 ; x\r\n\r\nnext", ok("hello", &[], 4)),
            (Decoder::CHUNKED, "A\r\n0123456789\r\n0\r\na: 1\r\nb: 2\r\n\r\n", ok("0123456789", &["a: 1", "b: 2"], 0)),
            (Decoder::CHUNKED, "5\r\nhello\r\n0\r\n", Err("cut short")),
            (Decoder::CHUNKED, "5\r\nhello\r\n", Err("cut short")),
            (Decoder::CHUNKED, "5\r\nhel", Err("cut short")),
        ] {
            for step in [1, 2, 3, 7, 1000] {
                assert_eq!(decoded(decoder, wire, step), want, "{wire:?} by {step}");
            }
        }
    }

    #[test]
    fn what_is_no_chunk_is_malformed() {
        for wire in [
            "\r\n",
            "x\r\n",
            "-5\r\nhello",
            "+5\r\nhello",
            "0x5\r\nhello",
            "5 5\r\nhello",
            "5\nhello\r\n0\r\n\r\n",
            "5\r\nhello0\r\n\r\n",
            "5\r\nhello!\r\n0\r\n\r\n",
            "5\r;\r\nhello\r\n",
            "5;\rx\r\nhello\r\n",
            "00000000000000005\r\nhello",
            "0\r\nx y: 1\r\n\r\n",
            "0\r\n\nx: 1\r\n\r\n",
            "0\r\nx: 1\n\r\n",
        ] {
            for step in [1, 1000] {
                let decoded = decoded(Decoder::CHUNKED, wire, step);
                assert!(decoded.as_ref().is_err_and(|what| *what != "cut short"), "{wire:?}: {decoded:?}");
            }
        }
        let endless = format!("5;{}", "x".repeat(LINE));
        assert!(decoded(Decoder::CHUNKED, &endless, 100).is_err_and(|what| what.contains("too long")));
        let endless = format!("0\r\n{}", "x: y\r\n".repeat(50).repeat(100));
        assert!(decoded(Decoder::CHUNKED, &endless, 100).is_err_and(|what| what.contains("trailers")));
        let large = format!("0\r\nx: {}", "y".repeat(TRAILERS));
        assert!(decoded(Decoder::CHUNKED, &large, 100).is_err_and(|what| what.contains("too large")));
    }
}
