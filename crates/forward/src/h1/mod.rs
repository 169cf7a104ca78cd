//! One HTTP/1.1 connection to an endpoint, driven by whoever holds it.
//!
//! There is no task, and no channel to one: the request's future writes the request and reads the head of the answer, and
//! the response's body reads the rest. So the socket's readiness wakes the very task that waits for it, and between
//! caller and socket nothing is handed over.

mod head;

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Method};
use http_body::{Frame, SizeHint};
use portcullis_wire::{Alarm, Decoder, Input, Malformed, SendError, Sending, after, earlier, poll_once};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, ReadHalf, WriteHalf};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use crate::stream::Stream;
use crate::upload::{Flow, Outgoing};

pub(crate) use head::{Answered, Asked};

pub(crate) struct H1 {
    io: Io,
    input: Input,
    /// Whether anything arrived since the request began.
    heard: bool,
    sending: Sending,
    body: Outgoing,
    /// Whether the transport takes no more of the request.
    deaf: bool,
    decoder: Decoder,
    keep_alive: bool,
    max_head: usize,
    pub(crate) reused: bool,
    pub(crate) alarm: Alarm,
    retire: Option<Instant>,
    idle_since: Instant,
    place: Arc<OwnedSemaphorePermit>,
}

enum Io {
    Whole(Stream),
    /// The rest of the request is being written by somebody else.
    Reading(ReadHalf<Stream>),
    Gone,
}

/// The rest of a request whose answer came early.
pub(crate) struct Upload {
    io: WriteHalf<Stream>,
    sending: Sending,
    body: Outgoing,
    alarm: Alarm,
    _place: Arc<OwnedSemaphorePermit>,
}

/// Why there is no answer.
#[derive(Debug)]
pub(crate) enum Broken {
    /// It ended, or broke, before the head was there.
    Closed(Option<io::Error>),
    Malformed(Malformed),
    /// What the caller sends cannot be sent to its end.
    Body,
    /// What the caller sends is not as long as it said.
    Length,
}

/// Why a body ended early.
#[derive(Debug)]
pub(crate) enum Cut {
    Closed,
    Io(io::Error),
    Malformed(Malformed),
}

// === impl H1 ===

impl H1 {
    pub(crate) fn new(
        stream: Stream,
        max_head: usize,
        retire: Option<Instant>,
        now: Instant,
        place: OwnedSemaphorePermit,
    ) -> Self {
        Self {
            io: Io::Whole(stream),
            input: Input::new(BytesMut::new()),
            heard: false,
            sending: Sending::default(),
            body: Outgoing::Empty,
            deaf: false,
            decoder: Decoder::OVER,
            keep_alive: true,
            max_head,
            reused: false,
            alarm: Alarm::default(),
            retire,
            idle_since: now,
            place: Arc::new(place),
        }
    }

    /// Begins a request.
    pub(crate) fn start(&mut self, head: &Asked<'_>, body: Outgoing) {
        self.heard = false;
        head.write(self.sending.begin(head.length));
        self.body = body;
    }

    /// Sends, and waits for the head of the answer, which may come before all has been sent.
    pub(crate) fn poll_answer(
        &mut self,
        cx: &mut Context<'_>,
        asked: &Method,
        headers: &mut HeaderMap,
    ) -> Poll<Result<Answered, Broken>> {
        let Io::Whole(io) = &mut self.io else { return Poll::Ready(Err(Broken::Closed(None))) };
        let mut refused = None;
        if !self.sending.is_done() {
            let sent = self.sending.poll(io, cx, Pin::new(&mut self.body));
            if self.sending.has_whole_body() {
                self.body = Outgoing::Empty;
            }
            match sent {
                Poll::Ready(Ok(())) | Poll::Pending => {}
                // It may have been answered before it was refused.
                Poll::Ready(Err(SendError::Io(error))) => {
                    self.sending.give_up();
                    self.body = Outgoing::Empty;
                    (self.deaf, refused) = (true, Some(error));
                }
                Poll::Ready(Err(SendError::Body(_))) => return Poll::Ready(Err(Broken::Body)),
                Poll::Ready(Err(SendError::Length)) => return Poll::Ready(Err(Broken::Length)),
            }
        }
        loop {
            if self.input.has_new_line()
                && let Some(answered) =
                    Answered::read(&mut self.input.buffer, asked, headers).map_err(Broken::Malformed)?
            {
                self.decoder = answered.body;
                self.keep_alive = answered.keep_alive;
                return Poll::Ready(Ok(answered));
            }
            if self.input.buffer.len() > self.max_head {
                return Poll::Ready(Err(Broken::Malformed(Malformed("the head is too large"))));
            }
            match ready!(self.input.poll_fill(io, cx)) {
                Ok(0) => return Poll::Ready(Err(Broken::Closed(refused))),
                Ok(_) => self.heard = true,
                Err(error) => return Poll::Ready(Err(Broken::Closed(Some(error)))),
            }
        }
    }

    /// The next frame of the body.
    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        loop {
            if let Some(frame) = self.decoder.next(&mut self.input.buffer).map_err(Cut::Malformed)? {
                return Poll::Ready(Some(Ok(frame)));
            }
            if self.decoder.is_over() {
                return Poll::Ready(None);
            }
            self.input.expect(self.decoder.expected());
            let filled = match &mut self.io {
                Io::Whole(io) => self.input.poll_fill(io, cx),
                Io::Reading(io) => self.input.poll_fill(io, cx),
                Io::Gone => return Poll::Ready(Some(Err(Cut::Closed))),
            };
            match ready!(filled) {
                Ok(0) if self.decoder.end() => return Poll::Ready(None),
                Ok(0) => return Poll::Ready(Some(Err(Cut::Closed))),
                Ok(_) => self.heard = true,
                Err(error) => return Poll::Ready(Some(Err(Cut::Io(error)))),
            }
        }
    }

    /// The whole body, if its length is known and all of it is there.
    pub(crate) fn whole_body(&mut self) -> Option<Bytes> {
        match self.decoder {
            Decoder::Length(length) if length <= self.input.buffer.len() as u64 => {
                let frame = self.decoder.next(&mut self.input.buffer).ok().flatten();
                Some(frame.and_then(|frame| frame.into_data().ok()).unwrap_or_default())
            }
            _ => None,
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.decoder.is_over()
    }

    pub(crate) fn size_hint(&self) -> SizeHint {
        self.decoder.size_hint()
    }

    /// How many bytes of the request the transport took.
    pub(crate) fn written(&self) -> u64 {
        self.sending.written()
    }

    /// Whether anything arrived since the request began.
    pub(crate) fn has_heard(&self) -> bool {
        self.heard
    }

    /// Whether part of the request is still to be sent.
    pub(crate) fn is_sending(&self) -> bool {
        !self.sending.is_done()
    }

    /// Gives the rest of the request to whoever sends it beside the answer.
    pub(crate) fn split(&mut self) -> Option<Upload> {
        let Io::Whole(stream) = std::mem::replace(&mut self.io, Io::Gone) else { return None };
        let (reading, io) = tokio::io::split(stream);
        self.io = Io::Reading(reading);
        self.keep_alive = false;
        let (sending, body) = (std::mem::take(&mut self.sending), std::mem::replace(&mut self.body, Outgoing::Empty));
        Some(Upload { io, sending, body, alarm: Alarm::default(), _place: self.place.clone() })
    }

    /// The transport and what has arrived of it, for another protocol, and the place among those that are open.
    pub(crate) fn into_parts(self) -> Option<(Stream, BytesMut, Arc<OwnedSemaphorePermit>)> {
        let Io::Whole(stream) = self.io else { return None };
        Some((stream, self.input.buffer, self.place))
    }

    /// Whether it can take another request; then it is left as if nobody had used it.
    pub(crate) fn rests(&mut self, now: Instant) -> bool {
        let clean = self.keep_alive && !self.deaf && self.decoder.is_over() && self.sending.is_done();
        if !clean || !self.is_quiet() {
            return false;
        }
        self.input.rest();
        self.sending.rest();
        self.reused = true;
        self.idle_since = now;
        true
    }

    /// Whether it is as it was left. What arrives unasked is the end, or answers nothing. This wakes nobody any more.
    pub(crate) fn is_quiet(&mut self) -> bool {
        let Io::Whole(io) = &mut self.io else { return false };
        let mut byte = [0];
        let mut byte = ReadBuf::new(&mut byte);
        self.input.buffer.is_empty() && poll_once(|cx| Pin::new(&mut *io).poll_read(cx, &mut byte)).is_pending()
    }

    pub(crate) fn is_over_age(&self, now: Instant, idle_timeout: Duration) -> bool {
        self.retire.is_some_and(|retire| now >= retire) || now.saturating_duration_since(self.idle_since) > idle_timeout
    }
}

// === impl Upload ===

impl Upload {
    /// Sends it to its end, unless the answer is given up, both stand still for `idle` or there is no time left. If it does not
    /// come to that, the upstream hears that there is no more: whoever reads its answer keeps the connection open.
    pub(crate) async fn run(mut self, flow: Arc<Flow>, idle: Duration, end: Option<Instant>) {
        let whole = std::future::poll_fn(|cx| {
            let before = self.sending.written();
            let sent = self.sending.poll(&mut self.io, cx, Pin::new(&mut self.body));
            if self.sending.written() > before {
                flow.touch();
            }
            if let Poll::Ready(sent) = sent {
                return Poll::Ready(sent.is_ok());
            }
            if flow.poll_given_up(cx).is_ready() {
                return Poll::Ready(false);
            }
            match earlier(after(flow.moved(), idle), end) {
                Some(end) => self.alarm.poll(cx, end).map(|()| false),
                None => Poll::Pending,
            }
        })
        .await;
        if !whole {
            _ = poll_once(|cx| Pin::new(&mut self.io).poll_shutdown(cx));
        }
    }
}

// === impl Cut ===

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("the upstream closed the connection before the end of the body"),
            Self::Io(_) => f.write_str("the connection to the upstream broke"),
            Self::Malformed(malformed) => write!(f, "the upstream's body is malformed: {malformed}"),
        }
    }
}

impl std::error::Error for Cut {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io(error) => Some(error),
            Self::Closed | Self::Malformed(_) => None,
        }
    }
}
