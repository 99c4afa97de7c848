//! The decode rank with several NICs: shares, rails that fail or fall silent, and what is waited for before anything is over.

use core::time::Duration;
use std::collections::BTreeSet;
use std::sync::Arc;

use super::decode::{LEADER, SOURCES, id};
use super::kit::*;
use crate::protocol::{
    Command, DeadlineTerms, DecodeRank, EngineEvent, Event, FetchJob, MemberList, Message, NicAdvert, NicCommand,
    NicEvent, OpenedFetch, QuarantineTerms, RailHealth, RailTerms, Role, WorkerProfile,
};
use crate::{Direction, Evidence, FenceProof, HandoverId, Moment, NodeId, Rank, TransferId, TransportKind, UnitRange};

const SOURCE: NodeId = NodeId(SOURCES[0]);

/// A decode rank of one, which reads from a prefill rank of one over two rails.
struct Railed {
    rank: DecodeRank,
    source: WorkerProfile,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Post {
    nic: usize,
    id: TransferId,
    range: UnitRange,
}

impl Railed {
    /// With everything that is ready posted.
    fn moving() -> (Railed, Vec<Post>) {
        Railed::moving_over(2)
    }

    /// Over so many rails, whose lanes have to be RDMA's.
    fn moving_over(count: u32) -> (Railed, Vec<Post>) {
        let geometry = geometry(1);
        let device = || NicAdvert { device: "mlx5_0:1".into(), host: String::new(), ..nic(TransportKind::Ucx) };
        let nics = || (0..count).map(|_| device()).collect();
        let mut local = worker(Role::Decode, 0, &geometry, Some(Direction::Pull));
        let mut remote = worker(Role::Prefill, 0, &geometry, None);
        (local.nics, remote.nics) = (nics(), nics());
        let quarantine = QuarantineTerms { fence_after: Duration::from_millis(100), ..QuarantineTerms::default() };
        let rails = RailTerms {
            rails_max: count,
            share_bytes_min: 1,
            silent_after: Duration::from_secs(3),
            wired_within: Duration::ZERO,
            ..RailTerms::default()
        };
        let rank = DecodeRank::new(local, leases(), DeadlineTerms::default(), quarantine)
            .with_rails(rails)
            .with_rdma_required(true);
        let mut railed = Railed { rank, source: remote.clone() };
        let members = vec![Arc::new(member(SOURCES[0], Role::Prefill, PREFILL, 0, &geometry))];
        railed.rank.handle_members(at(0), &MemberList { whole: true, members });
        railed.rank.handle_peer(at(0), SOURCE, remote);
        let connects = |command: &Command| match command {
            Command::Nic { nic, command: NicCommand::Connect { .. } } => Some(*nic),
            _ => None,
        };
        let connected: BTreeSet<usize> = railed.commands().iter().filter_map(connects).collect();
        assert_eq!(connected, (0..count as usize).collect(), "all are warm");
        railed.message(LEADER, Message::Fetch(FetchJob { pairing: pairing(H1, &[4]), dp: 0 }));
        railed
            .rank
            .handle_engine(at(1), EngineEvent::Placed { handover: H1, tables: tables(&geometry, 0, 7), have: 0 });
        let opened = OpenedFetch { handover: H1, source: tables(&geometry, 0, 5), ready: 1 };
        let commands = railed.message(SOURCES[0], Message::Opened(opened));
        let posts = posted(&commands);
        events(railed.rank.outbox());
        (railed, posts)
    }

    fn commands(&mut self) -> Vec<Command> {
        commands(self.rank.outbox())
    }

    fn message(&mut self, from: u64, message: Message) -> Vec<Command> {
        self.rank.handle_message(at(1), NodeId(from), message);
        self.commands()
    }

    fn nic(&mut self, now: Moment, nic: usize, event: NicEvent) -> Vec<Command> {
        self.rank.handle_nic(now, nic, event);
        self.commands()
    }

    fn done(&mut self, post: Post) -> Vec<Command> {
        self.nic(at(2), post.nic, NicEvent::Done { id: post.id, bytes: 100, pieces: 3 })
    }

    fn timeout(&mut self, now: Moment) -> Vec<Command> {
        self.rank.handle_timeout(now);
        self.commands()
    }

    /// Another handover begins. Returns what is posted for it.
    fn fetch(&mut self, now: Moment, handover: HandoverId) -> Vec<Post> {
        let geometry = geometry(1);
        let job = FetchJob { pairing: pairing(handover, &[4]), dp: 0 };
        self.rank.handle_message(now, NodeId(LEADER), Message::Fetch(job));
        self.rank.handle_engine(now, EngineEvent::Placed { handover, tables: tables(&geometry, 0, 7), have: 0 });
        let opened = OpenedFetch { handover, source: tables(&geometry, 0, 5), ready: 1 };
        self.rank.handle_message(now, SOURCE, Message::Opened(opened));
        posted(&self.commands())
    }

    /// With the second rail found slow. Returns the time.
    fn with_a_slow_rail() -> (Railed, Moment) {
        let (mut railed, mut posts) = Railed::moving();
        let mut now = at(1);
        for handover in 100..116 {
            for post in posts {
                let units = post.range.end - post.range.start;
                let took = Duration::from_micros(units * if post.nic == 1 { 10_000 } else { 100 });
                railed.nic(now + took, post.nic, NicEvent::Done { id: post.id, bytes: 100, pieces: 3 });
            }
            now = now + Duration::from_millis(50);
            if railed.turns().contains(&RailHealth::Slow) {
                return (railed, now);
            }
            posts = railed.fetch(now, HandoverId(handover));
        }
        panic!("the second rail is not found slow")
    }

    /// What is said of rails.
    fn turns(&mut self) -> Vec<RailHealth> {
        let turn = |event| match event {
            Event::RailTurned(turn) => Some(turn.health),
            _ => None,
        };
        events(self.rank.outbox()).into_iter().filter_map(turn).collect()
    }
}

fn posted(commands: &[Command]) -> Vec<Post> {
    let post = |command: &Command| match command {
        Command::Nic { nic, command: NicCommand::Post { id, range, .. } } => {
            Some(Post { nic: *nic, id: *id, range: *range })
        }
        _ => None,
    };
    commands.iter().filter_map(post).collect()
}

fn cancelled(post: Post) -> NicEvent {
    NicEvent::Failed { id: post.id, reason: "cancelled".into() }
}

fn fenced(proof: FenceProof) -> NicEvent {
    NicEvent::Fenced { node: SOURCE, address: "a".into(), ticket: u64::MAX, proof }
}

fn fetched() -> Command {
    send(SOURCES[0], Message::Fetched { handover: H1 })
}

#[test]
fn a_program_is_shared_by_both_and_confirmed_once() {
    let (mut railed, posts) = Railed::moving();
    let [one, other] = posts[..] else { panic!("{posts:?}") };
    assert_eq!((one.nic, other.nic), (0, 1));
    assert!(one.range.start == 0 && one.range.end == other.range.start && other.range.end > other.range.start);
    assert_eq!((one.id.with_chunk(0), one.id.step()), (TransferId::of(H1, Rank(0), Rank(0), 0), 0));
    assert_ne!(one.id, other.id);
    assert_eq!(railed.done(other), []);
    assert_eq!(railed.done(one), [fetched()]);
    assert_eq!(railed.rank.poll_timeout().map(|due| due > at(5)), Some(true), "nothing is watched any more");
    let told = railed.message(SOURCES[0], Message::Confirmed { handover: H1 });
    let [Command::Send { message: Message::RankDone { result: Ok(paths), .. }, .. }] = &told[..] else {
        panic!("{told:?}")
    };
    assert_eq!(paths.iter().map(|path| (path.bytes, path.pieces)).collect::<Vec<_>>(), [(100, 3), (100, 3)], "by rail");
}

#[test]
fn what_fails_on_one_rail_is_moved_by_the_other_at_once() {
    let (mut railed, posts) = Railed::moving();
    let [one, other] = posts[..] else { panic!("{posts:?}") };
    let commands = railed.nic(at(2), 1, NicEvent::Failed { id: other.id, reason: "reset".into() });
    let [again] = posted(&commands)[..] else { panic!("{commands:?}") };
    assert_eq!((again.nic, again.range), (0, other.range), "the same bytes, elsewhere");
    assert_ne!(again.id, other.id);
    assert_eq!(railed.turns(), [RailHealth::Down]);
    assert_eq!(railed.nic(at(2), 1, NicEvent::PeerLost { node: SOURCE, reason: "reset".into() }), [], "nothing fails");
    assert_eq!(railed.done(one), []);
    assert_eq!(railed.done(again), [fetched()]);
}

#[test]
fn nothing_is_over_before_a_silent_rail_has_stopped() {
    let (mut railed, posts) = Railed::moving();
    let [one, other] = posts[..] else { panic!("{posts:?}") };
    railed.done(one);
    let due = railed.rank.poll_timeout().expect("the other is watched");
    assert!(due >= at(4) && due < at(5), "{due}");
    let commands = railed.timeout(due);
    let [again] = posted(&commands)[..] else { panic!("{commands:?}") };
    assert_eq!((again.nic, again.range), (0, other.range));
    assert!(commands.contains(&cancel(1, other.id)));
    assert_eq!(railed.turns(), [RailHealth::Down]);
    // Every byte is here; but the silent one may still write them, and the source may not be asked before.
    assert_eq!(railed.done(again), []);
    let commands = railed.timeout(due + Duration::from_millis(100));
    assert!(
        matches!(&commands[..], [Command::Nic { nic: 1, command: NicCommand::Fence { node: SOURCE, .. } }]),
        "{commands:?}"
    );
    let proof = FenceProof::EndpointDestroyed;
    assert_eq!(railed.nic(due, 0, fenced(proof)), [], "another NIC's fence says nothing");
    let commands = railed.timeout(due + Duration::from_millis(200));
    assert!(matches!(&commands[..], [Command::Nic { nic: 1, command: NicCommand::Fence { .. } }]), "again and again");
    assert_eq!(railed.nic(due, 1, fenced(proof)), [fetched()]);
}

#[test]
fn a_silent_rail_that_stops_when_told_to_needs_no_fence() {
    let (mut railed, posts) = Railed::moving();
    let [one, other] = posts[..] else { panic!("{posts:?}") };
    railed.done(one);
    let due = railed.rank.poll_timeout().expect("the other is watched");
    let again = posted(&railed.timeout(due))[0];
    assert_eq!(railed.nic(due, 1, cancelled(other)), [], "it fails nothing");
    assert_eq!(railed.done(again), [fetched()]);
}

#[test]
fn a_silent_rail_that_speaks_after_all_spares_the_other() {
    let (mut railed, posts) = Railed::moving();
    let [one, other] = posts[..] else { panic!("{posts:?}") };
    railed.done(one);
    let due = railed.rank.poll_timeout().expect("the other is watched");
    let again = posted(&railed.timeout(due))[0];
    assert_eq!(railed.done(other), [cancel(0, again.id)]);
    assert_eq!(railed.nic(due, 0, cancelled(again)), [fetched()]);
}

#[test]
fn a_handover_fails_when_no_rail_is_left_and_waits_for_all_of_them() {
    let (mut railed, posts) = Railed::moving();
    let [one, other] = posts[..] else { panic!("{posts:?}") };
    let again = posted(&railed.nic(at(2), 1, NicEvent::Failed { id: other.id, reason: "reset".into() }))[0];
    let commands = railed.nic(at(2), 0, NicEvent::Failed { id: again.id, reason: "reset, too".into() });
    let failed = commands.iter().any(|command| {
        matches!(command, Command::Send { to: NodeId(LEADER), message: Message::RankDone { result: Err(_), .. } })
    });
    assert!(failed && commands.contains(&cancel(0, one.id)), "{commands:?}");
    let outcome = crate::protocol::Outcome::Cancelled;
    let word = railed.message(LEADER, Message::Settled { handover: H1, outcome: outcome.clone() });
    assert_eq!(word, [settled(H1, outcome, true)], "the first rail still moves");
    let commands = railed.timeout(at(3));
    assert!(matches!(&commands[..], [Command::Nic { nic: 0, command: NicCommand::Fence { .. } }]), "{commands:?}");
    railed.nic(at(3), 0, fenced(FenceProof::EndpointDestroyed));
    assert_eq!((railed.rank.fetches(), railed.rank.poll_timeout()), (0, None));
}

#[test]
fn a_peer_that_every_rail_has_lost_fails_what_it_owes() {
    let (mut railed, _) = Railed::moving();
    let lost =
        |railed: &mut Railed, nic| railed.nic(at(2), nic, NicEvent::PeerLost { node: SOURCE, reason: "reset".into() });
    assert_eq!(lost(&mut railed, 0), []);
    let commands = lost(&mut railed, 1);
    assert!(
        commands.iter().any(|command| matches!(command, Command::Send { message: Message::Abandon { .. }, .. })),
        "{commands:?}"
    );
    assert_eq!(railed.turns(), [RailHealth::Down, RailHealth::Down]);
}

#[test]
fn a_trial_begins_with_a_new_connection() {
    let (mut railed, posts) = Railed::moving();
    let [one, other] = posts[..] else { panic!("{posts:?}") };
    let again = posted(&railed.nic(at(2), 1, NicEvent::Failed { id: other.id, reason: "reset".into() }))[0];
    // The other one fails, too, after the first has rested.
    let commands = railed.nic(at(3), 0, NicEvent::Failed { id: one.id, reason: "reset".into() });
    assert!(
        matches!(&commands[0], Command::Nic { nic: 1, command: NicCommand::Connect { node: SOURCE, .. } }),
        "{commands:?}"
    );
    let [trial] = posted(&commands)[..] else { panic!("{commands:?}") };
    assert_eq!((trial.nic, trial.range), (1, one.range));
    railed.turns();
    railed.done(trial);
    assert_eq!(railed.turns(), [RailHealth::Up]);
    assert_eq!(railed.done(again), [fetched()]);
}

#[test]
fn a_slow_rail_moves_what_a_dead_one_does_not() {
    let (mut railed, now) = Railed::with_a_slow_rail();
    let [one] = railed.fetch(now, H2)[..] else { panic!("the slow one rests") };
    assert_eq!(one.nic, 0);
    let again = posted(&railed.nic(now, 0, NicEvent::Failed { id: one.id, reason: "reset".into() }));
    assert!(matches!(again[..], [again] if (again.nic, again.range) == (1, one.range)), "{again:?}");
    assert_eq!(railed.turns(), [RailHealth::Down]);
    assert_eq!(railed.nic(now, 0, NicEvent::PeerLost { node: SOURCE, reason: "reset".into() }), [], "nothing fails");
}

#[test]
fn a_slow_rail_moves_what_a_silent_one_does_not() {
    let (mut railed, now) = Railed::with_a_slow_rail();
    let [one] = railed.fetch(now, H2)[..] else { panic!("the slow one rests") };
    let commands = railed.timeout(now + Duration::from_secs(4));
    assert!(matches!(posted(&commands)[..], [again] if (again.nic, again.range) == (1, one.range)), "{commands:?}");
    assert!(commands.contains(&cancel(0, one.id)));
    assert_eq!(railed.turns(), [RailHealth::Down], "it is known of it from now on");
}

#[test]
fn what_was_refused_on_two_rails_has_names_of_its_own_on_the_last() {
    let (mut railed, posts) = Railed::moving_over(3);
    let [one, two, three] = posts[..] else { panic!("{posts:?}") };
    for refused in [one, two] {
        let evidence = Box::new(Evidence::connected(vec!["tcp/eth0".into()]));
        railed.nic(at(1), refused.nic, NicEvent::Shown { node: SOURCE, evidence });
    }
    let lost = |post: Post| NicEvent::Failed { id: post.id, reason: "no RDMA".into() };
    let again: Vec<Post> =
        [one, two].into_iter().flat_map(|post| posted(&railed.nic(at(1), post.nic, lost(post)))).collect();
    assert_eq!(
        again.iter().map(|post| (post.nic, post.range)).collect::<Vec<_>>(),
        [(three.nic, one.range), (three.nic, two.range)]
    );
    let names: BTreeSet<TransferId> = posts.iter().chain(&again).map(|post| post.id).collect();
    assert_eq!(names.len(), 5, "{again:?}");
    assert_eq!(railed.done(three), []);
    assert_eq!(railed.done(again[1]), [], "the other one may still write");
    assert_eq!(railed.done(again[0]), [fetched()]);
}

#[test]
fn what_an_earlier_conversation_posted_says_nothing_of_the_rails_of_this_one() {
    let (mut railed, posts) = Railed::moving();
    let earlier = posts[1];
    railed.rank.handle_peer_down(at(1), SOURCE, "the cable");
    railed.message(LEADER, Message::Settled { handover: H1, outcome: crate::protocol::Outcome::Cancelled });
    railed.rank.handle_peer(at(1), SOURCE, railed.source.clone());
    railed.commands();
    let failed = railed.fetch(at(1), H2)[1];
    railed.nic(at(1), 1, NicEvent::Failed { id: failed.id, reason: "reset".into() });
    assert_eq!(railed.turns(), [RailHealth::Down]);
    let trial = railed.fetch(at(3), HandoverId(3));
    assert_eq!(trial.iter().map(|post| post.nic).collect::<Vec<_>>(), [0, 1], "it has rested");
    railed.nic(at(3), 1, NicEvent::Done { id: earlier.id, bytes: 100, pieces: 3 });
    assert_eq!(railed.turns(), [], "that was not the trial");
    railed.nic(at(3), 1, NicEvent::Done { id: trial[1].id, bytes: 100, pieces: 3 });
    assert_eq!(railed.turns(), [RailHealth::Up]);
}

#[test]
fn a_trial_that_fails_is_followed_by_a_longer_rest() {
    let (mut railed, posts) = Railed::moving();
    railed.nic(at(2), 1, NicEvent::Failed { id: posts[1].id, reason: "reset".into() });
    let trial = railed.fetch(at(3), H2);
    assert_eq!(trial.iter().map(|post| post.nic).collect::<Vec<_>>(), [0, 1]);
    railed.nic(at(3), 1, NicEvent::Failed { id: trial[1].id, reason: "reset".into() });
    let next = railed.fetch(at(3) + Duration::from_millis(600), HandoverId(3));
    assert_eq!(next.iter().map(|post| post.nic).collect::<Vec<_>>(), [0]);
}

#[test]
fn one_rail_is_as_it_was() {
    let mut fixture = super::decode::Fixture::moving(Direction::Pull, 2);
    let commands = fixture.nic(super::decode::failed(id(0, 0)));
    assert!(posted(&commands).is_empty() && !commands.is_empty(), "{commands:?}");
    assert!(events(fixture.rank.outbox()).iter().all(|event| !matches!(event, Event::RailTurned(_))));
}
