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
//! same, optimized by a profile of itself: `cargo run -p portcullis-gateway --example pgo -- bench`. The third is the
//! program `portcullis`, optimized in that way, with a file that says the same; it counts every request and writes a line
//! about it. Each line is one run, and only figures of one line can be compared: machines differ by a third, and so do their
//! ratios.
//!
//! | | layers | layers, by profile | program, by profile | nginx 1.22 | HAProxy 2.6 | Envoy |
//! |---|---|---|---|---|---|---|
//! | HTTP/1.1, 128 B | 21.1 | 16.4 | 22.7 | 18.0 | 19.7 | 67.0 |
//! | HTTP/1.1, 16 KiB | 26.0 | 22.3 | 29.5 | 27.0 | 31.6 | 86.0 |
//! | HTTP/1.1, 64 KiB up and down | 64.7 | 59.5 | 61.7 | 89.5 | 85.4 | 143.5 |
//! | a connection for each request | 43.5 | 40.7 | 50.1 | 33.6 | 36.0 | 128.3 |
//! | HTTP/2 to HTTP/1.1 | 19.0 | 15.7 | 21.5 | 20.7 | 16.9 | 70.6 |
//! | gRPC | 21.5 | 18.0 | 26.6 | 34.5 | 14.5 | 72.8 |
//! | all six layers, HS256 | 24.2 | 21.4 | 27.4 | | 43.9 | 94.8, tokens cached |
//! | all six layers, RS256 | 24.9 | 23.2 | 29.3 | | 81.4 | 100.6, tokens cached |
//! | HS256, tokens not cached | 27.0 | 25.5 | | | 37.3 | |
//! | RS256, tokens not cached | 47.3 | 44.3 | | | 60.9 | |
//!
//! Of a request of the first line, two thirds are the kernel's, mostly for the four system calls that anybody needs who reads
//! and writes twice, and 24,300 instructions are ours, 18,700 by the profile. Of the program's 31,900, the two fifths that
//! are more are mostly for its line in the access log, the trace it begins, and what it counts. Memory under the first load is 6 MB (the program's 9),
//! nginx's 12; under the third 7, nginx's 16, and at its peak 11, nginx's 26.
//!
//! Where others are ahead it is by connections that are made for one request, and with gRPC, which is h2's: of a call's
//! 54,400 instructions by the profile half are spent in it, and of the 28,100 of a request from HTTP/2 to HTTP/1.1 not quite
//! two fifths, as callgrind counts them. hyper is left with what of HTTP/1 is not plain.
//!
//! # Features
//!
//! Each layer is a feature of its own name, on by default. Off by default: `gateway` ([`Gateway`](gateway::Gateway), the
//! whole stack behind routes), `health` (asks endpoints how they are), `serve` (a server with limits and a drain), `consul`, `dns` and `file` (where instances come
//! from), `fetch` (keys from a URL), `redis` (limits across processes), `redis-tls` (over `rediss://`),
//! `tls` (to upstreams); `full` is all of them but `redis-tls`.

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
