//! The response body of a layer that refuses or watches.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Frame, SizeHint};
use pin_project_lite::pin_project;

pin_project! {
    /// The inner service's body, passed through as it streams and watched by a [`Guard`], or the bytes of a refusal.
    ///
    /// So nothing is asked of the inner body but to be one: not `Default`, not `From<String>`, not boxed.
    pub struct Body<B, G: Guard = ()> {
        #[pin]
        state: State<B, G>,
    }
}

pin_project! {
    #[project = Project]
    enum State<B, G: Guard> {
        Inner { #[pin] body: B, guard: Option<G> },
        Refusal { bytes: Option<Bytes> },
    }
}

/// Watches a body. Dropped before [`end`](Self::end) or [`error`](Self::error) were called, it saw a body that nobody
/// wanted to the end.
pub trait Guard {
    /// So many bytes passed.
    fn data(&mut self, bytes: usize) {
        let _ = bytes;
    }

    /// As many bytes passed as were announced. Trailers may follow, but servers need not ask for them.
    fn whole(&mut self) {}

    /// Trailers passed; the end follows.
    fn trailers(&mut self, trailers: &HeaderMap) {
        let _ = trailers;
    }

    /// The body arrived whole.
    fn end(&mut self) {}

    /// The body broke off.
    fn error(&mut self) {}
}

/// Watches nothing.
impl Guard for () {}

/// Two that watch one body.
impl<A: Guard, B: Guard> Guard for (A, B) {
    fn data(&mut self, bytes: usize) {
        self.0.data(bytes);
        self.1.data(bytes);
    }

    fn whole(&mut self) {
        self.0.whole();
        self.1.whole();
    }

    fn trailers(&mut self, trailers: &HeaderMap) {
        self.0.trailers(trailers);
        self.1.trailers(trailers);
    }

    fn end(&mut self) {
        self.0.end();
        self.1.end();
    }

    fn error(&mut self) {
        self.0.error();
        self.1.error();
    }
}

/// Watches if it is there.
impl<G: Guard> Guard for Option<G> {
    fn data(&mut self, bytes: usize) {
        if let Some(guard) = self {
            guard.data(bytes);
        }
    }

    fn whole(&mut self) {
        if let Some(guard) = self {
            guard.whole();
        }
    }

    fn trailers(&mut self, trailers: &HeaderMap) {
        if let Some(guard) = self {
            guard.trailers(trailers);
        }
    }

    fn end(&mut self) {
        if let Some(guard) = self {
            guard.end();
        }
    }

    fn error(&mut self) {
        if let Some(guard) = self {
            guard.error();
        }
    }
}

// === impl Body ===

impl<B, G: Guard> Body<B, G> {
    /// Passes `body` through unwatched.
    #[must_use]
    pub const fn new(body: B) -> Self {
        Self { state: State::Inner { body, guard: None } }
    }

    /// A body of bytes of our own.
    #[must_use]
    pub fn refusal(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        Self { state: State::Refusal { bytes: (!bytes.is_empty()).then_some(bytes) } }
    }
}

impl<B: http_body::Body, G: Guard> Body<B, G> {
    /// Passes `body` through, watched by `guard`. One that has ended already ends the guard now, as servers need not poll
    /// it.
    #[must_use]
    pub fn guarded(body: B, mut guard: G) -> Self {
        if body.is_end_stream() {
            guard.end();
            return Self::new(body);
        }
        Self { state: State::Inner { body, guard: Some(guard) } }
    }
}

impl<B, G> http_body::Body for Body<B, G>
where
    B: http_body::Body<Data = Bytes>,
    G: Guard,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        match self.project().state.project() {
            Project::Inner { mut body, guard } => {
                let frame = ready!(body.as_mut().poll_frame(cx));
                let Some(watch) = guard else { return Poll::Ready(frame) };
                // Taken apart and put together again, a frame of data need not be written to memory to be looked at.
                let frame = match frame {
                    Some(Ok(frame)) => match frame.into_data() {
                        Ok(data) => {
                            watch.data(data.len());
                            if body.is_end_stream() {
                                arrived(guard);
                            } else if body.size_hint().exact() == Some(0) {
                                watch.whole();
                            }
                            return Poll::Ready(Some(Ok(Frame::data(data))));
                        }
                        Err(frame) => Some(Ok(frame)),
                    },
                    over => over,
                };
                if end(watch, frame.as_ref(), body.is_end_stream()) {
                    *guard = None;
                }
                Poll::Ready(frame)
            }
            Project::Refusal { bytes } => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.state {
            State::Inner { body, .. } => body.is_end_stream(),
            State::Refusal { bytes } => bytes.is_none(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.state {
            State::Inner { body, .. } => body.size_hint(),
            State::Refusal { bytes } => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
        }
    }
}

/// The body is whole. Apart, as what is above is small enough then to become part of whoever reads the body.
#[inline(never)]
fn arrived(guard: &mut Option<impl Guard>) {
    guard.end();
    *guard = None;
}

/// Tells of what is no data, and says whether nothing follows it.
#[inline(never)]
fn end<E>(watch: &mut impl Guard, frame: Option<&Result<Frame<Bytes>, E>>, is_last: bool) -> bool {
    match frame {
        Some(Ok(frame)) => {
            if let Some(trailers) = frame.trailers_ref() {
                watch.trailers(trailers);
            }
            let over = is_last || frame.is_trailers();
            if over {
                watch.end();
            }
            over
        }
        Some(Err(_)) => {
            watch.error();
            true
        }
        None => {
            watch.end();
            true
        }
    }
}

/// An empty body.
impl<B, G: Guard> Default for Body<B, G> {
    fn default() -> Self {
        Self { state: State::Refusal { bytes: None } }
    }
}

impl<B, G: Guard> fmt::Debug for Body<B, G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.state {
            State::Inner { .. } => "Body::Inner",
            State::Refusal { .. } => "Body::Refusal",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::{BodyExt, Empty, Full, StreamBody};
    use std::cell::RefCell;
    use std::rc::Rc;

    #[derive(Clone, Default)]
    struct Log(Rc<RefCell<Vec<String>>>);

    impl Guard for Log {
        fn data(&mut self, bytes: usize) {
            self.0.borrow_mut().push(format!("data {bytes}"));
        }

        fn whole(&mut self) {
            self.0.borrow_mut().push("whole".into());
        }

        fn trailers(&mut self, trailers: &HeaderMap) {
            self.0.borrow_mut().push(format!("trailers {}", trailers.len()));
        }

        fn end(&mut self) {
            self.0.borrow_mut().push("end".into());
        }

        fn error(&mut self) {
            self.0.borrow_mut().push("error".into());
        }
    }

    struct Frames(std::vec::IntoIter<Result<Frame<Bytes>, &'static str>>);

    impl http_body::Body for Frames {
        type Data = Bytes;
        type Error = &'static str;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
            Poll::Ready(self.0.next())
        }
    }

    fn frames(frames: Vec<Result<Frame<Bytes>, &'static str>>) -> Frames {
        Frames(frames.into_iter())
    }

    #[tokio::test]
    async fn a_guard_sees_data_trailers_and_one_end() {
        let log = Log::default();
        let inner = frames(vec![Ok(Frame::data("abc".into())), Ok(Frame::trailers(HeaderMap::new()))]);
        let collected = Body::guarded(inner, log.clone()).collect().await.unwrap();
        assert!(collected.trailers().is_some());
        assert_eq!(*log.0.borrow(), ["data 3", "trailers 0", "end"]);
    }

    #[tokio::test]
    async fn a_guard_sees_a_broken_body() {
        let log = Log::default();
        assert!(Body::guarded(frames(vec![Err("cut")]), log.clone()).collect().await.is_err());
        assert_eq!(*log.0.borrow(), ["error"]);
    }

    #[tokio::test]
    async fn the_end_is_seen_with_the_last_frame_and_for_a_body_nobody_polls() {
        let log = Log::default();
        let mut body = Body::guarded(Full::<Bytes>::from("abc"), log.clone());
        body.frame().await.unwrap().unwrap();
        assert_eq!(*log.0.borrow(), ["data 3", "end"], "nobody polled again");
        let log = Log::default();
        let _unpolled = Body::guarded(Empty::<Bytes>::new(), log.clone());
        assert_eq!(*log.0.borrow(), ["end"]);
    }

    /// As one that arrives by HTTP/2 with its length, whose last frame of data is not the last frame.
    #[tokio::test]
    async fn that_all_was_seen_that_was_announced_is_told_before_the_end() {
        struct Announced(Frames, u64);

        impl http_body::Body for Announced {
            type Data = Bytes;
            type Error = &'static str;

            fn poll_frame(
                mut self: Pin<&mut Self>,
                cx: &mut Context<'_>,
            ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
                let frame = ready!(Pin::new(&mut self.0).poll_frame(cx));
                self.1 -= frame.iter().flatten().filter_map(Frame::data_ref).map(|data| data.len() as u64).sum::<u64>();
                Poll::Ready(frame)
            }

            fn size_hint(&self) -> SizeHint {
                SizeHint::with_exact(self.1)
            }
        }

        let log = Log::default();
        let inner = frames(vec![Ok(Frame::data("ab".into())), Ok(Frame::data("c".into()))]);
        let mut body = Body::guarded(Announced(inner, 3), log.clone());
        for _ in 0..2 {
            body.frame().await.unwrap().unwrap();
        }
        assert_eq!(*log.0.borrow(), ["data 2", "data 1", "whole"]);
        assert!(body.frame().await.is_none());
        assert_eq!(log.0.borrow().last().unwrap(), "end");
    }

    #[tokio::test]
    async fn a_refusal_has_its_length() {
        let body = Body::<Empty<Bytes>>::refusal("no");
        assert_eq!(http_body::Body::size_hint(&body).exact(), Some(2));
        assert_eq!(body.collect().await.unwrap().to_bytes(), "no");
    }

    #[test]
    fn the_body_is_send_when_the_inner_is() {
        fn is_send<T: Send>() {}
        is_send::<Body<Full<Bytes>, Option<((), ())>>>();
        let _ = StreamBody::new(());
    }
}
