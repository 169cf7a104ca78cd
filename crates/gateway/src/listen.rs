//! Where callers come in: ports that are bound, certificates that can be renewed, and registries that are told.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use portcullis::discovery::{Health, HealthCheck, Registration, Registry, ServiceDefinition};
use portcullis::serve::{ClientCertificates, Server, ServerTls};
use portcullis_core::{Address, Instance, Protocol, Scheme};
use tokio::sync::watch::Receiver;
use tokio::task::JoinHandle;

use crate::config::{self, Config, Listener, ListenerTls, Register};
use crate::state::State;

/// How long it takes at first, and at most, until a registry that did not register us is asked again.
const AGAIN: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));

/// A listener that is bound and does not serve yet.
pub(crate) struct Door {
    pub(crate) name: String,
    pub(crate) server: Server,
    pub(crate) address: SocketAddr,
    pub(crate) tls: Option<ServerTls>,
    pub(crate) entry: Option<Entry>,
    /// Whether other processes may listen there as well.
    pub(crate) shared: bool,
}

/// What a registry is told of a listener.
pub(crate) struct Entry {
    registry: String,
    definition: ServiceDefinition,
}

/// The certificates of a file that are to be shown from now on, and where.
pub(crate) struct Renewal(Vec<(ServerTls, ServerTls)>);

// === impl Door ===

impl Door {
    /// Binds all listeners of a file; where one cannot be bound, none is.
    pub(crate) fn all(config: &Config, threads: NonZeroUsize) -> Result<Vec<Self>, String> {
        if config.listeners.is_empty() {
            let at = Listener::at(SocketAddr::from(([127, 0, 0, 1], 8080)));
            return Self::open("main", &at, threads).map(|door| vec![door]);
        }
        config.listeners.iter().map(|(name, listener)| Self::open(name, listener, threads)).collect()
    }

    fn open(name: &str, listener: &Listener, threads: NonZeroUsize) -> Result<Self, String> {
        let address = *listener.address;
        let cannot = |error| cannot_listen(address, &error);
        if !listener.reuse_port {
            // The threads share the port, and would share it with a stranger who asked; so see that there is none.
            TcpListener::bind(address).map_err(cannot)?;
        }
        let tls = match &listener.tls {
            Some(tls) => Some(encrypt(tls).map_err(|error| format!("TLS at {address}: {error}"))?),
            None => None,
        };
        let mut server = Server::bind_per_core(address, threads)
            .map_err(cannot)?
            .max_connections(listener.max_connections.get())
            .header_timeout(listener.header_timeout)
            .handshake_timeout(listener.handshake_timeout)
            .write_timeout(listener.write_timeout)
            .keep_alive(*listener.keep_alive, listener.keep_alive_timeout)
            .max_head(usize::try_from(listener.max_header_size.0).unwrap_or(usize::MAX))
            .max_streams(listener.max_streams.get());
        if let Some(tls) = &tls {
            server = server.tls(tls.clone());
        }
        let address = server.local_addr().map_err(|error| error.to_string())?;
        let entry = listener.register.as_ref().map(|register| Entry {
            registry: register.registry.to_string(),
            definition: definition(register, address, tls.is_some(), listener.reuse_port),
        });
        Ok(Self { name: name.to_owned(), server, address, tls, entry, shared: listener.reuse_port })
    }
}

/// Why there is nobody at an address, and what may be the cause.
pub(crate) fn cannot_listen(address: SocketAddr, error: &io::Error) -> String {
    let help = match error.kind() {
        io::ErrorKind::AddrInUse => "; another program listens there",
        io::ErrorKind::PermissionDenied => "; this user may not",
        io::ErrorKind::AddrNotAvailable => "; this machine has no such address",
        _ => "",
    };
    format!("cannot listen at {address}: {error}{help}")
}

/// What a listener encrypts with.
pub(crate) fn encrypt(tls: &ListenerTls) -> Result<ServerTls, String> {
    let (chain, key) = (tls.certificate.bytes(), tls.key.bytes());
    let built = match &tls.client_ca {
        Some(ca) => {
            let clients = if tls.require_client { ClientCertificates::Required } else { ClientCertificates::Optional };
            ServerTls::with_client_authorities(chain, key, ca.bytes(), clients)
        }
        None => ServerTls::new(chain, key),
    };
    built.map_err(|error| error.to_string())
}

// === impl Renewal ===

impl Renewal {
    /// What `now` shows other than `before`, of listeners that encrypt.
    pub(crate) fn of(before: &Config, now: &Config, shown: &[(String, ServerTls)]) -> Result<Self, String> {
        let mut renewed = Vec::new();
        for (name, old) in shown {
            let tls = |config: &Config| config.listeners.get(name).and_then(|listener| listener.tls.clone());
            if let Some(tls) = tls(now).filter(|now| tls(before).as_ref() != Some(now)) {
                let new = encrypt(&tls).map_err(|error| format!("the listener {name:?}: {error}"))?;
                renewed.push((old.clone(), new));
            }
        }
        Ok(Self(renewed))
    }

    pub(crate) fn commit(self) {
        for (old, new) in self.0 {
            old.replace(&new);
        }
    }
}

// === registration ===

/// Keeps a listener registered until it is told to stop; done when it is registered no more.
pub(crate) fn register(state: &Arc<State>, entry: Entry) -> JoinHandle<()> {
    let state = state.clone();
    tokio::spawn(async move {
        if let Some((_, registration)) = keep(&state, &entry).await {
            leave(registration).await;
        }
    })
}

/// What became of registering.
enum Registered {
    /// It is done, or cannot be.
    Settled(Option<Registration>),
    /// There are other files, or it is to stop.
    Overtaken,
}

/// Where a listener is registered.
type Held = (Arc<dyn Registry>, Registration);

/// Registers in the registry of that name, and in each that other files put in its place, until it is told to stop: where it
/// is registered then. What a registry was asked for is waited for, since it may come about however late.
async fn keep(state: &State, entry: &Entry) -> Option<Held> {
    let service = &*entry.definition.service;
    let mut files = state.files();
    let mut held: Option<Held> = None;
    while !state.is_stopping() {
        files.mark_unchanged();
        match (state.running().registries.named(&entry.registry), &held) {
            (Some(registry), Some((at, _))) if Arc::ptr_eq(&registry, at) => {}
            (Some(registry), _) => {
                let Registered::Settled(registration) = registered(state, &registry, entry, &mut files).await else {
                    continue;
                };
                if let Some(registration) = registration
                    && let Some((_, old)) = held.replace((registry, registration))
                {
                    leave(old).await;
                    // It may have been the same entry of the same agent, asked in another way.
                    if let Some((_, registration)) = &held
                        && let Err(error) = registration.confirm().await
                    {
                        tracing::warn!(service, %error, "the registration could not be confirmed");
                    }
                }
            }
            (None, Some(_)) => {
                let registry = &*entry.registry;
                tracing::warn!(
                    service,
                    registry,
                    "the file has no such registry any more; registered there until the end"
                );
            }
            (None, None) => {
                let registry = &*entry.registry;
                tracing::warn!(service, registry, "the file has no such registry any more; not registered");
            }
        }
        tokio::select! {
            () = state.stopping() => {}
            changed = files.changed() => if changed.is_err() { break },
        }
    }
    held
}

async fn leave(registration: Registration) {
    let service = registration.service().clone();
    if let Err(error) = registration.deregister().await {
        tracing::warn!(service = &*service, %error, "could not deregister");
    }
}

/// Asks until it is registered, or there are other files, or it is told to stop.
async fn registered(
    state: &State,
    registry: &Arc<dyn Registry>,
    entry: &Entry,
    files: &mut Receiver<()>,
) -> Registered {
    let service = &*entry.definition.service;
    let (mut wait, most) = AGAIN;
    loop {
        match registry.register(entry.definition.clone()).await {
            Ok(registration) => return Registered::Settled(Some(registration)),
            Err(error) if error.is_invalid() || error.is_unsupported() => {
                tracing::error!(service, %error, "cannot register");
                return Registered::Settled(None);
            }
            Err(error) => {
                tracing::warn!(service, %error, ?wait, "not registered; trying again");
                // Not while it is asked, which would leave behind what comes of it.
                tokio::select! {
                    biased;
                    () = state.stopping() => return Registered::Overtaken,
                    () = tokio::time::sleep(wait.mul_f64(0.5 + fastrand::f64() / 2.0)) => {}
                    Ok(()) = files.changed() => return Registered::Overtaken,
                }
                wait = (wait * 2).min(most);
            }
        }
    }
}

fn definition(register: &Register, at: SocketAddr, encrypted: bool, shared: bool) -> ServiceDefinition {
    let address: Address = register.address.as_ref().map_or_else(|| at.into(), |address| (**address).clone());
    let id = register.id.clone().unwrap_or_else(|| {
        let id = format!("{}-{address}", register.service).replace(':', "-");
        // Whoever goes must not take off who came meanwhile; and in containers all processes may have one number.
        if shared { format!("{id}-{:08x}", fastrand::u32(..)) } else { id }
    });
    let mut instance = Instance::new(id, address.clone());
    instance.weight = register.weight;
    instance.tags = register.tags.iter().map(|tag| tag.as_str().into()).collect();
    instance.metadata =
        register.metadata.iter().map(|(key, value)| (key.as_str().into(), value.as_str().into())).collect();
    instance.scheme = if encrypted { Scheme::Https } else { Scheme::Http };
    instance.protocol = Protocol::Auto;
    instance.zone = register.zone.as_deref().map(Into::into);
    let mut definition = ServiceDefinition::of(register.service.as_str(), instance);
    if let Some(weight) = register.warning_weight {
        definition = definition.warning_weight(weight);
    }
    let Some(config::Check(asked)) = &register.check else { return definition };
    let check = match (&asked.http, &asked.grpc) {
        (Some(url), _) => HealthCheck::http(url),
        (None, Some(target)) => HealthCheck::grpc(target),
        (None, None) => HealthCheck::tcp(address.to_string()),
    };
    // It listens already: well until seen otherwise.
    let mut check =
        check.interval(asked.interval).in_a_row(asked.passes.get(), asked.failures.get()).initial(Health::Passing);
    if let Some(timeout) = asked.timeout {
        check = check.timeout(timeout);
    }
    if let Some(after) = &register.forget_after {
        check = check.deregister_critical_after(**after);
    }
    definition.check(check)
}
