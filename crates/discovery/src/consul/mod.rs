//! Consul, through its agent.
//!
//! A thin client of our own for what must be right: blocking queries with all their rules, and the agent's registration
//! API. What a service's watch takes as sound, and what not:
//!
//! | the agent | the watch |
//! |---|---|
//! | answers with instances | exactly those |
//! | answers with none, knows a leader, its index did not go back, our token may read | none |
//! | cannot be reached, is too slow, answers 4xx or 5xx, too much, or nonsense | [`Error::is_unavailable`], keeps what was known |
//! | has no leader, whatever else it says | [`Error::is_no_leader`], keeps |
//! | answers with none because the token may not read | [`Error::is_denied`], keeps |
//! | answers with none after its memory began anew | [`Error::is_reset`], keeps until the service appears again |
//!
//! An agent's memory began anew if the index went back, or if after a failure another node answers than before (a
//! development agent that was restarted starts with low indexes, which prove nothing).
//!
//! The id of an instance is its node's name and its own id there, `node/id`: an agent knows its own ids only, and one that was
//! given none is the service's name on every node.
//!
//! # Many services on few connections
//!
//! An agent allows one address 200 connections, and a query that blocks takes one of them over HTTP/1.1. So the first
//! [`connections`](ConsulConfig::connections) watches, 128 by default, have one each and hear of a change at once. The
//! others are parked: two queries more tell that *something* changed, whereupon every parked watch asks, 32 at a time. They
//! hear of an isolated change when that round is over, which takes 0.15 to 0.2 s with 1,000 services; under churn there is
//! one round a second at most, and without a signal each asks every 15 to 30 s. While nothing changes, parked watches cost
//! nothing. A parked watch takes the place of one that ends.
//!
//! Over TLS the agent speaks HTTP/2: eight connections carry 1,600 watches, and none of those is parked.
//!
//! # What `rs-consul` is for
//!
//! That crate has no agent API, hides whether a leader was known and whether a token could read, and does not bound bodies
//! or calls; see [`RsConsul`] for the part of it that is sound, which is the catalog and the key-value store.
//!
//! # Registration
//!
//! A task for each registration reports for its TTL checks, three times in each, and compares every 10 s whether the agent
//! still knows the instance; if it forgot, it is registered anew, with its maintenance. Whoever deregisters an instance by
//! hand while its process runs will see it come back. The task ends with the [`Registration`].
//!
//! # What was measured
//!
//! Consul 1.8.7, two cores, agent and watches on one machine; `cargo bench -p portcullis-discovery --all-features --bench
//! consul`. From sending the change to the agent to the first request that respects it:
//!
//! | services of ten instances | p50 | p90 | p99 | memory of all watches | processor while nothing changes |
//! |---|---|---|---|---|---|
//! | 128 | 2.4 ms | 2.6 ms | 3.6 ms | 8 MiB | none |
//! | 1,000 | 89 ms | 164 ms | 190 ms | 48 MiB | none |
//!
//! # What failures do to requests
//!
//! Requests that flowed meanwhile, a thousand a second at most, and how many of them were refused; `cargo test -p
//! portcullis-discovery --all-features --test consul --test scripted -- --nocapture` prints them anew. Against Consul
//! 1.8.7, but for the answer that drips, which a scripted agent gives:
//!
//! | the agent | passed | refused | the endpoints |
//! |---|---|---|---|
//! | is killed and comes back empty | 130 | 0 | stay until the service appears again, then exactly what it shows |
//! | stands still, for 20 s with `PAUSE=20` | 13,170 | 0 | stay; seen after at most the wait, its sixteenth and the margin |
//! | loses its leader, in a cluster of three | 976 | 0 | stay; a leader comes back and they follow again |
//! | takes the token's rights | 130 | 0 | stay, the failure is said to be a denial |
//! | revokes the token | 6 | 0 | stay, although the instance goes meanwhile |
//! | answers with more than is allowed | 155 | 0 | stay until the answer is small enough |
//! | answers byte by byte | 739 | 0 | stay; given up at the deadline, then asked anew |
//! | sees 500 instances come and half of them go | 237 | 0 | end exactly as they are, after fewer than 200 answers |
//!
//! What only newer agents say (that results were filtered, where an instance is) and namespaces and partitions, which need
//! Consul Enterprise, were tried against a scripted agent only.
//!
//! # Defaults
//!
//! | what | default |
//! |---|---|
//! | how long a query blocks | 30 s; the whole call, its body included, has a sixteenth and 5 s more |
//! | pause after failures | 0.25 s doubling to 30 s, each with jitter |
//! | queries of one service under churn | 8 at once, then 4 a second |
//! | size of an answer | 16 MiB |
//! | connections | 128 for watches, two that tell those without one of changes, and up to 64 for short calls, of the 200 an agent allows |
//! | comparing a registration with the agent | every 10 s |

mod answer;
mod client;
mod connect;
mod index;
mod pace;
mod pulse;
mod register;
mod rs;
mod watch;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderValue, Uri};
use portcullis_core::Clock;

use self::answer::Selection;
use self::client::Client;
use self::connect::{Secret, Tls};
pub use self::rs::RsConsul;
use crate::registry::Pending;
use crate::{Error, Registration, Registry, ServiceDefinition, Watch};

/// Registration, discovery and health checks through a Consul agent. Clones share connections.
#[derive(Clone, Debug)]
pub struct ConsulRegistry(Arc<Client>);

/// Where the agent is, and how to ask it.
#[derive(Clone)]
pub struct ConsulConfig {
    origin: Arc<Origin>,
    token: Option<HeaderValue>,
    tls: Tls,
    datacenter: Option<String>,
    namespace: Option<String>,
    partition: Option<String>,
    near: Option<String>,
    filter: Option<String>,
    tags: Vec<String>,
    consistency: Consistency,
    selection: Selection,
    wait: Duration,
    timeout: Duration,
    connect_timeout: Duration,
    max_body: usize,
    connections: usize,
    resync: Duration,
    clock: Clock,
}

/// How fresh an answer must be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Consistency {
    /// The leader answers; it may be out of date for a moment while another is elected.
    #[default]
    Default,
    /// The leader answers after it made sure that it still is.
    Consistent,
    /// Any server answers; usually less than 50 ms behind.
    Stale,
    /// The agent answers from its cache, which it keeps fresh with one watch of its own for each service.
    Cached,
}

enum Origin {
    Tcp { https: bool, host: String, port: u16 },
    Unix(PathBuf),
}

// === impl ConsulRegistry ===

impl ConsulRegistry {
    /// A registry behind the agent that `config` names. Nothing is connected yet.
    ///
    /// # Errors
    ///
    /// [`Error::is_invalid`] when certificates cannot be read or do not fit.
    pub fn new(config: ConsulConfig) -> Result<Self, Error> {
        Ok(Self(Arc::new(Client::new(config)?)))
    }
}

impl Registry for ConsulRegistry {
    fn watch(&self, service: &Arc<str>) -> Watch {
        watch::follow(self.0.clone(), service.clone())
    }

    fn register(&self, definition: ServiceDefinition) -> Pending<Registration> {
        Box::pin(register::register(self.0.clone(), definition))
    }
}

// === impl ConsulConfig ===

impl ConsulConfig {
    /// An agent at `http://host:port`, `https://host:port` or `unix:///path`.
    ///
    /// # Errors
    ///
    /// [`Error::is_invalid`] for anything else.
    pub fn new(url: &str) -> Result<Self, Error> {
        Ok(Self {
            origin: Arc::new(url.parse()?),
            token: None,
            tls: Tls::default(),
            datacenter: None,
            namespace: None,
            partition: None,
            near: None,
            filter: None,
            tags: Vec::new(),
            consistency: Consistency::Default,
            selection: Selection::default(),
            wait: Duration::from_secs(30),
            timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(2),
            max_body: 16 << 20,
            connections: 128,
            resync: Duration::from_secs(10),
            clock: Clock::system(),
        })
    }

    /// The ACL token to show. It is never printed.
    ///
    /// # Errors
    ///
    /// [`Error::is_invalid`] when it cannot stand in a header.
    pub fn token(mut self, token: &str) -> Result<Self, Error> {
        let mut token =
            HeaderValue::from_str(token).map_err(|_| Error::invalid("the token cannot stand in a header"))?;
        token.set_sensitive(true);
        self.token = Some(token);
        Ok(self)
    }

    /// Trusts these certificate authorities, as PEM, instead of the system's.
    #[must_use]
    pub fn certificate_authorities(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.tls.authorities = Some(pem.into());
        self
    }

    /// Shows this certificate chain, with its key, both as PEM.
    #[must_use]
    pub fn client_certificate(mut self, chain: impl Into<Vec<u8>>, key: impl Into<Vec<u8>>) -> Self {
        self.tls.identity = Some((chain.into(), Secret(key.into())));
        self
    }

    /// Asks for services of this datacenter.
    #[must_use]
    pub fn datacenter(mut self, datacenter: impl Into<String>) -> Self {
        self.datacenter = Some(datacenter.into());
        self
    }

    /// Registers in and asks for services of this namespace (Consul Enterprise).
    #[must_use]
    pub fn namespace(mut self, namespace: impl Into<String>) -> Self {
        self.namespace = Some(namespace.into());
        self
    }

    /// Registers in and asks for services of this partition (Consul Enterprise).
    #[must_use]
    pub fn partition(mut self, partition: impl Into<String>) -> Self {
        self.partition = Some(partition.into());
        self
    }

    /// Has instances sorted by their distance from this node; `_agent` is the agent's.
    #[must_use]
    pub fn near(mut self, node: impl Into<String>) -> Self {
        self.near = Some(node.into());
        self
    }

    /// Only instances for which this expression holds, such as `"v2" in Service.Tags`.
    #[must_use]
    pub fn filter(mut self, expression: impl Into<String>) -> Self {
        self.filter = Some(expression.into());
        self
    }

    /// Only instances with this tag; with several, only those that have them all.
    #[must_use]
    pub fn tag(mut self, tag: impl Into<String>) -> Self {
        self.tags.push(tag.into());
        self
    }

    /// How fresh answers must be. Default: the leader's.
    #[must_use]
    pub fn consistency(mut self, consistency: Consistency) -> Self {
        self.consistency = consistency;
        self
    }

    /// Also instances with a check that warns, with their warning weight. By default only those that pass.
    #[must_use]
    pub fn include_warning(mut self, include: bool) -> Self {
        self.selection.warning = include;
        self
    }

    /// Which of an instance's tagged addresses to use, such as `wan`, where it has one.
    #[must_use]
    pub fn tagged_address(mut self, tag: impl Into<String>) -> Self {
        self.selection.tagged_address = Some(tag.into());
        self
    }

    /// How long a query blocks when nothing changes, up to 10 min. Default 30 s. A frozen agent or a partition is noticed
    /// a sixteenth and [`timeout`](Self::timeout) later.
    #[must_use]
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// How long a call that does not block may take, its body included. Default 5 s.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// How long connecting may take, TLS included. Default 2 s.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// Answers larger than this many bytes are failures. Default 16 MiB, some 10,000 instances.
    #[must_use]
    pub fn max_body(mut self, bytes: usize) -> Self {
        self.max_body = bytes;
        self
    }

    /// How many connections watches may use; up to 66 more serve everything else. Default 128. An agent allows 200 from one
    /// address.
    #[must_use]
    pub fn connections(mut self, connections: usize) -> Self {
        self.connections = connections.clamp(1, 1 << 20);
        self
    }

    /// How often a registration is compared with what the agent knows, and made anew if it forgot. Default 10 s.
    #[must_use]
    pub fn resync(mut self, every: Duration) -> Self {
        self.resync = every;
        self
    }

    /// The clock for pauses and bursts.
    #[must_use]
    pub fn clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }
}

impl fmt::Debug for ConsulConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConsulConfig")
            .field("origin", &format_args!("{}", self.origin))
            .field("token", &self.token.as_ref().map(|_| "***"))
            .field("consistency", &self.consistency)
            .finish_non_exhaustive()
    }
}

// === impl Origin ===

impl std::str::FromStr for Origin {
    type Err = Error;

    fn from_str(url: &str) -> Result<Self, Error> {
        let wrong =
            || Error::invalid("the agent's address must be http://host:port, https://host:port or unix:///path");
        if let Some(path) = url.strip_prefix("unix://") {
            return if path.starts_with('/') { Ok(Self::Unix(path.into())) } else { Err(wrong()) };
        }
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        let https = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(wrong()),
        };
        let authority = uri.authority().ok_or_else(wrong)?;
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() || authority.as_str().contains('@') {
            return Err(wrong());
        }
        let port = authority.port_u16().unwrap_or(if https { 8501 } else { 8500 });
        Ok(Self::Tcp { https, host: authority.host().to_owned(), port })
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { https, host, port } => write!(f, "http{}://{host}:{port}", if *https { "s" } else { "" }),
            Self::Unix(_) => f.write_str("http://localhost"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agents_address_is_a_url_without_a_path() {
        let origin = |url: &str| url.parse::<Origin>().map(|origin| origin.to_string());
        assert_eq!(origin("http://127.0.0.1:8500").unwrap(), "http://127.0.0.1:8500");
        assert_eq!(origin("http://consul/").unwrap(), "http://consul:8500");
        assert_eq!(origin("https://[::1]").unwrap(), "https://[::1]:8501");
        assert_eq!(origin("unix:///run/consul.sock").unwrap(), "http://localhost");
        for wrong in
            ["", "127.0.0.1:8500", "ftp://a", "http://", "http://a/v1", "http://a?b", "http://u:p@a", "unix://a"]
        {
            assert!(origin(wrong).unwrap_err().is_invalid(), "{wrong:?}");
        }
    }

    #[test]
    fn a_token_is_never_printed() {
        let config = ConsulConfig::new("http://127.0.0.1").unwrap().token("s3cret").unwrap();
        let config = config.client_certificate("chain", "k3y");
        assert!(!format!("{config:?} {:?}", config.tls).contains("s3cret"));
        assert!(!format!("{:?}", config.tls).contains("k3y"));
        assert!(
            !format!("{:?}", ConsulRegistry::new(ConsulConfig::new("http://a").unwrap().token("s3cret").unwrap()))
                .contains("s3cret")
        );
        let error = ConsulConfig::new("http://a").unwrap().token("s3cret\n").unwrap_err();
        assert!(error.is_invalid() && !format!("{error:?}").contains("s3cret"));
    }
}
