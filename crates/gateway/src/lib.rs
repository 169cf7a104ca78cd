//! An API gateway from one file: the program `portcullis`, in pieces that can be tested.
//!
//! ```toml
//! [services.orders]
//! endpoints = ["127.0.0.1:9001", "127.0.0.1:9002"]
//! [[routes]]
//! path = "/{*rest}"
//! to = "orders"
//! ```
//!
//! `portcullis run --config gateway.toml` runs that at 127.0.0.1:8080, with a page for operators at 127.0.0.1:9901.
//! `gateway.example.toml` beside this crate says everything a file can say; `portcullis check` says what is wrong with one.
//!
//! # Reload
//!
//! On `HUP`, on `POST /reload` at the operators' side, and with `server.watch` when the file changes, the file is read
//! again. What it says is built beside what runs and put in force in one step, or refused whole. Layers that it says nothing
//! new of are taken over with all they know: counters, breakers, latencies, limits, connections. Requests under way end by
//! the layers they began with. Listeners and their certificates, the operators' address, threads and the log's format count
//! from the next start; the answer says so when they differ.
//!
//! # The end
//!
//! `TERM`, `INT` and `POST /drain` make it not ready. After `server.drain_delay` the listeners close, requests under way have
//! `server.drain_timeout`, and it exits with 0. A second signal ends it at once.
//!
//! | exit code | |
//! |---|---|
//! | 0 | ended as told, or the file is right |
//! | 1 | something it needs is not to be had: a port, a certificate that fits its key |
//! | 2 | the command line or the file is wrong |

/// Prints a line. Nobody to read it is no reason to end.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($text)*);
    }};
}

mod admin;
mod build;
pub mod config;
mod demo;
mod export;
mod log;
mod notice;
mod observe;
mod run;
mod state;
mod telemetry;
mod token;
mod trace;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::Config;

/// An API gateway from one file.
#[derive(Parser)]
#[command(name = "portcullis", version, after_help = SMALL)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs what a file says
    #[command(after_help = SMALL)]
    Run {
        /// The file
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Says everything that is wrong with a file
    Check {
        /// The file
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Runs a gateway before three small backends, with nothing installed
    Demo,
    /// Prints a token to try with
    Token(Box<token::Arguments>),
    /// Prints the JSON schema of the file, from which editors complete
    Schema,
}

const SMALL: &str = "A small file:

    [services.orders]
    endpoints = [\"127.0.0.1:9001\", \"127.0.0.1:9002\"]
    [[routes]]
    path = \"/{*rest}\"
    to = \"orders\"
";

/// What the program does.
#[must_use]
pub fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Run { config } => run::file(config),
        Command::Check { config } => check(&config),
        Command::Demo => demo::run(),
        Command::Token(arguments) => token::print(&arguments),
        Command::Schema => {
            say!("{:#}", Config::json_schema());
            ExitCode::SUCCESS
        }
    }
}

fn check(file: &std::path::Path) -> ExitCode {
    let config = match Config::load(file) {
        Ok(config) => config,
        Err(mistakes) => {
            eprintln!("{mistakes}");
            return ExitCode::from(run::WRONG);
        }
    };
    let (services, routes) = (config.services.len(), config.routes.len());
    // What only shows when it is put together: patterns that contradict each other, keys that do not fit.
    // Nothing is asked of anybody: what would run in it never does.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let _inside = runtime.as_ref().ok().map(tokio::runtime::Runtime::enter);
    let built = config.listeners.values().try_for_each(|listener| run::tls(listener).map(drop));
    match built.and_then(|()| build::Running::build(config, None).map(drop).map_err(|error| error.to_string())) {
        Ok(()) => {
            say!("{} is right: {services} services, {routes} routes", file.display());
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("{}: {why}", file.display());
            ExitCode::from(run::WRONG)
        }
    }
}
