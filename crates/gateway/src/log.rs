//! What is written to standard error, and how its level is changed while it runs.

use std::sync::{Mutex, OnceLock};

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, reload};

use crate::config::{Log, LogFormat};
use crate::telemetry::lock;

static FILTER: OnceLock<reload::Handle<Targets, Registry>> = OnceLock::new();
/// What is let through now, as it was said.
static LEVEL: Mutex<String> = Mutex::new(String::new());

/// What directives such as `info` or `warn,portcullis_forward=debug` let through; `None` when they are none.
pub(crate) fn filter(directives: &str) -> Option<Targets> {
    // A word alone would be taken for a module.
    let sound = |directive: &str| directive.contains('=') || directive.trim().parse::<LevelFilter>().is_ok();
    directives.split(',').all(sound).then(|| directives.parse().ok()).flatten()
}

/// Begins to write.
pub(crate) fn start(log: &Log) {
    let (filter, handle) = reload::Layer::new(filter(&log.level).unwrap_or_default());
    let _ = FILTER.set(handle);
    log.level.as_str().clone_into(&mut lock(&LEVEL));
    let registry = tracing_subscriber::registry();
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
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
