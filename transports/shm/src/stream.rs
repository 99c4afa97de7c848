//! How one contiguous piece is copied.

/// Transfers from this size on do not fit the caches: their stores go around them, which saves reading the destination first.
const STREAM_BYTES_MIN: u64 = 4 << 20;
/// Pieces from this size on are worth it.
const STREAM_PIECE_MIN: usize = 1024;

/// Copies pieces, with stores that suit the size of the whole transfer.
pub(crate) struct Streamer {
    around_caches: bool,
    used: bool,
}

impl Streamer {
    /// For a transfer of this many bytes.
    pub(crate) fn new(bytes: u64) -> Streamer {
        Streamer { around_caches: bytes >= STREAM_BYTES_MIN && imp::available(), used: false }
    }

    /// Starts fetching the beginning of a piece; the hardware follows from there.
    pub(crate) fn prefetch(&self, from: *const u8, bytes: usize) {
        if bytes >= STREAM_PIECE_MIN {
            imp::prefetch(from);
        }
    }

    /// # Safety
    /// `from` must be readable and `to` writable for `bytes` bytes, and they must not overlap.
    pub(crate) unsafe fn copy(&mut self, to: *mut u8, from: *const u8, bytes: usize) {
        if self.around_caches && bytes >= STREAM_PIECE_MIN {
            self.used = true;
            // SAFETY: the caller's promise; `around_caches` is set only where the instructions exist.
            unsafe { imp::copy(to, from, bytes) };
        } else {
            // SAFETY: the caller's promise.
            unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
        }
    }

    /// Makes every store so far visible before any later one.
    pub(crate) fn finish(&mut self) {
        if std::mem::take(&mut self.used) {
            imp::fence();
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod imp {
    use std::arch::x86_64::{__m256i, _MM_HINT_T0, _mm_prefetch, _mm_sfence, _mm256_loadu_si256, _mm256_stream_si256};

    pub(super) fn available() -> bool {
        std::is_x86_feature_detected!("avx2")
    }

    pub(super) fn prefetch(from: *const u8) {
        for line in 0..4 {
            // SAFETY: a prefetch is a hint for any address and reads nothing architecturally.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(64 * line).cast()) };
        }
    }

    pub(super) fn fence() {
        // SAFETY: it has no preconditions; SSE is part of x86-64.
        unsafe { _mm_sfence() };
    }

    /// # Safety
    /// As [`super::Streamer::copy`], and the processor must have AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn copy(to: *mut u8, from: *const u8, bytes: usize) {
        let head = to.align_offset(64).min(bytes);
        let lines = (bytes - head) / 64;
        let tail = bytes - head - lines * 64;
        // SAFETY: head + lines * 64 + tail = bytes, and every access stays inside that; stores are aligned after the head.
        unsafe {
            std::ptr::copy_nonoverlapping(from, to, head);
            let (mut from, mut to) = (from.add(head), to.add(head));
            for _ in 0..lines {
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(512).cast());
                let a = _mm256_loadu_si256(from.cast::<__m256i>());
                let b = _mm256_loadu_si256(from.add(32).cast::<__m256i>());
                _mm256_stream_si256(to.cast::<__m256i>(), a);
                _mm256_stream_si256(to.add(32).cast::<__m256i>(), b);
                from = from.add(64);
                to = to.add(64);
            }
            std::ptr::copy_nonoverlapping(from, to, tail);
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod imp {
    pub(super) fn available() -> bool {
        false
    }

    pub(super) fn prefetch(_from: *const u8) {}

    pub(super) fn fence() {}

    /// # Safety
    /// As [`super::Streamer::copy`].
    pub(super) unsafe fn copy(to: *mut u8, from: *const u8, bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_alignment_and_length_is_copied_and_nothing_else() {
        let source: Vec<u8> = (0..4096u32).map(|i| (i * 7 + i / 256) as u8).collect();
        for offset in [0usize, 1, 31, 32, 63, 64] {
            for bytes in [1024usize, 1025, 1087, 1151, 2048, 2049] {
                let mut target = vec![0xee_u8; 4096];
                let mut streamer = Streamer::new(u64::MAX);
                // SAFETY: both vectors have 4096 bytes, offset + 3 + bytes is less, and they are apart.
                unsafe { streamer.copy(target.as_mut_ptr().add(offset), source.as_ptr().add(3), bytes) };
                streamer.finish();
                assert_eq!(target[offset..offset + bytes], source[3..3 + bytes]);
                assert!(target[..offset].iter().chain(&target[offset + bytes..]).all(|&b| b == 0xee));
            }
        }
    }
}
