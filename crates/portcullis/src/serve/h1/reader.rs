//! A request's body on its way from the connection's task to whoever reads it.

use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

/// The reader's end. Nothing is read from the client before it is asked for.
pub(in crate::serve) struct Reader {
    slot: Arc<Slot>,
    /// What is still to come, if its length is known.
    left: Option<u64>,
}

/// The connection's end.
pub(super) struct Writer {
    slot: Arc<Slot>,
    over: bool,
}

/// Why a request's body ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::serve) struct Cut(pub(super) &'static str);

/// Room for one frame.
#[derive(Default)]
struct Slot(Mutex<State>);

#[derive(Default)]
struct State {
    frame: Option<Result<Frame<Bytes>, Cut>>,
    /// Nothing follows the frame.
    over: bool,
    /// Who waits for a frame.
    reader: Option<Waker>,
    /// Whom to tell what the reader does.
    writer: Option<Waker>,
    /// Nobody reads any more.
    gone: bool,
}

/// What the reader is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reading {
    /// It waits for a frame.
    Waits,
    /// It has not asked for another yet.
    Busy,
    Gone,
}

pub(super) fn pair(length: Option<u64>) -> (Writer, Reader) {
    let slot = Arc::new(Slot::default());
    (Writer { slot: slot.clone(), over: false }, Reader { slot, left: length })
}

// === impl Slot ===

impl Slot {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Writer ===

impl Writer {
    /// What the reader is doing; whoever polls is woken when it does something else.
    pub(super) fn poll_reader(&self, cx: &Context<'_>) -> Reading {
        let mut state = self.slot.lock();
        if state.gone {
            return Reading::Gone;
        }
        match &mut state.writer {
            Some(writer) => writer.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        if state.frame.is_none() && state.reader.is_some() { Reading::Waits } else { Reading::Busy }
    }

    /// Hands over what comes next, and whether it is the last; whether who reads it is polled by the same task, which has
    /// to see to it then.
    pub(super) fn hand(&mut self, cx: &Context<'_>, frame: Option<Result<Frame<Bytes>, Cut>>, over: bool) -> bool {
        self.over = over;
        let mut state = self.slot.lock();
        (state.frame, state.over) = (frame, over);
        if over {
            state.writer = None;
        }
        let Some(reader) = state.reader.take() else { return false };
        drop(state);
        let same = reader.will_wake(cx.waker());
        if !same {
            reader.wake();
        }
        same
    }
}

/// The connection is over.
impl Drop for Writer {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        let mut state = self.slot.lock();
        (state.frame, state.over) = (Some(Err(Cut("the connection ended before the request's body"))), true);
        if let Some(reader) = state.reader.take() {
            drop(state);
            reader.wake();
        }
    }
}

// === impl Reader ===

impl Body for Reader {
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        let this = self.get_mut();
        let mut state = this.slot.lock();
        if let Some(frame) = state.frame.take() {
            drop(state);
            if let (Some(left), Ok(frame)) = (&mut this.left, &frame) {
                *left -= frame.data_ref().map_or(0, |data| data.len() as u64).min(*left);
            }
            return Poll::Ready(Some(frame));
        }
        if state.over {
            return Poll::Ready(None);
        }
        match &mut state.reader {
            Some(reader) => reader.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        // One that polls this now will look by itself.
        if let Some(writer) = state.writer.take_if(|writer| !writer.will_wake(cx.waker())) {
            drop(state);
            writer.wake();
        }
        Poll::Pending
    }

    fn is_end_stream(&self) -> bool {
        let state = self.slot.lock();
        state.over && state.frame.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut state = self.slot.lock();
        state.gone = true;
        if let Some(writer) = state.writer.take() {
            drop(state);
            writer.wake();
        }
    }
}

// === impl Cut ===

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Cut {}
