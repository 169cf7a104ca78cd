//! What a route answers by itself: redirects, fixed answers, and what pages of other origins may.

use std::time::Duration;

use bytes::Bytes;
use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, CONTENT_TYPE, HOST, LOCATION, ORIGIN, VARY,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri};

use portcullis_forward::Edit;

use super::Error;

/// Sends the caller elsewhere; what is not set stays as the caller asked for it, the query always.
#[derive(Clone, Debug)]
pub struct Redirect {
    status: StatusCode,
    scheme: Option<String>,
    authority: Option<String>,
    path: Option<String>,
}

/// An answer that is always the same.
#[derive(Clone, Debug)]
pub(super) struct Fixed {
    pub(super) status: StatusCode,
    pub(super) content_type: HeaderValue,
    pub(super) body: Bytes,
}

/// Lets pages of other origins call, as browsers ask for it
/// ([CORS](https://fetch.spec.whatwg.org/#http-cors-protocol)).
///
/// A preflight is answered by the route itself, before anybody is asked who they are. An origin that may not gets an answer
/// without leave, which keeps the browser from going on; other callers are not kept from anything by this.
#[derive(Clone, Debug)]
pub struct Cors {
    origins: Option<Vec<HeaderValue>>,
    methods: Vec<Method>,
    headers: Option<Vec<HeaderName>>,
    expose: Vec<HeaderName>,
    credentials: bool,
    max_age: Duration,
}

// === impl Redirect ===

impl Redirect {
    /// A redirect with this status, such as 302 or 308.
    #[must_use]
    pub const fn new(status: StatusCode) -> Self {
        Self { status, scheme: None, authority: None, path: None }
    }

    /// To `http` or `https`.
    #[must_use]
    pub fn scheme(mut self, scheme: &str) -> Self {
        self.scheme = Some(scheme.to_owned());
        self
    }

    /// To another host, with its port if it has one.
    #[must_use]
    pub fn host(mut self, host: &str) -> Self {
        self.authority = Some(host.to_owned());
        self
    }

    /// To another path. It may have a query, which the caller's is added to.
    #[must_use]
    pub fn path(mut self, path: &str) -> Self {
        self.path = Some(path.to_owned());
        self
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        if !self.status.is_redirection() {
            return Err(Error::new(format!("{} is no redirect", self.status)));
        }
        let scheme = self.scheme.as_deref().is_none_or(|scheme| ["http", "https"].contains(&scheme));
        let host = self.authority.as_deref().is_none_or(|host| host.parse::<http::uri::Authority>().is_ok());
        let path = self
            .path
            .as_deref()
            .is_none_or(|path| path.starts_with('/') && !path.contains('#') && path.parse::<Uri>().is_ok());
        if scheme && host && path { Ok(()) } else { Err(Error::new("a redirect to what is no URL")) }
    }

    /// Where to; `None` without a host where one is needed.
    pub(super) fn answer<B, R: Default>(&self, request: &Request<B>) -> Option<Response<R>> {
        let uri = request.uri();
        let asked = || {
            let field = || request.headers().get(HOST).and_then(|host| host.to_str().ok());
            uri.authority().map(http::uri::Authority::as_str).or_else(field)
        };
        let mut to = String::new();
        if self.scheme.is_some() || self.authority.is_some() {
            if let Some(scheme) = &self.scheme {
                to.push_str(scheme);
                to.push(':');
            }
            to.push_str("//");
            match &self.authority {
                Some(authority) => to.push_str(authority),
                // Another scheme is at another port.
                None => to.push_str(
                    asked()?
                        .rsplit_once(':')
                        .filter(|(_, port)| !port.ends_with(']'))
                        .map_or(asked()?, |(host, _)| host),
                ),
            }
        }
        to.push_str(self.path.as_deref().unwrap_or(uri.path()));
        if let Some(query) = uri.query() {
            to.push(if self.path.as_ref().is_some_and(|path| path.contains('?')) { '&' } else { '?' });
            to.push_str(query);
        }
        let mut response = Response::new(R::default());
        *response.status_mut() = self.status;
        response.headers_mut().insert(LOCATION, HeaderValue::try_from(to).ok()?);
        Some(response)
    }
}

// === impl Fixed ===

impl Fixed {
    pub(super) fn answer<R>(&self, body: impl FnOnce(Bytes) -> R) -> Response<R> {
        let mut response = Response::new(body(self.body.clone()));
        *response.status_mut() = self.status;
        if !self.body.is_empty() {
            response.headers_mut().insert(CONTENT_TYPE, self.content_type.clone());
        }
        response
    }
}

/// Changes fields, in order.
pub(super) fn edit(headers: &mut HeaderMap, edits: &[Edit]) {
    for edit in edits {
        match edit {
            Edit::Set(name, value) => drop(headers.insert(name, value.clone())),
            Edit::Add(name, value) => drop(headers.append(name, value.clone())),
            Edit::Remove(name) => drop(headers.remove(name)),
            // There is no other.
            _ => {}
        }
    }
}

// === impl Cors ===

impl Cors {
    /// Lets pages of these origins call, such as `https://app.example.com`; `*` lets all.
    ///
    /// # Errors
    ///
    /// [`Error`] when one cannot stand in a header.
    pub fn new<'a>(origins: impl IntoIterator<Item = &'a str>) -> Result<Self, Error> {
        let origins: Vec<&str> = origins.into_iter().collect();
        let list = || origins.iter().map(|origin| HeaderValue::from_str(origin)).collect::<Result<_, _>>();
        let origins =
            if origins.contains(&"*") { None } else { Some(list().map_err(|_| Error::new("not an origin"))?) };
        Ok(Self {
            origins,
            methods: Vec::new(),
            headers: Some(Vec::new()),
            expose: Vec::new(),
            credentials: false,
            max_age: Duration::from_secs(600),
        })
    }

    /// Methods pages may use, beside `GET`, `HEAD` and `POST`, which need no leave.
    #[must_use]
    pub fn methods(mut self, methods: impl IntoIterator<Item = Method>) -> Self {
        self.methods = methods.into_iter().collect();
        self
    }

    /// Headers pages may send. By default those that need no leave.
    #[must_use]
    pub fn headers(mut self, headers: impl IntoIterator<Item = HeaderName>) -> Self {
        self.headers = Some(headers.into_iter().collect());
        self
    }

    /// Pages may send any header.
    #[must_use]
    pub fn any_header(mut self) -> Self {
        self.headers = None;
        self
    }

    /// Headers of the answer that pages may read, beside the usual ones.
    #[must_use]
    pub fn expose(mut self, headers: impl IntoIterator<Item = HeaderName>) -> Self {
        self.expose = headers.into_iter().collect();
        self
    }

    /// Lets pages send cookies and credentials. Only with origins that are named.
    #[must_use]
    pub fn credentials(mut self, yes: bool) -> Self {
        self.credentials = yes;
        self
    }

    /// How long a browser may remember the answer to a preflight. Default 10 min.
    #[must_use]
    pub fn max_age(mut self, age: Duration) -> Self {
        self.max_age = age;
        self
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        if self.credentials && self.origins.is_none() {
            return Err(Error::new("credentials from every origin: any page could act for whoever looks at it"));
        }
        Ok(())
    }

    /// The method a browser wants to use, if this is a preflight.
    pub(super) fn asked<B>(request: &Request<B>) -> Option<Method> {
        if request.method() != Method::OPTIONS || !request.headers().contains_key(ORIGIN) {
            return None;
        }
        Method::from_bytes(request.headers().get(ACCESS_CONTROL_REQUEST_METHOD)?.as_bytes()).ok()
    }

    /// The answer to a preflight.
    pub(super) fn preflight<B, R: Default>(&self, request: &Request<B>) -> Response<R> {
        let mut response = Response::new(R::default());
        *response.status_mut() = StatusCode::NO_CONTENT;
        let asked = request.headers().get(ACCESS_CONTROL_REQUEST_HEADERS);
        let headers = response.headers_mut();
        self.leave(request.headers().get(ORIGIN), headers);
        if headers.contains_key(ACCESS_CONTROL_ALLOW_ORIGIN) {
            let mut methods = vec!["GET", "HEAD", "POST"];
            methods.extend(self.methods.iter().map(Method::as_str));
            insert(headers, ACCESS_CONTROL_ALLOW_METHODS, &methods);
            match (&self.headers, asked) {
                (None, Some(asked)) => {
                    headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, asked.clone());
                }
                (Some(names), _) => insert(
                    headers,
                    ACCESS_CONTROL_ALLOW_HEADERS,
                    &names.iter().map(HeaderName::as_str).collect::<Vec<_>>(),
                ),
                (None, None) => {}
            }
            headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from(self.max_age.as_secs()));
        }
        headers.append(VARY, HeaderValue::from_static("access-control-request-method, access-control-request-headers"));
        response
    }

    /// Writes what pages of `origin` may do with an answer.
    pub(super) fn leave(&self, origin: Option<&HeaderValue>, headers: &mut HeaderMap) {
        // Whatever the service would allow by itself.
        for name in [ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_EXPOSE_HEADERS] {
            headers.remove(name);
        }
        let Some(allowed) = &self.origins else {
            // Whoever asks, since it may be kept for others.
            headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
            self.expose_to(headers);
            return;
        };
        headers.append(VARY, HeaderValue::from_static("origin"));
        if let Some(origin) = origin.filter(|origin| allowed.contains(origin)) {
            headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
            if self.credentials {
                headers.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
            }
            self.expose_to(headers);
        }
    }

    fn expose_to(&self, headers: &mut HeaderMap) {
        insert(headers, ACCESS_CONTROL_EXPOSE_HEADERS, &self.expose.iter().map(HeaderName::as_str).collect::<Vec<_>>());
    }
}

fn insert(headers: &mut HeaderMap, name: HeaderName, words: &[&str]) {
    if let Ok(value) = HeaderValue::try_from(words.join(", "))
        && !words.is_empty()
    {
        headers.insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(target: &str, headers: &[(&str, &str)]) -> Request<()> {
        let mut request = Request::builder().uri(target);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap()
    }

    #[test]
    fn redirects_change_what_they_are_told_to() {
        let to = |redirect: Redirect, target, host| {
            let response: Response<()> = redirect.answer(&request(target, &[("host", host)])).unwrap();
            response.headers()[LOCATION].to_str().unwrap().to_owned()
        };
        let redirect = || Redirect::new(StatusCode::FOUND);
        assert_eq!(to(redirect().path("/new"), "/old?a=1", "h"), "/new?a=1");
        assert_eq!(to(redirect().path("/new?b=2"), "/old?a=1", "h"), "/new?b=2&a=1");
        assert_eq!(to(redirect().path("/new?b=2"), "/old", "h"), "/new?b=2");
        assert_eq!(to(redirect().scheme("https"), "/a", "h:80"), "https://h/a");
        assert_eq!(to(redirect().scheme("https"), "/a", "[::1]"), "https://[::1]/a");
        assert_eq!(to(redirect().scheme("https"), "/a", "[::1]:80"), "https://[::1]/a");
        assert_eq!(to(redirect().host("b:1"), "/a", "h"), "//b:1/a");
        assert_eq!(to(redirect().scheme("http").host("b").path("/"), "/a", "h"), "http://b/");
        assert!(redirect().scheme("https").answer::<_, ()>(&request("/a", &[])).is_none(), "no host to go to");
        assert!(Redirect::new(StatusCode::OK).check().is_err() && redirect().path("x").check().is_err());
        assert!(redirect().path("/a#b").check().is_err() && redirect().path("/a?b").check().is_ok());
    }

    #[test]
    fn only_origins_that_are_named_get_leave() {
        let cors = Cors::new(["https://a.example"]).unwrap().credentials(true).methods([Method::PUT]);
        let preflight = |origin| {
            let request = request("/", &[("origin", origin), ("access-control-request-method", "PUT")]);
            cors.preflight::<_, ()>(&request).headers().clone()
        };
        let given = preflight("https://a.example");
        assert_eq!(given[ACCESS_CONTROL_ALLOW_ORIGIN], "https://a.example");
        assert_eq!(given[ACCESS_CONTROL_ALLOW_CREDENTIALS], "true");
        assert_eq!(given[ACCESS_CONTROL_ALLOW_METHODS], "GET, HEAD, POST, PUT");
        let refused = preflight("https://a.example.evil");
        assert!(!refused.contains_key(ACCESS_CONTROL_ALLOW_ORIGIN) && refused.contains_key(VARY));
        assert!(Cors::new(["*"]).unwrap().credentials(true).check().is_err());
    }
}
