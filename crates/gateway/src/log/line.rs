//! A line put together by hand, in the form that all lines have.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use portcullis_core::WallClock;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

use super::{JSON, LINES};

/// A line under way.
pub(crate) struct Line {
    text: Vec<u8>,
    json: bool,
}

/// What stands before a value, in text and in JSON.
#[derive(Clone, Copy)]
pub(crate) struct Name {
    pub(crate) text: &'static str,
    pub(crate) json: &'static str,
}

/// The [`Name`] of a value.
macro_rules! name {
    ($name:literal) => {
        $crate::log::Name { text: concat!(" ", $name, "="), json: concat!(",\"", $name, "\":") }
    };
}
pub(crate) use name;

/// Longer lines than that are few.
const USUAL: usize = 4 << 10;
/// Such as `2038-01-19T03:14:07.`: what one second's times begin with.
const SECOND: usize = 20;

thread_local! {
    /// Memory for the next line.
    static MEMORY: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    /// A second since the epoch, and how it is written.
    static LAST: RefCell<(u64, [u8; SECOND])> = const { RefCell::new((u64::MAX, [0; SECOND])) };
}

impl Line {
    /// Begins one with the time and this.
    pub(crate) fn new(head: Name) -> Self {
        let text = MEMORY.try_with(RefCell::take).unwrap_or_default();
        let mut line = Self { text, json: JSON.load(Ordering::Relaxed) };
        if line.json {
            line.text.extend_from_slice(b"{\"timestamp\":\"");
        }
        line.now();
        line.name(head);
        line
    }

    fn now(&mut self) {
        let wall = WallClock::system();
        let now = wall.since_epoch();
        LAST.with_borrow_mut(|(second, written)| {
            if *second != now.as_secs() {
                let mut text = String::new();
                let time = SystemTime.format_time(&mut Writer::new(&mut text));
                let after = wall.since_epoch();
                let part = text.as_bytes().first_chunk().filter(|part: &&[u8; SECOND]| part.ends_with(b"."));
                match part {
                    // Between the two it was no other second.
                    Some(part) if time.is_ok() && after.as_secs() == now.as_secs() => {
                        (*second, *written) = (now.as_secs(), *part);
                    }
                    _ => return self.text.extend_from_slice(text.as_bytes()),
                }
            }
            self.text.extend_from_slice(written);
            self.digits(now.subsec_micros(), 6);
            self.text.push(b'Z');
        });
    }

    #[inline]
    fn name(&mut self, name: Name) {
        let name = if self.json { name.json } else { name.text };
        self.text.extend_from_slice(name.as_bytes());
    }

    /// The last digits of a number.
    fn digits(&mut self, number: u32, count: u32) {
        self.text.extend((0..count).rev().map(|place| b'0' + (number / 10_u32.pow(place) % 10) as u8));
    }

    fn integer(&mut self, number: impl itoa::Integer) {
        self.text.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
    }

    /// A value in quotes; what could end it or the line is escaped.
    pub(crate) fn text(&mut self, name: Name, value: &str) {
        self.name(name);
        let start = self.text.len();
        let _ = serde_json::to_writer(&mut self.text, value);
        if value.bytes().any(|byte| byte >= 0x7f) {
            self.escape_from(start);
        }
    }

    /// What JSON leaves as it is, but terminals and readers of lines take for commands and ends.
    #[cold]
    fn escape_from(&mut self, start: usize) {
        let is_escaped = |c: char| matches!(c, '\u{7f}'..='\u{9f}' | '\u{2028}' | '\u{2029}');
        let written = String::from_utf8_lossy(&self.text[start..]).into_owned();
        self.text.truncate(start);
        for c in written.chars() {
            if is_escaped(c) {
                self.text.extend_from_slice(format!("\\u{:04x}", u32::from(c)).as_bytes());
            } else {
                self.text.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
            }
        }
    }

    pub(crate) fn maybe(&mut self, name: Name, value: Option<&str>) {
        if let Some(value) = value {
            self.text(name, value);
        }
    }

    pub(crate) fn number(&mut self, name: Name, value: Option<u64>) {
        if let Some(value) = value {
            self.name(name);
            self.integer(value);
        }
    }

    /// Milliseconds, with three digits of one.
    pub(crate) fn millis(&mut self, name: Name, time: Option<Duration>) {
        if let Some(time) = time {
            let part = (time.subsec_nanos() + 500) / 1000;
            let micros = time.as_secs().saturating_mul(1_000_000).saturating_add(part.into());
            self.name(name);
            self.integer(micros / 1000);
            self.text.push(b'.');
            self.digits((micros % 1000) as u32, 3);
        }
    }

    pub(crate) fn flag(&mut self, name: Name, value: bool) {
        self.name(name);
        self.text.extend_from_slice(if value { b"true" } else { b"false" });
    }

    pub(crate) fn address(&mut self, name: Name, address: Option<SocketAddr>) {
        match address {
            Some(SocketAddr::V4(address)) => {
                self.name(name);
                self.text.push(b'"');
                for (octet, after) in address.ip().octets().into_iter().zip(*b"...:") {
                    self.integer(octet);
                    self.text.push(after);
                }
                self.integer(address.port());
                self.text.push(b'"');
            }
            Some(address @ SocketAddr::V6(_)) => self.plain(name, address.to_string().as_bytes()),
            None => {}
        }
    }

    /// What has nothing in it that must be escaped.
    pub(crate) fn plain(&mut self, name: Name, value: &[u8]) {
        self.name(name);
        for part in [b"\"", value, b"\""] {
            self.text.extend_from_slice(part);
        }
    }

    /// Ends it, and has it written.
    pub(crate) fn write(mut self) {
        self.text.extend_from_slice(if self.json { b"}\n" } else { b"\n" });
        LINES.push(&self.text);
        if self.text.capacity() <= USUAL {
            self.text.clear();
            _ = MEMORY.try_with(|memory| memory.replace(self.text));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(json: bool, write: impl Fn(&mut Line)) -> String {
        let mut line = Line { text: Vec::new(), json };
        write(&mut line);
        String::from_utf8(line.text).unwrap()
    }

    #[test]
    fn a_value_can_end_neither_itself_nor_the_line() {
        let text = written(true, |line| {
            line.text(name!("path"), "/a\"b\n\u{1b}[31m");
            line.number(name!("bytes"), Some(7));
            line.maybe(name!("none"), None);
            line.plain(name!("id"), b"1f");
            line.flag(name!("whole"), true);
        });
        assert_eq!(text, r#","path":"/a\"b\n\u001b[31m","bytes":7,"id":"1f","whole":true"#);
        let text = written(false, |line| {
            line.text(name!("path"), "/a\"b\n");
            line.number(name!("bytes"), Some(7));
        });
        assert_eq!(text, r#" path="/a\"b\n" bytes=7"#);
        let text = written(false, |line| line.text(name!("path"), "/é\u{9b}2J\u{85}\u{2028}\u{7f}"));
        assert_eq!(text, r#" path="/é\u009b2J\u0085\u2028\u007f""#);
    }

    #[test]
    fn numbers_are_written_as_everywhere() {
        for (time, text) in [
            (Duration::ZERO, "0.000"),
            (Duration::from_nanos(499), "0.000"),
            (Duration::from_nanos(500), "0.001"),
            (Duration::from_nanos(1_999_999_500), "2000.000"),
            (Duration::new(70, 1_042_000), "70001.042"),
            (Duration::MAX, "18446744073709551.615"),
        ] {
            assert_eq!(written(false, |line| line.millis(name!("t"), Some(time))), format!(" t={text}"));
        }
        for address in ["127.0.0.1:1", "255.0.10.254:65535", "[::1]:80", "[2001:db8::1%7]:443"] {
            let parsed = address.parse().unwrap();
            assert_eq!(written(false, |line| line.address(name!("a"), Some(parsed))), format!(" a=\"{address}\""));
        }
    }

    #[test]
    fn a_line_begins_with_the_time() {
        let now = || WallClock::system().since_epoch();
        for _ in 0..2 {
            let before = now();
            let text = written(false, Line::now);
            let (date, time) = text.strip_suffix('Z').unwrap().split_once('T').unwrap();
            let (second, micros) = time.split_once('.').unwrap();
            let parts: Vec<u64> = date.split('-').chain(second.split(':')).map(|part| part.parse().unwrap()).collect();
            let [year, month, day, hour, minute, second] = parts[..] else { panic!("{text}") };
            // Days since the epoch, of a year that begins in March.
            let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
            let days = y * 365 + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1 - 719_468;
            let seconds = days * 86_400 + hour * 3_600 + minute * 60 + second;
            let written = Duration::from_secs(seconds) + Duration::from_micros(micros.parse().unwrap());
            assert_eq!(micros.len(), 6);
            assert!(Duration::from_micros(before.as_micros() as u64) <= written && written <= now(), "{text}");
        }
    }
}
