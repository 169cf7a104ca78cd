//! What is limited, and for which routes.

use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;

use crate::key::{Key, RequestHead};
use crate::rate::{Cell, Rate};

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

#[derive(Clone)]
struct Inner {
    name: Arc<str>,
    rate: Rate,
    cell: Cell,
    key: Option<Arc<dyn Key>>,
    cost: Option<Cost>,
    plan: Option<Plan>,
}

type Cost = Arc<dyn Fn(&RequestHead<'_>) -> u32 + Send + Sync>;
type Plan = Arc<dyn Fn(&RequestHead<'_>) -> Option<Rate> + Send + Sync>;

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
        Self(Arc::new(Inner { name: name.into(), rate, cell: rate.cell(), key: None, cost: None, plan: None }))
    }

    /// Tells callers apart by `key`, whatever the layer does.
    #[must_use]
    pub fn with_key(mut self, key: impl Key) -> Self {
        self.inner().key = Some(Arc::new(key));
        self
    }

    /// What a request costs; one, unless told otherwise. What costs nothing is not limited; what costs more than the burst
    /// is refused for good.
    #[must_use]
    pub fn cost(mut self, cost: impl Fn(&RequestHead<'_>) -> u32 + Send + Sync + 'static) -> Self {
        self.inner().cost = Some(Arc::new(cost));
        self
    }

    /// Finds the rate of a request's caller; this limit's own where there is none. A caller who changes plans keeps the
    /// debt.
    #[must_use]
    pub fn plan(mut self, plan: impl Fn(&RequestHead<'_>) -> Option<Rate> + Send + Sync + 'static) -> Self {
        self.inner().plan = Some(Arc::new(plan));
        self
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// How often.
    #[must_use]
    pub fn rate(&self) -> Rate {
        self.0.rate
    }

    /// The same limit with another rate.
    #[must_use]
    pub fn with_rate(mut self, rate: Rate) -> Self {
        let inner = self.inner();
        (inner.rate, inner.cell) = (rate, rate.cell());
        self
    }

    pub(crate) fn burst(self, burst: NonZeroU32) -> Self {
        let rate = self.rate().burst(burst);
        self.with_rate(rate)
    }

    pub(crate) fn shared_name(&self) -> &Arc<str> {
        &self.0.name
    }

    pub(crate) fn key(&self) -> Option<&dyn Key> {
        self.0.key.as_deref()
    }

    pub(crate) fn units(&self, request: &RequestHead<'_>) -> u32 {
        self.0.cost.as_ref().map_or(1, |cost| cost(request))
    }

    pub(crate) fn cell(&self, request: &RequestHead<'_>) -> (Cell, Rate) {
        match self.0.plan.as_ref().and_then(|plan| plan(request)) {
            Some(rate) => (rate.cell(), rate),
            None => (self.0.cell, self.0.rate),
        }
    }

    fn inner(&mut self) -> &mut Inner {
        Arc::make_mut(&mut self.0)
    }
}

impl fmt::Debug for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limit").field("name", &self.0.name).field("rate", &self.0.rate).finish_non_exhaustive()
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
