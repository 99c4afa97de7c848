//! What comes in: active messages are taken off UCX's hands at once, bytes of transfers straight into blocks.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::c_void;

use kvferry_transport::{Cursor, StagedIn};
use ucx_sys::{UCP_AM_RECV_ATTR_FLAG_RNDV, UCS_INPROGRESS, UCS_OK, ucp_am_recv_param_t, ucp_ep_h, ucs_status_t};

use crate::share::Share;
use crate::staging::Buffer;
use crate::wire::{HEADER_BYTES, Header, Kind, MESSAGE_BYTES_MAX};

/// Chunks of one transfer that came before an earlier one.
const EARLY_MAX: usize = 64;

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

/// Where a transfer is put.
struct Sink {
    way: Way,
    left: u64,
    /// The chunk that is put next.
    next: u32,
    early: BTreeMap<u32, Early>,
}

enum Way {
    /// Into blocks, by this thread.
    Direct(Box<Cursor>),
    /// Into slots of a stage, which the device empties.
    Staged(Box<StagedIn>),
}

/// What ends a transfer that is being put.
#[derive(Debug, PartialEq, Eq)]
enum Wrong {
    /// Its peer broke the rules.
    Breach(&'static str),
    /// The device does not copy.
    Device(String),
}

/// A chunk's bytes.
enum Body<'a> {
    /// UCX's, for the time of a call.
    Lent(&'a [u8]),
    Own(Buffer),
}

impl Body<'_> {
    fn bytes(&self) -> &[u8] {
        match self {
            Body::Lent(bytes) => bytes,
            Body::Own(buffer) => buffer,
        }
    }

    fn keep(self) -> Buffer {
        match self {
            Body::Lent(bytes) => bytes.to_vec().into(),
            Body::Own(buffer) => buffer,
        }
    }
}

/// A chunk that came before one that is put ahead of it, or that lacks room.
struct Early {
    body: Buffer,
    /// Bytes of it that were put.
    put: usize,
    place: Option<u32>,
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
        let way = match share {
            Share::Direct(cursor) => Way::Direct(cursor),
            Share::Staged(staged) => {
                state.staged.insert(key);
                Way::Staged(Box::new(StagedIn::new(staged)))
            }
        };
        state.sinks.insert(key, Sink { way, left: bytes, next: 0, early: BTreeMap::new() });
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
        let early = self.sinks.remove(&key).map(|sink| sink.early).unwrap_or_default();
        let freed = |early: Early| Arrival::Chunk { session: key.session, place: early.place };
        self.arrivals.extend(early.into_values().map(freed));
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
        if self.sinks.get(&key).is_some_and(|sink| matches!(sink.way, Way::Direct(_)) && sink.is_put()) {
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

impl Sink {
    /// Puts a chunk in place, or keeps it until the ones before it are there: reads end in any order, and UCX does not promise that messages come
    /// in theirs. Says how many bytes were put; for each chunk that was, which buffer it was in goes to `freed`, in order.
    fn take(
        &mut self,
        number: u32,
        body: Body<'_>,
        place: Option<u32>,
        freed: &mut Vec<Option<u32>>,
    ) -> Result<u64, Wrong> {
        // The next one is kept, too, where it lacks room.
        if number != self.next || self.early.contains_key(&number) {
            let ahead = number.checked_sub(self.next).filter(|ahead| (*ahead as usize) < EARLY_MAX);
            if ahead.is_none() || self.early.insert(number, Early { body: body.keep(), put: 0, place }).is_some() {
                return Err(Wrong::Breach("a chunk came twice, or far too early"));
            }
            return Ok(0);
        }
        let put = self.put(body.bytes()).inspect_err(|_| freed.push(place))?;
        if put < body.bytes().len() {
            self.early.insert(number, Early { body: body.keep(), put, place });
            return Ok(put as u64);
        }
        self.next = self.next.wrapping_add(1);
        freed.push(place);
        Ok(put as u64 + self.go_on(freed)?)
    }

    /// Puts what was kept and is next, as far as there is room.
    fn go_on(&mut self, freed: &mut Vec<Option<u32>>) -> Result<u64, Wrong> {
        let mut all = 0;
        while let Some(mut next) = self.early.remove(&self.next) {
            let rest = next.body.get(next.put..).unwrap_or_default();
            let lacks = rest.len();
            let put = self.put(rest).inspect_err(|_| freed.push(next.place))?;
            all += put as u64;
            if put < lacks {
                next.put += put;
                self.early.insert(self.next, next);
                break;
            }
            self.next = self.next.wrapping_add(1);
            freed.push(next.place);
        }
        Ok(all)
    }

    /// Puts bytes of the chunk that is next; says how many there was room for.
    fn put(&mut self, body: &[u8]) -> Result<usize, Wrong> {
        let bytes = body.len() as u64;
        if bytes > self.left || (bytes == 0 && self.left > 0) {
            return Err(Wrong::Breach("a chunk does not fit the transfer that it is of"));
        }
        let put = match &mut self.way {
            Way::Direct(cursor) => put_straight(cursor, body)?,
            Way::Staged(staged) => staged.put(body).map_err(Wrong::Device)?,
        };
        self.left -= put as u64;
        Ok(put)
    }

    /// Has the device empty what is filled. Says whether every byte of the transfer is in place.
    fn settle(&mut self) -> Result<bool, Wrong> {
        let is_put = self.is_put();
        match &mut self.way {
            Way::Direct(_) => Ok(is_put),
            Way::Staged(staged) => {
                staged.flush().map_err(Wrong::Device)?;
                Ok(staged.settle().map_err(Wrong::Device)? && is_put)
            }
        }
    }

    /// Whether a chunk that was kept could be put, or a slot be let go of.
    fn can_go_on(&self) -> bool {
        match &self.way {
            Way::Direct(_) => false,
            Way::Staged(staged) => {
                staged.has_settled() || (self.early.contains_key(&self.next) && !staged.is_stalled())
            }
        }
    }

    /// Whether every chunk came and was put. One without bytes is a transfer's only one.
    fn is_put(&self) -> bool {
        self.left == 0 && self.early.is_empty() && self.next > 0
    }

    fn pieces(&self) -> u64 {
        match &self.way {
            Way::Direct(cursor) => cursor.pieces(),
            Way::Staged(staged) => staged.chunks(),
        }
    }
}

/// Puts all bytes of a chunk into blocks.
fn put_straight(cursor: &mut Cursor, mut body: &[u8]) -> Result<usize, Wrong> {
    let bytes = body.len();
    while !body.is_empty() {
        let Some(piece) = cursor.take(body.len()) else {
            return Err(Wrong::Breach("a program ended before the bytes that came for it"));
        };
        let (now, rest) = body.split_at(piece.bytes.min(body.len()));
        // SAFETY: the piece lies in the cursor's pool, which the cursor keeps alive, and has as many bytes; `now` is a message of UCX's
        // or ours, never pool memory. No reference covers the piece.
        unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), piece.at, now.len()) };
        body = rest;
    }
    Ok(bytes)
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
mod tests {
    use std::sync::Arc;

    use kvferry_core::{End, PoolId, TransportKind};
    use kvferry_transport::conformance::{OnDevice, block_planes, whole_blocks};
    use kvferry_transport::{Device, Options, Pool, PoolOptions, Provider, Stage, Staged};

    use super::*;

    const KEY: Key = Key { session: 5, flow: Flow::Pull, tag: 9 };

    /// Two blocks of 32 bytes, and a cursor over both.
    fn cursor() -> (Pool, Share) {
        let layout = block_planes(1, 2, 32);
        let options = PoolOptions { huge_pages: false, ..PoolOptions::default() };
        let pool = Pool::allocate_with(PoolId(1), layout.clone(), "inbox", &options).unwrap();
        let program = whole_blocks(1, 16, 32, 0..2, 0..2);
        let range = program.whole();
        let cursor = Cursor::new(pool.clone(), Arc::new(layout), Arc::new(program), End::Destination, range);
        (pool, Share::Direct(Box::new(cursor)))
    }

    fn header(number: u32) -> Header {
        Header { kind: Kind::PullData, number, session: KEY.session, tag: KEY.tag }
    }

    /// In which buffer each was, and how many transfers are whole.
    fn chunks(inbox: &Inbox) -> (Vec<Option<u32>>, usize) {
        let (mut places, mut whole) = (Vec::new(), 0);
        for arrival in inbox.take() {
            match arrival {
                Arrival::Chunk { place, .. } => places.push(place),
                Arrival::Whole { .. } => whole += 1,
                _ => {}
            }
        }
        (places, whole)
    }

    #[test]
    fn a_chunk_keeps_its_place_on_the_link_until_it_is_put() {
        let inbox = Inbox::default();
        let (pool, cursor) = cursor();
        inbox.add_sink(KEY, cursor, 64);
        inbox.brought(header(1), vec![2; 32].into(), Some(5));
        assert_eq!((chunks(&inbox), inbox.take_bytes()), ((Vec::new(), 0), 0));
        inbox.brought(header(0), vec![1; 32].into(), None);
        assert_eq!((chunks(&inbox), inbox.take_bytes()), ((vec![None, Some(5)], 1), 64));
        let mut bytes = [0; 32];
        for block in 0..2 {
            pool.read(0, block, 0, &mut bytes).unwrap();
            assert_eq!(bytes, [1 + block as u8; 32]);
        }
    }

    #[test]
    fn what_came_early_for_a_transfer_that_ends_frees_its_place() {
        for of_session in [false, true] {
            let inbox = Inbox::default();
            inbox.add_sink(KEY, cursor().1, 64);
            inbox.brought(header(1), vec![2; 16].into(), Some(0));
            inbox.brought(header(2), vec![3; 16].into(), Some(7));
            if of_session {
                inbox.remove_session(KEY.session)
            } else {
                inbox.remove_sink(KEY)
            }
            assert_eq!(chunks(&inbox), (vec![Some(0), Some(7)], 0));
            inbox.brought(header(0), vec![1; 32].into(), Some(3));
            assert_eq!((chunks(&inbox), inbox.take_bytes()), ((vec![Some(3)], 0), 0), "nobody waits for it");
        }
    }

    fn all(_: PoolId) -> bool {
        true
    }

    /// Two blocks of 32 KiB in a device's memory, with one slot of a page for what comes.
    fn staged() -> (Pool, Stage, Share) {
        let device = Device { kind: TransportKind::Ucx, name: "memory".to_owned(), unavailable: None };
        let memory = OnDevice::new(crate::UcxProvider::new(), all, 4096, 2);
        let pool = memory.allocate(&device, PoolId(1), block_planes(1, 2, BLOCK), "inbox").unwrap();
        let options = Options { staged_chunk_bytes: 4096, staged_chunks: 2, ..Options::default() };
        let stage = Stage::open(&pool, &options).unwrap();
        let program = Arc::new(whole_blocks(1, 16, BLOCK, 0..2, 0..2));
        let share = Share::Staged(Staged::new(&stage, &program, program.whole()));
        (pool, stage, share)
    }

    const BLOCK: u64 = 32 << 10;

    fn breaches(inbox: &Inbox) -> usize {
        inbox.take().iter().filter(|arrival| matches!(arrival, Arrival::Breach { .. })).count()
    }

    #[test]
    fn a_chunk_that_lacks_room_keeps_its_place_until_the_device_has_emptied_slots() {
        let inbox = Inbox::default();
        let (pool, stage, share) = staged();
        inbox.add_sink(KEY, share, 2 * BLOCK);
        inbox.brought(header(1), vec![2; BLOCK as usize].into(), Some(1));
        inbox.brought(header(0), vec![1; BLOCK as usize].into(), Some(0));
        assert_eq!((chunks(&inbox), inbox.take_bytes()), ((Vec::new(), 0), 4096), "one slot is there");
        let (mut places, mut whole, mut bytes) = (Vec::new(), 0, 4096);
        while whole == 0 {
            stage.poll();
            inbox.settle();
            let (more, is_whole) = chunks(&inbox);
            places.extend(more);
            bytes += inbox.take_bytes();
            whole += is_whole;
            assert!(whole == 0 || !stage.is_busy().0, "whole before the last copy's end");
            // Whoever sleeps while no copy runs would sleep for ever.
            assert!(whole > 0 || stage.is_busy().0 || inbox.can_settle());
        }
        assert_eq!((places, bytes), (vec![Some(0), Some(1)], 2 * BLOCK));
        let mut bytes = vec![0; BLOCK as usize];
        for block in 0..2 {
            pool.read(0, block, 0, &mut bytes).unwrap();
            assert!(bytes.iter().all(|byte| *byte == 1 + block as u8));
        }
    }

    #[test]
    fn a_peer_that_sends_what_it_has_no_place_for_is_a_breach_while_slots_lack_too() {
        let again = |inbox: &Inbox| inbox.brought(header(0), vec![1; BLOCK as usize].into(), None);
        let far = |inbox: &Inbox| inbox.brought(header(EARLY_MAX as u32), vec![1; 10].into(), None);
        let none = |inbox: &Inbox| {
            inbox.brought(header(1), Vec::new().into(), None);
        };
        let long = |inbox: &Inbox| inbox.brought(header(1), vec![1; BLOCK as usize + 1].into(), None);
        for (what, act) in [again as fn(&Inbox), far, none, long].into_iter().enumerate() {
            let inbox = Inbox::default();
            let (_pool, stage, share) = staged();
            inbox.add_sink(KEY, share, 2 * BLOCK);
            inbox.brought(header(0), vec![1; BLOCK as usize].into(), None);
            act(&inbox);
            let mut found = breaches(&inbox);
            while found == 0 {
                stage.poll();
                inbox.settle();
                found = breaches(&inbox);
                assert!(found > 0 || inbox.has_sinks(), "act {what} passed");
            }
            assert!(!inbox.has_sinks(), "act {what}");
            while stage.left(End::Destination) == 0 {
                stage.poll();
            }
        }
    }

    #[test]
    fn what_came_for_a_device_and_is_not_wanted_any_more_frees_its_places_and_slots() {
        let inbox = Inbox::default();
        let (_pool, stage, share) = staged();
        inbox.add_sink(KEY, share, 2 * BLOCK);
        inbox.brought(header(0), vec![1; BLOCK as usize].into(), Some(4));
        inbox.settle();
        inbox.remove_sink(KEY);
        assert_eq!(chunks(&inbox), (vec![Some(4)], 0));
        assert!(stage.left(End::Destination) == 0 && stage.is_busy().0, "a copy runs in it");
        while stage.left(End::Destination) == 0 {
            stage.poll();
        }
        inbox.settle();
        assert_eq!(chunks(&inbox), (Vec::new(), 0));
    }
}
