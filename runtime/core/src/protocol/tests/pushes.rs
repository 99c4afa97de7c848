//! A push over rails, both ends of it: what is announced and expected, what becomes of a rail that fails or falls silent, and what is refused.

use core::time::Duration;
use std::collections::BTreeSet;
use std::sync::Arc;

use super::kit::*;
use crate::protocol::{
    Command, DeadlineTerms, DecodeRank, EngineEvent, Event, FailReason, FetchJob, MemberList, Message, NicAdvert,
    NicCommand, NicEvent, PrefillJob, PrefillRank, PushShare, PushShares, QuarantineTerms, RailHealth, RailTerms,
    Refusal, Role, WorkerProfile,
};
use crate::{Direction, FenceProof, Moment, NodeId, Program, TransferId, TransportKind, UnitRange};

const SOURCE: NodeId = NodeId(10);
const READER: NodeId = NodeId(20);
const LEADER: NodeId = NodeId(1);

/// What a NIC is to do: a post at the source, an expectation at the destination.
#[derive(Clone, Debug, PartialEq)]
struct Move {
    nic: usize,
    id: TransferId,
    range: UnitRange,
    program: Arc<Program>,
}

/// A prefill rank of one, and a decode rank of one, with so many NICs each.
struct Pushing {
    source: PrefillRank,
    reader: DecodeRank,
    posts: Vec<Move>,
    expects: Vec<Move>,
    /// Everything else that the NICs of the two are to do.
    source_nics: Vec<(usize, NicCommand)>,
    reader_nics: Vec<(usize, NicCommand)>,
    /// What the two say to their leaders.
    to_leaders: Vec<Message>,
    /// What they say to each other.
    said: Vec<Message>,
}

impl Pushing {
    /// With the first of two steps ready.
    fn over(nics: usize, rails: [u32; 2]) -> Pushing {
        let geometry = geometry(1);
        let profile = |role, rails| {
            let device = |index: usize| NicAdvert {
                device: format!("sim{index}"),
                address: vec![index as u8, u8::from(role == Role::Decode)].into(),
                ..nic(TransportKind::Sim)
            };
            let nics = (0..nics).map(device).collect();
            WorkerProfile { nics, rails, ..worker(role, 0, &geometry, Some(Direction::Push)) }
        };
        let terms = |rails_max| RailTerms {
            rails_max,
            share_bytes_min: 1,
            silent_after: Duration::from_millis(100),
            wired_within: Duration::ZERO,
            ..RailTerms::default()
        };
        let (theirs, ours) = (profile(Role::Prefill, rails[0]), profile(Role::Decode, rails[1]));
        let quarantine = QuarantineTerms::default();
        let source = PrefillRank::new(theirs.clone(), leases(), quarantine).with_rails(terms(rails[0].max(1)));
        let reader = DecodeRank::new(ours.clone(), leases(), DeadlineTerms::default(), quarantine);
        let mut pushing = Pushing {
            source,
            reader: reader.with_rails(terms(rails[1].max(1))),
            posts: Vec::new(),
            expects: Vec::new(),
            source_nics: Vec::new(),
            reader_nics: Vec::new(),
            to_leaders: Vec::new(),
            said: Vec::new(),
        };
        let members = vec![Arc::new(member(SOURCE.0, Role::Prefill, PREFILL, 0, &geometry))];
        pushing.reader.handle_members(at(0), &MemberList { whole: true, members });
        pushing.reader.handle_peer(at(0), SOURCE, theirs);
        pushing.source.handle_peer(at(0), READER, ours);
        let job = PrefillJob { spec: spec(1), dp: 0, trace: None };
        pushing.source.handle_message(at(0), LEADER, Message::Prefill(job));
        let opened = EngineEvent::Opened { request: R1, tables: tables(&geometry, 0, 5), steps: vec![2, 4] };
        pushing.source.handle_engine(at(0), opened);
        pushing.source.handle_engine(at(0), EngineEvent::Ready { request: R1, steps: 1 });
        pushing.reader.handle_message(at(0), LEADER, Message::Fetch(FetchJob { pairing: pairing(H1, &[2, 4]), dp: 0 }));
        let placed = EngineEvent::Placed { handover: H1, tables: tables(&geometry, 0, 7), have: 0 };
        pushing.reader.handle_engine(at(0), placed);
        pushing.settle(at(0));
        pushing.source_nics.clear();
        pushing
    }

    /// Has the two talk until nothing is left to say.
    fn settle(&mut self, now: Moment) {
        loop {
            let (theirs, ours) = (commands(self.source.outbox()), commands(self.reader.outbox()));
            if theirs.is_empty() && ours.is_empty() {
                return;
            }
            for command in theirs {
                match command {
                    Command::Send { to: READER, message } => {
                        self.said.push(message.clone());
                        self.reader.handle_message(now, SOURCE, message);
                    }
                    Command::Send { message, .. } => self.to_leaders.push(message),
                    Command::Nic { nic, command: NicCommand::Post { id, program, range, direction, .. } } => {
                        assert_eq!(direction, Direction::Push);
                        self.posts.push(Move { nic, id, range, program });
                    }
                    Command::Nic { nic, command } => self.source_nics.push((nic, command)),
                    _ => {}
                }
            }
            for command in ours {
                match command {
                    Command::Send { to: SOURCE, message } => {
                        self.said.push(message.clone());
                        self.source.handle_message(now, READER, message);
                    }
                    Command::Send { message, .. } => self.to_leaders.push(message),
                    Command::Nic { nic, command: NicCommand::Expect { id, program, range, .. } } => {
                        self.expects.push(Move { nic, id, range, program });
                    }
                    Command::Nic { nic, command } => self.reader_nics.push((nic, command)),
                    _ => {}
                }
            }
        }
    }

    fn at_source(&mut self, now: Moment, nic: usize, event: NicEvent) {
        self.source.handle_nic(now, nic, event);
        self.settle(now);
    }

    fn at_reader(&mut self, now: Moment, nic: usize, event: NicEvent) {
        self.reader.handle_nic(now, nic, event);
        self.settle(now);
    }

    /// A push goes well.
    fn lands(&mut self, now: Moment, push: &Move) {
        let bytes = push.program.bytes_in(push.range);
        self.at_reader(now, push.nic, NicEvent::Done { id: push.id, bytes, pieces: 1 });
        self.at_source(now, push.nic, NicEvent::Done { id: push.id, bytes, pieces: 1 });
    }

    /// Everything lands that was posted from the `first` on, and then the second step.
    fn all_land(&mut self, now: Moment, first: usize) {
        for push in self.posts.split_off(first) {
            self.lands(now, &push);
        }
        self.source.handle_engine(now, EngineEvent::Ready { request: R1, steps: 2 });
        self.settle(now);
        for push in self.posts.split_off(first) {
            self.lands(now, &push);
        }
    }

    /// What the rank told its leader of its part; `None` before it has.
    fn result(&self) -> Option<Result<u64, FailReason>> {
        self.to_leaders.iter().find_map(|message| match message {
            Message::RankDone { result: Ok(paths), .. } => Some(Ok(paths.iter().map(|path| path.bytes).sum())),
            Message::RankDone { result: Err(reason), .. } => Some(Err(reason.clone())),
            _ => None,
        })
    }

    fn turns(&mut self) -> Vec<RailHealth> {
        let turn = |event: &Event| if let Event::RailTurned(turn) = event { Some(turn.health) } else { None };
        events(self.source.outbox()).iter().filter_map(turn).collect()
    }
}

fn failed(push: &Move) -> NicEvent {
    NicEvent::Failed { id: push.id, reason: "the link broke".into() }
}

/// All that the request is.
fn whole() -> u64 {
    geometry(1).bytes_expected_by_a_rank(TOKENS, 0)
}

#[test]
fn every_share_is_expected_where_it_comes() {
    // Units are too few for twelve shares: both ends cut them alike.
    for (rails, are_cut) in [(2, false), (12, true)] {
        let mut pushing = Pushing::over(rails, [rails as u32; 2]);
        let nics: BTreeSet<usize> = pushing.posts.iter().map(|post| post.nic).collect();
        assert_eq!((nics.len(), pushing.posts.len()), (rails, rails));
        let same = |(post, expected): (&Move, &Move)| {
            (post.nic, post.id, post.range) == (expected.nic, expected.id, expected.range)
                && post.program.fingerprint() == expected.program.fingerprint()
        };
        assert_eq!(pushing.expects.len(), rails);
        assert!(pushing.posts.iter().zip(&pushing.expects).all(same), "{:?} {:?}", pushing.posts, pushing.expects);
        let ends = pushing.posts.iter().map(|post| post.range);
        let next = ends.fold(0, |next, range| if range.start == next { range.end } else { u64::MAX });
        assert_eq!(next, pushing.posts[0].program.units());
        let Some(Message::Shares(shares)) = pushing.said.last() else { panic!("{:?}", pushing.said) };
        assert_eq!(shares.unit_bytes_max.is_some(), are_cut);
        pushing.all_land(at(1), 0);
        assert_eq!(pushing.result(), Some(Ok(whole())));
        assert_eq!(pushing.reader.fetches(), 1, "the leader's word is missing, and nothing else");
    }
}

#[test]
fn who_says_nothing_of_rails_is_pushed_to_as_ever() {
    for rails in [[2, 0], [0, 2], [2, 1], [1, 1]] {
        let mut pushing = Pushing::over(2, rails);
        assert!(!pushing.said.iter().any(|message| matches!(message, Message::Shares(_))), "{rails:?}");
        assert_eq!((pushing.posts.len(), pushing.expects.len()), (1, 2), "every step is expected at once");
        assert_eq!(pushing.posts[0].id.chunk(), 0);
        pushing.all_land(at(1), 0);
        assert_eq!(pushing.result(), Some(Ok(whole())));
    }
}

#[test]
fn a_share_is_posted_again_only_when_nothing_of_it_is_written_any_more() {
    let mut pushing = Pushing::over(2, [2, 2]);
    let lost = pushing.posts[1].clone();
    pushing.at_source(at(1), 1, failed(&lost));
    assert_eq!(pushing.turns(), [RailHealth::Down]);
    assert_eq!(pushing.posts.len(), 2, "it may still be written");
    assert_eq!(pushing.reader_nics, [(1, NicCommand::Cancel { id: lost.id })]);
    pushing.at_reader(at(1), 1, failed(&lost));
    let (again, expected) = (pushing.posts[2].clone(), pushing.expects[2].clone());
    assert_eq!((again.nic, again.range, expected.nic, expected.range), (0, lost.range, 0, lost.range));
    assert!(again.id == expected.id && again.id != lost.id);
    let first = pushing.posts[0].clone();
    pushing.lands(at(1), &first);
    assert_eq!(pushing.result(), None);
    pushing.all_land(at(1), 2);
    assert_eq!(pushing.result(), Some(Ok(whole())), "each byte counts once");
}

#[test]
fn a_silent_rail_is_fenced_before_another_writes_what_it_was_to_write() {
    let mut pushing = Pushing::over(2, [2, 2]);
    let silent = pushing.posts[1].clone();
    let first = pushing.posts[0].clone();
    pushing.lands(at(0), &first);
    let due = pushing.source.poll_timeout().expect("somebody looks");
    assert!(due < at(1), "{due:?}");
    pushing.source.handle_timeout(due);
    pushing.settle(due);
    assert_eq!(pushing.turns(), [RailHealth::Down]);
    assert_eq!(pushing.source_nics, [(1, NicCommand::Cancel { id: silent.id })]);
    assert_eq!(pushing.reader_nics.pop(), Some((1, NicCommand::Cancel { id: silent.id })));
    // Nobody answers.
    let late = due + Duration::from_millis(100);
    assert_eq!(pushing.reader.poll_timeout(), Some(late), "whose proof is waited for is not waited for long");
    pushing.reader.handle_timeout(late);
    pushing.settle(late);
    let Some((1, NicCommand::Fence { node: SOURCE, address, ticket })) = pushing.reader_nics.pop() else {
        panic!("{:?}", pushing.reader_nics)
    };
    assert_eq!((&address[..], pushing.posts.len()), (&[1, 0][..], 2));
    let proof = FenceProof::PoolRekeyed;
    pushing.at_reader(late, 1, NicEvent::Fenced { node: SOURCE, address, ticket, proof });
    let again = pushing.posts[2].clone();
    assert_eq!((again.nic, again.range), (0, silent.range));
    // Our own NIC still reads for the silent one.
    pushing.all_land(late, 2);
    assert_eq!(pushing.result(), Some(Ok(whole())));
    pushing.source.handle_message(
        late,
        LEADER,
        Message::Release { request: R1, view: crate::protocol::PrefillView::Confirmed },
    );
    pushing.settle(late);
    assert_eq!(pushing.source.offers(), 1, "blocks are kept while a NIC may read them");
    pushing.at_source(late, 1, failed(&silent));
    assert_eq!(pushing.source.offers(), 0);
}

#[test]
fn what_is_there_is_not_pushed_again_whatever_the_source_heard() {
    for early in [true, false] {
        let mut pushing = Pushing::over(2, [2, 2]);
        let push = pushing.posts[1].clone();
        let done = NicEvent::Done { id: push.id, bytes: push.program.bytes_in(push.range), pieces: 1 };
        if early {
            pushing.at_reader(at(1), 1, done.clone());
        }
        pushing.at_source(at(1), 1, failed(&push));
        if !early {
            // It was on its way when it was told to stop.
            pushing.at_reader(at(1), 1, done);
        }
        assert!(matches!(pushing.said.last(), Some(Message::ShareEnded { arrived: true, .. })), "{:?}", pushing.said);
        assert_eq!(pushing.posts.len(), 2, "{early}");
        let first = pushing.posts[0].clone();
        pushing.lands(at(1), &first);
        pushing.all_land(at(1), 2);
        assert_eq!(pushing.result(), Some(Ok(whole())));
    }
}

#[test]
fn an_end_that_only_the_reader_sees_is_an_end() {
    let mut pushing = Pushing::over(2, [2, 2]);
    let lost = pushing.posts[1].clone();
    pushing.at_reader(at(1), 1, failed(&lost));
    assert_eq!(pushing.turns(), [RailHealth::Down]);
    assert_eq!(pushing.source_nics, [(1, NicCommand::Cancel { id: lost.id })]);
    let again = pushing.posts[2].clone();
    assert_eq!((again.nic, again.range), (0, lost.range));
    let name = crate::protocol::ShareName { handover: H1, step: 0, chunk: lost.id.chunk() };
    pushing.source.handle_message(at(1), READER, Message::ShareEnded { share: name, arrived: false });
    pushing.settle(at(1));
    assert_eq!(pushing.posts.len(), 3, "an end counts once");
    // Whatever our NIC says.
    let mut pushing = Pushing::over(2, [2, 2]);
    let lost = pushing.posts[1].clone();
    pushing.at_source(at(1), 1, NicEvent::Done { id: lost.id, bytes: 1, pieces: 1 });
    pushing.at_reader(at(1), 1, failed(&lost));
    let again = pushing.posts.last().expect("posted again");
    assert_eq!((pushing.posts.len(), again.nic, again.range), (3, 0, lost.range));
    let mut alone = Pushing::over(1, [2, 2]);
    let only = alone.posts[0].clone();
    alone.at_reader(at(1), 0, failed(&only));
    assert_eq!((alone.posts.len(), alone.result()), (2, None), "once more");
    let again = alone.posts[1].clone();
    alone.at_reader(at(1), 0, failed(&again));
    assert!(matches!(alone.result(), Some(Err(FailReason::Refused(Refusal::Transport(_))))), "{:?}", alone.result());
}

#[test]
fn what_no_rail_moves_ends_after_so_many_tries() {
    for reader_sees in [false, true] {
        let mut pushing = Pushing::over(2, [2, 2]);
        pushing.at_source(at(1), 1, NicEvent::PeerLost { node: READER, reason: "reset".into() });
        pushing.at_source(at(1), 0, NicEvent::PeerLost { node: READER, reason: "reset".into() });
        assert_eq!(pushing.result(), None, "they may be reached again");
        let mut next = 0;
        while let Some(push) = pushing.posts.get(next).cloned() {
            if !reader_sees {
                pushing.at_source(at(1), push.nic, failed(&push));
            }
            pushing.at_reader(at(1), push.nic, failed(&push));
            next += 1;
        }
        assert!(matches!(pushing.result(), Some(Err(FailReason::Refused(Refusal::Transport(_))))));
        assert!((6..=8).contains(&next), "{next}");
        let names: BTreeSet<TransferId> = pushing.posts.iter().map(|post| post.id).collect();
        assert_eq!(names.len(), next);
    }
}

#[test]
fn shares_that_make_no_sense_fail_what_they_are_of() {
    let honest = Pushing::over(2, [2, 2]);
    let Some(Message::Shares(shares)) = honest.said.last() else { panic!("{:?}", honest.said) };
    let [one, two] = shares.shares[..] else { panic!("{shares:?}") };
    let of_second = |list: &[PushShare]| PushShares { step: 1, shares: list.to_vec(), ..shares.clone() };
    let half = UnitRange { start: one.range.start, end: one.range.end / 2 };
    let far = PushShare { nic: 2, ..two };
    let wrong = [
        of_second(&[one]),
        of_second(&[two, one]),
        of_second(&[one, one, two]),
        of_second(&[PushShare { range: half, ..one }, two]),
        of_second(&[one, far]),
        of_second(&[one, PushShare { nic: u32::MAX, ..two }]),
        of_second(&[PushShare { chunk: 0, ..one }, two]),
        of_second(&[one, PushShare { chunk: one.chunk, ..two }]),
        PushShares { step: 2, ..shares.clone() },
        PushShares { step: u32::MAX, ..shares.clone() },
        PushShares { unit_bytes_max: Some(0), ..of_second(&[one, two]) },
        // It is still written.
        PushShares { shares: vec![PushShare { chunk: 9, ..one }], ..shares.clone() },
    ];
    for wrong in wrong {
        let mut pushing = Pushing::over(2, [2, 2]);
        let before = pushing.expects.len();
        pushing.reader.handle_message(at(1), SOURCE, Message::Shares(wrong.clone()));
        pushing.settle(at(1));
        let refused = matches!(pushing.result(), Some(Err(FailReason::Refused(Refusal::BadTables(_)))));
        assert!(refused, "{wrong:?}: {:?}", pushing.result());
        // What was expected meanwhile is let go of.
        for expected in &pushing.expects[before..] {
            assert!(pushing.reader_nics.contains(&(expected.nic, NicCommand::Cancel { id: expected.id })));
        }
    }
    // Of nothing that is under way here.
    let mut pushing = Pushing::over(2, [2, 2]);
    for handover in [H2, H1] {
        let from = if handover == H1 { NodeId(77) } else { SOURCE };
        pushing.reader.handle_message(at(1), from, Message::Shares(PushShares { handover, ..of_second(&[one, two]) }));
    }
    pushing.settle(at(1));
    assert_eq!((pushing.result(), pushing.expects.len()), (None, 2));
}

#[test]
fn what_comes_after_the_end_changes_nothing() {
    let mut pushing = Pushing::over(2, [2, 2]);
    let lost = pushing.posts[1].clone();
    pushing.reader.handle_message(
        at(1),
        LEADER,
        Message::Settled { handover: H1, outcome: crate::protocol::Outcome::Cancelled },
    );
    pushing.settle(at(1));
    let name = crate::protocol::ShareName { handover: H1, step: 0, chunk: lost.id.chunk() };
    pushing.reader.handle_message(at(1), SOURCE, Message::ShareStopped(name));
    pushing.source.handle_message(at(1), READER, Message::ShareEnded { share: name, arrived: false });
    pushing.settle(at(1));
    for push in pushing.posts.clone() {
        pushing.at_reader(at(1), push.nic, failed(&push));
        pushing.at_source(at(1), push.nic, failed(&push));
    }
    assert_eq!((pushing.posts.len(), pushing.expects.len()), (2, 2));
    assert_eq!((pushing.reader.fetches(), pushing.source.poll_timeout().is_some()), (0, true), "only the lease");
    assert!(!pushing.said.iter().any(|message| matches!(message, Message::ShareEnded { .. })), "{:?}", pushing.said);
}
