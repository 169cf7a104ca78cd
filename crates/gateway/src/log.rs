//! What is written to standard error, and how its level is changed while it runs.
//!
//! Lines go through a queue to a thread of their own: whoever reads them slowly, or not at all, keeps no request waiting.
//! What there is no room for is left out and counted.

use std::fmt;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, reload};

use crate::config::{Log, LogFormat};
use crate::telemetry::lock;

static FILTER: OnceLock<reload::Handle<Targets, Registry>> = OnceLock::new();
/// What is let through now, as it was said.
static LEVEL: Mutex<String> = Mutex::new(String::new());
static LINES: OnceLock<Lines> = OnceLock::new();
/// Whether lines are JSON.
static JSON: AtomicBool = AtomicBool::new(false);
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Lines that may wait.
const WAITING: usize = 8192;
/// So much is written at a time, if there is so much.
const AT_ONCE: usize = 64 << 10;
/// How long the thread waits for more before it writes: a line that wakes nobody costs a request little.
const GATHER: Duration = Duration::from_millis(5);

/// Where lines go.
#[derive(Clone)]
struct Lines(SyncSender<Order>);

/// A line of its own making, in the form that all lines have.
pub(crate) struct Line(Vec<u8>, bool);

enum Order {
    Write(Vec<u8>),
    /// Say when everything before is written.
    Flush(SyncSender<()>),
}

/// What directives such as `info` or `warn,portcullis_forward=debug` let through; `None` when they are none.
pub(crate) fn filter(directives: &str) -> Option<Targets> {
    // A word alone would be taken for a module, and nothing for a level.
    let level = |word: &str| !word.is_empty() && word.parse::<LevelFilter>().is_ok();
    let sound = |directive: &str| directive.contains('=') || level(directive.trim());
    directives.split(',').all(sound).then(|| directives.parse().ok()).flatten()
}

/// Begins to write.
pub(crate) fn start(log: &Log) {
    let (filter, handle) = reload::Layer::new(filter(&log.level).unwrap_or_default());
    let _ = FILTER.set(handle);
    log.level.as_str().clone_into(&mut lock(&LEVEL));
    JSON.store(log.format == LogFormat::Json, Ordering::Relaxed);
    let (sender, receiver) = sync_channel(WAITING);
    let thread = std::thread::Builder::new().name(String::from("log"));
    if thread.spawn(move || write(&receiver, io::stderr())).is_err() {
        eprintln!("portcullis: there is no thread to write the log");
    }
    let lines = LINES.get_or_init(|| Lines(sender)).clone();
    let registry = tracing_subscriber::registry();
    let layer = tracing_subscriber::fmt::layer().with_writer(lines);
    let started = match log.format {
        LogFormat::Text => registry.with(layer.with_ansi(false).with_filter(filter)).try_init(),
        LogFormat::Json => registry.with(layer.json().flatten_event(true).with_filter(filter)).try_init(),
    };
    // Only in tests has another been set before.
    drop(started);
}

/// Writes what `directives` let through from now on; `false` when they are none.
pub(crate) fn change(directives: &str) -> bool {
    let Some(filter) = filter(directives) else { return false };
    let changed = FILTER.get().is_some_and(|handle| handle.reload(filter).is_ok());
    if changed {
        directives.clone_into(&mut lock(&LEVEL));
    }
    changed
}

/// What is let through now.
pub(crate) fn level() -> String {
    lock(&LEVEL).clone()
}

/// Lines there was no room for.
pub(crate) fn dropped() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// Waits until what was said is written, but no longer than that.
pub(crate) fn flush(within: Duration) {
    let Some(Lines(lines)) = LINES.get() else { return };
    let mut left = within;
    let (done, is_done) = sync_channel(1);
    let mut order = Order::Flush(done);
    while let Err(TrySendError::Full(again)) = lines.try_send(order) {
        if left.is_zero() {
            return;
        }
        std::thread::park_timeout(GATHER);
        left = left.saturating_sub(GATHER);
        order = again;
    }
    let _ = is_done.recv_timeout(left);
}

/// Writes lines, as many at once as there are.
fn write(lines: &Receiver<Order>, mut to: impl Write) {
    let mut text = Vec::with_capacity(AT_ONCE);
    while let Ok(order) = lines.recv() {
        if matches!(order, Order::Write(_)) {
            std::thread::park_timeout(GATHER);
        }
        let (mut next, mut waiting) = (Some(order), None);
        while let Some(order) = next {
            match order {
                Order::Write(line) => text.extend_from_slice(&line),
                Order::Flush(done) => waiting = Some(done),
            }
            next = if text.len() < AT_ONCE && waiting.is_none() { lines.try_recv().ok() } else { None };
        }
        // Nobody reads any more: there is nobody to tell.
        let _ = to.write_all(&text).and_then(|()| to.flush());
        text.clear();
        if let Some(done) = waiting {
            let _ = done.send(());
        }
    }
}

// === impl Line ===

impl Line {
    /// Begins one.
    pub(crate) fn new(level: &str, target: &str) -> Self {
        let mut time = String::new();
        let _ = SystemTime.format_time(&mut Writer::new(&mut time));
        let json = JSON.load(Ordering::Relaxed);
        let mut text = Vec::with_capacity(640);
        let _ = match json {
            true => write!(text, "{{\"timestamp\":\"{time}\",\"level\":\"{level}\",\"target\":\"{target}\""),
            false => write!(text, "{time} {level:>5} {target}:"),
        };
        Self(text, json)
    }

    fn name(&mut self, name: &str) {
        let Self(text, json) = self;
        let (before, after): (&[u8], &[u8]) = if *json { (b",\"", b"\":") } else { (b" ", b"=") };
        text.extend_from_slice(before);
        text.extend_from_slice(name.as_bytes());
        text.extend_from_slice(after);
    }

    /// A value that needs no quotes.
    pub(crate) fn raw(&mut self, name: &str, value: impl fmt::Display) {
        self.name(name);
        let _ = write!(self.0, "{value}");
    }

    /// A value in quotes; what could end it or the line is escaped.
    pub(crate) fn text(&mut self, name: &str, value: &str) {
        self.name(name);
        let _ = serde_json::to_writer(&mut self.0, value);
    }

    pub(crate) fn maybe(&mut self, name: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.text(name, value);
        }
    }

    pub(crate) fn number(&mut self, name: &str, value: Option<u64>) {
        if let Some(value) = value {
            self.raw(name, value);
        }
    }

    pub(crate) fn flag(&mut self, name: &str, value: bool) {
        self.raw(name, value);
    }

    /// What has nothing in it that must be escaped.
    pub(crate) fn display(&mut self, name: &str, value: Option<impl fmt::Display>) {
        if let Some(value) = value {
            self.name(name);
            let _ = write!(self.0, "\"{value}\"");
        }
    }

    /// Ends it, and has it written.
    pub(crate) fn write(self) {
        let Self(mut text, json) = self;
        text.extend_from_slice(if json { b"}\n" } else { b"\n" });
        if let Some(lines) = LINES.get() {
            lines.send(text);
        }
    }
}

// === impl Lines ===

impl Lines {
    fn send(&self, line: Vec<u8>) {
        if self.0.try_send(Order::Write(line)).is_err() {
            DROPPED.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = &'a Self;

    fn make_writer(&'a self) -> &'a Self {
        self
    }
}

/// A line comes in one piece.
impl Write for &Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.send(line.to_vec());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_written_in_order_and_those_without_room_are_left_out() {
        let (sender, receiver) = sync_channel(3);
        let own = Lines(sender);
        let mut lines = &own;
        let before = dropped();
        for line in ["one\n", "two\n", "three\n", "four\n"] {
            lines.write_all(line.as_bytes()).unwrap();
        }
        assert_eq!(dropped() - before, 1);
        let thread = std::thread::spawn(move || {
            let mut text = Vec::new();
            write(&receiver, &mut text);
            text
        });
        let (done, is_done) = sync_channel(1);
        lines.0.send(Order::Flush(done)).unwrap();
        is_done.recv().unwrap();
        lines.write_all(b"five\n").unwrap();
        drop(own);
        assert_eq!(thread.join().unwrap(), b"one\ntwo\nthree\nfive\n");
    }

    #[test]
    fn a_value_can_end_neither_itself_nor_the_line() {
        let mut line = Line(Vec::new(), true);
        line.text("path", "/a\"b\n\u{1b}[31m");
        line.number("bytes", Some(7));
        line.maybe("none", None);
        line.display("peer", Some(1.5));
        line.flag("whole", true);
        let text = String::from_utf8(line.0).unwrap();
        assert_eq!(text, r#","path":"/a\"b\n\u001b[31m","bytes":7,"peer":"1.5","whole":true"#);
        let mut line = Line(Vec::new(), false);
        line.text("path", "/a\"b\n");
        line.number("bytes", Some(7));
        assert_eq!(String::from_utf8(line.0).unwrap(), r#" path="/a\"b\n" bytes=7"#);
    }

    #[test]
    fn words_that_are_no_levels_are_no_directives() {
        for sound in ["info", "warn,portcullis_forward=debug", "off", "access=off,info"] {
            assert!(filter(sound).is_some(), "{sound}");
        }
        for wrong in ["", "lots", "info,lots", "a=b=c"] {
            assert!(filter(wrong).is_none(), "{wrong}");
        }
    }
}
