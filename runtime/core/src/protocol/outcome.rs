//! How a handover ends, and why.

use core::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{GroupId, HandoverId, NodeId, Rank, RequestId, TransportKind};

/// Which side of a handover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Role {
    /// Computes KV.
    Prefill,
    /// Consumes KV.
    Decode,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Prefill => "prefill",
            Role::Decode => "decode",
        })
    }
}

/// The final answer about one handover, decided by the decode leader and never changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Every needed byte is in its place on every owning rank.
    Delivered,
    /// It is not, and never will be.
    Failed {
        /// Why.
        reason: FailReason,
    },
    /// Somebody asked to stop it before it was delivered.
    Cancelled,
}

impl Outcome {
    /// Whether the KV arrived.
    pub fn is_delivered(&self) -> bool {
        matches!(self, Outcome::Delivered)
    }
}

/// What the prefill side knows when its part of a handover ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PrefillView {
    /// Every reader had its lease confirmed after its last byte.
    Confirmed,
    /// It ended before that.
    Ended,
    /// A reader was lost between its last byte and its confirmation: it may or may not count as delivered.
    InDoubt,
}

/// Why a handover failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Error)]
#[non_exhaustive]
pub enum FailReason {
    /// A rank that takes part is gone; its group fails with it.
    #[error("{role} {rank} of {group} ({node}) was lost: {cause}")]
    RankLost {
        /// Which side it was on.
        role: Role,
        /// Its group.
        group: GroupId,
        /// Its rank.
        rank: Rank,
        /// Its node.
        node: NodeId,
        /// How that was noticed.
        cause: String,
    },
    /// The other side refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A wait ran out.
    #[error(
        "no {awaited} within {waited_ms} ms; if the link is merely slow raise kv_transfer_timeout_ms, otherwise look at the peer"
    )]
    Deadline {
        /// What did not come.
        awaited: Awaited,
        /// How long was waited, in milliseconds.
        waited_ms: u64,
    },
    /// A transport gave up.
    #[error("the {kind} transfer with {peer} failed: {message}")]
    Transport {
        /// Which transport.
        kind: TransportKind,
        /// With whom.
        peer: NodeId,
        /// What it said.
        message: String,
    },
    /// The two ranks cannot exchange KV.
    #[error("the ranks do not fit together: {0}")]
    Mismatch(String),
    /// The serving engine refused, for the reason it gave.
    #[error("the engine refused: {0}")]
    Engine(String),
    /// The rank takes no more work.
    #[error("the rank takes no work: {0}")]
    Unhealthy(String),
    /// There is no live group that could take it.
    #[error("no live {0} group is left that could take it")]
    NoGroup(Role),
}

/// What a wait was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Awaited {
    /// The prefill group's offer.
    Offer,
    /// A decode group with room.
    Pairing,
    /// Destination blocks from the engine.
    Placement,
    /// Layers that the source has yet to compute.
    Layers,
    /// The bytes, and the owners' confirmation after them.
    Transfer,
    /// The outcome that the decode leader owes.
    Outcome,
}

impl fmt::Display for Awaited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Awaited::Offer => "offer from the prefill group",
            Awaited::Pairing => "decode group with room",
            Awaited::Placement => "destination blocks",
            Awaited::Layers => "further layers from the prefill ranks",
            Awaited::Transfer => "complete and confirmed transfer",
            Awaited::Outcome => "outcome from the decode leader",
        })
    }
}

/// A peer's answer to something that it will not do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Nobody offered that request here, or it was released.
    #[error("{0} is not offered here (any more); prefill it again")]
    UnknownRequest(RequestId),
    /// No offer belongs to that handover (any more).
    #[error("{0} has no offer here (any more); its bytes are not to be trusted; prefill it again")]
    UnknownHandover(HandoverId),
    /// The lease ran out before the reader had finished: its blocks may hold other KV now.
    #[error("the lease of {0} has expired; its bytes are not to be trusted; prefill it again")]
    LeaseExpired(RequestId),
    /// The offer belongs to a newer handover.
    #[error("{request} belongs to {newer} now")]
    Superseded {
        /// Which request.
        request: RequestId,
        /// Who has it.
        newer: HandoverId,
    },
    /// More than anything here is made for.
    #[error(
        "{request} has {tokens} tokens and {hashes} prefix hashes; at most {} and {} are accepted",
        crate::limits::TOKENS_MAX,
        crate::limits::PREFIX_HASHES_MAX
    )]
    TooLarge {
        /// Which request.
        request: RequestId,
        /// Its tokens.
        tokens: u64,
        /// Its prefix hashes.
        hashes: usize,
    },
    /// A request of that id is offered already.
    #[error("{0} is offered already; finish or release it first")]
    Duplicate(RequestId),
    /// The requester is not a rank that could take part.
    #[error("{rank} of {group} takes no part in {request}: {why}")]
    NotAParty {
        /// Which request.
        request: RequestId,
        /// The asking group.
        group: GroupId,
        /// The asking rank.
        rank: Rank,
        /// Why not.
        why: String,
    },
    /// The ranks cannot exchange KV; the message lists the fields.
    #[error("the ranks do not fit together: {0}")]
    Mismatch(String),
    /// The writer's transport gave up on a push.
    #[error("the writer's transport failed: {0}")]
    Transport(String),
    /// A table or a count that does not fit the geometry.
    #[error("{0}")]
    BadTables(String),
}
