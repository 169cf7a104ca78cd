//! How often callers may come, and where that is counted.

use std::num::NonZeroU32;

use portcullis::rate_limit::{Claim, ClientAddress, Everyone, Fields, Handle as Limits, Header, Key as _, Limit, Rate};
use portcullis::rate_limit::{OnFailure, RateLimitLayer, RedisStore};
use portcullis_core::TrustedProxies;

use super::{Change, Error, Running};
use crate::config::{self, Config, LimitFields, LimitKey};

/// The layer, the old one if that counts in the same place, and what reads and changes it.
pub(super) fn limiter(
    config: &Config,
    proxies: &TrustedProxies,
    before: Option<&Running>,
    commit: &mut Vec<Change>,
) -> Result<(RateLimitLayer, Limits), Error> {
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
        let (layer, handle) = (before.rate_limit.clone(), before.limits.clone());
        let unchanged = before.config.limits == config.limits && before.config.limiter == config.limiter;
        if !unchanged {
            let handle = handle.clone();
            commit.push(Box::new(move || handle.set_limits(defaults)));
        }
        return Ok((layer, handle));
    }
    let rate = portcullis::rate_limit::Rate::per_second(std::num::NonZeroU32::MIN);
    let says = match config.limiter.fields {
        LimitFields::Refusals => Fields::on_refusals(),
        LimitFields::Always => Fields::always(),
        LimitFields::Never => Fields::never(),
    };
    let mut layer = RateLimitLayer::new(rate)
        .capacity(config.limiter.capacity.get())
        .trusted_proxies(proxies.clone())
        .fields(if config.limiter.legacy_fields { says.with_legacy() } else { says });
    if let Some(longest) = &config.limiter.delay {
        layer = layer.delay(**longest, config.limiter.delay_places);
    }
    if let Some(redis) = &config.limiter.redis {
        layer = layer.store(store(redis).map_err(Error)?);
    }
    let handle = layer.handle();
    handle.set_limits(defaults);
    Ok((layer, handle))
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
    let store = RedisStore::new(redis.url.reveal()).map_err(|error| error.to_string())?;
    Ok(store.prefix(&redis.prefix).deadline(redis.deadline).lease(redis.lease).on_failure(on_failure))
}

pub(super) fn limit(name: &str, limit: &config::Limit) -> Result<Limit, Error> {
    let built = match (&limit.max_in_flight, &limit.rate) {
        (Some(most), _) => Limit::concurrent(name, **most),
        (None, Some(rate)) => {
            let count = NonZeroU32::new(rate.count).unwrap_or(NonZeroU32::MIN);
            let wrong = |error| Error::of(format_args!("the limit {name:?}"), error);
            let rate = Rate::new(count, rate.period).map_err(wrong)?;
            Limit::new(name, limit.burst.as_ref().map_or(rate, |burst| rate.burst(**burst)))
        }
        (None, None) => return Err(Error(format!("the limit {name:?} limits nothing"))),
    };
    let built = if limit.shadow { built.shadow() } else { built };
    Ok(match (limit.key, &limit.header, &limit.claim) {
        (LimitKey::Address, ..) => built.with_key(ClientAddress::default()),
        (LimitKey::Everyone, ..) => built.with_key(Everyone),
        // Who brings none shares nothing with those who do.
        (LimitKey::Header, Some(header), _) => {
            built.with_key(Header::new((**header).clone()).or(ClientAddress::default()))
        }
        (LimitKey::Claim, _, Some(claim)) => built.with_key(Claim::new(claim.as_str()).or(ClientAddress::default())),
        (LimitKey::Caller | LimitKey::Header | LimitKey::Claim, ..) => built,
    })
}
