//! The source's side of packed chunks: what one peer asked for is packed into buffers of that link's own, each of which the peer is told of and
//! gives back. A peer that gives none back has nothing more packed for it, and nobody else notices.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use kvferry_core::{End, Program, UnitRange};
use kvferry_transport::{Cursor, Lending, Pool};

use crate::domain::Domain;
use crate::staging::{BUFFERS, CHUNK_BYTES, Staging};
use crate::words::{Pack, Parcel, Word};

/// Transfers that one peer may have packed at a time, a chunk of each in turn.
const PACKERS_MAX: usize = 4096;
/// Bytes of their programs, as they came.
const PROGRAMS_BYTES_MAX: usize = 256 << 20;
/// What breaks the rules.
const TWICE: &str = "it asks for staging a second time";

/// What one peer has packed here.
#[derive(Default)]
pub(crate) struct Serving {
    was_asked: bool,
    depot: Option<Depot>,
    packers: VecDeque<Packer>,
    said: Vec<Word>,
}

struct Depot {
    staging: Staging,
    lending: Lending,
}

/// One transfer.
struct Packer {
    serial: u64,
    pool: u64,
    program_bytes: usize,
    cursor: Cursor,
    left: u64,
}

impl Serving {
    /// The peer would have short pieces packed: makes staging for it, as far as `bytes_max` goes.
    pub(crate) fn ask(&mut self, domain: &Rc<Domain>, bytes_max: u64) -> Result<(), String> {
        if std::mem::replace(&mut self.was_asked, true) {
            return Err(TWICE.to_owned());
        }
        let staging = Staging::depot(domain, bytes_max).unwrap_or_else(|reason| {
            tracing::warn!(reason, "no staging for a peer that would have short pieces packed: it reads them");
            None
        });
        self.depot = staging.map(|staging| Depot { staging, lending: Lending::new(BUFFERS) });
        let told = self.depot.as_ref().and_then(|depot| depot.staging.lend(domain));
        self.said.push(Word::Staged(told));
        Ok(())
    }

    /// The peer would have short pieces packed, and this side does not pack.
    pub(crate) fn decline(&mut self) -> Result<(), String> {
        if std::mem::replace(&mut self.was_asked, true) {
            return Err(TWICE.to_owned());
        }
        self.said.push(Word::Staged(None));
        Ok(())
    }

    /// The peer asks for a transfer out of `pool`, if that is bound.
    pub(crate) fn pack(&mut self, pack: Pack, pool: Option<&Pool>) -> Result<(), String> {
        if self.depot.is_none() {
            return Err("it asks for packed chunks where there is no staging".to_owned());
        }
        if self.packers.iter().any(|packer| packer.serial == pack.serial) {
            return Err("it asks for packed chunks twice under one number".to_owned());
        }
        if self.packers.len() >= PACKERS_MAX {
            return Err(format!("it asks for more than {PACKERS_MAX} transfers at a time"));
        }
        let (serial, number, program_bytes) = (pack.serial, pack.pool, pack.program.len());
        let held: usize = self.packers.iter().map(|packer| packer.program_bytes).sum();
        if held + program_bytes > PROGRAMS_BYTES_MAX {
            let reason = format!("block tables of {PROGRAMS_BYTES_MAX} bytes wait to be packed there; post less at once");
            self.said.push(Word::Refused { serial, reason });
            return Ok(());
        }
        match cursor(pack, pool) {
            Ok((cursor, left)) => {
                self.packers.push_back(Packer { serial, pool: number, program_bytes, cursor, left });
            }
            Err(reason) => self.said.push(Word::Refused { serial, reason }),
        }
        Ok(())
    }

    /// The peer gives buffers back.
    pub(crate) fn take_back(&mut self, buffers: u64) -> Result<(), String> {
        match &mut self.depot {
            Some(depot) => depot.lending.take_back(buffers),
            None => Err("it gives buffers back where there is no staging".to_owned()),
        }
    }

    /// The peer wants no more of a transfer.
    pub(crate) fn stop(&mut self, serial: u64) {
        self.packers.retain(|packer| packer.serial != serial);
    }

    /// A pool is let go: nothing is packed out of it any more.
    pub(crate) fn unbound(&mut self, pool: u64) {
        self.packers.retain(|packer| packer.pool != pool);
    }

    /// Whether there is something to pack, and where to.
    pub(crate) fn can_pack(&self) -> bool {
        !self.packers.is_empty() && self.depot.as_ref().is_some_and(|depot| depot.lending.idle().is_some())
    }

    /// Packs the next chunk of the transfer whose turn it is; its bytes, or nothing where there is nothing to do.
    pub(crate) fn pack_next(&mut self) -> Option<u64> {
        let depot = self.depot.as_mut()?;
        let buffer = depot.lending.idle()?;
        let to = depot.staging.buffer(buffer)?;
        let mut packer = self.packers.pop_front()?;
        let bytes = usize::try_from(packer.left).map_or(CHUNK_BYTES, |left| left.min(CHUNK_BYTES));
        let serial = packer.serial;
        // SAFETY: the buffer has room for a chunk, and is nobody else's: its peer gave it back, or was not told of it.
        if !unsafe { packer.cursor.pack(to, bytes) } {
            let reason = "the program gives fewer bytes than it says; the program and the layout disagree".to_owned();
            self.said.push(Word::Refused { serial, reason });
            return Some(0);
        }
        depot.lending.lend(buffer);
        self.said.push(Word::Parcel(Parcel { serial, buffer, bytes: bytes as u32 }));
        packer.left = packer.left.saturating_sub(bytes as u64);
        if packer.left > 0 {
            self.packers.push_back(packer);
        }
        Some(bytes as u64)
    }

    /// What is to be said to the peer.
    pub(crate) fn take_said(&mut self) -> Vec<Word> {
        std::mem::take(&mut self.said)
    }
}

/// The walk over a pool of our own that a peer asks for, and its bytes; or why there is none.
fn cursor(pack: Pack, pool: Option<&Pool>) -> Result<(Cursor, u64), String> {
    let pool = pool.ok_or("the pool is not bound there any more; exchange keys again")?;
    let program = Program::decode(&pack.program).map_err(|error| format!("its program is malformed: {error}"))?;
    program.validate(End::Source, pool.layout()).map_err(|error| error.to_string())?;
    let units = program.units();
    if pack.start > pack.end || pack.end > units {
        return Err(format!("units {}..{} of {units} were asked for", pack.start, pack.end));
    }
    let range = UnitRange { start: pack.start, end: pack.end };
    let left = program.bytes_in(range);
    if left == 0 {
        return Err("no bytes were asked for".to_owned());
    }
    let layout = Arc::new(pool.layout().clone());
    Ok((Cursor::new(pool.clone(), layout, Arc::new(program), End::Source, range), left))
}
