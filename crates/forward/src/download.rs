//! The response's body on its way back.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use http_body::{Body, Frame, SizeHint};
use portcullis_core::{Endpoint, GRPC_MESSAGE, GRPC_STATUS, GrpcCode, Permit};
use tokio::time::Instant;

use crate::BoxError;
use crate::h1::H1;
use crate::h2::StreamPlace;
use crate::headers::clean_trailers;
use crate::pool::Shard;
use crate::tunnel::Heard;
use crate::upload::Flow;
use portcullis_wire::{Alarm, Received, after, earlier};

/// The upstream's body, streamed as it arrives. A body that was cut short ends in an error, so that nobody takes it for
/// whole.
pub struct ResponseBody {
    source: Source,
    limits: Option<Box<Limits>>,
    /// Held until the body ends.
    permit: Option<Permit>,
    /// The rest of the request, which goes on beside the answer.
    beside: Option<Arc<Flow>>,
    over: bool,
}

enum Source {
    /// It has arrived; what is left of it.
    Whole(Bytes),
    /// This body drives the connection.
    H1(Box<H1>, Arc<Shard>, Endpoint),
    H2(Received, #[expect(dead_code, reason = "held until the body ends")] StreamPlace),
    Tunnel(Heard),
}

/// What may end the body early.
pub(crate) struct Limits {
    alarm: Alarm,
    idle: Duration,
    /// When the standstill that lasts now began.
    still: Option<Instant>,
    deadline: Option<Instant>,
    left: Option<u64>,
    /// Whether a gRPC status can be said in trailers.
    takes_status: bool,
}

/// Why a body was broken off by us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    Idle,
    Deadline,
    TooLarge,
}

// === impl ResponseBody ===

impl ResponseBody {
    /// A body that has arrived.
    pub(crate) fn whole(bytes: Bytes) -> Self {
        let over = bytes.is_empty();
        Self { source: Source::Whole(bytes), limits: None, permit: None, beside: None, over }
    }

    pub(crate) fn h1(
        h1: Box<H1>,
        shard: Arc<Shard>,
        endpoint: Endpoint,
        limits: Option<Box<Limits>>,
        permit: Option<Permit>,
    ) -> Self {
        Self { source: Source::H1(h1, shard, endpoint), limits, permit, beside: None, over: false }
    }

    pub(crate) fn h2(
        stream: Received,
        place: StreamPlace,
        limits: Option<Box<Limits>>,
        permit: Option<Permit>,
    ) -> Self {
        if stream.is_over() {
            return Self::whole(Bytes::new());
        }
        Self { source: Source::H2(stream, place), limits, permit, beside: None, over: false }
    }

    pub(crate) fn tunnel(heard: Heard) -> Self {
        Self { source: Source::Tunnel(heard), limits: None, permit: None, beside: None, over: false }
    }

    /// What is left of the request goes on beside it: neither stands still while the other moves, and who gives the answer up
    /// gives up both.
    pub(crate) fn beside(mut self, request: Option<Arc<Flow>>) -> Self {
        self.beside = request.filter(|_| !self.over);
        self
    }

    fn poll_source(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        Poll::Ready(match &mut self.source {
            Source::Whole(bytes) => Some(Ok(Frame::data(std::mem::take(bytes)))),
            Source::H1(h1, ..) => ready!(h1.poll_frame(cx)).map(|frame| frame.map_err(Into::into)),
            Source::H2(stream, _) => ready!(stream.poll_frame(cx)).map(|frame| frame.map_err(Into::into)),
            Source::Tunnel(heard) => ready!(heard.poll_data(cx)).map(|data| data.map(Frame::data).map_err(Into::into)),
        })
    }

    fn source_is_over(&self) -> bool {
        match &self.source {
            Source::Whole(bytes) => bytes.is_empty(),
            Source::H1(h1, ..) => h1.is_over(),
            Source::H2(stream, _) => stream.is_over(),
            Source::Tunnel(_) => false,
        }
    }

    /// Gives everything back that was held for the body.
    fn finish(&mut self, whole: bool) {
        self.over = true;
        self.permit = None;
        if let Some(request) = self.beside.take().filter(|_| !whole) {
            request.give_up();
        }
        match std::mem::replace(&mut self.source, Source::Whole(Bytes::new())) {
            Source::H1(h1, shard, endpoint) if whole => shard.put(h1, &endpoint),
            _ => {}
        }
    }

    fn cut(&mut self, cut: Cut) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.finish(false);
        let takes_status = self.limits.as_ref().is_some_and(|limits| limits.takes_status);
        if takes_status && cut == Cut::Deadline {
            let mut trailers = HeaderMap::new();
            trailers.insert(GRPC_STATUS, HeaderValue::from(u16::from(GrpcCode::DEADLINE_EXCEEDED.number())));
            trailers.insert(GRPC_MESSAGE, HeaderValue::from_static("the time for the request is over"));
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
        Poll::Ready(Some(Err(cut.into())))
    }
}

// === impl Limits ===

impl Limits {
    /// `None` when nothing may end the body.
    pub(crate) fn new(
        idle: Duration,
        deadline: Option<Instant>,
        left: Option<u64>,
        takes_status: bool,
    ) -> Option<Box<Self>> {
        let watched = idle < Duration::MAX || deadline.is_some() || left.is_some();
        watched.then(|| Box::new(Self { alarm: Alarm::default(), idle, still: None, deadline, left, takes_status }))
    }

    fn poll(&mut self, cx: &mut Context<'_>, beside: Option<&Flow>) -> Poll<Cut> {
        let still = *self.still.get_or_insert_with(Instant::now);
        let still = beside.map_or(still, |request| still.max(request.moved()));
        let idle = after(still, self.idle);
        let Some(end) = earlier(idle, self.deadline) else { return Poll::Pending };
        self.alarm.poll(cx, end).map(|()| if idle == Some(end) { Cut::Idle } else { Cut::Deadline })
    }

    /// Counts what passes; why no more may. A body that always has more ready does not come by the alarm.
    fn pass(&mut self, bytes: usize) -> Result<(), Cut> {
        self.still = None;
        if let Some(left) = &mut self.left {
            *left = left.checked_sub(bytes as u64).ok_or(Cut::TooLarge)?;
        }
        if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Err(Cut::Deadline);
        }
        Ok(())
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        if this.over {
            return Poll::Ready(None);
        }
        match this.poll_source(cx) {
            Poll::Ready(Some(Ok(mut frame))) => {
                if let Some(trailers) = frame.trailers_mut() {
                    clean_trailers(trailers);
                    this.finish(true);
                } else {
                    this.beside.iter().for_each(|request| request.touch());
                    let bytes = frame.data_ref().map_or(0, Bytes::len);
                    if let Some(limits) = &mut this.limits
                        && let Err(cut) = limits.pass(bytes)
                    {
                        return this.cut(cut);
                    }
                    if this.source_is_over() {
                        this.finish(true);
                    }
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                this.finish(false);
                Poll::Ready(Some(Err(error)))
            }
            Poll::Ready(None) => {
                this.finish(true);
                Poll::Ready(None)
            }
            Poll::Pending => {
                if let Some(limits) = &mut this.limits
                    && let Poll::Ready(cut) = limits.poll(cx, this.beside.as_deref())
                {
                    return this.cut(cut);
                }
                Poll::Pending
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        // As of the last frame: to ask h2 takes a lock.
        self.over
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Source::H1(h1, ..) => h1.size_hint(),
            Source::H2(stream, _) => stream.size_hint(),
            Source::Tunnel(_) => SizeHint::default(),
        }
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        if let Some(request) = &self.beside {
            request.give_up();
        }
    }
}

impl fmt::Debug for ResponseBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseBody").field("over", &self.over).finish_non_exhaustive()
    }
}

// === impl Cut ===

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Idle => "the upstream's body stood still for too long",
            Self::Deadline => "the time for the request is over",
            Self::TooLarge => "the upstream's body is larger than allowed",
        })
    }
}

impl std::error::Error for Cut {}
