//! What a source of instances is: something that can be watched, and perhaps registered with.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::{Stream, StreamExt};
use portcullis_core::Instance;

use crate::{Error, Registration, ServiceDefinition};

/// Where services are found, and where they make themselves known.
///
/// Shared as `Arc<dyn Registry>`; an `Arc` of a registry is a registry.
pub trait Registry: Send + Sync + 'static {
    /// Follows a service until the returned watch is dropped.
    fn watch(&self, service: &Arc<str>) -> Watch;

    /// Makes an instance known, until it is [deregistered](Registration::deregister) or the handle is dropped.
    ///
    /// # Errors
    ///
    /// [`Error::is_unsupported`] unless the source takes registrations; else what it answers.
    fn register(&self, definition: ServiceDefinition) -> Pending<Registration> {
        let service = definition.service;
        Box::pin(async move { Err(Error::unsupported(format!("this source takes no registration of {service}"))) })
    }
}

/// Something a registry is asked to do.
pub type Pending<T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send>>;

/// A service, followed: a stream of what the source knows of it.
///
/// * `Ok` is *everything* the source knows of the service, never a difference; an empty list is a sound "none". After a
///   failure the first good answer comes again, changed or not.
/// * `Err` says that the source cannot tell at the moment; what was known stays.
///
/// A source paces itself, failures included, and goes on by itself after one; a watch that ends is started anew.
pub struct Watch(Pin<Box<dyn Stream<Item = Result<Vec<Instance>, Error>> + Send>>);

// === impl Registry ===

impl<R: Registry + ?Sized> Registry for Arc<R> {
    fn watch(&self, service: &Arc<str>) -> Watch {
        (**self).watch(service)
    }

    fn register(&self, definition: ServiceDefinition) -> Pending<Registration> {
        (**self).register(definition)
    }
}

// === impl Watch ===

impl Watch {
    /// A watch over a stream of answers.
    #[must_use]
    pub fn new(answers: impl Stream<Item = Result<Vec<Instance>, Error>> + Send + 'static) -> Self {
        Self(Box::pin(answers))
    }

    /// The next answer; `None` when the source has nothing more to say.
    pub async fn next(&mut self) -> Option<Result<Vec<Instance>, Error>> {
        self.0.next().await
    }
}

impl Stream for Watch {
    type Item = Result<Vec<Instance>, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.as_mut().poll_next(cx)
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}
