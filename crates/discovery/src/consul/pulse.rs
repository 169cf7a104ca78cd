//! Whether anything changed anywhere: one signal for all the watches that have no connection of their own.
//!
//! Two blocking queries tell: one over all checks, filtered down to none, and one over the names of all services. Their
//! indexes move with every change of a check or a service. What changed they do not say, so every parked watch asks then.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use futures::{StreamExt, stream};
use tokio::sync::watch;

use super::Consistency;
use super::client::{Client, Path};
use super::index::Index;
use super::pace::Pace;
use crate::Error;
use crate::backoff::Backoff;

/// The signal's receivers. Its task lives as long as somebody listens.
#[derive(Default)]
pub(super) struct Pulse(Mutex<Weak<watch::Sender<()>>>);

/// One of the two queries.
struct Listener {
    client: Arc<Client>,
    path: &'static str,
    index: Index,
    failing: bool,
    backoff: Backoff,
    /// However often the index moves.
    pace: Pace,
}

/// Beats that may follow each other at once, and how often they may after that: each makes every parked watch ask.
const BURST: u32 = 2;
const EVERY: Duration = Duration::from_secs(1);
/// How long the second of the two queries may take to see what the first saw.
const GATHER: Duration = Duration::from_millis(25);

// === impl Pulse ===

impl Pulse {
    pub(super) fn listen(client: &Arc<Client>) -> watch::Receiver<()> {
        let mut pulse = client.pulse.lock();
        if let Some(beat) = pulse.upgrade() {
            return beat.subscribe();
        }
        let (beat, heard) = watch::channel(());
        let beat = Arc::new(beat);
        *pulse = Arc::downgrade(&beat);
        drop(pulse);
        tokio::spawn(run(client.clone(), beat));
        heard
    }

    fn lock(&self) -> MutexGuard<'_, Weak<watch::Sender<()>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The task: beats until nobody listens.
async fn run(client: Arc<Client>, beat: Arc<watch::Sender<()>>) {
    let mut pace = Pace::new(BURST, EVERY);
    // A stale server or a cache may see a change after the signal did.
    let late = matches!(client.config.consistency, Consistency::Stale | Consistency::Cached);
    let changes = |path| stream::unfold(Listener::new(client.clone(), path), Listener::next);
    let mut changes = stream::select(Box::pin(changes(CHECKS)), Box::pin(changes(SERVICES)));
    loop {
        tokio::select! {
            Some(()) = changes.next() => {}
            () = beat.closed() => {
                let mut pulse = client.pulse.lock();
                // Somebody may have begun to listen meanwhile.
                if beat.receiver_count() == 0 {
                    return *pulse = Weak::new();
                }
                continue;
            }
        }
        // One change moves both indexes, and a burst moves them often: one beat for all of it.
        let gather = tokio::time::sleep(pace.take(client.config.clock.now()).max(GATHER));
        tokio::pin!(gather);
        loop {
            tokio::select! {
                Some(()) = changes.next() => {}
                () = &mut gather => break,
            }
        }
        beat.send_replace(());
        if late {
            tokio::time::sleep(EVERY).await;
            beat.send_replace(());
        }
    }
}

const CHECKS: &str = "/v1/health/state/any";
const SERVICES: &str = "/v1/catalog/services";

// === impl Listener ===

impl Listener {
    fn new(client: Arc<Client>, path: &'static str) -> Self {
        Self {
            client,
            path,
            index: Index::default(),
            failing: true,
            backoff: Backoff::new(),
            pace: Pace::new(BURST, EVERY),
        }
    }

    /// Comes back when something may have changed: an index moved, or could not be followed for a while.
    async fn next(mut self) -> Option<((), Self)> {
        loop {
            tokio::time::sleep(self.pace.take(self.client.config.clock.now())).await;
            match self.ask().await {
                Ok(changed) => {
                    self.backoff.reset();
                    if changed {
                        return Some(((), self));
                    }
                }
                Err(error) => {
                    tracing::debug!(%error, "the signal for parked watches fails");
                    self.failing = true;
                    tokio::time::sleep(self.backoff.next(fastrand::f64())).await;
                }
            }
        }
    }

    async fn ask(&mut self) -> Result<bool, Error> {
        let index = if self.failing { None } else { self.index.value() };
        let mut path = Path::new(self.path);
        if self.path == CHECKS {
            path = path.query("filter", "CheckID == \"\"");
        }
        let answer = self.client.signal(path, index).await?.ok()?;
        let moved = self.index.observe(answer.index()) != super::index::Turn::Same;
        Ok(std::mem::take(&mut self.failing) || moved)
    }
}
