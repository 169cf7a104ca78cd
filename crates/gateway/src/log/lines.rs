//! Lines on their way out.
//!
//! They are gathered in memory and written by a thread of their own: whoever reads them slowly, or not at all, keeps no
//! request waiting. What there is no room for is left out and counted.

use std::convert::Infallible;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::telemetry::lock;

/// Lines that wait to be written.
pub(super) struct Lines {
    waiting: Mutex<Waiting>,
    /// There is something to write, or it is wanted at once.
    come: Condvar,
    /// Something was written.
    gone: Condvar,
    most: usize,
    dropped: AtomicU64,
}

struct Waiting {
    text: Vec<u8>,
    /// Whether somebody waits for it to be written.
    hurry: bool,
    /// How many bytes ever came, and how many of them are written.
    came: u64,
    went: u64,
}

/// How long the thread waits for more before it writes: a line that wakes nobody costs a request little.
const GATHER: Duration = Duration::from_millis(5);
/// From so many bytes on it does not wait.
const ENOUGH: usize = 64 << 10;

impl Lines {
    /// No more than `most` bytes wait.
    pub(super) const fn new(most: usize) -> Self {
        let waiting = Waiting { text: Vec::new(), hurry: false, came: 0, went: 0 };
        Self {
            waiting: Mutex::new(waiting),
            come: Condvar::new(),
            gone: Condvar::new(),
            most,
            dropped: AtomicU64::new(0),
        }
    }

    /// How many lines there was no room for.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Has a line written, end and all.
    pub(super) fn push(&self, line: &[u8]) {
        let mut waiting = lock(&self.waiting);
        let before = waiting.text.len();
        let after = before + line.len();
        if after > self.most {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        waiting.text.extend_from_slice(line);
        waiting.came += line.len() as u64;
        drop(waiting);
        if before == 0 || (before < ENOUGH && after >= ENOUGH) {
            self.come.notify_one();
        }
    }

    /// Waits until all that came before is written, but no longer than that.
    pub(super) fn flush(&self, within: Duration) {
        let mut waiting = lock(&self.waiting);
        let all = waiting.came;
        waiting.hurry = true;
        self.come.notify_one();
        drop(self.gone.wait_timeout_while(waiting, within, |waiting| waiting.went < all));
    }

    /// Writes whatever comes, for ever.
    pub(super) fn write_to(&self, mut to: impl Write) -> Infallible {
        let mut text = Vec::new();
        loop {
            let waiting = lock(&self.waiting);
            let waiting = self.come.wait_while(waiting, |waiting| waiting.text.is_empty() && !waiting.hurry);
            let waiting = waiting.unwrap_or_else(PoisonError::into_inner);
            let more = |waiting: &mut Waiting| waiting.text.len() < ENOUGH && !waiting.hurry;
            let waiting = self.come.wait_timeout_while(waiting, GATHER, more);
            let (mut waiting, _) = waiting.unwrap_or_else(PoisonError::into_inner);
            std::mem::swap(&mut waiting.text, &mut text);
            waiting.hurry = false;
            drop(waiting);
            // Nobody reads any more: there is nobody to tell.
            let _ = to.write_all(&text).and_then(|()| to.flush());
            lock(&self.waiting).went += text.len() as u64;
            self.gone.notify_all();
            text.clear();
            text.shrink_to(2 * ENOUGH);
        }
    }
}

/// A line comes in one piece.
impl Write for &Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Sender, channel};

    /// Tells of each write.
    struct Told(Sender<Vec<u8>>);

    impl Write for Told {
        fn write(&mut self, text: &[u8]) -> io::Result<usize> {
            self.0.send(text.to_vec()).unwrap();
            Ok(text.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_are_written_in_order_and_those_without_room_are_left_out() {
        static LINES: Lines = Lines::new(12);
        for line in ["one\n", "two\n", "three\n", "4\n"] {
            (&LINES).write_all(line.as_bytes()).unwrap();
        }
        assert_eq!(LINES.dropped(), 1, "of the third");
        LINES.flush(Duration::ZERO);
        let (told, writes) = channel();
        std::thread::spawn(|| LINES.write_to(Told(told)));
        assert_eq!(writes.recv().unwrap(), b"one\ntwo\n4\n");
        LINES.push(b"five\n");
        LINES.flush(Duration::from_secs(60));
        assert_eq!(writes.try_recv().unwrap(), b"five\n", "written before flush returned");
        LINES.push(b"six\n");
        assert_eq!(writes.recv().unwrap(), b"six\n", "without being asked to");
        assert_eq!(LINES.dropped(), 1);
    }
}
