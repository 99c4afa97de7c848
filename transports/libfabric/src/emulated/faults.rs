//! The library that is here, whose queues report errors when they are told to: as a provider does of a whole endpoint, and of one operation.

#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::sync::OnceLock;

use kvferry_topology::Counters;
use kvferry_transport::{Device, OpenError, Options, PackedBy, Provider, Transport, TransportKind};
use libfabric_sys::{
    FI_EAVAIL, FI_EIO, fi_cq_attr, fi_cq_err_entry, fi_cq_msg_entry, fi_eq_attr, fi_eq_err_entry, fi_fabric_attr,
    fi_info, fid_cq, fid_domain, fid_eq, fid_fabric,
};

use super::calls::{original, replace};
use super::in_front_of;
use crate::hmem;
use crate::library::Library;
use crate::provider;

/// The provider's own number of every error: EFA's of a peer's bad key.
pub(crate) const NUMBER: c_int = 4111;
const ERROR_AVAILABLE: isize = -(FI_EAVAIL as isize);

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The event queue has an error of the endpoint.
    Event,
    /// The next completion is one in error.
    Completion,
    /// The completion queue cannot be read any more.
    Queue,
}

/// The queues of one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Queues {
    domain: usize,
    completions: usize,
    events: usize,
}

#[derive(Default)]
struct Faults {
    /// Those of every endpoint, in the order in which they were opened.
    opened: Vec<Queues>,
    /// A domain, and the completion queue that was opened last in it.
    half: (usize, usize),
    next: Option<(Queues, Fault)>,
    /// Of the operation whose completion was turned into an error.
    context: usize,
    /// How many were reported.
    reported: usize,
}

thread_local! {
    static FAULTS: RefCell<Faults> = RefCell::default();
}

fn faults<R>(f: impl FnOnce(&mut Faults) -> R) -> R {
    FAULTS.with(|faults| f(&mut faults.borrow_mut()))
}

/// The endpoint that this thread opened last.
pub(crate) fn newest() -> Queues {
    faults(|faults| *faults.opened.last().unwrap())
}

/// The endpoint that was opened last in the domain of that one.
pub(crate) fn newest_beside(known: Queues) -> Queues {
    faults(|faults| *faults.opened.iter().rfind(|queues| queues.domain == known.domain).unwrap())
}

/// Has an endpoint fail, once, when it is polled next.
pub(crate) fn fail(queues: Queues, fault: Fault) {
    faults(|faults| faults.next = Some((queues, fault)));
}

/// How many errors were reported on this thread.
pub(crate) fn reported() -> usize {
    faults(|faults| faults.reported)
}

/// Opens devices of that library. Its caller has looked whether there is one.
pub(crate) struct Faulty(pub(crate) &'static str);

impl Provider for Faulty {
    fn kind(&self) -> TransportKind {
        TransportKind::Libfabric
    }

    fn discover(&self) -> Vec<Device> {
        vec![Device { kind: TransportKind::Libfabric, name: self.0.to_owned(), unavailable: None }]
    }

    fn open(&self, device: &Device, options: &Options) -> Result<Box<dyn Transport>, OpenError> {
        let domain = hmem::open(library(), &device.name, false, false).unwrap();
        // Read where it lies: packed chunks are another path.
        let options = Options { packed_by: PackedBy::Read, packed_below_bytes: Some(0), ..options.clone() };
        Ok(Box::new(provider::open(&domain, &device.name, &options, Counters::default())?))
    }
}

fn library() -> &'static Library {
    static MADE: OnceLock<&'static Library> = OnceLock::new();
    MADE.get_or_init(|| {
        let real = Library::find().unwrap();
        in_front_of(real, real.version, |api| api.fi_fabric = Ok(fabric))
    })
}

unsafe extern "C" fn fabric(attr: *mut fi_fabric_attr, out: *mut *mut fid_fabric, context: *mut c_void) -> c_int {
    // SAFETY: the caller's arguments.
    unsafe {
        let status = Library::find().unwrap().api.fi_fabric.as_ref().unwrap()(attr, out, context);
        if status == 0 {
            replace(&mut (**out).ops, |ops| {
                ops.domain = Some(domain);
                ops.eq_open = Some(open_events);
            });
        }
        status
    }
}

unsafe extern "C" fn domain(
    fabric: *mut fid_fabric,
    info: *mut fi_info,
    out: *mut *mut fid_domain,
    context: *mut c_void,
) -> c_int {
    // SAFETY: the caller's arguments.
    unsafe {
        let status = original((*fabric).ops).domain.unwrap()(fabric, info, out, context);
        if status == 0 {
            replace(&mut (**out).ops, |ops| ops.cq_open = Some(open_completions));
        }
        status
    }
}

/// Opened before the event queue of its endpoint.
unsafe extern "C" fn open_completions(
    domain: *mut fid_domain,
    attr: *mut fi_cq_attr,
    out: *mut *mut fid_cq,
    context: *mut c_void,
) -> c_int {
    // SAFETY: the caller's arguments.
    unsafe {
        let status = original((*domain).ops).cq_open.unwrap()(domain, attr, out, context);
        if status == 0 {
            replace(&mut (**out).ops, |ops| {
                ops.read = Some(read_completions);
                ops.readerr = Some(read_error);
            });
            faults(|faults| faults.half = (domain as usize, *out as usize));
        }
        status
    }
}

unsafe extern "C" fn open_events(
    fabric: *mut fid_fabric,
    attr: *mut fi_eq_attr,
    out: *mut *mut fid_eq,
    context: *mut c_void,
) -> c_int {
    // SAFETY: the caller's arguments.
    unsafe {
        let status = original((*fabric).ops).eq_open.unwrap()(fabric, attr, out, context);
        if status == 0 {
            replace(&mut (**out).ops, |ops| {
                ops.read = Some(read_event);
                ops.readerr = Some(read_event_error);
            });
            faults(|faults| {
                let (domain, completions) = faults.half;
                faults.opened.push(Queues { domain, completions, events: *out as usize });
            });
        }
        status
    }
}

/// What goes wrong at that queue now.
fn due(is_its: impl Fn(&Queues) -> bool, wanted: &[Fault]) -> Option<Fault> {
    faults(|faults| {
        faults.next.filter(|(queues, fault)| is_its(queues) && wanted.contains(fault)).map(|(_, fault)| fault)
    })
}

fn is_reported() {
    faults(|faults| {
        faults.next = None;
        faults.reported += 1;
    });
}

unsafe extern "C" fn read_completions(queue: *mut fid_cq, buffer: *mut c_void, count: usize) -> isize {
    let fault = due(|queues| queues.completions == queue as usize, &[Fault::Completion, Fault::Queue]);
    // SAFETY: the caller's arguments; of one entry there is always room.
    unsafe {
        let read = original((*queue).ops).read.unwrap();
        match fault {
            None => read(queue, buffer, count),
            Some(Fault::Queue) => {
                is_reported();
                -(FI_EIO as isize)
            }
            Some(_) => {
                let got = read(queue, buffer, 1);
                if got != 1 {
                    return got;
                }
                let context = (*buffer.cast::<fi_cq_msg_entry>()).op_context;
                faults(|faults| faults.context = context as usize);
                ERROR_AVAILABLE
            }
        }
    }
}

unsafe extern "C" fn read_error(queue: *mut fid_cq, entry: *mut fi_cq_err_entry, flags: u64) -> isize {
    let is_ours = due(|queues| queues.completions == queue as usize, &[Fault::Completion]).is_some();
    let context = faults(|faults| std::mem::take(&mut faults.context));
    // SAFETY: the caller's arguments.
    unsafe {
        if !is_ours || context == 0 {
            return original((*queue).ops).readerr.unwrap()(queue, entry, flags);
        }
        is_reported();
        (*entry).op_context = std::ptr::with_exposed_provenance_mut(context);
        ((*entry).err, (*entry).prov_errno) = (FI_EIO.cast_signed(), NUMBER);
    }
    1
}

unsafe extern "C" fn read_event(
    queue: *mut fid_eq,
    event: *mut u32,
    buffer: *mut c_void,
    bytes: usize,
    flags: u64,
) -> isize {
    if due(|queues| queues.events == queue as usize, &[Fault::Event]).is_some() {
        return ERROR_AVAILABLE;
    }
    // SAFETY: the caller's arguments.
    unsafe { original((*queue).ops).read.unwrap()(queue, event, buffer, bytes, flags) }
}

unsafe extern "C" fn read_event_error(queue: *mut fid_eq, entry: *mut fi_eq_err_entry, flags: u64) -> isize {
    // SAFETY: the caller's arguments.
    unsafe {
        if due(|queues| queues.events == queue as usize, &[Fault::Event]).is_none() {
            return original((*queue).ops).readerr.unwrap()(queue, entry, flags);
        }
        is_reported();
        ((*entry).err, (*entry).prov_errno) = (FI_EIO.cast_signed(), NUMBER);
    }
    size_of::<fi_eq_err_entry>() as isize
}
