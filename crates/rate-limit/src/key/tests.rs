//! Which callers share a budget, and which do not.

use super::*;
use http::{HeaderValue, Request, header};
use portcullis_core::{Carried, Proof};
use std::net::SocketAddr;

fn bytes(key: &impl Key, request: &Request<()>) -> (bool, Vec<u8>) {
    let mut bytes = KeyBytes::new();
    let found = key.write(&RequestHead::new(request, &TrustedProxies::none()), &mut bytes);
    (found, bytes.bytes().to_vec())
}

fn from(address: &str) -> Request<()> {
    let mut request = Request::new(());
    PeerAddress(SocketAddr::new(address.parse().unwrap(), 1)).attach(request.extensions_mut());
    request
}

fn by(identity: Identity) -> Request<()> {
    let mut request = from("192.0.2.1");
    identity.attach(request.extensions_mut());
    request
}

#[test]
fn addresses_count_by_prefix_and_in_one_form() {
    let key = Caller::new();
    assert_eq!(bytes(&key, &from("2001:db8:0:1::1")), bytes(&key, &from("2001:db8:0:1:ffff::2")));
    assert_ne!(bytes(&key, &from("2001:db8:0:1::1")), bytes(&key, &from("2001:db8:0:2::1")));
    assert_eq!(bytes(&key, &from("::ffff:192.0.2.1")), bytes(&key, &from("192.0.2.1")));
    assert_ne!(bytes(&key, &from("192.0.2.2")), bytes(&key, &from("192.0.2.1")));
    let wide = Caller::new().ipv6_prefix(32);
    assert_eq!(bytes(&wide, &from("2001:db8:0:1::1")), bytes(&wide, &from("2001:db8:7:2::1")));
}

#[test]
fn a_subject_counts_wherever_it_calls_from_and_within_its_issuer() {
    let ada = || Identity::new("ada", Proof::Jwt);
    let key = Caller::new();
    let mut elsewhere = from("192.0.2.9");
    ada().attach(elsewhere.extensions_mut());
    assert_eq!(bytes(&key, &by(ada())), bytes(&key, &elsewhere));
    assert_ne!(bytes(&key, &by(ada())), bytes(&key, &by(ada().with_issuer("x"))));
    assert_ne!(bytes(&key, &by(ada().with_issuer("y"))), bytes(&key, &by(ada().with_issuer("x"))));
    // The parts do not run into each other.
    let (a, b) = (Identity::new("ab", Proof::Jwt), Identity::new("a", Proof::Jwt));
    assert_ne!(bytes(&key, &by(a.with_issuer("c"))), bytes(&key, &by(b.with_issuer("bc"))));
}

#[test]
fn nobody_known_has_nothing_to_go_by() {
    assert_eq!(bytes(&Caller::new(), &Request::new(())), (false, vec![]));
    assert!(!bytes(&(Subject, RouteName), &Request::new(())).0);
    assert!(bytes(&(Subject, Everyone), &Request::new(())).0);
}

#[test]
fn keys_combine_and_fall_back() {
    let key = Header::new(header::HOST).or(ClientAddress::new());
    let mut with = from("192.0.2.1");
    with.headers_mut().insert(header::HOST, HeaderValue::from_static("a"));
    assert_ne!(bytes(&key, &with), bytes(&key, &from("192.0.2.1")));
    assert_ne!(bytes(&key, &from("192.0.2.1")), bytes(&key, &from("192.0.2.2")));
    let both = (Header::new(header::HOST), ByMethod, ClientAddress::new());
    assert_ne!(bytes(&both, &with), bytes(&both, &from("192.0.2.1")));
    *with.method_mut() = Method::POST;
    let post = bytes(&both, &with);
    *with.method_mut() = Method::PUT;
    assert_ne!(bytes(&both, &with), post);
}

#[test]
fn routes_services_and_closures_tell_requests_apart() {
    let of = |route: &str, service: &str, path: &str| {
        let mut request = from("192.0.2.1");
        Route::new(route).attach(request.extensions_mut());
        Destination::new(service).attach(request.extensions_mut());
        *request.uri_mut() = path.parse().unwrap();
        request
    };
    let one = of("/a", "orders", "/a/1");
    let by_path = |request: &RequestHead<'_>, key: &mut KeyBytes| {
        key.push(request.uri().path().as_bytes());
        true
    };
    assert_eq!(bytes(&RouteName, &one), bytes(&RouteName, &of("/a", "users", "/a/2")));
    assert_ne!(bytes(&RouteName, &one), bytes(&RouteName, &of("/b", "orders", "/a/1")));
    assert_eq!(bytes(&ServiceName, &one), bytes(&ServiceName, &of("/b", "orders", "/a/2")));
    assert_ne!(bytes(&ServiceName, &one), bytes(&ServiceName, &of("/a", "users", "/a/1")));
    assert_eq!(bytes(&by_path, &one), bytes(&by_path, &of("/b", "users", "/a/1")));
    assert_ne!(bytes(&by_path, &one), bytes(&by_path, &of("/a", "orders", "/a/2")));
    assert!(!bytes(&RouteName, &from("192.0.2.1")).0 && !bytes(&ServiceName, &from("192.0.2.1")).0);
    assert_eq!(bytes(&Everyone, &one), bytes(&Everyone, &Request::new(())));
}

#[test]
fn claims_that_are_not_text_count_as_json() {
    let with = |value: serde_json::Value| {
        by(Identity::new("ada", Proof::Jwt).with_claims([("tenant".to_owned(), value)].into_iter().collect()))
    };
    let key = Claim::new("tenant");
    assert_ne!(bytes(&key, &with("7".into())), bytes(&key, &with(7.into())));
    assert_eq!(bytes(&key, &with(7.into())), bytes(&key, &with(7.into())));
    assert!(!bytes(&Claim::new("plan"), &with(7.into())).0);
}

proptest::proptest! {
    #[test]
    fn long_keys_are_whole(parts in proptest::collection::vec(proptest::collection::vec(proptest::num::u8::ANY, 0..80), 0..6)) {
        let (mut key, mut expected) = (KeyBytes::new(), Vec::new());
        for part in &parts {
            key.push(part);
            expected.extend((part.len() as u32).to_le_bytes());
            expected.extend(part);
        }
        proptest::prop_assert_eq!(key.bytes(), &expected[..]);
    }
}
