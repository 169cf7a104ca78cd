//! The script in a real Redis, on a clock that is set forward and back.

use portcullis_testing::Redis;
use redis::aio::MultiplexedConnection;

use crate::rate::Cell;

const START: u64 = 1_800_000_000_000_000;
/// Ticks of the script in a microsecond.
const TICKS: u64 = 16;

/// The script, which takes the time from a key instead of the machine.
struct Stepped {
    script: redis::Script,
    connection: MultiplexedConnection,
}

impl Stepped {
    async fn on(redis: &Redis) -> Self {
        let text = include_str!("script.lua");
        let script = text.replace("redis.call('TIME')", "redis.call('MGET', 'seconds', 'micros')");
        assert_ne!(script, text);
        let client = redis::Client::open(redis.url()).unwrap();
        Self {
            script: redis::Script::new(&script),
            connection: client.get_multiplexed_async_connection().await.unwrap(),
        }
    }

    async fn set(&mut self, micros: u64) {
        let mut set = redis::cmd("MSET");
        set.arg("seconds").arg(micros / 1_000_000).arg("micros").arg(micros % 1_000_000);
        set.exec_async(&mut self.connection).await.unwrap();
    }

    /// Charges each key so many units of a cell, with a debt in units before: what the script says of all.
    async fn charge(&mut self, asks: &[(&str, Cell, u32, u64, u8)]) -> Vec<u64> {
        let mut call = self.script.prepare_invoke();
        call.arg(LIFE * TICKS);
        for (key, cell, units, debt, flags) in asks {
            call.key(*key).arg(cell.interval * TICKS).arg(cell.window * TICKS).arg(*units).arg(0).arg(1).arg("").arg(0);
            call.arg("none").arg(debt * cell.interval * TICKS).arg(*flags).arg(0);
        }
        call.invoke_async(&mut self.connection).await.unwrap()
    }

    /// Asks for one unit and a lease; reports another one. Whether it was admitted, and what was leased.
    async fn take(&mut self, cell: Cell, want: u32, report: Option<(&str, u64)>, lease: &str) -> (bool, u64) {
        let (old, used) = report.unwrap_or_default();
        let mut call = self.script.prepare_invoke();
        call.arg(LIFE * TICKS).key("key").arg(cell.interval * TICKS).arg(cell.window * TICKS).arg(1).arg(want);
        call.arg(1).arg(old).arg(used * cell.interval * TICKS).arg(lease).arg(0).arg(0).arg(0);
        let reply: Vec<u64> = call.invoke_async(&mut self.connection).await.unwrap();
        (reply[0] == 1, reply[1])
    }
}

/// Microseconds, so many that no key expires while a test runs: that the machine's own clock decides.
const MINUTE: u64 = 60_000_000;
const CELL: Cell = Cell { interval: MINUTE, window: 10 * MINUTE };
const LIFE: u64 = 1000 * MINUTE;

#[tokio::test]
async fn a_clock_that_steps_admits_what_passed_on_it_and_a_step_back_is_no_time() {
    let redis = Redis::start().await;
    let mut script = Stepped::on(&redis).await;
    let mut random = fastrand::Rng::with_seed(6);
    let (mut shown, mut passed, mut debt, mut admitted) = (START, START, 0, [0, 0]);
    for _ in 0..3000 {
        let step = random.u64(0..MINUTE);
        if random.u8(..) < 40 {
            // From a moment to hours.
            shown -= step * random.choice([1, 10, 100]).unwrap();
        } else {
            (shown, passed) = (shown + step, passed + step);
        }
        script.set(shown).await;
        let alone = Cell::charge(debt, passed, CELL.interval, CELL.window);
        assert_eq!(
            script.take(CELL, 0, None, "none").await.0,
            alone.is_some(),
            "{} ahead",
            debt.saturating_sub(passed)
        );
        debt = alone.unwrap_or(debt);
        admitted[usize::from(alone.is_some())] += 1;
    }
    assert!(admitted.iter().all(|&count| count > 100), "{admitted:?}");
}

#[tokio::test]
async fn a_lease_that_a_step_forward_ends_is_charged_whole_and_not_twice() {
    let redis = Redis::start().await;
    let mut script = Stepped::on(&redis).await;
    script.set(START).await;
    assert_eq!(script.take(CELL, 4, None, "a").await, (true, 4));
    // The lease is over for the store, and not for the process that has it: all of it counts from when it ended.
    script.set(START + LIFE).await;
    for _ in 0..6 {
        assert!(script.take(CELL, 0, None, "none").await.0);
    }
    assert!(!script.take(CELL, 0, Some(("a", 4)), "none").await.0, "ten in all, four of them leased");
}

#[tokio::test]
async fn a_lease_is_withheld_no_longer_after_a_step_back() {
    let redis = Redis::start().await;
    let mut script = Stepped::on(&redis).await;
    script.set(START).await;
    assert_eq!(script.take(CELL, 9, None, "a").await, (true, 4));
    let stepped = START - 50 * LIFE;
    script.set(stepped).await;
    for _ in 0..5 {
        assert!(script.take(CELL, 0, None, "none").await.0);
    }
    assert!(!script.take(CELL, 0, None, "none").await.0, "one, four leased, five");
    // Its life on the clock as it goes now, and a bit: what was leased is charged, and there is room again.
    script.set(stepped + LIFE).await;
    for _ in 0..6 {
        assert!(script.take(CELL, 0, None, "none").await.0);
    }
    assert!(!script.take(CELL, 0, None, "none").await.0, "four that ended just now, six");
}

#[tokio::test]
async fn a_key_that_is_named_twice_is_charged_for_both() {
    let redis = Redis::start().await;
    let mut script = Stepped::on(&redis).await;
    script.set(START).await;
    let ahead = |units: u64| units * MINUTE * TICKS;
    let (debt, ask) = (("key", CELL, 0, 3, 2), ("key", CELL, 1, 0, 0));
    assert_eq!(script.charge(&[debt, ask]).await[5..], [0, ahead(4), 0, 0], "a debt beside a question");
    assert_eq!(script.charge(&[ask, ask]).await[5..], [0, ahead(6), 0, 0], "two limits of one name");
    let other = ("other", CELL, 1, 0, 0);
    let more = ("key", CELL, 3, 0, 0);
    let refused = script.charge(&[more, other, more]).await;
    assert_eq!((refused[0], refused[4], refused[12]), (0, 0, 1), "four are left: enough for one of them");
    assert_eq!(script.charge(&[("key", CELL, 4, 0, 0), ("other", CELL, 10, 0, 0)]).await[0], 1, "none was charged");
}
