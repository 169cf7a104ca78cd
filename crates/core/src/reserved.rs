//! Header names that the gateway alone may write.

use std::sync::Arc;

use http::{HeaderMap, HeaderName};

/// Names under which an upstream believes what it reads, since the gateway alone writes them, such as `x-user`.
///
/// A name stands for every other that some server takes for the same: CGI and its heirs know no difference between what
/// is no letter or digit, so `x_user` and `x.user` are `x-user` too.
///
/// Who reserves names strikes them from a request's headers and leaves this for whoever passes the body on, to strike them
/// from its trailers as well.
///
/// ```
/// use http::{HeaderMap, HeaderName, HeaderValue};
/// use portcullis_core::ReservedHeaders;
///
/// let reserved = ReservedHeaders::new([HeaderName::from_static("x-user")]);
/// let mut trailers = HeaderMap::new();
/// trailers.insert("x_user", HeaderValue::from_static("root"));
/// trailers.insert("x-checksum", HeaderValue::from_static("7"));
/// reserved.strike(&mut trailers);
/// assert_eq!(trailers.keys().collect::<Vec<_>>(), ["x-checksum"]);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReservedHeaders(Arc<[Box<[u8]>]>);

// === impl ReservedHeaders ===

impl ReservedHeaders {
    /// Reserves these names.
    #[must_use]
    pub fn new(names: impl IntoIterator<Item = HeaderName>) -> Self {
        Self(names.into_iter().map(|name| fold(name.as_str().as_bytes()).collect()).collect())
    }

    /// These and others.
    #[must_use]
    pub fn and(&self, others: &Self) -> Self {
        Self(self.0.iter().chain(&*others.0).cloned().collect())
    }

    /// Whether none is reserved.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether some server may take `name` for a reserved one.
    #[must_use]
    pub fn has(&self, name: &[u8]) -> bool {
        self.0.iter().any(|reserved| reserved.len() == name.len() && fold(name).eq(reserved.iter().copied()))
    }

    /// Removes every field under such a name, however often it is there.
    pub fn strike(&self, fields: &mut HeaderMap) {
        if self.is_empty() {
            return;
        }
        while let Some(name) = fields.keys().find(|name| self.has(name.as_str().as_bytes())).cloned() {
            fields.remove(name);
        }
    }
}

/// As the loosest of servers compares names.
fn fold(name: &[u8]) -> impl Iterator<Item = u8> {
    name.iter().map(|byte| if byte.is_ascii_alphanumeric() { byte.to_ascii_lowercase() } else { b'-' })
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn every_spelling_of_a_name_is_struck_and_no_other_name() {
        let reserved = ReservedHeaders::new([HeaderName::from_static("x-user"), HeaderName::from_static("x_role")]);
        let mut fields = HeaderMap::new();
        for name in ["x-user", "X_USER", "x.user", "x~user", "x-role", "x.role", "x-users", "xuser", "user"] {
            fields.append(HeaderName::try_from(name).unwrap(), HeaderValue::from_static("once"));
            fields.append(HeaderName::try_from(name).unwrap(), HeaderValue::from_static("twice"));
        }
        reserved.strike(&mut fields);
        let mut left: Vec<_> = fields.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["user", "x-users", "xuser"]);
        let before = fields.clone();
        ReservedHeaders::default().strike(&mut fields);
        assert_eq!(fields, before);
    }
}
