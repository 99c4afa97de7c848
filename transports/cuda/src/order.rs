//! What a launch that stands by is told, in page-locked host memory and, passed on by its first thread block, in the GPU's own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::buffer::{Buffer, HostBuffer};
use crate::gpu::Gpu;
use crate::launch::INLINE_BYTES;
use crate::rectangle::{Payload, Walk};

/// Where the payload begins behind the order's word, as in `walk.cu`.
const PAYLOAD_AT: usize = 128;
const BYTES: usize = PAYLOAD_AT + INLINE_BYTES;
const VECTOR_BYTES: usize = 16;
/// Rectangles are counted in 16 bits.
const RECTANGLES_MAX: u32 = 0xffff;

/// Memory for one order, for launches one after another.
pub(crate) struct Order {
    host: HostBuffer,
    device: Buffer,
}

impl Order {
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Result<Order, String> {
        let mut order = Order { host: HostBuffer::new(gpu, BYTES)?, device: Buffer::new(gpu, BYTES)? };
        order.clear()?;
        Ok(order)
    }

    /// Forgets all orders. The caller has waited for every launch that looked for one.
    pub(crate) fn clear(&mut self) -> Result<(), String> {
        self.host.write(0, &[0; BYTES]);
        self.device.upload(&[0; BYTES])
    }

    /// Whether an order can say all of it: even pieces, as many as an argument tells of.
    pub(crate) fn has_room(payload: &Payload) -> bool {
        payload.walk == Walk::Even
            && (1..=INLINE_BYTES).contains(&payload.bytes.len())
            && (1..=RECTANGLES_MAX).contains(&payload.rectangles)
    }

    /// Where the host writes it, and where it is passed on, for kernels.
    pub(crate) fn addresses(&self) -> [u64; 2] {
        [self.host.base() as u64, self.device.address()]
    }

    /// Tells the launch of this serial, which has had no order, what to move. Whatever was written before is seen by it. The payload has room here.
    pub(crate) fn give(&mut self, serial: u32, payload: &Payload) {
        self.host.write(PAYLOAD_AT, &payload.bytes);
        self.tell(serial, payload.rectangles, payload.bytes.len().div_ceil(VECTOR_BYTES) as u32);
    }

    /// Tells the launch of this serial, which has had no order, to give up.
    pub(crate) fn dismiss(&mut self, serial: u32) {
        self.tell(serial, 0, 0);
    }

    fn tell(&mut self, serial: u32, rectangles: u32, vectors: u32) {
        let word = u64::from(serial) << 32 | u64::from(rectangles) << 16 | u64::from(vectors);
        // SAFETY: the buffer begins with a word, is page-aligned and lives as long as this; the GPU only reads it.
        unsafe { AtomicU64::from_ptr(self.host.base().cast()) }.store(word, Ordering::Release);
    }
}
