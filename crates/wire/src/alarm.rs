//! A timer that is set once in a while, not once per request.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

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
        while sleep.as_mut().poll(cx).is_ready() {
            if Instant::now() >= deadline {
                return Poll::Ready(());
            }
            sleep.as_mut().reset(deadline);
        }
        self.waker = Some(cx.waker().clone());
        Poll::Pending
    }
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
    use std::future::poll_fn;

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
