//! Files and DNS, as they are.
#![cfg(any(feature = "file", feature = "dns"))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

use std::time::Duration;

use portcullis_core::Instance;
use portcullis_discovery::Watch;

/// The next answer, within ten seconds.
async fn next(watch: &mut Watch) -> Result<Vec<Instance>, portcullis_discovery::Error> {
    tokio::time::timeout(Duration::from_secs(10), watch.next()).await.expect("an answer in time").unwrap()
}

#[cfg(feature = "file")]
mod file {
    use super::*;
    use portcullis_discovery::{FileRegistry, Registry};

    #[tokio::test]
    async fn a_file_is_read_again_and_a_broken_one_is_a_failure() {
        let folder = portcullis_testing::process::scratch_folder("file-registry");
        let path = folder.join("services.toml");
        let replace = |text: &str| {
            std::fs::write(folder.join("part"), text).unwrap();
            std::fs::rename(folder.join("part"), &path).unwrap();
        };
        let registry = FileRegistry::new(&path);
        let mut orders = registry.watch(&"orders".into());
        let mut users = registry.watch(&"users".into());
        assert!(next(&mut orders).await.unwrap_err().is_unavailable(), "there is no file yet");
        assert!(next(&mut users).await.is_err());
        replace("[[services.orders]]\naddress = \"10.0.0.1:80\"\n");
        assert_eq!(&*next(&mut orders).await.unwrap()[0].id, "10.0.0.1:80");
        assert_eq!(next(&mut users).await.unwrap(), []);
        replace("[[services.orders]]\naddress = \"10.0.0.1:80\"\nweight = \"heavy\"\n");
        assert!(next(&mut orders).await.unwrap_err().is_unavailable());
        replace(
            "[[services.orders]]\naddress = \"10.0.0.1:80\"\nweight = 5\n\n[[services.users]]\naddress = \"u:1\"\n",
        );
        assert_eq!(next(&mut orders).await.unwrap()[0].weight, 5);
        // This watch was not looked at since: it is told of the newest, and may be of the failure before.
        while next(&mut users).await.map_or(true, |users| users.is_empty()) {}
        let mut late = registry.watch(&"users".into());
        assert_eq!(next(&mut late).await.unwrap().len(), 1, "who comes late is told at once");
        std::fs::remove_file(&path).unwrap();
        assert!(next(&mut orders).await.is_err());
        std::fs::remove_dir_all(folder).unwrap();
    }
}

#[cfg(feature = "dns")]
mod dns {
    use super::*;
    use portcullis_discovery::{DnsRegistry, Registry};
    use portcullis_testing::Consul;
    use serde_json::json;

    const SOON: Duration = Duration::from_millis(50);

    async fn register(consul: &Consul, id: &str, port: u16, weight: u32) {
        let weights = json!({"Passing": weight, "Warning": 1});
        let body = json!({"Name": "orders", "ID": id, "Address": "127.0.0.7", "Port": port, "Weights": weights});
        consul.put("/v1/agent/service/register", &body.to_string()).await;
    }

    #[tokio::test]
    async fn srv_records_carry_ports_and_weights_and_change() {
        let consul = Consul::start().await;
        let dns = DnsRegistry::srv().unwrap().server(consul.dns()).unwrap().pattern("{}.service.consul.").floor(SOON);
        let mut watch = dns.watch(&"orders".into());
        assert_eq!(next(&mut watch).await.unwrap(), [], "a name that does not exist is a sound none");
        register(&consul, "a", 81, 3).await;
        register(&consul, "b", 82, 1).await;
        let found = loop {
            let found = next(&mut watch).await.unwrap();
            if found.len() == 2 {
                break found;
            }
        };
        let said: Vec<_> = found.iter().map(|instance| (instance.address.to_string(), instance.weight)).collect();
        assert_eq!(said, [("127.0.0.7:81".to_owned(), 3), ("127.0.0.7:82".to_owned(), 1)]);
        consul.put("/v1/agent/service/deregister/a", "").await;
        while next(&mut watch).await.unwrap().len() != 1 {}
    }

    #[tokio::test]
    async fn addresses_have_the_port_they_are_given() {
        let consul = Consul::start().await;
        register(&consul, "a", 81, 1).await;
        let dns = DnsRegistry::addresses(8080).unwrap().server(consul.dns()).unwrap();
        let dns = dns.pattern("{}.service.consul.").floor(SOON);
        let mut watch = dns.watch(&"orders".into());
        assert_eq!(next(&mut watch).await.unwrap()[0].address.to_string(), "127.0.0.7:8080");
    }

    #[tokio::test]
    async fn a_truncated_answer_is_asked_for_over_tcp() {
        let consul = Consul::start_with(json!({"dns_config": {"enable_truncate": true}}), &["-dev"]).await;
        for port in 1..=60 {
            register(&consul, &port.to_string(), port, 1).await;
        }
        let dns = DnsRegistry::srv().unwrap().server(consul.dns()).unwrap().pattern("{}.service.consul.").floor(SOON);
        assert_eq!(next(&mut dns.watch(&"orders".into())).await.unwrap().len(), 60);
    }

    #[tokio::test]
    async fn a_server_that_is_gone_is_a_failure() {
        let mut consul = Consul::start().await;
        register(&consul, "a", 81, 1).await;
        let dns = DnsRegistry::srv().unwrap().server(consul.dns()).unwrap().pattern("{}.service.consul.").floor(SOON);
        let mut watch = dns.watch(&"orders".into());
        assert_eq!(next(&mut watch).await.unwrap().len(), 1);
        consul.kill();
        let gone = tokio::time::timeout(Duration::from_secs(60), async {
            loop {
                if let Err(error) = watch.next().await.unwrap() {
                    break error;
                }
            }
        });
        assert!(gone.await.unwrap().is_unavailable());
    }
}
