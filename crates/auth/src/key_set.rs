//! The keys a token may be signed with: one snapshot behind one pointer.

use std::fmt;
use std::future::Future;
use std::sync::Arc;

use arc_swap::ArcSwap;
use serde_json::{Map, Value};
use tokio::task::AbortHandle;

use crate::algorithm::Algorithm;
use crate::error::{Error, Kind};
use crate::json;
use crate::key::Key;
use crate::refresh::{Freshness, Refresh};

/// The largest number of keys one set keeps; what comes after is ignored.
pub const MAX_KEYS: usize = 100;

/// What is said of a set that is no good to begin with.
pub(crate) const UNUSABLE: &str = "a key set without a key that can be used";

/// The keys of one issuer: a handle that is cheap to clone, shared by everything that verifies with it.
///
/// Each key is bound to one algorithm when it is loaded; what a token's header says only chooses among them. Readers never
/// lock, and a new set takes the place of the old one in a single swap.
///
/// Keys that come from a [file or a provider](crate::KeySource) are kept fresh by one background task, which ends with the
/// last clone of the handle.
#[derive(Clone)]
pub struct KeySet(Arc<Handle>);

struct Handle {
    shared: Arc<Shared>,
    task: Option<Task>,
}

/// The task that keeps the keys fresh; it ends with this.
struct Task(AbortHandle);

/// What the handles and the task share.
pub(crate) struct Shared {
    keys: ArcSwap<Vec<Arc<Key>>>,
    refresh: Option<Refresh>,
}

/// What a set knows about the key a token names.
pub(crate) enum Lookup {
    Found(Arc<Key>),
    Unknown,
    Ambiguous,
}

// === impl KeySet ===

impl KeySet {
    /// A shared secret.
    ///
    /// # Errors
    ///
    /// [`Error::is_key`] when the algorithm is no HMAC, or the secret is shorter than its hash
    /// ([RFC 7518](https://www.rfc-editor.org/rfc/rfc7518) §3.2: 32, 48 or 64 bytes).
    pub fn hmac(algorithm: Algorithm, secret: impl AsRef<[u8]>) -> Result<Self, Error> {
        Ok(Self::of(vec![Key::hmac(algorithm, secret.as_ref())?]))
    }

    /// A public key as PEM: `PUBLIC KEY`, `RSA PUBLIC KEY`, or the key of a `CERTIFICATE`, whose dates and issuer are not
    /// looked at.
    ///
    /// # Errors
    ///
    /// [`Error::is_key`] when it is not a key for that algorithm, or an RSA key of less than 2048 or more than 8192 bits, or
    /// one that can be factored (ROCA).
    pub fn from_pem(algorithm: Algorithm, pem: impl AsRef<[u8]>) -> Result<Self, Error> {
        Ok(Self::of(vec![Key::pem(algorithm, pem.as_ref())?]))
    }

    /// A single JSON Web Key, bound to this algorithm whatever `alg` it names: for keys that name none, or a wrong one.
    ///
    /// # Errors
    ///
    /// [`Error::is_key`] when it is not a key for that algorithm, or one [`from_jwks`](Self::from_jwks) would leave out.
    pub fn from_jwk(algorithm: Algorithm, jwk: impl AsRef<[u8]>) -> Result<Self, Error> {
        let jwk = json::object(jwk.as_ref()).ok_or_else(|| Error::key("not a JSON Web Key"))?;
        Ok(Self::of(vec![Key::jwk(&jwk, Some(algorithm))?]))
    }

    /// A JSON Web Key Set ([RFC 7517](https://www.rfc-editor.org/rfc/rfc7517) §5), or a single JSON Web Key.
    ///
    /// A key that cannot be used is left out and said so in the log: one for encryption, of an unknown kind or curve, too
    /// weak, with its private half beside it, a shared secret among public keys, or two keys with the same `kid` and
    /// algorithm. An RSA key without `alg` is for RS256; [`from_jwk`](Self::from_jwk) binds it to another.
    ///
    /// # Errors
    ///
    /// [`Error::is_key_set`] when it is not such a document, or no key is left.
    pub fn from_jwks(jwks: impl AsRef<[u8]>) -> Result<Self, Error> {
        let keys = parse(jwks.as_ref(), true)?;
        if keys.is_empty() {
            return Err(Error::new(Kind::KeySet, UNUSABLE));
        }
        Ok(Self::of(keys))
    }

    /// Adds another set's keys. Both must be sets that do not change; to accept the tokens of several sources, say
    /// [`Jwt::also`](crate::Jwt::also) or [`Authenticate::or`](crate::Authenticate::or).
    ///
    /// # Errors
    ///
    /// [`Error::is_key_set`] when both have a key with the same `kid`, or with none, and the same algorithm; [`Error::is_setting`] when either is kept
    /// fresh.
    pub fn with(self, other: &Self) -> Result<Self, Error> {
        if self.is_kept_fresh() || other.is_kept_fresh() {
            return Err(Error::new(Kind::Setting, "keys that are kept fresh cannot be put together with others"));
        }
        let (ours, theirs) = (self.0.shared.keys.load(), other.0.shared.keys.load());
        let keys: Vec<_> = ours.iter().chain(theirs.iter()).cloned().collect();
        for (index, key) in keys.iter().enumerate() {
            if keys[..index].iter().any(|have| have.kid() == key.kid() && have.algorithm() == key.algorithm()) {
                return Err(Error::new(Kind::KeySet, "two keys with the same kid and algorithm"));
            }
        }
        Ok(Self::shared(keys))
    }

    /// Gives the only key of the set an identifier, so that tokens which name another are refused.
    ///
    /// # Errors
    ///
    /// [`Error::is_key_set`] when there is more than one key, or the set is shared or kept fresh; [`Error::is_key`] when `kid`
    /// is longer than 512 bytes.
    pub fn named(self, kid: &str) -> Result<Self, Error> {
        let one_key = || Error::new(Kind::KeySet, "only a set of one key, not yet shared, can be named");
        let handle = Arc::into_inner(self.0).filter(|handle| handle.task.is_none()).ok_or_else(one_key)?;
        let shared = Arc::into_inner(handle.shared).ok_or_else(one_key)?;
        let mut keys = Arc::into_inner(shared.keys.into_inner()).ok_or_else(one_key)?;
        let key = keys.pop().filter(|_| keys.is_empty()).and_then(Arc::into_inner).ok_or_else(one_key)?;
        Ok(Self::of(vec![key.with_kid(kid)?]))
    }

    /// How many keys there are now.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.shared.keys.load().len()
    }

    /// Whether there is none, so that every token is refused.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How the keys are kept fresh; `None` for keys that do not change.
    #[must_use]
    pub fn freshness(&self) -> Option<Freshness> {
        self.0.shared.refresh.as_ref().map(Refresh::freshness)
    }

    fn of(keys: Vec<Key>) -> Self {
        Self::shared(keys.into_iter().map(Arc::new).collect())
    }

    fn shared(keys: Vec<Arc<Key>>) -> Self {
        let shared = Arc::new(Shared { keys: ArcSwap::from_pointee(keys), refresh: None });
        Self(Arc::new(Handle { shared, task: None }))
    }

    /// A set that `task` fills, given what it shares with the handles.
    pub(crate) fn filled_by<F>(
        refresh: Refresh,
        runtime: &tokio::runtime::Handle,
        task: impl FnOnce(Arc<Shared>) -> F,
    ) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let shared = Arc::new(Shared { keys: ArcSwap::default(), refresh: Some(refresh) });
        let task = Task(runtime.spawn(task(shared.clone())).abort_handle());
        Self(Arc::new(Handle { shared, task: Some(task) }))
    }

    pub(crate) fn find(&self, kid: Option<&str>, algorithm: Algorithm) -> Lookup {
        self.0.shared.find(kid, algorithm)
    }

    /// Whether there is somebody to ask for keys that are not known.
    pub(crate) fn is_kept_fresh(&self) -> bool {
        self.0.shared.refresh.is_some()
    }

    /// What to wait for before an unknown key is given up, if anything; it says whether it was over in time.
    pub(crate) fn asking(&self, kid: Option<&str>) -> Option<impl Future<Output = bool> + Send + 'static> {
        self.0.shared.refresh.as_ref()?.ask(kid)
    }

    /// Whether it cannot be told now which keys there are.
    pub(crate) fn is_blind(&self) -> bool {
        self.0.shared.refresh.as_ref().is_some_and(Refresh::is_blind)
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Shared {
    /// Puts new keys in the place of the old ones. Those that stay are the same keys as before, those that go are retired.
    /// Whether anything changed.
    pub(crate) fn replace(&self, new: Vec<Key>) -> bool {
        let old = self.keys.load_full();
        let same = |key: &Key| old.iter().find(|have| have.is_same(key)).cloned();
        let keys: Vec<_> = new.into_iter().map(|key| same(&key).unwrap_or_else(|| Arc::new(key))).collect();
        let gone: Vec<_> = old.iter().filter(|key| !keys.iter().any(|kept| Arc::ptr_eq(kept, key))).collect();
        let changed = !gone.is_empty() || keys.len() != old.len();
        self.keys.store(Arc::new(keys));
        gone.iter().for_each(|key| key.retire());
        changed
    }

    pub(crate) fn len(&self) -> usize {
        self.keys.load().len()
    }

    pub(crate) fn refresh(&self) -> Option<&Refresh> {
        self.refresh.as_ref()
    }

    /// The key named `kid`, else the only one without a name, if it is for `algorithm`. A token without `kid` is checked
    /// with the only key for its algorithm.
    fn find(&self, kid: Option<&str>, algorithm: Algorithm) -> Lookup {
        let keys = self.keys.load();
        let mut fitting = keys
            .iter()
            .filter(|key| key.algorithm() == algorithm && (kid.is_none() || key.kid().is_none() || key.kid() == kid));
        let exact = keys.iter().find(|key| key.algorithm() == algorithm && kid.is_some() && key.kid() == kid);
        if let Some(key) = exact {
            return Lookup::Found(key.clone());
        }
        match (fitting.next(), fitting.next()) {
            (Some(key), None) => Lookup::Found(key.clone()),
            (Some(_), Some(_)) => Lookup::Ambiguous,
            (None, _) => Lookup::Unknown,
        }
    }
}

impl fmt::Debug for KeySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.shared.keys.load().iter()).finish()
    }
}

/// The usable keys of a set or of a single key; none only of a set that says so. Secrets are only ever read from a document
/// the user holds, never from one that was fetched.
pub(crate) fn parse(jwks: &[u8], with_secrets: bool) -> Result<Vec<Key>, Error> {
    let malformed = |what: &str| Error::new(Kind::KeySet, format!("not a key set: {what}"));
    let mut document = json::object(jwks).ok_or_else(|| malformed("no JSON object, or with duplicate members"))?;
    let members = match document.remove("keys") {
        Some(Value::Array(keys)) => keys,
        Some(_) => return Err(malformed("keys is no array")),
        None if document.contains_key("kty") => vec![Value::Object(document)],
        None => return Err(malformed("no keys")),
    };
    let mut keys: Vec<Key> = Vec::new();
    let leave_out = |kid: Option<&str>, reason: &dyn fmt::Display| {
        tracing::warn!(kid, %reason, "a key of the set is left out");
    };
    for member in members.iter().take(MAX_KEYS) {
        let Some(member) = member.as_object() else {
            leave_out(None, &"it is no object");
            continue;
        };
        if members.iter().filter_map(Value::as_object).any(|other| is_rival(member, other)) {
            leave_out(member.get("kid").and_then(Value::as_str), &"another key has the same kid");
            continue;
        }
        match Key::jwk(member, None) {
            Ok(key) => keys.push(key),
            Err(error) => leave_out(member.get("kid").and_then(Value::as_str), &error),
        }
    }
    if members.len() > MAX_KEYS {
        leave_out(None, &format_args!("{} keys are more than {MAX_KEYS}", members.len()));
    }
    // A public document with a secret in it is no secret; and one key must never verify what another was meant for.
    let mixed = keys.iter().any(|key| !key.is_symmetric());
    keys.retain(|key| {
        let keep = !key.is_symmetric() || with_secrets && !mixed;
        if !keep {
            leave_out(key.kid(), &"a shared secret lies among public keys");
        }
        keep
    });
    keys.dedup_by(|a, b| a.is_same(b));
    if keys.is_empty() && !members.is_empty() {
        return Err(Error::new(Kind::KeySet, UNUSABLE));
    }
    Ok(keys)
}

/// Whether two keys of a set could be meant by the same token: one of them is not what it seems, usable or not.
fn is_rival(key: &Map<String, Value>, other: &Map<String, Value>) -> bool {
    let same = |name: &str| key.get(name) == other.get(name);
    let same_algorithm = same("alg") || !key.contains_key("alg") || !other.contains_key("alg");
    key.contains_key("kid") && same("kid") && same("kty") && same_algorithm && key != other
}
