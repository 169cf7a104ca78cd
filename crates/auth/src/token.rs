//! The compact serialization of a signed token ([RFC 7515](https://www.rfc-editor.org/rfc/rfc7515) §7.1), read strictly.

use http::header;
use serde_json::{Map, Value};

use crate::algorithm::Algorithm;
use crate::authenticate::{Denied, Head};
use crate::json;
use crate::key::{MAX_KID, base64url};

/// A token taken apart; nothing in it is verified.
pub(crate) struct Token<'a> {
    pub(crate) algorithm: Algorithm,
    pub(crate) kid: Option<String>,
    pub(crate) typ: Option<String>,
    /// What is signed: header and payload as they came.
    pub(crate) signed: &'a [u8],
    pub(crate) signature: Vec<u8>,
    payload: Vec<u8>,
}

/// The token of a `Bearer` authorization. Another scheme is no credentials of this kind; two fields, or a token that is
/// not one word, cannot be read (RFC 6750 §3.1, `invalid_request`).
pub(crate) fn bearer<'a>(head: &Head<'a>) -> Result<&'a [u8], Denied> {
    let value = authorization(head, b"bearer")?;
    if value.iter().any(|byte| !byte.is_ascii_graphic() || *byte == b',') {
        return Err(Denied::malformed("the token is not one word"));
    }
    Ok(value)
}

/// The credentials of an `Authorization` with that scheme, which is given in lower case.
pub(crate) fn authorization<'a>(head: &Head<'a>, scheme: &[u8]) -> Result<&'a [u8], Denied> {
    let mut fields = head.headers().get_all(header::AUTHORIZATION).iter();
    let Some(field) = fields.next() else { return Err(Denied::missing()) };
    if fields.next().is_some() {
        return Err(Denied::malformed("more than one authorization"));
    }
    let field = field.as_bytes();
    let end = field.iter().position(|byte| !byte.is_ascii_alphanumeric() && *byte != b'-').unwrap_or(field.len());
    let (name, rest) = field.split_at(end);
    if !name.eq_ignore_ascii_case(scheme) {
        return Err(Denied::missing());
    }
    let spaces = rest.iter().take_while(|byte| **byte == b' ').count();
    let value = &rest[spaces..];
    if spaces == 0 || value.is_empty() {
        return Err(Denied::malformed("an authorization without credentials"));
    }
    Ok(value)
}

// === impl Token ===

impl<'a> Token<'a> {
    pub(crate) fn parse(token: &'a [u8]) -> Result<Self, Denied> {
        let malformed = || Denied::invalid("the token is malformed");
        let mut dots = token.iter().enumerate().filter(|(_, byte)| **byte == b'.').map(|(at, _)| at);
        let (Some(first), Some(second), None) = (dots.next(), dots.next(), dots.next()) else {
            return Err(malformed());
        };
        let (header, payload, signature) = (&token[..first], &token[first + 1..second], &token[second + 1..]);
        let header = base64url(header).and_then(|header| json::object(&header)).ok_or_else(malformed)?;
        let text = |name: &str| match header.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.as_str())),
            Some(_) => Err(malformed()),
        };
        let algorithm = text("alg")?.and_then(Algorithm::from_name);
        let algorithm = algorithm.ok_or_else(|| Denied::invalid("the token's algorithm is not accepted"))?;
        // We implement no extension, so whatever is critical is unknown here. `b64` must be critical to have a meaning,
        // and `zip` has none for signed tokens; who sends them means something else than we would understand.
        if ["crit", "b64", "zip"].iter().any(|name| header.contains_key(*name)) {
            return Err(Denied::invalid("the token wants an extension that is not known here"));
        }
        let kid = text("kid")?;
        if kid.is_some_and(|kid| kid.len() > MAX_KID) {
            return Err(malformed());
        }
        let signature = base64url(signature).filter(|signature| !signature.is_empty()).ok_or_else(malformed)?;
        let payload = base64url(payload).ok_or_else(malformed)?;
        let (kid, typ) = (kid.map(str::to_owned), text("typ")?.map(str::to_owned));
        Ok(Self { algorithm, kid, typ, signed: &token[..second], signature, payload })
    }

    /// What the payload says; believe it only once the signature was verified.
    pub(crate) fn claims(&self) -> Result<Map<String, Value>, Denied> {
        json::object(&self.payload).ok_or_else(|| Denied::invalid("the token's claims are malformed"))
    }
}
