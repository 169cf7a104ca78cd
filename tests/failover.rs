//! A backend dies while requests flow, and nobody notices.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use portcullis::discovery::EmbeddedRegistry;

/// Sends `GET`s from eight callers until told to stop; returns how many answers were 200 and how many were not.
async fn flow(url: String, stop: Arc<AtomicBool>, done: Arc<AtomicUsize>) -> (usize, Vec<String>) {
    let client = support::client::<Full<Bytes>>(false);
    let callers = (0..8).map(|_| {
        let (client, url, stop, done) = (client.clone(), url.clone(), stop.clone(), done.clone());
        tokio::spawn(async move {
            let (mut good, mut bad) = (0, Vec::new());
            while !stop.load(Ordering::Relaxed) {
                let request = Request::get(&url).body(Full::default()).unwrap();
                match client.request(request).await {
                    Ok(response) if response.status() == 200 => match response.into_body().collect().await {
                        Ok(_) => good += 1,
                        Err(error) => bad.push(format!("cut short: {error}")),
                    },
                    Ok(response) => bad.push(response.status().to_string()),
                    Err(error) => bad.push(format!("{error:?}")),
                }
                done.fetch_add(1, Ordering::Relaxed);
            }
            (good, bad)
        })
    });
    let (mut good, mut bad) = (0, Vec::new());
    for caller in futures::future::join_all(callers).await {
        let (more_good, more_bad) = caller.unwrap();
        good += more_good;
        bad.extend(more_bad);
    }
    (good, bad)
}

/// Waits until so many more requests were answered.
async fn answered(done: &AtomicUsize, more: usize) {
    let goal = done.load(Ordering::Relaxed) + more;
    while done.load(Ordering::Relaxed) < goal {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_three_is_killed_and_no_client_sees_it() {
    let registry = EmbeddedRegistry::new();
    let mut backends = support::backends(&["a", "b", "c"]).await;
    let _registrations = support::register(&registry, "orders", support::places(&backends)).await;
    let gateway = support::listen(support::open_gateway(registry).build().unwrap()).await;

    let (stop, done) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
    let flowing = tokio::spawn(flow(format!("http://{gateway}/orders"), stop.clone(), done.clone()));
    answered(&done, 300).await;
    backends.remove(1).kill().await;
    answered(&done, 1000).await;
    let before: Vec<u64> = backends.iter().map(|backend| backend.requests()).collect();
    answered(&done, 300).await;
    stop.store(true, Ordering::Relaxed);
    let (good, bad) = flowing.await.unwrap();
    assert!(bad.is_empty(), "{good} good answers and {} bad: {:?}", bad.len(), &bad[..bad.len().min(5)]);
    for (backend, before) in backends.iter().zip(before) {
        assert!(backend.requests() > before, "{} takes part", backend.name());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deregistered_instance_gets_no_request_after_the_next_snapshot() {
    let registry = EmbeddedRegistry::new();
    let backends = support::backends(&["a", "b"]).await;
    let mut registrations = support::register(&registry, "orders", support::places(&backends)).await;
    let gateway = support::listen(support::open_gateway(registry).build().unwrap()).await;

    let (stop, done) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
    let flowing = tokio::spawn(flow(format!("http://{gateway}/orders"), stop.clone(), done.clone()));
    answered(&done, 200).await;
    registrations.remove(0).deregister().await.unwrap();
    // Those under way when it went may come late.
    let mut before = u64::MAX;
    for _ in 0..20 {
        if backends[0].requests() == before {
            break;
        }
        before = backends[0].requests();
        answered(&done, 500).await;
    }
    stop.store(true, Ordering::Relaxed);
    let (_, bad) = flowing.await.unwrap();
    assert!(bad.is_empty(), "{:?}", &bad[..bad.len().min(5)]);
    assert_eq!(backends[0].requests(), before, "the deregistered instance was still called");
}
