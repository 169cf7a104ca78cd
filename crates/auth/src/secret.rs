//! Secrets that callers show as they are: API keys, and names with passwords.

use std::collections::HashMap;
use std::fmt;
use std::future::Ready;
use std::hash::RandomState;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::hmac;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderName, header};
use portcullis_core::{Clock, Identity, Proof, TrustedProxies};
use subtle::ConstantTimeEq;

use crate::authenticate::{Attempt, Authenticate, Denied, Head, Scheme};
use crate::error::{Error, Kind};
use crate::limit::{FailureLimit, Failures};
use crate::token::authorization;

/// The longest secret that is looked at.
pub const MAX_SECRET_BYTES: usize = 1024;

/// The shortest API key: what cannot be guessed does not need a slow hash.
pub const MIN_API_KEY_BYTES: usize = 16;

/// Accepts callers who show a secret in a header.
///
/// Only keyed hashes of the secrets are kept, under a key of the process, and these are compared in constant time.
/// Secrets must be long and random: they are not slowed down by a password hash.
///
/// ```
/// use portcullis_auth::ApiKey;
/// use portcullis_core::{Identity, Proof};
///
/// let keys = ApiKey::new()?.accept("k3y-of-at-least-16-bytes", Identity::new("cron", Proof::ApiKey))?;
/// # Ok::<(), portcullis_auth::Error>(())
/// ```
#[derive(Clone)]
pub struct ApiKey {
    header: HeaderName,
    secrets: Secrets,
    failures: Failures,
}

/// Accepts callers who show a name and a password ([RFC 7617](https://www.rfc-editor.org/rfc/rfc7617)).
///
/// For a handful of machines and for tests; passwords that people choose belong behind a provider with a slow hash. Only
/// keyed hashes are kept, under a key of the process, and these are compared in constant time.
#[derive(Clone)]
pub struct Basic {
    realm: String,
    secrets: Secrets,
    failures: Failures,
}

/// Secrets by their keyed hash. The hash cannot be chosen by a caller, so that looking it up tells nothing.
#[derive(Clone)]
struct Secrets {
    key: hmac::Key,
    by_hash: HashMap<[u8; 32], Identity, RandomState>,
}

// === impl Secrets ===

impl Secrets {
    fn new() -> Result<Self, Error> {
        let key = hmac::Key::generate(hmac::HMAC_SHA256, &aws_lc_rs::rand::SystemRandom::new());
        let key = key.map_err(|_| Error::new(Kind::Setting, "the system gives no randomness"))?;
        Ok(Self { key, by_hash: HashMap::default() })
    }

    fn hash(&self, secret: &[u8]) -> [u8; 32] {
        let mut hash = [0; 32];
        hash.copy_from_slice(hmac::sign(&self.key, secret).as_ref());
        hash
    }

    fn insert(&mut self, secret: &[u8], identity: Identity) -> Result<(), Error> {
        match self.by_hash.insert(self.hash(secret), identity) {
            None => Ok(()),
            Some(_) => Err(Error::new(Kind::Setting, "two callers have the same secret")),
        }
    }

    fn find(&self, secret: &[u8]) -> Option<&Identity> {
        let hash = self.hash(secret);
        let (have, identity) = self.by_hash.get_key_value(&hash)?;
        bool::from(have.ct_eq(&hash)).then_some(identity)
    }
}

// === impl ApiKey ===

impl ApiKey {
    /// Looks for the secret in `x-api-key`. There are no secrets yet.
    ///
    /// # Errors
    ///
    /// [`Error::is_setting`] when the system gives no randomness.
    pub fn new() -> Result<Self, Error> {
        Ok(Self {
            header: HeaderName::from_static("x-api-key"),
            secrets: Secrets::new()?,
            failures: Failures::default(),
        })
    }

    /// Looks for the secret in another header.
    #[must_use]
    pub fn header(mut self, name: HeaderName) -> Self {
        self.header = name;
        self
    }

    /// Takes who shows `secret` for `identity`.
    ///
    /// # Errors
    ///
    /// [`Error::is_setting`] when the secret has less than [`MIN_API_KEY_BYTES`] or more than [`MAX_SECRET_BYTES`], or
    /// stands for another caller already.
    pub fn accept(mut self, secret: impl AsRef<[u8]>, identity: Identity) -> Result<Self, Error> {
        let secret = secret.as_ref();
        if !(MIN_API_KEY_BYTES..=MAX_SECRET_BYTES).contains(&secret.len()) {
            let wrong = format!("an API key has {MIN_API_KEY_BYTES} to {MAX_SECRET_BYTES} bytes");
            return Err(Error::new(Kind::Setting, wrong));
        }
        self.secrets.insert(secret, identity)?;
        Ok(self)
    }

    /// How many secrets of one client address may be wrong: so many at once, and one more after each `interval`; 100 and
    /// 50 ms by default. What comes after that gets 429 without being looked at, right or wrong. Requests without a
    /// [`PeerAddress`](portcullis_core::PeerAddress) are not limited.
    #[must_use]
    pub fn failures_per_address(mut self, burst: u32, interval: Duration) -> Self {
        self.failures.limit = Arc::new(FailureLimit::new(burst, interval));
        self
    }

    /// Whom to believe about a client's address. Behind a proxy that is not named here all its clients share one limit.
    #[must_use]
    pub fn trusted_proxies(mut self, proxies: TrustedProxies) -> Self {
        self.failures.proxies = proxies;
        self
    }

    /// Tells the time between failures by this clock.
    #[must_use]
    pub fn clock(mut self, clock: Clock) -> Self {
        self.failures.clock = clock;
        self
    }

    fn check(&self, head: &Head<'_>) -> Result<Identity, Denied> {
        let mut fields = head.headers().get_all(&self.header).iter();
        let secret = fields.next().ok_or_else(Denied::missing)?;
        if fields.next().is_some() {
            return Err(Denied::malformed("more than one API key"));
        }
        let secret = Some(secret.as_bytes()).filter(|secret| secret.len() <= MAX_SECRET_BYTES);
        self.failures.judge(head, &self.header, "the API key is not known", || self.secrets.find(secret?).cloned())
    }
}

impl Authenticate for ApiKey {
    type Future = Ready<Result<Identity, Denied>>;

    fn authenticate(&self, head: &Head<'_>) -> Attempt<Self::Future> {
        Attempt::Now(self.check(head))
    }

    fn schemes(&self) -> Vec<Scheme> {
        vec![Scheme::header(self.header.clone())]
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let secrets = self.secrets.by_hash.len();
        f.debug_struct("ApiKey").field("header", &self.header).field("secrets", &secrets).finish()
    }
}

// === impl Basic ===

impl Basic {
    /// Nobody is known yet. `realm` tells people what they are asked a password for.
    ///
    /// # Errors
    ///
    /// [`Error::is_setting`] when the system gives no randomness.
    pub fn new(realm: impl Into<String>) -> Result<Self, Error> {
        Ok(Self { realm: realm.into(), secrets: Secrets::new()?, failures: Failures::default() })
    }

    /// Takes who shows this name and password for the subject of that name.
    ///
    /// # Errors
    ///
    /// [`Error::is_setting`] when the name is empty or has a colon, the password is empty, either has a control character
    /// or both together more than [`MAX_SECRET_BYTES`], or the pair is known already.
    pub fn accept(self, name: &str, password: &str) -> Result<Self, Error> {
        let identity = Identity::new(name, Proof::Basic);
        self.accept_as(name, password, identity)
    }

    /// Takes who shows this name and password for `identity`.
    ///
    /// # Errors
    ///
    /// As [`accept`](Self::accept).
    pub fn accept_as(mut self, name: &str, password: &str, identity: Identity) -> Result<Self, Error> {
        let pair = format!("{name}:{password}");
        let sound = !name.is_empty() && !password.is_empty() && !name.contains(':') && pair.len() <= MAX_SECRET_BYTES;
        if !sound || pair.chars().any(char::is_control) {
            return Err(Error::new(Kind::Setting, "a name or password that cannot be shown"));
        }
        self.secrets.insert(pair.as_bytes(), identity)?;
        Ok(self)
    }

    /// How many passwords of one client address may be wrong: so many at once, and one more after each `interval`; 100 and
    /// 50 ms by default. What comes after that gets 429 without being looked at, right or wrong. Requests without a
    /// [`PeerAddress`](portcullis_core::PeerAddress) are not limited.
    #[must_use]
    pub fn failures_per_address(mut self, burst: u32, interval: Duration) -> Self {
        self.failures.limit = Arc::new(FailureLimit::new(burst, interval));
        self
    }

    /// Whom to believe about a client's address. Behind a proxy that is not named here all its clients share one limit.
    #[must_use]
    pub fn trusted_proxies(mut self, proxies: TrustedProxies) -> Self {
        self.failures.proxies = proxies;
        self
    }

    /// Tells the time between failures by this clock.
    #[must_use]
    pub fn clock(mut self, clock: Clock) -> Self {
        self.failures.clock = clock;
        self
    }

    fn check(&self, head: &Head<'_>) -> Result<Identity, Denied> {
        let encoded = authorization(head, b"basic")?;
        let unknown = "the name or password is wrong";
        if encoded.len() > MAX_SECRET_BYTES * 2 {
            return Err(Denied::invalid(unknown));
        }
        let pair = STANDARD.decode(encoded).map_err(|_| Denied::malformed("the credentials are not base64"))?;
        self.failures.judge(head, &header::AUTHORIZATION, unknown, || self.secrets.find(&pair).cloned())
    }
}

impl Authenticate for Basic {
    type Future = Ready<Result<Identity, Denied>>;

    fn authenticate(&self, head: &Head<'_>) -> Attempt<Self::Future> {
        Attempt::Now(self.check(head))
    }

    fn schemes(&self) -> Vec<Scheme> {
        vec![Scheme::basic(&self.realm)]
    }
}

impl fmt::Debug for Basic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let secrets = self.secrets.by_hash.len();
        f.debug_struct("Basic").field("realm", &self.realm).field("secrets", &secrets).finish()
    }
}
