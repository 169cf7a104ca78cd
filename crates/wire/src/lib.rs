//! What the server and the forwarder share: HTTP/1.1 messages in bytes ([RFC 9112](https://www.rfc-editor.org/rfc/rfc9112)),
//! both ways, what both do with streams of HTTP/2, and a timer that is set once in a while.
//!
//! This is a part of Portcullis and not meant to be used by itself. Nothing here knows whether it is a client or a server,
//! and nothing runs: whoever holds a connection polls.

mod alarm;
mod decode;
mod fields;
mod h2;
mod input;
mod room;
mod send;

use std::fmt;

pub use self::h2::{Halt, Pings, Received, Transmit, reason};
pub use alarm::{Alarm, after, earlier, poll_once};
pub use decode::Decoder;
pub use fields::{Fields, MAX_FIELDS, keeps_alive, length_of, parse_length, write_field, write_line};
pub use input::Input;
pub use room::cut;
pub use send::{Length, SendError, Sending};

/// What arrived is not HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Malformed {}
