//! What of a request decides something: where it goes, who counts together, which plan holds.

use http::HeaderName;

use super::read::At;

/// Alternatives, of which the first that a request has decides: one thing each, or several together.
pub type Alternatives<T> = Vec<Vec<At<T>>>;

/// One of some things: a word, or a word and a name with a colon between them.
macro_rules! by {
    (
        $(#[doc = $about:literal])*
        pub enum $name:ident($wanted:literal) {
            $( $(#[doc = $doc:literal])* $variant:ident$(($type:ty))? = $word:literal, )*
        }
    ) => {
        $(#[doc = $about])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum $name { $( $(#[doc = $doc])* $variant$(($type))?, )* }

        impl $crate::config::read::Value for $name {
            fn read(node: &$crate::config::read::Node<'_>, reader: &mut $crate::config::read::Reader<'_>) -> Option<Self> {
                let words = [$(by!(@example $word $($type)?)),*].join(", ");
                reader.parsed(node, &format!("{}, such as {words}", $wanted), |text| {
                    let (word, name) = text.split_once(':').map_or((text, None), |(word, name)| (word, Some(name)));
                    match (word, name) {
                        $( by!(@pattern $word name $($type)?) => by!(@read Self::$variant, name $($type)?), )*
                        _ => None,
                    }
                })
            }

            fn schema() -> serde_json::Value {
                let words = [$(by!(@regex $word $($type)?)),*].join("|");
                serde_json::json!({ "type": "string", "pattern": format!("^({words})$") })
            }

            fn show(&self) -> serde_json::Value {
                match self { $( by!(@shown $variant name $($type)?) => by!(@show $word name $($type)?).into(), )* }
            }
        }
    };
    (@example $word:literal) => { concat!("\"", $word, "\"") };
    (@example $word:literal $type:ty) => { concat!("\"", $word, ":…\"") };
    (@pattern $word:literal $name:ident) => { ($word, None) };
    (@pattern $word:literal $name:ident $type:ty) => { ($word, Some($name)) };
    (@read $variant:expr, $name:ident) => { Some($variant) };
    (@read $variant:expr, $name:ident $type:ty) => {
        Some($name).filter(|name| !name.is_empty()).and_then(|name| name.parse::<$type>().ok()).map($variant)
    };
    (@regex $word:literal) => { $word };
    (@regex $word:literal $type:ty) => { concat!($word, ":.+") };
    (@shown $variant:ident $name:ident) => { Self::$variant };
    (@shown $variant:ident $name:ident $type:ty) => { Self::$variant($name) };
    (@show $word:literal $name:ident) => { $word };
    (@show $word:literal $name:ident $type:ty) => { format!(concat!($word, ":{}"), $name) };
}

by! {
    /// What of a request decides where it goes.
    pub enum HashBy("what decides") {
        /// A header.
        Header(HeaderName) = "header",
        /// A cookie.
        Cookie(String) = "cookie",
        /// A parameter of the query.
        Query(String) = "query",
        /// A claim of the caller's: by name, or where in a token it is, such as "claim:/org/id".
        Claim(String) = "claim",
        /// Who is calling.
        Subject = "subject",
        /// Where it comes from.
        Address = "address",
        /// The path.
        Path = "path",
    }
}

by! {
    /// Which requests count together.
    pub enum CountBy("what tells callers apart") {
        /// Who callers proved to be, else where they come from.
        Caller = "caller",
        /// Who they proved to be.
        Subject = "subject",
        /// Where they come from.
        Address = "address",
        /// The value of a header.
        Header(HeaderName) = "header",
        /// A claim of the caller's: by name, or where in a token it is, such as "claim:/org/id".
        Claim(String) = "claim",
        /// The route.
        Route = "route",
        /// The service.
        Service = "service",
        /// The method.
        Method = "method",
        /// Nothing: all count together.
        Everyone = "everyone",
    }
}

by! {
    /// What of a request is looked up.
    pub enum LookUpBy("what is looked up") {
        /// The value of a header.
        Header(HeaderName) = "header",
        /// A claim of the caller's: by name, or where in a token it is, such as "claim:/org/id".
        Claim(String) = "claim",
        /// Who is calling.
        Subject = "subject",
        /// The caller's roles, first to last.
        Role = "role",
        /// The caller's scopes, first to last.
        Scope = "scope",
        /// The route.
        Route = "route",
        /// The service.
        Service = "service",
        /// The method.
        Method = "method",
    }
}

by! {
    /// What a request turned out to have cost, once its response has ended.
    pub enum SettleBy("what a request cost in the end") {
        /// A number that the service says in a header or a trailer of its response; what it cost before if it says none.
        Header(HeaderName) = "header",
        /// The bytes of the response.
        Bytes = "bytes",
        /// What it cost before if the status is 400 or more, or gRPC's is not 0, else nothing: only failures count.
        Failures = "failures",
    }
}

/// Those of `alternatives` that hold nothing.
pub(super) fn has_hole<T>(alternatives: &Alternatives<T>) -> bool {
    alternatives.iter().any(Vec::is_empty)
}
