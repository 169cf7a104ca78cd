//! One spelling for each path, so that who matches it and who serves it read the same.

use std::borrow::Cow;

/// Whether a path is in normal form: it begins with `/` and has no dot segments, plain or percent-encoded, no empty
/// segments but a last one, no backslash, no encoded slash, backslash, NUL or other control character, and nothing that
/// looks percent-encoded and is not. `*` is in normal form. The query is no part of the path.
///
/// ```
/// use portcullis_core::is_normal_path;
///
/// assert!(is_normal_path("/orders/7/"));
/// for path in ["/a/../b", "/a/%2e%2E/b", "//a", "/a%2fb", "/a%5cb", "/a%00", "/a%zz", "a"] {
///     assert!(!is_normal_path(path), "{path}");
/// }
/// ```
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
            b'/' | b'.' => !after_slash,
            _ => true,
        };
        after_slash = byte == b'/';
        fine
    });
    plain || normal_path(path).is_some_and(|normal| normal == path)
}

/// The normal form of a path: dot segments resolved and empty segments dropped. `None` if it has none, because it says
/// something that different readers read differently: an encoded slash, backslash or control character, a plain
/// backslash, or a broken percent-encoding. What is percent-encoded otherwise stays as it is.
#[must_use]
pub fn normal_path(path: &str) -> Option<Cow<'_, str>> {
    if path == "*" {
        return Some(Cow::Borrowed(path));
    }
    let rest = path.strip_prefix('/')?;
    let mut segments: Vec<&str> = Vec::new();
    let mut changed = false;
    // Whether a slash is due at the end.
    let mut open = true;
    let mut parts = rest.split('/').peekable();
    while let Some(segment) = parts.next() {
        let last = parts.peek().is_none();
        match dots(segment)? {
            _ if segment.is_empty() => {
                changed |= !last;
                open = true;
            }
            1 => {
                changed = true;
                open = true;
            }
            2 => {
                changed = true;
                open = true;
                segments.pop();
            }
            _ => {
                open = false;
                segments.push(segment);
            }
        }
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

/// How many dots the segment consists of, if of nothing else; zero for any other. `None` for what has no normal form.
fn dots(segment: &str) -> Option<usize> {
    let bytes = segment.as_bytes();
    let (mut at, mut dots, mut only_dots) = (0, 0, true);
    while at < bytes.len() {
        let byte = match bytes[at] {
            b'\\' => return None,
            b'%' => {
                let hex = |at: usize| char::from(*bytes.get(at)?).to_digit(16);
                let code = hex(at + 1)? * 16 + hex(at + 2)?;
                at += 2;
                match code {
                    0x2f | 0x5c | 0..=0x1f | 0x7f => return None,
                    0x2e => b'.',
                    _ => b'x',
                }
            }
            byte => byte,
        };
        only_dots &= byte == b'.';
        dots += 1;
        at += 1;
    }
    Some(if only_dots { dots } else { 0 })
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

    proptest::proptest! {
        #[test]
        fn a_normal_form_is_normal(path in "/([a./%2eEfF5cC0\\\\]{0,4}/?){0,5}") {
            if let Some(normal) = normal_path(&path) {
                proptest::prop_assert!(is_normal_path(&normal), "{path} -> {normal}");
            }
            let plain = normal_path(&path).is_some_and(|normal| normal == path);
            proptest::prop_assert_eq!(is_normal_path(&path), plain);
        }
    }
}
