//! What a route may ask of [`Forward`](crate::Forward).

use std::fmt;
use std::time::Duration;

use http::header::{HeaderName, HeaderValue};

/// How requests of a route are sent on. A value that is not set falls back to the [`Forward`](crate::Forward)'s own, and
/// that to the default in the table of the crate's documentation. [`Duration::MAX`] switches a timeout off.
///
/// ```
/// use std::time::Duration;
/// use portcullis_core::Route;
/// use portcullis_forward::Policy;
///
/// let route = Route::new("/api/{*rest}")
///     .with_policy(Policy::new().strip_prefix("/api").response_timeout(Duration::from_secs(60)));
/// ```
#[derive(Clone, Debug, Default)]
pub struct Policy {
    pub(crate) connect_timeout: Option<Duration>,
    pub(crate) response_timeout: Option<Duration>,
    pub(crate) attempt_timeout: Option<Duration>,
    pub(crate) total_timeout: Option<Duration>,
    pub(crate) idle_timeout: Option<Duration>,
    pub(crate) paths: Option<Paths>,
    pub(crate) tunnels: Option<bool>,
    pub(crate) host: Option<Host>,
    pub(crate) strip: Option<Box<str>>,
    pub(crate) prepend: Option<Box<str>>,
    pub(crate) request_limit: Option<u64>,
    pub(crate) response_limit: Option<u64>,
    pub(crate) request: Vec<Edit>,
    pub(crate) response: Vec<Edit>,
}

/// What becomes of a path that is not in [normal form](portcullis_core::is_normal_path).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Paths {
    /// 400.
    #[default]
    Refuse,
    /// 308 to the normal form; 400 if there is none.
    Redirect,
    /// It is sent as it came. Who decides by the path and who serves it may then read it differently.
    Pass,
}

/// The `Host` or `:authority` that the upstream sees.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Host {
    /// What the caller asked for.
    #[default]
    Keep,
    /// The endpoint's address.
    Endpoint,
    /// This one.
    Fixed(HeaderValue),
}

/// One change to the fields of a message.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Edit {
    /// Replaces all fields of that name.
    Set(HeaderName, HeaderValue),
    /// Adds a field beside those of that name.
    Add(HeaderName, HeaderValue),
    /// Removes all fields of that name.
    Remove(HeaderName),
}

/// A route's policy over the default.
pub(crate) struct Merged<'a> {
    pub(crate) route: Option<&'a Policy>,
    pub(crate) default: &'a Policy,
}

// === impl Policy ===

impl Policy {
    /// Asks for nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How long it may take to have a connection: waiting for one, looking the name up, connecting, TLS.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = Some(timeout);
        self
    }

    /// How long the upstream may take from the end of the request to the head of its response.
    #[must_use]
    pub fn response_timeout(mut self, timeout: Duration) -> Self {
        self.response_timeout = Some(timeout);
        self
    }

    /// How long it may take from the call to the head of the response, connecting and uploading included. A
    /// [`HeadDeadline`](portcullis_core::HeadDeadline) that is earlier counts instead.
    #[must_use]
    pub fn attempt_timeout(mut self, timeout: Duration) -> Self {
        self.attempt_timeout = Some(timeout);
        self
    }

    /// How long it may take from the call to the end of the response. A [`Deadline`](portcullis_core::Deadline) or a
    /// `grpc-timeout` that is earlier counts instead. Of a request that is attempted again each attempt has that long;
    /// a `Deadline` is for all of them.
    #[must_use]
    pub fn total_timeout(mut self, timeout: Duration) -> Self {
        self.total_timeout = Some(timeout);
        self
    }

    /// How long a body may stand still, in either direction; also how long an upgraded connection may.
    #[must_use]
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle_timeout = Some(timeout);
        self
    }

    /// What becomes of a path that is not in normal form.
    #[must_use]
    pub fn paths(mut self, paths: Paths) -> Self {
        self.paths = Some(paths);
        self
    }

    /// Whether it [passes](Paths::Pass) paths as they came.
    #[must_use]
    pub fn passes_paths(&self) -> bool {
        self.paths == Some(Paths::Pass)
    }

    /// Whether `CONNECT` opens a tunnel (RFC 9110 §9.3.6), which leads to the endpoint, whatever authority the caller
    /// named: bytes go both ways until both sides have closed or nothing moved for the idle timeout. What they are no
    /// layer sees, but of a stream of HTTP/2, which the server may leave to the bodies. Default no: 405.
    #[must_use]
    pub fn tunnels(mut self, tunnels: bool) -> Self {
        self.tunnels = Some(tunnels);
        self
    }

    /// The `Host` or `:authority` that the upstream sees.
    #[must_use]
    pub fn host(mut self, host: Host) -> Self {
        self.host = Some(host);
        self
    }

    /// Removes this from the beginning of the path if it ends there or at a `/`: `/api` is removed from `/api/x` and
    /// `/api`, not from `/apiary`. The upstream is told by `X-Forwarded-Prefix`.
    #[must_use]
    pub fn strip_prefix(mut self, prefix: &str) -> Self {
        let prefix = prefix.trim_end_matches('/');
        self.strip = (!prefix.is_empty()).then(|| prefix.into());
        self
    }

    /// Puts this before the path, after [`strip_prefix`](Self::strip_prefix) took its part away. What is no path makes
    /// every request of the route fail with 500.
    #[must_use]
    pub fn add_prefix(mut self, prefix: &str) -> Self {
        let prefix = prefix.trim_end_matches('/');
        self.prepend = (!prefix.is_empty()).then(|| prefix.into());
        self
    }

    /// The largest request body in bytes; a larger one is refused with 413, before a byte is sent if its length is known.
    #[must_use]
    pub fn request_limit(mut self, bytes: u64) -> Self {
        self.request_limit = Some(bytes);
        self
    }

    /// The largest response body in bytes. If a larger one is announced the caller gets 502; if it only turns out to be
    /// larger, it is broken off.
    #[must_use]
    pub fn response_limit(mut self, bytes: u64) -> Self {
        self.response_limit = Some(bytes);
        self
    }

    /// Changes the request's fields, in order, before it is sent. `Host`, framing and what belongs to the connection
    /// are not this policy's to change.
    #[must_use]
    pub fn edit_request(mut self, edit: Edit) -> Self {
        self.request.push(edit);
        self
    }

    /// Changes the response's fields, in order, before it is returned.
    #[must_use]
    pub fn edit_response(mut self, edit: Edit) -> Self {
        self.response.push(edit);
        self
    }
}

// === impl Merged ===

impl Merged<'_> {
    pub(crate) fn pick<T>(&self, field: impl Fn(&Policy) -> Option<T>) -> Option<T> {
        self.route.and_then(&field).or_else(|| field(self.default))
    }

    pub(crate) fn time(&self, field: impl Fn(&Policy) -> Option<Duration>) -> Option<Duration> {
        self.pick(field)
    }

    pub(crate) fn paths(&self) -> Paths {
        self.pick(|policy| policy.paths).unwrap_or_default()
    }

    pub(crate) fn tunnels(&self) -> bool {
        self.pick(|policy| policy.tunnels).unwrap_or_default()
    }

    pub(crate) fn host(&self) -> &Host {
        self.route.and_then(|policy| policy.host.as_ref()).or(self.default.host.as_ref()).unwrap_or(&Host::Keep)
    }

    pub(crate) fn request_limit(&self) -> Option<u64> {
        self.pick(|policy| policy.request_limit)
    }

    pub(crate) fn response_limit(&self) -> Option<u64> {
        self.pick(|policy| policy.response_limit)
    }

    pub(crate) fn strip(&self) -> Option<&str> {
        self.route.and_then(|policy| policy.strip.as_deref()).or(self.default.strip.as_deref())
    }

    pub(crate) fn prepend(&self) -> Option<&str> {
        self.route.and_then(|policy| policy.prepend.as_deref()).or(self.default.prepend.as_deref())
    }

    /// The default's edits, then the route's.
    pub(crate) fn request_edits(&self) -> impl Iterator<Item = &[Edit]> {
        [Some(self.default), self.route].into_iter().flatten().map(|policy| &*policy.request)
    }

    pub(crate) fn response_edits(&self) -> impl Iterator<Item = &[Edit]> {
        [Some(self.default), self.route].into_iter().flatten().map(|policy| &*policy.response)
    }
}

// === impl Edit ===

/// Values may be secrets; only names are shown.
impl fmt::Debug for Edit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, name) = match self {
            Self::Set(name, _) => ("Set", name),
            Self::Add(name, _) => ("Add", name),
            Self::Remove(name) => ("Remove", name),
        };
        f.debug_tuple(word).field(name).finish_non_exhaustive()
    }
}
