//! An endpoint with a completion queue, an address vector and an event queue of its own.

use std::ffi::{c_int, c_void};
use std::os::fd::RawFd;
use std::ptr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use libfabric_sys::{
    FI_AV_TABLE, FI_COMPLETION, FI_CQ_FORMAT_MSG, FI_EAGAIN, FI_EAVAIL, FI_OPT_EFA_EMULATED_READ, FI_OPT_ENDPOINT,
    FI_RECV, FI_TRANSMIT, FI_WAIT_FD, FI_WAIT_NONE, Padded, calls, fi_av_attr, fi_cq_attr, fi_cq_err_entry,
    fi_cq_msg_entry, fi_eq_attr, fi_msg_rma, fi_rma_iov, fid, fid_av, fid_cq, fid_ep, fid_eq, iovec,
};

use crate::abandoned::ABANDONED;
use crate::domain::Domain;
use crate::events;
use crate::hmem;
use crate::neighbour;
use crate::object::Object;
use crate::operations::Operations;
use crate::parting;
use crate::slab::Slab;

/// Pieces that one read brings together, at most.
pub(crate) const PIECES_MAX: usize = 8;
/// Completions that are taken at once.
const BATCH: usize = 32;
/// Bytes of an endpoint's name.
pub(crate) const NAME_BYTES_MAX: usize = 256;
/// `fi_addr_t` of nobody in particular.
const ANYBODY: u64 = u64::MAX;
/// How long reads of a connection that was broken may take to end.
const PARTING: Duration = Duration::from_secs(1);
const AGAIN: isize = -(FI_EAGAIN as isize);
const ERROR_AVAILABLE: isize = -(FI_EAVAIL as isize);

/// An endpoint that is open and enabled.
pub(crate) struct Endpoint<T> {
    domain: Rc<Domain>,
    endpoint: Object<fid_ep>,
    queue: Object<fid_cq>,
    addresses: Object<fid_av>,
    events: Object<fid_eq>,
    /// The queue's, where it has one.
    descriptor: Option<RawFd>,
    name: Vec<u8>,
    /// Its operations are reads.
    reads: bool,
    /// What buffers lie in that no operation holds.
    buffers: Option<Rc<Slab>>,
    /// Dropped last: until the endpoint is closed the library may use the contexts, and what operations hold.
    operations: Operations<T>,
}

/// An operation that is over, and how many bytes it took, or why it failed.
pub(crate) struct Done<T> {
    pub(crate) operation: T,
    pub(crate) result: Result<usize, String>,
}

/// What became of a post.
pub(crate) enum Posted<T> {
    Yes,
    /// Not now: poll, then try again.
    Later(T),
    /// Not at all.
    Never(T, String),
}

impl<T> Endpoint<T> {
    /// Opens one for at most `operations` operations at a time.
    pub(crate) fn open(domain: &Rc<Domain>, operations: u32) -> Result<Endpoint<T>, String> {
        let library = domain.library;
        ABANDONED.check()?;
        let (queue, descriptor) = open_queue(domain, operations)?;
        let mut attr = Padded::<fi_av_attr>::zeroed();
        attr.fields().type_ = FI_AV_TABLE;
        let mut addresses = Object(ptr::null_mut());
        // SAFETY: an open domain, attributes of our own, a place for the object.
        library.check("fi_av_open", unsafe { calls::fi_av_open(domain.raw(), &mut attr, &mut addresses.0) })?;
        // Without one, providers end the process where they would report an error.
        let mut attr = Padded::<fi_eq_attr>::zeroed();
        attr.fields().wait_obj = FI_WAIT_NONE;
        let mut events = Object(ptr::null_mut());
        // SAFETY: as above, with an open fabric.
        library.check("fi_eq_open", unsafe { calls::fi_eq_open(domain.fabric(), &mut attr, &mut events.0) })?;
        let mut endpoint = Object(ptr::null_mut());
        // SAFETY: as above; the information is the domain's own.
        let status = unsafe { calls::fi_endpoint(domain.raw(), domain.info.raw(), &mut endpoint.0) };
        library.check("fi_endpoint", status)?;
        let bind = |what: &str, object: *mut fid, flags: u32| {
            // SAFETY: open objects of one domain.
            library.check(what, unsafe { calls::fi_ep_bind(endpoint.0, object, flags.into()) })
        };
        bind("binding the event queue", events.common(), 0)?;
        bind("binding the completion queue", queue.common(), FI_TRANSMIT | FI_RECV)?;
        bind("binding the address vector", addresses.common(), 0)?;
        // SAFETY: an open endpoint that is not enabled yet.
        unsafe { hmem::set_options(domain, endpoint.0) }?;
        // SAFETY: everything that it needs is bound.
        library.check("fi_enable", unsafe { calls::fi_enable(endpoint.0) })?;
        let (mut name, mut bytes) = (vec![0; NAME_BYTES_MAX], NAME_BYTES_MAX);
        // SAFETY: room for as many bytes as it is told.
        let status = unsafe { calls::fi_getname(endpoint.0, name.as_mut_ptr().cast(), &mut bytes) };
        library.check("fi_getname", status)?;
        name.truncate(bytes);
        domain.watch(queue.common(), descriptor)?;
        let domain = domain.clone();
        let operations = Operations::new(operations);
        Ok(Endpoint {
            domain,
            endpoint,
            queue,
            addresses,
            events,
            descriptor,
            name,
            reads: false,
            buffers: None,
            operations,
        })
    }

    /// Keeps the slab whose buffers are given to it by number.
    pub(crate) fn keep(&mut self, buffers: &Rc<Slab>) {
        self.buffers = Some(buffers.clone());
    }

    /// Where peers find it.
    pub(crate) fn name(&self) -> &[u8] {
        &self.name
    }

    /// The descriptor of its completion queue, open as long as it; none where there is no such thing.
    pub(crate) fn descriptor(&self) -> Option<RawFd> {
        self.descriptor
    }

    pub(crate) fn under_way(&self) -> usize {
        self.operations.under_way()
    }

    /// Makes a peer's endpoint known by its name, which has to be of the same kind as ours.
    pub(crate) fn insert(&mut self, name: &[u8]) -> Result<u64, String> {
        is_like(name, &self.name)?;
        let (library, shares) = (self.domain.library.version, self.domain.shares_with_itself);
        if let Some(reason) = neighbour::refusal(&self.name, name, library, shares) {
            return Err(reason);
        }
        let mut address = ANYBODY;
        // SAFETY: an open vector; a name as long as this provider's are, and a place for the address.
        let inserted = unsafe { calls::fi_av_insert(self.addresses.0, name.as_ptr().cast(), 1, &mut address) };
        match inserted {
            1 => Ok(address),
            error @ ..=0 => Err(format!("fi_av_insert: {}", self.domain.library.words(error.into()))),
            _ => Err("libfabric does not take the peer's address".to_owned()),
        }
    }

    /// Forgets a peer's endpoint.
    pub(crate) fn remove(&mut self, mut address: u64) {
        // SAFETY: an address that this vector gave; nothing is under way to it.
        let status = unsafe { calls::fi_av_remove(self.addresses.0, &mut address, 1) };
        if status != 0 {
            tracing::debug!(error = self.domain.library.words(status.into()), "libfabric keeps a peer's address");
        }
    }

    /// Sends `bytes` bytes at `buffer`.
    ///
    /// # Safety
    /// They stay as they are until the operation is done or the endpoint dropped, and `desc` is their registration's.
    pub(crate) unsafe fn send(
        &mut self,
        to: u64,
        buffer: *const u8,
        bytes: usize,
        desc: *mut c_void,
        operation: T,
    ) -> Posted<T> {
        let endpoint = self.endpoint.0;
        // SAFETY: the caller answers for the buffer; the context is ours until the operation ends.
        self.post("fi_send", operation, |context| unsafe {
            calls::fi_send(endpoint, buffer.cast(), bytes, desc, to, context).0
        })
    }

    /// Lets a message come.
    ///
    /// # Safety
    /// `bytes` bytes at `buffer` are nobody else's until the operation is done or the endpoint dropped, and `desc` is their registration's.
    pub(crate) unsafe fn receive(
        &mut self,
        buffer: *mut u8,
        bytes: usize,
        desc: *mut c_void,
        operation: T,
    ) -> Posted<T> {
        let endpoint = self.endpoint.0;
        // SAFETY: as in `send`.
        self.post("fi_recv", operation, |context| unsafe {
            calls::fi_recv(endpoint, buffer.cast(), bytes, desc, ANYBODY, context).0
        })
    }

    /// Reads `bytes` bytes of a peer's memory.
    ///
    /// # Safety
    /// As for [`Endpoint::receive`]. What the peer's side of it is worth the library finds out.
    #[expect(clippy::too_many_arguments, reason = "libfabric's own")]
    pub(crate) unsafe fn read(
        &mut self,
        from: u64,
        address: u64,
        key: u64,
        buffer: *mut u8,
        bytes: usize,
        desc: *mut c_void,
        operation: T,
    ) -> Posted<T> {
        let endpoint = self.endpoint.0;
        self.reads = true;
        // SAFETY: as in `send`.
        self.post("fi_read", operation, |context| unsafe {
            calls::fi_read(endpoint, buffer.cast(), bytes, desc, from, address, key, context).0
        })
    }

    /// Reads several pieces of a peer's memory at once: from `there`, each into the memory beside it in `here`.
    ///
    /// # Safety
    /// As for [`Endpoint::receive`], of every piece of `here`; all lie in the memory that `desc` describes.
    pub(crate) unsafe fn read_several(
        &mut self,
        from: u64,
        there: &[fi_rma_iov],
        here: &[iovec],
        desc: *mut c_void,
        operation: T,
    ) -> Posted<T> {
        let endpoint = self.endpoint.0;
        self.reads = true;
        let mut descs = [desc; PIECES_MAX];
        if here.len() > descs.len() || here.len() != there.len() {
            return Posted::Never(operation, format!("{} pieces are not one read", here.len()));
        }
        let mut message = fi_msg_rma {
            msg_iov: here.as_ptr(),
            desc: descs.as_mut_ptr(),
            iov_count: here.len(),
            addr: from,
            rma_iov: there.as_ptr(),
            rma_iov_count: there.len(),
            ..Default::default()
        };
        // SAFETY: as in `send`; what the message points to is read during the call.
        self.post("fi_readmsg", operation, |context| unsafe {
            message.context = context;
            calls::fi_readmsg(endpoint, &message, FI_COMPLETION.into()).0
        })
    }

    fn post(&mut self, what: &str, operation: T, post: impl FnOnce(*mut c_void) -> isize) -> Posted<T> {
        let context = match self.operations.begin(operation) {
            Ok(context) => context,
            Err(operation) => return Posted::Later(operation),
        };
        let status = post(context);
        if status == 0 {
            return Posted::Yes;
        }
        // It is not under way, so nobody else ends it.
        match (self.operations.end(context), status) {
            (Some(operation), AGAIN) => Posted::Later(operation),
            (Some(operation), status) => {
                Posted::Never(operation, format!("{what}: {}", self.domain.library.words(status as i64)))
            }
            (None, _) => Posted::Yes,
        }
    }

    /// Makes progress and takes what is over, so many at most about. An error is of the queue itself.
    pub(crate) fn poll(&mut self, done: &mut Vec<Done<T>>, most: usize) -> Result<(), String> {
        let before = done.len();
        while done.len() - before < most {
            let mut entries = [fi_cq_msg_entry::default(); BATCH];
            // SAFETY: room for so many entries of the format that the queue was opened with.
            let read = unsafe { calls::fi_cq_read(self.queue.0, entries.as_mut_ptr().cast(), BATCH) }.0;
            match read {
                1.. => {
                    for entry in entries.iter().take(read.unsigned_abs()) {
                        // Contexts of remote operations are not ours; those are not looked into.
                        if let Some(operation) = self.operations.end(entry.op_context) {
                            done.push(Done { operation, result: Ok(entry.len) });
                        }
                    }
                    if read.unsigned_abs() < BATCH {
                        return Ok(());
                    }
                }
                0 | AGAIN => return Ok(()),
                ERROR_AVAILABLE => {
                    if !self.take_error(done)? {
                        return Ok(());
                    }
                }
                error => return Err(format!("fi_cq_read: {}", self.domain.library.words(error as i64))),
            }
        }
        Ok(())
    }

    /// Takes one completion in error, which ends one operation. `false` where there is none.
    fn take_error(&mut self, done: &mut Vec<Done<T>>) -> Result<bool, String> {
        let mut entry = Padded::<fi_cq_err_entry>::zeroed();
        // SAFETY: a zeroed entry with room to spare; without a buffer for details the provider keeps its own.
        let read = unsafe { calls::fi_cq_readerr(self.queue.0, &mut entry) }.0;
        match read {
            1.. => {}
            0 | AGAIN => return Ok(false),
            error => return Err(format!("fi_cq_readerr: {}", self.domain.library.words(error as i64))),
        }
        let entry = entry.fields();
        // SAFETY: an open queue, and what it said itself.
        let own = unsafe { events::words(calls::fi_cq_strerror(self.queue.0, entry.prov_errno, entry.err_data)) };
        let reason = events::describe(&self.domain.library.words(entry.err.into()), entry.prov_errno, &own);
        if let Some(operation) = self.operations.end(entry.op_context) {
            done.push(Done { operation, result: Err(reason) });
        } else {
            tracing::debug!(reason, "a completion error of no operation of ours");
        }
        Ok(true)
    }

    /// Whether EFA's provider emulates reads by messages, as it does where the device cannot read; `None` for other providers.
    pub(crate) fn emulates_reads(&self) -> Option<bool> {
        if self.domain.info.provider() != "efa" {
            return None;
        }
        let (mut emulated, mut bytes) = (0u8, size_of::<bool>());
        let (level, option) = (FI_OPT_ENDPOINT.cast_signed(), FI_OPT_EFA_EMULATED_READ);
        // SAFETY: an open endpoint, room for the one byte that C's bool has.
        let status =
            unsafe { calls::fi_getopt(self.endpoint.0, level, option, (&raw mut emulated).cast(), &mut bytes) };
        (status == 0).then_some(emulated != 0)
    }

    /// An error that the provider reports of the endpoint as a whole, if there is one.
    pub(crate) fn error(&mut self) -> Option<String> {
        // SAFETY: an open queue.
        unsafe { events::take(self.events.0, self.domain.library) }
    }
}

impl<T> Endpoint<T> {
    /// Whether it can be closed as it is, or can by now: see [`parting`].
    fn part(&mut self) -> bool {
        let is_needed = || parting::is_needed(&self.domain.info.provider(), self.domain.library.version);
        if !self.reads || self.under_way() == 0 || !is_needed() {
            return true;
        }
        let broken = self.descriptor.map_or(0, parting::hang_up);
        let until = Instant::now() + PARTING;
        let mut over = Vec::new();
        while self.under_way() > 0 {
            if self.poll(&mut over, BATCH).is_err() || Instant::now() >= until {
                break;
            }
            over.clear();
            std::thread::yield_now();
        }
        tracing::debug!(broken, under_way = self.under_way(), "reads are ended before their endpoint is closed");
        self.under_way() == 0
    }

    /// Leaves it open for good, and what it uses: nothing that is under way counts as over.
    fn abandon(&mut self) {
        let abandoned = ABANDONED.count();
        tracing::warn!(
            abandoned,
            under_way = self.under_way(),
            library = %self.domain.library.version,
            "an endpoint stays open until the process ends, and so do its blocks: closing it with reads under way would end the process; \
             use libfabric 1.18 or later"
        );
        std::mem::forget(std::mem::replace(&mut self.operations, Operations::new(0)));
        std::mem::forget((self.buffers.take(), self.domain.clone()));
        (self.endpoint.0, self.queue.0) = (ptr::null_mut(), ptr::null_mut());
        (self.addresses.0, self.events.0) = (ptr::null_mut(), ptr::null_mut());
    }
}

impl<T> Drop for Endpoint<T> {
    fn drop(&mut self) {
        let may_be_closed = self.part();
        // What is queued for it keeps the address vector and the queue busy, so in this order.
        self.domain.unwatch(self.queue.common(), self.descriptor);
        if !may_be_closed {
            return self.abandon();
        }
        let endpoint = self.endpoint.close();
        if endpoint != 0 {
            // The library may go on using contexts and memory: they stay, so nothing that is under way counts as over.
            std::mem::forget(std::mem::replace(&mut self.operations, Operations::new(0)));
            std::mem::forget(self.buffers.take());
        }
        let closed = [endpoint, self.queue.close(), self.addresses.close(), self.events.close()];
        if closed != [0; 4] {
            tracing::warn!(?closed, "libfabric did not close an endpoint");
        }
    }
}

/// A completion queue, with a descriptor where the provider offers one.
fn open_queue(domain: &Domain, operations: u32) -> Result<(Object<fid_cq>, Option<RawFd>), String> {
    let mut queue = Object(ptr::null_mut());
    for wait in [FI_WAIT_FD, FI_WAIT_NONE] {
        let mut attr = Padded::<fi_cq_attr>::zeroed();
        let fields = attr.fields();
        fields.format = FI_CQ_FORMAT_MSG;
        fields.wait_obj = wait;
        // Room for remote completions beside our own.
        fields.size = 2 * operations as usize;
        // SAFETY: an open domain, attributes of our own, a place for the object.
        let status = unsafe { calls::fi_cq_open(domain.raw(), &mut attr, &mut queue.0) };
        if status != 0 {
            queue.0 = ptr::null_mut();
            if wait == FI_WAIT_NONE {
                domain.library.check("fi_cq_open", status)?;
            }
            continue;
        }
        if wait == FI_WAIT_NONE {
            return Ok((queue, None));
        }
        let mut descriptor: c_int = -1;
        // SAFETY: a queue that was opened with a descriptor, and a place for it.
        let status = unsafe { calls::fi_getwait(queue.common(), &mut descriptor) };
        if status == 0 && descriptor >= 0 {
            return Ok((queue, Some(descriptor)));
        }
        queue.close();
    }
    Err("libfabric opens no completion queue".to_owned())
}

/// Whether a peer's name can be one of the same provider's: libfabric takes any bytes, and some providers trust them.
fn is_like(name: &[u8], own: &[u8]) -> Result<(), String> {
    let refused = |reason: &str| Err(format!("the peer's endpoint has no name of this provider's: {reason}"));
    // Names that are text may differ in length.
    if own.first_chunk::<5>() == Some(b"fi_sh") {
        let is_text = name.iter().position(|byte| *byte == 0) == name.len().checked_sub(1);
        return match name.starts_with(b"fi_shm://") && is_text && name.len() <= NAME_BYTES_MAX {
            true => Ok(()),
            false => refused("it is not fi_shm://…"),
        };
    }
    if name.len() != own.len() {
        return refused(&format!("{} bytes where ours has {}", name.len(), own.len()));
    }
    // Socket addresses, which begin with their family.
    let is_socket = own.len() == size_of::<libc::sockaddr_in>() || own.len() == size_of::<libc::sockaddr_in6>();
    if is_socket && name.first_chunk::<2>() != own.first_chunk::<2>() {
        return refused("another family of addresses");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device;
    use crate::library::Library;

    /// It is counted, and what it uses stays.
    #[test]
    fn an_endpoint_that_cannot_be_closed_stays_open() {
        let library = match Library::find() {
            Ok(library) => library,
            Err(reason) => return kvferry_transport::conformance::absent("libfabric", &reason),
        };
        let domain = Domain::open(library, device::find(library, "lo").unwrap(), false).unwrap();
        let mut endpoint = Endpoint::<()>::open(&domain, 8).unwrap();
        let (before, users) = (ABANDONED.so_far(), Rc::strong_count(&domain));
        endpoint.abandon();
        drop(endpoint);
        assert_eq!(ABANDONED.so_far(), before + 1);
        assert_eq!(Rc::strong_count(&domain), users, "what it held of the domain is held for ever");
        assert!(Endpoint::<()>::open(&domain, 8).is_ok());
    }

    #[test]
    fn names_of_other_providers_are_refused() {
        let own = [2, 0, 0x1f, 0x90, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
        let mut other = own;
        other[2] = 1;
        assert_eq!(is_like(&other, &own), Ok(()));
        other[0] = 10;
        assert!(is_like(&other, &own).unwrap_err().contains("family"));
        assert!(is_like(&own[..15], &own).unwrap_err().contains("15 bytes"));
        let shm = b"fi_shm://12:0:1\0";
        assert_eq!(is_like(b"fi_shm://4242:1:10\0", shm), Ok(()));
        for bad in [&b"fi_shm://4242"[..], b"fi_shm://1\0:2\0", b"/etc/passwd\0", b""] {
            assert!(is_like(bad, shm).is_err());
        }
    }
}
