//! Two sessions back to back, and everything that somebody between them could do.

use core::time::Duration;
use std::sync::Arc;

use bytes::Bytes;
use kvferry_core::protocol::{
    Identity, Message, PrefillJob, Protocols, RequestSpec, Session, SessionError, SessionEvent, SessionTerms,
};
use kvferry_core::wire::{Frame, PROTOCOL_MAX, WireError};
use kvferry_core::{Epoch, HandoverId, Moment, NodeId, RequestId};
use proptest::prelude::*;

const DIALER: NodeId = NodeId(1);
const ACCEPTOR: NodeId = NodeId(2);

fn at(milliseconds: u64) -> Moment {
    Moment(0) + Duration::from_millis(milliseconds)
}

fn identity(node: NodeId, secret: Option<&str>) -> Identity {
    Identity {
        node,
        epoch: Epoch(5),
        secret: secret.map(|secret| Arc::from(secret.as_bytes())),
        protocols: Protocols::default(),
    }
}

fn dial(secret: Option<&str>, loopback: bool) -> Session {
    Session::dial(at(0), identity(DIALER, secret), ACCEPTOR, loopback, [1; 16], SessionTerms::default())
}

fn accept(secret: Option<&str>, loopback: bool) -> Session {
    Session::accept(at(0), identity(ACCEPTOR, secret), loopback, [2; 16], SessionTerms::default())
}

fn message(number: u64) -> Message {
    Message::Started { handover: HandoverId(number) }
}

/// What a session wants to write, without the lengths.
fn written(session: &mut Session) -> Vec<Bytes> {
    std::iter::from_fn(|| session.poll_transmit()).map(|frame| frame.slice(4..)).collect()
}

fn events(session: &mut Session) -> Vec<SessionEvent> {
    std::iter::from_fn(|| session.poll_event()).collect()
}

/// Carries frames both ways until nobody has anything to say.
fn exchange(one: &mut Session, other: &mut Session) {
    loop {
        let (to_other, to_one) = (written(one), written(other));
        if to_other.is_empty() && to_one.is_empty() {
            return;
        }
        to_other.into_iter().for_each(|frame| other.handle_frame(at(1), frame));
        to_one.into_iter().for_each(|frame| one.handle_frame(at(1), frame));
    }
}

fn established(secret: Option<&str>) -> (Session, Session) {
    let (mut dialer, mut acceptor) = (dial(secret, secret.is_none()), accept(secret, secret.is_none()));
    exchange(&mut dialer, &mut acceptor);
    assert_eq!(
        events(&mut dialer),
        [SessionEvent::Established { node: ACCEPTOR, epoch: Epoch(5), protocol: PROTOCOL_MAX }]
    );
    assert_eq!(
        events(&mut acceptor),
        [SessionEvent::Established { node: DIALER, epoch: Epoch(5), protocol: PROTOCOL_MAX }]
    );
    (dialer, acceptor)
}

/// The frame of one message from the dialer.
fn sent(dialer: &mut Session, number: u64) -> Bytes {
    dialer.send(at(2), &message(number));
    written(dialer).pop().expect("a frame")
}

fn closed(session: &mut Session) -> SessionError {
    match events(session).pop() {
        Some(SessionEvent::Closed(error)) => error,
        other => unreachable!("closed was due, got {other:?}"),
    }
}

/// How the handshake of these two ends, on both sides.
fn refusal(mut dialer: Session, mut acceptor: Session) -> (SessionError, SessionError) {
    exchange(&mut dialer, &mut acceptor);
    (closed(&mut dialer), closed(&mut acceptor))
}

#[test]
fn messages_pass_both_ways_in_order() {
    for secret in [None, Some("a shared secret")] {
        let (mut dialer, mut acceptor) = established(secret);
        for number in 0..3 {
            dialer.send(at(2), &message(number));
            acceptor.send(at(2), &message(10 + number));
        }
        exchange(&mut dialer, &mut acceptor);
        assert_eq!(events(&mut acceptor), [0, 1, 2].map(|number| SessionEvent::Message(message(number))));
        assert_eq!(events(&mut dialer), [10, 11, 12].map(|number| SessionEvent::Message(message(number))));
    }
}

/// A peer of an older build is told what it understands, and hears all of that.
#[test]
fn a_span_is_named_to_peers_that_know_of_spans() {
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".parse().ok();
    let spec = RequestSpec { request: RequestId(1), tokens: 2, prefix: Arc::default(), prefix_tokens: 3 };
    let job = |trace| Message::Prefill(PrefillJob { spec: spec.clone(), dp: 0, trace });
    for (max, heard) in [(PROTOCOL_MAX, trace), (2, None), (1, None)] {
        let older = Identity { protocols: Protocols { min: 1, max }, ..identity(ACCEPTOR, None) };
        let mut acceptor = Session::accept(at(0), older, true, [2; 16], SessionTerms::default());
        let mut dialer = dial(None, true);
        dialer.send(at(0), &job(trace));
        exchange(&mut dialer, &mut acceptor);
        dialer.send(at(2), &job(trace));
        exchange(&mut dialer, &mut acceptor);
        let message = || SessionEvent::Message(job(heard));
        assert_eq!(events(&mut acceptor)[1..], [message(), message()], "protocol {max}");
    }
}

#[test]
fn a_message_before_the_handshake_waits_for_it() {
    let (mut dialer, mut acceptor) = (dial(None, true), accept(None, true));
    dialer.send(at(0), &message(1));
    acceptor.send(at(0), &message(2));
    exchange(&mut dialer, &mut acceptor);
    assert_eq!(events(&mut acceptor)[1..], [SessionEvent::Message(message(1))]);
    assert_eq!(events(&mut dialer)[1..], [SessionEvent::Message(message(2))]);
    let mut alone = accept(None, true);
    for number in 0..65_536 {
        alone.send(at(0), &message(number));
    }
    assert_eq!(events(&mut alone), []);
    alone.send(at(0), &message(0));
    assert_eq!(closed(&mut alone), SessionError::Backlog);
}

#[test]
fn off_loopback_a_secret_is_needed() {
    let mut dialer = dial(None, false);
    assert!(matches!(closed(&mut dialer), SessionError::SecretRequired(_)));
    assert_eq!(written(&mut dialer), Vec::<Bytes>::new());
    // A dialer that believes itself on loopback does not decide for the other side.
    let (dialer, acceptor) = refusal(dial(None, true), accept(None, false));
    assert!(matches!(dialer, SessionError::Rejected(_)), "{dialer:?}");
    assert!(matches!(acceptor, SessionError::SecretRequired(_)), "{acceptor:?}");
}

#[test]
fn both_sides_need_the_same_secret() {
    let (dialer, acceptor) = refusal(dial(Some("this"), false), accept(Some("that"), false));
    assert_eq!(dialer, SessionError::BadMac, "the dialer notices first");
    assert!(matches!(acceptor, SessionError::Rejected(_)), "{acceptor:?}");
    for (ours, theirs) in [(Some("this"), None), (None, Some("this"))] {
        let (dialer, acceptor) = refusal(dial(ours, true), accept(theirs, true));
        assert!(matches!(dialer, SessionError::Rejected(_)), "{dialer:?}");
        assert!(matches!(acceptor, SessionError::SecretRequired(_)), "{acceptor:?}");
    }
}

#[test]
fn a_proof_is_checked_by_the_acceptor_too() {
    // Somebody who ignores the welcome's authentication cannot give a proof of his own.
    let mut dialer = dial(Some("this"), false);
    let mut acceptor = accept(Some("this"), false);
    written(&mut dialer).into_iter().for_each(|frame| acceptor.handle_frame(at(1), frame));
    let proof = Frame::Proof([0; 16]).encode().expect("encodes").slice(4..);
    acceptor.handle_frame(at(1), proof);
    assert_eq!(closed(&mut acceptor), SessionError::BadMac);
}

#[test]
fn a_recorded_handshake_opens_no_second_session() {
    let (mut dialer, mut acceptor) = (dial(Some("this"), false), accept(Some("this"), false));
    let mut recorded = written(&mut dialer);
    recorded.iter().cloned().for_each(|frame| acceptor.handle_frame(at(1), frame));
    written(&mut acceptor).into_iter().for_each(|frame| dialer.handle_frame(at(1), frame));
    dialer.send(at(1), &message(1));
    recorded.extend(written(&mut dialer));
    let secret = identity(ACCEPTOR, Some("this"));
    let mut second = Session::accept(at(0), secret, false, [3; 16], SessionTerms::default());
    recorded.into_iter().for_each(|frame| second.handle_frame(at(1), frame));
    assert_eq!(events(&mut second), [SessionEvent::Closed(SessionError::BadMac)], "its nonce is another");
}

#[test]
fn a_replayed_reordered_or_lost_frame_ends_the_session() {
    for secret in [None, Some("this")] {
        let (mut dialer, mut acceptor) = established(secret);
        let first = sent(&mut dialer, 1);
        acceptor.handle_frame(at(2), first.clone());
        acceptor.handle_frame(at(2), first);
        let mut heard = events(&mut acceptor);
        assert_eq!(heard.pop(), Some(SessionEvent::Closed(SessionError::Replayed { got: 0, due: 1 })));
        assert_eq!(heard, [SessionEvent::Message(message(1))], "once");

        let (mut dialer, mut acceptor) = established(secret);
        sent(&mut dialer, 1);
        let second = sent(&mut dialer, 2);
        acceptor.handle_frame(at(2), second);
        assert_eq!(events(&mut acceptor), [SessionEvent::Closed(SessionError::Replayed { got: 1, due: 0 })]);
    }
}

#[test]
fn a_frame_that_was_altered_or_reflected_is_not_believed() {
    let (mut dialer, _) = established(Some("this"));
    let frame = sent(&mut dialer, 1);
    for place in 1..frame.len() {
        let (_, mut acceptor) = established(Some("this"));
        let mut altered = frame.to_vec();
        altered[place] ^= 1;
        acceptor.handle_frame(at(2), Bytes::from(altered));
        assert_eq!(events(&mut acceptor), [SessionEvent::Closed(SessionError::BadMac)], "byte {place}");
        assert!(
            matches!(written(&mut acceptor).as_slice(), [last] if matches!(Frame::decode(last.clone()), Ok(Frame::Reject(_))))
        );
    }
    let (mut dialer, _) = established(Some("this"));
    let own = sent(&mut dialer, 1);
    dialer.handle_frame(at(2), own);
    assert_eq!(closed(&mut dialer), SessionError::BadMac, "each direction has its own codes");
}

#[test]
fn an_altered_handshake_fails() {
    // A hello says whom it is for and which protocols it speaks: nobody may change that on the way.
    let count = written(&mut dial(Some("this"), false))[0].len();
    for place in 1..count {
        let (mut dialer, mut acceptor) = (dial(Some("this"), false), accept(Some("this"), false));
        let mut hello = written(&mut dialer)[0].to_vec();
        hello[place] ^= 1;
        acceptor.handle_frame(at(1), Bytes::from(hello));
        exchange(&mut dialer, &mut acceptor);
        let (one, other) = (events(&mut dialer), events(&mut acceptor));
        assert!(
            !one.iter().chain(&other).any(|event| matches!(event, SessionEvent::Established { .. })),
            "byte {place}: {one:?} {other:?}"
        );
    }
}

#[test]
fn the_wrong_node_is_noticed_on_both_sides() {
    let dialer = Session::dial(at(0), identity(DIALER, None), NodeId(9), true, [1; 16], SessionTerms::default());
    let (dialer, acceptor) = refusal(dialer, accept(None, true));
    assert!(matches!(dialer, SessionError::Rejected(_)), "{dialer:?}");
    assert_eq!(acceptor, SessionError::WrongNode { wanted: NodeId(9), here: ACCEPTOR });
    // And when the other side does not care.
    let mut dialer = dial(None, true);
    let mut impostor = Session::accept(at(0), identity(NodeId(7), None), true, [2; 16], SessionTerms::default());
    let mut hello = hello_of(&mut dialer);
    hello.expects = NodeId(7);
    impostor.handle_frame(at(1), Frame::Hello(hello).encode().expect("encodes").slice(4..));
    written(&mut impostor).into_iter().for_each(|frame| dialer.handle_frame(at(1), frame));
    assert_eq!(closed(&mut dialer), SessionError::WrongNode { wanted: ACCEPTOR, here: NodeId(7) });
}

fn hello_of(dialer: &mut Session) -> kvferry_core::wire::Hello {
    match written(dialer).pop().map(Frame::decode) {
        Some(Ok(Frame::Hello(hello))) => hello,
        other => unreachable!("a hello was due, got {other:?}"),
    }
}

#[test]
fn protocols_must_overlap() {
    for (least, most, fits) in [(1, 1, true), (0, 9, true), (2, 2, true), (PROTOCOL_MAX + 1, 9, false), (0, 0, false)] {
        let mut hello = hello_of(&mut dial(None, true));
        (hello.protocol_min, hello.protocol_max) = (least, most);
        let mut acceptor = accept(None, true);
        acceptor.handle_frame(at(1), Frame::Hello(hello).encode().expect("encodes").slice(4..));
        let heard = events(&mut acceptor);
        if fits {
            assert_eq!(heard, []);
        } else {
            let error = SessionError::Protocol { peer_min: least, peer_max: most, own_min: 1, own_max: PROTOCOL_MAX };
            assert_eq!(heard, [SessionEvent::Closed(error)]);
        }
    }
    let (mut dialer, mut acceptor) = (dial(None, true), accept(None, true));
    written(&mut dialer).into_iter().for_each(|frame| acceptor.handle_frame(at(1), frame));
    let Some(Ok(Frame::Welcome(mut welcome))) = written(&mut acceptor).pop().map(Frame::decode) else {
        panic!("a welcome was due")
    };
    welcome.protocol = PROTOCOL_MAX + 1;
    dialer.handle_frame(at(1), Frame::Welcome(welcome).encode().expect("encodes").slice(4..));
    assert!(matches!(closed(&mut dialer), SessionError::Protocol { peer_max, .. } if peer_max > PROTOCOL_MAX));
}

#[test]
fn silence_ends_a_session_and_beats_prevent_it() {
    let (mut dialer, mut acceptor) = established(None);
    let terms = SessionTerms::default();
    let mut now = at(1);
    for _ in 0..20 {
        now = now + terms.beat_every;
        for session in [&mut dialer, &mut acceptor] {
            assert!(session.poll_timeout().is_some_and(|timer| timer <= now));
            session.handle_timeout(now);
        }
        let (beats, answers) = (written(&mut dialer), written(&mut acceptor));
        assert_eq!((beats.len(), answers.len()), (1, 1));
        beats.into_iter().for_each(|frame| acceptor.handle_frame(now, frame));
        answers.into_iter().for_each(|frame| dialer.handle_frame(now, frame));
    }
    assert_eq!((events(&mut dialer), events(&mut acceptor)), (vec![], vec![]), "beats are no messages");
    dialer.handle_timeout(now + terms.silence_max);
    assert_eq!(closed(&mut dialer), SessionError::Silent(terms.silence_max));
    assert_eq!(dialer.poll_timeout(), None);
    dialer.send(now, &message(1));
    dialer.handle_timeout(now + terms.silence_max * 2);
    assert_eq!((written(&mut dialer), events(&mut dialer)), (vec![], vec![]), "nothing follows");
}

#[test]
fn a_handshake_that_does_not_end_is_given_up() {
    let terms = SessionTerms::default();
    for mut session in [dial(None, true), accept(None, true)] {
        assert_eq!(session.poll_timeout(), Some(at(0) + terms.handshake_within));
        session.handle_timeout(at(4_999));
        assert_eq!(events(&mut session), []);
        session.handle_timeout(at(5_000));
        assert_eq!(closed(&mut session), SessionError::Silent(terms.handshake_within));
    }
}

#[test]
fn frames_out_of_place_and_garbage_end_the_session_with_a_reason() {
    let body = Bytes::new();
    let sealed = Frame::Sealed { sequence: 0, mac: [0; 16], body }.encode().expect("encodes").slice(4..);
    let mut acceptor = accept(None, true);
    acceptor.handle_frame(at(1), sealed);
    assert_eq!(closed(&mut acceptor), SessionError::OutOfPlace { got: "message", due: "a hello" });
    let hello = Frame::Hello(hello_of(&mut dial(None, true))).encode().expect("encodes").slice(4..);
    let (mut dialer, _) = established(None);
    dialer.handle_frame(at(1), hello.clone());
    assert_eq!(closed(&mut dialer), SessionError::OutOfPlace { got: "hello", due: "a message" });
    let mut twice = accept(None, true);
    twice.handle_frame(at(1), hello.clone());
    twice.handle_frame(at(1), hello);
    assert_eq!(closed(&mut twice), SessionError::OutOfPlace { got: "hello", due: "a proof" });
    let mut acceptor = accept(None, true);
    acceptor.handle_frame(at(1), Bytes::from_static(b"GET / HTTP/1.1"));
    assert_eq!(closed(&mut acceptor), SessionError::Wire(WireError::UnknownKind(b'G')));
    let mut acceptor = accept(None, true);
    acceptor.handle_wire_error(at(1), WireError::Truncated { bytes: 0 });
    assert_eq!(closed(&mut acceptor), SessionError::Wire(WireError::Truncated { bytes: 0 }));
    let mut acceptor = accept(None, true);
    acceptor.handle_link_closed("reset");
    acceptor.handle_link_closed("again");
    assert_eq!(events(&mut acceptor), [SessionEvent::Closed(SessionError::LinkClosed("reset".to_owned()))]);
}

#[test]
fn a_message_that_cannot_cross_is_told_from_a_broken_link() {
    let (mut dialer, mut acceptor) = established(None);
    let most = kvferry_core::limits::FRAME_BYTES_MAX;
    let handovers = vec![kvferry_core::HandoverId(u64::MAX); most / 10 + 1];
    dialer.send(at(1), &Message::OutcomesKnown { handovers });
    let SessionError::CannotCross(WireError::Oversized { bytes, limit }) = closed(&mut dialer) else {
        panic!("it is too long");
    };
    assert!(bytes > most as u64 && limit == most);
    let unknown = Frame::Sealed { sequence: 0, mac: [0; 16], body: Bytes::from_static(&[0x7f]) };
    acceptor.handle_frame(at(1), unknown.encode().expect("encodes").slice(4..));
    let error = closed(&mut acceptor);
    assert!(matches!(error, SessionError::CannotCross(WireError::Malformed { .. })), "{error:?}");
}

#[test]
fn a_secret_stays_out_of_logs() {
    let text = format!("{:?} {:?}", identity(DIALER, Some("hunter2")), dial(Some("hunter2"), false));
    let bytes = format!("{:?}", "hunter2".as_bytes());
    assert!(!text.contains("hunter2") && !text.contains(&bytes), "{text}");
}

proptest! {
    #[test]
    fn random_frames_never_panic(
        frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..80), 1..20),
        stands in any::<bool>(),
        secret in prop::option::of(Just("this")),
    ) {
        let mut session = if stands { established(secret).1 } else { accept(secret, true) };
        for frame in frames {
            session.handle_frame(at(3), Bytes::from(frame));
        }
        written(&mut session);
        let heard = events(&mut session);
        let ends = heard.iter().filter(|event| matches!(event, SessionEvent::Closed(_))).count();
        prop_assert!(ends <= 1, "{:?}", heard);
        let opened = matches!(heard.last(), Some(SessionEvent::Established { .. }));
        prop_assert!(!opened, "{:?}", heard);
    }
}
