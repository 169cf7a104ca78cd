//! What is noted of one request while it is on its way.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::{HeaderMap, StatusCode};
use portcullis_core::{Clock, Endpoint, Guard, Head, Layer, Moment, Observe, Rejection, Side};

use crate::telemetry::{Answered, lock};
use crate::trace::Trace;

/// One request on its way.
pub(crate) struct Record {
    clock: Clock,
    pub(crate) started: Moment,
    pub(crate) trace: Option<Trace>,
    /// Nanoseconds after the start at which auth, rate limit and discovery were passed; zero where they were not.
    passed: [AtomicU64; 3],
    uploaded: AtomicU64,
    attempts: Mutex<Vec<Attempt>>,
}

/// One time the request was sent to an endpoint.
#[derive(Clone, Debug)]
pub(crate) struct Attempt {
    /// The span that stands for it, where it is one that is exported.
    #[cfg_attr(not(feature = "otlp"), expect(dead_code, reason = "only spans tell it"))]
    pub(crate) span: Option<u64>,
    pub(crate) endpoint: Endpoint,
    /// After the request's start.
    pub(crate) began: Duration,
    /// When the head of the answer was there, or it was given up.
    pub(crate) ended: Option<Duration>,
    pub(crate) status: Option<StatusCode>,
    /// What went wrong between here and the endpoint.
    pub(crate) failed: Option<&'static str>,
}

/// How long each stage took. What a request did not come to is not there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stages {
    /// Finding the route, and who is calling.
    pub(crate) auth: Option<Duration>,
    pub(crate) limit: Option<Duration>,
    pub(crate) discovery: Option<Duration>,
    /// Picking an endpoint that admits.
    pub(crate) balance: Option<Duration>,
    /// From the first attempt to the head of the answer, all attempts and what was waited between them.
    pub(crate) upstream: Option<Duration>,
    /// From the head of the answer to its end.
    pub(crate) body: Option<Duration>,
}

/// Counts what a caller sends.
pub(crate) struct Upload(pub(crate) std::sync::Arc<Record>);

const STAGES: [Layer; 3] = [Layer::Auth, Layer::RateLimit, Layer::Discovery];

// === impl Record ===

impl Record {
    pub(crate) fn new(clock: Clock, trace: Option<Trace>) -> Self {
        Self {
            started: clock.now(),
            clock,
            trace,
            passed: Default::default(),
            uploaded: AtomicU64::new(0),
            attempts: Mutex::default(),
        }
    }

    /// How long ago it began.
    pub(crate) fn age(&self) -> Duration {
        self.clock.now().since(self.started)
    }

    /// Bytes of the request's body so far.
    pub(crate) fn uploaded(&self) -> u64 {
        self.uploaded.load(Ordering::Relaxed)
    }

    /// The attempts of a request that is over.
    pub(crate) fn take_attempts(&self) -> Vec<Attempt> {
        std::mem::take(&mut *lock(&self.attempts))
    }

    /// When a layer was passed, after the start.
    pub(crate) fn passed(&self, layer: Layer) -> Option<Duration> {
        let at = STAGES.iter().position(|stage| *stage == layer)?;
        let nanos = self.passed[at].load(Ordering::Relaxed);
        (nanos > 0).then(|| Duration::from_nanos(nanos))
    }

    /// How long each stage took of a request whose answer began after `head`, if there was one, and ended after `total`.
    pub(crate) fn stages(&self, first: Option<Duration>, head: Option<Duration>, total: Duration) -> Stages {
        let [auth, limit, discovery] = STAGES.map(|layer| self.passed(layer));
        let between = |from: Option<Duration>, to: Option<Duration>| Some(to?.saturating_sub(from?));
        Stages {
            auth,
            limit: between(auth, limit),
            discovery: between(limit, discovery),
            balance: between(discovery, first),
            upstream: between(first, head),
            body: between(head, Some(total)),
        }
    }

    /// Notes how the attempt that began last ended.
    fn end(&self, answer: Option<Head<'_>>) {
        let now = self.age();
        let mut attempts = lock(&self.attempts);
        let Some(attempt) = attempts.last_mut() else { return };
        attempt.ended = Some(now);
        let rejection = answer.as_ref().and_then(|head| head.extensions.get::<Rejection>());
        attempt.failed = match &answer {
            Some(_) => rejection.map(Rejection::reason),
            None => Some("given-up"),
        };
        // What forward would not send, or not pass on, says nothing of the endpoint.
        let is_of_endpoint = rejection.is_none_or(|rejection| rejection.side() == Side::Upstream);
        attempt.status = answer.filter(|_| attempt.failed.is_none()).map(|head| head.status);
        let took = now.saturating_sub(attempt.began);
        if is_of_endpoint {
            Answered::by(&attempt.endpoint).record(took, attempt.status);
        }
    }
}

impl Observe for Record {
    fn passed(&self, layer: Layer) {
        if let Some(at) = STAGES.iter().position(|stage| *stage == layer) {
            let nanos = u64::try_from(self.age().as_nanos()).unwrap_or(u64::MAX);
            self.passed[at].store(nanos.max(1), Ordering::Relaxed);
        }
    }

    fn sending(&self, endpoint: &Endpoint, headers: &mut HeaderMap) {
        let attempt = self.trace.filter(Trace::is_exported).map(Trace::child);
        if let Some(attempt) = attempt {
            attempt.write(headers);
        }
        let mut attempts = lock(&self.attempts);
        if let Some(before) = attempts.last() {
            Answered::by(&before.endpoint).retry();
        }
        attempts.push(Attempt {
            span: attempt.map(|attempt| attempt.span),
            endpoint: endpoint.clone(),
            began: self.age(),
            ended: None,
            status: None,
            failed: None,
        });
    }

    fn answered(&self, head: Head<'_>) {
        self.end(Some(head));
    }

    fn given_up(&self) {
        self.end(None);
    }
}

impl Guard for Upload {
    fn data(&mut self, bytes: usize) {
        self.0.uploaded.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use portcullis_core::Instance;

    #[test]
    fn stages_follow_each_other_and_end_where_the_request_did() {
        let (clock, hand) = Clock::manual();
        let record = Record::new(clock, None);
        let ms = Duration::from_millis;
        let endpoint =
            |id: &str| Endpoint::new("s", Instance::new(id, std::net::SocketAddr::from(([127, 0, 0, 1], 1))));
        for layer in STAGES {
            hand.advance(ms(1));
            Observe::passed(&record, layer);
        }
        hand.advance(ms(2));
        record.sending(&endpoint("a"), &mut HeaderMap::new());
        hand.advance(ms(3));
        record.given_up();
        record.sending(&endpoint("b"), &mut HeaderMap::new());
        hand.advance(ms(4));
        record.answered(Head::of(&http::Response::new(())));
        let attempts = record.take_attempts();
        let times: Vec<_> = attempts.iter().map(|one| (one.began, one.ended, one.status, one.failed)).collect();
        assert_eq!(times[0], (ms(5), Some(ms(8)), None, Some("given-up")));
        assert_eq!(times[1], (ms(8), Some(ms(12)), Some(StatusCode::OK), None));
        let stages = record.stages(Some(ms(5)), Some(ms(12)), ms(20));
        let each = [stages.auth, stages.limit, stages.discovery, stages.balance, stages.upstream, stages.body];
        assert_eq!(each, [1, 1, 1, 2, 7, 8].map(|time| Some(ms(time))));
        let refused = Record::new(Clock::manual().0, None).stages(None, Some(ms(1)), ms(1));
        assert_eq!((refused.auth, refused.balance, refused.upstream), (None, None, None));
    }
}
