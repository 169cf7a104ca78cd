//! Which endpoint is chosen, through the public interface, without requests.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on panics")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::Request;
use portcullis_balance::{Asked, BalanceLayer, HashKey, Maglev, Pick, Policy, Random, Rendezvous, RingHash, Subset};
use portcullis_core::{Clock, Endpoint, Endpoints, Generation, Instance, Moment, Mover, Ration};

fn described(n: u16, describe: impl Fn(u16, &mut Instance)) -> Endpoints {
    let instance = |i| {
        let mut instance = Instance::new(format!("{i}"), SocketAddr::from(([10, 0, 0, 1], 1000 + i)));
        describe(i, &mut instance);
        instance
    };
    Endpoints::none("s").reconcile((0..n).map(instance), Moment::MIN)
}

fn asking(key: usize) -> Request<()> {
    Request::get(format!("/{key}")).body(()).unwrap()
}

/// Lets one at a time in.
fn half_open(endpoint: &Endpoint) {
    let ration = Ration { until: Moment::MIN, places: 1, every: Duration::from_secs(60) };
    endpoint.gate().ration(Mover::new(), Generation::FIRST, ration).unwrap();
}

/// How often each endpoint is picked, for as many keys.
fn shares<P: Pick>(layer: &BalanceLayer<P>, set: &Endpoints, keys: usize) -> Vec<usize> {
    let mut seen = vec![0; set.len()];
    for key in 0..keys {
        let permit = layer.choose(set, Asked::of(&asking(key))).unwrap();
        seen[set.iter().position(|endpoint| endpoint == permit.endpoint()).unwrap()] += 1;
    }
    seen
}

fn policies() -> [(&'static str, Arc<dyn Pick>); 4] {
    [
        ("random", Arc::new(Random)),
        ("Maglev", Arc::new(Maglev::by(HashKey::path()))),
        ("ring hash", Arc::new(RingHash::by(HashKey::path()))),
        ("rendezvous", Arc::new(Rendezvous::by(HashKey::path()))),
    ]
}

#[test]
fn a_priority_that_was_left_out_as_a_whole_is_probed() {
    let set = described(4, |i, instance| instance.priority = u32::from(i >= 2));
    set[..2].iter().for_each(half_open);
    for (name, policy) in policies() {
        let layer = BalanceLayer::new(policy);
        layer.prepare(&set);
        let seen = shares(&layer, &set, 2000);
        assert!(seen[..2].iter().all(|probes| (100..500).contains(probes)), "{name}: {seen:?}");
    }
}

#[test]
fn a_priority_is_probed_while_another_panics() {
    let set = described(12, |i, instance| instance.priority = u32::from(i >= 2));
    set[..2].iter().for_each(half_open);
    set[2..8].iter().for_each(|endpoint| endpoint.gate().close_for(Mover::new()));
    for (name, policy) in policies() {
        let layer = BalanceLayer::new(policy);
        layer.prepare(&set);
        let seen = shares(&layer, &set, 2000);
        assert!(seen[2..8].iter().all(|forced| *forced > 50), "{name} does not panic: {seen:?}");
        assert!(seen[..2].iter().all(|probes| (100..500).contains(probes)), "{name}: {seen:?}");
    }
}

/// Whoever holds them knows why; the others are well, and not too few.
#[test]
fn what_is_held_by_hand_is_not_tried_in_a_panic_and_makes_none() {
    let set = described(4, |_, _| {});
    set[..3].iter().for_each(|endpoint| endpoint.gate().hold_for(Mover::new()));
    for (name, policy) in policies() {
        let layer = BalanceLayer::new(policy);
        layer.prepare(&set);
        assert_eq!(shares(&layer, &set, 1000), [0, 0, 0, 1000], "{name}");
    }
}

/// The walk through a table that names it nearly always does not lead past it.
#[test]
fn keys_of_a_heavy_endpoint_that_does_not_admit_stay_together() {
    let set = described(4, |i, instance| instance.weight = if i == 0 { 3000 } else { 1 });
    set[0].gate().close_for(Mover::new());
    for (name, policy) in &policies()[1..] {
        let layer = BalanceLayer::new(policy.clone()).panic_threshold(0);
        layer.prepare(&set);
        let chosen = |key: usize| layer.choose(&set, Asked::of(&asking(key))).unwrap().endpoint().handle();
        assert_eq!((0..1000).filter(|key| chosen(*key) != chosen(*key)).count(), 0, "{name}");
        let seen = shares(&layer, &set, 3000);
        assert!(seen[1..].iter().all(|seen| (900..1100).contains(seen)), "{name}: {seen:?}");
    }
}

#[test]
fn each_subset_and_priority_has_the_table_of_its_own_until_the_next_is_laid() {
    let even = |i: u16| i.is_multiple_of(2);
    let parity = |i| if even(i) { "even" } else { "odd" };
    let tagged = described(400, |i, instance| instance.tags.push(parity(i).into()));
    let ranked = described(400, |i, instance| instance.priority = u32::from(!even(i)));
    let policy = Arc::new(Maglev::by(HashKey::path()).size(1_000_000));
    let of = |tag| BalanceLayer::new(policy.clone()).policy(Policy::new().subset(Subset::tag(tag)));
    let requests: Vec<_> = (0..300).map(asking).collect();
    for (set, layers) in [(tagged, vec![of("even"), of("odd")]), (ranked, vec![BalanceLayer::new(policy.clone())])] {
        // With priorities, half of the first must be out or the second has nothing to do.
        set.iter().step_by(4).filter(|endpoint| endpoint.instance().tags.is_empty()).for_each(|endpoint| {
            endpoint.gate().close_for(Mover::new());
        });
        layers.iter().rev().for_each(|layer| layer.prepare(&set));
        let all = |set: &Endpoints| -> Vec<_> {
            let chosen = |(layer, request)| BalanceLayer::choose(layer, set, Asked::of(request));
            let pairs = layers.iter().flat_map(|layer| requests.iter().map(move |request| (layer, request)));
            pairs.map(|pair| chosen(pair).unwrap().endpoint().handle()).collect()
        };
        let before = all(&set);
        let stay = set[..398].iter().map(|endpoint| (*endpoint.instance()).clone()).collect::<Vec<_>>();
        let gone = [set[398].handle(), set[399].handle()];
        let less = set.reconcile(stay, Moment::MIN);
        for _ in 0..2 {
            let moved = before.iter().zip(all(&less)).filter(|(a, b)| !gone.contains(a) && *a != b).count();
            assert!(moved * 20 < before.len(), "{moved} of {} keys moved needlessly", before.len());
        }
    }
}

#[test]
fn who_is_refused_hears_the_time_and_a_place_that_comes_back_is_given_away_at_once() {
    let (clock, _hand) = Clock::manual();
    let layer = BalanceLayer::new(Random).clock(clock.clone());
    let choose = |set: &Endpoints| layer.choose(set, Asked::of(&asking(0)));
    let set = described(20, |_, _| {});
    set[..19].iter().for_each(|endpoint| endpoint.gate().close_for(Mover::new()));
    let ration = Ration { until: clock.now() + Duration::from_secs(5), places: 1, every: Duration::from_secs(60) };
    set[19].gate().ration(Mover::new(), Generation::FIRST, ration).unwrap();
    for _ in 0..3 {
        assert_eq!(choose(&set).err().unwrap().retry_after(), Some(Duration::from_secs(5)));
    }
    let set = described(2, |_, _| {});
    set.iter().for_each(half_open);
    let both = [choose(&set).unwrap(), choose(&set).unwrap()];
    for permit in both {
        assert!(choose(&set).is_err() && choose(&set).is_err());
        let endpoint = permit.endpoint().clone();
        drop(permit);
        assert_eq!(*choose(&set).unwrap().endpoint(), endpoint);
        std::mem::forget(endpoint.permit(|| clock.now()));
    }
}
