//! Values as YAML text.

use crate::scalar::is_plain;
use crate::value::Value;

/// Something to say above an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Comment {
    /// The keys and indices that lead to the entry, each after a `/`.
    pub path: String,
    /// What to say, in lines of any length.
    pub text: String,
}

/// Columns that comments fill.
const WIDTH: usize = 110;
/// YAML takes what stands before a colon for a key up to 1,024 characters; a longer one has to be marked.
const KEY_BYTES_MAX: usize = 1000;

/// One document, in block style, with comments above the entries that they name.
pub fn write(value: &Value, comments: &[Comment]) -> String {
    let mut writer = Writer { text: String::new(), comments };
    writer.comment("", 0);
    match value {
        Value::Map(entries) if !entries.is_empty() => writer.map(entries, 0, "", false),
        Value::List(items) if !items.is_empty() => writer.list(items, 0, ""),
        other => writer.text.push_str(&(scalar(other) + "\n")),
    }
    writer.text
}

struct Writer<'a> {
    text: String,
    comments: &'a [Comment],
}

impl Writer<'_> {
    /// `started`: the first key stands behind a dash.
    fn map(&mut self, entries: &[(String, Value)], indent: usize, path: &str, started: bool) {
        for (index, (key, value)) in entries.iter().enumerate() {
            let path = format!("{path}/{key}");
            if !(started && index == 0) {
                self.comment(&path, indent);
                self.indent(indent);
            }
            let key = text(key);
            if key.len() > KEY_BYTES_MAX {
                self.text.push_str("? ");
            }
            self.text.push_str(&key);
            if key.len() > KEY_BYTES_MAX {
                self.text.push('\n');
                self.indent(indent);
            }
            self.text.push(':');
            self.value(value, indent, &path);
        }
    }

    fn list(&mut self, items: &[Value], indent: usize, path: &str) {
        for (index, item) in items.iter().enumerate() {
            let path = format!("{path}/{index}");
            self.comment(&path, indent);
            self.indent(indent);
            match item {
                Value::Map(entries) if !entries.is_empty() => {
                    self.text.push_str("- ");
                    self.map(entries, indent + 2, &path, true);
                }
                Value::List(items) if !items.is_empty() => {
                    self.text.push_str("-\n");
                    self.list(items, indent + 2, &path);
                }
                other => self.text.push_str(&format!("- {}\n", scalar(other))),
            }
        }
    }

    fn value(&mut self, value: &Value, indent: usize, path: &str) {
        match value {
            Value::Map(entries) if !entries.is_empty() => {
                self.text.push('\n');
                self.map(entries, indent + 2, path, false);
            }
            Value::List(items) if !items.is_empty() => {
                self.text.push('\n');
                self.list(items, indent + 2, path);
            }
            other => self.text.push_str(&format!(" {}\n", scalar(other))),
        }
    }

    fn comment(&mut self, path: &str, indent: usize) {
        for comment in self.comments.iter().filter(|comment| comment.path == path) {
            let mut line = String::new();
            for word in comment.text.split_whitespace() {
                if !line.is_empty() && line.len() + word.len() + indent + 3 > WIDTH {
                    self.line(indent, &line);
                    line.clear();
                }
                line.push(' ');
                line.push_str(word);
            }
            self.line(indent, &line);
        }
    }

    fn line(&mut self, indent: usize, line: &str) {
        self.indent(indent);
        self.text.push_str(&format!("#{line}\n"));
    }

    fn indent(&mut self, indent: usize) {
        self.text.extend(core::iter::repeat_n(' ', indent));
    }
}

fn scalar(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Integer(value) => value.to_string(),
        // With its point, so that it is read as what it is.
        Value::Float(value) => format!("{value:?}"),
        Value::Text(value) => text(value),
        Value::List(_) => "[]".to_owned(),
        Value::Map(_) => "{}".to_owned(),
    }
}

fn text(text: &str) -> String {
    if is_plain(text) { text.to_owned() } else { quoted(text) }
}

fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for letter in text.chars() {
        match letter {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\t' => quoted.push_str("\\t"),
            '\r' => quoted.push_str("\\r"),
            letter if letter.is_control() || matches!(letter, '\u{2028}' | '\u{2029}' | '\u{feff}') => {
                quoted.push_str(&format!("\\U{:08x}", u32::from(letter)));
            }
            letter => quoted.push(letter),
        }
    }
    quoted.push('"');
    quoted
}
