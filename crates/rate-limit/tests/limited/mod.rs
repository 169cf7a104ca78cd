//! A service to put limits before, and requests for it.

use std::net::SocketAddr;
use std::num::NonZeroU32;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use portcullis_core::{Carried, PeerAddress};
use tower::Service;

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

pub(crate) fn n(count: u32) -> NonZeroU32 {
    NonZeroU32::new(count).unwrap()
}

pub(crate) fn from(address: &str) -> Request<()> {
    let mut request = Request::new(());
    PeerAddress(SocketAddr::new(address.parse().unwrap(), 1)).attach(request.extensions_mut());
    request
}
