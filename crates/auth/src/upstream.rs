//! What the request says about the caller when it goes on.

use std::fmt::Write;

use http::{HeaderMap, HeaderName, HeaderValue, header};
use portcullis_core::Identity;
use serde_json::Value;

/// Headers that tell the upstream who is calling.
///
/// Whatever came in under one of these names is removed first, from every request that passes, also where nobody is
/// asked: under the name itself, however often, and under every name that some server takes for the same, such as
/// `x_user` or `x.user` for `x-user`. A name is struck from `Connection` too, so that no proxy behind is told to drop what
/// is set here.
///
/// ```
/// use http::HeaderName;
/// use portcullis_auth::IdentityHeaders;
///
/// let headers = IdentityHeaders::new()
///     .subject(HeaderName::from_static("x-user"))
///     .scopes(HeaderName::from_static("x-scopes"))
///     .claim("/tenant", HeaderName::from_static("x-tenant"));
/// ```
///
/// Values are UTF-8. One that cannot stand in a header, such as a claim with a line break, is left out. Trailers are not
/// looked at: no server joins them to the headers unasked.
#[derive(Clone, Debug, Default)]
pub struct IdentityHeaders {
    fields: Vec<(What, HeaderName)>,
    /// The names, with every character that is no letter or digit as a hyphen.
    folded: Vec<String>,
}

#[derive(Clone, Debug)]
enum What {
    Subject,
    Issuer,
    Scopes,
    Roles,
    Claim(String),
}

// === impl IdentityHeaders ===

impl IdentityHeaders {
    /// None.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The subject.
    #[must_use]
    pub fn subject(self, name: HeaderName) -> Self {
        self.field(What::Subject, name)
    }

    /// Who vouches for the subject.
    #[must_use]
    pub fn issuer(self, name: HeaderName) -> Self {
        self.field(What::Issuer, name)
    }

    /// The scopes, with a space between them.
    #[must_use]
    pub fn scopes(self, name: HeaderName) -> Self {
        self.field(What::Scopes, name)
    }

    /// The roles, with a comma between them.
    #[must_use]
    pub fn roles(self, name: HeaderName) -> Self {
        self.field(What::Roles, name)
    }

    /// The claim at a JSON pointer: a string as it is, anything else as JSON.
    #[must_use]
    pub fn claim(self, pointer: impl Into<String>, name: HeaderName) -> Self {
        self.field(What::Claim(pointer.into()), name)
    }

    fn field(mut self, what: What, name: HeaderName) -> Self {
        self.folded.push(fold(name.as_str()).collect());
        self.fields.push((what, name));
        self
    }

    /// Removes what came from outside under these names.
    pub(crate) fn strip(&self, headers: &mut HeaderMap) {
        if self.fields.is_empty() {
            return;
        }
        while let Some(alias) = headers.keys().find(|name| self.is_alias(name.as_str())).cloned() {
            headers.remove(alias);
        }
        let options = |value: &HeaderValue| value.to_str().unwrap_or_default().to_owned();
        let lists = || headers.get_all(header::CONNECTION).iter();
        if !lists().any(|value| options(value).split(',').any(|option| self.is_alias(option.trim()))) {
            return;
        }
        let mut kept = String::new();
        for value in lists() {
            for option in options(value).split(',').map(str::trim).filter(|option| !self.is_alias(option)) {
                let _ = write!(kept, "{}{option}", if kept.is_empty() { "" } else { ", " });
            }
        }
        headers.remove(header::CONNECTION);
        if let Ok(kept) = HeaderValue::try_from(kept)
            && !kept.is_empty()
        {
            headers.insert(header::CONNECTION, kept);
        }
    }

    /// Says who is calling; to be called after [`strip`](Self::strip).
    pub(crate) fn write(&self, identity: &Identity, headers: &mut HeaderMap) {
        for (what, name) in &self.fields {
            let value = match what {
                What::Subject => HeaderValue::from_bytes(identity.subject().as_bytes()).ok(),
                What::Issuer => identity.issuer().and_then(|issuer| HeaderValue::from_bytes(issuer.as_bytes()).ok()),
                What::Scopes => HeaderValue::from_bytes(identity.scopes().join(" ").as_bytes()).ok(),
                What::Roles => HeaderValue::from_bytes(identity.roles().join(",").as_bytes()).ok(),
                What::Claim(pointer) => match pointed(identity, pointer) {
                    None | Some(Value::Null) => None,
                    Some(Value::String(text)) => HeaderValue::from_bytes(text.as_bytes()).ok(),
                    Some(other) => HeaderValue::from_bytes(other.to_string().as_bytes()).ok(),
                },
            };
            if let Some(value) = value {
                headers.insert(name.clone(), value);
            }
        }
    }

    fn is_alias(&self, name: &str) -> bool {
        self.folded.iter().any(|folded| folded.len() == name.len() && fold(name).eq(folded.chars()))
    }
}

/// As the loosest of servers compares names: CGI and its heirs take whatever is no letter or digit for the same.
fn fold(name: &str) -> impl Iterator<Item = char> {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
}

fn pointed<'a>(identity: &'a Identity, pointer: &str) -> Option<&'a Value> {
    let (first, rest) = match pointer.strip_prefix('/')?.split_once('/') {
        Some((first, _)) => (first, &pointer[1 + first.len()..]),
        None => (&pointer[1..], ""),
    };
    identity.claim(&first.replace("~1", "/").replace("~0", "~"))?.pointer(rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use portcullis_core::Proof;
    use serde_json::json;

    fn headers() -> IdentityHeaders {
        IdentityHeaders::new()
            .subject(HeaderName::from_static("x-user"))
            .roles(HeaderName::from_static("x-roles"))
            .claim("/org/tenant", HeaderName::from_static("x-tenant"))
            .claim("/level", HeaderName::from_static("x-level"))
    }

    #[test]
    fn every_alias_from_outside_is_removed() {
        let mut map = HeaderMap::new();
        for name in
            ["x-user", "X-User", "x_user", "x.user", "X_USER", "x~user", "x-roles", "x_tenant", "x-users", "xuser"]
        {
            map.append(HeaderName::try_from(name).unwrap(), HeaderValue::from_static("evil"));
            map.append(HeaderName::try_from(name).unwrap(), HeaderValue::from_static("twice"));
        }
        headers().strip(&mut map);
        let mut left: Vec<_> = map.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["x-users", "xuser"]);
    }

    #[test]
    fn connection_cannot_have_them_dropped() {
        let mut map = HeaderMap::new();
        map.append("connection", HeaderValue::from_static("close, X-User"));
        map.append("connection", HeaderValue::from_static("x_roles,te"));
        headers().strip(&mut map);
        assert_eq!(map.get_all("connection").iter().collect::<Vec<_>>(), ["close, te"]);
        let mut map = HeaderMap::new();
        map.append("connection", HeaderValue::from_static("x-user"));
        headers().strip(&mut map);
        assert!(map.is_empty());
    }

    #[test]
    fn values_are_what_can_stand_in_a_header() {
        let claims = json!({"org": {"tenant": "é"}, "level": 7});
        let identity = Identity::new("ada", Proof::Jwt).with_roles(["a", "b"]);
        let mut map = HeaderMap::new();
        headers().write(&identity.clone().with_claims(claims.as_object().unwrap().clone()), &mut map);
        assert_eq!(
            (&map["x-user"], &map["x-roles"], &map["x-level"]),
            (&"ada".parse().unwrap(), &"a,b".parse().unwrap(), &"7".parse().unwrap())
        );
        assert_eq!(map["x-tenant"].as_bytes(), "é".as_bytes());
        let mut map = HeaderMap::new();
        let claims = json!({"org": {"tenant": "a\r\nx-user: root"}, "level": null});
        headers().write(&identity.with_claims(claims.as_object().unwrap().clone()), &mut map);
        assert!(!map.contains_key("x-tenant") && !map.contains_key("x-level"));
    }
}
