//! Where instances are found.

use std::time::Duration;

use super::mistake::Notes;
use super::read::At;
use super::secret::{Blob, Secret};
use super::section::{section, words};

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
        /// Consul: only instances with this tag.
        tag: Option<String>,
        /// Consul: authorities of an agent that speaks TLS, as PEM.
        ca: Option<Blob>,
        /// DNS: the port of all instances. Without, SRV records say it.
        port: Option<u16>,
        /// File: the file with the instances; relative to where the program is started.
        path: Option<At<String>>,
        /// How long endpoints are used while the registry does not answer. By default for ever.
        max_age: Option<Duration>,
    }
}

words! {
    /// Kinds of registry.
    pub enum RegistryKind {
        /// A Consul agent.
        Consul = "consul",
        /// Names looked up in DNS.
        Dns = "dns",
        /// A file that is read again when it changes.
        File = "file",
    }
}

impl Registry {
    pub(super) fn check(&self, notes: &mut Notes<'_>) {
        let span = &self.kind.span;
        match *self.kind {
            RegistryKind::Consul => {
                if let Some(address) = &self.address
                    && !(address.starts_with("http://") || address.starts_with("https://"))
                {
                    notes.push(
                        &address.span,
                        format!("{:?} is no URL of an agent", **address),
                        "such as \"http://127.0.0.1:8500\"",
                    );
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
                notes.push(span, "not said which file", "add path = \"instances.json\"");
            }
            RegistryKind::File => {}
        }
        if let Some(path) = self.path.as_ref().filter(|_| *self.kind != RegistryKind::File) {
            notes.push(&path.span, "only a registry of the kind \"file\" has a path", "remove it");
        }
    }
}
