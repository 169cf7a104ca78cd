//! The door of one endpoint.
//!
//! ```text
//!                     ration(places from `until`, for `every`)
//!            ┌─────────────────────────────────────────────────────┐
//!            │                                                     ▼
//!       ┌─────────┐                                          ┌──────────┐  `until` or `every` is over:
//!       │ admits  │                                          │ rationed │  whoever looks next starts
//!       └─────────┘                                          └──────────┘  a fresh round of places
//!            ▲                                                     │  ▲ │
//!            └─────────────────────────────────────────────────────┘  └─┘
//!                     admit(), when no other mover objects
//! ```
//!
//! A balancer must know that an endpoint is refused without knowing the breaker, and the breaker must be able to probe an
//! endpoint that the balancer avoids. So the balancer *enters* the gate while it picks, and the breaker *moves* it.
//!
//! Refusing is a ration without places. "The open time is over" and "a probe was lost" are the same move, made by whoever
//! looks next; there is no timer and no task, and the clock is read only while the gate is rationed.
//!
//! Several movers (two breakers, a health check, an administrator, a drain) each have their own veto: the gate admits
//! when none objects, and otherwise the strictest ration counts.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::sync::{AtomicU64, Mutex, Ordering};
use crate::{Endpoint, Moment};

/// The door of one endpoint: it admits every request, or a counted few until a deadline.
///
/// Entering an admitting gate is one atomic load. Nothing waits, and only [moving](Self::ration) the gate and starting a
/// round take a lock.
pub struct Gate {
    /// See [`Word`].
    word: AtomicU64,
    /// When the current round, or the time without places, is over. Written before the word that it belongs to, under
    /// the lock; a reader that sees a newer one than its word only looks again.
    deadline: AtomicU64,
    moves: Arc<std::sync::atomic::AtomicU64>,
    movers: Mutex<Vec<Vote>>,
}

/// One who moves gates. Each breaker, health check or administrator has one of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mover(u64);

/// Counts the moves of one gate. A result belongs to a period if it entered [at or after](Self::reached) the move that
/// began the period.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Generation(u32);

/// How few requests a rationed gate admits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ration {
    /// No request is admitted before.
    pub until: Moment,
    /// How many may be inside at a time after that; a place is free again when its [`Pass`] is dropped.
    pub places: u16,
    /// How long a round of places lasts; what has not come back by then is taken for lost, and a fresh round begins.
    pub every: Duration,
}

/// The gate does not admit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// When it may; [`Moment::MAX`] when that is not a matter of time.
    pub until: Moment,
}

/// What a request got at the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    generation: Generation,
    kind: Kind,
}

/// The right to call one endpoint once. Dropping it gives a rationed place back.
#[must_use = "dropping a pass gives its place back"]
pub struct Pass {
    gate: Guarded,
    entry: Entry,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The gate admitted everybody.
    Free,
    /// One of the places of a round.
    Place { round: u16 },
    /// In without asking.
    Forced,
}

enum Guarded {
    Endpoint(Endpoint),
    Alone(Arc<Gate>),
}

/// The gate's state: `rationed: 1 | generation: 31 | round: 16 | places left: 16`.
#[derive(Clone, Copy)]
struct Word(u64);

struct Vote {
    mover: Mover,
    moved: Generation,
    ration: Option<Ration>,
}

// === impl Gate ===

impl Gate {
    /// A gate that admits.
    #[must_use]
    pub fn new() -> Self {
        Self::counted(Arc::default())
    }

    /// A gate that admits and counts its moves, with those of others, in `moves`.
    pub(crate) fn counted(moves: Arc<std::sync::atomic::AtomicU64>) -> Self {
        Self {
            word: AtomicU64::new(Word::admits(Generation(0)).0),
            deadline: AtomicU64::new(0),
            moves,
            movers: Mutex::new(Vec::new()),
        }
    }

    /// Whether the gate admits everybody. Looks only: entering is [`enter`](Self::enter).
    #[must_use]
    pub fn admits(&self) -> bool {
        !self.word().is_rationed()
    }

    /// Whether a request that came now would be refused, and until when. Looks only; `now` is not read while the gate
    /// admits.
    ///
    /// # Errors
    ///
    /// [`Refused`] when it would be.
    pub fn peek(&self, now: impl FnOnce() -> Moment) -> Result<(), Refused> {
        let word = self.word();
        if !word.is_rationed() || word.left() > 0 {
            return Ok(());
        }
        let until = Moment::from_nanos(self.deadline.load(Ordering::Acquire));
        if now() < until { Err(Refused { until }) } else { Ok(()) }
    }

    /// Enters a gate of one's own, shared behind an `Arc`.
    ///
    /// # Errors
    ///
    /// [`Refused`] when every place is taken.
    pub fn pass(self: &Arc<Self>, now: impl FnOnce() -> Moment) -> Result<Pass, Refused> {
        let entry = self.enter(now)?;
        Ok(Pass { gate: Guarded::Alone(self.clone()), entry })
    }

    /// Gives a pass without asking. Its outcome must change nothing: see [`Pass::is_forced`].
    pub fn pass_by_force(self: &Arc<Self>) -> Pass {
        Pass { gate: Guarded::Alone(self.clone()), entry: self.force() }
    }

    /// Takes a place. The clock is read only while the gate is rationed.
    pub(crate) fn enter(&self, now: impl FnOnce() -> Moment) -> Result<Entry, Refused> {
        let word = self.word();
        if !word.is_rationed() {
            return Ok(Entry { generation: word.generation(), kind: Kind::Free });
        }
        self.enter_rationed(word, now())
    }

    pub(crate) fn force(&self) -> Entry {
        Entry { generation: self.word().generation(), kind: Kind::Forced }
    }

    #[cold]
    fn enter_rationed(&self, mut word: Word, now: Moment) -> Result<Entry, Refused> {
        loop {
            if !word.is_rationed() {
                return Ok(Entry { generation: word.generation(), kind: Kind::Free });
            }
            let deadline = Moment::from_nanos(self.deadline.load(Ordering::Acquire));
            if now >= deadline {
                if let Some(entry) = self.start_round(word, now) {
                    return Ok(entry);
                }
                let next = self.word();
                if next.0 == word.0 {
                    return Err(Refused { until: Moment::from_nanos(self.deadline.load(Ordering::Acquire)) });
                }
                word = next;
                continue;
            }
            if word.left() == 0 {
                return Err(Refused { until: deadline });
            }
            match self.word.compare_exchange(word.0, word.one_less().0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Ok(Entry { generation: word.generation(), kind: Kind::Place { round: word.round() } }),
                Err(seen) => word = Word(seen),
            }
        }
    }

    /// Starts a fresh round and takes its first place, unless somebody else was quicker or the ration has no places.
    fn start_round(&self, seen: Word, now: Moment) -> Option<Entry> {
        let movers = lock(&self.movers);
        let word = self.word();
        let due = Moment::from_nanos(self.deadline.load(Ordering::Acquire)) <= now;
        if word.generation() != seen.generation() || !word.is_rationed() || !due {
            return None;
        }
        let ration = strictest(&movers)?;
        if ration.places == 0 {
            // Without places there is nothing to come back for; look again after a round.
            self.deadline.store((now + ration.every.max(MIN_ROUND)).as_nanos(), Ordering::Release);
            return None;
        }
        self.deadline.store((now + ration.every.max(MIN_ROUND)).as_nanos(), Ordering::Release);
        let fresh = Word::rationed(word.generation(), word.round().wrapping_add(1), ration.places - 1);
        // Only places of the old round can be taken or given back meanwhile, so storing loses nothing.
        self.word.store(fresh.0, Ordering::Release);
        Some(Entry { generation: fresh.generation(), kind: Kind::Place { round: fresh.round() } })
    }

    /// Gives a place back, if its round still runs.
    pub(crate) fn leave(&self, entry: Entry) {
        let Kind::Place { round } = entry.kind else { return };
        let mut word = self.word();
        while word.is_rationed() && word.generation() == entry.generation && word.round() == round {
            match self.word.compare_exchange(word.0, word.one_more().0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return,
                Err(seen) => word = Word(seen),
            }
        }
    }

    /// Rations the gate, if `mover` has not moved it since `since`; `None` when it has. The new generation is what a
    /// result must have [`reached`](Generation::reached) to count.
    #[must_use = "nothing was moved when this is `None`"]
    pub fn ration(&self, mover: Mover, since: Generation, ration: Ration) -> Option<Generation> {
        self.cast(mover, since, Some(ration))
    }

    /// Lets everybody in as far as `mover` is concerned, if it has not moved the gate since `since`.
    #[must_use = "nothing was moved when this is `None`"]
    pub fn admit(&self, mover: Mover, since: Generation) -> Option<Generation> {
        self.cast(mover, since, None)
    }

    /// Refuses everybody until `mover` [`admit`](Self::admit)s again, whatever it had said before.
    pub fn close_for(&self, mover: Mover) {
        let refuse = Ration { until: Moment::MAX, places: 0, every: Duration::MAX };
        let mut movers = lock(&self.movers);
        let since = moved(&movers, mover);
        self.apply(&mut movers, mover, since, Some(refuse));
    }

    /// Withdraws whatever `mover` had said.
    pub fn open_for(&self, mover: Mover) {
        let mut movers = lock(&self.movers);
        let since = moved(&movers, mover);
        self.apply(&mut movers, mover, since, None);
    }

    /// The last move `mover` made, for [`ration`](Self::ration) and [`admit`](Self::admit).
    #[must_use]
    pub fn last_move(&self, mover: Mover) -> Generation {
        moved(&lock(&self.movers), mover)
    }

    fn cast(&self, mover: Mover, since: Generation, ration: Option<Ration>) -> Option<Generation> {
        self.apply(&mut lock(&self.movers), mover, since, ration)
    }

    /// Called with the lock held.
    fn apply(
        &self,
        movers: &mut Vec<Vote>,
        mover: Mover,
        since: Generation,
        ration: Option<Ration>,
    ) -> Option<Generation> {
        if moved(movers, mover) != since {
            return None;
        }
        let next = self.word().generation().next();
        match movers.iter_mut().find(|vote| vote.mover == mover) {
            Some(vote) => (vote.moved, vote.ration) = (next, ration),
            None => movers.push(Vote { mover, moved: next, ration }),
        }
        let word = match strictest(movers) {
            None => Word::admits(next),
            Some(ration) => {
                self.deadline.store(ration.until.as_nanos(), Ordering::Release);
                Word::rationed(next, 0, 0)
            }
        };
        self.word.store(word.0, Ordering::Release);
        self.moves.fetch_add(1, std::sync::atomic::Ordering::Release);
        Some(next)
    }

    fn word(&self) -> Word {
        Word(self.word.load(Ordering::Acquire))
    }
}

impl Default for Gate {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = self.word();
        f.debug_struct("Gate")
            .field("admits", &!word.is_rationed())
            .field("generation", &word.generation().0)
            .field("places_left", &word.left())
            .finish_non_exhaustive()
    }
}

/// A round that lasts no time would let everybody start one.
const MIN_ROUND: Duration = Duration::from_millis(1);

/// What counts when several object: the latest deadline, the fewest places, the longest round.
fn strictest(movers: &[Vote]) -> Option<Ration> {
    movers.iter().filter_map(|vote| vote.ration).reduce(|a, b| Ration {
        until: a.until.max(b.until),
        places: a.places.min(b.places),
        every: a.every.max(b.every),
    })
}

fn moved(movers: &[Vote], mover: Mover) -> Generation {
    movers.iter().find(|vote| vote.mover == mover).map_or(Generation(0), |vote| vote.moved)
}

fn lock<T>(mutex: &Mutex<T>) -> crate::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

// === impl Mover ===

impl Mover {
    /// One who has not moved any gate yet.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "each is another one")]
    pub fn new() -> Self {
        static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
        Self(NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
    }
}

// === impl Generation ===

impl Generation {
    const MASK: u32 = (1 << 31) - 1;

    /// Before a mover's first move.
    pub const FIRST: Self = Self(0);

    /// Whether this is `since` or later. Counting wraps after 2³¹ moves; what is more than half of that apart is taken
    /// for earlier.
    #[must_use]
    pub const fn reached(self, since: Self) -> bool {
        self.0.wrapping_sub(since.0) & Self::MASK < 1 << 30
    }

    /// As a number that fits an atomic beside others.
    #[must_use]
    pub const fn to_bits(self) -> u32 {
        self.0
    }

    /// The generation [`to_bits`](Self::to_bits) was asked of.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits & Self::MASK)
    }

    const fn next(self) -> Self {
        Self(self.0.wrapping_add(1) & Self::MASK)
    }
}

// === impl Pass ===

impl Pass {
    pub(crate) fn of_endpoint(endpoint: Endpoint, entry: Entry) -> Self {
        Self { gate: Guarded::Endpoint(endpoint), entry }
    }

    /// When the gate was entered; a result counts if this has [`reached`](Generation::reached) the move that began the
    /// period.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.entry.generation
    }

    /// Whether it holds one of the places of a rationed gate.
    #[must_use]
    pub fn is_rationed(&self) -> bool {
        matches!(self.entry.kind, Kind::Place { .. })
    }

    /// Whether the gate was not asked. The request is let through and its outcome changes nothing; otherwise a panic
    /// threshold would be undone by the failures it brings.
    #[must_use]
    pub fn is_forced(&self) -> bool {
        self.entry.kind == Kind::Forced
    }

    /// The gate that was entered.
    #[must_use]
    pub fn gate(&self) -> &Gate {
        match &self.gate {
            Guarded::Endpoint(endpoint) => endpoint.gate(),
            Guarded::Alone(gate) => gate,
        }
    }

    /// The endpoint behind the gate, if there is one.
    #[must_use]
    pub fn endpoint(&self) -> Option<&Endpoint> {
        match &self.gate {
            Guarded::Endpoint(endpoint) => Some(endpoint),
            Guarded::Alone(_) => None,
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.gate().leave(self.entry);
    }
}

impl fmt::Debug for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pass").field("entry", &self.entry).finish_non_exhaustive()
    }
}

// === impl Word ===

impl Word {
    const RATIONED: u64 = 1 << 63;

    const fn admits(generation: Generation) -> Self {
        Self((generation.0 as u64) << 32)
    }

    const fn rationed(generation: Generation, round: u16, left: u16) -> Self {
        Self(Self::RATIONED | (generation.0 as u64) << 32 | (round as u64) << 16 | left as u64)
    }

    const fn is_rationed(self) -> bool {
        self.0 & Self::RATIONED != 0
    }

    const fn generation(self) -> Generation {
        Generation((self.0 >> 32) as u32 & Generation::MASK)
    }

    const fn round(self) -> u16 {
        (self.0 >> 16) as u16
    }

    const fn left(self) -> u16 {
        self.0 as u16
    }

    const fn one_less(self) -> Self {
        Self(self.0 - 1)
    }

    const fn one_more(self) -> Self {
        Self(self.0 + 1)
    }
}

#[cfg(all(test, not(portcullis_loom)))]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn at(seconds: u64) -> Moment {
        Moment::from_nanos(seconds * 1_000_000_000)
    }

    fn gate() -> Arc<Gate> {
        Arc::new(Gate::new())
    }

    #[test]
    fn an_admitting_gate_reads_no_clock() {
        let pass = gate().pass(|| unreachable!("the clock was read")).unwrap();
        assert!(!pass.is_rationed());
    }

    #[test]
    fn a_ration_refuses_until_its_deadline_and_then_has_its_places() {
        let (gate, mover) = (gate(), Mover::new());
        let ration = Ration { until: at(10), places: 2, every: 5 * S };
        gate.ration(mover, Generation::FIRST, ration).unwrap();
        assert_eq!(gate.pass(|| at(9)).unwrap_err(), Refused { until: at(10) });
        let first = gate.pass(|| at(10)).unwrap();
        let second = gate.pass(|| at(11)).unwrap();
        assert!(first.is_rationed() && second.is_rationed());
        assert_eq!(gate.pass(|| at(12)).unwrap_err(), Refused { until: at(15) });
        drop(first);
        let third = gate.pass(|| at(12)).unwrap();
        assert!(gate.pass(|| at(12)).is_err());
        drop((second, third));
    }

    #[test]
    fn a_lost_place_is_replaced_after_a_round_and_its_late_return_adds_none() {
        let (gate, mover) = (gate(), Mover::new());
        gate.ration(mover, Generation::FIRST, Ration { until: at(0), places: 1, every: 5 * S }).unwrap();
        let lost = gate.pass(|| at(1)).unwrap();
        assert!(gate.pass(|| at(5)).is_err());
        let fresh = gate.pass(|| at(6)).unwrap();
        drop(lost);
        assert!(gate.pass(|| at(7)).is_err(), "the late return made a second place");
        drop(fresh);
        assert!(gate.pass(|| at(7)).is_ok());
    }

    #[test]
    fn only_the_first_of_two_moves_from_one_generation_counts() {
        let (gate, mover) = (gate(), Mover::new());
        let ration = Ration { until: at(10), places: 1, every: S };
        let since = gate.ration(mover, Generation::FIRST, ration).unwrap();
        assert_eq!(gate.ration(mover, Generation::FIRST, ration), None);
        assert_eq!(gate.admit(mover, Generation::FIRST), None);
        assert!(gate.admit(mover, since).is_some());
        assert!(gate.admits());
    }

    #[test]
    fn each_mover_has_its_own_veto() {
        let (gate, breaker, drain) = (gate(), Mover::new(), Mover::new());
        let old = gate.pass(|| at(0)).unwrap();
        gate.close_for(drain);
        let since =
            gate.ration(breaker, gate.last_move(breaker), Ration { until: at(10), places: 1, every: S }).unwrap();
        assert!(!old.generation().reached(since));
        assert_eq!(gate.pass(|| at(11)).unwrap_err(), Refused { until: Moment::MAX });
        gate.open_for(drain);
        let probe = gate.pass(|| at(11)).unwrap();
        assert!(probe.is_rationed() && probe.generation().reached(since));
        gate.close_for(drain);
        assert!(gate.admit(breaker, since).is_some());
        assert!(!gate.admits());
        gate.open_for(drain);
        assert!(gate.admits());
    }

    #[test]
    fn a_forced_pass_takes_no_place() {
        let (gate, mover) = (gate(), Mover::new());
        gate.ration(mover, Generation::FIRST, Ration { until: at(0), places: 1, every: S }).unwrap();
        let forced = gate.pass_by_force();
        assert!(forced.is_forced());
        let probe = gate.pass(|| at(1)).unwrap();
        drop(forced);
        assert!(gate.pass(|| at(1)).is_err());
        drop(probe);
    }

    #[test]
    fn generations_wrap() {
        let last = Generation::from_bits(Generation::MASK);
        assert!(last.next().reached(last));
        assert!(!last.reached(last.next()));
    }

    proptest::proptest! {
        /// Whatever happens in whatever order, no more are inside a round than it has places.
        #[test]
        fn never_more_inside_than_places(steps in proptest::collection::vec((0_u8..5, 0_usize..8, 0_u64..4), 1..200)) {
            let (gate, mover) = (gate(), Mover::new());
            let (mut now, mut inside, places) = (0, Vec::<Pass>::new(), 2);
            let mut since = Generation::FIRST;
            for (step, which, wait) in steps {
                now += wait;
                match step {
                    0 | 1 => inside.extend(gate.pass(|| at(now))),
                    2 if !inside.is_empty() => drop(inside.swap_remove(which % inside.len())),
                    3 => {
                        let ration = Ration { until: at(now + wait), places, every: 3 * S };
                        since = gate.ration(mover, since, ration).unwrap();
                    }
                    4 => since = gate.admit(mover, since).unwrap(),
                    _ => {}
                }
                let word = gate.word();
                let now_inside = inside.iter().filter(|pass| {
                    pass.generation() == word.generation() && pass.entry.kind == (Kind::Place { round: word.round() })
                });
                proptest::prop_assert!(now_inside.count() + usize::from(word.left()) <= usize::from(places));
            }
        }
    }
}

/// Run by `RUSTFLAGS="--cfg portcullis_loom" cargo test -p portcullis-core --release loom`.
#[cfg(all(test, portcullis_loom))]
mod loom_tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    fn at(seconds: u64) -> Moment {
        Moment::from_nanos(seconds * 1_000_000_000)
    }

    #[test]
    fn loom_a_round_has_one_place_for_two_who_look() {
        loom::model(|| {
            let (gate, mover) = (Arc::new(Gate::new()), Mover::new());
            let ration = Ration { until: at(1), places: 1, every: Duration::from_secs(5) };
            gate.ration(mover, Generation::FIRST, ration).unwrap();
            let entered = Arc::new(AtomicUsize::new(0));
            let threads: Vec<_> = (0..2)
                .map(|_| {
                    let (gate, entered) = (gate.clone(), entered.clone());
                    loom::thread::spawn(move || {
                        if let Ok(entry) = gate.enter(|| at(2)) {
                            entered.fetch_add(1, SeqCst);
                            std::mem::forget(entry);
                        }
                    })
                })
                .collect();
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            assert_eq!(entered.load(SeqCst), 1);
        });
    }

    #[test]
    fn loom_a_place_given_back_while_a_new_round_starts_adds_none() {
        loom::model(|| {
            let (gate, mover) = (Arc::new(Gate::new()), Mover::new());
            let ration = Ration { until: at(0), places: 1, every: Duration::from_secs(5) };
            gate.ration(mover, Generation::FIRST, ration).unwrap();
            let old = gate.enter(|| at(1)).unwrap();
            let other = gate.clone();
            let back = loom::thread::spawn(move || other.leave(old));
            let fresh = gate.enter(|| at(6));
            back.join().unwrap();
            assert!(fresh.is_ok());
            assert_eq!(gate.word().left(), 0);
        });
    }

    #[test]
    fn loom_two_movers_from_one_generation_make_one_move() {
        loom::model(|| {
            let (gate, mover) = (Arc::new(Gate::new()), Mover::new());
            let ration = Ration { until: at(10), places: 1, every: Duration::from_secs(5) };
            let threads: Vec<_> = (0..2)
                .map(|_| {
                    let gate = gate.clone();
                    loom::thread::spawn(move || gate.ration(mover, Generation::FIRST, ration).is_some())
                })
                .collect();
            let moved = threads.into_iter().filter(|_| true).map(|thread| thread.join().unwrap());
            assert_eq!(moved.filter(|moved| *moved).count(), 1);
        });
    }
}
