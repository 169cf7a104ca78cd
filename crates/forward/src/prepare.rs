//! Everything that is decided about a request before it is sent.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_LENGTH, EXPECT, HeaderValue, MAX_FORWARDS, TRANSFER_ENCODING, VIA};
use http::{Method, Request, Response, StatusCode, Version};
use portcullis_core::{
    Body, Carried, Deadline, Dialect, Endpoint, GRPC_TIMEOUT, GrpcCode, HeadDeadline, Layer, Moment, Permit, Rejection,
    ReservedHeaders, Route, Scheme, clear_extensions, grpc_timeout, grpc_timeout_value,
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
use crate::policy::Merged;
use crate::pool::Pool;
use crate::target::{authority, check_path, host_of, instance, rewritten};
use crate::tunnel::{Caller, Opening};
use crate::upload::Outgoing;
use crate::{BoxError, Host, Shared, Upstream};
use portcullis_wire::{after, earlier, parse_length};

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
            let agrees = length.is_some() && parse_length(said.as_bytes()) == length;
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

pub(crate) fn refuse<T>(status: StatusCode, reason: &'static str, detail: &'static str) -> Result<T, Refusal> {
    let mut rejection = Rejection::new(Layer::Forward, status, reason).with_detail(detail);
    if status == StatusCode::LOOP_DETECTED {
        rejection = rejection.with_grpc_code(GrpcCode::INTERNAL);
    }
    Err(rejected(rejection))
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
