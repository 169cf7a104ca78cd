//! The policy: which of several endpoints gets the request.

use std::cell::{Cell, OnceCell};
use std::fmt;
use std::ops::Index;
use std::sync::Arc;
use std::time::Duration;

use http::{Extensions, HeaderMap, Method, Request, Uri};
use portcullis_core::{Endpoint, Endpoints, Moment, Outcome, SlotKey};

use crate::ahead;
use crate::group::Group;
use crate::hash_key::HashKey;
use crate::shape::Subset;
use crate::view::Terms;

/// Picks one endpoint for a request. One value serves all services of a layer, on all threads, without locks.
///
/// ```
/// use portcullis_balance::{BalanceLayer, Candidates, Pick};
///
/// /// The first that admits: the others are only there for when it fails.
/// struct First;
///
/// impl Pick for First {
///     fn pick(&self, among: &Candidates<'_>) -> Option<usize> {
///         (0..among.len()).find(|&i| among.usable(i))
///     }
/// }
///
/// let layer = BalanceLayer::new(First);
/// let layer = BalanceLayer::new(|among: &Candidates<'_>| Some(among.sample()));
/// ```
pub trait Pick: Send + Sync + 'static {
    /// Picks one of `among` by its index. There is always at least one.
    ///
    /// What is picked may turn out not to admit; then this is asked again, and at last the first that admits is taken.
    /// `None` leaves the choice to that at once.
    fn pick(&self, among: &Candidates<'_>) -> Option<usize>;

    /// Is told how a call went, when its response has ended, if it [wants](Self::observes) to be. By default not interested.
    fn observe(&self, endpoint: &Endpoint, call: &Call) {
        let _ = (endpoint, call);
    }

    /// Whether [`observe`](Self::observe) wants to be told. By default not: then it never is, and no clock is read for it.
    fn observes(&self) -> bool {
        false
    }

    /// Whether the choice hangs on the whole set, as hashing does. Then endpoints that do not admit are among the
    /// candidates too, and [`Candidates::usable`] tells. By default they are left out.
    fn wants_all(&self) -> bool {
        false
    }

    /// Works out, and waits for, what picks from `among` need and would otherwise get while the first of them go on, such as
    /// a table: see [`BalanceLayer::prepare`](crate::BalanceLayer::prepare). By default nothing.
    fn prepare(&self, among: &Candidates<'_>) {
        let _ = among;
    }

    /// Where among [priorities](portcullis_core::Instance::priority) the request falls, out of 2⁶⁴, for policies that send
    /// equal requests to the same endpoint. By default anywhere.
    fn point(&self, asked: Asked<'_>) -> Option<u64> {
        let _ = asked;
        None
    }
}

/// The endpoints to pick from, and the request they are for.
pub struct Candidates<'a> {
    endpoints: &'a Endpoints,
    group: &'a Group,
    panic: bool,
    terms: &'a Terms<'a>,
    now: OnceCell<Moment>,
    seed: Cell<u64>,
    skipped: Cell<[u32; SKIPPED]>,
    /// Some of them are not to be picked, as this request or this pick has found.
    fewer: Cell<bool>,
}

/// How many that turned out not to admit are remembered within one pick.
const SKIPPED: usize = 4;
const NOBODY: u32 = u32::MAX;
/// Of so many some are not at hand: other threads have written them since, or there are more than the nearest cache holds.
const MANY: usize = 64;

/// What a policy may look at of the request.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Asked<'a> {
    /// Its method.
    pub method: &'a Method,
    /// Its target.
    pub uri: &'a Uri,
    /// Its headers.
    pub headers: &'a HeaderMap,
    /// What layers above left in it.
    pub extensions: &'a Extensions,
    /// The one it is to be hashed by, if not by the policy's own.
    pub(crate) hash_key: Option<&'a HashKey>,
}

/// How a call went, for [`Pick::observe`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Call {
    /// From the attempt's beginning to the end of its response body. Zero if the caller stopped reading the body: how long
    /// it wanted to says nothing of the endpoint.
    pub latency: Duration,
    /// What the classifier said; [`Outcome::Ignored`] for a call that was given up, so that `latency` is only a lower
    /// bound.
    pub outcome: Outcome,
    /// How long the endpoint asked to be left alone, in `retry-after` or `grpc-retry-pushback-ms`.
    pub retry_after: Option<Duration>,
    /// When it ended.
    pub now: Moment,
}

// === impl Pick ===

impl<F> Pick for F
where
    F: Fn(&Candidates<'_>) -> Option<usize> + Send + Sync + 'static,
{
    fn pick(&self, among: &Candidates<'_>) -> Option<usize> {
        self(among)
    }
}

macro_rules! through_a_pointer {
    ($($pointer:ty $(, $of:ident)?;)*) => {$(
        impl $(<$of: Pick + ?Sized>)? Pick for $pointer {
            fn pick(&self, among: &Candidates<'_>) -> Option<usize> {
                (**self).pick(among)
            }

            fn observe(&self, endpoint: &Endpoint, call: &Call) {
                (**self).observe(endpoint, call);
            }

            fn observes(&self) -> bool {
                (**self).observes()
            }

            fn wants_all(&self) -> bool {
                (**self).wants_all()
            }

            fn prepare(&self, among: &Candidates<'_>) {
                (**self).prepare(among);
            }

            fn point(&self, asked: Asked<'_>) -> Option<u64> {
                (**self).point(asked)
            }
        }
    )*};
}

// Not every `Box`: one of a closure is a closure.
through_a_pointer! {
    Arc<P>, P;
    Box<dyn Pick>;
}

// === impl Call ===

impl Call {
    /// A call that ended `now`.
    #[must_use]
    pub const fn new(latency: Duration, outcome: Outcome, retry_after: Option<Duration>, now: Moment) -> Self {
        Self { latency, outcome, retry_after, now }
    }
}

// === impl Candidates ===

impl<'a> Candidates<'a> {
    pub(crate) fn new(endpoints: &'a Endpoints, group: &'a Group, panic: bool, terms: &'a Terms<'a>) -> Self {
        Self {
            endpoints,
            group,
            panic,
            terms,
            now: OnceCell::new(),
            seed: Cell::new(0),
            skipped: Cell::new([NOBODY; SKIPPED]),
            fewer: Cell::new(!terms.tried.is_empty()),
        }
    }

    /// How many there are; never zero.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "it never is")]
    #[inline]
    pub fn len(&self) -> usize {
        self.group.len(self.endpoints)
    }

    /// Its share relative to the others, never zero: the registry's weight, less while it starts up.
    #[must_use]
    pub fn weight(&self, index: usize) -> u32 {
        self.group.weight(index)
    }

    /// Its weight over the mean of all weights.
    #[must_use]
    pub fn relative_weight(&self, index: usize) -> f32 {
        self.group.relative_weight(index)
    }

    /// Whether weights differ.
    #[must_use]
    pub fn is_weighted(&self) -> bool {
        self.group.is_weighted()
    }

    /// Whether it may be picked: it has not failed this request already, and its gate would admit now or is not
    /// obeyed in a panic.
    ///
    /// Policies that do not [want all](Pick::wants_all) are offered only endpoints whose gates admitted when it was last
    /// looked, but also what has failed this request. They need ask this only of what they did not [sample](Self::sample),
    /// and only for a better choice: what is not usable is refused when it is picked.
    #[must_use]
    pub fn usable(&self, index: usize) -> bool {
        let endpoint = &self[index];
        let admits = || self.panic || endpoint.gate().peek(|| self.now()).is_ok();
        !self.terms.tried.iter().any(|failed| failed.endpoint == *endpoint) && !self.is_skipped(index) && admits()
    }

    /// Whether all are [usable](Self::usable), as far as is known without asking the gates.
    #[inline]
    pub(crate) fn all_usable(&self) -> bool {
        !self.fewer.get()
    }

    /// One at random, each as often as its weight says. When some have failed this request, one of the others, if one is
    /// [usable](Self::usable).
    #[must_use]
    #[inline]
    pub fn sample(&self) -> usize {
        if self.fewer.get()
            && let Some(i) = self.sample_usable(None)
        {
            return i;
        }
        let [one] = self.draw(|random| [self.group.sample(self.endpoints, random)], |_| {});
        one
    }

    /// What `look` makes of a random number. Among [`MANY`], what it will make of the next picks' is fetched meanwhile, together
    /// with what `beside` fetches by [position](Self::position).
    #[inline(always)]
    fn draw<const N: usize>(&self, look: impl Fn(u64) -> [usize; N], beside: impl Fn(usize)) -> [usize; N] {
        if self.len() < MANY || self.seed.get() != 0 {
            return look(self.random());
        }
        let drawn = ahead::draw();
        self.seed.set(drawn.now | 1);
        for index in look(drawn.later) {
            self.group.prefetch(self.endpoints, index);
        }
        for index in look(drawn.soon) {
            let position = self.position(index);
            self.at(position).prefetch();
            beside(position);
        }
        look(drawn.now)
    }

    #[cold]
    fn sample_usable(&self, than: Option<usize>) -> Option<usize> {
        const DRAWN: usize = 8;
        let fits = |i: &usize| Some(*i) != than && self.usable(*i);
        let drawn = (0..DRAWN).map(|_| self.group.sample(self.endpoints, self.random())).find(fits);
        let scored = || (0..self.len()).filter(fits).map(|i| (score(self.random(), self.weight(i)), i));
        drawn.or_else(|| scored().max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, i)| i))
    }

    /// The one that `point`, out of 2⁶⁴, falls on when weights share the line out.
    pub(crate) fn sample_at(&self, point: u64) -> usize {
        self.group.sample(self.endpoints, point)
    }

    /// One of the others at random, by weight. `None` when there are no others, or some have failed this request and no
    /// other is [usable](Self::usable).
    #[must_use]
    #[inline]
    pub fn sample_other(&self, than: usize) -> Option<usize> {
        if self.fewer.get() {
            return self.sample_usable(Some(than));
        }
        let others = self.len().checked_sub(1).filter(|others| *others > 0)?;
        if self.is_weighted() {
            for _ in 0..8 {
                let other = self.sample();
                if other != than {
                    return Some(other);
                }
            }
        }
        let other = self.random_below(others);
        Some(other + usize::from(other >= than))
    }

    /// One at random by weight, and one of the others, or the same once more when there is no other. When some have failed this
    /// request, of those that are [usable](Self::usable).
    #[inline(always)]
    pub(crate) fn sample_two(&self) -> [usize; 2] {
        /// Of so many two fit into a random number.
        const FITTING: usize = 1 << 30;
        let len = self.len();
        if self.fewer.get() || self.is_weighted() || !(2..=FITTING).contains(&len) {
            let one = self.sample();
            return [one, self.sample_other(one).unwrap_or(one)];
        }
        let look = |random: u64| {
            let (one, other) = (scale(random, len), scale(random.rotate_left(32), len - 1));
            [one, other + usize::from(other >= one)]
        };
        self.draw(look, |_| {})
    }

    /// One at random by weight, and two of the others, which may be the same; all the same when there is only one. When some
    /// have failed this request, of those that are [usable](Self::usable). `beside` fetches what else will be read of those
    /// of a later pick, by [position](Self::position).
    #[inline(always)]
    pub(crate) fn sample_three(&self, beside: impl Fn(usize)) -> [usize; 3] {
        /// Of so many three fit into a random number.
        const FITTING: usize = 1 << 20;
        let len = self.len();
        if self.fewer.get() || self.is_weighted() || !(2..=FITTING).contains(&len) {
            return self.sample_three_apart();
        }
        // Each of them by other bits, and none waits for the one before.
        let look = |random: u64| {
            let (one, first, second) =
                (scale(random, len), scale(random.rotate_left(21), len - 1), scale(random.rotate_left(42), len - 1));
            [one, first + usize::from(first >= one), second + usize::from(second >= one)]
        };
        self.draw(look, beside)
    }

    #[cold]
    fn sample_three_apart(&self) -> [usize; 3] {
        let one = self.sample();
        let other = || self.sample_other(one).unwrap_or(one);
        [one, other(), other()]
    }

    /// A number below `bound`, each as likely; zero for zero.
    #[must_use]
    #[inline]
    pub fn random_below(&self, bound: usize) -> usize {
        scale(self.random(), bound)
    }

    /// Sixty-four random bits.
    #[must_use]
    #[inline]
    pub fn random(&self) -> u64 {
        let seed = match self.seed.get() {
            // The first is as good as it comes.
            0 => {
                let first = fastrand::u64(..);
                self.seed.set(first | 1);
                return first;
            }
            seed => seed.wrapping_add(0x9e37_79b9_7f4a_7c15),
        };
        self.seed.set(seed);
        mix(seed)
    }

    /// The time, read once.
    #[must_use]
    pub fn now(&self) -> Moment {
        *self.now.get_or_init(|| self.terms.clock.now())
    }

    /// The request.
    #[must_use]
    pub fn asked(&self) -> Asked<'a> {
        *self.terms.asked
    }

    /// What the policy with this key derived from these candidates, derived when it is first asked for. It is dropped
    /// when membership, weights or gates change, unless the policy [wants all](Pick::wants_all): then only membership
    /// and weights count.
    pub fn derived<T: Send + Sync + 'static>(&self, key: &SlotKey<T>, derive: impl FnOnce() -> T) -> &'a T {
        self.group.slots().get_or_init(key, derive)
    }

    /// What the policy with this key derived from the whole snapshot, whatever its gates do, by
    /// [position](Self::position).
    pub(crate) fn of_all<T: Send + Sync + 'static>(
        &self,
        key: &SlotKey<T>,
        derive: impl FnOnce(&[Endpoint]) -> T,
    ) -> &'a T {
        self.endpoints.slot(key, || derive(self.endpoints))
    }

    /// The endpoint that stands there in the snapshot.
    #[inline]
    pub(crate) fn at(&self, position: usize) -> &'a Endpoint {
        &self.endpoints[position]
    }

    /// Where in the snapshot it stands.
    #[inline]
    pub(crate) fn position(&self, index: usize) -> usize {
        self.group.position(index)
    }

    /// Which of the service's endpoints they are taken from.
    pub(crate) fn subset(&self) -> Option<&'a Subset> {
        self.terms.subset
    }

    /// Requests in flight at those that are [usable](Self::usable), this one counted, for each unit of their weight;
    /// infinite when none is. Of more than 32 endpoints, estimated from 32.
    #[must_use]
    pub fn load_by_weight(&self) -> f64 {
        const LOOKED_AT: usize = 32;
        let (len, start) = (self.len(), self.random_below(self.len()));
        let stride = (len / LOOKED_AT).max(1);
        let (mut load, mut weight) = (0.0, 0.0);
        let looked_at = (0..len.min(LOOKED_AT)).map(|k| (start + k * stride) % len);
        for i in looked_at.filter(|i| self.usable(*i)) {
            load += f64::from(self[i].in_flight());
            weight += f64::from(self.weight(i));
        }
        let all = len as f64 / len.min(LOOKED_AT) as f64;
        (load * all + 1.0) / (weight * all)
    }

    pub(crate) fn skip(&self, index: usize) {
        let mut skipped = self.skipped.get();
        skipped.rotate_right(1);
        skipped[0] = u32::try_from(index).unwrap_or(NOBODY);
        self.skipped.set(skipped);
        self.fewer.set(true);
    }

    fn is_skipped(&self, index: usize) -> bool {
        self.skipped.get().iter().any(|skipped| *skipped as usize == index)
    }
}

/// # Panics
///
/// When the index is not below [`len`](Candidates::len).
impl Index<usize> for Candidates<'_> {
    type Output = Endpoint;

    #[inline]
    fn index(&self, index: usize) -> &Endpoint {
        &self.endpoints[self.position(index)]
    }
}

impl fmt::Debug for Candidates<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Candidates")
            .field("len", &self.len())
            .field("tried", &self.terms.tried.len())
            .finish_non_exhaustive()
    }
}

/// `random` brought below `bound`, without a division.
pub(crate) fn scale(random: u64, bound: usize) -> usize {
    ((u128::from(random) * bound as u128) >> 64) as usize
}

/// The finisher of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
pub(crate) const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A score of which the greatest of several is each one's as often as its weight says, given `random` numbers: -w / ln(u)
/// is greatest for i with probability w / Σw.
pub(crate) fn score(random: u64, weight: u32) -> f64 {
    let u = ((random >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
    -f64::from(weight) / u.ln()
}

// === impl Asked ===

impl<'a> Asked<'a> {
    /// The head of `request`.
    #[must_use]
    pub fn of<B>(request: &'a Request<B>) -> Self {
        Self {
            method: request.method(),
            uri: request.uri(),
            headers: request.headers(),
            extensions: request.extensions(),
            hash_key: None,
        }
    }

    pub(crate) fn of_parts(parts: &'a http::request::Parts) -> Self {
        let (method, uri, headers, extensions) = (&parts.method, &parts.uri, &parts.headers, &parts.extensions);
        Self { method, uri, headers, extensions, hash_key: None }
    }
}
