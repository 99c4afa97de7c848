//! A NIC that moves nothing, but answers every transfer exactly once: some of those that are cancelled only after a fence.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use kvferry_core::protocol::NicCommand;
use kvferry_core::{Direction, NodeId, TransferId};

/// One transfer that has not ended.
pub(super) struct Flight {
    /// With whom, when it was posted here; `None` for one that is expected.
    pub(super) posted: Option<(NodeId, Direction)>,
    pub(super) bytes: u64,
    pub(super) cancelled: bool,
    /// The hardware does not let go of it before a fence.
    stuck: bool,
    /// The writer has written all of it (expected transfers).
    pub(super) arrived: bool,
}

/// The transfers of one node.
#[derive(Default)]
pub(super) struct Nic {
    pub(super) flights: BTreeMap<TransferId, Flight>,
    connected: BTreeSet<NodeId>,
    /// Fences that were asked for and have not been answered.
    pub(super) fences: BTreeMap<NodeId, (Bytes, u64)>,
}

impl Nic {
    /// `stubborn`: what is cancelled now ends only with a fence.
    pub(super) fn command(&mut self, command: NicCommand, stubborn: bool) -> Result<(), String> {
        let (id, flight) = match command {
            NicCommand::Connect { node, .. } => {
                self.connected.insert(node);
                return Ok(());
            }
            NicCommand::Disconnect { node } => {
                self.connected.remove(&node);
                return Ok(());
            }
            NicCommand::Cancel { id } => {
                if let Some(flight) = self.flights.get_mut(&id) {
                    flight.cancelled = true;
                    flight.stuck = stubborn;
                }
                return Ok(());
            }
            NicCommand::Fence { node, address, ticket } => {
                self.fences.insert(node, (address, ticket));
                return Ok(());
            }
            NicCommand::Post { id, node, direction, program, range } => {
                (id, Flight::new(Some((node, direction)), program.bytes_in(range)))
            }
            NicCommand::Expect { id, program, range, .. } => (id, Flight::new(None, program.bytes_in(range))),
            other => return Err(format!("a command that this NIC does not know: {other:?}")),
        };
        self.flights.insert(id, flight).map_or(Ok(()), |_| Err(format!("{id} was posted twice")))
    }

    pub(super) fn is_connected(&self, node: NodeId) -> bool {
        self.connected.contains(&node)
    }

    /// Transfers that can end now: an expected one waits for its writer.
    pub(super) fn actionable(&self) -> impl Iterator<Item = TransferId> {
        let ends = |flight: &Flight| !flight.stuck && (flight.posted.is_some() || flight.cancelled || flight.arrived);
        self.flights.iter().filter(move |(_, flight)| ends(flight)).map(|(id, _)| *id)
    }
}

impl Flight {
    fn new(posted: Option<(NodeId, Direction)>, bytes: u64) -> Self {
        Flight { posted, bytes, cancelled: false, stuck: false, arrived: false }
    }
}
