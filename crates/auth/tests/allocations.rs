//! A caller whose token is remembered costs no allocation beside the value that travels.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::convert::Infallible;

use allocation_counter::measure;
use bytes::Bytes;
use futures::FutureExt;
use http::{Request, Response, StatusCode};
use http_body_util::Empty;
use portcullis_auth::{Algorithm, AuthLayer, Jwt};
use portcullis_core::{Carried, Identity, PeerAddress, Proof};
use support::{Signer, request, wall};
use tower::{Layer, Service, service_fn};

async fn fine(_: Request<()>) -> Result<Response<Empty<Bytes>>, Infallible> {
    Ok(Response::new(Empty::new()))
}

#[test]
fn a_remembered_token_allocates_nothing_but_the_travelling_value() {
    let ada = Identity::new("ada", Proof::Jwt);
    let mut bare = Request::new(());
    let value = measure(|| drop(ada.clone().attach(bare.extensions_mut()))).count_total;
    for algorithm in [Algorithm::HS256, Algorithm::RS256] {
        let signer = Signer::new(algorithm);
        let jwt = Jwt::new(signer.key_set("a")).wall_clock(wall());
        let authorization = format!("Bearer {}", signer.sign(&support::claims()));
        let mut service = AuthLayer::new(jwt.clone()).layer(service_fn(fine));
        let mut cost = |request: Request<()>| {
            let mut request = Some(request);
            let measured = measure(|| {
                let response = service.call(request.take().unwrap()).now_or_never().unwrap().unwrap();
                assert_eq!(response.status(), StatusCode::OK);
            });
            measured.count_total
        };
        assert!(cost(request(&authorization)) > value, "the first is verified");
        assert_eq!(cost(request(&authorization)), value);
        // Behind a server that left something, even that is there already.
        let mut served = request(&authorization);
        PeerAddress(([192, 0, 2, 1], 1).into()).attach(served.extensions_mut());
        assert_eq!(cost(served), 0);
    }
}
