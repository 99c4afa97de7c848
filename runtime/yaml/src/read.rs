//! Trees into serde types. An error knows the place of the innermost value that is wrong.

use core::fmt;
use std::rc::Rc;
use std::slice;

use serde::de::{DeserializeOwned, DeserializeSeed, Error, MapAccess, SeqAccess, Visitor, value::StrDeserializer};
use serde::{Deserializer, de::IntoDeserializer, forward_to_deserialize_any};

use crate::parse::{Entry, Node, NodeValue, Position};
use crate::scalar::resolve;
use crate::value::Value;

/// A value that is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadError {
    /// Where it stands.
    pub at: Position,
    /// What is wrong.
    pub reason: String,
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: correct the value", self.at, self.reason)
    }
}

impl std::error::Error for ReadError {}

/// Reads a tree of [`parse_all`](crate::parse_all) as a `T`.
pub fn read<T: DeserializeOwned>(node: &Node) -> Result<T, ReadError> {
    T::deserialize(Reader(node)).map_err(|fault| ReadError { at: fault.at.unwrap_or(node.at), reason: fault.reason })
}

/// The same without a place until one is known.
#[derive(Debug)]
struct Fault {
    at: Option<Position>,
    reason: String,
}

impl Fault {
    fn or_at(self, at: Position) -> Fault {
        Fault { at: self.at.or(Some(at)), ..self }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::error::Error for Fault {}

impl Error for Fault {
    fn custom<T: fmt::Display>(reason: T) -> Fault {
        Fault { at: None, reason: reason.to_string() }
    }
}

struct Reader<'a>(&'a Node);

impl<'de> Deserializer<'de> for Reader<'de> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let at = self.0.at;
        let read = match &self.0.value {
            NodeValue::Scalar { text, plain: false } => visitor.visit_str(text),
            NodeValue::Scalar { text, plain: true } => match resolve(text) {
                Value::Null => visitor.visit_unit(),
                Value::Bool(value) => visitor.visit_bool(value),
                Value::Integer(value) => visitor.visit_i64(value),
                Value::Float(value) => visitor.visit_f64(value),
                _ => visitor.visit_str(text),
            },
            NodeValue::Sequence(items) => visitor.visit_seq(Items(items.iter())),
            NodeValue::Mapping(entries) => visitor.visit_map(Entries { entries: entries.iter(), value: None }),
        };
        read.map_err(|fault| fault.or_at(at))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        if self.0.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_unit()
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let at = self.0.at;
        let Some(text) = self.0.text() else {
            return Err(Fault { at: Some(at), reason: format!("{} is no word", self.0.describe()) });
        };
        let word: StrDeserializer<'_, Fault> = text.into_deserializer();
        visitor.visit_enum(word).map_err(|fault| fault.or_at(at))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple tuple_struct map
        struct identifier
    }
}

struct Items<'a>(slice::Iter<'a, Rc<Node>>);

impl<'a> SeqAccess<'a> for Items<'a> {
    type Error = Fault;

    fn next_element_seed<T: DeserializeSeed<'a>>(&mut self, seed: T) -> Result<Option<T::Value>, Fault> {
        self.0.next().map(|node| seed.deserialize(Reader(node))).transpose()
    }
}

struct Entries<'a> {
    entries: slice::Iter<'a, Entry>,
    value: Option<&'a Node>,
}

impl<'a> MapAccess<'a> for Entries<'a> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'a>>(&mut self, seed: K) -> Result<Option<K::Value>, Fault> {
        let Some((key, value)) = self.entries.next() else { return Ok(None) };
        self.value = Some(value);
        // Keys are names, whatever they look like.
        let Some(text) = key.text() else {
            return Err(Fault { at: Some(key.at), reason: format!("{} is no key", key.describe()) });
        };
        let name: StrDeserializer<'_, Fault> = text.into_deserializer();
        seed.deserialize(name).map(Some).map_err(|fault| fault.or_at(key.at))
    }

    fn next_value_seed<V: DeserializeSeed<'a>>(&mut self, seed: V) -> Result<V::Value, Fault> {
        let value = self.value.take().ok_or_else(|| Fault::custom("a value without a key"))?;
        seed.deserialize(Reader(value)).map_err(|fault| fault.or_at(value.at))
    }
}
