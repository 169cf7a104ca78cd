//! Builds the program for those who run it: optimized by a profile of itself at work.
//!
//! `cargo run -p portcullis-gateway --example pgo` builds `portcullis`, and `portcullis-bench` with `-- bench` behind it. What
//! else stands there goes to cargo: `-- --features otlp`. It takes a quarter of an hour and needs the toolchain's own
//! tools: `rustup component add llvm-tools`. At its end it prints where the program is.
//!
//! A program that counts how often each piece of it runs is built first; it is asked in each way that is to be fast; then it
//! is built anew, by what was counted. Flags in `RUSTFLAGS` count for both. What nobody asked for here, such as retries, is as
//! correct as before, and built to be small.

#![allow(clippy::expect_used, reason = "what cannot go on says why and ends")]

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::{env, fs};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use futures::future::join_all;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use portcullis_testing::echo::Ping;
use portcullis_testing::echo::echo_client::EchoClient;
use portcullis_testing::process::{Process, free_port, scratch_folder};
use portcullis_testing::{Backend, token};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

/// How many requests each connection, or each stream of one, makes one after the other.
const REQUESTS: usize = 400;
const CONNECTIONS: usize = 32;
const STREAMS: usize = 8;
const SECRET: &[u8] = b"one that only this training uses";

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// Who is asked, and how: over TLS if there is a connector.
struct Asked {
    address: SocketAddr,
    tls: Option<TlsConnector>,
}

/// What one kind of request is.
#[derive(Clone)]
struct Kind {
    method: Method,
    target: &'static str,
    body: Bytes,
    /// One of them for each request, if any.
    tokens: Arc<[String]>,
}

#[tokio::main]
async fn main() {
    let mut arguments = env::args().skip(1).peekable();
    let is_bench = arguments.next_if_eq("bench").is_some();
    let (package, program) =
        if is_bench { ("portcullis-bench", "portcullis-bench") } else { ("portcullis-gateway", "portcullis") };
    let more: Vec<String> = arguments.collect();
    let build = |flag: &str| build(package, program, &more, flag);
    let tools = tools();
    let folder = scratch_folder("pgo");
    let (counts, profile) = (folder.join("counts"), folder.join("profile"));

    let counting = build("-Cprofile-generate");
    if is_bench {
        bench(&counting, &folder).await
    } else {
        gateway(&counting, &folder).await
    }
    run(Command::new(tools.join("llvm-profdata")).arg("merge").arg("-o").arg(&profile).arg(&counts));
    let built = build(&format!("-Cprofile-use={}", profile.display()));
    fs::remove_dir_all(&folder).expect("the folder of this run");
    println!("{}", built.display());
}

/// Where the toolchain has `llvm-profdata`, which must be of the compiler's own version.
fn tools() -> PathBuf {
    let libraries = output(Command::new("rustc").args(["--print", "target-libdir"]));
    let tools = Path::new(&libraries).with_file_name("bin");
    assert!(tools.join("llvm-profdata").exists(), "no llvm-profdata: `rustup component add llvm-tools` brings it");
    tools
}

/// Builds the program with one flag more, and says where it is.
fn build(package: &str, program: &str, more: &[String], flag: &str) -> PathBuf {
    let version = output(Command::new("rustc").arg("-vV"));
    // With a target that is named, what runs while building is built without the flag.
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).expect("a host");
    // In cargo's own encoding, where a flag may hold a path with spaces.
    let flags = env::var("RUSTFLAGS").unwrap_or_default();
    let flags = flags.split_whitespace().chain([flag]).collect::<Vec<_>>().join("\x1f");
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let target = portcullis_testing::program::target_folder().join("pgo");
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace).env("CARGO_ENCODED_RUSTFLAGS", flags);
    cargo.args(["build", "--locked", "--profile", "dist", "--target", host, "--package", package]);
    run(cargo.arg("--bin").arg(program).arg("--target-dir").arg(&target).args(more));
    target.join(host).join("dist").join(program)
}

fn run(command: &mut Command) {
    let status = command.status().unwrap_or_else(|error| panic!("cannot start {:?}: {error}", command.get_program()));
    assert!(status.success(), "{:?}: {status}", command.get_program());
}

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("cannot start {:?}: {error}", command.get_program()));
    assert!(output.status.success(), "{:?}: {}", command.get_program(), output.status);
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Trains the program, with a file that says most of what routes say.
async fn gateway(program: &Path, folder: &Path) {
    let pair = rcgen::generate_simple_self_signed([String::from("localhost")]).expect("a certificate");
    let (web, calls, plain, tls) = (backends().await, callees().await, local(free_port()), local(free_port()));
    let listed = |backends: &[Backend]| {
        let addresses = backends.iter().map(|backend| format!("\"{}\"", backend.address()));
        addresses.collect::<Vec<_>>().join(", ")
    };
    let file = format!(
        r#"
        server.threads = 2
        listeners.plain.address = "{plain}"
        listeners.tls = {{ address = "{tls}", tls = {{ certificate = "cert.pem", key = "key.pem" }} }}
        services.web = {{ endpoints = [{web}], balance.policy = "power-of-two" }}
        services.calls = {{ endpoints = [{calls}], balance.policy = "round-robin" }}
        limits.each = {{ rate = "1000000/s", key = "subject" }}
        [auth.providers.training]
        secret.file = "secret"
        algorithm = "HS256"
        issuer = "bench"
        audiences = ["gateway"]
        [[routes]]
        path = "/private/{{*rest}}"
        to = "web"
        auth = "required"
        limits = ["each"]
        strip_prefix = "/private"
        [[routes]]
        path = "/portcullis.testing.Echo/{{*rest}}"
        to = "calls"
        auth = "none"
        [[routes]]
        path = "/{{*rest}}"
        to = "web"
        auth = "none"
        "#,
        web = listed(&web),
        calls = listed(&calls),
    );
    let files = [
        ("cert.pem", pair.cert.pem().into_bytes()),
        ("key.pem", pair.signing_key.serialize_pem().into_bytes()),
        ("secret", SECRET.to_vec()),
        ("gateway.toml", file.into_bytes()),
    ];
    files.into_iter().for_each(|(name, text)| fs::write(folder.join(name), text).expect("a folder to write in"));

    let mut command = Command::new(program);
    command.args(["run", "--config"]).arg(folder.join("gateway.toml"));
    let process = started(command, plain, folder).await;
    let asked = Asked { address: plain, tls: None };
    asked.everything().await;
    asked.http1(&Kind::get("/private/greeting").with_tokens()).await;
    grpc(plain).await;
    let mut roots = RootCertStore::empty();
    roots.add(pair.cert.der().clone()).expect("a certificate");
    let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let over_tls = |protocol: &str| {
        let mut config = config.clone();
        config.alpn_protocols = vec![protocol.into()];
        Asked { address: tls, tls: Some(TlsConnector::from(Arc::new(config))) }
    };
    over_tls("http/1.1").http1(&Kind::get("/greeting")).await;
    over_tls("h2").http2(&Kind::get("/greeting")).await;
    ended(process).await;
}

/// Trains each of the stacks that `portcullis-bench` has.
async fn bench(program: &Path, folder: &Path) {
    let (web, calls, keys) = (backends().await, callees().await, folder.join("keys.json"));
    let key = URL_SAFE_NO_PAD.encode(SECRET);
    fs::write(&keys, format!(r#"{{"keys":[{{"kty":"oct","alg":"HS256","k":"{key}"}}]}}"#))
        .expect("a folder to write in");
    let start = |upstreams: &[Backend]| {
        let address = local(free_port());
        let upstreams: Vec<String> = upstreams.iter().map(|backend| backend.address().to_string()).collect();
        let mut command = Command::new(program);
        command.args(["--listen", &address.to_string(), "--upstreams", &upstreams.join(","), "--threads", "2"]);
        (address, command)
    };

    let (address, command) = start(&web);
    let process = started(command, address, folder).await;
    let plain = Asked { address, tls: None };
    plain.everything().await;
    ended(process).await;

    let (address, command) = start(&calls);
    let process = started(command, address, folder).await;
    grpc(address).await;
    ended(process).await;

    let (address, mut command) = start(&web);
    command.args(["--alg", "HS256", "--jwks"]).arg(&keys);
    let process = started(command, address, folder).await;
    Asked { address, tls: None }.http1(&Kind::get("/greeting").with_tokens()).await;
    ended(process).await;
}

fn local(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

async fn backends() -> Vec<Backend> {
    join_all(["a", "b", "c"].map(Backend::start)).await
}

async fn callees() -> Vec<Backend> {
    join_all(["a", "b", "c"].map(Backend::grpc)).await
}

/// Starts the program, and waits until it listens.
async fn started(mut command: Command, at: SocketAddr, folder: &Path) -> Process {
    // Each run writes a file of its own.
    command.env("LLVM_PROFILE_FILE", folder.join("counts/%p.profraw"));
    let mut process = Process::start(command, &folder.join("log"));
    process.until(|| async move { TcpStream::connect(at).await.is_ok() }).await;
    process
}

/// Ends it as it wants to be ended: it writes down what it counted.
async fn ended(mut process: Process) {
    process.signal("TERM");
    let status = process.ended().await;
    assert!(status.success(), "{status}; it said:\n{}", process.said());
}

async fn grpc(to: SocketAddr) {
    let mut connections = JoinSet::new();
    for _ in 0..CONNECTIONS / STREAMS {
        let client = EchoClient::connect(format!("http://{to}")).await.expect("a connection");
        for _ in 0..STREAMS {
            let mut client = client.clone();
            connections.spawn(async move {
                for _ in 0..REQUESTS {
                    client.unary(Ping { text: "x".repeat(100), ..Ping::default() }).await.expect("an answer");
                }
            });
        }
    }
    connections.join_all().await;
}

// === impl Kind ===

impl Kind {
    fn get(target: &'static str) -> Self {
        Self { method: Method::GET, target, body: Bytes::new(), tokens: Arc::default() }
    }

    fn post(len: usize) -> Self {
        Self { method: Method::POST, target: "/echo", body: vec![b'x'; len].into(), tokens: Arc::default() }
    }

    /// The tokens of many callers, one after the other.
    fn with_tokens(mut self) -> Self {
        let claims =
            |i| json!({ "iss": "bench", "aud": "gateway", "sub": format!("caller-{i}"), "exp": token::now() + 3600 });
        self.tokens = (0..256).map(|i| format!("Bearer {}", token::hs256(SECRET, &claims(i)))).collect();
        self
    }

    fn request(&self, i: usize) -> Request<Full<Bytes>> {
        let mut request = Request::builder().method(&self.method).uri(format!("http://localhost{}", self.target));
        request = request.header("host", "localhost").header("user-agent", "pgo").header("accept", "*/*");
        if let Some(token) = self.tokens.get(i % self.tokens.len().max(1)) {
            request = request.header("authorization", token);
        }
        request.body(Full::new(self.body.clone())).expect("a request")
    }
}

// === impl Asked ===

impl Asked {
    /// In all ways that all stacks have.
    async fn everything(&self) {
        self.http1(&Kind::get("/greeting")).await;
        self.http2(&Kind::get("/greeting")).await;
        for len in [16 << 10, 64 << 10] {
            self.http1(&Kind::post(len)).await;
        }
        self.new_connections().await;
    }

    async fn connect(&self) -> TokioIo<Box<dyn Io>> {
        let stream = TcpStream::connect(self.address).await.expect("a connection");
        stream.set_nodelay(true).expect("a socket");
        let Some(tls) = &self.tls else { return TokioIo::new(Box::new(stream)) };
        let name = ServerName::try_from("localhost").expect("a name");
        TokioIo::new(Box::new(tls.connect(name, stream).await.expect("a session")))
    }

    async fn http1(&self, kind: &Kind) {
        let mut connections = JoinSet::new();
        for _ in 0..CONNECTIONS {
            let (mut sender, connection) = http1::handshake(self.connect().await).await.expect("HTTP/1.1");
            tokio::spawn(connection);
            let kind = kind.clone();
            connections.spawn(async move {
                for i in 0..REQUESTS {
                    sender.ready().await.expect("a connection");
                    read(sender.send_request(kind.request(i)).await).await;
                }
            });
        }
        connections.join_all().await;
    }

    async fn http2(&self, kind: &Kind) {
        let mut connections = JoinSet::new();
        for _ in 0..CONNECTIONS / STREAMS {
            let handshake = http2::handshake(TokioExecutor::new(), self.connect().await);
            let (sender, connection) = handshake.await.expect("HTTP/2");
            tokio::spawn(connection);
            for _ in 0..STREAMS {
                let (mut sender, kind) = (sender.clone(), kind.clone());
                connections.spawn(async move {
                    for i in 0..REQUESTS {
                        sender.ready().await.expect("a connection");
                        read(sender.send_request(kind.request(i)).await).await;
                    }
                });
            }
        }
        connections.join_all().await;
    }

    /// A connection for each request.
    async fn new_connections(&self) {
        for i in 0..REQUESTS {
            let (mut sender, connection) = http1::handshake(self.connect().await).await.expect("HTTP/1.1");
            tokio::spawn(connection);
            read(sender.send_request(Kind::get("/greeting").request(i)).await).await;
        }
    }
}

/// A program that refuses is not trained in what it is for.
async fn read(answer: hyper::Result<Response<Incoming>>) {
    let answer = answer.expect("an answer");
    assert_eq!(answer.status(), StatusCode::OK);
    answer.into_body().collect().await.expect("a whole answer");
}
