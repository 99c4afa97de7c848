//! What transports over native libraries have in common.

use std::ffi::CStr;

/// Says why a library that is named by its path will not be loaded; the loader would wait for ever at a pipe.
pub fn check_file(name: &str) -> Result<(), String> {
    match std::fs::metadata(name) {
        Ok(metadata) if name.contains('/') && !metadata.is_file() => Err("it is no file".to_owned()),
        _ => Ok(()),
    }
}

/// The file that an address of this process was loaded from.
pub fn file_of(address: usize) -> Option<String> {
    let mut info = libc::Dl_info {
        dli_fname: std::ptr::null(),
        dli_fbase: std::ptr::null_mut(),
        dli_sname: std::ptr::null(),
        dli_saddr: std::ptr::null_mut(),
    };
    // SAFETY: dladdr takes any address and fills the structure in when it returns non-zero.
    let found =
        unsafe { libc::dladdr(std::ptr::without_provenance(address), &mut info) } != 0 && !info.dli_fname.is_null();
    // SAFETY: the name is a C string of the loader, which keeps it while the library is loaded.
    found.then(|| unsafe { CStr::from_ptr(info.dli_fname) }.to_string_lossy().into_owned())
}
