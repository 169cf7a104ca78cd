//! Streams of HTTP/2 ([RFC 9113](https://www.rfc-editor.org/rfc/rfc9113)), which `h2` frames.

use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::{Ping, PingPong, Reason, RecvStream, SendStream};
use http::HeaderMap;
use http::header::CONTENT_LENGTH;
use http_body::{Frame, SizeHint};
use tokio::time::Instant;

use crate::{Alarm, after};

/// A body that arrives in a stream.
#[derive(Debug)]
pub struct Received {
    stream: RecvStream,
    /// What is still to come, if its length was announced.
    left: Option<u64>,
    /// Whether only trailers can follow.
    data_is_over: bool,
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
    first.to_str().ok().filter(|_| agree)?.parse().ok()
}

// === impl Pings ===

impl Pings {
    /// When nothing has come for `interval` the other end is asked, and has `timeout` to answer.
    #[must_use]
    pub fn new(pings: PingPong, interval: Duration, timeout: Duration) -> Self {
        Self { pings, interval, timeout, alarm: Alarm::default(), heard: Instant::now(), due: None }
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

/// Ready when something can be sent of what room was reserved for, or it shows that nothing ever can.
pub fn poll_room(stream: &mut SendStream<Bytes>, cx: &mut Context<'_>) -> Poll<()> {
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

    #[test]
    fn a_length_is_announced_if_all_lines_agree() {
        for (lines, length) in
            [(&[][..], None), (&["7"], Some(7)), (&["7", "7"], Some(7)), (&["7", "8"], None), (&["x"], None)]
        {
            let headers = lines.iter().map(|line| (CONTENT_LENGTH, line.parse().unwrap())).collect();
            assert_eq!(announced(&headers), length, "{lines:?}");
        }
    }
}
