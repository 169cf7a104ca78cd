//! How often callers may come, and where that is counted.

use std::collections::BTreeMap;
use std::num::NonZeroU32;

use portcullis::rate_limit::{Fields, Handle as Limits, Limit, OnFailure, Priority, Rate, RateLimitLayer, RedisStore};
use portcullis::rate_limit::{RequestHead, Settlement};
use portcullis_core::{Identity, TrustedProxies};

use super::tell::{Told, look_up};
use super::{Change, Error, Running};
use crate::config::{self, Config, CountBy, LimitFields, SettleBy};

/// Where limits count, and what reads and changes them.
#[derive(Clone)]
pub(crate) struct Limiter {
    pub(super) layer: RateLimitLayer,
    pub(crate) handle: Limits,
    /// The Redis that gateways share, if they do.
    pub(crate) store: Option<RedisStore>,
}

/// The limiter, the old one if that counts in the same place.
pub(super) fn limiter(
    config: &Config,
    proxies: &TrustedProxies,
    before: Option<&Running>,
    commit: &mut Vec<Change>,
) -> Result<Limiter, Error> {
    let mut defaults = Vec::new();
    for name in &config.limiter.default {
        if let Some(limit) = config.limits.get(&**name) {
            defaults.push(self::limit(name, limit)?);
        }
    }
    // Which limits hold by default can change; where and how they count cannot.
    let counts = |config: &Config| {
        let default = Vec::new();
        (config::Limiter { default, ..config.limiter.clone() }, config.trusted_proxies.clone())
    };
    let same = |before: &&Running| counts(&before.config) == counts(config);
    if let Some(before) = before.filter(same) {
        let limiter = before.limiter.clone();
        let unchanged = before.config.limits == config.limits && before.config.limiter == config.limiter;
        if !unchanged {
            let handle = limiter.handle.clone();
            commit.push(Box::new(move || handle.set_limits(defaults)));
        }
        return Ok(limiter);
    }
    let says = match config.limiter.fields {
        LimitFields::Refusals => Fields::on_refusals(),
        LimitFields::Always => Fields::always(),
        LimitFields::Never => Fields::never(),
    };
    let mut layer = RateLimitLayer::limits(defaults)
        .capacity(config.limiter.capacity.get())
        .trusted_proxies(proxies.clone())
        .fields(if config.limiter.legacy_fields { says.with_legacy() } else { says });
    if let Some(exempt) = exempt(&config.limiter.exempt)? {
        layer = layer.exempt(exempt);
    }
    if let Some(longest) = &config.limiter.delay {
        layer = layer.delay(**longest, config.limiter.delay_places);
    }
    let store = config.limiter.redis.as_ref().map(|redis| store(redis).map_err(Error)).transpose()?;
    if let Some(store) = &store {
        layer = layer.store(store.clone());
    }
    let handle = layer.handle();
    Ok(Limiter { layer, handle, store })
}

/// The Redis that gateways share.
pub(crate) fn store(redis: &config::Redis) -> Result<RedisStore, String> {
    let on_failure = match (redis.on_failure, &redis.gateways) {
        (config::OnFailure::Admit, _) => OnFailure::Admit,
        (config::OnFailure::Refuse, _) => OnFailure::Refuse,
        (config::OnFailure::Share, gateways) => {
            OnFailure::Share(gateways.as_ref().map_or(NonZeroU32::MIN, |gateways| **gateways))
        }
    };
    // Its client takes no provider from us.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let store = match &redis.ca {
        Some(ca) => RedisStore::trusting(redis.url.reveal(), ca.bytes()),
        None => RedisStore::new(redis.url.reveal()),
    };
    let store = store.map_err(|error| error.to_string())?;
    Ok(store.prefix(&redis.prefix).deadline(redis.deadline).lease(redis.lease).on_failure(on_failure))
}

pub(super) fn limit(name: &str, limit: &config::Limit) -> Result<Limit, Error> {
    let wrong = |error| Error::of(format_args!("the limit {name:?}"), error);
    let mut built = match (&limit.max_in_flight, &limit.rate) {
        (Some(most), _) => Limit::concurrent(name, **most),
        (None, Some(rate)) => {
            Limit::new(name, self::rate(**rate, limit.burst.as_ref().map(|burst| **burst)).map_err(wrong)?)
        }
        (None, None) => return Err(Error(format!("the limit {name:?} limits nothing"))),
    };
    let is_default = matches!(&limit.key[..], [key] if matches!(&key[..], [by] if **by == CountBy::Caller));
    if !is_default || *limit.ipv6_prefix != portcullis::rate_limit::DEFAULT_IPV6_PREFIX {
        built = built.with_key(Told::by(&limit.key, *limit.ipv6_prefix));
    }
    let cost = limit.cost.as_ref().map_or(1, |cost| **cost);
    if cost != 1 {
        built = built.cost(move |_| cost);
    }
    if let Some(by) = &limit.settle {
        let by = (**by).clone();
        built = built.settle(move |settlement| settled(&by, cost, settlement));
    }
    if let Some(plan) = &limit.plan {
        let by = plan.by.clone();
        let rates = plan.rates.iter().map(|(value, plan)| Ok((value.clone(), rate(plan.0.rate, plan.0.burst)?)));
        let rates = rates.collect::<Result<BTreeMap<String, Rate>, _>>().map_err(wrong)?;
        built = built.plan(move |request| look_up(&by, &rates, request).copied());
    }
    if let Some(priority) = &limit.priority {
        let priority = (**priority).clone();
        built = built.priority(move |request| {
            Priority::leaving(*look_up(&priority.by, &priority.leave, request).unwrap_or(&priority.otherwise))
        });
    }
    Ok(if limit.shadow { built.shadow() } else { built })
}

fn rate(rate: config::Rate, burst: Option<NonZeroU32>) -> Result<Rate, portcullis::rate_limit::Error> {
    let built = Rate::new(NonZeroU32::new(rate.count).unwrap_or(NonZeroU32::MIN), rate.period)?;
    Ok(burst.map_or(built, |burst| built.burst(burst)))
}

/// What a request cost in the end that cost so much before.
fn settled(by: &SettleBy, cost: u32, settlement: &Settlement<'_>) -> u32 {
    match by {
        SettleBy::Bytes => u32::try_from(settlement.bytes).unwrap_or(u32::MAX),
        SettleBy::Failures if has_failed(settlement) => cost,
        SettleBy::Failures => 0,
        SettleBy::Header(name) => {
            let said = settlement.trailers.and_then(|trailers| trailers.get(name));
            let said = said.or_else(|| settlement.headers.get(name)).and_then(|value| value.to_str().ok());
            let said = said.and_then(|text| text.trim().parse::<f64>().ok()).filter(|cost| *cost >= 0.0);
            // Rounded up; what is too much is as much as there is.
            said.map_or(cost, |cost| cost.ceil() as u32)
        }
    }
}

fn has_failed(settlement: &Settlement<'_>) -> bool {
    let said = settlement.trailers.and_then(|trailers| trailers.get("grpc-status"));
    let said = said.or_else(|| settlement.headers.get("grpc-status"));
    settlement.status.as_u16() >= 400 || said.is_some_and(|code| code != "0")
}

/// Which requests are not counted at all.
fn exempt(exempt: &config::Exempt) -> Result<Option<impl Fn(&RequestHead<'_>) -> bool + Send + Sync + 'static>, Error> {
    let config::Exempt { networks, paths, subjects, roles } = exempt.clone();
    if networks.is_empty() && paths.is_empty() && subjects.is_empty() && roles.is_empty() {
        return Ok(None);
    }
    let networks = TrustedProxies::networks(networks.iter().map(|network| network.as_str()))
        .map_err(|error| Error(error.to_string()))?;
    Ok(Some(move |request: &RequestHead<'_>| {
        let is_caller = |identity: &Identity| {
            subjects.iter().any(|subject| subject == identity.subject())
                || roles.iter().any(|role| identity.has_role(role))
        };
        paths.iter().any(|path| path == request.uri().path())
            || request.client_address().is_some_and(|address| networks.trusts(address))
            || request.identity().is_some_and(is_caller)
    }))
}
