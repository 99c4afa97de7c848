//! The libfabric library: found at run time, checked, and never let go again.

use std::ffi::{CStr, OsStr};
use std::fmt;
use std::sync::Mutex;

use kvferry_transport::native::{check_file, file_of};
use libfabric_sys::libloading::os::unix::{Library as Loaded, RTLD_LOCAL, RTLD_NOW};
use libfabric_sys::{Fabric, asked_version, version};

/// Names the library to load; else the loader's path decides.
pub(crate) const VARIABLE: &str = "KVFERRY_LIBFABRIC_LIBRARY";
/// What the loader's path is asked for.
const NAME: &str = "libfabric.so.1";
/// The oldest version that is used.
const OLDEST: Version = Version(version(1, 17));

/// A version of libfabric, as it counts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(pub(crate) u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 >> 16, self.0 & 0xffff)
    }
}

/// A loaded libfabric with every function that is needed.
pub(crate) struct Library {
    pub(crate) api: Fabric,
    /// The file that it was loaded from.
    pub(crate) path: String,
    pub(crate) version: Version,
}

/// Libraries that were asked for, by name. Providers leave threads and hooks behind, so none is ever unloaded.
static LOADED: Mutex<Vec<(String, &'static Library)>> = Mutex::new(Vec::new());

impl Library {
    /// The library that the environment names, or the loader finds.
    pub(crate) fn find() -> Result<&'static Library, String> {
        match std::env::var(VARIABLE) {
            Ok(path) if !path.is_empty() => Library::open(&path),
            _ => Library::open(NAME),
        }
    }

    /// Loads one library, once; says path, version found and version needed when it cannot be used.
    pub(crate) fn open(name: &str) -> Result<&'static Library, String> {
        let mut loaded = LOADED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some((_, library)) = loaded.iter().find(|(known, _)| known == name) {
            return Ok(library);
        }
        let library: &'static Library = Box::leak(Box::new(load(name)?));
        loaded.push((name.to_owned(), library));
        Ok(library)
    }

    /// The version of the interface that is asked for.
    pub(crate) fn asked(&self) -> u32 {
        asked_version(self.version.0)
    }

    /// What an error means, given as the library gives it: negative or not.
    pub(crate) fn words(&self, error: i64) -> String {
        let number = i32::try_from(error.unsigned_abs()).unwrap_or(i32::MAX);
        let text = match &self.api.fi_strerror {
            // SAFETY: it takes any number and returns a static string or null.
            Ok(strerror) => unsafe { strerror(number) },
            Err(_) => std::ptr::null(),
        };
        if text.is_null() {
            return format!("error {number}");
        }
        // SAFETY: a C string that lives as long as the library, which is for ever.
        format!("{} ({number})", unsafe { CStr::from_ptr(text) }.to_string_lossy())
    }

    /// `Ok` for zero, else what was tried and what the library said.
    pub(crate) fn check(&self, what: &str, status: i32) -> Result<(), String> {
        if status == 0 { Ok(()) } else { Err(format!("{what}: {}", self.words(status.into()))) }
    }
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.path, self.version)
    }
}

fn load(name: &str) -> Result<Library, String> {
    check_file(name, VARIABLE)?;
    // SAFETY: loading runs the initialisers of libfabric and what it needs; whoever names another library answers for it.
    let loaded = unsafe { Loaded::open(Some(OsStr::new(name)), RTLD_NOW | RTLD_LOCAL) };
    let loaded = loaded.map_err(|error| {
        format!(
            "{name} cannot be loaded ({error}); install libfabric {OLDEST} or later, or set {VARIABLE} to its libfabric.so.1"
        )
    })?;
    // SAFETY: the library stays loaded inside `api`, and every function is looked up by its own name and type.
    let api = unsafe { Fabric::from_library(loaded) }.map_err(|error| format!("{name}: {error}"))?;
    let Ok(ask) = &api.fi_version else {
        return Err(format!("{name} is no libfabric: it has no fi_version; set {VARIABLE} to a libfabric.so.1"));
    };
    let path = file_of(*ask as usize).unwrap_or_else(|| name.to_owned());
    // SAFETY: it takes nothing and returns a number.
    let version = Version(unsafe { ask() });
    usable(&path, version)?;
    match missing(&api) {
        Some(function) => {
            Err(format!("{path} is libfabric {version} without {function}; use a complete build of {OLDEST} or later"))
        }
        None => Ok(Library { api, path, version }),
    }
}

/// Refuses what is too old.
fn usable(path: &str, version: Version) -> Result<(), String> {
    if version < OLDEST {
        return Err(format!(
            "{path} is libfabric {version}; {OLDEST} or later is needed: install it or set {VARIABLE} to it"
        ));
    }
    Ok(())
}

/// The first function that is needed and not there.
fn missing(api: &Fabric) -> Option<&'static str> {
    [
        (api.fi_getinfo.is_err(), "fi_getinfo"),
        (api.fi_freeinfo.is_err(), "fi_freeinfo"),
        (api.fi_dupinfo.is_err(), "fi_dupinfo"),
        (api.fi_fabric.is_err(), "fi_fabric"),
        (api.fi_strerror.is_err(), "fi_strerror"),
    ]
    .into_iter()
    .find_map(|(is_missing, name)| is_missing.then_some(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_that_do_are_told_from_others() {
        for loaded in [version(1, 17), version(1, 22), version(2, 5), version(3, 0)] {
            assert_eq!(usable("/x", Version(loaded)), Ok(()));
        }
        for loaded in [version(1, 16), version(1, 0)] {
            let error = usable("/opt/libfabric.so.1", Version(loaded)).unwrap_err();
            assert!(error.contains("/opt/libfabric.so.1") && error.contains("1.17 or later"), "{error}");
            assert!(error.contains(&Version(loaded).to_string()), "{error}");
        }
    }

    #[test]
    fn a_missing_library_names_the_remedy() {
        let error = Library::open("/nowhere/libfabric.so.1").unwrap_err();
        assert!(error.contains("/nowhere/libfabric.so.1") && error.contains(VARIABLE), "{error}");
    }

    #[test]
    fn a_library_that_is_not_libfabric_is_refused() {
        let error = Library::open("libc.so.6").unwrap_err();
        assert!(error.contains("no libfabric"), "{error}");
    }
}
