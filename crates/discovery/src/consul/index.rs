//! The rules of Consul's blocking queries: what an index means, and how long a call may take.

use std::time::Duration;

/// Where a blocking query goes on.
#[derive(Clone, Debug, Default)]
pub(super) struct Index(u64);

/// What an answer's index says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// The wait was over; nothing changed.
    Same,
    /// Something may have changed.
    Moved,
    /// The registry's memory begins anew.
    Reset,
}

impl Index {
    /// The index to ask with; none for an answer at once.
    pub(super) fn value(&self) -> Option<u64> {
        (self.0 > 0).then_some(self.0)
    }

    /// Takes in the index of an answer. One that is missing or zero counts as one, or the next query would not block.
    pub(super) fn observe(&mut self, index: Option<u64>) -> Turn {
        let index = index.unwrap_or(0).max(1);
        let turn = match self.0 {
            0 => Turn::Moved,
            last if index < last => Turn::Reset,
            last if index == last => Turn::Same,
            _ => Turn::Moved,
        };
        self.0 = if turn == Turn::Reset { 0 } else { index };
        turn
    }
}

/// How long a call may take that may wait for `wait`: the server adds up to a sixteenth, and `margin` is for the rest.
pub(super) fn deadline(wait: Duration, margin: Duration) -> Duration {
    wait.saturating_add(wait / 16).saturating_add(margin)
}

/// A wait as Consul reads it: whole milliseconds, at least one, at most ten minutes.
pub(super) fn wait_parameter(wait: Duration) -> String {
    format!("{}ms", wait.as_millis().clamp(1, 600_000))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_first_answer_moves_and_the_same_index_does_not() {
        let mut index = Index::default();
        assert_eq!((index.value(), index.observe(Some(7)), index.value()), (None, Turn::Moved, Some(7)));
        assert_eq!((index.observe(Some(7)), index.observe(Some(9)), index.value()), (Turn::Same, Turn::Moved, Some(9)));
    }

    #[test]
    fn an_index_that_goes_back_asks_anew() {
        let mut index = Index::default();
        index.observe(Some(38));
        assert_eq!((index.observe(Some(12)), index.value()), (Turn::Reset, None));
        assert_eq!((index.observe(Some(12)), index.value()), (Turn::Moved, Some(12)));
    }

    #[test]
    fn a_missing_or_zero_index_still_blocks() {
        for index in [None, Some(0)] {
            let mut state = Index::default();
            state.observe(index);
            assert_eq!(state.value(), Some(1));
        }
    }

    #[test]
    fn a_call_has_more_time_than_its_wait() {
        assert_eq!(deadline(Duration::from_secs(32), Duration::from_secs(5)), Duration::from_secs(39));
        assert_eq!(wait_parameter(Duration::from_micros(3)), "1ms");
        assert_eq!(wait_parameter(Duration::MAX), "600000ms");
    }

    proptest! {
        #[test]
        fn the_next_query_never_asks_for_more_than_was_seen(seen in proptest::collection::vec(proptest::option::of(0_u64..20), 1..50)) {
            let mut state = Index::default();
            for index in seen {
                let before = state.value();
                let turn = state.observe(index);
                let index = index.unwrap_or(0).max(1);
                prop_assert_eq!(turn == Turn::Reset, before.is_some_and(|before| index < before));
                prop_assert_eq!(state.value(), if turn == Turn::Reset { None } else { Some(index) });
            }
        }
    }
}
