//! Where requests go, and what is asked of them on the way.

use std::any::Any;
use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, StatusCode};
use portcullis_core::{Destination, Route as Matched};
use portcullis_forward::Edit;

use super::Error;
use super::answer::{Cors, Fixed, Redirect};
use super::matches::{Is, Matches};

/// Where the requests of a pattern go, and the policies with which they override the layers' defaults.
///
/// ```
/// use http::Method;
/// use portcullis::auth;
/// use portcullis::gateway::Route;
///
/// let route = Route::to("orders").method(Method::GET).auth(auth::Policy::required().scopes_all(["orders:read"]));
/// ```
#[derive(Clone, Debug)]
pub struct Route {
    pub(super) matches: Matches,
    pub(super) action: Action,
    pub(super) timeout: Option<Duration>,
    cors: Option<Cors>,
    name: Option<String>,
    policies: Matched,
    /// How endpoints of single services are tried.
    own: Vec<(Destination, portcullis_balance::Policy)>,
    /// How long requests to single services may take.
    times: Vec<(Destination, Duration)>,
    edits: Vec<Edit>,
}

/// What becomes of a request.
#[derive(Clone, Debug)]
pub(super) enum Action {
    Send(Split),
    Redirect(Redirect),
    Respond(Fixed),
}

/// Services and their shares.
#[derive(Clone, Debug)]
pub(super) struct Split {
    services: Vec<Part>,
}

/// A service and its share.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) service: Destination,
    /// The sum of the weights up to it.
    sum: u64,
    /// The route as its requests have it, where that is not as those of others have it.
    pub(super) route: Option<Matched>,
    /// How long its requests may take.
    pub(super) timeout: Option<Duration>,
}

/// A route in the router.
#[derive(Clone)]
pub(super) struct Target {
    pub(super) route: Matched,
    pub(super) action: Action,
    pub(super) timeout: Option<Duration>,
    pub(super) cors: Option<Cors>,
    /// Of answers of the gateway's own.
    pub(super) edits: Vec<Edit>,
}

// === impl Route ===

impl Route {
    /// Sends requests to the service of that name, whatever their method.
    #[must_use]
    pub fn to(service: &str) -> Self {
        Self::split([(service, 1)])
    }

    /// Sends requests to one of these services, by weight and at random.
    #[must_use]
    pub fn split<'a>(services: impl IntoIterator<Item = (&'a str, u32)>) -> Self {
        let mut sum = 0;
        let mut add = |(service, weight): (&str, u32)| {
            sum += u64::from(weight);
            Part { service: Destination::new(service), sum, route: None, timeout: None }
        };
        Self::new(Action::Send(Split { services: services.into_iter().map(&mut add).collect() }))
    }

    /// Sends callers elsewhere. The gateway answers by itself, before anybody is asked who they are.
    #[must_use]
    pub fn redirect(redirect: Redirect) -> Self {
        Self::new(Action::Redirect(redirect))
    }

    /// Always answers the same. The gateway does so by itself, before anybody is asked who they are.
    #[must_use]
    pub fn respond(status: StatusCode, content_type: HeaderValue, body: impl Into<Bytes>) -> Self {
        Self::new(Action::Respond(Fixed { status, content_type, body: body.into() }))
    }

    fn new(action: Action) -> Self {
        let (matches, policies) = (Matches::default(), Matched::new(""));
        let (own, times, edits) = (Vec::new(), Vec::new(), Vec::new());
        Self { matches, action, timeout: None, cors: None, name: None, policies, own, times, edits }
    }

    /// Is called so in logs and metrics, and where limits are counted for each route, instead of by what it takes: its
    /// pattern, such as `/orders/{id}`, behind the methods and hosts it names, such as `GET,POST a.example/orders/{id}`.
    /// Routes of one name are counted as one, which those are that differ in headers, query or dialect alone.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        self.name = Some(name.to_owned());
        self
    }

    /// Takes requests for this host, and for no other that is not named as well: `api.example.com`, or `*.example.com`
    /// for all below it. Case, port and a final dot do not matter.
    #[must_use]
    pub fn host(mut self, host: &str) -> Self {
        self.matches.hosts.push(host.to_owned());
        self
    }

    /// Takes requests of which this header is so.
    #[must_use]
    pub fn header(mut self, name: HeaderName, is: Is) -> Self {
        self.matches.headers.push((name, is));
        self
    }

    /// Takes requests of which this query parameter is so, when decoded.
    #[must_use]
    pub fn query(mut self, name: &str, is: Is) -> Self {
        self.matches.query.push((name.to_owned(), is));
        self
    }

    /// Takes gRPC calls alone. The pattern of a service is `/package.Service/{method}`.
    #[must_use]
    pub fn grpc(mut self) -> Self {
        self.matches.grpc = true;
        self.method(Method::POST)
    }

    /// Lets pages of other origins call.
    #[must_use]
    pub fn cors(mut self, cors: Cors) -> Self {
        self.cors = Some(cors);
        self
    }

    /// Takes this method, and no other that is not named as well. `GET` takes `HEAD` along.
    #[must_use]
    pub fn method(mut self, method: Method) -> Self {
        if method == Method::GET {
            self.matches.methods.push(Method::HEAD);
        }
        self.matches.methods.push(method);
        self
    }

    /// Ends what takes longer, other attempts and the body included: with 504 before the head of the answer is out, after
    /// that by breaking its body off (gRPC: with `DEADLINE_EXCEEDED` in the trailers). By default nothing but the caller's
    /// own deadline ends a request.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Ends what takes longer at one of its services, as [`timeout`](Self::timeout) does for all of them; of the
    /// two the shorter counts.
    #[must_use]
    pub fn timeout_of(mut self, service: &str, timeout: Duration) -> Self {
        self.times.push((Destination::new(service), timeout));
        self
    }

    /// What is asked of callers.
    #[must_use]
    pub fn auth(self, policy: portcullis_auth::Policy) -> Self {
        self.with_policy(policy)
    }

    /// How often callers may come here, instead of the gateway's own limits; counted for this route by itself.
    #[must_use]
    pub fn rate_limit(self, policy: portcullis_rate_limit::Policy) -> Self {
        self.with_policy(policy)
    }

    /// How endpoints are tried.
    #[must_use]
    pub fn balance(self, policy: portcullis_balance::Policy) -> Self {
        self.with_policy(policy)
    }

    /// How endpoints of one of its services are tried, instead of as [`balance`](Self::balance) says.
    #[must_use]
    pub fn balance_of(mut self, service: &str, policy: portcullis_balance::Policy) -> Self {
        self.own.push((Destination::new(service), policy));
        self
    }

    /// Changes the fields of a [redirect](Self::redirect) or a [fixed answer](Self::respond). Those of what services answer
    /// are changed by what [sends](Self::forward) requests.
    #[must_use]
    pub fn edit_answer(mut self, edit: Edit) -> Self {
        self.edits.push(edit);
        self
    }

    /// How requests are sent and shaped.
    #[must_use]
    pub fn forward(self, policy: portcullis_forward::Policy) -> Self {
        self.with_policy(policy)
    }

    /// A policy for a layer of one's own, which finds it with [`portcullis_core::Route::policy`].
    #[must_use]
    pub fn with_policy<P: Any + Send + Sync>(mut self, policy: P) -> Self {
        self.policies = self.policies.with_policy(policy);
        self
    }

    /// What it is called where requests that match `pattern` go there.
    #[must_use]
    pub fn name(&self, pattern: &str) -> String {
        if let Some(name) = &self.name {
            return name.clone();
        }
        let Matches { hosts, methods, grpc, .. } = &self.matches;
        let said = |method: &&Method| match **method {
            Method::HEAD => !methods.contains(&Method::GET),
            Method::POST => !grpc,
            _ => true,
        };
        // In one order, whatever that of a file.
        let methods: BTreeSet<&str> = methods.iter().filter(said).map(Method::as_str).collect();
        let hosts: BTreeSet<&str> = hosts.iter().map(String::as_str).collect();
        let list = |words: BTreeSet<&str>| words.into_iter().collect::<Vec<_>>().join(",");
        let space = if methods.is_empty() { "" } else { " " };
        format!("{}{space}{}{pattern}", list(methods), list(hosts))
    }

    pub(super) fn target(&self, pattern: &str) -> Target {
        let route = self.policies.clone().named(self.name(pattern));
        let mut action = self.action.clone();
        if let Action::Send(split) = &mut action {
            for (service, policy) in &self.own {
                for part in split.services.iter_mut().filter(|part| part.service == *service) {
                    part.route = Some(route.clone().with_policy(policy.clone()));
                }
            }
            for (service, timeout) in &self.times {
                for part in split.services.iter_mut().filter(|part| part.service == *service) {
                    part.timeout = Some(*timeout);
                }
            }
        }
        Target { route, action, timeout: self.timeout, cors: self.cors.clone(), edits: self.edits.clone() }
    }

    /// The services requests may go to.
    pub(super) fn services(&self) -> impl Iterator<Item = &Destination> {
        let split = match &self.action {
            Action::Send(split) => Some(split),
            Action::Redirect(_) | Action::Respond(_) => None,
        };
        split.into_iter().flat_map(|split| split.services.iter().map(|part| &part.service))
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        self.cors.as_ref().map_or(Ok(()), Cors::check)?;
        let mut own = self.own.iter().map(|(service, _)| service).chain(self.times.iter().map(|(service, _)| service));
        if let Some(other) = own.find(|own| self.services().all(|service| service != *own)) {
            return Err(Error::new(format!("it says something of {:?} and does not lead there", other.as_str())));
        }
        match &self.action {
            Action::Send(split) if split.sum() == 0 => Err(Error::new("a route to services without a weight")),
            Action::Send(_) | Action::Respond(_) => Ok(()),
            Action::Redirect(redirect) => redirect.check(),
        }
    }

    pub(super) fn policy<P: Any + Send + Sync>(&self) -> Option<&P> {
        self.policies.policy()
    }
}

// === impl Split ===

impl Split {
    fn sum(&self) -> u64 {
        self.services.last().map_or(0, |part| part.sum)
    }

    /// The service of one request; `random` is below any bound it is given.
    pub(super) fn pick(&self, random: impl FnOnce(u64) -> u64) -> Option<&Part> {
        let drawn = if self.services.len() > 1 { random(self.sum()) } else { 0 };
        self.services.iter().find(|part| drawn < part.sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_split_by_weight() {
        let Action::Send(split) = Route::split([("a", 3), ("none", 0), ("b", 1)]).action else { unreachable!() };
        let picked: Vec<_> = (0..4).map(|drawn| split.pick(|_| drawn).unwrap().service.as_str()).collect();
        assert_eq!(picked, ["a", "a", "a", "b"]);
        assert!(Route::split([("a", 0), ("b", 0)]).check().is_err());
        assert!(Route::split([]).check().is_err());
    }

    /// Limits are counted by it: they were one for all that have a pattern.
    #[test]
    fn routes_that_take_other_hosts_or_methods_have_names_of_their_own() {
        let route = || Route::to("a");
        for (route, name) in [
            (route(), "/orders/{id}"),
            (route().host("b.example").host("*.a.example"), "*.a.example,b.example/orders/{id}"),
            (route().method(Method::POST).method(Method::GET), "GET,POST /orders/{id}"),
            (route().method(Method::HEAD), "HEAD /orders/{id}"),
            (route().method(Method::PUT).host("a.example"), "PUT a.example/orders/{id}"),
            (route().grpc(), "/orders/{id}"),
            (route().method(Method::PUT).host("a.example").named("put"), "put"),
        ] {
            assert_eq!(route.name("/orders/{id}"), name);
            assert_eq!(&**route.target("/orders/{id}").route.name(), name);
        }
    }

    #[test]
    fn what_is_said_of_one_service_is_said_of_one_it_leads_to() {
        let policy = portcullis_balance::Policy::new();
        let route = Route::split([("a", 1), ("b", 1)]).balance_of("a", policy.clone()).timeout_of("b", Duration::ZERO);
        assert!(route.check().is_ok());
        for wrong in [route.clone().balance_of("c", policy), route.timeout_of("c", Duration::ZERO)] {
            assert!(wrong.check().unwrap_err().to_string().contains("\"c\""));
        }
    }
}
