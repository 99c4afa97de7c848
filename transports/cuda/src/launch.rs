//! Launches of the walking kernel: payloads, streams, completion.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::driver::{self, CudaError, Stream};
use crate::event::GpuEvent;
use crate::gpu::Gpu;
use crate::rectangle::{Payload, RECTANGLE_BYTES, Walk};
use crate::slot::{Launch, Slot};
use crate::standby::Standby;

/// Bytes of a payload that travels as a kernel's argument, as in `walk.cu`.
pub(crate) const INLINE_BYTES: usize = 3840;
/// The same where it is short, which launches faster.
pub(crate) const SMALL_BYTES: usize = 1024;
pub(crate) const THREADS: u32 = 1024;
const WARPS: u32 = THREADS / 32;
/// A transfer's launches are in one stream; small transfers overtake large ones in another.
const STREAMS: usize = 4;
/// Looks at a launch's flag between two questions to the driver, which alone knows of failures.
const LOOKS: u32 = 128;
/// Slots that are there from the start: of a launch that was ordered, and of the one that stands by behind it.
const SLOTS_STANDING_BY: usize = 2;
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
    standby: Standby,
    /// Launches so far.
    number: u64,
    /// Where the kernels' own time is added up, in nanoseconds.
    timed: Option<&'static AtomicU64>,
    /// When the last launch was made.
    pub(crate) launched: Option<Instant>,
    /// Why nothing works here any more.
    broken: Option<String>,
}

impl Launcher {
    /// For launches of `blocks` thread blocks at most. Between transfers that follow each other closely one stands by for as long as `standby`.
    pub(crate) fn new(
        gpu: &Arc<Gpu>,
        blocks: u32,
        standby: Duration,
        timed: Option<&'static AtomicU64>,
    ) -> Result<Launcher, String> {
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
            // What a launch waits for is not its time.
            standby: Standby::new(if timed.is_some() { Duration::ZERO } else { standby }),
            number: 0,
            timed,
            launched: None,
            broken: None,
        };
        for _ in 0..STREAMS {
            launcher.streams.push(driver::create_stream()?);
        }
        // Not while a transfer waits for it.
        for _ in 0..if launcher.standby.is_on() { SLOTS_STANDING_BY } else { 0 } {
            let mut slot = Slot::new(&launcher.gpu, false)?;
            slot.stands_by()?;
            launcher.spare.push(slot);
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

    /// Starts the kernel in a stream; or, where the launch is all of its transfer and the stream is shared, in the one in which a launch stands by.
    ///
    /// # Safety
    /// The payload comes from [`lower`](crate::rectangle::lower) or [`lower_even`](crate::even::lower_even) of a program that was validated against the layouts of both pools; their memory and
    /// plane tables outlive the launch.
    pub(crate) unsafe fn launch(&mut self, payload: &Payload, stream: usize, is_all: bool) -> Result<Launch, String> {
        if let Some(reason) = &self.broken {
            return Err(reason.clone());
        }
        let may_stand_by = stream < STREAMS && is_all;
        let found = if may_stand_by {
            // SAFETY: the caller's promise.
            unsafe { self.standby.order(payload, self.blocks_for(payload)) }
        } else {
            self.standby.dismiss();
            None
        };
        let launch = match found {
            Some(launch) => launch,
            // SAFETY: the caller's promise.
            None => unsafe { self.start(payload, stream) }?,
        };
        let now = Instant::now();
        self.launched = Some(now);
        if may_stand_by {
            self.standby.launched(&launch, payload, now);
        }
        Ok(launch)
    }

    /// Has a launch stand by behind another.
    fn queue(&mut self, before: &Launch) {
        let next = match self.gpu.enter().map_err(String::from).and_then(|()| self.prepare()) {
            Ok(next) => next,
            Err(_) => return self.standby.refused(),
        };
        if let Err(reason) = self.standby.queue(&self.gpu, next, before) {
            // The transfer itself does not need it; what is beyond repair, its own launch tells.
            tracing::debug!(reason, "no launch stands by on {}", self.gpu.label());
        }
    }

    fn keep(&mut self, mut slot: Slot) {
        let is_one_too_many = self.spare.len() >= SPARE_MAX;
        if is_one_too_many || slot.is_large() {
            // The driver frees memory when all kernels have ended.
            self.standby.dismiss();
        }
        slot.shrink();
        if !is_one_too_many {
            self.spare.push(slot);
        }
    }

    fn blocks_for(&self, payload: &Payload) -> u32 {
        self.blocks.min(payload.items.div_ceil(WARPS)).max(1)
    }

    /// A launch that is to come.
    fn prepare(&mut self) -> Result<Launch, String> {
        while let Some(mut spent) = self.standby.free() {
            if let Some(slot) = spent.slot.take() {
                self.keep(slot);
            }
        }
        let slot = match self.spare.pop() {
            Some(slot) => slot,
            None => Slot::new(&self.gpu, self.timed.is_some())?,
        };
        self.number += 1;
        Ok(Launch::new(self.number, slot))
    }

    /// # Safety
    /// As of [`launch`](Launcher::launch).
    unsafe fn start(&mut self, payload: &Payload, stream: usize) -> Result<Launch, String> {
        let stream = *self.streams.get(stream).ok_or("no such stream")?;
        self.gpu.enter()?;
        let blocks = self.blocks_for(payload);
        let mut launch = self.prepare()?;
        launch.blocks = blocks;
        let Some(slot) = &mut launch.slot else { return Err("a launch without a slot".to_owned()) };
        let walks = match payload.walk {
            Walk::Tokens => self.gpu.walk,
            Walk::Even => self.gpu.even,
        };
        let mut done = slot.next(blocks)?;
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
            host.write(0, &payload.bytes);
            let (from, mut address) = (host.base(), device.address());
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
        // SAFETY: the stream exists.
        if started.is_ok() && recorded.is_err() && unsafe { driver::synchronize(stream) }.is_err() {
            // Nothing says when it has ended: it keeps what it has for ever.
            std::mem::forget(launch.slot.take());
        }
        if let Err(error) = started.and(recorded) {
            return Err(self.noted(error));
        }
        Ok(launch)
    }

    /// Whether a launch has moved everything. After an error nothing of it runs any more.
    pub(crate) fn is_done(&mut self, launch: &mut Launch) -> Result<bool, String> {
        let Some(slot) = &launch.slot else { return Ok(true) };
        launch.looks = (launch.looks + 1) % LOOKS;
        let mut has_ended = false;
        // The end event's time is known only once the driver sees it; and one that gave up has ended only then.
        if launch.looks == 0 || self.timed.is_some() || slot.has_given_up() {
            has_ended = launch.has_ended().map_err(|error| self.noted(error))?;
        }
        // Only now: what one that has ended says is final.
        if self.timed.is_none() && slot.has_told() {
            return Ok(true);
        }
        if launch.ordered.is_some() && slot.has_given_up() {
            return self.start_after_all(launch).map(|()| false);
        }
        // Not before its own end was looked for once: short ones have moved everything by now.
        if !has_ended && self.standby.is_wanted(launch) {
            self.queue(launch);
        }
        Ok(has_ended)
    }

    /// Starts what a launch was told that had given up just before.
    fn start_after_all(&mut self, launch: &mut Launch) -> Result<(), String> {
        let Some(payload) = launch.ordered.take() else { return Ok(()) };
        let stream = self.stream();
        tracing::trace!(launch = launch.number, "an order came too late: launched after all");
        // SAFETY: `launch` was called with this payload, and what it touches outlives its launch, which is this one now.
        let mut again = unsafe { self.start(&payload, stream) }?;
        self.launched = Some(Instant::now());
        // Whoever stands by behind it goes by this.
        again.number = launch.number;
        let spent = std::mem::replace(launch, again);
        self.standby.put_away(spent);
        Ok(())
    }

    /// Takes back what a launch that is done had.
    pub(crate) fn recycle(&mut self, mut launch: Launch) {
        if self.standby.is_wanted(&launch) {
            self.queue(&launch);
        }
        self.standby.ended(launch.number);
        let Some(slot) = launch.slot.take() else { return };
        if let (Some(total), Some(start)) = (self.timed, slot.start) {
            // SAFETY: both exist, and the end was seen.
            match unsafe { driver::elapsed(start, slot.event) } {
                Ok(milliseconds) => drop(total.fetch_add((f64::from(milliseconds) * 1e6) as u64, Ordering::Relaxed)),
                Err(error) => tracing::warn!(%error, "a launch's time is not known"),
            }
        }
        self.keep(slot);
    }
}

#[repr(C, align(16))]
struct Inline([u8; INLINE_BYTES]);

const _: () = assert!(INLINE_BYTES > 16 * RECTANGLE_BYTES, "a handful of rectangles travel as an argument");

impl Drop for Launcher {
    fn drop(&mut self) {
        if self.gpu.enter().is_err() {
            return;
        }
        self.standby.close();
        for stream in &self.streams {
            // SAFETY: launches wait for themselves; whoever used this launcher has let go of them.
            let _destroyed = unsafe { driver::synchronize(*stream).and_then(|()| driver::destroy_stream(*stream)) };
        }
    }
}
