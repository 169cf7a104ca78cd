//! One verification key, prepared once and bound to one algorithm.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

use aws_lc_rs::rsa::PublicKeyComponents;
use aws_lc_rs::signature::{ED25519, ParsedPublicKey};
use aws_lc_rs::{digest, hmac};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{DecodingKey, DecodingKeyKind};
use serde_json::{Map, Value};

use crate::algorithm::{Algorithm, CURVES, Primitive};
use crate::error::Error;

/// The longest key identifier; it is compared, never used to look anything up elsewhere.
pub(crate) const MAX_KID: usize = 512;

/// A key that can verify and cannot sign, save for HMAC, where both are one.
pub(crate) struct Key {
    kid: Option<Box<str>>,
    algorithm: Algorithm,
    material: Material,
    /// Of kid, algorithm and material: two keys with the same fingerprint are the same key.
    fingerprint: [u8; 32],
    /// Set when the key left its set, so that what it verified is not believed any longer.
    retired: AtomicBool,
}

enum Material {
    Hmac(Box<hmac::Key>),
    Public(ParsedPublicKey),
}

// === impl Key ===

impl Key {
    /// A shared secret, at least as long as the algorithm's hash ([RFC 7518](https://www.rfc-editor.org/rfc/rfc7518)
    /// §3.2).
    pub(crate) fn hmac(algorithm: Algorithm, secret: &[u8]) -> Result<Self, Error> {
        let Primitive::Hmac(primitive) = algorithm.primitive() else {
            return Err(Error::key(format!("a secret cannot verify {algorithm}")));
        };
        let needed = primitive.digest_algorithm().output_len();
        if secret.len() < needed {
            return Err(Error::key(format!("the secret has {} bytes, {algorithm} wants {needed}", secret.len())));
        }
        Ok(Self::new(algorithm, Material::Hmac(Box::new(hmac::Key::new(primitive, secret))), secret))
    }

    /// A public key or a certificate's, as PEM.
    pub(crate) fn pem(algorithm: Algorithm, pem: &[u8]) -> Result<Self, Error> {
        let read = match algorithm.primitive() {
            Primitive::Hmac(_) => return Err(Error::key(format!("{algorithm} wants a secret, not PEM"))),
            Primitive::Rsa(_) => DecodingKey::from_rsa_pem(pem),
            Primitive::Ecdsa(..) => DecodingKey::from_ec_pem(pem),
            Primitive::Ed25519 => DecodingKey::from_ed_pem(pem),
        };
        let unreadable = || Error::key(format!("not a public key for {algorithm} in PEM"));
        let key = read.map_err(|_| unreadable())?;
        let DecodingKeyKind::SecretOrDer(der) = key.kind() else { return Err(unreadable()) };
        match algorithm.primitive() {
            Primitive::Rsa(_) => {
                let (modulus, exponent) = rsa_public_key(der).ok_or_else(unreadable)?;
                Self::rsa(algorithm, modulus, exponent)
            }
            _ => Self::public(algorithm, der),
        }
    }

    /// A JSON Web Key. Members it does not know are ignored, those it knows must agree with each other; `bound` takes the
    /// place of its `alg`.
    pub(crate) fn jwk(jwk: &Map<String, Value>, bound: Option<Algorithm>) -> Result<Self, Error> {
        let kty = text(jwk, "kty")?.ok_or_else(|| Error::key("a key has no kty"))?;
        let usage = text(jwk, "use")?;
        if usage.is_some_and(|usage| usage != "sig") {
            return Err(Error::key("a key is not for signatures"));
        }
        if let Some(operations) = jwk.get("key_ops") {
            let operations = operations.as_array().ok_or_else(|| Error::key("key_ops is no array"))?;
            if !operations.iter().any(|operation| operation == "verify") {
                return Err(Error::key("a key is not for verifying"));
            }
        }
        if kty != "oct" && ["d", "p", "q", "dp", "dq", "qi", "oth"].iter().any(|name| jwk.contains_key(*name)) {
            return Err(Error::key("a private key lies among the public ones"));
        }
        let declared = match (bound, text(jwk, "alg")?) {
            (None, Some(name)) => {
                let unknown = || Error::key("a key is for an algorithm not known here");
                Some(Algorithm::from_name(name).ok_or_else(unknown)?)
            }
            (bound, _) => bound,
        };
        let mut key = match kty {
            "oct" => {
                let algorithm = declared.ok_or_else(|| Error::key("a secret does not say its alg"))?;
                Self::hmac(algorithm, &bytes(jwk, "k")?)
            }
            // Without alg, as some large providers publish them: what RFC 9068 makes everyone support.
            "RSA" => {
                let algorithm = declared.unwrap_or(Algorithm::RS256);
                Self::rsa(algorithm, &bytes(jwk, "n")?, &bytes(jwk, "e")?)
            }
            "EC" => {
                let name = text(jwk, "crv")?;
                let curve = CURVES.iter().find(|curve| Some(curve.name) == name);
                let curve = curve.ok_or_else(|| Error::key("a key lies on a curve not known here"))?;
                if declared.is_some_and(|declared| declared != curve.algorithm) {
                    return Err(Error::key("a key's alg and curve do not agree"));
                }
                let (x, y) = (bytes(jwk, "x")?, bytes(jwk, "y")?);
                if x.len() != curve.width || y.len() != curve.width {
                    return Err(Error::key("a coordinate has the wrong length"));
                }
                Self::public(curve.algorithm, &[&[4], &*x, &*y].concat())
            }
            "OKP" => {
                if text(jwk, "crv")? != Some("Ed25519") || declared.is_some_and(|alg| alg != Algorithm::EdDSA) {
                    return Err(Error::key("a key lies on a curve not known here"));
                }
                Self::public(Algorithm::EdDSA, &bytes(jwk, "x")?)
            }
            _ => Err(Error::key("a key is of a kind not known here")),
        }?;
        if let Some(kid) = text(jwk, "kid")? {
            key = key.with_kid(kid)?;
        }
        Ok(key)
    }

    fn rsa(algorithm: Algorithm, modulus: &[u8], exponent: &[u8]) -> Result<Self, Error> {
        let Primitive::Rsa(primitive) = algorithm.primitive() else {
            return Err(Error::key(format!("an RSA key cannot verify {algorithm}")));
        };
        let (n, e) = (without_leading_zeros(modulus), without_leading_zeros(exponent));
        let bits = n.first().map_or(0, |first| n.len() * 8 - first.leading_zeros() as usize);
        if !(2048..=8192).contains(&bits) {
            return Err(Error::key(format!("an RSA key has {bits} bits, not 2048 to 8192")));
        }
        let odd = |number: &[u8]| number.last().is_some_and(|last| last % 2 == 1);
        if !odd(n) || !odd(e) || e == [1] || e.len() > 4 {
            return Err(Error::key("an RSA key's numbers are not sound"));
        }
        if is_roca(n) {
            return Err(Error::key("an RSA key has the weakness known as ROCA"));
        }
        let key = PublicKeyComponents { n, e }.to_parsed_public_key(primitive);
        let key = key.map_err(|_| Error::key("an RSA key's numbers are not sound"))?;
        Ok(Self::new(algorithm, Material::Public(key), &[n, e].concat()))
    }

    /// An uncompressed point, or Ed25519's 32 bytes.
    fn public(algorithm: Algorithm, point: &[u8]) -> Result<Self, Error> {
        let (key, length) = match algorithm.primitive() {
            Primitive::Ecdsa(primitive, curve) => (ParsedPublicKey::new(primitive, point), 1 + 2 * curve.width),
            Primitive::Ed25519 => (ParsedPublicKey::new(&ED25519, point), 32),
            Primitive::Hmac(_) | Primitive::Rsa(_) => return Err(Error::key(format!("no point verifies {algorithm}"))),
        };
        match key {
            Ok(key) if point.len() == length => Ok(Self::new(algorithm, Material::Public(key), point)),
            _ => Err(Error::key(format!("not a point for {algorithm}"))),
        }
    }

    fn new(algorithm: Algorithm, material: Material, bytes: &[u8]) -> Self {
        let mut hash = digest::Context::new(&digest::SHA256);
        hash.update(algorithm.as_str().as_bytes());
        hash.update(bytes);
        let mut fingerprint = [0; 32];
        fingerprint.copy_from_slice(hash.finish().as_ref());
        Self { kid: None, algorithm, material, fingerprint, retired: AtomicBool::new(false) }
    }

    pub(crate) fn with_kid(mut self, kid: &str) -> Result<Self, Error> {
        if kid.len() > MAX_KID {
            return Err(Error::key(format!("a kid is longer than {MAX_KID} bytes")));
        }
        self.kid = Some(kid.into());
        Ok(self)
    }

    pub(crate) fn kid(&self) -> Option<&str> {
        self.kid.as_deref()
    }

    pub(crate) fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    pub(crate) fn is_symmetric(&self) -> bool {
        matches!(self.material, Material::Hmac(_))
    }

    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.fingerprint == other.fingerprint && self.kid == other.kid
    }

    pub(crate) fn retire(&self) {
        self.retired.store(true, Ordering::Release);
    }

    pub(crate) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
    }

    /// Whether `signature` is this key's over `message`; constant in time for HMAC.
    pub(crate) fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        match &self.material {
            Material::Hmac(key) => hmac::verify(key, message, signature).is_ok(),
            Material::Public(key) => key.verify_sig(message, signature).is_ok(),
        }
    }
}

/// Which key it is, and nothing of its material.
impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key").field("kid", &self.kid).field("algorithm", &self.algorithm).finish_non_exhaustive()
    }
}

/// Strict base64url: no padding, no other alphabet, no stray bits.
pub(crate) fn base64url(text: impl AsRef<[u8]>) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text).ok()
}

fn text<'a>(jwk: &'a Map<String, Value>, name: &str) -> Result<Option<&'a str>, Error> {
    let Some(value) = jwk.get(name) else { return Ok(None) };
    value.as_str().map(Some).ok_or_else(|| Error::key(format!("{name} is no string")))
}

fn bytes(jwk: &Map<String, Value>, name: &str) -> Result<Vec<u8>, Error> {
    let text = text(jwk, name)?.ok_or_else(|| Error::key(format!("a key has no {name}")))?;
    base64url(text).ok_or_else(|| Error::key(format!("{name} is not base64url")))
}

fn without_leading_zeros(number: &[u8]) -> &[u8] {
    let zeros = number.iter().take_while(|byte| **byte == 0).count();
    &number[zeros..]
}

/// The modulus and exponent of a DER `RSAPublicKey`: a sequence of exactly two integers.
fn rsa_public_key(der: &[u8]) -> Option<(&[u8], &[u8])> {
    fn element(der: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
        let (&[have, first], rest) = der.split_first_chunk()?;
        if have != tag {
            return None;
        }
        let (length, rest) = match first {
            0..=0x7f => (usize::from(first), rest),
            0x81 => rest.split_first().map(|(length, rest)| (usize::from(*length), rest))?,
            0x82 => rest.split_first_chunk().map(|(length, rest)| (usize::from(u16::from_be_bytes(*length)), rest))?,
            _ => return None,
        };
        rest.split_at_checked(length)
    }
    let (sequence, []) = element(der, 0x30)? else { return None };
    let (modulus, rest) = element(sequence, 2)?;
    let (exponent, []) = element(rest, 2)? else { return None };
    Some((modulus, exponent))
}

/// Whether a modulus has the shape of CVE-2017-15361: modulo each small prime it is a power of 65537. Of sound keys one in
/// about 2^27 looks so.
fn is_roca(modulus: &[u8]) -> bool {
    const PRIMES: [u32; 38] = [
        3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107,
        109, 113, 127, 131, 137, 139, 149, 151, 157, 163, 167,
    ];
    PRIMES.iter().all(|prime| {
        let rest = modulus.iter().fold(0, |rest, byte| (rest * 256 + u32::from(*byte)) % prime);
        let mut power = 1;
        loop {
            if power == rest {
                return true;
            }
            power = power * 65537 % prime;
            if power == 1 {
                return false;
            }
        }
    })
}
