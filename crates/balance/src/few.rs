//! What is worked out once for each of a few keys.

use std::fmt;
use std::sync::OnceLock;

/// A short chain that only grows, as [`Slots`](portcullis_core::Slots) do, but by what keys say. Reading takes no lock.
pub(crate) struct Few<K, V>(OnceLock<Box<Link<K, V>>>);

struct Link<K, V> {
    key: K,
    value: V,
    next: Few<K, V>,
}

// === impl Few ===

impl<K: Clone + PartialEq, V> Few<K, V> {
    /// What belongs to `key`, made when it is first asked for. Who asks meanwhile waits.
    pub(crate) fn get_or_init(&self, key: &K, make: impl Fn() -> V) -> &V {
        let mut few = self;
        loop {
            let link = few.0.get_or_init(|| Box::new(Link { key: key.clone(), value: make(), next: Self::default() }));
            if link.key == *key {
                return &link.value;
            }
            few = &link.next;
        }
    }
}

impl<K, V> Default for Few<K, V> {
    fn default() -> Self {
        Self(OnceLock::new())
    }
}

/// Keys may be secrets.
impl<K, V> fmt::Debug for Few<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Few").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn equal_keys_have_one_value_that_is_made_once() {
        let (few, made) = (Few::default(), Cell::new(0));
        let get = |key: &str| {
            *few.get_or_init(&key.to_owned(), || {
                made.set(made.get() + 1);
                made.get()
            })
        };
        assert_eq!(["a", "b", "a", "b", "c"].map(get), [1, 2, 1, 2, 3]);
    }
}
