//! From what a file says to the layers that do it, keeping the layers of what did not change.

mod policies;
mod registries;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use portcullis::auth::{self, Algorithm, AuthLayer, Authenticate, KeySet, SharedAuthenticate};
use portcullis::balance::{
    self, BalanceLayer, Budget, LeastConnections, PeakEwma, Pick, PowerOfTwo, Random, RoundRobin,
};
use portcullis::circuit_break::{CircuitBreakLayer, OpenTime, Share, Window};
use portcullis::discovery::DiscoveryLayer;
use portcullis::forward::{self, ClientTls, Forward};
use portcullis::gateway::{Gateway, Upstream};
use portcullis::health::{self, Checker};
use portcullis::rate_limit::{Handle as Limits, RateLimitLayer};
use portcullis_core::{Endpoints, GrpcCode, TrustedProxies};

use self::policies::Believed;
use self::registries::Registries;
use crate::config::{self, BalancePolicy, Config, HealthKind, Provider};
use crate::export::{self, Exporter};

/// Everything one configuration stands for, as it runs.
pub(crate) struct Running {
    pub(crate) config: Config,
    pub(crate) gateway: Gateway,
    pub(crate) services: BTreeMap<String, Service>,
    pub(crate) limits: Limits,
    pub(crate) exporter: Option<Arc<Exporter>>,
    /// Those who take tokens, by name.
    pub(crate) tokens: BTreeMap<String, auth::Jwt>,
    registries: Registries,
    rate_limit: RateLimitLayer,
    providers: BTreeMap<String, (Provider, SharedAuthenticate)>,
    /// What is to be done when it takes the place of what ran before.
    commit: Vec<Change>,
}

/// Something to be done when a configuration is put in force.
type Change = Box<dyn FnOnce() + Send + Sync>;

/// A service as it runs.
#[derive(Clone)]
pub(crate) struct Service {
    config: config::Service,
    trusted: config::TrustedProxies,
    /// What the registry calls it.
    pub(crate) name: String,
    pub(crate) discovery: DiscoveryLayer,
    balance: BalanceLayer<Arc<dyn Pick>>,
    /// Of the balancer.
    pub(crate) budget: Budget,
    pub(crate) circuit_break: CircuitBreakLayer,
    pub(crate) forward: Forward,
    pub(crate) health: Option<Checker>,
}

/// Why what a file says cannot be done.
#[derive(Debug)]
pub(crate) struct Error(pub(crate) String);

// === impl Error ===

impl Error {
    fn of(what: impl fmt::Display, why: impl fmt::Display) -> Self {
        Self(format!("{what}: {why}"))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

// === impl Running ===

impl Running {
    /// Builds what `config` says beside what runs. Nothing of that changes before [`commit`](Self::commit).
    pub(crate) fn build(config: Config, before: Option<&Self>) -> Result<Self, Error> {
        let mut commit: Vec<Change> = Vec::new();
        let mut registries = Registries::build(&config, before.map(|before| &before.registries))?;
        let proxies = trusted_proxies(&config.trusted_proxies)?;
        let mut services = BTreeMap::new();
        for (name, service) in &config.services {
            let old = before.and_then(|before| before.services.get(name));
            let built = Service::build(name, service, &config, &mut registries, &proxies, old)
                .map_err(|Error(why)| Error::of(format_args!("the service {name:?}"), why))?;
            if let Some(old) = old
                && old.config.breaker != service.breaker
            {
                // What the old breaker had objected to would be objected to for ever.
                let old = old.clone();
                commit.push(Box::new(move || old.reset_breakers()));
            }
            services.insert(name.clone(), built);
        }
        let mut tokens = BTreeMap::new();
        let providers = providers(&config, before, &mut tokens)?;
        let (rate_limit, limits) = limiter(&config, &proxies, before, &mut commit)?;
        let mut builder = Gateway::builder(portcullis::discovery::FixedRegistry::new())
            .with_rate_limit(rate_limit.clone())
            .leaves_route(true);
        if !providers.is_empty() {
            let every: Vec<&SharedAuthenticate> = providers.values().map(|(_, proof)| proof).collect();
            let mut layer =
                AuthLayer::new(policies::ByRoute::new(&every).shared()).policy(policies::default_auth(&config));
            if let Some(realm) = &config.auth.realm {
                layer = layer.realm(realm);
            }
            builder = builder.with_auth(layer);
        }
        for (name, service) in &services {
            builder = builder.service(name, service.upstream());
        }
        for (index, route) in config.routes.iter().enumerate() {
            let believed = route.auth.as_ref().filter(|auth| !auth.0.providers.is_empty()).map(|auth| {
                let named = auth.0.providers.iter().filter_map(|name| providers.get(&**name));
                Believed::new(&named.map(|(_, proof)| proof).collect::<Vec<_>>())
            });
            let (pattern, route) = policies::route(route, &config, believed)
                .map_err(|Error(why)| Error::of(format_args!("route {}", index + 1), why))?;
            builder = builder.route(&pattern, route);
        }
        let gateway = builder.build().map_err(|error| Error(error.to_string()))?;
        let traced = before.map(|before| (&before.config.traces, &before.exporter));
        let exporter = export::exporter(&config.traces, traced).map_err(Error)?;
        registries.commit(&mut commit);
        Ok(Self { config, gateway, services, limits, exporter, tokens, registries, rate_limit, providers, commit })
    }

    /// Makes what is shared with the one before as this one has it.
    pub(crate) fn commit(&mut self) {
        self.commit.drain(..).for_each(|change| change());
    }
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Running").field("gateway", &self.gateway).finish_non_exhaustive()
    }
}

// === impl Service ===

impl Service {
    fn build(
        name: &str,
        service: &config::Service,
        config: &Config,
        registries: &mut Registries,
        proxies: &TrustedProxies,
        old: Option<&Self>,
    ) -> Result<Self, Error> {
        let (discovery, registered) = registries.discovery(name, service, old.map(|old| &old.discovery));
        let same = |part: fn(&config::Service, &config::Service) -> bool| old.filter(|old| part(&old.config, service));
        let (balance, budget) = match same(|a, b| a.balance == b.balance && a.retry == b.retry) {
            Some(old) => (old.balance.clone(), old.budget.clone()),
            None => {
                let budget = Budget::default();
                (balance_layer(&service.balance, &service.retry).budget(budget.clone()), budget)
            }
        };
        let circuit_break = match same(|a, b| a.breaker == b.breaker) {
            Some(old) => old.circuit_break.clone(),
            None => breaker(&service.breaker)?,
        };
        let alike = |a: &config::Service, b: &config::Service| {
            a.timeouts == b.timeouts && a.pool == b.pool && a.tls == b.tls && a.host == b.host
        };
        let forward = match old.filter(|old| alike(&old.config, service) && old.trusted == config.trusted_proxies) {
            Some(old) => old.forward.clone(),
            None => forward_to(service, proxies)?,
        };
        let health = match (&service.health, old) {
            (None, _) => None,
            (Some(health), Some(old)) if old.config.health.as_ref() == Some(health) && old.name == registered => {
                old.health.clone()
            }
            (Some(health), _) => Some(checker(health).start(discovery.clone(), &registered, forward.clone())),
        };
        let (config, trusted) = (service.clone(), config.trusted_proxies.clone());
        Ok(Self { config, trusted, name: registered, discovery, balance, budget, circuit_break, forward, health })
    }

    fn upstream(&self) -> Upstream {
        // The gateway asks for it by its name here; the discovery layer knows what the registry calls it.
        Upstream::new(portcullis::discovery::FixedRegistry::new())
            .with_discovery(self.discovery.clone())
            .with_balance(self.balance.clone())
            .with_circuit_break(self.circuit_break.clone())
            .with_forward(self.forward.clone())
    }

    /// What is known of its endpoints.
    pub(crate) fn status(&self) -> Option<portcullis::discovery::Status> {
        self.discovery.status().into_iter().find(|status| *status.service == *self.name)
    }

    pub(crate) fn endpoints(&self) -> Option<Endpoints> {
        self.status()?.endpoints
    }

    /// Whether both move by the same breakers.
    pub(crate) fn has_breaker_of(&self, other: &Self) -> bool {
        self.config.breaker == other.config.breaker
    }

    /// Whether a route leads to it.
    pub(crate) fn is_asked_for(&self, config: &Config) -> bool {
        config.routes.iter().flat_map(|route| &route.to).any(|backend| *backend.0.service == self.name)
    }

    fn reset_breakers(&self) {
        let handle = self.circuit_break.handle();
        for endpoint in self.endpoints().iter().flat_map(|endpoints| endpoints.iter()) {
            handle.endpoint(endpoint).reset();
        }
    }
}

// === layers ===

pub(crate) fn trusted_proxies(trusted: &config::TrustedProxies) -> Result<TrustedProxies, Error> {
    let networks = trusted.networks.iter().map(|network| network.as_str());
    let proxies = match &trusted.hops {
        Some(hops) => TrustedProxies::hops(**hops),
        None if trusted.networks.is_empty() => TrustedProxies::none(),
        None => TrustedProxies::networks(networks).map_err(|error| Error(error.to_string()))?,
    };
    Ok(match trusted.header {
        config::ProxyHeader::XForwardedFor => proxies,
        config::ProxyHeader::Forwarded => proxies.reading_forwarded(),
    })
}

fn balance_layer(balance: &config::Balance, retry: &config::Retry) -> BalanceLayer<Arc<dyn Pick>> {
    let pick: Arc<dyn Pick> = match balance.policy {
        BalancePolicy::PowerOfTwo => Arc::new(PowerOfTwo),
        BalancePolicy::LeastConnections => Arc::new(LeastConnections::default()),
        BalancePolicy::RoundRobin => Arc::new(RoundRobin::new()),
        BalancePolicy::Random => Arc::new(Random::new()),
        BalancePolicy::PeakEwma => Arc::new(PeakEwma::new()),
    };
    let layer = BalanceLayer::new(pick)
        .policy(retry_policy(retry))
        .panic_threshold(balance.panic_threshold)
        // What was tried is noted by the observer.
        .leaves_served(false);
    match balance.wait {
        Some(wait) => layer.wait(wait),
        None => layer,
    }
}

fn retry_policy(retry: &config::Retry) -> balance::Policy {
    let policy = balance::Policy::new()
        .attempts(retry.attempts)
        .on_reset(retry.on_reset)
        .on_statuses(retry.on_statuses.iter().copied())
        .on_grpc(retry.on_grpc.iter().map(|&code| GrpcCode::from_number(code)))
        .repeat_any_method(retry.any_method)
        .replay(usize::try_from(retry.max_body.0).unwrap_or(usize::MAX))
        .backoff(retry.backoff, retry.max_backoff);
    match retry.attempt_timeout {
        Some(timeout) => policy.attempt_timeout(timeout),
        None => policy,
    }
}

fn breaker(breaker: &config::Breaker) -> Result<CircuitBreakLayer, Error> {
    if !breaker.enabled {
        return Ok(CircuitBreakLayer::new().failures(0));
    }
    let open = match breaker.open_limit {
        Some(limit) => OpenTime::growing(breaker.open_for, limit),
        None => OpenTime::fixed(breaker.open_for),
    };
    let layer = CircuitBreakLayer::new()
        .failures(breaker.failures)
        .open_for(open)
        .probes(breaker.probes)
        .successes(breaker.successes)
        .probe_timeout(breaker.probe_timeout);
    let wrong = |error: portcullis::circuit_break::Error| Error::of("the breaker", error);
    let window = match (&breaker.window, &breaker.window_calls) {
        (Some(time), _) => Window::of_time(**time),
        (None, Some(calls)) => Window::of_calls(**calls),
        (None, None) => return Ok(layer),
    };
    let mut window = window.map_err(wrong)?.at_least(breaker.at_least);
    if let Some(share) = &breaker.failure_rate {
        window = window.failure_rate(Share::new(share.0).map_err(wrong)?);
    }
    if let (Some(share), Some(after)) = (&breaker.slow_rate, &breaker.slow_after) {
        window = window.slow_rate(**after, Share::new(share.0).map_err(wrong)?);
    }
    Ok(layer.window(window))
}

fn forward_to(service: &config::Service, proxies: &TrustedProxies) -> Result<Forward, Error> {
    let timeouts = &service.timeouts;
    let mut policy = forward::Policy::new();
    if let Some(time) = timeouts.connect {
        policy = policy.connect_timeout(time);
    }
    if let Some(time) = timeouts.response {
        policy = policy.response_timeout(time);
    }
    if let Some(time) = timeouts.total {
        policy = policy.total_timeout(time);
    }
    if let Some(time) = timeouts.idle {
        policy = policy.idle_timeout(time);
    }
    policy = policy.host(match service.host.as_str() {
        "keep" => forward::Host::Keep,
        "endpoint" => forward::Host::Endpoint,
        name => forward::Host::Fixed(name.parse().map_err(|_| Error::of("host", "it cannot stand in a header"))?),
    });
    let mut forward = Forward::new().trusted_proxies(proxies.clone()).policy(policy);
    if let Some(idle) = service.pool.max_idle {
        forward = forward.max_idle(idle.get());
    }
    if let Some(connections) = service.pool.max_connections {
        forward = forward.max_connections(connections.get());
    }
    if let Some(time) = service.pool.idle_timeout {
        forward = forward.pool_idle_timeout(time);
    }
    if service.https || service.registry.is_some() || service.tls.ca.is_some() {
        let tls = client_tls(&service.tls);
        forward = match tls {
            Ok(tls) => forward.tls(tls),
            // Without endpoints that speak TLS nobody misses it.
            Err(_) if !service.https && service.tls.ca.is_none() => forward,
            Err(error) => return Err(Error::of("tls", error)),
        };
    }
    Ok(forward)
}

fn client_tls(tls: &config::UpstreamTls) -> Result<ClientTls, forward::Error> {
    let mut built = match &tls.ca {
        Some(ca) => ClientTls::trusting(ca.bytes())?,
        None => ClientTls::system()?,
    };
    if let (Some(certificate), Some(key)) = (&tls.certificate, &tls.key) {
        built = built.client_certificate(certificate.bytes(), key.bytes())?;
    }
    match &tls.name {
        Some(name) => built.server_name(name),
        None => Ok(built),
    }
}

fn checker(health: &config::Health) -> health::HealthCheck {
    let check = match health.kind {
        HealthKind::Http => health::HealthCheck::http(health.path.as_deref().unwrap_or("/")),
        HealthKind::Tcp => health::HealthCheck::tcp(),
        HealthKind::Grpc => health::HealthCheck::grpc(health.path.as_deref().unwrap_or("")),
    };
    check
        .interval(health.interval)
        .timeout(health.timeout)
        .unhealthy_after(health.unhealthy)
        .healthy_after(health.healthy)
}

fn limiter(
    config: &Config,
    proxies: &TrustedProxies,
    before: Option<&Running>,
    commit: &mut Vec<Change>,
) -> Result<(RateLimitLayer, Limits), Error> {
    let mut defaults = Vec::new();
    for name in &config.limiter.default {
        if let Some(limit) = config.limits.get(&**name) {
            defaults.push(policies::limit(name, limit)?);
        }
    }
    let same = |before: &&Running| {
        before.config.limiter.capacity == config.limiter.capacity
            && before.config.trusted_proxies == config.trusted_proxies
    };
    if let Some(before) = before.filter(same) {
        let (layer, handle) = (before.rate_limit.clone(), before.limits.clone());
        let unchanged = before.config.limits == config.limits && before.config.limiter == config.limiter;
        if !unchanged {
            let handle = handle.clone();
            commit.push(Box::new(move || handle.set_limits(defaults)));
        }
        return Ok((layer, handle));
    }
    let rate = portcullis::rate_limit::Rate::per_second(std::num::NonZeroU32::MIN);
    let layer = RateLimitLayer::new(rate).capacity(config.limiter.capacity.get()).trusted_proxies(proxies.clone());
    let handle = layer.handle();
    handle.set_limits(defaults);
    Ok((layer, handle))
}

fn providers(
    config: &Config,
    before: Option<&Running>,
    tokens: &mut BTreeMap<String, auth::Jwt>,
) -> Result<BTreeMap<String, (Provider, SharedAuthenticate)>, Error> {
    let mut built = BTreeMap::new();
    for (name, provider) in &config.auth.providers {
        let kept = before.and_then(|before| before.providers.get(name)).filter(|(old, _)| *old == **provider);
        let proof = match (kept, before.and_then(|before| before.tokens.get(name))) {
            (Some((_, proof)), Some(jwt)) => {
                tokens.insert(name.clone(), jwt.clone());
                proof.clone()
            }
            _ => {
                let jwt = jwt(provider).map_err(|why| Error::of(format_args!("the provider {name:?}"), why))?;
                tokens.insert(name.clone(), jwt.clone());
                jwt.shared()
            }
        };
        built.insert(name.clone(), ((**provider).clone(), proof));
    }
    Ok(built)
}

fn jwt(provider: &Provider) -> Result<auth::Jwt, String> {
    let keys = match (keys_of(provider)?, &provider.jwks_url) {
        (Some(keys), _) => keys,
        (None, Some(url)) => {
            let source = auth::KeySource::url(url.as_str());
            let source = match &provider.ca {
                Some(ca) => source.roots(ca.bytes()),
                None => Ok(source),
            };
            source.and_then(auth::KeySource::start).map_err(|error| error.to_string())?
        }
        (None, None) => return Err(String::from("no key")),
    };
    let mut jwt = auth::Jwt::new(keys);
    if let Some(issuer) = &provider.issuer {
        jwt = jwt.issuer(issuer);
    }
    for audience in &provider.audiences {
        jwt = jwt.audience(audience);
    }
    if let Some(pointer) = &provider.roles_from {
        jwt = jwt.roles_from(pointer);
    }
    for claim in &provider.require {
        jwt = jwt.require(claim);
    }
    if let Some(leeway) = provider.leeway {
        jwt = jwt.leeway(leeway.min(Duration::from_secs(300)));
    }
    Ok(jwt)
}

/// The keys a provider holds; `None` for those that must be fetched.
pub(crate) fn keys_of(provider: &Provider) -> Result<Option<KeySet>, String> {
    let algorithm = |default| {
        let named = provider.algorithm.as_ref().map(|name| Algorithm::from_name(name));
        // What is no algorithm is another mistake's business.
        named.unwrap_or(default).unwrap_or(Algorithm::HS256)
    };
    let keys = if let Some(secret) = &provider.secret {
        KeySet::hmac(algorithm(Some(Algorithm::HS256)), secret.reveal()).map(Some)
    } else if let Some(key) = &provider.public_key {
        KeySet::from_pem(algorithm(None), key.bytes()).map(Some)
    } else if let Some(jwks) = &provider.jwks {
        KeySet::from_jwks(jwks.bytes()).map(Some)
    } else {
        Ok(None)
    };
    keys.map_err(|error| error.to_string())
}
