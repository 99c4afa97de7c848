//! What UCX says of itself in its log, read back: which lanes it chose, and how it would move how many bytes.
//!
//! The line that operators look for, `… rma_am(srd/rdmap40s0:1)  am(…)`, names lanes (E3). It shows neither that reads and writes are
//! zero-copy (the protocol table does, E4) nor that bytes went over the device (its counters do, E5): srd is always under `rma_am`, emulated or
//! not, and the line of an endpoint to oneself looks the same.

/// Bytes of a message after which UCX cuts its line of lanes.
const LINE_BYTES_MAX: usize = 255;

/// Where UCX thinks that the peer is. `inter-node` is told from device addresses: two devices of one host have that word, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locality {
    /// The worker itself.
    Oneself,
    /// This host.
    IntraNode,
    /// Another device, mostly of another host.
    InterNode,
}

/// A line of `UCX_LOG_LEVEL=info` that lists the lanes of an endpoint's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneLine {
    /// The context's name, which UCX before 1.14 does not print.
    pub context: Option<String>,
    /// Where the peer is, which UCX before 1.14 does not print.
    pub locality: Option<Locality>,
    /// The number of the configuration in its worker.
    pub configuration: u32,
    /// Per use, in UCX's words and order, the lanes as `transport/device`.
    pub uses: Vec<(String, Vec<String>)>,
    /// UCX cut the line: there are more lanes than these.
    pub truncated: bool,
}

impl LaneLine {
    /// Reads a line of a log; `None` for any other line.
    pub fn parse(line: &str) -> Option<LaneLine> {
        let message = line.split_once(" UCX  INFO ").map(|(_, message)| message.trim_start())?;
        let (head, mut rest, known) = match message.split_once("cfg#") {
            Some((head, rest)) => (head, rest, true),
            None => (message.split_once("ep_cfg[")?.0, message.split_once("ep_cfg[")?.1, false),
        };
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let configuration = rest.get(..digits)?.parse().ok()?;
        rest = rest.get(digits..)?.trim_start_matches([']', ':', ' ']);
        let mut words = head.split_whitespace();
        let (context, locality) = match (known, words.next(), words.next()) {
            (false, ..) => (None, None),
            (true, Some(word), None) => (None, Some(locality(word)?)),
            (true, Some(name), Some(word)) => (Some(name.to_owned()), Some(locality(word)?)),
            (true, None, _) => return None,
        };
        let (mut uses, mut truncated) = (Vec::new(), false);
        while !rest.trim_matches([' ', ';']).is_empty() {
            let Some((name, behind)) = rest.split_once('(') else {
                // Cut within a name.
                truncated = message.len() >= LINE_BYTES_MAX;
                break;
            };
            let (inside, next) = match behind.split_once(')') {
                Some((inside, next)) => (inside, next),
                None => {
                    truncated = true;
                    // The last word may be half a name.
                    (behind.trim_end().rsplit_once(' ').map_or("", |(whole, _)| whole), "")
                }
            };
            uses.push((
                name.trim_matches([' ', ';']).to_owned(),
                inside.split_whitespace().map(str::to_owned).collect(),
            ));
            rest = next;
        }
        (!uses.is_empty()).then_some(LaneLine { context, locality, configuration, uses, truncated })
    }

    /// Every lane once, in order.
    pub fn lanes(&self) -> Vec<&str> {
        let mut lanes = Vec::new();
        for lane in self.uses.iter().flat_map(|(_, lanes)| lanes) {
            if !lanes.contains(&lane.as_str()) {
                lanes.push(lane.as_str());
            }
        }
        lanes
    }
}

fn locality(word: &str) -> Option<Locality> {
    match word {
        "self" => Some(Locality::Oneself),
        "intra-node" => Some(Locality::IntraNode),
        "inter-node" => Some(Locality::InterNode),
        _ => None,
    }
}

/// A table of `UCX_PROTO_INFO=y`: how one operation moves how many bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProtocolTable {
    /// The context and configuration: `ctxA intra-node cfg#0`.
    pub configuration: String,
    /// What is done: `remote memory write by ucp_put* from host memory to host`.
    pub operation: String,
    /// By size.
    pub rows: Vec<ProtocolRow>,
}

/// One row of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProtocolRow {
    /// The smallest size, in bytes.
    pub from: u64,
    /// The largest, unless there is none.
    pub to: Option<u64>,
    /// UCX's words: `zero-copy`, `copy-in`, `software emulation`, …
    pub description: String,
    /// Over which lanes.
    pub lanes: String,
    /// How often it was used, where UCX counts (`UCX_PROTO_INFO=used`).
    pub count: Option<u64>,
}

impl ProtocolTable {
    /// Every table in a log, or in what `ucp_ep_print_info` wrote.
    pub fn parse_all(log: &str) -> Vec<ProtocolTable> {
        let mut tables: Vec<ProtocolTable> = Vec::new();
        let mut titles: Vec<String> = Vec::new();
        let mut columns: Vec<String> = Vec::new();
        for line in log.lines() {
            let Some(start) = line.find(['|', '+']) else {
                titles.clear();
                columns.clear();
                continue;
            };
            let line = line.get(start..).unwrap_or_default().trim_end();
            let Some(inside) = line.strip_prefix('|').and_then(|line| line.strip_suffix('|')) else { continue };
            let cells: Vec<String> = inside.split('|').map(|cell| cell.trim().to_owned()).collect();
            if let [title] = cells.as_slice() {
                if !columns.is_empty() {
                    titles.clear();
                    columns.clear();
                }
                titles.push(title.clone());
                continue;
            }
            if cells.iter().any(|cell| cell == "Range") {
                if let [configuration, operation] = titles.as_slice() {
                    let (configuration, operation) = (configuration.clone(), operation.clone());
                    tables.push(ProtocolTable { configuration, operation, rows: Vec::new() });
                    columns = cells;
                }
                continue;
            }
            let row = ProtocolRow::parse(&columns, &cells);
            if let (Some(row), Some(table)) = (row, tables.last_mut()) {
                table.rows.push(row);
            }
        }
        tables
    }

    /// How it moves so many bytes.
    pub fn row_for(&self, bytes: u64) -> Option<&ProtocolRow> {
        self.rows.iter().find(|row| row.from <= bytes && row.to.is_none_or(|to| bytes <= to))
    }
}

impl ProtocolRow {
    fn parse(columns: &[String], cells: &[String]) -> Option<ProtocolRow> {
        let of = |name: &str| cells.get(columns.iter().position(|column| column == name)?).map(String::as_str);
        let (from, to) = of("Range")?.split_once("..")?;
        Some(ProtocolRow {
            from: from.parse().ok()?,
            to: if to == "inf" { None } else { Some(to.parse().ok()?) },
            // An uncertain choice has a mark before it.
            description: of("Description")?.trim_start_matches("(?) ").to_owned(),
            lanes: of("Config")?.to_owned(),
            count: of("Count").and_then(|count| count.parse().ok()),
        })
    }

    /// Whether the device itself moves the bytes, from and to where they belong.
    pub fn is_zero_copy(&self) -> bool {
        matches!(self.description.as_str(), "zero-copy" | "multi-frag zero-copy")
    }

    /// Whether UCX moves them in messages that the peer's processor unpacks, though remote memory was to be read or written.
    pub fn is_emulated(&self) -> bool {
        self.description == "software emulation"
    }
}
