//! A request body that can be sent again.

use std::error::Error as StdError;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

/// Any error.
pub type BoxError = Box<dyn StdError + Send + Sync>;

pin_project! {
    /// The request body as the inner service gets it: the caller's, streamed through. While another endpoint may still have
    /// to be tried, what has passed is kept up to a limit.
    pub struct Replay<B> {
        #[pin]
        state: State<B>,
    }
}

pin_project! {
    #[project = Project]
    enum State<B> {
        Empty,
        Plain { #[pin] body: B },
        Kept { kept: Arc<Mutex<Kept<B>>>, attempt: u32 },
    }
}

/// The caller's body and what was read of it, shared by the attempts.
struct Kept<B> {
    body: Pin<Box<B>>,
    /// Nothing is read any more: the end or an error was seen.
    over: bool,
    /// Which attempt may read.
    attempt: u32,
    /// It has failed, and reads nothing new until it is known whether another takes the body over.
    held: bool,
    /// Woken when it may read again, or never more: it holds a connection until it is told.
    reader: Option<Waker>,
    /// What was read, copied: a piece of a buffer would keep all of it.
    data: Vec<u8>,
    trailers: Option<Box<HeaderMap>>,
    /// How much of `data` it has read, and whether it has the trailers.
    position: usize,
    has_trailers: bool,
    limit: usize,
    /// Whether all that was read is kept.
    whole: bool,
    /// Another attempt will not be made.
    last: bool,
}

/// The balancer's end of a body that is kept.
pub(crate) struct Keeper<B>(Option<Arc<Mutex<Kept<B>>>>);

/// An attempt that was given up tried to read the body.
#[derive(Debug)]
struct Superseded;

// === impl Replay ===

impl<B> Replay<B> {
    /// Passes `body` through.
    pub fn new(body: B) -> Self {
        Self { state: State::Plain { body } }
    }

    /// Nothing.
    #[must_use]
    pub const fn empty() -> Self {
        Self { state: State::Empty }
    }
}

impl<B: Body<Data = Bytes>> Replay<B> {
    /// Keeps up to `limit` bytes of what passes. An empty body takes no place.
    pub(crate) fn keep(body: B, limit: usize) -> (Self, Keeper<B>) {
        if body.is_end_stream() {
            return (Self::empty(), Keeper(None));
        }
        let kept = Arc::new(Mutex::new(Kept {
            body: Box::pin(body),
            over: false,
            attempt: 0,
            held: false,
            reader: None,
            data: Vec::new(),
            trailers: None,
            position: 0,
            has_trailers: false,
            limit,
            whole: true,
            last: false,
        }));
        (Self { state: State::Kept { kept: kept.clone(), attempt: 0 } }, Keeper(Some(kept)))
    }
}

impl<B> Body for Replay<B>
where
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.project().state.project() {
            Project::Empty => Poll::Ready(None),
            Project::Plain { body } => body.poll_frame(cx).map_err(Into::into),
            Project::Kept { kept, attempt } => lock(kept).poll_frame(*attempt, cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.state {
            State::Empty => true,
            State::Plain { body } => body.is_end_stream(),
            State::Kept { kept, attempt } => {
                let kept = lock(kept);
                // One that was given up must not look whole.
                *attempt == kept.attempt && kept.has_all() && (kept.over || kept.body.is_end_stream())
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.state {
            State::Empty => SizeHint::with_exact(0),
            State::Plain { body } => body.size_hint(),
            State::Kept { kept, .. } => {
                let kept = lock(kept);
                let behind = kept.data.len() - kept.position;
                let ahead = if kept.over { SizeHint::with_exact(0) } else { kept.body.size_hint() };
                let mut hint = SizeHint::new();
                hint.set_lower(ahead.lower() + behind as u64);
                if let Some(upper) = ahead.upper() {
                    hint.set_upper(upper + behind as u64);
                }
                hint
            }
        }
    }
}

impl<B> fmt::Debug for Replay<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.state {
            State::Empty => "Replay::Empty",
            State::Plain { .. } => "Replay::Plain",
            State::Kept { .. } => "Replay::Kept",
        })
    }
}

// === impl Kept ===

impl<B> Kept<B>
where
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    fn poll_frame(&mut self, attempt: u32, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if attempt != self.attempt {
            return Poll::Ready(Some(Err(Box::new(Superseded))));
        }
        if !self.has_all() {
            return Poll::Ready(Some(Ok(self.repeat())));
        }
        if self.over {
            return Poll::Ready(None);
        }
        let frame = if self.held { Poll::Pending } else { self.body.as_mut().poll_frame(cx) };
        let Poll::Ready(frame) = frame else {
            match &mut self.reader {
                Some(reader) => reader.clone_from(cx.waker()),
                None => self.reader = Some(cx.waker().clone()),
            }
            return Poll::Pending;
        };
        match &frame {
            Some(Ok(frame)) => self.keep(frame),
            // An error cannot be had again.
            Some(Err(_)) => (self.over, self.whole) = (true, false),
            None => self.over = true,
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }
}

impl<B> Kept<B> {
    fn keep(&mut self, frame: &Frame<Bytes>) {
        if self.last || !self.whole {
            return;
        }
        match (frame.data_ref(), frame.trailers_ref()) {
            (Some(data), _) if self.trailers.is_none() && data.len() <= self.limit - self.data.len() => {
                self.data.extend_from_slice(data);
                self.position = self.data.len();
            }
            (_, Some(trailers)) if self.trailers.is_none() => {
                (self.trailers, self.has_trailers) = (Some(Box::new(trailers.clone())), true);
            }
            _ => self.forget(),
        }
    }

    /// Whether the attempt that may read has read all that is kept.
    fn has_all(&self) -> bool {
        self.position >= self.data.len() && self.has_trailers == self.trailers.is_some()
    }

    /// What the attempt has not read yet of what is kept, data first.
    fn repeat(&mut self) -> Frame<Bytes> {
        let frame = if self.position < self.data.len() {
            let rest = Bytes::copy_from_slice(&self.data[self.position..]);
            self.position = self.data.len();
            Frame::data(rest)
        } else {
            self.has_trailers = true;
            Frame::trailers(self.trailers.as_deref().cloned().unwrap_or_default())
        };
        self.forget_what_was_read();
        frame
    }

    /// What the last attempt has read is of no more use.
    fn forget_what_was_read(&mut self) {
        if self.last && self.has_all() {
            self.forget();
        }
    }

    /// Tells who reads that it may go on, or was given up.
    fn let_go(mut this: MutexGuard<'_, Self>) {
        this.held = false;
        let reader = this.reader.take();
        drop(this);
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    fn forget(&mut self) {
        (self.data, self.trailers) = (Vec::new(), None);
        (self.position, self.has_trailers, self.whole) = (0, false, false);
    }
}

// === impl Keeper ===

impl<B> Keeper<B> {
    /// For a request that is sent once.
    pub(crate) const fn none() -> Self {
        Self(None)
    }

    /// Keeps the attempt that has failed from reading on, so that another can [have the body again](Self::again). `false`
    /// when more was read than is kept.
    pub(crate) fn hold(&self) -> bool {
        let Some(shared) = &self.0 else { return true };
        let mut kept = lock(shared);
        kept.held = kept.whole;
        kept.held
    }

    /// The body from its beginning, for another attempt; the one before can read no more. `None` when more was read than
    /// is kept.
    pub(crate) fn again(&self) -> Option<Replay<B>> {
        let Some(shared) = &self.0 else { return Some(Replay::empty()) };
        let mut kept = lock(shared);
        if !kept.whole {
            return None;
        }
        kept.attempt += 1;
        (kept.position, kept.has_trailers) = (0, false);
        let state = State::Kept { kept: shared.clone(), attempt: kept.attempt };
        Kept::let_go(kept);
        Some(Replay { state })
    }
}

/// No other attempt will be made: what is kept can go, and who was held reads on.
impl<B> Drop for Keeper<B> {
    fn drop(&mut self) {
        if let Some(shared) = &self.0 {
            let mut kept = lock(shared);
            kept.last = true;
            kept.forget_what_was_read();
            if kept.held {
                Kept::let_go(kept);
            }
        }
    }
}

impl<B> fmt::Debug for Keeper<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Keeper").field(&self.0.is_some()).finish()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// === impl Superseded ===

impl fmt::Display for Superseded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("another attempt has taken the body over")
    }
}

impl StdError for Superseded {}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::{BodyExt, StreamBody};

    type Frames = StreamBody<futures::stream::Iter<std::vec::IntoIter<Result<Frame<Bytes>, BoxError>>>>;

    fn body(frames: Vec<Frame<Bytes>>) -> Frames {
        StreamBody::new(futures::stream::iter(frames.into_iter().map(Ok).collect::<Vec<_>>()))
    }

    fn abc() -> Frames {
        let mut trailers = HeaderMap::new();
        trailers.insert("x-sum", "1".parse().unwrap());
        body(vec![Frame::data("a".into()), Frame::data("bc".into()), Frame::trailers(trailers)])
    }

    #[tokio::test]
    async fn a_body_is_had_again_with_its_trailers_from_wherever_the_first_stopped() {
        for read in 0..4 {
            let (mut first, keeper) = Replay::keep(abc(), 1000);
            for _ in 0..read {
                first.frame().await.unwrap().unwrap();
            }
            let again = keeper.again().unwrap();
            assert!(!again.is_end_stream());
            let again = again.collect().await.unwrap();
            assert_eq!(again.trailers().unwrap()["x-sum"], "1", "after {read}");
            assert_eq!(again.to_bytes(), "abc");
            assert!(first.frame().await.unwrap().is_err(), "the first must not look whole");
        }
    }

    /// Over HTTP/2 it would hold its stream for as long as the connection lives.
    #[tokio::test]
    async fn an_attempt_that_waits_for_the_caller_is_told_that_it_was_given_up() {
        let silent = StreamBody::new(futures::stream::pending::<Result<Frame<Bytes>, BoxError>>());
        let (mut first, keeper) = Replay::keep(silent, 1000);
        let reading = tokio::spawn(async move { first.frame().await.unwrap().is_err() });
        tokio::task::yield_now().await;
        let mut again = keeper.again().unwrap();
        let _ = futures::poll!(again.frame());
        assert!(tokio::time::timeout(std::time::Duration::from_secs(5), reading).await.unwrap().unwrap());
    }

    #[tokio::test]
    async fn no_more_is_kept_than_the_limit() {
        let (first, keeper) =
            Replay::keep(body(vec![Frame::data("x".repeat(900).into()), Frame::data("y".repeat(900).into())]), 1000);
        assert_eq!(first.collect().await.unwrap().to_bytes().len(), 1800);
        assert!(keeper.again().is_none());
        let (mut unread, keeper) = Replay::keep(body(vec![Frame::data("x".repeat(9000).into())]), 1000);
        assert!(keeper.again().is_some(), "what was not read need not be kept");
        assert!(unread.frame().await.unwrap().is_err());
    }

    #[tokio::test]
    async fn a_body_of_the_limit_is_kept_and_one_of_a_byte_more_is_not() {
        for (more, kept) in [(0, true), (1, false)] {
            let (first, keeper) = Replay::keep(body(vec![Frame::data("x".repeat(65_536 + more).into())]), 65_536);
            first.collect().await.unwrap();
            assert_eq!(keeper.again().is_some(), kept, "{more}");
        }
    }

    #[tokio::test]
    async fn the_buffers_that_frames_were_read_into_are_not_kept() {
        let buffers: Vec<Bytes> = (0..100).map(|_| vec![7; 8192].into()).collect();
        let (first, keeper) =
            Replay::keep(body(buffers.iter().map(|buffer| Frame::data(buffer.slice(..1))).collect()), 1000);
        assert_eq!(first.collect().await.unwrap().to_bytes().len(), 100);
        assert!(buffers.iter().all(Bytes::is_unique));
        assert_eq!(keeper.again().unwrap().collect().await.unwrap().to_bytes(), [7; 100][..]);
    }

    #[tokio::test]
    async fn the_length_is_known_at_any_place() {
        let full = http_body_util::Full::<Bytes>::from("abc");
        let (mut first, keeper) = Replay::keep(full, 1000);
        assert_eq!(first.size_hint().exact(), Some(3));
        first.frame().await.unwrap().unwrap();
        assert_eq!(first.size_hint().exact(), Some(0));
        assert!(first.is_end_stream());
        assert_eq!(keeper.again().unwrap().size_hint().exact(), Some(3));
    }

    #[tokio::test]
    async fn who_is_held_reads_nothing_new_until_it_is_let_go_or_given_up() {
        for taken_over in [false, true] {
            let (mut first, keeper) = Replay::keep(abc(), 1);
            first.frame().await.unwrap().unwrap();
            assert!(keeper.hold());
            let reading = tokio::spawn(async move { first.frame().await.unwrap() });
            tokio::task::yield_now().await;
            assert!(!reading.is_finished());
            let again = taken_over.then(|| keeper.again().unwrap());
            drop(keeper);
            let frame = tokio::time::timeout(std::time::Duration::from_secs(5), reading).await.unwrap().unwrap();
            match again {
                None => assert_eq!(frame.unwrap().into_data().unwrap(), "bc"),
                Some(again) => assert!(frame.is_err() && again.collect().await.unwrap().to_bytes() == "abc"),
            }
        }
    }

    #[tokio::test]
    async fn who_has_read_too_much_is_not_held() {
        let (mut first, keeper) = Replay::keep(abc(), 0);
        first.frame().await.unwrap().unwrap();
        assert!(!keeper.hold());
        assert_eq!(first.frame().await.unwrap().unwrap().into_data().unwrap(), "bc");
    }

    #[tokio::test]
    async fn after_the_last_attempt_nothing_is_kept() {
        let (mut first, keeper) = Replay::keep(abc(), 1000);
        first.frame().await.unwrap().unwrap();
        let again = keeper.again().unwrap();
        drop(keeper);
        assert_eq!(again.collect().await.unwrap().to_bytes(), "abc");
    }

    #[tokio::test]
    async fn an_empty_body_takes_no_place() {
        let (first, keeper) = Replay::keep(http_body_util::Empty::<Bytes>::new(), 10);
        assert!(first.is_end_stream() && keeper.0.is_none());
        assert!(keeper.again().unwrap().is_end_stream());
    }
}
