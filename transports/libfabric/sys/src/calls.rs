//! What libfabric's headers have as inline functions: calls through the tables of objects, by the headers' names.
//!
//! Each returns what the library returns, or `-FI_ENOSYS` where the object has no such function. Only functions are here that every library
//! from 1.17 on has in its tables.
//!
//! # Safety
//! For all of them: objects are open objects of the loaded library, used by one thread at a time; pointers are valid for what the function's
//! manual page says is read or written there, and for as long as it says (a posted operation's buffer and context until its completion, or
//! until the endpoint is closed).

#![expect(clippy::too_many_arguments, reason = "the library's own")]

use core::ffi::{c_char, c_int, c_void};

use crate::{
    FI_ENABLE, FI_ENOSYS, FI_GETWAIT, Padded, fi_addr_t, fi_av_attr, fi_cq_attr, fi_cq_err_entry, fi_eq_attr,
    fi_eq_err_entry, fi_info, fi_mr_attr, fi_msg_rma, fid, fid_av, fid_cq, fid_domain, fid_ep, fid_eq, fid_fabric,
    fid_mr,
};

/// Calls a function of a table, if both are there.
macro_rules! call {
    ($table:expr, $function:ident($($argument:expr),* $(,)?)) => {{
        let table = $table;
        if table.is_null() {
            return absent();
        }
        match (*table).$function {
            Some(function) => function($($argument),*),
            None => return absent(),
        }
    }};
}

fn absent<T: From<i32>>() -> T {
    T::from(-FI_ENOSYS.cast_signed())
}

/// What calls of the data path return; so wide as C's `ssize_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub isize);

impl From<i32> for Size {
    fn from(value: i32) -> Size {
        Size(value as isize)
    }
}

macro_rules! calls {
    ($($(#[$doc:meta])* fn $name:ident($($argument:ident: $kind:ty),* $(,)?) -> $out:ty = $wrap:expr; $table:expr => $function:ident($($given:expr),* $(,)?);)*) => {
        $(
            $(#[$doc])*
            /// # Safety
            /// As the module says.
            pub unsafe fn $name($($argument: $kind),*) -> $out {
                // SAFETY: the caller answers for objects and pointers.
                unsafe { $wrap(call!($table, $function($($given),*))) }
            }
        )*
    };
}

const fn same(value: c_int) -> c_int {
    value
}

calls! {
    /// Closes any object.
    fn fi_close(object: *mut fid) -> c_int = same; (*object).ops => close(object);
    /// Opens a domain.
    fn fi_domain(fabric: *mut fid_fabric, info: *mut fi_info, out: *mut *mut fid_domain) -> c_int = same;
        (*fabric).ops => domain(fabric, info, out, core::ptr::null_mut());
    /// Opens an event queue.
    fn fi_eq_open(fabric: *mut fid_fabric, attr: *mut Padded<fi_eq_attr>, out: *mut *mut fid_eq) -> c_int = same;
        (*fabric).ops => eq_open(fabric, attr.cast(), out, core::ptr::null_mut());
    /// Whether it is safe to sleep on the descriptors of these objects.
    fn fi_trywait(fabric: *mut fid_fabric, objects: *mut *mut fid, count: c_int) -> c_int = same;
        (*fabric).ops => trywait(fabric, objects, count);
    /// Opens a completion queue.
    fn fi_cq_open(domain: *mut fid_domain, attr: *mut Padded<fi_cq_attr>, out: *mut *mut fid_cq) -> c_int = same;
        (*domain).ops => cq_open(domain, attr.cast(), out, core::ptr::null_mut());
    /// Opens an address vector.
    fn fi_av_open(domain: *mut fid_domain, attr: *mut Padded<fi_av_attr>, out: *mut *mut fid_av) -> c_int = same;
        (*domain).ops => av_open(domain, attr.cast(), out, core::ptr::null_mut());
    /// Opens an endpoint.
    fn fi_endpoint(domain: *mut fid_domain, info: *mut fi_info, out: *mut *mut fid_ep) -> c_int = same;
        (*domain).ops => endpoint(domain, info, out, core::ptr::null_mut());
    /// Registers memory.
    fn fi_mr_regattr(domain: *mut fid_domain, attr: *mut Padded<fi_mr_attr>, flags: u64, out: *mut *mut fid_mr) -> c_int = same;
        (*domain).mr => regattr(&raw mut (*domain).fid, attr.cast(), flags, out);
    /// Inserts addresses; how many, or an error.
    fn fi_av_insert(av: *mut fid_av, addresses: *const c_void, count: usize, out: *mut fi_addr_t) -> c_int = same;
        (*av).ops => insert(av, addresses, count, out, 0, core::ptr::null_mut());
    /// Removes addresses.
    fn fi_av_remove(av: *mut fid_av, addresses: *mut fi_addr_t, count: usize) -> c_int = same;
        (*av).ops => remove(av, addresses, count, 0);
    /// Binds an object to an endpoint.
    fn fi_ep_bind(endpoint: *mut fid_ep, object: *mut fid, flags: u64) -> c_int = same;
        (*endpoint).fid.ops => bind(&raw mut (*endpoint).fid, object, flags);
    /// Makes an endpoint ready.
    fn fi_enable(endpoint: *mut fid_ep) -> c_int = same;
        (*endpoint).fid.ops => control(&raw mut (*endpoint).fid, FI_ENABLE.cast_signed(), core::ptr::null_mut());
    /// The descriptor of a queue that was opened with one.
    fn fi_getwait(object: *mut fid, out: *mut c_int) -> c_int = same;
        (*object).ops => control(object, FI_GETWAIT.cast_signed(), out.cast());
    /// Sets an endpoint's option.
    fn fi_setopt(endpoint: *mut fid_ep, level: c_int, option: c_int, value: *const c_void, bytes: usize) -> c_int = same;
        (*endpoint).ops => setopt(&raw mut (*endpoint).fid, level, option, value, bytes);
    /// Reads an endpoint's option.
    fn fi_getopt(endpoint: *mut fid_ep, level: c_int, option: c_int, value: *mut c_void, bytes: *mut usize) -> c_int = same;
        (*endpoint).ops => getopt(&raw mut (*endpoint).fid, level, option, value, bytes);
    /// An endpoint's address.
    fn fi_getname(endpoint: *mut fid_ep, address: *mut c_void, bytes: *mut usize) -> c_int = same;
        (*endpoint).cm => getname(&raw mut (*endpoint).fid, address, bytes);
    /// Posts a send.
    fn fi_send(endpoint: *mut fid_ep, buffer: *const c_void, bytes: usize, desc: *mut c_void, to: fi_addr_t, context: *mut c_void) -> Size = Size;
        (*endpoint).msg => send(endpoint, buffer, bytes, desc, to, context);
    /// Posts a receive.
    fn fi_recv(endpoint: *mut fid_ep, buffer: *mut c_void, bytes: usize, desc: *mut c_void, from: fi_addr_t, context: *mut c_void) -> Size = Size;
        (*endpoint).msg => recv(endpoint, buffer, bytes, desc, from, context);
    /// Posts a read of a peer's memory.
    fn fi_read(
        endpoint: *mut fid_ep, buffer: *mut c_void, bytes: usize, desc: *mut c_void, from: fi_addr_t, address: u64, key: u64,
        context: *mut c_void,
    ) -> Size = Size;
        (*endpoint).rma => read(endpoint, buffer, bytes, desc, from, address, key, context);
    /// Posts a read of several places of a peer's memory into several of ours.
    fn fi_readmsg(endpoint: *mut fid_ep, message: *const fi_msg_rma, flags: u64) -> Size = Size;
        (*endpoint).rma => readmsg(endpoint, message, flags);
    /// Reads completions in the queue's format; how many, or an error.
    fn fi_cq_read(queue: *mut fid_cq, entries: *mut c_void, count: usize) -> Size = Size;
        (*queue).ops => read(queue, entries, count);
    /// Reads the completion in error that `fi_cq_read` stumbled over.
    fn fi_cq_readerr(queue: *mut fid_cq, entry: *mut Padded<fi_cq_err_entry>) -> Size = Size;
        (*queue).ops => readerr(queue, entry.cast(), 0);
    /// Reads an event.
    fn fi_eq_read(queue: *mut fid_eq, event: *mut u32, buffer: *mut c_void, bytes: usize) -> Size = Size;
        (*queue).ops => read(queue, event, buffer, bytes, 0);
    /// Reads the error that `fi_eq_read` stumbled over.
    fn fi_eq_readerr(queue: *mut fid_eq, entry: *mut Padded<fi_eq_err_entry>) -> Size = Size;
        (*queue).ops => readerr(queue, entry.cast(), 0);
}

/// A provider's own words for a completion's error; null where it has none.
///
/// # Safety
/// As the module says.
pub unsafe fn fi_cq_strerror(queue: *mut fid_cq, error: c_int, data: *const c_void) -> *const c_char {
    // SAFETY: the caller answers for the queue.
    unsafe {
        let table = (*queue).ops;
        if table.is_null() {
            return core::ptr::null();
        }
        (*table).strerror.map_or(core::ptr::null(), |words| words(queue, error, data, core::ptr::null_mut(), 0))
    }
}

/// A provider's own words for an event's error; null where it has none.
///
/// # Safety
/// As the module says.
pub unsafe fn fi_eq_strerror(queue: *mut fid_eq, error: c_int, data: *const c_void) -> *const c_char {
    // SAFETY: the caller answers for the queue.
    unsafe {
        let table = (*queue).ops;
        if table.is_null() {
            return core::ptr::null();
        }
        (*table).strerror.map_or(core::ptr::null(), |words| words(queue, error, data, core::ptr::null_mut(), 0))
    }
}
