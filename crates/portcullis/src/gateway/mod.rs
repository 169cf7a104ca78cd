//! Routes to services: the whole stack as one service.
//!
//! ```text
//!     request
//!        │
//!        ▼
//!     route ───────── what is it asking for?       400 404 405
//!     auth ────────── who is calling?              401 403 429 503
//!     rate-limit ──── may they, this often?        429 503
//!     discovery ───── where does that name live?   503
//!     balance ─────── which of those?              503 504
//!     circuit-break ─ is that one well?            503
//!     forward ─────── send it, stream it back      502 503 504, and 4xx to what cannot be sent
//!        │
//!        ▼
//!     upstream
//! ```
//!
//! Who wants to know how a request fared on its way, for a log or for spans, leaves an [`Observer`](portcullis_core::Observer) in its extensions.

mod answer;
mod matches;
mod observe;
mod pattern;
mod response;
mod route;
mod router;
mod upstream;

use std::collections::HashMap;
use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use portcullis_auth::{Attempt, Auth, AuthLayer, Authenticate, Denied, Head, SharedAuthenticate};
use portcullis_balance::{BalanceLayer, Pick};
use portcullis_circuit_break::CircuitBreakLayer;
use portcullis_core::is_normal_path;
use portcullis_core::{Body, Carried, Clock, Deadline, Destination, Dialect, Identity, Layer as Where, Rejection};
use portcullis_discovery::{DiscoveryLayer, Registry};
use portcullis_forward::{BoxError, Forward};
use portcullis_rate_limit::{Rate, RateLimit, RateLimitLayer};
use tower_layer::Layer;
use tower_service::Service;

pub use self::answer::{Cors, Redirect};
pub use self::matches::Is;
use self::observe::Passed;
use self::pattern::unmatched;
use self::response::{After, State};
pub use self::response::{GatewayBody, ResponseFuture};
pub use self::route::Route;
use self::route::{Action, Target};
use self::router::{Asked, Misfits, Missing, Router};
pub use self::upstream::Upstream;
use self::upstream::Ways;

/// An API gateway as a service: it mounts wherever a [`Service`] of [`Request`]s does, and is cheap to clone.
#[derive(Clone)]
pub struct Gateway {
    routes: Arc<Router<Target>>,
    clock: Clock,
    leaves_route: bool,
    /// Of every service that has a route.
    discoveries: Arc<[DiscoveryLayer]>,
    stack: Stack,
}

/// Puts a [`Gateway`] together.
#[must_use = "nothing is served before it is built"]
pub struct Builder {
    routes: Vec<(String, Route)>,
    auth: Option<AuthLayer<SharedAuthenticate>>,
    rate_limit: Option<RateLimitLayer>,
    /// Of services that have no other.
    upstream: Upstream,
    upstreams: HashMap<Arc<str>, Upstream>,
    leaves_route: bool,
    clock: Clock,
}

/// Why a [`Gateway`] cannot be built.
#[derive(Debug)]
pub struct Error {
    what: String,
    unmatched: bool,
}

/// The layers in the order a request travels.
type Stack = Auth<Passed<RateLimit<Passed<Ways>>>, SharedAuthenticate>;

/// What comes out of the stack, whatever goes in: a refusal or the upstream's body, watched by the layers it passed.
type StackBody = <<Stack as Service<Request<http_body_util::Empty<Bytes>>>>::Response as HasBody>::Body;

/// Names the body of a response.
trait HasBody {
    type Body;
}

impl<B> HasBody for Response<B> {
    type Body = B;
}

// === impl Gateway ===

impl Gateway {
    /// A gateway to the services in `registry`, without routes yet.
    pub fn builder(registry: impl Registry) -> Builder {
        Builder {
            routes: Vec::new(),
            auth: None,
            rate_limit: None,
            upstream: Upstream::new(registry),
            upstreams: HashMap::new(),
            leaves_route: false,
            clock: Clock::system(),
        }
    }

    /// Whether the registry has answered for every service that has a route.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.discoveries.iter().all(DiscoveryLayer::is_ready)
    }

    /// Waits until the registry has answered for every service that has a route.
    pub async fn ready(&self) {
        for discovery in &*self.discoveries {
            discovery.ready().await;
        }
    }

    /// What the request asks for, left in it for the layers below, and what is to be done to the response; else the
    /// answer it gets. A path that is not in normal form is matched as it is, since forward sends it so or refuses it.
    #[expect(clippy::result_large_err, reason = "it is the answer, and moved once")]
    fn route<B>(&self, request: &mut Request<B>) -> Result<Option<Box<After>>, Response<GatewayBody>> {
        let asked = Asked { method: request.method(), uri: request.uri(), headers: request.headers() };
        if let Some(method) = Cors::asked(request)
            && let Ok(target) = self.routes.find(Asked { method: &method, ..asked })
            && let Some(cors) = &target.cors
        {
            return Err(self.named(target, cors.preflight(request).map(|Nothing| GatewayBody::empty())));
        }
        let target = match self.routes.find(asked) {
            Ok(target) => target,
            Err(missing) => return Err(refuse(request, missing.into_rejection(request.uri().path()))),
        };
        let part = match &target.action {
            Action::Send(split) => split.pick(|below| fastrand::u64(..below)),
            // Sent back to the caller, such a path could lead to another host.
            Action::Redirect(_) if !is_normal_path(request.uri().path()) => {
                return Err(self.named(target, refuse(request, not_normal())));
            }
            Action::Redirect(redirect) => {
                let Some(response) = redirect.answer(request) else {
                    let no_host = Rejection::new(Where::Route, StatusCode::BAD_REQUEST, "no-host");
                    return Err(self.named(target, refuse(request, no_host)));
                };
                return Err(self.own(target, request, response.map(|Nothing| GatewayBody::empty())));
            }
            Action::Respond(fixed) => {
                let response = fixed.answer(|body| GatewayBody::new(Body::refusal(body)));
                return Err(self.own(target, request, response));
            }
        };
        let cors = target.cors.as_ref().map(|cors| (cors.clone(), request.headers().get(header::ORIGIN).cloned()));
        let route = self.leaves_route.then(|| target.route.clone());
        let after = (route.is_some() || cors.is_some()).then(|| Box::new(After { route, cors }));
        let extensions = request.extensions_mut();
        part.and_then(|part| part.route.as_ref()).unwrap_or(&target.route).clone().attach(extensions);
        if let Some(part) = part {
            part.service.clone().attach(extensions);
        }
        if let Some(timeout) = target.timeout.into_iter().chain(part.and_then(|part| part.timeout)).min() {
            Deadline(self.clock.now() + timeout).attach_if_earlier(extensions);
        }
        Ok(after)
    }

    /// What the route answers by itself, as its headers are to be.
    fn own<B>(
        &self,
        target: &Target,
        request: &Request<B>,
        mut response: Response<GatewayBody>,
    ) -> Response<GatewayBody> {
        let headers = response.headers_mut();
        answer::edit(headers, &target.edits);
        if let Some(cors) = &target.cors {
            cors.leave(request.headers().get(header::ORIGIN), headers);
        }
        self.named(target, response)
    }

    fn named(&self, target: &Target, mut response: Response<GatewayBody>) -> Response<GatewayBody> {
        if self.leaves_route {
            response.extensions_mut().insert(target.route.clone());
        }
        response
    }
}

/// The body of an answer that has none.
#[derive(Default)]
struct Nothing;

fn refuse<B>(request: &Request<B>, rejection: Rejection) -> Response<GatewayBody> {
    tracing::debug!(reason = rejection.reason(), "refused");
    rejection.into_response(Dialect::of(request.headers())).map(GatewayBody::new)
}

fn not_normal() -> Rejection {
    Rejection::new(Where::Route, StatusCode::BAD_REQUEST, "path-not-normal")
}

impl Missing {
    fn into_rejection(self, path: &str) -> Rejection {
        match self {
            Self::Route if !is_normal_path(path) => not_normal(),
            Self::Route => Rejection::new(Where::Route, StatusCode::NOT_FOUND, "no-route"),
            Self::Method(allowed) => {
                let allowed = allowed.iter().map(Method::as_str).collect::<Vec<_>>().join(", ");
                Rejection::new(Where::Route, StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed")
                    .with_header(header::ALLOW, HeaderValue::try_from(allowed).unwrap_or(HeaderValue::from_static("")))
            }
        }
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
            Ok(after) => State::Called { future: self.stack.call(request), after },
            Err(response) => State::Answered { response: Some(response) },
        };
        ResponseFuture { state }
    }
}

impl fmt::Debug for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gateway").field("discoveries", &self.discoveries).finish_non_exhaustive()
    }
}

// === impl Builder ===

impl Builder {
    /// Sends requests that match `pattern` where `route` says. A pattern is a path, such as `/orders`, with parameters, such
    /// as `/orders/{id}`, or with a rest, such as `/orders/{*rest}`, which also takes `/orders` and `/orders/`. The most
    /// specific pattern wins, whatever the order.
    ///
    /// What is not a parameter stands there as callers send it, in [normal form](portcullis_core::is_normal_path):
    /// `/caf%C3%A9`, not `/café`. Only a route whose own policy [passes](portcullis_forward::Paths::Pass) paths may say what
    /// is not.
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

    /// Holds every caller to this rate over all routes together; a route with a policy of its own is not counted here. By
    /// default there is no limit.
    pub fn rate_limit(self, rate: Rate) -> Self {
        self.with_rate_limit(RateLimitLayer::new(rate))
    }

    /// Picks endpoints by this policy instead of [`PowerOfTwo`](portcullis_balance::PowerOfTwo).
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
        self.upstream.discovery = layer;
        self
    }

    /// Replaces the balance layer, to set more than its policy.
    pub fn with_balance(mut self, layer: BalanceLayer<Arc<dyn Pick>>) -> Self {
        self.upstream.balance = layer;
        self
    }

    /// Replaces the circuit-break layer. It guards each endpoint by itself.
    pub fn with_circuit_break(mut self, layer: CircuitBreakLayer) -> Self {
        self.upstream.circuit_break = layer;
        self
    }

    /// Replaces what sends requests on.
    pub fn with_forward(mut self, forward: Forward) -> Self {
        self.upstream.forward = forward;
        self
    }

    /// Sends requests for this service its own way, instead of by the layers that serve all others.
    pub fn service(mut self, name: &str, upstream: Upstream) -> Self {
        self.upstreams.insert(name.into(), upstream);
        self
    }

    /// Leaves the matched [`Route`](portcullis_core::Route) in the extensions of responses, for logs and metrics. Default
    /// no; it costs what one value costs there.
    pub fn leaves_route(mut self, yes: bool) -> Self {
        self.leaves_route = yes;
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
        let (gateway, services) = self.put_together()?;
        for (discovery, service) in gateway.discoveries.iter().zip(services) {
            discovery.follow(service.as_str());
        }
        Ok(gateway)
    }

    /// What is wrong with single routes, by their place in the order they were put in, each beside those before it.
    /// Nothing is built.
    #[must_use]
    pub fn misfits(&self) -> Vec<(usize, Error)> {
        let mut misfits = Misfits::new();
        let routes = self.routes.iter().map(|(pattern, route)| (pattern.clone(), route.matches.clone(), ()));
        Router::of_those_that_fit(routes.collect(), &mut misfits);
        let wrong = |(index, (pattern, route)): (usize, &(String, Route))| Some((index, self.wrong(pattern, route)?));
        misfits.extend(self.routes.iter().enumerate().filter_map(wrong));
        misfits.into_iter().collect()
    }

    /// What is wrong with a route alone.
    fn wrong(&self, pattern: &str, route: &Route) -> Option<Error> {
        let asks = || route.policy::<portcullis_auth::Policy>().is_some_and(|policy| policy.asks());
        if self.auth.is_none() && asks() {
            return Some(Error::new(format!("the route {pattern:?} asks who is calling, and there is no way to tell")));
        }
        let passes = route.policy::<portcullis_forward::Policy>().is_some_and(|policy| policy.passes_paths());
        if pattern.starts_with('/')
            && let Some(what) = unmatched(pattern, passes)
        {
            return Some(Error { what, unmatched: true });
        }
        route.check().err().map(|Error { what, .. }| Error::new(format!("the route {pattern:?}: {what}")))
    }

    /// A gateway that follows nothing yet, and the service that each of its discoveries is for.
    fn put_together(self) -> Result<(Gateway, Vec<Destination>), Error> {
        if self.routes.is_empty() {
            return Err(Error::new("no routes"));
        }
        if let Some(wrong) = self.routes.iter().find_map(|(pattern, route)| self.wrong(pattern, route)) {
            return Err(wrong);
        }
        let auth = self.auth.unwrap_or_else(|| AuthLayer::new(Nobody.shared()).policy(portcullis_auth::Policy::none()));
        let rate_limit = self.rate_limit.unwrap_or_else(|| {
            let layer = RateLimitLayer::new(Rate::per_second(NonZeroU32::MIN));
            layer.handle().set_limits([]);
            layer
        });
        let stack = {
            let ways = Passed::new(Where::RateLimit, Ways::new(&self.upstream, &self.upstreams));
            auth.layer(Passed::new(Where::Auth, rate_limit.layer(ways)))
        };
        let services: Vec<Destination> = self.routes.iter().flat_map(|(_, route)| route.services()).cloned().collect();
        let of = |service: &Destination| &self.upstreams.get(service.name()).unwrap_or(&self.upstream).discovery;
        let discoveries = services.iter().map(of).cloned().collect();
        let routes = self.routes.into_iter().map(|(pattern, route)| {
            let target = route.target(&pattern);
            (pattern, route.matches, target)
        });
        let gateway = Gateway {
            routes: Arc::new(Router::new(routes.collect())?),
            clock: self.clock,
            leaves_route: self.leaves_route,
            discoveries,
            stack,
        };
        Ok((gateway, services))
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
        Self { what: what.into(), unmatched: false }
    }

    /// Whether a pattern is one that no request matches.
    #[must_use]
    pub const fn is_unmatched(&self) -> bool {
        self.unmatched
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Error {}
