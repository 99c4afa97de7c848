//! How transfers, pools and connections end before their time.

use kvferry_core::{PoolId, TransferId};
use kvferry_transport::{Direction, Event, PeerId, Stage, TransferError};

use crate::connection::Phase;
use crate::frame::{Kind, Refusal};
use crate::stream::Flow;
use crate::transport::TcpTransport;

impl TcpTransport {
    /// Ends an expected transfer here and at its sender.
    pub(crate) fn end_expected(&mut self, id: TransferId, error: TransferError, words: &str) {
        let Some(expectation) = self.expected.remove(&id) else {
            return;
        };
        if let Some(arriving) = expectation.arriving
            && let Some(connection) = self.connections.get_mut(&arriving.peer)
        {
            connection.writes.remove(&arriving.tag);
            connection.drop_transfer((Flow::Push, arriving.tag), false);
            self.refuse(arriving.peer, arriving.base, arriving.tag, &Refusal::text(words));
        }
        self.report(expectation.local.stage.as_slice(), Event::Failed { id, error });
    }

    /// Ends a posted transfer here and at its responder.
    pub(crate) fn end_posted(&mut self, id: TransferId, error: TransferError) {
        let Some(posted) = self.posts.remove(&id) else {
            return;
        };
        if let Some(connection) = self.connections.get_mut(&posted.peer)
            && posted.phase != Phase::Queued
        {
            connection.posts.remove(&posted.tag);
            connection.drop_transfer(posted.key(), posted.direction == Direction::Push);
            self.control(posted.peer, posted.base, Kind::Cancel, posted.tag, &[]);
        }
        self.report(posted.local.stage.as_slice(), Event::Failed { id, error });
    }

    /// Takes a connection down; its transfers fail.
    pub(crate) fn lose(&mut self, peer: PeerId, reason: &str) {
        let Some(connection) = self.connections.remove(&peer) else {
            return;
        };
        tracing::debug!(peer = peer.0, reason, "connection ended");
        for token in &connection.tokens {
            self.places.remove(token);
            self.greetings.remove(token);
        }
        if let Some(name) = connection.accepted_as {
            self.accepted.remove(&name);
        }
        self.imports.retain(|_, (of, _)| *of != peer);
        self.held.retain(|_, held| held.peer != peer);
        let error = TransferError::PeerLost(reason.to_owned());
        let mut ended: Vec<(TransferId, Option<Stage>)> = Vec::new();
        self.posts.retain(|id, posted| {
            let keep = posted.peer != peer;
            if !keep {
                ended.push((*id, posted.local.stage.clone()));
            }
            keep
        });
        self.expected.retain(|id, expectation| {
            let keep = expectation.arriving.as_ref().is_none_or(|arriving| arriving.peer != peer);
            if !keep {
                ended.push((*id, expectation.local.stage.clone()));
            }
            keep
        });
        for (id, stage) in ended {
            self.report(stage.as_slice(), Event::Failed { id, error: error.clone() });
        }
    }

    /// Ends everything that uses a pool, here and at the peers.
    pub(crate) fn withdraw(&mut self, pool: PoolId) {
        let Some(bound) = self.pools.remove(&pool) else {
            return;
        };
        let posts: Vec<_> = self.posts.iter().filter(|(_, p)| p.local.pool.id() == pool).map(|(id, _)| *id).collect();
        for id in posts {
            self.end_posted(id, TransferError::Unbound);
        }
        let expected: Vec<_> =
            self.expected.iter().filter(|(_, e)| e.local.pool.id() == pool).map(|(id, _)| *id).collect();
        for id in expected {
            self.end_expected(id, TransferError::Unbound, "the destination pool was withdrawn");
        }
        let mut refused = Vec::new();
        for (peer, connection) in &mut self.connections {
            let tags: Vec<_> = connection.reads.iter().filter(|(_, r)| r.pool == pool).map(|(tag, _)| *tag).collect();
            for tag in tags {
                if let Some(serving) = connection.reads.remove(&tag) {
                    connection.drop_transfer((Flow::Pull, tag), true);
                    refused.push((*peer, serving.base, tag));
                }
            }
            for stream in &mut connection.streams {
                stream.release();
            }
        }
        for (peer, base, tag) in refused {
            self.refuse(peer, base, tag, &Refusal::text("the source pool was withdrawn"));
        }
        self.report(bound.stage.as_slice(), Event::Unbound { pool });
    }
}
