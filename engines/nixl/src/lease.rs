//! Leases: an owner's word that what it lent is still what it was, which readers ask for behind their last byte.
//!
//! A ticket is a number in a slot of the owner's board, memory that peers read as they read everything else. Ending the lease changes the number. A
//! reader that finds its number there, behind the last byte that it read, knows that all of it was read under the lease, and the owner's processor had
//! nothing to do with it. Numbers are never used twice, so whatever part of a change a reader sees, it is another number.

use serde::{Deserialize, Serialize};

use crate::{Agent, AgentError};

/// What a reader needs to have a lease confirmed: passed on by any means, as the blocks are that were lent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Ticket {
    pub(crate) slot: u32,
    pub(crate) value: u64,
}

impl Ticket {
    /// Its bytes.
    pub fn to_bytes(self) -> [u8; 12] {
        let mut bytes = [0; 12];
        let (slot, value) = bytes.split_at_mut(4);
        slot.copy_from_slice(&self.slot.to_le_bytes());
        value.copy_from_slice(&self.value.to_le_bytes());
        bytes
    }

    /// The ticket of these bytes, if they are of one.
    pub fn from_bytes(bytes: &[u8]) -> Option<Ticket> {
        let (slot, value) = bytes.split_first_chunk()?;
        Some(Ticket { slot: u32::from_le_bytes(*slot), value: u64::from_le_bytes(value.try_into().ok()?) })
    }
}

/// A lease of this agent's, of whatever its owner says it is of. It ends when it is dropped.
#[derive(Debug)]
pub struct Lease {
    agent: Agent,
    ticket: Ticket,
    ended: bool,
}

impl Lease {
    pub(crate) fn new(agent: Agent, ticket: Ticket) -> Lease {
        Lease { agent, ticket, ended: false }
    }

    /// For its readers: [`Transfer::under`](crate::Transfer::under) and [`Fetch::under`](crate::Fetch::under).
    pub fn ticket(&self) -> Ticket {
        self.ticket
    }

    /// Ends it. Once this returns, no reader will be told that what it reads is what was lent: the memory may be used again, though late reads may still
    /// touch it.
    pub async fn end(mut self) -> Result<(), AgentError> {
        self.ended = true;
        self.agent.end_lease(self.ticket).await
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.ended {
            self.agent.forget_lease(self.ticket);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tickets_are_passed_on_as_bytes() {
        let ticket = Ticket { slot: 7, value: u64::MAX - 3 };
        let bytes = ticket.to_bytes();
        assert_eq!(Ticket::from_bytes(&bytes), Some(ticket));
        assert_eq!(Ticket::from_bytes(&bytes[..11]), None);
        assert_eq!(Ticket::from_bytes(&[bytes.as_slice(), &[0]].concat()), None);
        assert_eq!(Ticket::from_bytes(&[]), None);
    }
}
