//! How a caller is refused: RFC 6750's challenges, and the same for gRPC.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use http::{HeaderValue, StatusCode, header};
use portcullis_core::{GrpcCode, Layer, Rejection};

use crate::authenticate::{Denied, Reason, Scheme};

/// The challenges of one layer, for every way of proving oneself.
#[derive(Clone, Debug, Default)]
pub(crate) struct Challenges {
    schemes: Vec<Scheme>,
    realm: Option<String>,
    resource_metadata: Option<String>,
    /// What a caller without credentials gets, made once.
    bare: Arc<[HeaderValue]>,
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

// === impl Challenges ===

impl Challenges {
    pub(crate) fn new(schemes: Vec<Scheme>) -> Self {
        let mut challenges = Self { schemes, ..Self::default() };
        challenges.prepare();
        challenges
    }

    pub(crate) fn realm(&mut self, realm: &str) {
        self.realm = Some(quotable(realm));
        self.prepare();
    }

    pub(crate) fn resource_metadata(&mut self, url: &str) {
        self.resource_metadata = Some(quotable(url));
        self.prepare();
    }

    fn prepare(&mut self) {
        self.bare = self.schemes.iter().filter_map(|scheme| self.challenge(scheme, &[])).collect();
    }

    fn challenge(&self, scheme: &Scheme, more: &[(&str, &str)]) -> Option<HeaderValue> {
        let mut text = String::with_capacity(128);
        text.push_str(&scheme.name);
        let mut separator = ' ';
        if !scheme.parameters.is_empty() {
            text.push(separator);
            text.push_str(&scheme.parameters);
            separator = ',';
        }
        let bearer = scheme.name == "Bearer";
        let realm = self.realm.as_deref().filter(|_| bearer).map(|realm| ("realm", realm));
        let metadata = self.resource_metadata.as_deref().filter(|_| bearer).map(|url| ("resource_metadata", url));
        for (name, value) in realm.into_iter().chain(more.iter().copied().filter(|_| bearer)).chain(metadata) {
            text.push(separator);
            separator = ',';
            text.push_str(name);
            text.push_str("=\"");
            text.push_str(value);
            text.push('"');
        }
        HeaderValue::try_from(text).ok()
    }

    fn with_challenges(&self, mut rejection: Rejection, more: &[(&str, &str)]) -> Rejection {
        for value in self.schemes.iter().filter_map(|scheme| self.challenge(scheme, more)) {
            rejection = rejection.with_header(header::WWW_AUTHENTICATE, value);
        }
        rejection
    }

    /// The refusal of a caller whose proof did not succeed.
    pub(crate) fn denied(&self, denied: &Denied) -> Rejection {
        let refuse = |status, reason| Rejection::new(Layer::Auth, status, reason);
        match denied.0 {
            Reason::Missing => {
                let rejection = refuse(StatusCode::UNAUTHORIZED, "no-credentials");
                self.bare
                    .iter()
                    .fold(rejection, |rejection, value| rejection.with_header(header::WWW_AUTHENTICATE, value.clone()))
            }
            Reason::Malformed(why) => self.with_challenges(
                refuse(StatusCode::BAD_REQUEST, "malformed-credentials")
                    .with_grpc_code(GrpcCode::UNAUTHENTICATED)
                    .with_detail(why),
                &[("error", "invalid_request"), ("error_description", &quotable(why))],
            ),
            Reason::Invalid(why) => self.with_challenges(
                refuse(StatusCode::UNAUTHORIZED, "invalid-credentials").with_detail(why),
                &[("error", "invalid_token"), ("error_description", &quotable(why))],
            ),
            Reason::Forbidden(why) => refuse(StatusCode::FORBIDDEN, "forbidden").with_detail(why),
            Reason::Limited(wait) => {
                refuse(StatusCode::TOO_MANY_REQUESTS, "too-many-failed-attempts").with_retry_after(wait)
            }
            Reason::Unavailable(why) => refuse(StatusCode::SERVICE_UNAVAILABLE, "undecided").with_detail(why),
        }
    }

    /// The refusal of a caller who is known and lacks what the route asks.
    pub(crate) fn insufficient(&self, scopes: Option<String>) -> Rejection {
        let rejection = Rejection::new(Layer::Auth, StatusCode::FORBIDDEN, "insufficient");
        let scopes = scopes.map(|scopes| quotable(&scopes));
        let error = ("error", "insufficient_scope");
        match &scopes {
            Some(scopes) => self.with_challenges(rejection, &[error, ("scope", scopes)]),
            None => self.with_challenges(rejection, &[error]),
        }
    }
}

/// What may stand between quotes in a challenge.
fn quotable(text: &str) -> String {
    text.chars().filter(|c| matches!(c, ' '..='~') && !matches!(c, '"' | '\\')).collect()
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

    pub(crate) fn count(&self, rejection: &Rejection) {
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
