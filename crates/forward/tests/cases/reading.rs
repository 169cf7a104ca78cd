//! Reads HTTP/1.1 requests as RFC 9112 says, independently of what is tested.

type Fields = Vec<(String, String)>;

/// One request, whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Heard {
    pub(crate) method: String,
    pub(crate) target: String,
    pub(crate) host: Option<String>,
    /// The fields, names in lower case, without those of framing.
    pub(crate) fields: Fields,
    pub(crate) body: Vec<u8>,
    pub(crate) trailers: Fields,
    /// Where it ends is clear, but not whom it is for or what it means: it must be refused.
    pub(crate) astray: bool,
}

/// How much of what a recipient may tolerate is tolerated.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reader {
    /// Nothing: what a careful sender writes.
    Strict,
    /// What the RFC lets a server overlook: bare line feeds, empty lines before a request, both framings at once; and a
    /// missing `Host` beside a target that names one, which §3.2 does not.
    Lenient,
    /// The same, with trailers as hyper's server reads them.
    Hyper,
}

/// What one look found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Read {
    /// A request, and how many bytes it took.
    Whole(Box<Heard>, usize),
    /// The beginning of one.
    More,
    Bad(&'static str),
}

/// One final answer, whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Said {
    pub(crate) status: u16,
    pub(crate) body: Vec<u8>,
    /// Whether it would end only with the connection.
    pub(crate) to_the_end: bool,
}

struct Lines<'a> {
    bytes: &'a [u8],
    at: usize,
    reader: Reader,
}

impl Reader {
    /// The request that `bytes` begin with.
    pub(crate) fn read(self, bytes: &[u8]) -> Read {
        match self.request(bytes) {
            Ok((heard, used)) => Read::Whole(Box::new(heard), used),
            Err(None) => Read::More,
            Err(Some(bad)) => Read::Bad(bad),
        }
    }

    /// All requests that are whole, up to the first thing that is none.
    pub(crate) fn all(self, mut bytes: &[u8]) -> Vec<Heard> {
        let mut all = Vec::new();
        while let Read::Whole(heard, used) = self.read(bytes) {
            all.push(*heard);
            bytes = &bytes[used..];
        }
        all
    }

    /// The final answer to `method` that `bytes` begin with, and how many bytes it took; `closed` if there will be no
    /// more.
    pub(crate) fn answer(
        self,
        method: &str,
        bytes: &[u8],
        closed: bool,
    ) -> Result<(Said, usize), Option<&'static str>> {
        let mut lines = Lines { bytes, at: 0, reader: self };
        loop {
            let mut first = lines.next()?;
            while first.is_empty() && self != Self::Strict {
                first = lines.next()?;
            }
            let first: String = first.iter().map(|byte| char::from(*byte)).collect();
            let (version, rest) = first.split_once(' ').ok_or(Some("status line"))?;
            let is_10 = version == "HTTP/1.0";
            if !is_10 && version != "HTTP/1.1" {
                return Err(Some("version"));
            }
            let code = rest.split(' ').next().unwrap_or_default();
            let status = number(code, 10).filter(|_| code.len() == 3).ok_or(Some("status"))?;
            let fields = lines.fields()?;
            if (100..200).contains(&status) && status != 101 {
                continue;
            }
            let all = |name: &str| -> Vec<&str> {
                let lines = fields.iter().filter(|(have, _)| have == name).flat_map(|(_, value)| value.split(','));
                lines.map(|part| part.trim_matches([' ', '\t'])).collect()
            };
            let (lengths, codings) = (all("content-length"), all("transfer-encoding"));
            let mut numbers = lengths.iter().map(|length| number(length, 10));
            let length = numbers.next();
            if length == Some(None) || numbers.any(|other| Some(other) != length) {
                return Err(Some("lengths"));
            }
            if !codings.is_empty() && (codings.len() > 1 || !codings[0].eq_ignore_ascii_case("chunked")) {
                return Err(Some("codings"));
            }
            let (mut to_the_end, status) = (false, u16::try_from(status).unwrap_or_default());
            let body = if method == "HEAD" || matches!(status, 101 | 204 | 304) {
                Vec::new()
            } else if !codings.is_empty() && is_10 {
                return Err(Some("codings"));
            } else if !codings.is_empty() {
                lines.chunks()?.0
            } else if let Some(length) = length.flatten() {
                lines.take(length)?.to_vec()
            } else {
                to_the_end = true;
                if !closed {
                    return Err(None);
                }
                lines.take(bytes.len() - lines.at)?.to_vec()
            };
            return Ok((Said { status, body, to_the_end }, lines.at));
        }
    }

    fn request(self, bytes: &[u8]) -> Result<(Heard, usize), Option<&'static str>> {
        let mut lines = Lines { bytes, at: 0, reader: self };
        let mut first = lines.next()?;
        while first.is_empty() && self != Self::Strict {
            first = lines.next()?;
        }
        let first = std::str::from_utf8(first).map_err(|_| Some("request line"))?;
        let [method, target, version] = *first.split(' ').collect::<Vec<_>>() else {
            return Err(Some("request line"));
        };
        if !is_token(method) || target.is_empty() || target.bytes().any(|byte| !byte.is_ascii_graphic()) {
            return Err(Some("method or target"));
        }
        let http_10 = match version {
            "HTTP/1.1" => false,
            "HTTP/1.0" if self != Self::Strict => true,
            _ => return Err(Some("version")),
        };
        let mut fields = lines.fields()?;
        let take = |fields: &mut Fields, name: &str| {
            let taken: Vec<String> = fields.iter().filter(|(have, _)| have == name).map(|(_, v)| v.clone()).collect();
            fields.retain(|(have, _)| have != name);
            taken
        };
        let (host, lengths, codings) =
            (take(&mut fields, "host"), take(&mut fields, "content-length"), take(&mut fields, "transfer-encoding"));
        let named = self != Self::Strict && (http_10 || target.contains("://"));
        let mut astray = host.len() > 1 || host.is_empty() && !named;
        if astray && self == Self::Strict {
            return Err(Some("host"));
        }
        if self == Self::Strict && !lengths.is_empty() && !codings.is_empty() {
            return Err(Some("two framings"));
        }
        let (body, trailers) = if codings.is_empty() {
            let mut numbers = lengths.iter().map(|length| number(length, 10));
            let length = match numbers.next() {
                None => 0,
                Some(length) => length.ok_or(Some("length"))?,
            };
            if numbers.any(|other| other != Some(length)) || self == Self::Strict && lengths.len() > 1 {
                return Err(Some("lengths"));
            }
            (lines.take(length)?.to_vec(), Vec::new())
        } else {
            // Where it ends is known if the last coding is `chunked`, what it means only if that is the only one.
            let mut all =
                codings.iter().flat_map(|line| line.split(',')).map(|coding| coding.trim_matches([' ', '\t']));
            let last = all.next_back().unwrap_or_default();
            if http_10 || !last.eq_ignore_ascii_case("chunked") {
                return Err(Some("coding"));
            }
            astray |= all.next().is_some();
            if astray && self == Self::Strict {
                return Err(Some("codings"));
            }
            lines.chunks()?
        };
        let heard = Heard {
            method: method.to_owned(),
            target: target.to_owned(),
            host: host.into_iter().next(),
            fields,
            body,
            trailers,
            astray,
        };
        Ok((heard, lines.at))
    }
}

impl<'a> Lines<'a> {
    /// The next line without its end, whatever is in it.
    fn raw(&mut self) -> Result<&'a [u8], Option<&'static str>> {
        let rest = &self.bytes[self.at..];
        let end = rest.iter().position(|byte| *byte == b'\n').ok_or(None)?;
        self.at += end + 1;
        match rest[..end].strip_suffix(b"\r") {
            Some(line) => Ok(line),
            None if self.reader != Reader::Strict => Ok(&rest[..end]),
            None => Err(Some("bare line feed")),
        }
    }

    fn next(&mut self) -> Result<&'a [u8], Option<&'static str>> {
        let line = self.raw()?;
        if line.iter().any(|byte| matches!(byte, b'\r' | b'\0')) {
            return Err(Some("control character"));
        }
        Ok(line)
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], Option<&'static str>> {
        let end = self.at.checked_add(count).ok_or(Some("length"))?;
        let taken = self.bytes.get(self.at..end).ok_or(None)?;
        self.at = end;
        Ok(taken)
    }

    /// Fields up to and with the empty line.
    fn fields(&mut self) -> Result<Fields, Option<&'static str>> {
        let mut fields = Vec::new();
        loop {
            let line = self.next()?;
            if line.is_empty() {
                return Ok(fields);
            }
            // Values may hold any byte above space; as one character each they stay comparable.
            let line: String = line.iter().map(|byte| char::from(*byte)).collect();
            let (name, value) = line.split_once(':').ok_or(Some("field"))?;
            if !is_token(name) || value.chars().any(|c| c.is_ascii_control() && c != '\t') {
                return Err(Some("field"));
            }
            fields.push((name.to_ascii_lowercase(), value.trim_matches([' ', '\t']).to_owned()));
        }
    }

    /// hyper looks for the end of the trailers by `CR LF CR LF`, and then reads in between up to the first empty line, also
    /// if that is a bare line feed: the rest is lost. See `what_hides_among_trailers_is_no_request`.
    fn trailers(&mut self) -> Result<Fields, Option<&'static str>> {
        let rest = &self.bytes[self.at..];
        if self.reader != Reader::Hyper || rest.starts_with(b"\r\n") {
            return self.fields();
        }
        let end = rest.windows(4).position(|window| window == b"\r\n\r\n").ok_or(None)? + 4;
        let trailers = Lines { bytes: &rest[..end], at: 0, reader: self.reader }.fields()?;
        self.at += end;
        Ok(trailers)
    }

    fn chunks(&mut self) -> Result<(Vec<u8>, Fields), Option<&'static str>> {
        let mut body = Vec::new();
        loop {
            let line = self.raw()?;
            let size = match self.reader {
                Reader::Strict => line,
                // What an extension says goes no further, so it may be anything; and hyper overlooks spaces.
                Reader::Lenient | Reader::Hyper => {
                    line.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii_end()
                }
            };
            let size = std::str::from_utf8(size).map_err(|_| Some("chunk size"))?;
            let size = number(size, 16).ok_or(Some("chunk size"))?;
            if size == 0 {
                return Ok((body, self.trailers()?));
            }
            body.extend_from_slice(self.take(size)?);
            if !self.next()?.is_empty() {
                return Err(Some("chunk end"));
            }
        }
    }
}

fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

/// Digits and nothing else.
fn number(text: &str, base: u32) -> Option<usize> {
    let digits = !text.is_empty() && text.chars().all(|c| c.is_digit(base));
    digits.then(|| usize::from_str_radix(text, base).ok()).flatten()
}

#[test]
fn requests_are_read_one_after_the_other() {
    let bytes = b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nhiPOST /b HTTP/1.1\r\nhost: h\r\n\
        transfer-encoding: chunked\r\n\r\n2\r\nho\r\n0\r\nx: y\r\n\r\nGET /c";
    let all = Reader::Strict.all(bytes);
    let short: Vec<_> = all.iter().map(|heard| (&*heard.target, &*heard.body, heard.trailers.len())).collect();
    assert_eq!(short, [("/a", &b"hi"[..], 0), ("/b", b"ho", 1)]);
}

#[test]
fn only_what_may_be_tolerated_is() {
    let read = |reader: Reader, text: &str| match reader.read(text.as_bytes()) {
        Read::Whole(heard, _) => Ok(heard.body.len()),
        Read::More => Err("more"),
        Read::Bad(bad) => Err(bad),
    };
    for (text, strict, lenient) in [
        ("GET / HTTP/1.1\nhost: h\n\n", Err("bare line feed"), Ok(0)),
        ("\r\nGET / HTTP/1.1\r\nhost: h\r\n\r\n", Err("request line"), Ok(0)),
        ("GET / HTTP/1.0\r\n\r\n", Err("version"), Ok(0)),
        ("GET / HTTP/1.1\r\nhost: h\r\nhost: h\r\n\r\n", Err("host"), Ok(0)),
        ("GET / HTTP/1.1\r\nhost: h\r\n x: y\r\n\r\n", Err("field"), Err("field")),
        ("GET / HTTP/1.1\r\nhost: h\r\nx : y\r\n\r\n", Err("field"), Err("field")),
        ("GET / HTTP/1.1\r\nhost: h\r\nx: a\rb\r\n\r\n", Err("control character"), Err("control character")),
        ("GET / HTTP/1.1\r\nhost: h\r\ncontent-length: +1\r\n\r\nx", Err("length"), Err("length")),
        ("GET / HTTP/1.1\r\nhost: h\r\ncontent-length: 9\r\n\r\nx", Err("more"), Err("more")),
        ("GET / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked, x\r\n\r\n", Err("coding"), Err("coding")),
        (
            "GET / HTTP/1.1\r\nhost: h\r\ncontent-length: 9\r\ntransfer-encoding: chunked\r\n\r\n1;x\r\na\r\n0\r\n\r\n",
            Err("two framings"),
            Ok(1),
        ),
    ] {
        assert_eq!((read(Reader::Strict, text), read(Reader::Lenient, text)), (strict, lenient), "{text:?}");
    }
}
