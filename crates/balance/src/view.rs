//! What one pick can choose from, worked out once for many requests.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use http::StatusCode;
use portcullis_core::{Clock, Endpoint, Endpoints, Layer, Moment, Permit, Refused, Rejection};

use crate::few::Few;
use crate::group::Group;
use crate::pick::{Asked, Candidates, Pick};
use crate::served::Failed;
use crate::shape::{Member, Shape, Split, Subset, WHOLE};
use crate::sticky::{Sticky, Token};

/// What a snapshot, or a subset of it, offers just now.
pub(crate) struct Viewed {
    first: View,
    /// After gates moved, or time went on.
    later: ArcSwapOption<View>,
    deriving: AtomicBool,
    subsets: Few<Subset, Self>,
    /// Where the endpoints stand that cookies lead to, by secret.
    cookies: Few<(u64, u64), HashMap<Token, u32>>,
}

/// Which of a snapshot's endpoints can be picked. It may be a little old: what is picked is asked again at its gate.
#[derive(Debug)]
struct View {
    moves: u64,
    derived: Moment,
    /// When weights change by themselves.
    expires: Moment,
    parts: Box<[Part]>,
    /// Every endpoint there is, the lowest priority first.
    all: Box<[u32]>,
    /// None is in the subset, and all stand for it.
    fell_back: bool,
    /// Whose gates do not let everybody in, and whom no policy gets to see.
    unseen: Box<[u32]>,
    /// Nobody admitted when it was last looked.
    closed: ArcSwapOption<Closed>,
}

/// What nobody need look for again.
#[derive(Debug)]
struct Closed {
    /// Until then, while no place comes back.
    end: Moment,
    freed: u64,
    /// When the first may admit.
    until: Moment,
}

/// A group that gets a part of the requests.
#[derive(Debug)]
struct Part {
    /// Where its part of the line to 2³² ends.
    end: u64,
    group: Arc<Group>,
    panic: bool,
}

/// Everything a choice hangs on but the endpoints.
pub(crate) struct Choice<'a, P: ?Sized> {
    pub(crate) pick: &'a P,
    pub(crate) terms: Terms<'a>,
}

/// What of it is the same for every policy. Candidates only point to it: it has just been written in parts, and to read it
/// in others would have to wait.
#[derive(Clone, Copy)]
pub(crate) struct Terms<'a> {
    pub(crate) shape: &'a Shape,
    pub(crate) subset: Option<&'a Subset>,
    pub(crate) asked: &'a Asked<'a>,
    pub(crate) tried: &'a [Failed],
    pub(crate) clock: &'a Clock,
}

/// Why there is nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nobody {
    /// There are no endpoints.
    Empty,
    /// None admits; the earliest may at that time.
    Refused(Moment),
    /// The one that had to be is not there, or does not admit.
    Preferred,
}

/// The right to call an endpoint, and the time if the policy observes.
pub(crate) type Chosen = (Permit, Option<Moment>);

/// How often a policy is asked again when what it picked does not admit.
const ASKED: usize = 4;
/// One request in so many looks first whether an endpoint with a rationed gate can be tried that no policy is offered: it
/// was left out by itself, or its whole priority was.
const PROBES: usize = 4;
/// How long a view is kept for each of its endpoints, though gates moved meanwhile.
const KEPT: Duration = Duration::from_micros(1);
/// How long nobody looks again after nobody admitted.
const CLOSED: Duration = Duration::from_millis(5);

// === impl Nobody ===

impl Nobody {
    /// What the caller is told.
    pub(crate) fn into_rejection(self, service: Option<&str>, clock: &Clock) -> Rejection {
        let (reason, until) = match self {
            Self::Empty => ("no-endpoints", None),
            Self::Refused(until) => ("none-admits", Some(until)),
            Self::Preferred => ("preferred-not-available", None),
        };
        tracing::debug!(service, reason, "refused");
        let rejection = Rejection::new(Layer::Balance, StatusCode::SERVICE_UNAVAILABLE, reason);
        match until.filter(|until| *until != Moment::MAX) {
            Some(until) => rejection.with_retry_after(until.since(clock.now())),
            None => rejection,
        }
    }
}

// === impl Choice ===

impl<P: Pick + ?Sized> Choice<'_, P> {
    /// This very endpoint, if it admits and was not tried.
    pub(crate) fn enter(&self, endpoint: &Endpoint) -> Option<Chosen> {
        if self.has_tried(endpoint) {
            return None;
        }
        let permit = endpoint.permit(|| self.terms.clock.now()).ok()?;
        Some((permit, self.pick.observes().then(|| self.terms.clock.now())))
    }
}

impl<'a, P: ?Sized> Choice<'a, P> {
    /// The same from a part of the endpoints.
    pub(crate) fn within(self, subset: Option<&'a Subset>) -> Self {
        Self { terms: Terms { subset, ..self.terms }, ..self }
    }

    /// Whether the endpoint has failed this request.
    fn has_tried(&self, endpoint: &Endpoint) -> bool {
        self.terms.tried.iter().any(|failed| failed.endpoint == *endpoint)
    }
}

impl<P: ?Sized> Clone for Choice<'_, P> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P: ?Sized> Copy for Choice<'_, P> {}

// === impl Viewed ===

impl Viewed {
    pub(crate) fn new<P: Pick + ?Sized>(endpoints: &Endpoints, choice: &Choice<'_, P>) -> Self {
        Self {
            first: View::derive(endpoints, choice, choice.terms.clock.now(), None),
            later: ArcSwapOption::empty(),
            deriving: AtomicBool::new(false),
            subsets: Few::default(),
            cookies: Few::default(),
        }
    }

    /// What the subset of `choice` offers.
    pub(crate) fn subset<P: Pick + ?Sized>(&self, endpoints: &Endpoints, choice: &Choice<'_, P>) -> &Self {
        match choice.terms.subset {
            None => self,
            Some(subset) => self.subsets.get_or_init(subset, || Self::new(endpoints, choice)),
        }
    }

    /// Whether the endpoint is in the subset of `choice`, or in what stands for it.
    pub(crate) fn holds<P: ?Sized>(&self, endpoint: &Endpoint, choice: &Choice<'_, P>) -> bool {
        choice.terms.subset.is_none_or(|subset| self.first.fell_back || subset.holds(&endpoint.instance()))
    }

    /// Where the endpoint of each cookie stands in the snapshot.
    pub(crate) fn cookies(&self, endpoints: &Endpoints, sticky: &Sticky) -> &HashMap<Token, u32> {
        self.cookies.get_or_init(&sticky.keys, || {
            (0..).zip(endpoints.iter()).map(|(i, endpoint)| (sticky.token(endpoint), i)).collect()
        })
    }

    /// Asks the policy for an endpoint that admits and was not tried, and enters its gate.
    pub(crate) fn choose<P: Pick + ?Sized>(
        &self,
        endpoints: &Endpoints,
        choice: &Choice<'_, P>,
    ) -> Result<Chosen, Nobody> {
        if self.first.is_fresh(endpoints, choice.terms.clock) {
            return self.first.choose(endpoints, choice);
        }
        let later = self.later.load();
        if let Some(view) = &*later
            && view.is_fresh(endpoints, choice.terms.clock)
        {
            return view.choose(endpoints, choice);
        }
        self.refresh(endpoints, choice);
        match &*self.later.load() {
            Some(view) => view.choose(endpoints, choice),
            None => self.first.choose(endpoints, choice),
        }
    }

    /// Lets the policy prepare for what is offered now.
    pub(crate) fn prepare<P: Pick + ?Sized>(&self, endpoints: &Endpoints, choice: &Choice<'_, P>) {
        if !self.first.is_fresh(endpoints, choice.terms.clock) {
            self.refresh(endpoints, choice);
        }
        let later = self.later.load();
        for part in &later.as_deref().unwrap_or(&self.first).parts {
            choice.pick.prepare(&Candidates::new(endpoints, &part.group, part.panic, &choice.terms));
        }
    }

    #[cold]
    fn refresh<P: Pick + ?Sized>(&self, endpoints: &Endpoints, choice: &Choice<'_, P>) {
        let now = choice.terms.clock.now();
        let later = self.later.load();
        let old = later.as_deref().unwrap_or(&self.first);
        let kept = KEPT * u32::try_from(endpoints.len()).unwrap_or(u32::MAX);
        if now.since(old.derived) < kept && old.moves != endpoints.moves() && endpoints.len() > 1000 {
            return;
        }
        if self.deriving.swap(true, Ordering::Acquire) {
            return;
        }
        self.later.store(Some(Arc::new(View::derive(endpoints, choice, now, Some(old)))));
        self.deriving.store(false, Ordering::Release);
    }
}

impl fmt::Debug for Viewed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Viewed").field("first", &self.first).field("later", &self.later.load()).finish_non_exhaustive()
    }
}

// === impl View ===

impl View {
    fn derive<P: Pick + ?Sized>(
        endpoints: &Endpoints,
        choice: &Choice<'_, P>,
        now: Moment,
        old: Option<&Self>,
    ) -> Self {
        // Before the gates are looked at: a move meanwhile makes the view old at once.
        let moves = endpoints.moves();
        let wants_all = choice.pick.wants_all();
        let mut instances: Vec<_> =
            (0_u32..).zip(endpoints.iter()).map(|(index, endpoint)| (index, endpoint, endpoint.instance())).collect();
        instances.retain(|(_, endpoint, _)| endpoint.weight() > 0 && !endpoint.gate().is_held());
        let all = || instances.iter().map(|(_, _, instance)| instance.clone());
        let fell_back = choice.terms.subset.is_some_and(|subset| subset.falls_back(all()));
        if let Some(subset) = choice.terms.subset.filter(|_| !fell_back) {
            instances.retain(|(_, _, instance)| subset.holds(instance));
        }
        instances.sort_by_key(|(_, _, instance)| instance.priority);
        let start = choice.terms.shape.slow_start.filter(|_| !wants_all);
        let parts = |endpoint: &Endpoint| start.and_then(|start| start.part(endpoint.joined(), now));
        let starting = instances.iter().any(|(_, endpoint, _)| parts(endpoint).is_some());
        // Read anew, it may be zero by now.
        let heaviest = instances.iter().map(|(_, endpoint, _)| endpoint.weight()).max().unwrap_or(1).max(1);
        // Parts of a weight need finer units, where they fit.
        let unit = if starting { f64::from((u32::MAX / heaviest).clamp(1, 1000)) } else { 1.0 };
        let weight = |endpoint: &Endpoint| match parts(endpoint) {
            Some(part) => (f64::from(endpoint.weight()) * part * unit).max(1.0) as u32,
            None if starting => (f64::from(endpoint.weight()) * unit) as u32,
            None => endpoint.weight(),
        };
        let members: Vec<Member<'_>> = instances
            .iter()
            .map(|(index, endpoint, instance)| Member {
                index: *index,
                instance,
                weight: weight(endpoint),
                admits: endpoint.gate().admits(),
            })
            .collect();
        let splits = choice.terms.shape.split(&members, wants_all);
        let mut seen = vec![false; endpoints.len()];
        splits.iter().flat_map(|split| &split.members).for_each(|index| seen[*index as usize] = true);
        let rationed = || members.iter().filter(|member| !member.admits).map(|member| member.index);
        let expires = start.filter(|_| starting).map_or(Moment::MAX, |start| now + start.step());
        let view = Self {
            moves,
            derived: now,
            expires,
            parts: Self::parts(endpoints, &members, splits, old),
            all: members.iter().map(|member| member.index).collect(),
            fell_back,
            unseen: rationed().filter(|index| !seen[*index as usize]).collect(),
            closed: ArcSwapOption::empty(),
        };
        let panics = |view: &Self| view.parts.iter().any(|part| part.panic);
        if old.map_or(panics(&view), |old| panics(old) != panics(&view)) {
            let (service, refusing, of) = (&**endpoints.service(), rationed().count(), view.all.len());
            tracing::info!(service, refusing, of, panic = panics(&view), "the panic threshold was crossed");
        }
        view
    }

    fn parts(endpoints: &Endpoints, members: &[Member<'_>], splits: Vec<Split>, old: Option<&Self>) -> Box<[Part]> {
        let mut weights = vec![0; endpoints.len()];
        members.iter().for_each(|member| weights[member.index as usize] = member.weight);
        let (count, mut end) = (splits.len(), 0);
        let part = |(i, split): (usize, Split)| {
            let mut listed: Vec<(u32, u32)> =
                split.members.iter().map(|index| (*index, weights[*index as usize])).collect();
            listed.sort_unstable();
            end = if i + 1 == count { WHOLE } else { end + split.share };
            // What was derived from an unchanged group stays: turns, tables.
            let known =
                old.into_iter().flat_map(|old| &*old.parts).find(|part| part.group.is_of(&listed, endpoints.len()));
            let group = known.map_or_else(|| Arc::new(Group::new(&listed, endpoints.len())), |part| part.group.clone());
            Part { end, group, panic: split.panic }
        };
        splits.into_iter().enumerate().map(part).collect()
    }

    fn is_fresh(&self, endpoints: &Endpoints, clock: &Clock) -> bool {
        self.moves == endpoints.moves() && (self.expires == Moment::MAX || clock.now() < self.expires)
    }

    fn choose<P: Pick + ?Sized>(&self, endpoints: &Endpoints, choice: &Choice<'_, P>) -> Result<Chosen, Nobody> {
        let pick = choice.pick;
        let part = match &*self.parts {
            [] => return self.scan(endpoints, choice, 0, false),
            [only] => only,
            several => {
                let point = pick.point(*choice.terms.asked).unwrap_or_else(|| fastrand::u64(..)) >> 32;
                several.iter().find(|part| point < part.end).unwrap_or(&several[0])
            }
        };
        let among = Candidates::new(endpoints, &part.group, part.panic, &choice.terms);
        let now = || among.now();
        // Before a gate is entered: what is got there is then not moved once more.
        let observed = pick.observes().then(now);
        if !self.unseen.is_empty()
            && among.random_below(PROBES) == 0
            && let Some(i) = self.unseen.get(among.random_below(self.unseen.len()))
            && let endpoint = &endpoints[*i as usize]
            && !choice.has_tried(endpoint)
            && let Ok(permit) = endpoint.permit(now)
        {
            return Ok((permit, observed));
        }
        for _ in 0..ASKED {
            let Some(i) = pick.pick(&among).filter(|i| *i < among.len()) else { break };
            let endpoint = &among[i];
            if choice.has_tried(endpoint) {
                among.skip(i);
                continue;
            }
            match endpoint.permit(now) {
                Ok(permit) => return Ok((permit, observed)),
                Err(_) if part.panic => return Ok((endpoint.permit_by_force(), observed)),
                Err(_) => among.skip(i),
            }
        }
        let start = among.random_below(self.all.len());
        self.scan(endpoints, choice, start, part.panic)
    }

    /// The first that admits, of the lowest priority that has one; then also what was tried before.
    #[cold]
    fn scan<P: Pick + ?Sized>(
        &self,
        endpoints: &Endpoints,
        choice: &Choice<'_, P>,
        start: usize,
        panic: bool,
    ) -> Result<Chosen, Nobody> {
        let (now, freed) = (choice.terms.clock.now(), endpoints.freed());
        if let Some(closed) = &*self.closed.load()
            && now < closed.end
            && closed.freed == freed
            && self.moves == endpoints.moves()
        {
            return Err(Nobody::Refused(closed.until));
        }
        let priority = |i: u32| endpoints[i as usize].instance().priority;
        let mut order: Vec<u32> = self.all[start..].iter().chain(&self.all[..start]).copied().collect();
        if self.all.first().map(|i| priority(*i)) != self.all.last().map(|i| priority(*i)) {
            order.sort_by_cached_key(|i| priority(*i));
        }
        let mut earliest = None;
        for again in [false, true] {
            for endpoint in order.iter().map(|i| &endpoints[*i as usize]) {
                if choice.has_tried(endpoint) != again {
                    continue;
                }
                match endpoint.permit(|| now) {
                    Ok(permit) => return Ok((permit, choice.pick.observes().then_some(now))),
                    Err(_) if panic => {
                        return Ok((endpoint.permit_by_force(), choice.pick.observes().then_some(now)));
                    }
                    Err(Refused { until }) => earliest = Some(earliest.map_or(until, |at: Moment| at.min(until))),
                }
            }
        }
        let Some(until) = earliest else { return Err(Nobody::Empty) };
        self.closed.store(Some(Arc::new(Closed { end: until.min(now + CLOSED), freed, until })));
        Err(Nobody::Refused(until))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use crate::testing::Set;
    use http::Request;

    /// As those are that routes get at each reload of a configuration.
    #[test]
    fn subsets_and_cookies_that_say_the_same_are_worked_out_once_for_a_snapshot() {
        let (set, request, clock) = (Set::of(&[1; 3]), Request::new(()), Clock::system());
        let (shape, asked) = (Shape::default(), Asked::of(&request));
        let terms = Terms { shape: &shape, subset: None, asked: &asked, tried: &[], clock: &clock };
        let whole = Choice { pick: &Random, terms };
        let viewed = Viewed::new(&set.endpoints, &whole);
        let of = |subset| viewed.subset(&set.endpoints, &whole.within(Some(&subset)));
        assert!(std::ptr::eq(of(Subset::tag("a")), of(Subset::tag("a"))));
        assert!(!std::ptr::eq(of(Subset::tag("a")), of(Subset::tag("a").or_any())));
        assert!(!std::ptr::eq(of(Subset::tag("a")), of(Subset::tag("b"))));
        let cookies = |secret| viewed.cookies(&set.endpoints, &Sticky::cookie("at", [secret; 16]).unwrap());
        assert!(std::ptr::eq(cookies(1), cookies(1)) && !std::ptr::eq(cookies(1), cookies(2)));
    }
}
