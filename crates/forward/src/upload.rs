//! The request's body on its way to the upstream.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::task::AtomicWaker;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use portcullis_core::ReservedHeaders;
use tokio::time::Instant;

use crate::BoxError;
use crate::headers::clean_trailers;

/// What connections send: nothing, or somebody's body. One type for all, so that connections can be shared; a request
/// without a body needs no box.
pub(crate) enum Outgoing {
    Empty,
    Stream(Pin<Box<dyn Body<Data = Bytes, Error = BoxError> + Send>>),
}

/// How far a body has come, for whoever waits for the response.
pub(crate) struct Flow {
    started: Instant,
    /// Nanoseconds from `started` to when some of it last moved, from the caller or to the upstream.
    moved: AtomicU64,
    state: AtomicU8,
    /// Whether the transport waits for the caller's next frame, not the upstream's reading.
    waits_for_caller: AtomicU8,
    /// Nobody reads the answer any more.
    given_up: AtomicBool,
    /// Who sends the rest of it beside the answer.
    sender: AtomicWaker,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    Open,
    /// Sent to the end.
    Done,
    /// Larger than allowed.
    TooLarge,
    /// The caller broke off.
    Broken,
}

pin_project! {
    struct Upload<B> {
        #[pin]
        body: B,
        flow: Tell,
        left: Option<u64>,
        reserved: Option<ReservedHeaders>,
    }
}

/// Marks the flow as done when the transport lets go of the body.
struct Tell(Arc<Flow>);

#[derive(Debug)]
struct Stopped(&'static str);

// === impl Outgoing ===

impl Outgoing {
    /// Takes `body` over; no more than `limit` bytes of it, and no trailers under names that are `reserved`.
    pub(crate) fn new<B>(body: B, limit: Option<u64>, reserved: Option<ReservedHeaders>) -> (Self, Option<Arc<Flow>>)
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        if body.is_end_stream() {
            return (Self::Empty, None);
        }
        let flow = Arc::new(Flow {
            started: Instant::now(),
            moved: AtomicU64::new(0),
            state: AtomicU8::new(Progress::Open as u8),
            waits_for_caller: AtomicU8::new(0),
            given_up: AtomicBool::new(false),
            sender: AtomicWaker::new(),
        });
        (Self::Stream(Box::pin(Upload { body, flow: Tell(flow.clone()), left: limit, reserved })), Some(flow))
    }
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.get_mut() {
            Self::Empty => Poll::Ready(None),
            Self::Stream(body) => body.as_mut().poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Stream(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Stream(body) => body.size_hint(),
        }
    }
}

// === impl Upload ===

impl<B> Body for Upload<B>
where
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.project();
        let flow = &this.flow.0;
        let Poll::Ready(frame) = this.body.poll_frame(cx) else {
            flow.waits_for_caller.store(1, Ordering::Relaxed);
            return Poll::Pending;
        };
        flow.waits_for_caller.store(0, Ordering::Relaxed);
        flow.touch();
        Poll::Ready(match frame {
            Some(Ok(mut frame)) => {
                if let (Some(left), Some(data)) = (this.left.as_mut(), frame.data_ref()) {
                    match left.checked_sub(data.len() as u64) {
                        Some(rest) => *left = rest,
                        None => {
                            flow.settle(Progress::TooLarge);
                            return Poll::Ready(Some(Err(Stopped("larger than allowed").into())));
                        }
                    }
                }
                if let Some(trailers) = frame.trailers_mut() {
                    clean_trailers(trailers);
                    if let Some(reserved) = this.reserved {
                        reserved.strike(trailers);
                    }
                }
                Some(Ok(frame))
            }
            Some(Err(error)) => {
                flow.settle(Progress::Broken);
                Some(Err(error.into()))
            }
            None => {
                flow.settle(Progress::Done);
                None
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

// === impl Flow ===

impl Flow {
    /// Some of it moved just now.
    pub(crate) fn touch(&self) {
        let nanos = u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.moved.store(nanos, Ordering::Relaxed);
    }

    fn settle(&self, progress: Progress) {
        let open = Progress::Open as u8;
        _ = self.state.compare_exchange(open, progress as u8, Ordering::AcqRel, Ordering::Relaxed);
    }

    pub(crate) fn progress(&self) -> Progress {
        match self.state.load(Ordering::Acquire) {
            0 => Progress::Open,
            1 => Progress::Done,
            2 => Progress::TooLarge,
            _ => Progress::Broken,
        }
    }

    /// Nobody reads the answer any more: what is left of the request is for nothing.
    pub(crate) fn give_up(&self) {
        self.given_up.store(true, Ordering::Release);
        self.sender.wake();
    }

    pub(crate) fn poll_given_up(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.sender.register(cx.waker());
        if self.given_up.load(Ordering::Acquire) { Poll::Ready(()) } else { Poll::Pending }
    }

    /// When some of it last moved, or of the answer while that goes on beside it.
    pub(crate) fn moved(&self) -> Instant {
        self.started + Duration::from_nanos(self.moved.load(Ordering::Relaxed))
    }

    /// Whether it is the caller who keeps the body from moving.
    pub(crate) fn waits_for_caller(&self) -> bool {
        self.waits_for_caller.load(Ordering::Relaxed) == 1
    }
}

// === impl Tell ===

impl Drop for Tell {
    fn drop(&mut self) {
        if self.0.progress() == Progress::Open {
            self.0.touch();
            self.0.settle(Progress::Done);
        }
    }
}

// === impl Stopped ===

impl std::fmt::Display for Stopped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Stopped {}
