//! Several sources as one.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::{self, BoxStream};
use portcullis_core::Instance;

use crate::backoff::Backoff;
use crate::registry::Pending;
use crate::{Error, Registration, Registry, ServiceDefinition, Watch};

/// All instances that any of several sources knows. Registrations go to the first.
///
/// A source that fails keeps what it last knew. What some know counts once the others have answered or failed, or after half a
/// second. The whole fails when every source does; it soundly knows none when every source soundly knows none. Of one id at one address in several sources, the first counts.
#[derive(Clone)]
pub struct Merged(Vec<Arc<dyn Registry>>);

/// What a first source knows, and what a second knows of services the first has none of. Registrations go to the first.
///
/// The second stands in when the first says soundly that it has none, and while the first has never answered: after half a
/// second, or at its first failure. What the first once knew is kept before the second is asked.
#[derive(Clone)]
pub struct Fallback {
    first: Arc<dyn Registry>,
    second: Arc<dyn Registry>,
}

/// What several sources said last.
struct Said {
    answers: BoxStream<'static, (usize, Result<Vec<Instance>, Error>)>,
    known: Vec<Option<Vec<Instance>>>,
    failing: Vec<bool>,
    patience: Option<std::pin::Pin<Box<tokio::time::Sleep>>>,
}

/// How long those who have an answer wait for the others at the beginning.
const PATIENCE: Duration = Duration::from_millis(500);

/// A watch that does not end: it is made anew after a pause.
fn steady(registry: Arc<dyn Registry>, service: Arc<str>) -> BoxStream<'static, Result<Vec<Instance>, Error>> {
    let watch = registry.watch(&service);
    stream::unfold(
        (registry, service, Some(watch), Backoff::new()),
        |(registry, service, watch, mut backoff)| async move {
            let mut watch = match watch {
                Some(watch) => watch,
                None => {
                    tokio::time::sleep(backoff.next(fastrand::f64())).await;
                    registry.watch(&service)
                }
            };
            match watch.next().await {
                Some(answer) => {
                    if answer.is_ok() {
                        backoff.reset();
                    }
                    Some((answer, (registry, service, Some(watch), backoff)))
                }
                None => Some((Err(Error::unavailable("the watch ended")), (registry, service, None, backoff))),
            }
        },
    )
    .boxed()
}

// === impl Said ===

impl Said {
    fn new(sources: &[Arc<dyn Registry>], service: &Arc<str>) -> Self {
        let answers = sources.iter().enumerate().map(|(number, source)| {
            steady(source.clone(), service.clone()).map(move |answer| (number, answer)).boxed()
        });
        Self {
            answers: stream::select_all(answers).boxed(),
            known: vec![None; sources.len()],
            failing: vec![false; sources.len()],
            patience: Some(Box::pin(tokio::time::sleep(PATIENCE))),
        }
    }

    /// Whether somebody may answer yet who has said nothing so far.
    fn waits(&self) -> bool {
        let mut silent = self.known.iter().zip(&self.failing).map(|(known, failing)| known.is_none() && !failing);
        self.patience.is_some() && silent.any(|silent| silent)
    }

    /// Takes in what is said next; `Err` is what a source failed with.
    async fn next(&mut self) -> Option<Result<(), Error>> {
        let said = match &mut self.patience {
            Some(patience) => tokio::select! {
                said = self.answers.next() => said,
                () = patience => {
                    self.patience = None;
                    return Some(Ok(()));
                }
            },
            None => self.answers.next().await,
        };
        let (number, answer) = said?;
        Some(match answer {
            Ok(instances) => {
                self.known[number] = Some(instances);
                self.failing[number] = false;
                Ok(())
            }
            Err(error) => {
                self.failing[number] = true;
                Err(error)
            }
        })
    }
}

// === impl Merged ===

impl Merged {
    /// What any of `sources` knows.
    #[must_use]
    pub fn new(sources: impl IntoIterator<Item = Arc<dyn Registry>>) -> Self {
        Self(sources.into_iter().collect())
    }
}

impl Registry for Merged {
    fn watch(&self, service: &Arc<str>) -> Watch {
        Watch::new(stream::unfold((Said::new(&self.0, service), true), |(mut said, new)| async move {
            loop {
                match said.next().await? {
                    Err(error) if said.failing.iter().all(|failing| *failing) => {
                        return Some((Err(error), (said, new)));
                    }
                    // The others still tell.
                    Err(error) => {
                        tracing::debug!(%error, "one of several sources fails");
                        if !new {
                            continue;
                        }
                    }
                    Ok(()) => {}
                }
                let all: Vec<_> = said.known.iter().flatten().flatten().cloned().collect();
                let (complete, heard) = (said.known.iter().all(Option::is_some), !said.waits());
                if complete || heard && !all.is_empty() {
                    return Some((Ok(all), (said, false)));
                }
            }
        }))
    }

    fn register(&self, definition: ServiceDefinition) -> Pending<Registration> {
        match self.0.first() {
            Some(first) => first.register(definition),
            None => Box::pin(async { Err(Error::unsupported("there is no source to register with")) }),
        }
    }
}

impl fmt::Debug for Merged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Merged").field("sources", &self.0.len()).finish()
    }
}

// === impl Fallback ===

impl Fallback {
    /// What `first` knows, else what `second` knows.
    #[must_use]
    pub fn new(first: impl Registry, second: impl Registry) -> Self {
        Self { first: Arc::new(first), second: Arc::new(second) }
    }
}

impl Registry for Fallback {
    fn watch(&self, service: &Arc<str>) -> Watch {
        let said = Said::new(&[self.first.clone(), self.second.clone()], service);
        Watch::new(stream::unfold(said, |mut said| async move {
            loop {
                let heard = said.next().await?;
                let [first, second] = said.known.as_slice() else { return None };
                let waiting = said.patience.is_some() && !said.failing[0];
                let chosen = match (first, second) {
                    (Some(first), _) if !first.is_empty() => Some(first),
                    (Some(_), Some(second)) => Some(second),
                    (Some(first), None) if said.failing[1] => Some(first),
                    (None, Some(second)) if !waiting => Some(second),
                    _ => None,
                };
                let first_stands = first.as_ref().is_some_and(|first| !first.is_empty());
                let answer = match (heard, chosen) {
                    (Err(error), None) if said.failing == [true, true] => Err(error),
                    (Err(error), Some(_)) if said.failing[usize::from(!first_stands)] => Err(error),
                    // What the first said last stands, but that the second speaks does not confirm it.
                    (Ok(()), Some(_)) if first_stands && said.failing[0] => continue,
                    (_, Some(chosen)) => Ok(chosen.clone()),
                    (_, None) => continue,
                };
                return Some((answer, said));
            }
        }))
    }

    fn register(&self, definition: ServiceDefinition) -> Pending<Registration> {
        self.first.register(definition)
    }
}

impl fmt::Debug for Fallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fallback").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::{Arc, Duration, Error, Fallback, Instance, Merged, PATIENCE, Registry, Watch, stream};
    use std::sync::Mutex;
    use tokio::sync::mpsc;

    struct Script(Mutex<Option<Said>>);

    type Said = mpsc::UnboundedReceiver<Result<Vec<Instance>, Error>>;

    impl Registry for Script {
        fn watch(&self, _: &Arc<str>) -> Watch {
            let said = self.0.lock().unwrap().take().unwrap();
            Watch::new(stream::unfold(said, |mut said| async move { said.recv().await.map(|answer| (answer, said)) }))
        }
    }

    type Say = mpsc::UnboundedSender<Result<Vec<Instance>, Error>>;

    fn script() -> (Say, Arc<dyn Registry>) {
        let (say, said) = mpsc::unbounded_channel();
        (say, Arc::new(Script(Mutex::new(Some(said)))))
    }

    fn know(say: &Say, ids: &[&str]) {
        let at = std::net::SocketAddr::from(([127, 0, 0, 1], 80));
        say.send(Ok(ids.iter().map(|id| Instance::new(*id, at)).collect())).unwrap();
    }

    fn fail(say: &Say) {
        say.send(Err(Error::unavailable("down"))).unwrap();
    }

    /// The ids that come next; `-` for a failure, `…` when nothing comes.
    async fn next(watch: &mut Watch) -> String {
        match tokio::time::timeout(Duration::from_millis(1), watch.next()).await {
            Ok(Some(Ok(all))) => all.iter().map(|instance| &*instance.id).collect(),
            Ok(Some(Err(_))) => "-".into(),
            Ok(None) => "end".into(),
            Err(_) => "…".into(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn merged_is_the_union_and_fails_when_all_do() {
        let ((a, one), (b, two)) = (script(), script());
        let mut watch = Merged::new([one, two]).watch(&"s".into());
        know(&a, &[]);
        assert_eq!(next(&mut watch).await, "…", "the other may know some");
        know(&b, &["b"]);
        assert_eq!(next(&mut watch).await, "b");
        know(&a, &["a"]);
        assert_eq!(next(&mut watch).await, "ab");
        fail(&a);
        assert_eq!(next(&mut watch).await, "…");
        know(&b, &["c"]);
        assert_eq!(next(&mut watch).await, "ac", "what a failing source knew stays");
        fail(&b);
        assert_eq!(next(&mut watch).await, "-");
        know(&a, &[]);
        assert_eq!(next(&mut watch).await, "c");
        know(&b, &[]);
        assert_eq!(next(&mut watch).await, "", "now it is sound");
    }

    /// Or all that the others know would be gone for a moment, with a pool that goes on by another watch.
    #[tokio::test(start_paused = true)]
    async fn merged_waits_for_all_for_a_while() {
        let ((a, one), (b, two)) = (script(), script());
        let mut watch = Merged::new([one, two]).watch(&"s".into());
        know(&a, &["a"]);
        assert_eq!(next(&mut watch).await, "…", "the other may know more");
        know(&b, &["b"]);
        assert_eq!(next(&mut watch).await, "ab");

        let ((a, one), (b, two)) = (script(), script());
        let mut watch = Merged::new([one, two]).watch(&"s".into());
        know(&a, &["a"]);
        assert_eq!(next(&mut watch).await, "…");
        fail(&b);
        assert_eq!(next(&mut watch).await, "a", "it has failed");
        fail(&b);
        assert_eq!(next(&mut watch).await, "…", "nothing new");

        let ((a, one), (_b, two)) = (script(), script());
        let mut watch = Merged::new([one, two]).watch(&"s".into());
        know(&a, &["a"]);
        assert_eq!(next(&mut watch).await, "…");
        tokio::time::sleep(PATIENCE).await;
        assert_eq!(next(&mut watch).await, "a", "it had its time");
    }

    #[tokio::test(start_paused = true)]
    async fn the_second_stands_in_for_a_first_that_has_none() {
        let ((a, one), (b, two)) = (script(), script());
        let mut watch = Fallback::new(one, two).watch(&"s".into());
        know(&b, &["b"]);
        assert_eq!(next(&mut watch).await, "…", "the first may answer yet");
        know(&a, &["a"]);
        assert_eq!(next(&mut watch).await, "a");
        fail(&a);
        assert_eq!(next(&mut watch).await, "-", "what the first knew stays");
        know(&b, &["c"]);
        assert_eq!(next(&mut watch).await, "…", "and is not confirmed by what the second says");
        know(&a, &[]);
        assert_eq!(next(&mut watch).await, "c");
        know(&b, &[]);
        assert_eq!(next(&mut watch).await, "");
        know(&a, &["d"]);
        assert_eq!(next(&mut watch).await, "d");
    }

    #[tokio::test(start_paused = true)]
    async fn the_second_stands_in_for_a_first_that_never_answered() {
        let ((a, one), (b, two)) = (script(), script());
        let mut watch = Fallback::new(one, two).watch(&"s".into());
        know(&b, &["b"]);
        assert_eq!(next(&mut watch).await, "…");
        tokio::time::sleep(PATIENCE).await;
        assert_eq!(next(&mut watch).await, "b");
        know(&a, &["a"]);
        assert_eq!(next(&mut watch).await, "a");

        let ((a, one), (b, two)) = (script(), script());
        let mut watch = Fallback::new(one, two).watch(&"s".into());
        fail(&a);
        assert_eq!(next(&mut watch).await, "…");
        know(&b, &["b"]);
        assert_eq!(next(&mut watch).await, "b", "at once, for the first has failed");
        fail(&b);
        assert_eq!(next(&mut watch).await, "-");
    }
}
