//! What Portcullis' own tests and examples need: real Consul and Redis agents, a real browser, backends that can be killed, tokens, and the
//! contract every layer keeps. Not published.
//!
//! Agents are looked for on PATH first. What is not there is unpacked from the system's package sources into the target
//! folder, and that is said; where neither works, the test that needs the agent fails with the reason.

#![allow(clippy::expect_used, reason = "a test that cannot go on says why and fails")]

pub mod backend;
mod browser;
pub mod client;
mod consul;
pub mod contract;
pub mod echo;
mod echoing;
pub mod process;
pub mod program;
mod redis;
pub mod token;

pub use backend::Backend;
pub use browser::Browser;
pub use consul::Consul;
pub use redis::Redis;
