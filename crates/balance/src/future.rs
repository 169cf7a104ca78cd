//! The attempts at one request.

use std::fmt;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, Request, Response, StatusCode, header};
use pin_project_lite::pin_project;
use portcullis_core::{
    Body, Carried, Deadline, Dialect, Endpoint, Endpoints, GRPC_RETRY_PUSHBACK, Head, HeadDeadline, Layer, Moment,
    Outcome, Rejection, Route, Side, grpc_timeout,
};
use tokio::task::unconstrained;
use tokio::time::{Sleep, sleep};
use tower_service::Service;

use crate::Shared;
use crate::pick::{Asked, Pick, mix};
use crate::policy::{Policy, Reason};
use crate::replay::{BoxError, Keeper, Replay};
use crate::served::{Failed, Served};
use crate::spare::Spare;
use crate::sticky::Token;
use crate::view::Nobody;
use crate::waiting::Place;
use crate::watch::{Attempt, Watch};

pin_project! {
    /// The response of the last attempt, or a refusal.
    ///
    /// ```text
    ///       none admits yet, waits
    ///             │  ┌──────────────── a reason to try another ◄────────────┐
    ///             ▼  ▼                                                      │
    ///         Pausing ──► Readying ──► (pick) ──────────────────────► Calling ──► response
    ///                                     │
    ///                                     └─► nobody: the response before, or a refusal
    /// ```
    pub struct ResponseFuture<S, P, B, R>
    where
        S: Service<Request<Replay<B>>, Response = Response<R>>,
        P: Pick,
    {
        #[pin]
        state: State<S::Future, Result<Answer<R, P>, S::Error>>,
        call: Option<Call<S, P, B>>,
    }
}

pin_project! {
    #[project = Project]
    enum State<F, T> {
        // Without endpoints there is nothing to pick from.
        Passing { #[pin] future: F },
        Calling { #[pin] future: F },
        Pausing { pause: Pin<Box<Sleep>> },
        Readying,
        // Empty once it was returned. Rare, and not to make room for in every future.
        Answered { answer: Option<Box<T>> },
    }
}

/// What the attempts share.
struct Call<S: Service<Request<Replay<B>>>, P: Pick, B> {
    shared: Arc<Shared<P>>,
    service: S,
    /// The request's head for another attempt; `None` when there will be none.
    spare: Option<Spare>,
    keeper: Keeper<B>,
    route: Option<Route>,
    repeats: bool,
    attempt: Option<Attempt<P>>,
    /// The endpoint the caller's cookie leads to.
    token: Option<Token>,
    trouble: Option<Box<TroubleOf<S, P, B>>>,
}

/// What only calls need that wait, whose attempts are timed, or that are attempted again.
struct Trouble<T, E, P: Pick, B> {
    /// The request of the next attempt; without its body, which is still with the attempt before.
    next: Option<(Parts, Option<Replay<B>>)>,
    dialect: Dialect,
    timeout: Option<(Moment, Pin<Box<Sleep>>)>,
    failed: Vec<Failed>,
    /// What the attempt before came to, until there is another.
    last: Option<Last<T, E, P>>,
    waits: Option<(Moment, Place)>,
}

enum Last<T, E, P: Pick> {
    Result(Result<T, E>, Attempt<P>),
    TimedOut(Endpoint),
}

/// What follows an attempt, or a pick.
enum Next<F, T> {
    Call(F),
    Pause(Duration),
    Ready,
    Return(T),
}

type TroubleOf<S, P, B> =
    Trouble<<S as Service<Request<Replay<B>>>>::Response, <S as Service<Request<Replay<B>>>>::Error, P, B>;
type Answer<R, P> = Response<Body<R, Watch<P>>>;
type NextOf<S, P, R, B> =
    Next<<S as Service<Request<Replay<B>>>>::Future, Result<Answer<R, P>, <S as Service<Request<Replay<B>>>>::Error>>;

/// How often a waiting request looks whether a gate was moved.
const LOOKS: Duration = Duration::from_millis(20);

// === impl ResponseFuture ===

impl<S, P, B, R> ResponseFuture<S, P, B, R>
where
    S: Service<Request<Replay<B>>, Response = Response<R>>,
    P: Pick,
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
    R: http_body::Body<Data = Bytes>,
{
    pub(crate) fn passed_on(future: S::Future) -> Self {
        Self { state: State::Passing { future }, call: None }
    }

    /// Picks at once, for a service that is ready.
    pub(crate) fn new(service: S, shared: Arc<Shared<P>>, request: Request<B>) -> Self {
        let (mut parts, body) = request.into_parts();
        if Dialect::of(&parts.headers) == Dialect::Grpc
            && let Some(timeout) = grpc_timeout(&parts.headers)
        {
            // From here, for all attempts: whoever reads the field below would begin anew with each.
            Deadline(shared.clock.now() + timeout).attach_if_earlier(&mut parts.extensions);
        }
        let route = Route::of(&parts.extensions).filter(|route| route.policy::<Policy>().is_some()).cloned();
        let policy = policy_of(route.as_ref(), &shared);
        let (body, keeper) = match policy.attempts {
            0 | 1 => (Replay::new(body), Keeper::none()),
            _ => {
                shared.budget.deposit(&shared.clock);
                Replay::keep(body, policy.replay)
            }
        };
        let repeats = policy.repeats(&parts.method);
        let token = policy.sticky.as_ref().and_then(|sticky| sticky.read(&parts.headers));
        let mut call =
            Call { shared, service, spare: None, keeper, route, repeats, attempt: None, token, trouble: None };
        let state = State::of(call.pick(parts, Some(body)));
        Self { state, call: Some(call) }
    }
}

impl<S, P, B, R> Future for ResponseFuture<S, P, B, R>
where
    S: Service<Request<Replay<B>>, Response = Response<R>>,
    P: Pick,
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
    R: http_body::Body<Data = Bytes>,
{
    type Output = Result<Answer<R, P>, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            let next = match (this.state.as_mut().project(), &mut *this.call) {
                (Project::Calling { future }, Some(call)) => match future.poll(cx) {
                    Poll::Ready(result) => call.end(result),
                    Poll::Pending => {
                        let timeout = call.trouble.as_mut().and_then(|trouble| trouble.timeout.as_mut());
                        let Some((_, timeout)) = timeout else { return Poll::Pending };
                        // Whatever the task has done before: a busy upload is to end in time as well.
                        ready!(pin!(unconstrained(timeout.as_mut())).poll(cx));
                        call.time_out()
                    }
                },
                (Project::Pausing { pause }, _) => {
                    ready!(pause.as_mut().poll(cx));
                    Some(Next::Ready)
                }
                (Project::Readying, Some(call)) => match call.service.poll_ready(cx) {
                    Poll::Ready(Ok(())) => call.go_on(),
                    Poll::Ready(Err(error)) => Some(Next::Return(Err(error))),
                    Poll::Pending => ready!(call.poll_not_ready(cx)),
                },
                (Project::Passing { future } | Project::Calling { future }, None) => {
                    Some(Next::Return(ready!(future.poll(cx)).map(|response| response.map(Body::new))))
                }
                (Project::Answered { answer }, _) => {
                    return answer.take().map_or(Poll::Pending, |answer| Poll::Ready(*answer));
                }
                (Project::Passing { .. } | Project::Readying, _) => None,
            };
            // `None` cannot be: the state says what there is.
            let Some(next) = next else { return Poll::Pending };
            if let Next::Return(answer) = next {
                this.state.set(State::Answered { answer: None });
                *this.call = None;
                return Poll::Ready(answer);
            }
            this.state.set(State::of(next));
        }
    }
}

impl<S, P, B, R> fmt::Debug for ResponseFuture<S, P, B, R>
where
    S: Service<Request<Replay<B>>, Response = Response<R>>,
    P: Pick,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}

// === impl State ===

impl<F, T> State<F, T> {
    fn of(next: Next<F, T>) -> Self {
        match next {
            Next::Call(future) => Self::Calling { future },
            Next::Pause(wait) => Self::Pausing { pause: Box::pin(sleep(wait)) },
            Next::Ready => Self::Readying,
            Next::Return(answer) => Self::Answered { answer: Some(Box::new(answer)) },
        }
    }
}

// === impl Call ===

impl<S, P, B, R> Call<S, P, B>
where
    S: Service<Request<Replay<B>>, Response = Response<R>>,
    P: Pick,
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
    R: http_body::Body<Data = Bytes>,
{
    /// Picks an endpoint and calls it. The service is ready.
    fn pick(&mut self, mut parts: Parts, body: Option<Replay<B>>) -> NextOf<S, P, R, B> {
        let Some(endpoints) = Endpoints::of(&parts.extensions) else { return self.nobody(Nobody::Empty, parts, body) };
        let policy = policy_of(self.route.as_ref(), &self.shared);
        let tried = self.trouble.as_ref().map_or(&[][..], |trouble| &trouble.failed);
        let (permit, began) = match self.shared.choose(endpoints, policy, Asked::of_parts(&parts), tried) {
            Ok(chosen) => chosen,
            Err(nobody) => return self.nobody(nobody, parts, body),
        };
        // Only now that there is somebody to send it to.
        let Some(body) = body.or_else(|| self.take_over()) else { return self.nobody(Nobody::Empty, parts, None) };
        if self.spare.is_none() && tried.len() + 1 < usize::from(policy.attempts) {
            self.spare = Some(Spare::of(&parts));
        }
        if let Some(trouble) = &mut self.trouble {
            (trouble.last, trouble.waits) = (None, None);
        }
        if let Some(limit) = policy.attempt_timeout {
            let now = self.shared.clock.now();
            let deadline = Deadline::of(&parts.extensions).map_or(now + limit, |caller| caller.0.min(now + limit));
            HeadDeadline(deadline).attach(&mut parts.extensions);
            let trouble = self.trouble();
            trouble.dialect = Dialect::of(&parts.headers);
            trouble.timeout = Some((deadline, Box::pin(sleep(deadline.since(now)))));
        }
        self.attempt = Some(Attempt::begin(permit.endpoint(), &self.shared, began));
        permit.attach(&mut parts.extensions);
        Next::Call(self.service.call(Request::from_parts(parts, body)))
    }

    /// Picks for the request that waits.
    fn go_on(&mut self) -> Option<NextOf<S, P, R, B>> {
        let trouble = self.trouble.as_mut()?;
        trouble.timeout = None;
        let (parts, body) = trouble.next.take()?;
        // The service may have taken its time to be ready.
        let is_over = |Deadline(end): &Deadline| self.shared.clock.now() >= *end;
        if trouble.last.is_some() && Deadline::of(&parts.extensions).is_some_and(is_over) {
            return Some(self.nobody(Nobody::Empty, parts, body));
        }
        Some(self.pick(parts, body))
    }

    /// Waits no longer for the service to be ready for another attempt than for the attempt itself, and not longer than for
    /// somebody who admits.
    fn poll_not_ready(&mut self, cx: &mut Context<'_>) -> Poll<Option<NextOf<S, P, R, B>>> {
        let policy = policy_of(self.route.as_ref(), &self.shared);
        let Some(trouble) = &mut self.trouble else { return Poll::Pending };
        let is_again = trouble.last.is_some();
        if trouble.timeout.is_none() {
            let now = self.shared.clock.now();
            let caller = trouble.next.as_ref().and_then(|(parts, _)| Deadline::of(&parts.extensions));
            let own = match &trouble.waits {
                _ if is_again => policy.attempt_timeout.map(|limit| now + limit),
                waits => waits.as_ref().map(|(end, _)| *end),
            };
            let ends = [caller.map(|Deadline(end)| *end), own];
            let end = ends.into_iter().flatten().min();
            trouble.timeout = end.map(|end| (end, Box::pin(sleep(end.since(now)))));
        }
        let Some((_, timeout)) = &mut trouble.timeout else { return Poll::Pending };
        ready!(pin!(unconstrained(timeout.as_mut())).poll(cx));
        let next = trouble.next.take();
        let nobody = if is_again { Nobody::Empty } else { Nobody::Refused(Moment::MAX) };
        Poll::Ready(next.map(|(parts, body)| self.nobody(nobody, parts, body)))
    }

    #[cold]
    fn nobody(&mut self, nobody: Nobody, parts: Parts, body: Option<Replay<B>>) -> NextOf<S, P, R, B> {
        if let Some(trouble) = &mut self.trouble
            && let Some(last) = trouble.last.take()
        {
            // There is no attempt after it.
            trouble.failed.pop();
            return Next::Return(match last {
                Last::Result(result, attempt) => self.finish(result, attempt),
                Last::TimedOut(endpoint) => Ok(self.late(&endpoint)),
            });
        }
        if let Nobody::Refused(until) = nobody
            && let Some(pause) = self.pause(until, &parts)
        {
            self.trouble().next = Some((parts, body));
            return Next::Pause(pause);
        }
        Next::Return(Ok(self.refuse(nobody, &parts)))
    }

    /// How long to wait before looking again for somebody who admits, if the request may wait.
    fn pause(&mut self, until: Moment, parts: &Parts) -> Option<Duration> {
        let now = self.shared.clock.now();
        let longest = self.shared.wait?;
        let waits = self.trouble.as_ref().and_then(|trouble| trouble.waits.as_ref());
        let end = match waits {
            Some((end, _)) => *end,
            None => {
                let end = Deadline::of(&parts.extensions).map_or(now + longest, |caller| caller.0.min(now + longest));
                let place = self.shared.waiting.take()?;
                self.trouble().waits = Some((end, place));
                end
            }
        };
        (now < end).then(|| until.min(end).since(now).clamp(Duration::from_millis(1), LOOKS))
    }

    fn refuse(&self, nobody: Nobody, parts: &Parts) -> Answer<R, P> {
        let service = Endpoints::of(&parts.extensions).map(|endpoints| &**endpoints.service());
        nobody.into_rejection(service, &self.shared.clock).into_response(Dialect::of(&parts.headers))
    }

    /// An attempt has come to a response, or an error.
    fn end(&mut self, result: Result<Response<R>, S::Error>) -> Option<NextOf<S, P, R, B>> {
        let mut attempt = self.attempt.take()?;
        let policy = policy_of(self.route.as_ref(), &self.shared);
        let reason = match &result {
            Ok(response) => policy.judge(Head::of(response), self.repeats).or_else(|| self.given_up(response)),
            Err(_) => policy.error(self.repeats),
        };
        let pushback = match (&result, reason) {
            (Ok(response), Some(Reason::Grpc(_))) => pushback(response.headers()),
            _ => None,
        };
        let again = reason.and_then(|reason| Some((reason, self.again(reason, attempt.endpoint(), pushback)?)));
        let Some((reason, next)) = again else {
            return Some(Next::Return(self.finish(result, attempt)));
        };
        match &result {
            Ok(response) => attempt.settle(response, &self.shared.classify),
            Err(_) => attempt.fail(self.shared.classify.error()),
        }
        let trouble = self.trouble();
        trouble.failed.push(Failed { endpoint: attempt.endpoint().clone(), reason });
        trouble.last = Some(Last::Result(result, attempt));
        Some(next)
    }

    /// An inner layer that keeps the attempt's time may be the first to say that it is over.
    fn given_up(&self, response: &Response<R>) -> Option<Reason> {
        let (until, _) = self.trouble.as_ref()?.timeout.as_ref().filter(|_| self.repeats)?;
        let rejection = response.extensions().get::<Rejection>()?;
        let late = rejection.status() == StatusCode::GATEWAY_TIMEOUT && rejection.side() == Side::Upstream;
        (late && self.shared.clock.now() >= *until).then_some(Reason::TimedOut)
    }

    fn time_out(&mut self) -> Option<NextOf<S, P, R, B>> {
        let mut attempt = self.attempt.take()?;
        let again = self.repeats.then(|| self.again(Reason::TimedOut, attempt.endpoint(), None)).flatten();
        attempt.fail(Outcome::Failure);
        let Some(next) = again else { return Some(Next::Return(Ok(self.late(attempt.endpoint())))) };
        let (trouble, endpoint) = (self.trouble(), attempt.endpoint().clone());
        trouble.failed.push(Failed { endpoint: endpoint.clone(), reason: Reason::TimedOut });
        trouble.last = Some(Last::TimedOut(endpoint));
        Some(next)
    }

    /// Takes the repetition from the budget, if it is still there, and the request's body over from the attempt before.
    fn take_over(&self) -> Option<Replay<B>> {
        let failed = self.trouble.as_ref()?.failed.last()?;
        if failed.reason != Reason::Unsent && !self.shared.budget.withdraw(self.shared.clock.now()) {
            tracing::debug!(endpoint = &**failed.endpoint.id(), reason = ?failed.reason, "the retry budget is used up");
            return None;
        }
        tracing::debug!(endpoint = &**failed.endpoint.id(), reason = ?failed.reason, "tries another endpoint");
        // From here on the attempt before reads no more.
        self.keeper.again()
    }

    /// Makes the head of the next attempt's request, if there is to be one, and holds its body.
    fn again(&mut self, reason: Reason, failed: &Endpoint, pushback: Option<Duration>) -> Option<NextOf<S, P, R, B>> {
        let spare = self.spare.as_ref()?;
        let policy = policy_of(self.route.as_ref(), &self.shared);
        let attempts = self.trouble.as_ref().map_or(0, |trouble| trouble.failed.len()) + 1;
        if attempts >= usize::from(policy.attempts) {
            return None;
        }
        let endpoints = spare.baggage.get::<Endpoints>();
        let elsewhere = reason == Reason::Unsent && endpoints.is_some_and(|all| self.is_another(all, policy, failed));
        let wait = match pushback {
            Some(wait) if wait > policy.longest_wait() => return None,
            Some(wait) => wait,
            None if elsewhere => Duration::ZERO,
            None => policy.wait(attempts, mix(fastrand::u64(..))),
        };
        let deadline = spare.baggage.get().map(|Deadline(moment)| *moment);
        if deadline.is_some_and(|deadline| self.shared.clock.now() + wait >= deadline) || !self.keeper.hold() {
            return None;
        }
        // Nothing is taken yet: there may be nobody to repeat it to.
        if reason != Reason::Unsent && self.shared.budget.left(self.shared.clock.now()) == 0 {
            tracing::debug!(endpoint = &**failed.id(), ?reason, "the retry budget is used up");
            return None;
        }
        let last = attempts + 1 >= usize::from(policy.attempts);
        let spare = if last { self.spare.take() } else { self.spare.clone() };
        let trouble = self.trouble();
        (trouble.next, trouble.timeout) = (Some((spare?.into_parts(), None)), None);
        Some(if wait.is_zero() { Next::Ready } else { Next::Pause(wait) })
    }

    /// Whether an endpoint admits that was not tried.
    fn is_another(&self, endpoints: &Endpoints, policy: &Policy, failed: &Endpoint) -> bool {
        let tried = self.trouble.as_ref().map_or(&[][..], |trouble| &trouble.failed);
        let offered = || endpoints.iter().filter(|endpoint| endpoint.weight() > 0);
        let subset = policy.subset.as_ref();
        let subset = subset.filter(|subset| !subset.falls_back(offered().map(Endpoint::instance)));
        offered().any(|endpoint| {
            endpoint.gate().admits()
                && endpoint != failed
                && tried.iter().all(|failed| failed.endpoint != *endpoint)
                && subset.is_none_or(|subset| subset.holds(&endpoint.instance()))
        })
    }

    fn finish(
        &mut self,
        result: Result<Response<R>, S::Error>,
        mut attempt: Attempt<P>,
    ) -> Result<Answer<R, P>, S::Error> {
        match result {
            Ok(mut response) => {
                if let Some(sticky) = &policy_of(self.route.as_ref(), &self.shared).sticky
                    && response.extensions().get::<Rejection>().is_none()
                    && self.token != Some(sticky.token(attempt.endpoint()))
                    && let Some(cookie) = sticky.set(attempt.endpoint())
                {
                    response.headers_mut().append(header::SET_COOKIE, cookie);
                }
                self.leave_served(attempt.endpoint(), &mut response);
                let watch = attempt.watch(&response, &self.shared.classify);
                Ok(response.map(|body| Body::guarded(body, watch)))
            }
            Err(error) => {
                attempt.fail(self.shared.classify.error());
                Err(error)
            }
        }
    }

    /// The answer in place of one that did not come in time from this endpoint.
    fn late(&mut self, endpoint: &Endpoint) -> Answer<R, P> {
        let rejection =
            Rejection::new(Layer::Balance, StatusCode::GATEWAY_TIMEOUT, "attempt-timed-out").with_sent(true);
        let mut response = rejection.into_response(self.trouble().dialect);
        self.leave_served(endpoint, &mut response);
        response
    }

    fn leave_served<T>(&mut self, endpoint: &Endpoint, response: &mut Response<T>) {
        if self.shared.leaves_served {
            let trouble = self.trouble.as_mut();
            let failed = trouble.map(|trouble| std::mem::take(&mut trouble.failed)).unwrap_or_default();
            response.extensions_mut().insert(Served::new(endpoint.clone(), failed));
        }
    }

    fn trouble(&mut self) -> &mut TroubleOf<S, P, B> {
        self.trouble.get_or_insert_with(|| {
            Box::new(Trouble {
                next: None,
                dialect: Dialect::Http,
                timeout: None,
                failed: Vec::new(),
                last: None,
                waits: None,
            })
        })
    }
}

/// After what time the server lets the call be repeated; [`Duration::MAX`] for never, which is also what no number means
/// (gRFC A6).
fn pushback(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(GRPC_RETRY_PUSHBACK)?;
    let millis = value.to_str().ok().and_then(|text| text.parse().ok());
    Some(millis.map_or(Duration::MAX, Duration::from_millis))
}

fn policy_of<'a, P>(route: Option<&'a Route>, shared: &'a Shared<P>) -> &'a Policy {
    route.and_then(|route| route.policy()).unwrap_or(&shared.policy)
}
