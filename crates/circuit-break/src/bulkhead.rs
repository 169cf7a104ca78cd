//! A limit of calls in flight that refuses instead of queueing.

use std::fmt;
use std::num::NonZeroU32;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use pin_project_lite::pin_project;
use portcullis_core::{Body, Carried, Clear, Dialect, Endpoint, Guard, Layer as Name, PerEndpoint, Permit, Rejection};

/// Refuses requests when too many are in flight, so that what hangs cannot take everything else with it.
///
/// * **Reads** the [`Permit`] that a balancer left, if any: then each endpoint has a limit of its own.
/// * **Writes** nothing.
/// * **Refuses** with 503 or `UNAVAILABLE`, reason `too-many-in-flight`.
/// * **Alone** it limits what is in flight to the whole service behind it.
/// * **Cost**: two atomic writes, no lock, no queue, no allocation.
///
/// A call is in flight from when it is admitted until its response body has ended or was dropped, as was its future.
/// Nothing waits here: a queue in front of what hangs only moves the waiting. A circuit breaker needs results before it
/// opens, and a hanging service gives none until the first timeout; this is what holds until then.
///
/// ```
/// # use http::{Request, Response, StatusCode};
/// # use portcullis_circuit_break::BulkheadLayer;
/// # use tower::{Layer, Service};
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), std::convert::Infallible> {
/// # let inner = tower::service_fn(|_: Request<()>| async {
/// #     Ok::<_, std::convert::Infallible>(Response::new(http_body_util::Full::<bytes::Bytes>::from("fine")))
/// # });
/// let mut service = BulkheadLayer::new(const { std::num::NonZeroU32::new(1).unwrap() }).layer(inner);
///
/// let admitted = service.call(Request::new(())).await?;
/// assert_eq!(admitted.status(), StatusCode::OK);
/// let refused = service.call(Request::new(())).await?;
/// assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE, "the first one's body was not read yet");
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct BulkheadLayer {
    shared: Arc<Shared>,
}

/// Refuses requests when too many are in flight: see [`BulkheadLayer`].
#[derive(Clone)]
pub struct Bulkhead<S> {
    inner: S,
    shared: Arc<Shared>,
}

/// Keeps a call counted until its body has ended.
pub struct Hold(Option<Arc<Count>>);

pin_project! {
    /// The response of [`Bulkhead`].
    pub struct BulkheadFuture<F> {
        #[pin]
        step: Step<F>,
    }
}

pin_project! {
    #[project = Project]
    enum Step<F> {
        Called { #[pin] future: F, hold: Hold },
        Refused { dialect: Dialect },
    }
}

struct Shared {
    limit: u32,
    whole: Arc<Count>,
    endpoints: PerEndpoint<Share>,
    refused: AtomicU64,
}

#[derive(Default)]
struct Count(AtomicU32);

/// One endpoint's count. Another endpoint's is another one, so that calls which outlive theirs take nothing from it.
#[derive(Default)]
struct Share(ArcSwap<Count>);

// === impl BulkheadLayer ===

impl BulkheadLayer {
    /// Lets so many calls be in flight at a time: to each endpoint below a balancer, else in all.
    #[must_use]
    pub fn new(limit: NonZeroU32) -> Self {
        let (endpoints, refused) = (PerEndpoint::new(), AtomicU64::new(0));
        Self { shared: Arc::new(Shared { limit: limit.get(), whole: Arc::default(), endpoints, refused }) }
    }

    /// How many calls are in flight that carried no permit.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.shared.whole.0.load(Ordering::Relaxed)
    }

    /// How many calls are in flight to one endpoint.
    #[must_use]
    pub fn in_flight_to(&self, endpoint: &Endpoint) -> u32 {
        self.shared.endpoints.existing(endpoint).map_or(0, |share| share.0.load().0.load(Ordering::Relaxed))
    }

    /// How many requests were refused.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.shared.refused.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for BulkheadLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BulkheadLayer").field("limit", &self.shared.limit).finish_non_exhaustive()
    }
}

impl<S> tower_layer::Layer<S> for BulkheadLayer {
    type Service = Bulkhead<S>;

    fn layer(&self, inner: S) -> Bulkhead<S> {
        Bulkhead { inner, shared: self.shared.clone() }
    }
}

// === impl Bulkhead ===

impl<S, B, R> tower_service::Service<Request<B>> for Bulkhead<S>
where
    S: tower_service::Service<Request<B>, Response = Response<R>>,
    R: http_body::Body<Data = Bytes>,
{
    type Response = Response<Body<R, Hold>>;
    type Error = S::Error;
    type Future = BulkheadFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let limit = self.shared.limit;
        let hold = match Permit::of(request.extensions()) {
            Some(permit) => Hold::take(&self.shared.endpoints.of(permit.endpoint(), Share::default).0.load(), limit),
            None => Hold::take(&self.shared.whole, limit),
        };
        let step = match hold {
            Some(hold) => Step::Called { future: self.inner.call(request), hold },
            None => {
                self.shared.refused.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(limit = self.shared.limit, "refused: too many in flight");
                Step::Refused { dialect: Dialect::of(request.headers()) }
            }
        };
        BulkheadFuture { step }
    }
}

impl<S: fmt::Debug> fmt::Debug for Bulkhead<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bulkhead").field("inner", &self.inner).finish_non_exhaustive()
    }
}

// === impl BulkheadFuture ===

impl<F, R, E> Future for BulkheadFuture<F>
where
    F: Future<Output = Result<Response<R>, E>>,
    R: http_body::Body<Data = Bytes>,
{
    type Output = Result<Response<Body<R, Hold>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().step.project() {
            Project::Called { future, hold } => {
                let result = ready!(future.poll(cx));
                let hold = Hold(hold.0.take());
                Poll::Ready(result.map(|response| response.map(|body| Body::guarded(body, hold))))
            }
            Project::Refused { dialect } => {
                let rejection =
                    Rejection::new(Name::CircuitBreak, StatusCode::SERVICE_UNAVAILABLE, "too-many-in-flight");
                Poll::Ready(Ok(rejection
                    .with_detail("as many requests as may be are under way")
                    .into_response(*dialect)))
            }
        }
    }
}

impl<F> fmt::Debug for BulkheadFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BulkheadFuture").finish_non_exhaustive()
    }
}

// === impl Share ===

impl Clear for Share {
    fn clear(&self) {
        self.0.store(Arc::default());
    }
}

// === impl Hold ===

impl Hold {
    fn take(count: &Arc<Count>, limit: u32) -> Option<Self> {
        let below = |now| (now < limit).then(|| now + 1);
        count.0.fetch_update(Ordering::AcqRel, Ordering::Relaxed, below).ok()?;
        Some(Self(Some(count.clone())))
    }

    fn release(&mut self) {
        if let Some(count) = self.0.take() {
            count.0.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Guard for Hold {
    fn end(&mut self) {
        self.release();
    }

    fn error(&mut self) {
        self.release();
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.release();
    }
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Hold").field(&self.0.is_some()).finish()
    }
}

#[cfg(all(test, not(portcullis_loom)))]
mod tests {
    use super::*;
    use portcullis_core::Instance;

    #[test]
    fn what_a_layer_counts_goes_with_it_though_the_endpoint_stays() {
        let endpoint = Endpoint::new("s", Instance::new("a", std::net::SocketAddr::from(([127, 0, 0, 1], 1))));
        let layer = BulkheadLayer::new(NonZeroU32::MIN);
        let count = layer.shared.endpoints.of(&endpoint, Share::default).0.load_full();
        drop(layer);
        assert!(Arc::into_inner(count).is_some(), "the endpoint keeps it");
    }
}
