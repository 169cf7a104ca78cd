//! A layer in the place of another: what was known stays known.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use portcullis_core::{Endpoints, Instance};
use portcullis_discovery::{DiscoveryLayer, EmbeddedRegistry, Error, Registry, ServiceDefinition, Watch};
use tokio::sync::mpsc;

type Said = Result<Vec<Instance>, Error>;

/// A registry that says what it is told.
struct Told(Mutex<Option<mpsc::UnboundedReceiver<Said>>>);

impl Registry for Told {
    fn watch(&self, _: &Arc<str>) -> Watch {
        let said = self.0.lock().unwrap().take().unwrap();
        Watch::new(futures::stream::unfold(said, async |mut said| said.recv().await.map(|answer| (answer, said))))
    }
}

fn told() -> (mpsc::UnboundedSender<Said>, DiscoveryLayer) {
    let (say, said) = mpsc::unbounded_channel();
    (say, DiscoveryLayer::new(Told(Mutex::new(Some(said)))))
}

fn instances(ids: &[&str]) -> Vec<Instance> {
    ids.iter().map(|id| Instance::new(*id, SocketAddr::from(([127, 0, 0, 1], 80)))).collect()
}

async fn settle() {
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}

/// A layer that knows these.
async fn knowing(ids: &[&str]) -> (mpsc::UnboundedSender<Said>, DiscoveryLayer) {
    let (say, layer) = told();
    say.send(Ok(instances(ids))).unwrap();
    layer.follow("orders");
    layer.ready().await;
    (say, layer)
}

fn known(layer: &DiscoveryLayer) -> Endpoints {
    layer.follow("orders").unwrap()
}

fn ids(endpoints: &Endpoints) -> Vec<&str> {
    endpoints.iter().map(|endpoint| &**endpoint.id()).collect()
}

#[tokio::test(start_paused = true)]
async fn what_was_known_is_last_known_good_and_who_stays_keeps_the_handle() {
    let (_say, old) = knowing(&["a", "b"]).await;
    let before = known(&old);
    let _busy = before[0].begin();
    let (say, new) = told();
    new.take_over(&old);
    drop(old);
    assert!(known(&new).is(&before) && before.iter().all(|endpoint| !endpoint.is_removed()));
    say.send(Err(Error::unavailable("down"))).unwrap();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(known(&new).is(&before), "it is down");
    say.send(Ok(instances(&["c", "a"]))).unwrap();
    settle().await;
    let after = known(&new);
    assert_eq!((ids(&after), after[1].in_flight()), (vec!["c", "a"], 1));
    assert!(after[1] == before[0] && !before[0].is_removed() && before[1].is_removed());
    drop(new);
    assert!(before[0].is_removed(), "nobody follows it any more");
}

#[tokio::test(start_paused = true)]
async fn what_was_answered_before_counts_and_who_stays_keeps_the_handle() {
    let (_say, old) = knowing(&["a", "b"]).await;
    let (_say, new) = knowing(&["c", "a"]).await;
    let (before, early) = (known(&old), known(&new));
    new.take_over(&old);
    drop(old);
    let after = known(&new);
    assert_eq!(ids(&after), ["c", "a"]);
    assert!(after[1] == before[0] && before[1].is_removed() && early.iter().all(|endpoint| endpoint.is_removed()));
    assert!(after.iter().all(|endpoint| !endpoint.is_removed()));
}

#[tokio::test(start_paused = true)]
async fn a_layer_that_was_taken_over_follows_nothing_and_changes_nothing() {
    let registry = EmbeddedRegistry::new();
    let a = registry.register(ServiceDefinition::of("orders", instances(&["a"]).remove(0))).await.unwrap();
    let old = DiscoveryLayer::new(registry.clone());
    old.follow("orders");
    old.ready().await;
    let before = known(&old);
    let (_say, new) = told();
    new.take_over(&old);
    new.take_over(&new.clone());
    for _ in 0..2 {
        assert!(known(&old).is(&before));
        settle().await;
    }
    drop(a);
    settle().await;
    assert!(known(&old).is(&before) && known(&new).is(&before) && !before[0].is_removed());
}

#[tokio::test(start_paused = true)]
async fn what_was_known_does_not_become_younger() {
    let (say, old) = knowing(&["a"]).await;
    say.send(Err(Error::unavailable("down"))).unwrap();
    tokio::time::sleep(Duration::from_secs(8)).await;
    let (_say, new) = told();
    let new = new.max_age(Duration::from_secs(10));
    new.take_over(&old);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(ids(&known(&new)), ["a"]);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(ids(&known(&new)), [""; 0]);
}
