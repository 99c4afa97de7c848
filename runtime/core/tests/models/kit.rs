//! What the models share: a small deployment, and shorthands.

use core::time::Duration;
use std::sync::Arc;

use bytes::Bytes;
use kvferry_core::protocol::{
    Command, Event, LeaseTerms, Lost, Member, NicAdvert, Outbox, Pairing, Place, RequestSpec, Role, WorkerProfile,
};
use kvferry_core::{
    BlockTable, Direction, Epoch, Format, GroupGeometry, GroupId, HandoverId, Model, Moment, NodeId, Parallel, Rank,
    RequestId, Tables, TransportKind,
};

/// Tokens of every request: two and a half blocks.
pub(crate) const TOKENS: u64 = 40;
pub(crate) const BLOCKS: u32 = 64;

pub(crate) fn millis(milliseconds: u64) -> Moment {
    Moment(0) + Duration::from_millis(milliseconds)
}

pub(crate) fn leases() -> LeaseTerms {
    LeaseTerms { duration: Duration::from_secs(3), drift_ppm: 1_000 }
}

pub(crate) fn geometry(tp: u32) -> Arc<GroupGeometry> {
    let model = Model::preset("tiny").expect("a preset");
    Arc::new(GroupGeometry { model, format: Format::default(), parallel: Parallel { tp, ..Parallel::default() } })
}

pub(crate) fn worker(
    role: Role,
    group: u32,
    rank: u32,
    geometry: &Arc<GroupGeometry>,
    direction: Direction,
) -> WorkerProfile {
    let layout = Arc::new(geometry.shard(Rank(rank)).expect("a valid rank").layout(&[BLOCKS]));
    let nic = NicAdvert {
        kind: TransportKind::Sim,
        device: "sim0".into(),
        host: String::new(),
        address: Bytes::from_static(b"a"),
        keys: Bytes::new(),
        domain: None,
        gpu: None,
    };
    WorkerProfile {
        role,
        group: GroupId(group),
        rank: Rank(rank),
        geometry: Arc::clone(geometry),
        layout,
        nics: vec![nic],
        direction: Some(direction),
        rails: 0,
    }
}

pub(crate) fn place(role: Role, group: u32, rank: u32, geometry: &Arc<GroupGeometry>) -> Place {
    let geometry = Arc::clone(geometry);
    Place { role, group: GroupId(group), rank: Rank(rank), geometry, blocks: vec![BLOCKS], handovers_max: 3 }
}

pub(crate) fn member(node: u64, epoch: u64, place: Option<Place>) -> Member {
    Member { node: NodeId(node), epoch: Epoch(epoch), address: String::new(), place }
}

pub(crate) fn lost(node: u64, epoch: u64) -> Lost {
    Lost { node: NodeId(node), epoch: Epoch(epoch), cause: "it crashed".into() }
}

pub(crate) fn spec(request: u64) -> RequestSpec {
    RequestSpec { request: RequestId(request), tokens: TOKENS, prefix: Arc::default(), prefix_tokens: 16 }
}

pub(crate) fn pairing(handover: u64, request: u64) -> Pairing {
    let (handover, spec) = (HandoverId(handover), spec(request));
    Pairing { handover, spec, source: GroupId(0), source_dp: 0, steps: vec![2, 4], trace: None }
}

/// A rank's blocks for [`TOKENS`] tokens.
pub(crate) fn tables(geometry: &GroupGeometry, rank: u32) -> Tables {
    let shape = geometry.blocks_for(0, TOKENS, Rank(rank));
    Tables { groups: vec![BlockTable::known(shape.first_token, (0..shape.blocks).collect::<Vec<_>>())] }
}

pub(crate) fn commands(outbox: &mut Outbox) -> Vec<Command> {
    std::iter::from_fn(|| outbox.poll_command()).collect()
}

pub(crate) fn events(outbox: &mut Outbox) -> Vec<Event> {
    std::iter::from_fn(|| outbox.poll_event()).collect()
}
