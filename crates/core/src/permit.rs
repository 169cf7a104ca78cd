//! The right to call one endpoint.

use std::fmt;

use crate::gate::{Entry, Pass};
use crate::{Endpoint, InFlight};

/// The right to call one endpoint once, as balance leaves it in the request.
///
/// Dropping it gives the place at the endpoint's gate back. A clone keeps the endpoint and loses the right.
pub struct Permit {
    endpoint: Endpoint,
    entry: Option<Entry>,
    /// What was taken out.
    taken: Option<Entry>,
}

// === impl Permit ===

impl Permit {
    pub(crate) fn new(endpoint: Endpoint, entry: Entry) -> Self {
        Self { endpoint, entry: Some(entry), taken: None }
    }

    /// The endpoint, without the right to call it: who guards it must ask its gate.
    #[must_use]
    pub fn without_right(endpoint: Endpoint) -> Self {
        Self { endpoint, entry: None, taken: None }
    }

    /// The endpoint that was picked.
    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Counts the call as [`Endpoint::begin`] does; the right is given back when the counting ends.
    #[inline]
    pub fn begin(self) -> InFlight {
        InFlight::begin(self)
    }

    /// Takes the right out, if it is still here, and leaves the endpoint.
    pub fn take_pass(&mut self) -> Option<Pass> {
        let entry = self.entry.take()?;
        self.taken = Some(entry);
        Some(Pass::of_endpoint(self.endpoint.clone(), entry))
    }

    /// The same right once more, for a second guard of the same call: if it was [taken](Self::take_pass), whoever took it
    /// holds its place until the call has ended. Dropping this one gives nothing back.
    #[must_use]
    pub fn borrow_pass(&self) -> Option<Pass> {
        Some(Pass::lent(self.endpoint.clone(), self.taken?))
    }
}

impl Clone for Permit {
    fn clone(&self) -> Self {
        Self::without_right(self.endpoint.clone())
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(entry) = self.entry.take() {
            self.endpoint.gate().leave(entry);
        }
    }
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Permit").field("endpoint", &self.endpoint).field("has_right", &self.entry.is_some()).finish()
    }
}

#[cfg(all(test, not(portcullis_loom)))]
mod tests {
    use super::*;
    use crate::{Generation, Instance, Moment, Mover, Ration};
    use std::net::SocketAddr;
    use std::time::Duration;

    #[test]
    fn dropping_a_permit_gives_the_place_back_and_a_clone_has_none() {
        let endpoint = Endpoint::new("s", Instance::new("1", SocketAddr::from(([127, 0, 0, 1], 1))));
        let one = Ration { until: Moment::MIN, places: 1, every: Duration::from_secs(10) };
        endpoint.gate().ration(Mover::new(), Generation::FIRST, one).unwrap();
        let now = || Moment::from_nanos(1);
        let mut permit = endpoint.permit(now).unwrap();
        let mut clone = permit.clone();
        assert!(clone.take_pass().is_none());
        drop(clone);
        assert!(endpoint.permit(now).is_err());
        let pass = permit.take_pass().unwrap();
        drop(permit);
        assert!(endpoint.permit(now).is_err(), "the right was taken, not dropped");
        drop(pass);
        let begun = endpoint.permit(now).unwrap().begin();
        assert!(endpoint.permit(now).is_err() && endpoint.in_flight() == 1);
        drop(begun);
        assert!(endpoint.permit(now).is_ok() && endpoint.in_flight() == 0);
    }

    #[test]
    fn a_right_that_was_taken_serves_a_second_guard_but_no_clone_and_has_one_place() {
        let endpoint = Endpoint::new("s", Instance::new("1", SocketAddr::from(([127, 0, 0, 1], 1))));
        let one = Ration { until: Moment::MIN, places: 1, every: Duration::from_secs(10) };
        endpoint.gate().ration(Mover::new(), Generation::FIRST, one).unwrap();
        let now = || Moment::from_nanos(1);
        let mut permit = endpoint.permit(now).unwrap();
        assert!(permit.borrow_pass().is_none(), "it is there to be taken");
        let pass = permit.take_pass().unwrap();
        let second = permit.borrow_pass().unwrap();
        assert!(second.is_rationed() && second.generation() == pass.generation());
        assert!(permit.clone().borrow_pass().is_none());
        drop(second);
        assert!(endpoint.permit(now).is_err());
        drop(pass);
        assert!(endpoint.permit(now).is_ok());
    }
}
