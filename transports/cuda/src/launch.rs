//! Launches of the walking kernel: payloads, streams, completion.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::buffer::{Buffer, FLAGS, Flags, HostBuffer};
use crate::driver::{self, CudaError, EventHandle, Stream};
use crate::event::GpuEvent;
use crate::gpu::Gpu;
use crate::rectangle::{Payload, RECTANGLE_BYTES, Walk};

/// Bytes of a payload that travels as a kernel's argument, as in `walk.cu`.
pub(crate) const INLINE_BYTES: usize = 3840;
/// The same where it is short, which launches faster.
pub(crate) const SMALL_BYTES: usize = 1024;
const THREADS: u32 = 1024;
const WARPS: u32 = THREADS / 32;
/// A transfer's launches are in one stream; small transfers overtake large ones in another.
const STREAMS: usize = 4;
/// Payload buffers grow in steps of this.
const PAYLOAD_STEP_BYTES: usize = 64 << 10;
/// Larger payload buffers are not kept for later: what one launch needed, even a peer's, is not held for ever.
const PAYLOAD_KEPT_BYTES: usize = 1 << 20;
/// Looks at a launch's flag between two questions to the driver, which alone knows of failures.
const LOOKS: u32 = 128;
/// Slots that are kept for later.
const SPARE_MAX: usize = 16;

/// One GPU's streams, and what launches need.
pub(crate) struct Launcher {
    gpu: Arc<Gpu>,
    streams: Vec<Stream>,
    next: usize,
    /// Behind the shared streams: those of one transfer each, which nobody has.
    idle: Vec<usize>,
    spare: Vec<Slot>,
    blocks: u32,
    /// Where the kernels' own time is added up, in nanoseconds.
    timed: Option<&'static AtomicU64>,
    /// When the last launch was made.
    pub(crate) launched: Option<Instant>,
    /// Why nothing works here any more.
    broken: Option<String>,
}

/// What one launch takes until it has ended.
struct Slot {
    gpu: Arc<Gpu>,
    event: EventHandle,
    /// Recorded before the launch, where times are taken.
    start: Option<EventHandle>,
    /// How many thread blocks have ended; the kernel's own business.
    ended: Buffer,
    /// The first `told` become `serial` when everything is moved.
    flags: Flags,
    told: u32,
    serial: u32,
    payload: Option<(HostBuffer, Buffer)>,
}

/// A launch under way. Whoever drops it waits for its end: the memory that it touches may go then.
pub(crate) struct Launch {
    slot: Option<Slot>,
    recorded: bool,
    looks: u32,
}

/// As in `walk.cu`.
#[repr(C)]
struct Done {
    blocks: u64,
    flags: u64,
    serial: u32,
}

impl Launcher {
    pub(crate) fn new(gpu: &Arc<Gpu>, blocks: u32, timed: Option<&'static AtomicU64>) -> Result<Launcher, String> {
        if timed.is_some() {
            driver::driver()?.tells_times()?;
        }
        gpu.enter()?;
        let streams = Vec::with_capacity(STREAMS);
        let (gpu, blocks) = (Arc::clone(gpu), blocks.clamp(1, 4096));
        let mut launcher = Launcher {
            gpu,
            streams,
            next: 0,
            idle: Vec::new(),
            spare: Vec::new(),
            blocks,
            timed,
            launched: None,
            broken: None,
        };
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
        self.next = (self.next + 1) % STREAMS;
        self.next
    }

    /// A stream for one transfer alone, until it is given back.
    pub(crate) fn own_stream(&mut self) -> Result<usize, String> {
        if let Some(stream) = self.idle.pop() {
            return Ok(stream);
        }
        self.gpu.enter()?;
        self.streams.push(driver::create_stream()?);
        Ok(self.streams.len() - 1)
    }

    /// Takes back a stream in which nothing is left to do but to wait.
    pub(crate) fn give_back(&mut self, stream: usize) {
        self.idle.push(stream);
    }

    /// Has what comes into a stream wait for an event.
    pub(crate) fn hold_back(&self, stream: usize, event: &GpuEvent) -> Result<(), String> {
        let stream = *self.streams.get(stream).ok_or("no such stream")?;
        self.gpu.enter()?;
        // SAFETY: the stream lives as long as this, in the context that was just entered.
        Ok(unsafe { event.hold_back(stream) }?)
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
    /// The payload comes from [`lower`](crate::rectangle::lower) or [`lower_even`](crate::even::lower_even) of a program that was validated against the layouts of both pools; their memory and
    /// plane tables outlive the launch.
    pub(crate) unsafe fn launch(&mut self, payload: &Payload, stream: usize) -> Result<Launch, String> {
        if let Some(reason) = &self.broken {
            return Err(reason.clone());
        }
        let stream = *self.streams.get(stream).ok_or("no such stream")?;
        self.gpu.enter()?;
        let slot = match self.spare.pop() {
            Some(slot) => slot,
            None => Slot::new(&self.gpu, self.timed.is_some())?,
        };
        let mut launch = Launch { slot: Some(slot), recorded: false, looks: 0 };
        let Some(slot) = &mut launch.slot else { return Err("a launch without a slot".to_owned()) };
        let blocks = self.blocks.min(payload.items.div_ceil(WARPS)).max(1);
        let walks = match payload.walk {
            Walk::Tokens => self.gpu.walk,
            Walk::Even => self.gpu.even,
        };
        let mut done = slot.next(blocks);
        if let Some(start) = slot.start {
            // SAFETY: both exist.
            unsafe { driver::record(start, stream)? };
        }
        let (mut rectangles, mut items) = (payload.rectangles, payload.items);
        let rest = [(&raw mut rectangles).cast::<c_void>(), (&raw mut items).cast(), (&raw mut done).cast()];
        let length = payload.bytes.len();
        let started = if length <= INLINE_BYTES {
            let mut words = Inline([0; INLINE_BYTES]);
            words.0.get_mut(..length).ok_or("a payload without room")?.copy_from_slice(&payload.bytes);
            let mut parameters = [(&raw mut words).cast(), rest[0], rest[1], rest[2]];
            let function = if length <= SMALL_BYTES { walks.small } else { walks.inline };
            // SAFETY: the parameters are those of the kernel, or begin with its; the caller's promise for what it touches.
            unsafe { driver::launch(function, blocks, THREADS, stream, &mut parameters) }
        } else {
            let (host, device) = slot.room(length)?;
            let (from, mut address) = (host.write(&payload.bytes), device.address());
            let mut parameters = [(&raw mut address).cast(), rest[0], rest[1], rest[2]];
            // SAFETY: as above; both buffers belong to the launch until it has ended, and have room for the payload.
            unsafe {
                driver::upload(address, from, length, stream)
                    .and_then(|()| driver::launch(walks.uploaded, blocks, THREADS, stream, &mut parameters))
            }
        };
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

    /// Whether a launch has moved everything. After an error nothing of it runs any more.
    pub(crate) fn is_done(&mut self, launch: &mut Launch) -> Result<bool, String> {
        let Some(slot) = &launch.slot else { return Ok(true) };
        // The end event's time is known only once the driver sees it.
        if self.timed.is_none() {
            if slot.flags.are(slot.told, slot.serial) {
                return Ok(true);
            }
            launch.looks = (launch.looks + 1) % LOOKS;
            if launch.looks != 0 {
                return Ok(false);
            }
        }
        self.gpu.enter()?;
        // SAFETY: the event belongs to the slot.
        unsafe { driver::is_done(slot.event) }.map_err(|error| self.noted(error))
    }

    /// Takes back what a launch that is done had.
    pub(crate) fn recycle(&mut self, mut launch: Launch) {
        let Some(mut slot) = launch.slot.take() else { return };
        if let (Some(total), Some(start)) = (self.timed, slot.start) {
            // SAFETY: both exist, and the end was seen.
            match unsafe { driver::elapsed(start, slot.event) } {
                Ok(milliseconds) => drop(total.fetch_add((f64::from(milliseconds) * 1e6) as u64, Ordering::Relaxed)),
                Err(error) => tracing::warn!(%error, "a launch's time is not known"),
            }
        }
        if slot.payload.as_ref().is_some_and(|(host, _)| host.bytes() > PAYLOAD_KEPT_BYTES) {
            slot.payload = None;
        }
        if self.spare.len() < SPARE_MAX {
            self.spare.push(slot);
        }
    }
}

#[repr(C, align(16))]
struct Inline([u8; INLINE_BYTES]);

const _: () = assert!(INLINE_BYTES > 16 * RECTANGLE_BYTES, "a handful of rectangles travel as an argument");

impl Slot {
    fn new(gpu: &Arc<Gpu>, is_timed: bool) -> Result<Slot, String> {
        let (ended, flags) = (Buffer::new(gpu, size_of::<u32>())?, Flags::new(gpu)?);
        ended.upload(&[0; size_of::<u32>()])?;
        let start = if is_timed { Some(driver::create_event(true)?) } else { None };
        let event = driver::create_event(is_timed)?;
        Ok(Slot { gpu: Arc::clone(gpu), event, start, ended, flags, told: 0, serial: 0, payload: None })
    }

    /// What the next launch, of so many thread blocks, says when it is done.
    fn next(&mut self, blocks: u32) -> Done {
        if self.serial == u32::MAX {
            // A flag that no launch has used for long would be taken for the one of a launch that comes.
            self.flags.clear();
            self.serial = 0;
        }
        self.serial += 1;
        self.told = if blocks <= FLAGS { blocks } else { 1 };
        Done { blocks: self.ended.address(), flags: self.flags.address(), serial: self.serial }
    }

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
            for event in [Some(self.event), self.start].into_iter().flatten() {
                // SAFETY: a slot is dropped when its launch has moved everything; the driver keeps an event that is still to come.
                let _destroyed = unsafe { driver::destroy_event(event) };
            }
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
