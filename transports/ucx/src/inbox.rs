//! What comes in: active messages are taken off UCX's hands at once, bytes of transfers straight into blocks.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::c_void;

use ucx_sys::{UCP_AM_RECV_ATTR_FLAG_RNDV, UCS_INPROGRESS, UCS_OK, ucp_am_recv_param_t, ucp_ep_h, ucs_status_t};

use crate::share::Share;
use crate::sink::{Body, Early, Sink, Wrong};
use crate::staging::Buffer;
use crate::wire::{HEADER_BYTES, Header, Kind, MESSAGE_BYTES_MAX};

/// Which transfer of which session bytes belong to: pulls and pushes are counted by different ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) session: u64,
    pub(crate) flow: Flow,
    pub(crate) tag: u64,
}

impl Key {
    /// Whose data follows a header, if it is of data.
    pub(crate) fn of(header: &Header) -> Option<Key> {
        let flow = match header.kind {
            Kind::PullData => Flow::Pull,
            Kind::PushData => Flow::Push,
            _ => return None,
        };
        Some(Key { session: header.session, flow, tag: header.tag })
    }

    /// What heads its data.
    pub(crate) fn header(self, number: u32) -> Header {
        let kind = match self.flow {
            Flow::Pull => Kind::PullData,
            Flow::Push => Kind::PushData,
        };
        Header { kind, number, session: self.session, tag: self.tag }
    }
}

/// Which way a transfer's data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Flow {
    /// From the responder to the initiator.
    Pull,
    /// From the initiator to the responder.
    Push,
}

/// What came, in order.
pub(crate) enum Arrival {
    /// A message other than data.
    Message { header: Header, body: Vec<u8> },
    /// A chunk was taken off the link; whose session, and which buffer of the link's staging it was in if it was read.
    Chunk { session: u64, place: Option<u32> },
    /// Every byte of a transfer is in place; in how many pieces.
    Whole { key: Key, pieces: u64 },
    /// The device fails to copy a transfer, of which no more is put.
    Uncopied { key: Key, reason: String },
    /// A chunk was announced.
    Announced(Rendezvous),
    /// A session's peer broke the rules.
    Breach { session: u64, reason: &'static str },
    /// A link failed.
    Broken { link: u64, status: ucs_status_t },
}

/// A chunk that a peer offers by rendezvous: UCX holds its description until it is received or declined, each of which takes this.
pub(crate) struct Rendezvous {
    pub(crate) header: Header,
    pub(crate) description: *mut c_void,
    pub(crate) bytes: usize,
}

/// Filled by UCX's callbacks during progress, emptied after it.
#[derive(Default)]
pub(crate) struct Inbox {
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    arrivals: Vec<Arrival>,
    sinks: BTreeMap<Key, Sink>,
    /// Those that a device empties.
    staged: BTreeSet<Key>,
    bytes: u64,
}

impl Inbox {
    pub(crate) fn add_sink(&self, key: Key, share: Share, bytes: u64) {
        let mut state = self.state.borrow_mut();
        if matches!(share, Share::Staged(_)) {
            state.staged.insert(key);
        }
        state.sinks.insert(key, Sink::new(share, bytes));
    }

    /// Goes on where a device has emptied slots, and has it empty those that were filled since.
    pub(crate) fn settle(&self) {
        let mut state = self.state.borrow_mut();
        for key in state.staged.iter().copied().collect::<Vec<_>>() {
            state.go_on(key);
        }
    }

    /// Whether [`Inbox::settle`] would get anywhere: a slot is free that somebody waited for, or the device is done with one.
    pub(crate) fn can_settle(&self) -> bool {
        let state = self.state.borrow();
        state.staged.iter().filter_map(|key| state.sinks.get(key)).any(Sink::can_go_on)
    }

    /// Puts no more bytes of a transfer anywhere; later ones are discarded.
    pub(crate) fn remove_sink(&self, key: Key) {
        self.state.borrow_mut().end(key);
    }

    /// Forgets every transfer of a session.
    pub(crate) fn remove_session(&self, session: u64) {
        let mut state = self.state.borrow_mut();
        let keys: Vec<Key> = state.sinks.keys().filter(|key| key.session == session).copied().collect();
        keys.into_iter().for_each(|key| state.end(key));
    }

    pub(crate) fn take(&self) -> Vec<Arrival> {
        std::mem::take(&mut self.state.borrow_mut().arrivals)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.state.borrow().arrivals.is_empty()
    }

    /// Bytes that were put into blocks since it was last asked.
    pub(crate) fn take_bytes(&self) -> u64 {
        std::mem::take(&mut self.state.borrow_mut().bytes)
    }

    fn heard(&self, message: &[u8]) {
        // Nothing is borrowed while UCX makes progress.
        let Ok(mut state) = self.state.try_borrow_mut() else { return };
        let Some((header, body)) = Header::decode(message) else { return };
        match Key::of(&header) {
            Some(key) => state.chunk(key, header.number, Body::Lent(body), None),
            None => state.arrivals.push(Arrival::Message { header, body: body.to_vec() }),
        }
    }

    /// Keeps an announcement; false where it means nothing.
    fn announced(&self, header: &[u8], description: *mut c_void, bytes: usize) -> bool {
        let Ok(mut state) = self.state.try_borrow_mut() else { return false };
        match Header::decode(header) {
            Some((header, [])) if Key::of(&header).is_some() => {
                state.arrivals.push(Arrival::Announced(Rendezvous { header, description, bytes }));
                true
            }
            _ => false,
        }
    }

    /// Whether any transfer's bytes are waited for.
    pub(crate) fn has_sinks(&self) -> bool {
        !self.state.borrow().sinks.is_empty()
    }

    /// Whether somebody waits for a transfer's bytes.
    pub(crate) fn wants(&self, key: Key) -> bool {
        self.state.borrow().sinks.contains_key(&key)
    }

    /// A chunk that was received by rendezvous, or read out of a buffer of the link's staging.
    pub(crate) fn brought(&self, header: Header, buffer: Buffer, place: Option<u32>) {
        if let (Some(key), Ok(mut state)) = (Key::of(&header), self.state.try_borrow_mut()) {
            state.chunk(key, header.number, Body::Own(buffer), place);
        }
    }

    /// Reported by an endpoint's error handler.
    pub(crate) fn broke(&self, link: u64, status: ucs_status_t) {
        if let Ok(mut state) = self.state.try_borrow_mut() {
            state.arrivals.push(Arrival::Broken { link, status });
        }
    }
}

impl State {
    /// Puts no more bytes of a transfer anywhere. What came early frees its place on the link.
    fn end(&mut self, key: Key) {
        self.staged.remove(&key);
        let early = self.sinks.remove(&key).map(Sink::into_early);
        let freed = |early: Early| Arrival::Chunk { session: key.session, place: early.place };
        self.arrivals.extend(early.into_iter().flatten().map(freed));
    }

    fn chunk(&mut self, key: Key, number: u32, body: Body<'_>, place: Option<u32>) {
        let mut freed = Vec::new();
        let put = match self.sinks.get_mut(&key) {
            Some(sink) => sink.take(number, body, place, &mut freed),
            // A chunk of a transfer that has ended here still frees its place on the link.
            None => {
                freed.push(place);
                Ok(0)
            }
        };
        self.note(key, freed, put);
        // A device has to empty the slots first.
        if self.sinks.get(&key).is_some_and(|sink| !self.staged.contains(&key) && sink.is_put()) {
            self.whole(key);
        }
    }

    /// Goes on with a transfer that waits for a device.
    fn go_on(&mut self, key: Key) {
        let Some(sink) = self.sinks.get_mut(&key) else { return };
        let mut freed = Vec::new();
        let put = sink.go_on(&mut freed).and_then(|put| Ok((put, sink.settle()?)));
        let is_whole = put.as_ref().is_ok_and(|(_, is_settled)| *is_settled);
        self.note(key, freed, put.map(|(put, _)| put));
        if is_whole {
            self.whole(key);
        }
    }

    /// Tells what came of putting bytes.
    fn note(&mut self, key: Key, freed: Vec<Option<u32>>, put: Result<u64, Wrong>) {
        let session = key.session;
        self.arrivals.extend(freed.into_iter().map(|place| Arrival::Chunk { session, place }));
        match put {
            Ok(bytes) => self.bytes += bytes,
            Err(Wrong::Breach(reason)) => {
                self.staged.remove(&key);
                self.sinks.remove(&key);
                self.arrivals.push(Arrival::Breach { session, reason });
            }
            Err(Wrong::Device(reason)) => {
                self.end(key);
                self.arrivals.push(Arrival::Uncopied { key, reason });
            }
        }
    }

    fn whole(&mut self, key: Key) {
        self.staged.remove(&key);
        if let Some(sink) = self.sinks.remove(&key) {
            self.arrivals.push(Arrival::Whole { key, pieces: sink.pieces() });
        }
    }
}

/// UCX's callback for every active message.
///
/// # Safety
/// `inbox` is the [`Inbox`] that the handler was set with, alive; `data` has `length` readable bytes for the time of the call.
pub(crate) unsafe extern "C" fn on_message(
    inbox: *mut c_void,
    header: *const c_void,
    header_bytes: usize,
    data: *mut c_void,
    length: usize,
    param: *const ucp_am_recv_param_t,
) -> ucs_status_t {
    // SAFETY: UCX passes its parameters; they live during the call.
    let attributes = unsafe { (*param).recv_attr };
    let eager = attributes & u64::from(UCP_AM_RECV_ATTR_FLAG_RNDV) == 0;
    if eager && header_bytes == 0 && length <= MESSAGE_BYTES_MAX && !data.is_null() {
        // SAFETY: as the caller promises.
        let (inbox, message) =
            unsafe { (&*inbox.cast::<Inbox>(), std::slice::from_raw_parts(data.cast::<u8>().cast_const(), length)) };
        inbox.heard(message);
    }
    if !eager && header_bytes == HEADER_BYTES && !header.is_null() && !data.is_null() {
        // SAFETY: as the caller promises; the header has so many readable bytes for the time of the call.
        let (inbox, header) =
            unsafe { (&*inbox.cast::<Inbox>(), std::slice::from_raw_parts(header.cast::<u8>(), header_bytes)) };
        if inbox.announced(header, data, length) {
            // UCX keeps the description.
            return UCS_INPROGRESS;
        }
    }
    UCS_OK
}

/// What an endpoint's error handler is given. Boxed by its endpoint until the endpoint is closed.
pub(crate) struct Mark {
    pub(crate) inbox: std::rc::Rc<Inbox>,
    pub(crate) link: u64,
}

/// UCX's callback for an endpoint that failed.
///
/// # Safety
/// `mark` is the [`Mark`] that the endpoint was created with, alive.
pub(crate) unsafe extern "C" fn on_error(mark: *mut c_void, _endpoint: ucp_ep_h, status: ucs_status_t) {
    // SAFETY: as the caller promises.
    let mark = unsafe { &*mark.cast::<Mark>() };
    mark.inbox.broke(mark.link, status);
}

#[cfg(test)]
mod tests;
