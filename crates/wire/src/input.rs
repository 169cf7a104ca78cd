//! What has arrived of a connection.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::task::{Context, Poll};

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::room::{self, LARGE, LITTLE};

/// What has arrived and was not taken yet.
#[derive(Debug)]
pub struct Input {
    /// To be taken from.
    pub buffer: BytesMut,
    /// How much to make room for.
    room: usize,
    /// Whether the buffer is to be given back.
    lent: bool,
    /// Whether a line has ended since a head was last looked for.
    line: bool,
}

/// From this on, room is used again.
const MUCH: usize = 16 * 1024;

// === impl Input ===

impl Input {
    /// Begins with what was read already.
    #[must_use]
    pub fn new(buffer: BytesMut) -> Self {
        let line = !buffer.is_empty();
        Self { buffer, room: LITTLE, lent: false, line }
    }

    /// Whether a line has ended since this was last asked: a head that comes byte by byte is not read anew for each of
    /// them.
    pub fn has_new_line(&mut self) -> bool {
        std::mem::take(&mut self.line)
    }

    /// A new message begins, of which some may be here.
    pub fn begin(&mut self) {
        self.line = !self.buffer.is_empty();
    }

    /// Makes room for this much at once, within reason.
    pub fn expect(&mut self, bytes: u64) {
        let most = usize::try_from(bytes).map_or(LARGE, |bytes| bytes.min(LARGE));
        self.room = self.room.max(most);
    }

    /// Gives back what is not worth keeping between two messages.
    pub fn rest(&mut self) {
        if self.buffer.is_empty() && (self.lent || self.buffer.capacity() > LITTLE) {
            self.replace(BytesMut::new(), false);
        }
    }

    fn replace(&mut self, buffer: BytesMut, lent: bool) {
        let old = std::mem::replace(&mut self.buffer, buffer);
        if std::mem::replace(&mut self.lent, lent) {
            room::give_back(old);
        }
    }

    fn make_room(&mut self) {
        let much = self.room >= MUCH && self.buffer.len() < LARGE / 2;
        if !much && !self.lent {
            return self.buffer.reserve(self.room);
        }
        let mut next = if much { room::take() } else { BytesMut::with_capacity(self.buffer.len() + self.room) };
        next.extend_from_slice(&self.buffer);
        self.buffer.clear();
        self.replace(next, much);
    }

    /// Reads what there is; 0 is the end.
    ///
    /// # Errors
    ///
    /// When the connection broke.
    pub fn poll_fill<R: AsyncRead + Unpin>(&mut self, io: &mut R, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.buffer.capacity() - self.buffer.len() < self.room / 4 {
            self.make_room();
        }
        let (before, free) = (self.buffer.len(), self.buffer.capacity() - self.buffer.len());
        let Poll::Ready(read) = pin!(io.read_buf(&mut self.buffer)).poll(cx) else {
            // Nobody knows how long nothing comes.
            self.rest();
            return Poll::Pending;
        };
        let count = read?;
        // What comes first is mostly a whole head.
        self.line |= before == 0 || self.buffer[before..].contains(&b'\n');
        // As much as usually comes at once.
        self.room = if count == free { self.room * 2 } else { self.room.min((count * 4).next_power_of_two()) };
        self.room = self.room.clamp(LITTLE, LARGE);
        Poll::Ready(Ok(count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Waker;
    use tokio_test::io::Builder;

    #[tokio::test]
    async fn a_connection_from_which_nothing_comes_holds_little() {
        let large = vec![0; 2 * LARGE];
        let (mut io, _more) = Builder::new().read(&large).build_with_handle();
        let mut input = Input::new(BytesMut::new());
        let cx = &mut Context::from_waker(Waker::noop());
        let mut left = large.len();
        while left > 0 {
            let Poll::Ready(Ok(count)) = input.poll_fill(&mut io, cx) else { panic!("there is more") };
            left -= count;
            input.buffer.clear();
        }
        assert!((LITTLE + 1..=2 * LARGE).contains(&input.buffer.capacity()));
        assert!(input.poll_fill(&mut io, cx).is_pending());
        assert_eq!(input.buffer.capacity(), 0);
    }
}
