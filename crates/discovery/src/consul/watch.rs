//! Follows one service by blocking queries.

use std::sync::Arc;
use std::time::Duration;

use futures::stream;
use portcullis_core::Instance;
use tokio::sync::watch;

use super::Consistency;
use super::answer;
use super::client::{Answer, Client, Lane};
use super::index::{Index, Turn};
use super::pace::Pace;
use super::pulse::Pulse;
use crate::backoff::Backoff;
use crate::{Error, Watch};

struct Follower {
    client: Arc<Client>,
    service: Arc<str>,
    index: Index,
    /// The last answer was none, or there was none yet: ask for everything at once.
    failing: bool,
    /// The registry showed instances, and no sound "none" since.
    known: bool,
    /// The registry's memory began anew while instances were known: "none" proves nothing.
    reset: bool,
    /// The agent's node when instances were last seen.
    identity: Option<String>,
    pause: Duration,
    backoff: Backoff,
    pace: Pace,
    place: Place,
}

/// How a watch waits for the next change.
enum Place {
    /// Not yet decided.
    None,
    /// By a query that blocks.
    Lane(Lane),
    /// By a signal shared with others, because all lanes are taken.
    Parked(watch::Receiver<()>),
}

/// Queries of one service that may follow each other at once, and how often they may after that.
const BURST: u32 = 8;
const EVERY: Duration = Duration::from_millis(250);

pub(super) fn follow(client: Arc<Client>, service: Arc<str>) -> Watch {
    let follower = Follower {
        client,
        service,
        index: Index::default(),
        failing: true,
        known: false,
        reset: false,
        identity: None,
        pause: Duration::ZERO,
        backoff: Backoff::new(),
        pace: Pace::new(BURST, EVERY),
        place: Place::None,
    };
    Watch::new(stream::unfold(follower, |mut follower| async move {
        let answer = follower.next().await;
        Some((answer, follower))
    }))
}

// === impl Follower ===

impl Follower {
    async fn next(&mut self) -> Result<Vec<Instance>, Error> {
        loop {
            let pause = self.pace.take(self.client.config.clock.now());
            tokio::time::sleep(pause.max(std::mem::take(&mut self.pause))).await;
            match self.ask().await {
                Ok(None) => {}
                Ok(Some(instances)) => {
                    self.failing = false;
                    self.backoff.reset();
                    return Ok(instances);
                }
                // The agent answers well, only not yet what counts: the next query blocks.
                Err(error) if error.is_reset() => {
                    self.backoff.reset();
                    return Err(error);
                }
                Err(error) => {
                    self.failing = true;
                    self.pause = self.backoff.next(fastrand::f64());
                    return Err(error);
                }
            }
        }
    }

    /// Asks once; `None` when nothing changed.
    async fn ask(&mut self) -> Result<Option<Vec<Instance>>, Error> {
        let mut answer = self.answer().await?.ok()?;
        let old = matches!(self.client.config.consistency, Consistency::Stale | Consistency::Cached);
        // Answers from the agent's stream do not say whether there is a leader.
        if !answer.has_leader() && !answer.is_streamed() && (!old || self.known) {
            return Err(Error::no_leader("the registry has no leader"));
        }
        let after_failure = self.failing;
        match self.index.observe(answer.index()) {
            Turn::Same if !after_failure => return Ok(None),
            Turn::Same | Turn::Moved => {}
            Turn::Reset => self.reset = self.known,
        }
        let mut instances = answer::instances(&answer.body, &self.client.config.selection)?;
        if instances.is_empty() && answer.is_streamed() {
            answer = self.client.ask_servers(&self.service).await?.ok()?;
            instances = answer::instances(&answer.body, &self.client.config.selection)?;
        }
        if !instances.is_empty() {
            self.saw_instances().await;
            return Ok(Some(instances));
        }
        if answer.is_filtered() {
            return Err(Error::denied("the token may not read the service"));
        }
        if !answer.has_leader() {
            return Err(Error::no_leader("the registry has no leader"));
        }
        if self.known && after_failure && !self.reset {
            self.reset = self.is_another_agent().await?;
        }
        if self.reset {
            self.failing = false;
            return Err(Error::reset("the registry began anew and does not know the service yet"));
        }
        if !self.client.may_read(&self.service).await? {
            return Err(Error::denied("the token may not read the service"));
        }
        self.known = false;
        Ok(Some(instances))
    }

    /// What the agent says: at once if it is not known what it said last, else when that may have changed.
    async fn answer(&mut self) -> Result<Answer, Error> {
        let Some(index) = self.index.value().filter(|_| !self.failing) else {
            return self.client.health(&self.service, None).await;
        };
        if matches!(self.place, Place::None) {
            match self.client.lane() {
                Some(lane) => self.place = Place::Lane(lane),
                None => {
                    // A change may have come before the signal was listened to.
                    self.place = Place::Parked(Pulse::listen(&self.client));
                    return self.client.sweep(&self.service).await;
                }
            }
        }
        if let Place::Parked(beat) = &mut self.place {
            let wait = self.client.config.wait.mul_f64(0.5 + 0.5 * fastrand::f64());
            tokio::select! {
                beat = beat.changed() => if beat.is_err() { self.place = Place::None },
                lane = self.client.next_lane() => self.place = lane.map_or(Place::None, Place::Lane),
                () = tokio::time::sleep(wait) => {}
            }
        }
        match &self.place {
            Place::Lane(lane) => self.client.health(&self.service, Some((index, lane))).await,
            Place::Parked(_) | Place::None => self.client.sweep(&self.service).await,
        }
    }

    async fn saw_instances(&mut self) {
        (self.known, self.reset) = (true, false);
        if self.failing {
            // Not worth a failure: without it only the index tells a new memory.
            self.identity = self.client.identity().await.ok().flatten();
        }
    }

    async fn is_another_agent(&self) -> Result<bool, Error> {
        let Some(before) = &self.identity else { return Ok(false) };
        Ok(self.client.identity().await?.is_some_and(|now| now != *before))
    }
}
