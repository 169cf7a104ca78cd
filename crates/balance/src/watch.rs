//! Follows a call to the end of its response body.

use std::fmt;
use std::sync::Arc;

use http::{HeaderMap, Response, StatusCode};
use portcullis_core::{
    Classify, Clock, Endpoint, GRPC_STATUS, GrpcCode, Guard, InFlight, Judge, Moment, Outcome, Report, WallClock,
    judge, retry_after,
};

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
    began: Moment,
    retry_after: Option<std::time::Duration>,
}

// === impl Attempt ===

impl<P: Pick> Attempt<P> {
    /// Counts a call to `endpoint`. `began` is there if the policy observes.
    pub(crate) fn begin(endpoint: &Endpoint, pick: &Arc<P>, began: Option<Moment>, clock: &Clock) -> Self {
        let observe = |began| Observed {
            pick: pick.clone(),
            endpoint: endpoint.clone(),
            clock: clock.clone(),
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
    pub(crate) fn watch<B>(
        mut self,
        response: &Response<B>,
        classify: &Arc<dyn Classify>,
        wall: &WallClock,
    ) -> Watch<P> {
        let judge = self.judge(response, classify, wall);
        Watch { _in_flight: self.in_flight, judge }
    }

    /// The response is not good enough; how its body would end is not waited for.
    pub(crate) fn settle<B>(&mut self, response: &Response<B>, classify: &Arc<dyn Classify>, wall: &WallClock) {
        drop(self.judge(response, classify, wall));
    }

    fn judge<B>(
        &mut self,
        response: &Response<B>,
        classify: &Arc<dyn Classify>,
        wall: &WallClock,
    ) -> Option<Judge<dyn Classify, Observation<P>>> {
        let mut observation = self.observation.take()?;
        if let Some(observed) = &mut observation.0
            && asks_for_rest(response)
        {
            observed.retry_after = retry_after(response.headers(), || wall.since_epoch());
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

fn asks_for_rest<B>(response: &Response<B>) -> bool {
    match response.status() {
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => true,
        _ => {
            response.headers().contains_key(GRPC_STATUS)
                && matches!(
                    GrpcCode::of(response.headers()),
                    Some(GrpcCode::RESOURCE_EXHAUSTED | GrpcCode::UNAVAILABLE)
                )
        }
    }
}

// === impl Watch ===

impl<P: Pick> Guard for Watch<P> {
    fn trailers(&mut self, trailers: &HeaderMap) {
        if let Some(judge) = &mut self.judge {
            judge.trailers(trailers);
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

// === impl Observation ===

impl<P: Pick> Observation<P> {
    fn tell(&mut self, outcome: Outcome) {
        if let Some(observed) = self.0.take() {
            let now = observed.clock.now();
            let call = Call { latency: now.since(observed.began), outcome, retry_after: observed.retry_after, now };
            observed.pick.observe(&observed.endpoint, &call);
        }
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
