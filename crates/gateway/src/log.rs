//! What is written to standard error, and how its level is changed while it runs.

mod line;
mod lines;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, reload};

pub(crate) use self::line::{Line, Name, name};
use self::lines::Lines;
use crate::config::{Log, LogFormat};
use crate::telemetry::lock;

static FILTER: OnceLock<reload::Handle<Targets, Registry>> = OnceLock::new();
/// What is let through now, as it was said.
static LEVEL: Mutex<String> = Mutex::new(String::new());
static LINES: Lines = Lines::new(WAITING);
/// Whether lines are JSON.
static JSON: AtomicBool = AtomicBool::new(false);

/// So many bytes may wait to be written.
const WAITING: usize = 4 << 20;

/// What directives such as `info` or `warn,portcullis_forward=debug` let through; `None` when they are none.
pub(crate) fn filter(directives: &str) -> Option<Targets> {
    // A word alone would be taken for a module, and nothing for a level.
    let level = |word: &str| !word.is_empty() && word.parse::<LevelFilter>().is_ok();
    let sound = |directive: &str| directive.contains('=') || level(directive.trim());
    directives.split(',').all(sound).then(|| directives.parse().ok()).flatten()
}

/// Begins to write.
pub(crate) fn start(log: &Log) {
    let (filter, handle) = reload::Layer::new(filter(&log.level).unwrap_or_default());
    let _ = FILTER.set(handle);
    log.level.as_str().clone_into(&mut lock(&LEVEL));
    JSON.store(log.format == LogFormat::Json, Ordering::Relaxed);
    let thread = std::thread::Builder::new().name(String::from("log"));
    if thread.spawn(|| LINES.write_to(io::stderr())).is_err() {
        eprintln!("portcullis: there is no thread to write the log");
    }
    let registry = tracing_subscriber::registry();
    let layer = tracing_subscriber::fmt::layer().with_writer(|| &LINES);
    let started = match log.format {
        LogFormat::Text => registry.with(layer.with_ansi(false).with_filter(filter)).try_init(),
        LogFormat::Json => registry.with(layer.json().flatten_event(true).with_filter(filter)).try_init(),
    };
    // Only in tests has another been set before.
    drop(started);
}

/// Writes what `directives` let through from now on; `false` when they are none.
pub(crate) fn change(directives: &str) -> bool {
    let Some(filter) = filter(directives) else { return false };
    let changed = FILTER.get().is_some_and(|handle| handle.reload(filter).is_ok());
    if changed {
        directives.clone_into(&mut lock(&LEVEL));
    }
    changed
}

/// What is let through now.
pub(crate) fn level() -> String {
    lock(&LEVEL).clone()
}

/// Lines there was no room for.
pub(crate) fn dropped() -> u64 {
    LINES.dropped()
}

/// Waits until what was said is written, but no longer than that.
pub(crate) fn flush(within: Duration) {
    LINES.flush(within);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_are_no_levels_are_no_directives() {
        for sound in ["info", "warn,portcullis_forward=debug", "off", "access=off,info"] {
            assert!(filter(sound).is_some(), "{sound}");
        }
        for wrong in ["", "lots", "info,lots", "a=b=c"] {
            assert!(filter(wrong).is_none(), "{wrong}");
        }
    }
}
