//! Routes to services: the whole stack as one service.
//!
//! ```text
//!     request
//!        │
//!        ▼
//!     route ───────── what is it asking for?       404 405
//!     auth ────────── who is calling?              401 403
//!     rate-limit ──── may they, this often?        429
//!     discovery ───── where does that name live?   503
//!     balance ─────── which of those?              503
//!     circuit-break ─ is that one well?            503
//!     forward ─────── send it, stream it back      502 504
//!        │
//!        ▼
//!     upstream
//! ```

mod route;
mod router;

use std::fmt;
use std::num::NonZeroU32;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body::{Frame, SizeHint};
use pin_project_lite::pin_project;
use portcullis_auth::{Attempt, Auth, AuthLayer, Authenticate, Denied, Head, SharedAuthenticate};
use portcullis_balance::{Balance, BalanceLayer, Pick, PowerOfTwo};
use portcullis_circuit_break::{CircuitBreak, CircuitBreakLayer};
use portcullis_core::{Carried, Clock, Deadline, Dialect, Identity, Layer as Where, Rejection, is_normal_path};
use portcullis_discovery::{Discovery, DiscoveryLayer, Registry};
use portcullis_forward::{BoxError, Forward};
use portcullis_rate_limit::{Rate, RateLimit, RateLimitLayer};
use tower_layer::Layer;
use tower_service::Service;

pub use self::route::Route;
use self::route::Target;
use self::router::{Missing, Router};

/// An API gateway as a service: it mounts wherever a [`Service`] of [`Request`]s does, and is cheap to clone.
#[derive(Clone)]
pub struct Gateway {
    routes: Arc<Router<Target>>,
    clock: Clock,
    discovery: DiscoveryLayer,
    stack: Stack,
}

/// Puts a [`Gateway`] together.
#[must_use = "nothing is served before it is built"]
pub struct Builder {
    routes: Vec<(String, Route)>,
    auth: Option<AuthLayer<SharedAuthenticate>>,
    rate_limit: Option<RateLimitLayer>,
    discovery: DiscoveryLayer,
    balance: BalanceLayer<Arc<dyn Pick>>,
    circuit_break: CircuitBreakLayer,
    forward: Forward,
    clock: Clock,
}

/// Why a [`Gateway`] cannot be built.
#[derive(Debug)]
pub struct Error(String);

/// The layers in the order a request travels.
type Stack = Auth<RateLimit<Discovery<Balance<CircuitBreak<Forward>, Arc<dyn Pick>>>>, SharedAuthenticate>;

/// What comes out of the stack, whatever goes in: a refusal or the upstream's body, watched by the layers it passed.
type StackBody = <<Stack as Service<Request<http_body_util::Empty<Bytes>>>>::Response as HasBody>::Body;

/// Names the body of a response.
trait HasBody {
    type Body;
}

impl<B> HasBody for Response<B> {
    type Body = B;
}

pin_project! {
    /// The body of a [`Gateway`]'s answer.
    pub struct GatewayBody {
        #[pin]
        inner: StackBody,
    }
}

pin_project! {
    /// The answer of a [`Gateway`].
    pub struct ResponseFuture<B>
    where
        Stack: Service<Request<B>>,
    {
        #[pin]
        state: State<<Stack as Service<Request<B>>>::Future>,
    }
}

pin_project! {
    #[project = Project]
    enum State<F> {
        Called { #[pin] future: F },
        Refused { rejection: Option<Rejection>, dialect: Dialect },
    }
}

// === impl Gateway ===

impl Gateway {
    /// A gateway to the services in `registry`, without routes yet.
    pub fn builder(registry: impl Registry) -> Builder {
        Builder {
            routes: Vec::new(),
            auth: None,
            rate_limit: None,
            discovery: DiscoveryLayer::new(registry),
            balance: BalanceLayer::new(Arc::new(PowerOfTwo) as Arc<dyn Pick>),
            circuit_break: CircuitBreakLayer::new(),
            forward: Forward::new(),
            clock: Clock::system(),
        }
    }

    /// Whether the registry has answered for every service that has a route.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.discovery.is_ready()
    }

    /// Waits until the registry has answered for every service that has a route.
    pub async fn ready(&self) {
        self.discovery.ready().await;
    }

    /// What the request asks for, left in it for the layers below; else the answer it gets. A path that is not in normal
    /// form is matched as it is, since forward sends it so or refuses it.
    fn route<B>(&self, request: &mut Request<B>) -> Result<(), Rejection> {
        let path = request.uri().path();
        let target = self.routes.find(request.method(), path).map_err(|missing| match missing {
            Missing::Path if !is_normal_path(path) => {
                Rejection::new(Where::Route, StatusCode::BAD_REQUEST, "path-not-normal")
            }
            Missing::Path => Rejection::new(Where::Route, StatusCode::NOT_FOUND, "no-route"),
            Missing::Method(allowed) => {
                let allowed = allowed.iter().map(Method::as_str).collect::<Vec<_>>().join(", ");
                Rejection::new(Where::Route, StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed")
                    .with_header(header::ALLOW, HeaderValue::try_from(allowed).unwrap_or(HeaderValue::from_static("")))
            }
        })?;
        let extensions = request.extensions_mut();
        target.route.clone().attach(extensions);
        target.service.clone().attach(extensions);
        if let Some(timeout) = target.timeout {
            let deadline = Deadline(self.clock.now() + timeout);
            let sooner = Deadline::of(extensions).map_or(deadline, |other| deadline.min(*other));
            sooner.attach(extensions);
        }
        Ok(())
    }
}

impl<B> Service<Request<B>> for Gateway
where
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<GatewayBody>;
    type Error = std::convert::Infallible;
    type Future = ResponseFuture<B>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Service::<Request<B>>::poll_ready(&mut self.stack, cx)
    }

    fn call(&mut self, mut request: Request<B>) -> ResponseFuture<B> {
        let state = match self.route(&mut request) {
            Ok(()) => State::Called { future: self.stack.call(request) },
            Err(rejection) => {
                tracing::debug!(reason = rejection.reason(), "refused");
                State::Refused { rejection: Some(rejection), dialect: Dialect::of(request.headers()) }
            }
        };
        ResponseFuture { state }
    }
}

impl fmt::Debug for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gateway").field("discovery", &self.discovery).finish_non_exhaustive()
    }
}

// === impl Builder ===

impl Builder {
    /// Sends requests that match `pattern` where `route` says. A pattern is a path, such as `/orders`, with parameters, such
    /// as `/orders/{id}`, or with a rest, such as `/orders/{*rest}`, which also takes `/orders` and `/orders/`. The most
    /// specific pattern wins, whatever the order.
    pub fn route(mut self, pattern: &str, route: Route) -> Self {
        self.routes.push((pattern.to_owned(), route));
        self
    }

    /// Asks callers who they are: every route does, unless its own policy says otherwise. By default none does.
    pub fn authenticate<A>(self, authenticate: A) -> Self
    where
        A: Authenticate + Send + Sync + 'static,
        A::Future: Send + 'static,
    {
        self.with_auth(AuthLayer::new(authenticate.shared()))
    }

    /// Holds every caller to this rate on each route, unless a route's own policy says otherwise. By default there is no limit.
    pub fn rate_limit(self, rate: Rate) -> Self {
        self.with_rate_limit(RateLimitLayer::new(rate))
    }

    /// Picks endpoints by this policy instead of [`PowerOfTwo`].
    pub fn pick(self, pick: impl Pick + 'static) -> Self {
        self.with_balance(BalanceLayer::new(Arc::new(pick)))
    }

    /// Replaces the auth layer, to set more than its proof.
    pub fn with_auth(mut self, layer: AuthLayer<SharedAuthenticate>) -> Self {
        self.auth = Some(layer);
        self
    }

    /// Replaces the rate-limit layer, to set more than its rate.
    pub fn with_rate_limit(mut self, layer: RateLimitLayer) -> Self {
        self.rate_limit = Some(layer);
        self
    }

    /// Replaces the discovery layer, to set more than its registry.
    pub fn with_discovery(mut self, layer: DiscoveryLayer) -> Self {
        self.discovery = layer;
        self
    }

    /// Replaces the balance layer, to set more than its policy.
    pub fn with_balance(mut self, layer: BalanceLayer<Arc<dyn Pick>>) -> Self {
        self.balance = layer;
        self
    }

    /// Replaces the circuit-break layer. It guards each endpoint by itself.
    pub fn with_circuit_break(mut self, layer: CircuitBreakLayer) -> Self {
        self.circuit_break = layer;
        self
    }

    /// Replaces what sends requests on.
    pub fn with_forward(mut self, forward: Forward) -> Self {
        self.forward = forward;
        self
    }

    /// Counts deadlines by this clock.
    pub fn clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// Puts the gateway together. In a tokio runtime it begins to follow the services that have routes, so that first
    /// requests need not wait.
    ///
    /// # Errors
    ///
    /// [`Error`] when there is no route, patterns are malformed or contradict each other, or a route asks who is calling
    /// and there is no way to tell.
    pub fn build(self) -> Result<Gateway, Error> {
        if self.routes.is_empty() {
            return Err(Error::new("no routes"));
        }
        if self.auth.is_none() {
            let asks = |route: &Route| route.policy::<portcullis_auth::Policy>().is_some_and(|policy| policy.asks());
            if let Some((pattern, _)) = self.routes.iter().find(|(_, route)| asks(route)) {
                return Err(Error::new(format!(
                    "the route {pattern:?} asks who is calling, and there is no way to tell"
                )));
            }
        }
        let auth = self.auth.unwrap_or_else(|| AuthLayer::new(Nobody.shared()).policy(portcullis_auth::Policy::none()));
        let rate_limit = self.rate_limit.unwrap_or_else(|| {
            let layer = RateLimitLayer::new(Rate::per_second(NonZeroU32::MIN));
            layer.handle().set_limits([]);
            layer
        });
        // From the inside out, as `Layer`s nest.
        let stack = self.circuit_break.layer(self.forward);
        let stack = self.discovery.layer(self.balance.layer(stack));
        let stack = auth.layer(rate_limit.layer(stack));
        for (_, route) in &self.routes {
            self.discovery.follow(route.service.as_str());
        }
        let routes = self.routes.into_iter().map(|(pattern, route)| {
            let target = route.target(&pattern);
            (pattern, route.methods, target)
        });
        let routes = Router::new(routes.collect())?;
        Ok(Gateway { routes: Arc::new(routes), clock: self.clock, discovery: self.discovery, stack })
    }
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder").field("routes", &self.routes).finish_non_exhaustive()
    }
}

/// Stands where nobody is asked who they are.
struct Nobody;

impl Authenticate for Nobody {
    type Future = std::future::Pending<Result<Identity, Denied>>;

    fn authenticate(&self, _: &Head<'_>) -> Attempt<Self::Future> {
        Attempt::Now(Err(Denied::missing()))
    }
}

// === impl Error ===

impl Error {
    fn new(what: impl Into<String>) -> Self {
        Self(what.into())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

// === impl ResponseFuture ===

impl<B> Future for ResponseFuture<B>
where
    Stack: Service<Request<B>, Response = Response<StackBody>, Error = std::convert::Infallible>,
{
    type Output = Result<Response<GatewayBody>, std::convert::Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            Project::Called { future } => future.poll(cx).map_ok(|response| response.map(GatewayBody::new)),
            Project::Refused { rejection, dialect } => {
                let Some(rejection) = rejection.take() else { return Poll::Pending };
                Poll::Ready(Ok(rejection.into_response(*dialect).map(GatewayBody::new)))
            }
        }
    }
}

impl<B> fmt::Debug for ResponseFuture<B>
where
    Stack: Service<Request<B>>,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}

// === impl GatewayBody ===

impl GatewayBody {
    const fn new(inner: StackBody) -> Self {
        Self { inner }
    }
}

impl http_body::Body for GatewayBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        self.project().inner.poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl fmt::Debug for GatewayBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("GatewayBody").finish()
    }
}
