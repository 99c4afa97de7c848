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

    /// Copies bytes to an offset. The caller has waited for every earlier use of that place by the GPU.
    pub(crate) fn write(&mut self, offset: usize, bytes: &[u8]) {
        let offset = offset.min(self.bytes);
        let length = bytes.len().min(self.bytes - offset);
        // SAFETY: no more than it has; it is this process's own and the GPU does not read it at the moment, as the caller knows.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(offset), length) };
    }
}

/// Words in page-locked host memory by which a launch and the host tell each other what they have done.
pub(crate) struct Flags(HostBuffer);

/// As many as a launch has thread blocks that tell their ends themselves, as in `walk.cu`: a line of the processor's cache.
pub(crate) const FLAGS: u32 = 16;
/// Where a launch that stands by says that it gave up, in words: a line of its own.
const GIVEN_UP: usize = FLAGS as usize;
const WORDS: usize = 2 * FLAGS as usize;

impl Flags {
    /// They are zero.
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Result<Flags, String> {
        let mut flags = Flags(HostBuffer::new(gpu, size_of::<[u32; WORDS]>())?);
        flags.clear();
        Ok(flags)
    }

    /// Makes them zero. The caller has waited for every earlier use by the GPU.
    pub(crate) fn clear(&mut self) {
        self.0.write(0, &[0; size_of::<[u32; WORDS]>()]);
    }

    /// Where they are, here and for kernels alike (unified addressing).
    pub(crate) fn address(&self) -> u64 {
        self.0.base as u64
    }

    /// Where a launch that stands by says that it gave up.
    pub(crate) fn given_up(&self) -> u64 {
        self.address() + (GIVEN_UP * size_of::<u32>()) as u64
    }

    /// Whether the first `count` of them are `value`. Then whatever the GPU wrote before them is visible to this process's later work, wherever
    /// that runs.
    pub(crate) fn are(&self, count: u32, value: u32) -> bool {
        (0..count.min(FLAGS) as usize).all(|index| self.word(index).load(Ordering::Acquire) == value)
    }

    /// Whether a launch has given up.
    pub(crate) fn has_given_up(&self, serial: u32) -> bool {
        self.word(GIVEN_UP).load(Ordering::Acquire) == serial
    }

    fn word(&self, index: usize) -> &AtomicU32 {
        let index = index.min(WORDS - 1);
        // SAFETY: the buffer has WORDS words, is page-aligned and lives as long as this; the GPU writes a word as a whole, nobody else does while it
        // runs.
        unsafe { AtomicU32::from_ptr(self.0.base.cast::<u32>().add(index)) }
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
