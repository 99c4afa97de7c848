//! One UCX worker by itself: made, asked, driven, destroyed. It stays on the thread that made it.

use std::ffi::c_void;
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr;
use std::rc::Rc;

use ucx_sys::{
    UCP_AM_FLAG_WHOLE_MSG, UCP_AM_HANDLER_PARAM_FIELD_ARG, UCP_AM_HANDLER_PARAM_FIELD_CB,
    UCP_AM_HANDLER_PARAM_FIELD_FLAGS, UCP_AM_HANDLER_PARAM_FIELD_ID, UCP_EP_PARAM_FIELD_ERR_HANDLER,
    UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE, UCP_EP_PARAM_FIELD_REMOTE_ADDRESS, UCP_ERR_HANDLING_MODE_PEER,
    UCP_WORKER_ATTR_FIELD_ADDRESS, UCP_WORKER_PARAM_FIELD_THREAD_MODE, UCS_ERR_BUSY, UCS_OK, UCS_THREAD_MODE_SINGLE,
    ucp_am_handler_param_t, ucp_am_recv_callback_t, ucp_ep_h, ucp_ep_params_t, ucp_err_handler_cb_t, ucp_err_handler_t,
    ucp_worker_attr_t, ucp_worker_h, ucp_worker_params_t,
};

use crate::context::Context;
use crate::library::Library;

/// A worker of a context.
pub(crate) struct Handle {
    raw: ucp_worker_h,
    context: Rc<Context>,
}

/// Whether the worker's descriptor will announce what comes next.
pub(crate) enum Armed {
    Yes,
    Busy,
    Never,
}

impl Handle {
    /// A worker that gives messages of one number to a callback.
    ///
    /// # Safety
    /// `argument` is what the callback takes, and lives until the handle is dropped.
    pub(crate) unsafe fn new(
        context: &Rc<Context>,
        message: u32,
        on_message: ucp_am_recv_callback_t,
        argument: *const c_void,
    ) -> Result<Handle, String> {
        let library = context.library;
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
        let handle = Handle { raw, context: context.clone() };
        let handler = ucp_am_handler_param_t {
            field_mask: u64::from(
                UCP_AM_HANDLER_PARAM_FIELD_ID
                    | UCP_AM_HANDLER_PARAM_FIELD_FLAGS
                    | UCP_AM_HANDLER_PARAM_FIELD_CB
                    | UCP_AM_HANDLER_PARAM_FIELD_ARG,
            ),
            id: message,
            flags: UCP_AM_FLAG_WHOLE_MSG,
            cb: on_message,
            arg: argument.cast_mut(),
        };
        // SAFETY: a living worker; the caller answers for callback and argument.
        let status = unsafe { library.api.ucp_worker_set_am_recv_handler(raw, &handler) };
        if status != UCS_OK {
            return Err(format!("UCX takes no handler of messages: {}", library.words(status)));
        }
        Ok(handle)
    }

    pub(crate) fn context(&self) -> &Rc<Context> {
        &self.context
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
        Ok(address)
    }

    /// Starts connecting to the worker of an address, with peers' failures handled.
    ///
    /// # Safety
    /// The address is a whole one of UCX's, as far as UCX reads it; `mark` is what the callback takes, and lives until the endpoint is closed.
    pub(crate) unsafe fn connect(
        &self,
        address: &[u8],
        on_error: ucp_err_handler_cb_t,
        mark: *const c_void,
    ) -> Result<ucp_ep_h, String> {
        let params = ucp_ep_params_t {
            field_mask: u64::from(
                UCP_EP_PARAM_FIELD_REMOTE_ADDRESS
                    | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE
                    | UCP_EP_PARAM_FIELD_ERR_HANDLER,
            ),
            address: address.as_ptr().cast(),
            err_mode: UCP_ERR_HANDLING_MODE_PEER,
            err_handler: ucp_err_handler_t { cb: on_error, arg: mark.cast_mut() },
            ..Default::default()
        };
        let mut raw = ptr::null_mut();
        // SAFETY: the address lives during the call; the caller answers for the rest.
        let status = unsafe { self.library().api.ucp_ep_create(self.raw, &params, &mut raw) };
        match status {
            UCS_OK => Ok(raw),
            status => Err(format!("UCX reaches no such worker: {}", self.library().words(status))),
        }
    }

    /// One step; false when there was nothing to do. Callbacks run inside.
    pub(crate) fn progress(&self) -> bool {
        // SAFETY: a living worker on its own thread.
        unsafe { self.library().api.ucp_worker_progress(self.raw) != 0 }
    }

    /// The descriptor that [`Handle::arm`] arms. It is the worker's and lives as long.
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
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: endpoints and remote keys hold whoever holds this, so none is left. Callbacks that run inside find their argument alive.
        unsafe { self.library().api.ucp_worker_destroy(self.raw) };
    }
}
