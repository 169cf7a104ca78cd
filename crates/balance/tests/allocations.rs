//! What a pick allocates: nothing.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test that cannot go on panics")]

use std::net::SocketAddr;
use std::sync::Arc;

use http::Request;
use portcullis_balance::{
    Asked, BalanceLayer, HashKey, LeastConnections, Maglev, PeakEwma, Pick, PowerOfTwo, Random, Rendezvous, RingHash,
    RoundRobin,
};
use portcullis_core::{Endpoints, Instance, Moment, Mover};

#[test]
fn a_pick_and_its_counting_allocate_nothing() {
    let instance = |i: u16| Instance::new(format!("{i}"), SocketAddr::from(([10, 0, 0, 1], 1000 + i)));
    let policies: [(&str, Arc<dyn Pick>); 8] = [
        ("round robin", Arc::new(RoundRobin::new())),
        ("random", Arc::new(Random)),
        ("least connections", Arc::new(LeastConnections::new())),
        ("power of two", Arc::new(PowerOfTwo)),
        ("peak EWMA", Arc::new(PeakEwma::new())),
        ("ring hash", Arc::new(RingHash::by(HashKey::path()).bounded_load(1.5))),
        ("Maglev", Arc::new(Maglev::by(HashKey::path()))),
        ("rendezvous", Arc::new(Rendezvous::by(HashKey::path()))),
    ];
    let request = Request::get("/orders/17").body(()).unwrap();
    for (name, pick) in policies {
        let set = Endpoints::none("s").reconcile((0..100).map(instance), Moment::MIN);
        let layer = BalanceLayer::new(pick);
        layer.prepare(&set);
        for closed in [false, true] {
            if closed {
                set[0].gate().close_for(Mover::new());
            }
            drop(layer.choose(&set, Asked::of(&request)).unwrap());
            let counted = allocation_counter::measure(|| {
                for _ in 0..1000 {
                    let permit = layer.choose(&set, Asked::of(&request)).unwrap();
                    drop(permit.begin());
                }
            });
            assert_eq!(counted.count_total, 0, "{name}, one closed: {closed}");
        }
    }
}
