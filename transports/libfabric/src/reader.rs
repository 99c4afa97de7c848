//! The endpoint through which one peer's memory is read. Closed, it proves that nothing of that peer is written here any more.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::ffi::c_void;
use std::rc::Rc;
use std::time::{Duration, Instant};

use kvferry_transport::Pool;

use crate::domain::{Domain, Registered};
use crate::endpoint::{Done, Endpoint, Posted};
use crate::slab::Slab;

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
        let (scratch, ticket) = (scratch.clone(), Rc::default());
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
            match unsafe { self.ask(warming.source, buffer, warming.scratch.desc(), keep, &warming.ticket, false) } {
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

    /// Asks for bytes. `Ok(false)`: not now. An error ends the copy.
    ///
    /// # Safety
    /// `source.bytes` bytes at `to` lie inside the registered memory, and nobody else writes there until the read is over.
    pub(crate) unsafe fn read(
        &self,
        source: Source,
        to: *mut u8,
        into: &Rc<Registered<Pool>>,
        ticket: &Rc<Ticket>,
    ) -> Result<bool, String> {
        // SAFETY: the memory is registered and kept by the operation; the caller answers for the range.
        unsafe { self.ask(source, to, into.desc(), into.clone(), ticket, true) }
    }

    /// # Safety
    /// As for [`Reader::read`], of memory that `keep` keeps and `desc` describes.
    unsafe fn ask(
        &self,
        source: Source,
        to: *mut u8,
        desc: *mut c_void,
        keep: Rc<dyn Any>,
        ticket: &Rc<Ticket>,
        counts: bool,
    ) -> Result<bool, String> {
        let mut open = self.open.borrow_mut();
        let Some(Open { endpoint, address, .. }) = open.as_mut() else { return Err(self.why_closed()) };
        ticket.under_way.set(ticket.under_way.get() + 1);
        let Source { address: at, key, bytes } = source;
        let read = Read { ticket: ticket.clone(), bytes: if counts { bytes as u64 } else { 0 }, _into: keep };
        // SAFETY: the operation keeps the memory; the caller answers for the range.
        match unsafe { endpoint.read(*address, at, key, to, bytes, desc, read) } {
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
            tracing::warn!(reason, "the provider reports an error of an endpoint that reads; it is closed");
            *self.broke.borrow_mut() = Some(format!("the provider reports an error: {reason}"));
            *place = None;
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
            broke: RefCell::new(None),
            is_refused: Cell::new(false),
            moved: Cell::new(0),
            has_moved: Cell::new(false),
            proven: RefCell::new(None),
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
        let plane = Plane { region: 0, offset: 0, blocks: 1, block_stride: BYTES as u64, block_bytes: BYTES as u64 };
        let layout = PoolLayout { regions: vec![BYTES as u64], planes: vec![plane] };
        let pool = Pool::allocate(PoolId(id), layout, "reader").unwrap();
        pool.fill(0, 0, byte).unwrap();
        pool
    }

    fn first_byte(pool: &Pool) -> u8 {
        let mut byte = [0];
        pool.read(0, 0, 0, &mut byte).unwrap();
        byte[0]
    }

    /// A key that nobody knows: the read that used it ends in an error with nothing read, and so does nothing else; the process and the
    /// owner's endpoint go on, and the right key works through another endpoint. Shared memory does not look at keys at all.
    #[test]
    fn a_bad_key_ends_its_own_read_only() {
        let library = match Library::find() {
            Ok(library) => library,
            Err(reason) => return kvferry_transport::conformance::absent("libfabric", &reason),
        };
        for name in ["lo", "tcp;ofi_rxm/lo", "shm"] {
            if name == "shm" && library.version.0 >= libfabric_sys::version(2, 0) {
                continue;
            }
            let open = || Domain::open(library, device::find(library, name).unwrap()).unwrap();
            let (here, there) = (open(), open());
            let mut owner: Endpoint<()> = Endpoint::open(&there, 8).unwrap();
            let (source, into) = (pool(1, 7), pool(2, 1));
            let base = source.regions()[0].base();
            let lent = Registered::new(&there, base, BYTES, FI_READ | FI_REMOTE_READ, source.clone()).unwrap();
            let to = into.regions()[0].base();
            let registered = Rc::new(Registered::new(&here, to, BYTES, FI_READ, into.clone()).unwrap());
            let address = if there.mode.addresses { base as u64 } else { 0 };
            let mut read = |key: u64| {
                let reader = Reader::open(&here, owner.name()).unwrap();
                let ticket: Rc<Ticket> = Rc::default();
                let (mut is_asked, until) = (false, Instant::now() + Duration::from_secs(20));
                while Instant::now() < until && (!is_asked || ticket.under_way.get() > 0) {
                    if !is_asked {
                        let source = Source { address, key, bytes: BYTES };
                        // SAFETY: the registered memory, of that length, which nobody else touches.
                        is_asked = unsafe { reader.read(source, to, &registered, &ticket) }.unwrap();
                    }
                    reader.progress();
                    owner.poll(&mut Vec::new(), 8).unwrap();
                }
                assert!(is_asked && ticket.under_way.get() == 0, "{name}: it does not end");
                ticket.failed.borrow_mut().take()
            };
            let failed = read(!lent.key());
            if name != "shm" {
                assert!(failed.is_some() && first_byte(&into) == 1, "{name}: success for a key that nobody knows");
            }
            assert_eq!((read(lent.key()), first_byte(&into)), (None, 7), "{name}");
        }
    }
}
