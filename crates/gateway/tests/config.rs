//! What files mean, and what is said about wrong ones.
#![expect(clippy::unwrap_used, reason = "what helps the tests fails with them")]

use std::path::Path;

use portcullis_gateway::config::{Config, Mistakes};
use serde_json::Value as Json;

const EXAMPLE: &str = include_str!("../gateway.example.toml");

fn parse(text: &str) -> Result<Config, Mistakes> {
    let environment = |name: &str| {
        let value = match name {
            "PORTCULLIS_JWT_SECRET" => "a secret that is long enough for HS256, by far",
            "PORTCULLIS_STICKY_SECRET" => "00112233445566778899aabbccddeeff",
            "PORTCULLIS_PARTNER_KEY" => "a key that nobody guesses",
            "PORTCULLIS_ADA_PASSWORD" => "a password that is long enough",
            "PORTCULLIS_ORDERS_KEY" => "a key that nobody guesses either",
            "PORTCULLIS_REDIS_URL" => "redis://127.0.0.1:6379",
            _ => return None,
        };
        Some(value.to_owned())
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
    assert_eq!(config.routes.len(), 8);
    // Each key of the schema stands in the example, commented out or not.
    let mut keys = Vec::new();
    collect(&Config::json_schema(), &mut keys);
    assert!(keys.len() > 200, "{keys:?}");
    let said =
        |key: &&String| !EXAMPLE.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').any(|word| word == *key);
    let unsaid: Vec<_> = keys.iter().filter(said).collect();
    assert!(unsaid.is_empty(), "{unsaid:?}");
}

fn collect(schema: &Json, keys: &mut Vec<String>) {
    match schema {
        Json::Object(members) => {
            for (name, member) in members {
                if name == "properties" {
                    keys.extend(member.as_object().into_iter().flatten().map(|(key, _)| key.clone()));
                }
                collect(member, keys);
            }
        }
        Json::Array(members) => members.iter().for_each(|member| collect(member, keys)),
        _ => {}
    }
}

/// Whether a value is as a schema has it; of the keywords that ours uses.
fn is_valid(value: &Json, schema: &Json) -> bool {
    let number = |of: &Json| of.as_f64().unwrap_or(f64::NAN);
    schema.as_object().is_none_or(|schema| {
        schema.iter().all(|(keyword, wanted)| match keyword.as_str() {
            "type" => match wanted.as_str().unwrap_or_default() {
                "object" => value.is_object(),
                "array" => value.is_array(),
                "string" => value.is_string(),
                "boolean" => value.is_boolean(),
                "integer" => value.is_u64() || value.is_i64(),
                "number" => value.is_number(),
                other => panic!("{other}"),
            },
            "enum" => wanted.as_array().is_some_and(|words| words.contains(value)),
            "anyOf" => wanted.as_array().is_some_and(|any| any.iter().any(|one| is_valid(value, one))),
            "oneOf" => wanted.as_array().is_some_and(|all| all.iter().filter(|one| is_valid(value, one)).count() == 1),
            "items" => value.as_array().is_none_or(|items| items.iter().all(|item| is_valid(item, wanted))),
            "required" => {
                wanted.as_array().is_some_and(|keys| keys.iter().all(|key| !value[key.as_str().unwrap()].is_null()))
            }
            "minProperties" => value.as_object().is_none_or(|object| object.len() as u64 >= wanted.as_u64().unwrap()),
            "maxProperties" => value.as_object().is_none_or(|object| object.len() as u64 <= wanted.as_u64().unwrap()),
            "properties" => value.as_object().is_none_or(|object| {
                object.iter().all(|(key, value)| wanted.get(key).is_none_or(|schema| is_valid(value, schema)))
            }),
            "additionalProperties" => value.as_object().is_none_or(|object| {
                let further = object
                    .iter()
                    .filter(|(key, _)| schema.get("properties").is_none_or(|known| known.get(key).is_none()));
                further.into_iter().all(|(_, value)| wanted.as_bool().unwrap_or_else(|| is_valid(value, wanted)))
            }),
            "minimum" => number(value) >= number(wanted),
            "maximum" => number(value) <= number(wanted),
            "exclusiveMinimum" => number(value) > number(wanted),
            "pattern" | "examples" | "description" | "default" | "title" | "$schema" => true,
            other => panic!("nothing is known of {other}"),
        })
    })
}

/// What a file says, as JSON.
fn json_of(text: &str) -> Json {
    let table: toml::Table = text.parse().unwrap_or_else(|error| panic!("{error}"));
    serde_json::to_value(table).unwrap()
}

#[test]
fn the_example_is_as_the_schema_says_also_where_it_is_commented_out_and_wrong_files_are_not() {
    let schema = Config::json_schema();
    assert!(is_valid(&json_of(EXAMPLE), &schema));
    let says = |line: &str| {
        let said = line.strip_prefix("# ").filter(|said| said.starts_with('[') || said.contains(" = "));
        let key = said.map(|said| said.split([' ', '[']).find(|word| !word.is_empty()).unwrap_or_default());
        let is_key = key.is_some_and(|key| key.bytes().all(|c| c.is_ascii_lowercase() || b"_.]".contains(&c)));
        said.filter(|_| is_key).unwrap_or(line).to_owned()
    };
    let everything: Vec<String> = EXAMPLE.lines().map(says).collect();
    let everything = json_of(&everything.join("\n"));
    assert!(everything["listeners"]["tls"]["tls"]["client_ca"].is_string(), "{everything}");
    assert!(everything["traces"]["otlp"]["queue"].is_number(), "{everything}");
    assert!(is_valid(&everything, &schema));
    assert!(is_valid(&json_of(&with("")), &schema));
    for wrong in [
        "[log]\nfromat = \"json\"",
        "[log]\nformat = \"jsn\"",
        "[serices.x]",
        "[listeners.a]",
        "[server]\nthreads = 0",
        "[server]\ndrain_timeout = 5",
        "[services.x]\nendpoints = 5",
        "[services.x]\nendpoints = \"a:1\"\nbreaker = { failure_rate = 2 }",
        "[registries.r]\nkind = \"etcd\"",
        "[[routes]]\npath = 5",
        "[[routes]]\npath = \"/\"\nrespond = { status = 99 }",
        "[limits.l]\nrate = \"1/s\"\nburst = 0",
    ] {
        assert!(!is_valid(&json_of(&with(wrong)), &schema), "{wrong}");
    }
}

#[test]
fn each_mistake_is_named_with_its_place_and_what_would_be_right() {
    let mut unsaid = Vec::new();
    for (part, said) in [
        ("[admin]\ntoken = 8675309", "7:9: a integer is not a secret; { env = \"NAME\" }"),
        (
            "[services.tls]\nendpoints = [\"127.0.0.1:1\"]\ntls = { ca = \"-----BEGIN CERTIFICATE-----\" }",
            "8:14: this is no path, but what should be in a file; put the text into a file",
        ),
        ("[log]\nfromat = \"json\"", "7:1: unknown key \"fromat\"; did you mean \"format\"?"),
        (
            "services.x.endpoints = \"a:1\"",
            "6:1: unknown key \"services\"; it stands at the top: as [services] or before",
        ),
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
            "[[routes]]\npath = \"/a\"\nto = \"orders\"\nauth = { mode = \"none\", scopes = [\"admin\"] }",
            "6:1: callers have to be somebody, and nobody is asked who they are; remove mode = \"none\"",
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
        ("[registries.r]\nkind = \"etcd\"", "7:8: \"etcd\" is not known here; known: consul, dns, embedded, file"),
        ("[auth.providers.p]", "6:1: the provider \"p\" has no key"),
        ("[auth.providers.p]\nsecret = \"short\"", "7:10: "),
        (
            "[auth.providers.p]\nsecret = { env = \"NO_SUCH\" }",
            "7:18: NO_SUCH is not set in the environment; export NO_SUCH=…",
        ),
        ("[auth.providers.p]\nsecret = { file = \"no/such\" }", "7:19: cannot read "),
        ("[auth.providers.p]\nsecret = {}", "7:10: not clear where to read it; say one of env"),
        ("[auth.providers.p]\njwks = \"Cargo.toml\"", "7:8: not a key set"),
        ("[traces.otlp]\nendpoint = \"http://c:4318/?k=1\"", "7:12: \"http://c:4318/?k=1\" is no URL of a collector"),
        (
            "[services.x]\nendpoints = [\"127.0.0.1:9\"]\nregistered_as = \"y\"",
            "6:1: a name in a registry, and no registry; remove registered_as",
        ),
        ("[auth]\ndefault = \"required\"", "7:11: callers are asked who they are, and there is no way to tell"),
        ("[limits.l]\nrate = \"many\"", "7:8: \"many\" is not a rate, such as \"100/s\""),
        (
            "[limits.l]\nrate = \"1/s\"\nkey = \"header\"",
            "8:7: \"header\" is not what tells callers apart, such as \"caller\", \"subject\", \"address\", \"header:…\"",
        ),
        ("[limits.l]\nrate = \"1/s\"\nkey = [[]]", "6:1: an empty list in key; name what tells callers apart"),
        ("[limits.l]\nrate = \"1/s\"\nipv6_prefix = 0", "8:15: an IPv6 address has 128 bits; 1 to 128"),
        ("[limits.l]\nmax_in_flight = 1\ncost = 2", "8:8: a cost where requests under way are counted; remove it"),
        (
            "[limits.l]\nrate = \"1/s\"\nplan = { by = \"plan\", rates = {} }",
            "8:15: \"plan\" is not what is looked up, such as",
        ),
        ("[limits.l]\nrate = \"1/s\"\nplan = { by = \"role\" }", "8:8: a plan without rates; add rates"),
        (
            "[limits.l]\nrate = \"1/s\"\npriority = { by = \"role\", otherwise = 101 }",
            "8:12: more than the whole burst; 0 to 100 percent",
        ),
        ("[limiter]\nexempt = { networks = \"10\" }", "7:23: \"10\" is no network; such as"),
        (
            "[limiter.redis]\nurl = \"rediss://a\"\nca = \"Cargo.toml\"",
            "8:6: there is no CERTIFICATE in it; it must hold PEM",
        ),
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
        (
            "[[routes]]\npath = \"/{*rest}\"\nto = \"orders\"",
            "7:8: two routes for \"/{*rest}\" that take the same requests; routes",
        ),
        (
            "[[routes]]\npath = \"/größe/{id}\"\nto = \"orders\"",
            "7:8: no request has the path \"/größe/{id}\": callers write \"/gr%C3%B6%C3%9Fe/{id}\"; write it in normal form",
        ),
        ("[[routes]]\npath = \"/a?b\"\nto = \"orders\"\npaths = \"pass\"", "7:8: no request has the path \"/a?b\": "),
        ("[[routes]]\npath = \"/{a\"\nto = \"orders\"", "7:8: the pattern \"/{a\" cannot be used"),
        (
            "[registries.r]\nkind = \"consul\"\npath = \"x\"",
            "8:8: only a registry of the kind \"file\" has a path; remove it",
        ),
        (
            "[registries.r]\nkind = \"dns\"\nwait = \"1s\"\ntag = \"a\"",
            "7:8: only a registry of the kind \"consul\" has tag; remove it",
        ),
        (
            "[registries.r]\nkind = \"embedded\"\nfloor = \"1s\"",
            "7:8: only a registry of the kind \"dns\" has floor; remove it",
        ),
        ("[registries.r]\nkind = \"dns\"\npattern = \"x\"", "8:11: \"x\" has no place for the service's name; such as"),
        (
            "[registries.r]\nkind = \"consul\"\ncertificate = \"Cargo.toml\"",
            "8:15: a certificate without its key; add key",
        ),
        ("[registries.r]\nkind = \"consul\"\nca = \"Cargo.toml\"", "8:6: TLS of an agent that does not speak it; set"),
        (
            "[registries.r]\nkind = \"consul\"\naddress = \"http://a:8500\"\ncertificate = \"Cargo.toml\"",
            "9:15: TLS of an agent that does not speak it",
        ),
        (
            "[traces.otlp]\nendpoint = \"http://c:4318\"\nca = \"Cargo.toml\"",
            "8:6: TLS of a collector that does not speak it; say https",
        ),
        (
            "[listeners.a]\naddress = \"127.0.0.1:1\"\nkeep_alive = \"0s\"",
            "8:14: pings without a pause between them; a time",
        ),
        (
            "[services.x]\nendpoints = \"a:1\"\npool.keep_alive = \"0s\"",
            "8:19: pings without a pause between them; a time, such as \"5m\"; leave it out for never",
        ),
        (
            "[[routes]]\npath = \"/a\"\nto = \"orders\"\nrequest_headers.set = { Host = \"b\" }",
            "6:1: Host is not a route's to set; use host =",
        ),
        (
            "[[routes]]\npath = \"/a\"\nto = \"orders\"\nrequest_headers.add = { connection = \"close\" }",
            "6:1: connection is not a route's to set; remove it",
        ),
        ("[[routes]]\npath = \"/a\"\nredirect = { path = \"/b#c\" }", "8:21: \"/b#c\" is no path; such as"),
        (
            "[listeners.a]\naddress = \"127.0.0.1:1\"\nregister = { registry = \"r\", service = \"x\" }",
            "8:25: there is no registry \"r\"; there is none",
        ),
        (
            "[listeners.a]\naddress = \"0.0.0.0:1\"\nregister = { registry = \"r\", service = \"x\" }\n[registries.r]\nkind = \"dns\"",
            "8:25: nobody can register with \"r\"; name a registry of the kind",
        ),
        (
            "[listeners.a]\naddress = \"0.0.0.0:1\"\nregister = { registry = \"r\", service = \"x\" }\n[registries.r]\nkind = \"consul\"",
            "8:12: 0.0.0.0:1 is not an address at which others reach it; add address",
        ),
        ("[services.x]\nregistry = \"r\"\nfallback = \"s\"", "8:12: there is no registry \"s\""),
        (
            "[services.x]\nendpoints = \"a:1\"\nbalance = { policy = \"maglev\" }",
            "8:22: not said by what to hash; add hash",
        ),
        ("[services.x]\nendpoints = \"a:1\"\nbalance = { hash = \"path\" }", "8:20: this policy does not hash"),
        (
            "[services.x]\nendpoints = \"a:1\"\nbalance = { choices = 2, decay = \"1s\" }",
            "8:23: only \"least-connections\" or \"peak-ewma\" has choices; remove it",
        ),
        (
            "[services.x]\nendpoints = \"a:1\"\nbalance = { policy = \"maglev\", hash = [[], \"path\"] }",
            "8:22: an empty list in hash; name what to hash by",
        ),
        ("[services.x]\nendpoints = \"a:1\"\nbreaker = { jitter = 1.5 }", "8:22: more than the whole time; at most 1"),
        ("[services.x]\nendpoints = \"a:1\"\nvia = \"a b\"", "8:7: \"a b\" cannot stand in Via"),
        (
            "[services.x]\nregistry = [\"r\", \"r\"]\n[registries.r]\nkind = \"embedded\"",
            "7:18: \"r\" is named twice; remove one of them",
        ),
        (
            "[[routes]]\npath = \"/a\"\nto = \"orders\"\nhash = \"path\"",
            "9:8: a service whose policy does not hash; give it balance.policy",
        ),
        (
            "[[routes]]\npath = \"/a\"\nto = \"orders\"\ndefault_limits = true",
            "6:1: the default limits hold here without limits of the route's own; remove",
        ),
        ("[[routes]]\npath = \"/a\"\nto = \"orders\"\nhost = \"a\\u0000\"", "9:8: \"a\\0\" is no host; \"keep\""),
        (
            "[listeners.a]\naddress = \"127.0.0.1:1\"\nregister = { registry = \"r\", service = \"x\", check = { http = \"http://a\", grpc = \"a:1\" } }\n[registries.r]\nkind = \"embedded\"",
            "8:12: \"x\" is asked over HTTP and gRPC; keep http = \"http://a\"",
        ),
        (
            "[services.x]\nendpoints = \"a:1\"\nbalance = { policy = \"maglev\", hash = \"body\" }",
            "8:39: \"body\" is not what decides, such as",
        ),
        ("[services.x]\nendpoints = \"a:1\"\nbalance = { subset = {} }", "8:22: a subset of nothing in particular"),
        (
            "[services.x]\nendpoints = \"a:1\"\nbalance.sticky = { cookie = \"c\", secret = \"00\" }",
            "8:43: not 32 hexadecimal digits",
        ),
        ("[limits.l]\nrate = \"1/s\"\nmax_in_flight = 1", "8:17: both rate and max_in_flight; make two limits"),
        ("[limits.l]", "6:1: a limit of nothing; add rate"),
        ("[limiter.redis]\nurl = \"localhost\"", "7:7: "),
        (
            "[limiter.redis]\nurl = \"redis://a\"\non_failure = \"share\"",
            "6:1: not said among how many; add gateways = 2",
        ),
        (
            "[auth.providers.p]\nsecret = \"a secret of thirty-two bytes at least\"\napi_keys = [{ key = \"0123456789abcdef\", subject = \"x\" }]",
            "8:13: two things that callers could show; make two providers of them",
        ),
        ("[auth.providers.p]\napi_keys = [{ key = \"short\", subject = \"x\" }]", "7:13: "),
        ("[auth.providers.p]\ncertificates = [{ fingerprint = \"xyz\", subject = \"x\" }]", "7:17: "),
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
fn what_is_said_briefly_means_the_same_as_at_length() {
    let service = "[services.x]\nendpoints = \"a:1\"\n";
    for (brief, long) in [
        ("balance.zone = \"a\"", "balance.zone = { name = \"a\", least = 6 }"),
        ("balance.slow_start = \"30s\"", "balance.slow_start = { window = \"30s\", floor = 0.1, aggression = 1.0 }"),
        (
            "balance = { policy = \"maglev\", hash = \"path\" }",
            "balance = { policy = \"maglev\", hash = [[\"path\"]], slots = 65537 }",
        ),
        (
            "breaker.open_for = \"1m\"",
            "breaker = { open_for = \"60s\", exhausted = \"ignored\", listen_up_to = \"5m\" }",
        ),
    ] {
        let [brief, long] = [brief, long].map(|said| parse(&with(&format!("{service}{said}"))).unwrap());
        let mut shown = [brief.masked(), long.masked()];
        shown[1]["services"]["x"]["balance"].as_object_mut().unwrap().remove("slots");
        assert_eq!(shown[0], shown[1]);
    }
    for part in [
        "[registries.r]\nkind = \"consul\"\naddress = \"unix:///run/consul.sock\"\ntag = \"v2\"",
        "[registries.r]\nkind = \"consul\"\ntag = [\"v2\", \"eu\"]\n[services.x]\nregistry = \"r\"",
        "[registries]\nr.kind = \"embedded\"\ns.kind = \"dns\"\n[services.x]\nregistry = [\"r\", \"s\"]",
        "[registries]\nr.kind = \"consul\"\n[listeners.a]\naddress = \"127.0.0.1:1\"\nregister = { registry = \"r\", service = \"x\", check = \"5s\" }",
        "[registries]\nr.kind = \"consul\"\n[listeners.a]\naddress = \"127.0.0.1:1\"\nregister = { registry = \"r\", service = \"x\", check = { grpc = \"a:1\", failures = 3 } }",
        "[limits.l]\nrate = \"1/s\"\nkey = \"method\"\nplan = { by = \"scope\", rates = { a = \"1/m\", b = { rate = \"2/m\", burst = 9 } } }",
    ] {
        let config = parse(&with(part)).unwrap_or_else(|mistakes| panic!("{part}\n{mistakes}"));
        assert!(is_valid(&json_of(&with(part)), &Config::json_schema()), "{part}");
        // What is shown can be read again.
        assert!(is_valid(&config.masked(), &Config::json_schema()), "{}", config.masked());
    }
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

/// What a route asks of headers and parameters was shown, and so were headers with these names that it sets.
#[test]
fn values_are_masked_where_their_name_says_that_they_are_secrets() {
    let part = "headers = { x-jwt = \"sesame\", x-session-id = { prefix = \"sesame\" }, x-canary = \"yes\" }\n\
                query = { api_key = \"sesame\", v = { prefix = \"2\" } }\n\
                request_headers.set = { x-origin-verify = \"sesame\", x-signature = \"sesame\", x-plain = \"plain\" }";
    let shown = parse(&with(part)).unwrap().masked().to_string();
    assert!(!shown.contains("sesame") && shown.contains(r#""x-session-id":{"prefix":"***"}"#), "{shown}");
    for plain in [r#""x-canary":{"exact":"yes"}"#, r#""v":{"prefix":"2"}"#, r#""x-plain":"plain""#] {
        assert!(shown.contains(plain), "{shown}");
    }
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

/// Files of this size took half a minute and more, with no other reload meanwhile.
#[test]
fn of_large_files_full_of_mistakes_the_first_hundred_are_said() {
    let mut text = with("");
    for number in 0..20_000 {
        text.push_str(&format!(
            "[[routes]]\npath = \"/{number}\"\nto = \"nobody-{number}\"\nno_such_key_{number} = 1\n"
        ));
    }
    let unknown = parse(&text).unwrap_err();
    let twice = with(&"[[routes]]\npath = \"/a\"\nto = \"orders\"\n".repeat(20_000));
    let same = parse(&twice).unwrap_err();
    for mistakes in [unknown, same] {
        assert_eq!(mistakes.list().len(), 100);
        assert!(mistakes.to_string().ends_with("\ngateway.toml: and more"));
    }
}
