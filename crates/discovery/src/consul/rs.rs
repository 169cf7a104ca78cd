//! What the crate `rs-consul` is sound for, behind a fence.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::client::legacy;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use portcullis_core::Address;
use rs_consul::{
    ConsulError, DeregisterEntityPayload, ReadKeyRequest, RegisterEntityCheck, RegisterEntityPayload,
    RegisterEntityService,
};

use super::{ConsulConfig, ConsulRegistry, Origin};
use crate::registry::Pending;
use crate::{Error, Health, Membership, Registration, Registry, ServiceDefinition, Watch};

/// Consul's catalog and key-value store, through the crate `rs-consul`: what is not about the agent beside us.
///
/// As a [`Registry`] it registers *external* services, of machines without an agent, straight in the catalog: each instance
/// becomes a node of its own, nobody runs its checks, and it stays until it is deregistered. Never use it for a process
/// beside an agent, which would take the entry off again; that is [`ConsulRegistry`]'s. Watches are [`ConsulRegistry`]'s
/// as well: the crate does not show whether a leader was known or what a token could not read, so that its "none" proves
/// nothing, and it leaves out weights, metadata and checks.
///
/// The fence: connections of our own (pooled, with the certificates of the [`ConsulConfig`] and an explicit provider), one
/// deadline for each whole call, names encoded before the crate sees them, and no way to print its configuration, which
/// holds the token.
#[derive(Clone)]
pub struct RsConsul {
    rs: Arc<rs_consul::Consul>,
    registry: ConsulRegistry,
    timeout: Duration,
}

/// An external instance in the catalog.
struct External {
    catalog: RsConsul,
    definition: ServiceDefinition,
    address: String,
    port: u16,
    registered: bool,
}

// === impl RsConsul ===

impl RsConsul {
    /// The catalog behind the agent that `config` names.
    ///
    /// # Errors
    ///
    /// As [`ConsulRegistry::new`]; [`Error::is_unsupported`] for a Unix socket, which the crate cannot use.
    pub fn new(config: ConsulConfig) -> Result<Self, Error> {
        if let Origin::Unix(_) = &*config.origin {
            return Err(Error::unsupported("the catalog cannot be reached over a Unix socket"));
        }
        let tls = match &*config.origin {
            Origin::Tcp { https: true, .. } => {
                let mut tls = rustls::ClientConfig::clone(&*config.tls.client()?);
                // The connector names the protocols it speaks by itself.
                tls.alpn_protocols.clear();
                tls
            }
            Origin::Tcp { .. } | Origin::Unix(_) => {
                rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                    .with_safe_default_protocol_versions()
                    .map_err(|error| Error::invalid("TLS cannot be set up").with_source(error))?
                    .with_root_certificates(rustls::RootCertStore::empty())
                    .with_no_client_auth()
            }
        };
        let connector = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1().build();
        let mut builder = legacy::Client::builder(TokioExecutor::new());
        builder.pool_timer(TokioTimer::new()).pool_idle_timeout(Duration::from_secs(60)).pool_max_idle_per_host(4);
        let token = config.token.as_ref().and_then(|token| token.to_str().ok()).map(str::to_owned);
        let theirs = rs_consul::Config { address: config.origin.to_string(), token, hyper_builder: builder.clone() };
        let rs = rs_consul::Consul::new_with_client(theirs, builder.build(connector));
        let timeout = config.timeout;
        Ok(Self { rs: Arc::new(rs), registry: ConsulRegistry::new(config)?, timeout })
    }

    /// The names of all services in the catalog, sorted.
    ///
    /// # Errors
    ///
    /// When the catalog cannot be read.
    pub async fn services(&self) -> Result<Vec<String>, Error> {
        let datacenter = self.registry.0.config.datacenter.as_deref().map(encode);
        let options =
            rs_consul::QueryOptions { datacenter, timeout: Some(self.timeout), ..rs_consul::QueryOptions::default() };
        let mut names = self.within(self.rs.get_all_registered_service_names(Some(options))).await?.response;
        names.sort();
        Ok(names)
    }

    /// The text under a key of the key-value store; `None` when there is no such key. All keys below it must be text as
    /// well, for the crate reads them too.
    ///
    /// # Errors
    ///
    /// When the store cannot be read, or the value is no text.
    pub async fn value(&self, key: &str) -> Result<Option<String>, Error> {
        let encoded = key.split('/').map(encode).collect::<Vec<_>>().join("/");
        // Never with a datacenter, with which the crate writes and reads another key.
        let request = ReadKeyRequest::builder().key(&encoded).build();
        let read = async {
            match self.rs.read_key(request).await {
                Err(ConsulError::UnexpectedResponseCode(status, _)) if status == http::StatusCode::NOT_FOUND => {
                    Ok(None)
                }
                Err(error) => Err(error),
                // It asks with `recurse=false`, which Consul takes for a yes: keys below this one come as well.
                Ok(found) => {
                    Ok(found.response.into_iter().find(|entry| entry.key == key).and_then(|entry| entry.value))
                }
            }
        };
        self.within(read).await
    }

    /// One deadline for the whole, and errors in our words.
    async fn within<T>(&self, call: impl Future<Output = Result<T, ConsulError>>) -> Result<T, Error> {
        let late = |_| Err(Error::unavailable("the catalog did not answer in time"));
        tokio::time::timeout(self.timeout, async { call.await.map_err(error) }).await.unwrap_or_else(late)
    }
}

fn encode(text: impl AsRef<str>) -> String {
    utf8_percent_encode(text.as_ref(), NON_ALPHANUMERIC).to_string()
}

fn error(error: ConsulError) -> Error {
    match &error {
        ConsulError::UnexpectedResponseCode(status, _) if matches!(status.as_u16(), 401 | 403) => {
            Error::denied("the catalog does not let us").with_source(error)
        }
        ConsulError::UnexpectedResponseCode(_, Some(text)) if text.contains("No cluster leader") => {
            Error::no_leader("the registry has no leader").with_source(error)
        }
        _ => Error::unavailable("the catalog cannot be used").with_source(error),
    }
}

impl Registry for RsConsul {
    fn watch(&self, service: &Arc<str>) -> Watch {
        self.registry.watch(service)
    }

    fn register(&self, definition: ServiceDefinition) -> Pending<Registration> {
        let catalog = self.clone();
        Box::pin(async move {
            let (address, port) = match &definition.instance.address {
                Address::Socket(address) => (address.ip().to_string(), address.port()),
                Address::Name(host, port) => (host.to_string(), *port),
                _ => return Err(Error::invalid("an external service needs an address and a port")),
            };
            let (service, id) = (definition.service.clone(), definition.instance.id.clone());
            if service.is_empty() || id.is_empty() {
                return Err(Error::invalid("a registration needs a service and an id"));
            }
            // From now on: it may arrive although the answer does not, or nobody waits for that.
            let external = External { catalog, definition, address, port, registered: true };
            external.put(Health::Passing, String::new()).await?;
            tracing::info!(service = &*service, id = &*id, "registered in the catalog");
            Ok(Registration::new(service, id, external))
        })
    }
}

impl fmt::Debug for RsConsul {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RsConsul").field(&self.registry).finish()
    }
}

// === impl External ===

impl External {
    fn node(&self) -> String {
        format!("external-{}", self.definition.instance.id)
    }

    fn put(&self, health: Health, note: String) -> impl Future<Output = Result<(), Error>> + Send + use<> {
        let (instance, namespace) = (&self.definition.instance, self.catalog.registry.0.config.namespace.clone());
        let service = RegisterEntityService {
            ID: Some(instance.id.to_string()),
            Service: self.definition.service.to_string(),
            Tags: instance.tags.clone(),
            TaggedAddresses: HashMap::new(),
            Meta: super::answer::meta(instance).into_iter().collect(),
            Port: Some(self.port),
            Namespace: namespace,
        };
        let check = RegisterEntityCheck {
            Node: None,
            CheckID: Some(format!("external:{}", instance.id)),
            Name: "reported".to_owned(),
            Notes: Some(note),
            Status: Some(super::register::status(health).to_owned()),
            ServiceID: Some(instance.id.to_string()),
            Definition: HashMap::new(),
        };
        let payload = RegisterEntityPayload {
            ID: None,
            Node: self.node(),
            Address: self.address.clone(),
            Datacenter: self.catalog.registry.0.config.datacenter.clone(),
            TaggedAddresses: HashMap::new(),
            NodeMeta: HashMap::from([("external-node".to_owned(), "true".to_owned())]),
            Service: Some(service),
            Checks: vec![check],
            SkipNodeUpdate: None,
        };
        let catalog = self.catalog.clone();
        async move { catalog.within(catalog.rs.register_entity(&payload)).await }
    }

    fn remove(&self) -> impl Future<Output = Result<(), Error>> + Send + use<> {
        let config = &self.catalog.registry.0.config;
        let payload = DeregisterEntityPayload {
            Node: Some(self.node()),
            Datacenter: config.datacenter.clone(),
            CheckID: None,
            ServiceID: None,
            Namespace: config.namespace.clone(),
        };
        let catalog = self.catalog.clone();
        async move { catalog.within(catalog.rs.deregister_entity(&payload)).await }
    }
}

impl Membership for External {
    fn deregister(mut self: Box<Self>) -> Pending<()> {
        Box::pin(async move {
            let removed = self.remove().await;
            // If not, or not yet when this is given up, it is tried once more.
            self.registered = removed.is_err();
            removed
        })
    }

    fn maintenance(&self, reason: Option<String>) -> Pending<()> {
        let health = if reason.is_some() { Health::Critical } else { Health::Passing };
        Box::pin(self.put(health, reason.unwrap_or_default()))
    }

    fn report(&self, health: Health, note: String) -> Pending<()> {
        Box::pin(self.put(health, note))
    }
}

impl Drop for External {
    fn drop(&mut self) {
        if let (true, Ok(runtime)) = (self.registered, tokio::runtime::Handle::try_current()) {
            let removing = self.remove();
            runtime.spawn(async move {
                if let Err(error) = removing.await {
                    tracing::warn!(%error, "could not deregister a dropped external registration");
                }
            });
        }
    }
}
