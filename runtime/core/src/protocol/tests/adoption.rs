//! What a scheduler that has started again makes of what leaders announce.

use super::kit::*;
use super::scheduler::*;
use crate::protocol::{
    FailReason, Message, OfferSummary, Outcome, OutcomeReport, Role, StandingHandovers, StandingOffer,
};
use crate::{GroupId, HandoverId, NodeId, Rank, RequestId};

/// Found by `cluster --kill scheduler@2`: blocks that had come back while there was no scheduler were waited for again, for ever.
#[test]
fn credits_of_handovers_whose_blocks_are_back_are_not_taken_again() {
    let mut fixture = Fixture::new(1, 1);
    let place = member(10, Role::Decode, GroupId(10), 0, &geometry(1)).place.expect("a rank has a place");
    let decided = (0..u64::from(place.handovers_max)).map(|number| {
        let mut pairing = pairing(HandoverId(100 + number), &[4]);
        pairing.spec = spec(100 + number);
        let report =
            OutcomeReport { handover: pairing.handover, outcome: Outcome::Delivered, at: at(0), paths: Vec::new() };
        (pairing, report)
    });
    let standing = StandingHandovers { decided: decided.collect(), ..StandingHandovers::default() };
    fixture.say(10, Message::StandingHandovers(Box::new(standing)));
    assert_eq!(fixture.finished().len() as u32, place.handovers_max);
    fixture.submit(1);
    assert_eq!(pairs(&fixture.offer(0, 1)).len(), 1, "the group has all its credits");
}

/// Found by `cluster --stop prefill:3@2 --kill scheduler@3`: the leader of a group that lacks a rank was not heard when it gave up an offer.
#[test]
fn an_offer_of_an_incomplete_group_can_end() {
    let mut fixture = Fixture::new(1, 1);
    let group = GroupId(5);
    fixture.scheduler.handle_member(at(0), &member(5, Role::Prefill, group, 0, &geometry(2)));
    let opening = StandingOffer { spec: spec(1), dp: 0, steps: None, ready_at: None };
    fixture.say(5, Message::StandingOffers(vec![opening]));
    fixture.scheduler.handle_submit(at(1), spec(1)).expect("its client asks again");
    let cause = "nothing was heard".to_owned();
    let reason = FailReason::RankLost { role: Role::Prefill, group, rank: Rank(1), node: NodeId(6), cause };
    let commands = fixture.say(5, Message::OfferFailed { request: RequestId(1), reason });
    assert_eq!(jobs(&commands), [(0, 1)], "another group computes it: {commands:?}");
}

/// Found by the same: what was opened between the joins of a group's ranks was never paired.
#[test]
fn an_offer_of_an_incomplete_group_can_stand() {
    let mut fixture = Fixture::new(0, 1);
    fixture.scheduler.handle_member(at(0), &member(5, Role::Prefill, GroupId(5), 0, &geometry(2)));
    let opening = StandingOffer { spec: spec(1), dp: 0, steps: None, ready_at: None };
    fixture.say(5, Message::StandingOffers(vec![opening]));
    fixture.scheduler.handle_submit(at(1), spec(1)).expect("its client asks again");
    let offer = OfferSummary { request: RequestId(1), dp: 0, steps: vec![4] };
    let early = fixture.say(5, Message::Offered(offer));
    fixture.scheduler.handle_member(at(2), &member(6, Role::Prefill, GroupId(5), 1, &geometry(2)));
    let paired = [pairs(&early), pairs(&fixture.commands())].concat();
    assert_eq!(paired.len(), 1, "{paired:?}");
}
