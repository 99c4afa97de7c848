//! Another program's worker, and its memory.

use std::ptr;
use std::rc::Rc;

use ucx_sys::{
    UCP_AM_SEND_FLAG_EAGER, UCP_EP_CLOSE_FLAG_FORCE, UCS_ERR_INVALID_PARAM, UCS_OK, ucp_ep_h, ucp_rkey_h, ucs_status_t,
};

use super::inbox::{Mark, on_error};
use super::worker::{Inner, RawEvent, RawMemory, RawWorker};
use super::{PackedKey, WorkerAddress};
use crate::request::Begun;

/// What an operation in flight owns.
pub(super) enum Operation {
    Copied { operation: u64, _memory: Rc<RawMemory>, _key: Rc<RawKey> },
    Sent { operation: u64, _message: Vec<u8> },
    Flushed { operation: u64 },
    Received { buffer: Vec<u8> },
    Closed { peer: u64, _mark: Box<Mark> },
}

impl Operation {
    /// What is told of its end.
    pub(super) fn end(self, status: ucs_status_t, words: impl Fn(ucs_status_t) -> String) -> Option<RawEvent> {
        let result = if status == UCS_OK { Ok(()) } else { Err(words(status)) };
        match self {
            Operation::Copied { operation, .. }
            | Operation::Sent { operation, .. }
            | Operation::Flushed { operation } => Some(RawEvent::Done { operation, result }),
            Operation::Received { buffer } => result.is_ok().then_some(RawEvent::Message(buffer)),
            Operation::Closed { peer, .. } => Some(RawEvent::Closed { peer }),
        }
    }
}

/// A connected peer. What is not closed by [`RawPeer::close`] stays connected until the worker is gone.
pub struct RawPeer {
    worker: Rc<Inner>,
    raw: ucp_ep_h,
    mark: Option<Box<Mark>>,
}

/// A key of a peer's memory.
pub struct RawKey {
    worker: Rc<Inner>,
    raw: ucp_rkey_h,
}

/// Bytes of local memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawRange {
    /// Region of the pool.
    pub region: usize,
    /// Offset of the first byte.
    pub offset: u64,
    /// How many.
    pub bytes: u64,
}

/// What became of a call: how the operation ended, if it is over already.
pub type RawBegun = Option<RawEvent>;

impl RawWorker {
    /// Starts connecting to a worker; `peer` is the number by which events name it.
    pub fn connect(&self, peer: u64, address: &WorkerAddress) -> Result<RawPeer, String> {
        let worker = &self.inner;
        let mark = Box::new(Mark { inbox: worker.inbox.clone(), peer });
        // SAFETY: the lengths in the address were checked, and an end follows it; the mark lives until the endpoint is closed.
        let raw = unsafe { worker.connect(address.padded(), Some(on_error), ptr::from_ref(mark.as_ref()).cast())? };
        Ok(RawPeer { worker: worker.clone(), raw, mark: Some(mark) })
    }
}

impl RawPeer {
    /// Unpacks a key of this peer's memory.
    pub fn key(&self, packed: &PackedKey) -> Result<Rc<RawKey>, String> {
        let library = self.worker.library();
        let mut raw = ptr::null_mut();
        // SAFETY: a living endpoint; the key's lengths were checked, and end marks follow it.
        let status = unsafe { library.api.ucp_ep_rkey_unpack(self.raw, packed.padded().as_ptr().cast(), &mut raw) };
        if status != UCS_OK {
            return Err(format!("UCX does not take the peer's key: {}", library.words(status)));
        }
        Ok(Rc::new(RawKey { worker: self.worker.clone(), raw }))
    }

    /// Reads remote memory into local memory. Refused where the range is not the memory's.
    pub fn read(&self, operation: u64, to: &Rc<RawMemory>, range: RawRange, from: (u64, &Rc<RawKey>)) -> RawBegun {
        let (address, key) = from;
        let owned = Operation::Copied { operation, _memory: to.clone(), _key: key.clone() };
        let Some((at, bytes)) = place(to, range) else { return self.refuse(owned) };
        self.over(self.worker.operations.start(owned, 0, |params| {
            // SAFETY: the range lies in the memory, which the operation keeps, as it keeps the key; a living endpoint.
            unsafe { self.worker.library().api.ucp_get_nbx(self.raw, at.cast(), bytes, address, key.raw, params) }
        }))
    }

    /// Writes local memory into remote memory. Visible there once a flush that was started later is done.
    pub fn write(&self, operation: u64, from: &Rc<RawMemory>, range: RawRange, to: (u64, &Rc<RawKey>)) -> RawBegun {
        let (address, key) = to;
        let owned = Operation::Copied { operation, _memory: from.clone(), _key: key.clone() };
        let Some((at, bytes)) = place(from, range) else { return self.refuse(owned) };
        self.over(self.worker.operations.start(owned, 0, |params| {
            // SAFETY: the range lies in the memory, which the operation keeps, as it keeps the key; a living endpoint.
            unsafe {
                self.worker.library().api.ucp_put_nbx(self.raw, at.cast_const().cast(), bytes, address, key.raw, params)
            }
        }))
    }

    /// Done when everything that was started at this peer before is done there.
    pub fn flush(&self, operation: u64) -> RawBegun {
        self.over(self.worker.operations.start(Operation::Flushed { operation }, 0, |params| {
            // SAFETY: a living endpoint; the parameters live during the call.
            unsafe { self.worker.library().api.ucp_ep_flush_nbx(self.raw, params) }
        }))
    }

    /// Sends a message. It may overtake operations that no flush has followed.
    pub fn send(&self, operation: u64, message: Vec<u8>) -> RawBegun {
        let (at, bytes, id) = (message.as_ptr(), message.len(), self.worker.message);
        let owned = Operation::Sent { operation, _message: message };
        self.over(self.worker.operations.start(owned, UCP_AM_SEND_FLAG_EAGER, |params| {
            // SAFETY: the operation owns the message, whose bytes do not move; a living endpoint.
            unsafe { self.worker.library().api.ucp_am_send_nbx(self.raw, id, ptr::null(), 0, at.cast(), bytes, params) }
        }))
    }

    /// Gives it up at once; what is in flight fails, each operation by its own [`RawEvent::Done`], also after [`RawEvent::Closed`].
    pub fn close(mut self) -> RawBegun {
        let mark = self.mark.take()?;
        let owned = Operation::Closed { peer: mark.peer, _mark: mark };
        self.over(self.worker.operations.start(owned, UCP_EP_CLOSE_FLAG_FORCE, |params| {
            // SAFETY: a living endpoint, which nobody can name any more.
            unsafe { self.worker.library().api.ucp_ep_close_nbx(self.raw, params) }
        }))
    }

    fn over(&self, begun: Begun<Operation>) -> RawBegun {
        match begun {
            Begun::Over(operation, status) => operation.end(status, |status| self.worker.library().words(status)),
            Begun::InFlight => None,
        }
    }

    fn refuse(&self, operation: Operation) -> RawBegun {
        operation.end(UCS_ERR_INVALID_PARAM, |status| self.worker.library().words(status))
    }
}

impl Drop for RawPeer {
    fn drop(&mut self) {
        // UCX may call its error handler until the worker is gone.
        if let Some(mark) = self.mark.take() {
            std::mem::forget(mark);
        }
    }
}

impl Drop for RawKey {
    fn drop(&mut self) {
        // SAFETY: unpacked once, destroyed once; operations that use it hold this value.
        unsafe { self.worker.library().api.ucp_rkey_destroy(self.raw) };
    }
}

/// The first byte of a range, if the memory has all of it.
fn place(memory: &RawMemory, range: RawRange) -> Option<(*mut u8, usize)> {
    let region = memory.pool.regions().get(range.region)?;
    let end = range.offset.checked_add(range.bytes)?;
    (end <= region.bytes()).then_some(())?;
    // Inside the region, so inside the address space.
    let at = region.base().wrapping_add(usize::try_from(range.offset).ok()?);
    Some((at, usize::try_from(range.bytes).ok()?))
}
