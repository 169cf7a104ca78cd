//! Admits each caller so often, no oftener: who comes too often gets 429 and is told when to come back.
//!
//! * **Reads** `Identity`, `PeerAddress`, `Route` (for a [`Policy`]); `X-Forwarded-For` or `Forwarded` of trusted proxies.
//! * **Writes** nothing.
//! * **Refuses** with 429 and the `RateLimit` fields, and with `Retry-After` where waiting helps by itself: it does for
//!   `too-many-requests`, not for `too-many-at-once` and `more-than-the-limit`. With 503 if a store does not answer and that is
//!   what was told. gRPC callers get `RESOURCE_EXHAUSTED`, `RetryInfo` and a pushback.
//! * **Alone** it tells callers apart by the client's address; without that, all share one budget and a warning is logged
//!   once.
//! * **Cost** one hash and one compare-and-set; no lock, no allocation.
//!
//! ```
//! use std::num::NonZeroU32;
//! use http::{Request, Response};
//! use http_body_util::Empty;
//! use portcullis_rate_limit::{Rate, RateLimitLayer};
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//! # use bytes::Bytes;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() {
//! let twice_a_minute = Rate::per_minute(NonZeroU32::new(2).unwrap());
//! let service = ServiceBuilder::new()
//!     .layer(RateLimitLayer::new(twice_a_minute))
//!     .service(service_fn(|_: Request<()>| async { Ok::<_, std::io::Error>(Response::new(Empty::<Bytes>::new())) }));
//!
//! let call = || service.clone().oneshot(Request::new(()));
//! assert_eq!(call().await.unwrap().status(), 200);
//! assert_eq!(call().await.unwrap().status(), 200);
//! let refused = call().await.unwrap();
//! assert_eq!(refused.status(), 429);
//! assert_eq!(refused.headers()["retry-after"], "30");
//! # }
//! ```
//!
//! # The idea
//!
//! The generic cell rate algorithm keeps one number for a key: when it will have paid for all it took, the *theoretical
//! arrival time*. A request moves it by the interval of one unit, and is admitted while it stays within the burst. One
//! number is one compare-and-set, so that no interleaving admits more than `burst + rate · time`, and a number that lies
//! in the past says nothing and may be forgotten.
//!
//! Forgetting is what makes the memory bounded. The table has a [fixed capacity](RateLimitLayer::capacity); numbers that
//! say nothing make room for others. When every place says something, newcomers share a bucket with those whose place
//! would be near, one in 22,000 of all callers with the default capacity, and whoever has a place keeps it.
//! What is forgotten is never forgiven: see the source of the table for why that holds under any interleaving.
//!
//! # What it costs
//!
//! Time over the bare service in one run beside others (`cargo bench -p portcullis-rate-limit --bench limit -- --warm-up-time
//! 0.5 --measurement-time 2`), on two cores of a virtual machine; the second column has a clock that stands still, since ours
//! takes 28 ns to read:
//!
//! | | this layer | clock not read | `tower_governor` | `governor` alone |
//! |---|---|---|---|---|
//! | one key, by address | 103 ns | 74 ns | 55 ns | 2 ns |
//! | one key, by identity | 124 ns | | | |
//! | two limits | 163 ns | | | |
//! | 100,000 keys at random | 198 ns | 138 ns | 169 ns | 400 ns (text) |
//! | 1,000,000 keys at random | 266 ns | 271 ns | 371 ns | 536 ns (text) |
//! | two threads beside one, distinct keys | 1.66 × | | 1.46 × | |
//!
//! No allocation for address and identity keys; 64 bytes for each key of the capacity.
//!
//! With many keys the memory decides, and the machine's other tenants with it. The same run shows what memory takes by
//! itself, by reads of which each says where the next one is: over as much as the fronts of the table's sets have, which is
//! all that nineteen charges of twenty look at, 14 ns for 100,000 keys and 151 ns for 1,000,000; over the whole table 52 ns
//! and 161 ns. A charge among a million keys costs that much beside what it costs with a warm one.
//!
//! # Defaults
//!
//! | what | default | |
//! |---|---|---|
//! | burst | as many as the period has | [`Rate::burst`] |
//! | who is who | subject and issuer, else client address | [`RateLimitLayer::with_key`] |
//! | bits of an IPv6 address | 64 | [`DEFAULT_IPV6_PREFIX`] |
//! | trusted proxies | none | [`RateLimitLayer::trusted_proxies`] |
//! | capacity | 65,536 keys, 4 MiB for each of four spans in use | [`DEFAULT_CAPACITY`] |
//! | cost, priority | one, critical | [`Limit::cost`], [`Limit::priority`] |
//! | who comes too often | is refused | [`RateLimitLayer::delay`], [`Limit::shadow`] |
//! | fields | on refusals | [`RateLimitLayer::fields`] |
//! | counters | of this process | `RateLimitLayer::store`, with the feature `redis` |
//! | store: deadline, lease, without an answer | 20 ms, 1 s, admit | `RedisStore` |
//!
//! # What it does not do
//!
//! It does not queue: [delay](RateLimitLayer::delay) gives a request its turn when it comes and holds nothing but that. It
//! does not count by the calendar: a day is any twenty-four hours. It refunds no more than what would not have come back by
//! itself meanwhile, unless [a handle is told to](Handle::refund). Two limits of one name that apply to one request are
//! charged to one key, unless their windows are very different: give each limit a name of its own.
//!
//! It does not protect a service from many callers who each keep to their limit: add a [`Limit`] for [`Everyone`].
//!
//! # When something fails
//!
//! * *Nobody knows who calls*: all such requests share one budget, and a warning is logged once.
//! * *The table is full*: an entry that says nothing makes room; if none does, newcomers share the bucket of their set, one
//!   of thousands, at the rate of one caller. [`Stats::overflowing`] shows it. Requests that race to be a set's newcomers may
//!   be charged once too often, never once too little.
//! * *A request costs more than the burst*: 429 without `Retry-After`, since it would never be admitted.
//! * *The store does not answer*: what `OnFailure` says, after the deadline; see `RedisStore`.
//! * *The clock*: it is monotonic, and steps of the time of day change nothing; with a store it is the server's that counts.

mod answer;
mod charge;
mod counters;
mod current;
mod error;
mod handle;
mod held;
mod in_flight;
mod key;
mod limit;
mod limiter;
mod rate;
#[cfg(feature = "redis")]
mod redis;
mod sync;
mod table;

use std::fmt;
use std::num::NonZeroU32;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use pin_project_lite::pin_project;
use portcullis_core::{Body, Clock, Dialect, Rejection, TrustedProxies};
use tokio::time::Sleep;
use tower_layer::Layer;
use tower_service::Service;

pub use self::answer::Fields;
pub use self::error::Error;
pub use self::handle::{Handle, Stats};
pub use self::held::{Held, Settlement};
pub use self::key::{
    ByMethod, Caller, Claim, ClientAddress, DEFAULT_IPV6_PREFIX, Everyone, Header, Key, KeyBytes, Or, RequestHead,
    RouteName, ServiceName, Subject,
};
pub use self::limit::{Limit, Policy, Priority};
pub use self::rate::Rate;
#[cfg(feature = "redis")]
pub use self::redis::{DEFAULT_LEASE, DEFAULT_STORE_DEADLINE, OnFailure, RedisStore, StoreStats};

use self::answer::Standing;
use self::current::Seen;
use self::held::Holding;
use self::limiter::{Admission, Asking, Begun, Delay, Limiter, WaitingPlace};
use self::table::Table;

/// How many keys have a place of their own, unless told otherwise.
pub const DEFAULT_CAPACITY: usize = 65_536;

/// Applies [`RateLimit`]. All services made from one layer, and all clones of it, share one budget.
///
/// Set it up before it is cloned: a setter gives a layer that has clones counters of its own.
#[derive(Clone, Debug)]
pub struct RateLimitLayer {
    limiter: Arc<Limiter>,
}

/// Refuses callers who come too often.
#[derive(Clone, Debug)]
pub struct RateLimit<S> {
    inner: S,
    shared: Arc<Shared>,
}

/// One pointer to all of it, so that clones stay cheap.
#[derive(Debug)]
struct Shared {
    limiter: Arc<Limiter>,
    seen: Seen,
}

pin_project! {
    /// The inner service's response, or a refusal.
    pub struct ResponseFuture<S, B>
    where
        S: Service<Request<B>>,
    {
        #[pin]
        state: State<S, B, S::Future>,
    }
}

pin_project! {
    #[project = Project]
    enum State<S, B, F> {
        Admitted { #[pin] inner: F, after: After },
        Waiting { sleep: Pin<Box<Sleep>>, place: WaitingPlace, call: Later<S, B, After> },
        Asking { asking: Asking, call: Later<S, B, Arc<Limiter>> },
        Refused { rejection: Option<Rejection>, dialect: Dialect },
    }
}

/// A call that is not made yet, in a place of its own: most are made at once, and their futures are moved about.
type Later<S, B, With> = Option<Box<(S, Request<B>, With)>>;

/// What is left to do when the response is there.
#[derive(Default)]
struct After {
    fields: Option<Box<HeaderMap>>,
    held: Option<Held>,
}

// === impl RateLimitLayer ===

impl RateLimitLayer {
    /// Admits each caller as often as `rate` says.
    #[must_use]
    pub fn new(rate: Rate) -> Self {
        Self::limits([Limit::new("default", rate)])
    }

    /// Admits what all of these limits admit: where a single rate does not say enough.
    ///
    /// ```
    /// use std::num::NonZeroU32;
    /// use portcullis_rate_limit::{Limit, Rate, RateLimitLayer};
    ///
    /// let megabyte = Rate::per_second(NonZeroU32::new(1_000_000).unwrap());
    /// let bytes = Limit::new("bytes", megabyte).settle(|seen| u32::try_from(seen.bytes).unwrap_or(u32::MAX));
    /// let _layer = RateLimitLayer::limits([bytes, Limit::concurrent("at once", NonZeroU32::new(20).unwrap())]);
    /// ```
    #[must_use]
    pub fn limits(limits: impl IntoIterator<Item = Limit>) -> Self {
        Self { limiter: Arc::new(Limiter::new(limits.into_iter().collect())) }
    }

    /// How many may come at once after a long rest, for every limit so far.
    #[must_use]
    pub fn burst(self, burst: NonZeroU32) -> Self {
        self.set(|limiter| {
            limiter.limits.change(|limits| limits.iter().cloned().map(|limit| limit.burst(burst)).collect());
        })
    }

    /// Adds a limit. A request is charged to all of them or to none.
    #[must_use]
    pub fn and(self, limit: Limit) -> Self {
        let more = [limit];
        self.set(|limiter| limiter.limits.change(|limits| [limits, &more].concat()))
    }

    /// Tells callers apart by `key`, for every limit that has no key of its own. By default [`Caller`].
    #[must_use]
    pub fn with_key(self, key: impl Key) -> Self {
        self.set(|limiter| limiter.key = Arc::new(key))
    }

    /// The proxies whose word about the client's address is taken. By default none.
    #[must_use]
    pub fn trusted_proxies(self, proxies: TrustedProxies) -> Self {
        self.set(|limiter| limiter.proxies = proxies)
    }

    /// How many keys have a place of their own; each takes 64 bytes. [`DEFAULT_CAPACITY`] by default. A limit's name, its
    /// route if it is the route's own, and what tells the caller apart make one key.
    ///
    /// Limits of very different windows do not get in each other's way: those of up to ten seconds, ten minutes, ten hours
    /// and longer have so many places each, taken up when the first of them is asked.
    #[must_use]
    pub fn capacity(self, keys: usize) -> Self {
        self.set(|limiter| (limiter.capacity, limiter.table) = (keys, Table::new(keys)))
    }

    /// Requests that are neither charged nor refused.
    #[must_use]
    pub fn exempt(self, exempt: impl Fn(&RequestHead<'_>) -> bool + Send + Sync + 'static) -> Self {
        self.set(|limiter| limiter.exempt = Some(Arc::new(exempt)))
    }

    /// Which responses say how much is left. By default refusals.
    #[must_use]
    pub fn fields(self, fields: Fields) -> Self {
        self.set(|limiter| limiter.fields = fields)
    }

    /// Lets requests wait for up to `longest` instead of refusing them at once, but no longer than their `Deadline` and at
    /// most `places` of them at a time. They are charged when they come, in that order; one that goes away while it waits is
    /// given back its charge. It keeps the inner service that was ready for it. Concurrency limits do not wait.
    ///
    /// What a request is charged it is charged when it comes, whenever it begins. So of several limits only the one it waits
    /// for is exact at the beginning; and whoever comes after one that went away may begin together with one behind it.
    #[must_use]
    pub fn delay(self, longest: Duration, places: usize) -> Self {
        self.set(|limiter| limiter.delay = Some(Delay::new(longest, places)))
    }

    /// Counts in a store that other processes share.
    #[cfg(feature = "redis")]
    #[must_use]
    pub fn store(self, store: RedisStore) -> Self {
        self.set(|limiter| limiter.store = Some(store))
    }

    /// Counts on another clock than the process's.
    #[must_use]
    pub fn with_clock(self, clock: Clock) -> Self {
        self.set(|limiter| limiter.clock = clock)
    }

    /// Reads and changes what this layer's services do.
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle { limiter: self.limiter.clone() }
    }

    fn set(mut self, change: impl FnOnce(&mut Limiter)) -> Self {
        if let Some(limiter) = Arc::get_mut(&mut self.limiter) {
            change(limiter);
        } else {
            let mut limiter = self.limiter.fork();
            change(&mut limiter);
            self.limiter = Arc::new(limiter);
        }
        self
    }
}

impl<S> Layer<S> for RateLimitLayer {
    type Service = RateLimit<S>;

    fn layer(&self, inner: S) -> RateLimit<S> {
        let (limiter, seen) = (self.limiter.clone(), self.limiter.limits.see());
        RateLimit { inner, shared: Arc::new(Shared { limiter, seen }) }
    }
}

// === impl RateLimit ===

impl<S, B, R> Service<Request<B>> for RateLimit<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone,
    R: http_body::Body<Data = Bytes>,
{
    type Response = Response<Body<R, Held>>;
    type Error = S::Error;
    type Future = ResponseFuture<S, B>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let Shared { limiter, seen } = &*self.shared;
        let state = match limiter.begin(seen, &RequestHead::new(&request, &limiter.proxies)) {
            // By itself, so that what most requests are does not go through the hands of what few are.
            Begun::Decided(Ok(Admission(None))) => {
                let (inner, after) = (self.inner.call(request), After::default());
                return ResponseFuture { state: State::Admitted { inner, after } };
            }
            Begun::Decided(Ok(admission)) => State::go_on(admission, request, &mut self.inner, limiter),
            Begun::Decided(Err(rejection)) => State::refused(rejection, &request),
            Begun::Asked(asking) => {
                let limiter = limiter.clone();
                State::Asking { asking, call: Some(Box::new((take_ready(&mut self.inner), request, limiter))) }
            }
        };
        ResponseFuture { state }
    }
}

// === impl ResponseFuture ===

impl<S, B, R> Future for ResponseFuture<S, B>
where
    S: Service<Request<B>, Response = Response<R>> + Clone,
    R: http_body::Body<Data = Bytes>,
{
    type Output = Result<Response<Body<R, Held>>, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.project().state;
        loop {
            let next = match state.as_mut().project() {
                Project::Admitted { inner, after } => {
                    let response = ready!(inner.poll(cx))?;
                    return Poll::Ready(Ok(after.finish(response)));
                }
                Project::Waiting { sleep, call, .. } => {
                    ready!(sleep.as_mut().poll(cx));
                    let Some(call) = call.take() else { return Poll::Pending };
                    let (mut service, request, mut after) = *call;
                    after.start();
                    State::Admitted { inner: service.call(request), after }
                }
                Project::Asking { asking, call } => {
                    let answer = ready!(asking.as_mut().poll(cx));
                    let Some(call) = call.take() else { return Poll::Pending };
                    let (mut service, request, limiter) = *call;
                    match answer {
                        Ok(admission) => State::go_on(admission, request, &mut service, &limiter),
                        Err(rejection) => State::refused(rejection, &request),
                    }
                }
                Project::Refused { rejection, dialect } => {
                    let Some(rejection) = rejection.take() else { return Poll::Pending };
                    return Poll::Ready(Ok(rejection.into_response(*dialect)));
                }
            };
            state.set(next);
        }
    }
}

impl<S: Service<Request<B>>, B> fmt::Debug for ResponseFuture<S, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.state {
            State::Admitted { .. } => "ResponseFuture::Admitted",
            State::Waiting { .. } => "ResponseFuture::Waiting",
            State::Asking { .. } => "ResponseFuture::Asking",
            State::Refused { .. } => "ResponseFuture::Refused",
        })
    }
}

// === impl State ===

impl<S: Service<Request<B>> + Clone, B> State<S, B, S::Future> {
    /// Calls the service that is ready, now or later.
    #[inline]
    fn go_on(admission: Admission, request: Request<B>, ready: &mut S, limiter: &Arc<Limiter>) -> Self {
        let Admission(Some(mut kept)) = admission else {
            return Self::Admitted { inner: ready.call(request), after: After::default() };
        };
        let mut after = After::new(limiter, &kept.standings, kept.holdings);
        let Some(refusal) = kept.late else {
            after.start();
            return Self::Admitted { inner: ready.call(request), after };
        };
        let Some(place) = kept.place.take().or_else(|| limiter.wait()) else {
            limiter.counters.add(|counts| &counts.refused);
            return Self::refused(limiter.refuse(refusal), &request);
        };
        limiter.counters.add(|counts| &counts.delayed);
        let sleep = Box::pin(tokio::time::sleep(kept.wait));
        Self::Waiting { sleep, place, call: Some(Box::new((take_ready(ready), request, after))) }
    }
}

impl<S, B, F> State<S, B, F> {
    fn refused(rejection: Rejection, request: &Request<B>) -> Self {
        Self::Refused { rejection: Some(rejection), dialect: Dialect::of(request.headers()) }
    }
}

// === impl After ===

impl After {
    fn new(limiter: &Arc<Limiter>, standings: &[Standing], holdings: Vec<Holding>) -> Self {
        let fields = (!standings.is_empty()).then(|| {
            let mut fields = Box::default();
            limiter.fields.write(standings, &mut fields);
            fields
        });
        let held = (!holdings.is_empty()).then(|| Held::new(limiter.clone(), holdings));
        Self { fields, held }
    }

    fn start(&mut self) {
        if let Some(held) = &mut self.held {
            held.start();
        }
    }

    fn finish<R: http_body::Body<Data = Bytes>>(&mut self, mut response: Response<R>) -> Response<Body<R, Held>> {
        if let Some(fields) = self.fields.take() {
            let headers = response.headers_mut();
            for (name, value) in fields.iter() {
                // The service may have limits of its own: lists add up, numbers do not.
                if name.as_str().starts_with("x-") {
                    headers.insert(name, value.clone());
                } else {
                    headers.append(name, value.clone());
                }
            }
        }
        match self.held.take() {
            Some(held) => held.watch(response),
            None => response.map(Body::new),
        }
    }
}

/// The service that is ready, in exchange for one that is not.
fn take_ready<S: Clone>(service: &mut S) -> S {
    let not_ready = service.clone();
    std::mem::replace(service, not_ready)
}
