//! A session over a link that somebody tampers with: what is heard is what was said, from the beginning, or the session is over.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use kvferry_core::protocol::{Identity, Message, Protocols, Session, SessionEvent, SessionTerms};
use kvferry_core::{Epoch, HandoverId, NodeId};
use proptest::prelude::*;

use super::kit::millis;

#[derive(Clone, Copy, Debug)]
enum Operation {
    Say(usize),
    Deliver(usize),
    /// Time passes, in milliseconds.
    Wait(u64),
    /// The next frame to a side is lost, comes twice, after the one behind it, or with another bit.
    Lose(usize),
    Repeat(usize),
    Swap(usize),
    Flip(usize, usize),
    Cut,
}

fn operation() -> impl Strategy<Value = Operation> {
    let side = 0..2_usize;
    prop_oneof![
        40 => side.clone().prop_map(Operation::Say),
        80 => side.clone().prop_map(Operation::Deliver),
        10 => (0..1_500_u64).prop_map(Operation::Wait),
        1 => side.clone().prop_map(Operation::Lose),
        1 => side.clone().prop_map(Operation::Repeat),
        1 => side.clone().prop_map(Operation::Swap),
        1 => (side, 0..2_000_usize).prop_map(|(side, bit)| Operation::Flip(side, bit)),
        1 => Just(Operation::Cut),
    ]
}

struct Link {
    sides: [Session; 2],
    wire: [VecDeque<Bytes>; 2],
    heard: [Vec<u64>; 2],
    closed: [bool; 2],
    stands: [bool; 2],
}

impl Link {
    fn new() -> Self {
        let identity = |node| Identity {
            node: NodeId(node),
            epoch: Epoch(1),
            secret: Some(Arc::from(&b"a shared secret"[..])),
            protocols: Protocols::default(),
        };
        let terms = SessionTerms::default();
        let dialer = Session::dial(millis(0), identity(1), NodeId(2), false, [3; 16], terms);
        let acceptor = Session::accept(millis(0), identity(2), false, [4; 16], terms);
        let mut link = Link {
            sides: [dialer, acceptor],
            wire: Default::default(),
            heard: Default::default(),
            closed: [false; 2],
            stands: [false; 2],
        };
        link.drain();
        link
    }

    fn drain(&mut self) {
        for side in 0..2 {
            while let Some(frame) = self.sides[side].poll_transmit() {
                self.wire[1 - side].push_back(frame);
            }
            while let Some(event) = self.sides[side].poll_event() {
                assert!(!self.closed[side], "nothing follows the end");
                match event {
                    SessionEvent::Established { node, epoch, .. } => {
                        assert_eq!((node, epoch), (NodeId(2 - side as u64), Epoch(1)));
                        assert!(!std::mem::replace(&mut self.stands[side], true), "once");
                    }
                    SessionEvent::Message(Message::Started { handover }) => {
                        assert!(self.stands[side], "nobody is heard before it is believed");
                        self.heard[side].push(handover.0);
                    }
                    SessionEvent::Message(other) => panic!("{other:?} was never said"),
                    SessionEvent::Closed(_) => self.closed[side] = true,
                }
            }
        }
    }
}

proptest! {
    #[test]
    fn what_is_heard_was_said(operations in prop::collection::vec(operation(), 1..200)) {
        let mut link = Link::new();
        let mut said = [Vec::new(), Vec::new()];
        let (mut now, mut tampered) = (0, false);
        for (number, operation) in operations.into_iter().enumerate() {
            match operation {
                Operation::Say(side) => {
                    link.sides[side].send(millis(now), &Message::Started { handover: HandoverId(number as u64) });
                    if !link.closed[side] {
                        said[side].push(number as u64);
                    }
                }
                Operation::Deliver(side) => {
                    if let Some(frame) = link.wire[side].pop_front() {
                        link.sides[side].handle_frame(millis(now), frame.slice(4..));
                    }
                }
                Operation::Wait(milliseconds) => {
                    now += milliseconds;
                    // Silence of this length is what a living link does not have.
                    for side in 0..2 {
                        link.sides[side].handle_timeout(millis(now));
                        let due = link.sides[side].poll_timeout();
                        prop_assert!(due.is_none_or(|due| due > millis(now)), "a wait that is not over");
                    }
                }
                Operation::Lose(side) => tampered |= link.wire[side].pop_front().is_some(),
                Operation::Repeat(side) => {
                    if let Some(frame) = link.wire[side].front().cloned() {
                        link.wire[side].push_front(frame);
                        tampered = true;
                    }
                }
                Operation::Swap(side) => {
                    if link.wire[side].len() > 1 {
                        link.wire[side].swap(0, 1);
                        tampered = true;
                    }
                }
                Operation::Flip(side, bit) => {
                    if let Some(frame) = link.wire[side].pop_front() {
                        let mut frame = frame.to_vec();
                        // Behind the length, which the framing keeps.
                        let place = 4 + bit / 8 % (frame.len() - 4);
                        frame[place] ^= 1 << (bit % 8);
                        link.wire[side].push_front(Bytes::from(frame));
                        tampered = true;
                    }
                }
                Operation::Cut => {
                    link.sides.iter_mut().for_each(|side| side.handle_link_closed("cut"));
                    tampered = true;
                }
            }
            link.drain();
            for side in 0..2 {
                prop_assert!(said[1 - side].starts_with(&link.heard[side]), "{:?} {:?}", said, link.heard);
                prop_assert_eq!(link.sides[side].poll_timeout().is_none(), link.closed[side], "every wait has an end");
            }
        }
        let silent = link.closed != [false; 2];
        if !tampered && !silent {
            while link.wire.iter().any(|wire| !wire.is_empty()) {
                for side in 0..2 {
                    if let Some(frame) = link.wire[side].pop_front() {
                        link.sides[side].handle_frame(millis(now), frame.slice(4..));
                    }
                }
                link.drain();
            }
            prop_assert_eq!(link.closed, [false; 2]);
            let [first, second] = said;
            prop_assert_eq!(link.heard, [second, first], "a link that nobody touches carries everything");
        }
    }
}
