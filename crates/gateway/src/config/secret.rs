//! What stands elsewhere: secrets, keys and certificates.

use std::fmt;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use http::HeaderValue;
use serde_json::{Value as Json, json};
use toml::de::DeValue;

use super::mistake::Notes;
use super::plain::Map;
use super::read::{At, Node, Reader, Value};

/// A secret, from the environment or a file, or as it stands. It is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret {
    source: Source,
    value: String,
}

/// Values of headers by name. They may be secrets, so those of which the name says so are not shown.
#[derive(Clone, Debug, PartialEq)]
pub struct HeaderValues(Map<Secret>);

/// The contents of a file, or of a variable of the environment.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Blob {
    source: Source,
    bytes: Vec<u8>,
}

/// A path; a relative one starts at the folder of the file that names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place(PathBuf);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Source {
    #[default]
    Literal,
    Environment(String),
    File(PathBuf),
}

// === impl Reader ===

impl Reader<'_> {
    /// `{ env = "NAME" }` or `{ file = "path" }`.
    fn elsewhere(&mut self, node: &Node<'_>) -> Option<(Source, Vec<u8>)> {
        let table = node.get_ref().as_table()?;
        self.keys(table, &["env", "file"]);
        match (table.get("env"), table.get("file")) {
            (Some(name), None) => {
                let text = self.text(name, "the name of a variable of the environment")?;
                let Some(value) = (self.environment)(text) else {
                    let help = format!("export {text}=… before the start");
                    self.notes.push(&name.span(), format!("{text} is not set in the environment"), help);
                    return None;
                };
                Some((Source::Environment(text.to_owned()), value.into_bytes()))
            }
            (None, Some(path)) => {
                let text = self.text(path, "a path")?;
                self.file(path, text)
            }
            _ => {
                self.notes.push(
                    &node.span(),
                    "not clear where to read it",
                    "say one of env = \"NAME\" and file = \"path\"",
                );
                None
            }
        }
    }

    fn file(&mut self, node: &Node<'_>, path: &str) -> Option<(Source, Vec<u8>)> {
        const LARGEST: u64 = 16 << 20;
        if path.contains(['\n', '\r']) || path.contains("-----BEGIN") {
            let help = "put the text into a file, or into a variable: { env = \"NAME\" }";
            self.notes.push(&node.span(), "this is no path, but what should be in a file", help);
            return None;
        }
        let path = self.folder.join(path);
        let why = match super::read_at_most(&path, LARGEST) {
            Ok(Some(bytes)) => return Some((Source::File(path), bytes)),
            Ok(None) => String::from("it is larger than 16 MiB"),
            Err(error) => error.to_string(),
        };
        let help = "the path is relative to the file's own folder, and must be readable for this user";
        self.notes.push(&node.span(), format!("cannot read {}: {why}", path.display()), help);
        None
    }
}

// === impl Secret ===

impl Secret {
    /// The secret itself.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.value
    }

    fn literal(text: &str) -> Self {
        Self { source: Source::Literal, value: text.to_owned() }
    }

    /// Whether it stands in the file itself.
    #[must_use]
    pub fn is_literal(&self) -> bool {
        self.source == Source::Literal
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Secret").field(&self.source).finish()
    }
}

impl Value for Secret {
    fn read(node: &Node<'_>, reader: &mut Reader<'_>) -> Option<Self> {
        if let Some(text) = node.get_ref().as_str() {
            if text.is_empty() {
                reader.notes.push(&node.span(), "it is empty", "say what it is, or remove it");
                return None;
            }
            return Some(Self::literal(text));
        }
        if !node.get_ref().is_table() {
            // Without what stands there: it may be one all the same.
            let what = format!("a {} is not a secret", node.get_ref().type_str());
            reader.notes.push(&node.span(), what, "{ env = \"NAME\" }, { file = \"path\" }, or text in quotes");
            return None;
        }
        let (source, bytes) = reader.elsewhere(node)?;
        let text = String::from_utf8(bytes).ok().map(|text| text.trim_end_matches(['\r', '\n']).to_owned());
        let Some(value) = text.filter(|text| !text.is_empty()) else {
            reader.notes.push(&node.span(), "the secret is empty or not text", "put it there in UTF-8");
            return None;
        };
        Some(Self { source, value })
    }

    fn schema() -> Json {
        json!({ "anyOf": [elsewhere_schema(), { "type": "string" }] })
    }

    fn show(&self) -> Json {
        self.source.show()
    }

    fn files(&self) -> Vec<PathBuf> {
        self.source.file().map(Path::to_owned).into_iter().collect()
    }
}

// === impl HeaderValues ===

impl HeaderValues {
    /// The value of a header; `None` if it cannot stand in one.
    pub(crate) fn value(name: &str, secret: &Secret) -> Option<HeaderValue> {
        let mut value = HeaderValue::from_str(secret.reveal()).ok()?;
        value.set_sensitive(is_telling(name) || !secret.is_literal());
        Some(value)
    }
}

impl Deref for HeaderValues {
    type Target = Map<Secret>;

    fn deref(&self) -> &Map<Secret> {
        &self.0
    }
}

/// Whether what a header or parameter of this name holds is likely a secret.
pub(super) fn is_telling(name: &str) -> bool {
    const WORDS: [&str; 11] =
        ["auth", "cookie", "credential", "jwt", "key", "password", "secret", "session", "signature", "token", "verify"];
    let name = name.to_ascii_lowercase();
    WORDS.iter().any(|word| name.contains(word))
}

impl Value for HeaderValues {
    fn read(node: &Node<'_>, reader: &mut Reader<'_>) -> Option<Self> {
        let table = reader.table(node)?;
        let read: Vec<_> = table
            .iter()
            .map(|(key, node)| {
                let value = match node.get_ref().as_str() {
                    // Here nothing is something.
                    Some(text) => Some(Secret::literal(text)),
                    None => Secret::read(node, reader),
                };
                value.map(|value| (key.get_ref().to_string(), value))
            })
            .collect();
        read.into_iter().collect::<Option<_>>().map(Self)
    }

    fn absent() -> Option<Self> {
        Map::absent().map(Self)
    }

    fn schema() -> Json {
        Map::<Secret>::schema()
    }

    fn show(&self) -> Json {
        let show = |(name, value): (&String, &Secret)| {
            let is_plain = value.is_literal() && !is_telling(name);
            (name.clone(), if is_plain { json!(value.reveal()) } else { value.show() })
        };
        Json::Object(self.0.iter().map(show).collect())
    }

    fn files(&self) -> Vec<PathBuf> {
        self.0.files()
    }
}

fn elsewhere_schema() -> Json {
    let one = |key: &str| {
        json!({
            "type": "object", "properties": { key: { "type": "string" } },
            "required": [key], "additionalProperties": false,
        })
    };
    json!({ "anyOf": [one("env"), one("file")] })
}

impl Source {
    fn file(&self) -> Option<&Path> {
        match self {
            Self::File(path) => Some(path),
            Self::Environment(_) | Self::Literal => None,
        }
    }

    fn show(&self) -> Json {
        match self {
            Self::Literal => json!("***"),
            Self::Environment(name) => json!({ "env": name }),
            Self::File(path) => json!({ "file": path.display().to_string() }),
        }
    }
}

// === impl Blob ===

impl Blob {
    /// What is in it.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The file it was read from.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.source.file()
    }
}

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Blob").field(&self.source).finish()
    }
}

impl Value for Blob {
    fn read(node: &Node<'_>, reader: &mut Reader<'_>) -> Option<Self> {
        let (source, bytes) = match node.get_ref() {
            DeValue::String(path) => reader.file(node, path)?,
            DeValue::Table(_) => reader.elsewhere(node)?,
            _ => {
                reader.wrong(node, "a path, { file = \"path\" } or { env = \"NAME\" }");
                return None;
            }
        };
        Some(Self { source, bytes })
    }

    fn schema() -> Json {
        json!({ "anyOf": [{ "type": "string" }, elsewhere_schema()] })
    }

    fn show(&self) -> Json {
        self.source.show()
    }

    fn files(&self) -> Vec<PathBuf> {
        self.source.file().map(Path::to_owned).into_iter().collect()
    }
}

// === impl Place ===

impl Place {
    /// The path itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Value for Place {
    fn read(node: &Node<'_>, reader: &mut Reader<'_>) -> Option<Self> {
        let path = reader.parsed(node, "a path", |text| Some(text.to_owned()).filter(|text| !text.is_empty()))?;
        Some(Self(reader.folder.join(path)))
    }

    fn schema() -> Json {
        json!({ "type": "string" })
    }

    fn show(&self) -> Json {
        json!(self.0.display().to_string())
    }
}

/// Notes what is no PEM with a section of this name; whether it is one.
pub(super) fn pem(blob: &At<Blob>, what: &str, notes: &mut Notes<'_>) -> bool {
    let text = String::from_utf8_lossy(blob.bytes());
    if !text.lines().any(|line| line.starts_with("-----BEGIN ") && line.trim_end().ends_with(&format!("{what}-----"))) {
        notes.push(
            &blob.span,
            format!("there is no {what} in it"),
            format!("it must hold PEM: -----BEGIN {what}-----"),
        );
        return false;
    }
    true
}
