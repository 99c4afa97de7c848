//! Small buffers of the transport's own, on a GPU and page-locked on the host.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::driver;
use crate::gpu::Gpu;

/// GPU memory. Freed when dropped: whoever launches kernels that read it waits for them first.
pub(crate) struct Buffer {
    gpu: Arc<Gpu>,
    address: u64,
    bytes: usize,
}

impl Buffer {
    pub(crate) fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Buffer, String> {
        gpu.enter()?;
        let bytes = bytes.max(1);
        Ok(Buffer { gpu: Arc::clone(gpu), address: driver::allocate(bytes)?, bytes })
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies bytes to its start and waits until they are there.
    pub(crate) fn upload(&self, bytes: &[u8]) -> Result<(), String> {
        self.gpu.enter()?;
        let stream = driver::create_stream()?;
        // SAFETY: no more bytes than it has, from a slice that lives until the stream is done; the stream was just made.
        let copied = unsafe {
            let length = bytes.len().min(self.bytes);
            let copied =
                driver::upload(self.address, bytes.as_ptr(), length, stream).and_then(|()| driver::synchronize(stream));
            driver::destroy_stream(stream).and(copied)
        };
        Ok(copied?)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.gpu.enter().is_ok() {
            // SAFETY: nobody uses it any more, by the rule above.
            let _freed = unsafe { driver::free(self.address) };
        }
    }
}

/// Page-locked host memory, which the GPU fetches while the processor goes on.
pub(crate) struct HostBuffer {
    gpu: Arc<Gpu>,
    base: *mut u8,
    bytes: usize,
}

impl HostBuffer {
    pub(crate) fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<HostBuffer, String> {
        gpu.enter()?;
        let bytes = bytes.max(1);
        Ok(HostBuffer { gpu: Arc::clone(gpu), base: driver::allocate_host(bytes)?, bytes })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its first byte, here and for kernels alike (unified addressing).
    pub(crate) fn base(&self) -> *mut u8 {
        self.base
    }

    /// Copies bytes to its start and says where that is. The caller has waited for every earlier use by the GPU.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> *const u8 {
        let length = bytes.len().min(self.bytes);
        // SAFETY: no more than it has; it is this process's own and the GPU does not read it at the moment, as the caller knows.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base, length) };
        self.base
    }
}

/// Words in page-locked host memory that the GPU writes.
pub(crate) struct Flags(HostBuffer);

/// As many as a launch has thread blocks that tell their ends themselves, as in `walk.cu`: a line of the processor's cache.
pub(crate) const FLAGS: u32 = 16;

impl Flags {
    /// They are zero.
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Result<Flags, String> {
        let mut flags = Flags(HostBuffer::new(gpu, size_of::<[u32; FLAGS as usize]>())?);
        flags.clear();
        Ok(flags)
    }

    /// Makes them zero. The caller has waited for every earlier use by the GPU.
    pub(crate) fn clear(&mut self) {
        self.0.write(&[0; size_of::<[u32; FLAGS as usize]>()]);
    }

    /// Where they are, here and for kernels alike (unified addressing).
    pub(crate) fn address(&self) -> u64 {
        self.0.base as u64
    }

    /// Whether the first `count` of them are `value`. Then whatever the GPU wrote before them is visible to this process's later work, wherever
    /// that runs.
    pub(crate) fn are(&self, count: u32, value: u32) -> bool {
        let base = self.0.base.cast::<u32>();
        (0..count.min(FLAGS) as usize).all(|index| {
            // SAFETY: the buffer has FLAGS words, is page-aligned and lives as long as this; the GPU writes a word as a whole, nobody else does
            // while it runs.
            unsafe { AtomicU32::from_ptr(base.add(index)) }.load(Ordering::Acquire) == value
        })
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        if self.gpu.enter().is_ok() {
            // SAFETY: made by `new`; whoever had the GPU read it has waited for that.
            let _freed = unsafe { driver::free_host(self.base) };
        }
    }
}
