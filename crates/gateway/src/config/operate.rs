//! What operators see.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::time::Duration;

use super::mistake::Notes;
use super::plain::{Map, Sample};
use super::read::At;
use super::secret::{Blob, Secret};
use super::section::{section, words};

section! {
    /// What is written to standard error.
    pub struct Log {
        /// How it looks.
        format: LogFormat = LogFormat::Text,
        /// What is written: a level, or directives such as "info,portcullis_forward=debug".
        level: At<String> = At::of(String::from("info")),
        /// Writes a line for each request, at the level info of the target `access`: with the level "warn" none is written,
        /// with "warn,access=info" all are.
        access: bool = true,
        /// The share of requests that succeed which get one; all that fail do.
        sample: Sample = Sample(1.0),
    }
}

words! {
    /// How logs look.
    pub enum LogFormat {
        /// For people.
        Text = "text",
        /// For machines.
        Json = "json",
    }
}

section! {
    /// Whose traces requests belong to.
    pub struct Traces {
        /// Takes over a caller's `traceparent`, or begins a trace, and passes it on.
        propagate: bool = true,
        /// Whether callers' traces go on here. Where strangers call, false begins a new one for each request.
        accept: bool = true,
        /// The share of traces begun here that is exported. Of a caller's trace the caller has decided.
        sample: Sample = Sample(1.0),
        /// Exports a span for each request and each attempt.
        otlp: Option<At<Otlp>>,
    }
}

section! {
    /// An OpenTelemetry collector. The program must be built with the feature `otlp`.
    pub struct Otlp {
        /// Where it listens for OTLP over HTTP, such as "http://127.0.0.1:4318"; spans go to /v1/traces below that.
        endpoint: At<String>,
        /// What it is told besides, such as a key.
        headers: Map<Secret>,
        /// Authorities of a collector that speaks TLS, as PEM, instead of the system's.
        ca: Option<At<Blob>>,
        /// What this gateway is called there.
        service_name: String = String::from("portcullis"),
        /// What else is said of it, such as deployment.environment.name.
        resource: Map<String>,
        /// How long spans wait for others.
        interval: Duration = Duration::from_secs(5),
        /// How long it may take to take them.
        timeout: Duration = Duration::from_secs(10),
        /// How many requests may wait; of others nothing is exported.
        queue: At<NonZeroUsize> = At::of(NonZeroUsize::new(4096).unwrap_or(NonZeroUsize::MIN)),
    }
}

section! {
    /// What is counted at /metrics of the operator's side.
    pub struct Metrics {
        /// Whether there is such a page.
        enabled: bool = true,
        /// Counts each endpoint, not only each service.
        endpoints: bool = true,
    }
}

section! {
    /// The operator's side: page, state, metrics.
    pub struct Admin {
        /// Whether there is one.
        enabled: bool = true,
        /// Where it listens; port 0 takes a free one and says which.
        address: At<SocketAddr> = At::of(SocketAddr::from(([127, 0, 0, 1], 9901))),
        /// Lets it change things: reload, drain, force breakers, register and deregister instances, log level. Otherwise it
        /// only shows, to whoever reaches it.
        writable: bool = false,
        /// What a request that changes something must bring as a bearer token. Needed beyond this machine.
        token: Option<Secret>,
    }
}

impl Otlp {
    pub(super) fn check(&self, span: &Range<usize>, notes: &mut Notes<'_>) {
        if !cfg!(feature = "otlp") {
            notes.push(span, "this program was built without the feature otlp", "build it with --features otlp");
        }
        let uri = self.endpoint.parse::<http::Uri>().ok();
        let scheme = uri.as_ref().filter(|uri| uri.host().is_some()).and_then(http::Uri::scheme_str);
        let has_query = uri.as_ref().is_some_and(|uri| uri.query().is_some());
        if has_query || !matches!(scheme, Some("http" | "https")) {
            let what = format!("{:?} is no URL of a collector", *self.endpoint);
            notes.push(&self.endpoint.span, what, "such as \"http://127.0.0.1:4318\"");
        }
        if let (Some("http"), Some(ca)) = (scheme, &self.ca) {
            notes.push(&ca.span, "TLS of a collector that does not speak it", "say https in endpoint, or remove ca");
        }
        if self.queue.get() > 1 << 20 {
            notes.push(&self.queue.span, "more requests than there is memory for", "at most 1048576");
        }
        for name in self.headers.keys().filter(|name| name.parse::<http::HeaderName>().is_err()) {
            notes.push(span, format!("{name:?} is no header"), "letters, digits and dashes");
        }
    }
}
