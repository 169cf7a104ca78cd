//! Who is calling.

use std::fmt;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// A caller that proved who it is. One pointer: cloning it copies nothing.
///
/// Claims are `serde_json` values, the one data type of another crate in this crate's interface: tokens are JSON, and a
/// type of our own would only be converted back.
#[derive(Clone, PartialEq)]
pub struct Identity(Arc<Inner>);

/// How an [`Identity`] was proved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Proof {
    /// A signed token.
    Jwt,
    /// A secret that names its holder.
    ApiKey,
    /// A name and a password.
    Basic,
    /// A certificate shown when the connection was made.
    ClientCertificate,
    /// A proof of the user's own making.
    Custom(&'static str),
}

#[derive(Clone, PartialEq)]
struct Inner {
    subject: Arc<str>,
    issuer: Option<Arc<str>>,
    scopes: Vec<String>,
    roles: Vec<String>,
    claims: Map<String, Value>,
    proof: Proof,
}

// === impl Identity ===

impl Identity {
    /// A caller of that name.
    #[must_use]
    pub fn new(subject: impl Into<Arc<str>>, proof: Proof) -> Self {
        Self(Arc::new(Inner {
            subject: subject.into(),
            issuer: None,
            scopes: Vec::new(),
            roles: Vec::new(),
            claims: Map::new(),
            proof,
        }))
    }

    /// Names who vouches for the subject; subjects of different issuers are different callers.
    #[must_use]
    pub fn with_issuer(mut self, issuer: impl Into<Arc<str>>) -> Self {
        Arc::make_mut(&mut self.0).issuer = Some(issuer.into());
        self
    }

    /// Sets what the caller was granted.
    #[must_use]
    pub fn with_scopes<S: Into<String>>(mut self, scopes: impl IntoIterator<Item = S>) -> Self {
        Arc::make_mut(&mut self.0).scopes = scopes.into_iter().map(Into::into).collect();
        self
    }

    /// Sets the roles the caller has.
    #[must_use]
    pub fn with_roles<S: Into<String>>(mut self, roles: impl IntoIterator<Item = S>) -> Self {
        Arc::make_mut(&mut self.0).roles = roles.into_iter().map(Into::into).collect();
        self
    }

    /// Sets everything that was said about the caller.
    #[must_use]
    pub fn with_claims(mut self, claims: Map<String, Value>) -> Self {
        Arc::make_mut(&mut self.0).claims = claims;
        self
    }

    /// The caller's name, unique within its [issuer](Self::issuer).
    #[must_use]
    pub fn subject(&self) -> &str {
        &self.0.subject
    }

    /// Who vouches for the subject.
    #[must_use]
    pub fn issuer(&self) -> Option<&str> {
        self.0.issuer.as_deref()
    }

    /// What the caller was granted.
    #[must_use]
    pub fn scopes(&self) -> &[String] {
        &self.0.scopes
    }

    /// Whether the caller was granted `scope`.
    #[must_use]
    pub fn has_scope(&self, scope: &str) -> bool {
        self.0.scopes.iter().any(|have| have == scope)
    }

    /// The roles the caller has.
    #[must_use]
    pub fn roles(&self) -> &[String] {
        &self.0.roles
    }

    /// Whether the caller has `role`.
    #[must_use]
    pub fn has_role(&self, role: &str) -> bool {
        self.0.roles.iter().any(|have| have == role)
    }

    /// One thing that was said about the caller: by its name, or by where it is, as a JSON pointer such as `/org/id`.
    #[must_use]
    pub fn claim(&self, name: &str) -> Option<&Value> {
        let Some(path) = name.strip_prefix('/') else { return self.0.claims.get(name) };
        let (first, rest) = path.split_at(path.find('/').unwrap_or(path.len()));
        let claim = if first.contains('~') {
            self.0.claims.get(&first.replace("~1", "/").replace("~0", "~"))
        } else {
            self.0.claims.get(first)
        };
        claim?.pointer(rest)
    }

    /// Everything that was said about the caller.
    #[must_use]
    pub fn claims(&self) -> &Map<String, Value> {
        &self.0.claims
    }

    /// The claims as a type of the user's own.
    ///
    /// # Errors
    ///
    /// When a claim is missing or of another type than `T` wants.
    pub fn claims_as<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        T::deserialize(&self.0.claims)
    }

    /// How the identity was proved.
    #[must_use]
    pub fn proof(&self) -> Proof {
        self.0.proof
    }
}

/// Shows who it is; the claims stay out of logs.
impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("subject", &self.0.subject)
            .field("issuer", &self.0.issuer)
            .field("proof", &self.0.proof)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_is_found_by_its_name_or_by_where_it_is() {
        let claims =
            serde_json::json!({ "a": 1, "org": { "id": 7, "of": [{ "x/y": 8 }] }, "https://a/b~c": { "d": 9 } });
        let identity = Identity::new("ada", Proof::Jwt).with_claims(claims.as_object().unwrap().clone());
        for (name, found) in [
            ("a", Some(1)),
            ("/a", Some(1)),
            ("/org/id", Some(7)),
            ("/org/of/0/x~1y", Some(8)),
            ("/https:~1~1a~1b~0c/d", Some(9)),
            ("org/id", None),
            ("/org/none", None),
            ("/none/id", None),
            ("/a/b", None),
            ("/", None),
            ("", None),
        ] {
            assert_eq!(identity.claim(name).and_then(Value::as_i64), found, "{name}");
        }
        assert!(identity.claim("https://a/b~c").is_some());
    }

    #[test]
    fn claims_are_readable_as_a_type_and_stay_out_of_debug() {
        #[derive(serde::Deserialize)]
        struct Mine {
            tenant: String,
        }
        let mut claims = Map::new();
        claims.insert("tenant".into(), "acme-secret".into());
        let identity = Identity::new("ada", Proof::Jwt).with_scopes(["read"]).with_claims(claims);
        assert_eq!(identity.claims_as::<Mine>().unwrap().tenant, "acme-secret");
        assert!(identity.has_scope("read") && !identity.has_scope("rea"));
        assert!(!format!("{identity:?}").contains("acme-secret"));
    }
}
