//! A request's head, kept in little room for another attempt.

use bytes::Bytes;
use http::request::Parts;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version};
use portcullis_core::Baggage;

/// A request's head, kept for another attempt that most requests never need: one allocation, where a copy of the head
/// makes one for each of its maps, and one for each part that came in memory of its own.
#[derive(Clone)]
pub(crate) struct Spare {
    method: Method,
    scheme: Option<Scheme>,
    version: Version,
    text: Bytes,
    /// How much of the text is the target's authority, and how much after it its path; the fields follow: of each the
    /// length of the name, the length and a mark of the value, the name, the value.
    authority: usize,
    path: usize,
    /// Values that are not worth copying.
    long: Vec<HeaderValue>,
    pub(crate) baggage: Baggage,
}

/// Values from this length on are shared.
const LONG: usize = 1024;
/// Marks of a value, beside its length.
const IS_LONG: u32 = 1 << 31;
const IS_SENSITIVE: u32 = 1 << 30;
const LENGTHS: usize = size_of::<u16>() + size_of::<u32>();

// === impl Spare ===

impl Spare {
    pub(crate) fn of(parts: &Parts) -> Self {
        let (authority, path) = (parts.uri.authority(), parts.uri.path_and_query());
        let authority = authority.map_or("", Authority::as_str);
        let path = path.map_or("", PathAndQuery::as_str);
        let length = |value: &HeaderValue| if value.len() < LONG { value.len() } else { 0 };
        let lengths = parts.headers.iter().map(|(name, value)| LENGTHS + name.as_str().len() + length(value));
        let mut text = Vec::with_capacity(authority.len() + path.len() + lengths.sum::<usize>());
        text.extend_from_slice(authority.as_bytes());
        text.extend_from_slice(path.as_bytes());
        let mut long = Vec::new();
        for (name, value) in &parts.headers {
            let (name, mut mark, mut short) = (name.as_str().as_bytes(), IS_LONG, &[][..]);
            if value.len() < LONG {
                mark = value.len() as u32 | if value.is_sensitive() { IS_SENSITIVE } else { 0 };
                short = value.as_bytes();
            } else {
                long.push(value.clone());
            }
            // No name is longer: `http` sees to it.
            let ([a, b], [c, d, e, f]) = ((name.len() as u16).to_be_bytes(), mark.to_be_bytes());
            text.extend_from_slice(&[a, b, c, d, e, f]);
            text.extend_from_slice(name);
            text.extend_from_slice(short);
        }
        Self {
            method: parts.method.clone(),
            scheme: parts.uri.scheme().cloned(),
            version: parts.version,
            text: text.into(),
            authority: authority.len(),
            path: path.len(),
            long,
            baggage: Baggage::of(&parts.extensions),
        }
    }

    pub(crate) fn into_parts(self) -> Parts {
        let mut text = self.text;
        let (mut parts, ()) = Request::new(()).into_parts();
        parts.method = self.method;
        parts.version = self.version;
        parts.uri = target(self.scheme, text.split_to(self.authority), text.split_to(self.path));
        parts.headers = headers(text, self.long);
        parts.extensions = self.baggage.into_extensions();
        parts
    }
}

/// What was a target is one again.
fn target(scheme: Option<Scheme>, authority: Bytes, path: Bytes) -> Uri {
    let mut parts = http::uri::Parts::default();
    parts.scheme = scheme;
    parts.authority = Authority::from_maybe_shared(authority).ok();
    parts.path_and_query = if path.is_empty() { None } else { PathAndQuery::from_maybe_shared(path).ok() };
    Uri::from_parts(parts).unwrap_or_default()
}

/// What was a header is one again.
fn headers(mut text: Bytes, long: Vec<HeaderValue>) -> HeaderMap {
    let (mut headers, mut long) = (HeaderMap::new(), long.into_iter());
    while let Some((lengths, _)) = text.split_first_chunk::<LENGTHS>() {
        let [a, b, c, d, e, f] = *lengths;
        let (name, mark) = (usize::from(u16::from_be_bytes([a, b])), u32::from_be_bytes([c, d, e, f]));
        let _ = text.split_to(LENGTHS);
        let name = HeaderName::from_bytes(&text.split_to(name));
        let value = if mark & IS_LONG != 0 {
            long.next()
        } else {
            let value = HeaderValue::from_maybe_shared(text.split_to((mark & !IS_SENSITIVE) as usize));
            value.ok().map(|mut value| {
                value.set_sensitive(mark & IS_SENSITIVE != 0);
                value
            })
        };
        if let (Ok(name), Some(value)) = (name, value) {
            headers.append(name, value);
        }
    }
    headers
}

/// Its parts may be secrets.
impl std::fmt::Debug for Spare {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spare").field("size", &self.text.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use portcullis_core::{Carried, Destination};

    #[test]
    fn a_head_comes_back_as_it_was() {
        let mut secret = HeaderValue::from_static("Bearer 1");
        secret.set_sensitive(true);
        let mut request = Request::put("https://a.example:8443/b?c=d")
            .version(Version::HTTP_2)
            .header("accept", "x")
            .header("x-own", HeaderValue::from_bytes(b"\xe9\t ").unwrap())
            .header("accept", "y")
            .header("x-none", "")
            .header("x-long", "l".repeat(LONG))
            .header("x-just-not", "s".repeat(LONG - 1))
            .header("authorization", secret)
            .body(())
            .unwrap();
        Destination::new("s").attach(request.extensions_mut());
        request.extensions_mut().insert(7_u8);
        let parts = request.into_parts().0;
        let spare = Spare::of(&parts);
        assert!(!format!("{spare:?}").contains("Bearer"));
        for again in [spare.clone().into_parts(), spare.into_parts()] {
            assert_eq!(
                (&again.method, &again.uri, again.version, &again.headers),
                (&parts.method, &parts.uri, parts.version, &parts.headers)
            );
            assert_eq!(again.headers.get_all("accept").iter().collect::<Vec<_>>(), ["x", "y"]);
            assert!(again.headers["authorization"].is_sensitive() && !again.headers["x-long"].is_sensitive());
            assert_eq!(Destination::of(&again.extensions).map(Destination::as_str), Some("s"));
            assert_eq!(again.extensions.get(), Some(&7_u8));
        }
    }

    #[test]
    fn a_target_comes_back_as_it_was() {
        for target in
            ["/", "/a?b", "*", "a.example:443", "http://a.example", "http://a.example?b", "https://u@[::1]:1/?"]
        {
            let parts = Request::builder().uri(target).body(()).unwrap().into_parts().0;
            let again = Spare::of(&parts).into_parts().uri;
            assert_eq!((&again, again.to_string()), (&parts.uri, parts.uri.to_string()), "{target}");
            assert_eq!(again.path_and_query(), parts.uri.path_and_query(), "{target}");
        }
    }

    #[test]
    fn a_head_is_kept_in_one_allocation() {
        let mut request = Request::get("https://a/b".to_owned())
            .header("x-own", "1".to_owned())
            .header("accept", "2")
            .body(())
            .unwrap();
        Destination::new("s").attach(request.extensions_mut());
        let parts = request.into_parts().0;
        assert_eq!(allocation_counter::measure(|| drop(Spare::of(&parts))).count_total, 1);
    }
}
