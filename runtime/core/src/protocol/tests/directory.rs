//! The directory: who may join, and what everybody hears.

use std::sync::Arc;

use super::kit::*;
use crate::protocol::{Command, Directory, JoinError, Member, Message, Role, are_peers, dials};
use crate::{Epoch, GroupId, NodeId};

fn scheduler() -> Member {
    Member { node: NodeId(100), epoch: Epoch(1), address: String::new(), place: None }
}

#[test]
fn everybody_hears_of_joins_and_losses() {
    let mut directory = Directory::default();
    let geometry = geometry(2);
    directory.handle_join(scheduler()).expect("joins");
    directory.handle_join(member(1, Role::Prefill, PREFILL, 0, &geometry)).expect("joins");
    commands(directory.outbox());
    let joined = directory.handle_join(member(2, Role::Prefill, PREFILL, 1, &geometry)).expect("joins");
    assert_eq!(joined.node, NodeId(2));
    let all = directory.members();
    let list = |to| send(to, Message::Members(all.clone()));
    assert_eq!(commands(directory.outbox()), [list(1), list(2), list(100)]);
    assert_eq!(directory.handle_lost(NodeId(2), Epoch(9), "?"), None, "another incarnation");
    assert_eq!(directory.handle_lost(NodeId(3), Epoch(1), "?"), None, "no member");
    assert_eq!(directory.handle_lost(NodeId(2), Epoch(1), "it crashed"), Some(lost(2)));
    let rest = directory.members();
    let hears = |to| send(to, Message::Lost(lost(2)));
    let list = |to| send(to, Message::Members(rest.clone()));
    assert_eq!(commands(directory.outbox()), [hears(1), hears(100), list(1), list(100)]);
}

#[test]
fn an_epoch_is_used_once() {
    let mut directory = Directory::default();
    let geometry = geometry(2);
    let newcomer = member(1, Role::Prefill, PREFILL, 0, &geometry);
    directory.handle_join(newcomer.clone()).expect("joins");
    let stale = JoinError::StaleEpoch { node: NodeId(1), epoch: Epoch(1), newest: Epoch(1) };
    assert_eq!(directory.handle_join(newcomer.clone()), Err(stale.clone()));
    directory.handle_lost(NodeId(1), Epoch(1), "it crashed");
    assert_eq!(directory.handle_join(newcomer.clone()), Err(stale), "not even after its loss");
    directory.handle_join(Member { epoch: Epoch(2), ..newcomer }).expect("a new incarnation joins");
}

#[test]
fn a_restart_before_the_loss_was_noticed_is_a_loss() {
    let mut directory = Directory::default();
    let geometry = geometry(2);
    let first = member(1, Role::Prefill, PREFILL, 0, &geometry);
    directory.handle_join(scheduler()).expect("joins");
    directory.handle_join(first.clone()).expect("joins");
    commands(directory.outbox());
    directory.handle_join(Member { epoch: Epoch(2), ..first }).expect("joins");
    let heard = commands(directory.outbox());
    let Some(Command::Send { to: NodeId(100), message: Message::Lost(lost) }) = heard.first() else {
        panic!("{heard:?}")
    };
    assert_eq!((lost.node, lost.epoch), (NodeId(1), Epoch(1)));
    assert_eq!(directory.members().len(), 2);
}

#[test]
fn impossible_members_are_refused() {
    let mut directory = Directory::default();
    let two = geometry(2);
    directory.handle_join(member(1, Role::Prefill, PREFILL, 0, &two)).expect("joins");
    let taken = directory.handle_join(member(2, Role::Prefill, PREFILL, 0, &two));
    assert_eq!(taken, Err(JoinError::PlaceTaken { node: NodeId(2), holder: NodeId(1) }));
    let mut different = (*two).clone();
    different.model.groups[0].tensors[0].heads = 8;
    let Err(JoinError::GeometryDiffers { fields, .. }) =
        directory.handle_join(member(2, Role::Prefill, PREFILL, 1, &Arc::new(different)))
    else {
        panic!("another model is refused");
    };
    assert!(fields.contains("heads"), "{fields}");
    let four = directory.handle_join(member(2, Role::Prefill, PREFILL, 1, &geometry(4)));
    assert!(matches!(four, Err(JoinError::GeometryDiffers { .. })), "{four:?}");
    let mut poor = member(2, Role::Prefill, PREFILL, 1, &two);
    if let Some(place) = &mut poor.place {
        place.blocks.clear();
    }
    let mut broken = (*two).clone();
    broken.parallel.adp = 0;
    for bad in [
        member(2, Role::Prefill, PREFILL, 2, &two),
        member(2, Role::Decode, PREFILL, 1, &two),
        member(2, Role::Prefill, GroupId(7), 0, &Arc::new(broken)),
        poor,
    ] {
        let refused = directory.handle_join(bad);
        assert!(matches!(refused, Err(JoinError::BadPlace { .. })), "{refused:?}");
    }
    assert_eq!(directory.members().len(), 1);
}

#[test]
fn of_two_peers_exactly_one_dials() {
    let two = geometry(2);
    let mut members = vec![scheduler(), Member { node: NodeId(0), ..scheduler() }];
    for (node, role, group, rank) in [
        (1, Role::Prefill, 0, 0),
        (2, Role::Prefill, 0, 1),
        (3, Role::Prefill, 1, 1),
        (4, Role::Decode, 2, 0),
        (5, Role::Decode, 2, 1),
    ] {
        members.push(member(node, role, GroupId(group), rank, &two));
    }
    for one in &members {
        for other in members.iter().filter(|other| other.node != one.node) {
            assert_eq!(are_peers(one, other), are_peers(other, one), "{one:?} {other:?}");
            assert!(dials(one, other) ^ dials(other, one), "{one:?} {other:?}");
        }
    }
    let peers = |a: usize, b: usize| are_peers(&members[a], &members[b]);
    assert!(peers(0, 2) && peers(2, 3) && peers(2, 5) && peers(3, 6), "scheduler, own leader, the other role");
    assert!(!peers(2, 4) && !peers(3, 4), "ranks of different groups of one role");
}
