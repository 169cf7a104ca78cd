//! Tasks that do one piece of work after the other.
//!
//! A task takes memory that is aligned to two lines of the caches, which allocators are slow to give, and an entry in the
//! runtime's list of tasks: where work is small, that shows.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use pin_project_lite::pin_project;
use portcullis_core::PerThread;

/// What is to be done in a task.
pub(super) trait Work: Send + 'static {
    type Doing: Future<Output = ()> + Send + 'static;

    /// Begins it, in the task.
    fn begin(self) -> Self::Doing;
}

/// Those who work. When the last clone is dropped, they stop once they are done.
pub(super) struct Crew<W: Work>(Arc<Foreman<W>>);

/// Whoever holds this may hand out work.
struct Foreman<W: Work>(Arc<Bench<W>>);

/// Where those sit who have nothing to do.
struct Bench<W>(PerThread<Mutex<Seats<W>>>);

struct Seats<W> {
    taken: Vec<Arc<Post<W>>>,
    is_closed: bool,
}

/// Where one is given work.
struct Post<W>(Mutex<Given<W>>);

struct Given<W> {
    work: Option<W>,
    is_over: bool,
    /// Of one who has nothing to do.
    waker: Waker,
}

pin_project! {
    /// One who works.
    struct Hand<W: Work> {
        bench: Arc<Bench<W>>,
        post: Arc<Post<W>>,
        #[pin]
        doing: Option<W::Doing>,
    }
}

/// So many sit on the bench for each thread; others go.
const SEATS: usize = 128;

// === impl Crew ===

impl<W: Work> Crew<W> {
    pub(super) fn new() -> Self {
        let seats = || Mutex::new(Seats { taken: Vec::new(), is_closed: false });
        Self(Arc::new(Foreman(Arc::new(Bench(PerThread::new(seats))))))
    }

    /// Has it done by one who has nothing to do, else by a new one.
    pub(super) fn hand(&self, work: W) {
        let Foreman(bench) = &*self.0;
        let idle = bench.here().taken.pop();
        match idle {
            Some(post) => post.give(work),
            None => {
                tokio::spawn(Hand { bench: bench.clone(), post: Post::new(work), doing: None });
            }
        }
    }
}

impl<W: Work> Clone for Crew<W> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<W: Work> Drop for Foreman<W> {
    fn drop(&mut self) {
        for seats in self.0.0.iter() {
            let mut seats = lock(seats);
            seats.is_closed = true;
            seats.taken.drain(..).for_each(|post| post.dismiss());
        }
    }
}

// === impl Bench ===

impl<W> Bench<W> {
    fn here(&self) -> MutexGuard<'_, Seats<W>> {
        lock(self.0.here())
    }

    /// Whether there was a seat.
    fn sit(&self, post: &Arc<Post<W>>) -> bool {
        let mut seats = self.here();
        let is_free = !seats.is_closed && seats.taken.len() < SEATS;
        if is_free {
            seats.taken.push(post.clone());
        }
        is_free
    }
}

// === impl Post ===

impl<W> Post<W> {
    fn new(work: W) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Given { work: Some(work), is_over: false, waker: Waker::noop().clone() })))
    }

    fn give(&self, work: W) {
        let mut given = lock(&self.0);
        given.work = Some(work);
        given.waker.wake_by_ref();
    }

    fn dismiss(&self) {
        let mut given = lock(&self.0);
        given.is_over = true;
        given.waker.wake_by_ref();
    }
}

// === impl Hand ===

impl<W: Work> Future for Hand<W> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        loop {
            if let Some(doing) = this.doing.as_mut().as_pin_mut() {
                ready!(doing.poll(cx));
                this.doing.set(None);
                if !this.bench.sit(this.post) {
                    return Poll::Ready(());
                }
            }
            let mut given = lock(&this.post.0);
            match given.work.take() {
                Some(work) => {
                    drop(given);
                    this.doing.set(Some(work.begin()));
                }
                None if given.is_over => return Poll::Ready(()),
                None => {
                    given.waker.clone_from(cx.waker());
                    return Poll::Pending;
                }
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::runtime::Handle;
    use tokio::sync::oneshot;
    use tokio::task::{Id, id, yield_now};

    /// Says in which task it is, and goes on until the other end is dropped.
    struct Job {
        says: oneshot::Sender<Id>,
        until: oneshot::Receiver<()>,
    }

    impl Work for Job {
        type Doing = Pin<Box<dyn Future<Output = ()> + Send>>;

        fn begin(self) -> Self::Doing {
            Box::pin(async move {
                _ = self.says.send(id());
                assert!(self.until.await.is_err(), "told to panic");
            })
        }
    }

    /// The task a job is in, and what ends it.
    async fn begun(crew: &Crew<Job>) -> (Id, oneshot::Sender<()>) {
        let ((says, said), (end, until)) = (oneshot::channel(), oneshot::channel());
        crew.hand(Job { says, until });
        (said.await.unwrap(), end)
    }

    async fn settled() -> usize {
        for _ in 0..10 {
            yield_now().await;
        }
        Handle::current().metrics().num_alive_tasks()
    }

    #[tokio::test]
    async fn who_has_nothing_to_do_is_given_the_next_work() {
        let crew = Crew::new();
        let (first, end) = begun(&crew).await;
        let (second, end_second) = begun(&crew).await;
        assert_ne!(first, second, "the first is busy");
        drop(end);
        assert_eq!(settled().await, 2);
        let (again, _end) = begun(&crew).await;
        assert_eq!(again, first);
        drop(end_second);
        settled().await;
        assert_eq!(begun(&crew).await.0, second);
    }

    #[tokio::test]
    async fn who_finds_no_seat_goes() {
        let crew = Crew::new();
        let mut ends = Vec::new();
        for _ in 0..SEATS + 3 {
            ends.push(begun(&crew).await);
        }
        assert_eq!(settled().await, SEATS + 3);
        drop(ends);
        assert_eq!(settled().await, SEATS);
    }

    #[tokio::test]
    async fn all_go_when_nobody_is_left_to_hand_out_work() {
        let crew = Crew::new();
        let (_, idle) = begun(&crew).await;
        let (_, busy) = begun(&crew).await;
        drop(idle);
        let clone = crew.clone();
        drop(crew);
        assert_eq!(settled().await, 2);
        drop(clone);
        assert_eq!(settled().await, 1, "what was begun is not given up");
        drop(busy);
        assert_eq!(settled().await, 0);
    }

    #[tokio::test]
    async fn one_who_panics_is_given_nothing_more() {
        let crew = Crew::new();
        let (first, end) = begun(&crew).await;
        end.send(()).unwrap();
        assert_eq!(settled().await, 0);
        assert_ne!(begun(&crew).await.0, first);
    }
}
