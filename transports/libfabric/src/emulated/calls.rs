//! What stands in front of the library's functions. Tables of objects are replaced by copies that know their originals.

use std::ffi::{c_char, c_int, c_void};
use std::os::fd::BorrowedFd;

use libfabric_sys::{
    FI_ENODATA, FI_HMEM, FI_HMEM_CUDA, FI_HMEM_SYSTEM, FI_MR_DMABUF, FI_MR_HMEM, FI_OPT_CUDA_API_PERMITTED,
    FI_OPT_FI_HMEM_P2P, FI_OPT_SHARED_MEMORY_PERMITTED, fi_fabric_attr, fi_info, fi_mr_attr, fi_msg_rma, fid,
    fid_domain, fid_ep, fid_fabric, fid_mr, iovec,
};

use super::memory::actual;
use super::{GPU, script};
use crate::domain::DmabufRange;
use crate::endpoint::PIECES_MAX;
use crate::library::Library;

const REFUSED: c_int = -libc::EINVAL;

/// A table of functions, and the one that it was copied from.
#[repr(C)]
struct Table<T> {
    table: T,
    original: *mut T,
}

/// # Safety
/// A table of the library's, which begins with its size in bytes.
pub(super) unsafe fn replace<T: Default>(place: &mut *mut T, change: impl FnOnce(&mut T)) {
    // SAFETY: the caller's word; no more is copied than both have, and the copy says how much that is.
    unsafe {
        let original = *place;
        let bytes = original.cast::<usize>().read().min(size_of::<T>());
        let mut table = T::default();
        std::ptr::copy_nonoverlapping(original.cast::<u8>(), (&raw mut table).cast(), bytes);
        (&raw mut table).cast::<usize>().write(bytes);
        change(&mut table);
        *place = (&raw mut Box::leak(Box::new(Table { table, original })).table).cast();
    }
}

/// # Safety
/// A table that was replaced.
pub(super) unsafe fn original<'a, T>(table: *mut T) -> &'a T {
    // SAFETY: it lies at the beginning of what it was replaced with.
    unsafe { &*(*table.cast::<Table<T>>()).original }
}

fn real() -> &'static Library {
    Library::find().unwrap()
}

fn complain(of: String) -> c_int {
    script(|script| script.complaints.push(of));
    REFUSED
}

/// Asks the library for the same without device memory.
///
/// # Safety
/// An information of the library's, or null.
unsafe fn plain(info: *const fi_info) -> (*mut fi_info, bool) {
    // SAFETY: the copy is ours until it is freed.
    unsafe {
        let copy = real().api.fi_dupinfo.as_ref().unwrap()(info);
        let is_for_devices = (*copy).caps & FI_HMEM != 0;
        (*copy).caps &= !FI_HMEM;
        (*(*copy).domain_attr).mr_mode &= !FI_MR_HMEM.cast_signed();
        (copy, is_for_devices)
    }
}

/// # Safety
/// A copy that [`plain`] made.
unsafe fn free(info: *mut fi_info) {
    // SAFETY: freed once.
    unsafe { real().api.fi_freeinfo.as_ref().unwrap()(info) };
}

pub(super) unsafe extern "C" fn getinfo(
    _: u32,
    node: *const c_char,
    service: *const c_char,
    flags: u64,
    hints: *const fi_info,
    out: *mut *mut fi_info,
) -> c_int {
    let real = real();
    // SAFETY: the caller's arguments, and hints of our own.
    unsafe {
        let (hints, is_for_devices) = plain(hints);
        if is_for_devices && script(|script| script.offers_nothing) {
            free(hints);
            return -FI_ENODATA.cast_signed();
        }
        let status = real.api.fi_getinfo.as_ref().unwrap()(real.asked(), node, service, flags, hints, out);
        free(hints);
        let mut next = if status == 0 && is_for_devices { *out } else { std::ptr::null_mut() };
        while !next.is_null() {
            (*next).caps |= FI_HMEM;
            (*(*next).domain_attr).mr_mode |= FI_MR_HMEM.cast_signed();
            next = (*next).next;
        }
        status
    }
}

pub(super) unsafe extern "C" fn fabric(
    attr: *mut fi_fabric_attr,
    out: *mut *mut fid_fabric,
    context: *mut c_void,
) -> c_int {
    // SAFETY: the caller's arguments.
    unsafe {
        let status = real().api.fi_fabric.as_ref().unwrap()(attr, out, context);
        if status == 0 {
            replace(&mut (**out).ops, |ops| ops.domain = Some(domain));
        }
        status
    }
}

unsafe extern "C" fn domain(
    fabric: *mut fid_fabric,
    info: *mut fi_info,
    out: *mut *mut fid_domain,
    context: *mut c_void,
) -> c_int {
    // SAFETY: the caller's arguments, with an information of our own, which the library copies.
    unsafe {
        let (info, is_for_devices) = plain(info);
        let status = original((*fabric).ops).domain.unwrap()(fabric, info, out, context);
        free(info);
        if status == 0 && is_for_devices {
            replace(&mut (**out).ops, |ops| ops.endpoint = Some(endpoint));
            replace(&mut (**out).mr, |ops| ops.regattr = Some(register));
        }
        status
    }
}

unsafe extern "C" fn endpoint(
    domain: *mut fid_domain,
    info: *mut fi_info,
    out: *mut *mut fid_ep,
    context: *mut c_void,
) -> c_int {
    // SAFETY: as above.
    unsafe {
        let (info, _) = plain(info);
        let status = original((*domain).ops).endpoint.unwrap()(domain, info, out, context);
        free(info);
        if status == 0 {
            replace(&mut (**out).ops, |ops| ops.setopt = Some(set));
            replace(&mut (**out).rma, |ops| {
                ops.read = Some(read);
                ops.readmsg = Some(read_several);
            });
        }
        status
    }
}

unsafe extern "C" fn set(endpoint: *mut fid, level: c_int, option: c_int, value: *const c_void, bytes: usize) -> c_int {
    let number = option.cast_unsigned();
    let known = [(FI_OPT_FI_HMEM_P2P, 4), (FI_OPT_CUDA_API_PERMITTED, 1), (FI_OPT_SHARED_MEMORY_PERMITTED, 1)];
    if !known.iter().any(|(option, _)| *option == number) {
        // SAFETY: the caller's arguments.
        return unsafe {
            original((*endpoint.cast::<fid_ep>()).ops).setopt.unwrap()(endpoint, level, option, value, bytes)
        };
    }
    if !known.contains(&(number, bytes)) {
        return complain(format!("option {number} of {bytes} bytes"));
    }
    // SAFETY: as many bytes as were just compared.
    let value = unsafe { if bytes == 4 { value.cast::<i32>().read() } else { value.cast::<u8>().read().into() } };
    script(|script| {
        script.options.push((number, value));
        if number == FI_OPT_FI_HMEM_P2P { script.p2p } else { script.cuda_api }
    })
}

unsafe extern "C" fn register(domain: *mut fid, attr: *const fi_mr_attr, flags: u64, out: *mut *mut fid_mr) -> c_int {
    // SAFETY: the caller's arguments; what is given on is a copy.
    unsafe {
        let library = original((*domain.cast::<fid_domain>()).mr).regattr.unwrap();
        let attr = &*attr;
        if attr.iface == FI_HMEM_SYSTEM {
            let range = &*attr.__bindgen_anon_1.mr_iov;
            if actual(range.iov_base as usize, range.iov_len).is_some() {
                return complain("memory of the GPU as the host's".to_owned());
            }
            return library(domain, attr, flags, out);
        }
        let is_plain = attr.hmem_data.is_null() && attr.page_size == 0 && attr.base_mr.is_null() && attr.offset == 0;
        if attr.iface != FI_HMEM_CUDA || attr.device.reserved != GPU.1 as u64 || attr.iov_count != 1 || !is_plain {
            return complain(format!("memory of kind {}, device {}", attr.iface, attr.device.reserved));
        }
        let demanded = [(FI_OPT_FI_HMEM_P2P, 1), (FI_OPT_CUDA_API_PERMITTED, 0)];
        if !demanded.iter().all(|option| script(|script| script.options.contains(option))) {
            return complain("memory before it was said how it is reached".to_owned());
        }
        let (address, bytes) = match flags {
            FI_MR_DMABUF => {
                let range = &*attr.__bindgen_anon_1.dmabuf.cast::<DmabufRange>();
                let file = rustix::fs::fstat(BorrowedFd::borrow_raw(range.fd)).map_or(0, |file| file.st_size as u64);
                let end = range.offset + range.bytes as u64;
                if !(range.base as usize).is_multiple_of(4096) || end > file {
                    return complain(format!("a dma-buf of {file} bytes up to {end}"));
                }
                (range.base as usize + range.offset as usize, range.bytes)
            }
            0 => {
                let range = &*attr.__bindgen_anon_1.mr_iov;
                (range.iov_base as usize, range.iov_len)
            }
            flags => return complain(format!("flags {flags:#x}")),
        };
        let status = script(|script| if flags == 0 { script.by_address } else { script.by_dmabuf });
        if status != 0 {
            return status;
        }
        let Some(found) = actual(address, bytes) else { return complain(format!("{bytes} bytes at {address:#x}")) };
        script(|script| *if flags == 0 { &mut script.addresses } else { &mut script.dmabufs } += 1);
        let range = iovec { iov_base: std::ptr::with_exposed_provenance_mut(found), iov_len: bytes };
        let mut attr = *attr;
        attr.__bindgen_anon_1.mr_iov = &range;
        attr.iface = FI_HMEM_SYSTEM;
        attr.device.reserved = 0;
        library(domain, &attr, 0, out)
    }
}

/// Where a read's bytes go.
fn landing(place: *mut c_void, bytes: usize, desc: *mut c_void) -> *mut c_void {
    let Some(found) = actual(place as usize, bytes) else { return place };
    if desc.is_null() {
        complain("a read into the GPU's memory without its registration".to_owned());
    }
    std::ptr::with_exposed_provenance_mut(found)
}

unsafe extern "C" fn read(
    endpoint: *mut fid_ep,
    place: *mut c_void,
    bytes: usize,
    desc: *mut c_void,
    from: u64,
    address: u64,
    key: u64,
    context: *mut c_void,
) -> isize {
    let place = landing(place, bytes, desc);
    // SAFETY: the caller's arguments.
    unsafe { original((*endpoint).rma).read.unwrap()(endpoint, place, bytes, desc, from, address, key, context) }
}

unsafe extern "C" fn read_several(endpoint: *mut fid_ep, message: *const fi_msg_rma, flags: u64) -> isize {
    // SAFETY: the caller's arguments; the copy lives during the call.
    unsafe {
        let mut message = *message;
        let mut places = [iovec::default(); PIECES_MAX];
        for (at, place) in places.iter_mut().enumerate().take(message.iov_count) {
            let given = *message.msg_iov.add(at);
            let there = landing(given.iov_base, given.iov_len, *message.desc.add(at));
            *place = iovec { iov_base: there, iov_len: given.iov_len };
        }
        message.msg_iov = places.as_ptr();
        original((*endpoint).rma).readmsg.unwrap()(endpoint, &message, flags)
    }
}
