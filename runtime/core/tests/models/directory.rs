//! The directory: a list of who joined and was not lost, of which every member has what concerns it in the end.

use std::collections::BTreeMap;

use kvferry_core::protocol::{Command, Directory, JoinError, Member, Message, Place, Role};
use kvferry_core::{Epoch, NodeId};
use proptest::prelude::*;

use super::kit::*;

#[derive(Clone, Debug)]
enum Operation {
    Join(Member),
    Lose(u64, u64),
}

fn operation() -> impl Strategy<Value = Operation> {
    let role = prop_oneof![Just(Role::Prefill), Just(Role::Decode)];
    let place = (role, 0..3_u32, 0..3_u32, 1..3_u32)
        .prop_map(|(role, group, rank, tp)| place(role, group, rank, &geometry(tp)));
    let join = (0..8_u64, 1..5_u64, prop::option::weighted(0.9, place));
    prop_oneof![
        3 => join.prop_map(|(node, epoch, place)| Operation::Join(member(node, epoch, place))),
        1 => (0..8_u64, 1..5_u64).prop_map(|(node, epoch)| Operation::Lose(node, epoch)),
    ]
}

#[derive(Debug, PartialEq)]
enum Verdict {
    Joins,
    Stale,
    Taken,
    Differs,
    Bad,
}

/// Whoever joined and was not lost, and every epoch that was ever seen.
#[derive(Default)]
struct Naive {
    joined: Vec<Member>,
    seen: Vec<(NodeId, Epoch)>,
}

impl Naive {
    fn verdict(&self, newcomer: &Member) -> Verdict {
        if self.seen.iter().any(|(node, epoch)| *node == newcomer.node && *epoch >= newcomer.epoch) {
            return Verdict::Stale;
        }
        let Some(place) = &newcomer.place else { return Verdict::Joins };
        if place.rank.0 >= place.geometry.ranks() {
            return Verdict::Bad;
        }
        let mates = |member: &&Member| member.node != newcomer.node;
        let mates = self.joined.iter().filter(mates).filter_map(|member| member.place.as_ref());
        // Of several reasons, the mate with the smallest rank gives the first.
        let mut mates: Vec<&Place> = mates.collect();
        mates.sort_by_key(|mate| mate.rank);
        let reason = |mate: &Place| match mate {
            mate if mate.group != place.group => None,
            mate if mate.role != place.role => Some(Verdict::Bad),
            mate if mate.rank == place.rank => Some(Verdict::Taken),
            mate if mate.geometry != place.geometry => Some(Verdict::Differs),
            _ => None,
        };
        mates.into_iter().find_map(reason).unwrap_or(Verdict::Joins)
    }
}

fn verdict(result: &Result<std::sync::Arc<Member>, JoinError>) -> Verdict {
    match result {
        Ok(_) => Verdict::Joins,
        Err(JoinError::StaleEpoch { .. }) => Verdict::Stale,
        Err(JoinError::PlaceTaken { .. }) => Verdict::Taken,
        Err(JoinError::GeometryDiffers { .. }) => Verdict::Differs,
        Err(_) => Verdict::Bad,
    }
}

/// Everybody hears of those of its group, decode ranks of prefill ranks, and whoever has no place is of interest to all and interested in all.
fn concerns(hearer: &Member, subject: &Member) -> bool {
    let (Some(hearer), Some(subject)) = (&hearer.place, &subject.place) else { return true };
    hearer.group == subject.group || (hearer.role == Role::Decode && subject.role == Role::Prefill)
}

/// Takes what the directory says into the members' views. Says of whose losses it told.
fn hear(
    directory: &mut Directory,
    views: &mut BTreeMap<NodeId, BTreeMap<NodeId, Member>>,
    told: &mut Vec<NodeId>,
) -> Vec<(NodeId, Epoch)> {
    let mut losses = Vec::new();
    for command in commands(directory.outbox()) {
        let Command::Send { to, message } = command else { panic!("the directory only talks") };
        match message {
            Message::Members(list) => {
                let view = views.entry(to).or_default();
                if list.whole {
                    view.clear();
                }
                view.extend(list.members.iter().map(|member| (member.node, (**member).clone())));
            }
            Message::Lost(lost) => {
                views.entry(to).or_default().remove(&lost.node);
                told.push(to);
                losses.push((lost.node, lost.epoch));
            }
            other => panic!("{other:?}"),
        }
    }
    losses.sort();
    losses.dedup();
    losses
}

proptest! {
    #[test]
    fn everybody_knows_who_concerns_it(operations in prop::collection::vec((operation(), 0..15_u64), 1..60)) {
        let mut directory = Directory::default();
        let mut naive = Naive::default();
        let mut views: BTreeMap<NodeId, BTreeMap<NodeId, Member>> = BTreeMap::new();
        let mut now = 0;
        for (operation, passes) in operations {
            let mut gone = None;
            match operation {
                Operation::Join(newcomer) => {
                    let expected = naive.verdict(&newcomer);
                    let result = directory.handle_join(millis(now), newcomer.clone());
                    prop_assert_eq!(verdict(&result), expected, "{:?}", newcomer);
                    if result.is_ok() {
                        let before = naive.joined.iter().position(|member| member.node == newcomer.node);
                        gone = before.map(|at| naive.joined.remove(at));
                        naive.seen.push((newcomer.node, newcomer.epoch));
                        naive.joined.push(newcomer);
                    }
                }
                Operation::Lose(node, epoch) => {
                    let (node, epoch) = (NodeId(node), Epoch(epoch));
                    let at = naive.joined.iter().position(|member| (member.node, member.epoch) == (node, epoch));
                    let lost = directory.handle_lost(node, epoch, "it crashed");
                    prop_assert_eq!(lost.map(|lost| (lost.node, lost.epoch)), at.map(|_| (node, epoch)));
                    gone = at.map(|at| naive.joined.remove(at));
                }
            }
            naive.joined.sort_by_key(|member| member.node);
            views.retain(|node, _| naive.joined.iter().any(|member| member.node == *node));
            let mut told = Vec::new();
            now += passes;
            // What was kept for later is told when it is due, at the latest.
            directory.handle_timeout(millis(now));
            let heard = hear(&mut directory, &mut views, &mut told);
            prop_assert!(heard.iter().all(|lost| gone.as_ref().is_some_and(|gone: &Member| (gone.node, gone.epoch) == *lost)));
            let concerned = |member: &&Member| gone.as_ref().is_some_and(|gone| {
                member.node != gone.node && (concerns(member, gone) || concerns(gone, member))
            });
            let concerned: Vec<NodeId> = naive.joined.iter().filter(concerned).map(|member| member.node).collect();
            prop_assert_eq!(told, concerned, "everybody whom a loss concerns hears of it once");
            if directory.poll_timeout().is_none() {
                for member in &naive.joined {
                    let known = naive.joined.iter().filter(|other| concerns(member, other));
                    let known: BTreeMap<NodeId, Member> = known.map(|other| (other.node, other.clone())).collect();
                    prop_assert_eq!(views.get(&member.node), Some(&known), "{} is up to date", member.node);
                }
            }
        }
    }
}
