//! UCX's tables of protocols by size: `UCX_PROTO_INFO=y` or `used`, and the end of what `ucp_ep_print_info` writes.

use std::collections::BTreeMap;
use std::fmt;

/// Tables of one log that may be interleaved, one per thread that writes.
const WRITERS_MAX: usize = 4096;

/// One row: how one operation moves so many bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProtocolRow {
    /// The context and configuration: `ctxA intra-node cfg#0`.
    pub configuration: String,
    /// What is done: `remote memory write by ucp_put* from host memory to host`.
    pub operation: String,
    /// The smallest size, in bytes.
    pub from: u64,
    /// The largest, in bytes; the largest number for UCX's `inf`.
    pub to: u64,
    /// UCX's words: `zero-copy`, `copy-in`, `software emulation`, …
    pub description: String,
    /// UCX is not certain yet.
    pub uncertain: bool,
    /// Over which lanes, in UCX's words.
    pub lanes: String,
    /// How often it was used, where UCX counts (`UCX_PROTO_INFO=used`).
    pub count: Option<u64>,
}

impl ProtocolRow {
    /// `put` or `get`, if that is what it does: only these move KV.
    pub fn verb(&self) -> Option<&'static str> {
        let does = |words| self.operation.starts_with(words);
        if does("remote memory write by") {
            Some("put")
        } else if does("remote memory read by") {
            Some("get")
        } else {
            None
        }
    }

    /// Whether it is how that many bytes move.
    pub fn covers(&self, bytes: u64) -> bool {
        (self.from..=self.to).contains(&bytes)
    }

    /// Whether the device itself moves the bytes, from and to where they belong.
    pub fn is_zero_copy(&self) -> bool {
        matches!(self.description.as_str(), "zero-copy" | "multi-frag zero-copy")
    }

    /// Whether UCX moves them in messages that the peer's processor unpacks, though remote memory was to be read or written.
    pub fn is_emulated(&self) -> bool {
        self.description == "software emulation"
    }

    fn parse(table: &Table, cells: &[&str]) -> Option<ProtocolRow> {
        let of = |name: &str| cells.get(table.columns.iter().position(|column| column == name)?).copied();
        let (from, to) = of("Range")?.split_once("..")?;
        let description = of("Description")?;
        let certain = description.trim_start_matches("(?)").trim_start();
        Some(ProtocolRow {
            configuration: table.configuration.clone(),
            operation: table.operation.clone(),
            from: from.parse().ok()?,
            to: if to == "inf" { u64::MAX } else { to.parse().ok()? },
            description: certain.to_owned(),
            uncertain: certain.len() < description.len(),
            lanes: of("Config")?.to_owned(),
            count: of("Count").and_then(|count| count.parse().ok()),
        })
    }
}

impl fmt::Display for ProtocolRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}..", self.verb().unwrap_or(&self.operation), self.from)?;
        match self.to {
            u64::MAX => f.write_str("inf")?,
            to => write!(f, "{to}")?,
        }
        write!(f, " bytes: {} on {}", self.description, self.lanes)?;
        self.count.map_or(Ok(()), |count| write!(f, ", used {count} times"))
    }
}

/// Reads tables line by line. Tables of several threads may be interleaved: each line says whose it is.
#[derive(Debug, Default)]
pub struct ProtocolReader {
    tables: BTreeMap<String, Table>,
}

/// What a writer is in the middle of.
#[derive(Debug, Default)]
struct Table {
    /// The last two lines of one cell: a table's title, unless something else follows.
    titles: [String; 2],
    configuration: String,
    operation: String,
    /// None while it is not a table of protocols.
    columns: Vec<String>,
}

impl ProtocolReader {
    /// Takes the next line; the row that it is, if it is one.
    pub fn take(&mut self, line: &str) -> Option<ProtocolRow> {
        let (prefix, rest) = line.split_once('|')?;
        let inside = rest.trim_end().strip_suffix('|')?;
        let writer = writer(prefix);
        if self.tables.len() >= WRITERS_MAX && !self.tables.contains_key(&writer) {
            return None;
        }
        let table = self.tables.entry(writer).or_default();
        let cells: Vec<&str> = inside.split('|').map(str::trim).collect();
        match cells.as_slice() {
            [title] => {
                let [_, before] = std::mem::take(&mut table.titles);
                table.titles = [before, (*title).to_owned()];
                table.columns.clear();
                None
            }
            cells if cells.contains(&"Range") => {
                [table.configuration, table.operation] = std::mem::take(&mut table.titles);
                table.columns = cells.iter().map(|cell| (*cell).to_owned()).collect();
                None
            }
            cells => {
                table.titles = Default::default();
                ProtocolRow::parse(table, cells)
            }
        }
    }
}

/// `[host:pid:tid]` of what stands before a row, or nothing.
fn writer(prefix: &str) -> String {
    let mut brackets = prefix.split('[').filter_map(|part| part.split(']').next());
    brackets.rfind(|part| part.matches(':').count() == 2).unwrap_or_default().chars().take(128).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_of_two_threads_do_not_mix() {
        let log = "[1.0] [h:1:0]  | a self cfg#0 |\n[1.0] [h:2:0]  | b self cfg#0 |\n\
            [1.0] [h:1:0]  | remote memory write by ucp_put* |\n[1.0] [h:2:0]  | remote memory read by ucp_get* |\n\
            [1.0] [h:2:0]  | Range | Description | Config |\n[1.0] [h:1:0]  | Count | Range | Description | Config |\n\
            [1.0] [h:2:0]  | 0..inf | zero-copy | srd/a:1 |\n[1.0] [h:1:0]  | 3 | 0..7 | software emulation | tcp/lo |\n";
        let mut reader = ProtocolReader::default();
        let rows: Vec<_> = log.lines().filter_map(|line| reader.take(line)).map(|row| row.to_string()).collect();
        assert_eq!(
            rows,
            [
                "get of 0..inf bytes: zero-copy on srd/a:1",
                "put of 0..7 bytes: software emulation on tcp/lo, used 3 times"
            ]
        );
    }

    #[test]
    fn what_has_no_heading_is_no_row() {
        let mut reader = ProtocolReader::default();
        for line in ["", "| 1..2 | zero-copy | x |", "|", "||", "| Range | Description |", "| 1..x | y |", "| 1..2 |"] {
            assert_eq!(reader.take(line), None, "{line}");
        }
    }
}
