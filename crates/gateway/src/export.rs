//! Sends spans to an OpenTelemetry collector, where the program is built to: with the feature `otlp`.

#[cfg(feature = "otlp")]
mod otlp;
#[cfg(feature = "otlp")]
mod spans;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::config::Traces;

#[cfg(feature = "otlp")]
pub(crate) use self::otlp::Exporter;

/// Nothing is exported.
#[cfg(not(feature = "otlp"))]
#[derive(Debug)]
pub(crate) enum Exporter {}

/// What became of spans since the exporter was started.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) exported: AtomicU64,
    /// Those the collector did not take.
    pub(crate) failed: AtomicU64,
    /// Those there was no room for.
    pub(crate) dropped: AtomicU64,
}

/// The exporter that `traces` asks for; the one before, if it is asked for what it was.
#[cfg(feature = "otlp")]
pub(crate) fn exporter(
    traces: &Traces,
    before: Option<(&Traces, &Option<Arc<Exporter>>)>,
) -> Result<Option<Arc<Exporter>>, String> {
    match (&traces.otlp, before) {
        (None, _) => Ok(None),
        (Some(otlp), Some((old, Some(exporter)))) if old.otlp.as_ref() == Some(otlp) => Ok(Some(exporter.clone())),
        (Some(otlp), _) => Exporter::start(otlp).map(|exporter| Some(Arc::new(exporter))),
    }
}

/// None: the file cannot ask for one.
#[cfg(not(feature = "otlp"))]
#[expect(clippy::unnecessary_wraps, reason = "with the feature it can fail")]
pub(crate) fn exporter(
    _: &Traces,
    _: Option<(&Traces, &Option<Arc<Exporter>>)>,
) -> Result<Option<Arc<Exporter>>, String> {
    Ok(None)
}

#[cfg(not(feature = "otlp"))]
impl Exporter {
    pub(crate) fn export(&self, _: crate::observe::Finished) {
        match *self {}
    }

    pub(crate) fn counts(&self) -> &Counts {
        match *self {}
    }

    pub(crate) async fn flush(&self, _: std::time::Duration) {
        match *self {}
    }
}
