//! A program whose short pieces its source packs: chunks come in the stream's order, and are unpacked into the pool by this side's thread.

use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use kvferry_core::{End, Program, UnitRange};
use kvferry_local::Step;
use kvferry_transport::{Cursor, Pool, TransferError};

use crate::collecting::{Collecting, Readiness};
use crate::words::Pack;

/// What a piece costs beside its bytes, in bytes that could be copied in that time.
const PIECE_COST: u64 = 32;

/// A program on its way into a pool of our own, by chunks.
pub(crate) struct Packed {
    collecting: Rc<Collecting>,
    /// What is asked for, until it is.
    request: Option<Request>,
    serial: Option<u64>,
    cursor: Cursor,
    left: u64,
}

/// A transfer as its source is asked for it.
pub(crate) struct Request {
    /// The source's number of its pool.
    pub(crate) pool: u64,
    pub(crate) range: UnitRange,
    /// Encoded.
    pub(crate) program: Bytes,
}

impl Packed {
    /// The caller has validated the program against both layouts.
    pub(crate) fn new(collecting: Rc<Collecting>, request: Request, program: Arc<Program>, pool: Pool) -> Packed {
        let (range, layout) = (request.range, Arc::new(pool.layout().clone()));
        let left = program.bytes_in(range);
        let cursor = Cursor::new(pool, layout, program, End::Destination, range);
        Packed { collecting, request: Some(request), serial: None, cursor, left }
    }

    /// Asks for it, if the peer is known to pack. `false` where it is known not to.
    pub(crate) fn begin(&mut self) -> bool {
        match self.collecting.readiness() {
            Readiness::Unknown => true,
            Readiness::No => self.serial.is_some(),
            Readiness::Yes => {
                if let Some(Request { pool, range, program }) = self.request.take() {
                    let (start, end) = (range.start, range.end);
                    let pack = |serial| Pack { serial, pool, start, end, program };
                    self.serial = Some(self.collecting.begin(pack));
                }
                true
            }
        }
    }

    /// Unpacks what is here, about `budget` bytes of it.
    pub(crate) fn step(&mut self, budget: u64) -> Result<Step, TransferError> {
        let Some(serial) = self.serial else { return Ok(Step::Waiting) };
        self.collecting.progress();
        let mut cost = 0;
        while cost < budget {
            let Some(chunk) = self.collecting.next(serial).map_err(TransferError::Refused)? else { break };
            if chunk.bytes as u64 > self.left {
                let excess = chunk.bytes as u64 - self.left;
                self.collecting.unpacked(&chunk);
                return Err(TransferError::Refused(format!("its source packed {excess} bytes too many")));
            }
            let before = self.cursor.pieces();
            // SAFETY: the chunk's bytes are here, in a buffer that is not written before it is given back.
            let is_whole = unsafe { self.cursor.unpack(chunk.at, chunk.bytes) };
            self.collecting.unpacked(&chunk);
            if !is_whole {
                let message = format!("the program ends {} bytes before its length", self.left);
                return Err(TransferError::Io { context: "walking the program", message });
            }
            self.left -= chunk.bytes as u64;
            cost += chunk.bytes as u64 + (self.cursor.pieces() - before) * PIECE_COST;
        }
        Ok(match cost {
            _ if self.left == 0 => Step::Done(cost),
            0 => Step::Waiting,
            cost => Step::More(cost),
        })
    }

    pub(crate) fn pieces(&self) -> u64 {
        self.cursor.pieces()
    }
}

impl Drop for Packed {
    fn drop(&mut self) {
        if let Some(serial) = self.serial {
            self.collecting.leave(serial, self.left == 0);
        }
    }
}
