//! Rows of a process on which nothing overlaps.

use std::collections::{BTreeMap, BTreeSet};

use kvferry_core::RequestId;

/// What a row shows, in the order of the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// What has no duration.
    Event,
    Fault,
    Request,
    Offer,
    Handover,
    Transfer,
}

/// Rows of one kind at most, so that those of two kinds have different numbers.
const ROWS: u64 = 100_000;

impl Kind {
    /// The number of one of its rows.
    pub(super) fn row(self, lane: u64) -> u64 {
        // Process 0 and thread 0 are the idle ones of an operating system, to whoever reads this.
        self as u64 * ROWS + lane + 1
    }

    fn name(self) -> &'static str {
        match self {
            Kind::Event => "events",
            Kind::Fault => "faults",
            Kind::Request => "requests",
            Kind::Offer => "offers",
            Kind::Handover => "handovers",
            Kind::Transfer => "transfers",
        }
    }
}

/// One phase of something.
#[derive(Clone, Debug)]
pub(super) struct Span {
    pub(super) node: usize,
    pub(super) kind: Kind,
    pub(super) lane: u64,
    pub(super) name: &'static str,
    pub(super) request: RequestId,
    pub(super) since: u64,
    /// `None` while it lasts.
    pub(super) until: Option<u64>,
}

/// All rows of all processes. Whatever begins takes the first that is free, and keeps it through all its phases.
#[derive(Clone, Debug, Default)]
pub(super) struct Lanes {
    rows: BTreeMap<(usize, Kind), Rows>,
    open: BTreeMap<(usize, Kind, u128), Span>,
}

#[derive(Clone, Debug, Default)]
struct Rows {
    free: BTreeSet<u64>,
    count: u64,
}

impl Lanes {
    /// Something begins, or its next phase does; returns the phase that is over.
    pub(super) fn phase(
        &mut self,
        node: usize,
        kind: Kind,
        key: u128,
        name: &'static str,
        request: RequestId,
        at: u64,
    ) -> Option<Span> {
        if let Some(open) = self.open.get_mut(&(node, kind, key)) {
            let before = Span { until: Some(at), ..open.clone() };
            (open.name, open.since) = (name, at);
            return Some(before);
        }
        let lane = self.take(node, kind);
        self.open.insert((node, kind, key), Span { node, kind, lane, name, request, since: at, until: None });
        None
    }

    /// Something is over; returns its last phase, if it had begun.
    pub(super) fn close(&mut self, node: usize, kind: Kind, key: u128, at: u64) -> Option<Span> {
        let span = self.open.remove(&(node, kind, key))?;
        self.put_back(node, kind, span.lane);
        Some(Span { until: Some(at), ..span })
    }

    /// All that has begun on a node, of those kinds, is over.
    pub(super) fn close_all(&mut self, node: usize, which: impl Fn(Kind) -> bool) -> Vec<Span> {
        let of_node = (node, Kind::Event, 0)..(node + 1, Kind::Event, 0);
        let keys: Vec<_> = self.open.range(of_node).map(|(key, _)| *key).filter(|(_, kind, _)| which(*kind)).collect();
        keys.into_iter()
            .filter_map(|key| {
                let span = self.open.remove(&key)?;
                self.put_back(node, span.kind, span.lane);
                Some(span)
            })
            .collect()
    }

    /// Whether it has begun.
    pub(super) fn has(&self, node: usize, kind: Kind, key: u128) -> bool {
        self.open.contains_key(&(node, kind, key))
    }

    /// The first free row.
    pub(super) fn take(&mut self, node: usize, kind: Kind) -> u64 {
        let rows = self.rows.entry((node, kind)).or_default();
        rows.free.pop_first().unwrap_or_else(|| {
            rows.count += 1;
            rows.count - 1
        })
    }

    /// A row is free again.
    pub(super) fn put_back(&mut self, node: usize, kind: Kind, lane: u64) {
        if let Some(rows) = self.rows.get_mut(&(node, kind)) {
            rows.free.insert(lane);
        }
    }

    /// The row of events is used.
    pub(super) fn use_events(&mut self, node: usize) {
        self.rows.entry((node, Kind::Event)).or_default().count = 1;
    }

    /// All rows that were used: process, number and name.
    pub(super) fn names(&self) -> Vec<(usize, u64, String)> {
        let each = self.rows.iter().flat_map(|((node, kind), rows)| {
            (0..rows.count).map(|lane| {
                let name =
                    if rows.count == 1 { kind.name().to_owned() } else { format!("{} {}", kind.name(), lane + 1) };
                (*node, kind.row(lane), name)
            })
        });
        each.collect()
    }
}
