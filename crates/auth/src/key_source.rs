//! Where keys come from when they are not in the code, and the task that keeps them fresh.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest;
use portcullis_core::Clock;

use crate::error::{Error, Kind};
#[cfg(feature = "fetch")]
use crate::fetch::Client;
use crate::key_set::{self, KeySet, Shared};
use crate::refresh::Refresh;

/// How often a file is looked at.
pub const FILE_INTERVAL: Duration = Duration::from_secs(10);
/// How long keys are used when their provider does not say.
pub const DEFAULT_LIFETIME: Duration = Duration::from_secs(300);
/// The shortest time between two regular fetches, whatever the provider says.
pub const MIN_LIFETIME: Duration = Duration::from_secs(30);
/// The longest time between two regular fetches, whatever the provider says.
pub const MAX_LIFETIME: Duration = Duration::from_secs(3600);
/// For how long keys are used while their source cannot be read.
pub const DEFAULT_MAX_STALE: Duration = Duration::from_secs(24 * 3600);
/// The shortest time between two fetches for the sake of unknown keys.
pub const DEFAULT_COOLDOWN: Duration = Duration::from_secs(30);
/// The largest document that is read.
pub const MAX_DOCUMENT_BYTES: usize = 256 * 1024;

/// The first pause after a failure; it doubles up to [`MIN_LIFETIME`].
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// A place keys are read from, and how.
///
/// [`start`](Self::start) makes it a [`KeySet`]. One background task reads the keys ahead of their time, and once more when
/// a token names a key that is not known, though not oftener than once per cooldown. While the source cannot be read, or
/// gives nothing that can be used, the last keys go on being used up to a stated age. An empty set is believed: that is how
/// an issuer takes all its keys back. A request waits at most one second for keys.
#[derive(Clone)]
pub struct KeySource {
    place: Place,
    cooldown: Duration,
    max_stale: Duration,
    clock: Clock,
    #[cfg(feature = "fetch")]
    client: Client,
}

#[derive(Clone, Debug)]
enum Place {
    File(PathBuf),
    #[cfg(feature = "fetch")]
    Url(String),
    #[cfg(feature = "fetch")]
    Issuer(String),
}

// === impl KeySource ===

impl KeySource {
    /// A file with a key set in JSON, looked at every ten seconds. Replace it by renaming another over it, so that no half
    /// of it is ever read; a file that cannot be read or used leaves the keys as they were, and one with an empty set none.
    #[must_use]
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self::new(Place::File(path.into()))
    }

    /// A key set at an `https` URL. Redirects are not followed.
    #[cfg(feature = "fetch")]
    #[must_use]
    pub fn url(url: impl Into<String>) -> Self {
        Self::new(Place::Url(url.into()))
    }

    /// The keys of an OpenID provider or OAuth server, found through `/.well-known/openid-configuration` below its issuer
    /// ([OpenID Connect Discovery](https://openid.net/specs/openid-connect-discovery-1_0.html) §4).
    ///
    /// The document must name exactly this issuer, and its `jwks_uri` must be on the same host or on an
    /// [allowed](Self::allow_host) one.
    #[cfg(feature = "fetch")]
    #[must_use]
    pub fn issuer(issuer: impl Into<String>) -> Self {
        Self::new(Place::Issuer(issuer.into()))
    }

    fn new(place: Place) -> Self {
        Self {
            place,
            cooldown: DEFAULT_COOLDOWN,
            max_stale: DEFAULT_MAX_STALE,
            clock: Clock::system(),
            #[cfg(feature = "fetch")]
            client: Client::default(),
        }
    }

    /// How long after a fetch for the sake of an unknown key the next such fetch may follow; 30 s by default.
    #[must_use]
    pub fn cooldown(mut self, cooldown: Duration) -> Self {
        self.cooldown = cooldown;
        self
    }

    /// For how long keys are used while their source cannot be read, counted from when it last could; a day by default.
    /// After that there are none, and requests get 503.
    #[must_use]
    pub fn max_stale(mut self, age: Duration) -> Self {
        self.max_stale = age;
        self
    }

    /// Tells the time by this clock.
    #[must_use]
    pub fn clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// A host besides the issuer's own that its `jwks_uri` may name, such as `www.googleapis.com`.
    #[cfg(feature = "fetch")]
    #[must_use]
    pub fn allow_host(mut self, host: impl Into<String>) -> Self {
        self.client.hosts.push(host.into());
        self
    }

    /// Believes only servers whose certificate leads to one of these, given as PEM, instead of to the system's roots.
    ///
    /// # Errors
    ///
    /// [`Error::is_setting`] when it is not certificates in PEM.
    #[cfg(feature = "fetch")]
    pub fn roots(mut self, pem: impl AsRef<[u8]>) -> Result<Self, Error> {
        self.client.roots(pem.as_ref())?;
        Ok(self)
    }

    /// Reads keys over `http` as well: whoever is on the way then decides whom this service believes.
    #[cfg(feature = "fetch")]
    #[must_use]
    pub fn insecure_http(mut self) -> Self {
        self.client.insecure_http = true;
        self
    }

    /// Starts the task that reads the keys, on the current runtime. It does not wait for them: the first requests do.
    ///
    /// # Errors
    ///
    /// [`Error::is_setting`] outside a tokio runtime, or for a URL that is not `https`; [`Error::is_io`] or
    /// [`Error::is_key_set`] for a file that cannot be read or used now, as one without keys.
    pub fn start(self) -> Result<KeySet, Error> {
        let runtime = tokio::runtime::Handle::try_current();
        let runtime = runtime.map_err(|_| Error::new(Kind::Setting, "keys are read within a tokio runtime"))?;
        let first = match &self.place {
            Place::File(path) => {
                let document = read_file(path)?;
                if key_set::parse(&document, true)?.is_empty() {
                    return Err(Error::new(Kind::KeySet, key_set::UNUSABLE));
                }
                Some(document)
            }
            #[cfg(feature = "fetch")]
            Place::Url(url) | Place::Issuer(url) => {
                self.client.target(url)?;
                None
            }
        };
        let refresh = Refresh::new(self.clock.clone(), self.cooldown);
        Ok(KeySet::filled_by(refresh, &runtime, |shared| {
            let seen = first.and_then(|document| self.settle(&shared, &document).ok());
            self.run(shared, seen)
        }))
    }

    /// The task. It ends with the last handle.
    async fn run(self, shared: Arc<Shared>, mut seen: Option<[u8; 32]>) {
        let Some(refresh) = shared.refresh() else { return };
        let mut pause = FIRST_PAUSE;
        let mut next = Duration::ZERO;
        if seen.is_some() {
            refresh.begin();
            refresh.done(true);
            next = FILE_INTERVAL;
        }
        loop {
            // Whichever comes first: it is time, or somebody asks.
            let _ = tokio::time::timeout(next, refresh.wanted()).await;
            if refresh.is_failing() {
                self.expire(&shared, refresh, &mut seen);
            }
            refresh.begin();
            match self.read_into(&shared, &mut seen).await {
                Ok(lifetime) => {
                    pause = FIRST_PAUSE;
                    next = lifetime;
                    refresh.done(true);
                }
                Err(error) => {
                    tracing::warn!(source = %self, %error, keys = shared.len(), "keys could not be read");
                    let left = self.expire(&shared, refresh, &mut seen);
                    next = left.min(pause.mul_f64(1.0 + fastrand::f64() / 2.0));
                    pause = (pause * 2).min(MIN_LIFETIME);
                    refresh.done(false);
                }
            }
        }
    }

    /// Gives keys up that could not be read again for too long. How long the others still have.
    fn expire(&self, shared: &Shared, refresh: &Refresh, seen: &mut Option<[u8; 32]>) -> Duration {
        match refresh.age().and_then(|age| self.max_stale.checked_sub(age)) {
            Some(left) if !left.is_zero() => left,
            _ => {
                if shared.replace(Vec::new()) {
                    tracing::error!(source = %self, "keys are too old to be used any longer");
                    *seen = None;
                }
                Duration::MAX
            }
        }
    }

    /// Reads the keys once, and says when to do so again.
    async fn read_into(&self, shared: &Shared, seen: &mut Option<[u8; 32]>) -> Result<Duration, Error> {
        let (document, lifetime) = match &self.place {
            Place::File(path) => {
                let path = path.clone();
                let read = tokio::task::spawn_blocking(move || read_file(&path)).await;
                (read.map_err(|_| Error::new(Kind::Io, "the file was not read"))??, FILE_INTERVAL)
            }
            #[cfg(feature = "fetch")]
            Place::Url(url) => ahead(self.client.get(url).await?),
            #[cfg(feature = "fetch")]
            Place::Issuer(issuer) => ahead(self.client.discover(issuer).await?),
        };
        if *seen != Some(hash(&document)) {
            *seen = Some(self.settle(shared, &document)?);
        }
        Ok(lifetime)
    }

    fn settle(&self, shared: &Shared, document: &[u8]) -> Result<[u8; 32], Error> {
        // What is published holds no secrets, and a file the user wrote may.
        let keys = key_set::parse(document, matches!(self.place, Place::File(_)))?;
        if shared.replace(keys) {
            if shared.len() == 0 {
                tracing::warn!(source = %self, "the key set was emptied: no token is accepted");
            } else {
                tracing::info!(source = %self, keys = shared.len(), "keys changed");
            }
            if let Some(refresh) = shared.refresh() {
                refresh.forget();
            }
        }
        Ok(hash(document))
    }
}

/// Ahead of the time at which the keys are over, and not all services at once.
#[cfg(feature = "fetch")]
fn ahead((document, lifetime): (Vec<u8>, Option<Duration>)) -> (Vec<u8>, Duration) {
    let lifetime = lifetime.unwrap_or(DEFAULT_LIFETIME).clamp(MIN_LIFETIME, MAX_LIFETIME);
    (document, lifetime.mul_f64(0.8 + fastrand::f64() / 10.0).max(MIN_LIFETIME))
}

fn hash(document: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest::digest(&digest::SHA256, document).as_ref());
    hash
}

fn read_file(path: &Path) -> Result<Vec<u8>, Error> {
    let unreadable = |error| Error::new(Kind::Io, "the file of keys cannot be read").with_source(error);
    let mut document = Vec::new();
    let file = std::fs::File::open(path).map_err(unreadable)?;
    file.take(MAX_DOCUMENT_BYTES as u64 + 1).read_to_end(&mut document).map_err(unreadable)?;
    if document.len() > MAX_DOCUMENT_BYTES {
        return Err(Error::new(Kind::Io, "the file of keys is too large"));
    }
    Ok(document)
}

/// Where the keys come from.
impl fmt::Display for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::File(path) => path.display().fmt(f),
            #[cfg(feature = "fetch")]
            Place::Url(url) | Place::Issuer(url) => f.write_str(url),
        }
    }
}

impl fmt::Debug for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeySource").field("place", &self.place).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::{Instant, sleep};

    /// To the millisecond, though the tries in between come at chance.
    #[tokio::test(start_paused = true)]
    async fn keys_that_cannot_be_read_again_are_used_until_their_age_is_over() {
        let path = std::env::temp_dir().join(format!("portcullis-{}-{}", std::process::id(), fastrand::u64(..)));
        let secret = "A".repeat(43);
        std::fs::write(&path, format!(r#"{{"keys":[{{"kty":"oct","alg":"HS256","k":"{secret}"}}]}}"#)).unwrap();
        let age = Duration::from_secs(600);
        let keys = KeySource::file(&path).max_stale(age).start().unwrap();
        let before = Instant::now();
        sleep(FILE_INTERVAL * 3 / 2).await;
        std::fs::remove_file(&path).unwrap();
        let last = before + FILE_INTERVAL;
        tokio::time::sleep_until(last + age - Duration::from_millis(50)).await;
        assert_eq!(keys.len(), 1);
        tokio::time::sleep_until(last + age + Duration::from_millis(50)).await;
        assert!(keys.is_empty());
    }
}
