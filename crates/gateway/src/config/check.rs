//! What must hold between the parts of a file.

use std::collections::HashMap;
use std::ops::Range;

use portcullis_core::TrustedProxies as Trusted;

use super::mistake::{Notes, help};
use super::model::{Auth, BackendTable, Breaker, Config, Cors, Limit, LimitKey, ListenerTls, Otlp, Provider};
use super::model::{Redirect, Registry, RegistryKind, Route, Service, TrustedProxies, UpstreamTls};
use super::read::{At, Map};

impl Config {
    /// Notes every contradiction.
    pub(super) fn check(&self, notes: &mut Notes<'_>) {
        if self.routes.is_empty() {
            notes.push(&(0..0), "there is no route", "add [[routes]] with path = \"/{*rest}\" and to = \"<service>\"");
        }
        let mut addresses: HashMap<_, &str> = HashMap::new();
        for (name, listener) in &self.listeners {
            if let Some(tls) = &listener.tls {
                tls.check(notes);
            }
            if listener.address.port() != 0
                && let Some(other) = addresses.insert(*listener.address, name)
            {
                notes.push(
                    &listener.address.span,
                    format!("the listener {other:?} has this address"),
                    "give it another port",
                );
            }
        }
        if self.admin.enabled
            && self.admin.address.port() != 0
            && let Some(other) = addresses.get(&*self.admin.address)
        {
            let what = format!("the admin side and the listener {other:?} have the same address");
            notes.push(&self.admin.address.span, what, "give one of them another port");
        }
        if self.admin.writable && self.admin.token.is_none() && !self.admin.address.ip().is_loopback() {
            let what = "the admin side can change things and is reachable from elsewhere";
            notes.push(&self.admin.address.span, what, "set admin.token, listen at 127.0.0.1, or set writable = false");
        }
        self.registries.values().for_each(|registry| registry.check(notes));
        self.services.iter().for_each(|(name, service)| service.check(name, &service.span, &self.registries, notes));
        self.routes.iter().for_each(|route| route.check(&route.span, self, notes));
        self.auth.check(notes);
        self.limits.values().for_each(|limit| limit.check(&limit.span, notes));
        for name in &self.limiter.default {
            known(name, &self.limits, "limit", notes);
        }
        self.trusted_proxies.check(notes);
        if let Some(otlp) = &self.traces.otlp {
            otlp.check(&otlp.span, notes);
        }
        if crate::log::filter(&self.log.level).is_none() {
            let help = "such as \"info\" or \"warn,portcullis_forward=debug\"";
            notes.push(&self.log.level.span, format!("{:?} says no level", *self.log.level), help);
        }
    }

    /// Whether callers are asked who they are where a route does not say.
    #[must_use]
    pub fn default_auth(&self) -> super::AuthMode {
        let unsaid = if self.auth.providers.is_empty() { super::AuthMode::None } else { super::AuthMode::Required };
        self.auth.default.as_ref().map_or(unsaid, |mode| **mode)
    }
}

fn known<T>(name: &At<String>, among: &Map<T>, kind: &str, notes: &mut Notes<'_>) {
    if !among.contains_key(&**name) {
        let help = help(name, among.keys().map(String::as_str));
        notes.push(&name.span, format!("there is no {kind} {:?}", **name), help);
    }
}

impl ListenerTls {
    fn check(&self, notes: &mut Notes<'_>) {
        pem(&self.certificate, "CERTIFICATE", notes);
        pem(&self.key, "PRIVATE KEY", notes);
        if let Some(ca) = &self.client_ca {
            pem(ca, "CERTIFICATE", notes);
        } else if self.require_client {
            notes.push(
                &self.certificate.span,
                "client certificates are required, and no authority is named",
                "set client_ca",
            );
        }
    }
}

impl Otlp {
    fn check(&self, span: &Range<usize>, notes: &mut Notes<'_>) {
        if !cfg!(feature = "otlp") {
            notes.push(span, "this program was built without the feature otlp", "build it with --features otlp");
        }
        let uri = self.endpoint.parse::<http::Uri>().ok();
        let scheme = uri.as_ref().filter(|uri| uri.host().is_some()).and_then(http::Uri::scheme_str);
        if !matches!(scheme, Some("http" | "https")) {
            let what = format!("{:?} is no URL of a collector", *self.endpoint);
            notes.push(&self.endpoint.span, what, "such as \"http://127.0.0.1:4318\"");
        }
        for name in self.headers.keys().filter(|name| name.parse::<http::HeaderName>().is_err()) {
            notes.push(span, format!("{name:?} is no header"), "letters, digits and dashes");
        }
    }
}

impl UpstreamTls {
    fn check(&self, notes: &mut Notes<'_>) {
        for certificate in [&self.ca, &self.certificate].into_iter().flatten() {
            pem(certificate, "CERTIFICATE", notes);
        }
        match (&self.certificate, &self.key) {
            (Some(_), Some(key)) => pem(key, "PRIVATE KEY", notes),
            (Some(one), None) => notes.push(&one.span, "a certificate without its key", "set tls.key"),
            (None, Some(one)) => notes.push(&one.span, "a key without its certificate", "set tls.certificate"),
            (None, None) => {}
        }
    }
}

fn pem(blob: &At<super::Blob>, what: &str, notes: &mut Notes<'_>) {
    let text = String::from_utf8_lossy(blob.bytes());
    if !text.lines().any(|line| line.starts_with("-----BEGIN ") && line.trim_end().ends_with(&format!("{what}-----"))) {
        notes.push(
            &blob.span,
            format!("there is no {what} in it"),
            format!("it must hold PEM: -----BEGIN {what}-----"),
        );
    }
}

impl Registry {
    fn check(&self, notes: &mut Notes<'_>) {
        let span = &self.kind.span;
        match *self.kind {
            RegistryKind::Consul => {
                if let Some(address) = &self.address
                    && !(address.starts_with("http://") || address.starts_with("https://"))
                {
                    notes.push(
                        &address.span,
                        format!("{:?} is no URL of an agent", **address),
                        "such as \"http://127.0.0.1:8500\"",
                    );
                }
            }
            RegistryKind::Dns => {
                if let Some(address) = &self.address
                    && address.parse::<std::net::SocketAddr>().is_err()
                {
                    notes.push(&address.span, format!("{:?} is no name server", **address), "such as \"10.0.0.2:53\"");
                }
            }
            RegistryKind::File if self.path.is_none() => {
                notes.push(span, "not said which file", "add path = \"instances.json\"");
            }
            RegistryKind::File => {}
        }
        if let Some(path) = self.path.as_ref().filter(|_| *self.kind != RegistryKind::File) {
            notes.push(&path.span, "only a registry of the kind \"file\" has a path", "remove it");
        }
    }
}

impl Service {
    fn check(&self, name: &str, span: &Range<usize>, registries: &Map<At<Registry>>, notes: &mut Notes<'_>) {
        match (&self.registry, self.endpoints.first()) {
            (Some(registry), None) => known(registry, registries, "registry", notes),
            (Some(registry), Some(_)) => {
                notes.push(&registry.span, "both endpoints and a registry", "keep one of them");
            }
            (None, Some(_)) => {}
            (None, None) => {
                let what = format!("the service {name:?} has neither endpoints nor a registry");
                notes.push(span, what, "add endpoints = [\"127.0.0.1:9001\"] or registry = \"<name>\"");
            }
        }
        for (index, endpoint) in self.endpoints.iter().enumerate() {
            let address = &endpoint.0.address;
            if self.endpoints[..index].iter().any(|other| *other.0.address == **address) {
                notes.push(&address.span, format!("{} is listed twice", **address), "use weight to give it more");
            }
        }
        if self.host != "keep" && self.host != "endpoint" && http::HeaderValue::from_str(&self.host).is_err() {
            notes.push(
                span,
                format!("the service {name:?} has a host that is none"),
                "\"keep\", \"endpoint\" or a name",
            );
        }
        self.breaker.check(notes);
        self.tls.check(notes);
    }
}

impl Breaker {
    fn check(&self, notes: &mut Notes<'_>) {
        let has_window = self.window.is_some() || self.window_calls.is_some();
        for rate in [&self.failure_rate, &self.slow_rate].into_iter().flatten() {
            if !has_window {
                notes.push(&rate.span, "a share of what is not said", "add window = \"10s\" or window_calls = 100");
            }
        }
        match (&self.slow_rate, &self.slow_after) {
            (Some(rate), None) => notes.push(&rate.span, "not said what is slow", "add slow_after = \"1s\""),
            (None, Some(after)) => notes.push(&after.span, "not said how many may be slow", "add slow_rate = 0.5"),
            _ => {}
        }
        if let (Some(window), Some(_)) = (&self.window, &self.window_calls) {
            notes.push(&window.span, "both window and window_calls", "keep one of them");
        }
        let seconds = self.window.as_ref().map(|window| (&window.span, window.as_secs_f64()));
        if let Some((span, _)) = seconds.filter(|(_, seconds)| !(0.1..=3600.0).contains(seconds)) {
            notes.push(span, "a window lasts 100 ms to an hour", "such as window = \"10s\"");
        }
        if let Some(calls) = self.window_calls.as_ref().filter(|calls| !(1..=1000).contains(&***calls)) {
            notes.push(&calls.span, "a window holds 1 to 1000 calls", "such as window_calls = 100");
        }
        if has_window && self.failure_rate.is_none() && self.slow_rate.is_none() {
            let span = self.window.as_ref().map(|at| &at.span).or(self.window_calls.as_ref().map(|at| &at.span));
            notes.push(span.unwrap_or(&(0..0)), "a window that opens nothing", "add failure_rate = 0.5");
        }
    }
}

impl Route {
    fn check(&self, span: &Range<usize>, config: &Config, notes: &mut Notes<'_>) {
        let answers = [!self.to.is_empty(), self.redirect.is_some(), self.respond.is_some()];
        match answers.iter().filter(|&&answer| answer).count() {
            0 => notes.push(span, "the route leads nowhere", "add to = \"<service>\", redirect or respond"),
            1 => {}
            _ => notes.push(span, "the route leads to several things", "keep one of to, redirect and respond"),
        }
        for BackendTable { service, .. } in self.to.iter().map(|backend| &backend.0) {
            known(service, &config.services, "service", notes);
        }
        if self.to.len() > 1 && self.to.iter().all(|backend| backend.0.weight == 0) {
            notes.push(span, "all weights are 0", "give one of them another");
        }
        match (&self.path, &self.grpc) {
            (None, None) => {
                notes.push(span, "the route has no path", "add path = \"/{*rest}\", which takes everything")
            }
            (Some(path), Some(_)) => notes.push(&path.span, "both path and grpc", "keep one of them"),
            (Some(path), None) if !path.starts_with('/') => {
                notes.push(
                    &path.span,
                    format!("{:?} does not begin with a slash", **path),
                    format!("such as \"/{}\"", **path),
                );
            }
            (Some(_), None) => {}
            (None, Some(grpc)) => {
                let names = [Some(&grpc.service), grpc.method.as_ref()];
                for name in names.into_iter().flatten().filter(|name| name.is_empty() || name.contains(['/', '{', '}']))
                {
                    notes.push(&name.span, format!("{:?} is no name", **name), "such as \"shop.v1.Orders\"");
                }
            }
        }
        for host in &self.hosts {
            let name = host.strip_prefix("*.").unwrap_or(host);
            if name.is_empty() || name.contains(['*', ':', '/']) || !name.is_ascii() {
                notes.push(
                    &host.span,
                    format!("{:?} is no host name", **host),
                    "such as \"api.example.com\" or \"*.example.com\", without a port",
                );
            }
        }
        for name in self.headers.keys().chain(self.request_headers.set.keys()).chain(self.request_headers.add.keys()) {
            header(name, span, notes);
        }
        for name in self.response_headers.set.keys().chain(self.response_headers.add.keys()) {
            header(name, span, notes);
        }
        for limit in self.limits.iter().flatten() {
            known(limit, &config.limits, "limit", notes);
        }
        for prefix in [&self.strip_prefix, &self.add_prefix].into_iter().flatten() {
            if !prefix.starts_with('/') {
                notes.push(
                    &prefix.span,
                    format!("{:?} does not begin with a slash", **prefix),
                    format!("such as \"/{}\"", **prefix),
                );
            }
        }
        if let Some(auth) = &self.auth {
            for provider in &auth.0.providers {
                known(provider, &config.auth.providers, "provider", notes);
            }
            if auth.0.mode != super::AuthMode::None && config.auth.providers.is_empty() {
                notes.push(
                    span,
                    "the route asks who is calling, and there is no way to tell",
                    "add [auth.providers.<name>]",
                );
            }
        }
        if self.to.is_empty() {
            let asks = self.auth.as_ref().is_some_and(|auth| auth.0.mode != super::AuthMode::None);
            if asks || self.limits.as_ref().is_some_and(|limits| !limits.is_empty()) {
                notes.push(
                    span,
                    "redirects and fixed answers are given before anybody is asked or counted",
                    "remove auth and limits",
                );
            }
        }
        if let Some(redirect) = &self.redirect {
            redirect.check(notes);
        }
        if let Some(cors) = &self.cors {
            cors.check(span, notes);
        }
    }
}

fn header(name: &str, span: &Range<usize>, notes: &mut Notes<'_>) {
    if name.parse::<http::HeaderName>().is_err() {
        notes.push(span, format!("{name:?} is no name of a header"), "such as \"x-tenant\"");
    }
}

impl Redirect {
    fn check(&self, notes: &mut Notes<'_>) {
        if ![301, 302, 303, 307, 308].contains(&*self.status) {
            notes.push(&self.status.span, format!("{} is no redirect", *self.status), "one of 301, 302, 303, 307, 308");
        }
        if let Some(scheme) = self.scheme.as_ref().filter(|scheme| !["http", "https"].contains(&scheme.as_str())) {
            notes.push(&scheme.span, format!("{:?} is no scheme", **scheme), "\"http\" or \"https\"");
        }
        if let Some(host) = self.host.as_ref().filter(|host| host.parse::<http::uri::Authority>().is_err()) {
            notes.push(&host.span, format!("{:?} is no host", **host), "such as \"example.com\"");
        }
        if let Some(path) =
            self.path.as_ref().filter(|path| !path.starts_with('/') || path.parse::<http::uri::PathAndQuery>().is_err())
        {
            notes.push(&path.span, format!("{:?} is no path", **path), "such as \"/new\"");
        }
    }
}

impl Cors {
    fn check(&self, span: &Range<usize>, notes: &mut Notes<'_>) {
        if self.origins.is_empty() {
            notes.push(span, "cors without an origin", "add origins = [\"https://app.example.com\"]");
        }
        for origin in &self.origins {
            if **origin == "*" {
                if self.credentials {
                    notes.push(
                        &origin.span,
                        "every origin, with credentials",
                        "name the origins, or set credentials = false",
                    );
                }
            } else if !origin.contains("://") || origin.ends_with('/') {
                notes.push(
                    &origin.span,
                    format!("{:?} is no origin", **origin),
                    "such as \"https://app.example.com\", without a path",
                );
            }
        }
    }
}

impl Auth {
    fn check(&self, notes: &mut Notes<'_>) {
        if let Some(mode) = self.default.as_ref().filter(|mode| ***mode != super::AuthMode::None)
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
    fn check(&self, name: &str, span: &Range<usize>, notes: &mut Notes<'_>) {
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

impl Limit {
    fn check(&self, span: &Range<usize>, notes: &mut Notes<'_>) {
        match (self.key, &self.header, &self.claim) {
            (LimitKey::Header, None, _) => {
                notes.push(span, "a limit by header that names none", "add header = \"x-tenant\"")
            }
            (LimitKey::Claim, _, None) => {
                notes.push(span, "a limit by claim that names none", "add claim = \"tenant\"")
            }
            (key, Some(header), _) if key != LimitKey::Header => {
                notes.push(&header.span, "a header that is not looked at", "add key = \"header\"");
            }
            (key, _, Some(claim)) if key != LimitKey::Claim => {
                notes.push(&claim.span, "a claim that is not looked at", "add key = \"claim\"");
            }
            _ => {}
        }
    }
}

impl TrustedProxies {
    fn check(&self, notes: &mut Notes<'_>) {
        for network in &self.networks {
            if Trusted::networks([network.as_str()]).is_err() {
                notes.push(&network.span, format!("{:?} is no network", **network), "such as \"10.0.0.0/8\"");
            }
        }
        if let (Some(hops), false) = (&self.hops, self.networks.is_empty()) {
            notes.push(&hops.span, "both networks and hops", "keep one of them");
        }
    }
}
