//! Names of things. Plain numbers with a type, so that a rank is never taken for a group.

use core::fmt;

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty), $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

id!(
    /// A process, or a simulated one. Stable over restarts; [`Epoch`] tells incarnations apart.
    NodeId(u64), "node-"
);
id!(
    /// One incarnation of a node: the fence. A larger epoch ends every right of a smaller one.
    Epoch(u64), "epoch-"
);
id!(
    /// One model instance: the ranks that serve requests together.
    GroupId(u32), "group-"
);
id!(
    /// A rank inside its group, `0..GroupGeometry::ranks()`; rank 0's node hosts the group leader.
    Rank(u32), "rank-"
);
id!(
    /// One request of a user, as the serving stack numbers it.
    RequestId(u64), "request-"
);
id!(
    /// One pairing of an offer with a decode group: a request that is paired again gets a new one.
    HandoverId(u64), "handover-"
);
id!(
    /// One registered memory pool of a node.
    PoolId(u32), "pool-"
);

/// One posted [`Program`](crate::Program), named alike at both ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TransferId(pub u128);

impl TransferId {
    /// The transfer of one step of a handover between one pair of ranks.
    ///
    /// Ranks are below [`crate::limits::RANKS_MAX`] and steps below [`crate::limits::STEPS_MAX`], so the parts never meet. It is chunk 0 of
    /// that step.
    pub fn of(handover: HandoverId, source: Rank, destination: Rank, step: u32) -> Self {
        TransferId(
            u128::from(handover.0) << 64
                | u128::from(source.0 & 0xffff) << 48
                | u128::from(destination.0 & 0xffff) << 32
                | u128::from(step & 0xffff),
        )
    }

    /// The same step's transfer of that number, where several rails move parts of it, or one of them moves a part again.
    pub fn with_chunk(self, chunk: u16) -> Self {
        TransferId(self.0 & !(0xffff << 16) | u128::from(chunk) << 16)
    }

    /// The handover it belongs to.
    pub fn handover(self) -> HandoverId {
        HandoverId((self.0 >> 64) as u64)
    }

    /// The rank whose KV it reads.
    pub fn source(self) -> Rank {
        Rank((self.0 >> 48) as u32 & 0xffff)
    }

    /// The rank whose blocks it fills.
    pub fn destination(self) -> Rank {
        Rank((self.0 >> 32) as u32 & 0xffff)
    }

    /// Which step of the offer it moves.
    pub fn step(self) -> u32 {
        self.0 as u32 & 0xffff
    }

    /// Which of the transfers of that step it is.
    pub fn chunk(self) -> u16 {
        (self.0 >> 16) as u16
    }
}

impl fmt::Display for TransferId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "transfer-{}/{}>{}/{}", self.handover().0, self.source().0, self.destination().0, self.step())?;
        match self.chunk() {
            0 => Ok(()),
            chunk => write!(f, ".{chunk}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_transfer_never_meet() {
        let whole = TransferId::of(HandoverId(7 << 40), Rank(4095), Rank(3), 1023);
        assert_eq!(
            (whole.step(), whole.chunk(), whole.to_string()),
            (1023, 0, "transfer-7696581394432/4095>3/1023".into())
        );
        let part = whole.with_chunk(u16::MAX);
        assert_eq!((part.handover(), part.source(), part.destination()), (whole.handover(), Rank(4095), Rank(3)));
        assert_eq!((part.step(), part.chunk()), (1023, u16::MAX));
        assert_eq!(part.with_chunk(2).to_string(), "transfer-7696581394432/4095>3/1023.2");
        assert_eq!(part.with_chunk(0), whole);
    }
}
