//! The prefill rank that leaves.

use core::time::Duration;

use super::kit::*;
use super::prefill::*;
use std::sync::Arc;

use crate::protocol::{
    Command, EngineCall, EngineEvent, Event, FailReason, Message, PrefillJob, PrefillRank, PrefillView,
    QuarantineTerms, Role,
};
use crate::{Direction, GroupGeometry, NodeId, Parallel, RequestId};

fn leave(within: u64) -> EngineEvent {
    EngineEvent::Drain { within: Duration::from_secs(within) }
}

fn trouble() -> Command {
    send(LEADER, Message::Health { trouble: Some("it leaves and offers nothing new".into()) })
}

fn drained(left: u64) -> Command {
    engine(EngineCall::Drained { left })
}

fn failed_to_begin(request: u64) -> Command {
    let reason = FailReason::Unhealthy("it leaves and offers nothing new".into());
    send(LEADER, Message::RankFailed { request: RequestId(request), reason })
}

#[test]
fn a_rank_without_offers_leaves_at_once() {
    let mut fixture = Fixture::new();
    fixture.rank.handle_leader_up(at(0), NodeId(LEADER));
    assert_eq!(commands(fixture.rank.outbox()), [], "it has nothing to say");
    assert_eq!(fixture.engine(1, leave(60)), [trouble(), drained(0)]);
    let draining = Event::Draining { offers: 0, until: at(61) };
    assert_eq!(events(fixture.rank.outbox()), [draining, Event::DrainEnded { left: 0 }]);
    assert_eq!(fixture.rank.poll_timeout(), None);
    assert_eq!(fixture.engine(2, leave(60)), [], "once");
    fixture.rank.handle_leader_up(at(3), NodeId(LEADER));
    assert_eq!(commands(fixture.rank.outbox()), [trouble()], "the leader's next incarnation hears of it");
}

#[test]
fn what_is_offered_is_fetched_first() {
    let mut fixture = Fixture::offered(Direction::Pull);
    assert_eq!(fixture.engine(1, leave(60)), [trouble()]);
    assert!(fixture.rank.is_draining());
    // It may still become ready, be opened and be fetched.
    let ready = fixture.engine(2, EngineEvent::Ready { request: R1, steps: 2 });
    assert_eq!(ready, [send(LEADER, Message::RankReady { request: R1, at: at(2) })]);
    let open = fixture.open(0, H1, Direction::Pull);
    assert!(matches!(
        fixture.message(3, READERS[0], open).as_slice(),
        [Command::Send { message: Message::Opened(_), .. }]
    ));
    assert_eq!(
        fixture.message(4, READERS[0], Message::Fetched { handover: H1 }),
        [send(READERS[0], Message::Confirmed { handover: H1 })]
    );
    let released = fixture.message(5, LEADER, Message::Release { request: R1, view: PrefillView::Confirmed });
    assert_eq!(released, [release(PrefillView::Confirmed), drained(0)]);
}

#[test]
fn a_lease_that_expires_ends_the_wait() {
    let mut fixture = Fixture::offered(Direction::Pull);
    fixture.engine(1, leave(600));
    fixture.rank.handle_timeout(at(30));
    assert_eq!(commands(fixture.rank.outbox()).last(), Some(&drained(0)));
}

#[test]
fn the_wait_is_bounded() {
    let mut fixture = Fixture::offered(Direction::Pull);
    fixture.engine(1, leave(600));
    fixture.engine(2, leave(8));
    assert_eq!(fixture.rank.poll_timeout(), Some(at(10)), "who says it again makes it shorter");
    fixture.engine(3, leave(600));
    assert_eq!(fixture.rank.poll_timeout(), Some(at(10)), "never longer");
    fixture.rank.handle_timeout(at(9));
    assert_eq!(commands(fixture.rank.outbox()), []);
    events(fixture.rank.outbox());
    fixture.rank.handle_timeout(at(10));
    assert_eq!(commands(fixture.rank.outbox()), [drained(1)]);
    assert_eq!(events(fixture.rank.outbox()), [Event::DrainEnded { left: 1 }]);
    assert_eq!(fixture.rank.poll_timeout(), Some(at(30)), "the lease is held all the same");
    let released = fixture.message(11, LEADER, Message::Release { request: R1, view: PrefillView::Confirmed });
    assert_eq!(released, [release(PrefillView::Confirmed)], "it was told that it may go");
}

#[test]
fn nothing_new_is_offered() {
    let mut fixture = Fixture::new();
    fixture.message(0, LEADER, job(1));
    // The engine has not opened it, and what follows it waits for its release.
    fixture.message(0, LEADER, Message::Release { request: R1, view: PrefillView::Ended });
    fixture.message(0, LEADER, job(1));
    fixture.message(0, LEADER, job(2));
    let released = engine(EngineCall::Release { request: RequestId(2), view: PrefillView::Ended });
    let said = [trouble(), failed_to_begin(2), released, failed_to_begin(1), drained(0)];
    assert_eq!(fixture.engine(1, leave(60)), said);
    assert_eq!(fixture.message(2, LEADER, job(3)), [trouble(), failed_to_begin(3)], "from a leader that has not heard");
    assert_eq!(fixture.engine(3, EngineEvent::Released { request: R1 }), [], "it does not begin anew");
}

/// A rank that left took the live offers of its group's other parts with it: a group is only as alive as all its ranks.
#[test]
fn with_attention_dp_the_whole_group_is_waited_for() {
    let parallel = Parallel { tp: 2, adp: 2, ..Parallel::default() };
    let divided = Arc::new(GroupGeometry { parallel, ..(*geometry(2)).clone() });
    let terms = QuarantineTerms::default();
    let start = || {
        let mut rank = PrefillRank::new(worker(Role::Prefill, 1, &divided, None), leases(), terms);
        rank.handle_leader_up(at(0), NodeId(LEADER));
        rank.handle_engine(at(1), leave(60));
        assert_eq!(commands(rank.outbox()), [trouble()], "it holds nothing itself");
        rank
    };
    let nothing = Message::Renew { requests: Vec::new() };
    let mut rank = start();
    rank.handle_message(at(2), NodeId(READERS[0]), nothing.clone());
    assert_eq!(commands(rank.outbox()), [], "a stranger says that");
    rank.handle_message(at(3), NodeId(LEADER), nothing.clone());
    assert_eq!(commands(rank.outbox()), [drained(0)]);
    rank.handle_message(at(4), NodeId(LEADER), nothing);
    assert_eq!(commands(rank.outbox()), [], "once");
    // Whoever leads is gone, and with it every offer; or nobody ever says so.
    let mut rank = start();
    rank.handle_leader_down(at(5));
    assert_eq!(commands(rank.outbox()), [drained(0)]);
    let mut rank = start();
    assert_eq!(rank.poll_timeout(), Some(at(61)));
    rank.handle_timeout(at(61));
    assert_eq!(commands(rank.outbox()), [drained(0)]);
}

#[test]
fn without_a_drain_jobs_begin() {
    let mut fixture = Fixture::new();
    let begun = fixture.message(2, LEADER, job(3));
    assert_eq!(begun, [engine(EngineCall::Prefill(PrefillJob { spec: spec(3), dp: 0, trace: None }))]);
}
