//! Tokens to try with.

use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use portcullis_core::WallClock;
use serde_json::{Map, Value as Json, json};

use crate::config::Config;
use crate::run::{FAILED, WRONG};

/// Who the token is for, and with what it is signed.
#[derive(Args)]
pub(crate) struct Arguments {
    /// A file with the secret, or with the private key as PEM
    #[arg(long, value_name = "FILE", conflicts_with_all = ["key_env", "config"])]
    key: Option<PathBuf>,
    /// A variable of the environment with the secret or the private key
    #[arg(long, value_name = "NAME", conflicts_with = "config")]
    key_env: Option<String>,
    /// Takes secret, issuer and audience from a provider of this file
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The provider, if the file has more than one
    #[arg(long, value_name = "NAME", requires = "config")]
    provider: Option<String>,
    /// HS256, RS256, ES256, EdDSA, …
    #[arg(long, default_value = "HS256")]
    algorithm: String,
    /// The key's identifier
    #[arg(long)]
    kid: Option<String>,
    /// Who the caller is
    #[arg(long, default_value = "tester")]
    subject: String,
    /// Who vouches for it
    #[arg(long)]
    issuer: Option<String>,
    /// Whom it is for
    #[arg(long)]
    audience: Vec<String>,
    /// What the caller was granted; may be repeated
    #[arg(long)]
    scope: Vec<String>,
    /// Another claim, as name=value; the value may be JSON
    #[arg(long, value_name = "NAME=VALUE")]
    claim: Vec<String>,
    /// How long it is good for, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    expires: u64,
}

/// Why there is no token.
struct Refusal(u8, String);

pub(crate) fn print(arguments: &Arguments) -> ExitCode {
    match token(arguments, WallClock::system().since_epoch()) {
        Ok(token) => {
            say!("{token}");
            ExitCode::SUCCESS
        }
        Err(Refusal(code, why)) => {
            eprintln!("portcullis: {why}");
            ExitCode::from(code)
        }
    }
}

fn token(arguments: &Arguments, now: Duration) -> Result<String, Refusal> {
    let wrong = |why: String| Refusal(WRONG, why);
    let failed = |why: String| Refusal(FAILED, why);
    let (mut issuer, mut audiences) = (arguments.issuer.clone(), arguments.audience.clone());
    let mut algorithm = arguments.algorithm.clone();
    let key = if let Some(file) = &arguments.config {
        let config = Config::load(file).map_err(|mistakes| wrong(mistakes.to_string()))?;
        let mut providers = config.auth.providers.iter();
        let found = match &arguments.provider {
            Some(name) => providers.find(|(have, _)| *have == name),
            None if config.auth.providers.len() == 1 => providers.next(),
            None => return Err(wrong(String::from("the file has not exactly one provider: name one with --provider"))),
        };
        let Some((_, provider)) = found else { return Err(wrong(String::from("there is no such provider"))) };
        let Some(secret) = &provider.secret else {
            return Err(wrong(String::from("the provider has no secret to sign with: use --key with the private key")));
        };
        issuer = issuer.or_else(|| provider.issuer.clone());
        if audiences.is_empty() {
            audiences.extend(provider.audiences.first().cloned());
        }
        if let Some(named) = &provider.algorithm {
            algorithm = named.to_string();
        }
        secret.reveal().as_bytes().to_vec()
    } else if let Some(name) = &arguments.key_env {
        std::env::var(name).map_err(|_| wrong(format!("{name} is not set in the environment")))?.into_bytes()
    } else if let Some(file) = &arguments.key {
        std::fs::read(file).map_err(|error| failed(format!("cannot read {}: {error}", file.display())))?
    } else {
        return Err(wrong(String::from("name a key with --key, --key-env or --config")));
    };
    let algorithm =
        Algorithm::from_str(&algorithm).map_err(|_| wrong(format!("there is no algorithm {algorithm:?}")))?;
    let trimmed = key.strip_suffix(b"\n").map_or(key.as_slice(), |key| key.strip_suffix(b"\r").unwrap_or(key));
    let key = match algorithm {
        Algorithm::HS256 | Algorithm::HS384 | Algorithm::HS512 => Ok(EncodingKey::from_secret(trimmed)),
        Algorithm::ES256 | Algorithm::ES384 => EncodingKey::from_ec_pem(&key),
        Algorithm::EdDSA => EncodingKey::from_ed_pem(&key),
        _ => EncodingKey::from_rsa_pem(&key),
    };
    let key = key.map_err(|error| wrong(format!("not a key for {algorithm:?}: {error}")))?;
    let mut claims = Map::new();
    claims.insert("sub".into(), json!(arguments.subject));
    claims.insert("iat".into(), json!(now.as_secs()));
    claims.insert("exp".into(), json!(now.as_secs().saturating_add(arguments.expires)));
    if let Some(issuer) = issuer {
        claims.insert("iss".into(), json!(issuer));
    }
    match audiences.as_slice() {
        [] => {}
        [one] => drop(claims.insert("aud".into(), json!(one))),
        several => drop(claims.insert("aud".into(), json!(several))),
    }
    if !arguments.scope.is_empty() {
        claims.insert("scope".into(), json!(arguments.scope.join(" ")));
    }
    for claim in &arguments.claim {
        let (name, value) = claim.split_once('=').ok_or_else(|| wrong(format!("{claim:?} is not name=value")))?;
        let value = serde_json::from_str(value).unwrap_or_else(|_| Json::from(value));
        claims.insert(name.to_owned(), value);
    }
    let mut header = Header::new(algorithm);
    header.kid = arguments.kid.clone();
    jsonwebtoken::encode(&header, &claims, &key).map_err(|error| failed(format!("cannot sign: {error}")))
}
