//! What all services on one store share: the connection, the leases, and what the store has to be told.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use portcullis_core::Moment;
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{Client, Script};
use sha2::{Digest, Sha256};

use super::leases::{Leases, Local, Question};
use super::question::{Ask, Reply};
use super::{Settings, ticks, ticks_within};
use crate::key::KeyBytes;
use crate::rate::nanos;
use crate::table::Mark;

pub(super) struct Shared {
    pub(super) client: Client,
    pub(super) prefix: String,
    script: Script,
    connection: OnceLock<Option<ConnectionManager>>,
    pub(super) leases: Leases,
    owed: Mutex<HashMap<u64, Owed>>,
    /// Tells this process's leases from those of others.
    me: u64,
    next_lease: AtomicU64,
    failures_in_a_row: AtomicU32,
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
#[derive(Clone, Debug)]
struct Owed {
    key: String,
    ticks: u64,
    report: Option<(u64, u64)>,
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
        Self {
            client,
            prefix,
            script: Script::new(include_str!("script.lua")),
            connection: OnceLock::new(),
            leases: Leases::new(capacity),
            owed: Mutex::default(),
            me: std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), "me"),
            next_lease: AtomicU64::new(1),
            failures_in_a_row: AtomicU32::new(0),
            down_until: AtomicU64::new(0),
            counts: Counts::default(),
        }
    }

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

    /// Asks about all of them, each of which may have to wait so long in nanoseconds.
    pub(super) async fn invoke(&self, settings: Settings, asks: &[Ask], delay: u64) -> Result<Vec<Reply>, String> {
        let connection = self.connection.get_or_init(|| {
            let config = ConnectionManagerConfig::new()
                .set_response_timeout(Some(settings.deadline.max(Duration::from_secs(1))))
                .set_connection_timeout(Some(Duration::from_secs(1)))
                .set_number_of_retries(1)
                .set_min_delay(Duration::from_millis(20));
            ConnectionManager::new_lazy_with_config(self.client.clone(), config).ok()
        });
        let Some(mut connection) = connection.clone() else { return Err("no connection can be made".into()) };
        let delay = ticks_within(delay);
        let mut call = self.script.prepare_invoke();
        call.arg(ticks(nanos(settings.lease)));
        let mut leases = Vec::new();
        let mut debts = self.owed_now(asks);
        for ask in asks.iter().filter(|ask| ask.is_asked()) {
            let Local::Ask(Question { want, report, .. }) = ask.local else { continue };
            let owed = debts.remove(&ask.mark.bits());
            let batch = (GRAIN.as_nanos() as u64 / ask.cell.interval).clamp(1, u64::from(want.max(1)));
            let (old, used) = report.map_or((String::new(), 0), |(id, used)| (self.lease(id), used));
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
                .arg(owed.map_or(0, |owed| owed.ticks))
                .arg(u8::from(ask.limit.is_shadow()))
                .arg(delay);
        }
        for owed in debts.into_values() {
            let (old, used) = owed.report.map_or((String::new(), 0), |(id, used)| (self.lease(id), used));
            call.key(owed.key)
                .arg(1)
                .arg(0)
                .arg(0)
                .arg(0)
                .arg(1)
                .arg(old)
                .arg(used)
                .arg("")
                .arg(owed.ticks)
                .arg(2)
                .arg(0);
        }
        let numbers: Vec<i64> = call.invoke_async(&mut connection).await.map_err(|error| error.to_string())?;
        let each = numbers.get(1..).unwrap_or_default().chunks_exact(4).zip(leases).map(|(reply, lease)| {
            let number = |at: usize| u64::try_from(reply[at]).unwrap_or(0);
            let leased = u32::try_from(reply[0]).unwrap_or(0);
            Reply { lease, leased, ahead: number(1), again: number(2), refuses: reply[3] == 1 }
        });
        Ok(each.collect())
    }

    /// What goes with a question about these keys: what they owe themselves, and a few others.
    fn owed_now(&self, asks: &[Ask]) -> HashMap<u64, Owed> {
        let mut owed = self.owed.lock().unwrap_or_else(PoisonError::into_inner);
        if owed.is_empty() {
            return HashMap::new();
        }
        let asked: Vec<u64> = asks.iter().filter(|ask| ask.is_asked()).map(|ask| ask.mark.bits()).collect();
        let others = owed.keys().copied().filter(|mark| !asked.contains(mark)).take(OWED_AT_ONCE);
        let now: Vec<u64> = others.collect();
        let mut taken: HashMap<u64, Owed> =
            now.into_iter().filter_map(|mark| Some((mark, owed.remove(&mark)?))).collect();
        for mark in asked {
            // A report of its own would not fit beside the question's: it waits.
            if owed.get(&mark).is_some_and(|owed| owed.report.is_none())
                && let Some(own) = owed.remove(&mark)
            {
                taken.insert(mark, own);
            }
        }
        taken
    }

    pub(super) fn owe(&self, mark: Mark, key: &str, ticks: u64, report: Option<(u64, u64)>) {
        let mut owed = self.owed.lock().unwrap_or_else(PoisonError::into_inner);
        if owed.len() >= OWED_MOST && !owed.contains_key(&mark.bits()) {
            tracing::debug!("too much is owed to the store: a debt is forgotten");
            return;
        }
        let entry = owed.entry(mark.bits()).or_insert_with(|| Owed { key: key.to_owned(), ticks: 0, report: None });
        entry.ticks = entry.ticks.saturating_add(ticks);
        // One that is not reported expires as used.
        entry.report = entry.report.or(report);
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
        if self.failures_in_a_row.load(Ordering::Relaxed) != 0 {
            self.failures_in_a_row.store(0, Ordering::Relaxed);
            if self.down_until.swap(0, Ordering::Relaxed) != 0 {
                tracing::info!("the store of limits answers again");
            }
        }
    }

    pub(super) fn failed(&self, now: Moment, reason: &str) {
        let failures = self.failures_in_a_row.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        if failures < FAILURES_IN_A_ROW {
            return;
        }
        let rest = Duration::from_millis(100 << (failures - FAILURES_IN_A_ROW).min(4)).min(Duration::from_secs(1));
        if self.down_until.swap((now + rest).as_nanos(), Ordering::Relaxed) == 0 {
            tracing::warn!(reason, "the store of limits does not answer: it is left alone for a while");
        }
    }
}
