//! Services from DNS.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, future, stream};
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{NameServerConfig, ResolverConfig, ResolverOpts};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::ProtoError;
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use hickory_resolver::system_conf::read_system_conf;
use portcullis_core::Instance;

use crate::backoff::Backoff;
use crate::{Error, Registry, Watch};

/// Services from DNS: addresses with a port of their own, or SRV records.
///
/// Names are asked for anew when their time to live is over, but not sooner than after [5 s](Self::floor), nor later than
/// after five minutes. An answer that the server truncated is asked for over TCP. That a name does not exist, or has no such
/// records, is a sound "none", believed as long as the server says, within the same bounds; a server that cannot be reached or says `SERVFAIL` is a failure. An address or an SRV target that
/// fails by itself is a failure of the whole, so that half an answer shrinks no pool.
///
/// A name that does not end in a dot may be meant relative to the domains that the system searches, tried in the order of
/// `resolv.conf` (`search`, `ndots`). The first that has records counts, and one that fails is a failure of the whole: what
/// later ones say, or do not know, proves nothing.
#[derive(Clone)]
pub struct DnsRegistry {
    resolver: Arc<TokioResolver>,
    search: Search,
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

/// The domains that a name without a dot at its end may be relative to.
#[derive(Clone, Default)]
struct Search {
    domains: Arc<[Name]>,
    /// Names with fewer dots are first tried in the domains.
    ndots: usize,
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
        let (config, options) = read_system_conf().map_err(wrong)?;
        let search = Search::of(&config, &options);
        let resolver = resolver(config, options).map_err(wrong)?;
        Ok(Self { resolver, search, records, pattern: "{}".into(), floor: FLOOR })
    }

    /// Asks this server instead of the system's, first over UDP, and searches no domains.
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
        self.resolver = resolver(config, ResolverOpts::default())
            .map_err(|error| Error::invalid("the resolver cannot be built").with_source(error))?;
        self.search = Search::default();
        Ok(self)
    }

    /// The name to ask for, with `{}` in the place of the service: `_{}._tcp.internal.`. Default `{}`.
    #[must_use]
    pub fn pattern(mut self, pattern: impl Into<Arc<str>>) -> Self {
        self.pattern = pattern.into();
        self
    }

    /// How soon a name is asked for again at the earliest, whatever its time to live. Default 5 s; at least 10 ms.
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
        // What nothing says a time of is not to be believed for long.
        Ok((instances, ttl.unwrap_or_default().clamp(self.floor, CEILING.max(self.floor))))
    }

    async fn addresses_of(&self, name: &str) -> Result<(Vec<IpAddr>, Option<Duration>), Error> {
        let (records, ttl) = self.lookup(name, &[RecordType::A, RecordType::AAAA]).await?;
        let addresses = records.into_iter().filter_map(|data| match data {
            RData::A(a) => Some(a.0.into()),
            RData::AAAA(a) => Some(a.0.into()),
            _ => None,
        });
        Ok((addresses.collect(), ttl))
    }

    async fn targets_of(&self, name: &str) -> Result<(Vec<Instance>, Option<Duration>), Error> {
        let (records, mut ttl) = self.lookup(name, &[RecordType::SRV]).await?;
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
            ttl = ttl.into_iter().chain(its).min();
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

    /// The records of these types, of the first name that may be meant and has any; and the least time to live of what was
    /// said, if anything said one. That there are none is no failure.
    async fn lookup(&self, name: &str, of: &[RecordType]) -> Result<(Vec<RData>, Option<Duration>), Error> {
        let wrong = |error: ProtoError| Error::unavailable(format!("{name} is no name")).with_source(error);
        let mut none = None;
        // Relaxed: what is no host name by the letter, such as one with an underscore, is looked up all the same.
        for name in self.search.meant(Name::from_str_relaxed(name).map_err(wrong)?) {
            let said = future::try_join_all(of.iter().map(|of| self.records_of(&name, *of))).await?;
            let ttl = said.iter().filter_map(|(_, ttl)| *ttl).min();
            let records: Vec<_> = said.into_iter().flat_map(|(records, _)| records).collect();
            if !records.is_empty() {
                return Ok((records, ttl));
            }
            none = none.into_iter().chain(ttl).min();
        }
        Ok((Vec::new(), none))
    }

    async fn records_of(&self, name: &Name, of: RecordType) -> Result<(Vec<RData>, Option<Duration>), Error> {
        let seconds = |ttl: u32| Duration::from_secs(ttl.into());
        match self.resolver.lookup(name.clone(), of).await {
            Ok(found) => {
                let records: Vec<_> = found.answers().iter().filter(|record| record.record_type() == of).collect();
                // That of aliases on the way to them as well.
                let ttl = found.answers().iter().map(|record| record.ttl).min().map(seconds);
                Ok((records.into_iter().map(|record| record.data.clone()).collect(), ttl))
            }
            Err(NetError::Dns(DnsError::NoRecordsFound(none)))
                if matches!(none.response_code, ResponseCode::NXDomain | ResponseCode::NoError) =>
            {
                Ok((Vec::new(), none.negative_ttl.map(seconds)))
            }
            Err(error) => Err(Error::unavailable(format!("{of} of {name} cannot be looked up")).with_source(error)),
        }
    }
}

fn resolver(config: ResolverConfig, mut options: ResolverOpts) -> Result<Arc<TokioResolver>, NetError> {
    // How long an answer counts is decided here.
    options.cache_size = 0;
    options.edns0 = true;
    let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
    *builder.options_mut() = options;
    builder.build().map(Arc::new)
}

// === impl Search ===

impl Search {
    fn of(config: &ResolverConfig, options: &ResolverOpts) -> Self {
        let domains: Vec<_> = match config.search() {
            [] => config.domain().cloned().into_iter().collect(),
            search => search.to_vec(),
        };
        Self { domains: domains.into(), ndots: options.ndots }
    }

    /// The names that may be meant by one, in the order in which they are tried. They are absolute: the resolver would go on
    /// to the next one after a failure as well.
    fn meant(&self, name: Name) -> Vec<Name> {
        if name.is_fqdn() {
            return vec![name];
        }
        let as_it_is_first = usize::from(name.num_labels()) > self.ndots;
        // What would be too long with a domain is not meant.
        let mut names: Vec<_> =
            self.domains.iter().filter_map(|domain| name.clone().append_domain(domain).ok()).collect();
        let mut name = name;
        name.set_fqdn(true);
        names.insert(if as_it_is_first { 0 } else { names.len() }, name);
        names
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_resolver::proto::op::{Message, Metadata, OpCode};
    use hickory_resolver::proto::rr::Record;
    use hickory_resolver::proto::rr::rdata::{A, AAAA, SRV};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, UdpSocket};

    /// What a script says to a question: records with their times to live, or a code.
    type Said = Result<Vec<(u32, RData)>, ResponseCode>;

    /// A server on one port, over UDP and TCP; over UDP it truncates what has more than four records.
    struct Server {
        address: SocketAddr,
        over_tcp: Arc<AtomicUsize>,
    }

    impl Server {
        async fn start(script: fn(&str, RecordType) -> Said) -> Self {
            let (udp, tcp) = loop {
                let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
                if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()).await {
                    break (udp, tcp);
                }
            };
            let (address, over_tcp) = (udp.local_addr().unwrap(), Arc::<AtomicUsize>::default());
            tokio::spawn(async move {
                let mut asked = [0; 1500];
                while let Ok((length, from)) = udp.recv_from(&mut asked).await {
                    udp.send_to(&answer(&asked[..length], script, 4), from).await.unwrap();
                }
            });
            let counted = over_tcp.clone();
            tokio::spawn(async move {
                while let Ok((mut stream, _)) = tcp.accept().await {
                    counted.fetch_add(1, Ordering::Relaxed);
                    tokio::spawn(async move {
                        while let Ok(length) = stream.read_u16().await {
                            let mut asked = vec![0; length.into()];
                            stream.read_exact(&mut asked).await.unwrap();
                            let answer = answer(&asked, script, usize::MAX);
                            stream.write_u16(answer.len() as u16).await.unwrap();
                            stream.write_all(&answer).await.unwrap();
                        }
                    });
                }
            });
            Self { address, over_tcp }
        }

        fn of(&self, records: Records) -> DnsRegistry {
            DnsRegistry::new(records).unwrap().server(self.address).unwrap()
        }
    }

    fn answer(asked: &[u8], script: fn(&str, RecordType) -> Said, most: usize) -> Vec<u8> {
        let asked = Message::from_vec(asked).unwrap();
        let query = asked.queries[0].clone();
        let said = script(&query.name().to_utf8(), query.query_type());
        let mut answer = Message::response(asked.metadata.id, OpCode::Query);
        let metadata: &mut Metadata = &mut answer.metadata;
        (metadata.recursion_desired, metadata.recursion_available) = (true, true);
        metadata.response_code = said.as_ref().err().copied().unwrap_or(ResponseCode::NoError);
        metadata.truncation = said.as_ref().is_ok_and(|records| records.len() > most);
        let records = said.unwrap_or_default().into_iter().take(most);
        answer.add_answers(records.map(|(ttl, data)| Record::from_rdata(query.name().clone(), ttl, data)));
        answer.add_query(query);
        answer.to_vec().unwrap()
    }

    fn v4(last: u8) -> RData {
        RData::A(A::new(10, 0, 0, last))
    }

    fn srv(priority: u16, weight: u16, port: u16, target: &str) -> RData {
        RData::SRV(SRV::new(priority, weight, port, Name::from_utf8(target).unwrap()))
    }

    fn shown(instances: &[Instance]) -> Vec<(String, u32, u32)> {
        instances.iter().map(|i| (i.address.to_string(), i.priority, i.weight)).collect()
    }

    const LOOPBACK: RData = RData::AAAA(AAAA(std::net::Ipv6Addr::LOCALHOST));

    #[tokio::test]
    async fn srv_records_carry_priority_weight_and_port_and_their_targets_both_families() {
        let server = Server::start(|name, of| match (name, of) {
            ("orders.", RecordType::SRV) => {
                Ok(vec![(300, srv(20, 5, 82, "b.")), (300, srv(10, 0, 81, "a.")), (300, srv(10, 7, 83, "b."))])
            }
            ("a.", RecordType::A) => Ok(vec![(60, v4(1))]),
            ("a.", RecordType::AAAA) => Ok(vec![(90, LOOPBACK)]),
            ("b.", RecordType::A) => Ok(vec![(120, v4(2))]),
            _ => Ok(Vec::new()),
        })
        .await;
        let (found, ttl) = server.of(Records::Srv).ask("orders.").await.unwrap();
        let expected = [("10.0.0.1:81", 10, 1), ("10.0.0.2:83", 10, 7), ("[::1]:81", 10, 1), ("10.0.0.2:82", 20, 5)];
        assert_eq!(shown(&found), expected.map(|(at, priority, weight)| (at.to_owned(), priority, weight)));
        assert_eq!(ttl, Duration::from_secs(60), "the least of all that were believed");
    }

    #[tokio::test]
    async fn an_answer_is_believed_for_its_time_to_live_within_floor_and_ceiling() {
        let server = Server::start(|name, of| match (name, of) {
            ("gone.", _) => Err(ResponseCode::NXDomain),
            (name, RecordType::A) => Ok(vec![(name.trim_end_matches('.').parse().unwrap(), v4(1))]),
            _ => Ok(Vec::new()),
        })
        .await;
        let dns = server.of(Records::Addresses { port: 80 });
        for (name, seconds) in [("0.", 5), ("1.", 5), ("42.", 42), ("86400.", 300), ("gone.", 5)] {
            assert_eq!(dns.ask(name).await.unwrap().1, Duration::from_secs(seconds), "{name}");
        }
        let (_, ttl) = dns.clone().floor(Duration::from_secs(600)).ask("42.").await.unwrap();
        assert_eq!(ttl, Duration::from_secs(600));
        assert_eq!(dns.ask("gone.").await.unwrap().0, [], "a sound none");
    }

    fn searching(server: &Server, ndots: usize) -> DnsRegistry {
        let domains = ["ns.svc.", "corp."].map(|domain| Name::from_utf8(domain).unwrap());
        DnsRegistry {
            search: Search { domains: domains.to_vec().into(), ndots },
            ..server.of(Records::Addresses { port: 80 })
        }
    }

    #[tokio::test]
    async fn domains_are_searched_in_order_and_the_first_that_has_records_counts() {
        let server = Server::start(|name, of| match (name, of) {
            ("a.ns.svc." | "both.ns.svc.", RecordType::A) => Ok(vec![(30, v4(1))]),
            ("b.corp.", RecordType::A) => Ok(vec![(30, v4(2))]),
            ("both.corp.", RecordType::AAAA) => Ok(vec![(30, LOOPBACK)]),
            ("a.b.", RecordType::A) => Ok(vec![(30, v4(3))]),
            ("a.b.ns.svc.", RecordType::A) => Ok(vec![(30, v4(4))]),
            ("alone.", RecordType::A) => Ok(vec![(30, v4(5))]),
            _ => Err(ResponseCode::NXDomain),
        })
        .await;
        let (one, five) = (searching(&server, 1), searching(&server, 5));
        for (dns, name, found) in [
            (&one, "a", Some("10.0.0.1:80")),
            (&one, "b", Some("10.0.0.2:80")),
            (&one, "both", Some("10.0.0.1:80")),
            (&one, "a.b", Some("10.0.0.3:80")),
            (&five, "a.b", Some("10.0.0.4:80")),
            (&one, "a.ns.svc", Some("10.0.0.1:80")),
            (&one, "alone", Some("10.0.0.5:80")),
            (&one, "b.", None),
            (&one, "nobody", None),
        ] {
            let (instances, _) = dns.ask(name).await.unwrap();
            let addresses: Vec<_> = instances.iter().map(|instance| instance.address.to_string()).collect();
            assert_eq!(addresses, found.into_iter().collect::<Vec<_>>(), "{name}");
        }
    }

    /// The next domain knew nothing of the name, which was taken for "none".
    #[tokio::test]
    async fn a_domain_that_fails_is_a_failure_whatever_the_next_one_says() {
        let server = Server::start(|name, of| match (name, of) {
            ("orders.internal." | "orders.ns.svc.", _) => Err(ResponseCode::ServFail),
            ("orders.corp.", RecordType::A) => Ok(vec![(30, v4(1))]),
            _ => Err(ResponseCode::NXDomain),
        })
        .await;
        let dns = searching(&server, 1);
        for name in ["orders.internal", "orders"] {
            assert!(dns.ask(name).await.is_err_and(|error| error.is_unavailable()), "{name}");
        }
    }

    #[tokio::test]
    async fn what_is_truncated_comes_over_tcp_and_half_an_answer_is_a_failure() {
        let server = Server::start(|name, of| match (name, of) {
            ("many.", RecordType::A) => Ok((0..200).map(|i| (30, v4(i))).collect()),
            ("few.", RecordType::A) => Ok(vec![(30, v4(1))]),
            ("half.", RecordType::A) => Ok(vec![(30, v4(1))]),
            ("half.", RecordType::AAAA) => Err(ResponseCode::ServFail),
            ("split.", RecordType::SRV) => Ok(vec![(30, srv(1, 1, 80, "few.")), (30, srv(1, 1, 80, "half."))]),
            ("refused.", _) => Err(ResponseCode::Refused),
            _ => Ok(Vec::new()),
        })
        .await;
        let dns = server.of(Records::Addresses { port: 80 });
        assert_eq!(dns.ask("few.").await.unwrap().0.len(), 1);
        assert_eq!(server.over_tcp.load(Ordering::Relaxed), 0);
        assert_eq!(dns.ask("many.").await.unwrap().0.len(), 200);
        assert!(server.over_tcp.load(Ordering::Relaxed) > 0);
        for wrong in ["half.", "refused."] {
            assert!(dns.ask(wrong).await.unwrap_err().is_unavailable(), "{wrong}");
        }
        assert!(server.of(Records::Srv).ask("split.").await.unwrap_err().is_unavailable());
    }
}
