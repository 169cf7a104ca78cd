//! What a request meets on its way, told while it happens: for logs and spans.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use http::HeaderMap;

use crate::{Endpoint, Head, Layer};

/// Is told what one request meets on its way. It is called in the request's own task: it must be quick.
pub trait Observe: Send + Sync + 'static {
    /// The request has passed this layer: auth, rate limit, or discovery.
    fn passed(&self, layer: Layer) {
        let _ = layer;
    }

    /// An attempt begins: the request goes to this endpoint, with these headers.
    fn sending(&self, endpoint: &Endpoint, headers: &mut HeaderMap) {
        let _ = (endpoint, headers);
    }

    /// The attempt that began last was answered. What went wrong on the way is an answer with a
    /// [`Rejection`](crate::Rejection), as everywhere.
    fn answered(&self, head: Head<'_>) {
        let _ = head;
    }

    /// The attempt that began last was given up before there was an answer.
    fn given_up(&self) {}
}

/// Left in a request's extensions, it has [`Observe`] told what becomes of that request in a gateway.
#[derive(Clone)]
pub struct Observer(Arc<dyn Observe>);

// === impl Observer ===

impl Observer {
    /// Has this one told.
    #[must_use]
    pub fn new(observe: Arc<impl Observe>) -> Self {
        Self(observe)
    }
}

impl Deref for Observer {
    type Target = dyn Observe;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observer").finish_non_exhaustive()
    }
}
