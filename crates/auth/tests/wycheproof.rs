//! C2SP's Wycheproof vectors for JSON Web Signatures, Keys and Crypto.
//!
//! `PORTCULLIS_VECTORS` names the folder they lie in; without it a run says what it left out, and one in CI fails.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

mod support;

use std::path::PathBuf;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use portcullis_auth::{Algorithm, Error, Jwt, KeySet};
use serde_json::{Value, json};

/// Signatures marked valid whose key names another algorithm than the token does (PS256 for PS384), or one that does not
/// exist (ES521). A key has one algorithm, so they are refused; where the user binds the key to the right one, they verify.
const MISNAMED: [u64; 4] = [346, 347, 350, 351];

/// Signatures marked valid with a `?` within the header or the payload, over the text without it. RFC 7515 §5.2 has both
/// decoded under the restriction that no additional characters have been used, so they are refused.
const STRAY: [u64; 2] = [372, 373];

/// Signatures marked invalid that are, byte for byte, vector 357, which is marked valid: one of the two marks is wrong.
const CONTRADICTED: [u64; 2] = [367, 370];

fn vectors(file: &str) -> Option<Value> {
    let Some(folder) = std::env::var_os("PORTCULLIS_VECTORS").map(PathBuf::from) else {
        assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "PORTCULLIS_VECTORS is not set");
        eprintln!("left out: {file}, as PORTCULLIS_VECTORS names no folder with Wycheproof's vectors");
        return None;
    };
    let path = [folder.join(file), folder.join("wycheproof").join(file)].into_iter().find(|path| path.exists());
    let path = path.unwrap_or_else(|| panic!("{file} is not in {}", folder.display()));
    Some(serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap())
}

/// The vectors' payloads are no claims, so what counts is how far the token gets: past its signature or not.
fn verifies(keys: &KeySet, jws: &str) -> bool {
    match support::now(&Jwt::new(keys.clone()).wall_clock(support::wall()), &request(jws)) {
        Ok(_) => true,
        Err(denied) => PAST_SIGNATURE.contains(&denied.to_string().as_str()),
    }
}

/// Only ever said of tokens whose signature held.
const PAST_SIGNATURE: [&str; 2] = ["the token's claims are malformed", "the token never expires"];

fn request(jws: &str) -> http::Request<()> {
    let mut request = http::Request::new(());
    if let Ok(value) = http::HeaderValue::try_from(format!("Bearer {jws}")) {
        request.headers_mut().insert("authorization", value);
    }
    request
}

/// How a group's key is loaded, for a token.
type Load = fn(&Value, &str) -> Result<KeySet, Error>;

/// As it stands, and bound to what it says of itself.
fn as_it_stands(keys: &Value, _: &str) -> Result<KeySet, Error> {
    KeySet::from_jwks(keys.to_string())
}

/// RFC 7520's, as a user would who knows what they are for; others as they stand.
fn bound(keys: &Value, jws: &str) -> Result<KeySet, Error> {
    if keys["kid"] != "bilbo.baggins@hobbiton.example" {
        return as_it_stands(keys, jws);
    }
    let header = URL_SAFE_NO_PAD.decode(jws.split('.').next().unwrap()).unwrap();
    let header: Value = serde_json::from_slice(&header).unwrap();
    KeySet::from_jwk(Algorithm::from_name(header["alg"].as_str().unwrap()).unwrap(), keys.to_string())
}

fn run(file: &str, kind: &str, load: Load) -> Option<(usize, usize, Vec<u64>)> {
    let vectors = vectors(file)?;
    let (mut valid, mut invalid, mut wrong) = (0, 0, Vec::new());
    for group in vectors["testGroups"].as_array().unwrap() {
        let keys = group.get("public").unwrap_or(&group["private"]);
        for test in group["tests"].as_array().unwrap() {
            // A token in JSON instead of the compact form stands there as an object.
            let Some(jws) = test.get(kind) else { continue };
            let jws = jws.as_str().map_or_else(|| jws.to_string(), str::to_owned);
            let accepted = load(keys, &jws).is_ok_and(|keys| verifies(&keys, &jws));
            let id = test["tcId"].as_u64().unwrap();
            match (test["result"].as_str().unwrap(), accepted) {
                ("valid", true) => valid += 1,
                ("invalid", false) => invalid += 1,
                _ => wrong.push(id),
            }
        }
    }
    eprintln!("{file}: {valid} valid accepted, {invalid} invalid refused, {wrong:?} otherwise");
    Some((valid, invalid, wrong))
}

fn sorted(ids: &[&[u64]]) -> Vec<u64> {
    let mut ids = ids.concat();
    ids.sort_unstable();
    ids
}

#[test]
fn signatures() {
    let file = "json_web_signature_test.json";
    let Some(result) = run(file, "jws", as_it_stands) else { return };
    assert_eq!(result, (40, 353, sorted(&[&MISNAMED, &STRAY, &CONTRADICTED])));
    assert_eq!(run(file, "jws", bound).unwrap(), (44, 353, sorted(&[&STRAY, &CONTRADICTED])));
    let vectors = vectors(file).unwrap();
    let groups = vectors["testGroups"].as_array().unwrap();
    let tests = || groups.iter().flat_map(|group| group["tests"].as_array().unwrap());
    let jws = |id: u64| tests().find(|test| test["tcId"] == id).unwrap()["jws"].as_str().unwrap();
    assert!(CONTRADICTED.into_iter().all(|id| jws(id) == jws(357)));
    assert!(STRAY.into_iter().all(|id| jws(id).replace('?', "") == jws(357)));
}

#[test]
fn keys() {
    let Some(result) = run("json_web_key_test.json", "jws", as_it_stands) else { return };
    assert_eq!(result, (5, 21, vec![]));
}

#[test]
fn crypto() {
    let Some(result) = run("json_web_crypto_test.json", "jws", as_it_stands) else { return };
    assert_eq!(result, (4, 45, vec![]));
    // No encrypted token passes for a signed one, whatever the key.
    let vectors = vectors("json_web_crypto_test.json").unwrap();
    let mut encrypted = 0;
    for group in vectors["testGroups"].as_array().unwrap() {
        let keys = KeySet::from_jwks(group["private"].to_string());
        for jwe in group["tests"].as_array().unwrap().iter().filter_map(|test| test.get("jwe")) {
            encrypted += 1;
            let jwe = jwe.as_str().map_or_else(|| jwe.to_string(), str::to_owned);
            assert!(!keys.as_ref().is_ok_and(|keys| verifies(keys, &jwe)), "{jwe}");
        }
    }
    assert_eq!(encrypted, 34);
}

#[test]
fn the_examples_of_rfc_7520_verify() {
    let Some(vectors) = vectors("json_web_signature_test.json") else { return };
    let mut checked = Vec::new();
    for group in vectors["testGroups"].as_array().unwrap() {
        if !group["comment"].as_str().is_some_and(|comment| comment.starts_with("rfc7520")) {
            continue;
        }
        for test in group["tests"].as_array().unwrap() {
            let jws = test["jws"].as_str().unwrap();
            let keys = bound(group.get("public").unwrap_or(&group["private"]), jws).unwrap();
            assert!(verifies(&keys, jws), "{test}");
            checked.push(test["comment"].as_str().unwrap().to_owned());
        }
    }
    checked.sort_unstable();
    let twice = ["Figure13", "Figure13", "Figure20", "Figure20", "Figure27", "Figure27", "Figure35", "Figure35"];
    assert_eq!(checked, twice);
}

/// A library people have used for years says the same, but for what it does not check.
#[test]
fn jsonwebtoken_agrees() {
    use jsonwebtoken::{DecodingKey, crypto, jwk::Jwk};
    let Some(vectors) = vectors("json_web_signature_test.json") else { return };
    let mut disagreed = Vec::new();
    for group in vectors["testGroups"].as_array().unwrap() {
        let key = group.get("public").unwrap_or(&group["private"]);
        let ours = KeySet::from_jwks(key.to_string());
        let Ok(jwk) = serde_json::from_value::<Jwk>(key.clone()) else { continue };
        let Ok(theirs) = DecodingKey::from_jwk(&jwk) else { continue };
        for test in group["tests"].as_array().unwrap() {
            let jws = test["jws"].as_str().unwrap();
            let Ok(header) = jsonwebtoken::decode_header(jws) else { continue };
            let Some((signed, signature)) = jws.rsplit_once('.') else { continue };
            let they = crypto::verify(signature, signed.as_bytes(), &theirs, header.alg).unwrap_or(false);
            let we = ours.as_ref().is_ok_and(|keys| verifies(keys, jws));
            if we != they {
                disagreed.push((test["tcId"].as_u64().unwrap(), we));
            }
        }
    }
    assert!(disagreed.iter().all(|(_, we)| !we), "accepted here alone: {disagreed:?}");
    eprintln!("refused here and not by jsonwebtoken: {:?}", disagreed.iter().map(|(id, _)| id).collect::<Vec<_>>());
}

// === RFC 7515 and RFC 7520, whose keys are public ===

#[test]
fn the_examples_of_rfc_7515_verify() {
    // Appendix A.1 to A.3; the payload claims an `exp` of 2011, which is as far as they get.
    let rsa = json!({"kty": "RSA", "e": "AQAB", "n": "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yRT-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ"});
    let ec = json!({"kty": "EC", "crv": "P-256", "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU", "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"});
    let oct = json!({"kty": "oct", "alg": "HS256", "k": "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow"});
    let payload = "eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ";
    for (key, header, signature) in [
        (oct, "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9", "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"),
        (
            rsa,
            "eyJhbGciOiJSUzI1NiJ9",
            "cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdbF9CUAr7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe77Rw",
        ),
        (
            ec,
            "eyJhbGciOiJFUzI1NiJ9",
            "DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q",
        ),
    ] {
        let keys = KeySet::from_jwks(key.to_string()).unwrap();
        let says = |jws: String| support::now(&Jwt::new(keys.clone()), &request(&jws)).unwrap_err().to_string();
        assert_eq!(says(format!("{header}.{payload}.{signature}")), "the token expired");
        let forged = support::b64(r#"{"iss":"joe"}"#);
        assert_eq!(says(format!("{header}.{forged}.{signature}")), "the token's signature does not hold");
    }
    // A.5: unsecured.
    assert!(
        support::now(
            &Jwt::new(KeySet::hmac(Algorithm::HS256, [0; 32]).unwrap()),
            &request(&format!("eyJhbGciOiJub25lIn0.{payload}."))
        )
        .is_err()
    );
}

#[test]
fn the_ed25519_example_of_rfc_8037_verifies() {
    let key = json!({"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"});
    let keys = KeySet::from_jwks(key.to_string()).unwrap();
    let jws = "eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc.hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg";
    assert!(verifies(&keys, jws));
    assert!(!verifies(&keys, &jws.replace(".hg", ".gg")));
}
