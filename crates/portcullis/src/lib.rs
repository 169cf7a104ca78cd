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
//! CPU of the proxy per request, in µs, saturated over loopback on two cores, the median of five interleaved rounds of a
//! second. The first column is `portcullis-bench`, built by `cargo build --profile dist -p portcullis-bench`: discovery,
//! balance and forward under [`serve`] on one runtime per core, or all six layers where tokens are shown. The second is the
//! program `portcullis` with a file that says the same; it counts every request and writes a line about it. Each
//! line is one run, and only figures of one line can be compared: machines differ by a third, and so do their ratios.
//!
//! | | layers | program | nginx 1.22 | HAProxy 2.6 | Envoy |
//! |---|---|---|---|---|---|
//! | HTTP/1.1, 128 B | 18.9 | 25.7 | 17.0 | 20.6 | 63.0 |
//! | HTTP/1.1, 16 KiB | 24.6 | 32.6 | 25.6 | 29.8 | 76.1 |
//! | HTTP/1.1, 64 KiB up and down | 65.4 | 77.7 | 78.0 | 78.2 | 121.8 |
//! | a connection for each request | 38.6 | 44.5 | 32.3 | 35.7 | 125.4 |
//! | HTTP/2 to HTTP/1.1 | 18.5 | 26.6 | 19.6 | 15.1 | 54.4 |
//! | gRPC | 23.1 | 30.4 | 30.5 | 14.3 | 60.5 |
//! | all six layers, HS256 | 21.2 | 28.2 | | 37.6 | 81.6, tokens cached |
//! | all six layers, RS256 | 18.5 | 26.6 | | 61.8 | 74.9, tokens cached |
//! | HS256, tokens not cached | 20.9 | | | 30.5 | |
//! | RS256, tokens not cached | 47.8 | | | 75.0 | |
//!
//! Of a request of the first line, two thirds are the kernel's, mostly for the four system calls that anybody needs who reads
//! and writes twice, and 24,000 instructions are ours. Of the program's 40,500, a third are for its line in the access log, the
//! trace it begins, and what it counts. Memory under the first load is 6 MB (the program's 12), nginx's 12; under the third 6
//! (12), nginx's 16, and at its peak 11 (16), nginx's 27.
//!
//! Where others are ahead it is by connections that are made for one request, and with HTTP/2, which is h2's: of a gRPC call's
//! 69,000 instructions two thirds are spent in it, and of the 36,400 of a request from HTTP/2 to HTTP/1.1 not quite half, as
//! callgrind counts them. hyper is left with what of HTTP/1 is not plain.
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
