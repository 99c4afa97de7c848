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
            let reason =
                format!("block tables of {PROGRAMS_BYTES_MAX} bytes wait to be packed there; post less at once");
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
        #[cfg(test)]
        tests::count();
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
    pool.require_host()?;
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

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::Cell;

    use kvferry_core::PoolId;
    use kvferry_transport::conformance::{absent, block_planes, whole_blocks};

    use super::*;
    use crate::library::Library;
    use crate::staging::STAGING_BYTES;
    use crate::{device, emulated};

    const BLOCKS: u32 = 64;
    const BLOCK_BYTES: u64 = 64 << 10;
    const NUMBER: u64 = 77;

    thread_local! {
        static CHUNKS: Cell<u64> = const { Cell::new(0) };
    }

    pub(crate) fn count() {
        CHUNKS.set(CHUNKS.get() + 1);
    }

    /// Chunks that this thread has packed so far.
    pub(crate) fn chunks() -> u64 {
        CHUNKS.get()
    }

    fn domain() -> Option<Rc<Domain>> {
        match Library::find() {
            Ok(library) => Some(Domain::open(library, device::find(library, "lo").unwrap(), false).unwrap()),
            Err(reason) => {
                absent("libfabric", &reason);
                None
            }
        }
    }

    fn pool() -> Pool {
        let pool = Pool::allocate(PoolId(1), block_planes(1, BLOCKS, BLOCK_BYTES), "serving").unwrap();
        (0..BLOCKS).for_each(|block| pool.fill(0, block, block as u8).unwrap());
        pool
    }

    fn pack(serial: u64) -> Pack {
        let program = whole_blocks(1, 16, BLOCK_BYTES, 0..BLOCKS, 0..BLOCKS);
        let end = program.units();
        let mut encoded = Vec::new();
        program.encode_for(End::Source, &mut encoded);
        Pack { serial, pool: NUMBER, start: 0, end, program: encoded.into() }
    }

    fn parcels(serving: &mut Serving) -> Vec<Parcel> {
        let parcel = |word| if let Word::Parcel(parcel) = word { Some(parcel) } else { None };
        serving.take_said().into_iter().filter_map(parcel).collect()
    }

    fn refusals(serving: &mut Serving) -> Vec<String> {
        let refusal = |word| if let Word::Refused { reason, .. } = word { Some(reason) } else { None };
        serving.take_said().into_iter().filter_map(refusal).collect()
    }

    /// A peer that gives nothing back has only so many buffers of its own; what it gives back is packed anew, in the stream's order.
    #[test]
    fn a_buffer_is_packed_again_only_when_it_came_back() {
        let Some(domain) = domain() else { return };
        let pool = pool();
        let (mut serving, mut other) = (Serving::default(), Serving::default());
        for serving in [&mut serving, &mut other] {
            serving.ask(&domain, 2 * STAGING_BYTES).unwrap();
            assert!(matches!(serving.take_said()[..], [Word::Staged(Some(_))]));
            serving.pack(pack(5), Some(&pool)).unwrap();
        }
        while serving.pack_next().is_some() {}
        let named = parcels(&mut serving);
        assert_eq!(named.len(), BUFFERS as usize);
        assert!(named.iter().zip(0..).all(|(parcel, at)| (parcel.serial, parcel.buffer) == (5, at)));
        assert!(!serving.can_pack() && other.can_pack(), "another peer's go on");
        for round in 1..=(u64::from(BLOCKS) * BLOCK_BYTES) / STAGING_BYTES {
            let to = serving.depot.as_ref().unwrap().staging.buffer(3).unwrap();
            // SAFETY: the buffer was named, so it is not written before it is given back.
            assert_eq!(u64::from(unsafe { to.read() }), (round - 1) * 32 + 12, "round {round}");
            serving.take_back((1 << BUFFERS) - 1).unwrap();
            while serving.pack_next().is_some() {}
        }
        assert!(serving.packers.is_empty());
    }

    #[test]
    fn peers_that_break_the_rules_are_told_apart_from_those_that_ask_in_vain() {
        let Some(domain) = domain() else { return };
        let pool = pool();
        let mut serving = Serving::default();
        assert!(serving.pack(pack(1), Some(&pool)).unwrap_err().contains("no staging"));
        assert!(serving.take_back(1).unwrap_err().contains("no staging"));
        serving.ask(&domain, STAGING_BYTES).unwrap();
        assert!(serving.ask(&domain, STAGING_BYTES).unwrap_err().contains("second time"));
        assert!(serving.decline().is_err() && serving.take_back(1).is_err());
        serving.take_said();
        serving.pack(pack(1), Some(&pool)).unwrap();
        assert!(serving.pack(pack(1), Some(&pool)).unwrap_err().contains("twice"));
        let units = pack(2).end;
        let vain: [(&str, Pack, Option<&Pool>); 5] = [
            ("not bound", pack(2), None),
            ("malformed", Pack { program: Vec::from(&b"\xff\xff"[..]).into(), ..pack(2) }, Some(&pool)),
            ("were asked for", Pack { end: units + 1, ..pack(2) }, Some(&pool)),
            ("were asked for", Pack { start: 2, end: 1, ..pack(2) }, Some(&pool)),
            ("no bytes", Pack { start: 1, end: 1, ..pack(2) }, Some(&pool)),
        ];
        for (words, pack, pool) in vain {
            serving.pack(pack, pool).unwrap();
            let said = refusals(&mut serving);
            assert!(said.len() == 1 && said[0].contains(words), "{said:?}");
        }
        let small = Pool::allocate(PoolId(1), block_planes(1, 8, BLOCK_BYTES), "serving").unwrap();
        serving.pack(pack(3), Some(&small)).unwrap();
        assert_eq!(refusals(&mut serving).len(), 1, "blocks outside of the pool");
        let on_gpu = emulated::pool(PoolId(1), block_planes(1, BLOCKS, BLOCK_BYTES), emulated::Gpu::default());
        serving.pack(pack(3), Some(&on_gpu)).unwrap();
        let said = refusals(&mut serving);
        assert!(said.len() == 1 && said[0].contains(emulated::GPU.0), "{said:?}");
        serving.stop(9);
        serving.stop(1);
        assert!(!serving.can_pack() && serving.pack_next().is_none());
        serving.pack(pack(4), Some(&pool)).unwrap();
        serving.unbound(NUMBER + 1);
        assert!(serving.can_pack());
        serving.unbound(NUMBER);
        assert!(!serving.can_pack());
    }

    #[test]
    fn beyond_the_limit_nothing_is_packed() {
        let Some(domain) = domain() else { return };
        for decline in [false, true] {
            let mut serving = Serving::default();
            if decline { serving.decline() } else { serving.ask(&domain, STAGING_BYTES - 1) }.unwrap();
            assert_eq!(serving.take_said(), [Word::Staged(None)]);
            assert!(serving.pack(pack(1), None).is_err());
        }
    }
}
