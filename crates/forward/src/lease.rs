//! How a request comes by a connection: one that is free, a new one, or a place among those who wait.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use portcullis_core::{Endpoint, Instance, Protocol, Scheme};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::debug;

use crate::connect::{Dialed, dial};
use crate::failure::{Failure, Kind};
use crate::h1::H1;
use crate::h2::{H2, Sender, StreamPlace};
use crate::pool::Shard;
use crate::stream::Stream;
use portcullis_wire::after;

/// The right to send one request.
pub(crate) enum Lease {
    H1(Box<H1>),
    /// Whether it was used before is said last.
    H2(Sender, StreamPlace, bool),
}

/// Which protocol a request is to be sent by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    H1,
    H2,
    /// Whatever TLS agrees on.
    Agreed,
}

enum Turn<'a> {
    /// There is one by now.
    Have(Lease),
    /// Make one for yourself.
    Alone,
    /// Make one that others wait for.
    ForAll(Dialing<'a>),
    /// Another request is at it.
    Wait,
}

/// Somebody makes an HTTP/2 connection; whether it came to be or not, those who wait must know.
struct Dialing<'a>(&'a Arc<Shard>);

/// Whether the caller was among those who wait.
#[derive(PartialEq, Eq)]
enum Queued {
    Now,
    Already,
}

/// One of those who wait.
struct Waiting<'a>(&'a Shard);

// === impl Want ===

impl Want {
    pub(crate) fn of(instance: &Instance, is_grpc: bool) -> Self {
        match (instance.protocol, instance.scheme) {
            (Protocol::Http1, _) => Self::H1,
            (Protocol::Http2, _) => Self::H2,
            (_, Scheme::Https) => Self::Agreed,
            _ if is_grpc => Self::H2,
            _ => Self::H1,
        }
    }
}

// === impl Shard ===

impl Shard {
    /// A connection, free or new, before `deadline`. A `fresh` one was not used before.
    pub(crate) async fn lease(
        self: &Arc<Self>,
        endpoint: &Endpoint,
        want: Want,
        fresh: bool,
        deadline: Option<Instant>,
    ) -> Result<Lease, Failure> {
        let mut fresh = fresh;
        let mut waiting = None;
        let mut failures = None;
        let mut place = None;
        // Somebody said that a connection came to be unused, and nothing was made of it yet.
        let mut told = false;
        loop {
            let (mut returned, mut room) = (pin!(self.returned.notified()), pin!(self.room.notified()));
            let mut resigned = pin!(self.resigned.notified());
            if want != Want::H2 {
                returned.as_mut().enable();
            }
            if want != Want::H1 {
                room.as_mut().enable();
                resigned.as_mut().enable();
            }
            if !fresh && let Some(lease) = self.take(want, Instant::now()) {
                return Ok(lease);
            }
            let dialing = match self.turn(want, fresh, &mut failures)? {
                Turn::Have(lease) => return Ok(lease),
                Turn::Alone => None,
                Turn::ForAll(dialing) => Some(dialing),
                Turn::Wait => {
                    // Whoever makes the connection has a place of its own, and others may use what came to be unused.
                    place = None;
                    if std::mem::take(&mut told) {
                        self.returned.notify_one();
                    }
                    if self.queue(&mut waiting)? == Queued::Already {
                        fresh = false;
                        tokio::select! {
                            () = returned, if want != Want::H2 => {}
                            () = room => {}
                            () = resigned => {}
                            () = reached(deadline) => return Err(Failure::unsent(Kind::ConnectTimeout)),
                        }
                    }
                    continue;
                }
            };
            returned.as_mut().enable();
            let Some(place) = place.take().or_else(|| self.place()) else {
                if let Some(dialing) = dialing {
                    dialing.resign();
                }
                if let Some(lease) = self.retired(want, Instant::now()) {
                    return Ok(lease);
                }
                if self.queue(&mut waiting)? == Queued::Already {
                    fresh = false;
                    tokio::select! {
                        biased;
                        // For HTTP/2, too: what nobody uses is closed for it.
                        () = returned => told = true,
                        () = room, if want != Want::H1 => {}
                        // Places go to those who wait in turn, so it is kept for what comes next.
                        freed = self.open.clone().acquire_owned() => place = freed.ok(),
                        () = reached(deadline) => return Err(Failure::unsent(Kind::Exhausted)),
                    }
                }
                continue;
            };
            drop(waiting.take());
            let made = by(deadline, self.connect(endpoint, want, place)).await?;
            match &made {
                Ok(lease) if want == Want::Agreed => self.kept().agreed_h2 = Some(matches!(lease, Lease::H2(..))),
                Err(failure) if dialing.is_some() => {
                    let mut kept = self.kept();
                    kept.failures += 1;
                    kept.failure = Some(failure.clone());
                }
                _ => {}
            }
            return made;
        }
    }

    /// Who makes the next connection. One with room for many is made by one request while the others wait for it, and
    /// fails for all of them.
    fn turn<'a>(self: &'a Arc<Self>, want: Want, fresh: bool, failures: &mut Option<u64>) -> Result<Turn<'a>, Failure> {
        let mut kept = self.kept();
        if want == Want::H1 || want == Want::Agreed && kept.agreed_h2 == Some(false) {
            return Ok(Turn::Alone);
        }
        // It may have come to be since it was looked for.
        if !fresh && let Some(lease) = kept.stream(Instant::now(), self.limits.streams, false) {
            return Ok(Turn::Have(lease));
        }
        if failures.is_some_and(|seen| seen != kept.failures)
            && let Some(failure) = &kept.failure
        {
            return Err(failure.clone());
        }
        *failures = Some(kept.failures);
        if kept.h2.iter().any(|h2| !h2.is_settled()) {
            return Ok(Turn::Wait);
        }
        Ok(if std::mem::replace(&mut kept.dialing, true) { Turn::Wait } else { Turn::ForAll(Dialing(self)) })
    }

    /// Counts the caller among those who wait, if there is room. Who was not counted before must look once more: what
    /// became free meanwhile was told to nobody.
    fn queue<'a>(&'a self, waiting: &mut Option<Waiting<'a>>) -> Result<Queued, Failure> {
        if waiting.is_some() {
            return Ok(Queued::Already);
        }
        // `SeqCst`, as where it is read after something became free: one of both sees what the other did.
        let before = self.waiting.fetch_add(1, Ordering::SeqCst);
        let entry = Waiting(self);
        if before >= self.limits.waiting {
            return Err(Failure::unsent(Kind::Exhausted));
        }
        *waiting = Some(entry);
        Ok(Queued::Now)
    }

    /// A connection for a tunnel, which is nobody else's and is counted as long as its place is held.
    pub(crate) async fn open(
        &self,
        endpoint: &Endpoint,
        deadline: Option<Instant>,
    ) -> Result<(Stream, OwnedSemaphorePermit), Failure> {
        let mut waiting = None;
        let place = loop {
            // One that is idle again is closed for it.
            let mut returned = pin!(self.returned.notified());
            returned.as_mut().enable();
            if let Some(place) = self.place() {
                break place;
            }
            if self.queue(&mut waiting)? == Queued::Already {
                tokio::select! {
                    biased;
                    () = returned => {}
                    freed = self.open.clone().acquire_owned() => {
                        break freed.map_err(|_| Failure::unsent(Kind::Exhausted))?;
                    }
                    () = reached(deadline) => return Err(Failure::unsent(Kind::Exhausted)),
                }
            }
        };
        drop(waiting);
        let dialed = by(deadline, self.dial(endpoint, Some(false))).await??;
        Ok((dialed.stream, place))
    }

    async fn dial(&self, endpoint: &Endpoint, h2: Option<bool>) -> Result<Dialed, Failure> {
        let instance = endpoint.instance();
        #[cfg(feature = "tls")]
        let dialed = dial(&instance, h2, &self.lookup, self.limits.tls.as_ref()).await?;
        #[cfg(not(feature = "tls"))]
        let dialed = dial(&instance, h2, &self.lookup).await?;
        debug!(endpoint = &**endpoint.id(), h2 = dialed.h2, "connected");
        Ok(dialed)
    }

    async fn connect(
        self: &Arc<Self>,
        endpoint: &Endpoint,
        want: Want,
        place: OwnedSemaphorePermit,
    ) -> Result<Lease, Failure> {
        let h2 = match want {
            Want::H1 => Some(false),
            Want::H2 => Some(true),
            Want::Agreed => None,
        };
        let dialed = self.dial(endpoint, h2).await?;
        let now = Instant::now();
        let retire = retire(now, self.limits.max_age, fastrand::f64());
        if !dialed.h2 {
            return Ok(Lease::H1(Box::new(H1::new(dialed.stream, self.limits.max_head, retire, now, place))));
        }
        let (h2, stream) = H2::handshake(dialed.stream, &self.limits, self, retire, now, place).await?;
        let lease = Lease::H2(h2.sender(), stream, false);
        self.kept().h2.push(h2);
        self.look_after();
        Ok(lease)
    }
}

// === impl Dialing ===

impl Dialing<'_> {
    /// Leaves it to the others, who wait for a place as well then. They alone are told: whoever waits for a place already
    /// would otherwise be woken by itself.
    fn resign(self) {
        let shard = std::mem::ManuallyDrop::new(self).0;
        shard.kept().dialing = false;
        shard.resigned.notify_waiters();
    }
}

impl Drop for Dialing<'_> {
    fn drop(&mut self) {
        self.0.kept().dialing = false;
        self.0.room.notify_waiters();
    }
}

// === impl Waiting ===

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
        // What came back meanwhile was kept for this one.
        self.0.yield_place();
    }
}

async fn reached(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// What comes of it before the deadline.
async fn by<T>(deadline: Option<Instant>, connected: impl Future<Output = T>) -> Result<T, Failure> {
    match deadline {
        Some(deadline) => timeout_at(deadline, connected).await.map_err(|_| Failure::unsent(Kind::ConnectTimeout)),
        None => Ok(connected.await),
    }
}

/// When a connection takes no more requests. Not all at once: what was opened together would otherwise be reopened
/// together. `chance` is from 0 to 1.
fn retire(now: Instant, max_age: Duration, chance: f64) -> Option<Instant> {
    after(now, max_age).map(|_| now + max_age.mul_f64(0.9 + chance * 0.2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_retire_at_their_age_give_or_take_a_tenth() {
        let now = Instant::now();
        let at = |chance| retire(now, Duration::from_secs(100), chance).unwrap() - now;
        for (chance, seconds) in [(0.0, 90.0), (0.5, 100.0), (1.0, 110.0)] {
            assert!((at(chance).as_secs_f64() - seconds).abs() < 1e-6);
        }
        assert_eq!(retire(now, Duration::MAX, 0.5), None);
    }
}
