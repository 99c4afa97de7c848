//! One UCX worker: its address, its progress, its descriptor. It stays on the thread that made it.

use std::os::fd::{BorrowedFd, RawFd};
use std::ptr;
use std::rc::Rc;

use ucx_sys::{
    UCP_AM_FLAG_WHOLE_MSG, UCP_AM_HANDLER_PARAM_FIELD_ARG, UCP_AM_HANDLER_PARAM_FIELD_CB,
    UCP_AM_HANDLER_PARAM_FIELD_FLAGS, UCP_AM_HANDLER_PARAM_FIELD_ID, UCP_WORKER_ATTR_FIELD_ADDRESS,
    UCP_WORKER_PARAM_FIELD_THREAD_MODE, UCS_ERR_BUSY, UCS_OK, UCS_THREAD_MODE_SINGLE, ucp_am_handler_param_t,
    ucp_worker_attr_t, ucp_worker_h, ucp_worker_params_t,
};

use crate::context::Context;
use crate::endpoint::Operation;
use crate::inbox::{Inbox, Rendezvous, on_message};
use crate::library::Library;
use crate::request::{Begun, Operations};
use crate::wire::ADDRESS_BYTES_MAX;

/// The one active message that kvferry uses.
pub(crate) const MESSAGE_ID: u32 = 7;

/// A worker of a context.
pub(crate) struct Worker {
    raw: ucp_worker_h,
    context: Rc<Context>,
    pub(crate) inbox: Rc<Inbox>,
    pub(crate) operations: Operations<Operation>,
}

/// Whether the worker's descriptor will announce what comes next.
pub(crate) enum Armed {
    Yes,
    Busy,
    Never,
}

impl Worker {
    pub(crate) fn new(context: &Rc<Context>) -> Result<Rc<Worker>, String> {
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
        let inbox = Rc::new(Inbox::default());
        let worker = Worker { raw, context: context.clone(), inbox, operations: Operations::new(free) };
        let handler = ucp_am_handler_param_t {
            field_mask: u64::from(
                UCP_AM_HANDLER_PARAM_FIELD_ID
                    | UCP_AM_HANDLER_PARAM_FIELD_FLAGS
                    | UCP_AM_HANDLER_PARAM_FIELD_CB
                    | UCP_AM_HANDLER_PARAM_FIELD_ARG,
            ),
            id: MESSAGE_ID,
            flags: UCP_AM_FLAG_WHOLE_MSG,
            cb: Some(on_message),
            arg: Rc::as_ptr(&worker.inbox).cast_mut().cast(),
        };
        // SAFETY: the handler's argument is the inbox, which `worker` keeps until the UCX worker is destroyed.
        let status = unsafe { library.api.ucp_worker_set_am_recv_handler(raw, &handler) };
        if status != UCS_OK {
            return Err(format!("UCX takes no handler of messages: {}", library.words(status)));
        }
        Ok(Rc::new(worker))
    }

    pub(crate) fn library(&self) -> &'static Library {
        self.context.library
    }

    pub(crate) fn raw(&self) -> ucp_worker_h {
        self.raw
    }

    /// Where peers find it.
    pub(crate) fn address(&self) -> Result<Vec<u8>, String> {
        let api = &self.library().api;
        let mut attributes =
            ucp_worker_attr_t { field_mask: u64::from(UCP_WORKER_ATTR_FIELD_ADDRESS), ..Default::default() };
        // SAFETY: a living worker; the masked fields are filled in.
        let status = unsafe { api.ucp_worker_query(self.raw, &mut attributes) };
        if status != UCS_OK {
            return Err(format!("UCX says no address: {}", self.library().words(status)));
        }
        // SAFETY: UCX filled so many bytes in.
        let address =
            unsafe { std::slice::from_raw_parts(attributes.address.cast::<u8>(), attributes.address_length) }.to_vec();
        // SAFETY: given by the query above, released once.
        unsafe { api.ucp_worker_release_address(self.raw, attributes.address) };
        if address.len() > ADDRESS_BYTES_MAX {
            return Err(format!("UCX's address has {} bytes; name fewer devices in UCX_NET_DEVICES", address.len()));
        }
        Ok(address)
    }

    /// One step; false when there was nothing to do. Callbacks run inside.
    pub(crate) fn progress(&self) -> bool {
        // SAFETY: a living worker on its own thread.
        unsafe { self.library().api.ucp_worker_progress(self.raw) != 0 }
    }

    /// The descriptor that [`Worker::arm`] arms. It is the worker's and lives as long.
    pub(crate) fn descriptor(&self) -> Result<BorrowedFd<'_>, String> {
        let mut fd: RawFd = -1;
        // SAFETY: a living worker of a context with wake-up.
        let status = unsafe { self.library().api.ucp_worker_get_efd(self.raw, &mut fd) };
        if status != UCS_OK || fd < 0 {
            return Err(format!("UCX has no descriptor to wait for: {}", self.library().words(status)));
        }
        // SAFETY: UCX keeps it open for as long as the worker lives.
        Ok(unsafe { BorrowedFd::borrow_raw(fd) })
    }

    pub(crate) fn arm(&self) -> Armed {
        // SAFETY: a living worker of a context with wake-up.
        match unsafe { self.library().api.ucp_worker_arm(self.raw) } {
            UCS_OK => Armed::Yes,
            UCS_ERR_BUSY => Armed::Busy,
            _ => Armed::Never,
        }
    }

    /// Has UCX bring an announced chunk into the buffer, which gets as many bytes as it has room for: reported as [`Operation::Received`].
    pub(crate) fn receive(&self, link: u64, rendezvous: Rendezvous, mut buffer: Vec<u8>) -> Begun<Operation> {
        let Rendezvous { header, description, bytes } = rendezvous;
        // What an earlier chunk left behind is overwritten.
        buffer.resize(bytes, 0);
        let at = buffer.as_mut_ptr();
        // SAFETY: UCX's description of an announced chunk, used once; the operation owns the buffer, whose `bytes` bytes do not move.
        self.operations.start_receiving(Operation::Received { link, header, buffer }, |params| unsafe {
            self.library().api.ucp_am_recv_data_nbx(self.raw, description, at.cast(), bytes, params)
        })
    }

    /// Lets an announced chunk be; its sender is told that it was taken.
    pub(crate) fn decline(&self, rendezvous: Rendezvous) {
        // SAFETY: UCX's description of an announced chunk, used once.
        unsafe { self.library().api.ucp_am_data_release(self.raw, rendezvous.description) };
    }

    /// Starts a flush of everything: reported as [`Operation::Flushed`].
    pub(crate) fn flush(&self, link: u64) -> Begun<Operation> {
        // SAFETY: a living worker; the parameters live during the call.
        self.operations.start(Operation::Flushed { link }, 0, |params| unsafe {
            self.library().api.ucp_worker_flush_nbx(self.raw, params)
        })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // SAFETY: endpoints and remote keys hold the worker, so none is left. Callbacks that run inside find the inbox and the slots alive.
        unsafe { self.library().api.ucp_worker_destroy(self.raw) };
    }
}
