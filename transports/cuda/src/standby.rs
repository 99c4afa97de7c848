//! Launches that are on the GPU before it is known what they move: transfers that follow each other closely do without a launch of their own.
//!
//! From the driver's call to its first instruction a kernel takes 8 to 11 µs; one that runs already and finds its order in host memory, 4. So when a transfer
//! came soon after another, the next launch is queued right behind its own, and stands by for a little while when that has ended. It touches no
//! pool before it has an order; without one it ends by itself, so nothing is ever held up for longer than that while.

use std::ffi::c_void;
use std::time::{Duration, Instant};

use crate::driver::{self, Stream};
use crate::gpu::Gpu;
use crate::launch::THREADS;
use crate::order::Order;
use crate::rectangle::Payload;
use crate::slot::Launch;

/// One GPU's launch that stands by.
pub(crate) struct Standby {
    /// How long one waits for its order; never, if this is zero.
    limit: Duration,
    /// Launches that stand by are in a stream of their own: what is behind one waits for it.
    stream: Option<Stream>,
    ahead: Option<Ahead>,
    /// When the last launch was seen to have ended.
    ended: Option<Instant>,
}

struct Ahead {
    launch: Launch,
    /// The launch behind which it is queued, until that was seen to have ended.
    behind: Option<u64>,
}

/// What there is for a payload.
pub(crate) enum Found {
    Nothing,
    /// The launch that has taken it over.
    Ordered(Launch),
    /// One that gave up; its slot is free as soon as it has ended.
    Spent(Launch),
}

impl Standby {
    pub(crate) fn new(limit: Duration) -> Standby {
        Standby { limit, stream: None, ahead: None, ended: None }
    }

    /// Whether a launch for this payload, at this time, follows another closely, and none stands by yet.
    pub(crate) fn is_wanted(&self, payload: &Payload, now: Instant) -> bool {
        let is_close = |ended: Instant| now.saturating_duration_since(ended) < self.limit;
        Order::has_room(payload) && self.ahead.is_none() && self.ended.is_some_and(is_close)
    }

    /// Queues a launch of so many thread blocks behind another one.
    pub(crate) fn queue(&mut self, gpu: &Gpu, mut launch: Launch, blocks: u32, before: &Launch) -> Result<(), String> {
        let stream = match self.stream {
            Some(stream) => stream,
            None => *self.stream.insert(driver::create_stream()?),
        };
        let Some(slot) = &mut launch.slot else { return Err("a launch without a slot".to_owned()) };
        let limit = u64::try_from(self.limit.as_nanos()).unwrap_or(u64::MAX);
        let mut argument = slot.next_standby(blocks, limit)?;
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
        let started = unsafe { driver::launch(gpu.even_standby, blocks, THREADS, stream, &mut parameters) };
        // SAFETY: both exist.
        let recorded = unsafe { driver::record(slot.event, stream) };
        launch.recorded = recorded.is_ok();
        started.and(recorded)?;
        self.ahead = Some(Ahead { launch, behind: Some(before.number) });
        Ok(())
    }

    /// Has the launch that stands by move a payload, if there is one.
    ///
    /// # Safety
    /// As of [`Launcher::launch`](crate::launch::Launcher::launch).
    pub(crate) unsafe fn order(&mut self, payload: &Payload) -> Found {
        let Some(mut ahead) = self.ahead.take() else { return Found::Nothing };
        let Some(slot) = ahead.launch.slot.as_mut().filter(|slot| !slot.has_given_up()) else {
            return Found::Spent(ahead.launch);
        };
        // Not in vain behind a transfer that takes its time: they are to share the GPU.
        if ahead.behind.is_some() || !Order::has_room(payload) {
            self.ahead = Some(ahead);
            return Found::Nothing;
        }
        slot.give_order(payload);
        ahead.launch.ordered = Some(payload.clone());
        Found::Ordered(ahead.launch)
    }

    /// Notes that a launch has ended.
    pub(crate) fn ended(&mut self, number: u64) {
        if self.limit.is_zero() {
            return;
        }
        self.ended = Some(Instant::now());
        if let Some(ahead) = &mut self.ahead
            && ahead.behind == Some(number)
        {
            ahead.behind = None;
        }
    }

    /// None stands by from now on.
    pub(crate) fn give_up(&mut self) {
        self.limit = Duration::ZERO;
        self.ended = None;
    }

    /// Waits for all of them, and has none any more.
    pub(crate) fn close(&mut self) {
        self.ahead = None;
        if let Some(stream) = self.stream.take() {
            // SAFETY: ours, and nothing of it is used any more.
            let _destroyed = unsafe { driver::synchronize(stream).and_then(|()| driver::destroy_stream(stream)) };
        }
    }
}
