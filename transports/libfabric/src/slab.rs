//! Buffers of our own operations: one allocation, registered where the provider wants that.

use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::rc::Rc;

use crate::domain::{Domain, Registered};

/// Bytes that a device and this process both touch, never at the same time.
type Bytes = Rc<[UnsafeCell<u8>]>;

/// So many buffers of one size, by number. Which of them is in use its owner knows.
pub(crate) struct Slab {
    registered: Option<Registered<Bytes>>,
    bytes: Bytes,
    each: usize,
}

impl Slab {
    pub(crate) fn new(domain: &Rc<Domain>, count: u32, each: usize, access: u32) -> Result<Slab, String> {
        let length = (count as usize).saturating_mul(each);
        let bytes: Bytes = (0..length).map(|_| UnsafeCell::new(0)).collect();
        let registered = if domain.mode.local {
            let base = bytes.as_ptr() as *mut u8;
            Some(Registered::new(domain, base, length, access, bytes.clone())?)
        } else {
            None
        };
        Ok(Slab { registered, bytes, each })
    }

    /// One buffer's first byte; it has the slab's size of bytes.
    pub(crate) fn buffer(&self, number: u32) -> Option<*mut u8> {
        let from = (number as usize).checked_mul(self.each)?;
        Some(self.bytes.get(from..from.checked_add(self.each)?)?.as_ptr() as *mut u8)
    }

    pub(crate) fn desc(&self) -> *mut c_void {
        self.registered.as_ref().map_or(std::ptr::null_mut(), Registered::desc)
    }

    /// Copies into a buffer that nobody uses; what does not fit is left out.
    pub(crate) fn write(&self, number: u32, parts: [&[u8]; 2]) -> usize {
        let Some(buffer) = self.buffer(number) else { return 0 };
        let mut at = 0;
        for part in parts {
            let bytes = part.len().min(self.each - at);
            // SAFETY: `at + bytes` is inside the buffer, which no operation has at the moment.
            unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), buffer.add(at), bytes) };
            at += bytes;
        }
        at
    }

    /// Copies out of a buffer whose operation is over.
    pub(crate) fn read(&self, number: u32, bytes: usize) -> Vec<u8> {
        let Some(buffer) = self.buffer(number) else { return Vec::new() };
        // SAFETY: inside the buffer; the operation that filled it is over, and it is copied before there is another.
        unsafe { std::slice::from_raw_parts(buffer, bytes.min(self.each)) }.to_vec()
    }
}
