//! Where instances come from: lists of the file, and registries, kept from one file to the next.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt as _, stream};
use portcullis::discovery::consul::Consistency;
use portcullis::discovery::{ConsulConfig, ConsulRegistry, DiscoveryLayer, DnsRegistry, EmbeddedRegistry, Fallback};
use portcullis::discovery::{
    FileRegistry, Merged, Pending, Registration, Registry, Remembered, ServiceDefinition, Watch,
};
use portcullis_core::{Instance, Protocol, Scheme};
use tokio::sync::watch;

use super::{Change, Error};
use crate::config::{self, Config, RegistryKind};

/// The registries of a file, and the lists of its services.
#[derive(Default)]
pub(crate) struct Registries {
    named: BTreeMap<String, (config::Registry, Arc<dyn Registry>)>,
    sources: BTreeMap<String, Source>,
    /// Layers, those before them that know the same services, and how these are talked to now.
    succeeding: Vec<(DiscoveryLayer, DiscoveryLayer, Speaks)>,
}

/// Where one service's instances come from.
#[derive(Clone)]
enum Source {
    /// The file lists them.
    Listed(Listed, Vec<Instance>),
    /// Registries know them, by this name.
    Named(Place, String),
}

/// Registries, and how they are asked.
#[derive(Clone)]
struct Place {
    /// All of them together, the last one perhaps only where the others know none.
    registries: Vec<Arc<dyn Registry>>,
    had_fallback: bool,
    times: Times,
    speaks: Speaks,
}

/// What a service's table says of how endpoints are talked to; a registry's word counts where it says nothing.
#[derive(Clone, Copy, PartialEq)]
struct Speaks {
    https: bool,
    protocol: config::Protocol,
}

/// What a registry's table says of the layer rather than of the registry.
#[derive(Clone, Copy, PartialEq)]
struct Times {
    max_age: Option<Duration>,
    first_wait: Option<Duration>,
}

/// Instances that the file lists. Another file may list others: who stays keeps its handle.
#[derive(Clone, Debug)]
struct Listed(Arc<watch::Sender<Vec<Instance>>>);

// === impl Registries ===

impl Registries {
    pub(super) fn build(config: &Config, before: Option<&Self>) -> Result<Self, Error> {
        let mut named = BTreeMap::new();
        for (name, registry) in &config.registries {
            let kept = before.and_then(|before| before.named.get(name)).filter(|(old, _)| is_same(old, registry));
            let built = match kept {
                Some((_, kept)) => kept.clone(),
                None => build(registry).map_err(|Error(why)| Error::of(format_args!("the registry {name:?}"), why))?,
            };
            named.insert(name.clone(), ((**registry).clone(), built));
        }
        let mut sources = before.map(|before| before.sources.clone()).unwrap_or_default();
        sources.retain(|name, _| config.services.contains_key(name));
        Ok(Self { named, sources, succeeding: Vec::new() })
    }

    /// The layer that finds a service's endpoints, the old one if that finds them in the same place.
    pub(super) fn discovery(
        &mut self,
        name: &str,
        service: &config::Service,
        old: Option<&DiscoveryLayer>,
    ) -> DiscoveryLayer {
        let names = service.registry.iter().chain(&service.fallback);
        let known: Vec<_> = names.filter_map(|name| self.named.get(&**name)).collect();
        let Some((first, _)) = known.first() else {
            let instances: Vec<Instance> =
                service.endpoints.iter().map(|endpoint| instance(&endpoint.0, service)).collect();
            if let (Some(old), Some(Source::Listed(listed, _))) = (old, self.sources.get(name)) {
                let listed = listed.clone();
                self.sources.insert(name.to_owned(), Source::Listed(listed, instances));
                return old.clone();
            }
            let listed = Listed(Arc::new(watch::Sender::new(instances.clone())));
            self.sources.insert(name.to_owned(), Source::Listed(listed.clone(), instances));
            return follower(listed);
        };
        let registered = service.registered_as.clone().unwrap_or_else(|| name.to_owned());
        let registries = known.iter().map(|(_, registry)| registry.clone()).collect();
        let (had_fallback, speaks) = (service.fallback.is_some(), Speaks::of(service));
        let place = Place { registries, had_fallback, times: Times::of(first), speaks };
        let before = match self.sources.get(name) {
            Some(Source::Named(before, called)) if *called == registered => old.map(|old| (old, before)),
            _ => None,
        };
        if let Some((old, before)) = before
            && before.is(&place)
        {
            return old.clone();
        }
        let layer = place.layer(&registered);
        if let Some((old, _)) = before {
            self.succeeding.push((layer.clone(), old.clone(), speaks));
        }
        self.sources.insert(name.to_owned(), Source::Named(place, registered));
        layer
    }

    /// The registry of that name.
    pub(crate) fn named(&self, name: &str) -> Option<Arc<dyn Registry>> {
        self.named.get(name).map(|(_, registry)| registry.clone())
    }

    /// Those in this process, by name.
    pub(crate) fn embedded(&self) -> impl Iterator<Item = (&str, &Arc<dyn Registry>)> {
        let embedded = self.named.iter().filter(|(_, (config, _))| *config.kind == RegistryKind::Embedded);
        embedded.map(|(name, (_, registry))| (name.as_str(), registry))
    }

    /// When the file takes effect, has the lists changed, and layers begin with what those before them know.
    pub(super) fn commit(&mut self, commit: &mut Vec<Change>) {
        for (new, old, speaks) in self.succeeding.drain(..) {
            commit.push(Box::new(move || new.take_over_telling(&old, |instance| speaks.tell(instance))));
        }
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

/// A layer for one service of the file. It is followed for as long as the file has it, asked for or not: whether the gateway
/// is ready hangs on it, and what operators did to its endpoints stays.
fn follower(registry: impl Registry) -> DiscoveryLayer {
    DiscoveryLayer::new(registry).idle(Duration::MAX)
}

/// Whether both are the same registry, however long what it said is believed.
fn is_same(one: &config::Registry, other: &config::Registry) -> bool {
    let asked_alike = |one: &config::Registry| {
        let mut one = one.clone();
        (one.max_age, one.first_wait) = (None, None);
        one
    };
    asked_alike(one) == asked_alike(other)
}

fn instance(endpoint: &config::EndpointTable, service: &config::Service) -> Instance {
    let address = (*endpoint.address).clone();
    let mut instance = Instance::new(address.to_string(), address);
    instance.weight = endpoint.weight;
    instance.priority = endpoint.priority;
    instance.zone = endpoint.zone.as_deref().map(Into::into);
    instance.tags = endpoint.tags.iter().map(|tag| tag.as_str().into()).collect();
    instance.metadata =
        endpoint.metadata.iter().map(|(key, value)| (key.as_str().into(), value.as_str().into())).collect();
    Speaks::of(service).tell(&mut instance);
    instance
}

fn build(registry: &config::Registry) -> Result<Arc<dyn Registry>, Error> {
    let built: Arc<dyn Registry> = match *registry.kind {
        RegistryKind::Consul => Arc::new(consul(registry).map_err(|error| Error(error.to_string()))?),
        RegistryKind::Dns => Arc::new(dns(registry).map_err(|error| Error(error.to_string()))?),
        RegistryKind::Embedded => Arc::new(EmbeddedRegistry::new()),
        RegistryKind::File => match &registry.path {
            Some(path) => Arc::new(FileRegistry::new(path.path())),
            None => return Err(Error(String::from("no path"))),
        },
    };
    Ok(match &registry.remember {
        Some(file) => Arc::new(Remembered::new(built, file.path())),
        None => built,
    })
}

fn consul(registry: &config::Registry) -> Result<ConsulRegistry, portcullis::discovery::Error> {
    let address = registry.address.as_ref().map_or("http://127.0.0.1:8500", |address| address.as_str());
    let mut config =
        ConsulConfig::new(address)?.include_warning(registry.include_warning).consistency(match registry.consistency {
            config::Consistency::Default => Consistency::Default,
            config::Consistency::Consistent => Consistency::Consistent,
            config::Consistency::Stale => Consistency::Stale,
            config::Consistency::Cached => Consistency::Cached,
        });
    if let Some(token) = &registry.token {
        config = config.token(token.reveal())?;
    }
    if let Some(datacenter) = &registry.datacenter {
        config = config.datacenter(datacenter);
    }
    if let Some(namespace) = &registry.namespace {
        config = config.namespace(namespace);
    }
    if let Some(partition) = &registry.partition {
        config = config.partition(partition);
    }
    for tag in &registry.tag {
        config = config.tag(tag);
    }
    if let Some(filter) = &registry.filter {
        config = config.filter(filter);
    }
    if let Some(tag) = &registry.tagged_address {
        config = config.tagged_address(tag);
    }
    if let Some(node) = &registry.near {
        config = config.near(node);
    }
    if let Some(wait) = registry.wait {
        config = config.wait(wait);
    }
    if let Some(timeout) = registry.timeout {
        config = config.timeout(timeout);
    }
    if let Some(timeout) = registry.connect_timeout {
        config = config.connect_timeout(timeout);
    }
    if let Some(every) = registry.resync {
        config = config.resync(every);
    }
    if let Some(bytes) = registry.max_body {
        config = config.max_body(usize::try_from(bytes.0).unwrap_or(usize::MAX));
    }
    if let Some(connections) = registry.connections {
        config = config.connections(connections.get());
    }
    if let Some(ca) = &registry.ca {
        config = config.certificate_authorities(ca.bytes());
    }
    if let (Some(certificate), Some(key)) = (&registry.certificate, &registry.key) {
        config = config.client_certificate(certificate.bytes(), key.bytes());
    }
    ConsulRegistry::new(config)
}

fn dns(registry: &config::Registry) -> Result<DnsRegistry, portcullis::discovery::Error> {
    let mut dns = registry.port.map_or_else(DnsRegistry::srv, DnsRegistry::addresses)?;
    if let Some(server) = registry.address.as_ref().and_then(|address| address.parse().ok()) {
        dns = dns.server(server)?;
    }
    if let Some(floor) = registry.floor {
        dns = dns.floor(floor);
    }
    Ok(match &registry.pattern {
        Some(pattern) => dns.pattern(pattern.as_str()),
        None => dns,
    })
}

// === impl Place ===

impl Place {
    fn is(&self, other: &Self) -> bool {
        self.registries.len() == other.registries.len()
            && self.registries.iter().zip(&other.registries).all(|(a, b)| Arc::ptr_eq(a, b))
            && (self.had_fallback, self.times, self.speaks) == (other.had_fallback, other.times, other.speaks)
    }

    /// The layer that finds there what is registered by this name.
    fn layer(&self, registered: &str) -> DiscoveryLayer {
        let mut layer = follower(Told { registry: self.together(), name: registered.into(), speaks: self.speaks });
        if let Some(age) = self.times.max_age {
            layer = layer.max_age(age);
        }
        if let Some(wait) = self.times.first_wait {
            layer = layer.first_wait(wait);
        }
        layer
    }

    /// What the registries know, the last one only where the others know none if it is a fallback.
    fn together(&self) -> Arc<dyn Registry> {
        let (first, last) = match self.registries.split_last() {
            Some((last, first)) if self.had_fallback => (first, Some(last)),
            _ => (&*self.registries, None),
        };
        let merged: Arc<dyn Registry> = match first {
            [one] => one.clone(),
            several => Arc::new(Merged::new(several.iter().cloned())),
        };
        match last {
            Some(last) => Arc::new(Fallback::new(merged, last.clone())),
            None => merged,
        }
    }
}

// === impl Speaks ===

impl Speaks {
    fn of(service: &config::Service) -> Self {
        Self { https: service.https, protocol: service.protocol }
    }

    fn tell(self, instance: &mut Instance) {
        if self.https {
            instance.scheme = Scheme::Https;
        }
        match self.protocol {
            config::Protocol::Auto => {}
            config::Protocol::Http1 => instance.protocol = Protocol::Http1,
            config::Protocol::Http2 => instance.protocol = Protocol::Http2,
        }
    }
}

// === impl Times ===

impl Times {
    fn of(registry: &config::Registry) -> Self {
        let time = |time: &Option<config::At<Duration>>| time.as_ref().map(|time| **time);
        Self { max_age: time(&registry.max_age), first_wait: time(&registry.first_wait) }
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

/// A registry that calls a service by another name, and is told what its instances speak.
struct Told {
    registry: Arc<dyn Registry>,
    name: Arc<str>,
    speaks: Speaks,
}

impl Registry for Told {
    fn watch(&self, _: &Arc<str>) -> Watch {
        let speaks = self.speaks;
        Watch::new(self.registry.watch(&self.name).map(move |answer| {
            answer.map(|mut instances| {
                instances.iter_mut().for_each(|instance| speaks.tell(instance));
                instances
            })
        }))
    }

    fn register(&self, definition: ServiceDefinition) -> Pending<Registration> {
        self.registry.register(definition)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// It began with nothing known, so that requests were refused until the registry answered.
    #[tokio::test]
    async fn what_is_known_is_talked_to_otherwise_when_the_file_says_so() {
        let config = |says: &str| {
            let text = format!(
                "registries.r.kind = \"embedded\"\nservices.a = {{ registry = \"r\"{says} }}\n[[routes]]\npath = \"/\"\nto = \"a\"\n"
            );
            Config::parse("gateway.toml", &text, Path::new("/"), &|_| None).unwrap()
        };
        let (plain, other) = (config(""), config(", https = true, protocol = \"http1\""));
        let mut before = Registries::build(&plain, None).unwrap();
        let old = before.discovery("a", &plain.services["a"], None);
        let address: portcullis_core::Address = "127.0.0.1:9".parse().unwrap();
        let _registration =
            before.named("r").unwrap().register(ServiceDefinition::new("a", "1", address)).await.unwrap();
        old.follow("a");
        old.ready().await;
        let mut after = Registries::build(&other, Some(&before)).unwrap();
        let new = after.discovery("a", &other.services["a"], Some(&old));
        let mut commit = Vec::new();
        after.commit(&mut commit);
        commit.into_iter().for_each(|change| change());
        let [status] = new.status().try_into().unwrap();
        let [endpoint] = status.endpoints.as_deref().unwrap() else { panic!("it is not known any more") };
        let instance = endpoint.instance();
        assert_eq!((instance.scheme, instance.protocol), (Scheme::Https, Protocol::Http1));
    }

    #[test]
    fn a_service_that_is_gone_keeps_no_registry() {
        let config = |services: &[&str]| {
            let mut text = String::from("registries.r.kind = \"embedded\"\n");
            for name in services {
                text.push_str(&format!("services.{name}.registry = \"r\"\n"));
            }
            text.push_str("[[routes]]\npath = \"/\"\nto = \"a\"\n");
            Config::parse("gateway.toml", &text, Path::new("/"), &|_| None).unwrap()
        };
        let (both, one) = (config(&["a", "b"]), config(&["a"]));
        let mut before = Registries::build(&both, None).unwrap();
        for (name, service) in &both.services {
            before.discovery(name, service, None);
        }
        let after = Registries::build(&one, Some(&before)).unwrap();
        assert_eq!(after.sources.keys().collect::<Vec<_>>(), ["a"]);
    }
}
