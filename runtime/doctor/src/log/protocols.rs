//! UCX's tables of protocols by size (`UCX_PROTO_INFO`), for what moves KV: put and get.

/// One row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Protocol {
    pub(super) line: usize,
    pub(super) operation: &'static str,
    from: u64,
    /// Inclusive; the largest number for `inf`.
    to: u64,
    pub(super) description: String,
    config: String,
}

impl Protocol {
    pub(super) fn covers(&self, bytes: u64) -> bool {
        (self.from..=self.to).contains(&bytes)
    }

    pub(super) fn shown(&self) -> String {
        let to = if self.to == u64::MAX { "inf".to_owned() } else { self.to.to_string() };
        format!(
            "line {}: {} of {}..{to} bytes: {} on {}",
            self.line, self.operation, self.from, self.description, self.config
        )
    }

    /// A row of the table of `operation`.
    pub(super) fn parse(text: &str, line: usize, operation: &'static str) -> Option<Protocol> {
        let mut cells = text.split('|').skip(1).map(str::trim);
        // `UCX_PROTO_INFO=used` puts a count before the range.
        let (from, to) = cells.by_ref().take(2).find_map(range)?;
        let description = cells.next()?.to_owned();
        let config = cells.next()?.to_owned();
        Some(Protocol { line, operation, from, to, description, config })
    }
}

fn range(cell: &str) -> Option<(u64, u64)> {
    let (from, to) = cell.split_once("..")?;
    let to = if to == "inf" { u64::MAX } else { to.parse().ok()? };
    Some((from.parse().ok()?, to))
}

/// The operation that a table's heading names; `Some(None)` for one that does not move KV.
pub(super) fn heading(text: &str) -> Option<Option<&'static str>> {
    if !text.contains('|') {
        return None;
    }
    for (words, operation) in [
        ("remote memory write by", Some("put")),
        ("remote memory read by", Some("get")),
        ("active message by", None),
        ("tagged message by", None),
        ("stream message by", None),
        ("Endpoint Config #", None),
        ("Available Transports and Devices", None),
    ] {
        if text.contains(words) {
            return Some(operation);
        }
    }
    None
}
