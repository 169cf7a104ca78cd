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
//! program `portcullis` with a file that says the same; it counts every request, and traces them besides if told to. Each
//! line is one run, and only figures of one line can be compared: machines differ by a third, and so do their ratios.
//!
//! | | layers | program | nginx 1.22 | HAProxy 2.6 | Envoy |
//! |---|---|---|---|---|---|
//! | HTTP/1.1, 128 B | 15.1 | 19.9 | 11.9 | 13.6 | 44.7 |
//! | HTTP/1.1, 16 KiB | 20.6 | 26.0 | 19.7 | 22.3 | 56.6 |
//! | HTTP/1.1, 64 KiB up and down | 63.4 | 70.3 | 62.0 | 62.2 | 100.2 |
//! | a connection for each request | 33.2 | 36.5 | 25.7 | 26.6 | 85.1 |
//! | HTTP/2 to HTTP/1.1 | 10.4 | 15.7 | 16.1 | 8.9 | 27.1 |
//! | gRPC | 10.2 | 15.4 | 26.6 | 7.3 | 17.6 |
//! | all six layers, HS256 | 17.5 | 22.6 | | 25.7 | 57.2, tokens cached |
//! | all six layers, RS256 | 18.5 | 22.4 | | 53.3 | 60.6, tokens cached |
//! | HS256, tokens not cached | 24.7 | | | 29.4 | |
//! | RS256, tokens not cached | 47.1 | | | 55.9 | |
//!
//! Of a request of the first line, 10 µs or so are the four system calls that anybody needs who reads and writes twice, and
//! 30,000 instructions are ours; with the feature `mimalloc` it is some percent less. Memory under the first load is 6 MB
//! (the program's 12), nginx's 12; under the third 23 (28), nginx's 16.
//!
//! Where others are ahead it is by connections that are made for one request, and with HTTP/2, which is h2's: of a gRPC call's
//! 70,000 instructions two thirds are spent in it, and of the 40,000 of a request from HTTP/2 to HTTP/1.1 not quite half, as
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
