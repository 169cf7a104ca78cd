//! Who is calling: proofs, and what the layer does with them.

use std::collections::BTreeMap;
use std::time::Duration;

use portcullis::auth::{self, Algorithm, ApiKey, AuthLayer, Authenticate, Basic, ClientCertificate, KeySet};
use portcullis::auth::{KeySource, SharedAuthenticate};
use portcullis_core::{Identity, Proof, TrustedProxies};

use super::{Error, Running, policies};
use crate::config::{self, Config, Provider, Shown};

/// A file's proofs, those of before where it says nothing new of them.
#[derive(Default)]
pub(crate) struct Providers {
    all: BTreeMap<String, Proving>,
    /// Whose word about addresses they take.
    trusted: Option<config::TrustedProxies>,
    /// What those who bring passwords are told.
    realm: Option<String>,
}

#[derive(Clone)]
struct Proving {
    config: Provider,
    proof: SharedAuthenticate,
    jwt: Option<auth::Jwt>,
}

/// Whom a provider knows by what the file says of it.
pub(crate) enum Known {
    ApiKeys(ApiKey),
    Passwords(Basic),
    Certificates(ClientCertificate),
    /// Whom tokens speak of; without keys if they are to be fetched.
    Tokens(Option<KeySet>),
}

// === impl Providers ===

impl Providers {
    pub(super) fn build(config: &Config, proxies: &TrustedProxies, before: Option<&Running>) -> Result<Self, Error> {
        let before = before.map(|before| &before.providers);
        let trusted = Some(config.trusted_proxies.clone());
        let realm = config.auth.realm.clone();
        let made_alike = |before: &&Self, provider: &Provider| {
            before.trusted == trusted && (before.realm == realm || provider.shown() != Shown::Password)
        };
        let mut all = BTreeMap::new();
        for (name, provider) in &config.auth.providers {
            let old = before.and_then(|before| before.all.get(name));
            let kept = old.filter(|old| old.config == **provider);
            let proving = match kept.filter(|_| before.is_some_and(|before| made_alike(&before, provider))) {
                Some(kept) => kept.clone(),
                None => Proving::build(provider, config, proxies, old)
                    .map_err(|why| Error::of(format_args!("the provider {name:?}"), why))?,
            };
            all.insert(name.clone(), proving);
        }
        Ok(Self { all, trusted, realm })
    }

    /// The layer, unless there is nobody to believe and no header to keep callers from.
    pub(super) fn layer(&self, config: &Config) -> Result<Option<AuthLayer<SharedAuthenticate>>, Error> {
        let every: Vec<&SharedAuthenticate> = self.all.values().map(|proving| &proving.proof).collect();
        let auth = &config.auth;
        if every.is_empty() && !auth.headers.says_something() {
            return Ok(None);
        }
        let mut layer = AuthLayer::new(policies::ByRoute::new(&every).shared())
            .policy(policies::default_auth(config))
            .forward_credentials(auth.forward_credentials)
            .preflight(auth.preflight)
            .identity_headers(identity_headers(&auth.headers)?);
        if let Some(realm) = &auth.realm {
            layer = layer.realm(realm);
        }
        if let Some(url) = &auth.resource_metadata {
            layer = layer.resource_metadata(url);
        }
        Ok(Some(layer))
    }

    /// Those of these names.
    pub(super) fn named<'a>(&self, names: impl Iterator<Item = &'a str>) -> Vec<&SharedAuthenticate> {
        names.filter_map(|name| self.all.get(name)).map(|proving| &proving.proof).collect()
    }

    /// Those that verify tokens, by name.
    pub(crate) fn tokens(&self) -> impl Iterator<Item = (&str, &auth::Jwt)> {
        self.all.iter().filter_map(|(name, proving)| Some((name.as_str(), proving.jwt.as_ref()?)))
    }
}

fn identity_headers(headers: &config::IdentityHeaders) -> Result<auth::IdentityHeaders, Error> {
    let mut built = auth::IdentityHeaders::new();
    if let Some(name) = &headers.subject {
        built = built.subject(name.clone());
    }
    if let Some(name) = &headers.issuer {
        built = built.issuer(name.clone());
    }
    if let Some(name) = &headers.scopes {
        built = built.scopes(name.clone());
    }
    if let Some(name) = &headers.roles {
        built = built.roles(name.clone());
    }
    for (name, pointer) in &headers.claims {
        built = built.claim(pointing(pointer), policies::header(name)?);
    }
    Ok(built)
}

// === impl Proving ===

impl Proving {
    /// With the keys of `old`, where those are fetched from the same place.
    fn build(
        provider: &Provider,
        config: &Config,
        proxies: &TrustedProxies,
        old: Option<&Self>,
    ) -> Result<Self, String> {
        let realm = config.auth.realm.as_deref().unwrap_or("portcullis");
        let (proof, jwt) = match Known::by(provider, realm)? {
            Known::ApiKeys(keys) => (keys.trusted_proxies(proxies.clone()).shared(), None),
            Known::Passwords(basic) => (basic.trusted_proxies(proxies.clone()).shared(), None),
            Known::Certificates(certificates) => (certificates.shared(), None),
            Known::Tokens(keys) => {
                let old = old.filter(|old| old.config.fetches_as(provider)).and_then(|old| old.jwt.as_ref());
                let keys = keys.or_else(|| old.map(|jwt| jwt.keys().clone()));
                let keys = keys.map_or_else(|| fetched(provider), Ok)?;
                let jwt = jwt(provider, keys, proxies);
                (jwt.clone().shared(), Some(jwt))
            }
        };
        Ok(Self { config: provider.clone(), proof, jwt })
    }
}

// === impl Known ===

impl Known {
    pub(crate) fn by(provider: &Provider, realm: &str) -> Result<Self, String> {
        let known = match provider.shown() {
            Shown::ApiKey => {
                let keys = ApiKey::new().map(|keys| keys.header(provider.header.clone()));
                let accept = |keys: ApiKey, one: &config::At<config::ApiKey>| {
                    keys.accept(one.key.reveal(), identity(&one.subject, Proof::ApiKey, &one.scopes, &one.roles))
                };
                let limit = |keys: ApiKey| match failures(provider) {
                    Some((burst, interval)) => keys.failures_per_address(burst, interval),
                    None => keys,
                };
                keys.and_then(|keys| provider.api_keys.iter().try_fold(keys, accept)).map(limit).map(Self::ApiKeys)
            }
            Shown::Password => {
                let accept = |basic: Basic, one: &config::At<config::User>| {
                    let identity = identity(&one.name, Proof::Basic, &one.scopes, &one.roles);
                    basic.accept_as(&one.name, one.password.reveal(), identity)
                };
                let limit = |basic: Basic| match failures(provider) {
                    Some((burst, interval)) => basic.failures_per_address(burst, interval),
                    None => basic,
                };
                let basic = Basic::new(realm).and_then(|basic| provider.users.iter().try_fold(basic, accept));
                basic.map(limit).map(Self::Passwords)
            }
            Shown::Certificate => {
                let accept = |known: ClientCertificate, one: &config::At<config::Certificate>| {
                    let identity = identity(&one.subject, Proof::ClientCertificate, &one.scopes, &one.roles);
                    known.accept(&one.fingerprint, identity)
                };
                provider.certificates.iter().try_fold(ClientCertificate::new(), accept).map(Self::Certificates)
            }
            Shown::Token => keys(provider).map(Self::Tokens),
        };
        known.map_err(|error| error.to_string())
    }
}

/// Where a claim is: what does not begin with a slash is its name, as elsewhere in the file.
fn pointing(claim: &str) -> String {
    if claim.starts_with('/') { claim.to_owned() } else { format!("/{}", claim.replace('~', "~0").replace('/', "~1")) }
}

/// How many proofs of one address may be wrong at once, and how often one more.
fn failures(provider: &Provider) -> Option<(u32, Duration)> {
    provider.failures.map(|config::Rate { count, period }| (count, period / count.max(1)))
}

fn identity(subject: &str, proof: Proof, scopes: &[String], roles: &[String]) -> Identity {
    Identity::new(subject, proof).with_scopes(scopes.iter().cloned()).with_roles(roles.iter().cloned())
}

/// The keys a provider holds; `None` for those that must be fetched.
fn keys(provider: &Provider) -> Result<Option<KeySet>, auth::Error> {
    let algorithm = |default| {
        let named = provider.algorithm.as_ref().map(|name| Algorithm::from_name(name));
        // What is no algorithm is another mistake's business.
        named.unwrap_or(default).unwrap_or(Algorithm::HS256)
    };
    if let Some(secret) = &provider.secret {
        KeySet::hmac(algorithm(Some(Algorithm::HS256)), secret.reveal()).map(Some)
    } else if let Some(key) = &provider.public_key {
        KeySet::from_pem(algorithm(None), key.bytes()).map(Some)
    } else if let Some(jwks) = &provider.jwks {
        KeySet::from_jwks(jwks.bytes()).map(Some)
    } else {
        Ok(None)
    }
}

/// Keys that somebody else has; they come when they come.
fn fetched(provider: &Provider) -> Result<KeySet, String> {
    let mut source = match (&provider.jwks_url, &provider.issuer) {
        (Some(url), _) => KeySource::url(url.as_str()),
        (None, Some(issuer)) if provider.discovers() => KeySource::issuer(issuer),
        _ => return Err(String::from("no key")),
    };
    for host in &provider.allow_hosts {
        source = source.allow_host(host);
    }
    if let Some(age) = provider.max_stale {
        source = source.max_stale(age);
    }
    if let Some(cooldown) = provider.cooldown {
        source = source.cooldown(cooldown);
    }
    if provider.insecure_http {
        source = source.insecure_http();
    }
    let source = match &provider.ca {
        Some(ca) => source.roots(ca.bytes()),
        None => Ok(source),
    };
    source.and_then(KeySource::start).map_err(|error| error.to_string())
}

fn jwt(provider: &Provider, keys: KeySet, proxies: &TrustedProxies) -> auth::Jwt {
    let mut jwt = auth::Jwt::new(keys).trusted_proxies(proxies.clone());
    if let Some(issuer) = &provider.issuer {
        jwt = jwt.issuer(issuer);
    }
    for audience in &provider.audiences {
        jwt = jwt.audience(audience);
    }
    if let Some(typ) = &provider.typ {
        jwt = jwt.typ(typ);
    }
    if provider.access_tokens_only {
        jwt = jwt.access_tokens_only();
    }
    if provider.insecure_without_expiry {
        jwt = jwt.insecure_without_expiry();
    }
    if let Some(bytes) = provider.max_token {
        jwt = jwt.max_token_bytes(usize::try_from(bytes.0).unwrap_or(usize::MAX));
    }
    if let Some(age) = provider.max_age {
        jwt = jwt.max_age(age);
    }
    if let Some(pointer) = &provider.subject_from {
        jwt = jwt.subject_from(pointing(pointer));
    }
    if let Some(pointer) = &provider.roles_from {
        jwt = jwt.roles_from(pointing(pointer));
    }
    for claim in &provider.require {
        jwt = jwt.require(claim);
    }
    if let Some(leeway) = provider.leeway {
        jwt = jwt.leeway(leeway);
    }
    if let Some(bytes) = provider.cache {
        jwt = jwt.cache_bytes(usize::try_from(bytes.0).unwrap_or(usize::MAX));
    }
    if let Some((burst, interval)) = failures(provider) {
        jwt = jwt.failures_per_address(burst, interval);
    }
    jwt
}
