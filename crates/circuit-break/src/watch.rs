//! One call, from its being admitted to its end.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use http::{HeaderMap, Response};
use portcullis_core::{
    Classify, Entry, Gate, Guard, Head, Moment, Outcome, Pass, PerThread, Permit, Refused, Verdict, retry_after,
};

use crate::breaker::{Call, Desk, State, Zeal};
use crate::outlier::Tally;
use crate::shared::{Alone, Guarded, Shared, Target};

/// Sees one call to its end, or to its being dropped, and tells its breaker.
pub struct Watch<C: Classify> {
    line: Arc<Line<C>>,
    entered: Entered,
    /// Nanoseconds, if they matter: when the call began, and once the head is there how long that took.
    time: u64,
    stage: Stage,
}

/// Where a call is. As wide as a word, since what is written as a byte is slow to be moved as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
enum Stage {
    /// Its head is not there, and that matters: it is timed, or a probe.
    Waiting,
    /// The end of the body tells. Where it does not matter a call begins here, and so need not be written again.
    AtEnd,
    /// The trailers tell.
    AtTrailers,
    /// The end of the body tells, of which a probe has had some.
    Streams,
    /// The trailers tell, after a body of which a probe has had some.
    StreamsToTrailers,
    /// It was told how it went.
    Told,
}

/// The ways to what a layer shares.
///
/// Every call holds on to it, and if all threads counted those holds in one place they would spend most of their time
/// passing that place around. So each thread has a line of its own, as far as they go round.
pub(crate) struct Lines<C> {
    lines: PerThread<Arc<Line<C>>>,
    shared: Arc<Shared>,
    classify: Arc<C>,
}

#[repr(align(128))]
pub(crate) struct Line<C> {
    shared: Arc<Shared>,
    classify: Arc<C>,
    /// Whether a success says nothing to a breaker that has seen no failure.
    brief: bool,
    /// Whether how long a call took matters.
    timed: bool,
}

/// Where a call entered. Who has one is to make a [`Watch`] of it at once: only that gives a place back.
pub(crate) enum Entered {
    Whole(Entry),
    Alone(Arc<Alone>, Entry),
    Endpoint(Pass),
}

// === impl Lines ===

impl<C> Lines<C> {
    pub(crate) fn new(shared: Shared, classify: &Arc<C>) -> Self {
        let (brief, timed) = (shared.parts.rules.are_brief(), shared.parts.rules.time_calls());
        let (shared, classify) = (Arc::new(shared), classify.clone());
        let line = || Line { shared: shared.clone(), classify: classify.clone(), brief, timed };
        Self { lines: PerThread::new(|| Arc::new(line())), shared, classify }
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(crate) fn classify(&self) -> &Arc<C> {
        &self.classify
    }

    pub(crate) fn here(&self) -> &Arc<Line<C>> {
        self.lines.here()
    }
}

// === impl Line ===

impl<C: Classify> Line<C> {
    /// The time, if how long calls take matters.
    pub(crate) fn started(&self) -> Option<Moment> {
        self.timed.then(|| self.shared.now())
    }

    /// Takes over the right that a permit gave, or asks the endpoint's gate. `None` for a call that does not count.
    #[inline]
    pub(crate) fn adopt(&self, permit: &mut Permit, started: Option<Moment>) -> Result<Option<Entered>, Refused> {
        let shared = &*self.shared;
        if !shared.is_normal() && shared.is_told(&Target::Endpoint(permit.endpoint().clone()))? {
            return Ok(None);
        }
        // Where a breaker above has taken it, its place counts for both.
        let pass = permit.take_pass().or_else(|| permit.borrow_pass());
        let endpoint = permit.endpoint();
        Ok(Some(Entered::Endpoint(match pass {
            Some(pass) if pass.is_forced() => return Ok(None),
            Some(pass) => pass,
            None => endpoint
                .pass(|| started.unwrap_or_else(|| shared.now()))
                .inspect_err(|_| shared.of_endpoint(endpoint).breaker.refuse())?,
        })))
    }

    /// Asks the gate of what has a key, or else of the whole. `None` for a call that does not count.
    #[inline]
    pub(crate) fn enter(&self, alone: Option<Arc<Alone>>, started: Option<Moment>) -> Result<Option<Entered>, Refused> {
        let shared = &*self.shared;
        let asked = alone.as_ref().unwrap_or(&shared.whole);
        if !shared.is_normal() && shared.is_told(&Target::Alone(asked.clone()))? {
            return Ok(None);
        }
        let now = || started.unwrap_or_else(|| shared.now());
        let entry = asked.gate.enter(now).inspect_err(|_| asked.guarded.breaker.refuse())?;
        Ok(Some(match alone {
            Some(alone) => Entered::Alone(alone, entry),
            None => Entered::Whole(entry),
        }))
    }

    #[inline]
    pub(crate) fn watch(self: &Arc<Self>, entered: Entered, started: Option<Moment>) -> Watch<C> {
        let time = started.map_or(0, Moment::as_nanos);
        let is_probe = entered.is_rationed();
        let stage = if self.timed || is_probe { Stage::Waiting } else { Stage::AtEnd };
        let watch = Watch { line: self.clone(), entered, time, stage };
        if is_probe {
            watch.probe();
        }
        watch
    }
}

// === impl Entered ===

impl Entered {
    #[inline]
    fn entry(&self) -> Entry {
        match self {
            Self::Whole(entry) | Self::Alone(_, entry) => *entry,
            Self::Endpoint(pass) => pass.entry(),
        }
    }

    #[inline]
    fn is_rationed(&self) -> bool {
        self.entry().is_rationed()
    }
}

// === impl Watch ===

impl<C: Classify> Watch<C> {
    /// The head of the response is here.
    #[inline]
    pub(crate) fn answered<B>(&mut self, response: &Response<B>) {
        if self.line.timed {
            let took = self.line.shared.now().since(Moment::from_nanos(self.time));
            self.time = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        }
        if self.stage == Stage::Waiting {
            self.stage = Stage::AtEnd;
        }
        match self.line.classify.head(Head::of(response)) {
            Verdict::AtTrailers => self.stage = Stage::AtTrailers,
            Verdict::Decided(outcome) => self.tell(outcome, Some(response.headers())),
            _ => {}
        }
    }

    /// There is no response, but an error.
    pub(crate) fn failed(mut self) {
        self.error();
    }

    /// Tells how the call went, once. `by` is what says so.
    #[inline]
    fn tell(&mut self, outcome: Outcome, by: Option<&HeaderMap>) {
        let stage = std::mem::replace(&mut self.stage, Stage::Told);
        if stage == Stage::Told {
            return;
        }
        if outcome == Outcome::Success && self.line.brief && self.gate().1.breaker.is_calm() {
            // Nothing to clear, nothing to write.
            return;
        }
        self.tell_what_matters(stage, outcome, by);
    }

    #[inline(never)]
    fn tell_what_matters(&self, stage: Stage, outcome: Outcome, by: Option<&HeaderMap>) {
        let shared = &*self.line.shared;
        let took = match stage {
            _ if !self.line.timed => None,
            // It took this long to break off.
            Stage::Waiting if outcome == Outcome::Failure => Some(shared.now().since(Moment::from_nanos(self.time))),
            Stage::Waiting => None,
            _ => Some(Duration::from_nanos(self.time)),
        };
        let asked = match outcome {
            Outcome::Failure => by.and_then(|headers| retry_after(headers, || shared.parts.wall.since_epoch())),
            _ => None,
        };
        let (gate, guarded) = self.gate();
        let entered = self.entered.entry().generation();
        if shared.parts.rules.outliers.is_some()
            && outcome != Outcome::Ignored
            && guarded.breaker.is_of_this_period(entered)
        {
            guarded.tally.fetch_add(Tally::one(outcome == Outcome::Failure), Ordering::Relaxed);
        }
        let zeal = if shared.is_normal() { Zeal::Acts } else { shared.mode_of(guarded).zeal() };
        let desk = Desk { rules: &shared.parts.rules, gate, mover: shared.mover, zeal };
        let call = Call { entered, outcome, took, asked };
        if let Some(turn) = guarded.breaker.record(desk, call, || shared.now(), fastrand::f64) {
            shared.turned(&self.target(), turn);
        }
    }

    #[cold]
    fn probe(&self) {
        if let Some(turn) = self.gate().1.breaker.probe(self.entered.entry().generation()) {
            self.line.shared.turned(&self.target(), turn);
        }
    }

    /// Whether it is a probe that answers well and has been at it for longer than a probe may take: a stream, whose end says
    /// nothing more. A head alone is no stream.
    #[cold]
    fn has_streamed(&self) -> bool {
        let (gate, guarded) = self.gate();
        matches!(self.stage, Stage::Streams | Stage::StreamsToTrailers)
            && guarded.breaker.state() != State::Closed
            && gate.has_lost(self.entered.entry(), self.line.shared.now())
    }

    fn awaits_trailers(&self) -> bool {
        matches!(self.stage, Stage::AtTrailers | Stage::StreamsToTrailers)
    }

    fn gate(&self) -> (&Gate, &Guarded) {
        match &self.entered {
            Entered::Whole(_) => (&self.line.shared.whole.gate, &self.line.shared.whole.guarded),
            Entered::Alone(alone, _) => (&alone.gate, &alone.guarded),
            Entered::Endpoint(pass) => (
                pass.gate(),
                pass.endpoint().map_or(&self.line.shared.whole.guarded, |it| self.line.shared.of_endpoint(it)),
            ),
        }
    }

    #[cold]
    fn target(&self) -> Target {
        match &self.entered {
            Entered::Alone(alone, _) => Target::Alone(alone.clone()),
            Entered::Endpoint(pass) if let Some(endpoint) = pass.endpoint() => Target::Endpoint(endpoint.clone()),
            _ => Target::Alone(self.line.shared.whole.clone()),
        }
    }
}

impl<C: Classify> Guard for Watch<C> {
    #[inline]
    fn data(&mut self, _: usize) {
        if self.entered.is_rationed() {
            self.stage = match self.stage {
                Stage::AtEnd => Stage::Streams,
                Stage::AtTrailers => Stage::StreamsToTrailers,
                stage => stage,
            };
            if self.has_streamed() {
                self.tell(Outcome::Success, None);
            }
        }
    }

    fn whole(&mut self) {
        if !self.awaits_trailers() {
            self.tell(Outcome::Success, None);
        }
    }

    fn trailers(&mut self, trailers: &HeaderMap) {
        if self.awaits_trailers() {
            self.tell(self.line.classify.trailers(trailers), Some(trailers));
        }
    }

    fn end(&mut self) {
        self.tell(if self.awaits_trailers() { Outcome::Failure } else { Outcome::Success }, None);
    }

    fn error(&mut self) {
        self.tell(self.line.classify.error(), None);
    }
}

/// Dropped untold, the caller went away.
impl<C: Classify> Drop for Watch<C> {
    #[inline]
    fn drop(&mut self) {
        if self.stage != Stage::Told {
            let streamed = self.entered.is_rationed() && self.has_streamed();
            self.tell(if streamed { Outcome::Success } else { Outcome::Ignored }, None);
        }
        match &self.entered {
            Entered::Whole(entry) => self.line.shared.whole.gate.leave(*entry),
            Entered::Alone(alone, entry) => alone.gate.leave(*entry),
            // A pass leaves by itself.
            Entered::Endpoint(_) => {}
        }
    }
}

impl<C: Classify> fmt::Debug for Watch<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("stage", &self.stage).finish_non_exhaustive()
    }
}
