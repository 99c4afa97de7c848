//! What transports over native libraries have in common.

use std::ffi::CStr;
use std::path::Path;

/// Whether something else than a file is there: the loader would wait for ever at a pipe.
pub fn is_no_file(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| !metadata.is_file())
}

/// Says why a library that `variable` names by its path is not to be loaded, if it is not. What is no path the loader looks for.
pub fn check_file(name: &str, variable: &str) -> Result<(), String> {
    match name.contains('/') && is_no_file(Path::new(name)) {
        true => Err(format!("{name} cannot be loaded: it is no file; correct {variable}")),
        false => Ok(()),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_file_is_not_loaded() {
        let folder = std::env::temp_dir();
        let refused = check_file(&folder.to_string_lossy(), "KVFERRY_X_LIBRARY").unwrap_err();
        assert!(refused.contains("it is no file; correct KVFERRY_X_LIBRARY"), "{refused}");
        let own = std::env::current_exe().unwrap();
        // What is not there the loader says itself; a name without a path is the loader's to find.
        for name in [&*own.to_string_lossy(), "/nowhere/libx.so", "src"] {
            assert_eq!(check_file(name, "KVFERRY_X_LIBRARY"), Ok(()), "{name}");
        }
        assert!(is_no_file(&folder) && !is_no_file(&own));
    }
}
