//! What leaders announce to a scheduler that they meet, in messages each of which fits a frame.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Message, StandingHandovers, StandingOffer};
use crate::{HandoverId, limits};

/// After so many bytes another message begins. The largest item, with as many prefix hashes as a request may have, comes on top.
const BATCH_BYTES: usize = limits::FRAME_BYTES_MAX / 4;

/// A prefill group's offers; nothing when there are none.
pub(super) fn offers(offers: impl IntoIterator<Item = StandingOffer>) -> Vec<Message> {
    batches(offers).into_iter().map(Message::StandingOffers).collect()
}

/// A decode group's handovers; nothing when there are none. What became of a handover and whether it is held come together, before those that are
/// under way.
pub(super) fn handovers(standing: StandingHandovers) -> Vec<Message> {
    let mut ended: BTreeMap<HandoverId, StandingHandovers> = BTreeMap::new();
    for decided in standing.decided {
        ended.entry(decided.1.handover).or_default().decided.push(decided);
    }
    for held in standing.held {
        ended.entry(held.0).or_default().held.push(held);
    }
    let under_way = standing.under_way.into_iter();
    let under_way = under_way.map(|pairing| StandingHandovers { under_way: vec![pairing], ..Default::default() });
    let joined = batches(ended.into_values().chain(under_way)).into_iter().map(|batch| {
        let mut whole = StandingHandovers::default();
        for piece in batch {
            whole.under_way.extend(piece.under_way);
            whole.decided.extend(piece.decided);
            whole.held.extend(piece.held);
        }
        Message::StandingHandovers(Box::new(whole))
    });
    joined.collect()
}

fn batches<T: Serialize>(items: impl IntoIterator<Item = T>) -> Vec<Vec<T>> {
    let mut batches: Vec<Vec<T>> = Vec::new();
    let mut room = 0;
    for item in items {
        // What does not encode at all is for the session to refuse.
        let flavor = postcard::ser_flavors::Size::default();
        let bytes = postcard::serialize_with_flavor(&item, flavor).unwrap_or(BATCH_BYTES);
        match batches.last_mut().filter(|batch| bytes <= room && batch.len() < limits::STANDING_MAX) {
            Some(batch) => batch.push(item),
            None => {
                batches.push(vec![item]);
                room = BATCH_BYTES;
            }
        }
        room = room.saturating_sub(bytes);
    }
    batches
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::protocol::{Outcome, OutcomeReport, Pairing, RequestSpec};
    use crate::wire::encode_message;
    use crate::{GroupId, Moment, RequestId};

    /// As long a prompt as may be.
    fn spec(request: u64, prefix: &Arc<Vec<u64>>) -> RequestSpec {
        RequestSpec { request: RequestId(request), tokens: 1, prefix: Arc::clone(prefix), prefix_tokens: 1 }
    }

    fn fits(messages: &[Message]) {
        assert!(messages.len() > 1);
        for message in messages {
            let bytes = encode_message(message).expect("encodes").len();
            assert!(bytes < limits::FRAME_BYTES_MAX, "{bytes} bytes");
        }
    }

    #[test]
    fn the_longest_offers_that_a_group_may_have_fit_their_frames() {
        let prefix = Arc::new(vec![u64::MAX; limits::PREFIX_HASHES_MAX]);
        let offer = |request| StandingOffer { spec: spec(request, &prefix), dp: 0, steps: None, ready_at: None };
        let messages = offers((0..16).map(offer));
        fits(&messages);
        let requests = messages.into_iter().flat_map(|message| match message {
            Message::StandingOffers(offers) => offers.into_iter().map(|offer| offer.spec.request.0),
            other => panic!("{other:?}"),
        });
        assert!(requests.eq(0..16));
        assert_eq!(offers([]), []);
    }

    #[test]
    fn what_is_said_of_one_handover_stays_together() {
        let prefix = Arc::new(vec![u64::MAX; limits::PREFIX_HASHES_MAX]);
        let pairing = |handover: u64| Pairing {
            handover: HandoverId(handover),
            spec: spec(handover, &prefix),
            source: GroupId(0),
            source_dp: 0,
            steps: vec![1],
            trace: None,
        };
        let report = |handover| OutcomeReport {
            handover: HandoverId(handover),
            outcome: Outcome::Delivered,
            at: Moment(0),
            paths: Vec::new(),
        };
        let messages = handovers(StandingHandovers {
            under_way: (8..12).map(pairing).collect(),
            decided: (0..6).map(|handover| (pairing(handover), report(handover))).collect(),
            held: (2..8).map(|handover| (HandoverId(handover), spec(handover, &prefix), true)).collect(),
        });
        fits(&messages);
        let (mut under_way, mut decided, mut held) = (Vec::new(), Vec::new(), Vec::new());
        for message in messages {
            let Message::StandingHandovers(standing) = message else { panic!("{message:?}") };
            assert!(under_way.is_empty() || standing.decided.is_empty(), "what has ended comes first");
            let here: Vec<u64> = standing.held.iter().map(|held| held.0.0).collect();
            for (pairing, _) in &standing.decided {
                let id = pairing.handover.0;
                assert_eq!(here.contains(&id), id >= 2, "{id}");
            }
            under_way.extend(standing.under_way.iter().map(|pairing| pairing.handover.0));
            decided.extend(standing.decided.iter().map(|(pairing, _)| pairing.handover.0));
            held.extend(here);
        }
        assert!(under_way.into_iter().eq(8..12) && decided.into_iter().eq(0..6) && held.into_iter().eq(2..8));
        assert_eq!(handovers(StandingHandovers::default()), []);
    }
}
