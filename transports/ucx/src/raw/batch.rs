//! Copies that are begun together and end together.
//!
//! What they hold, the memory and the key, is held once for all of them; a piece costs a call of UCX and a number counted down.

use std::cell::{Cell, RefCell};
use std::ffi::c_void;
use std::rc::Rc;

use ucx_sys::{
    UCP_OP_ATTR_FIELD_CALLBACK, UCP_OP_ATTR_FIELD_MEMH, UCP_OP_ATTR_FIELD_MEMORY_TYPE, UCP_OP_ATTR_FIELD_USER_DATA,
    UCS_ERR_INVALID_PARAM, UCS_MEMORY_TYPE_HOST, UCS_OK, ucp_mem_h, ucp_request_param_t,
    ucp_request_param_t__bindgen_ty_1, ucs_status_ptr_t, ucs_status_t,
};

use crate::request::{Free, status_of};

/// `UCP_OP_ATTR_FLAG_MULTI_SEND`: more of the same follows. Younger than the oldest UCX that the bindings are of, and known to all that
/// [`RawSettings::oldest`](super::RawSettings) lets in.
const MULTI_SEND: u32 = 1 << 19;

/// Batches that UCX is done with. `T` is what a batch holds.
pub(super) struct Copies<T> {
    free: Free,
    done: RefCell<Vec<Box<Batch<T>>>>,
}

/// What copies under way hold. It stays where it is until the last of them has ended: UCX has its address.
pub(super) struct Batch<T> {
    copies: Rc<Copies<T>>,
    pub(super) operation: u64,
    /// Those that UCX holds, and one for the call that begins them.
    left: Cell<usize>,
    pub(super) status: Cell<ucs_status_t>,
    _owned: T,
}

/// A batch that is being begun.
pub(super) struct Beginning<'a, T> {
    batch: &'a Batch<T>,
    params: ucp_request_param_t,
}

impl<T> Copies<T> {
    pub(super) fn new(free: Free) -> Rc<Copies<T>> {
        Rc::new(Copies { free, done: RefCell::default() })
    }

    /// What ended since it was last asked.
    pub(super) fn take(&self) -> Vec<Box<Batch<T>>> {
        std::mem::take(&mut *self.done.borrow_mut())
    }

    pub(super) fn has_done(&self) -> bool {
        !self.done.borrow().is_empty()
    }
}

impl<T> Batch<T> {
    /// Begins what `begin` adds. The status, if all of it is over already; else it will be in [`Copies::take`].
    pub(super) fn start(
        copies: &Rc<Copies<T>>,
        operation: u64,
        owned: T,
        begin: impl FnOnce(&mut Beginning<'_, T>),
    ) -> Option<ucs_status_t> {
        let batch = Box::into_raw(Box::new(Batch {
            copies: copies.clone(),
            operation,
            left: Cell::new(1),
            status: Cell::new(UCS_OK),
            _owned: owned,
        }));
        let params = ucp_request_param_t {
            op_attr_mask: UCP_OP_ATTR_FIELD_CALLBACK
                | UCP_OP_ATTR_FIELD_USER_DATA
                | UCP_OP_ATTR_FIELD_MEMORY_TYPE
                | UCP_OP_ATTR_FIELD_MEMH
                | MULTI_SEND,
            cb: ucp_request_param_t__bindgen_ty_1 { send: Some(copied::<T>) },
            user_data: batch.cast(),
            memory_type: UCS_MEMORY_TYPE_HOST,
            ..Default::default()
        };
        // SAFETY: made above; this call is one of those that are left, so that nothing takes it back before it is over.
        let shared = unsafe { &*batch };
        begin(&mut Beginning { batch: shared, params });
        if !shared.count_down() {
            return None;
        }
        // SAFETY: made above by `into_raw`; UCX holds none of its copies.
        let batch = unsafe { Box::from_raw(batch) };
        Some(batch.status.get())
    }

    /// Says whether that was the last.
    fn count_down(&self) -> bool {
        let left = self.left.get().saturating_sub(1);
        self.left.set(left);
        left == 0
    }

    /// The first failure counts.
    fn failed(&self, status: ucs_status_t) {
        if self.status.get() == UCS_OK {
            self.status.set(status);
        }
    }
}

impl<T> Beginning<'_, T> {
    /// Begins one more, of local memory and its registration. False where no further one is to be begun.
    pub(super) fn add(
        &mut self,
        place: Option<(*mut u8, usize, ucp_mem_h)>,
        call: impl FnOnce(*mut u8, usize, *const ucp_request_param_t) -> ucs_status_ptr_t,
    ) -> bool {
        let Some((at, bytes, handle)) = place else {
            self.batch.failed(UCS_ERR_INVALID_PARAM);
            return false;
        };
        self.params.memh = handle;
        // Counted first: UCX may be done with it within the call, and say so by the callback.
        self.batch.left.set(self.batch.left.get() + 1);
        match status_of(call(at, bytes, &self.params)) {
            None => return self.batch.status.get() == UCS_OK,
            Some(UCS_OK) => {}
            Some(status) => self.batch.failed(status),
        }
        self.batch.count_down();
        self.batch.status.get() == UCS_OK
    }
}

unsafe extern "C" fn copied<T>(request: *mut c_void, status: ucs_status_t, data: *mut c_void) {
    let at = data.cast::<Batch<T>>();
    // SAFETY: `data` is the batch that this copy was begun in, which stays until the last of its copies has ended: this one has not.
    let batch = unsafe { &*at };
    let free = batch.copies.free;
    if status != UCS_OK {
        batch.failed(status);
    }
    if batch.count_down() {
        let copies = batch.copies.clone();
        // SAFETY: made by `into_raw`; that was its last copy, and the call that began them is over. What it holds goes outside of UCX's call.
        copies.done.borrow_mut().push(unsafe { Box::from_raw(at) });
    }
    // SAFETY: the request came from the library, which allows freeing it in its callback; nobody else keeps it.
    unsafe { free(request) };
}

#[cfg(test)]
mod tests {
    use std::ptr;

    use super::*;
    use ucx_sys::{UCS_ERR_CANCELED, UCS_ERR_NO_MEMORY};

    unsafe extern "C" fn no_free(_: *mut c_void) {}

    type Call = (ucx_sys::ucp_send_nbx_callback_t, *mut c_void);

    /// What UCX does with a piece.
    #[derive(Clone, Copy)]
    enum Piece {
        Over(ucs_status_t),
        Held,
        Outside,
    }

    fn begin(copies: &Rc<Copies<Rc<()>>>, owned: &Rc<()>, pieces: &[Piece]) -> (Option<ucs_status_t>, Vec<Call>) {
        let mut calls = Vec::new();
        let status = Batch::start(copies, 7, owned.clone(), |batch| {
            for piece in pieces {
                let place = Some((ptr::without_provenance_mut(4096), 8, ptr::without_provenance_mut(64)));
                let place = place.filter(|_| !matches!(piece, Piece::Outside));
                let begun = batch.add(place, |_, _, params| {
                    // SAFETY: the parameters live during the call; `send` is the member that was set.
                    let (call, handle) = unsafe { (((*params).cb.send, (*params).user_data), (*params).memh) };
                    assert_eq!(handle.addr(), 64);
                    match piece {
                        Piece::Over(status) => ptr::without_provenance_mut(*status as isize as usize),
                        _ => {
                            calls.push(call);
                            ptr::without_provenance_mut(8192)
                        }
                    }
                });
                if !begun {
                    break;
                }
            }
        });
        (status, calls)
    }

    fn end((call, data): Call, status: ucs_status_t) {
        // SAFETY: what the library would do.
        unsafe { call.unwrap()(ptr::without_provenance_mut(8192), status, data) };
    }

    #[test]
    fn a_batch_ends_with_its_last_copy_and_gives_back_what_it_holds_once() {
        let (copies, owned) = (Copies::new(no_free), Rc::new(()));
        let over = Piece::Over(UCS_OK);
        for pieces in [&[over, over][..], &[]] {
            let (status, calls) = begin(&copies, &owned, pieces);
            assert!(status == Some(UCS_OK) && calls.is_empty());
        }
        assert_eq!(Rc::strong_count(&owned), 1);

        let (status, calls) = begin(&copies, &owned, &[over, Piece::Held, over, Piece::Held]);
        assert!(status.is_none() && calls.len() == 2);
        end(calls[1], UCS_OK);
        assert!(!copies.has_done());
        assert_eq!(Rc::strong_count(&owned), 2);
        end(calls[0], UCS_ERR_CANCELED);
        let done = copies.take();
        assert_eq!((done.len(), done[0].operation, done[0].status.get()), (1, 7, UCS_ERR_CANCELED));
        drop(done);
        assert!(!copies.has_done());
        assert_eq!(Rc::strong_count(&owned), 1);
    }

    #[test]
    fn behind_a_failure_nothing_is_begun_and_what_was_comes_to_its_end() {
        let (copies, owned) = (Copies::new(no_free), Rc::new(()));
        for wrong in [Piece::Over(UCS_ERR_NO_MEMORY), Piece::Outside] {
            let status = if let Piece::Over(status) = wrong { status } else { UCS_ERR_INVALID_PARAM };
            let (over, calls) = begin(&copies, &owned, &[wrong, Piece::Held]);
            assert!(over == Some(status) && calls.is_empty());
            let (over, calls) = begin(&copies, &owned, &[Piece::Held, wrong, Piece::Held]);
            assert!(over.is_none() && calls.len() == 1);
            end(calls[0], UCS_OK);
            let done = copies.take();
            assert_eq!((done.len(), done[0].status.get()), (1, status));
        }
        assert_eq!(Rc::strong_count(&owned), 1);
    }
}
