//! What Consul's health endpoint says, read as instances.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use portcullis_core::{Address, Instance, Protocol, Scheme};
use serde::Deserialize;

use crate::{Error, Health};

/// Which instances, at which of their addresses.
#[derive(Clone, Debug, Default)]
pub(super) struct Selection {
    pub(super) warning: bool,
    pub(super) tagged_address: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    node: Node,
    service: Service,
    #[serde(default)]
    checks: Option<Vec<Check>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Node {
    #[serde(default)]
    node: String,
    #[serde(default)]
    address: String,
    #[serde(default)]
    tagged_addresses: Option<HashMap<String, String>>,
    #[serde(default)]
    meta: Option<HashMap<String, String>>,
    #[serde(default)]
    locality: Option<Locality>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Service {
    #[serde(rename = "ID")]
    id: String,
    #[serde(default)]
    address: String,
    /// The agent takes any number: one that is no port must not make the whole answer unreadable.
    #[serde(default)]
    port: i64,
    #[serde(default)]
    socket_path: String,
    #[serde(default)]
    tagged_addresses: Option<HashMap<String, TaggedAddress>>,
    #[serde(default)]
    tags: Option<Vec<String>>,
    #[serde(default)]
    meta: Option<BTreeMap<String, String>>,
    #[serde(default)]
    weights: Option<Weights>,
    #[serde(default)]
    locality: Option<Locality>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct TaggedAddress {
    address: String,
    #[serde(default)]
    port: i64,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Weights {
    passing: u32,
    warning: u32,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Locality {
    #[serde(default)]
    zone: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Check {
    status: String,
}

/// Reads an answer of `/v1/health/service/…`. Instances that nobody could call are left out.
pub(super) fn instances(body: &[u8], selection: &Selection) -> Result<Vec<Instance>, Error> {
    let entries: Vec<Entry> = serde_json::from_slice(body)
        .map_err(|error| Error::unavailable("the registry's answer cannot be read").with_source(error))?;
    Ok(entries.into_iter().filter_map(|entry| entry.instance(selection)).collect())
}

// === impl Entry ===

impl Entry {
    fn instance(self, selection: &Selection) -> Option<Instance> {
        let health = self.health();
        if health == Health::Critical || health == Health::Warning && !selection.warning {
            return None;
        }
        let Some(address) = self.address(selection) else {
            tracing::debug!(id = self.service.id, "an instance without an address that can be called");
            return None;
        };
        let Self { node, service, .. } = self;
        let id = if node.node.is_empty() { service.id } else { format!("{}/{}", node.node, service.id) };
        let mut instance = Instance::new(id, address);
        if let Some(weights) = service.weights {
            instance.weight = if health == Health::Warning { weights.warning } else { weights.passing };
        }
        let meta = service.meta.unwrap_or_default();
        let mut zone = [service.locality, node.locality].into_iter().flatten().map(|locality| locality.zone);
        instance.zone = meta
            .get(ZONE)
            .cloned()
            .or_else(|| zone.find(|zone| !zone.is_empty()))
            .or_else(|| node.meta.and_then(|mut meta| meta.remove(ZONE)))
            .map(Into::into);
        if meta.get(SCHEME).is_some_and(|scheme| scheme == "https") {
            instance.scheme = Scheme::Https;
        }
        instance.protocol = match meta.get(PROTOCOL).map(String::as_str) {
            Some("http1" | "http/1.1") => Protocol::Http1,
            Some("http2" | "h2" | "h2c" | "grpc") => Protocol::Http2,
            _ => Protocol::Auto,
        };
        instance.priority = meta.get(PRIORITY).and_then(|priority| priority.parse().ok()).unwrap_or(0);
        instance.tags = service.tags.unwrap_or_default();
        instance.metadata = meta;
        Some(instance)
    }

    /// The worst of the checks of the service and of its node; maintenance is a critical check.
    fn health(&self) -> Health {
        let checks = self.checks.iter().flatten().map(|check| match check.status.as_str() {
            "passing" => Health::Passing,
            "warning" => Health::Warning,
            _ => Health::Critical,
        });
        checks.max().unwrap_or(Health::Passing)
    }

    /// The service's tagged address, else its address, else the node's tagged address, else the node's.
    fn address(&self, selection: &Selection) -> Option<Address> {
        let (service, node) = (&self.service, &self.node);
        if let Some(tag) = &selection.tagged_address {
            if let Some(tagged) = service.tagged_addresses.as_ref().and_then(|tagged| tagged.get(tag)) {
                let port = if tagged.port == 0 { service.port } else { tagged.port };
                return address(&tagged.address, port);
            }
            if service.address.is_empty()
                && let Some(tagged) = node.tagged_addresses.as_ref().and_then(|tagged| tagged.get(tag))
            {
                return address(tagged, service.port);
            }
        }
        if !service.socket_path.is_empty() {
            return Some(Address::Unix(service.socket_path.clone().into()));
        }
        let host = if service.address.is_empty() { &node.address } else { &service.address };
        address(host, service.port)
    }
}

/// Metadata by which an instance says what Consul has no field for.
const ZONE: &str = "zone";
const SCHEME: &str = "scheme";
const PROTOCOL: &str = "protocol";
const PRIORITY: &str = "priority";

/// All metadata of an instance as Consul is to have it.
pub(super) fn meta(instance: &Instance) -> BTreeMap<String, String> {
    let protocol = match instance.protocol {
        Protocol::Http1 => Some("http1"),
        Protocol::Http2 => Some("http2"),
        _ => None,
    };
    let said = [
        (ZONE, instance.zone.as_deref().map(str::to_owned)),
        (SCHEME, (instance.scheme == Scheme::Https).then(|| "https".to_owned())),
        (PROTOCOL, protocol.map(str::to_owned)),
        (PRIORITY, (instance.priority > 0).then(|| instance.priority.to_string())),
    ];
    let mut meta = instance.metadata.clone();
    for (key, value) in said {
        if let Some(value) = value {
            meta.entry(key.to_owned()).or_insert(value);
        }
    }
    meta
}

fn address(host: &str, port: i64) -> Option<Address> {
    let port = u16::try_from(port).ok().filter(|port| *port != 0)?;
    match host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
        Ok(ip) => Some(Address::Socket((ip, port).into())),
        Err(_) => format!("{host}:{port}").parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn entry() -> Value {
        json!({
            "Node": {
                "ID": "7", "Node": "n1", "Address": "10.1.10.12", "Datacenter": "dc1",
                "TaggedAddresses": {"lan": "10.1.10.12", "wan": "203.0.113.9"}, "Meta": {"zone": "rack-1"}
            },
            "Service": {
                "ID": "web-1", "Service": "web", "Tags": ["v2"], "Address": "10.1.10.13", "Port": 8000,
                "TaggedAddresses": {"wan": {"Address": "198.51.100.1", "Port": 80}},
                "Meta": {"team": "a"}, "Weights": {"Passing": 10, "Warning": 2}, "EnableTagOverride": false
            },
            "Checks": [{"CheckID": "serfHealth", "Status": "passing"}, {"CheckID": "web", "Status": "passing"}]
        })
    }

    fn read(entry: Value, selection: &Selection) -> Option<Instance> {
        instances(Value::Array(vec![entry]).to_string().as_bytes(), selection).unwrap().pop()
    }

    fn with(change: impl FnOnce(&mut Value)) -> Value {
        let mut entry = entry();
        change(&mut entry);
        entry
    }

    fn at(entry: Value, tag: Option<&str>) -> Option<String> {
        let selection = Selection { tagged_address: tag.map(Into::into), ..Selection::default() };
        read(entry, &selection).map(|instance| instance.address.to_string())
    }

    #[test]
    fn everything_an_instance_says_is_read() {
        let instance = read(entry(), &Selection::default()).unwrap();
        assert_eq!((&*instance.id, instance.weight), ("n1/web-1", 10));
        assert_eq!(instance.zone.as_deref(), Some("rack-1"));
        assert_eq!((instance.tags, instance.metadata["team"].as_str()), (vec!["v2".to_owned()], "a"));
        let meta = json!({"scheme": "https", "protocol": "grpc", "priority": "2", "zone": "z"});
        let said = read(with(|entry| entry["Service"]["Meta"] = meta), &Selection::default()).unwrap();
        assert_eq!((said.scheme, said.protocol, said.priority), (Scheme::Https, Protocol::Http2, 2));
        assert_eq!(said.zone.as_deref(), Some("z"));
        let local = with(|entry| entry["Service"]["Locality"] = json!({"Region": "r", "Zone": "r-1"}));
        assert_eq!(read(local, &Selection::default()).unwrap().zone.as_deref(), Some("r-1"));
    }

    /// A service registered without an id has its name for one, on every node.
    #[test]
    fn one_id_on_several_nodes_is_several_ids() {
        let at = |node: &str| {
            with(|entry| {
                entry["Node"]["Node"] = node.into();
                entry["Service"]["ID"] = "web".into();
            })
        };
        let answer = Value::Array(["n1", "n2", "n3"].map(at).into()).to_string();
        let all = instances(answer.as_bytes(), &Selection::default()).unwrap();
        assert_eq!(all.iter().map(|instance| &*instance.id).collect::<Vec<_>>(), ["n1/web", "n2/web", "n3/web"]);
    }

    #[test]
    fn the_address_is_the_tagged_then_the_services_then_the_nodes() {
        assert_eq!(at(entry(), None).unwrap(), "10.1.10.13:8000");
        assert_eq!(at(entry(), Some("wan")).unwrap(), "198.51.100.1:80");
        assert_eq!(at(entry(), Some("lan")).unwrap(), "10.1.10.13:8000");
        let bare = with(|entry| {
            entry["Service"]["Address"] = "".into();
            entry["Service"]["TaggedAddresses"] = Value::Null;
        });
        assert_eq!(at(bare.clone(), None).unwrap(), "10.1.10.12:8000");
        assert_eq!(at(bare, Some("wan")).unwrap(), "203.0.113.9:8000");
        assert_eq!(at(with(|entry| entry["Service"]["Address"] = "fd00::1".into()), None).unwrap(), "[fd00::1]:8000");
        assert_eq!(at(with(|entry| entry["Service"]["Address"] = "a.b".into()), None).unwrap(), "a.b:8000");
        assert_eq!(at(with(|entry| entry["Service"]["Address"] = "a b".into()), None), None);
        for port in [0, -5, 70_000] {
            assert_eq!(at(with(|entry| entry["Service"]["Port"] = port.into()), None), None, "{port}");
        }
    }

    #[test]
    fn warning_instances_by_choice_and_with_their_weight() {
        let warned = with(|entry| entry["Checks"][1]["Status"] = "warning".into());
        assert!(read(warned.clone(), &Selection::default()).is_none());
        assert_eq!(read(warned, &Selection { warning: true, ..Selection::default() }).unwrap().weight, 2);
        let all = Selection { warning: true, ..Selection::default() };
        for status in ["critical", "maintenance", "unheard-of"] {
            assert!(read(with(|entry| entry["Checks"][0]["Status"] = status.into()), &all).is_none());
        }
    }

    #[test]
    fn what_is_missing_or_null_is_default() {
        let bare =
            json!({"Node": {"Address": "10.0.0.1"}, "Service": {"ID": "a", "Port": 1, "Tags": null}, "Checks": null});
        assert_eq!(read(bare, &Selection::default()).unwrap().weight, 1);
        for broken in ["", "{}", "[{}]", "[1]", "[", "null"] {
            assert!(instances(broken.as_bytes(), &Selection::default()).is_err(), "{broken:?}");
        }
    }
}
