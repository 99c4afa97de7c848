//! What will happen at a known time.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use kvferry_transport::Event;

use crate::fabric::NicId;
use crate::flow::FlowId;
use crate::link::LinkId;

/// Something that a fabric has in store.
pub(crate) enum Due {
    /// A dial reaches its NIC.
    Hello { link: LinkId },
    /// Its answer is back.
    Welcome { link: LinkId },
    /// One side hears that the other has closed the link.
    Farewell { link: LinkId, side: usize, reason: &'static str },
    /// The dialer hears that what it was given when it connected is no key any more.
    Rekeyed { link: LinkId },
    /// A post reaches the other end.
    Request { flow: FlowId },
    /// The writer hears that its push is expected.
    Grant { flow: FlowId },
    /// A slice is in place.
    Slice { slice: u64 },
    /// The writer hears that all of its push is in place.
    Done { flow: FlowId },
    /// The writer's NIC is asked by the receiver to stop.
    Stop { flow: FlowId },
    /// One end hears how the transfer ended.
    Tell { flow: FlowId, end: usize, event: Box<Event> },
    /// The owner hears of a pull's end.
    Notice { link: LinkId, event: Box<Event> },
    /// A NIC's wire is free for the next slice.
    Egress { nic: NicId },
    /// A push has waited long enough for somebody to expect it.
    Unexpected { flow: FlowId },
    /// Something of the NIC's own doing is over.
    Report { nic: NicId, event: Box<Event> },
    /// A dialer has waited long enough.
    GiveUp { link: LinkId },
}

impl Due {
    /// What of it goes into the fabric's digest.
    pub(crate) fn words(&self) -> [u64; 2] {
        match self {
            Due::Hello { link } => [1, link.0],
            Due::Welcome { link } => [2, link.0],
            Due::Farewell { link, side, .. } => [3 | (*side as u64) << 8, link.0],
            Due::Request { flow } => [4, flow.0],
            Due::Grant { flow } => [5, flow.0],
            Due::Slice { slice } => [6, *slice],
            Due::Done { flow } => [7, flow.0],
            Due::Stop { flow } => [8, flow.0],
            Due::Tell { flow, end, .. } => [9 | (*end as u64) << 8, flow.0],
            Due::Notice { link, .. } => [10, link.0],
            Due::Egress { nic } => [11, nic.0.into()],
            Due::Unexpected { flow } => [12, flow.0],
            Due::Report { nic, .. } => [13, nic.0.into()],
            Due::GiveUp { link } => [14, link.0],
            Due::Rekeyed { link } => [15, link.0],
        }
    }
}

/// All of it, in order of time, then of scheduling.
#[derive(Default)]
pub(crate) struct Agenda {
    heap: BinaryHeap<Entry>,
    numbers: u64,
}

pub(crate) struct Entry {
    /// Nanoseconds.
    pub(crate) at: u64,
    number: u64,
    /// When it was first tried.
    pub(crate) since: u64,
    pub(crate) due: Due,
}

impl Agenda {
    pub(crate) fn put(&mut self, at: u64, since: u64, due: Due) {
        self.numbers += 1;
        self.heap.push(Entry { at, number: self.numbers, since, due });
    }

    pub(crate) fn next_at(&self) -> Option<u64> {
        self.heap.peek().map(|entry| entry.at)
    }

    /// The first thing that is due by `now`.
    pub(crate) fn take(&mut self, now: u64) -> Option<Entry> {
        if self.next_at()? <= now { self.heap.pop() } else { None }
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        // The heap gives the greatest first.
        (other.at, other.number).cmp(&(self.at, self.number))
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl Eq for Entry {}
