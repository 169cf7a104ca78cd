//! The signature algorithms, each with the one primitive it stands for.

use std::fmt;

use aws_lc_rs::hmac;
use aws_lc_rs::signature::{self, EcdsaVerificationAlgorithm, RsaParameters};

/// A signature algorithm of JSON Web Tokens ([RFC 7518](https://www.rfc-editor.org/rfc/rfc7518) §3.1,
/// [RFC 8037](https://www.rfc-editor.org/rfc/rfc8037)). There is no `none`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Algorithm {
    /// HMAC with SHA-256.
    HS256,
    /// HMAC with SHA-384.
    HS384,
    /// HMAC with SHA-512.
    HS512,
    /// RSASSA-PKCS1-v1_5 with SHA-256.
    RS256,
    /// RSASSA-PKCS1-v1_5 with SHA-384.
    RS384,
    /// RSASSA-PKCS1-v1_5 with SHA-512.
    RS512,
    /// RSASSA-PSS with SHA-256.
    PS256,
    /// RSASSA-PSS with SHA-384.
    PS384,
    /// RSASSA-PSS with SHA-512.
    PS512,
    /// ECDSA on P-256 with SHA-256.
    ES256,
    /// ECDSA on P-384 with SHA-384.
    ES384,
    /// ECDSA on P-521 with SHA-512.
    ES512,
    /// Ed25519. In tokens and keys both `EdDSA` and `Ed25519` ([RFC 9864](https://www.rfc-editor.org/rfc/rfc9864)) name it.
    EdDSA,
}

/// The kind of key an algorithm wants, and its primitive.
pub(crate) enum Primitive {
    Hmac(hmac::Algorithm),
    Rsa(&'static RsaParameters),
    Ecdsa(&'static EcdsaVerificationAlgorithm, Curve),
    Ed25519,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Curve {
    pub(crate) name: &'static str,
    /// Bytes of a coordinate.
    pub(crate) width: usize,
    pub(crate) algorithm: Algorithm,
}

pub(crate) const CURVES: [Curve; 3] = [
    Curve { name: "P-256", width: 32, algorithm: Algorithm::ES256 },
    Curve { name: "P-384", width: 48, algorithm: Algorithm::ES384 },
    Curve { name: "P-521", width: 66, algorithm: Algorithm::ES512 },
];

// === impl Algorithm ===

impl Algorithm {
    /// The algorithm of that name; case counts.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "HS256" => Self::HS256,
            "HS384" => Self::HS384,
            "HS512" => Self::HS512,
            "RS256" => Self::RS256,
            "RS384" => Self::RS384,
            "RS512" => Self::RS512,
            "PS256" => Self::PS256,
            "PS384" => Self::PS384,
            "PS512" => Self::PS512,
            "ES256" => Self::ES256,
            "ES384" => Self::ES384,
            "ES512" => Self::ES512,
            "EdDSA" | "Ed25519" => Self::EdDSA,
            _ => return None,
        })
    }

    /// Its registered name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::HS256 => "HS256",
            Self::HS384 => "HS384",
            Self::HS512 => "HS512",
            Self::RS256 => "RS256",
            Self::RS384 => "RS384",
            Self::RS512 => "RS512",
            Self::PS256 => "PS256",
            Self::PS384 => "PS384",
            Self::PS512 => "PS512",
            Self::ES256 => "ES256",
            Self::ES384 => "ES384",
            Self::ES512 => "ES512",
            Self::EdDSA => "EdDSA",
        }
    }

    pub(crate) fn primitive(self) -> Primitive {
        match self {
            Self::HS256 => Primitive::Hmac(hmac::HMAC_SHA256),
            Self::HS384 => Primitive::Hmac(hmac::HMAC_SHA384),
            Self::HS512 => Primitive::Hmac(hmac::HMAC_SHA512),
            Self::RS256 => Primitive::Rsa(&signature::RSA_PKCS1_2048_8192_SHA256),
            Self::RS384 => Primitive::Rsa(&signature::RSA_PKCS1_2048_8192_SHA384),
            Self::RS512 => Primitive::Rsa(&signature::RSA_PKCS1_2048_8192_SHA512),
            Self::PS256 => Primitive::Rsa(&signature::RSA_PSS_2048_8192_SHA256),
            Self::PS384 => Primitive::Rsa(&signature::RSA_PSS_2048_8192_SHA384),
            Self::PS512 => Primitive::Rsa(&signature::RSA_PSS_2048_8192_SHA512),
            Self::ES256 => Primitive::Ecdsa(&signature::ECDSA_P256_SHA256_FIXED, CURVES[0]),
            Self::ES384 => Primitive::Ecdsa(&signature::ECDSA_P384_SHA384_FIXED, CURVES[1]),
            Self::ES512 => Primitive::Ecdsa(&signature::ECDSA_P521_SHA512_FIXED, CURVES[2]),
            Self::EdDSA => Primitive::Ed25519,
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
