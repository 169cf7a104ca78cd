//! The shape of the set: priorities, zones, slow starts, subsets.

use std::sync::Arc;
use std::time::Duration;

use portcullis_core::{Instance, Moment};

/// What a layer wants of every set of endpoints.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    /// Below which share of admitting endpoints gates are not obeyed, in percent.
    pub(crate) panic: u8,
    /// How much more than its even share an endpoint can take, in percent.
    pub(crate) overprovisioning: u32,
    pub(crate) zone: Option<Zone>,
    pub(crate) slow_start: Option<SlowStart>,
}

/// Prefers endpoints in the balancer's own zone, and spills over as far as they are too few.
///
/// Balancers are taken to be spread evenly over the zones, so each zone has one share of the requests; when the own zone has
/// [another](Self::share), the others share the rest evenly. While the own zone holds at least its share of the weight that
/// admits, all requests stay in it; else what it cannot take is spread over the zones that hold more than theirs, as in
/// Envoy's zone aware routing. When no other zone lacks, every endpoint then gets the same rate whatever zone it is in.
/// Endpoints without a zone count as one zone.
#[derive(Clone, Debug)]
pub struct Zone {
    own: Arc<str>,
    share: Option<f64>,
    least: usize,
}

/// Gives an endpoint that has just [joined](portcullis_core::Endpoint::joined) a growing part of its weight.
///
/// After the time `t` it has `weight × max(floor, (t / window)^(1 / aggression))`, as in Envoy. When all have joined
/// together, all are slow together and nothing changes. Policies that [want all](crate::Pick::wants_all) do not see it.
#[derive(Clone, Copy, Debug)]
pub struct SlowStart {
    window: Duration,
    floor: f64,
    aggression: f64,
}

/// Some of a service's endpoints, by tag or metadata. Those that say the same are the same subset, which is worked out once
/// for each set of endpoints.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Subset {
    terms: Arc<[Term]>,
    or_any: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Term {
    Tag(String),
    Metadata(String, String),
}

/// One of the groups a request may be sent to: so many parts of all requests, and the members of the group.
#[derive(Debug, PartialEq)]
pub(crate) struct Split {
    /// Out of 2³².
    pub(crate) share: u64,
    pub(crate) members: Vec<u32>,
    pub(crate) panic: bool,
}

/// What a split is made of.
pub(crate) struct Member<'a> {
    pub(crate) index: u32,
    pub(crate) instance: &'a Instance,
    pub(crate) weight: u32,
    pub(crate) admits: bool,
}

/// How many percent of the requests each priority gets, and whether it panics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) percent: u32,
    pub(crate) panic: bool,
}

pub(crate) const WHOLE: u64 = 1 << 32;
const PANIC: u8 = 50;
const OVERPROVISIONING: u32 = 140;
const LEAST: usize = 6;
const FLOOR: f64 = 0.1;

// === impl Shape ===

impl Default for Shape {
    fn default() -> Self {
        Self { panic: PANIC, overprovisioning: OVERPROVISIONING, zone: None, slow_start: None }
    }
}

impl Shape {
    /// How the requests are split over priorities and zones. With `all`, endpoints that do not admit stay members, and
    /// zones are left out of account.
    pub(crate) fn split(&self, members: &[Member<'_>], all: bool) -> Vec<Split> {
        let mut priorities: Vec<u32> = members.iter().map(|member| member.instance.priority).collect();
        priorities.sort_unstable();
        priorities.dedup();
        let levels: Vec<Vec<&Member<'_>>> = priorities
            .into_iter()
            .map(|priority| members.iter().filter(|member| member.instance.priority == priority).collect())
            .collect();
        let counts: Vec<(usize, usize)> =
            levels.iter().map(|level| (level.iter().filter(|member| member.admits).count(), level.len())).collect();
        let loads = loads(&counts, self.overprovisioning, self.panic);
        let mut splits = Vec::with_capacity(levels.len());
        for (level, load) in levels.iter().zip(loads).filter(|(_, load)| load.percent > 0) {
            let share = u64::from(load.percent) * WHOLE / 100;
            let members = || level.iter().filter(|member| member.admits || load.panic || all);
            match &self.zone {
                Some(zone) if !load.panic && !all => {
                    zone.split(share, &members().copied().collect::<Vec<_>>(), &mut splits)
                }
                _ => splits.push(Split {
                    share,
                    members: members().map(|member| member.index).collect(),
                    panic: load.panic,
                }),
            }
        }
        splits
    }
}

/// The load of each priority, given how many of how many admit there (Envoy's priority levels): as long as those that
/// admit, over-provisioned, make up a whole set, it takes everything; the next one takes the rest. A priority panics when
/// fewer than `panic` percent admit and all priorities together make up no whole set.
pub(crate) fn loads(counts: &[(usize, usize)], overprovisioning: u32, panic: u8) -> Vec<Load> {
    let health = |&(admits, of): &(usize, usize)| match of {
        0 => 0,
        _ if admits == 0 => 0,
        // A few of very many are less than one percent, but they are not none: none would never panic.
        _ => (admits as u64 * u64::from(overprovisioning) / of as u64).clamp(1, 100) as u32,
    };
    let total = counts.iter().map(health).sum::<u32>().min(100);
    let mut left = 100;
    let mut loads: Vec<Load> = counts
        .iter()
        .map(|count| {
            let percent = (health(count) * 100).checked_div(total).unwrap_or(0).min(left);
            left -= percent;
            let panic = total < 100 && count.0 > 0 && count.0 * 100 < count.1 * usize::from(panic);
            Load { percent, panic }
        })
        .collect();
    // What rounding left over goes to the first that takes any.
    if let Some(first) = loads.iter_mut().find(|load| load.percent > 0) {
        first.percent += left;
    }
    loads
}

// === impl Zone ===

impl Zone {
    /// The balancer runs in `own`.
    #[must_use]
    pub fn prefer(own: impl Into<Arc<str>>) -> Self {
        Self { own: own.into(), share: None, least: LEAST }
    }

    /// Which part of all requests to the service comes from this zone, between 0 and 1. By default one part of as many as
    /// there are zones with endpoints.
    #[must_use]
    pub fn share(mut self, share: f64) -> Self {
        self.share = Some(if share.is_finite() { share.clamp(0.01, 1.0) } else { 1.0 });
        self
    }

    /// Of how many endpoints on the zone is looked at. Default 6: of fewer, the loss of one is too much for one zone.
    #[must_use]
    pub const fn least(mut self, endpoints: usize) -> Self {
        self.least = endpoints;
        self
    }

    fn split(&self, share: u64, members: &[&Member<'_>], splits: &mut Vec<Split>) {
        let mut zones: Vec<Option<&str>> = members.iter().map(|member| member.instance.zone.as_deref()).collect();
        zones.sort_unstable();
        zones.dedup();
        let is_in = |member: &Member<'_>, zone: Option<&str>| member.instance.zone.as_deref() == zone;
        let indexes =
            |zone| members.iter().filter(|member| is_in(member, zone)).map(|member| member.index).collect::<Vec<_>>();
        let weight = |members: &mut dyn Iterator<Item = &&Member<'_>>| {
            members.map(|member| f64::from(member.weight)).sum::<f64>()
        };
        let total = weight(&mut members.iter());
        let part = |zone| weight(&mut members.iter().filter(|member| is_in(member, zone))) / total;
        let own = Some(&*self.own);
        let even = self.share.unwrap_or(1.0 / zones.len() as f64);
        let stays = (part(own) / even).min(1.0);
        // What comes from each other zone.
        let others = (1.0 - even) / (zones.len() - 1).max(1) as f64;
        let spare: Vec<f64> = zones.iter().map(|zone| (part(*zone) - others).max(0.0)).collect();
        let spares: f64 = spare.iter().zip(&zones).filter(|(_, zone)| **zone != own).map(|(spare, _)| spare).sum();
        if members.len() < self.least || !zones.contains(&own) || (stays < 1.0 && spares <= 0.0) {
            let members = members.iter().map(|member| member.index).collect();
            splits.push(Split { share, members, panic: false });
            return;
        }
        let local = (share as f64 * stays) as u64;
        splits.push(Split { share: local, members: indexes(own), panic: false });
        for (zone, spare) in zones.into_iter().zip(spare).filter(|(zone, spare)| *zone != own && *spare > 0.0) {
            let part = ((share - local) as f64 * spare / spares) as u64;
            if part > 0 {
                splits.push(Split { share: part, members: indexes(zone), panic: false });
            }
        }
    }
}

// === impl SlowStart ===

impl SlowStart {
    /// Ramps up in a straight line over `window`, from a tenth of the weight.
    #[must_use]
    pub const fn over(window: Duration) -> Self {
        Self { window, floor: FLOOR, aggression: 1.0 }
    }

    /// The part of its weight that an endpoint has from the beginning, between 0 and 1. Default 0.1.
    #[must_use]
    pub fn floor(mut self, part: f64) -> Self {
        self.floor = if part.is_finite() { part.clamp(0.0, 1.0) } else { FLOOR };
        self
    }

    /// Above 1 it grows fast at first, below 1 at last. Default 1; values that are not above zero count as 1.
    #[must_use]
    pub fn aggression(mut self, aggression: f64) -> Self {
        self.aggression = if aggression.is_finite() && aggression > 0.0 { aggression } else { 1.0 };
        self
    }

    /// The part of its weight that an endpoint has which joined then, and whether that still changes.
    pub(crate) fn part(&self, joined: Moment, now: Moment) -> Option<f64> {
        let age = now.since(joined);
        if age >= self.window {
            return None;
        }
        let part = age.as_secs_f64() / self.window.as_secs_f64();
        Some(part.powf(1.0 / self.aggression).max(self.floor))
    }

    /// How often weights are worked out anew while they change.
    pub(crate) fn step(&self) -> Duration {
        (self.window / 50).clamp(Duration::from_millis(20), Duration::from_secs(1))
    }
}

// === impl Subset ===

impl Subset {
    /// Those that have this tag.
    #[must_use]
    pub fn tag(tag: impl Into<String>) -> Self {
        Self::of(Term::Tag(tag.into()))
    }

    /// Those whose metadata have this value at this key.
    #[must_use]
    pub fn metadata(key: impl Into<String>, value: impl Into<String>) -> Self {
        Self::of(Term::Metadata(key.into(), value.into()))
    }

    /// Those that are in both.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        Self { terms: self.terms.iter().chain(&*other.terms).cloned().collect(), or_any: self.or_any || other.or_any }
    }

    /// All endpoints, when there is none in the subset. By default that is refused.
    #[must_use]
    pub fn or_any(&self) -> Self {
        Self { or_any: true, ..self.clone() }
    }

    fn of(term: Term) -> Self {
        Self { terms: [term].into(), or_any: false }
    }

    /// Whether it stands for all, none of these being in it.
    pub(crate) fn falls_back(&self, mut instances: impl Iterator<Item = Arc<Instance>>) -> bool {
        self.or_any && !instances.any(|instance| self.holds(&instance))
    }

    pub(crate) fn holds(&self, instance: &Instance) -> bool {
        self.terms.iter().all(|term| match term {
            Term::Tag(tag) => instance.tags.contains(tag),
            Term::Metadata(key, value) => instance.metadata.get(key) == Some(value),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn percent(counts: &[(usize, usize)]) -> Vec<u32> {
        loads(counts, 140, 50).iter().map(|load| load.percent).collect()
    }

    #[test]
    fn priorities_take_what_they_can() {
        let two = |first| percent(&[(first, 100), (100, 100)]);
        assert_eq!(two(100), [100, 0]);
        assert_eq!(two(72), [100, 0]);
        assert_eq!(two(71), [99, 1]);
        assert_eq!(two(50), [70, 30]);
        assert_eq!(two(25), [35, 65]);
        assert_eq!(two(0), [0, 100]);
        assert_eq!(percent(&[(25, 100), (25, 100)]), [50, 50]);
        assert_eq!(percent(&[(0, 5), (0, 5)]), [0, 0]);
        assert_eq!(percent(&[(25, 100), (25, 100), (100, 100)]), [35, 35, 30]);
        assert_eq!(percent(&[(10, 100), (10, 100), (10, 100)]), [34, 33, 33]);
        assert_eq!(percent(&[(1, 1000)]), [100]);
        assert_eq!(percent(&[(1, 1000), (1000, 1000)]), [1, 99]);
    }

    #[test]
    fn a_priority_panics_only_when_all_together_are_too_few() {
        let panics = |counts: &[_]| loads(counts, 140, 50).iter().map(|load| load.panic).collect::<Vec<_>>();
        assert_eq!(panics(&[(4, 10), (10, 10)]), [false, false]);
        assert_eq!(panics(&[(4, 10)]), [true]);
        assert_eq!(panics(&[(5, 10)]), [false]);
        assert_eq!(panics(&[(4, 10), (2, 10)]), [true, true]);
        assert_eq!(panics(&[(4, 10), (6, 10)]), [false, false]);
        assert_eq!(panics(&[(1, 1000)]), [true]);
        assert_eq!(panics(&[(0, 10)]), [false], "when none admits there is nobody to protect");
        assert!(!loads(&[(4, 10)], 140, 0)[0].panic);
    }

    fn zones(counts: &[(&str, usize)]) -> Vec<Instance> {
        let mut instances = Vec::new();
        for (zone, count) in counts {
            for _ in 0..*count {
                let id = format!("{}", instances.len());
                let mut instance = Instance::new(id, std::net::SocketAddr::from(([10, 0, 0, 1], 1)));
                instance.zone = Some((*zone).into());
                instances.push(instance);
            }
        }
        instances
    }

    fn split(counts: &[(&str, usize)], zone: Zone) -> Vec<(usize, u64)> {
        let instances = zones(counts);
        let members: Vec<_> = (0..)
            .zip(&instances)
            .map(|(index, instance)| Member { index, instance, weight: 1, admits: true })
            .collect();
        let shape = Shape { zone: Some(zone), ..Shape::default() };
        let splits = shape.split(&members, false);
        splits.into_iter().map(|split| (split.members.len(), (split.share * 1000 + WHOLE / 2) / WHOLE)).collect()
    }

    #[test]
    fn requests_stay_in_the_zone_while_it_holds_its_share() {
        assert_eq!(split(&[("a", 3), ("b", 3), ("c", 3)], Zone::prefer("a")), [(3, 1000)]);
        assert_eq!(split(&[("a", 6), ("b", 2), ("c", 2)], Zone::prefer("a")), [(6, 1000)]);
    }

    #[test]
    fn what_the_zone_cannot_take_goes_where_there_is_room_and_every_endpoint_has_the_same_rate() {
        // a holds 2 of 10 and has a third of the requests: 60 % stay.
        assert_eq!(split(&[("a", 2), ("b", 4), ("c", 4)], Zone::prefer("a")), [(2, 600), (4, 200), (4, 200)]);
        assert_eq!(split(&[("a", 2), ("b", 7), ("c", 1)], Zone::prefer("a")), [(2, 600), (7, 400)]);
    }

    #[test]
    fn a_zone_with_a_larger_share_of_the_requests_sends_away_what_it_cannot_take() {
        let from = |own, share| split(&[("a", 10), ("b", 5), ("c", 5)], Zone::prefer(own).share(share));
        // a has six tenths of the requests and half of the endpoints; b and c have a tenth of them each to spare.
        assert_eq!(from("a", 0.6), [(10, 833), (5, 83), (5, 83)]);
        assert_eq!(from("b", 0.2), [(5, 1000)]);
        assert_eq!(split(&[("a", 6)], Zone::prefer("a").share(0.6)), [(6, 1000)]);
    }

    #[test]
    fn few_endpoints_or_a_zone_without_any_are_one_group() {
        assert_eq!(split(&[("a", 1), ("b", 2), ("c", 2)], Zone::prefer("a")), [(5, 1000)]);
        assert_eq!(split(&[("a", 1), ("b", 2), ("c", 2)], Zone::prefer("a").least(1)).len(), 3);
        assert_eq!(split(&[("b", 4), ("c", 4)], Zone::prefer("a")), [(8, 1000)]);
    }

    #[test]
    fn a_start_is_slow_and_ends() {
        let start = SlowStart::over(Duration::from_secs(10));
        let part = |start: &SlowStart, seconds| {
            start.part(Moment::MIN, Moment::MIN + Duration::from_secs(seconds)).map(|part| (part * 100.0).round())
        };
        assert_eq!([0, 1, 5, 9, 10].map(|t| part(&start, t)), [Some(10.0), Some(10.0), Some(50.0), Some(90.0), None]);
        let fast = start.aggression(2.0).floor(0.0);
        assert_eq!([0, 1, 5].map(|t| part(&fast, t)), [Some(0.0), Some(32.0), Some(71.0)]);
    }
}
