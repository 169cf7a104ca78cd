//! Random numbers drawn a few picks before they are used, so that what they fall on among very many is there by then.

use std::cell::Cell;

/// The numbers of one pick and of two to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Drawn {
    pub(crate) now: u64,
    /// [`SOON`] picks on.
    pub(crate) soon: u64,
    /// [`LATER`] picks on.
    pub(crate) later: u64,
}

/// This thread's numbers, from `next` round.
struct Ahead {
    drawn: [Cell<u64>; LATER],
    /// None is drawn yet while it is beyond the last.
    next: Cell<usize>,
}

/// A pick takes some 40 ns, and memory three or four times as long.
const LATER: usize = 8;
const SOON: usize = 4;

/// Takes this thread's next number.
#[inline]
pub(crate) fn draw() -> Drawn {
    thread_local!(static AHEAD: Ahead = const { Ahead { drawn: [const { Cell::new(0) }; LATER], next: Cell::new(LATER) } });
    AHEAD.with(|ahead| {
        if ahead.next.get() >= LATER {
            ahead.drawn.iter().for_each(|drawn| drawn.set(fastrand::u64(..)));
            ahead.next.set(0);
        }
        let (next, later) = (ahead.next.get(), fastrand::u64(..));
        ahead.next.set((next + 1) % LATER);
        Drawn { now: ahead.drawn[next].replace(later), soon: ahead.drawn[(next + SOON) % LATER].get(), later }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_foretold_comes() {
        let drawn: Vec<_> = (0..100).map(|_| draw()).collect();
        for (i, draw) in drawn.iter().enumerate() {
            assert!(drawn.get(i + SOON).is_none_or(|then| then.now == draw.soon));
            assert!(drawn.get(i + LATER).is_none_or(|then| then.now == draw.later));
        }
        let mut numbers: Vec<_> = drawn.iter().map(|draw| draw.now).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), 100);
    }
}
