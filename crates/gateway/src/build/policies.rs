//! What a route of the file asks of each layer.

use std::time::Duration;

use http::HeaderName;
use portcullis::auth::{self, Attempt, Authenticate, Head, Scheme, SharedAuthenticate, SharedFuture};
use portcullis::forward::{self, Edit};
use portcullis::gateway::{Cors, Is, Redirect, Route};
use portcullis::rate_limit;
use portcullis_core::{Identity, Route as Matched, TrustedProxies};
use serde_json::Value as Json;

use super::{Error, balance};
use crate::config::{self, AuthMode, Config, Paths};

/// The proofs that a route believes, instead of all.
#[derive(Clone)]
pub(super) struct Believed(SharedAuthenticate);

/// Asks the proofs that a request's route believes.
pub(super) struct ByRoute {
    every: SharedAuthenticate,
}

// === impl Believed ===

impl Believed {
    pub(super) fn new(proofs: &[&SharedAuthenticate]) -> Self {
        Self(any_of(proofs))
    }
}

/// Whoever one of these accepts. There is always one.
fn any_of(proofs: &[&SharedAuthenticate]) -> SharedAuthenticate {
    match proofs {
        [] => (|_: &Head<'_>| std::future::ready(Err(auth::Denied::missing()))).shared(),
        [one] => (*one).clone(),
        [first, others @ ..] => (*first).clone().or(any_of(others)).shared(),
    }
}

// === impl ByRoute ===

impl ByRoute {
    pub(super) fn new(every: &[&SharedAuthenticate]) -> Self {
        Self { every: any_of(every) }
    }
}

impl Authenticate for ByRoute {
    type Future = SharedFuture;

    fn authenticate(&self, head: &Head<'_>) -> Attempt<SharedFuture> {
        let route = portcullis_core::Carried::of(head.extensions());
        let believed = route.and_then(Matched::policy::<Believed>).map_or(&self.every, |Believed(proof)| proof);
        believed.authenticate(head)
    }

    fn schemes(&self) -> Vec<Scheme> {
        self.every.schemes()
    }
}

/// What is asked of callers where a route says nothing.
pub(super) fn default_auth(config: &Config) -> auth::Policy {
    mode(config.default_auth())
}

fn mode(mode: AuthMode) -> auth::Policy {
    match mode {
        AuthMode::Required => auth::Policy::required(),
        AuthMode::Optional => auth::Policy::optional(),
        AuthMode::None => auth::Policy::none(),
    }
}

/// The route with what it is called by.
pub(crate) fn called(route: &config::Route, mut built: Route) -> Route {
    if route.path.is_none() {
        built = built.grpc();
    }
    if let Some(name) = &route.name {
        built = built.named(name);
    }
    for host in &route.hosts {
        built = built.host(host);
    }
    for method in &route.methods {
        built = built.method(method.clone());
    }
    built
}

/// A route with its pattern.
pub(super) fn route(
    route: &config::Route,
    config: &Config,
    proxies: &TrustedProxies,
    believed: Option<Believed>,
) -> Result<(String, Route), Error> {
    let mut built = called(route, target(route)?);
    let pattern = route.pattern().ok_or_else(|| Error(String::from("no path")))?;
    for (name, matches) in route.headers.iter() {
        for is in conditions(matches) {
            built = built.header(header(name)?, is);
        }
    }
    for (name, matches) in route.query.iter() {
        for is in conditions(matches) {
            built = built.query(name, is);
        }
    }
    if let Some(auth) = &route.auth {
        let auth = &auth.0;
        let mut policy = mode(auth.mode);
        if !auth.scopes.is_empty() {
            policy = policy.scopes_all(&auth.scopes);
        }
        if !auth.any_scope.is_empty() {
            policy = policy.scopes_any(&auth.any_scope);
        }
        if !auth.roles.is_empty() {
            policy = policy.roles_all(&auth.roles);
        }
        if !auth.any_role.is_empty() {
            policy = policy.roles_any(&auth.any_role);
        }
        if !auth.claims.is_empty() {
            let claims = auth.claims.clone();
            policy = policy.when(move |identity| claims.iter().all(|(name, wanted)| claims_so(identity, name, wanted)));
        }
        built = built.auth(policy);
    }
    if let Some(believed) = believed {
        built = built.with_policy(believed);
    }
    if let Some(names) = &route.limits {
        let mut limits = Vec::new();
        for name in names {
            if let Some(found) = config.limits.get(&**name) {
                limits.push(super::limits::limit(name, found)?);
            }
        }
        let policy = rate_limit::Policy::limits(limits);
        built = built.rate_limit(if route.default_limits { policy.beside_default() } else { policy });
    }
    built = with_whole_time(built, route, config);
    if route.retry.is_some() || route.subset.is_some() || !route.hash.is_empty() {
        for backend in &route.to {
            if let Some(service) = config.services.get(&*backend.0.service) {
                built = built.balance_of(&backend.0.service, attempts(route, service, proxies));
            }
        }
    }
    if let Some(cors) = &route.cors {
        built = built.cors(cors_of(cors)?);
    }
    if route.to.is_empty() {
        for edit in edits(&route.response_headers)? {
            built = built.edit_answer(edit);
        }
        return Ok((pattern, built));
    }
    Ok((pattern, built.forward(forwarding(route)?)))
}

/// The route with how long a request may take, other attempts included: as it says itself, else as each of its services does.
fn with_whole_time(mut built: Route, route: &config::Route, config: &Config) -> Route {
    let total = |timeouts: &config::Timeouts| timeouts.total.map(|time| time.0);
    let is_some_time = |time: &Duration| *time != Duration::MAX;
    let own = total(&route.timeouts);
    if let Some(time) = route.timeout.into_iter().chain(own.filter(is_some_time)).min() {
        built = built.timeout(time);
    }
    if own.is_some() {
        return built;
    }
    for name in route.to.iter().map(|backend| &backend.0.service) {
        let of_service = config.services.get(&**name).and_then(|service| total(&service.timeouts));
        if let Some(time) = of_service.filter(is_some_time) {
            built = built.timeout_of(name, time);
        }
    }
    built
}

/// Whether a claim is this, or is a list that holds it.
fn claims_so(identity: &Identity, name: &str, wanted: &str) -> bool {
    let is_wanted = |value: &Json| match value {
        Json::String(text) => text == wanted,
        Json::Number(number) => number.to_string().as_str() == wanted,
        Json::Bool(so) => wanted == if *so { "true" } else { "false" },
        Json::Null | Json::Array(_) | Json::Object(_) => false,
    };
    match identity.claim(name) {
        Some(Json::Array(list)) => list.iter().any(is_wanted),
        other => other.is_some_and(is_wanted),
    }
}

/// How a route's requests to one of its services are attempted, where it says something of it: the rest is as the service
/// has it.
fn attempts(route: &config::Route, service: &config::Service, proxies: &TrustedProxies) -> portcullis::balance::Policy {
    let (retry, balance) = (route.retry.as_ref().unwrap_or(&service.retry), &service.balance);
    let policy = balance::attempts(retry, balance, route.subset.as_deref().or(balance.subset.as_deref()));
    match balance::hash_key(&route.hash, proxies) {
        Some(key) => policy.hash_key(key),
        None => policy,
    }
}

fn target(route: &config::Route) -> Result<Route, Error> {
    if let Some(redirect) = &route.redirect {
        let status = http::StatusCode::from_u16(*redirect.status).map_err(|error| Error(error.to_string()))?;
        let mut built = Redirect::new(status);
        if let Some(scheme) = &redirect.scheme {
            built = built.scheme(scheme);
        }
        if let Some(host) = &redirect.host {
            built = built.host(host);
        }
        if let Some(path) = &redirect.path {
            built = built.path(path);
        }
        return Ok(Route::redirect(built));
    }
    if let Some(respond) = &route.respond {
        return Ok(Route::respond(respond.status, respond.content_type.clone(), respond.body.clone()));
    }
    Ok(Route::split(route.to.iter().map(|backend| (backend.0.service.as_str(), backend.0.weight))))
}

fn conditions(matches: &config::Matches) -> impl Iterator<Item = Is> {
    let table = &matches.0;
    let present = table.present.map(|present| if present { Is::Present } else { Is::Absent });
    let exact = table.exact.clone().map(Is::Exactly);
    exact.into_iter().chain(table.prefix.clone().map(Is::Prefixed)).chain(present)
}

pub(super) fn header(name: &str) -> Result<HeaderName, Error> {
    name.parse().map_err(|_| Error(format!("{name:?} is no name of a header")))
}

fn forwarding(route: &config::Route) -> Result<forward::Policy, Error> {
    let mut policy = forward::Policy::new().paths(match route.paths {
        Paths::Refuse => forward::Paths::Refuse,
        Paths::Redirect => forward::Paths::Redirect,
        Paths::Pass => forward::Paths::Pass,
    });
    if let Some(prefix) = &route.strip_prefix {
        policy = policy.strip_prefix(prefix);
    }
    if let Some(prefix) = &route.add_prefix {
        policy = policy.add_prefix(prefix);
    }
    if let Some(bytes) = route.max_body {
        policy = policy.request_limit(bytes.0);
    }
    if let Some(bytes) = route.max_response {
        policy = policy.response_limit(bytes.0);
    }
    policy = super::service::timeouts(&route.timeouts, policy.tunnels(route.tunnels));
    if let Some(host) = &route.host {
        policy = super::service::host(host, policy)?;
    }
    for edit in edits(&route.request_headers)? {
        policy = policy.edit_request(edit);
    }
    for edit in edits(&route.response_headers)? {
        policy = policy.edit_response(edit);
    }
    Ok(policy)
}

fn edits(edits: &config::Edits) -> Result<Vec<Edit>, Error> {
    let mut list: Vec<Edit> = edits.remove.iter().cloned().map(Edit::Remove).collect();
    let value = |name: &str, value| {
        config::HeaderValues::value(name, value).ok_or_else(|| Error(format!("the value of {name} is none")))
    };
    for (name, set) in edits.set.iter() {
        list.push(Edit::Set(header(name)?, value(name, set)?));
    }
    for (name, added) in edits.add.iter() {
        list.push(Edit::Add(header(name)?, value(name, added)?));
    }
    Ok(list)
}

fn cors_of(cors: &config::Cors) -> Result<Cors, Error> {
    let built =
        Cors::new(cors.origins.iter().map(|origin| origin.as_str())).map_err(|error| Error(error.to_string()))?;
    let built = built
        .methods(cors.methods.clone())
        .expose(cors.expose.clone())
        .credentials(cors.credentials)
        .max_age(cors.max_age);
    if cors.headers.iter().any(|name| name == "*") {
        return Ok(built.any_header());
    }
    let names: Result<Vec<HeaderName>, Error> = cors.headers.iter().map(|name| header(name)).collect();
    Ok(built.headers(names?))
}
