//! The program as it runs, for the tests that ask it.
#![allow(
    dead_code,
    clippy::expect_used,
    reason = "each test uses some of it, and what helps the tests fails with them"
)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use http::Method;
use portcullis_testing::client::{Answer, get, request};
use portcullis_testing::process::scratch_folder;

/// The program, as it runs.
pub(crate) struct Program {
    pub(crate) child: Child,
    /// The first listener by name.
    pub(crate) gateway: SocketAddr,
    pub(crate) listeners: BTreeMap<String, SocketAddr>,
    pub(crate) admin: SocketAddr,
    pub(crate) folder: PathBuf,
}

impl Program {
    /// Starts it with this file, and waits until it says where it listens.
    pub(crate) fn start(file: &str) -> Self {
        let folder = scratch_folder("gateway");
        Self::start_in(folder, file)
    }

    pub(crate) fn start_in(folder: PathBuf, file: &str) -> Self {
        let errors = std::fs::File::create(folder.join("log")).expect("a folder to write in");
        Self::start_logging_to(folder, file, errors.into())
    }

    pub(crate) fn start_logging_to(folder: PathBuf, file: &str, errors: Stdio) -> Self {
        let path = folder.join("gateway.toml");
        std::fs::write(&path, file).expect("a folder to write in");
        let mut child = program(&["run", "--config"])
            .arg(&path)
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .expect("the program");
        let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        let mut listeners = BTreeMap::new();
        let admin = loop {
            let line = lines.next().and_then(Result::ok).unwrap_or_else(|| panic!("it ended: {}", log(&folder)));
            let at = line.split_once("://").map(|(_, at)| at.split(' ').next().unwrap_or_default().parse());
            let Some(Ok(address)) = at else { panic!("no address in {line:?}") };
            if line.starts_with("operators at") {
                break address;
            }
            let name = line.split(['(', ')']).nth(1).unwrap_or_default();
            listeners.insert(name.to_owned(), address);
        };
        let gateway = listeners.values().next().copied().expect("a listener");
        Self { child, gateway, listeners, admin, folder }
    }

    pub(crate) fn write(&self, file: &str) {
        std::fs::write(self.folder.join("gateway.toml"), file).expect("a folder to write in");
    }

    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill").arg(format!("-{name}")).arg(self.child.id().to_string()).status();
        assert!(sent.is_ok_and(|status| status.success()));
    }

    /// Its exit code, ten seconds from now at the latest.
    pub(crate) async fn ended(&mut self) -> Option<i32> {
        for _ in 0..1000 {
            if let Ok(Some(status)) = self.child.try_wait() {
                return status.code();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("it does not end: {}", log(&self.folder));
    }

    pub(crate) async fn get(&self, target: &str) -> Answer {
        get(self.gateway, target, &[]).await.unwrap_or_else(|error| panic!("{error}: {}", log(&self.folder)))
    }

    pub(crate) async fn ask(&self, target: &str) -> Answer {
        get(self.admin, target, &[]).await.unwrap_or_else(|error| panic!("{error}: {}", log(&self.folder)))
    }

    pub(crate) async fn with(&self, headers: &[(&str, &str)]) -> Answer {
        get(self.gateway, "/", headers).await.unwrap_or_else(|error| panic!("{error}: {}", log(&self.folder)))
    }

    /// Asks the operator's side until `is` so of its answer, ten seconds at the most.
    pub(crate) async fn until(&self, target: &str, is: impl Fn(&Answer) -> bool) -> Answer {
        for _ in 0..1000 {
            let answer = self.ask(target).await;
            if is(&answer) {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("not so: {}\n{}", self.ask(target).await.text(), log(&self.folder));
    }

    pub(crate) async fn order(&self, target: &str, body: &serde_json::Value) -> Answer {
        let answer = request(self.admin, Method::POST, target, &[], body.to_string()).await;
        answer.unwrap_or_else(|error| panic!("{error}: {}", log(&self.folder)))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

pub(crate) fn program(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_portcullis"));
    command.args(arguments).stdin(Stdio::null()).env_remove("RUST_LOG");
    command
}

pub(crate) fn log(folder: &Path) -> String {
    std::fs::read_to_string(folder.join("log")).unwrap_or_default()
}

/// A file with these services (each with its addresses) and this besides.
pub(crate) fn file(services: &[(&str, &[SocketAddr])], more: &str) -> String {
    let mut text = String::from(
        "listeners.main = { address = \"127.0.0.1:0\" }\nserver = { threads = 2, drain_timeout = \"5s\" }\n",
    );
    let has_admin = more.contains("admin");
    if !has_admin {
        text.push_str("admin = { address = \"127.0.0.1:0\", writable = true }\n");
    }
    for (name, addresses) in services {
        let list: Vec<String> = addresses.iter().map(|address| format!("\"{address}\"")).collect();
        text.push_str(&format!(
            "services.{name} = {{ endpoints = [{}], breaker = {{ failures = 3 }} }}\n",
            list.join(", ")
        ));
    }
    text + more
}

pub(crate) const ALL: &str = "[[routes]]\npath = \"/{*rest}\"\nto = \"a\"\n";
