//! What happened: numbers for metrics and the page, and the last events.

mod times;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use http::{Method, StatusCode};
use portcullis_core::{Endpoint, GrpcCode, SlotKey, WallClock};

pub(crate) use self::times::{BOUNDS, FINE, Histogram, Times};

/// So many series at most; whatever else comes is counted in one.
const MAX_SERIES: usize = 2_000;
/// So many seconds of history are kept.
const MAX_HISTORY: usize = 120;
/// So many events are kept.
const MAX_EVENTS: usize = 200;
/// So many characters of each: all are sent to every page each second.
const LONGEST_EVENT: usize = 500;

/// Seeded, and quick: what is looked up comes from bounded sets.
type Map<K, V> = HashMap<K, V, foldhash::fast::RandomState>;

/// What happened since the start.
#[derive(Default)]
pub(crate) struct Telemetry {
    series: ArcSwap<Map<Labels, Arc<Series>>>,
    /// By what registries call the services.
    moved: ArcSwap<Map<Arc<str>, Arc<Moved>>>,
    writing: Mutex<()>,
    breakers: Mutex<BTreeMap<BreakerChange, u64>>,
    pub(crate) active: AtomicI64,
    pub(crate) reloads: AtomicU64,
    pub(crate) failed_reloads: AtomicU64,
    events: Mutex<VecDeque<Event>>,
    history: Mutex<VecDeque<Totals>>,
    wall: WallClock,
}

/// Requests so far, at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    /// Since the epoch.
    pub(crate) at: Duration,
    pub(crate) requests: u64,
    /// Of those, the ones the server or its upstream failed.
    pub(crate) errors: u64,
    /// Of those, the ones that were refused.
    pub(crate) refused: u64,
}

/// What tells one series of requests from another. Every part comes from a bounded set.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Labels {
    /// The route's name, or nothing.
    pub(crate) route: Arc<str>,
    pub(crate) method: &'static str,
    pub(crate) status: u16,
    /// Of gRPC calls.
    pub(crate) grpc: Option<GrpcCode>,
    /// The layer that refused and why, or nothing.
    pub(crate) refused: (&'static str, &'static str),
}

/// Requests that are alike.
#[derive(Default)]
pub(crate) struct Series {
    took: Histogram,
    up: AtomicU64,
    down: AtomicU64,
}

/// A [`Series`] as it was at one time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reading {
    pub(crate) times: Times,
    /// Bytes of requests' bodies.
    pub(crate) up: u64,
    /// Bytes of answers' bodies.
    pub(crate) down: u64,
}

/// What became of attempts at one endpoint; kept with the endpoint.
#[derive(Default)]
pub(crate) struct Answered {
    /// All, by the time until the head of the response.
    pub(crate) took: Histogram,
    /// Of those, answered with 5xx.
    pub(crate) errors: AtomicU64,
    /// Of those, without an answer.
    pub(crate) failed: AtomicU64,
    /// Attempts after which another was made.
    pub(crate) retried: AtomicU64,
}

/// Bytes that went to and came from the endpoints of a service.
#[derive(Default)]
pub(crate) struct Moved {
    pub(crate) up: AtomicU64,
    pub(crate) down: AtomicU64,
}

static ANSWERED: LazyLock<SlotKey<Answered>> = LazyLock::new(SlotKey::new);

/// The service whose breaker changed, to what, and why.
pub(crate) type BreakerChange = (Arc<str>, &'static str, &'static str);

/// Something an operator would want to have seen.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    /// Since the epoch.
    pub(crate) at: Duration,
    pub(crate) kind: &'static str,
    pub(crate) text: String,
}

// === impl Telemetry ===

impl Telemetry {
    /// Where requests with these labels are counted.
    pub(crate) fn series(&self, labels: Labels) -> Arc<Series> {
        let all = self.series.load();
        if let Some(series) = all.get(&labels).or_else(|| all.get(overflow()).filter(|_| all.len() > MAX_SERIES)) {
            return series.clone();
        }
        let _writing = lock(&self.writing);
        let mut series = Map::clone(&self.series.load());
        let labels = if series.len() < MAX_SERIES { labels } else { overflow().clone() };
        let found = series.entry(labels).or_default().clone();
        self.series.store(Arc::new(series));
        found
    }

    /// The bytes of a service, by what its registry calls it.
    pub(crate) fn moved(&self, service: &Arc<str>) -> Arc<Moved> {
        if let Some(moved) = self.moved.load().get(service) {
            return moved.clone();
        }
        let _writing = lock(&self.writing);
        let mut all = Map::clone(&self.moved.load());
        let found = all.entry(service.clone()).or_default().clone();
        self.moved.store(Arc::new(all));
        found
    }

    /// Forgets the services and the routes that are none of these.
    pub(crate) fn keep(&self, is_one: impl Fn(&str) -> bool, is_route: impl Fn(&str) -> bool) {
        let _writing = lock(&self.writing);
        let stays = |labels: &Labels| labels.route.is_empty() || labels == overflow() || is_route(&labels.route);
        let all = self.series.load();
        let kept = all.iter().filter(|(labels, _)| stays(labels)).map(|(labels, one)| (labels.clone(), one.clone()));
        self.series.store(Arc::new(kept.collect()));
        let kept =
            self.moved.load().iter().filter(|(name, _)| is_one(name)).map(|(a, b)| (a.clone(), b.clone())).collect();
        self.moved.store(Arc::new(kept));
        lock(&self.breakers).retain(|(service, ..), _| is_one(service));
    }

    /// Counts a change of a breaker.
    pub(crate) fn breaker_changed(&self, change: BreakerChange) {
        *lock(&self.breakers).entry(change).or_default() += 1;
    }

    /// How often breakers changed.
    pub(crate) fn breaker_changes(&self) -> BTreeMap<BreakerChange, u64> {
        lock(&self.breakers).clone()
    }

    /// All series, in order.
    pub(crate) fn readings(&self) -> Vec<(Labels, Reading)> {
        let mut all: Vec<_> =
            self.series.load().iter().map(|(labels, series)| (labels.clone(), series.read())).collect();
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        all
    }

    /// Keeps how many requests there were so far.
    pub(crate) fn remember(&self) {
        let mut totals = Totals { at: self.wall.since_epoch(), ..Totals::default() };
        for (labels, series) in &**self.series.load() {
            let count = series.read().times.count();
            totals.requests += count;
            totals.errors += if labels.is_failure() { count } else { 0 };
            totals.refused += if labels.refused.0.is_empty() { 0 } else { count };
        }
        let mut history = lock(&self.history);
        if history.len() == MAX_HISTORY {
            history.pop_front();
        }
        history.push_back(totals);
    }

    /// How many requests there were, oldest first.
    pub(crate) fn history(&self) -> Vec<Totals> {
        lock(&self.history).iter().copied().collect()
    }

    pub(crate) fn event(&self, kind: &'static str, text: impl Into<String>) {
        let mut text = text.into();
        if let Some((end, _)) = text.char_indices().nth(LONGEST_EVENT) {
            text.truncate(end);
            text.push('…');
        }
        let mut events = lock(&self.events);
        if events.len() == MAX_EVENTS {
            events.pop_front();
        }
        events.push_back(Event { at: self.wall.since_epoch(), kind, text });
    }

    /// The last events, newest first.
    pub(crate) fn events(&self) -> Vec<Event> {
        lock(&self.events).iter().rev().cloned().collect()
    }
}

/// What there is no series for is counted here.
fn overflow() -> &'static Labels {
    static OVERFLOW: LazyLock<Labels> = LazyLock::new(|| Labels {
        route: "_overflow".into(),
        method: "_OTHER",
        status: 0,
        grpc: None,
        refused: ("", ""),
    });
    &OVERFLOW
}

// === impl Labels ===

impl Labels {
    pub(crate) fn new(
        route: Option<&Arc<str>>,
        method: &Method,
        status: StatusCode,
        grpc: Option<GrpcCode>,
        refused: (&'static str, &'static str),
    ) -> Self {
        static NONE: LazyLock<Arc<str>> = LazyLock::new(|| "".into());
        // Strangers can have themselves refused by each method, until there is no series left for anybody else.
        let by_method = !matches!(refused.0, "route" | "auth" | "rate-limit");
        Self {
            route: route.unwrap_or(&NONE).clone(),
            method: if by_method { method_label(method) } else { "_OTHER" },
            status: status.as_u16(),
            grpc,
            refused,
        }
    }

    /// Whether it is the server's failure, or its upstream's.
    pub(crate) fn is_failure(&self) -> bool {
        self.status >= 500 || self.grpc.is_some_and(is_failure)
    }
}

/// Whether a gRPC code says that the server failed; others are what the caller asked for.
pub(crate) const fn is_failure(code: GrpcCode) -> bool {
    matches!(
        code,
        GrpcCode::UNKNOWN
            | GrpcCode::DEADLINE_EXCEEDED
            | GrpcCode::INTERNAL
            | GrpcCode::UNAVAILABLE
            | GrpcCode::DATA_LOSS
    )
}

/// Methods that callers make up are one.
pub(crate) fn method_label(method: &Method) -> &'static str {
    const KNOWN: [&str; 9] = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "CONNECT", "TRACE"];
    KNOWN.into_iter().find(|known| *known == method.as_str()).unwrap_or("_OTHER")
}

// === impl Series ===

impl Series {
    pub(crate) fn record(&self, took: Duration, up: u64, down: u64) {
        self.took.record(took);
        self.up.fetch_add(up, Ordering::Relaxed);
        self.down.fetch_add(down, Ordering::Relaxed);
    }

    fn read(&self) -> Reading {
        Reading {
            times: self.took.read(),
            up: self.up.load(Ordering::Relaxed),
            down: self.down.load(Ordering::Relaxed),
        }
    }
}

// === impl Answered ===

impl Answered {
    pub(crate) fn by(endpoint: &Endpoint) -> &Self {
        endpoint.slot(&ANSWERED, Self::default)
    }

    /// An attempt was answered with this status, or not at all.
    pub(crate) fn record(&self, took: Duration, status: Option<StatusCode>) {
        self.took.record(took);
        match status {
            None => _ = self.failed.fetch_add(1, Ordering::Relaxed),
            Some(status) if status.is_server_error() => _ = self.errors.fetch_add(1, Ordering::Relaxed),
            Some(_) => {}
        }
    }

    /// Another attempt is made.
    pub(crate) fn retry(&self) {
        self.retried.fetch_add(1, Ordering::Relaxed);
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_up_methods_and_too_many_series_are_counted_together() {
        let telemetry = Telemetry::default();
        let odd = Method::from_bytes(b"BREW").unwrap();
        for number in 0..MAX_SERIES + 50 {
            let route: Arc<str> = number.to_string().into();
            telemetry.series(Labels::new(Some(&route), &odd, StatusCode::OK, None, ("", ""))).record(
                Duration::from_millis(7),
                1,
                3,
            );
        }
        let readings = telemetry.readings();
        assert_eq!(readings.len(), MAX_SERIES + 1);
        assert!(readings.iter().all(|(labels, _)| labels.method == "_OTHER"));
        let overflow = readings.iter().find(|(labels, _)| &*labels.route == "_overflow").unwrap();
        let Reading { times, up, down } = &overflow.1;
        assert_eq!((times.count(), *up, *down, times.buckets[FINE + 1]), (50, 50, 150, 50));
        telemetry.keep(|_| false, |route| route == "7");
        let left: Vec<_> = telemetry.readings().into_iter().map(|(labels, _)| labels.route).collect();
        assert_eq!(left.iter().map(|route| &**route).collect::<Vec<_>>(), ["7", "_overflow"]);
    }

    #[test]
    fn who_is_refused_before_anybody_is_asked_has_one_series_whatever_the_method() {
        let telemetry = Telemetry::default();
        let refusals =
            [("route", "no-route"), ("auth", "missing"), ("rate-limit", "too-many-requests"), ("forward", "loop")];
        for method in [Method::GET, Method::PUT, Method::from_bytes(b"BREW").unwrap()] {
            for refused in refusals {
                telemetry.series(Labels::new(None, &method, StatusCode::NOT_FOUND, None, refused));
            }
        }
        let mut series: Vec<_> =
            telemetry.readings().into_iter().map(|(labels, _)| (labels.refused.0, labels.method)).collect();
        series.sort_unstable();
        let apart = [("forward", "GET"), ("forward", "PUT"), ("forward", "_OTHER")];
        let together = [("auth", "_OTHER"), ("rate-limit", "_OTHER"), ("route", "_OTHER")];
        assert_eq!(series, [&together[..1], &apart, &together[1..]].concat());
    }

    #[test]
    fn two_minutes_of_totals_are_remembered() {
        let telemetry = Telemetry::default();
        let record = |status, refused| {
            let labels = Labels::new(None, &Method::GET, status, None, refused);
            telemetry.series(labels).record(Duration::ZERO, 0, 0);
        };
        record(StatusCode::OK, ("", ""));
        telemetry.remember();
        record(StatusCode::BAD_GATEWAY, ("forward", "connect-failed"));
        record(StatusCode::NOT_FOUND, ("route", "no-route"));
        for _ in 1..MAX_HISTORY + 5 {
            telemetry.remember();
        }
        let history = telemetry.history();
        assert_eq!(history.len(), MAX_HISTORY);
        let Totals { requests, errors, refused, .. } = history[0];
        assert_eq!((requests, errors, refused), (3, 1, 2));
    }

    #[test]
    fn the_oldest_events_give_way() {
        let telemetry = Telemetry::default();
        for number in 0..MAX_EVENTS + 5 {
            telemetry.event("test", number.to_string());
        }
        let events = telemetry.events();
        assert_eq!((events.len(), events[0].text.as_str()), (MAX_EVENTS, "204"));
        telemetry.event("test", "ä".repeat(10_000));
        assert_eq!(telemetry.events()[0].text.chars().count(), LONGEST_EVENT + 1);
    }
}
