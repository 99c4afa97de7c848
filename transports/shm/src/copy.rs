//! The copies themselves: only ever from a peer's memory into a pool of our own, on our own thread.

use std::rc::Rc;
use std::sync::Arc;

use kvferry_core::{PoolLayout, Program, Tile, UnitRange};
use kvferry_transport::{Pool, TransferError, first_part};

use crate::memory::Memory;
use crate::stream::Streamer;

/// What a piece costs beside its bytes, in bytes that could be copied in that time.
const PIECE_COST: u64 = 32;
/// What a step costs at least.
const STEP_COST_MIN: u64 = 4096;

/// A program on its way into a local pool.
pub(crate) struct Walk {
    program: Arc<Program>,
    range: UnitRange,
    source: Arc<PoolLayout>,
    memory: Rc<Memory>,
    destination: Pool,
    bytes: u64,
    left: u64,
    pieces: u64,
}

impl Walk {
    /// The caller has validated the program against both layouts.
    pub(crate) fn new(
        program: Arc<Program>,
        range: UnitRange,
        source: Arc<PoolLayout>,
        memory: Rc<Memory>,
        destination: Pool,
    ) -> Walk {
        let units = program.units();
        let range = UnitRange { start: range.start.min(units), end: range.end.min(units) };
        let bytes = program.bytes_in(range);
        Walk { program, range, source, memory, destination, bytes, left: bytes, pieces: 0 }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn pieces(&self) -> u64 {
        self.pieces
    }

    pub(crate) fn is_done(&self) -> bool {
        self.range.start >= self.range.end
    }

    /// Copies about `budget` bytes, at least one unit, and returns what that cost: bytes, and some more for each piece.
    pub(crate) fn advance(&mut self, budget: u64) -> Result<u64, TransferError> {
        let (part, bytes) = first_part(&self.program, self.range, self.left, budget);
        let (mut copied, before) = (0, self.pieces);
        let mut copier =
            Copier { streamer: Streamer::new(self.bytes), process: ProcessBatch::default(), pending: None };
        for tile in self.program.tiles(part, &self.source, self.destination.layout()) {
            copied += tile.run_bytes * u64::from(tile.inner) * u64::from(tile.outer);
            self.pieces += u64::from(tile.inner) * u64::from(tile.outer);
            copier.tile(&tile, &self.memory, &self.destination)?;
        }
        copier.finish(&self.memory)?;
        if copied != bytes {
            return Err(TransferError::Io {
                context: "walking the program",
                message: format!(
                    "{copied} bytes were laid out where {bytes} were planned; the program and the layouts disagree"
                ),
            });
        }
        self.range.start = part.end;
        self.left = self.left.saturating_sub(bytes);
        Ok(bytes.saturating_add((self.pieces - before).saturating_mul(PIECE_COST)).max(STEP_COST_MIN))
    }
}

struct Copier {
    streamer: Streamer,
    process: ProcessBatch,
    /// A piece whose source is being fetched into the cache while the one before it is copied.
    pending: Option<(*mut u8, *const u8, usize)>,
}

impl Copier {
    fn tile(&mut self, tile: &Tile, memory: &Memory, pool: &Pool) -> Result<(), TransferError> {
        if tile.inner == 0 || tile.outer == 0 || tile.run_bytes == 0 {
            return Ok(());
        }
        let outside = || TransferError::Refused("a block lies outside its pool".into());
        let source = extent(tile, tile.inner_source, tile.outer_source)
            .and_then(|n| memory.address(tile.source, n))
            .ok_or_else(outside)?;
        let destination: *mut u8 = extent(tile, tile.inner_destination, tile.outer_destination)
            .and_then(|n| pool.address(tile.destination, n))
            .ok_or_else(outside)?;
        let run = tile.run_bytes as usize;
        for outer in 0..u64::from(tile.outer) {
            let mut from = source + outer * tile.outer_source;
            let mut to = destination.wrapping_add((outer * tile.outer_destination) as usize);
            for _ in 0..tile.inner {
                match memory {
                    // SAFETY: the whole extent of the tile was checked against the mapped region and the pool's region just above.
                    Memory::Mapped(_) => unsafe { self.piece(to, from as *const u8, run) },
                    Memory::Process { .. } => self.process.push(to, from, run, memory)?,
                }
                from = from.wrapping_add(tile.inner_source);
                to = to.wrapping_add(tile.inner_destination as usize);
            }
        }
        Ok(())
    }

    /// # Safety
    /// `from` must be readable and `to` writable for `bytes` bytes, apart from each other, until [`Copier::finish`].
    unsafe fn piece(&mut self, to: *mut u8, from: *const u8, bytes: usize) {
        self.streamer.prefetch(from, bytes);
        if let Some((to, from, bytes)) = self.pending.replace((to, from, bytes)) {
            // SAFETY: a piece that came through this function before.
            unsafe { self.streamer.copy(to, from, bytes) };
        }
    }

    fn finish(&mut self, memory: &Memory) -> Result<(), TransferError> {
        if let Some((to, from, bytes)) = self.pending.take() {
            // SAFETY: a piece that came through `piece`, whose mapping and pool the walk still holds.
            unsafe { self.streamer.copy(to, from, bytes) };
        }
        self.streamer.finish();
        self.process.flush(memory)
    }
}

/// Bytes from a tile's first byte to its last, on one side.
fn extent(tile: &Tile, inner: u64, outer: u64) -> Option<u64> {
    let inner = inner.checked_mul(u64::from(tile.inner).checked_sub(1)?)?;
    let outer = outer.checked_mul(u64::from(tile.outer).checked_sub(1)?)?;
    inner.checked_add(outer)?.checked_add(tile.run_bytes)
}

/// Pieces to read from another process in one system call.
#[derive(Default)]
struct ProcessBatch {
    local: Vec<libc::iovec>,
    remote: Vec<libc::iovec>,
    bytes: usize,
}

impl ProcessBatch {
    /// The kernel takes no more at once.
    const PIECES_MAX: usize = 1024;

    fn push(&mut self, to: *mut u8, from: u64, bytes: usize, memory: &Memory) -> Result<(), TransferError> {
        self.local.push(libc::iovec { iov_base: to.cast(), iov_len: bytes });
        self.remote.push(libc::iovec { iov_base: from as *mut libc::c_void, iov_len: bytes });
        self.bytes += bytes;
        if self.local.len() >= Self::PIECES_MAX || self.bytes >= 1 << 20 { self.flush(memory) } else { Ok(()) }
    }

    fn flush(&mut self, memory: &Memory) -> Result<(), TransferError> {
        let Memory::Process { process, .. } = memory else { return Ok(()) };
        // If it lives afterwards, nobody else can have had its number meanwhile; if not before, a stranger is not even read.
        let is_itself = || process.is_alive().then_some(()).ok_or_else(|| unreadable("its process has ended".into()));
        while self.bytes > 0 {
            is_itself()?;
            // SAFETY: the local pieces were checked against the pool, which the walk holds; the kernel checks the remote ones. The arrays
            // live across the call.
            let read = unsafe {
                let (local, remote) = (self.local.as_ptr(), self.remote.as_ptr());
                libc::process_vm_readv(
                    process.pid().as_raw_nonzero().get(),
                    local,
                    self.local.len() as u64,
                    remote,
                    self.remote.len() as u64,
                    0,
                )
            };
            is_itself()?;
            match usize::try_from(read) {
                Ok(read) if read > 0 && read <= self.bytes => self.advance(read),
                Ok(_) => return Err(unreadable("the kernel read nothing".into())),
                Err(_) => {
                    let error = std::io::Error::last_os_error();
                    if error.kind() != std::io::ErrorKind::Interrupted {
                        return Err(unreadable(error.to_string()));
                    }
                }
            }
        }
        Ok(())
    }

    /// Drops what was read: the same number of bytes on both sides, piece by piece alike.
    fn advance(&mut self, read: usize) {
        self.bytes -= read;
        for side in [&mut self.local, &mut self.remote] {
            let mut rest = read;
            let whole = side
                .iter()
                .take_while(|v| {
                    rest >= v.iov_len && {
                        rest -= v.iov_len;
                        true
                    }
                })
                .count();
            side.drain(..whole);
            if let Some(first) = side.first_mut() {
                first.iov_base = first.iov_base.wrapping_byte_add(rest);
                first.iov_len -= rest;
            }
        }
    }
}

fn unreadable(message: String) -> TransferError {
    TransferError::Io {
        context: "reading the peer's process (its memory is not a pool of ours; ptrace permission or CAP_SYS_PTRACE is needed)",
        message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::tests::reused;

    #[test]
    fn a_process_under_the_number_of_one_that_ended_is_not_read() {
        let (secret, mut here) = ([0x5au8; 64], [0u8; 64]);
        let memory = Memory::Process { process: reused(), regions: vec![(secret.as_ptr() as u64, 64)] };
        let mut batch = ProcessBatch::default();
        batch.push(here.as_mut_ptr(), secret.as_ptr() as u64, 64, &memory).expect("a batch waits for more");
        let error = batch.flush(&memory).expect_err("nobody is there any more");
        assert!(error.to_string().contains("has ended"), "{error}");
        assert_eq!(here, [0; 64]);
    }
}
