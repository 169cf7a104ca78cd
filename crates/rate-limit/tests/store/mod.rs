//! What tests of limits in a real Redis begin with.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use portcullis_core::{Carried, PeerAddress};
use portcullis_rate_limit::{RateLimit, RedisStore};
use portcullis_testing::Redis;
use tower::{Service, ServiceExt};

/// Long enough for a machine that has other things to do.
pub(crate) const PATIENT: Duration = Duration::from_secs(5);

pub(crate) fn n(count: u32) -> NonZeroU32 {
    NonZeroU32::new(count).unwrap()
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Ok200;

impl<B> Service<Request<B>> for Ok200 {
    type Response = Response<Full<Bytes>>;
    type Error = std::convert::Infallible;
    type Future = std::future::Ready<Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<B>) -> Self::Future {
        std::future::ready(Ok(Response::new(Full::from("ok"))))
    }
}

/// Another process, as far as the store can tell.
pub(crate) fn store(redis: &Redis) -> RedisStore {
    RedisStore::new(&redis.url()).unwrap().deadline(PATIENT)
}

pub(crate) fn from(address: &str) -> Request<()> {
    let mut request = Request::new(());
    PeerAddress(SocketAddr::new(address.parse().unwrap(), 1)).attach(request.extensions_mut());
    request
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
