//! Transfers that this side posted.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvferry_core::{End, Program, TransferId, UnitRange};
use kvferry_topology::Way;
use kvferry_transport::codec::{decode, encode};
use kvferry_transport::{Direction, Event, Notice, PeerId, PostError, RemotePool, Transfer, TransferError};

use crate::inbox::{Flow, Key};
use crate::remote::Bound;
use crate::share::Share;
use crate::transport::UcxTransport;
use crate::wire::{Done, Kind, Named, Read, Refusal, Write};

/// A transfer that this side initiated.
pub(crate) struct Posted {
    pub(crate) peer: PeerId,
    pub(crate) direction: Direction,
    pub(crate) local: Bound,
    remote: RemotePool,
    named: Named,
    program: Arc<Program>,
    range: UnitRange,
    notice: Option<Notice>,
    tag: u64,
    progress: Progress,
    /// Contiguous pieces that were packed here.
    pub(crate) pieces: u64,
    since: Instant,
}

/// How far a posted transfer is.
enum Progress {
    /// Its session is not up.
    Queued,
    /// A pull whose bytes its owner sends.
    Asked,
    /// A pull that is read from the peer's memory.
    Reading(u64),
    /// A push that waits for the destination's go; it may read by itself.
    Announced,
    /// A push whose bytes go out.
    Moving,
    /// A push that was called back and may still be read; why it was.
    Stopping(TransferError),
}

impl Posted {
    pub(crate) fn bytes(&self) -> u64 {
        self.program.bytes_in(self.range)
    }

    /// How long ago it was posted.
    pub(crate) fn took(&self) -> Duration {
        self.since.elapsed()
    }

    fn share(&self, end: End) -> Share {
        self.local.share(&self.program, end, self.range)
    }
}

impl UcxTransport {
    pub(crate) fn post_transfer(&mut self, transfer: Transfer) -> Result<(), PostError> {
        let Transfer { id, peer, direction, local, remote, program, range, notice } = transfer;
        if self.posts.contains_key(&id) || self.deferred.is_ending(id) {
            return Err(PostError::Duplicate(id));
        }
        let session = self.sessions.get(&peer).ok_or(PostError::UnknownPeer(peer))?;
        if self.posts.len() >= self.options.transfers_max {
            return Err(PostError::Full);
        }
        let up = session.is_up();
        let local =
            self.pools.get(&local).filter(|bound| bound.leaving.is_none()).ok_or(PostError::UnknownPool(local))?;
        let local = local.clone();
        let found = self.remotes.get(&remote).filter(|found| found.peer == peer);
        let found = found.ok_or(PostError::UnknownRemote(remote))?;
        let (named, lent) = (found.named, found.lent.as_ref());
        match direction {
            Direction::Pull => {
                UcxTransport::check(id, &program, range, End::Destination, &local.layout)?;
                let (_, layout) = lent.ok_or(PostError::UnknownRemote(remote))?;
                UcxTransport::check(id, &program, range, End::Source, layout)?;
            }
            Direction::Push => UcxTransport::check(id, &program, range, End::Source, &local.layout)?,
        }
        let posted = Posted {
            peer,
            direction,
            local,
            remote,
            named,
            program,
            range,
            notice,
            tag: 0,
            progress: Progress::Queued,
            pieces: 0,
            since: Instant::now(),
        };
        self.posts.insert(id, posted);
        if up {
            self.start(id);
        }
        Ok(())
    }

    /// Starts a posted transfer whose session is up.
    pub(crate) fn start(&mut self, id: TransferId) {
        let Some(peer) = self.posts.get(&id).map(|posted| posted.peer) else { return };
        let Some(session) = self.sessions.get_mut(&peer) else { return };
        let (tag, here, link) = (session.new_tag(), session.here, session.link);
        self.watched = None;
        session.posts.insert(tag, id);
        let reads = self.reads_memory(link);
        let Some(posted) = self.posts.get_mut(&id) else { return };
        posted.tag = tag;
        match posted.direction {
            Direction::Pull => {
                if reads && self.fetch_pull(id) {
                    return;
                }
                let Some(posted) = self.posts.get_mut(&id) else { return };
                posted.progress = Progress::Asked;
                let key = Key { session: here, flow: Flow::Pull, tag };
                let (named, fingerprint) = (posted.named, posted.program.fingerprint());
                let (pool, token) = (named.pool, named.token);
                let read = Read { pool, token, fingerprint, start: posted.range.start, end: posted.range.end };
                let mut body = encode(&read);
                posted.program.encode_for(End::Source, &mut body);
                self.worker.inbox.add_sink(key, posted.share(End::Destination), posted.bytes());
                self.say(peer, Kind::Read, 0, tag, &body);
            }
            Direction::Push => {
                posted.progress = Progress::Announced;
                let source = (reads && posted.local.mapped.is_some()).then(|| posted.local.named());
                if source.is_some() {
                    self.lend_ahead(peer, id);
                }
                let Some(posted) = self.posts.get_mut(&id) else { return };
                let write = Write {
                    id,
                    pool: posted.named.pool,
                    token: posted.named.token,
                    fingerprint: posted.program.fingerprint(),
                    start: posted.range.start,
                    end: posted.range.end,
                    notice: posted.notice,
                    source,
                };
                let mut body = encode(&write);
                if source.is_some() {
                    posted.program.encode_for(End::Source, &mut body);
                }
                self.say(peer, Kind::Write, 0, tag, &body);
            }
        }
    }

    /// Reads a pull's bytes from the peer's memory; false where that is not possible.
    fn fetch_pull(&mut self, id: TransferId) -> bool {
        let Some(posted) = self.posts.get(&id) else { return false };
        let (peer, remote) = (posted.peer, posted.remote);
        let (program, range, local) = (posted.program.clone(), posted.range, posted.local.clone());
        let Some(fetch) = self.start_fetch(Flow::Pull, id, peer, remote, program, range, local) else { return false };
        if let Some(posted) = self.posts.get_mut(&id) {
            posted.progress = Progress::Reading(fetch);
        }
        true
    }

    /// The destination of a push wants its bytes sent.
    pub(crate) fn on_go(&mut self, peer: PeerId, tag: u64) -> Result<(), String> {
        let Some(id) = self.sessions.get(&peer).and_then(|session| session.posts.get(&tag)).copied() else {
            // It crossed a cancel.
            return Ok(());
        };
        let Some(posted) = self.posts.get_mut(&id) else { return Ok(()) };
        match posted.progress {
            Progress::Announced => {}
            Progress::Stopping(_) => return Ok(()),
            _ => return Err(format!("a go for {id}, which does not wait for one")),
        }
        posted.progress = Progress::Moving;
        let (share, bytes) = (posted.share(End::Source), posted.bytes());
        self.add_source(peer, Flow::Push, tag, share, bytes);
        Ok(())
    }

    /// The destination of a push has every byte in place.
    pub(crate) fn on_done(&mut self, peer: PeerId, tag: u64, body: &[u8]) -> Result<(), String> {
        let done: Done = decode(body).map_err(|error| format!("an end of a push: {error}"))?;
        let sending = self.links.values().any(|link| link.outgoing.sends(peer, Flow::Push, tag));
        // The transfer stays, to end with the link.
        if sending || self.named(peer, tag).is_some_and(|posted| posted.direction != Direction::Push) {
            return Err("an end of a transfer before all of it was sent".to_owned());
        }
        let Some((id, posted)) = self.take_posted(peer, tag) else { return Ok(()) };
        let pieces = if posted.pieces > 0 { posted.pieces } else { done.pieces };
        if posted.pieces == 0
            && let Some(link) = self.sessions.get(&peer).map(|session| session.link)
        {
            self.note_moved(link, Way::Lent, posted.bytes());
        }
        self.show_staged(&posted);
        self.events.push(Event::Completed { id, bytes: posted.bytes(), pieces });
        Ok(())
    }

    pub(crate) fn on_refuse(&mut self, peer: PeerId, tag: u64, body: &[u8]) -> Result<(), String> {
        let refusal: Refusal = decode(body).map_err(|error| format!("a refusal: {error}"))?;
        // UCX writes into its blocks: nothing but the end of the reads ends it.
        if self.named(peer, tag).is_some_and(|posted| matches!(posted.progress, Progress::Reading(_))) {
            return Err("a refusal of a pull that its source was not asked for".to_owned());
        }
        let Some((id, posted)) = self.take_posted(peer, tag) else { return Ok(()) };
        self.forget_bytes(&posted);
        let error = match (posted.progress, refusal) {
            (Progress::Stopping(error), _) => error,
            (_, Refusal::Text(words)) => TransferError::Refused(words),
            (_, Refusal::Mismatch { here, there }) => TransferError::Mismatch { local: there, remote: here },
        };
        self.report(posted.local.stage.as_slice(), Event::Failed { id, error });
        Ok(())
    }

    /// The last byte of a pull is here.
    pub(crate) fn pulled(&mut self, peer: PeerId, tag: u64, pieces: u64) {
        let Some((id, posted)) = self.take_posted(peer, tag) else { return };
        self.note_taken(id);
        if let Some(notice) = posted.notice {
            self.say(peer, Kind::Notice, 0, tag, &encode(&notice));
        }
        self.show_staged(&posted);
        self.events.push(Event::Completed { id, bytes: posted.bytes(), pieces });
    }

    /// A fetch of a pull is over: every byte is here, or nothing of it touches local memory any more.
    pub(crate) fn fetched_pull(&mut self, id: TransferId, pieces: u64, error: Option<TransferError>) {
        let Some(posted) = self.posts.get(&id) else { return };
        let (peer, tag) = (posted.peer, posted.tag);
        let Some(error) = error else { return self.pulled_anyhow(id, peer, tag, pieces) };
        self.end(id, error);
    }

    /// As [`UcxTransport::pulled`], even if the session has ended since: the bytes are here.
    fn pulled_anyhow(&mut self, id: TransferId, peer: PeerId, tag: u64, pieces: u64) {
        if self.sessions.contains_key(&peer) {
            return self.pulled(peer, tag, pieces);
        }
        if let Some(posted) = self.posts.remove(&id) {
            self.events.push(Event::Completed { id, bytes: posted.bytes(), pieces });
        }
    }

    /// What a peer means by a tag.
    fn named(&self, peer: PeerId, tag: u64) -> Option<&Posted> {
        self.posts.get(self.sessions.get(&peer)?.posts.get(&tag)?)
    }

    fn take_posted(&mut self, peer: PeerId, tag: u64) -> Option<(TransferId, Posted)> {
        let id = self.sessions.get_mut(&peer)?.posts.remove(&tag)?;
        Some((id, self.posts.remove(&id)?))
    }

    fn forget_posted(&mut self, id: TransferId) -> Option<Posted> {
        let posted = self.posts.remove(&id)?;
        if let Some(session) = self.sessions.get_mut(&posted.peer) {
            session.posts.remove(&posted.tag);
        }
        self.forget_bytes(&posted);
        Some(posted)
    }

    /// Neither sends nor puts more bytes of it.
    fn forget_bytes(&mut self, posted: &Posted) {
        let Some(session) = self.sessions.get(&posted.peer) else { return };
        match posted.direction {
            Direction::Pull => {
                self.worker.inbox.remove_sink(Key { session: session.here, flow: Flow::Pull, tag: posted.tag });
            }
            Direction::Push => self.stop_source(posted.peer, Flow::Push, posted.tag),
        }
    }

    /// Ends a posted transfer here and at its responder, as soon as its memory is safe.
    pub(crate) fn end_posted(&mut self, id: TransferId, error: TransferError) {
        let Some(posted) = self.posts.get_mut(&id) else { return };
        let (peer, tag) = (posted.peer, posted.tag);
        match (&posted.progress, posted.direction) {
            (Progress::Reading(fetch), _) => {
                let fetch = *fetch;
                return self.stop_fetch(fetch, error);
            }
            (Progress::Stopping(_), _) => return,
            // The destination may be reading: its answer says that it does no more.
            (Progress::Announced, Direction::Push) if posted.local.mapped.is_some() => {
                posted.progress = Progress::Stopping(error);
                return self.say(peer, Kind::Cancel, 0, tag, &[]);
            }
            (Progress::Queued, _) => {}
            _ => self.say(peer, Kind::Cancel, 0, tag, &[]),
        }
        self.end(id, error);
    }

    fn end(&mut self, id: TransferId, error: TransferError) {
        if let Some(posted) = self.forget_posted(id) {
            self.report(posted.local.stage.as_slice(), Event::Failed { id, error });
        }
    }

    /// Fails what was posted to a peer that is lost. Reads that UCX was given end by themselves.
    pub(crate) fn fail_posts_of(&mut self, peer: PeerId, error: &TransferError) {
        let ids: Vec<TransferId> = self.posts.iter().filter(|(_, p)| p.peer == peer).map(|(id, _)| *id).collect();
        for id in ids {
            let Some(posted) = self.posts.get(&id) else { continue };
            if let Progress::Reading(fetch) = posted.progress {
                self.stop_fetch(fetch, error.clone());
                continue;
            }
            let Some(posted) = self.forget_posted(id) else { continue };
            let error = match posted.progress {
                Progress::Stopping(reason) => reason,
                _ => error.clone(),
            };
            self.report(posted.local.stage.as_slice(), Event::Failed { id, error });
        }
    }
}
