//! A warm start: what was known before the process ended, while the registry is down.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::stream;
use portcullis_core::Instance;

use crate::described::{self, Book, Described};
use crate::registry::Pending;
use crate::{Error, Registration, Registry, ServiceDefinition, Watch};

/// A registry whose answers are kept in a file, for a process that starts while it is down.
///
/// A watch whose source fails before its first answer, or is silent for half a second, starts with what the file says of the
/// service. From the first answer on, only the source counts. The file is JSON as
/// `FileRegistry` reads it; it is written by renaming, at most once a second, and
/// keeps 4096 services, those it heard of first. Whoever can write it decides where requests go: guard it as you guard the registry.
pub struct Remembered<R> {
    registry: R,
    memory: Arc<Memory>,
}

struct Memory {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    book: Book,
    /// A task will write.
    writing: bool,
    changed: bool,
}

enum Phase {
    /// The source has not answered yet.
    Fresh,
    /// It has failed, which is still to be said.
    Failed(Error),
    Answered,
}

const PATIENCE: Duration = Duration::from_millis(500);
const PAUSE: Duration = Duration::from_secs(1);
const SERVICES: usize = 4096;

// === impl Remembered ===

impl<R: Registry> Remembered<R> {
    /// `registry`, remembered in the file at `path`, which is read now. A file that is missing or cannot be understood is an
    /// empty memory, and the latter is logged.
    #[must_use]
    pub fn new(registry: R, path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        let book = read(&path).unwrap_or_else(|error| {
            tracing::warn!(file = %path.display(), %error, "no warm start");
            Book::new()
        });
        let state = Mutex::new(State { book, ..State::default() });
        Self { registry, memory: Arc::new(Memory { path, state }) }
    }
}

impl<R: Registry> Registry for Remembered<R> {
    fn watch(&self, service: &Arc<str>) -> Watch {
        let (watch, memory, service) = (self.registry.watch(service), self.memory.clone(), service.clone());
        Watch::new(stream::unfold(
            (watch, memory, service, Phase::Fresh),
            |(mut watch, memory, service, phase)| async move {
                let answer = match phase {
                    Phase::Failed(error) => {
                        return Some((Err(error), (watch, memory, service, Phase::Answered)));
                    }
                    Phase::Answered => watch.next().await?,
                    Phase::Fresh => {
                        let first = tokio::time::timeout(PATIENCE, watch.next()).await;
                        let failure = match first {
                            Ok(Some(Ok(instances))) => Ok(instances),
                            Ok(Some(Err(error))) => Err(error),
                            Ok(None) => return None,
                            Err(_) => Err(Error::unavailable("the registry has not answered yet")),
                        };
                        match failure {
                            Ok(instances) => Ok(instances),
                            Err(error) => {
                                let Some(remembered) = memory.recall(&service) else {
                                    return Some((Err(error), (watch, memory, service, Phase::Answered)));
                                };
                                tracing::warn!(service = &*service, endpoints = remembered.len(), %error, "warm start from memory");
                                return Some((Ok(remembered), (watch, memory, service, Phase::Failed(error))));
                            }
                        }
                    }
                };
                if let Ok(instances) = &answer {
                    memory.record(&service, instances);
                }
                Some((answer, (watch, memory, service, Phase::Answered)))
            },
        ))
    }

    fn register(&self, definition: ServiceDefinition) -> Pending<Registration> {
        self.registry.register(definition)
    }
}

impl<R> fmt::Debug for Remembered<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Remembered").field("path", &self.memory.path).finish_non_exhaustive()
    }
}

// === impl Memory ===

impl Memory {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn recall(&self, service: &str) -> Option<Vec<Instance>> {
        let described = self.lock().book.get(service)?.clone();
        described::instances(&described).ok().filter(|instances| !instances.is_empty())
    }

    fn record(self: &Arc<Self>, service: &str, instances: &[Instance]) {
        let described: Vec<_> = instances.iter().map(Described::from).collect();
        let mut state = self.lock();
        let full = state.book.len() >= SERVICES;
        match state.book.get_mut(service) {
            Some(known) if *known == described => return,
            Some(known) if !described.is_empty() => *known = described,
            Some(_) => {
                state.book.remove(service);
            }
            None if described.is_empty() || full => return,
            None => {
                state.book.insert(service.to_owned(), described);
            }
        }
        state.changed = true;
        if !std::mem::replace(&mut state.writing, true) {
            drop(state);
            tokio::spawn(save(Writer { memory: self.clone(), is_done: false }));
        }
    }
}

/// What the task has, which may end with its runtime: then another begins with the next change.
struct Writer {
    memory: Arc<Memory>,
    is_done: bool,
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.is_done {
            self.memory.lock().writing = false;
        }
    }
}

/// The task: writes until nothing changes for a pause.
async fn save(mut writer: Writer) {
    let memory = writer.memory.clone();
    loop {
        tokio::time::sleep(PAUSE).await;
        let book = {
            let mut state = memory.lock();
            if !std::mem::take(&mut state.changed) {
                state.writing = false;
                return writer.is_done = true;
            }
            state.book.clone()
        };
        let path = memory.path.clone();
        let written = tokio::task::spawn_blocking(move || write(&path, &book)).await;
        if let Ok(Err(error)) = written {
            tracing::warn!(file = %memory.path.display(), %error, "what is known could not be remembered");
        }
    }
}

fn write(path: &Path, book: &Book) -> std::io::Result<()> {
    let text = serde_json::to_vec(&BTreeMap::from([("services", book)])).map_err(std::io::Error::other)?;
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    std::fs::write(&part, text)?;
    std::fs::rename(&part, path)
}

fn read(path: &Path) -> Result<Book, Error> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Book::new()),
        Err(error) => return Err(Error::unavailable("the file cannot be read").with_source(error)),
    };
    let mut document: BTreeMap<String, Book> = serde_json::from_slice(&text)
        .map_err(|error| Error::unavailable("the file cannot be understood").with_source(error))?;
    Ok(document.remove("services").unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{EmbeddedRegistry, FixedRegistry};

    struct Down;

    impl Registry for Down {
        fn watch(&self, _: &Arc<str>) -> Watch {
            use futures::StreamExt;
            Watch::new(stream::once(async { Err(Error::unavailable("down")) }).chain(stream::pending()))
        }
    }

    struct Silent;

    impl Registry for Silent {
        fn watch(&self, _: &Arc<str>) -> Watch {
            Watch::new(stream::pending())
        }
    }

    fn scratch() -> PathBuf {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        std::env::temp_dir().join(format!("portcullis-remembered-{}-{number}.json", std::process::id()))
    }

    #[tokio::test]
    async fn what_was_known_starts_a_process_whose_registry_is_down() {
        let path = scratch();
        let fixed = FixedRegistry::new().service("s", ["10.0.0.1:80".parse().unwrap()]);
        let up = Remembered::new(fixed, &path);
        let known = up.watch(&"s".into()).next().await.unwrap().unwrap();
        while !path.exists() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let down = Remembered::new(Down, &path);
        let mut watch = down.watch(&"s".into());
        assert_eq!(watch.next().await.unwrap().unwrap(), known);
        assert!(watch.next().await.unwrap().is_err(), "and the failure is said");
        assert!(down.watch(&"other".into()).next().await.unwrap().is_err());
        let silent = Remembered::new(Silent, &path);
        assert_eq!(silent.watch(&"s".into()).next().await.unwrap().unwrap(), known);
        std::fs::write(&path, "{").unwrap();
        let broken = Remembered::new(Down, &path);
        assert!(broken.watch(&"s".into()).next().await.unwrap().is_err());
        std::fs::remove_file(path).unwrap();
    }

    #[tokio::test]
    async fn a_sound_none_is_forgotten() {
        let path = scratch();
        let embedded = EmbeddedRegistry::new();
        let registry = Remembered::new(embedded.clone(), &path);
        let at = std::net::SocketAddr::from(([127, 0, 0, 1], 80));
        let registration = embedded.register(ServiceDefinition::new("s", "a", at)).await.unwrap();
        let mut watch = registry.watch(&"s".into());
        watch.next().await.unwrap().unwrap();
        assert_eq!(registry.memory.recall("s").unwrap().len(), 1);
        drop(registration);
        watch.next().await.unwrap().unwrap();
        assert!(registry.memory.recall("s").is_none());
    }
}
