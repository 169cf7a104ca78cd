//! Which requests go where.

use std::ops::{Deref, Range};
use std::time::Duration;

use http::{HeaderName, HeaderValue, Method, StatusCode};
use portcullis::gateway;
use serde_json::Value as Json;

use super::auth::{AuthMode, RouteAuth};
use super::balance::{Retry, Subset};
use super::by::{Alternatives, HashBy, has_hole};
use super::mistake::Notes;
use super::model::{Config, each_once, known};
use super::plain::{Bytes, Map};
use super::read::{At, Node, Reader, Value};
use super::secret::{HeaderValues, is_telling};
use super::section::{section, shorthand, words};
use super::service::{Timeouts, is_path};

section! {
    /// Which requests go where.
    pub struct Route {
        /// For logs, metrics and limits, instead of what it takes: the path, such as "/a/{id}", behind the methods and hosts
        /// it names, such as "GET,POST a.example/a/{id}". Routes of one name are counted as one.
        name: Option<String>,
        /// Host names, such as "api.example.com" or "*.example.com". Any, by default.
        hosts: Vec<At<String>>,
        /// A path: "/a", with parameters "/a/{id}", with a rest "/a/{*rest}", which also takes "/a" and "/a/". As
        /// callers send it: "/caf%C3%A9", not "/café".
        path: Option<At<String>>,
        /// gRPC: a service, and perhaps a method, instead of a path.
        grpc: Option<Grpc>,
        /// Methods; any, by default. GET takes HEAD along.
        methods: Vec<Method>,
        /// Headers a request must have: a value, or a table that says what of it.
        headers: MatchesByName,
        /// Query parameters a request must have.
        query: MatchesByName,
        /// The service, or several with weights.
        to: Vec<Backend>,
        /// Sends the caller elsewhere instead.
        redirect: Option<Redirect>,
        /// Answers at once instead.
        respond: Option<Respond>,
        /// Takes this from the beginning of the path before it is sent on.
        strip_prefix: Option<At<String>>,
        /// Puts this before the path, after that.
        add_prefix: Option<At<String>>,
        /// The Host that endpoints see, instead of what the service says: "keep", "endpoint" or a name.
        host: Option<At<String>>,
        /// What is asked of callers, instead of the default.
        auth: Option<RouteAuth>,
        /// Names of limits that hold here, instead of the default ones. Each route counts them by itself, also where several
        /// name one limit; those of `limiter.default` count over all routes together. An empty list: none.
        limits: Option<Vec<At<String>>>,
        /// Counts against the default limits as well as against those.
        default_limits: bool = false,
        /// Answers 504 to what takes longer, other attempts included; an answer that has begun by then is broken off.
        timeout: Option<Duration>,
        /// How long single things may take, instead of what the service says.
        timeouts: Timeouts,
        /// How large a request's body may be.
        max_body: Option<Bytes>,
        /// How large a response's body may be.
        max_response: Option<Bytes>,
        /// Opens tunnels for CONNECT, to the endpoint that is picked.
        tunnels: bool = false,
        /// Only these endpoints of the service.
        subset: Option<At<Subset>>,
        /// What becomes of paths that are not in normal form.
        paths: Paths = Paths::Refuse,
        /// Changes to the request's headers.
        request_headers: Edits,
        /// Changes to the response's headers.
        response_headers: Edits,
        /// Lets pages of other origins call.
        cors: Option<Cors>,
        /// When another endpoint is tried, instead of what the service says.
        retry: Option<Retry>,
        /// What of a request decides where it goes, instead of what the service says; its policy must hash.
        hash: Alternatives<HashBy>,
    }
}

section! {
    /// A gRPC service and method.
    pub struct Grpc {
        /// The service with its package, such as "shop.v1.Orders".
        service: At<String>,
        /// The method; all, by default.
        method: Option<At<String>>,
    }
}

shorthand! {
    /// What of a value must be so: text must be equal.
    pub struct Matches(MatchesTable);
    String, |text| MatchesTable { exact: Some(text), prefix: None, present: None }
}

/// What of values must be so, by name. They are not shown where the name says that they are secrets.
#[derive(Clone, Debug, PartialEq)]
pub struct MatchesByName(Map<Matches>);

impl Deref for MatchesByName {
    type Target = Map<Matches>;

    fn deref(&self) -> &Map<Matches> {
        &self.0
    }
}

impl Value for MatchesByName {
    fn read(node: &Node<'_>, reader: &mut Reader<'_>) -> Option<Self> {
        Map::read(node, reader).map(Self)
    }

    fn absent() -> Option<Self> {
        Map::absent().map(Self)
    }

    fn schema() -> Json {
        Map::<Matches>::schema()
    }

    fn show(&self) -> Json {
        let mut shown = self.0.show();
        for (_, matches) in shown.as_object_mut().into_iter().flatten().filter(|(name, _)| is_telling(name)) {
            let texts = matches.as_object_mut().into_iter().flat_map(|keys| keys.values_mut());
            texts.filter(|value| value.is_string()).for_each(|value| *value = "***".into());
        }
        shown
    }
}

section! {
    /// What of a value must be so. Several keys must all hold.
    pub struct MatchesTable {
        /// It is this.
        exact: Option<String>,
        /// It begins so.
        prefix: Option<String>,
        /// Whether it is there at all.
        present: Option<bool>,
    }
}

shorthand! {
    /// A service and its share of a route's requests.
    pub struct Backend(BackendTable);
    At<String>, |service| BackendTable { service, weight: 1 }
}

section! {
    /// A service and its share of a route's requests.
    pub struct BackendTable {
        /// Its name.
        service: At<String>,
        /// Its share, relative to the others.
        weight: u32 = 1,
    }
}

words! {
    /// What becomes of paths that are not in normal form.
    pub enum Paths {
        /// 400.
        Refuse = "refuse",
        /// 308 to the normal form.
        Redirect = "redirect",
        /// As they are.
        Pass = "pass",
    }
}

section! {
    /// Sends the caller elsewhere.
    pub struct Redirect {
        /// The status.
        status: At<u16> = At::of(302),
        /// "http" or "https", instead of the one that was used.
        scheme: Option<At<String>>,
        /// A host, perhaps with a port, instead of the one that was asked for.
        host: Option<At<String>>,
        /// A path, instead of the one that was asked for.
        path: Option<At<String>>,
    }
}

section! {
    /// Answers at once.
    pub struct Respond {
        /// The status.
        status: StatusCode = StatusCode::OK,
        /// The body.
        body: String = String::new(),
        /// What the body is.
        content_type: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8"),
    }
}

section! {
    /// Changes to headers. A value may be a secret from elsewhere: `{ env = "NAME" }` or `{ file = "path" }`.
    pub struct Edits {
        /// Replaces all of that name.
        set: HeaderValues,
        /// Adds one beside those of that name.
        add: HeaderValues,
        /// Removes all of that name.
        remove: Vec<HeaderName>,
    }
}

section! {
    /// Lets pages of other origins call ([the fetch standard](https://fetch.spec.whatwg.org/#http-cors-protocol)).
    pub struct Cors {
        /// Origins, such as `https://app.example.com`, or "*".
        origins: Vec<At<String>>,
        /// Methods, beside those that need no leave.
        methods: Vec<Method>,
        /// Headers a page may send, or "*".
        headers: Vec<String>,
        /// Headers a page may read.
        expose: Vec<HeaderName>,
        /// Lets pages send cookies and credentials. Not with the origin "*".
        credentials: bool = false,
        /// How long a browser may remember the answer.
        max_age: Duration = Duration::from_secs(600),
    }
}

/// Headers of a request that are not a route's to set: whom it is for, how long it is, and what one connection carries.
const OURS: [&str; 8] =
    ["host", "content-length", "transfer-encoding", "connection", "upgrade", "te", "keep-alive", "proxy-connection"];

impl Route {
    /// The path of the requests it takes: a call's, where it names one of gRPC.
    pub(crate) fn pattern(&self) -> Option<String> {
        let grpc =
            |grpc: &Grpc| format!("/{}/{}", *grpc.service, grpc.method.as_ref().map_or("{method}", |method| method));
        self.path.as_ref().map(|path| path.to_string()).or_else(|| self.grpc.as_ref().map(grpc))
    }

    /// What it is called in logs and metrics.
    pub(crate) fn label(&self) -> String {
        crate::build::called(self, gateway::Route::to("")).name(&self.pattern().unwrap_or_default())
    }

    /// Notes what is said of requests that are sent on, where none is.
    fn check_own_answer(&self, span: &Range<usize>, notes: &mut Notes<'_>) {
        let Timeouts { connect, response, total, idle } = &self.timeouts;
        let Edits { set, add, remove } = &self.request_headers;
        for (key, said) in [
            ("strip_prefix", self.strip_prefix.is_some()),
            ("add_prefix", self.add_prefix.is_some()),
            ("host", self.host.is_some()),
            ("timeout", self.timeout.is_some()),
            ("timeouts", [connect, response, total, idle].into_iter().any(Option::is_some)),
            ("max_body", self.max_body.is_some()),
            ("max_response", self.max_response.is_some()),
            ("tunnels", self.tunnels),
            ("subset", self.subset.is_some()),
            ("paths", self.paths != Paths::Refuse),
            ("request_headers", !(set.is_empty() && add.is_empty() && remove.is_empty())),
            ("retry", self.retry.is_some()),
            ("hash", !self.hash.is_empty()),
        ] {
            if said {
                notes.push(span, format!("{key} where nothing is sent on"), "remove it");
            }
        }
    }

    pub(super) fn check(&self, span: &Range<usize>, config: &Config, notes: &mut Notes<'_>) {
        let answers = [!self.to.is_empty(), self.redirect.is_some(), self.respond.is_some()];
        match answers.iter().filter(|&&answer| answer).count() {
            0 => notes.push(span, "the route leads nowhere", "add to = \"<service>\", redirect or respond"),
            1 => {}
            _ => notes.push(span, "the route leads to several things", "keep one of to, redirect and respond"),
        }
        for BackendTable { service, .. } in self.to.iter().map(|backend| &backend.0) {
            known(service, &config.services, "service", notes);
        }
        if self.to.len() > 1 && self.to.iter().all(|backend| backend.0.weight == 0) {
            notes.push(span, "all weights are 0", "give one of them another");
        }
        match (&self.path, &self.grpc) {
            (None, None) => {
                notes.push(span, "the route has no path", "add path = \"/{*rest}\", which takes everything")
            }
            (Some(path), Some(_)) => notes.push(&path.span, "both path and grpc", "keep one of them"),
            (Some(path), None) if !path.starts_with('/') => {
                notes.push(
                    &path.span,
                    format!("{:?} does not begin with a slash", **path),
                    format!("such as \"/{}\"", **path),
                );
            }
            (Some(_), None) => {}
            (None, Some(grpc)) => {
                let names = [Some(&grpc.service), grpc.method.as_ref()];
                for name in names.into_iter().flatten().filter(|name| name.is_empty() || name.contains(['/', '{', '}']))
                {
                    notes.push(&name.span, format!("{:?} is no name", **name), "such as \"shop.v1.Orders\"");
                }
            }
        }
        for host in &self.hosts {
            let name = host.strip_prefix("*.").unwrap_or(host);
            if name.is_empty() || name.contains(['*', ':', '/']) || !name.is_ascii() {
                notes.push(
                    &host.span,
                    format!("{:?} is no host name", **host),
                    "such as \"api.example.com\" or \"*.example.com\", without a port",
                );
            }
        }
        for name in self.headers.keys() {
            header(name, span, notes);
        }
        for edits in [&self.request_headers, &self.response_headers] {
            for (name, value) in edits.set.iter().chain(edits.add.iter()) {
                header(name, span, notes);
                if HeaderValues::value(name, value).is_none() {
                    notes.push(span, format!("the value of {name} cannot stand in a header"), "one line of text");
                }
            }
        }
        for name in self.request_headers.set.iter().chain(self.request_headers.add.iter()).map(|(name, _)| name) {
            if OURS.iter().any(|ours| name.eq_ignore_ascii_case(ours)) {
                let is_host = name.eq_ignore_ascii_case("host");
                let help = if is_host { "use host = \"<name>\"" } else { "remove it" };
                notes.push(span, format!("{name} is not a route's to set"), help);
            }
        }
        each_once(self.limits.as_deref().unwrap_or_default(), &config.limits, "limit", notes);
        for prefix in [&self.strip_prefix, &self.add_prefix].into_iter().flatten() {
            if !prefix.starts_with('/') {
                notes.push(
                    &prefix.span,
                    format!("{:?} does not begin with a slash", **prefix),
                    format!("such as \"/{}\"", **prefix),
                );
            } else if !is_path(prefix) || prefix.contains('?') {
                notes.push(&prefix.span, format!("{:?} is no part of a path", **prefix), "percent-encode it");
            }
        }
        if let Some(auth) = &self.auth {
            for provider in &auth.0.providers {
                known(provider, &config.auth.providers, "provider", notes);
            }
            let wanted = [&auth.0.scopes, &auth.0.any_scope, &auth.0.roles, &auth.0.any_role];
            let wants = wanted.iter().any(|words| !words.is_empty())
                || !auth.0.claims.is_empty()
                || !auth.0.providers.is_empty();
            if auth.0.mode == AuthMode::None && wants {
                notes.push(
                    span,
                    "callers have to be somebody, and nobody is asked who they are",
                    "remove mode = \"none\", or what it wants of callers",
                );
            }
            if auth.0.mode != AuthMode::None && config.auth.providers.is_empty() {
                notes.push(
                    span,
                    "the route asks who is calling, and there is no way to tell",
                    "add [auth.providers.<name>]",
                );
            }
        }
        if self.to.is_empty() {
            let asks = self.auth.as_ref().is_some_and(|auth| auth.0.mode != AuthMode::None);
            if asks || self.limits.as_ref().is_some_and(|limits| !limits.is_empty()) {
                notes.push(
                    span,
                    "redirects and fixed answers are given before anybody is asked or counted",
                    "remove auth and limits",
                );
            }
            if self.redirect.is_some() || self.respond.is_some() {
                self.check_own_answer(span, notes);
            }
        }
        if let Some(subset) = &self.subset {
            subset.check(&subset.span, notes);
            if self.to.len() > 1 {
                notes.push(&subset.span, "a subset of several services", "split what leads to subsets into services");
            }
        }
        if let Some(hash) = self.hash.iter().flatten().next() {
            let mut services = self.to.iter().filter_map(|to| config.services.get(&*to.0.service));
            if services.any(|service| !service.balance.hashes()) {
                notes.push(
                    &hash.span,
                    "a service whose policy does not hash",
                    "give it balance.policy = \"ring-hash\"",
                );
            }
        }
        if has_hole(&self.hash) {
            notes.push(span, "an empty list in hash", "name what to hash by, or remove it");
        }
        if let Some(host) = self.host.as_ref().filter(|host| HeaderValue::from_str(host).is_err()) {
            notes.push(&host.span, format!("{:?} is no host", **host), "\"keep\", \"endpoint\" or a name");
        }
        if self.default_limits && self.limits.is_none() {
            notes.push(span, "the default limits hold here without limits of the route's own", "remove default_limits");
        }
        if let Some(retry) = &self.retry {
            retry.check(notes);
            let budget = retry.budget.as_ref().map(|at| &at.span);
            if let Some(span) = budget.or(retry.budget_per_second.as_ref().map(|at| &at.span)) {
                notes.push(span, "a budget of one route", "say it in the service's retry: its routes share one");
            }
        }
        if let Some(redirect) = &self.redirect {
            redirect.check(notes);
        }
        if let Some(cors) = &self.cors {
            cors.check(span, notes);
        }
    }
}

fn header(name: &str, span: &Range<usize>, notes: &mut Notes<'_>) {
    if name.parse::<http::HeaderName>().is_err() {
        notes.push(span, format!("{name:?} is no name of a header"), "such as \"x-tenant\"");
    }
}

impl Redirect {
    pub(super) fn check(&self, notes: &mut Notes<'_>) {
        if ![301, 302, 303, 307, 308].contains(&*self.status) {
            notes.push(&self.status.span, format!("{} is no redirect", *self.status), "one of 301, 302, 303, 307, 308");
        }
        if let Some(scheme) = self.scheme.as_ref().filter(|scheme| !["http", "https"].contains(&scheme.as_str())) {
            notes.push(&scheme.span, format!("{:?} is no scheme", **scheme), "\"http\" or \"https\"");
        }
        if let Some(host) = self.host.as_ref().filter(|host| host.parse::<http::uri::Authority>().is_err()) {
            notes.push(&host.span, format!("{:?} is no host", **host), "such as \"example.com\"");
        }
        if let Some(path) = self.path.as_ref().filter(|path| !is_path(path) || path.contains('#')) {
            notes.push(&path.span, format!("{:?} is no path", **path), "such as \"/new\"");
        }
    }
}

impl Cors {
    pub(super) fn check(&self, span: &Range<usize>, notes: &mut Notes<'_>) {
        if self.origins.is_empty() {
            notes.push(span, "cors without an origin", "add origins = [\"https://app.example.com\"]");
        }
        for origin in &self.origins {
            if **origin == "*" {
                if self.credentials {
                    notes.push(
                        &origin.span,
                        "every origin, with credentials",
                        "name the origins, or set credentials = false",
                    );
                }
            } else if !origin.contains("://") || origin.ends_with('/') {
                notes.push(
                    &origin.span,
                    format!("{:?} is no origin", **origin),
                    "such as \"https://app.example.com\", without a path",
                );
            }
        }
    }
}
