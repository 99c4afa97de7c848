//! What the library opened.

use std::ffi::c_int;
use std::ptr;

use libfabric_sys::{calls, fid};

/// An object of the library, closed once.
pub(crate) struct Object<O>(pub(crate) *mut O);

impl<O> Object<O> {
    /// Every object begins with what all have in common.
    pub(crate) fn common(&self) -> *mut fid {
        self.0.cast()
    }

    pub(crate) fn close(&mut self) -> c_int {
        if self.0.is_null() {
            return 0;
        }
        // SAFETY: an open object that is not used after this.
        let status = unsafe { calls::fi_close(self.common()) };
        self.0 = ptr::null_mut();
        status
    }
}

impl<O> Drop for Object<O> {
    fn drop(&mut self) {
        self.close();
    }
}
