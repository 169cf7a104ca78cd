//! Plain values: numbers, words, times, rates and sizes.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use http::{HeaderName, HeaderValue, Method, StatusCode};
use portcullis_core::Address;
use serde_json::{Value as Json, json};
use toml::de::DeValue;

use super::read::{Node, Reader, Value};

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

/// How long something may take: a time, or `"never"` when it may take for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience(pub Duration);

/// A part of a whole: more than 0, at most 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share(pub f64);

/// Of how many something is done: from 0, none, to 1, all.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample(pub f64);

/// Entries by name.
pub type Map<T> = BTreeMap<String, T>;

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

    fn files(&self) -> Vec<PathBuf> {
        self.as_ref().map_or_else(Vec::new, Value::files)
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

    fn files(&self) -> Vec<PathBuf> {
        self.iter().flat_map(Value::files).collect()
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

    fn files(&self) -> Vec<PathBuf> {
        self.values().flat_map(Value::files).collect()
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

/// The most a file may count of anything; more is too much for some layer.
const MOST: u64 = u32::MAX as u64;

macro_rules! integers {
    ($($type:ty),*) => {$(
        impl Value for $type {
            fn read(node: &Node<'_>, reader: &mut Reader<'_>) -> Option<Self> {
                let most = u64::try_from(Self::MAX).unwrap_or(MOST).min(MOST);
                Self::try_from(reader.integer(node, 0, most)?).ok()
            }

            fn schema() -> Json {
                json!({ "type": "integer", "minimum": 0, "maximum": u64::try_from(Self::MAX).unwrap_or(MOST).min(MOST) })
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
                let most = u64::try_from(<$plain>::MAX).unwrap_or(MOST).min(MOST);
                Self::new(<$plain>::try_from(reader.integer(node, 1, most)?).ok()?)
            }

            fn schema() -> Json {
                json!({ "type": "integer", "minimum": 1, "maximum": u64::try_from(<$plain>::MAX).unwrap_or(MOST).min(MOST) })
            }

            fn show(&self) -> Json {
                json!(self.get())
            }
        }
    )*};
}

positives!(
    std::num::NonZeroU8 = u8,
    std::num::NonZeroU16 = u16,
    std::num::NonZeroU32 = u32,
    std::num::NonZeroUsize = usize
);

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
    Patience, "a time or \"never\"", "15s", parse_patience, |patience| show_patience(*patience);
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

impl Value for f64 {
    fn read(node: &Node<'_>, reader: &mut Reader<'_>) -> Option<Self> {
        let number = number(node).filter(|number| *number >= 0.0);
        if number.is_none() {
            reader.wrong(node, "a number that is not negative, such as 0.5");
        }
        number
    }

    fn schema() -> Json {
        json!({ "type": "number", "minimum": 0 })
    }

    fn show(&self) -> Json {
        json!(self)
    }
}

impl Value for Share {
    fn read(node: &Node<'_>, reader: &mut Reader<'_>) -> Option<Self> {
        let share = number(node).filter(|&share| share > 0.0 && share <= 1.0);
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

impl Value for Sample {
    fn read(node: &Node<'_>, reader: &mut Reader<'_>) -> Option<Self> {
        let sample = number(node).filter(|sample| (0.0..=1.0).contains(sample));
        if sample.is_none() {
            reader.wrong(node, "a share from 0 to 1, such as 0.5");
        }
        sample.map(Self)
    }

    fn schema() -> Json {
        json!({ "type": "number", "minimum": 0, "maximum": 1 })
    }

    fn show(&self) -> Json {
        json!(self.0)
    }
}

fn number(node: &Node<'_>) -> Option<f64> {
    let number: Option<f64> = match node.get_ref() {
        DeValue::Float(number) => number.as_str().parse().ok(),
        DeValue::Integer(number) => number.as_str().parse().ok(),
        _ => None,
    };
    number.filter(|number| number.is_finite())
}

// === text ===

/// The longest time a file may name; more overflows timers somewhere.
const LONGEST: Duration = Duration::from_secs(366 * 86_400);

pub(crate) fn parse_duration(text: &str) -> Option<Duration> {
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

fn parse_patience(text: &str) -> Option<Patience> {
    if text == "never" { Some(Duration::MAX) } else { parse_duration(text) }.map(Patience)
}

fn show_patience(Patience(time): Patience) -> String {
    if time == Duration::MAX { String::from("never") } else { show_duration(time) }
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
