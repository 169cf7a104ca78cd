//! What the text of a pattern says of the paths it takes.

use std::cmp::Reverse;

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
