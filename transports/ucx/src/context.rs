//! One UCX context, for one device and method, and the memory that is registered with it.

use std::ffi::CString;
use std::ptr;
use std::rc::Rc;

use kvferry_transport::Pool;
use ucx_sys::{
    UCP_FEATURE_AM, UCP_FEATURE_RMA, UCP_FEATURE_WAKEUP, UCP_MEM_MAP_PARAM_FIELD_ADDRESS,
    UCP_MEM_MAP_PARAM_FIELD_LENGTH, UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE, UCP_PARAM_FIELD_FEATURES,
    UCP_PARAM_FIELD_NAME, UCS_ERR_NO_ELEM, UCS_MEMORY_TYPE_HOST, UCS_OK, ucp_config_t, ucp_context_h, ucp_mem_h,
    ucp_mem_map_params_t, ucp_params_t, ucs_status_t,
};

use crate::device::{Access, Found, Method};
use crate::library::Library;
use crate::memlock::Lockable;
use crate::settings;
use crate::wire::RKEY_BYTES_MAX;

/// An open context. It is closed when the last user of it is gone.
pub(crate) struct Context {
    pub(crate) library: &'static Library,
    raw: ucp_context_h,
}

impl Context {
    /// Opens a context that sees one device; the process's environment is not touched.
    pub(crate) fn open(library: &'static Library, device: &Found, access: Access) -> Result<Rc<Context>, String> {
        let settings = settings::settings(device.method, access, library.version);
        let settings = settings.iter().map(|setting| (setting.key, setting.value));
        let mut features = UCP_FEATURE_AM;
        if access == Access::OneSided {
            features |= UCP_FEATURE_RMA;
        }
        if device.method.wakes() {
            features |= UCP_FEATURE_WAKEUP;
        }
        let name = format!("kvferry:{}", device.name);
        let settings = [("NET_DEVICES", device.network.as_str())].into_iter().chain(settings);
        Context::with(library, &name, features, settings, &[]).map_err(|error| match error {
            Refused::Setting(error) => error,
            Refused::Context(status) => unusable(library, device.method, status),
        })
    }

    /// Opens a context with settings of which a user's `UCX_*` are left alone, and so are those that this build lacks.
    pub(crate) fn with<'a>(
        library: &'static Library,
        name: &str,
        features: u32,
        settings: impl Iterator<Item = (&'a str, &'a str)>,
        optional: &[&str],
    ) -> Result<Rc<Context>, Refused> {
        let config = Config::read(library).map_err(Refused::Setting)?;
        for (key, value) in settings.filter(|(key, _)| !settings::is_users(key)) {
            match config.modify(settings::name_of(key, library.version), value).map_err(Refused::Setting)? {
                // Left out of this build.
                UCS_OK | UCS_ERR_NO_ELEM => {}
                status if optional.contains(&key) => {
                    tracing::debug!(
                        key,
                        value,
                        status = library.words(status),
                        "UCX does not take a setting; it is left out"
                    );
                }
                status => {
                    let words = library.words(status);
                    return Err(Refused::Setting(format!("UCX does not take {key}={value}: {words}")));
                }
            }
        }
        // UCX's own log lines begin with it.
        let name = CString::new(name).unwrap_or_default();
        let params = ucp_params_t {
            field_mask: u64::from(UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_NAME),
            features: u64::from(features),
            name: name.as_ptr(),
            ..Default::default()
        };
        let (major, minor) = library.interface();
        let mut raw = ptr::null_mut();
        // SAFETY: parameters and configuration live until the call returns; the masked fields are set.
        let status = unsafe { library.api.ucp_init_version(major, minor, &params, config.raw, &mut raw) };
        if status != UCS_OK {
            return Err(Refused::Context(status));
        }
        Ok(Rc::new(Context { library, raw }))
    }

    pub(crate) fn raw(&self) -> ucp_context_h {
        self.raw
    }
}

/// What UCX says of a device that it does not take, what it was told, and what helps.
fn unusable(library: &Library, method: Method, status: ucs_status_t) -> String {
    let (transports, words) = (settings::in_force("TLS", method.transports()), library.words(status));
    let build = match method {
        Method::Srd => {
            "; srd needs a build of UCX with EFA (libuct_ib_efa.so* among its modules, beside it or in UCX_MODULE_DIR)"
        }
        Method::Memory | Method::Tcp | Method::Verbs => "",
    };
    let told = settings::told();
    let (version, path) = (library.version, &library.path);
    format!(
        "UCX {version} ({path}) cannot use it with transports {transports}: {words}{build}{told}; UCX_LOG_LEVEL=info says more"
    )
}

/// Why there is no context.
pub(crate) enum Refused {
    /// A setting, in words.
    Setting(String),
    /// UCX itself.
    Context(ucs_status_t),
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: workers and registrations hold the context, so none is left.
        unsafe { self.library.api.ucp_cleanup(self.raw) };
    }
}

struct Config {
    library: &'static Library,
    raw: *mut ucp_config_t,
}

impl Config {
    fn read(library: &'static Library) -> Result<Config, String> {
        let mut raw = ptr::null_mut();
        // SAFETY: no prefix and no file: UCX reads its variables from the environment.
        let status = unsafe { library.api.ucp_config_read(ptr::null(), ptr::null(), &mut raw) };
        if status != UCS_OK {
            let (words, told) = (library.words(status), settings::told());
            return Err(format!(
                "UCX cannot read its configuration: {words}{told}; UCX_LOG_LEVEL=warn says which is wrong"
            ));
        }
        Ok(Config { library, raw })
    }

    fn modify(&self, key: &str, value: &str) -> Result<ucs_status_t, String> {
        let text = |word: &str| CString::new(word).map_err(|_| format!("{word:?} holds a zero byte"));
        let (key, value) = (text(key)?, text(value)?);
        // SAFETY: a configuration that was read and two C strings.
        Ok(unsafe { self.library.api.ucp_config_modify(self.raw, key.as_ptr(), value.as_ptr()) })
    }
}

impl Drop for Config {
    fn drop(&mut self) {
        // SAFETY: read once, released once.
        unsafe { self.library.api.ucp_config_release(self.raw) };
    }
}

/// A pool's memory, registered; it stays so until the last operation on it is over.
pub(crate) struct Mapped {
    context: Rc<Context>,
    regions: Vec<ucp_mem_h>,
    /// Keeps the memory that is registered.
    _pool: Pool,
}

impl Mapped {
    /// Registers every region that has bytes.
    pub(crate) fn register(context: &Rc<Context>, pool: &Pool) -> Result<Mapped, String> {
        let library = context.library;
        let mut mapped = Mapped { context: context.clone(), regions: Vec::new(), _pool: pool.clone() };
        for region in pool.regions().iter().filter(|region| region.bytes() > 0) {
            let params = ucp_mem_map_params_t {
                field_mask: u64::from(
                    UCP_MEM_MAP_PARAM_FIELD_ADDRESS
                        | UCP_MEM_MAP_PARAM_FIELD_LENGTH
                        | UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE,
                ),
                address: region.base().cast(),
                length: usize::try_from(region.bytes())
                    .map_err(|_| "a region is larger than the address space".to_owned())?,
                memory_type: UCS_MEMORY_TYPE_HOST,
                ..Default::default()
            };
            let mut raw = ptr::null_mut();
            // SAFETY: the range is the pool's memory, which `mapped` keeps until it is unmapped.
            let status = unsafe { library.api.ucp_mem_map(context.raw, &params, &mut raw) };
            if status != UCS_OK {
                return Err(refused(library, region.bytes(), status));
            }
            mapped.regions.push(raw);
        }
        Ok(mapped)
    }

    /// The same, and what peers need to read it: one packed key a region, empty where there is no memory.
    pub(crate) fn new(context: &Rc<Context>, pool: &Pool) -> Result<(Mapped, Vec<Vec<u8>>), String> {
        let mapped = Mapped::register(context, pool)?;
        let mut registered = mapped.regions.iter();
        let keys = pool.regions().iter().map(|region| match region.bytes() {
            0 => Ok(Vec::new()),
            _ => registered.next().map_or_else(|| Ok(Vec::new()), |raw| pack(context, *raw)),
        });
        let keys = keys.collect::<Result<_, _>>()?;
        Ok((mapped, keys))
    }

    /// UCX's handles of the regions that have bytes.
    pub(crate) fn handles(&self) -> &[ucp_mem_h] {
        &self.regions
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        for &raw in &self.regions {
            // SAFETY: mapped once in this context, unmapped once.
            let status = unsafe { self.context.library.api.ucp_mem_unmap(self.context.raw, raw) };
            if status != UCS_OK {
                tracing::warn!(status = self.context.library.words(status), "UCX did not unregister memory");
            }
        }
    }
}

fn pack(context: &Context, memory: ucp_mem_h) -> Result<Vec<u8>, String> {
    let library = context.library;
    let (mut buffer, mut bytes) = (ptr::null_mut(), 0);
    // SAFETY: a registration of this context; the buffer is UCX's and released below.
    let status = unsafe { library.api.ucp_rkey_pack(context.raw, memory, &mut buffer, &mut bytes) };
    if status != UCS_OK {
        return Err(format!("UCX gives no key for it: {}", library.words(status)));
    }
    // SAFETY: UCX filled `bytes` bytes in.
    let key = unsafe { std::slice::from_raw_parts(buffer.cast::<u8>(), bytes) }.to_vec();
    // SAFETY: packed above, released once.
    unsafe { library.api.ucp_rkey_buffer_release(buffer) };
    if key.len() > RKEY_BYTES_MAX {
        return Err(format!("UCX's key has {} bytes, at most {RKEY_BYTES_MAX} travel", key.len()));
    }
    Ok(key)
}

fn refused(library: &Library, bytes: u64, status: ucs_status_t) -> String {
    let locked = Lockable::read().explain(bytes);
    format!("UCX cannot register {bytes} bytes: {}{locked}", library.words(status))
}
