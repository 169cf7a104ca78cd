//! How endpoints are picked, and when another is tried.

use std::sync::Arc;

use portcullis::balance::{self, BalanceLayer, Budget, HashKey, LeastConnections, Maglev, PeakEwma, Pick, PowerOfTwo};
use portcullis::balance::{Random, Rendezvous, RingHash, RoundRobin, SlowStart, Sticky, Subset, Zone};
use portcullis_core::{GrpcCode, TrustedProxies};

use crate::config::{self, BalancePolicy, HashBy};

/// The layer that picks endpoints as the file says of a service.
pub(super) fn layer(
    service: &config::Service,
    proxies: &TrustedProxies,
    budget: Budget,
) -> BalanceLayer<Arc<dyn Pick>> {
    let balance = &service.balance;
    let pick = pick(balance, hash_key(&balance.hash, proxies));
    let mut layer = BalanceLayer::new(pick)
        .policy(attempts(&service.retry, balance, balance.subset.as_deref()))
        .panic_threshold(*balance.panic_threshold)
        .overprovisioning(balance.overprovisioning)
        .budget(budget)
        .waiting(balance.waiting)
        // What was tried is noted by the observer.
        .leaves_served(false);
    if let Some(wait) = balance.wait {
        layer = layer.wait(wait);
    }
    if let Some(zone) = &balance.zone {
        let built = Zone::prefer(zone.0.name.as_str()).least(zone.0.least);
        layer = layer.zone(zone.0.share.map_or(built.clone(), |share| built.share(share.0)));
    }
    if let Some(config::SlowStart(start)) = &balance.slow_start {
        layer = layer.slow_start(SlowStart::over(start.window).floor(start.floor.0).aggression(start.aggression));
    }
    layer
}

fn pick(balance: &config::Balance, key: Option<HashKey>) -> Arc<dyn Pick> {
    /// The most points of a ring.
    const MOST_POINTS: usize = 1 << 18;
    let choices = balance.choices.as_ref().map(|choices| choices.get());
    match (*balance.policy, key) {
        (BalancePolicy::RingHash, Some(key)) => {
            let mut ring = RingHash::by(key);
            if let Some(factor) = &balance.bounded_load {
                ring = ring.bounded_load(**factor);
            }
            if let Some(points) = &balance.points {
                ring = ring.points(points.get(), MOST_POINTS);
            }
            Arc::new(ring)
        }
        (BalancePolicy::Maglev, Some(key)) => {
            let maglev = Maglev::by(key);
            Arc::new(match &balance.slots {
                Some(slots) => maglev.size(slots.get()),
                None => maglev,
            })
        }
        (BalancePolicy::Rendezvous, Some(key)) => Arc::new(Rendezvous::by(key)),
        (BalancePolicy::LeastConnections, _) => {
            let mut least = LeastConnections::new();
            if let Some(choices) = choices {
                least = least.choices(choices);
            }
            if let Some(endpoints) = &balance.scan_up_to {
                least = least.scan_up_to(**endpoints);
            }
            Arc::new(least)
        }
        (BalancePolicy::RoundRobin, _) => Arc::new(RoundRobin::new()),
        (BalancePolicy::Random, _) => Arc::new(Random::new()),
        (BalancePolicy::PeakEwma, _) => {
            let mut ewma = PeakEwma::new();
            if let Some(choices) = choices {
                ewma = ewma.choices(choices);
            }
            if let Some(decay) = &balance.decay {
                ewma = ewma.decay(**decay);
            }
            if let Some(penalty) = &balance.penalty {
                ewma = ewma.penalty(**penalty);
            }
            Arc::new(ewma)
        }
        // Without a key there is nothing to hash by, which is said to be a mistake.
        (
            BalancePolicy::PowerOfTwo | BalancePolicy::RingHash | BalancePolicy::Maglev | BalancePolicy::Rendezvous,
            _,
        ) => Arc::new(PowerOfTwo),
    }
}

/// By what requests are hashed: the first alternative that one has.
pub(super) fn hash_key(hash: &config::Alternatives<HashBy>, proxies: &TrustedProxies) -> Option<HashKey> {
    let one = |by: &config::At<HashBy>| match &**by {
        HashBy::Header(name) => HashKey::header(name.clone()),
        HashBy::Cookie(name) => HashKey::cookie(name.as_str()),
        HashBy::Query(name) => HashKey::query(name.as_str()),
        HashBy::Claim(name) => HashKey::claim(name.as_str()),
        HashBy::Subject => HashKey::subject(),
        HashBy::Address => HashKey::client_address(proxies.clone()),
        HashBy::Path => HashKey::path(),
    };
    let alternatives = hash.iter().filter_map(|together| together.iter().map(one).reduce(|a, b| a.and(&b)));
    alternatives.reduce(HashKey::or)
}

/// How requests are attempted, and at which endpoints.
pub(super) fn attempts(
    retry: &config::Retry,
    balance: &config::Balance,
    subset: Option<&config::Subset>,
) -> balance::Policy {
    let mut policy = balance::Policy::new()
        .attempts(retry.attempts.get())
        .on_reset(retry.on_reset)
        .on_statuses(retry.on_statuses.iter().copied())
        .on_grpc(retry.on_grpc.iter().map(|code| GrpcCode::from_number(**code)))
        .repeat_any_method(retry.any_method)
        .replay(usize::try_from(retry.max_body.0).unwrap_or(usize::MAX))
        .backoff(retry.backoff, retry.max_backoff);
    if let Some(timeout) = retry.attempt_timeout {
        policy = policy.attempt_timeout(timeout);
    }
    if let Some(sticky) = balance.sticky.as_ref().and_then(sticky) {
        policy = policy.sticky(sticky);
    }
    if let Some(subset) = subset.and_then(subset_of) {
        policy = policy.subset(subset);
    }
    policy
}

fn sticky(sticky: &config::Sticky) -> Option<Sticky> {
    let mut built = Sticky::cookie(&sticky.cookie, sticky.secret_bytes()?)?;
    if sticky.secure {
        built = built.secure();
    }
    Some(match sticky.max_age {
        Some(age) => built.max_age(age),
        None => built,
    })
}

fn subset_of(subset: &config::Subset) -> Option<Subset> {
    let tags = subset.tags.iter().map(Subset::tag);
    let terms = tags.chain(subset.metadata.iter().map(|(key, value)| Subset::metadata(key, value)));
    let all = terms.reduce(|all, term| all.and(&term))?;
    Some(if subset.or_any { all.or_any() } else { all })
}
