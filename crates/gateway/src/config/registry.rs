//! Where instances are found.

use std::num::NonZeroUsize;
use std::time::Duration;

use super::mistake::Notes;
use super::plain::{Bytes, Map};
use super::read::At;
use super::secret::{Blob, Place, Secret, pem};
use super::section::{section, words};
use super::service::Service;

section! {
    /// Where instances are found.
    pub struct Registry {
        /// What it is.
        kind: At<RegistryKind>,
        /// Consul: the agent. DNS: a name server, instead of the system's.
        address: Option<At<String>>,
        /// Consul: the token to read with.
        token: Option<Secret>,
        /// Consul: the data centre, instead of the agent's own.
        datacenter: Option<String>,
        /// Consul Enterprise: the namespace.
        namespace: Option<String>,
        /// Consul Enterprise: the partition.
        partition: Option<String>,
        /// Consul: only instances with this tag; of several, with all.
        tag: Vec<String>,
        /// Consul: only instances that this expression is true of, such as "Service.Meta.version == 2".
        filter: Option<String>,
        /// Consul: the address that instances have under this name, where they have one.
        tagged_address: Option<String>,
        /// Consul: who may answer.
        consistency: Consistency = Consistency::Default,
        /// Consul: has instances sorted by their distance from this node; "_agent" is the agent's own.
        near: Option<String>,
        /// Consul: how long a question may wait for news, up to ten minutes; "30s" by default.
        wait: Option<Duration>,
        /// Consul: how long other answers may take; "5s" by default.
        timeout: Option<Duration>,
        /// Consul: how long connecting may take; "2s" by default.
        connect_timeout: Option<Duration>,
        /// Consul: how often what was registered is looked after; "10s" by default.
        resync: Option<Duration>,
        /// Consul: how large an answer may be; 16 MiB by default.
        max_body: Option<Bytes>,
        /// Consul: how many connections watches may use; 128 by default.
        connections: Option<NonZeroUsize>,
        /// Consul: also takes instances one of whose checks warns.
        include_warning: bool = false,
        /// Consul: authorities of an agent that speaks TLS, as PEM.
        ca: Option<At<Blob>>,
        /// Consul: a certificate to show it, as PEM.
        certificate: Option<At<Blob>>,
        /// Consul: its private key, as PEM.
        key: Option<At<Blob>>,
        /// DNS: the port of all instances. Without, SRV records say it.
        port: Option<u16>,
        /// DNS: the name to look up, with {} where the service's belongs, such as "{}.default.svc.cluster.local".
        pattern: Option<At<String>>,
        /// DNS: how soon a name is looked up again at the earliest; "5s" by default.
        floor: Option<Duration>,
        /// File: the file with the instances.
        path: Option<At<Place>>,
        /// How long endpoints are used while the registry does not answer. By default for ever.
        max_age: Option<At<Duration>>,
        /// How long a request waits for the first answer; "1s" by default.
        first_wait: Option<At<Duration>>,
        /// A file that remembers what the registry said, for a start while it does not answer.
        remember: Option<Place>,
    }
}

words! {
    /// Kinds of registry.
    pub enum RegistryKind {
        /// A Consul agent.
        Consul = "consul",
        /// Names looked up in DNS.
        Dns = "dns",
        /// In this process: instances are registered at the operator's side, see there.
        Embedded = "embedded",
        /// A file that is read again when it changes.
        File = "file",
    }
}

words! {
    /// Who answers for Consul.
    pub enum Consistency {
        /// The leader.
        Default = "default",
        /// The leader, after it made sure that it still is.
        Consistent = "consistent",
        /// Any server.
        Stale = "stale",
        /// The agent's cache.
        Cached = "cached",
    }
}

impl Registry {
    /// Notes what counts only of the first registry of a service, in one that is none's first and some's other.
    pub(super) fn check_times(&self, name: &str, services: &Map<At<Service>>, notes: &mut Notes<'_>) {
        let is_first = |service: &Service| service.registry.first().is_some_and(|first| **first == *name);
        let is_other = |service: &Service| {
            service.registry.iter().skip(1).chain(&service.fallback).any(|registry| **registry == *name)
        };
        if services.values().any(|service| is_first(service)) || !services.values().any(|service| is_other(service)) {
            return;
        }
        for (key, time) in [("max_age", &self.max_age), ("first_wait", &self.first_wait)] {
            if let Some(time) = time {
                let what = format!("{key} of a registry that is no service's first");
                notes.push(&time.span, what, "say it of the one that stands first");
            }
        }
    }

    pub(super) fn check(&self, notes: &mut Notes<'_>) {
        let kind = *self.kind;
        match kind {
            RegistryKind::Consul => {
                if let Some(address) = &self.address
                    && !["http://", "https://", "unix:///"].iter().any(|scheme| address.starts_with(scheme))
                {
                    let what = format!("{:?} is no URL of an agent", **address);
                    notes.push(&address.span, what, "such as \"http://127.0.0.1:8500\"");
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
                notes.push(&self.kind.span, "not said which file", "add path = \"instances.json\"");
            }
            RegistryKind::File | RegistryKind::Embedded => {
                if let Some(address) = &self.address {
                    let what = "only a registry of the kind \"consul\" or \"dns\" has an address";
                    notes.push(&address.span, what, "remove it");
                }
            }
        }
        let mut only = |here: bool, span: Option<&std::ops::Range<usize>>, key: &str, kind: &str| {
            if let (false, Some(span)) = (here, span) {
                notes.push(span, format!("only a registry of the kind {kind:?} has {key}"), "remove it");
            }
        };
        only(kind == RegistryKind::File, self.path.as_ref().map(|at| &at.span), "a path", "file");
        only(kind == RegistryKind::Dns, self.pattern.as_ref().map(|at| &at.span), "a pattern", "dns");
        only(kind == RegistryKind::Consul, self.ca.as_ref().map(|at| &at.span), "a ca", "consul");
        let consul = [
            ("token", self.token.is_some()),
            ("datacenter", self.datacenter.is_some()),
            ("namespace", self.namespace.is_some()),
            ("partition", self.partition.is_some()),
            ("tag", !self.tag.is_empty()),
            ("filter", self.filter.is_some()),
            ("tagged_address", self.tagged_address.is_some()),
            ("consistency", self.consistency != Consistency::Default),
            ("near", self.near.is_some()),
            ("wait", self.wait.is_some()),
            ("timeout", self.timeout.is_some()),
            ("connect_timeout", self.connect_timeout.is_some()),
            ("resync", self.resync.is_some()),
            ("max_body", self.max_body.is_some()),
            ("connections", self.connections.is_some()),
            ("include_warning", self.include_warning),
            ("certificate", self.certificate.is_some()),
            ("key", self.key.is_some()),
        ];
        for (key, _) in consul.into_iter().filter(|(_, said)| *said) {
            only(kind == RegistryKind::Consul, Some(&self.kind.span), key, "consul");
        }
        for (key, said) in [("port", self.port.is_some()), ("floor", self.floor.is_some())] {
            only(kind == RegistryKind::Dns || !said, Some(&self.kind.span), key, "dns");
        }
        if let Some(pattern) = self.pattern.as_ref().filter(|pattern| !pattern.contains("{}")) {
            let what = format!("{:?} has no place for the service's name", **pattern);
            notes.push(&pattern.span, what, "such as \"{}.default.svc.cluster.local\"");
        }
        for (blob, what) in [(&self.ca, "CERTIFICATE"), (&self.certificate, "CERTIFICATE"), (&self.key, "PRIVATE KEY")]
        {
            if let Some(blob) = blob {
                pem(blob, what, notes);
            }
        }
        match (&self.certificate, &self.key) {
            (Some(one), None) => notes.push(&one.span, "a certificate without its key", "add key = \"key.pem\""),
            (None, Some(one)) => {
                notes.push(&one.span, "a key without its certificate", "add certificate = \"cert.pem\"")
            }
            _ => {}
        }
        let encrypts = self.address.as_ref().is_some_and(|address| address.starts_with("https://"));
        if let (RegistryKind::Consul, false, Some(blob)) =
            (kind, encrypts, self.ca.as_ref().or(self.certificate.as_ref()).or(self.key.as_ref()))
        {
            let help = "set address = \"https://127.0.0.1:8501\", or remove it";
            notes.push(&blob.span, "TLS of an agent that does not speak it", help);
        }
    }
}
