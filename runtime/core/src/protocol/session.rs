//! One control link between two nodes: handshake, authentication, order, liveness.

use core::time::Duration;
use std::collections::VecDeque;

use bytes::Bytes;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use thiserror::Error;

use super::{Identity, Message};
use crate::wire::{self, Frame, Hello, MAC_BYTES, Welcome, WireError};
use crate::{Epoch, Moment, NodeId};

/// Messages that may wait for a session to stand.
const WAITING_MAX: usize = 65_536;

/// How a session waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionTerms {
    /// From the link's start to an established session.
    pub handshake_within: Duration,
    /// A beat is sent after so much silence of our own.
    pub beat_every: Duration,
    /// The link counts as broken after so much silence of the peer.
    pub silence_max: Duration,
    /// The peer counts as gone when no other link stands within so long after one broke; what was said meanwhile is kept.
    pub resume_within: Duration,
}

impl Default for SessionTerms {
    fn default() -> Self {
        SessionTerms {
            handshake_within: Duration::from_secs(5),
            beat_every: Duration::from_secs(1),
            silence_max: Duration::from_secs(6),
            resume_within: Duration::from_secs(1),
        }
    }
}

/// Why a session ended.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The bytes make no sense.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// A message cannot cross: too long, or one that the receiver does not know. Over the next link it could not either.
    #[error("a message cannot cross: {0}")]
    CannotCross(WireError),
    /// A frame came where another was due.
    #[error("a {got} came where {due} was due")]
    OutOfPlace {
        /// What came.
        got: &'static str,
        /// What was due.
        due: &'static str,
    },
    /// No common protocol.
    #[error(
        "the peer speaks protocol {peer_min} to {peer_max}, this node {own_min} to {own_max}; upgrade the older one"
    )]
    Protocol {
        /// Theirs.
        peer_min: u16,
        /// Theirs.
        peer_max: u16,
        /// Ours.
        own_min: u16,
        /// Ours.
        own_max: u16,
    },
    /// The dialer wanted somebody else.
    #[error("the peer looks for {wanted}, this is {here}; the address is stale")]
    WrongNode {
        /// Whom it looks for.
        wanted: NodeId,
        /// Who answered.
        here: NodeId,
    },
    /// One side has a secret, the other has none, or the link leaves the host without one.
    #[error("{0}")]
    SecretRequired(&'static str),
    /// The peer does not hold our secret, or a frame was changed on its way.
    #[error("authentication failed: the peer does not hold the same secret, or the frame was altered")]
    BadMac,
    /// A frame came twice, late, or one is missing.
    #[error("frame {got} came, {due} was due: replayed, reordered or lost")]
    Replayed {
        /// Its number.
        got: u64,
        /// The number that was due.
        due: u64,
    },
    /// The peer said no.
    #[error("the peer refused: {0}")]
    Rejected(String),
    /// Nothing came for too long.
    #[error("nothing was heard for {0:?}")]
    Silent(Duration),
    /// More messages waited for the session than are kept.
    #[error("{WAITING_MAX} messages wait for the session")]
    Backlog,
    /// The link closed.
    #[error("the link closed: {0}")]
    LinkClosed(String),
}

/// What a session reports.
#[derive(Clone, Debug, PartialEq)]
pub enum SessionEvent {
    /// Both sides know and believe each other.
    Established {
        /// The peer.
        node: NodeId,
        /// Its incarnation.
        epoch: Epoch,
        /// What both speak.
        protocol: u16,
    },
    /// The peer said something.
    Message(Message),
    /// It is over; nothing follows.
    Closed(SessionError),
}

/// The state machine of one link.
///
/// Feed every whole frame to [`Session::handle_frame`]; write what [`Session::poll_transmit`] gives; close the link after
/// [`SessionEvent::Closed`], once what is left to transmit is written.
#[derive(Debug)]
pub struct Session {
    identity: Identity,
    terms: SessionTerms,
    nonce: [u8; 16],
    dialer: bool,
    /// The link never leaves this host.
    loopback: bool,
    state: State,
    key: Option<[u8; 32]>,
    sent: u64,
    received: u64,
    began: Moment,
    heard: Moment,
    spoke: Moment,
    waiting: VecDeque<Message>,
    transmit: VecDeque<Bytes>,
    events: VecDeque<SessionEvent>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    AwaitHello,
    AwaitWelcome { expects: NodeId, hello: Hello },
    AwaitProof { hello: Hello, welcome: Welcome },
    Established { node: NodeId, epoch: Epoch, protocol: u16 },
    Closed,
}

impl Session {
    /// The dialing side. `nonce` must be fresh and unpredictable.
    pub fn dial(
        now: Moment,
        identity: Identity,
        expects: NodeId,
        loopback: bool,
        nonce: [u8; 16],
        terms: SessionTerms,
    ) -> Self {
        let hello = Hello {
            protocol_min: identity.protocols.min,
            protocol_max: identity.protocols.max,
            capabilities: 0,
            node: identity.node,
            epoch: identity.epoch,
            expects,
            nonce,
            secured: identity.secret.is_some(),
        };
        let mut session = Session::new(now, identity, loopback, nonce, terms, true, State::AwaitHello);
        if session.identity.secret.is_none() && !loopback {
            session.close(SessionError::SecretRequired(OFF_LOOPBACK));
        } else {
            session.write(now, &Frame::Hello(hello.clone()));
            session.state = State::AwaitWelcome { expects, hello };
        }
        session
    }

    /// The accepting side. `nonce` must be fresh and unpredictable.
    pub fn accept(now: Moment, identity: Identity, loopback: bool, nonce: [u8; 16], terms: SessionTerms) -> Self {
        Session::new(now, identity, loopback, nonce, terms, false, State::AwaitHello)
    }

    fn new(
        now: Moment,
        identity: Identity,
        loopback: bool,
        nonce: [u8; 16],
        terms: SessionTerms,
        dialer: bool,
        state: State,
    ) -> Self {
        Session {
            identity,
            terms,
            nonce,
            dialer,
            loopback,
            state,
            key: None,
            sent: 0,
            received: 0,
            began: now,
            heard: now,
            spoke: now,
            waiting: VecDeque::new(),
            transmit: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// A whole frame came, without its length.
    pub fn handle_frame(&mut self, now: Moment, frame: Bytes) {
        if self.state == State::Closed {
            return;
        }
        self.heard = now;
        let outcome = Frame::decode(frame).map_err(SessionError::from).and_then(|frame| self.frame(now, frame));
        if let Err(error) = outcome {
            self.reject(now, error);
        }
    }

    /// The bytes of the link are not frames.
    pub fn handle_wire_error(&mut self, now: Moment, error: WireError) {
        self.reject(now, SessionError::Wire(error));
    }

    /// The link closed by itself.
    pub fn handle_link_closed(&mut self, reason: &str) {
        self.close(SessionError::LinkClosed(reason.to_owned()));
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Moment) {
        match self.state {
            State::Closed => {}
            State::Established { .. } => {
                if now.since(self.heard) >= self.terms.silence_max {
                    self.close(SessionError::Silent(now.since(self.heard)));
                } else if now.since(self.spoke) >= self.terms.beat_every {
                    self.seal(now, Bytes::new());
                }
            }
            _ if now.since(self.began) >= self.terms.handshake_within => {
                self.close(SessionError::Silent(now.since(self.began)))
            }
            _ => {}
        }
    }

    /// When [`Session::handle_timeout`] is due.
    pub fn poll_timeout(&self) -> Option<Moment> {
        match self.state {
            State::Closed => None,
            State::Established { .. } => {
                Some((self.heard + self.terms.silence_max).min(self.spoke + self.terms.beat_every))
            }
            _ => Some(self.began + self.terms.handshake_within),
        }
    }

    /// Sends a message; it waits until the session stands.
    pub fn send(&mut self, now: Moment, message: &Message) {
        match self.state {
            State::Closed => {}
            State::Established { protocol, .. } => self.encode(now, message, protocol),
            _ if self.waiting.len() >= WAITING_MAX => self.close(SessionError::Backlog),
            _ => self.waiting.push_back(message.clone()),
        }
    }

    /// The next frame to write, its length in front.
    pub fn poll_transmit(&mut self) -> Option<Bytes> {
        self.transmit.pop_front()
    }

    /// The next thing that happened.
    pub fn poll_event(&mut self) -> Option<SessionEvent> {
        self.events.pop_front()
    }

    fn frame(&mut self, now: Moment, frame: Frame) -> Result<(), SessionError> {
        match (self.state.clone(), frame) {
            (_, Frame::Reject(reason)) => {
                self.close(SessionError::Rejected(reason));
                Ok(())
            }
            (State::AwaitHello, Frame::Hello(hello)) => self.hello(now, hello),
            (State::AwaitWelcome { expects, hello }, Frame::Welcome(welcome)) => {
                self.welcome(now, expects, &hello, &welcome)
            }
            (State::AwaitProof { hello, welcome }, Frame::Proof(mac)) => {
                self.check(&proof_text("proof", &hello, &welcome), &mac)?;
                self.establish(now, hello.node, hello.epoch, &hello, &welcome);
                Ok(())
            }
            (State::Established { protocol, .. }, Frame::Sealed { sequence, mac, body }) => {
                self.open(sequence, &mac, &body, protocol)
            }
            (state, frame) => Err(SessionError::OutOfPlace { got: name_of(&frame), due: due_in(&state) }),
        }
    }

    fn hello(&mut self, now: Moment, hello: Hello) -> Result<(), SessionError> {
        let own = self.identity.protocols;
        let protocol = hello.protocol_max.min(own.max);
        if protocol < hello.protocol_min || protocol < own.min {
            return Err(SessionError::Protocol {
                peer_min: hello.protocol_min,
                peer_max: hello.protocol_max,
                own_min: own.min,
                own_max: own.max,
            });
        }
        if hello.expects != self.identity.node {
            return Err(SessionError::WrongNode { wanted: hello.expects, here: self.identity.node });
        }
        match (&self.identity.secret, hello.secured) {
            (None, false) if !self.loopback => return Err(SessionError::SecretRequired(OFF_LOOPBACK)),
            (None, true) => {
                return Err(SessionError::SecretRequired(
                    "the dialer holds a secret and this node does not; give it the same",
                ));
            }
            (Some(_), false) => {
                return Err(SessionError::SecretRequired(
                    "this node requires the shared secret; give it to the dialer",
                ));
            }
            _ => {}
        }
        let mut welcome = Welcome {
            protocol,
            capabilities: 0,
            node: self.identity.node,
            epoch: self.identity.epoch,
            nonce: self.nonce,
            mac: [0; MAC_BYTES],
        };
        welcome.mac = self.mac(&proof_text("welcome", &hello, &welcome));
        self.write(now, &Frame::Welcome(welcome.clone()));
        self.state = State::AwaitProof { hello, welcome };
        Ok(())
    }

    fn welcome(&mut self, now: Moment, expects: NodeId, hello: &Hello, welcome: &Welcome) -> Result<(), SessionError> {
        if welcome.node != expects {
            return Err(SessionError::WrongNode { wanted: expects, here: welcome.node });
        }
        let own = self.identity.protocols;
        if !(own.min..=own.max).contains(&welcome.protocol) {
            return Err(SessionError::Protocol {
                peer_min: welcome.protocol,
                peer_max: welcome.protocol,
                own_min: own.min,
                own_max: own.max,
            });
        }
        self.check(&proof_text("welcome", hello, welcome), &welcome.mac)?;
        let proof = self.mac(&proof_text("proof", hello, welcome));
        self.write(now, &Frame::Proof(proof));
        self.establish(now, welcome.node, welcome.epoch, hello, welcome);
        Ok(())
    }

    fn establish(&mut self, now: Moment, node: NodeId, epoch: Epoch, hello: &Hello, welcome: &Welcome) {
        self.key = self.identity.secret.as_ref().map(|secret| hmac(secret, &proof_text("session", hello, welcome)));
        let protocol = welcome.protocol;
        self.state = State::Established { node, epoch, protocol };
        self.events.push_back(SessionEvent::Established { node, epoch, protocol });
        while let Some(message) = self.waiting.pop_front() {
            self.encode(now, &message, protocol);
        }
    }

    fn open(&mut self, sequence: u64, mac: &[u8; MAC_BYTES], body: &Bytes, protocol: u16) -> Result<(), SessionError> {
        if let Some(key) = &self.key
            && !equal(&short(&hmac(key, &seal_text(!self.dialer, sequence, body))), mac)
        {
            return Err(SessionError::BadMac);
        }
        if sequence != self.received {
            return Err(SessionError::Replayed { got: sequence, due: self.received });
        }
        self.received += 1;
        if !body.is_empty() {
            let message = wire::decode_from(body, protocol).map_err(SessionError::CannotCross)?;
            self.events.push_back(SessionEvent::Message(message));
        }
        Ok(())
    }

    fn encode(&mut self, now: Moment, message: &Message, protocol: u16) {
        match wire::encode_for(message, protocol) {
            Ok(body) => self.seal(now, body),
            Err(error) => self.reject(now, SessionError::CannotCross(error)),
        }
    }

    fn seal(&mut self, now: Moment, body: Bytes) {
        let sequence = self.sent;
        self.sent += 1;
        let mac =
            self.key.as_ref().map_or([0; MAC_BYTES], |key| short(&hmac(key, &seal_text(self.dialer, sequence, &body))));
        self.write(now, &Frame::Sealed { sequence, mac, body });
    }

    fn write(&mut self, now: Moment, frame: &Frame) {
        self.spoke = now;
        match frame.encode() {
            Ok(bytes) => self.transmit.push_back(bytes),
            // No other frame can be too long.
            Err(error) => self.reject(now, SessionError::CannotCross(error)),
        }
    }

    fn reject(&mut self, now: Moment, error: SessionError) {
        if self.state != State::Closed {
            self.write(now, &Frame::Reject(error.to_string()));
            self.close(error);
        }
    }

    fn close(&mut self, error: SessionError) {
        if self.state != State::Closed {
            self.state = State::Closed;
            self.waiting.clear();
            self.events.push_back(SessionEvent::Closed(error));
        }
    }

    fn mac(&self, text: &[u8]) -> [u8; MAC_BYTES] {
        self.identity.secret.as_ref().map_or([0; MAC_BYTES], |secret| short(&hmac(secret, text)))
    }

    fn check(&self, text: &[u8], mac: &[u8; MAC_BYTES]) -> Result<(), SessionError> {
        if self.identity.secret.is_none() || equal(&self.mac(text), mac) { Ok(()) } else { Err(SessionError::BadMac) }
    }
}

const OFF_LOOPBACK: &str = "a link that leaves this host needs a shared secret; set one on every node";

/// What both sides prove that they agree on: every field of the handshake, under a label of its own.
fn proof_text(label: &str, hello: &Hello, welcome: &Welcome) -> Vec<u8> {
    let mut text = Vec::with_capacity(128);
    text.extend_from_slice(b"kvferry/1/");
    text.extend_from_slice(label.as_bytes());
    text.push(0);
    for number in [hello.protocol_min, hello.protocol_max, welcome.protocol] {
        text.extend_from_slice(&number.to_le_bytes());
    }
    let long = [
        hello.capabilities,
        hello.node.0,
        hello.epoch.0,
        hello.expects.0,
        welcome.capabilities,
        welcome.node.0,
        welcome.epoch.0,
    ];
    for number in long {
        text.extend_from_slice(&number.to_le_bytes());
    }
    text.extend_from_slice(&hello.nonce);
    text.extend_from_slice(&welcome.nonce);
    text
}

fn seal_text(from_dialer: bool, sequence: u64, body: &[u8]) -> Vec<u8> {
    let mut text = Vec::with_capacity(9 + body.len());
    text.push(u8::from(from_dialer));
    text.extend_from_slice(&sequence.to_le_bytes());
    text.extend_from_slice(body);
    text
}

fn hmac(key: &[u8], text: &[u8]) -> [u8; 32] {
    // HMAC takes keys of any length; the error of `new_from_slice` cannot happen, and an unusable key then authenticates nothing.
    match Hmac::<Sha256>::new_from_slice(key) {
        Ok(mut mac) => {
            mac.update(text);
            mac.finalize().into_bytes().into()
        }
        Err(_) => [0xff; 32],
    }
}

fn short(mac: &[u8; 32]) -> [u8; MAC_BYTES] {
    let mut out = [0; MAC_BYTES];
    for (out, byte) in out.iter_mut().zip(mac) {
        *out = *byte;
    }
    out
}

/// In constant time.
fn equal(one: &[u8; MAC_BYTES], other: &[u8; MAC_BYTES]) -> bool {
    one.iter().zip(other).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

fn name_of(frame: &Frame) -> &'static str {
    match frame {
        Frame::Hello(_) => "hello",
        Frame::Welcome(_) => "welcome",
        Frame::Proof(_) => "proof",
        Frame::Reject(_) => "rejection",
        Frame::Sealed { .. } => "message",
    }
}

fn due_in(state: &State) -> &'static str {
    match state {
        State::AwaitHello => "a hello",
        State::AwaitWelcome { .. } => "a welcome",
        State::AwaitProof { .. } => "a proof",
        State::Established { .. } => "a message",
        State::Closed => "nothing",
    }
}
