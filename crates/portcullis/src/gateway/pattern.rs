//! What the text of a pattern says of the paths it takes.

use std::borrow::Cow;
use std::cmp::Reverse;

use http::uri::PathAndQuery;
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use portcullis_core::normal_path;

/// More of them in one pattern would be the end of what reads it.
pub(super) const MOST_PARAMETERS: usize = 25;

/// What stands encoded in a request's target, but for what is not text.
const ENCODED: &AsciiSet = &CONTROLS.add(b' ').add(b'?').add(b'#').add(b'<').add(b'>').add(b'`').add(b'^').add(b'|');

/// Why no request is taken by the pattern: what its literal parts say is in no request's target, or, unless the route
/// `passes` paths as they are, in none that is in normal form.
pub(super) fn unmatched(pattern: &str, passes: bool) -> Option<String> {
    let path = shape(pattern).replace('\u{1}', "{").replace('\u{2}', "}");
    let is_target =
        !pattern.contains(char::is_control) && !path.contains(['?', '#']) && path.parse::<PathAndQuery>().is_ok();
    let is_normal = |path: &str| path.is_ascii() && matches!(normal_path(path), Some(Cow::Borrowed(_)));
    if is_target && (passes || is_normal(&path)) {
        return None;
    }
    let encoded = utf8_percent_encode(pattern, ENCODED).to_string();
    Some(match normal_path(&encoded) {
        Some(normal) if normal != pattern => format!("no request has the path {pattern:?}: callers write {normal:?}"),
        _ => format!("no request has the path {pattern:?}: it has no normal form"),
    })
}

/// The path with the codes of bytes in upper case: `%c3` and `%C3` are one.
pub(super) fn with_upper_codes(path: &str) -> Cow<'_, str> {
    let mut pieces = path.split('%');
    let first = pieces.next().unwrap_or_default();
    let is_code = |piece: &str| piece.bytes().take(2).all(|byte| byte.is_ascii_hexdigit());
    let is_upper = |piece: &str| !piece.bytes().take(2).any(|byte| byte.is_ascii_lowercase());
    if pieces.clone().all(|piece| is_upper(piece) || !is_code(piece)) {
        return Cow::Borrowed(path);
    }
    let mut upper = first.to_owned();
    for piece in pieces {
        upper.push('%');
        match piece.split_at_checked(2).filter(|_| is_code(piece)) {
            Some((code, rest)) => upper.extend([&code.to_ascii_uppercase(), rest]),
            None => upper.push_str(piece),
        }
    }
    Cow::Owned(upper)
}

/// The pattern with no names in its parameters, and other characters for braces that are meant, which it has doubled.
pub(super) fn shape(pattern: &str) -> String {
    let (mut shape, mut is_name) = (String::new(), false);
    let mut rest = pattern.chars().peekable();
    while let Some(one) = rest.next() {
        let is_meant = matches!(one, '{' | '}') && rest.next_if_eq(&one).is_some();
        match one {
            '}' if is_name && !is_meant => {
                is_name = false;
                shape.push(one);
            }
            _ if is_name => {}
            '{' if is_meant => shape.push('\u{1}'),
            '}' if is_meant => shape.push('\u{2}'),
            '{' => {
                is_name = true;
                shape.push(one);
                shape.extend(rest.next_if_eq(&'*'));
            }
            _ => shape.push(one),
        }
    }
    shape
}

/// Sorts the [shape] of the most specific pattern first: the whole path, then segment by segment literal, parameter, rest.
pub(super) fn specificity(shape: &str) -> (bool, Vec<u8>, Reverse<usize>) {
    let kinds = shape.split('/').skip(1).map(|segment| match segment {
        rest if rest.starts_with("{*") => 2,
        parameter if parameter.contains('{') => 1,
        _ => 0,
    });
    (has_rest(shape), kinds.chain([1]).collect(), Reverse(shape.len()))
}

pub(super) fn has_rest(shape: &str) -> bool {
    shape.contains("{*")
}

/// `/a/` and `/a` for `/a/{*rest}`.
pub(super) fn without_rest(pattern: &str) -> impl Iterator<Item = String> {
    let prefix = pattern.rfind("{*").map(|at| pattern[..at].to_owned());
    let bare = prefix.as_ref().and_then(|prefix| prefix.strip_suffix('/')).filter(|bare| !bare.is_empty());
    let bare = bare.map(str::to_owned);
    prefix.into_iter().chain(bare)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_request_asks_for_is_found_and_what_they_ask_for_is_said() {
        for pattern in [
            "/",
            "/a/",
            "/a.b/.c/...",
            "/{a}/{größe}/{*rest}",
            "/a{x}/.{y}",
            "/{{a}}/{}}",
            "/caf%C3%A9/%c3%b6;v=1/a@b:c,d+e~f!$&'()*=",
            "/a%3Fb%20c%23d",
        ] {
            assert_eq!(unmatched(pattern, false), None, "{pattern}");
        }
        // Taken where paths go on as they are, and what is written instead elsewhere.
        for (pattern, normal) in [
            ("/größe/{id}", Some("/gr%C3%B6%C3%9Fe/{id}")),
            ("/%61dmin/{*rest}", Some("/admin/{*rest}")),
            ("/a/../b", Some("/b")),
            ("/a/./{x}", Some("/a/{x}")),
            ("//a", Some("/a")),
            ("/a/%2e%2E/{*rest}", Some("/{*rest}")),
            ("/a%2fb", None),
            ("/a/..;/b", None),
            ("/100%/{x}", None),
            ("/a\\b", None),
        ] {
            let why = unmatched(pattern, false).unwrap_or_default();
            let end = normal.map_or("it has no normal form".to_owned(), |normal| format!("callers write {normal:?}"));
            assert!(why.contains(&format!("{pattern:?}")) && why.ends_with(&end), "{pattern}: {why}");
            assert_eq!(unmatched(pattern, true), None, "{pattern}");
        }
        // In no target at all.
        for (pattern, normal) in [
            ("/a b", Some("/a%20b")),
            ("/a?b={c}", Some("/a%3Fb={c}")),
            ("/a#b", Some("/a%23b")),
            ("/<a>`^|", Some("/%3Ca%3E%60%5E%7C")),
            ("/ü b", Some("/%C3%BC%20b")),
            ("/a\u{1}b", None),
            ("/a\nb", None),
            ("/a\u{7f}b", None),
        ] {
            for passes in [true, false] {
                let why = unmatched(pattern, passes).unwrap_or_default();
                let end =
                    normal.map_or("it has no normal form".to_owned(), |normal| format!("callers write {normal:?}"));
                assert!(why.ends_with(&end), "{pattern:?}: {why}");
            }
        }
    }

    #[test]
    fn codes_are_read_in_upper_case() {
        for (path, upper) in [
            ("/", "/"),
            ("/%C3%B6", "/%C3%B6"),
            ("/%c3%b6/%e2abc", "/%C3%B6/%E2abc"),
            ("/a%3fb%zz%a%", "/a%3Fb%zz%a%"),
            ("/%aé", "/%aé"),
            ("/%é%ab", "/%é%AB"),
        ] {
            assert_eq!(with_upper_codes(path), upper);
        }
    }
}
