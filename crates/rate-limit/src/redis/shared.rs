//! What all services on one store share: the connection, the leases, and what the store has to be told.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use portcullis_core::Moment;
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{Client, Script};
use sha2::{Digest, Sha256};
use siphasher::sip::SipHasher13;

use super::leases::{Leases, Local, Question};
use super::question::{Ask, Reply};
use super::{Settings, ticks, ticks_within};
use crate::key::KeyBytes;
use crate::rate::nanos;

pub(super) struct Shared {
    pub(super) client: Client,
    pub(super) prefix: String,
    script: Script,
    hasher: SipHasher13,
    connection: Mutex<Option<ConnectionManager>>,
    pub(super) leases: Leases,
    owed: Mutex<HashMap<u64, Owed>>,
    /// Tells this process's leases from those of others.
    me: u64,
    next_lease: AtomicU64,
    failures_in_a_row: AtomicU32,
    /// When the last failure was counted.
    counted: AtomicU64,
    pub(super) down_until: AtomicU64,
    pub(super) counts: Counts,
}

#[derive(Default)]
pub(super) struct Counts {
    pub(super) round_trips: AtomicU64,
    pub(super) leased: AtomicU64,
    pub(super) remembered: AtomicU64,
    pub(super) failures: AtomicU64,
    pub(super) undecided: AtomicU64,
}

/// What the store has to be told with the next question.
#[derive(Debug)]
pub(super) struct Owed {
    mark: u64,
    key: String,
    ticks: u64,
    report: Option<(u64, u64)>,
}

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum Failure {
    Late,
    /// An error, of the store or on the way.
    Said(String),
}

/// What a process comes back for when there is not enough.
const GRAIN: Duration = Duration::from_millis(20);
/// How many debts go with a question.
const OWED_AT_ONCE: usize = 8;
/// How many are kept.
const OWED_MOST: usize = 4096;
const FAILURES_IN_A_ROW: u32 = 3;

// === impl Shared ===

impl Shared {
    pub(super) fn new(client: Client, prefix: String, capacity: usize) -> Self {
        let seed = RandomState::new();
        Self {
            client,
            prefix,
            hasher: SipHasher13::new_with_keys(seed.hash_one(0), seed.hash_one(1)),
            script: Script::new(include_str!("script.lua")),
            connection: Mutex::default(),
            leases: Leases::new(capacity),
            owed: Mutex::default(),
            me: seed.hash_one("me"),
            next_lease: AtomicU64::new(1),
            failures_in_a_row: AtomicU32::new(0),
            counted: AtomicU64::new(0),
            down_until: AtomicU64::new(0),
            counts: Counts::default(),
        }
    }

    /// What tells a key from others, for everybody who counts in this store: all of its layers, whatever their own tables
    /// have for it.
    pub(super) fn mark(&self, key: &KeyBytes) -> u64 {
        self.hasher.hash(key.bytes())
    }

    /// Its name in the store.
    pub(super) fn key(&self, key: &KeyBytes) -> String {
        use std::fmt::Write;
        let mut text = String::with_capacity(self.prefix.len() + 33);
        text.push_str(&self.prefix);
        text.push(':');
        for byte in &Sha256::digest(key.bytes())[..16] {
            let _ = write!(text, "{byte:02x}");
        }
        text
    }

    fn lease(&self, id: u64) -> String {
        format!("{:x}.{id:x}", self.me)
    }

    /// Asks about all of them, each of which may have to wait so long in nanoseconds, after telling what is owed.
    pub(super) async fn invoke(
        &self,
        settings: Settings,
        asks: &[Ask],
        owed: &[Owed],
        delay: u64,
    ) -> Result<Vec<Reply>, Failure> {
        let Some(mut connection) = self.connection(settings) else {
            return Err(Failure::Said("no connection can be made".into()));
        };
        let mut call = self.script.prepare_invoke();
        call.arg(ticks(nanos(settings.lease)));
        let report =
            |report: Option<(u64, u64)>| report.map_or((String::new(), 0), |(id, used)| (self.lease(id), used));
        // Before the questions, which may be about the same keys.
        for Owed { key, ticks, report: old, .. } in owed {
            let (old, used) = report(*old);
            call.key(key).arg(&[1, 0, 0, 0, 1]).arg(old).arg(used).arg("").arg(ticks).arg(2).arg(0);
        }
        let mut leases = Vec::new();
        for ask in asks {
            let Local::Ask(Question { want, report: old, .. }) = ask.local else { continue };
            let batch = (GRAIN.as_nanos() as u64 / ask.cell.interval).clamp(1, u64::from(want.max(1)));
            let (old, used) = report(old);
            let lease = self.next_lease.fetch_add(1, Ordering::Relaxed);
            leases.push(lease);
            call.key(self.key(&ask.key))
                .arg(ticks(ask.cell.interval))
                .arg(ask.window_ticks())
                .arg(ask.units)
                .arg(want)
                .arg(batch)
                .arg(old)
                .arg(used)
                .arg(self.lease(lease))
                .arg(0)
                .arg(u8::from(ask.limit.is_shadow()))
                .arg(ticks_within(ask.delay(delay)));
        }
        let numbers: Vec<i64> =
            call.invoke_async(&mut connection).await.map_err(|error| Failure::Said(error.to_string()))?;
        let replies = numbers.get(1 + 4 * owed.len()..).unwrap_or_default();
        let each = replies.chunks_exact(4).zip(leases).map(|(reply, lease)| {
            let number = |at: usize| u64::try_from(reply[at]).unwrap_or(0);
            let leased = u32::try_from(reply[0]).unwrap_or(0);
            Reply { lease, leased, ahead: number(1), again: number(2), refuses: reply[3] == 1 }
        });
        Ok(each.collect())
    }

    /// The connection, or one that is being made, whether or not the request that asks for it waits so long.
    fn connection(&self, settings: Settings) -> Option<ConnectionManager> {
        let mut held = lock(&self.connection);
        if held.is_none() {
            let config = ConnectionManagerConfig::new()
                .set_response_timeout(Some(settings.deadline.max(Duration::from_secs(1))))
                .set_connection_timeout(Some(Duration::from_secs(1)))
                .set_number_of_retries(1)
                .set_min_delay(Duration::from_millis(20));
            let made = ConnectionManager::new_lazy_with_config(self.client.clone(), config).ok()?;
            let mut first = made.clone();
            tokio::spawn(async move { first.send_packed_command(&redis::cmd("PING")).await.is_ok() });
            *held = Some(made);
        }
        held.clone()
    }

    /// What goes with a question about these keys: what they owe themselves, and a few others.
    pub(super) fn owed_now(&self, asks: &[Ask]) -> Vec<Owed> {
        let mut owed = self.owed();
        if owed.is_empty() {
            return Vec::new();
        }
        let asked = asks.iter().filter(|ask| ask.is_asked());
        let mut taken: Vec<Owed> = asked.filter_map(|ask| owed.remove(&ask.mark)).collect();
        let others: Vec<u64> = owed.keys().copied().take(OWED_AT_ONCE).collect();
        taken.extend(others.iter().filter_map(|mark| owed.remove(mark)));
        taken
    }

    pub(super) fn owe(&self, mark: u64, key: &str, ticks: u64, report: Option<(u64, u64)>) {
        self.owe_again([Owed { mark, key: key.to_owned(), ticks, report }]);
    }

    /// It was not told to the store, or not yet.
    pub(super) fn owe_again(&self, debts: impl IntoIterator<Item = Owed>) {
        let mut owed = self.owed();
        for debt in debts {
            if let Some(entry) = owed.get_mut(&debt.mark) {
                entry.ticks = entry.ticks.saturating_add(debt.ticks).min(1 << 51);
                // One that is not reported expires as used.
                entry.report = entry.report.or(debt.report);
            } else if owed.len() < OWED_MOST {
                owed.insert(debt.mark, debt);
            } else {
                tracing::debug!("too much is owed to the store: a debt is forgotten");
            }
        }
    }

    fn owed(&self) -> MutexGuard<'_, HashMap<u64, Owed>> {
        lock(&self.owed)
    }

    /// Whether to ask at all; of those who come while it is down, one is let through now and then.
    pub(super) fn may_ask(&self, now: Moment, deadline: Duration) -> bool {
        let down = self.down_until.load(Ordering::Relaxed);
        if down == 0 {
            return true;
        }
        let next = (now + deadline * 2).as_nanos();
        now.as_nanos() >= down
            && self.down_until.compare_exchange(down, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    pub(super) fn answered(&self) {
        // Who counts the last failure may say that it is down after somebody else was answered.
        let is_down = self.down_until.load(Ordering::Relaxed) != 0;
        if is_down || self.failures_in_a_row.load(Ordering::Relaxed) != 0 {
            self.failures_in_a_row.store(0, Ordering::Relaxed);
            if self.down_until.swap(0, Ordering::Relaxed) != 0 {
                tracing::info!("the store of limits answers again");
            }
        }
    }

    /// A question that was sent then has failed. Those that were under way together fail together, and count as one.
    pub(super) fn failed(&self, sent: Moment, now: Moment, failure: &Failure) {
        let later = |counted| (sent.as_nanos() >= counted).then_some(now.as_nanos());
        if self.counted.fetch_update(Ordering::Relaxed, Ordering::Relaxed, later).is_err() {
            return;
        }
        let failures = self.failures_in_a_row.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        // A connection may have died without a word, and who answers with an error may be the primary no more: the next
        // question makes another one. A new one is given time.
        if matches!(failure, Failure::Said(_)) || failures.is_multiple_of(FAILURES_IN_A_ROW) {
            *lock(&self.connection) = None;
        }
        if failures < FAILURES_IN_A_ROW {
            return;
        }
        let rest = Duration::from_millis(100 << (failures - FAILURES_IN_A_ROW).min(4)).min(Duration::from_secs(1));
        if self.down_until.swap((now + rest).as_nanos(), Ordering::Relaxed) == 0 {
            tracing::warn!(
                reason = failure.reason(),
                "the store of limits does not answer: it is left alone for a while"
            );
        }
    }
}

// === impl Failure ===

impl Failure {
    fn reason(&self) -> &str {
        match self {
            Self::Late => "no answer in time",
            Self::Said(reason) => reason,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared() -> Shared {
        Shared::new(Client::open("redis://localhost").unwrap(), String::new(), 16)
    }

    fn at(millis: u64) -> Moment {
        Moment::from_nanos(1 << 52) + Duration::from_millis(millis)
    }

    fn rest(shared: &Shared, now: u64) -> u64 {
        let until = Moment::from_nanos(shared.down_until.load(Ordering::Relaxed));
        until.since(at(now)).as_millis() as u64
    }

    #[test]
    fn questions_that_fail_together_count_once() {
        let shared = shared();
        for _ in 0..16 {
            shared.failed(at(0), at(20), &Failure::Late);
        }
        assert!(shared.may_ask(at(20), Duration::ZERO));
        shared.failed(at(20), at(40), &Failure::Late);
        shared.failed(at(21), at(41), &Failure::Late);
        assert!(shared.may_ask(at(41), Duration::ZERO), "twice in a row");
        shared.failed(at(41), at(61), &Failure::Late);
        assert_eq!(rest(&shared, 61), 100);
        for (sent, longer) in [(161, 200), (381, 400), (801, 800), (1621, 1000), (2641, 1000)] {
            assert!(shared.may_ask(at(sent), Duration::ZERO) && !shared.may_ask(at(sent - 1), Duration::ZERO));
            shared.failed(at(sent), at(sent + 20), &Failure::Late);
            shared.failed(at(50), at(sent + 20), &Failure::Late);
            assert_eq!(rest(&shared, sent + 20), longer);
        }
        shared.answered();
        assert!(shared.may_ask(at(2700), Duration::ZERO));
    }
}
