//! From a request's head to a route.

use std::cmp::Reverse;
use std::collections::hash_map::Entry as Place;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use http::{HeaderMap, Method, Uri, header};
use portcullis_core::Dialect;

use super::Error;
use super::matches::{Is, Matches};
use super::pattern::{MOST_PARAMETERS, has_rest, shape, specificity, with_upper_codes, without_rest};

/// Finds what was put in by host, path, method, headers and query.
///
/// The most specific wins, as the [Gateway API](https://gateway-api.sigs.k8s.io/api-types/httproute/) has it: an exact host,
/// then the longest wildcard, then any; within a host a pattern of the whole path, then one with a rest; a literal segment,
/// then a parameter; a longer prefix, then a shorter; then a method, the most headers, the most query parameters, and last the order. What does not match in all of that is passed over for the
/// next. `/a/{*rest}` also matches `/a` and `/a/`, unless they were put in themselves.
#[derive(Clone)]
pub(super) struct Router<T> {
    exact: HashMap<Box<str>, Paths<T>>,
    /// By what follows the asterisk, with its dot; the longest first.
    wildcards: Vec<(Box<str>, Paths<T>)>,
    any: Paths<T>,
}

/// The routes of one host.
#[derive(Clone)]
struct Paths<T> {
    /// Two, since one cannot tell `/a/{x}` from `/a/{*rest}`.
    whole: matchit::Router<usize>,
    rest: matchit::Router<usize>,
    /// Those that do not go beside others there, as `/{*rest}` beside `/{tenant}/{*rest}`: asked one by one.
    apart: Vec<usize>,
    /// The most specific first.
    patterns: Vec<Pattern<T>>,
}

#[derive(Clone)]
struct Pattern<T> {
    text: String,
    alone: matchit::Router<()>,
    entries: Vec<Entry<T>>,
}

#[derive(Clone)]
struct Entry<T> {
    /// Among all that were put in.
    index: usize,
    matches: Matches,
    value: T,
}

/// What is looked at in a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked<'a> {
    pub(super) method: &'a Method,
    pub(super) uri: &'a Uri,
    pub(super) headers: &'a HeaderMap,
}

/// Why some of those put in cannot be used, by their place among all.
pub(super) type Misfits = BTreeMap<usize, Error>;

/// Why nothing was found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Missing {
    /// Nothing matches but for the method, whatever it is.
    Route,
    /// Something would, for these methods.
    Method(Vec<Method>),
}

// === impl Router ===

impl<T: Clone> Router<T> {
    pub(super) fn new(routes: Vec<(String, Matches, T)>) -> Result<Self, Error> {
        let mut misfits = Misfits::new();
        let router = Self::of_those_that_fit(routes, &mut misfits);
        misfits.into_values().next().map_or(Ok(router), Err)
    }

    /// Leaves out what cannot be used, and what does not go with those before it.
    pub(super) fn of_those_that_fit(routes: Vec<(String, Matches, T)>, misfits: &mut Misfits) -> Self {
        let mut hosts: HashMap<Option<String>, Vec<(String, Entry<T>)>> = HashMap::new();
        for (index, (pattern, matches, value)) in routes.into_iter().enumerate() {
            if !pattern.starts_with('/') {
                misfits.insert(index, Error::new(format!("the pattern {pattern:?} does not begin with a slash")));
                continue;
            }
            if shape(&pattern).matches("{}").count() > MOST_PARAMETERS {
                let why = format!("the pattern {pattern:?} has more than {MOST_PARAMETERS} parameters");
                misfits.insert(index, Error::new(why));
                continue;
            }
            let pattern = with_upper_codes(&pattern).into_owned();
            let mut wrong = matches.hosts.iter().filter(|host| !is_host(host));
            if let Some(host) = wrong.next() {
                let why = format!("{host:?} is no host: want `a.example` or `*.example`");
                misfits.insert(index, Error::new(why));
                continue;
            }
            // A name that is said twice is one.
            let names: BTreeSet<Option<String>> = match matches.hosts.as_slice() {
                [] => BTreeSet::from([None]),
                names => names.iter().map(|name| Some(without_dot(name).to_ascii_lowercase())).collect(),
            };
            for host in names {
                let entry = Entry { index, matches: matches.clone(), value: value.clone() };
                hosts.entry(host).or_default().push((pattern.clone(), entry));
            }
        }
        let any = hosts.remove(&None).unwrap_or_default();
        let mut router = Self { exact: HashMap::new(), wildcards: Vec::new(), any: Paths::new(any, misfits) };
        for (host, entries) in hosts {
            let (Some(host), paths) = (host, Paths::new(entries, misfits)) else { continue };
            match host.strip_prefix('*') {
                Some(suffix) => router.wildcards.push((suffix.into(), paths)),
                None => drop(router.exact.insert(host.into(), paths)),
            }
        }
        router.wildcards.sort_by_key(|(suffix, _)| Reverse(suffix.len()));
        router
    }

    /// What was put in for the most specific that matches. The path is taken as it is: no part of it is decoded, but the
    /// case of what is encoded does not matter.
    pub(super) fn find(&self, asked: Asked<'_>) -> Result<&T, Missing> {
        let mut allowed = Vec::new();
        if !(self.exact.is_empty() && self.wildcards.is_empty())
            && let Some(host) = asked.host()
        {
            let host = host.to_ascii_lowercase();
            let exact = self.exact.get(host.as_str()).into_iter();
            let wild =
                self.wildcards.iter().filter(|(suffix, _)| host.len() > suffix.len() && host.ends_with(&**suffix));
            for paths in exact.chain(wild.map(|(_, paths)| paths)) {
                if let Some(value) = paths.find(asked, &mut allowed) {
                    return Ok(value);
                }
            }
        }
        if let Some(value) = self.any.find(asked, &mut allowed) {
            return Ok(value);
        }
        Err(if allowed.is_empty() { Missing::Route } else { Missing::Method(allowed) })
    }
}

// === impl Paths ===

impl<T: Clone> Paths<T> {
    /// The routes in the order they were put in.
    fn new(routes: Vec<(String, Entry<T>)>, misfits: &mut Misfits) -> Self {
        let mut by_shape: HashMap<String, Pattern<T>> = HashMap::new();
        for (text, entry) in routes {
            let index = entry.index;
            let why = match by_shape.entry(shape(&text)) {
                Place::Vacant(place) => {
                    let mut alone = matchit::Router::new();
                    match alone.insert(text.clone(), ()) {
                        Ok(()) => {
                            place.insert(Pattern { text, alone, entries: vec![entry] });
                            continue;
                        }
                        Err(error) => format!("the pattern {text:?} cannot be used: {error}"),
                    }
                }
                Place::Occupied(place) => {
                    let Pattern { text: other, entries, .. } = place.into_mut();
                    if *other != text {
                        format!("the patterns {other:?} and {text:?} take the same paths")
                    } else if entries.iter().any(|have| have.matches.is_alike(&entry.matches)) {
                        format!("two routes for {text:?} that take the same requests")
                    } else {
                        entries.push(entry);
                        continue;
                    }
                }
            };
            misfits.insert(index, Error::new(why));
        }
        let mut patterns: Vec<_> = by_shape.into_iter().collect();
        patterns.sort_by_cached_key(|(shape, pattern)| {
            (specificity(shape), pattern.entries.first().map_or(0, |entry| entry.index))
        });
        let (mut whole, mut rest, mut apart) = (matchit::Router::new(), matchit::Router::new(), Vec::new());
        for (index, (shape, pattern)) in patterns.iter_mut().enumerate() {
            let best = if has_rest(shape) { &mut rest } else { &mut whole };
            if best.insert(pattern.text.clone(), index).is_err() {
                apart.push(index);
            }
            pattern.entries.sort_by_key(|entry| entry.matches.rank());
        }
        for (index, (_, pattern)) in patterns.iter_mut().enumerate().filter(|(_, (shape, _))| has_rest(shape)) {
            for shorter in without_rest(&pattern.text) {
                let _ = pattern.alone.insert(shorter.clone(), ());
                // What was put in by itself goes first.
                let _ = rest.insert(shorter, index);
            }
        }
        Self { whole, rest, apart, patterns: patterns.into_iter().map(|(_, pattern)| pattern).collect() }
    }

    fn find(&self, asked: Asked<'_>, allowed: &mut Vec<Method>) -> Option<&T> {
        let path = &*with_upper_codes(asked.path());
        let best = self.whole.at(path).or_else(|_| self.rest.at(path)).ok().map(|found| *found.value);
        let takes = |index: &usize| self.patterns.get(*index).is_some_and(|pattern| pattern.alone.at(path).is_ok());
        let apart = self.apart.iter().copied().take_while(|index| best.is_none_or(|best| *index < best)).find(takes);
        let best = apart.or(best)?;
        let first = self.patterns.get(best)?;
        if let Some(value) = first.find(asked, allowed) {
            return Some(value);
        }
        // Rare: the path matches and something else does not; a less specific pattern may take it.
        let others = self.patterns.iter().enumerate().filter(|&(index, _)| index != best);
        others
            .filter(|(_, pattern)| pattern.alone.at(path).is_ok())
            .find_map(|(_, pattern)| pattern.find(asked, allowed))
    }
}

impl<T> Pattern<T> {
    fn find(&self, asked: Asked<'_>, allowed: &mut Vec<Method>) -> Option<&T> {
        let fitting = self.entries.iter().filter(|entry| entry.matches.fits(asked));
        for entry in fitting {
            if entry.matches.takes(asked.method) {
                return Some(&entry.value);
            }
            for method in &entry.matches.methods {
                if !allowed.contains(method) {
                    allowed.push(method.clone());
                }
            }
        }
        None
    }
}

/// Whether it is a name without a port, or all below one.
fn is_host(host: &str) -> bool {
    let name = host.strip_prefix("*.").unwrap_or(host);
    !without_dot(name).is_empty() && !name.contains(['*', ':', '/'])
}

/// A name that ends with the root's dot is the name without it.
fn without_dot(host: &str) -> &str {
    host.strip_suffix('.').unwrap_or(host)
}

// === impl Matches ===

impl Matches {
    fn takes(&self, method: &Method) -> bool {
        self.methods.is_empty() || self.methods.contains(method)
    }

    /// Whether all but host, path and method is as it must be.
    fn fits(&self, asked: Asked<'_>) -> bool {
        if self.grpc && Dialect::of(asked.headers) != Dialect::Grpc {
            return false;
        }
        let header = |(name, is): &(http::HeaderName, Is)| {
            is.holds(asked.headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes())).as_deref())
        };
        let query = |(name, is): &(String, Is)| is.holds(asked.query(name).as_deref());
        self.headers.iter().all(header) && self.query.iter().all(query)
    }

    /// Lower goes first.
    fn rank(&self) -> (bool, bool, Reverse<usize>, Reverse<usize>) {
        (!self.grpc, self.methods.is_empty(), Reverse(self.headers.len()), Reverse(self.query.len()))
    }

    /// Whether nothing tells which of the two a request is for.
    fn is_alike(&self, other: &Self) -> bool {
        let methods = self.methods.is_empty() && other.methods.is_empty()
            || self.methods.iter().any(|method| other.methods.contains(method));
        methods && self.grpc == other.grpc && self.headers == other.headers && self.query == other.query
    }
}

// === impl Asked ===

impl<'a> Asked<'a> {
    /// The path as it is; the target of `CONNECT` has none, and is looked for at the root.
    fn path(&self) -> &'a str {
        match self.uri.path() {
            "" => "/",
            path => path,
        }
    }

    /// The host without its port: the target's, else the `Host` field's.
    pub(super) fn host(&self) -> Option<&'a str> {
        if let Some(host) = self.uri.host() {
            return Some(without_dot(host));
        }
        let field = self.headers.get(header::HOST)?.to_str().ok()?;
        // An IPv6 address has colons of its own.
        let end = if field.starts_with('[') { field.find(']').map(|at| at + 1) } else { field.find(':') };
        Some(without_dot(&field[..end.unwrap_or(field.len())]))
    }

    /// The first query parameter of that name, decoded.
    fn query(&self, name: &str) -> Option<String> {
        let decode = |text: &str| {
            let spaced = text.replace('+', " ");
            percent_encoding::percent_decode_str(&spaced).decode_utf8_lossy().into_owned()
        };
        let pairs = self.uri.query()?.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        pairs.into_iter().find(|(have, _)| decode(have) == name).map(|(_, value)| decode(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(
        router: &Router<&'static str>,
        method: &Method,
        target: &str,
        headers: &[(&str, &str)],
    ) -> Result<&'static str, Missing> {
        let uri: Uri = target.parse().unwrap();
        let headers = headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
        router.find(Asked { method, uri: &uri, headers: &headers }).copied()
    }

    fn get(router: &Router<&'static str>, target: &str) -> Result<&'static str, Missing> {
        ask(router, &Method::GET, target, &[])
    }

    fn any() -> Matches {
        Matches::default()
    }

    fn router(patterns: &[&'static str]) -> Router<&'static str> {
        Router::new(patterns.iter().map(|&pattern| (pattern.to_owned(), any(), pattern)).collect()).unwrap()
    }

    #[test]
    fn literals_win_over_parameters_and_those_over_the_rest() {
        let router = router(&["/a/b", "/a/{x}", "/a/{*rest}"]);
        for (path, expected) in [
            ("/a/b", "/a/b"),
            ("/a/c", "/a/{x}"),
            ("/a/c/d", "/a/{*rest}"),
            ("/a", "/a/{*rest}"),
            ("/a/", "/a/{*rest}"),
        ] {
            assert_eq!(get(&router, path), Ok(expected), "{path}");
        }
        for path in ["/", "/ab", "/ab/c", "*"] {
            assert_eq!(get(&router, path), Err(Missing::Route), "{path}");
        }
    }

    #[test]
    fn a_rest_does_not_take_what_was_put_in_by_itself() {
        let router = router(&["/{*rest}", "/a", "/a/{*rest}"]);
        assert_eq!(get(&router, "/"), Ok("/{*rest}"));
        assert_eq!(get(&router, "/a"), Ok("/a"));
        assert_eq!(get(&router, "/a/"), Ok("/a/{*rest}"));
        assert_eq!(get(&router, "/b"), Ok("/{*rest}"));
    }

    /// The first was refused beside any of the others, whose parameter takes what its rest would.
    #[test]
    fn a_rest_and_a_parameter_with_a_rest_stand_together() {
        let patterns =
            ["/{*rest}", "/{tenant}/{*rest}", "/{tenant}/api/{*rest}", "/{other}/{more}/x", "/a/{*rest}", "/{t}/{u}"];
        for patterns in [patterns.to_vec(), patterns.into_iter().rev().collect()] {
            let router = router(&patterns);
            for (path, expected) in [
                ("/", "/{*rest}"),
                ("/t", "/{tenant}/{*rest}"),
                ("/t/", "/{tenant}/{*rest}"),
                ("/t/b", "/{t}/{u}"),
                ("/t/b/c", "/{tenant}/{*rest}"),
                ("/t/api/c", "/{tenant}/api/{*rest}"),
                ("/t/b/x", "/{other}/{more}/x"),
                ("/a", "/a/{*rest}"),
                ("/a/b/c", "/a/{*rest}"),
            ] {
                assert_eq!(get(&router, path), Ok(expected), "{path}");
            }
        }
        let same = Router::new(["/{a}/{*b}", "/{c}/{*d}"].map(|pattern| (pattern.to_owned(), any(), ())).to_vec());
        let said = same.map(|_| ()).unwrap_err().to_string();
        assert!(said.contains("\"/{a}/{*b}\"") && said.contains("\"/{c}/{*d}\""), "{said}");
    }

    #[test]
    fn connect_has_a_host_and_no_path() {
        let tunnels = Matches { methods: vec![Method::CONNECT], hosts: vec!["db.example".into()], ..any() };
        let router = Router::new(vec![("/{*rest}".to_owned(), tunnels, "tunnel")]).unwrap();
        assert_eq!(ask(&router, &Method::CONNECT, "db.example:5432", &[]), Ok("tunnel"));
        assert_eq!(ask(&router, &Method::CONNECT, "other.example:5432", &[]), Err(Missing::Route));
    }

    #[test]
    fn one_path_may_lead_to_several_places_by_method() {
        let routes = vec![
            ("/a".to_owned(), Matches { methods: vec![Method::GET, Method::HEAD], ..any() }, "get"),
            ("/a".to_owned(), Matches { methods: vec![Method::POST], ..any() }, "post"),
        ];
        let router = Router::new(routes.clone()).unwrap();
        assert_eq!(ask(&router, &Method::HEAD, "/a", &[]), Ok("get"));
        assert_eq!(ask(&router, &Method::POST, "/a", &[]), Ok("post"));
        let allowed = vec![Method::GET, Method::HEAD, Method::POST];
        assert_eq!(ask(&router, &Method::PUT, "/a", &[]), Err(Missing::Method(allowed)));
        let with_any = [routes.clone(), vec![("/a".to_owned(), any(), "any")]].concat();
        assert_eq!(ask(&Router::new(with_any).unwrap(), &Method::PUT, "/a", &[]), Ok("any"));
        let twice =
            [routes, vec![("/a".to_owned(), Matches { methods: vec![Method::POST], ..any() }, "again")]].concat();
        assert!(Router::new(twice).is_err());
    }

    #[test]
    fn exact_hosts_win_over_wildcards_and_the_longest_of_those() {
        let host = |name: &str| Matches { hosts: vec![name.to_owned()], ..any() };
        let router = Router::new(vec![
            ("/{*rest}".to_owned(), any(), "any"),
            ("/{*rest}".to_owned(), host("*.example"), "wild"),
            ("/{*rest}".to_owned(), host("*.api.example"), "longer"),
            ("/a".to_owned(), host("v1.API.example"), "exact"),
        ])
        .unwrap();
        let at = |host: &str, path| ask(&router, &Method::GET, path, &[("host", host)]);
        assert_eq!(at("v1.api.example:8080", "/a"), Ok("exact"));
        assert_eq!(at("V1.api.example", "/b"), Ok("longer"), "what is more specific takes only what matches");
        assert_eq!(at("x.example", "/a"), Ok("wild"));
        assert_eq!(at("a.b.example", "/a"), Ok("wild"), "a wildcard takes any number of labels");
        assert_eq!(at("v1.api.example.:80", "/a"), Ok("exact"), "the root's dot makes no other name of it");
        assert_eq!(get(&router, "http://x.example./a"), Ok("wild"));
        for other in ["example", ".example", "example.org", "[::1]:80", ""] {
            assert_eq!(at(other, "/a"), Ok("any"), "{other}");
        }
        assert_eq!(get(&router, "http://v1.api.example/a"), Ok("exact"), "the target's authority is the host");
        assert_eq!(get(&router, "/a"), Ok("any"));
        for wrong in ["*", "*.", "a.*", "*.*.b", "a:80", ""] {
            assert!(Router::new(vec![("/".to_owned(), host(wrong), ())]).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_most_headers_and_parameters_win_and_others_are_passed_over() {
        let header = |is| ("x-canary".parse().unwrap(), is);
        let router = Router::new(vec![
            ("/{*rest}".to_owned(), any(), "all"),
            ("/a".to_owned(), Matches { headers: vec![header(Is::Exactly("yes".into()))], ..any() }, "header"),
            (
                "/a".to_owned(),
                Matches {
                    headers: vec![header(Is::Present)],
                    query: vec![("v w".to_owned(), Is::Prefixed("2".into()))],
                    ..any()
                },
                "both",
            ),
            ("/b".to_owned(), Matches { headers: vec![header(Is::Absent)], ..any() }, "without"),
        ])
        .unwrap();
        let canary = [("x-canary", "yes")];
        assert_eq!(ask(&router, &Method::GET, "/a?v+w=2.1", &canary), Ok("both"));
        assert_eq!(
            ask(&router, &Method::GET, "/a?v%20w=1&v%20w=2", &canary),
            Ok("header"),
            "the first of a name counts"
        );
        assert_eq!(get(&router, "/a?v+w=2"), Ok("all"), "a less specific pattern takes what others refuse");
        assert_eq!(get(&router, "/b"), Ok("without"));
        assert_eq!(ask(&router, &Method::GET, "/b", &canary), Ok("all"));
    }

    #[test]
    fn grpc_routes_take_grpc_alone() {
        let grpc = Matches { grpc: true, methods: vec![Method::POST], ..any() };
        let router =
            Router::new(vec![("/s.S/M".to_owned(), grpc, "grpc"), ("/s.S/M".to_owned(), any(), "web")]).unwrap();
        let grpc = [("content-type", "application/grpc+proto")];
        assert_eq!(ask(&router, &Method::POST, "/s.S/M", &grpc), Ok("grpc"));
        assert_eq!(ask(&router, &Method::POST, "/s.S/M", &[]), Ok("web"));
    }

    /// One spelling was protected, and the other went past it.
    #[test]
    fn codes_are_one_in_either_case() {
        let router = router(&["/%c3%b6/{x}", "/%C3%9F", "/{*rest}"]);
        for (path, expected) in [
            ("/%C3%B6/1", "/%c3%b6/{x}"),
            ("/%c3%B6/1", "/%c3%b6/{x}"),
            ("/%c3%9f", "/%C3%9F"),
            ("/%C3%9F", "/%C3%9F"),
            ("/%c3%a4", "/{*rest}"),
        ] {
            assert_eq!(get(&router, path), Ok(expected), "{path}");
        }
        let twice = ["/%c3", "/%C3"].map(|pattern| (pattern.to_owned(), any(), ()));
        assert!(Router::new(twice.to_vec()).is_err());
    }

    /// More of them were a panic.
    #[test]
    fn a_pattern_has_as_many_parameters_as_can_be_told_apart() {
        let with = |count: usize| (0..count).map(|index| format!("/{{p{index}}}")).collect::<String>();
        for (pattern, fits) in [
            (with(25), true),
            (with(25) + "/{*rest}", true),
            (with(26), false),
            (with(26) + "/{*rest}", false),
            (with(300), false),
        ] {
            assert_eq!(Router::new(vec![(pattern.clone(), any(), ())]).is_ok(), fits, "{pattern}");
        }
    }

    #[test]
    fn patterns_that_cannot_be_used_are_errors() {
        for pattern in ["", "a", "/{", "/{*rest}/b", "/{x}{y}"] {
            assert!(Router::new(vec![(pattern.to_owned(), any(), ())]).is_err(), "{pattern:?}");
        }
        assert!(Router::new(vec![("/{a}".to_owned(), any(), ()), ("/{b}".to_owned(), any(), ())]).is_err());
    }

    /// The one with the shorter names was, and of those with braces in them none.
    #[test]
    fn the_later_of_two_for_the_same_paths_is_left_out() {
        for two in [["/{a}", "/{longer}"], ["/{longer}", "/{a}"], ["/{{a}}/{x}", "/{{a}}/{y}"], ["/{a}}b}", "/{c}"]] {
            let mut misfits = Misfits::new();
            let routes = two.map(|pattern| (pattern.to_owned(), any(), pattern)).to_vec();
            let router = Router::of_those_that_fit(routes, &mut misfits);
            assert_eq!(misfits.into_keys().collect::<Vec<_>>(), [1], "{two:?}");
            assert_eq!(get(&router, if two[0].contains("{{") { "/{a}/1" } else { "/1" }), Ok(two[0]));
        }
        let router = router(&["/{a}/{*rest}", "/{{a}}/{b}", "/{{*}}", "/{c}"]);
        for (path, expected) in [("/{a}/1", "/{{a}}/{b}"), ("/a/1", "/{a}/{*rest}"), ("/{*}", "/{{*}}"), ("/{", "/{c}")]
        {
            assert_eq!(get(&router, path), Ok(expected), "{path}");
        }
    }

    /// It was refused as one that takes the same requests as itself.
    #[test]
    fn a_host_may_be_named_twice() {
        let hosts = ["a.example", "A.example", "a.example.", "*.b.example", "*.B.example."];
        let matches = Matches { hosts: hosts.map(str::to_owned).to_vec(), ..any() };
        let router = Router::new(vec![("/".to_owned(), matches, "here")]).unwrap();
        for host in ["a.example", "x.b.example"] {
            assert_eq!(ask(&router, &Method::GET, "/", &[("host", host)]), Ok("here"), "{host}");
        }
    }
}
