//! Transfers that this side posted.

use kvferry_core::{End, TransferId};
use kvferry_transport::{Direction, Event, PeerId, TransferError};

use crate::connection::{Phase, Posted, parts};
use crate::frame::{Kind, ReadRequest, Refusal, WriteRequest};
use crate::receiver::Sink;
use crate::stream::{Flow, Key, Source};
use crate::transport::TcpTransport;
use kvferry_transport::codec::{decode, encode};

impl TcpTransport {
    /// Puts a posted transfer on the wire of a connection that is up.
    pub(crate) fn start(&mut self, id: TransferId) {
        let Some(posted) = self.posts.get_mut(&id) else {
            return;
        };
        let Some(connection) = self.connections.get_mut(&posted.peer) else {
            return;
        };
        posted.tag = connection.new_tag();
        posted.base = connection.new_base();
        posted.parts = parts(&posted.program, posted.range, connection.streams.len());
        posted.parts_left = posted.parts.len();
        connection.posts.insert(posted.tag, id);
        let wire_parts = posted.parts.iter().map(|part| (part.start, part.end)).collect();
        let (kind, payload) = match posted.direction {
            Direction::Pull => {
                posted.phase = Phase::Moving;
                let streams = connection.streams.len().max(1);
                for (offset, part) in posted.parts.iter().enumerate() {
                    let sink = Sink::new(posted.share(*part), posted.program.bytes_in(*part));
                    if let Some(stream) = connection.streams.get_mut((posted.base + offset) % streams) {
                        stream.add_sink(posted.key(), sink);
                    }
                }
                (Kind::Read, read_request(posted, wire_parts))
            }
            Direction::Push => {
                posted.phase = Phase::Announced;
                let request = WriteRequest {
                    id,
                    pool: posted.remote.pool,
                    token: posted.remote.token,
                    fingerprint: posted.program.fingerprint(),
                    parts: wire_parts,
                    notice: posted.notice,
                };
                (Kind::Write, encode(&request))
            }
        };
        let (peer, base, tag) = (posted.peer, posted.base, posted.tag);
        self.control(peer, base, kind, tag, &payload);
    }

    pub(crate) fn on_go(&mut self, peer: PeerId, tag: u64) -> Result<(), String> {
        let Some(connection) = self.connections.get(&peer) else {
            return Ok(());
        };
        // The go and a cancel may cross.
        let Some(id) = connection.posts.get(&tag) else {
            return Ok(());
        };
        let streams = connection.streams.len().max(1);
        let Some(posted) = self.posts.get_mut(id) else {
            return Ok(());
        };
        if posted.phase != Phase::Announced {
            return Err(format!("a go for {id}, which does not wait for one"));
        }
        posted.phase = Phase::Moving;
        let (base, key) = (posted.base, posted.key());
        let sources: Vec<_> = posted
            .parts
            .iter()
            .map(|part| Source { key, share: posted.share(*part), left: posted.program.bytes_in(*part) })
            .collect();
        for (offset, source) in sources.into_iter().enumerate() {
            self.send_part(peer, (base + offset) % streams, source);
        }
        Ok(())
    }

    pub(crate) fn on_ack(&mut self, peer: PeerId, tag: u64) -> Result<(), String> {
        let Some(connection) = self.connections.get_mut(&peer) else {
            return Ok(());
        };
        let Some(id) = connection.posts.get(&tag).copied() else {
            return Ok(());
        };
        let sent = self.posts.get(&id).is_some_and(|p| p.direction == Direction::Push && p.parts_left == 0);
        if !sent {
            return Err(format!("an acknowledgement of {id} before all of it was sent"));
        }
        connection.posts.remove(&tag);
        if let Some(posted) = self.posts.remove(&id) {
            let bytes = posted.program.bytes_in(posted.range);
            if let Some(stage) = &posted.local.stage {
                self.show_staged(peer, stage, bytes, posted.since.elapsed());
            }
            self.events.push(Event::Completed { id, bytes, pieces: posted.pieces });
        }
        Ok(())
    }

    pub(crate) fn on_refuse(&mut self, peer: PeerId, tag: u64, payload: &[u8]) -> Result<(), String> {
        let refusal: Refusal = decode(payload).map_err(|error| format!("a refusal: {error}"))?;
        let Some(connection) = self.connections.get_mut(&peer) else {
            return Ok(());
        };
        let Some(id) = connection.posts.remove(&tag) else {
            return Ok(());
        };
        let Some(posted) = self.posts.remove(&id) else {
            return Ok(());
        };
        connection.drop_transfer(posted.key(), posted.direction == Direction::Push);
        let error = match refusal {
            Refusal::Text(words) => TransferError::Refused(words),
            Refusal::Mismatch { here, there } => TransferError::Mismatch { local: there, remote: here },
        };
        self.report(posted.local.stage.as_slice(), Event::Failed { id, error });
        Ok(())
    }

    pub(crate) fn pull_placed(&mut self, peer: PeerId, tag: u64, pieces: u64) {
        let Some(connection) = self.connections.get_mut(&peer) else {
            return;
        };
        let Some(id) = connection.posts.get(&tag).copied() else {
            return;
        };
        let Some(posted) = self.posts.get_mut(&id) else {
            return;
        };
        posted.pieces += pieces;
        posted.parts_left = posted.parts_left.saturating_sub(1);
        if posted.parts_left > 0 {
            return;
        }
        connection.posts.remove(&tag);
        let Some(posted) = self.posts.remove(&id) else {
            return;
        };
        let bytes = posted.program.bytes_in(posted.range);
        if let Some(notice) = posted.notice {
            self.control(peer, posted.base, Kind::Notice, tag, &encode(&notice));
        }
        if let Some(stage) = &posted.local.stage {
            self.show_staged(peer, stage, bytes, posted.since.elapsed());
        }
        self.events.push(Event::Completed { id, bytes, pieces: posted.pieces });
    }

    pub(crate) fn sent(&mut self, peer: PeerId, (flow, tag): Key, pieces: u64) {
        let Some(connection) = self.connections.get_mut(&peer) else {
            return;
        };
        match flow {
            Flow::Pull => {
                if let Some(serving) = connection.reads.get_mut(&tag) {
                    serving.parts_left = serving.parts_left.saturating_sub(1);
                    if serving.parts_left == 0 {
                        connection.reads.remove(&tag);
                    }
                }
            }
            Flow::Push => {
                let id = connection.posts.get(&tag);
                if let Some(posted) = id.and_then(|id| self.posts.get_mut(id)) {
                    posted.pieces += pieces;
                    posted.parts_left = posted.parts_left.saturating_sub(1);
                }
            }
        }
    }
}

/// The request of a pull: everything that the owner needs, so the source's tables and not the destination's.
fn read_request(posted: &Posted, parts: Vec<(u64, u64)>) -> Vec<u8> {
    let request = ReadRequest {
        pool: posted.remote.pool,
        token: posted.remote.token,
        fingerprint: posted.program.fingerprint(),
        parts,
    };
    let mut payload = encode(&request);
    posted.program.encode_for(End::Source, &mut payload);
    payload
}
