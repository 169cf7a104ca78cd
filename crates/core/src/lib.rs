//! The words that Portcullis' layers share.
//!
//! Layers never call each other. What one leaves for the next is a typed value in the request's extensions, and those
//! values live here:
//!
//! | value | says | written by | read by |
//! |---|---|---|---|
//! | [`PeerAddress`], [`PeerTls`] | who is at the other end of the connection | the server, or [`PeerAddressLayer`] | auth, rate-limit, forward |
//! | [`Destination`], [`Route`], [`Deadline`] | what is asked for, how, and until when | route | every layer |
//! | [`Identity`] | who is calling | auth | rate-limit, balance, the application |
//! | [`ReservedHeaders`] | which headers only we may write | auth | forward |
//! | [`Endpoints`] | where the service lives | discovery | balance |
//! | [`Permit`] | the right to call one [`Endpoint`] | balance | circuit-break, forward |
//! | [`Observer`] | who wants to know how it fares | the application | the gateway |
//! | [`HeadDeadline`] | when this attempt is given up | balance | forward |
//!
//! They are reached by the methods of [`Carried`] and share one entry in the extensions, however many there are.
//!
//! The other things here are what several layers must agree on: the [`Gate`] in front of an endpoint, the [`Outcome`] of a
//! call and who [`Classify`]s it, the [`Rejection`] that refuses, the [`Body`] that watches, the [`Clock`], and by what a
//! file that is watched [is known](FileStamp).
//!
//! # Decisions
//!
//! * **One carrier.** A first insert into [`http::Extensions`] allocates three times and each further one once; with one
//!   shared entry only the first of all writes does.
//! * **Each layer classifies for itself**, with the same [`Standard`] unless told otherwise. Judging a head costs less than
//!   handing the outcome out through the response's extensions would.
//! * **A gate compares generations by order**, not by equality: a result counts for a mover if it entered at or after that
//!   mover's last move. So movers do not disturb each other's results.
//! * **`serde_json` is part of the interface** of [`Identity`] alone.

mod body;
mod carried;
mod client_address;
mod clock;
mod endpoint;
mod endpoints;
mod gate;
mod grpc;
mod identity;
mod observe;
mod outcome;
mod path;
mod peer;
mod per_endpoint;
mod per_thread;
mod permit;
mod rejection;
mod reserved;
mod route;
mod slots;
mod stamp;
mod sync;

pub use body::{Body, Guard};
pub use carried::{
    Baggage, Carried, CarriedValues, Deadline, Destination, HeadDeadline, PeerAddress, PeerTls, clear_extensions,
};
pub use client_address::{InvalidNetwork, TrustedProxies, canonical_address, ipv6_prefix};
pub use clock::{Clock, ManualClock, Moment, WallClock};
pub use endpoint::{Address, Endpoint, InFlight, Instance, InvalidAddress, Protocol, Scheme, WeakEndpoint};
pub use endpoints::Endpoints;
pub use gate::{Entry, Gate, Generation, Mover, Pass, Ration, Refused};
pub use grpc::{
    Dialect, GRPC_MESSAGE, GRPC_RETRY_PUSHBACK, GRPC_STATUS, GRPC_STATUS_DETAILS, GRPC_TIMEOUT, GrpcCode, grpc_timeout,
    grpc_timeout_value, retry_after,
};
pub use identity::{Identity, Proof};
pub use observe::{Observe, Observer};
pub use outcome::{Classify, Head, Judge, Outcome, Report, Standard, Verdict, judge};
pub use path::{is_normal_path, normal_path};
pub use peer::{PeerAddressLayer, WithPeerAddress};
pub use per_endpoint::{Clear, PerEndpoint};
pub use per_thread::PerThread;
pub use permit::Permit;
pub use rejection::{Layer, Rejection, Side};
pub use reserved::ReservedHeaders;
pub use route::Route;
pub use slots::{SlotKey, Slots};
pub use stamp::FileStamp;
