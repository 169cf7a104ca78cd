//! The table against a model, against governor, and under threads. `PORTCULLIS_CASES` sets how many histories.

use super::set::{BEHIND, Back, Front, IN_FRONT};
use super::*;
use crate::rate::Cell;
use crate::sync::{AtomicU64, Ordering};
use std::collections::HashMap;

const INTERVAL: u64 = 10;
const START: u64 = 1 << 52;

fn one_set() -> Table {
    Table::new(1)
}

fn take(table: &Table, key: u64, now: u64, cost: u64, window: u64) -> Result<Charged, u64> {
    let mark = table.mark(Span::default(), &key.to_le_bytes());
    table.charge(mark, now, |time| Cell::charge(time, now, cost, window))
}

/// Cases for the property tests: `PORTCULLIS_CASES` or the usual few.
fn cases(usual: u32) -> proptest::prelude::ProptestConfig {
    let cases = std::env::var("PORTCULLIS_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(usual);
    proptest::prelude::ProptestConfig { cases, failure_persistence: None, ..Default::default() }
}

#[test]
fn a_front_is_one_line_and_a_key_takes_sixty_four_bytes() {
    assert_eq!((size_of::<Front>(), align_of::<Front>(), size_of::<Back>()), (64, 64, 128));
    let table = Table::new(3 << 16);
    assert_eq!(table.bytes(), 0, "nothing before it is used");
    let mark = table.mark(Span::default(), b"x");
    let _ = table.peek(mark);
    assert_eq!(table.bytes(), 192 << 16);
}

#[test]
fn a_key_keeps_its_debt_while_others_come_and_go() {
    let table = one_set();
    assert!(take(&table, 0, START, 50, 50).is_ok());
    for key in 1..1000 {
        let _ = take(&table, key, START + 49, 1, 1);
    }
    assert_eq!(take(&table, 0, START + 49, 50, 50), Err(START + 50));
    assert!(take(&table, 0, START + 50, 50, 50).is_ok());
}

#[test]
fn newcomers_share_a_bucket_while_every_entry_is_in_use() {
    let table = one_set();
    for key in 0..(IN_FRONT + BEHIND) as u64 {
        assert!(!take(&table, key, START, INTERVAL, 3 * INTERVAL).unwrap().overflow);
    }
    assert_eq!(table.fill(START), Fill { live: 14, entries: 14, overflowing: 0, sets: 1 });
    for key in 100..103 {
        assert!(take(&table, key, START, INTERVAL, 3 * INTERVAL).unwrap().overflow);
    }
    assert_eq!(take(&table, 103, START, INTERVAL, 3 * INTERVAL), Err(START + 3 * INTERVAL));
    assert!(take(&table, 0, START, INTERVAL, 3 * INTERVAL).is_ok(), "who has an entry keeps it");
    assert_eq!(table.fill(START).overflowing, 1);
    // An entry that is over goes to the next newcomer, who starts where the bucket stands.
    let later = START + INTERVAL + 1;
    assert_eq!(
        take(&table, 104, later, INTERVAL, 3 * INTERVAL),
        Ok(Charged { time: START + 4 * INTERVAL, overflow: false })
    );
}

#[test]
fn a_refund_gives_back_what_a_charge_took() {
    let table = one_set();
    assert!(take(&table, 1, START, 30, 30).is_ok());
    table.refund(table.mark(Span::default(), &1_u64.to_le_bytes()), 10);
    assert_eq!(table.peek(table.mark(Span::default(), &1_u64.to_le_bytes())), START + 20);
    assert!(take(&table, 1, START, 10, 30).is_ok());
    table.refund(table.mark(Span::default(), &2_u64.to_le_bytes()), 10);
}

#[derive(Clone, Copy, Debug)]
struct Step {
    key: u64,
    wait: u64,
    /// How far this caller's clock is behind.
    late: u64,
    cost: u64,
    refund: bool,
}

fn steps(keys: u64) -> impl proptest::strategy::Strategy<Value = Vec<Step>> {
    use proptest::prelude::*;
    let step = (0..keys, 0_u64..8, 0_u64..20, 1_u64..4, proptest::bool::weighted(0.1));
    let step = step.prop_map(|(key, wait, late, cost, refund)| Step { key, wait, late, cost, refund });
    proptest::collection::vec(step, 1..120)
}

proptest::proptest! {
    #![proptest_config(cases(2000))]

    /// However few entries there are, and however late a clock, no key is admitted what it would not be alone.
    #[test]
    fn no_debt_is_forgotten(steps in steps(25)) {
        let (table, window) = (one_set(), 5 * INTERVAL);
        let (mut now, mut debts) = (START, HashMap::<u64, u64>::new());
        for Step { key, wait, late, cost, refund } in steps {
            now += wait;
            let (now, cost) = (now - late, cost * INTERVAL);
            let debt = debts.entry(key).or_default();
            if let Ok(charged) = take(&table, key, now, cost, window) {
                let alone = Cell::charge(*debt, now, cost, window);
                proptest::prop_assert!(alone.is_some(), "admitted with a debt of {} at {}", *debt, now);
                if refund && !charged.overflow {
                    table.refund(table.mark(Span::default(), &key.to_le_bytes()), cost);
                } else {
                    *debt = alone.unwrap();
                }
            }
        }
    }

    /// As long as there are entries enough, each key is admitted exactly what it would be alone.
    #[test]
    fn each_key_is_as_if_alone(steps in steps(14)) {
        let (table, window) = (one_set(), 5 * INTERVAL);
        let (mut now, mut debts) = (START, HashMap::<u64, u64>::new());
        for Step { key, wait, cost, .. } in steps {
            now += wait;
            let debt = debts.entry(key).or_default();
            let alone = Cell::charge(*debt, now, cost * INTERVAL, window);
            proptest::prop_assert_eq!(take(&table, key, now, cost * INTERVAL, window).is_ok(), alone.is_some());
            *debt = alone.unwrap_or(*debt);
        }
    }

    /// Where governor has the same question, it has the same answer. Only divisors of a second: it rounds the interval
    /// down, we round it up.
    #[test]
    fn governor_agrees(waits in proptest::collection::vec(0_u64..300, 1..100), count in proptest::sample::select(vec![1_u32, 2, 4, 5, 8, 10, 16, 20, 25, 40, 50, 100]), burst in 1_u32..20) {
        use governor::clock::FakeRelativeClock;
        use governor::{Quota, RateLimiter};
        use std::num::NonZeroU32;
        let (count, burst) = (NonZeroU32::new(count).unwrap(), NonZeroU32::new(burst).unwrap());
        let clock = FakeRelativeClock::default();
        let theirs = RateLimiter::direct_with_clock(Quota::per_second(count).allow_burst(burst), clock.clone());
        let (table, cell) = (one_set(), crate::Rate::per_second(count).burst(burst).cell());
        let mut now = START;
        for wait in waits {
            now += wait * 1_000_000;
            clock.advance(std::time::Duration::from_millis(wait));
            let ours = take(&table, 1, now, cell.interval, cell.window).is_ok();
            proptest::prop_assert_eq!(ours, theirs.check().is_ok());
        }
    }
}

/// Threads on one set, with more keys than it has entries and a clock that moves: no key has more than its share.
#[test]
fn threads_never_exceed_any_share() {
    const KEYS: usize = 24;
    let rounds = std::env::var("PORTCULLIS_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(20_000);
    let (table, clock) = (one_set(), AtomicU64::new(START));
    let admitted: [AtomicU64; KEYS] = std::array::from_fn(|_| AtomicU64::new(0));
    let (interval, window) = (1000, 5000);
    std::thread::scope(|scope| {
        for seed in 0..4_u64 {
            let (table, clock, admitted) = (&table, &clock, &admitted);
            scope.spawn(move || {
                let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
                for _ in 0..rounds {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    let key = random % KEYS as u64;
                    let now = clock.fetch_add(random >> 32 & 63, Ordering::Relaxed);
                    if take(table, key, now, interval, window).is_ok() {
                        admitted[key as usize].fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let elapsed = clock.load(Ordering::Relaxed) - START;
    for admitted in admitted {
        assert!(admitted.load(Ordering::Relaxed) <= 5 + elapsed / interval);
    }
}
