//! A worker that other programs' workers may reach.

use std::os::fd::{BorrowedFd, RawFd};
use std::ptr;
use std::rc::Rc;

use kvferry_transport::Pool;
use ucx_sys::{
    UCP_AM_FLAG_WHOLE_MSG, UCP_AM_HANDLER_PARAM_FIELD_ARG, UCP_AM_HANDLER_PARAM_FIELD_CB,
    UCP_AM_HANDLER_PARAM_FIELD_FLAGS, UCP_AM_HANDLER_PARAM_FIELD_ID, UCP_FEATURE_AM, UCP_FEATURE_AMO32,
    UCP_FEATURE_AMO64, UCP_FEATURE_RMA, UCP_FEATURE_WAKEUP, UCP_WORKER_ATTR_FIELD_ADDRESS,
    UCP_WORKER_PARAM_FIELD_THREAD_MODE, UCS_ERR_BUSY, UCS_OK, UCS_THREAD_MODE_SINGLE, ucp_am_handler_param_t,
    ucp_worker_attr_t, ucp_worker_h, ucp_worker_params_t, ucs_status_t,
};

use super::inbox::{Arrival, Inbox, on_message};
use super::peer::Operation;
use crate::context::{Context, Mapped, Refused};
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
    pub(super) raw: ucp_worker_h,
    pub(super) context: Rc<Context>,
    pub(super) inbox: Rc<Inbox>,
    pub(super) operations: Operations<Operation>,
    pub(super) message: u32,
}

/// What happened.
#[derive(Debug)]
pub enum RawEvent {
    /// A peer sent a message; who it was is for the message to say.
    Message(Vec<u8>),
    /// An operation is over. Of a read: the bytes are here. Of a write or a message: its memory may be used again. Of a flush: everything that was
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
    pub(super) _mapped: Rc<Mapped>,
    pub(super) pool: Pool,
    keys: Vec<Vec<u8>>,
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
        let api = &self.inner.library().api;
        let mut attributes =
            ucp_worker_attr_t { field_mask: u64::from(UCP_WORKER_ATTR_FIELD_ADDRESS), ..Default::default() };
        // SAFETY: a living worker; the masked fields are filled in.
        let status = unsafe { api.ucp_worker_query(self.inner.raw, &mut attributes) };
        if status != UCS_OK {
            return Err(format!("UCX says no address: {}", self.inner.library().words(status)));
        }
        // SAFETY: UCX filled so many bytes in.
        let address = unsafe { std::slice::from_raw_parts(attributes.address.cast::<u8>(), attributes.address_length) };
        let address = address.to_vec();
        // SAFETY: given by the query above, released once.
        unsafe { api.ucp_worker_release_address(self.inner.raw, attributes.address) };
        Ok(address)
    }

    /// Registers a pool's memory.
    pub fn register(&self, pool: &Pool) -> Result<Rc<RawMemory>, String> {
        pool.require_host()?;
        let (mapped, keys) = Mapped::new(&self.inner.context, pool)?;
        Ok(Rc::new(RawMemory { _mapped: Rc::new(mapped), pool: pool.clone(), keys }))
    }

    /// One step; false when there was nothing to do.
    pub fn progress(&self) -> bool {
        // SAFETY: a living worker on its own thread.
        unsafe { self.inner.library().api.ucp_worker_progress(self.inner.raw) != 0 }
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
    }

    fn ended(&self, operation: Operation, status: ucs_status_t, events: &mut Vec<RawEvent>) {
        if let Operation::Received { buffer } = &operation {
            self.inner.inbox.arrived(buffer.len());
        }
        events.extend(operation.end(status, |status| self.inner.library().words(status)));
    }

    /// How to wait, once there is nothing to do.
    pub fn wait(&self) -> RawWait<'_> {
        if !self.inner.inbox.is_empty() || self.inner.operations.has_done() {
            return RawWait::Busy;
        }
        let api = &self.inner.library().api;
        // SAFETY: a living worker of a context with wake-up.
        match unsafe { api.ucp_worker_arm(self.inner.raw) } {
            UCS_OK => {}
            UCS_ERR_BUSY => return RawWait::Busy,
            _ => return RawWait::Poll,
        }
        let mut fd: RawFd = -1;
        // SAFETY: as above.
        let status = unsafe { api.ucp_worker_get_efd(self.inner.raw, &mut fd) };
        if status != UCS_OK || fd < 0 {
            return RawWait::Poll;
        }
        // SAFETY: UCX keeps it open for as long as the worker lives, which the borrow does not outlive.
        RawWait::Readable(unsafe { BorrowedFd::borrow_raw(fd) })
    }
}

impl Inner {
    fn new(context: &Rc<Context>, settings: &RawSettings) -> Result<Rc<Inner>, String> {
        let library = context.library;
        let Ok(free) = library.api.ucp_request_free else {
            return Err("this UCX cannot free requests".to_owned());
        };
        let params = ucp_worker_params_t {
            field_mask: u64::from(UCP_WORKER_PARAM_FIELD_THREAD_MODE),
            thread_mode: UCS_THREAD_MODE_SINGLE,
            ..Default::default()
        };
        let mut raw = ptr::null_mut();
        // SAFETY: an open context and masked parameters.
        let status = unsafe { library.api.ucp_worker_create(context.raw(), &params, &mut raw) };
        if status != UCS_OK {
            return Err(format!("UCX creates no worker: {}", library.words(status)));
        }
        let inbox = Rc::new(Inbox::new(settings.message_bytes_max));
        let (operations, message) = (Operations::new(free), settings.message);
        let inner = Rc::new(Inner { raw, context: context.clone(), inbox, operations, message });
        let handler = ucp_am_handler_param_t {
            field_mask: u64::from(
                UCP_AM_HANDLER_PARAM_FIELD_ID
                    | UCP_AM_HANDLER_PARAM_FIELD_FLAGS
                    | UCP_AM_HANDLER_PARAM_FIELD_CB
                    | UCP_AM_HANDLER_PARAM_FIELD_ARG,
            ),
            id: settings.message,
            flags: UCP_AM_FLAG_WHOLE_MSG,
            cb: Some(on_message),
            arg: Rc::as_ptr(&inner.inbox).cast_mut().cast(),
        };
        // SAFETY: the handler's argument is the inbox, which `inner` keeps until the UCX worker is destroyed.
        let status = unsafe { library.api.ucp_worker_set_am_recv_handler(raw, &handler) };
        if status != UCS_OK {
            return Err(format!("UCX takes no handler of messages: {}", library.words(status)));
        }
        Ok(inner)
    }

    pub(super) fn library(&self) -> &'static Library {
        self.context.library
    }

    /// Has UCX bring an announced message.
    fn receive(&self, description: *mut std::ffi::c_void, bytes: usize) -> Begun<Operation> {
        let mut buffer = vec![0; bytes];
        let at = buffer.as_mut_ptr();
        // SAFETY: UCX's description of an announced message, used once; the operation owns the buffer, whose `bytes` bytes do not move.
        self.operations.start_receiving(Operation::Received { buffer }, |params| unsafe {
            self.library().api.ucp_am_recv_data_nbx(self.raw, description, at.cast(), bytes, params)
        })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: endpoints and remote keys hold the worker, so none is left. Callbacks that run inside find the inbox and the slots alive.
        unsafe { self.library().api.ucp_worker_destroy(self.raw) };
    }
}
