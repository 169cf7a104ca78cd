//! One spelling for each path, so that who matches it and who serves it read the same.

use std::borrow::Cow;

/// Whether a path is in normal form: it begins with `/` and has no dot segments, plain or percent-encoded, no empty
/// segments but a last one, no backslash, no encoded slash, backslash, NUL or other control character, nothing encoded that
/// is the same plain ([RFC 3986](https://www.rfc-editor.org/rfc/rfc3986#section-2.3) §2.3: letters, digits, `-`, `.`, `_`,
/// `~`), and nothing that looks percent-encoded and is not. `*` is in normal form. The query is no part of the path.
///
/// ```
/// use portcullis_core::is_normal_path;
///
/// assert!(is_normal_path("/orders/7/") && is_normal_path("/caf%C3%A9;v=1"));
/// for path in ["/a/../b", "/a/%2e%2E/b", "/a/..;/b", "/%61", "//a", "/a%2fb", "/a%5cb", "/a%00", "/a%zz", "a"] {
///     assert!(!is_normal_path(path), "{path}");
/// }
/// ```
///
/// Three things have several spellings that are all normal, since callers have reason to use each. Who closes a path that
/// has one of them in it closes every spelling, or the whole of what is above:
///
/// * the code of any other byte may be in upper or lower case, `%C3` or `%c3`;
/// * what has a meaning somewhere, such as `@`, `:`, `+` or `,`, may be encoded, and servers that decode first take `%40` for
///   `@`;
/// * a segment may have parameters, `/a;v=1`, which servlet containers take away before they look. What they would take for
///   a dot segment or an empty one is not normal.
#[must_use]
pub fn is_normal_path(path: &str) -> bool {
    let bytes = path.as_bytes();
    if bytes.first() != Some(&b'/') {
        return path == "*";
    }
    // The fast way: none of the bytes that could matter.
    let mut after_slash = false;
    let plain = bytes.iter().all(|&byte| {
        let fine = match byte {
            b'%' | b'\\' => false,
            b'/' | b'.' | b';' => !after_slash,
            _ => true,
        };
        after_slash = byte == b'/';
        fine
    });
    plain || matches!(normal_path(path), Some(Cow::Borrowed(_)))
}

/// The normal form of a path: what is encoded without need decoded, dot segments resolved and empty segments dropped;
/// borrowed if the path is in it. `None` if it has none, because it says something that different readers read differently:
/// an encoded slash, backslash or control character, a plain backslash, a dot segment or an empty one with parameters, or a
/// broken percent-encoding. What is percent-encoded otherwise stays as it is.
#[must_use]
pub fn normal_path(path: &str) -> Option<Cow<'_, str>> {
    if path == "*" {
        return Some(Cow::Borrowed(path));
    }
    let rest = path.strip_prefix('/')?;
    let mut segments: Vec<Cow<'_, str>> = Vec::new();
    let mut changed = false;
    // Whether a slash is due at the end.
    let mut open = true;
    let mut parts = rest.split('/').peekable();
    while let Some(part) = parts.next() {
        let last = parts.peek().is_none();
        let segment = plain(part)?;
        changed |= matches!(segment, Cow::Owned(_));
        let name = name(&segment);
        open = match name {
            // For who knows no parameters it is a segment like any other, for who does it is one of these.
            "." | ".." if name.len() < segment.len() => return None,
            "" if name.len() < segment.len() && !last => return None,
            "" if segment.is_empty() => {
                changed |= !last;
                true
            }
            "." => {
                changed = true;
                true
            }
            ".." => {
                changed = true;
                segments.pop();
                true
            }
            _ => {
                segments.push(segment);
                false
            }
        };
    }
    if !changed {
        return Some(Cow::Borrowed(path));
    }
    let mut normal = String::with_capacity(path.len());
    for segment in &segments {
        normal.push('/');
        normal.push_str(segment);
    }
    if open {
        normal.push('/');
    }
    Some(Cow::Owned(normal))
}

/// A segment with everything plain that means the same so. `None` for what has no normal form.
fn plain(segment: &str) -> Option<Cow<'_, str>> {
    let mut pieces = segment.split('%');
    let first = pieces.next().filter(|_| !segment.contains('\\'))?;
    let mut decoded: Option<String> = None;
    let mut read = first.len();
    for piece in pieces {
        let digit = |at: usize| char::from(*piece.as_bytes().get(at)?).to_digit(16);
        let code = u8::try_from(digit(0)? * 16 + digit(1)?).ok()?;
        match code {
            b'/' | b'\\' | 0..=0x1f | 0x7f => return None,
            b'-' | b'.' | b'_' | b'~' | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => {
                let decoded = decoded.get_or_insert_with(|| segment[..read].to_owned());
                decoded.push(char::from(code));
                decoded.push_str(&piece[2..]);
            }
            _ => {
                if let Some(decoded) = &mut decoded {
                    decoded.push('%');
                    decoded.push_str(piece);
                }
            }
        }
        read += 1 + piece.len();
    }
    Some(decoded.map_or(Cow::Borrowed(segment), Cow::Owned))
}

/// What stands before the parameters of a segment, if it has some.
fn name(segment: &str) -> &str {
    let plain = segment.find(';');
    let encoded = segment.find("%3b").into_iter().chain(segment.find("%3B"));
    plain.into_iter().chain(encoded).min().map_or(segment, |end| &segment[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_path_has_one_form_or_none() {
        for (path, normal) in [
            ("/", Some("/")),
            ("*", Some("*")),
            ("/a", Some("/a")),
            ("/a/", Some("/a/")),
            ("/a.b/.c/..d/...", Some("/a.b/.c/..d/...")),
            ("/a%20b;v=1/%c3%a9", Some("/a%20b;v=1/%c3%a9")),
            ("/%C3%a9%2B%25%32", Some("/%C3%a9%2B%252")),
            ("/%61dmin/users", Some("/admin/users")),
            ("/%2561dmin", Some("/%2561dmin")),
            ("/admin%2ejson", Some("/admin.json")),
            ("/x%41%7a%30%2d%5F%7e%20%62", Some("/xAz0-_~%20b")),
            ("/a/..;/b", None),
            ("/a/.;/b", None),
            ("/..;x=1/b", None),
            ("/..;", None),
            ("/%2e%2E;/b", None),
            ("/..%3b/b", None),
            ("/.%3Bx;y/b", None),
            ("/;/b", None),
            ("/a/%3bx/b", None),
            ("/a/;id=1", Some("/a/;id=1")),
            ("/a;v=1/...;/..a;/b", Some("/a;v=1/...;/..a;/b")),
            ("/a/./b", Some("/a/b")),
            ("/a/.", Some("/a/")),
            ("/a/..", Some("/")),
            ("/a/../b", Some("/b")),
            ("/../../b", Some("/b")),
            ("/a/b/../../../c", Some("/c")),
            ("/a/%2e%2E/b", Some("/b")),
            ("/a/.%2e/b", Some("/b")),
            ("//a///b//", Some("/a/b/")),
            ("//", Some("/")),
            ("/a%2fb", None),
            ("/a%2Fb", None),
            ("/a%5cb", None),
            ("/a\\b", None),
            ("/a%00", None),
            ("/a%0d%0ab", None),
            ("/a%7f", None),
            ("/a%", None),
            ("/a%2", None),
            ("/a%zz", None),
            ("/a%+1", None),
            ("", None),
            ("a/b", None),
        ] {
            assert_eq!(normal_path(path).as_deref(), normal, "{path}");
            assert_eq!(is_normal_path(path), normal == Some(path), "{path}");
        }
    }

    fn decoded(segment: &str) -> Vec<u8> {
        let mut bytes = segment.bytes();
        std::iter::from_fn(|| match bytes.next()? {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                u8::try_from(digit()? * 16 + digit()?).ok()
            }
            byte => Some(byte),
        })
        .collect()
    }

    proptest::proptest! {
        #[test]
        fn a_normal_form_is_normal(path in "/([a.;/%2eEfF5cC036bB\\\\]{0,4}/?){0,5}") {
            if let Some(normal) = normal_path(&path) {
                proptest::prop_assert!(is_normal_path(&normal), "{path} -> {normal}");
                // What a server does that decodes, strips parameters and then resolves.
                let bare = normal.split('/').map(|segment| {
                    let text: Vec<u8> = decoded(segment);
                    text.split(|byte| *byte == b';').next().map(<[u8]>::to_vec).unwrap_or_default()
                });
                let dots = |segment: Vec<u8>| segment == b"." || segment == b"..";
                proptest::prop_assert!(!bare.clone().any(dots), "{path} -> {normal}");
                let inner = bare.clone().count().saturating_sub(2);
                proptest::prop_assert!(!bare.skip(1).take(inner).any(|segment| segment.is_empty()), "{path} -> {normal}");
            }
            let plain = normal_path(&path).is_some_and(|normal| normal == path);
            proptest::prop_assert_eq!(is_normal_path(&path), plain);
        }
    }
}
