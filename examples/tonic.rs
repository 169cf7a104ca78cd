//! Discovery, balance and circuit-break under a generated tonic client, with three servers behind.
//!
//! `cargo run --example tonic` calls them, kills one, and goes on calling.

use std::collections::BTreeMap;
use std::error::Error;

use portcullis::balance::{BalanceLayer, PowerOfTwo};
use portcullis::circuit_break::CircuitBreakLayer;
use portcullis::discovery::{DiscoveryLayer, EmbeddedRegistry, Registry, ServiceDefinition};
use portcullis::forward::Forward;
use portcullis_testing::Backend;
use portcullis_testing::echo::Ping;
use portcullis_testing::echo::echo_client::EchoClient;
use tower::ServiceBuilder;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let registry = EmbeddedRegistry::new();
    let (mut servers, mut registrations) = (Vec::new(), Vec::new());
    for name in ["a", "b", "c"] {
        let server = Backend::grpc(name).await;
        registrations.push(registry.register(ServiceDefinition::new("echo", name, server.address())).await?);
        servers.push(server);
    }

    let channel = ServiceBuilder::new()
        .layer(DiscoveryLayer::new(registry).service("echo"))
        .layer(BalanceLayer::new(PowerOfTwo))
        .layer(CircuitBreakLayer::new())
        .service(Forward::new());
    let mut client = EchoClient::new(channel);

    println!("300 calls: {:?}", call(&mut client).await?);
    servers.remove(1).kill().await;
    println!("b was killed, and nobody told the client. 300 calls: {:?}", call(&mut client).await?);
    registrations.remove(0).deregister().await?;
    println!("a has deregistered. 300 calls: {:?}", call(&mut client).await?);
    Ok(())
}

/// Makes three hundred calls and counts who answered.
async fn call<C>(client: &mut EchoClient<C>) -> Result<BTreeMap<String, u32>, tonic::Status>
where
    C: tonic::client::GrpcService<tonic::body::Body>,
    C::Error: Into<Box<dyn Error + Send + Sync>>,
    C::ResponseBody: http_body::Body<Data = bytes::Bytes> + Send + 'static,
    <C::ResponseBody as http_body::Body>::Error: Into<Box<dyn Error + Send + Sync>> + Send,
{
    let mut answers = BTreeMap::new();
    for number in 0..300 {
        let pong = client.unary(Ping { text: number.to_string(), ..Ping::default() }).await?.into_inner();
        *answers.entry(pong.server).or_default() += 1;
    }
    Ok(answers)
}
