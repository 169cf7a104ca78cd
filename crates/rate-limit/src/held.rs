//! What a request holds until its response has ended: places of concurrency limits, and costs still to be settled.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use http::{Extensions, HeaderMap, Response, StatusCode};
use portcullis_core::{Body, Guard};

use crate::limit::Settle;
use crate::limiter::Limiter;
use crate::rate::Cell;
use crate::table::Mark;

/// Watches a response's body for the limits that count until its end. Dropping it gives back what it holds.
pub struct Held(Box<Inner>);

/// How a request went, for [`Limit::settle`](crate::Limit::settle).
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Settlement<'a> {
    /// The response's status.
    pub status: StatusCode,
    /// The response's headers.
    pub headers: &'a HeaderMap,
    /// What the inner service left in the response.
    pub extensions: &'a Extensions,
    /// The trailers, if there were any.
    pub trailers: Option<&'a HeaderMap>,
    /// The bytes of the body that passed.
    pub bytes: u64,
    /// The body arrived whole; else it broke off, or the caller went away.
    pub whole: bool,
}

/// One thing that is held.
pub(crate) enum Holding {
    /// A place of a concurrency limit.
    Place(Mark),
    /// A charge of so many units, whose turn was or is at that time.
    Charge { mark: Mark, cell: Cell, units: u32, at: u64, settle: Option<Settle> },
    /// A charge in the store, or to a lease.
    #[cfg(feature = "redis")]
    Stored {
        store: crate::RedisStore,
        mark: u64,
        key: String,
        interval: u64,
        units: u32,
        lease: Option<u64>,
        settle: Settle,
    },
}

struct Inner {
    limiter: Arc<Limiter>,
    holdings: Vec<Holding>,
    /// The inner service was called: from then on charges stay.
    started: bool,
    response: Option<Seen>,
}

/// What was seen of the response so far.
struct Seen {
    status: StatusCode,
    headers: HeaderMap,
    extensions: Extensions,
    trailers: Option<HeaderMap>,
    bytes: u64,
    whole: bool,
}

// === impl Held ===

impl Held {
    pub(crate) fn new(limiter: Arc<Limiter>, holdings: Vec<Holding>) -> Self {
        Self(Box::new(Inner { limiter, holdings, started: false, response: None }))
    }

    /// The inner service is called now.
    pub(crate) fn start(&mut self) {
        self.0.started = true;
    }

    /// Watches the body of `response`.
    pub(crate) fn watch<R: http_body::Body<Data = Bytes>>(mut self, response: Response<R>) -> Response<Body<R, Self>> {
        if self.0.holdings.iter().any(Holding::settles) {
            self.0.response = Some(Seen {
                status: response.status(),
                headers: response.headers().clone(),
                extensions: response.extensions().clone(),
                trailers: None,
                bytes: 0,
                whole: false,
            });
        }
        response.map(|body| Body::guarded(body, self))
    }
}

impl Guard for Held {
    fn data(&mut self, bytes: usize) {
        if let Some(seen) = &mut self.0.response {
            seen.bytes += bytes as u64;
        }
    }

    fn trailers(&mut self, trailers: &HeaderMap) {
        if let Some(seen) = &mut self.0.response {
            seen.trailers = Some(trailers.clone());
        }
    }

    fn whole(&mut self) {
        self.end();
    }

    fn end(&mut self) {
        if let Some(seen) = &mut self.0.response {
            seen.whole = true;
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // These first: what a settlement does is not ours.
        for holding in &self.holdings {
            if let Holding::Place(mark) = holding {
                self.limiter.in_flight().leave(*mark);
            }
        }
        for holding in &self.holdings {
            match holding {
                Holding::Place(_) => {}
                &Holding::Charge { mark, cell, units, at, ref settle } => {
                    let cost = match (self.started, settle, &self.response) {
                        (false, ..) => 0,
                        (true, Some(settle), Some(seen)) => settle(&seen.settlement()),
                        (true, ..) => units,
                    };
                    self.limiter.settle(mark, cell, units, cost, at);
                }
                #[cfg(feature = "redis")]
                Holding::Stored { store, mark, key, interval, units, lease, settle } => {
                    if let Some(seen) = &self.response {
                        store.settle(*mark, key, *interval, *lease, *units, settle(&seen.settlement()));
                    }
                }
            }
        }
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held").field("count", &self.0.holdings.len()).finish_non_exhaustive()
    }
}

// === impl Holding ===

impl Holding {
    fn settles(&self) -> bool {
        match self {
            Self::Place(_) => false,
            Self::Charge { settle, .. } => settle.is_some(),
            #[cfg(feature = "redis")]
            Self::Stored { .. } => true,
        }
    }
}

// === impl Seen ===

impl Seen {
    fn settlement(&self) -> Settlement<'_> {
        Settlement {
            status: self.status,
            headers: &self.headers,
            extensions: &self.extensions,
            trailers: self.trailers.as_ref(),
            bytes: self.bytes,
            whole: self.whole,
        }
    }
}
