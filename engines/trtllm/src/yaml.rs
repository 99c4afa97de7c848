//! YAML as a tree that knows where each value stands, bounded in size, depth and number of values.

use core::fmt;
use std::collections::BTreeMap;
use std::rc::Rc;

use saphyr_parser::{Event, Parser, ScalarStyle};
use serde::Serialize;
use thiserror::Error;

/// Bytes of a file that are read at most; engine configurations have a few kilobytes.
pub const FILE_BYTES_MAX: usize = 1 << 20;
const DEPTH_MAX: usize = 64;
const VALUES_MAX: usize = 100_000;

/// A place in a file, both numbers from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Position {
    /// The line.
    pub line: usize,
    /// The column, in characters.
    pub column: usize,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// Why a text is no tree.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum YamlError {
    /// More than [`FILE_BYTES_MAX`].
    #[error("it has {bytes} bytes, at most {FILE_BYTES_MAX} are read: name an engine configuration")]
    TooLong {
        /// Its bytes.
        bytes: usize,
    },
    /// Not YAML.
    #[error("{at}: not YAML: {reason}: correct the line")]
    Syntax {
        /// Where.
        at: Position,
        /// What the parser says.
        reason: String,
    },
    /// Values in values in values.
    #[error("{at}: values are nested more than {DEPTH_MAX} deep: an engine configuration needs five")]
    TooDeep {
        /// Where.
        at: Position,
    },
    /// More values than any configuration has.
    #[error("{at}: more than {VALUES_MAX} values: name an engine configuration")]
    TooMany {
        /// Where.
        at: Position,
    },
    /// An alias before, or inside, what it stands for.
    #[error("{at}: the alias has no finished anchor before it: write the value out")]
    Alias {
        /// Where.
        at: Position,
    },
    /// More than one document.
    #[error("{at}: a second document begins: an engine configuration is one document")]
    Documents {
        /// Where.
        at: Position,
    },
}

/// A value and where it begins.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) at: Position,
    pub(crate) value: Value,
}

/// What a value is. Aliases share what they stand for, so a tree never takes more memory than its text accounts for.
#[derive(Debug)]
pub(crate) enum Value {
    /// `plain`: without quotes, so that `null` or `true` mean what they say.
    Scalar {
        text: String,
        plain: bool,
    },
    Sequence(Vec<Rc<Node>>),
    Mapping(Vec<Entry>),
}

/// A key and its value.
pub(crate) type Entry = (Rc<Node>, Rc<Node>);

impl Node {
    /// What it is, for messages.
    pub(crate) fn describe(&self) -> String {
        match &self.value {
            Value::Scalar { text, .. } => format!("`{}`", shorten(text)),
            Value::Sequence(_) => "a list".to_owned(),
            Value::Mapping(_) => "a mapping".to_owned(),
        }
    }

    pub(crate) fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Scalar { text, .. } => Some(text),
            _ => None,
        }
    }

    pub(crate) fn is_null(&self) -> bool {
        matches!(&self.value, Value::Scalar { text, plain: true } if matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL"))
    }

    /// The value of the last entry with this key, and the key, as PyYAML takes it.
    pub(crate) fn entry(&self, key: &str) -> Option<(&Rc<Node>, &Rc<Node>)> {
        let Value::Mapping(entries) = &self.value else { return None };
        entries.iter().rev().find(|(name, _)| name.text() == Some(key)).map(|(name, value)| (name, value))
    }
}

/// The first characters of what somebody wrote, for messages.
pub(crate) fn shorten(text: &str) -> String {
    const SHOWN: usize = 60;
    let mut shown: String = text.chars().take(SHOWN).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().nth(SHOWN).is_some() {
        shown.push('…');
    }
    shown
}

/// A mapping or sequence that is not finished.
struct Open {
    at: Position,
    anchor: usize,
    mapping: bool,
    items: Vec<Rc<Node>>,
}

impl Open {
    fn close(self) -> Rc<Node> {
        let value = if self.mapping {
            let mut entries = Vec::with_capacity(self.items.len() / 2);
            let mut items = self.items.into_iter();
            while let (Some(key), Some(value)) = (items.next(), items.next()) {
                entries.push((key, value));
            }
            Value::Mapping(entries)
        } else {
            Value::Sequence(self.items)
        };
        Rc::new(Node { at: self.at, value })
    }
}

/// The only document of a text; `None` when it is empty.
pub(crate) fn parse(text: &str) -> Result<Option<Rc<Node>>, YamlError> {
    if text.len() > FILE_BYTES_MAX {
        return Err(YamlError::TooLong { bytes: text.len() });
    }
    let mut open: Vec<Open> = Vec::new();
    let mut anchors: BTreeMap<usize, Rc<Node>> = BTreeMap::new();
    let mut root: Option<Rc<Node>> = None;
    let mut documents = 0;
    let mut values = 0usize;
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|error| YamlError::Syntax {
            at: Position { line: error.marker().line(), column: error.marker().col() + 1 },
            reason: error.info().to_owned(),
        })?;
        // The parser counts columns from 0.
        let at = Position { line: span.start.line(), column: span.start.col() + 1 };
        let (anchor, node) = match event {
            Event::DocumentStart(_) => {
                documents += 1;
                if documents > 1 {
                    return Err(YamlError::Documents { at });
                }
                continue;
            }
            Event::SequenceStart(..) | Event::MappingStart(..) if open.len() >= DEPTH_MAX => {
                return Err(YamlError::TooDeep { at });
            }
            Event::SequenceStart(anchor, _) => {
                open.push(Open { at, anchor, mapping: false, items: Vec::new() });
                continue;
            }
            Event::MappingStart(anchor, _) => {
                open.push(Open { at, anchor, mapping: true, items: Vec::new() });
                continue;
            }
            Event::SequenceEnd | Event::MappingEnd => match open.pop() {
                Some(done) => (done.anchor, done.close()),
                None => continue,
            },
            Event::Scalar(text, style, anchor, _) => {
                let value = Value::Scalar { text: text.into_owned(), plain: style == ScalarStyle::Plain };
                (anchor, Rc::new(Node { at, value }))
            }
            Event::Alias(anchor) => (0, anchors.get(&anchor).cloned().ok_or(YamlError::Alias { at })?),
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => continue,
        };
        values += 1;
        if values > VALUES_MAX {
            return Err(YamlError::TooMany { at });
        }
        if anchor > 0 {
            anchors.insert(anchor, Rc::clone(&node));
        }
        match open.last_mut() {
            Some(parent) => parent.items.push(node),
            None => root = Some(node),
        }
    }
    Ok(root)
}
