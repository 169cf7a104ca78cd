//! How tables and words of the file are written down.

/// A table of the file: its documentation, keys and defaults are said once, and reading, schema and masking follow.
macro_rules! section {
    (
        $(#[doc = $about:literal])*
        pub struct $name:ident {
            $( $(#[doc = $doc:literal])* $field:ident : $type:ty $(= $default:expr)?, )*
        }
    ) => {
        $(#[doc = $about])*
        #[derive(Clone, Debug, PartialEq)]
        #[non_exhaustive]
        pub struct $name {
            $( $(#[doc = $doc])* pub $field: $type, )*
        }

        impl $name {
            /// Its keys in the file.
            pub(crate) const KEYS: &'static [&'static str] = &[$(stringify!($field)),*];
        }

        impl $crate::config::read::Value for $name {
            fn read(node: &$crate::config::read::Node<'_>, reader: &mut $crate::config::read::Reader<'_>) -> Option<Self> {
                let table = reader.table(node)?;
                reader.keys(table, Self::KEYS);
                $(
                    let $field = match table.get(stringify!($field)) {
                        Some(value) => <$type as $crate::config::read::Value>::read(value, reader),
                        None => {
                            let absent = section!(@absent $type $(, $default)?);
                            if absent.is_none() {
                                let schema = <$type as $crate::config::read::Value>::schema();
                                reader.missing(node, stringify!($field), &schema);
                            }
                            absent
                        }
                    };
                )*
                Some(Self { $($field: $field?),* })
            }

            fn absent() -> Option<Self> {
                Some(Self { $($field: section!(@absent $type $(, $default)?)?),* })
            }

            fn schema() -> serde_json::Value {
                let mut properties = serde_json::Map::new();
                let mut required: Vec<&str> = Vec::new();
                $(
                    let mut one = <$type as $crate::config::read::Value>::schema();
                    let about: &[&str] = &[$($doc),*];
                    one["description"] = about.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ").into();
                    match section!(@absent $type $(, $default)?) {
                        Some(value) => {
                            let shown = $crate::config::read::Value::show(&value);
                            if !shown.is_null() && !shown.is_object() {
                                one["default"] = shown;
                            }
                        }
                        None => required.push(stringify!($field)),
                    }
                    properties.insert(stringify!($field).to_owned(), one);
                )*
                serde_json::json!({
                    "type": "object", "properties": properties, "required": required, "additionalProperties": false,
                })
            }

            fn show(&self) -> serde_json::Value {
                let mut shown = serde_json::Map::new();
                $(
                    let value = $crate::config::read::Value::show(&self.$field);
                    if !value.is_null() {
                        shown.insert(stringify!($field).to_owned(), value);
                    }
                )*
                serde_json::Value::Object(shown)
            }

            fn files(&self) -> Vec<std::path::PathBuf> {
                [$($crate::config::read::Value::files(&self.$field)),*].concat()
            }
        }
    };
    (@absent $type:ty) => { <$type as $crate::config::read::Value>::absent() };
    (@absent $type:ty, $default:expr) => { Some::<$type>($default) };
}
pub(crate) use section;

/// One of a few words.
macro_rules! words {
    (
        $(#[doc = $about:literal])*
        pub enum $name:ident { $( $(#[doc = $doc:literal])* $variant:ident = $word:literal, )* }
    ) => {
        $(#[doc = $about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum $name { $( $(#[doc = $doc])* $variant, )* }

        impl $crate::config::read::Value for $name {
            fn read(node: &$crate::config::read::Node<'_>, reader: &mut $crate::config::read::Reader<'_>) -> Option<Self> {
                match node.get_ref().as_str() {
                    $( Some($word) => return Some(Self::$variant), )*
                    Some(other) => {
                        let help = $crate::config::mistake::help(other, [$($word),*]);
                        reader.notes.push(&node.span(), format!("{other:?} is not known here"), help);
                    }
                    None => reader.wrong(node, &format!("one of {}", [$($word),*].join(", "))),
                }
                None
            }

            fn schema() -> serde_json::Value {
                serde_json::json!({ "type": "string", "enum": [$($word),*] })
            }

            fn show(&self) -> serde_json::Value {
                match self { $( Self::$variant => $word.into(), )* }
            }
        }
    };
}
pub(crate) use words;

/// What is a plain value, or a table that says more.
macro_rules! shorthand {
    (
        $(#[doc = $about:literal])*
        pub struct $name:ident($table:ident);
        $short:ty, |$value:ident| $make:expr
    ) => {
        $(#[doc = $about])*
        #[derive(Clone, Debug, PartialEq)]
        pub struct $name(pub $table);

        impl $crate::config::read::Value for $name {
            fn read(node: &$crate::config::read::Node<'_>, reader: &mut $crate::config::read::Reader<'_>) -> Option<Self> {
                if node.get_ref().is_str() {
                    let $value = <$short as $crate::config::read::Value>::read(node, reader)?;
                    return Some(Self($make));
                }
                <$table as $crate::config::read::Value>::read(node, reader).map(Self)
            }

            fn schema() -> serde_json::Value {
                let short = <$short as $crate::config::read::Value>::schema();
                serde_json::json!({ "anyOf": [short, <$table as $crate::config::read::Value>::schema()] })
            }

            fn show(&self) -> serde_json::Value {
                $crate::config::read::Value::show(&self.0)
            }

            fn files(&self) -> Vec<std::path::PathBuf> {
                $crate::config::read::Value::files(&self.0)
            }
        }
    };
}
pub(crate) use shorthand;
