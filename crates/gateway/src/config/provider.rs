//! Ways to prove who one is.

use std::ops::Range;
use std::time::Duration;

use http::HeaderName;

use super::mistake::{Notes, help};
use super::plain::{Bytes, Rate};
use super::read::At;
use super::secret::{Blob, Secret, pem};
use super::section::{section, words};

section! {
    /// A way to prove who one is: signed tokens (JWT), API keys, names with passwords, or client certificates. Several ways
    /// are several providers: whoever one of them accepts is accepted.
    pub struct Provider {
        /// Tokens: a shared secret, at least as long as the hash; HS256 and so 32 bytes, unless `algorithm` says otherwise.
        secret: Option<At<Secret>>,
        /// Tokens: a public key, as PEM; needs `algorithm`.
        public_key: Option<At<Blob>>,
        /// Tokens: a set of keys, as a file (JWKS).
        jwks: Option<At<Blob>>,
        /// Tokens: a set of keys at a URL, fetched again when needed.
        jwks_url: Option<At<String>>,
        /// Tokens: finds the keys by the issuer's /.well-known/openid-configuration.
        discover: Option<At<bool>>,
        /// API keys, in the header `header`.
        api_keys: Vec<At<ApiKey>>,
        /// Names with passwords (Basic).
        users: Vec<At<User>>,
        /// Client certificates; the listener must have a `client_ca`.
        certificates: Vec<At<Certificate>>,
        /// The header with the API key.
        header: HeaderName = HeaderName::from_static("x-api-key"),
        /// Authorities of the server the keys are fetched from, as PEM, instead of the system's.
        ca: Option<At<Blob>>,
        /// Hosts that may have the keys besides the issuer's, with `discover`.
        allow_hosts: Vec<String>,
        /// How long keys are used while they cannot be fetched; "1d" by default.
        max_stale: Option<Duration>,
        /// How soon keys may be fetched again for the sake of a key that nobody knows; "30s" by default.
        cooldown: Option<Duration>,
        /// Fetches keys over `http` as well: whoever is on the way decides whom this gateway believes.
        insecure_http: bool = false,
        /// The algorithm that goes with `secret` or `public_key`, such as "ES256".
        algorithm: Option<At<String>>,
        /// Who must have issued a token.
        issuer: Option<String>,
        /// Whom a token must be for; one of these.
        audiences: Vec<String>,
        /// What a token's `typ` must be; by default it has none, or says that it is a JWT or an access token.
        typ: Option<String>,
        /// Takes access tokens only (RFC 9068), so that nobody comes with an ID token.
        access_tokens_only: bool = false,
        /// How old a token may be, `leeway` aside, however long it is good for; one that does not say (`iat`) is refused.
        max_age: Option<Duration>,
        /// The claim with the caller's name, or where in a token it is; "sub" by default.
        subject_from: Option<String>,
        /// The claim with the roles, or where in a token they are, such as "/realm_access/roles".
        roles_from: Option<String>,
        /// Claims that must be there: by name, or where in a token they are, such as "/org/id".
        require: Vec<String>,
        /// Takes tokens that never expire as well.
        insecure_without_expiry: bool = false,
        /// The longest token that is looked at; 8 KiB by default.
        max_token: Option<Bytes>,
        /// How far clocks may be apart; "60s" by default, "5m" at most.
        leeway: Option<Duration>,
        /// How much memory remembers tokens that verified; 8 MiB by default, 0 remembers none.
        cache: Option<Bytes>,
        /// How many proofs of one address may be wrong; "100/5s" by default.
        failures: Option<Rate>,
    }
}

section! {
    /// A caller with an API key.
    pub struct ApiKey {
        /// The key: at least 16 bytes.
        key: At<Secret>,
        /// Who the caller is.
        subject: String,
        /// What the caller was granted.
        scopes: Vec<String>,
        /// What the caller's roles are.
        roles: Vec<String>,
    }
}

section! {
    /// A caller with a password.
    pub struct User {
        /// Who the caller is.
        name: String,
        /// The password.
        password: At<Secret>,
        /// What the caller was granted.
        scopes: Vec<String>,
        /// What the caller's roles are.
        roles: Vec<String>,
    }
}

section! {
    /// A caller with a certificate.
    pub struct Certificate {
        /// Its SHA-256 fingerprint, as `openssl x509 -noout -fingerprint -sha256` prints it after the =.
        fingerprint: At<String>,
        /// Who the caller is.
        subject: String,
        /// What the caller was granted.
        scopes: Vec<String>,
        /// What the caller's roles are.
        roles: Vec<String>,
    }
}

words! {
    /// What callers show.
    pub enum Shown {
        /// A signed token.
        Token = "token",
        /// An API key.
        ApiKey = "api key",
        /// A name with a password.
        Password = "password",
        /// A certificate.
        Certificate = "certificate",
    }
}

const WAYS: &str = "secret, public_key, jwks, jwks_url, discover, api_keys, users, certificates";

impl Provider {
    /// What its callers show.
    #[must_use]
    pub fn shown(&self) -> Shown {
        match (self.api_keys.is_empty(), self.users.is_empty(), self.certificates.is_empty()) {
            (false, ..) => Shown::ApiKey,
            (_, false, _) => Shown::Password,
            (.., false) => Shown::Certificate,
            (true, true, true) => Shown::Token,
        }
    }

    /// Whether it finds its keys by its issuer.
    #[must_use]
    pub fn discovers(&self) -> bool {
        self.discover.as_ref().is_some_and(|discover| **discover)
    }

    /// Whether both fetch the same keys in the same way.
    pub(crate) fn fetches_as(&self, other: &Self) -> bool {
        let place = |one: &Self| (one.jwks_url.clone(), one.discovers(), one.discovers().then(|| one.issuer.clone()));
        let way = |one: &Self| (one.max_stale, one.cooldown, one.insecure_http);
        (place(self), way(self)) == (place(other), way(other))
            && (&self.ca, &self.allow_hosts) == (&other.ca, &other.allow_hosts)
    }

    /// Where it says what its callers show.
    fn ways(&self) -> impl Iterator<Item = &Range<usize>> {
        let keys = [
            self.secret.as_ref().map(|at| &at.span),
            self.public_key.as_ref().map(|at| &at.span),
            self.jwks.as_ref().map(|at| &at.span),
            self.jwks_url.as_ref().map(|at| &at.span),
            self.discover.as_ref().filter(|discover| ***discover).map(|at| &at.span),
            self.api_keys.first().map(|at| &at.span),
            self.users.first().map(|at| &at.span),
            self.certificates.first().map(|at| &at.span),
        ];
        keys.into_iter().flatten()
    }

    /// Notes what belongs to another way of proving who one is, and is not looked at here.
    fn check_kind(&self, span: &Range<usize>, notes: &mut Notes<'_>) {
        let shown = self.shown();
        let is_token = shown == Shown::Token;
        let is_fetched = is_token && (self.jwks_url.is_some() || self.discovers());
        let (token, fetched) = ((is_token, "tokens"), (is_fetched, "keys that are fetched"));
        let keys = [
            ("header", self.header != "x-api-key", (shown == Shown::ApiKey, "API keys")),
            ("failures", self.failures.is_some(), (shown != Shown::Certificate, "what could be guessed")),
            ("ca", self.ca.is_some(), fetched),
            ("allow_hosts", !self.allow_hosts.is_empty(), (is_fetched && self.discovers(), "keys that are discovered")),
            ("max_stale", self.max_stale.is_some(), fetched),
            ("cooldown", self.cooldown.is_some(), fetched),
            ("insecure_http", self.insecure_http, fetched),
            (
                "algorithm",
                self.algorithm.is_some(),
                (self.secret.is_some() || self.public_key.is_some(), "a secret or a public_key"),
            ),
            ("issuer", self.issuer.is_some(), token),
            ("audiences", !self.audiences.is_empty(), token),
            ("typ", self.typ.is_some(), token),
            ("access_tokens_only", self.access_tokens_only, token),
            ("max_age", self.max_age.is_some(), token),
            ("subject_from", self.subject_from.is_some(), token),
            ("roles_from", self.roles_from.is_some(), token),
            ("require", !self.require.is_empty(), token),
            ("insecure_without_expiry", self.insecure_without_expiry, token),
            ("max_token", self.max_token.is_some(), token),
            ("leeway", self.leeway.is_some(), token),
            ("cache", self.cache.is_some(), token),
        ];
        for (key, _, (_, of)) in keys.into_iter().filter(|(_, said, (belongs, _))| *said && !belongs) {
            notes.push(span, format!("{key} is for {of}, which this provider does not take"), "remove it");
        }
    }

    pub(super) fn check(&self, name: &str, span: &Range<usize>, notes: &mut Notes<'_>) {
        let mut ways = self.ways();
        match (ways.next(), ways.next()) {
            (None, _) => notes.push(span, format!("the provider {name:?} has no key"), format!("add one of {WAYS}")),
            (Some(_), Some(second)) => {
                notes.push(second, "two things that callers could show", "make two providers of them");
            }
            (Some(_), None) => {}
        }
        if self.discovers() && self.issuer.is_none() {
            notes.push(span, "not said whose keys", "add issuer = \"https://issuer.example\"");
        }
        if let Some(ca) = &self.ca {
            pem(ca, "CERTIFICATE", notes);
        }
        match (&self.algorithm, &self.public_key) {
            (None, Some(key)) => {
                notes.push(&key.span, "not said which algorithm goes with the key", "add algorithm = \"ES256\"");
            }
            (Some(algorithm), _) if portcullis::auth::Algorithm::from_name(algorithm).is_none() => {
                let known = [
                    "HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384",
                    "ES512", "EdDSA", "Ed25519",
                ];
                notes.push(&algorithm.span, format!("no algorithm {:?}", **algorithm), help(algorithm, known));
            }
            _ => {}
        }
        self.check_kind(span, notes);
        if let Err(error) = crate::build::Known::by(self, "realm") {
            notes.push(self.ways().next().unwrap_or(span), error, "");
        }
    }
}
