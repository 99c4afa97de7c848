//! What the protocol that is common to local transports asks of a carrier, answered by messages of the well-known endpoint.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvferry_local::wire::Frame;
use kvferry_local::{Carried, Carrier, Descriptor, Owner};
use kvferry_transport::codec::random;
use kvferry_transport::{ConnectError, PeerId, TransportKind, Wait};

use super::{LAST_WORDS, Messages, OUTGOING_PARTS_MAX};
use crate::domain::Sleep;
use crate::session::Whole;
use crate::wire::{Call, Kind, Place};

impl Carrier for Messages {
    fn place(&self) -> Bytes {
        self.place.seal()
    }

    fn dial(&mut self, place: &[u8]) -> Result<PeerId, ConnectError> {
        let bad = |reason: String| ConnectError::BadAddress { kind: TransportKind::Libfabric, reason };
        let place = Place::open(place).map_err(bad)?;
        if place.provider != self.place.provider {
            return Err(bad(format!(
                "its device is of provider {}, this side's of {}; open devices of one kind on both sides",
                place.provider, self.place.provider
            )));
        }
        let drawn = random::<8>().map_err(|source| ConnectError::Io { context: "drawing a number", source })?;
        let number = u64::from_le_bytes(drawn);
        let peer = self.begin(place.name, None, number).map_err(bad)?;
        let call = Call { to: place.instance, name: self.place.name.clone(), session: number };
        if let Some(session) = self.sessions.get_mut(&peer) {
            session.incoming.trust();
            session.controls.push_back((Kind::Call, 0, call.seal(&place.secret)));
        }
        self.unflushed.insert(peer);
        Ok(peer)
    }

    fn trust(&mut self, peer: PeerId) {
        if let Some(session) = self.sessions.get_mut(&peer) {
            session.incoming.trust();
        }
    }

    fn send(&mut self, peer: PeerId, frame: &Frame, _: Vec<Box<dyn Descriptor>>) {
        if let Some(session) = self.sessions.get_mut(&peer) {
            session.outgoing.push(frame, self.body_bytes);
            let waiting = session.outgoing.waiting();
            self.unflushed.insert(peer);
            if waiting > OUTGOING_PARTS_MAX {
                self.breaks(peer, format!("it does not take what it is sent: {waiting} parts wait"));
            }
        }
    }

    fn flush(&mut self) {
        for peer in std::mem::take(&mut self.unflushed) {
            if !self.say(peer) {
                self.unflushed.insert(peer);
            }
        }
    }

    fn look(&mut self, now: Instant) {
        if self.alarm.is_due(now) {
            self.alarm.quiet();
        }
        self.progress();
        self.take_care(now);
    }

    fn next(&mut self) -> Option<Carried> {
        if let Some(peer) = self.called.pop_front() {
            return Some(Carried::Called(peer));
        }
        while let Some(&peer) = self.speaking.front() {
            let Some(session) = self.sessions.get_mut(&peer).filter(|session| session.ending.is_none()) else {
                self.speaking.pop_front();
                continue;
            };
            let reason = match session.incoming.next() {
                Ok(Some(Whole::Frame(frame))) => return Some(Carried::Frame(peer, frame)),
                Ok(Some(Whole::End)) => Some("it closed the connection".to_owned()),
                Ok(None) => session.broken.take(),
                Err(reason) => Some(reason),
            };
            self.speaking.pop_front();
            if session.incoming.must_tell() {
                self.unflushed.insert(peer);
            }
            if let Some(reason) = reason {
                self.forget(peer);
                return Some(Carried::Lost(peer, reason));
            }
        }
        None
    }

    fn take_fds(&mut self, _: PeerId, _: usize) -> Result<Vec<OwnedFd>, String> {
        Err("it announced descriptors, which do not travel here".to_owned())
    }

    fn owner(&self, peer: PeerId) -> Owner<'_> {
        Owner { socket: None, pid: None, peer: Some(peer), is_beyond: false }
    }

    fn close(&mut self, peer: PeerId) {
        let now = Instant::now();
        let Some(session) = self.sessions.get_mut(&peer) else { return };
        if session.ending.is_some() {
            return;
        }
        // Whoever has not answered has nothing to be told.
        if session.theirs.is_none() || session.broken.is_some() || session.incoming.has_ended() {
            return self.forget(peer);
        }
        session.outgoing.end();
        session.ending = Some(now + LAST_WORDS);
        self.unflushed.insert(peer);
        self.care_by(now + Duration::from_millis(20));
        self.flush();
    }

    fn wait(&mut self, deadline: Option<Instant>, now: Instant) -> Wait {
        if !self.speaking.is_empty() || !self.called.is_empty() {
            return Wait::Busy;
        }
        let at = deadline.into_iter().chain(self.next_care).min();
        // What the endpoint did not take yet it takes after more polls, which nothing announces.
        if !self.unflushed.is_empty() || !self.idle_receives.is_empty() || !self.alarm.set(at, now) {
            return Wait::MustPoll;
        }
        match self.domain.sleep() {
            Sleep::Yes => Wait::Ready(Arc::clone(&self.domain.poller)),
            Sleep::NotNow => Wait::Busy,
            Sleep::Never => Wait::MustPoll,
        }
    }
}
