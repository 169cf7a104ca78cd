//! Where callers come in.

use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::time::Duration;

use portcullis_core::Address;

use super::mistake::Notes;
use super::model::known;
use super::plain::{Bytes, Map};
use super::read::At;
use super::registry::{Registry, RegistryKind};
use super::secret::{Blob, pem};
use super::section::{section, shorthand};

section! {
    /// Where callers come in.
    pub struct Listener {
        /// An address with a port; port 0 takes a free one and says which.
        address: At<SocketAddr>,
        /// Takes connections over TLS.
        tls: Option<ListenerTls>,
        /// Lets another process listen at the same address (SO_REUSEPORT), for a restart without a gap.
        reuse_port: bool = false,
        /// Connections at a time; others wait to be accepted.
        max_connections: NonZeroUsize = NonZeroUsize::new(10_000).unwrap_or(NonZeroUsize::MIN),
        /// How long a caller may take to send the head of a request, and how long an HTTP/1.1 connection may be idle.
        header_timeout: Duration = Duration::from_secs(10),
        /// How long a TLS handshake may take.
        handshake_timeout: Duration = Duration::from_secs(10),
        /// How long a caller may take none of what there is for it.
        write_timeout: Duration = Duration::from_secs(60),
        /// How often an HTTP/2 caller is pinged.
        keep_alive: At<Duration> = At::of(Duration::from_secs(60)),
        /// How long it may take to answer that.
        keep_alive_timeout: Duration = Duration::from_secs(20),
        /// How large the head of a request may be, 8 KiB at least; a larger one gets 431.
        max_header_size: Bytes = Bytes(64 << 10),
        /// Streams at a time on one HTTP/2 connection.
        max_streams: NonZeroU32 = NonZeroU32::new(128).unwrap_or(NonZeroU32::MIN),
        /// Registers this gateway, for those who look for it in a registry.
        register: Option<At<Register>>,
    }
}

section! {
    /// How a listener is registered: from when it listens until it is told to stop.
    pub struct Register {
        /// The registry, one of those of this file.
        registry: At<String>,
        /// The service it is an instance of.
        service: String,
        /// What tells it from other instances; by default service, address and port, and with reuse_port something of the
        /// process too. An id said here must then be another for the next process, which the one that goes would take off
        /// otherwise.
        id: Option<String>,
        /// Where others reach it, if not at the listener's address.
        address: Option<At<Address>>,
        /// Tags.
        tags: Vec<String>,
        /// What else is said of it.
        metadata: Map<String>,
        /// Its share of the traffic.
        weight: u32 = 1,
        /// The zone it runs in.
        zone: Option<String>,
        /// Its weight while a check warns.
        warning_weight: Option<u32>,
        /// How often the registry connects to see whether it is there, or a table that says more; by default not at all.
        check: Option<Check>,
        /// When the registry forgets an instance that is not there, after a crash for instance.
        forget_after: Option<At<Duration>>,
    }
}

shorthand! {
    /// How the registry sees whether a listener is there.
    pub struct Check(CheckTable);
    Duration, |interval| CheckTable { interval, ..CheckTable::absent()? }
}

section! {
    /// How the registry sees whether a listener is there: it connects, unless `http` or `grpc` says more.
    pub struct CheckTable {
        /// How often.
        interval: Duration = Duration::from_secs(10),
        /// How long an answer may take.
        timeout: Option<Duration>,
        /// A URL to get, such as "http://10.0.0.1:9901/ready"; 2xx is well.
        http: Option<String>,
        /// Where to ask by the gRPC health protocol: "host:port" or "host:port/service".
        grpc: Option<String>,
        /// How many good answers in a row make it well.
        passes: NonZeroU32 = NonZeroU32::MIN,
        /// How many bad answers in a row make it sick.
        failures: NonZeroU32 = NonZeroU32::MIN,
    }
}

section! {
    /// A listener's side of TLS.
    pub struct ListenerTls {
        /// The certificate and those between it and the root, as PEM.
        certificate: At<Blob>,
        /// Its private key, as PEM.
        key: At<Blob>,
        /// Authorities whose client certificates are verified, as PEM. Without, none is asked for.
        client_ca: Option<At<Blob>>,
        /// Refuses connections without a client certificate.
        require_client: bool = false,
    }
}

impl Listener {
    /// A listener as it is when nothing else is said.
    pub(crate) fn at(address: SocketAddr) -> Self {
        let (max_connections, max_streams) =
            (NonZeroUsize::MIN.saturating_add(9_999), NonZeroU32::MIN.saturating_add(127));
        Self {
            address: At::of(address),
            tls: None,
            reuse_port: false,
            max_connections,
            header_timeout: Duration::from_secs(10),
            handshake_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_secs(60),
            keep_alive: At::of(Duration::from_secs(60)),
            keep_alive_timeout: Duration::from_secs(20),
            max_header_size: Bytes(64 << 10),
            max_streams,
            register: None,
        }
    }

    pub(super) fn check(&self, registries: &Map<At<Registry>>, notes: &mut Notes<'_>) {
        if let Some(tls) = &self.tls {
            tls.check(notes);
        }
        if self.keep_alive.is_zero() {
            notes.push(&self.keep_alive.span, "pings without a pause between them", "a time, such as \"60s\"");
        }
        let Some(register) = &self.register else { return };
        known(&register.registry, registries, "registry", notes);
        if let Some(registry) = registries.get(&*register.registry)
            && !matches!(*registry.kind, RegistryKind::Consul | RegistryKind::Embedded)
        {
            let what = format!("nobody can register with {:?}", *register.registry);
            notes.push(&register.registry.span, what, "name a registry of the kind \"consul\" or \"embedded\"");
        }
        let is_consul =
            registries.get(&*register.registry).is_none_or(|registry| *registry.kind == RegistryKind::Consul);
        if register.check.is_some() && !is_consul {
            notes.push(&register.span, "a check by a registry that makes none", "remove it");
        }
        if let (Some(after), None) = (&register.forget_after, &register.check) {
            notes.push(&after.span, "nobody sees that it is gone", "add check = \"10s\", or remove forget_after");
        }
        if let Some(check) = register.check.as_ref().filter(|check| check.0.http.is_some() && check.0.grpc.is_some()) {
            let what = format!("{:?} is asked over HTTP and gRPC", register.service);
            notes.push(&register.span, what, format!("keep http = {:?}", check.0.http.as_deref().unwrap_or_default()));
        }
        if self.address.ip().is_unspecified() && register.address.is_none() {
            let what = format!("{} is not an address at which others reach it", *self.address);
            notes.push(&register.span, what, "add address = \"10.0.0.1:8080\"");
        }
    }
}

impl ListenerTls {
    /// Leaves nothing but that there is encryption: the rest can be changed while it runs.
    pub(crate) fn forget(&mut self) {
        let nothing = At::of(Blob::default());
        *self = Self { certificate: nothing.clone(), key: nothing, client_ca: None, require_client: false };
    }

    pub(super) fn check(&self, notes: &mut Notes<'_>) {
        let mut sound = pem(&self.certificate, "CERTIFICATE", notes) & pem(&self.key, "PRIVATE KEY", notes);
        if let Some(ca) = &self.client_ca {
            sound &= pem(ca, "CERTIFICATE", notes);
        } else if self.require_client {
            let what = "client certificates are required, and no authority is named";
            notes.push(&self.certificate.span, what, "set client_ca");
        }
        if sound && let Err(error) = crate::listen::encrypt(self) {
            notes.push(&self.key.span, error, "the key must be the certificate's own");
        }
    }
}
