//! YAML as a tree that knows where each value stands, bounded in size, depth and number of values.

use core::fmt;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::rc::Rc;

use saphyr_parser::{Event, Parser, ScalarStyle};
use serde::Serialize;
use thiserror::Error;

/// Bytes of a file that are read at most; configurations and manifests have some kilobytes.
pub const FILE_BYTES_MAX: usize = 1 << 20;
const DEPTH_MAX: usize = 64;
const VALUES_MAX: usize = 100_000;
/// Bytes of text in documents that are walked, those that aliases repeat counted each time.
const REPEATED_BYTES_MAX: usize = 8 << 20;

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
    #[error("it has {bytes} bytes, at most {FILE_BYTES_MAX} are read: name a configuration or manifest")]
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
    #[error("{at}: values are nested more than {DEPTH_MAX} deep: configurations need twenty")]
    TooDeep {
        /// Where.
        at: Position,
    },
    /// More values than any configuration has, those that aliases repeat included where they matter.
    #[error("{at}: more than {VALUES_MAX} values: name a configuration or manifest")]
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
    /// Aliases that make much of little.
    #[error("{at}: aliases repeat more than {REPEATED_BYTES_MAX} bytes of text: repeat less")]
    Repeated {
        /// In which document.
        at: Position,
    },
    /// More than one document.
    #[error("{at}: a second document begins: an engine configuration is one document")]
    Documents {
        /// Where.
        at: Position,
    },
}

impl YamlError {
    /// Where it is, if at one place.
    pub fn at(&self) -> Option<Position> {
        match self {
            YamlError::TooLong { .. } => None,
            YamlError::Syntax { at, .. }
            | YamlError::TooDeep { at }
            | YamlError::TooMany { at }
            | YamlError::Alias { at }
            | YamlError::Repeated { at }
            | YamlError::Documents { at } => Some(*at),
        }
    }
}

/// A value and where it begins.
#[derive(Debug)]
pub struct Node {
    /// Where.
    pub at: Position,
    /// What.
    pub value: NodeValue,
    /// Values in it and itself, those that aliases repeat counted each time.
    pub values: usize,
    /// Bytes of their text, likewise.
    pub bytes: usize,
    /// Levels of it, its own included.
    depth: usize,
}

/// What a value is. Aliases share what they stand for, so a tree never takes more memory than its text accounts for.
#[derive(Debug)]
pub enum NodeValue {
    /// A word or text.
    Scalar {
        /// Without its quotes.
        text: String,
        /// Without quotes, so that `null` or `true` mean what they say.
        plain: bool,
    },
    /// A list.
    Sequence(Vec<Rc<Node>>),
    /// Keys and values, in order.
    Mapping(Vec<Entry>),
}

/// A key and its value.
pub type Entry = (Rc<Node>, Rc<Node>);

impl Node {
    /// What it is, for messages.
    pub fn describe(&self) -> String {
        match &self.value {
            NodeValue::Scalar { text, .. } => format!("`{}`", shorten(text)),
            NodeValue::Sequence(_) => "a list".to_owned(),
            NodeValue::Mapping(_) => "a mapping".to_owned(),
        }
    }

    /// A scalar's text.
    pub fn text(&self) -> Option<&str> {
        match &self.value {
            NodeValue::Scalar { text, .. } => Some(text),
            _ => None,
        }
    }

    /// Whether it is nothing, in one of YAML's words for it.
    pub fn is_null(&self) -> bool {
        matches!(&self.value, NodeValue::Scalar { text, plain: true } if matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL"))
    }

    /// The value of the last entry with this key, and the key, as PyYAML takes it.
    pub fn entry(&self, key: &str) -> Option<(&Rc<Node>, &Rc<Node>)> {
        let NodeValue::Mapping(entries) = &self.value else { return None };
        entries.iter().rev().find(|(name, _)| name.text() == Some(key)).map(|(name, value)| (name, value))
    }
}

/// A text without the marks of UTF-8 that editors put before a file, also where such files were put together: they are no part of a first key.
pub fn unmarked(text: &str) -> Cow<'_, str> {
    const MARK: char = '\u{feff}';
    if !text.contains(MARK) {
        return Cow::Borrowed(text);
    }
    text.split_inclusive('\n').map(|line| line.trim_start_matches(MARK)).collect()
}

/// The first characters of what somebody wrote, for messages.
pub fn shorten(text: &str) -> String {
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
        let depth = 1 + self.items.iter().map(|item| item.depth).max().unwrap_or(0);
        let values = self.items.iter().fold(1, |sum: usize, item| sum.saturating_add(item.values));
        let bytes = self.items.iter().fold(0, |sum: usize, item| sum.saturating_add(item.bytes));
        let value = if self.mapping {
            let mut entries = Vec::with_capacity(self.items.len() / 2);
            let mut items = self.items.into_iter();
            while let (Some(key), Some(value)) = (items.next(), items.next()) {
                entries.push((key, value));
            }
            NodeValue::Mapping(entries)
        } else {
            NodeValue::Sequence(self.items)
        };
        Rc::new(Node { at: self.at, value, values, bytes, depth })
    }
}

/// The only document of a text; `None` when it is empty. Aliases may repeat as much as they like: what they stand for is shared.
pub fn parse(text: &str) -> Result<Option<Rc<Node>>, YamlError> {
    Ok(documents(text, 1)?.pop())
}

/// The documents of a text, empty ones left out. What aliases repeat is counted, so that a tree can be walked without being shared.
pub fn parse_all(text: &str) -> Result<Vec<Rc<Node>>, YamlError> {
    let documents: Vec<Rc<Node>> = documents(text, usize::MAX)?.into_iter().filter(|node| !node.is_null()).collect();
    let (mut values, mut bytes) = (0usize, 0usize);
    for document in &documents {
        values = values.saturating_add(document.values);
        bytes = bytes.saturating_add(document.bytes);
        if values > VALUES_MAX {
            return Err(YamlError::TooMany { at: document.at });
        }
        if bytes > REPEATED_BYTES_MAX {
            return Err(YamlError::Repeated { at: document.at });
        }
    }
    Ok(documents)
}

fn documents(text: &str, limit: usize) -> Result<Vec<Rc<Node>>, YamlError> {
    if text.len() > FILE_BYTES_MAX {
        return Err(YamlError::TooLong { bytes: text.len() });
    }
    let text = &unmarked(text)[..];
    let mut open: Vec<Open> = Vec::new();
    let mut anchors: BTreeMap<usize, Rc<Node>> = BTreeMap::new();
    let mut roots: Vec<Rc<Node>> = Vec::new();
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
                if documents > limit {
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
                let bytes = text.len();
                let value = NodeValue::Scalar { text: text.into_owned(), plain: style == ScalarStyle::Plain };
                (anchor, Rc::new(Node { at, value, values: 1, bytes, depth: 1 }))
            }
            Event::Alias(anchor) => (0, anchors.get(&anchor).cloned().ok_or(YamlError::Alias { at })?),
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => continue,
        };
        values += 1;
        if values > VALUES_MAX {
            return Err(YamlError::TooMany { at });
        }
        // Aliases nest without being opened here.
        if open.len() + node.depth > DEPTH_MAX + 1 {
            return Err(YamlError::TooDeep { at });
        }
        if anchor > 0 {
            anchors.insert(anchor, Rc::clone(&node));
        }
        match open.last_mut() {
            Some(parent) => parent.items.push(node),
            None => roots.push(node),
        }
    }
    Ok(roots)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aliases_nest_no_deeper_than_what_is_written_out() {
        let chain = |links: usize| {
            let links = (1..links).map(|link| format!("- &a{link} [*a{}]\n", link - 1));
            format!("- &a0 [x]\n{}", links.collect::<String>())
        };
        assert!(parse_all(&chain(DEPTH_MAX - 1)).is_ok());
        assert!(matches!(parse_all(&chain(DEPTH_MAX + 1)), Err(YamlError::TooDeep { .. })));
        assert!(matches!(parse_all(&chain(40_000)), Err(YamlError::TooDeep { .. })));
    }
}
