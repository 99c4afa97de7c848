//! Launches that are on the GPU before it is known what they move: transfers that follow each other closely do without a launch of their own.
//!
//! From the driver's call until the host sees its flags an empty kernel takes 7 to 11 µs; one that runs already and finds its order in host memory, 2 to 4. So when a
//! transfer came soon after another, the next launch is queued right behind its own, and stands by for a little while when that has ended. It touches no
//! pool before it has an order; without one it ends by itself.

use std::ffi::c_void;
use std::time::{Duration, Instant};

use crate::buffer::FLAGS;
use crate::driver::{self, Stream};
use crate::gpu::Gpu;
use crate::launch::THREADS;
use crate::order::Order;
use crate::rectangle::Payload;
use crate::slot::Launch;

/// One that stands by holds its thread blocks for nothing; more than these are too many.
const BLOCKS_MAX: u32 = FLAGS;
/// While so many have not ended, the GPU has no room for more.
const SPENT_MAX: usize = 4;
/// After so many refusals by the driver, one after another, none stands by any more.
const REFUSALS_MAX: u32 = 3;

/// One GPU's launch that stands by.
pub(crate) struct Standby {
    /// How long one waits for its order; never, if this is zero.
    limit: Duration,
    /// Launches that stand by are in a stream of their own: what is behind one waits for it.
    stream: Option<Stream>,
    ahead: Option<Ahead>,
    /// The launch behind which the next one is to be queued.
    wanted: Option<u64>,
    /// Those that gave up, or are about to. Their slots are free when the driver has seen their ends, which takes as long as all of their thread blocks
    /// need to find room.
    spent: Vec<Launch>,
    /// When the last launch was seen to have ended.
    ended: Option<Instant>,
    refusals: u32,
}

struct Ahead {
    launch: Launch,
    /// The launch behind which it is queued, until that was seen to have ended.
    behind: Option<u64>,
}

impl Standby {
    pub(crate) fn new(limit: Duration) -> Standby {
        Standby { limit, stream: None, ahead: None, wanted: None, spent: Vec::new(), ended: None, refusals: 0 }
    }

    /// Whether any may stand by.
    pub(crate) fn is_on(&self) -> bool {
        !self.limit.is_zero()
    }

    /// Notes that a transfer was launched at a time: if that was soon after another, one is to be queued behind it.
    pub(crate) fn launched(&mut self, launch: &Launch, payload: &Payload, now: Instant) {
        let is_close = |ended: Instant| now.saturating_duration_since(ended) < self.limit;
        let takes = Order::has_room(payload) && launch.blocks <= BLOCKS_MAX;
        if takes && self.ahead.is_none() && self.spent.len() < SPENT_MAX && self.ended.is_some_and(is_close) {
            self.wanted = Some(launch.number);
        }
    }

    /// Whether one is to be queued behind this launch, which is asked once.
    pub(crate) fn is_wanted(&mut self, before: &Launch) -> bool {
        self.wanted.take_if(|wanted| *wanted == before.number).is_some()
    }

    /// Queues a launch behind another one.
    pub(crate) fn queue(&mut self, gpu: &Gpu, mut launch: Launch, before: &Launch) -> Result<(), String> {
        let queued = self.start(gpu, &mut launch, before);
        if queued.is_ok() {
            self.refusals = 0;
            self.ahead = Some(Ahead { launch, behind: Some(before.number) });
        } else {
            // What comes before it in the stream may take its time: nobody waits for that here.
            self.spent.push(launch);
            self.refused();
        }
        queued
    }

    fn start(&mut self, gpu: &Gpu, launch: &mut Launch, before: &Launch) -> Result<(), String> {
        let stream = match self.stream {
            Some(stream) => stream,
            None => *self.stream.insert(driver::create_stream()?),
        };
        launch.blocks = before.blocks;
        let Some(slot) = &mut launch.slot else { return Err("a launch without a slot".to_owned()) };
        let limit = u64::try_from(self.limit.as_nanos()).unwrap_or(u64::MAX);
        let mut argument = slot.next_standby(launch.blocks, limit)?;
        // One that stood by itself is in this stream.
        if before.ordered.is_none()
            && let Some(slot) = &before.slot
        {
            // SAFETY: both exist.
            unsafe { driver::stream_waits(stream, slot.event) }?;
        }
        let mut parameters = [(&raw mut argument).cast::<c_void>()];
        // SAFETY: the parameter is the kernel's; what it names belongs to the slot, which is kept until the launch has ended. It touches nothing else
        // before it is told to.
        let started = unsafe { driver::launch(gpu.even_standby, launch.blocks, THREADS, stream, &mut parameters) };
        // SAFETY: both exist.
        let recorded = unsafe { driver::record(slot.event, stream) };
        launch.recorded = recorded.is_ok();
        if started.is_ok() && recorded.is_err() {
            // Nothing else says when it has ended.
            slot.dismiss();
            // SAFETY: the stream exists.
            if let Err(error) = unsafe { driver::synchronize(stream) } {
                // Nor does this: it keeps what it has for ever.
                std::mem::forget(launch.slot.take());
                return Err(error.into());
            }
        }
        Ok(started.and(recorded)?)
    }

    /// Has the launch that stands by move a payload with so many thread blocks, if there is one that can.
    ///
    /// # Safety
    /// As of [`Launcher::launch`](crate::launch::Launcher::launch).
    pub(crate) unsafe fn order(&mut self, payload: &Payload, blocks: u32) -> Option<Launch> {
        let mut ahead = self.ahead.take()?;
        let gave_up = ahead.launch.slot.as_ref().is_none_or(|slot| slot.has_given_up());
        if gave_up {
            self.spent.push(ahead.launch);
            return None;
        }
        if ahead.behind.is_some() {
            // Not in vain behind a transfer that takes its time: they are to share the GPU.
            self.ahead = Some(ahead);
            return None;
        }
        match &mut ahead.launch.slot {
            Some(slot) if Order::has_room(payload) && blocks <= ahead.launch.blocks => slot.give_order(payload),
            _ => {
                self.ahead = Some(ahead);
                self.dismiss();
                return None;
            }
        }
        ahead.launch.ordered = Some(payload.clone());
        Some(ahead.launch)
    }

    /// Has the launch that stands by give up, unless it is still queued behind another: what comes now needs its room, or waits for all of the GPU.
    pub(crate) fn dismiss(&mut self) {
        if let Some(mut ahead) = self.ahead.take_if(|ahead| ahead.behind.is_none()) {
            if let Some(slot) = &mut ahead.launch.slot {
                slot.dismiss();
            }
            self.spent.push(ahead.launch);
        }
    }

    /// Notes that a launch has ended.
    pub(crate) fn ended(&mut self, number: u64) {
        if !self.is_on() {
            return;
        }
        self.ended = Some(Instant::now());
        if let Some(ahead) = &mut self.ahead
            && ahead.behind == Some(number)
        {
            ahead.behind = None;
        }
    }

    /// Takes one that gave up, and may not have ended yet.
    pub(crate) fn put_away(&mut self, spent: Launch) {
        self.spent.push(spent);
    }

    /// A slot's launch that is free again, if there is one.
    pub(crate) fn free(&mut self) -> Option<Launch> {
        // One about which the driver says nothing is never used again.
        let at = self.spent.iter().position(|launch| launch.has_ended() == Ok(true))?;
        Some(self.spent.swap_remove(at))
    }

    /// Notes that the driver refused one.
    pub(crate) fn refused(&mut self) {
        self.refusals += 1;
        if self.refusals >= REFUSALS_MAX {
            self.limit = Duration::ZERO;
            (self.ended, self.wanted) = (None, None);
        }
    }

    /// Waits for all of them, and has none any more.
    pub(crate) fn close(&mut self) {
        if let Some(slot) = self.ahead.as_mut().and_then(|ahead| ahead.launch.slot.as_mut()) {
            slot.dismiss();
        }
        self.ahead = None;
        self.spent.clear();
        if let Some(stream) = self.stream.take() {
            // SAFETY: ours, and nothing of it is used any more.
            let _destroyed = unsafe { driver::synchronize(stream).and_then(|()| driver::destroy_stream(stream)) };
        }
    }
}
