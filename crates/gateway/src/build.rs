//! From what a file says to the layers that do it, keeping the layers of what did not change.

mod auth;
mod balance;
mod limits;
mod policies;
mod registries;
mod service;
mod tell;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use portcullis::auth::{AuthLayer, Authenticate};
use portcullis::gateway::Gateway;
use portcullis_core::TrustedProxies;

pub(crate) use self::auth::Known;
use self::auth::Providers;
use self::limits::Limiter;
pub(crate) use self::limits::store;
use self::policies::Believed;
pub(crate) use self::policies::called;
use self::registries::Registries;
pub(crate) use self::service::{Service, client_tls};
use crate::config::{self, Config};
use crate::export::{self, Exporter};

/// Everything one configuration stands for, as it runs.
pub(crate) struct Running {
    pub(crate) config: Config,
    pub(crate) gateway: Gateway,
    pub(crate) services: BTreeMap<String, Service>,
    pub(crate) limiter: Limiter,
    pub(crate) exporter: Option<Arc<Exporter>>,
    pub(crate) providers: Providers,
    pub(crate) registries: Registries,
    /// What is to be done when it takes the place of what ran before.
    commit: Vec<Change>,
}

/// Something to be done when a configuration is put in force.
type Change = Box<dyn FnOnce() + Send + Sync>;

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
            let built = Service::build(name, service, &config, &mut registries, &proxies, old, &mut commit)
                .map_err(|Error(why)| Error::of(format_args!("the service {name:?}"), why))?;
            if let Some(old) = old
                && old.config.breaker != service.breaker
            {
                let (old, next) = (old.clone(), built.circuit_break.clone());
                commit.push(Box::new(move || old.hand_over_breakers(&next)));
            }
            services.insert(name.clone(), built);
        }
        let providers = Providers::build(&config, &proxies, before)?;
        let limiter = limits::limiter(&config, &proxies, before, &mut commit)?;
        let mut builder = Gateway::builder(portcullis::discovery::FixedRegistry::new())
            .with_rate_limit(limiter.layer.clone())
            .leaves_route(true);
        if let Some(layer) = providers.layer(&config)? {
            builder = builder.with_auth(layer);
        }
        for (name, service) in &services {
            builder = builder.service(name, service.upstream());
        }
        for (index, route) in config.routes.iter().enumerate() {
            let believed = route
                .auth
                .as_ref()
                .filter(|auth| !auth.0.providers.is_empty())
                .map(|auth| Believed::new(&providers.named(auth.0.providers.iter().map(|name| name.as_str()))));
            let (pattern, route) = policies::route(route, &config, &proxies, believed)
                .map_err(|Error(why)| Error::of(format_args!("route {}", index + 1), why))?;
            builder = builder.route(&pattern, route);
        }
        let gateway = builder.build().map_err(|error| Error(error.to_string()))?;
        let traced = before.map(|before| (&before.config.traces, &before.exporter));
        let exporter = export::exporter(&config.traces, traced).map_err(Error)?;
        registries.commit(&mut commit);
        Ok(Self { config, gateway, services, limiter, exporter, registries, providers, commit })
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

/// Which of a file's routes cannot be used beside those before them, why, and what would be right.
pub(crate) fn misfits(config: &Config) -> Vec<(usize, String, &'static str)> {
    const APART: &str = "routes may differ in host, path, method, headers or query";
    const NORMAL: &str = "write it in normal form, as callers do; other spellings are for a route of paths = \"pass\"";
    let nobody = AuthLayer::new(policies::ByRoute::new(&[]).shared());
    let mut builder = Gateway::builder(portcullis::discovery::FixedRegistry::new()).with_auth(nobody);
    let (mut misfits, mut put_in) = (Vec::new(), Vec::new());
    for (index, route) in config.routes.iter().enumerate() {
        match policies::route(route, config, &TrustedProxies::none(), None) {
            Ok((pattern, route)) => {
                builder = builder.route(&pattern, route);
                put_in.push(index);
            }
            Err(Error(why)) => misfits.push((index, why, APART)),
        }
    }
    let found = builder.misfits().into_iter();
    misfits.extend(found.filter_map(|(at, error)| {
        let help = if error.is_unmatched() { NORMAL } else { APART };
        Some((*put_in.get(at)?, error.to_string(), help))
    }));
    misfits
}

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

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use portcullis::circuit_break::Mode;

    use super::*;

    /// Checks of a file that is refused later would move what runs.
    #[tokio::test]
    async fn nobody_is_asked_how_he_is_before_the_file_is_in_force() {
        let text = "[services.a]\nendpoints = [\"127.0.0.1:9\"]\nhealth = { kind = \"tcp\" }\n[[routes]]\npath = \"/\"\nto = \"a\"\n";
        let config = |text: &str| Config::parse("gateway.toml", text, Path::new("."), &|_| None).unwrap();
        let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
        let mut running = Running::build(config(text), None).unwrap();
        let before = tasks();
        running.commit();
        assert_eq!(tasks(), before + 1);
        let other = config(&text.replace("\"tcp\"", "\"tcp\", interval = \"1s\""));
        let next = Running::build(other, Some(&running)).unwrap();
        assert_eq!(tasks(), before + 1);
        drop(next);
    }

    /// The gate of one that was told the same as all stayed closed for as long as a request held the breakers of before.
    #[tokio::test]
    async fn what_was_held_by_breakers_of_before_is_let_go_with_all() {
        let text = "[services.a]\nendpoints = [\"127.0.0.1:9\"]\n[[routes]]\npath = \"/\"\nto = \"a\"\n";
        let config = |text: &str| Config::parse("gateway.toml", text, Path::new("."), &|_| None).unwrap();
        let before = Running::build(config(text), None).unwrap();
        before.gateway.ready().await;
        let old = &before.services["a"];
        let endpoint = old.endpoints().unwrap()[0].clone();
        let admits = || endpoint.permit(|| portcullis_core::Clock::system().now()).is_ok();
        old.force_all(Some(Mode::ForcedOpen));
        old.force(&endpoint, Some(Mode::ForcedOpen));
        assert!(!admits());
        let other = config(&text.replace("[[routes]]", "breaker.failures = 9\n[[routes]]"));
        let mut next = Running::build(other, Some(&before)).unwrap();
        next.commit();
        next.services["a"].force_all(None);
        assert!(admits());
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_asks_for_stays_known() {
        let text = "[services.quiet]\nendpoints = [\"127.0.0.1:9\"]\n[[routes]]\npath = \"/\"\nto = \"quiet\"\n";
        let config = Config::parse("gateway.toml", text, Path::new("."), &|_| None).unwrap();
        let running = Running::build(config, None).unwrap();
        running.gateway.ready().await;
        let before = running.services["quiet"].endpoints().unwrap();
        for _ in 0..12 {
            tokio::time::sleep(Duration::from_secs(600)).await;
        }
        let after = running.services["quiet"].endpoints().unwrap();
        assert!(before.iter().eq(after.iter()) && after.iter().all(|endpoint| !endpoint.is_removed()));
    }
}
