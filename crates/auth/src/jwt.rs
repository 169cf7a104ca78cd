//! Signed tokens as proof: from the header to the identity.

use std::fmt;
use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use aws_lc_rs::digest;
use bytes::Bytes;
use portcullis_core::{Carried, Clock, Identity, PeerTls, TrustedProxies, WallClock};
use subtle::ConstantTimeEq;

use crate::authenticate::{Attempt, Authenticate, Denied, Head};
use crate::cache::{CacheStats, Tag, TokenCache};
use crate::claims::{Believed, MAX_LEEWAY, OTHER_ISSUER, Rules};
use crate::error::{Error, Kind};
use crate::key::Key;
use crate::key_set::{KeySet, Lookup};
use crate::limit::{FailureLimit, Failures, Paid};
use crate::token::{self, Token};

/// The longest token that is looked at, unless said otherwise.
pub const DEFAULT_MAX_TOKEN_BYTES: usize = 8 * 1024;

/// How much memory tokens that verified may take up, unless said otherwise.
pub const DEFAULT_CACHE_BYTES: usize = 8 << 20;

/// Accepts callers with a signed JSON Web Token ([RFC 7519](https://www.rfc-editor.org/rfc/rfc7519)) in `Authorization:
/// Bearer`.
///
/// The token is read strictly, its signature checked with the key its issuer's [`KeySet`] has for it, and its claims
/// checked by the rules set here. Everything it claims becomes the [`Identity`]: `sub`, `iss`, `scope` or `scp`, `roles`.
///
/// ```
/// use portcullis_auth::{Algorithm, Jwt, KeySet};
///
/// let keys = KeySet::hmac(Algorithm::HS256, "a secret of at least 32 bytes ...")?;
/// let jwt = Jwt::new(keys).issuer("https://id.example.com/").audience("orders");
/// # Ok::<(), portcullis_auth::Error>(())
/// ```
#[derive(Clone)]
pub struct Jwt(Arc<Inner>);

#[derive(Clone)]
struct Inner {
    first: Provider,
    others: Vec<Provider>,
    max_token_bytes: usize,
    wall: WallClock,
    cache: Option<Arc<TokenCache>>,
    failures: Failures,
    /// Told apart from every other set of rules in the process, so that no cache mixes them up.
    version: u64,
}

/// One issuer: its keys, and the rules for its tokens.
#[derive(Clone)]
struct Provider {
    keys: KeySet,
    rules: Rules,
}

/// The answer of a [`Jwt`] that waits for keys.
pub struct Verifying(Pin<Box<dyn Future<Output = Result<Identity, Denied>> + Send>>);

// === impl Jwt ===

impl Jwt {
    /// Tokens signed with one of `keys`.
    ///
    /// Set an [issuer](Self::issuer) and an [audience](Self::audience): without them every token these keys ever signed is
    /// accepted, save those that name an audience.
    #[must_use]
    pub fn new(keys: KeySet) -> Self {
        Self(Arc::new(Inner {
            first: Provider { keys, rules: Rules::default() },
            others: Vec::new(),
            max_token_bytes: DEFAULT_MAX_TOKEN_BYTES,
            wall: WallClock::system(),
            cache: TokenCache::new(DEFAULT_CACHE_BYTES).map(Arc::new),
            failures: Failures::default(),
            version: next_version(),
        }))
    }

    /// Wants `iss` to be exactly this.
    #[must_use]
    pub fn issuer(self, issuer: impl Into<String>) -> Self {
        self.rule(|rules| rules.issuer = Some(issuer.into()))
    }

    /// Wants `aud` to name this service; called again, one of several names.
    #[must_use]
    pub fn audience(self, audience: impl Into<String>) -> Self {
        self.rule(|rules| rules.audiences.push(audience.into()))
    }

    /// How far the issuer's clock may be off, for `exp`, `nbf` and `iat`; 60 s by default, at most [`MAX_LEEWAY`].
    #[must_use]
    pub fn leeway(self, leeway: Duration) -> Self {
        self.rule(|rules| rules.leeway = leeway.min(MAX_LEEWAY))
    }

    /// Refuses tokens issued (`iat`) longer ago than this and the [leeway](Self::leeway), whatever their `exp`, and tokens that
    /// do not say when. By default none is too old.
    #[must_use]
    pub fn max_age(self, age: Duration) -> Self {
        self.rule(|rules| rules.max_age = Some(age))
    }

    /// Wants the header's `typ` to be this, with or without `application/` before it; called again, one of several.
    /// Without, a token may leave it out, or be `JWT` or `at+jwt`.
    #[must_use]
    pub fn typ(self, typ: impl Into<String>) -> Self {
        self.rule(|rules| rules.types.push(typ.into()))
    }

    /// Wants access tokens as [RFC 9068](https://www.rfc-editor.org/rfc/rfc9068) has them: typed `at+jwt`, with `iss`,
    /// `exp`, `aud`, `sub`, `client_id`, `iat` and `jti`.
    #[must_use]
    pub fn access_tokens_only(self) -> Self {
        self.rule(|rules| {
            rules.access_tokens_only = true;
            rules.expiry_optional = false;
            rules.required.extend(["iss", "exp", "aud", "sub", "client_id", "iat", "jti"].map(str::to_owned));
        })
    }

    /// Wants this claim to be there: by its name, or as a JSON pointer such as `/org/id`.
    #[must_use]
    pub fn require(self, claim: impl Into<String>) -> Self {
        self.rule(|rules| rules.required.push(claim.into()))
    }

    /// Takes the subject from another claim than `sub`, given as a JSON pointer such as `/client_id`.
    #[must_use]
    pub fn subject_from(self, pointer: impl Into<String>) -> Self {
        self.rule(|rules| rules.subject = pointer.into())
    }

    /// Takes the roles from another claim than `roles`, given as a JSON pointer such as `/realm_access/roles`.
    #[must_use]
    pub fn roles_from(self, pointer: impl Into<String>) -> Self {
        self.rule(|rules| rules.roles = pointer.into())
    }

    /// Accepts tokens without `exp`. They are good for as long as their key is.
    #[must_use]
    pub fn insecure_without_expiry(self) -> Self {
        self.rule(|rules| rules.expiry_optional = true)
    }

    /// Accepts the tokens of another issuer as well, by that issuer's rules and keys alone. The other's settings that
    /// concern no issuer, such as its clock, are dropped.
    ///
    /// # Errors
    ///
    /// [`Error::is_setting`] when either has no [issuer](Self::issuer), or both have the same.
    pub fn also(mut self, other: Self) -> Result<Self, Error> {
        let inner = Arc::make_mut(&mut self.0);
        inner.version = next_version();
        let Inner { first, others, .. } = Arc::unwrap_or_clone(other.0);
        inner.others.push(first);
        inner.others.extend(others);
        let issuers: Vec<_> = inner.providers().map(|provider| provider.rules.issuer.as_deref()).collect();
        for (index, issuer) in issuers.iter().enumerate() {
            if issuer.is_none() {
                return Err(Error::new(Kind::Setting, "one of several issuers has no name"));
            }
            if issuers[..index].contains(issuer) {
                return Err(Error::new(Kind::Setting, "two issuers have the same name"));
            }
        }
        Ok(self)
    }

    /// The longest token that is looked at; 8 KiB by default.
    #[must_use]
    pub fn max_token_bytes(self, bytes: usize) -> Self {
        self.change(|inner| inner.max_token_bytes = bytes)
    }

    /// How much memory tokens that verified may take up; 8 MiB by default. With zero each request verifies anew.
    #[must_use]
    pub fn cache_bytes(self, bytes: usize) -> Self {
        self.change(|inner| inner.cache = TokenCache::new(bytes).map(Arc::new))
    }

    /// The keys of its first issuer.
    #[must_use]
    pub fn keys(&self) -> &KeySet {
        &self.0.first.keys
    }

    /// How the memory of tokens that verified does; `None` without one.
    #[must_use]
    pub fn cache_stats(&self) -> Option<CacheStats> {
        self.0.cache.as_ref().map(|cache| cache.stats())
    }

    /// How many tokens of one client address may fail to verify: so many at once, and one more after each `interval`; 100
    /// and 50 ms by default. Further ones that were not verified before get 429 without being looked at; tokens that
    /// verify cost nothing. Requests without a [`PeerAddress`](portcullis_core::PeerAddress) are not limited.
    #[must_use]
    pub fn failures_per_address(self, burst: u32, interval: Duration) -> Self {
        self.change(|inner| inner.failures.limit = Arc::new(FailureLimit::new(burst, interval)))
    }

    /// Whom to believe about a client's address. Behind a proxy that is not named here all its clients share one limit.
    #[must_use]
    pub fn trusted_proxies(self, proxies: TrustedProxies) -> Self {
        self.change(|inner| inner.failures.proxies = proxies)
    }

    /// Tells the time of day by this clock.
    #[must_use]
    pub fn wall_clock(self, clock: WallClock) -> Self {
        self.change(|inner| inner.wall = clock)
    }

    /// Tells the time between failures by this clock.
    #[must_use]
    pub fn clock(self, clock: Clock) -> Self {
        self.change(|inner| inner.failures.clock = clock)
    }

    fn rule(self, change: impl FnOnce(&mut Rules)) -> Self {
        self.change(|inner| change(&mut inner.first.rules))
    }

    fn change(mut self, change: impl FnOnce(&mut Inner)) -> Self {
        let inner = Arc::make_mut(&mut self.0);
        change(inner);
        inner.version = next_version();
        self
    }
}

fn next_version() -> u64 {
    static VERSION: AtomicU64 = AtomicU64::new(0);
    VERSION.fetch_add(1, Ordering::Relaxed)
}

impl Authenticate for Jwt {
    type Future = Verifying;

    fn authenticate(&self, head: &Head<'_>) -> Attempt<Verifying> {
        let token = match token::bearer(head) {
            Ok(token) if token.len() <= self.0.max_token_bytes => token,
            Ok(_) => return Attempt::Now(Err(Denied::invalid("the token is too long"))),
            Err(denied) => return Attempt::Now(Err(denied)),
        };
        let now = self.0.wall.since_epoch();
        let tag = match &self.0.cache {
            Some(cache) if token::may_be_one(token) => cache.tag(self.0.version, token),
            _ => None,
        };
        if let (Some(cache), Some(tag)) = (&self.0.cache, tag)
            && let Some((identity, certificate)) = cache.find(tag, now)
        {
            let bound = certificate.map_or(Ok(()), |bound| check_certificate(&bound, head));
            return Attempt::Now(bound.map(|()| identity));
        }
        let client = Client {
            address: self.0.failures.address(head),
            certificate: PeerTls::of(head.extensions()).and_then(|tls| tls.certificates().first()).cloned(),
        };
        match self.0.verify(token, tag, &client, now) {
            Ok(identity) => Attempt::Now(Ok(identity)),
            Err(Failure::Denied(denied)) => Attempt::Now(Err(denied)),
            Err(Failure::Unknown { asking: Some(asking), .. }) => {
                let (inner, token) = (self.0.clone(), token.to_vec());
                Attempt::Later(Verifying(Box::pin(async move {
                    let in_time = asking.await;
                    let now = inner.wall.since_epoch();
                    inner.verify(&token, tag, &client, now).map_err(|failure| match failure {
                        // Nobody knows yet: the key may well be there.
                        Failure::Unknown { asking, .. } if !in_time => {
                            Failure::Unknown { asking, blind: true }.into_denied()
                        }
                        failure => failure.into_denied(),
                    })
                })))
            }
            Err(unknown @ Failure::Unknown { .. }) => Attempt::Now(Err(unknown.into_denied())),
        }
    }
}

/// What is known of the caller apart from the token.
struct Client {
    address: Option<IpAddr>,
    certificate: Option<Bytes>,
}

/// Why a token did not verify.
enum Failure {
    Denied(Denied),
    /// The key is not in the set, and there may be something to wait for.
    Unknown {
        asking: Option<Pin<Box<dyn Future<Output = bool> + Send>>>,
        blind: bool,
    },
}

impl Failure {
    fn into_denied(self) -> Denied {
        match self {
            Self::Denied(denied) => denied,
            Self::Unknown { blind: true, .. } => Denied::unavailable("the issuer's keys are not available"),
            Self::Unknown { .. } => Denied::invalid("the token is signed with an unknown key"),
        }
    }
}

impl From<Denied> for Failure {
    fn from(denied: Denied) -> Self {
        Self::Denied(denied)
    }
}

impl Inner {
    fn providers(&self) -> impl Iterator<Item = &Provider> {
        std::iter::once(&self.first).chain(&self.others)
    }

    fn verify(&self, bytes: &[u8], tag: Option<Tag>, client: &Client, now: Duration) -> Result<Identity, Failure> {
        let token = Token::parse(bytes)?;
        // Among several issuers the token has to say whose it is before it is believed; what it says only chooses.
        let is_chosen = !self.others.is_empty();
        let provider = if is_chosen {
            let issuer = token.issuer()?.ok_or_else(|| Denied::invalid("the token does not say who issued it"))?;
            let provider = self.providers().find(|provider| provider.rules.issuer.as_ref() == Some(&issuer));
            provider.ok_or_else(|| Denied::invalid(OTHER_ISSUER))?
        } else {
            &self.first
        };
        let key = match provider.keys.find(token.kid.as_deref(), token.algorithm) {
            Lookup::Found(key) => key,
            Lookup::Ambiguous => return Err(Denied::invalid("the token does not say which key signed it").into()),
            Lookup::Unknown => {
                // Another issuer's token is no reason to ask this one's provider, nor to wait for it.
                if !is_chosen
                    && provider.keys.is_kept_fresh()
                    && let Some(issuer) = &provider.rules.issuer
                    && token.issuer()?.as_ref() != Some(issuer)
                {
                    return Err(Denied::invalid(OTHER_ISSUER).into());
                }
                let asking = provider.keys.asking(token.kid.as_deref());
                let asking = asking.map(|asking| Box::pin(asking) as Pin<Box<dyn Future<Output = bool> + Send>>);
                return Err(Failure::Unknown { asking, blind: provider.keys.is_blind() });
            }
        };
        let paid = self.failures.take(client.address)?;
        match self.believe(&token, key, provider, tag, client, now) {
            // Only now: an expired token, or one bound to another certificate, would buy signatures as well as garbage does.
            Ok(identity) => {
                paid.into_iter().for_each(Paid::take_back);
                Ok(identity)
            }
            Err(denied) => Err(denied.paid(paid).into()),
        }
    }

    /// Verifies a token by this key of its provider.
    fn believe(
        &self,
        token: &Token<'_>,
        key: Arc<Key>,
        provider: &Provider,
        tag: Option<Tag>,
        client: &Client,
        now: Duration,
    ) -> Result<Identity, Denied> {
        let signed = token.decode()?;
        if !key.verifies(signed.message, &signed.signature) {
            return Err(Denied::invalid("the token's signature does not hold"));
        }
        let claims = signed.claims()?;
        let Believed { identity, until, certificate } = provider.rules.check(token.typ.as_deref(), claims, now)?;
        if let (Some(cache), Some(tag), Some(until)) = (&self.cache, tag, until) {
            cache.insert(tag, identity.clone(), certificate, until, key, now);
        }
        if let Some(bound) = certificate {
            check_thumbprint(&bound, client.certificate.as_ref())?;
        }
        Ok(identity)
    }
}

fn check_certificate(bound: &[u8; 32], head: &Head<'_>) -> Result<(), Denied> {
    check_thumbprint(bound, PeerTls::of(head.extensions()).and_then(|tls| tls.certificates().first()))
}

/// Whether the connection's certificate is the one a token is bound to.
fn check_thumbprint(bound: &[u8; 32], certificate: Option<&Bytes>) -> Result<(), Denied> {
    let shown = certificate.map(|certificate| digest::digest(&digest::SHA256, certificate));
    match shown {
        Some(shown) if bool::from(shown.as_ref().ct_eq(bound)) => Ok(()),
        _ => Err(Denied::invalid("the token is bound to another certificate")),
    }
}

impl fmt::Debug for Jwt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rules: Vec<_> = self.0.providers().map(|provider| &provider.rules).collect();
        f.debug_struct("Jwt").field("rules", &rules).finish_non_exhaustive()
    }
}

// === impl Verifying ===

impl Future for Verifying {
    type Output = Result<Identity, Denied>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx)
    }
}

impl fmt::Debug for Verifying {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Verifying")
    }
}
