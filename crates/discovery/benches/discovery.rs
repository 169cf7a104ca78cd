//! What finding a service costs a request, and what a change costs.
//!
//! `lookup` compares the layer with the service below it alone, with one that writes the value it was handed, and with one
//! that reads the request's name before: what is left is the looking up. `beside changes` does so while another thread
//! applies one change after the other to 10,000 endpoints. `change` applies one to 10,000.

#![allow(clippy::unwrap_used, missing_docs, reason = "a bench")]

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::hint::black_box;
use std::net::SocketAddr;
use std::task::{Context, Poll};

use bytes::Bytes;
use criterion::{Criterion, criterion_group, criterion_main};
use http::{Request, Response};
use http_body_util::Empty;
use portcullis_core::{Carried, Destination, Endpoints, Instance, Moment};
use portcullis_discovery::{DiscoveryLayer, EmbeddedRegistry, FixedRegistry, Health, Registry, ServiceDefinition};
use tower_layer::Layer;
use tower_service::Service;

/// Hands the request back, so that one request serves all rounds.
#[derive(Clone)]
struct Back;

impl Service<Request<()>> for Back {
    type Response = Response<Empty<Bytes>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<()>) -> Self::Future {
        let mut response = Response::new(Empty::new());
        *response.extensions_mut() = request.into_parts().0.extensions;
        ready(Ok(response))
    }
}

/// Writes the value it was handed: what any layer must do to leave endpoints behind.
#[derive(Clone)]
struct Write(Endpoints);

impl Service<Request<()>> for Write {
    type Response = Response<Empty<Bytes>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<()>) -> Self::Future {
        self.0.clone().attach(request.extensions_mut());
        Back.call(request)
    }
}

/// As [`Write`], but looks first what the request asks for.
#[derive(Clone)]
struct ReadAndWrite(Write);

impl Service<Request<()>> for ReadAndWrite {
    type Response = Response<Empty<Bytes>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<()>) -> Self::Future {
        black_box(Destination::of(request.extensions()).map(Destination::as_str));
        self.0.call(request)
    }
}

fn instances(count: usize) -> impl Iterator<Item = Instance> + Clone {
    (0..count).map(|i| {
        let address = [10, (i >> 16) as u8, (i >> 8) as u8, i as u8];
        Instance::new(format!("instance-{i}"), SocketAddr::from((address, 8080)))
    })
}

/// Calls `service` with one request over and over; its extensions go round.
fn rounds<S, R>(criterion: &mut Criterion, name: &str, mut service: S)
where
    S: Service<Request<()>, Response = Response<R>, Error = Infallible>,
{
    let mut request = Request::new(());
    Destination::new("orders-7").attach(request.extensions_mut());
    let mut extensions = std::mem::take(request.extensions_mut());
    criterion.bench_function(name, |bench| {
        bench.iter(|| {
            let mut request = Request::new(());
            *request.extensions_mut() = std::mem::take(&mut extensions);
            let mut future = std::pin::pin!(service.call(black_box(request)));
            let Poll::Ready(Ok(response)) = future.as_mut().poll(&mut Context::from_waker(std::task::Waker::noop()))
            else {
                panic!("nothing to wait for")
            };
            extensions = response.into_parts().0.extensions;
        });
    });
}

fn lookup(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _in_runtime = runtime.enter();
    rounds(criterion, "lookup/bare", Back);
    let written = Endpoints::none("orders-7").reconcile(instances(10), Moment::MIN);
    rounds(criterion, "lookup/write", Write(written.clone()));
    rounds(criterion, "lookup/read and write", ReadAndWrite(Write(written)));
    for count in [10, 1_000, 100_000] {
        let mut registry = FixedRegistry::new();
        for service in 0..16 {
            registry = registry.instances(format!("orders-{service}"), instances(count.min(1000)));
        }
        let registry = registry.instances("orders-7", instances(count).skip(1000.min(count)));
        let layer = DiscoveryLayer::new(registry);
        for service in 0..16 {
            layer.follow(&format!("orders-{service}"));
        }
        runtime.block_on(layer.ready());
        rounds(criterion, &format!("lookup/{count}"), layer.layer(Back));
        rounds(criterion, &format!("lookup/always/{count}"), layer.service("orders-7").layer(Back));
    }
}

fn disturbed(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let _in_runtime = runtime.enter();
    let registry = EmbeddedRegistry::new();
    let members: Vec<_> = runtime.block_on(async {
        let definitions = instances(10_000).map(|instance| ServiceDefinition::of("orders-7", instance));
        futures::future::try_join_all(definitions.map(|definition| registry.register(definition))).await.unwrap()
    });
    let layer = DiscoveryLayer::new(registry);
    layer.follow("orders-7");
    runtime.block_on(layer.ready());
    let changing = runtime.spawn(async move {
        loop {
            for health in [Health::Critical, Health::Passing] {
                members[5_000].report(health, "").await.unwrap();
                tokio::task::yield_now().await;
            }
        }
    });
    let answers = || layer.status()[0].answers;
    let before = answers();
    rounds(criterion, "lookup/10000 beside changes", layer.layer(Back));
    println!("{} changes were applied meanwhile", answers() - before);
    changing.abort();
}

fn change(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("change");
    let all: Vec<_> = instances(10_000).collect();
    let mut without = all.clone();
    without.remove(5_000);
    let mut lighter = all.clone();
    lighter[5_000].weight = 7;
    group.bench_function("one of 10000 goes and comes", |bench| {
        let mut current = Endpoints::none("s").reconcile(all.clone(), Moment::MIN);
        let mut is_there = true;
        bench.iter_batched(
            || {
                is_there = !is_there;
                if is_there { all.clone() } else { without.clone() }
            },
            |instances| current = current.reconcile(instances, Moment::MIN),
            criterion::BatchSize::LargeInput,
        );
    });
    group.bench_function("one of 10000 weighs more", |bench| {
        let mut current = Endpoints::none("s").reconcile(all.clone(), Moment::MIN);
        let mut heavy = false;
        bench.iter_batched(
            || {
                heavy = !heavy;
                if heavy { all.clone() } else { lighter.clone() }
            },
            |instances| current = current.reconcile(instances, Moment::MIN),
            criterion::BatchSize::LargeInput,
        );
    });
    group.bench_function("nothing of 10000", |bench| {
        let mut current = Endpoints::none("s").reconcile(all.clone(), Moment::MIN);
        bench.iter_batched(
            || all.clone(),
            |instances| current = current.reconcile(instances, Moment::MIN),
            criterion::BatchSize::LargeInput,
        );
    });
}

criterion_group!(benches, lookup, disturbed, change);
criterion_main!(benches);
