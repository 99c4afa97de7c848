//! What two living incarnations have to say to each other, over as many links as it takes.

use std::collections::VecDeque;

use super::Message;

/// Messages that may wait for the peer's acknowledgement.
const UNACKNOWLEDGED_MAX: usize = 65_536;
/// Messages after which the peer is told at once how far this side has heard; fewer are told with time.
const UNTOLD_MAX: u64 = 32;

const HEARS_TOO_SLOWLY: &str = "the peer hears too slowly";

/// The first protocol with [`Message::Resume`]; with an older peer a conversation ends with its link.
pub const RESUMING_PROTOCOL: u16 = 2;

/// The state machine that carries messages from one incarnation of a node to one of another: each exactly once, in order, whatever happens
/// to the links in between.
///
/// After [`Conversation::handle_link`] write what it returns, then give every message of the link to [`Conversation::handle_message`] and
/// write what [`Conversation::next_message`] and [`Conversation::acknowledgement`] yield. A link numbers its frames, so the numbers of messages
/// need not travel: each side begins where the other's [`Message::Resume`] says that it stopped hearing.
///
/// A side that has given the conversation up starts another under another name. The peer notices by that name and gives up, too: nobody goes on
/// in the belief that something arrived which did not.
#[derive(Debug)]
pub struct Conversation {
    /// This side's name of what it says; never 0, and another one whenever it starts over.
    name: u64,
    /// The peer's name of what it says, once known.
    peer: Option<u64>,
    /// Said, and not known to be heard; the first has number `base`.
    unacknowledged: VecDeque<Message>,
    base: u64,
    /// Number of the next message to write on the present link.
    next: u64,
    /// Number of the next message to hear.
    heard: u64,
    /// What the peer was last told of that.
    told: u64,
    link: Link,
    /// Too much was said: nothing of it is to be believed.
    overflowed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Down,
    /// It stands; the peer has yet to say where to go on.
    Resuming,
    Open,
    /// It stands, and its end is the end of the conversation.
    Plain,
}

/// What became of a message of the link.
#[derive(Clone, Debug, PartialEq)]
pub enum Heard {
    /// It is for this node.
    Message(Message),
    /// It was about the conversation itself.
    Nothing,
    /// The peer has started over, or was never part of this: the conversation is over. Hang up; the next link belongs to a new one.
    StartedOver(&'static str),
}

/// More was said than the peer has heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{UNACKNOWLEDGED_MAX} messages wait to be acknowledged; the peer hears too slowly")]
pub struct Unheard;

impl Conversation {
    /// Nothing said, no link. `name` must not be 0 and must differ from earlier ones with the same peer.
    pub fn new(name: u64) -> Self {
        Conversation {
            name,
            peer: None,
            unacknowledged: VecDeque::new(),
            base: 0,
            next: 0,
            heard: 0,
            told: 0,
            link: Link::Down,
            overflowed: false,
        }
    }

    /// Says something, now or over a later link. An error ends the conversation.
    pub fn say(&mut self, message: Message) -> Result<(), Unheard> {
        self.overflowed |= self.unacknowledged.len() >= UNACKNOWLEDGED_MAX;
        if self.overflowed {
            return Err(Unheard);
        }
        self.unacknowledged.push_back(message);
        Ok(())
    }

    /// A link stands, on which `protocol` is spoken. What is returned must be written first.
    pub fn handle_link(&mut self, protocol: u16) -> Option<Message> {
        if protocol < RESUMING_PROTOCOL {
            self.link = Link::Plain;
            return None;
        }
        self.link = Link::Resuming;
        self.told = self.heard;
        Some(Message::Resume { name: self.name, peer: self.peer.unwrap_or(0), heard: self.heard })
    }

    /// The link is gone.
    pub fn handle_link_down(&mut self) {
        self.link = Link::Down;
    }

    /// A message came on the link.
    pub fn handle_message(&mut self, message: Message) -> Heard {
        match message {
            _ if self.overflowed => Heard::StartedOver(HEARS_TOO_SLOWLY),
            Message::Resume { name, peer, heard } if self.link == Link::Resuming => self.resume(name, peer, heard),
            Message::Resume { .. } => Heard::StartedOver("the peer resumes in the middle of a link"),
            Message::Heard { messages } => {
                if self.acknowledge(messages) {
                    Heard::Nothing
                } else {
                    Heard::StartedOver("the peer acknowledges what was never said")
                }
            }
            _ if matches!(self.link, Link::Down | Link::Resuming) => {
                Heard::StartedOver("the peer speaks before it has said where it goes on")
            }
            message => {
                self.heard += 1;
                Heard::Message(message)
            }
        }
    }

    /// The next message to write on the link.
    pub fn next_message(&mut self) -> Option<&Message> {
        match self.link {
            Link::Down | Link::Resuming => None,
            Link::Plain => {
                // Nobody acknowledges: what was written before is gone.
                let written = self.next - self.base;
                self.unacknowledged.drain(..(written as usize).min(self.unacknowledged.len()));
                self.base = self.next;
                let message = self.unacknowledged.front()?;
                self.next += 1;
                Some(message)
            }
            Link::Open => {
                let message = self.unacknowledged.get((self.next - self.base) as usize)?;
                self.next += 1;
                Some(message)
            }
        }
    }

    /// What to tell the peer of how far it was heard: when much is untold, or anything and it is `due`.
    pub fn acknowledgement(&mut self, due: bool) -> Option<Message> {
        let untold = self.heard - self.told;
        if self.link != Link::Open || untold == 0 || !(due || untold >= UNTOLD_MAX) {
            return None;
        }
        self.told = self.heard;
        Some(Message::Heard { messages: self.heard })
    }

    /// Why it is over: too much was said that the peer has not heard. Hang up; the next link belongs to a new one.
    pub fn over(&self) -> Option<&'static str> {
        self.overflowed.then_some(HEARS_TOO_SLOWLY)
    }

    /// Whether the link stands and the peer has yet to say where it goes on.
    pub fn is_resuming(&self) -> bool {
        self.link == Link::Resuming
    }

    /// Messages that the peer is not known to have heard.
    pub fn unacknowledged(&self) -> usize {
        self.unacknowledged.len()
    }

    fn resume(&mut self, name: u64, peer: u64, heard: u64) -> Heard {
        match self.peer {
            // A first link, or one on which the peer never said anything: it can only have heard nothing.
            None if name != 0 && heard == 0 && (peer == 0 || peer == self.name) => self.peer = Some(name),
            None => return Heard::StartedOver("the peer goes on with something that is over here"),
            // On a first link the peer may not have learnt this side's name; then it has heard nothing.
            Some(known) if known == name && (peer == self.name || (peer == 0 && heard == 0 && self.base == 0)) => {}
            Some(_) => return Heard::StartedOver("the peer has started over"),
        }
        if !self.acknowledge(heard) {
            return Heard::StartedOver("the peer lacks messages that are gone here");
        }
        self.next = heard;
        self.link = Link::Open;
        Heard::Nothing
    }

    /// Forgets what was heard. Says whether that can be true.
    fn acknowledge(&mut self, heard: u64) -> bool {
        if heard < self.base || heard > self.base + self.unacknowledged.len() as u64 {
            return false;
        }
        self.unacknowledged.drain(..(heard - self.base) as usize);
        self.base = heard;
        self.next = self.next.max(heard);
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::HandoverId;

    fn message(number: u64) -> Message {
        Message::Started { handover: HandoverId(number) }
    }

    /// Two sides and the link between them.
    struct Pair {
        sides: [Conversation; 2],
        /// What is on its way to each side.
        wire: [VecDeque<Message>; 2],
        heard: [Vec<u64>; 2],
        over: bool,
    }

    impl Pair {
        fn new() -> Self {
            Pair {
                sides: [Conversation::new(11), Conversation::new(22)],
                wire: Default::default(),
                heard: Default::default(),
                over: false,
            }
        }

        fn connect(&mut self) {
            self.wire = Default::default();
            for side in 0..2 {
                self.sides[side].handle_link_down();
                let first = self.sides[side].handle_link(RESUMING_PROTOCOL);
                self.wire[1 - side].extend(first);
            }
        }

        fn cut(&mut self) {
            self.wire = Default::default();
            self.sides.iter_mut().for_each(Conversation::handle_link_down);
        }

        /// One message arrives at a side, which then writes what it has.
        fn step(&mut self, side: usize) -> bool {
            let Some(arrived) = self.wire[side].pop_front() else { return false };
            match self.sides[side].handle_message(arrived) {
                Heard::Message(Message::Started { handover }) => self.heard[side].push(handover.0),
                Heard::Message(_) | Heard::Nothing => {}
                Heard::StartedOver(_) => self.over = true,
            }
            self.write(side);
            true
        }

        fn write(&mut self, side: usize) {
            while let Some(message) = self.sides[side].next_message() {
                self.wire[1 - side].push_back(message.clone());
            }
            let due = self.sides[side].acknowledgement(false);
            self.wire[1 - side].extend(due);
        }

        fn settle(&mut self) {
            while self.step(0) || self.step(1) {}
        }
    }

    #[test]
    fn what_a_broken_link_lost_is_said_again() {
        let mut pair = Pair::new();
        pair.sides[0].say(message(1)).unwrap();
        pair.connect();
        pair.settle();
        pair.sides[0].say(message(2)).unwrap();
        pair.write(0);
        pair.cut();
        pair.sides[0].say(message(3)).unwrap();
        pair.sides[1].say(message(4)).unwrap();
        pair.connect();
        pair.settle();
        assert_eq!(pair.heard, [vec![4], vec![1, 2, 3]]);
        assert!(!pair.over);
    }

    #[test]
    fn a_side_that_gave_up_is_noticed() {
        let mut pair = Pair::new();
        pair.sides[1].say(message(1)).unwrap();
        pair.connect();
        pair.settle();
        pair.cut();
        pair.sides[1] = Conversation::new(23);
        pair.connect();
        pair.settle();
        assert!(pair.over);
        assert_eq!(pair.heard, [vec![1], vec![]]);
    }

    #[test]
    fn what_was_heard_is_let_go() {
        let mut pair = Pair::new();
        pair.connect();
        pair.settle();
        for number in 0..UNTOLD_MAX {
            pair.sides[0].say(message(number)).unwrap();
            pair.write(0);
        }
        pair.settle();
        assert_eq!(pair.sides[0].unacknowledged(), 0);
        pair.sides[0].say(message(99)).unwrap();
        pair.write(0);
        pair.settle();
        assert_eq!(pair.sides[0].unacknowledged(), 1);
        assert_eq!(pair.sides[1].acknowledgement(false), None);
        assert_eq!(pair.sides[1].acknowledgement(true), Some(Message::Heard { messages: UNTOLD_MAX + 1 }));
    }

    #[test]
    fn nonsense_ends_it() {
        let mut one = Conversation::new(1);
        one.handle_link(RESUMING_PROTOCOL);
        assert!(matches!(one.handle_message(message(1)), Heard::StartedOver(_)));
        assert!(one.is_resuming());
        assert!(matches!(one.handle_message(Message::Resume { name: 5, peer: 9, heard: 0 }), Heard::StartedOver(_)));
        assert!(matches!(one.handle_message(Message::Resume { name: 5, peer: 1, heard: 3 }), Heard::StartedOver(_)));
        assert_eq!(one.handle_message(Message::Resume { name: 5, peer: 0, heard: 0 }), Heard::Nothing);
        assert!(matches!(one.handle_message(Message::Heard { messages: 1 }), Heard::StartedOver(_)));
    }

    #[test]
    fn it_holds_a_bounded_number_of_messages() {
        let mut one = Conversation::new(1);
        for number in 0..UNACKNOWLEDGED_MAX as u64 {
            one.say(message(number)).unwrap();
        }
        assert_eq!(one.over(), None);
        assert_eq!(one.say(message(0)), Err(Unheard));
        assert!(one.over().is_some(), "also when the peer says nothing");
        one.handle_link(RESUMING_PROTOCOL);
        assert!(matches!(one.handle_message(Message::Resume { name: 2, peer: 0, heard: 0 }), Heard::StartedOver(_)));
    }

    #[test]
    fn an_old_peer_hears_everything_once_and_resumes_nothing() {
        let mut one = Conversation::new(1);
        one.say(message(1)).unwrap();
        assert_eq!(one.handle_link(1), None);
        assert_eq!(one.next_message(), Some(&message(1)));
        assert_eq!(one.next_message(), None);
        one.say(message(2)).unwrap();
        assert_eq!(one.next_message(), Some(&message(2)));
        assert_eq!(one.next_message(), None);
        assert_eq!(one.unacknowledged(), 0);
        assert_eq!(one.handle_message(message(3)), Heard::Message(message(3)));
    }

    proptest! {
        /// The model: a list per direction. Whatever breaks, what was heard is a prefix of what was said, and all of it in the end.
        #[test]
        fn everything_arrives_once_and_in_order(actions in prop::collection::vec(0..7_u8, 1..400)) {
            let mut pair = Pair::new();
            let mut said = [Vec::new(), Vec::new()];
            for (number, action) in actions.into_iter().enumerate() {
                match action {
                    side @ 0..=1 => {
                        let side = usize::from(side);
                        pair.sides[side].say(message(number as u64)).unwrap();
                        said[side].push(number as u64);
                        pair.write(side);
                    }
                    side @ 2..=3 => drop(pair.step(usize::from(side - 2))),
                    4 => pair.connect(),
                    5 => pair.cut(),
                    _ => {
                        // A part of what is under way is lost with the link.
                        pair.wire[0].truncate(pair.wire[0].len() / 2);
                        pair.wire[1].truncate(1);
                        pair.step(0);
                        pair.step(1);
                        pair.cut();
                    }
                }
                prop_assert!(said[0].starts_with(&pair.heard[1]) && said[1].starts_with(&pair.heard[0]));
            }
            pair.connect();
            pair.settle();
            prop_assert!(!pair.over);
            let [first, second] = said;
            prop_assert_eq!(&pair.heard, &[second, first]);
        }
    }
}
