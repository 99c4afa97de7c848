//! What UCX's callbacks leave: messages and failed endpoints.

use std::cell::{Cell, RefCell};
use std::ffi::c_void;
use std::rc::Rc;

use ucx_sys::{UCP_AM_RECV_ATTR_FLAG_RNDV, UCS_INPROGRESS, UCS_OK, ucp_am_recv_param_t, ucp_ep_h, ucs_status_t};

/// What came.
pub(super) enum Arrival {
    /// A whole message.
    Message(Vec<u8>),
    /// A message that its sender holds until it is fetched: UCX's description of it, which is used once.
    Announced { description: *mut c_void, bytes: usize },
    /// An endpoint failed.
    Broken { peer: u64, status: ucs_status_t },
}

/// Filled by UCX's callbacks during progress, emptied after it.
pub(super) struct Inbox {
    arrivals: RefCell<Vec<Arrival>>,
    /// The longest message that is taken.
    bytes_max: usize,
    /// Bytes of messages that were announced and are not here.
    announced: Cell<usize>,
}

/// So many of the longest messages may be announced at once; what is announced beyond is dropped.
const ANNOUNCED_MAX: usize = 8;

impl Inbox {
    pub(super) fn new(bytes_max: usize) -> Inbox {
        Inbox { arrivals: RefCell::default(), bytes_max, announced: Cell::new(0) }
    }

    pub(super) fn take(&self) -> Vec<Arrival> {
        std::mem::take(&mut *self.arrivals.borrow_mut())
    }

    /// An announced message came, or failed to.
    pub(super) fn arrived(&self, bytes: usize) {
        self.announced.set(self.announced.get().saturating_sub(bytes));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.arrivals.borrow().is_empty()
    }

    /// Keeps what came; false where it cannot be kept.
    fn keep(&self, arrival: Arrival) -> bool {
        // Nothing is borrowed while UCX makes progress.
        self.arrivals.try_borrow_mut().map(|mut arrivals| arrivals.push(arrival)).is_ok()
    }
}

/// UCX's callback for a message.
///
/// # Safety
/// `inbox` is the [`Inbox`] that the handler was set with, alive; the rest is as UCX promises.
pub(super) unsafe extern "C" fn on_message(
    inbox: *mut c_void,
    _header: *const c_void,
    header_bytes: usize,
    data: *mut c_void,
    length: usize,
    param: *const ucp_am_recv_param_t,
) -> ucs_status_t {
    // SAFETY: as the caller promises.
    let (inbox, attributes) = unsafe { (&*inbox.cast::<Inbox>(), (*param).recv_attr) };
    if header_bytes != 0 || data.is_null() || length > inbox.bytes_max {
        tracing::debug!(header_bytes, length, "a message that no peer of ours sends is dropped");
        return UCS_OK;
    }
    if attributes & u64::from(UCP_AM_RECV_ATTR_FLAG_RNDV) != 0 {
        let announced = inbox.announced.get().saturating_add(length);
        let room = announced <= inbox.bytes_max.saturating_mul(ANNOUNCED_MAX);
        let kept = room && inbox.keep(Arrival::Announced { description: data, bytes: length });
        if kept {
            inbox.announced.set(announced);
        }
        // UCX keeps the description of what will be fetched.
        return if kept { UCS_INPROGRESS } else { UCS_OK };
    }
    // SAFETY: UCX lends so many bytes for the time of the call.
    let message = unsafe { std::slice::from_raw_parts(data.cast::<u8>().cast_const(), length) };
    inbox.keep(Arrival::Message(message.to_vec()));
    UCS_OK
}

/// What an endpoint's error handler is given. Boxed until the endpoint is closed.
pub(super) struct Mark {
    pub(super) inbox: Rc<Inbox>,
    pub(super) peer: u64,
}

/// UCX's callback for an endpoint that failed.
///
/// # Safety
/// `mark` is the [`Mark`] that the endpoint was created with, alive.
pub(super) unsafe extern "C" fn on_error(mark: *mut c_void, _endpoint: ucp_ep_h, status: ucs_status_t) {
    // SAFETY: as the caller promises.
    let mark = unsafe { &*mark.cast::<Mark>() };
    mark.inbox.keep(Arrival::Broken { peer: mark.peer, status });
}
