//! Another program's worker, and its memory.

use std::ptr;
use std::rc::Rc;

use ucx_sys::{UCP_AM_SEND_FLAG_EAGER, UCP_EP_CLOSE_FLAG_FORCE, UCS_OK, ucp_ep_h, ucp_rkey_h, ucs_status_t};

use super::batch::Batch;
use super::inbox::{Mark, on_error};
use super::worker::{Inner, RawEvent, RawMemory, RawWorker};
use super::{PackedKey, WorkerAddress};
use crate::request::Begun;

/// What an operation in flight owns, other than copies.
pub(super) enum Operation {
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
            Operation::Sent { operation, .. } | Operation::Flushed { operation } => {
                Some(RawEvent::Done { operation, result })
            }
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

/// One of the pieces of [`RawPeer::copy`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawPiece {
    /// Where here.
    pub range: RawRange,
    /// Where at the peer.
    pub address: u64,
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RawWay {
    /// From the peer.
    Read,
    /// To the peer.
    Write,
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

    /// Reads or writes pieces of one remote range, from or to one local memory, as one operation: it ends when all of them have. Of one that is not
    /// inside the local memory, or that UCX refuses, those before it come to their end, those behind it are not begun, and the operation fails.
    ///
    /// A write is visible there once a flush that was started later is done.
    pub fn copy(
        &self,
        operation: u64,
        way: RawWay,
        (local, key): (&Rc<RawMemory>, &Rc<RawKey>),
        pieces: impl Iterator<Item = RawPiece>,
    ) -> RawBegun {
        let api = &self.worker.library().api;
        let status = Batch::start(&self.worker.copies, operation, (local.clone(), key.clone()), |batch| {
            for RawPiece { range, address } in pieces {
                let begun = batch.add(local.place(range), |at, bytes, params| match way {
                    // SAFETY: the range lies in the memory, which the batch keeps, as it keeps the key; a living endpoint.
                    RawWay::Read => unsafe { api.ucp_get_nbx(self.raw, at.cast(), bytes, address, key.raw, params) },
                    // SAFETY: as above.
                    RawWay::Write => unsafe {
                        api.ucp_put_nbx(self.raw, at.cast_const().cast(), bytes, address, key.raw, params)
                    },
                });
                if !begun {
                    break;
                }
            }
        });
        status.map(|status| self.worker.copied(operation, status))
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
