//! The UCX library: found at run time, checked, and never let go again.

use std::collections::BTreeSet;
use std::ffi::{CStr, OsStr};
use std::fmt;
use std::path::Path;
use std::sync::Mutex;

use kvferry_transport::native::{check_file, file_of};
use ucx_sys::libloading::os::unix::{Library as Loaded, RTLD_LOCAL, RTLD_NOW};
use ucx_sys::{Ucp, ucs_status_t};

use crate::request::Free;

/// Names the library to load; else the loader's path decides.
pub(crate) const VARIABLE: &str = "KVFERRY_UCX_LIBRARY";
/// What the loader's path is asked for.
const NAME: &str = "libucp.so.0";
/// The oldest version that is used.
pub(crate) const OLDEST: Version = Version(1, 13, 0);
/// The version of the headers that the bindings come from.
const BINDINGS: Version = Version(1, 22, 0);

/// A version of UCX.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(pub(crate) u32, pub(crate) u32, pub(crate) u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// A loaded UCX with every function that is needed.
pub(crate) struct Library {
    pub(crate) api: Ucp,
    /// The file that it was loaded from.
    pub(crate) path: String,
    pub(crate) version: Version,
}

/// Libraries that were asked for, by name. UCX leaves hooks and threads behind, so none is ever unloaded.
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
        if let Some(other) = clash(name, &mapped()) {
            return Err(format!(
                "{other} is loaded in this process already, and {name} has parts of the same names; set {VARIABLE} to the loaded one"
            ));
        }
        let library: &'static Library = Box::leak(Box::new(load(name)?));
        loaded.push((name.to_owned(), library));
        Ok(library)
    }

    /// Other builds of UCX that are in this process by now.
    pub(crate) fn others(&self) -> Vec<String> {
        let own = std::fs::canonicalize(&self.path).ok();
        mapped().into_iter().filter(|build| own.as_deref() != Some(Path::new(build))).collect()
    }

    /// The version of the interface that contexts ask for.
    pub(crate) fn interface(&self) -> (u32, u32) {
        (self.version.0, self.version.1.min(BINDINGS.1))
    }

    /// What ends requests.
    pub(crate) fn request_free(&self) -> Result<Free, String> {
        self.api.ucp_request_free.as_ref().copied().map_err(|_| "this UCX cannot free requests".to_owned())
    }

    /// What a status means.
    pub(crate) fn words(&self, status: ucs_status_t) -> String {
        // SAFETY: the function exists (`load` checked) and takes any number; it returns a static string or null.
        let text = unsafe { self.api.ucs_status_string(status) };
        if text.is_null() {
            return format!("status {status}");
        }
        // SAFETY: a C string that lives as long as the library, which is for ever.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.path, self.version)
    }
}

fn load(name: &str) -> Result<Library, String> {
    check_file(name, VARIABLE)?;
    // SAFETY: loading runs the initialisers of UCX and what it needs; whoever names another library answers for it.
    let loaded = unsafe { Loaded::open(Some(OsStr::new(name)), RTLD_NOW | RTLD_LOCAL) };
    let loaded = loaded.map_err(|error| {
        format!(
            "{name} cannot be loaded ({error}); install UCX {OLDEST} or later, or set {VARIABLE} to its libucp.so.0"
        )
    })?;
    crate::log::redirect(&loaded);
    // SAFETY: the library stays loaded inside `api`, and every function is looked up by its own name and type.
    let api = unsafe { Ucp::from_library(loaded) }.map_err(|error| format!("{name}: {error}"))?;
    let Ok(address) = &api.ucp_get_version else {
        return Err(format!("{name} is no UCX library: it has no ucp_get_version; set {VARIABLE} to a libucp.so.0"));
    };
    let path = file_of(*address as usize).unwrap_or_else(|| name.to_owned());
    let (mut major, mut minor, mut release) = (0, 0, 0);
    // SAFETY: three places for numbers.
    unsafe { api.ucp_get_version(&mut major, &mut minor, &mut release) };
    let version = Version(major, minor, release);
    usable(&path, version)?;
    match missing(&api) {
        Some(function) => {
            Err(format!("{path} is UCX {version} without {function}; use a complete build of {OLDEST} or later"))
        }
        None => Ok(Library { api, path, version }),
    }
}

/// Refuses what is too old, or of another generation.
fn usable(path: &str, version: Version) -> Result<(), String> {
    if version < OLDEST || version.0 != OLDEST.0 {
        return Err(format!(
            "{path} is UCX {version}; {OLDEST} or later of generation {} is needed: install it or set {VARIABLE} to it",
            OLDEST.0
        ));
    }
    Ok(())
}

/// The first function that is needed and not there.
fn missing(api: &Ucp) -> Option<&'static str> {
    macro_rules! first_missing {
        ($($function:ident)*) => {
            [$((api.$function.is_err(), stringify!($function))),*].into_iter().find(|(missing, _)| *missing)
        };
    }
    // `ucp_ep_query` came with 1.14 and is looked for where it is used.
    first_missing!(
        ucs_status_string ucp_get_version ucp_init_version ucp_cleanup ucp_config_read ucp_config_modify
        ucp_config_release ucp_worker_create ucp_worker_destroy ucp_worker_query ucp_worker_progress
        ucp_worker_get_efd ucp_worker_arm ucp_worker_release_address ucp_worker_flush_nbx
        ucp_worker_set_am_recv_handler ucp_ep_create ucp_ep_close_nbx ucp_ep_flush_nbx ucp_ep_print_info
        ucp_ep_rkey_unpack ucp_rkey_destroy ucp_rkey_pack ucp_rkey_buffer_release ucp_am_send_nbx ucp_am_recv_data_nbx
        ucp_am_data_release ucp_get_nbx
        ucp_mem_map ucp_mem_unmap ucp_request_free
    )
    .map(|(_, name)| name)
}

fn mapped() -> BTreeSet<String> {
    builds(&std::fs::read_to_string("/proc/self/maps").unwrap_or_default())
}

/// The `libucp` files of a process, from its maps. Wheels rename theirs: `libucp-1a2b3c.so.0`.
fn builds(maps: &str) -> BTreeSet<String> {
    let files = maps.lines().filter_map(|line| line.find('/').and_then(|at| line.get(at..)));
    let named = files.filter(|file| {
        let name = file.rsplit('/').next().unwrap_or_default();
        name.strip_prefix("libucp").is_some_and(|rest| rest.starts_with(".so") || rest.starts_with('-'))
    });
    named.map(str::to_owned).collect()
}

/// A build that is loaded already and whose parts the loader would take for those of `name`: same names, another folder.
fn clash(name: &str, mapped: &BTreeSet<String>) -> Option<String> {
    let folder = |file: &str| std::fs::canonicalize(file).ok().and_then(|file| file.parent().map(Path::to_owned));
    let wanted = folder(name)?;
    let plain = |file: &&String| file.rsplit('/').next().unwrap_or_default().starts_with("libucp.so");
    mapped.iter().filter(plain).find(|file| folder(file).is_some_and(|folder| folder != wanted)).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_that_do_are_told_from_others() {
        for version in [Version(1, 13, 0), Version(1, 13, 1), Version(1, 22, 0), Version(1, 40, 2)] {
            assert_eq!(usable("/x", version), Ok(()));
        }
        for version in [Version(1, 12, 9), Version(0, 99, 0), Version(2, 0, 0)] {
            let error = usable("/opt/libucp.so.0", version).unwrap_err();
            assert!(error.contains("/opt/libucp.so.0") && error.contains(&version.to_string()), "{error}");
            assert!(error.contains("1.13.0"), "{error}");
        }
    }

    #[test]
    fn a_missing_library_names_the_remedy() {
        let error = Library::open("/nowhere/libucp.so.0").unwrap_err();
        assert!(error.contains("/nowhere/libucp.so.0") && error.contains(VARIABLE), "{error}");
    }

    #[test]
    fn a_library_that_is_not_ucx_is_refused() {
        let error = Library::open("libc.so.6").unwrap_err();
        assert!(error.contains("no UCX library"), "{error}");
    }

    #[test]
    fn builds_are_counted_by_file() {
        let maps = "7f0-7f1 r-xp 0 fe:0 12 /usr/lib/libucp.so.0.0.0\n7f1-7f2 r--p 0 fe:0 12 /usr/lib/libucp.so.0.0.0\n\
                    7f3-7f4 r-xp 0 fe:0 13 /venv/nixl.libs/libucp-ab12.so.0.0.0\n7f5-7f6 rw-p 0 0:0 0 [heap]\n\
                    7f3-7f4 r-xp 0 fe:0 13 /venv/libucs.so.0\n7f3-7f4 r-xp 0 fe:0 13 /venv/libucproto.so\n";
        let found: Vec<String> = builds(maps).into_iter().collect();
        assert_eq!(found, ["/usr/lib/libucp.so.0.0.0", "/venv/nixl.libs/libucp-ab12.so.0.0.0"]);
        assert!(builds("").is_empty());
    }
}
