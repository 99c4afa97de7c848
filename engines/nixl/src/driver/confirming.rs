//! Behind the last byte of what was read: whether its owner's tickets still stand.

use kvferry_ucx::raw::{RawPiece, RawRange, RawWay};

use super::Driver;
use crate::AgentError;

impl Driver {
    /// Reads the peer's tickets, behind the last byte that was read under them.
    pub(super) fn confirm(&mut self, id: u64) {
        let Some(flight) = self.flights.get_mut(&id) else { return };
        let Some(places) = self.board.places(flight.tickets.len()) else {
            // Others are asking; each of them makes room.
            return self.unconfirmed.push(id);
        };
        flight.places = Some(places);
        let (tickets, peer) = (flight.tickets.clone(), flight.peer.clone());
        let board = self.peers.get_mut(&peer).ok_or_else(|| "it was removed".to_owned());
        let (base, key) = match board.and_then(|remote| remote.board()) {
            Ok(board) => board,
            Err(reason) => return self.doom(id, AgentError::Failed { name: peer, reason }),
        };
        let answers = self.board.answers().clone();
        let copies = tickets.iter().enumerate().map(|(index, ticket)| RawPiece {
            range: RawRange { region: 0, offset: places.offset(index), bytes: 8 },
            // Slots were checked to be on the board, and that to be in the address space.
            address: base.saturating_add(u64::from(ticket.slot) * 8),
        });
        let count = tickets.len();
        if self.post(id, count, |link, number| link.raw.copy(number, RawWay::Read, (&answers, &key), copies)) {
            self.judge(id);
        }
    }

    /// The answers are here.
    pub(super) fn judge(&mut self, id: u64) {
        let Some(flight) = self.flights.get_mut(&id) else { return };
        // It still waits for room.
        let Some(places) = flight.places.take() else { return };
        let wrong = self.board.judge(places, &flight.tickets);
        match wrong {
            Some(ticket) => {
                let (name, lease) = (flight.peer.clone(), flight.lease == Some(ticket));
                self.doom(id, if lease { AgentError::LeaseEnded { name } } else { AgentError::Withdrawn { name } });
            }
            None => self.tell(id),
        }
    }

    /// Goes on with those for whose answers there was no room.
    pub(super) fn confirm_waiting(&mut self) {
        for id in std::mem::take(&mut self.unconfirmed) {
            self.confirm(id);
        }
    }
}
