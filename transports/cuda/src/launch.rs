//! Launches of the walking kernel: payloads, streams, completion.

use std::ffi::c_void;
use std::sync::Arc;
use std::time::Instant;

use crate::buffer::{Buffer, HostBuffer};
use crate::driver::{self, CudaError, EventHandle, Stream};
use crate::gpu::Gpu;
use crate::rectangle::{Payload, RECTANGLE_BYTES};

/// Bytes of a payload that travels as a kernel's argument, as in `walk.cu`.
const INLINE_BYTES: usize = 3840;
const THREADS: u32 = 1024;
const WARPS: u32 = THREADS / 32;
/// A transfer's launches are in one stream; small transfers overtake large ones in another.
const STREAMS: usize = 4;
/// Payload buffers grow in steps of this.
const PAYLOAD_STEP_BYTES: usize = 64 << 10;
/// Slots that are kept for later.
const SPARE_MAX: usize = 16;

/// One GPU's streams, and what launches need.
pub(crate) struct Launcher {
    gpu: Arc<Gpu>,
    streams: Vec<Stream>,
    next: usize,
    spare: Vec<Slot>,
    blocks: u32,
    /// When the last launch was made.
    pub(crate) launched: Option<Instant>,
    /// Why nothing works here any more.
    broken: Option<String>,
}

/// What one launch takes until it has ended.
struct Slot {
    gpu: Arc<Gpu>,
    event: EventHandle,
    payload: Option<(HostBuffer, Buffer)>,
}

/// A launch under way. Whoever drops it waits for its end: the memory that it touches may go then.
pub(crate) struct Launch {
    slot: Option<Slot>,
    recorded: bool,
}

impl Launcher {
    pub(crate) fn new(gpu: &Arc<Gpu>, blocks: u32) -> Result<Launcher, String> {
        gpu.enter()?;
        let streams = Vec::with_capacity(STREAMS);
        let (gpu, blocks) = (Arc::clone(gpu), blocks.clamp(1, 4096));
        let mut launcher = Launcher { gpu, streams, next: 0, spare: Vec::new(), blocks, launched: None, broken: None };
        for _ in 0..STREAMS {
            launcher.streams.push(driver::create_stream()?);
        }
        Ok(launcher)
    }

    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Another stream than the last time.
    pub(crate) fn stream(&mut self) -> usize {
        self.next = (self.next + 1) % self.streams.len().max(1);
        self.next
    }

    /// Remembers what is beyond repair.
    fn noted(&mut self, error: CudaError) -> String {
        let text = if error.is_sticky() {
            format!("{error}; the GPU's context of this process is damaged: only a new process gets another")
        } else {
            error.to_string()
        };
        if error.is_sticky() {
            self.broken.get_or_insert_with(|| text.clone());
        }
        text
    }

    /// Starts the kernel in a stream.
    ///
    /// # Safety
    /// The payload comes from [`lower`](crate::rectangle::lower) of a program that was validated against the layouts of both pools; their memory and
    /// plane tables outlive the launch.
    pub(crate) unsafe fn launch(&mut self, payload: &Payload, stream: usize) -> Result<Launch, String> {
        if let Some(reason) = &self.broken {
            return Err(reason.clone());
        }
        let stream = *self.streams.get(stream).ok_or("no such stream")?;
        self.gpu.enter()?;
        let slot = match self.spare.pop() {
            Some(slot) => slot,
            None => Slot { gpu: Arc::clone(&self.gpu), event: driver::create_event()?, payload: None },
        };
        let mut launch = Launch { slot: Some(slot), recorded: false };
        let blocks = self.blocks.min(payload.items.div_ceil(WARPS)).max(1);
        let (mut rectangles, mut items) = (payload.rectangles, payload.items);
        let sizes = [(&raw mut rectangles).cast::<c_void>(), (&raw mut items).cast()];
        let started = if payload.bytes.len() <= INLINE_BYTES {
            let mut words = Inline([0; INLINE_BYTES]);
            words.0.iter_mut().zip(&payload.bytes).for_each(|(to, from)| *to = *from);
            let mut parameters = [(&raw mut words).cast(), sizes[0], sizes[1]];
            // SAFETY: the parameters are those of the kernel; the caller's promise for what it touches.
            unsafe { driver::launch(self.gpu.walk_inline, blocks, THREADS, stream, &mut parameters) }
        } else {
            let Some(slot) = &mut launch.slot else { return Err("a launch without a slot".to_owned()) };
            let (host, device) = slot.room(payload.bytes.len())?;
            let (from, mut address) = (host.write(&payload.bytes), device.address());
            let mut parameters = [(&raw mut address).cast(), sizes[0], sizes[1]];
            // SAFETY: as above; both buffers belong to the launch until it has ended, and have room for the payload.
            unsafe {
                driver::upload(address, from, payload.bytes.len(), stream)
                    .and_then(|()| driver::launch(self.gpu.walk, blocks, THREADS, stream, &mut parameters))
            }
        };
        let Some(slot) = &launch.slot else { return Err("a launch without a slot".to_owned()) };
        // Even after a refused launch the upload may be under way: the record comes behind both.
        // SAFETY: both exist.
        let recorded = unsafe { driver::record(slot.event, stream) };
        launch.recorded = recorded.is_ok();
        if let Err(error) = started.and(recorded) {
            return Err(self.noted(error));
        }
        self.launched = Some(Instant::now());
        Ok(launch)
    }

    /// Whether a launch has ended. After an error nothing of it runs any more.
    pub(crate) fn is_done(&mut self, launch: &Launch) -> Result<bool, String> {
        let Some(slot) = &launch.slot else { return Ok(true) };
        self.gpu.enter()?;
        // SAFETY: the event belongs to the slot.
        unsafe { driver::is_done(slot.event) }.map_err(|error| self.noted(error))
    }

    /// Takes back what an ended launch had.
    pub(crate) fn recycle(&mut self, mut launch: Launch) {
        if let Some(slot) = launch.slot.take()
            && self.spare.len() < SPARE_MAX
        {
            self.spare.push(slot);
        }
    }
}

#[repr(C, align(16))]
struct Inline([u8; INLINE_BYTES]);

const _: () = assert!(INLINE_BYTES > 16 * RECTANGLE_BYTES, "a handful of rectangles travel as an argument");

impl Slot {
    fn room(&mut self, bytes: usize) -> Result<&mut (HostBuffer, Buffer), String> {
        if self.payload.as_ref().is_none_or(|(host, device)| host.bytes() < bytes || device.bytes() < bytes) {
            self.payload = None;
            let bytes = bytes.next_multiple_of(PAYLOAD_STEP_BYTES);
            let made = (HostBuffer::new(&self.gpu, bytes)?, Buffer::new(&self.gpu, bytes)?);
            return Ok(self.payload.insert(made));
        }
        self.payload.as_mut().ok_or_else(|| "no buffer".to_owned())
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.gpu.enter().is_ok() {
            // SAFETY: a slot is dropped when its launch has ended.
            let _destroyed = unsafe { driver::destroy_event(self.event) };
        }
    }
}

impl Drop for Launch {
    fn drop(&mut self) {
        if let Some(slot) = &self.slot
            && self.recorded
            && slot.gpu.enter().is_ok()
        {
            // SAFETY: the event exists. An error means that the context is damaged, in which nothing runs any more.
            let _ended = unsafe { driver::wait(slot.event) };
        }
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        if self.gpu.enter().is_err() {
            return;
        }
        for stream in &self.streams {
            // SAFETY: launches wait for themselves; whoever used this launcher has let go of them.
            let _destroyed = unsafe { driver::synchronize(*stream).and_then(|()| driver::destroy_stream(*stream)) };
        }
    }
}
