//! The directory: who may join, and what everybody hears.

use std::sync::Arc;

use super::kit::*;
use crate::protocol::{Command, Directory, JoinError, Lost, Member, MemberList, Message, Role, are_peers, dials};
use crate::{Epoch, GroupId, NodeId};

fn scheduler() -> Member {
    Member { node: NodeId(100), epoch: Epoch(1), address: String::new(), place: None }
}

#[test]
fn joins_and_losses_are_heard_of() {
    let mut directory = Directory::default();
    let geometry = geometry(2);
    directory.handle_join(at(0), scheduler()).expect("joins");
    directory.handle_join(at(0), member(1, Role::Prefill, PREFILL, 0, &geometry)).expect("joins");
    commands(directory.outbox());
    let joined = directory.handle_join(at(0), member(2, Role::Prefill, PREFILL, 1, &geometry)).expect("joins");
    assert_eq!(joined.node, NodeId(2));
    let list = |to, whole, members: &[Arc<Member>]| {
        send(to, Message::Members(MemberList { whole, members: members.to_vec() }))
    };
    let news = [Arc::clone(&joined)];
    let all = directory.members();
    assert_eq!(commands(directory.outbox()), [list(1, false, &news), list(2, true, &all)], "its group, and itself");
    directory.handle_timeout(at(1));
    let late = [directory.members()[0].clone(), joined];
    assert_eq!(commands(directory.outbox()), [list(100, false, &late)], "the first came just after the scheduler, too");
    assert_eq!(directory.handle_lost(NodeId(2), Epoch(9), "?"), None, "another incarnation");
    assert_eq!(directory.handle_lost(NodeId(3), Epoch(1), "?"), None, "no member");
    assert_eq!(directory.handle_lost(NodeId(2), Epoch(1), "it crashed"), Some(lost(2)));
    let hears = |to| send(to, Message::Lost(lost(2)));
    assert_eq!(commands(directory.outbox()), [hears(1), hears(100)]);
}

#[test]
fn a_loss_that_an_earlier_directory_declared_is_believed_of_members() {
    for (mut directory, believes) in [(Directory::default(), false), (Directory::successor(), true)] {
        let geometry = geometry(2);
        directory.handle_join(at(0), member(1, Role::Prefill, PREFILL, 0, &geometry)).expect("joins");
        directory.handle_join(at(0), member(2, Role::Decode, DECODE, 0, &geometry)).expect("joins");
        assert_eq!(directory.handle_report(NodeId(2), &lost(1)).is_some(), believes, "only of an earlier one");
    }
    let mut directory = Directory::successor();
    let geometry = geometry(2);
    directory.handle_join(at(0), scheduler()).expect("joins");
    directory.handle_join(at(0), member(1, Role::Prefill, PREFILL, 0, &geometry)).expect("joins");
    directory.handle_join(at(0), member(2, Role::Decode, DECODE, 0, &geometry)).expect("joins");
    commands(directory.outbox());
    assert_eq!(directory.handle_report(NodeId(3), &lost(1)), None, "a stranger's word");
    let other = Lost { epoch: Epoch(0), ..lost(1) };
    assert_eq!(directory.handle_report(NodeId(2), &other), None, "an earlier incarnation than the member's");
    assert_eq!(directory.handle_report(NodeId(2), &lost(100)), None, "the scheduler's node");
    assert_eq!(directory.handle_report(NodeId(2), &lost(1)), Some(lost(1)));
    let hears = |to| send(to, Message::Lost(lost(1)));
    assert_eq!(commands(directory.outbox()), [hears(2), hears(100)]);
    let refused = directory.handle_join(at(1), member(1, Role::Prefill, PREFILL, 0, &geometry));
    assert!(matches!(refused, Err(JoinError::StaleEpoch { .. })), "{refused:?}");
}

#[test]
fn members_hear_of_those_who_concern_them() {
    let mut directory = Directory::default();
    for (node, role, group, rank) in [
        (1, Role::Prefill, 0, 0),
        (2, Role::Prefill, 1, 0),
        (3, Role::Decode, 2, 0),
        (4, Role::Decode, 3, 0),
        (5, Role::Decode, 2, 1),
        (6, Role::Prefill, 0, 1),
    ] {
        // Each arrives with a geometry of its own, equal to all others.
        directory.handle_join(at(0), member(node, role, GroupId(group), rank, &geometry(2))).expect("joins");
    }
    assert!(directory.poll_timeout().is_some_and(|due| at(0) < due && due < at(1)));
    directory.handle_timeout(at(0));
    directory.handle_timeout(at(1));
    assert_eq!(directory.poll_timeout(), None);
    let mut heard: Vec<(u64, bool, Vec<u64>)> = Vec::new();
    let mut last = None;
    for command in commands(directory.outbox()) {
        let Command::Send { to, message: Message::Members(list) } = command else { panic!("{command:?}") };
        heard.push((to.0, list.whole, list.members.iter().map(|member| member.node.0).collect()));
        last = list.whole.then_some(list).or(last);
    }
    let expected: Vec<(u64, bool, Vec<u64>)> = vec![
        (1, true, vec![1]),
        (2, true, vec![2]),
        (3, true, vec![1, 2, 3]),
        (4, true, vec![1, 2, 4]),
        (3, false, vec![5]),
        (5, true, vec![1, 2, 3, 5]),
        (1, false, vec![6]),
        (6, true, vec![1, 6]),
        // Later, and of many at once: whoever came after them had heard of them.
        (3, false, vec![6]),
        (4, false, vec![6]),
        (5, false, vec![6]),
    ];
    assert_eq!(heard, expected);
    let members = last.expect("a list").members;
    let geometry = |index: usize| &members[index].place.as_ref().expect("a place").geometry;
    assert!(Arc::ptr_eq(geometry(0), geometry(1)), "equal geometries are one");
    // Nobody is told that somebody has joined who is gone.
    directory
        .handle_join(at(2), member(7, Role::Prefill, GroupId(9), 0, &crate::protocol::tests::kit::geometry(2)))
        .expect("joins");
    directory
        .handle_join(at(2), member(8, Role::Prefill, GroupId(8), 0, &crate::protocol::tests::kit::geometry(2)))
        .expect("joins");
    directory.handle_lost(NodeId(8), Epoch(1), "it crashed");
    commands(directory.outbox());
    directory.handle_timeout(at(3));
    assert_eq!(commands(directory.outbox()), []);
    directory.handle_lost(NodeId(7), Epoch(1), "it crashed");
    commands(directory.outbox());
    // Of a loss hears also who has a session with the lost node without having heard of it.
    directory.handle_lost(NodeId(3), Epoch(1), "it crashed");
    let told = commands(directory.outbox()).into_iter().map(|command| match command {
        Command::Send { to, message: Message::Lost(_) } => to.0,
        other => panic!("{other:?}"),
    });
    assert_eq!(told.collect::<Vec<_>>(), [1, 2, 5, 6]);
}

#[test]
fn an_epoch_is_used_once() {
    let mut directory = Directory::default();
    let geometry = geometry(2);
    let newcomer = member(1, Role::Prefill, PREFILL, 0, &geometry);
    directory.handle_join(at(0), newcomer.clone()).expect("joins");
    let stale = JoinError::StaleEpoch { node: NodeId(1), epoch: Epoch(1), newest: Epoch(1) };
    assert_eq!(directory.handle_join(at(0), newcomer.clone()), Err(stale.clone()));
    directory.handle_lost(NodeId(1), Epoch(1), "it crashed");
    assert_eq!(directory.handle_join(at(0), newcomer.clone()), Err(stale), "not even after its loss");
    directory.handle_join(at(0), Member { epoch: Epoch(2), ..newcomer }).expect("a new incarnation joins");
}

#[test]
fn a_restart_before_the_loss_was_noticed_is_a_loss() {
    let mut directory = Directory::default();
    let geometry = geometry(2);
    let first = member(1, Role::Prefill, PREFILL, 0, &geometry);
    directory.handle_join(at(0), scheduler()).expect("joins");
    directory.handle_join(at(0), first.clone()).expect("joins");
    commands(directory.outbox());
    directory.handle_join(at(0), Member { epoch: Epoch(2), ..first }).expect("joins");
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
    directory.handle_join(at(0), member(1, Role::Prefill, PREFILL, 0, &two)).expect("joins");
    let taken = directory.handle_join(at(0), member(2, Role::Prefill, PREFILL, 0, &two));
    assert_eq!(taken, Err(JoinError::PlaceTaken { node: NodeId(2), holder: NodeId(1) }));
    let mut different = (*two).clone();
    different.model.groups[0].tensors[0].heads = 8;
    let Err(JoinError::GeometryDiffers { fields, .. }) =
        directory.handle_join(at(0), member(2, Role::Prefill, PREFILL, 1, &Arc::new(different)))
    else {
        panic!("another model is refused");
    };
    assert!(fields.contains("heads"), "{fields}");
    let four = directory.handle_join(at(0), member(2, Role::Prefill, PREFILL, 1, &geometry(4)));
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
        let refused = directory.handle_join(at(0), bad);
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
