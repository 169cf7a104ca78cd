//! Keeps a caller with the endpoint that served it before.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderValue, header};
use portcullis_core::Endpoint;
use siphasher::sip128::{Hasher128, SipHasher24};

/// Keeps a caller with the endpoint that served it before, by a cookie.
///
/// The cookie's value is a keyed hash ([SipHash-2-4](https://www.aumasson.jp/siphash/siphash.pdf), 128 bits) of the
/// endpoint's service, id and address: nobody without the secret learns an address from it, or can choose an endpoint.
/// Gateways with the same secret understand each other's cookies. When the endpoint is gone, has a weight of zero, does not
/// admit or has failed the request, another is picked and the cookie replaced. A response that a layer of ours made in place
/// of the endpoint's sets none.
#[derive(Clone)]
pub struct Sticky {
    name: Arc<str>,
    attributes: String,
    pub(crate) keys: (u64, u64),
}

/// Asks for one endpoint, by its id; put it into the request's extensions.
///
/// When there is no such endpoint, or it does not admit or has failed the request, another is picked, unless the preference
/// is [strict](Self::strict). It goes before stickiness and policy, and is bound neither to a subset nor to a weight: one of
/// weight zero is asked only so.
#[derive(Clone, Debug)]
pub struct Prefer {
    pub(crate) id: Arc<str>,
    pub(crate) strict: bool,
}

/// What stands for an endpoint in a cookie.
pub(crate) type Token = u128;

// === impl Sticky ===

impl Sticky {
    /// By a cookie of this name, `None` if that is no name for a cookie
    /// ([RFC 6265 §4.1.1](https://www.rfc-editor.org/rfc/rfc6265#section-4.1.1)). The secret should be random; gateways that
    /// serve the same callers need the same one. The cookie is sent with `Path=/; HttpOnly; SameSite=Lax`.
    #[must_use]
    pub fn cookie(name: &str, secret: [u8; 16]) -> Option<Self> {
        let separators = b"()<>@,;:\\\"/[]?={} \t";
        let is_token = !name.is_empty() && name.bytes().all(|b| b.is_ascii_graphic() && !separators.contains(&b));
        let [low, high] = [0, 8].map(|from| secret[from..from + 8].iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)));
        is_token.then(|| Self {
            name: name.into(),
            attributes: "; Path=/; HttpOnly; SameSite=Lax".into(),
            keys: (low, high),
        })
    }

    /// Sends the cookie over encrypted connections only. Default no, because the balancer does not know.
    #[must_use]
    pub fn secure(mut self) -> Self {
        self.attributes.push_str("; Secure");
        self
    }

    /// How long the caller keeps the cookie. By default until its session ends.
    #[must_use]
    pub fn max_age(mut self, age: Duration) -> Self {
        self.attributes.push_str(&format!("; Max-Age={}", age.as_secs()));
        self
    }

    /// What the request's cookie says.
    pub(crate) fn read(&self, headers: &HeaderMap) -> Option<Token> {
        cookies(headers, &self.name)
            .filter(|value| value.len() == 32)
            .find_map(|value| Token::from_str_radix(std::str::from_utf8(value).ok()?, 16).ok())
    }

    pub(crate) fn token(&self, endpoint: &Endpoint) -> Token {
        use std::hash::Hasher;
        let mut hasher = SipHasher24::new_with_keys(self.keys.0, self.keys.1);
        for part in [&**endpoint.service(), endpoint.id(), &endpoint.address().to_string()] {
            hasher.write(&(part.len() as u64).to_le_bytes());
            hasher.write(part.as_bytes());
        }
        hasher.finish128().as_u128()
    }

    /// The header that leads the caller back to `endpoint`.
    pub(crate) fn set(&self, endpoint: &Endpoint) -> Option<HeaderValue> {
        HeaderValue::try_from(format!("{}={:032x}{}", self.name, self.token(endpoint), self.attributes)).ok()
    }
}

/// The values of the cookies of that name; what other cookies are made of does not matter.
pub(crate) fn cookies<'a>(headers: &'a HeaderMap, name: &str) -> impl Iterator<Item = &'a [u8]> {
    let lines = headers.get_all(header::COOKIE).iter();
    lines.flat_map(|line| line.as_bytes().split(|byte| *byte == b';')).filter_map(move |pair| {
        let (have, value) = pair.trim_ascii().split_at_checked(name.len())?;
        (have == name.as_bytes()).then_some(value)?.strip_prefix(b"=")
    })
}

/// The secret is not shown.
impl fmt::Debug for Sticky {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sticky").field("name", &self.name).finish_non_exhaustive()
    }
}

// === impl Prefer ===

impl Prefer {
    /// Asks for the endpoint of that id.
    #[must_use]
    pub fn endpoint(id: impl Into<Arc<str>>) -> Self {
        Self { id: id.into(), strict: false }
    }

    /// That one or none.
    #[must_use]
    pub const fn strict(mut self) -> Self {
        self.strict = true;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Set;

    fn sticky() -> Sticky {
        Sticky::cookie("at", *b"0123456789abcdef").unwrap()
    }

    #[test]
    fn a_cookie_leads_back_to_its_endpoint() {
        let set = Set::of(&[1; 5]);
        let value = sticky().secure().max_age(Duration::from_secs(60)).set(&set[3]).unwrap();
        let text = value.to_str().unwrap();
        assert!(text.ends_with("; Path=/; HttpOnly; SameSite=Lax; Secure; Max-Age=60"));
        assert!(!text.contains("10.0.0.1") && !text.contains("1003"));
        let cookies = format!("a=b; {}; name=José", text.split(';').next().unwrap());
        let headers = HeaderMap::from_iter([(header::COOKIE, HeaderValue::try_from(cookies).unwrap())]);
        let token = sticky().read(&headers).unwrap();
        assert_eq!(sticky().token(&set[3]), token);
        let other = Sticky::cookie("at", *b"fedcba9876543210").unwrap();
        assert!((0..5).all(|i| other.token(&set[i]) != token), "another secret");
    }

    #[test]
    fn cookies_that_are_none_of_ours_are_not_read() {
        for cookie in
            ["at=", "at=1", "atx=00000000000000000000000000000000", "at=0000000000000000000000000000000g", "é"]
        {
            let headers = HeaderMap::from_iter([(header::COOKIE, HeaderValue::from_bytes(cookie.as_bytes()).unwrap())]);
            assert_eq!(sticky().read(&headers), None, "{cookie}");
        }
    }

    #[test]
    fn names_that_would_break_the_header_are_refused() {
        for name in ["", "a b", "a;b", "a=b", "é", "a\r\nb"] {
            assert!(Sticky::cookie(name, [0; 16]).is_none(), "{name:?}");
        }
    }
}
