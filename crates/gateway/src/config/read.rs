//! From a document to typed sections, noting every mistake on the way.

use std::fmt;
use std::ops::{Deref, Range};
use std::path::PathBuf;

use serde_json::Value as Json;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::mistake::{self, Notes};

/// Reads what files say, and where the secrets they name are found.
pub(crate) struct Reader<'a> {
    pub(crate) notes: Notes<'a>,
    /// The folder that relative paths start from.
    pub(crate) folder: PathBuf,
    pub(crate) environment: &'a dyn Fn(&str) -> Option<String>,
}

pub(crate) type Node<'a> = Spanned<DeValue<'a>>;

/// Something a file can say.
pub(crate) trait Value: Sized {
    /// What the file says at `node`; `None` when that is wrong, and noted.
    fn read(node: &Node<'_>, reader: &mut Reader<'_>) -> Option<Self>;

    /// What it is when the file says nothing; `None` when it must say something.
    fn absent() -> Option<Self> {
        None
    }

    /// What it may look like, as a JSON schema.
    fn schema() -> Json;

    /// What it is, with secrets masked.
    fn show(&self) -> Json;

    /// The files it was read from.
    fn files(&self) -> Vec<PathBuf> {
        Vec::new()
    }
}

/// A value, and where in the file it stands. Two are equal wherever they stand.
#[derive(Clone)]
pub struct At<T> {
    value: T,
    pub(crate) span: Range<usize>,
}

/// Keys of tables that hold secrets, or say where they are.
const SECRET: [&str; 4] = ["env", "key", "password", "secret"];

// === impl Reader ===

impl Reader<'_> {
    pub(crate) fn wrong(&mut self, node: &Node<'_>, wanted: &str) {
        let what = match node.get_ref() {
            DeValue::String(text) => format!("{text:?} is not {wanted}"),
            DeValue::Integer(number) => format!("{} is not {wanted}", number.as_str()),
            other => format!("a {} is not {wanted}", other.type_str()),
        };
        self.notes.push(&node.span(), what, "");
    }

    pub(crate) fn table<'n, 'd>(&mut self, node: &'n Node<'d>) -> Option<&'n DeTable<'d>> {
        let table = node.get_ref().as_table();
        if table.is_none() {
            // Without what stands there: it may be a secret that belongs into the table.
            self.notes.push(&node.span(), format!("a {} is not a table", node.get_ref().type_str()), "");
        }
        table
    }

    pub(crate) fn keys(&mut self, table: &DeTable<'_>, known: &'static [&'static str]) {
        for key in table.keys() {
            if self.notes.are_many() {
                return;
            }
            if !known.contains(&key.get_ref().as_ref()) {
                let name: &str = key.get_ref();
                let is_at_the_top = super::Config::KEYS.contains(&name);
                let is_nearly_known = mistake::suggest(name, known.iter().copied()).is_some();
                let help = if is_at_the_top && !is_nearly_known {
                    format!("it stands at the top: as [{name}] or before the first table")
                } else {
                    mistake::help(name, known.iter().copied())
                };
                // Where a secret belongs, what is unknown may be one.
                let is_shown = is_at_the_top || is_nearly_known || !known.iter().any(|known| SECRET.contains(known));
                let name = if is_shown { format!(" {name:?}") } else { String::new() };
                self.notes.push(&key.span(), format!("unknown key{name}"), help);
            }
        }
    }

    pub(crate) fn missing(&mut self, node: &Node<'_>, key: &str, schema: &Json) {
        let kind = schema["type"].as_str().or_else(|| schema["anyOf"][0]["type"].as_str()).unwrap_or("value");
        let help = schema["examples"][0]
            .as_str()
            .map_or_else(|| format!("add {key} = <{kind}>"), |example| format!("such as {key} = {example:?}"));
        self.notes.push(&node.span(), format!("{key:?} is missing here"), help);
    }

    pub(super) fn text<'n>(&mut self, node: &'n Node<'_>, wanted: &str) -> Option<&'n str> {
        let text = node.get_ref().as_str();
        if text.is_none() {
            self.wrong(node, wanted);
        }
        text
    }

    /// Text that `parse` understands.
    pub(crate) fn parsed<T>(
        &mut self,
        node: &Node<'_>,
        wanted: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        let parsed = node.get_ref().as_str().and_then(parse);
        if parsed.is_none() {
            self.wrong(node, wanted);
        }
        parsed
    }

    pub(super) fn integer(&mut self, node: &Node<'_>, least: u64, most: u64) -> Option<u64> {
        let number = match node.get_ref() {
            DeValue::Integer(number) => u64::from_str_radix(number.as_str(), number.radix()).ok(),
            _ => None,
        };
        let number = number.filter(|number| (least..=most).contains(number));
        if number.is_none() {
            self.wrong(node, &format!("a whole number from {least} to {most}"));
        }
        number
    }
}

// === impl At ===

impl<T> At<T> {
    pub(crate) fn new(value: T, span: Range<usize>) -> Self {
        Self { value, span }
    }

    /// A value that stands nowhere.
    pub(crate) fn of(value: T) -> Self {
        Self::new(value, 0..0)
    }

    /// The value alone.
    pub fn into_inner(self) -> T {
        self.value
    }
}

impl<T> Deref for At<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T: PartialEq> PartialEq for At<T> {
    fn eq(&self, other: &Self) -> bool {
        self.value == other.value
    }
}

impl<T: fmt::Debug> fmt::Debug for At<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.value.fmt(f)
    }
}

impl<T: Value> Value for At<T> {
    fn read(node: &Node<'_>, reader: &mut Reader<'_>) -> Option<Self> {
        Some(Self { value: T::read(node, reader)?, span: node.span() })
    }

    fn absent() -> Option<Self> {
        Some(Self { value: T::absent()?, span: 0..0 })
    }

    fn schema() -> Json {
        T::schema()
    }

    fn show(&self) -> Json {
        self.value.show()
    }

    fn files(&self) -> Vec<PathBuf> {
        self.value.files()
    }
}
