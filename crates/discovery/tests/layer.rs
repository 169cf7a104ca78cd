//! The layer, through its public interface.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

use std::borrow::Cow;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use portcullis_core::{Body, Carried, Destination, Endpoints, Instance, Layer as Where, Rejection};
use portcullis_discovery::{
    Discovery, DiscoveryLayer, EmbeddedRegistry, Error, FixedRegistry, Registry, ServiceDefinition, Watch,
};
use tokio::sync::mpsc;
use tower::{Service, ServiceExt};
use tower_layer::Layer;

fn instance(id: &str) -> Instance {
    Instance::new(id, SocketAddr::from(([127, 0, 0, 1], 80)))
}

fn definition(service: &str, id: &str) -> ServiceDefinition {
    ServiceDefinition::of(service, instance(id))
}

fn asking(service: &str) -> Request<()> {
    let mut request = Request::new(());
    Destination::new(service).attach(request.extensions_mut());
    request
}

/// Answers with the ids of the endpoints it was given, or with `-`.
fn echo() -> impl Service<
    Request<()>,
    Response = Response<Full<Bytes>>,
    Error = Infallible,
    Future = impl Future<Output = Result<Response<Full<Bytes>>, Infallible>> + Send,
> + Clone
+ Send
+ Sync {
    tower::service_fn(async |request: Request<()>| {
        let ids = Endpoints::of(request.extensions()).map_or("-".to_owned(), |endpoints| {
            endpoints.iter().map(|endpoint| &**endpoint.id()).collect::<Vec<_>>().join(",")
        });
        Ok(Response::new(Full::from(ids)))
    })
}

async fn text(response: Response<Body<Full<Bytes>>>) -> String {
    use http_body_util::BodyExt;
    String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
}

fn reason(response: &Response<Body<Full<Bytes>>>) -> &'static str {
    let rejection = response.extensions().get::<Rejection>().expect("a refusal");
    assert_eq!((rejection.layer(), response.status().as_u16()), (Where::Discovery, 503));
    rejection.reason()
}

/// A registry that says what it is told, and counts its watches.
#[derive(Clone, Default)]
struct Scripted(Arc<Inner>);

#[derive(Default)]
struct Inner {
    watches: AtomicUsize,
    living: Arc<()>,
    scripts: Mutex<VecDeque<mpsc::UnboundedReceiver<Said>>>,
}

type Said = Result<Vec<Instance>, Error>;

impl Scripted {
    /// What the next watch will say.
    fn script(&self) -> mpsc::UnboundedSender<Said> {
        let (say, said) = mpsc::unbounded_channel();
        self.0.scripts.lock().unwrap().push_back(said);
        say
    }

    fn watches(&self) -> usize {
        self.0.watches.load(Ordering::Relaxed)
    }

    fn living(&self) -> usize {
        Arc::strong_count(&self.0.living) - 1
    }
}

impl Registry for Scripted {
    fn watch(&self, _: &Arc<str>) -> Watch {
        self.0.watches.fetch_add(1, Ordering::Relaxed);
        let said = self.0.scripts.lock().unwrap().pop_front();
        let living = self.0.living.clone();
        match said {
            Some(said) => Watch::new(futures::stream::unfold((said, living), |(mut said, living)| async move {
                said.recv().await.map(|answer| (answer, (said, living)))
            })),
            None => Watch::new(futures::stream::unfold(living, async |_living| std::future::pending().await)),
        }
    }
}

async fn settle() {
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_gets_the_endpoints_of_its_destination() {
    let registry = FixedRegistry::new().instances("a", [instance("a1")]).instances("b", [instance("b1")]);
    let service = DiscoveryLayer::new(registry).layer(echo());
    assert_eq!(text(service.clone().oneshot(asking("a")).await.unwrap()).await, "a1");
    assert_eq!(text(service.clone().oneshot(asking("b")).await.unwrap()).await, "b1");
    assert_eq!(text(service.oneshot(Request::new(())).await.unwrap()).await, "-", "no name passes on");
}

#[tokio::test(start_paused = true)]
async fn the_name_may_be_fixed_or_made_of_the_request() {
    let registry = FixedRegistry::new().instances("a", [instance("a1")]);
    let fixed = DiscoveryLayer::new(registry.clone()).service("a").layer(echo());
    assert_eq!(text(fixed.oneshot(asking("other")).await.unwrap()).await, "a1");
    let named = DiscoveryLayer::new(registry)
        .service_by(|request: &Request<()>| request.headers().get("x-service")?.to_str().ok().map(Cow::Borrowed))
        .layer(echo());
    let request = Request::builder().header("x-service", "a").body(()).unwrap();
    assert_eq!(text(named.clone().oneshot(request).await.unwrap()).await, "a1");
    assert_eq!(text(named.oneshot(Request::new(())).await.unwrap()).await, "-");
}

#[tokio::test(start_paused = true)]
async fn a_shared_dyn_registry_will_do_and_changes_are_seen() {
    let embedded = EmbeddedRegistry::new();
    let registry: Arc<dyn Registry> = Arc::new(embedded.clone());
    let service = DiscoveryLayer::new(registry.clone()).layer(echo());
    let a = registry.register(definition("s", "a")).await.unwrap();
    assert_eq!(text(service.clone().oneshot(asking("s")).await.unwrap()).await, "a");
    let _b = registry.register(definition("s", "b")).await.unwrap();
    settle().await;
    assert_eq!(text(service.clone().oneshot(asking("s")).await.unwrap()).await, "a,b");
    a.deregister().await.unwrap();
    settle().await;
    assert_eq!(text(service.oneshot(asking("s")).await.unwrap()).await, "b");
}

#[tokio::test(start_paused = true)]
async fn services_of_one_layer_share_one_watch_and_it_ends_with_the_last() {
    let registry = Scripted::default();
    registry.script().send(Ok(vec![instance("a")])).unwrap();
    let layer = DiscoveryLayer::new(registry.clone());
    let (one, two) = (layer.layer(echo()), layer.layer(echo()).clone());
    for service in [&one, &two, &one] {
        assert!(service.clone().oneshot(asking("s")).await.unwrap().status().is_success());
    }
    // The script ended with its sender, so the watch is started anew after a pause; still one at a time.
    assert_eq!((registry.watches(), registry.living()), (1, 0));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!((registry.watches(), registry.living()), (2, 1));
    drop((one, two, layer));
    settle().await;
    assert_eq!(registry.living(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_first_request_waits_for_the_first_answer() {
    let registry = Scripted::default();
    let say = registry.script();
    let service = DiscoveryLayer::new(registry).layer(echo());
    let request = tokio::spawn(service.oneshot(asking("s")));
    tokio::time::sleep(Duration::from_millis(900)).await;
    assert!(!request.is_finished());
    say.send(Ok(vec![instance("a")])).unwrap();
    assert_eq!(text(request.await.unwrap().unwrap()).await, "a");
}

#[tokio::test(start_paused = true)]
async fn who_waited_long_enough_is_refused_and_the_next_at_once() {
    let registry = Scripted::default();
    let say = registry.script();
    let layer = DiscoveryLayer::new(registry);
    let service = layer.layer(echo());
    let start = tokio::time::Instant::now();
    let refused = service.clone().oneshot(asking("s")).await.unwrap();
    assert_eq!((reason(&refused), start.elapsed()), ("not-known-yet", Duration::from_secs(1)));
    assert_eq!(refused.headers()["retry-after"], "1");
    let refused = service.clone().oneshot(asking("s")).await.unwrap();
    assert_eq!((reason(&refused), start.elapsed()), ("not-known-yet", Duration::from_secs(1)));
    assert!(!layer.is_ready());
    say.send(Ok(vec![instance("a")])).unwrap();
    layer.ready().await;
    assert!(layer.is_ready());
    assert_eq!(text(service.oneshot(asking("s")).await.unwrap()).await, "a");
}

#[tokio::test(start_paused = true)]
async fn a_sound_none_is_refused_at_once_and_a_failure_keeps_what_was_known() {
    let registry = Scripted::default();
    let say = registry.script();
    say.send(Ok(vec![instance("a"), instance("b")])).unwrap();
    let layer = DiscoveryLayer::new(registry);
    let service = layer.layer(echo());
    assert_eq!(text(service.clone().oneshot(asking("s")).await.unwrap()).await, "a,b");
    say.send(Err(Error::unavailable("down"))).unwrap();
    say.send(Err(Error::no_leader("still"))).unwrap();
    tokio::time::sleep(Duration::from_secs(500)).await;
    assert_eq!(text(service.clone().oneshot(asking("s")).await.unwrap()).await, "a,b");
    let status = &layer.status()[0];
    let (since, error) = status.failing.clone().unwrap();
    assert_eq!((status.answers, status.failures, since), (1, 2, Duration::from_secs(500)));
    assert!(error.is_no_leader());
    say.send(Ok(vec![])).unwrap();
    settle().await;
    assert_eq!(reason(&service.oneshot(asking("s")).await.unwrap()), "no-instances");
    assert!(layer.status()[0].failing.is_none());
}

#[tokio::test(start_paused = true)]
async fn what_is_known_may_have_an_age() {
    let registry = Scripted::default();
    let say = registry.script();
    say.send(Ok(vec![instance("a")])).unwrap();
    let service = DiscoveryLayer::new(registry).max_age(Duration::from_secs(60)).layer(echo());
    service.clone().oneshot(asking("s")).await.unwrap();
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert!(service.clone().oneshot(asking("s")).await.unwrap().status().is_success(), "quiet is not failing");
    say.send(Err(Error::unavailable("down"))).unwrap();
    tokio::time::sleep(Duration::from_secs(40)).await;
    say.send(Err(Error::unavailable("down"))).unwrap();
    tokio::time::sleep(Duration::from_secs(19)).await;
    assert!(service.clone().oneshot(asking("s")).await.unwrap().status().is_success());
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(reason(&service.clone().oneshot(asking("s")).await.unwrap()), "no-instances");
    say.send(Ok(vec![instance("a")])).unwrap();
    settle().await;
    assert!(service.oneshot(asking("s")).await.unwrap().status().is_success());
}

#[tokio::test(start_paused = true)]
async fn an_unused_watch_ends_and_a_used_one_stays() {
    let registry = EmbeddedRegistry::new();
    let _a = registry.register(definition("a", "1")).await.unwrap();
    let _b = registry.register(definition("b", "1")).await.unwrap();
    let layer = DiscoveryLayer::new(registry).idle(Duration::from_secs(10));
    let service = layer.layer(echo());
    for _ in 0..20 {
        service.clone().oneshot(asking("a")).await.unwrap();
        service.clone().oneshot(asking("b")).await.unwrap();
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
    assert_eq!(layer.status().len(), 2);
    for _ in 0..10 {
        service.clone().oneshot(asking("a")).await.unwrap();
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
    let left: Vec<_> = layer.status().into_iter().map(|status| status.service).collect();
    assert_eq!(left, ["a".into()]);
    assert!(service.oneshot(asking("b")).await.unwrap().status().is_success(), "and may come back");
}

#[tokio::test(start_paused = true)]
async fn names_are_bounded_and_the_unknown_give_way() {
    let mut registry = FixedRegistry::new();
    for i in 0..4 {
        registry = registry.instances(format!("known-{i}"), [instance("x")]);
    }
    let layer = DiscoveryLayer::new(registry).services(4);
    let service = layer.layer(echo());
    for i in 0..100 {
        assert_eq!(reason(&service.clone().oneshot(asking(&format!("made-up-{i}"))).await.unwrap()), "no-instances");
        assert!(layer.status().len() <= 4);
    }
    for i in 0..4 {
        assert!(service.clone().oneshot(asking(&format!("known-{i}"))).await.unwrap().status().is_success());
    }
    assert_eq!(reason(&service.clone().oneshot(asking("made-up")).await.unwrap()), "too-many-services");
    assert!(service.oneshot(asking("known-0")).await.unwrap().status().is_success());
}

#[tokio::test(start_paused = true)]
async fn dropped_requests_leave_no_one_waiting() {
    let registry = Scripted::default();
    let say = registry.script();
    let service = DiscoveryLayer::new(registry.clone()).layer(echo());
    for _ in 0..10 {
        let waiting = service.clone().oneshot(asking("s"));
        assert!(tokio::time::timeout(Duration::from_millis(10), waiting).await.is_err());
    }
    assert_eq!(registry.watches(), 1);
    say.send(Ok(vec![instance("a")])).unwrap();
    assert_eq!(text(service.oneshot(asking("s")).await.unwrap()).await, "a");
}

#[tokio::test(start_paused = true)]
async fn readiness_passes_through_and_only_the_ready_one_is_called() {
    let registry = Scripted::default();
    let say = registry.script();
    let (mock, mut handle) = tower_test::mock::pair::<Request<()>, Response<Full<Bytes>>>();
    let mut service = DiscoveryLayer::new(registry).layer(mock);
    handle.allow(0);
    assert!(futures::poll!(std::future::poll_fn(|cx| service.poll_ready(cx))).is_pending());
    handle.allow(1);
    std::future::poll_fn(|cx| service.poll_ready(cx)).await.unwrap();
    // It waits for the first answer with the ready one; the mock panics when another is called.
    let answer = tokio::spawn(service.call(asking("s")));
    say.send(Ok(vec![instance("a")])).unwrap();
    let (request, respond) = handle.next_request().await.unwrap();
    assert_eq!(Endpoints::of(request.extensions()).unwrap().len(), 1);
    respond.send_response(Response::new(Full::from("x")));
    assert!(answer.await.unwrap().unwrap().status().is_success());
    handle.send_error("broken");
    assert!(std::future::poll_fn(|cx| service.poll_ready(cx)).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn the_contract_holds() {
    let registry = FixedRegistry::new().instances("s", [instance("a")]);
    let request = |body| {
        let mut request = Request::new(body);
        Destination::new("s").attach(request.extensions_mut());
        request
    };
    // Once with the first answer outstanding in every part, once with everything known.
    let layer = DiscoveryLayer::new(registry);
    portcullis_testing::contract::holds(layer.clone(), request).await;
    assert!(layer.is_ready());
    portcullis_testing::contract::holds(layer.clone(), request).await;
    portcullis_testing::contract::holds(layer, Request::new).await;
}

#[tokio::test(start_paused = true)]
async fn a_grpc_caller_is_refused_in_its_own_words() {
    let service = DiscoveryLayer::new(FixedRegistry::new()).layer(echo());
    let mut request = asking("s");
    request.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
    let refused = service.oneshot(request).await.unwrap();
    assert_eq!((refused.status().as_u16(), refused.headers()["grpc-status"].to_str().unwrap()), (200, "14"));
}

#[test]
fn without_a_runtime_it_refuses_and_does_not_panic() {
    let layer = DiscoveryLayer::new(EmbeddedRegistry::new());
    assert!(layer.follow("s").is_none());
    let mut refused = tokio_test::task::spawn(layer.layer(echo()).oneshot(asking("s")));
    let Poll::Ready(refused) = refused.poll() else { panic!("nothing to wait for") };
    assert_eq!(reason(&refused.unwrap()), "no-runtime");
}

#[test]
fn a_watch_whose_runtime_went_is_started_anew_with_what_it_knew() {
    let registry = EmbeddedRegistry::new();
    let layer = DiscoveryLayer::new(registry.clone()).service("s");
    let service = layer.layer(echo());
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let first = runtime();
    let a = first.block_on(registry.register(definition("s", "a"))).unwrap();
    assert_eq!(first.block_on(async { text(service.clone().oneshot(asking("s")).await.unwrap()).await }), "a");
    let before = layer.status()[0].endpoints.clone().unwrap()[0].clone();
    drop(first);
    runtime().block_on(async {
        let _b = registry.register(definition("s", "b")).await.unwrap();
        assert_eq!(text(service.clone().oneshot(asking("s")).await.unwrap()).await, "a", "known, though old");
        settle().await;
        assert_eq!(text(service.oneshot(asking("s")).await.unwrap()).await, "a,b");
        assert_eq!(layer.status()[0].endpoints.clone().unwrap()[0], before);
    });
    drop(a);
}

#[test]
fn services_are_clone_send_and_sync() {
    fn check<T: Clone + Send + Sync>(_: &T) {}
    fn is_send<T: Send>(_: &T) {}
    let layer = DiscoveryLayer::new(EmbeddedRegistry::new());
    check(&layer);
    let mut service: Discovery<_> = layer.layer(echo());
    check(&service);
    is_send(&service.call(Request::new(())));
}

#[tokio::test(start_paused = true)]
async fn endpoints_that_nobody_follows_any_more_are_marked_removed() {
    let registry = FixedRegistry::new().instances("orders", [instance("a")]);
    let layer = DiscoveryLayer::new(registry).idle(Duration::from_secs(10));
    layer.follow("orders");
    layer.ready().await;
    let idle = layer.follow("orders").unwrap();
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert!(layer.status().is_empty() && idle[0].is_removed(), "pools and breakers would keep them for ever");

    layer.follow("orders");
    layer.ready().await;
    let last = layer.follow("orders").unwrap();
    assert!(!last[0].is_removed());
    drop(layer);
    assert!(last[0].is_removed());
}

#[tokio::test(start_paused = true)]
async fn a_source_that_keeps_ending_does_not_have_a_service_in_use_forgotten() {
    let registry = Scripted::default();
    registry.script().send(Ok(vec![instance("a")])).unwrap();
    for _ in 0..100 {
        drop(registry.script());
    }
    let layer = DiscoveryLayer::new(registry).idle(Duration::from_secs(2));
    layer.follow("orders");
    layer.ready().await;
    let first = layer.follow("orders").unwrap();
    for _ in 0..1000 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(layer.follow("orders").is_some_and(|known| known.is(&first)), "what was known is lost");
    }
}
