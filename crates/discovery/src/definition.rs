//! What an instance says of itself when it registers, and the handle it gets for that.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use portcullis_core::{Address, Instance, Protocol, Scheme};

use crate::registry::Pending;

/// How often a check runs unless told otherwise.
pub const DEFAULT_CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// An instance that makes itself known: of which service, where, and how to see whether it is well.
///
/// ```
/// use portcullis_discovery::{HealthCheck, ServiceDefinition};
///
/// let definition = ServiceDefinition::new("orders", "orders-1", "10.0.0.7:8080".parse::<std::net::SocketAddr>().unwrap())
///     .check(HealthCheck::http("http://10.0.0.7:8080/health"))
///     .tag("v2")
///     .weight(10);
/// assert_eq!(&*definition.service, "orders");
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ServiceDefinition {
    /// The service it is an instance of.
    pub service: Arc<str>,
    /// Its id, address, weight, tags and so on.
    pub instance: Instance,
    /// Its weight while a check warns. Default 1.
    pub warning_weight: u32,
    /// How to see whether it is well; with none it always is.
    pub checks: Vec<HealthCheck>,
}

/// How a registry sees whether an instance is well.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HealthCheck {
    /// What is done.
    pub kind: CheckKind,
    /// How often; for [`CheckKind::Ttl`] how long a report is believed. Default 10 s.
    pub interval: Duration,
    /// How long an answer may take; the registry's own default if unset.
    pub timeout: Option<Duration>,
    /// What holds until the first result. Default critical: unseen until a check passed.
    pub initial: Health,
    /// The registry forgets the instance when it was critical for that long. Registries have a minimum; Consul's is a
    /// minute, looked at every half.
    pub deregister_critical_after: Option<Duration>,
    /// Passes in a row until it counts as well; 0 is the same as 1. Consul 1.8.7 takes this and the next from a service's
    /// registration and does not heed them.
    pub successes_before_passing: u32,
    /// Failures in a row until it counts as critical; 0 is the same as 1.
    pub failures_before_critical: u32,
}

/// What a check does.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CheckKind {
    /// A GET of this URL: 2xx passes, 429 warns, anything else is critical.
    Http {
        /// The URL.
        url: String,
        /// Do not verify the certificate.
        insecure: bool,
    },
    /// A connection to `host:port`.
    Tcp(String),
    /// The standard gRPC health protocol at `host:port` or `host:port/service`.
    Grpc {
        /// The target.
        target: String,
        /// Over TLS.
        tls: bool,
    },
    /// The instance reports by itself, before the interval is over; [`Registration`] does so for it.
    Ttl,
}

/// How an instance is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Health {
    /// Well.
    Passing,
    /// Serving, but not well.
    Warning,
    /// Not serving.
    Critical,
}

/// A registered instance.
///
/// [`deregister`](Self::deregister) it first when shutting down, go on serving what still arrives, then drain: with
/// Portcullis' server that is `.graceful(async { stop.await; registration.deregister().await.ok(); }, deadline)`. Dropping
/// the handle deregisters as well, as far as the registry can do that without being awaited: the embedded registry always,
/// Consul as long as the runtime lives. What is left after a crash is for
/// [`deregister_critical_after`](HealthCheck::deregister_critical_after).
pub struct Registration {
    service: Arc<str>,
    id: Arc<str>,
    membership: Box<dyn Membership>,
}

/// What a registry does for an instance that registered. Dropping it takes the instance off, as far as possible.
pub trait Membership: Send + Sync + 'static {
    /// Takes the instance off.
    fn deregister(self: Box<Self>) -> Pending<()>;

    /// Takes the instance out of service for a reason, or back with `None`.
    fn maintenance(&self, reason: Option<String>) -> Pending<()>;

    /// Says how the instance is, for the checks in which it reports by itself.
    fn report(&self, health: Health, note: String) -> Pending<()>;

    /// Looks whether the registry still knows the instance, and registers it anew if not. By default the registry is one
    /// that does not forget.
    fn confirm(&self) -> Pending<()> {
        Box::pin(async { Ok(()) })
    }
}

// === impl ServiceDefinition ===

impl ServiceDefinition {
    /// An instance of `service`, without checks. The id must be unique in the registry.
    #[must_use]
    pub fn new(service: impl Into<Arc<str>>, id: impl Into<Arc<str>>, address: impl Into<Address>) -> Self {
        Self::of(service, Instance::new(id, address))
    }

    /// `instance` as an instance of `service`, without checks.
    #[must_use]
    pub fn of(service: impl Into<Arc<str>>, instance: Instance) -> Self {
        Self { service: service.into(), instance, warning_weight: 1, checks: Vec::new() }
    }

    /// Adds a check.
    #[must_use]
    pub fn check(mut self, check: HealthCheck) -> Self {
        self.checks.push(check);
        self
    }

    /// Adds a tag.
    #[must_use]
    pub fn tag(mut self, tag: impl Into<String>) -> Self {
        self.instance.tags.push(tag.into());
        self
    }

    /// Adds metadata.
    #[must_use]
    pub fn metadata(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.instance.metadata.insert(key.into(), value.into());
        self
    }

    /// Its share of the traffic. Default 1.
    #[must_use]
    pub fn weight(mut self, weight: u32) -> Self {
        self.instance.weight = weight;
        self
    }

    /// Its share of the traffic while a check warns. Default 1.
    #[must_use]
    pub fn warning_weight(mut self, weight: u32) -> Self {
        self.warning_weight = weight;
        self
    }

    /// The zone it runs in.
    #[must_use]
    pub fn zone(mut self, zone: impl Into<Arc<str>>) -> Self {
        self.instance.zone = Some(zone.into());
        self
    }

    /// Whether connections to it are encrypted.
    #[must_use]
    pub fn scheme(mut self, scheme: Scheme) -> Self {
        self.instance.scheme = scheme;
        self
    }

    /// What it speaks.
    #[must_use]
    pub fn protocol(mut self, protocol: Protocol) -> Self {
        self.instance.protocol = protocol;
        self
    }
}

// === impl HealthCheck ===

impl HealthCheck {
    /// A GET of `url` every 10 s: 2xx passes, 429 warns, anything else is critical.
    #[must_use]
    pub fn http(url: impl Into<String>) -> Self {
        Self::of(CheckKind::Http { url: url.into(), insecure: false })
    }

    /// A connection to `host:port` every 10 s.
    #[must_use]
    pub fn tcp(target: impl Into<String>) -> Self {
        Self::of(CheckKind::Tcp(target.into()))
    }

    /// The standard gRPC health protocol, asked every 10 s at `host:port` or `host:port/service`.
    #[must_use]
    pub fn grpc(target: impl Into<String>) -> Self {
        Self::of(CheckKind::Grpc { target: target.into(), tls: false })
    }

    /// The instance reports by itself: a task of the registration says *passing* three times in every `ttl`, unless
    /// [`Registration::report`] said something else.
    #[must_use]
    pub fn ttl(ttl: Duration) -> Self {
        Self::of(CheckKind::Ttl).interval(ttl)
    }

    fn of(kind: CheckKind) -> Self {
        Self {
            kind,
            interval: DEFAULT_CHECK_INTERVAL,
            timeout: None,
            initial: Health::Critical,
            deregister_critical_after: None,
            successes_before_passing: 0,
            failures_before_critical: 0,
        }
    }

    /// How often. Default 10 s.
    #[must_use]
    pub const fn interval(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }

    /// How long an answer may take.
    #[must_use]
    pub const fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// What holds until the first result. Default critical.
    #[must_use]
    pub const fn initial(mut self, health: Health) -> Self {
        self.initial = health;
        self
    }

    /// The registry forgets the instance when it was critical for that long.
    #[must_use]
    pub const fn deregister_critical_after(mut self, after: Duration) -> Self {
        self.deregister_critical_after = Some(after);
        self
    }

    /// Results in a row until the state changes: `passes` to passing, `failures` to critical.
    #[must_use]
    pub const fn in_a_row(mut self, passes: u32, failures: u32) -> Self {
        self.successes_before_passing = passes;
        self.failures_before_critical = failures;
        self
    }
}

// === impl Registration ===

impl Registration {
    /// The handle of an instance that `membership` keeps registered.
    #[must_use]
    pub fn new(service: impl Into<Arc<str>>, id: impl Into<Arc<str>>, membership: impl Membership) -> Self {
        Self { service: service.into(), id: id.into(), membership: Box::new(membership) }
    }

    /// The service it is an instance of.
    #[must_use]
    pub fn service(&self) -> &Arc<str> {
        &self.service
    }

    /// The instance's id.
    #[must_use]
    pub fn id(&self) -> &Arc<str> {
        &self.id
    }

    /// Takes the instance off; when this returns, the registry has forgotten it.
    ///
    /// # Errors
    ///
    /// What the registry answers. It is not tried again.
    pub async fn deregister(self) -> Result<(), crate::Error> {
        self.membership.deregister().await
    }

    /// Takes the instance out of service for a reason that people will read, or back with `None`.
    ///
    /// # Errors
    ///
    /// What the registry answers.
    pub async fn maintenance(&self, reason: Option<&str>) -> Result<(), crate::Error> {
        self.membership.maintenance(reason.map(str::to_owned)).await
    }

    /// Says how the instance is; it holds until the next report. With Consul this needs a [`HealthCheck::ttl`].
    ///
    /// # Errors
    ///
    /// What the registry answers.
    pub async fn report(&self, health: Health, note: &str) -> Result<(), crate::Error> {
        self.membership.report(health, note.to_owned()).await
    }

    /// Looks at once whether the registry still knows the instance, and registers it anew if not; with Consul that also
    /// happens by itself, every so often. For when another registration of the same id has just been taken off.
    ///
    /// # Errors
    ///
    /// What the registry answers.
    pub async fn confirm(&self) -> Result<(), crate::Error> {
        self.membership.confirm().await
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration").field("service", &self.service).field("id", &self.id).finish_non_exhaustive()
    }
}
