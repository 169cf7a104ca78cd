//! How the typed values travel: one carrier in the request's extensions, whatever the number of values.
//!
//! A first insert into [`http::Extensions`] costs three allocations, and each further one another; a stack of six layers
//! writes five values. So the values share one entry, and each is reached by the methods of [`Carried`].

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http::Extensions;

use self::sealed::Carrier;
use crate::{Endpoints, Identity, Moment, Observer, Permit, ReservedHeaders, Route};

/// A value that one layer leaves for the next in the request's extensions.
///
/// ```
/// use portcullis_core::{Carried, Destination};
///
/// let mut request = http::Request::new(());
/// Destination::new("orders").attach(request.extensions_mut());
/// assert_eq!(Destination::of(request.extensions()).unwrap().as_str(), "orders");
/// ```
pub trait Carried: Sized + sealed::Field {
    /// The value that was left, if any.
    #[must_use]
    fn of(extensions: &Extensions) -> Option<&Self> {
        Self::field(extensions.get::<Carrier>()?).as_ref()
    }

    /// The value that was left, to change it.
    #[must_use]
    fn of_mut(extensions: &mut Extensions) -> Option<&mut Self> {
        Self::field_mut(extensions.get_mut::<Carrier>()?).as_mut()
    }

    /// Leaves the value, and returns the one that was there.
    fn attach(self, extensions: &mut Extensions) -> Option<Self> {
        Self::field_mut(extensions.get_or_insert_default::<Carrier>()).replace(self)
    }

    /// Takes the value out.
    fn take(extensions: &mut Extensions) -> Option<Self> {
        Self::field_mut(extensions.get_mut::<Carrier>()?).take()
    }
}

/// All that was left in a request: looked for once, then read without looking again.
///
/// ```
/// use portcullis_core::{Carried, CarriedValues, Destination};
///
/// let mut request = http::Request::new(());
/// Destination::new("orders").attach(request.extensions_mut());
/// let left = CarriedValues::of(request.extensions());
/// assert_eq!(left.get::<Destination>().unwrap().as_str(), "orders");
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct CarriedValues<'a>(Option<&'a Carrier>);

/// The logical name of the service a request asks for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Destination(Arc<str>);

/// When the caller stops waiting, on the stack's [`Clock`](crate::Clock).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(pub Moment);

/// When this attempt is given up unless the head of its response is there, on the stack's [`Clock`](crate::Clock). Unlike
/// a [`Deadline`] it says nothing of the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HeadDeadline(pub Moment);

/// The address of the connection's other end, put in by the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PeerAddress(pub SocketAddr);

/// The connection is encrypted; the certificates its other end proved to hold, as DER, its own first. Put in by the
/// server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerTls {
    certificates: Arc<[Bytes]>,
}

/// A copy of what a request carries, for another request in its place. It allocates nothing as long as only layers of ours
/// left something.
#[derive(Clone, Debug)]
pub struct Baggage(Packed);

#[derive(Clone, Debug)]
enum Packed {
    Ours(Carrier),
    /// Empty, or with values of others.
    Any(Extensions),
}

#[expect(unnameable_types, reason = "what travels is this crate's choice, and so is the carrier")]
mod sealed {
    use super::{
        Deadline, Destination, Endpoints, HeadDeadline, Identity, Observer, PeerAddress, PeerTls, Permit,
        ReservedHeaders, Route,
    };

    /// What travels with a request.
    #[derive(Clone, Debug, Default)]
    pub struct Carrier {
        pub(super) route: Option<Route>,
        pub(super) destination: Option<Destination>,
        pub(super) deadline: Option<Deadline>,
        pub(super) head_deadline: Option<HeadDeadline>,
        pub(super) peer: Option<PeerAddress>,
        pub(super) tls: Option<PeerTls>,
        pub(super) identity: Option<Identity>,
        pub(super) reserved: Option<ReservedHeaders>,
        pub(super) observer: Option<Observer>,
        pub(super) endpoints: Option<Endpoints>,
        pub(super) permit: Option<Permit>,
    }

    pub trait Field: Sized {
        fn field(carrier: &Carrier) -> &Option<Self>;
        fn field_mut(carrier: &mut Carrier) -> &mut Option<Self>;
    }
}

macro_rules! carried {
    ($($field:ident: $type:ty),* $(,)?) => {$(
        impl sealed::Field for $type {
            fn field(carrier: &Carrier) -> &Option<Self> {
                &carrier.$field
            }

            fn field_mut(carrier: &mut Carrier) -> &mut Option<Self> {
                &mut carrier.$field
            }
        }

        impl Carried for $type {}
    )*};
}

carried! {
    route: Route,
    destination: Destination,
    deadline: Deadline,
    head_deadline: HeadDeadline,
    peer: PeerAddress,
    tls: PeerTls,
    identity: Identity,
    reserved: ReservedHeaders,
    observer: Observer,
    endpoints: Endpoints,
    permit: Permit,
}

/// Takes out all that was left, but keeps the memory it was in, for another request or its answer.
pub fn clear_extensions(extensions: &mut Extensions) {
    match extensions.get_mut::<Carrier>() {
        Some(carrier) => {
            *carrier = Carrier::default();
            if extensions.len() > 1 {
                extensions.clear();
            }
        }
        None => extensions.clear(),
    }
}

// === impl Baggage ===

impl Baggage {
    /// Copies what is in `extensions`.
    #[must_use]
    pub fn of(extensions: &Extensions) -> Self {
        Self(match extensions.get::<Carrier>() {
            Some(carrier) if extensions.len() == 1 => Packed::Ours(carrier.clone()),
            _ => Packed::Any(extensions.clone()),
        })
    }

    /// The value that was left, if any.
    #[must_use]
    pub fn get<T: Carried>(&self) -> Option<&T> {
        match &self.0 {
            Packed::Ours(carrier) => T::field(carrier).as_ref(),
            Packed::Any(extensions) => T::of(extensions),
        }
    }

    /// What was copied, for another request.
    #[must_use]
    pub fn into_extensions(self) -> Extensions {
        match self.0 {
            Packed::Ours(carrier) => {
                let mut extensions = Extensions::new();
                extensions.insert(carrier);
                extensions
            }
            Packed::Any(extensions) => extensions,
        }
    }
}

// === impl CarriedValues ===

impl<'a> CarriedValues<'a> {
    /// What was left in these extensions.
    #[must_use]
    pub fn of(extensions: &'a Extensions) -> Self {
        Self(extensions.get())
    }

    /// The value of that type, if any was left.
    #[must_use]
    pub fn get<T: Carried>(self) -> Option<&'a T> {
        T::field(self.0?).as_ref()
    }
}

// === impl Deadline ===

impl Deadline {
    /// Leaves it, unless an earlier one was left.
    pub fn attach_if_earlier(self, extensions: &mut Extensions) {
        if Self::of(extensions).is_none_or(|other| self < *other) {
            self.attach(extensions);
        }
    }
}

// === impl Destination ===

impl Destination {
    /// Names a service.
    #[must_use]
    pub fn new(service: impl Into<Arc<str>>) -> Self {
        Self(service.into())
    }

    /// The service's name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The service's name, shared.
    #[must_use]
    pub fn name(&self) -> &Arc<str> {
        &self.0
    }
}

// === impl PeerTls ===

impl PeerTls {
    /// An encrypted connection whose other end showed these certificates, verified by the server.
    #[must_use]
    pub fn new(certificates: impl Into<Arc<[Bytes]>>) -> Self {
        Self { certificates: certificates.into() }
    }

    /// The other end's certificates as DER, its own first; empty when it showed none.
    #[must_use]
    pub fn certificates(&self) -> &[Bytes] {
        &self.certificates
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn baggage_is_all_that_was_left() {
        let mut extensions = Extensions::new();
        assert!(Baggage::of(&extensions).into_extensions().is_empty());
        Destination::new("a").attach(&mut extensions);
        for others in [0, 1] {
            let baggage = Baggage::of(&extensions);
            assert_eq!(baggage.get(), Some(&Destination::new("a")));
            assert_eq!(baggage.get::<Deadline>(), None);
            let copied = baggage.clone().into_extensions();
            assert_eq!((copied.len(), Destination::of(&copied)), (1 + others, Destination::of(&extensions)));
            assert_eq!(copied.get(), extensions.get::<u8>());
            extensions.insert(7_u8);
        }
    }

    #[test]
    fn nothing_is_left_but_memory() {
        let mut extensions = Extensions::new();
        clear_extensions(&mut extensions);
        assert!(extensions.is_empty());
        for others in [0, 1] {
            Destination::new("a").attach(&mut extensions);
            if others > 0 {
                extensions.insert(7_u8);
            }
            clear_extensions(&mut extensions);
            assert_eq!((Destination::of(&extensions), extensions.get::<u8>()), (None, None));
            let before = extensions.len();
            let attach = || _ = Deadline(Moment::MAX).attach(&mut extensions);
            let allocations = allocation_counter::measure(attach).count_total;
            assert_eq!((before, allocations), if others == 0 { (1, 0) } else { (0, 1) });
        }
    }

    #[test]
    fn values_share_one_entry() {
        let mut extensions = Extensions::new();
        Destination::new("a").attach(&mut extensions);
        Deadline(Moment::MAX).attach(&mut extensions);
        assert_eq!(extensions.len(), 1);
        assert_eq!(Destination::new("b").attach(&mut extensions), Some(Destination::new("a")));
        assert_eq!(Destination::take(&mut extensions), Some(Destination::new("b")));
        assert_eq!(Destination::of(&extensions), None);
        assert_eq!(Deadline::of(&extensions), Some(&Deadline(Moment::MAX)));
    }
}
