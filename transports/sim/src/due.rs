//! What will happen at a known time.

use kvferry_core::TransferId;
use kvferry_transport::{Event, PeerId};

use crate::fabric::NicId;
use crate::flow::FlowId;
use crate::link::LinkId;

/// Something that a fabric has in store.
pub(crate) enum Due {
    /// A dial reaches its NIC.
    Hello { link: LinkId },
    /// Its answer is back.
    Welcome { link: LinkId },
    /// A NIC hears of something.
    Report { nic: NicId, event: Event },
    /// A NIC hears that a transfer has ended: one that it posted, or one that it expected.
    End { nic: NicId, id: TransferId, posted: bool, event: Event },
    /// A post reaches the other end.
    Request { flow: FlowId },
    /// A slice is in place.
    Slice { flow: FlowId },
    /// A push has waited long enough for somebody to expect it.
    Refuse { flow: FlowId },
    /// An endpoint is torn down, unless bytes are still on their way.
    Fenced { nic: NicId, remote: NicId, peer: PeerId },
}

impl Due {
    /// What of it goes into the fabric's digest.
    pub(crate) fn words(&self) -> [u64; 3] {
        match self {
            Due::Hello { link } => [1, link.0, 0],
            Due::Welcome { link } => [2, link.0, 0],
            Due::Report { nic, .. } => [3, nic.0.into(), 0],
            Due::End { nic, id, posted, event } => {
                let good = matches!(event, Event::Completed { .. } | Event::Arrived { .. });
                [4 | u64::from(*posted) << 8 | u64::from(good) << 9, nic.0.into(), id.0 as u64 ^ (id.0 >> 64) as u64]
            }
            Due::Request { flow } => [5, flow.0, 0],
            Due::Slice { flow } => [6, flow.0, 0],
            Due::Refuse { flow } => [7, flow.0, 0],
            Due::Fenced { nic, peer, .. } => [8, nic.0.into(), peer.0.into()],
        }
    }
}
