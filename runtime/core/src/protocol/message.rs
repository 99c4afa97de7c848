//! Everything that one node says to another once their session stands. `wire.rs` says how it is encoded.

use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{FailReason, MemberList, Outcome, PrefillView, PushShares, Refusal, Role, ShareName, bounds};
use crate::{
    Direction, Epoch, GpuIdentity, GroupGeometry, GroupId, HandoverId, MemoryDomain, Moment, NodeId, PoolLayout, Rank,
    RequestId, Tables, TraceContext, TransportKind,
};

/// One control message. The sender is the session's peer; nothing in a message claims who sent it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Message {
    /// What this node is: the first message of either side.
    Profile(Box<Profile>),
    /// A member asks to join.
    Join(Box<Member>),
    /// Directory → a node: it may not join; it stops.
    JoinRefused(super::JoinError),
    /// Directory → a node: members that concern it.
    Members(MemberList),
    /// A member is gone; its epoch is fenced.
    Lost(Lost),

    /// Scheduler → prefill leader → owning ranks: compute this.
    Prefill(PrefillJob),
    /// Rank → prefill leader: blocks are allocated, the offer stands.
    RankOpened {
        /// Which request.
        request: RequestId,
        /// Model-layer ends of the steps in which layers become ready; the last is the model's layer count.
        steps: Vec<u32>,
    },
    /// Rank → prefill leader: every layer is ready.
    RankReady {
        /// Which request.
        request: RequestId,
        /// When, on the rank's clock.
        at: Moment,
    },
    /// Rank → prefill leader: it will not be, or is no longer, offered.
    RankFailed {
        /// Which request.
        request: RequestId,
        /// Why.
        reason: FailReason,
    },
    /// Prefill leader → scheduler: every owning rank's part is offered.
    Offered(OfferSummary),
    /// Prefill leader → scheduler: every owning rank's part is ready.
    OfferReady {
        /// Which request.
        request: RequestId,
        /// When the last rank was, on that rank's clock.
        at: Moment,
    },
    /// Prefill leader → scheduler: there is no offer (any more).
    OfferFailed {
        /// Which request.
        request: RequestId,
        /// Why.
        reason: FailReason,
    },
    /// Scheduler → prefill leader → ranks: these offers are still wanted.
    Renew {
        /// Which.
        #[serde(deserialize_with = "bounds::named")]
        requests: Vec<RequestId>,
    },
    /// Scheduler → prefill leader → ranks: nobody needs it any more.
    Release {
        /// Which request.
        request: RequestId,
        /// What became of it.
        view: PrefillView,
    },

    /// Scheduler → decode leader: take this offer.
    Pair(Pairing),
    /// Scheduler → decode leader: stop it.
    Abort {
        /// Which handover.
        handover: HandoverId,
        /// `None` when somebody asked to cancel.
        reason: Option<FailReason>,
    },
    /// Decode leader → owning ranks: fetch your part.
    Fetch(FetchJob),
    /// Rank → decode leader → scheduler: the first transfer was posted.
    Started {
        /// Which handover.
        handover: HandoverId,
    },
    /// Rank → decode leader: this rank's part ended.
    RankDone {
        /// Which handover.
        handover: HandoverId,
        /// What moved, or why not.
        result: Result<Vec<PathReport>, FailReason>,
    },
    /// Decode leader → ranks: it is decided.
    Settled {
        /// Which handover.
        handover: HandoverId,
        /// How.
        outcome: Outcome,
    },
    /// Decode leader → scheduler: it is decided.
    Outcome(OutcomeReport),
    /// Scheduler → decode leader: these outcomes are known, they need not be told again.
    OutcomesKnown {
        /// Of which handovers.
        #[serde(deserialize_with = "bounds::named")]
        handovers: Vec<HandoverId>,
    },
    /// Rank → decode leader, whenever they meet: handovers whose outcome it awaits or whose blocks are not the engine's again.
    Holding {
        /// Which, each of which request and of how many tokens; of all others this rank has nothing.
        #[serde(deserialize_with = "bounds::holding")]
        handovers: Vec<(HandoverId, RequestId, u64)>,
    },
    /// Rank → leader → scheduler: whether new work is welcome.
    Health {
        /// Why not; `None` when it is.
        trouble: Option<String>,
    },
    /// Prefill leader → a scheduler that it meets: what its group offers already.
    StandingOffers(#[serde(deserialize_with = "bounds::standing")] Vec<StandingOffer>),
    /// Decode leader → a scheduler that it meets: what its group works on already, and what became of the rest.
    StandingHandovers(Box<StandingHandovers>),
    /// Rank → decode leader → scheduler: its blocks are the engine's again, whatever the outcome was.
    Freed {
        /// Which handover.
        handover: HandoverId,
    },
    /// First rank → decode leader → scheduler: prefix blocks that the group holds from now on, and no longer.
    Holds {
        /// Hashes that are held now.
        added: Vec<u64>,
        /// Hashes that were evicted.
        removed: Vec<u64>,
    },

    /// Decode rank → prefill rank: open your part of a handover to me.
    Open(OpenFetch),
    /// Prefill rank → decode rank: these are the blocks.
    Opened(OpenedFetch),
    /// Decode rank → prefill rank, push: every step is expected here, write what is ready.
    Expecting {
        /// Which handover.
        handover: HandoverId,
    },
    /// Prefill rank → decode rank: steps below `ready` are immutable until release.
    StepsReady {
        /// Which handover.
        handover: HandoverId,
        /// Steps that are ready.
        ready: u32,
    },
    /// Prefill rank → decode rank: no.
    Refused {
        /// Which handover.
        handover: HandoverId,
        /// Why.
        refusal: Refusal,
    },
    /// Decode rank → prefill rank: still at it (renews the lease).
    Reading {
        /// Which handovers.
        #[serde(deserialize_with = "bounds::named")]
        handovers: Vec<HandoverId>,
    },
    /// Decode rank → prefill rank, pull: the last byte is here; was the lease good throughout?
    Fetched {
        /// Which handover.
        handover: HandoverId,
    },
    /// Prefill rank → decode rank: it was.
    Confirmed {
        /// Which handover.
        handover: HandoverId,
    },
    /// Decode rank → prefill rank: it will not finish; stop writing.
    Abandon {
        /// Which handover.
        handover: HandoverId,
    },

    /// First on every link: where the conversation goes on (protocol 2).
    Resume {
        /// What the sender calls what it says, never 0.
        name: u64,
        /// What the receiver calls what it says, as far as the sender knows; otherwise 0.
        peer: u64,
        /// Messages that the sender has heard of it.
        heard: u64,
    },
    /// How many messages of the conversation were heard so far (protocol 2).
    Heard {
        /// That many.
        messages: u64,
    },

    /// Prefill rank → decode rank, push over rails: expect these (protocol 4).
    Shares(PushShares),
    /// Prefill rank → decode rank: that transfer failed, or was told to stop. Nothing else moves its share before its [`Message::ShareEnded`]
    /// (protocol 4).
    ShareStopped(ShareName),
    /// Decode rank → prefill rank: nothing of that transfer writes here any more (protocol 4).
    ShareEnded {
        /// Which.
        share: ShareName,
        /// All of it is here; otherwise it is to be pushed again.
        arrived: bool,
    },
}

/// What a node tells a peer about itself, after both are authenticated: the keys to its memory are in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    /// Its place in a group; `None` for a scheduler.
    pub worker: Option<WorkerProfile>,
}

/// The part of a profile that only workers have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerProfile {
    /// Which side.
    pub role: Role,
    /// Which group.
    pub group: GroupId,
    /// Which rank of it.
    pub rank: Rank,
    /// What its group serves, and how it is cut.
    pub geometry: Arc<GroupGeometry>,
    /// Where its blocks lie.
    pub layout: Arc<PoolLayout>,
    /// Its NICs, best first.
    pub nics: Vec<NicAdvert>,
    /// Who should initiate; `None` leaves it to the peer.
    pub direction: Option<Direction>,
    /// NICs over which it shares out what it pushes, or expects what is pushed; 0 where it does neither. It travels behind the profile (`wire.rs`).
    #[serde(skip)]
    pub rails: u32,
}

/// One NIC as its peers need to know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicAdvert {
    /// Its kind.
    pub kind: TransportKind,
    /// Its device name.
    pub device: String,
    /// Host whose memory it reaches; only NICs with equal, non-empty hosts share memory.
    pub host: String,
    /// What `Transport::connect` needs.
    pub address: Bytes,
    /// What `Transport::import` needs.
    pub keys: Bytes,
    /// From which other hosts it is reached, too. It travels behind the profile (`wire.rs`).
    #[serde(skip)]
    pub domain: Option<MemoryDomain>,
    /// Which GPU it is, where it is one. It travels behind the profile, too.
    #[serde(skip)]
    pub gpu: Option<GpuIdentity>,
}

/// What follows a profile of whose NICs some are reached from other hosts: which of them, and how.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Domains(#[serde(deserialize_with = "bounds::named")] pub(crate) Vec<(u32, MemoryDomain)>);

/// What follows those of a profile of whose NICs some are GPUs: which of them, and which GPUs.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Gpus(#[serde(deserialize_with = "bounds::named")] pub(crate) Vec<(u32, GpuIdentity)>);

/// One live node, as the directory lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its name.
    pub node: NodeId,
    /// Its incarnation.
    pub epoch: Epoch,
    /// Where its control listener is.
    pub address: String,
    /// Its place; `None` for a scheduler.
    pub place: Option<Place>,
}

/// A worker's place in its group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Which side.
    pub role: Role,
    /// Which group.
    pub group: GroupId,
    /// Which rank of it.
    pub rank: Rank,
    /// What its group serves, and how it is cut.
    pub geometry: Arc<GroupGeometry>,
    /// Blocks of its pool, per layer group.
    pub blocks: Vec<u32>,
    /// Handovers that the group takes at once.
    pub handovers_max: u32,
}

/// A member is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    /// Who.
    pub node: NodeId,
    /// Which incarnation, and every earlier one.
    pub epoch: Epoch,
    /// How that was noticed.
    pub cause: String,
}

/// One request as the scheduler was given it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestSpec {
    /// Its name.
    pub request: RequestId,
    /// Tokens of its prompt.
    #[serde(deserialize_with = "bounds::tokens")]
    pub tokens: u64,
    /// Hashes of its prefix blocks, `prefix_tokens` tokens each, first block first; may be empty.
    #[serde(deserialize_with = "bounds::prefix")]
    pub prefix: Arc<Vec<u64>>,
    /// Tokens per prefix hash.
    pub prefix_tokens: u32,
}

/// Work for a prefill group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrefillJob {
    /// What to compute.
    pub spec: RequestSpec,
    /// Which attention-dp group owns it; chosen by the leader.
    pub dp: u32,
    /// The span that it belongs to. It travels behind the message (`wire.rs`).
    #[serde(skip)]
    pub trace: Option<TraceContext>,
}

/// A prefill group's offer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferSummary {
    /// Which request.
    pub request: RequestId,
    /// Which attention-dp group of the prefill group owns it.
    pub dp: u32,
    /// Model-layer ends of its steps.
    pub steps: Vec<u32>,
}

/// An offer given to a decode group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pairing {
    /// Its name.
    pub handover: HandoverId,
    /// What moves.
    pub spec: RequestSpec,
    /// From which group.
    pub source: GroupId,
    /// From which attention-dp group of it.
    pub source_dp: u32,
    /// In which steps.
    pub steps: Vec<u32>,
    /// The span that it belongs to. It travels behind the message (`wire.rs`); in a list of pairings it does not.
    #[serde(skip)]
    pub trace: Option<TraceContext>,
}

/// One decode rank's part of a pairing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FetchJob {
    /// The pairing.
    pub pairing: Pairing,
    /// Which attention-dp group of the decode group owns it; chosen by the leader.
    pub dp: u32,
}

/// A decode rank opens a prefill rank's part of an offer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenFetch {
    /// Which handover.
    pub handover: HandoverId,
    /// Of which request.
    pub request: RequestId,
    /// Tokens that the reader holds already (full-attention layers).
    pub have: u64,
    /// Who initiates.
    pub direction: Direction,
    /// Shapes of the destination's tables, which both ends plan from; the block numbers stay with the reader.
    pub destination: Tables,
}

/// The answer to [`OpenFetch`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenedFetch {
    /// Which handover.
    pub handover: HandoverId,
    /// The source's tables; for a push only their shapes, since the block numbers stay with the writer.
    pub source: Tables,
    /// Steps that are ready.
    pub ready: u32,
}

/// An offer that a scheduler which has just started does not know of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StandingOffer {
    /// What was prefilled, or is being.
    pub spec: RequestSpec,
    /// Which attention-dp group owns it.
    pub dp: u32,
    /// Model-layer ends of its steps, once every owning rank has opened its part.
    pub steps: Option<Vec<u32>>,
    /// When the last rank was ready, on that rank's clock; `None` before.
    pub ready_at: Option<Moment>,
}

/// The handovers of a decode group that a scheduler which has just started does not know of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StandingHandovers {
    /// Not decided.
    #[serde(deserialize_with = "bounds::standing")]
    pub under_way: Vec<Pairing>,
    /// Decided, and no scheduler has said that it knows.
    #[serde(deserialize_with = "bounds::standing")]
    pub decided: Vec<(Pairing, OutcomeReport)>,
    /// Decided, and some rank's engine does not have its blocks back; whether they were delivered.
    #[serde(deserialize_with = "bounds::standing")]
    pub held: Vec<(HandoverId, RequestSpec, bool)>,
}

/// What the decode leader reports of a decided handover.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutcomeReport {
    /// Which handover.
    pub handover: HandoverId,
    /// How it ended.
    pub outcome: Outcome,
    /// When it was decided, on the leader's clock.
    pub at: Moment,
    /// What moved between which ranks.
    pub paths: Vec<PathReport>,
}

/// What moved between one pair of ranks, by which path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathReport {
    /// The prefill group.
    pub source_group: GroupId,
    /// The prefill rank.
    pub source: Rank,
    /// The decode group.
    pub destination_group: GroupId,
    /// The decode rank.
    pub destination: Rank,
    /// The transport that was used.
    pub kind: TransportKind,
    /// Its device here.
    pub device: String,
    /// Who initiated.
    pub direction: Direction,
    /// Bytes that moved.
    pub bytes: u64,
    /// Contiguous pieces, as the destination's transport counted them.
    pub pieces: u64,
}
