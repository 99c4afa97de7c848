//! Reads of peers' memory: merged runs, a window at a time, straight into blocks.

use std::rc::Rc;
use std::sync::Arc;

use kvferry_core::{PoolLayout, Program, TransferId, UnitRange};
use kvferry_topology::Way;
use kvferry_transport::{PeerId, RemotePool, TransferError, first_part};
use ucx_sys::UCS_OK;

use crate::cost::Manner;
use crate::endpoint::GetMemory;
use crate::inbox::Flow;
use crate::lanes::Lanes;
use crate::remote::Bound;
use crate::request::Begun;
use crate::transport::UcxTransport;
use crate::wire::{Named, RegionKey};

/// Reads of one transfer that UCX may hold, about: where their lengths differ, up to twice as many. More are asked for once half of them are over.
pub(crate) const READS_MAX: usize = 256;
/// Bytes that one transfer asks for before it is another's turn.
const SLICE_BYTES: u64 = 1 << 20;
/// What a read costs beside its bytes, in bytes that could be copied in that time.
const READ_COST: u64 = 1024;
/// Reads that are looked at to judge a program's pieces.
const SAMPLE: usize = 64;

/// A transfer that is being read from a peer's memory.
pub(crate) struct Fetch {
    /// Who wants it: a pull that was posted here, or a push that is expected here.
    flow: Flow,
    id: TransferId,
    pub(crate) peer: PeerId,
    pub(crate) link: u64,
    pub(crate) named: Named,
    pub(crate) local: Bound,
    program: Arc<Program>,
    /// What was not asked for yet.
    range: UnitRange,
    left: u64,
    /// Of one read, on average of the first ones.
    piece_bytes: u64,
    /// All that it was to read.
    bytes: u64,
    source: Arc<PoolLayout>,
    regions: Vec<RegionKey>,
    memory: Rc<GetMemory>,
    /// Reads that UCX holds.
    pub(crate) in_flight: usize,
    pieces: u64,
    /// Stands in the queue of those that can go on.
    queued: bool,
    /// Why it asks for nothing more.
    stop: Option<TransferError>,
    /// A read of it failed: what it wrote is known only once its endpoint is gone.
    broken: bool,
}

impl UcxTransport {
    /// Whether a link has lanes that read the peer's memory.
    pub(crate) fn reads_memory(&mut self, link: u64) -> bool {
        self.method.registers(self.access) && self.lanes(link).is_some_and(Lanes::read_remote_memory)
    }

    pub(crate) fn lanes(&mut self, link: u64) -> Option<&Lanes> {
        let link = self.links.get_mut(&link)?;
        Some(link.lanes.get_or_insert_with(|| Lanes::new(&link.endpoint.description(), link.endpoint.lanes())))
    }

    /// Starts reading; `None` where it cannot be read, or is better sent packed.
    #[expect(clippy::too_many_arguments, reason = "the parts of one transfer, put together in one place")]
    pub(crate) fn start_fetch(
        &mut self,
        flow: Flow,
        id: TransferId,
        peer: PeerId,
        remote: RemotePool,
        program: Arc<Program>,
        range: UnitRange,
        local: Bound,
    ) -> Option<u64> {
        let mapped = local.mapped.clone()?;
        let link = self.sessions.get(&peer)?.link;
        let (keys, source) = self.remotes.get(&remote)?.lent.clone().filter(|(keys, _)| keys.are_readable())?;
        let sample = program.copies(range, &source, &local.layout).take(SAMPLE);
        let (count, bytes) = sample.fold((0, 0), |(count, bytes), copy| (count + 1, bytes + copy.bytes));
        let (left, piece_bytes) = (program.bytes_in(range), bytes / count.max(1));
        if self.choose(link, id, piece_bytes, left) == Manner::Packed {
            return None;
        }
        self.unpack(remote);
        let remote = self.remotes.get_mut(&remote)?;
        let Some(unpacked) = remote.unpacked.clone() else {
            self.watched = None;
            return None;
        };
        let memory = Rc::new(GetMemory { keys: unpacked, _local: mapped });
        let named = remote.named;
        let number = self.new_number();
        let fetch = Fetch {
            flow,
            id,
            peer,
            link,
            named,
            local,
            program,
            range,
            left,
            piece_bytes: piece_bytes.max(1),
            bytes: left,
            source,
            regions: keys.regions,
            memory,
            in_flight: 0,
            pieces: 0,
            queued: true,
            stop: None,
            broken: false,
        };
        self.fetches.insert(number, fetch);
        self.turns.push_back(number);
        Some(number)
    }

    /// Asks for more, each transfer in turn, up to about `budget` bytes.
    pub(crate) fn fetch(&mut self, budget: u64) {
        let mut left = budget;
        while left > 0
            && let Some(number) = self.turns.pop_front()
        {
            left = left.saturating_sub(self.fetch_slice(number, left.min(SLICE_BYTES)));
        }
    }

    /// Asks for about `budget` bytes of one transfer; says what that cost.
    fn fetch_slice(&mut self, number: u64, budget: u64) -> u64 {
        let Some(fetch) = self.fetches.get_mut(&number) else { return 0 };
        fetch.queued = false;
        let Some(link) = self.links.get(&fetch.link) else { return 0 };
        let before = fetch.pieces;
        let room = READS_MAX.saturating_sub(fetch.in_flight) as u64;
        let most = room.saturating_mul(fetch.piece_bytes).max(1);
        let (part, bytes) = first_part(&fetch.program, fetch.range, fetch.left, budget.min(most));
        let mut asked = 0;
        if fetch.stop.is_none() {
            for copy in fetch.program.copies(part, &fetch.source, &fetch.local.layout) {
                let at = fetch.regions.get(copy.source.region as usize);
                let from =
                    at.filter(|at| copy.source.offset.checked_add(copy.bytes).is_some_and(|end| end <= at.bytes));
                let to = fetch.local.pool.address(copy.destination, copy.bytes);
                let (Some(from), Some(to)) = (from, to) else { break };
                let (region, from) = (copy.source.region as usize, from.base + copy.source.offset);
                // SAFETY: `address` checked that the bytes lie in the local pool, which `memory` keeps.
                let begun = unsafe { link.endpoint.get(number, &fetch.memory, region, from, to, copy.bytes as usize) };
                match begun {
                    Begun::InFlight => fetch.in_flight += 1,
                    Begun::Over(_, UCS_OK) => {}
                    Begun::Over(_, status) => {
                        fetch.fail(self.context.library.words(status));
                        break;
                    }
                }
                fetch.pieces += 1;
                asked += copy.bytes;
            }
            if asked != bytes && fetch.stop.is_none() {
                let message = format!("{asked} bytes were laid out where {bytes} were planned");
                fetch.stop = Some(TransferError::Io { context: "walking the program", message });
            }
        }
        fetch.range.start = part.end;
        fetch.left = fetch.left.saturating_sub(bytes);
        let cost = asked + (fetch.pieces - before) * READ_COST;
        self.go_on(number);
        cost
    }

    /// A read is over.
    pub(crate) fn got(&mut self, number: u64, status: ucx_sys::ucs_status_t) {
        let Some(fetch) = self.fetches.get_mut(&number) else { return };
        fetch.in_flight = fetch.in_flight.saturating_sub(1);
        if status != UCS_OK {
            fetch.fail(self.context.library.words(status));
        }
        self.go_on(number);
    }

    /// Queues a fetch that can go on, or ends one that is over.
    fn go_on(&mut self, number: u64) {
        let Some(fetch) = self.fetches.get_mut(&number) else { return };
        if fetch.range.start < fetch.range.end && fetch.stop.is_none() {
            if !fetch.queued && fetch.in_flight <= READS_MAX / 2 {
                fetch.queued = true;
                self.turns.push_back(number);
            }
            return;
        }
        // A read that failed may be under way in the hardware still, until its endpoint is gone.
        let wild = fetch.broken && (self.links.contains_key(&fetch.link) || self.closing.contains_key(&fetch.link));
        if fetch.in_flight > 0 || wild {
            return;
        }
        let Some(fetch) = self.fetches.remove(&number) else { return };
        if fetch.stop.is_none() {
            self.note_taken(fetch.id);
            self.note_moved(fetch.link, Way::Read, fetch.bytes);
        }
        match fetch.flow {
            Flow::Pull => self.fetched_pull(fetch.id, fetch.pieces, fetch.stop),
            Flow::Push => self.fetched_push(fetch.id, fetch.pieces, fetch.stop),
        }
    }

    /// Asks for nothing more of a transfer; it ends once UCX holds nothing of it.
    pub(crate) fn stop_fetch(&mut self, number: u64, error: TransferError) {
        if let Some(fetch) = self.fetches.get_mut(&number) {
            fetch.stop.get_or_insert(error);
            self.go_on(number);
        }
    }

    pub(crate) fn stop_fetches(&mut self, which: impl Fn(&Fetch) -> bool, error: &TransferError) {
        let numbers: Vec<u64> = self.fetches.iter().filter(|(_, fetch)| which(fetch)).map(|(n, _)| *n).collect();
        for number in numbers {
            self.stop_fetch(number, error.clone());
        }
    }

    /// Links whose reads failed are not used any more; fetches that waited for an endpoint to be gone end.
    pub(crate) fn end_stopped_fetches(&mut self) {
        let broken: Vec<(u64, u64)> =
            self.fetches.iter().filter(|(_, fetch)| fetch.broken).map(|(number, f)| (*number, f.link)).collect();
        for (number, link) in broken {
            if self.links.contains_key(&link) {
                self.lose_link(link, "a read of the peer's memory failed");
            }
            self.go_on(number);
        }
    }
}

impl Fetch {
    /// Whether only the end of its endpoint ends it, or proves that it has ended.
    pub(crate) fn holds_endpoint(&self) -> bool {
        self.in_flight > 0 || self.broken
    }

    pub(crate) fn fail(&mut self, words: String) {
        self.broken = true;
        self.stop.get_or_insert(TransferError::Io { context: "reading the peer's memory", message: words });
    }
}
