//! Frames as messages of the device's well-known endpoint: sessions with peers, their calls, their life signs, their end.

mod carrier;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::RawFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use kvferry_local::{Alarm, Carrier};
use kvferry_transport::PeerId;
use kvferry_transport::codec::random;
use libfabric_sys::{FI_RECV, FI_SEND};

use crate::domain::Domain;
use crate::endpoint::{Done, Endpoint, Posted};
use crate::session::{Incoming, Outgoing};
use crate::slab::Slab;
use crate::wire::{ANSWER, Call, HEADER_BYTES, Header, KEY_BYTES, Kind, MESSAGE_BYTES_MAX, Place};

/// Messages that may come before one of them is looked at.
const RECEIVES_MAX: usize = 128;
/// Messages that may be on their way out.
const SENDS_MAX: usize = 512;
/// Of them to one peer: one that takes nothing must not starve the others.
const SENDS_PER_PEER: u32 = 16;
/// Sessions that peers may have open here.
const SESSIONS_MAX: usize = 4096;
/// A peer that says nothing for so long is asked for a sign of life.
const ASK_AFTER: Duration = Duration::from_secs(1);
/// A peer that says nothing for so long is lost.
const LOST_AFTER: Duration = Duration::from_secs(15);
/// How long a session that was ended here may take over its last words.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Parts that may wait for a peer to take earlier ones: several of the longest frames.
const OUTGOING_PARTS_MAX: usize = 1 << 16;
/// Completions that are taken in one poll.
const DONE_MAX: usize = 256;

/// The well-known endpoint and the sessions over it.
pub(crate) struct Messages {
    domain: Rc<Domain>,
    endpoint: Endpoint<Buffer>,
    slab: Rc<Slab>,
    /// Bytes behind a header.
    body_bytes: usize,
    /// Buffers to receive into that are not posted.
    idle_receives: Vec<u32>,
    free_sends: Vec<u32>,
    place: Place,
    alarm: Alarm,
    sessions: BTreeMap<PeerId, Session>,
    numbers: BTreeMap<u64, PeerId>,
    /// Peers' endpoints by their addresses.
    addresses: BTreeMap<u64, Known>,
    next_peer: u32,
    /// Who has something to say.
    unflushed: BTreeSet<PeerId>,
    /// Who may have something that is whole.
    speaking: VecDeque<PeerId>,
    called: VecDeque<PeerId>,
    done: Vec<Done<Buffer>>,
    /// No session has to be looked after before this.
    next_care: Option<Instant>,
}

/// A buffer of the slab, in use.
#[derive(Clone, Copy, Debug)]
enum Buffer {
    In(u32),
    /// With the peer's address.
    Out(u32, PeerId, u64),
}

/// A peer's endpoint.
struct Known {
    name: Vec<u8>,
    sessions: u32,
    /// Messages on their way to it, also of sessions that are over.
    sends: u32,
}

/// One session, as this end sees it.
struct Session {
    number: u64,
    /// What messages to the peer carry, once it has told.
    theirs: Option<u64>,
    name: Vec<u8>,
    address: u64,
    /// What is said before parts, with its header's kind and flags.
    controls: VecDeque<(Kind, u8, Vec<u8>)>,
    outgoing: Outgoing,
    incoming: Incoming,
    sends: u32,
    heard: Instant,
    asked: Option<Instant>,
    /// Why it is of no further use, once what has come is taken.
    broken: Option<String>,
    /// It was ended here, and is to be forgotten by then.
    ending: Option<Instant>,
}

impl Messages {
    pub(crate) fn open(domain: &Rc<Domain>) -> Result<Messages, String> {
        let each = MESSAGE_BYTES_MAX.min(domain.info.message_bytes_max());
        let receives = RECEIVES_MAX.min(domain.info.receive_size().max(1)) as u32;
        let sends = SENDS_MAX.min(domain.info.transmit_size().max(1)) as u32;
        let slab = Rc::new(Slab::new(domain, receives + sends, each, FI_SEND | FI_RECV)?);
        let mut endpoint = Endpoint::open(domain, receives + sends)?;
        endpoint.keep(&slab);
        let drawn = || random::<KEY_BYTES>().map_err(|error| format!("no random bytes: {error}"));
        let place = Place {
            provider: domain.info.provider(),
            name: endpoint.name().to_vec(),
            instance: drawn()?,
            secret: drawn()?,
        };
        let alarm = Alarm::new().map_err(|error| format!("making a timer: {}", std::io::Error::from(error)))?;
        domain.also_watch(&alarm)?;
        let mut messages = Messages {
            domain: domain.clone(),
            endpoint,
            slab,
            body_bytes: each.saturating_sub(HEADER_BYTES),
            idle_receives: (0..receives).collect(),
            free_sends: (receives..receives + sends).collect(),
            place,
            alarm,
            sessions: BTreeMap::new(),
            numbers: BTreeMap::new(),
            addresses: BTreeMap::new(),
            next_peer: 0,
            unflushed: BTreeSet::new(),
            speaking: VecDeque::new(),
            called: VecDeque::new(),
            done: Vec::new(),
            next_care: None,
        };
        messages.receive();
        Ok(messages)
    }

    /// The endpoint that peers find.
    pub(crate) fn name(&self) -> &[u8] {
        &self.place.name
    }

    /// The descriptor of that endpoint's completion queue.
    pub(crate) fn descriptor(&self) -> Option<RawFd> {
        self.endpoint.descriptor()
    }

    /// Whether the provider emulates reads, where it tells.
    pub(crate) fn emulates_reads(&self) -> Option<bool> {
        self.endpoint.emulates_reads()
    }

    /// Posts what is free to receive into.
    fn receive(&mut self) {
        let (bytes, desc) = (self.body_bytes + HEADER_BYTES, self.slab.desc());
        while let Some(number) = self.idle_receives.pop() {
            let Some(buffer) = self.slab.buffer(number) else { continue };
            // SAFETY: the buffer is the slab's, in nobody's use, and the endpoint keeps the slab.
            match unsafe { self.endpoint.receive(buffer, bytes, desc, Buffer::In(number)) } {
                Posted::Yes => {}
                Posted::Later(_) => return self.idle_receives.push(number),
                Posted::Never(_, reason) => {
                    tracing::warn!(reason, "no message can be received");
                    return self.idle_receives.push(number);
                }
            }
        }
    }

    fn begin(&mut self, name: Vec<u8>, theirs: Option<u64>, number: u64) -> Result<PeerId, String> {
        let address = match self.addresses.iter_mut().find(|(_, known)| known.name == name) {
            Some((address, known)) => {
                known.sessions += 1;
                *address
            }
            None => {
                let address = self.endpoint.insert(&name)?;
                self.addresses.insert(address, Known { name: name.clone(), sessions: 1, sends: 0 });
                address
            }
        };
        let peer = PeerId(self.next_peer);
        self.next_peer = self.next_peer.wrapping_add(1);
        let now = Instant::now();
        let session = Session {
            number,
            theirs,
            name,
            address,
            controls: VecDeque::new(),
            outgoing: Outgoing::default(),
            incoming: Incoming::default(),
            sends: 0,
            heard: now,
            asked: None,
            broken: None,
            ending: None,
        };
        self.sessions.insert(peer, session);
        self.numbers.insert(number, peer);
        self.care_by(now + ASK_AFTER);
        Ok(peer)
    }

    fn care_by(&mut self, at: Instant) {
        self.next_care = Some(self.next_care.map_or(at, |earlier| earlier.min(at)));
    }

    fn forget(&mut self, peer: PeerId) {
        let Some(session) = self.sessions.remove(&peer) else { return };
        self.numbers.remove(&session.number);
        self.unflushed.remove(&peer);
        if let Some(known) = self.addresses.get_mut(&session.address) {
            known.sessions = known.sessions.saturating_sub(1);
        }
        self.let_go(session.address);
    }

    /// Has the provider forget an address that nobody uses, and to which nothing is under way.
    fn let_go(&mut self, address: u64) {
        if self.addresses.get(&address).is_some_and(|known| known.sessions == 0 && known.sends == 0) {
            self.addresses.remove(&address);
            self.endpoint.remove(address);
        }
    }

    fn breaks(&mut self, peer: PeerId, reason: String) {
        let Some(session) = self.sessions.get_mut(&peer) else { return };
        if session.ending.is_some() {
            return self.forget(peer);
        }
        session.broken.get_or_insert(reason);
        self.speaking.push_back(peer);
    }

    /// Takes completions, and what they brought.
    fn progress(&mut self) {
        let mut done = std::mem::take(&mut self.done);
        let polled = self.endpoint.poll(&mut done, DONE_MAX);
        for Done { operation, result } in done.drain(..) {
            match (operation, result) {
                (Buffer::In(number), result) => {
                    self.idle_receives.push(number);
                    match result {
                        Ok(bytes) => {
                            let message = self.slab.read(number, bytes);
                            self.handle(&message);
                        }
                        Err(reason) => tracing::debug!(reason, "a message did not come whole"),
                    }
                }
                (Buffer::Out(number, peer, address), result) => {
                    self.free_sends.push(number);
                    if let Some(known) = self.addresses.get_mut(&address) {
                        known.sends = known.sends.saturating_sub(1);
                    }
                    self.let_go(address);
                    let Some(session) = self.sessions.get_mut(&peer) else { continue };
                    session.sends = session.sends.saturating_sub(1);
                    self.unflushed.insert(peer);
                    if let Err(reason) = result {
                        self.breaks(peer, format!("a message did not reach it: {reason}"));
                    }
                }
            }
        }
        self.done = done;
        self.receive();
        // Whose fault it is, neither of them says.
        if let Some(reason) = polled.err().or_else(|| self.endpoint.error()) {
            tracing::warn!(
                device = self.domain.info.domain(),
                reason,
                "the provider reports an error; peers are let go"
            );
            let all: Vec<PeerId> = self.sessions.keys().copied().collect();
            for peer in all {
                self.breaks(peer, format!("the provider reports an error: {reason}"));
            }
        }
    }

    fn handle(&mut self, message: &[u8]) {
        let Some((header, body)) = Header::decode(message) else {
            return tracing::debug!(bytes = message.len(), "a message of nobody's");
        };
        if header.kind == Kind::Call {
            if let Err(reason) = self.answer(body) {
                tracing::debug!(reason, "a call was not answered");
            }
            return;
        }
        // Of a session that is over.
        let Some(&peer) = self.numbers.get(&header.session) else { return };
        let Some(session) = self.sessions.get_mut(&peer) else { return };
        session.heard = Instant::now();
        session.asked = None;
        let taken = match header.kind {
            Kind::Call => Ok(()),
            Kind::Accept => match <[u8; 8]>::try_from(body) {
                Ok(theirs) if session.theirs.is_none() => {
                    session.theirs = Some(u64::from_le_bytes(theirs));
                    self.unflushed.insert(peer);
                    Ok(())
                }
                _ => Err("it accepted what was not asked".to_owned()),
            },
            Kind::Data => session.incoming.arrived(header.sequence, header.flags, body),
            Kind::Ack => {
                // One answer is as good as several.
                if header.flags & ANSWER != 0 && !session.controls.iter().any(|(kind, ..)| *kind == Kind::Ack) {
                    session.controls.push_back((Kind::Ack, 0, Vec::new()));
                }
                self.unflushed.insert(peer);
                session.outgoing.peer_took(header.sequence)
            }
        };
        let speaks = session.incoming.has_parts();
        match taken {
            Err(reason) => self.breaks(peer, reason),
            Ok(()) if speaks && !self.speaking.contains(&peer) => self.speaking.push_back(peer),
            Ok(()) => {}
        }
    }

    /// Opens this end of a session that a peer asks for.
    fn answer(&mut self, body: &[u8]) -> Result<(), String> {
        let call = Call::open(body, &self.place.secret)?;
        if call.to != self.place.instance {
            return Err("it is meant for another transport".to_owned());
        }
        if self.sessions.len() >= SESSIONS_MAX {
            return Err(format!("{SESSIONS_MAX} sessions are open"));
        }
        let is_known = |session: &Session| session.theirs == Some(call.session) && session.name == call.name;
        if self.sessions.values().any(is_known) {
            return Ok(());
        }
        let number = random::<8>().map_err(|error| format!("no random number: {error}"))?;
        let number = u64::from_le_bytes(number);
        let peer = self.begin(call.name, Some(call.session), number)?;
        if let Some(session) = self.sessions.get_mut(&peer) {
            session.controls.push_back((Kind::Accept, 0, number.to_le_bytes().to_vec()));
        }
        self.unflushed.insert(peer);
        self.called.push_back(peer);
        Ok(())
    }

    /// Says what one session has to say, as far as it may. `false` when the endpoint takes no more.
    fn say(&mut self, peer: PeerId) -> bool {
        loop {
            let Some(session) = self.sessions.get_mut(&peer) else { return true };
            // Whoever has said goodbye may be gone: libfabric's shared memory does not survive a message to an endpoint that was closed.
            let is_over = session.broken.is_some() || session.incoming.has_ended();
            if session.sends >= SENDS_PER_PEER || is_over {
                return true;
            }
            if session.incoming.must_tell() && session.controls.is_empty() {
                session.controls.push_back((Kind::Ack, 0, Vec::new()));
            }
            let control = session.controls.front().map(|(kind, flags, body)| (*kind, *flags, body.as_slice()));
            let (header, body, is_part) = match (control, session.theirs) {
                (Some((Kind::Call, flags, body)), _) => {
                    (Header { kind: Kind::Call, flags, session: 0, sequence: 0 }, body, false)
                }
                (_, None) => return true,
                (Some((kind, flags, body)), Some(session_there)) => {
                    let sequence = session.incoming.tell();
                    (Header { kind, flags, session: session_there, sequence }, body, false)
                }
                (None, Some(session_there)) => match session.outgoing.front() {
                    Some((sequence, flags, body)) => {
                        (Header { kind: Kind::Data, flags, session: session_there, sequence }, body, true)
                    }
                    None => return true,
                },
            };
            let Some(number) = self.free_sends.pop() else { return false };
            let bytes = self.slab.write(number, [&header.encode(), body]);
            let (address, desc) = (session.address, self.slab.desc());
            let Some(buffer) = self.slab.buffer(number) else { return false };
            // SAFETY: the buffer is the slab's, in nobody's use until this is over, and the endpoint keeps the slab.
            match unsafe { self.endpoint.send(address, buffer, bytes, desc, Buffer::Out(number, peer, address)) } {
                Posted::Yes => {
                    session.sends += 1;
                    if let Some(known) = self.addresses.get_mut(&address) {
                        known.sends += 1;
                    }
                    if is_part {
                        session.outgoing.sent();
                    } else {
                        session.controls.pop_front();
                    }
                }
                Posted::Later(_) => {
                    self.free_sends.push(number);
                    return false;
                }
                Posted::Never(_, reason) => {
                    self.free_sends.push(number);
                    self.breaks(peer, format!("it cannot be sent to: {reason}"));
                    return true;
                }
            }
        }
    }

    /// Asks the silent for signs of life, lets those go that give none, and forgets what has ended.
    fn take_care(&mut self, now: Instant) {
        if self.next_care.is_none_or(|at| now < at) {
            return;
        }
        self.next_care = None;
        let all: Vec<PeerId> = self.sessions.keys().copied().collect();
        for peer in all {
            let Some(session) = self.sessions.get_mut(&peer) else { continue };
            if let Some(until) = session.ending {
                let is_said = session.outgoing.is_empty() && session.sends == 0;
                if is_said || now >= until {
                    self.forget(peer);
                } else {
                    self.care_by(now + Duration::from_millis(20));
                }
                continue;
            }
            let silent = now.saturating_duration_since(session.heard);
            if silent >= LOST_AFTER {
                self.breaks(peer, format!("it gave no sign of life for {} s", LOST_AFTER.as_secs()));
                continue;
            }
            if silent >= ASK_AFTER && session.asked.is_none_or(|at| now >= at + ASK_AFTER) {
                session.asked = Some(now);
                if session.theirs.is_some() && session.controls.is_empty() {
                    session.controls.push_back((Kind::Ack, ANSWER, Vec::new()));
                    self.unflushed.insert(peer);
                }
            }
            let again = session.asked.unwrap_or(session.heard) + ASK_AFTER;
            self.care_by(again.max(now + Duration::from_millis(1)));
        }
    }
}

impl Drop for Messages {
    /// Says goodbye, and gives that a bounded time to be out.
    fn drop(&mut self) {
        let until = Instant::now() + LAST_WORDS;
        self.progress();
        let all: Vec<PeerId> = self.sessions.keys().copied().collect();
        all.into_iter().for_each(|peer| self.close(peer));
        let speaks = |s: &Session| !s.incoming.has_ended() && (!s.outgoing.is_empty() || s.sends > 0);
        while self.sessions.values().any(speaks) && Instant::now() < until {
            self.progress();
            self.flush();
            std::thread::yield_now();
        }
    }
}
