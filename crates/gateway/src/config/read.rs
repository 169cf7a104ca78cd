//! From a document to typed sections, noting every mistake on the way.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fmt, fs};

use http::{HeaderName, HeaderValue, Method, StatusCode};
use portcullis_core::Address;
use serde_json::{Value as Json, json};
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
}

/// A value, and where in the file it stands. Two are equal wherever they stand.
#[derive(Clone)]
pub struct At<T> {
    value: T,
    pub(crate) span: Range<usize>,
}

/// A secret, from the environment or a file, or as it stands. It is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret {
    source: Source,
    value: String,
}

/// The contents of a file, or of a variable of the environment.
#[derive(Clone, PartialEq, Eq)]
pub struct Blob {
    source: Source,
    bytes: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    Literal,
    Environment(String),
    File(PathBuf),
}

/// A number of bytes, such as `4096` or `"64KiB"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

/// So many in a period, such as `"100/s"`, `"20/m"` or `"5/10s"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// How many.
    pub count: u32,
    /// In what time.
    pub period: Duration,
}

/// A part of a whole: more than 0, at most 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share(pub f64);

/// Entries by name.
pub type Map<T> = BTreeMap<String, T>;

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
            self.wrong(node, "a table");
        }
        table
    }

    pub(crate) fn keys(&mut self, table: &DeTable<'_>, known: &'static [&'static str]) {
        for key in table.keys() {
            if !known.contains(&key.get_ref().as_ref()) {
                let help = mistake::help(key.get_ref(), known.iter().copied());
                self.notes.push(&key.span(), format!("unknown key {:?}", key.get_ref()), help);
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

    fn text<'n>(&mut self, node: &'n Node<'_>, wanted: &str) -> Option<&'n str> {
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

    fn integer(&mut self, node: &Node<'_>, least: u64, most: u64) -> Option<u64> {
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
        let path = self.folder.join(path);
        let read = fs::metadata(&path).and_then(|about| {
            if about.len() > LARGEST {
                return Err(std::io::Error::other("larger than 16 MiB"));
            }
            fs::read(&path)
        });
        match read {
            Ok(bytes) => Some((Source::File(path), bytes)),
            Err(error) => {
                let help = "the path is relative to the file's own folder, and must be readable for this user";
                self.notes.push(&node.span(), format!("cannot read {}: {error}", path.display()), help);
                None
            }
        }
    }
}

// === impl At ===

impl<T> At<T> {
    pub(crate) fn new(value: T, span: Range<usize>) -> Self {
        Self { value, span }
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
}

// === impl Secret ===

impl Secret {
    /// The secret itself.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.value
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
            return Some(Self { source: Source::Literal, value: text.to_owned() });
        }
        if !node.get_ref().is_table() {
            reader.wrong(node, "a secret: { env = \"NAME\" }, { file = \"path\" }, or text");
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
        match &self.source {
            Source::File(path) => Some(path),
            Source::Environment(_) | Source::Literal => None,
        }
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
}

// === impl of plain values ===

impl<T: Value> Value for Option<T> {
    fn read(node: &Node<'_>, reader: &mut Reader<'_>) -> Option<Self> {
        T::read(node, reader).map(Some)
    }

    fn absent() -> Option<Self> {
        Some(None)
    }

    fn schema() -> Json {
        T::schema()
    }

    fn show(&self) -> Json {
        self.as_ref().map_or(Json::Null, Value::show)
    }
}

impl<T: Value> Value for Vec<T> {
    /// One value alone is a list of one.
    fn read(node: &Node<'_>, reader: &mut Reader<'_>) -> Option<Self> {
        let Some(array) = node.get_ref().as_array() else { return T::read(node, reader).map(|one| vec![one]) };
        // Every element is looked at, also after a wrong one.
        let read: Vec<Option<T>> = array.iter().map(|element| T::read(element, reader)).collect();
        read.into_iter().collect()
    }

    fn absent() -> Option<Self> {
        Some(Self::new())
    }

    fn schema() -> Json {
        let one = T::schema();
        json!({ "anyOf": [{ "type": "array", "items": one.clone() }, one] })
    }

    fn show(&self) -> Json {
        self.iter().map(Value::show).collect()
    }
}

impl<T: Value> Value for Map<T> {
    fn read(node: &Node<'_>, reader: &mut Reader<'_>) -> Option<Self> {
        let table = reader.table(node)?;
        let mut read = Vec::new();
        for (key, value) in table.iter() {
            read.push(T::read(value, reader).map(|value| (key.get_ref().to_string(), value)));
        }
        read.into_iter().collect()
    }

    fn absent() -> Option<Self> {
        Some(Self::new())
    }

    fn schema() -> Json {
        json!({ "type": "object", "additionalProperties": T::schema() })
    }

    fn show(&self) -> Json {
        Json::Object(self.iter().map(|(key, value)| (key.clone(), value.show())).collect())
    }
}

impl Value for bool {
    fn read(node: &Node<'_>, reader: &mut Reader<'_>) -> Option<Self> {
        let value = node.get_ref().as_bool();
        if value.is_none() {
            reader.wrong(node, "true or false");
        }
        value
    }

    fn schema() -> Json {
        json!({ "type": "boolean" })
    }

    fn show(&self) -> Json {
        json!(self)
    }
}

macro_rules! integers {
    ($($type:ty),*) => {$(
        impl Value for $type {
            fn read(node: &Node<'_>, reader: &mut Reader<'_>) -> Option<Self> {
                let most = u64::try_from(Self::MAX).unwrap_or(u64::MAX).min(i64::MAX as u64);
                Self::try_from(reader.integer(node, 0, most)?).ok()
            }

            fn schema() -> Json {
                json!({ "type": "integer", "minimum": 0 })
            }

            fn show(&self) -> Json {
                json!(self)
            }
        }
    )*};
}

integers!(u8, u16, u32, u64, usize);

macro_rules! positives {
    ($($type:ty = $plain:ty),*) => {$(
        impl Value for $type {
            fn read(node: &Node<'_>, reader: &mut Reader<'_>) -> Option<Self> {
                let most = u64::try_from(<$plain>::MAX).unwrap_or(u64::MAX).min(i64::MAX as u64);
                Self::new(<$plain>::try_from(reader.integer(node, 1, most)?).ok()?)
            }

            fn schema() -> Json {
                json!({ "type": "integer", "minimum": 1 })
            }

            fn show(&self) -> Json {
                json!(self.get())
            }
        }
    )*};
}

positives!(std::num::NonZeroU16 = u16, std::num::NonZeroU32 = u32, std::num::NonZeroUsize = usize);

/// Text that some parser understands.
macro_rules! texts {
    ($($type:ty, $wanted:literal, $example:literal, $parse:expr, $show:expr;)*) => {$(
        impl Value for $type {
            fn read(node: &Node<'_>, reader: &mut Reader<'_>) -> Option<Self> {
                reader.parsed(node, concat!($wanted, ", such as \"", $example, "\""), $parse)
            }

            fn schema() -> Json {
                json!({ "type": "string", "examples": [$example] })
            }

            fn show(&self) -> Json {
                let show: fn(&Self) -> String = $show;
                json!(show(self))
            }
        }
    )*};
}

texts! {
    String, "text", "…", |text| Some(text.to_owned()), Clone::clone;
    SocketAddr, "an address with a port", "0.0.0.0:8080", |text| text.parse().ok(), ToString::to_string;
    Address, "an address with a port", "10.0.0.1:8080", |text| text.parse().ok(), ToString::to_string;
    Duration, "a time", "250ms", parse_duration, |time| show_duration(*time);
    Rate, "a rate", "100/s", parse_rate, |rate| show_rate(*rate);
    Method, "a method", "GET", parse_method, ToString::to_string;
    HeaderName, "the name of a header", "x-tenant", |text| text.parse().ok(), ToString::to_string;
    HeaderValue, "the value of a header", "yes", |text| text.parse().ok(), |value| String::from_utf8_lossy(value.as_bytes()).into_owned();
}

impl Value for StatusCode {
    fn read(node: &Node<'_>, reader: &mut Reader<'_>) -> Option<Self> {
        Self::from_u16(u16::try_from(reader.integer(node, 200, 599)?).ok()?).ok()
    }

    fn schema() -> Json {
        json!({ "type": "integer", "minimum": 200, "maximum": 599 })
    }

    fn show(&self) -> Json {
        json!(self.as_u16())
    }
}

impl Value for Bytes {
    fn read(node: &Node<'_>, reader: &mut Reader<'_>) -> Option<Self> {
        if node.get_ref().is_integer() {
            return reader.integer(node, 0, i64::MAX as u64).map(Self);
        }
        reader.parsed(node, "a number of bytes, such as 4096 or \"64KiB\"", parse_bytes).map(Self)
    }

    fn schema() -> Json {
        json!({ "anyOf": [{ "type": "integer", "minimum": 0 }, { "type": "string", "examples": ["64KiB"] }] })
    }

    fn show(&self) -> Json {
        json!(self.0)
    }
}

impl Value for Share {
    fn read(node: &Node<'_>, reader: &mut Reader<'_>) -> Option<Self> {
        let number = match node.get_ref() {
            DeValue::Float(number) => number.as_str().parse().ok(),
            DeValue::Integer(number) => number.as_str().parse().ok(),
            _ => None,
        };
        let share = number.filter(|&share: &f64| share > 0.0 && share <= 1.0);
        if share.is_none() {
            reader.wrong(node, "a share of more than 0 and at most 1, such as 0.5");
        }
        share.map(Self)
    }

    fn schema() -> Json {
        json!({ "type": "number", "exclusiveMinimum": 0, "maximum": 1 })
    }

    fn show(&self) -> Json {
        json!(self.0)
    }
}

// === text ===

/// The longest time a file may name; more overflows timers somewhere.
const LONGEST: Duration = Duration::from_secs(366 * 86_400);

fn parse_duration(text: &str) -> Option<Duration> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..end].parse().ok()?;
    let unit = match text[end..].trim_start() {
        "us" | "µs" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "d" => 86_400.0,
        _ => return None,
    };
    Duration::try_from_secs_f64(number * unit).ok().filter(|time| *time <= LONGEST)
}

pub(crate) fn show_duration(time: Duration) -> String {
    let micros = time.as_micros();
    for (unit, name) in [(3_600_000_000, "h"), (60_000_000, "m"), (1_000_000, "s"), (1000, "ms")] {
        if micros >= unit && micros.is_multiple_of(unit) {
            return format!("{}{name}", micros / unit);
        }
    }
    if micros == 0 { String::from("0s") } else { format!("{micros}us") }
}

fn parse_rate(text: &str) -> Option<Rate> {
    let (count, period) = text.split_once('/')?;
    let count = count.trim().parse().ok().filter(|&count: &u32| count > 0)?;
    let period = period.trim();
    let period = if period.starts_with(|c: char| c.is_ascii_digit()) {
        parse_duration(period)
    } else {
        parse_duration(&format!("1{period}"))
    };
    Some(Rate { count, period: period.filter(|period| !period.is_zero())? })
}

fn show_rate(Rate { count, period }: Rate) -> String {
    let period = show_duration(period);
    let unit = period.strip_prefix('1').filter(|unit| !unit.starts_with(|c: char| c.is_ascii_digit()));
    format!("{count}/{}", unit.unwrap_or(&period))
}

fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..end].parse().ok()?;
    let unit = match text[end..].trim_start() {
        "" | "B" => 1,
        "k" | "K" | "KiB" => 1 << 10,
        "M" | "MiB" => 1 << 20,
        "G" | "GiB" => 1 << 30,
        "kB" | "KB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        _ => return None,
    };
    number.checked_mul(unit)
}

/// Methods are case-sensitive; a lower-case one is a slip.
fn parse_method(text: &str) -> Option<Method> {
    if text.is_empty() || text.bytes().any(|byte| byte.is_ascii_lowercase()) {
        return None;
    }
    text.parse().ok()
}

// === macros ===

/// A table of the file: its documentation, keys and defaults are said once, and reading, schema and masking follow.
macro_rules! section {
    (
        $(#[doc = $about:literal])*
        pub struct $name:ident {
            $( $(#[doc = $doc:literal])* $field:ident : $type:ty $(= $default:expr)?, )*
        }
    ) => {
        $(#[doc = $about])*
        #[derive(Clone, Debug, PartialEq)]
        #[non_exhaustive]
        pub struct $name {
            $( $(#[doc = $doc])* pub $field: $type, )*
        }

        impl $crate::config::read::Value for $name {
            fn read(node: &$crate::config::read::Node<'_>, reader: &mut $crate::config::read::Reader<'_>) -> Option<Self> {
                let table = reader.table(node)?;
                reader.keys(table, &[$(stringify!($field)),*]);
                $(
                    let $field = match table.get(stringify!($field)) {
                        Some(value) => <$type as $crate::config::read::Value>::read(value, reader),
                        None => {
                            let absent = section!(@absent $type $(, $default)?);
                            if absent.is_none() {
                                let schema = <$type as $crate::config::read::Value>::schema();
                                reader.missing(node, stringify!($field), &schema);
                            }
                            absent
                        }
                    };
                )*
                Some(Self { $($field: $field?),* })
            }

            fn absent() -> Option<Self> {
                Some(Self { $($field: section!(@absent $type $(, $default)?)?),* })
            }

            fn schema() -> serde_json::Value {
                let mut properties = serde_json::Map::new();
                let mut required: Vec<&str> = Vec::new();
                $(
                    let mut one = <$type as $crate::config::read::Value>::schema();
                    let about: &[&str] = &[$($doc),*];
                    one["description"] = about.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ").into();
                    match section!(@absent $type $(, $default)?) {
                        Some(value) => {
                            let shown = $crate::config::read::Value::show(&value);
                            if !shown.is_null() && !shown.is_object() {
                                one["default"] = shown;
                            }
                        }
                        None => required.push(stringify!($field)),
                    }
                    properties.insert(stringify!($field).to_owned(), one);
                )*
                serde_json::json!({
                    "type": "object", "properties": properties, "required": required, "additionalProperties": false,
                })
            }

            fn show(&self) -> serde_json::Value {
                let mut shown = serde_json::Map::new();
                $(
                    let value = $crate::config::read::Value::show(&self.$field);
                    if !value.is_null() {
                        shown.insert(stringify!($field).to_owned(), value);
                    }
                )*
                serde_json::Value::Object(shown)
            }
        }
    };
    (@absent $type:ty) => { <$type as $crate::config::read::Value>::absent() };
    (@absent $type:ty, $default:expr) => { Some::<$type>($default) };
}
pub(crate) use section;

/// One of a few words.
macro_rules! words {
    (
        $(#[doc = $about:literal])*
        pub enum $name:ident { $( $(#[doc = $doc:literal])* $variant:ident = $word:literal, )* }
    ) => {
        $(#[doc = $about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum $name { $( $(#[doc = $doc])* $variant, )* }

        impl $crate::config::read::Value for $name {
            fn read(node: &$crate::config::read::Node<'_>, reader: &mut $crate::config::read::Reader<'_>) -> Option<Self> {
                match node.get_ref().as_str() {
                    $( Some($word) => return Some(Self::$variant), )*
                    Some(other) => {
                        let help = $crate::config::mistake::help(other, [$($word),*]);
                        reader.notes.push(&node.span(), format!("{other:?} is not known here"), help);
                    }
                    None => reader.wrong(node, &format!("one of {}", [$($word),*].join(", "))),
                }
                None
            }

            fn schema() -> serde_json::Value {
                serde_json::json!({ "type": "string", "enum": [$($word),*] })
            }

            fn show(&self) -> serde_json::Value {
                match self { $( Self::$variant => $word.into(), )* }
            }
        }
    };
}
pub(crate) use words;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_rates_and_sizes_are_read_and_shown() {
        for (text, time) in [("250ms", 250), ("1.5s", 1500), ("2m", 120_000), ("1h", 3_600_000), ("0s", 0)] {
            assert_eq!(parse_duration(text), Some(Duration::from_millis(time)), "{text}");
        }
        for text in ["", "5", "s", "-1s", "1 week", "1e9s", "99999999999s", "1..2s", "nans"] {
            assert_eq!(parse_duration(text), None, "{text}");
        }
        for time in ["250ms", "90s", "2m", "1h", "7us"] {
            assert_eq!(show_duration(parse_duration(time).unwrap()), time);
        }
        assert_eq!(parse_rate("5/10s"), Some(Rate { count: 5, period: Duration::from_secs(10) }));
        assert_eq!(parse_rate("20/m"), Some(Rate { count: 20, period: Duration::from_secs(60) }));
        for rate in ["5/10s", "20/m", "100/s", "7/12h"] {
            assert_eq!(show_rate(parse_rate(rate).unwrap()), rate);
        }
        for text in ["", "5", "0/s", "5/", "5/0s", "-1/s", "5/s/s"] {
            assert_eq!(parse_rate(text), None, "{text}");
        }
        assert_eq!(parse_bytes("64KiB"), Some(65536));
        assert_eq!(parse_bytes("99999999999999999999"), None);
        assert_eq!(parse_bytes("16777216GiB"), Some(1 << 54));
        assert_eq!(parse_bytes("99999999999999G"), None);
    }
}
