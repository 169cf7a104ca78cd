//! Runs what a file says until it is told to stop.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use portcullis::serve::{ClientCertificates, Server, ServerTls};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;

use crate::admin::Admin;
use crate::build::Running;
use crate::config::{Config, Listener};
use crate::observe::Observed;
use crate::state::State;

/// The command line or the file is wrong.
pub(crate) const WRONG: u8 = 2;
/// Something it needs is not to be had.
pub(crate) const FAILED: u8 = 1;

/// How often a file that is watched is looked at.
const LOOK: Duration = Duration::from_secs(2);

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
    let code = runtime.block_on(serve(config, file, started)).unwrap_or_else(|why| failed(&why));
    // What still waits, for a registry say, waits in vain.
    runtime.shutdown_background();
    crate::log::flush();
    code
}

fn failed(why: &str) -> ExitCode {
    eprintln!("portcullis: {why}");
    ExitCode::from(FAILED)
}

async fn serve(config: Config, file: Option<PathBuf>, started: impl FnOnce(&[SocketAddr])) -> Result<ExitCode, String> {
    // Everything that can fail comes first, so that nothing is half started.
    let threads = config.server.threads.or(std::thread::available_parallelism().ok()).unwrap_or(NonZeroUsize::MIN);
    let mut servers = Vec::new();
    let none = (String::from("main"), default_listener());
    let listeners = config.listeners.iter().map(|(name, one)| (name.clone(), one.clone()));
    let listeners: Vec<_> = if config.listeners.is_empty() { vec![none] } else { listeners.collect() };
    for (name, listener) in listeners {
        servers.push((name, bind(&listener, threads)?, listener.tls.is_some()));
    }
    let admin = match config.admin.enabled {
        true => {
            let address = *config.admin.address;
            Some(Server::bind(address).map_err(|error| cannot_listen(address, &error))?)
        }
        false => None,
    };
    let drain_timeout = config.server.drain_timeout;
    let running = Running::build(config, None).map_err(|error| error.to_string())?;
    let state = State::new(running, file);
    // Before anybody can know that it runs, and tell it to stop.
    signals(&state).map_err(|error| format!("cannot listen to signals: {error}"))?;

    let mut addresses = Vec::new();
    let mut serving = JoinSet::new();
    for (name, server, encrypted) in servers {
        let address = server.local_addr().map_err(|error| error.to_string())?;
        say!("listening at http{}://{address} ({name})", if encrypted { "s" } else { "" });
        addresses.push(address);
        let server = server.graceful(drained(state.clone()), drain_timeout);
        let observed = Observed::new(state.clone());
        serving.spawn(async move { server.serve(observed).await });
    }
    // The operator's side goes last.
    let admin = match admin {
        Some(server) => {
            let address = server.local_addr().map_err(|error| error.to_string())?;
            say!("operators at http://{address}");
            addresses.push(address);
            let service = Admin::new(state.clone(), address);
            tokio::spawn(crate::notice::watch(state.clone()));
            Some(tokio::spawn(server.serve(service)))
        }
        None => None,
    };
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
    let exporter = state.running().exporter.clone();
    if let Some(exporter) = exporter {
        exporter.flush().await;
    }
    if let Some(admin) = admin {
        admin.abort();
    }
    match failure {
        Some(why) => Err(why),
        None => Ok(ExitCode::SUCCESS),
    }
}

/// Where it listens when the file does not say.
fn default_listener() -> Listener {
    Listener::at(SocketAddr::from(([127, 0, 0, 1], 8080)))
}

fn cannot_listen(address: SocketAddr, error: &io::Error) -> String {
    let help = match error.kind() {
        io::ErrorKind::AddrInUse => "; another program listens there",
        io::ErrorKind::PermissionDenied => "; this user may not",
        io::ErrorKind::AddrNotAvailable => "; this machine has no such address",
        _ => "",
    };
    format!("cannot listen at {address}: {error}{help}")
}

fn bind(listener: &Listener, threads: NonZeroUsize) -> Result<Server, String> {
    let address = *listener.address;
    if !listener.reuse_port {
        // The threads share the port, and would share it with a stranger who asked; so see that there is none.
        TcpListener::bind(address).map_err(|error| cannot_listen(address, &error))?;
    }
    let mut server = Server::bind_per_core(address, threads)
        .map_err(|error| cannot_listen(address, &error))?
        .max_connections(listener.max_connections.get())
        .header_timeout(listener.header_timeout)
        .max_head(usize::try_from(listener.max_header_size.0).unwrap_or(usize::MAX))
        .max_streams(listener.max_streams.get());
    if let Some(tls) = tls(listener)? {
        server = server.tls(tls);
    }
    Ok(server)
}

/// What a listener encrypts with.
pub(crate) fn tls(listener: &Listener) -> Result<Option<ServerTls>, String> {
    let Some(tls) = &listener.tls else { return Ok(None) };
    let (chain, key) = (tls.certificate.bytes(), tls.key.bytes());
    let built = match &tls.client_ca {
        Some(ca) => {
            let clients = if tls.require_client { ClientCertificates::Required } else { ClientCertificates::Optional };
            ServerTls::with_client_authorities(chain, key, ca.bytes(), clients)
        }
        None => ServerTls::new(chain, key),
    };
    built.map(Some).map_err(|error| format!("TLS at {}: {error}", *listener.address))
}

/// Done when the listeners may close: it was told to stop, and those in front have had time to notice.
async fn drained(state: Arc<State>) {
    state.stopping().await;
    let delay = state.running().config.server.drain_delay;
    tokio::time::sleep(delay).await;
}

/// `TERM` and `INT` stop, a second one at once; `HUP` reads the file again.
fn signals(state: &Arc<State>) -> io::Result<()> {
    let (mut term, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut hangup = signal(SignalKind::hangup())?;
    let state = state.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = term.recv() => {}
                _ = interrupt.recv() => {}
                _ = hangup.recv() => {
                    // Said by itself.
                    let _ = state.reload().await;
                    continue;
                }
            }
            if state.is_stopping() {
                tracing::warn!("told to stop again: stopping at once");
                crate::log::flush();
                std::process::exit(FAILED.into());
            }
            tracing::info!("told to stop: not ready any more");
            state.stop();
        }
    });
    Ok(())
}

/// Reads the file again when it has changed, if it wants that.
async fn watch(state: Arc<State>) {
    let look = || {
        let about = state.file().and_then(|file| std::fs::metadata(file).ok());
        about.map(|about| (about.modified().ok(), about.len()))
    };
    let mut seen = look();
    loop {
        tokio::time::sleep(LOOK).await;
        let now = look();
        if now.is_some() && now != seen && state.running().config.server.watch {
            let _ = state.reload().await;
        }
        seen = now;
    }
}
