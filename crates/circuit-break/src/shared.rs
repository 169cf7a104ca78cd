//! What one layer and all its services share.

use std::any::Any;
use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::HeaderMap;
use portcullis_core::{
    Clock, Endpoint, Gate, Moment, Mover, Outcome, Pass, Permit, Refused, Report, SlotKey, WallClock, retry_after,
};

use crate::breaker::{Breaker, Call, Desk, State, Turn, Zeal};
use crate::handle::{Change, Mode, Scope};
use crate::rules::Rules;

pub(crate) struct Shared {
    pub(crate) parts: Parts,
    pub(crate) mover: Mover,
    slot: SlotKey<Guard>,
    /// What is guarded when the request says nothing else.
    pub(crate) whole: Arc<Alone>,
    /// What this layer's breakers now ration, so that they let go when the layer goes.
    rationed: Mutex<Vec<Target>>,
    listeners: tokio::sync::broadcast::Sender<Change>,
    /// The mode of all, and whether some were told one themselves.
    mode: AtomicU8,
    /// Closes the gates of what is forced open, which is in the list.
    hand: Mover,
    held: Mutex<Vec<Target>>,
}

type OnChange = dyn Fn(&Change) + Send + Sync;

/// What a layer is made of.
#[derive(Clone)]
pub(crate) struct Parts {
    pub(crate) rules: Rules,
    pub(crate) clock: Clock,
    pub(crate) wall: WallClock,
    pub(crate) on_change: Option<Arc<OnChange>>,
}

/// What is kept for one thing that is guarded, beside its gate.
#[derive(Debug)]
pub(crate) struct Guard {
    pub(crate) breaker: Breaker,
    /// [`NONE`], unless it was told one itself.
    mode: AtomicU8,
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
/// No mode.
const NONE: u8 = 0x7f;
/// Some breakers were told a mode themselves.
const SOME: u8 = 0x80;

// === impl Shared ===

impl Shared {
    pub(crate) fn new(parts: Parts) -> Self {
        Self {
            mover: Mover::new(),
            slot: SlotKey::new(),
            whole: Arc::new(Alone::new(&parts.rules, None)),
            parts,
            rationed: Mutex::default(),
            listeners: tokio::sync::broadcast::Sender::new(BEHIND),
            mode: AtomicU8::new(Mode::Normal.to_bits()),
            hand: Mover::new(),
            held: Mutex::default(),
        }
    }

    pub(crate) fn now(&self) -> Moment {
        self.parts.clock.now()
    }

    pub(crate) fn mode(&self) -> Mode {
        Mode::from_bits(self.mode.load(Ordering::Acquire) & !SOME).unwrap_or_default()
    }

    pub(crate) fn mode_of(&self, guard: &Guard) -> Mode {
        Mode::from_bits(guard.mode.load(Ordering::Acquire)).unwrap_or_else(|| self.mode())
    }

    /// Whether every breaker may do as it sees fit.
    fn is_normal(&self) -> bool {
        self.mode.load(Ordering::Acquire) == Mode::Normal.to_bits()
    }

    pub(crate) fn set_mode(&self, mode: Mode) {
        let keep_some = |bits| Some(bits & SOME | mode.to_bits());
        let _ = self.mode.fetch_update(Ordering::AcqRel, Ordering::Acquire, keep_some);
        tracing::info!(?mode, "circuit breakers were told a mode");
        let rationed = self.rationed().clone();
        rationed.iter().for_each(|target| self.obey(target));
    }

    pub(crate) fn set_mode_of(&self, target: &Target, mode: Option<Mode>) {
        self.mode.fetch_or(SOME, Ordering::AcqRel);
        self.guard(target).mode.store(mode.map_or(NONE, Mode::to_bits), Ordering::Release);
        tracing::info!(?mode, ?target, "a circuit breaker was told a mode");
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.retain(|other| !other.is(target));
        if mode == Some(Mode::ForcedOpen) {
            target.gate().close_for(self.hand);
            held.push(target.clone());
        } else {
            target.gate().forget(self.hand);
        }
        drop(held);
        self.obey(target);
    }

    /// Closes what must let everything pass. Whoever opens a breaker comes here after it is listed, and whoever sets a mode
    /// after it is set, so one of them sees both.
    fn obey(&self, target: &Target) {
        if self.mode_of(self.guard(target)).zeal() != Zeal::Acts {
            self.reset(target);
        }
    }

    fn rationed(&self) -> MutexGuard<'_, Vec<Target>> {
        self.rationed.lock().unwrap_or_else(PoisonError::into_inner)
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
        endpoint.slot(&self.slot, || Guard::new(&self.parts.rules))
    }

    /// Takes over the right that a permit gave, or asks the endpoint's gate. `None` for a call that does not count.
    pub(crate) fn adopt(self: &Arc<Self>, permit: &mut Permit) -> Result<Option<Watch>, Refused> {
        let pass = permit.take_pass();
        let endpoint = permit.endpoint();
        if !self.is_normal() && self.is_told(self.of_endpoint(endpoint))? {
            return Ok(None);
        }
        let started = self.start();
        let pass = match pass {
            Some(pass) if pass.is_forced() => return Ok(None),
            Some(pass) => pass,
            None => endpoint
                .pass(|| started.unwrap_or_else(|| self.now()))
                .inspect_err(|_| self.of_endpoint(endpoint).breaker.refuse())?,
        };
        Ok(Some(self.watch(None, pass, started)))
    }

    /// Asks the gate of what has a key, or else of the whole. `None` for a call that does not count.
    pub(crate) fn enter(self: &Arc<Self>, alone: Option<Arc<Alone>>) -> Result<Option<Watch>, Refused> {
        let asked = alone.as_ref().unwrap_or(&self.whole);
        if !self.is_normal() && self.is_told(&asked.guard)? {
            return Ok(None);
        }
        let started = self.start();
        let pass =
            asked.gate.pass(|| started.unwrap_or_else(|| self.now())).inspect_err(|_| asked.guard.breaker.refuse())?;
        Ok(Some(self.watch(alone, pass, started)))
    }

    /// Whether it was told to look away.
    #[cold]
    fn is_told(&self, guard: &Guard) -> Result<bool, Refused> {
        let mode = self.mode_of(guard);
        if mode == Mode::ForcedOpen {
            guard.breaker.refuse();
            return Err(Refused { until: Moment::MAX });
        }
        Ok(mode == Mode::Disabled)
    }

    /// When the call begins, if that matters.
    fn start(&self) -> Option<Moment> {
        self.parts.rules.time_calls().then(|| self.now())
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
        let turn = self.guard(target).breaker.reset(target.gate(), self.mover, self.now());
        if let Some(turn) = turn {
            self.turned(target, turn);
        }
    }

    /// Called without any lock of ours.
    #[cold]
    fn turned(&self, target: &Target, turn: Turn) {
        {
            let mut rationed = self.rationed();
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
            open_for: turn.until.map(|until| until.since(self.now())),
            enforced: turn.enforced,
        };
        match target {
            Target::Endpoint(endpoint) => tracing::info!(
                service = %endpoint.service(),
                endpoint = %endpoint.id(),
                address = %endpoint.address(),
                from = ?change.from, to = ?change.to, reason = ?change.reason, open_for = ?change.open_for,
                enforced = change.enforced,
                "circuit breaker changed"
            ),
            // A key may be a secret of the caller's.
            Target::Alone(alone) => tracing::info!(
                keyed = alone.key.is_some(),
                from = ?change.from, to = ?change.to, reason = ?change.reason, open_for = ?change.open_for,
                enforced = change.enforced,
                "circuit breaker changed"
            ),
        }
        if let Some(on_change) = &self.parts.on_change {
            on_change(&change);
        }
        // Nobody listening is no error.
        let _ = self.listeners.send(change);
        if turn.to == State::Open && turn.enforced && !self.is_normal() {
            self.obey(target);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let rationed = self.rationed.get_mut().unwrap_or_else(PoisonError::into_inner);
        rationed.iter().for_each(|target| target.gate().forget(self.mover));
        let held = self.held.get_mut().unwrap_or_else(PoisonError::into_inner);
        held.iter().for_each(|target| target.gate().forget(self.hand));
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("rules", &self.parts.rules).field("whole", &self.whole).finish_non_exhaustive()
    }
}

// === impl Parts ===

impl Default for Parts {
    fn default() -> Self {
        Self { rules: Rules::new(), clock: Clock::system(), wall: WallClock::system(), on_change: None }
    }
}

// === impl Guard ===

impl Guard {
    fn new(rules: &Rules) -> Self {
        Self { breaker: Breaker::new(rules), mode: AtomicU8::new(NONE) }
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
        self.took = self.started.map(|started| self.shared.now().since(started));
    }

    fn tell(&mut self, outcome: Outcome) {
        if std::mem::replace(&mut self.told, true) || self.pass.is_forced() {
            return;
        }
        let call = Call { entered: self.pass.generation(), outcome, took: self.took, asked: self.asked };
        let shared = &*self.shared;
        let (now, random) = (|| shared.now(), fastrand::f64);
        let guard = self.guard();
        let zeal = if shared.is_normal() { Zeal::Acts } else { shared.mode_of(guard).zeal() };
        let desk = Desk { rules: &shared.parts.rules, gate: self.pass.gate(), mover: shared.mover, zeal };
        let turn = guard.breaker.record(desk, call, now, random);
        if let Some(turn) = turn {
            shared.turned(&self.target(), turn);
        }
    }
}

impl Report for Watch {
    fn failing(&mut self, headers: &HeaderMap) {
        self.asked = retry_after(headers, || self.shared.parts.wall.since_epoch());
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
