//! How callers prove who they are.

use http::HeaderName;

use super::mistake::Notes;
use super::plain::Map;
use super::provider::Provider;
use super::read::At;
use super::section::{section, shorthand, words};

section! {
    /// How callers prove who they are.
    pub struct Auth {
        /// Ways to prove it, by name.
        providers: Map<At<Provider>>,
        /// What is asked of callers where a route says nothing. "required" if there is a provider, else "none".
        default: Option<At<AuthMode>>,
        /// The realm in challenges; by default none for tokens, and "portcullis" for passwords.
        realm: Option<String>,
        /// Where callers learn how to get a token (RFC 9728).
        resource_metadata: Option<String>,
        /// Passes tokens and keys on to the services. By default they are taken out once they were accepted; where nobody is
        /// asked (`auth = "none"`, preflights that are let pass) they pass as they came.
        forward_credentials: bool = false,
        /// Lets CORS preflights pass to services, which browsers send without credentials. Routes with `cors` answer them
        /// by themselves.
        preflight: bool = false,
        /// Headers in which services are told who is calling. Callers cannot set them.
        headers: IdentityHeaders,
    }
}

section! {
    /// Headers in which services are told who is calling.
    pub struct IdentityHeaders {
        /// The subject.
        subject: Option<HeaderName>,
        /// Who vouches for it.
        issuer: Option<HeaderName>,
        /// The scopes, with a space between them.
        scopes: Option<HeaderName>,
        /// The roles, with a comma between them.
        roles: Option<HeaderName>,
        /// Claims, by header: by name, or where in a token they are, such as x-tenant = "/org/tenant".
        claims: Map<String>,
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
        /// What claims must be, or hold if they are lists: by name, or where in the token they are, such as "/org/id".
        claims: Map<String>,
    }
}

impl IdentityHeaders {
    pub(crate) fn says_something(&self) -> bool {
        let Self { subject, issuer, scopes, roles, claims } = self;
        [subject, issuer, scopes, roles].into_iter().any(Option::is_some) || !claims.is_empty()
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
        for name in self.headers.claims.keys() {
            if name.parse::<HeaderName>().is_err() {
                notes.push(
                    &(0..0),
                    format!("{name:?} in auth.headers.claims is no name of a header"),
                    "such as \"x-tenant\"",
                );
            }
        }
        self.providers.iter().for_each(|(name, provider)| provider.check(name, &provider.span, notes));
    }
}
