//! Strict JSON: an object without duplicate members, not too deep.
//!
//! RFC 8259 leaves duplicate members to the parser, and two parsers that choose differently are how a token comes to mean
//! one thing here and another behind us. So they are refused, at every level.

use std::borrow::Cow;
use std::cell::Cell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// How deep what others wrote may nest.
pub(crate) const MAX_DEPTH: usize = 16;

/// What `serde_json` hands out in place of a number when its feature `arbitrary_precision` is on somewhere in the tree.
const NUMBER: &str = "$serde_json::private::Number";

/// How many members [`members`] reads, and how many elements and members within them: what is short needs no tree to find a
/// duplicate, and what nobody has signed for yet is not worth more.
const MAX_MEMBERS: usize = 32;

/// One member of an object that is only looked at.
#[derive(Debug, PartialEq)]
pub(crate) enum Member<'de> {
    Text(Cow<'de, str>),
    Other,
}

struct Strict<'a> {
    depth: usize,
    /// How many elements and members there may still be.
    left: &'a Cell<usize>,
}

struct Members;

struct Text;

struct Any<'a>(&'a Cell<usize>);

/// Reads one object and nothing behind it.
pub(crate) fn object(bytes: &[u8]) -> Option<Map<String, Value>> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = Strict { depth: MAX_DEPTH, left: &Cell::new(usize::MAX) }.deserialize(&mut json).ok()?;
    json.end().ok()?;
    match value {
        Value::Object(object) => Some(object),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => None,
    }
}

/// Reads one object as strictly, but its members in their order, without copying their text.
pub(crate) fn members(bytes: &[u8]) -> Option<Vec<(Cow<'_, str>, Member<'_>)>> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let members = json.deserialize_map(Members).ok()?;
    json.end().ok()?;
    Some(members)
}

// === impl Strict ===

impl Strict<'_> {
    fn deeper<E: Error>(&self) -> Result<Self, E> {
        let depth = self.depth.checked_sub(1).ok_or_else(|| E::custom("too deep"))?;
        self.left.set(self.left.get().checked_sub(1).ok_or_else(|| E::custom("too many"))?);
        Ok(Self { depth, left: self.left })
    }
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("not finite"))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E: Error>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = seq.next_element_seed(self.deeper()?)? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == NUMBER {
                let number: String = map.next_value()?;
                return number.parse().map(Value::Number).map_err(A::Error::custom);
            }
            if object.contains_key(&name) {
                return Err(A::Error::custom("duplicate member"));
            }
            let value = map.next_value_seed(self.deeper()?)?;
            object.insert(name, value);
        }
        Ok(Value::Object(object))
    }
}

// === impl Members ===

impl<'de> Visitor<'de> for Members {
    type Value = Vec<(Cow<'de, str>, Member<'de>)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut members, left) = (Vec::with_capacity(8), Cell::new(MAX_MEMBERS));
        while let Some(name) = map.next_key_seed(Text)? {
            if members.len() == MAX_MEMBERS || members.iter().any(|(have, _)| *have == name) {
                return Err(A::Error::custom("duplicate member, or too many"));
            }
            members.push((name, map.next_value_seed(Any(&left))?));
        }
        Ok(members)
    }
}

// === impl Text ===

impl<'de> DeserializeSeed<'de> for Text {
    type Value = Cow<'de, str>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Cow<'de, str>, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for Text {
    type Value = Cow<'de, str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Cow<'de, str>, E> {
        Ok(Cow::Borrowed(text))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Cow<'de, str>, E> {
        Ok(Cow::Owned(text.to_owned()))
    }
}

// === impl Any ===

impl<'de> DeserializeSeed<'de> for Any<'_> {
    type Value = Member<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Member<'de>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Any<'_> {
    type Value = Member<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Member<'de>, E> {
        Ok(Member::Text(Cow::Borrowed(text)))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Member<'de>, E> {
        Ok(Member::Text(Cow::Owned(text.to_owned())))
    }

    fn visit_unit<E: Error>(self) -> Result<Member<'de>, E> {
        Ok(Member::Other)
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Member<'de>, E> {
        Ok(Member::Other)
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<Member<'de>, E> {
        Ok(Member::Other)
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<Member<'de>, E> {
        Ok(Member::Other)
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Member<'de>, E> {
        Ok(Member::Other)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Member<'de>, A::Error> {
        Strict { depth: MAX_DEPTH - 1, left: self.0 }.visit_seq(seq).map(|_| Member::Other)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Member<'de>, A::Error> {
        Strict { depth: MAX_DEPTH - 1, left: self.0 }.visit_map(map).map(|_| Member::Other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn duplicate_members_are_refused_at_every_level() {
        assert!(object(br#"{"a":1,"b":2}"#).is_some());
        for json in [r#"{"a":1,"a":1}"#, r#"{"x":{"a":1,"a":2}}"#, r#"{"x":[{"a":1,"\u0061":2}]}"#] {
            assert!(object(json.as_bytes()).is_none(), "{json}");
        }
    }

    #[test]
    fn only_one_object_of_bounded_depth_is_read() {
        for json in
            ["", "null", "[]", "1", "\"a\"", "{} {}", "{}x", "{\"a\":1,}", "{'a':1}", "{\"a\":NaN}", "{\"a\":1e999}"]
        {
            assert!(object(json.as_bytes()).is_none(), "{json}");
        }
        assert!(object(br#"{"a":"\ud800"}"#).is_none(), "lone surrogate");
        assert!(object(b"{\"a\":\"\xff\"}").is_none(), "not UTF-8");
        let nested = |depth: usize| format!("{{\"a\":{}1{}}}", "[".repeat(depth), "]".repeat(depth));
        assert!(object(nested(MAX_DEPTH - 1).as_bytes()).is_some());
        for depth in [MAX_DEPTH, 100, 100_000] {
            assert!(object(nested(depth).as_bytes()).is_none());
        }
    }

    #[test]
    fn members_are_read_as_strictly_as_an_object_and_there_are_few() {
        for json in ["{}", r#"{"a":"b","\u0062":"\n","c":[1,{"d":null}],"e":-1.5}"#] {
            assert!(members(json.as_bytes()).is_some(), "{json}");
        }
        for json in
            ["", "[]", "\"a\"", "{}x", r#"{"a":1,"\u0061":2}"#, r#"{"a":[{"b":1,"b":2}]}"#, r#"{"a":1e999}"#, "{1:2}"]
        {
            assert!(members(json.as_bytes()).is_none(), "{json}");
        }
        let nested = |depth: usize| format!("{{\"a\":{}1{}}}", "[".repeat(depth), "]".repeat(depth));
        assert!(members(nested(MAX_DEPTH - 1).as_bytes()).is_some());
        let within = |count: usize| format!("{{\"a\":[{}],\"b\":[]}}", vec!["1"; count].join(","));
        assert!(members(within(MAX_MEMBERS - 2).as_bytes()).is_some());
        assert!(members(within(MAX_MEMBERS + 1).as_bytes()).is_none());
        assert!(members(nested(MAX_DEPTH).as_bytes()).is_none());
        let many =
            |count: usize| format!("{{{}}}", (0..count).map(|n| format!("\"{n}\":0")).collect::<Vec<_>>().join(","));
        assert!(members(many(MAX_MEMBERS).as_bytes()).is_some());
        assert!(members(many(MAX_MEMBERS + 1).as_bytes()).is_none());
    }

    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_filter("finite", |number| number.is_finite()).prop_map(Value::from),
            ".*".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::hash_map(".*", inner, 0..5).prop_map(|map| map.into_iter().collect()),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(values in prop::collection::hash_map("[a-z]{0,8}", json(), 0..6)) {
            let map: Map<String, Value> = values.into_iter().collect();
            let text = serde_json::to_vec(&map).unwrap();
            // Compared with what serde_json reads, as its floats may lose the last digit.
            let expected: Map<String, Value> = serde_json::from_slice(&text).unwrap();
            prop_assert_eq!(object(&text).unwrap(), expected);
        }

        #[test]
        fn members_are_the_objects(text in "\\{(\"[abc\\\\u0]{0,7}\":(\"[a\\\\n]{0,3}\"|\\[1?\\]|-?[01]{1,2}|null|\\{\"a\":1(,\"a\":2)?\\}),?){0,3}\\}.?") {
            let listed = members(text.as_bytes());
            let object = object(text.as_bytes());
            prop_assert_eq!(listed.is_some(), object.is_some());
            for (name, member) in listed.into_iter().flatten() {
                let text = match member {
                    Member::Text(text) => Some(text),
                    Member::Other => None,
                };
                prop_assert_eq!(object.as_ref().unwrap()[&*name].as_str(), text.as_deref());
            }
        }
    }
}
