//! Keeps requests away from what keeps failing, and lets a few through to see when it is well again.
//!
//! * **Reads** the [`Permit`] that a balancer left, if any; to find [outliers](Outliers) also the [`Endpoints`].
//! * **Writes** nothing; it takes the right out of the permit and leaves the endpoint.
//! * **Refuses** with 503 and `retry-after`, or `UNAVAILABLE` and `RetryInfo`, while open.
//! * **Alone** it guards the whole service behind it.
//! * **Cost**: while closed no lock, no allocation, and nothing written that threads share but a hold on the endpoint; a
//!   window adds a write, and one of time or of slow calls readings of the clock. `cargo bench -p portcullis-circuit-break`
//!   compares it with others.
//!
//! ```
//! # use http::{Request, Response, StatusCode};
//! # use portcullis_circuit_break::CircuitBreakLayer;
//! # use tower::{Layer, ServiceExt};
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), std::convert::Infallible> {
//! let broken = tower::service_fn(|_: Request<()>| async {
//!     let mut response = Response::new(http_body_util::Empty::<bytes::Bytes>::new());
//!     *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
//!     Ok::<_, std::convert::Infallible>(response)
//! });
//! let guarded = CircuitBreakLayer::new().failures(1).layer(broken);
//!
//! let admitted = guarded.clone().oneshot(Request::new(())).await?;
//! assert_eq!(admitted.status(), StatusCode::INTERNAL_SERVER_ERROR);
//! let refused = guarded.oneshot(Request::new(())).await?;
//! assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
//! assert_eq!(refused.headers()["retry-after"], "60");
//! # Ok(()) }
//! ```
//!
//! # The idea
//!
//! **Position decides scope.** Where the request carries a [`Permit`], that is below a balancer, each endpoint has a breaker
//! of its own, kept in the endpoint's slot and moving the endpoint's [`Gate`]. The balancer enters that gate while it
//! picks, so it sees at once what is refused, and a breaker can probe an endpoint that the balancer avoids. Anywhere else
//! one breaker guards the whole. Or [`with_key`](CircuitBreakLayer::with_key) decides.
//!
//! **How a call went is known when its body has ended**: gRPC trailers count, and so does a body cut short. A call the
//! caller broke off says nothing, and gives its place back. Replace [`Standard`] by [`with_classify`].
//!
//! **Where impatience and sickness look alike, sickness is taken for it.** A deadline that ends while the endpoint is at it
//! counts, also one that the caller set, and so does a body that the route's own limits cut; one that had ended before the
//! endpoint was asked does not.
//!
//! **Nothing can stick.** A probe that does not come back is replaced after the [probe timeout], an ignored one when it has
//! ended; no timer or task has to run. One that streams for longer than that has succeeded, since long streams end with
//! their callers.
//! A result counts only if its call entered in the present period.
//!
//! **A balancer that panics is believed**: a forced pass is let through, and its outcome changes nothing; otherwise the
//! breaker would undo the panic.
//!
//! # Defaults
//!
//! | setting | default | why |
//! |---|---|---|
//! | [`failures`] | 5 in a row | what most breakers use; sees an outage within five calls and needs no window |
//! | [`window`] | none | a share needs traffic to mean something, and how much is for you to say |
//! | [`outliers`] | not looked for | it takes several endpoints and some traffic |
//! | [`open_for`] | 60 s | the pattern book's; below a balancer nobody waits for it |
//! | [`probes`] | 1 at a time | the least that tells |
//! | [`successes`] | 1 | as many as probes, so that closing takes no longer than a call |
//! | [`probe_timeout`] | 10 s | then a probe is taken for lost |
//! | asked for rest | up to 5 min | see [`OpenTime::listen_up_to`] |
//!
//! # What it does not do
//!
//! It does not retry, does not time calls out, and does not limit how many are under way: until the first of many hanging
//! calls has failed, there is nothing to count. Put a timeout below it, and a [`Bulkhead`] above it. It does not count what
//! succeeds unless a window needs to know; how many requests an endpoint got is counted by the endpoint.
//!
//! # What it costs, beside others
//!
//! Nanoseconds over a bare call that takes 12 (request, response, and body read to its end), on a noisy virtual machine of two
//! cores; one reading of the clock is 34 of them. `cargo bench -p portcullis-circuit-break --bench call` prints them anew.
//! Neither peer sees the body; failsafe does not see the response either.
//!
//! | admitted | this | failsafe | tower-resilience |
//! |---|---|---|---|
//! | failures in a row | 47 to 50 | 18 | 229 |
//! | window of calls | 55 to 60 | | 236 |
//! | failures in a row, at an endpoint | 56 to 59 | | |
//! | window of time, clock apart | 56 to 58 | 78, with a clock | |
//! | the decision to refuse | 35 | 30 | 153, an error |
//!
//! No allocation, and up to 288 bytes for each endpoint, a window of time with its ten buckets included. All calls successful at
//! one breaker, nanoseconds a call with one thread, then two: 60 and 72 to 86; failsafe 31 and 65 to 99; tower-resilience 235
//! and 382 to 489. So two threads do 1.4 to 1.7 times what one does, of failsafe 0.6 to 0.9, of tower-resilience 1.0 to 1.2.
//! What is left of a call is mostly the hold on what the layer shares, and moving the response.
//!
//! # What was tried on it
//!
//! * Every interleaving of two and three threads under loom, without a bound on preemptions: seven models of the breaker
//!   with its gate in 5 s, eight of the gate alone in 51 s.
//! * Random histories (admit, succeed, fail, ignore, drop, late results, jumps of the clock, modes, another mover) against a
//!   naive model: a thousand in each test run, and a million by the command in the README, in 7 s; a million at the gate
//!   alone take 7 s.
//! * What went wrong in other breakers, each as a test by its name: `tests/known_bugs.rs` and `tests/bulkhead.rs`.
//! * Three backends over sockets under 200 calls a second for 15 s: one hangs from the third second to the ninth, one
//!   answers 500 every other second, one is fine. `cargo run --release --example recovery`:
//!
//! | stack | client errors | the hanging one left alone after |
//! |---|---|---|
//! | no breaker | 28.9 % | never |
//! | breaker | 2.0 % | 0.32 s |
//! | no breaker, a second attempt | 12.9 % | never |
//! | breaker, a second attempt | 0.20 % | 0.30 s |
//!
//! An endpoint may take 250 ms to its head there, so nothing can be known sooner; it has its traffic back with the first
//! probe after the open time, at most 2 s and its jitter: 2.5 s after it was well, as measured.
//!
//! # When things fail
//!
//! | what | the request gets |
//! |---|---|
//! | open, or every probe's place is taken | 503 `open`, `retry-after` the time left |
//! | the gate is refused by another mover, without a time | 503 `open` without `retry-after` |
//! | [`Mode::ForcedOpen`] | 503 `open` without `retry-after`, also when a balancer panics |
//! | the inner service's error | the error, counted as [`Classify::error`] says |
//!
//! [`with_classify`]: CircuitBreakLayer::with_classify
//! [probe timeout]: CircuitBreakLayer::probe_timeout
//! [`failures`]: CircuitBreakLayer::failures
//! [`window`]: CircuitBreakLayer::window
//! [`outliers`]: CircuitBreakLayer::outliers
//! [`open_for`]: CircuitBreakLayer::open_for
//! [`probes`]: CircuitBreakLayer::probes
//! [`successes`]: CircuitBreakLayer::successes
//! [`probe_timeout`]: CircuitBreakLayer::probe_timeout
//! [`Gate`]: portcullis_core::Gate

mod breaker;
mod bulkhead;
mod handle;
mod keyed;
mod outlier;
mod rules;
mod shared;
mod sync;
mod watch;
mod window;

use std::fmt;
use std::hash::Hash;
use std::num::{NonZeroU16, NonZeroU32};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use pin_project_lite::pin_project;
use portcullis_core::{
    Body, Carried, Classify, Clock, Dialect, Endpoints, Layer as Name, Moment, Permit, Refused, Rejection, Standard,
    WallClock,
};

pub use crate::breaker::{Reason, State};
pub use crate::bulkhead::{Bulkhead, BulkheadFuture, BulkheadLayer, Hold};
pub use crate::handle::{Breaker, Change, Changes, Counts, Guarding, Handle, Mode, Rates};
use crate::keyed::sealed::Fresh;
pub use crate::keyed::{Keyed, Scope};
pub use crate::outlier::Outliers;
pub use crate::rules::{Error, OpenTime, Share, Window};
use crate::rules::{Rules, Span};
use crate::shared::{Parts, Shared, Target};
use crate::watch::Lines;
pub use crate::watch::Watch;

/// Applies [`CircuitBreak`]. All services made from one layer share its breakers.
///
/// Every setter returns a layer with breakers of its own: set first, then take [handles](Self::handle) and make services.
pub struct CircuitBreakLayer<C = Standard, K = ()> {
    lines: Arc<Lines<C>>,
    scope: K,
}

/// Keeps requests away from what keeps failing.
pub struct CircuitBreak<S, C = Standard, K = ()> {
    inner: S,
    lines: Arc<Lines<C>>,
    scope: K,
}

/// The response body of [`CircuitBreak`].
pub type ResponseBody<B, C = Standard> = Body<B, Watch<C>>;

pin_project! {
    /// The response of [`CircuitBreak`].
    pub struct ResponseFuture<F, C: Classify = Standard> {
        #[pin]
        state: Step<F, C>,
    }
}

pin_project! {
    #[project = Project]
    enum Step<F, C: Classify> {
        Called { #[pin] future: F, watch: Option<Watch<C>> },
        Refused { rejection: Option<Rejection>, dialect: Dialect },
    }
}

// === impl CircuitBreakLayer ===

impl CircuitBreakLayer {
    /// Opens after five failures in a row, for a minute, and then lets one request at a time see how things are.
    #[must_use]
    pub fn new() -> Self {
        let lines = Lines::new(Shared::new(Parts::default()), &Arc::new(Standard::default()));
        Self { lines: Arc::new(lines), scope: () }
    }
}

impl<C, K: Fresh> CircuitBreakLayer<C, K> {
    /// Opens after so many failures without a success between. Default 5; 0 does not look at that.
    #[must_use]
    pub fn failures(self, failures: u16) -> Self {
        self.with_rules(|rules| rules.failures = failures)
    }

    /// Opens by the shares in this window, too. There is one window of calls and one of time; another one of its kind takes
    /// its place.
    #[must_use]
    pub fn window(self, window: Window) -> Self {
        self.with_rules(|rules| match window.span {
            Span::Calls(_) => rules.calls = Some(window),
            Span::Time(_) => rules.time = Some(window),
        })
    }

    /// Stays open for so long: a [`Duration`], or an [`OpenTime`] that grows. Default 60 s.
    #[must_use]
    pub fn open_for(self, time: impl Into<OpenTime>) -> Self {
        self.with_rules(|rules| rules.open = time.into())
    }

    /// Lets so many requests at a time see how things are, when the open time is over. Default 1.
    #[must_use]
    pub fn probes(self, probes: NonZeroU16) -> Self {
        self.with_rules(|rules| rules.probes = probes)
    }

    /// Closes after so many probes have succeeded; one that fails opens again. Default 1.
    #[must_use]
    pub fn successes(self, successes: NonZeroU16) -> Self {
        self.with_rules(|rules| rules.successes = successes)
    }

    /// Takes a probe for lost that has not come back so long after it went in; another goes in its place. At least a
    /// millisecond. Default 10 s.
    ///
    /// One that began to answer well, and still gives data after that or is dropped by the caller then, is a stream and has
    /// succeeded.
    #[must_use]
    pub fn probe_timeout(self, timeout: Duration) -> Self {
        self.with_rules(|rules| rules.probe_timeout = timeout)
    }

    /// Opens the breakers of endpoints that do worse than the others of their service, too: below a balancer, and where the
    /// request carries [`Endpoints`].
    #[must_use]
    pub fn outliers(self, outliers: Outliers) -> Self {
        self.with_rules(|rules| rules.outliers = Some(outliers))
    }

    /// Calls `listen` at every change of state, from the call that made it and outside of any lock. See also
    /// [`Handle::changes`].
    #[must_use]
    pub fn on_change(self, listen: impl Fn(&Change) + Send + Sync + 'static) -> Self {
        self.with(|parts| parts.on_change = Some(Arc::new(listen)))
    }

    /// Decides by `classify` how calls went, instead of [`Standard`].
    #[must_use]
    pub fn with_classify<D: Classify>(self, classify: D) -> CircuitBreakLayer<D, K> {
        let lines = Lines::new(Shared::new(self.lines.shared().parts.clone()), &Arc::new(classify));
        CircuitBreakLayer { lines: Arc::new(lines), scope: self.scope.fresh() }
    }

    /// Gives requests that have a key a breaker for each key, whatever they carry; where `key` returns `None` position
    /// decides, as it does without this.
    ///
    /// There are at most `limit` of them, rounded up to a multiple of eight; twice as many as are in use at a time leave room
    /// enough. When eight that share a place are full, the least used makes room of those that are closed or whose open time
    /// is over, and if there are none, of all. Such as were not asked for in ten minutes go when others come. Those that were
    /// told a [mode](Breaker::set_mode) of their own stay until told otherwise, beyond the limit if need be.
    ///
    /// ```
    /// # use http::Request;
    /// # use portcullis_circuit_break::CircuitBreakLayer;
    /// let limit = std::num::NonZeroU32::new(1000).unwrap();
    /// let by_host = |request: &Request<()>| request.uri().host().map(str::to_owned);
    /// let layer = CircuitBreakLayer::new().with_key(limit, by_host);
    /// assert!(layer.key(&"example.com".to_owned()).is_none(), "not asked for yet");
    /// ```
    #[must_use]
    pub fn with_key<B, F, T>(self, limit: NonZeroU32, key: F) -> CircuitBreakLayer<C, Keyed<F, T>>
    where
        F: Fn(&Request<B>) -> Option<T>,
        T: Hash + Eq + Send + Sync + 'static,
    {
        CircuitBreakLayer { lines: self.with(|_| ()).lines, scope: Keyed::new(key, limit) }
    }

    /// Reads time from `clock`, which must be the one that moves the gates of the endpoints, if there are any.
    #[must_use]
    pub fn with_clock(self, clock: Clock) -> Self {
        self.with(|parts| parts.clock = clock)
    }

    /// Reads the time of day from `clock`, for a `retry-after` that is a date.
    #[must_use]
    pub fn with_wall_clock(self, clock: WallClock) -> Self {
        self.with(|parts| parts.wall = clock)
    }

    /// Looks into the breakers, and moves them by hand.
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle(self.lines.shared().clone())
    }

    fn with_rules(self, set: impl FnOnce(&mut Rules)) -> Self {
        self.with(|parts| set(&mut parts.rules))
    }

    fn with(self, set: impl FnOnce(&mut Parts)) -> Self {
        let mut parts = self.lines.shared().parts.clone();
        set(&mut parts);
        Self { lines: Arc::new(Lines::new(Shared::new(parts), self.lines.classify())), scope: self.scope.fresh() }
    }
}

impl<C, F, T: Hash + Eq + Send + Sync + 'static> CircuitBreakLayer<C, Keyed<F, T>> {
    /// The breaker of this key, if there is one. It is not made by asking.
    #[must_use]
    pub fn key(&self, key: &T) -> Option<Breaker> {
        let alone = self.scope.keys().find(key)?;
        Some(Breaker { shared: self.lines.shared().clone(), target: Target::Alone(alone) })
    }

    /// How many keys have a breaker.
    #[must_use]
    pub fn keys(&self) -> usize {
        self.scope.keys().len()
    }
}

impl Default for CircuitBreakLayer {
    fn default() -> Self {
        Self::new()
    }
}

impl<C, K> fmt::Debug for CircuitBreakLayer<C, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CircuitBreakLayer").field("shared", self.lines.shared()).finish_non_exhaustive()
    }
}

impl<C, K: Clone> Clone for CircuitBreakLayer<C, K> {
    fn clone(&self) -> Self {
        Self { lines: self.lines.clone(), scope: self.scope.clone() }
    }
}

impl<S, C, K: Clone> tower_layer::Layer<S> for CircuitBreakLayer<C, K> {
    type Service = CircuitBreak<S, C, K>;

    fn layer(&self, inner: S) -> Self::Service {
        CircuitBreak { inner, lines: self.lines.clone(), scope: self.scope.clone() }
    }
}

// === impl CircuitBreak ===

impl<S, C, K> CircuitBreak<S, C, K> {
    /// The service behind it.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    #[cold]
    fn reject(&self, refused: Refused) -> Rejection {
        let rejection = Rejection::new(Name::CircuitBreak, StatusCode::SERVICE_UNAVAILABLE, "open")
            .with_detail("kept failing, and is being left alone");
        let rejection = match refused.until {
            Moment::MAX => rejection,
            until => rejection.with_retry_after(until.since(self.lines.shared().now())),
        };
        tracing::debug!(retry_after = ?rejection.retry_after(), "refused: circuit open");
        rejection
    }
}

impl<S, C, K, B, R> tower_service::Service<Request<B>> for CircuitBreak<S, C, K>
where
    K: Scope<B>,
    S: tower_service::Service<Request<B>, Response = Response<R>>,
    R: http_body::Body<Data = Bytes>,
    C: Classify,
{
    type Response = Response<ResponseBody<R, C>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future, C>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        if let Some(outliers) = &self.lines.shared().parts.rules.outliers
            && let Some(endpoints) = Endpoints::of(request.extensions())
        {
            self.lines.shared().compare(outliers, endpoints);
        }
        let line = self.lines.here();
        let started = line.started();
        let entered = match self.scope.alone(self.lines.shared(), &request) {
            alone @ Some(_) => line.enter(alone, started),
            None => match Permit::of_mut(request.extensions_mut()) {
                Some(permit) => line.adopt(permit, started),
                None => line.enter(None, started),
            },
        };
        let state = match entered {
            Ok(entered) => {
                let watch = entered.map(|entered| line.watch(entered, started));
                Step::Called { future: self.inner.call(request), watch }
            }
            Err(refused) => {
                Step::Refused { rejection: Some(self.reject(refused)), dialect: Dialect::of(request.headers()) }
            }
        };
        ResponseFuture { state }
    }
}

impl<S: Clone, C, K: Clone> Clone for CircuitBreak<S, C, K> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), lines: self.lines.clone(), scope: self.scope.clone() }
    }
}

impl<S: fmt::Debug, C, K> fmt::Debug for CircuitBreak<S, C, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CircuitBreak").field("inner", &self.inner).finish_non_exhaustive()
    }
}

// === impl ResponseFuture ===

impl<F, C, R, E> Future for ResponseFuture<F, C>
where
    F: Future<Output = Result<Response<R>, E>>,
    R: http_body::Body<Data = Bytes>,
    C: Classify,
{
    type Output = Result<Response<ResponseBody<R, C>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            Project::Called { future, watch } => {
                let response = match ready!(future.poll(cx)) {
                    Ok(response) => response,
                    Err(error) => {
                        watch.take().into_iter().for_each(Watch::failed);
                        return Poll::Ready(Err(error));
                    }
                };
                // Looked at where it is: each move of what was just written costs nanoseconds.
                if let Some(watch) = watch {
                    watch.answered(&response);
                }
                let (parts, body) = response.into_parts();
                let body = match watch.take() {
                    Some(watch) => Body::guarded(body, watch),
                    None => Body::new(body),
                };
                Poll::Ready(Ok(Response::from_parts(parts, body)))
            }
            Project::Refused { rejection, dialect } => match rejection.take() {
                Some(rejection) => Poll::Ready(Ok(rejection.into_response(*dialect))),
                // Polled again after it was ready: a future may do anything but be unsound then.
                None => Poll::Pending,
            },
        }
    }
}

impl<F, C: Classify> fmt::Debug for ResponseFuture<F, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}
