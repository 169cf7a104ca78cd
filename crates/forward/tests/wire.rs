//! Bytes in, bytes out: raw sockets on both sides of a [`Forward`] behind hyper's server.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod cases;

use std::convert::Infallible;
use std::net::SocketAddr;

use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use portcullis_core::{Carried, PeerAddress};
use portcullis_forward::Forward;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tower::Service;

/// A server that runs a forward.
pub(crate) struct Front(Forward);

impl Front {
    /// Whether hyper alone reads what clients send.
    pub(crate) const IS_HYPER: bool = true;

    pub(crate) fn start(forward: &Forward) -> Self {
        Self(forward.clone())
    }

    /// Where it listens.
    pub(crate) async fn listen(&self) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let forward = self.0.clone();
        tokio::spawn(async move {
            while let Ok((io, peer)) = listener.accept().await {
                tokio::spawn(serve(io, peer, forward.clone()));
            }
        });
        address
    }

    /// A client's connection to it, and what is done when it is over.
    pub(crate) async fn connect(&self) -> (DuplexStream, JoinHandle<()>) {
        let (client, server) = tokio::io::duplex(64 * 1024);
        (client, tokio::spawn(serve(server, ([127, 0, 0, 1], 1).into(), self.0.clone())))
    }
}

/// Runs `forward` on one connection, HTTP/1.1 or HTTP/2 as it comes.
async fn serve<I>(io: I, peer: SocketAddr, forward: Forward)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |mut request: http::Request<Incoming>| {
        PeerAddress(peer).attach(request.extensions_mut());
        let mut forward = forward.clone();
        async move { Ok::<_, Infallible>(forward.call(request).await.unwrap_or_else(|never| match never {})) }
    });
    let mut builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new());
    let _ = builder.serve_connection_with_upgrades(TokioIo::new(io), service).await;
}
