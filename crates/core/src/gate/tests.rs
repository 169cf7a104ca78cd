//! A gate against what it is meant to be.

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
fn a_lost_place_is_replaced_and_its_late_return_adds_none() {
    let (gate, mover) = (gate(), Mover::new());
    gate.ration(mover, Generation::FIRST, Ration { until: at(0), places: 1, every: 5 * S }).unwrap();
    let lost = gate.pass(|| at(1)).unwrap();
    assert!(gate.pass(|| at(5)).is_err());
    assert!(!gate.has_lost(lost.entry(), at(5)) && gate.has_lost(lost.entry(), at(6)));
    let fresh = gate.pass(|| at(6)).unwrap();
    assert!(gate.has_lost(lost.entry(), at(6)) && !gate.has_lost(fresh.entry(), at(6)));
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
    let since = gate.ration(breaker, gate.last_move(breaker), Ration { until: at(10), places: 1, every: S }).unwrap();
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

#[test]
fn places_that_are_out_stay_counted_whatever_is_moved() {
    let (gate, breaker, drain) = (gate(), Mover::new(), Mover::new());
    let ration = Ration { until: at(0), places: 1, every: 10 * S };
    let since = gate.ration(breaker, Generation::FIRST, ration).unwrap();
    let out = gate.pass(|| at(1)).unwrap();
    gate.close_for(drain);
    gate.open_for(drain);
    assert_eq!(gate.pass(|| at(2)).unwrap_err(), Refused { until: at(11) }, "another's move made a second place");
    gate.ration(breaker, since, ration).unwrap();
    assert!(gate.pass(|| at(3)).is_err(), "its own move made a second place");
    drop(out);
    assert!(gate.pass(|| at(3)).is_ok());
}

#[test]
fn a_place_taken_late_is_not_lost_early() {
    let (gate, mover) = (gate(), Mover::new());
    gate.ration(mover, Generation::FIRST, Ration { until: at(0), places: 1, every: 10 * S }).unwrap();
    drop(gate.pass(|| at(0)).unwrap());
    let _late = gate.pass(|| at(9)).unwrap();
    assert_eq!(gate.pass(|| at(10)).unwrap_err(), Refused { until: at(19) });
}

#[test]
fn a_ration_without_places_is_not_a_matter_of_time() {
    let (gate, mover) = (gate(), Mover::new());
    gate.ration(mover, Generation::FIRST, Ration { until: at(1), places: 0, every: S }).unwrap();
    assert_eq!(gate.peek(|| at(9)), Err(Refused { until: Moment::MAX }));
    assert_eq!(gate.pass(|| at(9)).unwrap_err(), Refused { until: Moment::MAX });
}

#[test]
fn who_is_forgotten_objects_no_more() {
    let (gate, gone, stays) = (gate(), Mover::new(), Mover::new());
    gate.close_for(gone);
    gate.close_for(stays);
    gate.forget(gone);
    assert!(!gate.admits());
    gate.forget(stays);
    assert!(gate.admits());
    assert!(lock(&gate.rest.book).votes.is_empty());
    gate.forget(stays);
}

/// What a gate is meant to be, with no thought for speed.
#[derive(Default)]
struct Naive {
    votes: [Option<Ration>; 3],
    /// When each place was taken, and for how long at most.
    out: Vec<(u64, Moment, Duration)>,
}

impl Naive {
    fn enter(&mut self, id: u64, now: Moment) -> Result<bool, Moment> {
        let votes = || self.votes.iter().flatten();
        if votes().count() == 0 {
            return Ok(false);
        }
        let until = votes().map(|ration| ration.until).max().unwrap();
        let places = votes().map(|ration| ration.places).min().unwrap();
        let every = votes().map(|ration| ration.every).max().unwrap();
        if places == 0 {
            return Err(Moment::MAX);
        }
        if now < until {
            return Err(until);
        }
        let young = || self.out.iter().map(|(_, taken, every)| *taken + *every).filter(|lost| *lost > now);
        if young().count() >= usize::from(places) {
            return Err(young().min().unwrap());
        }
        self.out.push((id, now, every));
        Ok(true)
    }
}

/// What may happen to a gate: which thing, to whom, with which number.
type Step = (u8, usize, u64);

fn live(steps: Vec<Step>) -> Result<(), proptest::test_runner::TestCaseError> {
    let (gate, movers) = (gate(), [Mover::new(), Mover::new(), Mover::new()]);
    let (mut naive, mut inside, mut now) = (Naive::default(), Vec::<(u64, Pass)>::new(), 0);
    for (id, (step, who, number)) in (0..).zip(steps) {
        let mover = movers[who % 3];
        match step {
            0..=4 => {
                let (peeked, got) = (gate.peek(|| at(now)), gate.pass(|| at(now)));
                proptest::prop_assert!(got.is_ok() || peeked.is_ok() || peeked == Err(*got.as_ref().unwrap_err()));
                proptest::prop_assert!(got.is_err() || peeked.is_ok(), "what is refused to the eye is not admitted");
                let expected = naive.enter(id, at(now));
                proptest::prop_assert_eq!(got.as_ref().map(Pass::is_rationed).map_err(|r| r.until), expected);
                inside.extend(got.ok().map(|pass| (id, pass)));
            }
            5 | 6 if !inside.is_empty() => {
                let (id, _) = inside.swap_remove(who % inside.len());
                naive.out.retain(|(other, ..)| *other != id);
            }
            7 => {
                let (until, places) = (at(now + number), (who / 3 % 4) as u16);
                let ration = Ration { until, places, every: (1 + number as u32) * S };
                gate.ration(mover, gate.last_move(mover), ration).unwrap();
                naive.votes[who % 3] = Some(ration);
            }
            8 => {
                gate.admit(mover, gate.last_move(mover)).unwrap();
                naive.votes[who % 3] = None;
            }
            9 => {
                gate.forget(mover);
                naive.votes[who % 3] = None;
            }
            _ => now += number,
        }
        proptest::prop_assert_eq!(gate.admits(), naive.votes.iter().flatten().count() == 0);
    }
    Ok(())
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config {
        // All of them: PORTCULLIS_HISTORIES=1000000 cargo test -p portcullis-core --release gate
        cases: std::env::var("PORTCULLIS_HISTORIES").ok().and_then(|n| n.parse().ok()).unwrap_or(2_000),
        ..Default::default()
    })]

    #[test]
    fn a_gate_is_what_it_is_meant_to_be(
        steps in proptest::collection::vec((0_u8..12, 0_usize..24, 0_u64..6), 1..100),
    ) {
        live(steps)?;
    }
}
