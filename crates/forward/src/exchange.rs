//! One request, one answer: on a connection of the pool, with every way it can go wrong told apart.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, Entry, HOST, TRANSFER_ENCODING, UPGRADE};
use http::uri::{Authority, Parts, PathAndQuery, Scheme};
use http::{Extensions, HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, Version};
use http_body::Body as _;
use hyper::upgrade::OnUpgrade;
use portcullis_core::{Endpoint, Permit};
use tokio::time::Instant;

use crate::Shared;
use crate::download::{Limits, ResponseBody};
use crate::failure::{Failure, Kind};
use crate::forwarded::Added;
use crate::h1::{Answered, Asked, Broken, H1};
use crate::h2::{Sender, StreamPlace, Upload, is_open};
use crate::headers::{KEEP_ALIVE, PROXY_CONNECTION, rewrite_te};
use crate::lease::{Lease, Want};
use crate::pool::Shard;
use crate::tunnel;
use crate::upload::{Flow, Outgoing, Progress};
use portcullis_wire::{Alarm, Length, Received, after, earlier};

/// Everything decided about a request before it is sent.
pub(crate) struct Exchange {
    pub(crate) shared: Arc<Shared>,
    pub(crate) endpoint: Endpoint,
    pub(crate) shard: Arc<Shard>,
    pub(crate) want: Want,
    pub(crate) method: Method,
    pub(crate) headers: HeaderMap,
    pub(crate) added: Added,
    /// Nothing but memory for those of the answer.
    pub(crate) extensions: Extensions,
    pub(crate) target: Target,
    pub(crate) flow: Option<Arc<Flow>>,
    /// Boxed, since few ask for one.
    pub(crate) upgrade: Option<Box<(OnUpgrade, HeaderValue)>>,
    pub(crate) permit: Option<Permit>,
    pub(crate) times: Times,
    pub(crate) response_limit: Option<u64>,
    /// Whether a gRPC status can be said in trailers.
    pub(crate) takes_status: bool,
    /// Whether a route's edits had a hand in the fields.
    pub(crate) edited: bool,
}

/// The two forms of a request's target.
pub(crate) struct Target {
    /// Origin form, for HTTP/1.1.
    pub(crate) path: PathAndQuery,
    /// What the upstream sees as `Host` or `:authority`.
    pub(crate) authority: HeaderValue,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    pub(crate) start: Instant,
    /// When the last try had a connection.
    pub(crate) leased: Instant,
    pub(crate) connect: Duration,
    pub(crate) response: Duration,
    pub(crate) idle: Duration,
    /// When the head must be there.
    pub(crate) head: Option<Instant>,
    /// When all must be over.
    pub(crate) end: Option<Instant>,
}

/// What became of one try.
enum Tried {
    Answered(Response<ResponseBody>),
    /// The request came back as it was.
    Returned(Outgoing, Failure),
    Failed(Failure, Again),
}

/// Whether the same request may be tried once more on another connection, if it can be made again.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Again {
    /// Nothing of it arrived.
    Always,
    /// The connection had been used before and broke before a byte of an answer: what may be repeated may be tried again.
    IfIdempotent,
    Never,
}

/// How often a request that came back unsent is tried on another connection.
const TRIES: usize = 3;

// === impl Exchange ===

impl Exchange {
    /// Sends the request and waits for the head of the answer.
    pub(crate) async fn run(&mut self, body: Outgoing) -> Result<Response<ResponseBody>, Failure> {
        let can_repeat = matches!(body, Outgoing::Empty);
        let mut body = Some(body);
        // Whether a byte of an earlier try reached the upstream.
        let mut sent = false;
        let (mut fresh, mut repeated) = (false, false);
        for tries in 1.. {
            let lease = match (!fresh).then(|| self.shard.take(self.want, self.times.start)).flatten() {
                Some(lease) => lease,
                // Boxed, since few come this way and all would carry its room.
                None => Box::pin(self.lease(fresh)).await.map_err(|failure| failure.or_sent(sent))?,
            };
            let Some(body_now) = body.take() else { break };
            let tried = match lease {
                Lease::H1(h1) => self.try_h1(h1, body_now).await,
                Lease::H2(sender, place, reused) => {
                    self.try_h2(sender, place, reused, body_now, can_repeat && reused).await
                }
            };
            match tried {
                Tried::Answered(response) => return Ok(response),
                Tried::Returned(again, failure) => {
                    if tries >= TRIES {
                        return Err(failure.or_sent(sent));
                    }
                    body = Some(again);
                    // Idle connections that died meanwhile came one after the other; a new one ends that.
                    fresh = tries + 1 >= TRIES;
                }
                Tried::Failed(failure, again) => {
                    sent |= failure.sent;
                    let may = match again {
                        Again::Always => true,
                        Again::IfIdempotent => self.method.is_idempotent() && !std::mem::replace(&mut repeated, true),
                        Again::Never => false,
                    };
                    // Only for a connection that was used before were the fields kept.
                    if !may || !can_repeat || tries >= TRIES || self.is_stripped() {
                        return Err(failure.or_sent(sent));
                    }
                    body = Some(Outgoing::Empty);
                    fresh = true;
                }
            }
        }
        Err(Failure::sent(Kind::Reset))
    }

    /// A connection that is not there at once, in the time there is for that.
    async fn lease(&mut self, fresh: bool) -> Result<Lease, Failure> {
        let limit = after(Instant::now(), self.times.connect);
        let deadline = earlier(limit, self.times.head);
        let lease = self.shard.lease(&self.endpoint, self.want, fresh, deadline).await;
        self.times.leased = Instant::now();
        let over = self.times.head.is_some_and(|head| head <= self.times.leased);
        lease.map_err(|failure| match failure.kind {
            Kind::ConnectTimeout if over => Failure { kind: Kind::Deadline, ..failure },
            Kind::Exhausted if over => Failure { kind: Kind::DeadlineInLine, ..failure },
            _ => failure,
        })
    }

    /// Whether the fields went with the request.
    fn is_stripped(&self) -> bool {
        self.headers.is_empty() && self.added.via.is_none()
    }

    /// For HTTP/2. The fields are kept if it may have to be made again.
    fn request(&mut self, body: &Outgoing, keep: bool) -> Request<()> {
        self.added.append_to(&self.shared.via, &mut self.headers);
        let mut headers = if keep { self.headers.clone() } else { std::mem::take(&mut self.headers) };
        headers.remove(HOST);
        if self.edited {
            // Whatever a route adds: HTTP/2 knows none of these.
            for name in [CONNECTION, KEEP_ALIVE, PROXY_CONNECTION, TRANSFER_ENCODING, UPGRADE] {
                headers.remove(name);
            }
            rewrite_te(&mut headers);
        }
        let has_length = !matches!(self.method, Method::GET | Method::HEAD | Method::DELETE | Method::CONNECT);
        if let Some(length) = body.size_hint().exact()
            && (length != 0 || has_length)
            && let Entry::Vacant(entry) = headers.entry(CONTENT_LENGTH)
        {
            entry.insert(length.into());
        }
        let mut request = Request::new(());
        *request.method_mut() = self.method.clone();
        *request.version_mut() = Version::HTTP_2;
        *request.uri_mut() = self.target.absolute(&self.endpoint);
        *request.headers_mut() = headers;
        request
    }

    async fn try_h1(&mut self, mut h1: Box<H1>, body: Outgoing) -> Tried {
        let asked = Asked {
            method: &self.method,
            target: self.target.path.as_str(),
            host: &self.target.authority,
            headers: &self.headers,
            added: &self.added,
            via: &self.shared.via,
            upgrade: self.upgrade.as_deref().map(|(_, protocol)| protocol),
            length: match body.size_hint().exact() {
                _ if body.is_end_stream() => Length::None,
                Some(length) => Length::Exact(length),
                None => Length::Chunked,
            },
        };
        h1.start(&asked, body);
        let polled = poll_fn(|cx| {
            let before = h1.written();
            if let Poll::Ready(answer) = h1.poll_answer(cx, &self.method, &mut self.headers) {
                return Poll::Ready(Ok(answer));
            }
            if let Some(flow) = self.flow.as_ref().filter(|_| h1.written() > before) {
                flow.touch();
            }
            self.poll_limits(&mut h1.alarm, cx).map(Err)
        })
        .await;
        let sent = h1.written() > 0;
        let failed = |kind, cause, again| Tried::Failed(Failure { kind, sent, cause }, again);
        match polled {
            Ok(Ok(answered)) => self.answered_h1(answered, h1),
            Ok(Err(Broken::Malformed(malformed))) => {
                let failure = Failure::sent(Kind::Malformed).because(&malformed);
                Tried::Failed(failure, Again::Never)
            }
            Ok(Err(Broken::Closed(error))) => {
                let again = match h1.has_heard() {
                    _ if !sent => Again::Always,
                    false if h1.reused => Again::IfIdempotent,
                    _ => Again::Never,
                };
                failed(Kind::Reset, error.map(|error| error.to_string().into()), again)
            }
            Ok(Err(Broken::Body)) => failed(self.whose_fault(Kind::Reset), None, Again::Never),
            Ok(Err(Broken::Length)) => failed(Kind::Unsendable, None, Again::Never),
            Err(kind) => failed(self.whose_fault(kind), None, Again::Never),
        }
    }

    fn answered_h1(&mut self, answered: Answered, mut h1: Box<H1>) -> Tried {
        let Answered { status, version, headers, reason, .. } = answered;
        let mut response = Response::new(());
        *response.status_mut() = status;
        *response.version_mut() = version;
        *response.headers_mut() = headers;
        *response.extensions_mut() = std::mem::take(&mut self.extensions);
        if let Some(reason) = reason {
            response.extensions_mut().insert(reason);
        }
        if status == StatusCode::SWITCHING_PROTOCOLS {
            return self.switched(response, h1);
        }
        if self.is_too_large(h1.size_hint().lower()) {
            return Tried::Failed(Failure::sent(Kind::ResponseTooLarge), Again::Never);
        }
        let mut beside = None;
        if h1.is_sending()
            && let (Some(flow), Some(upload)) = (&self.flow, h1.split())
        {
            // The answer came early; the rest of the request goes on beside it, whether the answer is read or not.
            beside = Some(flow.clone());
            tokio::spawn(upload.run(flow.clone(), self.times.idle, self.times.end));
        }
        let body = match h1.whole_body() {
            Some(bytes) => {
                self.shard.put(h1, &self.endpoint);
                self.permit = None;
                ResponseBody::whole(bytes)
            }
            None => {
                let (limits, permit) = (self.limits(), self.permit.take());
                ResponseBody::h1(h1, self.shard.clone(), self.endpoint.clone(), limits, permit).beside(beside)
            }
        };
        Tried::Answered(response.map(|()| body))
    }

    fn switched(&mut self, mut response: Response<()>, h1: Box<H1>) -> Tried {
        let (Some(upgrade), Some((upstream, early, place))) = (self.upgrade.take(), h1.into_parts()) else {
            return Tried::Failed(Failure::sent(Kind::Switched), Again::Never);
        };
        let (caller, protocol) = *upgrade;
        let agreed = response.headers().get(UPGRADE).is_some_and(|answer| {
            let (answer, asked) = (answer.as_bytes().trim_ascii(), protocol.as_bytes().trim_ascii());
            answer.eq_ignore_ascii_case(asked)
        });
        if !agreed {
            return Tried::Failed(Failure::sent(Kind::Switched), Again::Never);
        }
        let (idle, permit, busy) = (self.times.idle, self.permit.take(), self.endpoint.busy());
        // Not a task per request: one for a connection that is no longer a request.
        tokio::spawn(async move {
            let _held = (place, permit, busy);
            tunnel::run(caller, upstream, &early, idle).await;
        });
        response.extensions_mut().insert(Switched(protocol));
        Tried::Answered(response.map(|()| ResponseBody::whole(Bytes::new())))
    }

    async fn try_h2(
        &mut self,
        mut sender: Sender,
        place: StreamPlace,
        reused: bool,
        body: Outgoing,
        keep: bool,
    ) -> Tried {
        if let Err(error) = is_open(&mut sender) {
            return Tried::Returned(body, Failure::unsent(Kind::Reset).because(&error));
        }
        let (before, arrived) = (place.written(), place.arrived());
        let is_whole = body.is_end_stream();
        let (mut answer, stream) = match sender.send_request(self.request(&body, keep), is_whole) {
            Ok(begun) => begun,
            Err(error) => return not_begun(&error),
        };
        drop(sender);
        let mut upload = (!is_whole).then(|| Upload::new(stream, body));
        let mut alarm = Alarm::default();
        let polled = poll_fn(|cx| {
            if upload.as_mut().is_some_and(|upload| upload.poll(cx, self.flow.as_deref()).is_ready()) {
                upload = None;
            }
            if let Poll::Ready(answer) = Pin::new(&mut answer).poll(cx) {
                return Poll::Ready(Ok(answer));
            }
            self.poll_limits(&mut alarm, cx).map(Err)
        })
        .await;
        match polled {
            Ok(Ok(response)) => {
                let (mut head, stream) = response.into_parts();
                head.extensions = std::mem::take(&mut self.extensions);
                let stream = Received::new(stream, &head.headers);
                if !self.has_no_body(head.status) && self.is_too_large(stream.left().unwrap_or_default()) {
                    return Tried::Failed(Failure::sent(Kind::ResponseTooLarge), Again::Never);
                }
                let mut beside = None;
                if let (Some(upload), Some(flow)) = (upload, &self.flow) {
                    // The answer came early; the rest of the request goes on beside it, whether the answer is read or not.
                    beside = Some(flow.clone());
                    tokio::spawn(upload.run(flow.clone(), self.times.idle, self.times.end, place.shared()));
                }
                let (limits, permit) = (self.limits(), self.permit.take());
                Tried::Answered(Response::from_parts(
                    head,
                    ResponseBody::h2(stream, place, limits, permit).beside(beside),
                ))
            }
            Ok(Err(error)) => failed(&error, self.flow.as_deref(), place.written() > before, reused),
            // Even if nothing has left yet: the connection may be writing just now, or have it where it cannot be called back.
            Err(kind) => {
                if matches!(kind, Kind::ResponseTimeout | Kind::Deadline) {
                    place.doubt(arrived);
                }
                Tried::Failed(Failure::sent(self.whose_fault(kind)), Again::Never)
            }
        }
    }

    /// What ends the wait for a head.
    fn poll_limits(&self, alarm: &mut Alarm, cx: &mut Context<'_>) -> Poll<Kind> {
        let times = &self.times;
        let (limit, kind) = match &self.flow {
            None => (after(times.leased, times.response), Kind::ResponseTimeout),
            Some(flow) => match flow.progress() {
                Progress::Done => (after(flow.moved(), times.response), Kind::ResponseTimeout),
                Progress::Open => (after(flow.moved(), times.idle), Kind::RequestIdle),
                Progress::TooLarge => return Poll::Ready(Kind::RequestTooLarge),
                Progress::Broken => return Poll::Ready(Kind::RequestBroken),
            },
        };
        let Some(end) = earlier(limit, times.head) else { return Poll::Pending };
        alarm.poll(cx, end).map(|()| if limit == Some(end) { kind } else { Kind::Deadline })
    }

    /// A body that does not move may be waited for by either side.
    fn whose_fault(&self, kind: Kind) -> Kind {
        match (&self.flow, kind) {
            (Some(flow), Kind::RequestIdle) if !flow.waits_for_caller() => Kind::ResponseTimeout,
            (Some(flow), Kind::Reset) => broken(flow).unwrap_or(kind),
            _ => kind,
        }
    }

    /// Whether a length in the head of the answer is only that of another one
    /// ([RFC 9110](https://www.rfc-editor.org/rfc/rfc9110#section-8.6)).
    fn has_no_body(&self, status: StatusCode) -> bool {
        self.method == Method::HEAD || status == StatusCode::NOT_MODIFIED
    }

    fn is_too_large(&self, announced: u64) -> bool {
        self.response_limit.is_some_and(|limit| announced > limit)
    }

    fn limits(&self) -> Option<Box<Limits>> {
        Limits::new(self.times.idle, self.times.end, self.response_limit, self.takes_status)
    }
}

/// In the extensions of a response that changed the protocol: to which.
#[derive(Clone, Debug)]
pub(crate) struct Switched(pub(crate) HeaderValue);

fn broken(flow: &Flow) -> Option<Kind> {
    match flow.progress() {
        Progress::TooLarge => Some(Kind::RequestTooLarge),
        Progress::Broken => Some(Kind::RequestBroken),
        Progress::Open | Progress::Done => None,
    }
}

/// A stream could not begin: the connection ended just then, or the request cannot be said.
fn not_begun(error: &h2::Error) -> Tried {
    let is_over = error.is_go_away() || error.is_reset() || error.is_io();
    let (kind, again) = if is_over { (Kind::Reset, Again::Always) } else { (Kind::Unsendable, Again::Never) };
    Tried::Failed(Failure::unsent(kind).because(error), again)
}

fn failed(error: &h2::Error, flow: Option<&Flow>, sent: bool, stale: bool) -> Tried {
    if let Some(kind) = flow.and_then(broken) {
        return Tried::Failed(Failure { kind, sent, cause: None }, Again::Never);
    }
    let sent = sent && !is_unprocessed(error);
    let again = match () {
        () if !sent => Again::Always,
        // A stream that was reset is an answer: the connection is well.
        () if stale && !error.is_reset() => Again::IfIdempotent,
        () => Again::Never,
    };
    Tried::Failed(Failure { kind: Kind::Reset, sent, cause: None }.because(error), again)
}

/// Whether the other end says that it did not process the stream
/// ([RFC 9113](https://www.rfc-editor.org/rfc/rfc9113#section-8.7)).
fn is_unprocessed(h2: &h2::Error) -> bool {
    let refused = h2.is_reset() && h2.reason() == Some(h2::Reason::REFUSED_STREAM);
    // Of a stream that it may have processed h2 does not say so.
    h2.is_remote() && (refused || h2.is_go_away())
}

// === impl Target ===

impl Target {
    fn absolute(&self, endpoint: &Endpoint) -> Uri {
        let mut parts = Parts::default();
        parts.scheme = Some(match endpoint.instance().scheme {
            portcullis_core::Scheme::Https => Scheme::HTTPS,
            _ => Scheme::HTTP,
        });
        parts.authority = Authority::try_from(self.authority.as_bytes()).ok();
        parts.path_and_query = Some(self.path.clone());
        Uri::from_parts(parts).unwrap_or_else(|_| self.path.clone().into())
    }
}
