//! All effects of the core are a [`Command`], all its observations an [`Event`].

use core::time::Duration;
use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{
    Away, Begun, ChosenPath, FailReason, FetchCourse, Message, OfferCourse, Outcome, OutcomeReport, PathReport,
    PrefillJob, PrefillView, RailTurn, Refusal, RequestCourse, RequestSpec, ShownPath,
};
use crate::{
    Direction, Epoch, Evidence, FenceProof, GroupId, HandoverId, Moment, NodeId, PoolLayout, Program, RequestId,
    Tables, TransferId, UnitRange,
};

/// Something that the shell must do, in the order given.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Command {
    /// Send a message; a node that is this one gets it at once, without a session.
    Send {
        /// To whom.
        to: NodeId,
        /// What.
        message: Message,
    },
    /// Have a session with a peer: something waits for it.
    Meet {
        /// With whom.
        node: NodeId,
    },
    /// Tell the serving engine.
    Engine(EngineCall),
    /// Tell a NIC of this node.
    Nic {
        /// Which, by its place in this node's list.
        nic: usize,
        /// What.
        command: NicCommand,
    },
}

/// What a worker asks of its serving engine. The engine answers with [`EngineEvent`]s, in its own time.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum EngineCall {
    /// Prefill: compute this and offer it.
    Prefill(PrefillJob),
    /// Prefill: nobody reads it any more; its blocks are the engine's again. Answered by [`EngineEvent::Released`].
    Release {
        /// Which request.
        request: RequestId,
        /// What is known of its handover.
        view: PrefillView,
    },
    /// Decode: find blocks for this.
    Place {
        /// Which handover.
        handover: HandoverId,
        /// What comes.
        spec: RequestSpec,
    },
    /// Decode: it is decided. Blocks of a delivered handover hold its KV; of any other, they are to be taken back unless `quarantined`.
    Settled {
        /// Which handover.
        handover: HandoverId,
        /// Of which request.
        request: RequestId,
        /// How it ended.
        outcome: Outcome,
        /// Something may still write the blocks: they are not to be reused before [`EngineCall::Returned`].
        quarantined: bool,
    },
    /// Decode: nothing writes the quarantined blocks any more.
    Returned {
        /// Which handover.
        handover: HandoverId,
        /// How that is known.
        proof: FenceProof,
    },
    /// After [`EngineEvent::Drain`]. Prefill: nothing is offered any more, or the time is up; the node can be shut down. Decode: at once.
    Drained {
        /// Offers that are still not over; what reads them fails. Decode: fetches under way.
        left: u64,
    },
    /// Something that the engine said made no sense.
    Rejected {
        /// About which request.
        request: RequestId,
        /// Why.
        refusal: Refusal,
    },
}

/// What a serving engine tells its worker.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum EngineEvent {
    /// Prefill: blocks are allocated; layers follow in these steps.
    Opened {
        /// Which request.
        request: RequestId,
        /// Its blocks on this rank, one table per layer group.
        tables: Tables,
        /// Model-layer ends of the steps, ascending; the last is the model's layer count.
        steps: Vec<u32>,
    },
    /// Prefill: the first `steps` steps are computed and will not change until released.
    Ready {
        /// Which request.
        request: RequestId,
        /// How many steps.
        steps: u32,
    },
    /// Prefill: it cannot be computed.
    Unable {
        /// Which request.
        request: RequestId,
        /// Why.
        reason: String,
    },
    /// Prefill: a [`EngineCall::Release`] was taken; what the engine says of that request from now on is about a later prefill of it.
    Released {
        /// Which request.
        request: RequestId,
    },
    /// Prefill: this rank is to leave. It offers nothing new, its group takes no work any more, and what is offered is waited for:
    /// [`EngineCall::Drained`]. A decode rank drains nothing, and answers at once.
    Drain {
        /// For so long at most.
        within: Duration,
    },
    /// Decode: here are blocks.
    Placed {
        /// Which handover.
        handover: HandoverId,
        /// Its blocks on this rank, one table per layer group.
        tables: Tables,
        /// Tokens from the start whose KV they hold already (full-attention layers).
        have: u64,
    },
    /// Decode: there is no room and will be none.
    NoRoom {
        /// Which handover.
        handover: HandoverId,
        /// Why.
        reason: String,
    },
    /// Decode: the engine has let the blocks of a delivered handover go.
    Freed {
        /// Which handover.
        handover: HandoverId,
    },
    /// Decode: prefix blocks that are held from now on, and no longer.
    Holds {
        /// Hashes that are held now.
        added: Vec<u64>,
        /// Hashes that were evicted.
        removed: Vec<u64>,
    },
}

/// What a worker asks of a NIC.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum NicCommand {
    /// Connect to a peer's NIC and import its pool.
    Connect {
        /// Which node.
        node: NodeId,
        /// Its NIC's address.
        address: Bytes,
        /// Its pool's keys.
        keys: Bytes,
        /// Its pool's layout.
        layout: Arc<PoolLayout>,
    },
    /// Let a peer go.
    Disconnect {
        /// Which node.
        node: NodeId,
    },
    /// Prove that nothing of a peer can touch memory here any more: [`NicEvent::Fenced`], once that is so.
    Fence {
        /// Which node.
        node: NodeId,
        /// Its NIC's address: a peer that writes here need not have been connected to from here, and may have started over at another one.
        address: Bytes,
        /// Comes back with the proof; whoever asks counts up.
        ticket: u64,
    },
    /// Let a peer go, and fail with this reason whatever is posted to it, until it is connected anew: [`NicEvent::PeerLost`].
    Refuse {
        /// Which node.
        node: NodeId,
        /// Why.
        reason: String,
    },
    /// Start a transfer with a connected peer.
    Post {
        /// Its name.
        id: TransferId,
        /// With whom.
        node: NodeId,
        /// Who initiates: this side.
        direction: Direction,
        /// What moves.
        program: Arc<Program>,
        /// Which part of it: rails share programs.
        range: UnitRange,
    },
    /// Expect a peer's push.
    Expect {
        /// Its name.
        id: TransferId,
        /// The address of the NIC that it may come from.
        from: Bytes,
        /// What may arrive.
        program: Arc<Program>,
        /// Which part of it: rails share programs.
        range: UnitRange,
    },
    /// Stop a posted or expected transfer.
    Cancel {
        /// Which.
        id: TransferId,
    },
}

/// What a NIC tells its worker.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NicEvent {
    /// A peer can be posted to.
    Connected {
        /// Which node.
        node: NodeId,
    },
    /// More is known of the path to a connected peer. At most once or twice per connection, never per transfer.
    Shown {
        /// Which node.
        node: NodeId,
        /// What.
        evidence: Box<Evidence>,
    },
    /// A peer cannot (any more).
    PeerLost {
        /// Which node.
        node: NodeId,
        /// Why.
        reason: String,
    },
    /// The NIC has taken a posted or expected transfer. Only where somebody measures that, and not before anything else of it is told.
    Posted {
        /// Which.
        id: TransferId,
        /// How long it took, from the command on.
        took: Duration,
    },
    /// A posted transfer, or an expected one, is done.
    Done {
        /// Which.
        id: TransferId,
        /// Bytes that moved.
        bytes: u64,
        /// Contiguous pieces that it took.
        pieces: u64,
    },
    /// A posted or expected transfer ended otherwise; nothing of it touches local memory any more.
    Failed {
        /// Which.
        id: TransferId,
        /// Why.
        reason: String,
    },
    /// Nothing of what a peer was up to at that address when the fence was asked for can write here any more.
    Fenced {
        /// Which node.
        node: NodeId,
        /// Its NIC's address.
        address: Bytes,
        /// Of the fence; whatever was asked for later has no proof yet.
        ticket: u64,
        /// How that is known.
        proof: FenceProof,
    },
}

/// Something that happened, for whoever watches: progress lines, metrics, the simulator's observers.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// A group has all its ranks.
    GroupReady {
        /// Which.
        group: GroupId,
    },
    /// This node talks with an incarnation of another one from now on.
    Met {
        /// Who.
        node: NodeId,
        /// In which incarnation.
        epoch: Epoch,
    },
    /// The path to a worker of the other side was chosen: once per conversation with it, for each of its rails.
    PathChosen(Box<ChosenPath>),
    /// More is known of a path that this side initiates transfers on.
    PathShown(Box<ShownPath>),
    /// One of several rails to a peer failed, became slow, or is back.
    RailTurned(Box<RailTurn>),
    /// It no longer does; what was said last may not have been heard.
    Parted {
        /// Who.
        node: NodeId,
        /// In which incarnation.
        epoch: Epoch,
        /// Why.
        cause: String,
    },
    /// A node is gone.
    NodeLost {
        /// Which.
        node: NodeId,
        /// How that was noticed.
        cause: String,
    },
    /// This node was away, and its incarnation ends: whatever supervises it is to start it again in its next epoch.
    WasAway(Away),
    /// A prefill rank opened an offer.
    OfferOpened {
        /// Which request.
        request: RequestId,
    },
    /// A prefill rank's offer is gone.
    OfferClosed {
        /// Which request.
        request: RequestId,
        /// What is known of its handover.
        view: PrefillView,
    },
    /// An offer's lease was granted or renewed.
    LeaseHeld {
        /// Which request.
        request: RequestId,
        /// Until when, on the rank's clock.
        until: Moment,
    },
    /// Something may still write the blocks of a handover that is over.
    Quarantined {
        /// Which handover.
        handover: HandoverId,
    },
    /// Nothing does any more.
    Drained {
        /// Which handover.
        handover: HandoverId,
        /// How that is known.
        proof: FenceProof,
    },
    /// Whether this rank, or the group that it leads, takes new work.
    Health {
        /// Why not; `None` when it does.
        trouble: Option<String>,
    },
    /// A prefill rank offers nothing new any more and waits for what is offered.
    Draining {
        /// What is offered.
        offers: u64,
        /// For how long at most, on the rank's clock.
        until: Moment,
    },
    /// It waits no longer.
    DrainEnded {
        /// Offers that are still not over.
        left: u64,
    },
    /// Something is taken in hand; one of the three records that follow is its end.
    Began(Box<Begun>),
    /// A decode rank's part of a handover is decided.
    FetchEnded(Box<FetchCourse>),
    /// A prefill rank's offer is over.
    OfferEnded(Box<OfferCourse>),
    /// A request is over at the scheduler.
    RequestEnded(Box<RequestCourse>),
    /// A lease ran out before anybody released it.
    LeaseExpired {
        /// Which request.
        request: RequestId,
    },
    /// The scheduler paired an offer.
    Paired {
        /// Which request.
        request: RequestId,
        /// As which handover.
        handover: HandoverId,
        /// With which decode group.
        group: GroupId,
    },
    /// The first transfer of a handover was posted.
    Started {
        /// Which handover.
        handover: HandoverId,
    },
    /// The decode leader decided.
    Settled {
        /// The report.
        report: OutcomeReport,
    },
    /// The scheduler is done with a request, whatever it took.
    Finished(Finished),
    /// All blocks of a delivered request were let go at the decode side.
    Freed {
        /// Which request.
        request: RequestId,
    },
    /// A peer said something that makes no sense; nothing was done.
    Ignored {
        /// Who.
        from: NodeId,
        /// What.
        what: &'static str,
    },
}

/// The scheduler's last word on a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finished {
    /// Which request.
    pub request: RequestId,
    /// How it ended.
    pub outcome: Outcome,
    /// Attempts that it took.
    pub attempts: u32,
    /// When the last prefill rank was ready, on that rank's clock.
    pub ready_at: Option<Moment>,
    /// When the decode leader decided, on its clock.
    pub settled_at: Option<Moment>,
    /// What moved, and how.
    pub paths: Vec<PathReport>,
}

/// The outputs of one state machine, in order.
#[derive(Clone, Debug, Default)]
pub struct Outbox {
    commands: VecDeque<Command>,
    events: VecDeque<Event>,
}

impl Outbox {
    pub(crate) fn send(&mut self, to: NodeId, message: Message) {
        self.commands.push_back(Command::Send { to, message });
    }

    pub(crate) fn meet(&mut self, node: NodeId) {
        self.commands.push_back(Command::Meet { node });
    }

    pub(crate) fn engine(&mut self, call: EngineCall) {
        self.commands.push_back(Command::Engine(call));
    }

    pub(crate) fn nic(&mut self, nic: usize, command: NicCommand) {
        self.commands.push_back(Command::Nic { nic, command });
    }

    pub(crate) fn event(&mut self, event: Event) {
        self.events.push_back(event);
    }

    /// The next thing to do.
    pub fn poll_command(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }

    /// The next thing that happened.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }
}

/// A failure that a peer's refusal caused.
impl From<Refusal> for Outcome {
    fn from(refusal: Refusal) -> Self {
        Outcome::Failed { reason: FailReason::Refused(refusal) }
    }
}
