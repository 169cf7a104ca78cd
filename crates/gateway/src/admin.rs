//! The operator's side: is it alive, is it ready, what does it do, and (where the file allows it) what should it do.

mod metrics;
mod view;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use portcullis::circuit_break::Mode;
use portcullis::serve::Incoming;
use serde_json::Value as Json;
use subtle::ConstantTimeEq;
use tower_service::Service;

use crate::state::State;

/// The page: its parts by path, what each is, and what is in it. Nothing of it comes from elsewhere.
const PAGE: [(&str, &str, &str); 4] = [
    ("/", "text/html; charset=utf-8", include_str!("admin/page/index.html")),
    ("/page.css", "text/css; charset=utf-8", include_str!("admin/page/page.css")),
    ("/page.js", "text/javascript; charset=utf-8", include_str!("admin/page/page.js")),
    ("/chart.js", "text/javascript; charset=utf-8", include_str!("admin/page/chart.js")),
];
/// What the page may do: show what is here, and ask here.
const POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src data:; connect-src 'self'; frame-ancestors 'none'; \
     base-uri 'none'; form-action 'none'",
);
/// The largest order.
const LARGEST: usize = 16 * 1024;

/// Answers operators.
#[derive(Clone)]
pub(crate) struct Admin {
    state: Arc<State>,
    /// Whether only this machine reaches it.
    local: bool,
}

type Answer = Response<Full<Bytes>>;

// === impl Admin ===

impl Admin {
    pub(crate) fn new(state: Arc<State>, address: SocketAddr) -> Self {
        Self { state, local: address.ip().is_loopback() }
    }

    async fn answer(self, request: Request<Incoming>) -> Answer {
        if self.local && !names_this_machine(&request) {
            // A page whose name was made to point here must not read what is here.
            return text(StatusCode::FORBIDDEN, "ask for it by localhost or an address\n");
        }
        let path = request.uri().path().to_owned();
        match (request.method(), path.as_str()) {
            (&Method::GET | &Method::HEAD, path) => self.show(path),
            (&Method::POST, "/reload" | "/drain" | "/breaker" | "/log" | "/register" | "/deregister") => {
                match self.leave(&request) {
                    Ok(()) => self.change(&path, request).await,
                    Err(refusal) => refusal,
                }
            }
            (&Method::POST, _) => text(StatusCode::NOT_FOUND, "nothing here\n"),
            _ => text(StatusCode::METHOD_NOT_ALLOWED, "GET or POST\n"),
        }
    }

    fn show(&self, path: &str) -> Answer {
        if let Some((_, kind, body)) = PAGE.iter().find(|(at, ..)| *at == path) {
            let mut page = answer(StatusCode::OK, kind, *body);
            page.headers_mut().insert(header::CONTENT_SECURITY_POLICY, POLICY);
            return page;
        }
        match path {
            "/live" => text(StatusCode::OK, "live\n"),
            "/ready" => match self.state.not_ready() {
                None => text(StatusCode::OK, "ready\n"),
                Some(why) => text(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")),
            },
            "/metrics" if !self.state.running().config.metrics.enabled => {
                text(StatusCode::NOT_FOUND, "the file says metrics.enabled = false\n")
            }
            "/metrics" => {
                answer(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", metrics::text(&self.state))
            }
            "/config" => json(StatusCode::OK, &self.state.running().config.masked()),
            "/endpoints" => json(StatusCode::OK, &view::services(&self.state)),
            // For the page, every second: as short as it can be.
            "/state" => answer(StatusCode::OK, "application/json", view::state(&self.state).to_string()),
            _ => text(StatusCode::NOT_FOUND, "nothing here; see / /live /ready /metrics /config /endpoints /state\n"),
        }
    }

    /// Whether the caller may change things.
    #[expect(clippy::result_large_err, reason = "it is the answer")]
    fn leave(&self, request: &Request<Incoming>) -> Result<(), Answer> {
        let running = self.state.running();
        let admin = &running.config.admin;
        if !admin.writable {
            return Err(text(StatusCode::FORBIDDEN, "read only: the file does not say admin.writable = true\n"));
        }
        if admin.token.is_some() || !self.local {
            let shown = request.headers().get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
            let shown = shown.and_then(|shown| shown.strip_prefix(b"Bearer "));
            let both = shown.zip(admin.token.as_ref());
            if !both.is_some_and(|(shown, token)| shown.ct_eq(token.reveal().as_bytes()).into()) {
                let mut refusal = text(StatusCode::UNAUTHORIZED, "a token is needed\n");
                refusal.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
                return Err(refusal);
            }
        }
        // A page from elsewhere can send a form here, but cannot hide where it comes from.
        let host = request.headers().get(header::HOST).map_or(&b""[..], HeaderValue::as_bytes);
        let origin = request.headers().get(header::ORIGIN).map(HeaderValue::as_bytes);
        let of = |origin: &[u8]| {
            let rest = origin.strip_prefix(b"http://").or(origin.strip_prefix(b"https://"));
            rest.is_some_and(|rest| rest == host)
        };
        if origin.is_some_and(|origin| !of(origin)) {
            return Err(text(StatusCode::FORBIDDEN, "not for pages from elsewhere\n"));
        }
        Ok(())
    }

    async fn change(&self, what: &str, request: Request<Incoming>) -> Answer {
        let Ok(body) = Limited::new(request.into_body(), LARGEST).collect().await.map(|body| body.to_bytes()) else {
            return text(StatusCode::BAD_REQUEST, "the order did not arrive\n");
        };
        let order: Json = match serde_json::from_slice(&body) {
            Ok(order) => order,
            Err(_) if body.is_empty() => Json::Null,
            Err(error) => return text(StatusCode::BAD_REQUEST, format!("not JSON: {error}\n")),
        };
        match what {
            "/reload" => match self.state.reload().await {
                Ok(said) => text(StatusCode::OK, said + "\n"),
                Err(why) => text(StatusCode::UNPROCESSABLE_ENTITY, why + "\n"),
            },
            "/drain" => {
                self.state.stop();
                text(StatusCode::ACCEPTED, "draining\n")
            }
            "/register" | "/deregister" => match crate::members::order(&self.state, what, &order).await {
                Ok(said) => text(StatusCode::OK, said + "\n"),
                Err((status, why)) => text(status, why + "\n"),
            },
            "/log" => match order["level"].as_str() {
                Some(level) if crate::log::change(level) => {
                    self.state.telemetry.event("log", format!("the level is {level}"));
                    text(StatusCode::OK, "changed\n")
                }
                _ => text(StatusCode::BAD_REQUEST, "want {\"level\": \"debug\"}\n"),
            },
            _ => self.force(&order),
        }
    }

    fn force(&self, order: &Json) -> Answer {
        let mode = match order["state"].as_str() {
            Some("open") => Some(Mode::ForcedOpen),
            Some("closed") => Some(Mode::ForcedClosed),
            Some("auto") => None,
            _ => {
                let want = "want {\"service\": …, \"endpoint\": … or nothing for all, \"state\": \"open\", \"closed\" or \"auto\"}\n";
                return text(StatusCode::BAD_REQUEST, want);
            }
        };
        let running = self.state.running();
        let Some(service) = order["service"].as_str().and_then(|name| running.services.get(name)) else {
            return text(StatusCode::NOT_FOUND, "there is no such service\n");
        };
        let of = if order["endpoint"].is_null() {
            service.force_all(mode);
            String::from("all endpoints")
        } else {
            let endpoints = service.endpoints();
            let mut all = endpoints.iter().flat_map(|endpoints| endpoints.iter());
            let Some(endpoint) = all.find(|endpoint| order["endpoint"] == *endpoint.id().as_ref()) else {
                return text(StatusCode::NOT_FOUND, "there is no such endpoint\n");
            };
            service.force(endpoint, mode);
            endpoint.id().to_string()
        };
        let said = format!("{} {of}: {}", service.name, order["state"].as_str().unwrap_or_default());
        self.state.telemetry.event("by hand", said);
        text(StatusCode::OK, "done\n")
    }
}

impl Service<Request<Incoming>> for Admin {
    type Response = Answer;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Answer, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Incoming>) -> Self::Future {
        let admin = self.clone();
        Box::pin(async move { Ok(admin.answer(request).await) })
    }
}

/// Whether the request is for an address or for `localhost`, not for a name that somebody else may own.
fn names_this_machine(request: &Request<Incoming>) -> bool {
    let field = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    let Some(host) = request.uri().authority().map(http::uri::Authority::as_str).or(field) else { return true };
    is_local(host)
}

fn is_local(host: &str) -> bool {
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => host.split_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<std::net::IpAddr>().is_ok()
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    answer(status, "text/plain; charset=utf-8", body)
}

fn json(status: StatusCode, body: &Json) -> Answer {
    answer(status, "application/json", format!("{body:#}\n"))
}

fn answer(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_may_be_somebody_elses_are_not_local() {
        for host in ["localhost", "LOCALHOST:9901", "127.0.0.1:9901", "127.0.0.1", "[::1]:9901", "[::1]"] {
            assert!(is_local(host), "{host}");
        }
        for host in ["evil.example", "evil.example:9901", "localhost.evil.example", "127.0.0.1.evil.example:80", ""] {
            assert!(!is_local(host), "{host}");
        }
    }
}
