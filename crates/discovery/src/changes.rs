//! Any stream of changes, as other tower crates speak of discovery.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use futures::{FutureExt, Stream, StreamExt, stream};
use portcullis_core::Instance;
use tower::discover::Change;

use crate::{Error, Registry, Watch};

/// A source made of streams of [`Change`], one for each watch.
///
/// A stream tells of differences; what it told is added up here and passed on as a whole, together with whatever else is
/// ready at that moment. Its errors leave what is known as it is, and so does its end: the stream is then made anew, after
/// a pause, and what the new one tells first counts.
///
/// ```
/// use portcullis_core::Instance;
/// use portcullis_discovery::ChangesRegistry;
/// use tower::discover::Change;
///
/// let registry = ChangesRegistry::new(|_service: &str| {
///     let instance = Instance::new("a", "10.0.0.1:80".parse::<std::net::SocketAddr>().unwrap());
///     futures::stream::iter([Ok::<_, std::io::Error>(Change::Insert("a", instance))])
/// });
/// ```
#[derive(Clone)]
pub struct ChangesRegistry<F>(F);

// === impl ChangesRegistry ===

impl<F> ChangesRegistry<F> {
    /// A source whose `changes` makes the stream for a service. The key tells one instance from another.
    #[must_use]
    pub fn new<T, K, E>(changes: F) -> Self
    where
        F: Fn(&str) -> T + Send + Sync + 'static,
        T: Stream<Item = Result<Change<K, Instance>, E>> + Send + 'static,
        K: Ord + Send + 'static,
        E: std::error::Error + Send + Sync + 'static,
    {
        Self(changes)
    }
}

impl<F, T, K, E> Registry for ChangesRegistry<F>
where
    F: Fn(&str) -> T + Send + Sync + 'static,
    T: Stream<Item = Result<Change<K, Instance>, E>> + Send + 'static,
    K: Ord + Send + 'static,
    E: std::error::Error + Send + Sync + 'static,
{
    fn watch(&self, service: &Arc<str>) -> Watch {
        let changes = Box::pin((self.0)(service).fuse());
        Watch::new(stream::unfold((changes, BTreeMap::new(), None), |(mut changes, mut known, failure)| async move {
            if let Some(failure) = failure {
                return Some((Err(failure), (changes, known, None)));
            }
            let mut next = Some(changes.next().await?);
            let (mut changed, mut failure) = (false, None);
            while let Some(change) = next {
                match change {
                    Ok(Change::Insert(key, instance)) => {
                        known.insert(key, instance);
                        changed = true;
                    }
                    Ok(Change::Remove(key)) => {
                        known.remove(&key);
                        changed = true;
                    }
                    Err(error) => {
                        failure = Some(Error::unavailable("the stream of changes failed").with_source(error));
                        break;
                    }
                }
                next = changes.next().now_or_never().flatten();
            }
            match failure.take_if(|_| !changed) {
                Some(failure) => Some((Err(failure), (changes, known, None))),
                // What came before it counts.
                None => Some((Ok(known.values().cloned().collect()), (changes, known, failure))),
            }
        }))
    }
}

impl<F> fmt::Debug for ChangesRegistry<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChangesRegistry").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc;

    fn instance(id: &str) -> Instance {
        Instance::new(id, std::net::SocketAddr::from(([127, 0, 0, 1], 80)))
    }

    #[tokio::test]
    async fn changes_add_up_and_a_burst_is_one_answer() {
        let (say, said) = mpsc::unbounded_channel::<Result<Change<u8, Instance>, std::fmt::Error>>();
        let said = std::sync::Mutex::new(Some(said));
        let registry = ChangesRegistry::new(move |_: &str| {
            let said = said.lock().unwrap().take().unwrap();
            stream::unfold(said, |mut said| async move { said.recv().await.map(|change| (change, said)) })
        });
        let mut watch = registry.watch(&"s".into());
        let mut ids = async || {
            watch
                .next()
                .await
                .map(|answer| answer.map(|all| all.iter().map(|i| i.id.to_string()).collect::<String>()).ok())
        };
        for change in [Change::Insert(1, instance("a")), Change::Insert(2, instance("b")), Change::Remove(1)] {
            say.send(Ok(change)).unwrap();
        }
        assert_eq!(ids().await, Some(Some("b".into())));
        say.send(Ok(Change::Insert(1, instance("c")))).unwrap();
        say.send(Err(std::fmt::Error)).unwrap();
        assert_eq!(ids().await, Some(Some("cb".into())), "what came with the failure is not lost");
        assert_eq!(ids().await, Some(None));
        say.send(Ok(Change::Insert(2, instance("d")))).unwrap();
        assert_eq!(ids().await, Some(Some("cd".into())));
        drop(say);
        assert_eq!(ids().await, None);
    }
}
