//! What a file can say, as a whole.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::time::Duration;

use portcullis_core::TrustedProxies as Trusted;

use super::auth::{Auth, AuthMode};
use super::limit::{Limit, Limiter};
use super::listener::Listener;
use super::mistake::{Notes, help};
use super::operate::{Admin, Log, Metrics, Traces};
use super::plain::Map;
use super::read::At;
use super::registry::Registry;
use super::route::Route;
use super::section::{section, words};
use super::service::Service;

section! {
    /// Everything a file says.
    pub struct Config {
        /// Where callers come in, by name. Without any, one listens at 127.0.0.1:8080.
        listeners: Map<Listener>,
        /// Where instances of services are found, by name.
        registries: Map<At<Registry>>,
        /// The services behind the gateway, by name.
        services: Map<At<Service>>,
        /// Which requests go where. The most specific route wins, whatever the order.
        routes: Vec<At<Route>>,
        /// How callers prove who they are.
        auth: Auth,
        /// How often callers may come, by name; routes say which hold for them, and count each by itself.
        limits: Map<At<Limit>>,
        /// Where the limits count, and what holds where a route says nothing.
        limiter: Limiter,
        /// Whose word about a caller's address is taken.
        trusted_proxies: TrustedProxies,
        /// What is written to standard error.
        log: Log,
        /// What is counted.
        metrics: Metrics,
        /// Whose traces requests belong to.
        traces: Traces,
        /// The operator's side.
        admin: Admin,
        /// The process.
        server: Server,
    }
}

section! {
    /// The process.
    pub struct Server {
        /// Threads that serve each listener. By default one for each core.
        threads: Option<At<NonZeroUsize>>,
        /// How long to go on serving, not ready any more, after being told to stop, so that those in front notice.
        drain_delay: Duration = Duration::ZERO,
        /// How long requests under way may take after that before they are cut off.
        drain_timeout: Duration = Duration::from_secs(30),
        /// Loads the file again when it changes. It is looked at every two seconds, and loaded when two
        /// looks agree; better replace it by renaming.
        watch: bool = false,
    }
}

section! {
    /// Whose word about a caller's address is taken. By default nobody's.
    pub struct TrustedProxies {
        /// Networks of proxies, such as "10.0.0.0/8".
        networks: Vec<At<String>>,
        /// How many proxies stand in front, whatever their addresses. Instead of networks.
        hops: Option<At<usize>>,
        /// The header they write. What a request says in the other one is neither believed nor passed on.
        header: ProxyHeader = ProxyHeader::XForwardedFor,
    }
}

words! {
    /// The header that proxies write.
    pub enum ProxyHeader {
        /// The usual one.
        XForwardedFor = "x-forwarded-for",
        /// The one of RFC 7239.
        Forwarded = "forwarded",
    }
}

impl Config {
    /// Notes every contradiction.
    pub(super) fn check(&self, notes: &mut Notes<'_>) {
        if self.routes.is_empty() {
            notes.push(&(0..0), "there is no route", "add [[routes]] with path = \"/{*rest}\" and to = \"<service>\"");
        }
        let mut addresses: HashMap<_, &str> = HashMap::new();
        for (name, listener) in &self.listeners {
            listener.check(&self.registries, notes);
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
        for (name, registry) in &self.registries {
            registry.check(notes);
            registry.check_times(name, &self.services, notes);
        }
        self.services.iter().for_each(|(name, service)| service.check(name, &service.span, &self.registries, notes));
        self.routes.iter().for_each(|route| route.check(&route.span, self, notes));
        if notes.is_empty() {
            self.check_together(notes);
        }
        self.auth.check(notes);
        self.limits.values().for_each(|limit| limit.check(&limit.span, notes));
        self.limiter.check(notes);
        each_once(&self.limiter.default, &self.limits, "limit", notes);
        self.trusted_proxies.check(notes);
        if let Some(threads) = self.server.threads.as_ref().filter(|threads| threads.get() > 1024) {
            notes.push(&threads.span, "more threads than any machine serves with", "at most 1024");
        }
        if let Some(otlp) = &self.traces.otlp {
            otlp.check(&otlp.span, notes);
            if !self.traces.propagate {
                notes.push(&otlp.span, "spans of no trace", "set traces.propagate = true, or remove traces.otlp");
            }
        }
        if crate::log::filter(&self.log.level).is_none() {
            let help = "such as \"info\" or \"warn,portcullis_forward=debug\"";
            notes.push(&self.log.level.span, format!("{:?} says no level", *self.log.level), help);
        }
    }

    /// Notes routes that do not go with those before them.
    fn check_together(&self, notes: &mut Notes<'_>) {
        for (index, why, help) in crate::build::misfits(self) {
            let route = &self.routes[index];
            let span = route.path.as_ref().map_or(&route.span, |path| &path.span);
            notes.push(span, why, help);
        }
    }

    /// Whether callers are asked who they are where a route does not say.
    #[must_use]
    pub fn default_auth(&self) -> AuthMode {
        let unsaid = if self.auth.providers.is_empty() { AuthMode::None } else { AuthMode::Required };
        self.auth.default.as_ref().map_or(unsaid, |mode| **mode)
    }
}

pub(super) fn known<T>(name: &At<String>, among: &Map<T>, kind: &str, notes: &mut Notes<'_>) {
    if !among.contains_key(&**name) && !notes.are_many() {
        let help = help(name, among.keys().map(String::as_str));
        notes.push(&name.span, format!("there is no {kind} {:?}", **name), help);
    }
}

/// Names of what there is, none of them twice.
pub(super) fn each_once<T>(names: &[At<String>], among: &Map<T>, kind: &str, notes: &mut Notes<'_>) {
    for (before, name) in names.iter().enumerate() {
        known(name, among, kind, notes);
        if names[..before].iter().any(|other| **other == **name) {
            notes.push(&name.span, format!("{:?} is named twice", **name), "remove one of them");
        }
    }
}

pub(super) fn check_network(network: &At<String>, notes: &mut Notes<'_>) {
    if Trusted::networks([network.as_str()]).is_err() {
        notes.push(&network.span, format!("{:?} is no network", **network), "such as \"10.0.0.0/8\"");
    }
}

impl TrustedProxies {
    fn check(&self, notes: &mut Notes<'_>) {
        for network in &self.networks {
            check_network(network, notes);
        }
        if let (Some(hops), false) = (&self.hops, self.networks.is_empty()) {
            notes.push(&hops.span, "both networks and hops", "keep one of them");
        }
    }
}
