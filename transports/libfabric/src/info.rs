//! What the library says it can do: `fi_info`, made and freed by it.

use std::ffi::{CStr, CString, c_char};
use std::ptr;

use libfabric_sys::{
    FI_CONTEXT, FI_CONTEXT2, FI_EP_RDM, FI_HMEM, FI_MR_ALLOCATED, FI_MR_HMEM, FI_MR_LOCAL, FI_MR_PROV_KEY,
    FI_MR_VIRT_ADDR, FI_MSG, FI_RMA, FI_SOURCE, FI_THREAD_DOMAIN, fi_info,
};

use crate::library::Library;

/// One way to use one device, as the library offers it.
pub(crate) struct Info {
    library: &'static Library,
    raw: *mut fi_info,
}

/// What an offer says of itself, as far as it is chosen by that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Offer {
    pub(crate) provider: String,
    /// `efa` or `efa-direct` for that provider, a network for others.
    pub(crate) fabric: String,
    /// The device.
    pub(crate) domain: String,
    /// `FI_MSG` and the like.
    pub(crate) capabilities: u64,
    /// Whether it speaks IPv4, where it speaks IP at all.
    pub(crate) is_ip4: bool,
    /// Why memory cannot be registered as it wants, if it cannot.
    pub(crate) refusal: Option<String>,
}

/// How memory has to be registered and named, as the provider asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemoryMode {
    /// Buffers of our own operations have to be registered, too.
    pub(crate) local: bool,
    /// Peers name memory by its address, else by the offset from the registration's beginning.
    pub(crate) addresses: bool,
    /// The provider chooses keys.
    pub(crate) provider_keys: bool,
    /// Buffers of our own operations in a device's memory have to be registered.
    pub(crate) devices: bool,
}

impl MemoryMode {
    /// What a provider's bits mean; those that were not offered to it are refused.
    fn of(bits: u32, reaches_devices: bool) -> Result<MemoryMode, String> {
        let (_, known) = asked_for(reaches_devices);
        if bits & !known != 0 {
            return Err(format!("it wants memory registered in a way that is not supported (mr_mode {bits:#x})"));
        }
        Ok(MemoryMode {
            local: bits & FI_MR_LOCAL != 0,
            addresses: bits & FI_MR_VIRT_ADDR != 0,
            provider_keys: bits & FI_MR_PROV_KEY != 0,
            devices: bits & FI_MR_HMEM != 0,
        })
    }
}

impl Info {
    /// What a provider offers for reliable datagrams with messages and remote reads, in its own order; over the interface with address
    /// `source`, or all; with `device_memory` only what reaches the memory of devices, too (`FI_HMEM`). An empty list where it has no such device.
    pub(crate) fn query(
        library: &'static Library,
        provider: &str,
        source: Option<&str>,
        device_memory: bool,
    ) -> Result<Vec<Info>, String> {
        let (caps, mr_mode) = asked_for(device_memory);
        let text = |word: &str| CString::new(word).map_err(|_| format!("{word:?} holds a zero byte"));
        let (name, node) = (text(provider)?, source.map(text).transpose()?);
        let (Ok(getinfo), Ok(dupinfo), Ok(freeinfo)) =
            (&library.api.fi_getinfo, &library.api.fi_dupinfo, &library.api.fi_freeinfo)
        else {
            return Err("the library is incomplete".to_owned());
        };
        let mut found = ptr::null_mut();
        // SAFETY: without an argument it makes an empty one.
        let hints = unsafe { dupinfo(ptr::null()) };
        if hints.is_null() {
            return Err("libfabric has no memory".to_owned());
        }
        // SAFETY: the hints and what hangs on them were made by the library, which frees them; the one string is of malloc's. The answer is
        // a list that it made, copied and freed here.
        let list = unsafe {
            (*hints).caps = caps;
            (*hints).mode = FI_CONTEXT | FI_CONTEXT2;
            (*(*hints).ep_attr).type_ = FI_EP_RDM;
            let domain = (*hints).domain_attr;
            (*domain).threading = FI_THREAD_DOMAIN;
            (*domain).mr_mode = mr_mode.cast_signed();
            (*(*hints).fabric_attr).prov_name = libc::strdup(name.as_ptr());
            let node = node.as_ref().map_or(ptr::null(), |node| node.as_ptr());
            let flags = if node.is_null() { 0 } else { FI_SOURCE };
            let status = getinfo(library.asked(), node, ptr::null(), flags, hints, &mut found);
            freeinfo(hints);
            match status.unsigned_abs() {
                0 => {}
                // Nothing of that kind, in the words of different providers.
                libfabric_sys::FI_ENODATA | libfabric_sys::FI_ENOSYS => return Ok(Vec::new()),
                _ => return Err(format!("fi_getinfo of {provider}: {}", library.words(status.into()))),
            }
            let mut list = Vec::new();
            let mut next = found;
            while !next.is_null() {
                let raw = dupinfo(next);
                if !raw.is_null() {
                    list.push(Info { library, raw });
                }
                next = (*next).next;
            }
            freeinfo(found);
            list
        };
        Ok(list)
    }

    /// One that no provider offers.
    #[cfg(test)]
    pub(crate) fn made(
        library: &'static Library,
        provider: &str,
        fabric: &str,
        domain: &str,
        capabilities: u64,
    ) -> Option<Info> {
        let copy = |word: &str| CString::new(word).ok();
        let (provider, fabric, domain) = (copy(provider)?, copy(fabric)?, copy(domain)?);
        // SAFETY: without an argument it makes an empty one, which it frees with the strings of malloc's that hang on it.
        unsafe {
            let raw = library.api.fi_dupinfo.as_ref().ok()?(ptr::null());
            (*raw).caps = capabilities;
            (*(*raw).fabric_attr).prov_name = libc::strdup(provider.as_ptr());
            (*(*raw).fabric_attr).name = libc::strdup(fabric.as_ptr());
            (*(*raw).domain_attr).name = libc::strdup(domain.as_ptr());
            Some(Info { library, raw })
        }
    }

    /// For calls of the library, while this value lives.
    pub(crate) fn raw(&self) -> *mut fi_info {
        self.raw
    }

    /// What it says of itself.
    pub(crate) fn offer(&self) -> Offer {
        /// `FI_SOCKADDR_IN`.
        const IP4: u32 = 2;
        // SAFETY: the library fills these in for what it offers.
        let (fabric, capabilities, format) =
            unsafe { (text((*(*self.raw).fabric_attr).name), (*self.raw).caps, (*self.raw).addr_format) };
        Offer {
            provider: self.provider(),
            fabric,
            domain: self.domain(),
            capabilities,
            is_ip4: format == IP4,
            refusal: self.memory_mode().err(),
        }
    }

    pub(crate) fn provider(&self) -> String {
        // SAFETY: the library fills these in for what it offers.
        unsafe { text((*(*self.raw).fabric_attr).prov_name) }
    }

    /// The device.
    pub(crate) fn domain(&self) -> String {
        // SAFETY: as above.
        unsafe { text((*(*self.raw).domain_attr).name) }
    }

    pub(crate) fn memory_mode(&self) -> Result<MemoryMode, String> {
        // SAFETY: as above.
        let (bits, capabilities) = unsafe { ((*(*self.raw).domain_attr).mr_mode.cast_unsigned(), (*self.raw).caps) };
        MemoryMode::of(bits, capabilities & FI_HMEM != 0)
    }

    /// The bits that a key may have.
    pub(crate) fn key_mask(&self) -> u64 {
        // SAFETY: as above.
        match unsafe { (*(*self.raw).domain_attr).mr_key_size } {
            bytes @ 1..8 => (1 << (8 * bytes)) - 1,
            _ => u64::MAX,
        }
    }

    /// Operations that may be under way on one endpoint.
    pub(crate) fn transmit_size(&self) -> usize {
        // SAFETY: as above.
        unsafe { (*(*self.raw).tx_attr).size }
    }

    /// Receives that may be posted on one endpoint.
    pub(crate) fn receive_size(&self) -> usize {
        // SAFETY: as above.
        unsafe { (*(*self.raw).rx_attr).size }
    }

    /// Pieces that one read may bring together, on either side of it. Providers over TCP are trusted with several: shared memory of 1.17 says that
    /// it takes several and ends the process over some.
    pub(crate) fn pieces_max(&self) -> usize {
        if !self.provider().starts_with("tcp") {
            return 1;
        }
        // SAFETY: as above.
        let (here, there) = unsafe { ((*(*self.raw).tx_attr).iov_limit, (*(*self.raw).tx_attr).rma_iov_limit) };
        here.min(there).max(1)
    }

    /// Bytes of one message or one read.
    pub(crate) fn message_bytes_max(&self) -> usize {
        // SAFETY: as above.
        unsafe { (*(*self.raw).ep_attr).max_msg_size }
    }

    /// Nominal speed, where the provider knows the device.
    pub(crate) fn bits_per_second(&self) -> Option<u64> {
        // SAFETY: as above; each pointer is looked at before it is followed.
        let speed = unsafe {
            let nic = (*self.raw).nic.as_ref()?;
            nic.link_attr.as_ref()?.speed
        };
        (speed > 0).then_some(speed as u64)
    }
}

/// The capabilities, and the ways to register memory, that a provider is asked for.
fn asked_for(device_memory: bool) -> (u64, u32) {
    let (caps, modes) = (u64::from(FI_MSG | FI_RMA), FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY);
    if device_memory { (caps | FI_HMEM, modes | FI_MR_HMEM) } else { (caps, modes) }
}

impl Drop for Info {
    fn drop(&mut self) {
        if let Ok(freeinfo) = &self.library.api.fi_freeinfo {
            // SAFETY: made by the library, freed once.
            unsafe { freeinfo(self.raw) };
        }
    }
}

/// # Safety
/// Null, or a C string.
unsafe fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: the caller's word.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use libfabric_sys::{FI_MR_ENDPOINT, FI_MR_RAW};

    #[test]
    fn device_memory_is_asked_for_beside_the_rest_and_only_where_it_is_meant() {
        let (host, device) = (asked_for(false), asked_for(true));
        assert_eq!((host.0 & FI_HMEM, host.1 & FI_MR_HMEM), (0, 0));
        assert_eq!((device.0 & !FI_HMEM, device.1 & !FI_MR_HMEM), host);
        assert_eq!((device.0 & FI_HMEM, device.1 & FI_MR_HMEM), (1 << 47, 1 << 10));
    }

    #[test]
    fn modes_are_honoured_or_refused() {
        let efa = MemoryMode::of(0x74, false).unwrap();
        assert_eq!(efa, MemoryMode { local: true, addresses: true, provider_keys: true, devices: false });
        let tcp = MemoryMode::of(0, false).unwrap();
        assert_eq!(tcp, MemoryMode { local: false, addresses: false, provider_keys: false, devices: false });
        for bits in [FI_MR_RAW, FI_MR_ENDPOINT, 1, 2, FI_MR_HMEM] {
            assert!(MemoryMode::of(bits, false).unwrap_err().contains("mr_mode"), "{bits:#x}");
        }
        assert!(MemoryMode::of(0x74 | FI_MR_HMEM, true).unwrap().devices);
    }
}
