//! What files mean, and what is said about wrong ones.

use std::path::Path;

use portcullis_gateway::config::{Config, Mistakes};

const EXAMPLE: &str = include_str!("../gateway.example.toml");

fn parse(text: &str) -> Result<Config, Mistakes> {
    let environment = |name: &str| {
        (name == "PORTCULLIS_JWT_SECRET").then(|| String::from("a secret that is long enough for HS256, by far"))
    };
    Config::parse("gateway.toml", text, Path::new(env!("CARGO_MANIFEST_DIR")), &environment)
}

/// A sound file with one part replaced or added.
fn with(part: &str) -> String {
    format!(
        "[services.orders]\nendpoints = [\"127.0.0.1:9001\"]\n[[routes]]\npath = \"/{{*rest}}\"\nto = \"orders\"\n{part}"
    )
}

#[test]
fn five_lines_are_enough() {
    let config = parse(&with("")).unwrap();
    assert_eq!(config.services["orders"].endpoints.len(), 1);
    assert_eq!(config.admin.address.to_string(), "127.0.0.1:9901");
}

#[test]
fn the_example_says_everything_that_can_be_said() {
    let config = parse(EXAMPLE).unwrap_or_else(|mistakes| panic!("{mistakes}"));
    assert_eq!(config.routes.len(), 5);
    // Each key of the schema stands in the example, commented out or not.
    let schema = Config::json_schema();
    let mut keys = Vec::new();
    collect(&schema, &mut keys);
    assert!(keys.len() > 100, "{keys:?}");
    for key in keys {
        let rarely = ["any_scope", "any_role", "roles", "threads", "exact", "prefix", "env", "file", "scheme"];
        let is_there = EXAMPLE.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').any(|word| word == key);
        assert!(
            is_there || rarely.contains(&key.as_str()) || RARE.contains(&key.as_str()),
            "{key} is not in the example"
        );
    }
}

/// Keys the example leaves to the schema.
const RARE: &[&str] = &[
    "ca",
    "certificate",
    "claim",
    "content_type",
    "expose",
    "host",
    "hops",
    "jwks",
    "jwks_url",
    "max_connections",
    "name",
    "public_key",
    "require",
    "scopes",
    "service",
    "tls",
    "token",
    "total",
    "wait",
    "window_calls",
];

fn collect(schema: &serde_json::Value, keys: &mut Vec<String>) {
    match schema {
        serde_json::Value::Object(members) => {
            for (name, member) in members {
                if name == "properties" {
                    keys.extend(member.as_object().into_iter().flatten().map(|(key, _)| key.clone()));
                }
                collect(member, keys);
            }
        }
        serde_json::Value::Array(members) => members.iter().for_each(|member| collect(member, keys)),
        _ => {}
    }
}

#[test]
fn each_mistake_is_named_with_its_place_and_what_would_be_right() {
    let mut unsaid = Vec::new();
    for (part, said) in [
        ("[log]\nfromat = \"json\"", "7:1: unknown key \"fromat\"; did you mean \"format\"?"),
        ("[serices.x]", "6:2: unknown key \"serices\"; did you mean \"services\"?"),
        ("[log]\nformat = \"jsn\"", "7:10: \"jsn\" is not known here; did you mean \"json\"?"),
        ("[log]\nlevel = \"lots\"", "7:9: \"lots\" says no level; such as \"info\" or"),
        ("[server]\ndrain_timeout = \"soon\"", "7:17: \"soon\" is not a time, such as \"250ms\""),
        ("[server]\ndrain_timeout = 5", "7:17: 5 is not a time, such as \"250ms\""),
        ("[server]\nthreads = 0", "7:11: 0 is not a whole number from 1 to"),
        ("[server]\nthreads = 99999999999999999999999", "7:11: 99999999999999999999999 is not a whole number"),
        ("[listeners.a]", "6:1: \"address\" is missing here; such as address = \"0.0.0.0:8080\""),
        ("[listeners.a]\naddress = \"8080\"", "7:11: \"8080\" is not an address with a port, such as \"0.0.0.0:8080\""),
        (
            "[listeners.a]\naddress = \"1.1.1.1:9\"\n[listeners.b]\naddress = \"1.1.1.1:9\"",
            "9:11: the listener \"a\" has this address",
        ),
        ("[[routes]]\npath = \"/a\"\nto = \"ordrs\"", "8:6: there is no service \"ordrs\"; did you mean \"orders\"?"),
        ("[[routes]]\nto = \"orders\"", "6:1: the route has no path; add path = \"/{*rest}\""),
        ("[[routes]]\npath = \"/a\"", "6:1: the route leads nowhere; add to ="),
        ("[[routes]]\npath = \"a\"\nto = \"orders\"", "7:8: \"a\" does not begin with a slash; such as \"/a\""),
        (
            "[[routes]]\npath = \"/a\"\nto = \"orders\"\nlimits = [\"each\"]",
            "9:11: there is no limit \"each\"; there is none",
        ),
        (
            "[[routes]]\npath = \"/a\"\nto = \"orders\"\nauth = \"required\"",
            "6:1: the route asks who is calling, and there is no way to tell",
        ),
        (
            "[[routes]]\npath = \"/a\"\nto = \"orders\"\nmethods = [\"get\"]",
            "9:12: \"get\" is not a method, such as \"GET\"",
        ),
        ("[[routes]]\npath = \"/a\"\nto = \"orders\"\nhosts = [\"a.b:80\"]", "9:10: \"a.b:80\" is no host name"),
        ("[[routes]]\npath = \"/a\"\nredirect = { status = 200 }", "8:23: 200 is no redirect; one of 301"),
        ("[[routes]]\npath = \"/a\"\nrespond = { status = 99 }", "8:22: 99 is not a whole number from 200 to 599"),
        ("[services.x]\nendpoints = []", "6:1: the service \"x\" has neither endpoints nor a registry"),
        ("[services.x]\nregistry = \"r\"", "7:12: there is no registry \"r\""),
        ("[services.x]\nendpoints = [\"a:1\", \"a:1\"]", "7:21: a:1 is listed twice"),
        ("[services.x]\nendpoints = [\"a\"]", "7:14: \"a\" is not an address with a port"),
        ("[services.x]\nendpoints = \"a:1\"\nbreaker = { failure_rate = 2 }", "8:28: 2 is not a share"),
        (
            "[services.x]\nendpoints = \"a:1\"\nbreaker = { failure_rate = 0.5 }",
            "8:28: a share of what is not said; add window",
        ),
        (
            "[services.x]\nendpoints = \"a:1\"\nbreaker = { failure_rate = 0.5, window = \"1ms\" }",
            "a window lasts 100 ms to an hour",
        ),
        ("[services.x]\nendpoints = \"a:1\"\ntls = { ca = \"Cargo.toml\" }", "8:14: there is no CERTIFICATE in it"),
        ("[registries.r]\nkind = \"file\"", "7:8: not said which file; add path"),
        ("[registries.r]\nkind = \"etcd\"", "7:8: \"etcd\" is not known here; known: consul, dns, file"),
        ("[auth.providers.p]", "6:1: the provider \"p\" has no key"),
        ("[auth.providers.p]\nsecret = \"short\"", "7:10: "),
        (
            "[auth.providers.p]\nsecret = { env = \"NO_SUCH\" }",
            "7:18: NO_SUCH is not set in the environment; export NO_SUCH=…",
        ),
        ("[auth.providers.p]\nsecret = { file = \"no/such\" }", "7:19: cannot read "),
        ("[auth.providers.p]\nsecret = {}", "7:10: not clear where to read it; say one of env"),
        ("[auth.providers.p]\njwks = \"Cargo.toml\"", "7:8: not a key set"),
        ("[auth]\ndefault = \"required\"", "7:11: callers are asked who they are, and there is no way to tell"),
        ("[limits.l]\nrate = \"many\"", "7:8: \"many\" is not a rate, such as \"100/s\""),
        ("[limits.l]\nrate = \"1/s\"\nkey = \"header\"", "6:1: a limit by header that names none"),
        ("[trusted_proxies]\nnetworks = [\"10.0.0.0/40\"]", "7:13: \"10.0.0.0/40\" is no network"),
        (
            "[admin]\naddress = \"0.0.0.0:1\"\nwritable = true",
            "7:11: the admin side can change things and is reachable from elsewhere",
        ),
        (
            "[[routes]]\npath = \"/a\"\nto = \"orders\"\ncors = { origins = [\"*\"], credentials = true }",
            "9:21: every origin, with credentials",
        ),
        (
            "[[routes]]\npath = \"/a\"\nrespond = {}\nlimits = \"l\"\n[limits.l]\nrate = \"1/s\"",
            "6:1: redirects and fixed answers are given before",
        ),
        ("x = ", "6:"),
        ("[log]\nformat = \"json\"\nformat = \"json\"", "8:1: not TOML: duplicate key"),
    ] {
        let mistakes = parse(&with(part)).map_or_else(|mistakes| mistakes.to_string(), |_| String::from("nothing"));
        if !mistakes.contains(said) {
            unsaid.push(format!("{part}\n  should say {said}\n  and says {mistakes}"));
        }
    }
    assert!(unsaid.is_empty(), "{}", unsaid.join("\n\n"));
}

#[test]
fn all_mistakes_are_said_at_once() {
    let wrong = "colour = 1\n[log]\nfromat = \"json\"\n[services.x]\nendpoints = [\"a\", \"b\"]\n[[routes]]\npath = 5\nto = \"y\"\n";
    let mistakes = parse(wrong).unwrap_err();
    let places: Vec<_> = mistakes.list().iter().map(|mistake| (mistake.line, mistake.column)).collect();
    assert_eq!(places, [(1, 1), (3, 1), (5, 14), (5, 19), (7, 8)], "{mistakes}");
    let twice = parse("a = \nb = \n").unwrap_err();
    assert_eq!(twice.list().len(), 2, "{twice}");
}

#[test]
fn empty_and_absent_files_are_said_to_be_so() {
    assert!(parse("").unwrap_err().to_string().contains("the file is empty"));
    assert!(parse("# nothing\n").unwrap_err().to_string().contains("the file is empty"));
    assert!(Config::load(Path::new("/no/such/file")).unwrap_err().to_string().contains("cannot read it"));
    assert!(Config::load(Path::new("/dev")).is_err());
}

#[test]
fn secrets_are_masked_wherever_they_come_from() {
    let part = "[auth.providers.p]\nsecret = \"this is a secret of more than thirty-two bytes\"\n[admin]\ntoken = { env = \"PORTCULLIS_JWT_SECRET\" }";
    let config = parse(&with(part)).unwrap();
    let shown = config.masked().to_string();
    assert!(!shown.contains("this is a secret") && !shown.contains("long enough"), "{shown}");
    assert!(shown.contains(r#""secret":"***""#) && shown.contains(r#"{"env":"PORTCULLIS_JWT_SECRET"}"#), "{shown}");
    let debug = format!("{config:?}");
    assert!(!debug.contains("this is a secret") && !debug.contains("long enough"), "{debug}");
}

#[test]
fn nothing_that_is_not_text_panics() {
    for text in [
        "\u{feff}",
        "[",
        "a.b.c.d = { e = [",
        "[[services]]",
        "services = 1",
        "routes = [1, 2]",
        "[services]\nx = 1",
        "routes = \"/\"",
    ] {
        assert!(parse(text).is_err(), "{text}");
    }
    let deep = format!("a = {}{}", "[".repeat(10_000), "]".repeat(10_000));
    assert!(parse(&deep).is_err());
    let long = format!("{} = 1", "x".repeat(1_000_000));
    assert!(parse(&long).is_err());
}
