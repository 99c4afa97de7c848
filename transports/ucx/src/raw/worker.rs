//! A worker that other programs' workers may reach.

use std::ops::Deref;
use std::os::fd::BorrowedFd;
use std::rc::Rc;

use kvferry_transport::Pool;
use ucx_sys::{
    UCP_FEATURE_AM, UCP_FEATURE_AMO32, UCP_FEATURE_AMO64, UCP_FEATURE_RMA, UCP_FEATURE_WAKEUP, UCS_OK, ucp_mem_h,
    ucs_status_t,
};

use super::batch::Copies;
use super::inbox::{Arrival, Inbox, on_message};
use super::peer::{Operation, RawKey, RawRange};
use crate::context::{Context, Mapped, Refused};
use crate::handle::{Armed, Handle};
use crate::library::{Library, Version};
use crate::request::{Begun, Operations};

/// How a worker is opened.
#[derive(Clone, Debug)]
pub struct RawSettings {
    /// Begins UCX's log lines.
    pub name: String,
    /// UCX's settings without `UCX_`; a variable of the environment counts more, and a setting that this build of UCX lacks is left out.
    pub settings: Vec<(String, String)>,
    /// Those of them that are left out where UCX refuses their value: what only some devices have.
    pub optional: Vec<&'static str>,
    /// The oldest UCX that the peers can be spoken to with.
    pub oldest: (u32, u32, u32),
    /// The active message that peers send.
    pub message: u32,
    /// The longest message that is taken, in bytes.
    pub message_bytes_max: usize,
}

/// A worker of UCX's.
pub struct RawWorker {
    pub(super) inner: Rc<Inner>,
}

pub(super) struct Inner {
    // Destroyed first: callbacks may run inside, which need the rest.
    handle: Handle,
    pub(super) inbox: Rc<Inbox>,
    pub(super) operations: Operations<Operation>,
    pub(super) copies: Rc<Copies<(Rc<RawMemory>, Rc<RawKey>)>>,
    pub(super) message: u32,
}

impl Deref for Inner {
    type Target = Handle;

    fn deref(&self) -> &Handle {
        &self.handle
    }
}

/// What happened.
#[derive(Debug)]
pub enum RawEvent {
    /// A peer sent a message; who it was is for the message to say.
    Message(Vec<u8>),
    /// An operation is over. Of reads: the bytes are here. Of writes or a message: their memory may be used again. Of a flush: everything that was
    /// started before at that peer is done there.
    Done {
        /// The number that it was started with.
        operation: u64,
        /// Why it failed, if it did.
        result: Result<(), String>,
    },
    /// A peer cannot be reached any more.
    Broken {
        /// Its number.
        peer: u64,
        /// Why.
        reason: String,
    },
    /// A peer was given up. What was in flight to it may end later, each with its own [`RawEvent::Done`].
    Closed {
        /// Its number.
        peer: u64,
    },
}

/// How to wait for what comes next.
pub enum RawWait<'a> {
    /// The descriptor becomes readable.
    Readable(BorrowedFd<'a>),
    /// There is more to do now.
    Busy,
    /// Nothing tells; ask again soon.
    Poll,
}

/// Registered memory.
pub struct RawMemory {
    _mapped: Mapped,
    pool: Pool,
    keys: Vec<Vec<u8>>,
    /// UCX's registration of every region; none where there is no memory.
    handles: Vec<Option<ucp_mem_h>>,
}

impl RawMemory {
    /// The packed key of every region of the pool, for peers; empty where there is no memory.
    pub fn keys(&self) -> &[Vec<u8>] {
        &self.keys
    }

    /// The memory.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The first byte of a range, how many, and their registration, if the memory has all of it.
    pub(super) fn place(&self, range: RawRange) -> Option<(*mut u8, usize, ucp_mem_h)> {
        let region = self.pool.regions().get(range.region)?;
        let handle = (*self.handles.get(range.region)?)?;
        let end = range.offset.checked_add(range.bytes)?;
        (end <= region.bytes()).then_some(())?;
        // Inside the region, so inside the address space.
        let at = region.base().wrapping_add(usize::try_from(range.offset).ok()?);
        Some((at, usize::try_from(range.bytes).ok()?, handle))
    }
}

impl RawWorker {
    /// Opens a context and a worker with the library that `KVFERRY_UCX_LIBRARY` names, or the loader finds.
    pub fn open(settings: &RawSettings) -> Result<RawWorker, String> {
        let library = Library::find()?;
        let (major, minor, release) = settings.oldest;
        let oldest = Version(major, minor, release);
        if library.version < oldest {
            return Err(format!(
                "{} is UCX {}; {oldest} or later is needed for such peers: set {} to a newer libucp.so.0",
                library.path,
                library.version,
                crate::library::VARIABLE
            ));
        }
        let features = UCP_FEATURE_RMA | UCP_FEATURE_AMO32 | UCP_FEATURE_AMO64 | UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
        let pairs = settings.settings.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        let context =
            Context::with(library, &settings.name, features, pairs, &settings.optional).map_err(
                |error| match error {
                    Refused::Setting(error) => error,
                    Refused::Context(status) => {
                        let words = library.words(status);
                        format!(
                            "UCX {} ({}) opens no context: {words}; UCX_LOG_LEVEL=info says more",
                            library.version, library.path
                        )
                    }
                },
            )?;
        Ok(RawWorker { inner: Inner::new(&context, settings)? })
    }

    /// The library's file and version.
    pub fn library(&self) -> (&'static str, String) {
        let library = self.inner.library();
        (&library.path, library.version.to_string())
    }

    /// Where peers find it.
    pub fn address(&self) -> Result<Vec<u8>, String> {
        self.inner.address()
    }

    /// Registers a pool's memory.
    pub fn register(&self, pool: &Pool) -> Result<Rc<RawMemory>, String> {
        pool.require_host()?;
        let (mapped, keys) = Mapped::new(self.inner.context(), pool)?;
        let mut registered = mapped.handles().iter().copied();
        let handles = pool.regions().iter().map(|region| if region.bytes() > 0 { registered.next() } else { None });
        let handles = handles.collect();
        Ok(Rc::new(RawMemory { _mapped: mapped, pool: pool.clone(), keys, handles }))
    }

    /// One step; false when there was nothing to do.
    pub fn progress(&self) -> bool {
        self.inner.handle.progress()
    }

    /// What happened since it was last asked, in order.
    pub fn take(&self, events: &mut Vec<RawEvent>) {
        let words = |status| self.inner.library().words(status);
        for arrival in self.inner.inbox.take() {
            match arrival {
                Arrival::Message(message) => events.push(RawEvent::Message(message)),
                Arrival::Announced { description, bytes } => {
                    if let Begun::Over(operation, status) = self.inner.receive(description, bytes) {
                        self.ended(operation, status, events);
                    }
                }
                Arrival::Broken { peer, status } => events.push(RawEvent::Broken { peer, reason: words(status) }),
            }
        }
        for (operation, status) in self.inner.operations.take_done() {
            self.ended(operation, status, events);
        }
        events.extend(
            self.inner.copies.take().iter().map(|batch| self.inner.copied(batch.operation, batch.status.get())),
        );
    }

    fn ended(&self, operation: Operation, status: ucs_status_t, events: &mut Vec<RawEvent>) {
        if let Operation::Received { buffer } = &operation {
            self.inner.inbox.arrived(buffer.len());
        }
        events.extend(operation.end(status, |status| self.inner.library().words(status)));
    }

    /// How to wait, once there is nothing to do.
    pub fn wait(&self) -> RawWait<'_> {
        if !self.inner.inbox.is_empty() || self.inner.operations.has_done() || self.inner.copies.has_done() {
            return RawWait::Busy;
        }
        match (self.inner.arm(), self.inner.descriptor()) {
            (Armed::Yes, Ok(descriptor)) => RawWait::Readable(descriptor),
            (Armed::Busy, _) => RawWait::Busy,
            _ => RawWait::Poll,
        }
    }
}

impl Inner {
    fn new(context: &Rc<Context>, settings: &RawSettings) -> Result<Rc<Inner>, String> {
        let inbox = Rc::new(Inbox::new(settings.message_bytes_max));
        let free = context.library.request_free()?;
        let (operations, copies) = (Operations::new(free), Copies::new(free));
        let (message, argument) = (settings.message, Rc::as_ptr(&inbox).cast());
        // SAFETY: the inbox is what the callback takes, and outlives the handle, which is the first field.
        let handle = unsafe { Handle::new(context, message, Some(on_message), argument)? };
        Ok(Rc::new(Inner { handle, inbox, operations, copies, message }))
    }

    /// What is told of the end of copies.
    pub(super) fn copied(&self, operation: u64, status: ucs_status_t) -> RawEvent {
        let result = if status == UCS_OK { Ok(()) } else { Err(self.library().words(status)) };
        RawEvent::Done { operation, result }
    }

    /// Has UCX bring an announced message.
    fn receive(&self, description: *mut std::ffi::c_void, bytes: usize) -> Begun<Operation> {
        let mut buffer = vec![0; bytes];
        let at = buffer.as_mut_ptr();
        // SAFETY: UCX's description of an announced message, used once; the operation owns the buffer, whose `bytes` bytes do not move.
        self.operations.start_receiving(Operation::Received { buffer }, None, |params| unsafe {
            self.library().api.ucp_am_recv_data_nbx(self.raw(), description, at.cast(), bytes, params)
        })
    }
}
