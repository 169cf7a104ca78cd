//! What a file says and nothing would come of is a mistake.

use std::path::Path;

use portcullis_gateway::config::Config;

/// What is said of a sound file with this besides.
fn says(part: &str) -> String {
    let sound = "[services.a]\nendpoints = \"127.0.0.1:1\"\n[[routes]]\npath = \"/{*rest}\"\nto = \"a\"\n";
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let parsed = Config::parse("gateway.toml", &format!("{sound}{part}"), folder, &|_| None);
    parsed.map_or_else(|mistakes| mistakes.to_string(), |_| String::from("nothing"))
}

fn all_say(parts: &[(&str, &str)]) {
    let unsaid: Vec<String> = parts
        .iter()
        .map(|(part, said)| (part, said, says(part)))
        .filter(|(_, said, says)| !says.contains(**said))
        .map(|(part, said, says)| format!("{part}\n  should say {said}\n  and says {says}"))
        .collect();
    assert!(unsaid.is_empty(), "{}", unsaid.join("\n\n"));
}

#[test]
fn empty_secrets_are_none() {
    all_say(&[("[admin]\naddress = \"0.0.0.0:1\"\nwritable = true\ntoken = \"\"", "9:9: it is empty; say what it is")]);
}

#[test]
fn tls_is_said_where_it_is_spoken() {
    all_say(&[
        ("[services.x]\nendpoints = \"b:1\"\ntls = { name = \"b\" }", "8:16: tls of endpoints that do not speak it"),
        (
            "[services.x]\nregistry = \"r\"\ntls = { name = \"b c\" }\n[registries.r]\nkind = \"dns\"",
            "8:16: \"b c\" is no name of a server",
        ),
        (
            "[services.x]\nregistry = \"r\"\nhttps = true\ntls = { name = \"b\" }\n[registries.r]\nkind = \"dns\"",
            "nothing",
        ),
    ]);
}

#[test]
fn providers_say_what_belongs_to_their_kind() {
    let user = "[auth.providers.p]\nusers = [{ name = \"ada\", password = \"a long password\" }]\n";
    let key = "[auth.providers.p]\napi_keys = [{ key = \"a key that nobody guesses\", subject = \"x\" }]\n";
    let token =
        "[auth.providers.p]\nsecret = \"a secret that is long enough for HS256\"\nissuer = \"i\"\naudiences = \"x\"\n";
    for (provider, more, said) in [
        (user, "issuer = \"i\"", "issuer is for tokens, which this provider does not take"),
        (user, "audiences = [\"x\"]", "audiences is for tokens"),
        (user, "cooldown = \"1s\"", "cooldown is for keys that are fetched"),
        (user, "header = \"x-key\"", "header is for API keys"),
        (user, "algorithm = \"HS256\"", "algorithm is for a secret or a public_key"),
        (user, "cache = \"1MiB\"", "cache is for tokens"),
        (user, "failures = \"3/h\"", "nothing"),
        (key, "failures = \"3/h\"\nheader = \"x-key\"", "nothing"),
        (key, "require = \"email\"", "require is for tokens"),
        (token, "insecure_http = true", "insecure_http is for keys that are fetched"),
        (token, "header = \"x-key\"", "header is for API keys"),
        (token, "cache = \"1MiB\"\nleeway = \"1s\"\nfailures = \"3/h\"", "nothing"),
    ] {
        all_say(&[(&format!("{provider}{more}"), said)]);
    }
}

#[test]
fn a_route_that_answers_by_itself_says_nothing_of_sending_on() {
    for key in [
        "strip_prefix = \"/x\"",
        "add_prefix = \"/x\"",
        "host = \"keep\"",
        "timeout = \"1s\"",
        "timeouts = { idle = \"1s\" }",
        "max_body = 1",
        "max_response = 1",
        "tunnels = true",
        "subset = { tags = \"a\" }",
        "paths = \"pass\"",
        "request_headers = { remove = \"x-a\" }",
        "retry = { attempts = 3 }",
        "hash = \"path\"",
    ] {
        let name = key.split(' ').next().unwrap_or_default();
        for answer in ["respond = {}", "redirect = { path = \"/new\" }"] {
            let route = format!("[[routes]]\npath = \"/x\"\n{answer}\n{key}");
            all_say(&[(&route, &format!("6:1: {name} where nothing is sent on; remove it"))]);
        }
    }
    let headers = "response_headers = { set = { x-a = \"b\" } }\ncors = { origins = \"*\" }";
    all_say(&[(&format!("[[routes]]\npath = \"/x\"\nredirect = {{ path = \"/new\" }}\n{headers}"), "nothing")]);
}

#[test]
fn paths_are_paths() {
    let health = |says: &str| format!("[services.x]\nendpoints = \"b:1\"\nhealth = {{ {says} }}");
    for (says, said) in [
        ("path = \"health\"", "8:19: \"health\" is no path; such as"),
        ("path = \"/he alth\"", "\"/he alth\" is no path"),
        ("kind = \"tcp\", path = \"/health\"", "a path where nothing is asked for; remove it"),
        ("kind = \"grpc\", path = \"shop.v1.Orders\"", "nothing"),
        ("path = \"/health?deep=1\"", "nothing"),
    ] {
        all_say(&[(&health(says), said)]);
    }
    let prefix = |prefix: &str| format!("[[routes]]\npath = \"/x\"\nto = \"a\"\nadd_prefix = \"{prefix}\"");
    all_say(&[(&prefix("/a b"), "9:14: \"/a b\" is no part of a path"), (&prefix("/a?b"), "is no part of a path")]);
    all_say(&[(&prefix("/a%20b"), "nothing")]);
}

/// Each of these ended the process, or what watches the file.
#[test]
fn what_is_more_than_there_is_memory_for_is_refused() {
    all_say(&[
        ("[limiter]\ncapacity = 4000000000", "7:12: more callers than there is memory for; at most 16777216"),
        ("[limiter]\ncapacity = 4000000000000", "is not a whole number from 1 to 4294967295"),
        ("[limiter]\ncapacity = 16777216", "nothing"),
        ("[registries.r]\nkind = \"consul\"\nconnections = 9223372036854775807", "from 1 to 4294967295"),
        ("[server]\nthreads = 100000", "7:11: more threads than any machine serves with"),
        ("[traces.otlp]\nendpoint = \"http://a\"\nqueue = 4000000000", "8:9: more requests than there is memory for"),
    ]);
}

#[test]
fn numbers_out_of_their_range_are_refused() {
    let service = |says: &str| format!("[services.x]\nendpoints = \"b:1\"\n{says}");
    for (says, said) in [
        ("balance.panic_threshold = 200", "8:27: more than all of the endpoints; 0 to 100"),
        ("balance.panic_threshold = 100", "nothing"),
        ("retry.attempts = 0", "8:18: 0 is not a whole number from 1 to 255"),
        ("retry.on_grpc = [14, 99]", "8:22: 99 is no code of gRPC"),
    ] {
        all_say(&[(&service(says), said)]);
    }
    all_say(&[
        ("[log]\nsample = 0", "nothing"),
        ("[traces]\nsample = 0", "nothing"),
        ("[log]\nsample = 1.5", "7:10: a float is not a share from 0 to 1"),
    ]);
}

#[test]
fn keys_that_belong_elsewhere_are_refused_where_they_do_nothing() {
    let listener = |kind: &str, says: &str| {
        let register = format!("register = {{ registry = \"r\", service = \"x\", {says} }}");
        format!("[registries]\nr.kind = \"{kind}\"\n[listeners.a]\naddress = \"127.0.0.1:1\"\n{register}")
    };
    let route = |retry: &str| format!("[[routes]]\npath = \"/x\"\nto = \"a\"\nretry = {{ {retry} }}");
    for (part, said) in [
        (route("budget = 0.5"), "9:20: a budget of one route; say it in the service's retry"),
        (route("budget_per_second = 1"), "a budget of one route"),
        (route("attempts = 3"), "nothing"),
        (listener("consul", "forget_after = \"10m\""), "nobody sees that it is gone; add check = \"10s\""),
        (listener("consul", "forget_after = \"10m\", check = \"5s\""), "nothing"),
        (listener("embedded", "check = \"5s\""), "a check by a registry that makes none; remove it"),
        ("[registries.r]\nkind = \"embedded\"\naddress = \"a\"".into(), "8:11: only a registry of the kind \"consul\""),
        (
            "[registries.r]\nkind = \"file\"\npath = \"x\"\naddress = \"a\"".into(),
            "or \"dns\" has an address; remove it",
        ),
    ] {
        all_say(&[(&part, said)]);
    }
}

/// Only how long the first of a service's registries is believed was looked at.
#[test]
fn the_times_of_a_registry_that_is_never_the_first_are_refused() {
    let with = |first: &str, second: &str| {
        format!(
            "[registries]\nr = {{ kind = \"embedded\"{first} }}\ns = {{ kind = \"dns\"{second} }}\n\
             [services.x]\nregistry = [\"r\", \"s\"]"
        )
    };
    for key in ["max_age", "first_wait"] {
        let says = format!(", {key} = \"1h\"");
        let said = format!("{key} of a registry that is no service's first; say it of");
        all_say(&[(&with("", &says), said.as_str()), (&with(&says, ""), "nothing")]);
        let elsewhere = format!("{}\n[services.y]\nregistry = \"s\"", with("", &says));
        all_say(&[(&elsewhere, "nothing")]);
    }
    let spans = "[traces]\npropagate = false\notlp = { endpoint = \"http://a\" }";
    all_say(&[(spans, "8:8: spans of no trace; set traces.propagate = true")]);
}

#[test]
fn values_that_cannot_stand_in_a_header_are_named_and_not_shown() {
    let route = "[[routes]]\npath = \"/x\"\nto = \"a\"\nrequest_headers.set = { x-key = \"sesame\\nopen\" }";
    all_say(&[(route, "6:1: the value of x-key cannot stand in a header; one line of text")]);
    assert!(!says(route).contains("sesame"));
}
