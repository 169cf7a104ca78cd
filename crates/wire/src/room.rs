//! Room for much that arrives at once, used again.

use std::cell::RefCell;

use bytes::{Buf, Bytes, BytesMut};

thread_local! {
    static SPARE: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
}

/// For a head, and a small body with it.
pub(crate) const LITTLE: usize = 4096;
/// For 64 KiB at once, which is what many write, and a head before them. Twice that would hold twice as much for each body
/// under way, and long ones would not come faster.
pub(crate) const LARGE: usize = 72 * 1024;
/// A thread keeps so many of them: 2.25 MiB.
const KEPT: usize = 32;

/// Room that nobody uses: what was given back last of that, since it is nearest.
pub(crate) fn take() -> BytesMut {
    let spare = SPARE.try_with(|spare| {
        let mut spare = spare.borrow_mut();
        let free = (0..spare.len()).rev().find(|i| spare[*i].try_reclaim(LARGE))?;
        Some(spare.remove(free))
    });
    spare.ok().flatten().unwrap_or_else(|| BytesMut::with_capacity(LARGE))
}

/// Keeps room from which all was taken, until nobody holds a piece of it any more.
pub(crate) fn give_back(room: BytesMut) {
    // A thread that ends keeps nothing.
    _ = SPARE.try_with(|spare| {
        let mut spare = spare.borrow_mut();
        if spare.len() == KEPT {
            // The piece that has been held the longest may be held long.
            spare.remove(0);
        }
        spare.push(room);
    });
}

/// Cuts off what may be held for long. What is less than a fifth of the room that is left, if that is more than 4 KiB, is
/// copied, so that it does not hold that.
pub fn cut(input: &mut BytesMut, length: usize) -> Bytes {
    let room = input.capacity();
    if room <= LITTLE || length >= room / 5 {
        return input.split_to(length).freeze();
    }
    let piece = Bytes::copy_from_slice(&input[..length]);
    input.advance(length);
    piece
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where it lies.
    fn at(room: &BytesMut) -> usize {
        room.as_ptr().addr()
    }

    fn filled(byte: u8) -> (usize, Bytes) {
        let mut room = take();
        let start = at(&room);
        room.extend_from_slice(&[byte; LARGE]);
        let piece = room.split().freeze();
        give_back(room);
        (start, piece)
    }

    #[test]
    fn room_is_used_again_once_nobody_holds_a_piece_of_it() {
        let (first, piece) = filled(1);
        let (second, _) = filled(2);
        assert_ne!(first, second);
        assert_eq!(piece, [1; LARGE][..]);
        assert_eq!(filled(3).0, second, "what was given back last");
        drop(piece);
        let rooms = [take(), take()];
        assert_eq!(rooms.each_ref().map(at), [second, first]);
        assert!(rooms.iter().all(|room| room.is_empty() && room.capacity() >= LARGE));
    }

    #[test]
    fn a_thread_keeps_only_so_much() {
        let held: Vec<_> = (0..2 * KEPT).map(|i| filled(i as u8)).collect();
        SPARE.with(|spare| assert_eq!(spare.borrow().len(), KEPT));
        let last = held.last().map(|(start, _)| *start);
        drop(held);
        assert_eq!(Some(at(&take())), last);
    }

    #[test]
    fn a_piece_holds_no_more_than_five_times_its_size() {
        let cut_off = |mut input: BytesMut, length| {
            input.resize(length + 1, b'x');
            let (start, piece) = (at(&input), cut(&mut input, length));
            assert_eq!((piece.len(), &*input), (length, &b"x"[..]));
            piece.as_ptr().addr() == start
        };
        for (room, length, lies_in_it) in [(LITTLE, 1, true), (LARGE, 100, false), (LARGE, LARGE / 5 - 1, false)] {
            assert_eq!(cut_off(BytesMut::with_capacity(room), length), lies_in_it, "{length} of {room}");
        }
        assert!(cut_off(BytesMut::with_capacity(LARGE), LARGE / 5));
    }
}
