//! A program that a test started, and stops by its own process id.

use std::collections::HashSet;
use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::TcpSocket;

/// A running program; dropping it kills it.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

/// A port of the loopback interface that nothing listens on and no other caller in this process was given.
///
/// # Panics
///
/// When there is none.
#[must_use]
pub fn free_port() -> u16 {
    static GIVEN: LazyLock<Mutex<HashSet<u16>>> = LazyLock::new(Mutex::default);
    loop {
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a free port");
        let port = listener.local_addr().expect("a bound socket").port();
        if GIVEN.lock().unwrap_or_else(PoisonError::into_inner).insert(port) {
            return port;
        }
    }
}

/// An address of the loopback interface on which nobody listens, nor can while this lives: a [free port](free_port) may be
/// somebody's a moment later.
#[derive(Debug)]
pub struct Nobody(TcpSocket);

impl Nobody {
    /// Takes a port.
    ///
    /// # Panics
    ///
    /// When there is none.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "each is another")]
    pub fn new() -> Self {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a free port");
        Self(socket)
    }

    /// Where it is.
    ///
    /// # Panics
    ///
    /// Never.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.0.local_addr().expect("a bound socket")
    }
}

/// A new empty folder below the target folder; whoever asks removes it.
///
/// # Panics
///
/// When it cannot be made.
#[must_use]
pub fn scratch_folder(name: &str) -> PathBuf {
    static NEXT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let folder =
        crate::program::target_folder().join("scratch").join(format!("{name}-{}-{number}", std::process::id()));
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).expect("a folder below the target folder");
    folder
}

impl Process {
    /// Starts `command` with its output going to `log`.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    #[must_use]
    pub fn start(mut command: Command, log: &Path) -> Self {
        let file = File::options().create(true).append(true).open(log).expect("a log file");
        let errors = file.try_clone().expect("a second handle on the log file");
        let child = command.stdin(Stdio::null()).stdout(file).stderr(errors).spawn();
        let child = child.unwrap_or_else(|error| panic!("cannot start {:?}: {error}", command.get_program()));
        Self { child, log: log.to_owned() }
    }

    /// Waits until `is_up` says so.
    ///
    /// # Panics
    ///
    /// With the end of its log, when it has exited or is not up after 30 seconds.
    pub async fn until<F: Future<Output = bool>>(&mut self, mut is_up: impl FnMut() -> F) {
        for _ in 0..1200 {
            if is_up().await {
                return;
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                panic!("exited with {status}; it said:\n{}", self.said());
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        panic!("not up after 30 s; it said:\n{}", self.said());
    }

    /// Sends a signal by name, such as `STOP`, `CONT`, `TERM` or `HUP`.
    ///
    /// # Panics
    ///
    /// When it cannot be sent.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").arg(format!("-{name}")).arg(self.child.id().to_string()).status();
        assert!(sent.is_ok_and(|status| status.success()), "cannot send SIG{name}");
    }

    /// Stops it, and waits until each of its threads has stopped, where the system tells: one that still runs might answer.
    ///
    /// # Panics
    ///
    /// When it cannot be stopped.
    pub fn pause(&self) {
        self.signal("STOP");
        let threads = PathBuf::from(format!("/proc/{}/task", self.child.id()));
        let runs = |thread: std::fs::DirEntry| {
            let said = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            // The state follows the name, which is in brackets and may hold anything.
            said.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with(['T', 't']))
        };
        let is_running = || std::fs::read_dir(&threads).is_ok_and(|threads| threads.flatten().any(runs));
        for _ in 0..10_000 {
            if !is_running() {
                return;
            }
            std::thread::yield_now();
        }
        panic!("it goes on");
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it has exited.
    ///
    /// # Panics
    ///
    /// With the end of its log, when it still runs after 30 seconds.
    pub async fn ended(&mut self) -> ExitStatus {
        for _ in 0..1200 {
            if let Ok(Some(status)) = self.child.try_wait() {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        panic!("still there after 30 s; it said:\n{}", self.said());
    }

    /// Kills it at once and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// What it wrote.
    #[must_use]
    pub fn said(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(30).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
