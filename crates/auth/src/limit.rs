//! How often one address may fail, so that garbage cannot buy signatures and secrets cannot be guessed.
//!
//! Two rows of cells, each a GCRA clock ([ITU-T I.371](https://www.itu.int/rec/T-REC-I.371)); an address has one cell in
//! each row and is refused only when both are spent. So memory is fixed whatever the number of addresses, and an address
//! that shares one cell with an attacker is not refused with it.

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Once};
use std::time::Duration;

use http::HeaderName;
use http::header::AUTHORIZATION;
use portcullis_core::{Clock, Moment, TrustedProxies, ipv6_prefix};

use crate::authenticate::{Denied, Head};

/// How many attempts of one client address may fail at once, unless said otherwise.
pub const DEFAULT_FAILURE_BURST: u32 = 100;

/// After how long one more may fail, unless said otherwise.
pub const DEFAULT_FAILURE_INTERVAL: Duration = Duration::from_millis(50);

/// Cells in a row: 64 KiB for both rows.
const CELLS: usize = 4096;

/// The limit of one proof, and what it takes to know whom it is about. Clones share the limit.
#[derive(Clone)]
pub(crate) struct Failures {
    pub(crate) limit: Arc<FailureLimit>,
    pub(crate) proxies: TrustedProxies,
    pub(crate) clock: Clock,
}

#[derive(Debug)]
pub(crate) struct FailureLimit {
    rows: [Box<[AtomicU64]>; 2],
    hash: RandomState,
    /// Between two failures of a caller that keeps to the rate, in nanoseconds.
    interval: u64,
    burst: u64,
}

/// One attempt, to be paid for.
struct Charge<'a> {
    limit: &'a Arc<FailureLimit>,
    cells: [usize; 2],
}

/// What was paid for an attempt.
#[derive(Clone, Debug)]
pub(crate) struct Paid {
    limit: Arc<FailureLimit>,
    cells: [usize; 2],
    /// Where the attempt was.
    carrier: HeaderName,
}

// === impl Failures ===

impl Default for Failures {
    fn default() -> Self {
        Self {
            limit: Arc::new(FailureLimit::new(DEFAULT_FAILURE_BURST, DEFAULT_FAILURE_INTERVAL)),
            proxies: TrustedProxies::none(),
            clock: Clock::system(),
        }
    }
}

impl Failures {
    /// The client's address; a stack without one is warned of once.
    pub(crate) fn address(&self, head: &Head<'_>) -> Option<IpAddr> {
        let address = self.proxies.client_of(head.extensions(), head.headers());
        if address.is_none() {
            static ONCE: Once = Once::new();
            ONCE.call_once(|| tracing::warn!("requests carry no peer address: failed attempts are not limited"));
        }
        address
    }

    /// Pays for an attempt of whoever has an address.
    pub(crate) fn take(&self, address: Option<IpAddr>) -> Result<Option<Paid>, Denied> {
        let take = |address| self.limit.take(address, AUTHORIZATION, self.clock.now()).map_err(Denied::limited);
        address.map(take).transpose()
    }

    /// Looks at an attempt in the field `carrier` that costs nothing unless it fails, which is `None`: `why` then.
    pub(crate) fn judge<T>(
        &self,
        head: &Head<'_>,
        carrier: &HeaderName,
        why: &'static str,
        attempt: impl FnOnce() -> Option<T>,
    ) -> Result<T, Denied> {
        let look = |address| self.limit.look(address, || self.clock.now()).map_err(Denied::limited);
        let charge = self.address(head).map(look).transpose()?;
        let pay = |charge: Charge<'_>| charge.pay(carrier.clone(), self.clock.now());
        attempt().ok_or_else(|| Denied::invalid(why).paid(charge.map(pay)))
    }
}

// === impl FailureLimit ===

impl FailureLimit {
    /// So many failures at once, and one more after each `interval`.
    pub(crate) fn new(burst: u32, interval: Duration) -> Self {
        let row = || (0..CELLS).map(|_| AtomicU64::new(0)).collect();
        let interval = u64::try_from(interval.as_nanos()).unwrap_or(u64::MAX);
        Self { rows: [row(), row()], hash: RandomState::new(), interval, burst: u64::from(burst) }
    }

    /// Pays for an attempt, or says how long to wait. What succeeds is [taken back](Paid::take_back).
    ///
    /// Attempts that look at the same time may each find the last place; it is processor time that is limited, not a
    /// count.
    fn take(self: &Arc<Self>, address: IpAddr, carrier: HeaderName, now: Moment) -> Result<Paid, Duration> {
        Ok(self.look(address, || now)?.pay(carrier, now))
    }

    /// Whether an attempt is looked at, or how long to wait. Nothing is paid yet, and the clock is read only for who failed
    /// before.
    fn look(self: &Arc<Self>, address: IpAddr, now: impl FnOnce() -> Moment) -> Result<Charge<'_>, Duration> {
        // An IPv6 subscriber has at least a /64.
        let hash = self.hash.hash_one(ipv6_prefix(address, 64));
        let cells = [hash as usize % CELLS, (hash >> 32) as usize % CELLS];
        let paid = self.rows.iter().zip(cells).map(|(row, cell)| row[cell].load(Ordering::Relaxed)).min().unwrap_or(0);
        if paid > 0 || self.burst == 0 {
            let latest = now().as_nanos().saturating_add(self.interval.saturating_mul(self.burst.saturating_sub(1)));
            let over = paid.saturating_sub(latest);
            if over > 0 || self.burst == 0 {
                return Err(Duration::from_nanos(over.max(1)));
            }
        }
        Ok(Charge { limit: self, cells })
    }
}

// === impl Charge ===

impl Charge<'_> {
    fn pay(self, carrier: HeaderName, now: Moment) -> Paid {
        let pay = |at: u64| Some(at.max(now.as_nanos()).saturating_add(self.limit.interval));
        for (row, cell) in self.limit.rows.iter().zip(self.cells) {
            let _ = row[cell].fetch_update(Ordering::Relaxed, Ordering::Relaxed, pay);
        }
        Paid { limit: self.limit.clone(), cells: self.cells, carrier }
    }
}

// === impl Paid ===

impl Paid {
    pub(crate) const fn carrier(&self) -> &HeaderName {
        &self.carrier
    }

    pub(crate) fn take_back(self) {
        for (row, cell) in self.limit.rows.iter().zip(self.cells) {
            let refund = |at: u64| Some(at.saturating_sub(self.limit.interval));
            let _ = row[cell].fetch_update(Ordering::Relaxed, Ordering::Relaxed, refund);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    fn limited(burst: u32, interval: Duration) -> Arc<FailureLimit> {
        Arc::new(FailureLimit::new(burst, interval))
    }

    fn at(millis: u64) -> Moment {
        Moment::from_nanos(1 << 40) + Duration::from_millis(millis)
    }

    #[test]
    fn a_burst_then_the_rate_and_never_more() {
        let limit = limited(5, Duration::from_millis(100));
        for _ in 0..5 {
            assert!(limit.take(address(1), AUTHORIZATION, at(0)).is_ok());
        }
        assert_eq!(limit.take(address(1), AUTHORIZATION, at(0)).err(), Some(Duration::from_millis(100)));
        assert!(limit.take(address(1), AUTHORIZATION, at(99)).is_err());
        assert!(limit.take(address(1), AUTHORIZATION, at(100)).is_ok());
        assert!(limit.take(address(1), AUTHORIZATION, at(100)).is_err());
        assert!(limit.take(address(2), AUTHORIZATION, at(100)).is_ok(), "another address");
        let admitted = (0..10_000).filter(|n| limit.take(address(3), AUTHORIZATION, at(*n)).is_ok()).count();
        assert_eq!(admitted, 5 + 99);
    }

    #[test]
    fn the_clock_is_not_read_for_who_never_failed() {
        let limit = limited(1, Duration::from_secs(1));
        assert!(limit.look(address(1), || unreachable!("the clock was read")).is_ok());
        assert!(limit.take(address(1), AUTHORIZATION, at(0)).is_ok() && limit.look(address(1), || at(0)).is_err());
        assert!(limit.look(address(1), || at(1000)).is_ok());
        assert!(limited(0, Duration::ZERO).look(address(1), || at(0)).is_err(), "nobody may fail at all");
    }

    #[test]
    fn what_succeeds_costs_nothing() {
        let limit = limited(1, Duration::from_secs(1));
        for _ in 0..100 {
            limit.take(address(1), AUTHORIZATION, at(0)).unwrap_or_else(|_| panic!("refused")).take_back();
        }
    }

    #[test]
    fn an_ipv6_network_is_one_caller() {
        let limit = limited(1, Duration::from_secs(1));
        assert!(limit.take("2001:db8::1".parse().unwrap(), AUTHORIZATION, at(0)).is_ok());
        assert!(limit.take("2001:db8::ffff:2".parse().unwrap(), AUTHORIZATION, at(0)).is_err());
        assert!(limit.take("2001:db8:0:1::1".parse().unwrap(), AUTHORIZATION, at(0)).is_ok());
        assert!(limit.take("::ffff:192.0.2.9".parse().unwrap(), AUTHORIZATION, at(0)).is_ok());
        assert!(limit.take(address(9), AUTHORIZATION, at(0)).is_err(), "one form for each address");
    }

    #[test]
    fn a_flood_from_many_addresses_hardly_touches_others() {
        let limit = limited(10, Duration::from_secs(1));
        for n in 0..100_u32 {
            for _ in 0..20 {
                let _ = limit.take(IpAddr::from((0x0a00_0000 | n).to_be_bytes()), AUTHORIZATION, at(0));
            }
        }
        let refused = (0..10_000_u32)
            .filter(|n| limit.take(IpAddr::from((0xc000_0000 | n).to_be_bytes()), AUTHORIZATION, at(0)).is_err());
        assert!(refused.count() < 200);
    }
}
