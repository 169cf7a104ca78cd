//! What the request says about the caller when it goes on.

use std::borrow::Cow;

use http::{HeaderMap, HeaderName, HeaderValue, Request, header};
use portcullis_core::{Carried, Identity, ReservedHeaders};
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
/// In a request's trailers they are struck by the layer that passes its body on, `portcullis-forward`: this one leaves the
/// names as [`ReservedHeaders`], and whoever sends bodies on by other means can [strike](ReservedHeaders::strike) them too.
///
/// Values are UTF-8. One that cannot stand in a header as it is, such as a claim with a line break or with blanks around it,
/// is left out, and so is one of several that would be read as more than one or as another: a role with a comma, a scope with
/// a blank, and one that is empty or has blanks around it.
#[derive(Clone, Debug, Default)]
pub struct IdentityHeaders {
    fields: Vec<(What, HeaderName)>,
    reserved: ReservedHeaders,
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

    /// The claim of that name, or at that JSON pointer: a string as it is, anything else as JSON.
    #[must_use]
    pub fn claim(self, pointer: impl Into<String>, name: HeaderName) -> Self {
        self.field(What::Claim(pointer.into()), name)
    }

    fn field(mut self, what: What, name: HeaderName) -> Self {
        self.fields.push((what, name));
        self.reserved = ReservedHeaders::new(self.fields.iter().map(|(_, name)| name.clone()));
        self
    }

    /// Removes what came from outside under these names, and has it removed from what is still to come.
    pub(crate) fn strip<B>(&self, request: &mut Request<B>) {
        if self.reserved.is_empty() {
            return;
        }
        self.reserved.strike(request.headers_mut());
        self.strike_from_connection(request.headers_mut());
        // Those of a layer above stay reserved.
        let above = ReservedHeaders::of(request.extensions());
        let all = above.map_or_else(|| self.reserved.clone(), |above| above.and(&self.reserved));
        all.attach(request.extensions_mut());
    }

    fn strike_from_connection(&self, headers: &mut HeaderMap) {
        let options = || {
            let lines = headers.get_all(header::CONNECTION).iter();
            lines.flat_map(|line| line.as_bytes().split(|byte| *byte == b',')).map(<[u8]>::trim_ascii)
        };
        if !options().any(|option| self.reserved.has(option)) {
            return;
        }
        let kept: Vec<_> = options().filter(|option| !self.reserved.has(option)).collect();
        let kept = HeaderValue::from_bytes(&kept.join(&b", "[..]));
        headers.remove(header::CONNECTION);
        if let Ok(kept) = kept
            && !kept.is_empty()
        {
            headers.insert(header::CONNECTION, kept);
        }
    }

    /// Says who is calling; to be called after [`strip`](Self::strip).
    pub(crate) fn write(&self, identity: &Identity, headers: &mut HeaderMap) {
        for (what, name) in &self.fields {
            let text = match what {
                What::Subject => Some(Cow::Borrowed(identity.subject())),
                What::Issuer => identity.issuer().map(Cow::Borrowed),
                What::Scopes => Some(joined(identity.scopes(), ' ').into()),
                What::Roles => Some(joined(identity.roles(), ',').into()),
                What::Claim(pointer) => match identity.claim(pointer) {
                    None | Some(Value::Null) => None,
                    Some(Value::String(text)) => Some(Cow::Borrowed(&**text)),
                    Some(other) => Some(other.to_string().into()),
                },
            };
            // Whoever reads a header takes the blanks around its value away.
            let text = text.filter(|text| text.trim() == text);
            if let Some(value) = text.and_then(|text| HeaderValue::from_bytes(text.as_bytes()).ok()) {
                headers.insert(name.clone(), value);
            }
        }
    }
}

/// What can be taken apart again by whoever knows only the separator.
fn joined(words: &[impl AsRef<str>], separator: char) -> String {
    let is_between = |letter: char| letter == separator || separator == ' ' && letter.is_whitespace();
    let is_one = |word: &&str| !word.is_empty() && word.trim() == *word && !word.contains(is_between);
    let mut text = String::new();
    for word in words.iter().map(AsRef::as_ref).filter(is_one) {
        if !text.is_empty() {
            text.push(separator);
        }
        text.push_str(word);
    }
    text
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
    fn every_alias_from_outside_is_removed_and_its_names_left_for_whoever_sends_trailers() {
        let mut request = Request::new(());
        for name in ["x-user", "X-User", "x_user", "x.user", "X_USER", "x~user", "x-roles", "x_tenant", "x-users"] {
            request.headers_mut().append(HeaderName::try_from(name).unwrap(), HeaderValue::from_static("evil"));
            request.headers_mut().append(HeaderName::try_from(name).unwrap(), HeaderValue::from_static("twice"));
        }
        headers().strip(&mut request);
        assert_eq!(request.headers().keys().collect::<Vec<_>>(), ["x-users"]);
        assert!(ReservedHeaders::of(request.extensions()).unwrap().has(b"X_Level"));
    }

    #[test]
    fn connection_cannot_have_them_dropped() {
        let connection = |lines: &[&'static [u8]]| {
            let mut request = Request::new(());
            for line in lines {
                request.headers_mut().append("connection", HeaderValue::from_bytes(line).unwrap());
            }
            headers().strip(&mut request);
            request.headers().get_all("connection").iter().map(|line| line.as_bytes().to_vec()).collect::<Vec<_>>()
        };
        assert_eq!(connection(&[b"close, X-User", b"x_roles,te", b"X.Tenant, \xff"]), [b"close, te, \xff"]);
        assert_eq!(connection(&[b"te ,x-other", b"\xff"]), [&b"te ,x-other"[..], b"\xff"], "as it came");
        assert!(connection(&[b"x-user"]).is_empty());
    }

    #[test]
    fn values_say_no_more_than_the_identity() {
        let claims = json!({"org": {"tenant": " a"}});
        let identity = Identity::new("ada ", Proof::Jwt)
            .with_roles(["guest,admin", "guest", "", " admin", "admin\t", "a b", ","])
            .with_scopes(["read write", "read", "\u{2003}x", "a\tb", "x,y"])
            .with_claims(claims.as_object().unwrap().clone());
        let mut map = HeaderMap::new();
        headers().scopes(HeaderName::from_static("x-scopes")).write(&identity, &mut map);
        assert_eq!((&map["x-roles"], &map["x-scopes"]), (&"guest,a b".parse().unwrap(), &"read x,y".parse().unwrap()));
        assert!(!map.contains_key("x-user") && !map.contains_key("x-tenant"));
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
