//! A real Redis.

use std::net::SocketAddr;
use std::path::PathBuf;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::process::{Process, free_port, scratch_folder};
use crate::program;

/// A Redis of its own, on a free port of the loopback interface, without persistence; dropping it kills it.
#[derive(Debug)]
pub struct Redis {
    process: Option<Process>,
    address: SocketAddr,
    folder: PathBuf,
    arguments: Vec<String>,
}

impl Redis {
    /// One without password.
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// One with command line arguments of its own, such as `--requirepass`.
    ///
    /// # Panics
    ///
    /// When it cannot be had or started.
    pub async fn start_with(arguments: &[&str]) -> Self {
        let mut redis = Self {
            process: None,
            address: SocketAddr::from(([127, 0, 0, 1], free_port())),
            folder: scratch_folder("redis"),
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
        };
        redis.restart().await;
        redis
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where it listens, as a URL.
    #[must_use]
    pub fn url(&self) -> String {
        format!("redis://{}", self.address)
    }

    /// Kills it as a crash would.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Starts it again, empty and on the same port, and waits until it answers.
    ///
    /// # Panics
    ///
    /// When it does not come up.
    pub async fn restart(&mut self) {
        self.process = None;
        let mut command = program::find("redis-server", "redis-server", None).command();
        command.args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--port"]);
        command.arg(self.address.port().to_string()).arg("--dir").arg(&self.folder).args(&self.arguments);
        let mut process = Process::start(command, &self.folder.join("log"));
        let address = self.address;
        process.until(|| answers(address)).await;
        self.process = Some(process);
    }

    /// Stops it from running, as a machine that hangs would.
    ///
    /// # Panics
    ///
    /// When it does not run.
    pub fn pause(&self) {
        self.process.as_ref().expect("a running Redis").pause();
    }

    /// Lets it go on.
    ///
    /// # Panics
    ///
    /// When it does not run.
    pub fn resume(&self) {
        self.process.as_ref().expect("a running Redis").signal("CONT");
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.process = None;
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// Whether it answers at all; a wish for a password is an answer.
async fn answers(address: SocketAddr) -> bool {
    let Ok(mut stream) = TcpStream::connect(address).await else { return false };
    let mut start = [0; 1];
    stream.write_all(b"PING\r\n").await.is_ok() && stream.read_exact(&mut start).await.is_ok()
}
