//! The compact serialization of a signed token ([RFC 7515](https://www.rfc-editor.org/rfc/rfc7515) §7.1), read strictly.

use std::borrow::Cow;

use http::header;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::algorithm::Algorithm;
use crate::authenticate::{Denied, Head};
use crate::json::{self, Member};
use crate::key::{MAX_KID, base64url};

/// Below this hashing costs less than finding out whether it is worth it.
const LONG: usize = 1024;

/// A token whose header was read; nothing in it is verified.
pub(crate) struct Token<'a> {
    pub(crate) algorithm: Algorithm,
    pub(crate) kid: Option<String>,
    pub(crate) typ: Option<String>,
    parts: Parts<'a>,
}

/// The three parts as they came.
#[derive(Clone, Copy)]
struct Parts<'a> {
    /// Header and payload, which is what is signed.
    signed: &'a [u8],
    payload: &'a str,
    signature: &'a str,
}

/// The one claim that tells whom to ask.
#[derive(Deserialize)]
struct IssuedBy<'a> {
    #[serde(borrow)]
    iss: Option<Cow<'a, str>>,
}

/// A token as its signature wants it.
pub(crate) struct Signed<'a> {
    pub(crate) message: &'a [u8],
    pub(crate) signature: Vec<u8>,
    payload: Vec<u8>,
}

/// The credentials of a `Bearer` authorization. Another scheme is no credentials of this kind; two fields cannot be read.
pub(crate) fn bearer<'a>(head: &Head<'a>) -> Result<&'a [u8], Denied> {
    authorization(head, b"bearer")
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

/// Whether it is worth being hashed and read: a long one is, if it has three parts.
pub(crate) fn may_be_one(token: &[u8]) -> bool {
    // In pieces whose count fits a byte, so that the compiler takes many bytes at a time.
    let dots = |piece: &[u8]| piece.iter().fold(0_u8, |dots, byte| dots + u8::from(*byte == b'.'));
    token.len() < LONG || token.chunks(usize::from(u8::MAX)).map(|piece| usize::from(dots(piece))).sum::<usize>() == 2
}

fn malformed() -> Denied {
    Denied::invalid("the token is malformed")
}

fn malformed_claims() -> Denied {
    Denied::invalid("the token's claims are malformed")
}

// === impl Token ===

impl<'a> Token<'a> {
    /// Reads the header. What is not one word cannot be read at all (RFC 6750 §3.1, `invalid_request`).
    pub(crate) fn parse(token: &'a [u8]) -> Result<Self, Denied> {
        let not_one_word = || Denied::malformed("the token is not one word");
        // Without a way out early, so that the compiler takes many bytes at a time.
        let stray = |byte: u8| !(b'!'..=b'~').contains(&byte) | (byte == b',');
        if token.iter().fold(false, |found, byte| found | stray(*byte)) {
            return Err(not_one_word());
        }
        if !may_be_one(token) {
            return Err(malformed());
        }
        let text = std::str::from_utf8(token).map_err(|_| not_one_word())?;
        let mut parts = text.split('.');
        let (Some(header), Some(payload), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(malformed());
        };
        let parts = Parts { signed: &token[..header.len() + 1 + payload.len()], payload, signature };
        let header = base64url(header).ok_or_else(malformed)?;
        let header = json::members(&header).ok_or_else(malformed)?;
        let (mut algorithm, mut kid, mut typ, mut extended) = (None, None, None, false);
        for (name, member) in header {
            let field = match &*name {
                "alg" => &mut algorithm,
                "kid" => &mut kid,
                "typ" => &mut typ,
                // We implement no extension, so whatever is critical is unknown here. `b64` must be critical to have a
                // meaning, and `zip` has none for signed tokens; who sends them means something else than we would
                // understand.
                "crit" | "b64" | "zip" => {
                    extended = true;
                    continue;
                }
                _ => continue,
            };
            let Member::Text(text) = member else { return Err(malformed()) };
            *field = Some(text);
        }
        let algorithm = algorithm.and_then(|name| Algorithm::from_name(&name));
        let algorithm = algorithm.ok_or_else(|| Denied::invalid("the token's algorithm is not accepted"))?;
        if extended {
            return Err(Denied::invalid("the token wants an extension that is not known here"));
        }
        if kid.as_ref().is_some_and(|kid| kid.len() > MAX_KID) {
            return Err(malformed());
        }
        let (kid, typ) = (kid.map(String::from), typ.map(String::from));
        Ok(Self { algorithm, kid, typ, parts })
    }

    /// Whom it says it is from. Nothing else in it is read closely: this only tells whom to ask.
    pub(crate) fn issuer(&self) -> Result<Option<String>, Denied> {
        let payload = base64url(self.parts.payload).ok_or_else(malformed)?;
        let claims: IssuedBy<'_> = serde_json::from_slice(&payload).map_err(|_| malformed_claims())?;
        Ok(claims.iss.map(Cow::into_owned))
    }

    /// Decodes the rest.
    pub(crate) fn decode(&self) -> Result<Signed<'a>, Denied> {
        let Parts { signed, payload, signature } = self.parts;
        let signature = base64url(signature).filter(|signature| !signature.is_empty()).ok_or_else(malformed)?;
        let payload = base64url(payload).ok_or_else(malformed)?;
        Ok(Signed { message: signed, signature, payload })
    }
}

// === impl Signed ===

impl Signed<'_> {
    /// What the payload says; believe it only once the signature was verified.
    pub(crate) fn claims(&self) -> Result<Map<String, Value>, Denied> {
        json::object(&self.payload).ok_or_else(malformed_claims)
    }
}
