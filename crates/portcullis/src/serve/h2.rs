//! A connection of HTTP/2: its task reads and writes, and hands each stream to another.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::Reason;
use h2::server::{Builder, Connection, Handshake};
use http::Request;
use portcullis_wire::Pings;
use tower_service::Service;
use tracing::debug;

use super::connection::{Serve, WithPeer};
use super::crew::{Crew, Work};
use super::incoming::Incoming;
use super::stream::Call;
use super::transport::{Line, Transport};
use super::{BoxError, Limits, spare};

pub(super) struct H2<S>
where
    Call<S>: Work,
{
    state: State,
    service: WithPeer<S>,
    crew: Crew<Call<S>>,
    line: Arc<Line>,
    /// How long a reader may take nothing.
    patience: Duration,
    keep_alive: (Duration, Duration),
    is_ending: bool,
}

enum State {
    Handshaking(Handshake<Transport, Bytes>),
    Serving(Connection<Transport, Bytes>, Option<Pings>),
}

/// How much all streams of a connection together may send before it is asked for.
const WINDOW: u32 = 1 << 20;
/// How much of that one may: where nobody asks for it, there is room for others.
const STREAM_WINDOW: u32 = 256 << 10;
/// What h2 lets small frames cost that nobody has read, 256 bytes each less what is in them, before it lets the client go.
const SMALL_FRAMES: usize = 4 << 20;
/// How many streams h2 remembers that we have reset, and for how long: what still comes of others counts against the client.
const RESETS: usize = 200;
const CROSSING: Duration = Duration::from_secs(10);
/// How much of an answer is kept for a reader who takes less, in each stream.
const SEND_BUFFER: usize = 64 << 10;

// === impl H2 ===

impl<S> H2<S>
where
    Call<S>: Work,
{
    pub(super) fn new(
        transport: Transport,
        line: Arc<Line>,
        limits: &Limits,
        service: WithPeer<S>,
        crew: Crew<Call<S>>,
    ) -> Self {
        let handshake = Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(WINDOW)
            .max_send_buffer_size(SEND_BUFFER)
            .data_frame_budget(SMALL_FRAMES)
            .max_concurrent_reset_streams(RESETS)
            .reset_stream_duration(CROSSING)
            .max_concurrent_streams(limits.max_streams)
            .max_header_list_size(u32::try_from(limits.max_head).unwrap_or(u32::MAX))
            .handshake(transport);
        Self {
            state: State::Handshaking(handshake),
            service,
            crew,
            line,
            patience: limits.write,
            keep_alive: limits.keep_alive,
            is_ending: false,
        }
    }
}

/// Nothing of it is pinned.
impl<S> Unpin for H2<S> where Call<S>: Work {}

impl<S> Serve for H2<S>
where
    S: Service<Request<Incoming>> + Clone,
    S::Error: Into<BoxError>,
    Call<S>: Work,
{
    type End = ();
    type Error = h2::Error;

    fn end(mut self: Pin<&mut Self>) {
        self.is_ending = true;
        // Closed while the client still says that it has read something, the connection would be reset, and with it what has
        // not arrived there.
        self.line.is_left_unread();
        if let State::Serving(connection, _) = &mut self.state {
            connection.graceful_shutdown();
        }
    }
}

impl<S> Future for H2<S>
where
    S: Service<Request<Incoming>> + Clone,
    S::Error: Into<BoxError>,
    Call<S>: Work,
{
    type Output = Result<(), h2::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        loop {
            let (connection, pings) = match &mut this.state {
                State::Serving(connection, pings) => (connection, pings),
                State::Handshaking(handshake) => {
                    let mut connection = ready!(Pin::new(handshake).poll(cx))?;
                    if this.is_ending {
                        connection.graceful_shutdown();
                    }
                    let (interval, timeout) = this.keep_alive;
                    let pings = connection.ping_pong().map(|pings| Pings::new(pings, interval, timeout));
                    this.state = State::Serving(connection, pings);
                    continue;
                }
            };
            match connection.poll_accept(cx) {
                Poll::Ready(Some(Ok((request, reply)))) => {
                    let (mut head, stream) = request.into_parts();
                    if head.extensions.is_empty() {
                        head.extensions = spare::extensions();
                    }
                    let (body, go_ahead) = Incoming::http2(stream, &head.headers);
                    let (service, request) = this.service.with(Request::from_parts(head, body));
                    this.crew.hand(Call { service, request, reply, go_ahead, patience: this.patience });
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
                Poll::Ready(None) => return Poll::Ready(Ok(())),
                Poll::Pending => {
                    let heard = this.line.has_heard();
                    if pings.as_mut().is_none_or(|pings| pings.poll(cx, heard, true).is_pending()) {
                        return Poll::Pending;
                    }
                    debug!("a client does not answer pings");
                    connection.abrupt_shutdown(Reason::NO_ERROR);
                    *pings = None;
                }
            }
        }
    }
}
