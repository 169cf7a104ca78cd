//! What is limited, and for which routes.

use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;

use siphasher::sip::SipHasher13;

use crate::held::Settlement;
use crate::key::{Key, RequestHead};
use crate::rate::{Cell, Rate};
use crate::table::Span;

/// One limit: how often, for whom, and what a request costs.
///
/// ```
/// use std::num::NonZeroU32;
/// use portcullis_rate_limit::{Everyone, Limit, Rate};
///
/// let per_caller = Limit::new("caller", Rate::per_second(NonZeroU32::new(10).unwrap()));
/// let global = Limit::new("all", Rate::per_second(NonZeroU32::new(1000).unwrap())).with_key(Everyone);
/// # let _ = (per_caller, global);
/// ```
#[derive(Clone)]
pub struct Limit(Arc<Inner>);

/// How much of the burst a request leaves to more important ones. Under pressure the least important are refused first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Priority(u8);

#[derive(Clone)]
struct Inner {
    name: Arc<str>,
    /// The name as keys begin with it, even; odd for the counters of a route.
    prefix: u64,
    quantity: Quantity,
    /// Where its counters lie; kept when the rate changes, and so are they.
    span: Span,
    key: Option<Arc<dyn Key>>,
    cost: Option<Of<u32>>,
    plan: Option<Of<Option<Rate>>>,
    priority: Option<Of<Priority>>,
    settle: Option<Settle>,
    shadow: bool,
}

/// What a limit counts.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Quantity {
    /// So often.
    Rate(Rate, Cell),
    /// So many at the same time.
    Concurrent(NonZeroU32),
}

/// What a limit is asked for one request.
#[derive(Clone, Copy)]
pub(crate) enum What {
    /// So many units of a rate, no further ahead than a window in nanoseconds.
    Charge {
        rate: Rate,
        cell: Cell,
        units: u32,
        window: u64,
    },
    Place {
        max: u32,
    },
}

type Of<T> = Arc<dyn Fn(&RequestHead<'_>) -> T + Send + Sync>;
pub(crate) type Settle = Arc<dyn Fn(&Settlement<'_>) -> u32 + Send + Sync>;

/// The limits of one route, instead of the layer's: put it into its `Route`. Each route counts by itself, also where two
/// share one policy.
///
/// ```
/// use std::num::NonZeroU32;
/// use portcullis_core::Route;
/// use portcullis_rate_limit::{Policy, Rate};
///
/// let expensive = Route::new("/reports").with_policy(Policy::new(Rate::per_minute(NonZeroU32::new(5).unwrap())));
/// let open = Route::new("/health").with_policy(Policy::unlimited());
/// # let _ = (expensive, open);
/// ```
#[derive(Clone, Debug)]
pub struct Policy {
    limits: Vec<Limit>,
    beside_default: bool,
}

// === impl Limit ===

impl Limit {
    /// As often as `rate` says, for each caller as the layer tells them apart. The name is shown to callers, and tells
    /// this limit's counters from those of others.
    #[must_use]
    pub fn new(name: impl Into<Arc<str>>, rate: Rate) -> Self {
        Self::of(name.into(), Quantity::rate(rate))
    }

    /// So many requests of each caller at the same time, each until its response's body has ended or was dropped: a
    /// connection that was upgraded no longer counts once its response is out. Further ones get 429 `too-many-at-once`,
    /// without `Retry-After`.
    ///
    /// Callers are counted in two rows of as many counters as the [capacity](crate::RateLimitLayer::capacity) has keys. With n
    /// requests in flight, one in about (capacity / n)² callers meets others in both rows, and may be refused because of
    /// them; nobody ever has more than `max`.
    #[must_use]
    pub fn concurrent(name: impl Into<Arc<str>>, max: NonZeroU32) -> Self {
        Self::of(name.into(), Quantity::Concurrent(max))
    }

    /// Tells callers apart by `key`, whatever the layer does.
    #[must_use]
    pub fn with_key(mut self, key: impl Key) -> Self {
        self.inner().key = Some(Arc::new(key));
        self
    }

    /// What a request costs; one, unless told otherwise. What costs nothing is not limited; what costs more than the burst
    /// is refused for good. A concurrency limit counts requests, whatever they cost.
    #[must_use]
    pub fn cost(mut self, cost: impl Fn(&RequestHead<'_>) -> u32 + Send + Sync + 'static) -> Self {
        self.inner().cost = Some(Arc::new(cost));
        self
    }

    /// What a request turned out to have cost, once its response has ended: bytes, tokens, nothing for a failure. The
    /// difference to its [cost](Self::cost) before is charged, as debt if need be, or given back. What would have come
    /// back by itself meanwhile is not given back a second time, so that no window sees more than it should.
    ///
    /// A request without a response keeps its cost. Where the table is full and a caller shares a bucket with others, the
    /// debt on it goes no further than one window, so that others do not wait longer for what one of them cost.
    #[must_use]
    pub fn settle(mut self, settle: impl Fn(&Settlement<'_>) -> u32 + Send + Sync + 'static) -> Self {
        self.inner().settle = Some(Arc::new(settle));
        self
    }

    /// Finds the rate of a request's caller; this limit's own where there is none. A caller who changes plans keeps the
    /// debt. All plans count where the limit's own rate does: give it a window of about their length, else the debts of
    /// strangers with longer ones can [hold others up](crate::RateLimitLayer::capacity). A concurrency limit has no plans.
    #[must_use]
    pub fn plan(mut self, plan: impl Fn(&RequestHead<'_>) -> Option<Rate> + Send + Sync + 'static) -> Self {
        self.inner().plan = Some(Arc::new(plan));
        self
    }

    /// How important a request is; [`Priority::CRITICAL`] unless told otherwise.
    #[must_use]
    pub fn priority(mut self, priority: impl Fn(&RequestHead<'_>) -> Priority + Send + Sync + 'static) -> Self {
        self.inner().priority = Some(Arc::new(priority));
        self
    }

    /// Counts what it would refuse, and refuses nothing.
    #[must_use]
    pub fn shadow(mut self) -> Self {
        self.inner().shadow = true;
        self
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// How often; `None` for a concurrency limit.
    #[must_use]
    pub fn rate(&self) -> Option<Rate> {
        match self.0.quantity {
            Quantity::Rate(rate, _) => Some(rate),
            Quantity::Concurrent(_) => None,
        }
    }

    /// The same limit with another rate; a concurrency limit stays what it is.
    #[must_use]
    pub fn with_rate(mut self, rate: Rate) -> Self {
        self.set_rate(rate);
        self.inner().span = self.0.quantity.span();
        self
    }

    fn of(name: Arc<str>, quantity: Quantity) -> Self {
        let (key, cost, plan, priority, settle) = (None, None, None, None, None);
        let span = quantity.span();
        let prefix = SipHasher13::new().hash(name.as_bytes()) & !1;
        Self(Arc::new(Inner { name, prefix, quantity, span, key, cost, plan, priority, settle, shadow: false }))
    }

    pub(crate) fn span(&self) -> Span {
        self.0.span
    }

    /// Keeps its counters where `other` of the same name has them.
    pub(crate) fn counting_as(mut self, other: &Self) -> Self {
        self.inner().span = other.0.span;
        self
    }

    /// Another rate, counted where the one before was. Whether it has a rate at all.
    pub(crate) fn set_rate(&mut self, rate: Rate) -> bool {
        let has_one = self.rate().is_some();
        if has_one {
            self.inner().quantity = Quantity::rate(rate);
        }
        has_one
    }

    pub(crate) fn burst(self, burst: NonZeroU32) -> Self {
        match self.rate() {
            Some(rate) => self.with_rate(rate.burst(burst)),
            None => self,
        }
    }

    pub(crate) fn prefix(&self) -> u64 {
        self.0.prefix
    }

    pub(crate) fn shared_name(&self) -> &Arc<str> {
        &self.0.name
    }

    pub(crate) fn key(&self) -> Option<&dyn Key> {
        self.0.key.as_deref()
    }

    fn units(&self, request: &RequestHead<'_>) -> u32 {
        self.0.cost.as_ref().map_or(1, |cost| cost(request))
    }

    pub(crate) fn quantity(&self, request: &RequestHead<'_>) -> Quantity {
        match (self.0.quantity, &self.0.plan) {
            (Quantity::Rate(..), Some(plan)) => plan(request).map_or(self.0.quantity, Quantity::rate),
            (quantity, _) => quantity,
        }
    }

    /// What a request is charged, or the place it needs; nothing if it costs nothing.
    #[inline]
    pub(crate) fn what(&self, request: &RequestHead<'_>) -> Option<What> {
        match self.quantity(request) {
            Quantity::Concurrent(max) => Some(What::Place { max: max.get() }),
            Quantity::Rate(rate, cell) => {
                let units = self.units(request);
                (units > 0).then(|| What::Charge { rate, cell, units, window: self.window(cell, request) })
            }
        }
    }

    /// How far ahead this request may go, of the window of a cell.
    fn window(&self, cell: Cell, request: &RequestHead<'_>) -> u64 {
        match &self.0.priority {
            Some(priority) => priority(request).of(cell),
            None => cell.window,
        }
    }

    pub(crate) fn settlement(&self) -> Option<&Settle> {
        self.0.settle.as_ref()
    }

    pub(crate) fn is_shadow(&self) -> bool {
        self.0.shadow
    }

    fn inner(&mut self) -> &mut Inner {
        Arc::make_mut(&mut self.0)
    }
}

impl fmt::Debug for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limit").field("name", &self.0.name).field("counts", &self.0.quantity).finish_non_exhaustive()
    }
}

// === impl Quantity ===

impl Quantity {
    fn rate(rate: Rate) -> Self {
        Self::Rate(rate, rate.cell())
    }

    fn span(self) -> Span {
        match self {
            Self::Rate(_, cell) => Span::of(cell.window),
            Self::Concurrent(_) => Span::default(),
        }
    }
}

// === impl Priority ===

impl Priority {
    /// Leaves nothing to others.
    pub const CRITICAL: Self = Self(0);
    /// Leaves a fifth to critical requests.
    pub const NORMAL: Self = Self(20);
    /// Leaves half.
    pub const LOW: Self = Self(50);

    /// Leaves so much of the burst, at most a hundred percent. Whatever it is, one unit can be had after a long rest.
    #[must_use]
    pub const fn leaving(percent: u8) -> Self {
        Self(if percent > 100 { 100 } else { percent })
    }

    fn of(self, cell: Cell) -> u64 {
        let left = u128::from(cell.window) * u128::from(100 - self.0) / 100;
        u64::try_from(left).unwrap_or(u64::MAX).max(cell.interval)
    }
}

// === impl Policy ===

impl Policy {
    /// This rate, for each caller as the layer tells them apart.
    #[must_use]
    pub fn new(rate: Rate) -> Self {
        Self::limits([Limit::new("route", rate)])
    }

    /// These limits, all of which must admit a request.
    #[must_use]
    pub fn limits(limits: impl IntoIterator<Item = Limit>) -> Self {
        Self { limits: limits.into_iter().collect(), beside_default: false }
    }

    /// No limit at all.
    #[must_use]
    pub fn unlimited() -> Self {
        Self::limits([])
    }

    /// Adds a limit.
    #[must_use]
    pub fn and(mut self, limit: Limit) -> Self {
        self.limits.push(limit);
        self
    }

    /// Counts against the layer's limits as well, instead of replacing them.
    #[must_use]
    pub fn beside_default(mut self) -> Self {
        self.beside_default = true;
        self
    }

    pub(crate) fn own(&self) -> &[Limit] {
        &self.limits
    }

    pub(crate) fn is_beside_default(&self) -> bool {
        self.beside_default
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_counts_among_those_of_its_window_and_stays_there_while_it_is_in_use() {
        let second = Rate::per_second(NonZeroU32::MIN);
        let day = second.burst(NonZeroU32::new(86_400).unwrap());
        let span = |limit: &Limit| limit.span();
        let mut limit = Limit::new("a", second);
        assert_eq!(span(&limit), Span::of(1_000_000_000));
        assert!(limit.set_rate(day));
        assert_eq!(span(&limit), Span::of(1_000_000_000), "its counters are there");
        assert_eq!(span(&limit.clone().with_rate(day)), Span::of(86_400_000_000_000));
        assert_eq!(span(&limit.burst(NonZeroU32::new(86_400).unwrap())), Span::of(86_400_000_000_000));
    }

    #[test]
    fn a_concurrency_limit_has_no_rate() {
        let mut limit = Limit::concurrent("a", NonZeroU32::MIN);
        assert!(!limit.set_rate(Rate::per_second(NonZeroU32::MIN)));
        assert!(limit.with_rate(Rate::per_second(NonZeroU32::MIN)).rate().is_none());
    }
}
