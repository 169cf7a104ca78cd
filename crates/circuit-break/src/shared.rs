//! What one layer and all its services share.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use http::HeaderMap;
use portcullis_core::{
    Clock, Endpoint, Gate, Moment, Mover, Outcome, Pass, Refused, Report, SlotKey, WallClock, retry_after,
};

use crate::breaker::{Breaker, Call, State, Turn};
use crate::handle::{Change, Scope};
use crate::rules::Rules;

pub(crate) struct Shared {
    pub(crate) rules: Rules,
    pub(crate) clock: Clock,
    pub(crate) wall: WallClock,
    pub(crate) mover: Mover,
    slot: SlotKey<Guard>,
    /// What is guarded when the request says nothing else.
    pub(crate) whole: Arc<Alone>,
    /// What this layer's breakers now ration, so that they let go when the layer goes.
    rationed: Mutex<Vec<Target>>,
    listeners: tokio::sync::broadcast::Sender<Change>,
}

/// What is kept for one thing that is guarded, beside its gate.
#[derive(Debug)]
pub(crate) struct Guard {
    pub(crate) breaker: Breaker,
}

/// Something guarded that is not an endpoint, and so needs a gate of its own.
pub(crate) struct Alone {
    gate: Arc<Gate>,
    guard: Guard,
    pub(crate) key: Option<Box<dyn Any + Send + Sync>>,
}

/// Something guarded.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    Endpoint(Endpoint),
    Alone(Arc<Alone>),
}

/// Sees one call to its end, or to its being dropped, and tells the breaker.
pub struct Watch {
    shared: Arc<Shared>,
    /// What has a key; without one the pass is for an endpoint, or for the whole.
    alone: Option<Arc<Alone>>,
    pass: Pass,
    started: Option<Moment>,
    took: Option<Duration>,
    asked: Option<Duration>,
    told: bool,
}

/// How many changes a listener may be behind before it misses some.
const BEHIND: usize = 64;

// === impl Shared ===

impl Shared {
    pub(crate) fn new(rules: Rules, clock: Clock, wall: WallClock) -> Self {
        Self {
            rules,
            clock,
            wall,
            mover: Mover::new(),
            slot: SlotKey::new(),
            whole: Arc::new(Alone::new(&rules, None)),
            rationed: Mutex::default(),
            listeners: tokio::sync::broadcast::Sender::new(BEHIND),
        }
    }

    pub(crate) fn listen(&self) -> tokio::sync::broadcast::Receiver<Change> {
        self.listeners.subscribe()
    }

    pub(crate) fn guard<'a>(&self, target: &'a Target) -> &'a Guard {
        match target {
            Target::Endpoint(endpoint) => self.of_endpoint(endpoint),
            Target::Alone(alone) => &alone.guard,
        }
    }

    fn of_endpoint<'a>(&self, endpoint: &'a Endpoint) -> &'a Guard {
        endpoint.slot(&self.slot, || Guard::new(&self.rules))
    }

    /// Takes over the right that a permit gave, or asks the endpoint's gate.
    pub(crate) fn adopt(
        self: &Arc<Self>,
        endpoint: &Endpoint,
        pass: Option<Pass>,
        started: Option<Moment>,
    ) -> Result<Watch, Refused> {
        let pass = match pass {
            Some(pass) => pass,
            None => endpoint.pass(|| started.unwrap_or_else(|| self.clock.now())).inspect_err(|_| {
                self.of_endpoint(endpoint).breaker.refuse();
            })?,
        };
        Ok(self.watch(None, pass, started))
    }

    /// Asks the gate of what has a key, or else of the whole.
    pub(crate) fn enter(
        self: &Arc<Self>,
        alone: Option<Arc<Alone>>,
        started: Option<Moment>,
    ) -> Result<Watch, Refused> {
        let asked = alone.as_ref().unwrap_or(&self.whole);
        let pass = asked.gate.pass(|| started.unwrap_or_else(|| self.clock.now())).inspect_err(|_| {
            asked.guard.breaker.refuse();
        })?;
        Ok(self.watch(alone, pass, started))
    }

    fn watch(self: &Arc<Self>, alone: Option<Arc<Alone>>, pass: Pass, started: Option<Moment>) -> Watch {
        let watch = Watch { shared: self.clone(), alone, pass, started, took: None, asked: None, told: false };
        if watch.pass.is_rationed()
            && let Some(turn) = watch.guard().breaker.probe(watch.pass.generation())
        {
            self.turned(&watch.target(), turn);
        }
        watch
    }

    pub(crate) fn reset(&self, target: &Target) {
        let turn = self.guard(target).breaker.reset(target.gate(), self.mover, self.clock.now());
        if let Some(turn) = turn {
            self.turned(target, turn);
        }
    }

    /// Called without any lock of ours.
    #[cold]
    fn turned(&self, target: &Target, turn: Turn) {
        {
            let mut rationed = self.rationed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            // Looked up rather than believed: of two who turned, the second may come here first.
            rationed.retain(|other| !other.is(target) && self.guard(other).breaker.state() != State::Closed);
            if self.guard(target).breaker.state() != State::Closed {
                rationed.push(target.clone());
            }
        }
        let change = Change {
            scope: target.scope(),
            from: turn.from,
            to: turn.to,
            reason: turn.reason,
            open_for: turn.until.map(|until| until.since(self.clock.now())),
        };
        match target {
            Target::Endpoint(endpoint) => tracing::info!(
                service = %endpoint.service(),
                endpoint = %endpoint.id(),
                address = %endpoint.address(),
                from = ?change.from, to = ?change.to, reason = ?change.reason, open_for = ?change.open_for,
                "circuit breaker changed"
            ),
            // A key may be a secret of the caller's.
            Target::Alone(alone) => tracing::info!(
                keyed = alone.key.is_some(),
                from = ?change.from, to = ?change.to, reason = ?change.reason, open_for = ?change.open_for,
                "circuit breaker changed"
            ),
        }
        // Nobody listening is no error.
        let _ = self.listeners.send(change);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let rationed = self.rationed.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        for target in rationed {
            target.gate().forget(self.mover);
        }
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("rules", &self.rules).field("whole", &self.whole).finish_non_exhaustive()
    }
}

// === impl Guard ===

impl Guard {
    fn new(rules: &Rules) -> Self {
        Self { breaker: Breaker::new(rules) }
    }
}

// === impl Alone ===

impl Alone {
    pub(crate) fn new(rules: &Rules, key: Option<Box<dyn Any + Send + Sync>>) -> Self {
        Self { gate: Arc::new(Gate::new()), guard: Guard::new(rules), key }
    }
}

impl fmt::Debug for Alone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Alone").field("gate", &self.gate).field("guard", &self.guard).finish_non_exhaustive()
    }
}

// === impl Target ===

impl Target {
    pub(crate) fn gate(&self) -> &Gate {
        match self {
            Self::Endpoint(endpoint) => endpoint.gate(),
            Self::Alone(alone) => &alone.gate,
        }
    }

    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Endpoint(a), Self::Endpoint(b)) => a == b,
            (Self::Alone(a), Self::Alone(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }

    fn scope(&self) -> Scope {
        match self {
            Self::Endpoint(endpoint) => Scope::endpoint(endpoint.clone()),
            Self::Alone(alone) => Scope::alone(alone.clone()),
        }
    }
}

// === impl Watch ===

impl Watch {
    fn guard(&self) -> &Guard {
        match (&self.alone, self.pass.endpoint()) {
            (Some(alone), _) => &alone.guard,
            (None, Some(endpoint)) => self.shared.of_endpoint(endpoint),
            (None, None) => &self.shared.whole.guard,
        }
    }

    fn target(&self) -> Target {
        match (&self.alone, self.pass.endpoint()) {
            (Some(alone), _) => Target::Alone(alone.clone()),
            (None, Some(endpoint)) => Target::Endpoint(endpoint.clone()),
            (None, None) => Target::Alone(self.shared.whole.clone()),
        }
    }

    /// The head of the response is here.
    pub(crate) fn answered(&mut self) {
        self.took = self.started.map(|started| self.shared.clock.now().since(started));
    }

    fn tell(&mut self, outcome: Outcome) {
        if std::mem::replace(&mut self.told, true) || self.pass.is_forced() {
            return;
        }
        let call = Call { entered: self.pass.generation(), outcome, took: self.took, asked: self.asked };
        let shared = &*self.shared;
        let (now, random) = (|| shared.clock.now(), fastrand::f64);
        let turn = self.guard().breaker.record(&shared.rules, self.pass.gate(), shared.mover, call, now, random);
        if let Some(turn) = turn {
            shared.turned(&self.target(), turn);
        }
    }
}

impl Report for Watch {
    fn failing(&mut self, headers: &HeaderMap) {
        self.asked = retry_after(headers, || self.shared.wall.since_epoch());
    }

    fn report(mut self, outcome: Outcome) {
        self.tell(outcome);
    }
}

/// Dropped untold, the caller went away.
impl Drop for Watch {
    fn drop(&mut self) {
        self.tell(Outcome::Ignored);
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("pass", &self.pass).field("told", &self.told).finish_non_exhaustive()
    }
}
