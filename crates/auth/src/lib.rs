//! Lets callers pass who prove who they are, says who that is, and refuses the rest.
//!
//! * **Reads** the credentials in the request's headers, the [`PeerTls`](portcullis_core::PeerTls) and
//!   [`PeerAddress`](portcullis_core::PeerAddress) the server left, and the [`Policy`] of the
//!   [`Route`].
//! * **Writes** the [`Identity`]; takes the credentials it accepted out, unless told to pass them on; writes
//!   the [identity headers](IdentityHeaders) it was told to.
//! * **Refuses** with 401 who shows nothing or what does not hold, with 403 who must not, with 400 what cannot be read, with
//!   429 an address that failed too often, with 503 while it cannot be told. Challenges are
//!   [RFC 6750](https://www.rfc-editor.org/rfc/rfc6750)'s; gRPC callers get 16, 7, 8 or 14 in headers only.
//! * **Alone** it needs nothing: without a route its own policy holds, without a peer address failures are not limited, and
//!   without peer certificates no proof succeeds that wants one.
//! * **Cost**: a remembered token is hashed once and its identity shared, without a lock or an allocation besides the
//!   travelling value: a quarter of a microsecond for the whole layer. One that is not remembered costs its signature and
//!   1.5 µs; refusing garbage 0.2 to 0.9 µs, 8 KB of it included. `cargo bench -p portcullis-auth` measures them all.
//!
//! ```
//! use std::convert::Infallible;
//!
//! use bytes::Bytes;
//! use http::{Request, Response, StatusCode};
//! use http_body_util::Empty;
//! use jsonwebtoken::{EncodingKey, Header, encode};
//! use portcullis_auth::{Algorithm, AuthLayer, Jwt, KeySet, Policy};
//! use portcullis_core::{Carried, Identity};
//! use tower::{Layer, ServiceExt, service_fn};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let secret = "a secret of at least 32 bytes ...";
//! let jwt = Jwt::new(KeySet::hmac(Algorithm::HS256, secret)?).issuer("https://id.example/").audience("orders");
//! let layer = AuthLayer::new(jwt).policy(Policy::required().scopes_all(["orders:read"]));
//!
//! let orders = layer.layer(service_fn(|request: Request<()>| async move {
//!     assert_eq!(Identity::of(request.extensions()).unwrap().subject(), "ada");
//!     Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
//! }));
//!
//! let claims = serde_json::json!({
//!     "iss": "https://id.example/", "aud": "orders", "sub": "ada", "scope": "orders:read", "exp": 4_000_000_000_u64,
//! });
//! let token = encode(&Header::default(), &claims, &EncodingKey::from_secret(secret.as_bytes()))?;
//! let admitted = Request::builder().header("authorization", format!("Bearer {token}")).body(())?;
//! assert_eq!(orders.clone().oneshot(admitted).await?.status(), StatusCode::OK);
//!
//! let refused = orders.oneshot(Request::new(())).await?;
//! assert_eq!(refused.status(), StatusCode::UNAUTHORIZED);
//! assert_eq!(refused.headers()["www-authenticate"], "Bearer");
//! # Ok(())
//! # }
//! ```
//!
//! # The idea
//!
//! A proof is anything that implements [`Authenticate`]: [`Jwt`], [`ApiKey`], [`Basic`], [`ClientCertificate`], a closure
//! that returns a future, and [any](Authenticate::or) or [all](Authenticate::and) of several. It sees the head of a request
//! and answers at once, or later where it has to ask somebody; only then is there a future to box and a clone of the inner
//! service to keep. Proof and policy are apart: the proof says who is calling, the [`Policy`] of the layer or of the route
//! says what that is worth.
//!
//! What a token's header says only chooses among keys; each key was bound to one algorithm when it was loaded, and an
//! issuer's tokens are only ever checked with that issuer's keys. Everything is read strictly, before the signature where
//! that is cheap: one authorization field, three parts of canonical base64url, JSON without duplicate members, of bounded
//! size and depth, no more than 32 members in the header, and every claim of its proper type. Headers such as `jwk`, `jku` or `x5c` are not looked at. A token
//! bound to a certificate ([RFC 8705](https://www.rfc-editor.org/rfc/rfc8705)) must come with it, one bound in another way
//! (`cnf.jkt`) is refused, since here it would pass for one that is not bound.
//!
//! # What is on, and why
//!
//! | setting | default | why |
//! |---|---|---|
//! | [policy](AuthLayer::policy) | required | a route nobody thought of is closed |
//! | [credentials passed on](AuthLayer::forward_credentials) | no | nobody behind can use them elsewhere |
//! | [identity headers](AuthLayer::identity_headers) | none | names are the user's; their aliases are always removed first, from trailers too |
//! | [CORS preflight](AuthLayer::preflight) | asked as any request | whether its answer tells something is the user's to know |
//! | [issuer](Jwt::issuer), [audience](Jwt::audience) | none | only the user knows them; a token with `aud` is refused until one is named, as [RFC 7519](https://www.rfc-editor.org/rfc/rfc7519#section-4.1.3) demands |
//! | `exp` | required | a token without end cannot be taken back; [insecure to waive](Jwt::insecure_without_expiry) |
//! | `nbf`, `iat` | checked where present | they cost nothing |
//! | [leeway](Jwt::leeway) | [60 s](DEFAULT_LEEWAY), at most [5 min](MAX_LEEWAY) | clocks differ, though not by more |
//! | [`typ`](Jwt::typ) | absent, `JWT` or `at+jwt` | logout, DPoP and other tokens are not for access; [`at+jwt` alone](Jwt::access_tokens_only) on request |
//! | `crit`, `b64`, `zip` | refused | no extension is implemented |
//! | [token size](Jwt::max_token_bytes) | [8 KiB](DEFAULT_MAX_TOKEN_BYTES) | what servers take as a header line |
//! | keys | RSA ≥ 2048 bits, HMAC ≥ its hash, no ROCA, no private halves | [RFC 7518](https://www.rfc-editor.org/rfc/rfc7518#section-3), CVE-2017-15361 |
//! | [verified tokens](Jwt::cache_bytes) | remembered, [8 MiB](DEFAULT_CACHE_BYTES) | never past expiry, their key or the rules |
//! | failures of an address, with [tokens](Jwt::failures_per_address), [API keys](ApiKey::failures_per_address) or [passwords](Basic::failures_per_address) | [100](DEFAULT_FAILURE_BURST) at once, one more each [50 ms](DEFAULT_FAILURE_INTERVAL) | garbage buys less than a thousandth of a core, and nobody guesses fast |
//! | [fetched keys](KeySource) | for `Cache-Control`'s time within [30 s](MIN_LIFETIME) to [1 h](MAX_LIFETIME), else [5 min](DEFAULT_LIFETIME) | rotations are seen, providers spared |
//! | [unknown `kid`](KeySource::cooldown) | one fetch each [30 s](DEFAULT_COOLDOWN) | a rotation to another `kid` is seen at once, and a flood of names is not one of fetches; new keys under an old `kid`, or none, are seen when the set is fetched next |
//! | [stale keys](KeySource::max_stale) | used for [a day](DEFAULT_MAX_STALE) | a provider that is down takes nobody with it |
//!
//! # When something fails
//!
//! | what | the request gets |
//! |---|---|
//! | provider down, hanging, or answering errors, HTML, too much, a redirect, or keys of which none can be used | the last keys go on being used, up to their age |
//! | an empty key set (`{"keys": []}`), from a provider or in a file | 401, until there are keys again: see below |
//! | keys too old, or none read yet | waits a second at most, then 503 |
//! | unknown key while the provider fails | 503, as a new token may well be good |
//! | unknown key otherwise | waits a second at most for one fetch, then 401; 503 if that is not over by then |
//! | unknown key of a token that names another issuer than the [one wanted](Jwt::issuer) | 401 at once, without a fetch |
//! | one key of a set cannot be used | tokens of the others pass; the log says which was left out |
//! | two keys with one `kid` and algorithm | neither is used |
//! | an identity header's value cannot stand in a header | that header is left out |
//! | a stream's token expires midway | the stream goes on: who was let in stays until the end of the call |
//! | a claim's predicate cannot read the claims | 403 |
//!
//! # Decisions
//!
//! * **Signatures are checked by aws-lc directly**, with keys prepared once: jsonwebtoken boxes a verifier and parses the key
//!   again for each call, checks neither `crit` nor `typ`, and lets claims of the wrong type pass. It reads PEM here, and
//!   serves the tests as an oracle. No process-wide provider is ever asked for.
//! * **A token is remembered by a 128-bit GHASH** of the whole of it, under a random key and the version of the rules. It is
//!   universal rather than one-way, which is what a table needs whose hashes never leave; HMAC would cost four times as much.
//! * **What verifies is not limited**: attempts are paid for before the signature and paid back once everything held, so
//!   that replaying an expired token buys no more than garbage does.
//! * **An empty key set is believed.** It is how an issuer takes leaked keys back, and a forged token would be accepted for a
//!   day otherwise. A provider that publishes one by mistake has its callers refused, and the keys it publishes next are seen
//!   with the first token they signed, within two [cooldowns](DEFAULT_COOLDOWN).
//! * **Invalid credentials are refused where they are optional.** Who shows a token means to be somebody.
//! * **Without a peer address nobody is limited**, with a warning, once: one bucket for all would let one caller lock out the
//!   rest.
//! * **Text of a refusal goes to the caller** and names the rule that failed, never a value.
//!
//! # Vectors
//!
//! | [Wycheproof](https://github.com/C2SP/wycheproof) | decided as marked |
//! |---|---|
//! | `json_web_key_test` | 26 of 26 |
//! | `json_web_crypto_test` | all 49 signatures; its 34 encrypted tokens are refused |
//! | `json_web_signature_test` | 397 of 401, ES512 among them |
//!
//! * **372, 373** are marked valid, with a `?` within the header or the payload and a signature over the text without it.
//!   They are refused: [RFC 7515](https://www.rfc-editor.org/rfc/rfc7515#section-5.2) §5.2 allows no additional
//!   characters, and whoever skips them reads another token than whoever does not.
//! * **367, 370** are marked invalid and are, byte for byte, vector 357, which is marked valid. They are accepted with it.
//! * **346, 347, 350, 351** name PS256 in the key and PS384 in the token, or in the key ES521, which does not exist. Loaded as
//!   they stand such keys verify nothing of the kind, since a key has the one algorithm it names; the 397 count them as
//!   [bound by their user](KeySet::from_jwk) to the right one.
//!
//! The examples of RFC 7515 (A.1 to A.3, A.5), RFC 7520 (4.1 to 4.4) and RFC 8037 (A.4) are tests as well, and jsonwebtoken is an
//! oracle: nothing it refuses is accepted.
//!
//! # What it does not do
//!
//! Log people in, keep sessions, introspect opaque tokens, decrypt tokens, prove possession by DPoP, hash passwords slowly,
//! or read a certificate that a proxy says it has seen. A token cannot be taken back before it expires, save with its key.
//! It does not protect an upstream that can be reached past it.

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
pub use cache::CacheStats;
pub use certificate::ClientCertificate;
pub use claims::{DEFAULT_LEEWAY, MAX_LEEWAY};
pub use error::Error;
pub use jwt::{DEFAULT_CACHE_BYTES, DEFAULT_MAX_TOKEN_BYTES, Jwt, Verifying};
pub use key_set::{KeySet, MAX_KEYS};
pub use key_source::{
    DEFAULT_COOLDOWN, DEFAULT_LIFETIME, DEFAULT_MAX_STALE, FILE_INTERVAL, KeySource, MAX_DOCUMENT_BYTES, MAX_LIFETIME,
    MIN_LIFETIME,
};
pub use limit::{DEFAULT_FAILURE_BURST, DEFAULT_FAILURE_INTERVAL};
pub use policy::Policy;
pub use refresh::Freshness;
pub use refusal::Refusals;
pub use secret::{ApiKey, Basic, MAX_SECRET_BYTES, MIN_API_KEY_BYTES};
pub use upstream::IdentityHeaders;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use http::{HeaderName, Method, Request, Response, header};
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

    /// Passes the credentials on with the request, marked as sensitive. By default they are taken out once they were accepted, so that nobody
    /// behind can use them elsewhere. Requests that nobody is asked about ([`Policy::none`], preflights) keep theirs.
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

    /// Names the `realm` in `Bearer` challenges, by default none; [`Basic`] has the one it was made with.
    #[must_use]
    pub fn realm(self, realm: &str) -> Self {
        self.change(|settings| settings.challenges.realm(realm))
    }

    /// Names the document that says where tokens for this service come from
    /// ([RFC 9728](https://www.rfc-editor.org/rfc/rfc9728)) in `Bearer` challenges.
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
            self.settings.identity_headers.strip(&mut request);
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
        self.identity_headers.strip(request);
        if let Some(identity) = identity {
            if self.forward_credentials {
                // Whoever prints the headers from here on, or compresses them, shall leave these out.
                let headers = request.headers_mut().iter_mut();
                headers
                    .filter(|(name, _)| self.carriers.contains(name))
                    .for_each(|(_, value)| value.set_sensitive(true));
            } else {
                self.carriers.iter().for_each(|carrier| drop(request.headers_mut().remove(carrier)));
            }
            self.identity_headers.write(&identity, request.headers_mut());
            identity.attach(request.extensions_mut());
        }
        Ok(())
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
