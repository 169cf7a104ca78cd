//! From a file to what it means, or to everything that is wrong with it.

mod auth;
mod balance;
mod breaker;
mod by;
mod limit;
mod listener;
mod mistake;
mod model;
mod operate;
mod plain;
mod provider;
mod read;
mod registry;
mod route;
mod secret;
mod section;
mod service;

use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};
use toml::de::DeTable;

pub use self::auth::*;
pub use self::balance::*;
pub use self::breaker::*;
pub use self::by::*;
pub use self::limit::*;
pub use self::listener::*;
use self::mistake::Notes;
pub use self::mistake::{Mistake, Mistakes};
pub use self::model::*;
pub use self::operate::*;
pub(crate) use self::plain::parse_duration;
pub use self::plain::{Bytes, Map, Patience, Rate, Sample, Share};
pub use self::provider::*;
pub use self::read::At;
use self::read::{Reader, Value};
pub use self::registry::*;
pub use self::route::*;
pub use self::secret::{Blob, HeaderValues, Place, Secret};
pub use self::service::*;

/// The largest file that is read.
pub const MAX_FILE: u64 = 4 << 20;

/// What a file holds, unless that is more; also of files that do not say how long they are, or have no end.
pub(crate) fn read_at_most(path: &Path, most: u64) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(most + 1).read_to_end(&mut bytes)?;
    Ok(u64::try_from(bytes.len()).is_ok_and(|len| len <= most).then_some(bytes))
}

impl Config {
    /// Reads a file, and the secrets and certificates it names.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with it.
    pub fn load(path: &Path) -> Result<Self, Mistakes> {
        let name = path.display().to_string();
        let unreadable = |why: String| Mistakes::whole(&name, format!("cannot read it: {why}"), "name a readable file");
        let text = read_at_most(path, MAX_FILE).map_err(|error| unreadable(error.to_string()))?;
        let Some(text) = text else {
            return Err(Mistakes::whole(&name, "so many bytes are too many", "at most 4 MiB are read"));
        };
        let text = String::from_utf8(text).map_err(|_| unreadable(String::from("it is not UTF-8")))?;
        let folder = path.parent().unwrap_or(Path::new(""));
        Self::parse(&name, &text, folder, &|variable| std::env::var(variable).ok())
    }

    /// Reads the text of a file called `name` that lies in `folder`; `environment` knows the variables it may name.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with it.
    pub fn parse(
        name: &str,
        text: &str,
        folder: &Path,
        environment: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, Mistakes> {
        let (document, errors) = DeTable::parse_recoverable(text);
        let mut notes = Notes::new(text);
        for error in &errors {
            notes.push(&error.span().unwrap_or_default(), format!("not TOML: {}", error.message()), "");
        }
        if !errors.is_empty() {
            // What was recovered has holes; what it seems to say would be noise.
            return Err(notes.finish(name));
        }
        if document.get_ref().is_empty() {
            let help = "begin with [services.<name>] and [[routes]]; `portcullis run --help` shows a small one";
            return Err(Mistakes::whole(name, "the file is empty", help));
        }
        let node = toml::Spanned::new(document.span(), toml::de::DeValue::Table(document.into_inner()));
        let mut reader = Reader { notes, folder: folder.to_owned(), environment };
        let config = Self::read(&node, &mut reader);
        if let Some(config) = &config {
            config.check(&mut reader.notes);
        }
        match config {
            Some(config) if reader.notes.is_empty() => Ok(config),
            _ => Err(reader.notes.finish(name)),
        }
    }

    /// What a file may say, as a JSON schema.
    #[must_use]
    pub fn json_schema() -> Json {
        let mut schema = Self::schema();
        schema["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
        schema["title"] = json!("Portcullis gateway");
        schema
    }

    /// The files it names that were read with it: secrets, keys and certificates.
    #[must_use]
    pub fn files(&self) -> Vec<PathBuf> {
        Value::files(self)
    }

    /// What the file means, defaults included, with secrets masked.
    #[must_use]
    pub fn masked(&self) -> Json {
        self.show()
    }
}
