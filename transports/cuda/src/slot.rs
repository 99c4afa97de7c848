//! What one launch takes until it has ended, and the launch.

use std::sync::Arc;

use crate::buffer::{Buffer, FLAGS, Flags, HostBuffer};
use crate::driver::{self, CudaError, EventHandle};
use crate::gpu::Gpu;
use crate::order::Order;
use crate::rectangle::Payload;

/// Payload buffers grow in steps of this.
const PAYLOAD_STEP_BYTES: usize = 64 << 10;
/// Larger payload buffers are not kept for later: what one launch needed, even a peer's, is not held for ever.
const PAYLOAD_KEPT_BYTES: usize = 1 << 20;
/// Where a launch that stands by counts the thread blocks that have come, behind the count of those that have ended.
const ARRIVED: usize = 4;
const OWN_BYTES: usize = 8;

/// Memory and events of a launch.
pub(crate) struct Slot {
    gpu: Arc<Gpu>,
    pub(crate) event: EventHandle,
    /// Recorded before the launch, where times are taken.
    pub(crate) start: Option<EventHandle>,
    /// How many thread blocks have ended, and how many have come; the kernel's own business.
    own: Buffer,
    flags: Flags,
    /// The first `told` flags become `serial` when everything is moved.
    told: u32,
    serial: u32,
    payload: Option<(HostBuffer, Buffer)>,
    /// For launches that stand by.
    order: Option<Order>,
}

/// As in `walk.cu`.
#[repr(C)]
pub(crate) struct Done {
    blocks: u64,
    flags: u64,
    serial: u32,
}

/// As in `walk.cu`.
#[repr(C)]
pub(crate) struct StandbyArgument {
    order: u64,
    arrived: u64,
    passed: u64,
    given_up: u64,
    limit: u64,
    done: Done,
}

/// A launch under way. Whoever drops it waits for its end: the memory that it touches may go then.
pub(crate) struct Launch {
    /// Of its launcher.
    pub(crate) number: u64,
    pub(crate) slot: Option<Slot>,
    pub(crate) recorded: bool,
    /// Thread blocks.
    pub(crate) blocks: u32,
    /// How often its flags were looked at since the driver was asked.
    pub(crate) looks: u32,
    /// What it was told after it stood by. It may have given up before.
    pub(crate) ordered: Option<Payload>,
}

impl Slot {
    pub(crate) fn new(gpu: &Arc<Gpu>, is_timed: bool) -> Result<Slot, String> {
        let (own, flags) = (Buffer::new(gpu, OWN_BYTES)?, Flags::new(gpu)?);
        own.upload(&[0; OWN_BYTES])?;
        let start = if is_timed { Some(driver::create_event(true)?) } else { None };
        let event = driver::create_event(is_timed)?;
        Ok(Slot { gpu: Arc::clone(gpu), event, start, own, flags, told: 0, serial: 0, payload: None, order: None })
    }

    /// What the next launch, of so many thread blocks, says when it is done.
    pub(crate) fn next(&mut self, blocks: u32) -> Result<Done, String> {
        if self.serial == u32::MAX {
            // What no launch has used for long would be taken for what is meant for one that comes.
            self.flags.clear();
            if let Some(order) = &mut self.order {
                order.clear()?;
            }
            self.serial = 0;
        }
        self.serial += 1;
        self.told = if blocks <= FLAGS { blocks } else { 1 };
        Ok(Done { blocks: self.own.address(), flags: self.flags.address(), serial: self.serial })
    }

    /// The same for a launch that stands by for an order, `limit` nanoseconds long.
    pub(crate) fn next_standby(&mut self, blocks: u32, limit: u64) -> Result<StandbyArgument, String> {
        let [order, passed] = self.stands_by()?.addresses();
        let done = self.next(blocks)?;
        let (arrived, given_up) = (self.own.address() + ARRIVED as u64, self.flags.given_up());
        Ok(StandbyArgument { order, arrived, passed, given_up, limit, done })
    }

    /// Makes what a launch that stands by needs, if it is not there yet.
    pub(crate) fn stands_by(&mut self) -> Result<&mut Order, String> {
        let order = match self.order.take() {
            Some(order) => order,
            None => Order::new(&self.gpu)?,
        };
        Ok(self.order.insert(order))
    }

    /// Tells a launch that stands by to give up.
    pub(crate) fn dismiss(&mut self) {
        if let Some(order) = &mut self.order {
            order.dismiss(self.serial);
        }
    }

    /// Tells a launch that stands by what to move, for which an order has room.
    pub(crate) fn give_order(&mut self, payload: &Payload) {
        if let Some(order) = &mut self.order {
            order.give(self.serial, payload);
        }
    }

    /// Whether the launch has moved everything.
    pub(crate) fn has_told(&self) -> bool {
        self.flags.are(self.told, self.serial)
    }

    /// Whether the launch stood by for longer than it was to, and never moves anything.
    pub(crate) fn has_given_up(&self) -> bool {
        self.flags.has_given_up(self.serial)
    }

    pub(crate) fn room(&mut self, bytes: usize) -> Result<&mut (HostBuffer, Buffer), String> {
        if self.payload.as_ref().is_none_or(|(host, device)| host.bytes() < bytes || device.bytes() < bytes) {
            self.payload = None;
            let bytes = bytes.next_multiple_of(PAYLOAD_STEP_BYTES);
            let made = (HostBuffer::new(&self.gpu, bytes)?, Buffer::new(&self.gpu, bytes)?);
            return Ok(self.payload.insert(made));
        }
        self.payload.as_mut().ok_or_else(|| "no buffer".to_owned())
    }

    /// Whether it has what is too large to be kept for other launches.
    pub(crate) fn is_large(&self) -> bool {
        self.payload.as_ref().is_some_and(|(host, _)| host.bytes() > PAYLOAD_KEPT_BYTES)
    }

    /// Lets go of that.
    pub(crate) fn shrink(&mut self) {
        if self.is_large() {
            self.payload = None;
        }
    }
}

impl Launch {
    pub(crate) fn new(number: u64, slot: Slot) -> Launch {
        Launch { number, slot: Some(slot), recorded: false, blocks: 0, looks: 0, ordered: None }
    }

    /// Has it not start again, if it has given up.
    pub(crate) fn abandon(&mut self) {
        self.ordered = None;
    }

    /// Whether the driver has seen its end. An error need not mean that it has ended.
    pub(crate) fn has_ended(&self) -> Result<bool, CudaError> {
        let Some(slot) = &self.slot else { return Ok(true) };
        slot.gpu.enter()?;
        // SAFETY: the event belongs to the slot.
        unsafe { driver::is_done(slot.event) }
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
            // SAFETY: the event exists. An error mostly means that the context is damaged, in which nothing runs any more; of any other there is nothing
            // to be done here.
            let _ended = unsafe { driver::wait(slot.event) };
        }
    }
}
