//! What strangers and mistakes can do to the control plane: each gets one typed error, and nothing else is disturbed.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kvferry::{
    Epoch, Event, FailReason, GroupGeometry, HandoverError, HandoverId, LeastLoaded, NodeConfig, NodeError, NodeId,
    Outcome, Rank, Refusal, RequestId, Role, SchedulerNode, SchedulerTerms, Tables,
};
use kvferry_core::protocol::{
    Identity, Member, Message, OpenFetch, Place, PrefillJob, Profile, Protocols, Session, SessionEvent, SessionTerms,
    WorkerProfile,
};
use kvferry_core::wire::{Frame, FrameReader};
use kvferry_core::{Direction, GroupId, Moment};
use support::{PATIENCE, Secret, node_config, rank, scheduler, submit};

/// Strangers speak the first protocol, without resumption: what they say stands alone.
const PLAIN: Protocols = Protocols { min: 1, max: 1 };
const SPEC: &str = "layers=2,kv_heads=2,head_dim=16";

/// A raw control link to a node.
struct Stranger {
    stream: TcpStream,
    reader: FrameReader,
}

impl Stranger {
    fn dial(address: &str) -> Stranger {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut reader = FrameReader::default();
        reader.trust();
        Stranger { stream, reader }
    }

    fn send(&mut self, bytes: &[u8]) {
        // The node may have hung up already; what it said before is still read.
        let _ = self.stream.write_all(bytes);
    }

    /// The next frame; `None` once the node has closed the link.
    fn receive(&mut self) -> Option<Bytes> {
        loop {
            if let Some(frame) = self.reader.next_frame().unwrap() {
                return Some(frame);
            }
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => return None,
                Ok(count) => self.reader.buffer().extend_from_slice(&bytes[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("the node neither answered nor closed the link: {error}"),
            }
        }
    }

    /// The reason with which the node ends the link.
    fn rejection(&mut self) -> Option<String> {
        while let Some(frame) = self.receive() {
            if let Ok(Frame::Reject(reason)) = Frame::decode(frame) {
                return Some(reason);
            }
        }
        None
    }

    /// A real handshake as `node`, meant for `expects`.
    fn shake_hands(&mut self, node: u64, expects: u64, secret: &Secret) -> Result<Session, String> {
        self.shake_hands_in(PLAIN, node, expects, secret)
    }

    fn shake_hands_in(
        &mut self,
        protocols: Protocols,
        node: u64,
        expects: u64,
        secret: &Secret,
    ) -> Result<Session, String> {
        let identity = Identity { node: NodeId(node), epoch: Epoch(1), secret: secret.clone(), protocols };
        let mut session = Session::dial(Moment(0), identity, NodeId(expects), true, [7; 16], SessionTerms::default());
        loop {
            while let Some(frame) = session.poll_transmit() {
                self.send(&frame);
            }
            match session.poll_event() {
                Some(SessionEvent::Established { .. }) => return Ok(session),
                Some(SessionEvent::Closed(error)) => return Err(error.to_string()),
                _ => {}
            }
            match self.receive() {
                Some(frame) => session.handle_frame(Moment(0), frame),
                None => return Err("the link closed".to_owned()),
            }
        }
    }

    fn say(&mut self, session: &mut Session, message: Message) {
        session.send(Moment(0), &message);
        while let Some(frame) = session.poll_transmit() {
            self.send(&frame);
        }
    }

    /// The next message that is not about members or profiles.
    fn hear(&mut self, session: &mut Session) -> Option<Message> {
        loop {
            while let Some(event) = session.poll_event() {
                match event {
                    SessionEvent::Message(Message::Profile(_) | Message::Members(_)) => {}
                    SessionEvent::Message(message) => return Some(message),
                    _ => return None,
                }
            }
            session.handle_frame(Moment(0), self.receive()?);
        }
    }
}

#[tokio::test]
async fn strangers_disturb_nobody() {
    let secret = None;
    let scheduler = scheduler(&secret).await;
    let prefill = rank(1, Role::Prefill, SPEC, scheduler.address(), &secret).await;
    let _decode = rank(2, Role::Decode, SPEC, scheduler.address(), &secret).await;
    assert!(submit(&scheduler, 1).await.unwrap().outcome.is_delivered());

    let address = prefill.address.clone();
    let hello = {
        let identity = Identity { node: NodeId(9), epoch: Epoch(1), secret: None, protocols: PLAIN };
        Session::dial(Moment(0), identity, NodeId(1), true, [1; 16], SessionTerms::default()).poll_transmit().unwrap()
    };
    tokio::task::spawn_blocking(move || {
        let attack = |bytes: &[u8]| {
            let mut stranger = Stranger::dial(&address);
            stranger.send(bytes);
            stranger.rejection()
        };
        assert!(
            attack(b"GET / HTTP/1.1\r\nHost: kvferry\r\n\r\n").unwrap().contains("at most 4096"),
            "oversized for a stranger"
        );
        assert!(attack(&[5, 0, 0, 0, 99, 1, 2, 3, 4]).unwrap().contains("frame kind 99 is unknown"));
        assert!(attack(&[1, 0, 0, 0, 1]).unwrap().contains("does not decode"));
        assert!(attack(&[0, 0, 0, 0]).unwrap().contains("too short"));
        let mut trailing = hello.to_vec();
        trailing.push(0);
        trailing[0] += 1;
        assert!(attack(&trailing).unwrap().contains("1 bytes follow"));
        let twice = [hello.to_vec(), hello.to_vec()].concat();
        assert!(attack(&twice).unwrap().contains("a hello came where a proof was due"));
        // Cut in the middle, and gone: nothing to answer, nothing to keep.
        Stranger::dial(&address).send(&hello[..hello.len() / 2]);

        assert!(Stranger::dial(&address).shake_hands(9, 5, &None).unwrap_err().contains("this is node-1"));
        let with_secret: Secret = Some(Arc::from(*b"guess"));
        assert!(Stranger::dial(&address).shake_hands(9, 1, &with_secret).unwrap_err().contains("secret"));

        // An honest handshake, then a replayed frame, then one that skips ahead.
        for repeat in [true, false] {
            let mut stranger = Stranger::dial(&address);
            let mut session = stranger.shake_hands(9, 1, &None).unwrap();
            session.send(Moment(0), &Message::Abandon { handover: HandoverId(1) });
            let first = session.poll_transmit().unwrap();
            session.send(Moment(0), &Message::Abandon { handover: HandoverId(1) });
            let second = session.poll_transmit().unwrap();
            let frames = if repeat { [first.clone(), first] } else { [second.clone(), second] };
            for frame in frames {
                stranger.send(&frame);
            }
            assert!(stranger.rejection().unwrap().contains("replayed, reordered or lost"));
        }

        // A peer that was never introduced asks for a request that is not there.
        let mut stranger = Stranger::dial(&address);
        let mut session = stranger.shake_hands(9, 1, &None).unwrap();
        let open = OpenFetch {
            handover: HandoverId(77),
            request: RequestId(4711),
            have: 0,
            direction: Direction::Pull,
            destination: Tables::default(),
        };
        stranger.say(&mut session, Message::Open(open));
        match stranger.hear(&mut session) {
            Some(Message::Refused { handover: HandoverId(77), refusal: Refusal::Mismatch(why) }) => {
                assert!(why.contains("introduced"))
            }
            other => panic!("{other:?}"),
        }
        // Nobody confirms what it never read.
        stranger.say(&mut session, Message::Fetched { handover: HandoverId(78) });
        match stranger.hear(&mut session) {
            Some(Message::Refused { refusal: Refusal::UnknownHandover(HandoverId(78)), .. }) => {}
            other => panic!("{other:?}"),
        }
    })
    .await
    .unwrap();
    assert!(submit(&scheduler, 2).await.unwrap().outcome.is_delivered());
    match submit(&scheduler, 3).await {
        Ok(finished) => assert!(finished.outcome.is_delivered()),
        Err(error) => panic!("{error}"),
    }
    scheduler.shutdown().await;
}

#[tokio::test]
async fn a_message_that_cannot_cross_ends_the_conversation() {
    let mut config = node_config(0, &None);
    // Nobody would give it up otherwise.
    config.session.resume_within = Duration::from_secs(3600);
    let scheduler = SchedulerNode::start(config, SchedulerTerms::default(), Box::new(LeastLoaded)).await.unwrap();
    let (mut events, address) = (scheduler.events().unwrap(), scheduler.address().to_owned());
    let stranger = tokio::task::spawn_blocking(move || {
        let mut stranger = Stranger::dial(&address);
        let mut session = stranger.shake_hands_in(Protocols::default(), 8, 0, &None).unwrap();
        stranger.say(&mut session, Message::Resume { name: 1, peer: 0, heard: 0 });
        let unknown = Frame::Sealed { sequence: 1, mac: [0; 16], body: Bytes::from_static(&[0x7f]) };
        stranger.send(&unknown.encode().unwrap());
        stranger.rejection()
    });
    let parted = async {
        loop {
            if let Some(Event::Parted { node, cause, .. }) = events.recv().await {
                return (node, cause);
            }
        }
    };
    let (node, cause) = tokio::time::timeout(PATIENCE, parted).await.unwrap();
    assert_eq!(node, NodeId(8));
    assert!(cause.contains("cannot cross") && cause.contains("does not decode"), "{cause}");
    assert_eq!(stranger.await.unwrap(), Some(cause));
    scheduler.shutdown().await;
}

#[tokio::test]
async fn a_stranger_does_not_become_the_leader_by_saying_so() {
    let scheduler = scheduler(&None).await;
    let mut prefill = rank(1, Role::Prefill, SPEC, scheduler.address(), &None).await;
    let _decode = rank(2, Role::Decode, SPEC, scheduler.address(), &None).await;
    assert!(submit(&scheduler, 1).await.unwrap().outcome.is_delivered());
    let address = prefill.address.clone();
    let stranger = tokio::task::spawn_blocking(move || {
        let geometry = support::geometry(SPEC);
        let layout = Arc::new(geometry.shard(Rank(0)).unwrap().layout(&[16]));
        let (role, group, rank) = (Role::Prefill, GroupId(1), Rank(0));
        let worker = WorkerProfile { role, group, rank, geometry, layout, nics: Vec::new(), direction: None, rails: 0 };
        let mut stranger = Stranger::dial(&address);
        let mut session = stranger.shake_hands(9, 1, &None).unwrap();
        stranger.say(&mut session, Message::Profile(Box::new(Profile { worker: Some(worker) })));
        let spec =
            kvferry::RequestSpec { request: RequestId(99), tokens: 40, prefix: Arc::default(), prefix_tokens: 512 };
        stranger.say(&mut session, Message::Prefill(PrefillJob { spec, dp: 0, trace: None }));
        stranger
    });
    let ignored = async {
        loop {
            if let Some(Event::Ignored { from, what }) = prefill.events.recv().await
                && what.contains("does not lead")
            {
                return from;
            }
        }
    };
    assert_eq!(tokio::time::timeout(PATIENCE, ignored).await.unwrap(), NodeId(9));
    drop(stranger.await.unwrap());
    assert_eq!(prefill.prefills.load(std::sync::atomic::Ordering::Relaxed), 1, "its work is not taken");
    assert!(submit(&scheduler, 2).await.unwrap().outcome.is_delivered());
    scheduler.shutdown().await;
}

#[tokio::test]
async fn impossible_joins_are_refused() {
    let secret = None;
    let scheduler = scheduler(&secret).await;
    let _prefill = rank(1, Role::Prefill, SPEC, scheduler.address(), &secret).await;
    let _decode = rank(2, Role::Decode, SPEC, scheduler.address(), &secret).await;
    assert!(submit(&scheduler, 1).await.unwrap().outcome.is_delivered());
    let address = scheduler.address().to_owned();
    tokio::task::spawn_blocking(move || {
        let model = kvferry::Model::from_spec(SPEC).unwrap().model;
        let geometry = Arc::new(GroupGeometry { model, format: Default::default(), parallel: Default::default() });
        let place = |rank, geometry: Arc<GroupGeometry>, blocks| {
            Some(Place { role: Role::Prefill, group: GroupId(1), rank: Rank(rank), geometry, blocks, handovers_max: 1 })
        };
        let join = |node, place| {
            let mut stranger = Stranger::dial(&address);
            let mut session = stranger.shake_hands(node, 0, &None).unwrap();
            let member = Member { node: NodeId(node), epoch: Epoch(1), address: "127.0.0.1:1".to_owned(), place };
            stranger.say(&mut session, Message::Join(Box::new(member)));
            match stranger.hear(&mut session) {
                Some(Message::JoinRefused(error)) => error.to_string(),
                other => panic!("{other:?}"),
            }
        };
        assert!(join(8, place(0, Arc::clone(&geometry), vec![16])).contains("wants the place of node-1"));
        assert!(join(8, place(1, Arc::clone(&geometry), vec![16])).contains("a group of 1 ranks"));
        assert!(join(8, place(0, Arc::clone(&geometry), vec![])).contains("0 pool sizes for 1 layer groups"));
        let mut broken = (*geometry).clone();
        broken.parallel.tp = 0;
        assert!(join(8, place(0, Arc::new(broken), vec![16])).contains("cannot join"));
    })
    .await
    .unwrap();
    assert!(submit(&scheduler, 2).await.unwrap().outcome.is_delivered());
    scheduler.shutdown().await;
}

#[tokio::test]
async fn a_wrong_secret_keeps_a_rank_out_and_the_right_one_lets_it_in() {
    let secret: Secret = Some(Arc::from(*b"correct horse"));
    let scheduler = scheduler(&secret).await;
    let _prefill = rank(1, Role::Prefill, SPEC, scheduler.address(), &secret).await;
    let _decode = rank(2, Role::Decode, SPEC, scheduler.address(), &secret).await;
    assert!(submit(&scheduler, 1).await.unwrap().outcome.is_delivered());
    let address = scheduler.address().to_owned();
    tokio::task::spawn_blocking(move || {
        let wrong: Secret = Some(Arc::from(*b"battery staple"));
        assert!(Stranger::dial(&address).shake_hands(8, 0, &wrong).unwrap_err().contains("authentication failed"));
        assert!(Stranger::dial(&address).shake_hands(8, 0, &None).unwrap_err().contains("requires the shared secret"));
    })
    .await
    .unwrap();
    assert!(submit(&scheduler, 2).await.unwrap().outcome.is_delivered());
    scheduler.shutdown().await;
}

#[tokio::test]
async fn a_mismatch_names_the_fields_and_fails_that_request_only() {
    let secret = None;
    let scheduler = scheduler(&secret).await;
    let _prefill = rank(1, Role::Prefill, SPEC, scheduler.address(), &secret).await;
    let _decode =
        rank(2, Role::Decode, "layers=2,kv_heads=2,head_dim=32,dtype=fp8", scheduler.address(), &secret).await;
    let finished = submit(&scheduler, 1).await.unwrap();
    let Outcome::Failed { reason: FailReason::Mismatch(text) } = finished.outcome else { panic!("{finished:?}") };
    assert!(text.contains("dtype") && text.contains("bf16") && text.contains("fp8"), "{text}");
    assert!(text.contains("16") && text.contains("32"), "{text}");
    scheduler.shutdown().await;
}

#[tokio::test]
async fn a_duplicate_request_is_refused_and_the_first_goes_on() {
    let secret = None;
    let scheduler = scheduler(&secret).await;
    // No group yet: the first request waits.
    let spec = kvferry::RequestSpec { request: RequestId(1), tokens: 40, prefix: Arc::default(), prefix_tokens: 512 };
    let first = scheduler.submit(spec).await;
    assert_eq!(submit(&scheduler, 1).await, Err(HandoverError::Refused(Refusal::Duplicate(RequestId(1)))));
    let _prefill = rank(1, Role::Prefill, SPEC, scheduler.address(), &secret).await;
    let _decode = rank(2, Role::Decode, SPEC, scheduler.address(), &secret).await;
    let finished = tokio::time::timeout(PATIENCE, first).await.unwrap().unwrap();
    assert!(finished.outcome.is_delivered());
    scheduler.shutdown().await;
}

#[tokio::test]
async fn dropping_a_handover_cancels_it() {
    let secret = None;
    let scheduler = scheduler(&secret).await;
    let mut events = scheduler.events().unwrap();
    let spec = kvferry::RequestSpec { request: RequestId(1), tokens: 40, prefix: Arc::default(), prefix_tokens: 512 };
    drop(scheduler.submit(spec).await);
    let finished = async {
        while let Some(event) = events.recv().await {
            if let kvferry::Event::Finished(finished) = event {
                return Some(finished);
            }
        }
        None
    };
    let finished = tokio::time::timeout(PATIENCE, finished).await.unwrap().unwrap();
    assert_eq!((finished.request, finished.outcome), (RequestId(1), Outcome::Cancelled));
    scheduler.shutdown().await;
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut config = NodeConfig::new(NodeId(0), Epoch(1));
    config.listen = holder.local_addr().unwrap().to_string();
    let Err(error) = SchedulerNode::start(config, SchedulerTerms::default(), Box::new(LeastLoaded)).await else {
        panic!("it started")
    };
    assert!(matches!(error, NodeError::Listen(_)));
    let text = error.to_string();
    assert!(text.contains(&holder.local_addr().unwrap().to_string()) && text.contains("free the port"), "{text}");
}
