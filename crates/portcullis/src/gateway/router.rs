//! From a path and a method to a route.

use http::Method;

use super::Error;

/// Finds what was put in by pattern and method.
///
/// A pattern of the whole path wins over one with a rest, a literal segment over a parameter, a longer prefix over a shorter.
/// `/a/{*rest}` also matches `/a` and `/a/`, unless they were put in themselves.
#[derive(Clone)]
pub(super) struct Router<T> {
    /// Two, since one cannot tell `/a/{x}` from `/a/{*rest}`.
    whole: Paths<T>,
    rest: Paths<T>,
}

type Paths<T> = matchit::Router<Vec<Entry<T>>>;

#[derive(Clone)]
struct Entry<T> {
    methods: Vec<Method>,
    value: T,
}

/// Why nothing was found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Missing {
    /// No pattern matches the path.
    Path,
    /// A pattern does, but only for these methods.
    Method(Vec<Method>),
}

// === impl Router ===

impl<T: Clone> Router<T> {
    /// A router for routes of (pattern, methods, value); no methods means any.
    pub(super) fn new(routes: Vec<(String, Vec<Method>, T)>) -> Result<Self, Error> {
        let mut patterns: Vec<(String, Vec<Entry<T>>)> = Vec::new();
        for (pattern, methods, value) in routes {
            let entry = Entry { methods, value };
            match patterns.iter_mut().find(|(have, _)| *have == pattern) {
                Some((_, entries)) => {
                    if entries.iter().any(|have| have.overlaps(&entry)) {
                        return Err(Error::new(format!("two routes for {pattern:?} and one method")));
                    }
                    entries.push(entry);
                }
                None => patterns.push((pattern, vec![entry])),
            }
        }
        let (mut whole, mut rest) = (Paths::new(), Paths::new());
        for (pattern, entries) in patterns {
            let insert = |paths: &mut Paths<T>, pattern: &str| {
                let used = paths.insert(pattern, entries.clone());
                used.map_err(|error| Error::new(format!("the pattern {pattern:?} cannot be used: {error}")))
            };
            if !pattern.starts_with('/') {
                return Err(Error::new(format!("the pattern {pattern:?} does not begin with a slash")));
            }
            let Some(at) = pattern.rfind("{*") else {
                insert(&mut whole, &pattern)?;
                continue;
            };
            insert(&mut rest, &pattern)?;
            let prefix = &pattern[..at];
            insert(&mut rest, prefix)?;
            if let Some(bare) = prefix.strip_suffix('/').filter(|bare| !bare.is_empty()) {
                insert(&mut rest, bare)?;
            }
        }
        Ok(Self { whole, rest })
    }

    /// What was put in for the best pattern that matches. The path is taken as it is: no part of it is decoded.
    pub(super) fn find(&self, method: &Method, path: &str) -> Result<&T, Missing> {
        let found = self.whole.at(path).or_else(|_| self.rest.at(path));
        let entries = found.map_err(|_| Missing::Path)?.value;
        if let Some(entry) = entries.iter().find(|entry| entry.takes(method)) {
            return Ok(&entry.value);
        }
        let mut allowed: Vec<Method> = entries.iter().flat_map(|entry| entry.methods.iter().cloned()).collect();
        allowed.dedup();
        Err(Missing::Method(allowed))
    }
}

impl<T> Entry<T> {
    fn takes(&self, method: &Method) -> bool {
        self.methods.is_empty() || self.methods.contains(method)
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.methods.is_empty() || other.methods.is_empty() || self.methods.iter().any(|method| other.takes(method))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn router(patterns: &[&'static str]) -> Router<&'static str> {
        Router::new(patterns.iter().map(|&pattern| (pattern.to_owned(), Vec::new(), pattern)).collect()).unwrap()
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
            assert_eq!(router.find(&Method::GET, path), Ok(&expected), "{path}");
        }
        for path in ["/", "/ab", "/ab/c", "*", ""] {
            assert_eq!(router.find(&Method::GET, path), Err(Missing::Path), "{path}");
        }
    }

    #[test]
    fn a_rest_does_not_take_what_was_put_in_by_itself() {
        let router = router(&["/{*rest}", "/a", "/a/{*rest}"]);
        assert_eq!(router.find(&Method::GET, "/"), Ok(&"/{*rest}"));
        assert_eq!(router.find(&Method::GET, "/a"), Ok(&"/a"));
        assert_eq!(router.find(&Method::GET, "/a/"), Ok(&"/a/{*rest}"));
        assert_eq!(router.find(&Method::GET, "/b"), Ok(&"/{*rest}"));
    }

    #[test]
    fn one_path_may_lead_to_several_places_by_method() {
        let routes =
            vec![("/a".to_owned(), vec![Method::GET, Method::HEAD], 1), ("/a".to_owned(), vec![Method::POST], 2)];
        let router = Router::new(routes.clone()).unwrap();
        assert_eq!(router.find(&Method::HEAD, "/a"), Ok(&1));
        assert_eq!(router.find(&Method::POST, "/a"), Ok(&2));
        let allowed = vec![Method::GET, Method::HEAD, Method::POST];
        assert_eq!(router.find(&Method::PUT, "/a"), Err(Missing::Method(allowed)));
        let twice = [routes, vec![("/a".to_owned(), Vec::new(), 3)]].concat();
        assert!(Router::new(twice).is_err());
    }

    #[test]
    fn patterns_that_cannot_be_used_are_errors() {
        for pattern in ["", "a", "/{", "/{*rest}/b", "/{x}{y}"] {
            assert!(Router::new(vec![(pattern.to_owned(), Vec::new(), ())]).is_err(), "{pattern:?}");
        }
    }
}
