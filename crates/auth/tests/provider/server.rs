//! A provider whose every answer the test decides, and callers whose tokens need its keys.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use portcullis_auth::{Attempt, Authenticate, Denied, Head, Jwt, KeySet, KeySource};
use portcullis_core::Identity;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use crate::support::{self, Signer, request, wall};

#[derive(Clone)]
pub(crate) enum Mode {
    Keys(Value),
    /// As they are, with this `Cache-Control`.
    KeysFor(Value, &'static str),
    Status(u16),
    Html,
    Huge,
    Redirect(String),
    Hang,
    CutOff,
    Hangup,
}

/// A provider whose every answer the test decides.
#[derive(Clone)]
pub(crate) struct Provider {
    mode: Arc<Mutex<Mode>>,
    pub(crate) asked: watch::Sender<usize>,
    pub(crate) address: std::net::SocketAddr,
    pub(crate) discovery: Arc<Mutex<Option<Value>>>,
    died: Arc<Notify>,
}

impl Provider {
    pub(crate) async fn start(mode: Mode) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let provider = Self {
            mode: Arc::new(Mutex::new(mode)),
            asked: watch::Sender::new(0),
            address: listener.local_addr().unwrap(),
            discovery: Arc::default(),
            died: Arc::default(),
        };
        let server = provider.clone();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    accepted = listener.accept() => drop(tokio::spawn(server.clone().serve(accepted.unwrap().0))),
                    () = server.died.notified() => return,
                }
            }
        });
        provider
    }

    /// Nobody listens there from now on.
    pub(crate) async fn die(&self) {
        self.died.notify_one();
        while TcpStream::connect(self.address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    }

    pub(crate) async fn serve<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(self, mut stream: S) {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            match stream.read_u8().await {
                Ok(byte) => head.push(byte),
                Err(_) => return,
            }
        }
        let head = String::from_utf8(head).unwrap();
        let lock = || self.mode.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let discovery = self.discovery.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let ok = |body: String, more: &str| {
            format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n{more}\r\n{body}", body.len()).into_bytes()
        };
        if head.starts_with("GET /.well-known/openid-configuration ")
            && let Some(document) = discovery
        {
            stream.write_all(&ok(document.to_string(), "")).await.unwrap();
            return;
        }
        assert!(head.starts_with("GET /keys HTTP/1.1\r\n"), "{head}");
        let answer = match lock() {
            Mode::Keys(keys) => ok(keys.to_string(), ""),
            Mode::KeysFor(keys, control) => ok(keys.to_string(), &format!("cache-control: {control}\r\n")),
            Mode::Status(status) => format!("HTTP/1.1 {status} No\r\ncontent-length: 0\r\n\r\n").into_bytes(),
            Mode::Html => ok("<html>not found, but 200</html>".into(), ""),
            Mode::Huge => ok(" ".repeat(10 << 20), ""),
            Mode::Redirect(to) => {
                format!("HTTP/1.1 302 Found\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n").into_bytes()
            }
            Mode::CutOff => b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{\"keys\":".to_vec(),
            Mode::Hangup => Vec::new(),
            Mode::Hang => {
                self.asked.send_modify(|count| *count += 1);
                std::future::pending().await
            }
        };
        self.asked.send_modify(|count| *count += 1);
        let _ = stream.write_all(&answer).await;
    }

    pub(crate) fn set(&self, mode: Mode) {
        *self.mode.lock().unwrap_or_else(PoisonError::into_inner) = mode;
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/keys", self.address)
    }

    pub(crate) fn asked(&self) -> usize {
        *self.asked.borrow()
    }
}

/// Keeps the clock from moving by itself as long as it lives.
pub(crate) struct StandStill {
    _until_dropped: std::sync::mpsc::Sender<()>,
}

pub(crate) fn stand_still() -> StandStill {
    let (sender, receiver) = std::sync::mpsc::channel::<()>();
    tokio::task::spawn_blocking(move || receiver.recv());
    StandStill { _until_dropped: sender }
}

/// The tests' view of the whole: tokens, of which none is remembered, and what became of them.
pub(crate) struct Callers {
    jwt: Jwt,
    pub(crate) keys: KeySet,
}

/// Callers who never stop, and what became of their tokens.
pub(crate) struct Flow {
    callers: Arc<Callers>,
    signer: Arc<Mutex<(Arc<Signer>, &'static str)>>,
    served: Arc<AtomicUsize>,
    refused: Arc<AtomicUsize>,
    tasks: JoinSet<()>,
}

impl Callers {
    pub(crate) fn new(keys: KeySet) -> Self {
        let jwt = Jwt::new(keys.clone()).wall_clock(wall()).cache_bytes(0);
        Self { jwt, keys }
    }

    pub(crate) async fn call(&self, signer: &Signer, kid: &str) -> Result<Identity, Denied> {
        let token = signer.sign_with(&json!({"alg": signer.algorithm.as_str(), "kid": kid}), &support::claims());
        match self.jwt.authenticate(&Head::of(&request(&format!("Bearer {token}")))) {
            Attempt::Now(result) => result,
            Attempt::Later(later) => later.await,
        }
    }

    /// Waits until the source was tried so often.
    pub(crate) async fn tried(&self, times: u64) {
        while self.keys.freshness().unwrap().fetches < times {
            tokio::task::yield_now().await;
        }
    }
}

impl Flow {
    /// Several callers at once, with tokens of this key.
    pub(crate) fn start(callers: Callers, signer: Arc<Signer>, kid: &'static str) -> Self {
        let mut flow = Self {
            callers: Arc::new(callers),
            signer: Arc::new(Mutex::new((signer, kid))),
            served: Arc::default(),
            refused: Arc::default(),
            tasks: JoinSet::new(),
        };
        for _ in 0..4 {
            let (callers, signer) = (flow.callers.clone(), flow.signer.clone());
            let (served, refused) = (flow.served.clone(), flow.refused.clone());
            flow.tasks.spawn(async move {
                loop {
                    let (signer, kid) = signer.lock().unwrap_or_else(PoisonError::into_inner).clone();
                    let count = if callers.call(&signer, kid).await.is_ok() { &served } else { &refused };
                    count.fetch_add(1, Ordering::Relaxed);
                    tokio::task::yield_now().await;
                }
            });
        }
        flow
    }

    /// From now on tokens are signed with another key.
    pub(crate) fn sign_with(&self, signer: Arc<Signer>, kid: &'static str) {
        *self.signer.lock().unwrap_or_else(PoisonError::into_inner) = (signer, kid);
    }

    /// Waits until so many more were answered.
    pub(crate) async fn more(&self, answers: usize) {
        let all = || self.counts().0 + self.counts().1;
        let enough = all() + answers;
        while all() < enough {
            tokio::task::yield_now().await;
        }
    }

    pub(crate) fn callers(&self) -> &Callers {
        &self.callers
    }

    /// How many were served, and how many refused.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.served.load(Ordering::Relaxed), self.refused.load(Ordering::Relaxed))
    }
}

pub(crate) fn keys(signers: &[(&Signer, &str)]) -> Value {
    json!({"keys": signers.iter().map(|(signer, kid)| signer.jwk(kid)).collect::<Vec<_>>()})
}

pub(crate) fn source(provider: &Provider) -> KeySource {
    KeySource::url(provider.url()).insecure_http()
}

pub(crate) async fn pass(seconds: u64) {
    tokio::time::advance(Duration::from_secs(seconds)).await;
}
