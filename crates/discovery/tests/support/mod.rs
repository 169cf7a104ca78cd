//! What several tests of a real or scripted agent need.
#![allow(dead_code, reason = "not every test needs all of it")]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use portcullis_core::{Carried, Endpoints};
use portcullis_discovery::{Always, ConsulConfig, ConsulRegistry, DiscoveryLayer, ServiceDefinition};
use portcullis_testing::Consul;
use tower::{Service, ServiceExt};
use tower_layer::Layer;

pub(crate) fn config(consul: &Consul) -> ConsulConfig {
    ConsulConfig::new(&consul.url()).unwrap()
}

pub(crate) fn registry(consul: &Consul) -> ConsulRegistry {
    ConsulRegistry::new(config(consul)).unwrap()
}

pub(crate) fn at(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// An instance that is well from the start, without a check.
pub(crate) fn definition(service: &str, id: &str, port: u16) -> ServiceDefinition {
    ServiceDefinition::new(service, id, at(port))
}

/// Waits until `what` holds, up to ten seconds.
pub(crate) async fn until(mut what: impl AsyncFnMut() -> bool) {
    let held = tokio::time::timeout(Duration::from_secs(10), async {
        while !what().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    held.await.expect("it to happen within ten seconds");
}

/// The id by which the instance was registered, without its node.
pub(crate) fn own(id: &str) -> String {
    id.split_once('/').map_or(id, |(_, own)| own).to_owned()
}

/// Sends a request through the layer and says which endpoints it was given; none if it was refused.
pub(crate) async fn seen(layer: &DiscoveryLayer<impl portcullis_discovery::Name<()> + Clone>) -> Vec<String> {
    let mut service = layer.layer(tower::service_fn(async |request: Request<()>| {
        let mut ids: Vec<_> = Endpoints::of(request.extensions()).unwrap().iter().map(|e| own(e.id())).collect();
        ids.sort();
        let mut response = Response::new(Full::<Bytes>::default());
        response.extensions_mut().insert(ids);
        Ok::<_, Infallible>(response)
    }));
    let response = service.ready().await.unwrap().call(Request::new(())).await.unwrap();
    response.extensions().get::<Vec<String>>().cloned().unwrap_or_default()
}

/// Requests that flow through a layer all the while, a thousand a second at most.
pub(crate) struct Flow(tokio::task::JoinHandle<()>, Arc<[AtomicUsize; 2]>);

impl Flow {
    pub(crate) fn start(layer: &DiscoveryLayer<Always>) -> Self {
        let service = layer.layer(tower::service_fn(async |_: Request<()>| {
            Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
        }));
        let counts = Arc::<[AtomicUsize; 2]>::default();
        let counted = counts.clone();
        let flowing = tokio::spawn(async move {
            loop {
                let response = service.clone().oneshot(Request::new(())).await.unwrap();
                counted[usize::from(!response.status().is_success())].fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        Self(flowing, counts)
    }

    /// Says what happened to them, and fails if any was refused.
    pub(crate) fn end(self, what: &str) {
        self.0.abort();
        let [passed, refused] = [0, 1].map(|i| self.1[i].load(Ordering::Relaxed));
        println!("{what}: {passed} requests passed, {refused} were refused");
        assert!(passed > 0 && refused == 0);
    }
}
