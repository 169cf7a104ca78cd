//! Says who is at the other end of the connection, where the server does not.

use std::net::SocketAddr;
use std::task::{Context, Poll};

use http::{Extensions, Request};

use crate::{Carried, PeerAddress};

/// Applies [`WithPeerAddress`]: the layers below know their caller by the address of the connection.
///
/// A server that is not ours keeps the address in an extension of its own, or knows it when it accepts:
///
/// | server | layer |
/// |---|---|
/// | axum, by `into_make_service_with_connect_info` | `PeerAddressLayer::new(\|all\| all.get::<ConnectInfo<SocketAddr>>().map(\|info\| info.0))` |
/// | tonic | `PeerAddressLayer::new(\|all\| all.get::<TcpConnectInfo>()?.remote_addr())` |
/// | hyper, for each connection | `PeerAddressLayer::new(move \|_\| Some(peer))` |
///
/// ```
/// use std::net::SocketAddr;
/// use http::Request;
/// use portcullis_core::{Carried, PeerAddress, PeerAddressLayer};
/// use tower_layer::Layer;
/// use tower_service::Service;
/// # struct Last;
/// # impl Service<Request<()>> for Last {
/// #     type Response = Option<SocketAddr>;
/// #     type Error = ();
/// #     type Future = std::future::Ready<Result<Self::Response, ()>>;
/// #     fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), ()>> { Ok(()).into() }
/// #     fn call(&mut self, request: Request<()>) -> Self::Future {
/// #         std::future::ready(Ok(PeerAddress::of(request.extensions()).map(|peer| peer.0)))
/// #     }
/// # }
///
/// #[derive(Clone)]
/// struct ConnectInfo(SocketAddr);
///
/// let mut service = PeerAddressLayer::new(|all| all.get::<ConnectInfo>().map(|info| info.0)).layer(Last);
/// let peer: SocketAddr = "10.0.0.9:5000".parse().unwrap();
/// let known = Request::builder().extension(ConnectInfo(peer)).body(()).unwrap();
/// assert_eq!(service.call(known).into_inner(), Ok(Some(peer)));
/// assert_eq!(service.call(Request::new(())).into_inner(), Ok(None));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct PeerAddressLayer<F> {
    find: F,
}

/// Leaves a [`PeerAddress`] in each request whose address is found.
#[derive(Clone, Copy, Debug)]
pub struct WithPeerAddress<S, F> {
    inner: S,
    find: F,
}

// === impl PeerAddressLayer ===

impl<F> PeerAddressLayer<F>
where
    F: Fn(&Extensions) -> Option<SocketAddr>,
{
    /// Finds the address by `find`, which is shown the request's extensions; where it finds none, what a layer above has
    /// left stays.
    #[must_use]
    pub const fn new(find: F) -> Self {
        Self { find }
    }
}

impl<S, F: Clone> tower_layer::Layer<S> for PeerAddressLayer<F> {
    type Service = WithPeerAddress<S, F>;

    fn layer(&self, inner: S) -> Self::Service {
        WithPeerAddress { inner, find: self.find.clone() }
    }
}

// === impl WithPeerAddress ===

impl<S, F, B> tower_service::Service<Request<B>> for WithPeerAddress<S, F>
where
    S: tower_service::Service<Request<B>>,
    F: Fn(&Extensions) -> Option<SocketAddr>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        if let Some(peer) = (self.find)(request.extensions()) {
            PeerAddress(peer).attach(request.extensions_mut());
        }
        self.inner.call(request)
    }
}
