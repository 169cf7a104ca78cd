//! What the gates of a snapshot let one pick from, worked out once for many requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use portcullis_core::{Clock, Endpoint, Endpoints, Moment, Permit, Refused};

use crate::group::Group;
use crate::pick::{Asked, Candidates, Pick, mix, scale};

/// What a layer wants of a view, the same for all its requests.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    /// Below which share of admitting endpoints gates are not obeyed, in percent.
    pub(crate) panic: u8,
}

/// The view that a snapshot has just now.
pub(crate) struct Viewed {
    view: ArcSwap<View>,
    deriving: AtomicBool,
}

/// Which of a snapshot's endpoints can be picked. It may be a little old: what is picked is asked again at its gate.
#[derive(Debug)]
pub(crate) struct View {
    moves: u64,
    derived: Moment,
    group: Arc<Group>,
    /// Whose gates do not let everybody in.
    rationed: Box<[u32]>,
    panic: bool,
}

/// Why there is nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nobody {
    /// There are no endpoints.
    Empty,
    /// None admits; the earliest may at that time.
    Refused(Moment),
}

/// How often a policy is asked again when what it picked does not admit.
const ASKED: usize = 4;
/// One request in so many looks first whether an endpoint with a rationed gate can be tried, so that probes do not wait
/// for a policy to pick an endpoint that it avoids.
const PROBES: usize = 4;
/// How long a view is kept for each of its endpoints, though gates moved meanwhile.
const KEPT: Duration = Duration::from_micros(1);

// === impl Viewed ===

impl Viewed {
    pub(crate) fn new<P: Pick>(endpoints: &Endpoints, shape: &Shape, pick: &P) -> Self {
        let view = View::derive(endpoints, shape, pick, Moment::MIN, None);
        Self { view: ArcSwap::from_pointee(view), deriving: AtomicBool::new(false) }
    }

    /// Asks `pick` for an endpoint that admits and is not among `tried`, and enters its gate.
    pub(crate) fn choose<P: Pick>(
        &self,
        endpoints: &Endpoints,
        shape: &Shape,
        pick: &P,
        asked: Asked<'_>,
        tried: &[Endpoint],
        clock: &Clock,
    ) -> Result<(Permit, Option<Moment>), Nobody> {
        let mut view = self.view.load();
        if view.moves != endpoints.moves() {
            self.refresh(endpoints, shape, pick, clock.now());
            view = self.view.load();
        }
        view.choose(endpoints, pick, asked, tried, clock)
    }

    #[cold]
    fn refresh<P: Pick>(&self, endpoints: &Endpoints, shape: &Shape, pick: &P, now: Moment) {
        let old = self.view.load();
        let kept = KEPT * u32::try_from(endpoints.len()).unwrap_or(u32::MAX);
        if now.since(old.derived) < kept || self.deriving.swap(true, Ordering::Acquire) {
            return;
        }
        self.view.store(Arc::new(View::derive(endpoints, shape, pick, now, Some(&old))));
        self.deriving.store(false, Ordering::Release);
    }
}

// === impl View ===

impl View {
    fn derive<P: Pick>(endpoints: &Endpoints, shape: &Shape, pick: &P, now: Moment, old: Option<&Self>) -> Self {
        // Before the gates are looked at: a move meanwhile makes the view old at once.
        let moves = endpoints.moves();
        let weighted = || (0_u32..).zip(endpoints.iter()).filter(|(_, endpoint)| endpoint.weight() > 0);
        let all: Vec<(u32, u32)> = weighted().map(|(i, endpoint)| (i, endpoint.weight())).collect();
        let admits = |i: u32| endpoints[i as usize].gate().admits();
        let rationed: Box<[u32]> = all.iter().map(|member| member.0).filter(|i| !admits(*i)).collect();
        let admitting = all.len() - rationed.len();
        let panic = admitting > 0 && admitting * 100 < all.len() * usize::from(shape.panic);
        let members = if panic || pick.wants_all() || rationed.is_empty() {
            all
        } else {
            all.into_iter().filter(|member| admits(member.0)).collect()
        };
        if let Some(old) = old
            && old.panic != panic
        {
            let service = &**endpoints.service();
            tracing::info!(service, admitting, of = endpoints.len(), panic, "panic threshold crossed");
        }
        let group = match old {
            Some(old) if old.group.is_of(&members, endpoints.len()) => old.group.clone(),
            _ => Arc::new(Group::new(&members, endpoints.len())),
        };
        Self { moves, derived: now, group, rationed, panic }
    }

    fn choose<P: Pick>(
        &self,
        endpoints: &Endpoints,
        pick: &P,
        asked: Asked<'_>,
        tried: &[Endpoint],
        clock: &Clock,
    ) -> Result<(Permit, Option<Moment>), Nobody> {
        let among = Candidates::new(endpoints, &self.group, asked, tried, clock);
        let now = || among.now();
        let observed = || pick.observes().then(now);
        if !self.rationed.is_empty()
            && !pick.wants_all()
            && !self.panic
            && among.random_below(PROBES) == 0
            && let Some(i) = self.rationed.get(among.random_below(self.rationed.len()))
            && let endpoint = &endpoints[*i as usize]
            && !among.is_tried(endpoint)
            && let Ok(permit) = endpoint.permit(now)
        {
            return Ok((permit, observed()));
        }
        if among.len() > 0 {
            for _ in 0..ASKED {
                let Some(i) = pick.pick(&among).filter(|i| *i < among.len()) else { break };
                let endpoint = &among[i];
                if among.is_tried(endpoint) {
                    among.skip(i);
                    continue;
                }
                match endpoint.permit(now) {
                    Ok(permit) => return Ok((permit, observed())),
                    Err(_) if self.panic => return Ok((endpoint.permit_by_force(), observed())),
                    Err(_) => among.skip(i),
                }
            }
        }
        self.scan(endpoints, &among, tried).map(|permit| (permit, observed()))
    }

    /// The first that admits, from anywhere; then also what was tried before.
    #[cold]
    fn scan(&self, endpoints: &Endpoints, among: &Candidates<'_>, tried: &[Endpoint]) -> Result<Permit, Nobody> {
        let start = scale(mix(among.random()), endpoints.len());
        let from = |start: usize| endpoints.iter().cycle().skip(start).take(endpoints.len());
        let mut earliest = None;
        for again in [false, true] {
            for endpoint in from(start).filter(|endpoint| endpoint.weight() > 0 && tried.contains(endpoint) == again) {
                match endpoint.permit(|| among.now()) {
                    Ok(permit) => return Ok(permit),
                    Err(_) if self.panic => return Ok(endpoint.permit_by_force()),
                    Err(Refused { until }) => earliest = Some(earliest.map_or(until, |at: Moment| at.min(until))),
                }
            }
        }
        Err(earliest.map_or(Nobody::Empty, Nobody::Refused))
    }
}
