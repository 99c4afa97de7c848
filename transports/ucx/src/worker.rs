//! The worker of a transport: its messages, and what it was asked for.

use std::ops::Deref;
use std::rc::Rc;

use ucx_sys::UCS_ERR_BUFFER_TOO_SMALL;

use crate::context::Context;
use crate::endpoint::Operation;
use crate::handle::Handle;
use crate::inbox::{Inbox, Rendezvous, on_message};
use crate::request::{Begun, Operations};
use crate::staging::Buffer;
use crate::wire::ADDRESS_BYTES_MAX;

/// The one active message that kvferry uses.
pub(crate) const MESSAGE_ID: u32 = 7;

/// A worker that speaks kvferry's protocol.
pub(crate) struct Worker {
    // Destroyed first: callbacks may run inside, which need the rest.
    handle: Handle,
    pub(crate) inbox: Rc<Inbox>,
    pub(crate) operations: Operations<Operation>,
}

impl Deref for Worker {
    type Target = Handle;

    fn deref(&self) -> &Handle {
        &self.handle
    }
}

impl Worker {
    pub(crate) fn new(context: &Rc<Context>) -> Result<Rc<Worker>, String> {
        let (inbox, operations) = (Rc::new(Inbox::default()), Operations::new(context.library.request_free()?));
        // SAFETY: the inbox is what the callback takes, and outlives the handle, which is the worker's first field.
        let handle = unsafe { Handle::new(context, MESSAGE_ID, Some(on_message), Rc::as_ptr(&inbox).cast())? };
        Ok(Rc::new(Worker { handle, inbox, operations }))
    }

    /// Where peers find it.
    pub(crate) fn address(&self) -> Result<Vec<u8>, String> {
        let address = self.handle.address()?;
        if address.len() > ADDRESS_BYTES_MAX {
            return Err(format!("UCX's address has {} bytes; name fewer devices in UCX_NET_DEVICES", address.len()));
        }
        Ok(address)
    }

    /// Has UCX bring an announced chunk into the buffer, which must have room for it: reported as [`Operation::Received`].
    pub(crate) fn receive(&self, link: u64, rendezvous: Rendezvous, mut buffer: Buffer) -> Begun<Operation> {
        let Rendezvous { header, description, bytes } = rendezvous;
        let Some(at) = buffer.lay_open(bytes) else {
            self.decline(rendezvous);
            return Begun::Over(Operation::Received { link, header, buffer }, UCS_ERR_BUFFER_TOO_SMALL);
        };
        let memory = buffer.handle();
        // SAFETY: UCX's description of an announced chunk, used once; the operation owns the buffer, whose `bytes` bytes do not move.
        self.operations.start_receiving(Operation::Received { link, header, buffer }, memory, |params| unsafe {
            self.library().api.ucp_am_recv_data_nbx(self.raw(), description, at.cast(), bytes, params)
        })
    }

    /// Lets an announced chunk be; its sender is told that it was taken.
    pub(crate) fn decline(&self, rendezvous: Rendezvous) {
        // SAFETY: UCX's description of an announced chunk, used once.
        unsafe { self.library().api.ucp_am_data_release(self.raw(), rendezvous.description) };
    }

    /// Starts a flush of everything: reported as [`Operation::Flushed`].
    pub(crate) fn flush(&self, link: u64) -> Begun<Operation> {
        // SAFETY: a living worker; the parameters live during the call.
        self.operations.start(Operation::Flushed { link }, 0, |params| unsafe {
            self.library().api.ucp_worker_flush_nbx(self.raw(), params)
        })
    }
}
