//! OTLP over HTTP with protobuf (<https://opentelemetry.io/docs/specs/otlp/#otlphttp>), through the same forward that
//! requests go through, with its TLS.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceResponse;
use portcullis::forward::{ClientTls, Forward};
use portcullis_core::{Rejection, WallClock, retry_after};
use prost::Message as _;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tower_service::Service;

use super::Counts;
use super::spans::{self, Source};
use crate::config::Otlp;
use crate::observe::Finished;

/// Sends spans in the background. It ends with the last hold on it, once what it was given is sent.
pub(crate) struct Exporter {
    queue: mpsc::Sender<Order>,
    counts: Arc<Counts>,
    wall: WallClock,
    _task: AbortHandle,
}

enum Order {
    /// A request that is over, and when, since the epoch.
    Send(Box<Finished>, Duration),
    /// Say when everything before is sent or given up.
    Flush(oneshot::Sender<()>),
}

/// The task's side.
struct Sender {
    queue: mpsc::Receiver<Order>,
    counts: Arc<Counts>,
    forward: Forward,
    uri: Uri,
    headers: HeaderMap,
    source: Source,
    every: Duration,
    failing: bool,
}

/// How an attempt to send went.
enum Sent {
    /// All but so many.
    Taken {
        but: u64,
    },
    /// It may go better later, perhaps not before so long.
    Later(String, Option<Duration>),
    Never(String),
}

/// Requests sent at a time, each with its attempts.
const AT_ONCE: usize = 256;
/// How often it is looked for more.
const GATHER: Duration = Duration::from_millis(10);
/// How often a batch is sent.
const ATTEMPTS: u32 = 5;
/// The first wait between them; each is twice the one before.
const WAIT: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// The most of an answer that is read.
const LARGEST: usize = 64 * 1024;

// === impl Exporter ===

impl Exporter {
    pub(super) fn start(otlp: &Otlp) -> Result<Self, String> {
        let wrong = |why: &dyn fmt::Display| format!("traces.otlp: {why}");
        let origin: Uri = otlp.endpoint.parse().map_err(|error| wrong(&error))?;
        let path = origin.path().trim_end_matches('/');
        let uri = format!("{}/v1/traces", otlp.endpoint.trim_end_matches('/'));
        let uri =
            if path.ends_with("/v1/traces") { origin.clone() } else { uri.parse().map_err(|error| wrong(&error))? };
        let authority = origin.authority().ok_or_else(|| wrong(&"there is no host"))?;
        let scheme = origin.scheme_str().unwrap_or("http");
        let mut forward = Forward::to(&format!("{scheme}://{authority}"))
            .map_err(|error| wrong(&error))?
            .total_timeout(otlp.timeout)
            .response_timeout(otlp.timeout)
            .max_connections(1);
        if scheme == "https" {
            let tls = otlp.ca.as_ref().map_or_else(ClientTls::system, |ca| ClientTls::trusting(ca.bytes()));
            forward = forward.tls(tls.map_err(|error| wrong(&error))?);
        }
        let mut headers = HeaderMap::new();
        for (name, value) in &otlp.headers {
            let name: HeaderName = name.parse().map_err(|_| wrong(&format_args!("{name:?} is no header")))?;
            let mut value =
                HeaderValue::try_from(value.reveal()).map_err(|_| wrong(&"a header's value cannot be one"))?;
            value.set_sensitive(true);
            headers.insert(name, value);
        }
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-protobuf"));
        let runtime = tokio::runtime::Handle::try_current().map_err(|error| wrong(&error))?;
        let (queue, received) = mpsc::channel(otlp.queue.get());
        let counts = Arc::new(Counts::default());
        let sender = Sender {
            queue: received,
            counts: counts.clone(),
            forward,
            uri,
            headers,
            source: Source::new(&otlp.service_name, &otlp.resource),
            every: otlp.interval,
            failing: false,
        };
        let task = runtime.spawn(sender.run()).abort_handle();
        Ok(Self { queue, counts, wall: WallClock::system(), _task: task })
    }

    /// Takes what is told of a request that is over, unless there is no room.
    pub(crate) fn export(&self, finished: Finished) {
        let spans = spans::count(&finished);
        if self.queue.try_send(Order::Send(Box::new(finished), self.wall.since_epoch())).is_err() {
            self.counts.dropped.fetch_add(spans, Ordering::Relaxed);
        }
    }

    pub(crate) fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Waits until what it was given is sent, but not for long.
    pub(crate) async fn flush(&self, within: Duration) {
        let flushed = async {
            let (done, is_done) = oneshot::channel();
            if self.queue.send(Order::Flush(done)).await.is_ok() {
                let _ = is_done.await;
            }
        };
        if tokio::time::timeout(within, flushed).await.is_err() {
            tracing::warn!("the collector did not take the last spans in time");
        }
    }
}

impl fmt::Debug for Exporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exporter").field("counts", &self.counts).finish_non_exhaustive()
    }
}

// === impl Order ===

impl Order {
    fn sort(self, batch: &mut Vec<(Box<Finished>, Duration)>, flushes: &mut Vec<oneshot::Sender<()>>) {
        match self {
            Self::Send(finished, at) => batch.push((finished, at)),
            Self::Flush(done) => flushes.push(done),
        }
    }
}

// === impl Sender ===

impl Sender {
    async fn run(mut self) {
        let (mut batch, mut flushes) = (Vec::new(), Vec::new());
        while let Some(order) = self.queue.recv().await {
            order.sort(&mut batch, &mut flushes);
            let until = Instant::now() + self.every;
            let mut is_over = false;
            while !is_over && flushes.is_empty() && batch.len() < AT_ONCE {
                match self.queue.try_recv() {
                    Ok(order) => order.sort(&mut batch, &mut flushes),
                    Err(TryRecvError::Disconnected) => is_over = true,
                    Err(TryRecvError::Empty) if Instant::now() >= until => break,
                    // Looked at now and then, so that nobody who has a span need wake anybody.
                    Err(TryRecvError::Empty) => tokio::time::sleep(GATHER).await,
                }
            }
            if !batch.is_empty() {
                self.send(std::mem::take(&mut batch)).await;
            }
            for done in flushes.drain(..) {
                let _: Result<(), ()> = done.send(());
            }
        }
    }

    async fn send(&mut self, batch: Vec<(Box<Finished>, Duration)>) {
        let spans: u64 = batch.iter().map(|(finished, _)| spans::count(finished)).sum();
        let body = Bytes::from(self.source.request(&batch).encode_to_vec());
        drop(batch);
        let mut wait = WAIT;
        for attempt in 1..=ATTEMPTS {
            match self.post(body.clone()).await {
                Sent::Taken { but } => {
                    let but = but.min(spans);
                    self.counts.exported.fetch_add(spans - but, Ordering::Relaxed);
                    self.counts.failed.fetch_add(but, Ordering::Relaxed);
                    if std::mem::take(&mut self.failing) {
                        tracing::info!("the collector takes spans again");
                    }
                    return;
                }
                Sent::Later(why, after) if attempt < ATTEMPTS => {
                    tracing::debug!(why, "the collector will be asked again");
                    let own = wait.mul_f64(0.5 + fastrand::f64());
                    wait *= 2;
                    tokio::time::sleep(after.unwrap_or(own).min(LONGEST_WAIT)).await;
                }
                Sent::Later(why, _) | Sent::Never(why) => {
                    self.counts.failed.fetch_add(spans, Ordering::Relaxed);
                    // Once, not for every batch.
                    if !std::mem::replace(&mut self.failing, true) {
                        tracing::warn!(why, "the collector does not take spans");
                    }
                    return;
                }
            }
        }
    }

    async fn post(&mut self, body: Bytes) -> Sent {
        let mut request = Request::post(self.uri.clone()).body(Full::new(body)).unwrap_or_default();
        request.headers_mut().extend(self.headers.clone());
        let Ok(response) = self.forward.call(request).await;
        if let Some(rejection) = response.extensions().get::<Rejection>() {
            return Sent::Later(rejection.to_string(), None);
        }
        let (head, body) = response.into_parts();
        let why = format!("it answered {}", head.status.as_u16());
        match head.status {
            status if status.is_success() => {
                let body = Limited::new(body, LARGEST).collect().await.map(|body| body.to_bytes()).unwrap_or_default();
                let partial = ExportTraceServiceResponse::decode(body).ok().and_then(|said| said.partial_success);
                let refused = partial.filter(|partial| partial.rejected_spans > 0);
                if let Some(refused) = &refused {
                    tracing::warn!(spans = refused.rejected_spans, why = refused.error_message, "spans were refused");
                }
                Sent::Taken { but: refused.map_or(0, |refused| refused.rejected_spans.unsigned_abs()) }
            }
            StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT => {
                let wall = WallClock::system();
                Sent::Later(why, retry_after(&head.headers, || wall.since_epoch()))
            }
            _ => Sent::Never(why),
        }
    }
}
