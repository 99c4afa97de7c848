//! One session's parts: cut from frames and counted at one end, put in order and together at the other. No IO, no clock.
//!
//! The fabric promises no order. A part is taken once, whatever comes early or twice.

use std::collections::{BTreeMap, VecDeque};

use kvferry_local::wire::{Frame, GREETING_BYTES_MAX};

use crate::wire::{END, LAST};

/// Parts that may be under way before the peer has said that it took them.
const WINDOW: u64 = 32;
/// So many taken parts are told of at the latest.
const TELL_AFTER: u64 = WINDOW / 2;

/// What goes out.
#[derive(Default)]
pub(crate) struct Outgoing {
    parts: VecDeque<(u8, Vec<u8>)>,
    /// Of the next part.
    next: u64,
    /// How many the peer has taken.
    taken: u64,
    ended: bool,
}

impl Outgoing {
    /// Queues a frame in parts of at most `bytes_max` bytes.
    pub(crate) fn push(&mut self, frame: &Frame, bytes_max: usize) {
        if self.ended {
            return;
        }
        let encoded = frame.encode();
        let body = encoded.get(4..).unwrap_or_default();
        let mut parts = body.chunks(bytes_max.max(1)).peekable();
        while let Some(part) = parts.next() {
            let flags = if parts.peek().is_none() { LAST } else { 0 };
            self.parts.push_back((flags, part.to_vec()));
        }
    }

    /// Nothing follows what is queued.
    pub(crate) fn end(&mut self) {
        if !std::mem::replace(&mut self.ended, true) {
            self.parts.push_back((END, Vec::new()));
        }
    }

    /// The next part, if the window lets it go: its number, flags and bytes. It is gone with [`Outgoing::sent`].
    pub(crate) fn front(&self) -> Option<(u64, u8, &[u8])> {
        let (flags, bytes) = self.parts.front()?;
        (self.next - self.taken < WINDOW).then_some((self.next, *flags, bytes))
    }

    pub(crate) fn sent(&mut self) {
        if self.parts.pop_front().is_some() {
            self.next += 1;
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Parts that were not sent.
    pub(crate) fn waiting(&self) -> usize {
        self.parts.len()
    }

    /// The peer says how many it has taken.
    pub(crate) fn peer_took(&mut self, taken: u64) -> Result<(), String> {
        if taken > self.next {
            return Err(format!("it says that it took {taken} parts where {} were sent", self.next));
        }
        // Messages may overtake each other.
        self.taken = self.taken.max(taken);
        Ok(())
    }
}

/// What comes in.
#[derive(Default)]
pub(crate) struct Incoming {
    /// In order, not looked at yet.
    parts: VecDeque<(u8, Vec<u8>)>,
    early: BTreeMap<u64, (u8, Vec<u8>)>,
    /// Of the next part in order.
    expected: u64,
    taken: u64,
    told: u64,
    /// What is here of a frame.
    frame: Vec<u8>,
    is_trusted: bool,
    has_ended: bool,
}

/// What was put together.
#[derive(Debug, PartialEq)]
pub(crate) enum Whole {
    Frame(Frame),
    /// The peer has ended the session.
    End,
}

impl Incoming {
    /// From now on larger frames are taken.
    pub(crate) fn trust(&mut self) {
        self.is_trusted = true;
    }

    /// Takes a part as it comes.
    pub(crate) fn arrived(&mut self, number: u64, flags: u8, bytes: &[u8]) -> Result<(), String> {
        if number < self.expected || self.early.contains_key(&number) {
            return Ok(());
        }
        if number - self.taken >= WINDOW {
            return Err(format!("it sent part {number} where {} were taken", self.taken));
        }
        self.early.insert(number, (flags, bytes.to_vec()));
        while let Some(part) = self.early.remove(&self.expected) {
            self.has_ended |= part.0 & END != 0;
            self.parts.push_back(part);
            self.expected += 1;
        }
        Ok(())
    }

    /// Whether the peer has said its last word, taken or not.
    pub(crate) fn has_ended(&self) -> bool {
        self.has_ended
    }

    pub(crate) fn has_parts(&self) -> bool {
        !self.parts.is_empty()
    }

    /// The next whole frame, if it is here.
    pub(crate) fn next(&mut self) -> Result<Option<Whole>, String> {
        while let Some((flags, bytes)) = self.parts.pop_front() {
            self.taken += 1;
            if flags & END != 0 {
                return Ok(Some(Whole::End));
            }
            self.frame.extend_from_slice(&bytes);
            let first = self.frame.first().copied().unwrap_or_default();
            let most = if self.is_trusted { Frame::bytes_max(first) } else { GREETING_BYTES_MAX };
            if self.frame.len() > most {
                return Err(format!("it sent a frame of more than {most} bytes"));
            }
            if flags & LAST != 0 {
                let frame = Frame::decode(&std::mem::take(&mut self.frame));
                return frame
                    .map(|frame| Some(Whole::Frame(frame)))
                    .map_err(|e| format!("it sent a malformed frame: {e}"));
            }
        }
        Ok(None)
    }

    /// How many parts were taken, when the peer should be told.
    pub(crate) fn must_tell(&self) -> bool {
        self.taken - self.told >= TELL_AFTER
    }

    /// How many parts were taken; the peer is told now.
    pub(crate) fn tell(&mut self) -> u64 {
        self.told = self.taken;
        self.taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvferry_core::PoolId;

    fn notes(count: u64) -> Vec<Frame> {
        (0..count).map(|serial| Frame::Checked { serial: serial << 50, stood: true }).collect()
    }

    /// Sends everything, delivering each window's parts in the order that `order` makes of them; returns what arrived.
    fn carry(frames: &[Frame], bytes_max: usize, order: impl Fn(&mut Vec<(u64, u8, Vec<u8>)>)) -> Vec<Frame> {
        let (mut out, mut inn, mut got) = (Outgoing::default(), Incoming::default(), Vec::new());
        inn.trust();
        frames.iter().for_each(|frame| out.push(frame, bytes_max));
        while !out.is_empty() {
            let mut window = Vec::new();
            while let Some((number, flags, bytes)) = out.front() {
                window.push((number, flags, bytes.to_vec()));
                out.sent();
            }
            assert!(!window.is_empty(), "stuck");
            order(&mut window);
            for (number, flags, bytes) in window {
                inn.arrived(number, flags, &bytes).unwrap();
            }
            while let Some(whole) = inn.next().unwrap() {
                match whole {
                    Whole::Frame(frame) => got.push(frame),
                    Whole::End => panic!("nobody ended it"),
                }
            }
            if inn.must_tell() {
                out.peer_took(inn.tell()).unwrap();
            }
        }
        got
    }

    #[test]
    fn frames_arrive_once_and_in_order_however_parts_travel() {
        let frames = notes(200);
        for bytes_max in [1, 3, 4096] {
            assert_eq!(carry(&frames, bytes_max, |_| {}), frames);
            assert_eq!(carry(&frames, bytes_max, |window| window.reverse()), frames);
            assert_eq!(carry(&frames, bytes_max, |window| window.extend_from_within(..)), frames);
        }
    }

    #[test]
    fn a_sender_stops_at_the_window_and_goes_on_when_told() {
        let mut out = Outgoing::default();
        notes(100).iter().for_each(|frame| out.push(frame, 4096));
        let mut sent = 0;
        while out.front().is_some() {
            out.sent();
            sent += 1;
        }
        assert_eq!(sent, WINDOW);
        out.peer_took(5).unwrap();
        out.peer_took(3).unwrap();
        assert_eq!(out.front().map(|(number, ..)| number), Some(WINDOW));
        assert!(out.peer_took(WINDOW + 1).is_err(), "more than were sent");
    }

    #[test]
    fn what_breaks_the_rules_is_an_error() {
        let mut inn = Incoming::default();
        assert!(inn.arrived(WINDOW, LAST, b"x").is_err(), "beyond the window");
        let large = Frame::NotOpened { request: 1, reason: "x".repeat(300) }.encode();
        inn.arrived(0, LAST, &large[4..]).unwrap();
        assert!(inn.next().unwrap_err().contains("256"), "a stranger's frame of 300 bytes");
        let mut inn = Incoming::default();
        inn.arrived(0, LAST, &[0xee, 1, 2]).unwrap();
        assert!(inn.next().unwrap_err().contains("malformed"));
        let mut out = Outgoing::default();
        out.push(&Frame::Withdrawn { pool: PoolId(1), token: 2 }, 4096);
        out.end();
        out.push(&Frame::Withdrawn { pool: PoolId(1), token: 3 }, 4096);
        let mut inn = Incoming::default();
        while let Some((number, flags, bytes)) = out.front() {
            inn.arrived(number, flags, bytes).unwrap();
            out.sent();
        }
        assert!(matches!(inn.next(), Ok(Some(Whole::Frame(_)))) && inn.next() == Ok(Some(Whole::End)));
        assert_eq!(inn.next(), Ok(None));
    }
}
