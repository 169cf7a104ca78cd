//! Looks into the breakers of a layer, and moves them by hand.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use portcullis_core::Endpoint;

use crate::breaker::{Reason, State, Zeal};
use crate::shared::{Alone, Shared, Target};

/// Looks into the breakers of one [`CircuitBreakLayer`](crate::CircuitBreakLayer), and moves them by hand.
#[derive(Clone, Debug)]
pub struct Handle(pub(crate) Arc<Shared>);

/// One breaker, as a handle sees it.
#[derive(Clone, Debug)]
pub struct Breaker {
    pub(crate) shared: Arc<Shared>,
    pub(crate) target: Target,
}

/// What breakers are allowed to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Mode {
    /// Open and close by what they see.
    #[default]
    Normal,
    /// Refuse every request, until told otherwise.
    ForcedOpen,
    /// Let every request pass. They count, but open never.
    ForcedClosed,
    /// As if they were not there: they count nothing.
    Disabled,
    /// Let every request pass, and tell when they would have opened: see [`Change::enforced`].
    MetricsOnly,
}

/// A breaker changed its state.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Change {
    /// Which one.
    pub scope: Guarding,
    /// What it was.
    pub from: State,
    /// What it is.
    pub to: State,
    /// Why.
    pub reason: Reason,
    /// How long it stays open, if it opened.
    pub open_for: Option<Duration>,
    /// Whether it did. If not it would have, but only [counts](Mode::MetricsOnly).
    pub enforced: bool,
}

/// What a breaker guards.
#[derive(Clone)]
pub struct Guarding(Target);

/// The changes of all breakers of a layer, from now on.
#[derive(Debug)]
pub struct Changes(tokio::sync::broadcast::Receiver<Change>);

/// What a breaker counted since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Calls that failed.
    pub failed: u64,
    /// Calls that said nothing about what is guarded, such as those the caller broke off.
    pub ignored: u64,
    /// Requests refused by this layer. What a balancer avoids is not among them.
    pub refused: u64,
}

/// Shares in a window, as they are now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rates {
    /// Calls in the window.
    pub calls: u32,
    /// Those that failed.
    pub failed: u32,
    /// Those that were slow.
    pub slow: u32,
}

// === impl Handle ===

impl Handle {
    /// The breaker of requests that carry no permit: of the whole service behind the layer.
    #[must_use]
    pub fn whole(&self) -> Breaker {
        Breaker { shared: self.0.clone(), target: Target::Alone(self.0.whole.clone()) }
    }

    /// The breaker of one endpoint.
    #[must_use]
    pub fn endpoint(&self, endpoint: &Endpoint) -> Breaker {
        Breaker { shared: self.0.clone(), target: Target::Endpoint(endpoint.clone()) }
    }

    /// What all breakers may do that have not been told otherwise themselves.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.0.mode()
    }

    /// Says what all breakers may do that have not been told otherwise themselves. Where they must let everything pass, those
    /// that were open close at once; those of keys at their next request.
    pub fn set_mode(&self, mode: Mode) {
        self.0.set_mode(mode);
    }

    /// The changes of all breakers of this layer, from now on.
    #[must_use]
    pub fn changes(&self) -> Changes {
        Changes(self.0.listen())
    }
}

// === impl Breaker ===

impl Breaker {
    /// What it does with requests, unless its [mode](Self::mode) says otherwise.
    #[must_use]
    pub fn state(&self) -> State {
        self.shared.guarded(&self.target).breaker.state()
    }

    /// How long until it lets a probe pass, if it is open; zero when the next request will be one.
    #[must_use]
    pub fn open_for(&self) -> Option<Duration> {
        Some(self.shared.guarded(&self.target).breaker.until()?.since(self.shared.now()))
    }

    /// How many calls failed since the last that succeeded; not known unless it is closed.
    #[must_use]
    pub fn failures_in_a_row(&self) -> Option<u16> {
        let breaker = &self.shared.guarded(&self.target).breaker;
        (breaker.state() == State::Closed).then(|| breaker.count())
    }

    /// What it counted since it was made.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let breaker = &self.shared.guarded(&self.target).breaker;
        Counts { failed: breaker.failed(), ignored: breaker.ignored(), refused: breaker.refused() }
    }

    /// The shares in its window of calls, if it has one.
    #[must_use]
    pub fn call_rates(&self) -> Option<Rates> {
        self.shared.guarded(&self.target).breaker.call_sum().map(Rates::of)
    }

    /// The shares in its window of time, if it has one.
    #[must_use]
    pub fn time_rates(&self) -> Option<Rates> {
        self.shared.guarded(&self.target).breaker.time_sum(self.shared.now()).map(Rates::of)
    }

    /// What it may do: what it was told itself, else what all were.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.shared.mode_of(self.shared.guarded(&self.target))
    }

    /// Says what it may do; `None` for whatever all may. While it is forced open, its endpoint's gate refuses, so that
    /// balancers know. A breaker that must let everything pass closes at once.
    pub fn set_mode(&self, mode: Option<Mode>) {
        self.shared.set_mode_of(&self.target, mode);
    }

    /// Closes it and forgets what it saw.
    pub fn reset(&self) {
        self.shared.reset(&self.target);
    }
}

// === impl Mode ===

impl Mode {
    /// Every mode, by its bits.
    const ALL: [Self; 5] = [Self::Normal, Self::ForcedOpen, Self::ForcedClosed, Self::Disabled, Self::MetricsOnly];

    pub(crate) const fn to_bits(self) -> u8 {
        self as u8
    }

    /// The mode with these bits, if there is one.
    pub(crate) fn from_bits(bits: u8) -> Option<Self> {
        Self::ALL.get(usize::from(bits)).copied()
    }

    pub(crate) const fn zeal(self) -> Zeal {
        match self {
            Self::Normal | Self::ForcedOpen => Zeal::Acts,
            Self::MetricsOnly => Zeal::Speaks,
            Self::ForcedClosed | Self::Disabled => Zeal::Counts,
        }
    }
}

// === impl Guarding ===

impl Guarding {
    pub(crate) fn endpoint(endpoint: Endpoint) -> Self {
        Self(Target::Endpoint(endpoint))
    }

    pub(crate) fn alone(alone: Arc<Alone>) -> Self {
        Self(Target::Alone(alone))
    }

    /// The endpoint, if it guards one.
    #[must_use]
    pub fn as_endpoint(&self) -> Option<&Endpoint> {
        match &self.0 {
            Target::Endpoint(endpoint) => Some(endpoint),
            Target::Alone(_) => None,
        }
    }

    /// The key, if it guards what has this key and the key is of this type.
    #[must_use]
    pub fn as_key<T: Any>(&self) -> Option<&T> {
        match &self.0 {
            Target::Alone(alone) => alone.key(),
            Target::Endpoint(_) => None,
        }
    }

    /// Whether it guards the whole service behind the layer.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        matches!(&self.0, Target::Alone(alone) if !alone.has_key())
    }
}

/// A key is not shown: it may be a secret of the caller's.
impl fmt::Debug for Guarding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Target::Endpoint(endpoint) => f.debug_tuple("Endpoint").field(endpoint).finish(),
            Target::Alone(alone) => f.write_str(if alone.has_key() { "Key" } else { "Whole" }),
        }
    }
}

// === impl Changes ===

impl Changes {
    /// The next change; `None` when the layer, its services and their handles are gone. Who falls far behind misses the
    /// oldest, and of two at the same moment either may come first: what counts is what [`Breaker::state`] says.
    pub async fn next(&mut self) -> Option<Change> {
        loop {
            match self.0.recv().await {
                Ok(change) => return Some(change),
                Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => {}
                Err(tokio::sync::broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}

// === impl Rates ===

impl Rates {
    pub(crate) fn of(sum: crate::window::Sum) -> Self {
        Self { calls: sum.calls, failed: sum.failed, slow: sum.slow }
    }
}
