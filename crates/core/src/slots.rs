//! Typed places where layers keep what belongs to an endpoint or to a snapshot.

use std::any::Any;
use std::fmt;
use std::marker::PhantomData;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Names one layer's place for values of type `T`. A layer makes one and shares it among its services.
pub struct SlotKey<T> {
    id: u64,
    holds: PhantomData<fn() -> T>,
}

/// A short chain that only grows: one link for each layer that keeps something here. Reading takes no lock.
#[derive(Default)]
pub struct Slots(OnceLock<Box<Link>>);

struct Link {
    id: u64,
    value: Box<dyn Any + Send + Sync>,
    next: Slots,
}

// === impl SlotKey ===

impl<T> SlotKey<T> {
    /// A place nothing is in yet.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "each is another one")]
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self { id: NEXT.fetch_add(1, Ordering::Relaxed), holds: PhantomData }
    }
}

impl<T> Clone for SlotKey<T> {
    fn clone(&self) -> Self {
        Self { id: self.id, holds: PhantomData }
    }
}

impl<T> fmt::Debug for SlotKey<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SlotKey").field(&self.id).finish()
    }
}

// === impl Slots ===

impl Slots {
    /// What is in this key's place, if anything yet.
    #[must_use]
    pub fn get<T: Any>(&self, key: &SlotKey<T>) -> Option<&T> {
        let mut slots = self;
        loop {
            let link = slots.0.get()?;
            if link.id == key.id {
                return link.value.downcast_ref();
            }
            slots = &link.next;
        }
    }

    /// What is in this key's place, made when it is first asked for.
    pub fn get_or_init<T: Any + Send + Sync>(&self, key: &SlotKey<T>, make: impl FnOnce() -> T) -> &T {
        if let Some(value) = self.get(key) {
            return value;
        }
        let mut mine = Some(Box::new(Link { id: key.id, value: Box::new(make()), next: Self::default() }));
        let mut slots = self;
        loop {
            if let Some(link) = mine.take() {
                // Full already: walk on with what came back.
                mine = slots.0.set(link).err();
            }
            match slots.0.get() {
                Some(link) if link.id == key.id => match link.value.downcast_ref() {
                    Some(value) => return value,
                    None => unreachable!("a key's id belongs to one type"),
                },
                Some(link) => slots = &link.next,
                None => unreachable!("the slot was just set"),
            }
        }
    }
}

impl fmt::Debug for Slots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slots").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_has_its_own_place() {
        let (slots, a, b) = (Slots::default(), SlotKey::<u8>::new(), SlotKey::<u8>::new());
        assert_eq!(slots.get(&a), None);
        assert_eq!(*slots.get_or_init(&a, || 1), 1);
        assert_eq!(*slots.get_or_init(&b, || 2), 2);
        assert_eq!(*slots.get_or_init(&a, || 3), 1);
        assert_eq!((slots.get(&a), slots.get(&b.clone())), (Some(&1), Some(&2)));
    }

    #[test]
    fn threads_that_race_for_a_place_see_one_value() {
        for _ in 0..100 {
            let (slots, key) = (Slots::default(), SlotKey::<usize>::new());
            let seen: Vec<usize> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..4)
                    .map(|i| {
                        scope.spawn({
                            let (slots, key) = (&slots, &key);
                            move || *slots.get_or_init(key, || i)
                        })
                    })
                    .collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert!(seen.iter().all(|value| value == &seen[0]));
        }
    }
}
