//! What event queues report: errors of endpoints as a whole, in words.

use std::ffi::{CStr, c_char, c_int};

use libfabric_sys::{FI_EAVAIL, Padded, calls, fi_eq_err_entry, fid_eq};

use crate::library::Library;

const ERROR_AVAILABLE: isize = -(FI_EAVAIL as isize);

/// The next error of an event queue, in words, if there is one.
///
/// # Safety
/// An open event queue of that library.
pub(crate) unsafe fn take(events: *mut fid_eq, library: &Library) -> Option<String> {
    // SAFETY: the caller's word.
    let event = unsafe { next(events) }?;
    Some(describe(&library.words(event.err.into()), event.prov_errno, &event.own))
}

struct EventError {
    err: c_int,
    prov_errno: c_int,
    own: String,
}

/// The next error of an event queue; what else it reports means nothing for endpoints without connections.
///
/// # Safety
/// An open event queue.
unsafe fn next(events: *mut fid_eq) -> Option<EventError> {
    let (mut event, mut buffer) = (0, [0u64; 32]);
    // SAFETY: the caller's queue; room for as many bytes as it is told.
    let read = unsafe { calls::fi_eq_read(events, &mut event, buffer.as_mut_ptr().cast(), size_of_val(&buffer)) }.0;
    if read != ERROR_AVAILABLE {
        return None;
    }
    let mut entry = Padded::<fi_eq_err_entry>::zeroed();
    // SAFETY: as above, with a zeroed entry.
    let read = unsafe { calls::fi_eq_readerr(events, &mut entry) }.0;
    let entry = entry.fields();
    if read <= 0 {
        return None;
    }
    // SAFETY: what the queue said itself.
    let own = unsafe { words(calls::fi_eq_strerror(events, entry.prov_errno, entry.err_data)) };
    Some(EventError { err: entry.err, prov_errno: entry.prov_errno, own })
}

/// What went wrong, in libfabric's words and in the provider's.
pub(crate) fn describe(words: &str, number: c_int, own: &str) -> String {
    if own.is_empty() { format!("{words}, provider error {number}") } else { format!("{words}, {own} ({number})") }
}

/// # Safety
/// Null, or a C string.
pub(crate) unsafe fn words(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the caller's word.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use std::ffi::c_void;

    use libfabric_sys::{FI_EAGAIN, fi_ops_eq};

    use super::*;

    const AGAIN: isize = -(FI_EAGAIN as isize);

    unsafe extern "C" fn read(_: *mut fid_eq, _: *mut u32, _: *mut c_void, _: usize, _: u64) -> isize {
        ERROR_AVAILABLE
    }

    unsafe extern "C" fn readerr(_: *mut fid_eq, entry: *mut fi_eq_err_entry, _: u64) -> isize {
        // SAFETY: the caller's entry.
        unsafe {
            (*entry).err = -22;
            (*entry).prov_errno = 4111;
        }
        size_of::<fi_eq_err_entry>() as isize
    }

    unsafe extern "C" fn nothing(_: *mut fid_eq, _: *mut u32, _: *mut c_void, _: usize, _: u64) -> isize {
        AGAIN
    }

    /// An event queue of our own making, with what EFA reports for a peer's bad key.
    #[test]
    fn an_error_event_is_taken_with_its_number() {
        let mut table = fi_ops_eq { size: size_of::<fi_ops_eq>(), read: Some(read), ..Default::default() };
        table.readerr = Some(readerr);
        let mut queue = fid_eq { ops: &mut table, ..Default::default() };
        // SAFETY: a queue whose table has what is called.
        let event = unsafe { next(&mut queue) }.unwrap();
        assert_eq!((event.err, event.prov_errno, event.own.as_str()), (-22, 4111, ""));
        assert!(describe("Invalid argument (22)", event.prov_errno, &event.own).contains("4111"));
        table.read = Some(nothing);
        queue.ops = &mut table;
        // SAFETY: as above.
        assert!(unsafe { next(&mut queue) }.is_none());
    }
}
