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
//! # What a request costs
//!
//! CPU of the proxy per request, in µs, saturated over loopback on two cores, with [`serve`] on one runtime per core, the
//! median of five interleaved rounds of a second; in brackets with mimalloc. The program is `portcullis-bench`, built by
//! `cargo build --profile dist -p portcullis-bench [--features mimalloc]`; each line is one run, and only figures of one
//! line can be compared: the machine itself varies by a third.
//!
//! | | portcullis | nginx 1.22 | HAProxy 2.6 | Envoy | bytes relayed, no HTTP |
//! |---|---|---|---|---|---|
//! | HTTP/1.1, 128 B | 15.2 (14.5) | 13.6 | 13.7 | 27.2 | 10.0 |
//! | HTTP/1.1, 16 KiB | 16.8 (16.8) | 18.5 | 18.4 | 30.1 | 11.4 |
//! | HTTP/1.1, 64 KiB up and down | 53.9 (51.6) | 66.9 | 52.6 | 68.1 | 36.7 |
//! | a connection for each request | 33.6 (31.4) | 27.7 | 28.7 | 62.6 | |
//! | HTTP/2 to HTTP/1.1 | 11.1 (10.7) | 16.8 | 9.2 | 22.5 | |
//! | gRPC | 14.7 (14.0) | 33.6 | 8.5 | 25.6 | |
//! | all six layers, HS256 | 19.8 (19.5) | | 25.9 | 45.3, tokens cached | |
//! | the same, tokens not cached | (21.3) | | 25.9 | 57.2 | |
//! | all six layers, RS256 | 20.3 (19.9) | | 46.2 | 46.8, tokens cached | |
//! | the same, tokens not cached | (36.9) | | 46.2 | 74.8 | |
//!
//! The four policies together cost 1.0 to 1.4 µs more than discovery, balance and forward alone (16.0 and 16.4 beside 15.0
//! in one run). Memory under the first load is 6 MB (14), nginx's 12; under the third 18, nginx's 14, and at its
//! peak 20 beside 27.
//!
//! Where others are ahead it is with HTTP/2, which is hyper's and h2's: nearly half of the instructions of such a request
//! are theirs, as callgrind counts them.
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
