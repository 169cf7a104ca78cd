//! Services from DNS.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, stream};
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{NameServerConfig, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::{RData, RecordType};
use portcullis_core::Instance;

use crate::backoff::Backoff;
use crate::{Error, Registry, Watch};

/// Services from DNS: addresses with a port of their own, or SRV records.
///
/// Names are asked for anew when their time to live is over, but not sooner than after 5 s. An answer that the server
/// truncated is asked for over TCP. That a name does not exist, or has no such records, is a sound "none"; a server that
/// cannot be reached or says `SERVFAIL` is a failure. An address or an SRV target that fails by itself is a failure of the
/// whole, so that half an answer shrinks no pool.
#[derive(Clone)]
pub struct DnsRegistry {
    resolver: Arc<TokioResolver>,
    records: Records,
    /// `{}` stands for the service.
    pattern: Arc<str>,
    floor: Duration,
}

#[derive(Clone, Copy, Debug)]
enum Records {
    Addresses { port: u16 },
    Srv,
}

/// How soon a name is asked for again, at the earliest and at the latest.
const FLOOR: Duration = Duration::from_secs(5);
const CEILING: Duration = Duration::from_secs(300);
/// SRV targets looked up at once.
const AT_ONCE: usize = 16;

// === impl DnsRegistry ===

impl DnsRegistry {
    /// A and AAAA records of a service's name, each an instance on `port`, asked of the system's servers.
    ///
    /// # Errors
    ///
    /// When the system's configuration cannot be read.
    pub fn addresses(port: u16) -> Result<Self, Error> {
        Self::new(Records::Addresses { port })
    }

    /// SRV records of a service's name, asked of the system's servers. Their priorities and weights count.
    ///
    /// # Errors
    ///
    /// When the system's configuration cannot be read.
    pub fn srv() -> Result<Self, Error> {
        Self::new(Records::Srv)
    }

    fn new(records: Records) -> Result<Self, Error> {
        let wrong =
            |error: NetError| Error::invalid("the system's DNS configuration cannot be used").with_source(error);
        let mut builder = TokioResolver::builder_tokio().map_err(wrong)?;
        options(builder.options_mut());
        let resolver = Arc::new(builder.build().map_err(wrong)?);
        Ok(Self { resolver, records, pattern: "{}".into(), floor: FLOOR })
    }

    /// Asks this server instead of the system's, first over UDP.
    ///
    /// # Errors
    ///
    /// When the resolver cannot be built.
    pub fn server(mut self, server: SocketAddr) -> Result<Self, Error> {
        let mut config = NameServerConfig::udp_and_tcp(server.ip());
        for connection in &mut config.connections {
            connection.port = server.port();
        }
        let config = ResolverConfig::from_name_servers(vec![config]);
        let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
        options(builder.options_mut());
        let resolver =
            builder.build().map_err(|error| Error::invalid("the resolver cannot be built").with_source(error))?;
        self.resolver = Arc::new(resolver);
        Ok(self)
    }

    /// The name to ask for, with `{}` in the place of the service: `_{}._tcp.internal.`. Default `{}`.
    #[must_use]
    pub fn pattern(mut self, pattern: impl Into<Arc<str>>) -> Self {
        self.pattern = pattern.into();
        self
    }

    /// How soon a name is asked for again at the earliest, whatever its time to live. Default 5 s.
    #[must_use]
    pub fn floor(mut self, floor: Duration) -> Self {
        self.floor = floor.max(Duration::from_millis(10));
        self
    }

    /// The instances, and how long they may be believed.
    async fn ask(&self, service: &str) -> Result<(Vec<Instance>, Duration), Error> {
        let name = self.pattern.replace("{}", service);
        let (mut instances, ttl) = match self.records {
            Records::Addresses { port } => {
                let (addresses, ttl) = self.addresses_of(&name).await?;
                let instance = |ip| Instance::new(SocketAddr::new(ip, port).to_string(), SocketAddr::new(ip, port));
                (addresses.into_iter().map(instance).collect(), ttl)
            }
            Records::Srv => self.targets_of(&name).await?,
        };
        // Servers turn their answers round; a new order alone is no change.
        instances.sort_by(|a: &Instance, b| (a.priority, &a.address).cmp(&(b.priority, &b.address)));
        Ok((instances, ttl.clamp(self.floor, CEILING.max(self.floor))))
    }

    async fn addresses_of(&self, name: &str) -> Result<(Vec<std::net::IpAddr>, Duration), Error> {
        let (v4, v6) = tokio::join!(self.lookup(name, RecordType::A), self.lookup(name, RecordType::AAAA));
        let ((v4, ttl4), (v6, ttl6)) = (v4?, v6?);
        let addresses = v4.into_iter().chain(v6).filter_map(|data| match data {
            RData::A(a) => Some(a.0.into()),
            RData::AAAA(a) => Some(a.0.into()),
            _ => None,
        });
        Ok((addresses.collect(), ttl4.min(ttl6)))
    }

    async fn targets_of(&self, name: &str) -> Result<(Vec<Instance>, Duration), Error> {
        let (records, mut ttl) = self.lookup(name, RecordType::SRV).await?;
        let targets = records.into_iter().filter_map(|data| match data {
            RData::SRV(srv) => Some(srv),
            _ => None,
        });
        let looked_up: Vec<_> = stream::iter(targets)
            .map(|srv| async move {
                let addresses = self.addresses_of(&srv.target.to_utf8()).await;
                (srv, addresses)
            })
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        let mut instances = Vec::with_capacity(looked_up.len());
        for (srv, addresses) in looked_up {
            let (addresses, its) = addresses?;
            ttl = ttl.min(its);
            for ip in addresses {
                let address = SocketAddr::new(ip, srv.port);
                let mut instance = Instance::new(address.to_string(), address);
                // RFC 2782 gives weight zero a small chance, not none.
                instance.weight = u32::from(srv.weight.max(1));
                instance.priority = u32::from(srv.priority);
                instances.push(instance);
            }
        }
        Ok((instances, ttl))
    }

    /// The records of a type, and their least time to live. A name without any is no failure.
    async fn lookup(&self, name: &str, of: RecordType) -> Result<(Vec<RData>, Duration), Error> {
        match self.resolver.lookup(name, of).await {
            Ok(found) => {
                let records: Vec<_> = found.answers().iter().filter(|record| record.record_type() == of).collect();
                let ttl = records.iter().map(|record| record.ttl).min().unwrap_or(0);
                let data = records.into_iter().map(|record| record.data.clone()).collect();
                Ok((data, Duration::from_secs(ttl.into())))
            }
            Err(NetError::Dns(DnsError::NoRecordsFound(none)))
                if matches!(none.response_code, ResponseCode::NXDomain | ResponseCode::NoError) =>
            {
                // Without a negative time to live, that of the other record type counts.
                Ok((Vec::new(), none.negative_ttl.map_or(CEILING, |ttl| Duration::from_secs(ttl.into()))))
            }
            Err(error) => Err(Error::unavailable(format!("{of} of {name} cannot be looked up")).with_source(error)),
        }
    }
}

fn options(options: &mut hickory_resolver::config::ResolverOpts) {
    // How long an answer counts is decided here.
    options.cache_size = 0;
    options.edns0 = true;
}

impl Registry for DnsRegistry {
    fn watch(&self, service: &Arc<str>) -> Watch {
        let state = (self.clone(), service.clone(), Duration::ZERO, Backoff::between(self.floor, FLOOR * 6));
        Watch::new(stream::unfold(state, |(dns, service, pause, mut backoff)| async move {
            tokio::time::sleep(pause).await;
            let (answer, pause) = match dns.ask(&service).await {
                Ok((instances, ttl)) => {
                    backoff.reset();
                    (Ok(instances), ttl)
                }
                Err(error) => (Err(error), backoff.next(fastrand::f64())),
            };
            Some((answer, (dns, service, pause, backoff)))
        }))
    }
}

impl fmt::Debug for DnsRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DnsRegistry")
            .field("records", &self.records)
            .field("pattern", &self.pattern)
            .finish_non_exhaustive()
    }
}
