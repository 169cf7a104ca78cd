//! Outliers through the public interface.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![expect(clippy::needless_pass_by_value, reason = "a service is given its request")]

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use http::{Request, Response};
use http_body_util::Full;
use portcullis_circuit_break::{CircuitBreakLayer, Outliers, Reason, Share, State};
use portcullis_core::{Carried, Clock, Endpoints, Instance, Moment};
use tower::{Layer, ServiceExt};

fn by_path(request: Request<()>) -> Ready<Result<Response<Full<Bytes>>, Infallible>> {
    let status = &request.uri().path()[1..];
    ready(Ok(Response::builder().status(status).body(Full::default()).unwrap()))
}

/// Six endpoints; `bad` of them fail one call in five.
async fn with_outliers(layer: &CircuitBreakLayer, endpoints: &Endpoints, bad: usize) {
    let service = layer.layer(tower::service_fn(by_path));
    for call in 0..200 {
        for (index, endpoint) in endpoints.iter().enumerate() {
            let Ok(permit) = endpoint.permit(|| Clock::system().now()) else { continue };
            let path = if index < bad && call % 5 == 0 { "/500" } else { "/200" };
            let mut request = Request::builder().uri(path).body(()).unwrap();
            permit.attach(request.extensions_mut());
            endpoints.clone().attach(request.extensions_mut());
            service.clone().oneshot(request).await.unwrap();
        }
        tokio::time::advance(Duration::from_millis(101)).await;
    }
}

fn six() -> Endpoints {
    let instances = (1..=6).map(|port| Instance::new(port.to_string(), SocketAddr::from(([127, 0, 0, 1], port))));
    Endpoints::none("orders").reconcile(instances, Moment::MIN)
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_that_does_worse_than_the_others_is_left_alone_for_longer_each_time() {
    // A connection that fails one call in five never fails five in a row.
    let layer = CircuitBreakLayer::new().outliers(Outliers::new().calls(50));
    let (endpoints, mut changes) = (six(), layer.handle().changes());
    let mut opened = Vec::new();
    for _ in 0..4 {
        with_outliers(&layer, &endpoints, 1).await;
    }
    while let Some(Some(change)) = changes.next().now_or_never() {
        assert_eq!(change.scope.as_endpoint(), Some(&endpoints[0]));
        if change.to == State::Open && change.reason == Reason::Outlier {
            opened.push(change.open_for.unwrap().as_secs());
        }
    }
    assert!(opened.len() > 1 && opened[0] == 30 && opened[1] > 30, "{opened:?}");
}

/// What came before says nothing of it any more: neither what an operator has it forget, nor what is long past.
#[tokio::test(start_paused = true)]
async fn what_is_forgotten_ejects_nobody() {
    let rule = Outliers::new().calls(50).every(Duration::from_secs(60));
    for reset in [true, false] {
        let (layer, endpoints) = (CircuitBreakLayer::new().outliers(rule), six());
        with_outliers(&layer, &endpoints, 1).await;
        if reset {
            endpoints.iter().for_each(|endpoint| layer.handle().endpoint(endpoint).reset());
        } else {
            tokio::time::advance(Duration::from_secs(3600)).await;
        }
        for _ in 0..3 {
            with_outliers(&layer, &endpoints, 0).await;
        }
        let health = endpoints.iter().map(|endpoint| layer.handle().endpoint(endpoint).state());
        assert!(health.into_iter().all(|state| state == State::Closed), "{reset}");
    }
}

#[tokio::test(start_paused = true)]
async fn no_more_outliers_are_ejected_than_the_share_allows() {
    let layer = CircuitBreakLayer::new();
    let rule = Outliers::new().calls(50).deviations(None).failure_rate(Share::new(0.1).ok());
    for (share, expected) in [(0.1, 1), (0.34, 2), (1.0, 3)] {
        let layer = layer.clone().outliers(rule.at_most(Share::new(share).unwrap()));
        let endpoints = six();
        with_outliers(&layer, &endpoints, 3).await;
        let open = endpoints.iter().filter(|one| layer.handle().endpoint(one).state() != State::Closed).count();
        assert_eq!(open, expected, "{share}");
    }
}
