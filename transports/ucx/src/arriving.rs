//! Pushes of peers: an announcement meets what is expected, and this side reads the bytes or lets them be sent.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvferry_core::{End, Program, TransferId};
use kvferry_transport::codec::encode;
use kvferry_transport::{Event, Expected, PeerId, PostError, RemotePool, TransferError};

use crate::inbox::{Flow, Key};
use crate::remote::Bound;
use crate::transport::UcxTransport;
use crate::wire::{Done, Kind, Refusal, Write, decode_first};

/// Expected transfers for each one that may be posted: peers post too.
const EXPECTED_PER_POST: usize = 4;
/// Pushes that wait to be expected, over all peers.
const HELD_MAX: usize = 4096;
/// Bytes of their programs.
const HELD_BYTES_MAX: usize = 256 << 20;

/// A push that this side expects.
pub(crate) struct Expectation {
    pub(crate) expected: Expected,
    pub(crate) local: Bound,
    fingerprint: u64,
    arriving: Option<Arriving>,
}

/// A push whose bytes are on their way here.
struct Arriving {
    peer: PeerId,
    tag: u64,
    write: Write,
    progress: Progress,
}

enum Progress {
    /// Its source was asked for the keys of its pool.
    Borrowing(RemotePool, Arc<Program>),
    /// It is being read from its source's memory.
    Reading(u64),
    /// Its source sends it.
    Sent,
}

/// A push that nobody expects yet.
pub(crate) struct Held {
    pub(crate) peer: PeerId,
    tag: u64,
    write: Write,
    /// The encoded program, where there is one.
    program: Vec<u8>,
    pub(crate) until: Instant,
}

impl UcxTransport {
    pub(crate) fn expect_push(&mut self, expected: Expected) -> Result<(), PostError> {
        let id = expected.id;
        if self.expected.contains_key(&id) || self.deferred.is_ending(id) {
            return Err(PostError::Duplicate(id));
        }
        if self.expected.len() >= self.options.transfers_max.saturating_mul(EXPECTED_PER_POST) {
            return Err(PostError::Full);
        }
        let local = self.pools.get(&expected.pool).filter(|bound| bound.leaving.is_none());
        let local = local.ok_or(PostError::UnknownPool(expected.pool))?.clone();
        UcxTransport::check(id, &expected.program, expected.range, End::Destination, &local.layout)?;
        let fingerprint = expected.program.fingerprint();
        self.expected.insert(id, Expectation { expected, local, fingerprint, arriving: None });
        if let Some(held) = self.held.remove(&id) {
            self.meet(held.peer, held.tag, held.write, &held.program);
        }
        Ok(())
    }

    pub(crate) fn on_write(&mut self, peer: PeerId, tag: u64, body: &[u8]) -> Result<(), String> {
        let (write, program): (Write, &[u8]) = decode_first(body).map_err(|error| format!("a push: {error}"))?;
        let id = write.id;
        let Some(session) = self.sessions.get_mut(&peer) else { return Ok(()) };
        if session.writes.contains_key(&tag) {
            return Err(format!("tag {tag} was used twice"));
        }
        if self.expected.contains_key(&id) {
            self.meet(peer, tag, write, program);
            return Ok(());
        }
        let bytes: usize = self.held.values().map(|held| held.program.len()).sum();
        if self.held.len() >= HELD_MAX || bytes + program.len() > HELD_BYTES_MAX || self.held.contains_key(&id) {
            let words =
                format!("{id} is not expected, and no more pushes can wait here; expect it before it is pushed");
            self.refuse(peer, tag, &Refusal::text(words));
            return Ok(());
        }
        session.writes.insert(tag, id);
        let until = Instant::now() + Duration::from_millis(self.options.unexpected_wait_ms.min(3_600_000));
        self.held.insert(id, Held { peer, tag, write, program: program.to_vec(), until });
        self.note_deadline(until);
        Ok(())
    }

    /// Refuses what nobody expected in time.
    pub(crate) fn expire_held(&mut self, now: Instant) {
        let late: Vec<TransferId> = self.held.iter().filter(|(_, held)| held.until <= now).map(|(id, _)| *id).collect();
        for id in late {
            let Some(held) = self.held.remove(&id) else { continue };
            if let Some(session) = self.sessions.get_mut(&held.peer) {
                session.writes.remove(&held.tag);
            }
            let wait = self.options.unexpected_wait_ms;
            let words = format!("{id} was not expected within {wait} ms; expect it before it is pushed");
            self.refuse(held.peer, held.tag, &Refusal::text(words));
        }
    }

    /// Lets a push in that is expected, or refuses it.
    fn meet(&mut self, peer: PeerId, tag: u64, write: Write, program: &[u8]) {
        let id = write.id;
        let Some(expectation) = self.expected.get_mut(&id) else { return };
        if expectation.arriving.is_some() {
            return self.refuse(peer, tag, &Refusal::text(format!("{id} is arriving already")));
        }
        if (write.pool, write.token) != (expectation.expected.pool, expectation.local.keys.token) {
            let words = format!("{id} is expected in another pool or under another token; import its present keys");
            return self.refuse(peer, tag, &Refusal::text(words));
        }
        let (here, there) = (expectation.fingerprint, write.fingerprint);
        let (range, reads) = (expectation.expected.range, expectation.local.stage.is_none());
        let end = if here != there {
            Some((Refusal::Mismatch { here, there }, TransferError::Mismatch { local: here, remote: there }))
        } else if range != write.range() {
            let words = format!("units {}..{} of {id} are expected, others were pushed", range.start, range.end);
            Some((Refusal::text(words.clone()), TransferError::Refused(words)))
        } else {
            None
        };
        if let Some((refusal, error)) = end {
            self.expected.remove(&id);
            self.refuse(peer, tag, &refusal);
            self.events.push(Event::Failed { id, error });
            return;
        }
        let Some(link) = self.sessions.get(&peer).map(|session| session.link) else { return };
        self.watched = None;
        let readable = write.source.filter(|_| reads && self.reads_memory(link));
        let progress = match readable.map(|named| (named, self.with_source(id, program))) {
            None => Progress::Sent,
            Some((_, Err(reason))) => {
                // Nobody's plan looks like that; the expectation stays for the true one.
                return self.refuse(peer, tag, &Refusal::text(reason));
            }
            Some((named, Ok(program))) => Progress::Borrowing(self.borrow_pool(peer, named), program),
        };
        if let Some(session) = self.sessions.get_mut(&peer) {
            session.writes.insert(tag, id);
        }
        let remote = if let Progress::Borrowing(remote, _) = &progress { Some(*remote) } else { None };
        if let Some(expectation) = self.expected.get_mut(&id) {
            expectation.arriving = Some(Arriving { peer, tag, write, progress });
        }
        match remote {
            None => self.let_send(id),
            Some(remote) => self.resume_arriving(remote),
        }
    }

    /// The expected program with the source's tables, from the announced one.
    fn with_source(&self, id: TransferId, announced: &[u8]) -> Result<Arc<Program>, String> {
        let announced = Program::decode(announced).map_err(|error| format!("its program is malformed: {error}"))?;
        let expectation = self.expected.get(&id).ok_or_else(|| "it is not expected any more".to_owned())?;
        if announced.fingerprint() != expectation.fingerprint {
            return Err("its program is not the one that it names".to_owned());
        }
        let tables = announced.tables(End::Source).to_vec();
        Ok(Arc::new(Program::clone(&expectation.expected.program).with_tables(End::Source, tables)))
    }

    /// Asks the source for the bytes of a push.
    fn let_send(&mut self, id: TransferId) {
        let Some(expectation) = self.expected.get_mut(&id) else { return };
        let Some(arriving) = &mut expectation.arriving else { return };
        arriving.progress = Progress::Sent;
        let (peer, tag) = (arriving.peer, arriving.tag);
        let Some(session) = self.sessions.get(&peer) else { return };
        let (local, expected) = (&expectation.local, &expectation.expected);
        let bytes = expected.program.bytes_in(expected.range);
        let share = local.share(&expected.program, End::Destination, expected.range);
        self.worker.inbox.add_sink(Key { session: session.here, flow: Flow::Push, tag }, share, bytes);
        self.say(peer, Kind::Go, 0, tag, &[]);
    }

    /// Reads the pushes that waited for their source's keys.
    pub(crate) fn resume_arriving(&mut self, remote: RemotePool) {
        if self.remotes.get(&remote).is_none_or(|found| found.lent.is_none()) {
            return;
        }
        let waits = |e: &Expectation| matches!(&e.arriving, Some(Arriving { progress: Progress::Borrowing(of, _), .. }) if *of == remote);
        let ids: Vec<TransferId> = self.expected.iter().filter(|(_, e)| waits(e)).map(|(id, _)| *id).collect();
        for id in ids {
            self.read_push(id, remote);
        }
    }

    fn read_push(&mut self, id: TransferId, remote: RemotePool) {
        let Some(expectation) = self.expected.get(&id) else { return };
        let Some(Arriving { peer, progress: Progress::Borrowing(_, program), .. }) = &expectation.arriving else {
            return;
        };
        let (peer, program) = (*peer, program.clone());
        let (range, local) = (expectation.expected.range, expectation.local.clone());
        let layout = self.remotes.get(&remote).and_then(|found| found.lent.as_ref()).map(|(_, layout)| layout.clone());
        let Some(layout) = layout else { return };
        if let Err(error) = program.validate(End::Source, &layout) {
            let words = error.to_string();
            return self.end_expected(id, TransferError::Refused(words.clone()), &words);
        }
        match self.start_fetch(Flow::Push, id, peer, remote, program, range, local) {
            Some(fetch) => {
                if let Some(Arriving { progress, .. }) = self.expected.get_mut(&id).and_then(|e| e.arriving.as_mut()) {
                    *progress = Progress::Reading(fetch);
                }
            }
            None => self.let_send(id),
        }
    }

    /// The source calls a push back, or a pull.
    pub(crate) fn on_cancel(&mut self, peer: PeerId, tag: u64) {
        let Some(session) = self.sessions.get_mut(&peer) else { return };
        if session.reads.remove(&tag).is_some() {
            return self.stop_source(peer, Flow::Pull, tag);
        }
        let Some(id) = session.writes.remove(&tag) else { return };
        let words = "the sender cancelled it";
        if self.held.get(&id).is_some_and(|held| held.peer == peer && held.tag == tag) {
            self.held.remove(&id);
            return self.refuse(peer, tag, &Refusal::text(words));
        }
        let of = |arriving: &Arriving| arriving.peer == peer && arriving.tag == tag;
        if self.expected.get(&id).and_then(|e| e.arriving.as_ref()).is_some_and(of) {
            self.end_expected(id, TransferError::Refused(words.to_owned()), words);
        }
    }

    /// Every byte of a push is in place.
    pub(crate) fn arrived(&mut self, id: TransferId, pieces: u64) {
        let Some(expectation) = self.expected.remove(&id) else { return };
        let bytes = expectation.expected.program.bytes_in(expectation.expected.range);
        let Some(arriving) = expectation.arriving else { return };
        if let Some(session) = self.sessions.get_mut(&arriving.peer) {
            session.writes.remove(&arriving.tag);
        }
        self.note_taken(id);
        self.say(arriving.peer, Kind::Done, 0, arriving.tag, &encode(&Done { pieces }));
        self.events.push(Event::Arrived { id, bytes, pieces });
        self.events.extend(arriving.write.notice.map(|notice| Event::Notice { notice }));
    }

    /// A fetch of a push is over: every byte is here, or nothing of it touches local memory any more.
    pub(crate) fn fetched_push(&mut self, id: TransferId, pieces: u64, error: Option<TransferError>) {
        let Some(error) = error else { return self.arrived(id, pieces) };
        let words = error.to_string();
        self.finish_expected(id, error, &words);
    }

    /// Ends an expected transfer here and at its sender, as soon as nothing of it can be written.
    pub(crate) fn end_expected(&mut self, id: TransferId, error: TransferError, words: &str) {
        let Some(expectation) = self.expected.get(&id) else { return };
        match &expectation.arriving {
            Some(Arriving { progress: Progress::Reading(fetch), .. }) => {
                let fetch = *fetch;
                self.stop_fetch(fetch, error);
            }
            _ => self.finish_expected(id, error, words),
        }
    }

    fn finish_expected(&mut self, id: TransferId, error: TransferError, words: &str) {
        let Some(expectation) = self.expected.remove(&id) else { return };
        if let Some(arriving) = expectation.arriving {
            if let Some(session) = self.sessions.get_mut(&arriving.peer) {
                session.writes.remove(&arriving.tag);
                let key = Key { session: session.here, flow: Flow::Push, tag: arriving.tag };
                self.worker.inbox.remove_sink(key);
            }
            self.refuse(arriving.peer, arriving.tag, &Refusal::text(words));
        }
        self.report(expectation.local.stage.as_slice(), Event::Failed { id, error });
    }

    /// Fails what was to be read from one pool of a peer and has not begun.
    pub(crate) fn fail_arriving_from(&mut self, remote: RemotePool, words: &str) {
        let waits = |e: &Expectation| matches!(&e.arriving, Some(Arriving { progress: Progress::Borrowing(of, _), .. }) if *of == remote);
        let ids: Vec<TransferId> = self.expected.iter().filter(|(_, e)| waits(e)).map(|(id, _)| *id).collect();
        for id in ids {
            self.finish_expected(id, TransferError::Refused(words.to_owned()), words);
        }
    }

    /// Fails what a lost peer was pushing or had been posted.
    pub(crate) fn fail_transfers_of(&mut self, peer: PeerId, error: &TransferError) {
        self.fail_posts_of(peer, error);
        let met = |e: &Expectation| e.arriving.as_ref().is_some_and(|arriving| arriving.peer == peer);
        let ids: Vec<TransferId> = self.expected.iter().filter(|(_, e)| met(e)).map(|(id, _)| *id).collect();
        for id in ids {
            self.end_expected(id, error.clone(), "");
        }
    }

    pub(crate) fn refuse(&mut self, peer: PeerId, tag: u64, refusal: &Refusal) {
        self.say(peer, Kind::Refuse, 0, tag, &encode(refusal));
    }
}
