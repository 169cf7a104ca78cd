//! A stream of HTTP/2: one request, and its answer on its way.
//!
//! A client says how much it takes of each stream. Where it takes nothing, the connection itself is well, and the body is
//! not asked for more: nothing in it can notice the time. So a stream that waits for its reader for too long ends, by
//! `RST_STREAM`, and lets go of all it holds.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use futures::task::AtomicWaker;
use h2::Reason;
use h2::server::SendResponse;
use http::header::{
    CONNECTION, CONTENT_LENGTH, DATE, EXPECT, Entry, HeaderName, HeaderValue, TE, TRANSFER_ENCODING, UPGRADE,
};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body::Body;
use pin_project_lite::pin_project;
use portcullis_core::WallClock;
use portcullis_wire::{Halt, Transmit, reason};
use tower_service::Service;
use tracing::debug;

use super::connection::Answer;
use super::crew::Work;
use super::incoming::Incoming;
use super::transport::Stall;
use super::{BoxError, spare};

pin_project! {
    pub(super) struct Stream<F, B> {
        reply: SendResponse<Bytes>,
        asked: Asked,
        go_ahead: Option<GoAhead>,
        stall: Stall,
        #[pin]
        state: State<F, B>,
    }
}

/// A request, and where its answer goes.
pub(super) struct Call<S> {
    pub(super) service: S,
    pub(super) request: Request<Incoming>,
    pub(super) reply: SendResponse<Bytes>,
    pub(super) go_ahead: Option<GoAhead>,
    /// How long a reader may take nothing.
    pub(super) patience: Duration,
}

pin_project! {
    #[project = Project]
    enum State<F, B> {
        Service { #[pin] answer: F },
        Body { #[pin] body: B, transmit: Transmit },
    }
}

/// What of a request decides how its answer is framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Head,
    Connect,
    Other,
}

/// Tells a stream that the body of its request is wanted, which its client waits to hear
/// ([RFC 9110 §10.1.1](https://www.rfc-editor.org/rfc/rfc9110#section-10.1.1)).
#[derive(Clone)]
pub(super) struct GoAhead(Arc<Wanted>);

#[derive(Default)]
struct Wanted {
    said: AtomicBool,
    stream: AtomicWaker,
}

thread_local! {
    /// What time it was when somebody last asked, in seconds, and how that is said.
    static NOW: RefCell<(u64, HeaderValue)> = const { RefCell::new((0, HeaderValue::from_static(""))) };
}

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

// === impl Asked ===

impl Asked {
    fn of(method: &Method) -> Self {
        match *method {
            Method::HEAD => Self::Head,
            Method::CONNECT => Self::Connect,
            _ => Self::Other,
        }
    }

    /// Writes into the head of an answer what its body says; whether nothing follows it.
    fn frame<B: Body>(self, status: StatusCode, headers: &mut HeaderMap, body: &B) -> bool {
        strip(headers);
        if let Entry::Vacant(entry) = headers.entry(DATE) {
            entry.insert(date(WallClock::system().since_epoch().as_secs()));
        }
        if self == Self::Connect && status.is_success() {
            headers.remove(CONTENT_LENGTH);
            return body.is_end_stream();
        }
        if body.is_end_stream() || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) {
            return true;
        }
        if let Some(length) = body.size_hint().exact()
            && let Entry::Vacant(entry) = headers.entry(CONTENT_LENGTH)
        {
            entry.insert(length.into());
        }
        self == Self::Head
    }
}

// === impl Call ===

impl<S, B> Work for Call<S>
where
    S: Service<Request<Incoming>, Response = Response<B>> + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Doing = Stream<Answer<S, S::Future, Incoming>, B>;

    fn begin(self) -> Self::Doing {
        let Self { service, request, reply, go_ahead, patience } = self;
        let asked = Asked::of(request.method());
        let state = State::Service { answer: Answer::new(service, request) };
        Stream { reply, asked, go_ahead, stall: Stall::new(patience), state }
    }
}

// === impl Stream ===

impl<F, B, E> Future for Stream<F, B>
where
    F: Future<Output = Result<Response<B>, E>>,
    E: Into<BoxError>,
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        loop {
            let answered = match this.state.as_mut().project() {
                Project::Service { answer } => match answer.poll(cx) {
                    Poll::Ready(answered) => answered,
                    Poll::Pending => {
                        if this.go_ahead.take_if(|wanted| wanted.is_said(cx)).is_some() {
                            let mut go_ahead = Response::new(());
                            *go_ahead.status_mut() = StatusCode::CONTINUE;
                            _ = this.reply.send_informational(go_ahead);
                        }
                        // The client may have given it up.
                        return this.reply.poll_reset(cx).map(drop);
                    }
                },
                Project::Body { body, transmit } => {
                    return match transmit.poll(cx, body, || this.stall.moved()) {
                        Ok(()) => Poll::Ready(()),
                        Err(Halt::Body) => transmit.poll_reset(cx),
                        Err(Halt::Room) => this.stall.watch::<()>(cx, Poll::Pending).map(|_| {
                            // Who holds on to the request's body holds on to the stream.
                            transmit.reset(Reason::CANCEL);
                        }),
                        Err(Halt::Broken(error)) => {
                            let reason = broken(&*error.into());
                            // RFC 9113 §8.5: it is the tunnel's other end that broke.
                            let is_tunnel = *this.asked == Asked::Connect;
                            transmit.reset(if is_tunnel { Reason::CONNECT_ERROR } else { reason });
                            Poll::Ready(())
                        }
                    };
                }
            };
            let (mut head, body) = match answered {
                Ok(response) => response.into_parts(),
                Err(error) => {
                    this.reply.send_reset(broken(&*error.into()));
                    return Poll::Ready(());
                }
            };
            let is_whole = this.asked.frame(head.status, &mut head.headers, &body);
            spare::give_back(std::mem::take(&mut head.extensions));
            match this.reply.send_response(Response::from_parts(head, ()), is_whole) {
                Ok(_) if is_whole => return Poll::Ready(()),
                Ok(stream) => {
                    let transmit = Transmit::response(stream);
                    this.state.set(State::Body { body, transmit });
                }
                Err(error) => {
                    debug!(%error, "an answer is not sent");
                    this.reply.send_reset(Reason::INTERNAL_ERROR);
                    return Poll::Ready(());
                }
            }
        }
    }
}

// === impl GoAhead ===

impl GoAhead {
    /// `None` if the client does not wait for it.
    pub(super) fn of(headers: &HeaderMap) -> Option<Self> {
        let expects = headers.get(EXPECT)?.as_bytes().eq_ignore_ascii_case(b"100-continue");
        expects.then(|| Self(Arc::default()))
    }

    pub(super) fn say(&self) {
        self.0.said.store(true, Ordering::Release);
        self.0.stream.wake();
    }

    fn is_said(&self, cx: &Context<'_>) -> bool {
        self.0.stream.register(cx.waker());
        self.0.said.load(Ordering::Acquire)
    }
}

/// Why the answer broke off, to be told to the client.
fn broken(error: &(dyn std::error::Error + 'static)) -> Reason {
    debug!(%error, "an answer broke off");
    reason(error)
}

/// Removes what HTTP/2 has no use for, which one answer in many has.
fn strip(headers: &mut HeaderMap) {
    let is_clean = headers.keys().all(|name| {
        !matches!(
            name.as_str().as_bytes(),
            [b'c', b'o', b'n', b'n', ..] | [b'k', ..] | [b'p', b'r', b'o', b'x', ..] | [b't', ..] | [b'u', ..]
        )
    });
    if is_clean {
        return;
    }
    let lines = headers.get_all(CONNECTION).iter();
    let nominated: Vec<HeaderName> = lines
        .flat_map(|line| line.as_bytes().split(|byte| *byte == b','))
        .filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok())
        .collect();
    for name in nominated {
        headers.remove(name);
    }
    for name in [CONNECTION, KEEP_ALIVE, PROXY_CONNECTION, TE, TRANSFER_ENCODING, UPGRADE] {
        headers.remove(name);
    }
}

/// `Date`, which is written once a second.
pub(super) fn date(seconds: u64) -> HeaderValue {
    NOW.with_borrow_mut(|now| {
        if now.0 != seconds {
            let text = httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_secs(seconds));
            *now = (seconds, HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static("")));
        }
        now.1.clone()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::{Empty, Full};

    fn framed<B: Body>(asked: Asked, status: u16, body: &B) -> (bool, Option<String>) {
        let mut headers = HeaderMap::new();
        let is_whole = asked.frame(StatusCode::from_u16(status).unwrap(), &mut headers, body);
        assert!(headers.contains_key(DATE));
        (is_whole, headers.get(CONTENT_LENGTH).map(|length| length.to_str().unwrap().to_owned()))
    }

    #[test]
    fn an_answer_is_framed_as_what_was_asked_and_its_body_say() {
        let (full, empty) = (Full::<Bytes>::from("hello"), Empty::<Bytes>::new());
        let five = Some("5".to_owned());
        assert_eq!(framed(Asked::Other, 200, &full), (false, five.clone()));
        assert_eq!(framed(Asked::Other, 200, &empty), (true, None));
        assert_eq!(framed(Asked::Head, 200, &full), (true, five));
        for status in [204, 304] {
            assert_eq!(framed(Asked::Other, status, &full), (true, None));
        }
        assert_eq!(framed(Asked::Connect, 200, &full), (false, None));
    }

    #[test]
    fn what_a_service_says_is_not_said_for_it() {
        let mut headers = HeaderMap::new();
        headers.insert(DATE, HeaderValue::from_static("yesterday"));
        headers.insert(CONTENT_LENGTH, HeaderValue::from_static("7"));
        Asked::Head.frame(StatusCode::OK, &mut headers, &Full::<Bytes>::from("hello"));
        assert_eq!((&headers[DATE], &headers[CONTENT_LENGTH]), (&"yesterday".parse().unwrap(), &7.into()));
    }

    #[test]
    fn nothing_of_a_connection_is_said_in_http_2() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "x-hop, close"),
            ("keep-alive", "5"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "x"),
            ("te", "trailers"),
            ("x-hop", "1"),
            ("x-kept", "1"),
            ("trailer", "x-sum"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        strip(&mut headers);
        let mut names: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["trailer", "x-kept"]);
    }

    #[test]
    fn the_date_is_written_anew_when_it_is_another() {
        assert_eq!(date(784_111_777), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(date(784_111_777), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(date(784_111_778), "Sun, 06 Nov 1994 08:49:38 GMT");
    }
}
