//! The endpoint through which one peer's memory is read. Closed, it proves that nothing of that peer is written here any more.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::ffi::c_void;
use std::rc::Rc;
use std::time::{Duration, Instant};

use kvferry_transport::Pool;
use libfabric_sys::{fi_rma_iov, iovec};

use crate::domain::{Domain, Registered};
use crate::endpoint::{Done, Endpoint, PIECES_MAX, Posted};
use crate::slab::Slab;
use crate::staging::{CHUNK_BYTES, Staging};

/// Reads that one peer is asked for at a time.
const READS_MAX: usize = 128;
/// How long the first read, which only wires the way, is tried and waited for.
const WARMING: Duration = Duration::from_secs(2);
/// Why reads of a peer end that is gone or fenced.
const CUT: &str = "it was cut off: its peer is gone or fenced";

/// Reads from one peer.
pub(crate) struct Reader {
    /// None once it was cut off.
    open: RefCell<Option<Open>>,
    /// The first read, until it is over.
    warming: RefCell<Option<Warming>>,
    /// How that read is, also once it was given up.
    first: RefCell<Rc<Ticket>>,
    /// What the provider said when it broke.
    broke: RefCell<Option<String>>,
    /// The library took no more the last time that it was asked.
    is_refused: Cell<bool>,
    /// Bytes of pools that were read and not asked for yet.
    moved: Cell<u64>,
    /// Whether there were any.
    has_moved: Cell<bool>,
    /// What the device's counters showed of that.
    proven: RefCell<Option<String>>,
    /// Some of the peer's memory is a GPU's.
    reads_devices: Cell<bool>,
}

/// A read of one byte, so that no transfer pays for connecting.
struct Warming {
    source: Source,
    scratch: Rc<Slab>,
    ticket: Rc<Ticket>,
    is_asked: bool,
    until: Instant,
}

struct Open {
    endpoint: Endpoint<Read>,
    /// The peer's endpoint.
    address: u64,
    done: Vec<Done<Read>>,
}

/// How the reads of one copy are.
#[derive(Default)]
pub(crate) struct Ticket {
    /// How many are under way.
    pub(crate) under_way: Cell<usize>,
    /// Why the first of them failed.
    pub(crate) failed: RefCell<Option<String>>,
}

impl Ticket {
    pub(crate) fn is_under_way(&self) -> bool {
        self.under_way.get() > 0
    }
}

/// A read under way; it keeps the memory that is written.
pub(crate) struct Read {
    ticket: Rc<Ticket>,
    /// Of a transfer; none of a read that only wires the way.
    bytes: u64,
    _into: Rc<dyn Any>,
}

/// Dropped without an end it was cut off.
impl Drop for Read {
    fn drop(&mut self) {
        self.ticket.under_way.set(self.ticket.under_way.get().saturating_sub(1));
    }
}

/// Where a read begins at the peer, and how long it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source {
    pub(crate) address: u64,
    pub(crate) key: u64,
    pub(crate) bytes: usize,
}

impl Reader {
    /// An endpoint that reads what the endpoint of that name lends.
    pub(crate) fn open(domain: &Rc<Domain>, name: &[u8]) -> Result<Reader, String> {
        let reads = READS_MAX.min(domain.info.transmit_size().max(1)) as u32;
        let mut endpoint = Endpoint::open(domain, reads)?;
        let address = endpoint.insert(name)?;
        let open = RefCell::new(Some(Open { endpoint, address, done: Vec::new() }));
        Ok(Reader { open, ..Reader::closed() })
    }

    /// Has one byte read, so that the way is wired before the first transfer. What comes of it nobody cares.
    pub(crate) fn warm(&self, source: Source, scratch: &Rc<Slab>) {
        let until = Instant::now() + WARMING;
        let (scratch, ticket) = (scratch.clone(), Rc::<Ticket>::default());
        *self.first.borrow_mut() = ticket.clone();
        *self.warming.borrow_mut() = Some(Warming { source, scratch, ticket, is_asked: false, until });
    }

    /// Goes on with that. Whether there is more to do.
    pub(crate) fn tend(&self) -> bool {
        // Also a first read that was given up ends, and may come after all.
        self.progress();
        let mut place = self.warming.borrow_mut();
        let Some(warming) = place.as_mut() else { return false };
        let mut is_over = self.is_closed() || Instant::now() >= warming.until;
        if warming.is_asked {
            is_over |= warming.ticket.under_way.get() == 0;
        } else if let Some(buffer) = warming.scratch.buffer(0) {
            let keep: Rc<dyn Any> = warming.scratch.clone();
            // SAFETY: the buffer holds a byte, nobody looks at what is written there, and the operation keeps it.
            match unsafe { self.ask(&[(warming.source, buffer)], warming.scratch.desc(), keep, &warming.ticket, false) }
            {
                Ok(asked) => warming.is_asked = asked,
                Err(reason) => {
                    tracing::debug!(reason, "the way to a peer's memory is not wired yet");
                    is_over = true;
                }
            }
        }
        if is_over {
            *place = None;
        }
        !is_over
    }

    /// Begins no first read any more. Whether none is under way.
    pub(crate) fn rests(&self) -> bool {
        let mut place = self.warming.borrow_mut();
        if place.as_ref().is_some_and(|warming| !warming.is_asked) {
            *place = None;
        }
        !self.first.borrow().is_under_way()
    }

    /// Asks for pieces, at most [`PIECES_MAX`] and no more than the provider takes at once. `Ok(false)`: not now. An error ends the copy.
    ///
    /// # Safety
    /// So many bytes as each source has lie inside the registered memory where it goes, and nobody else writes there until the read is over.
    pub(crate) unsafe fn read(
        &self,
        pieces: &[(Source, *mut u8)],
        into: &Rc<Registered<Pool>>,
        ticket: &Rc<Ticket>,
    ) -> Result<bool, String> {
        // SAFETY: the memory is registered and kept by the operation; the caller answers for the ranges.
        unsafe { self.ask(pieces, into.desc(), into.clone(), ticket, true) }
    }

    /// Asks for a packed chunk, at most as long as a buffer of `into`, which nobody else has before the read is over. `Ok(false)`: not now.
    pub(crate) fn collect(
        &self,
        source: Source,
        into: &Rc<Staging>,
        buffer: u32,
        ticket: &Rc<Ticket>,
    ) -> Result<bool, String> {
        let to = into.buffer(buffer).filter(|_| source.bytes <= CHUNK_BYTES);
        let to = to.ok_or_else(|| format!("a chunk of {} bytes for buffer {buffer}", source.bytes))?;
        // SAFETY: the buffer is so long, and is kept by the operation; until it is given back to the peer, no other read goes there.
        unsafe { self.ask(&[(source, to)], into.desc(), into.clone(), ticket, true) }
    }

    /// Closes it for good: its peer is let go.
    pub(crate) fn give_up(&self, reason: String) {
        if self.open.borrow_mut().take().is_some() {
            tracing::warn!(reason, "an endpoint that reads is closed");
            *self.broke.borrow_mut() = Some(reason);
        }
    }

    /// # Safety
    /// As for [`Reader::read`], of memory that `keep` keeps and `desc` describes.
    unsafe fn ask(
        &self,
        pieces: &[(Source, *mut u8)],
        desc: *mut c_void,
        keep: Rc<dyn Any>,
        ticket: &Rc<Ticket>,
        counts: bool,
    ) -> Result<bool, String> {
        let mut open = self.open.borrow_mut();
        let Some(Open { endpoint, address, .. }) = open.as_mut() else { return Err(self.why_closed()) };
        ticket.under_way.set(ticket.under_way.get() + 1);
        let bytes = if counts { pieces.iter().map(|(source, _)| source.bytes as u64).sum() } else { 0 };
        let read = Read { ticket: ticket.clone(), bytes, _into: keep };
        let posted = match pieces {
            [(Source { address: at, key, bytes }, to)] => {
                // SAFETY: the operation keeps the memory; the caller answers for the range.
                unsafe { endpoint.read(*address, *at, *key, *to, *bytes, desc, read) }
            }
            several => {
                let (mut there, mut here) = ([fi_rma_iov::default(); PIECES_MAX], [iovec::default(); PIECES_MAX]);
                for ((there, here), (source, to)) in there.iter_mut().zip(&mut here).zip(several) {
                    *there = fi_rma_iov { addr: source.address, len: source.bytes, key: source.key };
                    *here = iovec { iov_base: to.cast(), iov_len: source.bytes };
                }
                let count = several.len().min(PIECES_MAX);
                let (there, here) = (there.get(..count).unwrap_or_default(), here.get(..count).unwrap_or_default());
                // SAFETY: as above.
                unsafe { endpoint.read_several(*address, there, here, desc, read) }
            }
        };
        match posted {
            Posted::Yes => {
                self.is_refused.set(false);
                Ok(true)
            }
            Posted::Later(_) => {
                self.is_refused.set(true);
                Ok(false)
            }
            Posted::Never(_, reason) => Err(reason),
        }
    }

    /// Makes progress, and tells copies of their reads that are over. A completion error fails the one copy that asked.
    pub(crate) fn progress(&self) {
        let mut place = self.open.borrow_mut();
        let Some(open) = place.as_mut() else { return };
        if open.endpoint.under_way() == 0 {
            return;
        }
        let polled = open.endpoint.poll(&mut open.done, READS_MAX);
        for Done { operation, result } in open.done.drain(..) {
            match result {
                Ok(_) => self.moved.set(self.moved.get().saturating_add(operation.bytes)),
                Err(reason) => drop(operation.ticket.failed.borrow_mut().get_or_insert(reason)),
            }
        }
        // It is of no further use, and closing it ends what is under way.
        if let Some(reason) = polled.err().or_else(|| open.endpoint.error()) {
            drop(place);
            self.give_up(format!("the provider reports an error: {reason}"));
        }
    }

    /// Bytes that were read since it was last asked.
    pub(crate) fn take_moved(&self) -> u64 {
        let moved = self.moved.take();
        self.has_moved.set(self.has_moved.get() || moved > 0);
        moved
    }

    /// The device's counters cover what was read: whether that is new of this peer's.
    pub(crate) fn prove(&self, words: impl FnOnce() -> String) -> bool {
        let is_new = self.has_moved.get() && !self.is_proven();
        if is_new {
            *self.proven.borrow_mut() = Some(words());
        }
        is_new
    }

    /// Whether the device's counters have shown its reads.
    pub(crate) fn is_proven(&self) -> bool {
        self.proven.borrow().is_some()
    }

    /// What they showed.
    pub(crate) fn proven(&self) -> Option<String> {
        self.proven.borrow().clone()
    }

    /// Memory of a GPU is read through it.
    pub(crate) fn note_device(&self) {
        self.reads_devices.set(true);
    }

    /// Whether some of the peer's memory is a GPU's.
    pub(crate) fn reads_devices(&self) -> bool {
        self.reads_devices.get()
    }

    /// Ends every read: none is under way when this returns.
    pub(crate) fn cut(&self) {
        *self.open.borrow_mut() = None;
    }

    /// Whether it was cut off, or broke.
    pub(crate) fn is_closed(&self) -> bool {
        self.open.borrow().is_none()
    }

    /// Why it broke, if it did.
    pub(crate) fn broke(&self) -> Option<String> {
        self.broke.borrow().clone()
    }

    /// Whether reads wait only for the library to take more.
    pub(crate) fn is_refused(&self) -> bool {
        self.is_refused.get() && !self.is_closed()
    }

    /// What ends copies from a closed one.
    pub(crate) fn why_closed(&self) -> String {
        self.broke().unwrap_or_else(|| CUT.to_owned())
    }

    /// One that is not open.
    pub(crate) fn closed() -> Reader {
        Reader {
            open: RefCell::new(None),
            warming: RefCell::new(None),
            first: RefCell::default(),
            broke: RefCell::new(None),
            is_refused: Cell::new(false),
            moved: Cell::new(0),
            has_moved: Cell::new(false),
            proven: RefCell::new(None),
            reads_devices: Cell::new(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device;
    use crate::library::Library;
    use kvferry_core::{Plane, PoolId, PoolLayout};
    use libfabric_sys::{FI_READ, FI_REMOTE_READ};

    const BYTES: usize = 4096;

    fn pool(id: u32, byte: u8) -> Pool {
        pool_of(id, byte, BYTES as u64)
    }

    fn pool_of(id: u32, byte: u8, bytes: u64) -> Pool {
        let plane = Plane { region: 0, offset: 0, blocks: 1, block_stride: bytes, block_bytes: bytes };
        let layout = PoolLayout { regions: vec![bytes], planes: vec![plane] };
        let pool = Pool::allocate(PoolId(id), layout, "reader").unwrap();
        pool.fill(0, 0, byte).unwrap();
        pool
    }

    fn first_byte(pool: &Pool) -> u8 {
        let mut byte = [0];
        pool.read(0, 0, 0, &mut byte).unwrap();
        byte[0]
    }

    /// Two domains over one provider, with a source that is lent and a destination that is registered.
    struct Pair {
        name: &'static str,
        here: Rc<Domain>,
        owner: Endpoint<()>,
        lent: Registered<Pool>,
        /// Where the source begins for who reads it.
        address: u64,
        into: Pool,
        to: *mut u8,
        registered: Rc<Registered<Pool>>,
    }

    impl Pair {
        /// One for each provider that works here; none, and a word, without the library.
        fn all(source: impl Fn() -> Pool, into: impl Fn() -> Pool) -> Vec<Pair> {
            let library = match Library::find() {
                Ok(library) => library,
                Err(reason) => {
                    kvferry_transport::conformance::absent("libfabric", &reason);
                    return Vec::new();
                }
            };
            let works = |name: &&str| *name != "shm" || library.version.0 < libfabric_sys::version(2, 0);
            let pair = |name| {
                let open = || Domain::open(library, device::find(library, name).unwrap(), true).unwrap();
                let (here, there) = (open(), open());
                let owner = Endpoint::open(&there, 8).unwrap();
                let (source, into) = (source(), into());
                let bytes = source.layout().regions[0] as usize;
                let base = source.regions()[0].base();
                let lent = Registered::new(&there, base, bytes, FI_READ | FI_REMOTE_READ, source).unwrap();
                let to = into.regions()[0].base();
                let registered = Rc::new(Registered::new(&here, to, bytes, FI_READ, into.clone()).unwrap());
                let address = if there.mode.addresses { base as u64 } else { 0 };
                Pair { name, here, owner, lent, address, into, to, registered }
            };
            ["lo", "tcp;ofi_rxm/lo", "shm"].into_iter().filter(works).map(pair).collect()
        }

        /// Reads to the end, through an endpoint of its own: what went wrong.
        fn read(&mut self, pieces: &[(Source, *mut u8)]) -> Option<String> {
            let reader = Reader::open(&self.here, self.owner.name()).unwrap();
            let ticket: Rc<Ticket> = Rc::default();
            let (mut is_asked, until) = (false, Instant::now() + Duration::from_secs(20));
            while Instant::now() < until && (!is_asked || ticket.under_way.get() > 0) {
                if !is_asked {
                    // SAFETY: inside the registered memory, which nobody else touches.
                    is_asked = unsafe { reader.read(pieces, &self.registered, &ticket) }.unwrap();
                }
                reader.progress();
                self.owner.poll(&mut Vec::new(), 8).unwrap();
            }
            assert!(is_asked && ticket.under_way.get() == 0, "{}: it does not end", self.name);
            ticket.failed.borrow_mut().take()
        }
    }

    /// A key that nobody knows: the read that used it ends in an error with nothing read, and so does nothing else; the process and the
    /// owner's endpoint go on, and the right key works through another endpoint. Shared memory does not look at keys at all.
    #[test]
    fn a_bad_key_ends_its_own_read_only() {
        for mut pair in Pair::all(|| pool(1, 7), || pool(2, 1)) {
            let piece = |pair: &Pair, key| [(Source { address: pair.address, key, bytes: BYTES }, pair.to)];
            let (name, key) = (pair.name, pair.lent.key());
            let wrong = piece(&pair, !key);
            let failed = pair.read(&wrong);
            if name != "shm" {
                assert!(failed.is_some() && first_byte(&pair.into) == 1, "{name}: success for a key that nobody knows");
            }
            let right = piece(&pair, key);
            assert_eq!((pair.read(&right), first_byte(&pair.into)), (None, 7), "{name}");
        }
    }

    /// The owner stands still in the middle of an answer, longer than all buffers between the two: who reads cuts it off and lives, nothing is
    /// under way then, and nothing comes when the owner goes on.
    #[test]
    fn a_read_that_is_cut_in_the_middle_of_its_answer_is_over() {
        const LONG: usize = 64 << 20;
        for mut pair in Pair::all(|| pool_of(1, 7, LONG as u64), || pool_of(2, 1, LONG as u64)) {
            if pair.name == "shm" {
                continue;
            }
            let reader = Reader::open(&pair.here, pair.owner.name()).unwrap();
            let ticket: Rc<Ticket> = Rc::default();
            let (mut asked, until) = (0, Instant::now() + Duration::from_secs(20));
            while first_byte(&pair.into) == 1 {
                assert!(Instant::now() < until, "{}: nothing comes", pair.name);
                if asked < 2 {
                    let (key, at) = (pair.lent.key(), asked * LONG / 2);
                    let source = Source { address: pair.address + at as u64, key, bytes: LONG / 2 };
                    let piece = [(source, pair.to.wrapping_add(at))];
                    // SAFETY: inside the registered memory, which nobody else touches.
                    asked += usize::from(unsafe { reader.read(&piece, &pair.registered, &ticket) }.unwrap());
                }
                pair.owner.poll(&mut Vec::new(), 8).unwrap();
                reader.progress();
            }
            assert_eq!(ticket.under_way.get(), asked, "{}", pair.name);
            reader.cut();
            assert_eq!(ticket.under_way.get(), 0, "{}: a cut read is under way", pair.name);
            let mut last = [0];
            let mut end = || {
                pair.into.read(0, 0, LONG as u64 - 1, &mut last).unwrap();
                last[0]
            };
            assert_eq!(end(), 1, "{}: it was not cut in the middle", pair.name);
            (0..100).for_each(|_| pair.owner.poll(&mut Vec::new(), 8).unwrap());
            assert_eq!(end(), 1, "{}", pair.name);
        }
    }

    /// A peer in this process is not met in shared memory, whatever the version.
    #[test]
    fn shared_memory_is_not_used_inside_a_process() {
        let library = match Library::find() {
            Ok(library) => library,
            Err(reason) => return kvferry_transport::conformance::absent("libfabric", &reason),
        };
        let open = || Domain::open(library, device::find(library, "shm").unwrap(), false).unwrap();
        let (here, there) = (open(), open());
        let owner: Endpoint<()> = Endpoint::open(&there, 8).unwrap();
        let refused = Reader::open(&here, owner.name()).err().unwrap();
        assert!(refused.contains("inside one process") && refused.contains("use shm"), "{refused}");
    }

    /// Where a provider takes several pieces at once, each comes from its own place and goes to its own, and nothing else is written.
    #[test]
    fn several_pieces_of_one_read_go_where_they_belong() {
        let pattern: Vec<u8> = (0..BYTES).map(|byte| (byte / 7) as u8).collect();
        let source = || {
            let source = pool(1, 0);
            source.write(0, 0, 0, &pattern).unwrap();
            source
        };
        for mut pair in Pair::all(source, || pool(2, 0xee)) {
            let mut due = vec![0xee; BYTES];
            // From, to, how many.
            let moves = [(2048, 0, 1000), (0, 3072, 1024), (4000, 1500, 96), (1024, 1111, 1)];
            let moves = &moves[..moves.len().min(pair.here.info.pieces_max())];
            let key = pair.lent.key();
            let pieces: Vec<(Source, *mut u8)> = moves
                .iter()
                .map(|&(from, at, bytes)| {
                    due[at..at + bytes].copy_from_slice(&pattern[from..from + bytes]);
                    (Source { address: pair.address + from as u64, key, bytes }, pair.to.wrapping_add(at))
                })
                .collect();
            assert_eq!(pair.read(&pieces), None, "{}: {} pieces", pair.name, moves.len());
            let mut found = vec![0; BYTES];
            pair.into.read(0, 0, 0, &mut found).unwrap();
            assert!(found == due, "{}: {} pieces", pair.name, moves.len());
        }
    }
}
