//! What runs at the moment, and how it is replaced.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use arc_swap::ArcSwap;
use portcullis::circuit_break::CircuitBreakLayer;
use portcullis::serve::ServerTls;
use portcullis_core::{Clock, Moment};
use tokio::sync::watch;

use crate::build::Running;
use crate::config::{self, Config, Listener, LogFormat, Map};
use crate::listen::Renewal;
use crate::members::Members;
use crate::telemetry::Telemetry;

/// Everything the servers share.
pub(crate) struct State {
    running: ArcSwap<Running>,
    pub(crate) telemetry: Arc<Telemetry>,
    pub(crate) clock: Clock,
    pub(crate) started: Moment,
    /// The file it was read from; a demo has none.
    pub(crate) file: Option<PathBuf>,
    /// The instances that operators registered.
    pub(crate) members: Members,
    /// What listeners encrypt with, by name.
    shown: Vec<(String, ServerTls)>,
    /// What counts as it was at the start.
    fixed: Fixed,
    reloading: tokio::sync::Mutex<()>,
    /// Tells of every file put in force.
    files: watch::Sender<()>,
    /// Whether it has been told to stop.
    stop: watch::Sender<bool>,
}

/// What another file cannot change while it runs.
#[derive(PartialEq)]
struct Fixed {
    /// Without their certificates.
    listeners: Map<Listener>,
    admin: (bool, SocketAddr),
    threads: Option<NonZeroUsize>,
    format: LogFormat,
    drain_timeout: Duration,
}

/// What `build` makes; where that panics nothing is put in force, and what watches the file goes on.
fn guarded<T>(build: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    let built = std::panic::catch_unwind(std::panic::AssertUnwindSafe(build));
    built.unwrap_or_else(|_| Err(String::from("a defect of this program: the log says where")))
}

// === impl Fixed ===

impl Fixed {
    fn of(config: &Config) -> Self {
        let mut listeners = config.listeners.clone();
        for tls in listeners.values_mut().filter_map(|listener| listener.tls.as_mut()) {
            tls.forget();
        }
        Self {
            listeners,
            admin: (config.admin.enabled, *config.admin.address),
            threads: config.server.threads.as_deref().copied(),
            format: config.log.format,
            drain_timeout: config.server.drain_timeout,
        }
    }

    /// Refuses what would let everybody change things: the operators' side is where it was at the start.
    fn may_be(&self, admin: &config::Admin) -> Result<(), String> {
        let (is_there, address) = self.admin;
        if is_there && admin.writable && admin.token.is_none() && !address.ip().is_loopback() {
            return Err(format!(
                "the admin side is at {address} until the next start, where others reach it; set admin.token, or set \
                 writable = false"
            ));
        }
        Ok(())
    }

    /// What the other has otherwise.
    fn differs(&self, other: &Self) -> Vec<&'static str> {
        let same = [
            ("listeners", self.listeners == other.listeners),
            ("admin.address", self.admin == other.admin),
            ("server.threads", self.threads == other.threads),
            ("server.drain_timeout", self.drain_timeout == other.drain_timeout),
            ("log.format", self.format == other.format),
        ];
        same.into_iter().filter(|(_, same)| !same).map(|(name, _)| name).collect()
    }
}

// === impl State ===

impl State {
    /// Puts the first configuration in force.
    pub(crate) fn new(mut running: Running, file: Option<PathBuf>, shown: Vec<(String, ServerTls)>) -> Arc<Self> {
        running.commit();
        let clock = Clock::system();
        let state = Self {
            telemetry: Arc::default(),
            started: clock.now(),
            clock,
            file,
            members: Members::default(),
            shown,
            fixed: Fixed::of(&running.config),
            reloading: tokio::sync::Mutex::default(),
            files: watch::Sender::new(()),
            stop: watch::Sender::new(false),
            running: ArcSwap::from_pointee(running),
        };
        state.listen_to_breakers(None);
        Arc::new(state)
    }

    pub(crate) fn running(&self) -> arc_swap::Guard<Arc<Running>> {
        self.running.load()
    }

    /// Changes with every file put in force.
    pub(crate) fn files(&self) -> watch::Receiver<()> {
        self.files.subscribe()
    }

    /// Reads the file again and puts it in force, or changes nothing and says why.
    pub(crate) async fn reload(&self) -> Result<String, String> {
        let Some(file) = self.file.clone() else { return Err(String::from("there is no file to read")) };
        let _one_at_a_time = self.reloading.lock().await;
        let loaded = tokio::task::spawn_blocking(move || Config::load(&file)).await;
        // The event is shown to whoever asks: of what stands in the file it says no more than where.
        let mut places = None;
        let result = match loaded {
            Ok(Ok(config)) => self.replace(config),
            Ok(Err(mistakes)) => {
                places = Some(mistakes.places());
                Err(mistakes.to_string())
            }
            Err(error) => Err(error.to_string()),
        };
        match &result {
            Ok(what) => {
                self.telemetry.reloads.fetch_add(1, Ordering::Relaxed);
                tracing::info!("{what}");
                self.telemetry.event("reload", what.clone());
            }
            Err(why) => {
                self.telemetry.failed_reloads.fetch_add(1, Ordering::Relaxed);
                tracing::error!("the file was not put in force:\n{why}");
                self.telemetry.event("reload", format!("refused: {}", places.as_ref().unwrap_or(why)));
            }
        }
        result
    }

    /// Whether another reading would change something; nothing if the file cannot be read, or is wrong.
    pub(crate) async fn says_otherwise(&self) -> Option<bool> {
        let Some(file) = self.file.clone() else { return Some(false) };
        let loaded = tokio::task::spawn_blocking(move || Config::load(&file)).await;
        Some(loaded.ok()?.ok()? != self.running().config)
    }

    fn replace(&self, config: Config) -> Result<String, String> {
        self.fixed.may_be(&config.admin)?;
        let before = self.running.load_full();
        let mut next = guarded(|| Running::build(config, Some(&before)).map_err(|error| error.to_string()))?;
        let (old, new) = (&before.config, &next.config);
        let renewal = Renewal::of(old, new, &self.shown)?;
        let later = self.fixed.differs(&Fixed::of(new));
        if old.log.level != new.log.level {
            crate::log::change(&new.log.level);
        }
        next.commit();
        renewal.commit();
        self.running.store(Arc::new(next));
        self.files.send_replace(());
        self.listen_to_breakers(Some(&before));
        let running = self.running();
        let labels: Vec<String> = running.config.routes.iter().map(|route| route.label()).collect();
        self.telemetry
            .keep(|name| running.services.contains_key(name), |route| labels.iter().any(|label| label == route));
        let mut said = String::from("the file is in force");
        if !later.is_empty() {
            said.push_str(&format!("; what it says of {} counts from the next start", later.join(", ")));
        }
        Ok(said)
    }

    /// Notes what breakers do, of those that are not listened to yet.
    fn listen_to_breakers(&self, before: Option<&Running>) {
        for (name, service) in &self.running().services {
            let old = before.and_then(|before| before.services.get(name));
            if old.is_some_and(|old| old.has_breaker_of(service)) {
                continue;
            }
            let layer: &CircuitBreakLayer = &service.circuit_break;
            let mut changes = layer.handle().changes();
            let (telemetry, name): (_, Arc<str>) = (self.telemetry.clone(), name.as_str().into());
            tokio::spawn(async move {
                while let Some(change) = changes.next().await {
                    telemetry.breaker_changed((name.clone(), change.to.as_str(), change.reason.as_str()));
                    let of = change.scope.as_endpoint().map_or_else(String::new, |endpoint| endpoint.id().to_string());
                    let text = format!(
                        "{name} {of}: {} to {}, {}",
                        change.from.as_str(),
                        change.to.as_str(),
                        change.reason.as_str()
                    );
                    telemetry.event("breaker", text);
                }
            });
        }
    }

    /// Says that it is to stop.
    pub(crate) fn stop(&self) {
        if !self.stop.send_replace(true) {
            self.telemetry.event("drain", "told to stop");
        }
    }

    pub(crate) fn is_stopping(&self) -> bool {
        *self.stop.borrow()
    }

    /// Done when it is to stop.
    pub(crate) async fn stopping(&self) {
        let mut stop = self.stop.subscribe();
        let _ = stop.wait_for(|stop| *stop).await;
    }

    /// Why it is not ready, if it is not.
    pub(crate) fn not_ready(&self) -> Option<String> {
        if self.is_stopping() {
            return Some(String::from("draining"));
        }
        let running = self.running();
        let waiting: Vec<&str> = running
            .services
            .iter()
            .filter(|(_, service)| service.endpoints().is_none() && service.is_asked_for(&running.config))
            .map(|(name, _)| name.as_str())
            .collect();
        (!waiting.is_empty()).then(|| format!("nothing is known yet of {}", waiting.join(", ")))
    }

    pub(crate) fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_panics_is_refused() {
        assert_eq!(guarded(|| Ok(1)), Ok(1));
        let panics = |wrong: Option<u8>| guarded(|| wrong.map(Ok).unwrap());
        assert!(panics(None).unwrap_err().starts_with("a defect"));
    }
}
