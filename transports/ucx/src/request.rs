//! Operations in flight: what they own, and what is told of them.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ffi::c_void;
use std::rc::Rc;

use ucx_sys::{
    UCP_OP_ATTR_FIELD_CALLBACK, UCP_OP_ATTR_FIELD_FLAGS, UCP_OP_ATTR_FIELD_MEMH, UCP_OP_ATTR_FIELD_MEMORY_TYPE,
    UCP_OP_ATTR_FIELD_USER_DATA, UCS_MEMORY_TYPE_HOST, UCS_OK, ucp_mem_h, ucp_request_param_t,
    ucp_request_param_t__bindgen_ty_1, ucs_status_ptr_t, ucs_status_t,
};

/// The lowest status.
const FIRST_STATUS: isize = ucx_sys::UCS_ERR_LAST as isize;

/// The library's function that takes requests back.
pub(crate) type Free = unsafe extern "C" fn(*mut c_void);

/// What operations own until the library is done with them, and the queue of those that are done. `T` is what an operation owns.
pub(crate) struct Operations<T> {
    shared: Rc<Shared<T>>,
}

struct Shared<T> {
    free: Free,
    /// Boxed: the library holds their addresses.
    slots: RefCell<Vec<Box<Slot<T>>>>,
    idle: RefCell<Vec<usize>>,
    done: RefCell<VecDeque<(T, ucs_status_t)>>,
    in_flight: Cell<usize>,
}

struct Slot<T> {
    shared: *const Shared<T>,
    index: usize,
    owned: Cell<Option<T>>,
}

/// How an operation began.
pub(crate) enum Begun<T> {
    /// It is over already; this is what it owned.
    Over(T, ucs_status_t),
    /// It will be in [`Operations::take_done`].
    InFlight,
}

impl<T> Operations<T> {
    pub(crate) fn new(free: Free) -> Operations<T> {
        let shared = Shared {
            free,
            slots: RefCell::default(),
            idle: RefCell::default(),
            done: RefCell::default(),
            in_flight: Cell::new(0),
        };
        Operations { shared: Rc::new(shared) }
    }

    /// Starts an operation over host memory: `call` gets its parameters. What `owned` holds stays alive and in place until the library is done.
    pub(crate) fn start(
        &self,
        owned: T,
        flags: u32,
        call: impl FnOnce(*const ucp_request_param_t) -> ucs_status_ptr_t,
    ) -> Begun<T> {
        self.start_with(owned, flags, None, call)
    }

    /// As [`Operations::start`], over memory whose registration is at hand.
    pub(crate) fn start_with(
        &self,
        owned: T,
        flags: u32,
        memory: Option<ucp_mem_h>,
        call: impl FnOnce(*const ucp_request_param_t) -> ucs_status_ptr_t,
    ) -> Begun<T> {
        self.begin(owned, flags, memory, ucp_request_param_t__bindgen_ty_1 { send: Some(finished::<T>) }, call)
    }

    /// As [`Operations::start_with`], for what receives a message's data.
    pub(crate) fn start_receiving(
        &self,
        owned: T,
        memory: Option<ucp_mem_h>,
        call: impl FnOnce(*const ucp_request_param_t) -> ucs_status_ptr_t,
    ) -> Begun<T> {
        self.begin(owned, 0, memory, ucp_request_param_t__bindgen_ty_1 { recv_am: Some(received::<T>) }, call)
    }

    fn begin(
        &self,
        owned: T,
        flags: u32,
        memory: Option<ucp_mem_h>,
        cb: ucp_request_param_t__bindgen_ty_1,
        call: impl FnOnce(*const ucp_request_param_t) -> ucs_status_ptr_t,
    ) -> Begun<T> {
        let index = self.idle_slot();
        let data = {
            let slots = self.shared.slots.borrow();
            let Some(slot) = slots.get(index) else { return Begun::Over(owned, ucx_sys::UCS_ERR_NO_MEMORY) };
            slot.owned.set(Some(owned));
            std::ptr::from_ref::<Slot<T>>(slot)
        };
        let mut params = ucp_request_param_t {
            op_attr_mask: UCP_OP_ATTR_FIELD_CALLBACK
                | UCP_OP_ATTR_FIELD_USER_DATA
                | UCP_OP_ATTR_FIELD_FLAGS
                | UCP_OP_ATTR_FIELD_MEMORY_TYPE,
            flags,
            cb,
            user_data: data.cast_mut().cast(),
            memory_type: UCS_MEMORY_TYPE_HOST,
            ..Default::default()
        };
        if let Some(memory) = memory {
            (params.op_attr_mask, params.memh) = (params.op_attr_mask | UCP_OP_ATTR_FIELD_MEMH, memory);
        }
        self.shared.in_flight.set(self.shared.in_flight.get() + 1);
        let pointer = call(&params);
        match status_of(pointer) {
            None => Begun::InFlight,
            Some(status) => match self.shared.release(index) {
                Some(owned) => Begun::Over(owned, status),
                // Only if the library also called back, which it does not for what it ends at once.
                None => Begun::InFlight,
            },
        }
    }

    /// What ended since it was last asked.
    pub(crate) fn take_done(&self) -> VecDeque<(T, ucs_status_t)> {
        std::mem::take(&mut *self.shared.done.borrow_mut())
    }

    pub(crate) fn has_done(&self) -> bool {
        !self.shared.done.borrow().is_empty()
    }

    /// How many the library holds.
    pub(crate) fn in_flight(&self) -> usize {
        self.shared.in_flight.get()
    }

    fn idle_slot(&self) -> usize {
        if let Some(index) = self.shared.idle.borrow_mut().pop() {
            return index;
        }
        let mut slots = self.shared.slots.borrow_mut();
        let index = slots.len();
        slots.push(Box::new(Slot { shared: Rc::as_ptr(&self.shared), index, owned: Cell::new(None) }));
        index
    }
}

impl<T> Drop for Operations<T> {
    fn drop(&mut self) {
        if self.in_flight() > 0 {
            // The library may still use what they own and call back: it stays.
            std::mem::forget(self.shared.clone());
        }
    }
}

impl<T> Shared<T> {
    fn release(&self, index: usize) -> Option<T> {
        let slots = self.slots.borrow();
        let owned = slots.get(index)?.owned.take()?;
        self.idle.borrow_mut().push(index);
        self.in_flight.set(self.in_flight.get().saturating_sub(1));
        Some(owned)
    }
}

/// The status of an operation that is over at once, `None` for one in flight: UCX returns statuses as small negative pointers.
pub(crate) fn status_of(pointer: ucs_status_ptr_t) -> Option<ucs_status_t> {
    let value = pointer as isize;
    match value {
        0 => Some(UCS_OK),
        FIRST_STATUS..0 => ucs_status_t::try_from(value).ok(),
        _ => None,
    }
}

unsafe extern "C" fn finished<T>(request: *mut c_void, status: ucs_status_t, data: *mut c_void) {
    // SAFETY: `data` is the slot that the operation was started with. Slots are boxed and live as long as `Shared`, which lives while
    // anything is in flight (`Operations::drop`).
    let slot = unsafe { &*data.cast::<Slot<T>>() };
    // SAFETY: as above: the slot is part of it.
    let shared = unsafe { &*slot.shared };
    if let Some(owned) = shared.release(slot.index) {
        shared.done.borrow_mut().push_back((owned, status));
    }
    // SAFETY: the request came from the library, which allows freeing it in its callback; nobody else keeps it.
    unsafe { (shared.free)(request) };
}

unsafe extern "C" fn received<T>(request: *mut c_void, status: ucs_status_t, _length: usize, data: *mut c_void) {
    // SAFETY: as the library calls this one; what is received is as long as its announcement, which sized the buffer.
    unsafe { finished::<T>(request, status, data) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ucx_sys::{UCS_ERR_CANCELED, UCS_ERR_NO_MEMORY};

    unsafe extern "C" fn no_free(_: *mut c_void) {}

    #[test]
    fn an_operation_gives_back_what_it_owns_once() {
        let operations: Operations<Box<u32>> = Operations::new(no_free);
        let over = operations.start(Box::new(1), 0, |_| std::ptr::null_mut());
        assert!(matches!(over, Begun::Over(owned, UCS_OK) if *owned == 1));
        let failed = operations.start(Box::new(2), 0, |_| UCS_ERR_NO_MEMORY as isize as *mut c_void);
        assert!(matches!(failed, Begun::Over(owned, UCS_ERR_NO_MEMORY) if *owned == 2));
        let mut saved = (None, std::ptr::null_mut());
        let mut request = 0u64;
        let begun = operations.start(Box::new(3), 0, |params| {
            // SAFETY: the parameters live during the call; `send` is the member that was set.
            saved = unsafe { ((*params).cb.send, (*params).user_data) };
            std::ptr::from_mut(&mut request).cast()
        });
        assert!(matches!(begun, Begun::InFlight) && operations.in_flight() == 1 && !operations.has_done());
        // SAFETY: what the library would do.
        unsafe { saved.0.unwrap()(std::ptr::from_mut(&mut request).cast(), UCS_ERR_CANCELED, saved.1) };
        let done = operations.take_done();
        assert_eq!(
            done.into_iter().map(|(owned, status)| (*owned, status)).collect::<Vec<_>>(),
            [(3, UCS_ERR_CANCELED)]
        );
        assert_eq!(operations.in_flight(), 0);
    }

    #[test]
    fn statuses_are_told_from_requests() {
        assert_eq!(status_of(std::ptr::null_mut()), Some(UCS_OK));
        assert_eq!(status_of(-25isize as *mut c_void), Some(-25));
        assert_eq!(status_of(-100isize as *mut c_void), Some(-100));
        let mut request = 0u64;
        assert_eq!(status_of(std::ptr::from_mut(&mut request).cast()), None);
    }
}
