//! Heads: a request's written, a response's read.

use std::mem::MaybeUninit;

use bytes::BytesMut;
use http::header::{CONTENT_LENGTH, HOST, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Version};
use hyper::ext::ReasonPhrase;
use portcullis_wire::{
    Decoder, Fields, Length, MAX_FIELDS, Malformed, cut, keeps_alive, length_of, parse_length, write_field,
};

use crate::forwarded::{Added, Via};

/// What is said before a request's body.
pub(crate) struct Asked<'a> {
    pub(crate) method: &'a Method,
    /// In origin form, which may lack the path, or `*`.
    pub(crate) target: &'a str,
    pub(crate) host: &'a HeaderValue,
    /// Without `Host` and whatever belongs to the connection; a `Content-Length` is right.
    pub(crate) headers: &'a HeaderMap,
    pub(crate) added: &'a Added,
    pub(crate) via: &'a Via,
    pub(crate) upgrade: Option<&'a HeaderValue>,
    pub(crate) length: Length,
}

/// What a response says before its body.
#[derive(Debug)]
pub(crate) struct Answered {
    pub(crate) status: StatusCode,
    pub(crate) version: Version,
    pub(crate) headers: HeaderMap,
    /// If it is not the usual one.
    pub(crate) reason: Option<ReasonPhrase>,
    pub(crate) body: Decoder,
    /// Whether another request may follow once the body is over.
    pub(crate) keep_alive: bool,
}

// === impl Asked ===

impl Asked<'_> {
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        out.reserve(256 + self.target.len() + 48 * self.headers.len());
        for part in [self.method.as_str(), " ", self.target, " HTTP/1.1\r\nhost: "] {
            out.extend_from_slice(part.as_bytes());
        }
        out.extend_from_slice(self.host.as_bytes());
        out.extend_from_slice(b"\r\n");
        for (name, value) in self.headers {
            if *name != HOST {
                write_field(out, name, value);
            }
        }
        self.added.write(self.via, out);
        match self.length {
            Length::Exact(length) if !self.headers.contains_key(CONTENT_LENGTH) => {
                write_field(out, &CONTENT_LENGTH, &HeaderValue::from(length));
            }
            Length::Chunked => out.extend_from_slice(b"transfer-encoding: chunked\r\n"),
            // RFC 9110 §8.6: where content has a meaning, its absence is said. Some ask for it with 411.
            Length::None
                if matches!(*self.method, Method::POST | Method::PUT | Method::PATCH)
                    && !self.headers.contains_key(CONTENT_LENGTH) =>
            {
                out.extend_from_slice(b"content-length: 0\r\n");
            }
            Length::Exact(_) | Length::None => {}
        }
        if let Some(protocol) = self.upgrade {
            out.extend_from_slice(b"connection: upgrade\r\n");
            write_field(out, &http::header::UPGRADE, protocol);
        }
        out.extend_from_slice(b"\r\n");
    }
}

// === impl Answered ===

impl Answered {
    /// Takes a head out of `input` once all of it is there, passing over informational ones but for 101. The memory of
    /// `headers`, the request's, then serves the answer.
    pub(crate) fn read(
        input: &mut BytesMut,
        asked: &Method,
        headers: &mut HeaderMap,
    ) -> Result<Option<Self>, Malformed> {
        loop {
            let mut fields = [const { MaybeUninit::uninit() }; MAX_FIELDS];
            let mut response = httparse::Response::new(&mut []);
            let parsed =
                httparse::ParserConfig::default().parse_response_with_uninit_headers(&mut response, input, &mut fields);
            let length = match parsed {
                Ok(httparse::Status::Complete(length)) => length,
                Ok(httparse::Status::Partial) => return Ok(None),
                Err(_) => return Err(Malformed("a head that is none")),
            };
            let status = response.code.and_then(|code| StatusCode::from_u16(code).ok());
            let Some(status) = status else { return Err(Malformed("a status that is none")) };
            let version = if response.version == Some(0) { Version::HTTP_10 } else { Version::HTTP_11 };
            let reason =
                response.reason.filter(|reason| !reason.is_empty() && Some(*reason) != status.canonical_reason());
            let reason = reason.and_then(|reason| ReasonPhrase::try_from(reason.as_bytes()).ok());
            let fields = Fields::of(input, response.headers);
            let head = cut(input, length);
            if status.is_informational() && status != StatusCode::SWITCHING_PROTOCOLS {
                continue;
            }
            let mut headers = std::mem::take(headers);
            headers.clear();
            fields.read(&head, &mut headers)?;
            let (body, keep_alive) = framing(asked, status, version, &mut headers)?;
            return Ok(Some(Self { status, version, headers, reason, body, keep_alive }));
        }
    }
}

/// How the body ends, and whether the connection is of use after that.
fn framing(
    asked: &Method,
    status: StatusCode,
    version: Version,
    headers: &mut HeaderMap,
) -> Result<(Decoder, bool), Malformed> {
    let is_10 = version == Version::HTTP_10;
    let (mut lengths, mut length, mut coded, mut options) = (0, None, false, false);
    for (name, value) in &*headers {
        match name.as_str() {
            "content-length" => (lengths, length) = (lengths + 1, parse_length(value.as_bytes())),
            "transfer-encoding" => coded = true,
            "connection" => options = true,
            _ => {}
        }
    }
    if lengths > 1 || lengths == 1 && length.is_none() {
        length = length_of(headers)?;
    }
    let mut keep_alive = if options { keeps_alive(headers, is_10) } else { !is_10 };
    let body = if status == StatusCode::SWITCHING_PROTOCOLS {
        keep_alive = false;
        Decoder::OVER
    } else if status == StatusCode::NO_CONTENT {
        // RFC 9110 §8.6: it has no length. Who says that it has may mean it.
        keep_alive &= !coded && length.unwrap_or_default() == 0;
        Decoder::OVER
    } else if *asked == Method::HEAD || status == StatusCode::NOT_MODIFIED {
        Decoder::OVER
    } else if coded {
        if is_10 {
            return Err(Malformed("chunks in HTTP/1.0"));
        }
        Decoder::CHUNKED
    } else {
        length.map_or(Decoder::Close, Decoder::Length)
    };
    if coded {
        if !is_chunked(headers) {
            return Err(Malformed("a body coded by other than chunks"));
        }
        // It is framed by the one, whatever the other says; who says both is not trusted with another request.
        keep_alive &= headers.remove(CONTENT_LENGTH).is_none();
    }
    Ok((body, keep_alive && body != Decoder::Close))
}

/// Said once, and nothing else with it.
fn is_chunked(headers: &HeaderMap) -> bool {
    let mut lines = headers.get_all(TRANSFER_ENCODING).iter();
    let chunked = lines.next().is_some_and(|line| line.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked"));
    chunked && lines.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderName;

    fn read(wire: &str, asked: &Method) -> Result<Option<(Answered, usize)>, Malformed> {
        let mut input = BytesMut::from(wire);
        let mut headers = HeaderMap::from_iter([(HOST, HeaderValue::from_static("of the request"))]);
        let answered = Answered::read(&mut input, asked, &mut headers)?;
        Ok(answered.map(|answered| (answered, input.len())))
    }

    #[test]
    fn how_a_body_ends_and_whether_the_connection_lasts() {
        let (chunked, close, over) = (Decoder::CHUNKED, Decoder::Close, Decoder::OVER);
        for (head, body, keep_alive) in [
            ("1 200 OK\r\ncontent-length: 5\r\n", Decoder::Length(5), true),
            ("1 200 OK\r\ncontent-length: 0\r\n", over, true),
            ("1 200 OK\r\ncontent-length: 5, 5\r\nContent-Length: 5\r\n", Decoder::Length(5), true),
            ("1 200 OK\r\n", close, false),
            ("1 200 OK\r\ntransfer-encoding: Chunked\r\n", chunked, true),
            ("1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n", chunked, false),
            (
                "1 200 OK\r\ncontent-length: 5\r\nconnection: keep-alive\r\nconnection: x, Close\r\n",
                Decoder::Length(5),
                false,
            ),
            ("0 200 OK\r\ncontent-length: 5\r\n", Decoder::Length(5), false),
            ("0 200 OK\r\ncontent-length: 5\r\nconnection: Keep-Alive\r\n", Decoder::Length(5), true),
            ("0 200 OK\r\ncontent-length: 5\r\nconnection: keep-alive, close\r\n", Decoder::Length(5), false),
            ("1 204 No Content\r\ncontent-length: 5\r\n", over, false),
            ("1 304 Not Modified\r\ncontent-length: 5\r\n", over, true),
            ("1 101 Switching Protocols\r\nupgrade: x\r\n", over, false),
            (
                "1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\na: b\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 1\r\n",
                Decoder::Length(1),
                true,
            ),
        ] {
            let (answered, left) = read(&format!("HTTP/1.{head}\r\nbody"), &Method::GET).unwrap().unwrap();
            assert_eq!((answered.body, answered.keep_alive, left), (body, keep_alive, 4), "{head:?}");
            assert!(!answered.headers.contains_key(HOST), "what was asked is not part of the answer");
            let lengths = answered.headers.get_all(CONTENT_LENGTH).iter().count();
            assert_eq!(
                lengths,
                usize::from(head.to_lowercase().contains("content-length") && body != chunked),
                "{head:?}"
            );
            let (answered, _) = read(&format!("HTTP/1.{head}\r\n"), &Method::HEAD).unwrap().unwrap();
            assert_eq!(answered.body, over, "{head:?} to HEAD");
        }
    }

    #[test]
    fn a_head_is_read_once_it_is_whole() {
        let fields: String = (0..MAX_FIELDS).map(|i| format!("x-{i}: {i}\r\n")).collect();
        let head = format!("HTTP/1.1 299 As ever\r\n{fields}\r\n");
        for cut in 0..head.len() {
            assert!(read(&head[..cut], &Method::GET).unwrap().is_none(), "{cut}");
        }
        let (answered, _) = read(&head, &Method::GET).unwrap().unwrap();
        assert_eq!((answered.status.as_u16(), answered.headers.len()), (299, MAX_FIELDS));
        assert_eq!(answered.headers["x-99"], "99");
        assert_eq!(answered.reason.unwrap().as_bytes(), b"As ever");
    }

    #[test]
    fn what_is_no_head_is_malformed() {
        let many: String = (0..=MAX_FIELDS).map(|i| format!("x-{i}: {i}\r\n")).collect();
        for head in [
            "HTTP/1.1 20 OK\r\n",
            "HTTP/2.0 200 OK\r\n",
            "SSH-2.0\r\n",
            "HTTP/1.1 200 OK\r\na b: c\r\n",
            "HTTP/1.1 200 OK\r\na : c\r\n",
            "HTTP/1.1 200 OK\r\na: b\r\n c\r\n",
            "HTTP/1.1 200 OK\r\na: \0\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 1, 2\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: -1\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: +1\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: \r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 0x1\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 18446744073709551615\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n",
            "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: identity\r\n",
            &format!("HTTP/1.1 200 OK\r\n{many}"),
        ] {
            assert!(read(&format!("{head}\r\n"), &Method::GET).is_err(), "{head:?}");
        }
    }

    #[test]
    fn a_request_is_written_with_one_host_and_one_length() {
        let header = |name: &'static str, value| (HeaderName::from_static(name), HeaderValue::from_static(value));
        let headers = HeaderMap::from_iter([header("host", "old"), header("content-length", "5"), header("a", "b")]);
        for (length, upgrade, target, want) in [
            (
                Length::Exact(5),
                None,
                "/x?y",
                "POST /x?y HTTP/1.1\r\nhost: new\r\ncontent-length: 5\r\na: b\r\nvia: 1.1 portcullis\r\n\r\n",
            ),
            (
                Length::None,
                Some("ws"),
                "*",
                "POST * HTTP/1.1\r\nhost: new\r\ncontent-length: 5\r\na: b\r\nvia: 1.1 portcullis\r\nconnection: upgrade\r\nupgrade: ws\r\n\r\n",
            ),
            (
                Length::Exact(5),
                None,
                "/?y",
                "POST /?y HTTP/1.1\r\nhost: new\r\ncontent-length: 5\r\na: b\r\nvia: 1.1 portcullis\r\n\r\n",
            ),
        ] {
            let (host, upgrade) = (HeaderValue::from_static("new"), upgrade.map(HeaderValue::from_static));
            let mut added = Added::default();
            added.via = Some(Version::HTTP_11);
            let asked = Asked {
                method: &Method::POST,
                target,
                host: &host,
                headers: &headers,
                added: &added,
                via: &Via::portcullis(),
                upgrade: upgrade.as_ref(),
                length,
            };
            let mut out = Vec::new();
            asked.write(&mut out);
            assert_eq!(String::from_utf8(out).unwrap(), want);
        }
        let none = HeaderMap::new();
        for (length, want) in [
            (Length::None, ""),
            (Length::Exact(7), "content-length: 7\r\n"),
            (Length::Chunked, "transfer-encoding: chunked\r\n"),
        ] {
            let host = HeaderValue::from_static("new");
            let mut out = Vec::new();
            let (added, via) = (&Added::default(), &Via::portcullis());
            Asked { method: &Method::GET, target: "/", host: &host, headers: &none, added, via, upgrade: None, length }
                .write(&mut out);
            assert_eq!(String::from_utf8(out).unwrap(), format!("GET / HTTP/1.1\r\nhost: new\r\n{want}\r\n"));
        }
    }
}
