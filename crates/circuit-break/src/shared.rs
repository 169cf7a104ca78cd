//! What one layer and all its services share.

use std::any::Any;
use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use portcullis_core::{
    Clear, Clock, Endpoint, Endpoints, Gate, Moment, Mover, PerEndpoint, Refused, SlotKey, WallClock, WeakEndpoint,
};

use crate::breaker::{Breaker, Desk, State, Turn, Zeal};
use crate::handle::{Change, Guarding, Mode};
use crate::outlier::{Due, Outliers, Tally};
use crate::rules::Rules;

pub(crate) struct Shared {
    pub(crate) parts: Parts,
    pub(crate) mover: Mover,
    endpoints: PerEndpoint<Guarded>,
    due: SlotKey<Due>,
    /// What is guarded when the request says nothing else.
    pub(crate) whole: Arc<Alone>,
    /// The endpoints whose gates this layer's breakers have moved, so that they let go when the layer goes.
    moved: Mutex<Vec<WeakEndpoint>>,
    listeners: tokio::sync::broadcast::Sender<Change>,
    /// The mode of all, and whether some were told one themselves.
    mode: AtomicU8,
    /// Closes the gates of what is forced open.
    hand: Mover,
    /// What was told a mode itself.
    told: Mutex<Vec<Target>>,
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
pub(crate) struct Guarded {
    pub(crate) breaker: Breaker,
    /// What it did since outliers were last looked for: a [`Tally`].
    pub(crate) tally: AtomicU64,
    /// [`NONE`], unless it was told one itself.
    mode: AtomicU8,
}

/// Something guarded that is not an endpoint, and so needs a gate of its own.
pub(crate) struct Alone {
    pub(crate) gate: Gate,
    pub(crate) guarded: Guarded,
    key: Option<Box<dyn Any + Send + Sync>>,
    /// When it was last asked for, if it has a key.
    used: AtomicU64,
}

/// Something guarded.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    Endpoint(Endpoint),
    Alone(Arc<Alone>),
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
            endpoints: PerEndpoint::new(),
            due: SlotKey::new(),
            whole: Arc::new(Alone::new(&parts.rules, None)),
            parts,
            moved: Mutex::default(),
            listeners: tokio::sync::broadcast::Sender::new(BEHIND),
            mode: AtomicU8::new(Mode::Normal.to_bits()),
            hand: Mover::new(),
            told: Mutex::default(),
        }
    }

    pub(crate) fn now(&self) -> Moment {
        self.parts.clock.now()
    }

    pub(crate) fn mode(&self) -> Mode {
        Mode::from_bits(self.mode.load(Ordering::Acquire) & !SOME).unwrap_or_default()
    }

    pub(crate) fn mode_of(&self, guarded: &Guarded) -> Mode {
        Mode::from_bits(guarded.mode.load(Ordering::Acquire)).unwrap_or_else(|| self.mode())
    }

    /// Whether every breaker may do as it sees fit.
    pub(crate) fn is_normal(&self) -> bool {
        self.mode.load(Ordering::Acquire) == Mode::Normal.to_bits()
    }

    pub(crate) fn set_mode(&self, mode: Mode) {
        let keep_some = |bits| Some(bits & SOME | mode.to_bits());
        let _ = self.mode.fetch_update(Ordering::AcqRel, Ordering::Acquire, keep_some);
        tracing::info!(?mode, "circuit breakers were told a mode");
        let moved = self.moved().clone();
        let open = moved.iter().filter_map(WeakEndpoint::upgrade).filter(|endpoint| self.is_open(endpoint));
        open.for_each(|endpoint| self.obey(&Target::Endpoint(endpoint)));
        self.obey(&Target::Alone(self.whole.clone()));
    }

    pub(crate) fn set_mode_of(&self, target: &Target, mode: Option<Mode>) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        // With the list held, so that of two who say different things one has the last word on all of it.
        self.guarded(target).mode.store(mode.map_or(NONE, Mode::to_bits), Ordering::Release);
        told.retain(|other| !other.is(target) && !other.is_removed());
        if mode.is_some() {
            told.push(target.clone());
        }
        if mode == Some(Mode::ForcedOpen) {
            target.gate().hold_for(self.hand);
        } else {
            target.gate().forget(self.hand);
        }
        let some = if told.is_empty() { 0 } else { SOME };
        let set_some = |bits| Some(bits & !SOME | some);
        let _ = self.mode.fetch_update(Ordering::AcqRel, Ordering::Acquire, set_some);
        drop(told);
        tracing::info!(?mode, ?target, "a circuit breaker was told a mode");
        self.obey(target);
    }

    /// Closes what must let everything pass. Whoever opens a breaker comes here after it is listed, and whoever sets a mode
    /// after it is set, so one of them sees both.
    fn obey(&self, target: &Target) {
        if self.mode_of(self.guarded(target)).zeal() != Zeal::Acts {
            self.reset(target);
        }
    }

    fn moved(&self) -> MutexGuard<'_, Vec<WeakEndpoint>> {
        self.moved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_open(&self, endpoint: &Endpoint) -> bool {
        self.of_endpoint(endpoint).breaker.state() != State::Closed
    }

    pub(crate) fn listen(&self) -> tokio::sync::broadcast::Receiver<Change> {
        self.listeners.subscribe()
    }

    pub(crate) fn guarded<'a>(&'a self, target: &'a Target) -> &'a Guarded {
        match target {
            Target::Endpoint(endpoint) => self.of_endpoint(endpoint),
            Target::Alone(alone) => &alone.guarded,
        }
    }

    #[inline]
    pub(crate) fn of_endpoint<'a>(&'a self, endpoint: &'a Endpoint) -> &'a Guarded {
        self.endpoints.of(endpoint, || Guarded::new(&self.parts.rules))
    }

    /// Whether it was told to look away. What must let everything pass and is still open closes, which only those with a key
    /// are when they come here.
    #[cold]
    pub(crate) fn is_told(&self, target: &Target) -> Result<bool, Refused> {
        let guarded = self.guarded(target);
        let mode = self.mode_of(guarded);
        if mode == Mode::ForcedOpen {
            guarded.breaker.refuse();
            return Err(Refused { until: Moment::MAX });
        }
        if guarded.breaker.state() != State::Closed {
            self.obey(target);
        }
        Ok(mode == Mode::Disabled)
    }

    pub(crate) fn reset(&self, target: &Target) {
        let guarded = self.guarded(target);
        let turn = guarded.breaker.reset(target.gate(), self.mover, self.now());
        guarded.forget();
        if let Some(turn) = turn {
            self.turned(target, turn);
        }
    }

    /// Looks for outliers, if it is time to.
    pub(crate) fn compare(&self, outliers: &Outliers, endpoints: &Endpoints) {
        let now = self.now();
        match endpoints.kept(&self.due, Due::default).take(now, outliers.every) {
            Some(late) if late <= outliers.every * 2 => self.eject(outliers, endpoints, now),
            // What was seen long ago says nothing now.
            Some(_) => endpoints.iter().for_each(|endpoint| self.of_endpoint(endpoint).forget()),
            None => {}
        }
    }

    #[cold]
    fn eject(&self, outliers: &Outliers, endpoints: &Endpoints, now: Moment) {
        let guarded: Vec<_> = endpoints.iter().map(|endpoint| self.of_endpoint(endpoint)).collect();
        let tallies: Vec<_> =
            guarded.iter().map(|guarded| Tally::of(guarded.tally.swap(0, Ordering::Relaxed))).collect();
        let open = guarded.iter().filter(|guarded| guarded.breaker.state() != State::Closed).count();
        let mut room = outliers.room(endpoints.len()).saturating_sub(open);
        let rules = Rules { open: outliers.open, ..self.parts.rules };
        for outlier in outliers.find(&tallies) {
            if room == 0 {
                break;
            }
            let (endpoint, guarded) = (&endpoints[outlier.index], guarded[outlier.index]);
            let zeal = self.mode_of(guarded).zeal();
            let desk = Desk { rules: &rules, gate: endpoint.gate(), mover: self.mover, zeal };
            if let Some(turn) = guarded.breaker.eject(desk, now, fastrand::f64()) {
                room -= 1;
                self.turned(&Target::Endpoint(endpoint.clone()), turn);
            }
        }
    }

    /// Called without any lock of ours.
    #[cold]
    pub(crate) fn turned(&self, target: &Target, turn: Turn) {
        if turn.enforced {
            self.guarded(target).forget();
        }
        if let Target::Endpoint(endpoint) = target {
            let mut moved = self.moved();
            let is_kept = |other: &WeakEndpoint| other.upgrade().is_some_and(|other| !other.is_removed());
            moved.retain(|other| !other.is(endpoint) && is_kept(other));
            moved.push(endpoint.downgrade());
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
                // As text, which is escaped: whoever registers chooses it.
                service = &**endpoint.service(),
                endpoint = &**endpoint.id(),
                address = endpoint.address().to_string(),
                from = ?change.from, to = ?change.to, reason = ?change.reason, open_for = ?change.open_for,
                enforced = change.enforced,
                "circuit breaker changed"
            ),
            // A key may be a secret of the caller's.
            Target::Alone(alone) => tracing::info!(
                keyed = alone.has_key(),
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
        let moved = self.moved.get_mut().unwrap_or_else(PoisonError::into_inner);
        moved.iter().filter_map(WeakEndpoint::upgrade).for_each(|endpoint| endpoint.gate().forget(self.mover));
        let told = self.told.get_mut().unwrap_or_else(PoisonError::into_inner);
        told.iter().for_each(|target| target.gate().forget(self.hand));
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

// === impl Guarded ===

impl Guarded {
    fn new(rules: &Rules) -> Self {
        Self { breaker: Breaker::new(rules), tally: AtomicU64::new(0), mode: AtomicU8::new(NONE) }
    }

    /// Forgets what it was to be compared by.
    fn forget(&self) {
        self.tally.store(0, Ordering::Relaxed);
    }
}

impl Clear for Guarded {
    fn clear(&self) {
        self.breaker.clear();
        self.forget();
        self.mode.store(NONE, Ordering::Relaxed);
    }
}

// === impl Alone ===

impl Alone {
    pub(crate) fn new(rules: &Rules, key: Option<Box<dyn Any + Send + Sync>>) -> Self {
        Self { gate: Gate::new(), guarded: Guarded::new(rules), key, used: AtomicU64::new(0) }
    }

    /// Its key, if it has one of this type.
    pub(crate) fn key<T: Any>(&self) -> Option<&T> {
        self.key.as_deref()?.downcast_ref()
    }

    pub(crate) fn has_key(&self) -> bool {
        self.key.is_some()
    }

    /// Whether its open time is not over.
    pub(crate) fn refuses(&self, now: Moment) -> bool {
        self.guarded.breaker.until().is_some_and(|until| now < until)
    }

    /// Whether it was told a mode itself.
    pub(crate) fn is_told(&self) -> bool {
        self.guarded.mode.load(Ordering::Acquire) != NONE
    }

    pub(crate) fn touch(&self, now: Moment) {
        self.used.store(now.as_nanos(), Ordering::Relaxed);
    }

    pub(crate) fn used(&self) -> Moment {
        Moment::from_nanos(self.used.load(Ordering::Relaxed))
    }
}

impl fmt::Debug for Alone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Alone").field("gate", &self.gate).field("guarded", &self.guarded).finish_non_exhaustive()
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

    fn is_removed(&self) -> bool {
        matches!(self, Self::Endpoint(endpoint) if endpoint.is_removed())
    }

    fn scope(&self) -> Guarding {
        match self {
            Self::Endpoint(endpoint) => Guarding::endpoint(endpoint.clone()),
            Self::Alone(alone) => Guarding::alone(alone.clone()),
        }
    }
}

#[cfg(all(test, not(portcullis_loom)))]
mod tests {
    use super::*;
    use portcullis_core::Instance;

    fn endpoint() -> Target {
        Target::Endpoint(Endpoint::new("orders", Instance::new("a", std::net::SocketAddr::from(([127, 0, 0, 1], 1)))))
    }

    #[test]
    fn once_nobody_is_told_a_mode_there_is_nothing_to_look_up() {
        let shared = Shared::new(Parts::default());
        let (one, other) = (endpoint(), endpoint());
        shared.set_mode_of(&one, Some(Mode::ForcedClosed));
        shared.set_mode_of(&other, Some(Mode::ForcedOpen));
        shared.set_mode_of(&one, None);
        assert!(!shared.is_normal());
        shared.set_mode_of(&other, None);
        assert!(shared.is_normal());
        shared.set_mode_of(&one, Some(Mode::Disabled));
        shared.set_mode(Mode::MetricsOnly);
        shared.set_mode_of(&one, None);
        assert_eq!(shared.mode(), Mode::MetricsOnly);
    }

    /// Or of two who say different things one would have the last word, and the other the gate.
    #[test]
    fn a_mode_and_its_gate_are_set_as_one() {
        let (shared, target) = (Shared::new(Parts::default()), endpoint());
        let forced = || shared.mode_of(shared.guarded(&target)) == Mode::ForcedOpen;
        let start = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            let told = shared.told.lock().unwrap_or_else(PoisonError::into_inner);
            scope.spawn(|| {
                start.wait();
                shared.set_mode_of(&target, Some(Mode::ForcedOpen));
            });
            start.wait();
            for _ in 0..10_000 {
                std::thread::yield_now();
                assert!(!forced() && target.gate().admits());
            }
            drop(told);
        });
        assert!(forced() && !target.gate().admits());
    }
}
