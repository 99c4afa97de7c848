//! One UCX endpoint and what is done through it.

use std::ffi::CStr;
use std::ptr;
use std::rc::Rc;

use ucx_sys::{
    UCP_AM_SEND_FLAG_EAGER, UCP_AM_SEND_FLAG_RNDV, UCP_EP_ATTR_FIELD_TRANSPORTS, UCP_EP_CLOSE_FLAG_FORCE, UCS_OK,
    ucp_ep_attr_t, ucp_ep_h, ucp_mem_h, ucp_rkey_h, ucp_transport_entry_t, ucp_transports_t,
};
use ucx_text::Lane;

use crate::context::Mapped;
use crate::inbox::{Mark, on_error};
use crate::raw::PackedKey;
use crate::request::Begun;
use crate::staging::Buffer;
use crate::wire::{HEADER_BYTES, Header};
use crate::worker::{MESSAGE_ID, Worker};

/// Lanes of an endpoint that are asked for; UCX names no more than there is room for, without a word.
const LANES_MAX: usize = 128;

/// What an operation in flight owns.
pub(crate) enum Operation {
    /// A message, until UCX has taken it.
    Sent { link: u64, buffer: Buffer, chunk: bool },
    /// A chunk that UCX brings by rendezvous, and where it was told to put it.
    Received { link: u64, header: Header, buffer: Buffer },
    /// Bytes on their way into a pool, and what keeps both ends of the copy.
    Got { fetch: u64, _memory: Rc<GetMemory> },
    /// A chunk that is read out of a peer's staging, which buffer of that it is in, and the key that it is read with.
    Collected { link: u64, header: Header, place: u32, buffer: Buffer, _keys: Rc<RemoteKeys> },
    /// Bytes on their way into a buffer that nobody looks at, and the key that they are read with.
    Tried { link: u64, buffer: Buffer, _keys: Rc<RemoteKeys> },
    /// An endpoint that is being closed, and what its error handler may still be given.
    Closed { link: u64, _mark: Box<Mark> },
    /// The worker's flush after a link was closed.
    Flushed { link: u64 },
    /// The flush of an endpoint before it is closed.
    Drained { link: u64 },
}

/// What a get touches: local registered memory and the remote keys.
pub(crate) struct GetMemory {
    pub(crate) keys: Rc<RemoteKeys>,
    pub(crate) _local: Rc<Mapped>,
}

/// A connected endpoint.
pub(crate) struct Endpoint {
    worker: Rc<Worker>,
    raw: ucp_ep_h,
    mark: Box<Mark>,
}

impl Endpoint {
    /// Starts connecting to a worker. The address is UCX's own, from a peer that was authenticated.
    pub(crate) fn new(worker: &Rc<Worker>, link: u64, address: &[u8]) -> Result<Endpoint, String> {
        let mark = Box::new(Mark { inbox: worker.inbox.clone(), link });
        // SAFETY: the address came, checked, from a worker of UCX; the mark lives until the endpoint is closed.
        let raw = unsafe { worker.connect(address, Some(on_error), ptr::from_ref(mark.as_ref()).cast())? };
        Ok(Endpoint { worker: worker.clone(), raw, mark })
    }

    /// Sends one message. Never by rendezvous: its bytes go with it.
    pub(crate) fn send(&self, link: u64, buffer: Buffer, chunk: bool) -> Begun<Operation> {
        let (at, bytes, memory) = (buffer.as_ptr(), buffer.len(), buffer.handle());
        let operation = Operation::Sent { link, buffer, chunk };
        // SAFETY: the operation owns the buffer, whose bytes do not move; a living endpoint.
        self.worker.operations.start_with(operation, UCP_AM_SEND_FLAG_EAGER, memory, |params| unsafe {
            self.worker.library().api.ucp_am_send_nbx(self.raw, MESSAGE_ID, ptr::null(), 0, at.cast(), bytes, params)
        })
    }

    /// Sends a chunk by rendezvous, its header ahead of its bytes: the peer fetches them when it likes, or lets them be.
    pub(crate) fn offer(&self, link: u64, buffer: Buffer) -> Begun<Operation> {
        let memory = buffer.handle();
        let (header, bytes) = buffer.split_at(HEADER_BYTES.min(buffer.len()));
        let (header, header_bytes, at, bytes) = (header.as_ptr(), header.len(), bytes.as_ptr(), bytes.len());
        let operation = Operation::Sent { link, buffer, chunk: true };
        // SAFETY: the operation owns the buffer, header and all, whose bytes do not move; a living endpoint.
        self.worker.operations.start_with(operation, UCP_AM_SEND_FLAG_RNDV, memory, |params| unsafe {
            let api = &self.worker.library().api;
            api.ucp_am_send_nbx(self.raw, MESSAGE_ID, header.cast(), header_bytes, at.cast(), bytes, params)
        })
    }

    /// Reads remote memory into a pool.
    ///
    /// # Safety
    /// `to` must be `bytes` bytes of the pool that `memory` keeps.
    pub(crate) unsafe fn get(
        &self,
        fetch: u64,
        memory: &Rc<GetMemory>,
        region: usize,
        from: u64,
        to: *mut u8,
        bytes: usize,
    ) -> Begun<Operation> {
        let operation = Operation::Got { fetch, _memory: memory.clone() };
        // SAFETY: the caller vouches for the local range; the operation keeps it and the key until it is over.
        unsafe { self.read(operation, &memory.keys, region, from, to, bytes, None) }
    }

    /// Reads remote memory; `memory` is what UCX knows the local bytes by, where that is at hand.
    ///
    /// # Safety
    /// `to` must be `bytes` writable bytes that `operation` keeps, as it must keep the keys.
    #[expect(clippy::too_many_arguments, reason = "what UCX's own call takes")]
    pub(crate) unsafe fn read(
        &self,
        operation: Operation,
        keys: &RemoteKeys,
        region: usize,
        from: u64,
        to: *mut u8,
        bytes: usize,
        memory: Option<ucp_mem_h>,
    ) -> Begun<Operation> {
        let Some(Some(rkey)) = keys.regions.get(region).copied() else {
            return Begun::Over(operation, ucx_sys::UCS_ERR_INVALID_PARAM);
        };
        // SAFETY: as the caller promises.
        self.worker.operations.start_with(operation, 0, memory, |params| unsafe {
            self.worker.library().api.ucp_get_nbx(self.raw, to.cast(), bytes, from, rkey, params)
        })
    }

    /// The lanes, each once for each use; none before UCX 1.14, which cannot be asked.
    pub(crate) fn lanes(&self) -> Vec<Lane> {
        let Ok(query) = &self.worker.library().api.ucp_ep_query else { return Vec::new() };
        let mut entries = [ucp_transport_entry_t::default(); LANES_MAX];
        let mut attributes = ucp_ep_attr_t {
            field_mask: u64::from(UCP_EP_ATTR_FIELD_TRANSPORTS),
            transports: ucp_transports_t {
                entries: entries.as_mut_ptr(),
                num_entries: LANES_MAX as u32,
                entry_size: size_of::<ucp_transport_entry_t>(),
            },
            ..Default::default()
        };
        // SAFETY: a living endpoint; the library writes at most as many entries as it is told, each at most as long as it is told.
        let status = unsafe { query(self.raw, &mut attributes) };
        if status != UCS_OK {
            return Vec::new();
        }
        let filled = entries.iter().take(attributes.transports.num_entries as usize);
        let named = filled.filter(|entry| !entry.transport_name.is_null() && !entry.device_name.is_null());
        // SAFETY: C strings of the library, which live as long as the endpoint.
        let words = |name: *const std::ffi::c_char| unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
        named.map(|entry| Lane { transport: words(entry.transport_name), device: words(entry.device_name) }).collect()
    }

    /// What UCX says of the lanes, in its own words.
    pub(crate) fn description(&self) -> String {
        let (mut text, mut bytes) = (ptr::null_mut(), 0);
        // SAFETY: open_memstream fills both in when the stream is closed.
        let stream = unsafe { libc::open_memstream(&mut text, &mut bytes) };
        if stream.is_null() {
            return String::new();
        }
        // SAFETY: a living endpoint and an open stream, which is closed next.
        unsafe { self.worker.library().api.ucp_ep_print_info(self.raw, stream) };
        // SAFETY: opened above, closed once; `text` is then a C string that has to be freed.
        let closed = unsafe { libc::fclose(stream) } == 0;
        let description = if closed && !text.is_null() {
            // SAFETY: the stream wrote a C string.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
        } else {
            String::new()
        };
        // SAFETY: allocated by the stream, freed once.
        unsafe { libc::free(text.cast()) };
        description
    }

    /// Starts a flush of what goes out over it: reported as [`Operation::Drained`].
    pub(crate) fn flush(&self, link: u64) -> Begun<Operation> {
        // SAFETY: a living endpoint, which is closed by force at any time after; the parameters live during the call.
        self.worker.operations.start(Operation::Drained { link }, 0, |params| unsafe {
            self.worker.library().api.ucp_ep_flush_nbx(self.raw, params)
        })
    }

    /// Closes it at once, whatever is in flight; reported as [`Operation::Closed`].
    pub(crate) fn close(self, link: u64) -> Begun<Operation> {
        let Endpoint { worker, raw, mark } = self;
        let operation = Operation::Closed { link, _mark: mark };
        // SAFETY: a living endpoint, which nobody can name any more.
        worker.operations.start(operation, UCP_EP_CLOSE_FLAG_FORCE, |params| unsafe {
            worker.library().api.ucp_ep_close_nbx(raw, params)
        })
    }
}

/// The unpacked keys of a peer's pool, for one endpoint.
pub(crate) struct RemoteKeys {
    worker: Rc<Worker>,
    /// One a region of the pool; none where there is no memory.
    regions: Vec<Option<ucp_rkey_h>>,
}

impl RemoteKeys {
    /// Unpacks the keys of a peer. One whose lengths do not fit it never reaches UCX, which would follow them.
    pub(crate) fn unpack<'a>(
        endpoint: &Endpoint,
        packed: impl Iterator<Item = &'a [u8]>,
    ) -> Result<RemoteKeys, String> {
        let library = endpoint.worker.library();
        let mut keys = RemoteKeys { worker: endpoint.worker.clone(), regions: Vec::new() };
        for bytes in packed {
            if bytes.is_empty() {
                keys.regions.push(None);
                continue;
            }
            let key = PackedKey::check(bytes)?;
            let mut raw = ptr::null_mut();
            // SAFETY: a living endpoint; every length in the key stays inside it, and end marks follow.
            let status =
                unsafe { library.api.ucp_ep_rkey_unpack(endpoint.raw, key.padded().as_ptr().cast(), &mut raw) };
            if status != UCS_OK {
                return Err(format!("UCX does not take the peer's key: {}", library.words(status)));
            }
            keys.regions.push(Some(raw));
        }
        Ok(keys)
    }
}

impl Drop for RemoteKeys {
    fn drop(&mut self) {
        for raw in self.regions.iter().flatten() {
            // SAFETY: unpacked once, destroyed once; operations that use it hold this value.
            unsafe { self.worker.library().api.ucp_rkey_destroy(*raw) };
        }
    }
}
