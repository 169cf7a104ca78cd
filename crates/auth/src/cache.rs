//! Tokens that verified, so that the next request with one costs a hash instead of a signature.
//!
//! The key is a 128-bit hash of the whole token under a secret of the process: GHASH, as AES-GCM computes it over its
//! additional data. It is universal under a secret point, and no tag ever leaves, so that nobody can look for two tokens
//! with the same. The version of the rules goes in beside the token: what was believed by other rules is not found.
//!
//! The table has a fixed number of places, four to a set. Readers take no lock and write at most one mark. A place is
//! taken from a token that is over, else from one that was not asked for since the hand last passed.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use portcullis_core::{Identity, PerThread};
use serde_json::Value;

use crate::key::Key;

const WAYS: usize = 4;

/// Places are for tokens of about this size; larger ones leave places empty.
const TYPICAL: usize = 1024;

/// How many places a single insertion looks at to make room.
const SWEEP: usize = 512;

pub(crate) struct TokenCache {
    hash: LessSafeKey,
    places: Box<[Place]>,
    hand: AtomicUsize,
    bytes: AtomicUsize,
    max_bytes: usize,
    found: PerThread<Found>,
}

/// How the memory of tokens that verified does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CacheStats {
    /// Tokens that were remembered.
    pub hits: u64,
    /// Tokens that were not, and had to be verified.
    pub misses: u64,
    /// The memory taken up, in bytes.
    pub bytes: usize,
}

#[derive(Default)]
struct Found {
    hits: AtomicU64,
    misses: AtomicU64,
}

/// The hash of a token and of the rules it was checked by.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tag(u128);

#[derive(Default)]
struct Place {
    /// Half of the entry's tag, to tell without touching the entry that another token is asked for.
    hint: AtomicU64,
    used: AtomicBool,
    entry: ArcSwapOption<Entry>,
}

struct Entry {
    tag: Tag,
    /// Since the epoch.
    until: Duration,
    /// What it verified with; once that is retired, so is this.
    key: Arc<Key>,
    identity: Identity,
    certificate: Option<[u8; 32]>,
    weight: usize,
}

// === impl TokenCache ===

impl TokenCache {
    /// `None` for no bytes, or when the system gives no randomness.
    pub(crate) fn new(max_bytes: usize) -> Option<Self> {
        let places = (max_bytes / (TYPICAL + size_of::<Place>()) / WAYS).checked_ilog2()?;
        let mut secret = [0; 32];
        aws_lc_rs::rand::fill(&mut secret).ok()?;
        let hash = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &secret).ok()?);
        let places: Box<[Place]> = (0..WAYS << places).map(|_| Place::default()).collect();
        let bytes = AtomicUsize::new(places.len() * size_of::<Place>());
        Some(Self { hash, places, hand: AtomicUsize::new(0), bytes, max_bytes, found: PerThread::default() })
    }

    pub(crate) fn tag(&self, version: u64, token: &[u8]) -> Option<Tag> {
        let mut nonce = [0; 12];
        nonce[..8].copy_from_slice(&version.to_le_bytes());
        let nonce = Nonce::assume_unique_for_key(nonce);
        let tag = self.hash.seal_in_place_separate_tag(nonce, Aad::from(token), &mut []).ok()?;
        Some(Tag(u128::from_le_bytes(tag.as_ref().try_into().ok()?)))
    }

    /// What the token proved, if it is still good, and the certificate it must come with.
    pub(crate) fn find(&self, tag: Tag, now: Duration) -> Option<(Identity, Option<[u8; 32]>)> {
        for place in self.set(tag) {
            if place.hint.load(Ordering::Relaxed) != tag.hint() {
                continue;
            }
            if let Some(entry) = &*place.entry.load()
                && entry.tag == tag
                && entry.until > now
                && !entry.key.is_retired()
            {
                if !place.used.load(Ordering::Relaxed) {
                    place.used.store(true, Ordering::Relaxed);
                }
                self.found.here().hits.fetch_add(1, Ordering::Relaxed);
                return Some((entry.identity.clone(), entry.certificate));
            }
        }
        self.found.here().misses.fetch_add(1, Ordering::Relaxed);
        None
    }

    pub(crate) fn stats(&self) -> CacheStats {
        let sum =
            |which: fn(&Found) -> &AtomicU64| self.found.iter().map(|one| which(one).load(Ordering::Relaxed)).sum();
        CacheStats {
            hits: sum(|found| &found.hits),
            misses: sum(|found| &found.misses),
            bytes: self.bytes.load(Ordering::Relaxed),
        }
    }

    /// Keeps what a token proved until it expires.
    pub(crate) fn insert(
        &self,
        tag: Tag,
        identity: Identity,
        certificate: Option<[u8; 32]>,
        until: Duration,
        key: Arc<Key>,
        now: Duration,
    ) {
        let weight = weigh(&identity);
        if !self.make_room(weight, now) {
            return;
        }
        let set = self.set(tag);
        let start = (tag.0 >> 64) as usize;
        let order = || (0..WAYS).map(|way| &set[(start + way) % WAYS]);
        let free = order()
            .find(|place| place.entry.load().as_ref().is_none_or(|entry| entry.tag == tag || entry.is_over(now)));
        // Everybody else gets a second chance, and the next time it is their turn.
        let victim = free.or_else(|| order().find(|place| !place.used.swap(false, Ordering::Relaxed)));
        let place = victim.unwrap_or(&set[start % WAYS]);
        place.hint.store(tag.hint(), Ordering::Relaxed);
        place.used.store(false, Ordering::Relaxed);
        let entry = Entry { tag, until, key, identity, certificate, weight };
        self.bytes.fetch_add(weight, Ordering::Relaxed);
        self.give_back(place.entry.swap(Some(Arc::new(entry))));
    }

    /// Whether `weight` fits, once what nobody asked for was thrown out.
    fn make_room(&self, weight: usize, now: Duration) -> bool {
        let fits = || self.bytes.load(Ordering::Relaxed).saturating_add(weight) <= self.max_bytes;
        for _ in 0..SWEEP {
            if fits() {
                return true;
            }
            let hand = self.hand.fetch_add(1, Ordering::Relaxed) % self.places.len();
            let place = &self.places[hand];
            let over = place.entry.load().as_ref().is_some_and(|entry| entry.is_over(now));
            if over || !place.used.swap(false, Ordering::Relaxed) {
                self.give_back(place.entry.swap(None));
            }
        }
        fits()
    }

    fn give_back(&self, entry: Option<Arc<Entry>>) {
        if let Some(entry) = entry {
            self.bytes.fetch_sub(entry.weight, Ordering::Relaxed);
        }
    }

    fn set(&self, tag: Tag) -> &[Place] {
        let sets = self.places.len() / WAYS;
        let first = (tag.0 as usize & (sets - 1)) * WAYS;
        &self.places[first..first + WAYS]
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.places.iter().filter(|place| place.entry.load().is_some()).count()
    }
}

impl fmt::Debug for TokenCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenCache").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl Tag {
    fn hint(self) -> u64 {
        // Never zero, which is what an empty place has.
        (self.0 >> 64) as u64 | 1
    }
}

impl Entry {
    fn is_over(&self, now: Duration) -> bool {
        self.until <= now || self.key.is_retired()
    }
}

/// About what an entry takes up, allocations included and rather too much.
fn weigh(identity: &Identity) -> usize {
    fn value(of: &Value) -> usize {
        match of {
            Value::Null | Value::Bool(_) | Value::Number(_) => 0,
            Value::String(text) => text.len() + 16,
            Value::Array(values) => 16 + values.iter().map(|item| size_of::<Value>() + value(item)).sum::<usize>(),
            Value::Object(object) => map(object),
        }
    }
    // A node of a B-tree has room for eleven and is at least half full, but for the first.
    fn map(object: &serde_json::Map<String, Value>) -> usize {
        let node = 11 * (size_of::<String>() + size_of::<Value>()) + 64;
        let members = object.iter().map(|(name, item)| name.len() + 16 + value(item)).sum::<usize>();
        object.len().div_ceil(5).max(1) * node + members
    }
    let words = |words: &[String]| words.iter().map(|word| size_of::<String>() + word.len() + 16).sum::<usize>();
    size_of::<Entry>()
        + 256
        + identity.subject().len()
        + identity.issuer().map_or(0, str::len)
        + words(identity.scopes())
        + words(identity.roles())
        + map(identity.claims())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Algorithm;
    use portcullis_core::Proof;

    const NOW: Duration = Duration::from_secs(1000);

    fn key() -> Arc<Key> {
        Arc::new(Key::hmac(Algorithm::HS256, &[1; 32]).unwrap())
    }

    fn insert(cache: &TokenCache, key: &Arc<Key>, token: u32, until: u64) {
        let tag = cache.tag(0, &token.to_le_bytes()).unwrap();
        let identity = Identity::new(token.to_string(), Proof::Jwt);
        cache.insert(tag, identity, None, Duration::from_secs(until), key.clone(), NOW);
    }

    fn find(cache: &TokenCache, token: u32, now: Duration) -> Option<String> {
        let (identity, _) = cache.find(cache.tag(0, &token.to_le_bytes()).unwrap(), now)?;
        Some(identity.subject().to_owned())
    }

    #[test]
    fn a_token_is_found_until_it_expires_or_its_key_is_gone() {
        let (cache, key) = (TokenCache::new(1 << 20).unwrap(), key());
        insert(&cache, &key, 1, 2000);
        assert_eq!(find(&cache, 1, NOW).unwrap(), "1");
        assert_eq!(find(&cache, 2, NOW), None);
        assert!(find(&cache, 1, Duration::from_secs(1999)).is_some());
        assert!(find(&cache, 1, Duration::from_secs(2000)).is_none());
        key.retire();
        assert!(find(&cache, 1, NOW).is_none());
        let stats = cache.stats();
        assert_eq!((stats.hits, stats.misses), (2, 3));
    }

    #[test]
    fn another_version_of_the_rules_finds_nothing() {
        let cache = TokenCache::new(1 << 20).unwrap();
        insert(&cache, &key(), 1, 2000);
        assert!(cache.find(cache.tag(1, &1_u32.to_le_bytes()).unwrap(), NOW).is_none());
        let other = TokenCache::new(1 << 20).unwrap();
        assert!(cache.tag(0, b"a") != other.tag(0, b"a"), "each has its own secret");
        assert!(cache.tag(0, b"a") != cache.tag(0, b"a\0"));
    }

    #[test]
    fn memory_stays_within_its_bound_and_accounts_come_out_even() {
        let (cache, key) = (TokenCache::new(1 << 18).unwrap(), key());
        for token in 0..10_000 {
            insert(&cache, &key, token, 2000);
            assert!(cache.bytes.load(Ordering::Relaxed) <= 1 << 18);
        }
        assert!(cache.len() > 64, "{} is too empty", cache.len());
        let kept: usize =
            cache.places.iter().filter_map(|place| place.entry.load_full()).map(|entry| entry.weight).sum();
        assert_eq!(cache.bytes.load(Ordering::Relaxed), kept + cache.places.len() * size_of::<Place>());
    }

    #[test]
    fn what_is_asked_for_outlives_a_flood() {
        let (cache, key) = (TokenCache::new(1 << 20).unwrap(), key());
        insert(&cache, &key, 0, 2000);
        let mut kept = 0;
        for token in 1..5_000 {
            insert(&cache, &key, token, 2000);
            kept += usize::from(find(&cache, 0, NOW).is_some());
        }
        assert!(kept > 4_900, "gone after {kept}");
    }

    #[test]
    fn threads_find_what_they_put_in_or_nothing_and_accounts_come_out_even() {
        let (cache, key) = (TokenCache::new(1 << 17).unwrap(), key());
        let found: usize = std::thread::scope(|scope| {
            let work = |thread: u32| {
                let (cache, key) = (&cache, &key);
                move || {
                    let token = |n: u32| (n * 7 + thread) % 500;
                    let mut found = 0;
                    for n in 0..5_000 {
                        insert(cache, key, token(n), 2000);
                        // What it put in itself, whatever the others do meanwhile, and what they may have.
                        for token in [token(n), token(n + 250)] {
                            if let Some(subject) = find(cache, token, NOW) {
                                assert_eq!(subject, token.to_string());
                                found += 1;
                            }
                        }
                    }
                    found
                }
            };
            let threads: Vec<_> = (0..4).map(|thread| scope.spawn(work(thread))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert!(found > 100);
        let kept: usize =
            cache.places.iter().filter_map(|place| place.entry.load_full()).map(|entry| entry.weight).sum();
        assert_eq!(cache.bytes.load(Ordering::Relaxed), kept + cache.places.len() * size_of::<Place>());
        assert!(
            cache.bytes.load(Ordering::Relaxed) <= (1 << 17) + 4 * 4096,
            "by no more than what four put in at once"
        );
    }

    #[test]
    fn no_memory_means_no_cache() {
        assert!(TokenCache::new(0).is_none());
        assert!(TokenCache::new(100).is_none());
    }
}
