//! Accepts connections.

use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::sleep;
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
        let ended = runtime.block_on(async move {
            // The runtime must outlive its connections, which each hold a sender.
            let (open, mut ended) = mpsc::channel(1);
            let accepted = Self { open, ..self }.accept(TcpListener::from_std(listener)?).await;
            _ = ended.recv().await;
            accepted
        });
        // Whoever still looks up a name is not waited for.
        runtime.shutdown_background();
        ended
    }

    pub(super) async fn accept(self, listener: TcpListener) -> io::Result<()> {
        let mut draining = pin!(self.phase.clone().reaches(Phase::Draining));
        loop {
            let accepted = tokio::select! {
                accepted = next(&listener) => accepted,
                () = &mut draining => break,
            };
            match accepted {
                // Accepted before there is a place for it: of several listeners, one that nobody comes to has none.
                Ok((stream, peer)) => {
                    let Some(place) = place(&self.limits.connections, &self.phase).await else { return Ok(()) };
                    self.spawn(stream, peer, async { Some(place) });
                }
                Err(error) => {
                    // Too many open files, most likely: trying again at once would only burn a core.
                    warn!(%error, "cannot accept");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
        // What was connected before the drain began is served. The listener itself is asked: what the runtime knows of it may
        // be old.
        let listener = listener.into_std()?;
        while let Ok((stream, peer)) = listener.accept() {
            stream.set_nonblocking(true)?;
            let (places, phase) = (self.limits.connections.clone(), self.phase.clone());
            self.spawn(TcpStream::from_std(stream)?, peer, async move { place(&places, &phase).await });
        }
        Ok(())
    }

    fn spawn(
        &self,
        stream: TcpStream,
        peer: SocketAddr,
        place: impl Future<Output = Option<OwnedSemaphorePermit>> + Send + 'static,
    ) {
        let (limits, service, crew) = (self.limits.clone(), self.service.clone(), self.crew.clone());
        let (phase, open) = (self.phase.clone(), self.open.clone());
        tokio::spawn(async move {
            let Some(place) = place.await else { return };
            let _held = (place, open);
            connection(stream, peer, limits, service, crew, phase).await;
        });
    }
}

/// A place among the connections; `None` when all is over.
async fn place(places: &Arc<Semaphore>, phase: &Watch) -> Option<OwnedSemaphorePermit> {
    if let Ok(place) = places.clone().try_acquire_owned() {
        return Some(place);
    }
    tokio::select! {
        place = places.clone().acquire_owned() => place.ok(),
        () = phase.clone().reaches(Phase::Over) => None,
    }
}

/// The next connection.
async fn next(listener: &TcpListener) -> io::Result<(TcpStream, SocketAddr)> {
    loop {
        match listener.accept().await {
            // The client has gone already.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
                ) => {}
            accepted => return accepted,
        }
    }
}
