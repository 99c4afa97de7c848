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

#[cfg(test)]
mod tests {
    use kvferry_core::{Direction, FenceProof, PoolId, TransferId};
    use kvferry_transport::conformance::{Party, absent, block_planes, until, whole_blocks};
    use kvferry_transport::{Event, Expected, Options, PackedBy, PeerId, RemotePool, Transfer};

    use super::*;
    use crate::LibfabricProvider;
    use crate::serving::tests::chunks;

    const BLOCKS: u32 = 1024;
    const BLOCK_BYTES: u64 = 4 << 10;

    fn provider(by: PackedBy) -> LibfabricProvider {
        LibfabricProvider::new().only("lo").packed(by, u64::MAX)
    }

    /// `here` has connected to `there`; each has a pool.
    struct Pair {
        here: Party,
        there: Party,
        peer: PeerId,
        remote: RemotePool,
        ours: Pool,
        theirs: Pool,
    }

    impl Pair {
        fn new(ours: PackedBy, theirs: PackedBy, options: &Options) -> Option<Pair> {
            if let Some(reason) = LibfabricProvider::unavailable() {
                absent("libfabric", &reason);
                return None;
            }
            let mut here = Party::open(&provider(ours), &Options { staging_bytes_max: 64 << 20, ..options.clone() });
            let mut there = Party::open(&provider(theirs), options);
            let pool = |id| Pool::allocate(PoolId(id), block_planes(1, BLOCKS, BLOCK_BYTES), "packed").unwrap();
            let (ours, theirs) = (pool(1), pool(2));
            here.bind(&ours);
            let keys = there.bind(&theirs);
            let peer = here.connect(&there);
            let remote = here.import(peer, &keys, theirs.layout());
            Some(Pair { here, there, peer, remote, ours, theirs })
        }

        fn post(&mut self, number: u128, direction: Direction) {
            let (id, program) =
                (TransferId(number), Arc::new(whole_blocks(1, 16, BLOCK_BYTES, 0..BLOCKS, (0..BLOCKS).rev())));
            let (peer, remote, local, range) = (self.peer, self.remote, self.ours.id(), program.whole());
            if direction == Direction::Push {
                let expected = Expected { from: None, id, pool: self.theirs.id(), program: program.clone(), range };
                self.there.transport.expect(expected).unwrap();
            }
            let transfer = Transfer { id, peer, direction, local, remote, program, range, notice: None };
            self.here.transport.post(transfer).unwrap();
        }

        /// One transfer of every block, checked; how many chunks were packed for it.
        fn run(&mut self, number: u128, direction: Direction) -> u64 {
            let (source, destination) = match direction {
                Direction::Pull => (&self.theirs, &self.ours),
                Direction::Push => (&self.ours, &self.theirs),
            };
            let (source, destination, salt, before) = (source.clone(), destination.clone(), number as u8, chunks());
            (0..BLOCKS).for_each(|block| source.fill(0, block, salt.wrapping_add(block as u8)).unwrap());
            self.post(number, direction);
            let id = TransferId(number);
            until(&mut [&mut self.here, &mut self.there], "a transfer ends", |parties| parties[0].end(id).is_some());
            assert!(!self.here.failed(id), "{:?}", self.here.end(id));
            let mut bytes = vec![0; BLOCK_BYTES as usize];
            for block in 0..BLOCKS {
                destination.read(0, block, 0, &mut bytes).unwrap();
                let wanted = salt.wrapping_add((BLOCKS - 1 - block) as u8);
                assert!(bytes.iter().all(|byte| *byte == wanted), "{direction:?}, block {block}");
            }
            chunks() - before
        }
    }

    #[test]
    fn short_pieces_are_packed_both_ways_again_and_again() {
        let Some(mut pair) = Pair::new(PackedBy::Read, PackedBy::Read, &Options::default()) else { return };
        for number in 1..=8 {
            let direction = if number % 2 == 0 { Direction::Push } else { Direction::Pull };
            assert_eq!(pair.run(number, direction), 16, "{direction:?}");
        }
    }

    /// A source that packs nothing, or has no staging left, is read piece by piece.
    #[test]
    fn where_a_source_packs_nothing_its_pieces_are_read() {
        let none = Options { staging_bytes_max: 0, ..Options::default() };
        for (theirs, options) in [(PackedBy::Message, Options::default()), (PackedBy::Read, none)] {
            let Some(mut pair) = Pair::new(PackedBy::Read, theirs, &options) else { return };
            assert_eq!(pair.run(1, Direction::Pull), 0);
        }
        let Some(mut pair) = Pair::new(PackedBy::Message, PackedBy::Read, &Options::default()) else { return };
        assert_eq!(pair.run(1, Direction::Pull), 0, "nobody asked for it");
    }

    /// Buffers that a cancelled transfer had come back, and the next has them all.
    #[test]
    fn a_cancelled_transfer_leaves_its_buffers_to_others() {
        let slow = Options { poll_bytes_max: 128 << 10, ..Options::default() };
        let Some(mut pair) = Pair::new(PackedBy::Read, PackedBy::Read, &slow) else { return };
        pair.run(1, Direction::Pull);
        for number in 2..12 {
            let before = chunks();
            pair.post(number, Direction::Pull);
            until(&mut [&mut pair.here, &mut pair.there], "it begins", |_| chunks() > before + number as u64 % 5);
            pair.here.transport.cancel(TransferId(number));
            until(&mut [&mut pair.here, &mut pair.there], "it ends", |parties| parties[0].failed(TransferId(number)));
        }
        assert_eq!(pair.run(100, Direction::Pull), 16);
    }

    /// The source stops polling while chunks are out: the fence needs nothing of it, nothing is written after it, and both meet again.
    #[test]
    fn a_fence_does_not_wait_for_a_source_that_stands_still() {
        let slow = Options { poll_bytes_max: 128 << 10, ..Options::default() };
        let Some(mut pair) = Pair::new(PackedBy::Read, PackedBy::Read, &slow) else { return };
        let before = chunks();
        pair.post(1, Direction::Pull);
        until(&mut [&mut pair.here, &mut pair.there], "it begins", |_| chunks() > before + 3);
        pair.here.transport.fence(pair.peer);
        let peer = pair.peer;
        until(&mut [&mut pair.here], "the fence is proved", |parties| {
            parties[0].saw(&Event::Fenced { peer, proof: FenceProof::OwnerCopies })
        });
        assert!(pair.here.failed(TransferId(1)));
        let image = |pool: &Pool| {
            let mut all = vec![0; (BLOCK_BYTES * u64::from(BLOCKS)) as usize];
            for (block, bytes) in (0..).zip(all.chunks_mut(BLOCK_BYTES as usize)) {
                pool.read(0, block, 0, bytes).unwrap();
            }
            all
        };
        let then = image(&pair.ours);
        (0..BLOCKS).for_each(|block| pair.theirs.fill(0, block, 0xcd).unwrap());
        for _ in 0..200 {
            pair.there.transport.poll(&mut pair.there.events);
            pair.here.transport.poll(&mut pair.here.events);
        }
        assert!(image(&pair.ours) == then, "bytes came after the proof");
        pair.here.transport.disconnect(peer);
        pair.peer = pair.here.connect(&pair.there);
        let keys = {
            pair.there.transport.unbind(pair.theirs.id());
            until(&mut [&mut pair.there], "the pool is let go", |parties| {
                parties[0].saw(&Event::Unbound { pool: PoolId(2) })
            });
            pair.there.bind(&pair.theirs)
        };
        pair.remote = pair.here.import(pair.peer, &keys, pair.theirs.layout());
        assert_eq!(pair.run(2, Direction::Pull), 16);
    }
}
