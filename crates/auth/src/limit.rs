//! How often one address may fail, so that garbage cannot buy signatures.
//!
//! Two rows of cells, each a GCRA clock ([ITU-T I.371](https://www.itu.int/rec/T-REC-I.371)); an address has one cell in
//! each row and is refused only when both are spent. So memory is fixed whatever the number of addresses, and an address
//! that shares one cell with an attacker is not refused with it.

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use portcullis_core::{Moment, ipv6_prefix};

/// Cells in a row: 64 KiB for both rows.
const CELLS: usize = 4096;

#[derive(Debug)]
pub(crate) struct FailureLimit {
    rows: [Box<[AtomicU64]>; 2],
    hash: RandomState,
    /// Between two failures of a caller that keeps to the rate, in nanoseconds.
    interval: u64,
    burst: u64,
}

/// One attempt that was paid for.
pub(crate) struct Charge<'a> {
    limit: &'a FailureLimit,
    cells: [usize; 2],
}

// === impl FailureLimit ===

impl FailureLimit {
    /// So many failures at once, and one more after each `interval`.
    pub(crate) fn new(burst: u32, interval: Duration) -> Self {
        let row = || (0..CELLS).map(|_| AtomicU64::new(0)).collect();
        let interval = u64::try_from(interval.as_nanos()).unwrap_or(u64::MAX);
        Self { rows: [row(), row()], hash: RandomState::new(), interval, burst: u64::from(burst) }
    }

    /// Pays for an attempt, or says how long to wait. What succeeds is [given back](Charge::give_back).
    ///
    /// Attempts that look at the same time may each find the last place; it is processor time that is limited, not a
    /// count.
    pub(crate) fn take(&self, address: IpAddr, now: Moment) -> Result<Charge<'_>, Duration> {
        // An IPv6 subscriber has at least a /64.
        let hash = self.hash.hash_one(ipv6_prefix(address, 64));
        let cells = [hash as usize % CELLS, (hash >> 32) as usize % CELLS];
        let now = now.as_nanos();
        let latest = now.saturating_add(self.interval.saturating_mul(self.burst.saturating_sub(1)));
        let spent = |(row, cell): (&[AtomicU64], usize)| row[cell].load(Ordering::Relaxed).saturating_sub(latest);
        let over = self.rows.iter().map(|row| &**row).zip(cells).map(spent).min().unwrap_or(0);
        if over > 0 || self.burst == 0 {
            return Err(Duration::from_nanos(over.max(1)));
        }
        for (row, cell) in self.rows.iter().zip(cells) {
            let pay = |at: u64| Some(at.max(now).saturating_add(self.interval));
            let _ = row[cell].fetch_update(Ordering::Relaxed, Ordering::Relaxed, pay);
        }
        Ok(Charge { limit: self, cells })
    }
}

// === impl Charge ===

impl Charge<'_> {
    pub(crate) fn give_back(self) {
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

    fn at(millis: u64) -> Moment {
        Moment::from_nanos(1 << 40) + Duration::from_millis(millis)
    }

    #[test]
    fn a_burst_then_the_rate_and_never_more() {
        let limit = FailureLimit::new(5, Duration::from_millis(100));
        for _ in 0..5 {
            assert!(limit.take(address(1), at(0)).is_ok());
        }
        assert_eq!(limit.take(address(1), at(0)).err(), Some(Duration::from_millis(100)));
        assert!(limit.take(address(1), at(99)).is_err());
        assert!(limit.take(address(1), at(100)).is_ok());
        assert!(limit.take(address(1), at(100)).is_err());
        assert!(limit.take(address(2), at(100)).is_ok(), "another address");
        let admitted = (0..10_000).filter(|n| limit.take(address(3), at(*n)).is_ok()).count();
        assert_eq!(admitted, 5 + 99);
    }

    #[test]
    fn what_succeeds_costs_nothing() {
        let limit = FailureLimit::new(1, Duration::from_secs(1));
        for _ in 0..100 {
            limit.take(address(1), at(0)).unwrap_or_else(|_| panic!("refused")).give_back();
        }
    }

    #[test]
    fn an_ipv6_network_is_one_caller() {
        let limit = FailureLimit::new(1, Duration::from_secs(1));
        assert!(limit.take("2001:db8::1".parse().unwrap(), at(0)).is_ok());
        assert!(limit.take("2001:db8::ffff:2".parse().unwrap(), at(0)).is_err());
        assert!(limit.take("2001:db8:0:1::1".parse().unwrap(), at(0)).is_ok());
        assert!(limit.take("::ffff:192.0.2.9".parse().unwrap(), at(0)).is_ok());
        assert!(limit.take(address(9), at(0)).is_err(), "one form for each address");
    }

    #[test]
    fn a_flood_from_many_addresses_hardly_touches_others() {
        let limit = FailureLimit::new(10, Duration::from_secs(1));
        for n in 0..100_u32 {
            for _ in 0..20 {
                let _ = limit.take(IpAddr::from((0x0a00_0000 | n).to_be_bytes()), at(0));
            }
        }
        let refused =
            (0..10_000_u32).filter(|n| limit.take(IpAddr::from((0xc000_0000 | n).to_be_bytes()), at(0)).is_err());
        assert!(refused.count() < 200);
    }
}
