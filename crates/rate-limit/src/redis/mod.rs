//! Limits shared by many processes through one Redis or Valkey.

mod leases;

use std::collections::HashMap;
use std::fmt;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use http::StatusCode;
use portcullis_core::{Moment, Rejection};
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{Client, Script};
use sha2::{Digest, Sha256};

use self::leases::{Given, Leases, Local, Question};
use crate::Error;
use crate::answer::{Refusal, Standing, Wait};
use crate::held::Holding;
use crate::key::{KeyBytes, RequestHead};
use crate::limit::Limit;
use crate::limiter::{Admission, Begun, Entered, Limiter, Limits};
use crate::rate::{Cell, Rate};
use crate::table::Mark;

/// How long a request waits for the store, unless told otherwise.
pub const DEFAULT_STORE_DEADLINE: Duration = Duration::from_millis(20);
/// How long a lease lives, unless told otherwise.
pub const DEFAULT_LEASE: Duration = Duration::from_secs(1);

/// Shares limits among all processes that use the same Redis or Valkey, one node or one primary.
///
/// # What is exact
///
/// One script decides, by the server's clock, with a resolution of 1/16 µs; a request's limits are charged in one round
/// trip, all or none. In every window the fleet is admitted at most `burst + rate · time`, with two exceptions: a store that
/// lost its memory starts anew, and one whose clock jumps forward lets leases expire early.
///
/// # Leases
///
/// A key that many requests have is leased: a process takes some units ahead and decides by itself. They are withheld from
/// everybody else until the process reports what it used, or the lease expires by the store's clock; then they are
/// charged. For that reason it does not matter when within its life a unit is used: the arrival time it would have led to
/// is never later than the store's, with all that is withheld.
///
/// What is leased is never more than an eighth of the burst and a quarter of a second of the rate, so a burst below eight
/// knows no leases. What a process has left when its lease expires counts as used. A refusal is remembered until it would
/// end, so that a caller who is over the limit costs no round trips.
///
/// # When it fails
///
/// A request waits for [`DEFAULT_STORE_DEADLINE`] and is then treated as [`OnFailure`] says. After three failures in a row
/// the store is left alone for 100 ms, then twice as long and so on up to a second, with one request to try it each time.
/// [`StoreStats`] show it, and it is logged when that begins and when it ends.
///
/// # What it does not do
///
/// Concurrency limits count in each process. Requests are not [delayed](crate::RateLimitLayer::delay). What a request
/// [turned out](Limit::settle) to cost more is charged with the next question to the store, whoever asks; less is given
/// back if it was leased.
///
/// Keys are `{prefix}:` and a SHA-256 digest cut to 128 bits, so that nothing of a caller can be read in the store, and all
/// live in one slot of a cluster.
#[derive(Clone)]
pub struct RedisStore {
    settings: Settings,
    shared: Arc<Shared>,
}

/// What a request gets when the store does not answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnFailure {
    /// It is admitted. The default: limits protect against too much, and nothing at all is worse.
    #[default]
    Admit,
    /// It is refused with 503.
    Refuse,
    /// It is decided here, by the share that one of so many processes has of the rate; a caller may at first have a burst
    /// from each beside what the store admitted before.
    Share(NonZeroU32),
}

/// What a store did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreStats {
    /// Questions asked: round trips.
    pub round_trips: u64,
    /// Charges made to a lease, without a round trip.
    pub leased: u64,
    /// Refusals that were remembered, without a round trip.
    pub remembered: u64,
    /// Questions that were not answered in time, or with an error.
    pub failures: u64,
    /// Requests treated as [`OnFailure`] says.
    pub undecided: u64,
    /// The store is being left alone.
    pub down: bool,
    /// Keys this process remembers.
    pub keys: usize,
}

#[derive(Clone, Copy, Debug)]
struct Settings {
    deadline: Duration,
    on_failure: OnFailure,
    lease: Duration,
}

struct Shared {
    client: Client,
    prefix: String,
    script: Script,
    connection: OnceLock<Option<ConnectionManager>>,
    leases: Leases,
    owed: Mutex<HashMap<u64, Owed>>,
    /// Tells this process's leases from those of others.
    me: u64,
    next_lease: AtomicU64,
    failures_in_a_row: AtomicU32,
    down_until: AtomicU64,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    round_trips: AtomicU64,
    leased: AtomicU64,
    remembered: AtomicU64,
    failures: AtomicU64,
    undecided: AtomicU64,
}

/// What the store has to be told with the next question.
#[derive(Clone, Debug)]
struct Owed {
    key: String,
    ticks: u64,
    report: Option<(u64, u64)>,
}

/// One limit on its way to the store.
struct Ask {
    limit: Limit,
    key: KeyBytes,
    mark: Mark,
    rate: Rate,
    cell: Cell,
    units: u32,
    window: u64,
    local: Local,
}

/// What was taken for a request so far; it goes back unless it is kept.
struct Taken {
    store: RedisStore,
    limiter: Arc<Limiter>,
    asks: Vec<Ask>,
    places: Vec<Mark>,
    kept: bool,
}

/// What the script said of one key.
#[derive(Clone, Copy, Debug)]
struct Reply {
    lease: u64,
    leased: u32,
    ahead: u64,
    again: u64,
    refuses: bool,
}

/// Ticks of the script in a nanosecond, as a fraction.
const TICKS: (u64, u64) = (16, 1000);
/// What a process comes back for when there is not enough.
const GRAIN: Duration = Duration::from_millis(20);
/// How many debts go with a question.
const OWED_AT_ONCE: usize = 8;
/// How many are kept.
const OWED_MOST: usize = 4096;
const FAILURES_IN_A_ROW: u32 = 3;

// === impl RedisStore ===

impl RedisStore {
    /// The store at a URL such as `redis://:password@host:6379/0`; `rediss` and `unix` where the `redis` crate was built
    /// with them. It connects when the first request comes, and again with back-off whenever it has to; the connection
    /// lives on the runtime of that request.
    ///
    /// # Errors
    ///
    /// A URL that is none.
    pub fn new(url: &str) -> Result<Self, Error> {
        let client = Client::open(url).map_err(|_| Error::url())?;
        let settings =
            Settings { deadline: DEFAULT_STORE_DEADLINE, on_failure: OnFailure::default(), lease: DEFAULT_LEASE };
        Ok(Self { settings, shared: Arc::new(Shared::new(client, "{portcullis}".into(), crate::DEFAULT_CAPACITY)) })
    }

    /// Begins every key with this instead of `{portcullis}`. Keep something in braces: a cluster keeps keys together by
    /// it. Processes share what has the same prefix.
    #[must_use]
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.shared = Arc::new(Shared::new(self.shared.client.clone(), prefix.into(), crate::DEFAULT_CAPACITY));
        self
    }

    /// How long a request waits for an answer.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.settings.deadline = deadline;
        self
    }

    /// What a request gets when there is no answer.
    #[must_use]
    pub fn on_failure(mut self, on_failure: OnFailure) -> Self {
        self.settings.on_failure = on_failure;
        self
    }

    /// How long a lease lives; zero for none at all: then every request that is admitted is a round trip.
    #[must_use]
    pub fn lease(mut self, life: Duration) -> Self {
        self.settings.lease = life;
        self
    }

    /// What happened so far.
    #[must_use]
    pub fn stats(&self) -> StoreStats {
        let counts = &self.shared.counts;
        StoreStats {
            round_trips: counts.round_trips.load(Ordering::Relaxed),
            leased: counts.leased.load(Ordering::Relaxed),
            remembered: counts.remembered.load(Ordering::Relaxed),
            failures: counts.failures.load(Ordering::Relaxed),
            undecided: counts.undecided.load(Ordering::Relaxed),
            down: self.shared.down_until.load(Ordering::Relaxed) != 0,
            keys: self.shared.leases.len(),
        }
    }

    /// Decides here if it can, else asks.
    pub(crate) fn begin(&self, limiter: &Arc<Limiter>, mut limits: Limits<'_>, head: &RequestHead<'_>) -> Begun {
        let now = limiter.clock.now();
        let mut taken = Taken::new(self, limiter);
        while let Some((limit, own)) = limits.next() {
            let route = own.then_some(limits.route());
            match limiter.enter(limit, route, head) {
                Entered::In(mark) => taken.places.push(mark),
                Entered::Full(refusal) => return Begun::Decided(Err(limiter.refuse(refusal))),
                Entered::NotLimited => {}
            }
            let Some(mut ask) = Ask::new(limiter, limit, route, head) else { continue };
            ask.local = self.take(&ask, now);
            let Local::Refused { until } = ask.local else {
                taken.asks.push(ask);
                continue;
            };
            count(&self.shared.counts.remembered);
            if limit.is_shadow() {
                taken.asks.push(ask);
                continue;
            }
            limiter.counters.add(ask.mark, |stripe| &stripe.refused);
            return Begun::Decided(Err(limiter.refuse(ask.refusal(until.since(now)))));
        }
        if !taken.asks.iter().any(|ask| matches!(ask.local, Local::Ask(_) | Local::Wait)) {
            return Begun::Decided(Ok(taken.admit(&[], now)));
        }
        if !self.shared.may_ask(now, self.settings.deadline) {
            return Begun::Decided(taken.undecided(now));
        }
        Begun::Asked(Box::pin(taken.ask()))
    }

    /// Charges more to a key than was charged before, or gives back to its lease.
    pub(crate) fn settle(&self, mark: Mark, key: &str, interval: u64, lease: Option<u64>, units: u32, cost: u32) {
        if cost > units {
            self.shared.owe(mark, key, interval.saturating_mul(u64::from(cost - units)), None);
        } else if let Some(lease) = lease {
            self.shared.leases.give_back(mark, lease, units - cost);
        }
    }

    fn take(&self, ask: &Ask, now: Moment) -> Local {
        self.shared.leases.take(ask.mark, ask.units, self.most(ask), self.settings.deadline, now)
    }

    /// The largest lease worth having.
    fn most(&self, ask: &Ask) -> u32 {
        if self.settings.lease.is_zero() || ask.window != ask.cell.window {
            return 0;
        }
        let burst = ask.cell.window / ask.cell.interval / 8;
        let quarter = 250_000_000 / ask.cell.interval;
        u32::try_from(burst.min(quarter)).unwrap_or(u32::MAX)
    }
}

impl fmt::Debug for RedisStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisStore")
            .field("prefix", &self.shared.prefix)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

// === impl Taken ===

impl Taken {
    fn new(store: &RedisStore, limiter: &Arc<Limiter>) -> Self {
        Self { store: store.clone(), limiter: limiter.clone(), asks: Vec::new(), places: Vec::new(), kept: false }
    }

    /// Waits for leases that others are asking for, no longer than an answer of its own would be waited for.
    async fn wait(&mut self) -> Result<(), Refusal> {
        let (shared, deadline) = (&self.store.shared, self.store.settings.deadline);
        let until = tokio::time::Instant::now() + deadline;
        for ask in &mut self.asks {
            while matches!(ask.local, Local::Wait) {
                let late = match shared.leases.asking(ask.mark) {
                    Some(asked) => tokio::time::timeout_at(until, asked).await.is_err(),
                    None => false,
                };
                let now = self.limiter.clock.now();
                ask.local = self.store.take(ask, now);
                if late && matches!(ask.local, Local::Wait) {
                    ask.local = Local::Ask(Question::default());
                }
                if let Local::Refused { until } = ask.local
                    && !ask.limit.is_shadow()
                {
                    count(&shared.counts.remembered);
                    self.limiter.counters.add(ask.mark, |stripe| &stripe.refused);
                    return Err(ask.refusal(until.since(now)));
                }
            }
        }
        Ok(())
    }

    async fn ask(mut self) -> Result<Admission, Rejection> {
        if let Err(refusal) = self.wait().await {
            return Err(self.limiter.refuse(refusal));
        }
        let (shared, settings) = (&self.store.shared, self.store.settings);
        let sent = self.limiter.clock.now();
        if !self.asks.iter().any(Ask::is_asked) {
            return Ok(self.admit(&[], sent));
        }
        count(&shared.counts.round_trips);
        let answer = tokio::time::timeout(settings.deadline, shared.invoke(settings, &self.asks)).await;
        let now = self.limiter.clock.now();
        let replies = match answer.unwrap_or_else(|_| Err("no answer in time".into())) {
            Ok(replies) => replies,
            Err(reason) => {
                count(&shared.counts.failures);
                shared.failed(now, &reason);
                return self.undecided(now);
            }
        };
        shared.answered();
        let mut worst: Option<Refusal> = None;
        for (ask, reply) in self.asks.iter().filter(|ask| ask.is_asked()).zip(&replies) {
            let again = (reply.again > 0).then(|| from_ticks(reply.again));
            // Only what is true for every request of the key is worth remembering.
            let for_all = ask.window == ask.cell.window && (ask.units == 1 || !reply.refuses);
            let given = (reply.leased > 0).then(|| Given {
                id: reply.lease,
                units: reply.leased,
                interval: ticks(ask.cell.interval),
                since: sent,
                // A tenth for clocks that run at different speeds.
                until: sent + settings.lease * 9 / 10,
            });
            let until = again.filter(|_| for_all).map(|again| now + again);
            if let Some(report) = shared.leases.learn(ask.mark, given, until, now) {
                shared.owe(ask.mark, &shared.key(&ask.key), 0, Some(report));
            }
            if !reply.refuses {
                continue;
            }
            if ask.limit.is_shadow() {
                self.limiter.counters.add(ask.mark, |stripe| &stripe.shadowed);
                continue;
            }
            self.limiter.counters.add(ask.mark, |stripe| &stripe.refused);
            let refusal = ask.refusal(again.unwrap_or_default());
            if worst.as_ref().is_none_or(|worst| refusal.wait > worst.wait) {
                worst = Some(refusal);
            }
        }
        match worst {
            Some(refusal) => Err(self.limiter.refuse(refusal)),
            None => Ok(self.admit(&replies, now)),
        }
    }

    /// Keeps what was taken.
    fn admit(mut self, replies: &[Reply], now: Moment) -> Admission {
        self.kept = true;
        let limiter = &self.limiter;
        let mut admission = Admission::default();
        admission.holdings.extend(std::mem::take(&mut self.places).into_iter().map(Holding::Place));
        let mut replies = replies.iter();
        for ask in &self.asks {
            let (lease, ahead) = match ask.local {
                Local::Charged { lease, left } => {
                    count(&self.store.shared.counts.leased);
                    // As far as this process knows.
                    let ahead = ask.cell.window.saturating_sub(ask.cell.cost(left));
                    (Some(lease), Duration::from_nanos(ahead))
                }
                // A shadow that refused.
                Local::Refused { .. } => {
                    limiter.counters.add(ask.mark, |stripe| &stripe.shadowed);
                    continue;
                }
                Local::Ask(_) | Local::Wait => match replies.next() {
                    Some(reply) if reply.refuses => continue,
                    reply => (None, reply.map_or(Duration::ZERO, |reply| from_ticks(reply.ahead))),
                },
            };
            limiter.counters.add(ask.mark, |stripe| &stripe.admitted);
            if limiter.fields.are_on_every_response() {
                let remaining = ask.cell.remaining((now + ahead).as_nanos(), now.as_nanos());
                admission.standings.push(Standing::of_rate(ask.limit.shared_name(), ask.rate, remaining, ahead));
            }
            if let Some(settle) = ask.limit.settlement() {
                let (store, key) = (self.store.clone(), self.store.shared.key(&ask.key));
                let (mark, interval, units, settle) = (ask.mark, ticks(ask.cell.interval), ask.units, settle.clone());
                admission.holdings.push(Holding::Stored { store, mark, key, interval, units, lease, settle });
            }
        }
        admission
    }

    /// Decides without the store.
    fn undecided(self, now: Moment) -> Result<Admission, Rejection> {
        count(&self.store.shared.counts.undecided);
        let processes = match self.store.settings.on_failure {
            OnFailure::Admit => return Ok(self.admit(&[], now)),
            OnFailure::Refuse => {
                let unavailable = StatusCode::SERVICE_UNAVAILABLE;
                return Err(Rejection::new(portcullis_core::Layer::RateLimit, unavailable, "limits-unavailable"));
            }
            OnFailure::Share(processes) => u64::from(processes.get()),
        };
        let table = &self.limiter.table;
        let cost = |ask: &Ask| ask.cell.cost(ask.units).saturating_mul(processes);
        let time = now.as_nanos();
        for (done, ask) in self.asks.iter().enumerate() {
            let (cost_here, window) = (cost(ask), ask.window.max(cost(ask)));
            let charged = table.charge(ask.mark, time, |debt| Cell::charge(debt, time, cost_here, window));
            let Err(debt) = charged else { continue };
            if ask.limit.is_shadow() {
                self.limiter.counters.add(ask.mark, |stripe| &stripe.shadowed);
                continue;
            }
            self.asks.iter().take(done).for_each(|before| table.refund(before.mark, cost(before)));
            self.limiter.counters.add(ask.mark, |stripe| &stripe.refused);
            let wait = Cell::wait(debt, time, cost_here, window).unwrap_or_default();
            return Err(self.limiter.refuse(ask.refusal(wait)));
        }
        Ok(self.admit(&[], now))
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        for ask in &self.asks {
            if let Local::Ask(question) = ask.local {
                self.store.shared.leases.asked(ask.mark, question.asking);
            }
        }
        if self.kept {
            return;
        }
        for ask in &self.asks {
            if let Local::Charged { lease, .. } = ask.local {
                self.store.shared.leases.give_back(ask.mark, lease, ask.units);
            }
        }
        self.places.iter().for_each(|mark| self.limiter.in_flight().leave(*mark));
    }
}

// === impl Shared ===

impl Shared {
    fn new(client: Client, prefix: String, capacity: usize) -> Self {
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

    fn key(&self, key: &KeyBytes) -> String {
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

    async fn invoke(&self, settings: Settings, asks: &[Ask]) -> Result<Vec<Reply>, String> {
        let connection = self.connection.get_or_init(|| {
            let config = ConnectionManagerConfig::new()
                .set_response_timeout(Some(Duration::from_secs(1)))
                .set_connection_timeout(Some(Duration::from_secs(1)))
                .set_number_of_retries(1)
                .set_min_delay(Duration::from_millis(20));
            ConnectionManager::new_lazy_with_config(self.client.clone(), config).ok()
        });
        let Some(mut connection) = connection.clone() else { return Err("no connection can be made".into()) };
        let mut call = self.script.prepare_invoke();
        call.arg(ticks(u64::try_from(settings.lease.as_nanos()).unwrap_or(u64::MAX)));
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
                .arg(u8::from(ask.limit.is_shadow()));
        }
        for owed in debts.into_values() {
            let (old, used) = owed.report.map_or((String::new(), 0), |(id, used)| (self.lease(id), used));
            call.key(owed.key).arg(1).arg(0).arg(0).arg(0).arg(1).arg(old).arg(used).arg("").arg(owed.ticks).arg(2);
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

    fn owe(&self, mark: Mark, key: &str, ticks: u64, report: Option<(u64, u64)>) {
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
    fn may_ask(&self, now: Moment, deadline: Duration) -> bool {
        let down = self.down_until.load(Ordering::Relaxed);
        if down == 0 {
            return true;
        }
        let next = (now + deadline * 2).as_nanos();
        now.as_nanos() >= down
            && self.down_until.compare_exchange(down, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    fn answered(&self) {
        if self.failures_in_a_row.load(Ordering::Relaxed) != 0 {
            self.failures_in_a_row.store(0, Ordering::Relaxed);
            if self.down_until.swap(0, Ordering::Relaxed) != 0 {
                tracing::info!("the store of limits answers again");
            }
        }
    }

    fn failed(&self, now: Moment, reason: &str) {
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

// === impl Ask ===

impl Ask {
    fn new(limiter: &Limiter, limit: &Limit, route: Option<&str>, head: &RequestHead<'_>) -> Option<Self> {
        let (rate, cell, units, window) = limit.charge(head)?;
        let mut key = KeyBytes::new();
        limiter.write_key(limit, route, head, &mut key);
        let mark = limiter.table.mark(key.bytes());
        let local = Local::Ask(Question::default());
        Some(Self { limit: limit.clone(), key, mark, rate, cell, units, window, local })
    }

    /// As many whole units as the window has.
    fn window_ticks(&self) -> u64 {
        let (window, interval) = (u128::from(self.window), u128::from(self.cell.interval));
        u64::try_from(window * u128::from(ticks(self.cell.interval)) / interval).unwrap_or(u64::MAX).min(1 << 51)
    }

    fn is_asked(&self) -> bool {
        matches!(self.local, Local::Ask(_))
    }

    fn refusal(&self, wait: Duration) -> Refusal {
        let never = self.cell.cost(self.units) > self.window;
        let standing = Standing::of_rate(self.limit.shared_name(), self.rate, 0, wait);
        Refusal { standing, wait: if never { Wait::Never } else { Wait::For(wait) } }
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Rounded up, and small enough for a double.
fn ticks(nanos: u64) -> u64 {
    let ticks = (u128::from(nanos) * u128::from(TICKS.0)).div_ceil(u128::from(TICKS.1));
    u64::try_from(ticks).unwrap_or(u64::MAX).min(1 << 51)
}

fn from_ticks(ticks: u64) -> Duration {
    let nanos = (u128::from(ticks) * u128::from(TICKS.1)).div_ceil(u128::from(TICKS.0));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}
