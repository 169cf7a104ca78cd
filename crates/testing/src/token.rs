//! Tokens for tests and examples.

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::Value;

/// Signs `claims` with HMAC-SHA-256.
///
/// # Panics
///
/// When the claims are no object.
#[must_use]
pub fn hs256(secret: &[u8], claims: &Value) -> String {
    sign(Algorithm::HS256, &EncodingKey::from_secret(secret), None, claims)
}

/// Signs `claims` with `key` as `algorithm` says, and names the key in the header.
///
/// # Panics
///
/// When the key is of another kind than the algorithm wants.
#[must_use]
pub fn sign(algorithm: Algorithm, key: &EncodingKey, kid: Option<&str>, claims: &Value) -> String {
    let mut header = Header::new(algorithm);
    header.kid = kid.map(str::to_owned);
    jsonwebtoken::encode(&header, claims, key).expect("claims that can be signed")
}

/// Seconds since the epoch, for `exp` and the like.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "the token is shown to a gateway that runs by the machine's clock")]
pub fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
