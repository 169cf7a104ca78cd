//! Memory of answers that are out, for requests to come.

use std::cell::RefCell;

use http::Extensions;
use portcullis_core::clear_extensions;

thread_local! {
    static EXTENSIONS: RefCell<Vec<Extensions>> = const { RefCell::new(Vec::new()) };
}

/// A thread keeps the memory of so many.
const KEPT: usize = 64;

/// Nothing but memory, if there is any.
pub(super) fn extensions() -> Extensions {
    EXTENSIONS.try_with(|spare| spare.borrow_mut().pop()).ok().flatten().unwrap_or_default()
}

/// Keeps the memory.
pub(super) fn give_back(mut extensions: Extensions) {
    clear_extensions(&mut extensions);
    // A thread that ends keeps nothing.
    _ = EXTENSIONS.try_with(|spare| {
        let mut spare = spare.borrow_mut();
        if spare.len() < KEPT {
            spare.push(extensions);
        }
    });
}
