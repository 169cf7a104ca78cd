//! Four processes share limits through one real Redis; then one process loses it in every way there is.
//!
//! ```text
//! cargo run --release -p portcullis-rate-limit --features redis --example fleet [seconds]
//! ```
//!
//! Each process calls one hot key and ten thousand cold ones, three times as often as the hot key's limit admits. What was
//! admitted is written down with the moments before and after the decision, and every window that begins before one
//! admission and ends after another is looked at: none may hold more than `burst + rate · length`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "an experiment that cannot go on says why and ends")]
#![allow(clippy::disallowed_methods, reason = "it measures real time")]

use std::io::{BufRead, BufReader, Write};
use std::num::NonZeroU32;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderName, Request, Response};
use http_body_util::Empty;
use portcullis_core::WallClock;
use portcullis_rate_limit::{Header, OnFailure, Rate, RateLimitLayer, RedisStore};
use portcullis_testing::Redis;
use tower::{Layer, ServiceExt, service_fn};

const PROCESSES: usize = 4;
const HOT_RATE: u32 = 2000;
const HOT_BURST: u32 = 400;
const HOT_PER_MILLI: usize = 3 * HOT_RATE as usize / 1000 / PROCESSES + 1;
const COLD_KEYS: u32 = 10_000;
const COLD_RATE: u32 = 5;
const WORDS: HeaderName = HeaderName::from_static("x-key");

/// One admission: the key and the moments before and after it, in nanoseconds since the epoch.
#[derive(Clone, Copy)]
struct Admission {
    key: u32,
    before: u64,
    after: u64,
}

fn n(count: u32) -> NonZeroU32 {
    NonZeroU32::new(count).unwrap()
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some("process") = arguments.get(1).map(String::as_str) {
        let [_, _, url, lease, seconds] = &arguments[..] else { panic!("url, lease and seconds") };
        return one_process(url, Duration::from_millis(lease.parse().unwrap()), seconds.parse().unwrap());
    }
    let seconds = arguments.get(1).map_or(8, |seconds| seconds.parse().expect("a number of seconds"));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let redis = runtime.block_on(Redis::start());
    println!(
        "{PROCESSES} processes for {seconds} s; hot key {HOT_RATE}/s, burst {HOT_BURST}; {COLD_KEYS} cold keys {COLD_RATE}/s each\n"
    );
    println!(
        "| leases | key | checks | admitted | most allowed | worst window, over rate | of burst | round trips | checks without | added, mean | p99 |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    fleet(&redis, 1000, seconds);
    fleet(&redis, 0, seconds);
    drop(redis);
    println!("\n| then | on failure | admitted | 429 | 503 | p50 | p99 | longest | after it: not decided for |");
    println!("|---|---|---|---|---|---|---|---|---|");
    runtime.block_on(failures());
}

// === the fleet ===

fn fleet(redis: &Redis, lease: u64, seconds: u64) {
    let me = std::env::current_exe().unwrap();
    let processes: Vec<_> = (0..PROCESSES)
        .map(|_| {
            let arguments = ["process", &redis.url(), &lease.to_string(), &seconds.to_string()].map(str::to_owned);
            Command::new(&me).args(arguments).stdout(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    let (mut admissions, mut sums) = (Vec::new(), [[0_u64; 4]; 2]);
    let mut p99 = [0; 2];
    for mut process in processes {
        for line in BufReader::new(process.stdout.take().unwrap()).lines() {
            let line = line.unwrap();
            let numbers: Vec<u64> = line.split(' ').skip(1).map(|number| number.parse().unwrap()).collect();
            if line.starts_with("admission") {
                admissions.push(Admission { key: numbers[0] as u32, before: numbers[1], after: numbers[2] });
            } else {
                let of = numbers[0] as usize;
                (0..4).for_each(|i| sums[of][i] += numbers[1 + i]);
                p99[of] = p99[of].max(numbers[5]);
            }
        }
        assert!(process.wait().unwrap().success());
    }
    let length = |of: &[Admission]| {
        let first = of.iter().map(|admission| admission.before).min().unwrap_or(0);
        of.iter().map(|admission| admission.after).max().unwrap_or(0).saturating_sub(first) as f64 / 1e9
    };
    let lease = if lease == 0 { "none" } else { "1 s" };
    let (hot, mut cold): (Vec<_>, Vec<_>) = admissions.iter().copied().partition(|admission| admission.key == 0);
    let row = |name: &str, of: usize, admitted: usize, allowed: f64, worst: f64, burst: u32| {
        let [checks, trips, nanos, _] = sums[of];
        let without = 100.0 * (1.0 - trips as f64 / checks as f64);
        let mean = nanos as f64 / checks as f64 / 1000.0;
        let late = p99[of] / 1000;
        println!(
            "| {lease} | {name} | {checks} | {admitted} | {allowed:.0} | {worst:.1} | {burst} | {trips} | {without:.1} % | {mean:.1} µs | {late} µs |"
        );
        assert!(worst <= f64::from(burst), "a window saw more than it may");
    };
    let allowed = f64::from(HOT_BURST) + f64::from(HOT_RATE) * length(&hot);
    row("hot", 0, hot.len(), allowed, worst_window(&hot, HOT_RATE), HOT_BURST);
    cold.sort_by_key(|admission| admission.key);
    let worst = cold.chunk_by(|a, b| a.key == b.key).map(|of| worst_window(of, COLD_RATE)).fold(0.0, f64::max);
    let allowed = f64::from(COLD_KEYS) * (f64::from(COLD_RATE) + f64::from(COLD_RATE) * length(&cold));
    row("each cold", 1, cold.len(), allowed, worst, COLD_RATE);
}

/// The most that any window holds beyond `rate · length`. Only what lies in a window for sure counts: what began after its
/// begin and was over before its end.
fn worst_window(admissions: &[Admission], rate: u32) -> f64 {
    let mut begins: Vec<u64> = admissions.iter().map(|admission| admission.before).collect();
    begins.sort_unstable();
    let Some(&zero) = begins.first() else { return 0.0 };
    let cost = |at: u64| (at - zero) as f64 / 1e9 * f64::from(rate);
    let mut by_end = admissions.to_vec();
    by_end.sort_unstable_by_key(|admission| admission.after);
    let mut tree = Tree::new(&begins.iter().map(|&begin| cost(begin)).collect::<Vec<_>>());
    let ends = by_end.iter().map(|admission| {
        tree.add_up_to(begins.partition_point(|&begin| begin <= admission.before), 1.0);
        let begun = begins.partition_point(|&begin| begin <= admission.after);
        tree.highest_up_to(1, 0, tree.leaves, begun) - cost(admission.after)
    });
    ends.fold(0.0, f64::max)
}

/// The highest of many values, to beginnings of which something is added.
struct Tree {
    leaves: usize,
    highest: Vec<f64>,
    added: Vec<f64>,
}

impl Tree {
    fn new(values: &[f64]) -> Self {
        let leaves = values.len().next_power_of_two();
        let mut highest = vec![f64::NEG_INFINITY; 2 * leaves];
        highest[leaves..leaves + values.len()].copy_from_slice(values);
        for node in (1..leaves).rev() {
            highest[node] = highest[2 * node].max(highest[2 * node + 1]);
        }
        Self { leaves, highest, added: vec![0.0; 2 * leaves] }
    }

    fn add_up_to(&mut self, end: usize, value: f64) {
        self.add(1, 0, self.leaves, end, value);
    }

    fn add(&mut self, node: usize, from: usize, to: usize, end: usize, value: f64) {
        if end >= to {
            self.highest[node] += value;
            self.added[node] += value;
        } else if end > from {
            let middle = usize::midpoint(from, to);
            self.add(2 * node, from, middle, end, value);
            self.add(2 * node + 1, middle, to, end, value);
            self.highest[node] = self.highest[2 * node].max(self.highest[2 * node + 1]) + self.added[node];
        }
    }

    fn highest_up_to(&self, node: usize, from: usize, to: usize, end: usize) -> f64 {
        if end >= to {
            return self.highest[node];
        }
        if end <= from {
            return f64::NEG_INFINITY;
        }
        let middle = usize::midpoint(from, to);
        let (left, right) = (2 * node, 2 * node + 1);
        let highest = self.highest_up_to(left, from, middle, end).max(self.highest_up_to(right, middle, to, end));
        highest + self.added[node]
    }
}

// === one process of it ===

#[tokio::main(flavor = "current_thread")]
async fn one_process(url: &str, lease: Duration, seconds: u64) {
    let store = |prefix: &str| {
        let store = RedisStore::new(url).unwrap().lease(lease).deadline(Duration::from_secs(20));
        store.prefix(format!("{{{prefix}{}}}", lease.as_millis())).on_failure(OnFailure::Refuse)
    };
    let service = |rate: Rate, store: &RedisStore| {
        let answer = service_fn(|_: Request<()>| async {
            let mut response = Response::new(Empty::<Bytes>::new());
            response.extensions_mut().insert(WallClock::system().since_epoch());
            Ok::<_, std::convert::Infallible>(response)
        });
        RateLimitLayer::new(rate).with_key(Header::new(WORDS)).store(store.clone()).layer(answer)
    };
    let stores = [store("hot"), store("cold")];
    let services = [
        service(Rate::per_second(n(HOT_RATE)).burst(n(HOT_BURST)), &stores[0]),
        service(Rate::per_second(n(COLD_RATE)), &stores[1]),
    ];
    let admissions = Arc::new(Mutex::new(Vec::new()));
    let times = [(); 2].map(|()| Arc::new(Mutex::new(Vec::<u64>::new())));
    let mut random = u64::from(std::process::id()) | 1;
    let mut ticks = tokio::time::interval(Duration::from_millis(1));
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        ticks.tick().await;
        for call in 0..=HOT_PER_MILLI {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let cold = usize::from(call == HOT_PER_MILLI);
            let key = if cold == 1 { 1 + (random >> 32) as u32 % COLD_KEYS } else { 0 };
            let (service, admissions, times) = (services[cold].clone(), admissions.clone(), times[cold].clone());
            tokio::spawn(async move {
                let mut request = Request::new(());
                request.headers_mut().insert(WORDS, key.into());
                let before = WallClock::system().since_epoch();
                let response = service.oneshot(request).await.unwrap();
                times.lock().unwrap().push((WallClock::system().since_epoch() - before).as_nanos() as u64);
                if let Some(after) = response.extensions().get::<Duration>() {
                    let (before, after) = (before.as_nanos() as u64, after.as_nanos() as u64);
                    admissions.lock().unwrap().push(Admission { key, before, after });
                }
            });
        }
    }
    // Until the last call has come back.
    while Arc::strong_count(&admissions) > 1 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    for Admission { key, before, after } in admissions.lock().unwrap().iter() {
        writeln!(out, "admission {key} {before} {after}").unwrap();
    }
    for (of, (times, store)) in times.iter().zip(stores).enumerate() {
        let mut times = times.lock().unwrap();
        times.sort_unstable();
        let (checks, sum) = (times.len(), times.iter().sum::<u64>());
        let p99 = times.get(checks * 99 / 100).copied().unwrap_or(0);
        writeln!(out, "sum {of} {checks} {} {sum} 0 {p99}", store.stats().round_trips).unwrap();
    }
    out.flush().unwrap();
}

// === without the store ===

async fn failures() {
    for happens in ["killed", "hung", "slow, 50 ms", "restarted empty"] {
        for on_failure in [OnFailure::Admit, OnFailure::Refuse, OnFailure::Share(n(4))] {
            failure(happens, on_failure).await;
        }
    }
}

/// 500 calls a second of ten callers with a limit of 25 a second each, for a second of failure.
async fn failure(happens: &str, on_failure: OnFailure) {
    let mut redis = Redis::start().await;
    let store = RedisStore::new(&redis.url()).unwrap().on_failure(on_failure);
    let answer =
        service_fn(|_: Request<()>| async { Ok::<_, std::convert::Infallible>(Response::new(Empty::<Bytes>::new())) });
    let layer = RateLimitLayer::new(Rate::per_second(n(25))).with_key(Header::new(WORDS)).store(store.clone());
    let service = layer.layer(answer);
    let flow = async |from: u32, calls: u32| {
        let mut ticks = tokio::time::interval(Duration::from_millis(2));
        let mut answers = Vec::new();
        for call in from..from + calls {
            ticks.tick().await;
            let mut request = Request::new(());
            request.headers_mut().insert(WORDS, (call % 10).into());
            let service = service.clone();
            answers.push(tokio::spawn(async move {
                let before = Instant::now();
                let response = service.oneshot(request).await.unwrap();
                (response.status().as_u16(), before.elapsed())
            }));
        }
        let mut done = Vec::new();
        for answer in answers {
            done.push(answer.await.unwrap());
        }
        done
    };
    flow(0, 500).await;
    let mut slow = None;
    match happens {
        "killed" => redis.kill(),
        "hung" => redis.pause(),
        "restarted empty" => redis.restart().await,
        _ => {
            let client = redis::Client::open(redis.url()).unwrap();
            slow = Some(tokio::spawn(async move {
                // A script that keeps the server busy, again and again.
                let busy = "local t = redis.call('TIME') local e = t[1] * 1000000 + t[2] + 50000 \
                            repeat t = redis.call('TIME') until t[1] * 1000000 + t[2] > e";
                let mut connection = client.get_multiplexed_async_connection().await.unwrap();
                loop {
                    let _: Result<(), _> = redis::cmd("EVAL").arg(busy).arg(0).query_async(&mut connection).await;
                }
            }));
        }
    }
    let during = flow(500, 500).await;
    match happens {
        "killed" => redis.restart().await,
        "hung" => redis.resume(),
        _ => {
            if let Some(slow) = slow {
                slow.abort();
            }
        }
    }
    let back = Instant::now();
    while store.stats().down {
        flow(0, 5).await;
    }
    let back = back.elapsed().as_millis();
    let count = |status| during.iter().filter(|(had, _)| *had == status).count();
    let mut times: Vec<u128> = during.iter().map(|(_, time)| time.as_micros()).collect();
    times.sort_unstable();
    let (p50, p99, longest) = (times[times.len() / 2], times[times.len() * 99 / 100], times[times.len() - 1]);
    println!(
        "| {happens} | {on_failure:?} | {} | {} | {} | {p50} µs | {p99} µs | {longest} µs | {back} ms |",
        count(200),
        count(429),
        count(503)
    );
}
