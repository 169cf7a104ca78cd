//! Keys that come from elsewhere: a provider that rotates, fails in every way, and dies, while requests flow.
//!
//! Sockets are real and time stands still unless a test moves it: a blocking task keeps the paused clock from running
//! ahead while nothing but a socket is waited for.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]
#![cfg(feature = "fetch")]

mod server;
mod sources;
#[path = "../support/mod.rs"]
mod support;

use std::sync::Arc;
use std::time::Duration;

use portcullis_auth::{Algorithm, Attempt, Authenticate, Denied, Head, Jwt};
use serde_json::json;

use crate::server::{Callers, Flow, Mode, Provider, keys, pass, source, stand_still};
use crate::support::{Signer, request, wall};

#[tokio::test(start_paused = true)]
async fn the_first_requests_wait_for_the_first_keys() {
    let _still = stand_still();
    let signer = Signer::new(Algorithm::ES256);
    let provider = Provider::start(Mode::Keys(keys(&[(&signer, "1")]))).await;
    let callers = Callers::new(source(&provider).start().unwrap());
    let (a, b) = tokio::join!(callers.call(&signer, "1"), callers.call(&signer, "1"));
    assert!(a.is_ok() && b.is_ok());
    assert_eq!(provider.asked(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_rotation_is_seen_with_the_first_token_it_signed() {
    let _still = stand_still();
    let (old, new) = (Signer::new(Algorithm::ES256), Signer::new(Algorithm::EdDSA));
    let provider = Provider::start(Mode::Keys(keys(&[(&old, "1")]))).await;
    let source = source(&provider).start().unwrap();
    let callers = Callers::new(source.clone());
    let remembering = Jwt::new(source).wall_clock(wall());
    assert!(callers.call(&old, "1").await.is_ok());
    assert!(
        support::ask(&remembering, &old.sign_with(&json!({"alg": "ES256", "kid": "1"}), &support::claims())).is_ok()
    );

    provider.set(Mode::Keys(keys(&[(&old, "1"), (&new, "2")])));
    assert!(callers.call(&new, "2").await.is_ok(), "the new key is fetched for the first who shows it");
    assert!(callers.call(&old, "1").await.is_ok(), "and the old one still there");
    assert_eq!(provider.asked(), 2);

    let token = old.sign_with(&json!({"alg": "ES256", "kid": "1"}), &support::claims());
    assert!(support::ask(&remembering, &token).is_ok());
    assert!(support::ask(&remembering, &token).is_ok(), "from memory");
    provider.set(Mode::Keys(keys(&[(&new, "2")])));
    pass(300).await;
    callers.tried(3).await;
    let after = match remembering.authenticate(&Head::of(&request(&format!("Bearer {token}")))) {
        Attempt::Now(result) => result,
        Attempt::Later(later) => later.await,
    };
    assert_eq!(after, Err(Denied::invalid("the token is signed with an unknown key")));
}

#[tokio::test(start_paused = true)]
async fn a_rotation_is_seen_although_a_fetch_that_began_before_it_is_under_way() {
    let _still = stand_still();
    let (old, new) = (Signer::new(Algorithm::ES256), Signer::new(Algorithm::ES256));
    let provider = Provider::start(Mode::Keys(keys(&[(&old, "1")]))).await;
    let callers = Callers::new(source(&provider).start().unwrap());
    callers.tried(1).await;
    // The regular fetch hangs, the provider rotates, and the first token of the new key comes in.
    provider.set(Mode::Hang);
    pass(300).await;
    provider.asked.subscribe().wait_for(|count| *count == 2).await.unwrap();
    provider.set(Mode::Keys(keys(&[(&new, "2")])));
    tokio::time::advance(Duration::from_millis(4500)).await;
    let end_of_the_hanging_one = async {
        tokio::task::yield_now().await;
        tokio::time::advance(Duration::from_millis(500)).await;
    };
    let (result, ()) = tokio::join!(callers.call(&new, "2"), end_of_the_hanging_one);
    assert!(result.is_ok(), "{result:?}");
    assert_eq!(provider.asked(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_unknown_keys_asks_once_per_cooldown() {
    let _still = stand_still();
    let signer = Signer::new(Algorithm::ES256);
    let provider = Provider::start(Mode::Keys(keys(&[(&signer, "1")]))).await;
    let callers = Callers::new(source(&provider).start().unwrap());
    assert!(callers.call(&signer, "1").await.is_ok());
    let mut refused = 0;
    for minute in 0..4_usize {
        for n in 0..250 {
            refused += usize::from(callers.call(&signer, &format!("{minute}-{n}")).await.is_err());
            assert!(callers.call(&signer, "1").await.is_ok());
        }
        assert_eq!(provider.asked(), 2 + minute, "one for the start, one for each cooldown");
        pass(30).await;
    }
    assert_eq!(refused, 1000);
    // What was not found is not asked for again although the cooldown is over.
    let before = provider.asked();
    assert!(callers.call(&signer, "3-0").await.is_err());
    assert_eq!(provider.asked(), before);
}

#[tokio::test(start_paused = true)]
async fn callers_of_one_issuer_neither_wait_for_another_nor_take_its_fetches() {
    let _still = stand_still();
    let (ours, new, theirs) =
        (Signer::new(Algorithm::ES256), Signer::new(Algorithm::ES256), Signer::new(Algorithm::ES256));
    let token = |signer: &Signer, kid: &str, issuer: &str, exp: u64| {
        let claims = json!({"sub": "ada", "iss": issuer, "exp": exp});
        request(&format!("Bearer {}", signer.sign_with(&json!({"alg": "ES256", "kid": kid}), &claims)))
    };
    let provider = Provider::start(Mode::Hang).await;
    let first = Jwt::new(source(&provider).start().unwrap()).issuer("a").wall_clock(wall());
    let second = Jwt::new(theirs.key_set("b")).issuer("b").wall_clock(wall());
    let either = first.clone().or(second).shared();
    let at_once = |request: &http::Request<()>| match either.authenticate(&Head::of(request)) {
        Attempt::Now(result) => result.map(|identity| identity.issuer().map(str::to_owned)),
        Attempt::Later(_) => panic!("waits"),
    };
    let good = token(&theirs, "b", "b", support::NOW + 600);
    let expired = token(&theirs, "b", "b", support::NOW - 600);
    let ask = || {
        assert_eq!(at_once(&good), Ok(Some("b".to_owned())));
        assert_eq!(at_once(&expired), Err(Denied::invalid("the token expired")));
    };
    provider.asked.subscribe().wait_for(|count| *count == 1).await.unwrap();
    ask();
    pass(5).await;
    let tried = async |times| {
        while first.keys().freshness().unwrap().fetches < times {
            tokio::task::yield_now().await;
        }
    };
    tried(1).await;
    ask();
    provider.set(Mode::Keys(keys(&[(&ours, "a")])));
    pass(2).await;
    tried(2).await;
    let before = provider.asked();
    ask();
    // The fetch is still there for the first token of a new key.
    provider.set(Mode::Keys(keys(&[(&new, "a2")])));
    let rotated = token(&new, "a2", "a", support::NOW + 600);
    let rotated = match either.authenticate(&Head::of(&rotated)) {
        Attempt::Now(result) => result,
        Attempt::Later(later) => later.await,
    };
    assert!(rotated.is_ok(), "{rotated:?}");
    assert_eq!(provider.asked(), before + 1);
}

#[tokio::test(start_paused = true)]
async fn one_fetch_is_under_way_at_a_time() {
    let _still = stand_still();
    let signer = Signer::new(Algorithm::ES256);
    let provider = Provider::start(Mode::Keys(keys(&[(&signer, "1")]))).await;
    let callers = Callers::new(source(&provider).start().unwrap());
    callers.tried(1).await;
    provider.set(Mode::Hang);
    pass(300).await;
    provider.asked.subscribe().wait_for(|count| *count == 2).await.unwrap();
    // It hangs, and everybody wants keys that are not there.
    let kids: Vec<_> = (0..50).map(|n| format!("unknown {n}")).collect();
    let calls = futures::future::join_all(kids.iter().map(|kid| callers.call(&signer, kid)));
    let (results, ()) = tokio::join!(calls, pass(1));
    assert!(results.iter().all(Result::is_err));
    assert_eq!(provider.asked(), 2);
}

#[tokio::test(start_paused = true)]
async fn nobody_is_refused_while_the_provider_rotates_fails_in_every_way_and_dies() {
    let _still = stand_still();
    let (signer, evil) = (Arc::new(Signer::new(Algorithm::ES256)), Signer::new(Algorithm::ES256));
    let sound = Mode::Keys(keys(&[(&signer, "1")]));
    let other = Provider::start(Mode::Keys(keys(&[(&evil, "1")]))).await;
    let provider = Provider::start(sound.clone()).await;
    let flow = Flow::start(Callers::new(source(&provider).start().unwrap()), signer.clone(), "1");
    flow.more(20).await;
    let mut tried = 1;
    let failures = [
        Mode::Status(500),
        Mode::Status(404),
        Mode::Html,
        Mode::Huge,
        Mode::Redirect(other.url()),
        Mode::CutOff,
        Mode::Hangup,
        Mode::Hang,
        Mode::Keys(json!({"keys": [{"kty": "RSA"}]})),
        Mode::Keys(json!({"error": "x"})),
    ];
    for failure in failures {
        let hangs = matches!(failure, Mode::Hang);
        provider.set(failure);
        for _ in 0..3 {
            let mut asked = provider.asked.subscribe();
            let before = *asked.borrow_and_update();
            pass(300).await;
            tried += 1;
            if hangs {
                asked.wait_for(|count| *count > before).await.unwrap();
                flow.more(20).await;
                pass(5).await;
            }
            flow.callers().tried(tried).await;
            flow.more(20).await;
            assert!(flow.callers().call(&evil, "1").await.is_err());
        }
        provider.set(sound.clone());
        pass(60).await;
        tried += 1;
        flow.callers().tried(tried).await;
        flow.more(20).await;
    }
    let freshness = flow.callers().keys.freshness().unwrap();
    assert_eq!((freshness.fetches, freshness.failures), (1 + 4 * 10, 3 * 10));

    // Three rotations: the new key beside the old one, then tokens of the new one, then the new one alone.
    let mut old = signer;
    for kid in ["2", "3", "4"] {
        let new = Arc::new(Signer::new(Algorithm::ES256));
        let previous = ["1", "2", "3"][kid.parse::<usize>().unwrap() - 2];
        provider.set(Mode::Keys(keys(&[(&old, previous), (&new, kid)])));
        let before = provider.asked();
        flow.sign_with(new.clone(), kid);
        flow.more(40).await;
        assert_eq!(provider.asked(), before + 1, "one fetch, for all who came at once");
        provider.set(Mode::Keys(keys(&[(&new, kid)])));
        tried += 2;
        pass(300).await;
        flow.callers().tried(tried).await;
        flow.more(20).await;
        old = new;
    }
    let asked = provider.asked();
    provider.die().await;
    for _ in 0..5 {
        pass(300).await;
        tried += 1;
        flow.callers().tried(tried).await;
        flow.more(20).await;
    }
    assert_eq!((provider.asked(), other.asked()), (asked, 0), "it is dead, and redirects are not followed");
    let (served, refused) = flow.counts();
    assert_eq!(refused, 0);
    assert_eq!(flow.callers().keys.freshness().unwrap().fetches, tried);
    eprintln!("served {served}, wrongly refused {refused}, provider asked {asked} times, and 5 more when dead");
}

/// An issuer takes its keys back.
#[tokio::test(start_paused = true)]
async fn an_emptied_set_is_believed_at_once_and_new_keys_with_their_first_token() {
    let _still = stand_still();
    let (leaked, new) = (Signer::new(Algorithm::ES256), Signer::new(Algorithm::ES256));
    let provider = Provider::start(Mode::Keys(keys(&[(&leaked, "1")]))).await;
    let callers = Callers::new(source(&provider).start().unwrap());
    let remembering = Jwt::new(callers.keys.clone()).wall_clock(wall());
    let token = leaked.sign_with(&json!({"alg": "ES256", "kid": "1"}), &support::claims());
    callers.tried(1).await;
    for _ in 0..2 {
        assert!(support::ask(&remembering, &token).is_ok());
    }
    provider.set(Mode::Keys(json!({"keys": []})));
    pass(300).await;
    callers.tried(2).await;
    let freshness = callers.keys.freshness().unwrap();
    assert_eq!((callers.keys.len(), freshness.failures), (0, 0));
    let unknown = Denied::invalid("the token is signed with an unknown key");
    assert_eq!(callers.call(&leaked, "1").await, Err(unknown.clone()));
    assert_eq!(support::ask(&remembering, &token), Err(unknown), "nor from memory");
    pass(30).await;
    provider.set(Mode::Keys(keys(&[(&new, "2")])));
    assert!(callers.call(&new, "2").await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_request_waits_a_second_at_most_and_is_not_told_its_key_is_unknown() {
    let _still = stand_still();
    let (signer, new) = (Signer::new(Algorithm::ES256), Signer::new(Algorithm::ES256));
    let provider = Provider::start(Mode::Keys(keys(&[(&signer, "1")]))).await;
    let callers = Callers::new(source(&provider).start().unwrap());
    assert!(callers.call(&signer, "1").await.is_ok());
    provider.set(Mode::Hang);
    let started = tokio::time::Instant::now();
    let call = callers.call(&new, "2");
    let advance = async {
        provider.asked.subscribe().wait_for(|count| *count == 2).await.unwrap();
        pass(1).await;
    };
    let (result, ()) = tokio::join!(call, advance);
    assert_eq!(result, Err(Denied::unavailable("the issuer's keys are not available")));
    assert_eq!(started.elapsed(), Duration::from_secs(1));
    pass(5).await;
    callers.tried(2).await;
    assert_eq!(callers.call(&new, "2").await, Err(Denied::unavailable("the issuer's keys are not available")));
    assert!(callers.call(&signer, "1").await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn keys_are_used_up_to_their_age_and_no_longer() {
    let _still = stand_still();
    let signer = Signer::new(Algorithm::ES256);
    let provider = Provider::start(Mode::Keys(keys(&[(&signer, "1")]))).await;
    let callers = Callers::new(source(&provider).max_stale(Duration::from_secs(3600)).start().unwrap());
    assert!(callers.call(&signer, "1").await.is_ok());
    provider.set(Mode::Status(503));
    let mut tried = 1;
    for _ in 0..11 {
        pass(300).await;
        tried += 1;
        callers.tried(tried).await;
        assert!(callers.call(&signer, "1").await.is_ok(), "{:?}", callers.keys.freshness());
    }
    pass(400).await;
    callers.tried(tried + 1).await;
    let unavailable = Err(Denied::unavailable("the issuer's keys are not available"));
    assert_eq!(callers.call(&signer, "1").await, unavailable);
    assert!(callers.keys.is_empty());
    provider.set(Mode::Keys(keys(&[(&signer, "1")])));
    pass(60).await;
    callers.tried(callers.keys.freshness().unwrap().fetches + 1).await;
    assert!(callers.call(&signer, "1").await.is_ok(), "and again once there are some");
}

#[tokio::test(start_paused = true)]
async fn the_providers_word_on_time_is_heard_within_bounds() {
    let _still = stand_still();
    let signer = Signer::new(Algorithm::ES256);
    for (control, early, late) in [
        ("max-age=600", 470, 540),
        ("max-age=1", 29, 30),
        ("no-store", 29, 30),
        ("max-age=999999", 2870, 3240),
        ("private", 239, 270),
    ] {
        let provider = Provider::start(Mode::KeysFor(keys(&[(&signer, "1")]), control)).await;
        let callers = Callers::new(source(&provider).start().unwrap());
        callers.tried(1).await;
        pass(early).await;
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(provider.asked(), 1, "{control}: too early");
        pass(late - early + 1).await;
        callers.tried(2).await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_task_ends_with_the_last_handle() {
    let _still = stand_still();
    let signer = Signer::new(Algorithm::ES256);
    let provider = Provider::start(Mode::Keys(keys(&[(&signer, "1")]))).await;
    let metrics = tokio::runtime::Handle::current().metrics();
    let before = metrics.num_alive_tasks();
    let callers = Callers::new(source(&provider).start().unwrap());
    callers.tried(1).await;
    let clone = callers.keys.clone();
    drop(callers);
    tokio::task::yield_now().await;
    assert_eq!(metrics.num_alive_tasks(), before + 1, "a clone keeps it");
    drop(clone);
    while metrics.num_alive_tasks() > before {
        tokio::task::yield_now().await;
    }
}
