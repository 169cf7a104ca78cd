//! What a token must be to be believed, and every way it may not.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

mod support;

use std::time::Duration;

use portcullis_auth::{Algorithm, Denied, Jwt, KeySet};
use portcullis_core::{Carried, PeerTls};
use serde_json::{Value, json};
use support::{ALL, NOW, Signer, ask, b64, claims, now, request, wall};

fn jwt(signer: &Signer) -> Jwt {
    Jwt::new(signer.key_set("a")).wall_clock(wall())
}

fn hs256() -> (Signer, Jwt) {
    let signer = Signer::new(Algorithm::HS256);
    let jwt = jwt(&signer);
    (signer, jwt)
}

fn with(mut claims: Value, name: &str, value: impl Into<Value>) -> Value {
    claims[name] = value.into();
    claims
}

fn reason(result: Result<portcullis_core::Identity, Denied>) -> String {
    result.expect_err("the token was accepted").to_string()
}

#[test]
fn every_algorithm_verifies_what_it_signed_and_nothing_else() {
    for algorithm in ALL {
        let (signer, other) = (Signer::new(algorithm), Signer::new(algorithm));
        let jwt = jwt(&signer);
        let token = signer.sign(&claims());
        assert_eq!(ask(&jwt, &token).unwrap().subject(), "ada", "{algorithm}");
        assert_eq!(reason(ask(&jwt, &other.sign(&claims()))), "the token's signature does not hold", "{algorithm}");
        let (signed, signature) = token.rsplit_once('.').unwrap();
        let (header, _) = signed.split_once('.').unwrap();
        let forged = format!("{header}.{}.{signature}", b64(r#"{"sub":"eve","exp":9999999999}"#));
        assert_eq!(reason(ask(&jwt, &forged)), "the token's signature does not hold", "{algorithm}");
    }
}

#[test]
fn pem_keys_verify_as_their_jwk_does() {
    for algorithm in ALL.into_iter().filter(|algorithm| !algorithm.as_str().starts_with("HS")) {
        let signer = Signer::new(algorithm);
        let jwt = Jwt::new(KeySet::from_pem(algorithm, signer.pem()).unwrap()).wall_clock(wall());
        assert!(ask(&jwt, &signer.sign(&claims())).is_ok(), "{algorithm}");
        assert!(KeySet::from_pem(Algorithm::HS256, signer.pem()).unwrap_err().is_key(), "a public key is no secret");
        for other in ALL.into_iter().filter(|other| other.as_str()[..2] != algorithm.as_str()[..2]) {
            let rsa = |algorithm: Algorithm| matches!(&algorithm.as_str()[..2], "RS" | "PS");
            if !(rsa(algorithm) && rsa(other)) {
                assert!(KeySet::from_pem(other, signer.pem()).is_err(), "{algorithm} key for {other}");
            }
        }
    }
    let signer = Signer::new(Algorithm::RS256);
    let jwt = Jwt::new(KeySet::from_pem(Algorithm::RS256, signer.pkcs1_pem()).unwrap()).wall_clock(wall());
    assert!(ask(&jwt, &signer.sign(&claims())).is_ok());
    for pem in ["", "-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----", "secret"] {
        assert!(KeySet::from_pem(Algorithm::RS256, pem).is_err());
    }
}

#[test]
fn what_another_library_signed_verifies() {
    use jsonwebtoken::{EncodingKey, Header, encode};
    let secret = [7; 64];
    for (ours, theirs) in [
        (Algorithm::HS256, jsonwebtoken::Algorithm::HS256),
        (Algorithm::HS384, jsonwebtoken::Algorithm::HS384),
        (Algorithm::HS512, jsonwebtoken::Algorithm::HS512),
    ] {
        let token = encode(&Header::new(theirs), &claims(), &EncodingKey::from_secret(&secret)).unwrap();
        let jwt = Jwt::new(KeySet::hmac(ours, secret).unwrap()).wall_clock(wall());
        assert!(ask(&jwt, &token).is_ok());
    }
    let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let key = EncodingKey::from_ed_pem(pair.serialize_pem().as_bytes()).unwrap();
    let token = encode(&Header::new(jsonwebtoken::Algorithm::EdDSA), &claims(), &key).unwrap();
    let jwt = Jwt::new(KeySet::from_pem(Algorithm::EdDSA, pair.public_key_pem()).unwrap()).wall_clock(wall());
    assert!(ask(&jwt, &token).is_ok());
}

// === the header ===

#[test]
fn the_key_decides_the_algorithm_not_the_token() {
    // A public key's bytes as an HMAC secret; RS as PS; another hash.
    let rsa = Signer::new(Algorithm::RS256);
    let jwt = jwt(&rsa);
    for name in ["none", "None", "nONe", "NONE", "", "rs256", "HS256", "RS384", "PS256", "ES256", "RS256 ", "RS1"] {
        let token = rsa.sign_with(&json!({"alg": name, "kid": "a"}), &claims());
        assert!(ask(&jwt, &token).is_err(), "{name}");
    }
    let pem = rsa.pem();
    let confused = KeySet::hmac(Algorithm::HS256, &pem).unwrap();
    let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, pem.as_bytes());
    let signed = format!("{}.{}", b64(r#"{"alg":"HS256"}"#), b64(claims().to_string()));
    let token = format!("{signed}.{}", b64(aws_lc_rs::hmac::sign(&key, signed.as_bytes())));
    assert!(ask(&Jwt::new(confused).wall_clock(wall()), &token).is_ok(), "the attack as such is sound");
    assert!(ask(&Jwt::new(KeySet::from_pem(Algorithm::RS256, &pem).unwrap()).wall_clock(wall()), &token).is_err());
    for alg in [json!(null), json!(["RS256"]), json!(1), json!({"RS256": 1})] {
        assert!(ask(&jwt, &rsa.sign_with(&json!({"alg": alg}), &claims())).is_err());
    }
    assert!(ask(&jwt, &rsa.sign_with(&json!({"kid": "a"}), &claims())).is_err(), "no alg");
    let unsigned = format!("{}.{}.", b64(r#"{"alg":"none"}"#), b64(claims().to_string()));
    assert!(ask(&jwt, &unsigned).is_err());
}

#[test]
fn extensions_that_are_not_known_are_refused() {
    let (signer, jwt) = hs256();
    for (name, value) in [
        ("crit", json!(["exp"])),
        ("crit", json!([])),
        ("crit", json!(["alg"])),
        ("crit", json!(["b64", "b64"])),
        ("crit", json!("exp")),
        ("crit", json!(null)),
        ("b64", json!(false)),
        ("zip", json!("DEF")),
    ] {
        let header = with(json!({"alg": "HS256", "kid": "a", "exp": 1}), name, value);
        assert_eq!(
            reason(ask(&jwt, &signer.sign_with(&header, &claims()))),
            "the token wants an extension that is not known here"
        );
    }
}

#[test]
fn keys_in_the_header_are_not_looked_at() {
    let (signer, jwt) = hs256();
    let evil = Signer::new(Algorithm::ES256);
    for (name, value) in [
        ("jwk", evil.jwk("a")),
        ("jku", json!("https://evil.example/keys")),
        ("x5u", json!("https://evil.example/cert")),
        ("x5c", json!(["AAAA"])),
    ] {
        let header = with(json!({"alg": "ES256", "kid": "a"}), name, value.clone());
        assert!(ask(&jwt, &evil.sign_with(&header, &claims())).is_err(), "{name} was believed");
        let header = with(json!({"alg": "HS256", "kid": "a"}), name, value);
        assert!(ask(&jwt, &signer.sign_with(&header, &claims())).is_ok(), "{name} alone is harmless");
    }
}

#[test]
fn the_kid_chooses_among_the_keys_and_nothing_more() {
    let (one, two) = (Signer::new(Algorithm::ES256), Signer::new(Algorithm::ES256));
    let keys = KeySet::from_jwks(json!({"keys": [one.jwk("1"), two.jwk("2")]}).to_string()).unwrap();
    let jwt = Jwt::new(keys).wall_clock(wall());
    let token = |signer: &Signer, kid: Value| signer.sign_with(&json!({"alg": "ES256", "kid": kid}), &claims());
    assert!(ask(&jwt, &token(&one, "1".into())).is_ok());
    assert!(ask(&jwt, &token(&two, "2".into())).is_ok());
    assert!(ask(&jwt, &token(&one, "2".into())).is_err());
    for kid in ["3", "", "1 ", "' OR 1=1 --", "../../etc/passwd", "a\r\nb", "\0"] {
        assert_eq!(reason(ask(&jwt, &token(&one, kid.into()))), "the token is signed with an unknown key", "{kid:?}");
    }
    assert_eq!(reason(ask(&jwt, &token(&one, "k".repeat(2000).into()))), "the token is malformed");
    assert_eq!(reason(ask(&jwt, &token(&one, "k".repeat(8 << 10).into()))), "the token is too long");
    for kid in [json!(1), json!(null), json!(["1"])] {
        assert_eq!(reason(ask(&jwt, &token(&one, kid))), "the token is malformed");
    }
    let without = one.sign_with(&json!({"alg": "ES256"}), &claims());
    assert_eq!(reason(ask(&jwt, &without)), "the token does not say which key signed it");
    let single = Jwt::new(one.key_set("1")).wall_clock(wall());
    assert!(ask(&single, &without).is_ok(), "the only key needs no name");
}

#[test]
fn a_token_of_another_type_is_no_access_token() {
    let (signer, jwt) = hs256();
    let typed = |typ: Value| signer.sign_with(&with(json!({"alg": "HS256"}), "typ", typ), &claims());
    for typ in ["JWT", "jwt", "at+jwt", "application/at+jwt", "AT+JWT", "application/jwt"] {
        assert!(ask(&jwt, &typed(typ.into())).is_ok(), "{typ}");
    }
    for typ in ["id_token", "dpop+jwt", "logout+jwt", "application/logout+jwt", "JWS", "", "application/"] {
        assert_eq!(reason(ask(&jwt, &typed(typ.into()))), "the token is of another type", "{typ}");
    }
    assert!(ask(&jwt, &typed(json!(1))).is_err());
    let jwt = jwt.typ("secevent+jwt");
    assert!(ask(&jwt, &typed("secevent+jwt".into())).is_ok());
    assert!(ask(&jwt, &typed("JWT".into())).is_err());
    assert!(ask(&jwt, &signer.sign_with(&json!({"alg": "HS256"}), &claims())).is_err());
}

#[test]
fn access_tokens_have_all_their_claims() {
    let (signer, jwt) = hs256();
    let jwt = jwt.access_tokens_only().issuer("i").audience("a");
    let full = json!({"iss": "i", "exp": NOW + 60, "aud": "a", "sub": "s", "client_id": "c", "iat": NOW, "jti": "j"});
    let token = |typ: &str, claims: &Value| signer.sign_with(&json!({"alg": "HS256", "typ": typ}), claims);
    assert!(ask(&jwt, &token("at+jwt", &full)).is_ok());
    assert!(ask(&jwt, &token("JWT", &full)).is_err());
    for name in full.as_object().unwrap().keys() {
        let mut less = full.clone();
        less.as_object_mut().unwrap().remove(name);
        assert!(ask(&jwt, &token("at+jwt", &less)).is_err(), "without {name}");
    }
}

// === the claims ===

#[test]
fn the_issuer_is_exact() {
    let (signer, jwt) = hs256();
    let jwt = jwt.issuer("https://id.example/a");
    let from = |issuer: Value| ask(&jwt, &signer.sign(&with(claims(), "iss", issuer)));
    assert_eq!(from("https://id.example/a".into()).unwrap().issuer(), Some("https://id.example/a"));
    for issuer in ["https://id.example/a/", "https://id.example", "https://ID.example/a", "https://id.example/a ", ""] {
        assert_eq!(reason(from(issuer.into())), "the token is from another issuer");
    }
    for issuer in [json!(["https://id.example/a"]), json!(1), json!(null), json!({"a": 1})] {
        assert_eq!(reason(from(issuer)), "a claim is of the wrong type");
    }
    assert_eq!(reason(ask(&jwt, &signer.sign(&claims()))), "the token is from another issuer");
}

#[test]
fn the_audience_names_this_service() {
    let (signer, open) = hs256();
    let jwt = open.clone().audience("orders").audience("carts");
    let to = |jwt: &Jwt, audience: Value| ask(jwt, &signer.sign(&with(claims(), "aud", audience)));
    for audience in [json!("orders"), json!("carts"), json!(["users", "carts"])] {
        assert!(to(&jwt, audience).is_ok());
    }
    for audience in [json!("order"), json!("Orders"), json!([]), json!(["users"]), json!("")] {
        assert_eq!(reason(to(&jwt, audience)), "the token is for another audience");
    }
    for audience in [json!(null), json!(1), json!({"orders": 1}), json!(["orders", 1])] {
        assert_eq!(reason(to(&jwt, audience)), "a claim is of the wrong type");
    }
    assert_eq!(reason(ask(&jwt, &signer.sign(&claims()))), "the token is for another audience");
    assert_eq!(reason(to(&open, "orders".into())), "the token is for another audience", "nobody said we are it");
}

#[test]
fn dates_are_numbers_within_the_leeway() {
    let (signer, jwt) = hs256();
    let at = |name: &str, value: Value| ask(&jwt, &signer.sign(&with(claims(), name, value)));
    let seconds = |offset: i64| json!(NOW.checked_add_signed(offset).unwrap());
    for (name, value) in [
        ("exp", seconds(-59)),
        ("exp", json!(NOW as f64 - 59.5)),
        ("exp", json!(253_402_300_799_u64)),
        ("nbf", seconds(60)),
        ("nbf", json!(0)),
        ("iat", seconds(60)),
    ] {
        assert!(at(name, value.clone()).is_ok(), "{name} {value}");
    }
    for (name, value, why) in [
        ("exp", seconds(-60), "the token expired"),
        ("exp", json!(0), "the token expired"),
        ("nbf", seconds(61), "the token is not valid yet"),
        ("iat", seconds(61), "the token was issued in the future"),
        ("exp", json!(-1), "a date is out of range"),
        ("exp", json!(1e300), "a date is out of range"),
        ("nbf", json!(u64::MAX), "a date is out of range"),
        ("exp", json!(format!("{}", NOW + 60)), "a claim is of the wrong type"),
        ("exp", json!(null), "a claim is of the wrong type"),
        ("exp", json!([NOW + 60]), "a claim is of the wrong type"),
        ("nbf", json!("0"), "a claim is of the wrong type"),
        ("iat", json!(true), "a claim is of the wrong type"),
    ] {
        assert_eq!(reason(at(name, value)), why);
    }
    assert_eq!(reason(ask(&jwt, &signer.sign(&json!({"sub": "ada"})))), "the token never expires");
    assert!(ask(&jwt.insecure_without_expiry(), &signer.sign(&json!({"sub": "ada"}))).is_ok());
}

#[test]
fn the_leeway_has_a_maximum_and_age_is_counted_from_iat() {
    let (signer, jwt) = hs256();
    let expired = |ago: u64| signer.sign(&with(claims(), "exp", NOW - ago));
    let long = jwt.clone().leeway(Duration::from_secs(86400));
    assert!(ask(&long, &expired(299)).is_ok());
    assert!(ask(&long, &expired(300)).is_err());
    let young = jwt.max_age(Duration::from_secs(600)).leeway(Duration::ZERO);
    let issued = |ago: u64| signer.sign(&with(claims(), "iat", NOW - ago));
    assert!(ask(&young, &issued(599)).is_ok());
    assert_eq!(reason(ask(&young, &issued(600))), "the token is too old");
    assert_eq!(reason(ask(&young, &signer.sign(&claims()))), "the token does not say when it was issued");
}

#[test]
fn a_token_says_whose_it_is() {
    let (signer, jwt) = hs256();
    for sub in [json!({"id": 1}), json!(1), json!(null), json!(["ada"])] {
        assert_eq!(reason(ask(&jwt, &signer.sign(&with(claims(), "sub", sub)))), "a claim is of the wrong type");
    }
    for sub in ["", "ada\0", "ada\r\nx-role: admin"] {
        assert!(ask(&jwt, &signer.sign(&with(claims(), "sub", sub))).is_err());
    }
    let machine = json!({"client_id": "cron", "exp": NOW + 60});
    assert!(ask(&jwt, &signer.sign(&machine)).is_err());
    assert_eq!(ask(&jwt.subject_from("/client_id"), &signer.sign(&machine)).unwrap().subject(), "cron");
}

#[test]
fn scopes_and_roles_are_read_where_providers_write_them() {
    let (signer, jwt) = hs256();
    let identity = |more: Value| {
        let mut all = claims();
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        ask(&jwt.clone().roles_from("/realm_access/roles"), &signer.sign(&all))
    };
    assert_eq!(identity(json!({"scope": "a b"})).unwrap().scopes(), ["a", "b"]);
    assert_eq!(identity(json!({"scp": "a  b "})).unwrap().scopes(), ["a", "b"]);
    assert_eq!(identity(json!({"scp": ["a", "b"]})).unwrap().scopes(), ["a", "b"]);
    assert_eq!(identity(json!({"realm_access": {"roles": ["r"]}})).unwrap().roles(), ["r"]);
    for wrong in [json!({"scope": 1}), json!({"scp": [1]}), json!({"realm_access": {"roles": {"a": 1}}})] {
        assert_eq!(reason(identity(wrong)), "a claim is of the wrong type");
    }
}

#[test]
fn claims_are_one_strict_object() {
    let (signer, jwt) = hs256();
    let header = r#"{"alg":"HS256"}"#;
    let exp = NOW + 60;
    let nested = format!(r#"{{"sub":"a","exp":{exp},"x":{}{}}}"#, "[".repeat(200), "]".repeat(200));
    for payload in [
        format!(r#"{{"sub":"ada","sub":"eve","exp":{exp}}}"#),
        format!(r#"{{"sub":"ada","exp":{exp},"exp":{exp}}}"#),
        format!(r#"{{"sub":"\ud800","exp":{exp}}}"#),
        format!(r#"[{{"sub":"ada","exp":{exp}}}]"#),
        format!(r#"{{"sub":"ada","exp":{exp}}}x"#),
        "\"ada\"".into(),
        "null".into(),
        String::new(),
        nested,
    ] {
        assert_eq!(
            reason(ask(&jwt, &signer.sign_text(header, &payload))),
            "the token's claims are malformed",
            "{payload}"
        );
    }
    let payload = claims().to_string();
    for header in [r#"{"alg":"HS256","alg":"HS256"}"#, r#"{"alg":"HS256","kid":"a","kid":"a"}"#, "[]", "\"HS256\""] {
        assert_eq!(reason(ask(&jwt, &signer.sign_text(header, &payload))), "the token is malformed");
    }
}

#[test]
fn a_nested_token_is_no_claims() {
    let (signer, jwt) = hs256();
    let inner = signer.sign(&claims());
    assert!(ask(&jwt, &signer.sign_text(r#"{"alg":"HS256","cty":"JWT"}"#, &inner)).is_err());
}

// === the encoding ===

#[test]
fn only_strict_base64url_in_three_parts_is_a_token() {
    let (signer, jwt) = hs256();
    let token = signer.sign(&claims());
    assert!(ask(&jwt, &token).is_ok());
    let [header, payload, signature] = token.split('.').collect::<Vec<_>>()[..] else { panic!() };
    let last = signature.chars().last().unwrap();
    // 32 bytes leave two bits of the last character unused.
    let alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let stray = alphabet.chars().nth(alphabet.find(last).unwrap() | 1).unwrap();
    let cases = [
        format!("{header}{payload}{signature}"),
        format!("{header}.{payload}"),
        format!("{token}."),
        format!(".{token}"),
        format!("{header}..{payload}.{signature}"),
        format!("{header}.{payload}."),
        format!("..{signature}"),
        "..".into(),
        ".".repeat(1000),
        format!("{token}="),
        format!("{header}=.{payload}.{signature}"),
        format!("{header}.{payload}==.{signature}"),
        format!("{header}.{payload}.{}{stray}", &signature[..signature.len() - 1]),
        format!("{header}.{payload}.{}", signature.replace(['-', '_'], "+")) + "+",
        format!("{header}.!.{signature}"),
        format!("{header}. {payload}.{signature}"),
        format!("{header}.{payload}.{signature} "),
        format!("{header}\t.{payload}.{signature}"),
        format!("{header}.{}\u{e9}.{signature}", &payload[1..]),
        format!("{header}.{payload}.{signature}A"),
        token.to_uppercase(),
    ];
    for case in cases {
        assert!(ask(&jwt, &case).is_err(), "{case}");
    }
    assert!(ask(&jwt.max_token_bytes(token.len() - 1), &token).is_err());
    let (signer, jwt) = hs256();
    let huge = signer.sign(&with(claims(), "x", "x".repeat(1 << 20)));
    assert_eq!(reason(ask(&jwt, &huge)), "the token is too long");
}

// === the carrier ===

#[test]
fn the_carrier_is_one_bearer_authorization() {
    let (signer, jwt) = hs256();
    let token = signer.sign(&claims());
    for scheme in ["Bearer", "bearer", "BEARER", "Bearer  "] {
        assert!(now(&jwt, &request(&format!("{scheme} {token}"))).is_ok(), "{scheme}");
    }
    for missing in ["Basic YTpi", "DPoP x", "", "Bearerx y", &token] {
        assert!(now(&jwt, &request(missing)).unwrap_err().is_missing(), "{missing}");
    }
    let malformed = [
        "Bearer".to_owned(),
        "Bearer ".to_owned(),
        format!("Bearer\t{token}"),
        format!("Bearer {token} {token}"),
        format!("Bearer {token}, Bearer {token}"),
        format!("Bearer,{token}"),
    ];
    for malformed in malformed {
        assert!(
            matches!(now(&jwt, &request(&malformed)), Err(denied) if denied == Denied::malformed("the token is not one word") || denied == Denied::malformed("an authorization without credentials")),
            "{malformed}"
        );
    }
    let mut twice = request(&format!("Bearer {token}"));
    twice.headers_mut().append("authorization", format!("Bearer {token}").parse().unwrap());
    assert_eq!(reason(now(&jwt, &twice)), "more than one authorization");
    let query = http::Request::builder().uri(format!("/?access_token={token}")).body(()).unwrap();
    assert!(now(&jwt, &query).unwrap_err().is_missing(), "a token in the target is not looked at");
    let mut both = request(&format!("Bearer {token}"));
    *both.uri_mut() = "/?access_token=another".parse().unwrap();
    both.headers_mut().insert("cookie", "access_token=another; token=another".parse().unwrap());
    assert!(now(&jwt, &both).is_ok(), "nor beside one in the header");
    both.headers_mut().remove("authorization");
    assert!(now(&jwt, &both).unwrap_err().is_missing(), "nor one in a cookie");
    let latin = http::HeaderValue::from_bytes(b"Bearer \xe9.\xe9.\xe9").unwrap();
    let mut latin_request = request("");
    latin_request.headers_mut().insert("authorization", latin);
    assert!(now(&jwt, &latin_request).is_err());
}

#[test]
fn a_bound_token_needs_its_certificate() {
    let (signer, jwt) = hs256();
    let certificate = bytes::Bytes::from_static(b"a certificate");
    let thumbprint = b64(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &certificate));
    let bound = |cnf: Value| request(&format!("Bearer {}", signer.sign(&with(claims(), "cnf", cnf))));
    let mut with_certificate = bound(json!({"x5t#S256": thumbprint}));
    assert!(now(&jwt, &with_certificate).is_err(), "no certificate");
    PeerTls::new(vec![certificate]).attach(with_certificate.extensions_mut());
    assert!(now(&jwt, &with_certificate).is_ok());
    PeerTls::new(vec![bytes::Bytes::from_static(b"another")]).attach(with_certificate.extensions_mut());
    assert_eq!(reason(now(&jwt, &with_certificate)), "the token is bound to another certificate");
    for cnf in [
        json!({"jkt": "x"}),
        json!({}),
        json!("x"),
        json!({"x5t#S256": "AA"}),
        json!({"x5t#S256": 1}),
        json!({"jkt": "x", "x5t#S256": thumbprint}),
    ] {
        assert_eq!(reason(now(&jwt, &bound(cnf))), "the token is bound in a way that is not known here");
    }
}

// === several issuers ===

#[test]
fn a_token_is_only_checked_with_its_issuers_keys() {
    let (a, b) = (Signer::new(Algorithm::ES256), Signer::new(Algorithm::ES256));
    // The same kid on purpose.
    let jwt = Jwt::new(a.key_set("a")).wall_clock(wall()).issuer("A").audience("for-a");
    let jwt = jwt.also(Jwt::new(b.key_set("a")).issuer("B").audience("for-b")).unwrap();
    let token = |signer: &Signer, issuer: &str, audience: &str| {
        signer.sign(&json!({"sub": "ada", "exp": NOW + 60, "iss": issuer, "aud": audience}))
    };
    assert!(ask(&jwt, &token(&a, "A", "for-a")).is_ok());
    assert!(ask(&jwt, &token(&b, "B", "for-b")).is_ok());
    assert_eq!(reason(ask(&jwt, &token(&b, "A", "for-a"))), "the token's signature does not hold");
    assert_eq!(reason(ask(&jwt, &token(&a, "B", "for-b"))), "the token's signature does not hold");
    assert_eq!(reason(ask(&jwt, &token(&a, "A", "for-b"))), "the token is for another audience");
    assert_eq!(reason(ask(&jwt, &token(&a, "C", "for-a"))), "the token is from another issuer");
    assert_eq!(reason(ask(&jwt, &a.sign(&claims()))), "the token does not say who issued it");
    let jwt = Jwt::new(a.key_set("a")).issuer("A");
    assert!(jwt.clone().also(Jwt::new(b.key_set("a"))).unwrap_err().is_setting(), "an issuer without a name");
    assert!(jwt.also(Jwt::new(b.key_set("a")).issuer("A")).unwrap_err().is_setting(), "the same name twice");
}

#[test]
fn what_one_provider_believed_is_not_believed_of_another() {
    let (a, b) = (Signer::new(Algorithm::ES256), Signer::new(Algorithm::ES256));
    let token = a.sign(&with(claims(), "iss", "A"));
    let alone = Jwt::new(a.key_set("a")).wall_clock(wall()).issuer("A");
    let stats = |jwt: &Jwt| jwt.cache_stats().map(|stats| (stats.hits, stats.misses)).unwrap();
    assert!(ask(&alone, &token).is_ok() && ask(&alone, &token).is_ok());
    assert_eq!(stats(&alone), (1, 1));
    // Handles that share the memory of the first and differ in whom they believe.
    let both = alone.clone().also(Jwt::new(b.key_set("a")).issuer("B")).unwrap();
    assert!(ask(&both, &token).is_ok());
    assert_eq!(stats(&both), (1, 2), "verified anew");
    let renamed = alone.clone().issuer("B");
    assert_eq!(reason(ask(&renamed, &token)), "the token is from another issuer");
    assert_eq!(reason(ask(&renamed, &token)), "the token is from another issuer", "nor the second time");
    let others = Jwt::new(b.key_set("a")).wall_clock(wall()).issuer("A");
    assert_eq!(reason(ask(&others, &token)), "the token's signature does not hold");
}

// === keys ===

#[test]
fn a_key_is_bound_to_the_algorithm_its_user_names() {
    let signer = Signer::new(Algorithm::PS384);
    let mut jwk = signer.jwk("a");
    let bound = |algorithm, jwk: &Value| KeySet::from_jwk(algorithm, jwk.to_string());
    let accepted = |keys: KeySet| ask(&Jwt::new(keys).wall_clock(wall()), &signer.sign(&claims())).is_ok();
    for alg in [json!("PS384"), json!("PS256"), json!("PS999")] {
        jwk["alg"] = alg;
        assert!(accepted(bound(Algorithm::PS384, &jwk).unwrap()));
        assert!(!accepted(bound(Algorithm::RS256, &jwk).unwrap()), "one algorithm, and only that");
    }
    jwk.as_object_mut().unwrap().remove("alg");
    assert!(accepted(bound(Algorithm::PS384, &jwk).unwrap()));
    assert!(!accepted(KeySet::from_jwks(jwk.to_string()).unwrap()), "RS256, where nobody says");
    for (algorithm, jwk) in [
        (Algorithm::HS256, jwk.clone()),
        (Algorithm::ES256, jwk.clone()),
        (Algorithm::ES384, Signer::new(Algorithm::ES256).jwk("a")),
        (Algorithm::EdDSA, Signer::new(Algorithm::ES256).jwk("a")),
        (Algorithm::RS256, with(jwk.clone(), "use", "enc")),
        (Algorithm::RS256, with(jwk, "alg", 1)),
        (Algorithm::RS256, json!({"keys": []})),
        (Algorithm::RS256, json!([])),
    ] {
        assert!(bound(algorithm, &jwk).unwrap_err().is_key(), "{algorithm} {jwk}");
    }
}

#[test]
fn weak_keys_are_refused_when_they_are_loaded() {
    for (algorithm, length) in [(Algorithm::HS256, 32), (Algorithm::HS384, 48), (Algorithm::HS512, 64)] {
        assert!(KeySet::hmac(algorithm, vec![1; length]).is_ok());
        let error = KeySet::hmac(algorithm, vec![1; length - 1]).unwrap_err();
        assert!(error.is_key() && error.to_string().contains(&format!("wants {length}")), "{error}");
        assert!(KeySet::hmac(algorithm, "").is_err());
    }
    assert!(KeySet::hmac(Algorithm::RS256, [1; 64]).unwrap_err().is_key());
}

#[test]
fn one_bad_key_does_not_void_the_set() {
    let good = Signer::new(Algorithm::ES256);
    let with_member = |name: &str, value: Value| with(good.jwk("bad"), name, value);
    let mut private = good.jwk("bad");
    private["d"] = "AA".into();
    let mut off_curve = good.jwk("bad");
    off_curve["y"] = off_curve["x"].clone();
    let bad = [
        with_member("use", "enc".into()),
        with_member("use", 1.into()),
        with_member("key_ops", json!(["sign"])),
        with_member("key_ops", json!("verify")),
        with_member("alg", "ES384".into()),
        with_member("alg", "RS256".into()),
        with_member("alg", "none".into()),
        with_member("crv", "P-384".into()),
        with_member("crv", "secp256k1".into()),
        with_member("kty", "RSA".into()),
        with_member("kty", "oct".into()),
        with_member("x", "AA".into()),
        with_member("x", "AA==".into()),
        with_member("kid", 7.into()),
        private,
        off_curve,
        json!({}),
        json!(7),
        json!({"kty": "RSA", "kid": "bad", "alg": "RS256", "n": b64([0xff; 128]), "e": "AQAB"}),
        json!({"kty": "RSA", "kid": "bad", "alg": "RS256", "n": b64([0xff; 256]), "e": "AQ"}),
        json!({"kty": "RSA", "kid": "bad", "alg": "RS256", "n": b64([0xff; 4096]), "e": "AQAB"}),
        Signer::new(Algorithm::HS256).jwk("bad"),
    ];
    for bad in bad {
        let keys = json!({"keys": [bad, good.jwk("a")]}).to_string();
        let keys = KeySet::from_jwks(keys).unwrap();
        assert_eq!(keys.len(), 1, "{bad}");
        assert!(ask(&Jwt::new(keys).wall_clock(wall()), &good.sign(&claims())).is_ok());
        let alone = KeySet::from_jwks(json!({"keys": [bad]}).to_string());
        if bad["kty"] != "oct" || bad["alg"] != "HS256" {
            assert!(alone.unwrap_err().is_key_set(), "{bad}");
        }
    }
    let twice = json!({"keys": [good.jwk("a"), Signer::new(Algorithm::ES256).jwk("a"), good.jwk("b")]});
    assert_eq!(KeySet::from_jwks(twice.to_string()).unwrap().len(), 1, "two keys with one kid are none");
    for document in ["", "{}", "[]", r#"{"keys":{}}"#, r#"{"keys":[]}"#, r#"{"keys":[],"keys":[]}"#, "<html>"] {
        assert!(KeySet::from_jwks(document).unwrap_err().is_key_set(), "{document}");
    }
}

#[test]
fn a_set_keeps_a_bounded_number_of_keys() {
    let keys: Vec<_> = (0..200).map(|n| with(Signer::new(Algorithm::EdDSA).jwk("a"), "kid", n.to_string())).collect();
    assert_eq!(KeySet::from_jwks(json!({"keys": keys}).to_string()).unwrap().len(), portcullis_auth::MAX_KEYS);
}

#[test]
fn nothing_secret_is_printed() {
    let secret = "do-not-print-me-do-not-print-me-do-not";
    let keys = KeySet::hmac(Algorithm::HS256, secret).unwrap();
    let jwt = Jwt::new(keys.clone()).issuer("i");
    for text in [format!("{keys:?}"), format!("{jwt:?}"), format!("{jwt:#?}")] {
        assert!(!text.contains("do-not-print") && text.contains("HS256") || text.contains("Jwt"), "{text}");
        assert!(!text.contains("do-not-print"), "{text}");
    }
}
