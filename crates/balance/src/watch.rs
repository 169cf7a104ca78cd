//! Follows a call to the end of its response body.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, Response, StatusCode};
use portcullis_core::{
    Classify, Clock, Endpoint, GRPC_STATUS, GrpcCode, Guard, InFlight, Judge, Moment, Outcome, Rejection, Report, Side,
    WallClock, judge, retry_after,
};

use crate::Shared;
use crate::pick::{Call, Pick};

/// Watches the body of a response: the endpoint counts as busy until it ends, and a policy that
/// [observes](Pick::observes) is told how the call went.
#[derive(Debug)]
pub struct Watch<P: Pick> {
    _in_flight: InFlight,
    judge: Option<Judge<dyn Classify, Observation<P>>>,
}

/// What a call is measured with.
pub(crate) struct Attempt<P: Pick> {
    in_flight: InFlight,
    observation: Option<Observation<P>>,
}

/// Tells the policy how a call went, once; a call that was given up when dropped.
pub(crate) struct Observation<P: Pick>(Option<Observed<P>>);

struct Observed<P> {
    pick: Arc<P>,
    endpoint: Endpoint,
    clock: Clock,
    wall: WallClock,
    began: Moment,
    retry_after: Option<Duration>,
}

// === impl Attempt ===

impl<P: Pick> Attempt<P> {
    /// Counts a call to `endpoint`. `began` is there if the policy observes.
    pub(crate) fn begin(endpoint: &Endpoint, shared: &Shared<P>, began: Option<Moment>) -> Self {
        let observe = |began| Observed {
            pick: shared.pick.clone(),
            endpoint: endpoint.clone(),
            clock: shared.clock.clone(),
            wall: shared.wall.clone(),
            began,
            retry_after: None,
        };
        Self {
            in_flight: endpoint.begin(),
            observation: began.map(observe).map(|observed| Observation(Some(observed))),
        }
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        self.in_flight.endpoint()
    }

    /// Follows the response that came.
    pub(crate) fn watch<B>(mut self, response: &Response<B>, classify: &Arc<dyn Classify>) -> Watch<P> {
        let judge = self.judge(response, classify);
        Watch { _in_flight: self.in_flight, judge }
    }

    /// The response is not good enough; how its body would end is not waited for.
    pub(crate) fn settle<B>(&mut self, response: &Response<B>, classify: &Arc<dyn Classify>) {
        drop(self.judge(response, classify));
    }

    fn judge<B>(
        &mut self,
        response: &Response<B>,
        classify: &Arc<dyn Classify>,
    ) -> Option<Judge<dyn Classify, Observation<P>>> {
        let mut observation = self.observation.take()?;
        // What another layer refuses says nothing of the endpoint.
        let is_ours = response.extensions().get::<Rejection>().is_some_and(|refusal| refusal.side() != Side::Upstream);
        let asks = matches!(response.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
        if !is_ours && (asks || is_exhausted(response.headers())) {
            observation.rest(response.headers());
        }
        Some(judge(classify.clone(), response, observation))
    }

    /// There will be no response.
    pub(crate) fn fail(&mut self, outcome: Outcome) {
        if let Some(observation) = self.observation.take() {
            observation.report(outcome);
        }
    }
}

fn is_exhausted(fields: &HeaderMap) -> bool {
    fields.contains_key(GRPC_STATUS)
        && matches!(GrpcCode::of(fields), Some(GrpcCode::RESOURCE_EXHAUSTED | GrpcCode::UNAVAILABLE))
}

// === impl Watch ===

impl<P: Pick> Guard for Watch<P> {
    fn trailers(&mut self, trailers: &HeaderMap) {
        if let Some(judge) = &mut self.judge {
            if is_exhausted(trailers)
                && let Some(observation) = judge.untold()
            {
                observation.rest(trailers);
            }
            judge.trailers(trailers);
        }
    }

    fn whole(&mut self) {
        if let Some(judge) = &mut self.judge {
            judge.whole();
        }
    }

    fn end(&mut self) {
        if let Some(judge) = &mut self.judge {
            judge.end();
        }
    }

    fn error(&mut self) {
        if let Some(judge) = &mut self.judge {
            judge.error();
        }
    }
}

impl<P: Pick> Drop for Watch<P> {
    fn drop(&mut self) {
        if let Some(observation) = self.judge.as_mut().and_then(Judge::untold) {
            observation.leave();
        }
    }
}

// === impl Observation ===

impl<P: Pick> Observation<P> {
    fn tell(&mut self, outcome: Outcome) {
        if let Some(observed) = self.0.take() {
            let now = observed.clock.now();
            observed.tell(now.since(observed.began), outcome, now);
        }
    }

    /// The caller stopped reading: how long it wanted to read says nothing of the endpoint.
    fn leave(&mut self) {
        if let Some(observed) = self.0.take() {
            observed.tell(Duration::ZERO, Outcome::Ignored, observed.clock.now());
        }
    }

    /// The endpoint asks to be left alone.
    fn rest(&mut self, fields: &HeaderMap) {
        if let Some(observed) = &mut self.0 {
            observed.retry_after = retry_after(fields, || observed.wall.since_epoch());
        }
    }
}

impl<P: Pick> Observed<P> {
    fn tell(&self, latency: Duration, outcome: Outcome, now: Moment) {
        self.pick.observe(&self.endpoint, &Call { latency, outcome, retry_after: self.retry_after, now });
    }
}

impl<P: Pick> Report for Observation<P> {
    fn report(mut self, outcome: Outcome) {
        self.tell(outcome);
    }
}

impl<P: Pick> Drop for Observation<P> {
    fn drop(&mut self) {
        self.tell(Outcome::Ignored);
    }
}

impl<P: Pick> fmt::Debug for Observation<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Observation").field(&self.0.is_some()).finish()
    }
}
