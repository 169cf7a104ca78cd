//! Whom a request asks, and for what: read, checked and rewritten.

use http::header::{HOST, HeaderValue, LOCATION};
use http::uri::{Authority, PathAndQuery};
use http::{Response, StatusCode, Uri, Version};
use portcullis_core::{Address, Body, Instance, Scheme, is_normal_path, normal_path};

use crate::Paths;
use crate::policy::Merged;
use crate::prepare::{Refusal, refuse};

/// What the request asks of whom, from its target, else from `Host`. `None` only for HTTP/1.0, which need not say.
pub(crate) fn authority(parts: &http::request::Parts) -> Result<Option<HeaderValue>, Refusal> {
    let mut hosts = parts.headers.get_all(HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return refuse(StatusCode::BAD_REQUEST, "host", "more than one Host");
    }
    if let Some(authority) = parts.uri.authority() {
        if authority.as_str().contains('@') {
            return refuse(StatusCode::BAD_REQUEST, "host", "user information in the target");
        }
        // In HTTP/1.1 the target's authority replaces Host; in HTTP/2 two that differ are two requests in one.
        if parts.version == Version::HTTP_2
            && host.is_some_and(|host| !host.as_bytes().eq_ignore_ascii_case(authority.as_str().as_bytes()))
        {
            return refuse(StatusCode::BAD_REQUEST, "host", "Host differs from :authority");
        }
        return Ok(HeaderValue::from_str(authority.as_str()).ok());
    }
    match host {
        Some(host) if host.is_empty() => Ok(None),
        Some(host) if is_plain_host(host.as_bytes()) => Ok(Some(host.clone())),
        Some(host) => match Authority::try_from(host.as_bytes()) {
            Ok(authority) if !authority.as_str().contains('@') => Ok(Some(host.clone())),
            _ => refuse(StatusCode::BAD_REQUEST, "host", "Host is not a host"),
        },
        None if parts.version == Version::HTTP_11 => refuse(StatusCode::BAD_REQUEST, "host", "no Host"),
        None => Ok(None),
    }
}

/// Whether this is a name or an IPv4 address, with a port or without: an authority that need not be parsed.
fn is_plain_host(host: &[u8]) -> bool {
    let end = host.iter().position(|byte| !(byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.')));
    let (name, port) = host.split_at(end.unwrap_or(host.len()));
    let is_port = |port: &[u8]| !port.is_empty() && port.iter().all(u8::is_ascii_digit);
    !name.is_empty() && (port.is_empty() || port.strip_prefix(b":").is_some_and(is_port))
}

pub(crate) fn check_path(uri: &Uri, paths: Paths) -> Result<(), Refusal> {
    let path = uri.path();
    if paths == Paths::Pass || is_normal_path(path) {
        return Ok(());
    }
    if paths == Paths::Redirect
        && let Some(normal) = normal_path(path)
    {
        let location = match uri.query() {
            Some(query) => format!("{normal}?{query}"),
            None => normal.into_owned(),
        };
        if let Ok(location) = HeaderValue::try_from(location) {
            let mut response = Response::new(Body::default());
            *response.status_mut() = StatusCode::PERMANENT_REDIRECT;
            response.headers_mut().insert(LOCATION, location);
            return Err(Refusal::Answer(Box::new(response)));
        }
    }
    refuse(StatusCode::BAD_REQUEST, "path", "the path is not in normal form")
}

pub(crate) struct Rewritten<'a> {
    pub(crate) target: PathAndQuery,
    pub(crate) stripped: Option<&'a str>,
}

/// The target in origin form, with the route's prefixes taken away and added.
pub(crate) fn rewritten<'a>(uri: Uri, policy: &'a Merged<'_>) -> Result<Rewritten<'a>, Refusal> {
    let path = uri.path();
    let mut stripped = None;
    let mut rest = path;
    if let Some(prefix) = policy.strip()
        && let Some(after) = path.strip_prefix(prefix)
        && (after.is_empty() || after.starts_with('/'))
    {
        (rest, stripped) = (after, Some(prefix));
    }
    let prepend = policy.prepend();
    // As that of `http://a?q`.
    let has_no_path = uri.path_and_query().is_some_and(|target| target.as_str().starts_with('?'));
    if stripped.is_none() && prepend.is_none() && !has_no_path {
        let target = uri.into_parts().path_and_query.unwrap_or_else(|| PathAndQuery::from_static("/"));
        return Ok(Rewritten { target, stripped });
    }
    let mut target = String::with_capacity(path.len() + 16);
    target.push_str(prepend.unwrap_or_default());
    target.push_str(if target.is_empty() && rest.is_empty() { "/" } else { rest });
    if let Some(query) = uri.query() {
        target.push('?');
        target.push_str(query);
    }
    match PathAndQuery::try_from(target) {
        Ok(target) if target.as_str().starts_with('/') => Ok(Rewritten { target, stripped }),
        _ => refuse(StatusCode::INTERNAL_SERVER_ERROR, "rewrite", "the route's rewritten path is not a path"),
    }
}

pub(crate) fn host_of(instance: &Instance) -> HeaderValue {
    let text = match &instance.address {
        Address::Unix(_) => "localhost".to_owned(),
        address => {
            let text = address.to_string();
            let default = if instance.scheme == Scheme::Https { ":443" } else { ":80" };
            text.strip_suffix(default).map(str::to_owned).unwrap_or(text)
        }
    };
    HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static("localhost"))
}

/// `http://host:port`, `https://host`, or an address.
pub(crate) fn origin(text: &str) -> Option<Instance> {
    let (scheme, rest) = match text.split_once("://") {
        Some(("http", rest)) => (Scheme::Http, rest),
        Some(("https", rest)) => (Scheme::Https, rest),
        Some(_) => return None,
        None => (Scheme::Http, text),
    };
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    if rest.starts_with("unix:") {
        let mut instance = Instance::new("origin", rest.parse::<Address>().ok()?);
        instance.scheme = scheme;
        return Some(instance);
    }
    instance(rest, scheme)
}

pub(crate) fn instance(authority: &str, scheme: Scheme) -> Option<Instance> {
    let port = if scheme == Scheme::Https { 443 } else { 80 };
    let parsed = Authority::try_from(authority).ok()?;
    if parsed.as_str().contains('@') {
        return None;
    }
    let text = if parsed.port().is_some() { authority.to_owned() } else { format!("{authority}:{port}") };
    let mut instance = Instance::new("origin", text.parse::<Address>().ok()?);
    instance.scheme = scheme;
    Some(instance)
}
