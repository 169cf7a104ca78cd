//! A server for [`echo`](crate::echo).

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::{Stream, StreamExt, stream};
use tokio::task::JoinHandle;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::backend::serve;
use crate::echo::echo_server::{Echo, EchoServer};
use crate::echo::{Ping, Pong};

/// A gRPC server on a free port; dropping it kills it with all its connections.
#[derive(Debug)]
pub struct EchoBackend {
    address: SocketAddr,
    requests: Arc<AtomicU64>,
    server: JoinHandle<()>,
}

#[derive(Debug)]
struct Echoing {
    name: String,
    requests: Arc<AtomicU64>,
}

impl EchoBackend {
    /// Starts one whose answers carry `name`.
    pub async fn start(name: &str) -> Self {
        let requests = Arc::<AtomicU64>::default();
        let service = EchoServer::new(Echoing { name: name.to_owned(), requests: requests.clone() });
        let (address, server) = serve(SocketAddr::from(([127, 0, 0, 1], 0)), service).await;
        Self { address, requests, server }
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many calls reached it.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Closes the listener and cuts every connection, and waits until that is done.
    pub async fn kill(self) {
        self.server.abort();
        while !self.server.is_finished() {
            tokio::task::yield_now().await;
        }
    }
}

impl Drop for EchoBackend {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Echoing {
    fn answer(&self, ping: Ping) -> Result<Pong, Status> {
        match ping.fail {
            0 => Ok(Pong { text: ping.text, server: self.name.clone() }),
            code => Err(Status::new(Code::from(i32::try_from(code).unwrap_or_default()), "failed as told")),
        }
    }
}

type Answers = Pin<Box<dyn Stream<Item = Result<Pong, Status>> + Send>>;

#[tonic::async_trait]
impl Echo for Echoing {
    type DownloadStream = Answers;
    type TalkStream = Answers;

    async fn unary(&self, request: Request<Ping>) -> Result<Response<Pong>, Status> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.answer(request.into_inner()).map(Response::new)
    }

    async fn download(&self, request: Request<Ping>) -> Result<Response<Answers>, Status> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let ping = request.into_inner();
        let pong = Pong { text: ping.text.clone(), server: self.name.clone() };
        let last = self.answer(ping.clone()).err().map(Err);
        let answers = stream::iter((0..ping.times).map(move |_| Ok(pong.clone())).chain(last));
        Ok(Response::new(Box::pin(answers)))
    }

    async fn upload(&self, request: Request<Streaming<Ping>>) -> Result<Response<Pong>, Status> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let mut pings = request.into_inner();
        let mut text = String::new();
        while let Some(ping) = pings.next().await {
            text += &self.answer(ping?)?.text;
        }
        Ok(Response::new(Pong { text, server: self.name.clone() }))
    }

    async fn talk(&self, request: Request<Streaming<Ping>>) -> Result<Response<Answers>, Status> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let this = Self { name: self.name.clone(), requests: self.requests.clone() };
        let answers = request.into_inner().map(move |ping| this.answer(ping?));
        Ok(Response::new(Box::pin(answers)))
    }
}
