//! A service as it runs: its layers, those of before where the file says nothing new of them.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use portcullis::balance::{BalanceLayer, Budget, Pick};
use portcullis::circuit_break::{CircuitBreakLayer, Mode, OpenTime, Outliers, Share, Window};
use portcullis::discovery::DiscoveryLayer;
use portcullis::forward::{self, ClientTls, Forward};
use portcullis::gateway::Upstream;
use portcullis::health::{self, Checker, Health};
use portcullis_core::{Endpoint, Endpoints, Outcome, Standard, TrustedProxies};

use super::registries::Registries;
use super::{Change, Error, balance};
use crate::config::{self, Config, Counts, HealthKind};

/// Over what time repeated requests are compared with all.
const BUDGET_WINDOW: Duration = Duration::from_secs(10);

/// A service as it runs.
#[derive(Clone)]
pub(crate) struct Service {
    pub(super) config: config::Service,
    trusted: config::TrustedProxies,
    /// What the file calls it.
    pub(crate) name: String,
    pub(crate) discovery: DiscoveryLayer,
    balance: BalanceLayer<Arc<dyn Pick>>,
    /// Of the balancer.
    pub(crate) budget: Budget,
    pub(crate) circuit_break: CircuitBreakLayer,
    pub(crate) forward: Forward,
    /// There once it is in force, if the file wants it.
    health: Arc<OnceLock<Checker>>,
}

// === impl Service ===

impl Service {
    pub(super) fn build(
        name: &str,
        service: &config::Service,
        config: &Config,
        registries: &mut Registries,
        proxies: &TrustedProxies,
        old: Option<&Self>,
        commit: &mut Vec<Change>,
    ) -> Result<Self, Error> {
        let discovery = registries.discovery(name, service, old.map(|old| &old.discovery));
        let same = |part: fn(&config::Service, &config::Service) -> bool| old.filter(|old| part(&old.config, service));
        let believes_the_same = |old: &&Self| old.trusted == config.trusted_proxies;
        let balanced_alike = same(|a, b| a.balance == b.balance && a.retry == b.retry);
        let (balance, budget) = match balanced_alike.filter(believes_the_same) {
            Some(old) => (old.balance.clone(), old.budget.clone()),
            None => {
                let (share, rate) = (&service.retry.budget, &service.retry.budget_per_second);
                let (share, rate) =
                    (share.as_ref().map_or(0.2, |share| **share), rate.as_ref().map_or(10, |rate| **rate));
                let budget = Budget::new(share, rate, BUDGET_WINDOW);
                (balance::layer(service, proxies, budget.clone()), budget)
            }
        };
        let circuit_break = match same(|a, b| a.breaker == b.breaker) {
            Some(old) => old.circuit_break.clone(),
            None => breaker(&service.breaker)?,
        };
        let connected_alike = same(|a, b| {
            let encrypts = |service: &config::Service| (service.https, service.registry.is_empty());
            let says = |one: &config::Service| (one.forwarded, one.via.clone());
            (encrypts(a), says(a), &a.timeouts, &a.pool, &a.tls, &a.host)
                == (encrypts(b), says(b), &b.timeouts, &b.pool, &b.tls, &b.host)
        });
        let connects_as = connected_alike.filter(believes_the_same);
        let forward = match connects_as {
            Some(old) => old.forward.clone(),
            None => forward_to(service, proxies)?,
        };
        let asks_the_same = |old: &&Self| {
            old.config.health == service.health && Arc::ptr_eq(old.discovery.registry(), discovery.registry())
        };
        let health = match (&service.health, connects_as.filter(asks_the_same)) {
            (None, _) => Arc::default(),
            (Some(_), Some(old)) => old.health.clone(),
            (Some(health), None) => {
                let started = Arc::<OnceLock<Checker>>::default();
                let (check, discovery, forward) = (checker(health), discovery.clone(), forward.clone());
                let (lock, name, old) = (started.clone(), name.to_owned(), old.map(|old| old.health.clone()));
                // Not before: it has a say at the gates of endpoints that those before it may share.
                commit.push(Box::new(move || {
                    let _ = lock.set(match old.as_ref().and_then(|old| old.get()) {
                        Some(old) => check.start_after(old, discovery, &name, forward),
                        None => check.start(discovery, &name, forward),
                    });
                }));
                started
            }
        };
        let (config, trusted) = (service.clone(), config.trusted_proxies.clone());
        Ok(Self { config, trusted, name: name.to_owned(), discovery, balance, budget, circuit_break, forward, health })
    }

    pub(super) fn upstream(&self) -> Upstream {
        // The gateway asks for it by its name here; the discovery layer knows what the registry calls it.
        Upstream::new(portcullis::discovery::FixedRegistry::new())
            .with_discovery(self.discovery.clone())
            .with_balance(self.balance.clone())
            .with_circuit_break(self.circuit_break.clone())
            .with_forward(self.forward.clone())
    }

    /// How an endpoint answered its checks; `None` before it was asked.
    pub(crate) fn health(&self, endpoint: &Endpoint) -> Option<Health> {
        self.health.get()?.health(endpoint)
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

    /// Has the breakers of all endpoints, also of those still to come, do this by hand, whatever single ones were told.
    pub(crate) fn force_all(&self, mode: Option<Mode>) {
        let handle = self.circuit_break.handle();
        handle.set_mode(mode.unwrap_or(Mode::Normal));
        for endpoint in self.endpoints().iter().flat_map(|endpoints| endpoints.iter()) {
            handle.endpoint(endpoint).set_mode(None);
        }
    }

    /// Has the breaker of one endpoint do this by hand. Let go where all are held, it alone is: the others stay held, and so
    /// do those still to come.
    pub(crate) fn force(&self, endpoint: &Endpoint, mode: Option<Mode>) {
        let handle = self.circuit_break.handle();
        let let_go = Some(Mode::Normal).filter(|_| handle.mode() != Mode::Normal);
        handle.endpoint(endpoint).set_mode(mode.or(let_go));
    }

    /// Has the breakers of `next` hold what is held by hand here, and those here object to nothing any more: nobody would
    /// ever move them.
    pub(super) fn hand_over_breakers(&self, next: &CircuitBreakLayer) {
        let (handle, next) = (self.circuit_break.handle(), next.handle());
        let all = handle.mode();
        next.set_mode(all);
        for endpoint in self.endpoints().iter().flat_map(|endpoints| endpoints.iter()) {
            let breaker = handle.endpoint(endpoint);
            let own = Some(breaker.mode()).filter(|mode| *mode != all);
            if own.is_some() {
                next.endpoint(endpoint).set_mode(own);
            }
            // Also where it was told what all were: what it was told itself closes its gate.
            breaker.set_mode(None);
            breaker.reset();
        }
        // Requests that are still under way are not to close anything by it.
        handle.set_mode(Mode::ForcedClosed);
    }
}

// === layers ===

fn breaker(breaker: &config::Breaker) -> Result<CircuitBreakLayer, Error> {
    if !breaker.enabled {
        return Ok(CircuitBreakLayer::new().failures(0));
    }
    let open = match breaker.open_limit {
        Some(limit) => OpenTime::growing(breaker.open_for, limit),
        None => OpenTime::fixed(breaker.open_for),
    };
    let open = match &breaker.jitter {
        Some(part) => open.jitter(Share::new(**part).ok()),
        None => open,
    };
    let open = open.listen_up_to(breaker.listen_up_to);
    let exhausted = match breaker.exhausted {
        Counts::Ignored => Outcome::Ignored,
        Counts::Failure => Outcome::Failure,
        Counts::Success => Outcome::Success,
    };
    let mut layer = CircuitBreakLayer::new()
        .with_classify(Standard::default().exhausted(exhausted))
        .failures(breaker.failures)
        .open_for(open)
        .probes(breaker.probes)
        .successes(breaker.successes)
        .probe_timeout(breaker.probe_timeout);
    let wrong = |error: portcullis::circuit_break::Error| Error::of("the breaker", error);
    if let Some(outliers) = &breaker.outliers {
        let open = OpenTime::growing(outliers.open_for, outliers.open_limit.max(outliers.open_for))
            .jitter(Share::new(*outliers.jitter).ok());
        let share = |share: config::Share| Share::new(share.0).map_err(wrong);
        let rules = Outliers::new()
            .every(outliers.every)
            .deviations(outliers.deviations.filter(|deviations| *deviations > 0.0))
            .failure_rate(outliers.failure_rate.map(share).transpose()?)
            .calls(outliers.calls.get())
            .endpoints(outliers.endpoints)
            .at_most(share(outliers.at_most)?)
            .open_for(open);
        layer = layer.outliers(rules);
    }
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
    let policy = host(&service.host, timeouts(&service.timeouts, forward::Policy::new()))?;
    let mut forward =
        Forward::new().trusted_proxies(proxies.clone()).policy(policy).forwarded(match service.forwarded {
            config::Forwarded::XForwarded => forward::Forwarded::XForwarded,
            config::Forwarded::Forwarded => forward::Forwarded::Standard,
            config::Forwarded::Both => forward::Forwarded::Both,
            config::Forwarded::Nothing => forward::Forwarded::Nothing,
        });
    if let Some(via) = &service.via {
        forward = forward.via(via).map_err(|error| Error::of("via", error))?;
    }
    let pool = &service.pool;
    forward = forward.max_head(usize::try_from(pool.max_header_size.0).unwrap_or(usize::MAX));
    if let Some(idle) = pool.max_idle {
        forward = forward.max_idle(idle.get());
    }
    if let Some(connections) = pool.max_connections {
        forward = forward.max_connections(connections.get());
    }
    if let Some(waiting) = pool.max_waiting {
        forward = forward.max_waiting(waiting);
    }
    if let Some(time) = pool.idle_timeout {
        forward = forward.pool_idle_timeout(time);
    }
    if let Some(age) = pool.max_age {
        forward = forward.max_age(age);
    }
    if let Some(streams) = pool.max_streams {
        forward = forward.max_streams(streams.get());
    }
    if let Some(interval) = &pool.keep_alive {
        forward = forward.keep_alive(**interval, pool.keep_alive_timeout);
    }
    if service.https || !service.registry.is_empty() {
        let is_certain = service.https || service.tls.place().is_some();
        forward = match client_tls(&service.tls) {
            Ok(tls) => forward.tls(tls),
            // The system has no authorities. Without endpoints that speak TLS nobody misses them.
            Err(_) if !is_certain => forward,
            Err(error) => return Err(Error::of("tls", error)),
        };
    }
    Ok(forward)
}

/// How long things may take.
pub(super) fn timeouts(timeouts: &config::Timeouts, mut policy: forward::Policy) -> forward::Policy {
    if let Some(time) = timeouts.connect {
        policy = policy.connect_timeout(time.0);
    }
    if let Some(time) = timeouts.response {
        policy = policy.response_timeout(time.0);
    }
    if let Some(time) = timeouts.total {
        policy = policy.total_timeout(time.0);
    }
    if let Some(time) = timeouts.idle {
        policy = policy.idle_timeout(time.0);
    }
    policy
}

/// The host that endpoints see.
pub(super) fn host(host: &str, policy: forward::Policy) -> Result<forward::Policy, Error> {
    Ok(policy.host(match host {
        "keep" => forward::Host::Keep,
        "endpoint" => forward::Host::Endpoint,
        name => forward::Host::Fixed(name.parse().map_err(|_| Error::of("host", "it cannot stand in a header"))?),
    }))
}

pub(crate) fn client_tls(tls: &config::UpstreamTls) -> Result<ClientTls, forward::Error> {
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
    let path = health.path.as_ref().map(|path| path.as_str());
    let check = match health.kind {
        HealthKind::Http => health::HealthCheck::http(path.unwrap_or("/")),
        HealthKind::Tcp => health::HealthCheck::tcp(),
        HealthKind::Grpc => health::HealthCheck::grpc(path.unwrap_or("")),
    };
    check
        .interval(health.interval)
        .timeout(health.timeout)
        .unhealthy_after(health.unhealthy)
        .healthy_after(health.healthy)
}
