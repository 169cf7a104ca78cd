//! A proxy of one's own, on a bare hyper server: two addresses, balanced, each with a breaker.
//!
//! `cargo run --example hyper` starts two backends, the proxy, and prints what to try.

use std::error::Error;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use portcullis::balance::{BalanceLayer, RoundRobin};
use portcullis::circuit_break::CircuitBreakLayer;
use portcullis::core::{Address, PeerAddressLayer};
use portcullis::discovery::{DiscoveryLayer, FixedRegistry};
use portcullis::forward::Forward;
use portcullis_testing::Backend;
use tower::{Layer, ServiceBuilder};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let (a, b) = (Backend::start("a").await, Backend::start("b").await);
    let upstreams = FixedRegistry::new().service("upstream", [a.address(), b.address()].map(Address::from));

    let proxy = ServiceBuilder::new()
        .layer(DiscoveryLayer::new(upstreams).service("upstream"))
        .layer(BalanceLayer::new(RoundRobin::default()))
        .layer(CircuitBreakLayer::new())
        .service(Forward::new());

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    println!("curl -si http://{}/whatever", listener.local_addr()?);
    loop {
        let (stream, peer) = listener.accept().await?;
        let proxy = PeerAddressLayer::new(move |_| Some(peer)).layer(proxy.clone());
        tokio::spawn(async move {
            let connection = auto::Builder::new(TokioExecutor::new());
            let service = TowerToHyperService::new(proxy);
            if let Err(error) = connection.serve_connection_with_upgrades(TokioIo::new(stream), service).await {
                eprintln!("{peer}: {error}");
            }
        });
    }
}
