//! A batch of bytes on their way into a socket.

use std::collections::VecDeque;
use std::io;
use std::net::TcpStream;

use kvferry_transport::{Pool, Slot};

use crate::socket::{self, Moved};
use kvferry_transport::Piece;

/// Entries of one batch; the kernel takes at most 1024 a call.
const ENTRIES_MAX: usize = 512;
/// Bytes of one batch: enough to fill a socket's buffer, few enough to copy when a transfer is cancelled.
const BATCH_BYTES_MAX: usize = 2 << 20;
/// Bytes that are packed instead of named one by one; stays in a core's cache.
const STAGE_BYTES: usize = 64 << 10;
/// Shorter pieces are packed: naming one costs the kernel more than copying it.
pub(crate) const DIRECT_BYTES_MIN: usize = 4096;

/// Pieces of pools and packed bytes, in stream order. Filled when empty, then sent to the last byte.
#[derive(Default)]
pub(crate) struct Gather {
    entries: Vec<libc::iovec>,
    next: usize,
    bytes: usize,
    /// Never grows beyond its first capacity while entries point into it.
    stage: Vec<u8>,
    /// Copied out of pools that were taken back.
    detached: Vec<u8>,
    /// What the entries point into.
    pools: Vec<Pool>,
    /// Each with its entry.
    slots: VecDeque<(usize, Slot)>,
}

impl Gather {
    pub(crate) fn is_empty(&self) -> bool {
        self.next == self.entries.len()
    }

    /// Whether another piece of any length, or a header, still fits.
    pub(crate) fn has_room(&self) -> bool {
        self.entries.len() < ENTRIES_MAX
            && self.bytes < BATCH_BYTES_MAX
            && self.stage.len() + DIRECT_BYTES_MIN <= STAGE_BYTES
    }

    /// Forgets what was sent. Call when empty, before filling.
    pub(crate) fn reset(&mut self) {
        self.entries.clear();
        self.next = 0;
        self.bytes = 0;
        self.stage.clear();
        self.detached = Vec::new();
        self.pools.clear();
        self.slots.clear();
    }

    /// Gives back the memory of an idle stream.
    pub(crate) fn shrink(&mut self) {
        self.reset();
        self.stage = Vec::new();
    }

    /// Keeps a pool until its pieces are sent.
    pub(crate) fn keep(&mut self, pool: &Pool) {
        if self.pools.last().is_none_or(|last| last.id() != pool.id()) {
            self.pools.push(pool.clone());
        }
    }

    /// Packs as many of `bytes` as fit and says how many.
    pub(crate) fn pack(&mut self, bytes: &[u8]) -> usize {
        let taken = self.room().min(bytes.len());
        self.staged(taken, |at| {
            // SAFETY: `at` has room for `taken` bytes inside the stage, which `bytes` cannot overlap: it is borrowed mutably here.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, taken) };
        });
        taken
    }

    /// Appends zeros, as many as fit at once up to `bytes`; says how many.
    pub(crate) fn zeros(&mut self, bytes: usize) -> usize {
        let taken = self.room().min(bytes);
        self.staged(taken, |at| {
            // SAFETY: `at` has room for `taken` bytes inside the stage.
            unsafe { std::ptr::write_bytes(at, 0, taken) };
        });
        taken
    }

    /// Appends a piece of a pool that was given to [`Gather::keep`]. Needs [`Gather::has_room`].
    pub(crate) fn piece(&mut self, piece: Piece) {
        if piece.bytes < DIRECT_BYTES_MIN {
            self.staged(piece.bytes, |at| {
                // SAFETY: the piece lies in a live pool; the stage has room (`has_room`) and is no pool memory.
                unsafe { std::ptr::copy_nonoverlapping(piece.at, at, piece.bytes) };
            });
        } else {
            self.entries.push(libc::iovec { iov_base: piece.at.cast(), iov_len: piece.bytes });
            self.bytes += piece.bytes;
        }
    }

    /// Appends the first bytes of a slot, which nobody else writes. Needs [`Gather::has_room`].
    pub(crate) fn slot(&mut self, slot: Slot, bytes: usize) {
        let bytes = bytes.min(slot.bytes());
        self.entries.push(libc::iovec { iov_base: slot.base().cast(), iov_len: bytes });
        self.bytes += bytes;
        self.slots.push_back((self.entries.len() - 1, slot));
    }

    /// Sends once.
    pub(crate) fn send(&mut self, socket: &TcpStream) -> io::Result<Moved> {
        let entries = self.entries.get(self.next..).unwrap_or_default();
        // SAFETY: every entry points into `stage`, `detached`, a pool in `pools` or a slot in `slots`, all of them alive.
        let moved = unsafe { socket::send(socket, entries) }?;
        if let Moved::Bytes(bytes) = moved {
            self.sent(bytes);
        }
        Ok(moved)
    }

    fn sent(&mut self, mut bytes: usize) {
        while let Some(entry) = self.entries.get_mut(self.next) {
            if bytes < entry.iov_len {
                // SAFETY: fewer bytes than the entry has, so the result stays inside it.
                entry.iov_base = unsafe { entry.iov_base.cast::<u8>().add(bytes) }.cast();
                entry.iov_len -= bytes;
                return;
            }
            bytes -= entry.iov_len;
            self.next += 1;
            // Others may want it.
            while self.slots.front().is_some_and(|(entry, _)| *entry < self.next) {
                self.slots.pop_front();
            }
        }
    }

    /// Copies what is left, so that no entry points into a pool any more.
    pub(crate) fn detach(&mut self) {
        if !self.pools.is_empty() {
            self.copy_out();
        }
    }

    /// The same for slots.
    pub(crate) fn shed(&mut self) {
        if !self.slots.is_empty() {
            self.copy_out();
        }
    }

    fn copy_out(&mut self) {
        let left = self.entries.get(self.next..).unwrap_or_default();
        let total = left.iter().map(|entry| entry.iov_len).sum();
        let mut copy: Vec<u8> = Vec::with_capacity(total);
        for entry in left {
            // SAFETY: the entry's memory is alive (`stage`, `detached`, `pools` or `slots`); the copy has capacity for the sum of all entries, and
            // after each step the bytes up to the new length are initialised.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    entry.iov_base.cast::<u8>(),
                    copy.as_mut_ptr().add(copy.len()),
                    entry.iov_len,
                );
                copy.set_len(copy.len() + entry.iov_len);
            }
        }
        let bytes = self.bytes;
        self.reset();
        self.detached = copy;
        // What is left counts as a full batch: it is sent before more is filled in.
        self.bytes = bytes;
        if total > 0 {
            self.entries.push(libc::iovec { iov_base: self.detached.as_mut_ptr().cast(), iov_len: total });
        }
    }

    fn room(&self) -> usize {
        STAGE_BYTES.saturating_sub(self.stage.len())
    }

    /// Appends `bytes` that `write` puts at the end of the stage.
    fn staged(&mut self, bytes: usize, write: impl FnOnce(*mut u8)) {
        if bytes == 0 || bytes > self.room() {
            return;
        }
        if self.stage.capacity() < STAGE_BYTES {
            // Only ever from empty, when no entry points into it.
            self.stage = Vec::with_capacity(STAGE_BYTES);
        }
        let start = self.stage.len();
        // SAFETY: start + bytes is within the capacity; `write` initialises exactly those bytes.
        let at = unsafe {
            let at = self.stage.as_mut_ptr().add(start);
            write(at);
            self.stage.set_len(start + bytes);
            at
        };
        self.bytes += bytes;
        match self.entries.last_mut() {
            Some(last) if last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == at => last.iov_len += bytes,
            _ => self.entries.push(libc::iovec { iov_base: at.cast(), iov_len: bytes }),
        }
    }
}
