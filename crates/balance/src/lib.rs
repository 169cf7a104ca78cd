//! Picks one endpoint for each request, and another when that one cannot be reached.
//!
//! * **Reads** [`Endpoints`], [`Route`](portcullis_core::Route) (its [`Policy`]), [`Deadline`](portcullis_core::Deadline),
//!   [`Prefer`]; what a [`HashKey`] names
//! * **Writes** [`Permit`] for the inner service, and a [`Deadline`](portcullis_core::Deadline) for what says `grpc-timeout`;
//!   [`Served`] into the response's extensions
//! * **Refuses** with 503 when there are no endpoints or none admits (with `retry-after` when a gate says until when), with
//!   504 when the last attempt took longer than [its limit](Policy::attempt_timeout)
//! * **Alone** a request without `Endpoints` passes untouched; without a breaker below, gates always admit
//! * **Cost** a pick locks, queues and allocates nothing, at any number of endpoints, but for the first after a gate moved,
//!   one that finds nobody where it looks, and cookies. Being able to try another endpoint costs one allocation, in which the
//!   request's headers are kept, and two if it has a body; [`Policy::attempts`] of 1 saves them
//!
//! ```
//! use std::convert::Infallible;
//! use bytes::Bytes;
//! use http::{Request, Response};
//! use http_body_util::Empty;
//! use portcullis_balance::{BalanceLayer, PowerOfTwo, Replay, Served};
//! use portcullis_core::{Address, Carried, Endpoints, Instance, Moment, Permit};
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//!
//! # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
//! let service = ServiceBuilder::new().layer(BalanceLayer::new(PowerOfTwo)).service(service_fn(
//!     async |request: Request<Replay<Empty<Bytes>>>| {
//!         let endpoint = Permit::of(request.extensions()).unwrap().endpoint();
//!         assert_eq!(**endpoint.id(), *"a");
//!         Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
//!     },
//! ));
//! let none = Endpoints::none("orders");
//! let one = none.reconcile([Instance::new("a", "10.0.0.1:80".parse::<Address>().unwrap())], Moment::MIN);
//!
//! let mut request = Request::new(Empty::new());
//! one.attach(request.extensions_mut());
//! let response = service.clone().oneshot(request).await.unwrap();
//! assert_eq!(response.extensions().get::<Served>().unwrap().attempts(), 1);
//!
//! let mut request = Request::new(Empty::new());
//! none.attach(request.extensions_mut());
//! assert_eq!(service.oneshot(request).await.unwrap().status(), 503);
//! # });
//! ```
//!
//! # Which policy
//!
//! | policy | looks at | choose it when |
//! |---|---|---|
//! | [`PeakEwma`] | latency, failures, requests in flight | endpoints differ, or fail: the best without knowing more |
//! | [`LeastConnections`] | requests in flight | the balancer sees most of the traffic and endpoints do not fail fast |
//! | [`PowerOfTwo`] | requests in flight | there are many endpoints or many balancers |
//! | [`RoundRobin`] | nothing | requests cost the same and shares must be exact |
//! | [`Random`] | nothing | there is nothing to look at; it scales best over cores |
//! | [`Maglev`], [`RingHash`], [`Rendezvous`] | a [`HashKey`] | equal requests should go to the same endpoint |
//!
//! Or write one: [`Pick`] takes ten lines, or a closure. All obey [weights](portcullis_core::Instance::weight), exactly so
//! as long as loads do not differ; policies that look at load then depart from the weights to even it out.
//!
//! From `cargo run --release -p portcullis-balance --example simulation`, which is seeded and runs the layer itself; all it
//! prints stands [below](#what-the-simulation-prints). 100 servers that work off a queue each, exponential service times,
//! one balancer; time in the system, in units of the mean service time:
//!
//! | policy | mean, p99 at load 0.9 | mean, p99 at load 0.95 | p99, 10 servers five times slower | share of a server of ten that fails at once |
//! |---|---|---|---|---|
//! | random | 9.80, 44.3 | 19.1, 78.4 | 4065 | 0.100 |
//! | round robin | 5.28, 24.6 | 10.4, 49.8 | 4057 | 0.100 |
//! | power of two | 2.65, 9.0 | 3.49, 10.6 | 18.1 | 0.163 |
//! | least connections, of 5 | 1.68, 6.5 | 2.10, 7.4 | 9.1 | 0.323 |
//! | peak EWMA, of 3 (default) | 2.17, 7.9 | 2.81, 9.3 | 6.9 | 0.0001 |
//! | peak EWMA, of 5 | 1.76, 6.8 | 2.22, 7.8 | 6.0 | 0.0001 |
//!
//! The last two columns are at 0.7 of the capacity and with ten requests in flight. Each balancer counts only its own
//! requests: with 20 balancers the p99 at load 0.9 is 15 to 18 for all that look at load, with 100 it is 25 to 26, near
//! round robin.
//!
//! Weights: an endpoint of weight 1 among others of 2 gets its share within the noise, 0.4 %, from every policy as long as
//! nobody is busy, whatever their number. Policies that look at load depart from it when loads differ: where all are as
//! fast, power of two stays within 1.6 % (5 % of two endpoints), least connections gives the light up to 7 % more, peak EWMA
//! up to 11 %; where servers are only as fast as their weights, the light are the slow ones and get less, up to 12 % with
//! power of two and 28 % with peak EWMA, which knows how slow they are.
//!
//! `cargo run --release --example sick_backends`, in the workspace, asks the same of three real backends behind the
//! gateway, with 16 callers: the share of the sick, and what part of the calls callers saw fail, in percent. Well is an
//! answer after 5 ms.
//! Guarded is with a breaker below and 500 tried elsewhere; in the last column nobody is well, and when two of
//! three do not admit that is a [panic](#gates), which goes past breakers.
//!
//! | policy | one 20 times slower | one answers 500 at once | one cuts its bodies | one of each |
//! |---|---|---|---|---|
//! | round robin | 33.3; 0.00 | 33.3; 33.34 | 28.9; 11.94 | 35.5 + 35.3 + 29.2; 49.88 |
//! | random | 32.2; 0.00 | 34.2; 34.24 | 28.2; 11.06 | 33.7 + 40.8 + 25.5; 54.74 |
//! | least connections | 3.7; 0.00 | 69.2; 69.17 | 16.9; 0.00 | 1.9 + 90.2 + 7.9; 97.96 |
//! | power of two | 4.0; 0.00 | 59.8; 59.78 | 18.0; 0.00 | 3.9 + 70.8 + 25.3; 95.22 |
//! | peak EWMA | 0.6; 0.00 | 0.1; 0.14 | 0.2; 0.00 | 77.1 + 13.5 + 9.4; 14.95 |
//! | round robin, guarded | 33.3; 0.00 | 0.1; 0.00 | 0.2; 0.00 | 39.8 + 28.6 + 31.6; 41.11 |
//! | random, guarded | 32.5; 0.00 | 0.1; 0.00 | 0.2; 0.00 | 42.6 + 29.1 + 28.3; 36.12 |
//! | least connections, guarded | 3.6; 0.00 | 0.2; 0.00 | 0.1; 0.00 | 6.1 + 48.2 + 45.7; 92.39 |
//! | power of two, guarded | 4.1; 0.00 | 0.2; 0.00 | 0.1; 0.00 | 6.1 + 46.8 + 47.1; 92.36 |
//! | peak EWMA, guarded | 0.6; 0.00 | 0.1; 0.00 | 0.2; 0.00 | 80.0 + 10.8 + 9.2; 0.00 |
//!
//! # What it costs
//!
//! From three runs of `cargo bench -p portcullis-balance`, nanoseconds on one core of a Xeon with 2 MiB of cache to itself. A
//! pick includes entering the gate, counting the request and counting it back; none allocates.
//!
//! | pick among | 3 | 1000 | 100,000 |
//! |---|---|---|---|
//! | random | 38–39 | 40–41 | 40–41 |
//! | power of two | 39 | 40–41 | 41 |
//! | round robin | 44–45 | 44–47 | 44–45 |
//! | least connections | 44–45 | 52–53 | 99–100 |
//! | peak EWMA, a clock that costs nothing | 49–50 | 55–56 | 59–60 |
//! | the same, reading the clock (20) | 84 | 87–88 | 93 |
//! | Maglev | 48–49 | 48–49 | |
//! | ring hash | 46–47 | 46–47 | |
//!
//! What a pick touches of an endpoint is its place in the list and what it is counted by, 56 bytes that are one line of
//! memory or lie across two; peak EWMA reads a word more, which stand side by side. Those of 100,000 take 6.4 MB, more than a
//! core has for itself, and picks at random waited for them, some 150 ns each. So random numbers are drawn eight picks
//! before they are used: what a pick will read is fetched while others before it are made. Least connections foresees only
//! the first of the five it looks at.
//!
//! Two threads that pick among the same 1000 endpoints at random get 1.6 to 1.9 times as much done as one; by power of two
//! 1.0 to 1.3 times, among 100 endpoints 1.1 to 1.3 and 0.7 to 0.8. Through the same layer, but each among endpoints of its
//! own, they hold each other up by nothing. So it is what endpoints are counted by that travels between the cores, as it must
//! if one is to see the load that the other makes.
//!
//! The table of a hashing policy is laid out in a thread, 65,537 slots for 1000 endpoints in 1.4 ms, while the one before
//! serves. Before the first, for that long, a key goes to whoever stands where its hash points to in the list, unless
//! [`BalanceLayer::prepare`] had been called. The pick that begins it takes 0.13 ms, of which 0.05 are any policy's first
//! look at the endpoints. Balancers that know the same endpoints, in whatever order, have the same table.
//!
//! A whole call among 100 endpoints, with a request of five headers whose making is not counted: 168 without a second
//! attempt, 254 with one made possible, 298 with [`Served`]; 466 by peak EWMA. In the same run `tower`'s `Buffer` + `Balance`
//! takes 741, 1045 with its peak EWMA: a pick by power of two costs an eighteenth of that, a call less than half.
//!
//! # Gates
//!
//! The balancer enters an endpoint's [gate](portcullis_core::Gate) while it picks, so what it hands down is the right to
//! call, not a guess. Endpoints whose gates do not let everybody in are left out, and one request in four first looks
//! whether one of them can be probed; how many probes there are is the gate's business. When fewer than half admit, the
//! balancer panics: it picks from all and passes gates by force, because then it is likelier that something else is wrong,
//! and the few would not bear the load of all. One that is [held by hand](portcullis_core::Gate::hold_for) is taken for one
//! that is not there. When none admits there is nobody left to protect, and the request is
//! refused, at once or after a [wait](BalanceLayer::wait).
//!
//! # Another attempt
//!
//! A response that carries a [`Rejection`] for the upstream's fault of which nothing was [sent](Rejection::sent), or one by a
//! breaker below, or because all connections to the endpoint were in use, is tried elsewhere whatever the method: it costs no
//! endpoint more work, so no [`Budget`] either. A request that was sent is repeated only if its method is idempotent (or
//! [told so](Policy::repeat_any_method)), for the reasons the [`Policy`] lists, within the budget that all clones of the
//! layer share, after a jittered back-off, and never after its deadline: what `grpc-timeout` says is counted once, for all
//! attempts. An endpoint that failed a request is not tried
//! again for it while another admits. Request bodies stream; what has passed is kept up to a limit, until the response
//! begins. While another attempt is planned, nothing passes.
//!
//! # Defaults
//!
//! | | default | set by |
//! |---|---|---|
//! | panic threshold | 50 % | [`BalanceLayer::panic_threshold`] |
//! | over-provisioning of a priority | 140 % | [`BalanceLayer::overprovisioning`] |
//! | waiting when none admits; how many may | none; 1024 | [`BalanceLayer::wait`], [`BalanceLayer::waiting`] |
//! | zone, slow start | off | [`BalanceLayer::zone`], [`BalanceLayer::slow_start`] |
//! | retry budget | 20 % + 10/s over 10 s | [`BalanceLayer::budget`] |
//! | attempts, back-off, replay, subset, stickiness | see there | [`Policy`] |
//! | choices of least connections; looks at all up to | 5; 16 | [`LeastConnections`] |
//! | peak EWMA: decay, penalty, choices | 10 s, 5 s, 3 | [`PeakEwma`] |
//! | ring: points each, in all | 1024, 262,144 | [`RingHash::points`] |
//! | Maglev: slots | 65,537 | [`Maglev::size`] |
//!
//! # When something fails
//!
//! | what | the request gets |
//! |---|---|
//! | no endpoints, or all of weight zero, or none in the subset | 503 `no-endpoints` |
//! | every gate refuses | 503 `none-admits`, with `retry-after` if it is a matter of time |
//! | the endpoint [strictly asked for](Prefer::strict) is not available | 503 `preferred-not-available` |
//! | every attempt fails | the last response as it came, or the last error |
//! | the last attempt takes too long | 504 `attempt-timed-out` |
//! | the body is longer than what is kept | its one attempt's response |
//! | the retry budget is used up | its last attempt's response |
//! | a cookie or hash key that leads nowhere | another endpoint |
//!
//! # What it does not do
//!
//! It opens no connections and checks no health; it reads no load reports of servers; it does not hedge. The whole deadline
//! is the caller's to enforce, or `forward`'s: the balancer only begins nothing after it. It repeats no response that has
//! begun. Zones are left out of account in a panic, and with slow starts when [`Pick::wants_all`].
//!
//! # Why is there no retry layer?
//!
//! Another attempt wants another endpoint, and only the one who picks knows which were tried.
//!
//! # What the simulation prints
#![doc = include_str!("../simulation.md")]

mod ahead;
mod budget;
mod estimate;
mod few;
mod future;
mod group;
mod hash_key;
mod least_connections;
mod maglev;
mod peak_ewma;
mod pick;
mod policy;
mod random;
mod rendezvous;
mod replay;
mod ring_hash;
mod round_robin;
mod served;
mod shape;
mod spare;
mod sticky;
mod table;
#[cfg(test)]
mod testing;
mod view;
mod waiting;
mod watch;

pub use budget::Budget;
pub use future::ResponseFuture;
pub use hash_key::HashKey;
pub use least_connections::{LeastConnections, PowerOfTwo};
pub use maglev::Maglev;
pub use peak_ewma::PeakEwma;
pub use pick::{Asked, Call, Candidates, Pick};
pub use policy::{Policy, Reason};
pub use random::Random;
pub use rendezvous::Rendezvous;
pub use replay::{BoxError, Replay};
pub use ring_hash::RingHash;
pub use round_robin::RoundRobin;
pub use served::{Failed, Served};
pub use shape::{SlowStart, Subset, Zone};
pub use sticky::{Prefer, Sticky};
pub use watch::Watch;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use portcullis_core::{Body, Carried, Classify, Clock, Endpoints, Permit, Rejection, SlotKey, Standard, WallClock};
use tower_layer::Layer;
use tower_service::Service;

use crate::shape::Shape;
use crate::view::{Choice, Chosen, Nobody, Terms, Viewed};
use crate::waiting::Waiting;

/// Applies [`Balance`]. All services made from one layer share one state.
pub struct BalanceLayer<P> {
    shared: Arc<Shared<P>>,
}

/// Picks one endpoint for each request, and another when that one cannot be reached.
pub struct Balance<S, P> {
    inner: S,
    shared: Arc<Shared<P>>,
}

/// How many may wait at a time.
const WAITING: usize = 1024;

/// Where the endpoints of a snapshot stand, whatever the layer.
static IDS: LazyLock<SlotKey<HashMap<Arc<str>, u32>>> = LazyLock::new(SlotKey::new);

struct Shared<P> {
    pick: Arc<P>,
    shape: Shape,
    policy: Policy,
    budget: Budget,
    wait: Option<Duration>,
    waiting: Waiting,
    leaves_served: bool,
    classify: Arc<dyn Classify>,
    clock: Clock,
    wall: WallClock,
    key: SlotKey<Viewed>,
}

// === impl BalanceLayer ===

impl<P: Pick> BalanceLayer<P> {
    /// Picks by `pick`.
    #[must_use]
    pub fn new(pick: P) -> Self {
        Self {
            shared: Arc::new(Shared {
                pick: Arc::new(pick),
                shape: Shape::default(),
                policy: Policy::new(),
                budget: Budget::default(),
                wait: None,
                waiting: Waiting::new(WAITING),
                leaves_served: true,
                classify: Arc::new(Standard::default()),
                clock: Clock::system(),
                wall: WallClock::system(),
                key: SlotKey::new(),
            }),
        }
    }

    /// How requests are attempted whose route does not say otherwise.
    #[must_use]
    pub fn policy(mut self, policy: Policy) -> Self {
        self.change().policy = policy;
        self
    }

    /// How often a request is attempted in all, if its route does not say otherwise. Default 2.
    #[must_use]
    pub fn attempts(mut self, attempts: u8) -> Self {
        let shared = self.change();
        shared.policy = std::mem::take(&mut shared.policy).attempts(attempts);
        self
    }

    /// When fewer than so many percent of the endpoints admit, gates are not obeyed: what is refused is likelier to be
    /// somebody's misjudgement, or an overload that refusing makes worse. Calls that went past a gate change nothing
    /// there. Default 50; zero never panics. When none admits
    /// there is no panic but a refusal. With priorities, each panics by itself, and only when all together are too few for
    /// the requests: so above 71 it is as 71, unless [over-provisioning](Self::overprovisioning) is set to less.
    #[must_use]
    pub fn panic_threshold(mut self, percent: u8) -> Self {
        self.change().shape.panic = percent;
        self
    }

    /// How much more than its even share an endpoint can take, in percent: while those of a
    /// [priority](portcullis_core::Instance::priority) that admit can take all of its requests, none goes to the next.
    /// Default 140; at least 100.
    #[must_use]
    pub fn overprovisioning(mut self, percent: u16) -> Self {
        self.change().shape.overprovisioning = u32::from(percent).max(100);
        self
    }

    /// Prefers the balancer's own zone. By default zones make no difference.
    #[must_use]
    pub fn zone(mut self, zone: Zone) -> Self {
        self.change().shape.zone = Some(zone);
        self
    }

    /// Starts new endpoints slowly. By default they get their full share at once.
    #[must_use]
    pub fn slow_start(mut self, start: SlowStart) -> Self {
        self.change().shape.slow_start = Some(start);
        self
    }

    /// How many requests may be repeated in all. The same budget can be given to several layers. Default
    /// [`Budget::default`], the layer's own.
    #[must_use]
    pub fn budget(mut self, budget: Budget) -> Self {
        self.change().budget = budget;
        self
    }

    /// Waits so long for an endpoint to admit before a request is refused: for one of those that were known when it came. By
    /// default it is refused at once.
    #[must_use]
    pub fn wait(mut self, longest: Duration) -> Self {
        self.change().wait = Some(longest);
        self
    }

    /// How many requests may [wait](Self::wait) at a time, over all services of the layer; more are refused at once, so
    /// that what is held in memory is bounded. Default 1024.
    #[must_use]
    pub fn waiting(mut self, most: usize) -> Self {
        self.change().waiting = Waiting::new(most);
        self
    }

    /// Whether [`Served`] is left in the extensions of responses. Default yes; it costs what one value costs there.
    #[must_use]
    pub fn leaves_served(mut self, yes: bool) -> Self {
        self.change().leaves_served = yes;
        self
    }

    /// What counts as a failure, for policies that [observe](Pick::observes). Default [`Standard`].
    #[must_use]
    pub fn classify(mut self, classify: impl Classify) -> Self {
        self.change().classify = Arc::new(classify);
        self
    }

    /// The clock that gates and latencies are measured with. Default the system's.
    #[must_use]
    pub fn clock(mut self, clock: Clock) -> Self {
        self.change().clock = clock;
        self
    }

    /// The time of day, for `retry-after` with a date. Default the system's.
    #[must_use]
    pub fn wall_clock(mut self, clock: WallClock) -> Self {
        self.change().wall = clock;
        self
    }

    /// The choice alone, for those who speak no `tower`: the right to call one of `endpoints`, by the layer's own
    /// [policy](Self::policy). The caller has the call counted, with [`begin`](Permit::begin), and tells a policy that
    /// [observes](Pick::observes) how it went.
    ///
    /// # Errors
    ///
    /// What the layer would answer: that there are no endpoints, or that none admits and, if it is a matter of time, until
    /// when.
    pub fn choose(&self, endpoints: &Endpoints, asked: Asked<'_>) -> Result<Permit, Rejection> {
        let shared = &*self.shared;
        match shared.choose(endpoints, &shared.policy, asked, &[]) {
            Ok((permit, _)) => Ok(permit),
            Err(nobody) => Err(nobody.into_rejection(Some(endpoints.service()), &shared.clock)),
        }
    }

    /// Lays out now, and waits for, the table that a policy which hashes needs for `endpoints`, in the layer's own
    /// [subset](Policy::subset). It is for the first snapshot of a service, before requests are let in, and may take
    /// milliseconds; later tables are laid out while the one before serves. Other policies have nothing to prepare.
    pub fn prepare(&self, endpoints: &Endpoints) {
        let request = Request::new(());
        let shared = &*self.shared;
        let asked = Asked::of(&request);
        let choice = shared.choice(&shared.policy, &asked, &[]);
        shared.viewed(endpoints, &choice).subset(endpoints, &choice).prepare(endpoints, &choice);
    }

    fn change(&mut self) -> &mut Shared<P> {
        let shared = Arc::make_mut(&mut self.shared);
        // What was derived under other settings is not to be found.
        shared.key = SlotKey::new();
        shared
    }
}

impl<P> Clone for BalanceLayer<P> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone() }
    }
}

impl<P> fmt::Debug for BalanceLayer<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BalanceLayer").field("policy", &self.shared.policy).finish_non_exhaustive()
    }
}

impl<S, P> Layer<S> for BalanceLayer<P> {
    type Service = Balance<S, P>;

    fn layer(&self, inner: S) -> Balance<S, P> {
        Balance { inner, shared: self.shared.clone() }
    }
}

impl<P> Clone for Shared<P> {
    fn clone(&self) -> Self {
        Self {
            pick: self.pick.clone(),
            shape: self.shape.clone(),
            policy: self.policy.clone(),
            budget: self.budget.clone(),
            wait: self.wait,
            waiting: self.waiting.clone(),
            leaves_served: self.leaves_served,
            classify: self.classify.clone(),
            clock: self.clock.clone(),
            wall: self.wall.clone(),
            key: self.key.clone(),
        }
    }
}

impl<P: Pick> Shared<P> {
    fn choose<'a>(
        &'a self,
        endpoints: &Endpoints,
        policy: &'a Policy,
        mut asked: Asked<'a>,
        tried: &[Failed],
    ) -> Result<Chosen, Nobody> {
        asked.hash_key = policy.hash_key.as_ref();
        let choice = self.choice(policy, &asked, tried);
        if let Some(prefer) = asked.extensions.get::<Prefer>() {
            let ids = || (0..).zip(endpoints.iter()).map(|(i, endpoint)| (endpoint.id().clone(), i)).collect();
            let position = endpoints.slot(&IDS, ids).get(&prefer.id);
            let chosen = position.and_then(|i| choice.enter(endpoints.get(*i as usize)?));
            match chosen {
                Some(chosen) => return Ok(chosen),
                None if prefer.strict => return Err(Nobody::Preferred),
                None => {}
            }
        }
        let viewed = self.viewed(endpoints, &choice);
        let offered = viewed.subset(endpoints, &choice);
        if let Some(sticky) = &policy.sticky
            && let Some(token) = sticky.read(asked.headers)
            && let Some(i) = viewed.cookies(endpoints, sticky).get(&token)
            && let endpoint = &endpoints[*i as usize]
            && endpoint.weight() > 0
            && offered.holds(endpoint, &choice)
            && let Some(chosen) = choice.enter(endpoint)
        {
            return Ok(chosen);
        }
        offered.choose(endpoints, &choice)
    }

    #[inline]
    fn choice<'a>(&'a self, policy: &'a Policy, asked: &'a Asked<'a>, tried: &'a [Failed]) -> Choice<'a, P> {
        let terms = Terms { shape: &self.shape, subset: policy.subset.as_ref(), asked, tried, clock: &self.clock };
        Choice { pick: &*self.pick, terms }
    }

    #[inline]
    fn viewed<'a>(&self, endpoints: &'a Endpoints, choice: &Choice<'_, P>) -> &'a Viewed {
        endpoints.slot(&self.key, || Viewed::new(endpoints, &choice.within(None)))
    }
}

// === impl Balance ===

impl<S, P, B, R> Service<Request<B>> for Balance<S, P>
where
    S: Service<Request<Replay<B>>, Response = Response<R>> + Clone,
    P: Pick,
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
    R: http_body::Body<Data = Bytes>,
{
    type Response = Response<Body<R, Watch<P>>>;
    type Error = S::Error;
    type Future = ResponseFuture<S, P, B, R>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        if Endpoints::of(request.extensions()).is_none() {
            return ResponseFuture::passed_on(self.inner.call(request.map(Replay::new)));
        }
        let not_ready = self.inner.clone();
        let ready = std::mem::replace(&mut self.inner, not_ready);
        ResponseFuture::new(ready, self.shared.clone(), request)
    }
}

impl<S: Clone, P> Clone for Balance<S, P> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), shared: self.shared.clone() }
    }
}

impl<S: fmt::Debug, P> fmt::Debug for Balance<S, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Balance").field("inner", &self.inner).finish_non_exhaustive()
    }
}
