//! Heads: a request's read, an answer's written.

use std::io::Write;
use std::mem::MaybeUninit;

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use http::request::Parts;
use http::{HeaderMap, Method, Request, StatusCode, Uri, response};
use http_body::Body;
use hyper::ext::ReasonPhrase;
use portcullis_wire::{Decoder, Fields, Length, MAX_FIELDS, cut, parse_length, write_field};

/// What was found where a request begins.
#[expect(clippy::large_enum_variant, reason = "it is taken apart at once")]
pub(super) enum Found {
    /// Less than a head.
    Part,
    Plain(Parts, Asked),
    /// A request out of the ordinary, or none; nothing of it was taken.
    Other,
    /// A request whose end is told in two ways, which whoever sent it and whoever passed it on may have understood
    /// differently (RFC 9112 §6.1).
    Ambiguous,
}

/// Why a request is not plain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NotPlain {
    Other,
    Ambiguous,
}

/// What of a request decides how it ends, and its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) body: Decoder,
    pub(super) is_head: bool,
    pub(super) keep_alive: bool,
    /// Whether it takes trailers.
    pub(super) trailers: bool,
}

/// How an answer's body ends, and whether the head says how long it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Framing {
    pub(super) length: Length,
    said: Said,
}

/// What a head says of the length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    Nothing,
    /// What it says already.
    Given,
    Exact(u64),
}

// === impl Found ===

impl Found {
    /// Takes a head out of `input` once all of it is there.
    ///
    /// A plain request is one of HTTP/1.1 whose body's end is told in just one way, and which asks for nothing but an
    /// answer: no change of the protocol, no tunnel, no `100 Continue`. Its head is no longer than `max_head`, and uses the
    /// `memory` of other headers.
    pub(super) fn read(input: &mut BytesMut, max_head: usize, memory: &mut HeaderMap) -> Self {
        let mut fields = [const { MaybeUninit::uninit() }; MAX_FIELDS];
        let mut request = httparse::Request::new(&mut []);
        let parsed =
            httparse::ParserConfig::default().parse_request_with_uninit_headers(&mut request, input, &mut fields);
        let length = match parsed {
            Ok(httparse::Status::Complete(length)) if length <= max_head => length,
            Ok(httparse::Status::Partial) if input.len() < max_head => return Self::Part,
            _ => return Self::Other,
        };
        let (Some(method), Some(target), Some(1)) = (request.method, request.path, request.version) else {
            return Self::Other;
        };
        let Ok(method) = Method::from_bytes(method.as_bytes()) else { return Self::Other };
        let target_at = target.as_ptr().addr() - input.as_ptr().addr();
        let target_at = target_at..target_at + target.len();
        let fields = Fields::of(input, request.headers);
        let head = cut(input, length);
        match Self::plain(method, head.slice(target_at), &fields, &head, std::mem::take(memory)) {
            Ok((parts, asked)) => Self::Plain(parts, asked),
            Err(NotPlain::Ambiguous) => Self::Ambiguous,
            Err(NotPlain::Other) => {
                // As if nothing had been taken.
                let rest = std::mem::take(input);
                input.extend_from_slice(&head);
                input.extend_from_slice(&rest);
                Self::Other
            }
        }
    }

    fn plain(
        method: Method,
        target: Bytes,
        fields: &Fields,
        head: &Bytes,
        mut headers: HeaderMap,
    ) -> Result<(Parts, Asked), NotPlain> {
        headers.clear();
        fields.read(head, &mut headers).map_err(|_| NotPlain::Other)?;
        let asked = Asked::of(&method, &headers)?;
        let (mut parts, ()) = Request::new(()).into_parts();
        parts.uri = Uri::from_maybe_shared(target).map_err(|_| NotPlain::Other)?;
        (parts.method, parts.headers) = (method, headers);
        Ok((parts, asked))
    }
}

// === impl Asked ===

impl Asked {
    /// Before the first request.
    pub(super) const NOTHING: Self = Self { body: Decoder::OVER, is_head: false, keep_alive: true, trailers: false };

    fn of(method: &Method, headers: &HeaderMap) -> Result<Self, NotPlain> {
        let mut asked = Self { is_head: *method == Method::HEAD, ..Self::NOTHING };
        let (mut length, mut coded, mut plain) = (None, false, *method != Method::CONNECT);
        for (name, value) in headers {
            match name.as_str() {
                "content-length" => {
                    let said = parse_length(value.as_bytes());
                    plain &= said.is_some() && length.is_none();
                    length = Some(said.unwrap_or_default());
                }
                "transfer-encoding" => {
                    plain &= !coded && value.as_bytes().eq_ignore_ascii_case(b"chunked");
                    coded = true;
                }
                "upgrade" | "expect" => plain = false,
                "connection" => asked.keep_alive &= !lists(value.as_bytes(), b"close"),
                "te" => asked.trailers |= lists(value.as_bytes(), b"trailers"),
                _ => {}
            }
        }
        asked.body = match (length, coded) {
            (Some(_), true) => return Err(NotPlain::Ambiguous),
            (Some(length), false) => Decoder::Length(length),
            (None, true) => Decoder::CHUNKED,
            (None, false) => Decoder::OVER,
        };
        if plain { Ok(asked) } else { Err(NotPlain::Other) }
    }
}

/// Whether a list of words has this one.
fn lists(list: &[u8], word: &[u8]) -> bool {
    list.split(|byte| *byte == b',').any(|element| element.trim_ascii().eq_ignore_ascii_case(word))
}

// === impl Framing ===

impl Framing {
    /// How `body` ends as the answer with this head to what was `asked`.
    pub(super) fn of<B: Body>(head: &response::Parts, body: &B, asked: Asked) -> Self {
        let mut lines = head.headers.get_all(CONTENT_LENGTH).iter();
        let given = match (lines.next(), lines.next()) {
            (Some(line), None) => parse_length(line.as_bytes()),
            _ => None,
        };
        let known = || if body.is_end_stream() { Some(0) } else { body.size_hint().exact() };
        let said = if given.is_some() { Said::Given } else { known().map_or(Said::Nothing, Said::Exact) };
        let nothing = |said| Self { length: Length::None, said };
        match (head.status, given.or_else(known)) {
            (StatusCode::NO_CONTENT, _) => nothing(Said::Nothing),
            (StatusCode::NOT_MODIFIED, _) => nothing(if given.is_some() { said } else { Said::Nothing }),
            // Nothing at all need not be the length of what GET would get.
            _ if asked.is_head => nothing(if said == Said::Exact(0) { Said::Nothing } else { said }),
            (_, Some(0)) if body.is_end_stream() => nothing(said),
            (_, Some(length)) => Self { length: Length::Exact(length), said },
            (_, None) => Self { length: Length::Chunked, said },
        }
    }

    /// Writes the head of an answer; whether it says that the connection ends.
    pub(super) fn write(self, out: &mut Vec<u8>, head: &response::Parts, close: bool, date: &[u8]) -> bool {
        out.reserve(128 + 48 * head.headers.len());
        match head.extensions.get::<ReasonPhrase>() {
            None if head.status == StatusCode::OK => out.extend_from_slice(b"HTTP/1.1 200 OK\r\n"),
            reason => {
                let usual = || head.status.canonical_reason().unwrap_or_default().as_bytes();
                out.extend_from_slice(b"HTTP/1.1 ");
                out.extend_from_slice(head.status.as_str().as_bytes());
                out.push(b' ');
                out.extend_from_slice(reason.map_or_else(usual, ReasonPhrase::as_bytes));
                out.extend_from_slice(b"\r\n");
            }
        }
        let (mut dated, mut closes) = (false, false);
        for (name, value) in &head.headers {
            match name.as_str() {
                "content-length" if self.said == Said::Given => {}
                "content-length" | "transfer-encoding" => continue,
                "connection" => closes |= lists(value.as_bytes(), b"close"),
                "date" => dated = true,
                _ => {}
            }
            write_field(out, name, value);
        }
        if let Said::Exact(length) = self.said {
            // Writing to memory does not fail.
            _ = write!(out, "content-length: {length}\r\n");
        } else if self.length == Length::Chunked {
            write_codings(out, &head.headers);
        }
        if close && !closes {
            out.extend_from_slice(b"connection: close\r\n");
        }
        if !dated {
            out.extend_from_slice(b"date: ");
            out.extend_from_slice(date);
            out.extend_from_slice(b"\r\n");
        }
        out.extend_from_slice(b"\r\n");
        close || closes
    }
}

/// Whatever a body was coded by, it goes out in chunks.
fn write_codings(out: &mut Vec<u8>, headers: &HeaderMap) {
    for value in headers.get_all(TRANSFER_ENCODING) {
        if !lists(value.as_bytes(), b"chunked") {
            write_field(out, &TRANSFER_ENCODING, value);
        }
    }
    out.extend_from_slice(b"transfer-encoding: chunked\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{HeaderValue, Response};
    use http_body_util::{BodyExt, Empty, Full};

    const MAX_HEAD: usize = 8000;

    /// What is found, and how much is left.
    fn found(head: &str) -> (Option<Asked>, usize) {
        let mut input = BytesMut::from(format!("{head}\r\nbody").as_bytes());
        match Found::read(&mut input, MAX_HEAD, &mut HeaderMap::new()) {
            Found::Part => panic!("{head:?} is no head"),
            Found::Plain(_, asked) => (Some(asked), input.len()),
            Found::Other | Found::Ambiguous => (None, input.len()),
        }
    }

    #[test]
    fn a_plain_request_says_how_it_ends_and_what_follows() {
        let plain = Asked::NOTHING;
        for (head, asked) in [
            ("GET / HTTP/1.1\r\n", plain),
            ("HEAD /a?b HTTP/1.1\r\nhost: a\r\n", Asked { is_head: true, ..plain }),
            ("GET http://a/ HTTP/1.1\r\nConnection: keep-alive\r\n", plain),
            (
                "OPTIONS * HTTP/1.1\r\nconnection: te,\t CLOSE\r\nTE: gzip, Trailers\r\n",
                Asked { keep_alive: false, trailers: true, ..plain },
            ),
            ("PUT / HTTP/1.1\r\nContent-Length: 5\r\n", Asked { body: Decoder::Length(5), ..plain }),
            ("GET / HTTP/1.1\r\ncontent-length: 0\r\n", plain),
            ("PUT / HTTP/1.1\r\ntransfer-encoding: Chunked\r\n", Asked { body: Decoder::CHUNKED, ..plain }),
        ] {
            assert_eq!(found(head), (Some(asked), 4), "{head:?}");
        }
    }

    #[test]
    fn what_is_not_plain_is_left_as_it_came() {
        let many: String = (0..=MAX_FIELDS).map(|i| format!("x-{i}: {i}\r\n")).collect();
        for head in [
            "GET / HTTP/1.0\r\n",
            "GET / HTTP/2.0\r\n",
            "CONNECT a:1 HTTP/1.1\r\n",
            "GET / HTTP/1.1\r\nupgrade: x\r\nconnection: upgrade\r\n",
            "PUT / HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 5\r\n",
            "PUT / HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 5\r\n",
            "PUT / HTTP/1.1\r\ncontent-length: 5, 5\r\n",
            "PUT / HTTP/1.1\r\ncontent-length: +5\r\n",
            "PUT / HTTP/1.1\r\ncontent-length: \r\n",
            "PUT / HTTP/1.1\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
            "PUT / HTTP/1.1\r\ntransfer-encoding: gzip, chunked\r\n",
            "PUT / HTTP/1.1\r\ntransfer-encoding: \x0bchunked\r\n",
            "GET / HTTP/1.1\r\na : b\r\n",
            "GET / HTTP/1.1\r\na: b\r\n c: d\r\n",
            "GET  / HTTP/1.1\r\n",
            "GET http:// HTTP/1.1\r\n",
            "\x16\x03\x01",
            &format!("GET / HTTP/1.1\r\n{many}"),
            &format!("GET / HTTP/1.1\r\na: {}\r\n", "b".repeat(MAX_HEAD)),
            &format!("GET / HTTP/1.1\r\na: {}", "b".repeat(MAX_HEAD)),
        ] {
            let mut input = BytesMut::from(format!("{head}\r\nbody").as_bytes());
            assert!(matches!(Found::read(&mut input, MAX_HEAD, &mut HeaderMap::new()), Found::Other), "{head:?}");
            assert_eq!(input, format!("{head}\r\nbody"));
        }
    }

    #[test]
    fn a_request_with_two_ends_is_ambiguous() {
        let (length, chunks) = ("content-length: 5\r\n", "transfer-encoding: chunked\r\n");
        for fields in [[length, chunks, ""], [chunks, length, ""], [length, "upgrade: x\r\n", chunks]] {
            let mut input = BytesMut::from(format!("PUT / HTTP/1.1\r\n{}\r\n", fields.concat()).as_bytes());
            assert!(matches!(Found::read(&mut input, MAX_HEAD, &mut HeaderMap::new()), Found::Ambiguous), "{fields:?}");
        }
    }

    #[test]
    fn a_head_is_read_once_it_is_whole() {
        let head = "POST /a/b?c HTTP/1.1\r\nhost: a\r\nx-own: \t1 \r\nx-own: 2\r\n\r\n";
        for cut in 0..head.len() {
            let mut input = BytesMut::from(&head[..cut]);
            assert!(
                matches!(Found::read(&mut input, MAX_HEAD, &mut HeaderMap::new()), Found::Part) && input.len() == cut,
                "{cut}"
            );
        }
        let mut memory = HeaderMap::from_iter([(TRANSFER_ENCODING, HeaderValue::from_static("of another"))]);
        let Found::Plain(parts, _) = Found::read(&mut BytesMut::from(head), MAX_HEAD, &mut memory) else {
            panic!("it is plain")
        };
        assert_eq!((&parts.method, &parts.uri), (&Method::POST, &"/a/b?c".parse().unwrap()));
        assert_eq!(parts.headers.len(), 3);
        assert_eq!(parts.headers.get_all("x-own").iter().collect::<Vec<_>>(), ["1", "2"]);
    }

    fn written<B: Body>(method: &Method, head: http::response::Builder, body: B, close: bool) -> (Length, String) {
        let (head, body) = head.header("date", "now").body(body).unwrap().into_parts();
        let framing = Framing::of(&head, &body, Asked::of(method, &HeaderMap::new()).unwrap());
        let mut out = Vec::new();
        framing.write(&mut out, &head, close, b"now");
        let text = String::from_utf8(out).unwrap();
        (framing.length, text.strip_suffix("\r\n\r\n").unwrap().replace("\r\n", "|").replace("|date: now", ""))
    }

    #[test]
    fn an_answer_is_framed_as_what_was_asked_and_its_body_say() {
        let (get, head) = (Method::GET, Method::HEAD);
        let (full, empty) = (|| Full::<Bytes>::from("hello"), Empty::<Bytes>::new);
        let stream = || full().map_frame(|frame| frame).boxed_unsync();
        let chunks =
            || http_body_util::StreamBody::new(futures::stream::pending::<Result<http_body::Frame<Bytes>, ()>>());
        let status = |status: u16| Response::builder().status(status);
        let ok = || status(200);
        assert_eq!(stream().size_hint().exact(), None);
        let expect = |(length, text): (Length, String), want: Length, head: &str| {
            assert_eq!((length, text.as_str()), (want, head));
        };
        expect(written(&get, ok(), full(), false), Length::Exact(5), "HTTP/1.1 200 OK|content-length: 5");
        expect(written(&get, ok(), empty(), false), Length::None, "HTTP/1.1 200 OK|content-length: 0");
        expect(written(&get, ok(), chunks(), false), Length::Chunked, "HTTP/1.1 200 OK|transfer-encoding: chunked");
        let given = || ok().header("content-length", "7");
        expect(written(&get, given(), chunks(), false), Length::Exact(7), "HTTP/1.1 200 OK|content-length: 7");
        // It is broken off, since what was promised does not come.
        expect(written(&get, given(), empty(), false), Length::Exact(7), "HTTP/1.1 200 OK|content-length: 7");
        let differ = || given().header("content-length", "8");
        expect(written(&get, differ(), full(), false), Length::Exact(5), "HTTP/1.1 200 OK|content-length: 5");
        let coded = ok().header("transfer-encoding", "gzip").header("transfer-encoding", "chunked");
        let said = "HTTP/1.1 200 OK|transfer-encoding: gzip|transfer-encoding: chunked";
        expect(written(&get, coded, chunks(), false), Length::Chunked, said);
        expect(written(&head, ok(), full(), false), Length::None, "HTTP/1.1 200 OK|content-length: 5");
        expect(written(&head, given(), empty(), false), Length::None, "HTTP/1.1 200 OK|content-length: 7");
        expect(written(&head, ok(), empty(), false), Length::None, "HTTP/1.1 200 OK");
        expect(
            written(&get, status(204).header("content-length", "0"), full(), false),
            Length::None,
            "HTTP/1.1 204 No Content",
        );
        expect(
            written(&get, status(304).header("content-length", "5"), full(), false),
            Length::None,
            "HTTP/1.1 304 Not Modified|content-length: 5",
        );
        expect(
            written(&get, status(299), empty(), true),
            Length::None,
            "HTTP/1.1 299 |content-length: 0|connection: close",
        );
        let reason = ok().extension(ReasonPhrase::from_static(b"Fine")).header("connection", "x, close");
        expect(
            written(&get, reason, empty(), true),
            Length::None,
            "HTTP/1.1 200 Fine|connection: x, close|content-length: 0",
        );
    }
}
