//! Where instances come from: lists of the file, and registries, kept from one file to the next.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::stream;
use portcullis::discovery::{
    ConsulConfig, ConsulRegistry, DiscoveryLayer, DnsRegistry, FileRegistry, Pending, Registration, Registry,
    ServiceDefinition, Watch,
};
use portcullis_core::{Instance, Protocol, Scheme};
use tokio::sync::watch;

use super::{Change, Error};
use crate::config::{self, Config, Protocol as Speaks, RegistryKind};

/// The registries of a file, and the lists of its services.
#[derive(Default)]
pub(super) struct Registries {
    named: BTreeMap<String, (config::Registry, Arc<dyn Registry>)>,
    sources: BTreeMap<String, Source>,
}

/// Where one service's instances come from.
#[derive(Clone)]
enum Source {
    /// The file lists them.
    Listed(Listed, Vec<Instance>),
    /// A registry knows them.
    Named { registry: Arc<dyn Registry>, registered: String },
}

/// Instances that the file lists. Another file may list others: who stays keeps its handle.
#[derive(Clone, Debug)]
struct Listed(Arc<watch::Sender<Vec<Instance>>>);

// === impl Registries ===

impl Registries {
    pub(super) fn build(config: &Config, before: Option<&Self>) -> Result<Self, Error> {
        let mut named = BTreeMap::new();
        for (name, registry) in &config.registries {
            let kept = before.and_then(|before| before.named.get(name)).filter(|(old, _)| *old == **registry);
            let built = match kept {
                Some((_, kept)) => kept.clone(),
                None => build(registry).map_err(|Error(why)| Error::of(format_args!("the registry {name:?}"), why))?,
            };
            named.insert(name.clone(), ((**registry).clone(), built));
        }
        let sources = before.map(|before| before.sources.clone()).unwrap_or_default();
        Ok(Self { named, sources })
    }

    /// The layer that finds a service's endpoints, the old one if that finds them in the same place; and what the service
    /// is called there.
    pub(super) fn discovery(
        &mut self,
        name: &str,
        service: &config::Service,
        old: Option<&DiscoveryLayer>,
    ) -> (DiscoveryLayer, String) {
        let known = service.registry.as_ref().and_then(|registry| self.named.get(&**registry));
        let Some((registry_config, registry)) = known else {
            let instances: Vec<Instance> =
                service.endpoints.iter().map(|endpoint| instance(&endpoint.0, service)).collect();
            if let (Some(old), Some(Source::Listed(listed, _))) = (old, self.sources.get(name)) {
                let listed = listed.clone();
                self.sources.insert(name.to_owned(), Source::Listed(listed, instances));
                return (old.clone(), name.to_owned());
            }
            let listed = Listed(Arc::new(watch::Sender::new(instances.clone())));
            self.sources.insert(name.to_owned(), Source::Listed(listed.clone(), instances));
            return (DiscoveryLayer::new(listed), name.to_owned());
        };
        let registered = service.registered_as.clone().unwrap_or_else(|| name.to_owned());
        if let (Some(old), Some(Source::Named { registry: before, registered: was })) = (old, self.sources.get(name))
            && Arc::ptr_eq(before, registry)
            && *was == registered
        {
            return (old.clone(), name.to_owned());
        }
        let renamed = Renamed { registry: registry.clone(), to: registered.as_str().into() };
        let mut layer = DiscoveryLayer::new(renamed);
        if let Some(age) = registry_config.max_age {
            layer = layer.max_age(age);
        }
        self.sources.insert(name.to_owned(), Source::Named { registry: registry.clone(), registered });
        (layer, name.to_owned())
    }

    /// Has the lists changed when the file takes effect.
    pub(super) fn commit(&self, commit: &mut Vec<Change>) {
        for source in self.sources.values() {
            if let Source::Listed(Listed(list), instances) = source
                && *list.borrow() != *instances
            {
                let (list, instances) = (list.clone(), instances.clone());
                commit.push(Box::new(move || drop(list.send_replace(instances))));
            }
        }
    }
}

fn instance(endpoint: &config::EndpointTable, service: &config::Service) -> Instance {
    let address = (*endpoint.address).clone();
    let mut instance = Instance::new(address.to_string(), address);
    instance.weight = endpoint.weight;
    instance.priority = endpoint.priority;
    instance.zone = endpoint.zone.as_deref().map(Into::into);
    instance.scheme = if service.https { Scheme::Https } else { Scheme::Http };
    instance.protocol = match service.protocol {
        Speaks::Auto => Protocol::Auto,
        Speaks::Http1 => Protocol::Http1,
        Speaks::Http2 => Protocol::Http2,
    };
    instance
}

fn build(registry: &config::Registry) -> Result<Arc<dyn Registry>, Error> {
    match *registry.kind {
        RegistryKind::Consul => {
            let wrong = |error: portcullis::discovery::Error| Error(error.to_string());
            let address = registry.address.as_ref().map_or("http://127.0.0.1:8500", |address| address.as_str());
            let mut config = ConsulConfig::new(address).map_err(wrong)?;
            if let Some(token) = &registry.token {
                config = config.token(token.reveal()).map_err(wrong)?;
            }
            if let Some(datacenter) = &registry.datacenter {
                config = config.datacenter(datacenter);
            }
            if let Some(tag) = &registry.tag {
                config = config.tag(tag);
            }
            if let Some(ca) = &registry.ca {
                config = config.certificate_authorities(ca.bytes());
            }
            Ok(Arc::new(ConsulRegistry::new(config).map_err(wrong)?))
        }
        RegistryKind::Dns => {
            let wrong = |error: portcullis::discovery::Error| Error(error.to_string());
            let dns = registry.port.map_or_else(DnsRegistry::srv, DnsRegistry::addresses).map_err(wrong)?;
            let server = registry.address.as_ref().and_then(|address| address.parse().ok());
            Ok(Arc::new(match server {
                Some(server) => dns.server(server).map_err(wrong)?,
                None => dns,
            }))
        }
        RegistryKind::File => match &registry.path {
            Some(path) => Ok(Arc::new(FileRegistry::new(path.as_str()))),
            None => Err(Error(String::from("no path"))),
        },
    }
}

// === impl Listed ===

impl Registry for Listed {
    fn watch(&self, _: &Arc<str>) -> Watch {
        let mut receiver = self.0.subscribe();
        receiver.mark_changed();
        Watch::new(stream::unfold(receiver, async |mut receiver| {
            receiver.changed().await.ok()?;
            let instances = receiver.borrow_and_update().clone();
            Some((Ok(instances), receiver))
        }))
    }
}

/// A registry that calls a service by another name.
struct Renamed {
    registry: Arc<dyn Registry>,
    to: Arc<str>,
}

impl Registry for Renamed {
    fn watch(&self, _: &Arc<str>) -> Watch {
        self.registry.watch(&self.to)
    }

    fn register(&self, definition: ServiceDefinition) -> Pending<Registration> {
        self.registry.register(definition)
    }
}
