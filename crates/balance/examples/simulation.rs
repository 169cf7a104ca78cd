//! How good the policies are: a seeded simulation of servers behind balancers, run through the layer itself.
//!
//! `cargo run --release -p portcullis-balance --example simulation`, whose output is the crate's `simulation.md`; named after
//! `--`, only some of its tables: `even`, `uneven`, `fails`, `gateways`, `weights`, `hashes`
//!
//! Times are in units of the mean service time. Each server works off its queue one by one; service times are exponential
//! and requests arrive at random (M/M/1 behind each policy). The same seed gives the same table.

#![allow(clippy::unwrap_used, reason = "an example that cannot go on panics")]

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use http::Request;
use portcullis_balance::{
    Asked, BalanceLayer, Call, HashKey, LeastConnections, Maglev, PeakEwma, Pick, PowerOfTwo, Random, Rendezvous,
    RingHash, RoundRobin,
};
use portcullis_core::{Clock, Endpoints, InFlight, Instance, ManualClock, Moment, Outcome};

/// The mean service time.
const UNIT: Duration = Duration::from_millis(20);
const SEED: u64 = 7;

type AnyPick = Arc<dyn Pick>;
type Make = fn() -> AnyPick;

#[derive(Clone, Copy)]
enum Server {
    /// Works so fast, one request after the other.
    Queue(f64),
    /// Takes its time, but for any number of requests at once.
    Delay,
    /// Fails in a millisecond.
    Fails,
}

struct Gateway {
    layer: BalanceLayer<AnyPick>,
    pick: AnyPick,
    set: Endpoints,
}

struct World {
    clock: Clock,
    hand: ManualClock,
    gateways: Vec<Gateway>,
    servers: Vec<Server>,
}

struct Figures {
    times: Vec<f64>,
    served: Vec<usize>,
}

/// What happens when a server is done.
struct Done {
    at: Moment,
    gateway: usize,
    server: usize,
    began: Moment,
    _busy: InFlight,
}

impl World {
    fn new(servers: &[Server], weights: &[u32], gateways: usize, pick: &dyn Fn() -> AnyPick) -> Self {
        // Another one than for the requests below: with the same, what is picked would go with when it comes.
        fastrand::seed(!SEED);
        let (clock, hand) = Clock::manual();
        let gateway = |_| {
            let pick = pick();
            let layer = BalanceLayer::new(pick.clone()).clock(clock.clone());
            Gateway { layer, pick, set: endpoints(weights) }
        };
        Self { gateways: (0..gateways).map(gateway).collect(), clock, hand, servers: servers.to_vec() }
    }

    /// Lets so many requests arrive, so many in a unit of time on average.
    fn run(&self, requests: usize, rate: f64) -> Figures {
        let mut rng = Rng::with_seed(SEED);
        let mut exponential = |mean: f64| -mean * (1.0 - rng.f64()).ln();
        let mut under_way: BinaryHeap<Reverse<Done>> = BinaryHeap::new();
        let mut free = vec![Moment::MIN; self.servers.len()];
        let mut figures = Figures { times: Vec::new(), served: vec![0; self.servers.len()] };
        let request = Request::new(());
        let mut next = self.clock.now();
        for k in 0..requests {
            next = next + UNIT.mul_f64(exponential(1.0 / rate));
            while under_way.peek().is_some_and(|done| done.0.at <= next) {
                let Reverse(done) = under_way.pop().unwrap();
                self.advance(done.at);
                self.end(&done, k > requests / 5, &mut figures);
            }
            self.advance(next);
            let index = k * 7919 % self.gateways.len();
            let gateway = &self.gateways[index];
            let permit = gateway.layer.choose(&gateway.set, Asked::of(&request)).unwrap();
            let server: usize = permit.endpoint().id().parse().unwrap();
            let at = match self.servers[server] {
                Server::Queue(speed) => free[server].max(next) + UNIT.mul_f64(exponential(1.0 / speed)),
                Server::Delay => next + UNIT.mul_f64(exponential(1.0)),
                Server::Fails => next + Duration::from_millis(1),
            };
            free[server] = at;
            let busy = permit.begin();
            under_way.push(Reverse(Done { at, gateway: index, server, began: next, _busy: busy }));
        }
        figures.times.sort_by(f64::total_cmp);
        figures
    }

    fn end(&self, done: &Done, counts: bool, figures: &mut Figures) {
        let gateway = &self.gateways[done.gateway];
        let latency = done.at.since(done.began);
        let outcome = match self.servers[done.server] {
            Server::Fails => Outcome::Failure,
            Server::Queue(_) | Server::Delay => Outcome::Success,
        };
        if gateway.pick.observes() {
            gateway.pick.observe(&gateway.set[done.server], &Call::new(latency, outcome, None, done.at));
        }
        if counts {
            figures.times.push(latency.as_secs_f64() / UNIT.as_secs_f64());
            figures.served[done.server] += 1;
        }
    }

    fn advance(&self, to: Moment) {
        self.hand.advance(to.since(self.clock.now()));
    }
}

impl Figures {
    fn at(&self, part: f64) -> f64 {
        self.times[((self.times.len() as f64 * part) as usize).min(self.times.len() - 1)]
    }

    fn mean(&self) -> f64 {
        self.times.iter().sum::<f64>() / self.times.len() as f64
    }

    fn row(&self) -> String {
        let cell = |value: f64| if value < 100.0 { format!("{value:.2}") } else { format!("{value:.0}") };
        format!("{} / {} / {} / {}", cell(self.mean()), cell(self.at(0.5)), cell(self.at(0.99)), cell(self.at(0.999)))
    }

    fn share(&self, server: usize) -> f64 {
        self.served[server] as f64 / self.served.iter().sum::<usize>() as f64
    }
}

impl Ord for Done {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.at.cmp(&other.at)
    }
}

impl PartialOrd for Done {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Done {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}

impl Eq for Done {}

fn endpoints(weights: &[u32]) -> Endpoints {
    let instance = |(i, weight): (usize, &u32)| {
        let mut instance = Instance::new(format!("{i}"), SocketAddr::from(([10, 0, 0, 1], 1 + i as u16)));
        instance.weight = *weight;
        instance
    };
    Endpoints::none("simulated").reconcile(weights.iter().enumerate().map(instance), Moment::MIN)
}

fn policies() -> [(&'static str, Make); 8] {
    [
        ("random", || Arc::new(Random)),
        ("round robin", || Arc::new(RoundRobin::new())),
        ("least connections (5 choices)", || Arc::new(LeastConnections::new())),
        ("power of two", || Arc::new(PowerOfTwo)),
        ("peak EWMA (2 choices)", || Arc::new(PeakEwma::new().choices(2))),
        ("peak EWMA (3 choices)", || Arc::new(PeakEwma::new())),
        ("peak EWMA (5 choices)", || Arc::new(PeakEwma::new().choices(5))),
        ("least connections (all)", || Arc::new(LeastConnections::new().scan_up_to(usize::MAX))),
    ]
}

fn even_servers() {
    println!("## 100 equal servers, one balancer: mean / p50 / p99 / p99.9 of the time in the system\n");
    println!("| policy | load 0.7 | load 0.9 | load 0.95 |\n|---|---|---|---|");
    for (name, pick) in policies() {
        let cells = [0.7, 0.9, 0.95]
            .map(|load| World::new(&[Server::Queue(1.0); 100], &[1; 100], 1, &pick).run(1_000_000, 100.0 * load).row());
        println!("| {name} | {} |", cells.join(" | "));
    }
}

fn uneven_servers() {
    println!("\n## 10 of 100 servers five times slower, 0.7 of the whole capacity\n");
    println!("| policy | mean / p50 / p99 / p99.9 |\n|---|---|");
    let servers: Vec<_> = (0..100).map(|i| Server::Queue(if i < 10 { 0.2 } else { 1.0 })).collect();
    for (name, pick) in policies() {
        let figures = World::new(&servers, &[1; 100], 1, &pick).run(500_000, 92.0 * 0.7);
        println!("| {name} | {} |", figures.row());
    }
}

fn a_server_that_fails() {
    println!("\n## Share of 1 of 10 servers that fails in 1 ms (fair would be 0.1), by requests in flight\n");
    println!("| policy | 1 | 10 | 40 |\n|---|---|---|---|");
    let mut servers = [Server::Delay; 10];
    servers[0] = Server::Fails;
    for (name, pick) in policies() {
        let cells = [1.0, 10.0, 40.0].map(|in_flight| {
            let figures = World::new(&servers, &[1; 10], 1, &pick).run(300_000, in_flight);
            format!("{:.4}", figures.share(0))
        });
        println!("| {name} | {} |", cells.join(" | "));
    }
}

fn many_gateways() {
    println!(
        "\n## p99 of the time in the system, 100 servers, load 0.9, each balancer counting only its own requests\n"
    );
    println!("| policy | 1 balancer | 5 | 20 | 100 |\n|---|---|---|---|---|");
    for (name, pick) in policies() {
        let cells = [1, 5, 20, 100].map(|gateways| {
            let world = World::new(&[Server::Queue(1.0); 100], &[1; 100], gateways, &pick);
            format!("{:.1}", world.run(600_000, 90.0).at(0.99))
        });
        println!("| {name} | {} |", cells.join(" | "));
    }
}

fn weights() {
    println!("\n## Error of the share of endpoints of weight 1 among others of weight 2, in percent\n");
    println!("One of n has weight 1; of 100, ten. Idle: one request at a time. Busy: three in flight for each unit of");
    println!("weight, all endpoints as fast. Loaded: 0.7 of the capacity, servers as fast as their weights.\n");
    println!("| policy | n = 2 | 3 | 4 | 6 | 10 | 100 |\n|---|---|---|---|---|---|---|");
    for (name, pick) in policies() {
        for kind in ["idle", "busy", "loaded"] {
            let cells = [2_usize, 3, 4, 6, 10, 100].map(|n| {
                let light = n.div_ceil(10);
                let weights: Vec<u32> = (0..n).map(|i| if i < light { 1 } else { 2 }).collect();
                let total = f64::from(weights.iter().sum::<u32>());
                let server = |weight: &u32| match kind {
                    "loaded" => Server::Queue(f64::from(*weight)),
                    _ => Server::Delay,
                };
                let servers: Vec<_> = weights.iter().map(server).collect();
                let rate = match kind {
                    "idle" => 1e-3,
                    "busy" => 3.0 * total,
                    _ => 0.7 * total,
                };
                let figures = World::new(&servers, &weights, 1, &pick).run(400_000, rate);
                let share: f64 = (0..light).map(|i| figures.share(i)).sum();
                format!("{:+.1}", (share * total / light as f64 - 1.0) * 100.0)
            });
            println!("| {name}, {kind} | {} |", cells.join(" | "));
        }
    }
}

fn hashes() {
    println!("\n## Hashing 200,000 keys: most / average share, and keys moved needlessly when one endpoint goes\n");
    println!("| policy | n = 10 | n = 100 |\n|---|---|---|");
    let requests: Vec<_> = (0..200_000).map(|k| Request::get(format!("/{k}")).body(()).unwrap()).collect();
    let policies: [(&str, Make); 4] = [
        ("ring, 1024 points each", || Arc::new(RingHash::by(HashKey::path()))),
        ("ring, 1024 points in all", || Arc::new(RingHash::by(HashKey::path()).points(1024, 1024))),
        ("Maglev, 65,537", || Arc::new(Maglev::by(HashKey::path()))),
        ("rendezvous", || Arc::new(Rendezvous::by(HashKey::path()))),
    ];
    for (name, pick) in policies {
        let cells = [10, 100].map(|n| {
            let (before, after) = (endpoints(&vec![1; n]), endpoints(&vec![1; n - 1]));
            let chosen = |set: &Endpoints| -> Vec<usize> {
                let layer = BalanceLayer::new(pick());
                layer.prepare(set);
                let one = |request| layer.choose(set, Asked::of(request)).unwrap().endpoint().id().parse().unwrap();
                requests.iter().map(one).collect()
            };
            let (before, after) = (chosen(&before), chosen(&after));
            let mut seen = vec![0; n];
            before.iter().for_each(|server| seen[*server] += 1);
            let most = *seen.iter().max().unwrap() as f64 * n as f64 / requests.len() as f64;
            let moved = before.iter().zip(&after).filter(|(a, b)| **a != n - 1 && a != b).count();
            format!("{most:.3}, {:.2} %", moved as f64 * 100.0 / requests.len() as f64)
        });
        println!("| {name} | {} |", cells.join(" | "));
    }
}

fn main() {
    let tables: [(&str, fn()); 6] = [
        ("even", even_servers),
        ("uneven", uneven_servers),
        ("fails", a_server_that_fails),
        ("gateways", many_gateways),
        ("weights", weights),
        ("hashes", hashes),
    ];
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    for (_, table) in tables.iter().filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|one| one == name)) {
        table();
    }
}
