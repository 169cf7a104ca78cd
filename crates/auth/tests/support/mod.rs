//! Keys that sign for tests, beside the crate under test: straight from aws-lc.
#![allow(
    clippy::unwrap_used,
    dead_code,
    unreachable_pub,
    reason = "each test file uses its own part, and fails where it cannot go on"
)]

use std::time::Duration;

use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{self, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RsaKeyPair};
use aws_lc_rs::{encoding::PublicKeyX509Der, hmac};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use portcullis_auth::{Algorithm, Attempt, Authenticate, Denied, Head, Jwt, KeySet};
use portcullis_core::{Identity, WallClock};
use serde_json::{Value, json};

/// What every test's clock shows.
pub const NOW: u64 = 1_800_000_000;

pub const ALL: [Algorithm; 13] = [
    Algorithm::HS256,
    Algorithm::HS384,
    Algorithm::HS512,
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
    Algorithm::ES256,
    Algorithm::ES384,
    Algorithm::ES512,
    Algorithm::EdDSA,
];

/// Whether a message has this signature.
type Verify<'a> = dyn Fn(&[u8], &[u8]) -> bool + 'a;

pub struct Signer {
    pub algorithm: Algorithm,
    secret: Secret,
}

enum Secret {
    Hmac(Vec<u8>),
    Rsa(Box<RsaKeyPair>),
    Ecdsa(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
}

pub fn b64(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

impl Signer {
    pub fn new(algorithm: Algorithm) -> Self {
        let ecdsa = |kind| Secret::Ecdsa(EcdsaKeyPair::generate(kind).unwrap());
        let secret = match algorithm.as_str() {
            "HS256" | "HS384" | "HS512" => {
                let mut secret = vec![0; 64];
                aws_lc_rs::rand::fill(&mut secret).unwrap();
                Secret::Hmac(secret)
            }
            "ES256" => ecdsa(&signature::ECDSA_P256_SHA256_FIXED_SIGNING),
            "ES384" => ecdsa(&signature::ECDSA_P384_SHA384_FIXED_SIGNING),
            "ES512" => ecdsa(&signature::ECDSA_P521_SHA512_FIXED_SIGNING),
            "EdDSA" => Secret::Ed25519(Ed25519KeyPair::generate().unwrap()),
            _ => Secret::Rsa(Box::new(RsaKeyPair::generate(KeySize::Rsa2048).unwrap())),
        };
        Self { algorithm, secret }
    }

    pub fn jwk(&self, kid: &str) -> Value {
        let mut jwk = match &self.secret {
            Secret::Hmac(secret) => json!({"kty": "oct", "k": b64(secret)}),
            Secret::Rsa(pair) => {
                // RSAPublicKey of 2048 bits: a sequence of the modulus with a zero before it, and 65537.
                let der = pair.public_key().as_ref();
                assert_eq!((der.len(), &der[265..]), (270, &[2, 3, 1, 0, 1][..]));
                json!({"kty": "RSA", "n": b64(&der[9..265]), "e": "AQAB"})
            }
            Secret::Ecdsa(pair) => {
                let point = &pair.public_key().as_ref()[1..];
                let (x, y) = point.split_at(point.len() / 2);
                let curve = match x.len() {
                    32 => "P-256",
                    48 => "P-384",
                    _ => "P-521",
                };
                json!({"kty": "EC", "crv": curve, "x": b64(x), "y": b64(y)})
            }
            Secret::Ed25519(pair) => json!({"kty": "OKP", "crv": "Ed25519", "x": b64(pair.public_key().as_ref())}),
        };
        jwk["kid"] = kid.into();
        jwk["alg"] = self.algorithm.as_str().into();
        jwk["use"] = "sig".into();
        jwk
    }

    pub fn key_set(&self, kid: &str) -> KeySet {
        KeySet::from_jwks(self.jwk(kid).to_string()).unwrap()
    }

    /// The public key as PEM.
    pub fn pem(&self) -> String {
        let der: PublicKeyX509Der<'_> = match &self.secret {
            Secret::Hmac(_) => panic!("a secret has no public half"),
            Secret::Rsa(pair) => pair.public_key().as_der().unwrap(),
            Secret::Ecdsa(pair) => pair.public_key().as_der().unwrap(),
            Secret::Ed25519(pair) => pair.public_key().as_der().unwrap(),
        };
        pem("PUBLIC KEY", der.as_ref())
    }

    pub fn pkcs1_pem(&self) -> String {
        let Secret::Rsa(pair) = &self.secret else { panic!("no RSA key") };
        pem("RSA PUBLIC KEY", pair.public_key().as_ref())
    }

    pub fn sign(&self, claims: &Value) -> String {
        self.sign_with(&json!({"alg": self.algorithm.as_str(), "typ": "JWT", "kid": "a"}), claims)
    }

    pub fn sign_with(&self, header: &Value, claims: &Value) -> String {
        self.sign_text(&header.to_string(), &claims.to_string())
    }

    pub fn sign_text(&self, header: &str, payload: &str) -> String {
        let signed = format!("{}.{}", b64(header), b64(payload));
        format!("{signed}.{}", b64(self.signature(signed.as_bytes())))
    }

    /// The primitive alone, with a prepared key.
    pub fn verifier(&self) -> Box<Verify<'_>> {
        use aws_lc_rs::signature::{ParsedPublicKey, VerificationAlgorithm};
        let algorithm: &'static dyn VerificationAlgorithm = match self.algorithm {
            Algorithm::RS256 => &signature::RSA_PKCS1_2048_8192_SHA256,
            Algorithm::ES256 => &signature::ECDSA_P256_SHA256_FIXED,
            _ => &signature::ED25519,
        };
        let bytes = match &self.secret {
            Secret::Hmac(secret) => {
                let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
                return Box::new(move |message, signed| hmac::verify(&key, message, signed).is_ok());
            }
            Secret::Rsa(pair) => pair.public_key().as_ref(),
            Secret::Ecdsa(pair) => pair.public_key().as_ref(),
            Secret::Ed25519(pair) => pair.public_key().as_ref(),
        };
        let key = ParsedPublicKey::new(algorithm, bytes).unwrap();
        Box::new(move |message, signed| key.verify_sig(message, signed).is_ok())
    }

    pub fn signature(&self, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        match &self.secret {
            Secret::Hmac(secret) => {
                let algorithm = match self.algorithm {
                    Algorithm::HS256 => hmac::HMAC_SHA256,
                    Algorithm::HS384 => hmac::HMAC_SHA384,
                    _ => hmac::HMAC_SHA512,
                };
                hmac::sign(&hmac::Key::new(algorithm, secret), message).as_ref().to_vec()
            }
            Secret::Rsa(pair) => {
                let encoding = match self.algorithm {
                    Algorithm::RS256 => &signature::RSA_PKCS1_SHA256,
                    Algorithm::RS384 => &signature::RSA_PKCS1_SHA384,
                    Algorithm::RS512 => &signature::RSA_PKCS1_SHA512,
                    Algorithm::PS256 => &signature::RSA_PSS_SHA256,
                    Algorithm::PS384 => &signature::RSA_PSS_SHA384,
                    _ => &signature::RSA_PSS_SHA512,
                };
                let mut signed = vec![0; pair.public_modulus_len()];
                pair.sign(encoding, &random, message, &mut signed).unwrap();
                signed
            }
            Secret::Ecdsa(pair) => pair.sign(&random, message).unwrap().as_ref().to_vec(),
            Secret::Ed25519(pair) => pair.sign(message).as_ref().to_vec(),
        }
    }
}

fn pem(label: &str, der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let lines: Vec<_> = text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

/// Claims that are good at [`NOW`].
pub fn claims() -> Value {
    json!({"sub": "ada", "exp": NOW + 600})
}

pub fn wall() -> WallClock {
    WallClock::manual(Duration::from_secs(NOW))
}

pub fn request(authorization: &str) -> http::Request<()> {
    http::Request::builder().header("authorization", authorization).body(()).unwrap()
}

/// What a proof that needs no time says to `Authorization: Bearer <token>`.
pub fn ask(proof: &Jwt, token: &str) -> Result<Identity, Denied> {
    now(proof, &request(&format!("Bearer {token}")))
}

pub fn now<A: Authenticate, B>(proof: &A, request: &http::Request<B>) -> Result<Identity, Denied> {
    match proof.authenticate(&Head::of(request)) {
        Attempt::Now(result) => result,
        Attempt::Later(_) => panic!("the answer takes time"),
    }
}
