//! An instance as files write it.

use std::collections::BTreeMap;

use portcullis_core::{Instance, Protocol, Scheme};
use serde::{Deserialize, Serialize};

use crate::Error;

/// Services and their instances.
pub(crate) type Book = BTreeMap<String, Vec<Described>>;

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Described {
    address: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    scheme: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    protocol: Option<String>,
    #[serde(default = "one")]
    weight: u32,
    #[serde(default)]
    priority: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    zone: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    tags: Vec<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    metadata: BTreeMap<String, String>,
}

const fn one() -> u32 {
    1
}

impl Described {
    /// The instance, or what is wrong with the words. Its id is its address unless it has one.
    pub(crate) fn instance(&self) -> Result<Instance, Error> {
        let wrong = |what: &str| Error::unavailable(format!("{:?}: {what}", self.address));
        let address: portcullis_core::Address = self
            .address
            .parse()
            .map_err(|error: portcullis_core::InvalidAddress| wrong("not an address").with_source(error))?;
        let id = self.id.as_deref().unwrap_or(&self.address);
        let mut instance = Instance::new(id, address);
        instance.scheme = match self.scheme.as_deref() {
            None | Some("http") => Scheme::Http,
            Some("https") => Scheme::Https,
            Some(_) => return Err(wrong("the scheme must be http or https")),
        };
        instance.protocol = match self.protocol.as_deref() {
            None | Some("auto") => Protocol::Auto,
            Some("http1") => Protocol::Http1,
            Some("http2") => Protocol::Http2,
            Some(_) => return Err(wrong("the protocol must be auto, http1 or http2")),
        };
        (instance.weight, instance.priority) = (self.weight, self.priority);
        instance.zone = self.zone.as_deref().map(Into::into);
        instance.tags.clone_from(&self.tags);
        instance.metadata.clone_from(&self.metadata);
        Ok(instance)
    }
}

impl From<&Instance> for Described {
    fn from(instance: &Instance) -> Self {
        Self {
            address: instance.address.to_string(),
            id: Some(instance.id.to_string()),
            scheme: (instance.scheme == Scheme::Https).then(|| "https".into()),
            protocol: match instance.protocol {
                Protocol::Http1 => Some("http1".into()),
                Protocol::Http2 => Some("http2".into()),
                _ => None,
            },
            weight: instance.weight,
            priority: instance.priority,
            zone: instance.zone.as_deref().map(Into::into),
            tags: instance.tags.clone(),
            metadata: instance.metadata.clone(),
        }
    }
}

/// All instances of one service.
pub(crate) fn instances(described: &[Described]) -> Result<Vec<Instance>, Error> {
    described.iter().map(Described::instance).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_comes_back_as_it_was_written() {
        let mut instance = Instance::new("a", "orders.internal:443".parse::<portcullis_core::Address>().unwrap());
        assert_eq!(Described::from(&instance).instance().unwrap(), instance);
        (instance.scheme, instance.protocol) = (Scheme::Https, Protocol::Http2);
        (instance.weight, instance.priority, instance.zone) = (7, 2, Some("z".into()));
        instance.tags.push("v2".into());
        instance.metadata.insert("k".into(), "v".into());
        let text = serde_json::to_string(&Described::from(&instance)).unwrap();
        assert_eq!(serde_json::from_str::<Described>(&text).unwrap().instance().unwrap(), instance);
    }
}
