//! What tests of limits in a real Redis begin with.

use std::time::Duration;

use http::Response;
use portcullis_rate_limit::{RateLimit, RedisStore};
use portcullis_testing::Redis;
use tower::ServiceExt;

#[path = "../limited/mod.rs"]
mod limited;

pub(crate) use self::limited::{Ok200, from, n};

/// Long enough for a machine that has other things to do.
pub(crate) const PATIENT: Duration = Duration::from_secs(5);

/// Another process, as far as the store can tell.
pub(crate) fn store(redis: &Redis) -> RedisStore {
    RedisStore::new(&redis.url()).unwrap().deadline(PATIENT)
}

pub(crate) async fn call(service: &RateLimit<Ok200>, address: &str) -> Response<()> {
    service.clone().oneshot(from(address)).await.unwrap().map(drop)
}

pub(crate) async fn status(service: &RateLimit<Ok200>, address: &str) -> u16 {
    call(service, address).await.status().as_u16()
}

/// Calls so often, so many at a time; how many were admitted.
pub(crate) async fn admitted(service: &RateLimit<Ok200>, address: &'static str, calls: usize) -> usize {
    let mut admitted = 0;
    for _ in 0..calls.div_ceil(16) {
        let some = futures::future::join_all((0..16).map(|_| status(service, address))).await;
        admitted += some.iter().filter(|status| **status == 200).count();
    }
    admitted
}
