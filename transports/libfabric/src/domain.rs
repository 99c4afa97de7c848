//! An opened device: its domain, and what is registered in it.

use std::cell::{Cell, RefCell};
use std::ffi::{c_int, c_void};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr;
use std::rc::Rc;
use std::sync::Arc;

use kvferry_transport::Dmabuf;
use kvferry_transport::codec::random;
use libfabric_sys::{
    FI_EAGAIN, FI_HMEM_CUDA, FI_MR_DMABUF, Padded, calls, fi_mr_attr, fi_mr_dmabuf, fid, fid_domain, fid_fabric,
    fid_mr, iovec,
};
use rustix::event::epoll;

use crate::hmem::Reach;
use crate::info::{Info, MemoryMode};
use crate::library::Library;
use crate::staging::Arena;

/// An open fabric and domain; closed when the last object in it is gone. It stays on its thread.
pub(crate) struct Domain {
    pub(crate) library: &'static Library,
    pub(crate) info: Info,
    pub(crate) mode: MemoryMode,
    fabric: *mut fid_fabric,
    domain: *mut fid_domain,
    /// Watches the descriptors of every completion queue.
    pub(crate) poller: Arc<OwnedFd>,
    /// Completion queues with a descriptor.
    queues: RefCell<Vec<*mut fid>>,
    /// How many there are without one.
    silent: Cell<usize>,
    /// Endpoints of one process may meet in shared memory: for tests, see [`crate::neighbour`].
    pub(crate) shares_with_itself: bool,
    /// How it reaches pools in the memory of GPUs, or why it takes none.
    pub(crate) reach: Result<Reach, String>,
    /// Pages for packed chunks, unmapped when the domain is closed.
    pub(crate) arena: Arena,
}

/// Whether the thread may sleep on the poller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sleep {
    Yes,
    /// Something has come.
    NotNow,
    /// Nothing would wake it.
    Never,
}

impl Domain {
    /// Opens a device for pools in host memory, with shared memory inside this process or without.
    #[cfg(test)]
    pub(crate) fn open(library: &'static Library, info: Info, shares_with_itself: bool) -> Result<Rc<Domain>, String> {
        Domain::reaching(library, info, shares_with_itself, Err("not asked for".to_owned()))
    }

    /// Opens a device that reaches GPUs so, or does not for that reason.
    pub(crate) fn reaching(
        library: &'static Library,
        info: Info,
        shares_with_itself: bool,
        reach: Result<Reach, String>,
    ) -> Result<Rc<Domain>, String> {
        let mode = info.memory_mode()?;
        let poller = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|error| format!("creating an epoll descriptor: {}", std::io::Error::from(error)))?;
        let Ok(open) = &library.api.fi_fabric else { return Err("the library is incomplete".to_owned()) };
        let mut fabric = ptr::null_mut();
        // SAFETY: attributes that the library made; a place for the object.
        let status = unsafe { open((*info.raw()).fabric_attr, &mut fabric, ptr::null_mut()) };
        library.check("fi_fabric", status)?;
        let mut domain = ptr::null_mut();
        // SAFETY: an open fabric and its own information.
        let status = unsafe { calls::fi_domain(fabric, info.raw(), &mut domain) };
        if status != 0 {
            // SAFETY: opened above, closed once.
            unsafe { calls::fi_close(&raw mut (*fabric).fid) };
            library.check("fi_domain", status)?;
        }
        Ok(Rc::new(Domain {
            library,
            info,
            mode,
            fabric,
            domain,
            poller: Arc::new(poller),
            queues: RefCell::new(Vec::new()),
            silent: Cell::new(0),
            shares_with_itself,
            reach,
            arena: Arena::default(),
        }))
    }

    pub(crate) fn fabric(&self) -> *mut fid_fabric {
        self.fabric
    }

    pub(crate) fn raw(&self) -> *mut fid_domain {
        self.domain
    }

    /// Counts a queue in; with a descriptor it is watched.
    pub(crate) fn watch(&self, queue: *mut fid, descriptor: Option<RawFd>) -> Result<(), String> {
        let Some(descriptor) = descriptor else {
            self.silent.set(self.silent.get() + 1);
            return Ok(());
        };
        // SAFETY: the queue's descriptor, open as long as the queue; it is only lent for this call.
        let borrowed = unsafe { BorrowedFd::borrow_raw(descriptor) };
        let data = epoll::EventData::new_u64(0);
        epoll::add(&self.poller, borrowed, data, epoll::EventFlags::IN)
            .map_err(|error| format!("watching a completion queue: {}", std::io::Error::from(error)))?;
        self.queues.borrow_mut().push(queue);
        Ok(())
    }

    /// Counts a queue out, before it is closed.
    pub(crate) fn unwatch(&self, queue: *mut fid, descriptor: Option<RawFd>) {
        let Some(descriptor) = descriptor else {
            self.silent.set(self.silent.get().saturating_sub(1));
            return;
        };
        self.queues.borrow_mut().retain(|watched| *watched != queue);
        // SAFETY: as in `watch`; the queue is still open.
        let borrowed = unsafe { BorrowedFd::borrow_raw(descriptor) };
        let _not_watched = epoll::delete(&self.poller, borrowed);
    }

    /// Whether the poller tells of everything from now on.
    pub(crate) fn sleep(&self) -> Sleep {
        if self.silent.get() > 0 {
            return Sleep::Never;
        }
        let mut queues = self.queues.borrow_mut();
        let count = i32::try_from(queues.len()).unwrap_or(i32::MAX);
        // SAFETY: open queues of this fabric, as many as the count says.
        match unsafe { calls::fi_trywait(self.fabric, queues.as_mut_ptr(), count) } {
            0 => Sleep::Yes,
            status if status == -FI_EAGAIN.cast_signed() => Sleep::NotNow,
            // It cannot tell.
            _ => Sleep::Never,
        }
    }

    /// Watches another descriptor.
    pub(crate) fn also_watch(&self, descriptor: &impl AsFd) -> Result<(), String> {
        epoll::add(&self.poller, descriptor.as_fd(), epoll::EventData::new_u64(0), epoll::EventFlags::IN)
            .map_err(|error| format!("watching a timer: {}", std::io::Error::from(error)))
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: endpoints, queues and registrations hold the domain, so none is left; each is closed once, the domain first.
        let (domain, fabric) =
            unsafe { (calls::fi_close(&raw mut (*self.domain).fid), calls::fi_close(&raw mut (*self.fabric).fid)) };
        if domain != 0 || fabric != 0 {
            tracing::warn!(domain, fabric, "libfabric did not close a device");
        }
    }
}

/// `fi_mr_dmabuf`, whose fields the bindings leave out.
#[repr(C)]
pub(crate) struct DmabufRange {
    pub(crate) fd: c_int,
    /// Of the first byte that is registered.
    pub(crate) offset: u64,
    pub(crate) bytes: usize,
    /// The descriptor's first byte.
    pub(crate) base: *const c_void,
}

const _: () = assert!(size_of::<DmabufRange>() == size_of::<fi_mr_dmabuf>());

/// Memory registered in a domain; it stays so, and is kept, until the last operation on it is over.
pub(crate) struct Registered<K> {
    domain: Rc<Domain>,
    raw: *mut fid_mr,
    key: u64,
    /// Our own operations on it have to name it.
    is_named: bool,
    /// What stands for it, and what keeps it; dropped after it is no longer registered.
    _dmabuf: Option<Dmabuf>,
    _keep: K,
}

impl<K> Registered<K> {
    /// Registers `bytes` bytes at `base`, at least one, that `keep` keeps alive.
    pub(crate) fn new(
        domain: &Rc<Domain>,
        base: *mut u8,
        bytes: usize,
        access: u32,
        keep: K,
    ) -> Result<Registered<K>, String> {
        let key = draw(domain)?;
        let range = iovec { iov_base: base.cast(), iov_len: bytes };
        let mut attr = Padded::<fi_mr_attr>::zeroed();
        let fields = attr.fields();
        fields.__bindgen_anon_1.mr_iov = &range;
        fields.iov_count = 1;
        let is_named = domain.mode.local;
        // SAFETY: the range lives during the call, the memory as long as `keep`.
        let registered = unsafe { Registered::with(domain, &mut attr, (0, access, key), is_named, keep) };
        registered.map_err(|status| refused(domain.library, bytes, status))
    }

    /// Registers `bytes` bytes at `address` in the memory of a CUDA device, at least one, that `keep` keeps alive; through the descriptor
    /// that stands for them, or by their address.
    pub(crate) fn on_device(
        domain: &Rc<Domain>,
        (address, bytes): (u64, usize),
        (device, dmabuf): (i32, Option<Dmabuf>),
        access: u32,
        keep: K,
    ) -> Result<Registered<K>, String> {
        let key = draw(domain)?;
        let range = iovec { iov_base: ptr::without_provenance_mut(address as usize), iov_len: bytes };
        let mut attr = Padded::<fi_mr_attr>::zeroed();
        let fields = attr.fields();
        let whole = dmabuf.as_ref().map(|dmabuf| DmabufRange {
            fd: dmabuf.fd.as_raw_fd(),
            offset: dmabuf.offset,
            bytes,
            base: ptr::without_provenance(dmabuf.base as usize),
        });
        let flags = match &whole {
            Some(whole) => {
                fields.__bindgen_anon_1.dmabuf = ptr::from_ref(whole).cast();
                FI_MR_DMABUF
            }
            None => {
                fields.__bindgen_anon_1.mr_iov = &range;
                0
            }
        };
        fields.iov_count = 1;
        fields.iface = FI_HMEM_CUDA;
        fields.device.cuda = device;
        let is_named = domain.mode.local || domain.mode.devices;
        // SAFETY: the ranges and the descriptor live during the call, the memory as long as `keep`.
        let registered = unsafe { Registered::with(domain, &mut attr, (flags, access, key), is_named, keep) };
        let registered = registered.map(|mut registered| {
            registered._dmabuf = dmabuf;
            registered
        });
        registered.map_err(|status| domain.library.words(status.into()))
    }

    /// # Safety
    /// What the attributes point to lives during the call, the memory that they name as long as `keep`.
    unsafe fn with(
        domain: &Rc<Domain>,
        attr: &mut Padded<fi_mr_attr>,
        (flags, access, key): (u64, u32, u64),
        is_named: bool,
        keep: K,
    ) -> Result<Registered<K>, i32> {
        let fields = attr.fields();
        fields.access = access.into();
        fields.requested_key = key;
        let mut raw = ptr::null_mut();
        // SAFETY: an open domain; the caller answers for the attributes.
        let status = unsafe { calls::fi_mr_regattr(domain.domain, attr, flags, &mut raw) };
        if status != 0 {
            return Err(status);
        }
        // SAFETY: a registration that stands; its key is a field.
        let key = unsafe { (*raw).key };
        Ok(Registered { domain: domain.clone(), raw, key, is_named, _keep: keep, _dmabuf: None })
    }

    /// By which peers name it.
    pub(crate) fn key(&self) -> u64 {
        self.key
    }

    /// What our own operations on it pass; null where the provider wants none.
    pub(crate) fn desc(&self) -> *mut c_void {
        // SAFETY: a registration that stands.
        if self.is_named { unsafe { (*self.raw).mem_desc } } else { ptr::null_mut() }
    }
}

impl<K> Drop for Registered<K> {
    fn drop(&mut self) {
        // SAFETY: registered once, closed once; operations on it hold it.
        let status = unsafe { calls::fi_close(&raw mut (*self.raw).fid) };
        if status != 0 {
            tracing::warn!(error = self.domain.library.words(status.into()), "libfabric did not unregister memory");
        }
    }
}

/// A key that nobody can have kept from an earlier registration.
fn draw(domain: &Domain) -> Result<u64, String> {
    let drawn = random::<8>().map_err(|error| format!("no random key could be drawn: {error}"))?;
    Ok(u64::from_le_bytes(drawn) & domain.info.key_mask())
}

fn refused(library: &Library, bytes: usize, status: i32) -> String {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    let locked = limit.map_or_else(
        || " (locked memory is unlimited here)".to_owned(),
        |limit| {
            format!(
                "; only {} KiB of memory may be locked here: raise it (`ulimit -l unlimited`, or the capability IPC_LOCK for a container)",
                limit / 1024
            )
        },
    );
    format!("libfabric cannot register {bytes} bytes: {}{locked}", library.words(status.into()))
}
