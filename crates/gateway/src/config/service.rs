//! Services behind the gateway.

use std::num::{NonZeroU32, NonZeroUsize};
use std::ops::Range;
use std::time::Duration;

use portcullis::forward::Forward;
use portcullis_core::Address;

use super::balance::{Balance, Retry};
use super::breaker::Breaker;
use super::mistake::Notes;
use super::model::{each_once, known};
use super::plain::{Bytes, Map, Patience};
use super::read::At;
use super::registry::Registry;
use super::secret::{Blob, pem};
use super::section::{section, shorthand, words};

section! {
    /// A service behind the gateway.
    pub struct Service {
        /// Its instances, when they are known. Either this or `registry`.
        endpoints: Vec<Endpoint>,
        /// The registry that knows its instances, or several, of which each knows some.
        registry: Vec<At<String>>,
        /// The registry that is asked where those know no instance.
        fallback: Option<At<String>>,
        /// What the registry calls it, instead of its name here.
        registered_as: Option<String>,
        /// How an endpoint is picked.
        balance: Balance,
        /// When an endpoint is kept away from.
        breaker: Breaker,
        /// When another endpoint is tried.
        retry: Retry,
        /// How long things may take.
        timeouts: Timeouts,
        /// The connections to its endpoints.
        pool: Pool,
        /// How endpoints that speak TLS are verified.
        tls: UpstreamTls,
        /// Asks endpoints how they are, for registries that do not.
        health: Option<Health>,
        /// Speaks TLS to all endpoints, also to those of which a registry does not say that they do.
        https: bool = false,
        /// What endpoints speak: "auto" is HTTP/2 for gRPC and HTTP/1.1 otherwise, unless a registry says what.
        protocol: Protocol = Protocol::Auto,
        /// The Host endpoints see: "keep" what the caller asked for, "endpoint" their own address, or a name.
        host: String = String::from("keep"),
        /// In which headers endpoints are told where a request came from.
        forwarded: Forwarded = Forwarded::XForwarded,
        /// The name under which the gateway writes itself into Via, and by which it knows what went round in a circle.
        /// Gateways that may pass requests to each other need different ones.
        via: Option<At<String>>,
    }
}

words! {
    /// In which headers endpoints are told where a request came from.
    pub enum Forwarded {
        /// X-Forwarded-For, -Proto and -Host.
        XForwarded = "x-forwarded",
        /// The one of RFC 7239.
        Forwarded = "forwarded",
        /// All of them.
        Both = "both",
        /// None, and none is passed on.
        Nothing = "none",
    }
}

shorthand! {
    /// One instance: an address, or a table that says more.
    pub struct Endpoint(EndpointTable);
    At<Address>, |address| EndpointTable { address, weight: 1, priority: 0, zone: None, tags: Vec::new(), metadata: Map::new() }
}

section! {
    /// One instance of a service.
    pub struct EndpointTable {
        /// Where it listens.
        address: At<Address>,
        /// Its share of the traffic.
        weight: u32 = 1,
        /// Lower goes first.
        priority: u32 = 0,
        /// The zone it runs in.
        zone: Option<String>,
        /// Tags, for subsets.
        tags: Vec<String>,
        /// What else is said of it, for subsets.
        metadata: Map<String>,
    }
}

words! {
    /// What endpoints speak.
    pub enum Protocol {
        /// HTTP/1.1 and HTTP/2.
        Auto = "auto",
        /// HTTP/1.1.
        Http1 = "http1",
        /// HTTP/2.
        Http2 = "http2",
    }
}

section! {
    /// How long things may take; "never" gives nothing up.
    pub struct Timeouts {
        /// To have a connection; "1s" by default.
        connect: Option<Patience>,
        /// From the end of the request to the head of the response; "15s" by default.
        response: Option<Patience>,
        /// From the first byte to the last, other attempts included; by default "never".
        total: Option<Patience>,
        /// Without a byte in either direction; "5m" by default.
        idle: Option<Patience>,
    }
}

section! {
    /// The connections to a service's endpoints.
    pub struct Pool {
        /// Idle connections kept for each endpoint, by each of `server.threads`; 256 by default.
        max_idle: Option<NonZeroUsize>,
        /// Connections for each endpoint, of all threads together; 1024 by default.
        max_connections: Option<NonZeroUsize>,
        /// Requests that wait for one of those, for each endpoint and thread; 1024 by default.
        max_waiting: Option<usize>,
        /// How long an idle connection is kept; "60s" by default.
        idle_timeout: Option<Duration>,
        /// After how long a connection takes no more requests; "10m" by default.
        max_age: Option<Duration>,
        /// How many requests share an HTTP/2 connection; 100 by default.
        max_streams: Option<NonZeroUsize>,
        /// How often HTTP/2 connections with requests under way are pinged; by default never.
        keep_alive: Option<At<Duration>>,
        /// How long an endpoint may take to answer that.
        keep_alive_timeout: Duration = Duration::from_secs(20),
        /// How large the head of a response may be, from 8 KiB to 16 MiB.
        max_header_size: Bytes = Bytes(64 << 10),
    }
}

section! {
    /// How endpoints that speak TLS are verified.
    pub struct UpstreamTls {
        /// Authorities to believe instead of the system's, as PEM.
        ca: Option<At<Blob>>,
        /// A certificate to show, as PEM.
        certificate: Option<At<Blob>>,
        /// Its private key, as PEM.
        key: Option<At<Blob>>,
        /// The name that their certificate must be for, instead of their address.
        name: Option<At<String>>,
    }
}

section! {
    /// Asks endpoints how they are.
    pub struct Health {
        /// How they are asked.
        kind: HealthKind = HealthKind::Http,
        /// HTTP: the path to get, "/" by default; any 2xx is well. gRPC: the name of the service to ask for, by default the
        /// server as a whole.
        path: Option<At<String>>,
        /// How often.
        interval: Duration = Duration::from_secs(10),
        /// How long an answer may take.
        timeout: Duration = Duration::from_secs(2),
        /// How many bad answers in a row make an endpoint sick.
        unhealthy: NonZeroU32 = NonZeroU32::new(3).unwrap_or(NonZeroU32::MIN),
        /// How many good answers in a row make it well again.
        healthy: NonZeroU32 = NonZeroU32::new(2).unwrap_or(NonZeroU32::MIN),
    }
}

words! {
    /// How endpoints are asked.
    pub enum HealthKind {
        /// A GET that must be answered with 2xx.
        Http = "http",
        /// A connection that must come about.
        Tcp = "tcp",
        /// grpc.health.v1.Health/Check, which must say SERVING.
        Grpc = "grpc",
    }
}

impl Service {
    pub(super) fn check(&self, name: &str, span: &Range<usize>, registries: &Map<At<Registry>>, notes: &mut Notes<'_>) {
        each_once(&self.registry, registries, "registry", notes);
        if self.registry.is_empty() && self.registered_as.is_some() {
            notes.push(
                span,
                "a name in a registry, and no registry",
                "remove registered_as, or add registry = \"<name>\"",
            );
        }
        match (self.registry.first(), self.endpoints.first()) {
            (Some(_), None) | (None, Some(_)) => {}
            (Some(registry), Some(_)) => {
                notes.push(&registry.span, "both endpoints and a registry", "keep one of them");
            }
            (None, None) => {
                let what = format!("the service {name:?} has neither endpoints nor a registry");
                notes.push(span, what, "add endpoints = [\"127.0.0.1:9001\"] or registry = \"<name>\"");
            }
        }
        for (index, endpoint) in self.endpoints.iter().enumerate() {
            let address = &endpoint.0.address;
            if self.endpoints[..index].iter().any(|other| *other.0.address == **address) {
                notes.push(&address.span, format!("{} is listed twice", **address), "use weight to give it more");
            }
        }
        if self.host != "keep" && self.host != "endpoint" && http::HeaderValue::from_str(&self.host).is_err() {
            notes.push(
                span,
                format!("the service {name:?} has a host that is none"),
                "\"keep\", \"endpoint\" or a name",
            );
        }
        if let Some(via) = self.via.as_ref().filter(|via| Forward::new().via(via).is_err()) {
            notes.push(&via.span, format!("{:?} cannot stand in Via", **via), "letters, digits and dashes");
        }
        if let Some(fallback) = &self.fallback {
            known(fallback, registries, "registry", notes);
            if self.registry.is_empty() {
                notes.push(&fallback.span, "a fallback of no registry", "add registry = \"<name>\"");
            }
        }
        if let Some(interval) = self.pool.keep_alive.as_ref().filter(|interval| interval.is_zero()) {
            let help = "a time, such as \"5m\"; leave it out for never";
            notes.push(&interval.span, "pings without a pause between them", help);
        }
        self.balance.check(notes);
        self.breaker.check(notes);
        self.retry.check(notes);
        self.tls.check(notes);
        if let Some(health) = &self.health {
            health.check(notes);
        }
        if let Some(span) = self.tls.place()
            && !self.https
            && self.registry.is_empty()
        {
            notes.push(span, "tls of endpoints that do not speak it", "set https = true, or remove tls");
        }
    }
}

impl Health {
    fn check(&self, notes: &mut Notes<'_>) {
        let Some(path) = &self.path else { return };
        match self.kind {
            HealthKind::Http if !is_path(path) => {
                notes.push(&path.span, format!("{:?} is no path", **path), "such as \"/health\"");
            }
            HealthKind::Tcp => notes.push(&path.span, "a path where nothing is asked for", "remove it"),
            HealthKind::Http | HealthKind::Grpc => {}
        }
    }
}

/// Whether it can be asked for as it is.
pub(super) fn is_path(path: &str) -> bool {
    path.starts_with('/') && path.parse::<http::uri::PathAndQuery>().is_ok()
}

impl UpstreamTls {
    /// Where it says something.
    pub(crate) fn place(&self) -> Option<&Range<usize>> {
        let blobs = [&self.ca, &self.certificate, &self.key].map(|blob| blob.as_ref().map(|blob| &blob.span));
        blobs.into_iter().flatten().next().or(self.name.as_ref().map(|name| &name.span))
    }

    pub(super) fn check(&self, notes: &mut Notes<'_>) {
        let mut sound = true;
        for certificate in [&self.ca, &self.certificate].into_iter().flatten() {
            sound &= pem(certificate, "CERTIFICATE", notes);
        }
        match (&self.certificate, &self.key) {
            (Some(_), Some(key)) => {
                sound &= pem(key, "PRIVATE KEY", notes);
                if sound && let Err(error) = crate::build::client_tls(self) {
                    notes.push(&key.span, error.to_string(), "the key must be the certificate's own");
                }
            }
            (Some(one), None) => notes.push(&one.span, "a certificate without its key", "set tls.key"),
            (None, Some(one)) => notes.push(&one.span, "a key without its certificate", "set tls.certificate"),
            (None, None) => {}
        }
        if let Some(name) = self.name.as_ref()
            && rustls::pki_types::ServerName::try_from(name.as_str()).is_err()
        {
            notes.push(&name.span, format!("{:?} is no name of a server", **name), "such as \"orders.internal\"");
        }
    }
}
