//! YAML as trees that know where each value stands, bounded in size, depth and number of values; read into serde types, and written with
//! comments.
#![forbid(unsafe_code)]

mod parse;
mod read;
mod scalar;
mod serialize;
mod value;
mod write;

pub use parse::{Entry, FILE_BYTES_MAX, Node, NodeValue, Position, YamlError, parse, parse_all, shorten, unmarked};
pub use read::{ReadError, read};
pub use serialize::{ValueError, to_value};
pub use value::Value;
pub use write::{Comment, write};
