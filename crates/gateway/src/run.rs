//! Runs what a file says until it is told to stop.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use portcullis::serve::Server;
use portcullis_core::FileStamp;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{JoinHandle, JoinSet};

use crate::admin::Admin;
use crate::build::Running;
use crate::config::Config;
use crate::listen::{Door, cannot_listen};
use crate::observe::Observed;
use crate::state::State;

/// The command line or the file is wrong.
pub(crate) const WRONG: u8 = 2;
/// Something it needs is not to be had.
pub(crate) const FAILED: u8 = 1;

/// How often a file that is watched is looked at.
const LOOK: Duration = Duration::from_secs(2);

/// How much of the time to drain is kept for what comes after the last request: the last spans and lines. At most a quarter.
const LAST: Duration = Duration::from_secs(2);

/// How long a second signal waits for the log.
const AT_ONCE: Duration = Duration::from_millis(100);

/// Reads `file` and runs it.
pub(crate) fn file(file: PathBuf) -> ExitCode {
    match Config::load(&file) {
        Ok(config) => run(config, Some(file), |_| {}),
        Err(mistakes) => {
            eprintln!("{mistakes}");
            ExitCode::from(WRONG)
        }
    }
}

/// Runs `config`; `started` is told where it listens.
pub(crate) fn run(config: Config, file: Option<PathBuf>, started: impl FnOnce(&[SocketAddr])) -> ExitCode {
    crate::log::start(&config.log);
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&format!("cannot start: {error}")),
    };
    let (code, left) = runtime.block_on(serve(config, file, started)).unwrap_or_else(|why| (failed(&why), LAST));
    // What still waits, for a registry say, waits in vain.
    runtime.shutdown_background();
    crate::log::flush(left);
    code
}

fn failed(why: &str) -> ExitCode {
    eprintln!("portcullis: {why}");
    ExitCode::from(FAILED)
}

/// Where operators are served.
enum Operators {
    At(Server),
    /// There, once another has left it.
    After(SocketAddr),
    Nowhere,
}

async fn operators(server: Server, state: Arc<State>) -> io::Result<()> {
    let address = server.local_addr()?;
    say!("operators at http://{address}");
    tokio::spawn(crate::notice::watch(state.clone()));
    server.serve(Admin::new(state, address)).await
}

async fn serve(
    config: Config,
    file: Option<PathBuf>,
    started: impl FnOnce(&[SocketAddr]),
) -> Result<(ExitCode, Duration), String> {
    // Everything that can fail comes first, so that nothing is half started.
    let threads = config.server.threads.as_deref().copied();
    let threads = threads.or(std::thread::available_parallelism().ok()).unwrap_or(NonZeroUsize::MIN);
    let doors = Door::all(&config, threads)?;
    let at = *config.admin.address;
    let admin = match config.admin.enabled.then(|| Server::bind(at)) {
        Some(Ok(server)) => Operators::At(server),
        // The process before this one may have it, to the end of its drain.
        Some(Err(error)) if error.kind() == io::ErrorKind::AddrInUse && doors.iter().any(|door| door.shared) => {
            Operators::After(at)
        }
        Some(Err(error)) => return Err(cannot_listen(at, &error)),
        None => Operators::Nowhere,
    };
    let drain_timeout = config.server.drain_timeout;
    let last = LAST.min(drain_timeout / 4);
    let shown = doors.iter().filter_map(|door| Some((door.name.clone(), door.tls.clone()?))).collect();
    let running = Running::build(config, None).map_err(|error| error.to_string())?;
    let state = State::new(running, file, shown);
    // Before anybody can know that it runs, and tell it to stop.
    signals(&state).map_err(|error| format!("cannot listen to signals: {error}"))?;

    let mut addresses = Vec::new();
    let mut serving = JoinSet::new();
    for Door { name, server, address, tls, entry, .. } in doors {
        say!("listening at http{}://{address} ({name})", if tls.is_some() { "s" } else { "" });
        addresses.push(address);
        let registered = entry.map(|entry| crate::listen::register(&state, entry));
        let server = server.graceful(drained(state.clone(), registered, last), drain_timeout - last);
        let observed = Observed::new(state.clone());
        serving.spawn(async move { server.serve(observed).await });
    }
    // The operator's side goes last.
    let admin = match admin {
        Operators::At(server) => {
            addresses.push(server.local_addr().map_err(|error| error.to_string())?);
            Some(tokio::spawn(operators(server, state.clone())))
        }
        Operators::After(address) => {
            say!("operators at http://{address} when the process that listens there has gone");
            let state = state.clone();
            Some(tokio::spawn(async move {
                loop {
                    tokio::time::sleep(LOOK).await;
                    if let Ok(server) = Server::bind(address) {
                        return operators(server, state).await;
                    }
                }
            }))
        }
        Operators::Nowhere => None,
    };
    tokio::spawn(crate::members::expire(state.clone()));
    if state.file.is_some() {
        tokio::spawn(watch(state.clone()));
    }
    started(&addresses);

    let mut failure = None;
    while let Some(ended) = serving.join_next().await {
        if let Err(error) = ended.unwrap_or_else(|error| Err(io::Error::other(error))) {
            failure.get_or_insert(error.to_string());
            state.stop();
        }
    }
    // What is left of the time: half for spans, the rest for lines.
    let exporter = state.running().exporter.clone();
    if let Some(exporter) = exporter {
        exporter.flush(last / 2).await;
    }
    if let Some(admin) = admin {
        admin.abort();
    }
    match failure {
        Some(why) => Err(why),
        None => Ok((ExitCode::SUCCESS, last / 2)),
    }
}

/// Done when the listeners may close: it was told to stop, no registry sends anybody here any more, and those in front have
/// had time to notice.
async fn drained(state: Arc<State>, registered: Option<JoinHandle<()>>, patience: Duration) {
    state.stopping().await;
    if let Some(registered) = registered
        && tokio::time::timeout(patience, registered).await.is_err()
    {
        tracing::warn!("the registry takes its time to let this gateway go: it is not waited for");
    }
    let delay = state.running().config.server.drain_delay;
    tokio::time::sleep(delay).await;
}

/// `TERM` and `INT` stop, a second one at once; `HUP` reads the file again.
fn signals(state: &Arc<State>) -> io::Result<()> {
    let (mut term, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut hangup = signal(SignalKind::hangup())?;
    let state = state.clone();
    tokio::spawn(async move {
        // By a signal: who told it to drain in another way may tell it so as well.
        let mut told = false;
        loop {
            tokio::select! {
                _ = term.recv() => {}
                _ = interrupt.recv() => {}
                _ = hangup.recv() => {
                    // Said by itself, and beside: a file that cannot be read must not keep it from being stopped.
                    let state = state.clone();
                    tokio::spawn(async move { state.reload().await });
                    continue;
                }
            }
            if std::mem::replace(&mut told, true) {
                tracing::warn!("told to stop again: stopping at once");
                crate::log::flush(AT_ONCE);
                std::process::exit(FAILED.into());
            }
            tracing::info!("told to stop: not ready any more");
            state.stop();
        }
    });
    Ok(())
}

/// What has been seen of the files that are watched.
struct Looks<S> {
    /// As they were when they were read. Nothing of those that are looked at for the first time: they may have changed since.
    read: BTreeMap<PathBuf, S>,
    /// As they were at the last look.
    last: BTreeMap<PathBuf, S>,
}

// === impl Looks ===

impl<S: PartialEq> Looks<S> {
    const fn new() -> Self {
        Self { read: BTreeMap::new(), last: BTreeMap::new() }
    }

    /// Whether one of them is not as it was. Nothing unless two looks agree: one is being written.
    fn changed(&mut self, now: BTreeMap<PathBuf, S>) -> Option<bool> {
        if self.last != now {
            self.last = now;
            return None;
        }
        let changed = now.iter().any(|(file, stamp)| self.read.get(file) != Some(stamp));
        self.read.extend(now);
        Some(changed)
    }
}

/// Reads the file again when it, or a secret, key or certificate that it names, has changed, if it wants that.
async fn watch(state: Arc<State>) {
    let look = || {
        let named = state.running().config.files();
        let all = state.file.iter().cloned().chain(named);
        // One that is gone is being written.
        let stamp = |file: PathBuf| std::fs::metadata(&file).ok().map(|about| (file, FileStamp::of(&about)));
        all.filter_map(stamp).collect::<BTreeMap<_, _>>()
    };
    let mut looks = Looks::new();
    // A wrong file may be made right elsewhere: by a key that it names and the running one does not.
    let mut wrong = false;
    loop {
        if let Some(changed) = looks.changed(look())
            && (changed || wrong)
            && state.running().config.server.watch
        {
            let otherwise = state.says_otherwise().await;
            if otherwise.unwrap_or(changed) {
                let _ = state.reload().await;
            }
            wrong = otherwise.is_none();
        }
        tokio::time::sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_changed_when_two_looks_agree_that_it_has() {
        let mut looks = Looks::new();
        // A file and a key, by what stands in them; which of them is there.
        for (now, changed) in [
            (&[("file", 1), ("key", 1)][..], None),
            (&[("file", 1), ("key", 1)], Some(true)),
            (&[("file", 1), ("key", 1)], Some(false)),
            // Half of it, then all.
            (&[("file", 2), ("key", 1)], None),
            (&[("file", 3), ("key", 1)], None),
            (&[("file", 3), ("key", 1)], Some(true)),
            (&[("file", 3), ("key", 1)], Some(false)),
            // Gone for a moment, and another one in its place.
            (&[("file", 3)], None),
            (&[("file", 3)], Some(false)),
            (&[("file", 3), ("key", 2)], None),
            (&[("file", 4), ("key", 2)], None),
            (&[("file", 4), ("key", 2)], Some(true)),
            (&[("file", 3), ("key", 2)], None),
            (&[("file", 4), ("key", 2)], None),
            (&[("file", 4), ("key", 2)], Some(false)),
        ] {
            let look = now.iter().map(|(file, stamp)| (PathBuf::from(file), *stamp)).collect();
            assert_eq!(looks.changed(look), changed, "{now:?}");
        }
    }
}
