//! Streams of HTTP/2 ([RFC 9113](https://www.rfc-editor.org/rfc/rfc9113)), which `h2` frames.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::{Ping, PingPong, Reason, RecvStream, SendStream};
use http::HeaderMap;
use http::header::CONTENT_LENGTH;
use http_body::{Body, Frame, SizeHint};
use tokio::time::Instant;

use crate::{Alarm, after, parse_length};

/// A body that arrives in a stream.
#[derive(Debug)]
pub struct Received {
    stream: RecvStream,
    /// What is still to come, if its length was announced.
    left: Option<u64>,
    /// Whether only trailers can follow.
    data_is_over: bool,
}

/// A body on its way into a stream.
#[derive(Debug)]
pub struct Transmit {
    stream: SendStream<Bytes>,
    /// What there is no room for yet, and whether it is the last.
    held: Option<(Bytes, bool)>,
    /// The last frame is handed over without waiting for room, if it is no larger.
    ahead: usize,
}

/// Why not all of a body was sent.
#[derive(Debug)]
#[expect(clippy::exhaustive_enums, reason = "those who share it match on it")]
pub enum Halt<E> {
    /// There is no more of it yet.
    Body,
    /// The other end takes no more yet.
    Room,
    /// It broke off. The other end was not told.
    Broken(E),
}

/// Asks the other end of a connection from which nothing comes whether it is still there.
#[derive(Debug)]
pub struct Pings {
    pings: PingPong,
    interval: Duration,
    timeout: Duration,
    alarm: Alarm,
    /// When something arrived, or was last not waited for.
    heard: Instant,
    /// When the answer must be there that is waited for.
    due: Option<Instant>,
}

// === impl Received ===

impl Received {
    /// The body of a message with these fields.
    #[must_use]
    pub fn new(stream: RecvStream, headers: &HeaderMap) -> Self {
        let left = if stream.is_end_stream() { Some(0) } else { announced(headers) };
        Self { stream, left, data_is_over: false }
    }

    /// What was announced, or is known, to come.
    #[must_use]
    pub fn left(&self) -> Option<u64> {
        self.left
    }

    /// The same for a body to say.
    #[must_use]
    pub fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }

    /// Whether nothing more comes. It takes a lock.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.stream.is_end_stream()
    }

    /// The next frame. The other end may send as much again.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        let data = if self.data_is_over { None } else { ready!(self.stream.poll_data(cx)) };
        let frame = match data {
            Some(data) => data.map(|data| {
                _ = self.stream.flow_control().release_capacity(data.len());
                self.left = self.left.map(|left| left.saturating_sub(data.len() as u64));
                Some(Frame::data(data))
            }),
            None => {
                self.data_is_over = true;
                ready!(self.stream.poll_trailers(cx)).map(|trailers| trailers.map(Frame::trailers))
            }
        };
        // An answer that was given early and is whole (RFC 9113 §8.1) ends before the reset behind it. Of a request that was
        // reset nothing is whole, whatever its client says.
        Poll::Ready(frame.transpose())
    }
}

/// The length a head says, if it says one.
fn announced(headers: &HeaderMap) -> Option<u64> {
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    let first = lengths.next()?;
    let agree = lengths.all(|other| other == first);
    parse_length(first.as_bytes()).filter(|_| agree)
}

// === impl Pings ===

/// The least time between two looks: without any it would do nothing else.
const SHORTEST: Duration = Duration::from_millis(10);

impl Pings {
    /// When nothing has come for `interval`, a hundredth of a second at least, the other end is asked, and has `timeout` to
    /// answer.
    #[must_use]
    pub fn new(pings: PingPong, interval: Duration, timeout: Duration) -> Self {
        Self {
            pings,
            interval: interval.max(SHORTEST),
            timeout,
            alarm: Alarm::default(),
            heard: Instant::now(),
            due: None,
        }
    }

    /// Ready when the other end does not answer. It is asked only if somebody waits for it.
    pub fn poll(&mut self, cx: &mut Context<'_>, heard: bool, is_waited_for: bool) -> Poll<()> {
        if heard {
            self.heard = Instant::now();
        }
        loop {
            if let Some(due) = self.due {
                match self.pings.poll_pong(cx) {
                    Poll::Ready(Ok(_)) => (self.heard, self.due) = (Instant::now(), None),
                    // The connection is over, and says so itself.
                    Poll::Ready(Err(_)) => return Poll::Pending,
                    Poll::Pending => return self.alarm.poll(cx, due),
                }
            }
            let Some(next) = after(self.heard, self.interval) else { return Poll::Pending };
            ready!(self.alarm.poll(cx, next));
            self.heard = Instant::now();
            if is_waited_for && self.pings.send_ping(Ping::opaque()).is_ok() {
                self.due = after(self.heard, self.timeout);
            }
        }
    }
}

// === impl Transmit ===

impl Transmit {
    /// What is handed over at a time, so that it shows whether the other end takes some: a frame, whatever it allows.
    const FRAME: usize = 16 << 10;

    /// To an endpoint. A small body leaves at once: nothing waits behind it.
    #[must_use]
    pub const fn request(stream: SendStream<Bytes>) -> Self {
        Self { stream, held: None, ahead: Self::FRAME }
    }

    /// To a client, which may be a slow reader: nothing that it has no room for.
    #[must_use]
    pub const fn response(stream: SendStream<Bytes>) -> Self {
        Self { stream, held: None, ahead: 0 }
    }

    /// Sends what there is of `body`, and calls `moved` when the other end took some.
    ///
    /// # Errors
    ///
    /// [`Halt`] when that is not all of it.
    #[inline]
    pub fn poll<B>(
        &mut self,
        cx: &mut Context<'_>,
        mut body: Pin<&mut B>,
        mut moved: impl FnMut(),
    ) -> Result<(), Halt<B::Error>>
    where
        B: Body<Data = Bytes>,
    {
        loop {
            if let Some((mut data, last)) = self.held.take() {
                if poll_room(&mut self.stream, cx).is_pending() {
                    self.held = Some((data, last));
                    return Err(Halt::Room);
                }
                moved();
                // No more than there is room for: the rest would be gone from here, and nobody would see that it is not taken.
                let room = match self.stream.capacity() {
                    0 => Self::FRAME,
                    room => room.min(Self::FRAME),
                };
                let piece = data.split_to(data.len().min(room));
                let is_over = data.is_empty();
                if self.stream.send_data(piece, is_over && last).is_err() || is_over && last {
                    return Ok(());
                }
                if !is_over {
                    self.hold(data, last);
                    continue;
                }
            }
            let Poll::Ready(frame) = body.as_mut().poll_frame(cx) else { return Err(Halt::Body) };
            let sent = match frame.map(|frame| frame.map(Frame::into_data)) {
                Some(Ok(Ok(data))) => {
                    let last = body.is_end_stream();
                    if !last || data.len() > self.ahead {
                        // What is empty says nothing.
                        if !data.is_empty() {
                            self.hold(data, last);
                        }
                        continue;
                    }
                    self.stream.send_data(data, true)
                }
                Some(Ok(Err(frame))) => self.stream.send_trailers(frame.into_trailers().unwrap_or_default()),
                Some(Err(error)) => return Err(Halt::Broken(error)),
                None => self.stream.send_data(Bytes::new(), true),
            };
            // Whoever takes no more has said so.
            drop(sent);
            return Ok(());
        }
    }

    /// Ready when the other end wants no more.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.stream.poll_reset(cx).map(drop)
    }

    /// Tells the other end that there is no more, and why.
    pub fn reset(&mut self, reason: Reason) {
        self.stream.send_reset(reason);
    }

    fn hold(&mut self, data: Bytes, last: bool) {
        self.stream.reserve_capacity(data.len().min(Self::FRAME));
        self.held = Some((data, last));
    }
}

/// Ready when something can be sent of what room was reserved for, or it shows that nothing ever can.
fn poll_room(stream: &mut SendStream<Bytes>, cx: &mut Context<'_>) -> Poll<()> {
    while stream.capacity() == 0 {
        match ready!(stream.poll_capacity(cx)) {
            Some(Ok(_)) => {}
            Some(Err(_)) | None => break,
        }
    }
    Poll::Ready(())
}

/// Why a body broke off, to be told to the other end: that somebody gave up, or nothing that it could take for an end or for
/// leave to repeat.
#[must_use]
pub fn reason(error: &(dyn std::error::Error + 'static)) -> Reason {
    let mut causes = std::iter::successors(Some(error), |cause| cause.source());
    let reason = causes.find_map(|cause| cause.downcast_ref::<h2::Error>()).and_then(h2::Error::reason);
    reason.filter(|reason| *reason == Reason::CANCEL).unwrap_or(Reason::INTERNAL_ERROR)
}

#[cfg(test)]
mod tests {
    use super::*;
    use h2::server::Connection;
    use std::future::poll_fn;
    use tokio::time::{sleep_until, timeout};

    #[tokio::test(start_paused = true)]
    async fn the_other_end_is_asked_again_an_interval_after_it_answered_however_late_that_was() {
        let (near, far) = tokio::io::duplex(1024);
        let (start, seconds) = (Instant::now(), Duration::from_secs);
        tokio::spawn(async move {
            let (_requests, mut connection) = h2::client::handshake(near).await.unwrap();
            _ = timeout(seconds(1), &mut connection).await;
            sleep_until(start + seconds(50)).await;
            _ = connection.await;
        });
        let mut connection: Connection<_, Bytes> = h2::server::handshake(far).await.unwrap();
        let mut pings = Pings::new(connection.ping_pong().unwrap(), seconds(10), seconds(60));
        let mut asked = Vec::new();
        let served = poll_fn(|cx| {
            assert!(connection.poll_accept(cx).is_pending() && pings.poll(cx, false, true).is_pending());
            asked.extend(pings.due.map(|due| (due - seconds(60) - start).as_secs()));
            connection.poll_accept(cx).map(drop)
        });
        _ = timeout(seconds(85), served).await;
        asked.dedup();
        assert_eq!(asked, [10, 60, 70, 80]);
    }

    /// Or nobody would see that it is not taken.
    #[tokio::test]
    async fn an_answer_is_handed_over_as_far_as_there_is_room() {
        let (near, far) = tokio::io::duplex(1024);
        tokio::spawn(async move {
            let client = h2::client::Builder::new().initial_window_size(1).handshake::<_, Bytes>(near).await;
            let (mut requests, mut connection) = client.unwrap();
            let (_answer, _) = requests.send_request(http::Request::new(()), true).unwrap();
            poll_fn(|cx| Pin::new(&mut connection).poll(cx)).await.unwrap();
        });
        let mut connection: Connection<_, Bytes> = h2::server::handshake(far).await.unwrap();
        let (_, mut respond) = connection.accept().await.unwrap().unwrap();
        let mut transmit = Transmit::response(respond.send_response(http::Response::new(()), false).unwrap());
        let mut body = http_body_util::Full::new(Bytes::from_static(b"more than a byte"));
        let mut looks = 0;
        poll_fn(|cx| {
            _ = connection.poll_accept(cx);
            assert!(matches!(transmit.poll(cx, Pin::new(&mut body), || {}), Err(Halt::Room)));
            looks += 1;
            cx.waker().wake_by_ref();
            if looks == 100 { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        assert_eq!(transmit.held.map(|(data, _)| data).as_deref(), Some(&b"ore than a byte"[..]));
    }

    #[test]
    fn a_length_is_announced_if_all_lines_agree() {
        for (lines, length) in
            [(&[][..], None), (&["7"], Some(7)), (&["7", "7"], Some(7)), (&["7", "8"], None), (&["+7"], None)]
        {
            let headers = lines.iter().map(|line| (CONTENT_LENGTH, line.parse().unwrap())).collect();
            assert_eq!(announced(&headers), length, "{lines:?}");
        }
    }
}
