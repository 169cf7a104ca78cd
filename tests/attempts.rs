//! A backend hangs, or takes its time with a body: what an attempt's time is for, and what it is not for.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, Empty, StreamBody};
use hyper::body::Incoming;
use portcullis::balance::{BalanceLayer, Policy, RoundRobin, Served};
use portcullis::circuit_break::CircuitBreakLayer;
use portcullis::core::{Carried, Endpoints, Instance, Moment};
use portcullis::forward::Forward;
use tower::{ServiceBuilder, ServiceExt, service_fn};

const LIMIT: Duration = Duration::from_secs(1);

#[tokio::test]
async fn a_hanging_backend_is_given_up_and_counted_and_a_slow_body_is_not_cut() {
    let calls = Arc::<AtomicUsize>::default();
    let backend = service_fn({
        let calls = calls.clone();
        move |_: Request<Incoming>| {
            let first = calls.fetch_add(1, Ordering::Relaxed) == 0;
            async move {
                if first {
                    std::future::pending::<()>().await;
                }
                let frames = futures::stream::unfold(0, |sent| async move {
                    if sent > 0 {
                        tokio::time::sleep(2 * LIMIT).await;
                    }
                    (sent < 2).then(|| (Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"x"))), sent + 1))
                });
                Ok::<_, Infallible>(Response::new(StreamBody::new(Box::pin(frames))))
            }
        }
    });
    let (address, server) = portcullis_testing::backend::serve(SocketAddr::from(([127, 0, 0, 1], 0)), backend).await;
    let instances = ["a", "b"].map(|id| Instance::new(id, address));
    let endpoints = Endpoints::none("s").reconcile(instances, Moment::MIN);
    let breaker = CircuitBreakLayer::new();
    let service = ServiceBuilder::new()
        .layer(BalanceLayer::new(RoundRobin::new()).policy(Policy::new().attempt_timeout(LIMIT)))
        .layer(breaker.clone())
        .service(Forward::new());

    let mut request = Request::get("http://s/").body(Empty::<Bytes>::new()).unwrap();
    endpoints.clone().attach(request.extensions_mut());
    let response = service.oneshot(request).await.unwrap();
    assert_eq!(response.status(), 200);
    let served = response.extensions().get::<Served>().unwrap().clone();
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "xx");
    let [failed] = served.failed() else { panic!("{served:?}") };
    assert_eq!(breaker.handle().endpoint(&failed.endpoint).counts().failed, 1);
    server.abort();
}
