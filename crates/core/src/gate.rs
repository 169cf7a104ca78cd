//! The door of one endpoint.
//!
//! ```text
//!                     ration(places from `until`, for `every`)
//!            ┌─────────────────────────────────────────────────────┐
//!            │                                                     ▼
//!       ┌─────────┐                                          ┌──────────┐  `until` is over, a place came back
//!       │ admits  │                                          │ rationed │  or was out for `every`: whoever
//!       └─────────┘                                          └──────────┘  comes next takes it
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
//! when none objects, and otherwise the strictest ration counts. Places that are out stay counted whatever is moved: never
//! are more out at a time, counting those younger than `every`, than there are places.

mod entry;
mod pass;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

pub use self::entry::{Entry, Generation};
pub use self::pass::Pass;

use self::entry::{Kind, Word};
use crate::Moment;
use crate::sync::{AtomicU64, Mutex, Ordering};

/// The door of one endpoint: it admits every request, or a counted few until a deadline.
///
/// Entering an admitting gate is one atomic load, and so, nearly, is being refused. Only [moving](Self::ration) the gate
/// and taking or giving back a place take a lock.
pub struct Gate {
    /// See [`Word`]. Written under the lock, before the deadline that goes with it.
    word: AtomicU64,
    /// Elsewhere, so that what every pick reads stays small.
    rest: Box<Rest>,
}

/// What is looked at only while the gate is rationed, or moved.
struct Rest {
    /// When a place may become free by time alone. Within one generation it never goes back while no place is left.
    deadline: AtomicU64,
    moves: Arc<Moves>,
    book: Mutex<Book>,
}

/// Counts what happens to the gates of one service.
#[derive(Default)]
pub(crate) struct Moves {
    /// How often one was moved.
    pub(crate) made: std::sync::atomic::AtomicU64,
    /// How often a place of one came back.
    pub(crate) freed: std::sync::atomic::AtomicU64,
}

/// One who moves gates. Each breaker, health check or administrator has one of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mover(u64);

/// How few requests a rationed gate admits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ration {
    /// No request is admitted before.
    pub until: Moment,
    /// How many may be inside at a time after that; a place is free again when its [`Pass`] is dropped. Without places
    /// everybody is refused, and `until` does not matter.
    pub places: u16,
    /// How long a place may be out; what has not come back by then is taken for lost, and its place is free again.
    pub every: Duration,
}

/// The gate does not admit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// When it may; [`Moment::MAX`] when that is not a matter of time.
    pub until: Moment,
}

/// What only those who move the gate, and those who take its places, need.
#[derive(Default)]
struct Book {
    votes: Vec<Vote>,
    /// The places that are out; of lost ones only those that nobody asked for yet.
    out: Vec<Out>,
    next: u32,
    /// Somebody came when `until` was over, in this generation.
    begun: bool,
}

struct Out {
    id: u32,
    lost: Moment,
}

struct Vote {
    mover: Mover,
    moved: Generation,
    ration: Option<Ration>,
    /// The gate is not to be passed even by force.
    holds: bool,
}

// === impl Gate ===

impl Gate {
    /// A gate that admits.
    #[must_use]
    pub fn new() -> Self {
        Self::counted(Arc::default())
    }

    /// A gate that admits and counts its moves, with those of others, in `moves`.
    pub(crate) fn counted(moves: Arc<Moves>) -> Self {
        Self {
            word: AtomicU64::new(Word::admits(Generation(0)).0),
            rest: Box::new(Rest { deadline: AtomicU64::new(0), moves, book: Mutex::new(Book::default()) }),
        }
    }

    /// Whether the gate admits everybody. Looks only: entering is [`pass`](Self::pass).
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
        if word.is_rationed() { self.check(word, now) } else { Ok(()) }
    }

    /// Enters, for one who keeps the gate and is sure to [`leave`](Self::leave). The clock is read only while the gate is
    /// rationed.
    ///
    /// # Errors
    ///
    /// [`Refused`] when every place is taken.
    #[inline]
    pub fn enter(&self, now: impl FnOnce() -> Moment) -> Result<Entry, Refused> {
        let word = self.word();
        if !word.is_rationed() {
            return Ok(Entry::new(word.generation(), Kind::Free, 0));
        }
        self.enter_rationed(word, now())
    }

    pub(crate) fn force(&self) -> Entry {
        Entry::new(self.word().generation(), Kind::Forced, 0)
    }

    /// Whether a rationed gate may have a place, without the lock.
    fn check(&self, word: Word, now: impl FnOnce() -> Moment) -> Result<(), Refused> {
        if word.left() > 0 {
            return Ok(());
        }
        let until = Moment::from_nanos(self.rest.deadline.load(Ordering::Acquire));
        // The deadline may be newer than the word, and belong to one that has places left.
        if now() < until && self.word().0 == word.0 { Err(Refused { until }) } else { Ok(()) }
    }

    #[cold]
    fn enter_rationed(&self, word: Word, now: Moment) -> Result<Entry, Refused> {
        self.check(word, || now)?;
        let book = &mut *lock(&self.rest.book);
        let generation = self.word().generation();
        let Some(ration) = strictest(&book.votes) else { return Ok(Entry::new(generation, Kind::Free, 0)) };
        if now < ration.until || ration.places == 0 {
            return Err(Refused { until: ration.until });
        }
        book.begun = true;
        book.out.retain(|out| out.lost > now);
        let places = usize::from(ration.places);
        let entry = (book.out.len() < places).then(|| {
            let id = book.next;
            book.next = (id + 1) & Entry::PLACES;
            book.out.push(Out { id, lost: now + ration.every.max(SHORTEST) });
            Entry::new(generation, Kind::Place, id)
        });
        let until = book.earliest();
        self.publish(Word::rationed(generation, book.left(places)), until);
        entry.ok_or(Refused { until })
    }

    /// Gives a place of this gate back. Free entries have nothing to give back.
    #[inline]
    pub fn leave(&self, entry: Entry) {
        if entry.kind() == Kind::Place {
            self.give_back(entry.place());
        }
    }

    #[cold]
    fn give_back(&self, id: u32) {
        let book = &mut *lock(&self.rest.book);
        let Some(index) = book.out.iter().position(|out| out.id == id) else { return };
        book.out.swap_remove(index);
        if let Some(ration) = strictest(&book.votes).filter(|_| book.begun) {
            let word = Word::rationed(self.word().generation(), book.left(usize::from(ration.places)));
            self.publish(word, book.earliest());
            self.rest.moves.freed.fetch_add(1, std::sync::atomic::Ordering::Release);
        }
    }

    /// Whether `entry` has one of the places of a ration and was out for longer than it may, so that its place is free again.
    #[must_use]
    #[cold]
    pub fn has_lost(&self, entry: Entry, now: Moment) -> bool {
        let is_out = |out: &Out| out.id == entry.place() && out.lost > now;
        entry.is_rationed() && !lock(&self.rest.book).out.iter().any(is_out)
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
        self.apply(&mut lock(&self.rest.book), mover, Some(NOBODY), false);
    }

    /// As [`close_for`](Self::close_for), by hand: a balancer takes the endpoint for one that is not there, so that it neither
    /// counts as sick nor is tried in a panic.
    pub fn hold_for(&self, mover: Mover) {
        self.apply(&mut lock(&self.rest.book), mover, Some(NOBODY), true);
    }

    /// Whether somebody [holds](Self::hold_for) it closed.
    #[must_use]
    pub fn is_held(&self) -> bool {
        !self.admits() && lock(&self.rest.book).votes.iter().any(|vote| vote.holds)
    }

    /// Withdraws whatever `mover` had said.
    pub fn open_for(&self, mover: Mover) {
        self.apply(&mut lock(&self.rest.book), mover, None, false);
    }

    /// As [`open_for`](Self::open_for), and forgets `mover`, which moves this gate no more.
    pub fn forget(&self, mover: Mover) {
        let book = &mut *lock(&self.rest.book);
        let Some(vote) = book.votes.iter().position(|vote| vote.mover == mover) else { return };
        if book.votes.swap_remove(vote).ration.is_some() {
            self.move_on(book);
        }
    }

    /// The last move `mover` made, for [`ration`](Self::ration) and [`admit`](Self::admit).
    #[must_use]
    pub fn last_move(&self, mover: Mover) -> Generation {
        moved(&lock(&self.rest.book).votes, mover)
    }

    /// How many movers it remembers.
    #[must_use]
    pub fn movers(&self) -> usize {
        lock(&self.rest.book).votes.len()
    }

    fn cast(&self, mover: Mover, since: Generation, ration: Option<Ration>) -> Option<Generation> {
        let book = &mut *lock(&self.rest.book);
        (moved(&book.votes, mover) == since).then(|| self.apply(book, mover, ration, false))
    }

    fn apply(&self, book: &mut Book, mover: Mover, ration: Option<Ration>, holds: bool) -> Generation {
        let next = self.word().generation().next();
        match book.votes.iter_mut().find(|vote| vote.mover == mover) {
            Some(vote) => (vote.moved, vote.ration, vote.holds) = (next, ration, holds),
            None => book.votes.push(Vote { mover, moved: next, ration, holds }),
        }
        self.move_on(book);
        next
    }

    /// Begins the next generation by what the votes now say.
    fn move_on(&self, book: &mut Book) {
        let next = self.word().generation().next();
        book.begun = false;
        match strictest(&book.votes) {
            None => self.word.store(Word::admits(next).0, Ordering::Release),
            Some(ration) => self.publish(Word::rationed(next, 0), ration.until),
        }
        self.rest.moves.made.fetch_add(1, std::sync::atomic::Ordering::Release);
    }

    /// The word first: one who sees the new deadline then sees the new word, too, and does not refuse by the old one.
    fn publish(&self, word: Word, deadline: Moment) {
        self.word.store(word.0, Ordering::Release);
        self.rest.deadline.store(deadline.as_nanos(), Ordering::Release);
    }

    #[inline]
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

/// A place that is lost at once would admit everybody.
const SHORTEST: Duration = Duration::from_millis(1);

/// What counts when several object: the latest deadline, the fewest places, the longest time out.
/// What lets nobody in.
const NOBODY: Ration = Ration { until: Moment::MAX, places: 0, every: Duration::MAX };

fn strictest(votes: &[Vote]) -> Option<Ration> {
    let strictest = votes.iter().filter_map(|vote| vote.ration).reduce(|a, b| Ration {
        until: a.until.max(b.until),
        places: a.places.min(b.places),
        every: a.every.max(b.every),
    })?;
    // Without places there is nothing to wait for.
    Some(if strictest.places == 0 { Ration { until: Moment::MAX, ..strictest } } else { strictest })
}

fn moved(votes: &[Vote], mover: Mover) -> Generation {
    votes.iter().find(|vote| vote.mover == mover).map_or(Generation(0), |vote| vote.moved)
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

// === impl Book ===

impl Book {
    /// When the first place that is out will be lost.
    fn earliest(&self) -> Moment {
        self.out.iter().map(|out| out.lost).min().unwrap_or(Moment::MIN)
    }

    fn left(&self, places: usize) -> u32 {
        u32::try_from(places.saturating_sub(self.out.len())).unwrap_or(u32::MAX)
    }
}

#[cfg(all(test, portcullis_loom))]
#[expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
mod loom_tests;
#[cfg(all(test, not(portcullis_loom)))]
#[expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
mod tests;
