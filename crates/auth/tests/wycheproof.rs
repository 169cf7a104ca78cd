//! C2SP's Wycheproof vectors for JSON Web Signatures, Keys and Crypto.
//!
//! `PORTCULLIS_VECTORS` names the folder they lie in; without it a run says what it left out, and one in CI fails.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

mod support;

use std::path::PathBuf;

use portcullis_auth::{Jwt, KeySet};
use serde_json::{Value, json};

/// Signatures marked valid that are refused here on purpose.
const REFUSED: [(&[u64], &str); 3] = [
    (&[346, 350], "the key says PS256 and the token PS384: a key has one algorithm; put right below"),
    (&[347, 351], "the key says ES521, which is no algorithm; put right below"),
    (&[372, 373], "characters outside base64url, which is read strictly"),
];

/// Signatures marked invalid that are, byte for byte, vector 357, which is marked valid.
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

fn run(file: &str, kind: &str) -> Option<(usize, usize, Vec<u64>)> {
    let vectors = vectors(file)?;
    let (mut valid, mut invalid, mut wrong) = (0, 0, Vec::new());
    for group in vectors["testGroups"].as_array().unwrap() {
        let keys = group.get("public").unwrap_or(&group["private"]);
        let keys = KeySet::from_jwks(keys.to_string());
        for test in group["tests"].as_array().unwrap() {
            // A token in JSON instead of the compact form stands there as an object.
            let Some(jws) = test.get(kind) else { continue };
            let jws = jws.as_str().map_or_else(|| jws.to_string(), str::to_owned);
            let accepted = keys.as_ref().is_ok_and(|keys| verifies(keys, &jws));
            let id = test["tcId"].as_u64().unwrap();
            match (test["result"].as_str().unwrap(), accepted) {
                ("valid", true) => valid += 1,
                ("invalid", false) => invalid += 1,
                _ => wrong.push(id),
            }
        }
    }
    Some((valid, invalid, wrong))
}

#[test]
fn signatures() {
    let Some((valid, invalid, wrong)) = run("json_web_signature_test.json", "jws") else { return };
    eprintln!("json_web_signature_test.json: {valid} valid accepted, {invalid} invalid refused, {wrong:?} otherwise");
    let mut expected: Vec<u64> = REFUSED.iter().flat_map(|(ids, _)| ids.iter().copied()).collect();
    expected.extend(CONTRADICTED);
    expected.sort_unstable();
    assert_eq!(wrong, expected);
    assert_eq!((valid, invalid), (40, 353));
    let vectors = vectors("json_web_signature_test.json").unwrap();
    let groups = vectors["testGroups"].as_array().unwrap();
    let tests = || groups.iter().flat_map(|group| group["tests"].as_array().unwrap());
    let jws = |id: u64| &tests().find(|test| test["tcId"] == id).unwrap()["jws"];
    assert!(CONTRADICTED.into_iter().all(|id| jws(id) == jws(357)));
}

#[test]
fn keys() {
    let Some((valid, invalid, wrong)) = run("json_web_key_test.json", "jws") else { return };
    eprintln!("json_web_key_test.json: {valid} valid accepted, {invalid} invalid refused, {wrong:?} otherwise");
    assert_eq!((valid, invalid, wrong), (5, 21, vec![]));
}

#[test]
fn crypto() {
    let Some((valid, invalid, wrong)) = run("json_web_crypto_test.json", "jws") else { return };
    eprintln!("json_web_crypto_test.json: {valid} valid accepted, {invalid} invalid refused, {wrong:?} otherwise");
    assert_eq!((valid, invalid, wrong), (4, 45, vec![]));
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

/// RFC 7520's examples whose keys carry another `alg` in the vectors than the tokens, with that put right.
#[test]
fn the_examples_of_rfc_7520_verify() {
    let Some(vectors) = vectors("json_web_signature_test.json") else { return };
    let mut checked = Vec::new();
    for group in vectors["testGroups"].as_array().unwrap() {
        if !group["comment"].as_str().is_some_and(|comment| comment.starts_with("rfc7520")) {
            continue;
        }
        let mut key = group.get("public").unwrap_or(&group["private"]).clone();
        key["alg"] = match key["alg"].as_str().unwrap() {
            "ES521" => "ES512".into(),
            "PS256" => "PS384".into(),
            right => right.into(),
        };
        let keys = KeySet::from_jwks(key.to_string()).unwrap();
        for test in group["tests"].as_array().unwrap() {
            assert!(verifies(&keys, test["jws"].as_str().unwrap()), "{test}");
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
            &Jwt::new(KeySet::hmac(portcullis_auth::Algorithm::HS256, [0; 32]).unwrap()),
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
