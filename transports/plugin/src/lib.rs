//! What a NIXL plugin says of itself, once it is loaded.
//!
//! Loading a library runs its code, which may do anything, ending the process included. [`read`] belongs into a process of its own that has
//! nothing to lose; how that process ended is part of the answer.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::Path;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW, Symbol};
use serde::{Deserialize, Serialize};

/// Bytes of a name that are looked at.
const NAME_MAX: usize = 256;

/// What came of loading a plugin beside a core.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loaded {
    /// The core's own library does not load, so nothing can be said of the plugin.
    CoreRefused(String),
    /// The loader refuses the plugin, with its words.
    Refused(String),
    /// It has no `nixl_plugin_init`.
    NoInit(String),
    /// `nixl_plugin_init` returned null.
    NoPlugin,
    /// It initialised.
    Plugin {
        /// The version of NIXL's plugin interface that it claims.
        api_version: i32,
        /// `get_plugin_name`, where the claimed interface is known and has one.
        name: Option<String>,
        /// `get_plugin_version`, likewise; a constant in every release so far.
        version: Option<String>,
    },
}

/// `nixlBackendPlugin` of NIXL's `backend_plugin.h`, as far as it is looked at; the same in every release with interface 1.
#[repr(C)]
struct BackendPlugin {
    api_version: c_int,
    create_engine: *const c_void,
    destroy_engine: *const c_void,
    get_plugin_name: Option<unsafe extern "C" fn() -> *const c_char>,
    get_plugin_version: Option<unsafe extern "C" fn() -> *const c_char>,
}

/// The interface whose structure is known.
const KNOWN_API: c_int = 1;

/// Loads `core`, then `plugin` as NIXL does (all symbols at once, visible to itself only), and asks the plugin. No engine is created.
///
/// The process should end soon afterwards, by [`leave`]: libraries stay loaded, and some crash when they are unloaded.
pub fn read(core: &Path, plugin: &Path) -> Loaded {
    // SAFETY: loading runs the libraries' initialisers, which is what the caller asks for; the libraries are never unloaded.
    let core = match unsafe { Library::open(Some(core), RTLD_NOW | RTLD_LOCAL) } {
        Ok(core) => core,
        Err(error) => return Loaded::CoreRefused(words(&error)),
    };
    std::mem::forget(core);
    // SAFETY: as above.
    let plugin = match unsafe { Library::open(Some(plugin), RTLD_NOW | RTLD_LOCAL) } {
        Ok(plugin) => plugin,
        Err(error) => return Loaded::Refused(words(&error)),
    };
    // SAFETY: NIXL declares nixl_plugin_init with this type in all its releases.
    let init: Result<Symbol<unsafe extern "C" fn() -> *const BackendPlugin>, _> =
        unsafe { plugin.get(b"nixl_plugin_init\0") };
    let loaded = match init {
        // SAFETY: the symbol is what its name says, or this process, which has nothing to lose, ends here.
        Ok(init) => describe(unsafe { init() }),
        Err(error) => Loaded::NoInit(words(&error)),
    };
    std::mem::forget(plugin);
    loaded
}

fn describe(plugin: *const BackendPlugin) -> Loaded {
    if plugin.is_null() {
        return Loaded::NoPlugin;
    }
    // SAFETY: not null; every interface begins with its version.
    let api_version = unsafe { (*plugin).api_version };
    if api_version != KNOWN_API {
        return Loaded::Plugin { api_version, name: None, version: None };
    }
    // SAFETY: interface 1 has these fields, and the structure lives as long as the plugin, which stays loaded.
    let (name, version) = unsafe { ((*plugin).get_plugin_name, (*plugin).get_plugin_version) };
    Loaded::Plugin { api_version, name: name.and_then(said), version: version.and_then(said) }
}

fn said(function: unsafe extern "C" fn() -> *const c_char) -> Option<String> {
    // SAFETY: interface 1 declares it so; it takes nothing and returns a constant.
    let text = unsafe { function() };
    if text.is_null() {
        return None;
    }
    // SAFETY: not null; the constant ends with a zero.
    let text = unsafe { CStr::from_ptr(text) }.to_bytes();
    Some(String::from_utf8_lossy(text.get(..NAME_MAX).unwrap_or(text)).into_owned())
}

/// Ends the process at once, without the libraries' farewells.
pub fn leave(code: u8) -> ! {
    // SAFETY: ends the process; nothing of it is used afterwards.
    unsafe { libc::_exit(i32::from(code)) }
}

fn words(error: &libloading::Error) -> String {
    match error {
        libloading::Error::DlOpen { desc } | libloading::Error::DlSym { desc } => format!("{desc:?}"),
        other => other.to_string(),
    }
}
