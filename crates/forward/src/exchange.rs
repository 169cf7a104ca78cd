//! One request, one answer: on a connection of the pool, with every way it can go wrong told apart.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use http::header::{CONNECTION, CONTENT_LENGTH, HOST, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, Version};
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::{TrySendError, http2};
use hyper::upgrade::OnUpgrade;
use portcullis_core::{Endpoint, Permit, Scheme};
use tokio::time::Instant;

use crate::alarm::{Alarm, after, earlier};
use crate::download::{Limits, ResponseBody};
use crate::failure::{Failure, Kind};
use crate::headers::has_other_codings;
use crate::pool::{H1, Lease, Shard, StreamPlace, Want};
use crate::tunnel;
use crate::upload::{Flow, Outgoing, Progress};

/// Everything decided about a request before it is sent.
pub(crate) struct Exchange {
    pub(crate) endpoint: Endpoint,
    pub(crate) shard: Arc<Shard>,
    pub(crate) want: Want,
    pub(crate) method: Method,
    pub(crate) headers: HeaderMap,
    pub(crate) target: Target,
    pub(crate) flow: Option<Arc<Flow>>,
    pub(crate) upgrade: Option<(OnUpgrade, HeaderValue)>,
    pub(crate) permit: Option<Permit>,
    pub(crate) times: Times,
    pub(crate) response_limit: Option<u64>,
    pub(crate) is_grpc: bool,
}

/// The two forms of a request's target.
pub(crate) struct Target {
    /// Origin form, for HTTP/1.1.
    pub(crate) path: Uri,
    /// What the upstream sees as `Host` or `:authority`.
    pub(crate) authority: HeaderValue,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    pub(crate) start: Instant,
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
    Returned(Request<Outgoing>, Failure),
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
    pub(crate) async fn run(mut self, body: Outgoing) -> Result<Response<ResponseBody>, Failure> {
        let can_repeat = matches!(body, Outgoing::Empty) && self.upgrade.is_none();
        let mut body = Some(body);
        // Whether a byte of an earlier try reached the upstream.
        let mut sent = false;
        let mut fresh = false;
        for tries in 1.. {
            let lease = match (!fresh).then(|| self.shard.take(self.want, self.times.start)).flatten() {
                Some(lease) => lease,
                None => {
                    let limit = after(Instant::now(), self.times.connect);
                    let deadline = earlier(limit, self.times.head);
                    let lease = self.shard.lease(&self.endpoint, self.want, fresh, deadline).await;
                    lease.map_err(|failure| failure.or_sent(sent))?
                }
            };
            let Some(body_now) = body.take() else { break };
            let tried = match lease {
                Lease::H1(h1) => {
                    let spare = can_repeat && h1.reused;
                    let request = self.request(body_now, false, spare);
                    self.try_h1(h1, request).await
                }
                Lease::H2(sender, place, reused) => {
                    let spare = can_repeat && reused;
                    let request = self.request(body_now, true, spare);
                    self.try_h2(sender, place, reused, request).await
                }
            };
            match tried {
                Tried::Answered(response) => return Ok(response),
                Tried::Returned(request, failure) => {
                    if tries >= TRIES {
                        return Err(failure.or_sent(sent));
                    }
                    let (parts, again) = request.into_parts();
                    self.headers = parts.headers;
                    body = Some(again);
                    // Idle connections that died meanwhile came one after the other; a new one ends that.
                    fresh = tries + 1 >= TRIES;
                }
                Tried::Failed(failure, again) => {
                    sent |= failure.sent;
                    let may = match again {
                        Again::Always => true,
                        Again::IfIdempotent => self.method.is_idempotent(),
                        Again::Never => false,
                    };
                    // Only for a connection that was used before were the fields kept.
                    if !may || !can_repeat || tries >= TRIES || self.headers.is_empty() {
                        return Err(failure.or_sent(sent));
                    }
                    body = Some(Outgoing::Empty);
                    fresh = true;
                }
            }
        }
        Err(Failure::sent(Kind::Reset))
    }

    fn request(&mut self, body: Outgoing, h2: bool, keep: bool) -> Request<Outgoing> {
        let mut headers = if keep { self.headers.clone() } else { std::mem::take(&mut self.headers) };
        let mut request = Request::new(body);
        *request.method_mut() = self.method.clone();
        if h2 {
            headers.remove(HOST);
            *request.version_mut() = Version::HTTP_2;
            *request.uri_mut() = self.target.absolute(&self.endpoint);
        } else {
            if !headers.contains_key(HOST) {
                headers.insert(HOST, self.target.authority.clone());
            }
            let unknown_length = !request.body().is_end_stream() && request.body().size_hint().exact().is_none();
            if unknown_length {
                // hyper would take a GET of unknown length for one without a body.
                headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
            }
            if let Some((_, protocol)) = &self.upgrade {
                headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
                headers.insert(UPGRADE, protocol.clone());
            }
            *request.uri_mut() = self.target.path.clone();
        }
        *request.headers_mut() = headers;
        request
    }

    async fn try_h1(&mut self, mut h1: Box<H1>, request: Request<Outgoing>) -> Tried {
        let (read, written) = (h1.relay.read(), h1.relay.written());
        let mut sending = pin!(h1.sender.try_send_request(request));
        let polled = poll_fn(|cx| {
            // The answer comes by nothing but driving the connection here, so it need not wake anybody.
            h1.drive_for(cx);
            if let Poll::Ready(answer) = sending.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                return Poll::Ready(Ok(answer));
            }
            if h1.is_finished() {
                return Poll::Ready(Err(Kind::Reset));
            }
            self.poll_limits(&mut h1.alarm, cx).map(Err)
        })
        .await;
        // Nothing was taken by the transport: nothing can have arrived.
        let unsent = h1.relay.written() == written;
        let unanswered = h1.relay.read() == read;
        match polled {
            Ok(Ok(response)) => self.answered_h1(response, h1),
            Ok(Err(error)) => failed(error, self.flow.as_deref(), unsent, unanswered && h1.reused),
            Err(kind) => {
                let kind = self.whose_fault(kind);
                let again = if kind == Kind::Reset && unsent { Again::Always } else { Again::Never };
                Tried::Failed(Failure { kind, sent: !unsent, cause: None }, again)
            }
        }
    }

    fn answered_h1(&mut self, mut response: Response<Incoming>, h1: Box<H1>) -> Tried {
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return self.switched(response, h1);
        }
        if has_other_codings(response.headers()) {
            return Tried::Failed(Failure::sent(Kind::Malformed), Again::Never);
        }
        if response.headers().contains_key(TRANSFER_ENCODING) {
            // It was framed by the one, whatever the other said.
            response.headers_mut().remove(CONTENT_LENGTH);
        }
        if self.is_too_large(&response) {
            return Tried::Failed(Failure::sent(Kind::ResponseTooLarge), Again::Never);
        }
        let uploading = self.flow.as_ref().is_some_and(|flow| flow.progress() == Progress::Open);
        let limits = self.limits();
        let permit = self.permit.take();
        if uploading {
            // The answer came early; the rest of the request goes on beside it, whether the answer is read or not.
            let (parts, incoming) = response.into_parts();
            h1.relay.detach();
            tokio::spawn((*h1).abandon());
            return Tried::Answered(Response::from_parts(parts, ResponseBody::apart(incoming, limits, permit)));
        }
        let shard = &self.shard;
        let response = response.map(|incoming| {
            if h1.sender.is_ready() || incoming.is_end_stream() {
                // All of it has arrived.
                shard.put(h1, &self.endpoint);
                let left = limits.filter(|limits| limits.is_bounded());
                ResponseBody::apart(incoming, left, None)
            } else {
                ResponseBody::h1(incoming, h1, shard.clone(), self.endpoint.clone(), limits, permit)
            }
        });
        Tried::Answered(response)
    }

    fn switched(&mut self, mut response: Response<Incoming>, h1: Box<H1>) -> Tried {
        let Some((caller, protocol)) = self.upgrade.take() else {
            return Tried::Failed(Failure::sent(Kind::Switched), Again::Never);
        };
        let agreed = response.headers().get(UPGRADE).is_some_and(|answer| {
            let (answer, asked) = (answer.as_bytes().trim_ascii(), protocol.as_bytes().trim_ascii());
            answer.eq_ignore_ascii_case(asked)
        });
        if !agreed {
            return Tried::Failed(Failure::sent(Kind::Switched), Again::Never);
        }
        let upstream = hyper::upgrade::on(&mut response);
        let (idle, permit) = (self.times.idle, self.permit.take());
        // Not a task per request: one for a connection that is no longer a request.
        tokio::spawn(async move {
            let _permit = permit;
            let (_, ()) = tokio::join!(tunnel::run(caller, upstream, idle), h1.run());
        });
        let mut response = response.map(|incoming| ResponseBody::apart(incoming, None, None));
        response.extensions_mut().insert(Switched(protocol));
        Tried::Answered(response)
    }

    async fn try_h2(
        &mut self,
        mut sender: http2::SendRequest<Outgoing>,
        place: StreamPlace,
        reused: bool,
        request: Request<Outgoing>,
    ) -> Tried {
        let mut sending = pin!(sender.try_send_request(request));
        let mut alarm = Alarm::default();
        let polled = poll_fn(|cx| {
            if let Some(flow) = &self.flow {
                flow.watcher.register(cx.waker());
            }
            if let Poll::Ready(answer) = sending.as_mut().poll(cx) {
                return Poll::Ready(Ok(answer));
            }
            self.poll_limits(&mut alarm, cx).map(Err)
        })
        .await;
        match polled {
            Ok(Ok(response)) => {
                if self.is_too_large(&response) {
                    return Tried::Failed(Failure::sent(Kind::ResponseTooLarge), Again::Never);
                }
                let (limits, permit) = (self.limits(), self.permit.take());
                Tried::Answered(response.map(|incoming| ResponseBody::h2(incoming, place, limits, permit)))
            }
            Ok(Err(error)) => failed(error, self.flow.as_deref(), false, reused),
            Err(kind) => Tried::Failed(Failure::sent(self.whose_fault(kind)), Again::Never),
        }
    }

    /// What ends the wait for a head.
    fn poll_limits(&self, alarm: &mut Alarm, cx: &mut Context<'_>) -> Poll<Kind> {
        let times = &self.times;
        let (limit, kind) = match &self.flow {
            None => (after(times.start, times.response), Kind::ResponseTimeout),
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

    fn is_too_large(&self, response: &Response<Incoming>) -> bool {
        let announced = response.body().size_hint().lower();
        self.response_limit.is_some_and(|limit| announced > limit)
    }

    fn limits(&self) -> Option<Box<Limits>> {
        Limits::new(self.times.idle, self.times.end, self.response_limit, self.is_grpc)
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

fn failed(mut error: TrySendError<Request<Outgoing>>, flow: Option<&Flow>, unsent: bool, stale: bool) -> Tried {
    if let Some(request) = error.take_message() {
        return Tried::Returned(request, Failure::unsent(Kind::Reset).because(error.error()));
    }
    let error = error.into_error();
    if let Some(kind) = flow.and_then(broken) {
        return Tried::Failed(Failure { kind, sent: !unsent, cause: None }, Again::Never);
    }
    let unprocessed = unsent || is_unprocessed(&error);
    let kind = if error.is_parse() {
        Kind::Malformed
    } else if error.is_user() {
        Kind::Unsendable
    } else {
        Kind::Reset
    };
    let again = match kind {
        Kind::Reset if unprocessed => Again::Always,
        Kind::Reset if stale => Again::IfIdempotent,
        _ => Again::Never,
    };
    Tried::Failed(Failure { kind, sent: !unprocessed, cause: None }.because(&error), again)
}

/// Whether the other end says that it did not process the stream
/// ([RFC 9113](https://www.rfc-editor.org/rfc/rfc9113#section-8.7)).
fn is_unprocessed(error: &hyper::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(h2) = inner.downcast_ref::<h2::Error>() {
            let refused = h2.is_reset() && h2.reason() == Some(h2::Reason::REFUSED_STREAM);
            let gone = h2.is_go_away() && h2.reason() == Some(h2::Reason::NO_ERROR);
            return h2.is_remote() && (refused || gone);
        }
        source = inner.source();
    }
    false
}

// === impl Target ===

impl Target {
    fn absolute(&self, endpoint: &Endpoint) -> Uri {
        let scheme = match endpoint.instance().scheme {
            Scheme::Https => "https",
            _ => "http",
        };
        let path = self.path.path_and_query().map_or("/", |path| path.as_str());
        Uri::builder()
            .scheme(scheme)
            .authority(self.authority.as_bytes())
            .path_and_query(path)
            .build()
            .unwrap_or_else(|_| self.path.clone())
    }
}
