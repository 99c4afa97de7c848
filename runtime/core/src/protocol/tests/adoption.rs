//! What a scheduler that has started again makes of what leaders announce.

use super::kit::*;
use super::scheduler::*;
use crate::protocol::{Message, Outcome, OutcomeReport, Role, StandingHandovers};
use crate::{GroupId, HandoverId};

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
