//! Buffers of packed chunks: equal parts of memory that the device is told of once, so that no chunk waits for a registration or a page.
//!
//! Whoever holds a [`Buffer`] keeps the memory, its registration and the context: an operation in flight never loses what it uses, even where
//! the transport is gone. Beyond the limit, and where a device cannot be told, buffers are plain memory, which UCX registers if it must.

use std::cell::{Cell, RefCell};
use std::ops::Deref;
use std::rc::Rc;

use kvferry_core::{Plane, PoolId, PoolLayout};
use kvferry_transport::{Pool, PoolOptions};
use ucx_sys::ucp_mem_h;

use crate::context::{Context, Mapped};
use crate::library::Version;
use crate::link::CREDITS;

/// Buffers that are made at once: as many as one link has under way.
const SLAB_BUFFERS: u32 = CREDITS;
/// Where one begins: a multiple of this from the last, which is the largest page that a host goes by.
const ALIGNMENT: u64 = 64 << 10;
/// Operations are given the registration from this version on: earlier ones did not keep to it in a rendezvous, and find it in their cache.
const HANDLES_SINCE: Version = Version(1, 17, 0);

/// The buffers of one transport.
pub(crate) struct Staging {
    shared: Rc<Shared>,
}

struct Shared {
    context: Rc<Context>,
    buffer_bytes: usize,
    slab_bytes: u64,
    budget: Rc<Budget>,
    slabs: RefCell<Vec<Slab>>,
    idle: RefCell<Vec<Place>>,
    /// No more are tried for.
    refused: Cell<bool>,
}

/// Kept until the last buffer of it is.
struct Slab {
    _registered: Mapped,
    _share: Share,
}

/// What all staging of one transport may take, registered as it is.
pub(crate) struct Budget {
    bytes_max: u64,
    taken: Cell<u64>,
}

/// A part of it, which is given back with this.
pub(crate) struct Share {
    budget: Rc<Budget>,
    bytes: u64,
}

impl Budget {
    fn has(&self, bytes: u64) -> bool {
        bytes <= self.bytes_max.saturating_sub(self.taken.get())
    }

    /// `None` where so much is not left.
    pub(crate) fn take(self: &Rc<Budget>, bytes: u64) -> Option<Share> {
        if !self.has(bytes) {
            return None;
        }
        self.taken.set(self.taken.get().saturating_add(bytes));
        Some(Share { budget: self.clone(), bytes })
    }

    /// Bytes that are taken.
    pub(crate) fn taken(&self) -> u64 {
        self.taken.get()
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.taken.set(self.budget.taken.get().saturating_sub(self.bytes));
    }
}

/// One buffer's memory.
#[derive(Clone, Copy)]
struct Place {
    at: *mut u8,
    handle: Option<ucp_mem_h>,
}

impl Staging {
    /// The first buffers, of `buffer_bytes` bytes each; all together take no more than `bytes_max`.
    pub(crate) fn new(context: &Rc<Context>, buffer_bytes: usize, bytes_max: u64) -> Result<Staging, String> {
        let budget = Rc::new(Budget { bytes_max, taken: Cell::new(0) });
        let staging = Staging::within(budget, context, buffer_bytes);
        if staging.shared.can_grow() {
            staging.shared.grow()?;
        }
        Ok(staging)
    }

    /// Buffers of another length under the same limit; none of them is made yet.
    pub(crate) fn beside(&self, buffer_bytes: usize) -> Staging {
        Staging::within(self.shared.budget.clone(), &self.shared.context, buffer_bytes)
    }

    fn within(budget: Rc<Budget>, context: &Rc<Context>, buffer_bytes: usize) -> Staging {
        let slab_bytes = stride(buffer_bytes).saturating_mul(SLAB_BUFFERS.into());
        let shared = Shared {
            context: context.clone(),
            buffer_bytes,
            slab_bytes,
            budget,
            slabs: RefCell::default(),
            idle: RefCell::default(),
            refused: Cell::new(false),
        };
        Staging { shared: Rc::new(shared) }
    }

    /// What limits it.
    pub(crate) fn budget(&self) -> &Rc<Budget> {
        &self.shared.budget
    }

    /// Has buffers ready for so many links, as far as the limit goes: when peers join, not when they transfer.
    pub(crate) fn provide(&self, links: usize) {
        let shared = &self.shared;
        while shared.made() < links as u64 && shared.can_grow() && !shared.refused.get() {
            if let Err(reason) = shared.grow() {
                shared.refused.set(true);
                tracing::warn!(
                    reason,
                    made = shared.made(),
                    "no more staging for packed chunks; UCX registers their memory by itself"
                );
            }
        }
    }

    /// An empty buffer.
    pub(crate) fn buffer(&self) -> Buffer {
        match self.shared.idle.borrow_mut().pop() {
            Some(place) => Buffer::Staged(Staged { shared: self.shared.clone(), place, length: 0 }),
            None => Buffer::Plain(Vec::with_capacity(self.shared.buffer_bytes)),
        }
    }
}

impl Shared {
    fn made(&self) -> u64 {
        self.slabs.borrow().len() as u64
    }

    fn can_grow(&self) -> bool {
        self.budget.has(self.slab_bytes)
    }

    fn grow(&self) -> Result<(), String> {
        let share = self.budget.take(self.slab_bytes).ok_or("no more is allowed")?;
        let stride = stride(self.buffer_bytes);
        let plane = Plane {
            region: 0,
            offset: 0,
            blocks: SLAB_BUFFERS,
            block_stride: stride,
            block_bytes: self.buffer_bytes as u64,
        };
        let layout = PoolLayout { regions: vec![self.slab_bytes], planes: vec![plane] };
        // Of no peer's concern; touched now, on a huge page where there is one.
        let pool = Pool::allocate_private(PoolId(u32::MAX), layout, &PoolOptions::default());
        let pool = pool.map_err(|error| error.to_string())?;
        let registered = Mapped::register(&self.context, &pool)?;
        let given = self.context.library.version >= HANDLES_SINCE;
        let handle = registered.handles().first().copied().filter(|_| given);
        let starts = pool.regions().first().map(|region| region.base()).into_iter();
        let places = starts.flat_map(|base| {
            (0..u64::from(SLAB_BUFFERS)).map(move |number| base.wrapping_add((number * stride) as usize))
        });
        self.idle.borrow_mut().extend(places.map(|at| Place { at, handle }));
        self.slabs.borrow_mut().push(Slab { _registered: registered, _share: share });
        Ok(())
    }
}

fn stride(buffer_bytes: usize) -> u64 {
    (buffer_bytes as u64).next_multiple_of(ALIGNMENT)
}

/// Bytes of one message. Its memory does not move, and is another's as soon as this is dropped.
pub(crate) enum Buffer {
    /// Part of the staging.
    Staged(Staged),
    /// Memory of its own.
    Plain(Vec<u8>),
}

/// Part of the staging.
pub(crate) struct Staged {
    shared: Rc<Shared>,
    place: Place,
    /// Bytes that were written; no more than there is room for.
    length: usize,
}

impl Buffer {
    /// What UCX is told of its memory.
    pub(crate) fn handle(&self) -> Option<ucp_mem_h> {
        match self {
            Buffer::Staged(staged) => staged.place.handle,
            Buffer::Plain(_) => None,
        }
    }

    /// Appends bytes; false where there is no room.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> bool {
        // SAFETY: a slice is readable, and no other reference to this buffer's memory is there.
        unsafe { self.append_from(bytes.as_ptr(), bytes.len()) }
    }

    /// Appends bytes that no reference may cover, as those of a pool; false where there is no room.
    ///
    /// # Safety
    /// `from` must have `bytes` readable bytes that are not of this buffer.
    pub(crate) unsafe fn append_from(&mut self, from: *const u8, bytes: usize) -> bool {
        let to = match self {
            Buffer::Staged(staged) => {
                let Some(room) = staged.shared.buffer_bytes.checked_sub(staged.length) else { return false };
                if bytes > room {
                    return false;
                }
                staged.place.at.wrapping_add(staged.length)
            }
            Buffer::Plain(memory) => {
                memory.reserve(bytes);
                memory.as_mut_ptr().wrapping_add(memory.len())
            }
        };
        // SAFETY: there is room for so many bytes from there on, which are this buffer's alone; the caller answers for the source.
        unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
        match self {
            Buffer::Staged(staged) => staged.length += bytes,
            // SAFETY: reserved, and initialised above.
            Buffer::Plain(memory) => unsafe { memory.set_len(memory.len() + bytes) },
        }
        true
    }

    /// Makes it so long, whatever is in it then: where UCX may write. `None` where there is no room.
    pub(crate) fn lay_open(&mut self, bytes: usize) -> Option<*mut u8> {
        match self {
            Buffer::Staged(staged) => {
                if bytes > staged.shared.buffer_bytes {
                    return None;
                }
                // All of the staging is initialised: by the kernel, and by what was there before.
                staged.length = bytes;
                Some(staged.place.at)
            }
            Buffer::Plain(memory) => {
                memory.resize(bytes, 0);
                Some(memory.as_mut_ptr())
            }
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            // SAFETY: this buffer's memory, of which so many bytes are there; nobody writes it while it is lent, but UCX by operations that own it.
            Buffer::Staged(staged) => unsafe { std::slice::from_raw_parts(staged.place.at, staged.length) },
            Buffer::Plain(memory) => memory,
        }
    }
}

impl From<Vec<u8>> for Buffer {
    fn from(memory: Vec<u8>) -> Buffer {
        Buffer::Plain(memory)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        self.shared.idle.borrow_mut().push(self.place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proof::tests::open;

    const BYTES: usize = 10_000;

    fn staging(slabs: u64) -> Option<Staging> {
        let transport = open()?;
        let slab = stride(BYTES) * u64::from(SLAB_BUFFERS);
        let staging = Staging::new(&transport.context, BYTES, slab * slabs + slab / 2).unwrap();
        Some(staging)
    }

    fn is_staged(buffer: &Buffer) -> bool {
        matches!(buffer, Buffer::Staged(_))
    }

    #[test]
    fn buffers_do_not_overlap_and_come_back() {
        let Some(staging) = staging(2) else { return };
        staging.provide(9);
        let mut buffers: Vec<Buffer> = (0..2 * SLAB_BUFFERS).map(|_| staging.buffer()).collect();
        for (buffer, number) in buffers.iter_mut().zip(1..) {
            assert!(is_staged(buffer) && buffer.append(&[number; BYTES]) && !buffer.append(&[0]));
        }
        for (buffer, number) in buffers.iter().zip(1u8..) {
            assert!(buffer.len() == BYTES && buffer.iter().all(|byte| *byte == number));
        }
        assert!(!is_staged(&staging.buffer()), "all are taken");
        buffers.truncate(3);
        let again = staging.buffer();
        assert!(is_staged(&again) && again.is_empty());
        assert!(buffers.iter().zip(1u8..).all(|(buffer, number)| buffer.iter().all(|byte| *byte == number)));
    }

    #[test]
    fn no_more_is_made_than_is_allowed_and_the_rest_is_plain() {
        let Some(none) = staging(0) else { return };
        none.provide(100);
        assert_eq!(none.budget().taken(), 0);
        let mut plain = none.buffer();
        assert!(!is_staged(&plain) && plain.handle().is_none() && plain.append(&[7; BYTES]) && plain.len() == BYTES);
        let staging = staging(3).unwrap();
        assert_eq!(staging.budget().taken(), staging.shared.slab_bytes);
        staging.provide(100);
        assert_eq!(staging.budget().taken(), 3 * staging.shared.slab_bytes);
    }

    #[test]
    fn a_buffer_outlives_its_transport() {
        let Some(staging) = staging(1) else { return };
        let mut buffer = staging.buffer();
        drop(staging);
        assert!(buffer.append(&[5; 100]));
        let at = buffer.lay_open(BYTES).unwrap();
        // SAFETY: so many bytes were laid open.
        unsafe { at.write_bytes(9, BYTES) };
        assert!(buffer.len() == BYTES && buffer.iter().all(|byte| *byte == 9) && buffer.lay_open(BYTES + 1).is_none());
    }

    #[test]
    fn operations_are_given_the_registration_where_that_is_sound() {
        let Some(transport) = open() else { return };
        let staging = Staging::new(&transport.context, BYTES, 1 << 20).unwrap();
        assert_eq!(staging.buffer().handle().is_some(), transport.context.library.version >= HANDLES_SINCE);
    }
}
