//! A server for [`echo`](crate::echo).

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::{Stream, StreamExt, stream};
use tonic::{Code, Request, Response, Status, Streaming};

use crate::echo::echo_server::Echo;
use crate::echo::{Ping, Pong};

/// What a backend runs that speaks gRPC.
#[derive(Debug)]
pub(crate) struct Echoing {
    pub(crate) name: Arc<str>,
    pub(crate) requests: Arc<AtomicU64>,
}

impl Echoing {
    fn answer(&self, ping: Ping) -> Result<Pong, Status> {
        match ping.fail {
            0 => Ok(Pong { text: ping.text, server: self.name.to_string() }),
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
        let pong = Pong { text: ping.text.clone(), server: self.name.to_string() };
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
        Ok(Response::new(Pong { text, server: self.name.to_string() }))
    }

    async fn talk(&self, request: Request<Streaming<Ping>>) -> Result<Response<Answers>, Status> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let this = Self { name: self.name.clone(), requests: self.requests.clone() };
        let answers = request.into_inner().map(move |ping| this.answer(ping?));
        Ok(Response::new(Box::pin(answers)))
    }
}
