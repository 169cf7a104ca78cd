//! What a proof looks at, and what it says.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::{Extensions, HeaderMap, HeaderName, Method, Request, Uri, header};
use pin_project_lite::pin_project;
use portcullis_core::Identity;

use crate::claims::OTHER_ISSUER;
use crate::limit::Paid;

/// Decides from the head of a request who is calling.
///
/// A proof that needs nothing but the head answers [at once](Attempt::Now) and costs no future; one that has to ask
/// somebody answers [later](Attempt::Later). A closure that returns a future is a proof as well:
///
/// ```
/// use portcullis_auth::{Authenticate, Denied, Head};
/// use portcullis_core::{Identity, Proof};
///
/// fn is_proof(_: impl Authenticate) {}
///
/// is_proof(|head: &Head<'_>| {
///     let badge = head.headers().get("x-badge").cloned();
///     async move {
///         let badge = badge.ok_or_else(Denied::missing)?;
///         // ... ask the badge office ...
///         let name = badge.to_str().map_err(|_| Denied::invalid("the badge is not readable"))?;
///         Ok(Identity::new(name, Proof::Custom("badge")))
///     }
/// });
/// ```
pub trait Authenticate {
    /// The answer, where it takes time.
    type Future: Future<Output = Result<Identity, Denied>>;

    /// Looks at a request.
    fn authenticate(&self, head: &Head<'_>) -> Attempt<Self::Future>;

    /// How callers can prove who they are: what a 401 names, and the header that is not passed on.
    fn schemes(&self) -> Vec<Scheme> {
        vec![Scheme::bearer()]
    }

    /// Accepts callers whom either proof accepts, as soon as one does. The second is asked only if the first does not accept
    /// at once; of two refusals the caller gets the one about credentials that were shown.
    fn or<B: Authenticate>(self, other: B) -> Or<Self, B>
    where
        Self: Sized,
    {
        Or(self, other)
    }

    /// Accepts callers whom both proofs accept, as whom the first says they are. Who shows credentials of one kind and none of
    /// the other has shown [invalid](Denied::invalid) ones, so that they are refused where they are optional, too.
    fn and<B: Authenticate>(self, other: B) -> And<Self, B>
    where
        Self: Sized,
    {
        And(self, other)
    }

    /// The same proof without its type, shared.
    fn shared(self) -> SharedAuthenticate
    where
        Self: Sized + Send + Sync + 'static,
        Self::Future: Send + 'static,
    {
        SharedAuthenticate(Arc::new(self))
    }
}

/// What a proof said.
#[expect(clippy::exhaustive_enums, reason = "now or later, there is no third")]
#[derive(Debug)]
pub enum Attempt<F> {
    /// It is decided.
    Now(Result<Identity, Denied>),
    /// It will be when the future is done.
    Later(F),
}

/// The head of a request, as a proof sees it.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    method: &'a Method,
    uri: &'a Uri,
    headers: &'a HeaderMap,
    extensions: &'a Extensions,
}

/// Why a caller was not accepted.
#[derive(Clone, Debug)]
pub struct Denied(pub(crate) Reason, Vec<Paid>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    Missing,
    Malformed(&'static str),
    Invalid(&'static str),
    Forbidden(&'static str),
    Limited(Duration),
    Unavailable(&'static str),
}

/// A way of proving oneself, as `WWW-Authenticate` names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scheme {
    pub(crate) name: String,
    pub(crate) parameters: String,
    pub(crate) carrier: Option<HeaderName>,
}

/// Either of two proofs; see [`Authenticate::or`].
#[derive(Clone, Copy, Debug)]
pub struct Or<A, B>(A, B);

/// Both of two proofs; see [`Authenticate::and`].
#[derive(Clone, Copy, Debug)]
pub struct And<A, B>(A, B);

pin_project! {
    /// The answer of two proofs, at least one of which takes time.
    pub struct Both<A, B> {
        #[pin]
        first: Side<A>,
        #[pin]
        second: Side<B>,
        all: bool,
    }
}

pin_project! {
    #[project = SideProject]
    enum Side<F> {
        Waiting { #[pin] future: F },
        Done { result: Option<Result<Identity, Denied>> },
    }
}

/// A proof whose type does not show. Cheap to clone; costs an allocation only where the proof takes time.
#[derive(Clone)]
pub struct SharedAuthenticate(Arc<dyn Erased + Send + Sync>);

/// The answer of a [`SharedAuthenticate`] that takes time.
pub type SharedFuture = Pin<Box<dyn Future<Output = Result<Identity, Denied>> + Send>>;

trait Erased {
    fn authenticate(&self, head: &Head<'_>) -> Attempt<SharedFuture>;
    fn schemes(&self) -> Vec<Scheme>;
}

// === impl Authenticate ===

impl<T, F> Authenticate for T
where
    T: Fn(&Head<'_>) -> F,
    F: Future<Output = Result<Identity, Denied>>,
{
    type Future = F;

    fn authenticate(&self, head: &Head<'_>) -> Attempt<F> {
        Attempt::Later(self(head))
    }
}

impl<A: Authenticate + ?Sized> Authenticate for Arc<A> {
    type Future = A::Future;

    fn authenticate(&self, head: &Head<'_>) -> Attempt<A::Future> {
        (**self).authenticate(head)
    }

    fn schemes(&self) -> Vec<Scheme> {
        (**self).schemes()
    }
}

// === impl Head ===

impl<'a> Head<'a> {
    /// The head of `request`.
    #[must_use]
    pub fn of<B>(request: &'a Request<B>) -> Self {
        Self {
            method: request.method(),
            uri: request.uri(),
            headers: request.headers(),
            extensions: request.extensions(),
        }
    }

    /// The method.
    #[must_use]
    pub fn method(&self) -> &'a Method {
        self.method
    }

    /// The target.
    #[must_use]
    pub fn uri(&self) -> &'a Uri {
        self.uri
    }

    /// The headers.
    #[must_use]
    pub fn headers(&self) -> &'a HeaderMap {
        self.headers
    }

    /// What the server and the layers above left.
    #[must_use]
    pub fn extensions(&self) -> &'a Extensions {
        self.extensions
    }
}

// === impl Denied ===

impl Denied {
    /// No credentials of this kind were shown: 401, or passed on where they are optional.
    #[must_use]
    pub fn missing() -> Self {
        Self(Reason::Missing, Vec::new())
    }

    /// Credentials were shown in a way that cannot be read, or twice: 400. `why` goes to the caller.
    #[must_use]
    pub fn malformed(why: &'static str) -> Self {
        Self(Reason::Malformed(why), Vec::new())
    }

    /// The credentials shown prove nothing: 401. `why` goes to the caller.
    #[must_use]
    pub fn invalid(why: &'static str) -> Self {
        Self(Reason::Invalid(why), Vec::new())
    }

    /// The caller is known and must not: 403. `why` goes to the caller.
    #[must_use]
    pub fn forbidden(why: &'static str) -> Self {
        Self(Reason::Forbidden(why), Vec::new())
    }

    /// Too many attempts: 429, with the time after which another is looked at.
    #[must_use]
    pub fn limited(wait: Duration) -> Self {
        Self(Reason::Limited(wait), Vec::new())
    }

    /// It cannot be decided now, through no fault of the caller's: 503. `why` goes to the caller.
    #[must_use]
    pub fn unavailable(why: &'static str) -> Self {
        Self(Reason::Unavailable(why), Vec::new())
    }

    /// The caller's address has paid for it.
    pub(crate) fn paid(mut self, paid: Option<Paid>) -> Self {
        self.1.extend(paid);
        self
    }

    /// What was shown has proved something to another, by `schemes`: the same was no guess here. Where that one looks in one
    /// place only, it is known to be the same.
    fn take_back_for(self, schemes: impl FnOnce() -> Vec<Scheme>) {
        if !self.1.is_empty()
            && let [scheme] = &*schemes()
        {
            self.1.into_iter().filter(|paid| Some(paid.carrier()) == scheme.carrier.as_ref()).for_each(Paid::take_back);
        }
    }

    /// Whether no credentials were shown.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        self.0 == Reason::Missing
    }
}

/// Whatever it cost.
impl PartialEq for Denied {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl Eq for Denied {}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Reason::Missing => f.write_str("no credentials"),
            Reason::Malformed(why) | Reason::Invalid(why) | Reason::Forbidden(why) | Reason::Unavailable(why) => {
                f.write_str(why)
            }
            Reason::Limited(_) => f.write_str("too many failed attempts"),
        }
    }
}

impl std::error::Error for Denied {}

// === impl Scheme ===

impl Scheme {
    /// `Bearer` ([RFC 6750](https://www.rfc-editor.org/rfc/rfc6750)), in `Authorization`.
    #[must_use]
    pub fn bearer() -> Self {
        Self { name: "Bearer".into(), parameters: String::new(), carrier: Some(header::AUTHORIZATION) }
    }

    /// `Basic` ([RFC 7617](https://www.rfc-editor.org/rfc/rfc7617)), in `Authorization`. Quotes and what is no visible
    /// ASCII are left out of `realm`.
    #[must_use]
    pub fn basic(realm: &str) -> Self {
        let realm: String = realm.chars().filter(|c| matches!(c, ' '..='~') && !matches!(c, '"' | '\\')).collect();
        Self {
            name: "Basic".into(),
            parameters: format!("realm=\"{realm}\", charset=\"UTF-8\""),
            carrier: Some(header::AUTHORIZATION),
        }
    }

    /// A secret in a header of its own.
    #[must_use]
    pub fn header(name: HeaderName) -> Self {
        Self { name: "ApiKey".into(), parameters: format!("header=\"{name}\""), carrier: Some(name) }
    }

    /// The connection's client certificate.
    #[must_use]
    pub fn certificate() -> Self {
        Self { name: "Certificate".into(), parameters: String::new(), carrier: None }
    }
}

// === impl Or ===

fn rank(denied: &Denied) -> u8 {
    match denied.0 {
        Reason::Missing => 0,
        Reason::Invalid(OTHER_ISSUER) => 1,
        Reason::Invalid(_) => 2,
        Reason::Malformed(_) => 3,
        Reason::Limited(_) => 4,
        Reason::Unavailable(_) => 5,
        Reason::Forbidden(_) => 6,
    }
}

fn either(first: Result<Identity, Denied>, second: Result<Identity, Denied>) -> Result<Identity, Denied> {
    match (first, second) {
        (Ok(identity), _) | (Err(_), Ok(identity)) => Ok(identity),
        (Err(first), Err(second)) => {
            let (mut told, other) = if rank(&second) > rank(&first) { (second, first) } else { (first, second) };
            told.1.extend(other.1);
            Err(told)
        }
    }
}

fn both(first: Result<Identity, Denied>, second: Result<Identity, Denied>) -> Result<Identity, Denied> {
    match (first, second) {
        (Ok(identity), Ok(_)) => Ok(identity),
        (Err(first), Err(second)) => Err(if first.is_missing() { second } else { first }),
        (Err(denied), Ok(_)) | (Ok(_), Err(denied)) if denied.is_missing() => {
            Err(Denied::invalid("another proof is missing"))
        }
        (Err(denied), Ok(_)) | (Ok(_), Err(denied)) => Err(denied),
    }
}

/// Whether one result decides for both of two proofs, of which one or `all` must hold. A missing one does not: what else was
/// shown tells whether any were.
fn decides(all: bool, result: &Result<Identity, Denied>) -> bool {
    match result {
        Ok(_) => !all,
        Err(denied) => all && !denied.is_missing(),
    }
}

impl<A: Authenticate, B: Authenticate> Authenticate for Or<A, B> {
    type Future = Both<A::Future, B::Future>;

    fn authenticate(&self, head: &Head<'_>) -> Attempt<Self::Future> {
        match self.0.authenticate(head) {
            Attempt::Now(first) if decides(false, &first) => Attempt::Now(first),
            Attempt::Now(Err(denied)) => match self.1.authenticate(head) {
                Attempt::Now(Ok(identity)) => {
                    denied.take_back_for(|| self.1.schemes());
                    Attempt::Now(Ok(identity))
                }
                second => Both::attempt(Attempt::Now(Err(denied)), second, false),
            },
            first => Both::attempt(first, self.1.authenticate(head), false),
        }
    }

    fn schemes(&self) -> Vec<Scheme> {
        distinct(self.0.schemes(), self.1.schemes())
    }
}

// === impl And ===

impl<A: Authenticate, B: Authenticate> Authenticate for And<A, B> {
    type Future = Both<A::Future, B::Future>;

    fn authenticate(&self, head: &Head<'_>) -> Attempt<Self::Future> {
        match self.0.authenticate(head) {
            Attempt::Now(first) if decides(true, &first) => Attempt::Now(first),
            first => Both::attempt(first, self.1.authenticate(head), true),
        }
    }

    fn schemes(&self) -> Vec<Scheme> {
        distinct(self.0.schemes(), self.1.schemes())
    }
}

fn distinct(mut schemes: Vec<Scheme>, more: Vec<Scheme>) -> Vec<Scheme> {
    for scheme in more {
        if !schemes.contains(&scheme) {
            schemes.push(scheme);
        }
    }
    schemes
}

// === impl Both ===

impl<A, B> Both<A, B> {
    fn attempt(first: Attempt<A>, second: Attempt<B>, all: bool) -> Attempt<Self> {
        match (first, second) {
            (Attempt::Now(first), Attempt::Now(second)) => Attempt::Now(Self::joined(all, first, second)),
            (Attempt::Now(one), _) | (_, Attempt::Now(one)) if decides(all, &one) => Attempt::Now(one),
            (first, second) => Attempt::Later(Self { first: first.into(), second: second.into(), all }),
        }
    }

    fn joined(
        all: bool,
        first: Result<Identity, Denied>,
        second: Result<Identity, Denied>,
    ) -> Result<Identity, Denied> {
        if all { both(first, second) } else { either(first, second) }
    }
}

impl<A, B> Future for Both<A, B>
where
    A: Future<Output = Result<Identity, Denied>>,
    B: Future<Output = Result<Identity, Denied>>,
{
    type Output = Result<Identity, Denied>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        // Both are polled, so that neither waits for the other to begin.
        let first = this.first.as_mut().poll_done(*this.all, cx);
        let second = this.second.as_mut().poll_done(*this.all, cx);
        match (first, second) {
            (Poll::Ready(true), _) => return this.first.take(),
            (_, Poll::Ready(true)) => return this.second.take(),
            (Poll::Pending, _) | (_, Poll::Pending) => return Poll::Pending,
            (Poll::Ready(false), Poll::Ready(false)) => {}
        }
        let (first, second) = (ready!(this.first.take()), ready!(this.second.take()));
        Poll::Ready(Self::joined(*this.all, first, second))
    }
}

impl<F: Future<Output = Result<Identity, Denied>>> Side<F> {
    /// Whether this side decides, once it is done.
    fn poll_done(mut self: Pin<&mut Self>, all: bool, cx: &mut Context<'_>) -> Poll<bool> {
        if let SideProject::Waiting { future } = self.as_mut().project() {
            let result = ready!(future.poll(cx));
            self.set(Self::Done { result: Some(result) });
        }
        match self.project() {
            SideProject::Done { result: Some(result) } => Poll::Ready(decides(all, result)),
            _ => Poll::Ready(false),
        }
    }

    fn take(self: Pin<&mut Self>) -> Poll<Result<Identity, Denied>> {
        match self.project() {
            SideProject::Done { result } => result.take().map_or(Poll::Pending, Poll::Ready),
            SideProject::Waiting { .. } => Poll::Pending,
        }
    }
}

impl<F> From<Attempt<F>> for Side<F> {
    fn from(attempt: Attempt<F>) -> Self {
        match attempt {
            Attempt::Now(result) => Self::Done { result: Some(result) },
            Attempt::Later(future) => Self::Waiting { future },
        }
    }
}

impl<A, B> fmt::Debug for Both<A, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Both").finish_non_exhaustive()
    }
}

// === impl SharedAuthenticate ===

impl<A> Erased for A
where
    A: Authenticate,
    A::Future: Send + 'static,
{
    fn authenticate(&self, head: &Head<'_>) -> Attempt<SharedFuture> {
        match Authenticate::authenticate(self, head) {
            Attempt::Now(result) => Attempt::Now(result),
            Attempt::Later(future) => Attempt::Later(Box::pin(future)),
        }
    }

    fn schemes(&self) -> Vec<Scheme> {
        Authenticate::schemes(self)
    }
}

impl Authenticate for SharedAuthenticate {
    type Future = SharedFuture;

    fn authenticate(&self, head: &Head<'_>) -> Attempt<SharedFuture> {
        Erased::authenticate(&*self.0, head)
    }

    fn schemes(&self) -> Vec<Scheme> {
        Erased::schemes(&*self.0)
    }
}

impl fmt::Debug for SharedAuthenticate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedAuthenticate")
    }
}
