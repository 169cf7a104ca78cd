//! The client side and the gate of a microservice system, as a set of [`tower`](https://docs.rs/tower) layers: find the
//! instances of a service, choose one, keep away from the sick ones, know who is calling, hold callers to their share, and
//! pass the request on.
//!
//! ```text
//!     request
//!        │
//!        ▼
//!     route ───────── what is it asking for?       writes Destination    404 405
//!     auth ────────── who is calling?              writes Identity       401 403
//!     rate-limit ──── may they, this often?        reads  Identity       429
//!     discovery ───── where does that name live?   reads  Destination, writes Endpoints   503
//!     balance ─────── which of those?              reads  Endpoints, writes Permit        503
//!     circuit-break ─ is that one well?            adopts Permit         503
//!     forward ─────── send it, stream it back      reads  Permit         502 504
//!        │
//!        ▼
//!     upstream
//! ```
//!
//! Each layer works alone; what one leaves for the next is a typed value of [`core`] in the request's extensions. Because
//! the stack is linear, any other tower layer can stand between any two of them.
//!
//! **Position decides scope.** A circuit breaker above discovery guards the service as a whole; below balance it guards each
//! endpoint by itself. The same holds for limits and timeouts.
//!
//! # Features
//!
//! Each layer is a feature of its own name, on by default. Off by default: `gateway` ([`Gateway`](gateway::Gateway), the
//! whole stack behind routes), `health` (asks endpoints how they are), `serve` (a server with limits and a drain), `consul`, `dns` and `file` (where instances come
//! from), `fetch` (keys from a URL), `redis` (limits across processes), `tls` (to upstreams); `full` is all of them.

pub use portcullis_core as core;

#[cfg(feature = "auth")]
pub use portcullis_auth as auth;
#[cfg(feature = "balance")]
pub use portcullis_balance as balance;
#[cfg(feature = "circuit-break")]
pub use portcullis_circuit_break as circuit_break;
#[cfg(feature = "discovery")]
pub use portcullis_discovery as discovery;
#[cfg(feature = "forward")]
pub use portcullis_forward as forward;
#[cfg(feature = "rate-limit")]
pub use portcullis_rate_limit as rate_limit;

#[cfg(feature = "gateway")]
pub mod gateway;
#[cfg(feature = "health")]
pub mod health;
#[cfg(feature = "serve")]
pub mod serve;

/// The README's code, compiled.
#[cfg(all(doctest, feature = "full"))]
#[doc = include_str!("../../../README.md")]
struct Readme;
