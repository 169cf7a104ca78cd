//! Limits shared by many processes through one Redis or Valkey.

mod leases;
mod question;
#[cfg(test)]
mod script_tests;
mod shared;

use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use portcullis_core::Moment;
use redis::{Client, ConnectionInfo, IntoConnectionInfo};

use self::leases::Local;
use self::question::{Ask, Taken};
use self::shared::Shared;
use crate::Error;
use crate::charge::Entered;
use crate::key::{KeyBytes, RequestHead};
use crate::limit::What;
use crate::limiter::{Begun, Limiter, Limits};

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
/// lost its memory starts anew, and one whose clock is set forward takes that for time that passed. A clock that is set
/// back costs nobody anything: for a key no time passes until it goes on.
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
/// end, so that a caller who is over the limit costs no round trips. Of 65,536 keys that much is known at a time.
///
/// # When it fails
///
/// A request waits for [`DEFAULT_STORE_DEADLINE`] and is then treated as [`OnFailure`] says. After three failures in a row,
/// each of a question that was sent after the one before had failed, the store is left alone for 100 ms, then twice as long
/// and so on up to a second, with one request to try it each time. A connection that failed three times in a row is replaced,
/// and one over which an error came is at once, so that a name is looked up again when another server is the primary.
/// [`StoreStats`] show it, and it is logged when that begins and when it ends.
///
/// What 500 requests got within a second, of ten callers who come at 50 a second each and may at 25, with the default
/// deadline of 20 ms (`cargo run --release -p portcullis-rate-limit --features redis --example fleet 4`):
///
/// | the store | [`OnFailure`] | admitted | 429 | 503 | p50 | p99 | longest | when it was back: not asked for |
/// |---|---|---|---|---|---|---|---|---|
/// | is killed | `Admit` | 495 | 5 | 0 | 0 µs | 21.2 ms | 21.6 ms | 564 ms |
/// | | `Refuse` | 0 | 2 | 498 | 2 µs | 20.4 ms | 21.7 ms | 556 ms |
/// | | `Share(4)` | 120 | 380 | 0 | 2 µs | 20.5 ms | 21.3 ms | 554 ms |
/// | is stopped (`SIGSTOP`) | `Admit` | 500 | 0 | 0 | 1 µs | 21.7 ms | 21.8 ms | 630 ms |
/// | | `Refuse` | 0 | 9 | 491 | 1 µs | 21.5 ms | 21.6 ms | 639 ms |
/// | | `Share(4)` | 120 | 380 | 0 | 1 µs | 21.6 ms | 23.1 ms | 632 ms |
/// | takes 50 ms for each answer | `Admit` | 487 | 13 | 0 | 0 µs | 21.6 ms | 22.1 ms | 0 |
/// | | `Refuse` | 35 | 15 | 450 | 1 µs | 21.9 ms | 24.1 ms | 0 |
/// | | `Share(4)` | 144 | 356 | 0 | 0 µs | 21.9 ms | 22.4 ms | 283 ms |
/// | is restarted empty | `Admit` | 480 | 20 | 0 | 1 µs | 0.2 ms | 4.2 ms | 0 |
/// | | `Refuse` | 479 | 20 | 1 | 1 µs | 0.1 ms | 0.4 ms | 0 |
/// | | `Share(4)` | 481 | 19 | 0 | 1 µs | 0.1 ms | 2.0 ms | 0 |
///
/// The few 429 of a store that is gone are refusals that were remembered. One that comes back empty has forgotten who owes
/// what: each caller has its whole burst again.
///
/// # What it costs
///
/// The same command has four processes share one Redis for four seconds, on two cores with it: one hot key of 2,000 a second
/// with a burst of 400, asked for four times as often, and 10,000 cold keys of 5 a second each. Of all windows the worst held
/// less than it may:
///
/// | leases | key | checks | admitted | most allowed | worst window, over rate · time | burst | round trips | checks without | time added, mean | p99 |
/// |---|---|---|---|---|---|---|---|---|---|---|
/// | 1 s | hot | 32,004 | 8,384 | 8,399 | 393.8 | 400 | 814 | 97.5 % | 8.3 µs | 159 µs |
/// | 1 s | each cold | 16,002 | 15,993 | 250,087 | 4.9 | 5 | 15,999 | 0 | 77 µs | 334 µs |
/// | none | hot | 32,004 | 8,401 | 8,403 | 399.1 | 400 | 31,614 | 1.2 % | 155 µs | 528 µs |
/// | none | each cold | 16,002 | 15,989 | 250,073 | 4.9 | 5 | 16,002 | 0 | 137 µs | 504 µs |
///
/// One process that asks for one key again and again, while the limit allows it (`cargo bench -p portcullis-rate-limit
/// --features redis --bench store`): with leases 0.22 µs on average, p99 0.24 µs; without,
/// 64.6 µs and one round trip for each; a bare `PING` 56.9 µs; no limit at all 0.04 µs.
///
/// # What it does not do
///
/// Concurrency limits count in each process. A request that is [delayed](crate::RateLimitLayer::delay) has been charged, and
/// stays so if it goes away while it waits; what a key has leased goes to those who need not wait. What a request
/// [turned out](crate::Limit::settle) to cost more is charged to what is leased, and what is not enough with the next question
/// to the store, whoever asks; that key asks before anything more is decided here. Less is given back if it was leased. A question that is answered with
/// an error tells nothing, and what it should have told goes with the next one; of one that is not answered in time the store
/// may yet hear, so that this counts as told.
///
/// Keys are `{prefix}:` and a SHA-256 digest cut to 128 bits, so that callers do not stand in the store in the clear, and all
/// live in one slot of a cluster. The digest has no secret: whoever reads the store can try out which address or subject a
/// key belongs to.
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

/// The longest a deadline or a lease may be.
const LONGEST: Duration = Duration::from_secs(3600);
/// Ticks of the script in a nanosecond, as a fraction.
const TICKS: (u64, u64) = (16, 1000);

// === impl RedisStore ===

impl RedisStore {
    /// The store at a URL such as `redis://:password@host:6379/0`, or `rediss://…` with the feature `redis-tls`, which trusts
    /// the system's certificates and encrypts with the process's default provider of rustls. It connects when the first
    /// request comes, and again with back-off whenever it has to; the connection lives on the runtime of that request.
    ///
    /// # Errors
    ///
    /// A URL that is none, or one of TLS without the feature or without a default provider of rustls.
    pub fn new(url: &str) -> Result<Self, Error> {
        Ok(Self::of(Client::open(address(url)?).map_err(|_| Error::url())?))
    }

    /// The same, but over TLS it trusts only certificates that these authorities signed, given as PEM.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new), and text that holds no certificate.
    #[cfg(feature = "redis-tls")]
    pub fn trusting(url: &str, authorities: &[u8]) -> Result<Self, Error> {
        use rustls::pki_types::CertificateDer;
        use rustls::pki_types::pem::PemObject;

        let address = address(url)?;
        let read = CertificateDer::pem_slice_iter(authorities).collect::<Result<Vec<_>, _>>();
        if read.is_ok_and(|certificates| !certificates.is_empty()) {
            let certificates = redis::TlsCertificates { client_tls: None, root_cert: Some(authorities.to_vec()) };
            return Ok(Self::of(Client::build_with_tls(address, certificates).map_err(|_| Error::url())?));
        }
        Err(Error::authorities())
    }

    fn of(client: Client) -> Self {
        let settings =
            Settings { deadline: DEFAULT_STORE_DEADLINE, on_failure: OnFailure::default(), lease: DEFAULT_LEASE };
        Self { settings, shared: Arc::new(Shared::new(client, "{portcullis}".into(), crate::DEFAULT_CAPACITY)) }
    }

    /// Begins every key with this instead of `{portcullis}`. Keep something in braces: a cluster keeps keys together by
    /// it. Processes share what has the same prefix.
    #[must_use]
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.shared = Arc::new(Shared::new(self.shared.client.clone(), prefix.into(), crate::DEFAULT_CAPACITY));
        self
    }

    /// How long a request waits for an answer, 20 ms by default, an hour at most.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.settings.deadline = deadline.min(LONGEST);
        self
    }

    /// What a request gets when there is no answer; [`OnFailure::Admit`] by default.
    #[must_use]
    pub fn on_failure(mut self, on_failure: OnFailure) -> Self {
        self.settings.on_failure = on_failure;
        self
    }

    /// How long a lease lives, a second by default, an hour at most; zero for none at all: then every request that is admitted is a round trip.
    #[must_use]
    pub fn lease(mut self, life: Duration) -> Self {
        self.settings.lease = life.min(LONGEST);
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
        let mut taken = Taken::new(self, limiter, limiter.delay_of(head, now));
        while let Some((limit, own)) = limits.next() {
            let route = own.then_some(limits.route());
            let mut ask = match limit.what(head) {
                Some(What::Place { max }) => {
                    match limiter.enter(limit, max, route, head) {
                        Entered::In(mark) => taken.places.push(mark),
                        Entered::Full(refusal) => return Begun::Decided(Err(limiter.refuse(refusal))),
                        Entered::InShadow => {}
                    }
                    continue;
                }
                Some(What::Charge { rate, cell, units, window }) => {
                    let mut key = KeyBytes::new();
                    limiter.write_key(limit, route, head, &mut key);
                    let (limit, mark, local) = (limit.clone(), self.shared.mark(&key), Local::Wait);
                    Ask { limit, key, mark, twin: false, rate, cell, units, window, local }
                }
                None => continue,
            };
            ask.twin = taken.asks.iter().any(|other| other.mark == ask.mark);
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
            limiter.counters.add(|counts| &counts.refused);
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
    pub(crate) fn settle(&self, mark: u64, key: &str, interval: u64, lease: Option<u64>, units: u32, cost: u32) {
        if cost > units {
            let owed = self.shared.leases.spend(mark, interval, cost - units);
            if owed > 0 {
                self.shared.owe(mark, key, interval.saturating_mul(u64::from(owed)), None);
            }
        } else if let Some(lease) = lease {
            self.shared.leases.give_back(mark, lease, units - cost);
        }
    }

    fn take(&self, ask: &Ask, now: Moment) -> Local {
        self.shared.leases.take(ask.mark, ask.units, ask.cell, self.most(ask), self.settings.deadline, now)
    }

    /// The largest lease worth having; none for a request that leaves some of the window to more important ones, and none for a
    /// key that the request asks for already: it would wait for itself.
    fn most(&self, ask: &Ask) -> u32 {
        if self.settings.lease.is_zero() || ask.twin || ask.window != ask.cell.window {
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

/// What a URL says, if this process can go there.
fn address(url: &str) -> Result<ConnectionInfo, Error> {
    let info = url.into_connection_info().map_err(|_| Error::url())?;
    #[cfg(feature = "redis-tls")]
    if matches!(info.addr(), redis::ConnectionAddr::TcpTls { .. })
        && rustls::crypto::CryptoProvider::get_default().is_none()
    {
        return Err(Error::provider());
    }
    Ok(info)
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Rounded up, and small enough for a double.
fn ticks(nanos: u64) -> u64 {
    let ticks = (u128::from(nanos) * u128::from(TICKS.0)).div_ceil(u128::from(TICKS.1));
    u64::try_from(ticks).unwrap_or(u64::MAX).min(1 << 51)
}

/// Rounded down: a request waits no longer than it may.
fn ticks_within(nanos: u64) -> u64 {
    ticks(nanos.saturating_sub(TICKS.1 / TICKS.0))
}

fn from_ticks(ticks: u64) -> Duration {
    let nanos = (u128::from(ticks) * u128::from(TICKS.1)).div_ceil(u128::from(TICKS.0));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}
