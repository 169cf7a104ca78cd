//! A source that knows its instances from the start.

use std::collections::HashMap;
use std::sync::Arc;

use futures::{StreamExt, stream};
use portcullis_core::{Address, Instance};

use crate::{Registry, Watch};

/// A list that never changes.
///
/// ```
/// use portcullis_discovery::FixedRegistry;
///
/// let registry = FixedRegistry::new().service("orders", ["10.0.0.1:8080".parse()?, "10.0.0.2:8080".parse()?]);
/// # Ok::<_, portcullis_core::InvalidAddress>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct FixedRegistry(Arc<HashMap<Arc<str>, Vec<Instance>>>);

// === impl FixedRegistry ===

impl FixedRegistry {
    /// A list of nothing: every service is known to have no instances.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a service at these addresses; each instance's id is its address.
    #[must_use]
    pub fn service(self, service: impl Into<Arc<str>>, addresses: impl IntoIterator<Item = Address>) -> Self {
        self.instances(service, addresses.into_iter().map(|address| Instance::new(address.to_string(), address)))
    }

    /// Adds a service with these instances, beside those it has already.
    #[must_use]
    pub fn instances(mut self, service: impl Into<Arc<str>>, instances: impl IntoIterator<Item = Instance>) -> Self {
        Arc::make_mut(&mut self.0).entry(service.into()).or_default().extend(instances);
        self
    }
}

impl Registry for FixedRegistry {
    fn watch(&self, service: &Arc<str>) -> Watch {
        let instances = self.0.get(service).cloned().unwrap_or_default();
        Watch::new(stream::once(async { Ok(instances) }).chain(stream::pending()))
    }
}
