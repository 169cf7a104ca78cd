//! Services from a file.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use futures::stream;
use portcullis_core::FileStamp;
use serde::Deserialize;
use tokio::sync::watch;

use crate::described::{self, Book};
use crate::{Error, Registry, Watch};

/// Services from a TOML or JSON file, read again when it changes.
///
/// ```toml
/// [[services.orders]]
/// address = "10.0.0.1:8080"
///
/// [[services.orders]]
/// address = "10.0.0.2:8080"
/// id = "orders-2"
/// weight = 5
/// zone = "b"
/// ```
///
/// A name that ends in `.json` is JSON of the same shape. Further keys of an instance are `scheme` (`http`, `https`),
/// `protocol` (`auto`, `http1`, `http2`), `priority`, `tags` and `metadata`.
///
/// The file is looked at twice a second by one task, which ends with the last watch, and read when it stood still between
/// two looks; better replace it by renaming. What cannot be read or understood, to the last entry, is a failure: what was
/// known stays. A service that a readable file does not name has soundly none.
#[derive(Clone, Debug)]
pub struct FileRegistry(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    interval: Duration,
    /// Of the task that looks at the file, while there is one.
    read: Mutex<Weak<watch::Sender<Reading>>>,
}

/// What the file says, if anything yet.
type Reading = Option<Result<Arc<Book>, Error>>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    services: Book,
}

// === impl Inner ===

impl Inner {
    fn reader(&self) -> MutexGuard<'_, Weak<watch::Sender<Reading>>> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl FileRegistry ===

impl FileRegistry {
    /// A source behind the file at `path`, which is read when the first service is watched.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(Arc::new(Inner { path: path.into(), interval: Duration::from_millis(500), read: Mutex::default() }))
    }

    fn listen(&self) -> watch::Receiver<Reading> {
        let mut read = self.0.reader();
        if let Some(read) = read.upgrade() {
            return read.subscribe();
        }
        let (sender, receiver) = watch::channel(None);
        let sender = Arc::new(sender);
        *read = Arc::downgrade(&sender);
        drop(read);
        tokio::spawn(run(self.0.clone(), sender));
        receiver
    }
}

impl Registry for FileRegistry {
    fn watch(&self, service: &Arc<str>) -> Watch {
        let (file, service) = (self.listen(), service.clone());
        Watch::new(stream::unfold((file, service, true), |(mut file, service, first)| async move {
            loop {
                if !(first && file.borrow().is_some()) {
                    file.changed().await.ok()?;
                }
                let answer = match &*file.borrow_and_update() {
                    None => continue,
                    Some(Ok(book)) => described::instances(book.get(&*service).map_or(&[], Vec::as_slice)),
                    Some(Err(error)) => Err(error.clone()),
                };
                return Some((answer, (file, service, false)));
            }
        }))
    }
}

/// The task: looks at the file until nobody listens.
async fn run(inner: Arc<Inner>, reading: Arc<watch::Sender<Reading>>) {
    let (mut read, mut unreadable) = (None, false);
    let mut seen = stamp(&inner.path).await;
    loop {
        let now = stamp(&inner.path).await;
        if read.as_ref() != Some(&now) && seen == now {
            let (said, is_read) = match tokio::fs::read_to_string(&inner.path).await {
                Ok(text) => (understood(&inner.path, &text), true),
                Err(error) => (Err(Error::unavailable("the file cannot be read").with_source(error)), false),
            };
            let old = match &*reading.borrow() {
                Some(Ok(book)) => Some(book.clone()),
                _ => None,
            };
            match &said {
                Ok(book) if old.as_ref() != Some(book) => {
                    tracing::info!(file = %inner.path.display(), services = book.len(), "services read");
                }
                Ok(_) => {}
                Err(_) if !is_read && unreadable => {}
                Err(error) => tracing::warn!(file = %inner.path.display(), %error, "the file cannot be used"),
            }
            unreadable = !is_read;
            reading.send_replace(Some(said));
            // What could not be read is tried again, though it looks the same.
            read = is_read.then_some(now);
        }
        seen = now;
        tokio::select! {
            () = tokio::time::sleep(inner.interval) => {}
            () = reading.closed() => {
                let mut read = inner.reader();
                // Somebody may have begun to listen meanwhile.
                if reading.receiver_count() == 0 {
                    return *read = Weak::new();
                }
            }
        }
    }
}

fn understood(path: &Path, text: &str) -> Result<Arc<Book>, Error> {
    let json = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json"));
    parse(text, json).map(Arc::new)
}

fn parse(text: &str, json: bool) -> Result<Book, Error> {
    let wrong = || Error::unavailable("the file cannot be understood");
    let document: Document = if json {
        serde_json::from_str(text).map_err(|error| wrong().with_source(error))?
    } else {
        toml::from_str(text).map_err(|error| wrong().with_source(error))?
    };
    for instances in document.services.values() {
        described::instances(instances)?;
    }
    Ok(document.services)
}

/// `None` of one that is not there.
async fn stamp(path: &Path) -> Option<FileStamp> {
    tokio::fs::metadata(path).await.ok().map(|metadata| FileStamp::of(&metadata))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn toml_and_json_say_the_same() {
        let toml = "[[services.a]]\naddress = \"10.0.0.1:80\"\nid = \"1\"\nweight = 3\ntags = [\"x\"]\n";
        let json = r#"{"services": {"a": [{"address": "10.0.0.1:80", "id": "1", "weight": 3, "tags": ["x"]}]}}"#;
        let book = parse(toml, false).unwrap();
        assert_eq!(book, parse(json, true).unwrap());
        assert_eq!(described::instances(&book["a"]).unwrap()[0].weight, 3);
    }

    #[test]
    fn one_wrong_entry_spoils_the_file() {
        for wrong in [
            "",
            "[[services.a]]\n",
            "[[services.a]]\naddress = \"nonsense\"\n",
            "[[services.a]]\naddress = \"a:1\"\nwieght = 1\n",
            "[[services.a]]\naddress = \"a:1\"\nscheme = \"ftp\"\n",
            "[[services.a]]\naddress = \"a:1\"\nprotocol = \"smtp\"\n",
            "[[services.a]]\naddress = \"a:1\"\nweight = -1\n",
            "[[service.a]]\naddress = \"a:1\"\n",
        ] {
            assert!(parse(wrong, false).is_err(), "{wrong:?}");
        }
        assert!(parse("[services]\n", false).unwrap().is_empty());
    }
}
