//! What the tests of all machines share: a small model, its groups, and shorthands for commands.

use core::time::Duration;
use std::sync::Arc;

use bytes::Bytes;

use crate::protocol::{
    Command, EngineCall, Event, LeaseTerms, Lost, Member, Message, NicAdvert, NicCommand, Outbox, Outcome, Pairing,
    Place, RequestSpec, Role, WorkerProfile,
};
use crate::{
    BlockTable, Direction, Epoch, Format, GroupGeometry, GroupId, HandoverId, Model, Moment, NodeId, Parallel, Rank,
    RequestId, Tables, TransferId, TransportKind,
};

/// Tokens of every request here: two and a half blocks.
pub(super) const TOKENS: u64 = 40;
/// Blocks of every pool.
pub(super) const BLOCKS: u32 = 64;
pub(super) const PREFILL: GroupId = GroupId(0);
pub(super) const DECODE: GroupId = GroupId(10);
pub(super) const R1: RequestId = RequestId(1);
pub(super) const H1: HandoverId = HandoverId(1);
pub(super) const H2: HandoverId = HandoverId(2);

pub(super) fn at(seconds: u64) -> Moment {
    Moment(0) + Duration::from_secs(seconds)
}

pub(super) fn leases() -> LeaseTerms {
    LeaseTerms { duration: Duration::from_secs(30), drift_ppm: 1_000 }
}

pub(super) fn geometry(tp: u32) -> Arc<GroupGeometry> {
    let model = Model::preset("tiny").expect("a preset");
    Arc::new(GroupGeometry { model, format: Format::default(), parallel: Parallel { tp, ..Parallel::default() } })
}

pub(super) fn nic(kind: TransportKind) -> NicAdvert {
    NicAdvert {
        kind,
        device: "sim0".into(),
        host: "h".into(),
        address: Bytes::from_static(b"a"),
        keys: Bytes::from_static(b"k"),
        domain: None,
        gpu: None,
    }
}

pub(super) fn worker(
    role: Role,
    rank: u32,
    geometry: &Arc<GroupGeometry>,
    direction: Option<Direction>,
) -> WorkerProfile {
    let group = if role == Role::Prefill { PREFILL } else { DECODE };
    let layout = Arc::new(geometry.shard(Rank(rank)).expect("a valid rank").layout(&[BLOCKS]));
    let nics = vec![nic(TransportKind::Sim)];
    WorkerProfile { role, group, rank: Rank(rank), geometry: Arc::clone(geometry), layout, nics, direction, rails: 0 }
}

pub(super) fn member(node: u64, role: Role, group: GroupId, rank: u32, geometry: &Arc<GroupGeometry>) -> Member {
    let place =
        Place { role, group, rank: Rank(rank), geometry: Arc::clone(geometry), blocks: vec![BLOCKS], handovers_max: 4 };
    Member { node: NodeId(node), epoch: Epoch(1), address: format!("host:{node}"), place: Some(place) }
}

pub(super) fn lost(node: u64) -> Lost {
    Lost { node: NodeId(node), epoch: Epoch(1), cause: "it crashed".into() }
}

pub(super) fn spec(request: u64) -> RequestSpec {
    RequestSpec { request: RequestId(request), tokens: TOKENS, prefix: Arc::default(), prefix_tokens: 16 }
}

pub(super) fn pairing(handover: HandoverId, steps: &[u32]) -> Pairing {
    Pairing { handover, spec: spec(1), source: PREFILL, source_dp: 0, steps: steps.to_vec(), trace: None }
}

/// A rank's blocks for [`TOKENS`] tokens, numbered from `first` on.
pub(super) fn tables(geometry: &GroupGeometry, rank: u32, first: u32) -> Tables {
    let table = |group| {
        let shape = geometry.blocks_for(group, TOKENS, Rank(rank));
        BlockTable::known(shape.first_token, (first..first + shape.blocks).collect::<Vec<_>>())
    };
    Tables { groups: (0..geometry.model.groups.len()).map(table).collect() }
}

pub(super) fn commands(outbox: &mut Outbox) -> Vec<Command> {
    std::iter::from_fn(|| outbox.poll_command()).collect()
}

/// What happened, without the records of what begins and is over: those have tests of their own.
pub(super) fn events(outbox: &mut Outbox) -> Vec<Event> {
    let all = std::iter::from_fn(|| outbox.poll_event());
    all.filter(|event| !is_course(event) && !matches!(event, Event::Began(_))).collect()
}

/// The records of what is over.
pub(super) fn courses(outbox: &mut Outbox) -> Vec<Event> {
    std::iter::from_fn(|| outbox.poll_event()).filter(is_course).collect()
}

fn is_course(event: &Event) -> bool {
    matches!(event, Event::FetchEnded(_) | Event::OfferEnded(_) | Event::RequestEnded(_))
}

pub(super) fn send(to: u64, message: Message) -> Command {
    Command::Send { to: NodeId(to), message }
}

pub(super) fn engine(call: EngineCall) -> Command {
    Command::Engine(call)
}

pub(super) fn cancel(nic: usize, id: TransferId) -> Command {
    Command::Nic { nic, command: NicCommand::Cancel { id } }
}

pub(super) fn settled(handover: HandoverId, outcome: Outcome, quarantined: bool) -> Command {
    engine(EngineCall::Settled { handover, request: R1, outcome, quarantined })
}

/// The transfers that were posted to a node.
pub(super) fn posts(commands: &[Command]) -> Vec<(u64, TransferId)> {
    let post = |command: &Command| match command {
        Command::Nic { command: NicCommand::Post { id, node, .. }, .. } => Some((node.0, *id)),
        _ => None,
    };
    commands.iter().filter_map(post).collect()
}

/// The transfers that are expected.
pub(super) fn expects(commands: &[Command]) -> Vec<TransferId> {
    let expect = |command: &Command| match command {
        Command::Nic { command: NicCommand::Expect { id, .. }, .. } => Some(*id),
        _ => None,
    };
    commands.iter().filter_map(expect).collect()
}
