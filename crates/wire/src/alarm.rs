//! A timer that is set once in a while, not once per request.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::task::unconstrained;
use tokio::time::{Instant, Sleep, sleep_until};

/// Goes off at a moment that mostly moves forward. Setting a timer costs more than most of what a request does; so it
/// stays set for the earliest moment that was ever asked of it, and is set again only when that has come too early.
#[derive(Debug, Default)]
pub struct Alarm {
    sleep: Option<Pin<Box<Sleep>>>,
    /// Whom it wakes.
    waker: Option<Waker>,
}

impl Alarm {
    /// Ready once `deadline` has passed.
    pub fn poll(&mut self, cx: &mut Context<'_>, deadline: Instant) -> Poll<()> {
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if deadline < sleep.deadline() {
            sleep.as_mut().reset(deadline);
        } else if !sleep.is_elapsed() && self.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            return Poll::Pending;
        }
        self.waker = None;
        // Whatever the task has done before: a timer that puts it off is not set, and would not be asked again.
        while pin!(unconstrained(sleep.as_mut())).poll(cx).is_ready() {
            if Instant::now() >= deadline {
                return Poll::Ready(());
            }
            sleep.as_mut().reset(deadline);
        }
        self.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// Polls once, for one who does not wait: whatever the task has done before, and nobody is woken.
pub fn poll_once<T>(poll: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
    pin!(unconstrained(poll_fn(poll))).poll(&mut Context::from_waker(Waker::noop()))
}

/// `timeout` from `start`; `None` for never.
#[must_use]
pub fn after(start: Instant, timeout: Duration) -> Option<Instant> {
    // Timers refuse what lies too far ahead.
    if timeout >= Duration::from_secs(365 * 24 * 3600) { None } else { start.checked_add(timeout) }
}

/// The earlier of two moments that may never come.
#[must_use]
pub fn earlier(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (one, other) => one.or(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::ready;
    use tokio::task::coop::{has_budget_remaining, poll_proceed};
    use tokio::time::timeout;

    /// Does so much that the runtime makes the task wait, then what `then` does.
    fn exhausted<T>(cx: &mut Context<'_>, then: impl FnOnce(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
        while has_budget_remaining() {
            ready!(poll_proceed(cx)).made_progress();
        }
        then(cx)
    }

    #[tokio::test(start_paused = true)]
    async fn it_goes_off_in_a_task_that_does_much() {
        let (start, mut alarm) = (Instant::now(), Alarm::default());
        let end = start + Duration::from_secs(10);
        let rang = poll_fn(|cx| exhausted(cx, |cx| alarm.poll(cx, end)));
        timeout(Duration::from_secs(60), rang).await.unwrap();
        assert_eq!(Instant::now(), end);
    }

    #[tokio::test]
    async fn one_who_does_not_wait_sees_what_is_there() {
        let (near, mut far) = tokio::io::duplex(8);
        let mut near = pin!(near);
        tokio::io::AsyncWriteExt::write_all(&mut far, b"x").await.unwrap();
        poll_fn(|cx| {
            exhausted(cx, |_| {
                let mut byte = [0];
                let mut look = || {
                    let mut read = tokio::io::ReadBuf::new(&mut byte);
                    poll_once(|cx| tokio::io::AsyncRead::poll_read(near.as_mut(), cx, &mut read).map(Result::unwrap))
                };
                assert!(look().is_ready() && look().is_pending());
                Poll::Ready(())
            })
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn it_goes_off_at_the_last_deadline_asked_for() {
        let start = Instant::now();
        let mut alarm = Alarm::default();
        let at = |seconds| start + Duration::from_secs(seconds);
        let noop = || Context::from_waker(Waker::noop());
        assert!(alarm.poll(&mut noop(), at(10)).is_pending());
        // Later: the old setting fires first and is moved on.
        poll_fn(|cx| alarm.poll(cx, at(25))).await;
        assert_eq!(Instant::now(), at(25));
        // Earlier than what it is set for.
        assert!(alarm.poll(&mut noop(), at(100)).is_pending());
        poll_fn(|cx| alarm.poll(cx, at(30))).await;
        assert_eq!(Instant::now(), at(30));
    }
}
