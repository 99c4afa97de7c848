//! A program on its way into a pool: as reads of merged runs of the peer's memory, a window at a time, straight into blocks; or packed.

use std::rc::Rc;
use std::sync::Arc;

use kvferry_core::{Copy, Location, PoolLayout, Program, UnitRange};
use kvferry_local::{Copying, Step};
use kvferry_transport::{Pool, TransferError, first_part};

use crate::endpoint::PIECES_MAX;
use crate::memory::{Lent, Own};
use crate::packed::Packed;
use crate::reader::{Source, Ticket};

/// Reads of one copy that are under way at a time.
const READS_MAX: usize = 64;
/// Bytes of one read.
const READ_BYTES_MAX: u64 = 1 << 20;
/// Bytes of a read that brings several pieces: longer ones gain nothing by company.
const GATHERED_BYTES_MAX: u64 = 256 << 10;
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
    /// Of one read that brings several pieces.
    gathered_bytes_max: u64,
    pieces_max: usize,
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
        (message_bytes_max, pieces_max): (usize, usize),
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
            gathered_bytes_max: GATHERED_BYTES_MAX.min(message_bytes_max as u64),
            pieces_max: pieces_max.clamp(1, PIECES_MAX),
            next: Vec::new(),
            ticket: Rc::default(),
        }
    }

    /// Lays out about `budget` bytes more.
    fn lay_out(&mut self, budget: u64) -> Result<(), TransferError> {
        let (part, bytes) = first_part(&self.program, self.range, self.left, budget);
        let copies = self.program.copies(part, &self.source, self.pool.layout());
        self.next = copies.filter(|copy| copy.bytes > 0).collect();
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

    /// Asks for the next pieces, as many as one read may bring: several short ones, or as much of a long one. `None`: not now.
    fn ask(&self) -> Result<Option<u64>, TransferError> {
        let outside = || TransferError::Refused("a block lies outside its pool".into());
        let nowhere = Source { address: 0, key: 0, bytes: 0 };
        let mut pieces = [(nowhere, std::ptr::null_mut()); PIECES_MAX];
        let (mut count, mut bytes, mut region, mut into) = (0, 0, None, None);
        for (copy, piece) in self.next.iter().rev().zip(pieces.iter_mut().take(self.pieces_max)) {
            let part = copy.bytes.min(self.read_bytes_max);
            let fits = part == copy.bytes && bytes + part <= self.gathered_bytes_max;
            if count > 0 && (region != Some(copy.destination.region) || !fits) {
                break;
            }
            let length = usize::try_from(part).map_err(|_| outside())?;
            let source = self.memory.source(copy.source, length).ok_or_else(outside)?;
            let (to, registered) = self.own.place(copy.destination, part).ok_or_else(outside)?;
            *piece = (source, to);
            into = Some(registered);
            (count, bytes, region) = (count + 1, bytes + part, Some(copy.destination.region));
            if part < copy.bytes {
                break;
            }
        }
        let into = into.ok_or_else(outside)?;
        // SAFETY: the ranges were just found to lie inside the pool's region, which is what is registered; the program writes each of its
        // bytes once.
        match unsafe { self.memory.reader.read(pieces.get(..count).unwrap_or_default(), into, &self.ticket) } {
            Ok(true) => Ok(Some(bytes)),
            Ok(false) => Ok(None),
            Err(message) => Err(unread(message)),
        }
    }

    /// So many of the next bytes were asked for.
    fn asked(&mut self, mut bytes: u64) {
        while bytes > 0 {
            let Some(mut copy) = self.next.pop() else { return };
            let part = copy.bytes.min(bytes);
            bytes -= part;
            if part < copy.bytes {
                copy.bytes -= part;
                copy.source = behind(copy.source, part);
                copy.destination = behind(copy.destination, part);
                self.next.push(copy);
            }
        }
    }
}

/// A copy: by reads, unless it is packed.
pub(crate) struct Fetch {
    reads: Reads,
    packed: Option<Packed>,
}

impl Fetch {
    pub(crate) fn new(reads: Reads, packed: Option<Packed>) -> Fetch {
        Fetch { reads, packed }
    }
}

impl Copying for Fetch {
    fn begin(&mut self) {
        // Where the peer packs nothing, its pieces are read.
        self.packed = self.packed.take().and_then(|mut packed| packed.begin().then_some(packed));
    }

    fn step(&mut self, budget: u64) -> Result<Step, TransferError> {
        self.begin();
        let Some(packed) = &mut self.packed else { return self.reads.step(budget) };
        self.reads.check()?;
        let step = packed.step(budget)?;
        // What was read meanwhile counts for nothing if its endpoint is closed since.
        self.reads.check()?;
        Ok(step)
    }

    fn bytes(&self) -> u64 {
        self.reads.bytes
    }

    fn pieces(&self) -> u64 {
        self.packed.as_ref().map_or(self.reads.pieces, Packed::pieces)
    }

    /// Of packed chunks nothing that is under way writes a pool.
    fn is_running(&mut self) -> bool {
        self.packed.is_none() && self.reads.is_running()
    }
}

impl Reads {
    /// Looks what is over, and whether something failed.
    fn check(&self) -> Result<(), TransferError> {
        self.memory.reader.progress();
        if let Some(message) = self.ticket.failed.borrow_mut().take() {
            return Err(unread(message));
        }
        if self.memory.reader.is_closed() {
            return Err(unread(self.memory.reader.why_closed()));
        }
        Ok(())
    }

    fn step(&mut self, budget: u64) -> Result<Step, TransferError> {
        self.check()?;
        let mut cost = 0;
        while cost < budget && self.ticket.under_way.get() < READS_MAX {
            if self.next.is_empty() {
                if self.range.start >= self.range.end {
                    break;
                }
                self.lay_out(budget - cost)?;
                continue;
            }
            let Some(bytes) = self.ask()? else { break };
            self.asked(bytes);
            cost += bytes + READ_COST;
        }
        let is_all = self.next.is_empty() && self.range.start >= self.range.end && self.ticket.under_way.get() == 0;
        if is_all {
            self.own.settle()?;
            return Ok(Step::Done(cost));
        }
        Ok(if cost == 0 { Step::Waiting } else { Step::More(cost) })
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
