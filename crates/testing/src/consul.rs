//! A real Consul agent.

use std::net::SocketAddr;
use std::path::PathBuf;

use http::Method;
use serde_json::{Value, json};

use crate::client::{Answer, request};
use crate::process::{Process, free_port, scratch_folder};
use crate::program;

/// A Consul agent of its own, on free ports of the loopback interface; dropping it kills it.
#[derive(Debug)]
pub struct Consul {
    process: Option<Process>,
    http: SocketAddr,
    dns: SocketAddr,
    server_port: u16,
    serf_port: u16,
    folder: PathBuf,
    arguments: Vec<String>,
    token: Option<String>,
}

impl Consul {
    /// A single server that keeps its state in memory: [restarted](Self::restart), it has forgotten everything.
    pub async fn start() -> Self {
        Self::start_with(json!({}), &["-dev"]).await
    }

    /// An agent with settings of its own (see Consul's configuration) and command line arguments beside the ports.
    ///
    /// # Panics
    ///
    /// When it cannot be had or started.
    pub async fn start_with(settings: Value, arguments: &[&str]) -> Self {
        let folder = scratch_folder("consul");
        let (http, dns, server_port, serf_port) = (free_port(), free_port(), free_port(), free_port());
        let mut config = json!({
            "bind_addr": "127.0.0.1",
            "client_addr": "127.0.0.1",
            "node_name": format!("node-{http}"),
            "disable_update_check": true,
            "leave_on_terminate": false,
            "ports": {
                "http": http, "dns": dns, "server": server_port, "serf_lan": serf_port, "serf_wan": -1, "grpc": -1
            },
        });
        merge(&mut config, settings);
        std::fs::write(folder.join("agent.json"), config.to_string()).expect("a configuration file");
        let loopback = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let mut consul = Self {
            process: None,
            http: loopback(http),
            dns: loopback(dns),
            server_port,
            serf_port,
            folder,
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
            token: None,
        };
        consul.restart().await;
        consul
    }

    /// Where its HTTP interface listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.http
    }

    /// Its HTTP interface as a URL.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.http)
    }

    /// Where it answers DNS.
    #[must_use]
    pub fn dns(&self) -> SocketAddr {
        self.dns
    }

    /// The port on which other servers join it.
    #[must_use]
    pub fn serf_port(&self) -> u16 {
        self.serf_port
    }

    /// The port on which servers call it.
    #[must_use]
    pub fn server_port(&self) -> u16 {
        self.server_port
    }

    /// The token [`get`](Self::get) and [`put`](Self::put) show.
    pub fn use_token(&mut self, token: impl Into<String>) {
        self.token = Some(token.into());
    }

    /// Kills the agent as a crash would.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Starts it again, on the same ports, and waits for a leader.
    ///
    /// # Panics
    ///
    /// When it does not come up.
    pub async fn restart(&mut self) {
        self.process = None;
        let mut process = self.spawn();
        let url = self.http;
        process
            .until(|| async move {
                let leader = request(url, Method::GET, "/v1/status/leader", &[], "").await;
                leader.is_ok_and(|answer| answer.status == 200 && answer.body.len() > 3)
            })
            .await;
        self.process = Some(process);
    }

    /// Starts it again without waiting for anything.
    pub fn restart_without_waiting(&mut self) {
        self.process = None;
        self.process = Some(self.spawn());
    }

    fn spawn(&self) -> Process {
        let mut command = program::find("consul", "consul", Some("bullseye")).command();
        command.arg("agent").args(&self.arguments).arg("-config-file").arg(self.folder.join("agent.json"));
        if !self.arguments.iter().any(|argument| argument == "-dev") {
            command.arg("-data-dir").arg(self.folder.join("data"));
        }
        Process::start(command, &self.folder.join("log"))
    }

    /// Stops it from running, as a machine that hangs would.
    ///
    /// # Panics
    ///
    /// When it does not run.
    pub fn pause(&self) {
        self.running().pause();
    }

    /// Lets it go on.
    ///
    /// # Panics
    ///
    /// When it does not run.
    pub fn resume(&self) {
        self.running().signal("CONT");
    }

    fn running(&self) -> &Process {
        self.process.as_ref().expect("a running agent")
    }

    /// Asks its HTTP interface.
    ///
    /// # Panics
    ///
    /// When it does not answer.
    pub async fn get(&self, path: &str) -> Answer {
        self.ask(Method::GET, path, "").await
    }

    /// Tells its HTTP interface.
    ///
    /// # Panics
    ///
    /// When it does not answer.
    pub async fn put(&self, path: &str, body: &str) -> Answer {
        self.ask(Method::PUT, path, body).await
    }

    /// Has its HTTP interface remove something.
    ///
    /// # Panics
    ///
    /// When it does not answer.
    pub async fn delete(&self, path: &str) -> Answer {
        self.ask(Method::DELETE, path, "").await
    }

    /// Puts services `s-0`, `s-1`, … into its catalog, each with as many instances `s-0-1`, `s-0-2`, … as asked for, one on
    /// each of the nodes `n-1`, `n-2`, …; all pass a check of their own.
    ///
    /// # Panics
    ///
    /// When it does not take them.
    pub async fn fill(&self, services: usize, instances: usize) {
        let node = |instance| json!({"Node": {"Verb": "set", "Node": {"Node": format!("n-{instance}"), "Address": address(instance)}}});
        let nodes: Vec<_> = (1..=instances).map(node).collect();
        let members = (0..services).flat_map(|service| (1..=instances).flat_map(move |i| Self::member(service, i)));
        for operations in nodes.chunks(OPERATIONS).chain(members.collect::<Vec<_>>().chunks(OPERATIONS)) {
            let answer = self.put("/v1/txn", &Value::from(operations).to_string()).await;
            assert_eq!(answer.status, 200, "{}", answer.text());
        }
    }

    /// What puts one instance into the catalog, for `/v1/txn`.
    #[must_use]
    pub fn member(service: usize, instance: usize) -> [Value; 2] {
        let (node, id) = (format!("n-{instance}"), format!("s-{service}-{instance}"));
        [
            json!({"Service": {"Verb": "set", "Node": node, "Service": {
                "ID": id, "Service": format!("s-{service}"), "Address": address(instance), "Port": 80,
                "Meta": {"version": "2", "team": "orders"}, "Tags": ["a", "b"],
            }}}),
            json!({"Check": {"Verb": "set", "Check": {
                "Node": node, "CheckID": format!("check-{id}"), "Name": "check", "Status": "passing", "ServiceID": id,
            }}}),
        ]
    }

    async fn ask(&self, method: Method, path: &str, body: &str) -> Answer {
        let token = self.token.as_deref().map(|token| ("x-consul-token", token));
        request(self.http, method, path, token.as_slice(), body.to_owned()).await.expect("an answer from Consul")
    }
}

impl Drop for Consul {
    fn drop(&mut self) {
        self.process = None;
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// How many a transaction holds.
const OPERATIONS: usize = 64;

fn address(instance: usize) -> String {
    format!("10.0.{}.{}", instance / 250, instance % 250 + 1)
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}
