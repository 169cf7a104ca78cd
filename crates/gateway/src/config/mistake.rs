//! What is wrong with a file, where, and what would be right.

use std::fmt;
use std::ops::Range;

/// One thing that is wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Mistake {
    /// The line it is on, counted from 1.
    pub line: usize,
    /// The character in the line, counted from 1.
    pub column: usize,
    /// What is wrong.
    pub what: String,
    /// What would be right.
    pub help: String,
}

/// Everything that is wrong with a configuration, in the order of the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mistakes {
    file: String,
    list: Vec<Mistake>,
    /// There are further ones.
    more: bool,
}

/// So many mistakes are listed.
const MOST: usize = 100;

/// Collects mistakes by where they are in the text.
#[derive(Debug)]
pub(crate) struct Notes<'a> {
    text: &'a str,
    list: Vec<(usize, String, String)>,
}

// === impl Notes ===

impl<'a> Notes<'a> {
    pub(crate) fn new(text: &'a str) -> Self {
        Self { text, list: Vec::new() }
    }

    pub(crate) fn push(&mut self, span: &Range<usize>, what: impl Into<String>, help: impl Into<String>) {
        if self.list.len() <= MOST {
            self.list.push((span.start, what.into(), help.into()));
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Whether there are more than anybody reads at a time: what takes long need not be looked for.
    pub(crate) fn are_many(&self) -> bool {
        self.list.len() > MOST
    }

    pub(crate) fn finish(mut self, file: &str) -> Mistakes {
        self.list.sort_by_key(|(at, ..)| *at);
        self.list.dedup();
        let more = self.are_many();
        let list = self.list.into_iter().take(MOST).map(|(at, what, help)| {
            let (line, column) = position(self.text, at);
            Mistake { line, column, what, help }
        });
        Mistakes { file: file.to_owned(), list: list.collect(), more }
    }
}

/// Line and column of a byte, both counted from 1; the column in characters.
fn position(text: &str, at: usize) -> (usize, usize) {
    let before = &text.as_bytes()[..at.min(text.len())];
    let line = before.iter().filter(|&&byte| byte == b'\n').count() + 1;
    let start = before.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
    (line, String::from_utf8_lossy(&before[start..]).chars().count() + 1)
}

// === impl Mistakes ===

impl Mistakes {
    /// A single mistake about the file as a whole.
    pub(crate) fn whole(file: &str, what: impl Into<String>, help: impl Into<String>) -> Self {
        let mistake = Mistake { line: 1, column: 1, what: what.into(), help: help.into() };
        Self { file: file.to_owned(), list: vec![mistake], more: false }
    }

    /// Where they are, without what stands there: the first few lines.
    pub(crate) fn places(&self) -> String {
        const FEW: usize = 8;
        let lines = self.list.iter().take(FEW).map(|mistake| format!("{}:{}", mistake.line, mistake.column));
        let more = if self.list.len() > FEW { ", …" } else { "" };
        format!("{}: wrong at {}{more}", self.file, lines.collect::<Vec<_>>().join(", "))
    }

    /// The mistakes, first to last; a hundred at most.
    #[must_use]
    pub fn list(&self) -> &[Mistake] {
        &self.list
    }
}

/// One line each: `file:line:column: what; help`. And whether there are more.
impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Mistake { line, column, what, help }) in self.list.iter().enumerate() {
            let end = if index == 0 { "" } else { "\n" };
            write!(f, "{end}{}:{line}:{column}: {what}", self.file)?;
            if !help.is_empty() {
                write!(f, "; {help}")?;
            }
        }
        if self.more {
            write!(f, "\n{}: and more", self.file)?;
        }
        Ok(())
    }
}

impl std::error::Error for Mistakes {}

/// The known word that was likely meant: at most a third of it wrong.
pub(crate) fn suggest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_ascii_lowercase().replace('-', "_");
    known
        .into_iter()
        .map(|have| (distance(&word, &have.to_ascii_lowercase().replace('-', "_")), have))
        .filter(|&(distance, have)| distance <= 1.max(word.chars().count().min(have.chars().count()) / 3))
        .min()
        .map(|(_, have)| have)
}

/// "did you mean …" where there is something alike, else what there is.
pub(crate) fn help<'a>(word: &str, known: impl IntoIterator<Item = &'a str> + Clone) -> String {
    if let Some(likely) = suggest(word, known.clone()) {
        return format!("did you mean {likely:?}?");
    }
    let mut known: Vec<&str> = known.into_iter().collect();
    known.sort_unstable();
    let more = if known.len() > 24 { ", …" } else { "" };
    known.truncate(24);
    if known.is_empty() { String::from("there is none") } else { format!("known: {}{more}", known.join(", ")) }
}

/// How many characters must be inserted, removed, replaced or swapped with their neighbour.
fn distance(a: &str, b: &str) -> usize {
    // What is that long is no word of ours.
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().take(64).collect(), b.chars().take(64).collect());
    let mut rows = vec![(0..=b.len()).collect::<Vec<_>>()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replace = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replace.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_nearly_right_is_suggested_and_nothing_else() {
        let known = ["timeout", "retry", "balance"];
        for (word, expected) in [
            ("timout", Some("timeout")),
            ("timeuot", Some("timeout")),
            ("Retry", Some("retry")),
            ("ballance", Some("balance")),
            ("tls", None),
            ("", None),
        ] {
            assert_eq!(suggest(word, known), expected, "{word}");
        }
    }

    #[test]
    fn of_many_mistakes_the_first_are_listed() {
        let mut notes = Notes::new("x\n");
        (0..50_000).for_each(|number| notes.push(&(0..1), number.to_string(), ""));
        let mistakes = notes.finish("f");
        assert_eq!(mistakes.list().len(), MOST);
        assert!(mistakes.to_string().ends_with("\nf: and more"));
    }

    #[test]
    fn columns_are_counted_in_characters() {
        let text = "a\nüx = 1\n";
        assert_eq!(position(text, text.find('x').unwrap()), (2, 2));
        assert_eq!(position(text, 999), (3, 1));
    }
}
