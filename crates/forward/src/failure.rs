//! What went wrong on the way, as the caller is told.

use std::fmt;

use http::StatusCode;
use portcullis_core::{GrpcCode, Layer, Rejection, Side};

/// Why a request was not answered by the upstream.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) kind: Kind,
    /// Whether part of the request may have reached the upstream.
    pub(crate) sent: bool,
    /// For logs; never for the caller.
    pub(crate) cause: Option<std::sync::Arc<str>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Connect,
    Tls,
    ConnectTimeout,
    /// Too many wait for a connection, or it waited for too long while all were in use.
    Exhausted,
    /// The connection broke before the head of the response had arrived.
    Reset,
    /// What arrived was no HTTP.
    Malformed,
    /// 101 though nobody asked, or to another protocol than asked for.
    Switched,
    ResponseTimeout,
    Deadline,
    /// The same, while it waited for a connection and all were in use.
    DeadlineInLine,
    RequestTooLarge,
    RequestIdle,
    RequestBroken,
    ResponseTooLarge,
    /// The request cannot be said in the endpoint's protocol.
    Unsendable,
}

// === impl Failure ===

impl Failure {
    pub(crate) fn unsent(kind: Kind) -> Self {
        Self { kind, sent: false, cause: None }
    }

    pub(crate) fn sent(kind: Kind) -> Self {
        Self { kind, sent: true, cause: None }
    }

    pub(crate) fn because(mut self, cause: &dyn fmt::Display) -> Self {
        self.cause = Some(cause.to_string().into());
        self
    }

    /// Counts what earlier tries have sent.
    pub(crate) fn or_sent(mut self, sent: bool) -> Self {
        self.sent |= sent;
        self
    }

    pub(crate) fn rejection(&self) -> Rejection {
        let new = |status, reason| Rejection::new(Layer::Forward, status, reason);
        let rejection =
            match self.kind {
                Kind::Connect => new(StatusCode::BAD_GATEWAY, "connect-failed")
                    .with_detail("the endpoint does not take the connection"),
                Kind::Tls => new(StatusCode::BAD_GATEWAY, "tls-failed")
                    .with_detail("no secure connection to the endpoint came about"),
                Kind::ConnectTimeout => new(StatusCode::GATEWAY_TIMEOUT, "connect-timeout")
                    .with_grpc_code(GrpcCode::UNAVAILABLE)
                    .with_detail("no connection to the endpoint in time"),
                Kind::Exhausted => new(StatusCode::SERVICE_UNAVAILABLE, "connections-exhausted")
                    .with_detail("all connections to the endpoint are in use"),
                Kind::Reset => new(StatusCode::BAD_GATEWAY, "upstream-reset")
                    .with_detail("the endpoint closed the connection without an answer"),
                Kind::Malformed => {
                    new(StatusCode::BAD_GATEWAY, "malformed-response").with_detail("the endpoint's answer is not HTTP")
                }
                Kind::Switched => new(StatusCode::BAD_GATEWAY, "unexpected-upgrade")
                    .with_detail("the endpoint changed to a protocol nobody asked for"),
                Kind::ResponseTimeout => new(StatusCode::GATEWAY_TIMEOUT, "response-timeout")
                    .with_detail("the endpoint did not answer in time"),
                Kind::Deadline | Kind::DeadlineInLine => new(StatusCode::GATEWAY_TIMEOUT, "deadline-exceeded")
                    .with_detail("the time for the request is over"),
                Kind::RequestTooLarge => new(StatusCode::PAYLOAD_TOO_LARGE, "request-too-large")
                    .with_detail("the request's body is larger than the route takes"),
                Kind::RequestIdle => new(StatusCode::REQUEST_TIMEOUT, "request-idle")
                    .with_detail("the request's body stood still for too long"),
                Kind::RequestBroken => {
                    new(StatusCode::BAD_REQUEST, "request-broken").with_detail("the request's body broke off")
                }
                Kind::ResponseTooLarge => new(StatusCode::BAD_GATEWAY, "response-too-large")
                    .with_detail("the endpoint's answer is larger than the route takes"),
                Kind::Unsendable => new(StatusCode::INTERNAL_SERVER_ERROR, "unsendable")
                    .with_detail("the request cannot be said in the endpoint's protocol"),
            };
        let rejection = rejection.with_sent(self.sent);
        match self.kind {
            // The endpoint was not asked, or did nothing wrong: who wants what is large must not make it look sick.
            Kind::Exhausted | Kind::DeadlineInLine | Kind::ResponseTooLarge => rejection.with_side(Side::Gateway),
            _ => rejection,
        }
    }
}
