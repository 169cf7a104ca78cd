//! What of a request decides where it goes.

use std::sync::Arc;

use http::HeaderName;
use portcullis_core::{Carried, Identity, TrustedProxies, canonical_address};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::pick::Asked;
use crate::sticky::cookies;

/// What of a request decides where it goes, for policies that hash.
///
/// ```
/// use portcullis_balance::HashKey;
///
/// let by_user = HashKey::header(http::header::AUTHORIZATION).or(HashKey::cookie("session")).or(HashKey::path());
/// ```
///
/// A request that has none of it goes anywhere. The hash is XXH3; it is the same in every process.
#[derive(Clone, Debug)]
pub struct HashKey {
    /// The first that is there decides.
    choices: Vec<Vec<Source>>,
}

#[derive(Clone, Debug)]
enum Source {
    Header(HeaderName),
    Cookie(Arc<str>),
    Query(Arc<str>),
    Path,
    ClientAddress(Arc<TrustedProxies>),
    Subject,
    Claim(Arc<str>),
}

// === impl HashKey ===

impl HashKey {
    /// The first value of this header.
    #[must_use]
    pub fn header(name: HeaderName) -> Self {
        Self::of(Source::Header(name))
    }

    /// The value of this cookie.
    #[must_use]
    pub fn cookie(name: impl Into<Arc<str>>) -> Self {
        Self::of(Source::Cookie(name.into()))
    }

    /// The value of this parameter in the target's query, as it stands there.
    #[must_use]
    pub fn query(name: impl Into<Arc<str>>) -> Self {
        Self::of(Source::Query(name.into()))
    }

    /// The target's path, without its query.
    #[must_use]
    pub fn path() -> Self {
        Self::of(Source::Path)
    }

    /// The client's address, as far as `proxies` are believed. There is none without a
    /// [`PeerAddress`](portcullis_core::PeerAddress).
    #[must_use]
    pub fn client_address(proxies: TrustedProxies) -> Self {
        Self::of(Source::ClientAddress(Arc::new(proxies)))
    }

    /// Who is calling: issuer and subject of the [`Identity`].
    #[must_use]
    pub fn subject() -> Self {
        Self::of(Source::Subject)
    }

    /// What the [`Identity`] says here, by the claim's name or as a JSON pointer such as `/org/id`; texts as they are,
    /// anything else as JSON.
    #[must_use]
    pub fn claim(name: impl Into<Arc<str>>) -> Self {
        Self::of(Source::Claim(name.into()))
    }

    /// `other`, when a request does not have this one.
    #[must_use]
    pub fn or(mut self, other: Self) -> Self {
        self.choices.extend(other.choices);
        self
    }

    /// This and `other` together; a request that lacks either has none. Binds tighter than [`or`](Self::or) said before:
    /// each choice on this side is combined with each on the other.
    #[must_use]
    pub fn and(self, other: &Self) -> Self {
        let both = |one: &Vec<Source>| {
            let one = one.clone();
            other.choices.iter().map(move |two| one.iter().chain(two).cloned().collect())
        };
        Self { choices: self.choices.iter().flat_map(both).collect() }
    }

    fn of(source: Source) -> Self {
        Self { choices: vec![vec![source]] }
    }

    /// The hash of what decides; `None` when the request has none of it.
    #[must_use]
    pub fn hash(&self, asked: Asked<'_>) -> Option<u64> {
        self.choices.iter().find_map(|sources| {
            sources.iter().try_fold(0, |seed, source| source.with(asked, |bytes| xxh3_64_with_seed(bytes, seed)))
        })
    }
}

// === impl Source ===

impl Source {
    fn with(&self, asked: Asked<'_>, hash: impl Fn(&[u8]) -> u64) -> Option<u64> {
        match self {
            Self::Header(name) => asked.headers.get(name).map(|value| hash(value.as_bytes())),
            Self::Cookie(name) => cookies(asked.headers, name).next().map(hash),
            Self::Query(name) => {
                let parameter = |pair: &&str| pair.split('=').next() == Some(&**name);
                asked.uri.query()?.split('&').find(parameter).map(|pair| hash(pair.as_bytes()))
            }
            Self::Path => Some(hash(asked.uri.path().as_bytes())),
            Self::ClientAddress(proxies) => {
                match canonical_address(proxies.client_of(asked.extensions, asked.headers)?) {
                    std::net::IpAddr::V4(address) => Some(hash(&address.octets())),
                    std::net::IpAddr::V6(address) => Some(hash(&address.octets())),
                }
            }
            Self::Subject => {
                let identity = Identity::of(asked.extensions)?;
                let issuer = xxh3_64(identity.issuer().unwrap_or_default().as_bytes());
                Some(xxh3_64_with_seed(identity.subject().as_bytes(), hash(&issuer.to_le_bytes())))
            }
            Self::Claim(name) => {
                let claim = Identity::of(asked.extensions)?.claim(name)?;
                Some(claim.as_str().map_or_else(|| hash(claim.to_string().as_bytes()), |text| hash(text.as_bytes())))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Request;
    use portcullis_core::{PeerAddress, Proof};

    fn request() -> Request<()> {
        let mut request = Request::get("http://a/orders?id=7&x=1").header("x-user", "ada").header("cookie", "a=1; b=2");
        PeerAddress(([10, 0, 0, 7], 1).into()).attach(request.extensions_mut().unwrap());
        who("ada").attach(request.extensions_mut().unwrap());
        request.body(()).unwrap()
    }

    fn who(name: &str) -> Identity {
        let serde_json::Value::Object(claims) = serde_json::json!({ "tenant": name, "level": 7 }) else { panic!() };
        Identity::new(name, Proof::Jwt).with_claims(claims)
    }

    fn hash(key: &HashKey, request: &Request<()>) -> Option<u64> {
        key.hash(Asked::of(request))
    }

    #[test]
    fn every_source_tells_requests_apart() {
        let other = {
            let mut request =
                Request::get("http://a/other?id=8&x=1").header("x-user", "bob").header("cookie", "a=2; b=2");
            PeerAddress(([10, 0, 0, 8], 1).into()).attach(request.extensions_mut().unwrap());
            who("bob").attach(request.extensions_mut().unwrap());
            request.body(()).unwrap()
        };
        for key in [
            HashKey::header("x-user".parse().unwrap()),
            HashKey::cookie("a"),
            HashKey::query("id"),
            HashKey::path(),
            HashKey::client_address(TrustedProxies::none()),
            HashKey::subject(),
            HashKey::claim("tenant"),
        ] {
            assert!(hash(&key, &request()).is_some(), "{key:?}");
            assert_eq!(hash(&key, &request()), hash(&key, &request()), "{key:?}");
            assert_ne!(hash(&key, &request()), hash(&key, &other), "{key:?}");
        }
        for same in [HashKey::cookie("b"), HashKey::query("x"), HashKey::claim("level")] {
            assert_eq!(hash(&same, &request()), hash(&same, &other));
        }
    }

    #[test]
    fn the_first_that_is_there_decides_and_both_need_both() {
        let (none, path) = (HashKey::header("x-none".parse().unwrap()), HashKey::path());
        let request = request();
        assert_eq!(hash(&none, &request), None);
        assert_eq!(hash(&none.clone().or(path.clone()), &request), hash(&path, &request));
        assert_eq!(hash(&none.and(&path), &request), None);
        let both = path.clone().and(&HashKey::cookie("a"));
        assert_ne!(hash(&both, &request), hash(&path, &request));
    }
}
