//! A program as reads of a peer's memory: merged runs, a window at a time, straight into blocks.

use std::rc::Rc;
use std::sync::Arc;

use kvferry_core::{Copy, Location, PoolLayout, Program, UnitRange};
use kvferry_local::{Copying, Step};
use kvferry_transport::{Pool, TransferError, first_part};

use crate::memory::{Lent, Own};
use crate::reader::Ticket;

/// Reads of one copy that are under way at a time.
const READS_MAX: usize = 64;
/// Bytes of one read.
const READ_BYTES_MAX: u64 = 1 << 20;
/// What a read costs beside its bytes, in bytes that could be copied in that time.
const READ_COST: u64 = 1024;

/// A program on its way into a pool of our own.
pub(crate) struct Reads {
    program: Arc<Program>,
    /// What was not laid out yet.
    range: UnitRange,
    left: u64,
    bytes: u64,
    pieces: u64,
    source: Arc<PoolLayout>,
    memory: Rc<Lent>,
    pool: Pool,
    own: Rc<Own>,
    read_bytes_max: u64,
    /// Laid out, not asked for yet; the last is next.
    next: Vec<Copy>,
    ticket: Rc<Ticket>,
}

impl Reads {
    /// The caller has validated the program against both layouts.
    pub(crate) fn new(
        (program, range): (Arc<Program>, UnitRange),
        source: Arc<PoolLayout>,
        memory: Rc<Lent>,
        (pool, own): (Pool, Rc<Own>),
        message_bytes_max: usize,
    ) -> Reads {
        let units = program.units();
        let range = UnitRange { start: range.start.min(units), end: range.end.min(units) };
        let bytes = program.bytes_in(range);
        Reads {
            program,
            range,
            left: bytes,
            bytes,
            pieces: 0,
            source,
            memory,
            pool,
            own,
            read_bytes_max: READ_BYTES_MAX.min(message_bytes_max as u64).max(1),
            next: Vec::new(),
            ticket: Rc::default(),
        }
    }

    /// Lays out about `budget` bytes more.
    fn lay_out(&mut self, budget: u64) -> Result<(), TransferError> {
        let (part, bytes) = first_part(&self.program, self.range, self.left, budget);
        let copies = self.program.copies(part, &self.source, self.pool.layout());
        self.next = copies.collect();
        let laid: u64 = self.next.iter().map(|copy| copy.bytes).sum();
        if laid != bytes {
            let message =
                format!("{laid} bytes were laid out where {bytes} were planned; the program and the layouts disagree");
            return Err(TransferError::Io { context: "walking the program", message });
        }
        self.pieces += self.next.len() as u64;
        self.next.reverse();
        self.range.start = part.end;
        self.left = self.left.saturating_sub(bytes);
        Ok(())
    }

    /// Asks for the beginning of a run, as much as one read may bring. `None`: not now.
    fn ask(&self, copy: &Copy) -> Result<Option<u64>, TransferError> {
        let outside = || TransferError::Refused("a block lies outside its pool".into());
        let bytes = copy.bytes.min(self.read_bytes_max);
        let length = usize::try_from(bytes).map_err(|_| outside())?;
        let source = self.memory.source(copy.source, length).ok_or_else(outside)?;
        let to = self.pool.address(copy.destination, bytes).ok_or_else(outside)?;
        let into = self.own.region(copy.destination.region).ok_or_else(outside)?;
        // SAFETY: the range was just found to lie inside the pool's region, which is what is registered; the program writes each of its
        // bytes once.
        match unsafe { self.memory.reader.read(source, to, into, &self.ticket) } {
            Ok(true) => Ok(Some(bytes)),
            Ok(false) => Ok(None),
            Err(message) => Err(unread(message)),
        }
    }
}

impl Copying for Reads {
    fn step(&mut self, budget: u64) -> Result<Step, TransferError> {
        self.memory.reader.progress();
        if let Some(message) = self.ticket.failed.borrow_mut().take() {
            return Err(unread(message));
        }
        if self.memory.reader.is_closed() {
            return Err(unread(self.memory.reader.why_closed()));
        }
        let mut cost = 0;
        while cost < budget && self.ticket.under_way.get() < READS_MAX {
            let Some(mut copy) = self.next.pop() else {
                if self.range.start >= self.range.end {
                    break;
                }
                self.lay_out(budget - cost)?;
                continue;
            };
            if copy.bytes == 0 {
                continue;
            }
            let asked = self.ask(&copy)?;
            let bytes = asked.unwrap_or(0);
            if bytes < copy.bytes {
                copy.bytes -= bytes;
                copy.source = behind(copy.source, bytes);
                copy.destination = behind(copy.destination, bytes);
                self.next.push(copy);
            }
            if asked.is_none() {
                break;
            }
            cost += bytes + READ_COST;
        }
        let is_all = self.next.is_empty() && self.range.start >= self.range.end && self.ticket.under_way.get() == 0;
        Ok(match cost {
            _ if is_all => Step::Done(cost),
            0 => Step::Waiting,
            cost => Step::More(cost),
        })
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn pieces(&self) -> u64 {
        self.pieces
    }

    fn is_running(&mut self) -> bool {
        self.memory.reader.progress();
        self.ticket.under_way.get() > 0
    }
}

fn behind(at: Location, bytes: u64) -> Location {
    Location { offset: at.offset + bytes, ..at }
}

fn unread(message: String) -> TransferError {
    TransferError::Io { context: "reading the peer's memory through libfabric", message }
}
