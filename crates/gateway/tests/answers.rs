//! What routes answer by themselves.

mod common;

use portcullis_testing::client::get;

use common::{Program, file};

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
