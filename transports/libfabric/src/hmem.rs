//! Pools in the memory of GPUs (`FI_HMEM`): how a provider reaches them, what its endpoints are told for that, and why it is not asked.
//!
//! That a provider offers `FI_HMEM` says little: EFA's does so from 1.18 on wherever there is CUDA, and copies through its driver where the NIC does
//! not reach the GPU (`prov/efa/src/efa_user_info.c`). So endpoints demand that the device does it by itself (`fi_endpoint(3)`:
//! `FI_OPT_FI_HMEM_P2P`, `FI_OPT_CUDA_API_PERMITTED`), and what a provider refuses then is refused here in its words.

use std::ffi::{c_int, c_void};
use std::ptr;
use std::rc::Rc;

use kvferry_transport::Writer;
use libfabric_sys::{
    FI_OPT_CUDA_API_PERMITTED, FI_OPT_ENDPOINT, FI_OPT_FI_HMEM_P2P, FI_OPT_SHARED_MEMORY_PERMITTED, calls, fid_ep,
    version,
};

use crate::device;
use crate::domain::Domain;
use crate::endpoint::Endpoint;
use crate::library::{Library, Version};

/// `FI_HMEM_P2P_REQUIRED` of `fi_endpoint.h`.
const P2P_REQUIRED: c_int = 1;
/// Where `FI_OPT_CUDA_API_PERMITTED` begins.
const CUDA_OPTION: Version = Version(version(1, 18));
/// Where `FI_MR_DMABUF` begins.
const DMABUF: Version = Version(version(1, 20));
/// Where `FI_OPT_SHARED_MEMORY_PERMITTED` begins.
const SHARING_OPTION: Version = Version(version(1, 21));
/// Why a device that was not told takes host memory only.
const NOT_ASKED: &str = "the device was opened for pools in host memory; open it with Options::device_memory (`cluster --gpus`, `bench --from-gpu` and \
                         `--to-gpu` do)";

/// How a provider reads and writes the memory of a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// The NIC does, or it fails.
    Direct,
    /// The provider copies by CUDA's driver on the thread that polls it, each side its own memory: libfabric's shared memory. Its other way, CUDA IPC,
    /// would have the source's process write the destination's pool; it takes that only for registrations that say `FI_HMEM_DEVICE_ONLY`, which ours
    /// do not (`smr_select_proto` in `prov/shm/src/smr_ep.c`, 1.18 to 2.6).
    Copied,
}

impl Reach {
    fn of(provider: &str, library: Version) -> Result<Reach, String> {
        match provider {
            // Only the option tells whether it was built with CUDA, and has a GPU.
            "shm" if library < CUDA_OPTION => Err(format!(
                "libfabric's shared memory copies between GPUs from {CUDA_OPTION} on, and this is {library}"
            )),
            "shm" => Ok(Reach::Copied),
            // By CUDA IPC, as `prov/efa/src/rdm/efa_rdm_mr.c` registers memory of GPUs with it.
            "efa" if library < SHARING_OPTION => Err(format!(
                "EFA's provider has processes of one host write each other's GPU memory, which can be turned off from {SHARING_OPTION} on, and this is \
                 {library}"
            )),
            _ => Ok(Reach::Direct),
        }
    }

    /// Who has written a destination once its reads are over.
    pub(crate) fn writer(self) -> Writer {
        match self {
            Reach::Direct => Writer::Nic,
            Reach::Copied => Writer::Driver,
        }
    }

    /// Whether memory is registered by the descriptor that stands for it, where there is one.
    pub(crate) fn takes_dmabuf(self, library: &Library) -> bool {
        self == Reach::Direct && library.version >= DMABUF
    }
}

/// Opens a device, for pools in the memory of GPUs, too, if `device_memory` says so and the provider can; else it remembers why not.
pub(crate) fn open(
    library: &'static Library,
    name: &str,
    device_memory: bool,
    within_process: bool,
) -> Result<Rc<Domain>, String> {
    let why = if device_memory {
        match reaching(library, name, within_process) {
            Ok(domain) => return Ok(domain),
            Err(reason) => {
                tracing::info!(device = name, reason, "opened for pools in host memory only");
                reason
            }
        }
    } else {
        NOT_ASKED.to_owned()
    };
    Domain::reaching(library, device::find(library, name)?, within_process, Err(why))
}

fn reaching(library: &'static Library, name: &str, within_process: bool) -> Result<Rc<Domain>, String> {
    let info = device::find_for(library, name, true)?;
    let reach = Reach::of(&info.provider(), library.version)?;
    let domain = Domain::reaching(library, info, within_process, Ok(reach))?;
    // What endpoints are told is refused here, while there is still another way.
    drop(Endpoint::<()>::open(&domain, 1)?);
    Ok(domain)
}

/// What an endpoint is told before it is enabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wish {
    option: u32,
    value: Value,
    /// What it means that the provider refuses.
    refused: &'static str,
    /// Without it nothing of what was promised holds.
    is_needed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Value {
    Number(c_int),
    /// C's bool.
    Flag(bool),
}

/// What endpoints are told of the memory of GPUs.
fn wishes(provider: &str, library: Version, reach: Option<Reach>) -> Vec<Wish> {
    let mut wishes = Vec::new();
    let mut wish = |option, value, refused, is_needed| wishes.push(Wish { option, value, refused, is_needed });
    match reach {
        Some(Reach::Direct) => {
            let refused = "the device does not reach GPU memory by itself (FI_OPT_FI_HMEM_P2P)";
            wish(FI_OPT_FI_HMEM_P2P, Value::Number(P2P_REQUIRED), refused, true);
            if library >= CUDA_OPTION {
                let refused = "the provider counts on calls to CUDA (FI_OPT_CUDA_API_PERMITTED)";
                wish(FI_OPT_CUDA_API_PERMITTED, Value::Flag(false), refused, true);
            }
        }
        Some(Reach::Copied) => {
            let refused = "libfabric was built without CUDA, or there is no GPU (FI_OPT_CUDA_API_PERMITTED)";
            wish(FI_OPT_CUDA_API_PERMITTED, Value::Flag(true), refused, true);
        }
        None => {}
    }
    // On both sides alike, whatever pools they have: an endpoint that shares memory does not meet one of its host that does not.
    if provider == "efa" && library >= SHARING_OPTION {
        let refused = "the provider's own shared memory cannot be turned off (FI_OPT_SHARED_MEMORY_PERMITTED)";
        wish(FI_OPT_SHARED_MEMORY_PERMITTED, Value::Flag(false), refused, reach.is_some());
    }
    wishes
}

/// Tells an endpoint what it may do with the memory of GPUs.
///
/// # Safety
/// It is open, and not enabled yet.
pub(crate) unsafe fn set_options(domain: &Domain, endpoint: *mut fid_ep) -> Result<(), String> {
    let reach = domain.reach.as_ref().ok().copied();
    for Wish { option, value, refused, is_needed } in wishes(&domain.info.provider(), domain.library.version, reach) {
        let (at, bytes): (*const c_void, usize) = match &value {
            Value::Number(number) => (ptr::from_ref(number).cast(), size_of::<c_int>()),
            Value::Flag(flag) => (ptr::from_ref(flag).cast(), size_of::<bool>()),
        };
        // SAFETY: the caller's endpoint, and as many bytes as it says.
        let status =
            unsafe { calls::fi_setopt(endpoint, FI_OPT_ENDPOINT.cast_signed(), option.cast_signed(), at, bytes) };
        match domain.library.check(refused, status) {
            Err(reason) if is_needed => return Err(reason),
            Err(reason) => tracing::debug!(reason, "an endpoint goes on without an option"),
            Ok(()) => {}
        }
    }
    Ok(())
}

/// Why a pool on `device` is not taken, and what takes it.
pub(crate) fn refusal(domain: &Domain, device: &str, why: &str) -> String {
    let (info, version) = (&domain.info, domain.library.version);
    let (provider, name) = (info.provider(), info.domain());
    format!(
        "its memory is on {device}, which libfabric {version} does not reach by {provider}/{name} (FI_HMEM): {why}; use the cuda transport, or tcp or \
         ucx, which stage it through host memory"
    )
}

#[cfg(test)]
mod tests;
