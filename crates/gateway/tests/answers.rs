//! What routes answer by themselves.

mod common;

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};
use portcullis_testing::client::{get, request};

use common::{Program, file, log};

/// What the file said of the headers of such answers was accepted and not done.
#[tokio::test]
async fn redirects_and_fixed_answers_have_the_headers_and_the_leave_that_the_file_gives_them() {
    let says = "cors = { origins = \"https://page.example\", expose = \"x-served-by\" }\n\
                response_headers = { set = { x-served-by = \"gateway\", cache-control = \"no-store\" }, remove = \"content-type\" }\n";
    let routes = format!(
        "[[routes]]\npath = \"/old\"\nredirect = {{ path = \"/new\" }}\n{says}[[routes]]\npath = \"/new\"\nrespond = {{ body = \"new\" }}\n{says}"
    );
    let program = Program::start(&file(&[], &routes));
    for (path, status) in [("/old", 302), ("/new", 200)] {
        let answer = get(program.gateway, path, &[("origin", "https://page.example")]).await.expect("an answer");
        assert_eq!(answer.status, status);
        for (name, value) in [
            ("x-served-by", "gateway"),
            ("cache-control", "no-store"),
            ("content-type", ""),
            ("access-control-allow-origin", "https://page.example"),
            ("access-control-expose-headers", "x-served-by"),
            ("vary", "origin"),
        ] {
            assert_eq!(answer.header(name), value, "{name} of {path}");
        }
        let other = get(program.gateway, path, &[("origin", "https://other.example")]).await.expect("an answer");
        assert_eq!(other.header("access-control-allow-origin"), "");
    }
}

/// The body went out after a head that had none: a protocol error, and no answer. Over HTTP/1.1 as well it counted as one
/// that the caller did not wait for.
#[tokio::test]
async fn a_head_request_is_answered_without_a_body_over_http2_too() {
    let routes = "log.format = \"json\"\n[[routes]]\npath = \"/new\"\nrespond = { body = \"new\" }\n";
    let mut program = Program::start(&file(&[], routes));
    for (address, path, status, length) in [
        (program.gateway, "/new", 200, "3"),
        (program.gateway, "/nowhere", 404, ""),
        (program.admin, "/live", 200, "5"),
    ] {
        let stream = tokio::net::TcpStream::connect(address).await.expect("a connection");
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.expect("HTTP/2");
        tokio::spawn(connection);
        let asked = Request::head(format!("http://{address}{path}")).body(Empty::<Bytes>::new()).expect("a request");
        let answer = sender.send_request(asked).await.unwrap_or_else(|error| panic!("{path}: {error}"));
        assert_eq!(answer.status(), status, "{path}");
        if !length.is_empty() {
            assert_eq!(answer.headers()["content-length"], length, "{path}");
        }
        assert!(answer.into_body().collect().await.expect("an end").to_bytes().is_empty(), "{path}");
    }
    assert_eq!(request(program.gateway, Method::HEAD, "/new", &[], "").await.expect("an answer").status, 200);
    program.signal("TERM");
    assert_eq!(program.ended().await, Some(0));
    let log = log(&program.folder);
    assert_eq!(log.matches("\"complete\":true").count(), 3, "{log}");
}
