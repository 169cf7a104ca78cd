//! The agents start, answer, stop and start again.

use portcullis_testing::{Backend, Consul, Redis, client, contract};

#[tokio::test]
async fn a_consul_agent_forgets_when_it_is_restarted() {
    let mut consul = Consul::start().await;
    let registered = consul.put("/v1/agent/service/register", r#"{"Name":"orders","Port":1}"#).await;
    assert_eq!(registered.status, 200, "{}", registered.text());
    assert!(consul.get("/v1/agent/services").await.json()["orders"].is_object());
    consul.kill();
    consul.restart().await;
    assert!(consul.get("/v1/agent/services").await.json()["orders"].is_null());
}

#[tokio::test]
async fn a_redis_restarts_on_its_port() {
    let mut redis = Redis::start().await;
    let address = redis.address();
    redis.kill();
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
    redis.restart().await;
    assert!(tokio::net::TcpStream::connect(address).await.is_ok());
}

#[tokio::test]
async fn a_killed_backend_cuts_its_connections() {
    let backend = Backend::start("a").await;
    let address = backend.address();
    let answer = client::get(address, "/x?y", &[("x-z", "1")]).await.unwrap();
    assert_eq!((answer.header("x-backend"), &answer.json()["target"]), ("a", &"/x?y".into()));
    assert_eq!(client::get(address, "/status/503", &[]).await.unwrap().status, 503);
    assert_eq!(backend.requests(), 2);
    backend.kill().await;
    assert!(client::get(address, "/", &[]).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_layer_that_does_nothing_keeps_the_contract() {
    contract::holds(tower_layer::Identity::new(), http::Request::new).await;
}
