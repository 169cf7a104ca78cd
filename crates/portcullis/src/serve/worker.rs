//! Accepts connections.

use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, sleep, timeout_at};
use tower_service::Service;
use tracing::warn;

use super::connection::connection;
use super::crew::{Crew, Work};
use super::incoming::Incoming;
use super::phase::{Phase, Watch};
use super::stream::Call;
use super::{BoxError, Limits};

/// One listener's share of the server: all it takes to serve connections in some runtime.
pub(super) struct Worker<S>
where
    Call<S>: Work,
{
    pub(super) service: S,
    /// For the streams of HTTP/2.
    pub(super) crew: Crew<Call<S>>,
    pub(super) limits: Limits,
    pub(super) phase: Watch,
    /// Open as long as a connection is.
    pub(super) open: mpsc::Sender<()>,
}

// === impl Worker ===

impl<S, B> Worker<S>
where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    pub(super) fn own_runtime(self, listener: StdListener) -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let _open = self.open.clone();
        runtime.block_on(async move {
            // The runtime must outlive its connections, which each hold a sender.
            let (open, mut ended) = mpsc::channel(1);
            let accepted = Self { open, ..self }.accept(TcpListener::from_std(listener)?).await;
            _ = ended.recv().await;
            accepted
        })
    }

    pub(super) async fn accept(self, listener: TcpListener) -> io::Result<()> {
        let places = self.limits.connections.clone();
        let mut draining = pin!(self.phase.clone().reaches(Phase::Draining));
        loop {
            let accepted = tokio::select! {
                accepted = next(&listener, &places) => accepted,
                () = &mut draining => {
                    // What was connected before the drain began is served.
                    while let Ok(Ok((stream, peer, place))) = timeout_at(Instant::now(), next(&listener, &places)).await {
                        self.spawn(stream, peer, place);
                    }
                    return Ok(());
                }
            };
            match accepted {
                Ok((stream, peer, place)) => self.spawn(stream, peer, place),
                Err(error) => {
                    // Too many open files, most likely: trying again at once would only burn a core.
                    warn!(%error, "cannot accept");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn spawn(&self, stream: TcpStream, peer: SocketAddr, place: OwnedSemaphorePermit) {
        let (limits, service, crew) = (self.limits.clone(), self.service.clone(), self.crew.clone());
        let (phase, open) = (self.phase.clone(), self.open.clone());
        tokio::spawn(async move {
            let _held = (place, open);
            connection(stream, peer, limits, service, crew, phase).await;
        });
    }
}

/// The next connection, once there is a place for it.
async fn next(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => return Ok((stream, peer, place)),
            // The client has gone already.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
                ) => {}
            Err(error) => return Err(error),
        }
    }
}
