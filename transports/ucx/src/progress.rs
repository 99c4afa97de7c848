//! One poll: what came, what is done, what is late, and what goes out.

use std::time::Instant;

use kvferry_transport::codec::decode;
use kvferry_transport::{Event, Notice, PeerId};
use ucx_sys::{UCS_OK, ucs_status_t};

use crate::collecting::Supply;
use crate::endpoint::Operation;
use crate::inbox::Arrival;
use crate::link::{CREDITS, Link, Session};
use crate::session::GREETING_WAIT;
use crate::transport::UcxTransport;
use crate::wire::{Header, Kind, WHOLE_BYTES_MAX};

/// Messages in parts that a session may have begun.
const PARTED_MAX: usize = 64;
/// Steps that UCX takes in one poll.
const STEPS: usize = 32;

impl UcxTransport {
    /// Makes progress; bounded by [`kvferry_transport::Options::poll_bytes_max`].
    pub(crate) fn serve(&mut self, now: Instant) {
        let budget = self.options.poll_bytes_max.max(1);
        let mut put = 0;
        for _ in 0..STEPS {
            let more = self.progress_once();
            put += self.worker.inbox.take_bytes();
            if !more || put >= budget {
                break;
            }
        }
        self.attend();
        if self.next_deadline.is_some_and(|deadline| deadline <= now) {
            self.expire(now);
        }
        self.send_all(budget);
        self.fetch(budget);
        self.take_operations();
        self.prove(now);
        self.settle_links();
        self.settle_pools(now);
        if !self.withdrawing.is_empty() {
            self.answer_withdrawals();
        }
    }

    /// Lets UCX take a step and acts on what that brought; false when nothing did.
    pub(crate) fn progress_once(&mut self) -> bool {
        let more = self.worker.progress();
        self.take_arrivals();
        self.take_operations();
        more
    }

    fn take_operations(&mut self) {
        for (operation, status) in self.worker.operations.take_done() {
            self.finished(operation, status);
        }
    }

    /// UCX is done with an operation.
    pub(crate) fn finished(&mut self, operation: Operation, status: ucs_status_t) {
        match operation {
            Operation::Sent { link, .. } => {
                self.sent(operation);
                if status != UCS_OK {
                    let reason = format!("sending to the peer failed: {}", self.context.library.words(status));
                    self.lose_link(link, &reason);
                }
            }
            Operation::Received { link, header, buffer } => self.received(link, header, buffer, status),
            Operation::Collected { link, header, place, buffer, .. } => {
                self.collected(link, header, place, buffer, status);
            }
            Operation::Got { fetch, .. } => self.got(fetch, status),
            Operation::Tried { link, buffer, .. } => self.tried(link, buffer, status),
            Operation::Closed { .. } | Operation::Flushed { .. } | Operation::Drained { .. } => self.closed(operation),
        }
    }

    /// Acts on what came since it was last asked.
    pub(crate) fn take_arrivals(&mut self) {
        for arrival in self.worker.inbox.take() {
            self.arrival(arrival);
        }
    }

    fn arrival(&mut self, arrival: Arrival) {
        match arrival {
            Arrival::Message { header, body } => self.message(header, body),
            Arrival::Chunk { session, place } => {
                let Some((_, link)) = self.numbers.get(&session) else { return };
                if let Some(link) = self.links.get_mut(link) {
                    link.consumed += 1;
                    if let (Some(supply), Some(place)) = (&mut link.supply, place) {
                        supply.close(place);
                    }
                }
            }
            Arrival::Whole { key, pieces } => self.whole(key, pieces),
            Arrival::Uncopied { key, reason } => self.uncopied_in(key, reason),
            Arrival::Announced(rendezvous) => self.announced(rendezvous),
            Arrival::Breach { session, reason } => {
                if let Some((_, link)) = self.numbers.get(&session) {
                    self.lose_link(*link, reason);
                }
            }
            Arrival::Broken { link, status } => {
                let reason = format!("the connection failed: {}", self.context.library.words(status));
                self.lose_link(link, &reason);
            }
        }
    }

    fn whole(&mut self, key: crate::inbox::Key, pieces: u64) {
        let Some((Some(peer), _)) = self.numbers.get(&key.session).copied() else { return };
        match key.flow {
            crate::inbox::Flow::Pull => self.pulled(peer, key.tag, pieces),
            crate::inbox::Flow::Push => {
                let id = self.sessions.get(&peer).and_then(|session| session.writes.get(&key.tag)).copied();
                if let Some(id) = id {
                    self.arrived(id, pieces);
                }
            }
        }
    }

    pub(crate) fn message(&mut self, header: Header, body: Vec<u8>) {
        if header.kind == Kind::Hello {
            if let Err(reason) = self.on_hello(&body) {
                tracing::debug!(reason, "a peer was not let in");
            }
            return;
        }
        let Some((peer, link)) = self.numbers.get(&header.session).copied() else {
            return tracing::debug!(kind = ?header.kind, "a message of a session that is over, or never was");
        };
        let said = match (header.kind, peer) {
            // Of the link, whatever has become of the session that said it.
            (Kind::Credit, _) => self.on_credit(link, header.number, header.tag),
            (Kind::Warmed, _) => self.on_warmed(link, &body),
            (Kind::Ask, _) => self.on_ask(link),
            (Kind::Staged, _) => self.on_staged(link, &body),
            (Kind::PullParcel | Kind::PushParcel, _) => self.on_parcel(link, header, &body),
            (_, Some(peer)) => self.dispatch(peer, header, body),
            (_, None) => Ok(()),
        };
        if let Err(reason) = said {
            tracing::debug!(?peer, reason, "a peer broke the protocol");
            self.lose_link(link, &reason);
        }
    }

    /// What a message means. An `Err` is a breach of the protocol: it ends that link and nothing else.
    fn dispatch(&mut self, peer: PeerId, header: Header, body: Vec<u8>) -> Result<(), String> {
        let tag = header.tag;
        match header.kind {
            Kind::Welcome => return self.on_welcome(peer, &body),
            Kind::Bye => self.on_bye(peer, &body),
            Kind::Part => return self.part(peer, header, body),
            Kind::Read => {
                let body = self.joined(peer, header, body)?;
                return self.on_read(peer, tag, &body);
            }
            Kind::Write => {
                let body = self.joined(peer, header, body)?;
                return self.on_write(peer, tag, &body);
            }
            Kind::Lend => {
                let body = self.joined(peer, header, body)?;
                return self.on_lend(peer, tag, &body);
            }
            Kind::Go => return self.on_go(peer, tag),
            Kind::Done => return self.on_done(peer, tag, &body),
            Kind::Refuse => return self.on_refuse(peer, tag, &body),
            Kind::Cancel => self.on_cancel(peer, tag),
            Kind::Notice => {
                let notice: Notice = decode(&body).map_err(|error| format!("a notice: {error}"))?;
                self.events.push(Event::Notice { notice });
            }
            Kind::Borrow => return self.on_borrow(peer, tag, &body),
            Kind::Withdraw => return self.on_withdraw(peer, &body),
            Kind::Withdrawn => return self.on_withdrawn(peer, &body),
            // Taken before they come here.
            Kind::Hello | Kind::PullData | Kind::PushData | Kind::Credit | Kind::Warmed => {}
            Kind::Ask | Kind::Staged | Kind::PullParcel | Kind::PushParcel => {}
        }
        Ok(())
    }

    /// The peer has taken chunks off a link, those in these buffers of its staging among them.
    fn on_credit(&mut self, id: u64, chunks: u32, buffers: u64) -> Result<(), String> {
        let Some(link) = self.links.get_mut(&id) else { return Ok(()) };
        let credits = link.outgoing.credits.saturating_add(chunks);
        if credits > CREDITS {
            return Err(format!("{chunks} credits for chunks that were not sent"));
        }
        link.outgoing.credits = credits;
        match &mut link.depot {
            Some(depot) => depot.give_back(buffers)?,
            None if buffers != 0 => return Err("it gives buffers back where there are none".to_owned()),
            None => {}
        }
        link.warmth.taken = link.warmth.begun;
        self.join(id);
        Ok(())
    }

    /// Keeps the next part of a long message; what a length says is believed only as far as bytes have come.
    fn part(&mut self, peer: PeerId, header: Header, body: Vec<u8>) -> Result<(), String> {
        let kept: usize = self.beside(peer).map(|session| session.parts_bytes).sum();
        let Some(session) = self.sessions.get_mut(&peer) else { return Ok(()) };
        if kept + body.len() > WHOLE_BYTES_MAX {
            return Err(format!("messages in parts that are longer than {WHOLE_BYTES_MAX} bytes together"));
        }
        if body.is_empty() || (session.parts.len() >= PARTED_MAX && !session.parts.contains_key(&header.tag)) {
            return Err("a part without bytes, or of too many messages at once".to_owned());
        }
        let (parts, bytes) = session.parts.entry(header.tag).or_default();
        if *parts != header.number {
            return Err("a part of a message is missing".to_owned());
        }
        *parts += 1;
        bytes.extend_from_slice(&body);
        session.parts_bytes += body.len();
        Ok(())
    }

    /// The whole of a message whose last bytes these are.
    fn joined(&mut self, peer: PeerId, header: Header, body: Vec<u8>) -> Result<Vec<u8>, String> {
        let (mut parts, mut bytes) = (0, Vec::new());
        if let Some(session) = self.sessions.get_mut(&peer)
            && let Some(kept) = session.parts.remove(&header.tag)
        {
            (parts, bytes) = kept;
            session.parts_bytes = session.parts_bytes.saturating_sub(bytes.len());
        }
        if parts != header.number {
            return Err("a part of a message is missing".to_owned());
        }
        if parts == 0 {
            return Ok(body);
        }
        bytes.extend_from_slice(&body);
        Ok(bytes)
    }

    /// All sessions with the transport at a session's other end: what one peer makes this side keep is bounded for them together.
    pub(crate) fn beside(&self, peer: PeerId) -> impl Iterator<Item = &Session> {
        let link = self.sessions.get(&peer).and_then(|session| self.links.get(&session.link));
        let sessions = link.into_iter().flat_map(|link| &link.sessions);
        sessions.filter_map(|peer| self.sessions.get(peer))
    }

    /// A session through which something can be said of a link.
    pub(crate) fn speaker(&self, link: &Link) -> Option<PeerId> {
        let stands = |peer: &PeerId| self.sessions.get(peer).is_some_and(|session| session.there.is_some());
        link.sessions.iter().copied().find(stands)
    }

    /// Sends over every link: credits, messages, then chunks in turn.
    fn send_all(&mut self, budget: u64) {
        let links: Vec<u64> = self.links.keys().copied().collect();
        let mut left = budget;
        for id in links {
            // What nobody can say yet stays owed: the peer may go on over the link with another session.
            let speaker = self.links.get(&id).and_then(|link| self.speaker(link));
            let consumed =
                speaker.and_then(|_| self.links.get_mut(&id)).map_or(0, |link| std::mem::take(&mut link.consumed));
            if let Some(peer) = speaker.filter(|_| consumed > 0) {
                let supply = self.links.get_mut(&id).and_then(|link| link.supply.as_mut());
                let buffers = supply.map_or(0, Supply::give_back);
                self.say(peer, Kind::Credit, consumed, buffers, &[]);
            }
            self.send_messages(id);
            left = left.saturating_sub(self.send_chunks(id, left));
        }
    }

    /// Ends what is late and finds the next deadline.
    fn expire(&mut self, now: Instant) {
        let late = |deadline: Option<Instant>| deadline.is_some_and(|deadline| deadline <= now);
        let silent: Vec<PeerId> =
            self.sessions.iter().filter(|(_, session)| late(session.deadline)).map(|(peer, _)| *peer).collect();
        for peer in silent {
            if !self.sessions.contains_key(&peer) {
                // Lost with another's link meanwhile, and told of.
                continue;
            }
            // It has answered: what warms the link is late, which is no reason to part.
            if self.sessions.get(&peer).is_some_and(|session| session.there.is_some()) {
                self.connected(peer);
                continue;
            }
            let seconds = GREETING_WAIT.as_secs();
            let reason = format!("no answer within {seconds} s; check that its address is reachable and still its own");
            let link = self.sessions.get(&peer).map(|session| session.link);
            self.lose_session(peer, &reason);
            self.events.push(Event::PeerLost { peer, reason });
            // Whoever is silent to one session is not there for the next.
            if let Some(link) = link
                && self.links.get(&link).is_some_and(|link| link.sessions.is_empty())
            {
                self.close_link(link);
            }
        }
        let idle: Vec<u64> = self.links.iter().filter(|(_, l)| late(l.idle_until)).map(|(id, _)| *id).collect();
        idle.into_iter().for_each(|link| self.close_link(link));
        self.expire_held(now);
        let sessions = self.sessions.values().filter_map(|session| session.deadline);
        let held = self.held.values().map(|held| held.until);
        let idle = self.links.values().filter_map(|link| link.idle_until);
        let pools = self.pools.values().filter_map(|bound| bound.leaving.as_ref()).map(|leaving| leaving.until);
        self.next_deadline = sessions.chain(held).chain(idle).chain(pools).filter(|at| *at > now).min();
    }
}
