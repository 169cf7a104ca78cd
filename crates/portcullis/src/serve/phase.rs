//! How far the end of a server has come.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use tokio::sync::watch;

/// How far the end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
pub(super) enum Phase {
    Running,
    Draining,
    Over,
}

/// Says how far the end has come.
pub(super) struct Tell {
    watch: watch::Sender<Phase>,
    now: Arc<AtomicU8>,
}

/// Hears it. The number says the same as the channel, for those who look often.
#[derive(Clone)]
pub(super) struct Watch {
    watch: watch::Receiver<Phase>,
    now: Arc<AtomicU8>,
}

// === impl Tell ===

impl Tell {
    pub(super) fn new() -> (Self, Watch) {
        let (watch, watched) = watch::channel(Phase::Running);
        let now = Arc::new(AtomicU8::new(Phase::Running as u8));
        (Self { watch, now: now.clone() }, Watch { watch: watched, now })
    }

    pub(super) fn enter(&self, phase: Phase) {
        self.now.store(phase as u8, Ordering::Release);
        _ = self.watch.send(phase);
    }
}

/// Who waited for the end of the server has gone.
impl Drop for Tell {
    fn drop(&mut self) {
        self.enter(Phase::Over);
    }
}

// === impl Watch ===

impl Watch {
    pub(super) fn now(&self) -> Phase {
        match self.now.load(Ordering::Acquire) {
            0 => Phase::Running,
            1 => Phase::Draining,
            _ => Phase::Over,
        }
    }

    pub(super) async fn leaves(mut self, phase: Phase) {
        _ = self.watch.wait_for(|now| *now > phase).await;
    }

    pub(super) async fn reaches(mut self, phase: Phase) {
        _ = self.watch.wait_for(|now| *now >= phase).await;
    }
}
