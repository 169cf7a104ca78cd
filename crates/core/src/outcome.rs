//! How a call went, decided when its response has ended.

use std::fmt;
use std::sync::Arc;

use http::{Extensions, HeaderMap, Response, StatusCode};

use crate::body::Guard;
use crate::grpc::{Dialect, GrpcCode};
use crate::{Rejection, Side};

/// How a call went, as breakers and balancers count it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Outcome {
    /// The endpoint did its work.
    Success,
    /// The endpoint failed.
    Failure,
    /// It says nothing about the endpoint: the caller went away, or a layer of ours refused.
    Ignored,
}

/// What the head of a response says about the [`Outcome`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// All there is to say.
    Decided(Outcome),
    /// A success, if the body arrives whole.
    AtEnd,
    /// The trailers will tell; a body that ends without is a failure.
    AtTrailers,
}

/// The head of a response.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Head<'a> {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: &'a HeaderMap,
    /// What layers left in it.
    pub extensions: &'a Extensions,
}

/// Decides how a call went: the pattern book's "expected exception".
///
/// A closure from [`Head`] to [`Verdict`] decides by the head alone and leaves trailers and errors to [`Standard`].
pub trait Classify: Send + Sync + 'static {
    /// Looks at the head of a response.
    fn head(&self, head: Head<'_>) -> Verdict;

    /// Looks at the trailers, when the head left it to them.
    fn trailers(&self, trailers: &HeaderMap) -> Outcome {
        Standard::default().trailers(trailers)
    }

    /// The service returned an error instead of a response, or the body broke off. By default a failure.
    fn error(&self) -> Outcome {
        Outcome::Failure
    }
}

/// The usual view.
///
/// | response | outcome |
/// |---|---|
/// | 5xx, except 501 and 505 | failure |
/// | 429, `RESOURCE_EXHAUSTED` | ignored, unless [told otherwise](Self::exhausted) |
/// | any other status | success, once the body has arrived whole |
/// | gRPC `UNKNOWN`, `DEADLINE_EXCEEDED`, `INTERNAL`, `UNAVAILABLE`, `DATA_LOSS`, in headers or trailers; a gRPC body that ends without a status | failure |
/// | any other gRPC status | success |
/// | a [`Rejection`] by the gateway or for the caller's fault | ignored |
/// | a [`Rejection`] for the upstream's fault | failure |
/// | an error; a body cut short | failure |
/// | a body the caller dropped | ignored |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standard {
    exhausted: Outcome,
}

/// Watches a response to its end and then tells how it went; see [`judge`].
pub struct Judge<C: Classify + ?Sized, R: Report> {
    classify: Arc<C>,
    report: Option<R>,
    verdict: Verdict,
}

/// Is told how a call went, exactly once.
pub trait Report {
    /// The call has ended.
    fn report(self, outcome: Outcome);
}

// === impl Head ===

impl<'a> Head<'a> {
    /// The head of `response`.
    #[must_use]
    pub fn of<B>(response: &'a Response<B>) -> Self {
        Self { status: response.status(), headers: response.headers(), extensions: response.extensions() }
    }
}

// === impl Classify ===

impl<F> Classify for F
where
    F: Fn(Head<'_>) -> Verdict + Send + Sync + 'static,
{
    fn head(&self, head: Head<'_>) -> Verdict {
        self(head)
    }
}

// === impl Standard ===

impl Standard {
    /// What 429 and `RESOURCE_EXHAUSTED` count as. By default they are ignored: the endpoint is well, and a breaker that
    /// opens on them turns a limit on one caller into an outage for all.
    #[must_use]
    pub const fn exhausted(mut self, outcome: Outcome) -> Self {
        self.exhausted = outcome;
        self
    }

    fn grpc(self, code: GrpcCode) -> Outcome {
        match code {
            GrpcCode::RESOURCE_EXHAUSTED => self.exhausted,
            GrpcCode::UNKNOWN
            | GrpcCode::DEADLINE_EXCEEDED
            | GrpcCode::INTERNAL
            | GrpcCode::UNAVAILABLE
            | GrpcCode::DATA_LOSS => Outcome::Failure,
            _ => Outcome::Success,
        }
    }
}

impl Default for Standard {
    fn default() -> Self {
        Self { exhausted: Outcome::Ignored }
    }
}

impl Classify for Standard {
    fn head(&self, head: Head<'_>) -> Verdict {
        if let Some(rejection) = head.extensions.get::<Rejection>() {
            return Verdict::Decided(match rejection.side() {
                Side::Upstream => Outcome::Failure,
                Side::Caller | Side::Gateway => Outcome::Ignored,
            });
        }
        match head.status {
            StatusCode::TOO_MANY_REQUESTS => Verdict::Decided(self.exhausted),
            StatusCode::NOT_IMPLEMENTED | StatusCode::HTTP_VERSION_NOT_SUPPORTED => Verdict::AtEnd,
            status if status.is_server_error() => Verdict::Decided(Outcome::Failure),
            _ if Dialect::of(head.headers) == Dialect::Http => Verdict::AtEnd,
            _ => GrpcCode::of(head.headers).map_or(Verdict::AtTrailers, |code| Verdict::Decided(self.grpc(code))),
        }
    }

    fn trailers(&self, trailers: &HeaderMap) -> Outcome {
        GrpcCode::of(trailers).map_or(Outcome::Failure, |code| self.grpc(code))
    }
}

// === impl Judge ===

/// Looks at the head of `response` and returns the [`Guard`] that its body needs, so that `report` is told how the call
/// went as soon as that is certain: at once, at the end of the body, or when either is dropped.
pub fn judge<B, C: Classify + ?Sized, R: Report>(classify: Arc<C>, response: &Response<B>, report: R) -> Judge<C, R> {
    let verdict = classify.head(Head::of(response));
    let mut judge = Judge { classify, report: Some(report), verdict };
    if let Verdict::Decided(outcome) = verdict {
        judge.tell(outcome);
    }
    judge
}

impl<C: Classify + ?Sized, R: Report> Judge<C, R> {
    /// Who is to be told, if that has not happened yet.
    pub const fn untold(&mut self) -> Option<&mut R> {
        self.report.as_mut()
    }

    fn tell(&mut self, outcome: Outcome) {
        if let Some(report) = self.report.take() {
            report.report(outcome);
        }
    }
}

impl<C: Classify + ?Sized, R: Report> Guard for Judge<C, R> {
    fn whole(&mut self) {
        if self.verdict != Verdict::AtTrailers {
            self.tell(Outcome::Success);
        }
    }

    fn trailers(&mut self, trailers: &HeaderMap) {
        if self.verdict == Verdict::AtTrailers {
            let outcome = self.classify.trailers(trailers);
            self.tell(outcome);
        }
    }

    fn end(&mut self) {
        self.tell(if self.verdict == Verdict::AtTrailers { Outcome::Failure } else { Outcome::Success });
    }

    fn error(&mut self) {
        let outcome = self.classify.error();
        self.tell(outcome);
    }
}

impl<C: Classify + ?Sized, R: Report> Drop for Judge<C, R> {
    fn drop(&mut self) {
        self.tell(Outcome::Ignored);
    }
}

impl<C: Classify + ?Sized, R: Report> fmt::Debug for Judge<C, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Judge").field("verdict", &self.verdict).field("told", &self.report.is_none()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Layer, grpc};
    use http::HeaderValue;

    struct Told(std::rc::Rc<std::cell::Cell<Option<Outcome>>>);

    impl Report for Told {
        fn report(self, outcome: Outcome) {
            assert_eq!(self.0.replace(Some(outcome)), None, "told twice");
        }
    }

    fn response(status: u16) -> Response<()> {
        Response::builder().status(status).body(()).unwrap()
    }

    fn grpc_response() -> Response<()> {
        let mut response = response(200);
        response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
        response
    }

    fn status(code: u8) -> HeaderMap {
        HeaderMap::from_iter([(grpc::GRPC_STATUS, HeaderValue::from(u16::from(code)))])
    }

    fn outcome(response: &Response<()>, live: impl FnOnce(&mut Judge<Standard, Told>)) -> Outcome {
        let told = std::rc::Rc::new(std::cell::Cell::new(None));
        let mut judge = judge(Arc::new(Standard::default()), response, Told(told.clone()));
        live(&mut judge);
        drop(judge);
        told.get().unwrap()
    }

    #[test]
    fn http_is_judged_by_status_and_by_a_whole_body() {
        for (code, expected) in [
            (200, Outcome::Success),
            (404, Outcome::Success),
            (429, Outcome::Ignored),
            (500, Outcome::Failure),
            (501, Outcome::Success),
            (503, Outcome::Failure),
        ] {
            assert_eq!(outcome(&response(code), Guard::end), expected, "{code}");
        }
        assert_eq!(outcome(&response(200), Guard::error), Outcome::Failure);
        assert_eq!(outcome(&response(200), |_| ()), Outcome::Ignored, "the caller went away");
    }

    #[test]
    fn grpc_is_judged_by_its_trailers() {
        assert_eq!(outcome(&grpc_response(), |judge| judge.trailers(&status(0))), Outcome::Success);
        assert_eq!(outcome(&grpc_response(), |judge| judge.trailers(&status(14))), Outcome::Failure);
        assert_eq!(outcome(&grpc_response(), |judge| judge.trailers(&status(5))), Outcome::Success);
        assert_eq!(outcome(&grpc_response(), |judge| judge.trailers(&HeaderMap::new())), Outcome::Failure);
        assert_eq!(outcome(&grpc_response(), Guard::end), Outcome::Failure);
        let mut trailers_only = grpc_response();
        trailers_only.headers_mut().extend(status(13));
        assert_eq!(outcome(&trailers_only, Guard::end), Outcome::Failure);
    }

    #[test]
    fn a_refusal_of_ours_says_nothing_about_the_endpoint() {
        for (side, expected) in
            [(Side::Gateway, Outcome::Ignored), (Side::Caller, Outcome::Ignored), (Side::Upstream, Outcome::Failure)]
        {
            let mut response = response(503);
            let rejection = Rejection::new(Layer::Forward, StatusCode::SERVICE_UNAVAILABLE, "test").with_side(side);
            response.extensions_mut().insert(rejection);
            assert_eq!(outcome(&response, Guard::end), expected);
        }
    }

    #[test]
    fn a_closure_classifies() {
        let teapots = Arc::new(|head: Head<'_>| match head.status.as_u16() {
            418 => Verdict::Decided(Outcome::Failure),
            _ => Verdict::AtEnd,
        });
        let told = std::rc::Rc::new(std::cell::Cell::new(None));
        drop(judge(teapots, &response(418), Told(told.clone())));
        assert_eq!(told.get(), Some(Outcome::Failure));
    }
}
