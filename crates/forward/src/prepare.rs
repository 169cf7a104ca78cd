//! Everything that is decided about a request before it is sent.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_LENGTH, EXPECT, HOST, HeaderValue, LOCATION, MAX_FORWARDS, TRANSFER_ENCODING, VIA};
use http::uri::{Authority, PathAndQuery};
use http::{Method, Request, Response, StatusCode, Uri, Version};
use portcullis_core::{
    Address, Body, Carried, Deadline, Dialect, Endpoint, GRPC_TIMEOUT, GrpcCode, HeadDeadline, Instance, Layer, Moment,
    Permit, Rejection, ReservedHeaders, Route, Scheme, clear_extensions, grpc_timeout, grpc_timeout_value,
    is_normal_path, normal_path,
};
use tokio::time::Instant;
use tracing::debug;

use crate::download::ResponseBody;
use crate::exchange::{Exchange, Switched, Target, Times};
use crate::failure::{Failure, Kind};
use crate::forwarded::{self, Via};
use crate::headers::{
    self, has_other_codings, join_cookies, look, rewrite_te, seen_by, strip_hop_by_hop, upgrade_wanted,
};
use crate::lease::Want;
use crate::pool::Pool;
use crate::tunnel::{Caller, Opening};
use crate::upload::Outgoing;
use crate::{BoxError, Host, Paths, Policy, Shared, Upstream};
use portcullis_wire::{after, earlier};

/// A request that can be sent.
pub(crate) struct Prepared {
    way: Way,
    dialect: Dialect,
    route: Option<Route>,
}

#[expect(clippy::large_enum_variant, reason = "nearly all are exchanges, and they move once, into a box")]
enum Way {
    Exchange(Exchange, Outgoing),
    Tunnel(Pin<Box<dyn Future<Output = Answer> + Send>>),
}

type Answer = Result<Response<Body<ResponseBody>>, Failure>;

pub(crate) enum Refusal {
    Rejection(Rejection),
    Answer(Box<Response<Body<ResponseBody>>>),
}

/// How many authorities an open proxy keeps connections to.
const AUTHORITIES: usize = 256;

impl Shared {
    /// Checks and rewrites the request; nothing has been sent when this refuses.
    pub(crate) fn prepare<B>(self: &Arc<Self>, request: Request<B>, dialect: Dialect) -> Result<Prepared, Refusal>
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let (mut parts, body) = request.into_parts();
        let route = Route::of(&parts.extensions).cloned();
        let policy = Merged { route: route.as_ref().and_then(|route| route.policy()), default: &self.policy };
        let found = look(&parts.headers);

        if parts.method == Method::CONNECT && !policy.tunnels() {
            return refuse(StatusCode::METHOD_NOT_ALLOWED, "connect", "this is no tunnel");
        }
        if found.via && seen_by(&parts.headers, &self.via.pseudonym) {
            return refuse(StatusCode::LOOP_DETECTED, "loop", "the request has been here before");
        }
        let authority = authority(&parts)?;
        if parts.method == Method::CONNECT {
            let opening = self.opening(parts, body, authority.as_ref(), &policy)?;
            return Ok(Prepared { way: Way::Tunnel(Box::pin(opening.run())), dialect, route });
        }
        if found.hop_by_hop && has_other_codings(&parts.headers) {
            return refuse(StatusCode::NOT_IMPLEMENTED, "transfer-coding", "the body is coded by more than chunks");
        }
        check_path(&parts.uri, policy.paths())?;
        max_forwards(&mut parts)?;
        let encrypted = parts.uri.scheme_str() == Some("https");
        let path = rewritten(std::mem::take(&mut parts.uri), &policy)?;

        let limit = policy.request_limit();
        if limit.is_some_and(|limit| body.size_hint().lower() > limit) {
            return Err(rejected(Failure::unsent(Kind::RequestTooLarge).rejection()));
        }
        let permit = Permit::take(&mut parts.extensions);
        let endpoint = self.endpoint(permit.as_ref(), encrypted, authority.as_ref())?;
        let instance = endpoint.instance();

        let upgrade = if found.upgrade && parts.version <= Version::HTTP_11 && body.is_end_stream() {
            upgrade_wanted(&parts.headers)
        } else {
            None
        };
        let want = match Want::of(&instance, dialect == Dialect::Grpc) {
            // Only HTTP/1.1 can change the protocol this way.
            Want::Agreed if upgrade.is_some() => Want::H1,
            want => want,
        };
        let upgrade = match upgrade {
            Some(protocol) if want != Want::H2 => {
                parts.extensions.remove::<hyper::upgrade::OnUpgrade>().map(|caller| Box::new((caller, protocol)))
            }
            _ => None,
        };

        let headers = &mut parts.headers;
        if found.cookie && parts.version == Version::HTTP_2 {
            join_cookies(headers);
        }
        if found.te {
            rewrite_te(headers);
        }
        if found.hop_by_hop {
            strip_hop_by_hop(headers);
        }
        if found.expect
            && headers.get(EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
        {
            // The server has answered that, or will when the body is asked for.
            headers.remove(EXPECT);
        }
        let mut added =
            forwarded::write(self.forwarded, &self.proxies, found, &parts.extensions, authority.as_ref(), headers);
        if let Some(prefix) = path.stripped
            && self.forwarded != crate::Forwarded::Nothing
            && let Ok(value) = HeaderValue::from_str(prefix)
        {
            headers.insert(forwarded::PREFIX, value);
        }
        added.via = Some(parts.version);
        let mut edited = false;
        for edits in policy.request_edits().filter(|edits| !edits.is_empty()) {
            edited = true;
            added.append_to(&self.via, headers);
            headers::apply(edits, headers);
        }
        let authority = match (policy.host(), authority) {
            (Host::Fixed(value), _) => value.clone(),
            (Host::Keep, Some(authority)) => authority,
            (Host::Endpoint | Host::Keep, _) => host_of(&instance),
        };
        // The body says how long it is; a field that says otherwise would let the upstream read another request.
        let length = body.size_hint().exact();
        if let Some(said) = headers.get(CONTENT_LENGTH) {
            let agrees =
                length.is_some_and(|length| said.to_str().ok().and_then(|said| said.parse().ok()) == Some(length));
            if !agrees || headers.get_all(CONTENT_LENGTH).iter().count() > 1 {
                headers.remove(CONTENT_LENGTH);
            }
        }
        headers.remove(TRANSFER_ENCODING);

        let (body, flow) = Outgoing::new(body, limit, ReservedHeaders::take(&mut parts.extensions));
        let is_grpc = dialect == Dialect::Grpc;
        let times = self.times(&policy, &mut parts, is_grpc);
        if times.end.is_some_and(|end| end <= times.start) {
            return Err(rejected(Failure::unsent(Kind::DeadlineInLine).rejection()));
        }
        let shard = endpoint.slot(&self.slot, || Pool::new(self.limits.clone())).shard().clone();
        clear_extensions(&mut parts.extensions);
        let exchange = Exchange {
            shared: self.clone(),
            shard,
            endpoint,
            want,
            method: parts.method,
            headers: parts.headers,
            added,
            extensions: parts.extensions,
            target: Target { path: path.target, authority },
            flow,
            upgrade,
            permit,
            times,
            response_limit: policy.response_limit(),
            // Where trailers do not arrive, the end of a call could be taken for a whole answer.
            takes_status: is_grpc && parts.version == Version::HTTP_2,
            edited,
        };
        Ok(Prepared { way: Way::Exchange(exchange, body), dialect, route })
    }

    fn opening<B>(
        &self,
        mut parts: http::request::Parts,
        body: B,
        authority: Option<&HeaderValue>,
        policy: &Merged<'_>,
    ) -> Result<Opening, Refusal>
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        if parts.uri.port_u16().is_none() {
            return refuse(StatusCode::BAD_REQUEST, "connect", "the target of CONNECT names no port");
        }
        if parts.headers.contains_key(CONTENT_LENGTH) || parts.headers.contains_key(TRANSFER_ENCODING) {
            return refuse(StatusCode::BAD_REQUEST, "connect", "CONNECT has no body");
        }
        let permit = Permit::take(&mut parts.extensions);
        let endpoint = self.endpoint(permit.as_ref(), false, authority)?;
        let caller = match parts.extensions.remove::<hyper::upgrade::OnUpgrade>() {
            Some(caller) => Caller::Connection(caller),
            None if parts.version == Version::HTTP_2 => Caller::Stream(Outgoing::new(body, None, None).0),
            None => {
                return refuse(StatusCode::NOT_IMPLEMENTED, "connect", "the server does not let go of its connections");
            }
        };
        let times = self.times(policy, &mut parts, false);
        let shard = endpoint.slot(&self.slot, || Pool::new(self.limits.clone())).shard().clone();
        Ok(Opening { caller, endpoint, shard, permit, times })
    }

    fn times(&self, policy: &Merged<'_>, parts: &mut http::request::Parts, is_grpc: bool) -> Times {
        let start = Instant::now();
        let total = policy.time(|policy| policy.total_timeout).and_then(|timeout| after(start, timeout));
        let at = |moment: Moment| after(start, moment.since(self.clock.now()));
        let deadline = Deadline::of(&parts.extensions).and_then(|deadline| at(deadline.0));
        let caller =
            if is_grpc { grpc_timeout(&parts.headers).and_then(|timeout| after(start, timeout)) } else { None };
        let end = earlier(earlier(total, deadline), caller);
        if is_grpc && let Some(end) = end {
            let left = end.saturating_duration_since(start);
            parts.headers.insert(GRPC_TIMEOUT, grpc_timeout_value(left));
        }
        let attempt = policy.time(|policy| policy.attempt_timeout).and_then(|timeout| after(start, timeout));
        let attempt = earlier(attempt, HeadDeadline::of(&parts.extensions).and_then(|deadline| at(deadline.0)));
        let off = Duration::MAX;
        Times {
            start,
            leased: start,
            connect: policy.time(|policy| policy.connect_timeout).unwrap_or(off),
            response: policy.time(|policy| policy.response_timeout).unwrap_or(off),
            idle: policy.time(|policy| policy.idle_timeout).unwrap_or(off),
            head: earlier(attempt, end),
            end,
        }
    }

    fn endpoint(
        &self,
        permit: Option<&Permit>,
        encrypted: bool,
        authority: Option<&HeaderValue>,
    ) -> Result<Endpoint, Refusal> {
        if let Some(permit) = permit {
            return Ok(permit.endpoint().clone());
        }
        match &self.upstream {
            Upstream::Origin(endpoint) => Ok(endpoint.clone()),
            Upstream::Nowhere => refuse(
                StatusCode::INTERNAL_SERVER_ERROR,
                "no-endpoint",
                "no endpoint was picked: the balance layer is missing above forward, and no origin is set",
            ),
            Upstream::Authority(known) => {
                let text = authority.and_then(|authority| authority.to_str().ok()).unwrap_or_default();
                let Some(instance) = instance(text, if encrypted { Scheme::Https } else { Scheme::Http }) else {
                    return refuse(StatusCode::BAD_REQUEST, "no-authority", "the request does not say where it goes");
                };
                let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
                let at = known
                    .iter()
                    .position(|one| *one.address() == instance.address && one.instance().scheme == instance.scheme);
                let endpoint = match at {
                    Some(at) => known.remove(at),
                    None => Endpoint::new("authority", instance),
                };
                if known.len() >= AUTHORITIES {
                    known.remove(0);
                }
                known.push(endpoint.clone());
                Ok(endpoint)
            }
        }
    }
}

/// A route's policy over the default.
struct Merged<'a> {
    route: Option<&'a Policy>,
    default: &'a Policy,
}

impl Merged<'_> {
    fn pick<T>(&self, field: impl Fn(&Policy) -> Option<T>) -> Option<T> {
        self.route.and_then(&field).or_else(|| field(self.default))
    }

    fn time(&self, field: impl Fn(&Policy) -> Option<Duration>) -> Option<Duration> {
        self.pick(field)
    }

    fn paths(&self) -> Paths {
        self.pick(|policy| policy.paths).unwrap_or_default()
    }

    fn tunnels(&self) -> bool {
        self.pick(|policy| policy.tunnels).unwrap_or_default()
    }

    fn host(&self) -> &Host {
        self.route.and_then(|policy| policy.host.as_ref()).or(self.default.host.as_ref()).unwrap_or(&Host::Keep)
    }

    fn request_limit(&self) -> Option<u64> {
        self.pick(|policy| policy.request_limit)
    }

    fn response_limit(&self) -> Option<u64> {
        self.pick(|policy| policy.response_limit)
    }

    fn strip(&self) -> Option<&str> {
        self.route.and_then(|policy| policy.strip.as_deref()).or(self.default.strip.as_deref())
    }

    fn prepend(&self) -> Option<&str> {
        self.route.and_then(|policy| policy.prepend.as_deref()).or(self.default.prepend.as_deref())
    }

    /// The default's edits, then the route's.
    fn request_edits(&self) -> impl Iterator<Item = &[crate::Edit]> {
        [Some(self.default), self.route].into_iter().flatten().map(|policy| &*policy.request)
    }

    fn response_edits(&self) -> impl Iterator<Item = &[crate::Edit]> {
        [Some(self.default), self.route].into_iter().flatten().map(|policy| &*policy.response)
    }
}

// === impl Prepared ===

impl Prepared {
    /// Sends it, and makes of whatever comes back something that can be returned. An `async fn` would hold it twice, and be
    /// too large for the memory that allocators keep at hand.
    pub(crate) fn run(self) -> impl Future<Output = Response<Body<ResponseBody>>> + Send {
        let mut prepared = self;
        async move {
            let result = match &mut prepared.way {
                Way::Exchange(exchange, body) => {
                    let body = std::mem::replace(body, Outgoing::Empty);
                    exchange.run(body).await.map(|response| {
                        let (route, shared) = (prepared.route.as_ref(), &exchange.shared);
                        let policy = Merged { route: route.and_then(|route| route.policy()), default: &shared.policy };
                        returned(response, &shared.via, &policy).map(Body::new)
                    })
                }
                Way::Tunnel(opening) => opening.await,
            };
            match result {
                Ok(response) => response,
                Err(failure) => {
                    debug!(kind = ?failure.kind, sent = failure.sent, cause = failure.cause.as_deref(), "not forwarded");
                    failure.rejection().into_response(prepared.dialect)
                }
            }
        }
    }
}

/// What an intermediary must do to a response.
fn returned(mut response: Response<ResponseBody>, via: &Via, policy: &Merged<'_>) -> Response<ResponseBody> {
    let version = response.version();
    *response.version_mut() = Version::HTTP_11;
    let switched = response.extensions_mut().remove::<Switched>();
    let headers = response.headers_mut();
    let found = look(headers);
    if found.hop_by_hop {
        strip_hop_by_hop(headers);
    }
    if found.te {
        headers.remove(http::header::TE);
    }
    headers.append(VIA, via.value(version).clone());
    if let Some(Switched(protocol)) = switched {
        headers.insert(http::header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(http::header::UPGRADE, protocol);
    }
    for edits in policy.response_edits() {
        headers::apply(edits, headers);
    }
    response
}

fn rejected(rejection: Rejection) -> Refusal {
    Refusal::Rejection(rejection)
}

fn refuse<T>(status: StatusCode, reason: &'static str, detail: &'static str) -> Result<T, Refusal> {
    let mut rejection = Rejection::new(Layer::Forward, status, reason).with_detail(detail);
    if status == StatusCode::LOOP_DETECTED {
        rejection = rejection.with_grpc_code(GrpcCode::INTERNAL);
    }
    Err(rejected(rejection))
}

/// What the request asks of whom, from its target, else from `Host`. `None` only for HTTP/1.0, which need not say.
fn authority(parts: &http::request::Parts) -> Result<Option<HeaderValue>, Refusal> {
    let mut hosts = parts.headers.get_all(HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return refuse(StatusCode::BAD_REQUEST, "host", "more than one Host");
    }
    if let Some(authority) = parts.uri.authority() {
        if authority.as_str().contains('@') {
            return refuse(StatusCode::BAD_REQUEST, "host", "user information in the target");
        }
        // In HTTP/1.1 the target's authority replaces Host; in HTTP/2 two that differ are two requests in one.
        if parts.version == Version::HTTP_2
            && host.is_some_and(|host| !host.as_bytes().eq_ignore_ascii_case(authority.as_str().as_bytes()))
        {
            return refuse(StatusCode::BAD_REQUEST, "host", "Host differs from :authority");
        }
        return Ok(HeaderValue::from_str(authority.as_str()).ok());
    }
    match host {
        Some(host) if host.is_empty() => Ok(None),
        Some(host) if is_plain_host(host.as_bytes()) => Ok(Some(host.clone())),
        Some(host) => match Authority::try_from(host.as_bytes()) {
            Ok(authority) if !authority.as_str().contains('@') => Ok(Some(host.clone())),
            _ => refuse(StatusCode::BAD_REQUEST, "host", "Host is not a host"),
        },
        None if parts.version == Version::HTTP_11 => refuse(StatusCode::BAD_REQUEST, "host", "no Host"),
        None => Ok(None),
    }
}

/// Whether this is a name or an IPv4 address, with a port or without: an authority that need not be parsed.
fn is_plain_host(host: &[u8]) -> bool {
    let end = host.iter().position(|byte| !(byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.')));
    let (name, port) = host.split_at(end.unwrap_or(host.len()));
    let is_port = |port: &[u8]| !port.is_empty() && port.iter().all(u8::is_ascii_digit);
    !name.is_empty() && (port.is_empty() || port.strip_prefix(b":").is_some_and(is_port))
}

fn check_path(uri: &Uri, paths: Paths) -> Result<(), Refusal> {
    let path = uri.path();
    if paths == Paths::Pass || is_normal_path(path) {
        return Ok(());
    }
    if paths == Paths::Redirect
        && let Some(normal) = normal_path(path)
    {
        let location = match uri.query() {
            Some(query) => format!("{normal}?{query}"),
            None => normal.into_owned(),
        };
        if let Ok(location) = HeaderValue::try_from(location) {
            let mut response = Response::new(Body::default());
            *response.status_mut() = StatusCode::PERMANENT_REDIRECT;
            response.headers_mut().insert(LOCATION, location);
            return Err(Refusal::Answer(Box::new(response)));
        }
    }
    refuse(StatusCode::BAD_REQUEST, "path", "the path is not in normal form")
}

/// RFC 9110 §7.6.2: TRACE and OPTIONS go only so far.
fn max_forwards(parts: &mut http::request::Parts) -> Result<(), Refusal> {
    if parts.method != Method::TRACE && parts.method != Method::OPTIONS {
        return Ok(());
    }
    let Some(value) = parts.headers.get(MAX_FORWARDS) else { return Ok(()) };
    let Some(left) = value.to_str().ok().and_then(|text| text.trim().parse::<u32>().ok()) else {
        return refuse(StatusCode::BAD_REQUEST, "max-forwards", "Max-Forwards is not a number");
    };
    if let Some(left) = left.checked_sub(1) {
        parts.headers.insert(MAX_FORWARDS, HeaderValue::from(left));
        return Ok(());
    }
    if parts.method == Method::TRACE {
        // The request holds what other callers must not see, so it is not sent back.
        return refuse(StatusCode::METHOD_NOT_ALLOWED, "trace", "this is as far as the request goes");
    }
    let mut response = Response::new(Body::default());
    *response.status_mut() = StatusCode::NO_CONTENT;
    response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"));
    Err(Refusal::Answer(Box::new(response)))
}

struct Rewritten<'a> {
    target: PathAndQuery,
    stripped: Option<&'a str>,
}

/// The target in origin form, with the route's prefixes taken away and added.
fn rewritten<'a>(uri: Uri, policy: &'a Merged<'_>) -> Result<Rewritten<'a>, Refusal> {
    let path = uri.path();
    let mut stripped = None;
    let mut rest = path;
    if let Some(prefix) = policy.strip()
        && let Some(after) = path.strip_prefix(prefix)
        && (after.is_empty() || after.starts_with('/'))
    {
        (rest, stripped) = (after, Some(prefix));
    }
    let prepend = policy.prepend();
    if stripped.is_none() && prepend.is_none() {
        let target = uri.into_parts().path_and_query.unwrap_or_else(|| PathAndQuery::from_static("/"));
        return Ok(Rewritten { target, stripped });
    }
    let mut target = String::with_capacity(path.len() + 16);
    target.push_str(prepend.unwrap_or_default());
    target.push_str(if target.is_empty() && rest.is_empty() { "/" } else { rest });
    if let Some(query) = uri.query() {
        target.push('?');
        target.push_str(query);
    }
    match PathAndQuery::try_from(target) {
        Ok(target) if target.as_str().starts_with('/') => Ok(Rewritten { target, stripped }),
        _ => refuse(StatusCode::INTERNAL_SERVER_ERROR, "rewrite", "the route's rewritten path is not a path"),
    }
}

fn host_of(instance: &Instance) -> HeaderValue {
    let text = match &instance.address {
        Address::Unix(_) => "localhost".to_owned(),
        address => {
            let text = address.to_string();
            let default = if instance.scheme == Scheme::Https { ":443" } else { ":80" };
            text.strip_suffix(default).map(str::to_owned).unwrap_or(text)
        }
    };
    HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static("localhost"))
}

/// `http://host:port`, `https://host`, or an address.
pub(crate) fn origin(text: &str) -> Option<Instance> {
    let (scheme, rest) = match text.split_once("://") {
        Some(("http", rest)) => (Scheme::Http, rest),
        Some(("https", rest)) => (Scheme::Https, rest),
        Some(_) => return None,
        None => (Scheme::Http, text),
    };
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    if rest.starts_with("unix:") {
        let mut instance = Instance::new("origin", rest.parse::<Address>().ok()?);
        instance.scheme = scheme;
        return Some(instance);
    }
    instance(rest, scheme)
}

fn instance(authority: &str, scheme: Scheme) -> Option<Instance> {
    let port = if scheme == Scheme::Https { 443 } else { 80 };
    let parsed = Authority::try_from(authority).ok()?;
    if parsed.as_str().contains('@') {
        return None;
    }
    let text = if parsed.port().is_some() { authority.to_owned() } else { format!("{authority}:{port}") };
    let mut instance = Instance::new("origin", text.parse::<Address>().ok()?);
    instance.scheme = scheme;
    Some(instance)
}
