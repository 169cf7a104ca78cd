//! How callers prove who they are.

use std::ops::Range;
use std::time::Duration;

use super::mistake::{Notes, help};
use super::plain::Map;
use super::read::At;
use super::secret::{Blob, Secret, pem};
use super::section::{section, shorthand, words};

section! {
    /// How callers prove who they are.
    pub struct Auth {
        /// Ways to prove it, by name.
        providers: Map<At<Provider>>,
        /// What is asked of callers where a route says nothing. "required" if there is a provider, else "none".
        default: Option<At<AuthMode>>,
        /// The realm in challenges.
        realm: Option<String>,
    }
}

words! {
    /// Whether callers must prove who they are.
    pub enum AuthMode {
        /// They must.
        Required = "required",
        /// They may.
        Optional = "optional",
        /// They are not asked.
        None = "none",
    }
}

section! {
    /// A way to prove who one is: signed tokens (JWT).
    pub struct Provider {
        /// A shared secret; HS256, unless `algorithm` says otherwise.
        secret: Option<At<Secret>>,
        /// A public key, as PEM; needs `algorithm`.
        public_key: Option<At<Blob>>,
        /// A set of keys, as a file (JWKS).
        jwks: Option<At<Blob>>,
        /// A set of keys at a URL, fetched again when needed.
        jwks_url: Option<At<String>>,
        /// Authorities of the server at `jwks_url`, as PEM, instead of the system's.
        ca: Option<At<Blob>>,
        /// The algorithm that goes with `secret` or `public_key`, such as "ES256".
        algorithm: Option<At<String>>,
        /// Who must have issued a token.
        issuer: Option<String>,
        /// Whom a token must be for; one of these.
        audiences: Vec<String>,
        /// Where in a token the roles are, such as "/realm_access/roles".
        roles_from: Option<String>,
        /// Claims that must be there.
        require: Vec<String>,
        /// How far clocks may be apart.
        leeway: Option<Duration>,
    }
}

shorthand! {
    /// What is asked of callers: a word, or a table that says more.
    pub struct RouteAuth(RouteAuthTable);
    AuthMode, |mode| RouteAuthTable { mode, ..RouteAuthTable::absent()? }
}

section! {
    /// What is asked of callers.
    pub struct RouteAuthTable {
        /// Whether they must prove who they are.
        mode: AuthMode = AuthMode::Required,
        /// Which providers are believed; all, by default.
        providers: Vec<At<String>>,
        /// Scopes a token must all have.
        scopes: Vec<String>,
        /// Scopes of which a token must have one.
        any_scope: Vec<String>,
        /// Roles a caller must all have.
        roles: Vec<String>,
        /// Roles of which a caller must have one.
        any_role: Vec<String>,
    }
}

impl Auth {
    pub(super) fn check(&self, notes: &mut Notes<'_>) {
        if let Some(mode) = self.default.as_ref().filter(|mode| ***mode != AuthMode::None)
            && self.providers.is_empty()
        {
            notes.push(
                &mode.span,
                "callers are asked who they are, and there is no way to tell",
                "add [auth.providers.<name>]",
            );
        }
        self.providers.iter().for_each(|(name, provider)| provider.check(name, &provider.span, notes));
    }
}

impl Provider {
    pub(super) fn check(&self, name: &str, span: &Range<usize>, notes: &mut Notes<'_>) {
        let keys = [
            self.secret.as_ref().map(|at| &at.span),
            self.public_key.as_ref().map(|at| &at.span),
            self.jwks.as_ref().map(|at| &at.span),
            self.jwks_url.as_ref().map(|at| &at.span),
        ];
        let mut keys = keys.into_iter().flatten();
        match (keys.next(), keys.next()) {
            (None, _) => {
                let what = format!("the provider {name:?} has no key");
                notes.push(span, what, "add one of secret, public_key, jwks, jwks_url");
            }
            (Some(_), Some(second)) => {
                notes.push(second, "more than one source of keys", "keep one of secret, public_key, jwks, jwks_url");
            }
            (Some(_), None) => {}
        }
        if let Some(ca) = &self.ca {
            pem(ca, "CERTIFICATE", notes);
            if self.jwks_url.is_none() {
                notes.push(&ca.span, "there is no server whose authorities they could be", "set jwks_url");
            }
        }
        match (&self.algorithm, &self.public_key) {
            (None, Some(key)) => {
                notes.push(&key.span, "not said which algorithm goes with the key", "add algorithm = \"ES256\"")
            }
            (Some(algorithm), _) if portcullis::auth::Algorithm::from_name(algorithm).is_none() => {
                let known = [
                    "HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384",
                    "EdDSA",
                ];
                notes.push(&algorithm.span, format!("no algorithm {:?}", **algorithm), help(algorithm, known));
            }
            _ => {}
        }
        if let Err(error) = crate::build::keys_of(self) {
            let at = self.secret.as_ref().map(|at| &at.span).or(self.public_key.as_ref().map(|at| &at.span));
            notes.push(at.or(self.jwks.as_ref().map(|at| &at.span)).unwrap_or(span), error, "");
        }
    }
}
