//! Frames through memory, for peers that look there all the time: neither side enters the kernel.
//!
//! Each side has a [`Board`] that the other reads: a ring of the frames that it sends, and how much of the other's ring it has taken. Whatever is
//! read there is a peer's word, and is copied before it is looked at.
//!
//! Frames go through the socket, too: large ones, those with descriptors, and all while the peer sleeps. So that they stay in order, a
//! frame in the ring says how many went through the socket before it, and the ring is looked at before every frame of the socket.

use std::sync::atomic::{Ordering, fence};

use crate::board::{Board, Foreign};
use crate::wire::Frame;

/// Words of a board: what is told first, each on a cache line of its own, then the ring.
pub(crate) const BOARD_WORDS: u64 = DATA as u64 + RING_WORDS;
/// Where a board's owner tells how many words it has written into its ring, ever.
const WRITTEN: usize = 0;
/// Where it tells how many words of the other's ring it has taken, ever.
const TAKEN: usize = 8;
/// Where it tells whether it looks into the other's ring though nobody wakes it.
const AWAKE: usize = 16;
const DATA: usize = 64;
/// Words of frames that may wait to be taken.
pub(crate) const RING_WORDS: u64 = 8192;
/// What comes before a frame: the socket's frames before it, and its bytes.
const HEADER_WORDS: u64 = 2;
/// Bytes of a frame that goes this way.
const FRAME_BYTES_MAX: usize = 16 << 10;

/// Both directions between this side and one peer.
pub(crate) struct Ring {
    ours: Board,
    theirs: Foreign,
    written: u64,
    taken: u64,
    /// Words that were taken since the last look.
    at_once: u64,
    is_awake: bool,
}

/// What became of a frame that was to go through memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Written {
    /// The peer will see it.
    Seen,
    /// It is there, but the peer has gone to sleep meanwhile and has to be woken.
    ToWake,
    /// It has to go another way: the peer sleeps, the ring is full, or it is too large.
    No,
}

impl Ring {
    pub(crate) fn new(ours: Board, theirs: Foreign) -> Ring {
        Ring { ours, theirs, written: 0, taken: 0, at_once: 0, is_awake: false }
    }

    /// Sends a frame's bytes, if `before` frames went through the socket before it.
    pub(crate) fn write(&mut self, before: u64, frame: &[u8]) -> Written {
        let words = HEADER_WORDS + frame.len().div_ceil(8) as u64;
        let waiting = self.written.wrapping_sub(self.theirs.get(TAKEN));
        // A peer that claims to have taken more than there was gets nothing this way.
        let is_full = waiting.checked_add(words).is_none_or(|words| words > RING_WORDS);
        if frame.len() > FRAME_BYTES_MAX || is_full || self.theirs.get(AWAKE) == 0 {
            return Written::No;
        }
        // What the peer has taken is not read any more.
        fence(Ordering::Acquire);
        self.put(0, before);
        self.put(1, frame.len() as u64);
        let (whole, rest) = frame.as_chunks::<8>();
        let (start, until_end) = place(self.written.wrapping_add(HEADER_WORDS), whole.len());
        let (first, second) = whole.split_at(until_end);
        self.ours.set_all(start, first);
        self.ours.set_all(DATA, second);
        if !rest.is_empty() {
            let mut last = [0; 8];
            last.iter_mut().zip(rest).for_each(|(byte, rest)| *byte = *rest);
            self.put(words - 1, u64::from_le_bytes(last));
        }
        self.written = self.written.wrapping_add(words);
        fence(Ordering::Release);
        self.ours.set(WRITTEN, self.written);
        // Either the peer sees the frame before it sleeps, or its going to sleep is seen here.
        fence(Ordering::SeqCst);
        if self.theirs.get(AWAKE) == 0 { Written::ToWake } else { Written::Seen }
    }

    fn put(&self, index: u64, value: u64) {
        self.ours.set(place(self.written.wrapping_add(index), 1).0, value);
    }

    /// The peer's next frame, if it is here and `before` frames of the socket are enough for it. An error is the peer's fault.
    pub(crate) fn next(&mut self, before: u64) -> Result<Option<Frame>, String> {
        let Some(waiting) = self.waiting(before)? else { return Ok(None) };
        let length = self.word(1);
        let words = HEADER_WORDS + length.div_ceil(8);
        if length == 0 || length > FRAME_BYTES_MAX as u64 || words > waiting {
            return Err(format!("it announced a frame of {length} bytes in memory where {waiting} words are"));
        }
        let mut body = vec![[0; 8]; (words - HEADER_WORDS) as usize];
        let (start, until_end) = place(self.taken.wrapping_add(HEADER_WORDS), body.len());
        let (first, second) = body.split_at_mut(until_end);
        self.theirs.get_all(start, first);
        self.theirs.get_all(DATA, second);
        let bytes = body.as_flattened().get(..length as usize).unwrap_or_default();
        self.taken = self.taken.wrapping_add(words);
        self.at_once += words;
        fence(Ordering::Release);
        self.ours.set(TAKEN, self.taken);
        Frame::decode(bytes).map(Some).map_err(|e| format!("it sent a malformed frame: {e}"))
    }

    /// Whether [`Ring::next`] has something to say.
    pub(crate) fn has_next(&self, before: u64) -> bool {
        !matches!(self.waiting(before), Ok(None))
    }

    /// Words that are here, unless there are none or more of the socket's frames are due first.
    fn waiting(&self, before: u64) -> Result<Option<u64>, String> {
        let waiting = self.theirs.get(WRITTEN).wrapping_sub(self.taken);
        fence(Ordering::Acquire);
        match waiting {
            0 => Ok(None),
            1..HEADER_WORDS | RING_WORDS.. if waiting != RING_WORDS => {
                Err(format!("it says that {waiting} words are in a ring of {RING_WORDS}"))
            }
            _ => Ok((self.word(0) <= before).then_some(waiting)),
        }
    }

    fn word(&self, index: u64) -> u64 {
        self.theirs.get(place(self.taken.wrapping_add(index), 1).0)
    }

    /// Words that were taken, ever.
    pub(crate) fn taken(&self) -> u64 {
        self.taken
    }

    /// Whether a whole ring was taken since the last look: a peer that never stops has to let others have a turn.
    pub(crate) fn is_spent(&self) -> bool {
        self.at_once >= RING_WORDS
    }

    /// Begins a look, and says that this side looks here soon again, whether it is woken or not.
    pub(crate) fn look(&mut self) {
        self.at_once = 0;
        if !std::mem::replace(&mut self.is_awake, true) {
            self.ours.set(AWAKE, 1);
        }
    }

    /// Says that this side has to be woken. Afterwards it has to look once more.
    pub(crate) fn sleep(&mut self) {
        if std::mem::replace(&mut self.is_awake, false) {
            self.ours.set(AWAKE, 0);
            fence(Ordering::SeqCst);
        }
    }
}

/// Where a word of the ring lies on its board, and how many of `count` words from there on come before the ring's end.
fn place(number: u64, count: usize) -> (usize, usize) {
    let at = (number % RING_WORDS) as usize;
    (DATA + at, count.min(RING_WORDS as usize - at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvferry_core::PoolId;
    use rustix::fs::SealFlags;
    use std::sync::atomic::AtomicU64;

    /// Both ends, in one process.
    fn pair() -> (Ring, Ring) {
        let board = || Board::new(BOARD_WORDS).unwrap();
        let map = |board: &Board| {
            Foreign::map(&board.fd().unwrap().try_clone_to_owned().unwrap(), BOARD_WORDS).unwrap().unwrap()
        };
        let (one, two) = (board(), board());
        let (of_one, of_two) = (map(&one), map(&two));
        (Ring::new(one, of_two), Ring::new(two, of_one))
    }

    fn frame(serial: u64) -> Frame {
        Frame::Check { serial, pool: PoolId(7), token: serial.wrapping_mul(0x9e37_79b9_7f4a_7c15) }
    }

    fn body(frame: &Frame) -> Vec<u8> {
        frame.encode().split_off(4)
    }

    #[test]
    fn frames_come_out_as_they_went_in_round_and_round() {
        let (mut from, mut to) = pair();
        to.look();
        let mut sent = 0;
        for taken in 0..20_000 {
            while from.write(0, &body(&frame(sent))) == Written::Seen {
                sent += 1;
            }
            assert_eq!(to.next(0), Ok(Some(frame(taken))));
        }
        assert!(sent > 20_000);
        for taken in 20_000..sent {
            assert_eq!(to.next(0), Ok(Some(frame(taken))));
        }
        assert_eq!(to.next(0), Ok(None));
    }

    /// Whole words or not, and whatever of them comes behind the ring's end.
    #[test]
    fn frames_of_every_length_come_out_whole_wherever_they_begin() {
        let (mut from, mut to) = pair();
        to.look();
        let is_cut = |at: u64, words: u64| at % RING_WORDS + words > RING_WORDS;
        let (mut cut, mut ends) = (0, [0; 8]);
        for length in (0..300).chain((300..16_000).step_by(37)).chain(15_990..16_300) {
            let words = (0..length).map(|at: usize| (at * 31 + length) as u8).collect::<Vec<_>>();
            let sent = Frame::Own(words.into());
            let body = body(&sent);
            cut += u32::from(is_cut(from.written, HEADER_WORDS + body.len().div_ceil(8) as u64));
            ends[body.len() % 8] += 1;
            assert_eq!(from.write(0, &body), Written::Seen, "{length} bytes");
            // As the board has it, word by word.
            let at = to.taken;
            let word = |index: usize| to.theirs.get(DATA + ((at + HEADER_WORDS + index as u64) % RING_WORDS) as usize);
            let plain: Vec<u8> = (0..body.len().div_ceil(8)).flat_map(|index| word(index).to_le_bytes()).collect();
            assert_eq!(plain[..body.len()], body, "{length} bytes");
            assert_eq!(to.next(0), Ok(Some(sent)), "{length} bytes");
        }
        assert!(cut > 20 && ends.iter().all(|ends| *ends > 20), "{cut} frames were cut; {ends:?}");
    }

    #[test]
    fn who_sleeps_gets_nothing_and_who_falls_asleep_is_to_be_woken() {
        let (mut from, mut to) = pair();
        assert_eq!(from.write(0, &body(&frame(1))), Written::No);
        to.look();
        assert_eq!(from.write(0, &body(&frame(1))), Written::Seen);
        to.sleep();
        assert!(to.has_next(0), "it came before");
        assert_eq!(from.write(0, &body(&frame(2))), Written::No);
        assert_eq!((to.next(0), to.next(0)), (Ok(Some(frame(1))), Ok(None)));
    }

    /// Waits for the other thread. Nobody panics in between, which would let it wait for ever.
    fn meet(mine: &AtomicU64, other: &AtomicU64, at: u64) {
        mine.store(at, Ordering::Release);
        let mut turns = 0;
        while other.load(Ordering::Acquire) < at {
            turns += 1;
            if turns % 128 == 0 {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
    }

    #[test]
    fn a_frame_is_seen_by_who_falls_asleep_or_its_sleep_by_who_writes() {
        const ROUNDS: u64 = 100_000;
        let board = || Board::new(BOARD_WORDS).unwrap();
        let fd = |board: &Board| board.fd().unwrap().try_clone_to_owned().unwrap();
        let (one, two) = (board(), board());
        let (of_one, of_two) = (fd(&one), fd(&two));
        let (writer, sleeper, seen) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        let pause = |turns: u64| {
            (0..turns).for_each(|turn| {
                std::hint::black_box(turn);
            })
        };
        let (missed, met) = std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut from = Ring::new(one, Foreign::map(&of_two, BOARD_WORDS).unwrap().unwrap());
                let body = body(&frame(1));
                for round in 1..=ROUNDS {
                    meet(&writer, &sleeper, 2 * round - 1);
                    pause(round * 7 % 1021);
                    let written = from.write(0, &body);
                    seen.store(u64::from(written == Written::Seen), Ordering::Relaxed);
                    meet(&writer, &sleeper, 2 * round);
                }
            });
            let mut to = Ring::new(two, Foreign::map(&of_one, BOARD_WORDS).unwrap().unwrap());
            let (mut missed, mut met) = (0, 0);
            for round in 1..=ROUNDS {
                to.look();
                while let Ok(Some(_)) = to.next(0) {}
                meet(&sleeper, &writer, 2 * round - 1);
                pause(round % 1031);
                to.sleep();
                let has_next = to.has_next(0);
                meet(&sleeper, &writer, 2 * round);
                let is_seen = seen.load(Ordering::Relaxed) == 1;
                missed += u64::from(is_seen && !has_next);
                met += u64::from(is_seen);
            }
            (missed, met)
        });
        assert_eq!(missed, 0, "of {met}");
    }

    #[test]
    fn a_frame_waits_for_those_of_the_socket_before_it() {
        let (mut from, mut to) = pair();
        to.look();
        assert_eq!(from.write(3, &body(&frame(1))), Written::Seen);
        assert!(!to.has_next(2));
        assert_eq!(to.next(2), Ok(None));
        assert_eq!(to.next(3), Ok(Some(frame(1))));
    }

    #[test]
    fn large_frames_go_another_way() {
        let (mut from, mut to) = pair();
        to.look();
        assert_eq!(from.write(0, &vec![0; FRAME_BYTES_MAX + 1]), Written::No);
        assert_eq!(from.write(0, &vec![0xff; FRAME_BYTES_MAX]), Written::Seen);
        assert!(to.next(0).unwrap_err().contains("malformed"));
    }

    #[test]
    fn what_a_peer_tells_is_not_believed() {
        // More words than there are, or half a header.
        for written in [RING_WORDS + 1, u64::MAX, 1] {
            let (from, mut to) = pair();
            from.ours.set(WRITTEN, written);
            assert!(to.has_next(0), "an error is something to say");
            assert!(to.next(0).is_err(), "{written}");
        }
        // A frame longer than what was written, too long for this way, or without end.
        for length in [0, 9, FRAME_BYTES_MAX as u64 + 1, u64::MAX] {
            let (from, mut to) = pair();
            from.ours.set(DATA + 1, length);
            from.ours.set(WRITTEN, HEADER_WORDS + 1);
            assert!(to.next(0).is_err(), "{length}");
        }
        // Having taken what was never there makes room for nothing.
        let (mut from, to) = pair();
        to.ours.set(AWAKE, 1);
        to.ours.set(TAKEN, 5);
        assert_eq!(from.write(0, &body(&frame(1))), Written::No);
    }

    #[test]
    fn foreign_memory_has_to_be_sealed_and_long_enough() {
        let plain = rustix::fs::memfd_create("plain", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&plain, BOARD_WORDS * 8).unwrap();
        assert!(Foreign::map(&plain, BOARD_WORDS).err().unwrap().contains("lacks seals"));
        let short = Board::new(BOARD_WORDS - 1).unwrap();
        let short = short.fd().unwrap().try_clone_to_owned().unwrap();
        assert!(Foreign::map(&short, BOARD_WORDS).err().unwrap().contains("are due"));
        // More than this process has addresses for is no fault of the peer's.
        let words = 1 << 57;
        let huge = rustix::fs::memfd_create("huge", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&huge, words * 8).unwrap();
        let seals = SealFlags::FUTURE_WRITE | SealFlags::SHRINK | SealFlags::GROW;
        rustix::fs::fcntl_add_seals(&huge, seals).unwrap();
        assert!(matches!(Foreign::map(&huge, words), Ok(None)));
    }
}
