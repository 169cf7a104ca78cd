//! Tokens and key sets, mutated: nothing panics, nothing that was not signed is believed, and whatever is refused is
//! refused alike by every way that leads there.
//!
//! `PORTCULLIS_FUZZ` says how many executions each target gets (without it 20 000 tokens and 5 000 key sets) and `PORTCULLIS_FUZZ_SEED` where to
//! begin; the long run is `PORTCULLIS_FUZZ=10000000 cargo test --release -p portcullis-auth --test fuzz`.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

mod support;

use portcullis_auth::{Algorithm, Jwt, KeySet};
use serde_json::{Value, json};
use support::{NOW, Signer, b64, now, wall};

fn executions(few: u64) -> u64 {
    std::env::var("PORTCULLIS_FUZZ").map_or(few, |count| count.parse().expect("PORTCULLIS_FUZZ is a number"))
}

fn random() -> fastrand::Rng {
    let seed = std::env::var("PORTCULLIS_FUZZ_SEED").map_or(1, |seed| seed.parse().expect("a number"));
    fastrand::Rng::with_seed(seed)
}

/// Pieces that parsers trip over.
const PIECES: [&str; 48] = [
    "",
    ".",
    "..",
    "=",
    "==",
    "-",
    "_",
    "+",
    "/",
    " ",
    "\t",
    "!",
    "\0",
    "\u{e9}",
    "A",
    "AA",
    "AAA",
    "AAAA",
    "e30",
    "W10",
    "{",
    "}",
    "[",
    "]",
    "\"",
    ",",
    ":",
    "null",
    "true",
    "-1",
    "1e999",
    "1e308",
    "0.1",
    "\\u0000",
    "\\ud800",
    "\\\"",
    "\"alg\"",
    "\"none\"",
    "\"kid\"",
    "\"crit\":[]",
    "\"b64\":false",
    "\"exp\":null",
    "\"sub\":{}",
    "\"aud\":[]",
    "\"keys\"",
    "\"kty\":\"oct\"",
    "\"k\":\"\"",
    "18446744073709551616",
];

fn mutate(input: &mut Vec<u8>, random: &mut fastrand::Rng) {
    for _ in 0..=random.u8(..4) {
        let at = random.usize(..=input.len());
        match random.u8(..9) {
            0 if at < input.len() => input[at] ^= 1 << random.u8(..8),
            1 if at < input.len() => input[at] = random.u8(..),
            2 if at < input.len() => drop(input.remove(at)),
            3 => input.insert(at, random.u8(..)),
            4 => input.truncate(at),
            5 => {
                let piece = PIECES[random.usize(..PIECES.len())];
                input.splice(at..at, piece.bytes());
            }
            6 if !input.is_empty() => {
                // A part of it again, somewhere else.
                let from = random.usize(..input.len());
                let length = random.usize(..=(input.len() - from).min(64));
                let part = input[from..from + length].to_vec();
                input.splice(at..at, part);
            }
            7 if at < input.len() => {
                let end = (at + random.usize(..16)).min(input.len());
                let piece = PIECES[random.usize(..PIECES.len())];
                input.splice(at..end, piece.bytes());
            }
            _ if at < input.len() => input[at] = b"ABCDwxyz0189-_.{}\":,"[random.usize(..20)],
            _ => {}
        }
    }
}

fn request(token: &[u8]) -> Option<http::Request<()>> {
    let value = http::HeaderValue::from_bytes(&[b"Bearer ", token].concat()).ok()?;
    let mut request = http::Request::new(());
    request.headers_mut().insert("authorization", value);
    Some(request)
}

// === tokens ===

struct Tokens {
    signer: Signer,
    jwt: Jwt,
    remembering: Jwt,
    /// What was signed: nothing else may ever be believed.
    signed: Vec<Vec<u8>>,
}

impl Tokens {
    fn new() -> Self {
        // A MAC, so that the signature's share of the time is small.
        let signer = Signer::new(Algorithm::HS256);
        let jwt = Jwt::new(signer.key_set("a")).wall_clock(wall()).issuer("i").audience("o");
        let all =
            json!({"sub": "ada", "exp": NOW + 60, "iss": "i", "aud": ["o"], "nbf": NOW, "iat": NOW, "scope": "a b"});
        let signed = vec![
            signer.sign(&all).into_bytes(),
            signer.sign_with(&json!({"alg": "HS256"}), &all).into_bytes(),
            signer.sign_with(&json!({"alg": "HS256", "typ": "at+jwt", "x5t": "x"}), &all).into_bytes(),
        ];
        Self { jwt: jwt.clone().cache_bytes(0), remembering: jwt, signer, signed }
    }

    /// A mutated token, and one whose mutated claims or header were signed by the issuer itself.
    fn check(&self, token: &[u8]) {
        let Some(request) = request(token) else { return };
        let result = now(&self.jwt, &request);
        assert_eq!(now(&self.remembering, &request), result, "the first time");
        assert_eq!(now(&self.remembering, &request), result, "the second time");
        if result.is_ok() {
            let text = String::from_utf8_lossy(token);
            assert!(self.signed.iter().any(|signed| signed == text.trim_start().as_bytes()), "believed: {text}");
        }
    }

    fn check_signed(&self, header: &[u8], payload: &[u8]) {
        let signed = format!("{}.{}", b64(header), b64(payload));
        let token = format!("{signed}.{}", b64(self.signer.signature(signed.as_bytes())));
        let Some(request) = request(token.as_bytes()) else { return };
        if let Ok(identity) = now(&self.jwt, &request) {
            // Believed: then a lenient reader sees what we saw, and it is good.
            let claims: Value = serde_json::from_slice(payload).unwrap();
            assert_eq!(claims["iss"], "i");
            assert_eq!(claims["sub"], identity.subject());
            assert!(claims["exp"].as_f64().unwrap() + 60.0 > NOW as f64);
            assert!(claims["aud"] == "o" || claims["aud"].as_array().unwrap().contains(&json!("o")));
            let header: Value = serde_json::from_slice(header).unwrap();
            assert_eq!(header["alg"], "HS256");
            assert!(header.get("crit").is_none());
        }
    }
}

#[test]
fn no_mutated_token_is_believed() {
    let (tokens, mut random) = (Tokens::new(), random());
    let claims =
        json!({"sub": "ada", "exp": NOW + 60, "iss": "i", "aud": ["o"], "nbf": NOW, "iat": NOW, "scope": "a b"});
    let mut pool = tokens.signed.clone();
    for n in 0..executions(20_000) {
        if n % 2 == 0 {
            let at = random.usize(..pool.len());
            let mut token = pool[at].clone();
            mutate(&mut token, &mut random);
            tokens.check(&token);
            // Mutations pile up, within bounds.
            if token.len() < 4096 && random.u8(..8) == 0 {
                let place = random.usize(..64);
                if place < pool.len() && place >= tokens.signed.len() {
                    pool[place] = token
                } else if pool.len() < 64 {
                    pool.push(token)
                }
            }
        } else {
            let mut header = br#"{"alg":"HS256","typ":"JWT","kid":"a"}"#.to_vec();
            let mut payload = claims.to_string().into_bytes();
            if random.bool() {
                mutate(&mut header, &mut random)
            } else {
                mutate(&mut payload, &mut random)
            }
            tokens.check_signed(&header, &payload);
        }
    }
}

// === key sets ===

/// Sets of one key, of each kind, and one of several.
fn key_sets() -> Vec<Value> {
    let kinds = ["RS256", "ES256", "ES384", "EdDSA", "HS256"].map(|name| Algorithm::from_name(name).unwrap());
    let keys: Vec<Value> = kinds.into_iter().map(|algorithm| Signer::new(algorithm).jwk(algorithm.as_str())).collect();
    let mut sets: Vec<Value> = keys.iter().map(|key| json!({ "keys": [key] })).collect();
    sets.push(json!({ "keys": keys }));
    sets
}

/// One member of one key changed, so that what comes behind the JSON gets its share.
fn mutate_member(set: &mut Value, random: &mut fastrand::Rng) {
    let keys = set["keys"].as_array_mut().unwrap();
    let at = random.usize(..keys.len());
    let key = keys[at].as_object_mut().unwrap();
    let names: Vec<String> = key.keys().cloned().collect();
    let (name, other) = (&names[random.usize(..names.len())], &names[random.usize(..names.len())]);
    let changed = match random.u8(..8) {
        0 => {
            key.remove(name);
            return;
        }
        1 => key[other].clone(),
        2 => [json!(null), json!(1), json!([]), json!({}), json!("")][random.usize(..5)].clone(),
        _ => {
            let mut text = key[name].as_str().unwrap().as_bytes().to_vec();
            mutate(&mut text, random);
            String::from_utf8_lossy(&text).into()
        }
    };
    key.insert(name.clone(), changed);
}

/// Whether there was a key in it.
fn check_key_set(document: &[u8], forged: &http::Request<()>) -> bool {
    let keys = KeySet::from_jwks(document);
    if let Ok(keys) = &keys {
        assert!(!keys.is_empty() && keys.len() <= portcullis_auth::MAX_KEYS);
        // Whatever the set became, it does not verify what none of its keys signed.
        assert!(now(&Jwt::new(keys.clone()).wall_clock(wall()).cache_bytes(0), forged).is_err());
    }
    keys.is_ok()
}

#[test]
fn no_mutated_key_set_does_harm() {
    let mut random = random();
    let documents = key_sets();
    let token = Signer::new(Algorithm::ES256).sign_with(&json!({"alg": "ES256", "kid": "ES256"}), &support::claims());
    let forged = support::request(&format!("Bearer {token}"));
    let (all, mut usable) = (executions(5_000), 0);
    for n in 0..all {
        let mut set = documents[random.usize(..documents.len())].clone();
        let within = n % 4 == 0;
        if within {
            mutate_member(&mut set, &mut random);
        }
        let mut document = set.to_string().into_bytes();
        if !within {
            mutate(&mut document, &mut random);
        }
        usable += u64::from(check_key_set(&document, &forged));
    }
    // Neither did all fail at the door, nor none.
    assert!((all / 10..all).contains(&usable), "{usable} of {all} had a key");
    eprintln!("{all} key sets, {usable} of them with a key");
}

// === the corpus: what once was, or might have been, a finding ===

#[test]
fn the_corpus_is_harmless() {
    let tokens = Tokens::new();
    let good = String::from_utf8(tokens.signed[0].clone()).unwrap();
    let corpus = [
        "a.!.b".to_owned(),
        ".".repeat(8192),
        "A".repeat(8192),
        format!("{good}."),
        format!(".{good}"),
        good.replace('.', ".."),
        format!("{good}\u{e9}"),
        format!("eyJhbGciOiJub25lIn0.{}.", good.split('.').nth(1).unwrap()),
        format!("{}..", b64(r#"{"alg":"HS256"}"#)),
        format!("{}.{}.AA", b64("[".repeat(5000)), b64("{}")),
        format!("{}.{}.AA", b64(r#"{"alg":"HS256","a":1e999}"#), b64("{}")),
        format!("{}.{}.AA", b64(b"\xff\xfe"), b64("{}")),
        format!("{}.{}.AA", b64(r#"{"alg":"\ud800"}"#), b64("{}")),
    ];
    for token in corpus {
        tokens.check(token.as_bytes());
        assert!(request(token.as_bytes()).is_none_or(|request| now(&tokens.jwt, &request).is_err()), "{token}");
    }
    for payload in [
        r#"{"exp":1e18}"#,
        r#"{"exp":-0.0}"#,
        r#"{"exp":"9"}"#,
        r#"{"$serde_json::private::Number":"1"}"#,
        "\u{feff}{}",
    ] {
        tokens.check_signed(br#"{"alg":"HS256"}"#, payload.as_bytes());
    }
    let forged = support::request("Bearer a.b.c");
    for document in [
        r#"{"keys":[{"kty":"RSA","n":"","e":""}]}"#,
        r#"{"keys":[{"kty":"RSA","n":"AA","e":"AA"}]}"#,
        r#"{"keys":[{"kty":"EC","crv":"P-256","x":"","y":""}]}"#,
        r#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":""}]}"#,
        r#"{"keys":[{"kty":"oct","alg":"HS256","k":""}]}"#,
        r#"{"keys":[null,[],{}]}"#,
        r#"{"kty":"oct"}"#,
    ] {
        assert!(!check_key_set(document.as_bytes(), &forged), "{document}");
    }
}
