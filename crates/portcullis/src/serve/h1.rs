//! A connection of HTTP/1.1, as long as its requests are plain: its task reads, asks the service and writes, and nothing is
//! handed over between tasks.
//!
//! Whatever is [not plain](head::Found::read) is left to hyper, and the connection with it, as if hyper had served it from
//! the beginning: upgrades, tunnels, `100 Continue`, HTTP/1.0, and every head that has to be refused. So there is one way in
//! which each request is understood.

mod head;
mod reader;

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, Request, Response, StatusCode, response};
use http_body::Body;
use pin_project_lite::pin_project;
use portcullis_core::WallClock;
use portcullis_wire::{Alarm, Decoder, Input, MAX_FIELDS, SendError, Sending, after, cut};
use tokio::io::AsyncWrite;
use tokio::time::Instant;
use tower_service::Service;

use super::connection::{Answer, Serve, WithPeer};
use super::incoming::Incoming;
use super::stream::date;
use super::transport::{LATE, Socket};
use super::{BoxError, Limits, spare};

pub(super) use reader::Reader;

use head::{Asked, Found, Framing};
use reader::{Cut, Reading, Writer};

pin_project! {
    pub(super) struct H1<S, B>
    where
        S: Service<Request<Incoming>>,
    {
        service: WithPeer<S>,
        connection: Connection,
        #[pin]
        state: State<Answer<S, S::Future, Incoming>, B>,
    }
}

pin_project! {
    #[project = Project]
    enum State<A, B> {
        /// For a request.
        Waiting,
        Asking { #[pin] answer: A },
        Answering { #[pin] body: B },
        /// The answer is out, and somebody still reads the request.
        Reading,
        Closing,
    }
}

/// All but the service and what it answers.
struct Connection {
    /// Until it is left to somebody else.
    socket: Option<Socket>,
    input: Input,
    sending: Sending,
    /// Memory of headers that are gone.
    headers: HeaderMap,
    /// The request under way.
    asked: Asked,
    /// Who takes its body.
    upload: Option<Writer>,
    keep_alive: bool,
    max_head: usize,
    /// How long a head may take.
    patience: Duration,
    /// Since when one could have come.
    since: Instant,
    alarm: Alarm,
}

/// Why a connection broke off.
#[derive(Debug)]
pub(super) enum Broken {
    Io(io::Error),
    /// The client closed it before it had its answer.
    Closed,
    /// The service has no answer.
    Service(BoxError),
    /// The answer's body failed.
    Body(BoxError),
    /// The answer's body is not as long as its head said.
    Length,
}

/// What a client gets whose request has two ends.
const AMBIGUOUS: &[u8] = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";

/// What there is of a connection that waits for a request.
#[expect(clippy::large_enum_variant, reason = "it is taken apart at once")]
enum Next {
    Request(Request<Incoming>),
    /// For others.
    Other,
    /// It closes without a word.
    End,
}

// === impl H1 ===

impl<S, B> H1<S, B>
where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone,
    S::Error: Into<BoxError>,
{
    /// `early` is what was read of it before.
    pub(super) fn new(socket: Socket, early: BytesMut, limits: &Limits, service: WithPeer<S>) -> Self {
        let connection = Connection {
            socket: Some(socket),
            input: Input::new(early),
            sending: Sending::default(),
            headers: HeaderMap::new(),
            asked: Asked::NOTHING,
            upload: None,
            keep_alive: true,
            max_head: limits.max_head,
            patience: limits.header,
            since: Instant::now(),
            alarm: Alarm::default(),
        };
        Self { service, connection, state: State::Waiting }
    }
}

impl<S, B> Serve for H1<S, B>
where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone,
    S::Error: Into<BoxError>,
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    /// The connection, if others are to go on with it.
    type End = Option<Socket>;
    type Error = Broken;

    fn end(self: Pin<&mut Self>) {
        let mut this = self.project();
        this.connection.keep_alive = false;
        if matches!(*this.state, State::Waiting) && this.connection.input.buffer.is_empty() {
            this.state.set(State::Closing);
        }
    }
}

impl<S, B> Future for H1<S, B>
where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone,
    S::Error: Into<BoxError>,
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Output = Result<Option<Socket>, Broken>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let connection = this.connection;
        loop {
            match this.state.as_mut().project() {
                Project::Waiting => match ready!(connection.poll_head(cx))? {
                    Next::Request(request) => {
                        let answer = this.service.answer(request);
                        this.state.set(State::Asking { answer });
                    }
                    Next::Other => return Poll::Ready(Ok(connection.give_away())),
                    Next::End => this.state.set(State::Closing),
                },
                Project::Asking { answer } => match answer.poll(cx) {
                    Poll::Ready(Ok(response)) => {
                        let (head, body) = response.into_parts();
                        connection.begin_answer(cx, head, &body);
                        this.state.set(State::Answering { body });
                    }
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(Broken::Service(error))),
                    Poll::Pending => ready!(connection.poll_request(cx))?,
                },
                Project::Answering { body } => match connection.poll_answer(cx, body)? {
                    Poll::Ready(()) => this.state.set(State::Reading),
                    Poll::Pending => ready!(connection.poll_request(cx))?,
                },
                Project::Reading => {
                    ready!(connection.poll_end(cx))?;
                    this.state.set(if connection.keep_alive { State::Waiting } else { State::Closing });
                }
                Project::Closing => {
                    let Some(socket) = &mut connection.socket else { return Poll::Ready(Ok(None)) };
                    ready!(Pin::new(socket).poll_shutdown(cx)).map_err(Broken::Io)?;
                    return Poll::Ready(Ok(None));
                }
            }
        }
    }
}

// === impl Connection ===

impl Connection {
    /// The next request.
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<Next, Broken>> {
        let Some(socket) = &mut self.socket else { return Poll::Ready(Ok(Next::End)) };
        loop {
            if self.input.has_new_line() {
                skip_empty_lines(&mut self.input.buffer);
                match Found::read(&mut self.input.buffer, self.max_head, &mut self.headers) {
                    Found::Part => {}
                    Found::Plain(mut parts, asked) => {
                        parts.extensions = spare::extensions();
                        let body = self.begin_request(asked);
                        return Poll::Ready(Ok(Next::Request(Request::from_parts(parts, body))));
                    }
                    Found::Other => return Poll::Ready(Ok(Next::Other)),
                    Found::Ambiguous => {
                        socket.say(AMBIGUOUS);
                        socket.expect_more();
                        return Poll::Ready(Ok(Next::End));
                    }
                }
            }
            if self.input.buffer.len() >= self.max_head {
                // Not one line of it has ended.
                return Poll::Ready(Ok(Next::Other));
            }
            match self.input.poll_fill(socket, cx) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Ok(Next::End)),
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(Broken::Io(error))),
                Poll::Pending => {
                    let Some(end) = after(self.since, self.patience) else { return Poll::Pending };
                    ready!(self.alarm.poll(cx, end));
                    if !self.input.buffer.is_empty() {
                        socket.say(LATE);
                    }
                    return Poll::Ready(Ok(Next::End));
                }
            }
        }
    }

    /// A head was read; what its service gets of the body.
    fn begin_request(&mut self, asked: Asked) -> Incoming {
        self.asked = asked;
        self.keep_alive &= asked.keep_alive;
        match asked.body {
            Decoder::OVER => Incoming::whole(Bytes::new()),
            Decoder::Length(length) if length <= self.input.buffer.len() as u64 => {
                self.asked.body = Decoder::OVER;
                // It fits into memory: it is there.
                Incoming::whole(cut(&mut self.input.buffer, length as usize))
            }
            body => {
                let length = if let Decoder::Length(length) = body { Some(length) } else { None };
                let (writer, reader) = reader::pair(length);
                self.upload = Some(writer);
                Incoming::http1(reader)
            }
        }
    }

    fn begin_answer<B: Body>(&mut self, cx: &Context<'_>, mut head: response::Parts, body: &B) {
        self.pass_over(cx);
        if head.status.is_informational() {
            // Nobody asked for another protocol, and this is not an answer.
            (head, _) = Response::new(()).into_parts();
            head.status = StatusCode::INTERNAL_SERVER_ERROR;
            head.headers.insert(http::header::CONTENT_LENGTH, 0.into());
            self.keep_alive = false;
        }
        let framing = Framing::of(&head, body, self.asked);
        let out = self.sending.begin(framing.length);
        let now = WallClock::system().since_epoch().as_secs();
        let closes = framing.write(out, &head, !self.keep_alive, date(now).as_bytes());
        self.keep_alive &= !closes;
        head.headers.clear();
        self.headers = head.headers;
        spare::give_back(head.extensions);
        if !self.asked.trailers {
            self.sending.leave_out_trailers();
        }
    }

    fn poll_answer<B>(&mut self, cx: &mut Context<'_>, body: Pin<&mut B>) -> Result<Poll<()>, Broken>
    where
        B: Body<Data = Bytes>,
        B::Error: Into<BoxError>,
    {
        let Some(socket) = &mut self.socket else { return Err(Broken::Closed) };
        match self.sending.poll(socket, cx, body) {
            Poll::Pending => Ok(Poll::Pending),
            Poll::Ready(Ok(())) => Ok(Poll::Ready(())),
            Poll::Ready(Err(SendError::Io(error))) => Err(Broken::Io(error)),
            Poll::Ready(Err(SendError::Body(error))) => Err(Broken::Body(error.into())),
            Poll::Ready(Err(SendError::Length)) => Err(Broken::Length),
        }
    }

    /// Sees to the request while it is answered. Ready when whoever answers has more of it to read.
    fn poll_request(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        if self.poll_upload(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        self.pass_over(cx);
        let Some(socket) = self.socket.as_mut().filter(|_| self.upload.is_none()) else { return Poll::Pending };
        // Nobody answers a client that has gone. What else it says is for later.
        if self.input.buffer.is_empty() {
            match ready!(self.input.poll_fill(socket, cx)) {
                Ok(0) => return Poll::Ready(Err(Broken::Closed)),
                Ok(_) => {}
                Err(error) => return Poll::Ready(Err(Broken::Io(error))),
            }
        }
        Poll::Pending
    }

    /// Hands over what the reader waits for of the request's body. Ready when that is polled by this task.
    fn poll_upload(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let (Some(socket), Some(upload)) = (&mut self.socket, &mut self.upload) else { return Poll::Pending };
        loop {
            if upload.poll_reader(cx) != Reading::Waits {
                return Poll::Pending;
            }
            let handed = match self.asked.body.next(&mut self.input.buffer) {
                Ok(None) if !self.asked.body.is_over() => {
                    self.input.expect(self.asked.body.expected());
                    match ready!(self.input.poll_fill(socket, cx)) {
                        Ok(1..) => continue,
                        Ok(0) => Some(Err(Cut("the client closed the connection before the end of its request"))),
                        Err(_) => Some(Err(Cut("the client's connection broke"))),
                    }
                }
                Ok(frame) => frame.map(Ok),
                Err(malformed) => Some(Err(Cut(malformed.0))),
            };
            let failed = matches!(handed, Some(Err(_)));
            let over = failed || self.asked.body.is_over();
            let is_mine = upload.hand(cx, handed, over);
            if over {
                self.upload = None;
                if failed {
                    self.keep_alive = false;
                    socket.expect_more();
                }
                return if is_mine { Poll::Ready(()) } else { Poll::Pending };
            }
            if is_mine {
                return Poll::Ready(());
            }
        }
    }

    /// Drops what has come of a body that nobody reads. If that is not all, nothing can follow.
    fn pass_over(&mut self, cx: &Context<'_>) {
        if self.upload.as_ref().is_some_and(|upload| upload.poll_reader(cx) == Reading::Gone) {
            while let Ok(Some(_)) = self.asked.body.next(&mut self.input.buffer) {}
            self.upload = None;
            if !self.asked.body.is_over() {
                self.keep_alive = false;
                self.socket.iter_mut().for_each(Socket::expect_more);
            }
        }
    }

    /// Ready when nothing is left of the request whose answer is out.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        self.pass_over(cx);
        while self.upload.is_some() {
            if self.poll_upload(cx).is_pending() && self.upload.is_some() {
                return Poll::Pending;
            }
            self.pass_over(cx);
        }
        if self.headers.capacity() > MAX_FIELDS {
            self.headers = HeaderMap::new();
        }
        self.input.begin();
        self.input.rest();
        self.sending.rest();
        self.since = Instant::now();
        Poll::Ready(Ok(()))
    }

    /// The connection as it came.
    fn give_away(&mut self) -> Option<Socket> {
        let mut socket = self.socket.take()?;
        socket.put_back(std::mem::take(&mut self.input.buffer).freeze());
        Some(socket)
    }
}

/// Old clients end a body by a line that is not part of it
/// ([RFC 9112](https://www.rfc-editor.org/rfc/rfc9112#section-2.2)).
fn skip_empty_lines(input: &mut BytesMut) {
    let mut end = 0;
    loop {
        match input[end..] {
            [b'\r', b'\n', ..] => end += 2,
            [b'\n', ..] => end += 1,
            _ => break,
        }
    }
    input.advance(end);
}

// === impl Broken ===

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => error.fmt(f),
            Self::Closed => f.write_str("the client closed the connection before it had its answer"),
            Self::Service(error) => write!(f, "the service has no answer: {error}"),
            Self::Body(error) => write!(f, "the answer broke off: {error}"),
            Self::Length => f.write_str("the answer is not as long as it said"),
        }
    }
}
