//! What tells requests apart, for limits: who counts together, whose plan holds, and who leaves something to others.

use std::borrow::Cow;
use std::collections::BTreeMap;

use portcullis::rate_limit::{ByMethod, Caller, Claim, ClientAddress, Everyone, Header, Key, KeyBytes, RequestHead};
use portcullis::rate_limit::{RouteName, ServiceName, Subject};
use portcullis_core::{Carried as _, Destination, Identity, Route};

use crate::config::{Alternatives, CountBy, LookUpBy};

/// The first alternative of which a request has all parts; where it comes from, in the end.
pub(super) struct Told {
    alternatives: Vec<Vec<(CountBy, Box<dyn Key>)>>,
    address: ClientAddress,
}

// === impl Told ===

impl Told {
    pub(super) fn by(alternatives: &Alternatives<CountBy>, ipv6_prefix: u8) -> Self {
        let address = ClientAddress::new().ipv6_prefix(ipv6_prefix);
        let part = |by: &CountBy| {
            let key: Box<dyn Key> = match by {
                CountBy::Caller => Box::new(Caller::new().ipv6_prefix(ipv6_prefix)),
                CountBy::Subject => Box::new(Subject),
                CountBy::Address => Box::new(address),
                CountBy::Header(name) => Box::new(Header::new(name.clone())),
                CountBy::Claim(name) => Box::new(Claim::new(name.as_str())),
                CountBy::Route => Box::new(RouteName),
                CountBy::Service => Box::new(ServiceName),
                CountBy::Method => Box::new(ByMethod),
                CountBy::Everyone => Box::new(Everyone),
            };
            (by.clone(), key)
        };
        let alternatives = alternatives.iter().map(|together| together.iter().map(|by| part(by)).collect());
        Self { alternatives: alternatives.collect(), address }
    }
}

impl Key for Told {
    fn write(&self, request: &RequestHead<'_>, key: &mut KeyBytes) -> bool {
        let has_all = |together: &[(CountBy, Box<dyn Key>)]| together.iter().all(|(by, _)| has(request, by));
        let Some((index, together)) = self.alternatives.iter().enumerate().find(|(_, together)| has_all(together))
        else {
            // Who brings none of it shares nothing with those who do.
            key.push(b"-");
            return self.address.write(request, key);
        };
        key.push(&index.to_le_bytes());
        // `|`, not `||`: every part is written.
        together.iter().fold(false, |any, (_, part)| any | part.write(request, key))
    }
}

fn has(request: &RequestHead<'_>, by: &CountBy) -> bool {
    match by {
        CountBy::Caller => request.identity().is_some() || request.client_address().is_some(),
        CountBy::Subject => request.identity().is_some(),
        CountBy::Address => request.client_address().is_some(),
        CountBy::Header(name) => request.headers().contains_key(name),
        CountBy::Claim(name) => request.identity().is_some_and(|identity| identity.claim(name).is_some()),
        CountBy::Route => Route::of(request.extensions()).is_some(),
        CountBy::Service => Destination::of(request.extensions()).is_some(),
        CountBy::Method | CountBy::Everyone => true,
    }
}

/// What `among` has for a request.
pub(super) fn look_up<'a, T>(
    by: &LookUpBy,
    among: &'a BTreeMap<String, T>,
    request: &RequestHead<'_>,
) -> Option<&'a T> {
    let text: Cow<'_, str> = match by {
        LookUpBy::Header(name) => request.headers().get(name)?.to_str().ok()?.into(),
        LookUpBy::Claim(name) => {
            let claim = request.identity()?.claim(name)?;
            claim.as_str().map_or_else(|| claim.to_string().into(), Cow::from)
        }
        LookUpBy::Subject => request.identity()?.subject().into(),
        LookUpBy::Role => return first(request.identity().map(Identity::roles)?, among),
        LookUpBy::Scope => return first(request.identity().map(Identity::scopes)?, among),
        LookUpBy::Route => Route::of(request.extensions())?.name().as_ref().into(),
        LookUpBy::Service => Destination::of(request.extensions())?.as_str().into(),
        LookUpBy::Method => request.method().as_str().into(),
    };
    among.get(&*text)
}

fn first<'a, T>(names: &[String], among: &'a BTreeMap<String, T>) -> Option<&'a T> {
    names.iter().find_map(|name| among.get(name))
}
