//! Decides who is calling, or refuses.

mod algorithm;
mod authenticate;
mod cache;
mod certificate;
mod claims;
mod error;
#[cfg(feature = "fetch")]
mod fetch;
mod json;
mod jwt;
mod key;
mod key_set;
mod key_source;
mod limit;
mod policy;
mod refresh;
mod refusal;
mod secret;
mod token;
mod upstream;

pub use algorithm::Algorithm;
pub use authenticate::{And, Attempt, Authenticate, Both, Denied, Head, Or, Scheme, SharedAuthenticate, SharedFuture};
pub use certificate::ClientCertificate;
pub use claims::{DEFAULT_LEEWAY, MAX_LEEWAY};
pub use error::Error;
pub use jwt::{
    DEFAULT_CACHE_BYTES, DEFAULT_FAILURE_BURST, DEFAULT_FAILURE_INTERVAL, DEFAULT_MAX_TOKEN_BYTES, Jwt, Verifying,
};
pub use key_set::{KeySet, MAX_KEYS};
pub use key_source::{
    DEFAULT_COOLDOWN, DEFAULT_LIFETIME, DEFAULT_MAX_STALE, FILE_INTERVAL, KeySource, MAX_DOCUMENT_BYTES, MAX_LIFETIME,
    MIN_LIFETIME,
};
pub use policy::Policy;
pub use refresh::Freshness;
pub use secret::{ApiKey, Basic, MAX_SECRET_BYTES, MIN_API_KEY_BYTES};
pub use upstream::IdentityHeaders;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use http::{HeaderName, Method, Request, Response, StatusCode, header};
use pin_project_lite::pin_project;
use portcullis_core::{Body, Carried, Dialect, Identity, Rejection, Route};
use tower_layer::Layer;
use tower_service::Service;

use crate::policy::Mode;
use crate::refusal::Challenges;

/// Applies [`Auth`]. All services made from one layer share its proof, with what that remembers.
#[derive(Clone, Debug)]
pub struct AuthLayer<A> {
    authenticate: Arc<A>,
    settings: Arc<Settings>,
}

/// Lets known callers pass, and says who they are.
#[derive(Debug)]
pub struct Auth<S, A> {
    inner: S,
    authenticate: Arc<A>,
    settings: Arc<Settings>,
}

#[derive(Clone, Debug)]
struct Settings {
    policy: Policy,
    challenges: Challenges,
    /// Headers in which callers show credentials.
    carriers: Vec<HeaderName>,
    forward_credentials: bool,
    preflight: bool,
    identity_headers: IdentityHeaders,
    refusals: Arc<Refusals>,
}

/// How many requests a layer refused, and why. A handle that stays true.
#[derive(Debug, Default)]
pub struct Refusals {
    unauthenticated: AtomicU64,
    forbidden: AtomicU64,
    malformed: AtomicU64,
    limited: AtomicU64,
    undecided: AtomicU64,
}

pin_project! {
    /// The response of the service, or a refusal.
    pub struct ResponseFuture<S, F, B>
    where
        S: Service<Request<B>>,
    {
        #[pin]
        state: State<S, F, B, S::Future>,
    }
}

pin_project! {
    #[project = Project]
    enum State<S, F, B, R> {
        Proving { #[pin] proof: F, call: Option<Box<Call<S, B>>> },
        Calling { #[pin] response: R },
        Refused { refusal: Option<(Rejection, Dialect)> },
    }
}

/// What is to be done once the caller is known.
struct Call<S, B> {
    ready: S,
    request: Request<B>,
    settings: Arc<Settings>,
    dialect: Dialect,
}

// === impl AuthLayer ===

impl<A: Authenticate> AuthLayer<A> {
    /// Wants every caller to be accepted by `authenticate`.
    #[must_use]
    pub fn new(authenticate: A) -> Self {
        let schemes = authenticate.schemes();
        let carriers = schemes.iter().filter_map(|scheme| scheme.carrier.clone()).collect();
        let settings = Settings {
            policy: Policy::required(),
            challenges: Challenges::new(schemes),
            carriers,
            forward_credentials: false,
            preflight: false,
            identity_headers: IdentityHeaders::new(),
            refusals: Arc::default(),
        };
        Self { authenticate: Arc::new(authenticate), settings: Arc::new(settings) }
    }
}

impl<A> AuthLayer<A> {
    /// What is asked of callers where the route does not say: [`Policy::required`] by default.
    #[must_use]
    pub fn policy(self, policy: Policy) -> Self {
        self.change(|settings| settings.policy = policy)
    }

    /// Passes the credentials on with the request. By default they are taken out once they were accepted, so that nobody
    /// behind can use them elsewhere.
    #[must_use]
    pub fn forward_credentials(self, forward: bool) -> Self {
        self.change(|settings| settings.forward_credentials = forward)
    }

    /// Tells the upstream who is calling in headers; by default in none.
    #[must_use]
    pub fn identity_headers(self, headers: IdentityHeaders) -> Self {
        self.change(|settings| settings.identity_headers = headers)
    }

    /// How many requests were refused so far, by all services made from this layer.
    #[must_use]
    pub fn refusals(&self) -> Arc<Refusals> {
        self.settings.refusals.clone()
    }

    /// Lets CORS preflights pass, which browsers send without credentials: `OPTIONS` with `Origin` and
    /// `Access-Control-Request-Method`. Off by default; the answer must not depend on who asks.
    #[must_use]
    pub fn preflight(self, pass: bool) -> Self {
        self.change(|settings| settings.preflight = pass)
    }

    /// Names the `realm` in challenges.
    #[must_use]
    pub fn realm(self, realm: &str) -> Self {
        self.change(|settings| settings.challenges.realm(realm))
    }

    /// Names the document that says where tokens for this service come from
    /// ([RFC 9728](https://www.rfc-editor.org/rfc/rfc9728)) in challenges.
    #[must_use]
    pub fn resource_metadata(self, url: &str) -> Self {
        self.change(|settings| settings.challenges.resource_metadata(url))
    }

    fn change(mut self, change: impl FnOnce(&mut Settings)) -> Self {
        change(Arc::make_mut(&mut self.settings));
        self
    }
}

impl<S, A> Layer<S> for AuthLayer<A> {
    type Service = Auth<S, A>;

    fn layer(&self, inner: S) -> Auth<S, A> {
        Auth { inner, authenticate: self.authenticate.clone(), settings: self.settings.clone() }
    }
}

// === impl Auth ===

impl<S: Clone, A> Clone for Auth<S, A> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), authenticate: self.authenticate.clone(), settings: self.settings.clone() }
    }
}

impl<S, A, B, R> Service<Request<B>> for Auth<S, A>
where
    S: Service<Request<B>, Response = Response<R>> + Clone,
    A: Authenticate,
{
    type Response = Response<Body<R>>;
    type Error = S::Error;
    type Future = ResponseFuture<S, A::Future, B>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let mode = self.settings.policy_for(&request).mode;
        if mode == Mode::None || self.settings.preflight && is_preflight(&request) {
            self.settings.identity_headers.strip(request.headers_mut());
            return ResponseFuture { state: State::Calling { response: self.inner.call(request) } };
        }
        let state = match self.authenticate.authenticate(&Head::of(&request)) {
            Attempt::Now(result) => match self.settings.settle(&mut request, result) {
                Ok(()) => State::Calling { response: self.inner.call(request) },
                Err(rejection) => {
                    let dialect = Dialect::of(request.headers());
                    State::Refused { refusal: Some((rejection, dialect)) }
                }
            },
            Attempt::Later(proof) => {
                let not_ready = self.inner.clone();
                let ready = std::mem::replace(&mut self.inner, not_ready);
                let dialect = Dialect::of(request.headers());
                let call = Call { ready, request, settings: self.settings.clone(), dialect };
                State::Proving { proof, call: Some(Box::new(call)) }
            }
        };
        ResponseFuture { state }
    }
}

fn is_preflight<B>(request: &Request<B>) -> bool {
    request.method() == Method::OPTIONS
        && request.headers().contains_key(header::ORIGIN)
        && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

// === impl Settings ===

impl Settings {
    fn policy_for<'a, B>(&'a self, request: &'a Request<B>) -> &'a Policy {
        Route::of(request.extensions()).and_then(Route::policy::<Policy>).unwrap_or(&self.policy)
    }

    /// Writes who is calling into the request, or says why it must not pass.
    fn settle<B>(&self, request: &mut Request<B>, result: Result<Identity, Denied>) -> Result<(), Rejection> {
        let policy = self.policy_for(request);
        let outcome = match result {
            Ok(identity) => match policy.admits(&identity) {
                Ok(()) => Ok(Some(identity)),
                Err(scopes) => Err(self.challenges.insufficient(scopes)),
            },
            Err(denied) if denied.is_missing() && policy.mode == Mode::Optional => Ok(None),
            Err(denied) => Err(self.challenges.denied(&denied)),
        };
        let identity = outcome.inspect_err(|rejection| self.refusals.count(rejection))?;
        self.identity_headers.strip(request.headers_mut());
        if let Some(identity) = identity {
            if !self.forward_credentials {
                self.carriers.iter().for_each(|carrier| drop(request.headers_mut().remove(carrier)));
            }
            self.identity_headers.write(&identity, request.headers_mut());
            identity.attach(request.extensions_mut());
        }
        Ok(())
    }
}

// === impl Refusals ===

impl Refusals {
    /// No credentials, or such as prove nothing: 401.
    #[must_use]
    pub fn unauthenticated(&self) -> u64 {
        self.unauthenticated.load(Ordering::Relaxed)
    }

    /// Known callers who must not: 403.
    #[must_use]
    pub fn forbidden(&self) -> u64 {
        self.forbidden.load(Ordering::Relaxed)
    }

    /// Credentials that cannot be read: 400.
    #[must_use]
    pub fn malformed(&self) -> u64 {
        self.malformed.load(Ordering::Relaxed)
    }

    /// Addresses that failed too often: 429.
    #[must_use]
    pub fn limited(&self) -> u64 {
        self.limited.load(Ordering::Relaxed)
    }

    /// Callers about whom nothing could be found out: 503.
    #[must_use]
    pub fn undecided(&self) -> u64 {
        self.undecided.load(Ordering::Relaxed)
    }

    fn count(&self, rejection: &Rejection) {
        let counter = match rejection.status() {
            StatusCode::FORBIDDEN => &self.forbidden,
            StatusCode::BAD_REQUEST => &self.malformed,
            StatusCode::TOO_MANY_REQUESTS => &self.limited,
            StatusCode::SERVICE_UNAVAILABLE => &self.undecided,
            _ => &self.unauthenticated,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(
            status = rejection.status().as_u16(),
            reason = rejection.reason(),
            detail = rejection.detail(),
            "refused"
        );
    }
}

// === impl ResponseFuture ===

impl<S, F, B, R> Future for ResponseFuture<S, F, B>
where
    S: Service<Request<B>, Response = Response<R>>,
    F: Future<Output = Result<Identity, Denied>>,
{
    type Output = Result<Response<Body<R>>, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.project().state;
        loop {
            let next = match state.as_mut().project() {
                Project::Proving { proof, call } => {
                    let result = ready!(proof.poll(cx));
                    let Some(call) = call.take() else { return Poll::Pending };
                    let Call { mut ready, mut request, settings, dialect } = *call;
                    match settings.settle(&mut request, result) {
                        Ok(()) => State::Calling { response: ready.call(request) },
                        Err(rejection) => State::Refused { refusal: Some((rejection, dialect)) },
                    }
                }
                Project::Calling { response } => {
                    return Poll::Ready(ready!(response.poll(cx)).map(|response| response.map(Body::new)));
                }
                Project::Refused { refusal } => {
                    let Some((rejection, dialect)) = refusal.take() else { return Poll::Pending };
                    return Poll::Ready(Ok(rejection.into_response(dialect)));
                }
            };
            state.set(next);
        }
    }
}

impl<S, F, B> fmt::Debug for ResponseFuture<S, F, B>
where
    S: Service<Request<B>>,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}
