//! When an endpoint is kept away from.

use std::num::{NonZeroU16, NonZeroU32};
use std::time::Duration;

use super::mistake::Notes;
use super::plain::Share;
use super::read::At;
use super::section::{section, words};

section! {
    /// When an endpoint is kept away from.
    pub struct Breaker {
        /// Whether there is one at all.
        enabled: bool = true,
        /// Opens after so many failures in a row; 0 does not look at that.
        failures: u16 = 5,
        /// How long it stays open.
        open_for: Duration = Duration::from_secs(60),
        /// How long it may stay open at most when it opens again and again, twice as long each time.
        open_limit: Option<Duration>,
        /// Adds up to this part of that time at random, so that those who stopped together do not come back together; 0
        /// adds nothing. 0.5 by default where the time grows, else 0.
        jitter: Option<At<f64>>,
        /// Stays open as long as the response asks that opens it, but no longer than this for it; "0s" does not listen.
        listen_up_to: Duration = Duration::from_secs(300),
        /// What 429 and the gRPC code 8 count as: the endpoint is well, and has no time for this caller.
        exhausted: Counts = Counts::Ignored,
        /// How many requests at a time see how things are, after that.
        probes: NonZeroU16 = NonZeroU16::MIN,
        /// How many of them must succeed for it to close.
        successes: NonZeroU16 = NonZeroU16::MIN,
        /// When such a request is taken for lost.
        probe_timeout: Duration = Duration::from_secs(10),
        /// Opens when this share of the calls in the window failed.
        failure_rate: Option<At<Share>>,
        /// Opens when this share of the calls in the window was slow.
        slow_rate: Option<At<Share>>,
        /// From when on a call is slow.
        slow_after: Option<At<Duration>>,
        /// The window: so many calls. Either this or `window`.
        window_calls: Option<At<u16>>,
        /// The window: so long.
        window: Option<At<Duration>>,
        /// Does not look at shares of fewer calls than this.
        at_least: u32 = 20,
        /// Also opens for endpoints that do worse than the others.
        outliers: Option<At<Outliers>>,
    }
}

words! {
    /// What an answer counts as.
    pub enum Counts {
        /// Nothing.
        Ignored = "ignored",
        /// A failure.
        Failure = "failure",
        /// A success.
        Success = "success",
    }
}

section! {
    /// When an endpoint does worse than the others of its service.
    pub struct Outliers {
        /// How often they are compared.
        every: Duration = Duration::from_secs(10),
        /// Opens when the share that succeeded is more than so many standard deviations below the mean; 0 does
        /// not look at that.
        deviations: Option<f64> = Some(1.9),
        /// Opens when this share failed.
        failure_rate: Option<Share>,
        /// Looks only at endpoints with so many calls since the last time.
        calls: NonZeroU32 = NonZeroU32::new(100).unwrap_or(NonZeroU32::MIN),
        /// Compares only when there are so many of those.
        endpoints: usize = 5,
        /// Opens none while this share of all is open; one may always be.
        at_most: Share = Share(0.1),
        /// How long it stays open.
        open_for: Duration = Duration::from_secs(30),
        /// How long it may stay open at most when it opens again and again.
        open_limit: Duration = Duration::from_secs(300),
        /// Adds up to this part of that time at random.
        jitter: At<f64> = At::of(0.5),
    }
}

impl Breaker {
    pub(super) fn check(&self, notes: &mut Notes<'_>) {
        let has_window = self.window.is_some() || self.window_calls.is_some();
        for rate in [&self.failure_rate, &self.slow_rate].into_iter().flatten() {
            if !has_window {
                notes.push(&rate.span, "a share of what is not said", "add window = \"10s\" or window_calls = 100");
            }
        }
        match (&self.slow_rate, &self.slow_after) {
            (Some(rate), None) => notes.push(&rate.span, "not said what is slow", "add slow_after = \"1s\""),
            (None, Some(after)) => notes.push(&after.span, "not said how many may be slow", "add slow_rate = 0.5"),
            _ => {}
        }
        let jitters = [self.jitter.as_ref(), self.outliers.as_ref().map(|outliers| &outliers.jitter)];
        for jitter in jitters.into_iter().flatten().filter(|jitter| ***jitter > 1.0) {
            notes.push(&jitter.span, "more than the whole time", "at most 1, such as 0.5");
        }
        if let (Some(window), Some(_)) = (&self.window, &self.window_calls) {
            notes.push(&window.span, "both window and window_calls", "keep one of them");
        }
        let seconds = self.window.as_ref().map(|window| (&window.span, window.as_secs_f64()));
        if let Some((span, _)) = seconds.filter(|(_, seconds)| !(0.1..=3600.0).contains(seconds)) {
            notes.push(span, "a window lasts 100 ms to an hour", "such as window = \"10s\"");
        }
        if let Some(calls) = self.window_calls.as_ref().filter(|calls| !(1..=1000).contains(&***calls)) {
            notes.push(&calls.span, "a window holds 1 to 1000 calls", "such as window_calls = 100");
        }
        if has_window && self.failure_rate.is_none() && self.slow_rate.is_none() {
            let span = self.window.as_ref().map(|at| &at.span).or(self.window_calls.as_ref().map(|at| &at.span));
            notes.push(span.unwrap_or(&(0..0)), "a window that opens nothing", "add failure_rate = 0.5");
        }
    }
}
