//! A batch of places for bytes on their way out of a socket.

use std::collections::VecDeque;

use crate::gather::DIRECT_BYTES_MIN;
use kvferry_transport::{Cursor, Piece};

/// Entries of one batch; one more is kept for what follows it.
const ENTRIES_MAX: usize = 511;
/// Bytes received into a buffer and then put in place piece by piece; stays in a core's cache.
const STAGE_BYTES: usize = 64 << 10;

/// The places of a frame's next bytes, in stream order.
#[derive(Default)]
pub(crate) struct Scatter {
    entries: Vec<libc::iovec>,
    /// For each entry: how many pieces it is put into once it is full, or 0 where it is a piece itself.
    pieces: Vec<usize>,
    next: usize,
    /// Bytes that the entries still want.
    wanted: usize,
    stage: Vec<u8>,
    staged: usize,
    /// The small pieces behind the staged entries, in order.
    small: VecDeque<Piece>,
    /// Bytes of the stage that were put in place.
    placed: usize,
}

impl Scatter {
    pub(crate) fn is_empty(&self) -> bool {
        self.next == self.entries.len()
    }

    /// Bytes that the batch still wants.
    pub(crate) fn wanted(&self) -> usize {
        self.wanted
    }

    /// Forgets every place: no byte goes there any more.
    pub(crate) fn clear(&mut self) {
        self.entries.clear();
        self.pieces.clear();
        self.next = 0;
        self.wanted = 0;
        self.staged = 0;
        self.placed = 0;
        self.small.clear();
    }

    /// Gives back the memory of an idle stream.
    pub(crate) fn shrink(&mut self) {
        self.clear();
        self.stage = Vec::new();
    }

    /// Takes places for at most `bytes` bytes from a cursor. Call when empty.
    pub(crate) fn fill(&mut self, cursor: &mut Cursor, bytes: usize) {
        self.clear();
        let mut open = false;
        while self.wanted < bytes && self.entries.len() < ENTRIES_MAX && self.staged + DIRECT_BYTES_MIN <= STAGE_BYTES {
            let Some(piece) = cursor.take(bytes - self.wanted) else {
                break;
            };
            self.wanted += piece.bytes;
            if piece.bytes >= DIRECT_BYTES_MIN {
                self.entries.push(libc::iovec { iov_base: piece.at.cast(), iov_len: piece.bytes });
                self.pieces.push(0);
                open = false;
                continue;
            }
            if self.stage.len() < STAGE_BYTES {
                self.stage = vec![0; STAGE_BYTES];
            }
            match (open, self.entries.last_mut(), self.pieces.last_mut()) {
                (true, Some(entry), Some(pieces)) => {
                    entry.iov_len += piece.bytes;
                    *pieces += 1;
                }
                _ => {
                    // SAFETY: `staged` is below the stage's length, which does not change while entries point into it.
                    let at = unsafe { self.stage.as_mut_ptr().add(self.staged) };
                    self.entries.push(libc::iovec { iov_base: at.cast(), iov_len: piece.bytes });
                    self.pieces.push(1);
                    open = true;
                }
            }
            self.staged += piece.bytes;
            self.small.push_back(piece);
        }
    }

    /// The places left, for one receiving call, and `tail` behind them when the batch reaches `left`, the end of the frame.
    pub(crate) fn with_tail<R>(
        &mut self,
        tail: Option<libc::iovec>,
        receive: impl FnOnce(&mut [libc::iovec]) -> R,
    ) -> R {
        let length = self.entries.len();
        self.entries.extend(tail);
        let result = receive(self.entries.get_mut(self.next..).unwrap_or_default());
        self.entries.truncate(length);
        result
    }

    /// Accounts for received bytes and puts full staged entries in place. The pool of every small piece must still be alive.
    pub(crate) fn received(&mut self, bytes: usize) {
        let mut bytes = bytes.min(self.wanted);
        self.wanted -= bytes;
        while let (Some(entry), Some(pieces)) = (self.entries.get_mut(self.next), self.pieces.get(self.next)) {
            if bytes < entry.iov_len {
                // SAFETY: fewer bytes than the entry has, so the result stays inside it.
                entry.iov_base = unsafe { entry.iov_base.cast::<u8>().add(bytes) }.cast();
                entry.iov_len -= bytes;
                return;
            }
            bytes -= entry.iov_len;
            self.next += 1;
            for piece in self.small.drain(..(*pieces).min(self.small.len())) {
                // SAFETY: the stage holds `staged` received bytes, of which this piece's are the next; the piece lies in a live pool, which
                // the caller vouches for, and is no memory of the stage.
                unsafe {
                    std::ptr::copy_nonoverlapping(self.stage.as_ptr().add(self.placed), piece.at, piece.bytes);
                }
                self.placed += piece.bytes;
            }
        }
    }
}
