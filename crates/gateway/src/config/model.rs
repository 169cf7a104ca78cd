//! What a file can say: its sections, keys and defaults.

use std::net::SocketAddr;
use std::num::{NonZeroU16, NonZeroU32, NonZeroUsize};
use std::time::Duration;

use http::{HeaderName, HeaderValue, Method, StatusCode};
use portcullis_core::Address;
use serde_json::{Value as Json, json};

use super::read::{At, Blob, Bytes, Map, Node, Rate, Reader, Secret, Share, Value, section, words};

section! {
    /// Everything a file says.
    pub struct Config {
        /// Where callers come in, by name. Without any, one listens at 127.0.0.1:8080.
        listeners: Map<Listener>,
        /// Where instances of services are found, by name.
        registries: Map<At<Registry>>,
        /// The services behind the gateway, by name.
        services: Map<At<Service>>,
        /// Which requests go where. The most specific route wins, whatever the order.
        routes: Vec<At<Route>>,
        /// How callers prove who they are.
        auth: Auth,
        /// How often callers may come, by name; routes say which hold for them.
        limits: Map<At<Limit>>,
        /// Where the limits count, and what holds where a route says nothing.
        limiter: Limiter,
        /// Whose word about a caller's address is taken.
        trusted_proxies: TrustedProxies,
        /// What is written to standard error.
        log: Log,
        /// What is counted.
        metrics: Metrics,
        /// Whose traces requests belong to.
        traces: Traces,
        /// The operator's side.
        admin: Admin,
        /// The process.
        server: Server,
    }
}

section! {
    /// The process.
    pub struct Server {
        /// Threads that serve each listener. By default one for each core.
        threads: Option<NonZeroUsize>,
        /// How long to go on serving, not ready any more, after being told to stop, so that those in front notice.
        drain_delay: Duration = Duration::ZERO,
        /// How long requests under way may take after that before they are cut off.
        drain_timeout: Duration = Duration::from_secs(30),
        /// Loads the file again when it changes. It is looked at every two seconds.
        watch: bool = false,
    }
}

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
        /// How long a caller may take to send the head of a request.
        header_timeout: Duration = Duration::from_secs(10),
        /// How large the head of a request may be.
        max_header_size: Bytes = Bytes(64 << 10),
        /// Streams at a time on one HTTP/2 connection.
        max_streams: NonZeroU32 = NonZeroU32::new(128).unwrap_or(NonZeroU32::MIN),
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

section! {
    /// A service behind the gateway.
    pub struct Service {
        /// Its instances, when they are known. Either this or `registry`.
        endpoints: Vec<Endpoint>,
        /// The registry that knows its instances.
        registry: Option<At<String>>,
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
        /// Speaks TLS to all endpoints listed here.
        https: bool = false,
        /// What endpoints listed here speak: "auto" is HTTP/2 for gRPC and HTTP/1.1 otherwise.
        protocol: Protocol = Protocol::Auto,
        /// The Host endpoints see: "keep" what the caller asked for, "endpoint" their own address, or a name.
        host: String = String::from("keep"),
    }
}

/// One instance: an address, or a table that says more.
#[derive(Clone, Debug, PartialEq)]
pub struct Endpoint(pub EndpointTable);

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
    }
}

impl Value for Endpoint {
    fn read(node: &Node<'_>, reader: &mut Reader<'_>) -> Option<Self> {
        if node.get_ref().is_str() {
            let address = At::read(node, reader)?;
            return Some(Self(EndpointTable { address, weight: 1, priority: 0, zone: None }));
        }
        EndpointTable::read(node, reader).map(Self)
    }

    fn schema() -> Json {
        json!({ "anyOf": [Address::schema(), EndpointTable::schema()] })
    }

    fn show(&self) -> Json {
        self.0.show()
    }
}

section! {
    /// How an endpoint is picked.
    pub struct Balance {
        /// By what.
        policy: BalancePolicy = BalancePolicy::PowerOfTwo,
        /// When fewer than so many percent of the endpoints admit, all are used. 0 never does that.
        panic_threshold: u8 = 50,
        /// How long to wait for an endpoint that admits before a request is refused.
        wait: Option<Duration>,
    }
}

words! {
    /// How an endpoint is picked.
    pub enum BalancePolicy {
        /// The less busy of two taken at random.
        PowerOfTwo = "power-of-two",
        /// The least busy of all.
        LeastConnections = "least-connections",
        /// One after the other, by weight.
        RoundRobin = "round-robin",
        /// Any, by weight.
        Random = "random",
        /// The faster of two, by a moving average that jumps up at once.
        PeakEwma = "peak-ewma",
    }
}

section! {
    /// When an endpoint is kept away from.
    pub struct Breaker {
        /// Whether there is one at all.
        enabled: bool = true,
        /// Opens after so many failures in a row; 0 does not look at that.
        failures: u16 = 5,
        /// How long it stays open.
        open_for: Duration = Duration::from_secs(60),
        /// How long it may stay open at most when it opens again and again, twice as long each time.
        open_limit: Option<Duration>,
        /// How many requests at a time see how things are, after that.
        probes: NonZeroU16 = NonZeroU16::MIN,
        /// How many of them must succeed for it to close.
        successes: NonZeroU16 = NonZeroU16::MIN,
        /// When such a request is taken for lost.
        probe_timeout: Duration = Duration::from_secs(10),
        /// Opens when this share of the calls in the window failed.
        failure_rate: Option<At<Share>>,
        /// Opens when this share of the calls in the window was slow.
        slow_rate: Option<At<Share>>,
        /// From when on a call is slow.
        slow_after: Option<At<Duration>>,
        /// The window: so many calls. Either this or `window`.
        window_calls: Option<At<u16>>,
        /// The window: so long.
        window: Option<At<Duration>>,
        /// Does not look at shares of fewer calls than this.
        at_least: u32 = 20,
    }
}

section! {
    /// When another endpoint is tried.
    pub struct Retry {
        /// Attempts in all; 1 never tries another.
        attempts: u8 = 2,
        /// Gives an attempt up after so long.
        attempt_timeout: Option<Duration>,
        /// Whether a connection that broke is a reason.
        on_reset: bool = true,
        /// Statuses that are a reason, such as 503.
        on_statuses: Vec<StatusCode>,
        /// gRPC codes that are a reason, as numbers, such as 14.
        on_grpc: Vec<u8>,
        /// Also repeats requests that are not idempotent, though an endpoint may have acted on them.
        any_method: bool = false,
        /// How much of a request's body is kept to send it again.
        max_body: Bytes = Bytes(64 << 10),
        /// The longest wait before the second attempt.
        backoff: Duration = Duration::from_millis(25),
        /// The longest wait before any attempt.
        max_backoff: Duration = Duration::from_millis(250),
    }
}

section! {
    /// How long things may take.
    pub struct Timeouts {
        /// To have a connection.
        connect: Option<Duration>,
        /// From the end of the request to the head of the response.
        response: Option<Duration>,
        /// From the first byte to the last, other attempts included.
        total: Option<Duration>,
        /// Without a byte in either direction.
        idle: Option<Duration>,
    }
}

section! {
    /// The connections to a service's endpoints.
    pub struct Pool {
        /// Idle connections kept for each endpoint.
        max_idle: Option<NonZeroUsize>,
        /// Connections for each endpoint.
        max_connections: Option<NonZeroUsize>,
        /// How long an idle connection is kept.
        idle_timeout: Option<Duration>,
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
        name: Option<String>,
    }
}

section! {
    /// Asks endpoints how they are.
    pub struct Health {
        /// How they are asked.
        kind: HealthKind = HealthKind::Http,
        /// HTTP: the path to get; any 2xx is well. gRPC: the name of the service to ask for.
        path: Option<String>,
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

section! {
    /// Which requests go where.
    pub struct Route {
        /// For logs and metrics, instead of the path.
        name: Option<String>,
        /// Host names, such as "api.example.com" or "*.example.com". Any, by default.
        hosts: Vec<At<String>>,
        /// A path: "/a", with parameters "/a/{id}", with a rest "/a/{*rest}", which also takes "/a" and "/a/".
        path: Option<At<String>>,
        /// gRPC: a service, and perhaps a method, instead of a path.
        grpc: Option<Grpc>,
        /// Methods; any, by default. GET takes HEAD along.
        methods: Vec<Method>,
        /// Headers a request must have: a value, or a table that says what of it.
        headers: Map<Matches>,
        /// Query parameters a request must have.
        query: Map<Matches>,
        /// The service, or several with weights.
        to: Vec<Backend>,
        /// Sends the caller elsewhere instead.
        redirect: Option<Redirect>,
        /// Answers at once instead.
        respond: Option<Respond>,
        /// Takes this from the beginning of the path before it is sent on.
        strip_prefix: Option<At<String>>,
        /// Puts this before the path, after that.
        add_prefix: Option<At<String>>,
        /// What is asked of callers, instead of the default.
        auth: Option<RouteAuth>,
        /// Names of limits that hold here, instead of the default ones. An empty list: none.
        limits: Option<Vec<At<String>>>,
        /// Answers 504 to what takes longer, other attempts included.
        timeout: Option<Duration>,
        /// How large a request's body may be.
        max_body: Option<Bytes>,
        /// What becomes of paths that are not in normal form.
        paths: Paths = Paths::Refuse,
        /// Changes to the request's headers.
        request_headers: Edits,
        /// Changes to the response's headers.
        response_headers: Edits,
        /// Lets pages of other origins call.
        cors: Option<Cors>,
        /// When another endpoint is tried, instead of what the service says.
        retry: Option<Retry>,
    }
}

words! {
    /// What becomes of paths that are not in normal form.
    pub enum Paths {
        /// 400.
        Refuse = "refuse",
        /// 308 to the normal form.
        Redirect = "redirect",
        /// As they are.
        Pass = "pass",
    }
}

section! {
    /// A gRPC service and method.
    pub struct Grpc {
        /// The service with its package, such as "shop.v1.Orders".
        service: At<String>,
        /// The method; all, by default.
        method: Option<At<String>>,
    }
}

/// What of a value must be so: text must be equal.
#[derive(Clone, Debug, PartialEq)]
pub struct Matches(pub MatchesTable);

section! {
    /// What of a value must be so. Several keys must all hold.
    pub struct MatchesTable {
        /// It is this.
        exact: Option<String>,
        /// It begins so.
        prefix: Option<String>,
        /// Whether it is there at all.
        present: Option<bool>,
    }
}

impl Value for Matches {
    fn read(node: &Node<'_>, reader: &mut Reader<'_>) -> Option<Self> {
        if let Some(text) = node.get_ref().as_str() {
            return Some(Self(MatchesTable { exact: Some(text.to_owned()), prefix: None, present: None }));
        }
        MatchesTable::read(node, reader).map(Self)
    }

    fn schema() -> Json {
        json!({ "anyOf": [{ "type": "string" }, MatchesTable::schema()] })
    }

    fn show(&self) -> Json {
        self.0.show()
    }
}

/// A service and its share of a route's requests.
#[derive(Clone, Debug, PartialEq)]
pub struct Backend(pub BackendTable);

section! {
    /// A service and its share of a route's requests.
    pub struct BackendTable {
        /// Its name.
        service: At<String>,
        /// Its share, relative to the others.
        weight: u32 = 1,
    }
}

impl Value for Backend {
    fn read(node: &Node<'_>, reader: &mut Reader<'_>) -> Option<Self> {
        if node.get_ref().is_str() {
            return Some(Self(BackendTable { service: At::read(node, reader)?, weight: 1 }));
        }
        BackendTable::read(node, reader).map(Self)
    }

    fn schema() -> Json {
        json!({ "anyOf": [{ "type": "string" }, BackendTable::schema()] })
    }

    fn show(&self) -> Json {
        self.0.show()
    }
}

section! {
    /// Sends the caller elsewhere.
    pub struct Redirect {
        /// The status.
        status: At<u16> = At::of(302),
        /// "http" or "https", instead of the one that was used.
        scheme: Option<At<String>>,
        /// A host, perhaps with a port, instead of the one that was asked for.
        host: Option<At<String>>,
        /// A path, instead of the one that was asked for.
        path: Option<At<String>>,
    }
}

section! {
    /// Answers at once.
    pub struct Respond {
        /// The status.
        status: StatusCode = StatusCode::OK,
        /// The body.
        body: String = String::new(),
        /// What the body is.
        content_type: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8"),
    }
}

section! {
    /// Changes to headers.
    pub struct Edits {
        /// Replaces all of that name.
        set: Map<HeaderValue>,
        /// Adds one beside those of that name.
        add: Map<HeaderValue>,
        /// Removes all of that name.
        remove: Vec<HeaderName>,
    }
}

section! {
    /// Lets pages of other origins call ([the fetch standard](https://fetch.spec.whatwg.org/#http-cors-protocol)).
    pub struct Cors {
        /// Origins, such as `https://app.example.com`, or "*".
        origins: Vec<At<String>>,
        /// Methods, beside those that need no leave.
        methods: Vec<Method>,
        /// Headers a page may send, or "*".
        headers: Vec<String>,
        /// Headers a page may read.
        expose: Vec<HeaderName>,
        /// Lets pages send cookies and credentials. Not with the origin "*".
        credentials: bool = false,
        /// How long a browser may remember the answer.
        max_age: Duration = Duration::from_secs(600),
    }
}

section! {
    /// How callers prove who they are.
    pub struct Auth {
        /// Ways to prove it, by name.
        providers: Map<At<Provider>>,
        /// What is asked of callers where a route says nothing. "required" if there is a provider, else "none".
        default: Option<At<AuthMode>>,
        /// The realm in challenges.
        realm: Option<String>,
    }
}

words! {
    /// Whether callers must prove who they are.
    pub enum AuthMode {
        /// They must.
        Required = "required",
        /// They may.
        Optional = "optional",
        /// They are not asked.
        None = "none",
    }
}

section! {
    /// A way to prove who one is: signed tokens (JWT).
    pub struct Provider {
        /// A shared secret; HS256, unless `algorithm` says otherwise.
        secret: Option<At<Secret>>,
        /// A public key, as PEM; needs `algorithm`.
        public_key: Option<At<Blob>>,
        /// A set of keys, as a file (JWKS).
        jwks: Option<At<Blob>>,
        /// A set of keys at a URL, fetched again when needed.
        jwks_url: Option<At<String>>,
        /// Authorities of the server at `jwks_url`, as PEM, instead of the system's.
        ca: Option<At<Blob>>,
        /// The algorithm that goes with `secret` or `public_key`, such as "ES256".
        algorithm: Option<At<String>>,
        /// Who must have issued a token.
        issuer: Option<String>,
        /// Whom a token must be for; one of these.
        audiences: Vec<String>,
        /// Where in a token the roles are, such as "/realm_access/roles".
        roles_from: Option<String>,
        /// Claims that must be there.
        require: Vec<String>,
        /// How far clocks may be apart.
        leeway: Option<Duration>,
    }
}

/// What is asked of callers: a word, or a table that says more.
#[derive(Clone, Debug, PartialEq)]
pub struct RouteAuth(pub RouteAuthTable);

section! {
    /// What is asked of callers.
    pub struct RouteAuthTable {
        /// Whether they must prove who they are.
        mode: AuthMode = AuthMode::Required,
        /// Which providers are believed; all, by default.
        providers: Vec<At<String>>,
        /// Scopes a token must all have.
        scopes: Vec<String>,
        /// Scopes of which a token must have one.
        any_scope: Vec<String>,
        /// Roles a caller must all have.
        roles: Vec<String>,
        /// Roles of which a caller must have one.
        any_role: Vec<String>,
    }
}

impl Value for RouteAuth {
    fn read(node: &Node<'_>, reader: &mut Reader<'_>) -> Option<Self> {
        if node.get_ref().is_str() {
            let mode = AuthMode::read(node, reader)?;
            return RouteAuthTable::absent().map(|table| Self(RouteAuthTable { mode, ..table }));
        }
        RouteAuthTable::read(node, reader).map(Self)
    }

    fn schema() -> Json {
        json!({ "anyOf": [AuthMode::schema(), RouteAuthTable::schema()] })
    }

    fn show(&self) -> Json {
        self.0.show()
    }
}

section! {
    /// How often callers may come.
    pub struct Limit {
        /// Such as "100/s", "20/m" or "5/10s".
        rate: Rate,
        /// How many may come at once after a rest; by default as many as the rate says.
        burst: Option<NonZeroU32>,
        /// Who counts together.
        key: LimitKey = LimitKey::Caller,
        /// The header that tells callers apart, with the key "header".
        header: Option<At<HeaderName>>,
        /// The claim that tells callers apart, with the key "claim".
        claim: Option<At<String>>,
    }
}

words! {
    /// Who counts together.
    pub enum LimitKey {
        /// A caller: who they proved to be, else where they come from.
        Caller = "caller",
        /// Where they come from.
        Address = "address",
        /// Everybody.
        Everyone = "everyone",
        /// The value of a header.
        Header = "header",
        /// The value of a claim.
        Claim = "claim",
    }
}

section! {
    /// Where limits count.
    pub struct Limiter {
        /// Names of limits that hold where a route says nothing.
        default: Vec<At<String>>,
        /// How many callers have a count of their own, for each limit.
        capacity: NonZeroUsize = NonZeroUsize::new(65_536).unwrap_or(NonZeroUsize::MIN),
    }
}

section! {
    /// Whose word about a caller's address is taken. By default nobody's.
    pub struct TrustedProxies {
        /// Networks of proxies, such as "10.0.0.0/8".
        networks: Vec<At<String>>,
        /// How many proxies stand in front, whatever their addresses. Instead of networks.
        hops: Option<At<usize>>,
        /// The header they write.
        header: ProxyHeader = ProxyHeader::XForwardedFor,
    }
}

words! {
    /// The header that proxies write.
    pub enum ProxyHeader {
        /// The usual one.
        XForwardedFor = "x-forwarded-for",
        /// The one of RFC 7239.
        Forwarded = "forwarded",
    }
}

section! {
    /// What is written to standard error.
    pub struct Log {
        /// How it looks.
        format: LogFormat = LogFormat::Text,
        /// What is written: a level, or directives such as "info,portcullis_forward=debug".
        level: At<String> = At::of(String::from("info")),
        /// Writes a line for each request.
        access: bool = true,
        /// The share of requests that succeed which get one; all that fail do.
        sample: Share = Share(1.0),
    }
}

words! {
    /// How logs look.
    pub enum LogFormat {
        /// For people.
        Text = "text",
        /// For machines.
        Json = "json",
    }
}

section! {
    /// Whose traces requests belong to.
    pub struct Traces {
        /// Takes over a caller's `traceparent`, or begins a trace, and passes it on.
        propagate: bool = true,
        /// Whether callers' traces go on here. Where strangers call, false begins a new one for each request.
        accept: bool = true,
        /// The share of traces begun here that is exported. Of a caller's trace the caller has decided.
        sample: Share = Share(1.0),
        /// Exports a span for each request and each attempt.
        otlp: Option<At<Otlp>>,
    }
}

section! {
    /// An OpenTelemetry collector. The program must be built with the feature `otlp`.
    pub struct Otlp {
        /// Where it listens for OTLP over HTTP, such as "http://127.0.0.1:4318"; spans go to /v1/traces below that.
        endpoint: At<String>,
        /// What it is told besides, such as a key.
        headers: Map<Secret>,
        /// Authorities of a collector that speaks TLS, as PEM, instead of the system's.
        ca: Option<Blob>,
        /// What this gateway is called there.
        service_name: String = String::from("portcullis"),
        /// What else is said of it, such as deployment.environment.name.
        resource: Map<String>,
        /// How long spans wait for others.
        interval: Duration = Duration::from_secs(5),
        /// How long it may take to take them.
        timeout: Duration = Duration::from_secs(10),
        /// How many requests may wait; of others nothing is exported.
        queue: NonZeroUsize = NonZeroUsize::new(4096).unwrap_or(NonZeroUsize::MIN),
    }
}

section! {
    /// What is counted at /metrics of the operator's side.
    pub struct Metrics {
        /// Whether there is such a page.
        enabled: bool = true,
        /// Counts each endpoint, not only each service.
        endpoints: bool = true,
    }
}

section! {
    /// The operator's side: page, state, metrics.
    pub struct Admin {
        /// Whether there is one.
        enabled: bool = true,
        /// Where it listens; port 0 takes a free one and says which.
        address: At<SocketAddr> = At::of(SocketAddr::from(([127, 0, 0, 1], 9901))),
        /// Lets it change things: reload, drain, force breakers, log level. Otherwise it only shows.
        writable: bool = false,
        /// What a request that changes something must bring as a bearer token. Needed beyond this machine.
        token: Option<Secret>,
    }
}

impl<T> At<T> {
    /// A value that stands nowhere.
    pub(crate) fn of(value: T) -> Self {
        Self::new(value, 0..0)
    }
}

impl Limit {
    /// The rate as the file has it.
    pub(crate) fn masked_rate(&self) -> Json {
        self.rate.show()
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
            max_header_size: Bytes(64 << 10),
            max_streams,
        }
    }
}
